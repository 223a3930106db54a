"""Attention that says how much of it went to chosen keys, without the (query, key) matrix.

A[q, k] = exp(s_qk − lse_q), where s are the scores and lse their log-sum-exp over the keys that q can see. Fused kernels
compute lse anyway, so the mass on a few keys costs O(T · d) and memory stays flat in T.

1. `recording` registers two attention functions with transformers and switches a model to one of them: *fused* calls a kernel
   that returns lse, *eager* calls the model's own eager function, whose pattern it keeps for the length of a layer.
2. Either hands what it saw (`Seen`) to the recorder that is active in this thread, and goes on as the model does.
3. Kernels of *fused*: the flash kernel on CPUs, the memory-efficient kernel on CUDA, for plain causal attention. Sliding
   windows, soft caps on the scores (Gemma 2), and other devices: blocks of queries with explicit scores, which need
   (block, key) at a time and no more.
4. Attention-sink logits (gpt-oss: one learned logit per head that takes mass and gives nothing) enter afterwards:
   lse' = logaddexp(lse, sink), output · exp(lse − lse').

Right padding needs no mask: under causal attention no real query sees the padding behind it, and what padding queries give
is not read. Scores, lse and all that is derived from them are float32 whatever the model's dtype.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, ModelError
from interp.model import Model

ENGINES = ("fused", "eager")
# Scores in a block of queries, all texts and heads together: 64 MiB of float32.
_BLOCK_SCORES = 2**24


@dataclass(frozen=True)
class Seen:
    """One layer's attention on one batch.

    Attributes:
        module: the attention module.
        query: (batch, head, position, d_head), after rotary embedding and norms.
        key, value: (batch, kv_head, position, d_head).
        output: (batch, position, head, d_head): what the heads hand to the output projection.
        scaling: scores are query · key · scaling, then soft-capped.
        lse: (batch, head, position) log-sum-exp of each query's scores; `None` from the eager engine.
        pattern: (batch, head, query, key); `None` from the fused engine.
        window: how many keys a query sees, itself included; `None` for all before it.
        softcap: scores become softcap · tanh(scores / softcap); `None` for none.
    """

    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scaling: float
    lse: Tensor | None
    pattern: Tensor | None
    window: int | None
    softcap: float | None


_recorder: ContextVar[Callable[[Seen], None] | None] = ContextVar("attention_recorder", default=None)


@contextlib.contextmanager
def recording(
    model: Model, engine: str, recorder: Callable[[Seen], None], layers: Iterable[int] | None = None
) -> Iterator[None]:
    """Inside the block, every layer's attention of this thread's forward passes is handed to `recorder`.

    Args:
        model: a causal LM.
        engine: "fused" or "eager".
        recorder: called once per layer and batch, in the layers' order; it must not change or keep the tensors.
        layers: which it measures; all by default. The others' kind of attention is not checked.

    Raises:
        InputError: an unknown engine, an encoder, or bidirectional attention.
        ModelError: a layer's kind of attention is neither full nor a sliding window (it is named).
    """
    if engine not in ENGINES:
        raise InputError(f"engine={engine!r}; expected one of {', '.join(ENGINES)}")
    check_causal(model, layers)
    _register()
    token = _recorder.set(recorder)
    try:
        with model.attention_implementation(f"interp-recorded-{engine}"):
            yield
    finally:
        _recorder.reset(token)


def check_causal(model: Model, layers: Iterable[int] | None = None) -> None:
    """Refuses what is not recorded, by name.

    Args:
        model: any.
        layers: whose attention is to be measured; all by default.

    Raises:
        InputError: an encoder, or bidirectional attention.
        ModelError: one of the layers has chunked, linear or another attention.
    """
    config = model.arch.config
    both = getattr(config, "is_causal", True) is False or bool(getattr(config, "use_bidirectional_attention", False))
    if not model.arch.family.decoder or both:
        raise InputError(
            f"{model.name} ({model.arch.family.name}) is an encoder, or attends in both directions; attention is recorded on "
            f"causal language models only"
        )
    kinds = getattr(config, "layer_types", None) or []
    wanted = set(range(len(kinds)) if layers is None else layers)
    other = {
        layer: kind
        for layer, kind in enumerate(kinds)
        if layer in wanted and kind not in ("full_attention", "sliding_attention")
    }
    if other:
        named = ", ".join(f"layer {layer}: {kind}" for layer, kind in list(other.items())[:8])
        raise ModelError(
            f"{model.name} has layers without plain softmax attention ({named}{' …' if len(other) > 8 else ''}); "
            f"attention is recorded where it is full or a sliding window"
        )


def attention_with_lse(
    query: Float[Tensor, "batch head position d_head"],
    key: Float[Tensor, "batch kv_head position d_head"],
    value: Float[Tensor, "batch kv_head position d_head"],
    scaling: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Tensor, " head"] | None = None,
    block: int | None = None,
) -> tuple[Float[Tensor, "batch head position d_head"], Float[Tensor, "batch head position"]]:
    """Causal attention and the log-sum-exp of every query's scores.

    Args:
        query, key, value: several query heads may share a key-value head (grouped-query attention).
        scaling: factor on the scores.
        window: keys that a query sees, itself included.
        softcap: see `Seen`.
        sink_logits: one logit per head that takes attention and gives nothing.
        block: queries per block where blocks are used; by default as many as fit 64 MiB of scores.

    Returns:
        (output in the query's dtype, lse in float32). With sink logits, lse includes them.
    """
    length = query.shape[2]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (shared.repeat_interleave(groups, dim=1) for shared in (key, value))
    if window is not None and window >= length:
        window = None
    kernel = None if window is not None or softcap is not None or block is not None else _kernel(query)
    if kernel is None:
        output, lse = _in_blocks(query, key, value, scaling, window, softcap, block)
    else:
        output, lse = kernel(query, key, value, scaling)
    if sink_logits is not None:
        with_sink = torch.logaddexp(lse, sink_logits.float()[None, :, None])
        output = output * (lse - with_sink).exp()[..., None].to(output.dtype)
        lse = with_sink
    return output, lse


def _kernel(query: Any) -> Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] | None:
    """A fused kernel for plain causal attention on this device that returns lse; `None` if there is none."""
    width = query.shape[-1]
    if query.device.type == "cpu":
        return _flash_on_cpu
    # The kernel reads 16 bytes at a time.
    if query.device.type == "cuda" and (width * query.element_size()) % 16 == 0 and width <= 512:
        return _efficient_on_cuda
    return None


def _flash_on_cpu(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, True, attn_mask=None, scale=scaling
    )
    return output, lse.float()


def _efficient_on_cuda(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, True, scale=scaling
    )
    return output, lse[..., : query.shape[2]].float()  # the kernel pads lse to a multiple of 32


def _in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    block: int | None,
) -> tuple[Tensor, Tensor]:
    """Explicit scores, a block of queries at a time, against the keys that the block can see."""
    batch, heads, length, _ = query.shape
    # A block of b queries sees b + window − 1 keys, or at most the whole text.
    room, span = _BLOCK_SCORES / (batch * heads), length if window is None else window
    fits = room / span if window is None else (math.sqrt(span**2 + 4 * room) - span) / 2
    block = block or max(16, int(fits))
    outputs, sums = [], []
    for start in range(0, length, block):
        end = min(start + block, length)
        first = 0 if window is None else max(0, start - window + 1)
        scores = block_scores(query[:, :, start:end], key[:, :, first:end], scaling, softcap)
        hidden = ~visible(start, end, first, end, window, query.device)
        scores.masked_fill_(hidden, float("-inf"))
        lse = scores.logsumexp(-1)
        weights = scores.sub_(lse[..., None]).exp_().to(value.dtype)
        outputs.append(weights @ value[:, :, first:end])
        sums.append(lse)
    return torch.cat(outputs, 2), torch.cat(sums, 2)


def block_scores(query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Scores of some queries against some keys, float32 also where these are not: (…, query, key)."""
    scores = (query.float() @ key.float().transpose(-1, -2)) * scaling
    return scores if softcap is None else (scores / softcap).tanh() * softcap


def visible(start: int, end: int, first: int, last: int, window: int | None, device: torch.device) -> Tensor:
    """(query, key) whether queries start … end − 1 see keys first … last − 1."""
    distance = torch.arange(start, end, device=device)[:, None] - torch.arange(first, last, device=device)[None]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


@cache
def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register("interp-recorded-fused", _fused)
    AttentionInterface.register("interp-recorded-eager", _eager)
    AttentionMaskInterface.register("interp-recorded-fused", lambda *_, **__: None)
    AttentionMaskInterface.register("interp-recorded-eager", eager_mask)


def _fused(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """The attention function of the fused engine, as transformers calls it."""
    _refuse(module, other, attention_mask, query, key)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output, lse = attention_with_lse(
        query, key, value, scaling, window=sliding_window, softcap=softcap, sink_logits=s_aux
    )
    output = output.transpose(1, 2).contiguous()
    recorder = _recorder.get()
    if recorder is not None:
        recorder(Seen(module, query, key, value, output, scaling, lse, None, sliding_window, softcap))
    return output, None


def _eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **other: Any,
) -> tuple[Tensor, Tensor]:
    """The attention function of the eager engine: the model's own, and its pattern handed on."""
    _refuse(module, other, None, query, key)
    own = _own_eager(module)
    passed = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, **other}
    output, pattern = own(
        module, query, key, value, attention_mask, **{k: v for k, v in passed.items() if v is not None}
    )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    recorder = _recorder.get()
    if recorder is not None:
        recorder(Seen(module, query, key, value, output, scaling, None, pattern, sliding_window, softcap))
    return output, pattern


def _own_eager(module: Any) -> Any:
    """`eager_attention_forward` of the file that defines the module's class."""
    for kind in type(module).__mro__:
        own = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if own is not None:
            return own
    raise ModelError(f"{type(module).__name__} has no eager attention function of its own; use engine='fused'")


def _refuse(module: Any, other: dict[str, Any], mask: Tensor | None, query: Tensor, key: Tensor) -> None:
    """What neither engine can be exact about is refused by name."""
    if getattr(module, "is_causal", True) is False:
        raise ModelError(f"{type(module).__name__} attends in both directions; only causal attention is recorded")
    if other.get("position_bias") is not None:
        raise ModelError(f"{type(module).__name__} adds a position bias to its scores, which cannot be recorded")
    if mask is not None or query.shape[2] != key.shape[2]:
        raise ModelError(
            f"{type(module).__name__} runs with a mask or a cache of its own ({query.shape[2]} queries, {key.shape[2]} keys); "
            f"attention is recorded on whole texts"
        )
