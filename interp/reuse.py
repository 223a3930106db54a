"""Make a result, or take the one that an earlier run of the same analysis left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from interp.errors import ResultError
from interp.provenance import as_json
from interp.results import Result, load_result


def reuse_or_make(
    path: str | Path, make: Callable[[], Result], *, fingerprint: str, parameters: Mapping[str, Any] | None = None
) -> Result:
    """The result saved at `path`, if it was made from the same model with the same parameters; else make and save it.

    Args:
        path: a Parquet file.
        make: makes the result. What it gives is saved at once, so that a run that is interrupted later loses nothing.
        fingerprint: the model's; a saved result of another model is made again.
        parameters: values that the saved result's provenance must have; others are not looked at.

    Returns:
        The result. A file that is damaged, or of another model or other parameters, is replaced.

    Raises:
        ResourceError: the file cannot be written.
    """
    path = Path(path)
    wanted = as_json(dict(parameters or {}), "parameters")
    if path.exists():
        try:
            saved = load_result(path)
        except ResultError as error:
            print(f"interp: making {path.name} again: {error}", file=sys.stderr)
        else:
            have = saved.provenance.parameters
            if saved.provenance.fingerprint == fingerprint and all(have.get(key) == wanted[key] for key in wanted):
                print(f"interp: using {path.name} of {saved.provenance.created}", file=sys.stderr)
                return saved
    result = make()
    result.save(path)
    return result
