"""The analysis of the toy from its public entry, on runs of a few steps: claims of the agreed form, and nothing trained twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analyses import bigram_backcopy, bigram_causes
from interp.report import write_report
from interp.results import Result
from interp.sinks import bigram_training

KEYS = ["claim", "source", "paper", "ours", "interval", "n", "holds"]
TINY: dict[str, Any] = {"width": 8, "length": 12, "batch": 4, "steps": 20, "sample": 5, "cooldown": 0}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> bigram_causes.Effort:
    for module in (bigram_backcopy, bigram_causes):
        monkeypatch.setattr(module, "JUDGED", 20)
    return bigram_causes.Effort(TINY, seeds=(0, 1), deep=TINY)


def test_claims_and_report(
    small: bigram_causes.Effort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    section = bigram_backcopy.run(tmp_path / "toy", device="cpu", effort=small)
    rows = json.loads((tmp_path / "toy" / "claims.json").read_text())
    assert [list(row) for row in rows] == [KEYS] * len(rows)
    assert [row["holds"] for row in rows[:3]] == [True, True, True]  # facts of the task
    assert rows[0]["ours"] == pytest.approx(0.2555, abs=1e-4)
    backcopy = next(row for row in rows if row["claim"].startswith("backcopy is learned"))
    assert backcopy["holds"] is False  # after 20 steps
    assert backcopy["n"] == 2
    assert backcopy["interval"][0] <= backcopy["ours"] <= backcopy["interval"][1]
    assert all(row["holds"] is not None for row in rows)
    curves = next(item for item in section.items if isinstance(item, pd.DataFrame) and "curve" in item)
    assert curves["curve"].nunique() == 2
    assert curves.iloc[-1]["delta_logit"] == 16.83
    kinds = {item.kind for item in section.items if isinstance(item, Result)}
    assert len(list((tmp_path / "toy").glob("*.parquet"))) == sum(isinstance(item, Result) for item in section.items)
    assert kinds == {
        f"sinks.{name}" for name in ("train_toy", "compare_toys", "intervene_toy", "toy_characters", "toy_attention")
    }
    assert write_report([section], tmp_path / "report.html").stat().st_size > 100_000

    def again(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(bigram_training, "_take_step", again)
    repeated = bigram_backcopy.run(tmp_path / "toy", device="cpu", effort=small)
    assert repeated.claims == section.claims


def test_the_short_effort_says_what_it_leaves_out(small: bigram_causes.Effort, tmp_path: Path) -> None:
    section = bigram_backcopy.run(tmp_path, device="cpu", effort=bigram_causes.Effort(TINY, seeds=(3,)))
    left_out = [claim for claim in section.claims if claim.holds is None]
    assert left_out
    assert all("short" in str(claim.ours) for claim in left_out)
    assert all(claim.interval is None for claim in section.claims if "1 seed" in claim.claim)
