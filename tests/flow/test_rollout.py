"""Rollout against sums over every path, and both bounds against cuts that can be written down."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flow_oracles import all_paths, capacities, random_capacity, true_flow
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp.errors import MemoryBudgetError
from interp.flow import attention_rollout, column_bound, layer_bound, maximum_flow


@settings(max_examples=40, deadline=None)
@given(capacity=capacities(3, 4), seed=st.integers(0, 99))
def test_rollout_is_the_sum_over_paths(capacity: Tensor, seed: int) -> None:
    n_layers, length, _ = capacity.shape
    group = tuple(range(1 + seed % length))
    found = attention_rollout(capacity, None, [*range(length), group])
    for target in range(length):
        for column, source in enumerate([*((at,) for at in range(length)), group]):
            products = [
                math.prod(float(capacity[layer, path[layer + 1], path[layer]]) for layer in range(n_layers))
                for path in all_paths(n_layers, length, target, source)
            ]
            assert abs(found[target, column] - sum(products)) < 1e-12


def test_rollout_is_the_matrix_product() -> None:
    capacity = random_capacity(0, 6, 20)
    expected = torch.linalg.multi_dot([*capacity.flip(0)])
    assert torch.allclose(attention_rollout(capacity), expected)
    assert torch.allclose(expected.sum(1), torch.ones(20, dtype=torch.float64))
    assert torch.allclose(attention_rollout(capacity, [-1, 3], [5, (0, 1)])[:, 1], expected[[19, 3]][:, :2].sum(1))


@settings(max_examples=40, deadline=None)
@given(capacity=capacities(4, 6), seed=st.integers(0, 99))
def test_column_bound_in_plain_numbers(capacity: Tensor, seed: int) -> None:
    n_layers, length, _ = capacity.shape
    numbers, group = capacity.tolist(), tuple(range(seed % length, length))
    causal = all(value == 0 for layer in numbers for i, row in enumerate(layer) for value in row[i + 1 :])
    found = column_bound(capacity, None, [*range(length), group])
    for target in range(length):
        if n_layers == 1:
            seen = [target]
        else:
            seen = list(range(target + 1 if causal else length))
        for column, members in enumerate([*((at,) for at in range(length)), group]):
            entering = sum(numbers[0][i][key] for i in seen for key in members)
            assert abs(found[target, column] - min(sum(numbers[-1][target]), entering)) < 1e-12


def test_bound_of_the_specification() -> None:
    """min(1, Σ_i A_0[i, j]) where rows sum to 1 and the target sees all."""
    capacity = random_capacity(0, 4, 8)
    assert torch.allclose(column_bound(capacity, -1)[0], capacity[0].sum(0).clamp(max=1))


@settings(max_examples=40, deadline=None)
@given(capacity=capacities(2, 7))
def test_layer_bound_of_two_layers_is_the_flow(capacity: Tensor) -> None:
    """Then the flow is Σ_k min(A_1[q, k], A_0[k, j]), for which no solver is needed."""
    found = layer_bound(capacity)
    if len(capacity) == 2:
        expected = torch.minimum(capacity[1][:, :, None], capacity[0][None]).sum(1)
        assert torch.allclose(found, expected, rtol=0, atol=1e-13)
    assert torch.allclose(found, maximum_flow(capacity), rtol=0, atol=1e-13)


def test_layer_bound_can_be_above_the_flow() -> None:
    """What a node gets is counted at both nodes it could send it to, what one can pass at both it could come from.

    The target sends 1 to a and 2 to b. What a gets can go through either of two nodes to a way of width 2; what b gets,
    through two others to a way of width 1. Every layer by itself lets 3 pass, the graph 1 + 1.
    """
    capacity = torch.zeros(4, 4, 4)
    capacity[3, 0, 0], capacity[3, 0, 1] = 1.0, 2.0
    capacity[2, 0, :2] = capacity[2, 1, 2:] = 1.0
    capacity[1, :2, 0] = capacity[1, 2:, 1] = 1.0
    capacity[0, 0, 0], capacity[0, 1, 0] = 2.0, 1.0
    assert layer_bound(capacity, [0], [0]).item() == 3.0
    assert maximum_flow(capacity, [0], [0]).item() == float(true_flow(capacity, 0, [0])) == 2.0


@pytest.mark.parametrize("function", [attention_rollout, column_bound, layer_bound])
def test_batches_and_dtypes(function: Any) -> None:
    capacity = torch.stack([random_capacity(seed, 3, 5, causal=bool(seed % 2)) for seed in range(4)])
    found = function(capacity.reshape(2, 2, 3, 5, 5), [-1, 1], [0, (1, 2)])
    assert found.shape == (2, 2, 2, 2)
    for row, one in zip(found.flatten(0, 1), capacity, strict=True):
        assert torch.allclose(row, function(one, [4, 1], [0, (1, 2)]), rtol=1e-12)
    assert function(capacity.float()).dtype == torch.float32
    assert function(capacity[:0]).shape == (0, 5, 5)


@pytest.mark.parametrize("function", [attention_rollout, column_bound])
def test_gradients(function: Any) -> None:
    capacity = (random_capacity(0, 3, 4, causal=False) + 0.01).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, [0, 3], [0, (1, 2)]), capacity)


def test_the_layer_bound_is_refused_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp.batching.available_memory", lambda device: 1000)
    with pytest.raises(MemoryBudgetError, match="bounds"):
        layer_bound(random_capacity(0, 4, 6))
