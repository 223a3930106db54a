"""Who is faithful: every method's means beside the random ranking's; what removing the first units does.

`Result -> plotly Figure`. Means and intervals are those of `interp.agreement.faithfulness_means`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp.agreement.method_looks import DASHES, SIDES, UNITS, by_side, headline, plain, subtitle
from interp.agreement.methods import side_of
from interp.agreement.removal import MEASURES, faithfulness_means
from interp.errors import InputError
from interp.plotting import PALETTE, REFERENCE, band, cap_cells, error_bars, to_float32
from interp.results import Result

# What a panel shows, which way is better (1: up), and what its axis counts; {unit} is the target's.
_PANELS = {
    "comprehensiveness": ("Comprehensiveness: higher is better", 1, "mean drop, top units removed [{unit}]"),
    "sufficiency": ("Sufficiency: lower is better", -1, "mean drop, top units kept alone [{unit}]"),
    "normalised_comprehensiveness": (
        "Normalised comprehensiveness: higher is better",
        1,
        "0: worst, 1: best order of the text",
    ),
    "normalised_sufficiency": ("Normalised sufficiency: lower is better", -1, "0: best, 1: worst order of the text"),
    "leave_one_out": ("Like leave-one-out: higher is more like it", 1, "Spearman's ρ with single removals"),
}
_ROW = 21  # pixels of a method
_BETWEEN = 100  # and between rows of panels
_INKS = PALETTE[:6]  # yellow is too pale for a line
_METHODS = 200  # most that a panel or a legend can name


def faithfulness(result: Result, methods: Sequence[str] | str | None = None) -> Any:
    """Every measure of faithfulness, methods from the best down, with intervals and the random ranking's band.

    Args:
        result: what `interp.agreement.faithfulness` gave.
        methods: which; all by default.

    Returns:
        One panel per measure. Methods without a number (no ranking) stand at the bottom and say so.

    Raises:
        InputError: another kind of result, an unknown method, or more methods than a figure carries.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    chosen, means = _means(result, methods)
    means = means[means["fraction"].isna()]
    shown = [measure for measure in MEASURES if means.loc[means["measure"] == measure, "mean"].notna().any()]
    shown = shown or list(MEASURES[:2])  # nothing has a number, and every row says so
    rows = -(-len(shown) // 2)
    height = max(160, _ROW * len(chosen) + 30)
    drawn = make_subplots(
        rows,
        2,
        subplot_titles=[_PANELS[measure][0] for measure in shown],
        horizontal_spacing=0.2,
        vertical_spacing=_BETWEEN / (rows * height + (rows - 1) * _BETWEEN) if rows > 1 else 0,
    )
    named: set[str] = set()
    for at, measure in enumerate(shown):
        row, column = at // 2 + 1, at % 2 + 1
        _, better, axis = _PANELS[measure]
        table = means[means["measure"] == measure].set_index("method").reindex(chosen)
        table = table.sort_values("mean", ascending=better < 0, kind="stable", na_position="last")
        place = dict(zip(table.index, range(len(table)), strict=True))
        known = table[table["mean"].notna()]
        for side, (color, symbol) in SIDES.items():
            here = known[[side_of(name) == side for name in known.index]]
            if here.empty:
                continue
            drawn.add_trace(
                go.Scatter(
                    x=to_float32(here["mean"]),
                    y=[place[name] for name in here.index],
                    error_x=error_bars(here, color),
                    mode="markers",
                    marker={"color": color, "symbol": symbol, "size": 8},
                    name=side,
                    legendgroup=side,
                    showlegend=side not in named,
                    customdata=to_float32(here[["low", "high", "n", "n_nan"]]),
                    hovertemplate="%{y}: %{x:.4g}<br>95 % interval %{customdata[0]:.4g} … %{customdata[1]:.4g}<br>"
                    "%{customdata[2]:d} examples, %{customdata[3]:d} without a number"
                    f"<extra>{plain(measure.replace('_', ' '))}</extra>",
                ),
                row,
                column,
            )
            named.add(side)
        _random_band(drawn, known, row, column)
        drawn.update_xaxes(title_text=axis.format(unit=_unit(result)), title_standoff=8, row=row, col=column)
        labels = [plain(name) + ("" if name in known.index else ": no number") for name in table.index]
        drawn.update_yaxes(
            tickvals=list(range(len(table))),
            ticktext=labels,
            range=[len(table) - 0.4, -0.6],
            zeroline=False,
            row=row,
            col=column,
        )
    count = result.provenance.parameters.get("n_normalised")
    on = f"; normalised on the first {count:,} examples" if count else ""
    notes = [_ranked(result) + on, "bars: 95 % interval over examples; dashed and grey: the random ranking"]
    total = rows * height + (rows - 1) * _BETWEEN + 190
    headline(drawn, "Faithfulness of the methods' rankings", subtitle(result, *notes), total, room=24)
    drawn.update_layout(
        legend={"orientation": "h", "y": 1, "yref": "container", "yanchor": "top", "x": 1, "xanchor": "right"}
    )
    return drawn


def removal_curves(result: Result, methods: Sequence[str] | str | None = None) -> Any:
    """The drop of the target when the first units are removed, and when they alone are kept, by their share.

    Args:
        result: what `interp.agreement.faithfulness` gave.
        methods: which; all by default. A click on the legend hides one, a double click all others.

    Raises:
        InputError: as `faithfulness`.
    """
    from plotly.subplots import make_subplots

    chosen, means = _means(result, methods)
    means = means[means["fraction"].notna() & means["mean"].notna()]
    measures = [measure for measure in MEASURES[:2] if (means["measure"] == measure).any()]
    if not measures:
        raise InputError("no method has a removal curve: every explanation is constant or failed")
    cap_cells(means[["fraction", "mean", "low", "high"]])
    drawn = make_subplots(
        1,
        len(measures),
        subplot_titles=[_PANELS[measure][0] for measure in measures],
        shared_yaxes=True,
        horizontal_spacing=0.03,
    )
    known = [name for name in chosen if name in set(means["method"])]
    others = [name for name in known if name != "random"]
    for panel, measure in enumerate(measures, start=1):
        for name in known:
            rows = means[(means["method"] == name) & (means["measure"] == measure)].sort_values("fraction")
            at = others.index(name) if name in others else 0
            color = _INKS[at % len(_INKS)] if name in others else REFERENCE
            band(drawn, rows["fraction"], rows["mean"], rows["low"], rows["high"], name=name, color=color)
            for trace in drawn.data[-3:]:
                trace.update(xaxis=f"x{panel}", yaxis=f"y{panel}")
            line = drawn.data[-1]
            line.update(
                showlegend=panel == 1,
                line={
                    "dash": DASHES[at // len(_INKS) % len(DASHES)] if name in others else "dot",
                    "width": 2 if name in others else 3,
                },
                marker={"size": 5, "symbol": SIDES[side_of(name)][1]},
            )
            if len(known) > len(_INKS):  # many ribbons on each other: light ones
                drawn.data[-2].fillcolor = drawn.data[-2].fillcolor.replace("0.2)", "0.05)")
    without = [name for name in chosen if name not in known]
    notes = ["ribbons: 95 % interval over examples; markers tell the side; a double click on a name isolates it"]
    notes += [f"no ranking: {', '.join(without)}"] if without else []
    below = subtitle(result, _ranked(result), "; ".join(notes))
    headline(drawn, "What removing the first units does to the target", below, max(560, 200 + 20 * len(known)), room=24)
    drawn.update_xaxes(tickformat=".0%", title_standoff=8)
    for panel, what in enumerate(("removed", "kept alone")[: len(measures)], start=1):
        drawn.update_xaxes(title_text=f"share of the units, first by rank, {what}", row=1, col=panel)
    drawn.update_yaxes(title_text=f"mean drop f(x) − f(what is left) [{_unit(result)}]", row=1, col=1)
    drawn.update_yaxes(ticks="", row=1, col=2)
    drawn.update_layout(legend={"tracegroupgap": 0})
    return drawn


def _means(result: Result, methods: Sequence[str] | str | None) -> tuple[list[str], pd.DataFrame]:
    """The methods by side, and their means."""
    if getattr(result, "kind", None) != "agreement.faithfulness":
        raise InputError(f"{result!r:.60}; expected what interp.agreement.faithfulness gives")
    held = list(dict.fromkeys(result.frame["method"].astype(str)))
    chosen = held if methods is None else [methods] if isinstance(methods, str) else list(methods)
    unknown = [name for name in chosen if name not in held]
    if unknown or not chosen:
        raise InputError(f"no method {unknown[0] if unknown else ''!r} in this result; it has {', '.join(held)}")
    if len(chosen) > _METHODS:
        raise InputError(f"{len(chosen)} methods, and a figure names at most {_METHODS}: choose some with methods=[…]")
    means = faithfulness_means(result)
    return by_side(chosen), means[means["method"].isin(chosen)]


def _random_band(drawn: Any, known: pd.DataFrame, row: int, column: int) -> None:
    """The random ranking's mean and interval across a panel."""
    if "random" not in known.index:
        return
    mean, low, high = known.loc[["random"], ["mean", "low", "high"]].to_numpy(float)[0]
    if np.isfinite([low, high]).all():
        drawn.add_vrect(
            x0=low, x1=high, fillcolor=REFERENCE, opacity=0.12, line_width=0, layer="below", row=row, col=column
        )
    drawn.add_vline(x=mean, line={"color": REFERENCE, "dash": "dash", "width": 1.5}, row=row, col=column)


def _unit(result: Result) -> str:
    return UNITS.get(str(result.provenance.parameters.get("target")), "of the target")


def _ranked(result: Result) -> str:
    made = result.provenance.parameters
    ways = {"signed": "what speaks for the target first", "abs": "what matters first, whatever its sign"}
    ranked = ways.get(made.get("faithful_rank_by", ""), "")
    parts = [ranked] if ranked else []
    parts += [f"a removed unit becomes “{made['baseline']}”"] if made.get("baseline") else []
    return "; ".join(parts)
