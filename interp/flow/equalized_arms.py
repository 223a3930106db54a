"""Arms of an equalisation side by side: what each mentions, how fluent it is, whether its flows are equal.

The unit is the prompt: shares, log-likelihoods and flows are taken per prompt first, and intervals resample prompts
(`interp.intervals.bootstrap_mean`); differences between arms are paired by prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp.errors import InputError
from interp.flow.equalization import EQUALIZE_COLUMNS
from interp.intervals import bootstrap_mean
from interp.results import Result

# Outcomes of `by_prompt`, in words.
OUTCOMES = {
    "mentioned": "share of concepts mentioned",
    "all_mentioned": "share of answers that mention all",
    "nll": "mean −log p of the answer (nats)",
    "min_flow": "smallest maximum flow of a concept",
    "evenness": "smallest / mean maximum flow of the concepts",
    "own_min_flow": "smallest flow by the arm's own method",
    "own_evenness": "smallest / mean flow by the arm's own method",
}


def combine(arms: Sequence[Result]) -> Result:
    """Arms of the same prompts in one result.

    Args:
        arms: what `equalize` gave, each arm once.

    Returns:
        A `Result` of kind "flow.equalize"; its parameters are those that all arms share, and "arms" holds the others.

    Raises:
        InputError: no arm, an arm twice, other prompts or concepts, or another model.

    Example:
        >>> combine([equalize(model, prompts, concepts, objective=name) for name in ("none", "min")])   # doctest: +SKIP
    """
    if not arms or any(one.kind != "flow.equalize" for one in arms):
        raise InputError("no arms were given; expected what equalize gave")
    names = [name for one in arms for name in dict.fromkeys(one.frame["arm"].astype(str))]
    if len(set(names)) < len(names):
        raise InputError(f"arms {names}: one of them is there twice; give each once")
    first = arms[0]
    for one in arms[1:]:
        if one.provenance.fingerprint != first.provenance.fingerprint:
            raise InputError(f"arms of two models, {first.provenance.model} and {one.provenance.model}; expected one")
        if _asked(one) != _asked(first):
            raise InputError(
                "the arms answer other prompts, or name other concepts; expected the same ones in the same order"
            )
    frame = pd.concat([one.frame.astype({"arm": str, "stopped": str}) for one in arms], ignore_index=True)
    frame["arm"] = pd.Categorical(frame["arm"], categories=names)
    own = [one.provenance.parameters for one in arms]
    shared = {key: value for key, value in own[0].items() if all(other.get(key) == value for other in own[1:])}
    differing = {
        str(made.get("arm", at)): {key: value for key, value in made.items() if key not in shared}
        for at, made in enumerate(own)
    }
    provenance = dataclasses.replace(
        first.provenance,
        parameters={**shared, "arms": differing},
        wall_time=sum(one.provenance.wall_time for one in arms),
    )
    attachments = {
        key: {arm: value for one in arms for arm, value in one.attachments[key].items()}
        for key in ("position_norms", "trace")
    }
    return Result("flow.equalize", frame, EQUALIZE_COLUMNS, provenance, attachments)


def _asked(result: Result) -> list[tuple[Any, ...]]:
    arm = result.frame["arm"].iloc[0]
    rows = result.frame[result.frame["arm"] == arm]
    return list(rows[["prompt", "prompt_text", "concept", "first_position"]].itertuples(index=False, name=None))


def by_prompt(result: Result) -> pd.DataFrame:
    """One row per arm and prompt.

    Args:
        result: what `equalize` or `combine` gave.

    Returns:
        Indexed by arm and prompt: mentioned (share of the prompt's concepts), all_mentioned (0 or 1), nll (nats), norm,
        steps; min_flow, mean_flow, evenness = min / mean with δ, and the same `_before`; all six by the arm's own
        method, `own_…`.

    Raises:
        InputError: another kind of result.
    """
    if result.kind != "flow.equalize":
        raise InputError(f"a result of kind {result.kind!r}; expected one of 'flow.equalize'")
    groups = result.frame.groupby(["arm", "prompt"], observed=True, sort=False)
    table = groups[["nll", "norm", "steps"]].first()
    table.insert(0, "mentioned", groups["mentioned"].mean())
    table.insert(1, "all_mentioned", groups["mentioned"].all().astype(float))
    for prefix, after, before in (("", "flow_after", "flow_before"), ("own_", "own_after", "own_before")):
        for suffix, column in (("", after), ("_before", before)):
            low, mean = groups[column].min(), groups[column].mean()
            table[f"{prefix}min_flow{suffix}"], table[f"{prefix}mean_flow{suffix}"] = low, mean
            table[f"{prefix}evenness{suffix}"] = low / mean.where(mean > 0)
    return table


def summary(result: Result, *, n_resamples: int = 2000, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """One row per arm, with intervals over prompts.

    Args:
        result: what `equalize` or `combine` gave.
        n_resamples, level, seed: of the bootstrap.

    Returns:
        arm, n (prompts); mentioned, all_mentioned, nll, min_flow and evenness, each with `_low` and `_high`;
        perplexity: exp of the mean nll; means over prompts: min_flow_before, mean_flow, mean_flow_before,
        evenness_before, norm, steps, own_min_flow, own_min_flow_before, own_evenness, own_evenness_before.
    """
    table, rows = by_prompt(result), []
    for arm, group in table.groupby(level="arm", observed=True, sort=False):
        row: dict[str, Any] = {"arm": str(arm), "n": len(group)}
        for name in ("mentioned", "all_mentioned", "nll", "min_flow", "evenness"):
            values = group[name].to_numpy(dtype=float)
            low, high = bootstrap_mean(values, n_resamples, level, seed)
            row |= {name: values.mean(), f"{name}_low": float(low), f"{name}_high": float(high)}
        row["perplexity"] = float(np.exp(row["nll"]))
        plain = ["min_flow_before", "mean_flow", "mean_flow_before", "evenness_before", "norm", "steps"]
        plain += [f"own_{name}{when}" for name in ("min_flow", "evenness") for when in ("", "_before")]
        rows.append(row | {name: float(group[name].mean()) for name in plain})
    return pd.DataFrame(rows)


def difference(
    result: Result,
    arm: str,
    baseline: str,
    outcome: str = "mentioned",
    *,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, float]:
    """Mean over prompts of an arm's outcome minus a baseline's, paired by prompt.

    Args:
        result: what `combine` gave.
        arm, baseline: names of arms. A baseline "before" is the arm's own value before δ, where the outcome has one.
        outcome: a column of `by_prompt`.
        n_resamples, level, seed: of the bootstrap.

    Returns:
        mean, low, high, n; low and high are NaN for a single prompt.

    Raises:
        InputError: an unknown arm or outcome.
    """
    table = by_prompt(result)
    known = list(dict.fromkeys(map(str, table.index.get_level_values("arm"))))
    for name in (arm, baseline):
        if name not in known and not (name == "before" == baseline and f"{outcome}_before" in table):
            raise InputError(f"there is no arm {name!r}; expected one of {', '.join(known)}")
    if outcome not in table:
        raise InputError(f"outcome={outcome!r}; expected one of {', '.join(OUTCOMES)}")
    named = table.index.get_level_values("arm")
    own = table.loc[named == arm, outcome].to_numpy(dtype=float)
    column, of = (f"{outcome}_before", arm) if baseline == "before" else (outcome, baseline)
    change = own - table.loc[named == of, column].to_numpy(dtype=float)
    low, high = bootstrap_mean(change, n_resamples, level, seed)
    # Resampled means are zero up to rounding, and an interval that ends at zero should end there.
    ends = {"mean": change.mean(), "low": low, "high": high}
    return {**{name: round(float(value), 12) for name, value in ends.items()}, "n": len(change)}


def differences(result: Result, outcomes: Sequence[str] = ("mentioned", "all_mentioned", "nll")) -> pd.DataFrame:
    """Every arm against "none", and against the random directions of its own norms, where these arms are there.

    Args:
        result: what `combine` gave.
        outcomes: columns of `by_prompt`.

    Returns:
        arm, baseline, outcome, mean, low, high, n.
    """
    arms = list(dict.fromkeys(result.frame["arm"].astype(str)))
    pairs = [(arm, baseline) for arm in arms for baseline in ("none", "random", f"random like {arm}") if arm != "none"]
    rows = [
        {"arm": arm, "baseline": baseline, "outcome": outcome, **difference(result, arm, baseline, outcome)}
        for arm, baseline in pairs
        for outcome in outcomes
        if baseline in arms and baseline != arm
    ]
    return pd.DataFrame(rows, columns=["arm", "baseline", "outcome", "mean", "low", "high", "n"])
