"""What patching brought back: recovery per layer and head, its agreement with attention drift, and the paper's middle layers.

1. Recovery is the change by the patch as a share of the gap between both prompts, a ratio of means over pairs:

       recovery = Σ (logdiff_patched − logdiff_conflict) / Σ (logdiff_consistent − logdiff_conflict)

   A mean of ratios would be ruled by pairs without a gap.
2. The unit is the task: pairs of one task are summed, tasks are resampled (bootstrap), and their signs are flipped (test).
3. Drift says where attention changes, patching where this matters. `agreement_with_drift` compares the two rankings; `thirds`
   tests the claim that what matters sits in the middle layers (Wan et al., arXiv 2509.23188).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from interp.errors import InputError
from interp.intervals import false_discovery, paired_permutation_test, resampled_means
from interp.results import Result

THIRDS = ("first", "middle", "last")
_FLIPS = 9999


def recovery(
    result: Result,
    by: Sequence[str] = ("site", "layer", "head"),
    *,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """How much of the gap each patch brings back.

    Args:
        result: what `patch` gave.
        by: columns of it; one row for each combination of their values.
        n_resamples, level, seed: of the bootstrap over tasks.

    Returns:
        The columns `by`, then change and change_low, change_high (nats per token, mean over pairs), gap (likewise, unpatched),
        recovery (share of the gap), low, high, p (change against flipped signs of tasks, two-sided), q (p under
        Benjamini–Hochberg over all rows here), n (pairs), n_tasks. Recovery is missing where the gap is not positive, and its
        interval where more resamples than the interval leaves out have no positive gap: then the prompts do not differ enough to
        speak of a share.

    Raises:
        InputError: another kind of result, or no such column.
    """
    frame = _changes(result)
    unknown = [name for name in by if name not in frame.columns]
    if unknown or not by:
        raise InputError(f"by={list(by)!r}; expected columns of the result, such as 'site', 'layer', 'head', 'family'")
    rows = []
    for key, some in frame.groupby(list(by), observed=True, sort=False):
        tasks = some.groupby("task", sort=True)
        change, gap = tasks["change"].sum().to_numpy(), tasks["gap"].sum().to_numpy()
        mean, *ends = ratio_interval(change, tasks.size().to_numpy(), n_resamples, level, seed)
        share, low, high = ratio_interval(change, gap, n_resamples, level, seed)
        numbers = {"change": mean, "change_low": ends[0], "change_high": ends[1], "gap": some["gap"].mean()}
        numbers |= {
            "recovery": share,
            "low": low,
            "high": high,
            "p": float(paired_permutation_test(change, seed=seed)),
            "q": math.nan,
        }
        rows.append(dict(zip(by, key, strict=True)) | numbers | {"n": len(some), "n_tasks": len(change)})
    table = pd.DataFrame(rows)
    return table.assign(q=false_discovery(table["p"].to_numpy())[0])


def restoring_layers(result: Result, n: int | None = None, *, site: str = "attn_out") -> list[int]:
    """The layers whose patch brings back the most, in order: a causal choice beside `focal_layers`.

    Args:
        result: what `patch` gave.
        n: how many; by default a fifth of those that were patched, at least 1.
        site: of the patches; one that is local, as `thirds` says.

    Raises:
        InputError: another kind of result, a site that was not patched, more layers than were patched.
    """
    changes = _of_site(result, site).groupby("layer")["change"].sum()
    n = max(1, round(len(changes) / 5)) if n is None else n
    if not 1 <= n <= len(changes):
        raise InputError(f"n={n}; expected 1 … {len(changes)}, as many as were patched")
    return sorted(int(layer) for layer in changes.sort_values(ascending=False, kind="stable").index[:n])


def agreement_with_drift(
    result: Result,
    scores: pd.DataFrame,
    *,
    site: str | None = None,
    measure: str = "excess",
    top: int | None = None,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Whether the layers (or heads) whose attention drifts are those that patching finds.

    Args:
        result: what `patch` gave.
        scores: drift by layer, or by layer and head, one row each: columns layer, head for heads, and `measure`; what
            `layer_scores` or `head_scores` of `interp.conflict` give.
        site: of the patches; by default "head" for scores of heads, else "attn_out".
        measure: the column of `scores`.
        top: size of both top sets; by default a tenth of heads and a quarter of layers, at least 1.
        n_resamples, level, seed: of the bootstrap over tasks, and of the permutations.

    Returns:
        Two rows. what="rank correlation": Spearman's correlation of drift and change by patching, its interval over the tasks
        that were patched (drift as given) and p under permuted layers, two-sided; neighbouring layers are alike, so that this p
        is too small where both change slowly with depth. what="shared top": how many of the `top` of
        both are the same; expected by chance, and p that chance shares as many or more (hypergeometric). Columns: what, value,
        expected, low, high, p, top, n (layers or heads).

    Raises:
        InputError: another kind of result, columns that are missing, or two rows of one layer; fewer than 3 in common.
    """
    from scipy.stats import hypergeom, rankdata

    by_head = "head" in scores.columns
    site = site or ("head" if by_head else "attn_out")
    keys = ["layer", "head"] if by_head else ["layer"]
    missing = [name for name in (*keys, measure) if name not in scores.columns]
    if missing:
        raise InputError(f"scores have no column {missing[0]!r}; give what layer_scores or head_scores gave")
    if scores.duplicated(keys).any():
        raise InputError("scores have two rows of one layer or head; choose the rows of one contrast and one family")
    changes = _of_site(result, site)
    if not by_head and (changes["head"] >= 0).any():
        raise InputError(
            f"site={site!r} is patched by head, and scores are of layers; give site='attn_out' or scores of heads"
        )
    by_task = changes.pivot_table(index="task", columns=keys, values="change", aggfunc="sum")
    drift = scores.set_index(keys)[measure].astype(float).dropna()
    both = [key for key in by_task.columns if key in drift.index]
    if len(both) < 3:
        raise InputError(f"{len(both)} layers or heads are both scored and patched; expected at least 3")
    values, drifts = by_task[both].to_numpy(), drift.loc[both].to_numpy()  # (task, place), (place)
    top = max(1, round(len(both) / (10 if by_head else 4))) if top is None else top
    if not 1 <= top <= len(both):
        raise InputError(f"top={top}; expected 1 … {len(both)}")
    ranks = rankdata(drifts)
    total = values.sum(0)
    found = _correlation(ranks, rankdata(total)[None])[0]
    resampled = resampled_means(values, n_resamples, seed)
    low, high = _quantiles(
        _correlation(ranks, rankdata(resampled, axis=1)) if len(values) > 1 else resampled[:, 0], level
    )
    shuffled = np.random.default_rng(seed).permuted(np.tile(rankdata(total), (_FLIPS, 1)), axis=1)
    p = (1 + (np.abs(_correlation(ranks, shuffled)) >= abs(found) - 1e-12).sum()) / (1 + _FLIPS)
    shared = len(set(np.argsort(-drifts, kind="stable")[:top]) & set(np.argsort(-total, kind="stable")[:top]))
    chance = float(hypergeom.sf(shared - 1, len(both), top, top))
    rows = [
        {"what": "rank correlation", "value": found, "expected": 0.0, "low": low, "high": high, "p": p},
        {
            "what": "shared top",
            "value": shared,
            "expected": top**2 / len(both),
            "low": np.nan,
            "high": np.nan,
            "p": chance,
        },
    ]
    return pd.DataFrame(rows).assign(top=top, n=len(both))


def thirds(
    result: Result,
    n_layers: int | None = None,
    *,
    site: str = "attn_out",
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Recovery in the first, middle and last third of the layers, and whether the middle has more than the rest.

    Args:
        result: what `patch` gave, all layers.
        n_layers: of the model; by default one more than the highest that was patched.
        site: of the patches; "attn_out" and "head" are local, "resid_post" gathers all below.
        n_resamples, level, seed: of the bootstrap over tasks.

    Returns:
        what ("first", "middle", "last", "middle − others"), layers (first…last), mean, low, high (recovery per patch: share of
        the gap), p (of the difference: flipped signs of tasks, two-sided), n_tasks.

    Raises:
        InputError: another kind of result, a site that was not patched, or fewer than 3 layers.
    """
    changes = _of_site(result, site)
    n_layers = int(changes["layer"].max()) + 1 if n_layers is None else n_layers
    if n_layers < 3 or n_layers <= int(changes["layer"].max()):
        raise InputError(f"n_layers={n_layers}; expected at least 3, and more than the highest layer that was patched")
    which = changes["layer"].to_numpy() * 3 // n_layers
    parts = {name: _per_task(changes[which == at]) for at, name in enumerate(THIRDS)}
    rest = _per_task(changes[which != 1])
    gap = changes.drop_duplicates("pair").groupby("task", sort=True)["gap"].sum()
    edges = [-(-at * n_layers // 3) for at in range(4)]
    spans = {name: f"{edges[at]}…{edges[at + 1] - 1}" for at, name in enumerate(THIRDS)}
    rows = []
    for name, values in {**parts, "middle − others": parts["middle"].sub(rest)}.items():
        change = values.reindex(gap.index).to_numpy(dtype=float)
        mean, low, high = ratio_interval(change, gap.to_numpy(), n_resamples, level, seed)
        p = float(paired_permutation_test(change, seed=seed)) if name not in THIRDS else np.nan
        row = {"what": name, "layers": spans.get(name, spans["middle"]), "mean": mean, "low": low, "high": high, "p": p}
        rows.append(row | {"n_tasks": len(gap)})
    return pd.DataFrame(rows)


def ratio_interval(
    change: np.ndarray, gap: np.ndarray, n_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Σ change / Σ gap over tasks, with its bootstrap interval.

    Args:
        change, gap: (task) sums; with numbers of pairs as `gap` the ratio is a mean over pairs.
        n_resamples, level, seed: of the bootstrap.

    Returns:
        (ratio, low, high); missing where the gap is not positive, as `recovery` says.

    Example:
        >>> ratio_interval(np.array([1.0, 2.0]), np.array([2.0, 4.0]))
        (0.5, 0.5, 0.5)
    """
    change, gap = np.asarray(change, dtype=np.float64), np.asarray(gap, dtype=np.float64)
    changes, gaps = resampled_means(change, n_resamples, seed), resampled_means(gap, n_resamples, seed)
    low = high = math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        if len(gap) > 1 and (gaps <= 0).mean() <= (1 - level) / 2:
            low, high = _quantiles((changes / gaps)[gaps > 0], level)
    return (float(change.sum() / gap.sum()) if gap.sum() > 0 else math.nan), low, high


def _changes(result: Result) -> pd.DataFrame:
    if result.kind != "conflict.patch":
        raise InputError(f"a result of kind {result.kind!r}; expected 'conflict.patch'")
    frame = result.frame
    return frame.assign(
        change=frame["logdiff_patched"] - frame["logdiff_conflict"],
        gap=frame["logdiff_consistent"] - frame["logdiff_conflict"],
    )


def _of_site(result: Result, site: str) -> pd.DataFrame:
    frame = _changes(result)
    found = frame[frame["site"] == site]
    if found.empty:
        raise InputError(f"site {site!r} was not patched; the result has {', '.join(frame['site'].unique())}")
    return found


def _per_task(changes: pd.DataFrame) -> pd.Series:
    """Per task the sum over pairs of the mean over layers and heads."""
    return changes.groupby(["task", "pair"], sort=True)["change"].mean().groupby("task").sum()


def _quantiles(values: np.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise InputError(f"level={level}; expected a number between 0 and 1, such as 0.95")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _correlation(ranks: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(row) Pearson correlation of one ranking with each row of rankings; NaN where one is constant."""
    ours, theirs = ranks - ranks.mean(), rows - rows.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (theirs @ ours) / np.sqrt((ours @ ours) * (theirs**2).sum(1))
