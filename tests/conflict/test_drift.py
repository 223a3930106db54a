"""The three measures against numbers worked out by hand, scipy, and the published form written as plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cityblock, cosine
from scipy.special import rel_entr

from interp.conflict.drift import EPSILON, combine, direction, drift, pooled_direction, ranges

masses = st.integers(2, 6).flatmap(
    lambda n: st.tuples(
        *[arrays(float, n, elements=st.floats(0, 1)).filter(lambda row: row.sum() > 0.1) for _ in range(2)]
    )
)


def test_by_hand() -> None:
    found = drift(np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5]), epsilon=0.0)
    assert found["mag"] == pytest.approx(0.5)
    # n · c = 1/8 + 1/16 + 1/8 = 5/16 and |n|² = |c|² = 3/8
    assert found["dir"] == pytest.approx(1 - (5 / 16) / (3 / 8))
    # (1/4) log 2 from the first and (−1/4) log(1/2) from the last
    assert found["dist"] == pytest.approx(0.5 * math.log(2))


@settings(max_examples=100, deadline=None)
@given(masses)
def test_scipys(rows: tuple[np.ndarray, np.ndarray]) -> None:
    n, c = (row + 1e-3 for row in rows)
    found = drift(n, c, epsilon=1e-15)
    assert found["mag"] == pytest.approx(cityblock(n, c))
    assert found["dir"] == pytest.approx(cosine(n, c), abs=1e-9)
    p, q = n / n.sum(), c / c.sum()
    assert found["dist"] == pytest.approx(rel_entr(p, q).sum() + rel_entr(q, p).sum(), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(masses)
def test_same_for_both_orders_and_zero_for_equal_rows(rows: tuple[np.ndarray, np.ndarray]) -> None:
    n, c = rows
    there, back = drift(n, c), drift(c, n)
    for name, value in there.items():
        assert value >= 0
        assert value == pytest.approx(float(back[name]), abs=1e-12)
        assert drift(n, n)[name] == pytest.approx(0, abs=1e-9)


def test_a_span_that_neither_has_adds_nothing() -> None:
    random = np.random.default_rng(0)
    n, c = random.dirichlet(np.ones(3), 4), random.dirichlet(np.ones(3), 4)
    padded = [np.insert(row, 1, 0.0, axis=-1) for row in (n, c)]
    for name, values in drift(n, c).items():
        assert drift(*padded)[name] == pytest.approx(values)


def test_a_span_that_one_lacks_is_bounded() -> None:
    n, c = np.array([0.5, 0.5, 0.0]), np.array([0.4, 0.5, 0.1])
    added = 0.1 * math.log((0.1 + 1e-6) / 1e-6)
    assert drift(n, c)["dist"] == pytest.approx(added + 0.1 * math.log(0.5 / 0.4), abs=1e-5)


def test_empty_rows() -> None:
    """A window that ends before the keys compared: nothing moved, unless one prompt's window does not."""
    zero, some = np.zeros(4), np.array([0.0, 0.1, 0.2, 0.0])
    assert [float(value) for value in drift(zero, zero).values()] == [0, 0, 0]
    found = drift(zero, some)
    assert found["mag"] == pytest.approx(0.3)
    assert found["dir"] == 1
    assert np.isfinite(found["dist"])


def test_rows_that_do_not_sum_to_one_are_scaled_for_the_distribution_alone() -> None:
    n, c = np.array([0.3, 0.1]), np.array([0.1, 0.3])
    half, whole = drift(n, c, 1e-12), drift(2 * n, 2 * c, 1e-12)
    assert half["dist"] == pytest.approx(whole["dist"])
    assert half["dir"] == pytest.approx(whole["dir"])
    assert 2 * half["mag"] == pytest.approx(whole["mag"])


def test_published_form_written_as_loops() -> None:
    """What FocalLoRA's public code computes, in plain Python: rows by head, all pairs at once."""
    random = np.random.default_rng(1)
    pairs, layers, heads, keys = 5, 2, 3, 7
    n, c = (random.dirichlet(np.ones(12), (pairs, layers, heads))[..., :keys] for _ in range(2))
    measured = drift(n, c, EPSILON["truncate"])
    raw: dict[str, list[float]] = {"mag": [], "dir": [], "dist": []}
    for layer in range(layers):
        for head in range(heads):
            total = dist = product = first = second = 0.0
            for pair in range(pairs):
                a, b = n[pair, layer, head], c[pair, layer, head]
                for x, y in zip(a, b, strict=True):
                    total += abs(x - y)
                    product, first, second = product + x * y, first + x * x, second + y * y
                    p, q = x / a.sum(), y / b.sum()
                    dist += p * math.log((p + 1e-12) / (q + 1e-12)) + q * math.log((q + 1e-12) / (p + 1e-12))
            raw["mag"].append(total / pairs)
            raw["dir"].append(1 - product / math.sqrt(first * second))
            raw["dist"].append(dist / pairs)
    scores = [0.0] * (layers * heads)
    for name, weight in (("mag", 0.4), ("dir", 0.3), ("dist", 0.3)):
        low, high = min(raw[name]), max(raw[name])
        scores = [score + weight * (value - low) / (high - low) for score, value in zip(scores, raw[name], strict=True)]
    norms = [np.sqrt((rows**2).sum(-1)) for rows in (n, c)]
    means = np.stack([measured["mag"].mean(0), pooled_direction(measured["dir"], *norms), measured["dist"].mean(0)], -1)
    assert combine(means, *ranges(means)).ravel() == pytest.approx(scores, abs=1e-9)
    # Another direction than the mean over pairs, which is not the published one.
    assert np.abs(means[..., 1] - measured["dir"].mean(0)).max() > 1e-4


def test_score_is_between_0_and_1_and_linear() -> None:
    values = np.random.default_rng(2).gamma(1, size=(9, 3, 4, 3))  # (pair, layer, head, measure)
    low, width = ranges(values.mean(0))
    scores = combine(values, low, width)
    assert scores.mean(0) == pytest.approx(combine(values.mean(0), low, width))
    assert 0 <= scores.mean(0).min() < scores.mean(0).max() <= 1
    one = np.zeros((2, 2, 3))
    one[1, 1] = 5.0, 0.1, 2.0
    assert combine(one, *ranges(one)).tolist() == [[0, 0], [0, pytest.approx(1.0)]]


def test_equal_heads_have_score_0() -> None:
    values = np.full((2, 3, 3), 0.7)
    assert (combine(values, *ranges(values)) == 0).all()


def test_direction_of_empty_rows() -> None:
    zero = np.zeros(2)
    assert direction(zero, zero, np.array([0.0, 1.0])).tolist() == [0, 1]
