"""What is measured in a toy model at one moment of its training: risks, sinks, drains and peaks, as long-form rows.

Definitions of Guo et al. 2024 (arXiv 2410.13835), sections 2 and 3, on a fixed sample of sequences:

1. Risk: cross-entropy to the true law of the next token, in nats, at triggers (backcopy) and at all others (bigram);
   `entropy` is that law's own at the same positions, so that risk − entropy carries no noise of the sample.
2. Sink mass: mean attention weight on key 0, over the queries behind position 0, by what the query is. `previous_mass`:
   on the token before the query, which is what a trigger has to copy.
3. Value norm ‖W_O v‖ per head, and residual norm ‖x‖ of each block's output, at position 0, at triggers and at other
   characters.
4. Δlogit: q·k/√d of key 0 minus its mean over the other visible keys (neither key 0 nor the query itself), over queries
   from position 2.

Position 0 holds ⟨s⟩, or the first character where there is none; the group is called "start" either way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.columns import Column
from interp.sinks.bigram_backcopy import BigramBackcopy
from interp.sinks.bigram_model import ToyModel, Trace

if TYPE_CHECKING:
    import pandas as pd

QUANTITIES = (
    *("risk", "entropy", "sink_mass", "previous_mass", "delta_logit", "value_norm"),
    *("residual_norm", "residual_median", "residual_max"),
)
GROUPS = ("start", "trigger", "other", "bigram", "rest")
MEASURES = (
    Column("quantity", "category", "", "what is measured: " + ", ".join(QUANTITIES)),
    Column(
        "group",
        "category",
        "",
        "positions (queries for masses and Δlogit, keys for norms): start = position 0; trigger; other = characters that are no "
        "trigger, behind position 0; bigram = start and other; rest = all behind position 0",
    ),
    Column("layer", "Int16", "block", "which block, from 0; missing for the whole model"),
    Column("head", "Int16", "head", "which head; missing where heads are not told apart"),
    Column(
        "value",
        "float64",
        "risk and entropy: nats; masses: attention weight; others: as in the model",
        "mean over n; residual_median and residual_max: median and maximum",
    ),
    Column("n", "int64", "positions", "how many positions the value rests on"),
)


def measure(model: ToyModel, task: BigramBackcopy, tokens: Int[Tensor, "sequence position"]) -> pd.DataFrame:
    """Everything above, for a model as it is.

    Args:
        model: on the device of the tokens.
        task: what the tokens were drawn from.
        tokens: the input; at least 3 positions.

    Returns:
        The columns of `MEASURES`.
    """
    import pandas as pd

    trace = model.trace(tokens)
    at = position_groups(task, tokens)
    rows: list[dict[str, object]] = []

    def add(quantity: str, group: str, values: Tensor, layer: int | None = None, head: int | None = None) -> None:
        if values.numel():
            mean = float(values.cpu().double().mean())
            row = {"quantity": quantity, "group": group, "layer": layer, "head": head, "value": mean}
            rows.append({**row, "n": values.numel()})

    law = task.law(tokens)
    risk = risks(law, trace.logits)
    entropy = torch.special.entr(law).sum(-1)
    for group in ("trigger", "bigram"):
        add("risk", group, risk[at[group]])
        add("entropy", group, entropy[at[group]])
    for layer in trace.pattern:
        heads = trace.pattern[layer].shape[1]
        difference = delta_logits(trace, layer)
        for head in range(heads):
            pattern = trace.pattern[layer][:, head]
            previous = pattern[:, 1:].diagonal(dim1=1, dim2=2)  # (sequence, position − 1): the key before each query
            for group in ("trigger", "other"):
                where = at[group]
                add("sink_mass", group, pattern[:, :, 0][where], layer, head)
                add("previous_mass", group, previous[where[:, 1:]], layer, head)
                add("delta_logit", group, difference[:, head][where[:, 2:]], layer, head)
            for group in ("start", "trigger", "other"):
                add("value_norm", group, trace.value_norm[layer][:, head][at[group]], layer, head)
    for layer, resid in enumerate(trace.resid[1:]):
        norm = resid.norm(dim=-1)
        for group in ("start", "trigger", "other"):
            add("residual_norm", group, norm[at[group]], layer)
        rest = norm[at["rest"]]
        for quantity, value in (("residual_median", rest.median()), ("residual_max", rest.max())):
            row = {"quantity": quantity, "group": "rest", "layer": layer, "head": None, "value": float(value)}
            rows.append({**row, "n": rest.numel()})
    frame = pd.DataFrame(rows)
    frame["quantity"] = pd.Categorical(frame["quantity"], QUANTITIES)
    frame["group"] = pd.Categorical(frame["group"], GROUPS)
    return frame.astype({"layer": "Int16", "head": "Int16"})


def position_groups(task: BigramBackcopy, tokens: Int[Tensor, "sequence position"]) -> dict[str, Tensor]:
    """Group → (sequence, position) which positions belong to it."""
    trigger = task.is_trigger(tokens)
    start = torch.zeros_like(trigger)
    start[:, 0] = True
    return {"start": start, "trigger": trigger, "other": ~trigger & ~start, "bigram": ~trigger, "rest": ~start}


def risks(
    law: Float[Tensor, "sequence position vocabulary"], logits: Float[Tensor, "sequence position vocabulary"]
) -> Float[Tensor, "sequence position"]:
    """Cross-entropy of a prediction to the true law, in nats, at every position."""
    return -(law * logits.float().log_softmax(-1)).sum(-1)


def delta_logits(trace: Trace, layer: int) -> Float[Tensor, "sequence head query"]:
    """Δlogit of every query from position 2 on; only keys that it sees are averaged."""
    scores = trace.scores[layer]
    positions = scores.shape[-1]
    between = torch.ones(positions, positions, dtype=torch.bool, device=scores.device).tril(-1)
    between[:, 0] = False  # (query, key): neither key 0 nor the query itself
    others = scores.masked_fill(~between, 0).sum(-1)[..., 2:] / between.sum(-1)[2:]
    return scores[..., 2:, 0] - others
