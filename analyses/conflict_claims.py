"""What Wan et al. say of instruction conflicts beside what `analyses.instruction_conflict` measured: one function per claim.

The paper (arXiv 2509.23188, withdrawn by its authors) prints one figure in its abstract; its statements are tested as
statements. A claim holds where the interval that is printed with it is on its side, does not where it is on the other, and is
open between; where a test decides as well, such as a permutation test, the text of the figure says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from interp.conflict.follow_summaries import share_interval
from interp.intervals import bootstrap_mean_clustered
from interp.report.claims import Claim
from interp.results import Result

PAPER = "Wan et al. 2025, arXiv 2509.23188, abstract"
GAIN = "+5.60 % (AutoGen on MedQA)"
OURS = "ours: the published loss, the chosen answer's own, and anchors"
TARGET, LARGEST_SHARE, LARGEST_PERPLEXITY = 0.3, 0.01, 1.03
STABLE = 0.75  # Davies 2025, arXiv 2501.02688: base against instruct


def loses(answers: Result, families: Sequence[str]) -> Claim:
    """The rule of the system turn is obeyed less often when somebody asks for the opposite than when all agree."""
    frame = answers.frame[answers.frame["family"].astype(str).isin(list(families))]
    by_prompt = {name: rows.set_index("pair") for name, rows in frame.groupby("prompt", observed=True)}
    under, agreed = by_prompt["conflict"], by_prompt["agree"]
    difference = under["obeys_system"].astype(float) - agreed["obeys_system"].reindex(under.index).astype(float)
    low, high = map(float, bootstrap_mean_clustered(difference.to_numpy(), under["task"].to_numpy()))
    ends = share_interval(under["obeys_system"].astype(float), under["task"])
    return Claim(
        f"agents misprioritise system rules when the {who(answers)} contradicts them (families it follows)",
        PAPER,
        None,
        f"obeyed {agreed['obeys_system'].mean():.0%} when both agree, {under['obeys_system'].mean():.0%} "
        f"[{ends[0]:.2f}, {ends[1]:.2f}] "
        f"under conflict, where {under['obeys_user'].mean():.0%} obey the {who(answers)}; change "
        f"{difference.mean():+.2f} (interval)",
        _interval(low, high),
        len(under),
        _side(-high, -low),
    )


def who(answers: Result) -> str:
    """Who contradicts the system."""
    settings = set(answers.frame["setting"].astype(str))
    return {"peer": "other agent", "user": "user"}[settings.pop()] if len(settings) == 1 else "user or other agent"


def drifts(heads: pd.DataFrame, control: str = "a paraphrase") -> Claim:
    """Some heads' attention changes with the conflict more than with what the control changes."""
    moved = heads[(heads["q"] <= 0.05) & (heads["excess"] > 0)]
    less = int(((heads["q"] <= 0.05) & (heads["excess"] < 0)).sum())
    top = heads.loc[heads["excess"].idxmax()]
    return Claim(
        f"some heads' attention drifts under conflict, beyond what {control} does",
        PAPER,
        None,
        f"{len(moved)} of {len(heads)} heads do (q ≤ .05), {less} drift less; most L{top['layer']:.0f}H{top['head']:.0f}: score "
        f"{top['score']:.2f}, control {top['control']:.2f}, excess {top['excess']:+.2f} (its interval; q decides)",
        _interval(top["low"], top["high"]),
        int(top["n_pairs"]),
        bool(len(moved)),  # the interval is that of the largest head, chosen for being so
    )


def middle(table: pd.DataFrame, what: str) -> Claim:
    """The focal heads are in middle layers."""
    rows = table.set_index("third")
    here = rows.loc["middle"]
    return Claim(
        f"focal heads are largely concentrated in middle layers ({what})",
        PAPER,
        "largely",
        f"{here['share']:.0%} of {int(rows['n_focal_heads'].sum())} focal heads in the middle third, "
        f"{here['expected']:.0%} by chance "
        f"(p = {here['p']:.2g}); first third {rows.loc['first', 'share']:.0%}, last {rows.loc['last', 'share']:.0%}",
        _interval(here["low"], here["high"]),
        int(rows["n_focal_heads"].sum()),
        _side(here["low"], here["high"], here["expected"]),
    )


def middle_patched(table: pd.DataFrame) -> Claim:
    """Patching the middle layers' attention brings back more than patching others'."""
    rows = table.set_index("what")
    here = rows.loc["middle − others"]
    means = ", ".join(f"{name} {rows.loc[name, 'mean']:+.3f}" for name in ("first", "middle", "last"))
    return Claim(
        "middle layers settle the conflict: their attention outputs, patched, bring back more than others'",
        "ours, causal form of the paper's claim",
        None,
        f"share of the gap per layer: {means}; middle − others {here['mean']:+.3f} (interval)",
        _interval(here["low"], here["high"]),
        int(here["n_tasks"]),
        _side(here["low"], here["high"]),
    )


def same_layers(table: pd.DataFrame, what: str) -> Claim:
    """Where attention drifts is where patching restores."""
    rows = table.set_index("what")
    rank, top = rows.loc["rank correlation"], rows.loc["shared top"]
    return Claim(
        f"attention drift and patching point to the same {what}",
        "ours",
        None,
        f"Spearman {rank['value']:.2f} over {rank['n']:.0f} {what} (interval over tasks; permuted {what} p = "
        f"{rank['p']:.2g}, both decide); of the top {top['top']:.0f} "
        f"{top['value']:.0f} shared, {top['expected']:.1f} by chance",
        _interval(rank["low"], rank["high"]),
        int(rank["n"]),
        _with_test(_side(rank["low"], rank["high"]), rank["p"]),
    )


def heads_matter(table: pd.DataFrame, how: str) -> Claim:
    """Ablating the chosen heads moves the preference further than ablating random sets, whichever way."""
    rows = table.set_index("what")
    focal, difference = rows.loc["|focal|"], rows.loc["|focal| − |random|"]
    return Claim(
        f"heads chosen by {how} matter: ablated together they move the preference further than random sets",
        "ours",
        None,
        f"{focal['mean']:.3f} nats per token either way, random sets {rows.loc['|random|', 'mean']:.3f}; difference "
        f"{difference['mean']:+.3f} (interval); rank among {focal['n_sets']:.0f} sets p = {focal['p_sets']:.2g}; with signs "
        f"{rows.loc['focal', 'mean']:+.3f} and {rows.loc['random', 'mean']:+.3f}",
        _interval(difference["low"], difference["high"]),
        int(focal["n"]),
        _matters(focal, difference),
    )


def _matters(focal: pd.Series, difference: pd.Series) -> bool | None:
    """Open while the interval holds 0, or with too few random sets for any rank to be rare, or where the rank is not."""
    if 1 / (focal["n_sets"] + 1) > 0.05:
        return None
    return _with_test(_side(difference["low"], difference["high"]), focal["p_sets"])


def obeys_more(row: pd.Series, where: str, published: bool = False) -> Claim:
    """Training the focal layers improves compliance with the hierarchy."""
    return Claim(
        f"{where}: compliance with the system's rule under conflict rises (held-out tasks)",
        PAPER if published else OURS,
        GAIN if published else None,
        f"{row['conflict'] - row['change']:.0%} → {row['conflict']:.0%}, change {row['change']:+.2f} (interval)",
        _interval(row["low"], row["high"]),
        int(row["n"]),
        _side(row["low"], row["high"]),
    )


def reaches(row: pd.Series, where: str) -> Claim:
    """The project's own aim: +30 points with at most 1 % of the parameters and 3 % of perplexity."""
    gained = _side(row["low"], row["high"], TARGET)
    dear = _side(row["perplexity_low"], row["perplexity_high"], LARGEST_PERPLEXITY)
    parts = (gained, bool(row["share"] <= LARGEST_SHARE), None if dear is None else not dear)
    return Claim(
        f"{where}: at least +{TARGET * 100:.0f} points with at most {LARGEST_SHARE:.0%} of the parameters and "
        f"{LARGEST_PERPLEXITY - 1:.0%} perplexity",
        "ours",
        None,
        f"{row['change']:+.2f} (interval); {row['share']:.2%} of the parameters; perplexity × {row['perplexity']:.4f} "
        f"[{row['perplexity_low']:.4f}, {row['perplexity_high']:.4f}]",
        _interval(row["low"], row["high"]),
        int(row["n"]),
        False if False in parts else None if None in parts else True,
    )


def keeps(row: pd.Series, where: str) -> Claim:
    """Obedience without conflict is not paid for."""
    return Claim(
        f"{where}: compliance without conflict does not fall (by 5 points or more)",
        "ours",
        None,
        f"both turns agree {row['agree_change']:+.2f} (interval); rule in the system turn alone {row['system_change']:+.2f} "
        f"[{row['system_low']:+.2f}, {row['system_high']:+.2f}]",
        _interval(row["agree_low"], row["agree_high"]),
        int(row["n"]),
        _side(row["agree_low"], row["agree_high"], -0.05),
    )


def generalises(row: pd.Series, where: str, which: str) -> Claim:
    """Families that were never trained; `which` says whether the model followed them before."""
    return Claim(
        f"{where}: the trained hierarchy holds for other families of rules ({which})",
        "ours",
        None,
        f"{row['conflict'] - row['change']:.0%} → {row['conflict']:.0%}, change {row['change']:+.2f} (interval)",
        _interval(row["low"], row["high"]),
        int(row["n"]),
        _side(row["low"], row["high"]),
    )


def beats(name: str, difference: tuple[float, float, float], n: int, source: str = "ours") -> Claim:
    """One arm above another."""
    mean, low, high = difference
    return Claim(name, source, None, f"{mean:+.2f} (interval)", _interval(low, high), n, _side(low, high))


def foretells(table: pd.DataFrame, how: str) -> Claim:
    """Localisation says which layers are worth training: arms gain in its order.

    Args:
        table: of `conflict_arms.foretold`.
        how: one of its columns, drift or patching.
    """
    from scipy.stats import permutation_test, spearmanr

    claim = f"the more {how} an arm's layers have on average, the more it gains under conflict"
    ours, gained = table[how].to_numpy(), table["change"].to_numpy()
    if np.ptp(ours) == 0 or np.ptp(gained) == 0:
        return Claim(claim, "ours", None, f"no order: all {len(table)} arms are alike", None, len(table), None)

    def correlation(values: np.ndarray) -> float:
        return float(spearmanr(values, gained).statistic)

    test = permutation_test(
        (ours,), correlation, permutation_type="pairings", n_resamples=9999, rng=np.random.default_rng(0)
    )
    side = bool(test.statistic > 0) if test.pvalue <= 0.05 else None
    return Claim(
        claim,
        "ours",
        None,
        f"Spearman {test.statistic:.2f} over {len(table)} arms (permuted arms p = {test.pvalue:.2g}, which decides)",
        None,
        len(table),
        side,
    )


def neurons_stay(share: float, n: int, same_top: float, where: str) -> Claim:
    """The top token of neurons: by construction all of them, since only attention is trained; so nothing is claimed."""
    return Claim(
        f"{where}: neurons keep their top token (a check: adapters on attention cannot change what MLP neurons decode to)",
        "Davies 2025, arXiv 2501.02688: base against instruct",
        f"over {STABLE:.0%}",
        f"{share:.1%} of {n:,} neurons; next-token predictions on prose keep theirs at {same_top:.1%} of positions",
        None,
        None,
        False if share <= STABLE else None,
    )


def scores(before: pd.DataFrame, after: pd.DataFrame, tasks: pd.Series, where: str, published: bool = False) -> Claim:
    """CRAS by the rule judge before and after, pair by pair, over the dimensions that are known of both answers.

    Args:
        before, after: by pair, one column per dimension.
        tasks: of each pair.
        where: which layers were trained.
        published: by the loss as published alone.
    """
    known = before.notna() & after.notna()
    first, second = (table.where(known).mean(axis=1) for table in (before, after))
    difference = (second - first).to_numpy()
    low, high = map(float, bootstrap_mean_clustered(difference, tasks.to_numpy()))
    goals = [table["goal_alignment"].where(known["goal_alignment"]).mean() for table in (before, after)]
    return Claim(
        f"{where}: CRAS under conflict rises (trained families; rule judge, whose constraint and role scores are the verifier's)",
        PAPER if published else OURS,
        None,
        f"{first.mean():.2f} → {second.mean():.2f} of 5, change {difference.mean():+.2f} (interval); goal alignment alone "
        f"{goals[0]:.2f} → {goals[1]:.2f} (n = {int(known['goal_alignment'].sum())})",
        _interval(low, high),
        len(difference),
        _side(low, high),
    )


def _interval(low: float, high: float) -> tuple[float, float] | None:
    return None if math.isnan(low) or math.isnan(high) else (float(low), float(high))


def _side(low: float, high: float, at: float = 0.0) -> bool | None:
    """True above, False below, None where the interval holds `at`, or is missing."""
    if math.isnan(low) or math.isnan(high):
        return None
    return True if low > at else False if high < at else None


def _with_test(side: bool | None, p: float) -> bool | None:
    """The interval's side, and where it is above 0, if a test of that is on it too; open where the two disagree."""
    return side if side is False or p <= 0.05 else None
