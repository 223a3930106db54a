"""What the papers on attention sinks say beside what `analyses.sink_heads` measured: one function per claim.

A claim holds where the interval that is printed with it says so; thresholds that no paper gives are named in the claim.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from interp.intervals import bootstrap_mean
from interp.neurons.atlas import wilson
from interp.report.claims import Claim
from interp.results import Result
from interp.sinks import Scan
from interp.sinks import eviction as evictions
from interp.sinks import residual_peaks as peaks

GUO = "Guo et al. 2024, arXiv 2410.13835"
XIAO = "Xiao et al. 2023, arXiv 2309.17453"
ALPHA = 0.05
HURT = 0.01  # nats


def heads(table: pd.DataFrame) -> list[Claim]:
    """The first confirmed head beside the paper's L16H25 of Llama-2-7B, and all confirmed heads together.

    Args:
        table: what `analyses.sink_heads.confirm` gave.
    """
    row = table.iloc[0]
    n = int(row["n"])
    awake, asleep = f"{row['active on']} (active)", f"{row['dormant on']} (dormant)"
    both = row["fresh mass"] > 0.9 and row["fresh mass "] < 0.5
    exists = Claim(
        "a head is dormant on one domain (mass on the first token > 0.9) and active on another (< 0.5)",
        GUO,
        "Llama-2-7B L16H25: Wikipedia .949, GitHub .251",
        f"{row['head']}: {row['dormant on']} {row['fresh mass']:.3f}, {row['active on']} {row['fresh mass ']:.3f} on texts that "
        f"did not choose it (q = {row['fresh q']:.2g}); interval: difference {row['fresh difference']:.3f}",
        _ends(row["low"], row["high"]),
        n,
        bool(both and row["low"] > 0 and row["fresh q"] <= ALPHA),
    )
    hurts = row["Δloss low"] > 0 and row["Δloss difference low"] > 0 and row["loss q"] <= ALPHA
    spared = row["Δloss "] <= HURT or row["Δloss  low"] <= 0
    costs = Claim(
        "switching it off costs loss where it is active and nothing (at most 0.01 nats) where it is dormant",
        GUO,
        "+0.0271 on GitHub (active), −0.0001 on Wikipedia (dormant)",
        f"{row['head']}: {row['Δloss']:+.4f} [{row['Δloss low']:+.4f}, {row['Δloss high']:+.4f}] on {awake}, "
        f"{row['Δloss ']:+.4f} [{row['Δloss  low']:+.4f}, {row['Δloss  high']:+.4f}] on {asleep}; interval: difference "
        f"{row['Δloss difference']:+.4f} nats (q = {row['loss q']:.2g})",
        _ends(row["Δloss difference low"], row["Δloss difference high"]),
        n,
        bool(hurts and spared),
    )
    control = Claim(
        "it costs more there than random heads of its layer",
        "ours",
        None,
        "no random head was ablated"
        if math.isnan(row["above random heads"])
        else f"{row['head']} on {awake}: {row['above random heads']:+.4f} nats above {int(row['random heads'])} random "
        f"head{'s' if row['random heads'] > 1 else ''}, paired by text; interval: that",
        _ends(row["above random heads low"], row["above random heads high"]),
        n,
        None if math.isnan(row["above random heads"]) else bool(row["above random heads low"] > 0),
    )
    texts = Claim(
        "it hurts (by more than 0.01 nats) most texts where it is active and hardly any (a tenth) where it is dormant",
        GUO,
        "62 % on GitHub, 0.1 % on Wikipedia",
        f"{row['head']}: {row['hurt']:.0%} on {awake}, {row['hurt ']:.0%} on {asleep}; interval: the first share",
        wilson(round(row["hurt"] * n), n),
        n,
        bool(row["hurt"] > 0.5 and row["hurt "] < 0.1),
    )
    passed = table["loss q"] <= ALPHA
    more, less = (
        (passed & (table["Δloss difference low"] > 0)).sum(),
        (passed & (table["Δloss difference high"] < 0)).sum(),
    )
    together = Claim(
        "most heads that differ between domains hurt more, switched off, where they are active",
        "ours",
        None,
        f"of {len(table)} confirmed heads {more} hurt more where active and {less} where dormant, each with q ≤ {ALPHA}; the "
        f"rest shows no difference",
        wilson(int(more), len(table)),
        len(table),
        bool(more > len(table) / 2 and less == 0),
    )
    return [exists, costs, control, texts, together]


def peak(scanned: Scan, domain: str) -> Claim:
    """Residual norm at the first token against the others, at the layer where it is largest."""
    layers = scanned.layers(["resid_ratio", "resid_first", "resid_others"]).query("domain == @domain")
    table = layers.set_index(["measure", "layer"])
    layer = int(table.loc["resid_ratio"]["mean"].idxmax())
    ratio = table.loc[("resid_ratio", layer)]
    first, others = (table.loc[(name, layer)]["mean"] for name in ("resid_first", "resid_others"))
    return Claim(
        "the sink token's residual norm is an order of magnitude above the others'",
        GUO,
        "Llama-3.1-8B, layer 24: 496 against 37 (13 times)",
        f"{domain}, layer {layer}: {first:.0f} against a median of {others:.0f}; interval: ratio {ratio['mean']:.3g}",
        _ends(ratio["low"], ratio["high"]),
        int(ratio["n"]),
        bool((ratio["mean"] if math.isnan(ratio["low"]) else ratio["low"]) > 10),
    )


def origin(origins: Result) -> Claim:
    """Which blocks make the peak: on every domain, early MLPs and no attention, and no block of later layers."""
    table = peaks.origin(origins)
    n_domains = table["domain"].nunique()
    makers = table[table["makes_peak"]].groupby(["arm", "block", "block_layer"], sort=False).size()
    everywhere = [f"{block} {layer}" for (arm, block, layer), n in makers.items() if arm == "early" and n == n_domains]
    later = [f"{block} {layer}" for arm, block, layer in makers.index if arm == "control"]
    left = table.groupby(["arm", "block"])["remaining"].min()
    weakest = table[table["arm"] == "early"].sort_values("remaining").iloc[0]
    controls = left.get("control", pd.Series(dtype=float)).min()
    return Claim(
        "the peak is made by early MLPs (half of it or more is gone without them), not by attention or later blocks",
        GUO,
        "Llama-3.1-8B: by the MLPs of layers 0 and 1",
        f"made by {', '.join(everywhere) or 'no single block'}; at least {left['early'].get('attention', math.nan):.0%} is left "
        f"without an early attention block, {controls:.0%} without a later block; interval: {weakest['remaining']:.1%} left "
        f"without {weakest['block']} {weakest['block_layer']}",
        _ends(weakest["low"], weakest["high"]),
        int(weakest["n"]),
        bool(everywhere and all(name.startswith("mlp") for name in everywhere) and not later),
    )


def drain(scanned: Scan, domain: str) -> Claim:
    """Value norms at the first token against the others, over the heads of layers whose input has a sink token."""
    sinks = scanned.layers(["n_sinks"]).query("domain == @domain").set_index("layer")["mean"]
    reading = [int(layer) for layer in sinks.index if layer > 0 and sinks[layer - 1] >= 1]
    values = scanned.values("value_ratio")[domain]
    here = values.loc[:, values.columns.get_level_values("layer").isin(reading)].to_numpy(dtype=float)
    claim = "the sink token's value states are drained (to less than half of the others' norm)"
    paper = "Llama-3.1-8B: norm ≈ 0.2 against 2 to 2.5 (about a tenth)"
    if not here.size:
        return Claim(claim, GUO, paper, "no layer reads a sink token", None, len(values), None)
    medians = np.median(here, axis=1)
    low, high = bootstrap_mean(medians)
    return Claim(
        claim,
        GUO,
        paper,
        f"{domain}: {medians.mean():.2f} of the others' norm (interval), median over the {here.shape[1]} heads of the layers "
        f"that read a sink; {np.mean(here.mean(0) < 0.5):.0%} of these heads below a half",
        _ends(float(low), float(high)),
        len(values),
        bool((medians.mean() if math.isnan(high) else high) < 0.5),
    )


def evict(evicted: Result) -> Claim:
    """StreamingLLM: first keys kept or removed."""
    table = evictions.summary(evicted).set_index(["domain", "arm"])
    domain = table.index[0][0]
    window, kept, full = (table.loc[(domain, arm)] for arm in ("window", "sinks", "full"))
    control = table.loc[(domain, "sinks − control")]
    made = evicted.provenance.parameters
    restored = 1 - kept["delta"] / window["delta"] if window["delta"] > 0 else math.nan
    return Claim(
        "under a sliding window perplexity explodes (more than doubles) once the first keys are gone, and a few of them kept "
        "restore it (nine tenths of the loss)",
        XIAO,
        "Llama-2-13B, 1,024 keys, 65,000 tokens: perplexity 5158 without, 5.40 with 4 kept",
        f"{domain}, {made['window']} keys: perplexity {window['perplexity']:.4g} without, {kept['perplexity']:.4g} with "
        f"{made['n_sinks']} kept, {full['perplexity']:.4g} with all keys: {restored:.0%} restored; other early keys in their "
        f"place do not ({control['delta']:+.3f} nats [{control['low']:+.3f}, {control['high']:+.3f}]); interval: loss with "
        f"{made['n_sinks']} kept above all keys, {kept['delta']:.3f}",
        _ends(kept["low"], kept["high"]),
        int(kept["n"]),
        bool(window["low"] > math.log(2) and kept["high"] < 0.1 * window["delta"] and control["high"] < 0),
    )


def first_token(variants: pd.DataFrame) -> Claim:
    """The sink is wherever the text begins.

    Args:
        variants: what `analyses.sink_heads.variant_table` gave.
    """
    without = variants[variants["variant"] == "no BOS"]
    n = int(without["n"].sum())
    share = float((without["key 0 is a sink"] * without["n"]).sum() / n)
    mass = "; ".join(f"{row['domain']} {row['mass on key 0']:.2f}" for row in without.to_dict("records"))
    return Claim(
        "without a BOS token the first token is a sink all the same, on most texts",
        GUO,
        None,
        f"a residual peak at the first token on {share:.0%} of texts (interval); mean mass on it: {mass}",
        wilson(round(share * n), n),
        n,
        bool(wilson(round(share * n), n)[0] > 0.5),
    )


def _ends(low: float, high: float) -> tuple[float, float] | None:
    return None if math.isnan(low) or math.isnan(high) else (float(low), float(high))
