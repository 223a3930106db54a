"""Attention as an explanation: what the position that predicts looks at, directly or through the layers below.

The target is the last position read (of a continuation: the mean over its positions), for a classifier [CLS], the last
position, or the mean of all, as its head reads them. Sources are the explained tokens; the few-shot prompt and the template take
their share and are not ranked.

| method | score of a token |
|---|---|
| attention | the target's row of attention, heads averaged, mean over layers |
| attention:L | the same of layer L alone; negative L counts from the end |
| attention_norm, attention_norm:L | the same weighted by what heads write, ‖W_O v‖ (Kobayashi et al., arXiv 2004.10102) |
| rollout | product of ½ A + ½ I over layers (Abnar & Zuidema, arXiv 2005.00928) |
| widest | the widest path through that graph (Vico, arXiv 2407.06182) |
| flow | the exact maximum flow through it (`interp.flow`) |
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from interp.agreement.coalitions import Coalitions
from interp.agreement.tasks import Classifier
from interp.errors import InputError
from interp.flow.graph import AttentionGraph, attention_graph, check_layers
from interp.flow.influences import influence
from interp.model import Model

ATTENTION_METHODS = ("attention", "attention_norm", "rollout", "widest", "flow")
_FLOWS = {"rollout": "rollout", "widest": "widest", "flow": "exact"}
_AT_ONCE = 2**26  # numbers in the matrices (layer, query, key) that are kept together: 256 MiB


def attention_scores(
    coalitions: Coalitions, examples: Sequence[int], methods: Sequence[str], progress: Any = False
) -> dict[str, tuple[list[np.ndarray], float]]:
    """Scores of the explained tokens by several methods, which share passes through the model.

    Args:
        coalitions: the examples; their targets do not matter.
        examples: which.
        methods: see the module docstring.
        progress: a progress bar on stderr.

    Returns:
        {method: (per example (token) scores of at least 0, NaN where the target is not finite; its own seconds and its
        share of the passes')}.

    Raises:
        InputError: an unknown method, a layer out of range, a model without attention.
        MemoryBudgetError: the matrices do not fit.
    """
    model = coalitions.model
    split = {method: split_layer(method, model) for method in methods}
    found: dict[str, dict[int, np.ndarray]] = {method: {} for method in methods}
    seconds = dict.fromkeys(methods, 0.0)
    passes = [
        [method for method in methods if (split[method][0] == "attention_norm") == norm] for norm in (False, True)
    ]
    label = progress if isinstance(progress, str) else "attention"
    fine = [example for example in examples if np.isfinite(coalitions.full(example))]  # else the pattern is NaN, too
    with tqdm(total=len(fine) * sum(map(bool, passes)), desc=label, disable=not progress, leave=False) as bar:
        for group in filter(None, passes):
            heads = "norm" if split[group[0]][0] == "attention_norm" else "mean"
            layers = sorted({layer for method in group if (layer := split[method][1]) is not None})
            everywhere = any(split[method][1] is None for method in group)
            for some in _groups(coalitions, fine, model.arch.n_layers if everywhere else len(layers)):
                began = time.perf_counter()
                ids = [list(coalitions.encoded[at].ids) for at in some]
                graphs = attention_graph(model, ids, heads=heads, layers=None if everywhere else layers)
                shared = (time.perf_counter() - began) / len(group)
                for method in group:
                    began = time.perf_counter()
                    name, layer = split[method]
                    for example, graph in zip(some, graphs, strict=True):
                        found[method][example] = _score(coalitions, example, graph, name, layer)
                    seconds[method] += time.perf_counter() - began + shared
                bar.update(len(some))
    nothing = {example: np.full(coalitions.size(example), np.nan) for example in examples}
    return {method: ([(nothing | found[method])[at] for at in examples], seconds[method]) for method in methods}


def _groups(coalitions: Coalitions, examples: Sequence[int], n_layers: int) -> Iterator[list[int]]:
    """Examples whose matrices fit together, one at least."""
    group: list[int] = []
    total = 0
    for example in examples:
        numbers = n_layers * len(coalitions.encoded[example].ids) ** 2
        if group and total + numbers > _AT_ONCE:
            yield group
            group, total = [], 0
        group.append(example)
        total += numbers
    if group:
        yield group


def split_layer(method: str, model: Model) -> tuple[str, int | None]:
    """A method's name and its layer: "attention:3" is ("attention", 3).

    Raises:
        InputError: an unknown method, a layer where none belongs, one out of range, or a model without attention.
    """
    name, colon, layer = method.partition(":")
    if name not in ATTENTION_METHODS or (colon and name in _FLOWS):
        raise InputError(f"method={method!r}; of attention there are {', '.join(ATTENTION_METHODS)}, attention:LAYER")
    if model.arch.n_layers == 0:
        raise InputError(f"{model.name} has no attention layers: {method} says nothing about it")
    if not colon:
        return name, None
    try:
        number = int(layer)
    except ValueError:
        raise InputError(f"method={method!r}; expected a layer's number behind the colon") from None
    return name, check_layers([number], model.arch.n_layers)[0]


def _score(coalitions: Coalitions, example: int, graph: AttentionGraph, name: str, layer: int | None) -> np.ndarray:
    one = coalitions.encoded[example]
    targets = target_positions(coalitions, example)
    sources = list(one.positions)
    if name in _FLOWS:  # through all layers
        with torch.no_grad():
            rows: Tensor = influence(graph, targets, sources, method=_FLOWS[name])
    else:
        layers = slice(None) if layer is None else [graph.layers.index(layer)]
        rows = graph.attention[layers][:, targets][:, :, sources].mean(0)
    return rows.cpu().double().mean(0).numpy()


def target_positions(coalitions: Coalitions, example: int) -> list[int]:
    """Positions whose rows are looked at."""
    one, task = coalitions.encoded[example], coalitions.task
    last = len(one.ids) - 1
    if one.n_reads:
        return list(range(last + 1 - one.n_reads, last + 1))
    reads = task.reads if isinstance(task, Classifier) else None
    reads = reads or ("last" if coalitions.model.arch.family.decoder else "first")
    return {"first": [0], "last": [last], "mean": list(range(last + 1))}[reads]
