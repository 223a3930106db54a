"""The table of pairs on explanations written by hand: seeds, missing numbers, ceiling, chance and interval."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from interp import load_result
from interp.agreement import pairwise_agreement
from interp.agreement.explanation_table import EXPLANATION_COLUMNS
from interp.agreement.pairs import PAIR_COLUMNS, matrix, pair_values
from interp.agreement.rankings import MEASURES, agreement, chance
from interp.errors import InputError
from interp.intervals import bootstrap_mean
from interp.results import Provenance, Result

Scores = dict[tuple[int, str, int], list[float]]
nan = float("nan")


def explained(scores: Scores, **parameters: Any) -> Result:
    """{(example, method, seed): unit scores} as what explain gives."""
    rows = [
        {"example": example, "method": method, "seed": seed, "unit": unit, "score": score}
        for (example, method, seed), vector in scores.items()
        for unit, score in enumerate(vector)
    ]
    frame = pd.DataFrame(rows, columns=["example", "method", "seed", "unit", "score"])
    for column in EXPLANATION_COLUMNS:
        if column.name not in frame:
            frame[column.name] = "t" if column.dtype == "str" else 0
    frame["method"] = pd.Categorical(frame["method"], list(dict.fromkeys(frame["method"])))
    provenance = Provenance(model="tiny", parameters={"baseline": "pad", **parameters})
    return Result("agreement.explain", frame, EXPLANATION_COLUMNS, provenance)


def random_scores(n_examples: int = 6) -> Scores:
    """lime and shap under three seeds, rollout and ig under one; examples of different lengths."""
    random = np.random.default_rng(5)
    found: Scores = {}
    for example in range(n_examples):
        truth = random.normal(size=int(random.integers(4, 9)))
        for method, seeds in (("rollout", (0,)), ("lime", (0, 1, 2)), ("ig", (0,)), ("shap", (0, 1, 2))):
            for seed in seeds:
                found[example, method, seed] = (truth + random.normal(size=truth.size)).tolist()
    return found


def row(result: Result, a: str, b: str, measure: str = "kendall", k: int = 0) -> pd.Series:
    frame = result.frame
    found = frame[
        (frame["method_a"] == a) & (frame["method_b"] == b) & (frame["measure"] == measure) & (frame["k"] == k)
    ]
    assert len(found) == 1
    return found.iloc[0]


def tau(a: list[float], b: list[float]) -> float:
    return float(scipy.stats.kendalltau(np.abs(a), np.abs(b))[0])


def test_seeds_are_averaged_within_the_example() -> None:
    scores = random_scores()
    result = pairwise_agreement(explained(scores), "kendall")
    cases = {
        ("lime", "shap"): [(seed, seed) for seed in range(3)],
        ("rollout", "lime"): [(0, seed) for seed in range(3)],
        ("lime", "ig"): [(seed, 0) for seed in range(3)],
        ("rollout", "ig"): [(0, 0)],
        ("lime", "lime"): [(0, 1), (0, 2), (1, 2)],
    }
    for (a, b), seeds in cases.items():
        each = [np.mean([tau(scores[e, a, s], scores[e, b, t]) for s, t in seeds]) for e in range(6)]
        found = row(result, a, b)
        assert found["mean"] == pytest.approx(np.mean(each))
        assert found["sd"] == pytest.approx(np.std(each, ddof=1))
        assert (found["n"], found["n_nan"]) == (6, 0)
        low, high = bootstrap_mean(np.array(each))
        assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))
        assert found["low"] < found["mean"] < found["high"]
        values = pair_values(explained(scores))
        chosen = values[(values["method_a"] == a) & (values["method_b"] == b)]
        assert chosen["example"].tolist() == list(range(6))
        assert chosen["value"].to_numpy() == pytest.approx(np.array(each))


def test_one_row_per_measure_k_and_pair() -> None:
    scores = random_scores()
    result = pairwise_agreement(explained(scores), k=(1, 3))
    n_settings = sum(2 if measure.at_k else 1 for measure in MEASURES.values())
    assert len(result.frame) == n_settings * 10
    assert not result.frame.duplicated(["measure", "k", "method_a", "method_b"]).any()
    assert result.columns == PAIR_COLUMNS
    assert list(result.frame["method_a"].cat.categories) == ["rollout", "lime", "ig", "shap"]
    for name, measure in MEASURES.items():
        for k in (1, 3) if measure.at_k else (0,):
            found = row(result, "rollout", "ig", name, k)
            pairs = [(np.array(scores[e, "rollout", 0]), np.array(scores[e, "ig", 0])) for e in range(6)]
            assert found["mean"] == pytest.approx(np.mean([agreement(a, b, name, max(k, 1)) for a, b in pairs]))
            assert found["chance"] == pytest.approx(np.mean([chance(a, b, name, max(k, 1)) for a, b in pairs]))
    assert result.provenance.parameters["baseline"] == "pad"
    assert result.provenance.parameters["k"] == [1, 3]
    assert result.provenance.parameters["measures"] == list(MEASURES)
    assert result.provenance.model == "tiny"


def test_signs_count_only_where_they_rank() -> None:
    scores: Scores = {(0, "a", 0): [3.0, -2.0, 1.0], (0, "b", 0): [3.0, 2.0, 1.0]}
    assert row(pairwise_agreement(explained(scores), "kendall"), "a", "b")["mean"] == 1
    signed = pairwise_agreement(explained(scores), "kendall", rank_by="signed")
    assert row(signed, "a", "b")["mean"] == pytest.approx(1 / 3)
    assert signed.provenance.parameters["rank_by"] == "signed"
    by_size = pairwise_agreement(explained(scores), ("feature", "sign"), k=2)
    assert row(by_size, "a", "b", "feature", 2)["mean"] == 1
    assert row(by_size, "a", "b", "sign", 2)["mean"] == 0.5
    assert pair_values(explained(scores), rank_by="signed")["value"].tolist() == [1, pytest.approx(1 / 3), 1]


def test_examples_without_a_number_are_counted() -> None:
    scores = random_scores()
    scores[0, "rollout", 0] = [0.25] * len(scores[0, "rollout", 0])  # constant
    scores[1, "ig", 0] = [nan] * len(scores[1, "ig", 0])  # failed
    scores[2, "lime", 1] = [0.0] * len(scores[2, "lime", 1])  # one seed of three
    for key in [key for key in scores if key[0] == 3]:
        scores[key] = [1.0]  # one unit
    del scores[4, "rollout", 0]  # missing
    result = pairwise_agreement(explained(scores), "kendall")
    assert (result.frame["n"] + result.frame["n_nan"] == 6).all()
    assert row(result, "rollout", "ig")["n_nan"] == 4
    assert row(result, "rollout", "lime")["n_nan"] == row(result, "rollout", "rollout")["n_nan"] == 3
    assert row(result, "lime", "shap")["n_nan"] == 1
    values = pair_values(explained(scores))
    two = values[(values["example"] == 2)].set_index(["method_a", "method_b"])["value"]
    by_hand = np.mean([tau(scores[2, "lime", seed], scores[2, "shap", seed]) for seed in (0, 2)])
    assert two["lime", "shap"] == pytest.approx(by_hand)
    assert two["lime", "lime"] == pytest.approx(tau(scores[2, "lime", 0], scores[2, "lime", 2]))
    each = [tau(scores[e, "rollout", 0], scores[e, "ig", 0]) for e in (2, 5)]
    found = row(result, "rollout", "ig")
    assert (found["n"], found["mean"]) == (2, pytest.approx(np.mean(each)))
    low, high = bootstrap_mean(np.array(each))
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))


def test_chance_is_over_the_examples_that_count() -> None:
    scores: Scores = {
        (0, "a", 0): [3.0, 2.0, 1.0],
        (0, "b", 0): [1.0, 2.0, 3.0],
        (1, "a", 0): [5.0, 4.0, 3.0, 2.0, 1.0],
        (1, "b", 0): [1.0, 2.0, 3.0, 4.0, 5.0],
        (2, "a", 0): [1.0] * 9,
        (2, "b", 0): list(range(9)),
    }
    result = pairwise_agreement(explained(scores), ("feature", "pairwise"), k=1)
    assert row(result, "a", "b", "feature", 1)["chance"] == pytest.approx((1 / 3 + 1 / 5) / 2)
    assert row(result, "b", "b", "feature", 1)["chance"] == pytest.approx((1 / 3 + 1 / 5 + 1 / 9) / 3)
    assert row(result, "a", "b", "pairwise")["chance"] == 0.5


def test_ceiling_is_the_geometric_mean_of_both() -> None:
    result = pairwise_agreement(explained(random_scores()), ("kendall", "feature"), k=2)
    for measure, k in (("kendall", 0), ("feature", 2)):
        lime, shap = (row(result, name, name, measure, k)["mean"] for name in ("lime", "shap"))
        assert lime != shap
        assert max(lime, shap) < 1
        assert row(result, "lime", "shap", measure, k)["ceiling"] == pytest.approx((max(lime, 0) * max(shap, 0)) ** 0.5)
        assert row(result, "rollout", "shap", measure, k)["ceiling"] == pytest.approx(max(shap, 0) ** 0.5)
        assert row(result, "lime", "lime", measure, k)["ceiling"] == pytest.approx(max(lime, 0))
        assert row(result, "rollout", "ig", measure, k)["ceiling"] == 1


@pytest.mark.parametrize("n_examples", [1, 3])
def test_what_draws_nothing_repeats_itself(n_examples: int) -> None:
    scores = {(e, m, 0): [1.0, 1.0, 0.0, 0.0] for e in range(n_examples) for m in "ab"}  # ties at the edge of the top
    result = pairwise_agreement(explained(scores), k=3)
    for name, measure in MEASURES.items():
        found = row(result, "a", "a", name, 3 if measure.at_k else 0)
        assert [found[column] for column in ("mean", "low", "high", "ceiling", "n")] == [1, 1, 1, 1, n_examples]
    assert row(result, "a", "b", "feature", 3)["mean"] == pytest.approx((1 + 1 + 0.25 + 0.25) / 3)
    assert np.isnan(row(result, "a", "b", "feature", 3)["low"]) == (n_examples == 1)


def test_one_seed_of_a_random_method_has_no_ceiling() -> None:
    scores = {key: vector for key, vector in random_scores().items() if key[2] == 0}
    result = pairwise_agreement(explained(scores, random_methods=["lime", "shap"]), "kendall")
    found = row(result, "lime", "lime")
    assert (found["n"], found["n_nan"]) == (0, 6)
    assert np.isnan(found[["mean", "sd", "low", "high", "chance", "ceiling"]].astype(float)).all()
    assert np.isnan(row(result, "lime", "ig")["ceiling"])
    assert np.isfinite(row(result, "lime", "ig")["mean"])
    assert row(result, "rollout", "ig")["ceiling"] == 1
    assert row(pairwise_agreement(explained(scores), "kendall"), "lime", "ig")["ceiling"] == 1
    several = pairwise_agreement(explained(random_scores(), random_methods=["lime", "shap"]), "kendall")
    assert row(several, "lime", "lime")["ceiling"] < 1


def test_the_level_and_the_seed_of_the_interval() -> None:
    explanations = explained(random_scores(20))
    wide, narrow = (
        row(pairwise_agreement(explanations, "kendall", level=level), "lime", "ig") for level in (0.95, 0.5)
    )
    assert wide["low"] < narrow["low"] < narrow["mean"] < narrow["high"] < wide["high"]
    other = row(pairwise_agreement(explanations, "kendall", seed=1), "lime", "ig")
    assert other["low"] != wide["low"]
    assert pairwise_agreement(explanations, "kendall").equals(pairwise_agreement(explanations, "kendall"))


def test_the_order_of_rows_and_units_changes_nothing() -> None:
    explanations = explained(random_scores())
    order = np.random.default_rng(1).permutation(len(explanations.frame))
    shuffled = dataclasses.replace(explanations, frame=explanations.frame.iloc[order].reset_index(drop=True))
    first = matrix(pairwise_agreement(explanations, "kendall"))
    second = matrix(pairwise_agreement(shuffled, "kendall"))
    assert second.loc[first.index, first.columns].to_numpy() == pytest.approx(first.to_numpy())


def test_matrix_is_symmetric_and_named(tmp_path: Path) -> None:
    result = pairwise_agreement(explained(random_scores()), ("kendall", "feature", "rank"), k=(1, 2))
    saved = load_result(result.save(tmp_path / "pairs.parquet"))
    assert saved.equals(result)
    for column, k in (("mean", 1), ("mean", 2), ("n", 1), ("ceiling", 2)):
        found = matrix(saved, "feature", k, column)
        assert list(found.index) == list(found.columns) == ["rollout", "lime", "ig", "shap"]
        assert np.array_equal(found.to_numpy(), found.to_numpy().T)
        assert found.loc["shap", "lime"] == row(result, "lime", "shap", "feature", k)[column]
    assert not matrix(result, "feature", 1).equals(matrix(result, "feature", 2))
    one = pairwise_agreement(explained(random_scores()), "feature", k=2)
    assert matrix(one, "feature").equals(matrix(one, "feature", 2))
    with pytest.raises(InputError, match="holds k = 1, 2"):
        matrix(result, "feature")
    with pytest.raises(InputError, match="the table holds kendall, feature, rank"):
        matrix(result, "spearman")
    with pytest.raises(InputError, match="expected one of mean"):
        matrix(result, column="median")
    with pytest.raises(InputError, match="pairwise_agreement gives"):
        matrix(explained(random_scores()))


def test_refusals() -> None:
    scores = random_scores(2)
    good = explained(scores)
    with pytest.raises(InputError, match="no example"):
        pairwise_agreement(explained({}))
    with pytest.raises(InputError, match="hold only lime"):
        pairwise_agreement(explained({key: vector for key, vector in scores.items() if key[1] == "lime"}))
    with pytest.raises(InputError, match=r"interp\.agreement\.explain gives"):
        pairwise_agreement(dataclasses.replace(good, kind="agreement.other"))
    with pytest.raises(InputError, match=r"interp\.agreement\.explain gives"):
        pair_values(good.frame)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="measure='tau'"):
        pairwise_agreement(good, ["kendall", "tau"])
    with pytest.raises(InputError, match="no measures"):
        pairwise_agreement(good, [])
    with pytest.raises(InputError, match="k=0"):
        pairwise_agreement(good, k=(3, 0))
    with pytest.raises(InputError, match=r"k=2\.5"):
        pairwise_agreement(good, k=2.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no k"):
        pairwise_agreement(good, k=())
    with pytest.raises(InputError, match="k=0"):
        pair_values(good, "feature")
    with pytest.raises(InputError, match="rank_by='up'"):
        pairwise_agreement(good, rank_by="up")
    with pytest.raises(InputError, match="level=95"):
        pairwise_agreement(good, level=95)
    with pytest.raises(InputError, match="n_resamples=0"):
        pairwise_agreement(good, n_resamples=0)
    longer = {**scores, (1, "ig", 0): [*scores[1, "ig", 0], 1.0]}
    with pytest.raises(InputError, match=r"example 1: .* units"):
        pairwise_agreement(explained(longer))
    twice = dataclasses.replace(good, frame=pd.concat([good.frame, good.frame.tail(1)], ignore_index=True))
    with pytest.raises(InputError, match=r"shap scores unit .* twice"):
        pairwise_agreement(twice)
