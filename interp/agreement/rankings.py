"""Agreement of two explanations of one prediction: nine measures, and what each is worth by chance.

1. Two score vectors over the same n units are ranked, highest first: by |score| (`rank_by="abs"`) or by the score itself
   ("signed"). A sign is always the raw score's: −1, 0 or +1; 0 matches only 0.
2. Equal scores leave the order open. Kendall's τ-b and Spearman's ρ (midranks) correct for that as usual. Every other
   measure of ranks is its *expected value when each vector breaks its ties at random, independently of the other*, in
   closed form: a tied group that fills the ranks f+1 … f+m holds each of them with probability 1/m, so a unit of it is
   among the top k with probability min(max((k − f)/m, 0), 1). No result depends on the order of the tokens, and what a
   vector leaves open agrees with nothing beyond chance, not even with itself.
3. The measures. A and B are the two top-k sets; k above n counts as n.

| name | value | range | by chance |
|---|---|---|---|
| kendall | τ-b: (concordant − discordant) / √(pairs untied in a · pairs untied in b) (Kendall 1945) | −1 … 1 | 0 |
| spearman | correlation of midranks; Krishna's rank correlation | −1 … 1 | 0 |
| pearson | correlation of the numbers that are ranked | −1 … 1 | 0 |
| pairwise | pairs of units in the same order, of all pairs; a pair tied in a or b counts ½ | 0 … 1 | ½ |
| feature | units of A ∩ B, of k | 0 … 1 | k/n |
| rank | units of A ∩ B with the same rank, of k | 0 … 1 | 1/n |
| sign | units of A ∩ B with the same sign, of k | 0 … 1 | Σ_s A_s B_s / (n k) |
| signed_rank | units of A ∩ B with the same rank and sign, of k | 0 … 1 | Σ_r Σ_s A_rs B_rs / (n k) |
| topk_kendall | 1 − 2 K / K_max | −1 … 1 | 1 − 2 E[K] / K_max |

   pairwise to signed_rank: Krishna et al., "The Disagreement Problem" (2202.01602), section 3.
4. K is Fagin, Kumar & Sivakumar's distance K^(p) of top-k lists ("Comparing top k lists", 2003) at the neutral p = ½. It
   goes over the pairs of units of A ∪ B: 1 for a pair in opposite orders, where a unit in a list is above one outside it;
   p for a pair that one list holds and the other lacks, so that it says nothing of their order. The largest K that n units
   allow normalises it: K_max = k (3k − 1)/2 − k max(0, 2k − n), for lists that share as little as they can, the shared
   units last and reversed. 1: the same lists; −1: as far apart as can be; at k = n it is Kendall's τ-a.
5. By chance: the mean when b's scores, with their signs, are dealt to the units at random. In the table A_s is the expected
   number of A's units with sign s, A_rs the probability that the unit at rank r has sign s. With v = C(n, 2) pairs,
   u = C(k, 2) + k (n − k) of them ordered by a list: E[K] = u²/(2v) + C(k, 2) C(n − k, 2)/v, ties or not.
6. NaN, for the caller to count: fewer than two units, a score that is not finite, or nothing to rank because all scores (or
   all |scores|) are equal. Only equal numbers are ties: round first what differs by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import comb

import numpy as np
from scipy.stats import rankdata

from interp.agreement.explanation_table import RANK_BY
from interp.errors import InputError

# Numbers in one block of pairs of units.
_BLOCK = 4_000_000


@dataclass(frozen=True)
class Orders:
    """Rankings with ties, one per row, none of them constant.

    Attributes:
        keys: (ranking, unit) what is ranked, the highest first.
        signs: (ranking, unit) −1, 0 or 1 of the raw score.
        first: (ranking, unit) how many units are above the unit's tied group.
        size: (ranking, unit) how many units the tied group has, itself included.
    """

    keys: np.ndarray
    signs: np.ndarray
    first: np.ndarray
    size: np.ndarray

    def inside(self, k: int) -> np.ndarray:
        """(ranking, unit) probability to be among the top k."""
        return np.clip((k - self.first) / self.size, 0, 1)


@dataclass(frozen=True)
class Measure:
    """A measure of agreement.

    Attributes:
        at_k: whether it looks at the top k only; otherwise k is not used.
        low: its smallest value; the largest is 1.
        compare: (orders, k) → (ranking, ranking) agreement.
        expect: (orders, k) → (ranking, ranking) agreement by chance, or one number.
    """

    at_k: bool
    low: float
    compare: Callable[[Orders, int], np.ndarray]
    expect: Callable[[Orders, int], np.ndarray | float]


def agreement(a: np.ndarray, b: np.ndarray, measure: str = "kendall", k: int = 1, rank_by: str = "abs") -> float:
    """Agreement of two explanations of one prediction.

    Args:
        a: (unit) scores, signs included.
        b: (unit) scores of the same units.
        measure: a name in `MEASURES`; the module docstring says what each is.
        k: how many top units the measures at k look at; above n it counts as n.
        rank_by: "abs" or "signed".

    Returns:
        The agreement; NaN as the module docstring says.

    Raises:
        InputError: two shapes, an unknown measure or `rank_by`, k below 1.

    Example:
        >>> agreement(np.array([0.5, -0.3, 0.2, 0.0]), np.array([0.4, 0.3, 0.1, 0.2]), "sign", k=2)
        0.5
    """
    return float(agreement_matrix(_pair(a, b), measure, k, rank_by)[0, 1])


def chance(a: np.ndarray, b: np.ndarray, measure: str = "kendall", k: int = 1, rank_by: str = "abs") -> float:
    """The mean agreement when b's scores are dealt to the units at random: exact, nothing is drawn.

    Args, Returns and Raises as `agreement`.

    Example:
        >>> chance(np.array([0.5, -0.3, 0.2, 0.0]), np.array([0.4, 0.3, 0.1, 0.2]), "sign", k=2)
        0.25
    """
    return float(chance_matrix(_pair(a, b), measure, k, rank_by)[0, 1])


def agreement_matrix(scores: np.ndarray, measure: str = "kendall", k: int = 1, rank_by: str = "abs") -> np.ndarray:
    """Agreement of every two explanations of one prediction.

    Args:
        scores: (method, unit) scores, signs included.
        measure, k, rank_by: as `agreement`.

    Returns:
        (method, method), symmetric. Row and column of a method that ranks nothing are NaN.

    Raises:
        InputError: `scores` is no matrix; as `agreement`.

    Example:
        >>> agreement_matrix(np.array([[3.0, 2.0, 1.0], [2.0, 3.0, 1.0], [1.0, 1.0, 1.0]]), "pairwise").round(2)
        array([[1.  , 0.67,  nan],
               [0.67, 1.  ,  nan],
               [ nan,  nan,  nan]])
    """
    check_measure(measure, k, rank_by)
    found = _filled(scores, MEASURES[measure].compare, k, rank_by)
    return np.clip(found, MEASURES[measure].low, 1.0)  # sums of shares round


def chance_matrix(scores: np.ndarray, measure: str = "kendall", k: int = 1, rank_by: str = "abs") -> np.ndarray:
    """What `agreement_matrix` is on average when one of the two methods' scores are dealt to the units at random.

    Args, Returns and Raises as `agreement_matrix`.

    Example:
        >>> chance_matrix(np.array([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]), "feature", k=2)[0, 1]
        np.float64(0.5)
    """
    check_measure(measure, k, rank_by)
    return _filled(scores, MEASURES[measure].expect, k, rank_by)


def check_measure(measure: str, k: int = 1, rank_by: str = "abs") -> None:
    """Refuses what is no measure, no k or no way to rank.

    Raises:
        InputError: it says which.
    """
    if measure not in MEASURES:
        raise InputError(f"measure={measure!r}; expected one of {', '.join(MEASURES)}")
    if MEASURES[measure].at_k and (isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1):
        raise InputError(f"k={k!r}; {measure} looks at the top k units: expected a whole number from 1 on")
    if rank_by not in RANK_BY:
        raise InputError(f"rank_by={rank_by!r}; expected one of {', '.join(RANK_BY)}")


def ranked(scores: np.ndarray, rank_by: str = "abs") -> np.ndarray:
    """(method) whether the method ranks the units at all: two or more, all scores finite, not all of them equal.

    Args:
        scores: (method, unit) scores, signs included.
        rank_by: "abs" or "signed".
    """
    keys = np.abs(scores) if rank_by == "abs" else np.asarray(scores)
    return np.isfinite(keys).all(1) & (keys != keys[:, :1]).any(1)


def _pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise InputError(f"scores of shapes {a.shape} and {b.shape}; expected two vectors over the same units")
    return np.stack([a, b])


def _filled(
    scores: np.ndarray, compute: Callable[[Orders, int], np.ndarray | float], k: int, rank_by: str
) -> np.ndarray:
    """(method, method): what `compute` says of the methods that rank something, NaN elsewhere."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2:
        raise InputError(f"scores of shape {scores.shape}; expected (method, unit)")
    filled = np.full((len(scores), len(scores)), np.nan)
    usable = np.flatnonzero(ranked(scores, rank_by))
    if usable.size:
        chosen = scores[usable]
        keys = np.abs(chosen) if rank_by == "abs" else chosen
        first = rankdata(-keys, method="min", axis=1) - 1
        size = rankdata(-keys, method="max", axis=1) - first
        orders = Orders(keys, np.sign(chosen), first, size)
        filled[np.ix_(usable, usable)] = compute(orders, min(int(k), scores.shape[1]))
    return filled


def _correlation(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(1, keepdims=True)
    centred /= np.abs(centred).max(1, keepdims=True)  # squares of tiny numbers would vanish
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    return centred @ centred.T


def _pearson(orders: Orders, k: int) -> np.ndarray:
    exponent = np.frexp(np.abs(orders.keys).max(1, keepdims=True))[1]
    scaled = np.ldexp(orders.keys, -exponent)  # sums of huge numbers would overflow
    return _correlation(
        scaled - scaled.min(1, keepdims=True)
    )  # the mean of nearly equal numbers would round to one of them


def _spearman(orders: Orders, k: int) -> np.ndarray:
    return _correlation(orders.first + (orders.size + 1) / 2)


def _order_counts(orders: Orders) -> np.ndarray:
    """(ranking, ranking) concordant − discordant ordered pairs of units; the diagonal counts the untied ones."""
    counts = np.zeros((len(orders.first),) * 2)
    for block in _blocks(orders):
        order = np.sign(orders.first[:, None, :] - orders.first[:, block, None]).reshape(len(counts), -1)
        counts += order @ order.T  # whole numbers, exact in any order
    return counts


def _kendall(orders: Orders, k: int) -> np.ndarray:
    counts = _order_counts(orders)
    untied = counts.diagonal()
    return counts / np.sqrt(untied[:, None] * untied)


def _pairwise(orders: Orders, k: int) -> np.ndarray:
    n = orders.first.shape[1]
    return (1 + _order_counts(orders) / (n * (n - 1))) / 2


def _feature(orders: Orders, k: int) -> np.ndarray:
    inside = orders.inside(k)
    return inside @ inside.T / k


def _sign(orders: Orders, k: int) -> np.ndarray:
    each = [orders.inside(k) * (orders.signs == sign) for sign in (-1, 0, 1)]
    return sum((inside @ inside.T for inside in each), start=np.zeros(1)) / k


def _same_rank(orders: Orders, k: int) -> np.ndarray:
    """(ranking, ranking, unit) probability of the same rank up to k: ranks that both tied groups fill / (size · size)."""
    first, size = orders.first, orders.size
    last = np.minimum(first + size, k)
    shared = np.minimum(last[:, None], last) - np.maximum(first[:, None], first)
    return np.maximum(shared, 0) / (size[:, None] * size)


def _rank(orders: Orders, k: int) -> np.ndarray:
    return _same_rank(orders, k).sum(2) / k


def _signed_rank(orders: Orders, k: int) -> np.ndarray:
    return (_same_rank(orders, k) * (orders.signs[:, None] == orders.signs)).sum(2) / k


def _topk_kendall(orders: Orders, k: int) -> np.ndarray:
    """Step 4 in expectation. Of an ordered pair (i, j) a ranking has the probabilities
    above: i is in the list, and j behind it or outside; both: both are in the list; none: neither is.
    K = Σ above · above′ transposed, over ordered pairs, + ½ Σ (both · none′ + none · both′), over unordered pairs."""
    methods, n = orders.first.shape
    inside, size = orders.inside(k), orders.size
    slots = np.clip(k - orders.first, 0, size)  # (ranking, unit) how many of the unit's tied group enter the list
    pairs = np.maximum(size * (size - 1), 1)
    tied_both = slots * (slots - 1) / pairs
    tied_none = (size - slots) * (size - slots - 1) / pairs
    opposite, silent = np.zeros((methods, methods)), np.zeros((methods, methods))
    for block in _blocks(orders):
        here = np.arange(n)[block]
        mine, theirs = inside[:, block, None], inside[:, None, :]
        later = orders.first[:, None, :] - orders.first[:, block, None]  # above 0: i's group is above j's
        half = (1 - tied_none[:, block, None]) / 2
        above = np.where(later > 0, mine, np.where(later == 0, half, 0.0))
        below = np.where(later < 0, theirs, np.where(later == 0, half, 0.0))
        both = np.where(later == 0, tied_both[:, block, None], np.minimum(mine, theirs))
        none = np.where(later == 0, tied_none[:, block, None], 1 - np.maximum(mine, theirs))
        for table in (above, below, both, none):
            table[:, np.arange(len(here)), here] = 0.0
        opposite += above.reshape(methods, -1) @ below.reshape(methods, -1).T
        silent += both.reshape(methods, -1) @ none.reshape(methods, -1).T
    distance = (opposite + opposite.T) / 2 + (silent + silent.T) / 4
    return 1 - 2 * distance / _largest_distance(n, k)


def _largest_distance(n: int, k: int) -> float:
    return k * (3 * k - 1) / 2 - k * max(0, 2 * k - n)


def _blocks(orders: Orders) -> Iterator[slice]:
    """Slices of the units, so that (ranking, slice, unit) stays small."""
    methods, n = orders.first.shape
    step = max(1, _BLOCK // (methods * n))
    return (slice(start, start + step) for start in range(0, n, step))


def _chance_sign(orders: Orders, k: int) -> np.ndarray:
    held = np.stack([(orders.inside(k) * (orders.signs == sign)).sum(1) for sign in (-1, 0, 1)], axis=1)
    return held @ held.T / (k * orders.first.shape[1])


def _chance_signed_rank(orders: Orders, k: int) -> np.ndarray:
    held = []  # per rank and sign: (ranking) probability that the unit there has it
    for rank in range(k):
        there = orders.inside(rank + 1) - orders.inside(rank)
        held += [(there * (orders.signs == sign)).sum(1) for sign in (-1, 0, 1)]
    table = np.stack(held, axis=1)
    return table @ table.T / (k * orders.first.shape[1])


def _chance_topk_kendall(orders: Orders, k: int) -> float:
    n = orders.first.shape[1]
    ordered = comb(k, 2) + k * (n - k)
    distance = (ordered**2 / 2 + comb(k, 2) * comb(n - k, 2)) / comb(n, 2)
    return 1 - 2 * distance / _largest_distance(n, k)


MEASURES: dict[str, Measure] = {
    "kendall": Measure(False, -1.0, _kendall, lambda orders, k: 0.0),
    "spearman": Measure(False, -1.0, _spearman, lambda orders, k: 0.0),
    "pearson": Measure(False, -1.0, _pearson, lambda orders, k: 0.0),
    "pairwise": Measure(False, 0.0, _pairwise, lambda orders, k: 0.5),
    "feature": Measure(True, 0.0, _feature, lambda orders, k: k / orders.first.shape[1]),
    "rank": Measure(True, 0.0, _rank, lambda orders, k: 1 / orders.first.shape[1]),
    "sign": Measure(True, 0.0, _sign, _chance_sign),
    "signed_rank": Measure(True, 0.0, _signed_rank, _chance_signed_rank),
    "topk_kendall": Measure(True, -1.0, _topk_kendall, _chance_topk_kendall),
}
