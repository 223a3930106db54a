"""Scan a model for attention sinks: every head on every domain of text, in one pass.

1. Texts of all domains pass through the model once (`interp.capture`); the LM head does not run.
2. As the residual stream enters a layer, tokens whose norm exceeds `peak` times the text's median join the text's sink set
   (`interp.sinks.measures`): sinks are where the peaks are, not only at position 0.
3. The layer's attention is recorded (`interp.recorded_attention`) and reduced at once to a few numbers per text and head.
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

import pandas as pd
from tqdm.auto import tqdm

from interp.batching import check_memory
from interp.capture import run_probes
from interp.errors import InputError
from interp.model import Model
from interp.provenance import Provenance
from interp.recorded_attention import check_causal, recording
from interp.shards import ShardedRun
from interp.sinks.encoded_texts import Texts, digests, encode_domains
from interp.sinks.scan_table import SCAN_COLUMNS, Scan
from interp.sinks.sink_probe import SinkProbe


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
        texts: {domain: texts}, or texts of one domain; strings or sequences of at least two token ids, taken as they are:
            whether they begin with a BOS token decides what is a sink (`interp.sinks.sequences` makes the variants).
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
    chosen = _layers(model, layers)
    check_causal(model, chosen)
    domains = encode_domains(model, texts, length=length, shortest=2)
    if not peak > 1:
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
        "texts": digests(domains),
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


def _layers(model: Model, layers: Sequence[int] | None) -> list[int]:
    chosen = range(model.arch.n_layers) if layers is None else [model.arch.check_layer(layer) for layer in layers]
    if not chosen:
        raise InputError("layers is empty; expected at least one layer, or None for all")
    return sorted(set(chosen))


def _check_eager_memory(model: Model, engine: str, longest: int) -> None:
    if engine == "eager":
        # Scores, softmax, the pattern and explicit scores for Δlogit live together, in float32.
        needed = 5 * 4 * model.arch.n_heads * longest**2
        check_memory(
            needed, model.device, f"eager attention on one text of {longest} tokens (engine='fused' needs far less)"
        )


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
    units: dict[str, tuple[str, int, list[list[int]]]] = {}
    for name, ids in domains.items():
        step = max(1, max_tokens // max(map(len, ids)))
        for at in range(0, len(ids), step):
            units[f"{name}-{at}"] = (name, at, ids[at : at + step])
    provenance = Provenance.collect(model, parameters=parameters)
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
    with recording(model, engine, probe.record, layers):
        run_probes(model, encoded, [probe], max_tokens=max_tokens, progress=progress)
    names = [name for name, (_, texts) in domains.items() for _ in texts]
    index = [first + at for first, texts in domains.values() for at in range(len(texts))]
    return probe.frame(names, index, encoded)
