"""A trained toy model taken apart: parts left out, characters one by one, attention as it is.

Guo et al. 2024 (arXiv 2410.13835), section 2.

1. `intervene_toy` leaves out parts of the model and gives the risks at triggers and at all other positions, with intervals
   over sequences, and the residual norms, which show the part that makes a peak.
2. `toy_characters` gives, character by character, the attention weight on key 0, the attention that it gets, and ‖W_O v‖.
3. `toy_attention` gives one sequence's attention weights as the model computes them: nothing is cleaned up for the eye.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from interp.columns import Column
from interp.errors import InputError
from interp.intervals import bootstrap_mean
from interp.provenance import Provenance
from interp.results import Result
from interp.sinks.bigram_backcopy import BigramBackcopy
from interp.sinks.bigram_dynamics import GROUPS, position_groups, risks
from interp.sinks.bigram_model import ToyModel

INTERVENTION_COLUMNS = (
    Column("intervention", "category", "", "parts whose output is left out; none = the model as it is"),
    Column(
        "quantity",
        "category",
        "",
        "risk: cross-entropy to the true law; sink_mass: attention on key 0, mean over heads; residual_norm: ‖x‖",
    ),
    Column(
        "group",
        "category",
        "",
        "positions: trigger, bigram (all that are no trigger), start (position 0), rest (all others)",
    ),
    Column("layer", "Int16", "block", "whose output; missing for risks"),
    Column("value", "float64", "nats; residual norms as in the model", "mean over sequences of each sequence's mean"),
    Column("low", "float64", "as value", "lower end of the 95 % bootstrap interval over sequences"),
    Column("high", "float64", "as value", "upper end"),
    Column("n", "int64", "sequences", "how many have such a position"),
)
CHARACTER_COLUMNS = (
    Column("token", "int16", "token", "id in the vocabulary"),
    Column("character", "str", "", "what it stands for"),
    Column("group", "category", "", "start = ⟨s⟩, trigger, other"),
    Column("layer", "int16", "block", "whose attention"),
    Column("head", "int16", "head", "which head"),
    Column("sink_mass", "float64", "attention weight", "on key 0, mean over queries of this token behind position 0"),
    Column(
        "received",
        "float64",
        "share",
        "of the attention weight of other characters, what earlier keys of this token get",
    ),
    Column("value_norm", "float64", "as in the model", "‖W_O v‖ of keys of this token, mean"),
    Column("n", "int64", "positions", "where the token stands in the sample"),
)
ATTENTION_COLUMNS = (
    Column("layer", "int16", "block", "whose attention"),
    Column("head", "int16", "head", "which head"),
    Column("query", "int16", "position", "that looks"),
    Column("key", "int16", "position", "that is looked at; not behind the query"),
    Column("query_character", "str", "", "token at the query"),
    Column("key_character", "str", "", "token at the key"),
    Column("weight", "float32", "attention weight", "after softmax or ReLU"),
)


@torch.no_grad()
def intervene_toy(
    model: ToyModel,
    task: BigramBackcopy,
    tokens: Int[Tensor, "sequence position"],
    zero: Mapping[str, Collection[str]] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Result:
    """Risks and residual norms with parts of the model left out.

    Args:
        model: trained.
        task: what the tokens were drawn from.
        tokens: the input, of the model's device; at least 2 sequences for intervals.
        zero: name → parts, such as {"no MLP": ["mlp.0"]}; by default every part by itself, and nothing.
        about: parameters for the provenance.

    Returns:
        The columns of `INTERVENTION_COLUMNS`.

    Raises:
        InputError: a part that the model does not have.
    """
    import pandas as pd

    arms = {"none": (), **({part: (part,) for part in model.parts()} if zero is None else zero)}
    at, law = position_groups(task, tokens), task.law(tokens)
    rows = []
    for name, parts in arms.items():
        trace = model.trace(tokens, parts)
        risk = risks(law, trace.logits)
        measured: list[tuple[str, str, int | None, Tensor]] = [
            ("risk", one, None, risk) for one in ("trigger", "bigram")
        ]
        for layer, pattern in trace.pattern.items():
            measured += [("sink_mass", group, layer, pattern.mean(1)[:, :, 0]) for group in ("trigger", "other")]
        for layer, resid in enumerate(trace.resid[1:]):
            measured += [("residual_norm", group, layer, resid.norm(dim=-1)) for group in ("start", "rest")]
        for quantity, group, block, values in measured:
            means = _by_sequence(values, at[group])
            (low,), (high,) = bootstrap_mean(means[:, None])
            row = {"intervention": name, "quantity": quantity, "group": group, "layer": block, "value": means.mean()}
            rows.append({**row, "low": float(low), "high": float(high), "n": len(means)})
    frame = pd.DataFrame(rows).astype({"layer": "Int16"})
    frame["intervention"] = pd.Categorical(frame["intervention"], list(arms))
    return Result("sinks.intervene_toy", frame, INTERVENTION_COLUMNS, Provenance.collect(parameters=about))


@torch.no_grad()
def toy_characters(
    model: ToyModel,
    task: BigramBackcopy,
    tokens: Int[Tensor, "sequence position"],
    about: Mapping[str, Any] | None = None,
) -> Result:
    """How much each character attends to key 0, and how much its value writes.

    Args:
        model, task, tokens, about: as for `intervene_toy`.

    Returns:
        The columns of `CHARACTER_COLUMNS`; tokens that the sample does not have are left out, and key 0's own query is
        never counted.
    """
    import pandas as pd

    trace = model.trace(tokens)
    names = (*task.characters, "⟨s⟩")
    at = position_groups(task, tokens)
    earlier = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril(-1)
    rows = []
    for token in tokens.unique().tolist():
        where = tokens == token
        kind = "start" if token == task.start_token else "trigger" if token in task.triggers else "other"
        for layer, pattern in trace.pattern.items():
            for head in range(pattern.shape[1]):
                mass = pattern[:, head, :, 0][where & at["rest"]]
                looks = pattern[:, head].masked_fill(~at["other"][:, :, None], 0)  # (sequence, query, key)
                got = (looks * (earlier & where[:, None, :])).sum() / looks.sum()
                norm = trace.value_norm[layer][:, head][where]
                row = {"token": token, "character": names[token], "group": kind, "layer": layer, "head": head}
                row |= {"sink_mass": float(mass.mean()) if mass.numel() else math.nan, "received": float(got)}
                row["value_norm"] = float(norm.mean())
                rows.append({**row, "n": int(where.sum())})
    frame = pd.DataFrame(rows)
    frame["group"] = pd.Categorical(frame["group"], GROUPS[:3])
    return Result("sinks.toy_characters", frame, CHARACTER_COLUMNS, Provenance.collect(parameters=about))


@torch.no_grad()
def toy_attention(
    model: ToyModel,
    task: BigramBackcopy,
    tokens: Int[Tensor, " position"],
    about: Mapping[str, Any] | None = None,
) -> Result:
    """Attention weights of one sequence, all layers and heads.

    Args:
        model, task, about: as for `intervene_toy`.
        tokens: one sequence.

    Returns:
        The columns of `ATTENTION_COLUMNS`, one row per visible pair.
    """
    import pandas as pd

    if tokens.ndim != 1:
        raise InputError(f"tokens of shape {tuple(tokens.shape)}; expected one sequence")
    trace, shown = model.trace(tokens[None]), task.text(tokens)
    query, key = np.tril_indices(len(shown))
    frames = []
    for layer, pattern in trace.pattern.items():
        for head, weights in enumerate(pattern[0].cpu().numpy()):
            frames.append(
                pd.DataFrame(
                    {
                        "layer": layer,
                        "head": head,
                        "query": query,
                        "key": key,
                        "query_character": [shown[at] for at in query],
                        "key_character": [shown[at] for at in key],
                        "weight": weights[query, key],
                    }
                )
            )
    return Result("sinks.toy_attention", pd.concat(frames), ATTENTION_COLUMNS, Provenance.collect(parameters=about))


def _by_sequence(values: Tensor, where: Tensor) -> np.ndarray:
    """(sequence) mean over the chosen positions, of sequences that have one."""
    where = where.cpu()
    counts = where.sum(1)
    means = values.cpu().double().masked_fill(~where, 0).sum(1) / counts
    return means[counts > 0].numpy()
