"""Influence of input tokens on positions at the top, by any method, as one tidy table.

| method | what it is | |
|---|---|---|
| exact | maximum flow of the target to this source alone (Abnar & Zuidema 2020) | `interp.flow.exact` |
| widest | the widest path (Vico, hard); a lower bound of exact | `interp.flow.widest` |
| soft | its softened form (Vico, differentiable) | `interp.flow.widest` |
| rollout | capacities multiplied and summed over paths; a lower bound of exact where rows sum to 1 | `interp.flow.rollout` |
| bound | min(1, layer-0 column sum): the trivial upper bound | `interp.flow.rollout` |
| layer_bound | the smallest of what can pass a layer: an upper bound, mostly exact | `interp.flow.rollout` |

`exact` gives every token a flow of its own, as if it were the only one: these flows compete for the same edges, so they
do not sum to 1 and are *not* Shapley values. Ethayarajh & Jurafsky (arXiv 2105.14652) mean the other flow, what passes
each token in one maximum flow of the whole network: see `interp.flow.shapley`.

Under causal attention early tokens can be reached from more positions, whatever the model does. Corrections:

    "none"       as it is
    "uniform"    divided by the same method's score on uniform attention: above 1 is more than position explains; NaN where
                 that is not above 0, as soft widths can be
    "drop_sink"  attention to the sink tokens removed and rows renormalised before solving; the sinks' own scores are NaN
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.errors import InputError
from interp.flow.exact import maximum_flow, rounding_error
from interp.flow.graph import AttentionGraph, with_residual
from interp.flow.positions import Sources, check_sources, check_targets, listed
from interp.flow.rollout import attention_rollout, column_bound, layer_bound
from interp.flow.widest import soft_widest_path, widest_path
from interp.results import Column, Result

METHODS: dict[str, Callable[..., Tensor]] = {
    "exact": maximum_flow,
    "widest": widest_path,
    "soft": soft_widest_path,
    "rollout": attention_rollout,
    "bound": column_bound,
    "layer_bound": layer_bound,
}
CORRECTIONS = ("none", "uniform", "drop_sink")
FLOW_COLUMNS = (
    Column("text", "int32", "index", "0-based index of the graph"),
    Column("method", "category", "", "how influence is measured"),
    Column("correction", "category", "", "none, uniform or drop_sink"),
    Column("target", "int32", "index", "position at the top"),
    Column("source", "int32", "index", "position of the input token; of a group the first"),
    Column("target_token", "str", "", "the target's token"),
    Column("source_token", "str", "", "the source's token; of a group all of them"),
    Column("flow", "float64", "", "influence of the source on the target, in units of attention"),
)


def attention_flow(
    graph: AttentionGraph | Sequence[AttentionGraph],
    targets: Sequence[int] | int | None = (-1,),
    sources: Sources = None,
    *,
    method: str | Sequence[str] = "exact",
    correction: str = "none",
    sinks: Sequence[int] | int = (0,),
    temperature: float = 0.01,
    bias: str = "entropy",
    progress: bool | str = False,
) -> Result:
    """How much of each source reaches each target.

    Args:
        graph: what `attention_graph` gave; several give one table.
        targets: positions at the top; `None` for all. Negative ones count from the end.
        sources: positions of the input, or groups of positions that count as one (the tokens of a word); all positions
            by default.
        method: one or several of the module docstring's table.
        correction: see the module docstring.
        sinks: positions that "drop_sink" removes.
        temperature, bias: of "soft", see `interp.flow.widest`.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        A `Result` of kind "flow.attention_flow" with `FLOW_COLUMNS`: one row per text, method, target and source. A
        source behind its target has flow 0 under causal attention. The attachment "tokens" holds every text's tokens;
        the parameter "rounding_error" says how much too small an exact flow can be, before a correction.

    Raises:
        InputError: an unknown method or correction, a position out of range, no graph.
        MemoryBudgetError: a graph does not fit the exact solver, with both figures.

    Example:
        >>> from interp.flow.graph import attention_graph
        >>> graph = attention_graph(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]), tokens=["a", "b"])
        >>> attention_flow(graph).frame[["source_token", "flow"]].values.tolist()
        [['a', 0.25], ['b', 0.75]]
    """
    start = time.perf_counter()
    graphs = [graph] if isinstance(graph, AttentionGraph) else list(graph)
    if not graphs or any(not isinstance(one, AttentionGraph) for one in graphs):
        raise InputError("no graphs were given; expected what attention_graph gives")
    methods = [method] if isinstance(method, str) else list(method)
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise InputError(f"method={unknown[0] if unknown else methods!r}; expected one of {', '.join(METHODS)}")
    options: dict[str, Any] = {"correction": correction, "sinks": sinks, "temperature": temperature, "bias": bias}
    frames, rounding = [], 0.0
    for text, one in enumerate(graphs):
        chosen, groups = check_targets(targets, len(one)), check_sources(sources, len(one))
        names = ["".join(one.tokens[at] for at in group) for group in groups]
        for name in methods:
            with torch.no_grad():
                values = influence(one, chosen, groups, method=name, progress=progress, **options)
            if name == "exact":
                rounding = max(rounding, rounding_error(one.capacity))
            frames.append(
                pd.DataFrame(
                    {
                        "text": text,
                        "method": name,
                        "correction": correction,
                        "target": np.repeat(chosen, len(groups)),
                        "source": np.tile([group[0] for group in groups], len(chosen)),
                        "target_token": np.repeat(np.array([one.tokens[at] for at in chosen], object), len(groups)),
                        "source_token": np.tile(np.array(names, object), len(chosen)),
                        "flow": values.cpu().double().numpy().ravel(),
                    }
                )
            )
    first = graphs[0]
    parameters = {
        **first.provenance.parameters,
        "methods": methods,
        "correction": correction,
        "sinks": [int(sink) for sink in listed(sinks, "sinks")],
        "temperature": float(temperature),
        "bias": bias,
        "n_texts": len(graphs),
        "n_layers": first.n_layers,
    }
    if "exact" in methods:
        parameters["rounding_error"] = rounding
    provenance = dataclasses.replace(first.provenance, parameters=parameters, wall_time=time.perf_counter() - start)
    attachments = {"tokens": [list(one.tokens) for one in graphs]}
    return Result("flow.attention_flow", pd.concat(frames, ignore_index=True), FLOW_COLUMNS, provenance, attachments)


def influence(
    graph: AttentionGraph,
    targets: Sequence[int] | int | None = None,
    sources: Sources = None,
    *,
    method: str = "exact",
    correction: str = "none",
    sinks: Sequence[int] | int = (0,),
    temperature: float = 0.01,
    bias: str = "entropy",
    progress: bool | str = False,
) -> Tensor:
    """The same as a (target, source) tensor, which carries a gradient where the graph does (not through `layer_bound`).

    Args and Raises: see `attention_flow`.
    """
    if method not in METHODS:
        raise InputError(f"method={method!r}; expected one of {', '.join(METHODS)}")
    if correction not in CORRECTIONS:
        raise InputError(f"correction={correction!r}; expected one of {', '.join(CORRECTIONS)}")
    options: dict[str, Any] = {}
    if method == "exact":
        options = {"progress": progress}
    elif method == "soft":
        options = {"temperature": temperature, "bias": bias}
    chosen, groups = check_targets(targets, len(graph)), check_sources(sources, len(graph))
    removed = set(check_targets(sinks, len(graph), "sink")) if correction == "drop_sink" else set()
    used = graph.without(sorted(removed)) if removed and len(removed) < len(graph) else graph
    values = METHODS[method](used.capacity, chosen, groups, **options)
    if correction == "uniform":
        expected = METHODS[method](with_residual(graph.uniform().attention, graph.residual), chosen, groups, **options)
        ratio = values / expected.clamp(min=torch.finfo(values.dtype).tiny)
        # Nothing by nothing stays nothing (a source behind its target); of a soft width below 0 there is no share.
        values = torch.where(expected > 0, ratio, torch.where(values == 0, values, float("nan")))
    if removed:
        gone = torch.tensor([removed >= set(group) for group in groups], device=values.device)
        values = values.masked_fill(gone, float("nan"))
    return values
