"""The text itself, its tokens coloured by their influence on a target. `Result -> plotly Figure`.

What a pointer shows is the value itself. Colours of several methods are each divided by their method's largest value,
because an exact flow is of order 1 where a widest path may be of order .01; only ratios to uniform attention
(correction "uniform") share one scale, in powers of 2 around 1. What has no value (dropped sinks) is hatched.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from interp.errors import InputError
from interp.plotting import CELLS, DIVERGING, PALETTE, figure, for_plotly, text_color, to_float32
from interp.results import Result
from interp.tokens import visible

LIGHT = ((0.0, "#FFFFFF"), (1.0, PALETTE[0]))  # text stays readable on what has little influence
GREY = "#D0D0D0"
HATCHED = {"shape": "/", "bgcolor": GREY, "fgcolor": "#888888", "size": 6, "solidity": 0.2}
VALUED, GONE = "valued", "no value: removed as a sink"
_BOXES = CELLS // 25  # a token's box is some 25 numbers and a few strings
_LONGEST = 40  # characters of a token that its box shows
_MONOSPACE = "ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace"


def coloured_text(
    result: Result,
    text: int = 0,
    target: int | None = None,
    methods: Sequence[str] | str | None = None,
    *,
    width: int = 84,
) -> Any:
    """The text, wrapped into lines, each token coloured by its influence on a target; methods below each other.

    Args:
        result: what `interp.flow.attention_flow` gave.
        text: which of its texts, from 0.
        target: a position at the top, negative ones count from the end; the last of the result by default.
        methods: which, in order; all by default.
        width: characters in a line.

    Returns:
        One box per source and method, the target's outlined. Where sources are groups, a box is a group.

    Raises:
        InputError: no such text, method or target, more tokens than a figure carries, or a width below 1.
    """
    check_width(width)
    chosen, tokens = of_text(result, text, methods)
    position = _target(chosen, len(tokens), target)
    chosen = chosen[chosen["target"] == position]
    measures = {name: _boxes(rows, tokens) for name, rows in chosen.groupby("measure", sort=False)}
    check_boxes(sum(len(boxes) for boxes in measures.values()))
    scale = _scale(chosen)
    drawn = figure("", "", "")
    outlined = "; the target is outlined" if position in set(chosen["source"]) else ""
    title = f"Influence on “{short(tokens[position])}” (position {position}) through attention"
    headline(drawn, title + which(result, text), settings_of(result) + outlined)
    line, ticks = 0.0, []
    for name, boxes in measures.items():
        top = float(boxes["flow"].max())
        ticks.append((line, f"{for_plotly(str(name), inner=False)}<br>largest {top:.3g}"))
        placed = wrap(boxes["token"], width).assign(shade=scale.shade(boxes["flow"], top))
        placed["line"] += line
        for kind, where in boxes.groupby("kind", sort=False).groups.items():
            bars = _bars(boxes.loc[where], placed.loc[where], str(kind), str(name), scale, position)
            bars.showlegend = kind == GONE and not any(trace.showlegend for trace in drawn.data)
            drawn.add_trace(bars)
        line = float(placed["line"].max()) + 1.6
    arrange(drawn, line, width, ticks, scale.axis)
    return drawn


@dataclass(frozen=True)
class _Scale:
    """How values become colours.

    Attributes:
        axis: the layout's colour axis.
        kind: "value", "relative" (to the largest of the method) or "ratio" (its logarithm).
    """

    axis: dict[str, Any]
    kind: str = "value"

    def shade(self, flow: pd.Series, largest: float) -> np.ndarray:
        """Values as places on the axis."""
        if self.kind == "ratio":
            return powers_of_two(flow, self.axis["cmax"])
        return to_float32(flow / largest if self.kind == "relative" and largest > 0 else flow)

    def text_color(self, shade: float) -> str:
        """Black or white: readable on the shade, and white on the saturated blues."""
        at = (shade - self.axis["cmin"]) / (self.axis["cmax"] - self.axis["cmin"])
        return text_color(self.axis["colorscale"], at)


def _scale(chosen: pd.DataFrame) -> _Scale:
    """Ratios to uniform attention and one measure: their own values; several measures: each divided by its largest."""
    if (chosen["correction"] == "uniform").all():
        return _Scale(ratio_axis(chosen["flow"], "× uniform<br>attention"), "ratio")
    single = chosen["measure"].nunique() == 1
    largest = float(np.nanmax(chosen["flow"].to_numpy(float), initial=0.0)) if single else 1.0
    unit = "influence<br>[attention]" if single else "influence /<br>largest of<br>its method"
    axis = {
        "colorscale": [list(stop) for stop in LIGHT],
        "cmin": 0,
        "cmax": largest or 1.0,
        "colorbar": {"title": {"text": unit}, "thickness": 14},
    }
    return _Scale(axis, "value" if single else "relative")


def ratio_axis(values: Any, unit: str) -> dict[str, Any]:
    """A colour axis of ratios: blue below 1, white at 1, orange above, in powers of 2; at most 2¹⁰ from 1."""
    ratios = np.asarray(values, float)
    positive = ratios[np.isfinite(ratios) & (ratios > 0)]
    limit = min(10, int(np.ceil(np.abs(np.log2(positive)).max(initial=1.0))))
    step = -(-limit // 3)
    ticks = range(-(limit // step) * step, limit + 1, step)
    return {
        "colorscale": [list(stop) for stop in DIVERGING],
        "cmin": -limit,
        "cmax": limit,
        "colorbar": {
            "title": {"text": unit},
            "thickness": 14,
            "tickvals": list(ticks),
            "ticktext": [str(2**tick) if tick >= 0 else f"1/{2**-tick}" for tick in ticks],
        },
    }


def powers_of_two(values: Any, limit: float) -> np.ndarray:
    """Logarithms to base 2, cut off at the ends of the colours; a ratio of 0 is at the lower end."""
    with np.errstate(divide="ignore"):
        return to_float32(np.clip(np.log2(np.asarray(values, float)), -limit, limit))


def _bars(boxes: pd.DataFrame, placed: pd.DataFrame, kind: str, name: str, scale: _Scale, target: int) -> Any:
    """The boxes of one kind as one trace."""
    outlined = (boxes["source"] == target).to_numpy()
    marker: dict[str, Any] = {
        "line": {
            "width": np.where(outlined, 2.5, 0.5).tolist(),
            "color": np.where(outlined, "#000000", "#BBBBBB").tolist(),
        }
    }
    value, colors = kind, ["#555555"] * len(boxes)
    if kind == VALUED:
        marker |= {"color": to_float32(placed["shade"]), "coloraxis": "coloraxis"}
        value, colors = "%{customdata:.4g}", [scale.text_color(shade) for shade in placed["shade"]]
    elif kind == GONE:
        marker |= {"pattern": HATCHED}
    else:
        marker |= {"color": "#FFFFFF"}
    return box_trace(
        placed,
        boxes["token"].tolist(),
        colors,
        marker=marker,
        customdata=to_float32(boxes["flow"]),
        hovertext=[f"{at}: {for_plotly(token)}" for at, token in zip(boxes["source"], boxes["token"], strict=True)],
        hovertemplate=f"%{{hovertext}}<br>{value}<extra>{for_plotly(name, inner=False)}</extra>",
        name=kind,
    )


def _boxes(rows: pd.DataFrame, tokens: list[str]) -> pd.DataFrame:
    """Source, token, flow and kind of every box: the text's tokens, or the sources where these are groups."""
    rows = rows.drop_duplicates(["source", "source_token"]).sort_values("source", kind="stable")
    kind = np.where(rows["flow"].isna(), GONE, VALUED)
    boxes = pd.DataFrame({"source": rows["source"], "token": rows["source_token"], "flow": rows["flow"], "kind": kind})
    if [tokens[at] for at in boxes["source"]] != boxes["token"].tolist():
        return boxes.reset_index(drop=True)
    whole = boxes.set_index("source").reindex(range(len(tokens))).assign(token=tokens)
    return whole.fillna({"kind": "not asked for"}).rename_axis("source").reset_index()


def box_trace(placed: pd.DataFrame, tokens: Sequence[str], colors: list[str], **settings: Any) -> Any:
    """Boxes with their tokens inside, as one trace.

    Args:
        placed: start, size and line of every box, see `wrap`.
        tokens: escaped here.
        colors: of the tokens' text.
        **settings: the trace's: marker, hover text, name.
    """
    import plotly.graph_objects as go

    return go.Bar(
        orientation="h",
        base=to_float32(placed["start"]),
        x=to_float32(placed["size"]),
        y=to_float32(placed["line"]),
        width=0.9,
        text=[for_plotly(short(token)) for token in tokens],
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        insidetextfont={"color": colors, "family": _MONOSPACE, "size": 14},
        constraintext="inside",
        **settings,
    )


def arrange(drawn: Any, lines: float, width: int, ticks: list[tuple[float, str]], coloraxis: dict[str, Any]) -> None:
    """Axes and height of a figure of boxes.

    Args:
        drawn: the figure; it is changed.
        lines: how many lines of boxes and gaps it has.
        width: characters in a line.
        ticks: (line, escaped label) of what stands left of the boxes.
        coloraxis: of the boxes.
    """
    bottom = max(lines, 5.0)
    drawn.update_layout(
        barmode="overlay",
        bargap=0,
        height=int(150 + 27 * bottom),
        margin={"t": 90, "b": 20},
        coloraxis=coloraxis,
        legend={"orientation": "h", "y": 0, "yanchor": "top"},
    )
    drawn.update_xaxes(visible=False, range=[0, width + 1])
    drawn.update_yaxes(
        range=[bottom - 0.9, -0.7],
        tickvals=[at for at, _ in ticks],
        ticktext=[label for _, label in ticks],
        showgrid=False,
        zeroline=False,
        showline=False,
        tickcolor="white",
    )


def check_boxes(n: int) -> None:
    """Refuses more boxes than a figure carries, with both figures."""
    if n > _BOXES:
        raise InputError(
            f"{n:,} tokens to draw, and a figure carries at most {_BOXES:,}: choose fewer methods or a shorter text"
        )


def check_width(width: int) -> None:
    """Refuses lines without room."""
    if width < 1:
        raise InputError(f"width={width}; expected at least 1 character in a line")


def wrap(tokens: pd.Series, width: int) -> pd.DataFrame:
    """Where boxes go, in characters and lines: start, size, line. A line ends after a line break too."""
    places, column, row = [], 0, 0
    for token in tokens:
        size = min(width, _columns(short(token)) + 1)
        if column + size > width:
            column, row = 0, row + 1
        places.append((column, size, float(row)))
        column = width if token.endswith("\n") else column + size
    return pd.DataFrame(places, columns=["start", "size", "line"], index=tokens.index)


def _columns(token: str) -> int:
    """Columns that a token takes in a monospaced font."""
    wide = {"W": 2, "F": 2}
    return sum(
        0 if unicodedata.combining(one) else wide.get(unicodedata.east_asian_width(one), 1) for one in visible(token)
    )


def short(token: str) -> str:
    """A token, its end cut off where it is very long."""
    return token if len(token) <= _LONGEST else token[: _LONGEST - 1] + "…"


def of_text(result: Result, text: int, methods: Sequence[str] | str | None) -> tuple[pd.DataFrame, list[str]]:
    """The rows of a text with a column "measure", method and correction, and its tokens."""
    texts = result.attachments["tokens"]
    if isinstance(text, bool) or not hasattr(text, "__index__") or not 0 <= text < len(texts):
        raise InputError(f"text={text!r}; the result has {len(texts)} texts: expected 0 … {len(texts) - 1}")
    rows = result.frame[result.frame["text"] == text]
    rows = rows.astype({"method": str, "correction": str, "target_token": str, "source_token": str})
    found = list(dict.fromkeys(rows["method"]))
    chosen = found if methods is None else [methods] if isinstance(methods, str) else list(methods)
    unknown = [name for name in chosen if name not in found]
    if unknown or not chosen:
        raise InputError(f"no method {unknown[0] if unknown else ''!r} in this result; it has {', '.join(found)}")
    rows = pd.concat([rows[rows["method"] == name] for name in chosen])
    corrected = rows["correction"] != "none"
    return rows.assign(measure=rows["method"].where(~corrected, rows["method"] + ", " + rows["correction"])), texts[
        text
    ]


def _target(rows: pd.DataFrame, length: int, target: int | None) -> int:
    found = list(dict.fromkeys(rows["target"]))
    if target is None:
        return int(found[-1])
    at = target + length if target < 0 else target
    if at not in found:
        shown = ", ".join(map(str, found[:8])) + (", …" if len(found) > 8 else "")
        raise InputError(f"no target {target} in this result; it has {shown}")
    return int(at)


def which(result: Result, text: int) -> str:
    """The number of a text among several, for a title."""
    return f" (text {text})" if len(result.attachments["tokens"]) > 1 else ""


def headline(drawn: Any, title: str, *lines: str) -> None:
    """Title, plain text that is escaped here, and lines of a subtitle that are escaped already."""
    drawn.update_layout(title_text=for_plotly(title, inner=False), title_subtitle_text="<br>".join(lines))


def named(position: int, token: str) -> str:
    """A token with its position, for a label."""
    return f"{position} {for_plotly(short(token))}"


def settings_of(result: Result) -> str:
    """The model and how its graph was made, escaped."""
    made = result.provenance.parameters
    heads = "contributions" if made.get("capacity") == "contribution" else f"heads {made.get('heads', '?')}"
    layers = counted(int(made["n_layers"]), "layer")
    parts = f"{result.provenance.model or 'a pattern'}; {layers}, {heads}, residual {made.get('residual', '?')}"
    return for_plotly(parts, inner=False)


def percent(share: float) -> str:
    """A share with one decimal, rounded down: 100 % is all."""
    return f"{math.floor(share * 1000 + 1e-6) / 10:g} %"


def counted(n: int, what: str) -> str:
    """A number and its noun."""
    return f"{n:,} {what}{'s' * (n != 1)}"
