"""What an edit removes and what it breaks, beside the controls that an effect needs: Targeted Angular Reversal (TARS).

Source: H. J. Davies, G. Iacovides, D. P. Mandic, "Targeted Angular Reversal of Weights (TARS) for Knowledge Removal in Large
Language Models" (arXiv 2412.10257). Reported for Llama 3.1 8B: the concept's trigger probability falls to 0.00 with as
few as one edit; the median next-token KL on Wikipedia is 0.002 after five concepts.

The measures' exact definitions, the controls and the unrelated concept are our own:

1. Arms: "none": the model as it is; "reversed": the edit (`interp.neurons.editing`); "random": the same number of random rows of
   the same layers and sites, reversed in the same way; "zeroed": the same rows zeroed.
2. After each trigger prompt: p(concept), the sum over its single-token spellings; the best one's rank; likewise p of an unrelated
   concept, which should not change.
3. At every position of neutral texts: KL(before ‖ after) of the next token in nats, as median and quartiles; perplexity, the
   exponential of the mean negative log-likelihood of the tokens after the first.

Measured by us on SmolLM2-135M-Instruct (`analyses/concept_editing.py`): one or five edits remove none of five concepts. The
closest rows of the last layers belong partly to neurons that write against the concept (29, 1342 for " water"), so that
reversing them can make it likelier. So read the controls, and choose `layers` and `sites` for a model by measuring.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.batching import Batch, available_memory, for_each_batch, token_batches
from interp.capture import forward
from interp.errors import InputError
from interp.model import Model
from interp.neurons.concept_vectors import ConceptVector, check_decoder, concept_vector
from interp.neurons.concepts import Concept, concept_of
from interp.neurons.editing import Edit, edited, plan_edit, random_edit
from interp.provenance import Provenance
from interp.results import Column, Result

ARMS = ("none", "reversed", "random", "zeroed")
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
    check_decoder(model)
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
