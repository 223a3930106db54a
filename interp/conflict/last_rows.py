"""Where a prompt's last token looks: its attention row in every head, without any (query, key) matrix.

1. Prompts pass through the model once, right-padded, in batches of a token budget; the LM head does not run.
2. In every layer the fused attention hands over queries, keys and each query's log-sum-exp (`interp.recorded_attention`).
   The row of the last token is exp(q · k · scaling − lse), soft-capped where the model caps, zero behind it and outside a
   sliding window.
3. The row is summed over each span of the prompt (`dialogues.SPANS`) on the device at once; its first few keys are kept
   where the published, truncated comparison wants them.

A row sums to 1, and the spans' masses with it; with attention-sink logits (gpt-oss) to less: the rest went to no token.
All numbers are float32 whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.batching import Batch, check_memory, for_each_batch, token_batches
from interp.capture import estimate_bytes, forward
from interp.conflict.dialogues import SPANS, Encoded
from interp.errors import InputError, ModelError
from interp.model import Model
from interp.recorded_attention import Seen, recording


@dataclass(frozen=True)
class LastRows:
    """What the last tokens of some prompts attend to.

    Attributes:
        masses: (prompt, layer, head, span) attention on each of `SPANS`.
        rows: (prompt, layer, head, key) attention on the first keys; no keys where none were asked for.
    """

    masses: np.ndarray
    rows: np.ndarray


def last_row(seen: Seen, last: Int[Tensor, " batch"]) -> Float[Tensor, "batch head key"]:
    """One layer's attention from the position `last` of each text, exact and in float32.

    Args:
        seen: from the fused engine.
        last: the position in each right-padded text.
    """
    assert seen.lse is not None
    batch, heads = seen.query.shape[:2]
    groups = seen.key.shape[1]
    at = torch.arange(batch, device=last.device)
    query = (
        seen.query[at, :, last].float().unflatten(1, (groups, heads // groups))
    )  # (batch, kv_head, head in group, d_head)
    # Keys are shared by the heads of a group, and not repeated for each.
    scores = (query @ seen.key.float().transpose(-1, -2)).flatten(1, 2) * seen.scaling  # (batch, head, key)
    if seen.softcap is not None:
        scores = (scores / seen.softcap).tanh() * seen.softcap
    row = (scores - seen.lse[at, :, last].float()[..., None]).exp()
    distance = last[:, None] - torch.arange(seen.key.shape[2], device=last.device)[None]  # (batch, key)
    seen_keys = distance >= 0
    if seen.window is not None:
        seen_keys &= distance < seen.window
    return row.masked_fill(~seen_keys[:, None], 0.0)


@torch.no_grad()
def last_rows(
    model: Model,
    prompts: Sequence[Encoded],
    *,
    n_keys: int = 0,
    max_tokens: int = 4096,
    progress: bool | str = False,
) -> LastRows:
    """Attention of each prompt's last token, as span masses and, if asked for, on the first keys.

    Args:
        model: a causal LM.
        prompts: what `encode_dialogue` gave.
        n_keys: how many of the first keys to keep, at most the shortest prompt's length.
        max_tokens: budget of padded tokens in a batch.
        progress: a progress bar on stderr; a string is its description.

    Raises:
        InputError: no prompt, more keys than the shortest prompt has, an encoder.
        ModelError: attention that is not softmax attention (the layers are named).
        MemoryBudgetError: one prompt alone does not fit.

    Example:
        >>> model = load_model()                                                           # doctest: +SKIP
        >>> last_rows(model, [encode_dialogue(model, turns)]).masses.shape                 # doctest: +SKIP
        (1, 30, 9, 5)
    """
    if not prompts:
        raise InputError("no prompts were given; expected at least one")
    lengths = [len(prompt.ids) for prompt in prompts]
    if not 0 <= n_keys <= min(lengths):
        raise InputError(f"n_keys={n_keys}; expected 0 to {min(lengths)}, the length of the shortest prompt")
    longest = max(lengths)
    check_memory(estimate_bytes(model, (), 1, longest), model.device, f"one prompt of {longest} tokens")
    shape = (len(prompts), model.arch.n_layers, model.arch.n_heads)
    masses = np.full((*shape, len(SPANS)), np.nan, np.float32)
    rows = np.full((*shape, n_keys), np.nan, np.float32)
    spans = [_span_of(prompt) for prompt in prompts]

    def step(batch: Batch) -> None:
        recorder = _Recorder(model, batch, torch.from_numpy(_padded(spans, batch)), n_keys)
        with recording(model, "fused", recorder.record):
            forward(model, batch.to(model.device), logits=False)
        recorder.check()
        # Only now, so that a batch that fails half-way leaves nothing.
        at = list(batch.rows)
        for layer, (some, first) in recorder.kept.items():
            masses[at, layer] = some.cpu().numpy()
            rows[at, layer] = first.cpu().numpy()
            if not np.isfinite(masses[at, layer]).all():
                raise ModelError(
                    f"{model.name}: attention in layer {layer} is not finite in {model.dtype}; load the model in bfloat16 or "
                    f"float32"
                )

    batches = token_batches([prompt.ids for prompt in prompts], max_tokens=max_tokens, pad_id=model.pad_id)
    for_each_batch(batches, step, progress=progress, unit="prompt")
    return LastRows(masses, rows)


def _span_of(prompt: Encoded) -> np.ndarray:
    """(position,) index of each position's span."""
    found = np.full(len(prompt.ids), -1, np.int64)
    for index, span in enumerate(SPANS):
        found[list(prompt.spans[span])] = index
    if (found < 0).any():
        raise InputError(
            f"position {int(np.argmin(found))} of a prompt belongs to no span; the spans cover every position"
        )
    return found


def _padded(spans: Sequence[np.ndarray], batch: Batch) -> np.ndarray:
    """(batch, position, span) 1 where a position belongs to the span; padding belongs to none."""
    member = np.zeros((*batch.input_ids.shape, len(SPANS)), np.float32)
    for row, text in enumerate(batch.rows):
        member[row, np.arange(len(spans[text])), spans[text]] = 1
    return member


@dataclass
class _Recorder:
    """Reduces one batch's attention, layer by layer."""

    model: Model
    batch: Batch
    member: Tensor
    n_keys: int
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _moved: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _layer_of: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        arch = self.model.arch
        self._layer_of = {id(arch.attention(layer)): layer for layer in range(arch.n_layers)}

    def record(self, seen: Seen) -> None:
        layer = self._layer_of.get(id(seen.module))
        if layer is None:
            return
        device = seen.query.device  # layers may be spread over several
        if device not in self._moved:
            self._moved[device] = (self.batch.last.to(device), self.member.to(device))
        last, member = self._moved[device]
        row = last_row(seen, last)
        self.kept[layer] = (row @ member, row[..., : self.n_keys].clone())

    def check(self) -> None:
        lost = [layer for layer in range(self.model.arch.n_layers) if layer not in self.kept]
        if lost:
            raise ModelError(
                f"{self.model.name}: layers {', '.join(map(str, lost[:8]))} did not call softmax attention; "
                f"where the last token looks is measured where all layers do"
            )
