"""Exact maximum flows through attention, with exact gradients.

1. Capacities become whole numbers: rounded down after scaling by 2^s, with s as large as sums of all of them allow
   below 2⁶⁰. A flow through the rounded graph is one through the graph itself, and a cut loses less than 2^−s on each
   edge: the flow is too small by at most edges · 2^−s, and by 2⁷ · 2^−s where it is rounded down to float64, never too
   large. That bound is reported (`Solution.rounding_error`; 1e-9 for 30 layers of 128 tokens).
2. The solver (`interp.flow.push_relabel`) runs once per target and source, sources side by side in as many threads as torch uses
   where there is work for them.
   Potentials are shared: those from the source side by all sources, those from the sink side by all targets.
3. As a function of the capacities the flow is concave, and the indicator of a minimum cut is a supergradient: the gradient itself
   where the cut is unique. That is what backward returns.

Source: Abnar & Zuidema, arXiv 2005.00928, section 3 (the graph and the flow); Ford & Fulkerson 1956 (the cut). The solver runs
on the CPU; tensors of other devices come and go.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.batching import check_memory
from interp.flow.positions import Group, Sources, check_capacity, check_sources, check_targets, is_causal

_BITS = 60  # sums of all capacities stay below 2^60
_PADDING = 8  # numbers behind each row of scratch: a line of the cache
_ONE_THREAD = 4_000_000  # edges · pairs below which starting threads costs more than they save
_LOST = 2 ** (_BITS - 53)  # most that such a whole number loses in float64


@dataclass(frozen=True)
class Solution:
    """Flows of one graph.

    Attributes:
        flow: (target, source) float64.
        rounding_error: no flow is too small by more than this, and none is too large.
        sink_side: (target, source, layer + 1, position) flags of minimum cuts, where they were asked for.
    """

    flow: np.ndarray
    rounding_error: float
    sink_side: np.ndarray | None = None


def maximum_flow(
    capacity: Float[Tensor, "*batch layer query key"],
    targets: Sequence[int] | int | None = None,
    sources: Sources = None,
    *,
    progress: bool | str = False,
) -> Float[Tensor, "*batch target source"]:
    """Maximum flow from each target at the top to each source at the bottom, each by itself.

    Args:
        capacity: of the edges, not negative: node (l + 1, query) → (l, key).
        targets: positions; all by default.
        sources: positions, or groups of positions that count as one; every position by default.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        The flows, in the capacities' dtype and on their device. Backward gives the minimum cut's indicator. A source behind its
        target under causal attention gets 0. A graph without any capacity to later keys counts as causal: those edges stay
        closed, and get no gradient.

    Raises:
        InputError: not capacities, no layers, a position out of range.
        MemoryBudgetError: the graph and the solver's scratch do not fit, with both figures.

    Example:
        >>> capacity = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
        >>> maximum_flow(capacity, targets=[1])
        tensor([[0.2500, 0.7500]])
    """
    _, length = check_capacity(capacity)
    chosen, groups = check_targets(targets, length), check_sources(sources, length)
    if not torch.is_grad_enabled():  # then no cut is kept
        capacity = capacity.detach()
    flat = capacity.reshape(-1, *capacity.shape[-3:])
    flows = [_MaximumFlow.apply(one, chosen, groups, progress) for one in flat]
    shape = (*capacity.shape[:-3], len(chosen), len(groups))
    return torch.stack(flows).reshape(shape) if flows else capacity.new_zeros(shape)


class _MaximumFlow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, capacity: Tensor, targets: list[int], groups: list[Group], progress: bool | str) -> Tensor:
        solution = solve_flows(capacity, targets, groups, sides=ctx.needs_input_grad[0], progress=progress)
        if solution.sink_side is not None:
            ctx.save_for_backward(torch.from_numpy(solution.sink_side))
            ctx.causal, ctx.like = is_causal(capacity), capacity.new_empty(0)
        return torch.from_numpy(solution.flow).to(capacity)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (side,) = ctx.saved_tensors
        pairs = side.flatten(0, 1).to(ctx.like.device)  # (pair, layer + 1, position)
        weights = grads[0].flatten().to(ctx.like)
        layers = []
        for layer in range(pairs.shape[1] - 1):
            above, below = (~pairs[:, layer + 1]).to(ctx.like), pairs[:, layer].to(ctx.like)
            layers.append((above * weights[:, None]).T @ below)
        gradient = torch.stack(layers)
        return (gradient.tril() if ctx.causal else gradient), None, None, None


def solve_flows(
    capacity: Float[Tensor, "layer query key"],
    targets: Sequence[int],
    groups: Sequence[Group],
    *,
    sides: bool = False,
    progress: bool | str = False,
) -> Solution:
    """Maximum flows of one graph, and minimum cuts where `sides` asks for them.

    Args:
        capacity, progress: see `maximum_flow`.
        targets: positions from 0.
        groups: groups of positions from 0.
        sides: keep the minimum cuts, a byte per pair, layer and position.

    Returns:
        A `Solution`.
    """
    n_layers, length, _ = capacity.shape
    small = capacity.numel() * len(targets) * len(groups) < _ONE_THREAD
    threads = 1 if small else max(1, min(torch.get_num_threads(), len(groups)))
    check_memory(
        estimate_bytes(n_layers, length, len(targets), len(groups), threads, sides),
        "cpu",
        f"the maximum flow of {len(targets)} × {len(groups)} pairs through {n_layers} layers of {length} tokens (fewer targets, "
        f"sources or torch threads need less)",
    )
    causal = is_causal(capacity)
    whole, exponent = whole_numbers(capacity)
    solver = _Solver(whole, causal, targets, groups, sides)
    bar = tqdm(
        total=len(groups),
        desc=progress if isinstance(progress, str) else None,
        unit="source",
        disable=not progress,
        leave=False,
    )
    with bar:
        if threads == 1:
            for row in range(len(groups)):
                solver.solve(row)
                bar.update()
        else:
            with ThreadPoolExecutor(threads) as pool:
                try:
                    for _ in pool.map(solver.solve, range(len(groups))):
                        bar.update()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
    return Solution(rounded_down(solver.flow, exponent), _rounding_error(whole, causal, exponent), solver.side)


def rounding_error(capacity: Float[Tensor, "layer query key"]) -> float:
    """How much too small an exact flow through these capacities can be, in their unit; see the module docstring, 1.

    Example:
        >>> rounding_error(torch.ones(30, 128, 128).tril() / 128) < 1e-9
        True
    """
    whole, exponent = whole_numbers(capacity)
    return _rounding_error(whole, is_causal(capacity), exponent)


def _rounding_error(whole: np.ndarray, causal: bool, exponent: int) -> float:
    n_layers, length, _ = whole.shape
    edges = n_layers * (length * (length + 1) // 2 if causal else length**2)
    return math.ldexp(edges + _LOST, -exponent)


def flow_on_edges(
    capacity: Float[Tensor, "layer query key"], target: int, source: int | Sequence[int]
) -> tuple[Float[Tensor, "layer query key"], Bool[Tensor, "layer query key"]]:
    """One maximum flow from a target to a source on every edge, and a minimum cut.

    Args:
        capacity: see `maximum_flow`.
        target, source: positions; a source may be a group.

    Returns:
        (flow on the edges in float64, whether an edge is cut), on the CPU. Flow is conserved at every node between; maximum flows
        are not unique, this is one of them. Of the minimum cuts it is the one nearest to the input.

    Raises:
        InputError, MemoryBudgetError: see `maximum_flow`.
    """
    n_layers, length = check_capacity(capacity, batched=False)
    (chosen,), (group,) = check_targets([target], length), check_sources([source], length)
    # The flow itself, whole and as given, is two more arrays: as much as another thread's.
    needed = estimate_bytes(n_layers, length, 1, 1, 2, True)
    check_memory(needed, "cpu", f"one maximum flow through {n_layers} layers of {length} tokens")
    whole, exponent = whole_numbers(capacity)
    solver = _Solver(whole, is_causal(capacity), [chosen], [group], sides=True)
    solver.solve(0)
    assert solver.side is not None
    side = torch.from_numpy(solver.side[0, 0])
    # Sent again with no more than arrives: nothing is stuck, so that what remains is a flow.
    flow = solver.edges(int(solver.flow[0, 0]))
    cut = ~side[1:, :, None] & side[:-1, None, :]
    if solver.causal:
        cut = cut.tril()
    return torch.from_numpy(rounded_down(flow, exponent)), cut


def whole_numbers(capacity: Float[Tensor, "layer query key"]) -> tuple[np.ndarray, int]:
    """Capacities · 2^exponent, rounded down, and the exponent: the largest with which all of them sum to less than 2⁶⁰."""
    values = capacity.detach().cpu().double().numpy()
    # Relative to the largest, so that the sum neither overflows nor vanishes.
    largest = math.frexp(float(values.max()))[1]
    total = float(np.ldexp(values, -largest).sum())
    # Nothing loses nothing: as for the smallest of floats.
    exponent = _BITS - largest - math.frexp(total)[1] if total else _BITS + 1074
    return np.floor(np.ldexp(values, exponent)).astype(np.int64), exponent


def rounded_down(whole: np.ndarray, exponent: int) -> np.ndarray:
    """Whole numbers below 2⁶⁰ · 2^−exponent in float64, never above what they stand for."""
    values = whole.astype(np.float64)
    values = np.where(values.astype(np.int64) > whole, np.nextafter(values, 0), values)
    return np.ldexp(values, -exponent)


def estimate_bytes(n_layers: int, length: int, n_targets: int, n_sources: int, threads: int, sides: bool) -> int:
    """What the solver takes: capacities as given and whole, two such arrays per thread, potentials, results."""
    graph = 8 * n_layers * length**2
    nodes = (n_layers + 1) * length
    return (
        graph * (3 + 2 * threads) + 8 * nodes * (n_targets + 4 * threads) + n_targets * n_sources * (8 + nodes * sides)
    )


class _Solver:
    """Capacities, potentials and results of one graph; every thread has scratch of its own."""

    def __init__(
        self, capacity: np.ndarray, causal: bool, targets: Sequence[int], groups: Sequence[Group], sides: bool
    ) -> None:
        from interp.flow import push_relabel

        self.compiled, self.capacity, self.causal = push_relabel, capacity, causal
        self.targets, self.groups = list(targets), list(groups)
        n_layers, length, _ = capacity.shape
        self.nodes = (n_layers + 1, length)
        self.flow = np.zeros((len(targets), len(groups)), np.int64)
        self.side = np.zeros((*self.flow.shape, *self.nodes), bool) if sides else None
        self.from_source = np.zeros((len(targets), *self.nodes), np.int64)
        for row, target in enumerate(self.targets):
            push_relabel.source_potential(capacity, target, causal, self.from_source[row])
        self._scratch = threading.local()

    def solve(self, column: int) -> None:
        """Flows of all targets to one source."""
        scratch, sinks, low = self._prepare(column)
        for row, target in enumerate(self.targets):
            if self.causal and target < low:
                continue
            self.flow[row, column] = self._run(row, sinks, low, scratch, 1 << _BITS)
            if self.side is not None:
                self.compiled.sink_side(
                    scratch["residual"],
                    scratch["carried"],
                    sinks,
                    scratch["label"],
                    low,
                    target,
                    self.causal,
                    scratch["first"],
                    scratch["following"],
                    scratch["count"],
                    self.side[row, column],
                )

    def edges(self, limit: int) -> np.ndarray:
        """The flow of the first target and source on every edge, at most `limit` in all."""
        scratch, sinks, low = self._prepare(0)
        flow = np.zeros_like(self.capacity)
        if self.causal and self.targets[0] < low:
            return flow
        arrived = self._run(0, sinks, low, scratch, limit)
        if arrived != limit:
            raise AssertionError(f"sent {limit}, and {arrived} arrived")
        window = slice(low, self.targets[0] + 1 if self.causal else None)
        flow[:, window, window] = scratch["carried"][:, :, : self.nodes[1]].transpose(0, 2, 1)[:, window, window]
        return np.tril(flow) if self.causal else flow

    def _prepare(self, column: int) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
        scratch = self._own_scratch()
        sinks = np.zeros(self.nodes[1], bool)
        sinks[list(self.groups[column])] = True
        self.compiled.sink_potential(self.capacity, sinks, self.causal, scratch["from_sinks"])
        return scratch, sinks, min(self.groups[column]) if self.causal else 0

    def _run(self, row: int, sinks: np.ndarray, low: int, scratch: dict[str, np.ndarray], limit: int) -> int:
        names = ("residual", "carried", "excess", "label", "first", "following", "count")
        return self.compiled.solve(
            self.capacity,
            self.targets[row],
            sinks,
            low,
            self.causal,
            scratch["from_sinks"],
            self.from_source[row],
            limit,
            *(scratch[name] for name in names),
        )

    def _own_scratch(self) -> dict[str, np.ndarray]:
        found = getattr(self._scratch, "arrays", None)
        if found is None:
            n = math.prod(self.nodes) + 2
            # Rows a power of two apart would share a few lines of the cache, and `carried` is written down columns.
            rows = (*self.capacity.shape[:2], self.capacity.shape[2] + _PADDING)
            found = {
                **{name: np.zeros(rows, np.int64) for name in ("residual", "carried")},
                **{name: np.zeros(self.nodes, np.int64) for name in ("excess", "from_sinks")},
                "label": np.zeros(self.nodes, np.int32),
                **{name: np.zeros(n, np.int64) for name in ("first", "following", "count")},
            }
            self._scratch.arrays = found
        return found
