"""How far every approximation is from the exact flow, as texts get longer. Measured for `analyses.attention_flow`.

1. Texts of several lengths from editorials, and beside them as many graphs of random causal attention: rows drawn
   uniformly from all rows that sum to 1, with as many layers. Both with half residual.
2. At the last position, over all sources but the document start: the method's value as a share of the exact flow,
   Kendall's τ-b with the exact flows, and the share of sources where both are equal to 1e-6.
3. Seconds for all sources of one target, the faster of two runs, with what the machine does beside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analyses.flow_faithfulness import digest, rank_correlations
from interp.flow import attention_graph, influence
from interp.flow.graph import AttentionGraph
from interp.flow.widest import soft_widest_path
from interp.intervals import bootstrap_mean
from interp.model import Model
from interp.provenance import Provenance
from interp.results import Column, Result
from interp.sinks.sequences import domain_sequences

EQUAL = 1e-6
LENGTH_COLUMNS = (
    Column("attention", "category", "", "model: of a text; random: rows drawn uniformly"),
    Column("text", "int32", "index", "0-based index among those of this length"),
    Column("n_tokens", "int32", "tokens", "tokens, document start included"),
    Column("method", "category", "", "what stands in for the exact flow"),
    Column("ratio", "float64", "share", "value / exact flow, mean over sources"),
    Column("kendall", "float64", "", "Kendall's τ-b with the exact flows over sources; NaN: constant"),
    Column("equal", "float64", "share", "sources whose value is the exact flow to 1e-6"),
    Column("seconds", "float64", "s", "time of all sources of one target"),
)


def soft_forms() -> dict[str, Callable[[Tensor, list[int]], Tensor]]:
    """The softened widest path at two temperatures with all that can be done about its bias."""

    def form(temperature: float, bias: str) -> Callable[[Tensor, list[int]], Tensor]:
        return lambda capacity, targets: soft_widest_path(capacity, targets, temperature=temperature, bias=bias)

    return {
        f"soft τ={temperature} {bias}": form(temperature, bias)
        for temperature in (0.01, 0.001)
        for bias in ("none", "count", "entropy")
    }


def against_exact(model: Model, lengths: Sequence[int], n: int, *, start: Any, seed: int = 0) -> Result:
    """Every approximation against the exact flow on texts and on random attention of several lengths.

    Args:
        model: a causal LM.
        lengths: tokens of a text.
        n: texts, and random graphs, of each length.
        start: the document start, see `analyses.sink_heads.document_start`.
        seed: of the texts and of the random attention.

    Returns:
        A `Result` of kind "flow.against_exact" with `LENGTH_COLUMNS`.
    """
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    hashes = []
    for length in lengths:
        texts = domain_sequences(model, ["editorials"], length, n, bos=start, seed=seed)["editorials"]
        hashes.append(digest(texts))
        graphs = attention_graph(model, texts)
        for at, graph in enumerate(graphs):
            rows += [{"attention": "model", "text": at, **row} for row in _compared(graph)]
            rows += [
                {"attention": "random", "text": at, **row}
                for row in _compared(random_graph(graph.n_layers, length, generator))
            ]
    parameters = {"lengths": list(lengths), "n": n, "texts": hashes}
    provenance = Provenance.collect(model, seed=seed, parameters=parameters, wall_time=time.perf_counter() - began)
    return Result("flow.against_exact", pd.DataFrame(rows), LENGTH_COLUMNS, provenance)


def random_graph(n_layers: int, length: int, generator: torch.Generator) -> AttentionGraph:
    """Random causal attention: each row uniform among those that sum to 1 (normalised exponentials)."""
    weights = torch.empty(n_layers, length, length, dtype=torch.float64).exponential_(generator=generator).tril()
    return attention_graph(weights / weights.sum(-1, keepdim=True))


def _compared(graph: AttentionGraph) -> list[dict[str, Any]]:
    capacity = graph.capacity.double()
    methods: dict[str, Callable[[], Tensor]] = {
        name: lambda name=name: influence(graph, [-1], method=name)  # type: ignore[misc]
        for name in ("exact", "widest", "rollout", "bound", "layer_bound")
    }
    for name, form in soft_forms().items():
        methods[name] = lambda form=form: form(capacity, [-1])  # type: ignore[misc]
    found, seconds = {}, {}
    for name, method in methods.items():
        times = []
        for _ in range(2):
            start = time.perf_counter()
            found[name] = method()[0, 1:].double().numpy()
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)
    exact = found["exact"]
    return [
        {
            "n_tokens": len(graph),
            "method": name,
            "ratio": float((values / exact).mean()),
            "kendall": float(rank_correlations(values[None], exact[None])[1][0, 0]),
            "equal": float((np.abs(values - exact) <= EQUAL).mean()),
            "seconds": seconds[name],
        }
        for name, values in found.items()
    ]


def length_means(result: Result) -> pd.DataFrame:
    """Means over texts with bootstrap intervals, by attention, length and method.

    Args:
        result: what `against_exact` gave.

    Returns:
        A frame with attention, n_tokens, method, n, and for ratio, kendall and equal the mean, low and high; median milliseconds.
    """
    rows = []
    for key, group in result.frame.groupby(["attention", "n_tokens", "method"], observed=True, sort=False):
        row: dict[str, Any] = dict(zip(("attention", "n_tokens", "method"), key, strict=True))
        for name in ("ratio", "kendall", "equal"):
            values = group[name].dropna().to_numpy()
            low, high = bootstrap_mean(values)
            row |= {
                name: values.mean() if len(values) else np.nan,
                f"{name} low": float(low),
                f"{name} high": float(high),
            }
        rows.append(row | {"ms": float(group["seconds"].median() * 1e3), "n": len(group)})
    return pd.DataFrame(rows)
