"""Do judges agree? Weighted kappa and Kendall's tau between their scores of the same answers.

1. Two judges are compared on the answers that both graded, dimension by dimension, and on CRAS over the dimensions
   that both know.
2. Cohen's kappa with quadratic weights, of scores rounded to 1 … 5: agreement beyond chance, and a miss counts by its
   square (scikit-learn's `cohen_kappa_score`). Undefined (missing) where both judges give everything one score.
3. Kendall's tau-b, of scores as they are: do they put answers in the same order, ties allowed for (scipy's
   `kendalltau`). Undefined where one judge gives everything one score.
4. Percentile intervals by bootstrap over tasks, since answers to one task resemble each other. For the resamples
   both measures are matrix products of how often each answer was drawn. Draws in which a measure is undefined are
   left out, and counted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from interp.conflict.cras_summaries import answers, check_weights
from interp.conflict.rubrics import DIMENSIONS, LEVELS
from interp.errors import InputError
from interp.results import Result

KEYS = ["query", "turn"]


def compare_judges(
    results: Sequence[Result],
    *,
    weights: Mapping[str, float] | None = None,
    out_of_range: str = "refuse",
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Agreement of every two judges.

    Args:
        results: two or more of kind "conflict.score", of different judges and the same answers; answers that only one
            of two judges graded are left out.
        weights: of CRAS, see `interp.conflict.cras`; a quarter each by default.
        out_of_range: "refuse" a judge that answered out of range, or "drop" the answers concerned.
        n_resamples, level, seed: of the bootstrap.

    Returns:
        first, second (judges), what ("cras" or a dimension), n (answers that both scored), kappa, kappa_low,
        kappa_high, tau, tau_low, tau_high, undefined (share of draws in which one of the two is undefined). Missing
        where nothing can be said.

    Raises:
        InputError: fewer than two results, the same judge twice, no answer in common, or other answers under the same
            ids.
    """
    lambdas = check_weights(weights)
    tables: dict[str, pd.DataFrame] = {}
    for result in results:
        table, _ = answers(result, weights=lambdas, out_of_range=out_of_range)
        name = str(result.frame["judge"].iloc[0])
        if name in tables:
            raise InputError(f"two results of judge {name!r}; expected different judges (give one of them a label)")
        tables[name] = table
    if len(tables) < 2:
        raise InputError(f"results of {len(tables)} judges; expected at least two to compare")
    rows = []
    for (first, ours), (second, theirs) in combinations(tables.items(), 2):
        both = ours.merge(theirs, on=KEYS, suffixes=("_a", "_b"))
        if not len(both):
            raise InputError(
                f"judges {first!r} and {second!r} have no answer in common; let them grade the same queries"
            )
        other = both[both["digest_a"] != both["digest_b"]]
        if len(other):
            raise InputError(
                f"judges {first!r} and {second!r} graded different answers under the same id "
                f"{other['query'].iloc[0]!r}; let them grade the same queries"
            )
        pairs = {name: (both[f"{name}_a"].to_numpy(), both[f"{name}_b"].to_numpy()) for name in DIMENSIONS}
        pairs = {"cras": _common_cras(pairs, lambdas), **pairs}
        for what, (a, b) in pairs.items():
            known = ~(np.isnan(a) | np.isnan(b))
            task = both["task_a"].astype(str).to_numpy()[known]
            rows.append(
                {"first": first, "second": second, "what": what, "n": int(known.sum())}
                | _measures(a[known], b[known], task, n_resamples, level, seed)
            )
    return pd.DataFrame(rows)


def weighted_kappa(first: np.ndarray, second: np.ndarray) -> float:
    """Cohen's kappa with quadratic weights, of scores rounded to 1 … 5 (halves to the even number).

    NaN where it is undefined: no answers, or one score for everything from both.

    Example:
        >>> weighted_kappa(np.array([1, 5, 3]), np.array([1, 5, 3]))
        1.0
    """
    from sklearn.metrics import cohen_kappa_score

    a, b = _rounded(first), _rounded(second)
    if len(a) == 0 or len({*a, *b}) == 1:
        return math.nan
    return float(cohen_kappa_score(a, b, labels=list(LEVELS), weights="quadratic"))


def kendall_tau(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's tau-b; NaN where one of the two is constant."""
    from scipy.stats import kendalltau

    if len(first) < 2 or len(np.unique(first)) == 1 or len(np.unique(second)) == 1:
        return math.nan
    return float(kendalltau(first, second).statistic)


def _common_cras(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], lambdas: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    """CRAS of each judge over the dimensions that both know of an answer."""
    a, b = (np.stack([pairs[name][side] for name in DIMENSIONS], axis=1) for side in (0, 1))  # (answer, dimension)
    shares = np.array([lambdas[name] for name in DIMENSIONS]) * ~(np.isnan(a) | np.isnan(b))
    with np.errstate(invalid="ignore", divide="ignore"):
        first, second = ((shares * np.nan_to_num(side)).sum(1) / shares.sum(1) for side in (a, b))
    return first, second


def _measures(
    a: np.ndarray, b: np.ndarray, tasks: np.ndarray, n_resamples: int, level: float, seed: int
) -> dict[str, float]:
    if not 0 < level < 1:
        raise InputError(f"level={level}; expected a number between 0 and 1, such as 0.95")
    names, task = np.unique(tasks, return_inverse=True)
    draws = {"kappa": np.full(n_resamples, np.nan), "tau": np.full(n_resamples, np.nan)}
    if len(names) > 1:
        counts = np.random.default_rng(seed).multinomial(
            len(names), np.full(len(names), 1 / len(names)), size=n_resamples
        )
        times = counts[:, task].astype(np.float64)  # (resample, answer): how often it was drawn
        draws = {"kappa": resampled_kappas(a, b, times), "tau": resampled_taus(a, b, times)}
    found: dict[str, float] = {}
    for name, value in (("kappa", weighted_kappa(a, b)), ("tau", kendall_tau(a, b))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # all draws undefined: NaN says so
            low, high = np.nanquantile(draws[name], [(1 - level) / 2, (1 + level) / 2])
        found |= {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}
    return found | {"undefined": float((np.isnan(draws["kappa"]) | np.isnan(draws["tau"])).mean())}


def resampled_kappas(a: np.ndarray, b: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(resample,) weighted kappas of answers drawn `times` (resample, answer) often."""
    levels = np.array(LEVELS)
    ours = (_rounded(a)[:, None] == levels).astype(np.float64)  # (answer, level)
    theirs = (_rounded(b)[:, None] == levels).astype(np.float64)
    miss = (levels[:, None] - levels) ** 2.0
    observed = times @ (ours @ miss * theirs).sum(1)
    expected = ((times @ ours) @ miss * (times @ theirs)).sum(1) / times.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 0, 1 - observed / expected, np.nan)


def resampled_taus(a: np.ndarray, b: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(resample,) Kendall tau-b of answers drawn `times` (resample, answer) often."""
    ours, theirs = (np.sign(side[:, None] - side) for side in (a, b))  # (answer, answer)
    agree, untied, untied_too = (
        ((times @ matrix) * times).sum(1) for matrix in (ours * theirs, np.abs(ours), np.abs(theirs))
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((untied > 0) & (untied_too > 0), agree / np.sqrt(untied * untied_too), np.nan)


def _rounded(scores: np.ndarray) -> np.ndarray:
    return np.rint(np.asarray(scores, dtype=np.float64)).astype(int)
