"""Attention flows of a prompt's concepts to its last position, from the prompt's embeddings, with their gradient.

    embeddings ──► eager attention of every layer ──► mean over heads, ½ A + ½ I ──► flow to each concept

1. *Flow of a concept*: from the last position at the top to the group of the concept's tokens at the bottom, by a
   method of `interp.flow.influences`.
2. Prompts are padded on the right to one length: no real token sees the padding, and each prompt's graph is cut out of
   the batch's patterns, so that a batch gives what one prompt at a time gives.
3. Flows are float32 whatever the model's dtype (float64 where the model is).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.batching import Batch, for_each_batch, token_batches
from interp.errors import ModelError
from interp.flow.graph import check_rows, with_residual
from interp.flow.influences import METHODS
from interp.flow.positions import Group
from interp.model import Model


@torch.no_grad()
def exact_flows(
    model: Model,
    encoded: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Group]],
    deltas: Sequence[Tensor] | None = None,
    *,
    residual: str = "half",
    max_tokens: int = 1024,
) -> list[np.ndarray]:
    """Maximum flow of each concept to the last position, by prompt.

    Args:
        model: a decoder.
        encoded: token ids of each prompt.
        groups: of each prompt, the positions of each concept.
        deltas: (position, d_model) of each prompt; none for the prompts as they are.
        residual: of the graph, see `interp.flow.graph`.
        max_tokens: budget of padded tokens in a batch.

    Returns:
        Per prompt a (concept,) float64 array.

    Raises:
        InputError, ModelError: see `concept_flows`.
        MemoryBudgetError: one prompt alone does not fit.
    """
    found: dict[int, np.ndarray] = {}

    def step(batch: Batch) -> None:
        batch = batch.to(model.device)
        inputs = embedded(model, batch, None if deltas is None else [deltas[prompt] for prompt in batch.rows])
        chosen = [groups[prompt] for prompt in batch.rows]
        flows = concept_flows(model, inputs, batch, chosen, method="exact", residual=residual)
        found.update({prompt: one.double().cpu().numpy() for prompt, one in zip(batch.rows, flows, strict=True)})

    with model.attention_implementation("eager"):
        for_each_batch(token_batches(encoded, max_tokens=max_tokens, pad_id=model.pad_id), step)
    return [found[prompt] for prompt in range(len(encoded))]


def concept_flows(
    model: Model,
    inputs: Float[Tensor, "row position d_model"],
    batch: Batch,
    groups: Sequence[Sequence[Group]],
    *,
    method: str,
    residual: str = "half",
    temperature: float = 0.01,
    bias: str = "entropy",
) -> list[Tensor]:
    """Flow of each concept to the last position, from embeddings; it carries their gradient.

    Args:
        model: a decoder whose attention implementation is "eager" now.
        inputs: embeddings.
        batch: its mask, padded on the right.
        groups: of each row, the positions of each concept.
        method: of the flow, see `interp.flow.influences`.
        residual: of the graph, see `interp.flow.graph`.
        temperature, bias: of "soft", see `interp.flow.widest`.

    Returns:
        Per row a (concept,) tensor, float32 unless the model is float64.

    Raises:
        InputError: attention that is not finite or whose rows do not sum to 1.
        ModelError: the model gives no attention patterns.
    """
    output = model.hf.base_model(
        inputs_embeds=inputs, attention_mask=batch.mask.long(), use_cache=False, output_attentions=True
    )
    patterns = output.attentions
    if not patterns or any(pattern is None for pattern in patterns):
        raise ModelError(f"{model.name} gave no attention patterns: its flow cannot be computed")
    options: dict[str, Any] = {"temperature": temperature, "bias": bias} if method == "soft" else {}
    flows = []
    for row, length in enumerate(batch.lengths.tolist()):
        layers = []
        for pattern in patterns:
            heads = pattern[row, :, :length, :length].to(inputs.device)
            layers.append((heads if heads.dtype == torch.float64 else heads.float()).mean(0))
        attention = check_rows(torch.stack(layers), f"the attention of prompt {batch.rows[row]}")
        flows.append(METHODS[method](with_residual(attention, residual), [length - 1], groups[row], **options)[0])
    return flows


def embedded(
    model: Model, batch: Batch, deltas: Sequence[Tensor] | None = None
) -> Float[Tensor, "row position d_model"]:
    """Embeddings of a batch, each row's δ added at its real tokens (added in float32, then in the model's dtype)."""
    inputs = model.arch.embedding()(batch.input_ids).detach()
    if deltas is None:
        return inputs
    rows = []
    for row, delta in enumerate(deltas):
        changed = inputs[row][batch.mask[row]] + delta.to(inputs.device)
        whole = inputs[row].to(changed.dtype).masked_scatter(batch.mask[row][:, None], changed)
        rows.append(whole.to(inputs.dtype))
    return torch.stack(rows)
