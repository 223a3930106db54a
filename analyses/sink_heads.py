"""Which heads are attention sinks, on which kind of text, and does switching them off matter?

Reproduces on any model what T. Guo et al., "Active-Dormant Attention Heads" (arXiv 2410.13835), report for Llama 2, Llama 3.1 and
OLMo, beside Xiao et al., "StreamingLLM" (arXiv 2309.17453). Prints the table claim · paper · ours and writes a report.

    python -m analyses.sink_heads [--model NAME] [--texts 48] [--out reports/sink_heads]

1. One half of the texts chooses heads: every head on every domain, pairs of domains tested under false-discovery control.
2. The other half, from other documents, confirms: the chosen heads' masses, and the loss when each is switched off, beside
   random heads of the same layers.
3. What makes the residual peak, what the first keys are worth to a sliding window, and what becomes of the sinks without a
   BOS token, with another first token, and with shuffled text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from interp import load_model
from interp.cli import show
from interp.report import Section, write_report
from interp.report.claims import Claim, claims_frame, write_claims
from interp.results import Result
from interp.reuse import reuse_or_make
from interp.sinks import Scan, ablate, classify, compare, evict, plots, residual_peak_origin, scan
from interp.sinks import eviction as evictions
from interp.sinks import residual_peaks as peaks
from interp.sinks.intervals import bootstrap_difference, bootstrap_mean, false_discovery, permutation_test
from interp.sinks.sequences import domain_sequences

GUO = "Guo et al. 2024, arXiv 2410.13835"
XIAO = "Xiao et al. 2023, arXiv 2309.17453"
DOMAINS = ("code", "editorials", "movie-reviews", "product-reviews", "tweets", "numbers", "json")
CONTROLS = ("repeated", "random")  # not language: shown, and never chosen from
EPSILON = 0.3  # Gu et al., arXiv 2410.10781
# Columns of the two tables of confirmed heads.
MASSES = [
    *("head", "label", "dormant on", "mass", "active on", "mass ", "difference", "q"),
    *("fresh mass", "fresh mass ", "fresh difference", "low", "high", "fresh q", "n"),
]
LOSSES = [
    *("head", "active on", "Δloss", "hurt", "dormant on", "Δloss ", "hurt ", "Δloss difference"),
    *("loss low", "loss high", "loss q", "Δloss of random heads, active", "n"),
]
# What `make report` runs.
REPORT: dict[str, Any] = {"n_texts": 16, "n_heads": 3, "n_random": 3, "n_confirm": 12, "n_small": 4}


def run(
    model: Any,
    out: Path,
    domains: Sequence[str] = DOMAINS,
    controls: Sequence[str] = CONTROLS,
    *,
    length: int = 128,
    n_texts: int = 48,
    n_confirm: int = 32,
    n_heads: int = 8,
    n_random: int = 8,
    n_small: int = 8,
    window: int = 64,
) -> Section:
    """Scan, choose, confirm, explain.

    Args:
        model: what `load_model` gave.
        out: folder for the results; what is there already is used again.
        domains: kinds of text that heads are chosen on, at least two: built-in ones or NAME=GLOB, see `interp sinks domains`.
        controls: further ones that are only shown.
        length: tokens per text.
        n_texts: texts per domain that choose.
        n_confirm: texts per domain that confirm, from other documents.
        n_heads: heads that are confirmed.
        n_random: random heads beside them.
        n_small: texts per domain of the smaller experiments.
        window: of the eviction.

    Returns:
        A section for a report.
    """
    start = document_start(model)
    every = domain_sequences(model, [*domains, *controls], length, n_texts + n_confirm, bos=start)
    specs, domains = list(domains), list(every)[: len(domains)]
    choosing = {name: rows[:n_texts] for name, rows in every.items()}
    fresh = {name: rows[n_texts:] for name, rows in every.items() if name in domains}
    kept = {"model": model, "out": out}
    scanned = _scan(**kept, name="scan", texts=choosing)
    language = scanned.only(list(domains))
    compared = compare(language)
    named = classify(language, comparison=compared)
    chosen = choose(named, n_heads)
    involved = list(dict.fromkeys([*chosen["dormant_on"], *chosen["active_on"]]))
    confirming = {name: fresh[name] for name in domains if name in involved}
    again = _scan(**kept, name="scan_fresh", texts=confirming)
    heads = [(int(row.layer), int(row.head)) for row in chosen.itertuples()]
    ablated = reuse_or_make(
        out / "ablate.parquet",
        lambda: ablate(model, heads, confirming, n_random=n_random, scan=again),
        fingerprint=model.fingerprint,
        parameters={
            "mode": "zero",
            "heads": [list(pair) for pair in heads],
            "n_texts": {name: len(rows) for name, rows in confirming.items()},
        },
    )
    table = confirm(chosen, again, ablated)
    small = {name: rows[:n_small] for name, rows in fresh.items() if name in domains[:2]}
    origins = reuse_or_make(
        out / "residual_peak_origin.parquet",
        lambda: residual_peak_origin(model, {name: rows[: max(2, n_small // 2)] for name, rows in small.items()}),
        fingerprint=model.fingerprint,
    )
    longer = domain_sequences(model, specs[:2], 4 * length, n_small, bos=start, seed=1)
    evicted = reuse_or_make(
        out / "evict.parquet",
        lambda: evict(model, longer, window=window),
        fingerprint=model.fingerprint,
        parameters={"window": window, "n_texts": {name: len(rows) for name, rows in longer.items()}},
    )
    variants = variant_table(model, out, specs[:2], length, 2 * n_small, start)
    claims = [
        *head_claims(table),
        peak_claim(scanned, domains),
        origin_claim(origins),
        drain_claim(scanned, domains),
        evict_claim(evicted),
        bos_claim(variants),
    ]
    named.save(out / "classify.parquet")
    compared.save(out / "compare.parquet")
    write_claims(out / "claims.json", claims)
    top = chosen.iloc[0]
    pair = (str(top["dormant_on"]), str(top["active_on"]))
    items: list[Any] = [
        table[MASSES],
        table[LOSSES],
        label_table(named, scanned),
        plots.scan(scanned),
        plots.domain_scatter(language, *pair, comparison=compared),
        compared,
        named,
        ablated,
        plots.ablation_scatter(ablated, int(top["layer"]), int(top["head"])),
        plots.norms(scanned, pair),
        plots.value_norms(scanned, pair),
        plots.epsilon_curve(scanned),
        scanned.massive_activations().query("domain == @pair[0]"),
        scanned.sink_tokens(model.tokenizer).groupby("domain").head(4),
        variants,
        origins,
        peaks.origin(origins),
        evicted,
        evictions.summary(evicted),
    ]
    text = (
        f"Every head of {model.name} on {len(domains)} kinds of text and {len(controls)} controls without language, {n_texts} "
        f"texts of {length} tokens each, all beginning with {token_name(model, start)}. Heads are chosen on these texts and "
        f"confirmed on {n_confirm} others. Mass is the attention on the first token, mean over the queries that see it. "
        "Intervals are over texts; those of differences between domains are widened for the choice among heads and pairs.\n\n"
        "The first two tables have a row per confirmed head: its masses on the texts that chose it and on fresh texts; and how "
        "much the loss rises where the head is active and where it is dormant when it is switched off, beside random heads of "
        "the same layers, with the share of texts that it hurts by more than 0.01 nats."
    )
    return Section("Sinks: which heads sleep on which kind of text", text, items, claims)


def document_start(model: Any) -> Any:
    """What stood before a document in training: what the tokenizer adds, else <|endoftext|> where that is a token, else BOS.

    SmolLM2 adds nothing by itself and was pretrained on documents that <|endoftext|> separates.
    """
    tokenizer = model.tokenizer
    if len(tokenizer("a")["input_ids"]) > len(tokenizer("a", add_special_tokens=False)["input_ids"]):
        return "auto"
    known = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return "<|endoftext|>" if known is not None and known != tokenizer.unk_token_id else True


def token_name(model: Any, start: Any) -> str:
    """For the text of the report."""
    return start if start not in ("auto", True) else f"the tokenizer's own {model.tokenizer.bos_token}"


def _scan(model: Any, out: Path, name: str, texts: dict[str, list[list[int]]]) -> Scan:
    result = reuse_or_make(
        out / f"{name}.parquet",
        lambda: scan(model, texts),
        fingerprint=model.fingerprint,
        parameters={
            "n_texts": {domain: len(rows) for domain, rows in texts.items()},
            "tokens": {domain: [len(rows[0])] * 2 for domain, rows in texts.items()},
        },
    )
    assert isinstance(result, Scan)
    return result


def choose(named: Result, n_heads: int) -> pd.DataFrame:
    """Active-dormant heads first, then the others whose domains differ most, those that survive the control before the rest."""
    rows = named.frame.assign(found=named.frame["label"] == "active-dormant")
    rows = rows.sort_values(["found", "domain_dependent", "difference"], ascending=False).head(n_heads)
    columns = {
        "domain_high": "dormant_on",
        "mean_high": "mass_dormant",
        "domain_low": "active_on",
        "mean_low": "mass_active",
    }
    table = rows.rename(columns=columns)[
        ["layer", "head", "label", *columns.values(), "difference", "low", "high", "q"]
    ]
    return table.astype({"dormant_on": str, "active_on": str, "label": str}).reset_index(drop=True)


def confirm(chosen: pd.DataFrame, again: Scan, ablated: Result) -> pd.DataFrame:
    """The chosen heads on fresh texts: masses and loss changes, each with an interval; q over these heads."""
    values = again.values()
    losses = ablated.frame.astype({"domain": str, "arm": str})
    rows = []
    for row in chosen.itertuples():
        key = (row.layer, row.head)
        asleep, awake = (values[name][key].to_numpy(dtype=float) for name in (row.dormant_on, row.active_on))
        low, high = bootstrap_difference(asleep, awake)
        mine = losses[(losses["arm"] == "head") & (losses["layer"] == row.layer) & (losses["head"] == row.head)]
        by_domain = {name: group["delta_loss"].to_numpy() for name, group in mine.groupby("domain")}
        on_active, on_dormant = by_domain[row.active_on], by_domain[row.dormant_on]
        loss_low, loss_high = bootstrap_difference(on_active, on_dormant)
        random = losses[(losses["arm"] == "random") & (losses["domain"] == row.active_on)]["delta_loss"].mean()
        rows.append(
            {
                "head": f"L{row.layer}H{row.head}",
                "label": row.label,
                "dormant on": row.dormant_on,
                "mass": row.mass_dormant,
                "active on": row.active_on,
                "mass ": row.mass_active,
                "difference": row.difference,
                "q": row.q,
                "fresh mass": asleep.mean(),
                "fresh mass ": awake.mean(),
                "fresh difference": asleep.mean() - awake.mean(),
                "low": float(low),
                "high": float(high),
                "p": float(permutation_test(asleep, awake)),
                "Δloss": on_active.mean(),
                "hurt": float((on_active > 0.01).mean()),
                "Δloss ": on_dormant.mean(),
                "hurt ": float((on_dormant > 0.01).mean()),
                "Δloss difference": on_active.mean() - on_dormant.mean(),
                "loss low": float(loss_low),
                "loss high": float(loss_high),
                "loss p": float(permutation_test(on_active, on_dormant)),
                "Δloss of random heads, active": random,
                "n": min(len(asleep), len(awake)),
            }
        )
    table = pd.DataFrame(rows)
    table["fresh q"] = false_discovery(table.pop("p").to_numpy())[0]
    table["loss q"] = false_discovery(table.pop("loss p").to_numpy())[0]
    return table


def label_table(named: Result, scanned: Scan) -> pd.DataFrame:
    """How many heads have which name, and the sink rate by domain."""
    rate = scanned.sink_rate([EPSILON]).groupby("domain", sort=False)["rate"].mean()
    counts = named.frame["label"].value_counts()
    rows = [{"what": f"heads: {label}", "value": float(counts[label])} for label in counts.index]
    dependent = float(named.frame["domain_dependent"].fillna(False).sum())
    rows.append({"what": "heads whose domains differ after false-discovery control", "value": dependent})
    return pd.DataFrame(
        [
            *rows,
            *({"what": f"sink rate at ε = {EPSILON}, {name}", "value": float(value)} for name, value in rate.items()),
        ]
    )


def variant_table(model: Any, out: Path, domains: Sequence[str], length: int, n: int, start: Any) -> pd.DataFrame:
    """What decides the sink: the first token replaced, left out, or the text shuffled."""
    newline = model.tokenizer("\n", add_special_tokens=False)["input_ids"]
    variants: dict[str, dict[str, Any]] = {
        f"with {token_name(model, start)}": {"bos": start},
        "no BOS": {"bos": False},
        "no BOS, shuffled": {"bos": False, "shuffle": True},
        **({"no BOS, first token a line break": {"bos": False, "first": newline[0]}} if len(newline) == 1 else {}),
    }
    rows = []
    for number, (name, options) in enumerate(variants.items()):
        texts = domain_sequences(model, list(domains), length, n, seed=2, **options)
        result = _scan(model, out, f"scan_variant_{number}", texts)
        mass = result.values()
        sinks = result.frame.query("head < 0")
        at_first = sinks.groupby(["domain", "text"], observed=True)["sink_tokens"].last()
        ratio = result.layers(["resid_ratio"]).groupby("domain", sort=False)["mean"].max()
        on_set = result.values("mass_sinks")
        for domain in texts:
            per_text = mass[domain].mean(axis=1).to_numpy(dtype=float)
            low, high = bootstrap_mean(per_text)
            named = at_first.loc[domain].astype(str)
            rows.append(
                {
                    "variant": name,
                    "domain": domain,
                    "mass on key 0": per_text.mean(),
                    "low": float(low),
                    "high": float(high),
                    "mass on sinks": float(on_set[domain].melt()["value"].mean()),
                    "sink rate": float((mass[domain] > EPSILON).to_numpy().mean()),
                    "peak at key 0": float(ratio[domain]),
                    "key 0 is a sink": float(named.str.startswith("0:").mean()),
                    "sinks per text": float(sinks[sinks["domain"] == domain].groupby("text")["n_sinks"].max().mean()),
                    "n": len(per_text),
                }
            )
    return pd.DataFrame(rows)


def head_claims(table: pd.DataFrame) -> list[Claim]:
    """The best confirmed head beside the paper's L16H25 of Llama-2-7B, and all confirmed heads together."""
    row = table.iloc[0]
    both = row["fresh mass"] > 0.9 and row["fresh mass "] < 0.5
    ours = (
        f"{row['head']}: {row['dormant on']} {row['fresh mass']:.3f}, {row['active on']} "
        f"{row['fresh mass ']:.3f} on fresh texts (q = {row['fresh q']:.2g}); interval: difference"
    )
    exists = Claim(
        "a head is dormant on one domain (mass on the first token > 0.9) and active on another (< 0.5)",
        GUO,
        "Llama-2-7B L16H25: Wikipedia .949, GitHub .251",
        ours,
        (row["low"], row["high"]),
        int(row["n"]),
        bool(both and row["low"] > 0 and row["fresh q"] <= 0.05),
    )
    more = int((table["loss low"] > 0).sum())
    less = int((table["loss high"] < 0).sum())
    survive = int(((table["loss low"] > 0) & (table["loss q"] <= 0.05)).sum())
    costs = Claim(
        "switching it off costs loss where it is active and nothing where it is dormant",
        GUO,
        "+0.0271 on GitHub (active), −0.0001 on Wikipedia (dormant)",
        f"{row['head']}: {row['Δloss']:+.4f} on {row['active on']} (active), {row['Δloss ']:+.4f} on "
        f"{row['dormant on']} (dormant); random heads {row['Δloss of random heads, active']:+.4f}; interval: difference, nats",
        (row["loss low"], row["loss high"]),
        int(row["n"]),
        bool(row["loss low"] > 0),
    )
    texts = Claim(
        "switching it off hurts (by more than 0.01 nats) most texts where it is active and hardly any where it is dormant",
        GUO,
        "62 % on GitHub, 0.1 % on Wikipedia",
        f"{row['head']}: {row['hurt']:.0%} on {row['active on']}, {row['hurt ']:.0%} on {row['dormant on']}",
        None,
        int(row["n"]),
        bool(row["hurt"] > 0.5 and row["hurt "] < 0.1),
    )
    together = Claim(
        "the same of all confirmed heads: switched off, they hurt more where they are active",
        "ours",
        None,
        f"{more} of {len(table)} hurt more where active (interval above 0; {survive} with q ≤ 0.05), {less} where dormant; mean "
        f"difference {table['Δloss difference'].mean():+.4f} nats",
        _interval(table["Δloss difference"].to_numpy()),
        len(table),
        bool(more > len(table) / 2 and less == 0),
    )
    return [exists, costs, texts, together]


def peak_claim(scanned: Scan, domains: Sequence[str]) -> Claim:
    """Residual norm at the first token against the others, at the layer where it is largest."""
    first = domains[1] if len(domains) > 1 else domains[0]
    layers = scanned.layers(["resid_ratio", "resid_first", "resid_others"]).query("domain == @first")
    ratio = layers[layers["measure"] == "resid_ratio"].set_index("layer")
    layer = int(ratio["mean"].idxmax())
    row = ratio.loc[layer]
    norms = {
        name: float(layers[(layers["measure"] == name) & (layers["layer"] == layer)]["mean"].iloc[0])
        for name in ("resid_first", "resid_others")
    }
    return Claim(
        "the sink token's residual norm is an order of magnitude above the others'",
        GUO,
        "Llama-3.1-8B, layer 24: 496 against 37 (13 times)",
        f"{first}, layer {layer}: {norms['resid_first']:.0f} against a median of {norms['resid_others']:.0f}; interval: ratio",
        (row["low"], row["high"]),
        int(row["n"]),
        bool(row["low"] > 10),
    )


def origin_claim(origins: Result) -> Claim:
    """Which blocks make the peak."""
    table = peaks.origin(origins)
    early = table[table["arm"] == "early"]
    makers = early[early["makes_peak"]].groupby(["block", "block_layer"]).size()
    everywhere = [f"{block} {layer}" for (block, layer), n in makers.items() if n == early["domain"].nunique()]
    weakest = early.sort_values("remaining").iloc[0]
    attention = early[early["block"] == "attention"]["remaining"].min()
    mlps = [name for name in everywhere if name.startswith("mlp")]
    return Claim(
        "the peak is made by early MLPs; attention is irrelevant",
        GUO,
        "Llama-3.1-8B: by the MLPs of layers 0 and 1",
        f"zeroing any of {', '.join(everywhere) or 'no block'} takes it away; zeroing one attention block leaves at "
        f"least {attention:.0%} of the norm; interval: share left without {weakest['block']} {weakest['block_layer']}",
        _ends(weakest["low"], weakest["high"]),
        int(weakest["n"]),
        bool(mlps and len(mlps) == len(everywhere) and attention > 0.5),
    )


def drain_claim(scanned: Scan, domains: Sequence[str]) -> Claim:
    """Value norms at the first token against the others, over the heads of the layers where it is a sink."""
    first = domains[1] if len(domains) > 1 else domains[0]
    sinks = scanned.layers(["n_sinks"]).query("domain == @first").set_index("layer")["mean"]
    layers = [int(layer) for layer in sinks.index if sinks[layer] >= 1 and layer > sinks.index.min()]
    values = scanned.values("value_ratio")[first]
    here = values.loc[:, values.columns.get_level_values("layer").isin(layers)].to_numpy(dtype=float)
    claim = "the sink token's value states are drained"
    paper = "Llama-3.1-8B: norm ≈ 0.2 against 2 to 2.5 (about a tenth)"
    if not here.size:
        return Claim(claim, GUO, paper, "no layer has a sink token", None, len(values), None)
    medians = np.median(here, axis=1)
    low, high = bootstrap_mean(medians)
    return Claim(
        claim,
        GUO,
        paper,
        f"{first}: {np.median(here.mean(0)):.2f} of the others' norm, median over {here.shape[1]} heads of the layers "
        f"that read a sink; {np.mean(here.mean(0) < 0.5):.0%} of heads below a half; interval: median over heads",
        _ends(float(low), float(high)),
        len(values),
        bool(high < 0.5),
    )


def evict_claim(evicted: Result) -> Claim:
    """StreamingLLM: first keys kept or removed."""
    table = evictions.summary(evicted).set_index(["domain", "arm"])
    domain = table.index[0][0]
    window, kept, full = (table.loc[(domain, arm)] for arm in ("window", "sinks", "full"))
    difference = table.loc[(domain, "sinks − control")]
    made = evicted.provenance.parameters
    return Claim(
        "under a sliding window the loss explodes once the first keys are gone, and a few of them kept restore it",
        XIAO,
        "Llama-2-13B, 1,024 keys, 65,000 tokens: perplexity 5158 without, 5.40 with 4 kept",
        f"{domain}, {made['window']} keys: perplexity {window['perplexity']:.4g} without, {kept['perplexity']:.4g} with "
        f"{made['n_sinks']} kept, {full['perplexity']:.4g} with all; interval: kept − other early keys kept, nats",
        _ends(difference["low"], difference["high"]),
        int(difference["n"]),
        bool(difference["high"] < 0 and window["low"] > 1),
    )


def bos_claim(variants: pd.DataFrame) -> Claim:
    """The sink is wherever the text begins."""
    without = variants[variants["variant"] == "no BOS"]
    row = without.iloc[0]
    return Claim(
        "without a BOS token the first token is the sink all the same",
        GUO,
        None,
        "; ".join(
            f"{entry['domain']}: mass on key 0 {entry['mass on key 0']:.2f}, a residual peak there in "
            f"{entry['key 0 is a sink']:.0%} of texts"
            for entry in without.to_dict("records")
        ),
        _ends(row["low"], row["high"]),
        int(row["n"]),
        bool((without["key 0 is a sink"] > 0.5).all()),
    )


def _interval(values: np.ndarray) -> tuple[float, float] | None:
    low, high = bootstrap_mean(values)
    return _ends(float(low), float(high))


def _ends(low: float, high: float) -> tuple[float, float] | None:
    return None if math.isnan(low) or math.isnan(high) else (float(low), float(high))


def main(
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    texts: Annotated[int, typer.Option(help="Texts per domain that choose heads.")] = 48,
    length: Annotated[int, typer.Option(help="Tokens per text.")] = 128,
    short: Annotated[bool, typer.Option(help="The smaller run that the report uses.")] = False,
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path, typer.Option()] = Path("reports/sink_heads"),
) -> None:
    """Scan for sinks, confirm by ablation, and write a report."""
    loaded = load_model(model, device=device, dtype=dtype)
    section = run(loaded, out, length=length, **(REPORT if short else {"n_texts": texts}))
    for table in section.items[:3]:
        show(table)
    show(claims_frame(section.claims))
    print(write_report([section], out / "report.html", title=f"Attention sinks of {loaded.name}"))


if __name__ == "__main__":
    typer.run(main)
