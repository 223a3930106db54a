"""Attributions that replace tokens: captum on a plain forward function, brute force over orders, the Shapley axioms."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_games import PlainGame, TableGame, tiny_classifier

from interp.agreement import coalitions as coalitions_module
from interp.agreement import perturbations
from interp.agreement.coalitions import Coalitions
from interp.agreement.perturbations import draws_seed, every_coalition, exact_shapley
from interp.agreement.tasks import Verbalizer
from interp.errors import InputError

METHODS = ("leave_one_out", "lime", "kernel_shap", "shapley_sampling", "shapley")
DRAWING = ("lime", "kernel_shap", "shapley_sampling")
SHOTS = [(" the dog is old", "yes"), (" red tea", "no")]
TASK = Verbalizer({"no": " water", "yes": " money"}, template="{text} is", shots=SHOTS, separator="")
TEXTS = [" the dog of the sea", " a king", " music", " the old cat in water code"]


def few_shot(tiny: Any, **settings: Any) -> Coalitions:
    return Coalitions(tiny(), TEXTS, **{"task": TASK, **settings})


def encoder(**settings: Any) -> Coalitions:
    return Coalitions(tiny_classifier(), ["the dog of sea", "music", "a red king in water"], **settings)


def run(game: Any, method: str, examples: Any = None, seed: int = 0, **options: Any) -> list[np.ndarray]:
    chosen = range(len(game)) if examples is None else examples
    return getattr(perturbations, method)(game, list(chosen), seed, **options)


def captum_on(forward: Any, method: str, n: int, seed: int) -> np.ndarray:
    """Captum's own call, one input at a time, on a function of (batch, n) zeros and ones."""
    from captum._utils.models.linear_model import SkLearnLinearRegression
    from captum.attr import FeatureAblation, KernelShap, Lime, ShapleyValues, ShapleyValueSampling

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  captum draws from it
    torch.manual_seed(seed)
    ones = torch.ones(1, n, dtype=torch.float64)
    calls = {
        "leave_one_out": lambda: FeatureAblation(forward).attribute(ones),
        "lime": lambda: Lime(forward, interpretable_model=SkLearnLinearRegression()).attribute(ones, n_samples=200),
        "kernel_shap": lambda: KernelShap(forward).attribute(ones, n_samples=200),
        "shapley_sampling": lambda: ShapleyValueSampling(forward).attribute(ones, n_samples=25),
        "shapley": lambda: ShapleyValues(forward).attribute(ones),
    }
    return calls[method]()[0].numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["few-shot", "encoder"])
def test_each_method_is_captums_on_a_plain_forward(tiny: Any, method: str, kind: str) -> None:
    game = few_shot(tiny) if kind == "few-shot" else encoder(target="logit_difference")
    example = 0
    found = run(game, method, seed=3)[example]
    plain = PlainGame(game, example)
    n = game.size(example)
    assert n >= 4
    expected = captum_on(plain.of_masks, method, n, draws_seed(3, example))
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("baseline", ["pad", "zero", "mean"])
@pytest.mark.parametrize("target", ["log_prob", "probability", "logit_difference"])
def test_leave_one_out_by_hand(tiny: Any, baseline: str, target: str) -> None:
    game = few_shot(tiny, baseline=baseline, target=target)
    for example, scores in enumerate(run(game, "leave_one_out")):
        plain = PlainGame(game, example)
        n = game.size(example)
        whole = plain.value([True] * n)
        expected = [whole - plain.value([at != gone for at in range(n)]) for gone in range(n)]
        np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_leave_one_out_of_every_family(tiny: Any, family: str) -> None:
    game = Coalitions(tiny(family), [" the dog of the sea", " a king in the water"], max_tokens=40)
    for example, scores in enumerate(run(game, "leave_one_out")):
        plain = PlainGame(game, example)
        n = game.size(example)
        whole = plain.value([True] * n)
        expected = [whole - plain.value([at != gone for at in range(n)]) for gone in range(n)]
        np.testing.assert_allclose(scores, expected, atol=1e-4)


# Shapley values


def tables(most: int) -> Any:
    sizes = st.integers(1, most)
    return sizes.flatmap(lambda n: st.lists(st.floats(-10, 10), min_size=2**n, max_size=2**n)).map(np.array)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_exact_shapley_is_the_mean_over_all_orders(n: int) -> None:
    values = np.random.default_rng(n).normal(size=2**n)
    expected = np.zeros(n)
    orders = list(itertools.permutations(range(n)))
    for order in orders:
        present = 0
        for token in order:
            expected[token] += values[present | 1 << token] - values[present]
            present |= 1 << token
    np.testing.assert_allclose(exact_shapley(values, n), expected / len(orders), atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_exact_shapley_is_captums() -> None:
    values = np.random.default_rng(0).normal(size=16)

    def forward(masks: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(values[(masks.numpy().astype(int) * 2 ** np.arange(4)).sum(1)])

    np.testing.assert_allclose(exact_shapley(values, 4), captum_on(forward, "shapley", 4, 0), atol=1e-9)


def test_rows_of_every_coalition_are_bits() -> None:
    rows = every_coalition(3)
    assert rows.shape == (8, 3)
    assert rows[0b101].tolist() == [True, False, True]
    assert len({tuple(row) for row in rows.tolist()}) == 8


@settings(max_examples=60, deadline=None)
@given(tables(5), st.data())
def test_shapley_axioms(values: np.ndarray, draw: Any) -> None:
    n = int(np.log2(len(values)))
    # Efficiency and additivity.
    scores = exact_shapley(values, n)
    assert scores.sum() == pytest.approx(values[-1] - values[0], abs=1e-9)
    other = np.array(draw.draw(st.lists(st.floats(-10, 10), min_size=2**n, max_size=2**n)))
    assert exact_shapley(values + 2 * other, n) == pytest.approx(scores + 2 * exact_shapley(other, n), abs=1e-8)
    # A token that never changes more than its own worth gets that; relabelled tokens carry their scores along.
    dummy, worth = draw.draw(st.integers(0, n - 1)), draw.draw(st.floats(-5, 5))
    rows = np.arange(2**n)
    without = values[rows & ~(1 << dummy)]
    game = without + worth * ((rows >> dummy) & 1)
    assert exact_shapley(game, n)[dummy] == pytest.approx(worth, abs=1e-9)
    order = draw.draw(st.permutations(range(n)))
    moved = sum(((rows >> new) & 1) << old for new, old in enumerate(order))
    assert exact_shapley(values[moved], n) == pytest.approx(scores[order], abs=1e-9)


def test_many_samples_come_to_the_exact_values() -> None:
    values = np.random.default_rng(1).normal(size=8)
    game = TableGame(values)
    exact = exact_shapley(values, 3)
    scale = np.abs(exact).max()
    few, many = (run_table(game, "kernel_shap", n_samples=n) for n in (12, 3000))
    assert np.abs(many - exact).max() < 0.05 * scale
    assert np.abs(many - exact).max() < np.abs(few - exact).max()
    # Captum weighs both ends a million times, so completeness is nearly exact.
    assert many.sum() == pytest.approx(values[-1] - values[0], abs=0.01 * scale)
    sampled = run_table(game, "shapley_sampling", n_samples=600)
    assert np.abs(sampled - exact).max() < 0.2 * scale
    assert sampled.sum() == pytest.approx(values[-1] - values[0], abs=1e-5)  # each order is complete by itself


def run_table(game: TableGame, method: str, **options: Any) -> np.ndarray:
    found: list[np.ndarray] = getattr(perturbations, method)(game, [0], 0, **options)
    return found[0]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_exact_on_a_sum(method: str) -> None:
    worth = np.array([3.0, -2.0, 0.5, 0.0, 1.25])
    game = TableGame(0.7 + every_coalition(5) @ worth)
    np.testing.assert_allclose(run_table(game, method), worth, atol=2e-5)


def test_kernel_shap_asks_for_both_ends() -> None:
    game = TableGame(np.arange(16.0))
    run_table(game, "kernel_shap", n_samples=10)
    assert {0, 15} <= game.computed[0]


# What must not matter, and what must


@pytest.mark.parametrize("method", METHODS)
def test_company_order_and_budget_do_not_matter(tiny: Any, method: str) -> None:
    together = run(few_shot(tiny), method, seed=5)
    backwards = run(few_shot(tiny), method, [3, 1, 0, 2], seed=5)
    small = run(few_shot(tiny, max_tokens=12), method, seed=5)
    for place, example in enumerate([3, 1, 0, 2]):
        alone = run(few_shot(tiny), method, [example], seed=5)[0]
        for other in (together[example], backwards[place], small[example]):
            np.testing.assert_allclose(other, alone, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_draws_follow_the_seed(tiny: Any, method: str) -> None:
    game = few_shot(tiny)
    options = {"n_samples": 10} if method in DRAWING else {}
    first, again, other = (run(game, method, [0, 3], seed, **options) for seed in (1, 1, 2))
    for one, two, three in zip(first, again, other, strict=True):
        assert np.array_equal(one, two)
        assert np.allclose(one, three, atol=1e-7) == (method not in DRAWING)


def test_two_examples_of_the_same_text_draw_apart(tiny: Any) -> None:
    game = Coalitions(tiny(), [TEXTS[3]] * 2, task=TASK)
    first, second = run(game, "lime", n_samples=10)
    assert not np.allclose(first, second, atol=1e-4)


def test_no_coalition_is_computed_twice(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    game = few_shot(tiny)
    passed: list[tuple[int, ...]] = []
    real = coalitions_module.read_logits

    def spy(model: Any, sequences: Any, *rest: Any, **named: Any) -> Any:
        passed.extend(map(tuple, sequences))
        return real(model, sequences, *rest, **named)

    monkeypatch.setattr(coalitions_module, "read_logits", spy)
    for method in METHODS:
        run(game, method)
        run(game, method, seed=1)
    assert len(set(passed)) == len(passed) == game.computed.sum()
    # Exact Shapley values need all; the ends are known from the start, and of one token there is nothing else.
    assert game.computed.tolist() == [2 ** game.size(at) - 2 for at in range(len(TEXTS))]
    assert game.size(2) == 1
    assert (game.asked[[0, 1, 3]] > game.computed[[0, 1, 3]]).all()


@pytest.mark.parametrize("method", METHODS)
def test_one_token_gets_the_whole_difference(tiny: Any, method: str) -> None:
    game = few_shot(tiny)
    (scores,) = run(game, method, [2])
    plain = PlainGame(game, 2)
    np.testing.assert_allclose(scores, [plain.value([True]) - plain.value([False])], atol=1e-5)


def test_too_many_tokens_for_exact_values_are_refused(tiny: Any) -> None:
    game = few_shot(tiny)
    with pytest.raises(InputError, match=r"an example has 6 tokens; at most 5 .*shapley_sampling"):
        run(game, "shapley", longest=5)
    assert game.computed.sum() == 0
    assert len(run(game, "shapley", [0, 1], longest=5)[0]) == 5


def test_the_number_of_threads_is_left_alone() -> None:
    torch.set_num_threads(2)
    try:
        run_table(TableGame(np.arange(8.0)), "lime", n_samples=5)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
