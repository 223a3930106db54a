"""Next-token losses of texts, in float32, without the (text, position, vocabulary) tensor.

A forward pass ends before the LM head; `mean_losses` applies the head to a few hundred tokens at a time, with the soft cap
of Gemma 2 and 3, and keeps −log p(next token) alone.

A text of T tokens has T − 1 predictions; its loss is their mean, in nats. Padding and the last token predict nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.batching import Batch, available_memory, check_memory
from interp.capture import estimate_bytes
from interp.errors import InputError
from interp.model import Model

# Logits that live at a time: they should stay small on a CPU, and fill a GPU.
_LOGITS = {"cpu": 2**23, "cuda": 2**27}


def check_predicts(model: Model) -> None:
    """Refuses a model without next-token predictions.

    Raises:
        InputError: an encoder.
        ModelError: it was loaded without its LM head.
    """
    if not model.arch.family.decoder:
        raise InputError(f"{model.name} is an encoder ({model.arch.family.name}): it predicts no next token")
    model.arch.lm_head()  # says so where there is none


def fitting_tokens(model: Model, longest: int, max_tokens: int, sites: Sequence[str] = ()) -> int:
    """The largest budget of padded tokens up to `max_tokens` whose forward pass fits into memory.

    Raises:
        MemoryBudgetError: one text of `longest` tokens alone does not fit.
    """
    logits = 3 * 4 * _LOGITS.get(model.device.type, _LOGITS["cuda"])

    def needed(n_texts: int) -> int:
        return estimate_bytes(model, sites, n_texts, longest) + min(
            logits, 3 * 4 * n_texts * longest * model.arch.vocab_size
        )

    check_memory(needed(1), model.device, f"one text of {longest} tokens")
    while max_tokens > longest and needed(max(1, max_tokens // longest)) > 0.8 * available_memory(model.device):
        max_tokens //= 2
    return max_tokens


@torch.no_grad()
def mean_losses(
    model: Model, hidden: Float[Tensor, "row position d_model"], batch: Batch, *, start: int = 0
) -> np.ndarray:
    """Mean next-token loss of each row.

    Args:
        model: a causal LM.
        hidden: final hidden states, after the final norm.
        batch: its token ids and mask, padded on the right.
        start: predictions made at earlier positions do not count.

    Returns:
        (row,) float64, in nats; NaN where nothing is predicted from `start` on.
    """
    wanted = batch.mask[:, 1:].clone()
    wanted[:, :start] = False
    targets = batch.input_ids[:, 1:][wanted]
    vectors = hidden[:, :-1][wanted.to(hidden.device)]  # (prediction, d_model)
    head, cap = model.arch.lm_head(), getattr(model.arch.config, "final_logit_softcapping", None)
    step = max(16, _LOGITS.get(hidden.device.type, _LOGITS["cuda"]) // model.arch.vocab_size)
    parts = []
    for at in range(0, len(targets), step):
        logits = head(vectors[at : at + step])
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        goal = targets[at : at + step].to(logits.device)
        parts.append(torch.nn.functional.cross_entropy(logits.float(), goal, reduction="none").cpu())
    counts = wanted.sum(1).cpu().numpy()
    losses = torch.cat(parts).double().numpy() if parts else np.zeros(0)
    sums = np.bincount(np.repeat(np.arange(len(counts)), counts), weights=losses, minlength=len(counts))
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)
