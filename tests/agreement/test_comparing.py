"""One call from texts to three results, on a causal language model and on an encoder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from plain_games import tiny_classifier

import interp
from interp.agreement import Comparison, compare, explain, faithfulness, pairwise_agreement
from interp.agreement.methods import DEFAULT_METHODS
from interp.agreement.rankings import MEASURES
from interp.agreement.tasks import Verbalizer
from interp.errors import InputError
from interp.results import load_result

TASK = Verbalizer(
    {"no": " water", "yes": " money"}, template="{text} is", shots=[(" the dog is old", "yes")], separator=""
)
CAUSAL = [(" the dog of the sea", "no"), (" a king in", "yes"), (" the old cat in water code", "yes")]
ENCODED = ["the dog of the sea", "a king in", "the old cat in water code"]
FAST = {"lime": {"n_samples": 20}, "kernel_shap": {"n_samples": 20}, "integrated_gradients": {"max_steps": 50}}


@pytest.fixture(scope="module", params=["causal", "encoder"])
def made(request: pytest.FixtureRequest, tiny: Any) -> tuple[Any, Any, Any, Comparison]:
    """(model, examples, task, comparison)."""
    causal = request.param == "causal"
    model = tiny() if causal else tiny_classifier()
    examples, task = (CAUSAL, TASK) if causal else (ENCODED, None)
    return model, examples, task, compare(model, examples, task=task, options=FAST)


def test_three_results_of_all_default_methods(made: Any) -> None:
    comparison = made[3]
    assert [one.kind for one in comparison] == [
        "agreement.explain",
        "agreement.pairwise_agreement",
        "agreement.faithfulness",
    ]
    methods = [name for name in DEFAULT_METHODS if name != "deeplift"]
    for result in comparison:
        assert result.provenance.fingerprint == made[0].fingerprint
        assert result.provenance.parameters["methods"] == methods
        assert set(result.provenance.parameters["refused"]) == {"deeplift"}
    n = len(methods)
    assert len(comparison.agreement.frame) == len(MEASURES) * n * (n + 1) // 2
    assert set(comparison.agreement.frame["k"]) == {0, 3}
    assert set(comparison.faithfulness.frame["method"]) == set(methods)
    assert (comparison.agreement.frame["n"] == 3).all()
    assert comparison.explanations.provenance.parameters["seeds"] == [0, 1]


def test_agreement_has_chance_and_ceiling(made: Any) -> None:
    frame = made[3].agreement.frame.query("measure == 'kendall'").set_index(["method_a", "method_b"])
    assert frame.loc[("recency", "first"), "mean"] == pytest.approx(-1)
    assert frame.loc[("random", "random"), "ceiling"] < 1
    assert frame.loc[("attention", "attention"), "mean"] == 1
    assert (frame["chance"] == 0).all()
    # Leave-one-out is among what faithfulness measures, and agrees with itself.
    faithful = made[3].faithfulness.frame.query("method == 'leave_one_out' and measure == 'leave_one_out'")
    np.testing.assert_allclose(faithful["value"], 1)


def test_one_call_is_the_three_calls(made: Any) -> None:
    model, examples, task, comparison = made
    explanations = explain(model, examples, task=task, options=FAST, seeds=(0, 1))
    agreed = pairwise_agreement(explanations, k=(3,), rank_by="abs")
    faithful = faithfulness(model, examples, explanations, task=task, n_normalised=0)
    own = ["seconds", "computed"]
    pd.testing.assert_frame_equal(
        comparison.explanations.frame.drop(columns=own), explanations.frame.drop(columns=own), rtol=0, atol=1e-5
    )
    pd.testing.assert_frame_equal(comparison.agreement.frame, agreed.frame, rtol=0, atol=1e-6)
    pd.testing.assert_frame_equal(comparison.faithfulness.frame, faithful.frame, rtol=0, atol=1e-5)


def test_results_are_loaded_as_they_were_saved(made: Any, tmp_path: Path) -> None:
    for result in made[3]:
        loaded = load_result(result.save(tmp_path / f"{result.kind}.parquet"))
        pd.testing.assert_frame_equal(loaded.frame, result.frame)
        assert loaded.attachments == result.attachments
        assert loaded.provenance == result.provenance


def test_a_report_takes_all_three(made: Any, tmp_path: Path) -> None:
    if importlib.util.find_spec("interp.agreement.plots") is None:
        pytest.skip("the plots are not there")
    page = interp.report(list(made[3]), tmp_path / "report.html").read_text()
    for name in ("leave_one_out", "rollout", "deeplift is not valid here"):
        assert name in page


def test_settings_reach_their_step(tiny: Any, tmp_path: Path) -> None:
    mine = [[1.0, 2, 3, 4, 5], [3.0, 1, 2], [1.0, 2, 3, 6, 5, 4]]
    comparison = compare(
        tiny(),
        CAUSAL,
        ["recency", "random", "leave_one_out"],
        task=TASK,
        target="logit_difference",
        of="gold",
        baseline="mean",
        seeds=(4, 5),
        measures=["feature", "spearman"],
        k=(1, 2),
        rank_by="signed",
        custom={"mine": mine},
        n_normalised=1,
        out=tmp_path / "run",
    )
    parameters = comparison.faithfulness.provenance.parameters
    expected = {"target": "logit_difference", "of": "gold", "baseline": "mean", "seeds": [4, 5], "n_normalised": 1}
    assert {key: parameters[key] for key in expected} == expected
    frame = comparison.agreement.frame
    assert set(zip(frame["measure"], frame["k"], strict=True)) == {("feature", 1), ("feature", 2), ("spearman", 0)}
    assert comparison.agreement.provenance.parameters["rank_by"] == "signed"
    row = frame.query("measure == 'spearman' and method_a == 'recency' and method_b == 'mine'").iloc[0]
    assert row["mean"] == pytest.approx((1 - 0.5 + 1 - 6 * 8 / (6 * 35)) / 3)
    pd.testing.assert_frame_equal(load_result(tmp_path / "run").frame, comparison.explanations.frame)
    assert [one["explained"] for one in comparison.explanations.attachments["examples"]] == ["no", "yes", "yes"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny: Any, dtype: torch.dtype) -> None:
    model = tiny()
    whole = compare(model, ENCODED, ["leave_one_out", "gradient_shap", "attention"], seeds=(0,))
    model.hf.to(dtype)
    half = compare(model, ENCODED, ["leave_one_out", "gradient_shap", "attention"], seeds=(0,))
    for one, other in zip(whole, half, strict=True):
        assert len(one.frame) == len(other.frame)
    assert np.isfinite(half.explanations.frame["score"]).all()
    values = [found.explanations.frame.drop_duplicates("example")["value"] for found in (whole, half)]
    assert np.allclose(*values, atol=0.3)


def test_too_few_methods_are_refused_before_anything_runs(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp.agreement.comparing.Coalitions", None)
    for settings in ({"methods": ["lime"]}, {"measures": ["foo"]}, {"rank_by": "size"}, {"k": 0}):
        with pytest.raises(InputError):
            compare(tiny(), ENCODED, **settings)


def test_the_callers_random_state_is_left_alone(tiny: Any) -> None:
    model = tiny()

    def draws(between: Any) -> list[float]:
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002
        between()
        return [torch.rand(1).item(), np.random.rand()]  # noqa: NPY002 - Python's own is drawn from by the type checker

    few = {"lime": {"n_samples": 20}}
    assert draws(lambda: compare(model, ENCODED, ["lime", "gradient_shap"], options=few)) == draws(lambda: None)


def test_a_comparison_is_saved_and_drawn(tiny: Any, tmp_path: Path) -> None:
    made = compare(tiny(), ENCODED, ["recency", "leave_one_out"])
    made.save(tmp_path / "new")
    for name, result in zip(made._fields, made, strict=True):
        assert load_result(tmp_path / "new" / f"{name}.parquet").equals(result)
    assert made.plot().data
