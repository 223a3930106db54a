"""Measures of agreement against scipy, against their definitions over every way to break ties, and against hand-made numbers;
their chance levels against every permutation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations, permutations, product

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

import interp.agreement.rankings as rankings
from interp.agreement.rankings import MEASURES, agreement, agreement_matrix, chance, chance_matrix
from interp.errors import InputError

AT_K = [name for name, measure in MEASURES.items() if measure.at_k]
OF_ORDER = [name for name in MEASURES if name != "pearson"]
CORRELATIONS: dict[str, Callable[..., tuple[float, float]]] = {
    "kendall": scipy.stats.kendalltau,
    "spearman": scipy.stats.spearmanr,
    "pearson": scipy.stats.pearsonr,
}
nan = float("nan")


def sign(value: float) -> int:
    return 1 if value > 0 else -1 if value < 0 else 0


def orders(keys: np.ndarray) -> Iterator[list[int]]:
    """Every order of the units, highest first, that the scores allow."""
    groups = [np.flatnonzero(keys == key).tolist() for key in sorted(set(keys.tolist()), reverse=True)]
    for parts in product(*(permutations(group) for group in groups)):
        yield [unit for part in parts for unit in part]


def fagin_distance(top_a: list[int], top_b: list[int]) -> float:
    """K^(1/2) by the four cases of Fagin et al. (2003)."""
    total = 0.0
    for i, j in combinations(sorted({*top_a, *top_b}), 2):
        in_a, in_b = {i, j} & set(top_a), {i, j} & set(top_b)
        if len(in_a) == len(in_b) == 2:  # case 1
            total += (top_a.index(i) < top_a.index(j)) != (top_b.index(i) < top_b.index(j))
        elif len(in_a) == 2 and len(in_b) == 1:  # case 2
            (held,) = in_b
            total += top_a.index(held) > min(top_a.index(i), top_a.index(j))
        elif len(in_b) == 2 and len(in_a) == 1:
            (held,) = in_a
            total += top_b.index(held) > min(top_b.index(i), top_b.index(j))
        elif len(in_a) == len(in_b) == 1:  # case 3: one each, and not the same, or the pair would not be in the union
            assert in_a != in_b
            total += 1
        else:  # case 4
            total += 0.5
    return total


def largest_distance(n: int, k: int) -> float:
    lists = [list(one) for one in permutations(range(n), k)]
    return max(fagin_distance(lists[0], other) for other in lists)


def by_definition(
    name: str, order_a: list[int], order_b: list[int], signs: tuple[list[int], list[int]], k: int
) -> float:
    """What Krishna et al. and Fagin et al. define for orders without ties."""
    n = len(order_a)
    k = min(k, n)
    if name == "pairwise":
        same = [
            (order_a.index(i) < order_a.index(j)) == (order_b.index(i) < order_b.index(j))
            for i, j in combinations(range(n), 2)
        ]
        return sum(same) / len(same)
    top_a, top_b = order_a[:k], order_b[:k]
    if name == "topk_kendall":
        return 1 - 2 * fagin_distance(top_a, top_b) / largest_distance(n, k)
    shared = [unit for unit in top_a if unit in top_b]
    if name in ("sign", "signed_rank"):
        shared = [unit for unit in shared if signs[0][unit] == signs[1][unit]]
    if name in ("rank", "signed_rank"):
        shared = [unit for unit in shared if top_a.index(unit) == top_b.index(unit)]
    return len(shared) / k


def expected(name: str, a: np.ndarray, b: np.ndarray, k: int, rank_by: str) -> float:
    keys = [np.abs(scores) if rank_by == "abs" else scores for scores in (a, b)]
    signs = ([sign(score) for score in a], [sign(score) for score in b])
    found = [by_definition(name, one, two, signs, k) for one in orders(keys[0]) for two in orders(keys[1])]
    return sum(found) / len(found)


def tied(seed: int, n: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Two vectors over few different scores, both of which rank something by value and by size."""
    random = np.random.default_rng(seed)
    while True:
        a, b = random.integers(-levels, levels + 1, size=(2, n)).astype(float)
        if all(len(set(np.abs(scores).tolist())) > 1 for scores in (a, b)):
            return a, b


@pytest.mark.parametrize("name", CORRELATIONS)
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_correlations_are_scipys(name: str, levels: int) -> None:
    scores = np.random.default_rng(levels).integers(-levels, levels + 1, size=(6, 17)).astype(float)
    for rank_by, keys in (("abs", np.abs(scores)), ("signed", scores)):
        found = agreement_matrix(scores, name, rank_by=rank_by)
        for i, j in product(range(6), repeat=2):
            assert found[i, j] == pytest.approx(CORRELATIONS[name](keys[i], keys[j])[0], abs=1e-12)


@pytest.mark.parametrize("name", ["pairwise", *AT_K])
@pytest.mark.parametrize("rank_by", ["abs", "signed"])
@pytest.mark.parametrize(("n", "levels"), [(2, 3), (3, 2), (4, 1), (5, 2), (5, 50)])
def test_expected_over_every_way_to_break_ties(name: str, rank_by: str, n: int, levels: int) -> None:
    for seed in range(3):
        a, b = tied(seed, n, levels)
        for k in range(1, n + 2) if name in AT_K else [1]:
            assert agreement(a, b, name, k, rank_by) == pytest.approx(expected(name, a, b, k, rank_by), abs=1e-12)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("rank_by", ["abs", "signed"])
@pytest.mark.parametrize(("n", "levels"), [(2, 3), (4, 1), (6, 1), (6, 2), (6, 50)])
def test_chance_is_the_mean_over_all_permutations(name: str, rank_by: str, n: int, levels: int) -> None:
    a, b = tied(n + levels, n, levels)
    dealt = np.stack([a, *(b[list(order)] for order in permutations(range(n)))])
    for k in range(1, n + 2) if name in AT_K else [1]:
        found = agreement_matrix(dealt, name, k, rank_by)[0, 1:].mean()
        assert chance(a, b, name, k, rank_by) == pytest.approx(found, abs=1e-12)
        assert chance(b, a, name, k, rank_by) == pytest.approx(found, abs=1e-12)


def test_known_chance_levels() -> None:
    a, b = np.arange(1.0, 11.0), np.array([3.0, -1, 4, -1.5, 5, 9, -2, 6, 5.3, 5.8])
    assert chance(a, b, "feature", 3) == pytest.approx(3 / 10)
    assert chance(a, b, "rank", 3) == pytest.approx(1 / 10)
    assert chance(a, b, "sign", 3) == pytest.approx(3 / 10)  # both lists have positive units only
    assert chance(a, -b, "sign", 3) == 0
    assert chance(a, b, "pairwise") == 0.5
    assert chance(a, b, "kendall") == chance(a, b, "spearman") == chance(a, b, "pearson") == 0
    assert chance(a, b, "topk_kendall", 1) == pytest.approx(2 / 10 - 1)  # the same top unit once in ten
    assert chance(a, b, "topk_kendall", 10) == pytest.approx(0)


def test_without_ties_by_hand() -> None:
    a = np.array([0.9, -0.8, 0.5, 0.1, 0.05, 0.0])  # units 0 1 2 lead
    b = np.array([0.7, 0.9, 0.1, 0.4, 0.0, 0.05])  # units 1 0 3 lead
    by_hand = {"feature": 2 / 3, "rank": 0.0, "sign": 1 / 3, "signed_rank": 0.0}
    # Fagin: 0 and 1 are exchanged, 2 against 3 is one each; at most 3·8/2 = 12
    by_hand["topk_kendall"] = 1 - 2 * 2 / 12
    for name, value in by_hand.items():
        assert agreement(a, b, name, 3) == pytest.approx(value)
    # of 15 pairs exchanged are 0-1, 2-3 and 4-5
    assert agreement(a, b, "pairwise") == pytest.approx(12 / 15)
    assert agreement(a, b, "kendall") == pytest.approx(9 / 15)
    # signed: a leads with 0 2 3, b still with 1 0 3; unit 3 is third in both and positive in both
    assert agreement(a, b, "feature", 3, "signed") == pytest.approx(2 / 3)
    assert agreement(a, b, "signed_rank", 3, "signed") == pytest.approx(1 / 3)
    assert agreement(a, -b, "signed_rank", 3) == 0
    assert agreement(np.array([2.0, 1.0, 0.5]), np.array([2.0, -1.0, 0.1]), "signed_rank", 2) == 0.5


def test_ties_by_hand() -> None:
    a = np.array([3.0, 1.0, 1.0, 0.0])
    b = np.array([1.0, 2.0, 0.5, 0.5])
    # two of a: 0 surely, 1 and 2 by halves; of b: 1 and 0 surely
    assert agreement(a, b, "feature", 2) == pytest.approx((1 + 0.5) / 2)
    # a puts 0 first, 1 second with ½; b puts 1 first, 0 second
    assert agreement(a, b, "rank", 2) == 0
    # third place of a: 1 or 2 by halves; of b: 2 or 3 by halves; both 2 in a quarter
    assert agreement(a, b, "rank", 3) == pytest.approx(0.25 / 3)
    # pairs: 01 differ; 02, 03, 13 agree; 12 tied in a and 23 tied in b, ½ each
    assert agreement(a, b, "pairwise") == pytest.approx((3 + 2 * 0.5) / 6)
    assert agreement(a, b, "kendall") == pytest.approx((3 - 1) / 5)
    # K at k=1: a's top is 0, b's is 1
    assert agreement(a, b, "topk_kendall", 1) == -1
    assert agreement(a, np.array([1.0, 1.0, 0.0, 0.0]), "topk_kendall", 1) == 0  # the same top in half of the cases
    # what is left open agrees not even with itself: 1 and 2 by halves in both
    assert agreement(a, a, "feature", 2) == pytest.approx((1 + 0.25 + 0.25) / 2)


def test_zero_is_a_sign_of_its_own() -> None:
    a, b = np.array([0.0, -3.0, -4.0]), np.array([0.0, -1.0, -2.0])
    assert agreement(a, b, "sign", 1, "signed") == 1
    assert agreement(a, np.array([0.1, -1.0, -2.0]), "sign", 1, "signed") == 0


@pytest.mark.parametrize(("n", "k"), [(2, 1), (3, 1), (3, 2), (4, 2), (4, 3), (4, 4), (5, 2), (5, 3), (5, 4)])
def test_topk_kendall_spans_its_range(n: int, k: int) -> None:
    scores = np.array([[float(order.index(unit) + 1) for unit in range(n)] for order in permutations(range(n))])
    found = agreement_matrix(scores, "topk_kendall", k)
    assert found.min() == pytest.approx(-1)
    tops = np.argsort(-scores, axis=1)[:, :k]
    same = (tops[:, None] == tops).all(2)
    assert np.array_equal(found > 1 - 1e-9, same)
    if k == n:
        assert found == pytest.approx(2 * agreement_matrix(scores, "pairwise") - 1)


def test_k_above_n_is_n() -> None:
    a, b = np.array([3.0, -1.0, 2.0]), np.array([1.0, 2.0, 3.0])
    for name in AT_K:
        assert agreement(a, b, name, 99) == agreement(a, b, name, 3)
        assert chance(a, b, name, 99) == chance(a, b, name, 3)
    assert agreement(a, b, "feature", 99) == chance(a, b, "feature", 99) == 1


@pytest.mark.parametrize("name", MEASURES)
def test_nothing_to_rank_is_nan(name: str) -> None:
    good = [3.0, 1.0, 2.0]
    bad = [[1.0, 1.0, 1.0], [0.1, 0.1, 0.1], [0.0, -0.0, 0.0], [1.0, nan, 2.0], [1.0, math.inf, 2.0], [2.0, -2.0, 2.0]]
    for compute in (agreement_matrix, chance_matrix):
        found = compute(np.array([good, *bad, good]), name, 2)
        expected_nan = np.ones((8, 8), bool)
        expected_nan[np.ix_([0, 7], [0, 7])] = False
        assert np.array_equal(np.isnan(found), expected_nan)
        assert np.isfinite(compute(np.array([good, bad[-1]]), name, 2, "signed")).all()  # its signs rank the units
        assert np.isnan(compute(np.array([[1.0], [2.0]]), name)).all()
        assert np.isnan(compute(np.empty((2, 0)), name)).all()


def test_pearson_of_extreme_numbers() -> None:
    shape = np.array([1.0, 2.0, 4.0])
    for scale in (1e-300, 1e300, 4e307):
        assert agreement(shape * scale, shape[::-1], "pearson") == pytest.approx(np.corrcoef(shape, shape[::-1])[0, 1])
    wide = np.array([-1.7e308, 0.0, 1.7e308])  # their difference is no number
    assert agreement(wide, np.array([1.0, 2.0, 3.0]), "pearson", rank_by="signed") == pytest.approx(1)
    nearly = np.array([1.0, 1.0, np.nextafter(1.0, 2.0)])
    assert agreement(nearly, np.array([0.0, 0.0, 1.0]), "pearson") == pytest.approx(1)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).integers(-4, 5, size=(4, 23)).astype(float)
    whole = {name: agreement_matrix(scores, name, 5) for name in MEASURES}
    monkeypatch.setattr(rankings, "_BLOCK", 4 * 23 * 5)
    for name, found in whole.items():
        assert agreement_matrix(scores, name, 5) == pytest.approx(found, abs=1e-12)


vectors = st.integers(2, 9).flatmap(
    lambda n: st.tuples(
        *[st.lists(st.integers(-6, 6), min_size=n, max_size=n).filter(lambda row: len({abs(x) for x in row}) > 1)] * 2,
        st.permutations(range(n)),
    )
)


@settings(max_examples=60, deadline=None)
@given(vectors, st.sampled_from(list(MEASURES)), st.integers(1, 10), st.sampled_from(["abs", "signed"]))
def test_symmetry_range_and_order_of_the_units(
    rows: tuple[list[int], list[int], list[int]], name: str, k: int, rank_by: str
) -> None:
    a, b, order = (np.array(row, dtype=float) for row in rows)
    shuffled = order.astype(int)
    found = agreement(a, b, name, k, rank_by)
    assert found == agreement(b, a, name, k, rank_by)
    assert MEASURES[name].low <= found <= 1
    assert agreement(a[shuffled], b[shuffled], name, k, rank_by) == pytest.approx(found, abs=1e-12)
    at_random = chance(a, b, name, k, rank_by)
    assert MEASURES[name].low <= at_random <= 1
    assert chance(a[shuffled], b, name, k, rank_by) == pytest.approx(at_random, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(vectors, st.sampled_from(OF_ORDER), st.integers(1, 10))
def test_monotone_transforms(rows: tuple[list[int], list[int], list[int]], name: str, k: int) -> None:
    a, b = (np.array(row, dtype=float) for row in rows[:2])
    by_size = agreement(np.sign(a) * np.expm1(np.abs(a)), b, name, k)
    assert by_size == pytest.approx(agreement(a, b, name, k), abs=1e-12)
    by_value = agreement(a**3, b, name, k, "signed")
    assert by_value == pytest.approx(agreement(a, b, name, k, "signed"), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=9, unique=True), st.integers(1, 10), st.integers(0, 99))
def test_a_vector_agrees_with_itself(sizes: list[int], k: int, seed: int) -> None:
    a = np.array(sizes, dtype=float) * np.random.default_rng(seed).choice([-1, 1], len(sizes))
    for name in MEASURES:
        for rank_by in ("abs", "signed"):
            assert agreement(a, a, name, k, rank_by) == pytest.approx(1)
    repeated = np.repeat(a, 2)  # ties
    for name in CORRELATIONS:
        assert agreement(repeated, repeated, name) == pytest.approx(1)


def test_refusals() -> None:
    a, b = np.array([1.0, 2.0]), np.array([2.0, 1.0])
    for compute in (agreement, chance):
        with pytest.raises(InputError, match="expected one of kendall"):
            compute(a, b, "tau")
        with pytest.raises(InputError, match="from 1 on"):
            compute(a, b, "feature", 0)
        with pytest.raises(InputError, match="from 1 on"):
            compute(a, b, "feature", 1.5)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="rank_by='size'"):
            compute(a, b, "feature", 1, "size")
        with pytest.raises(InputError, match=r"shapes \(2,\) and \(3,\)"):
            compute(a, np.ones(3))
    with pytest.raises(InputError, match=r"expected \(method, unit\)"):
        agreement_matrix(a)
