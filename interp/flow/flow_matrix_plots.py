"""Influence of every token on every target: a target × source matrix per method. `Result -> plotly Figure`.

Every matrix has a colour scale of its own, from 0 to its largest value, because methods differ by orders of magnitude;
ratios to uniform attention (correction "uniform") are in powers of 2 around 1. What has no value (dropped sinks) is
grey; under causal attention what lies behind a target is left white.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from interp.flow.flow_text_plots import (
    GONE,
    GREY,
    coloured_text,
    headline,
    named,
    of_text,
    powers_of_two,
    ratio_axis,
    settings_of,
    which,
)
from interp.plotting import SEQUENTIAL, cap_cells, figure, for_plotly, to_float32, token_axis
from interp.results import Result

_LABELS = 48  # tokens that an axis can name, each with its label


def attention_flow(
    result: Result, text: int = 0, methods: Sequence[str] | str | None = None, target: int | None = None
) -> Any:
    """Influence by method: a target × source matrix each, or, for one target, the text coloured by influence.

    Args:
        result: what `interp.flow.attention_flow` gave.
        text: which of its texts, from 0.
        methods: which, in order; all by default.
        target: a position whose text is coloured though there are several; negative ones count from the end.

    Returns:
        Every matrix with a colour scale of its own, from 0 to its largest value; see `coloured_text` for one target.

    Raises:
        InputError: no such text, method or target, or more cells than a figure carries.
    """
    chosen, tokens = of_text(result, text, methods)
    if target is None and chosen["target"].nunique() > 1:
        return _matrices(result, chosen, tokens, text)
    return coloured_text(result, text, target, methods)


def _matrices(result: Result, chosen: pd.DataFrame, tokens: list[str], text: int) -> Any:
    """One target × source heatmap per measure."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    sources = list(dict.fromkeys(zip(chosen["source"], chosen["source_token"], strict=True)))
    targets = sorted(set(chosen["target"]))
    measures = {str(name): _matrix(rows, targets, sources) for name, rows in chosen.groupby("measure", sort=False)}
    cap_cells(np.stack([matrix.to_numpy() for matrix in measures.values()]))
    columns = min(2, len(measures))
    rows = -(-len(measures) // columns)
    height = max(260, min(620, 20 + 17 * len(targets)))  # of a matrix, in pixels
    drawn = make_subplots(
        rows,
        columns,
        subplot_titles=[for_plotly(name, inner=False) for name in measures],
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.12,
        vertical_spacing=50 / (rows * height + (rows - 1) * 50) if rows > 1 else 0,
    )
    x, y = _axis(sources), _axis([(at, tokens[at]) for at in targets])
    causal = bool((chosen.loc[chosen["source"] > chosen["target"], "flow"].fillna(0) == 0).all())
    behind = np.array([[causal and source > target for source, _ in sources] for target in targets])
    gaps = False
    for at, (name, matrix) in enumerate(measures.items()):
        row, column = at // columns + 1, at % columns + 1
        across, along = (getattr(drawn.get_subplot(row, column), axis).domain for axis in ("xaxis", "yaxis"))
        bar = {
            "x": across[1] + 0.005,
            "xanchor": "left",
            "y": (along[0] + along[1]) / 2,
            "len": (along[1] - along[0]) * 1.02,
            "thickness": 12,
        }
        ratio = bool((chosen.loc[chosen["measure"] == name, "correction"] == "uniform").all())
        values = np.where(behind, np.nan, matrix)
        removed = matrix.isna().to_numpy() & ~behind
        gaps = gaps or bool(removed.any())
        places = {"x": x.places, "y": y.places, "hoverongaps": False}
        drawn.add_trace(
            go.Heatmap(
                **places,
                **_colors(values, ratio, bar),
                customdata=to_float32(values),
                hovertemplate="source %{x}<br>target %{y}<br>%{customdata:.4g}"
                f"<extra>{for_plotly(name, inner=False)}</extra>",
            ),
            row,
            column,
        )
        if removed.any():
            drawn.add_trace(
                go.Heatmap(
                    **places,
                    z=to_float32(np.where(removed, 1, np.nan)),
                    colorscale=[[0, GREY], [1, GREY]],
                    showscale=False,
                    hovertemplate=f"source %{{x}}<br>target %{{y}}<extra>{GONE}</extra>",
                ),
                row,
                column,
            )
    look = figure("", "", "")
    about = settings_of(result) + ("; grey: no value, a removed sink" if gaps else "")
    headline(look, f"Influence of tokens on tokens through attention{which(result, text)}", about)
    drawn.update_layout(
        template=look.layout.template,
        title=look.layout.title,
        margin={"t": 110},
        height=110 + rows * height + (rows - 1) * 50 + 130,
    )
    drawn.update_xaxes(showgrid=False, zeroline=False, tickangle=-60, **x.settings)
    drawn.update_yaxes(showgrid=False, zeroline=False, **y.settings)
    drawn.update_yaxes(autorange="reversed")
    for column in range(1, columns + 1):
        lowest = rows - (column == 2 and len(measures) % 2)  # nothing is below the second where their number is odd
        drawn.update_xaxes(title_text="source (token of the input)", showticklabels=True, row=lowest, col=column)
    for row in range(1, rows + 1):
        drawn.update_yaxes(title_text="target (position at the top)", row=row, col=1)
    return drawn


def _colors(values: np.ndarray, ratio: bool, bar: dict[str, Any]) -> dict[str, Any]:
    """A heatmap's cells, colours and colour bar."""
    if ratio:
        axis = ratio_axis(values, "× uniform")
        return {
            "z": powers_of_two(values, axis["cmax"]),
            "zmin": axis["cmin"],
            "zmax": axis["cmax"],
            "colorscale": axis["colorscale"],
            "colorbar": axis["colorbar"] | bar,
        }
    return {
        "z": to_float32(values),
        "zmin": 0,
        "zmax": float(np.nanmax(values, initial=0.0)) or 1.0,
        "colorscale": SEQUENTIAL,
        "colorbar": {"title": {"text": "attention", "font": {"size": 12}}} | bar,
    }


@dataclass(frozen=True)
class _Axis:
    """Where the cells of an axis are, and its settings."""

    places: Any
    settings: dict[str, Any]


def _axis(tokens: list[tuple[int, str]]) -> _Axis:
    """Every token named, or, where there are too many, as many as fit; what a pointer shows names all."""
    labels = [named(at, token) for at, token in tokens]
    if len(tokens) <= _LABELS:
        settings = token_axis([""] * len(tokens)) | {"ticktext": labels, "tickfont": {"size": 11}}
        return _Axis(list(range(len(tokens))), settings)
    # Labels are unlike each other and no numbers: plotly leaves out what does not fit.
    unique = labels if len(set(labels)) == len(labels) else [f"{label} ({at})" for at, label in enumerate(labels)]
    return _Axis(unique, {"type": "category", "tickfont": {"size": 10}})


def _matrix(rows: pd.DataFrame, targets: list[int], sources: list[tuple[int, str]]) -> pd.DataFrame:
    """(target, source); what was asked for twice once."""
    keys = ["target", "source", "source_token"]
    matrix = rows.drop_duplicates(keys).pivot(index="target", columns=keys[1:], values="flow")
    return matrix.reindex(index=targets, columns=pd.MultiIndex.from_tuples(sources))
