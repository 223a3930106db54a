"""Removal of what is ranked first: drops that are known sums, all orders by brute force, a model one input at a time."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from plain_games import PlainGame, additive_model, tiny_classifier
from scipy.stats import spearmanr

from interp.agreement import explain, faithfulness, faithfulness_means
from interp.agreement.coalitions import Coalitions
from interp.agreement.perturbations import every_coalition
from interp.agreement.removal import FRACTIONS, best_and_worst, faithfulness_of
from interp.agreement.tasks import Verbalizer
from interp.errors import InputError

ADDITIVE: Any = {"target": "logit_difference", "baseline": "zero"}
TASK = Verbalizer(
    {"no": " water", "yes": " money"}, template="{text} is", shots=[(" the dog is old", "yes")], separator=""
)
TEXTS = [" the dog of the sea", " a king in", " the old cat in water code"]


def of_sum(worths: list[float], scores: dict[str, list[float]], **settings: Any) -> Any:
    """Faithfulness of given scores where each token adds its worth to the target."""
    model = additive_model(worths)
    ids = [list(range(len(worths)))]
    explanations = explain(model, ids, [], custom={name: [own] for name, own in scores.items()}, **ADDITIVE)
    return faithfulness(model, ids, explanations, **settings)


def value(result: Any, method: str, measure: str, fraction: float | None = None) -> float:
    frame = result.frame
    rows = frame[(frame["method"] == method) & (frame["measure"] == measure)]
    rows = rows[rows["fraction"].isna()] if fraction is None else rows[np.isclose(rows["fraction"], fraction)]
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


# Sums by hand


def test_drops_and_their_means_by_hand() -> None:
    # f(x) = 4 + 2 + 1 − 1 = 6.
    result = of_sum(
        [2.0, -1.0, 4.0, 1.0],
        {"true": [2, -1, 4, 1], "reversed": [-2, 1, -4, -1]},
        fractions=(0.25, 0.3, 0.75, 1.0),
    )
    assert result.kind == "agreement.faithfulness"
    # Removed first: 4; 4 + 2; 4 + 2 + 1; all. ⌈0.3 · 4⌉ = 2.
    for fraction, drop in zip((0.25, 0.3, 0.75, 1.0), (4, 6, 7, 6), strict=True):
        assert value(result, "true", "comprehensiveness", fraction) == pytest.approx(drop, abs=1e-5)
        # What remains is the others: f(x) − (kept).
        assert value(result, "true", "sufficiency", fraction) == pytest.approx(6 - drop, abs=1e-5)
    assert value(result, "true", "comprehensiveness") == pytest.approx(23 / 4, abs=1e-5)
    assert value(result, "true", "sufficiency") == pytest.approx(1 / 4, abs=1e-5)
    # Reversed: −1; −1 + 1; −1 + 1 + 2; all.
    assert value(result, "reversed", "comprehensiveness") == pytest.approx((-1 + 0 + 2 + 6) / 4, abs=1e-5)
    assert value(result, "reversed", "sufficiency") == pytest.approx((7 + 6 + 4 + 0) / 4, abs=1e-5)
    assert value(result, "true", "leave_one_out") == pytest.approx(1)
    assert value(result, "reversed", "leave_one_out") == pytest.approx(-1)


def test_normalised_means_by_hand() -> None:
    scores = {"true": [2.0, -1, 4, 1], "reversed": [-2.0, 1, -4, -1], "other": [4.0, 3, 2, 1]}
    result = of_sum([2.0, -1.0, 4.0, 1.0], scores)
    # Best order 4, 6, 7, 6, worst −1, 0, 2, 6: means 23/4 and 7/4. In the text's order: 2, 1, 5, 6.
    assert value(result, "true", "normalised_comprehensiveness") == pytest.approx(1, abs=1e-6)
    assert value(result, "reversed", "normalised_comprehensiveness") == pytest.approx(0, abs=1e-6)
    assert value(result, "other", "normalised_comprehensiveness") == pytest.approx((14 - 7) / (23 - 7), abs=1e-6)
    # Sufficiency takes away the lowest first; 0 is best. Backwards: 1, 5, 4, 6.
    assert value(result, "true", "normalised_sufficiency") == pytest.approx(0, abs=1e-6)
    assert value(result, "reversed", "normalised_sufficiency") == pytest.approx(1, abs=1e-6)
    assert value(result, "other", "normalised_sufficiency") == pytest.approx((16 - 7) / (23 - 7), abs=1e-6)


def test_absolute_ranks_put_what_matters_first() -> None:
    settings: Any = {"fractions": (0.5,), "n_normalised": 0}
    scores = {"mine": [-5.0, 3.0]}
    assert value(of_sum([-1.0, 3.0], scores, **settings), "mine", "comprehensiveness") == pytest.approx(3, abs=1e-6)
    by_size = of_sum([-1.0, 3.0], scores, rank_by="abs", **settings)
    assert value(by_size, "mine", "comprehensiveness") == pytest.approx(-1, abs=1e-6)
    # |−5| > |3|, and the drops are |−1| < |3|.
    assert value(by_size, "mine", "leave_one_out") == pytest.approx(-1)


def test_default_fractions_round_up() -> None:
    result = of_sum([1.0, 2.0, 4.0], {"mine": [1.0, 2, 4]})
    np.testing.assert_allclose(FRACTIONS, np.arange(1, 11) / 10)
    expected = [4, 4, 4, 6, 6, 6, 7, 7, 7, 7]  # 10 % of three tokens is one
    found = [value(result, "mine", "comprehensiveness", fraction) for fraction in FRACTIONS]
    assert found == pytest.approx(expected, abs=1e-5)
    # 0.28 · 25 is a little above 7 in binary.
    many = of_sum([1.0] * 25, {"mine": list(range(25))}, fractions=(0.28,), n_normalised=0)
    assert value(many, "mine", "comprehensiveness", 0.28) == pytest.approx(7, abs=1e-5)


# On a model, one input at a time


@pytest.mark.parametrize("kind", ["few-shot", "encoder"])
def test_measures_of_a_model_by_hand(tiny: Any, kind: str) -> None:
    model, texts, task = (
        (tiny(), TEXTS, TASK)
        if kind == "few-shot"
        else (tiny_classifier(), ["the dog of the sea", "a king in", "the old cat in water code"], None)
    )
    explanations = explain(model, texts, ["leave_one_out", "attention"], task=task)
    result = faithfulness(model, texts, explanations, task=task)
    game = Coalitions(model, texts, task=task)
    frame = explanations.frame
    for example in range(len(texts)):
        plain, n = PlainGame(game, example), game.size(example)
        whole = plain.value([True] * n)
        drops = {row: whole - plain.value(~every_coalition(n)[row]) for row in range(2**n)}  # by what is removed
        alone = [drops[1 << unit] for unit in range(n)]
        for method in ("leave_one_out", "attention"):
            scores = frame[(frame["method"] == method) & (frame["example"] == example)]["score"].to_numpy()
            order = np.argsort(-scores)
            taken = [sum(1 << int(unit) for unit in order[:count]) for count in range(n + 1)]
            counts = [int(np.ceil(round(fraction * n, 6))) for fraction in FRACTIONS]
            rows = result.frame[(result.frame["method"] == method) & (result.frame["example"] == example)]
            rows = rows[rows["fraction"].isna()].set_index("measure")["value"]
            everything = 2**n - 1
            assert rows["comprehensiveness"] == pytest.approx(np.mean([drops[taken[c]] for c in counts]), abs=1e-5)
            assert rows["sufficiency"] == pytest.approx(
                np.mean([drops[everything - taken[c]] for c in counts]), abs=1e-5
            )
            assert rows["leave_one_out"] == pytest.approx(spearmanr(scores, alone)[0], abs=1e-5)
            table = np.array([drops[row] for row in range(2**n)])
            low, high = brute_force(table, n) if n <= 5 else best_and_worst(table, n)
            chain = np.mean([drops[taken[count]] for count in range(1, n + 1)])
            assert rows["normalised_comprehensiveness"] == pytest.approx((chain - low) / (high - low), abs=1e-3)
            back = np.mean([drops[everything - taken[count]] for count in range(n)])
            assert rows["normalised_sufficiency"] == pytest.approx((back - low) / (high - low), abs=1e-3)
            assert 0 <= rows["normalised_comprehensiveness"] <= 1
            assert 0 <= rows["normalised_sufficiency"] <= 1
        loo = result.frame[(result.frame["method"] == "leave_one_out") & (result.frame["measure"] == "leave_one_out")]
        np.testing.assert_allclose(loo["value"], 1)


# Best and worst orders


def brute_force(values: np.ndarray, n: int) -> tuple[float, float]:
    means = []
    for order in itertools.permutations(range(n)):
        removed, total = 0, 0.0
        for unit in order:
            removed |= 1 << unit
            total += values[removed]
        means.append(total / n)
    return min(means), max(means)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_best_and_worst_are_those_of_all_orders(n: int) -> None:
    values = np.random.default_rng(n).normal(size=2**n)
    values[0] = 0
    assert best_and_worst(values, n) == pytest.approx(brute_force(values, n))


def normalised(result: Any) -> pd.DataFrame:
    frame = result.frame
    chosen = frame[frame["measure"].astype(str).str.startswith("normalised")]
    return chosen.set_index(["example", "method", "measure"])["value"]


def test_a_wide_beam_finds_the_exact_orders(tiny: Any) -> None:
    model = tiny()
    game = Coalitions(model, TEXTS, task=TASK)
    explanations = explain(model, TEXTS, ["attention", "random", "leave_one_out"], task=TASK)
    exact = normalised(faithfulness_of(game, explanations))
    wide = normalised(faithfulness_of(game, explanations, longest_exact=0, beam=100))
    np.testing.assert_allclose(wide, exact, atol=1e-6)
    assert exact.between(0, 1).all()
    assert exact.nunique() > 4
    # A narrow beam finds no wider bounds than there are.
    narrow = faithfulness_of(game, explanations, longest_exact=0, beam=1)
    assert not np.allclose(normalised(narrow), exact, atol=1e-4)
    assert narrow.provenance.parameters["beam"] == 1


def test_a_beam_of_one_is_exact_on_a_sum() -> None:
    scores = {"true": [2.0, -1, 4, 1], "other": [4.0, 3, 2, 1]}
    exact, beam = (normalised(of_sum([2.0, -1.0, 4.0, 1.0], scores, longest_exact=at, beam=1)) for at in (10, 0))
    np.testing.assert_allclose(beam, exact, atol=1e-6)


def test_only_the_first_examples_are_normalised(tiny: Any) -> None:
    model = tiny()
    explanations = explain(model, TEXTS, ["attention", "recency"], task=TASK)
    result = faithfulness(model, TEXTS, explanations, task=TASK, n_normalised=2)
    known = normalised(result).notna().groupby("example").all()
    assert known.to_dict() == {0: True, 1: True}
    few = faithfulness(model, TEXTS, explanations, task=TASK, n_normalised=0)
    assert normalised(few).empty
    assert few.provenance.parameters["computed"] < result.provenance.parameters["computed"]


# Ties and no ranking


def test_ties_are_broken_at_random_and_by_the_seed() -> None:
    worths, scores = [1.0, 2.0, 4.0, 8.0, 16.0], {"mine": [1.0, 1.0, 1.0, 1.0, 0.0]}

    def first_removed(seed: int) -> float:
        return round(
            value(of_sum(worths, scores, fractions=(0.2,), n_normalised=0, seed=seed), "mine", "comprehensiveness")
        )

    found = [first_removed(seed) for seed in range(32)]
    assert first_removed(3) == found[3]
    assert set(found) == {1, 2, 4, 8}  # never the last, which is lower


def test_what_ranks_nothing_is_nan_and_counted(tiny: Any) -> None:
    model = tiny()
    texts = [*TEXTS[:2], " music"]
    mine = [[1.0, 2, 3, 4, float("nan")], [2.0, 2.0, 2.0], [1.0]]
    explanations = explain(
        model, texts, ["recency"], task=TASK, custom={"mine": mine, "flat": [[0.0] * 5, [1.0] * 3, [0.0]]}
    )
    for settings in ({"n_normalised": 0}, {}):
        result = faithfulness(model, texts, explanations, task=TASK, **settings)
        rows = result.frame[result.frame["method"].isin(["mine", "flat"])]
        assert rows["value"].isna().all()
        assert rows["fraction"].isna().all()
        table = faithfulness_means(result).set_index(["method", "measure", "fraction"])
        for method in ("mine", "flat"):
            row = table.loc[(method, "comprehensiveness", np.nan)].squeeze()
            assert (row["n"], row["n_nan"]) == (0, 3)
            assert np.isnan(row["mean"])
        row = table.loc[("recency", "comprehensiveness", np.nan)].squeeze()
        assert (row["n"], row["n_nan"]) == (2, 1)
        asked = table.index.get_level_values("measure").str.startswith("normalised")
        assert asked.any() == (not settings)


def test_means_are_over_examples_after_seeds(tiny: Any) -> None:
    model = tiny()
    explanations = explain(model, TEXTS, ["random", "recency"], task=TASK, seeds=(0, 1, 2))
    result = faithfulness(model, TEXTS, explanations, task=TASK, n_normalised=0)
    table = faithfulness_means(result).set_index(["method", "measure", "fraction"])
    frame = result.frame[(result.frame["method"] == "random") & (result.frame["fraction"] == 0.3)]
    frame = frame[frame["measure"] == "sufficiency"]
    assert len(frame) == 9
    each = frame.groupby("example")["value"].mean()
    row = table.loc[("random", "sufficiency", 0.3)]
    assert row["mean"] == pytest.approx(each.mean())
    assert row["sd"] == pytest.approx(each.std())
    assert row["low"] <= row["mean"] <= row["high"]
    assert (row["n"], row["n_nan"]) == (3, 0)


# Units, and what does not match


def test_words_are_removed_whole(tiny: Any) -> None:
    model = tiny()
    vocab = model.tokenizer.get_vocab()
    ids = [[vocab[token] for token in ("▁the", "▁dog", "dog", "?", "▁sea", "Dog")]]
    explanations = explain(model, ids, ["first"], units="words")
    result = faithfulness(model, ids, explanations, fractions=(0.3, 0.6))
    plain = PlainGame(Coalitions(model, ids), 0)
    whole = plain.value([True] * 6)
    # The words are the, dogdog? and seaDog.
    order = np.argsort(-explanations.frame["score"].to_numpy())
    groups = [[0], [1, 2, 3], [4, 5]]
    for fraction, count in ((0.3, 1), (0.6, 2)):
        gone = {at for unit in order[:count] for at in groups[unit]}
        kept = [at not in gone for at in range(6)]
        assert value(result, "first", "comprehensiveness", fraction) == pytest.approx(
            whole - plain.value(kept), abs=1e-5
        )
        others = whole - plain.value([not one for one in kept])
        assert value(result, "first", "sufficiency", fraction) == pytest.approx(others, abs=1e-5)


def test_other_models_examples_and_tasks_are_refused(tiny: Any) -> None:
    model = tiny()
    explanations = explain(model, TEXTS, ["recency"], task=TASK)
    assert len(faithfulness(model, TEXTS, explanations, task=TASK, n_normalised=0).frame)
    with pytest.raises(InputError, match="of another model"):
        faithfulness(tiny(seed=1), TEXTS, explanations, task=TASK)
    with pytest.raises(InputError, match=r"of another .*examples"):
        faithfulness(model, [TEXTS[0], TEXTS[2], TEXTS[1]], explanations, task=TASK)
    with pytest.raises(InputError, match="of another n_examples, examples"):
        faithfulness(model, TEXTS[:2], explanations, task=TASK)
    with pytest.raises(InputError, match="of another task"):
        faithfulness(model, TEXTS, explanations)
    game = Coalitions(model, TEXTS, task=TASK, target="probability", baseline="mean")
    with pytest.raises(InputError, match="of another target, baseline"):
        faithfulness_of(game, explanations)


@pytest.mark.parametrize("wrong", [{"fractions": ()}, {"fractions": (0.0,)}, {"fractions": (1.5,)}, {"beam": 0}])
def test_settings_out_of_range_are_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="expected fractions"):
        of_sum([1.0, 2.0], {"mine": [1.0, 2.0]}, **wrong)


def test_anything_but_explanations_is_refused(tiny: Any) -> None:
    model = tiny()
    explanations = explain(model, TEXTS, ["recency"], task=TASK)
    result = faithfulness(model, TEXTS, explanations, task=TASK, n_normalised=0)
    for wrong in (result, pd.DataFrame(), None):
        with pytest.raises(InputError, match=r"expected what interp\.agreement\.explain gives"):
            faithfulness(model, TEXTS, wrong, task=TASK)


@pytest.mark.parametrize("baseline", ["pad", "mean", 11, " dog", "7"])
def test_the_baseline_is_the_one_that_explained(tiny: Any, baseline: str | int) -> None:
    model = tiny()
    if baseline == "7":  # a token whose text is a number, not the token of that number
        model.tokenizer.add_tokens(["7"])
        vocab = model.tokenizer.get_vocab()
        model.hf.resize_token_embeddings(len(vocab))
        assert vocab["7"] != 7
    explanations = explain(model, TEXTS[:1], ["leave_one_out"], baseline=baseline)
    result = faithfulness(model, TEXTS[:1], explanations, n_normalised=0)
    assert value(result, "leave_one_out", "leave_one_out") == pytest.approx(1)
    drop = explanations.frame["score"].max()
    assert value(result, "leave_one_out", "comprehensiveness", 0.1) == pytest.approx(drop, abs=1e-5)
