"""The widest path from a target to a source, and its softened form: what Vico puts in the place of the maximum flow.

Source: Yang & Wang, "Compositional Video Generation as Flow Equalization" (Vico), arXiv 2407.06182, section 3.3.

1. *Widest path*: the path whose narrowest edge is widest; its width is a lower bound of the maximum flow. It is a product of
   capacity matrices with (max, min) in the place of (+, ×). From one target it is a vector that goes down layer by layer:
   w[j] = max_i min(w[i], A[i, j]), in O(layers · length²).
2. *Soft*: max and min become log-sum-exp at a temperature τ, as in Vico's released code, so that every path gets a
   gradient. Over n alternatives a log-sum-exp exceeds the largest by up to τ · log n, and this happens once a layer: at
   30 layers and τ = .01 the excess is larger than any capacity. Vico's models have few layers between concept and
   output. `bias` says what is done: "none": nothing, as published (edges without capacity, such as those to later
   positions, are left out here; Vico counts them as alternatives); "count": τ · log n is subtracted at every layer,
   which is too much wherever one path dominates; "entropy": τ times the entropy of the weights is subtracted, which
   makes a softened maximum or minimum the weighted mean of what it is over: never above the largest (below the
   smallest), equal to it where one dominates or all are equal. A minimum of two is then too large by at most .28 τ, a
   maximum too small by at most τ · log n.
3. Memory: O(length²) at a time on top of (target, position) per layer; the gradient of the widest path needs that alone, the soft
   one recomputes each layer.

Both are differentiable and run on any device, in batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from interp.errors import InputError
from interp.flow.positions import Sources, check_capacity, check_sources, check_targets

BIASES = ("entropy", "count", "none")


def widest_path(
    capacity: Float[Tensor, "*batch layer query key"],
    targets: Sequence[int] | int | None = None,
    sources: Sources = None,
) -> Float[Tensor, "*batch target source"]:
    """Width of the widest path from each target to each source (of a group: to any of its members).

    Args:
        capacity, targets, sources: see `interp.flow.exact.maximum_flow`.

    Returns:
        Widths. The gradient is 1 at the narrowest edge of the widest path.

    Raises:
        InputError: see `interp.flow.exact.maximum_flow`.

    Example:
        >>> capacity = torch.tensor([[[1.0, 0.0], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]])
        >>> widest_path(capacity, targets=[1])
        tensor([[0.5000, 0.5000]])
    """
    _, length = check_capacity(capacity)
    chosen, groups = check_targets(targets, length), check_sources(sources, length)
    if not torch.is_grad_enabled():  # then no narrowest edge is kept
        capacity = capacity.detach()
    flat = capacity.reshape(-1, *capacity.shape[-3:])
    width = flat[:, -1, chosen]
    for layer in range(flat.shape[1] - 2, -1, -1):
        width = _MaxMin.apply(width, flat[:, layer])
    pooled = torch.stack([width[..., list(group)].amax(-1) for group in groups], -1)
    return pooled.reshape(*capacity.shape[:-3], len(chosen), len(groups))


class _MaxMin(torch.autograd.Function):
    """(batch, target, middle) and (batch, middle, key) to max over the middle of the smaller of both."""

    @staticmethod
    def forward(ctx: Any, width: Tensor, below: Tensor) -> Tensor:
        best: Any = None
        where: Any = None
        within: Any
        needs = any(ctx.needs_input_grad)
        step = _block(below.shape[0], width.shape[1], below.shape[-1])
        for start in range(0, below.shape[1], step):
            narrow = torch.minimum(width[:, :, start : start + step, None], below[:, None, start : start + step])
            values, within = narrow.max(2) if needs else (narrow.amax(2), None)
            if best is None:
                best, where = values, within
                continue
            if needs:
                where = torch.where(values > best, within + start, where)
            best = torch.maximum(best, values)
        if needs:
            ctx.save_for_backward(width, below, where)
        return best

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        width, below, where = ctx.saved_tensors
        (grad,) = grads
        upper = width.gather(2, where)  # (batch, target, key)
        lower = below.gather(1, where)
        from_above = upper <= lower
        to_width = torch.zeros_like(width).scatter_add_(2, where, grad * from_above)
        to_below = torch.zeros_like(below).scatter_add_(1, where, grad * ~from_above)
        return to_width, to_below


def soft_widest_path(
    capacity: Float[Tensor, "*batch layer query key"],
    targets: Sequence[int] | int | None = None,
    sources: Sources = None,
    *,
    temperature: float = 0.01,
    bias: str = "entropy",
) -> Float[Tensor, "*batch target source"]:
    """The softened widest path.

    Args:
        capacity, targets, sources: see `interp.flow.exact.maximum_flow`.
        temperature: τ, in the capacities' unit.
        bias: what is done about the excess of each layer's log-sum-exp: "entropy", "count" or "none" (module docstring, 2).

    Returns:
        Soft widths; 0 where no path leads.

    Raises:
        InputError: a temperature of 0 or less, an unknown bias, and what `interp.flow.exact.maximum_flow` raises.

    Example:
        >>> capacity = torch.tensor([[[1.0, 0.0], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]])
        >>> soft_widest_path(capacity, targets=[1], temperature=0.001)
        tensor([[0.5000, 0.5000]])
    """
    _, length = check_capacity(capacity)
    chosen, groups = check_targets(targets, length), check_sources(sources, length)
    if not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"temperature={temperature}; expected a number above 0, such as 0.01 (0: use the widest path)")
    if bias not in BIASES:
        raise InputError(f"bias={bias!r}; expected one of {', '.join(BIASES)}")
    flat = capacity.reshape(-1, *capacity.shape[-3:])
    width, open_ = flat[:, -1, chosen], flat[:, -1, chosen] > 0
    for layer in range(flat.shape[1] - 2, -1, -1):
        if torch.is_grad_enabled() and flat.requires_grad:
            width, open_ = checkpoint(_soft_layer, width, open_, flat[:, layer], temperature, bias, use_reentrant=False)
        else:
            width, open_ = _soft_layer(width, open_, flat[:, layer], temperature, bias)
    pooled = torch.stack(
        [_soft_maximum(width[..., list(group)], open_[..., list(group)], temperature, bias) for group in groups], -1
    )
    return pooled.reshape(*capacity.shape[:-3], len(chosen), len(groups))


def _soft_layer(width: Tensor, open_: Tensor, below: Tensor, temperature: float, bias: str) -> tuple[Tensor, Tensor]:
    """One layer down: (batch, target, position) widths, and whether there is a path at all."""
    batch, length = below.shape[0], below.shape[-1]
    rows = max(1, max(length**2, 2**18) // max(1, batch * length**2))  # targets at a time
    widths, opens = [], []
    for start in range(0, width.shape[1], rows):
        above = width[:, start : start + rows, :, None].expand(-1, -1, -1, length)
        edges = below[:, None].expand_as(above)
        among = open_[:, start : start + rows, :, None] & (edges > 0)
        narrow = _soft_minimum(above, edges, temperature, bias)
        widths.append(_soft_maximum(narrow.transpose(2, 3), among.transpose(2, 3), temperature, bias))
        opens.append(among.any(2))
    return torch.cat(widths, 1), torch.cat(opens, 1)


def _soft_minimum(first: Tensor, second: Tensor, temperature: float, bias: str) -> Tensor:
    if bias == "entropy":
        share = torch.sigmoid((second - first) / temperature)  # of the first: more where it is smaller
        return share * first + (1 - share) * second
    return -temperature * torch.logaddexp(-first / temperature, -second / temperature)


def _soft_maximum(values: Tensor, among: Tensor, temperature: float, bias: str) -> Tensor:
    """Over the last dimension, of the values that are `among`; 0 where none is."""
    some = among.any(-1)
    scaled = (values / temperature).masked_fill(~among, float("-inf")).masked_fill(~some[..., None], 0.0)
    if bias == "entropy":
        return (scaled.softmax(-1) * values).sum(-1) * some
    highest = temperature * scaled.logsumexp(-1)
    if bias == "count":
        highest = highest - temperature * among.sum(-1).clamp(min=1).to(values.dtype).log()
    return torch.where(some, highest, torch.zeros_like(highest))


def _block(batch: int, targets: int, length: int) -> int:
    """How many middle positions to take at a time, so that (batch, target, middle, key) stays within a few (length, length)."""
    room = max(batch * length * length, 2**18)
    return max(1, min(length, room // max(1, batch * targets * length)))
