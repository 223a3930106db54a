"""The solvers that flows are timed against compute the same flows; the growth's table and figure show its times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from benchmarks import flow_peers
from torch import Tensor

from interp.flow import maximum_flow, widest_path

SOLVERS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "networkx": ("networkx", flow_peers.networkx_solver),
    "Edmonds-Karp": ("networkx", flow_peers.edmonds_karp_solver),
    "igraph": ("igraph", flow_peers.igraph_solver),
    "OR-Tools": ("ortools", flow_peers.ortools_solver),
    "scipy": ("scipy", flow_peers.scipy_solver),
}


def random_capacity(n_layers: int, length: int, seed: int) -> Tensor:
    """Causal attention with half of it residual; some edges carry nothing."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(n_layers, length, length, generator=generator)
    closed = torch.rand(n_layers, length, length, generator=generator) < 0.3
    behind = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(closed & ~torch.eye(length, dtype=torch.bool) | behind, float("-inf")).softmax(-1)
    return 0.5 * weights + 0.5 * torch.eye(length)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_computes_the_maximum_flow(name: str) -> None:
    needs, make = SOLVERS[name]
    pytest.importorskip(needs)
    capacity = random_capacity(4, 7, seed=1)
    solve = make(capacity)
    theirs = torch.tensor([[solve(target, source) for source in range(7)] for target in range(7)])
    torch.testing.assert_close(theirs, maximum_flow(capacity), atol=1e-4, rtol=0)


def test_edges_are_those_that_carry_something() -> None:
    capacity = random_capacity(3, 5, seed=2)
    above, below, values = flow_peers.edges_of(capacity)
    assert len(values) == int((capacity > 0).sum())
    assert set((above // 5 - below // 5).tolist()) == {1}
    assert np.all(values > 0)


@pytest.mark.parametrize("n_layers", [1, 4])
def test_the_released_broadcast_is_the_widest_path(n_layers: int) -> None:
    capacity = random_capacity(n_layers, 9, seed=3)
    torch.testing.assert_close(flow_peers.vico_widest(capacity), widest_path(capacity), atol=0, rtol=0)


def test_sources_of_a_slice_are_spread_and_end_with_the_last() -> None:
    graphs = pytest.importorskip("tests.benchmarks.flow_graphs", reason="needs the repository's root on the path")
    assert graphs.spread(27, 3) == [0, 13, 26]
    assert graphs.spread(5, 8) == [0, 1, 2, 3, 4]
    assert graphs.spread(128, 1) == [127]
    assert len(set(graphs.spread(128, 32))) == 32


def test_the_shorter_text_is_a_corner_and_one_thread_is_for_the_call_alone() -> None:
    graphs = pytest.importorskip("tests.benchmarks.flow_graphs", reason="needs the repository's root on the path")
    capacity = random_capacity(3, 8, seed=5)
    part = graphs.corner(capacity, 5)
    assert part.is_contiguous()
    torch.testing.assert_close(maximum_flow(part), maximum_flow(capacity)[:5, :5])
    threads = torch.get_num_threads()
    assert graphs.on_one_thread(torch.get_num_threads) == 1
    assert torch.get_num_threads() == threads


def test_growth_table_and_figure_show_the_measured_times() -> None:
    growth = pytest.importorskip("tests.benchmarks.flow_growth", reason="needs the repository's root on the path")
    frame = pd.DataFrame(
        [
            {"axis": axis, "method": method, "tokens": size, "layers": size, "seconds": 1e-3 * size**power}
            for axis in ("tokens", "layers")
            for method, power in (("exact", 3.0), ("rollout", 1.0))
            for size in (2, 4, 8)
        ]
    )
    assert growth.exponents(frame, "tokens") == pytest.approx({"exact": 3.0, "rollout": 1.0})
    table = growth.table(frame).set_index("milliseconds")
    assert list(table.columns) == ["exact", "rollout"]
    assert table.loc["T = 4", "exact"] == 64
    assert table.loc["exponent of L", "rollout"] == pytest.approx(1)
    drawn = growth.growth_figure(frame, "layers", "made up")
    assert [trace.name for trace in drawn.data] == ["exact: L<sup>3.0</sup>", "rollout: L<sup>1.0</sup>"]
    assert list(drawn.data[0].y) == [8.0, 64.0, 512.0]
    rows = growth._rows(frame, quick=True)
    assert [row.met for row in rows] == [None] * 4
    assert rows[0].ratio == pytest.approx(8)


def test_a_small_growth_is_measured_for_every_method() -> None:
    growth = pytest.importorskip("tests.benchmarks.flow_growth", reason="needs the repository's root on the path")
    from interp.flow.influences import METHODS

    frame = growth.measured(random_capacity(3, 16, seed=4), [8, 16], [1, 3], length=8)
    assert len(frame) == 4 * len(METHODS)
    assert (frame["seconds"] > 0).all()
