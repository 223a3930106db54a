"""Intervals and tests over texts: bootstrap means, differences between domains, false discoveries.

1. The unit is the text: tokens of one text are not independent, so texts are resampled, all heads together.
2. `bootstrap_mean`: percentile interval of the mean (Efron & Tibshirani 1993, chapter 13). Resamples are counts of texts,
   so that one matrix product gives every head's resampled means.
3. `permutation_test`: difference of two domains' means against exchanged labels, two-sided; every assignment where there
   are few, else random ones with (1 + hits) / (1 + draws) (Phipson & Smyth 2010). `paired_permutation_test`: the same for texts
   seen under two conditions, whose labels are exchanged within the text: the sign of its difference.
4. `false_discovery`: Benjamini & Hochberg's q over all that was tested; and for what passes, intervals at the level
   1 − α R / m, whose expected share that misses is at most α among the R selected of m (Benjamini & Yekutieli 2005).
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np

from interp.errors import InputError

# Numbers in one block of resampled means; larger runs go block by block.
_BLOCK = 20_000_000


def bootstrap_mean(
    values: np.ndarray, n_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of the mean over texts.

    Args:
        values: (text, …) one number per text, for any number of heads at once.
        n_resamples: how often texts are drawn with replacement.
        level: of the interval.
        seed: of the draws; the same draws serve every trailing index.

    Returns:
        (low, high), each of the trailing shape; NaN where there are fewer than two texts or a value is missing.

    Raises:
        InputError: the level is outside (0, 1).

    Example:
        >>> low, high = bootstrap_mean(np.array([1.0, 2.0, 3.0, 4.0]))
        >>> bool(low < 2.5 < high)
        True
    """
    means = resampled_means(values, n_resamples, seed)
    return _quantiles(means, level)


def bootstrap_difference(
    first: np.ndarray, second: np.ndarray, n_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of mean(first) − mean(second); each domain's texts are drawn by themselves.

    Args and Returns as `bootstrap_mean`.
    """
    difference = resampled_means(first, n_resamples, seed) - resampled_means(second, n_resamples, seed + 1)
    return _quantiles(difference, level)


def bootstrap_mean_clustered(
    values: np.ndarray, clusters: np.ndarray, n_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of the mean where values of one cluster depend on each other: clusters are drawn, not values.

    Args:
        values: (value, …) one number each, for any number of columns at once.
        clusters: (value) which belong together, such as the task of each answer.
        n_resamples, level, seed: as in `bootstrap_mean`.

    Returns:
        (low, high), each of the trailing shape; NaN where there are fewer than two clusters or a value is missing.

    Raises:
        InputError: the lengths differ, or the level is outside (0, 1).

    Example:
        >>> low, high = bootstrap_mean_clustered([0, 0, 1, 1], ["a", "a", "b", "b"])
        >>> float(low), float(high)
        (0.0, 1.0)
    """
    values, clusters = np.asarray(values, dtype=np.float64), np.asarray(clusters)
    if len(values) != len(clusters):
        raise InputError(f"{len(values)} values and {len(clusters)} clusters; expected a cluster for every value")
    names, at = np.unique(clusters.astype(str), return_inverse=True)
    n = len(names)
    if n < 2:
        missing = np.full(values.shape[1:], np.nan)
        return missing, missing
    flat = values.reshape(len(values), -1)
    sums = np.zeros((n, flat.shape[1]))
    np.add.at(sums, at, flat)
    sizes = np.bincount(at, minlength=n).astype(float)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    means = ((counts @ sums) / (counts @ sizes)[:, None]).reshape(n_resamples, *values.shape[1:])
    return _quantiles(means, level)


def resampled_means(values: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    """(resample, …) means of texts drawn with replacement; NaN where there are fewer than two texts."""
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n < 2:
        return np.full((n_resamples, *values.shape[1:]), np.nan)
    flat = values.reshape(n, -1)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    return ((counts / n) @ flat).reshape(n_resamples, *values.shape[1:])


def permutation_test(first: np.ndarray, second: np.ndarray, n_permutations: int = 9999, seed: int = 0) -> np.ndarray:
    """Two-sided p-value of mean(first) − mean(second) under exchanged labels.

    Args:
        first, second: (text, …), the same trailing shape.
        n_permutations: random assignments; where fewer assignments exist, each is used once.
        seed: of the assignments; the same serve every trailing index.

    Returns:
        p of the trailing shape. NaN where both domains have one text, since no assignment differs, or a value is missing.

    Example:
        >>> float(permutation_test(np.array([1.0, 1.1, 1.2]), np.array([0.0, 0.1, 0.2])))
        0.1
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape[1:] != second.shape[1:] or not len(first) or not len(second):
        raise InputError(
            f"two domains of shapes {first.shape} and {second.shape}; expected the same heads and some texts"
        )
    n, size = len(first) + len(second), len(first)
    pooled = np.concatenate([first, second]).reshape(n, -1)
    if n < 3:
        return np.full(first.shape[1:], np.nan)
    total = pooled.sum(0)
    observed = np.abs(first.mean(0) - second.mean(0)).ravel()
    # Rounding must not make the observed assignment miss itself.
    bound = observed * (1 - 1e-9) - 1e-15
    exact = math.comb(n, size) <= n_permutations
    hits, done = np.zeros(pooled.shape[1]), 0
    for chosen in _assignments(n, size, n_permutations, exact, seed, pooled.shape[1]):
        sums = chosen @ pooled  # (assignment, head)
        hits += (np.abs(sums / size - (total - sums) / (n - size)) >= bound).sum(0)
        done += len(chosen)
    p = hits / done if exact else (1 + hits) / (1 + done)
    return np.where(np.isnan(observed), np.nan, p).reshape(first.shape[1:])


def paired_permutation_test(differences: np.ndarray, n_permutations: int = 9999, seed: int = 0) -> np.ndarray:
    """Two-sided p-value of the mean difference between two conditions of the same texts, under exchanged labels within a text.

    Args:
        differences: (text, …) first condition minus second; 0 counts as a text whose labels do not matter.
        n_permutations: random assignments of signs; where fewer assignments exist (2 to the number of texts), each is used once.
        seed: of the assignments; the same serve every trailing index.

    Returns:
        p of the trailing shape. NaN where a value is missing, or there are fewer than two texts: with one, no assignment differs.

    Raises:
        InputError: no text.

    Example:
        >>> float(paired_permutation_test(np.array([1.0, 2.0, 3.0])))
        0.25
    """
    differences = np.asarray(differences, dtype=np.float64)
    if differences.ndim < 1 or not len(differences):
        raise InputError(f"differences of shape {differences.shape}; expected some texts along the first axis")
    n = len(differences)
    if n < 2:
        return np.full(differences.shape[1:], np.nan)
    flat = differences.reshape(n, -1)
    observed = np.abs(flat.sum(0))
    # Rounding must not make the observed assignment miss itself.
    bound = observed - 1e-9 * np.abs(flat).sum(0)
    exact = 2**n <= n_permutations
    hits, done = np.zeros(flat.shape[1]), 0
    for signs in _signs(n, n_permutations, exact, seed, flat.shape[1]):
        hits += (np.abs(signs @ flat) >= bound).sum(0)
        done += len(signs)
    p = hits / done if exact else (1 + hits) / (1 + done)
    return np.where(np.isnan(observed), np.nan, p).reshape(differences.shape[1:])


def _signs(n: int, draws: int, exact: bool, seed: int, width: int) -> Any:
    """Blocks of (assignment, text) rows of −1 and 1."""
    step = max(1, _BLOCK // max(n, width))
    total = 2**n if exact else draws
    random = np.random.default_rng(seed)
    for start in range(0, total, step):
        size = min(step, total - start)
        if exact:
            bits = (np.arange(start, start + size)[:, None] >> np.arange(n)) & 1
        else:
            bits = random.integers(0, 2, size=(size, n), dtype=np.int8)
        yield bits * 2.0 - 1.0


def _assignments(n: int, size: int, draws: int, exact: bool, seed: int, width: int) -> Any:
    """Blocks of (assignment, text) 0/1 rows with `size` ones."""
    step = max(1, _BLOCK // max(n, width))
    if exact:
        every = list(combinations(range(n), size))
        for start in range(0, len(every), step):
            block = np.zeros((len(every[start : start + step]), n))
            np.put_along_axis(block, np.array(every[start : start + step]), 1.0, axis=1)
            yield block
        return
    random = np.random.default_rng(seed)
    for start in range(0, draws, step):
        block = np.zeros((min(step, draws - start), n))
        block[:, :size] = 1.0
        yield random.permuted(block, axis=1)


def false_discovery(p: np.ndarray, alpha: float = 0.05) -> tuple[np.ndarray, float]:
    """Benjamini–Hochberg q-values, and the level at which intervals of what passes keep their promise.

    Args:
        p: p-values of everything that was tested; NaN is not counted as a test.
        alpha: share of false discoveries that is accepted.

    Returns:
        (q, level): q of p's shape; level 1 − α R / m for the R of m with q ≤ α, and 1 − α / m where none passes.
    """
    from scipy.stats import false_discovery_control

    p = np.asarray(p, dtype=np.float64)
    q, known = np.full(p.shape, np.nan), ~np.isnan(p)
    if not known.any():
        return q, 1 - alpha
    q[known] = false_discovery_control(p[known])
    return q, 1 - alpha * max(1, int((q[known] <= alpha).sum())) / int(known.sum())


def _quantiles(means: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    if not 0 < level < 1:
        raise InputError(f"level={level}; expected a number between 0 and 1, such as 0.95")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.asarray(low), np.asarray(high)
