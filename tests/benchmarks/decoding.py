"""Decode all up neurons of the embedded model: against the bare matrix products, and the usual way in TransformerLens.

One call of the public `decode` runs; before or after each of its layers, in turn, the rivals do the same layer, and their time
is taken off. So every layer is a pair measured within seconds, and all that `decode` does besides its layers (vocabulary,
provenance, the data frame) counts as ours; where some layers alone are measured, their share of it.

*Bare products*: `torch.mm` of the same normalised float32 rows with the LM head into one buffer, nothing else: a whole layer
at once, which is fastest but holds all its logits, and as many rows at a time as fit into decode's memory. *TransformerLens*:
`W_in[l].T @ W_U` (W_in is the up projection of gated models, W_gate the gate), softmax, topk, layer by layer under `no_grad`,
W_in stacked once outside the loop. It gives one sign and no entropy, and takes the rows as they are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from tests.benchmarks.memory import MIB, measure
from tests.benchmarks.models import embedded, embedded_as_loaded
from tests.benchmarks.table import Row
from tests.benchmarks.timing import Times

SUITE = "neurons"
TOP_K = 10


def run(quick: bool) -> list[Row]:
    """Rows on time (both signs, one sign) and on memory."""
    from interp.adapters.transformer_lens import to_transformer_lens
    from interp.neurons.decoding import DEFAULT_BUDGET

    model = embedded()
    bridge = to_transformer_lens(model)
    n_layers = model.arch.n_layers
    layers = [0, n_layers // 2] if quick else list(range(n_layers))
    few = layers[:1] if quick else list(range(2, n_layers, 5))
    rivals = {
        "bare": _bare_products(model),
        "bare in pieces": _bare_products(model, DEFAULT_BUDGET),
        "lens": _lens_layer(bridge),
    }
    _paired(model, [0], (1, -1), rivals, sample=64)  # warm-up
    full = _paired(model, layers, (1, -1), rivals)
    again = [_paired(model, few, (1, -1), {"bare": rivals["bare"]}) for _ in range(1 if quick else 2)]
    single = _paired(model, few, (1,), {"lens": rivals["lens"]})
    del bridge, rivals

    work = f"{len(layers)} of {n_layers} layers × {model.arch.d_mlp} neurons, top-{TOP_K} with probabilities"
    about = {"suite": SUITE, "subject": "decoding", "quick": quick}
    repeated = [ratio for pairs in again for ratio in pairs.layer_ratios("bare")]
    speed = 2 * len(layers) * model.arch.d_mlp * model.arch.d_model * model.arch.vocab_size / full.total("bare") / 1e9
    rows = [
        Row(
            **about,
            **full.figures("bare"),
            name="decode, both signs: time",
            against="bare matrix products, a layer at once",
            target="<= 1.15",
            n=work,
            note=f"{full.described('bare')}; {len(repeated)} more pairs on {len(few)} layers: median "
            f"{statistics.median(repeated):.3f}, {min(repeated):.3f}–{max(repeated):.3f}; the products ran at {speed:.0f} "
            f"GFLOP/s",
        ),
        Row(
            **about,
            **full.figures("bare in pieces"),
            name="decode, both signs: time",
            against="bare matrix products in decode's memory",
            target="<= 1.15",
            n=work,
            note=f"{DEFAULT_BUDGET // (4 * model.arch.vocab_size)} rows at a time; {full.described('bare in pieces')}",
        ),
        Row(
            **about,
            **full.figures("lens"),
            name="decode, both signs: time",
            against="TransformerLens",
            target="< 1",
            n=work,
            note=f"W_in[l].T @ W_U, softmax, topk: one sign only; {full.described('lens')}",
        ),
        Row(
            **about,
            **single.figures("lens"),
            name="decode, one sign: time",
            against="TransformerLens",
            target="< 1",
            n=f"{len(few)} of {n_layers} layers",
            note=single.described("lens"),
        ),
    ]
    ours, lens = (measure("decoding", case, layers=layers) for case in ("ours_in_memory", "lens_in_memory"))
    rows.append(
        Row(
            **about,
            name="decode, both signs: extra peak memory",
            against="TransformerLens",
            ratio=ours["extra"] / lens["extra"],
            target="<= 0.25",
            repeats=1,
            ours=ours["extra"] / MIB,
            theirs=lens["extra"] / MIB,
            unit="MiB",
            n=work,
            note="peak resident memory above a baseline taken after loading the model, in fresh processes; "
            "the result is included (TransformerLens: ids and probabilities of one sign)",
        )
    )
    return rows


@dataclass
class _Pairs:
    """Times of each layer, ours and each rival's, and of all that decode does besides its layers."""

    ours: Times = field(default_factory=Times)
    rivals: dict[str, Times] = field(default_factory=dict)
    besides: float = 0.0
    share: float = 1.0  # layers measured, of all layers: as much of `besides` counts

    def total(self, rival: str) -> float:
        return sum(self.rivals[rival].wall)

    def layer_ratios(self, rival: str) -> list[float]:
        return [a / b for a, b in zip(self.ours.wall, self.rivals[rival].wall, strict=True)]

    def figures(self, rival: str) -> dict[str, Any]:
        """What a `Row` says: totals, and the range of the layers' ratios."""
        ours, theirs = sum(self.ours.wall) + self.share * self.besides, self.total(rival)
        ratios = self.layer_ratios(rival)
        processor = sum(self.ours.processor) / sum(self.rivals[rival].processor)
        return {
            "ratio": ours / theirs,
            "lowest": min(ratios),
            "highest": max(ratios),
            "repeats": len(ratios),
            "ours": ours,
            "theirs": theirs,
            "unit": "s",
            "more": {
                "median_layer_ratio": statistics.median(ratios),
                "seconds_besides_layers": self.besides,
                "layers_ratio_of_processor_time": processor,
            },
        }

    def described(self, rival: str) -> str:
        figures = self.figures(rival)
        more = figures["more"]
        return (
            f"ratio of totals; layer by layer, in pairs: median {more['median_layer_ratio']:.3f}, range as given, in "
            f"processor time {more['layers_ratio_of_processor_time']:.3f}; {self.besides:.2f} s of a call are besides the "
            f"layers, of which {self.share:.0%} count here"
        )


Rival = Callable[[int], Callable[[], Any]]


def _paired(
    model: Any, layers: Sequence[int], signs: tuple[int, ...], rivals: dict[str, Rival], **options: Any
) -> _Pairs:
    from interp.neurons import decoding

    pairs, original, outside, count = _Pairs(rivals={name: Times() for name in rivals}), decoding.decode_layer, 0.0, 0

    def layer_and_rivals(weights: Any, head: Any, layer: int, *rest: Any) -> Any:
        nonlocal outside, count
        start, result = time.perf_counter(), None
        turns: list[tuple[Times, Callable[[], Any]]] = [
            (pairs.rivals[name], prepare(layer)) for name, prepare in rivals.items()
        ]
        turns.insert(count % len((*turns, None)), (pairs.ours, lambda: original(weights, head, layer, *rest)))
        for times, call in turns:
            value = times.add(call)
            result = value if times is pairs.ours else result
        count += 1
        outside += time.perf_counter() - start
        return result

    start = time.perf_counter()
    with mock.patch.object(decoding, "decode_layer", layer_and_rivals):
        decoding.decode(model, layers=layers, signs=signs, top_k=TOP_K, progress=False, **options)
    pairs.besides, pairs.share = time.perf_counter() - start - outside, len(layers) / model.arch.n_layers
    if count != len(layers):
        raise RuntimeError(f"decode went through {count} layers in pairs, expected {len(layers)}: it was rewritten")
    return pairs


def _bare_products(model: Any, budget: int | None = None) -> Rival:
    from interp.neurons.decoding import ModelWeights, normalise

    weights = ModelWeights(model)
    head = weights.head().detach()
    size = weights.d_mlp if budget is None else budget // (4 * head.shape[0])
    buffer = torch.zeros(size, head.shape[0])

    @torch.no_grad()
    def prepare(layer: int) -> Callable[[], None]:
        rows = normalise(weights, layer, weights.rows("up", layer, slice(0, weights.d_mlp)).float(), "final")

        @torch.no_grad()
        def products() -> None:
            for chunk in rows.split(size):
                torch.mm(chunk, head.T, out=buffer[: len(chunk)])

        return products

    return prepare


def _lens_layer(bridge: Any) -> Rival:
    with torch.no_grad():
        W_in, W_U = bridge.W_in, bridge.W_U

    def prepare(layer: int) -> Callable[[], Any]:
        @torch.no_grad()
        def usual() -> Any:
            logits = W_in[layer].T @ W_U
            return logits.softmax(-1).topk(TOP_K)

        return usual

    return prepare


def ours_in_memory(layers: Sequence[int]) -> Callable[[], None]:
    """For `memory`: decode with its default settings."""
    from interp.neurons.decoding import decode

    model = embedded_as_loaded()
    decode(model, layers=[0], sample=8, progress=False)

    def call() -> None:
        kept = decode(model, layers=layers, top_k=TOP_K, progress=False)
        del kept

    return call


def lens_in_memory(layers: Sequence[int]) -> Callable[[], None]:
    """For `memory`: the usual way in TransformerLens."""
    from interp.adapters.transformer_lens import to_transformer_lens

    model = embedded_as_loaded()
    bridge = to_transformer_lens(model, copy=False)
    with torch.no_grad():
        (bridge.blocks[0].mlp.W_in[:, :8].T @ bridge.W_U).softmax(-1).topk(TOP_K)

    @torch.no_grad()
    def call() -> None:
        W_in, W_U = bridge.W_in, bridge.W_U
        kept = [(W_in[layer].T @ W_U).softmax(-1).topk(TOP_K) for layer in layers]
        del kept

    return call
