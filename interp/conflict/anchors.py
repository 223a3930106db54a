"""Anchors: ordinary text on which a model that is trained is to predict what it predicted before.

The loss of preferences says nothing of other text, and a few thousand credited tokens move that as well. Beside it stands the
divergence from the base at the tokens of anchors:

    KL(base ‖ policy), mean over the positions of a text

Sources: learning without forgetting (Li and Hoiem, arXiv 1606.09282) keeps a network's outputs on what it is not trained on;
InstructGPT (Ouyang et al., arXiv 2203.02155, section 3.5, PPO-ptx) mixes in the loss of pretraining text. With the base's
predictions as targets no new text is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from interp.errors import InputError
from interp.model import Model

T = TypeVar("T")
# What the embedded model was trained best with, on validation tasks.
ANCHOR_TOKENS, ANCHOR_WEIGHT = 48, 2.0
HELD_SHARE = 0.2  # of the anchors at most, for validation


def encode_anchors(model: Model, texts: Sequence[str], n_tokens: int = ANCHOR_TOKENS) -> list[tuple[int, ...]]:
    """The first tokens of each text, as the model reads plain text.

    Args:
        model: its tokenizer is used.
        texts: ordinary text; what the model is measured on afterwards should not be among it.
        n_tokens: where texts are cut.

    Raises:
        InputError: a text that is no string or has fewer than two tokens; no tokenizer.
    """
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong or isinstance(texts, str):
        raise InputError(f"anchors: expected a sequence of texts, not {type(wrong[0] if wrong else texts).__name__}")
    encoded = model.encode(list(texts)) if texts else []
    for text, ids in zip(texts, encoded, strict=True):
        if len(ids) < 2:
            raise InputError(f"anchors: {text!r:.60} has {len(ids)} tokens; expected at least two")
    return [tuple(ids[:n_tokens]) for ids in encoded]


def split_anchors(anchors: Sequence[T], n_held: int) -> tuple[Sequence[T], Sequence[T]]:
    """(for training, for validation): as many of the last as there are validation pairs, at most a fifth; of fewer than five all.

    Example:
        >>> split_anchors(list("abcdefghij"), 3)
        (['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'], ['i', 'j'])
    """
    n = min(n_held, int(HELD_SHARE * len(anchors)))
    return (anchors[:-n], anchors[-n:]) if n else (anchors, anchors)


def anchor_divergence(policy: Any, input_ids: Tensor, mask: Tensor) -> Tensor:
    """(row,) KL(base ‖ policy) of the next token, mean over a row's positions, nats; the gradient enters the policy alone.

    Args:
        policy: a peft model; its base is what it is with the adapter switched off.
        input_ids: (row, position), padded on the right.
        mask: (row, position), True at tokens.
    """
    with torch.no_grad(), policy.disable_adapter():
        base = _log_probs(policy, input_ids, mask)
    ours = _log_probs(policy, input_ids, mask)
    there = mask.to(ours.device)
    divergence = (base.exp() * (base - ours)).sum(-1)
    return torch.where(there, divergence, 0.0).sum(1) / there.sum(1)


def _log_probs(policy: Any, input_ids: Tensor, mask: Tensor) -> Tensor:
    return policy(input_ids=input_ids, attention_mask=mask.long(), use_cache=False).logits.float().log_softmax(-1)
