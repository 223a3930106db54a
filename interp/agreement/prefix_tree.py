"""Logits at the ends of many token sequences that share beginnings: every shared beginning passes through the model once.

Perturbed copies of a text differ in some tokens alone, and all of them stand behind the same few-shot prompt.

1. What *all* sequences begin with is computed once; its keys and values are cached.
2. The rest is sorted, so that neighbours share beginnings, and cut into chunks. A chunk's sequences form a tree: one node per
   different beginning. The nodes are laid out as one row of tokens; a node sees the cached prefix, its ancestors and
   itself (the mask of tree decoding: Miao et al., SpecInfer, arXiv 2305.09781), at the position of its depth.
3. Logits are computed at the ends alone, reduced at once by the caller, and returned in the sequences' order.

A chunk that runs out of memory is halved (`interp.batching`). Where a tree mask would not be exact (encoders, sliding windows
shorter than a sequence, attention kernels without a mask, layers without softmax attention), sequences are padded rows of a
batch, each different one computed once.

A token id that equals the vocabulary's size stands for a vector that is no token, such as the mean embedding (`Embedder`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.batching import Batch, for_each_batch, is_out_of_memory, token_batches
from interp.errors import MemoryBudgetError
from interp.model import Model

# (logits (batch, read, class), the sequences' rows) -> (batch) one number each
Reduce = Callable[[Tensor, Sequence[int]], Tensor]


class Embedder:
    """Token embeddings, and one vector more under the id `vocab_size`.

    Args:
        model: whose embedding is used.
        vector: (d_model) the additional one; `None` for none.
    """

    def __init__(self, model: Model, vector: Float[Tensor, " d_model"] | None = None) -> None:
        self.table: Any = model.arch.embedding()
        self.size = model.arch.vocab_size
        self.vector = vector

    def __call__(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape d_model"]:
        """Vectors of ids."""
        if self.vector is None:
            return self.table(ids)
        known = self.table(ids.clamp(max=self.size - 1))
        return torch.where((ids == self.size)[..., None], self.vector.to(known), known)


@dataclass(frozen=True)
class Readout:
    """Where logits are read, and which.

    Attributes:
        n_reads: how many last positions of a sequence; 0: the model's own class logits.
        choices: token ids of the classes; `None` for the whole vocabulary.
    """

    n_reads: int
    choices: tuple[int, ...] | None = None

    def logits(self, model: Model, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch k"]:
        """Logits in float32 of final hidden states that have passed the final norm."""
        head: Any = model.arch.lm_head()
        if self.choices is None:
            logits = head(hidden).float()
        else:
            weight = model.arch.head_weight()[list(self.choices)].to(hidden)
            logits = (hidden @ weight.T).float()
            if getattr(head, "bias", None) is not None:
                logits = logits + head.bias[list(self.choices)].to(logits)
        cap = getattr(model.arch.config, "final_logit_softcapping", None)
        return logits if cap is None else (logits / cap).tanh() * cap


@torch.no_grad()
def read_logits(
    model: Model,
    sequences: Sequence[Sequence[int]],
    readout: Readout,
    reduce: Reduce,
    *,
    embedder: Embedder | None = None,
    prefix: Prefix | None = None,
    max_tokens: int = 512,
    progress: bool | str = False,
) -> Float[np.ndarray, " sequence"]:
    """One number per sequence, from the logits at its end.

    Args:
        model: what `load_model` gave.
        sequences: token ids, each longer than `readout.n_reads`.
        readout: which logits.
        reduce: makes one number of a sequence's logits; called with (batch, read, class) and the sequences' indices.
        embedder: by default the model's embedding alone.
        prefix: what `prefix_cache` gave for the beginning of all sequences; by default their longest one, computed here.
        max_tokens: nodes in a chunk, or padded tokens in a batch.
        progress: a progress bar on stderr.

    Raises:
        MemoryBudgetError: one sequence alone does not fit.
    """
    embedder = embedder or Embedder(model)
    found = np.full(len(sequences), np.nan)
    if not len(sequences):
        return found
    different: dict[tuple[int, ...], list[int]] = {}
    for row, ids in enumerate(sequences):
        different.setdefault(tuple(ids), []).append(row)
    ordered = sorted(different)

    def keep(logits: Tensor, at: Sequence[int]) -> None:
        # Every row is reduced, also where inputs are the same: what is read of them may differ.
        sources = [(place, row) for place, one in enumerate(at) for row in different[ordered[one]]]
        for start in range(0, len(sources), len(at)):
            places, rows = zip(*sources[start : start + len(at)], strict=True)
            some = logits if len(sources) == len(at) else logits[list(places)]
            found[list(rows)] = reduce(some, rows).cpu().double().numpy()

    if readout.n_reads and packs(model, max(map(len, ordered))):
        if prefix is None:
            beginning = ordered[0][: shared_prefix(ordered, readout.n_reads)]
            prefix = prefix_cache(model, beginning if embedder.size not in beginning else ())
        _in_chunks(model, ordered, readout, keep, embedder, prefix, max_tokens, progress)
    else:
        _in_rows(model, ordered, readout, keep, embedder, max_tokens, progress)
    return found


def packs(model: Model, longest: int) -> bool:
    """Whether a tree mask is exact for sequences of up to `longest` tokens: causal softmax attention that sees all of them."""
    config = model.arch.config
    if not _causal(model) or not model.attention.startswith(("sdpa", "eager")):
        return False
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) or longest
    slides = "sliding_attention" in kinds or not getattr(config, "layer_types", None)
    return kinds <= {"full_attention", "sliding_attention"} and not (slides and int(window) < longest)


def _causal(model: Model) -> bool:
    config = model.arch.config
    both_ways = getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", False)
    return model.arch.family.decoder and not both_ways


def shared_prefix(sequences: Sequence[tuple[int, ...]], n_reads: int) -> int:
    """How many tokens all sequences begin with; fewer than the shortest has before its reads.

    Example:
        >>> shared_prefix([(5, 6, 7, 8), (5, 6, 9, 8)], 1)
        2
    """
    first, last = min(sequences), max(sequences)
    most = min(len(ids) for ids in sequences) - max(1, n_reads)
    return min(_common(first, last), most)


@dataclass(frozen=True)
class Prefix:
    """A beginning that was computed.

    Attributes:
        ids: its tokens.
        kept: keys and values, layer by layer, each (1, kv_head, position, d_head).
    """

    ids: tuple[int, ...]
    kept: tuple[tuple[Tensor, Tensor], ...]

    def cache(self, batch: int = 1) -> Any:
        """A fresh cache for a batch, `None` for no tokens; what the model appends to it does not reach `kept`."""
        from transformers import DynamicCache

        if not self.kept:
            return None
        return DynamicCache(
            ddp_cache_data=[
                (keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)) for keys, values in self.kept
            ]
        )


@torch.no_grad()
def prefix_cache(model: Model, ids: Sequence[int]) -> Prefix:
    """A beginning's keys and values.

    Raises:
        MemoryBudgetError: it does not fit.
    """
    if not ids:
        return Prefix((), ())
    try:
        cache = model.hf.base_model(
            input_ids=torch.tensor([list(ids)], device=model.device), use_cache=True
        ).past_key_values
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryBudgetError(
            f"out of memory on the {len(ids)} tokens that all inputs begin with; shorten them, use a smaller dtype, or a "
            f"device with more memory"
        ) from error
    return Prefix(tuple(ids), tuple((layer.keys.detach(), layer.values.detach()) for layer in cache.layers))


@dataclass(frozen=True)
class _Chunk:
    """Neighbouring sequences of the sorted list; what `for_each_batch` runs and halves."""

    ordered: list[tuple[int, ...]]
    rows: tuple[int, ...]
    skip: int

    @property
    def size(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        before: tuple[int, ...] = ()
        total = 0
        for row in self.rows:
            total += len(self.ordered[row]) - max(_common(before, self.ordered[row]), self.skip)
            before = self.ordered[row]
        return total

    def halves(self) -> tuple[_Chunk, _Chunk]:
        middle = self.size // 2
        return tuple(_Chunk(self.ordered, rows, self.skip) for rows in (self.rows[:middle], self.rows[middle:]))  # type: ignore[return-value]


def _in_chunks(
    model: Model,
    ordered: list[tuple[int, ...]],
    readout: Readout,
    keep: Callable[[Tensor, Sequence[int]], None],
    embedder: Embedder,
    prefix: Prefix,
    max_tokens: int,
    progress: bool | str,
) -> None:
    skip = len(prefix.ids)

    def step(chunk: Any) -> None:
        ids, parents, depths, ends = _tree([ordered[row] for row in chunk.rows], skip, readout.n_reads)
        hidden = model.hf.base_model(
            inputs_embeds=embedder(torch.tensor(ids, device=model.device)[None]),
            attention_mask=_tree_mask(parents, skip, model),
            position_ids=torch.tensor(depths, device=model.device)[None] + skip,
            past_key_values=prefix.cache(),
            use_cache=bool(skip),
        ).last_hidden_state[0]
        at = torch.tensor(ends, device=hidden.device)
        if chunk.size > 1 and not bool(torch.isfinite(hidden[at]).all()):
            for half in chunk.halves():  # a masked key that is NaN still makes its whole row NaN: find whose it is
                step(half)
            return
        step_size = max(1, _HEAD_ROWS // readout.n_reads)
        for start in range(0, len(ends), step_size):
            some = slice(start, start + step_size)
            keep(readout.logits(model, hidden[at[some]]), chunk.rows[some])

    # An iterator: a chunk has what is used of a `Batch` (rows, size, tokens, halves) and is none, which types checked at run
    # time would refuse in a list.
    for_each_batch(iter(_chunks(ordered, skip, max_tokens)), step, progress=progress, unit="input")


_HEAD_ROWS = 512  # rows of logits at a time: 100 MB at 49,152 tokens


def _chunks(ordered: list[tuple[int, ...]], skip: int, max_tokens: int) -> Any:
    chunks: list[Any] = []
    rows: list[int] = []
    total = 0
    before: tuple[int, ...] = ()
    for row, ids in enumerate(ordered):
        new = len(ids) - max(_common(before, ids), skip)
        if rows and total + new > max_tokens:
            chunks.append(_Chunk(ordered, tuple(rows), skip))
            rows, total, new = [], 0, len(ids) - skip
        rows.append(row)
        total += new
        before = ids
    chunks.append(_Chunk(ordered, tuple(rows), skip))
    return chunks


def _tree(
    sequences: Sequence[tuple[int, ...]], skip: int, n_reads: int
) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """Nodes of sorted sequences: token ids, parents (-1: the prefix), depths, and each sequence's last `n_reads` nodes."""
    ids: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    ends: list[list[int]] = []
    path: list[int] = []
    before: tuple[int, ...] = sequences[0][:skip]
    for sequence in sequences:
        path = path[: max(0, _common(before, sequence) - skip)]
        for depth in range(len(path), len(sequence) - skip):
            parents.append(path[-1] if path else -1)
            path.append(len(ids))
            ids.append(sequence[skip + depth])
            depths.append(depth)
        ends.append(path[-n_reads:])
        before = sequence
    return ids, parents, depths, ends


def _tree_mask(parents: Sequence[int], skip: int, model: Model) -> Float[Tensor, "1 1 node key"]:
    """0 where a node sees a key (prefix, ancestors, itself), the least number elsewhere."""
    seen = np.zeros((len(parents), skip + len(parents)), dtype=bool)
    seen[:, :skip] = True
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] = seen[parent]
        seen[node, skip + node] = True
    mask = torch.zeros(seen.shape, dtype=model.dtype, device=model.device)
    mask.masked_fill_(torch.from_numpy(~seen).to(model.device), torch.finfo(model.dtype).min)
    return mask[None, None]


def padded_logits(
    model: Model,
    embedded: Float[Tensor, "batch position d_model"],
    lengths: Int[Tensor, " batch"],
    readout: Readout,
    prefix: Prefix,
) -> Float[Tensor, "batch read k"]:
    """Logits at the ends of inputs that are padded on the right; differentiable.

    Args:
        model: what `load_model` gave.
        embedded: what follows the prefix.
        lengths: positions that are no padding.
        readout: which logits.
        prefix: what stands before every input; empty for encoders.
    """
    inputs: dict[str, Any] = {"inputs_embeds": embedded}
    if model.arch.family.decoder:
        inputs |= {"use_cache": bool(prefix.ids), "past_key_values": prefix.cache(len(embedded))}
    # Padding on the right is out of sight of causal attention. Masked, in float64 it may see nothing and become NaN.
    if not _causal(model):
        inputs["attention_mask"] = (torch.arange(embedded.shape[1], device=embedded.device) < lengths[:, None]).long()
    if not readout.n_reads and not model.arch.family.decoder:
        return model.hf(**inputs).logits.float()[:, None]
    hidden = model.hf.base_model(**inputs).last_hidden_state
    n_reads = max(1, readout.n_reads)
    at = (lengths[:, None] + torch.arange(-n_reads, 0, device=lengths.device)).to(hidden.device)
    chosen = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
    # A decoder's class head would look for padding, which embeddings do not show.
    return readout.logits(model, chosen) if readout.n_reads else model.hf.score(chosen).float()


def _in_rows(
    model: Model,
    ordered: list[tuple[int, ...]],
    readout: Readout,
    keep: Callable[[Tensor, Sequence[int]], None],
    embedder: Embedder,
    max_tokens: int,
    progress: bool | str,
) -> None:
    def step(batch: Batch) -> None:
        batch = batch.to(model.device)
        keep(padded_logits(model, embedder(batch.input_ids), batch.lengths, readout, Prefix((), ())), batch.rows)

    for_each_batch(
        token_batches(ordered, max_tokens=max_tokens, pad_id=model.pad_id), step, progress=progress, unit="input"
    )


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of what two sequences both begin with."""
    size = min(len(first), len(second))
    if first[:size] == second[:size]:
        return size
    low, high = 0, size  # the first `low` agree, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low
