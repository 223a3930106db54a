"""One text coloured by every method; how complete attributions are; what methods cost. `Result -> plotly Figure`.

Colours of a text are shares of the method's largest score, because methods have units of their own: orange speaks for the
target, blue against it. Attention and baselines have no sign and go from white to orange.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp.agreement.explanation_table import costs as cost_table
from interp.agreement.explanation_table import explained, runs, seeds_of
from interp.agreement.method_looks import SIDES, UNITS, headline, plain, subtitle, target_name
from interp.agreement.methods import TOLERANCE, side_of
from interp.errors import InputError
from interp.flow.flow_text_plots import HATCHED, arrange, box_trace, check_boxes, check_width, short, wrap
from interp.plotting import DIVERGING, REFERENCE, cap_cells, figure, for_plotly, text_color, to_float32
from interp.results import Result

_TITLE = 60  # characters of a text in a title
_EXACT = 1e-8  # completeness errors below are rounding
_AXIS = {
    "colorscale": [list(stop) for stop in DIVERGING],
    "cmin": -1,
    "cmax": 1,
    "colorbar": {
        "title": {"text": "score /<br>largest |score|<br>of the method"},
        "thickness": 14,
        "tickvals": [-1, -0.5, 0, 0.5, 1],
        "ticktext": ["−1 against", "−0.5", "0", "0.5", "1 for"],
        "len": 210,
        "lenmode": "pixels",
        "y": 1,
        "yanchor": "top",
    },
}


def explain(
    result: Result,
    example: int = 0,
    methods: Sequence[str] | str | None = None,
    seed: int | None = None,
    *,
    width: int = 84,
) -> Any:
    """One text below itself, coloured by each method's scores.

    Args:
        result: what `interp.agreement.explain` gave.
        example: which of its texts, from 0.
        methods: which, in order; all by default.
        seed: of the methods that draw, the first of each by default; the others have one explanation.
        width: characters in a line.

    Returns:
        One box per unit and method, spaces visible. What failed is hatched.

    Raises:
        InputError: no such example, method or seed, more boxes than a figure carries, or a width below 1.
    """
    check_width(width)
    rows = _of_example(result, example, methods, seed)
    check_boxes(len(rows))
    about = explained(result)[example]
    drawn = figure("", "", "")
    line, ticks = 0.0, []
    for method, boxes in rows.groupby("method", sort=False):
        name = str(method)
        top = float(np.nanmax(np.abs(boxes["score"]), initial=0.0))
        placed = wrap(boxes["token"], width)
        placed["line"] += line
        failed = ~np.isfinite(boxes["score"].to_numpy(float))
        for where, colored in ((~failed, True), (failed, False)):
            if where.any():
                drawn.add_trace(_boxes(boxes[where], placed[where], name, top if colored else None))
        ticks.append((line, _label(name, boxes.iloc[0], top)))
        line = float(placed["line"].max()) + 1.75
    arrange(drawn, line, width, ticks, _AXIS)
    title = f"Why “{short(about['explained'])}” in “{_cut(about['text'])}”"
    headline(drawn, title, _told(result, example, about, rows), max(330, 130 + 27 * line))
    return drawn


def completeness(result: Result) -> Any:
    """How far the scores of every attribution miss f(x) − f(x₀), over examples and seeds.

    Args:
        result: what `interp.agreement.explain` gave.

    Raises:
        InputError: another kind of result, or it holds no attribution.
    """
    import plotly.graph_objects as go

    each = runs(_checked(result)).astype({"method": str})
    each = each[[side_of(name) == "attribution" for name in each["method"]]]
    names = list(dict.fromkeys(each["method"]))
    if not names:
        raise InputError("no attribution among the methods: attention and baselines promise no completeness")
    cap_cells(each["completeness_error"])
    drawn = figure("", "|Σ score − (f(x) − f(x₀))| / |f(x) − f(x₀)|", "")
    color, _ = SIDES["attribution"]
    labels = []
    for at, name in enumerate(names):
        found = each.loc[each["method"] == name, "completeness_error"].to_numpy(float)
        known = found[np.isfinite(found)]
        share = 1 - len(known) / len(found)
        labels.append(f"{plain(name)}<br>n = {len(found):,}, {_percent(share)} NaN")
        drawn.add_trace(
            go.Box(
                x=to_float32(np.maximum(known, _EXACT)),
                y=np.full(len(known), at, dtype=np.float32),
                customdata=to_float32(known),
                orientation="h",
                boxpoints="all",
                jitter=0.5,
                pointpos=0,
                fillcolor="rgba(213,94,0,0.12)",
                line={"width": 1, "color": color},
                marker={"color": color, "size": 4, "opacity": 0.5},
                name=plain(name),
                hovertemplate="%{customdata:.3g}",
                showlegend=False,
            )
        )
    drawn.add_vline(
        x=TOLERANCE,
        line={"color": REFERENCE, "dash": "dash"},
    )
    drawn.add_annotation(
        x=np.log10(TOLERANCE),  # annotations of a logarithmic axis take exponents, lines do not
        y=1,
        yref="paper",
        yanchor="bottom",
        text=f"tolerance {TOLERANCE}",
        showarrow=False,
        font={"size": 12},
    )
    below = f"a point: one example and seed; NaN: f(x) = f(x₀) or failed; errors below {_EXACT:g} are drawn there"
    headline(drawn, "Completeness of the attributions", subtitle(result, below), 170 + 46 * max(len(names), 3), room=20)
    drawn.update_xaxes(type="log", dtick=1, exponentformat="power")
    drawn.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=labels,
        range=[len(names) - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
    )
    return drawn


def costs(result: Result) -> Any:
    """What every method costs: model calls and seconds per example and seed, the dearest above.

    Args:
        result: what `interp.agreement.explain` gave.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    table = cost_table(_checked(result)).sort_values(["seconds"], ascending=False, kind="stable")
    drawn = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.04)
    places = list(range(len(table)))
    panels = (("model_calls", "texts", "model calls [texts]"), ("seconds", "s", "wall time [s]"))
    for panel, (measure, unit, axis) in enumerate(panels, start=1):
        for side, (color, _) in SIDES.items():
            here = np.array([side_of(name) == side for name in table["method"]])
            if not here.any():
                continue
            values = table.loc[here, measure].to_numpy(float)
            drawn.add_trace(
                go.Bar(
                    orientation="h",
                    x=to_float32(np.where(values > 0, values, np.nan)),
                    y=np.flatnonzero(here),
                    marker={"color": color},
                    text=[_number(value) for value in values],
                    textposition="outside",
                    cliponaxis=False,
                    name=side,
                    legendgroup=side,
                    showlegend=panel == 1,
                    customdata=to_float32(table.loc[here, [measure, "computed", "n"]]),
                    hovertemplate=f"%{{y}}: %{{customdata[0]:.4g}} {unit}"
                    + ("<br>%{customdata[1]:.4g} of them not known from another method" if panel == 1 else "")
                    + "<br>%{customdata[2]:d} examples × seeds<extra></extra>",
                ),
                1,
                panel,
            )
        drawn.update_xaxes(
            type="log",
            dtick=1,
            exponentformat="power",
            title_text=axis,
            range=_decades(table[measure]),
            row=1,
            col=panel,
        )
    below = subtitle(result, "means; no bar: no model call, the attention methods share theirs")
    headline(drawn, "What the methods cost, per example and seed", below, 165 + 24 * max(len(table), 5))
    drawn.update_layout(barmode="overlay", bargap=0.3)
    drawn.update_yaxes(
        tickvals=places,
        ticktext=[plain(name) for name in table["method"]],
        range=[len(table) - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
    )
    return drawn


def _checked(result: Result) -> Result:
    if getattr(result, "kind", None) != "agreement.explain":
        raise InputError(f"{result!r:.60}; expected what interp.agreement.explain gives")
    return result


def _of_example(result: Result, example: int, methods: Sequence[str] | str | None, seed: int | None) -> pd.DataFrame:
    """One explanation per method of an example, units in order."""
    count = len(explained(_checked(result)))
    if isinstance(example, bool) or not hasattr(example, "__index__") or not 0 <= example < count:
        raise InputError(f"example={example!r}; the result has {count} examples: expected 0 … {count - 1}")
    seeds = seeds_of(result)
    chosen = list(seeds) if methods is None else [methods] if isinstance(methods, str) else list(methods)
    unknown = [name for name in chosen if name not in seeds]
    if unknown or not chosen:
        raise InputError(f"no method {unknown[0] if unknown else ''!r} in this result; it has {', '.join(seeds)}")
    drawing = set(result.provenance.parameters.get("random_methods") or ())
    picked = {}
    for name in chosen:
        first = seed is None or (len(seeds[name]) == 1 and name not in drawing)
        if not first and seed not in seeds[name]:
            raise InputError(f"seed={seed!r}; {name} was run with {', '.join(map(str, seeds[name]))}")
        picked[name] = seeds[name][0] if first else seed
    frame = result.frame[result.frame["example"] == example].astype({"method": str, "token": str})
    return pd.concat(
        [
            frame[(frame["method"] == name) & (frame["seed"] == at)].sort_values("unit", kind="stable")
            for name, at in picked.items()
        ],
        ignore_index=True,
    )


def _boxes(boxes: pd.DataFrame, placed: pd.DataFrame, name: str, top: float | None) -> Any:
    """Boxes of a method: coloured, or hatched where `top` is `None`."""
    marker: dict[str, Any] = {"line": {"width": 0.5, "color": "#BBBBBB"}}
    if top is None:
        marker |= {"pattern": HATCHED}
        colors, shown = ["#555555"] * len(boxes), "no score: failed"
    else:
        shades = to_float32(boxes["score"] / top if top > 0 else np.zeros(len(boxes)))
        marker |= {"color": shades, "coloraxis": "coloraxis"}
        colors, shown = [text_color(DIVERGING, (shade + 1) / 2) for shade in shades], "%{customdata:.4g}"
    return box_trace(
        placed,
        boxes["token"].tolist(),
        colors,
        marker=marker,
        customdata=to_float32(boxes["score"]),
        hovertext=[f"{at}: {for_plotly(token)}" for at, token in zip(boxes["unit"], boxes["token"], strict=True)],
        hovertemplate=f"%{{hovertext}}<br>{shown}<extra>{plain(name)}</extra>",
        name=plain(name),
        showlegend=False,
    )


def _label(name: str, run: pd.Series, top: float) -> str:
    """What stands left of a method's boxes: name and completeness error, side and largest score."""
    side = side_of(name)
    error = f", error {run['completeness_error']:.2g}" if side == "attribution" else ""
    return f"<b>{plain(name)}</b>{error.replace('nan', 'unknown')}<br>{side}, largest {top:.3g}"


def _told(result: Result, example: int, about: dict[str, Any], rows: pd.DataFrame) -> str:
    """Subtitle: the prediction, and how to read the labels."""
    made = result.provenance.parameters
    unit = UNITS.get(str(made.get("target")), "")
    value, empty = float(rows["value"].iloc[0]), float(rows["baseline_value"].iloc[0])
    target = target_name(result)
    prediction = [
        f"{result.provenance.model}, example {example} of {len(explained(result))}",
        f"explained: “{short(about['explained'])}”, probability {about['probability']:.1%}".replace("%", " %"),
        f"predicted: {_quoted(about['predicted'])}, gold: {_quoted(about['label'])}",
    ]
    numbers = [
        f"{target} {value:.3f} {unit}".rstrip() + f", with every unit “{made.get('baseline', '?')}” {empty:.3f}",
        "error: completeness, |Σ score − (f(x) − f(x₀))| / |f(x) − f(x₀)|",
    ]
    return "<br>".join(plain(line) for line in ("; ".join(prediction), "; ".join(numbers)))


def _quoted(name: str | None) -> str:
    return "–" if name is None else f"“{short(name)}”"


def _cut(text: str) -> str:
    return text if len(text) <= _TITLE else text[: _TITLE - 1] + "…"


def _percent(share: float) -> str:
    return f"{share:.1%}".replace(".0%", "%").replace("%", " %")


def _decades(values: pd.Series) -> list[float]:
    """Ends of a logarithmic axis with room for a bar of the least value and for the numbers beside the bars."""
    logs = np.log10(values[values > 0])
    least, most = (float(logs.min()), float(logs.max())) if len(logs) else (0.0, 1.0)
    return [least - 0.1 * (most - least) - 0.2, most + 0.2 * (most - least) + 0.1]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.3g}"
