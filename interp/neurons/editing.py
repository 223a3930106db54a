"""Remove a concept from the weights: Targeted Angular Reversal (TARS), with the controls that an effect needs.

Source: H. J. Davies, G. Iacovides, D. P. Mandic, "Targeted Angular Reversal of Weights (TARS) for Knowledge Removal in Large
Language Models" (arXiv 2412.10257). Reported for Llama 3.1 8B: the concept's trigger probability falls to 0.00 with as
few as one edit; the median next-token KL on Wikipedia is 0.002 after five concepts.

From the paper's abstract: a detailed prompt gives an approximate concept vector in the space of internal representations;
perturbing it with noise and reading it through the LM head refines it until it triggers the concept's token with high
probability; the feed-forward rows that read that space and have the highest cosine to it are replaced by its reverse.
All that makes this exact is our own definition:

1. x = Σ x_j / rms(x_j) over prompts, x_j the last layer's output at a prompt's last token; minus the same mean over prompts about
   neutral words, since representations share a large part that belongs to no concept; scaled to rms(x) = 1.
2. Refine: draw candidates x + σ ε, ε normal, each scaled to rms 1; x becomes the mean, scaled again, of the quarter with the
   highest p(token) = softmax(lm_head(final_norm(·))); repeat until p(x) ≥ target.
3. What the MLP of layer l would read if the residual stream pointed along x:  t = γ_l ⊙ x / |γ_l ⊙ x|, γ_l the gain of its
   pre-MLP norm (x centred first for LayerNorm; its bias is left out; t = x / |x| where no norm stands before the MLP).
   A row w scores cos(w, t): how strongly it answers to the concept, per unit of |w|.
4. The n rows with the highest cosine, of all layers and sites together, become −|w| t. One edit is one row of one matrix.
5. Controls: the same number of random rows of the same layers and sites, reversed in the same way; the same rows zeroed.

Measured by us on SmolLM2-135M-Instruct, six prompts a concept: one or five edits remove neither " water", " music" nor " dog".
The closest rows of the last layers belong partly to neurons that write against the concept (29, 1342 for " water"), so that
reversing them can make it likelier. So read the controls, and choose `layers` and `sites` for a model by measuring.

Edits are written in place, into fused (Phi-3) and transposed (GPT-2) matrices too, and taken back bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.batching import Batch, available_memory, for_each_batch, token_batches
from interp.capture import forward, run_probes
from interp.errors import InputError, ModelError
from interp.model import Model
from interp.neurons.concepts import Concept, concept_of
from interp.neurons.decoding import checked
from interp.provenance import Provenance
from interp.results import Column, Result

SITES = ("gate", "up")
ARMS = ("none", "reversed", "random", "zeroed")
TEMPLATES = (
    "Repeat the same word.{concept},{concept},{concept},{concept},",
    "I will tell you all about{concept}. The most important thing about{concept} is that{concept}",
    "A long text about{concept}, all kinds of{concept}, and more{concept}. In one word, this text is about",
)
NEUTRAL = (" thing", " place", " person", " time", " idea", " table", " number", " city")
_POSITIONS = 256  # positions whose divergence is computed at a time

EDIT_COLUMNS = (
    Column("concept", "category", "", "the concept as it was given"),
    Column(
        "arm", "category", "", "none: before; reversed: the edit; random: other rows reversed; zeroed: the same rows"
    ),
    Column("draw", "int16", "index", "which draw of random rows, from 0; 0 in the other arms"),
    Column("n_rows", "int32", "rows", "weight rows that were changed"),
    Column("item", "category", "", "prompt: one trigger prompt; text: one neutral text; all: all texts' tokens pooled"),
    Column("index", "int32", "index", "0-based index of the prompt or text; -1 for all"),
    Column("text", "str", "", "the prompt or text; missing for all, and where token ids were given"),
    Column("n_tokens", "int32", "tokens", "positions measured: a prompt's last, every one of a text"),
    Column(
        "p_concept", "float64", "probability", "next token after the prompt is one of the concept's; missing for texts"
    ),
    Column("rank", "Int32", "rank", "of the concept's best token after the prompt, 1 is the top; missing for texts"),
    Column(
        "p_unrelated", "float64", "probability", "likewise of the unrelated concept; missing for texts, or without one"
    ),
    Column("kl", "float64", "nats", "KL(before ‖ after) of the next token: median over positions"),
    Column("kl_q25", "float64", "nats", "its lower quartile"),
    Column("kl_q75", "float64", "nats", "its upper quartile"),
    Column("perplexity", "float64", "perplexity", "exp(mean negative log-likelihood) of texts' tokens after the first"),
)


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


@dataclass(frozen=True)
class Row:
    """One row of a gate or up projection: layer, site, neuron (all 0-based), and its cosine to the concept."""

    layer: int
    site: str
    neuron: int
    cosine: float


@dataclass(frozen=True, eq=False)
class Edit:
    """Rows, and the direction (d_model,) that they are turned away from; without a direction they are zeroed."""

    rows: tuple[Row, ...]
    values: Tensor | None


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
    _check_decoder(model)
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


def plan_edit(
    model: Model,
    vector: ConceptVector | Tensor,
    n: int | None = None,
    *,
    threshold: float | None = None,
    sites: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> Edit:
    """The rows closest to a concept vector: step 3 of the module's docstring. Changes nothing.

    Args:
        model: what `load_model` gave.
        vector: what `concept_vector` gave, or (d_model,) numbers in the residual stream's space.
        n: how many rows, over all layers and sites together; 1 by default.
        threshold: instead of `n`: all rows whose cosine is at least this.
        sites: "gate", "up" or both; by default all that the family has.
        layers: by default all.

    Returns:
        The edit, its rows by falling cosine.

    Raises:
        InputError: an unknown site, a gate where there is none, `n` or `threshold` out of range or both given, no row above the
            threshold (says the highest), a vector of another width, not finite, or zero.
        ModelError: weights that cannot be changed in place: on the meta device, offloaded, or quantised.
    """
    arch = model.arch
    given = vector.values if isinstance(vector, ConceptVector) else vector
    values = given.detach().to("cpu", torch.float32).flatten()
    if len(values) != arch.d_model or not torch.isfinite(values).all() or not values.any():
        raise InputError(f"expected a vector of d_model={arch.d_model} finite numbers, not all zero; got {values}")
    if sites is None:
        sites = SITES if arch.family.gate is not None else ("up",)
    sites = list(dict.fromkeys([sites] if isinstance(sites, str) else sites))
    unknown = [site for site in sites if site not in SITES]
    if unknown or not sites:
        raise InputError(f"sites={sites}; expected some of {', '.join(SITES)}: the rows that read the residual stream")
    chosen = list(dict.fromkeys(range(arch.n_layers) if layers is None else map(arch.check_layer, layers)))
    total = len(chosen) * len(sites) * arch.d_mlp
    if not total or (n is not None and threshold is not None):
        raise InputError(
            f"n={n}, threshold={threshold}, layers={chosen}; expected n or threshold, and at least one layer"
        )
    n = 1 if n is None and threshold is None else n
    if n is not None and not 1 <= n <= total:
        raise InputError(f"n={n} rows; expected 1 … {total}: {len(chosen)} layers × {len(sites)} sites × {arch.d_mlp}")
    if threshold is not None and not 0 < threshold <= 1:
        raise InputError(f"threshold={threshold}; expected a cosine above 0 and at most 1")
    rows = []
    for layer in chosen:
        for site in sites:
            cosines = _cosines(model, values, layer, site)
            best = cosines.topk(min(n, arch.d_mlp)).indices if n else (cosines >= (threshold or 1)).nonzero()[:, 0]
            rows += [Row(layer, site, int(at), float(cosines[at])) for at in best]
            if not n and not len(best):
                rows.append(Row(layer, site, -1, float(cosines.max())))  # only to say how close it came
    rows.sort(key=lambda row: (-row.cosine, row.layer, row.site, row.neuron))
    found = [row for row in rows if row.neuron >= 0][:n]
    if not found:
        raise InputError(
            f"no row has a cosine of at least {threshold} to the vector; the highest is {rows[0].cosine:.3f}"
        )
    return Edit(tuple(found), values)


def random_edit(model: Model, edit: Edit, seed: int = 0) -> Edit:
    """The control: as many random rows of the same layers and sites, none of the edit's own, in the same direction.

    Raises:
        InputError: a layer has not enough other rows.
    """
    generator = np.random.default_rng(seed)
    rows: list[Row] = []
    for layer, site in dict.fromkeys((row.layer, row.site) for row in edit.rows):
        taken = {row.neuron for row in edit.rows if (row.layer, row.site) == (layer, site)}
        others = [neuron for neuron in range(model.arch.d_mlp) if neuron not in taken]
        if len(others) < len(taken):
            raise InputError(
                f"the edit takes {len(taken)} of {model.arch.d_mlp} rows of {site} in layer {layer}, so there are not as many "
                f"others for the random control; use a smaller n or a higher threshold"
            )
        drawn = sorted(generator.choice(others, len(taken), replace=False).tolist())
        cosines = [math.nan] * model.arch.d_mlp if edit.values is None else _cosines(model, edit.values, layer, site)
        rows += [Row(layer, site, neuron, float(cosines[neuron])) for neuron in drawn]
    return Edit(tuple(rows), edit.values)


class AppliedEdit:
    """An edit that is in the weights, as `apply_edit` left it; `undo` takes it back.

    Attributes:
        edit: what was done.
        active: whether it is still there.
    """

    def __init__(self, model: Model, edit: Edit) -> None:
        self.model, self.edit, self.active = model, edit, False
        # Everything that undoing needs is kept before anything is written.
        self._before = [_weight(model, row.layer, row.site)[row.neuron].clone() for row in edit.rows]
        self._after: list[Tensor] = []

    @torch.no_grad()
    def _write(self) -> None:
        self.active = True
        self.model.__dict__.pop("fingerprint", None)  # the weights change, and with them their hash
        for row, before in zip(self.edit.rows, self._before, strict=True):
            weight = _weight(self.model, row.layer, row.site)
            if self.edit.values is None:
                weight[row.neuron] = 0
            else:
                away = -_mlp_input(self.model, self.edit.values, row.layer).to(weight.device)
                weight[row.neuron].copy_(away * before.to(weight.device).float().norm())
            self._after.append(weight[row.neuron].clone())

    @torch.no_grad()
    def _restore(self) -> None:
        for row, before in zip(self.edit.rows, self._before, strict=True):
            _weight(self.model, row.layer, row.site)[row.neuron].copy_(before)
        self.model.__dict__.pop("fingerprint", None)
        self.active = False

    def undo(self) -> None:
        """Give the rows their former values back; a second call does nothing.

        Raises:
            InputError: a row was changed again since: undo that first.
        """
        if not self.active:
            return
        for row, after in zip(self.edit.rows, self._after, strict=True):
            now = _weight(self.model, row.layer, row.site)[row.neuron]
            if not torch.equal(now, after.to(now.device, now.dtype)):
                raise InputError(
                    f"{row.site} row {row.neuron} of layer {row.layer} was changed again: undo that edit first"
                )
        self._restore()


def apply_edit(model: Model, edit: Edit) -> AppliedEdit:
    """Write an edit into the weights, for good or until it is undone.

    Args:
        model: changed in place; its `fingerprint` changes with it.
        edit: what `plan_edit` gave.

    Returns:
        What undoes it, bit for bit.

    Raises:
        ModelError: as `plan_edit`.
    """
    applied = AppliedEdit(model, edit)
    try:
        applied._write()
    except BaseException:
        applied._restore()
        raise
    return applied


@contextlib.contextmanager
def edited(model: Model, edit: Edit) -> Iterator[Edit]:
    """An edit inside a `with` block: the weights are restored bit for bit on leaving it, however it is left."""
    applied = AppliedEdit(model, edit)
    try:
        applied._write()
        yield edit
    finally:
        applied._restore()


@contextlib.contextmanager
def reverse(
    model: Model,
    vector: ConceptVector | Tensor,
    n: int | None = None,
    *,
    threshold: float | None = None,
    sites: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> Iterator[Edit]:
    """Remove a concept inside a `with` block: `plan_edit`, then `edited`. Arguments as there; `apply_edit` for good.

    Example:
        >>> with reverse(model, concept_vector(model, " water"), n=5):                # doctest: +SKIP
        ...     model.generate("The glass was filled with cold")
    """
    with edited(model, plan_edit(model, vector, n, threshold=threshold, sites=sites, layers=layers)) as edit:
        yield edit


def _weight(model: Model, layer: int, site: str) -> Tensor:
    """The rows of a projection as a view of the parameter, so that writing to it reaches the model."""
    arch = model.arch
    module = arch.up_proj(layer) if site == "up" else arch.gate_proj(layer)
    stored: Any = module.weight
    where = f"{site} weights of layer {layer}"
    if stored.is_meta:
        raise ModelError(
            f"{where} are on the meta device (not loaded, or offloaded to CPU or disk) and cannot be changed in place; load the "
            f"whole model on one device"
        )
    rows = None
    if stored.is_floating_point() and stored.numel() == (2 if arch.family.fused else 1) * arch.d_mlp * arch.d_model:
        rows = arch.up_weight(layer) if site == "up" else arch.gate_weight(layer)
    if rows is None or rows.untyped_storage().data_ptr() != stored.untyped_storage().data_ptr():
        raise ModelError(
            f"{where} are {stored.dtype} {tuple(stored.shape)}, no plain matrix that can be changed in place: load the model "
            f"without quantisation"
        )
    return rows


def _mlp_input(model: Model, values: Tensor, layer: int) -> Float[Tensor, " d_model"]:
    """t of step 3: what the layer's MLP reads of a direction, scaled to length 1."""
    norm = model.arch.pre_mlp_norm(layer)
    gain = model.arch.norm_gain(norm)
    if gain is not None:
        values = values.to(gain.device)
        values = (values - values.mean() if model.arch.family.norm == "layer" else values) * gain
    return values / values.norm()


def _cosines(model: Model, values: Tensor, layer: int, site: str) -> Float[Tensor, " d_mlp"]:
    weight = checked(_weight(model, layer, site), f"{site} weights of layer {layer}").float()
    tiny = torch.finfo(torch.float32).tiny
    return (weight @ _mlp_input(model, values, layer).to(weight.device) / weight.norm(dim=1).clamp(min=tiny)).cpu()


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


def _check_decoder(model: Model) -> None:
    if not model.arch.family.decoder:
        raise InputError(f"{model.name} is an encoder ({model.arch.family.name}): it predicts no next token")


# The report


@torch.no_grad()
def edit_report(
    model: Model,
    concept: str | Sequence[str] | Concept,
    prompts: Sequence[str],
    texts: Sequence[str | Sequence[int]],
    *,
    vector: ConceptVector | Tensor | None = None,
    n: int | None = None,
    threshold: float | None = None,
    sites: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    unrelated: str | Sequence[str] | Concept | None = " chair",
    n_random: int = 3,
    chat: bool = False,
    max_tokens: int = 1024,
    seed: int = 0,
    progress: bool | str = True,
) -> Result:
    """What an edit removes and what it breaks, beside its controls. The model is left as it was.

    Args:
        model: what `load_model` gave, a decoder.
        concept: what is removed; all its single-token spellings count in p_concept.
        prompts: trigger prompts, which end right before the concept.
        texts: neutral texts, strings or token ids, over which divergence and perplexity are measured.
        vector: by default `concept_vector(model, concept, seed=seed)`.
        n, threshold, sites, layers: as in `plan_edit`.
        unrelated: a concept that should not change; `None` for none.
        n_random: draws of random rows, at least one.
        chat: wrap prompts in the chat template.
        max_tokens: budget of padded tokens in a batch, cut further where the logits would not fit in memory.
        seed: of the vector's noise and the random rows.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        A `Result` of kind "neurons.edit" with `EDIT_COLUMNS`: one row per arm, draw and prompt or text, and one per arm and draw
        with all texts' tokens pooled. Every position of a text counts. `summarise_edit` makes one row per arm of it.

    Raises:
        InputError: as `concept_vector` and `plan_edit`; no prompt or text; concepts that share a token; n_random below 1.
        ModelError: as `plan_edit`.

    Example:
        >>> result = edit_report(model, " water", ["The glass was filled with cold"], texts, n=5)   # doctest: +SKIP
        >>> summarise_edit(result)[["arm", "p_concept", "kl"]]                                     # doctest: +SKIP
    """
    start = time.perf_counter()
    _check_decoder(model)
    prompts, texts = [prompts] if isinstance(prompts, str) else list(prompts), list(texts)
    if not prompts or not texts or n_random < 1:
        raise InputError(
            f"{len(prompts)} prompts, {len(texts)} texts, n_random={n_random}; expected at least one of each"
        )
    wanted = concept_of(model, concept)
    other = None if unrelated is None else concept_of(model, unrelated)
    if other is not None and set(wanted.token_ids) & set(other.token_ids):
        raise InputError(f"concept {wanted.name!r} and the unrelated {other.name!r} share a token; give another")
    named = concept if isinstance(concept, Concept) else wanted.name
    vector = concept_vector(model, named, seed=seed) if vector is None else vector
    edit = plan_edit(model, vector, n, threshold=threshold, sites=sites, layers=layers)
    arms: list[tuple[str, int, Edit | None]] = [("none", 0, None), ("reversed", 0, edit)]
    arms += [("random", draw, random_edit(model, edit, seed + draw)) for draw in range(n_random)]
    arms += [("zeroed", 0, replace(edit, values=None))]

    encoded = [*model.encode(prompts, chat=chat), *model.encode(texts)]
    measured: dict[tuple[int, int], dict[str, Any]] = {}
    # Logits before and after, their log-softmax, and the model's own copy.
    fitting = int(0.5 * available_memory(model.device)) // (16 * model.arch.vocab_size)
    batches = token_batches(encoded, max_tokens=max(1, min(max_tokens, fitting)), pad_id=model.pad_id)

    def step(batch: Batch) -> None:
        batch = batch.to(model.device)
        before = _log_probabilities(model, batch, len(prompts))
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for at, (_, _, change) in enumerate(arms):
            with contextlib.nullcontext() if change is None else edited(model, change):
                after = before if change is None else _log_probabilities(model, batch, len(prompts))
            for row, text in enumerate(batch.rows):
                targets = None if text < len(prompts) else torch.tensor(encoded[text][1:])
                found[at, text] = _measures(before[row], after[row], wanted, other, targets)
        measured.update(found)

    label = progress if isinstance(progress, str) else f"edit {wanted.word}" if progress else False
    for_each_batch(batches, step, progress=label)

    rows = []
    strings = [text if isinstance(text, str) else None for text in texts]
    for at, (arm, draw, change) in enumerate(arms):
        shared = {"concept": wanted.name, "arm": arm, "draw": draw, "n_rows": 0 if change is None else len(change.rows)}
        of_texts = [measured[at, text] for text in range(len(prompts), len(encoded))]
        pooled = {name: np.concatenate([one[name] for one in of_texts]) for name in ("kl", "nll")}
        items: list[tuple[str, int, str | None, dict[str, Any]]]
        items = [("prompt", i, prompts[i], measured[at, i]) for i in range(len(prompts))]
        items += [("text", i, shown, one) for i, (shown, one) in enumerate(zip(strings, of_texts, strict=True))]
        for item, index, shown, one in [*items, ("all", -1, None, pooled)]:
            rows.append({**shared, "item": item, "index": index, "text": shown, **_reduced(one)})
    frame = pd.DataFrame(rows)
    frame["arm"] = pd.Categorical(frame["arm"], ARMS)
    frame["rank"] = frame["rank"].astype("Int32")
    parameters: dict[str, Any] = {"concept": wanted.name, "tokens": wanted.tokens, "dropped": sorted(wanted.dropped)}
    parameters |= {"unrelated": other.name if other else None, "n_random": n_random, "chat": chat}
    parameters |= {"n": n, "threshold": threshold, "n_prompts": len(prompts), "n_texts": len(texts)}
    if isinstance(vector, ConceptVector):
        parameters["vector"] = {name: getattr(vector, name) for name in ("probability", "approximate", "steps")}
    parameters["rows"] = [[row.layer, row.site, row.neuron, round(row.cosine, 4)] for row in edit.rows]
    seconds = time.perf_counter() - start
    provenance = Provenance.collect(model, seed=seed, parameters=parameters, wall_time=seconds)
    return Result("neurons.edit", frame, EDIT_COLUMNS, provenance)


def _log_probabilities(model: Model, batch: Batch, n_prompts: int) -> list[Float[Tensor, "position vocab"]]:
    """Per text: log-probabilities of the next token, at a prompt's last position and at every position of a text."""
    logits = forward(model, batch).logits
    lengths = batch.lengths.tolist()
    spans = [
        slice(length - 1 if text < n_prompts else 0, length) for text, length in zip(batch.rows, lengths, strict=True)
    ]
    return [logits[row, span].float().log_softmax(-1) for row, span in enumerate(spans)]


def _measures(
    before: Tensor, after: Tensor, concept: Concept, unrelated: Concept | None, targets: Tensor | None
) -> dict[str, Any]:
    """Divergence per position; for a text (with `targets`) the tokens' losses, for a prompt the concepts' probabilities."""
    pieces = zip(before.split(_POSITIONS), after.split(_POSITIONS), strict=True)
    kl = torch.cat([(b.exp() * (b - a)).sum(-1).clamp(min=0) for b, a in pieces]).double().cpu().numpy()
    if targets is not None:
        losses = -after[:-1].gather(1, targets.to(after.device)[:, None])[:, 0]
        return {"kl": kl, "nll": losses.double().cpu().numpy()}
    last = after[-1]
    best = last[list(concept.token_ids)].max()
    return {
        "kl": kl,
        "p_concept": float(last[list(concept.token_ids)].exp().sum()),
        "rank": 1 + int((last > best).sum()),
        "p_unrelated": float(last[list(unrelated.token_ids)].exp().sum()) if unrelated else math.nan,
    }


def _reduced(one: dict[str, Any]) -> dict[str, Any]:
    """The columns of one row."""
    low, median, high = np.quantile(one["kl"], [0.25, 0.5, 0.75])
    losses = one.get("nll", np.empty(0))
    return {
        "n_tokens": len(one["kl"]),
        **{name: one.get(name, math.nan) for name in ("p_concept", "p_unrelated")},
        "rank": one.get("rank"),
        **{"kl": median, "kl_q25": low, "kl_q75": high},
        "perplexity": math.exp(min(losses.mean(), 700.0)) if len(losses) else math.nan,
    }


def summarise_edit(result: Result | pd.DataFrame) -> pd.DataFrame:
    """One row per concept and arm.

    Args:
        result: what `edit_report` gave, or its frame (or several of them, concatenated).

    Returns:
        concept, arm, n_rows, n_prompts, n_tokens (of the texts); p_concept and p_unrelated: means over prompts, each with `_low`
        and `_high`, a 95 % percentile bootstrap over prompts (missing for a single one); kl, kl_q25, kl_q75, perplexity:
        of all texts' tokens pooled. Of the random arm: means over its draws.
    """
    from scipy.stats import bootstrap

    frame = result if isinstance(result, pd.DataFrame) else result.frame
    found = []
    for (concept, arm), group in frame.groupby(["concept", "arm"], observed=True, sort=True):
        pooled, prompts = group[group["item"] == "all"], group[group["item"] == "prompt"]
        row: dict[str, Any] = {"concept": concept, "arm": arm, "n_rows": int(pooled["n_rows"].iloc[0])}
        by_prompt = prompts.groupby("index")[["p_concept", "p_unrelated"]].mean()
        row |= {"n_prompts": len(by_prompt), "n_tokens": int(pooled["n_tokens"].iloc[0])}
        for name in ("p_concept", "p_unrelated"):
            values = by_prompt[name].to_numpy()
            row[name], low, high = float(values.mean()), math.nan, math.nan
            if len(values) > 1 and not np.isnan(values).any():
                low, high = bootstrap(
                    (values,), np.mean, method="percentile", rng=0, n_resamples=2000
                ).confidence_interval
            row |= {f"{name}_low": float(low), f"{name}_high": float(high)}
        found.append(row | pooled[["kl", "kl_q25", "kl_q75", "perplexity"]].mean().to_dict())
    return pd.DataFrame(found)
