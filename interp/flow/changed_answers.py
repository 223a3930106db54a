"""Answers to prompts whose embeddings are changed, and how likely the model as it is finds them.

1. Greedy generation from embeddings, padded on the left, with a KV cache, in the model's own attention implementation:
   what `Model.generate_ids` does, for embeddings + δ. With no change both give the same tokens.
2. Fluency: mean negative log-likelihood of the answer's tokens, its end token included, after the prompt as it was,
   under the model as it is; exp of it is the answer's perplexity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interp.batching import Batch, available_memory, for_each_batch, token_batches
from interp.capture import forward
from interp.errors import InputError
from interp.flow.embedded_flows import embedded
from interp.model import NO_SAMPLING, PLAIN_GENERATION, Model


@torch.no_grad()
def answer(
    model: Model,
    encoded: Sequence[Sequence[int]],
    deltas: Sequence[Tensor] | None = None,
    *,
    max_new_tokens: int = 40,
    max_tokens: int = 4096,
    progress: bool | str = False,
) -> list[list[int]]:
    """Greedy answers to prompts with changed embeddings.

    Args:
        model: a causal LM.
        encoded: token ids of each prompt.
        deltas: (position, d_model) added to each prompt's embeddings; none for no change.
        max_new_tokens: longest answer, in tokens.
        max_tokens: budget of padded tokens (prompt and answer) in a batch.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        Token ids of each answer, end token included, padding not.

    Raises:
        InputError: prompt and answer exceed the context.
    """
    limit, longest = model.arch.n_positions, max(len(ids) for ids in encoded)
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}; expected at least 1")
    if limit is not None and longest + max_new_tokens > limit:
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new tokens exceed the context of {limit} tokens"
        )
    ends = model.end_ids()
    output: list[list[int]] = [[] for _ in encoded]

    def step(batch: Batch) -> None:
        batch = batch.to(model.device)
        inputs = embedded(model, batch, None if deltas is None else [deltas[prompt] for prompt in batch.rows])
        rows = model.hf.generate(
            inputs_embeds=inputs,
            attention_mask=batch.mask.long(),
            max_new_tokens=max_new_tokens,
            pad_token_id=model.pad_id,
            do_sample=False,
            **NO_SAMPLING,
            **PLAIN_GENERATION,
        ).tolist()
        for prompt, ids in zip(batch.rows, rows, strict=True):
            stop = next((at + 1 for at, token in enumerate(ids) if token in ends), len(ids))
            output[prompt] = ids[:stop]

    budget = max(1, max_tokens * longest // (longest + max_new_tokens))
    batches = token_batches(encoded, max_tokens=budget, pad_id=model.pad_id, side="left")
    for_each_batch(batches, step, progress=progress, unit="prompt")
    return output


@torch.no_grad()
def answer_losses(
    model: Model, encoded: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, max_tokens: int = 4096
) -> list[float]:
    """Mean negative log-likelihood of each answer after its prompt, in nats per token.

    Args:
        model: a causal LM.
        encoded: token ids of each prompt.
        answers: token ids of each answer, none empty.
        max_tokens: budget of padded tokens in a batch, cut further where the logits would not fit.

    Returns:
        One number per prompt.
    """
    found: dict[int, float] = {}
    whole = [[*ids, *more] for ids, more in zip(encoded, answers, strict=True)]

    def step(batch: Batch) -> None:
        batch = batch.to(model.device)
        logits: Any = forward(model, batch).logits
        for row, prompt in enumerate(batch.rows):
            start, end = len(encoded[prompt]), len(whole[prompt])
            scores = logits[row, start - 1 : end - 1].float().log_softmax(-1)
            goal = torch.tensor(whole[prompt][start:], device=scores.device)
            found[prompt] = -float(scores.gather(1, goal[:, None]).double().mean())

    # The logits and their float32 copy.
    fitting = int(0.5 * available_memory(model.device)) // (8 * model.arch.vocab_size)
    batches = token_batches(whole, max_tokens=max(1, min(max_tokens, fitting)), pad_id=model.pad_id)
    for_each_batch(batches, step)
    return [found[prompt] for prompt in range(len(whole))]
