"""The probe behind a scan: sees residual streams through hooks and attention through the recorder, and keeps numbers.

Order within a batch: a layer's input (find sinks; hand on what the layer before gave) → the layer's attention (reduce, hold)
→ the next layer's input … → the last layer's output. What is kept per text: 7 numbers per head and 16 per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.batching import Batch
from interp.errors import ModelError
from interp.model import Model
from interp.recorded_attention import Seen
from interp.sinks.measures import (
    ATTENTION_MEASURES,
    MASSIVE,
    RESIDUAL_MEASURES,
    attention_measures,
    find_sinks,
    output_factors,
    residual_measures,
)

_SHOWN_SINKS = 16  # sink tokens that are named per text


class SinkProbe:
    """The probe behind `scan`: sees residual streams as a probe and attention as a recorder.

    Between a layer's input and the next layer's, it holds what the layer's attention gave; a batch that starts again starts
    at layer 0, which drops what a failed one left.
    """

    def __init__(self, model: Model, n_texts: int, layers: Sequence[int], peak: float) -> None:
        arch = model.arch
        self.arch, self.layers, self.peak, self.name = arch, set(layers), float(peak), model.name
        self.sites = [("resid_pre", layer) for layer in range(arch.n_layers)] + [("resid_post", arch.n_layers - 1)]
        self._layer_of = {id(arch.attention(layer)): layer for layer in layers}
        self._factors: dict[int, Tensor] = {}
        shape = (n_texts, arch.n_layers)
        self._heads = {name: np.full((*shape, arch.n_heads), np.nan, np.float32) for name in ATTENTION_MEASURES}
        self._resid = {name: np.full(shape, np.nan, np.float32) for name in RESIDUAL_MEASURES}
        self._massive = {
            name: np.zeros((*shape, MASSIVE), np.float32 if name == "massive" else np.int32)
            for name in ("massive", "massive_dim", "massive_position")
        }
        self._n_sinks = np.zeros(shape, np.int32)
        self._positions: dict[int, list[int]] = {}
        self._attention: dict[int, dict[str, Tensor]] = {}
        self._sinks: Tensor | None = None
        self._batch: Batch | None = None

    @torch.no_grad()
    def record(self, seen: Seen) -> None:
        """Reduce one layer's attention; called by the attention function."""
        layer = self._layer_of.get(id(seen.module))
        if layer is None:
            return
        assert self._batch is not None
        assert self._sinks is not None
        if layer not in self._factors:
            self._factors[layer] = output_factors(self.arch.output_weight(layer)).to(seen.query.device)
        mask, sinks = (tensor.to(seen.query.device) for tensor in (self._batch.mask, self._sinks))
        self._attention[layer] = attention_measures(seen, mask, sinks, self._factors[layer])

    @torch.no_grad()
    def update(self, site: str, layer: int, tensor: Tensor, batch: Batch) -> dict[str, dict[str, Tensor]] | None:
        """Find sinks in a layer's input; hand on what the layer before it gave."""
        if site == "resid_pre" and layer == 0:
            self._sinks, self._attention = torch.zeros_like(batch.mask), {}
        assert self._sinks is not None
        self._batch = batch
        norms = torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32)
        self._sinks = self._sinks.to(tensor.device) | find_sinks(norms, batch.mask, self.peak)
        done = layer if site == "resid_post" else layer - 1
        if done < 0:
            return None
        if done in self.layers and done not in self._attention:
            raise ModelError(
                f"{self.name}: layer {done} ({type(self.arch.attention(done)).__name__}) did not call softmax attention; "
                f"leave it out with layers=…"
            )
        resid = residual_measures(tensor, batch.mask, self._sinks, norms)
        return {"resid": resid, "attention": self._attention.pop(done, {}), "sinks": {"mask": self._sinks}}

    def merge(self, site: str, layer: int, partial: dict[str, dict[str, Tensor]] | None, batch: Batch) -> None:
        """Keep a batch's numbers."""
        if partial is None:
            return
        rows, done = list(batch.rows), layer if site == "resid_post" else layer - 1
        for name, tensor in partial["attention"].items():
            self._heads[name][rows, done] = tensor.cpu().numpy()
        for name, tensor in partial["resid"].items():
            where = self._massive if name.startswith("massive") else self._resid
            where[name][rows, done] = tensor.cpu().numpy()
        sinks = partial["sinks"]["mask"].cpu()
        self._n_sinks[rows, done] = sinks.sum(1).numpy()
        if site == "resid_post":
            for row, text in enumerate(rows):
                self._positions[text] = sinks[row].nonzero()[:_SHOWN_SINKS, 0].tolist()

    def frame(self, domains: Sequence[str], index: Sequence[int], encoded: Sequence[Sequence[int]]) -> pd.DataFrame:
        """Rows of `SCAN_COLUMNS`, in the texts' order."""
        n_texts, n_layers, n_heads = self._heads["mass_first"].shape
        counts = np.array([len(ids) for ids in encoded], np.int32)

        def spread(values: Any, *per: int) -> np.ndarray:
            return np.broadcast_to(np.asarray(values).reshape(per), (n_texts, n_layers, n_heads + 1)).ravel()

        def heads(values: np.ndarray) -> np.ndarray:
            return np.concatenate([np.full((n_texts, n_layers, 1), np.nan, np.float32), values], 2).ravel()

        def layer(values: np.ndarray) -> np.ndarray:
            whole = np.full((n_texts, n_layers, n_heads + 1), np.nan)
            whole[..., 0] = values
            return whole.ravel()

        names = pd.Series(domains, dtype=pd.CategoricalDtype(list(dict.fromkeys(domains)))).array
        columns: dict[str, Any] = {
            "domain": names[spread(np.arange(n_texts), -1, 1, 1)],
            "text": spread(np.asarray(index, np.int32), -1, 1, 1),
            "layer": spread(np.arange(n_layers, dtype=np.int16), 1, -1, 1),
            "head": spread(np.arange(-1, n_heads, dtype=np.int16), 1, 1, -1),
            "n_tokens": spread(counts, -1, 1, 1),
            **{name: heads(values) for name, values in self._heads.items()},
            **{name: layer(values) for name, values in self._resid.items()},
        }
        for rank in range(MASSIVE):
            columns[f"massive_{rank + 1}"] = layer(self._massive["massive"][..., rank])
            columns[f"massive_{rank + 1}_dim"] = layer(self._massive["massive_dim"][..., rank])
            columns[f"massive_{rank + 1}_position"] = layer(self._massive["massive_position"][..., rank])
        columns["n_sinks"] = layer(self._n_sinks)
        named = np.full((n_texts, n_layers, n_heads + 1), "", dtype=object)
        for text in range(n_texts):
            named[text, -1, 0] = " ".join(f"{at}:{encoded[text][at]}" for at in self._positions[text])
        frame = pd.DataFrame({**columns, "sink_tokens": named.ravel()})
        measured = frame["layer"].isin(self.layers) | (frame["head"] < 0)
        return frame[measured].reset_index(drop=True)
