"""Equalisation: a prompt's concepts given like flows to its last position, and what the model then says.

Source: Yang & Wang, "Compositional Video Generation as Flow Equalization" (Vico), arXiv 2407.06182. There the noisy
latent of a video takes a step towards a larger min_i A_i, A_i the flow of concept i through the attention of a
text-to-video model, so that no concept of the prompt is left out of the video. What answers to that latent in a
language model is the prompt's embeddings:

1. Concepts are found among the prompt's tokens (`interp.flow.named_concepts`); A_i is the flow from the last position,
   after which the answer begins, to the group of concept i's tokens.
2. Adam ascends the objective by a perturbation δ of all the prompt's embeddings (`interp.flow.embedding_ascent`);
   weights stay as they are. Control: a random δ, whose norm is, position by position, that of an ascended one.
3. The answer is generated from the changed embeddings, greedily; which concepts it names, and its perplexity under the
   model and the prompt as they were, are the outcome (`interp.flow.changed_answers`).
4. The exact maximum flows before and after tell a failed ascent from an ascent without effect.

One call makes one arm; `interp.flow.equalized_arms` puts arms side by side and compares them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from interp.errors import InputError
from interp.flow.changed_answers import answer, answer_losses
from interp.flow.embedded_flows import exact_flows
from interp.flow.embedding_ascent import DIFFERENTIABLE, OBJECTIVES, Ascent, Settings, ascend
from interp.flow.graph import RESIDUALS
from interp.flow.named_concepts import concept_positions, mentions
from interp.flow.widest import BIASES
from interp.model import Model
from interp.provenance import Provenance
from interp.results import Column, Result

WITHOUT_ASCENT = ("none", "random")
EQUALIZE_COLUMNS = (
    Column("prompt", "int32", "index", "0-based index of the prompt"),
    Column(
        "arm", "category", "", "none: as it is; random: δ of random direction; else the objective and the flow's method"
    ),
    Column("concept", "str", "", "the concept, as it was given"),
    Column("first_position", "int32", "index", "position of its first token in the prompt"),
    Column("n_positions", "int16", "tokens", "tokens it has in the prompt"),
    Column(
        "flow_before",
        "float64",
        "",
        "maximum flow of the last position to it, embeddings as they are, in units of attention",
    ),
    Column("flow_after", "float64", "", "the same with δ"),
    Column("own_before", "float64", "", "the same by the arm's own method, before; missing without an ascent"),
    Column("own_after", "float64", "", "the same by the arm's own method, with δ; missing without an ascent"),
    Column("mentioned", "bool", "", "the answer names it, as a whole word, in any case, plurals included"),
    Column("prompt_text", "str", "", "the prompt, without its chat template"),
    Column("text", "str", "", "the answer"),
    Column("n_tokens", "int32", "tokens", "length of the answer, end token included"),
    Column("nll", "float64", "nats", "mean −log p of the answer's tokens, by the model and the prompt as they were"),
    Column("perplexity", "float64", "perplexity", "exp(nll)"),
    Column("norm", "float64", "share", "‖δ‖ / ‖embeddings‖ over the prompt (Frobenius)"),
    Column("steps", "int16", "steps", "steps of Adam that were taken"),
    Column("kept_step", "int16", "steps", "the step whose δ is used: that of the highest objective"),
    Column(
        "stopped", "category", "", "why there were no more steps: threshold, norm, flat, steps; none without an ascent"
    ),
)


def equalize(
    model: Model,
    prompts: Sequence[str],
    concepts: Sequence[Sequence[str]],
    *,
    objective: str = "min",
    method: str = "soft",
    steps: int = 8,
    learning_rate: float = 0.01,
    threshold: float = 0.99,
    max_norm: float = 0.2,
    temperature: float = 0.01,
    bias: str = "entropy",
    residual: str = "half",
    like: Result | None = None,
    seed: int = 0,
    chat: bool = True,
    max_new_tokens: int = 32,
    max_tokens: int = 1024,
    progress: bool | str = False,
) -> Result:
    """Equalise the flows of the concepts that prompts name, then answer: one arm.

    Args:
        model: a causal LM, as `load_model` gave it.
        prompts: texts.
        concepts: for each prompt at least two words that it names.
        objective: "min" (Vico) or "variance" (its ablation) ascend; "random" takes a random direction, "none" no δ.
        method: of the flow that is ascended: "soft" (Vico), "exact" (the cut's gradient), "widest", "rollout".
        steps: most steps of Adam.
        learning_rate: as a share of the embeddings' root mean square, what the first step adds to each coordinate.
        threshold: a prompt is done when its smallest flow, by `method`, is this share of the mean of its flows; 0 to 1.
        max_norm: a prompt is done when ‖δ‖ / ‖embeddings‖ reaches this; the length of a random δ without `like`.
        temperature, bias: of "soft", see `interp.flow.widest`.
        residual: of the graph, see `interp.flow.graph`.
        like: for "random": another arm of the same prompts; position by position, δ gets the norm of that arm's.
        seed: of random directions.
        chat: wrap prompts in the chat template.
        max_new_tokens: longest answer, in tokens.
        max_tokens: budget of padded tokens in a batch, cut further where the gradient would not fit.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        A `Result` of kind "flow.equalize" with `EQUALIZE_COLUMNS`: one row per prompt and concept; from `prompt_text`
        on columns are the prompt's, the same for its concepts. Attachments, by arm: "position_norms" (‖δ‖ at each
        position of each prompt) and "trace" (own flows before the first step and after each: prompt, step, concept).

    Raises:
        InputError: no prompts, an encoder, a prompt that does not name a concept (it is said which), fewer than two
            concepts, prompt and answer longer than the context, a setting out of range, `like` of other prompts, a
            gradient that is not finite.
        ModelError: the model gives no attention patterns.
        MemoryBudgetError: one prompt alone does not fit, with both figures.

    Example:
        >>> arm = equalize(model, ["Write about a dog and a piano."], [["dog", "piano"]])       # doctest: +SKIP
        >>> arm.frame[["concept", "flow_before", "flow_after", "mentioned"]]                    # doctest: +SKIP
    """
    start = time.perf_counter()
    settings = Settings(objective, method, steps, learning_rate, threshold, max_norm, temperature, bias, residual)
    _check(model, prompts, concepts, settings, like, max_new_tokens)
    encoded = model.encode(list(prompts), chat=chat)
    _check_context(model, encoded, max_new_tokens)
    groups = [
        concept_positions(model, ids, prompt, named)
        for ids, prompt, named in zip(encoded, prompts, concepts, strict=True)
    ]
    budget: dict[str, Any] = {"max_tokens": max_tokens}
    before = exact_flows(model, encoded, groups, residual=residual, **budget)
    arm = objective if objective in WITHOUT_ASCENT else f"{objective} {method}"
    arm += "" if like is None else f" like {like.frame['arm'].iloc[0]}"
    label = progress if isinstance(progress, str) else "equalize"
    ascents: list[Ascent] | None = None
    deltas: list[Tensor] | None = None
    if objective == "random":
        deltas = _random(model, encoded, like, max_norm, seed)
    elif objective != "none":
        ascents = ascend(model, encoded, groups, settings, progress=f"{label}: {arm}" if progress else False, **budget)
        deltas = [one.delta for one in ascents]
    after = before if deltas is None else exact_flows(model, encoded, groups, deltas, residual=residual, **budget)
    shown = f"{label}: {arm}, answers" if progress else False
    answers = answer(model, encoded, deltas, max_new_tokens=max_new_tokens, max_tokens=4 * max_tokens, progress=shown)
    losses = answer_losses(model, encoded, answers, max_tokens=4 * max_tokens)
    norms = [
        torch.zeros(len(ids)) if deltas is None else deltas[at].float().norm(dim=-1) for at, ids in enumerate(encoded)
    ]
    rows = []
    for at, named in enumerate(concepts):
        text = model.decode(answers[at])
        ascent = None if ascents is None else ascents[at]
        size = float(_embeddings(model, encoded[at]).norm())
        for number, concept in enumerate(named):
            rows.append(
                {
                    "prompt": at,
                    "arm": arm,
                    "concept": concept,
                    "first_position": groups[at][number][0],
                    "n_positions": len(groups[at][number]),
                    "flow_before": before[at][number],
                    "flow_after": after[at][number],
                    "own_before": math.nan if ascent is None else ascent.trace[0, number],
                    "own_after": math.nan if ascent is None else ascent.trace[ascent.kept, number],
                    "mentioned": mentions(text, concept),
                    "prompt_text": prompts[at],
                    "text": text,
                    "n_tokens": len(answers[at]),
                    "nll": losses[at],
                    "perplexity": math.exp(min(losses[at], 700.0)),
                    "norm": float(norms[at].norm()) / size,
                    "steps": 0 if ascent is None else ascent.steps,
                    "kept_step": 0 if ascent is None else ascent.kept,
                    "stopped": "none" if ascent is None else ascent.stopped,
                }
            )
    kept = {arm: [[float(f"{float(one):.6g}") for one in row] for row in norms]}
    parameters: dict[str, Any] = {**dataclasses.asdict(settings), "arm": arm, "chat": chat}
    parameters |= {"max_new_tokens": max_new_tokens, "n_prompts": len(prompts), "max_tokens": max_tokens}
    parameters |= {"prompts": digest([list(prompts), [list(named) for named in concepts]]), "norms": digest(kept)}
    parameters["like"] = None if like is None else digest(like.attachments["position_norms"])
    provenance = Provenance.collect(model, seed=seed, parameters=parameters, wall_time=time.perf_counter() - start)
    trace = {} if ascents is None else {arm: [one.trace.round(6).tolist() for one in ascents]}
    attachments = {"position_norms": kept, "trace": trace}
    return Result("flow.equalize", pd.DataFrame(rows), EQUALIZE_COLUMNS, provenance, attachments)


def digest(value: Any) -> str:
    """16 hex digits of a JSON value: what provenance keeps of prompts and norms, so that a saved arm is known again."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


@torch.no_grad()
def _embeddings(model: Model, ids: Sequence[int]) -> Tensor:
    """(position, d_model) float32 on the CPU."""
    return model.arch.embedding()(torch.tensor(list(ids), device=model.device)).float().cpu()


def _random(
    model: Model, encoded: Sequence[Sequence[int]], like: Result | None, max_norm: float, seed: int
) -> list[Tensor]:
    """Random directions, with another arm's norms, or each position's embedding norm times `max_norm`."""
    wanted: list[Tensor]
    if like is None:
        wanted = [max_norm * _embeddings(model, ids).norm(dim=-1) for ids in encoded]
    else:
        (norms,) = like.attachments["position_norms"].values()
        wanted = [torch.tensor(row) for row in norms]
        if [len(row) for row in norms] != [len(ids) for ids in encoded]:
            raise InputError("`like` is an arm of other prompts; expected one of these prompts, in this order")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for row in wanted:
        direction = torch.randn(len(row), model.arch.d_model, generator=generator)
        found.append(direction / direction.norm(dim=-1, keepdim=True) * row[:, None])
    return found


def _check(
    model: Model,
    prompts: Any,
    concepts: Any,
    settings: Settings,
    like: Result | None,
    max_new_tokens: int,
) -> None:
    if not model.arch.family.decoder:
        raise InputError(f"{model.name} is an encoder ({model.arch.family.name}): it cannot answer")
    if isinstance(prompts, str) or isinstance(concepts, str):
        raise InputError("prompts and concepts are lists: several prompts, and for each the concepts that it names")
    if len(prompts) == 0:
        raise InputError("no prompts were given; expected at least one")
    if len(prompts) != len(concepts):
        raise InputError(
            f"{len(prompts)} prompts and concepts for {len(concepts)}; expected one list of concepts per prompt"
        )
    for at, (prompt, named) in enumerate(zip(prompts, concepts, strict=True)):
        if not isinstance(prompt, str):
            raise InputError(f"prompt {at} is {prompt!r:.40}; expected a text, in which its concepts can be found")
        if isinstance(named, str) or len(set(named)) < 2:
            raise InputError(f"prompt {at} has the concepts {named!r}; expected at least two different ones")
    known = (*OBJECTIVES, *WITHOUT_ASCENT)
    for name, value, choices in (
        ("objective", settings.objective, known),
        ("method", settings.method, DIFFERENTIABLE),
        ("residual", settings.residual, RESIDUALS),
        ("bias", settings.bias, BIASES),
    ):
        if value not in choices:
            raise InputError(f"{name}={value!r}; expected one of {', '.join(choices)}")
    if settings.steps < 1 or max_new_tokens < 1:
        raise InputError(f"steps={settings.steps}, max_new_tokens={max_new_tokens}; expected at least 1 of each")
    for name in ("learning_rate", "max_norm", "temperature"):
        value = getattr(settings, name)
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name}={value}; expected a number above 0")
    if not 0 <= settings.threshold <= 1:
        raise InputError(f"threshold={settings.threshold}; expected a share of the mean flow, from 0 to 1")
    if like is not None and (settings.objective != "random" or like.kind != "flow.equalize"):
        raise InputError("`like` is for objective='random', and is what equalize gave for another arm")
    if like is not None and len(like.attachments["position_norms"]) != 1:
        raise InputError("`like` has several arms; give the one whose norms the random δ gets")


def _check_context(model: Model, encoded: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Before the ascent, not after it."""
    limit = model.arch.n_positions
    longest = max(len(ids) for ids in encoded)
    if limit is not None and longest + max_new_tokens > limit:
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new tokens exceed the context of {limit} tokens"
        )
