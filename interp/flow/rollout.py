"""Attention rollout, and two bounds of the maximum flow that need no solver.

1. *Rollout* (Abnar & Zuidema, arXiv 2005.00928, section 3): capacities multiplied layer by layer, summed over paths.
   Where rows sum to 1 it is itself a flow, so it is at most the maximum flow.
2. *Column bound*: the smaller of what leaves the target and what enters the source's edges at layer 0. Nothing that
   lies between enters; every other method has to beat it.
3. *Layer bound*: the smallest of what can pass a layer's nodes, over layers (`interp.flow.push_relabel`, step 1). At most the
   column bound, at least the flow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.batching import check_memory
from interp.flow.exact import estimate_bytes, rounded_down, whole_numbers
from interp.flow.positions import Sources, check_capacity, check_sources, check_targets, is_causal, membership


def attention_rollout(
    capacity: Float[Tensor, "*batch layer query key"],
    targets: Sequence[int] | int | None = None,
    sources: Sources = None,
) -> Float[Tensor, "*batch target source"]:
    """Rollout from each target to each source (of a group: summed over its members).

    Args:
        capacity, targets, sources: see `interp.flow.exact.maximum_flow`.

    Raises:
        InputError: see `interp.flow.exact.maximum_flow`.

    Example:
        >>> capacity = torch.tensor([[[1.0, 0.0], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]])
        >>> attention_rollout(capacity, targets=[1])
        tensor([[0.6250, 0.3750]])
    """
    _, length = check_capacity(capacity)
    chosen, groups = check_targets(targets, length), check_sources(sources, length)
    reached = capacity[..., -1, chosen, :]
    for layer in range(capacity.shape[-3] - 2, -1, -1):
        reached = reached @ capacity[..., layer, :, :]
    return reached @ membership(groups, length, reached).T


def column_bound(
    capacity: Float[Tensor, "*batch layer query key"],
    targets: Sequence[int] | int | None = None,
    sources: Sources = None,
) -> Float[Tensor, "*batch target source"]:
    """min(what leaves the target, what enters the source at layer 0 from positions that the target can see).

    Args:
        capacity, targets, sources: see `interp.flow.exact.maximum_flow`.

    Raises:
        InputError: see `interp.flow.exact.maximum_flow`.

    Example:
        >>> capacity = torch.tensor([[[1.0, 0.0], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]])
        >>> column_bound(capacity, targets=[1])
        tensor([[1.0000, 0.7500]])
    """
    n_layers, length = check_capacity(capacity)
    chosen, groups = check_targets(targets, length), check_sources(sources, length)
    positions = torch.arange(length, device=capacity.device)
    behind = positions > positions[chosen][:, None]
    causal = (capacity.detach().triu(1) == 0).flatten(-3).all(-1)  # each graph of the batch by itself
    seen = (~(causal[..., None, None] & behind)).to(capacity)  # (…, target, position)
    if n_layers == 1:  # then the target's own row is all that enters
        entering = capacity[..., 0, chosen, :]
    else:
        entering = seen @ capacity[..., 0, :, :]
    entering = entering @ membership(groups, length, entering).T
    return torch.minimum(capacity[..., -1, chosen, :].sum(-1)[..., None], entering)


def layer_bound(
    capacity: Float[Tensor, "*batch layer query key"],
    targets: Sequence[int] | int | None = None,
    sources: Sources = None,
) -> Float[Tensor, "*batch target source"]:
    """The smallest sum over a layer's nodes of what can pass them; not differentiable.

    Args:
        capacity, targets, sources: see `interp.flow.exact.maximum_flow`.

    Raises:
        InputError: see `interp.flow.exact.maximum_flow`.

    Example:
        >>> capacity = torch.tensor([[[1.0, 0.0], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]])
        >>> layer_bound(capacity, targets=[1])
        tensor([[0.7500, 0.5000]])
    """
    _, length = check_capacity(capacity)
    chosen, groups = check_targets(targets, length), check_sources(sources, length)
    flat = capacity.reshape(-1, *capacity.shape[-3:])
    shape = (*capacity.shape[:-3], len(chosen), len(groups))
    bounds = np.array([_layer_bounds(one, chosen, groups) for one in flat])
    return torch.from_numpy(bounds).to(capacity).reshape(shape)


def _layer_bounds(capacity: Tensor, targets: list[int], groups: list[tuple[int, ...]]) -> np.ndarray:
    from interp.flow import push_relabel

    n_layers, length, _ = capacity.shape
    needed = estimate_bytes(n_layers, length, len(targets), len(groups), 0, False)
    check_memory(needed, "cpu", f"the bounds of {len(targets)} × {len(groups)} pairs through {n_layers} layers")
    causal = is_causal(capacity)
    whole, exponent = whole_numbers(capacity)
    from_source = np.zeros((len(targets), n_layers + 1, length), np.int64)
    from_sinks = np.zeros((n_layers + 1, length), np.int64)
    for row, target in enumerate(targets):
        push_relabel.source_potential(whole, target, causal, from_source[row])
    bounds = np.zeros((len(targets), len(groups)), np.int64)
    for column, group in enumerate(groups):
        sinks = np.zeros(length, bool)
        sinks[list(group)] = True
        push_relabel.sink_potential(whole, sinks, causal, from_sinks)
        for row, target in enumerate(targets):
            if not causal or target >= min(group):
                high = target + 1 if causal else length
                bounds[row, column] = push_relabel.layer_bound(from_sinks, from_source[row], 0, high)
    return rounded_down(bounds, exponent)
