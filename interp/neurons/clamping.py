"""Dose and response: what a language model says when one neuron is held at a value, beside the controls.

Source: H. J. Davies, arXiv 2501.02688 (clamping a concept's neuron changes the concept's probability in the output). The
paper gives neither values, signs nor prompts; doses, controls and measures below are our own definitions.

1. A neuron (l, i) is clamped at one site, at every position of prompt and continuation, to one value per dose:

       units        mode "set"             mode "add"            mode "scale"
       sd           mean + dose · sd       + dose · sd           –
       absolute     dose                   + dose                · dose

   mean and sd are the neuron's own over a text sample. So dose 0 in sd with "set" holds the neuron at its mean, and
   with "add" changes nothing.
2. Arms: "clamp"; "random": other neurons of the layer at the same dose, each in its own sd (or at the same absolute value);
   "zero": the neuron ablated; "none": the model as it is. An effect without controls is not an effect.
3. Measured per arm, neuron, dose, prompt and sample: the concept's probability as the next token, its best token's rank, an
   unrelated concept's probability, KL(clamped ‖ unclamped) in nats; the continuation, whether it mentions the
   concept, and its perplexity under the model as it is: fluency.

All runs of a prompt are one batch (`interp.neurons.clamped_runs`). `summarise` gives means with intervals.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from interp.architectures import NEURON_SITES
from interp.errors import InputError
from interp.intervene import Clamp
from interp.model import Model
from interp.neurons.atlas import Atlas
from interp.neurons.clamp_doses import Scale, candidates, no_candidate, random_neurons
from interp.neurons.clamped_runs import Run, run_clamped
from interp.neurons.concepts import Concept, concept_of
from interp.neurons.responses import ARMS, MEASURES, measure, summarise
from interp.provenance import Provenance
from interp.results import Column, Result

__all__ = ["DOSE_COLUMNS", "concept_pair", "describe_concepts", "dose_response", "summarise"]

UNITS = ("sd", "absolute")
DOSE_COLUMNS = (
    Column("concept", "category", "", "the concept as it was given"),
    Column("arm", "category", "", "clamp; random: another neuron of the layer; zero: ablated; none: unclamped"),
    Column("layer", "int16", "layer", "0-based layer of the neuron"),
    Column("neuron", "int32", "index", "0-based index of the clamped neuron; -1 where none is"),
    Column("site", "category", "", "where it is clamped: up, gate or hidden"),
    Column("dose", "float64", "sd or activation", "in the run's units; missing for zero and none"),
    Column("value", "float64", "activation", "what was set, added or multiplied by; missing for none"),
    Column("prompt", "str", "", "the prompt"),
    Column("prompt_index", "int32", "index", "0-based index of the prompt"),
    Column("seed", "int32", "index", "which sample of the continuation, from 0"),
    *MEASURES,
)


def dose_response(
    model: Model,
    concept: str | Sequence[str] | Concept,
    prompts: str | Sequence[str],
    doses: Iterable[float | int],
    *,
    neuron: tuple[int, int] | None = None,
    site: str = "hidden",
    mode: str = "set",
    units: str = "sd",
    atlas: Atlas | None = None,
    statistics: Result | None = None,
    sample_texts: Sequence[str] | None = None,
    unrelated: str | Sequence[str] | Concept | None = " chair",
    n_random: int = 3,
    chat: bool = False,
    max_new_tokens: int = 24,
    temperature: float = 0.0,
    n_seeds: int = 1,
    seed: int = 0,
    max_tokens: int = 4096,
    progress: bool | str = True,
) -> Result:
    """Sweep the dose of one neuron's clamp and measure the response, beside the controls.

    Args:
        model: what `load_model` gave.
        concept: a word such as " music", several tokens, or a `Concept`.
        prompts: what the model is asked.
        doses: see the module's table.
        neuron: (layer, index); by default the one that decodes to the concept with the highest probability.
        site: "up", "gate" or "hidden".
        mode: "set", "add" or "scale".
        units: "sd" or "absolute".
        atlas: where the neuron is looked up ("down" for site "hidden"); decoded here if missing, which takes its time.
        statistics: what `neuron_statistics` gave for the site and layer, for units "sd".
        sample_texts: texts to compute them from; by default the prompts themselves.
        unrelated: a concept that should not change; `None` for none.
        n_random: random neurons, at least one, drawn with `seed`.
        chat: wrap prompts in the chat template.
        max_new_tokens: longest continuation.
        temperature: 0 for greedy decoding.
        n_seeds: samples per prompt; more than one needs a temperature.
        seed: of random neurons and sampling.
        max_tokens: budget of tokens in a batch.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        A `Result` of kind "neurons.dose_response" with `DOSE_COLUMNS`: one row per arm, neuron, dose, prompt and sample.

    Raises:
        InputError: an argument that cannot be used (says which and why).

    Example:
        >>> result = dose_response(model, " music", ["What do you like?"], [-20, 20], neuron=(27, 1510))  # doctest: +SKIP
        >>> summarise(result)[["arm", "dose", "p_concept", "mention_rate"]]                         # doctest: +SKIP
    """
    start = time.perf_counter()
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    doses = [float(dose) for dose in doses]
    _check(prompts, doses, site, mode, units, n_random, max_new_tokens, temperature, n_seeds)
    wanted, other = concept_pair(model, concept, unrelated)
    encoded = model.encode(prompts, chat=chat)
    layer, index = _target(model, wanted, site, neuron, atlas, progress)
    scale = Scale.of(model, site, [layer], statistics, sample_texts, prompts, chat, progress) if units == "sd" else None
    if scale is not None:
        scale.check(site, layer, index)
    randoms = random_neurons(model, scale, site, layer, [index], n_random, seed)

    arms: list[tuple[str, int, float, Clamp | None]] = [
        ("none", -1, math.nan, None),
        ("zero", index, math.nan, Clamp(layer, index, 0.0, site, "zero")),
    ]
    for arm, members in (("random", randoms), ("clamp", [index])):
        for member in members:
            for dose in doses:
                value = dose if scale is None else scale.value(site, layer, member, dose, mode)
                arms.append((arm, member, dose, Clamp(layer, member, value, site, mode)))
    keys = [(*arm, at, sample) for arm in arms for at in range(len(prompts)) for sample in range(n_seeds)]
    outcomes = run_clamped(
        model,
        encoded,
        [Run(at, clamp) for *_, clamp, at, _ in keys],
        wanted.token_ids,
        other.token_ids if other else (),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        max_tokens=max_tokens,
        progress=progress if isinstance(progress, str) else f"clamp {wanted.word}" if progress else False,
    )
    measured = measure(model, wanted, encoded, [at for *_, at, _ in keys], outcomes, max_tokens, progress)
    frame = pd.DataFrame(
        {
            "concept": wanted.name,
            "arm": pd.Categorical([arm for arm, *_ in keys], ARMS),
            "layer": layer,
            "neuron": [member for _, member, *_ in keys],
            "site": site,
            "dose": [dose for _, _, dose, *_ in keys],
            "value": [math.nan if clamp is None else clamp.value for *_, clamp, _, _ in keys],
            "prompt": [prompts[at] for *_, at, _ in keys],
            "prompt_index": [at for *_, at, _ in keys],
            "seed": [sample for *_, sample in keys],
            **measured,
        }
    )
    parameters: dict[str, Any] = {"mode": mode, "units": units, "doses": doses, "n_prompts": len(prompts), "chat": chat}
    parameters |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "n_seeds": n_seeds}
    parameters |= describe_concepts(wanted, other) | {"random": randoms, "n_empty": int((frame["n_tokens"] == 0).sum())}
    if scale is not None:
        parameters |= {
            "sample": scale.source,
            "mean": scale.mean(site, layer, index),
            "sd": scale.sd(site, layer, index),
        }
    seconds = time.perf_counter() - start
    provenance = Provenance.collect(model, seed=seed, parameters=parameters, wall_time=seconds)
    return Result("neurons.dose_response", frame, DOSE_COLUMNS, provenance)


def _check(
    prompts: list[str],
    doses: list[float],
    site: str,
    mode: str,
    units: str,
    n_random: int,
    max_new_tokens: int,
    temperature: float,
    n_seeds: int,
) -> None:
    if not prompts:
        raise InputError("no prompts were given; expected at least one")
    if not doses or not all(map(math.isfinite, doses)) or len(set(doses)) < len(doses):
        raise InputError(f"doses={doses}; expected at least one number, all finite and different")
    for name, value, known in (("site", site, NEURON_SITES), ("units", units, UNITS)):
        if value not in known:
            raise InputError(f"{name}={value!r}; expected one of {', '.join(known)}")
    if mode not in ("set", "add", "scale"):
        raise InputError(f"mode={mode!r}; expected set, add or scale (zero ablation is always one of the arms)")
    if mode == "scale" and units == "sd":
        raise InputError("mode='scale' multiplies by the dose, which has no unit: give units='absolute'")
    if n_random < 1:
        raise InputError(f"n_random={n_random}; expected at least 1: an effect without controls is not an effect")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}; expected at least 1")
    if n_seeds < 1 or (n_seeds > 1 and temperature <= 0):
        raise InputError(
            f"n_seeds={n_seeds} with temperature={temperature}; several samples need a temperature above 0"
        )


def concept_pair(
    model: Model, concept: str | Sequence[str] | Concept, unrelated: str | Sequence[str] | Concept | None
) -> tuple[Concept, Concept | None]:
    """The concept and the unrelated one.

    Raises:
        InputError: one is no single token, or they share a token.
    """
    wanted = concept_of(model, concept)
    if unrelated is None:
        return wanted, None
    other = concept_of(model, unrelated)
    shared = sorted(set(wanted.tokens) & set(other.tokens))
    if shared:
        raise InputError(f"concept {wanted.name!r} and the unrelated {other.name!r} share {shared[0]!r}; give another")
    return wanted, other


def describe_concepts(concept: Concept, unrelated: Concept | None) -> dict[str, Any]:
    """Both concepts for provenance: the tokens that were counted and the spellings that were not."""
    found = {"concept": concept.name, "tokens": concept.tokens, "dropped": sorted(concept.dropped)}
    return found | ({"unrelated": unrelated.name, "unrelated_tokens": unrelated.tokens} if unrelated else {})


def _target(
    model: Model, concept: Concept, site: str, neuron: tuple[int, int] | None, atlas: Atlas | None, progress: bool | str
) -> tuple[int, int]:
    if neuron is not None:
        if len(neuron) != 2:
            raise InputError(f"neuron={neuron!r}; expected (layer, index)")
        return model.arch.check_layer(neuron[0]), model.arch.check_neuron(neuron[1])
    found = candidates(model, concept, site, 1, atlas, progress)
    if found.empty:
        raise no_candidate(concept, [site])
    return int(found["layer"].iloc[0]), int(found["neuron"].iloc[0])
