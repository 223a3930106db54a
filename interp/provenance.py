"""Provenance: what made a result, so that it can be made again.

It is collected without importing a model library: the model is read by its attributes, versions come from the
installed packages' metadata. It holds no absolute path of the machine.
"""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Self

from interp.errors import InputError

PACKAGES = (
    *("interp", "torch", "transformers", "transformer-lens", "nnsight", "captum"),
    *("numpy", "scipy", "pandas", "pyarrow"),
)
_ABSOLUTE = re.compile(r"""(?<![\w.~/\\-])(?:/+|[A-Za-z]:[\\/]+)[^\s/\\=:,;'"][^\s=:,;'"]*""")
_URL = re.compile(r"^(?!file:)[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True)
class Provenance:
    """What made a result.

    Attributes:
        model: the model's name: hub id, folder name or file name.
        fingerprint: hash of its config and weights.
        dtype: of the weights, such as `float32`.
        attention: implementation that ran, such as `eager`.
        device: such as `cpu` or `cuda:0`.
        seed: of torch, numpy and random.
        parameters: the arguments, as JSON values.
        versions: package → version, with Python's own.
        command: how the process was started, without folders.
        wall_time: seconds.
        created: ISO time, UTC.
    """

    model: str | None = None
    fingerprint: str | None = None
    dtype: str | None = None
    attention: str | None = None
    device: str | None = None
    seed: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    wall_time: float = 0.0
    created: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", as_json(self.parameters, "parameters"))

    @classmethod
    def collect(
        cls,
        model: object | None = None,
        *,
        seed: int | None = None,
        parameters: Mapping[str, Any] | None = None,
        wall_time: float = 0.0,
    ) -> Self:
        """Reads off the model, the installed packages and the process what is needed to run the same again.

        Args:
            model: anything with some of the attributes name, fingerprint, dtype, attention, device; or none.
            seed: of the run.
            parameters: the arguments; numpy scalars and arrays become JSON, a path its last part.
            wall_time: seconds.

        Raises:
            InputError: a parameter cannot be written as JSON.

        Example:
            >>> Provenance.collect(seed=7, parameters={"layers": (1, 2)}).parameters
            {'layers': [1, 2]}
        """

        def attribute(name: str) -> str | None:
            value = getattr(model, name, None)
            return None if value is None else _without_folders(str(value).removeprefix("torch."))

        return cls(
            model=attribute("name"),
            fingerprint=attribute("fingerprint"),
            dtype=attribute("dtype"),
            attention=attribute("attention"),
            device=attribute("device"),
            seed=None if seed is None else int(seed),
            parameters=dict(parameters or {}),
            versions=dict(_versions()),
            command=_command(sys.argv),
            wall_time=float(wall_time),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; a wrong or missing field is a TypeError or KeyError."""
        if not isinstance(values["parameters"], dict) or not isinstance(values["versions"], dict):
            raise TypeError("parameters and versions must be objects")
        return cls(**{entry.name: values[entry.name] for entry in fields(cls)})


def as_json(value: Any, what: str) -> Any:
    """The same value made of JSON's own types (tuple → list, numpy → numbers, path → its last part).

    Raises:
        InputError: it holds something else, or a key that is not a string.
    """
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise InputError(f"{what}: keys must be strings to be saved as JSON, got {wrong[0]!r}")
        return {key: as_json(entry, f"{what}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry, f"{what}[{index}]") for index, entry in enumerate(value)]
    if isinstance(value, set | frozenset | range):
        return as_json(sorted(value), what)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str | int | float):
        return json.loads(json.dumps(value))  # numpy.float64, a string enum and other subclasses become plain
    if isinstance(value, os.PathLike):
        return PurePosixPath(os.fspath(value)).name
    if callable(getattr(value, "tolist", None)):  # numpy scalars and arrays, tensors
        return as_json(value.tolist(), what)
    raise InputError(f"{what}: a {type(value).__name__} cannot be saved as JSON; give a string, number, list or dict")


@cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _command(argv: list[str]) -> str:
    program = PurePosixPath(argv[0] if argv else "")
    name = f"-m {program.parent.name}" if program.name == "__main__.py" else shlex.quote(program.name)
    return " ".join([name, *(shlex.quote(_without_folders(argument)) for argument in argv[1:])])


def _without_folders(text: str) -> str:
    """An absolute path becomes its last part, alone or inside an argument such as `--out=/a/b.parquet`."""
    if _URL.match(text):
        return text
    option, equals, value = text.rpartition("=")
    if PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute():
        return option + equals + (PureWindowsPath(value).name or "/")  # a Windows path knows both separators
    return _ABSOLUTE.sub(lambda match: PureWindowsPath(match.group()).name, text)
