"""What the flow tests use: exact flows by networkx, every path by enumeration, random graphs, a meter of memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import networkx as nx
import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def whole_flow(whole: Any, target: int, group: Sequence[int]) -> int:
    """The maximum flow through (layer, query, key) whole numbers of any size, by networkx."""
    graph = nx.DiGraph()
    graph.add_nodes_from([(len(whole), target), "sinks"])
    for layer, rows in enumerate(whole):
        for query, row in enumerate(rows):
            for key, value in enumerate(row):
                if value > 0:
                    graph.add_edge((layer + 1, query), (layer, key), capacity=int(value))
    graph.add_edges_from(((0, key), "sinks") for key in group)  # without a capacity, which is endless
    return nx.maximum_flow_value(graph, (len(whole), target), "sinks")


def true_flow(capacity: Tensor, target: int, group: Sequence[int]) -> Fraction:
    """The maximum flow without any rounding."""
    exact = [[[Fraction(value) for value in row] for row in layer] for layer in capacity.detach().double().tolist()]
    shared = math.lcm(*(value.denominator for layer in exact for row in layer for value in row))
    whole = [[[int(value * shared) for value in row] for row in layer] for layer in exact]
    return Fraction(whole_flow(whole, target, group), shared)


def all_paths(n_layers: int, length: int, target: int, group: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every path as positions by depth, from the input to the target."""
    for between in itertools.product(range(length), repeat=n_layers - 1):
        for source in group:
            yield (source, *between, target)


def path_width(capacity: Any, path: Sequence[int]) -> float:
    """The narrowest edge of a path."""
    return min(float(capacity[layer, path[layer + 1], path[layer]]) for layer in range(len(capacity)))


def random_capacity(
    seed: int,
    n_layers: int,
    length: int,
    *,
    causal: bool = True,
    zeros: float = 0.0,
    residual: str = "half",
    stochastic: bool = True,
    magnitude: float = 0.0,
) -> Tensor:
    """(layer, query, key) float64: some keys of a row without attention, factors up to 10^±magnitude on edges."""
    random = np.random.default_rng(seed)
    attention = random.random((n_layers, length, length)) ** random.integers(1, 6)
    attention[random.random(attention.shape) < zeros] = 0
    if causal:
        attention = np.tril(attention)
    if stochastic:
        total = attention.sum(-1, keepdims=True)
        attention = np.where(total > 0, attention / np.where(total > 0, total, 1), np.eye(length))
    identity = np.eye(length)
    capacity = {"half": (attention + identity) / 2, "plus_one": attention + identity, "none": attention}[residual]
    if magnitude:
        capacity = capacity * 10.0 ** random.uniform(-magnitude, magnitude, capacity.shape)
    return torch.from_numpy(capacity)


@st.composite
def capacities(draw: Any, max_layers: int = 4, max_length: int = 6, **fixed: Any) -> Tensor:
    """Small graphs of every kind; `fixed` pins arguments of `random_capacity`."""
    kinds: dict[str, Any] = {
        "causal": st.booleans(),
        "zeros": st.sampled_from([0.0, 0.3, 0.7]),
        "residual": st.sampled_from(["half", "plus_one", "none"]),
        "stochastic": st.booleans(),
    }
    chosen = {name: draw(kind) for name, kind in kinds.items() if name not in fixed}
    n_layers, length = draw(st.integers(1, max_layers)), draw(st.integers(1, max_length))
    return random_capacity(draw(st.integers(0, 9999)), n_layers, length, **chosen, **fixed)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes: views, which take no memory, do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made
