"""What attributions are timed against computes the same scores; the rows of the subject are well formed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from benchmarks import captum_peers
from benchmarks.table import KEYS, Row, render
from captum.attr import FeatureAblation, KernelShap

from interp.agreement import Coalitions, Verbalizer, perturbations
from interp.agreement.gradients import integrated_gradients
from interp.agreement.prefix_tree import prefix_cache

WORDS = {"low": " red", "high": " sea"}
TASK = Verbalizer(
    WORDS, template=" the{text} is", shots=[(" dog in tea", "low"), (" old music", "high")], separator=" of"
)
TEXTS = [" new king of the water", " cat in money", " old dog the music sun"]


@pytest.fixture(scope="module")
def game(tiny: Any) -> Coalitions:
    return Coalitions(tiny(), TEXTS, task=TASK, target="logit_difference")


def subject() -> Any:
    return pytest.importorskip("tests.benchmarks.attributions", reason="needs the repository's root on the path")


def small(model: Any, **changes: Any) -> Any:
    given = {
        "quick": True,
        "whole": 2,
        "shap": ((1,), (0, 2)),
        "n_samples": 12,
        "gradient": ((0, 1), (2,)),
        "n_steps": 4,
    }
    options = {
        **{name: {"n_samples": 4} for name in ("lime", "kernel_shap", "shapley_sampling", "gradient_shap")},
        "integrated_gradients": {"n_steps": 4, "max_steps": 4},
    }
    return subject().Work(model, TASK, TEXTS, **{**given, "rows": (2, 4), "options": options, **changes})


def difference(game: Coalitions, example: int, method: Any, **options: Any) -> np.ndarray:
    words = list(WORDS.values())
    wanted, other = words[game.wanted[example][0]], words[game.contrast[example][0]]
    scores = [captum_peers.word_scores(game, example, word, method, **options) for word in (wanted, other)]
    return scores[0] - scores[1]


def well_formed(row: Row) -> dict[str, Any]:
    entry = row.as_dict()
    assert tuple(entry)[: len(KEYS)] == KEYS
    assert (entry["suite"], entry["subject"], entry["quick"]) == ("agreement", "attributions", True)
    assert entry["ours"] > 0
    assert render([entry])
    return entry


def test_captum_explains_the_text_and_leaves_the_prompt_as_it_is(game: Coalitions) -> None:
    one = game.encoded[1]
    given = captum_peers.PositionInput(game.model.tokenizer, one.ids, one.positions, game.baseline_id)
    ones = given.to_tensor()
    assert given.n_itp_features == game.size(1)
    assert given.to_model_input(ones)[0].tolist() == list(one.ids)
    assert given.to_model_input(0 * ones)[0].tolist() == game.input(1, np.zeros(game.size(1), bool))


def test_leave_one_out_of_both_is_the_same(game: Coalitions) -> None:
    for example, ours in enumerate(perturbations.leave_one_out(game, range(len(TEXTS)), seed=0)):
        np.testing.assert_allclose(difference(game, example, FeatureAblation), ours, atol=1e-4)
        assert np.abs(ours).max() > 1e-2


@pytest.mark.parametrize("seed", [0, 3])
def test_kernel_shap_of_both_is_the_same_from_the_same_draws(game: Coalitions, seed: int) -> None:
    ours = perturbations.kernel_shap(game, [0], seed, n_samples=12)[0]
    np.testing.assert_allclose(difference(game, 0, KernelShap, seed=seed, n_samples=12), ours, atol=1e-3)


@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("cached", [False, True])
def test_integrated_gradients_of_both_are_the_same(game: Coalitions, rows: int, cached: bool) -> None:
    kept = prefix_cache(game.model, game.prefix.ids) if cached else None
    ours, _ = integrated_gradients(game, range(len(TEXTS)), 0, n_steps=8, max_steps=8)
    for example, scores in enumerate(ours):
        theirs = captum_peers.integrated_gradients(game, example, n_steps=8, rows=rows, prefix=kept)
        np.testing.assert_allclose(theirs, scores, atol=1e-4)


def test_rows_against_captum_have_a_ratio_and_say_how_far_scores_are_apart(tiny: Any) -> None:
    work = small(tiny())
    rows = [subject().leave_one_out_row(work), subject().kernel_shap_row(work), *subject().gradient_rows(work)]
    for row in rows:
        entry = well_formed(row)
        assert entry["ratio"] > 0
        assert entry["theirs"] > 0
        assert entry["repeats"] == 2
        assert float(entry["note"].split("agree within ")[1].split()[0]) < 1e-3
    assert [row.target for row in rows] == ["<= 0.2", "<= 0.2", "<= 0.6667", None]
    assert rows[1].more is not None
    assert rows[1].more["their_seconds_per_review"] > 0


def test_the_comparison_has_a_row_per_method_one_for_all_and_the_tokens(tiny: Any) -> None:
    from interp.agreement.methods import DEFAULT_METHODS

    *each, total, tokens = subject().comparison_rows(small(tiny()))
    names = {row.name.removeprefix("compare, ").removesuffix(": a review") for row in each}
    assert names <= set(DEFAULT_METHODS)
    assert {"leave_one_out", "integrated_gradients", "flow", "random"} <= names
    for row in (*each, total):
        assert (row.ratio, row.target, row.met) == (None, None, None)
        well_formed(row)
    assert total.ours > sum(row.ours for row in each)
    well_formed(tokens)
    assert 0 < tokens.ratio < 1
    assert tokens.ratio == tokens.ours / tokens.theirs


def test_tokens_are_counted_while_asked_and_no_longer(tiny: Any) -> None:
    model = tiny()
    kept = np.array([[True, False, False], [False, False, False]])
    with subject().counted_tokens(model) as seen:
        game = Coalitions(model, [TEXTS[1]], task=TASK)
        before = dict(seen)
        game.compute({0: kept})
    assert before["asked"] == len(game.encoded[0].ids)  # f(x₀); the prediction gives f(x)
    assert seen["asked"] == before["asked"] + 2 * len(game.encoded[0].ids)
    assert seen["computed"] > before["computed"]
    after = dict(seen)
    game.compute({0: ~kept})
    assert seen == after


@pytest.mark.slow
def test_reviews_are_short_clear_and_as_many_of_either_class(embedded: Any) -> None:
    attributions = subject()
    task, reviews = attributions.film_reviews(embedded.tokenizer, 32)
    assert (task, reviews) == attributions.film_reviews(embedded.tokenizer, 32)
    assert len(set(reviews)) == 32
    assert attributions.film_reviews(embedded.tokenizer, 2)[1] == reviews[:2]
    assert not {text for text, _ in task.shots} & set(reviews)
    assert sorted(label for _, label in task.shots) == ["negative", "negative", "positive", "positive"]
    game_lengths = [len(embedded.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]) for text in reviews]
    assert set(game_lengths) <= set(range(6, 17))
