"""What answers say: shares that obey, with intervals over tasks, and which rules a model follows at all.

1. Answers are what `follow` gave; a share is over answers, its interval over tasks, because answers to one task are alike.
2. A rule is followed at all where it is obeyed more often when the user asks for it than without any rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from interp.conflict.answers import follow_frame
from interp.conflict.pairs import PROMPTS
from interp.conflict.verifiers import family_names
from interp.errors import InputError
from interp.intervals import bootstrap_mean_clustered
from interp.results import Result


def follow_summary(
    result: Result, by: Sequence[str] = ("family", "system_rule"), *, n_resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Compliance with the rule of the system turn, by rule and prompt, and what is above doing nothing.

    Args:
        result: what `follow` gave.
        by: columns to group by, beside the prompt.
        n_resamples, seed: of the bootstrap over tasks.

    Returns:
        The columns of `by`, prompt, obeys_system, low, high (share of answers that pass the verifier of the system's rule,
        with an interval over tasks), obeys_user (share that pass the opposite rule's), undecided (share that were cut off while
        they might still have come to obey; they count as not obeying, and a cut-off answer that obeys so far as obeying),
        loops (share that repeat themselves, whether they obey or not), n (answers), n_tasks, and, where the prompt "none" was
        asked, above_none, above_low, above_high: how many more answers obey than without any rule, task by task. A rule is
        followed at all where above_low of the prompt "user" is above 0.

    Raises:
        InputError: another kind of result, or no such column.
    """
    frame = follow_frame(result, by)
    rows = []
    for key, group in frame.groupby([*by], observed=True, sort=False) if by else [((), frame)]:
        none = group[group["prompt"] == "none"]
        for name in PROMPTS:
            some = group[group["prompt"] == name]
            if some.empty:
                continue
            low, high = share_interval(some["obeys_system"], some["task"], n_resamples=n_resamples, seed=seed)
            row = dict(zip(by, key, strict=True)) | {"prompt": name, "obeys_system": some["obeys_system"].mean()}
            row |= {"low": low, "high": high, "obeys_user": some["obeys_user"].mean()}
            row |= {"undecided": 1 - some["decided"].mean(), "loops": some["loops"].mean()}
            row |= {"n": len(some), "n_tasks": some["task"].nunique(), "above_none": np.nan}
            row |= {"above_low": np.nan, "above_high": np.nan}
            if len(none):
                above = some.set_index("pair")["obeys_system"]
                above = above - none.set_index("pair")["obeys_system"].reindex(above.index)
                task = some.set_index("pair")["task"].to_numpy()
                ends = bootstrap_mean_clustered(above.to_numpy(), task, n_resamples=n_resamples, seed=seed)
                row |= {"above_none": above.mean(), "above_low": float(ends[0]), "above_high": float(ends[1])}
            rows.append(row)
    return pd.DataFrame(rows)


def share_interval(
    passed: pd.Series, tasks: pd.Series, *, n_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval of a share of answers: bootstrap over tasks; where all agree, Wilson's with the tasks as trials.

    Args:
        passed: 1 or 0 of each answer.
        tasks: the answers' tasks.
        n_resamples, level, seed: of the bootstrap.

    Returns:
        (low, high).
    """
    if passed.nunique() > 1:
        low, high = bootstrap_mean_clustered(passed.to_numpy(), tasks.to_numpy(), n_resamples, level, seed)
        return float(low), float(high)
    from scipy.stats import binomtest

    n = tasks.nunique()
    ends = binomtest(n if passed.iloc[0] else 0, n).proportion_ci(level, method="wilson")
    return float(ends.low), float(ends.high)


def change_interval(
    changes: pd.Series, tasks: pd.Series, *, n_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval of a mean change from pair to pair: bootstrap over tasks; where all tasks agree, by Wilson's interval.

    Where n tasks change by the same c, up to w = z² / (n + z²) of further ones might not, by any amount from −1 to 1: the ends
    are c − w (1 + c) and c + w (1 − c).

    Args:
        changes: of each pair, from −1 to 1.
        tasks: the pairs' tasks.
        n_resamples, level, seed: of the bootstrap.

    Returns:
        (low, high); missing for a single task.
    """
    low, high = bootstrap_mean_clustered(changes.to_numpy(float), tasks.to_numpy(), n_resamples, level, seed)
    if low < high or np.isnan(low):
        return float(low), float(high)
    other = share_interval(pd.Series(np.zeros(len(tasks))), tasks.reset_index(drop=True), level=level)[1]
    mean = float(changes.mean())
    return mean - other * (1 + mean), mean + other * (1 - mean)


def obedience_change(
    before: Result, after: Result, by: Sequence[str] = ("family",), *, n_resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """How many more answers obey the system's rule after something was done to a model, pair by pair.

    Args:
        before, after: what `follow` gave for the same pairs.
        by: columns to group by, beside the prompt.
        n_resamples, seed: of the bootstrap over tasks.

    Returns:
        The columns of `by`, prompt, before, after (shares of answers that pass the verifier of the system's rule), change, low,
        high (after − before, with an interval over tasks), n (pairs), n_tasks; prompts that both were asked.

    Raises:
        InputError: another kind of result, no such column, or other pairs.

    Example:
        >>> with adapted(model, "aligned/run/adapter"):                                    # doctest: +SKIP
        ...     after = follow(model, pairs)                                               # doctest: +SKIP
        >>> obedience_change(before, after)                                                # doctest: +SKIP
    """
    frames = [follow_frame(result, by) for result in (before, after)]
    prompts = [name for name in PROMPTS if all((frame["prompt"] == name).any() for frame in frames)]
    first, last = (frame[frame["prompt"].isin(prompts)].set_index(["pair", "prompt"]) for frame in frames)
    if not prompts or set(first.index) != set(last.index):
        raise InputError("before and after are answers to other pairs or prompts; ask `follow` for the same ones")
    first = first.loc[last.index]
    table = last.reset_index().assign(before=first["obeys_system"].to_numpy())
    rows = []
    for key, group in table.groupby([*by], observed=True, sort=False) if by else [((), table)]:
        for name in prompts:
            some = group[group["prompt"] == name]
            if some.empty:
                continue
            change = some["obeys_system"] - some["before"]
            low, high = change_interval(change, some["task"], n_resamples=n_resamples, seed=seed)
            row = dict(zip(by, key, strict=True)) | {"prompt": name, "before": some["before"].mean()}
            row |= {"after": some["obeys_system"].mean(), "change": change.mean()}
            rows.append(row | {"low": low, "high": high, "n": len(some), "n_tasks": some["task"].nunique()})
    return pd.DataFrame(rows)


def followed_families(result: Result, *, seed: int = 0) -> list[str]:
    """Families, in the order of `family_names`, with a rule that is obeyed more often when the user asks for it than without any.

    Args:
        result: what `follow` gave with the prompts "none" and "user"; see `followed_rules` for the rules one by one.
        seed: of the bootstrap over tasks.

    Raises:
        InputError: another kind of result, or prompts that were not asked.
    """
    table = _asked(result, {"none", "user"}, seed)
    found = set(table.loc[(table["prompt"] == "user") & (table["above_low"] > 0), "family"].astype(str))
    return [*(name for name in family_names() if name in found), *sorted(found - set(family_names()))]


def followed_rules(result: Result, *, seed: int = 0) -> pd.DataFrame:
    """Per rule: does the model follow it at all, where, and who wins under conflict.

    Args:
        result: what `follow` gave with the prompts "none", "system", "user" and "conflict".
        seed: of the bootstrap over tasks.

    Returns:
        family, rule, none, system, user, conflict (share of answers that obey the rule under each prompt, the rule being the
        system's in "system" and "conflict"), conflict_low, conflict_high (interval of the last over tasks), followed (above_low
        of the prompt "user" is above 0: obeyed more often than without any rule), heard (the same for "system"), other_wins
        (share of answers under conflict that obey the opposite rule), undecided, loops (of the answers under conflict: see
        `follow_summary`), n.

    A rule that is obeyed without being asked for ("paragraph") has no room above that and never counts as followed; a family is
    followed where one of its rules is. The intervals are each rule's own: of sixteen that do nothing, .4 would count by chance.

    Raises:
        InputError: another kind of result, or prompts that were not asked.
    """
    table = _asked(result, {"none", "system", "user", "conflict"}, seed)
    rows = []
    for (name, rule), group in table.groupby(["family", "system_rule"], observed=True, sort=False):
        by_prompt = group.set_index("prompt")
        shares = by_prompt["obeys_system"]
        row = {"family": name, "rule": rule} | {key: shares[key] for key in ("none", "system", "user", "conflict")}
        row |= {f"conflict_{end}": by_prompt[end]["conflict"] for end in ("low", "high")}
        row |= {"followed": by_prompt["above_low"]["user"] > 0, "heard": by_prompt["above_low"]["system"] > 0}
        row |= {"other_wins": by_prompt["obeys_user"]["conflict"], "undecided": by_prompt["undecided"]["conflict"]}
        rows.append(row | {"loops": by_prompt["loops"]["conflict"], "n": by_prompt["n"]["conflict"]})
    return pd.DataFrame(rows)


def _asked(result: Result, prompts: set[str], seed: int) -> pd.DataFrame:
    """Every rule's summary, where these prompts were asked."""
    table = follow_summary(result, ("family", "system_rule"), seed=seed)
    lost = prompts - set(table["prompt"])
    if lost:
        raise InputError(f"the prompts {', '.join(sorted(lost))} were not asked; give them to `follow`")
    return table
