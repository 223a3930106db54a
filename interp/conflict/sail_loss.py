"""The loss of SAIL (Surgical Alignment of Instruction Layers): DPO whose tokens are credited one by one.

Source: Wan et al., arXiv 2509.23188. "reward" is the loss of its released code (LeixinSun/DLA), "attention" what its abstract
says, of which the released loss has nothing. With w the chosen and l the rejected response, and ℓ a token's log-probability:

1. d_t = ℓ_θ(y_t) − ℓ_ref(y_t)
2. factors c_t, one per response token, constants of the training:

       credit "reward"       r_t = β (ℓ_rm(y_t) − ℓ_ref(y_t));   chosen 1 + α r_t,   rejected 1 − α r_t
       credit "attention"    g_t = attention from t − 1 to the system rule;   1 + α (g_t / mean g − 1) in both
       credit "none"         1: plain DPO (Rafailov et al., arXiv 2305.18290)

3. L = −log σ( β Σ c_t^w d_t^w − β Σ c_t^l d_t^l ), mean over pairs.

α = 0 is plain DPO, and a constant factor is DPO with another β. A reward beyond 1 / α turns a factor negative: the released loss
allows it, and so do we.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from interp.errors import InputError

CREDITS = ("reward", "attention", "none")


@dataclass(frozen=True)
class PairLosses:
    """Of each pair, one number.

    Attributes:
        loss: (pair,) with the gradient.
        chosen, rejected: (pair,) β Σ c_t d_t of the response, without gradient; the margin is their difference.
    """

    loss: Tensor
    chosen: Tensor
    rejected: Tensor


def sail_loss(log_probs: Tensor, reference: Tensor, factors: Tensor, mask: Tensor, beta: float = 0.1) -> PairLosses:
    """The loss of each pair; what stands in padding is never read, and the gradient enters `log_probs` alone.

    Args:
        log_probs: (2 · pair, position) of the policy; rows are [all chosen; all rejected].
        reference: the same of the reference model, nats.
        factors: the same, c_t.
        mask: the same, True at response tokens.
        beta: β, per nat.

    Raises:
        InputError: the shapes differ, or the number of rows is odd.

    Example:
        >>> one = torch.ones(2, 1)
        >>> sail_loss(-one, -2 * one, one, one.bool(), beta=0.5).loss          # chosen and rejected rose alike: log 2
        tensor([0.6931])
    """
    shapes = {tuple(tensor.shape) for tensor in (log_probs, reference, factors, mask)}
    if len(shapes) > 1 or log_probs.dim() != 2 or len(log_probs) % 2:
        raise InputError(
            f"log-probabilities, reference, factors and mask of shapes {sorted(shapes)}; expected one shape (2 · pairs, position)"
        )
    # Both are cleared: a NaN in padding would come back through the product's gradient.
    ratios = torch.where(mask, log_probs.float() - reference.detach(), 0.0)
    credited = torch.where(mask, factors.detach(), 0.0) * ratios
    chosen, rejected = (beta * credited.sum(1)).chunk(2)
    return PairLosses(-logsigmoid(chosen - rejected), chosen.detach(), rejected.detach())


def chosen_nll(log_probs: Tensor, mask: Tensor) -> Tensor:
    """(pair,) mean negative log-probability of a token of the chosen response, nats: the term that `likelihood` weighs.

    A margin can also grow while both responses become less likely; this term asks for the chosen one itself (Pang et al.,
    "Iterative Reasoning Preference Optimization", arXiv 2404.19733, section 2).

    Args:
        log_probs, mask: as in `sail_loss`.

    Example:
        >>> chosen_nll(torch.tensor([[-1.0, -3.0], [-9.0, -9.0]]), torch.ones(2, 2).bool())
        tensor([2.])
    """
    log_probs, mask = log_probs.float().chunk(2)[0], mask.chunk(2)[0]
    return -torch.where(mask, log_probs, 0.0).sum(1) / mask.sum(1)


def reward_factors(rewards: np.ndarray, alpha: float, chosen: bool) -> np.ndarray:
    """c_t of credit "reward".

    Args:
        rewards: (token,) r_t.
        alpha: α.
        chosen: whether the response is the chosen one.
    """
    return 1 + (alpha if chosen else -alpha) * np.asarray(rewards)


def attention_factors(attention: np.ndarray, alpha: float) -> np.ndarray:
    """c_t of credit "attention"; their mean is 1. Where no token looks at the rule at all, all are 1.

    Args:
        attention: (token,) g_t, at least 0.
        alpha: α, from 0 to 1 where no factor is to be negative.

    Example:
        >>> attention_factors(np.array([0.1, 0.3]), alpha=0.5)
        array([0.75, 1.25])
    """
    attention = np.asarray(attention, dtype=np.float64)
    mean = attention.mean()
    return np.ones_like(attention) if mean == 0 else 1 + alpha * (attention / mean - 1)


def check_credit(credit: str, alpha: float, beta: float) -> None:
    """Refuses settings that the loss has no meaning for.

    Raises:
        InputError: an unknown credit, a negative α, or a β that is not above 0.
    """
    if credit not in CREDITS:
        raise InputError(f"credit={credit!r}; expected one of {', '.join(CREDITS)}")
    if not 0 <= alpha < float("inf"):
        raise InputError(f"alpha={alpha}; expected 0 (plain DPO) or more, such as 0.5")
    if not 0 < beta < float("inf"):
        raise InputError(f"beta={beta}; expected a number above 0, such as 0.1")
