"""Mean and standard deviation of every neuron over 64 texts × 256 tokens: against TransformerLens' run_with_cache.

Texts are the sources of Python's standard library, cut into pieces of 256 tokens. *TransformerLens*: run_with_cache of
`mlp.hook_post` in all layers, all texts at once where memory allows, under `no_grad`, stopped before the LM head (which the usual
call would also run and which would take another 3 GB); then mean and sd of each cached tensor. Ours also keeps extremes and
the share of positive values. The two results are compared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from tests.benchmarks.memory import MIB, measure
from tests.benchmarks.models import embedded, embedded_as_loaded
from tests.benchmarks.table import Row
from tests.benchmarks.timing import interleave, ratio_of

SUITE = "neurons"
_SOURCES = (
    "argparse",
    "ast",
    "bdb",
    "calendar",
    "configparser",
    "csv",
    "dataclasses",
    "datetime",
    "difflib",
    "doctest",
)


def run(quick: bool) -> list[Row]:
    """Rows on time and memory."""
    from interp.adapters.transformer_lens import to_transformer_lens
    from interp.neurons import neuron_statistics

    n_texts, length, repeats = (16, 128, 2) if quick else (64, 256, 3)
    model = embedded()
    bridge = to_transformer_lens(model)
    texts = standard_library_texts(model, n_texts, length)
    size = _batch_size(model, n_texts, length)
    ours = neuron_statistics(model, texts[:2], progress=False).frame
    theirs = lens_statistics(bridge, texts[:2], size)
    mean, sd = (torch.stack([theirs[layer][at] for layer in sorted(theirs)]).flatten() for at in (0, 1))
    error = max(
        ((torch.tensor(ours["mean"].to_numpy()) - mean).abs() / sd).max().item(),
        ((torch.tensor(ours["sd"].to_numpy()) - sd).abs() / sd).max().item(),
    )
    times = interleave(
        {
            "ours": lambda: neuron_statistics(model, texts, progress=False),
            "lens": lambda: lens_statistics(bridge, texts, size),
        },
        repeats,
    )
    del bridge, model
    about: dict[str, Any] = {
        "suite": SUITE,
        "subject": "activations",
        "against": "TransformerLens",
        "n": f"{n_texts} texts × {length} tokens, hidden of all layers",
        "quick": quick,
    }
    batch = f"TransformerLens takes {size} texts at once"
    rows = [
        Row(
            **about,
            **ratio_of(times["ours"], times["lens"]),
            name="neuron statistics: time",
            target="< 1",
            note=f"{batch}; on two texts, means and deviations agree within {error:.0e} standard deviations",
        )
    ]
    seen = {
        case: measure("activations", case, n_texts=n_texts, length=length, size=size)
        for case in ("ours_in_memory", "lens_in_memory")
    }
    ours_extra, lens_extra = seen["ours_in_memory"]["extra"], seen["lens_in_memory"]["extra"]
    rows.append(
        Row(
            **about,
            name="neuron statistics: extra peak memory",
            ratio=ours_extra / lens_extra,
            target="<= 0.25",
            repeats=1,
            ours=ours_extra / MIB,
            theirs=lens_extra / MIB,
            unit="MiB",
            note=f"{batch}; peak resident memory above a baseline taken after loading model and texts, in fresh processes",
        )
    )
    return rows


def standard_library_texts(model: Any, n_texts: int, length: int) -> list[list[int]]:
    """Token ids of source code, all of one length."""
    ids: list[int] = []
    for name in _SOURCES:
        if len(ids) < n_texts * length:
            ids += model.tokenizer(inspect.getsource(import_module(name)), verbose=False)["input_ids"]
    if len(ids) < n_texts * length:
        raise RuntimeError(f"{len(ids)} tokens in the standard library's sources, expected {n_texts * length}")
    return [ids[at * length : (at + 1) * length] for at in range(n_texts)]


def _batch_size(model: Any, n_texts: int, length: int) -> int:
    """Texts that TransformerLens can take at once: all, unless cache and forward pass would not fit."""
    from interp.batching import available_memory
    from interp.capture import estimate_bytes

    size = n_texts
    while size > 1:
        cache = size * length * model.arch.n_layers * model.arch.d_mlp * 4
        if cache + 2 * estimate_bytes(model, {"pattern"}, size, length) < 0.8 * available_memory("cpu"):
            break
        size //= 2
    return size


@torch.no_grad()
def lens_statistics(bridge: Any, texts: list[list[int]], size: int) -> dict[int, tuple[Any, Any]]:
    """Layer → (mean, sd) of each neuron, as a user of run_with_cache gets them."""
    names = {layer: f"blocks.{layer}.mlp.hook_post" for layer in range(bridge.cfg.n_layers)}
    parts: dict[int, list[Any]] = {layer: [] for layer in names}
    for start in range(0, len(texts), size):
        ids = torch.tensor(texts[start : start + size])
        _, cache = bridge.run_with_cache(ids, names_filter=list(names.values()), stop_at_layer=bridge.cfg.n_layers)
        for layer, name in names.items():
            hidden = cache[name].flatten(0, 1)  # (token, d_mlp)
            parts[layer].append((hidden.mean(0), hidden.var(0), len(hidden)))
        del cache, hidden
    return {layer: _pooled(several) for layer, several in parts.items()}


def _pooled(parts: list[tuple[Any, Any, int]]) -> tuple[Any, Any]:
    if len(parts) == 1:
        return parts[0][0], parts[0][1].sqrt()
    total = sum(n for _, _, n in parts)
    mean = sum(mean * n for mean, _, n in parts) / total
    squares = sum(var * (n - 1) + n * (part - mean) ** 2 for part, var, n in parts)
    return mean, (squares / (total - 1)).sqrt()


def ours_in_memory(n_texts: int, length: int, size: int) -> Callable[[], None]:
    """For `memory`: neuron_statistics with its default settings."""
    from interp.neurons import neuron_statistics

    model = embedded_as_loaded()
    texts = standard_library_texts(model, n_texts, length)
    neuron_statistics(model, [texts[0][:16]], progress=False)

    def call() -> None:
        kept = neuron_statistics(model, texts, progress=False)
        del kept

    return call


def lens_in_memory(n_texts: int, length: int, size: int) -> Callable[[], None]:
    """For `memory`: run_with_cache, then mean and sd."""
    from interp.adapters.transformer_lens import to_transformer_lens

    model = embedded_as_loaded()
    texts = standard_library_texts(model, n_texts, length)
    bridge = to_transformer_lens(model, copy=False)
    lens_statistics(bridge, [texts[0][:16]], 1)

    def call() -> None:
        kept = lens_statistics(bridge, texts, size)
        del kept

    return call
