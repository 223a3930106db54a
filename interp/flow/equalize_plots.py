"""The picture of an equalisation: what each arm mentions, and what happened to the flows. `Result -> plotly Figure`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from interp.flow import equalized_arms
from interp.plotting import PALETTE, REFERENCE, template, to_float32
from interp.results import Result
from interp.tokens import for_plotly

# Outcome: colour, marker, name in the legend, where it stands in its arm's row.
_OUTCOMES = {
    "mentioned": (PALETTE[0], "circle", "concepts named", -0.14),
    "all_mentioned": (PALETTE[4], "diamond", "answers that name all", 0.14),
}
_FLOWS = {
    "min_flow": (PALETTE[1], "square", "least flow of a prompt", -0.14),
    "mean_flow": (PALETTE[2], "circle", "mean flow of a prompt", 0.14),
}


def equalize(result: Result) -> Any:
    """Concepts that answers name by arm, the change paired by prompt, and the flows before and after.

    Args:
        result: what `interp.flow.equalization.equalize` or `interp.flow.equalized_arms.combine` gave.
    """
    from plotly.subplots import make_subplots

    table = equalized_arms.summary(result)
    titles = ["Concepts that answers name", "The same, minus “none”", "Maximum flow to concepts"]
    drawn = make_subplots(1, 3, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=titles)
    rows = np.arange(len(table), dtype=float)
    for outcome, (color, symbol, label, offset) in _OUTCOMES.items():
        marker = {"color": color, "symbol": symbol, "size": 9}
        common = {"mode": "markers", "marker": marker, "legendgroup": outcome, "name": label}
        drawn.add_scatter(
            x=to_float32(table[outcome]),
            y=to_float32(rows + offset),
            error_x=_ends(table[outcome], table[f"{outcome}_low"], table[f"{outcome}_high"]),
            hovertemplate="%{x:.3f}",
            **common,
            row=1,
            col=1,
        )
        changes = equalized_arms.differences(result, (outcome,)).query("baseline == 'none'")
        if len(changes):
            at = [table["arm"].tolist().index(arm) for arm in changes["arm"]]
            drawn.add_scatter(
                x=to_float32(changes["mean"]),
                y=to_float32(rows[at] + offset),
                error_x=_ends(changes["mean"], changes["low"], changes["high"]),
                hovertemplate="%{x:+.3f}",
                showlegend=False,
                **common,
                row=1,
                col=2,
            )
    drawn.add_vline(x=0, line={"color": REFERENCE, "dash": "dot", "width": 1.5}, row=1, col=2)
    for flow, (color, symbol, label, offset) in _FLOWS.items():
        _before_and_after(drawn, table[f"{flow}_before"], table[flow], rows + offset, color, symbol, label)
    drawn.update_xaxes(title_text="share, mean over prompts", range=[-0.03, 1.03], row=1, col=1)
    drawn.update_xaxes(title_text="difference of shares", row=1, col=2)
    drawn.update_xaxes(title_text="flow, mean over prompts [attention]", row=1, col=3)
    names = [for_plotly(name, inner=False) for name in table["arm"]]
    drawn.update_yaxes(tickmode="array", tickvals=rows, range=[len(table) - 0.5, -0.5], zeroline=False)
    drawn.update_yaxes(ticktext=names, row=1, col=1)
    n = int(table["n"].iloc[0])
    drawn.update_layout(
        template=template(),
        title_text="Flows equalised over the things that a prompt names",
        title_subtitle_text=for_plotly(
            f"{result.provenance.model}; {n} prompt{'s' if n != 1 else ''}; bars: 95 % interval over prompts, "
            f"differences paired by prompt; flows: open before, filled after",
            inner=False,
        ),
        margin={"t": 110, "b": 110},
        legend={"orientation": "h", "yref": "container", "y": 0.02, "yanchor": "bottom"},
        height=270 + 46 * len(names),
    )
    return drawn


def _before_and_after(
    drawn: Any, before: pd.Series, after: pd.Series, rows: np.ndarray, color: str, symbol: str, label: str
) -> None:
    """A dumbbell per arm: open before, filled after."""
    between = np.full(len(rows), np.nan)
    place = {"legendgroup": label, "row": 1, "col": 3}
    drawn.add_scatter(
        x=to_float32(np.stack([before, after, between], 1).ravel()),
        y=to_float32(np.stack([rows, rows, between], 1).ravel()),
        mode="lines",
        line={"color": color, "width": 2},
        hoverinfo="skip",
        showlegend=False,
        **place,
    )
    for values, kind, when in ((before, f"{symbol}-open", "before"), (after, symbol, "after")):
        drawn.add_scatter(
            x=to_float32(values),
            y=to_float32(rows),
            mode="markers",
            name=label,
            showlegend=when == "after",
            marker={"color": color, "symbol": kind, "size": 9, "line": {"width": 2, "color": color}},
            hovertemplate=f"{when}: %{{x:.4f}}",
            **place,
        )


def _ends(middle: pd.Series, low: pd.Series, high: pd.Series) -> dict[str, Any]:
    """Error bars; none for a single prompt."""
    ends = {"array": to_float32(high - middle), "arrayminus": to_float32(middle - low)}
    return {"type": "data", "symmetric": False, "thickness": 1.5, **ends}
