"""Figures of `analyses.attention_flow`: tables in, plotly figures out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from interp.plotting import PALETTE, REFERENCE, band, figure

COLORS = dict(zip(("exact", "rollout", "raw", "widest", "soft", "bound", "layer_bound"), PALETTE, strict=True))
NAMES = {
    "exact": "exact flow",
    "raw": "raw attention",
    "widest": "widest path",
    "soft": "soft widest path",
    "layer_bound": "layer bound",
}
CORRECTED = {"none": "no correction", "uniform": "against uniform attention", "drop_sink": "without the document start"}


def by_depth(table: pd.DataFrame, correction: str, reference: str) -> Any:
    """Spearman against depth, a line and a ribbon per method; position and ceiling as dashed lines.

    Args:
        table: what `analyses.flow_faithfulness.means` gave.
        correction, reference: which rows.
    """
    rows = table[(table["reference"] == reference)]
    n = int(rows["n"].max())
    what = {"blank-out": "blanking a token out", "gradient": "input gradients"}[reference]
    drawn = figure(
        f"Which score ranks tokens as {what} does, by depth ({CORRECTED[correction]})",
        "layers of the graph, from the bottom",
        "Spearman correlation",
        subtitle=f"mean over {n} sentences, 95 % bootstrap interval over sentences; 1 = same ranking, 0 = unrelated",
    )
    rows = rows[(rows["graph"] == "mean") & (rows["correction"] == correction)]
    for method, color in COLORS.items():
        line = rows[rows["method"] == method].sort_values("n_layers")
        band(
            drawn,
            line["n_layers"],
            line["mean"],
            line["low"],
            line["high"],
            name=NAMES.get(method, method),
            color=color,
        )
    alone = table[(table["reference"] == reference) & (table["n_layers"] == 0)].set_index("method")["mean"]
    for method, words in (("position", "position alone"), ("ceiling", "blank-out by another token")):
        if method in alone.index:
            drawn.add_hline(
                float(alone[method]),
                line_dash="dash",
                line_color=REFERENCE,
                annotation_text=words,
                annotation_position="top left" if method == "ceiling" else "bottom left",
            )
    drawn.add_hline(0.0, line_color=REFERENCE, line_width=1)
    return drawn


def by_graph(table: pd.DataFrame, reference: str) -> Any:
    """Spearman on the whole depth for every kind of graph and correction, as points with intervals.

    Args:
        table: what `analyses.flow_faithfulness.means` gave.
        reference: "blank-out" or "gradient".
    """
    import plotly.graph_objects as go

    rows = table[(table["reference"] == reference) & (table["n_layers"] == table["n_layers"].max())]
    drawn = figure(
        f"All layers: what the graph's capacities are made of ({reference})",
        "Spearman correlation, 95 % interval",
        "",
        subtitle="mean: heads averaged; norm: weighted by what they write; contribution: of each position to the residual stream",
    )
    shapes = {"none": "circle", "uniform": "diamond", "drop_sink": "square"}
    for method, color in COLORS.items():
        for correction, symbol in shapes.items():
            some = rows[(rows["method"] == method) & (rows["correction"] == correction)]
            drawn.add_trace(
                go.Scatter(
                    x=some["mean"],
                    y=[f"{graph} · {NAMES.get(method, method)}" for graph in some["graph"]],
                    error_x={
                        "type": "data",
                        "array": some["high"] - some["mean"],
                        "arrayminus": some["mean"] - some["low"],
                    },
                    mode="markers",
                    marker={"color": color, "symbol": symbol, "size": 9},
                    name=CORRECTED[correction],
                    legendgroup=correction,
                    showlegend=method == "exact",
                )
            )
    drawn.add_vline(0.0, line_color=REFERENCE, line_width=1)
    drawn.update_yaxes(categoryorder="category ascending")
    drawn.update_layout(height=760)
    return drawn


def against_length(table: pd.DataFrame, value: str, methods: Sequence[str]) -> Any:
    """Kendall's τ with the exact flow, or the share of it, against length; texts solid, random attention dashed.

    Args:
        table: what `analyses.flow_lengths.length_means` gave.
        value: "kendall" or "ratio".
        methods: which.
    """
    titles = {
        "kendall": ("Does it rank tokens as the exact flow does?", "Kendall's τ with the exact flow"),
        "ratio": ("How much of the exact flow does it see?", "value / exact flow, mean over tokens"),
    }
    n = int(table["n"].min())
    drawn = figure(
        titles[value][0],
        "length",
        titles[value][1],
        x_unit="tokens",
        subtitle=f"{n} texts (solid) and {n} random causal attentions (dotted) a length; ribbons: 95 % interval over texts",
    )
    for method in methods:
        for attention in ("model", "random"):
            rows = table[(table["method"] == method) & (table["attention"] == attention)].sort_values("n_tokens")
            label = NAMES.get(method, method) if attention == "model" else f"{NAMES.get(method, method)}, random"
            before = len(drawn.data)
            band(
                drawn,
                rows["n_tokens"],
                rows[value],
                rows[f"{value} low"],
                rows[f"{value} high"],
                name=label,
                color=COLORS[method],
            )
            if attention == "random":
                for trace in drawn.data[before:]:
                    trace.line.dash = "dot"
    drawn.update_xaxes(
        type="log",
        tickvals=sorted(table["n_tokens"].unique()),
        ticktext=[str(at) for at in sorted(table["n_tokens"].unique())],
    )
    return drawn


def time_against_length(table: pd.DataFrame) -> Any:
    """Milliseconds for all sources of one target, both axes logarithmic.

    Args:
        table: what `analyses.flow_lengths.length_means` gave.
    """
    import plotly.graph_objects as go

    rows = table[table["attention"] == "model"].assign(
        method=lambda frame: frame["method"].replace({"soft τ=0.01 entropy": "soft"})
    )
    drawn = figure(
        "What it costs: all tokens of one target",
        "length",
        "time",
        x_unit="tokens",
        y_unit="ms",
        subtitle="median over texts, on the machine that wrote this report; both axes logarithmic",
    )
    for method, color in COLORS.items():
        line = rows[rows["method"] == method].sort_values("n_tokens")
        if len(line):
            drawn.add_trace(
                go.Scatter(
                    x=line["n_tokens"],
                    y=line["ms"],
                    mode="lines+markers",
                    name=NAMES.get(method, method),
                    line={"color": color},
                )
            )
    lengths = sorted(table["n_tokens"].unique())
    drawn.update_xaxes(type="log", tickvals=lengths, ticktext=[str(at) for at in lengths])
    drawn.update_yaxes(type="log")
    return drawn
