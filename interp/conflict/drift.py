"""Attention drift: how far a head's attention moved between two prompts, in three measures and one score.

For the attention n of a head in the consistent prompt and c in the other, over spans or over keys:

    magnitude      ‖n − c‖₁
    direction      1 − cos(n, c)
    distribution   KL(n‖c) + KL(c‖n) = Σ (n − c) (log(n + ε) − log(c + ε)), n and c scaled to sum 1

    S(layer, head) = 0.4 · minmax(magnitude) + 0.3 · minmax(direction) + 0.3 · minmax(distribution)

of means over pairs, min–max over all heads. Formulas and weights: FocalLoRA's public code, of the group of Wan et al.
(arXiv 2509.23188), whose released code has none of its own. There ε = 1e-12, and the direction is one cosine of all pairs'
rows strung together (`pooled_direction`), so that pairs with concentrated attention weigh more; ours is the mean over
pairs, which makes the score linear in the pairs and gives every pair one vote. With spans ε is 1e-6: what a span that only
one of the prompts has adds to the distribution is bounded by its mass times log(1e6), and a span that neither has adds
nothing to any measure.

Rows that are empty in both prompts (a sliding window that sees none of the first keys) have not moved: all three measures
are 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

MEASURES = ("mag", "dir", "dist")
WEIGHTS: Mapping[str, float] = {"mag": 0.4, "dir": 0.3, "dist": 0.3}
ALIGNMENTS = ("spans", "truncate")
# What is added inside the logarithms.
EPSILON: Mapping[str, float] = {"spans": 1e-6, "truncate": 1e-12}
_TINY = 1e-12  # the published guard against division by zero


def drift(
    consistent: Float[np.ndarray, "... key"], compared: Float[np.ndarray, "... key"], epsilon: float = EPSILON["spans"]
) -> dict[str, Float[np.ndarray, " ..."]]:
    """The three measures between two prompts' attention.

    Args:
        consistent, compared: attention on the same spans or keys, not negative.
        epsilon: added inside the logarithms of the distribution.

    Returns:
        {"mag", "dir", "dist"} in attention (0 to 2), 1 − cosine (0 to 1) and nats.

    Example:
        >>> found = drift(np.array([0.5, 0.5, 0.0]), np.array([0.5, 0.0, 0.5]))
        >>> round(float(found["mag"]), 6), round(float(found["dir"]), 6)
        (1.0, 0.5)
    """
    first, second = np.asarray(consistent, np.float64), np.asarray(compared, np.float64)
    return {
        "mag": np.abs(first - second).sum(-1),
        "dir": direction((first * second).sum(-1), _norm(first), _norm(second)),
        "dist": distribution(first, second, epsilon),
    }


def direction(
    product: Float[np.ndarray, " ..."], norm: Float[np.ndarray, " ..."], other: Float[np.ndarray, " ..."]
) -> Float[np.ndarray, " ..."]:
    """1 − cosine from an inner product and the two norms; 0 between two empty rows."""
    cosine = product / (norm * other + _TINY)
    return np.where((norm == 0) & (other == 0), 0.0, np.clip(1 - cosine, 0, 1))


def distribution(
    consistent: Float[np.ndarray, "... key"], compared: Float[np.ndarray, "... key"], epsilon: float
) -> Float[np.ndarray, " ..."]:
    """Symmetric Kullback–Leibler divergence, in nats; no term of the sum is negative."""
    first, second = (row / np.maximum(row.sum(-1, keepdims=True), _TINY) for row in (consistent, compared))
    return ((first - second) * (np.log(first + epsilon) - np.log(second + epsilon))).sum(-1)


def pooled_direction(
    directions: Float[np.ndarray, "pair ..."],
    norms: Float[np.ndarray, "pair ..."],
    others: Float[np.ndarray, "pair ..."],
    weights: Float[np.ndarray, "... pair"] | None = None,
) -> Float[np.ndarray, " ..."]:
    """The published direction: 1 − cosine of all pairs' rows strung together.

    Args:
        directions: each pair's 1 − cosine.
        norms, others: Euclidean norms of its two rows.
        weights: how often each pair counts, (pair,) or one row for each of several sets of pairs; once each by default.

    Returns:
        (…), or (set, …) for several sets.

    Example:
        >>> round(float(pooled_direction(np.array([0.0, 1.0]), np.array([3.0, 3.0]), np.array([3.0, 3.0]))), 6)
        0.5
    """
    directions, norms, others = (np.asarray(values, np.float64) for values in (directions, norms, others))
    weights = np.ones(len(norms)) if weights is None else weights
    product, *squares = (
        np.tensordot(weights, values, 1) for values in ((1 - directions) * norms * others, norms**2, others**2)
    )
    return direction(product, *np.sqrt(squares))


def ranges(
    means: Float[np.ndarray, "... layer head measure"],
) -> tuple[Float[np.ndarray, "... 1 1 measure"], Float[np.ndarray, "... 1 1 measure"]]:
    """(lowest, width) of each measure over all heads; width 1 where all heads are equal, as published."""
    low = means.min((-3, -2), keepdims=True)
    width = means.max((-3, -2), keepdims=True) - low
    return low, np.where(width > 0, width, 1.0)


def combine(
    values: Float[np.ndarray, "... layer head measure"],
    low: Float[np.ndarray, "... 1 1 measure"],
    width: Float[np.ndarray, "... 1 1 measure"],
) -> Float[np.ndarray, "... layer head"]:
    """The weighted sum of the measures, in the order of `MEASURES`, on the scale that `ranges` gave.

    With the ranges of the values themselves this is S, from 0 to 1; it is linear, so that the mean of pairs' scores on one
    scale is the score of their mean.
    """
    return ((values - low) / width) @ np.array([WEIGHTS[name] for name in MEASURES])


def _norm(row: np.ndarray) -> np.ndarray:
    return np.sqrt((row**2).sum(-1))
