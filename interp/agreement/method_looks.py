"""How methods and their sides look in every picture of agreement, and the words that the pictures share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from interp.agreement.methods import side_of
from interp.plotting import PALETTE, REFERENCE, for_plotly, template
from interp.results import Result

# Shape and colour of a method's side; the order is that of the groups.
SIDES = {
    "attention": (PALETTE[0], "circle"),
    "attribution": (PALETTE[1], "square"),
    "baseline": (REFERENCE, "x"),
    "custom": (PALETTE[2], "diamond"),
}
MEASURE_NAMES = {
    "kendall": "Kendall's τ-b",
    "spearman": "Spearman's ρ",
    "pearson": "Pearson's r",
    "pairwise": "pairwise rank agreement",
    "feature": "feature agreement",
    "rank": "rank agreement",
    "sign": "sign agreement",
    "signed_rank": "signed-rank agreement",
    "topk_kendall": "Kendall's τ of the lists",
}
UNITS = {"log_prob": "nats", "logit_difference": "logits", "probability": "probability"}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")  # where lines outnumber the colours


def by_side(names: Sequence[str]) -> list[str]:
    """Methods by side, each side in the order given."""
    order = list(SIDES)
    return sorted(map(str, names), key=lambda name: order.index(side_of(name)))


def plain(name: str) -> str:
    """A name as plotly text: single spaces stay."""
    return for_plotly(str(name), inner=False)


def subtitle(result: Result, *notes: str) -> str:
    """Model, what was explained and how ranked, then a line of notes; escaped."""
    made = result.provenance.parameters
    parts = [result.provenance.model or "a model"]
    parts += [f"{made['n_examples']:,} examples"] if made.get("n_examples") else []
    parts += [f"target: {target_name(result)} of the {made.get('of', '?')} class"] if "target" in made else []
    parts += [f"ranked by {'|score|' if made['rank_by'] == 'abs' else 'score'}"] if "rank_by" in made else []
    return "<br>".join(plain(line) for line in ("; ".join(parts), *notes) if line)


def measure_name(measure: str, k: int = 0) -> str:
    """A measure of agreement in words.

    Example:
        >>> measure_name("feature", 3)
        'feature agreement of the top 3'
    """
    return MEASURE_NAMES[measure] + (f" of the top {k}" if k else "")


def target_name(result: Result) -> str:
    """What is explained, in words."""
    name = str(result.provenance.parameters.get("target", "target"))
    return {"log_prob": "log-probability"}.get(name, name.replace("_", " "))


def headline(drawn: Any, title: str, below: str, height: float, room: int = 0) -> None:
    """Title and subtitle at the very top, the plots below both.

    Args:
        drawn: the figure; it is changed.
        title: plain text, escaped here.
        below: the subtitle, escaped already.
        height: of the figure, in pixels.
        room: pixels that something else needs between the subtitle and the plots.
    """
    lines = below.count("<br>") + 1
    drawn.update_layout(
        template=template(),
        title={"text": plain(title), "y": 1 - 14 / height, "yref": "container", "yanchor": "top"},
        height=int(height),
        margin={"t": 48 + 16 * lines + room},
    )
    drawn.update_layout(title_subtitle_text=below)
