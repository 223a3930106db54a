"""Token-budget batches that survive running out of memory.

1. Texts are sorted by length, longest first, and cut into batches of at most `max_tokens` padded tokens: little
   padding, and the batch that needs the most memory runs first.
2. `for_each_batch` runs a step on every batch. When a step runs out of memory the batch is halved and both halves are
   run; later batches are cut to the size that was learned. A single text that does not fit is an error with figures.
3. Results come back by `Batch.rows`, the texts' original indices, so that order and batch size do not matter.

Logits of a text in two differently padded batches differ by rounding alone: below 1e-4 in float32 on the models tested.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp.errors import InputError, MemoryBudgetError

# The caller's indices of the texts in the batch that runs now: interventions with one value per text look them up,
# so that sorting and halving batches does not hand a text another text's value.
current_rows: ContextVar[tuple[int, ...] | None] = ContextVar("current_rows", default=None)
# How many texts the caller gave in all: one value per text must be as many.
text_count: ContextVar[int | None] = ContextVar("text_count", default=None)


@dataclass(frozen=True)
class Batch:
    """Some texts, padded to one length.

    Attributes:
        input_ids: (batch, position) token ids.
        mask: (batch, position), True at real tokens.
        rows: the texts' indices in the list that the caller gave.
        side: "right" or "left": where the padding is.
    """

    input_ids: Int[Tensor, "batch position"]
    mask: Bool[Tensor, "batch position"]
    rows: tuple[int, ...]
    side: str = "right"

    @property
    def size(self) -> int:
        """Number of texts."""
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Number of padded tokens."""
        return self.input_ids.numel()

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Real tokens of each text."""
        return self.mask.sum(1)

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """Position of each text's last real token."""
        return self.lengths - 1 if self.side == "right" else torch.full_like(self.lengths, self.mask.shape[1] - 1)

    @property
    def position_ids(self) -> Int[Tensor, "batch position"]:
        """Positions counted from each text's first real token; padding gets position 0."""
        return (self.mask.long().cumsum(1) - 1) * self.mask

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.input_ids.to(device), self.mask.to(device), self.rows, self.side)

    def take(self, at: slice) -> Batch:
        """Some of the texts, with padding that none of them needs cut off."""
        mask = self.mask[at]
        width = int(mask.sum(1).max())
        keep = slice(0, width) if self.side == "right" else slice(mask.shape[1] - width, None)
        return Batch(self.input_ids[at, keep], mask[:, keep], self.rows[at], self.side)

    def halves(self) -> tuple[Batch, Batch]:
        """The batch cut in two."""
        middle = self.size // 2
        return self.take(slice(0, middle)), self.take(slice(middle, None))


def pad(sequences: Sequence[Sequence[int]], rows: Sequence[int], pad_id: int, side: str = "right") -> Batch:
    """One batch from token ids of any lengths.

    Args:
        sequences: token ids of each text.
        rows: the texts' indices.
        pad_id: the id written into padding (it is masked; any id in the vocabulary will do).
        side: "right" or "left".
    """
    width = max(len(ids) for ids in sequences)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, ids in enumerate(sequences):
        at = slice(0, len(ids)) if side == "right" else slice(width - len(ids), None)
        input_ids[row, at] = torch.tensor(list(ids), dtype=torch.long)
        mask[row, at] = True
    return Batch(input_ids, mask, tuple(rows), side)


def token_batches(
    sequences: Sequence[Sequence[int]], *, max_tokens: int = 4096, pad_id: int = 0, side: str = "right"
) -> list[Batch]:
    """Cut texts into batches of at most `max_tokens` padded tokens, longest first.

    Args:
        sequences: token ids of each text, none empty.
        max_tokens: budget of padded tokens in a batch. A text longer than that is a batch by itself.
        pad_id: the id written into padding.
        side: "right" or "left".

    Raises:
        InputError: no text, an empty text, a budget below 1, or an unknown side.

    Example:
        >>> [batch.rows for batch in token_batches([[1], [1, 2, 3], [1, 2]], max_tokens=4)]
        [(1,), (2, 0)]
    """
    if side not in ("left", "right"):
        raise InputError(f"padding side {side!r}; expected 'left' or 'right'")
    if max_tokens < 1:
        raise InputError(f"max_tokens={max_tokens}; expected at least 1 token")
    if not sequences:
        raise InputError("no texts were given; expected at least one")
    for row, ids in enumerate(sequences):
        if len(ids) == 0:
            raise InputError(f"text {row} has no tokens; remove it or give it at least one character")
    order = sorted(range(len(sequences)), key=lambda row: -len(sequences[row]))
    batches, start = [], 0
    while start < len(order):
        count = max(1, max_tokens // len(sequences[order[start]]))
        rows = order[start : start + count]
        batches.append(pad([sequences[row] for row in rows], rows, pad_id, side))
        start += count
    return batches


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def free_memory() -> None:
    """Give cached blocks back after running out of memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def for_each_batch(
    batches: Iterable[Batch],
    step: Callable[[Batch], Any],
    *,
    progress: bool | str = False,
    unit: str = "text",
) -> None:
    """Run `step` on every batch; halve a batch whose step runs out of memory and go on.

    Args:
        batches: what `token_batches` gave.
        step: called once per batch, on success. It must leave nothing behind when it raises: keep what it computes
            until it is whole (see `interp.capture`).
        progress: a progress bar on stderr; a string is its description.
        unit: what the bar counts.

    Raises:
        MemoryBudgetError: one text alone does not fit.
    """
    waiting = deque(batches)
    total = sum(batch.size for batch in waiting)
    limit: int | None = None
    bar = tqdm(
        total=total,
        desc=progress if isinstance(progress, str) else None,
        unit=unit,
        disable=not progress,
        leave=False,
    )
    with bar:
        while waiting:
            batch = waiting.popleft()
            if limit is not None and batch.size > 1 and batch.tokens > limit:
                waiting.extendleft(reversed(batch.halves()))
                continue
            failed = False
            token, count_token = current_rows.set(batch.rows), text_count.set(total)
            try:
                step(batch)
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, MemoryBudgetError) or not is_out_of_memory(error):
                    raise
                if batch.size == 1:
                    raise MemoryBudgetError(
                        f"out of memory on a single text of {batch.tokens} tokens; shorten it, use a smaller dtype, or "
                        f"a device with more memory"
                    ) from error
                failed = True
            finally:
                text_count.reset(count_token)
                current_rows.reset(token)
            # Outside the handler: the error's traceback would keep the failed step's tensors alive.
            if failed:
                free_memory()
                limit = max(1, batch.tokens // 2)
                waiting.extendleft(reversed(batch.halves()))
            else:
                bar.update(batch.size)


def available_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated on a device."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return psutil.virtual_memory().available


def check_memory(needed: int, device: torch.device | str, what: str) -> None:
    """Refuse a run that needs more memory than there is, before it starts.

    Args:
        needed: estimate in bytes.
        device: where.
        what: what needs it, for the message.

    Raises:
        MemoryBudgetError: with both figures.
    """
    available = available_memory(device)
    if needed > available:
        raise MemoryBudgetError(
            f"{what} needs about {needed / 2**30:.1f} GiB on {device}, where {available / 2**30:.1f} GiB are free; use "
            f"fewer or shorter texts per batch (max_tokens), a smaller dtype or fewer sites"
        )
