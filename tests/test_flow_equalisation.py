"""The analysis of equalised flows: it runs on a tiny model and reuses its arms; every claim is tested both ways."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny_models import tiny_hf, tiny_tokenizer

from analyses import flow_equalisation, flow_equalisation_claims
from analyses.neuron_clamping import read_jsonl
from interp import load_model
from interp.flow.equalization import EQUALIZE_COLUMNS
from interp.flow.equalized_arms import combine
from interp.flow.named_concepts import mentions
from interp.report import write_report
from interp.report.claims import Claim
from interp.results import Provenance, Result

KEYS = ["claim", "source", "paper", "ours", "interval", "n", "holds"]
ROWS = [
    {"split": "tuning", "text": " the king is in the sea", "concepts": ["king", "sea"]},
    {"split": "test", "text": " the dog is in the sea", "concepts": ["dog", "sea"]},
    {"split": "test", "text": " a cat of the king is red", "concepts": ["cat", "king", "red"]},
    {"split": "test", "text": " water is tea", "concepts": ["water", "tea"]},
]
N = 20
SOFT, EXACT, VARIANCE = "min soft", "min exact", "variance soft"


# The prompts


def test_prompts_are_as_the_readme_says() -> None:
    rows = read_jsonl("concept_prompts.jsonl")
    assert [set(row) for row in rows] == [{"id", "split", "text", "concepts"}] * len(rows)
    splits = pd.Series([row["split"] for row in rows]).value_counts()
    assert dict(splits) == {"test": 48, "tuning": 12}
    assert len({row["text"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert 4 <= len(row["concepts"]) <= 5
        assert len(set(row["concepts"])) == len(row["concepts"])
        for concept in row["concepts"]:
            assert re.search(rf"\ban? {concept}\b", row["text"]), row["id"]
            # No concept is part of another, so that naming one never counts for two.
            assert [mentions(concept, other) for other in row["concepts"]].count(True) == 1


# The analysis


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(flow_equalisation, "read_jsonl", lambda name: ROWS)
    return load_model(tiny_hf("llama"), tiny_tokenizer())


def test_every_arm_is_compared_and_reused(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = flow_equalisation.run(model, tmp_path, steps=2, max_new_tokens=3)
    arms = ["none", SOFT, EXACT, VARIANCE, f"random like {SOFT}", f"random like {EXACT}"]
    assert section.items[0]["arm"].tolist() == arms
    assert set(section.items[0]["n"]) == {3}
    pairs = section.items[1][["arm", "baseline"]].drop_duplicates().values.tolist()
    assert [SOFT, f"random like {SOFT}"] in pairs
    assert [SOFT, f"random like {EXACT}"] not in pairs
    rows = json.loads((tmp_path / "claims.json").read_text())
    assert [list(row) for row in rows] == [KEYS] * 9
    assert {row["n"] for row in rows} == {3}
    assert write_report([section], tmp_path / "r.html").stat().st_size > 1_000_000

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(flow_equalisation, "equalize", again)
    flow_equalisation.run(model, tmp_path, steps=2, max_new_tokens=3)
    with pytest.raises(AssertionError, match="made again"):
        flow_equalisation.run(model, tmp_path, steps=3, max_new_tokens=3)
    with pytest.raises(AssertionError, match="made again"):
        flow_equalisation.run(model, tmp_path, steps=2, max_new_tokens=3, n_prompts=2)


def test_the_short_run_has_fewer_arms(model: Any, tmp_path: Path) -> None:
    section = flow_equalisation.run(model, tmp_path, max_new_tokens=3, **flow_equalisation.REPORT)
    assert section.items[0]["arm"].tolist() == ["none", EXACT, f"random like {EXACT}"]
    assert len(section.claims) == 4


def test_a_random_arm_belongs_to_its_ascent(model: Any, tmp_path: Path) -> None:
    flow_equalisation.run(model, tmp_path, steps=1, max_new_tokens=3)
    section = flow_equalisation.run(model, tmp_path, steps=2, max_new_tokens=3)
    table = section.items[0].set_index("arm")
    assert table.loc[f"random like {SOFT}", "‖δ‖ share"] == pytest.approx(table.loc[SOFT, "‖δ‖ share"], rel=1e-4)


def test_step_sizes_are_chosen_on_the_tuning_prompts(model: Any, tmp_path: Path) -> None:
    table = flow_equalisation.tune(model, tmp_path, rates=(0.001, 0.01), max_new_tokens=3)
    assert table["arm"].tolist() == ["none", SOFT, SOFT, EXACT, EXACT, VARIANCE, VARIANCE]
    assert table.groupby("arm")["chosen"].sum().to_dict() == {"none": 0, SOFT: 1, EXACT: 1, VARIANCE: 1}
    assert (tmp_path / "min_soft_0.01.parquet").exists()


@pytest.mark.parametrize(
    ("mentioned", "ratio", "chosen"),
    [
        ([0.5, 0.6, 0.7], [1.0, 1.0, 1.5], 0.003),  # the best that is fluent
        ([0.6, 0.6, 0.5], [1.0, 1.1, 1.0], 0.003),  # of two alike the larger
        ([0.5, 0.6, 0.7], [1.3, 1.2, 1.5], 0.003),  # none is fluent: the one that rises least
    ],
)
def test_choose(mentioned: list[float], ratio: list[float], chosen: float) -> None:
    rows = {"arm": SOFT, "rate": [0.001, 0.003, 0.01], "mentioned": mentioned, "perplexity_ratio": ratio}
    table = pd.concat(
        [
            pd.DataFrame([{"arm": "none", "rate": math.nan, "mentioned": 0.9, "perplexity_ratio": 1.0}]),
            pd.DataFrame(rows),
        ]
    )
    found = flow_equalisation.choose(table.reset_index(drop=True))
    assert found.loc[found["chosen"], "rate"].tolist() == [chosen]


# The claims


def made(
    arm: str,
    named: float,
    nll: float = 1.0,
    before: tuple[float, float] = (0.2, 0.4),
    after: tuple[float, float] | None = None,
) -> Result:
    """An arm whose first prompts, a share `named` of them, name both concepts; the others name none."""
    after = before if after is None else after
    wobble = np.random.default_rng(0).normal(0, 0.001, N)
    rows = [
        {
            "prompt": prompt,
            "concept": f"c{number}",
            "flow_before": before[number],
            "flow_after": after[number] + wobble[prompt],
            "own_before": before[number],
            "own_after": after[number] + wobble[prompt],
            "mentioned": prompt < named * N,
            "nll": nll + wobble[prompt],
        }
        for prompt in range(N)
        for number in range(2)
    ]
    fill: dict[str, Any] = {"arm": arm, "prompt_text": "p", "text": "t", "n_tokens": 3, "norm": 0.1, "steps": 2}
    fill |= {"first_position": 1, "n_positions": 1, "kept_step": 2, "stopped": "steps"}
    frame = pd.DataFrame(rows).assign(**fill)
    frame["perplexity"] = np.exp(frame["nll"])
    attachments = {"position_norms": {arm: []}, "trace": {}}
    return Result("flow.equalize", frame, EQUALIZE_COLUMNS, Provenance(parameters={"arm": arm}), attachments)


def claims(soft: dict[str, Any], random: float = 0.4, variance: float = 0.4, nothing: float = 0.4) -> list[Claim]:
    arms = [made("none", nothing), made(SOFT, **soft), made(VARIANCE, variance), made(f"random like {SOFT}", random)]
    return flow_equalisation_claims.claims(combine(arms))


NAMES = ["equalised", "raises", "random", "fluent", "variance"]
# What Vico found, as if we had.
FOUND: dict[str, Any] = {"named": 0.8, "nll": 1.0, "after": (0.4, 0.45)}


@pytest.mark.parametrize(
    ("soft", "others", "lost"),
    [
        ({}, {}, set()),
        ({"after": (0.2, 0.4)}, {}, {"equalised"}),  # flows as they were
        ({"after": (0.3, 0.7)}, {}, {"equalised"}),  # larger, and no more equal
        ({"named": 0.4}, {}, {"raises", "random", "variance"}),
        ({"named": 0.2}, {}, {"raises", "random", "variance"}),
        ({"named": 0.45}, {}, {"raises", "random", "variance"}),  # one prompt more: the interval meets zero
        ({}, {"random": 0.8}, {"random"}),
        ({}, {"variance": 0.8}, {"variance"}),
        ({}, {"nothing": 0.8, "variance": 0.9}, {"raises", "variance"}),
        ({"nll": 1.0 + math.log(1.05)}, {}, set()),
        ({"nll": 1.0 + math.log(1.15)}, {}, {"fluent"}),
    ],
)
def test_each_claim_holds_by_its_own_numbers(soft: dict[str, Any], others: dict[str, float], lost: set[str]) -> None:
    found = claims(FOUND | soft, **others)
    assert {name for name, claim in zip(NAMES, found, strict=True) if not claim.holds} == lost
    assert all(claim.n == N for claim in found)


def test_claims_print_what_they_rest_on() -> None:
    equalised, raises, random, fluent, _ = claims(FOUND | {"nll": 1.0 + math.log(1.05)})
    assert "40.66 plain, 67.84 hard, 73.55 soft" in str(raises.paper)
    assert "40.0% → 80.0%, change +0.400" in str(raises.ours)
    assert raises.interval is not None
    assert raises.interval[0] < 0.4 < raises.interval[1]
    assert "0.667 → 0.941" in str(equalised.ours)
    assert "80.0% against 40.0%" in str(random.ours)
    assert fluent.interval == pytest.approx((1.05, 1.05), abs=0.002)


def test_a_single_prompt_supports_nothing_and_does_not_crash() -> None:
    arms = [made("none", 0.0), made(SOFT, 1.0), made(f"random like {SOFT}", 0.0)]
    one = [
        Result(arm.kind, arm.frame.query("prompt == 0"), arm.columns, arm.provenance, arm.attachments) for arm in arms
    ]
    found = flow_equalisation_claims.claims(combine(one))
    assert [claim.interval for claim in found] == [None] * 4
    assert [claim.holds for claim in found] == [None] * 4


@pytest.mark.slow
def test_the_embedded_model_runs_the_short_analysis(embedded: Any, tmp_path: Path) -> None:
    section = flow_equalisation.run(embedded, tmp_path, n_prompts=2, arms=(EXACT,), steps=2, max_new_tokens=8)
    table = section.items[2].set_index("arm")
    assert table.loc[EXACT, "least after"] > table.loc[EXACT, "least before"]
    assert table.loc["none", "least after"] == table.loc["none", "least before"]
