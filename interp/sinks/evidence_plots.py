"""Pictures of the causal evidence: `Result -> plotly Figure`. What is averaged is averaged by the results' own summaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp.errors import InputError
from interp.plotting import PALETTE, REFERENCE, figure, to_float32
from interp.results import Result
from interp.sinks import ablation, eviction, residual_peaks
from interp.tokens import for_plotly

_TOP = 20  # heads that a bar chart shows
_POINTS = 4000  # texts that a scatter shows
_WORDS = {"zero": "zeroed", "to_sink": "with all its mass on the first token", "mean": "held at its mean"}
_ARMS = {"full": "all keys", "window": "last W", "sinks": "last W − s and first s", "control": "last W − s and next s"}


def ablate(result: Result, top: int = _TOP) -> Any:
    """Loss change per ablated head and domain with intervals over texts, beside random heads.

    Args:
        result: what `interp.sinks.ablate` gave.
        top: how many heads; those whose loss change in some domain is largest.
    """
    table, about = ablation.summary(result), result.provenance.parameters
    chosen = table[table["arm"] == "head"]
    size = chosen.assign(size=chosen["mean"].abs()).groupby(["layer", "head"])["size"].max()
    shown = sorted(size.nlargest(top).index)
    control = ablation.against_random(result)
    control = control[control["what"] == "random"]
    drawn = figure(
        "What an attention head is worth, by domain",
        "head",
        "loss change when ablated",
        y_unit="nats per token",
        subtitle=(
            f"{result.provenance.model}; one head {_WORDS.get(about.get('mode', ''), 'ablated')}; {_texts(table)}; "
            f"{len(shown)} of {len(size)} heads, largest change; bars: 95 % interval over texts"
            f"{'; dashed: mean of random heads' if len(control) else ''}"
        ),
    )
    names = [_head(layer, head) for layer, head in shown]
    for color, domain in zip(_colors(table), _domains(table), strict=True):
        rows = chosen[chosen["domain"] == domain].set_index(["layer", "head"]).loc[shown]
        drawn.add_bar(x=names, name=_safe(domain), marker_color=color, **_interval(rows, "mean"))
        random = control[control["domain"] == domain]
        for row in random.itertuples():
            drawn.add_scatter(
                x=[names[0], names[-1]],
                y=to_float32([row.mean, row.mean]),
                mode="lines+markers",
                marker={"size": 1},
                line={"color": color, "dash": "dash"},
                name=f"{row.n_heads} random heads, {_safe(domain)}",
                hovertemplate=f"random heads: {row.mean:.4g} ({row.low:.4g} … {row.high:.4g})<extra></extra>",
            )
    drawn.update_layout(barmode="group", xaxis={"type": "category"}, legend={"orientation": "h", "y": -0.25})
    return drawn


def ablation_scatter(result: Result, layer: int | None = None, head: int | None = None) -> Any:
    """The paper's scatter: attention on the first token against loss change, one point per text, coloured by domain.

    Args:
        result: what `interp.sinks.ablate` gave.
        layer, head: of the ablated head; by default the chosen head whose attention on it differs most between domains.

    Raises:
        InputError: the head was not ablated, only one of the two was given, or no attention was measured.
    """
    frame = result.frame
    if (layer is None) != (head is None):
        raise InputError(f"layer={layer} and head={head}; give both, or neither")
    if layer is None or head is None:
        layer, head = _most_different(result)
    rows = frame[(frame["layer"] == layer) & (frame["head"] == head)]
    if rows.empty:
        raise InputError(
            f"head {_head(layer, head)} was not ablated; call interp.sinks.ablate with heads=[({layer}, {head})]"
        )
    if rows["mass_first"].isna().all():
        raise InputError("the attention on the first token was not measured; call interp.sinks.ablate with scan=True")
    drawn = figure(
        f"Head {_head(layer, head)}: attention on the first token and loss change, by text",
        "attention on the first token, mean over queries",
        "loss change when ablated",
        x_unit="probability",
        y_unit="nats per token",
        subtitle=f"{result.provenance.model}; one point per text; {_texts(rows)}",
    )
    symbols = ("circle", "diamond", "square", "cross", "triangle-up", "x", "star")
    for at, (color, domain) in enumerate(zip(_colors(rows), _domains(rows), strict=True)):
        points = rows[rows["domain"] == domain].head(_POINTS)
        drawn.add_scatter(
            x=to_float32(points["mass_first"]),
            y=to_float32(points["delta_loss"]),
            mode="markers",
            marker={"color": color, "symbol": symbols[at % len(symbols)], "size": 8, "opacity": 0.75},
            name=_safe(domain),
            text=[f"text {text}" for text in points["text"]],
            hovertemplate="%{text}<br>mass %{x:.3f}, loss %{y:+.4f}",
        )
    drawn.add_hline(y=0, line={"color": REFERENCE, "dash": "dot"})
    drawn.update_xaxes(range=[-0.03, 1.03])
    return drawn


def residual_peak_origin(result: Result, top: int = 4) -> Any:
    """Left, the sink token's norm by depth, with and without blocks that make the peak; right, what remains without each.

    Args:
        result: what `interp.sinks.residual_peak_origin` gave.
        top: how many blocks get a line: those without which least remains.
    """
    table = residual_peaks.origin(result)
    domain = _domains(table)[0]
    drawn = figure(
        "Which block makes the residual peak",
        f"layers passed ({domain})",
        "norm at the sink token",
        y_unit="residual stream",
        subtitle=(
            f"{result.provenance.model}; {_texts(table)}; one block zeroed at a time; right: share of the norm that "
            f"remains at depth {int(table['depth'].iloc[0])}, controls are blocks of later layers"
        ),
    )
    here = result.frame[result.frame["domain"] == domain].astype({"arm": str, "block": str})
    curves = {
        key: rows[["norm_sink", "norm_others"]] for key, rows in _curves(here).groupby(["arm", "block", "block_layer"])
    }
    plain = curves["none", "", -1]
    lines = [
        ("model as it is", plain["norm_sink"], "#222222", "solid"),
        ("other tokens", plain["norm_others"], REFERENCE, "dot"),
    ]
    early = (
        table[(table["domain"] == domain) & (table["arm"] == "early")]
        .nsmallest(top, "remaining")
        .sort_values("block_layer")
    )
    for color, row in zip(PALETTE, early.to_dict("records"), strict=False):
        without = curves["early", row["block"], row["block_layer"]]["norm_sink"]
        lines.append((f"without {_block(row)}", without, color, "dash"))
    for name, values, color, dash in lines:
        line = {"color": color, "dash": dash}
        drawn.add_scatter(x=to_float32(values.index), y=to_float32(values), mode="lines", line=line, name=name)
    for color, name in zip(_colors(table), _domains(table), strict=True):
        rows = table[(table["domain"] == name) & (table["arm"] != "none")]
        drawn.add_bar(
            x=[_block(row) + (" (control)" if row["arm"] == "control" else "") for row in rows.to_dict("records")],
            name=_safe(name),
            marker_color=color,
            xaxis="x2",
            yaxis="y2",
            **_interval(rows, "remaining"),
        )
    drawn.update_yaxes(type="log", exponentformat="power", dtick=1)
    drawn.update_layout(
        xaxis={"domain": [0, 0.42]},
        xaxis2={"domain": [0.52, 1], "anchor": "y2", "type": "category"},
        yaxis2={"anchor": "x2", "dtick": 0.2, "rangemode": "tozero", "title": {"text": "norm that remains [share]"}},
        barmode="group",
        legend={"orientation": "h", "y": -0.4},
        height=560,
    )
    return drawn


def evict(result: Result) -> Any:
    """Loss change against full attention under a sliding window: first keys removed, kept, or others kept in their place.

    Args:
        result: what `interp.sinks.evict` gave.
    """
    table, about = eviction.summary(result), result.provenance.parameters
    drawn = figure(
        "A sliding window with and without the first keys",
        "keys that a token sees",
        "loss above that of full attention",
        y_unit="nats per token",
        subtitle=(
            f"{result.provenance.model}; W = {about.get('window')}, s = {about.get('n_sinks')}; {_texts(table)}; bars: 95 % "
            f"interval over texts"
        ),
    )
    for color, domain in zip(_colors(table), _domains(table), strict=True):
        rows = table[table["domain"] == domain].set_index("arm").loc[["window", "control", "sinks"]]
        perplexity = [f"perplexity {value:.4g}" for value in rows["perplexity"]]
        full = float(table.loc[(table["domain"] == domain) & (table["arm"] == "full"), "perplexity"].iloc[0])
        drawn.add_bar(
            x=[_ARMS[arm] for arm in rows.index],
            name=f"{_safe(domain)} (full: perplexity {full:.4g})",
            marker_color=color,
            text=perplexity,
            textposition="none",
            **_interval(rows, "delta", "%{text}<br>"),
        )
    drawn.update_layout(barmode="group", legend={"orientation": "h", "y": -0.2})
    return drawn


def _interval(rows: pd.DataFrame, measure: str, more: str = "") -> dict[str, Any]:
    """Heights of bars and their intervals; none where there is a single text."""
    middle, low, high = (to_float32(rows[name]) for name in (measure, "low", "high"))
    up, down = (np.nan_to_num(ends, nan=0.0) for ends in (high - middle, middle - low))
    hover = np.stack([low, high], axis=1)
    return {
        "y": middle,
        "error_y": {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.2},
        "customdata": hover,
        "hovertemplate": "%{x}: %{y:.4g}<br>" + more + "95 % interval %{customdata[0]:.4g} … %{customdata[1]:.4g}",
    }


def _most_different(result: Result) -> tuple[int, int]:
    """The chosen head whose attention on the first token differs most between domains; of one domain, the one worth most."""
    table = ablation.summary(result)
    table = table[table["arm"] == "head"].assign(size=table["mean"].abs())
    measure = "mass_first" if table["domain"].nunique() > 1 else "size"
    means = table.pivot_table(index=["layer", "head"], columns="domain", values=measure, observed=True, dropna=False)
    spread = means.max(axis=1) - means.min(axis=1) if means.shape[1] > 1 else means.iloc[:, 0]
    layer, head = spread.index[int(spread.fillna(-1).to_numpy().argmax())]
    return int(layer), int(head)


def _curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over texts, with the depth as index."""
    means = rows.groupby(["arm", "block", "block_layer", "depth"])[["norm_sink", "norm_others"]].mean()
    return means.reset_index().set_index("depth")


def _domains(table: pd.DataFrame) -> list[str]:
    return [str(name) for name in table["domain"].drop_duplicates()]


def _colors(table: pd.DataFrame) -> Sequence[str]:
    return [PALETTE[at % len(PALETTE)] for at in range(len(_domains(table)))]


def _texts(table: pd.DataFrame) -> str:
    """How many texts of each domain a summary, or rows per text, are of."""
    groups = table.groupby("domain", observed=True, sort=False)
    counts = groups["n"].max() if "n" in table else groups["text"].nunique()
    if len(counts) > 1 and counts.nunique() == 1:
        return f"{counts.iloc[0]} texts per domain"
    return ", ".join(f"{count} texts of {name}" for name, count in counts.items())


def _head(layer: int, head: int) -> str:
    return f"L{layer}H{head}"


def _block(row: dict[Any, Any]) -> str:
    return f"{'MLP' if row['block'] == 'mlp' else 'attention'} {row['block_layer']}"


def _safe(name: str) -> str:
    return for_plotly(name, inner=False)
