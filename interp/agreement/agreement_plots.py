"""How far every two methods agree, beside what chance gives and their ceiling. `Result -> plotly Figure`.

Methods are drawn by side: attention, attribution, baseline, custom. White in the map is what chance gives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from interp.agreement.method_looks import MEASURE_NAMES, by_side, headline, measure_name, plain, subtitle
from interp.agreement.methods import side_of
from interp.agreement.pairs import KIND, matrix
from interp.agreement.rankings import MEASURES
from interp.errors import InputError
from interp.plotting import DIVERGING, PALETTE, REFERENCE, cap_cells, error_bars, figure, text_color, to_float32
from interp.results import Result

# Kinds of pairs, most interesting first: a baseline or a ranking of the user's own makes its pair one of theirs.
_PAIRS = {
    "attention – attention": (PALETTE[0], "circle"),
    "attention – attribution": (PALETTE[3], "star"),
    "attribution – attribution": (PALETTE[1], "square"),
    "with a custom ranking": (PALETTE[2], "diamond"),
    "with a baseline": (REFERENCE, "x"),
}
_PAIRS_SHOWN = 40
_ANNOTATED = 40  # methods up to which a cell has room for its number
_GREY = "#D0D0D0"
_COLUMNS = ("mean", "low", "high", "n", "n_nan", "chance", "ceiling")


def pairwise_agreement(result: Result, measure: str | None = None, k: int = 0) -> Any:
    """Every method against every other: the mean over examples, white where it is what chance gives.

    Args:
        result: what `interp.agreement.pairwise_agreement` gave.
        measure: one that it holds; by default "kendall", or its first where it holds none of that.
        k: of a measure at k; by default the first that it holds.

    Returns:
        A symmetric map, methods grouped by side. On the diagonal a method meets itself under another seed.

    Raises:
        InputError: another kind of result, it does not hold the measure or the k, or more cells than a figure carries.
    """
    import plotly.graph_objects as go

    measure, k = _chosen(result, measure, k)
    squares = {column: matrix(result, measure, k, column) for column in _COLUMNS}
    names = by_side(list(squares["mean"].columns))
    values = np.stack([squares[column].loc[names, names].to_numpy(float) for column in _COLUMNS], axis=-1)
    about = cap_cells(values)  # (method, method, column)
    mean, size = values[..., 0], len(names)
    apart = values[..., 5][~np.eye(size, dtype=bool)]
    chance = float(apart[np.isfinite(apart)].mean()) if np.isfinite(apart).any() else 0.0
    low = MEASURES[measure].low
    colors = _around(chance, low)
    level = _level(result)
    numbers = (
        f"mean %{{customdata[0]:.3f}}, {level} interval %{{customdata[1]:.3f}} … %{{customdata[2]:.3f}}<br>"
        "%{customdata[3]:d} examples, %{customdata[4]:d} without a number<br>"
        "by chance %{customdata[5]:.3f}, ceiling %{customdata[6]:.3f}<extra></extra>"
    )
    drawn = figure("", "", "")
    places = list(range(size))
    drawn.add_trace(
        go.Heatmap(
            z=about[..., 0],
            x=places,
            y=places,
            zmin=low,
            zmax=1,
            colorscale=colors,
            colorbar={"title": {"text": f"mean<br>{plain(_short(measure))}"}, "thickness": 14, "x": 1.03},
            customdata=about,
            hovertemplate="%{y}<br>%{x}<br>" + numbers,
            hoverongaps=False,
        )
    )
    missing = ~np.isfinite(mean)
    if missing.any():
        drawn.add_trace(
            go.Heatmap(
                z=to_float32(np.where(missing, 1, np.nan)),
                x=places,
                y=places,
                colorscale=[[0, _GREY], [1, _GREY]],
                showscale=False,
                customdata=about[..., 3:5],
                hovertemplate="%{y}<br>%{x}<br>no number on %{customdata[1]:d} examples<extra></extra>",
                hoverongaps=False,
            )
        )
    if size <= _ANNOTATED:
        drawn.add_trace(_numbers(mean, low, colors))
    _groups(drawn, names)
    spread = " (mean over pairs)" if (np.abs(apart - chance) > 5e-3).any() else ""
    notes = [f"white: by chance {chance:.2f}{spread}; diagonal: a method with itself under another seed"]
    notes += ["grey: no number (constant, failed or one seed)"] if missing.any() else []
    title = f"Agreement of methods: {measure_name(measure, k)}"
    headline(drawn, title, subtitle(result, "; ".join(notes)), 290 + 30 * max(size, 6), room=20)
    labels = {"tickvals": places, "ticktext": [plain(name) for name in names], "showgrid": False, "zeroline": False}
    labels["tickfont"] = {"size": 12 if size <= _ANNOTATED else 9}
    drawn.update_xaxes(tickangle=-45, range=[-0.5, size - 0.5], **labels)
    drawn.update_yaxes(range=[size - 0.5, -0.5], **labels)
    return drawn


def against_chance(result: Result, measure: str | None = None, k: int = 0, *, pairs: int = _PAIRS_SHOWN) -> Any:
    """Pairs of methods by their mean agreement, each with its interval, what chance gives, and its ceiling.

    Args:
        result: what `interp.agreement.pairwise_agreement` gave.
        measure, k: as `pairwise_agreement`.
        pairs: how many at most; of more the highest and the lowest.

    Raises:
        InputError: as `pairwise_agreement`; fewer than two pairs to show, or no pair with a number.
    """
    import plotly.graph_objects as go

    if pairs < 2:
        raise InputError(f"pairs={pairs}; expected at least 2: the highest and the lowest")
    measure, k = _chosen(result, measure, k)
    frame = result.frame.astype({"measure": str, "method_a": str, "method_b": str})
    rows = frame[(frame["measure"] == measure) & (frame["k"] == k) & (frame["method_a"] != frame["method_b"])]
    known = rows[rows["mean"].notna()].sort_values("mean", ascending=False, kind="stable").reset_index(drop=True)
    if known.empty:
        raise InputError(f"no two methods have a mean {measure}; see n_nan in the table of pairs")
    cut = len(known) > pairs
    top = pairs - pairs // 2
    shown = pd.concat([known.head(top), known.tail(pairs // 2)]) if cut else known
    at = np.arange(len(shown)) + np.where(np.arange(len(shown)) < top, 0, int(cut))  # an empty row parts the two ends
    which = f": {top} highest and {pairs // 2} lowest of {len(known):,}" if cut else ""
    drawn = figure("", f"mean {_short(measure)} over examples", "")
    kinds = np.array([_kind(a, b) for a, b in zip(shown["method_a"], shown["method_b"], strict=True)])
    labels = [f"{plain(a)} – {plain(b)}" for a, b in zip(shown["method_a"], shown["method_b"], strict=True)]
    for column, mark, color in (("chance", "line-ns", "#000000"), ("ceiling", "line-ns", PALETTE[4])):
        drawn.add_trace(
            go.Scatter(
                x=to_float32(shown[column]),
                y=at,
                mode="markers",
                marker={"symbol": mark, "size": 13, "line": {"width": 2.5, "color": color}},
                name={"chance": "by chance", "ceiling": "ceiling by noise"}[column],
                hoverinfo="skip",
            )
        )
    for kind, (color, symbol) in _PAIRS.items():
        here = kinds == kind
        if here.any():
            drawn.add_trace(
                go.Scatter(
                    x=to_float32(shown["mean"][here]),
                    y=at[here],
                    error_x=error_bars(shown[here], color),
                    mode="markers",
                    marker={"color": color, "symbol": symbol, "size": 8},
                    name=kind,
                    customdata=to_float32(shown.loc[here, list(_COLUMNS)]),
                    hovertemplate=f"%{{y}}<br>mean %{{x:.3f}}, {_level(result)} interval %{{customdata[1]:.3f}} … "
                    "%{customdata[2]:.3f}<br>%{customdata[3]:d} examples, %{customdata[4]:d} without a number<br>"
                    "by chance %{customdata[5]:.3f}, ceiling %{customdata[6]:.3f}",
                )
            )
    missing = len(rows) - len(known)
    notes = [f"bars: {_level(result)} interval over examples"]
    notes += [f"{missing:,} {'pair has' if missing == 1 else 'pairs have'} no number"] if missing else []
    gap = [(top, f"… {len(known) - pairs:,} between")] if cut else []
    ticks = sorted([*zip(at.tolist(), labels, strict=True), *gap])
    drawn.update_yaxes(
        tickvals=[place for place, _ in ticks],
        ticktext=[label for _, label in ticks],
        range=[ticks[-1][0] + 0.7, -0.7],
        zeroline=False,
    )
    title = f"Pairs of methods by {measure_name(measure, k)}{which}"
    headline(drawn, title, subtitle(result, "; ".join(notes)), 170 + 21 * max(len(ticks), 8))
    return drawn


def _chosen(result: Result, measure: str | None, k: int) -> tuple[str, int]:
    """The measure and k to draw; what the table does not hold is refused by `matrix`."""
    if getattr(result, "kind", None) != KIND:
        raise InputError(f"{result!r:.60}; expected what interp.agreement.pairwise_agreement gives")
    held = list(dict.fromkeys(result.frame["measure"].astype(str)))
    name = measure or ("kendall" if "kendall" in held else held[0])
    ks = [int(at) for at in result.frame.loc[result.frame["measure"] == name, "k"].unique()]
    at = ks[0] if ks and (k == 0 or ks == [0]) else k
    matrix(result, name, at)
    return name, at


def _short(measure: str) -> str:
    return MEASURE_NAMES[measure].removesuffix(" of the lists")


def _level(result: Result) -> str:
    return f"{100 * result.provenance.parameters.get('level', 0.95):.4g} %"


def _kind(a: str, b: str) -> str:
    sides = sorted({side_of(a), side_of(b)})
    for side, kind in (("baseline", "with a baseline"), ("custom", "with a custom ranking")):
        if side in sides:
            return kind
    return " – ".join(sides if len(sides) == 2 else sides * 2)


def _around(chance: float, low: float) -> list[list[Any]]:
    """Stops from a measure's lowest value to 1, white at chance; equal steps from it are equally strong on both sides."""
    ends = [int(DIVERGING[at][1][start : start + 2], 16) for at in (0, 1, 2) for start in (1, 3, 5)]
    blue, white, orange = np.array(ends, dtype=float).reshape(3, 3)
    middle = min(max((chance - low) / (1 - low), 1e-3), 1 - 1e-3)
    wider = max(middle, 1 - middle)
    stops = [(0.0, white + (blue - white) * middle / wider), (middle, white)]
    stops.append((1.0, white + (orange - white) * (1 - middle) / wider))
    return [[place, "#" + "".join(f"{round(part):02X}" for part in color)] for place, color in stops]


def _numbers(mean: np.ndarray, low: float, colors: list[list[Any]]) -> Any:
    """What stands in the cells."""
    import plotly.graph_objects as go

    rows, columns = np.indices(mean.shape).reshape(2, -1)
    values = mean.ravel()
    known = np.isfinite(values)
    return go.Scatter(
        x=columns.astype(np.float32),
        y=rows.astype(np.float32),
        mode="text",
        text=[
            f"{value + 0.0:.2f}".replace("-0.00", "0.00").replace("-", "−") if np.isfinite(value) else "–"
            for value in values
        ],
        textfont={
            "size": 12 if len(mean) <= 20 else 9,
            "color": [
                text_color(colors, (value - low) / (1 - low)) if at else "#000000"
                for value, at in zip(values, known, strict=True)
            ],
        },
        hoverinfo="skip",
        showlegend=False,
    )


def _groups(drawn: Any, names: list[str]) -> None:
    """Lines between the sides, and their names above and beside the map."""
    sides = [side_of(name) for name in names]
    line = {"color": "#222222", "width": 2}
    for side in dict.fromkeys(sides):
        first, last = sides.index(side) - 0.5, sides.index(side) + sides.count(side) - 0.5
        if first > 0:
            for axis, other in (("x", "y"), ("y", "x")):
                ends = {f"{axis}0": first, f"{axis}1": first, f"{other}0": -0.5, f"{other}1": len(names) - 0.5}
                drawn.add_shape(type="line", line=line, **ends)
        label = {"text": f"<b>{side}</b>", "showarrow": False, "font": {"size": 12}}
        drawn.add_annotation(x=(first + last) / 2, y=1, yref="paper", yanchor="bottom", **label)
        drawn.add_annotation(x=1, xref="paper", xanchor="left", y=(first + last) / 2, textangle=90, **label)
