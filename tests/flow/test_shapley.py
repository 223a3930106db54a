"""Ethayarajh & Jurafsky's game against a sum over all orders of players, and what sets a flow per token apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from flow_oracles import capacities, random_capacity
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp.errors import InputError
from interp.flow import attention_rollout, flow_through_tokens, maximum_flow, shapley_interval
from interp.flow.exact import flow_on_edges
from interp.flow.shapley import shapley_values

ROUNDING = 1e-9


def over_all_orders(value: Callable[[Sequence[int]], float], n_players: int) -> list[float]:
    """A player's mean gain over all orders in which players can join."""
    gains = [0.0] * n_players
    for order in itertools.permutations(range(n_players)):
        there: list[int] = []
        before = 0.0
        for player in order:
            there.append(player)
            after = value(tuple(sorted(there)))
            gains[player] += after - before
            before = after
    return [gain / math.factorial(n_players) for gain in gains]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), n_players=st.integers(1, 5))
def test_values_of_any_game(seed: int, n_players: int) -> None:
    random = np.random.default_rng(seed)
    worth = {
        players: float(random.normal())
        for size in range(1, n_players + 1)
        for players in itertools.combinations(range(n_players), size)
    }
    found = shapley_values(lambda players: worth[tuple(players)], n_players)
    assert np.allclose(found, over_all_orders(lambda players: worth[tuple(players)], n_players))
    assert np.isclose(found.sum(), worth[tuple(range(n_players))])


def test_textbook_games() -> None:
    gloves = shapley_values(lambda players: float(0 in players and len(players) > 1), 3)  # one left, two right gloves
    assert np.allclose(gloves, [2 / 3, 1 / 6, 1 / 6])
    airport = shapley_values(lambda players: [1.0, 2.0, 3.0][max(players)], 3)  # who needs the longest runway
    assert np.allclose(airport, [1 / 3, 5 / 6, 11 / 6])
    for wrong in (0, 13):
        with pytest.raises(InputError, match=f"n_players={wrong}; expected 1 … 12"):
            shapley_values(lambda players: 0.0, wrong)


def blocked(capacity: Tensor, target: int) -> Callable[[Sequence[int]], float]:
    """Their game: of one maximum flow to the whole input, edge by edge, what ends in the coalition counts."""
    flow, _ = flow_on_edges(capacity, target, range(capacity.shape[-1]))
    return lambda players: sum(float(flow[0, query, key]) for query in range(flow.shape[1]) for key in players)


@settings(max_examples=25, deadline=None)
@given(capacity=capacities(3, 5), seed=st.integers(0, 99))
def test_flow_through_tokens_is_the_shapley_value(capacity: Tensor, seed: int) -> None:
    length = capacity.shape[-1]
    target = seed % length
    found = flow_through_tokens(capacity, target)
    assert np.allclose(found, over_all_orders(blocked(capacity, target), length))
    assert np.allclose(found, shapley_values(blocked(capacity, target), length))
    whole = maximum_flow(capacity, [target], [range(length)]).item()
    assert abs(found.sum().item() - whole) < ROUNDING
    low, high = shapley_interval(capacity, target)
    assert (low - ROUNDING <= found).all()
    assert (found <= high + ROUNDING).all()
    assert torch.allclose(high, maximum_flow(capacity, [target])[0], rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(capacity=capacities(4, 5, stochastic=True, residual="half"), seed=st.integers(0, 99))
def test_rollout_is_one_such_flow(capacity: Tensor, seed: int) -> None:
    """What reaches a node by rollout, shared by its attention, is a flow of value 1 within the capacities."""
    n_layers, length, _ = capacity.shape
    target = seed % length
    reached = torch.eye(length, dtype=torch.float64)[target]
    for layer in range(n_layers - 1, -1, -1):
        edges = reached[:, None] * capacity[layer]
        assert (edges <= capacity[layer] + 1e-15).all()
        assert torch.allclose(edges.sum(1), reached)
        reached = edges.sum(0)
    assert torch.allclose(reached, attention_rollout(capacity, [target])[0])
    assert abs(reached.sum() - 1) < ROUNDING
    low, high = shapley_interval(capacity, target)
    assert (low - ROUNDING <= reached).all()
    assert (reached <= high + ROUNDING).all()


@settings(max_examples=15, deadline=None)
@given(capacity=capacities(3, 4, stochastic=True, residual="half"), seed=st.integers(0, 99))
def test_ends_of_the_interval_are_reached(capacity: Tensor, seed: int) -> None:
    """By networkx: maximum flows to the whole input of least and greatest cost, where a token's last edge costs 1."""
    n_layers, length, _ = capacity.shape
    target, token = seed % length, (seed // 5) % length
    low, high = shapley_interval(capacity, target)
    whole = (capacity.numpy() * 2**30).astype(int)
    for cost, expected in ((1, low[token]), (-1, high[token])):
        graph = nx.DiGraph()
        for layer, query, key in zip(*(at.tolist() for at in np.nonzero(whole)), strict=True):
            graph.add_edge((layer + 1, query), (layer, key), capacity=int(whole[layer, query, key]), weight=0)
        for key in range(length):
            graph.add_edge((0, key), "sinks", capacity=2**40, weight=cost * (key == token))
        graph.add_node((n_layers, target))
        flow = nx.max_flow_min_cost(graph, (n_layers, target), "sinks")
        assert abs(flow.get((0, token), {}).get("sinks", 0) / 2**30 - expected) < 1e-6


def test_a_flow_per_token_is_another_game() -> None:
    """Both tokens can be reached by all of the flow at the bottom, but the target sends it through one edge of width 1.

    By hand: F({0}) = F({1}) = F({0, 1}) = 1 through the target's only edge, to a position that attends to both in full.
    The game of their paper gives the tokens what one flow happens to send them, a and 1 − a; the game F gives each 1/2,
    and the flows per token are 1 and 1.
    """
    capacity = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)

    def worth(players: Sequence[int]) -> float:
        return maximum_flow(capacity, [1], [list(players)]).item()

    assert shapley_values(worth, 2).tolist() == [0.5, 0.5]
    assert maximum_flow(capacity, [1])[0].tolist() == [1.0, 1.0]
    assert flow_through_tokens(capacity).sum() == 1
    low, high = shapley_interval(capacity)
    assert (low.tolist(), high.tolist()) == ([0.0, 0.0], [1.0, 1.0])


def test_the_two_games_differ_on_attention_too() -> None:
    """Planted: token 2 competes with token 1 for one way, token 0 has a way of its own; rows sum to 1."""
    capacity = random_capacity(4, 3, 4)
    through = shapley_values(blocked(capacity, 3), 4)

    def worth(players: Sequence[int]) -> float:
        return maximum_flow(capacity, [3], [list(players)]).item()

    of_sets, alone = shapley_values(worth, 4), maximum_flow(capacity, [3])[0].numpy()
    for values in (through, of_sets):
        assert np.isclose(values.sum(), 1)
    assert alone.sum() > 1.05
    assert np.abs(through - of_sets).max() > 0.01
    assert (of_sets <= alone + ROUNDING).all()


def test_equal_tokens_get_equal_values() -> None:
    """Symmetry of the game F: positions that are attended to alike; a token that nobody can see gets nothing."""
    capacity = random_capacity(0, 3, 5, causal=False)
    capacity[0, :, 1] = capacity[0, :, 2]
    capacity[0, :, 4] = 0

    def worth(players: Sequence[int]) -> float:
        return maximum_flow(capacity, [0], [list(players)]).item()

    values = shapley_values(worth, 5)
    assert abs(values[1] - values[2]) < ROUNDING
    assert values[4] == 0
    assert flow_through_tokens(capacity, 0)[4] == 0


def test_one_token_and_bad_input() -> None:
    one = torch.tensor([[[1.0]], [[0.5]]])
    assert flow_through_tokens(one).tolist() == [0.5]
    assert [end.tolist() for end in shapley_interval(one)] == [[0.5], [0.5]]
    wrong: list[tuple[Any, Any, str]] = [
        (torch.ones(2, 1, 1, 1), 0, "expected"),
        (torch.ones(1, 2, 3), 0, "expected"),
        (-torch.ones(1, 2, 2), 0, "expected a finite number"),
        (torch.ones(1, 2, 2), 2, "target 2 is out of range"),
    ]
    for capacity, target, message in wrong:
        for function in (flow_through_tokens, shapley_interval):
            if capacity.ndim == 3:
                with pytest.raises(InputError, match=message):
                    function(capacity, target)
