"""`interp flow TEXT`: how much of each token reaches a position through attention, as a table and as a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp.cli_shared import (
    DEFAULT_MODEL,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OutOption,
    SeedOption,
    load,
    save,
    show,
)
from interp.errors import InputError

if TYPE_CHECKING:
    from interp.flow.graph import AttentionGraph
    from interp.results import Result


def flow(
    text: Annotated[str, typer.Argument(help="The text; one that begins with - goes after a bare --.")],
    target: Annotated[
        list[int] | None,
        typer.Option("--target", help="Position at the top, from 0, or from the end: -1, the default; again for more."),
    ] = None,
    all_targets: Annotated[bool, typer.Option("--all-targets", help="Every position at the top.")] = False,
    source: Annotated[
        int | None,
        typer.Option("--source", help="Position whose maximum flow --plot draws; the strongest but the target itself."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="exact (default), widest, soft, rollout, bound or layer_bound; again for more."),
    ] = None,
    residual: Annotated[
        str | None,
        typer.Option("--residual", help="half (default), plus_one or none; contributions have none."),
    ] = None,
    heads: Annotated[str, typer.Option("--heads", help="mean, max, norm, or numbers of heads: 3 or 3,5.")] = "mean",
    capacity: Annotated[str, typer.Option("--capacity", help="attention or contribution.")] = "attention",
    layers: Annotated[
        str | None, typer.Option("--layers", help="A range: 0:12, the first twelve; :12, 6: or 6 alone; default: all.")
    ] = None,
    correction: Annotated[str, typer.Option("--correction", help="none, uniform or drop_sink.")] = "none",
    sink: Annotated[
        list[int] | None, typer.Option("--sink", help="Position that drop_sink removes; again for more; default: 0.")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the method soft.")] = 0.01,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the text in the chat template.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Where to write a report: coloured text, flow graph, routes (HTML).")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: SeedOption = 0,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """How much of each token reaches a position through attention: maximum flow, and what stands in for it."""
    from interp.flow import attention_flow, attention_graph
    from interp.flow.graph import CAPACITIES, RESIDUALS
    from interp.flow.influences import CORRECTIONS, METHODS
    from interp.flow.positions import check_sources
    from interp.model import set_seed

    if target and all_targets:
        raise InputError("--target and --all-targets were both given; give one of them")
    if source is not None and plot is None:
        raise InputError("--source chooses what --plot draws; give --plot FILE.html with it")
    methods = list(dict.fromkeys(method or ["exact"]))
    _check("--method", methods, METHODS)  # before the model loads
    _check("--correction", [correction], CORRECTIONS)
    _check("--capacity", [capacity], CAPACITIES)
    _check("--residual", [residual] if residual is not None else [], RESIDUALS)
    merged, between = _heads(heads), _range(layers)
    set_seed(seed)
    loaded = load(model, device, dtype)
    graph = attention_graph(
        loaded,
        text,
        residual=residual,
        heads=merged,
        capacity=capacity,
        layers=_layers(between, loaded.arch.n_layers),
        chat=chat,
    )
    check_sources(None if source is None else [source], len(graph))  # before the flows, not after them
    sinks = sink or [0]
    result = attention_flow(
        graph,
        None if all_targets else target or [-1],
        method=methods,
        correction=correction,
        sinks=sinks,
        temperature=temperature,
        progress="maximum flows",
    )
    if plot is not None:
        used = graph.without(sinks) if correction == "drop_sink" else graph
        print(f"wrote {_report(used, result, source, plot)}", file=sys.stderr)
    save(result, out)
    show(_table(result, methods), as_json)


def _table(result: Result, methods: list[str]) -> Any:
    """A row per target and source, a column per method."""
    rows = result.frame.astype({"method": str}).drop_duplicates(["method", "target", "source"])
    wide = rows.pivot(index=["target", "source", "source_token"], columns="method", values="flow")
    return wide[methods].reset_index().rename(columns={"source_token": "token"}).rename_axis(columns=None)


def _report(graph: AttentionGraph, result: Result, source: int | None, path: Path) -> Path:
    """One page: influence, one maximum flow, the strongest routes."""
    from interp.flow import edge_flows, plots
    from interp.flow import path as strongest_routes
    from interp.report import Section, write_report

    target = int(result.frame["target"].iloc[-1])
    chosen = _strongest(result, target) if source is None else source
    edges = edge_flows(graph, target, chosen)
    routes = strongest_routes(graph, target, source)
    several = result.frame["target"].nunique() > 1
    sections = [
        Section(
            "Influence of each token",
            "How much of a token reaches the target through attention, by method, in units of attention.",
            [result, *([plots.coloured_text(result, target=target)] if several else [])],
        ),
        Section(
            "One maximum flow",
            "From the chosen source, or else from the strongest but the target itself. Maximum flows are not unique: "
            "this is one of them. The minimum cut holds back everything else.",
            [edges],
        ),
        Section(
            "The strongest routes",
            "A maximum flow taken apart into routes, the strongest first.",
            [routes],
        ),
    ]
    return write_report(sections, path, title="Attention flow")


def _strongest(result: Result, target: int) -> int:
    """The source with the largest score by the first method, the target itself left out where there are others."""
    rows = result.frame[(result.frame["target"] == target) & result.frame["flow"].notna()]
    rows = rows[rows["method"] == rows["method"].iloc[0]] if len(rows) else rows
    others = rows[rows["source"] != target]
    return int(others["source"].iloc[int(others["flow"].argmax())]) if len(others) else target


def _heads(heads: str) -> str | int | list[int]:
    if heads in ("mean", "max", "norm"):
        return heads
    try:
        chosen = [int(head) for head in heads.split(",")]
    except ValueError:
        raise InputError(f"--heads {heads!r}; expected mean, max, norm, or numbers of heads: 3 or 3,5") from None
    return chosen[0] if len(chosen) == 1 else chosen


def _range(layers: str | None) -> tuple[int | None, int | None] | None:
    """First and last + 1, as --layers says."""
    if layers is None:
        return None
    start, separator, stop = layers.partition(":")
    try:
        first = int(start) if start or not separator else None
        last = int(stop) if stop else None
    except ValueError:
        raise InputError(f"--layers {layers!r}; expected a range such as 0:12, :12 or 6:, or one layer") from None
    if not separator and first is not None:
        return first, first + 1
    return first, last


def _layers(between: tuple[int | None, int | None] | None, n_layers: int) -> list[int] | None:
    if between is None:
        return None
    first = 0 if between[0] is None else between[0]
    last = n_layers if between[1] is None else between[1]
    if not 0 <= first < last <= n_layers:
        raise InputError(f"--layers {first}:{last}; expected a range within 0:{n_layers}, the model's layers")
    return list(range(first, last))


def _check(option: str, given: list[str], known: Any) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InputError(f"{option} {unknown[0]!r}; expected one of {', '.join(known)}")
