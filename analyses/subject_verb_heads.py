"""Which head attends to the subject, and is it used? Part of `analyses.subject_verb_flow`.

1. *Heads*: what each gives from the last position to either noun.
2. *Best heads*: chosen on one half of the pairs, measured on the other, beside the mean of their layer's heads and
   beside the exact flow.
3. *Switched off*: the lead of the right verb, log p(right) − log p(wrong), without the best head, and without other
   heads of its layer, on the pairs that did not choose it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analyses.subject_verb_measures import ABOUT, LogitDifferences, check, describe, result_of, sign
from analyses.subject_verb_sentences import ROLES, Encoder, Sentence, verb_tokens
from analyses.subject_verb_tables import cells, paired, references, summary, with_interval
from interp.batching import Batch
from interp.capture import run_probes
from interp.intervene import HeadAblation, intervene
from interp.model import Model
from interp.plotting import PALETTE, band, figure
from interp.results import Column, Result

HEAD_COLUMNS = (
    *ABOUT,
    Column("layer", "int16", "layer", "0-based layer"),
    Column("head", "int16", "head", "0-based head"),
    Column("subject", "float32", "", "attention from the last position to the subject"),
    Column("attractor", "float32", "", "attention from the last position to the attractor"),
)
OFF_COLUMNS = (
    *ABOUT,
    Column("arm", "category", "", "none: the model as it is; head: without the chosen head; control: without another"),
    Column("layer", "int16", "layer", "0-based layer of the head; -1 for none"),
    Column("head", "int16", "head", "0-based head that is switched off; -1 for none"),
    Column("log_odds", "float64", "nats", "log p(right verb) − log p(wrong verb), mean over the verbs"),
)


def heads(model: Model, sentences: Sequence[Sentence], progress: Any = False) -> Result:
    """Every head's attention from the last position to either noun.

    Args:
        model: a causal LM.
        sentences: what `generate` gave.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        A `Result` of kind "flow.subject_verb_heads" with `HEAD_COLUMNS`.
    """
    start = time.perf_counter()
    check(model, sentences)
    probe = _LastRows(model, sentences)
    run_probes(model, [list(one.ids) for one in sentences], [probe], progress=progress)
    n, n_layers, n_heads, _ = probe.found.shape
    about = pd.DataFrame([describe(index, one) for index, one in enumerate(sentences)])
    frame = about.loc[np.repeat(np.arange(n), n_layers * n_heads)].reset_index(drop=True)
    frame["layer"] = np.tile(np.repeat(np.arange(n_layers), n_heads), n)
    frame["head"] = np.tile(np.arange(n_heads), n * n_layers)
    for column, role in enumerate(ROLES):
        frame[role] = probe.found[..., column].reshape(-1)
    return result_of("flow.subject_verb_heads", frame, HEAD_COLUMNS, model, sentences, {}, start)


class _LastRows:
    """(sentence, layer, head, role) attention from the last position."""

    def __init__(self, model: Model, sentences: Sequence[Sentence]) -> None:
        self.nouns = [[list(one.nouns[one.noun(role)]) for role in ROLES] for one in sentences]
        self.sites = [("pattern", layer) for layer in range(model.arch.n_layers)]
        self.found = np.zeros((len(sentences), model.arch.n_layers, model.arch.n_heads, len(ROLES)), np.float32)

    def update(self, site: str, layer: int, tensor: Tensor, batch: Batch) -> list[Tensor]:
        """(head, role) of each text; padding is on the right, so that positions are the sentence's own."""
        rows = []
        for at, row in enumerate(batch.rows):
            last = tensor[at, :, int(batch.last[at])].float()  # (head, key)
            rows.append(torch.stack([last[:, noun].sum(1) for noun in self.nouns[row]], 1).cpu())
        return rows

    def merge(self, site: str, layer: int, partial: list[Tensor], batch: Batch) -> None:
        """Keep by text."""
        for row, values in zip(batch.rows, partial, strict=True):
            self.found[row, layer] = values.numpy()


def best_heads(frame: pd.DataFrame, half: pd.Series, flow: pd.Series, n: int = 5) -> pd.DataFrame:
    """The heads that rank the subject best on one half of the pairs, and what they do on the other.

    Args:
        frame: of the result of `heads`.
        half: what `analyses.subject_verb_tables.halves` gave.
        flow: {pair: accuracy of what the heads are compared with}, the exact flow through all layers.
        n: how many heads.

    Returns:
        layer, index, head (its name); accuracy where chosen, and on the other half accuracy, first, second, controlled;
        the accuracy of the mean of its layer's heads; how much it is above the flow, paired; n (pairs of the other
        half).
    """
    pairs = paired(frame, ["layer", "head"])
    chooses = pairs["pair"].map(half).astype(bool)
    order = pairs[chooses].groupby(["layer", "head"])["accuracy"].mean().sort_values(ascending=False, kind="stable")
    layers = paired(mean_heads(frame), ["layer"]).set_index(["layer", "pair"])["accuracy"]
    rows = []
    for layer, head in order.index[:n]:
        fresh = pairs[~chooses & (pairs["layer"] == layer) & (pairs["head"] == head)].set_index("pair")
        together = layers.loc[layer].loc[fresh.index]
        rows.append(
            {"layer": layer, "index": head, "head": f"L{layer}H{head}", "accuracy where chosen": order[layer, head]}
            | with_interval("accuracy", fresh["accuracy"])
            | {"first": fresh["first"].mean(), "second": fresh["second"].mean()}
            | with_interval("controlled", fresh["controlled"])
            | {"its layer's mean": together.mean()}
            | with_interval("above flow", fresh["accuracy"] - flow.loc[fresh.index])
            | {"n": len(fresh)}
        )
    return pd.DataFrame(rows)


def mean_heads(frame: pd.DataFrame) -> pd.DataFrame:
    """The same for the mean of a layer's heads."""
    keys = ["layer", "sentence", "pair", "frame", "order", "congruent"]
    return frame.groupby(keys, observed=True, sort=False)[list(ROLES)].mean().reset_index()


def head_table(best: pd.DataFrame) -> pd.DataFrame:
    """What `best_heads` gave, each figure with its interval as text."""
    shown = best[["head"]].assign(**{"when chosen": best["accuracy where chosen"]})
    shown["balanced accuracy"] = cells(best, "accuracy")
    shown[["subject first", "subject second"]] = best[["first", "second"]]
    shown["controlled"] = cells(best, "controlled")
    shown["its layer's mean"] = best["its layer's mean"]
    shown["above exact flow"] = cells(best, "above flow")
    return shown.assign(n=best["n"])


def switched_off(
    model: Model, sentences: Sequence[Sentence], head: tuple[int, int], controls: Sequence[tuple[int, int]]
) -> Result:
    """The lead of the right verb without a head, and without each of the controls.

    Args:
        model: a causal LM with a tokenizer.
        sentences: of `generate`; those that did not choose the head.
        head: layer and head; its output is set to zero.
        controls: others, each switched off by itself.

    Returns:
        A `Result` of kind "flow.subject_verb_switched_off" with `OFF_COLUMNS`.
    """
    start = time.perf_counter()
    check(model, sentences)
    verbs = list(verb_tokens(Encoder(model)).values())
    signs = np.array([sign(one) for one in sentences])
    about = pd.DataFrame([describe(index, one) for index, one in enumerate(sentences)])
    arms: list[tuple[str, int, int]] = [("none", -1, -1), ("head", *head), *(("control", *pair) for pair in controls)]
    frames = []
    for arm, layer, at in arms:
        probe = LogitDifferences(model, verbs, len(sentences))
        with intervene(model, *([] if arm == "none" else [HeadAblation(layer, at)])):
            run_probes(model, [list(one.ids) for one in sentences], [probe])
        frames.append(about.assign(arm=arm, layer=layer, head=at, log_odds=probe.found.mean(1) * signs))
    parameters = {"head": list(head), "controls": [list(pair) for pair in controls]}
    frame = pd.concat(frames)
    return result_of("flow.subject_verb_switched_off", frame, OFF_COLUMNS, model, sentences, parameters, start)


def controls_of(head: tuple[int, int], n_heads: int, n: int = 3, seed: int = 0) -> list[tuple[int, int]]:
    """Random other heads of a head's layer, as many as there are up to n.

    Example:
        >>> len(controls_of((26, 0), 9)), (26, 0) in controls_of((26, 0), 9, 8)
        (3, False)
    """
    others = [(head[0], other) for other in range(n_heads) if other != head[1]]
    order = np.random.default_rng(seed).permutation(len(others))[:n]
    return [others[at] for at in sorted(order.tolist())]


def layer_figure(frame: pd.DataFrame, name: str) -> Any:
    """Balanced accuracy of every head's attention and of the mean of heads, layer by layer."""
    each = paired(frame, ["layer", "head"]).groupby(["layer", "head"])["accuracy"].mean().reset_index()
    together = summary(paired(mean_heads(frame), ["layer"]), ["layer"])
    drawn = figure(
        "Which layer's attention finds the subject?",
        "layer",
        "balanced accuracy",
        subtitle=f"{name}, {frame['pair'].nunique()} pairs of sentences; dots: heads; ribbon: 95 % over pairs",
    )
    band(
        drawn,
        together["layer"],
        together["accuracy"],
        together["accuracy low"],
        together["accuracy high"],
        name="mean of heads",
        color=PALETTE[1],
    )
    drawn.add_scatter(
        x=each["layer"].astype("float32"),
        y=each["accuracy"].astype("float32"),
        customdata=each[["head"]].to_numpy(),
        mode="markers",
        name="each head",
        marker={"color": PALETTE[0], "opacity": 0.55},
        hovertemplate="L%{x}H%{customdata[0]}: %{y:.3f}",
    )
    drawn.update_xaxes(range=[-0.12 * len(together), len(together)])
    references(drawn, {"position alone": 0.5}, lowest=0.0)
    return drawn
