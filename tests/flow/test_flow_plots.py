"""Pictures of flow hold the result's own numbers, say what they leave out, and keep tokens as text."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import numpy as np
import pytest
import torch

from interp import load_result
from interp.errors import InputError
from interp.flow import attention_flow, attention_graph, edge_flows, path, plots
from interp.flow.flow_graph_plots import _depths, _hidden
from interp.flow.graph import AttentionGraph
from interp.report import write_report

EVIL = ("<b>bold", "<script>alert(1)</script>", " a\nb", "$x^2$", "&amp;", "<img src=x onerror=alert(1)>")


def graph_of(n_layers: int, length: int, seed: int = 0, tokens: Any = None, causal: bool = True) -> AttentionGraph:
    """A random graph."""
    scores = 2 * torch.randn(n_layers, 1, length, length, generator=torch.Generator().manual_seed(seed))
    if causal:
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    found = attention_graph(scores.softmax(-1), tokens=tokens)
    assert isinstance(found, AttentionGraph)
    return found


def chain() -> AttentionGraph:
    """Everything goes 2 → 1 → 0, one layer each, and stays there below: planted, nothing is random."""
    steps = torch.eye(3).repeat(4, 1, 1)
    steps[3, 2] = torch.tensor([0.0, 1.0, 0.0])
    steps[1, 1] = torch.tensor([1.0, 0.0, 0.0])
    found = attention_graph(steps, tokens=["a", " b", " c"], residual="none")
    assert isinstance(found, AttentionGraph)
    return found


def bars(drawn: Any) -> dict[tuple[str, int], tuple[float, float]]:
    """(method, position): (value, shade) of every box that has a value."""
    found = {}
    for trace in drawn.data:
        if trace.name == "valued":
            method = re.search(r"<extra>(.*)</extra>", trace.hovertemplate)
            assert method is not None
            for text, value, shade in zip(trace.hovertext, trace.customdata, trace.marker.color, strict=True):
                found[method[1], int(text.split(":")[0])] = (float(value), float(shade))
    return found


def subtitle(drawn: Any) -> str:
    return drawn.layout.title.subtitle.text


def all_text(drawn: Any) -> str:
    content = json.loads(drawn.to_json())
    return json.dumps(content["data"]) + json.dumps(
        {key: value for key, value in content["layout"].items() if key != "template"}
    )


# The text, coloured


def test_boxes_hold_the_flows_and_their_shares_of_the_methods_largest() -> None:
    result = attention_flow(graph_of(3, 6), [-1], method=["exact", "widest", "rollout"])
    found = bars(plots.coloured_text(result))
    assert len(found) == 18
    for row in result.frame.itertuples():
        largest = result.frame.loc[result.frame["method"] == row.method, "flow"].max()
        value, shade = found[row.method, row.source]
        assert value == pytest.approx(row.flow, rel=1e-6)
        assert shade == pytest.approx(row.flow / largest, rel=1e-6)


def test_one_method_keeps_its_own_scale_and_unit() -> None:
    result = attention_flow(graph_of(3, 6), [-1], method=["exact", "rollout"])
    drawn = plots.coloured_text(result, methods="rollout")
    flows = result.frame[result.frame["method"] == "rollout"]["flow"]
    assert drawn.layout.coloraxis.cmax == pytest.approx(flows.max())
    assert drawn.layout.coloraxis.cmin == 0
    assert "attention" in drawn.layout.coloraxis.colorbar.title.text
    assert np.allclose([shade for _, shade in bars(drawn).values()], flows, rtol=1e-6)


def test_lines_follow_the_text_without_overlap() -> None:
    tokens = ["word"] * 9 + [" end\n", "next", "日本語"]
    result = attention_flow(graph_of(1, 12, tokens=tokens), [-1])
    (trace,) = plots.coloured_text(result, width=20).data
    boxes = sorted(zip(trace.y, trace.base, trace.x, trace.text, strict=True))
    assert [text for *_, text in boxes] == ["word"] * 9 + ["␣end↵", "next", "日本語"]
    for (line, start, size, _), (line_after, start_after, _, _) in itertools.pairwise(boxes):
        assert start + size <= 20
        assert start_after == pytest.approx(start + size) if line_after == line else start_after == 0
    lines = {text: line for line, _, _, text in boxes}
    assert lines["next"] == lines["␣end↵"] + 1
    assert {text: size for _, _, size, text in boxes}["日本語"] == 7  # two columns each and the space between boxes


def test_the_target_is_outlined() -> None:
    result = attention_flow(graph_of(2, 5), [2])
    (trace,) = plots.coloured_text(result).data
    wide = [text for text, width in zip(trace.hovertext, trace.marker.line.width, strict=True) if width > 1]
    assert wide == ["2: 2"]


@pytest.mark.parametrize("correction", ["none", "uniform"])
def test_text_on_every_colour_has_contrast(correction: str) -> None:
    pattern = torch.ones(1, 200, 200).tril()
    pattern[0, -1] = torch.arange(200) ** 4.0 + 1e-9  # from far below uniform attention to far above
    graph = attention_graph(pattern / pattern.sum(-1, keepdim=True), residual="none")
    result = attention_flow(graph, [-1], method="rollout", correction=correction)
    drawn = plots.coloured_text(result)
    (trace,), axis = drawn.data, drawn.layout.coloraxis
    assert trace.insidetextfont.color[-2:] == ("#FFFFFF", "#FFFFFF") or correction == "uniform"
    for shade, ink in zip(trace.marker.color, trace.insidetextfont.color, strict=True):
        at = (shade - axis.cmin) / (axis.cmax - axis.cmin)
        stops = [(place, [int(color[i : i + 2], 16) for i in (1, 3, 5)]) for place, color in axis.colorscale]
        below = max((stop for stop in stops if stop[0] <= at + 1e-9), key=lambda stop: stop[0])
        above = min((stop for stop in stops if stop[0] >= at - 1e-9), key=lambda stop: stop[0])
        share = 0 if above[0] == below[0] else (at - below[0]) / (above[0] - below[0])
        paper = [low + share * (high - low) for low, high in zip(below[1], above[1], strict=True)]
        light = luminance(paper), luminance([255] * 3 if ink == "#FFFFFF" else [0] * 3)
        assert (max(light) + 0.05) / (min(light) + 0.05) > 3.4


def luminance(color: list[float]) -> float:
    """WCAG 2.2, relative luminance, as published."""
    parts = [c / 255 for c in color]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_dropped_sinks_are_hatched_and_named() -> None:
    result = attention_flow(graph_of(3, 5), [-1], method=["exact", "widest"], correction="drop_sink", sinks=[0, 1])
    drawn = plots.coloured_text(result)
    removed = [trace for trace in drawn.data if trace.name.startswith("no value")]
    assert [[text.split(":")[0] for text in trace.hovertext] for trace in removed] == [["0", "1"], ["0", "1"]]
    assert all(trace.marker.pattern.shape == "/" for trace in removed)
    assert [bool(trace.showlegend) for trace in removed] == [True, False]
    assert {position for _, position in bars(drawn)} == {2, 3, 4}
    assert "drop_sink" in all_text(drawn)


def test_ratios_are_white_at_one() -> None:
    graph = graph_of(2, 6).uniform()
    drawn = plots.coloured_text(attention_flow(graph, [-1], correction="uniform"))
    assert all(shade == pytest.approx(0, abs=1e-5) for _, shade in bars(drawn).values())
    assert drawn.layout.coloraxis.colorscale[1][0] == 0.5
    assert "1" in drawn.layout.coloraxis.colorbar.ticktext
    result = attention_flow(graph_of(2, 6), [-1], method="rollout", correction="uniform")
    for value, shade in bars(plots.coloured_text(result)).values():
        assert 2**shade == pytest.approx(value, rel=1e-5)


def test_tokens_without_a_value_stay_in_the_text_and_groups_are_boxes() -> None:
    graph = graph_of(2, 4, tokens=["a", "b", "c", "d"])
    drawn = plots.coloured_text(attention_flow(graph, [-1], [1, 3]))
    assert [trace.name for trace in drawn.data] == ["not asked for", "valued"]
    assert list(drawn.data[0].text) == ["a", "c"]
    assert list(drawn.data[1].text) == ["b", "d"]
    (groups,) = plots.coloured_text(attention_flow(graph, [-1], [[0, 2], [1]])).data
    assert list(groups.text) == ["ac", "b"]


def test_texts_and_targets_are_chosen() -> None:
    graphs = [graph_of(2, 4, seed=1), graph_of(2, 6, seed=2)]
    result = attention_flow(graphs, None)
    drawn = plots.coloured_text(result, text=1, target=-2)
    rows = result.frame.query("text == 1 and target == 4")
    assert np.allclose([value for value, _ in bars(drawn).values()], rows["flow"])
    assert "(text 1)" in drawn.layout.title.text
    assert "“5” (position 5)" in plots.coloured_text(result, text=1).layout.title.text
    assert plots.attention_flow(result, text=1, target=0).data[0].type == "bar"
    with pytest.raises(InputError, match="2 texts: expected 0 … 1"):
        plots.attention_flow(result, text=2)
    with pytest.raises(InputError, match="no target 9"):
        plots.coloured_text(result, target=9)
    with pytest.raises(InputError, match="no method 'widest' in this result; it has exact"):
        plots.attention_flow(result, methods=["widest"])
    with pytest.raises(InputError, match="width=0"):
        plots.coloured_text(result, width=0)


def test_too_long_a_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp.flow.flow_text_plots._BOXES", 11)
    result = attention_flow(graph_of(1, 6), [-1], method=["exact", "widest"])
    with pytest.raises(InputError, match="12 tokens to draw, and a figure carries at most 11"):
        plots.coloured_text(result)
    assert plots.coloured_text(result, methods="exact").data


# Matrices


def test_matrices_hold_every_flow_and_leave_out_what_is_behind() -> None:
    result = attention_flow(graph_of(3, 5), None, method=["exact", "widest", "rollout"])
    drawn = plots.attention_flow(result)
    assert [trace.type for trace in drawn.data] == ["heatmap"] * 3
    for trace, method in zip(drawn.data, ("exact", "widest", "rollout"), strict=True):
        flows = result.frame[result.frame["method"] == method]["flow"].to_numpy().reshape(5, 5)
        behind = np.triu(np.ones((5, 5), bool), 1)
        assert np.allclose(trace.z[~behind], flows[~behind], rtol=1e-6)
        assert np.isnan(trace.z[behind]).all()
        assert trace.zmin == 0
        assert trace.zmax == pytest.approx(flows.max())
    titles = [note.text for note in drawn.layout.annotations]
    assert titles == ["exact", "widest", "rollout"]


def test_matrices_of_bidirectional_attention_are_whole() -> None:
    result = attention_flow(graph_of(2, 4, causal=False), None)
    (trace,) = plots.attention_flow(result).data
    assert np.allclose(trace.z, result.frame["flow"].to_numpy().reshape(4, 4), rtol=1e-6)


def test_what_was_asked_for_twice_is_drawn_once_and_groups_are_columns() -> None:
    graph = graph_of(2, 4, tokens=["a", "b", "c", "d"])
    result = attention_flow(graph, [3, 3, 2], [1, 1, [0, 1], 0])
    (trace,) = plots.attention_flow(result).data
    frame = result.frame.drop_duplicates(["target", "source", "source_token"])
    assert list(plots.attention_flow(result).layout.xaxis.ticktext) == ["1 b", "0 ab", "0 a"]
    assert np.allclose(trace.z[0], frame[frame["target"] == 2]["flow"], rtol=1e-6)
    assert np.allclose(trace.z[1], frame[frame["target"] == 3]["flow"], rtol=1e-6)
    assert list(plots.coloured_text(result, target=3).data[0].text) == ["ab", "a", "b"]


def test_matrices_show_dropped_sinks_in_grey() -> None:
    result = attention_flow(graph_of(3, 4), None, correction="drop_sink", sinks=[1])
    valued, removed = plots.attention_flow(result).data
    assert np.isnan(valued.z[:, 1]).all()
    assert np.flatnonzero(~np.isnan(removed.z).all(0)).tolist() == [1]
    assert not np.isnan(removed.z[1:, 1]).any()
    assert "removed as a sink" in removed.hovertemplate
    assert "grey" in subtitle(plots.attention_flow(result))


def test_matrices_of_ratios_are_powers_of_two() -> None:
    result = attention_flow(graph_of(2, 4), None, method="rollout", correction="uniform")
    (trace,) = plots.attention_flow(result).data
    lower = np.tril(np.ones((4, 4), bool))
    flows = result.frame["flow"].to_numpy().reshape(4, 4)
    assert np.allclose(trace.customdata[lower], flows[lower], rtol=1e-6)
    assert np.allclose(2.0 ** trace.z[lower], flows[lower], rtol=1e-5)
    assert trace.zmin == -trace.zmax


def test_long_axes_name_every_token_to_the_pointer() -> None:
    result = attention_flow(graph_of(1, 60, tokens=[" the"] * 60), None, method="rollout")
    drawn = plots.attention_flow(result)
    assert drawn.layout.xaxis.type == "category"
    assert len(set(drawn.data[0].x)) == 60
    assert drawn.data[0].x[7] == "7 ␣the"
    short = plots.attention_flow(attention_flow(graph_of(1, 3, tokens=[" the"] * 3), None, method="rollout"))
    assert list(short.layout.xaxis.ticktext) == ["0 ␣the", "1 ␣the", "2 ␣the"]


def test_a_matrix_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    result = attention_flow(graph_of(1, 8), None, method="rollout")
    monkeypatch.setattr("interp.plotting.cap_cells.__defaults__", (63,))
    with pytest.raises(InputError, match="64 cells"):
        plots.attention_flow(result)


# One maximum flow


def edges(drawn: Any) -> dict[tuple[int, int, int], tuple[float, str]]:
    """(layer, query, key): (width in pixels, dash) of every edge that is drawn."""
    found = {}
    for trace in drawn.data:
        if trace.mode == "lines":
            for at in range(0, len(trace.x), 3):
                (key, query), (layer, above) = trace.x[at : at + 2], trace.y[at : at + 2]
                assert above == layer + 1
                assert np.isnan(trace.x[at + 2])
                found[int(layer), int(query), int(key)] = (trace.line.width, trace.line.dash or "solid")
    return found


def test_every_edge_is_drawn_as_wide_as_its_class() -> None:
    result = edge_flows(graph_of(4, 5), -1, 1)
    found = edges(plots.edge_flows(result, max_edges=1000))
    largest = result.frame["flow"].max()
    widths = []
    for row in result.frame.itertuples():
        width, dash = found.pop((row.layer, row.query, row.key))
        assert (dash != "solid") == row.cut
        widths.append((row.flow / largest, width))
    assert not found
    for low, high in zip(sorted(widths), sorted(widths)[1:], strict=False):
        assert low[1] <= high[1]
        if high[0] > 0.5 >= low[0]:
            assert low[1] < high[1]


def test_points_between_hold_flow_and_capacity() -> None:
    result = edge_flows(graph_of(3, 4, tokens=["a", " b", " c", " d"]), -1, 0)
    points = next(trace for trace in plots.edge_flows(result).data if trace.marker.opacity == 0)
    rows = result.frame.sort_values("flow", ascending=False, kind="stable")
    assert np.allclose(points.customdata[:, 0], rows["flow"], rtol=1e-6)
    assert np.allclose(points.customdata[:, 1], rows["capacity"], rtol=1e-6)
    assert np.allclose(points.customdata[:, 2], rows["flow"] / result.provenance.parameters["flow"], rtol=1e-5)
    first = rows.iloc[0]
    assert points.x[0] == (first["query"] + first["key"]) / 2
    assert points.y[0] == first["layer"] + 0.5
    assert points.hovertext[0].startswith(f"{first['key']} ")


def test_a_cap_keeps_the_largest_and_says_what_they_carry() -> None:
    result = edge_flows(graph_of(6, 8), -1, 2)
    drawn = plots.edge_flows(result, max_edges=12)
    ranked = result.frame.sort_values("flow", ascending=False)
    largest = ranked.head(12)
    kept = {(row.layer, row.query, row.key) for row in largest.itertuples()}
    cut = {(row.layer, row.query, row.key) for row in result.frame[result.frame["cut"]].itertuples()}
    assert len(cut - kept) <= 12
    assert set(edges(drawn)) == kept | cut
    share = 0.0
    for layer in range(6):
        rows = result.frame[result.frame["layer"] == layer]
        inside = [(layer, row.query, row.key) in kept | cut for row in rows.itertuples()]
        share += rows["flow"][inside].sum() / rows["flow"].sum() / 6
    said = re.search(r"the 12 largest of (\d+) edges.*: ([\d.]+) % of the flow through a layer", subtitle(drawn))
    assert said is not None
    assert int(said[1]) == (result.frame["flow"] > 0).sum()
    assert float(said[2]) == pytest.approx(100 * share, abs=0.11)
    assert float(said[2]) <= 100 * share + 1e-3
    assert f"dashed: {len(cut)} edge" in subtitle(drawn)
    assert len(drawn.data) <= 15


def test_cut_edges_are_capped_too() -> None:
    result = edge_flows(graph_of(3, 8), -1, 0)
    cut = int(result.frame["cut"].sum())
    assert cut > 4
    drawn = plots.edge_flows(result, max_edges=2)
    dashed = sum(dash != "solid" for _, dash in edges(drawn).values())
    assert dashed <= 4
    assert f"dashed: {dashed} of {cut} edges" in subtitle(drawn)
    with pytest.raises(InputError, match="max_edges=0"):
        plots.edge_flows(result, max_edges=0)


def test_a_planted_flow_has_its_edges_and_nothing_else() -> None:
    drawn = plots.edge_flows(edge_flows(chain(), 2, 0))
    assert set(edges(drawn)) == {(3, 2, 1), (2, 1, 1), (1, 1, 0), (0, 0, 0)}
    assert "all that carry flow are drawn: 4 edges" in subtitle(drawn)
    ends = {trace.name: (tuple(trace.x), tuple(trace.y)) for trace in drawn.data if trace.name in ("source", "target")}
    assert ends == {"source": ((0,), (0,)), "target": ((2,), (4,))}
    assert "from “a” (0) to “ c” (2)" in drawn.layout.title.text


def test_no_flow_is_said() -> None:
    graph = chain()
    drawn = plots.edge_flows(edge_flows(graph, 0, 2))
    assert "nothing of the source reaches the target" in subtitle(drawn)
    assert not edges(drawn)
    routes = plots.path(path(graph, 0, 2))
    assert "No route" in routes.layout.title.text
    assert not routes.data


# Routes


def test_links_carry_the_routes_between_positions() -> None:
    result = path(graph_of(4, 5), -1, top=6)
    drawn = plots.path(result, max_depths=5)
    (sankey,) = drawn.data
    names = [text.split(" ")[0] for text in sankey.node.label]
    for rank, rows in result.frame.groupby("route"):
        route = rows.sort_values("depth")["position"].tolist()
        mine = [at for at, about in enumerate(sankey.link.customdata) if about.startswith(f"route {rank + 1}:")]
        walked = [(int(names[sankey.link.source[at]]), int(names[sankey.link.target[at]])) for at in mine]
        assert walked == list(itertools.pairwise(route))
        assert np.allclose([sankey.link.value[at] for at in mine], rows["width"].iloc[0], rtol=1e-6)
        assert f"{rows['share'].iloc[0]:.2%}" in sankey.link.customdata[mine[0]]
    parameters = result.provenance.parameters
    shown = result.frame.groupby("route")["width"].first().sum() / parameters["flow"]
    said = re.search(r"([\d.]+) % of a maximum flow of ([\d.]+)", subtitle(drawn))
    assert said is not None
    assert float(said[1]) == pytest.approx(100 * shown, abs=0.11)
    assert float(said[2]) == pytest.approx(parameters["flow"], rel=1e-2)


def test_depths_where_all_routes_stay_are_merged() -> None:
    drawn = plots.path(path(chain(), 2))
    (sankey,) = drawn.data
    assert list(sankey.node.label) == ["0 a", "0 a", "1 ␣b", "1 ␣b", "2 ␣c"]
    assert [note.text for note in drawn.layout.annotations] == ["input", "after 1", "after 2", "after 3", "after 4"]
    long = torch.eye(2).repeat(20, 1, 1)
    long[7, 1] = torch.tensor([1.0, 0.0])
    drawn = plots.path(path(attention_graph(long, residual="none"), 1))
    assert [note.text for note in drawn.layout.annotations] == ["input", "after 7", "after 8", "after 20"]
    assert "4 of 21 depths; every stop is shown, all stay where they are" in subtitle(drawn)


def test_hidden_stops_are_counted() -> None:
    routes = [[0, 1, 2, 3, 4, 5]]
    assert _depths(routes, [1.0], 2) == [0, 5]
    assert _hidden(routes, [1.0], [0, 5]) == (4.0, 20.0)
    assert len(_depths(routes, [1.0], 4)) == 4
    steps = torch.zeros(5, 6, 6)
    steps[:, range(6), range(6)] = 1
    for layer in range(5):
        steps[layer, layer + 1] = torch.nn.functional.one_hot(torch.tensor(layer), 6)
    drawn = plots.path(path(attention_graph(steps, residual="none"), 5), max_depths=3)
    assert "3 of 6 depths; 3 of 6 stops lie between" in subtitle(drawn)
    assert "0 0 (depth 0) → 1 1 (depth 1)" in drawn.data[0].link.customdata[0]
    with pytest.raises(InputError, match="max_depths=1"):
        plots.path(path(chain(), 2), max_depths=1)


def test_stops_count_before_the_depth_of_moves() -> None:
    routes = [[0, 0, 0, 0, 0, 3, 3, 3], [0, 0, 1, 2, 2, 2, 3, 3]]
    chosen = _depths(routes, [5.0, 1.0], 4)
    assert _hidden(routes, [5.0, 1.0], chosen)[0] == 0
    assert 2 in chosen


def test_nodes_do_not_overlap() -> None:
    result = path(graph_of(8, 12, seed=3), -1, top=30)
    (sankey,) = plots.path(result).data
    height = 560 - 180
    columns: dict[float, list[tuple[float, float]]] = {}
    passing = np.zeros(len(sankey.node.label))
    np.add.at(passing, list(sankey.link.target), list(sankey.link.value))
    outgoing = np.zeros(len(sankey.node.label))
    np.add.at(outgoing, list(sankey.link.source), list(sankey.link.value))
    through = np.maximum(passing, outgoing)
    for at, (x, y) in enumerate(zip(sankey.node.x, sankey.node.y, strict=True)):
        columns.setdefault(x, []).append((y, through[at]))
    most = max(map(len, columns.values()))
    room = 1 - min(0.7, (most - 1) * 14 / height)
    for nodes in columns.values():
        total = sum(size for _, size in nodes)
        assert total == pytest.approx(sum(size for _, size in columns[max(columns)]), rel=1e-4)
        for (above, size), (below, size_below) in zip(sorted(nodes), sorted(nodes)[1:], strict=False):
            assert below - above >= room * (size + size_below) / 2 / total + 14 / height - 2e-3


def test_widest_routes_say_that_they_are_no_flow() -> None:
    result = path(graph_of(4, 5), -1, method="widest", top=3)
    drawn = plots.path(result)
    assert "taken out of the capacities one by one" in subtitle(drawn)
    assert "% of a maximum flow" not in subtitle(drawn)
    assert "% of the widest route" in drawn.data[0].link.customdata[0]


def test_colours_tell_sources_apart() -> None:
    drawn = plots.path(path(graph_of(3, 4, causal=False), 0, top=12))
    sources: dict[str, set[str]] = {}
    (sankey,) = drawn.data
    for about, color in zip(sankey.link.customdata, sankey.link.color, strict=True):
        sources.setdefault(about.split(": ")[1].split(" ")[0], set()).add(color.rsplit(",", 1)[0])
    assert len(sources) > 1
    assert all(len(colors) == 1 for colors in sources.values())
    assert len({color for colors in sources.values() for color in colors}) == len(sources)
    one = plots.path(path(graph_of(3, 4), -1, 1, top=3))
    assert len({color.rsplit(",", 1)[0] for color in one.data[0].link.color}) == 2
    assert "orange: the strongest" in subtitle(one)


# All of them


@pytest.mark.parametrize(("n_layers", "length"), [(1, 1), (1, 3), (3, 1)])
def test_one_token_and_one_layer(n_layers: int, length: int) -> None:
    graph = graph_of(n_layers, length, causal=length > 1)
    drawn = [
        plots.attention_flow(attention_flow(graph, None, method=["exact", "rollout"])),
        plots.coloured_text(attention_flow(graph)),
        plots.edge_flows(edge_flows(graph)),
        plots.path(path(graph)),
    ]
    assert all(one.data for one in drawn)
    assert f"{n_layers} layer" in subtitle(drawn[1])
    assert ("layers" in subtitle(drawn[1])) == (n_layers > 1)


def test_tokens_never_become_markup() -> None:
    graph = graph_of(3, len(EVIL), tokens=EVIL)
    for correction in ("none", "uniform", "drop_sink"):
        result = attention_flow(graph, None, method=["exact", "widest"], correction=correction)
        for target in range(len(EVIL)):
            check_escaped(plots.coloured_text(result, target=target))
        check_escaped(plots.attention_flow(result))
    for source in (None, 0, 1, [0, 1, 5]):
        check_escaped(plots.edge_flows(edge_flows(graph, -1, 0 if source is None else source)))
        check_escaped(plots.path(path(graph, -1, source)))


def check_escaped(drawn: Any) -> None:
    text = all_text(drawn)
    assert not re.search(r"<(?!br>|/?extra>)(?! )[a-z/]", text), text
    assert "&lt;" in text
    assert "$x" not in text
    assert "&#36;x" in text


def test_results_find_their_plots_also_from_disk(tmp_path: Any) -> None:
    graph = graph_of(2, 4, tokens=["a", " b", " c", " d"])
    for name, result in {
        "flow": attention_flow(graph),
        "edges": edge_flows(graph),
        "path": path(graph),
    }.items():
        loaded = load_result(result.save(tmp_path / f"{name}.parquet"))
        assert loaded.plot().to_json() == result.plot().to_json()
    written = write_report([load_result(one) for one in sorted(tmp_path.glob("*.parquet"))], tmp_path / "r.html")
    assert "flow.edge_flows" in written.read_text()


@pytest.mark.slow
def test_thirty_layers_stay_small(embedded: Any) -> None:
    text = (
        "The old king of the northern sea gave his golden crown to the fisherman, because nobody else told the truth."
    )
    graph = attention_graph(embedded, text)
    flow = edge_flows(graph, -1, 3)
    assert len(flow.frame) > 2000
    drawn = plots.edge_flows(flow)
    assert len(edges(drawn)) <= 600
    assert len(drawn.data) <= 15
    routes = plots.path(path(graph))
    assert len(routes.layout.annotations) <= 8
    sizes = [len(one.to_json()) for one in (drawn, routes, plots.attention_flow(attention_flow(graph, None)))]
    assert max(sizes) < 300_000
