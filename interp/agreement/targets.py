"""The number that is explained: log-probability, probability or logit difference of one class or continuation.

Logits are those of the classes (`Verbalizer`, `Classifier`) or of the vocabulary (`NextToken`, `Continuation`), at one
position or at every position of a continuation.

- "log_prob": Σ log softmax(logits)[wanted], in nats. Of label words: among the label words alone.
- "probability": exp of it.
- "logit_difference": Σ logits[wanted] − logits[runner-up], the runner-up being the strongest other class on the example as it is.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InputError

TARGETS = ("log_prob", "logit_difference", "probability")
OF = ("predicted", "gold")


def check_target(target: str, of: str) -> None:
    """Refuses unknown names.

    Raises:
        InputError: it says what is known.
    """
    if target not in TARGETS:
        raise InputError(f"target={target!r}; expected one of {', '.join(TARGETS)}")
    if of not in OF:
        raise InputError(f"of={of!r}; expected one of {', '.join(OF)}")


def target_values(
    logits: Float[Tensor, "batch read k"],
    wanted: Int[Tensor, "batch read"],
    contrast: Int[Tensor, "batch read"],
    target: str,
) -> Float[Tensor, " batch"]:
    """The target of every input; differentiable.

    Args:
        logits: float32.
        wanted: which class or token is explained, at each read.
        contrast: the runner-up.
        target: one of `TARGETS`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[0.0, 2.0]]])
        >>> target_values(logits, torch.tensor([[1]]), torch.tensor([[0]]), "logit_difference")
        tensor([2.])
    """
    if target == "logit_difference":
        chosen = logits.gather(-1, wanted[..., None]) - logits.gather(-1, contrast[..., None])
        return chosen[..., 0].sum(-1)
    log_prob = logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0].sum(-1)
    return log_prob if target == "log_prob" else log_prob.exp()


def runner_up(logits: Float[Tensor, "batch read k"], wanted: Int[Tensor, "batch read"]) -> Int[Tensor, "batch read"]:
    """The strongest class that is not wanted."""
    return logits.scatter(-1, wanted[..., None], float("-inf")).argmax(-1)
