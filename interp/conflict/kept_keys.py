"""Keys and values of prompts' beginnings, computed once and handed out to the rows of any batch.

1. Different beginnings pass through the model once; keys and values of every layer are kept, padded on the left.
2. `KeptKeys.cache` is a key-value cache for rows that go on behind some of them. It puts the kept keys before those of the row,
   one layer at a time, and keeps nothing itself: however many rows share a beginning, there is one copy of it and one layer's
   worth of rows. Layers that do not run need none.

With a plain cache sliding-window layers keep all keys, not the last window alone; the model's masks hide what is too far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp.batching import Batch, available_memory, check_memory, for_each_batch, token_batches
from interp.model import Model

# Share of the device's free memory that kept keys and values may take; more of them go to the CPU.
_KEPT = 0.25


@dataclass
class KeptKeys:
    """What `keep_keys` computed.

    Attributes:
        keys, values: by layer, each (beginning, kv_head, position, d_head), padded on the left; empty where nothing is kept.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def cache(self, beginnings: Int[Tensor, " row"], length: int, first_layer: int = 0) -> Any:
        """A cache for one forward pass of rows behind beginnings.

        Args:
            beginnings: (row) which beginning each row follows.
            length: positions of it, counted from its end; at least those of the longest beginning among them.
            first_layer: layers below do not run.
        """
        from transformers.cache_utils import Cache

        layers = []
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            kept = () if layer < first_layer else (keys[..., -length:, :], values[..., -length:, :])
            layers.append(_kept_layer()(length, kept, beginnings))
        return Cache(layers=layers)


def keeps_keys(model: Model) -> bool:
    """Whether kept keys and values are exact: every layer's attention is causal, and full or a sliding window."""
    config = model.arch.config
    both_ways = getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", False)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return not both_ways and kinds <= {"full_attention", "sliding_attention"}


@torch.no_grad()
def keep_keys(model: Model, beginnings: Sequence[tuple[int, ...]], max_tokens: int) -> KeptKeys:
    """Keys and values of beginnings; equal ones pass once, empty ones are padding alone.

    Args:
        model: one that `keeps_keys`.
        beginnings: token ids.
        max_tokens: budget of padded tokens in a batch.

    Raises:
        MemoryBudgetError: one beginning alone does not fit, or all that is kept does not.
    """
    from transformers import DynamicCache

    users: dict[tuple[int, ...], list[int]] = {}
    for at, ids in enumerate(beginnings):
        if ids:
            users.setdefault(ids, []).append(at)
    kept = KeptKeys()
    if not users:
        return kept
    different, width = list(users), max(map(len, beginnings))
    arch = model.arch
    needed = 2 * arch.n_layers * len(beginnings) * width * arch.n_kv_heads * arch.d_head * model.dtype.itemsize
    on_cpu = needed > _KEPT * available_memory(model.device)
    if on_cpu:
        check_memory(needed, "cpu", f"keys and values of {len(beginnings)} prompts")

    def step(batch: Batch) -> None:
        batch = batch.to(model.device)
        made = DynamicCache()
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.mask.long()}
        model.hf.base_model(**inputs, past_key_values=made, use_cache=True)
        for store, name in ((kept.keys, "keys"), (kept.values, "values")):
            for layer, one in enumerate(made.layers):
                found = getattr(one, name)  # (row, kv_head, position, d_head)
                if len(store) == layer:
                    shape = (len(beginnings), found.shape[1], width, found.shape[3])
                    store.append(torch.zeros(shape, dtype=found.dtype, device="cpu" if on_cpu else found.device))
                for row, beginning in enumerate(batch.rows):
                    n = len(different[beginning])
                    store[layer][users[different[beginning]], :, width - n :] = found[row, :, :n].to(store[layer])

    for_each_batch(token_batches(different, max_tokens=max_tokens, pad_id=model.pad_id), step)
    return kept


@cache
def _kept_layer() -> Any:
    """The class of a cache's layer that hands out kept keys, and keeps nothing of what it is given."""
    from transformers.cache_utils import DynamicLayer

    class KeptLayer(DynamicLayer):
        def __init__(self, length: int, kept: tuple[Tensor, ...], beginnings: Tensor) -> None:
            super().__init__()
            self.length, self.kept, self.beginnings = length, kept, beginnings
            self.is_initialized = True

        def get_seq_length(self) -> int:
            return self.length

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            keys, values = (
                torch.cat([kept[self.beginnings.to(kept.device)].to(new), new], dim=-2)
                for kept, new in zip(self.kept, (key_states, value_states), strict=True)
            )
            return keys, values

    return KeptLayer
