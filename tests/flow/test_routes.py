"""Flows edge by edge and route by route: what makes them flows, cuts and paths, and every path by enumeration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flow_oracles import all_paths, capacities, path_width, random_capacity
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp import load_result
from interp.errors import InputError
from interp.flow import attention_graph, edge_flows, maximum_flow, path, widest_path
from interp.flow.exact import flow_on_edges
from interp.flow.graph import AttentionGraph
from interp.flow.routes import EDGE_COLUMNS, PATH_COLUMNS, widest_route


def graph_of(capacity: Tensor, **options: Any) -> AttentionGraph:
    """A graph with these capacities: rows that sum to 1, without a further residual edge."""
    found = attention_graph(capacity, residual="none", **options)
    assert isinstance(found, AttentionGraph)
    return found


def check_flow(capacity: Any, flow: Any, target: int, group: Any, value: float) -> None:
    """Within the capacities, conserved at every node between, and `value` from the target to the group."""
    assert (flow >= 0).all()
    assert (flow <= capacity).all()
    arriving, leaving = flow.sum(1), flow.sum(2)  # (layer, position) at depth `layer`, and at depth `layer + 1`
    assert np.allclose(arriving[1:], leaving[:-1], rtol=0, atol=1e-12)
    assert np.isclose(leaving[-1, target], value, rtol=0, atol=1e-12)
    assert np.isclose(leaving[-1].sum(), value, rtol=0, atol=1e-12)
    assert np.isclose(arriving[0, list(group)].sum(), value, rtol=0, atol=1e-12)
    assert np.isclose(arriving[0].sum(), value, rtol=0, atol=1e-12)


def still_reached(capacity: Any, cut: Any, target: int) -> set[int]:
    """Positions of the input to which a way leads that uses no edge of the cut."""
    at = {target}
    for layer in range(len(capacity) - 1, -1, -1):
        at = {key for query in at for key in np.flatnonzero((capacity[layer, query] > 0) & ~cut[layer, query])}
    return {int(position) for position in at}


@settings(max_examples=80, deadline=None)
@given(capacity=capacities(4, 6), seed=st.integers(0, 99))
def test_flow_on_edges(capacity: Tensor, seed: int) -> None:
    length = capacity.shape[-1]
    random = np.random.default_rng(seed)
    target = int(random.integers(length))
    group = tuple(random.permutation(length)[: random.integers(1, length + 1)].tolist())
    flow, cut = (tensor.numpy() for tensor in flow_on_edges(capacity, target, group))
    value = maximum_flow(capacity, [target], [group]).item()
    check_flow(capacity.numpy(), flow, target, group, value)
    causal = not (capacity.triu(1) > 0).any()
    if causal:
        assert not np.triu(cut, 1).any()
    if target >= min(group) or not causal:
        assert np.isclose(capacity.numpy()[cut].sum(), value, rtol=0, atol=1e-12)
        assert still_reached(capacity.numpy(), cut, target).isdisjoint(group)
    else:  # a causal target before all sources: nothing needs to be cut
        assert not cut.any()
        assert value == 0


def test_flow_on_edges_of_large_numbers() -> None:
    """No edge carries more than it can, to the last bit, where whole numbers have more bits than a float64."""
    for seed in range(60):
        random = np.random.default_rng(seed)
        capacity = random_capacity(seed, int(random.integers(1, 4)), int(random.integers(1, 5)), causal=False)
        capacity = capacity * torch.from_numpy(2.0 ** random.integers(-30, 1, capacity.shape))
        flow, _ = flow_on_edges(capacity, 0, [0, capacity.shape[-1] - 1] if capacity.shape[-1] > 1 else 0)
        assert (flow <= capacity).all()


@settings(max_examples=30, deadline=None)
@given(capacity=capacities(3, 5, stochastic=True, residual="none"), seed=st.integers(0, 99))
def test_edge_table(capacity: Tensor, seed: int) -> None:
    length = capacity.shape[-1]
    target, source = seed % length, (seed // 7) % length
    graph = graph_of(capacity, tokens=[f"t{at}" for at in range(length)])
    found = edge_flows(graph, target, source)
    assert found.kind == "flow.edge_flows"
    assert list(found.frame.columns) == [column.name for column in EDGE_COLUMNS]
    flow, cut = np.zeros(capacity.shape), np.zeros(capacity.shape, bool)
    for row in found.frame.itertuples():
        at = (row.layer, row.query, row.key)
        flow[at], cut[at] = row.flow, row.cut
        assert row.capacity == graph.capacity[at].item() > 0
        assert (row.query_token, row.key_token) == (f"t{row.query}", f"t{row.key}")
        assert row.flow > 0 or row.cut
    total = found.provenance.parameters["flow"]
    check_flow(graph.capacity.numpy(), flow, target, [source], total)
    assert np.isclose(graph.capacity.numpy()[cut].sum(), total, rtol=0, atol=1e-12)
    assert abs(total - maximum_flow(graph.capacity, [target], [source]).item()) < 1e-12
    assert (found.provenance.parameters["target"], found.provenance.parameters["source"]) == (target, [source])


@settings(max_examples=40, deadline=None)
@given(capacity=capacities(3, 4), seed=st.integers(0, 99))
def test_widest_route_is_the_widest_of_all(capacity: Tensor, seed: int) -> None:
    n_layers, length, _ = capacity.shape
    target, group = seed % length, tuple(range(1 + seed % length))
    route, width = widest_route(capacity.numpy(), target, group)
    widths = {one: path_width(capacity, one) for one in all_paths(n_layers, length, target, group)}
    assert width == max(widths.values()) == widths[tuple(route)]
    assert width == widest_path(capacity, [target], [group]).item()


def routes_of(found: Any) -> list[tuple[list[int], float]]:
    """(positions by depth, width) of every route in the table."""
    listed = []
    for _, rows in found.frame.groupby("route"):
        assert rows["width"].nunique() == rows["share"].nunique() == 1
        assert rows["depth"].tolist() == list(range(len(rows) - 1, -1, -1))
        listed.append((rows["position"].tolist()[::-1], rows["width"].iloc[0]))
    return listed


@settings(max_examples=40, deadline=None)
@given(capacity=capacities(4, 5, stochastic=True, residual="none"), seed=st.integers(0, 99))
def test_routes_make_the_flow(capacity: Tensor, seed: int) -> None:
    n_layers, length, _ = capacity.shape
    graph = graph_of(capacity, tokens=[f"t{at}" for at in range(length)])
    target = seed % length
    for source in (None, (seed // 7) % length, tuple(range(1 + seed % length))):
        group = range(length) if source is None else [source] if isinstance(source, int) else source
        found = path(graph, target, source, top=10**6)
        routes, parameters = routes_of(found), found.provenance.parameters
        value = maximum_flow(graph.capacity, [target], [list(group)]).item()
        assert abs(parameters["flow"] - value) < 1e-12
        widths = [width for _, width in routes]
        assert abs(sum(widths) - value) < 1e-9
        assert widths == sorted(widths, reverse=True)
        assert len(routes) <= int((graph.capacity > 0).sum())
        carried = np.zeros(capacity.shape)
        for positions, width in routes:
            assert len(positions) == n_layers + 1
            assert positions[-1] == target
            assert positions[0] in group
            for layer in range(n_layers):
                carried[layer, positions[layer + 1], positions[layer]] += width
        assert (carried <= graph.capacity.numpy() + 1e-9).all()
        if routes:
            assert np.isclose(parameters["shown"], 1, atol=1e-9)
            assert np.isclose(found.frame.groupby("route")["share"].first().sum(), 1, atol=1e-9)
            assert (found.frame["token"] == "t" + found.frame["position"].astype(str)).all()


def test_strongest_routes_first_and_the_share_shown() -> None:
    graph = graph_of(random_capacity(0, 4, 8))
    every = routes_of(path(graph, -1, top=10**6))
    some = path(graph, -1, top=3)
    assert routes_of(some) == every[:3]
    assert np.isclose(some.provenance.parameters["shown"], sum(width for _, width in every[:3]))
    assert some.provenance.parameters["flow"] == pytest.approx(1)
    assert some.kind == "flow.path"
    assert list(some.frame.columns) == [column.name for column in PATH_COLUMNS]


def test_routes_through_the_capacities() -> None:
    """The first is the widest path; the next is the widest of what is left beside it."""
    capacity = random_capacity(3, 3, 4, causal=False)
    graph = graph_of(capacity)
    found = path(graph, 2, 1, top=5, method="widest")
    left = capacity.clone()
    routes = routes_of(found)
    for positions, width in routes:
        assert np.isclose(width, max(path_width(left, one) for one in all_paths(3, 4, 2, [1])))
        assert np.isclose(width, path_width(left, positions))
        for layer in range(3):
            left[layer, positions[layer + 1], positions[layer]] -= width
    assert routes[0][1] == pytest.approx(widest_path(capacity, [2], [1]).item())
    shares = found.frame.groupby("route")["share"].first()
    assert np.allclose(shares, [width / routes[0][1] for _, width in routes])
    assert found.provenance.parameters["shown"] == 1
    assert torch.equal(graph.capacity, graph_of(capacity).capacity)  # nothing was taken out of the graph itself


def test_planted_route() -> None:
    """All of the target's attention goes one way: 3 → 1 → 2 → 0."""
    attention = torch.eye(4).repeat(3, 1, 1)
    for layer, (query, key) in enumerate([(2, 0), (1, 2), (3, 1)]):
        attention[layer, query] = torch.eye(4)[key]
    for method in ("exact", "widest"):
        found = path(graph_of(attention, tokens="abcd"), -1, 0, method=method)
        assert found.frame["position"].tolist() == [3, 1, 2, 0]
        assert found.frame["token"].tolist() == list("dbca")
        assert (found.frame["width"] == 1).all()
    edges = edge_flows(graph_of(attention), -1, 0).frame
    assert edges[["layer", "query", "key"]].values.tolist() == [[0, 2, 0], [1, 1, 2], [2, 3, 1]]
    assert edges["cut"].sum() == 1


@pytest.mark.parametrize("method", ["exact", "widest"])
def test_nothing_flows_to_a_later_token(method: str, tmp_path: Path) -> None:
    graph = graph_of(random_capacity(0, 3, 4))
    for found in (path(graph, 1, 3, method=method), edge_flows(graph, 1, 3)):
        assert len(found.frame) == 0
        assert found.provenance.parameters["flow"] == 0
        again = load_result(found.save(tmp_path / "empty.parquet"))
        assert again.frame.equals(found.frame)


def test_saved_and_loaded(tmp_path: Path) -> None:
    graph = graph_of(random_capacity(0, 3, 4), tokens="abcd")
    for found in (path(graph), edge_flows(graph)):
        again = load_result(found.save(tmp_path / "routes.parquet"))
        assert again.frame.equals(found.frame)
        assert again.attachments == {"tokens": list("abcd")}
        assert again.provenance == found.provenance


def test_one_layer_one_token_and_gradients() -> None:
    one = attention_graph(torch.ones(1, 1, 1, requires_grad=True))
    assert path(one).frame[["position", "width"]].values.tolist() == [[0, 1.0], [0, 1.0]]
    assert edge_flows(one).frame[["flow", "cut"]].values.tolist() == [[1.0, True]]


def test_what_routes_refuse() -> None:
    graph = graph_of(random_capacity(0, 3, 4))
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (path, {"method": "soft"}, "method='soft'; expected 'exact' or 'widest'"),
        (path, {"top": 0}, "top=0; expected at least 1 route"),
        (path, {"top": True}, "top=True"),
        (path, {"top": 1.5}, "top=1.5"),
        (path, {"top": "all"}, "top='all'"),
        (path, {"target": 4}, "target 4 is out of range"),
        (path, {"target": None}, "target None is not a position"),
        (path, {"source": [0, 0]}, "names a position twice"),
        (path, {"source": []}, "a group of sources is empty"),
        (edge_flows, {"source": -5}, "source -5 is out of range"),
        (edge_flows, {"source": "a"}, "a group of sources is 'a'"),
        (edge_flows, {"target": [1]}, r"target \[1\] is not a position"),
    ]
    for function, options, message in wrong:
        with pytest.raises(InputError, match=message):
            function(graph, **options)
