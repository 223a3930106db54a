"""Checks that every solver shares: capacities, targets, sources and groups of sources.

A *target* is a position at the top of the graph, a *source* a position of the input or a group of them, such as the tokens of
one word: then what counts is what reaches the group as a whole. Negative positions count from the end.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError

Group = tuple[int, ...]
Sources = Sequence[int | Sequence[int]] | int | None


def check_capacity(capacity: Any, batched: bool = True) -> tuple[int, int]:
    """The number of layers and positions of a (…, layer, query, key) tensor.

    Raises:
        InputError: it is not such a tensor, has no layer or position, or holds NaN, infinite or negative numbers.
    """
    if not isinstance(capacity, Tensor) or not capacity.is_floating_point():
        raise InputError(
            f"capacities are {type(capacity).__name__}; expected a floating-point tensor (layer, query, key)"
        )
    if capacity.ndim < 3 or (capacity.ndim > 3 and not batched) or capacity.shape[-1] != capacity.shape[-2]:
        raise InputError(
            f"capacities have shape {tuple(capacity.shape)}; expected (…, layer, query, key) with queries = keys"
        )
    n_layers, length = capacity.shape[-3], capacity.shape[-1]
    if n_layers == 0 or length == 0:
        raise InputError(f"capacities have {n_layers} layers and {length} positions; expected at least one of each")
    values = capacity.detach()
    if not values.numel():
        return n_layers, length
    smallest, largest = (float(end) for end in torch.aminmax(values))  # NaN if any is
    if not (smallest >= 0 and largest < float("inf")):
        bad = (~torch.isfinite(values) | (values < 0)).nonzero()[0].tolist()
        raise InputError(
            f"the capacity at {bad} is {values[tuple(bad)].item()}; expected a finite number of at least 0"
        )
    return n_layers, length


def check_targets(targets: Any, length: int, what: str = "target") -> list[int]:
    """Targets, or what else `what` calls them, as positions from 0; all of them for `None`.

    Raises:
        InputError: none, not whole numbers, or out of range.
    """
    if targets is None:
        return list(range(length))
    return [check_position(target, length, what) for target in listed(targets, f"{what}s")]


def check_sources(sources: Any, length: int) -> list[Group]:
    """Sources as groups of positions from 0; every position by itself for `None`.

    Raises:
        InputError: none, an empty group, a position twice in a group, not whole numbers, or out of range.
    """
    if sources is None:
        return [(position,) for position in range(length)]
    groups = []
    for source in listed(sources, "sources"):
        members = [source] if is_whole(source) else listed(source, "a group of sources")
        group = tuple(check_position(member, length, "source") for member in members)
        if len(set(group)) < len(group):
            raise InputError(f"the group of sources {tuple(members)} names a position twice; name each once")
        groups.append(group)
    return groups


def check_position(position: Any, length: int, what: str) -> int:
    """One position from 0; negative ones count from the end."""
    if not is_whole(position):
        raise InputError(f"{what} {position!r} is not a position; expected a whole number")
    at = operator.index(position)
    if not -length <= at < length:
        raise InputError(
            f"{what} {at} is out of range; the text has {length} tokens: expected {-length} … {length - 1}"
        )
    return at % length


def is_causal(capacity: Tensor) -> bool:
    """Whether no query has capacity to a key behind it."""
    at = torch.arange(capacity.shape[-1], device=capacity.device)
    # Not triu: it starts threads for the smallest matrix.
    return not bool((capacity.detach() * (at[:, None] < at)).count_nonzero())


def membership(groups: Sequence[Group], length: int, like: Tensor) -> Float[Tensor, "source position"]:
    """1 where a position belongs to a source."""
    member = torch.zeros(len(groups), length, dtype=like.dtype, device=like.device)
    for row, group in enumerate(groups):
        member[row, list(group)] = 1
    return member


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number of any library; truth values are not."""
    if isinstance(value, bool) or getattr(value, "ndim", 0) != 0 or getattr(value, "dtype", None) == torch.bool:
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def listed(values: Any, what: str) -> list[Any]:
    """What was given as a list: one value, a sequence, an array.

    Raises:
        InputError: nothing that can be listed, or empty.
    """
    if is_whole(values):
        return [values]
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__") or getattr(values, "ndim", 1) == 0:
        raise InputError(f"{what} is {values!r}; expected whole numbers, such as [-1]")
    found = values.tolist() if isinstance(values, Tensor) else list(values)
    if not found:
        raise InputError(f"{what} is empty; expected at least one whole number")
    return found
