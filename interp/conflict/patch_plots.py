"""Pictures of the causal confirmation: `Result -> plotly Figure`. What is averaged is averaged by the results' own summaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp.conflict import head_ablation, recoveries
from interp.errors import InputError
from interp.plotting import DIVERGING, PALETTE, REFERENCE, band, cap_cells, error_bars, figure, to_float32
from interp.results import Result
from interp.tokens import for_plotly

_SITES = {
    "attn_out": "attention output",
    "resid_post": "residual stream after the layer",
    "head": "one attention head",
}
_POSITIONS = {"suffix": "the template's last tokens", "last": "the last token"}


def patch(result: Result, view: str | None = None) -> Any:
    """Recovery by layer with intervals for each site, or by layer and head.

    Args:
        result: what `interp.conflict.patch` gave.
        view: "layers" or "heads"; by default layers where some site but "head" was patched.

    Raises:
        InputError: an unknown view, or one for which nothing was patched.
    """
    table = recoveries.recovery(result)
    views = {"layers": table[table["head"] < 0], "heads": table[table["head"] >= 0]}
    view = view or next(name for name, rows in views.items() if len(rows))
    if view not in views:
        raise InputError(f"view={view!r}; expected 'layers' or 'heads'")
    if views[view].empty:
        raise InputError(f"no {view} were patched; call patch with site={'attn_out' if view == 'layers' else 'head'!r}")
    return (_layers if view == "layers" else _heads)(result, views[view])


def _layers(result: Result, table: pd.DataFrame) -> Any:
    share = table["recovery"].notna().all()
    drawn = figure(
        "What the consistent run brings back, by patched layer",
        "layer",
        "recovery" if share else "change of the preference",
        y_unit="share of the gap" if share else "nats per token",
        subtitle=f"{_about(result, table)}; bands: 95 % interval over tasks",
    )
    middle, low, high = ("recovery", "low", "high") if share else ("change", "change_low", "change_high")
    for color, (site, rows) in zip(PALETTE, table.groupby("site", observed=True, sort=False), strict=False):
        rows = rows.sort_values("layer")
        band(drawn, rows["layer"], rows[middle], rows[low], rows[high], name=_SITES[str(site)], color=color)
    drawn.add_hline(y=0, line={"color": REFERENCE, "dash": "dot"})
    if share:
        drawn.add_hline(y=1, line={"color": REFERENCE, "dash": "dash"}, annotation_text="whole gap")
    drawn.update_layout(legend={"orientation": "h", "y": -0.2})
    return drawn


def _heads(result: Result, table: pd.DataFrame) -> Any:
    share = table["recovery"].notna().all()
    by_head = table.pivot(index="head", columns="layer", values="recovery" if share else "change")
    found = table.pivot(index="head", columns="layer", values="q").to_numpy() < 0.05
    values = cap_cells(by_head)
    drawn = figure(
        "What one head of the consistent run brings back",
        "layer",
        "head",
        subtitle=f"{_about(result, table)}; dot: q < .05",
    )
    largest = float(np.nanmax(np.abs(values))) or 1.0
    unit = "share of the gap" if share else "nats per token"
    drawn.add_heatmap(
        x=to_float32(np.arange(values.shape[1])),  # columns by their number: layers between them may be missing
        y=to_float32(np.arange(values.shape[0])),
        z=values,
        customdata=np.stack(np.meshgrid(by_head.columns, by_head.index), axis=-1),
        colorscale=[list(stop) for stop in DIVERGING],
        zmid=0,
        zmin=-largest,
        zmax=largest,
        colorbar={"title": {"text": f"{'recovery' if share else 'change'} [{unit}]", "side": "right"}},
        hovertemplate=f"layer %{{customdata[0]}}, head %{{customdata[1]}}: %{{z:.4f}} {unit}<extra></extra>",
    )
    rows, columns = np.nonzero(found)
    drawn.add_scatter(
        x=to_float32(columns),
        y=to_float32(rows),
        mode="markers",
        marker={"color": "#222222", "size": 5},
        hoverinfo="skip",
        showlegend=False,
    )
    drawn.update_xaxes(**_ticks(by_head.columns))
    drawn.update_yaxes(**_ticks(by_head.index), autorange="reversed")
    return drawn


def ablate_heads(result: Result) -> Any:
    """The chosen heads' change of the preference beside the random sets', and all pairs' of the chosen.

    Args:
        result: what `interp.conflict.ablate_heads` gave.
    """
    table = head_ablation.ablation_summary(result).set_index("what", drop=False)
    changes, about = head_ablation.set_changes(result), result.provenance.parameters
    focal, n_sets = table.loc["focal"], int(table["n_sets"].iloc[0])
    sizes = float(table["p_sets"]["|focal|"])
    rank = f"; p among random sets {focal['p_sets']:.3g}, without signs {sizes:.3g}" if n_sets else ""
    word = "zeroed" if about.get("mode") == "zero" else "held at their mean"
    where = "everywhere" if about.get("positions") == "all" else "at the prompt's last tokens"
    drawn = figure(
        "Do the chosen heads carry the conflict?",
        "heads ablated together",
        "change for the system's answer",
        y_unit="nats per token",
        subtitle=(
            f"{result.provenance.model}; {focal['n_heads']} heads {word} {where}; {_count(focal)}; "
            f"bars: 95 % interval over tasks{rank}"
        ),
    )
    _points(
        drawn, "focal", changes[0], PALETTE[0], [for_plotly(str(pair)) for pair in changes.index], "focal, one pair"
    )
    if n_sets:
        means = changes.drop(columns=0).mean()
        _points(
            drawn,
            "random",
            means,
            PALETTE[1],
            [f"random set {at}" for at in means.index],
            "one random set, mean of pairs",
        )
    for what, color in (("focal", PALETTE[0]), ("random", PALETTE[1])):
        if what in table.index:
            rows = table.loc[[what]]
            drawn.add_scatter(
                x=[_place(what)],
                y=to_float32(rows["mean"]),
                mode="markers",
                marker={"symbol": "diamond", "size": 13, "color": color, "line": {"color": "#222222", "width": 1}},
                error_y=error_bars(rows, "#222222", 1.6),
                name=f"{what}, mean",
                hovertemplate=f"{what}: %{{y:.4g}}<extra></extra>",
            )
    drawn.add_hline(y=0, line={"color": REFERENCE, "dash": "dot"})
    drawn.update_xaxes(
        tickvals=[0, 1][: 1 + bool(n_sets)], ticktext=["chosen heads", f"{n_sets} random sets"], range=[-0.6, 1.6]
    )
    return drawn


def _ticks(numbers: Any) -> dict[str, Any]:
    """At most some thirty labels on an axis of columns or rows."""
    shown = range(0, len(numbers), 1 + len(numbers) // 32)
    return {"tickmode": "array", "tickvals": list(shown), "ticktext": [str(numbers[at]) for at in shown]}


def _points(drawn: Any, what: str, values: pd.Series, color: str, texts: Sequence[str], name: str) -> None:
    spread = np.linspace(-0.28, 0.28, len(values)) if len(values) > 1 else np.zeros(1)
    drawn.add_scatter(
        x=to_float32(_place(what) + spread),
        y=to_float32(values),
        mode="markers",
        marker={"color": color, "size": 7, "opacity": 0.45, "symbol": "circle" if what == "focal" else "square"},
        text=list(texts),
        name=name,
        hovertemplate="%{text}: %{y:.4g}<extra></extra>",
    )


def _place(what: str) -> float:
    return 0.0 if what == "focal" else 1.0


def _about(result: Result, table: pd.DataFrame) -> str:
    about = result.provenance.parameters
    giver = "another task's consistent run" if about.get("donor") == "other" else "consistent run"
    where = _POSITIONS.get(str(about.get("positions")), "the last tokens")
    gap = f"gap {table['gap'].iloc[0]:.3g} nats per token"
    return f"{result.provenance.model}; {giver} at {where}; {gap}; {_count(table.iloc[0])}"


def _count(row: Any) -> str:
    return f"{row['n']} pairs of {row['n_tasks']} tasks"
