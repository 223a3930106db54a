"""What others compute flows with, on the graphs of `interp.flow`: four maximum-flow solvers, and Vico's widest path.

A solver takes capacities (layer, query, key), builds its graph once from the edges that carry anything, and returns the
call (target, source) → maximum flow from position `target` at the top to position `source` of the input. Node
l · length + i is position i after l layers. The solvers run on one thread.

Sources: the networkx call is that of samiraabnar/attention_flow, attention_graph_util.py (compute_flows). The widest
path is written from the definition in Yang & Wang (Vico), arXiv 2407.06182, with the shapes of their released
vico/attribution/op.py (Adamdad/vico): (1, T, T, T), the minimum first, then the maximum over the last dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Solver = Callable[[int, int], float]
_SCIPY_BITS = 20  # of scipy's 32: rows that sum to much more than 1 fit too
_ORTOOLS_BITS = 40


def edges_of(capacity: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(from, to, capacity) of the edges above 0."""
    length = capacity.shape[-1]
    layer, query, key = (capacity > 0).nonzero(as_tuple=True)
    above, below = ((layer + 1) * length + query).int(), (layer * length + key).int()
    return above.numpy(), below.numpy(), capacity[layer, query, key].double().numpy()


def networkx_solver(capacity: Tensor, flow_func: Any = None) -> Solver:
    """networkx, by preflow-push (its default) or `flow_func`."""
    import networkx

    graph = networkx.DiGraph()
    graph.add_nodes_from(range(_nodes(capacity)))
    above, below, values = edges_of(capacity)
    for tail, head, value in zip(above.tolist(), below.tolist(), values.tolist(), strict=True):
        graph.add_edge(tail, head, capacity=value)
    chosen = {} if flow_func is None else {"flow_func": flow_func}

    def solve(target: int, source: int) -> float:
        return float(networkx.maximum_flow_value(graph, _top(capacity, target), source, **chosen))

    return solve


def edmonds_karp_solver(capacity: Tensor) -> Solver:
    """networkx as the public attention-flow code calls it."""
    from networkx.algorithms.flow import edmonds_karp

    return networkx_solver(capacity, edmonds_karp)


def igraph_solver(capacity: Tensor) -> Solver:
    """igraph, in floating point."""
    from igraph import Graph

    above, below, values = edges_of(capacity)
    graph = Graph(n=_nodes(capacity), edges=np.stack([above, below], 1).tolist(), directed=True)
    listed = values.tolist()

    def solve(target: int, source: int) -> float:
        return float(graph.maxflow_value(_top(capacity, target), source, listed))

    return solve


def ortools_solver(capacity: Tensor) -> Solver:
    """OR-Tools, capacities · 2⁴⁰ as 64-bit integers."""
    from ortools.graph.python.max_flow import SimpleMaxFlow

    above, below, values = edges_of(capacity)
    graph = SimpleMaxFlow()
    graph.add_arcs_with_capacity(above, below, np.floor(np.ldexp(values, _ORTOOLS_BITS)).astype(np.int64))

    def solve(target: int, source: int) -> float:
        status = graph.solve(_top(capacity, target), source)
        if status != graph.OPTIMAL:
            raise RuntimeError(f"OR-Tools ends with {status}")
        return float(np.ldexp(float(graph.optimal_flow()), -_ORTOOLS_BITS))

    return solve


def scipy_solver(capacity: Tensor) -> Solver:
    """scipy's Dinic, capacities · 2²⁰ as 32-bit integers."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_flow

    above, below, values = edges_of(capacity)
    whole = np.floor(np.ldexp(values, _SCIPY_BITS)).astype(np.int32)
    graph = csr_array((whole, (above, below)), shape=(_nodes(capacity),) * 2)

    def solve(target: int, source: int) -> float:
        return float(np.ldexp(float(maximum_flow(graph, _top(capacity, target), source).flow_value), -_SCIPY_BITS))

    return solve


def vico_widest(capacity: Tensor) -> Tensor:
    """(target, source) widths of the widest paths as Vico's released code computes them: (1, T, T, T) per layer."""
    width = capacity[None, -1]
    for layer in range(capacity.shape[0] - 2, -1, -1):
        narrow = torch.min(width.unsqueeze(2), capacity[None, layer].permute(0, 2, 1).unsqueeze(1))
        width = torch.max(narrow, dim=3).values
    return width[0]


def _nodes(capacity: Tensor) -> int:
    return (capacity.shape[0] + 1) * capacity.shape[-1]


def _top(capacity: Tensor, target: int) -> int:
    return capacity.shape[0] * capacity.shape[-1] + target
