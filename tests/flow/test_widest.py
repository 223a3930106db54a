"""The widest path against every path by enumeration; its softened form against the published formula, written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flow_oracles import Largest, all_paths, capacities, path_width, random_capacity
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp.errors import InputError
from interp.flow import soft_widest_path, widest, widest_path

BIASES = ("entropy", "count", "none")
# max over x of x · sigmoid(−x): how far the weighted mean of two numbers can lie above the smaller.
ABOVE_MINIMUM = 0.2784646


def published(capacity: Tensor, temperature: float) -> Tensor:
    """Vico's product of matrices, log-sum-exps over a whole (query, key, between) tensor, from the top down."""
    product = capacity[-1]
    for below in reversed(capacity[:-1]):
        pairs = torch.stack(
            [product[:, None, :].expand(-1, len(below), -1), below.T[None].expand(len(product), -1, -1)]
        )
        narrow = -temperature * torch.logsumexp(-pairs / temperature, 0)  # (query, key, between)
        product = temperature * torch.logsumexp(narrow / temperature, -1)
    return product


def edge_by_edge(capacity: Tensor, temperature: float, bias: str) -> list[list[float]]:
    """The same from the definition in plain numbers, over the edges that have a capacity."""

    def soft_minimum(a: float, b: float) -> float:
        if bias == "entropy":
            weight = math.exp(-a / temperature) / (math.exp(-a / temperature) + math.exp(-b / temperature))
            return weight * a + (1 - weight) * b
        return -temperature * math.log(math.exp(-a / temperature) + math.exp(-b / temperature))

    def soft_maximum(values: list[float]) -> float:
        total = sum(math.exp(value / temperature) for value in values)
        if bias == "entropy":
            return sum(value * math.exp(value / temperature) for value in values) / total
        return temperature * math.log(total) - (temperature * math.log(len(values)) if bias == "count" else 0)

    numbers = capacity.tolist()
    length = len(numbers[0])
    product = [[value if value > 0 else None for value in row] for row in numbers[-1]]
    for below in reversed(numbers[:-1]):
        new: list[list[float | None]] = []
        for row in product:
            columns = [
                [soft_minimum(row[i], below[i][k]) for i in range(length) if row[i] is not None and below[i][k] > 0]
                for k in range(length)
            ]
            new.append([soft_maximum(values) if values else None for values in columns])
        product = new
    return [[0.0 if value is None else value for value in row] for row in product]


@settings(max_examples=80, deadline=None)
@given(capacity=capacities(3, 4), seed=st.integers(0, 99))
def test_equals_every_path_tried(capacity: Tensor, seed: int) -> None:
    n_layers, length, _ = capacity.shape
    some = tuple(torch.randperm(length, generator=torch.Generator().manual_seed(seed))[: 1 + seed % length].tolist())
    groups = [*((at,) for at in range(length)), some]
    found = widest_path(capacity, None, groups)
    for target in range(length):
        for column, group in enumerate(groups):
            widths = [path_width(capacity, path) for path in all_paths(n_layers, length, target, group)]
            assert found[target, column] == max(widths)


@settings(max_examples=40, deadline=None)
@given(capacity=capacities(3, 4))
def test_gradient_is_the_narrowest_edge_of_the_widest_path(capacity: Tensor) -> None:
    n_layers, length, _ = capacity.shape
    for target in range(length):
        for source in range(length):
            paths = sorted(all_paths(n_layers, length, target, (source,)), key=lambda path: -path_width(capacity, path))
            best = path_width(capacity, paths[0])
            leaf = capacity.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(widest_path(leaf, [target], [source]).sum(), leaf)
            if best == 0:
                continue  # of several narrowest edges any may be named
            marked = gradient.nonzero().tolist()
            assert len(marked) == 1
            assert gradient.sum() == 1
            assert capacity[tuple(marked[0])] == best
            wide = [path for path in paths if path_width(capacity, path) == best]
            assert any(path[marked[0][0] + 1] == marked[0][1] and path[marked[0][0]] == marked[0][2] for path in wide)


@pytest.mark.parametrize("block", [None, 1, 3])
def test_larger_graph_equals_the_matrix_product(block: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """… of (max, min) over a whole (query, key, between) tensor, in whatever blocks; the gradient too."""
    if block is not None:
        monkeypatch.setattr(widest, "_block", lambda *sizes: block)
    # Without equal edges, so that the narrowest one is one.
    kind: dict[str, Any] = {"residual": "none", "stochastic": False}
    capacity = torch.stack([random_capacity(seed, 5, 17, causal=bool(seed), **kind) for seed in range(2)])
    ours, theirs = capacity.clone().requires_grad_(), capacity.clone().requires_grad_()
    product = theirs[:, -1]
    for layer in range(3, -1, -1):
        product = torch.minimum(product[..., None], theirs[:, layer, None]).amax(2)
    found = widest_path(ours)
    assert torch.equal(found, product)
    assert torch.equal(found, widest_path(capacity))
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * (found > 0)
    (found * weights).sum().backward()
    (product * weights).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad)


@pytest.mark.parametrize("function", [widest_path, lambda *given: soft_widest_path(*given, temperature=0.05)])
def test_batches_targets_and_groups(function: Any) -> None:
    capacity = torch.stack([random_capacity(seed, 3, 6, causal=bool(seed % 2), zeros=0.2) for seed in range(4)])
    batch = capacity.reshape(2, 2, 3, 6, 6).clone().requires_grad_()
    targets, sources = [5, -6, 5], [0, (1, 4), -1]
    found = function(batch, targets, sources)
    assert found.shape == (2, 2, 3, 3)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((found * weights).sum(), batch)
    for at in range(4):
        leaf = capacity[at].clone().requires_grad_()
        one = function(leaf, [5, 0], sources)[[0, 1, 0]]
        assert torch.allclose(found.flatten(0, 1)[at], one, rtol=1e-12, atol=1e-15)
        (one * weights.flatten(0, 1)[at]).sum().backward()
        assert torch.allclose(gradient.flatten(0, 1)[at], leaf.grad, rtol=1e-9, atol=1e-12)
    assert function(capacity[:0]).shape == (0, 6, 6)
    with torch.no_grad():
        assert torch.allclose(function(batch, targets, sources), found, rtol=1e-12, atol=1e-15)


def test_dtypes_stay() -> None:
    capacity = random_capacity(0, 3, 5)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rounded = capacity.to(dtype)
        for found in (widest_path(rounded), soft_widest_path(rounded, temperature=0.01)):
            assert found.dtype == dtype
        assert torch.equal(widest_path(rounded).double(), widest_path(rounded.double()))


@pytest.mark.parametrize("temperature", [0.002, 0.01, 0.3])
def test_without_correction_it_is_what_vico_publishes(temperature: float) -> None:
    capacity = random_capacity(0, 4, 9, causal=False, residual="plus_one")
    found = soft_widest_path(capacity, temperature=temperature, bias="none")
    assert torch.allclose(found, published(capacity, temperature), rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(capacity=capacities(4, 5), temperature=st.sampled_from([0.01, 0.05, 0.5]), bias=st.sampled_from(BIASES))
def test_soft_equals_its_definition(capacity: Tensor, temperature: float, bias: str) -> None:
    expected = torch.tensor(edge_by_edge(capacity, temperature, bias), dtype=torch.float64)
    found = soft_widest_path(capacity, temperature=temperature, bias=bias)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(capacity=capacities(5, 6), temperature=st.sampled_from([1e-9, 1e-3, 0.01, 0.2]), seed=st.integers(0, 9))
def test_bounds_of_each_bias(capacity: Tensor, temperature: float, seed: int) -> None:
    """Per layer: how far a softened minimum and maximum can lie from what they stand for."""
    n_layers, length, _ = capacity.shape
    groups = [*((at,) for at in range(length)), tuple(range(1 + seed % length))]
    exact = widest_path(capacity, None, groups)
    reached = exact > 0
    several = temperature * math.log(length) * n_layers  # the last is the group's
    two = temperature * math.log(2) * (n_layers - 1)
    bounds = {
        "entropy": (several, ABOVE_MINIMUM * temperature * (n_layers - 1)),
        "none": (two, several),
        "count": (two + several, 0.0),
    }
    for bias, (below, above) in bounds.items():
        soft = soft_widest_path(capacity, None, groups, temperature=temperature, bias=bias)
        assert (soft[~reached] == 0).all()
        assert (soft[reached] >= exact[reached] - below - 1e-12).all()
        assert (soft[reached] <= exact[reached] + above + 1e-12).all()


def test_entropy_where_all_are_equal_or_one_dominates() -> None:
    """Then nothing is added or lost, while the published form adds τ · log n and loses τ · log 2 at a layer."""
    equal = torch.full((5, 8, 8), 0.125, dtype=torch.float64)
    assert torch.allclose(soft_widest_path(equal), torch.full((8, 8), 0.125, dtype=torch.float64))
    drift = soft_widest_path(equal[:2], bias="none") - 0.125
    assert torch.allclose(drift, torch.full((8, 8), 0.01 * math.log(8 / 2), dtype=torch.float64))
    one = 1e-6 + torch.eye(8, dtype=torch.float64).expand(5, 8, 8) * torch.arange(1, 6)[:, None, None]
    assert torch.allclose(soft_widest_path(one).diagonal(), torch.ones(8, dtype=torch.float64), atol=1e-4)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("causal", [True, False])
def test_soft_gradient(bias: str, causal: bool) -> None:
    capacity = random_capacity(1, 3, 4, causal=causal).requires_grad_()
    open_edges = capacity.detach() > 0

    def soft(edges: Tensor) -> Tensor:
        whole = torch.zeros(3, 4, 4, dtype=torch.float64).masked_scatter(open_edges, edges)
        return soft_widest_path(whole, None, [0, (1, 2), 3], temperature=0.1, bias=bias)

    assert torch.autograd.gradcheck(soft, capacity.detach()[open_edges].clone().requires_grad_())


def test_widest_gradient_by_finite_differences() -> None:
    for seed in range(4):
        edges = (random_capacity(seed, 3, 4, causal=False) + 1e-3).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: widest_path(x, None, [0, (1, 2), 3]), edges, eps=1e-8, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(capacity=capacities(4, 5), bias=st.sampled_from(BIASES))
def test_gradients_are_finite_where_no_path_leads(capacity: Tensor, bias: str) -> None:
    for temperature in (1e-4, 0.01):
        leaf = capacity.float().requires_grad_()
        found = soft_widest_path(leaf, temperature=temperature, bias=bias)
        (gradient,) = torch.autograd.grad(found.sum(), leaf)
        assert gradient.isfinite().all()
        assert (gradient[leaf == 0] == 0).all()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("soft", [False, True])
def test_memory_is_quadratic_in_length(soft: bool, batch: int) -> None:
    """All targets of 96 tokens: a (target, between, key) tensor would be 884,736 numbers."""
    length, n_layers = 96, 3
    capacity = torch.stack([random_capacity(seed, n_layers, length).float() for seed in range(batch)]).requires_grad_()
    limit = max(n_layers * batch * length**2, 2**18)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        with Largest() as largest:
            found = (soft_widest_path if soft else widest_path)(capacity)
        assert largest.numel <= limit
    assert sum(tensor.numel() for tensor in kept) <= 10 * n_layers * batch * length**2
    with Largest() as largest:
        found.sum().backward()
    assert largest.numel <= limit
    assert capacity.grad is not None
    assert capacity.grad.isfinite().all()


def test_what_soft_refuses() -> None:
    capacity = torch.ones(1, 1, 1)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match=r"temperature=.*expected a number above 0"):
            soft_widest_path(capacity, temperature=temperature)
    with pytest.raises(InputError, match="bias='mean'; expected one of entropy, count, none"):
        soft_widest_path(capacity, bias="mean")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("function", [widest_path, soft_widest_path])
def test_cuda_gives_the_same(function: Any) -> None:
    capacity = random_capacity(0, 4, 20)
    on_cpu, on_gpu = capacity.clone().requires_grad_(), capacity.cuda().requires_grad_()
    found = function(on_gpu)
    assert torch.allclose(found.cpu(), function(on_cpu))
    found.sum().backward()
    function(on_cpu).sum().backward()
    assert on_gpu.grad is not None
    assert torch.allclose(on_gpu.grad.cpu(), on_cpu.grad, rtol=1e-9, atol=1e-12)
