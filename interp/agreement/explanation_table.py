"""Explanations as a table: one score per example, method, seed and explained unit; and what every run of a method cost.

A *unit* is a token of the text that is explained, or a word whose tokens' scores are summed. Template, few-shot prefix and
special tokens are no units unless asked for. A method without randomness has seed 0 alone, which stands for every seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp.errors import InputError
from interp.results import Column, Result

RANK_BY = ("abs", "signed")
EXPLANATION_COLUMNS = (
    Column("example", "int32", "index", "0-based index of the example"),
    Column("method", "category", "", "what explains"),
    Column("seed", "int16", "", "of the method's random draws; 0 alone where it draws nothing"),
    Column("unit", "int32", "index", "0-based index of the token or word in the explained text"),
    Column("position", "int32", "index", "position of the unit's first token in the model's input"),
    Column("token", "str", "", "the unit's text"),
    Column(
        "score", "float64", "", "attributions: in the target's unit; attention and baselines: their own; NaN: failed"
    ),
    Column("value", "float64", "", "the target f(x) on the example: nats, logits or a probability"),
    Column("baseline_value", "float64", "", "f(x₀): the same with every unit replaced by the baseline"),
    Column(
        "completeness_error",
        "float64",
        "",
        "|Σ score − (f(x) − f(x₀))| / |f(x) − f(x₀)| of any attribution",
    ),
    Column(
        "model_calls", "int32", "texts", "passes of one text that the method asked for; forward and backward are one"
    ),
    Column("computed", "int32", "texts", "those that were not known from another method of the same process"),
    Column("seconds", "float64", "s", "wall time of the method, its batches shared equally among the examples"),
)
RUN_COLUMNS = ("value", "baseline_value", "completeness_error", "model_calls", "computed", "seconds")


def score_vectors(explanations: Result, rank_by: str = "abs") -> dict[int, dict[tuple[str, int], np.ndarray]]:
    """{example: {(method, seed): (unit) scores}}, in the table's order.

    Args:
        explanations: what `interp.agreement.explain` gave.
        rank_by: "abs", what counts is how far a score is from 0; or "signed".

    Raises:
        InputError: another kind of result, or another `rank_by`.
    """
    if getattr(explanations, "kind", None) != "agreement.explain":
        raise InputError(f"{explanations!r:.60}; expected what interp.agreement.explain gives")
    if rank_by not in RANK_BY:
        raise InputError(f"rank_by={rank_by!r}; expected one of {', '.join(RANK_BY)}")
    frame = explanations.frame
    scores = frame["score"].to_numpy(float)
    scores = np.abs(scores) if rank_by == "abs" else scores
    vectors: dict[int, dict[tuple[str, int], np.ndarray]] = {}
    keys = ["example", "method", "seed"]
    groups: Any = frame.groupby(keys, sort=False, observed=True).indices
    for (example, method, seed), rows in groups.items():
        order = rows[np.argsort(frame["unit"].to_numpy()[rows], kind="stable")]
        vectors.setdefault(int(example), {})[str(method), int(seed)] = scores[order]
    return vectors


def seeds_of(explanations: Result) -> dict[str, list[int]]:
    """{method: its seeds}, in the table's order."""
    pairs = explanations.frame[["method", "seed"]].drop_duplicates()
    found: dict[str, list[int]] = {}
    for method, seed in zip(pairs["method"].astype(str), pairs["seed"], strict=True):
        found.setdefault(method, []).append(int(seed))
    return found


def runs(explanations: Result) -> pd.DataFrame:
    """One row per example, method and seed: value, completeness error, model calls, time."""
    keys = ["example", "method", "seed"]
    return explanations.frame.drop_duplicates(keys)[[*keys, *RUN_COLUMNS]].reset_index(drop=True)


def costs(explanations: Result) -> pd.DataFrame:
    """Per method: median completeness error, model calls and seconds per example and seed, failed explanations.

    Returns:
        Columns method, completeness_error, model_calls, computed, seconds, n (examples × seeds), failed.
    """
    each = runs(explanations)
    failed = explanations.frame.groupby(["example", "method", "seed"], sort=False, observed=True)["score"]
    each = each.assign(failed=failed.apply(lambda score: not np.isfinite(score).all()).to_numpy())
    table = each.groupby("method", sort=False, observed=True).agg(
        completeness_error=("completeness_error", "median"),
        model_calls=("model_calls", "mean"),
        computed=("computed", "mean"),
        seconds=("seconds", "mean"),
        n=("example", "size"),
        failed=("failed", "sum"),
    )
    return table.reset_index().assign(method=lambda frame: frame["method"].astype(str))


def explained(explanations: Result) -> list[dict[str, Any]]:
    """What was explained, one dictionary per example: "text", "label", "predicted", "probability", "units"."""
    examples: Sequence[dict[str, Any]] = explanations.attachments["examples"]
    return list(examples)
