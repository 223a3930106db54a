"""Ablation of attention heads: what a head is worth on each kind of text, beside random heads.

Source: Guo et al., arXiv 2410.13835, section 4 (loss with a head's attention zeroed minus loss, per sequence and domain).

1. A head hands z, (position, d_head), to the output projection. Ablated, every position gets instead

       mode "zero"      0
       mode "to_sink"   v_0, the value vector of key 0: all attention mass moved to the first token
       mode "mean"      the head's mean z over all tokens of the domain's texts

   Under causal softmax attention query 0 sees key 0 alone, sliding window or not, so z[0] is v_0. In a model with
   attention-sink logits (gpt-oss) z[0] is v_0 times what the sink logit leaves: there "to_sink" repeats that.
2. Layers below an ablated head do not change. The residual stream that enters each layer with chosen heads is computed once
   per text and kept; each run then starts at that layer (`from_layer`) with rows = heads × texts.
3. The loss of each row is compared with the text's own (`interp.sinks.losses`), per text, in nats.
4. Random heads, drawn from the layers of the chosen ones where there are any left, get the same treatment: the control.

Cost: Σ over heads of (layers above + LM head) × tokens. Batches that run out of memory are halved; with `out`, each layer is a
shard and an interrupted run goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from interp.errors import InputError
from interp.intervals import bootstrap_difference, bootstrap_mean, false_discovery, permutation_test
from interp.model import Model
from interp.provenance import Provenance
from interp.recorded_attention import check_causal
from interp.results import Column, Result
from interp.shards import ShardedRun
from interp.sinks.ablated_runs import MODES, Head, ablated_losses, plain_losses
from interp.sinks.encoded_texts import Texts, digests, encode_domains
from interp.sinks.losses import check_predicts, fitting_tokens

ARMS = ("head", "random")
ABLATION_COLUMNS = (
    Column("domain", "category", "", "kind of text"),
    Column("text", "int32", "index", "0-based index of the text within its domain"),
    Column("layer", "int16", "layer", "0-based layer of the ablated head"),
    Column("head", "int16", "head", "0-based"),
    Column("arm", "category", "", "head: one of the chosen; random: a control"),
    Column("n_tokens", "int32", "tokens", "length of the text; its loss is a mean over one prediction fewer"),
    Column(
        "mass_first", "float32", "probability", "the head's attention on key 0 on this text; missing if not measured"
    ),
    Column("loss", "float64", "nats", "mean next-token loss of the text, model as it is"),
    Column("loss_ablated", "float64", "nats", "the same with this head ablated"),
    Column("delta_loss", "float64", "nats", "loss_ablated − loss"),
)


def ablate(
    model: Model,
    heads: Sequence[Head] | str,
    texts: Mapping[str, Texts] | Texts,
    mode: str = "zero",
    *,
    n_random: int | None = None,
    scan: Result | bool = True,
    seed: int = 0,
    chat: bool = False,
    max_tokens: int = 4096,
    out: str | Path | None = None,
    progress: bool | str = True,
) -> Result:
    """Loss change of each text when one head at a time is ablated.

    Args:
        model: a causal LM, as `load_model` gave it.
        heads: (layer, head) pairs, negative ones counted from the end; or "all".
        texts: {domain: texts}, or texts of one domain; strings or sequences of at least two token ids.
        mode: "zero", "to_sink" or "mean", see the module's step 1.
        n_random: how many other heads serve as control; by default as many as chosen, at least 4, and at most what is left:
            none beside "all", where every head is measured against all others.
        scan: whence `mass_first` comes: `True` measures it (one more pass), a `Result` of `interp.sinks.scan` on the same
            texts is looked up, `False` leaves it missing.
        seed: of the random heads.
        chat: wrap texts in the chat template.
        max_tokens: budget of padded tokens (of all rows) in a batch.
        out: a folder; each layer becomes a shard there.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        A `Result` of kind "sinks.ablate" with `ABLATION_COLUMNS`: one row per domain, text and ablated head. `summary`,
        `against_random` and `between_domains` reduce it.

    Raises:
        InputError: an encoder, no head or text, a head out of range, an unknown mode, a text of one token, a scan of other texts.
        MemoryBudgetError: one text alone does not fit, with both figures.

    Example:
        >>> result = ablate(load_model(), [(15, 3)], {"prose": prose, "code": code})       # doctest: +SKIP
        >>> summary(result)[["domain", "arm", "layer", "head", "mean", "low", "high"]]     # doctest: +SKIP
    """
    start = time.perf_counter()
    if mode not in MODES:
        raise InputError(f"mode={mode!r}; expected one of {', '.join(MODES)}")
    check_predicts(model)
    domains = encode_domains(model, texts, shortest=2, chat=chat)
    chosen = _heads(model, heads)
    check_causal(model, {layer for layer, _ in chosen})
    arms = dict.fromkeys(chosen, "head") | dict.fromkeys(_random_heads(model, chosen, n_random, seed), "random")
    by_layer: dict[int, list[Head]] = {}
    for pair in sorted(arms):
        by_layer.setdefault(pair[0], []).append(pair)
    parameters = {
        "mode": mode,
        "heads": "all" if isinstance(heads, str) else [list(pair) for pair in chosen],
        "n_random": n_random,
        "random": [list(pair) for pair, arm in arms.items() if arm == "random"],
        "scan": "given" if isinstance(scan, Result) else bool(scan),
        "chat": chat,
        "n_texts": {name: len(ids) for name, ids in domains.items()},
        "texts": digests(domains),
    }
    provenance = Provenance.collect(model, seed=seed, parameters=parameters)
    units = [f"layer-{layer}" for layer in by_layer]
    run = None if out is None else ShardedRun(Path(out), "sinks.ablate", ABLATION_COLUMNS, provenance, units)
    waiting = list(by_layer) if run is None else [int(unit.removeprefix("layer-")) for unit in run.missing()]
    frames: list[pd.DataFrame] = []
    if waiting:
        encoded = [ids for rows in domains.values() for ids in rows]
        budget = fitting_tokens(model, max(map(len, encoded)), max_tokens)
        table = _text_table(domains).assign(loss=plain_losses(model, encoded, budget))
        names = [name for name, ids in domains.items() for _ in ids]
        mass = _mass_first(model, domains, waiting, scan, max_tokens)
        description = "ablate" if progress is True else progress
        chosen_heads = {layer: by_layer[layer] for layer in waiting}
        for layer, losses in ablated_losses(model, encoded, names, chosen_heads, mode, budget, description):
            frame = _rows(table, by_layer[layer], arms, losses, mass)
            frames.append(frame) if run is None else run.write(f"layer-{layer}", frame)
    if run is not None:
        return run.finish()
    provenance = Provenance.collect(model, seed=seed, parameters=parameters, wall_time=time.perf_counter() - start)
    return Result("sinks.ablate", pd.concat(frames, ignore_index=True), ABLATION_COLUMNS, provenance)


def _heads(model: Model, heads: Sequence[Head] | str) -> list[Head]:
    if isinstance(heads, str):
        if heads != "all":
            raise InputError(f"heads={heads!r}; expected (layer, head) pairs, or 'all'")
        return [(layer, head) for layer in range(model.arch.n_layers) for head in range(model.arch.n_heads)]
    pairs = []
    for entry in heads:
        if not isinstance(entry, Sequence | np.ndarray) or isinstance(entry, str) or len(entry) != 2:
            raise InputError(f"head {entry!r}; expected (layer, head) pairs such as [(15, 3)], or 'all'")
        pairs.append((model.arch.check_layer(entry[0]), model.arch.check_head(entry[1])))
    if not pairs:
        raise InputError("no head was given; expected at least one (layer, head), or 'all'")
    return list(dict.fromkeys(pairs))


def _random_heads(model: Model, chosen: Sequence[Head], n_random: int | None, seed: int) -> list[Head]:
    """Other heads, from the chosen ones' layers in turn while these have any left."""
    taken = set(chosen)
    free = [pair for pair in _heads(model, "all") if pair not in taken]
    if n_random is None:
        n_random = min(max(len(chosen), 4), len(free))
    if not 0 <= n_random <= len(free):
        raise InputError(f"n_random={n_random}; {len(free)} heads are left beside the {len(chosen)} chosen")
    generator, drawn = np.random.default_rng(seed), []
    for number in range(n_random):
        layer = chosen[number % len(chosen)][0]
        pool = [pair for pair in free if pair[0] == layer] or free
        pair = pool[int(generator.integers(len(pool)))]
        free.remove(pair)
        drawn.append(pair)
    return drawn


def _text_table(domains: Mapping[str, Sequence[Sequence[int]]]) -> pd.DataFrame:
    """One row per text, in the order of the batches' indices."""
    rows = [(name, at, len(ids)) for name, texts in domains.items() for at, ids in enumerate(texts)]
    table = pd.DataFrame(rows, columns=["domain", "text", "n_tokens"])
    return table.assign(domain=pd.Categorical(table["domain"], categories=list(domains)))


def _rows(
    table: pd.DataFrame, heads: Sequence[Head], arms: Mapping[Head, str], losses: np.ndarray, mass: pd.Series | None
) -> pd.DataFrame:
    """Rows of `ABLATION_COLUMNS` of one layer's heads."""
    parts = []
    for (layer, head), ablated in zip(heads, losses, strict=True):
        arm = pd.Categorical([arms[layer, head]] * len(table), categories=ARMS)
        part = table.assign(layer=layer, head=head, arm=arm, loss_ablated=ablated, mass_first=np.nan)
        if mass is not None:
            keys = pd.MultiIndex.from_arrays([table["domain"].astype(str), part["text"], part["layer"], part["head"]])
            part["mass_first"] = mass.reindex(keys).to_numpy()
        parts.append(part.assign(delta_loss=part["loss_ablated"] - part["loss"]))
    return pd.concat(parts, ignore_index=True)


def _mass_first(
    model: Model, domains: dict[str, list[list[int]]], layers: Sequence[int], scan: Result | bool, max_tokens: int
) -> pd.Series | None:
    """Attention on key 0 by (domain, text, layer, head)."""
    if not isinstance(scan, Result | bool):
        raise InputError(f"scan={scan!r:.60}; expected True, False or a Result of interp.sinks.scan")
    if scan is False:
        return None
    if scan is True:
        from interp.sinks.scanning import scan as scan_sinks

        frame = scan_sinks(model, domains, layers=layers, max_tokens=max_tokens, progress=False).frame
    else:
        frame = scan.frame
        made = scan.provenance
        known = made.parameters.get("texts")
        if isinstance(known, dict) and made.fingerprint is not None:
            other = [name for name, value in digests(domains).items() if known.get(name) != value]
            if other or made.fingerprint != model.fingerprint:
                what = f"of other texts of domain {other[0]!r}" if other else f"of another model, {made.model}"
                raise InputError(f"scan is {what}; scan the same texts with this model, or give scan=True")
    keys = ["domain", "text", "layer", "head"]
    lost = [name for name in (*keys, "n_tokens", "mass_first") if name not in frame.columns]
    if lost:
        raise InputError(f"scan has no column {lost[0]!r}; give what interp.sinks.scan gave, True or False")
    rows = frame[frame["head"] >= 0]
    first = rows.drop_duplicates(["domain", "text"])
    lengths = dict(zip(zip(first["domain"].astype(str), first["text"], strict=True), first["n_tokens"], strict=True))
    for name, texts in domains.items():
        for at, ids in enumerate(texts):
            if lengths.get((name, at)) != len(ids):
                raise InputError(
                    f"scan is of other texts: text {at} of domain {name!r} has {len(ids)} tokens, and "
                    f"{lengths.get((name, at), 'no')} in the scan; scan the same texts, or give scan=True"
                )
    return rows.assign(domain=rows["domain"].astype(str)).set_index(keys)["mass_first"]


def summary(
    result: Result, *, hurt: float = 0.01, n_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Per domain and head: the mean loss change over texts with its bootstrap interval.

    Args:
        result: what `ablate` gave.
        hurt: loss change in nats from which a text counts as hurt (the paper's 0.01).
        n_resamples, level, seed: of the bootstrap over texts.

    Returns:
        domain, arm, layer, head, mean, low, high (nats; low and high missing for a single text), share_hurt (share of texts with
        delta_loss > hurt), mass_first (mean), n (texts).
    """
    delta, columns = _by_text(result, "delta_loss"), []
    mass = _by_text(result, "mass_first")
    for domain, values in delta.items():
        low, high = bootstrap_mean(values.to_numpy(), n_resamples, level, seed)
        table = values.columns.to_frame(index=False)
        table.insert(0, "domain", domain)
        numbers = {"mean": values.mean().to_numpy(), "low": low, "high": high}
        numbers["share_hurt"] = (values > hurt).mean().to_numpy()
        columns.append(table.assign(**numbers, mass_first=mass[domain].mean().to_numpy(), n=len(values)))
    return pd.concat(columns, ignore_index=True)


def against_random(result: Result, *, n_resamples: int = 2000, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Per domain: the chosen heads together, the random heads together, and their difference, each a mean over texts.

    Args as `summary`.

    Returns:
        domain, what ("head", "random", "difference"), mean, low, high (nats per head), n_heads, n (texts). Without random heads
        only "head". The interval is over texts; the heads are taken as they are.
    """
    rows = []
    for domain, values in _by_text(result, "delta_loss").items():
        arms = {arm: values.loc[:, values.columns.get_level_values("arm") == arm] for arm in ARMS}
        means = {arm: table.mean(axis=1).to_numpy() for arm, table in arms.items() if table.shape[1]}
        if len(means) == 2:
            means["difference"] = means["head"] - means["random"]
        for what, numbers in means.items():
            low, high = bootstrap_mean(numbers, n_resamples, level, seed)
            n_heads = arms[what].shape[1] if what in arms else values.shape[1]
            row = {"domain": domain, "what": what, "mean": numbers.mean(), "low": float(low), "high": float(high)}
            rows.append(row | {"n_heads": n_heads, "n": len(numbers)})
    return pd.DataFrame(rows)


def between_domains(
    result: Result, first: str, second: str, *, n_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Per head: how much more its ablation hurts texts of one domain than of another.

    Args:
        result: what `ablate` gave.
        first, second: domains; for an active-dormant head, the one where it is active and the one where it is dormant.
        n_resamples, level, seed: of bootstrap and permutation test.

    Returns:
        arm, layer, head, mean_first, mean_second, difference, low, high (nats), p (permutation test over texts, two-sided), q (p
        under Benjamini–Hochberg over all heads here), n_first, n_second.

    Raises:
        InputError: no such domain.
    """
    tables = _by_text(result, "delta_loss")
    for name in (first, second):
        if name not in tables:
            raise InputError(f"domain {name!r} was not ablated; the domains are {', '.join(map(repr, tables))}")
    ours, theirs = tables[first], tables[second]
    a, b = ours.to_numpy(), theirs.to_numpy()
    low, high = bootstrap_difference(a, b, n_resamples, level, seed)
    p = permutation_test(a, b, seed=seed)
    means = {"mean_first": a.mean(0), "mean_second": b.mean(0), "difference": a.mean(0) - b.mean(0)}
    numbers = {**means, "low": low, "high": high, "p": p, "q": false_discovery(p)[0]}
    return ours.columns.to_frame(index=False).assign(**numbers, n_first=len(a), n_second=len(b))


def _by_text(result: Result, measure: str) -> dict[str, pd.DataFrame]:
    """{domain: (text, (arm, layer, head)) frame of one measure}."""
    if result.kind != "sinks.ablate":
        raise InputError(f"a result of kind {result.kind!r}; expected one of 'sinks.ablate'")
    keys = ["arm", "layer", "head"]
    frame = result.frame.astype({"arm": str})
    return {
        str(domain): rows.pivot(index="text", columns=keys, values=measure)
        for domain, rows in frame.groupby("domain", observed=True, sort=False)
    }
