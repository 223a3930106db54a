"""Pictures of scans: head × layer maps, domains against each other, norms by layer, the ε curve. `Result -> plotly Figure`.

Nothing is computed here beyond a scan's own summaries, and every map and line is drawn from the rows of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from interp.errors import InputError
from interp.plotting import PALETTE, REFERENCE, SEQUENTIAL, band, cap_cells, error_bars, figure, for_plotly, to_float32
from interp.results import Result
from interp.sinks.scan_table import Scan

_COLUMNS = 4  # maps beside each other
_TITLES = {
    "mass_first": ("Attention on the first token", "attention"),
    "mass_sinks": ("Attention on the sink tokens", "attention"),
    "value_ratio": ("Value norm of the first token against the median of the others", "ratio"),
    "output_norm": ("What the head writes", "norm"),
    "delta_logit": ("Score of the first token above the others", "nats"),
}
_DASHES = ("solid", "dash", "dot")  # where domains outnumber the colours
LABEL_COLORS = {"active": "#F0E442", "mixed": "#D9D9D9", "dormant": "#0072B2", "active-dormant": "#D55E00"}


def scan(result: Scan, measure: str = "mass_first", domains: Sequence[str] | None = None) -> Any:
    """Head × layer maps of a measure, one per domain, on one colour scale.

    Args:
        result: what `interp.sinks.scan` gave.
        measure: a head's measure.
        domains: which, in order; all by default.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    chosen = _chosen(result, domains)
    means = {name: _grid(result, measure, name) for name in chosen}
    cap_cells(np.stack(list(means.values())))
    columns = min(_COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    title, unit = _TITLES.get(measure, (measure, ""))
    counts = _counts(result)
    heads = len(next(iter(means.values()))[0])
    drawn = make_subplots(
        rows,
        columns,
        subplot_titles=[for_plotly(f"{name} (n = {counts[name]})", inner=False) for name in chosen],
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=0.12 / rows,
        x_title="head",
        y_title="layer",
    )
    for at, name in enumerate(chosen):
        drawn.add_trace(
            go.Heatmap(
                z=to_float32(means[name]),
                coloraxis="coloraxis",
                hovertemplate="layer %{y}, head %{x}: %{z:.3f}<extra>" + for_plotly(name, inner=False) + "</extra>",
            ),
            at // columns + 1,
            at % columns + 1,
        )
    look = figure(title, "", "", subtitle=_subtitle(result)).layout
    drawn.update_layout(
        template=look.template,
        title=look.title,
        margin={"t": 110},  # the maps' own titles stand below the subtitle
        height=160 + rows * max(260, 11 * len(next(iter(means.values())))),
        coloraxis={"colorscale": SEQUENTIAL, "colorbar": {"title": {"text": unit}}},
    )
    if measure.startswith("mass"):
        drawn.update_layout(coloraxis={"cmin": 0, "cmax": 1})
    drawn.update_xaxes(tickmode="linear", dtick=max(1, heads // 9), showgrid=False)
    drawn.update_yaxes(showgrid=False)
    return drawn


def domain_scatter(
    result: Scan, a: str | None = None, b: str | None = None, *, measure: str = "mass_first", comparison: Any = None
) -> Any:
    """Every head's mass on one domain against another, with 95 % intervals over texts.

    Args:
        result: a scan of at least two domains.
        a, b: the domains; the first two by default.
        measure: a head's measure.
        comparison: what `interp.sinks.compare` gave; heads that survive it are coloured.

    Raises:
        InputError: fewer than two domains, or an unknown one.
    """
    import plotly.graph_objects as go

    if len(result.domains) < 2:
        raise InputError("a scatter of domains needs a scan of at least two")
    a, b = a or result.domains[0], b or next(name for name in result.domains if name != a)
    _chosen(result, [a, b])
    heads = result.heads([measure]).set_index(["domain", "layer", "head"])
    x, y = heads.loc[a], heads.loc[b]
    survives = np.zeros(len(x), dtype=bool)
    if comparison is not None:
        rows = comparison.frame.astype({"domain_a": str, "domain_b": str})
        rows = rows[rows["domain_a"].isin([a, b]) & rows["domain_b"].isin([a, b])].set_index(["layer", "head"])
        survives = (
            (rows["q"] <= comparison.provenance.parameters["alpha"]).reindex(x.index, fill_value=False).to_numpy()
        )
    title, unit = _TITLES.get(measure, (measure, ""))
    drawn = figure(f"{title}: {a} against {b}", a, b, x_unit=unit, y_unit=unit, subtitle=_subtitle(result))
    labels = np.array([f"L{layer}H{head}" for layer, head in x.index])
    groups = [(survives, "differs after false-discovery control", PALETTE[1]), (~survives, "does not", REFERENCE)]
    for where, name, color in groups if comparison is not None else [(~survives, "heads", PALETTE[0])]:
        drawn.add_trace(
            go.Scatter(
                x=to_float32(x["mean"][where]),
                y=to_float32(y["mean"][where]),
                error_x=error_bars(x[where], color, 0.7),
                error_y=error_bars(y[where], color, 0.7),
                text=labels[where],
                mode="markers",
                name=name,
                marker={"color": color, "size": 6},
                hovertemplate="%{text}: %{x:.3f}, %{y:.3f}",
            )
        )
    ends = [0, 1] if measure.startswith("mass") else [float(np.nanmin(heads["low"])), float(np.nanmax(heads["high"]))]
    line = {"color": REFERENCE, "dash": "dot", "width": 1}
    drawn.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line=line, name="equal", hoverinfo="skip"))
    drawn.update_layout(height=620)
    return drawn


def compare(result: Result, top: int = 25) -> Any:
    """The heads whose domains differ most, with the intervals that are widened for their selection.

    Args:
        result: what `interp.sinks.compare` gave.
        top: how many pairs and heads.
    """
    import plotly.graph_objects as go

    rows = result.frame.assign(size=result.frame["difference"].abs()).nlargest(top, "size").iloc[::-1]
    made = result.provenance.parameters
    drawn = figure(
        f"Largest differences between domains: {made['measure']}",
        "difference of means over texts",
        "",
        subtitle=f"bars: {made['fcr_level']:.2%} intervals, so that among the heads that pass at most {made['alpha']:.0%} miss; "
        f"{result.provenance.model}",
    )
    names = [f"L{row.layer}H{row.head} {row.domain_a} − {row.domain_b}" for row in rows.itertuples()]
    survives = (rows["q"] <= made["alpha"]).to_numpy()
    for where, name, color in ((survives, "q ≤ alpha", PALETTE[1]), (~survives, "q > alpha", REFERENCE)):
        if where.any():
            here = rows[where]
            drawn.add_trace(
                go.Scatter(
                    x=to_float32(here["difference"]),
                    y=[for_plotly(names[at], inner=False) for at in np.flatnonzero(where)],
                    error_x={
                        "type": "data",
                        "symmetric": False,
                        "array": to_float32(here["high_fcr"] - here["difference"]),
                        "arrayminus": to_float32(here["difference"] - here["low_fcr"]),
                        "color": color,
                    },
                    customdata=to_float32(here[["mean_a", "mean_b", "q"]]),
                    hovertemplate="%{y}: %{customdata[0]:.3f} − %{customdata[1]:.3f}, q = %{customdata[2]:.2g}",
                    mode="markers",
                    marker={"color": color, "size": 8},
                    name=name,
                )
            )
    drawn.add_vline(x=0, line={"color": REFERENCE, "dash": "dot"})
    drawn.update_yaxes(categoryorder="array", categoryarray=[for_plotly(name, inner=False) for name in names])
    drawn.update_layout(height=150 + 22 * len(rows))
    return drawn


def classify(result: Result) -> Any:
    """Head × layer map of the names that `interp.sinks.classify` gave, evidence on hover."""
    import plotly.graph_objects as go

    frame, made = result.frame, result.provenance.parameters
    drawn = figure(
        "Dormant, active and active-dormant heads",
        "head",
        "layer",
        subtitle=f"dormant: {made['measure']} > {made['dormant']}, active: < {made['active']}; "
        f"domains: {', '.join(made['domains'])}; {result.provenance.model}",
    )
    for label, color in LABEL_COLORS.items():
        rows = frame[frame["label"] == label]
        drawn.add_trace(
            go.Scatter(
                x=rows["head"].to_numpy(),
                y=rows["layer"].to_numpy(),
                mode="markers",
                # The shape tells them apart as well as the colour.
                marker={
                    "color": color,
                    "size": 13,
                    "symbol": {"active-dormant": "star", "dormant": "square", "active": "circle"}.get(label, "diamond"),
                    "line": {"width": 0.5, "color": "#555555"},
                },
                name=f"{label} ({len(rows)})",
                text=[for_plotly(text, inner=False) for text in rows["evidence"]],
                hovertemplate="layer %{y}, head %{x}: %{text}",
            )
        )
    drawn.update_xaxes(dtick=max(1, int(frame["head"].max()) // 8))
    drawn.update_layout(height=150 + 16 * int(frame["layer"].max() + 1))
    return drawn


def norms(result: Scan, domains: Sequence[str] | None = None) -> Any:
    """Residual norm at the first token, at the other tokens (median) and their largest, by layer, with intervals over texts.

    Args:
        result: what `interp.sinks.scan` gave.
        domains: which, in order; the first three by default.
    """
    chosen = _chosen(result, domains)[: None if domains else 3]
    names = {
        "resid_first": "first token",
        "resid_others": "other tokens, median",
        "resid_others_max": "other tokens, maximum",
    }
    table = result.layers(list(names))
    drawn = figure("Residual norms by layer", "layer", "‖x‖ of the block's output", subtitle=_subtitle(result))
    dashes = {"resid_first": "solid", "resid_others": "dot", "resid_others_max": "dash"}
    for at, domain in enumerate(chosen):
        for measure, name in names.items():
            rows = table[(table["domain"] == domain) & (table["measure"] == measure)]
            band(
                drawn,
                rows["layer"],
                rows["mean"],
                rows["low"],
                rows["high"],
                name=f"{domain}: {name}",
                color=PALETTE[at % len(PALETTE)],
            )
            drawn.data[-1].line.dash = dashes[measure]
    drawn.update_yaxes(type="log")
    drawn.update_layout(height=520)
    return drawn


def value_norms(result: Scan, domains: Sequence[str] | None = None) -> Any:
    """Value-state drain: value norm of the first token against the median of the others, every head, by layer.

    Args:
        result: what `interp.sinks.scan` gave.
        domains: which, in order; the first three by default.
    """
    import plotly.graph_objects as go

    chosen = _chosen(result, domains)[: None if domains else 3]
    table = result.heads(["value_ratio"])
    drawn = figure(
        "Value norm of the first token against the others",
        "layer",
        "‖W_O v‖ at the first token / median of the others",
        subtitle=_subtitle(result) + "; a box is a layer's heads",
    )
    for at, domain in enumerate(chosen):
        rows = table[table["domain"] == domain]
        drawn.add_trace(
            go.Box(
                x=rows["layer"].to_numpy(),
                y=to_float32(rows["mean"]),
                name=for_plotly(domain, inner=False),
                marker={"color": PALETTE[at % len(PALETTE)], "size": 3},
                line={"width": 1},
            )
        )
    drawn.add_hline(y=1, line={"color": REFERENCE, "dash": "dot"})
    drawn.update_yaxes(type="log")
    drawn.update_layout(boxmode="group", height=480)
    return drawn


def epsilon_curve(result: Scan, measure: str = "mass_first") -> Any:
    """Share of heads and texts whose mass exceeds ε, for every ε, by domain.

    Args:
        result: what `interp.sinks.scan` gave.
        measure: "mass_first" or "mass_sinks".
    """
    import plotly.graph_objects as go

    rates = result.sink_rate(measure=measure).groupby(["domain", "epsilon"], sort=False)["rate"].mean()
    drawn = figure(
        "Sink rate against its threshold",
        "ε",
        "share of heads and texts with mass > ε",
        subtitle=_subtitle(result) + "; dotted: ε = 0.3 (Gu et al.)",
    )
    for at, domain in enumerate(result.domains):
        curve = rates.loc[domain]
        drawn.add_trace(
            go.Scatter(
                x=to_float32(curve.index),
                y=to_float32(curve),
                mode="lines+markers",
                line={"color": PALETTE[at % len(PALETTE)], "dash": _DASHES[at // len(PALETTE) % len(_DASHES)]},
                name=for_plotly(domain, inner=False),
                hovertemplate="ε = %{x:.2f}: %{y:.1%}",
            )
        )
    drawn.add_vline(x=0.3, line={"color": REFERENCE, "dash": "dot"})
    drawn.update_yaxes(range=[0, 1], tickformat=".0%")
    return drawn


def _grid(result: Scan, measure: str, domain: str) -> np.ndarray:
    """(layer, head) means over the texts that have a value."""
    mean = result.values(measure)[domain].mean().unstack("head")
    return mean.reindex(range(int(mean.index.max()) + 1)).to_numpy()


def _chosen(result: Scan, domains: Sequence[str] | None) -> list[str]:
    chosen = result.domains if domains is None else list(domains)
    unknown = [name for name in chosen if name not in result.domains]
    if unknown or not chosen:
        raise InputError(
            f"no domain {unknown[0] if unknown else ''!r} in this scan; it has {', '.join(result.domains)}"
        )
    return chosen


def _counts(result: Scan) -> dict[str, int]:
    return {str(name): int(n) for name, n in result.frame.groupby("domain", observed=True)["text"].nunique().items()}


def _subtitle(result: Scan) -> str:
    lengths = result.frame["n_tokens"]
    tokens = f"{lengths.min()}" if lengths.min() == lengths.max() else f"{lengths.min()}–{lengths.max()}"
    return f"{result.provenance.model}; texts of {tokens} tokens"
