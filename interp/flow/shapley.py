"""The other attention flow: what passes each token in one maximum flow of the whole network, and its Shapley values.

Source: Ethayarajh & Jurafsky, "Attention Flows are Shapley Value Explanations", arXiv 2105.14652, section 4.

1. *Their construction.* One maximum flow runs from the target to the whole input. The players are the tokens of one layer; a
   coalition is worth what that flow sends through its members, v(S) = Σ_{j ∈ S} f(j). Blocking some players leaves the
   flow through the others as it is, so that every marginal contribution of j is f(j): the Shapley value of j is the
   flow through it.
2. *It is not unique.* Where rows sum to 1 the flow to the whole input is 1, and rollout is one such maximum flow: its scores are
   Shapley values in this sense. Others give token j anything from 1 − F(all but j) to F(j), with F the maximum flow to a set:
   `shapley_interval`.
3. *It is not what `attention_flow(method="exact")` gives*, nor what Abnar & Zuidema report: there every token has a
   maximum flow of its own, F({j}), the upper end of that interval. These are the values of one-player coalitions in the
   game v(S) = F(S), whose Shapley values differ from both. A user who wants numbers that sum to 1 wants rollout or this
   module.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.flow.exact import flow_on_edges, maximum_flow
from interp.flow.positions import check_capacity, check_targets

_PLAYERS = 12  # 2^12 coalitions


def flow_through_tokens(capacity: Float[Tensor, "layer query key"], target: int = -1) -> Float[Tensor, " source"]:
    """What passes each input token in one maximum flow from a target to the whole input.

    Args:
        capacity: see `interp.flow.exact.maximum_flow`.
        target: a position.

    Returns:
        Flows that sum to the flow to the whole input (1 where rows sum to 1), on the CPU; one of many such flows.

    Raises:
        InputError: see `interp.flow.exact.maximum_flow`.

    Example:
        >>> import torch
        >>> flow_through_tokens(torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])).tolist()
        [0.25, 0.75]
    """
    _, length = check_capacity(capacity, batched=False)
    flow, _ = flow_on_edges(capacity, target, range(length))
    return flow[0].sum(0)


def shapley_interval(
    capacity: Float[Tensor, "layer query key"], target: int = -1
) -> tuple[Float[Tensor, " source"], Float[Tensor, " source"]]:
    """The least and the most that a maximum flow to the whole input can send through each token.

    Args:
        capacity, target: see `flow_through_tokens`.

    Returns:
        (lowest, highest). The highest is the token's own maximum flow.

    Raises:
        InputError: see `interp.flow.exact.maximum_flow`.

    Example:
        >>> import torch
        >>> low, high = shapley_interval(torch.tensor([[[1.0, 0.0], [0.25, 0.75]]]))
        >>> low.tolist(), high.tolist()
        ([0.25, 0.75], [0.25, 0.75])
    """
    _, length = check_capacity(capacity, batched=False)
    (chosen,) = check_targets([target], length)
    alone = [(position,) for position in range(length)]
    if length == 1:
        whole = maximum_flow(capacity.double(), [chosen], alone)[0]
        return whole, whole
    others = [tuple(other for other in range(length) if other != position) for position in range(length)]
    flows = maximum_flow(capacity.double(), [chosen], [*alone, *others, tuple(range(length))])[0]
    return (flows[-1] - flows[length:-1]).clamp(min=0), flows[:length]


def shapley_values(value: Callable[[Sequence[int]], float], n_players: int) -> np.ndarray:
    """Shapley values of any game by all its coalitions (Shapley 1953).

    Args:
        value: of a coalition, a tuple of ascending players; the empty one is worth 0.
        n_players: at most 12.

    Returns:
        (player) values.

    Raises:
        InputError: more players.

    Example:
        >>> shapley_values(lambda players: float(len(players) == 2), 2).tolist()
        [0.5, 0.5]
    """
    if not 1 <= n_players <= _PLAYERS:
        raise InputError(f"n_players={n_players}; expected 1 … {_PLAYERS}: all coalitions are looked at")
    worth = {
        coalition: float(value(coalition)) if coalition else 0.0
        for size in range(n_players + 1)
        for coalition in itertools.combinations(range(n_players), size)
    }
    found = np.zeros(n_players)
    for player in range(n_players):
        for coalition, before in worth.items():
            if player not in coalition:
                size = len(coalition)
                weight = math.factorial(size) * math.factorial(n_players - size - 1) / math.factorial(n_players)
                found[player] += weight * (worth[tuple(sorted((*coalition, player)))] - before)
    return found
