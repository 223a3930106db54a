"""Pictures of a localisation: head × layer drift, its profile over layers, where the last token looks. `Result -> plotly
Figure`.

Nothing is computed here beyond the summaries of `interp.conflict.focal` and `interp.conflict.span_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from interp.conflict.dialogues import SPANS
from interp.conflict.focal import head_scores, layer_scores
from interp.conflict.localization import CONFLICT, control_of
from interp.conflict.span_attention import attention_by_span
from interp.plotting import DIVERGING, PALETTE, REFERENCE, SEQUENTIAL, band, cap_cells, figure, for_plotly, to_float32
from interp.results import Result

_TITLES = {
    "excess": "Drift under conflict beyond the control",
    "score": "Drift under conflict, S",
    "score_pooled": "Drift under conflict, S as published",
}
_CONTROLS = {"paraphrase": "paraphrase", "other": "another demand"}
# Prompts keep their colour and their dash in every picture.
_LOOKS = {
    "consistent": (REFERENCE, "dot"),
    "paraphrase": (PALETTE[0], "dash"),
    "other": (PALETTE[0], "dash"),
    "conflict": (PALETTE[1], "solid"),
}


def localize(result: Result, score: str = "excess", share: float = 0.1) -> Any:
    """Head × layer map of the drift; focal heads carry a circle.

    Args:
        result: what `interp.conflict.localize` gave.
        score: "excess", "score" or "score_pooled".
        share: of heads that are focal.
    """
    import plotly.graph_objects as go

    table = head_scores(result, score=score, share=share)
    names = ["score", "control", "excess", "low", "high", "q"]
    grids = {name: table.pivot(index="layer", columns="head", values=name) for name in {score, *names}}
    values = cap_cells(grids[score].to_numpy())
    drawn = figure(_TITLES[score], "head", "layer", subtitle=_subtitle(result))
    hover = (
        "layer %{y}, head %{x}<br>conflict %{customdata[0]:.3f} − control %{customdata[1]:.3f} = %{customdata[2]:.3f}"
    )
    drawn.add_trace(
        go.Heatmap(
            z=values,
            x=grids[score].columns.to_numpy(),
            y=grids[score].index.to_numpy(),
            customdata=to_float32([grids[name].to_numpy() for name in names]).transpose(1, 2, 0),
            hovertemplate=hover
            + "<br>95 % interval %{customdata[3]:.3f} … %{customdata[4]:.3f}, q = %{customdata[5]:.2g}<extra></extra>",
            colorbar={"title": {"text": score.replace("_", ", ")}},
            **({"colorscale": DIVERGING, "zmid": 0} if score == "excess" else {"colorscale": SEQUENTIAL, "zmin": 0}),
        )
    )
    focal = table[table["focal"]]
    drawn.add_trace(
        go.Scatter(
            x=focal["head"].to_numpy(),
            y=focal["layer"].to_numpy(),
            mode="markers",
            marker={"symbol": "circle-open", "size": 11, "color": "black", "line": {"width": 2}},
            name=f"focal heads: the top {share:.0%}, {len(focal)}",
            hoverinfo="skip",
            showlegend=True,
        )
    )
    drawn.update_xaxes(dtick=max(1, len(grids[score].columns) // 9), showgrid=False, zeroline=False)
    drawn.update_yaxes(showgrid=False, zeroline=False)
    drawn.update_layout(height=180 + max(260, 16 * len(values)), legend=_LEGEND)
    return drawn


def layer_profile(result: Result, score: str = "excess", share: float = 0.1) -> Any:
    """A layer's drift under conflict and under the control, means over its heads with 95 % intervals over tasks.

    Args:
        result: what `interp.conflict.localize` gave.
        score, share: what makes a head focal; focal layers carry a triangle (rule "half") or a square (rule "sigma").
    """
    import plotly.graph_objects as go

    table = layer_scores(result, score=score, share=share)
    drawn = figure("Drift by layer", "layer", "D, mean over heads", subtitle=_subtitle(result))
    control = control_of(result)
    shown = (("control", control, f"control: {_CONTROLS[control]}"), ("score", "conflict", "conflict"))
    for name, prompt, label in shown:
        ends = (table[f"{name}_low"], table[f"{name}_high"])
        band(drawn, table["layer"], table[name], *ends, name=label, color=_LOOKS[prompt][0])
        drawn.data[-1].line.dash = _LOOKS[prompt][1]
    middle = to_float32(table["excess"])
    bars = {"type": "data", "symmetric": False, "width": 0, "thickness": 1.2, "color": PALETTE[2]}
    bars |= {"array": to_float32(table["high"]) - middle, "arrayminus": middle - to_float32(table["low"])}
    drawn.add_trace(
        go.Scatter(
            x=table["layer"].to_numpy(),
            y=middle,
            error_y=bars,
            customdata=to_float32(table[["q", "n_focal_heads"]]),
            mode="markers",
            marker={"color": PALETTE[2], "size": 7, "symbol": "diamond"},
            name="excess: conflict − control",
            hovertemplate="%{x}: %{y:.3f}, q = %{customdata[0]:.2g}, %{customdata[1]} focal heads",
        )
    )
    drawn.add_hline(y=0, line={"color": REFERENCE, "width": 1})
    top = float(table["score_high" if table["score_high"].notna().any() else "score"].max())
    for name, rule, symbol, at in (("focal", "half", "triangle-up", 1.12), ("focal_sigma", "sigma", "square", 1.24)):
        layers = table["layer"][table[name]].to_numpy()
        drawn.add_trace(
            go.Scatter(
                x=layers,
                y=to_float32([at * top] * len(layers)),
                mode="markers",
                marker={"symbol": symbol, "size": 9, "color": "black"},
                name=f"focal layers, rule {rule!r}",
                hovertemplate="layer %{x}",
            )
        )
    drawn.update_layout(height=520, margin={"t": 110}, legend=_LEGEND)
    return drawn


def span_masses(result: Result, heads: Sequence[tuple[int, int]] | None = None) -> Any:
    """Where the last token looks: attention on each span by layer, in the three prompts, with 95 % intervals over tasks.

    Args:
        result: what `interp.conflict.localize` gave.
        heads: (layer, head) to average over, such as `focal_heads` gave; all by default.
    """
    from plotly.subplots import make_subplots

    table = attention_by_span(result, heads)
    of = "all heads" if heads is None else f"{len(set(heads))} heads"
    titles = [for_plotly(span.replace("_", " "), inner=False) for span in SPANS]
    drawn = make_subplots(
        2, 3, subplot_titles=titles, shared_xaxes=True, x_title="layer", y_title="attention, mean over heads"
    )
    look = figure("Where the last prompt token looks", "", "", subtitle=f"{_subtitle(result)}; {of}").layout
    for at, span in enumerate(SPANS):
        for prompt in ("consistent", control_of(result), CONFLICT):
            rows = table[(table["span"] == span) & (table["prompt"] == prompt)]
            color, dash = _LOOKS[prompt]
            band(drawn, rows["layer"], rows["mean"], rows["low"], rows["high"], name=prompt, color=color)
            number = "" if at == 0 else str(at + 1)
            for trace in drawn.data[-3:]:
                trace.update(xaxis=f"x{number}", yaxis=f"y{number}")
            drawn.data[-1].update(line={"dash": dash}, marker={"size": 3}, showlegend=at == 0)
    drawn.update_layout(template=look.template, title=look.title, margin={"t": 110}, height=620)
    drawn.update_layout(legend={"x": 0.72, "y": 0.3, "title": {"text": "prompt"}})  # the sixth place is free
    drawn.update_yaxes(rangemode="tozero")
    return drawn


_LEGEND = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"}


def _subtitle(result: Result) -> str:
    made = result.provenance.parameters
    n_pairs, n_tasks = (result.frame[name].astype(str).nunique() for name in ("pair", "task"))
    form = "span masses" if made.get("align") == "spans" else f"first {made.get('n_keys')} keys"
    control = _CONTROLS[control_of(result)]
    against = f"against prompt {made.get('consistent')!r}, control: {control}"
    return f"{result.provenance.model}; {n_pairs} pairs of {n_tasks} tasks; {form}, {against}"
