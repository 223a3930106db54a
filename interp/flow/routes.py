"""Where the flow goes: one maximum flow edge by edge with its minimum cut, and the strongest routes.

1. `edge_flows`: one maximum flow from a target to a source on every edge that carries any, and the edges of a minimum
   cut: together they hold back everything else. Maximum flows are not unique; the value is.
2. `path`: a flow through layers is a sum of routes. The widest route through what the flow carries is taken out with the width
   that it has, again and again: at most as many routes as edges, the strongest first. With `method="widest"` routes are
   taken out of the capacities instead: the first is Vico's path, and the others are what is left beside it.

Both are tables; a graph's layers count from 0, and a position at depth d is what it is after d layers.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp.errors import InputError
from interp.flow.exact import flow_on_edges, rounding_error
from interp.flow.graph import AttentionGraph
from interp.flow.positions import check_sources, check_targets
from interp.results import Column, Result

EDGE_COLUMNS = (
    Column("layer", "int16", "layer", "0-based layer of the graph whose attention the edge is"),
    Column("query", "int32", "index", "position above"),
    Column("key", "int32", "index", "position below"),
    Column("query_token", "str", "", "the token above"),
    Column("key_token", "str", "", "the token below"),
    Column("capacity", "float64", "", "what the edge could carry, in units of attention"),
    Column("flow", "float64", "", "what it carries"),
    Column("cut", "bool", "", "whether it belongs to the minimum cut"),
)
PATH_COLUMNS = (
    Column("route", "int32", "rank", "0 is the strongest"),
    Column("depth", "int16", "layers", "layers below the node: 0 is the input"),
    Column("position", "int32", "index", "position of the node"),
    Column("token", "str", "", "its token"),
    Column("width", "float64", "", "what the whole route carries, in units of attention"),
    Column("share", "float64", "", "of the flow, or of the first width where routes are taken out of the capacities"),
)


def edge_flows(graph: AttentionGraph, target: int = -1, source: int | Sequence[int] = 0) -> Result:
    """One maximum flow on every edge, and a minimum cut.

    Args:
        graph: what `attention_graph` gave.
        target: position at the top.
        source: position of the input, or a group of positions.

    Returns:
        A `Result` of kind "flow.edge_flows" with `EDGE_COLUMNS`: edges that carry flow or are cut. The parameter "flow"
        is the whole.

    Raises:
        InputError: a position out of range.

    Example:
        >>> import torch
        >>> from interp.flow.graph import attention_graph
        >>> graph = attention_graph(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]))
        >>> edge_flows(graph, -1, 0).frame[["query", "key", "flow", "cut"]].values.tolist()
        [[1, 0, 0.25, True]]
    """
    start = time.perf_counter()
    (target,), (group,) = check_targets([target], len(graph)), check_sources([source], len(graph))
    capacity = graph.capacity.detach()
    flow, cut = (tensor.numpy() for tensor in flow_on_edges(capacity, target, group))
    layer, query, key = np.nonzero((flow > 0) | (cut & (capacity.cpu().numpy() > 0)))
    tokens = np.array(graph.tokens, object)
    frame = pd.DataFrame(
        {
            "layer": layer,
            "query": query,
            "key": key,
            "query_token": tokens[query],
            "key_token": tokens[key],
            "capacity": capacity.cpu().double().numpy()[layer, query, key],
            "flow": flow[layer, query, key],
            "cut": cut[layer, query, key],
        }
    )
    total = float(flow[-1, target].sum())
    about = {"target": target, "source": list(group), "flow": total, "rounding_error": rounding_error(capacity)}
    return Result("flow.edge_flows", frame, EDGE_COLUMNS, _provenance(graph, start, about), _attached(graph))


def path(
    graph: AttentionGraph,
    target: int = -1,
    source: int | Sequence[int] | None = None,
    *,
    top: int = 10,
    method: str = "exact",
) -> Result:
    """The strongest routes from a target to a source.

    Args:
        graph: what `attention_graph` gave.
        target: position at the top.
        source: position of the input, or a group of them; `None` for the whole input.
        top: how many routes.
        method: "exact" (routes of one maximum flow) or "widest" (routes through the capacities).

    Returns:
        A `Result` of kind "flow.path" with `PATH_COLUMNS`: a row per route and depth, from the top. The parameters
        "flow" and "shown" are the whole flow and what the routes carry of it ("widest": the first width, and 1).

    Raises:
        InputError: a position out of range, fewer than one route, an unknown method.

    Example:
        >>> import torch
        >>> from interp.flow.graph import attention_graph
        >>> graph = attention_graph(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]))
        >>> path(graph, -1).frame[["route", "depth", "position", "width"]].values.tolist()
        [[0.0, 1.0, 1.0, 0.75], [0.0, 0.0, 1.0, 0.75], [1.0, 1.0, 1.0, 0.25], [1.0, 0.0, 0.0, 0.25]]
    """
    start = time.perf_counter()
    if method not in ("exact", "widest"):
        raise InputError(f"method={method!r}; expected 'exact' or 'widest'")
    if isinstance(top, bool) or not hasattr(top, "__index__") or top < 1:
        raise InputError(f"top={top!r}; expected at least 1 route")
    (target,) = check_targets([target], len(graph))
    (group,) = check_sources([range(len(graph)) if source is None else source], len(graph))
    capacity = graph.capacity.detach()
    left = (flow_on_edges(capacity, target, group)[0] if method == "exact" else capacity.cpu().double()).numpy().copy()
    total = float(left[-1, target].sum()) if method == "exact" else 0.0
    routes: list[tuple[list[int], float]] = []
    while len(routes) < top:
        route, width = widest_route(left, target, group)
        if width <= max(total, 1e-300) * 1e-12:
            break
        for layer in range(len(left)):
            left[layer, route[layer + 1], route[layer]] -= width
        routes.append((route, width))
    if method == "widest":
        total = routes[0][1] if routes else 0.0
    rows = [
        {
            "route": rank,
            "depth": depth,
            "position": route[depth],
            "token": graph.tokens[route[depth]],
            "width": width,
            "share": width / total,
        }
        for rank, (route, width) in enumerate(routes)
        for depth in range(len(route) - 1, -1, -1)
    ]
    carried = sum(width for _, width in routes) / total if total else 1.0
    shown = min(1.0, carried) if method == "exact" else 1.0
    about = {"target": target, "source": list(group), "method": method, "flow": total, "shown": shown}
    frame = pd.DataFrame(rows, columns=[column.name for column in PATH_COLUMNS])
    return Result("flow.path", frame, PATH_COLUMNS, _provenance(graph, start, about), _attached(graph))


def widest_route(capacity: np.ndarray, target: int, group: Sequence[int]) -> tuple[list[int], float]:
    """The widest path as positions by depth, from the input to the target, and its width."""
    width = capacity[-1, target].copy()
    choices = []
    for layer in range(len(capacity) - 2, -1, -1):
        narrow = np.minimum(width[:, None], capacity[layer])
        choices.append(narrow.argmax(0))
        width = narrow.max(0)
    at = int(max(group, key=lambda position: width[position]))
    found, route = float(width[at]), [at]
    for choice in reversed(choices):
        route.append(int(choice[route[-1]]))
    return [*route, target], found


def _provenance(graph: AttentionGraph, start: float, about: dict[str, Any]) -> Any:
    parameters = {**graph.provenance.parameters, **about, "n_layers": graph.n_layers}
    return dataclasses.replace(graph.provenance, parameters=parameters, wall_time=time.perf_counter() - start)


def _attached(graph: AttentionGraph) -> dict[str, Any]:
    return {"tokens": list(graph.tokens)}
