"""The table of influences: every method and correction against a graph built by hand and the method's own function."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor

from interp import load_result
from interp.errors import InputError, MemoryBudgetError
from interp.flow import (
    attention_flow,
    attention_graph,
    attention_rollout,
    column_bound,
    edge_flows,
    influence,
    layer_bound,
    maximum_flow,
    soft_widest_path,
    widest_path,
)
from interp.flow.exact import solve_flows
from interp.flow.graph import AttentionGraph
from interp.flow.influences import CORRECTIONS, FLOW_COLUMNS, METHODS

FUNCTIONS = {
    "exact": maximum_flow,
    "widest": widest_path,
    "soft": soft_widest_path,
    "rollout": attention_rollout,
    "bound": column_bound,
    "layer_bound": layer_bound,
}
GROUPS: list[Any] = [0, 1, (1, 2), (0, 3), 4]


def random_graph(seed: int, length: int = 5, residual: str = "half", causal: bool = True) -> AttentionGraph:
    scores = torch.randn(3, 2, length, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    if causal:
        scores = scores.masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf)
    found = attention_graph(scores.softmax(-1), residual=residual, tokens=[f"t{at}" for at in range(length)])
    assert isinstance(found, AttentionGraph)
    return found


def with_edge(attention: np.ndarray, residual: str) -> Tensor:
    identity = np.eye(attention.shape[-1])
    capacity = {"half": 0.5 * attention + 0.5 * identity, "plus_one": attention + identity, "none": attention}[residual]
    return torch.from_numpy(capacity)


def uniform_by_hand(graph: AttentionGraph) -> Tensor:
    length = len(graph)
    rows = [[1 / (i + 1) if j <= i else 0.0 for j in range(length)] for i in range(length)]
    if not graph.causal:
        rows = [[1 / length] * length] * length
    return with_edge(np.array([rows] * graph.n_layers), graph.residual)


def without_by_hand(graph: AttentionGraph, sinks: list[int]) -> Tensor:
    attention = graph.attention.numpy().copy()
    for layer in attention:
        for query, row in enumerate(layer):
            row[sinks] = 0
            if query in sinks or row.sum() == 0:
                row[:] = 0
                row[query] = 1
            row /= row.sum()
    return with_edge(attention, graph.residual)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("residual", ["half", "plus_one", "none"])
@pytest.mark.parametrize("causal", [True, False])
def test_corrections_by_hand(method: str, residual: str, causal: bool) -> None:
    graph = random_graph(0, residual=residual, causal=causal)
    solve: Any = FUNCTIONS[method]
    plain = solve(graph.capacity, None, GROUPS)
    assert torch.equal(influence(graph, None, GROUPS, method=method), plain)
    usual = solve(uniform_by_hand(graph), None, GROUPS)
    ratio = influence(graph, None, GROUPS, method=method, correction="uniform")
    assert torch.allclose(ratio[usual > 0], (plain / usual)[usual > 0], rtol=1e-9)
    assert (ratio[usual == 0] == 0).all()  # sources behind their target
    assert (usual == 0).any() == causal
    for sinks in ([0], [0, 3], [-1]):
        dropped = influence(graph, None, GROUPS, method=method, correction="drop_sink", sinks=sinks)
        gone = [at % 5 for at in sinks]
        expected = solve(without_by_hand(graph, gone), None, GROUPS)
        for column, group in enumerate(GROUPS):
            if {group} <= set(gone) or (isinstance(group, tuple) and set(group) <= set(gone)):
                assert dropped[:, column].isnan().all()
            else:
                assert torch.allclose(dropped[:, column], expected[:, column], rtol=1e-9, atol=1e-12)


def test_uniform_correction_of_uniform_attention_is_one() -> None:
    graph = random_graph(0).uniform()
    for method in METHODS:
        found = influence(graph, method=method, correction="uniform")
        assert torch.allclose(found, torch.ones(5, 5, dtype=torch.float64).tril())


def test_no_share_of_a_soft_width_below_zero() -> None:
    """With τ · log n subtracted, uniform attention over many tokens has soft widths below 0."""
    graph = random_graph(0, 40)
    options: dict[str, Any] = {"method": "soft", "bias": "count", "temperature": 0.05}
    usual = soft_widest_path(uniform_by_hand(graph), temperature=0.05, bias="count")
    assert (usual < 0).any()
    found = influence(graph, correction="uniform", **options)
    below = usual < 0
    assert found[below].isnan().all()
    assert torch.allclose(found[usual > 0], (influence(graph, **options) / usual)[usual > 0])
    assert (found.triu(1) == 0).all()


def test_order_of_the_methods_on_a_model(tiny: Any) -> None:
    graphs = attention_graph(tiny(), [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]])
    found = attention_flow(graphs, None, method=list(METHODS)).frame
    wide = found.pivot_table(index=["text", "target", "source"], columns="method", values="flow", observed=True)
    assert len(wide) == 7 * 7 + 3 * 3
    for below, above in [("widest", "exact"), ("rollout", "exact"), ("exact", "layer_bound"), ("layer_bound", "bound")]:
        assert (wide[below] <= wide[above] + 1e-6).all()
    assert np.allclose(wide["rollout"].groupby(["text", "target"]).sum(), 1, atol=1e-5)


def test_table(tmp_path: Path) -> None:
    graphs = [random_graph(seed, length) for seed, length in enumerate([5, 1, 3])]
    found = attention_flow(graphs, [-1], [0, (-1,)], method=["exact", "rollout"], correction="uniform")
    assert found.kind == "flow.attention_flow"
    frame = found.frame
    assert list(frame.columns) == [column.name for column in FLOW_COLUMNS]
    assert len(frame) == 3 * 2 * 1 * 2
    assert frame["text"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert frame["target"].tolist() == [4] * 4 + [0] * 4 + [2] * 4
    assert frame["source"].tolist() == [0, 4, 0, 4, 0, 0, 0, 0, 0, 2, 0, 2]
    assert frame["source_token"].tolist()[:2] == ["t0", "t4"]
    assert frame["target_token"].tolist()[::4] == ["t4", "t0", "t2"]
    assert set(frame["method"]) == {"exact", "rollout"}
    assert set(frame["correction"]) == {"uniform"}
    for text, graph in enumerate(graphs):
        for method in ("exact", "rollout"):
            rows = frame[(frame["text"] == text) & (frame["method"] == method)]
            expected = influence(graph, [-1], [0, (-1,)], method=method, correction="uniform")
            assert np.allclose(rows["flow"], expected[0])
    assert found.attachments["tokens"] == [list(graph.tokens) for graph in graphs]
    parameters = found.provenance.parameters
    assert parameters["methods"] == ["exact", "rollout"]
    assert (parameters["correction"], parameters["residual"], parameters["n_texts"]) == ("uniform", "half", 3)
    assert (parameters["sinks"], parameters["n_layers"], parameters["heads"]) == ([0], 3, "mean")
    again = load_result(found.save(tmp_path / "flow.parquet"))
    assert again.frame.equals(frame)
    assert again.attachments == found.attachments
    assert again.provenance == found.provenance


def test_dropped_sinks_stay_missing_on_disk(tmp_path: Path) -> None:
    found = attention_flow(random_graph(0), None, correction="drop_sink", sinks=[0, -1])
    missing = found.frame["flow"].isna()
    assert found.frame.loc[missing, "source"].unique().tolist() == [0, 4]
    assert missing.sum() == 10
    again = load_result(found.save(tmp_path / "flow.parquet")).frame
    assert again["flow"].isna().equals(missing)
    one_token = attention_flow(random_graph(0, 1), correction="drop_sink").frame
    assert one_token["flow"].isna().all()
    assert attention_flow(random_graph(0), correction="drop_sink", sinks=0).provenance.parameters["sinks"] == [0]


def test_groups_are_named_by_all_their_tokens() -> None:
    frame = attention_flow(random_graph(0), -1, [(1, 2), 0]).frame
    assert frame["source_token"].tolist() == ["t1t2", "t0"]
    assert frame["source"].tolist() == [1, 0]


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"layer_bound"}))
def test_influence_carries_a_gradient(method: str, correction: str) -> None:
    pattern = torch.tensor([[[1.0, 0.0, 0.0], [0.4, 0.6, 0.0], [0.5, 0.3, 0.2]]] * 2, dtype=torch.float64)
    pattern = pattern.requires_grad_()
    graph = attention_graph(pattern)
    found = influence(graph, [-1], [2], method=method, correction=correction)
    (gradient,) = torch.autograd.grad(found.sum(), pattern)
    assert gradient.isfinite().all()
    assert (gradient != 0).any()
    frame = attention_flow(graph, [-1], [2], method=method, correction=correction).frame
    assert frame["flow"].item() == found.item()


def test_soft_options_arrive() -> None:
    graph = random_graph(0)
    for bias in ("none", "count", "entropy"):
        expected = soft_widest_path(graph.capacity, [-1], temperature=0.2, bias=bias)[0]
        found = attention_flow(graph, method="soft", temperature=0.2, bias=bias)
        assert np.allclose(found.frame["flow"], expected)
        assert (found.provenance.parameters["temperature"], found.provenance.parameters["bias"]) == (0.2, bias)


def test_what_attention_flow_refuses() -> None:
    graph = random_graph(0)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "no graphs were given"),
        ([graph, "text"], {}, "no graphs were given"),
        (graph, {"method": "flow"}, "method='flow'; expected one of exact, widest"),
        (graph, {"method": ["exact", "flow"]}, "method='flow'"),
        (graph, {"method": []}, r"method=\[\]"),
        (graph, {"correction": "drop"}, "correction='drop'; expected one of none, uniform, drop_sink"),
        (graph, {"targets": [5]}, "target 5 is out of range; the text has 5 tokens"),
        (graph, {"targets": []}, "targets is empty"),
        (graph, {"sources": [-6]}, "source -6 is out of range"),
        (graph, {"sources": [(1, 1)]}, "names a position twice"),
        (graph, {"correction": "drop_sink", "sinks": [7]}, "sink 7 is out of range"),
        (graph, {"correction": "drop_sink", "sinks": []}, "sinks is empty"),
        (graph, {"method": "soft", "temperature": 0.0}, "expected a number above 0"),
        (graph, {"method": "soft", "bias": "mean"}, "bias='mean'"),
        ([graph, random_graph(0, 2)], {"targets": [3]}, "target 3 is out of range; the text has 2 tokens"),
    ]
    for given, options, message in wrong:
        with pytest.raises(InputError, match=message):
            attention_flow(given, **options)
    for options, message in [({"method": "flow"}, "method='flow'"), ({"correction": "drop"}, "correction='drop'")]:
        with pytest.raises(InputError, match=message):
            influence(graph, **options)


def test_graph_too_large_for_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    import interp.batching

    monkeypatch.setattr(interp.batching, "available_memory", lambda device: 1000)
    with pytest.raises(MemoryBudgetError, match=r"maximum flow of 1 × 5 pairs through 3 layers of 5 tokens"):
        attention_flow(random_graph(0))
    assert len(attention_flow(random_graph(0), method="rollout").frame) == 5


def test_what_the_package_offers() -> None:
    import interp.flow

    for name in interp.flow.__all__:
        assert getattr(interp.flow, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'max_flow'"):
        _ = interp.flow.max_flow


@pytest.mark.slow
def test_real_model(embedded: Any) -> None:
    """All sources to the last token of a real sentence: networkx's flows, and the provable order of the methods."""
    text = "The keys to the cabinet that stands behind the old red door are on the table, said the king to his dog."
    graph = attention_graph(embedded, text)
    assert isinstance(graph, AttentionGraph)
    assert graph.n_layers == 30
    assert graph.causal
    capacity = graph.capacity.double().numpy()
    network = nx.DiGraph()
    for layer, query, key in zip(*(at.tolist() for at in np.nonzero(capacity)), strict=True):
        network.add_edge((layer + 1, query), (layer, key), capacity=int(capacity[layer, query, key] * 2**40))
    top = (30, len(graph) - 1)
    expected = np.array([nx.maximum_flow_value(network, top, (0, source)) / 2**40 for source in range(len(graph))])
    found = {method: influence(graph, method=method) for method in METHODS}
    assert np.abs(found["exact"][-1].numpy() - expected).max() < 1e-5
    for below, above in [("widest", "exact"), ("rollout", "exact"), ("exact", "layer_bound"), ("layer_bound", "bound")]:
        assert (found[below] <= found[above] + 1e-5).all()
    assert (found["exact"].triu(1) == 0).all()
    assert (maximum_flow(graph.capacity, None, [range(len(graph))]) - 1).abs().max() < 1e-5
    assert math.isclose(influence(graph.below(1))[-1, 0].item(), graph.capacity[0, -1, 0].item(), rel_tol=1e-5)


def test_the_rounding_error_is_reported_with_exact_flows() -> None:
    weights = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0)).tril() + 1e-3 * torch.eye(6)
    graph = attention_graph(weights / weights.sum(-1, keepdim=True))
    solved = solve_flows(graph.capacity, [5], [(position,) for position in range(6)])
    made = attention_flow(graph, method=["exact", "bound"]).provenance.parameters
    assert made["rounding_error"] == solved.rounding_error > 0
    assert "rounding_error" not in attention_flow(graph, method="bound").provenance.parameters
    assert edge_flows(graph, -1, 0).provenance.parameters["rounding_error"] == solved.rounding_error
