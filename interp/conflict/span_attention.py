"""Where the last prompt token looks, span by span, with and without conflict: means over heads and pairs, by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from interp.conflict.dialogues import SPANS
from interp.conflict.localization import CONFLICT, KIND, control_of
from interp.errors import InputError
from interp.intervals import bootstrap_mean_clustered
from interp.results import Result


def attention_by_span(
    result: Result,
    heads: Sequence[tuple[int, int]] | None = None,
    *,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Attention of the last token on each span, in the consistent, the control's and the conflicting prompt.

    Args:
        result: what `localize` gave.
        heads: (layer, head) over which a layer's mean is taken; all by default. Layers without one are left out.
        n_resamples, level, seed: of the bootstrap over tasks.

    Returns:
        prompt ("consistent", the control's: "paraphrase" or "other", "conflict"), span, layer, mean, low, high (missing for a
        single task), n_heads, n_pairs, n_tasks. The means of one prompt and layer sum to 1, save for what attention-sink
        logits take.

    Raises:
        InputError: another kind of result, no row, or a head that is not in it (it is named).

    Example:
        >>> attention_by_span(result, focal_heads(result))                                 # doctest: +SKIP
    """
    if result.kind != KIND:
        raise InputError(f"a result of kind {result.kind!r}; expected {KIND!r}, what interp.conflict.localize gives")
    frame = result.frame
    if heads is not None:
        there = set(zip(frame["layer"], frame["head"], strict=True))
        lost = [(layer, head) for layer, head in heads if (layer, head) not in there]
        if lost or not heads:
            raise InputError(f"heads={list(heads)!r:.80}; expected some (layer, head) of the result{_which(lost)}")
        frame = frame[pd.MultiIndex.from_frame(frame[["layer", "head"]]).isin(list(heads))]
    if frame.empty:
        raise InputError("the result has no row; expected those of at least one pair")
    n_heads = frame.groupby("layer")["head"].nunique()
    parts = []
    for prompt in ("consistent", control_of(result), CONFLICT):
        side = "consistent" if prompt == "consistent" else "compared"
        names = [f"{side}_{span}" for span in SPANS]
        # The consistent prompt stands in both contrasts' rows.
        rows = frame[frame["contrast"] == (CONFLICT if prompt == "consistent" else prompt)]
        means = rows.groupby(["pair", "task", "layer"], observed=True, sort=False)[names].mean().unstack("layer")
        tasks = means.index.get_level_values("task").astype(str).to_numpy()
        values = means.to_numpy(np.float64)
        low, high = bootstrap_mean_clustered(values, tasks, n_resamples, level, seed)
        table = means.columns.to_frame(index=False).set_axis(["span", "layer"], axis=1)
        table["span"] = table["span"].str.removeprefix(f"{side}_")
        table.insert(0, "prompt", prompt)
        numbers = {"mean": values.mean(0), "low": low, "high": high, "n_heads": table["layer"].map(n_heads)}
        parts.append(table.assign(**numbers, n_pairs=len(means), n_tasks=len(set(tasks))))
    found = pd.concat(parts, ignore_index=True)
    order = found["span"].map({span: at for at, span in enumerate(SPANS)})
    return (
        found.assign(order=order)
        .sort_values(["order", "layer"], kind="stable")
        .drop(columns="order")
        .reset_index(drop=True)
    )


def _which(lost: Sequence[tuple[int, int]]) -> str:
    return f", which has no {lost[0]}" if lost else ""
