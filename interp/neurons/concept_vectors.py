"""Concept vectors: a direction of the residual stream that stands for a concept, for Targeted Angular Reversal (TARS).

Source: H. J. Davies, G. Iacovides, D. P. Mandic, "Targeted Angular Reversal of Weights (TARS) for Knowledge Removal in Large
Language Models" (arXiv 2412.10257).

From the paper's abstract: a detailed prompt gives an approximate concept vector in the space of internal representations;
perturbing it with noise and reading it through the LM head refines it until it triggers the concept's token with high
probability. All that makes this exact is our own definition:

1. x = Σ x_j / rms(x_j) over prompts, x_j the last layer's output at a prompt's last token; minus the same mean over prompts about
   neutral words, since representations share a large part that belongs to no concept; scaled to rms(x) = 1.
2. Refine: draw candidates x + σ ε, ε normal, each scaled to rms 1; x becomes the mean, scaled again, of the quarter with the
   highest p(token) = softmax(lm_head(final_norm(·))); repeat until p(x) ≥ target.

`interp.neurons.editing` turns weights away from such a vector; `interp.neurons.edit_effects` measures what that does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.batching import Batch
from interp.capture import run_probes
from interp.errors import InputError
from interp.model import Model
from interp.neurons.concepts import Concept, concept_of

TEMPLATES = (
    "Repeat the same word.{concept},{concept},{concept},{concept},",
    "I will tell you all about{concept}. The most important thing about{concept} is that{concept}",
    "A long text about{concept}, all kinds of{concept}, and more{concept}. In one word, this text is about",
)
NEUTRAL = (" thing", " place", " person", " time", " idea", " table", " number", " city")


@dataclass(frozen=True, eq=False)
class ConceptVector:
    """A direction of the residual stream that stands for a concept.

    Attributes:
        concept: the word.
        token_id: the token that it triggers.
        values: (d_model,) float32 on the CPU, rms 1.
        probability: of the token when `values` go through final norm and LM head.
        approximate: the same before the refinement.
        steps: steps of the refinement.
    """

    concept: str
    token_id: int
    values: Float[Tensor, " d_model"]
    probability: float
    approximate: float
    steps: int


@torch.no_grad()
def concept_vector(
    model: Model,
    concept: str | Concept,
    prompts: Sequence[str] | None = None,
    *,
    baseline: Sequence[str] | None = None,
    target: float = 0.9,
    noise: float = 0.1,
    n_noise: int = 64,
    max_steps: int = 200,
    seed: int = 0,
) -> ConceptVector:
    """A refined concept vector: steps 1 and 2 of the module's docstring.

    Args:
        model: what `load_model` gave, a decoder.
        concept: a single token such as " water"; of a `Concept` the first token.
        prompts: texts after whose last token the model thinks of the concept; by default `TEMPLATES` with it filled in.
        baseline: texts whose mean is subtracted; by default `TEMPLATES` with `NEUTRAL` words; `[]` to subtract nothing.
        target: probability of the token at which the refinement ends.
        noise: σ, in units of the vector's rms.
        n_noise: candidates per step.
        max_steps: the refinement ends here at the latest, with the best vector so far.
        seed: of the noise.

    Returns:
        The vector. Its `probability` is below `target` where that was out of reach.

    Raises:
        InputError: the concept is several tokens, the model is an encoder, or the token is not the most probable one after
            the last step, so that the vector does not stand for the concept.

    Example:
        >>> concept_vector(load_model(), " water").probability > 0.9                  # doctest: +SKIP
        True
    """
    check_decoder(model)
    if not (0 < target < 1 and noise > 0 and n_noise >= 4 and max_steps >= 0):
        raise InputError(
            f"target={target}, noise={noise}, n_noise={n_noise}, max_steps={max_steps}; expected 0 < target < 1, noise > 0, "
            f"n_noise ≥ 4, max_steps ≥ 0"
        )
    wanted = concept_of(model, concept, variants=False)
    token = wanted.token_ids[0]
    texts = [part.format(concept=wanted.name) for part in TEMPLATES] if prompts is None else list(prompts)
    neutral = (
        [part.format(concept=word) for part in TEMPLATES for word in NEUTRAL] if baseline is None else list(baseline)
    )
    x = _representation(model, texts)
    x = _unit_rms(x - _representation(model, neutral) if neutral else x)
    generator = torch.Generator().manual_seed(seed)
    approximate = highest = _log_p(model, x[None], token)[0]
    best, steps = x, 0
    while highest < math.log(target) and steps < max_steps:
        steps += 1
        candidates = _unit_rms(x + noise * torch.randn(n_noise, len(x), generator=generator))
        chosen = torch.tensor(_log_p(model, candidates, token)).topk(n_noise // 4).indices
        x = _unit_rms(candidates[chosen].mean(0))
        log_p = _log_p(model, x[None], token)[0]
        if log_p > highest:
            best, highest = x, log_p
    top = int(_head_logits(model, best[None]).argmax())
    if top != token:
        raise InputError(
            f"the vector of {wanted.name!r} decodes to {model.decode([top])!r} after {steps} steps (the concept's probability "
            f"is {math.exp(highest):.3g}); give prompts that end right before the concept, or allow more steps"
        )
    return ConceptVector(wanted.name, token, best, math.exp(highest), math.exp(approximate), steps)


def check_decoder(model: Model) -> None:
    """Refuse an encoder, which predicts no next token.

    Raises:
        InputError: the model is an encoder.
    """
    if not model.arch.family.decoder:
        raise InputError(f"{model.name} is an encoder ({model.arch.family.name}): it predicts no next token")


@torch.no_grad()
def _representation(model: Model, texts: Sequence[str]) -> Float[Tensor, " d_model"]:
    """Mean over texts of the last layer's output at the last token, each scaled to rms 1."""
    probe = _LastToken(model.arch.n_layers - 1)
    run_probes(model, texts, [probe])
    return torch.stack([_unit_rms(probe.found[at]) for at in range(len(texts))]).mean(0)


class _LastToken:
    """A probe that keeps the residual stream at each text's last token."""

    def __init__(self, layer: int) -> None:
        self.sites = [("resid_post", layer)]
        self.found: dict[int, Tensor] = {}

    def update(self, site: str, layer: int, tensor: Tensor, batch: Batch) -> Tensor:
        return tensor[torch.arange(batch.size, device=tensor.device), batch.last].float().cpu()

    def merge(self, site: str, layer: int, partial: Tensor, batch: Batch) -> None:
        self.found.update(zip(batch.rows, partial, strict=True))


def _unit_rms(x: Tensor) -> Tensor:
    return x / x.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)


def _head_logits(model: Model, x: Tensor) -> Tensor:
    return model.head_logits(x.to(model.device, model.dtype)).float()


def _log_p(model: Model, x: Tensor, token: int) -> list[float]:
    return _head_logits(model, x).log_softmax(-1)[:, token].tolist()
