"""Where flow goes: one maximum flow on its edges with its minimum cut, and the strongest routes. `Result -> Figure`.

A flow through 30 layers of 30 tokens may use ten thousand edges. The largest are drawn, and the subtitle says which
share of the flow they carry. Routes are drawn at some depths only: first those that show every stop, then those that
place the moves between them. Where all routes stay between two depths nothing is lost; the subtitle says what is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pandas as pd

from interp.errors import InputError
from interp.flow.flow_text_plots import counted, headline, named, percent, short
from interp.plotting import PALETTE, REFERENCE, figure, for_plotly, to_float32, token_axis
from interp.results import Result

_WIDTHS = (7.0, 5.0, 3.5, 2.3, 1.4, 0.8)  # pixels: a class each, from the largest flow down by halves
_OPACITIES = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3)
_FLOW, _CUT, _OTHER = PALETTE[0], PALETTE[1], "#888888"
_LABELS = 60  # tokens that an axis can name
_NODE, _GAP, _HEIGHT = 14, 14, 560  # pixels: a node's width, the least between two nodes of a depth, the diagram


def edge_flows(result: Result, max_edges: int = 300) -> Any:
    """One maximum flow, layer above layer: edges as wide as what they carry, the minimum cut dashed.

    Args:
        result: what `interp.flow.edge_flows` gave.
        max_edges: how many edges are drawn, the largest; and how many of the minimum cut besides, at most.

    Returns:
        Six classes of width and opacity, each for half of what the one before carries, relative to the largest edge.
        The subtitle says which share of the flow through a layer the edges carry, as a mean over layers.

    Raises:
        InputError: fewer than one edge.
    """
    import plotly.graph_objects as go

    if max_edges < 1:
        raise InputError(f"max_edges={max_edges}; expected at least 1 edge")
    made, tokens = result.provenance.parameters, result.attachments["tokens"]
    frame = result.frame.sort_values("flow", ascending=False, kind="stable")
    largest = frame[frame["flow"] > 0].head(max_edges)
    cut = frame[frame["cut"] & ~frame.index.isin(largest.index)].head(max_edges)
    shown = pd.concat([largest, cut])
    drawn = figure("", "token", "depth", y_unit="layers")
    title = f"One maximum flow from {_name(tokens, made['source'])} to {_name(tokens, [made['target']])}"
    headline(drawn, title, *_share_shown(result, len(largest), shown))
    top = float(frame["flow"].max()) if len(frame) else 0.0
    rank = _class(shown["flow"].to_numpy(), top)
    for is_cut in (False, True):
        for at, width in enumerate(_WIDTHS):
            rows = shown[(rank == at) & (shown["cut"].to_numpy() == is_cut)]
            if len(rows):
                drawn.add_trace(
                    go.Scatter(
                        **_lines(rows),
                        mode="lines",
                        line={"width": width, "color": _CUT, "dash": "4px,3px"}
                        if is_cut
                        else {"width": width, "color": _FLOW},
                        opacity=0.95 if is_cut else _OPACITIES[at],
                        name=f"{_class_name(at, top)} ({len(rows):,})",
                        legendgroup="cut" if is_cut else "flow",
                        legendgrouptitle={"text": "minimum cut" if is_cut else "flow [attention]<br>(edges)"},
                        hoverinfo="skip",
                    )
                )
    drawn.add_trace(_midpoints(shown, float(made["flow"])))
    for name, symbol, depth, positions in (
        ("source", "circle", 0, made["source"]),
        ("target", "diamond", made["n_layers"], [made["target"]]),
    ):
        drawn.add_trace(
            go.Scatter(
                x=positions,
                y=[depth] * len(positions),
                mode="markers",
                marker={"size": 12, "color": "#111111", "symbol": symbol, "line": {"color": "white", "width": 1}},
                hovertext=[named(at, tokens[at]) for at in positions],
                hovertemplate=f"{name} %{{hovertext}}<extra></extra>",
                name=name,
            )
        )
    n_layers, step = int(made["n_layers"]), -(-len(tokens) // _LABELS)
    places = range(0, len(tokens), step)
    axis = token_axis(tokens) | {"tickvals": list(places), "ticktext": [named(at, tokens[at]) for at in places]}
    drawn.update_xaxes(**axis, tickangle=-60, title_standoff=12, range=[-0.8, len(tokens) - 0.2], zeroline=False)
    drawn.update_yaxes(range=[-0.6, n_layers + 0.6], dtick=max(1, -(-n_layers // 15)), tick0=0, zeroline=False)
    drawn.update_layout(
        height=int(min(1000, max(580, 240 + 22 * n_layers))), margin={"t": 100}, hovermode="closest", showlegend=True
    )
    return drawn


def path(result: Result, max_depths: int = 8) -> Any:
    """The strongest routes as a Sankey diagram, from the input on the left to the target on the right.

    Args:
        result: what `interp.flow.path` gave.
        max_depths: depths drawn at most, the input and the target among them.

    Returns:
        One band per route between depths, as wide as the route. Routes to one source share a colour; where all have one
        source the strongest is orange. What a pointer shows has a route's every stop.

    Raises:
        InputError: fewer than two depths.
    """
    import plotly.graph_objects as go

    if max_depths < 2:
        raise InputError(f"max_depths={max_depths}; expected at least 2: the input and the target")
    made, tokens = result.provenance.parameters, result.attachments["tokens"]
    groups = [rows.sort_values("depth") for _, rows in result.frame.groupby("route")]
    routes = [rows["position"].tolist() for rows in groups]
    widths, shares = ([float(rows[name].iloc[0]) for rows in groups] for name in ("width", "share"))
    drawn = figure("", "", "")
    ends = f"from {_name(tokens, made['source'])} to {_name(tokens, [made['target']])}"
    drawn.update_xaxes(visible=False)
    drawn.update_yaxes(visible=False)
    if not routes:
        headline(drawn, f"No route {ends}", f"{_model(result)}; nothing of the source reaches the target")
        return drawn
    depths = _depths(routes, widths, max_depths)
    strongest = "The strongest route" if len(routes) == 1 else f"The {len(routes)} strongest routes"
    headline(drawn, f"{strongest} {ends}", *_routes_shown(result, routes, depths))
    nodes = [(depth, at) for depth in depths for at in sorted({route[depth] for route in routes})]
    index = {node: n for n, node in enumerate(nodes)}
    steps = [(rank, below, above) for rank in range(len(routes)) for below, above in pairwise(depths)]
    colors = [_transparent(color, 0.7 if rank == 0 else 0.45) for rank, color in enumerate(_colors(routes))]
    whole = "the flow" if made["method"] == "exact" else "the widest route"
    about = [f"{_itinerary(rank, route, tokens)}<br>{shares[rank]:.2%} of {whole}" for rank, route in enumerate(routes)]
    x, y = _layout(routes, widths, depths, nodes)
    drawn.add_trace(
        go.Sankey(
            arrangement="fixed",
            node={
                "label": [named(at, tokens[at]) for _, at in nodes],
                "x": x,
                "y": y,
                "color": ["#444444"] * len(nodes),
                "pad": _GAP,
                "thickness": _NODE,
                "line": {"width": 0},
                "customdata": [f"{named(at, tokens[at])}, depth {depth}" for depth, at in nodes],
                "hovertemplate": "%{customdata}<br>%{value:.3g} of these routes pass<extra></extra>",
            },
            link={
                "source": [index[below, routes[rank][below]] for rank, below, _ in steps],
                "target": [index[above, routes[rank][above]] for rank, _, above in steps],
                "value": to_float32([widths[rank] for rank, _, _ in steps]),
                "color": [colors[rank] for rank, _, _ in steps],
                "customdata": [about[rank] for rank, _, _ in steps],
                "hovertemplate": "%{customdata}<br>%{value:.3g} wide<extra></extra>",
            },
            textfont={"size": 13, "color": "#111111"},
        )
    )
    for n, depth in enumerate(depths):
        drawn.add_annotation(
            x=n / (len(depths) - 1),
            y=1.02,
            xref="paper",
            yref="paper",
            yanchor="bottom",
            text="input" if depth == 0 else f"after {depth}",
            showarrow=False,
            font={"color": REFERENCE},
        )
    drawn.update_layout(height=_HEIGHT, margin={"t": 140, "b": 40, "l": 50, "r": 60})
    return drawn


def _share_shown(result: Result, n_largest: int, shown: pd.DataFrame) -> list[str]:
    """How many edges are drawn and what they carry, in two lines."""
    made, frame = result.provenance.parameters, result.frame
    total, n_cut = float(made["flow"]), int(frame["cut"].sum())
    if total <= 0:
        return [f"{_model(result)}; nothing of the source reaches the target"]
    drawn_cut = int(shown["cut"].sum())
    of_cut = (f"{drawn_cut:,} of " if drawn_cut < n_cut else "") + counted(n_cut, "edge")
    first = f"{_model(result)}; flow {total:.3g}; minimum cut dashed: {of_cut}"
    carrying = int((frame["flow"] > 0).sum())
    share = float(shown["flow"].sum()) / (total * int(made["n_layers"]))
    more = len(shown) - n_largest
    if n_largest == carrying:
        return [first, f"all that carry flow are drawn: {counted(carrying, 'edge')}"]
    edges = f"the {n_largest:,} largest of {carrying:,} edges" + (f" and {more:,} more of the cut" if more else "")
    return [first, f"{edges}: {percent(share)} of the flow through a layer, mean over layers"]


def _class(flow: np.ndarray, largest: float) -> np.ndarray:
    """0 for more than half of the largest, 1 for more than a quarter, …"""
    if largest <= 0:
        return np.full(len(flow), len(_WIDTHS) - 1)
    with np.errstate(divide="ignore"):
        return np.clip(np.floor(-np.log2(flow / largest)), 0, len(_WIDTHS) - 1).astype(int)


def _class_name(at: int, largest: float) -> str:
    low = largest * 0.5 ** (at + 1)
    if at == len(_WIDTHS) - 1:
        return f"up to {2 * low:.2g}"
    return f"{low:.2g} – {2 * low:.2g}"


def _lines(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """Edges as one line with gaps."""
    gap = np.full(len(rows), np.nan)
    layer = rows["layer"].to_numpy(float)
    x = np.stack([rows["key"].to_numpy(float), rows["query"].to_numpy(float), gap], axis=1)
    return {"x": to_float32(x.ravel()), "y": to_float32(np.stack([layer, layer + 1, gap], axis=1).ravel())}


def _midpoints(rows: pd.DataFrame, total: float) -> Any:
    """Invisible points that a pointer finds."""
    import plotly.graph_objects as go

    edges = zip(*(rows[name] for name in ("key", "key_token", "query", "query_token", "layer", "cut")), strict=True)
    return go.Scatter(
        x=to_float32((rows["key"] + rows["query"]) / 2),
        y=to_float32(rows["layer"] + 0.5),
        mode="markers",
        marker={"size": 9, "opacity": 0},
        hovertext=[
            f"{named(key, below)} → {named(query, above)}, layer {layer}{'<br>in the minimum cut' if cut else ''}"
            for key, below, query, above, layer, cut in edges
        ],
        customdata=to_float32(np.stack([rows["flow"], rows["capacity"], rows["flow"] / (total or 1.0)], axis=1)),
        hovertemplate="%{hovertext}<br>carries %{customdata[0]:.3g} of %{customdata[1]:.3g}, "
        "%{customdata[2]:.2%} of the flow<extra></extra>",
        showlegend=False,
    )


def _stops(route: list[int]) -> list[tuple[int, int, int]]:
    """(position, first depth, last depth) of every run of depths that a route stays at a position."""
    stops, depth = [], 0
    for position, run in groupby(route):
        length = len(list(run))
        stops.append((position, depth, depth + length - 1))
        depth += length
    return stops


def _depths(routes: list[list[int]], widths: list[float], most: int) -> list[int]:
    """The input, the target, and the depths that hide least: fewest stops, then the least doubt where a route moves."""
    top = len(routes[0]) - 1
    chosen = [0, top] if top else [0]
    while len(chosen) < min(most, top + 1):
        before = _hidden(routes, widths, chosen)
        if before == (0.0, 0.0):
            break
        chosen.append(min(set(range(top)) - set(chosen), key=lambda depth: _hidden(routes, widths, [*chosen, depth])))
    return sorted(chosen)


def _hidden(routes: list[list[int]], widths: list[float], depths: Sequence[int]) -> tuple[float, float]:
    """Stops that lie between the depths, and depths at which a move may have been, weighted by the routes' widths."""
    stops = moves = 0.0
    shown = sorted(depths)
    for route, width in zip(routes, widths, strict=True):
        for _, first, last in _stops(route):
            stops += width * (not any(first <= depth <= last for depth in shown))
            if first > 0:
                below = max(depth for depth in shown if depth < first)
                moves += width * (min(depth for depth in shown if depth >= first) - below - 1)
    return stops, moves


def _layout(
    routes: list[list[int]], widths: list[float], depths: list[int], nodes: list[tuple[int, int]]
) -> tuple[list[float], list[float]]:
    """Nodes' places between 0 and 1: depths from the left, positions from above, each as tall as what passes it."""
    passing = {
        (depth, at): sum(width for route, width in zip(routes, widths, strict=True) if route[depth] == at)
        for depth, at in nodes
    }
    counts = {depth: sum(node[0] == depth for node in nodes) for depth in depths}
    free = min(0.7, (max(counts.values()) - 1) * _GAP / (_HEIGHT - 180))  # between nodes, where there are most
    x, y = [], []
    for n, depth in enumerate(depths):
        gap = free / (counts[depth] - 1) if counts[depth] > 1 else 0.0
        start = 0.0 if gap else free / 2
        for node in nodes:
            if node[0] == depth:
                size = (1 - free) * passing[node] / sum(widths)
                x.append(min(0.999, max(0.001, n / (len(depths) - 1))))
                y.append(min(0.999, max(0.001, start + size / 2)))
                start += size + gap
    return x, y


def _colors(routes: list[list[int]]) -> list[str]:
    """By source, the first six apart; by rank where all have one source."""
    sources = list(dict.fromkeys(route[0] for route in routes))
    if len(sources) == 1:
        return [_CUT, *[_FLOW] * (len(routes) - 1)]
    return [PALETTE[at] if (at := sources.index(route[0])) < 6 else _OTHER for route in routes]


def _itinerary(rank: int, route: list[int], tokens: list[str]) -> str:
    """Every stop of a route, for the pointer."""
    stops = [
        f"{named(position, tokens[position])} (depth {first}{f'–{last}' if last > first else ''})"
        for position, first, last in _stops(route)
    ]
    return f"route {rank + 1}: " + "<br>→ ".join(" → ".join(stops[at : at + 3]) for at in range(0, len(stops), 3))


def _routes_shown(result: Result, routes: list[list[int]], depths: list[int]) -> list[str]:
    """What the routes carry, and what the chosen depths hide, in two lines."""
    made = result.provenance.parameters
    if made["method"] == "exact":
        carried = f"{percent(made['shown'])} of a maximum flow of {made['flow']:.3g}"
    else:
        carried = f"taken out of the capacities one by one, the widest {made['flow']:.3g} wide"
    colors = "colours: sources" if len({route[0] for route in routes}) > 1 else "orange: the strongest"
    once = [1.0] * len(routes)
    stops, moves = _hidden(routes, once, depths)
    total = sum(len(_stops(route)) for route in routes)
    hides = f"{stops:.0f} of {total} stops lie between" if stops else "every stop is shown"
    hides += "" if stops or moves else ", all stay where they are between these depths"
    columns = f"after how many layers, {len(depths)} of {made['n_layers'] + 1} depths"
    return [f"{_model(result)}; {carried}; {colors}", f"columns: {columns}; {hides}"]


def _model(result: Result) -> str:
    return for_plotly(result.provenance.model or "a pattern", inner=False)


def _name(tokens: list[str], positions: list[int]) -> str:
    """Positions by their tokens, for a title."""
    if len(positions) == len(tokens) > 1:
        return "the whole input"
    more = ", …" if len(positions) > 3 else ""
    words = ", ".join(f"“{short(tokens[at])}”" for at in positions[:3]) + more
    return f"{words} ({', '.join(map(str, positions[:3]))}{more})"


def _transparent(color: str, opacity: float) -> str:
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
