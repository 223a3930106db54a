"""Does the choice of focal heads and layers hold up: over splits of the tasks, over families, against the claim of the middle?

1. `stability`: tasks are cut into random halves; each half makes its own scale and its own choice. Overlap is Jaccard's,
   beside what two random sets of these sizes have: Σ_i P(i) · i / (a + b − i), i hypergeometric. Families likewise: the
   choice without one family against the choice of all, and against that family's own.
2. `middle_layers`: Wan et al. (arXiv 2509.23188) claim that the heads concentrate in middle layers. The share of focal
   heads in each third of the layers is set against as many heads drawn at random (hypergeometric, one-sided), with an
   interval over tasks. Heads of one layer are not independent, which that null leaves out: read p with the interval.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from interp.conflict.drift import MEASURES, combine, pooled_direction, ranges
from interp.conflict.focal import Drifts, check_choice, check_rule, choose_layers, drifts, top_heads
from interp.errors import InputError
from interp.results import Result

_THIRDS = ("first", "middle", "last")
_BLOCK = 20_000_000  # numbers in one block of resampled means


def stability(
    result: Result,
    *,
    n_splits: int = 200,
    score: str = "excess",
    share: float = 0.1,
    rule: str = "half",
    seed: int = 0,
) -> pd.DataFrame:
    """How far the focal heads and layers of different pairs agree.

    Args:
        result: what `localize` gave, of at least two tasks.
        n_splits: random halves of the tasks.
        score: "excess", "score", or "score_pooled".
        share: of heads that are focal.
        rule: of focal layers, "half" or "sigma".
        seed: of the splits.

    Returns:
        One row per comparison: kind ("halves"; "without family": all but it against all; "family": all but it against it
        alone), name (number of the split, or the family), n_first, n_second (pairs), heads (Jaccard overlap of the focal
        heads), heads_chance, layers, layers_chance, rank_correlation (Spearman's over all heads). Families only where there
        are two. Overlap of two empty sets of layers (rule "sigma") is missing.

    Raises:
        InputError: see `drifts`; fewer than two tasks, unknown score or rule, impossible share, fewer than one split.
    """
    from scipy.stats import spearmanr

    found = drifts(result)
    check_choice(score, share)
    check_rule(rule)
    names, task = np.unique(found.tasks, return_inverse=True)
    if len(names) < 2 or n_splits < 1:
        raise InputError(f"{n_splits} splits of {len(names)} tasks; expected at least one split of at least two tasks")
    random = np.random.default_rng(seed)
    compared: list[tuple[str, str, np.ndarray, np.ndarray]] = []
    for split in range(n_splits):
        half = np.isin(task, random.permutation(len(names))[: len(names) // 2])
        compared.append(("halves", str(split), half, ~half))
    families = np.unique(found.families)
    for name in families if len(families) > 1 else []:
        alone = found.families == name
        compared.append(("without family", str(name), ~alone, np.ones(len(alone), dtype=bool)))
        compared.append(("family", str(name), ~alone, alone))
    # Each set of pairs once, as weights of the pairs.
    weights = np.array([which / which.sum() for *_, first, second in compared for which in (first, second)])
    chosen = [_choice(values, share, rule) for values in _scores(found, weights, score)]
    rows = []
    for (kind, name, first, second), one, other in zip(compared, chosen[::2], chosen[1::2], strict=True):
        row: dict[str, Any] = {"kind": kind, "name": name, "n_first": int(first.sum()), "n_second": int(second.sum())}
        for what, mine, theirs in (("heads", one[1], other[1]), ("layers", one[2], other[2])):
            union = int((mine | theirs).sum())
            row[what] = int((mine & theirs).sum()) / union if union else np.nan
            row[f"{what}_chance"] = chance_overlap(mine.size, int(mine.sum()), int(theirs.sum()))
        rows.append(row | {"rank_correlation": _or_missing(spearmanr, one[0].ravel(), other[0].ravel())})
    return pd.DataFrame(rows)


def middle_layers(
    result: Result,
    *,
    score: str = "excess",
    share: float = 0.1,
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Where in the model the focal heads are: the claim that they concentrate in the middle.

    Args:
        result: what `localize` gave.
        score: "excess", "score", or "score_pooled".
        share: of heads that are focal.
        n_resamples, level, seed: of the bootstrap over tasks, where each resample chooses its own heads.

    Returns:
        One row per third of the layers ("first", "middle", "last"): layers (how many), n_focal_heads, share (of the focal
        heads), low, high (missing for a single task), expected (the third's share of all heads), p (as many or more in this
        third, were they drawn at random).

    Raises:
        InputError: see `drifts`; an unknown score or impossible share.
    """
    from scipy.stats import hypergeom

    found = drifts(result)
    check_choice(score, share)
    n_layers, n_heads = found.values.shape[2:4]
    third = np.arange(n_layers) * 3 // n_layers
    names, task = np.unique(found.tasks, return_inverse=True)
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_resamples)
    weights = np.vstack([np.ones(len(task)), counts[:, task]])  # the first row is the sample itself
    weights = weights / weights.sum(1, keepdims=True)
    shares = np.empty((len(weights), 3))
    for at, values in enumerate(_scores(found, weights, score)):
        per_layer = top_heads(values, share).sum(1)
        shares[at] = [per_layer[third == number].sum() / per_layer.sum() for number in range(3)]
    ends = np.quantile(shares[1:], [(1 - level) / 2, (1 + level) / 2], axis=0)
    if len(names) < 2:
        ends = np.full((2, 3), np.nan)
    n_focal = max(1, round(share * n_layers * n_heads))
    rows = []
    for number, name in enumerate(_THIRDS):
        layers = int((third == number).sum())
        inside = round(shares[0, number] * n_focal)
        p = hypergeom.sf(inside - 1, n_layers * n_heads, layers * n_heads, n_focal)
        row = {"third": name, "layers": layers, "n_focal_heads": inside, "share": shares[0, number]}
        rows.append(
            row | {"low": ends[0, number], "high": ends[1, number], "expected": layers / n_layers, "p": float(p)}
        )
    return pd.DataFrame(rows)


def chance_overlap(total: int, first: int, second: int) -> float:
    """Expected Jaccard overlap of two random sets of these sizes.

    Example:
        >>> chance_overlap(2, 1, 1)
        0.5
    """
    from scipy.stats import hypergeom

    if first + second == 0:
        return float("nan")
    shared = np.arange(min(first, second) + 1)
    return float((hypergeom.pmf(shared, total, first, second) * shared / (first + second - shared)).sum())


def _scores(found: Drifts, weights: np.ndarray, score: str) -> Iterator[np.ndarray]:
    """(layer, head) scores of weighted pairs, each set of weights on the scale of its own conflict contrast."""
    flat = found.values.reshape(len(found.values), -1)
    step = max(1, _BLOCK // flat.shape[1])
    at = MEASURES.index("dir")
    for start in range(0, len(weights), step):
        some = weights[start : start + step]
        means = (some @ flat).reshape(-1, *found.values.shape[1:])
        if score == "score_pooled":
            means[:, 0, ..., at] = pooled_direction(found.values[:, 0, ..., at], found.norms[0], found.norms[1], some)
        low, width = ranges(means[:, 0])
        scored = combine(means, low[:, None], width[:, None])  # (set, contrast, layer, head)
        yield from scored[:, 0] - scored[:, 1] if score == "excess" else scored[:, 0]


def _choice(values: np.ndarray, share: float, rule: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scores, focal heads, focal layers)."""
    focal, means = top_heads(values, share), values.mean(1)
    return values, focal, choose_layers(focal, means, rule)


def _or_missing(correlate: Any, first: np.ndarray, second: np.ndarray) -> float:
    """A correlation, or missing where either side is constant."""
    return float(correlate(first, second).statistic) if np.ptp(first) > 0 and np.ptp(second) > 0 else float("nan")
