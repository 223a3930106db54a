"""Losses of texts with one attention head ablated, many heads and texts at a time; what lies below is computed once.

1. The residual stream that enters each layer with heads to ablate is kept, on the CPU and without padding, from one pass.
2. One row of a batch is one (head, text). The model's own forward runs with the layers below replaced by identities and the
   kept residual stream put in (`interp.from_layer`), so that masks, positions and norms are the family's own.
3. In the layer, the row's head gets its ablated z, the input of the output projection (modes: `interp.sinks.ablation`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.batching import Batch, available_memory, for_each_batch, token_batches
from interp.capture import Keep, forward, run_probes
from interp.from_layer import from_layer
from interp.model import Model
from interp.sinks.losses import mean_losses

MODES = ("zero", "to_sink", "mean")
Head = tuple[int, int]
# Share of the free memory that kept residual streams may take; layers beyond it wait for the next pass.
_KEPT = 0.25


@torch.no_grad()
def plain_losses(model: Model, encoded: Sequence[Sequence[int]], max_tokens: int) -> np.ndarray:
    """(text,) losses of the model as it is."""
    losses = np.full(len(encoded), np.nan)

    def step(batch: Batch) -> None:
        batch = batch.to(model.device)
        losses[list(batch.rows)] = mean_losses(model, forward(model, batch, logits=False).last_hidden_state, batch)

    for_each_batch(token_batches(encoded, max_tokens=max_tokens, pad_id=model.pad_id), step)
    return losses


@torch.no_grad()
def ablated_losses(
    model: Model,
    encoded: Sequence[Sequence[int]],
    domain: Sequence[str],
    by_layer: Mapping[int, Sequence[Head]],
    mode: str,
    max_tokens: int,
    progress: bool | str,
) -> Iterator[tuple[int, np.ndarray]]:
    """Layer by layer, in order: (head, text) losses with one head ablated."""
    from tqdm.auto import tqdm

    total = sum(map(len, by_layer.values())) * len(encoded)
    name = progress if isinstance(progress, str) else None
    with tqdm(total=total, desc=name, unit="run", disable=not progress, leave=False) as bar:
        for layers in _groups(model, encoded, list(by_layer)):
            keep = Keep([("resid_pre", layer) for layer in layers])
            means = _MeanOutput(layers, domain) if mode == "mean" else None
            run_probes(model, encoded, [keep, *([means] if means else [])], max_tokens=max_tokens)
            for layer in layers:
                residuals = keep.tensors.pop(("resid_pre", layer))
                values = means.values(layer) if means else None  # (text, n_heads · d_head)
                heads = [head for _, head in by_layer[layer]]
                yield layer, _run_layer(model, encoded, layer, heads, residuals, mode, values, max_tokens, bar.update)


def _run_layer(
    model: Model,
    encoded: Sequence[Sequence[int]],
    layer: int,
    heads: Sequence[int],
    residuals: Mapping[int, Tensor],
    mode: str,
    values: Tensor | None,
    max_tokens: int,
    done: Callable[[int], Any],
) -> np.ndarray:
    """(head, text) losses; row `head · n_texts + text` of the batches is one run."""
    n_texts, losses = len(encoded), np.full(len(heads) * len(encoded), np.nan)
    site, d_head = model.arch.site("z", layer), model.arch.d_head

    def step(batch: Batch) -> None:
        texts = [row % n_texts for row in batch.rows]
        head = torch.tensor([heads[row // n_texts] for row in batch.rows])
        residual = torch.zeros(*batch.input_ids.shape, model.arch.d_model, dtype=residuals[0].dtype)
        for row, text in enumerate(texts):
            residual[row, : len(encoded[text])] = residuals[text]
        batch = batch.to(model.device)

        def change(z: Tensor) -> None:
            by_head = z.unflatten(-1, (-1, d_head))  # a view: (row, position, head, d_head)
            row, at = torch.arange(len(texts), device=z.device), head.to(z.device)
            if mode == "zero":
                by_head[row, :, at] = 0
            elif mode == "to_sink":
                by_head[row, :, at] = by_head[row, 0, at][:, None]
            else:
                assert values is not None
                given = values[texts].unflatten(-1, (-1, d_head)).to(z.device, z.dtype)
                by_head[row, :, at] = given[row, at][:, None]

        handle = site.attach(change)
        try:
            with from_layer(model, layer, residual.to(model.device)):
                hidden = forward(model, batch, logits=False).last_hidden_state
        finally:
            handle.remove()
        losses[list(batch.rows)] = mean_losses(model, hidden, batch)
        done(batch.size)

    runs = [ids for _ in heads for ids in encoded]
    for_each_batch(token_batches(runs, max_tokens=max_tokens, pad_id=model.pad_id), step)
    return losses.reshape(len(heads), n_texts)


def _groups(model: Model, encoded: Sequence[Sequence[int]], layers: list[int]) -> Iterator[list[int]]:
    """Layers whose residual streams are kept at a time."""
    one = Keep([("resid_pre", layers[0])]).kept_bytes(model, [len(ids) for ids in encoded])
    size = max(1, int(_KEPT * available_memory("cpu")) // one)
    for at in range(0, len(layers), size):
        yield layers[at : at + size]


class _MeanOutput:
    """A probe: the mean of z over all real tokens of a domain's texts, per layer."""

    def __init__(self, layers: Sequence[int], domain: Sequence[str]) -> None:
        self.sites = [("z", layer) for layer in layers]
        self.domain = list(domain)  # of each text
        self._sums: dict[tuple[int, str], Tensor] = {}
        self._counts: dict[tuple[int, str], int] = {}

    def update(self, site: str, layer: int, tensor: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over real positions; (row, n_heads · d_head) and the tokens of each row."""
        real = batch.mask[..., None]
        return torch.where(real, tensor, 0).sum(1, dtype=torch.float32).cpu().double(), batch.lengths.cpu()

    def merge(self, site: str, layer: int, partial: tuple[Tensor, Tensor], batch: Batch) -> None:
        """Add a batch to its texts' domains."""
        for text, total, count in zip(batch.rows, partial[0], partial[1].tolist(), strict=True):
            key = (layer, self.domain[text])
            self._sums[key] = self._sums.get(key, torch.zeros_like(total)) + total
            self._counts[key] = self._counts.get(key, 0) + count

    def values(self, layer: int) -> Tensor:
        """(text, n_heads · d_head): each text's domain's mean."""
        return torch.stack([self._sums[layer, name] / self._counts[layer, name] for name in self.domain])
