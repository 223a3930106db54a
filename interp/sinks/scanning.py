"""Scan a model for attention sinks: every head on every domain of text, in one pass.

1. Texts of all domains pass through the model once (`interp.capture`); the LM head does not run.
2. As the residual stream enters a layer, tokens whose norm exceeds `peak` times the text's median join the text's sink set
   (`interp.sinks.measures`): sinks are where the peaks are, not only at position 0.
3. The layer's attention is recorded (`interp.sinks.fused_attention`) and reduced at once to a few numbers per text and head.
4. Rows are kept per text, so that intervals, tests and scatters of any kind can be made later without the model: `Scan`.

Masses depend on the text's length: compare domains at one length (`length`, `interp.sinks.domain_sequences`).

Sources: Guo et al., arXiv 2410.13835 (active-dormant heads, value drain, residual peaks, Δlogit); Gu et al., arXiv 2410.10781
(sink rate); Sun et al., arXiv 2402.17762 (massive activations).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.batching import Batch, check_memory
from interp.capture import run_probes
from interp.errors import InputError, ModelError
from interp.model import Model
from interp.provenance import Provenance
from interp.results import Result
from interp.shards import ShardedRun
from interp.sinks.fused_attention import Seen, check_causal, recording
from interp.sinks.measures import (
    ATTENTION_MEASURES,
    MASSIVE,
    RESIDUAL_MEASURES,
    attention_measures,
    find_sinks,
    output_factors,
    residual_measures,
)
from interp.sinks.scan_table import SCAN_COLUMNS, Scan

Texts = Sequence[str | Sequence[int]]
_SHOWN_SINKS = 16  # sink tokens that are named per text


def scan(
    model: Model,
    texts: Mapping[str, Texts] | Texts,
    *,
    engine: str = "fused",
    length: int | None = None,
    peak: float = 10.0,
    layers: Sequence[int] | None = None,
    max_tokens: int = 4096,
    out: str | Path | None = None,
    progress: bool | str = True,
) -> Scan:
    """Sinks of every head on every domain.

    Args:
        model: a causal LM, as `load_model` gave it.
        texts: {domain: texts}, or texts of one domain; strings or sequences of token ids, taken as they are: whether they
            begin with a BOS token decides what is a sink (`interp.sinks.sequences` makes the variants).
        engine: "fused" (memory flat in the length, 1e-5 from eager) or "eager" (the model's own patterns).
        length: cut every text to this many tokens; by default texts are taken whole.
        peak: residual norm, in medians of the text, from which a token is a sink.
        layers: layers whose heads are measured; all by default. Residual streams are measured in all.
        max_tokens: budget of padded tokens in a batch.
        out: a folder; each group of texts becomes a shard there, and a run that was interrupted goes on where it was.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        A `Scan`: one row per domain, text, layer and head, and one per layer (head −1) on the residual stream.

    Raises:
        InputError: no text, an empty or too long one, one shorter than `length` (which and how long), an encoder, a layer out
            of range, an unknown engine.
        ModelError: attention that is not softmax attention (the layers are named).
        MemoryBudgetError: one text's patterns do not fit (eager), with both figures.

    Example:
        >>> texts = {"prose": ["The baker opens at six."], "code": ["import os"]}
        >>> scan(load_model(), texts).heads()                                              # doctest: +SKIP
    """
    start = time.perf_counter()
    check_causal(model)
    domains = _domains(model, texts, length)
    chosen = _layers(model, layers)
    if peak <= 1:
        raise InputError(f"peak={peak}; a sink's norm is more than 1 times the median: expected a number such as 10")
    lengths = {name: [min(map(len, ids)), max(map(len, ids))] for name, ids in domains.items()}
    _check_eager_memory(model, engine, max(high for _, high in lengths.values()))
    parameters = {
        "engine": engine,
        "length": length,
        "peak": float(peak),
        "layers": chosen,
        "n_heads": model.arch.n_heads,
        "n_texts": {name: len(ids) for name, ids in domains.items()},
        "tokens": lengths,
    }
    if isinstance(progress, bool) and progress:
        progress = "scan"
    settings: dict[str, Any] = {"engine": engine, "peak": peak, "layers": chosen, "max_tokens": max_tokens}

    def rows(part: Mapping[str, tuple[int, list[list[int]]]], bar: bool | str) -> pd.DataFrame:
        return _scan_texts(model, part, progress=bar, **settings)

    if out is None:
        frame = rows({name: (0, ids) for name, ids in domains.items()}, progress)
        provenance = Provenance.collect(model, parameters=parameters, wall_time=time.perf_counter() - start)
        return Scan("sinks.scan", frame, SCAN_COLUMNS, provenance)
    return _sharded(model, domains, Path(out), parameters, max_tokens, rows, progress)


def _domains(model: Model, texts: Any, length: int | None) -> dict[str, list[list[int]]]:
    """Token ids of each domain, checked and cut."""
    if isinstance(texts, str):
        texts = [texts]
    given = dict(texts) if isinstance(texts, Mapping) else {"texts": texts}
    if not given:
        raise InputError("no domain was given; expected {domain: texts} with at least one")
    if length is not None and length < 1:
        raise InputError(f"length={length}; expected at least 1 token")
    encoded: dict[str, list[list[int]]] = {}
    for name, entries in given.items():
        if not isinstance(name, str) or not name:
            raise InputError(f"a domain's name must be a string, got {name!r}")
        entries = [entries] if isinstance(entries, str) else list(entries)
        if not entries:
            raise InputError(f"domain {name!r} has no texts; expected at least one")
        try:
            if length is not None:  # cut before the check against the context
                entries = [model.tokenizer(text)["input_ids"] if isinstance(text, str) and text else text for text in entries]
                short = {row: len(ids) for row, ids in enumerate(entries) if len(ids) < length}
                if short:
                    row, have = next(iter(short.items()))
                    raise InputError(
                        f"{len(short)} of {len(entries)} texts are shorter than length={length} tokens (text {row} has {have}); "
                        f"join or drop them, or use a smaller length"
                    )
                entries = [list(ids)[:length] for ids in entries]
            encoded[name] = model.encode(entries)
        except InputError as error:
            raise InputError(f"domain {name!r}: {error}") from None
    return encoded


def _layers(model: Model, layers: Sequence[int] | None) -> list[int]:
    chosen = range(model.arch.n_layers) if layers is None else [model.arch.check_layer(layer) for layer in layers]
    if not chosen:
        raise InputError("layers is empty; expected at least one layer, or None for all")
    return sorted(set(chosen))


def _check_eager_memory(model: Model, engine: str, longest: int) -> None:
    if engine == "eager":
        # Scores, softmax, the pattern and explicit scores for Δlogit live together, in float32.
        needed = 5 * 4 * model.arch.n_heads * longest**2
        check_memory(needed, model.device, f"eager attention on one text of {longest} tokens (engine='fused' needs far less)")


def _sharded(
    model: Model,
    domains: dict[str, list[list[int]]],
    out: Path,
    parameters: dict[str, Any],
    max_tokens: int,
    rows: Any,
    progress: bool | str,
) -> Scan:
    """The same, group by group of texts, each a shard of the folder."""
    import hashlib
    import json

    from tqdm.auto import tqdm

    units: dict[str, tuple[str, int, list[list[int]]]] = {}
    for name, ids in domains.items():
        step = max(1, max_tokens // max(map(len, ids)))
        for at in range(0, len(ids), step):
            units[f"{name}-{at}"] = (name, at, ids[at : at + step])
    digest = hashlib.sha256(json.dumps(domains).encode()).hexdigest()[:16]  # another folder for other texts
    provenance = Provenance.collect(model, parameters={**parameters, "texts": digest})
    run = ShardedRun(out, "sinks.scan", SCAN_COLUMNS, provenance, units=list(units))
    missing = run.missing()
    description = progress if isinstance(progress, str) else None
    bar = tqdm(missing, desc=description, unit="batch", disable=not progress, leave=False)
    for unit in bar:
        name, at, ids = units[unit]
        run.write(unit, rows({name: (at, ids)}, False))
    result = run.finish()
    assert isinstance(result, Scan)
    return result


def _scan_texts(
    model: Model,
    domains: Mapping[str, tuple[int, list[list[int]]]],
    *,
    engine: str,
    peak: float,
    layers: list[int],
    max_tokens: int,
    progress: bool | str,
) -> pd.DataFrame:
    """Rows of some texts: {domain: (index of its first text, token ids)}."""
    encoded = [ids for _, texts in domains.values() for ids in texts]
    probe = SinkProbe(model, len(encoded), layers, peak)
    if engine == "eager":
        longest = max(map(len, encoded))
        max_tokens = max(longest, min(max_tokens, 2**27 // (model.arch.n_heads * longest)))
    with recording(model, engine, probe.record):
        run_probes(model, encoded, [probe], max_tokens=max_tokens, progress=progress)
    names = [name for name, (_, texts) in domains.items() for _ in texts]
    index = [first + at for first, texts in domains.values() for at in range(len(texts))]
    return probe.frame(names, index, encoded)


class SinkProbe:
    """The probe behind `scan`: sees residual streams as a probe and attention as a recorder.

    Between a layer's input and the next layer's, it holds what the layer's attention gave; a batch that starts again starts
    at layer 0, which drops what a failed one left.
    """

    def __init__(self, model: Model, n_texts: int, layers: Sequence[int], peak: float) -> None:
        arch = model.arch
        self.arch, self.layers, self.peak, self.name = arch, set(layers), peak, model.name
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
        assert self._batch is not None and self._sinks is not None
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

        def layer(values: np.ndarray, dtype: str = "float32") -> Any:
            whole = pd.array([pd.NA] * (n_texts * n_layers * (n_heads + 1)), dtype=dtype) if dtype[0] == "I" else None
            if whole is None:
                room = np.full((n_texts, n_layers, n_heads + 1), np.nan, np.float32)
                room[..., 0] = values
                return room.ravel()
            whole[:: n_heads + 1] = values.ravel()
            return whole

        names = pd.Categorical(domains, categories=list(dict.fromkeys(domains)))
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
            columns[f"massive_{rank + 1}_dim"] = layer(self._massive["massive_dim"][..., rank], "Int32")
            columns[f"massive_{rank + 1}_position"] = layer(self._massive["massive_position"][..., rank], "Int32")
        columns["n_sinks"] = layer(self._n_sinks, "Int32")
        named = np.full((n_texts, n_layers, n_heads + 1), "", dtype=object)
        for text in range(n_texts):
            named[text, -1, 0] = " ".join(f"{at}:{encoded[text][at]}" for at in self._positions[text])
        frame = pd.DataFrame({**columns, "sink_tokens": named.ravel()})
        measured = frame["layer"].isin(self.layers) | (frame["head"] < 0)
        return frame[measured].reset_index(drop=True)
