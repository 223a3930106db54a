"""Bootstrap, permutation test and false-discovery control against scipy, enumeration and simulation."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from interp import intervals
from interp.errors import InputError
from interp.intervals import (
    bootstrap_difference,
    bootstrap_mean,
    false_discovery,
    paired_permutation_test,
    permutation_test,
)


def test_bootstrap_mean_is_scipys() -> None:
    values = np.random.default_rng(1).gamma(2, size=(40, 3))
    low, high = bootstrap_mean(values, n_resamples=20_000)
    theirs = scipy.stats.bootstrap((values,), np.mean, axis=0, n_resamples=20_000, method="percentile", rng=2)
    spread = values.std(0) / np.sqrt(40)
    assert np.abs(low - theirs.confidence_interval.low).max() < 0.05 * spread.max()
    assert np.abs(high - theirs.confidence_interval.high).max() < 0.05 * spread.max()


def test_bootstrap_covers() -> None:
    random = np.random.default_rng(3)
    values = random.normal(1.5, 1, size=(50, 400))  # 400 samples of 50
    low, high = bootstrap_mean(values)
    assert 0.90 < ((low < 1.5) & (high > 1.5)).mean() < 0.98


def test_bootstrap_difference_is_scipys() -> None:
    random = np.random.default_rng(4)
    a, b = random.normal(0.4, 1, 60), random.normal(0, 2, 30)
    low, high = bootstrap_difference(a, b, n_resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), n_resamples=20_000, method="percentile", rng=5
    ).confidence_interval
    assert [low, high] == pytest.approx([theirs.low, theirs.high], abs=0.03)


def test_one_text_has_no_interval() -> None:
    assert np.isnan(bootstrap_mean(np.array([[1.0, 2.0]]))).all()
    assert np.isnan(bootstrap_mean(np.empty((0, 2)))).all()
    assert np.isnan(bootstrap_mean(np.array([]))).all()
    assert np.isnan(bootstrap_difference(np.ones((1, 2)), np.ones((5, 2)))).all()
    assert np.isnan(permutation_test(np.ones((1, 2)), np.zeros((1, 2)))).all()


def test_missing_values_stay_missing_and_alone() -> None:
    values = np.array([[1.0, np.nan], [2.0, 1.0], [4.0, 1.0]])
    low, high = bootstrap_mean(values)
    assert np.isnan([low[1], high[1]]).all()
    assert np.isfinite([low[0], high[0]]).all()
    p = permutation_test(values, values + np.array([9.0, 0.0]))
    assert np.isfinite(p[0])
    assert np.isnan(p[1])


@pytest.mark.parametrize("level", [0, 1, -1, 95])
def test_level_out_of_range(level: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        bootstrap_mean(np.ones((3, 1)), level=level)


def test_exact_permutations_against_enumeration() -> None:
    random = np.random.default_rng(6)
    a, b = random.normal(1, 1, 3), random.normal(0, 1, 3)
    pooled = np.concatenate([a, b])
    differences = np.array(
        [abs(np.mean(pooled[list(o[:3])]) - np.mean(pooled[list(o[3:])])) for o in permutations(range(6))]
    )
    expected = (differences >= abs(a.mean() - b.mean()) - 1e-12).mean()
    assert permutation_test(a, b) == pytest.approx(expected)


def test_random_permutations_are_scipys() -> None:
    random = np.random.default_rng(7)
    a, b = random.normal(0.5, 1, (20, 4)), random.normal(0, 1, (25, 4))
    ours = permutation_test(a, b, n_permutations=20_000)
    theirs = scipy.stats.permutation_test(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), axis=0, n_resamples=20_000, rng=8
    ).pvalue
    assert ours == pytest.approx(theirs, abs=0.02)


def test_p_values_are_uniform_where_nothing_differs() -> None:
    values = np.random.default_rng(9).normal(size=(16, 500))
    p = permutation_test(values[:8], values[8:], n_permutations=999)
    assert scipy.stats.kstest(p, "uniform").pvalue > 1e-3


@settings(max_examples=50, deadline=None)
@given(arrays(float, st.tuples(st.integers(2, 5), st.integers(1, 3)), elements=st.floats(-10, 10)))
def test_equal_domains_are_never_different(values: np.ndarray) -> None:
    assert (permutation_test(values, values) == 1).all()


def test_shapes_must_agree() -> None:
    with pytest.raises(InputError, match="same heads"):
        permutation_test(np.ones((3, 2)), np.ones((3, 4)))


def test_exact_signs_against_enumeration() -> None:
    values = np.random.default_rng(11).normal(0.7, 1, size=(7, 3))
    expected = np.mean(
        [np.abs(np.array(signs) @ values) >= np.abs(values.sum(0)) - 1e-12 for signs in product((-1, 1), repeat=7)],
        axis=0,
    )
    assert paired_permutation_test(values) == pytest.approx(expected)


def test_random_signs_are_scipys() -> None:
    values = np.random.default_rng(12).normal(0.4, 1, (25, 4))
    theirs = scipy.stats.permutation_test(
        (values,), lambda x, axis: x.mean(axis), permutation_type="samples", axis=0, n_resamples=20_000, rng=13
    ).pvalue
    ours = paired_permutation_test(values, n_permutations=20_000, seed=1)
    assert ours == pytest.approx(theirs, abs=0.02)
    assert len(set(ours)) == 4
    assert (ours == paired_permutation_test(values, n_permutations=20_000, seed=1)).all()
    assert paired_permutation_test(values[:, 2], n_permutations=20_000, seed=1) == ours[2]


def test_paired_p_values_are_uniform_where_nothing_differs() -> None:
    values = np.random.default_rng(14).normal(size=(15, 500))
    assert scipy.stats.kstest(paired_permutation_test(values, n_permutations=999), "uniform").pvalue > 1e-3


def test_pairing_finds_what_differs_less_than_texts_do() -> None:
    random = np.random.default_rng(15)
    first = random.normal(0, 10, 20)
    second = first - 0.5 + random.normal(0, 0.1, 20)
    assert permutation_test(first, second) > 0.5
    assert paired_permutation_test(first - second) < 0.001


def test_signs_of_too_few_or_missing_texts() -> None:
    assert np.isnan(paired_permutation_test(np.ones((1, 2)))).all()
    assert (paired_permutation_test(np.zeros((5, 2))) == 1).all()
    p = paired_permutation_test(np.array([[1.0, np.nan], [2.0, 1.0], [4.0, 1.0]]))
    assert p[0] == 0.25
    assert np.isnan(p[1])
    with pytest.raises(InputError, match="expected some texts"):
        paired_permutation_test(np.empty((0, 2)))


def test_blocks_of_signs_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(16).normal(0.2, 1, (9, 3))
    whole = paired_permutation_test(values)
    monkeypatch.setattr(intervals, "_BLOCK", 50)
    assert (paired_permutation_test(values) == whole).all()
    drawn = paired_permutation_test(values, n_permutations=400)
    assert drawn == pytest.approx(whole, abs=0.08)


def test_false_discovery_by_hand() -> None:
    # m = 4: p · m / rank = .04, .06, .0533, .8 → cumulative minimum from the right: .04, .0533, .0533, .8
    q, level = false_discovery(np.array([0.01, 0.03, 0.04, 0.8, np.nan]), alpha=0.05)
    assert q[:4] == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.8])
    assert np.isnan(q[4])
    assert level == pytest.approx(1 - 0.05 * 1 / 4)
    assert false_discovery(np.array([np.nan]))[1] == 0.95


def test_false_coverage_is_kept_under_selection() -> None:
    """Of 200 heads 20 differ; intervals of the selected miss at most alpha, plain ones far more."""
    random = np.random.default_rng(10)
    truth = np.r_[np.full(20, 0.9), np.zeros(180)]
    missed, selected = 0, 0
    for round_ in range(10):
        a = random.normal(truth, 1, size=(40, 200))
        b = random.normal(0, 1, size=(40, 200))
        q, level = false_discovery(permutation_test(a, b, 1999, seed=round_))
        low, high = bootstrap_difference(a, b, 4000, level=level, seed=round_)
        chosen = q <= 0.05
        selected += chosen.sum()
        missed += (chosen & ((low > truth) | (high < truth))).sum()
    assert selected > 100
    assert missed / selected < 0.09
