"""What a clamp did: the measures of every run, and their means with intervals.

A mention is a spelling of the concept as a whole word, in any case. Means come with 95 % intervals: percentile bootstrap
that resamples whole prompts, since answers to one prompt are alike, and Wilson's interval for the mention rate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp.model import Model
from interp.neurons.atlas import wilson
from interp.neurons.clamped_runs import Outcome, perplexities
from interp.neurons.concepts import Concept
from interp.results import Column, Result

ARMS = ("none", "zero", "random", "clamp")
MEASURES = (
    Column("p_concept", "float64", "probability", "next token after the prompt is one of the concept's tokens"),
    Column("rank", "int32", "rank", "of the concept's most probable token as the next one; 1 is the top"),
    Column("p_unrelated", "float64", "probability", "likewise for the unrelated concept's tokens"),
    Column("kl", "float64", "nats", "KL(clamped ‖ unclamped) of the next token"),
    Column("text", "str", "", "the continuation"),
    Column("mentions", "bool", "", "the continuation has one of the concept's spellings as a whole word, in any case"),
    Column("perplexity", "float64", "perplexity", "of the continuation under the unclamped model; missing if empty"),
    Column("n_tokens", "int32", "tokens", "length of the continuation, end token excluded"),
)


def measure(
    model: Model,
    concept: Concept,
    encoded: Sequence[Sequence[int]],
    prompts: Sequence[int],
    outcomes: Sequence[Outcome],
    max_tokens: int,
    progress: bool | str,
) -> dict[str, list[Any]]:
    """The columns `MEASURES` of outcomes; `prompts` are the outcomes' prompt indices."""
    continuations = [(at, one.ids) for at, one in zip(prompts, outcomes, strict=True)]
    fluency = perplexities(
        model, encoded, continuations, max_tokens=max_tokens, progress="perplexity" if progress else False
    )
    texts = [model.decode(one.ids) if one.ids else "" for one in outcomes]
    pattern = mention_pattern(concept)
    return {
        **{name: [getattr(one, name) for one in outcomes] for name in ("p_concept", "rank", "p_unrelated", "kl")},
        "text": texts,
        "mentions": [bool(pattern.search(text)) for text in texts],
        "perplexity": fluency,
        "n_tokens": [len(one.ids) for one in outcomes],
    }


def mention_pattern(concept: Concept) -> re.Pattern[str]:
    """Matches any spelling of a concept as a whole word, in any case; also those that are several tokens.

    Example:
        >>> bool(mention_pattern(Concept(" dog", (5,), (" dog",), {" dogs": (" d", "ogs")})).search("Hot DOGS!"))
        True
    """
    words = {word.strip().lower() for word in (concept.name, *concept.tokens, *concept.dropped)} - {""}
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)


def summarise(result: Result | pd.DataFrame, *, n_bootstrap: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Means of a dose-response result per concept, arm and dose, with 95 % intervals.

    Args:
        result: what `dose_response` gave, or its frame (or several of them, concatenated).
        n_bootstrap: resamples.
        seed: of the bootstrap.

    Returns:
        concept, arm, site, dose, n (rows), n_prompts; `p_concept`, `p_unrelated`, `kl` and `perplexity`: means over rows,
        each with `_low` and `_high`, a percentile bootstrap that resamples whole prompts (missing for a single
        prompt); `mention_rate` with Wilson's interval over rows (`_low`, `_high`); `rank` and `perplexity_median`:
        medians; n_empty (continuations without a token, which have no perplexity).

    Example:
        >>> summarise(result).query("arm == 'clamp'")                  # doctest: +SKIP
    """
    frame = result if isinstance(result, pd.DataFrame) else result.frame
    rows = []
    groups = frame.groupby(["concept", "arm", "site", "dose"], observed=True, dropna=False, sort=True)
    for key, group in groups:
        rows.append(dict(zip(("concept", "arm", "site", "dose"), key, strict=True)) | summary(group, n_bootstrap, seed))
    return pd.DataFrame(rows)


def summary(group: pd.DataFrame, n_bootstrap: int = 2000, seed: int = 0) -> dict[str, Any]:
    """One row of `summarise`: the measures of runs that belong together."""
    prompts = group["prompt_index"].to_numpy()
    found: dict[str, Any] = {"n": len(group), "n_prompts": len(np.unique(prompts))}
    for name in ("p_concept", "p_unrelated", "kl", "perplexity"):
        values = group[name].to_numpy(dtype=np.float64)
        known = ~np.isnan(values)
        found[name] = float(values[known].mean()) if known.any() else math.nan
        found[f"{name}_low"], found[f"{name}_high"] = bootstrap(values[known], prompts[known], n_bootstrap, seed)
    mentions = int(group["mentions"].sum())
    found["mention_rate"] = mentions / len(group)
    found["mention_rate_low"], found["mention_rate_high"] = wilson(mentions, len(group))
    found["rank"] = float(group["rank"].median())
    found["perplexity_median"] = float(group["perplexity"].median())
    found["n_empty"] = int((group["n_tokens"] == 0).sum())
    return found


def bootstrap(values: np.ndarray, clusters: np.ndarray, n_bootstrap: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of a mean, resampling whole clusters; NaN for fewer than two.

    Example:
        >>> bootstrap(np.array([1.0, 1.0, 1.0]), np.array([0, 0, 1]), 100, 0)
        (1.0, 1.0)
    """
    _, at = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(at, values), np.bincount(at)
    if len(counts) < 2:
        return math.nan, math.nan
    drawn = np.random.default_rng(seed).integers(len(counts), size=(n_bootstrap, len(counts)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
