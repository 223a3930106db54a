"""What Neely et al. conclude on attention and attribution rankings, beside what `analyses.attribution_agreement` measured.

"Weak" is a Kendall's τ of at most .3: their largest of attention with an attribution is .268, of two unrelated attributions .286.
Reviews are the unit of every interval (bootstrap, 95 %). Where a claim is about many pairs, it holds if the interval of each
is on its side, fails if one is surely on the other (at a level for so many looks), and is open otherwise.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from analyses.agreement_runs import ATTENTION, BASELINES, GRADIENT, PERTURBATION
from interp.intervals import bootstrap_mean
from interp.report.claims import Claim

NEELY = "Neely et al. 2022, arXiv 2205.04559"
OURS = "ours"
WEAK = 0.3
DATA = ("IMDb", "SST-2", "MNLI", "Quora", "SNLI")
# Mean Kendall's τ on DistilBERT, 500 instances × 3 seeds: Neely et al., Table 1.
PUBLISHED: dict[tuple[str, str], tuple[float | None, ...]] = {
    ("rollout", "lime"): (0.126, 0.136, 0.268, 0.162, 0.143),
    ("rollout", "integrated_gradients"): (0.182, 0.051, 0.189, 0.057, 0.165),
    ("rollout", "deeplift"): (0.252, 0.133, 0.243, 0.227, 0.221),
    ("rollout", "gradient_shap"): (0.143, 0.074, 0.191, 0.052, 0.160),
    ("lime", "integrated_gradients"): (0.105, 0.286, 0.179, 0.141, 0.153),
    ("lime", "deeplift"): (0.070, 0.062, 0.153, 0.003, 0.093),
    ("lime", "gradient_shap"): (0.093, 0.241, 0.159, 0.114, 0.110),
    ("integrated_gradients", "deeplift"): (0.143, 0.050, 0.215, 0.063, 0.096),
    ("integrated_gradients", "gradient_shap"): (0.550, 0.499, 0.478, 0.467, 0.393),
    ("deeplift", "deepshap"): (0.483, 0.451, 0.499, 0.595, 0.555),
    ("flow", "lime"): (None, 0.180, None, None, None),
    ("flow", "integrated_gradients"): (None, 0.069, None, None, None),
    ("flow", "deeplift"): (None, 0.129, None, None, None),
    ("flow", "gradient_shap"): (None, 0.081, None, None, None),
    ("flow", "deepshap"): (None, 0.120, None, None, None),
}
SIBLINGS = (("integrated_gradients", "gradient_shap"), ("deeplift", "deepshap"))
UNRELATED = (
    ("lime", "integrated_gradients"),
    ("lime", "deeplift"),
    ("lime", "gradient_shap"),
    ("integrated_gradients", "deeplift"),
)
# DeepSHAP with one baseline is DeepLIFT: it enters no mean.
ATTRIBUTIONS = (*PERTURBATION, "shapley", *(name for name in GRADIENT if name != "deepshap"))
# Of methods that estimate the same, one: agreement with near-duplicates says nothing about a ranking.
ESTIMATES = ("kernel_shap", "shapley_sampling", "deepshap")
RELEVANT = 0.5  # Spearman's ρ from which agreement would be of use as a sign of faithfulness


def agreement_claims(pairs: pd.DataFrame, who: str) -> list[Claim]:
    """What the paper says on agreement itself.

    Args:
        pairs: example, method_a, method_b, value (Kendall's τ); see `analyses.agreement_runs.pooled`.
        who: the model, for the wording.
    """
    table = wide(pairs)
    methods = {name for pair in table.columns for name in pair}
    across = [(a, b) for a in ATTENTION for b in ATTRIBUTIONS if a in methods and b in methods]
    claims = [
        _weak(
            table,
            across,
            f"attention agrees weakly with every attribution (τ ≤ {WEAK}): {who}",
            "rollout .051 … .268, flow .069 … .180",
        ),
        _weak(
            table,
            [pair for pair in UNRELATED if set(pair) <= methods],
            f"attributions that are no siblings hardly agree (LIME, IG, DeepLIFT, GradSHAP; τ ≤ {WEAK}): {who}",
            ".003 … .286",
        ),
    ]
    for first, second in SIBLINGS:
        low, high = _range(PUBLISHED[first, second])
        values = _values(table, (first, second))
        claims.append(
            Claim(
                f"siblings of one implementation agree ({first}, {second}: τ > {WEAK}): {who}",
                NEELY,
                f"{_figure(low)} … {_figure(high)}",
                _mean_sd(values)
                + (f", the same by construction: one baseline; n = {_n(values)}" if first == "deeplift" else ""),
                _interval(values),
                None if first == "deeplift" else _n(values),
                None if first == "deeplift" else _above(values, WEAK),  # with one baseline both are the same
            )
        )
    strongest = max(
        (pair for pair in UNRELATED if set(pair) <= methods), key=lambda pair: np.nanmean(_values(table, pair))
    )
    difference = _values(table, SIBLINGS[0]) - _values(table, strongest)
    claims.append(
        Claim(
            f"only siblings agree: IG and GradSHAP more than any unrelated two that the paper compares: {who}",
            NEELY,
            ".21 … .37 more",
            f"{np.nanmean(difference):+.2f} than {' and '.join(strongest)}; interval: the difference",
            _interval(difference),
            _n(difference),
            _above(difference, 0),
        )
    )
    group = [
        name for name in ("leave_one_out", "lime", "kernel_shap", "shapley_sampling", "shapley") if name in methods
    ]
    least = min(
        ((a, b) for at, a in enumerate(group) for b in group[at + 1 :]),
        key=lambda pair: np.nanmean(_values(table, pair)),
    )
    values = _values(table, least)
    claims.append(
        Claim(
            f"perturbation methods agree among themselves (LOO, LIME, KernelSHAP, Shapley: every τ > {WEAK}): {who}",
            OURS,
            None,
            f"the least: {' and '.join(least)} {_mean_sd(values)}",
            _interval(values),
            _n(values),
            _above(values, WEAK),
        )
    )
    return claims


def faithfulness_claims(pairs: pd.DataFrame, faithful: pd.DataFrame, who: str) -> list[Claim]:
    """Whether agreement says which ranking is faithful, and whether attention is.

    Args:
        pairs: as in `agreement_claims`.
        faithful: example, method, measure, value; see `analyses.agreement_runs.pooled`.
        who: the model.
    """
    table = wide(pairs)
    scores = faithful[faithful["measure"] == "normalised_comprehensiveness"]
    scores = scores.pivot(index="example", columns="method", values="value").dropna(how="all")
    methods = [name for name in scores.columns if name not in (*BASELINES, *ESTIMATES)]
    claims = [
        _predicts(
            table.loc[scores.index], scores, methods, f"agreement with the others does not predict faithfulness: {who}"
        ),
        _predicts(
            table.loc[scores.index],
            scores,
            [name for name in methods if name not in ATTENTION],
            f"nor among attributions alone: {who}",
        ),
    ]
    attention = scores[[name for name in ATTENTION if name in scores]]
    attributions = scores[[name for name in ATTRIBUTIONS if name in scores]]
    difference = (attributions.mean(axis=1) - attention.mean(axis=1)).to_numpy()
    claims.append(
        Claim(
            f"attributions are more faithful than attention (normalised comprehensiveness, means of the methods): {who}",
            OURS,
            None,
            f"{np.nanmean(attributions):.2f} and {np.nanmean(attention):.2f}; interval: the difference",
            _interval(difference),
            _n(difference),
            _above(difference, 0),
        )
    )
    chooses = np.arange(len(scores)) % 2 == 0
    best = attention[chooses].mean().idxmax()
    confirmed = scores[~chooses]
    for other, words in (("random", "a random ranking"), ("recency", "position (the later the higher)")):
        difference = (confirmed[best] - confirmed[other]).to_numpy()
        claims.append(
            Claim(
                f"the most faithful attention method is more faithful than {words}: {who}",
                OURS,
                None,
                f"{best} {confirmed[best].mean():.2f}, {other} {confirmed[other].mean():.2f}, on the reviews that did not choose "
                "it; interval: the difference",
                _interval(difference),
                _n(difference),
                _above(difference, 0),
            )
        )
    return claims


def special_claim(with_special: pd.DataFrame, without: pd.DataFrame, who: str) -> Claim:
    """Whether special tokens, which the paper ranks too, make attention agree more.

    Args:
        with_special, without: pairs as in `agreement_claims`, special tokens ranked and not.
        who: the model.
    """
    tables = [wide(pairs) for pairs in (with_special, without)]
    across = [(a, b) for a in ATTENTION for b in ATTRIBUTIONS if _has(tables[0], (a, b)) and _has(tables[1], (a, b))]
    means = [np.nanmean([_values(table, pair) for pair in across], axis=0) for table in tables]
    difference = means[0] - means[1]
    return Claim(
        f"ranking the special tokens too makes attention and attributions agree more (mean over all pairs): {who}",
        OURS,
        None,
        f"τ {np.nanmean(means[0]):.2f} with, {np.nanmean(means[1]):.2f} without; interval: the difference",
        _interval(difference),
        _n(difference),
        _above(difference, 0),
    )


def wide(pairs: pd.DataFrame) -> pd.DataFrame:
    """(example) × (method_a, method_b)."""
    return pairs.pivot(index="example", columns=["method_a", "method_b"], values="value")


def _weak(table: pd.DataFrame, pairs: Sequence[tuple[str, str]], claim: str, paper: str) -> Claim:
    """Whether every pair is surely at or below the bound, one surely above it, or neither."""
    means = {pair: float(np.nanmean(_values(table, pair))) for pair in pairs}
    strongest = max(means, key=lambda pair: means[pair])
    values = _values(table, strongest)
    interval = _interval(values)
    level = 1 - 0.05 / len(pairs)  # so many looks
    ends = [_interval(_values(table, pair), level) for pair in pairs]
    above = [pair for pair, end in zip(pairs, ends, strict=True) if end is not None and end[0] > WEAK]
    below = [pair for pair, end in zip(pairs, ends, strict=True) if end is not None and end[1] <= WEAK]
    return Claim(
        claim,
        NEELY,
        paper,
        f"{_figure(min(means.values()))} … {_figure(means[strongest])}, strongest {' and '.join(strongest)} (interval); "
        f"of {len(pairs)} pairs {len(above)} surely above, {len(below)} surely not",
        interval,
        _n(values),
        False if above else True if len(below) == len(pairs) else None,
    )


def _predicts(table: pd.DataFrame, scores: pd.DataFrame, methods: Sequence[str], claim: str) -> Claim:
    """Spearman's correlation over methods of mean agreement with the others and faithfulness; reviews and methods resampled.

    Holds if a relevant correlation is ruled out, fails if it is surely above 0, and is open otherwise.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant ranking agrees with none on its review
        agreed = np.stack(
            [
                np.nanmean([_values(table, (name, other)) for other in methods if other != name], axis=0)
                for name in methods
            ]
        )  # (method, example)
    faithful = scores[list(methods)].to_numpy().T
    rng = np.random.default_rng(0)
    n_methods, n_reviews = agreed.shape
    found = []
    for _ in range(2000 if n_reviews > 1 else 0):
        draw = np.ix_(rng.integers(0, n_methods, n_methods), rng.integers(0, n_reviews, n_reviews))
        found.append(_rank_correlation(agreed[draw], faithful[draw]))
    whole = _rank_correlation(agreed, faithful)
    known = [value for value in found if math.isfinite(value)]  # of few methods a draw may hold too few different ones
    ends = tuple(float(end) for end in np.quantile(known, [0.025, 0.975])) if len(known) > 1000 else None
    return Claim(
        claim,
        NEELY,
        "said, no figure",
        f"Spearman over {len(methods)} methods {whole:.2f}" if math.isfinite(whole) else None,
        ends,  # type: ignore[arg-type]
        n_reviews,
        None if ends is None else False if ends[0] > 0 else True if ends[1] < RELEVANT else None,
    )


def _rank_correlation(agreed: np.ndarray, faithful: np.ndarray) -> float:
    first, second = np.nanmean(agreed, axis=1), np.nanmean(faithful, axis=1)
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(spearmanr(first, second).statistic)


def _has(table: pd.DataFrame, pair: tuple[str, str]) -> bool:
    return pair in table.columns or pair[::-1] in table.columns


def _values(table: pd.DataFrame, pair: tuple[str, str]) -> np.ndarray:
    """A pair's values by example, whichever of both comes first in the table."""
    return table[pair if pair in table.columns else pair[::-1]].to_numpy(float)


def _interval(values: Any, level: float = 0.95) -> tuple[float, float] | None:
    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    if len(known) < 2:
        return None
    low, high = bootstrap_mean(known, level=level)
    return float(low), float(high)


def _above(values: Any, bound: float) -> bool | None:
    ends = _interval(values)
    return None if ends is None else ends[0] > bound


def _n(values: Any) -> int:
    return int(np.isfinite(values).sum())


def _mean_sd(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return f"{_figure(known.mean())} ± {known.std(ddof=1) if len(known) > 1 else math.nan:.2f}" if len(known) else "–"


def _figure(value: float) -> str:
    text = f"{value:.2f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def _range(values: Sequence[float | None]) -> tuple[float, float]:
    known = [value for value in values if value is not None]
    return min(known), max(known)
