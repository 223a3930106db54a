"""What the model does on subject–verb sentences, and what each score says: measured for `analyses.subject_verb_flow`.

1. *Agreement*: log p(verb in the subject's number) − log p(verb in the other number) behind the beginning, for is/are,
   was/were and has/have. It is a difference of logits, read at the last position.
2. *Blank-out* (Abnar & Zuidema, arXiv 2005.00928, section 4), the reference that is not attention: the same after a
   noun got its other number, after it became one without number ("sheep"), and after each token in turn became " _".
3. *Scores* of both nouns at the last position: raw attention of the top layer, every method of `interp.flow`, and two
   bounds of the flow that know almost nothing. `target_cut`: what the target's own row gives to positions from the noun
   on, since in a causal model all routes to a noun end there. `ends`: the smaller of that and layer 0's column sum.
   On the first n layers ("below": from the input) and on the last n ("above": from what stands at a position by then).
4. Spearman correlation of a score with blank-out by " _" over a sentence's tokens, the document start left out.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor

from analyses.subject_verb_sentences import ROLES, Encoder, Sentence, digest, read_words, verb_tokens
from interp.batching import Batch
from interp.capture import run_probes
from interp.errors import InputError
from interp.flow import AttentionGraph, attention_graph, influence
from interp.flow.influences import CORRECTIONS, METHODS
from interp.model import Model
from interp.provenance import Provenance
from interp.results import Column, Result

SIDES = ("below", "above")
ENDS = ("target_cut", "ends")
ABOUT = (
    Column("sentence", "int32", "index", "0-based index of the sentence"),
    Column(
        "pair", "int32", "index", "0-based index of its pair: the same nouns at the same positions, roles exchanged"
    ),
    Column("frame", "category", "", "kind of sentence, see analyses.subject_verb_sentences"),
    Column("order", "category", "", "which noun is the subject: first or second"),
    Column("congruent", "bool", "", "whether both nouns have the same number"),
    Column("adjective", "bool", "", "whether one stands before the second noun"),
)
AGREEMENT_COLUMNS = (
    *ABOUT,
    Column(
        "replacement", "category", "", "none; number: the noun's other number; neutral: a noun without; blank: ' _'"
    ),
    Column("role", "category", "", "of what is replaced: subject, attractor or other; empty for none"),
    Column("position", "int32", "index", "first position of what is replaced; -1 for none"),
    Column("verbs", "category", "", "singular and plural verb"),
    Column("log_odds", "float64", "nats", "log p(verb in the number of the subject as generated) − log p(the other)"),
)
SCORE_COLUMNS = (
    *ABOUT,
    Column("graph", "category", "", "mean, norm, contribution: how heads become one; uniform: uniform attention"),
    Column("side", "category", "", "below: the first n_layers layers; above: the last"),
    Column("n_layers", "int16", "layers", "layers of the graph"),
    Column("method", "category", "", "how influence on the last position is measured"),
    Column("correction", "category", "", "none, uniform or drop_sink"),
    Column("subject", "float64", "", "score of the subject, in the method's unit"),
    Column("attractor", "float64", "", "score of the attractor"),
    Column("spearman", "float64", "", "rank correlation with blank-out over the sentence's tokens; NaN: constant"),
)


def agreement(model: Model, sentences: Sequence[Sentence], neutral: str | None = None, progress: Any = False) -> Result:
    """Log-odds of the right verb, as the sentence is and after each replacement.

    Args:
        model: a causal LM with a tokenizer.
        sentences: what `generate` gave.
        neutral: a noun without number; our own by default.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        A `Result` of kind "flow.subject_verb_agreement" with `AGREEMENT_COLUMNS`. A soft cap of the logits (Gemma 2) is
        left out, which changes no sign.

    Raises:
        InputError: an encoder, no sentences, or a tokenizer that tells no singular verb from its plural.
    """
    start = time.perf_counter()
    check(model, sentences)
    neutral = read_words()["neutral"][0]["word"] if neutral is None else neutral
    encode = Encoder(model)
    verbs = verb_tokens(encode)
    texts, about = [], []
    for index, one in enumerate(sentences):
        for replacement, role, position, ids in _replacements(encode, one, neutral):
            texts.append(list(ids))
            row = {"replacement": replacement, "role": role, "position": position, "sign": sign(one)}
            about.append(describe(index, one) | row)
    probe = LogitDifferences(model, list(verbs.values()), len(texts))
    run_probes(model, texts, [probe], progress=progress)
    each = pd.DataFrame(about)
    signs = each.pop("sign").to_numpy()
    frame = pd.concat([each.assign(verbs=name, log_odds=probe.found[:, at] * signs) for at, name in enumerate(verbs)])
    parameters = {"verbs": list(verbs), "neutral": neutral}
    return result_of("flow.subject_verb_agreement", frame, AGREEMENT_COLUMNS, model, sentences, parameters, start)


def _replacements(encode: Encoder, one: Sentence, neutral: str) -> list[tuple[str, str, int, tuple[int, ...]]]:
    """(replacement, role, position, token ids) of all that is read for one sentence, the sentence itself first."""
    found = [("none", "", -1, one.ids)]
    role_of: dict[int, str] = {}
    for role in ROLES:
        positions = one.nouns[one.noun(role)]
        role_of |= dict.fromkeys(positions, role)
        for replacement, word in (("number", one.others[one.noun(role)]), ("neutral", neutral)):
            found.append((replacement, role, positions[0], encode(one.replaced(role, word))))
    for position in range(len(encode.start), len(one.ids)):
        ids = (*one.ids[:position], encode.blank, *one.ids[position + 1 :])
        found.append(("blank", role_of.get(position, "other"), position, ids))
    return found


class LogitDifferences:
    """logit(singular verb) − logit(plural verb) at the last position, without the other positions' logits."""

    def __init__(self, model: Model, verbs: Sequence[tuple[int, int]], n: int) -> None:
        self.model, self.verbs = model, torch.tensor(verbs)
        self.sites = [("resid_post", model.arch.n_layers - 1)]
        self.found = np.full((n, len(verbs)), np.nan)

    def update(self, site: str, layer: int, tensor: Tensor, batch: Batch) -> Tensor:
        """(text, verb) differences."""
        last = tensor[torch.arange(batch.size, device=tensor.device), batch.last.to(tensor.device)]
        logits = self.model.head_logits(last).float()
        singular, plural = self.verbs.to(logits.device).unbind(1)
        return (logits[:, singular] - logits[:, plural]).cpu()

    def merge(self, site: str, layer: int, partial: Tensor, batch: Batch) -> None:
        """Keep by text."""
        self.found[list(batch.rows)] = partial.double().numpy()


def log_odds(result: Result) -> pd.DataFrame:
    """Means over the verbs: one row per sentence and replacement.

    Args:
        result: what `agreement` gave.

    Returns:
        `AGREEMENT_COLUMNS` without verbs, and "change": log-odds of the untouched sentence − these, in nats.
    """
    keys = [column.name for column in AGREEMENT_COLUMNS if column.name not in ("verbs", "log_odds")]
    table = result.frame.groupby(keys, observed=True, sort=False)["log_odds"].mean().reset_index()
    untouched = table[table["replacement"] == "none"].set_index("sentence")["log_odds"]
    return table.assign(change=table["sentence"].map(untouched) - table["log_odds"])


def scores(
    model: Model,
    sentences: Sequence[Sentence],
    effects: Sequence[np.ndarray],
    depths: Sequence[int],
    *,
    graphs: Sequence[str] = ("mean", "norm", "contribution"),
    progress: Any = False,
) -> Result:
    """Every score of both nouns at the last position.

    Args:
        model: a causal LM.
        sentences: what `generate` gave.
        effects: per sentence the effect of blanking out each token behind the document start.
        depths: numbers of layers.
        graphs: "mean", of which every method and correction is looked at; "norm" and "contribution", of which raw
            attention, exact and rollout are. Above, there is no correction.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        A `Result` of kind "flow.subject_verb" with `SCORE_COLUMNS`.

    Raises:
        InputError: an encoder, no sentences, a depth out of range, effects that are not of these sentences.
    """
    start = time.perf_counter()
    check(model, sentences)
    if len(effects) != len(sentences):
        raise InputError(f"effects of {len(effects)} sentences were given; expected those of {len(sentences)}")
    texts, rows = [list(one.ids) for one in sentences], []
    for name in graphs:
        options = {"capacity": "contribution"} if name == "contribution" else {"heads": name}
        made = attention_graph(model, texts, progress=progress, **options)
        for index, (one, graph) in enumerate(zip(sentences, made, strict=True)):
            about, given = describe(index, one), (one, effects[index], depths)
            rows += [about | {"graph": name} | row for row in graph_scores(graph, *given, every=name == "mean")]
            if name == graphs[0]:
                alone = graph_scores(graph.uniform(), *given, methods=("exact", "rollout"), sides=SIDES[:1])
                rows += [about | {"graph": "uniform"} | row for row in alone]
    parameters = {"depths": list(depths), "graphs": list(graphs)}
    return result_of("flow.subject_verb", pd.DataFrame(rows), SCORE_COLUMNS, model, sentences, parameters, start)


def graph_scores(
    graph: AttentionGraph,
    sentence: Sentence,
    effect: np.ndarray,
    depths: Sequence[int],
    *,
    every: bool = True,
    methods: Sequence[str] | None = None,
    sides: Sequence[str] = SIDES,
) -> list[dict[str, Any]]:
    """Rows of `SCORE_COLUMNS`, from "side" on, of one sentence's graph.

    Args:
        graph: of all layers.
        sentence: whose nouns are scored.
        effect: of blanking out each token behind the document start.
        depths: numbers of layers.
        every: all methods and corrections; else raw attention, exact and rollout, as they are and without the sink.
        methods: these alone, without correction.
        sides: of `SIDES`.
    """
    chosen = methods or (("raw", *METHODS, *ENDS) if every else ("raw", "exact", "rollout"))
    corrections = ("none",) if methods else CORRECTIONS if every else ("none", "drop_sink")
    rows = []
    for side in sides:
        for depth in depths:
            part = graph.below(depth) if side == "below" else above(graph, depth)
            for method in chosen:
                # In one row of attention the corrections change no order between nouns.
                plain = side == "above" or method in ("raw", *ENDS)
                for correction in ("none",) if plain else corrections:
                    nouns, tokens = _noun_scores(part, sentence, method, correction)
                    row = {"side": side, "n_layers": depth, "method": method, "correction": correction}
                    row |= {role: float(nouns[sentence.noun(role)]) for role in ROLES}
                    rows.append(row | {"spearman": spearman(tokens[len(tokens) - len(effect) :], effect)})
    return rows


def above(graph: AttentionGraph, n_layers: int) -> AttentionGraph:
    """The graph of its last layers alone: how much of what stands at a position below them reaches the target.

    Raises:
        InputError: fewer than one layer, or more than there are.
    """
    if not 1 <= n_layers <= graph.n_layers:
        raise InputError(f"n_layers={n_layers}; expected 1 … {graph.n_layers}, the graph's layers")
    return dataclasses.replace(graph, attention=graph.attention[-n_layers:], layers=graph.layers[-n_layers:])


def _noun_scores(graph: AttentionGraph, one: Sentence, method: str, correction: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the first and the second noun, and of every token."""
    if method == "raw":
        tokens = graph.attention[-1, -1].double().numpy()
        return np.array([tokens[list(noun)].sum() for noun in one.nouns]), tokens
    if method in ENDS:
        tokens = graph.capacity[-1, -1].double().flip(0).cumsum(0).flip(0).numpy()
        nouns = np.array([tokens[min(noun)] for noun in one.nouns])
        if method == "target_cut":
            return nouns, tokens
        bounds = _noun_scores(graph, one, "bound", correction)
        return np.minimum(nouns, bounds[0]), np.minimum(tokens, bounds[1])
    groups: list[tuple[int, ...]] = [(position,) for position in range(len(graph))]
    groups += [noun for noun in one.nouns if len(noun) > 1]  # words of several tokens count as one source
    values = influence(graph, [-1], groups, method=method, correction=correction)[0].double().numpy()
    at = dict(zip(groups, values, strict=True))
    return np.array([at[noun] for noun in one.nouns]), values[: len(graph)]


def spearman(score: np.ndarray, effect: np.ndarray) -> float:
    """Rank correlation; NaN where one of them is constant or not a number.

    Example:
        >>> round(spearman(np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.7, 0.5])), 6)
        0.5
    """
    if len(score) != len(effect):
        raise InputError(
            f"{len(score)} scores and {len(effect)} effects; expected one effect per token behind the start"
        )
    if np.isnan(score).any() or np.ptp(score) == 0 or np.ptp(effect) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(score), rankdata(effect))[0, 1])


def sign(one: Sentence) -> int:
    """1 where the singular verb is right, -1 where the plural is."""
    return 1 if one.numbers[one.noun("subject")] == "singular" else -1


def describe(index: int, one: Sentence) -> dict[str, Any]:
    """Values of `ABOUT`."""
    about = {name: getattr(one, name) for name in ("pair", "frame", "order", "congruent", "adjective")}
    return {"sentence": index, **about}


def check(model: Model, sentences: Sequence[Sentence]) -> None:
    """Refuse encoders, and no sentences."""
    if not model.arch.family.decoder:
        raise InputError(f"{model.name} is an encoder; which verb comes next is a question for a causal language model")
    if not sentences:
        raise InputError("no sentences were given; expected what generate gives")


def result_of(
    kind: str,
    frame: pd.DataFrame,
    columns: tuple[Column, ...],
    model: Model,
    sentences: Sequence[Sentence],
    parameters: dict[str, Any],
    start: float,
) -> Result:
    """A result that names its model and its sentences."""
    parameters = {"sentences": digest(sentences), "n_sentences": len(sentences), **parameters}
    provenance = Provenance.collect(model, parameters=parameters, wall_time=time.perf_counter() - start)
    return Result(kind, frame, columns, provenance)
