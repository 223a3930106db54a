"""Which block makes the residual peak: the norm at the sink token with one attention or MLP block at a time zeroed.

Source: Guo et al., arXiv 2410.13835, section 4: in Llama-3.1-8B the peak appears at layer 1 and is made by the MLPs of layers 0
and 1, whatever attention does.

1. The model as it is gives ‖x‖₂ of every token at every depth: depth 0 is the embedding, depth d the output of d layers.
2. The *sink token* of a text is the one with the largest ‖x‖ over the text's median at its depth, over all depths but the last,
   whose output the final norm reads and which many models shrink again. It is kept for every arm, with position 0 beside it.
3. One block at a time is zeroed: what it adds to the residual stream, at every position. Attention's output and that of the down
   projection are set to 0; where a norm follows (Gemma 2 and 3, OLMo 2) it is an RMS norm, which leaves 0 at 0. GPT-NeoX adds
   both blocks to the same stream: zeroing one leaves the other as it was.
4. By default the blocks in question are those of every layer up to where the sink token's norm has reached half of its maximum.
   Blocks of later layers, at even distances while the norm stays above that half, get the same treatment: the control.
5. `origin` compares the sink token's norm with and without each block at the last depth where it is above half of its maximum:
   behind all of these blocks, so that each could have changed it.

Norms are float32, in the residual stream's own unit. A peak may need several blocks in turn: zeroing any of them takes it away,
so shares need not add up to 1. Under causal attention position 0 sees itself alone: texts that begin with the same token
have the same norm there, and an interval over them has no width.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from interp.batching import Batch
from interp.capture import run_probes
from interp.errors import InputError
from interp.intervals import bootstrap_mean
from interp.model import Model
from interp.provenance import Provenance
from interp.recorded_attention import check_causal
from interp.results import Column, Result
from interp.sinks.encoded_texts import Texts, digests, encode_domains

BLOCKS = {"attention": "attn_out", "mlp": "mlp_out"}
PEAK_COLUMNS = (
    Column("domain", "category", "", "kind of text"),
    Column("text", "int32", "index", "0-based index of the text within its domain"),
    Column(
        "arm",
        "category",
        "",
        "none: the model as it is; early: a block in question; control: a block of a later layer",
    ),
    Column("block", "category", "", "what is zeroed: attention or mlp; empty for none"),
    Column("block_layer", "int16", "layer", "its layer; -1 for none"),
    Column("depth", "int16", "layers", "layers passed: 0 is the embedding, d the output of layer d − 1"),
    Column("position", "int32", "index", "the sink token's position in the text"),
    Column("norm_sink", "float32", "norm", "‖x‖ at the sink token"),
    Column("norm_first", "float32", "norm", "‖x‖ at position 0"),
    Column("norm_others", "float32", "norm", "‖x‖, median over tokens that are neither"),
)
_RISEN = 0.5  # share of its maximum that the sink token's norm has reached where the peak is made


@dataclass(frozen=True)
class _Arm:
    """One block that is zeroed, or none."""

    arm: str
    block: str = ""
    layer: int = -1


def residual_peak_origin(
    model: Model,
    texts: Mapping[str, Texts] | Texts,
    layers: Sequence[int] | None = None,
    *,
    n_controls: int = 4,
    chat: bool = False,
    max_tokens: int = 4096,
    progress: bool | str = True,
) -> Result:
    """Residual norms at the sink token with each early block zeroed in turn.

    Args:
        model: a causal LM, as `load_model` gave it.
        texts: {domain: texts}, or texts of one domain, each of at least three tokens.
        layers: whose blocks are zeroed; by default all up to where the peak is made, see the module's step 4.
        n_controls: later layers whose blocks are zeroed as control; fewer where there are not so many.
        chat: wrap texts in the chat template.
        max_tokens: budget of padded tokens in a batch.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        A `Result` of kind "sinks.residual_peak_origin" with `PEAK_COLUMNS`: one row per domain, text, arm and depth. `origin`
        says what makes the peak.

    Raises:
        InputError: an encoder, no text, a text of fewer than three tokens, a layer out of range.

    Example:
        >>> result = residual_peak_origin(load_model(), ["The baker opens at six."])       # doctest: +SKIP
        >>> origin(result)[["block", "block_layer", "remaining", "makes_peak"]]            # doctest: +SKIP
    """
    start = time.perf_counter()
    check_causal(model, layers=())
    domains = encode_domains(model, texts, chat=chat, shortest=3)
    chosen = None if layers is None else sorted({model.arch.check_layer(layer) for layer in layers})
    if chosen == []:
        raise InputError("layers is empty; expected at least one layer, or None for those up to the peak")
    if n_controls < 0:
        raise InputError(f"n_controls={n_controls}; expected 0 or more")
    encoded = [ids for rows in domains.values() for ids in rows]
    keys = [(name, at) for name, rows in domains.items() for at in range(len(rows))]
    plain = _norms(model, encoded, _Arm("none"), max_tokens)
    sinks = [_sink(norms) for norms in plain]
    spans = [_span(norms[:, sink]) for norms, sink in zip(plain, sinks, strict=True)]
    chosen = chosen or list(range(max(first for first, _ in spans)))
    controls = _controls(range(chosen[-1] + 1, min(last for _, last in spans)), n_controls)
    arms = [_Arm("early", block, layer) for layer in chosen for block in BLOCKS]
    arms += [_Arm("control", block, layer) for layer in controls for block in BLOCKS]
    description = progress if isinstance(progress, str) else "zero a block"
    bar = tqdm(arms, desc=description, unit="block", disable=not progress, leave=False)
    zeroed = ((arm, _norms(model, encoded, arm, max_tokens)) for arm in bar)
    frames = [
        _rows(key, arm, norms, sink)
        for arm, every in itertools.chain([(_Arm("none"), plain)], zeroed)
        for key, norms, sink in zip(keys, every, sinks, strict=True)
    ]
    frame = pd.concat(frames, ignore_index=True)
    frame["domain"] = pd.Categorical(frame["domain"], categories=list(domains))
    parameters: dict[str, Any] = {"layers": chosen, "controls": controls, "chat": chat, "max_tokens": max_tokens}
    parameters["texts"] = digests(domains)
    parameters["n_texts"] = {name: len(rows) for name, rows in domains.items()}
    provenance = Provenance.collect(model, parameters=parameters, wall_time=time.perf_counter() - start)
    return Result("sinks.residual_peak_origin", frame, PEAK_COLUMNS, provenance)


def origin(
    result: Result,
    *,
    least: float = 10.0,
    gone: float = 0.5,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """What each block is to the peak: how much of it remains without the block, see the module's step 5.

    Args:
        result: what `residual_peak_origin` gave.
        least: norm at the sink token over the others' from which there is a peak at all.
        gone: a block makes the peak if at most this share of the sink token's norm remains without it.
        n_resamples, level, seed: of the bootstrap over texts.

    Returns:
        domain, arm, block, block_layer, depth (where it is measured), norm_sink, norm_others (means), ratio (mean over texts of
        norm_sink / norm_others), remaining (mean over texts of norm_sink over that of the model as it is), low, high (its
        interval), makes_peak (there is a peak at some depth, and `remaining` and its interval are at most `gone`), appears (depth
        at which the ratio first exceeds `least`; missing if never), n (texts).
    """
    if result.kind != "sinks.residual_peak_origin":
        raise InputError(f"a result of kind {result.kind!r}; expected one of 'sinks.residual_peak_origin'")
    frame = result.frame.astype({"arm": str, "block": str, "domain": str})
    frame["ratio"] = frame["norm_sink"].astype(float) / frame["norm_others"]
    rows = []
    for domain, group in frame.groupby("domain", sort=False):
        plain = group[group["arm"] == "none"]
        curve = plain.groupby("depth")["ratio"].mean()
        height = plain.groupby("depth")["norm_sink"].mean().to_numpy(dtype=float)
        depth, peak = _span(height)[1], float(curve.iloc[:-1].max())
        base = plain[plain["depth"] == depth].set_index("text")["norm_sink"].astype(float)
        for (arm, block, layer), cell in group.groupby(["arm", "block", "block_layer"], sort=False):
            here = cell[cell["depth"] == depth].set_index("text")
            remaining = (here["norm_sink"] / base.loc[here.index]).to_numpy(dtype=float)
            low, high = (float(end) for end in bootstrap_mean(remaining, n_resamples, level, seed))
            risen = cell.groupby("depth")["ratio"].mean()
            above = risen.index[risen.to_numpy() > least]
            bound = remaining.mean() if np.isnan(high) else high
            row = {"domain": domain, "arm": arm, "block": block, "block_layer": layer, "depth": depth}
            row |= {name: float(here[name].mean()) for name in ("norm_sink", "norm_others", "ratio")}
            row |= {"remaining": float(remaining.mean()), "low": low, "high": high}
            row["makes_peak"] = bool(peak > least and arm != "none" and bound <= gone)
            rows.append(row | {"appears": int(above[0]) if len(above) else None, "n": len(here)})
    return pd.DataFrame(rows).astype({"appears": "Int16"})


@contextlib.contextmanager
def _zeroed(model: Model, arm: _Arm) -> Any:
    if arm.arm == "none":
        yield
        return
    handle = model.arch.site(BLOCKS[arm.block], arm.layer).attach(torch.zeros_like)
    try:
        yield
    finally:
        handle.remove()


def _norms(model: Model, encoded: Sequence[Sequence[int]], arm: _Arm, max_tokens: int) -> list[np.ndarray]:
    """(depth, position) norms of each text with one block zeroed."""
    probe = _Norms(model)
    with _zeroed(model, arm):
        run_probes(model, encoded, [probe], max_tokens=max_tokens)
    return [probe.of(text) for text in range(len(encoded))]


def _span(norms: np.ndarray) -> tuple[int, int]:
    """First (from 1) and last depth where the sink token's norm is at least half of its maximum; the last of all left out."""
    inner = norms[:-1] if len(norms) > 2 else norms
    high = np.flatnonzero(inner >= _RISEN * inner.max())
    return max(1, int(high[0])), max(1, int(high[-1]))


def _controls(later: range, wanted: int) -> list[int]:
    """Layers at even distances."""
    return [later[at] for at in sorted({int(at) for at in np.linspace(0, len(later) - 1, min(wanted, len(later)))})]


def _sink(norms: np.ndarray) -> int:
    """Position of the largest norm, in medians of its depth; (depth, position) → index."""
    inner = norms[:-1] if len(norms) > 2 else norms
    return int((inner / np.median(inner, axis=1, keepdims=True)).max(0).argmax())


def _rows(key: tuple[str, int], arm: _Arm, norms: np.ndarray, sink: int) -> pd.DataFrame:
    others = np.delete(norms, sorted({0, sink}), axis=1)
    return pd.DataFrame(
        {
            "domain": key[0],
            "text": key[1],
            "arm": arm.arm,
            "block": arm.block,
            "block_layer": arm.layer,
            "depth": np.arange(len(norms)),
            "position": sink,
            "norm_sink": norms[:, sink],
            "norm_first": norms[:, 0],
            "norm_others": np.median(others, axis=1),
        }
    )


class _Norms:
    """A probe: ‖x‖ of every token at every depth."""

    def __init__(self, model: Model) -> None:
        self.n_layers = model.arch.n_layers
        self.sites = [("resid_pre", 0), *(("resid_post", layer) for layer in range(self.n_layers))]
        self._norms: dict[tuple[int, int], np.ndarray] = {}  # (text, depth)

    def update(self, site: str, layer: int, tensor: Tensor, batch: Batch) -> Tensor:
        """(row, position) norms."""
        return torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32).cpu()

    def merge(self, site: str, layer: int, partial: Tensor, batch: Batch) -> None:
        """Keep the real tokens' norms by text."""
        mask = batch.mask.cpu()
        for row, text in enumerate(batch.rows):
            depth = 0 if site == "resid_pre" else layer + 1
            self._norms[text, depth] = partial[row][mask[row]].numpy()

    def of(self, text: int) -> np.ndarray:
        """(depth, position) of one text."""
        return np.stack([self._norms[text, depth] for depth in range(self.n_layers + 1)])
