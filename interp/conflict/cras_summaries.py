"""CRAS from scores: one number per answer, means over groups with intervals.

CRAS = Σ_d λ_d s_d over an answer's dimensions, mean over a query's turns, then over queries. The bootstrap draws
tasks, because answers to one task resemble each other.

A score that the judge cannot give is missing: the other weights are scaled up to a sum of 1, and `n_missing` says how
often. A judge with a score out of range is not averaged, unless the answers concerned are dropped by request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from interp.conflict.rubrics import DIMENSIONS
from interp.errors import InputError
from interp.intervals import bootstrap_mean_clustered
from interp.results import Result

# Columns of a table of scores that say what was answered, and by which it can be grouped.
FACTS = ("family", "system_rule", "user_rule", "prompt", "setting", "wording", "model")


def cras_summary(
    result: Result,
    by: Sequence[str] = ("prompt",),
    *,
    weights: Mapping[str, float] | None = None,
    out_of_range: str = "refuse",
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """CRAS and the mean of each dimension, with bootstrap intervals over tasks.

    Args:
        result: what `cras` gave.
        by: columns to group by, of family, system_rule, user_rule, prompt, setting, wording, model; () for all together.
        weights: as for `cras`; by default those of the result.
        out_of_range: "refuse" to average a judge that answered out of range, or "drop" the answers concerned.
        n_resamples, level, seed: of the bootstrap.

    Returns:
        The columns of `by`, then judge, what ("cras" or a dimension), mean, low, high (1…5), mean01, low01, high01
        (on [0, 1]), n (queries), n_tasks, n_missing (queries without that score; of CRAS, those with a dimension missing,
        whose other weights are scaled up), n_dropped (answers out of range). One task has no interval.

    Raises:
        InputError: another kind of result, an unknown column, weights that are none, or a judge that answered out of
            range.
    """
    table, dropped = answers(result, weights=weights, out_of_range=out_of_range)
    by = list(by)
    unknown = [name for name in by if name not in FACTS]
    if unknown:
        raise InputError(f"by={unknown[0]!r}; expected some of {', '.join(FACTS)}")
    rows = []
    judge = str(result.frame["judge"].iloc[0])
    everything = pd.concat([table.assign(lost=False), dropped.assign(lost=True)], ignore_index=True)
    groups = everything.groupby(by, observed=True, sort=False) if by else [((), everything)]
    for key, both in groups:
        names = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        group, n_dropped = both[~both["lost"]], int(both["lost"].sum())
        task = group.groupby("query", sort=False)["task"].first()
        by_query = group.groupby("query", sort=False)[["cras", *DIMENSIONS]].mean()
        partial = group.groupby("query", sort=False)["partial"].any()
        for what in ("cras", *DIMENSIONS):
            known = by_query[what].notna()
            values, tasks = by_query[what][known].to_numpy(), task[known].astype(str).to_numpy()
            mean, low, high = math.nan, math.nan, math.nan
            if len(values):
                mean = float(values.mean())
                low, high = map(float, bootstrap_mean_clustered(values, tasks, n_resamples, level, seed))
            on_unit = {f"{name}01": (end - 1) / 4 for name, end in (("mean", mean), ("low", low), ("high", high))}
            missing = int(partial.sum()) if what == "cras" else int(by_query[what].isna().sum())
            row = {**names, "judge": judge, "what": what, "mean": mean, "low": low, "high": high}
            row |= on_unit | {"n": len(values), "n_tasks": len(set(tasks))}
            rows.append(row | {"n_missing": missing, "n_dropped": n_dropped})
    return pd.DataFrame(rows)


def answers(
    result: Result, *, weights: Mapping[str, float] | None = None, out_of_range: str = "refuse"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row per answer: its four scores and CRAS; and the answers that were dropped.

    Returns:
        (kept, dropped): query, turn, judge, digest, task, the facts, one column per dimension (1…5, missing where the judge
        cannot tell), cras, and partial (whether a dimension of positive weight is missing).

    Raises:
        InputError: as `cras_summary`.
    """
    if result.kind != "conflict.score":
        raise InputError(f"a result of kind {result.kind!r}; expected one of 'conflict.score'")
    if out_of_range not in ("refuse", "drop"):
        raise InputError(f"out_of_range={out_of_range!r}; expected 'refuse' or 'drop'")
    lambdas = check_weights(result.provenance.parameters.get("weights") if weights is None else weights)
    frame = result.frame
    bad = frame[~frame["in_range"]]
    if len(bad) and out_of_range == "refuse":
        first = bad.iloc[0]
        what = "no readable score" if math.isnan(first["score"]) else f"{first['score']:g}"
        raise InputError(
            f"judge {first['judge']!r} answered out of range: {len(bad)} of {len(frame)} scores, first {what} on "
            f"{first['dimension']} of query {first['query']!r}. It is not averaged; look at these answers, or give "
            f"out_of_range='drop' to leave them out"
        )
    keys = ["query", "turn"]
    kinds = frame.drop_duplicates(keys)[[*keys, "judge", "digest", "task", *FACTS]]
    wide = frame.pivot(index=keys, columns="dimension", values="score").rename_axis(columns=None)
    table = kinds.merge(wide[list(DIMENSIONS)].reset_index(), on=keys, how="left", validate="one_to_one")
    scores = table[list(DIMENSIONS)].to_numpy(dtype=np.float64)
    shares = np.array([lambdas[name] for name in DIMENSIONS]) * ~np.isnan(scores)  # (answer, dimension)
    total = shares.sum(1)
    with np.errstate(invalid="ignore"):
        table["cras"] = np.where(total > 0, np.nansum(shares * np.nan_to_num(scores), axis=1) / total, np.nan)
    table["partial"] = total < 1 - 1e-9
    lost = table.set_index(keys).index.isin(bad.set_index(keys).index)
    return table[~lost].reset_index(drop=True), table[lost].reset_index(drop=True)


def check_weights(weights: Mapping[str, float] | None) -> dict[str, float]:
    """{dimension: λ}, a quarter each by default.

    Raises:
        InputError: an unknown dimension, a negative weight, or a sum other than 1.
    """
    if weights is None:
        return dict.fromkeys(DIMENSIONS, 1 / len(DIMENSIONS))
    unknown = [name for name in weights if name not in DIMENSIONS]
    if unknown:
        raise InputError(f"weights have {unknown[0]!r}; the dimensions are {', '.join(DIMENSIONS)}")
    given = {name: float(weights.get(name, 0.0)) for name in DIMENSIONS}
    if not all(0 <= value <= 1 for value in given.values()) or abs(sum(given.values()) - 1) > 1e-6:
        raise InputError(
            f"weights {given} of sum {sum(given.values()):g}; expected numbers that are not negative, of sum 1"
        )
    return given
