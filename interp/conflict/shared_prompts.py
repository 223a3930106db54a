"""Per-token log-probabilities of two answers to one prompt, the prompt read once.

1. Prompts are padded on the left, answers on the right, so that every answer of a batch begins in the same column.
2. The prompts pass once and leave their keys and values in a cache; its rows are handed to both answers. Gradients flow through.
3. The prompt's last position predicts an answer's first token, and each answer token the next. The LM head runs there alone.

Of a chosen and a rejected answer of a tokens each to a prompt of p, that is p + 2 a tokens instead of 2 (p + a), and the same
numbers up to rounding (below 1e-5 in float32 on the families tested).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.batching import pad


@dataclass(frozen=True)
class AnswerPairs:
    """Prompts with two answers each; rows of the answers are [all first; all second].

    Attributes:
        prompt_ids, prompt_mask: (pair, prompt position), padded on the left.
        answer_ids, answer_mask: (2 · pair, answer position), padded on the right.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    answer_ids: Tensor
    answer_mask: Tensor

    def to(self, device: torch.device | str) -> AnswerPairs:
        """The same on another device."""
        return AnswerPairs(*(tensor.to(device) for tensor in vars(self).values()))


def pad_pairs(
    prompts: Sequence[Sequence[int]], first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], pad_id: int
) -> AnswerPairs:
    """One batch from token ids of any lengths, none empty.

    Example:
        >>> pairs = pad_pairs([[1, 2]], [[3]], [[4, 5]], pad_id=0)
        >>> pairs.answer_ids.tolist(), pairs.answer_mask.tolist()
        ([[3, 0], [4, 5]], [[True, False], [True, True]])
    """
    asked = pad(prompts, range(len(prompts)), pad_id, side="left")
    answers = pad([*first, *second], range(2 * len(prompts)), pad_id)
    return AnswerPairs(asked.input_ids, asked.mask, answers.input_ids, answers.mask)


def answer_log_probs(hf: Any, pairs: AnswerPairs) -> Tensor:
    """Log-probability of every answer token, (2 · pair, answer position) in float32; 0 in padding.

    Args:
        hf: a causal LM of transformers, or a peft model around one.
        pairs: on the model's device.
    """
    positions = (pairs.prompt_mask.long().cumsum(1) - 1).clamp(min=0)
    prompt = hf(
        input_ids=pairs.prompt_ids,
        attention_mask=pairs.prompt_mask.long(),
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
    )
    both = torch.arange(len(pairs.prompt_ids), device=pairs.prompt_ids.device).repeat(2)
    logits = prompt.logits[:, -1:][both.to(prompt.logits.device)]
    length = pairs.answer_ids.shape[1]
    if length > 1:
        cache = prompt.past_key_values
        for layer in cache.layers:
            rows = both.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        mask = torch.cat([pairs.prompt_mask[both], pairs.answer_mask[:, :-1]], 1)
        later = hf(
            input_ids=pairs.answer_ids[:, :-1],
            attention_mask=mask.long(),
            position_ids=positions[both, -1:] + torch.arange(1, length, device=positions.device),
            past_key_values=cache,
            use_cache=True,
        )
        logits = torch.cat([logits, later.logits], 1)  # (row, answer position, vocab)
    answer_mask, answer_ids = pairs.answer_mask.to(logits.device), pairs.answer_ids.to(logits.device)
    found = logits[answer_mask].float().log_softmax(-1).gather(1, answer_ids[answer_mask][:, None])[:, 0]
    return found.new_zeros(answer_mask.shape).masked_scatter(answer_mask, found)
