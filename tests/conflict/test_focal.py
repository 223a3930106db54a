"""Focal heads and layers of made drifts: loops, enumeration and simulation as oracles, and truths that were planted."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from made_drifts import made_result

from interp.conflict.dialogues import SPANS
from interp.conflict.drift import pooled_direction
from interp.conflict.focal import (
    focal_heads,
    focal_layers,
    half_layers,
    head_scores,
    layer_scores,
    sigma_layers,
    top_heads,
)
from interp.conflict.focal_checks import chance_overlap, middle_layers, stability
from interp.conflict.span_attention import attention_by_span
from interp.errors import InputError

FAST: dict[str, Any] = {"n_resamples": 50, "n_permutations": 99}


def noise(n_pairs: int = 12, n_layers: int = 4, n_heads: int = 5, seed: int = 0) -> np.ndarray:
    """(pair, contrast, layer, head, measure) without any difference between the contrasts, but with heads of their own size."""
    random = np.random.default_rng(seed)
    size = random.gamma(3, size=(1, 1, n_layers, n_heads, 1))
    return size * random.gamma(4, size=(n_pairs, 2, n_layers, n_heads, 3)) * np.array([0.02, 0.004, 0.01])


def planted(heads: dict[tuple[int, int], float], **sizes: int) -> np.ndarray:
    """Noise, and heads whose every measure is that much larger under conflict, in noise's own largest means."""
    values = noise(**sizes)
    for (layer, head), factor in heads.items():
        values[:, 0, layer, head] += factor * values.mean((0, 1)).max((0, 1))
    return values


def test_scores_written_as_loops() -> None:
    values = noise()
    table = head_scores(made_result(values), **FAST).set_index(["layer", "head"])
    means = {
        (m, c): [[values[:, c, x, y, m].mean() for y in range(5)] for x in range(4)] for m in range(3) for c in (0, 1)
    }
    for layer in range(4):
        for head in range(5):
            score = control = 0.0
            for measure, weight in enumerate((0.4, 0.3, 0.3)):
                flat = [value for row in means[measure, 0] for value in row]
                low, width = min(flat), max(flat) - min(flat)
                score += weight * (means[measure, 0][layer][head] - low) / width
                control += weight * (means[measure, 1][layer][head] - low) / width
            row = table.loc[(layer, head)]
            assert row["score"] == pytest.approx(score, abs=1e-5)
            assert row["control"] == pytest.approx(control, abs=1e-5)
            assert row["excess"] == pytest.approx(score - control, abs=1e-5)
            assert row["delta_dir"] == pytest.approx(means[1, 0][layer][head], abs=1e-6)
    assert table["score"].max() <= 1
    assert (table["n_pairs"] == 12).all()


def test_pooled_score_takes_the_pooled_direction_alone() -> None:
    values = noise()
    values[..., 1] = np.random.default_rng(1).uniform(0, 1, values.shape[:-1])
    norms = np.random.default_rng(2).uniform(0.1, 1, size=(2, 12, 4, 5))
    table = head_scores(made_result(values, norms=norms), **FAST)
    pooled = pooled_direction(values[:, 0, ..., 1], *norms).ravel()
    scaled = (pooled - pooled.min()) / np.ptp(pooled)
    mean = values[:, 0, ..., 1].mean(0).ravel()
    plain = (mean - mean.min()) / np.ptp(mean)
    found = (table["score_pooled"] - table["score"]).to_numpy()
    assert found == pytest.approx(0.3 * (scaled - plain), abs=1e-5)
    assert table["focal_published"].sum() == 2
    assert (
        table["score_pooled"][table["focal_published"]].min() >= table["score_pooled"][~table["focal_published"]].max()
    )


def test_pooled_scores_of_some_pairs_are_those_of_these_pairs_alone() -> None:
    values, norms = noise(), np.random.default_rng(2).uniform(0.1, 1, size=(2, 12, 4, 5))
    values[..., 1] = np.random.default_rng(1).uniform(0, 1, values.shape[:-1])
    tasks = [f"task-{pair % 2}" for pair in range(12)]
    table = stability(made_result(values, tasks, norms=norms), n_splits=1, score="score_pooled")
    halves = [head_scores(made_result(values[at::2], norms=norms[:, at::2]), **FAST)["score_pooled"] for at in range(2)]
    assert table["rank_correlation"].tolist() == pytest.approx([halves[0].corr(halves[1], method="spearman")])
    top = [set(half.nlargest(2).index) for half in halves]
    assert table["heads"].tolist() == pytest.approx([len(top[0] & top[1]) / len(top[0] | top[1])])
    whole = made_result(values, norms=norms)
    thirds = middle_layers(whole, score="score_pooled", n_resamples=20)
    focal = head_scores(whole, **FAST).query("focal_published")["layer"]
    assert thirds["n_focal_heads"].tolist() == np.bincount(focal * 3 // 4, minlength=3).tolist()


def test_planted_heads_are_focal_and_what_rewording_moves_is_not() -> None:
    values = planted({(2, 1): 1.5, (2, 3): 1.0})
    # Drifts most of all, under either contrast.
    values[:, :, 0, 0] += 3 * values.mean((0, 1)).max((0, 1))
    result = made_result(values)
    assert focal_heads(result) == [(2, 1), (2, 3)]
    assert focal_heads(result, share=0.01) == [(2, 1)]
    assert focal_heads(result, score="score")[0] == (0, 0)
    table = head_scores(result, n_resamples=500).set_index(["layer", "head"])
    assert (table["q"] < 0.05).sum() >= 2
    assert set(table.index[table["q"] < 0.01]) == {(2, 1), (2, 3)}
    assert table.loc[(2, 1), "low"] > 0
    assert table.loc[(0, 0), "low"] < 0 < table.loc[(0, 0), "high"]
    assert table.index[table["focal"]].tolist() == [(2, 1), (2, 3)]
    layers = layer_scores(result, **FAST)
    assert layers["n_focal_heads"].tolist() == [0, 0, 2, 0]
    assert layers["layer"][layers["focal"]].tolist() == focal_layers(result) == [2]
    assert layers["layer"][layers["focal_sigma"]].tolist() == focal_layers(result, rule="sigma") == [2]
    assert focal_layers(result, rule="sigma", score="score") == [0]


def test_layers_are_means_of_their_heads() -> None:
    result = made_result(planted({(1, 1): 1.0}))
    heads = head_scores(result, **FAST).groupby("layer")
    layers = layer_scores(result, n_resamples=400, n_permutations=999).set_index("layer")
    for name in ("score", "control", "excess"):
        assert layers[name].to_numpy() == pytest.approx(heads[name].mean().to_numpy())
    for name, low, high in (
        ("score", "score_low", "score_high"),
        ("control", "control_low", "control_high"),
        ("excess", "low", "high"),
    ):
        assert (layers[low] < layers[name]).all()
        assert (layers[name] < layers[high]).all()
    assert layers["p"].idxmin() == 1
    assert layers["q"].to_numpy() == pytest.approx(scipy.stats.false_discovery_control(layers["p"]))
    assert (layers["n_heads"] == 5).all()


def test_p_is_uniform_where_labels_are_exchanged_at_random() -> None:
    """Conflict and paraphrase of every task exchanged by a coin: with and without a true difference, nothing is found."""
    values = planted(
        {(layer, head): 0.5 for layer in range(20) for head in range(0, 30, 2)}, n_pairs=30, n_layers=20, n_heads=30
    )
    tasks = [f"task-{pair // 2}" for pair in range(30)]
    coins = np.random.default_rng(3).integers(0, 2, size=(15, 20, 30)).astype(bool)
    # A coin per head, or the heads' p-values would depend on each other.
    exchanged = np.where(coins.repeat(2, axis=0)[:, None, ..., None], values[:, ::-1], values)
    p = head_scores(made_result(exchanged, tasks), n_resamples=2, n_permutations=999)["p"].to_numpy()
    assert scipy.stats.kstest(p, "uniform").pvalue > 1e-3
    assert 0.02 < (p < 0.05).mean() < 0.09
    told = head_scores(made_result(values, tasks), n_resamples=2, n_permutations=999)
    assert (told["q"] < 0.05).mean() > 0.3


def test_tasks_are_the_unit() -> None:
    """A task that stands in many pairs is one observation, in the interval and in the test."""
    values = planted({(1, 1): 0.4}, n_pairs=10)
    once = head_scores(made_result(values), n_permutations=2000)
    tasks = [f"task-{pair}" for pair in range(10)] * 4
    often = head_scores(made_result(np.concatenate([values] * 4), tasks), n_permutations=2000)
    for name in ("score", "excess", "low", "high", "p", "q"):
        assert often[name].to_numpy() == pytest.approx(once[name].to_numpy(), abs=1e-9)
    assert (often["n_pairs"].iloc[0], often["n_tasks"].iloc[0]) == (40, 10)
    alone = head_scores(made_result(np.concatenate([values] * 4)), n_permutations=2000)
    assert (alone["high"] - alone["low"]).mean() < 0.7 * (often["high"] - often["low"]).mean()
    single = head_scores(made_result(values, ["one"] * 10), **FAST)
    assert single[["low", "high", "p", "q"]].isna().all(axis=None)
    assert focal_heads(made_result(values, ["one"] * 10)) == focal_heads(made_result(values))


def test_intervals_cover() -> None:
    """Of heads without a difference, 95 % intervals hold 0 about as often as they say."""
    table = head_scores(made_result(noise(40, 10, 30, seed=4)), n_permutations=2)
    assert 0.90 < ((table["low"] < 0) & (table["high"] > 0)).mean() < 0.98


def test_half_of_the_focal_heads_by_enumeration() -> None:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 10_000))
    def check(seed: int) -> None:
        random = np.random.default_rng(seed)
        focal = random.uniform(size=(5, 4)) < 0.4
        focal[0, 0] = True
        means = random.uniform(size=5)
        counts = focal.sum(1)
        best = next(
            sets
            for size in range(1, 6)
            if (sets := [some for some in combinations(range(5), size) if counts[list(some)].sum() >= focal.sum() / 2])
        )
        # Among the smallest sets, the most heads; then the highest scores.
        most = max(counts[list(some)].sum() for some in best)
        expected = max(
            (some for some in best if counts[list(some)].sum() == most), key=lambda some: means[list(some)].sum()
        )
        assert np.flatnonzero(half_layers(focal, means)).tolist() == list(expected)

    check()


def test_rules_by_hand() -> None:
    focal = np.zeros((4, 3), dtype=bool)
    focal[0, 0] = focal[2, 1] = focal[3, 2] = focal[3, 0] = True
    # 4 heads, half is 2: layer 3 alone has them.
    assert half_layers(focal, np.array([9.0, 0, 5, 1])).tolist() == [False, False, False, True]
    focal[3, 0] = False
    # 3 heads, half is 1.5: two layers of one each, those with the higher mean.
    assert half_layers(focal, np.array([9.0, 0, 5, 1])).tolist() == [True, False, True, False]
    # μ = 2, σ = 1.73
    assert sigma_layers(np.array([1.0, 1, 1, 5])).tolist() == [False, False, False, True]
    assert not sigma_layers(np.ones(4)).any()
    assert top_heads(np.array([[1.0, 3], [3, 2]]), 0.5).tolist() == [[False, True], [True, False]]
    assert top_heads(np.ones((2, 2)), 0.01).tolist() == [[True, False], [False, False]]
    assert top_heads(np.ones((2, 2)), 1).all()


def test_stability_of_planted_and_of_no_heads() -> None:
    sizes = {"n_pairs": 24, "n_layers": 8, "n_heads": 8}
    tasks = [f"task-{pair // 2}" for pair in range(24)]
    families = [("case", "list", "json")[pair % 3] for pair in range(24)]
    heads = {(3, head): 1.0 for head in range(6)}
    stable = stability(made_result(planted(heads, **sizes), tasks, families), n_splits=20)
    halves = stable[stable["kind"] == "halves"]
    assert len(halves) == 20
    assert (halves["heads"] == 1).all()
    assert (halves["layers"] == 1).all()
    assert ((halves["n_first"] == 12) & (halves["n_second"] == 12)).all()
    assert halves["heads_chance"].to_numpy() == pytest.approx(chance_overlap(64, 6, 6))
    other = stable[stable["kind"] != "halves"]
    assert sorted(zip(other["kind"], other["name"], strict=True)) == [
        (kind, name) for kind in ("family", "without family") for name in ("case", "json", "list")
    ]
    assert (other["n_first"] == 16).all()
    assert set(other["n_second"][other["kind"] == "family"]) == {8}
    assert set(other["n_second"][other["kind"] == "without family"]) == {24}
    assert (other["heads"] == 1).all()
    flat = np.random.default_rng(5).gamma(4, size=(24, 2, 8, 8, 3))
    unstable = stability(made_result(flat, tasks), n_splits=100)
    assert (unstable["kind"] == "halves").all()
    assert unstable["heads"].mean() < 2.5 * unstable["heads_chance"].mean()
    assert abs(unstable["rank_correlation"].mean()) < 0.15
    graded = planted({(layer, head): (8 * layer + head) / 32 for layer in range(8) for head in range(8)}, **sizes)
    assert stability(made_result(graded, tasks), n_splits=20)["rank_correlation"].min() > 0.8


def test_stability_written_as_two_localisations() -> None:
    """One split: each half is scored as a result by itself."""
    values, tasks = planted({(2, 2): 0.3, (1, 0): 0.3}), [f"task-{pair}" for pair in range(12)]
    families = ["case"] * 7 + ["list"] * 5
    result = made_result(values, tasks, families)
    first, second = made_result(values[:7]), made_result(values[7:])
    row = stability(result, n_splits=1, rule="sigma").query("kind == 'family' and name == 'list'").iloc[0]
    for what, mine, theirs in (
        ("heads", set(focal_heads(first)), set(focal_heads(second))),
        ("layers", set(focal_layers(first, rule="sigma")), set(focal_layers(second, rule="sigma"))),
    ):
        assert row[what] == pytest.approx(len(mine & theirs) / len(mine | theirs))
    ranks = scipy.stats.spearmanr(*(head_scores(half, **FAST)["excess"] for half in (first, second))).statistic
    assert row["rank_correlation"] == pytest.approx(ranks)


@pytest.mark.parametrize(("total", "first", "second"), [(12, 3, 3), (10, 2, 5), (6, 6, 6), (9, 0, 4)])
def test_chance_overlap_by_simulation(total: int, first: int, second: int) -> None:
    random, overlaps = np.random.default_rng(6), []
    for _ in range(4000):
        a, b = (set(random.permutation(total)[:n].tolist()) for n in (first, second))
        overlaps.append(len(a & b) / len(a | b))
    assert chance_overlap(total, first, second) == pytest.approx(np.mean(overlaps), abs=0.01)
    assert np.isnan(chance_overlap(5, 0, 0))


def test_the_claim_of_the_middle() -> None:
    heads = {(layer, head): 2.0 for layer in (3, 4) for head in range(2)}
    table = middle_layers(made_result(planted(heads, n_layers=9)), share=4 / 45).set_index("third")
    assert table["layers"].tolist() == [3, 3, 3]
    assert table["n_focal_heads"].tolist() == [0, 4, 0]
    assert table["share"].tolist() == [0, 1, 0]
    assert table["expected"].to_numpy() == pytest.approx(1 / 3)
    assert (table.loc["middle", "low"], table.loc["middle", "high"]) == (1, 1)
    # All four of 45 heads among 15: 15·14·13·12 / (45·44·43·42).
    assert table.loc["middle", "p"] == pytest.approx(15 * 14 * 13 * 12 / (45 * 44 * 43 * 42))
    assert table.loc["first", "p"] == 1
    unequal = middle_layers(made_result(noise(n_layers=4)), n_resamples=20).set_index("third")
    assert unequal["layers"].sum() == 4
    assert unequal["share"].sum() == pytest.approx(1)
    assert unequal["expected"].sum() == pytest.approx(1)
    single = middle_layers(made_result(noise(), ["one"] * 12), n_resamples=20)
    assert single[["low", "high"]].isna().all(axis=None)


def test_attention_by_span_is_the_rows_own() -> None:
    result = made_result(noise(6), [f"task-{pair // 2}" for pair in range(6)])
    table = attention_by_span(result).set_index(["prompt", "span", "layer"]).sort_index()
    frame = result.frame.astype({"contrast": str})
    for prompt, contrast, side in (("consistent", "conflict", "consistent"), ("conflict", "conflict", "compared")):
        rows = frame[frame["contrast"] == contrast]
        for span in SPANS:
            expected = rows.groupby("layer")[f"{side}_{span}"].mean()
            found = table.loc[(prompt, span), "mean"]
            assert found.to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-6)
    assert table["mean"].groupby(["prompt", "layer"]).sum().to_numpy() == pytest.approx(1, abs=1e-5)
    assert ((table["low"] <= table["mean"]) & (table["mean"] <= table["high"])).all()
    assert (table["n_tasks"].iloc[0], table["n_pairs"].iloc[0], table["n_heads"].iloc[0]) == (3, 6, 5)
    some = attention_by_span(result, [(1, 2), (1, 3), (3, 0)]).set_index(["prompt", "span", "layer"]).sort_index()
    rows = frame[(frame["contrast"] == "paraphrase") & (frame["layer"] == 1) & frame["head"].isin([2, 3])]
    assert some.loc[("paraphrase", "task", 1), "mean"] == pytest.approx(rows["compared_task"].mean(), abs=1e-6)
    assert sorted(set(some.index.get_level_values("layer"))) == [1, 3]
    assert some.loc[("conflict", "sink", 1), "n_heads"] == 2
    with pytest.raises(InputError, match=r"no \(9, 9\)"):
        attention_by_span(result, [(1, 2), (9, 9)])


def test_some_pairs_of_a_result() -> None:
    """Rows of some pairs give what their own localisation would."""
    values, tasks = noise(), [f"task-{pair}" for pair in range(5, 12)]
    result = made_result(values, families=["case"] * 5 + ["list"] * 7)
    some = replace(result, frame=result.frame[result.frame["family"] == "list"])
    first, second = head_scores(some, **FAST), head_scores(made_result(values[5:], tasks), **FAST)
    pd.testing.assert_frame_equal(first, second)
    shuffled = replace(result, frame=result.frame.sample(frac=1, random_state=0))
    assert head_scores(shuffled, **FAST)["excess"].to_numpy() == pytest.approx(
        head_scores(result, **FAST)["excess"].to_numpy()
    )


def test_bad_input() -> None:
    result = made_result(noise())
    for call in (head_scores, layer_scores, focal_heads, focal_layers, stability, middle_layers, attention_by_span):
        with pytest.raises(InputError, match=r"conflict\.localize"):
            call(replace(result, kind="conflict.patch"))
        with pytest.raises(InputError, match="at least one pair"):
            call(replace(result, frame=result.frame.iloc[:0]))
    for call in (head_scores, layer_scores, focal_heads, focal_layers, stability, middle_layers):
        with pytest.raises(InputError, match="expected one of excess"):
            call(result, score="size")
        for share in (0, 1.5):
            with pytest.raises(InputError, match="share of the heads"):
                call(result, share=share)
        with pytest.raises(InputError, match="whole pairs"):
            call(replace(result, frame=result.frame.iloc[1:]))
    for choose in (focal_layers, stability):
        with pytest.raises(InputError, match="half, sigma"):
            choose(result, rule="all")
    with pytest.raises(InputError, match="at least two tasks"):
        stability(made_result(noise(), ["one"] * 12))
