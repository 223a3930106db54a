"""A fair search for the most effective clamp of a concept: found on some prompts, reported on others.

The best of many clamps looks good on the prompts on which it was chosen, whatever it does. So:

1. Candidates: the neurons whose weights decode to the concept (`interp.neurons.decoding`), for each site: up → "up",
   gate → "gate", down → "hidden".
2. "screen": every candidate at every dose, one forward pass over the search prompts, mean probability of the concept as
   the next token. The best (neuron, sign of the dose) pairs become finalists.
3. "search": finalists answer the search prompts at every dose of their sign. Chosen is the highest mention rate among those
   that stay fluent: median perplexity under the unclamped model at most `max_perplexity_ratio` times that of the
   unclamped answers. Ties: higher probability of the concept, then the smaller dose.
4. "report": the chosen clamp, random neurons of its layer at the same dose, zero ablation and the unclamped model answer
   the report prompts, none of which was searched on.

Doses are in standard deviations of each neuron's own activation, mode "set". Our own protocol; the paper (arXiv
2501.02688) gives none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from interp.architectures import NEURON_SITES
from interp.errors import InputError
from interp.intervene import Clamp
from interp.model import Model
from interp.neurons.atlas import Atlas
from interp.neurons.clamp_doses import DECODED_SITE, Scale, candidates, no_candidate, random_neurons
from interp.neurons.clamped_runs import Run, run_clamped
from interp.neurons.clamping import concept_pair, describe_concepts
from interp.neurons.concepts import Concept
from interp.neurons.responses import ARMS, measure, summary
from interp.provenance import Provenance
from interp.results import Column, Result

STAGES = ("screen", "search", "report")
DOSES = (-160.0, -80.0, -40.0, -20.0, 20.0, 40.0, 80.0, 160.0)
_INTERVALS = tuple(
    Column(f"{name}_{end}", "float64", unit, f"{side} end of its 95 % {kind} interval")
    for name, unit, kind in (
        ("p_concept", "probability", "bootstrap"),
        ("p_unrelated", "probability", "bootstrap"),
        ("kl", "nats", "bootstrap"),
        ("mention_rate", "share", "Wilson"),
        ("perplexity", "perplexity", "bootstrap"),
    )
    for end, side in (("low", "lower"), ("high", "upper"))
)
SEARCH_COLUMNS = (
    Column("concept", "category", "", "the concept as it was given"),
    Column("stage", "category", "", "screen: next token only; search: answers; report: answers to other prompts"),
    Column("arm", "category", "", "clamp; random: another neuron of the layer; zero: ablated; none: unclamped"),
    Column("site", "category", "", "where it is clamped; empty for none"),
    Column("layer", "int16", "layer", "0-based layer; -1 for none"),
    Column("neuron", "int32", "index", "0-based index of the neuron; -1 for none"),
    Column("sign", "int8", "", "sign with which its weights decode to the concept; 0 for controls"),
    Column("probability", "float64", "probability", "of the concept in its decoding; missing for controls"),
    Column("dose", "float64", "sd", "missing for zero and none"),
    Column("value", "float64", "activation", "what was set; missing for none"),
    Column("n", "int32", "answers", "prompts answered"),
    Column("n_prompts", "int32", "prompts", "distinct prompts"),
    Column("p_concept", "float64", "probability", "mean probability of the concept as the next token"),
    Column("rank", "float64", "rank", "median rank of the concept's best token"),
    Column("p_unrelated", "float64", "probability", "mean probability of the unrelated concept"),
    Column("kl", "float64", "nats", "mean KL(clamped ‖ unclamped) of the next token"),
    Column("mention_rate", "float64", "share", "answers that mention the concept; missing when screened"),
    Column("perplexity", "float64", "perplexity", "mean over answers, under the unclamped model"),
    Column("perplexity_median", "float64", "perplexity", "median over answers"),
    Column("perplexity_ratio", "float64", "", "perplexity_median over that of the unclamped answers"),
    Column("n_empty", "int32", "answers", "answers without a token: they have no perplexity"),
    *_INTERVALS,
    Column("fluent", "boolean", "", "perplexity_ratio is within the limit; missing when screened"),
    Column("chosen", "bool", "", "the clamp that the search chose"),
)


@dataclass(frozen=True)
class _Setting:
    """One clamp, or control, under test."""

    arm: str
    site: str = ""
    layer: int = -1
    neuron: int = -1
    sign: int = 0
    probability: float = math.nan
    dose: float = math.nan
    value: float = math.nan

    @property
    def clamp(self) -> Clamp | None:
        if self.arm == "none":
            return None
        return Clamp(self.layer, self.neuron, self.value, self.site, "zero" if self.arm == "zero" else "set")


def search_clamp(
    model: Model,
    concept: str | Sequence[str] | Concept,
    search_prompts: Sequence[str],
    report_prompts: Sequence[str],
    *,
    atlases: Mapping[str, Atlas] | None = None,
    sites: Sequence[str] = NEURON_SITES,
    n_candidates: int = 4,
    doses: Iterable[float | int] = DOSES,
    n_finalists: int = 4,
    max_perplexity_ratio: float = 3.0,
    statistics: Result | None = None,
    sample_texts: Sequence[str] | None = None,
    unrelated: str | Sequence[str] | Concept | None = " chair",
    n_random: int = 3,
    chat: bool = False,
    max_new_tokens: int = 24,
    seed: int = 0,
    max_tokens: int = 4096,
    progress: bool | str = True,
) -> Result:
    """Find the site, neuron, sign and size of clamp that makes a model speak of a concept, and test it on new prompts.

    Args:
        model: what `load_model` gave.
        concept: a word such as " music", several tokens, or a `Concept`.
        search_prompts: prompts on which the clamp is chosen.
        report_prompts: other prompts, on which it is reported.
        atlases: {"up", "gate", "down" (or "hidden"): atlas}; missing ones are decoded here, which takes its time.
        sites: sites to search; "gate" is left out where the MLP has none.
        n_candidates: neurons per site.
        doses: in standard deviations, none 0.
        n_finalists: (neuron, sign of the dose) pairs that answer the search prompts.
        max_perplexity_ratio: how fluent answers must stay, see the module's step 3.
        statistics: what `neuron_statistics` gave for the sites and all layers.
        sample_texts: texts to compute them from; by default the search prompts.
        unrelated: a concept that should not change; `None` for none.
        n_random: random neurons on the report prompts, at least one.
        chat: wrap prompts in the chat template.
        max_new_tokens: longest answer; decoding is greedy.
        seed: of random neurons and the bootstrap.
        max_tokens: budget of tokens in a batch.
        progress: a progress bar on stderr.

    Returns:
        A `Result` of kind "neurons.clamp_search" with `SEARCH_COLUMNS`, one row per candidate and stage. If no finalist
        stays fluent, nothing is chosen and the report holds the unclamped model alone. `attachments["answers"]`
        holds the answers to the report prompts.

    Raises:
        InputError: search and report prompts overlap, or an argument cannot be used (says which and why).

    Example:
        >>> found = search_clamp(model, " music", search, report, chat=True)               # doctest: +SKIP
        >>> found.frame.query("stage == 'report'")                                         # doctest: +SKIP
    """
    start = time.perf_counter()
    search, report = list(search_prompts), list(report_prompts)
    doses = [float(dose) for dose in doses]
    sites = [site for site in sites if site != "gate" or model.arch.family.gate is not None]
    _check(search, report, sites, doses, n_candidates, n_finalists, n_random, max_perplexity_ratio, max_new_tokens)
    wanted, other = concept_pair(model, concept, unrelated)
    found = _candidates(model, wanted, sites, n_candidates, dict(atlases or {}), progress)
    layers = sorted({setting.layer for setting in found})
    scale = Scale.of(model, sites, layers, statistics, sample_texts, search, chat, progress)
    found = [one for one in found if scale.sd(one.site, one.layer, one.neuron) > 0]
    if not found:
        raise InputError(f"none of the candidates for {wanted.name!r} varies over the {scale.source}; give more texts")

    def dosed(one: _Setting, dose: float, **changes: Any) -> _Setting:
        values = {**vars(one), **changes, "dose": dose}
        values["value"] = scale.value(one.site, one.layer, values["neuron"], dose)
        return _Setting(**values)

    test = _Tester(model, wanted, other, chat, max_new_tokens, seed, max_tokens, max_perplexity_ratio, bool(progress))
    screened = test("screen", search, [_Setting("none"), *(dosed(one, dose) for one in found for dose in doses)])
    finalists = _finalists(screened, n_finalists)
    grid = [dosed(one, dose) for one, sign in finalists for dose in doses if dose * sign > 0]
    searched = test("search", search, [_Setting("none"), *grid])
    best = _choose(searched)
    last = [_Setting("none")]
    if best is not None:
        best["chosen"] = True
        chosen: _Setting = best["setting"]
        randoms = random_neurons(model, scale, chosen.site, chosen.layer, [chosen.neuron], n_random, seed)
        control = {"sign": 0, "probability": math.nan}
        last.append(_Setting(**{**vars(chosen), **control, "arm": "zero", "dose": math.nan, "value": 0.0}))
        last += [dosed(chosen, chosen.dose, arm="random", neuron=neuron, **control) for neuron in randoms]
        last.append(chosen)
    reported = test("report", report, last)
    for row in reported:
        row["chosen"] = row["setting"].arm == "clamp"
    rows = [{**vars(row.pop("setting")), **row} for row in (*screened, *searched, *reported)]
    frame = pd.DataFrame(rows).assign(concept=wanted.name)
    frame["arm"], frame["stage"] = pd.Categorical(frame["arm"], ARMS), pd.Categorical(frame["stage"], STAGES)
    parameters: dict[str, Any] = {"sites": sites, "doses": doses, "units": "sd", "mode": "set", "chat": chat}
    parameters |= {"n_candidates": n_candidates, "n_finalists": n_finalists, "n_random": n_random}
    parameters |= {
        "max_perplexity_ratio": max_perplexity_ratio,
        "max_new_tokens": max_new_tokens,
        "sample": scale.source,
    }
    parameters |= {"search_prompts": search, "report_prompts": report, "found": best is not None}
    parameters |= describe_concepts(wanted, other)
    seconds = time.perf_counter() - start
    provenance = Provenance.collect(model, seed=seed, parameters=parameters, wall_time=seconds)
    return Result("neurons.clamp_search", frame, SEARCH_COLUMNS, provenance, {"answers": test.answers})


def _check(
    search: list[str],
    report: list[str],
    sites: list[str],
    doses: list[float],
    n_candidates: int,
    n_finalists: int,
    n_random: int,
    max_perplexity_ratio: float,
    max_new_tokens: int,
) -> None:
    if not search or not report:
        raise InputError(
            f"{len(search)} search and {len(report)} report prompts were given; expected at least one of each"
        )
    both = {text.strip().casefold() for text in search} & {text.strip().casefold() for text in report}
    if both:
        raise InputError(
            f"{len(both)} prompts are in both sets, for example {min(both)!r}: a clamp must be reported on prompts that it "
            f"was not chosen on"
        )
    unknown = [site for site in sites if site not in NEURON_SITES]
    if unknown or not sites:
        raise InputError(f"sites={sites}; expected some of {', '.join(NEURON_SITES)}, and one that the family has")
    if not doses or not all(dose and math.isfinite(dose) for dose in doses) or len(set(doses)) < len(doses):
        raise InputError(f"doses={doses}; expected finite numbers of standard deviations, all different and none 0")
    counts = {"n_candidates": n_candidates, "n_finalists": n_finalists, "n_random": n_random}
    for name, count in {**counts, "max_new_tokens": max_new_tokens}.items():
        if count < 1:
            raise InputError(f"{name}={count}; expected at least 1")
    if not max_perplexity_ratio > 0:
        raise InputError(f"max_perplexity_ratio={max_perplexity_ratio}; expected more than 0")


def _candidates(
    model: Model, concept: Concept, sites: Sequence[str], top: int, atlases: dict[str, Atlas], progress: bool | str
) -> list[_Setting]:
    """The best neurons of every site; a site without any is passed over, unless all are."""
    found = []
    for site in sites:
        atlas = atlases.get(DECODED_SITE[site], atlases.get(site))
        table = candidates(model, concept, site, top, atlas, progress)
        columns = [table[name].tolist() for name in ("layer", "neuron", "sign", "probability")]
        found += [_Setting("clamp", site, *row) for row in zip(*columns, strict=True)]
    if not found:
        raise no_candidate(concept, sites)
    return found


@dataclass
class _Tester:
    """Runs settings on prompts and summarises each over the prompts."""

    model: Model
    concept: Concept
    unrelated: Concept | None
    chat: bool
    max_new_tokens: int
    seed: int
    max_tokens: int
    max_perplexity_ratio: float
    progress: bool

    def __post_init__(self) -> None:
        self.answers: list[dict[str, Any]] = []

    def __call__(self, stage: str, prompts: list[str], settings: list[_Setting]) -> list[dict[str, Any]]:
        """One row per setting, the unclamped model first, with the setting itself under "setting"."""
        encoded = self.model.encode(prompts, chat=self.chat)
        keys = [(setting, at) for setting in settings for at in range(len(prompts))]
        outcomes = run_clamped(
            self.model,
            encoded,
            [Run(at, setting.clamp) for setting, at in keys],
            self.concept.token_ids,
            self.unrelated.token_ids if self.unrelated else (),
            max_new_tokens=0 if stage == "screen" else self.max_new_tokens,
            max_tokens=self.max_tokens,
            progress=f"{stage} {self.concept.word}" if self.progress else False,
        )
        columns = measure(self.model, self.concept, encoded, [at for _, at in keys], outcomes, self.max_tokens, False)
        measured = pd.DataFrame({"prompt_index": [at for _, at in keys], **columns})
        rows = []
        for at, setting in enumerate(settings):
            group = measured.iloc[at * len(prompts) : (at + 1) * len(prompts)]
            row = {"stage": stage, "setting": setting, "chosen": False, **summary(group, seed=self.seed)}
            if stage == "screen":  # no answers, so nothing is known of them
                row |= {name: math.nan for name in row if name.startswith(("mention_rate", "perplexity"))} | {
                    "n_empty": 0
                }
            rows.append(row)
            if stage == "report":
                texts = zip(prompts, group["text"], group["mentions"], group["perplexity"], strict=True)
                about = {"arm": setting.arm, "site": setting.site, "layer": setting.layer, "neuron": setting.neuron}
                self.answers += [
                    {**about, "prompt": prompt, "text": text, "mentions": mentions, "perplexity": perplexity}
                    for prompt, text, mentions, perplexity in texts
                ]
        usual = rows[0]["perplexity_median"]
        for row in rows:
            row["perplexity_ratio"] = row["perplexity_median"] / usual
            # Without a single token in its answers nothing is fluent.
            row["fluent"] = None if stage == "screen" else bool(row["perplexity_ratio"] <= self.max_perplexity_ratio)
        return rows


def _finalists(screened: list[dict[str, Any]], count: int) -> list[tuple[_Setting, int]]:
    """The (neuron, sign of the dose) pairs whose best dose gives the concept most probability."""
    best: dict[tuple[str, int, int, int], tuple[float, _Setting]] = {}
    for row in screened:
        one: _Setting = row["setting"]
        if one.arm == "none":
            continue
        key = (one.site, one.layer, one.neuron, int(np.sign(one.dose)))
        if key not in best or row["p_concept"] > best[key][0]:
            best[key] = (row["p_concept"], one)
    order = sorted(best.items(), key=lambda item: -item[1][0])[:count]
    return [(one, key[3]) for key, (_, one) in order]


def _choose(searched: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fluent clamp with the highest mention rate; ties by the concept's probability, then the smaller dose."""
    fluent = [row for row in searched if row["setting"].arm == "clamp" and row["fluent"]]
    if not fluent:
        return None
    return max(fluent, key=lambda row: (row["mention_rate"], row["p_concept"], -abs(row["setting"].dose)))
