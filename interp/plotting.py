"""Plotting: one look for every figure, and the small steps that all of them share.

Plot functions are `Result -> plotly Figure` and compute nothing. Here are their palette (Okabe and Ito, "Color
Universal Design", 2008: told apart with any colour vision), their template, axes that carry units, an interval around
a line, axes of tokens, text that reads on any colour, and the two guards that keep a figure small: float32 and a limit
on its cells.

plotly is imported when a figure is drawn.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from interp.errors import InputError
from interp.tokens import for_plotly

if TYPE_CHECKING:
    import numpy as np
    import plotly.graph_objects as go

# Okabe-Ito, strongest on white first; black is left to text and reference lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
REFERENCE = "#555555"  # baselines and bounds
SEQUENTIAL = "Cividis"  # 0 … largest; made for colour-blind readers
DIVERGING = ((0.0, "#0072B2"), (0.5, "#F7F7F7"), (1.0, "#D55E00"))  # around zero: set zmid=0
CELLS = 500_000  # 2 MB of float32
_LUMINANCE = (0.2126, 0.7152, 0.0722)  # of red, green and blue


def figure(title: str, x: str, y: str, *, x_unit: str = "", y_unit: str = "", subtitle: str = "") -> "go.Figure":
    """An empty figure in the common look.

    Args:
        title: what is shown; plain text, escaped here.
        x: the horizontal axis.
        y: the vertical axis.
        x_unit: in brackets behind it, such as `nats`; empty for a bare count or index.
        y_unit: likewise.
        subtitle: model, n, baseline.

    Returns:
        A figure to add traces to.

    Example:
        >>> figure("Dose and response", "dose", "probability", x_unit="σ").layout.xaxis.title.text
        'dose [σ]'
    """
    import plotly.graph_objects as go

    drawn = go.Figure(layout={"template": template()})
    drawn.update_layout(title_text=for_plotly(title, inner=False))
    if subtitle:
        drawn.update_layout(title_subtitle_text=for_plotly(subtitle, inner=False))
    drawn.update_xaxes(title_text=_axis(x, x_unit))
    drawn.update_yaxes(title_text=_axis(y, y_unit))
    return drawn


def template() -> "go.layout.Template":
    """The common look: white, thin grid, the palette, no colour as the only sign of a sign."""
    import plotly.graph_objects as go

    axis = {
        "gridcolor": "#E5E5E5",
        "linecolor": "#888888",
        "zerolinecolor": "#BBBBBB",
        "ticks": "outside",
        "automargin": True,
    }
    return go.layout.Template(
        layout={
            "colorway": list(PALETTE),
            "font": {"family": "system-ui, Segoe UI, Roboto, sans-serif", "size": 13, "color": "#222222"},
            "title": {"x": 0.0, "xref": "paper", "xanchor": "left", "font": {"size": 17}},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "hoverlabel": {"namelength": -1},
            "margin": {"l": 60, "r": 20, "t": 70, "b": 55},
            "xaxis": axis,
            "yaxis": axis,
        },
        # Traces do not take the layout's colour scale, so each kind of them gets it.
        data={kind: [{"colorscale": SEQUENTIAL}] for kind in ("heatmap", "contour", "histogram2d", "surface")},
    )


def band(
    drawn: "go.Figure",
    x: Any,
    middle: Any,
    low: Any,
    high: Any,
    *,
    name: str,
    color: str | None = None,
    interval: str = "95 % interval",
) -> "go.Figure":
    """Adds a line with its interval as a ribbon.

    Args:
        drawn: the figure; it is changed.
        x: [point] positions.
        middle: [point] the line.
        low: [point] lower end of the interval.
        high: [point] upper end.
        name: in the legend; plain text.
        color: hex; by default the palette's next.
        interval: what the ribbon is, for the hover text.

    Returns:
        The same figure.

    Raises:
        InputError: the lengths differ.
    """
    import plotly.graph_objects as go

    arrays = {"x": x, "middle": middle, "low": low, "high": high}
    x, middle, low, high = (to_float32(values) for values in arrays.values())
    if len({values.shape for values in (x, middle, low, high)}) > 1 or x.ndim != 1:
        shapes = [values.shape for values in (x, middle, low, high)]
        raise InputError(f"a band needs four rows of one length, got shapes {shapes}")
    lines = sum(trace.mode == "lines+markers" for trace in drawn.data if trace.type == "scatter")
    color = color or PALETTE[lines % len(PALETTE)]
    label, ends = for_plotly(name, inner=False), for_plotly(interval, inner=False)
    common = {"x": x, "legendgroup": label, "line": {"color": color}}
    hidden = common | {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    drawn.add_trace(go.Scatter(y=high, **hidden))
    drawn.add_trace(go.Scatter(y=low, fill="tonexty", fillcolor=_transparent(color), **hidden))
    drawn.add_trace(
        go.Scatter(
            y=middle,
            mode="lines+markers",
            name=label,
            customdata=_columns(low, high),
            hovertemplate=f"%{{x:.4g}}: %{{y:.4g}}<br>{ends} %{{customdata[0]:.4g}} … %{{customdata[1]:.4g}}",
            **common,
        )
    )
    return drawn


def token_axis(tokens: Sequence[str]) -> dict[str, Any]:
    """Axis settings that put tokens at 0, 1, 2 …

    A category axis would merge equal tokens and read "12" as a number.

    Example:
        >>> token_axis([" a", " a"])["ticktext"]
        ['␣a', '␣a']
    """
    return {
        "tickmode": "array",
        "tickvals": list(range(len(tokens))),
        "ticktext": [for_plotly(token) for token in tokens],
    }


def cap_cells(array: Any, limit: int = CELLS) -> "np.ndarray":
    """The array as float32, if a figure can carry it.

    Args:
        array: numbers of any shape.
        limit: most cells.

    Raises:
        InputError: it has more; the message has both figures.
    """
    shape = tuple(getattr(array, "shape", ())) or to_float32(array).shape
    cells = 1
    for length in shape:
        cells *= int(length)
    if cells > limit:
        raise InputError(
            f"an array of shape {shape} has {cells:,} cells, and a figure carries at most {limit:,}: "
            "choose fewer rows (one layer, one head, the largest values) or average first"
        )
    return to_float32(array)


def text_color(colorscale: Sequence[Sequence[Any]], at: float) -> str:
    """Black or white, readable on a colour by relative luminance (WCAG 2): at least 3.5 : 1, white on saturated ones.

    Args:
        colorscale: (place, hex) stops, ascending from 0 to 1.
        at: a place on it, from 0 to 1.

    Example:
        >>> text_color(DIVERGING, 0.5), text_color(DIVERGING, 0.0)
        ('#000000', '#FFFFFF')
    """
    import numpy as np

    places = [place for place, _ in colorscale]
    red, green, blue = (
        np.interp(at, places, [int(color[start : start + 2], 16) for _, color in colorscale]) for start in (1, 3, 5)
    )
    luminance = sum(part * (one / 255) ** 2.2 for part, one in zip(_LUMINANCE, (red, green, blue), strict=True))
    return "#000000" if luminance > 0.25 else "#FFFFFF"


def to_float32(array: Any) -> "np.ndarray":
    """Any array, list, series or torch tensor (bfloat16, on a GPU, with a gradient) as float32 numpy.

    Example:
        >>> to_float32([1, 2]).dtype
        dtype('float32')
    """
    import numpy as np

    if callable(getattr(array, "detach", None)):  # a tensor, known by its methods, so that torch is not imported
        array = array.detach().cpu().float().numpy()
    return np.asarray(array, dtype=np.float32)


def error_bars(rows: Any, color: str, thickness: float = 1.2) -> dict[str, Any]:
    """Error bars from the columns low and high around the column mean.

    Args:
        rows: a frame with these columns.
        color: of the bars.
        thickness: in pixels.
    """
    return {
        "type": "data",
        "symmetric": False,
        "array": to_float32(rows["high"] - rows["mean"]),
        "arrayminus": to_float32(rows["mean"] - rows["low"]),
        "thickness": thickness,
        "width": 0,
        "color": color,
    }


def _axis(name: str, unit: str) -> str:
    return for_plotly(f"{name} [{unit}]" if unit else name, inner=False)


def _columns(low: "np.ndarray", high: "np.ndarray") -> "np.ndarray":
    import numpy as np

    return np.stack([low, high], axis=1)  # [point, 2]


def _transparent(color: str) -> str:
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.2)"
