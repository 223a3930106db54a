"""Pictures of the toy: `Result -> plotly Figure`, drawn from the measured rows alone. Every figure states its
preset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import InputError
from interp.plotting import PALETTE, REFERENCE, SEQUENTIAL, figure, to_float32, token_axis
from interp.results import Result
from interp.sinks.bigram_published import CURVE, CURVE_COLUMNS
from interp.sinks.bigram_settings import PRESETS, toy_settings
from interp.tokens import for_plotly

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["compare_toys", "intervene_toy", "toy_attention", "toy_characters", "train_toy"]

_COLORS = {"start": PALETTE[1], "trigger": PALETTE[0], "other": PALETTE[2], "bigram": PALETTE[2], "rest": REFERENCE}
_NAMES = {"start": "position 0", "trigger": "triggers", "other": "other characters", "bigram": "all but triggers"}
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
# Panel: title, vertical axis, quantity → groups, column of the published curve → the group whose colour it takes.
_PANELS: tuple[tuple[str, str, dict[str, tuple[str, ...]], dict[str, str]], ...] = (
    ("Risk", "nats", {"risk": ("trigger", "bigram")}, {"backcopy_risk": "trigger", "bigram_risk": "bigram"}),
    ("Attention on position 0", "weight", {"sink_mass": ("trigger", "other")}, {"mass": "other"}),
    ("Δlogit of position 0", "q·k/√d", {"delta_logit": ("trigger", "other")}, {"delta_logit": "other"}),
    ("Value norm", "‖W_O v‖", {"value_norm": ("start", "trigger", "other")}, {"value_norm": "start"}),
    ("Residual norm", "‖x‖", {"residual_norm": ("start", "trigger", "other")}, {}),
    ("Attention on the character before", "weight", {"previous_mass": ("trigger", "other")}, {}),
)


def train_toy(result: Result, published: bool = True) -> go.Figure:
    """How risks, attention, values and residuals develop; colour is the kind of token, dashes are blocks.

    Args:
        result: what `train_toy` gave.
        published: whether to add the published curve of the paper's preset, where the model has one block.
    """
    from plotly.subplots import make_subplots

    settings = result.provenance.parameters
    drawn = make_subplots(
        rows=2,
        cols=3,
        subplot_titles=[panel[0] for panel in _PANELS],
        figure=figure("Bigram-Backcopy: training", "", "", subtitle=describe(settings, result.provenance.seed)),
    )
    shown: set[str] = set()
    beside = published and len(settings["blocks"]) == 1 and settings["attention"] == "softmax"
    for index, (_, unit, quantities, columns) in enumerate(_PANELS):
        row, column = index // 3 + 1, index % 3 + 1
        for quantity, groups in quantities.items():
            for group in groups:
                for layer, rows in _lines(result.frame, quantity, group):
                    name = _NAMES[group if group != "bigram" else "other"]
                    drawn.add_scatter(
                        x=_step_axis(rows["step"]),
                        y=to_float32(rows["value"]),
                        mode="lines",
                        line={"color": _COLORS[group], "dash": _DASHES[max(0, layer) % len(_DASHES)]},
                        name=name if layer < 1 else f"{name}, block {layer}",
                        legendgroup=f"{name}{max(0, layer)}",
                        showlegend=f"{name}{max(0, layer)}" not in shown,
                        hovertemplate=f"step %{{x}}: %{{y:.4g}}<extra>{name}, block {max(0, layer)}</extra>",
                        row=row,
                        col=column,
                    )
                    shown.add(f"{name}{max(0, layer)}")
        if quantities.keys() == {"risk"}:
            entropy = result.frame[(result.frame["quantity"] == "entropy") & (result.frame["group"] == "bigram")]
            drawn.add_hline(
                y=float(entropy["value"].iloc[0]), line_dash="dot", line_color=REFERENCE, row=row, col=column
            )
        for name, group in columns.items() if beside else ():
            _add_published(drawn, name, _COLORS[group], row, column, "published" not in shown)
            shown.add("published")
        drawn.update_yaxes(title_text=unit, row=row, col=column)
    drawn.update_xaxes(type="log", title_text="step (0 at the left edge)", dtick=1)
    drawn.update_layout(height=740, margin={"t": 115}, legend={"orientation": "h", "y": -0.13})
    return drawn


def compare_toys(
    result: Result, panels: Sequence[tuple[str, str]] = (("sink_mass", "other"), ("value_norm", "start"))
) -> go.Figure:
    """One quantity per panel over training, a colour per arm, a line per seed.

    Args:
        result: what `compare_toys` gave.
        panels: (quantity, group) of each, such as ("residual_norm", "start"); of several blocks the last one is drawn.

    Raises:
        InputError: a panel that the result does not have.
    """
    from plotly.subplots import make_subplots

    about = result.provenance.parameters
    seeds = f"{len(about['seeds'])} seed(s), a line each"
    common = _common(list(about["arms"].values()))
    drawn = make_subplots(
        rows=1,
        cols=len(panels),
        subplot_titles=[f"{quantity.replace('_', ' ')}: {_NAMES.get(group, group)}" for quantity, group in panels],
        figure=figure(
            "Bigram-Backcopy: runs that differ in one setting",
            "",
            "",
            subtitle=f"{describe({'preset': about['preset'], **common})}; {seeds}",
        ),
    )
    for column, (quantity, group) in enumerate(panels, 1):
        found = False
        for index, arm in enumerate(result.frame["arm"].cat.categories):
            for seed, run in result.frame[result.frame["arm"] == arm].groupby("seed"):
                lines = _lines(run, quantity, group)
                if not lines:
                    continue
                found = True
                layer, rows = lines[-1]
                drawn.add_scatter(
                    x=_step_axis(rows["step"]),
                    y=to_float32(rows["value"]),
                    mode="lines",
                    line={"color": PALETTE[index % len(PALETTE)], "dash": _DASHES[index // len(PALETTE)]},
                    name=for_plotly(str(arm), inner=False),
                    legendgroup=str(index),
                    showlegend=column == 1 and seed == about["seeds"][0],
                    hovertemplate=f"step %{{x}}: %{{y:.4g}}<extra>seed {seed}, block {max(0, layer)}</extra>",
                    row=1,
                    col=column,
                )
        if not found:
            raise InputError(f"the result has no {quantity!r} of {group!r}; it has {_known(result.frame)}")
    drawn.update_xaxes(type="log", title_text="step (0 at the left edge)", dtick=1)
    drawn.update_yaxes(rangemode="tozero")
    drawn.update_layout(height=500, margin={"t": 115}, legend={"orientation": "h", "y": -0.25})
    return drawn


def intervene_toy(result: Result) -> go.Figure:
    """Backcopy and bigram risk with parts left out, with 95 % intervals over sequences."""
    frame = result.frame[result.frame["quantity"] == "risk"]
    n = int(frame["n"].max())
    drawn = figure(
        "Bigram-Backcopy: risks with parts of the model left out",
        "left out",
        "risk",
        y_unit="nats",
        subtitle=f"{describe(result.provenance.parameters)}; {n} sequences, 95 % bootstrap intervals",
    )
    for group, name in (("trigger", "backcopy (at triggers)"), ("bigram", "bigram (elsewhere)")):
        rows = frame[frame["group"] == group]
        drawn.add_bar(
            x=[for_plotly(str(one), inner=False) for one in rows["intervention"]],
            y=to_float32(rows["value"]),
            error_y={
                "type": "data",
                "array": to_float32(rows["high"] - rows["value"]),
                "arrayminus": to_float32(rows["value"] - rows["low"]),
            },
            name=name,
            marker_color=_COLORS[group],
            hovertemplate=f"%{{x}}: %{{y:.4g}}<extra>{name}</extra>",
        )
    return drawn


def toy_characters(result: Result, layer: int | None = None, head: int = 0) -> go.Figure:
    """Attention on position 0 and value norm of every character that the sample has.

    Args:
        result: what `toy_characters` gave.
        layer: by default the first that has attention.
        head: which head.
    """
    frame = result.frame
    layer = int(frame["layer"].min()) if layer is None else layer
    frame = frame[(frame["layer"] == layer) & (frame["head"] == head)]
    if frame.empty:
        raise InputError(f"no attention in block {layer}, head {head}")
    drawn = figure(
        f"Bigram-Backcopy: attention on position 0 and value, character by character (block {layer}, head {head})",
        "attention of this character's queries on position 0",
        "‖W_O v‖ of this character's keys",
        x_unit="weight",
        subtitle=describe(result.provenance.parameters),
    )
    for norm in frame.loc[frame["group"] == "start", "value_norm"]:  # a line: its own query sees nothing else
        drawn.add_hline(y=norm, line_dash="dot", line_color=_COLORS["start"], annotation_text="⟨s⟩ as a key")
    for group, symbol in (("trigger", "square"), ("other", "circle")):
        rows = frame[frame["group"] == group]
        drawn.add_scatter(
            x=to_float32(rows["sink_mass"]),
            y=to_float32(rows["value_norm"]),
            mode="markers+text",
            text=[for_plotly(character) for character in rows["character"]],
            textposition="top center",
            marker={"color": _COLORS[group], "symbol": symbol, "size": 10},
            customdata=rows[["n"]].to_numpy(),
            name=_NAMES[group],
            hovertemplate="%{text}: weight %{x:.3f}, norm %{y:.2f}, n = %{customdata[0]}<extra></extra>",
        )
    drawn.update_xaxes(range=[-0.04, 1.04])
    drawn.update_yaxes(rangemode="tozero")
    return drawn


def toy_attention(result: Result, layer: int | None = None, head: int = 0, positions: int = 40) -> go.Figure:
    """Attention weights of one sequence, as the model computed them.

    Args:
        result: what `toy_attention` gave.
        layer: by default the first that has attention.
        head: which head.
        positions: how many, from the first.
    """
    import plotly.graph_objects as go

    frame = result.frame
    layer = int(frame["layer"].min()) if layer is None else layer
    frame = frame[(frame["layer"] == layer) & (frame["head"] == head) & (frame["query"] < positions)]
    if frame.empty:
        raise InputError(f"no attention in block {layer}, head {head}")
    size = int(frame["query"].max()) + 1
    weights = np.full((size, size), np.nan, dtype=np.float32)
    weights[frame["query"], frame["key"]] = frame["weight"]
    characters = frame[frame["key"] == 0].sort_values("query")["query_character"].tolist()
    drawn = figure(
        f"Bigram-Backcopy: attention of one sequence (block {layer}, head {head})",
        "key",
        "query",
        subtitle=describe(result.provenance.parameters),
    )
    drawn.add_trace(
        go.Heatmap(
            z=weights,
            colorscale=SEQUENTIAL,
            zmin=0,
            colorbar={"title": {"text": "weight"}},
            hovertemplate="query %{y}, key %{x}: %{z:.3f}<extra></extra>",
        )
    )
    drawn.update_xaxes(token_axis(characters))
    drawn.update_yaxes(autorange="reversed", **token_axis(characters))
    drawn.update_layout(height=640)
    return drawn


def describe(settings: Mapping[str, Any], seed: int | None = None) -> str:
    """The preset in words, and what differs from it.

    Example:
        >>> describe({"preset": "laptop", "steps": 50}, 3)
        'preset laptop with steps=50; seed 3'
    """
    preset = settings.get("preset")
    if preset not in PRESETS:
        return "preset not stated"
    usual = asdict(toy_settings(preset))
    usual["blocks"] = list(usual["blocks"])
    changed = [
        f"{name}={'+'.join(value) if isinstance(value, list) else value}"
        for name, value in settings.items()
        if name in usual and value != usual[name]
    ]
    text = f"preset {preset}" + (f" with {', '.join(changed)}" if changed else "")
    return text if seed is None else f"{text}; seed {seed}"


def _lines(frame: pd.DataFrame, quantity: str, group: str) -> list[tuple[int, pd.DataFrame]]:
    """(layer, rows by step) of head 0 or of the block; layer −1 where there is none."""
    rows = frame[(frame["quantity"] == quantity) & (frame["group"] == group)]
    rows = rows[rows["head"].isna() | (rows["head"] == 0)]
    layers = rows["layer"].fillna(-1).astype(int)
    return [(int(layer), rows[layers == layer].sort_values("step")) for layer in sorted(layers.unique())]


def _step_axis(steps: Any) -> np.ndarray:
    """Steps for a logarithmic axis: 0 has no place there and is drawn at 0.7."""
    return np.maximum(to_float32(steps), 0.7)


def _add_published(drawn: go.Figure, column: str, color: str, row: int, col: int, legend: bool) -> None:
    values = np.array(CURVE)
    drawn.add_scatter(
        x=_step_axis(values[:, 0]),
        y=to_float32(values[:, CURVE_COLUMNS.index(column)]),
        mode="markers",
        marker={"color": color, "symbol": "x", "size": 9, "line": {"width": 1, "color": "#000000"}},
        name="published (preset paper)",
        legendgroup="published",
        showlegend=legend,
        hovertemplate="step %{x}: %{y:.4g}<extra>published</extra>",
        row=row,
        col=col,
    )


def _common(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """What all arms share."""
    return {name: value for name, value in settings[0].items() if all(one[name] == value for one in settings)}


def _known(frame: pd.DataFrame) -> str:
    pairs = frame[["quantity", "group"]].astype(str).drop_duplicates()
    return ", ".join(f"{quantity} of {group}" for quantity, group in pairs.itertuples(index=False))
