"""Eviction: what the first keys are worth to a model that sees a sliding window of its text.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (StreamingLLM), arXiv 2309.17453, section 3. Their
window of recent keys fails the moment the first keys leave it; four of them kept beside it ("attention sinks") restore the loss.

1. Arms, each a mask over (query q, key k) with k ≤ q; W keys are visible at most (but in "full"), s of them kept:

       "full"      every key
       "window"    k > q − W                                     the last W keys
       "sinks"     k > q − (W − s), or k < s                     the last W − s keys and the first s
       "control"   k > q − (W − s), or s ≤ k < 2 s               as many other early keys: a longer reach alone is not it

2. The mask acts in every layer, so that evicted tokens reach later ones only through tokens that saw them in time, as with a
   cache from which keys are dropped.
3. The next-token loss counts from query W + s on, where every arm but "full" sees exactly W keys: `n_predictions` per text.

Tokens keep the positions of the text, and the kept keys are as far away as they are. StreamingLLM counts positions within the
cache instead, which stays meaningful beyond the training context; within it, where this runs, both see the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from interp.batching import Batch, check_memory, for_each_batch, token_batches
from interp.errors import InputError, ModelError
from interp.intervals import bootstrap_mean
from interp.model import Model
from interp.provenance import Provenance
from interp.recorded_attention import check_causal
from interp.results import Column, Result
from interp.sinks.encoded_texts import Texts, digests, encode_domains
from interp.sinks.losses import check_predicts, fitting_tokens, mean_losses

ARMS = ("full", "window", "sinks", "control")
EVICTION_COLUMNS = (
    Column("domain", "category", "", "kind of text"),
    Column("text", "int32", "index", "0-based index of the text within its domain"),
    Column(
        "arm", "category", "", "full; window: last W keys; sinks: W − s and the first s; control: W − s and the next s"
    ),
    Column("n_tokens", "int32", "tokens", "length of the text"),
    Column("n_predictions", "int32", "tokens", "tokens predicted from query W + s on: what the loss is a mean over"),
    Column("loss", "float64", "nats", "mean next-token loss from query W + s on"),
    Column("delta_loss", "float64", "nats", "loss − that of the full attention"),
)


def evict(
    model: Model,
    texts: Mapping[str, Texts] | Texts,
    window: int = 128,
    n_sinks: int = 4,
    *,
    chat: bool = False,
    max_tokens: int = 4096,
    progress: bool | str = True,
) -> Result:
    """Next-token loss under a sliding window, with the first keys kept, or removed, or others kept in their place.

    Args:
        model: a causal LM, as `load_model` gave it.
        texts: {domain: texts}, or texts of one domain, each of more than `window` + `n_sinks` + 1 tokens.
        window: W, keys that a query sees, itself and kept ones included.
        n_sinks: s, keys kept; 2 s < W.
        chat: wrap texts in the chat template.
        max_tokens: budget of padded tokens in a batch.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        A `Result` of kind "sinks.evict" with `EVICTION_COLUMNS`: one row per domain, text and arm. `summary` reduces it.

    Raises:
        InputError: an encoder, no text, a text that the window does not leave, window and sinks that do not fit each other.
        ModelError: the model has a sliding window of its own that a text exceeds.
        MemoryBudgetError: one text alone does not fit, with both figures.

    Example:
        >>> result = evict(load_model(), {"prose": prose}, window=64)                      # doctest: +SKIP
        >>> summary(result)[["domain", "arm", "perplexity", "delta", "low", "high"]]       # doctest: +SKIP
    """
    start = time.perf_counter()
    if n_sinks < 1 or window <= 2 * n_sinks:
        raise InputError(
            f"window={window} with n_sinks={n_sinks}; expected at least one sink and a window of more than {2 * max(n_sinks, 1)} "
            f"keys: sinks and controls lie outside its recent part"
        )
    check_predicts(model)
    check_causal(model, layers=())
    domains = encode_domains(model, texts, chat=chat, shortest=window + n_sinks + 2)
    encoded = [ids for rows in domains.values() for ids in rows]
    longest = max(map(len, encoded))
    _check_window(model, longest)
    budget = fitting_tokens(model, longest, max_tokens)
    # The boolean mask and the additive one; an eager pattern is in the budget already.
    check_memory(5 * longest**2, model.device, f"a mask of {longest} × {longest} tokens")
    losses = {arm: np.full(len(encoded), np.nan) for arm in ARMS}
    description = progress if isinstance(progress, str) else "evict"
    with model.attention_implementation("eager" if model.attention == "eager" else "sdpa"):
        for arm in ARMS:
            step = _step(model, arm, window, n_sinks, losses[arm])
            batches = token_batches(encoded, max_tokens=budget, pad_id=model.pad_id)
            for_each_batch(batches, step, progress=f"{description}: {arm}" if progress else False)
    frames = []
    keys = pd.DataFrame(
        [(name, at, len(ids)) for name, rows in domains.items() for at, ids in enumerate(rows)],
        columns=["domain", "text", "n_tokens"],
    )
    keys["domain"] = pd.Categorical(keys["domain"], categories=list(domains))
    keys["n_predictions"] = keys["n_tokens"] - 1 - window - n_sinks
    for arm in ARMS:
        named = pd.Categorical([arm] * len(keys), categories=ARMS)
        frames.append(keys.assign(arm=named, loss=losses[arm], delta_loss=losses[arm] - losses["full"]))
    parameters: dict[str, Any] = {"window": window, "n_sinks": n_sinks, "chat": chat, "max_tokens": max_tokens}
    parameters["texts"] = digests(domains)
    parameters["n_texts"] = {name: len(rows) for name, rows in domains.items()}
    provenance = Provenance.collect(model, parameters=parameters, wall_time=time.perf_counter() - start)
    return Result("sinks.evict", pd.concat(frames, ignore_index=True), EVICTION_COLUMNS, provenance)


def summary(result: Result, *, n_resamples: int = 2000, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Per domain and arm: loss, perplexity, and the change against full attention with its bootstrap interval.

    Args:
        result: what `evict` gave.
        n_resamples, level, seed: of the bootstrap over texts.

    Returns:
        domain, arm, loss (mean over texts), loss_low, loss_high, perplexity (exp of the mean loss), delta (against full, mean
        over texts of the paired difference), low, high, n (texts). A last arm "sinks − control" holds the paired difference
        between these two in delta, low and high: below zero, it is the first keys that help, and not any early keys.
    """
    if result.kind != "sinks.evict":
        raise InputError(f"a result of kind {result.kind!r}; expected one of 'sinks.evict'")
    rows = []
    for domain, group in result.frame.groupby("domain", observed=True, sort=False):
        table = group.astype({"arm": str}).pivot(index="text", columns="arm", values="loss")
        changes = {arm: (table[arm] - table["full"]).to_numpy() for arm in ARMS}
        changes["sinks − control"] = (table["sinks"] - table["control"]).to_numpy()
        for arm, change in changes.items():
            row: dict[str, Any] = {"domain": str(domain), "arm": arm}
            if arm in ARMS:
                low, high = bootstrap_mean(table[arm].to_numpy(), n_resamples, level, seed)
                row |= {"loss": table[arm].mean(), "loss_low": float(low), "loss_high": float(high)}
                row["perplexity"] = float(np.exp(table[arm].mean()))
            low, high = bootstrap_mean(change, n_resamples, level, seed)
            rows.append(row | {"delta": change.mean(), "low": float(low), "high": float(high), "n": len(table)})
    return pd.DataFrame(rows)


def visible_keys(
    arm: str, length: int, window: int, n_sinks: int, device: torch.device | str = "cpu"
) -> Bool[Tensor, "query key"]:
    """Which keys each query sees.

    Example:
        >>> visible_keys("sinks", 5, window=3, n_sinks=1)[4].int().tolist()
        [1, 0, 0, 1, 1]
    """
    query = torch.arange(length, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    if arm == "full":
        return key <= query
    if arm == "window":
        return (key <= query) & (key > query - window)
    kept = key < n_sinks if arm == "sinks" else (key >= n_sinks) & (key < 2 * n_sinks)
    return (key <= query) & ((key > query - (window - n_sinks)) | kept)


def _step(model: Model, arm: str, window: int, n_sinks: int, losses: np.ndarray) -> Any:
    @torch.no_grad()
    def step(batch: Batch) -> None:
        batch = batch.to(model.device)
        length = batch.input_ids.shape[1]
        # Padding is on the right, so no real query can see it, and the mask needs no part of its own for it.
        seen = visible_keys(arm, length, window, n_sinks, model.device)
        mask = torch.zeros(length, length, dtype=model.dtype, device=model.device)
        mask.masked_fill_(~seen, torch.finfo(model.dtype).min)
        mask = mask[None, None].expand(batch.size, 1, length, length)
        # A mask of four dimensions is taken by transformers as it is.
        hidden = model.hf.base_model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        losses[list(batch.rows)] = mean_losses(model, hidden, batch, start=window + n_sinks)

    return step


def _check_window(model: Model, longest: int) -> None:
    """A layer's own sliding window would be lost behind our mask."""
    config = model.arch.config
    kinds = getattr(config, "layer_types", None) or []
    other = sorted({kind for kind in kinds if kind not in ("full_attention", "sliding_attention")})
    if other:
        raise ModelError(f"{model.name} has layers of {other[0]}, where keys cannot be evicted by a mask")
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    own = getattr(config, "sliding_window", None)
    if slides and own is not None and longest > own:
        raise ModelError(
            f"{model.name} ({model.arch.family.name}) has a sliding window of {own} tokens, and the longest text has {longest}: "
            f"its early keys are evicted already; use texts of at most {own} tokens"
        )
