"""Maximum flows against networkx on exact numbers, scipy, provable inequalities and finite differences."""

from __future__ import annotations

import signal
import threading
import time
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from flow_oracles import capacities, random_capacity, true_flow, whole_flow
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow as scipy_maximum_flow
from torch import Tensor

from interp.errors import InputError, MemoryBudgetError
from interp.flow import attention_rollout, column_bound, layer_bound, maximum_flow, widest_path
from interp.flow.exact import _Solver, estimate_bytes, flow_on_edges, rounded_down, solve_flows, whole_numbers
from interp.flow.positions import check_capacity, check_position, check_sources, check_targets

ROUNDING = 1e-12  # sums of a few dozen float64 numbers of order 1


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """… also for little work."""
    monkeypatch.setattr("interp.flow.exact._ONE_THREAD", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def groups_of(seed: int, length: int) -> list[tuple[int, ...]]:
    """Every position by itself, all of them, and one random group."""
    random = np.random.default_rng(seed)
    some = random.permutation(length)[: random.integers(1, length + 1)]
    return [*((at,) for at in range(length)), tuple(range(length)), tuple(int(at) for at in some)]


def scipy_flows(capacity: Any, target: int) -> list[int]:
    """Whole flows from a target to every source, by scipy."""
    n_layers, length, _ = capacity.shape
    layer, query, key = np.nonzero(capacity)
    size = (n_layers + 1) * length
    edges = (capacity[layer, query, key].astype(np.int32), ((layer + 1) * length + query, layer * length + key))
    graph = csr_array(edges, shape=(size, size))
    return [scipy_maximum_flow(graph, n_layers * length + target, source).flow_value for source in range(length)]


@settings(max_examples=80, deadline=None)
@given(capacity=capacities(), seed=st.integers(0, 99))
def test_equals_networkx(capacity: Tensor, seed: int) -> None:
    length = capacity.shape[-1]
    groups = groups_of(seed, length)
    flows = maximum_flow(capacity.float(), sources=groups)
    for target in {0, length // 2, length - 1}:
        for column, group in enumerate(groups):
            assert abs(flows[target, column] - float(true_flow(capacity, target, group))) < 1e-5


@settings(max_examples=80, deadline=None)
@given(data=st.data(), magnitude=st.sampled_from([0.0, 1.0, 8.0, 300.0]), seed=st.integers(0, 99))
def test_rounding_error_is_honest(data: Any, magnitude: float, seed: int) -> None:
    """The true flow lies within [flow, flow + rounding_error], for capacities between 1e-300 and 1e300."""
    capacity = data.draw(capacities(3, 4, magnitude=magnitude))
    groups = groups_of(seed, capacity.shape[-1])
    solution = solve_flows(capacity, range(capacity.shape[-1]), groups)
    error = Fraction(solution.rounding_error)
    for target in range(capacity.shape[-1]):
        for column, group in enumerate(groups):
            found = Fraction(float(solution.flow[target, column]))
            assert found <= true_flow(capacity, target, group) <= found + error
    assert error <= Fraction(float(capacity.max())) * capacity.numel() * 2**-50


@settings(max_examples=60, deadline=None)
@given(capacity=capacities(4, 5), power=st.sampled_from([-900, -300, -1, 7, 400, 1000]))
def test_scale_adapts(capacity: Tensor, power: int) -> None:
    """Capacities · 2^n give the same whole numbers, therefore the same flows · 2^n to the last bit."""
    scaled = torch.from_numpy(np.ldexp(capacity.numpy(), power))
    expected = np.ldexp(maximum_flow(capacity).numpy(), power)
    assert np.array_equal(maximum_flow(scaled).numpy(), expected)
    assert np.array_equal(layer_bound(scaled).numpy(), np.ldexp(layer_bound(capacity).numpy(), power))


def test_smallest_and_largest_floats() -> None:
    smallest = torch.full((2, 3, 3), 5e-324, dtype=torch.float64)
    assert maximum_flow(smallest, [2], [1]).item() == 3 * 5e-324
    largest = torch.full((2, 1, 1), float(np.finfo(np.float64).max), dtype=torch.float64)
    assert maximum_flow(largest).item() == largest[0, 0, 0]
    assert maximum_flow(torch.zeros(2, 3, 3)).tolist() == [[0.0] * 3] * 3


def test_large_graphs_of_large_capacities_do_not_overflow() -> None:
    capacity = random_capacity(0, 40, 48, causal=False, zeros=0.5, stochastic=False)
    whole, exponent = whole_numbers(capacity * 1e300)
    assert sum(int(row.sum()) for layer in whole for row in layer) < 2**60
    assert np.abs(np.ldexp(whole.astype(float), -exponent) / (capacity.numpy() * 1e300 + 1e-9) - 1).max() <= 1
    solution = solve_flows(capacity * 1e300, [0, 47], [(3,), (9, 4)])
    expected = solve_flows(capacity, [0, 47], [(3,), (9, 4)])
    assert np.allclose(solution.flow, expected.flow * 1e300, rtol=1e-9)
    assert 0 < solution.rounding_error < 1e-8 * solution.flow.min()


def test_rounded_down_is_never_above() -> None:
    random = np.random.default_rng(0)
    whole = random.integers(0, 2**60, 2000) >> random.integers(0, 60, 2000)
    for exponent in (-900, 0, 900):
        for exact, value in zip(whole.tolist(), rounded_down(whole, exponent).tolist(), strict=True):
            true = Fraction(exact) / Fraction(2) ** exponent
            assert Fraction(value) <= true < Fraction(value) + Fraction(128) / Fraction(2) ** exponent


@pytest.mark.parametrize("seed", range(12))
def test_equals_scipy_on_whole_numbers(seed: int) -> None:
    """Sparse graphs on which the bound is far above the flow, so that most of it has to be pushed back."""
    random = np.random.default_rng(seed)
    n_layers, length, causal = int(random.integers(2, 10)), int(random.integers(4, 22)), bool(seed % 2)
    whole = random.integers(1, 1000, (n_layers, length, length)) * (random.random((n_layers, length, length)) < 0.25)
    whole = np.tril(whole) if causal else whole
    target = length - 1
    expected = scipy_flows(whole, target)
    capacity = torch.from_numpy(whole.astype(np.float64))
    assert maximum_flow(capacity, [target])[0].tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_where_the_bound_is_above_the_flow(seed: int) -> None:
    """Much of what the first wave sends is stuck on these graphs and has to be pushed back."""
    capacity = random_capacity(seed, 5, 16, causal=False, zeros=0.8, stochastic=False)
    flow = maximum_flow(capacity)
    above = layer_bound(capacity) > flow + 1e-6
    assert above.double().mean() > 0.25
    for target, source in above.nonzero()[::20].tolist():
        assert abs(flow[target, source] - float(true_flow(capacity, target, [source]))) < ROUNDING


@pytest.mark.parametrize("seed", range(20))
def test_whole_numbers_near_2_60_are_not_rounded(seed: int) -> None:
    """Sums of 60 bits: a float64 in between would change the last ones."""
    random = np.random.default_rng(seed)
    for _ in range(15):
        n_layers, length = int(random.integers(1, 5)), int(random.integers(1, 5))
        shape = (n_layers, length, length)
        whole = random.integers(0, 2**60 // (n_layers * length**2), shape) >> random.integers(0, 50, shape)
        whole[random.random(shape) < 0.3] = 0
        group = tuple(range(int(random.integers(1, length + 1))))
        solver = _Solver(whole, False, [length - 1], [group], False)
        solver.solve(0)
        assert solver.flow[0, 0] == whole_flow(whole, length - 1, group)
        carried = solver.edges(int(solver.flow[0, 0]))
        assert (carried <= whole).all()
        assert (carried >= 0).all()


@pytest.mark.parametrize("less", [1, 40])
def test_almost_all_the_room_is_used(less: int) -> None:
    """A node that gets a little less than its edges can carry: their shares, as float64, are all of it and more."""
    for seed in range(40):
        whole = np.zeros((2, 5, 5), np.int64)
        whole[0, 0] = np.random.default_rng(seed).integers(2**54, 2**57, 5)
        whole[1, 0, 0] = int(whole[0, 0].sum()) - less
        solver = _Solver(whole, False, [0], [tuple(range(5))], False)
        solver.solve(0)
        assert solver.flow[0, 0] == whole[1, 0, 0]
        carried = solver.edges(int(solver.flow[0, 0]))
        assert (carried <= whole).all()
        assert carried[0].sum() == carried[1].sum() == whole[1, 0, 0]


@settings(max_examples=25, deadline=None)
@given(capacity=capacities(1, 6))
def test_one_layer_is_its_attention(capacity: Tensor) -> None:
    for found in (maximum_flow(capacity), attention_rollout(capacity), widest_path(capacity), layer_bound(capacity)):
        assert torch.allclose(found, capacity[0], rtol=0, atol=1e-14)


@settings(max_examples=60, deadline=None)
@given(capacity=capacities(5, 7, stochastic=True), seed=st.integers(0, 99))
def test_order_of_the_methods(capacity: Tensor, seed: int) -> None:
    groups = groups_of(seed, capacity.shape[-1])
    flow, above = maximum_flow(capacity, None, groups), layer_bound(capacity, None, groups)
    assert (widest_path(capacity, None, groups) <= flow + ROUNDING).all()
    assert (flow <= above).all()
    assert (above <= column_bound(capacity, None, groups) + ROUNDING).all()
    if torch.allclose(capacity.sum(-1), torch.ones(1, dtype=torch.float64)):
        assert (attention_rollout(capacity, None, groups) <= flow + ROUNDING).all()
        whole = maximum_flow(capacity, None, [range(capacity.shape[-1])])
        assert torch.allclose(whole, torch.ones_like(whole), rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(capacity=capacities(4, 6), seed=st.integers(0, 99))
def test_monotone_in_capacities(capacity: Tensor, seed: int) -> None:
    random = np.random.default_rng(seed)
    more = capacity * torch.from_numpy(1 + random.random(capacity.shape) * (random.random(capacity.shape) < 0.3))
    assert (maximum_flow(more) >= maximum_flow(capacity) - ROUNDING).all()
    closed = capacity * torch.from_numpy((random.random(capacity.shape) < 0.8).astype(float))
    assert (maximum_flow(closed) <= maximum_flow(capacity) + ROUNDING).all()


@settings(max_examples=40, deadline=None)
@given(capacity=capacities(4, 6, causal=False), seed=st.integers(0, 99))
def test_names_of_positions_do_not_matter(capacity: Tensor, seed: int) -> None:
    order = torch.randperm(capacity.shape[-1], generator=torch.Generator().manual_seed(seed))
    renamed = capacity[:, order][:, :, order]
    assert torch.allclose(maximum_flow(renamed), maximum_flow(capacity)[order][:, order], rtol=1e-12, atol=1e-15)


@settings(max_examples=40, deadline=None)
@given(capacity=capacities(4, 6), seed=st.integers(0, 99))
def test_groups_gain_less_than_their_members(capacity: Tensor, seed: int) -> None:
    """Flow to a set is at least that of every member, at most their sum, and submodular."""
    length = capacity.shape[-1]
    random = np.random.default_rng(seed)
    left, right = (tuple(np.flatnonzero(random.random(length) < 0.6).tolist()) or (0,) for _ in range(2))
    both, shared = tuple({*left, *right}), tuple({*left} & {*right})
    flows = maximum_flow(capacity, None, [left, right, both, *([shared] if shared else [])])
    alone = maximum_flow(capacity, None, left)
    assert (flows[:, 0] >= alone.amax(1) - ROUNDING).all()
    assert (flows[:, 0] <= alone.sum(1) + ROUNDING).all()
    of_shared = flows[:, 3] if shared else 0
    assert (flows[:, 0] + flows[:, 1] >= flows[:, 2] + of_shared - ROUNDING).all()


def test_source_behind_its_target_gets_nothing() -> None:
    flow = maximum_flow(random_capacity(0, 3, 6))
    assert (flow.triu(1) == 0).all()
    assert (flow.tril() + torch.ones(6, 6).triu(1) > 0).all()
    group = maximum_flow(random_capacity(0, 3, 6), [2], [(4, 5), (2, 5), (2,)])
    assert group[0, 0] == 0
    assert group[0, 1] == group[0, 2] > 0


def test_targets_and_sources_in_the_order_given() -> None:
    capacity = random_capacity(1, 3, 6, causal=False)
    every = maximum_flow(capacity)
    assert torch.equal(maximum_flow(capacity, [-1, 2, 2], [3, -6, 3]), every[[5, 2, 2]][:, [3, 0, 3]])
    assert torch.equal(maximum_flow(capacity, -2, 4), every[4:5, 4:5])
    assert torch.equal(maximum_flow(capacity, range(2), [[1], range(6), 0])[:, [0, 2]], every[:2][:, [1, 0]])


def test_batches_and_dtypes() -> None:
    capacity = torch.stack([random_capacity(seed, 3, 5, causal=bool(seed % 2)) for seed in range(4)])
    batch = capacity.reshape(2, 2, 3, 5, 5)
    flow = maximum_flow(batch, [4, 1], [0, (1, 2)])
    assert flow.shape == (2, 2, 2, 2)
    for row, one in zip(flow.flatten(0, 1), capacity, strict=True):
        assert torch.equal(row, maximum_flow(one, [4, 1], [0, (1, 2)]))
    assert maximum_flow(capacity[:0]).shape == (0, 5, 5)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        rounded = capacity[0].to(dtype)
        assert maximum_flow(rounded).dtype == dtype
        assert torch.allclose(maximum_flow(rounded).double(), maximum_flow(rounded.double()), atol=4e-3)


def flow_of_logits(logits: Tensor) -> Tensor:
    """Softmax, causal where the logits say so, and the residual edge: what a pattern's gradient goes through."""
    length = logits.shape[-1]
    capacity = 0.5 * logits.softmax(-1) + 0.5 * torch.eye(length, dtype=logits.dtype)
    return maximum_flow(capacity, [0, -1], [0, (1, 2), length - 1])


@pytest.mark.parametrize("causal", [True, False])
def test_gradient_through_softmax_and_residual(causal: bool) -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1) if causal else torch.zeros(5, 5)
    for _ in range(2):
        logits = torch.randn(3, 5, 5, dtype=torch.float64, generator=random).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, hidden=hidden: flow_of_logits(x + hidden), logits, eps=1e-7, atol=1e-5
        )


@settings(max_examples=30, deadline=None)
@given(capacity=capacities(3, 5), seed=st.integers(0, 99))
def test_gradient_is_what_finite_differences_give(capacity: Tensor, seed: int) -> None:
    random = np.random.default_rng(seed)
    target, source = (int(random.integers(capacity.shape[-1])) for _ in range(2))
    leaf = capacity.clone().requires_grad_()
    maximum_flow(leaf, target, source).sum().backward()
    assert leaf.grad is not None
    flow, step = maximum_flow(capacity, target, source), 1e-7
    edges = (capacity > 1e-6).nonzero()  # wide enough for the step
    for at in edges[random.permutation(len(edges))[:6]].tolist():
        up, down = capacity.clone(), capacity.clone()
        up[tuple(at)] += step
        down[tuple(at)] = max(0.0, float(capacity[tuple(at)]) - step)
        rise = (maximum_flow(up, target, source) - flow).item() / step
        fall = (flow - maximum_flow(down, target, source)).item() / float(capacity[tuple(at)] - down[tuple(at)])
        slope = leaf.grad[tuple(at)].item()
        assert rise - 1e-6 <= slope <= fall + 1e-6  # the supergradients of one edge; a unique cut leaves one alone


@settings(max_examples=60, deadline=None)
@given(data=st.data(), causal=st.booleans(), seed=st.integers(0, 99))
def test_gradient_is_a_supergradient(data: Any, causal: bool, seed: int) -> None:
    """F(c') ≤ F(c) + g · (c' − c) for all other capacities, and g is a cut: its capacity is the flow."""
    capacity = data.draw(capacities(4, 5, causal=causal))
    n_layers, length, _ = capacity.shape
    causal = not (capacity.triu(1) > 0).any()  # also a sparse one that happens to be
    random = np.random.default_rng(seed)
    groups = groups_of(seed, length)
    target, column = int(random.integers(length)), int(random.integers(len(groups)))
    leaf = capacity.clone().requires_grad_()
    flow = maximum_flow(leaf, None, groups)[target, column]
    (gradient,) = torch.autograd.grad(flow, leaf)
    assert set(gradient.flatten().tolist()) <= {0.0, 1.0}
    assert abs((gradient * capacity).sum() - flow) < ROUNDING
    for _ in range(8):
        other = random_capacity(
            int(random.integers(10**6)), n_layers, length, causal=causal, zeros=0.3, stochastic=False
        )
        there = maximum_flow(other, [target], [groups[column]]).item()
        assert there <= (flow + (gradient * (other - capacity)).sum()).item() + ROUNDING


def test_gradients_add_up_over_pairs_and_batches() -> None:
    capacity = torch.stack([random_capacity(seed, 3, 5, zeros=0.2) for seed in range(3)]).requires_grad_()
    weights = torch.randn(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((maximum_flow(capacity, [4, 2], [0, 3, (1, 2)]) * weights).sum(), capacity)
    expected = torch.zeros_like(capacity)
    for text in range(3):
        for row, target in enumerate([4, 2]):
            for column, source in enumerate([0, 3, (1, 2)]):
                one = capacity[text].detach().requires_grad_()
                maximum_flow(one, [target], [source]).backward()
                assert one.grad is not None
                expected[text] += weights[text, row, column] * one.grad
    assert torch.allclose(gradient, expected)


def test_cuts_are_kept_only_for_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a byte per pair and node."""
    from interp.flow import exact

    asked: list[bool] = []
    original = exact.solve_flows
    monkeypatch.setattr(
        exact, "solve_flows", lambda *args, **options: asked.append(options["sides"]) or original(*args, **options)
    )
    leaf = random_capacity(0, 2, 3).requires_grad_()
    with torch.no_grad():
        maximum_flow(leaf)
    maximum_flow(leaf.detach())
    maximum_flow(leaf)
    assert asked == [False, False, True]


def test_threads_change_nothing(two_threads: None) -> None:
    capacity = random_capacity(3, 6, 24, zeros=0.6)
    groups = [(at,) for at in range(24)]
    with_two = solve_flows(capacity, range(24), groups, sides=True)
    torch.set_num_threads(1)
    with_one = solve_flows(capacity, range(24), groups, sides=True)
    assert np.array_equal(with_one.flow, with_two.flow)
    assert with_one.sink_side is not None
    assert np.array_equal(with_one.sink_side, with_two.sink_side)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell's background jobs ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("two_threads", "interruptible")
@pytest.mark.parametrize("threads", [1, 2])
def test_interrupt_leaves_nothing_hanging(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after ten of 300 sources: what runs is finished, what waits is not begun, and the solver works again."""
    torch.set_num_threads(threads)
    original, main = _Solver.solve, threading.main_thread().ident
    assert main is not None
    solved: list[int] = []
    where: set[int | None] = set()

    def slowly(self: Any, column: int) -> None:
        original(self, column)
        solved.append(column)
        where.add(threading.current_thread().ident)
        if len(solved) == 10:
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.02)

    capacity = random_capacity(0, 3, 300)
    with monkeypatch.context() as patched:
        patched.setattr(_Solver, "solve", slowly)
        with pytest.raises(KeyboardInterrupt):
            maximum_flow(capacity, [299])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
    assert where == {main} if threads == 1 else main not in where
    count = len(solved)
    assert 10 <= count < 200
    time.sleep(0.1)
    assert len(solved) == count
    assert maximum_flow(capacity, [299], [5]).item() > 0


def test_errors_of_a_thread_come_out(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, column: int) -> None:
        raise ZeroDivisionError(column)

    monkeypatch.setattr(_Solver, "solve", fail)
    with pytest.raises(ZeroDivisionError):
        maximum_flow(random_capacity(0, 2, 5))


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    maximum_flow(random_capacity(0, 2, 5), progress="flows")
    assert "flows" in capsys.readouterr().err
    maximum_flow(random_capacity(0, 2, 5))
    assert capsys.readouterr().err == ""


def test_graph_too_large_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import interp.batching

    capacity = random_capacity(0, 8, 512)
    monkeypatch.setattr(interp.batching, "available_memory", lambda device: 2**26)
    for solve in (lambda: maximum_flow(capacity, [-1]), lambda: flow_on_edges(capacity, 511, 0)):
        with pytest.raises(
            MemoryBudgetError, match=r"8 layers of 512 tokens.* needs about 0\.1 GiB .*0\.1 GiB are free"
        ):
            solve()
    monkeypatch.setattr(interp.batching, "available_memory", lambda device: 2**28)
    assert maximum_flow(capacity, [-1], [0]).item() > 0


@pytest.mark.parametrize("sides", [False, True])
def test_memory_is_what_was_estimated(sides: bool, two_threads: None) -> None:
    capacity = random_capacity(0, 5, 64)
    groups = [(at,) for at in range(64)]
    solve_flows(capacity[:, :4, :4], [0], [(0,)], sides=sides)  # compiled before it is measured
    tracemalloc.start()
    solve_flows(capacity, range(64), groups, sides=sides)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    estimate = estimate_bytes(5, 64, 64, 64, 2, sides)
    assert 0.4 * estimate < peak < 1.1 * estimate


@pytest.mark.parametrize(
    ("capacity", "message"),
    [
        ([[[1.0]]], "capacities are list; expected a floating-point tensor"),
        (torch.ones(1, 1, 1, dtype=torch.long), "expected a floating-point tensor"),
        (torch.ones(2, 2), r"shape \(2, 2\); expected \(…, layer, query, key\)"),
        (torch.ones(1, 2, 3), "queries = keys"),
        (torch.ones(0, 2, 2), "0 layers and 2 positions; expected at least one of each"),
        (torch.ones(2, 0, 0), "2 layers and 0 positions"),
        (
            torch.tensor([[[1.0, float("nan")], [0, 0]]]),
            r"the capacity at \[0, 0, 1\] is nan; expected a finite number",
        ),
        (torch.tensor([[[1.0, 0], [float("inf"), 0]]]), r"\[0, 1, 0\] is inf"),
        (torch.tensor([[[1.0, 0], [0, -0.5]]]), r"\[0, 1, 1\] is -0.5; expected a finite number of at least 0"),
    ],
)
def test_what_is_not_a_capacity(capacity: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_capacity(capacity)


def test_solvers_check_what_they_are_given() -> None:
    for solve in (maximum_flow, widest_path, attention_rollout, column_bound, layer_bound):
        for capacity in (
            -torch.ones(1, 2, 2),
            torch.ones(1, 2, 3),
            torch.ones(0, 2, 2),
            torch.full((1, 1, 1), torch.nan),
        ):
            with pytest.raises(InputError, match="expected"):
                solve(capacity)
        with pytest.raises(InputError, match="target 2 is out of range"):
            solve(torch.ones(1, 2, 2), [2])
        with pytest.raises(InputError, match="source -3 is out of range"):
            solve(torch.ones(1, 2, 2), None, [-3])
    with pytest.raises(InputError, match=r"expected \(…, layer, query, key\)"):
        check_capacity(torch.ones(2, 1, 3, 3), batched=False)


def test_targets() -> None:
    for given_, expected in [
        (None, [0, 1, 2]),
        (-1, [2]),
        ([0, -3, 2, 2], [0, 0, 2, 2]),
        (range(2), [0, 1]),
        (torch.tensor([1, -1]), [1, 2]),
        (torch.tensor(1), [1]),
        (np.array([2]), [2]),
        (np.int64(1), [1]),
    ]:
        assert check_targets(given_, 3) == expected
    for given_, message in [
        ([], "targets is empty"),
        (torch.tensor([]), "targets is empty"),
        ("1", "targets is '1'; expected whole numbers"),
        (1.0, "targets is 1.0"),
        (True, "targets is True"),
        (torch.tensor(1.5), "targets is tensor"),
        (np.array(1.5), "targets is array"),
        (torch.tensor(True), "targets is tensor"),
        ([True], "target True is not a position"),
        ([1.0], "target 1.0 is not a position"),
        (torch.tensor([1.5]), "target 1.5 is not a position"),
        (np.array([True]), "is not a position"),
        ([[1]], r"target \[1\] is not a position"),
        ([3], r"target 3 is out of range; the text has 3 tokens: expected -3 … 2"),
        ([-4], "target -4 is out of range"),
    ]:
        with pytest.raises(InputError, match=message):
            check_targets(given_, 3)
    with pytest.raises(InputError, match="sink 9 is out of range"):
        check_position(9, 3, "sink")


def test_sources() -> None:
    for given_, expected in [
        (None, [(0,), (1,), (2,)]),
        (-1, [(2,)]),
        ([0, [1, -1]], [(0,), (1, 2)]),
        ([range(3)], [(0, 1, 2)]),
        ([2, 2], [(2,), (2,)]),
        (torch.tensor([[0, 1], [1, 2]]), [(0, 1), (1, 2)]),
        (np.array([1, 2]), [(1,), (2,)]),
    ]:
        assert check_sources(given_, 3) == expected
    for given_, message in [
        ([], "sources is empty"),
        ([[]], "a group of sources is empty"),
        ([[0, 0]], r"\(0, 0\) names a position twice"),
        ([[0, -3]], r"\(0, -3\) names a position twice"),
        ([[0, 5]], "source 5 is out of range"),
        ("ab", "sources is 'ab'"),
        (["a"], "a group of sources is 'a'"),
        ([[True]], "source True is not a position"),
        ([0.5], "a group of sources is 0.5"),
    ]:
        with pytest.raises(InputError, match=message):
            check_sources(given_, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_tensors_come_and_go() -> None:
    capacity = random_capacity(0, 4, 8).float()
    on_gpu = capacity.cuda().requires_grad_()
    flow = maximum_flow(on_gpu, [-1])
    flow.sum().backward()
    on_cpu = capacity.clone().requires_grad_()
    maximum_flow(on_cpu, [-1]).sum().backward()
    assert flow.device.type == "cuda"
    assert torch.equal(flow.cpu(), maximum_flow(capacity, [-1]))
    assert on_gpu.grad is not None
    assert on_cpu.grad is not None
    assert torch.equal(on_gpu.grad.cpu(), on_cpu.grad)
