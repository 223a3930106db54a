"""What Vico says of equalised flows beside what `analyses.flow_equalisation` measured: one function per claim.

A claim holds where the interval that is printed with it says so. Vico's figures are shares of generated videos that
show both of a prompt's objects (VBench, multiple objects); ours are shares of concepts that answers name: alike in
kind, not in amount.
"""

from __future__ import annotations

import math
from typing import Any

from interp.flow.equalized_arms import difference, summary
from interp.report.claims import Claim
from interp.results import Result

VICO = "Yang & Wang 2024 (Vico), arXiv 2407.06182"
VBENCH = "VBench multiple object, VideoCrafter2: 40.66 plain, 67.84 hard, 73.55 soft"
WORSE = 1.1  # perplexity, at most this many times


def claims(result: Result) -> list[Claim]:
    """All claims that the arms in a result can speak to.

    Args:
        result: what `interp.flow.equalized_arms.combine` gave: "none", arms that ascend, "random like …".
    """
    arms = list(dict.fromkeys(result.frame["arm"].astype(str)))
    ascents = [name for name in ("min soft", "min exact") if name in arms]
    found = []
    for name in ascents:
        found += [equalised(result, name), raises(result, name)]
        if f"random like {name}" in arms:
            found.append(beats_random(result, name))
        found.append(fluent(result, name))
    if {"min soft", "variance soft"} <= set(arms):
        found.append(beats_variance(result))
    return found


def equalised(result: Result, arm: str) -> Claim:
    """Whether the ascent did what it is for: without it, no effect on answers says nothing about the flow."""
    own, exact = (difference(result, arm, "before", name) for name in ("own_evenness", "evenness"))
    row = _row(result, arm)
    return Claim(
        f"{arm}: the concepts' flows become more equal (smallest / mean)",
        VICO,
        None,
        f"by the arm's own method {row['own_evenness_before']:.3f} → {row['own_evenness']:.3f} (change: interval), "
        f"smallest flow {row['own_min_flow_before']:.3g} → {row['own_min_flow']:.3g}; maximum flows "
        f"{row['evenness_before']:.3f} → {row['evenness']:.3f} ({_signed(exact)}), smallest "
        f"{row['min_flow_before']:.3f} → {row['min_flow']:.3f}; ‖δ‖ {row['norm']:.1%} of the embeddings'",
        _interval(own),
        int(own["n"]),
        _above(own),
    )


def raises(result: Result, arm: str) -> Claim:
    """More concepts than without any change."""
    share, whole = (difference(result, arm, "none", name) for name in ("mentioned", "all_mentioned"))
    plain, row = _row(result, "none"), _row(result, arm)
    return Claim(
        f"{arm}: equalising the flow raises the share of concepts mentioned",
        VICO,
        VBENCH,
        f"{plain['mentioned']:.1%} → {row['mentioned']:.1%}, change {share['mean']:+.3f} (interval); answers that "
        f"mention all {plain['all_mentioned']:.1%} → {row['all_mentioned']:.1%} ({_signed(whole)})",
        _interval(share),
        int(share["n"]),
        _above(share),
    )


def beats_random(result: Result, arm: str) -> Claim:
    """More concepts than with a perturbation of random direction."""
    baseline = f"random like {arm}"
    share, plain = difference(result, arm, baseline), difference(result, baseline, "none")
    return Claim(
        f"{arm}: more than a random perturbation of the same norm",
        "ours",
        None,
        f"{_row(result, arm)['mentioned']:.1%} against {_row(result, baseline)['mentioned']:.1%}, difference "
        f"{share['mean']:+.3f} (interval); random against none {_signed(plain)}",
        _interval(share),
        int(share["n"]),
        _above(share),
    )


def fluent(result: Result, arm: str) -> Claim:
    """The answers' perplexity under the untouched model and prompt, against the untouched answers'."""
    change = difference(result, arm, "none", "nll")
    plain, row = _row(result, "none"), _row(result, arm)
    ratio = {key: math.exp(min(change[key], 700.0)) for key in ("mean", "low", "high")}
    return Claim(
        f"{arm}: fluency is kept (perplexity of the answer, by the untouched model, at most {WORSE - 1:.0%} higher)",
        "ours",
        None,
        f"{plain['perplexity']:.2f} → {row['perplexity']:.2f}, {ratio['mean']:.2f} times (interval)",
        None if math.isnan(ratio["low"]) else (ratio["low"], ratio["high"]),
        int(change["n"]),
        None if math.isnan(ratio["high"]) else bool(ratio["high"] <= WORSE),
    )


def beats_variance(result: Result) -> Claim:
    """Vico's ablation of the objective."""
    share, whole = (difference(result, "min soft", "variance soft", name) for name in ("mentioned", "all_mentioned"))
    return Claim(
        "ascending the smallest flow mentions more than ascending minus the variance of flows",
        VICO,
        None,
        f"{_row(result, 'min soft')['mentioned']:.1%} against {_row(result, 'variance soft')['mentioned']:.1%}, "
        f"difference {share['mean']:+.3f} (interval); all mentioned {_signed(whole)}",
        _interval(share),
        int(share["n"]),
        _above(share),
    )


def _row(result: Result, arm: str) -> Any:
    table = summary(result)
    return table[table["arm"] == arm].iloc[0]


def _interval(change: dict[str, float]) -> tuple[float, float] | None:
    return None if math.isnan(change["low"]) else (change["low"], change["high"])


def _above(change: dict[str, float]) -> bool | None:
    """By the interval; a single prompt, which has none, tests nothing."""
    return None if math.isnan(change["low"]) else bool(change["low"] > 0)


def _signed(change: dict[str, float]) -> str:
    return f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
