"""How an alignment went, and what it was made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.conflict.preference_table import counts
from interp.errors import InputError
from interp.plotting import PALETTE, REFERENCE, figure, to_float32
from interp.results import Result
from interp.tokens import for_plotly

if TYPE_CHECKING:
    import plotly.graph_objects as go

_NAMES = {
    "loss": ("Loss", "nats"),
    "margin": ("Margin between chosen and rejected", "nats"),
    "accuracy": ("Pairs whose chosen answer wins", "share"),
}


def align(result: Result, value: str = "loss") -> go.Figure:
    """Training and validation over the steps, with the step whose adapter was kept.

    Args:
        result: of `interp.conflict.align`.
        value: "loss", "margin" or "accuracy".

    Raises:
        InputError: another value.
    """
    import plotly.graph_objects as go

    if value not in _NAMES:
        raise InputError(f"value={value!r}; expected one of {', '.join(_NAMES)}")
    known, given = result.attachments, result.provenance.parameters
    name, unit = _NAMES[value]
    layers = known["layers"]
    parts = [
        str(result.provenance.model),
        f"credit {given['credit']}",
        f"{len(layers)} layers ({layers[0]} … {layers[-1]})",
        f"{known['n_pairs']:,} pairs",
        f"{known['trainable']:,} trainable parameters ({100 * known['trainable_share']:.2f} %)",
    ]
    drawn = figure(f"Alignment: {name.lower()}", "optimiser step", name, y_unit=unit, subtitle=" · ".join(parts))
    for color, (split, rows) in zip(PALETTE, result.frame.groupby("split", observed=True), strict=False):
        drawn.add_trace(
            go.Scatter(
                x=to_float32(rows["step"]),
                y=to_float32(rows[value]),
                mode="lines+markers",
                name=for_plotly(str(split), inner=False),
                line={"color": color, "dash": "solid" if split == "train" else "dash"},
                marker={"symbol": "circle" if split == "train" else "diamond"},
                customdata=to_float32(rows[["margin", "accuracy", "seconds"]]),
                hovertemplate=(
                    "step %{x}: %{y:.4g}<br>margin %{customdata[0]:.3g}, accuracy %{customdata[1]:.2f}, "
                    "%{customdata[2]:.0f} s"
                ),
            )
        )
    chance = {"loss": 0.693147, "margin": 0.0, "accuracy": 0.5}[value]
    if value != "loss" or not (given.get("likelihood") or given.get("anchors")):  # other terms move it
        drawn.add_hline(y=chance, line={"color": REFERENCE, "dash": "dot", "width": 1}, annotation_text="no preference")
    if known["n_validation"]:
        drawn.add_vline(x=known["best_step"], line={"color": REFERENCE, "width": 1}, annotation_text="kept")
    return drawn


def preferences(result: Result) -> go.Figure:
    """How many pairs each rule gave: used, by a rewrite or not, and left out.

    Args:
        result: of `interp.conflict.preferences.make_preferences`.
    """
    import plotly.graph_objects as go

    table = counts(result).groupby(["family", "system_rule"], observed=True).sum(numeric_only=True).reset_index()
    places = [for_plotly(f"{row.family}: {row.system_rule}", inner=False) for row in table.itertuples()]
    drawn = figure(
        "Preference pairs by the rule that must win",
        "rule of the system turn",
        "prompts",
        subtitle=f"{result.provenance.model} · {int(table['n_used'].sum()):,} of {int(table['n'].sum()):,} prompts used",
    )
    bars = {
        "used, the model's own chosen answer": table["n_used"] - table["n_rewritten"],
        "used, chosen answer rewritten": table["n_rewritten"],
        "left out": table["n"] - table["n_used"],
    }
    for color, pattern, (label, values) in zip(PALETTE, ("", "/", "."), bars.items(), strict=False):
        drawn.add_trace(
            go.Bar(x=places, y=to_float32(values), name=label, marker={"color": color, "pattern": {"shape": pattern}})
        )
    return drawn.update_layout(barmode="stack")
