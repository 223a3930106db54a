"""Decode every MLP neuron through the LM head: which tokens it stands for, with exact softmax probabilities.

Source: H. J. Davies, "Decoding specialised feature neurons in LLMs with the final projection layer" (arXiv 2501.02688).
The paper gives no normalisation, sign or indices; those below are our own definitions.

    w = a neuron's weights: its row of the up or gate projection, or its column of the down projection   (d_model,)
    v = N(w)                                                                                             (d_model,)
    z = W_U v                 logits                                                                     (vocab,)
    p = softmax(± z)          token probabilities of the neuron with sign ±

    norm      v                                        why
    raw       w                                        rows are short, so softmax is nearly flat; the ranking is right
    rms       w / rms(w)                               same ranking, peaked probabilities
    final     γ_f ⊙ w / rms(w)                         what lm_head(norm(w)) does (default)
    folded    γ_f ⊙ (γ_l ⊙ w) / rms(γ_l ⊙ w)           the direction the neuron really reads from the residual stream

γ_f, γ_l: gains of the final and the layer's pre-MLP norm. For LayerNorm models `final` and `folded` also centre, and add
the biases only if asked to. Norms *after* the MLP (Gemma, OLMo 2) and a soft cap on the logits are left out.

Steps: read the rows of some neurons, as many at a time as the memory budget allows; normalise in float32; multiply with the
LM head into float32 logits, of which top-k, log-sum-exp and entropy are kept (`interp.neurons.vocabulary`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.errors import InputError, ModelError
from interp.model import Model
from interp.neurons.atlas import ATLAS_COLUMNS, Atlas, atlas_frame
from interp.neurons.vocabulary import TILE, Matrix, TopTokens, top_tokens
from interp.processors import Processors, one_processor_each
from interp.provenance import Provenance

SITES = ("up", "gate", "down")
NORMS = ("raw", "rms", "final", "folded")
DEFAULT_BUDGET = 48 * 2**20
_STEP = 64  # neurons are shared out among processors, and shuffled, in multiples of this
_MOST = 1024  # neurons decoded at a time, where one processor decodes them


@runtime_checkable
class Weights(Protocol):
    """Where decoding reads from: a loaded model, or a checkpoint on disk."""

    n_layers: int
    d_mlp: int
    layer_norm: bool
    device: torch.device

    def rows(self, site: str, layer: int, neurons: slice | Tensor) -> Float[Tensor, "neuron d_model"]:
        """Weights of some neurons in the stored dtype, one row each."""
        ...

    def head(self) -> Matrix:
        """The LM head (vocab, d_model) in the stored dtype."""
        ...

    def head_bias(self) -> Float[Tensor, " vocab"] | None:
        """The LM head's bias in float32."""
        ...

    def final_norm(self) -> tuple[Float[Tensor, " d_model"] | None, Float[Tensor, " d_model"] | None]:
        """Gain and bias of the final norm in float32."""
        ...

    def pre_mlp_gain(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """Gain of the norm that the MLP reads through."""
        ...


def decode(
    model: Model,
    site: str = "up",
    norm: str = "final",
    *,
    signs: Sequence[int] = (1, -1),
    top_k: int = 10,
    bias: bool = False,
    layers: Sequence[int] | None = None,
    sample: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    head_from: Model | None = None,
    memory_budget: int = DEFAULT_BUDGET,
    progress: bool | str = True,
) -> Atlas:
    """Decode all MLP neurons of a model through its LM head.

    Args:
        model: what `load_model` gave.
        site: "up" or "gate" (what a neuron reads) or "down" (what it writes; Geva et al. 2203.14680).
        norm: see the module's table.
        signs: 1, −1 or both; either can be the meaningful one, since an up-projection is multiplied by the gate.
        top_k: tokens kept per neuron and sign.
        bias: add the final norm's and the LM head's bias, where the model has them.
        layers: layers to decode; all by default.
        sample: decode only this many neurons of each layer, drawn at random with `seed`.
        shuffle: the control: permute each neuron's weights before decoding, with `seed`.
        seed: for `sample` and `shuffle`.
        head_from: decode through this model's final norm and LM head instead, to compare two models' neurons alone.
        memory_budget: bytes of logits and weights held at a time; the default is also close to the fastest.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        An `Atlas`: layer, neuron, sign, rank, token_id, token, probability, and per neuron and sign logsumexp, entropy
        and cos(w_up, w_down). Deterministic; ties are broken by lower token id.

    Raises:
        InputError: an unknown site, norm or sign, no gate in this family, "folded" for what a neuron writes, top_k or layers out
            of range.
        ModelError: NaN or infinite weights (names the tensor).

    Example:
        >>> atlas = decode(load_model(), site="up")                    # doctest: +SKIP
        >>> atlas.find(" water", top=3)                                # doctest: +SKIP
    """
    start = time.perf_counter()
    weights = ModelWeights(model, head_from)
    options = DecodeOptions(site, norm, tuple(signs), top_k, bias, sample, shuffle, seed)
    if site == "gate":
        model.arch.gate_proj(0)  # says so where the family has none
    chosen = list(range(model.arch.n_layers)) if layers is None else [model.arch.check_layer(layer) for layer in layers]
    vocab_size = weights.head().shape[0]
    check_options(options, weights, vocab_size, chosen)
    parts = []
    description = progress if isinstance(progress, str) else f"decode {site}"
    total = len(chosen) * min(weights.d_mlp, sample or weights.d_mlp)
    with (
        tqdm(total=total, desc=description, unit="neuron", disable=not progress, leave=False) as bar,
        decoding_processors(weights.device) as processors,
    ):
        head = checked(weights.head(), "LM head")
        for layer in chosen:
            parts.append(decode_layer(weights, head, layer, options, processors, memory_budget, bar))
    tokenizer_json, tokens = vocabulary_of((head_from or model).tokenizer, vocab_size)
    parameters = atlas_parameters(options, weights, chosen, vocab_size)
    parameters["head_from"] = head_from.fingerprint if head_from is not None else None
    return Atlas(
        kind="neurons.atlas",
        frame=atlas_frame(parts, tokens),
        columns=ATLAS_COLUMNS,
        provenance=Provenance.collect(model, seed=seed, parameters=parameters, wall_time=time.perf_counter() - start),
        attachments={} if tokenizer_json is None else {"tokenizer": tokenizer_json},
    )


@dataclass(frozen=True)
class DecodeOptions:
    """What of `decode`'s arguments decides the numbers; see there."""

    site: str = "up"
    norm: str = "final"
    signs: tuple[int, ...] = (1, -1)
    top_k: int = 10
    bias: bool = False
    sample: int | None = None
    shuffle: bool = False
    seed: int = 0


def atlas_parameters(
    options: DecodeOptions, weights: Weights, layers: Sequence[int], vocab_size: int
) -> dict[str, Any]:
    """What an atlas's provenance says about how it was made."""
    sizes = {"layers": list(layers), "n_layers": weights.n_layers, "d_mlp": weights.d_mlp, "vocab_size": vocab_size}
    return {**options.__dict__, "signs": list(options.signs), **sizes}


def check_options(options: DecodeOptions, weights: Weights, vocab_size: int, layers: Sequence[int]) -> None:
    """Refuse options that cannot be meant.

    Raises:
        InputError: see `decode`.
    """
    if options.site not in SITES:
        raise InputError(f"site {options.site!r} cannot be decoded; expected one of {', '.join(SITES)}")
    if options.norm not in NORMS:
        raise InputError(f"norm={options.norm!r}; expected one of {', '.join(NORMS)}")
    if options.site == "down" and options.norm == "folded":
        raise InputError("norm='folded' is about what a neuron reads; for site='down' use 'final'")
    if (
        not options.signs
        or any(sign not in (1, -1) for sign in options.signs)
        or len(set(options.signs)) < len(options.signs)
    ):
        raise InputError(f"signs={options.signs}; expected (1, -1), (1,) or (-1,)")
    if not 1 <= options.top_k <= min(vocab_size, 127):
        raise InputError(f"top_k={options.top_k}; expected 1 … {min(vocab_size, 127)}")
    if options.sample is not None and options.sample < 1:
        raise InputError(f"sample={options.sample}; expected at least 1 neuron per layer")
    if options.bias and options.norm in ("raw", "rms"):
        raise InputError("bias=True belongs to norm='final' or 'folded'")
    if not layers:
        raise InputError("no layers were given; expected at least one")


@dataclass(frozen=True)
class LayerPart:
    """One layer's decoding: arrays with neurons (and signs) along the first dimensions."""

    layer: int
    neurons: np.ndarray  # (neuron,)
    signs: tuple[int, ...]
    token_id: np.ndarray  # (neuron, sign, k)
    probability: np.ndarray  # (neuron, sign, k)
    logsumexp: np.ndarray  # (neuron, sign)
    entropy: np.ndarray  # (neuron, sign)
    cosine: np.ndarray  # (neuron,)


def decoding_processors(device: torch.device) -> contextlib.AbstractContextManager[Processors]:
    """As many as torch may use where a CPU does the products; another device is one processor."""
    return one_processor_each(torch.get_num_threads() if device.type == "cpu" else 1)


def decode_layer(
    weights: Weights,
    head: Matrix,
    layer: int,
    options: DecodeOptions,
    processors: Processors,
    memory_budget: int,
    bar: Any = None,
) -> LayerPart:
    """Decode one layer's neurons, a piece of them at a time on each processor."""
    neurons = torch.arange(weights.d_mlp)
    if options.sample is not None and options.sample < weights.d_mlp:
        generator = torch.Generator().manual_seed(options.seed * 100_003 + layer)
        neurons = torch.randperm(weights.d_mlp, generator=generator)[: options.sample].sort().values
    logits = min(TILE, len(head)) if head.device.type == "cpu" else len(head)
    size = _piece(len(neurons), processors.n, memory_budget // (4 * (logits + 8 * head.shape[1])))

    @torch.no_grad()
    def piece(start: int) -> tuple[Tensor, dict[int, TopTokens]]:
        some = neurons[start : start + size]
        at: slice | Tensor = some if options.sample else slice(start, start + len(some))
        rows = checked(
            weights.rows(options.site, layer, at).to(head.device).float(), f"{options.site} weights of layer {layer}"
        )
        cosine = _cosine(weights, options.site, layer, at, rows)
        if options.shuffle:
            rows = _shuffled(rows, (options.seed * 100_003 + layer) * 100_003 + start // _STEP)
        return cosine, _decode_rows(weights, head, layer, rows, options)

    cosines, found = [], []
    for cosine, tops in processors.map(piece, range(0, len(neurons), size)):
        cosines.append(cosine)
        found.append(tops)
        if bar is not None:
            bar.update(len(cosine))

    def stacked(name: str) -> np.ndarray:
        by_sign = [torch.cat([getattr(tops[sign], name) for tops in found]) for sign in options.signs]
        return torch.stack(by_sign, 1).cpu().numpy()

    arrays = {name: stacked(name) for name in ("token_id", "probability", "logsumexp", "entropy")}
    arrays["token_id"] = arrays["token_id"].astype(np.int32)
    return LayerPart(layer, neurons.numpy(), options.signs, cosine=torch.cat(cosines).cpu().numpy(), **arrays)


def _piece(n: int, processors: int, budget: int) -> int:
    """Neurons decoded at a time by each processor: as many for each, a multiple of `_STEP`, if possible."""
    most = max(_STEP, min(_MOST, budget // processors))
    rounds = math.ceil(n / (most * processors))
    return math.ceil(n / (rounds * processors) / _STEP) * _STEP


def _shuffled(rows: Tensor, seed: int) -> Tensor:
    """Every row's numbers in an order of its own; the same for a neuron, however many are decoded at a time."""
    parts = []
    for step, some in enumerate(rows.split(_STEP)):
        noise = torch.rand(some.shape, generator=torch.Generator().manual_seed(seed + step)).to(rows.device)
        parts.append(some.gather(1, noise.argsort(1)))
    return torch.cat(parts)


def _decode_rows(
    weights: Weights, head: Matrix, layer: int, rows: Tensor, options: DecodeOptions
) -> dict[int, TopTokens]:
    v = normalise(weights, layer, rows, options.norm)
    if not options.bias:
        return top_tokens(v, head, options.top_k, options.signs)
    # With a bias the two signs are no mirror images.
    _, shift = weights.final_norm()
    signed = {sign: v * sign if shift is None else v * sign + shift for sign in options.signs}
    return {sign: top_tokens(v, head, options.top_k, (1,), weights.head_bias())[1] for sign, v in signed.items()}


def normalise(weights: Weights, layer: int, rows: Tensor, norm: str) -> Float[Tensor, "neuron d_model"]:
    """N(w) of the module's table, in float32. A row of zeros stays zero."""
    if norm == "raw":
        return rows
    gain = weights.pre_mlp_gain(layer) if norm == "folded" else None
    v = rows if gain is None else rows * gain
    if weights.layer_norm and norm != "rms":
        v = v - v.mean(1, keepdim=True)
    rms = torch.linalg.vector_norm(v, dim=1, keepdim=True) / math.sqrt(v.shape[1])
    v = v / rms.clamp(min=torch.finfo(torch.float32).tiny)
    final, _ = weights.final_norm()
    return v if norm == "rms" or final is None else v.mul_(final)


def _cosine(weights: Weights, site: str, layer: int, at: slice | Tensor, rows: Tensor) -> Float[Tensor, " neuron"]:
    """cos(w_up, w_down) of some neurons; `rows` are the ones at `site`, read already."""
    up, down = (
        rows if site == name else weights.rows(name, layer, at).to(rows.device).float() for name in ("up", "down")
    )
    return torch.nn.functional.cosine_similarity(up, down, dim=1)


def checked(tensor: Tensor, what: str) -> Tensor:
    """The tensor, if all of it is finite.

    Raises:
        ModelError: NaN or infinite values (names the tensor).
    """
    # The extremes are NaN if any value is; unlike isfinite they need no memory of the tensor's size.
    if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise ModelError(f"{what}: {count} of {tensor.numel()} values are NaN or infinite, so they cannot be decoded")
    return tensor


def vocabulary_of(tokenizer: Any, size: int) -> tuple[str | None, list[str]]:
    """A fast tokenizer's JSON and the text of every id, "" where it has none; without a tokenizer `None` and "" alone.

    Args:
        tokenizer: a Hugging Face fast tokenizer, a `tokenizers.Tokenizer`, or `None`.
        size: rows of the LM head.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        return None, [""] * size
    known = set(backend.get_vocab().values())
    texts = backend.decode_batch([[i] if i in known else [] for i in range(size)], skip_special_tokens=False)
    return backend.to_str(), texts


class ModelWeights:
    """A loaded model as a source of weights."""

    def __init__(self, model: Model, head_from: Model | None = None) -> None:
        self.arch = model.arch
        self.head_arch = (head_from or model).arch
        if self.head_arch.d_model != self.arch.d_model:
            raise InputError(
                f"head_from has d_model={self.head_arch.d_model}, the model {self.arch.d_model}: its LM head does not fit"
            )
        self.n_layers, self.d_mlp = model.arch.n_layers, model.arch.d_mlp
        self.layer_norm = self.head_arch.family.norm == "layer"
        self.device = self.head().device
        norm = self.head_arch.final_norm()
        self._final = tuple(
            None if part is None else part.to(self.device)
            for part in (self.head_arch.norm_gain(norm), self.head_arch.norm_bias(norm))
        )

    def rows(self, site: str, layer: int, neurons: slice | Tensor) -> Tensor:
        """Weights of some neurons; see `Weights`."""
        read = {"up": self.arch.up_weight, "gate": self.arch.gate_weight, "down": self.arch.down_weight}[site]
        weight = read(layer)
        return weight[neurons if isinstance(neurons, slice) else neurons.to(weight.device)]

    def head(self) -> Tensor:
        """The LM head's matrix."""
        return self.head_arch.head_weight()

    def head_bias(self) -> Tensor | None:
        """The LM head's bias."""
        bias = getattr(self.head_arch.lm_head(), "bias", None)
        return None if bias is None else bias.detach().float()

    def final_norm(self) -> tuple[Tensor | None, Tensor | None]:
        """Gain and bias of the final norm."""
        return self._final  # type: ignore[return-value]

    def pre_mlp_gain(self, layer: int) -> Tensor | None:
        """Gain of the norm that the MLP reads through."""
        gain = self.arch.norm_gain(self.arch.pre_mlp_norm(layer))
        return None if gain is None else gain.to(self.head().device)
