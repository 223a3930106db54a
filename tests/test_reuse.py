"""A second run takes what the first left, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from interp.results import Column, Provenance, Result
from interp.reuse import reuse_or_make


def make(calls: list[str], label: str, fingerprint: str = "f", **parameters: object) -> Result:
    calls.append(label)
    column = Column("x", "int8", "", "a number")
    return Result(
        "neurons.x", pd.DataFrame({"x": [1]}), (column,), Provenance(fingerprint=fingerprint, parameters=parameters)
    )


def test_reused_only_for_the_same_model_and_parameters(tmp_path: Path) -> None:
    path, calls = tmp_path / "a" / "r.parquet", list[str]()
    reuse_or_make(path, lambda: make(calls, "first", k=1, other=5), fingerprint="f", parameters={"k": 1})
    again = reuse_or_make(path, lambda: make(calls, "second", k=1), fingerprint="f", parameters={"k": 1})
    assert calls == ["first"]
    assert again.provenance.parameters["other"] == 5
    reuse_or_make(path, lambda: make(calls, "other k", k=2), fingerprint="f", parameters={"k": 2})
    reuse_or_make(path, lambda: make(calls, "other model", "g", k=2), fingerprint="g", parameters={"k": 2})
    assert calls == ["first", "other k", "other model"]
    path.write_bytes(path.read_bytes()[:40])
    reuse_or_make(path, lambda: make(calls, "damaged", "g", k=2), fingerprint="g", parameters={"k": 2})
    assert calls[-1] == "damaged"
