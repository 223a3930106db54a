"""Exact top-k, log-sum-exp and entropy of vectors' logits over the vocabulary, for both signs at once.

On a CPU the LM head is multiplied a tile of the vocabulary at a time, and one compiled pass takes what it needs from the tile's
logits while they are in the cache (`interp.neurons.vocabulary_cpu`): the logits are never there as a whole.

Elsewhere all logits of some vectors are: maxima and minima of blocks of 64 logits are one cheap pass, and the k largest
logits lie in the k blocks with the largest maxima, ties included, if blocks and tokens are both ordered by (value, then
lower id); only those are sorted.

Logits are float32 whatever the LM head's dtype. Order: larger value first, ties by lower token id; so results are
deterministic.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

TILE = 2048  # vocabulary rows that a CPU multiplies at a time, in float32
_TILE_BYTES = 8 * 2**20  # … fewer where their copy to float32 would be larger than this
_BLOCK = 64


@dataclass(frozen=True)
class TopTokens:
    """What is kept of some vectors' logits, for one sign.

    Attributes:
        token_id: (neuron, k) ids, best first.
        probability: (neuron, k) softmax probabilities.
        logsumexp: (neuron,).
        entropy: (neuron,) in nats.
    """

    token_id: Int64[Tensor, "neuron k"]
    probability: Float[Tensor, "neuron k"]
    logsumexp: Float[Tensor, " neuron"]
    entropy: Float[Tensor, " neuron"]


@runtime_checkable
class Matrix(Protocol):
    """A tensor of two dimensions, or what reads parts of one (`interp.neurons.checkpoint_files.MatrixOnDisk`)."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Tensor: ...


_Found = dict[int, tuple[Tensor, Tensor, Tensor, Tensor]]  # sign: signed logits, ids, log-sum-exp, entropy


def top_tokens(
    v: Float[Tensor, "neuron d_model"],
    head: Matrix,
    k: int,
    signs: tuple[int, ...] = (1, -1),
    bias: Float[Tensor, " vocab"] | None = None,
) -> dict[int, TopTokens]:
    """Top-k tokens with probabilities, log-sum-exp and entropy of softmax(sign · (head v + bias)).

    Args:
        v: float32.
        head: the LM head (vocab, d_model), in any floating dtype, on the same device.
        k: tokens kept, at most the vocabulary.
        signs: 1, −1 or both.
        bias: float32.

    Returns:
        One `TopTokens` per sign.

    Example:
        >>> top = top_tokens(torch.ones(1, 1), torch.tensor([[0.0], [2.0], [2.0], [-1.0]]), k=2)
        >>> top[1].token_id.tolist(), top[-1].token_id.tolist()
        ([[1, 2]], [[3, 0]])
    """
    found = _in_tiles(v, head, k, signs, bias) if v.device.type == "cpu" else _at_once(v, head, k, signs, bias)
    return {
        sign: TopTokens(ids, (values - logsumexp[:, None]).exp(), logsumexp, entropy)
        for sign, (values, ids, logsumexp, entropy) in found.items()
    }


def _in_tiles(v: Tensor, head: Matrix, k: int, signs: tuple[int, ...], bias: Tensor | None) -> _Found:
    from interp.neurons.vocabulary_cpu import RunningTop

    vocab, width = head.shape
    exact = head.dtype == torch.float32
    size = min(vocab, TILE if exact else max(1, min(TILE, _TILE_BYTES // (4 * width))))
    logits = _buffer("logits", len(v) * size)
    copy = None if exact else _buffer("copy", size * width).view(size, width)
    running = RunningTop(len(v), k, signs)
    for start in range(0, vocab, size):
        rows = head[start : start + size]
        if copy is not None:
            rows = copy[: len(rows)].copy_(rows)
        tile = logits[: len(v) * len(rows)].view(len(v), len(rows))
        torch.mm(v, rows.T, out=tile)
        if bias is not None:
            tile += bias[start : start + size]
        running.add(tile.numpy(), start)
    parts = [torch.from_numpy(array) for array in (running.values, running.ids, *running.sums())]
    return {sign: (parts[0][at], parts[1][at], parts[2][at], parts[3][at]) for at, sign in enumerate(signs)}


_buffers = threading.local()


def _buffer(name: str, size: int) -> Tensor:
    """A thread's own; kept while it lives, because fresh ones of varying size would scatter over memory."""
    kept = getattr(_buffers, name, None)
    if kept is None or len(kept) < size:
        kept = torch.empty(size)
        setattr(_buffers, name, kept)
    return kept[:size]


def _at_once(v: Tensor, head: Matrix, k: int, signs: tuple[int, ...], bias: Tensor | None) -> _Found:
    weight = head[:]
    if weight.dtype != torch.float32 and weight.device.type == "cuda":
        # The product in the model's dtype on the tensor cores, accumulated and kept in float32.
        logits = torch.mm(v.to(weight.dtype), weight.T, out_dtype=torch.float32)
    else:
        logits = v @ weight.float().T
    if bias is not None:
        logits += bias
    highest, lowest = _block_extremes(logits)
    found = {}
    for sign in signs:
        values, ids = _top(logits, highest if sign == 1 else lowest, k, sign)
        shifted = logits * sign - values[:, :1]
        e = shifted.exp()
        total = e.sum(1)
        entropy = total.log() - e.mul_(shifted).sum(1) / total
        found[sign] = values, ids, values[:, 0] + total.log(), entropy.clamp(min=0)
    return found


def _block_extremes(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(neuron, block) maxima and minima; the last block may be shorter."""
    whole = logits.shape[1] // _BLOCK * _BLOCK
    blocks = logits[:, :whole].unflatten(1, (-1, _BLOCK))
    highest, lowest = blocks.amax(2), blocks.amin(2)
    if whole < logits.shape[1]:
        rest = logits[:, whole:]
        highest = torch.cat([highest, rest.amax(1, keepdim=True)], 1)
        lowest = torch.cat([lowest, rest.amin(1, keepdim=True)], 1)
    return highest, lowest


def _top(logits: Tensor, extremes: Tensor, k: int, sign: int) -> tuple[Tensor, Tensor]:
    blocks = _largest(extremes * sign, None, min(k, extremes.shape[1]))  # (neuron, k)
    ids = (blocks[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)).flatten(1)  # (neuron, k·64)
    beyond = ids >= logits.shape[1]
    values = logits.gather(1, ids.clamp_(max=logits.shape[1] - 1)).mul_(sign)
    if beyond.any():
        values.masked_fill_(beyond, -torch.inf)
        ids.masked_fill_(beyond, logits.shape[1])
    at = _largest(values, ids, k)
    return values.gather(1, at), ids.gather(1, at)


def _largest(values: Tensor, ids: Tensor | None, k: int) -> Int[Tensor, "neuron k"]:
    """Where the k largest values of each row are, best first, ties by lower id (or position)."""
    more = values.topk(min(k + 1, values.shape[1]), dim=1)
    if not (more.values[:, 1:] == more.values[:, :-1]).any():
        return more.indices[:, :k]
    return _order(values, ids).topk(k, dim=1).indices


def _order(values: Tensor, ids: Tensor | None = None) -> Int[Tensor, "neuron item"]:
    """Integers that sort as (value, then lower id): a float's bits as the high half, the id's complement as the low."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: −0 and 0 are equal
    high = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    if ids is None:
        ids = torch.arange(values.shape[1], device=values.device)
    return high + (0xFFFFFFFF - ids)
