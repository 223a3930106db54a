"""Pictures of neurons: `Result -> plotly Figure`. No computation beyond an atlas's own summaries."""

from __future__ import annotations

from typing import Any

import numpy as np

from interp.neurons.atlas import Atlas
from interp.neurons.clamping_plots import clamp_search, dose_response, statistics
from interp.neurons.editing_plots import edit
from interp.plotting import PALETTE, REFERENCE, band, figure, token_axis
from interp.results import Result

__all__ = ["atlas", "card", "clamp_search", "compare", "dose_response", "edit", "specialised", "statistics"]


def atlas(result: Atlas, control: Atlas | None = None) -> Any:
    """Top-1 probability by layer: median with quartiles, and a control atlas (shuffled weights) in grey.

    Args:
        result: what `decode` gave.
        control: the same with `shuffle=True`.
    """
    layers = result.by_layer()
    drawn = figure(
        "How peaked neurons decode, by layer",
        "layer",
        "top-1 probability",
        subtitle=_subtitle(result, int(layers["n"].sum())),
    )
    _band(drawn, layers, "p50", "p25", "p75", "median neuron", PALETTE[0])
    if control is not None:
        _band(drawn, control.by_layer(), "p50", "p25", "p75", "median, weights shuffled", REFERENCE)
    drawn.update_yaxes(range=[0, 1])
    return drawn


def specialised(result: Atlas, control: Atlas | None = None) -> Any:
    """Share of specialised neurons by layer with 95 % intervals, and of a control atlas in grey.

    Args:
        result: what `decode` gave.
        control: the same with `shuffle=True`.
    """
    layers = result.by_layer()
    drawn = figure(
        "Neurons whose best tokens spell one word, by layer",
        "layer",
        "share of neurons and signs",
        subtitle=_subtitle(result, int(layers["n"].sum())) + "; at least 3 of the top 5 are spellings of the best",
    )
    _band(drawn, layers, "specialised", "low", "high", "neurons", PALETTE[0], "95 % interval")
    if control is not None:
        _band(drawn, control.by_layer(), "specialised", "low", "high", "weights shuffled", REFERENCE, "95 % interval")
    drawn.update_yaxes(rangemode="tozero", tickformat=".1%")
    return drawn


def card(result: Atlas, layer: int, neuron: int, sign: int = 1) -> Any:
    """One neuron's tokens with their probabilities.

    Args:
        result: what `decode` gave.
        layer, neuron, sign: which neuron.
    """
    import plotly.graph_objects as go

    rows = result.card(layer, neuron, sign)
    first = rows.iloc[0]
    drawn = figure(
        f"Layer {layer}, neuron {neuron}, sign {'+' if sign == 1 else '−'}",
        "probability",
        "",
        subtitle=f"{result.provenance.model}, {result.provenance.parameters['site']} weights; entropy {first['entropy']:.2f} "
        f"nats; cos(up, down) {first['cosine']:.2f}",
    )
    ranks = np.arange(len(rows))
    drawn.add_trace(
        go.Bar(x=rows["probability"].to_numpy(), y=ranks, orientation="h", marker_color=PALETTE[0], name="token")
    )
    drawn.update_yaxes(**token_axis(rows["token"].astype(str).tolist()), autorange="reversed")
    drawn.update_xaxes(range=[0, 1])
    drawn.update_layout(height=120 + 28 * len(rows), showlegend=False)
    return drawn


def compare(result: Result) -> Any:
    """Agreement by layer with its 95 % interval, against chance.

    Args:
        result: what `compare` gave.
    """
    import plotly.graph_objects as go

    rows = result.frame[result.frame["layer"] >= 0]
    overall = result.frame[result.frame["layer"] < 0].iloc[0]
    sides = [result.provenance.parameters[name] for name in ("a", "b")]
    drawn = figure(
        "Neurons with the same top-1 token, by layer",
        "layer",
        "share of neurons",
        subtitle=f"{sides[0]['model']} {sides[0]['site']} against {sides[1]['model']} {sides[1]['site']}; overall "
        f"{overall['agree']:.1%} of {int(overall['n'])}",
    )
    _band(drawn, rows, "agree", "low", "high", "agreement", PALETTE[0], "95 % interval")
    line = {"color": REFERENCE, "dash": "dash"}
    drawn.add_trace(
        go.Scatter(x=rows["layer"].to_numpy(), y=rows["chance"].to_numpy(), name="chance", mode="lines", line=line)
    )
    drawn.update_yaxes(rangemode="tozero", tickformat=".1%")
    return drawn


def _band(
    drawn: Any, rows: Any, middle: str, low: str, high: str, name: str, color: str, interval: str = "quartiles"
) -> None:
    values = [rows[column].to_numpy() for column in ("layer", middle, low, high)]
    band(drawn, *values, name=name, color=color, interval=interval)


def _subtitle(result: Atlas, n: int) -> str:
    parameters = result.provenance.parameters
    return f"{result.provenance.model}, {parameters['site']} weights, norm {parameters['norm']}; {n} neurons and signs"
