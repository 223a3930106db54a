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

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from analyses import sink_claims
from interp import load_model
from interp.cli import show
from interp.intervals import bootstrap_difference, bootstrap_mean, false_discovery, permutation_test
from interp.report import Section, write_report
from interp.report.claims import claims_frame, write_claims
from interp.results import Result
from interp.reuse import reuse_or_make
from interp.sinks import Scan, ablate, classify, compare, evict, plots, read_domain, residual_peak_origin, scan
from interp.sinks import eviction as evictions
from interp.sinks import residual_peaks as peaks
from interp.sinks.encoded_texts import digests
from interp.sinks.sequences import domain_sequences, sequences

DOMAINS = ("code", "editorials", "movie-reviews", "product-reviews", "tweets", "numbers", "json")
CONTROLS = ("repeated", "random")  # not language: shown, and never chosen from
EPSILON = 0.3  # Gu et al., arXiv 2410.10781
HURT = 0.01  # nats from which a text counts as hurt, as in the paper
# Columns of the two tables of confirmed heads.
MASSES = [
    *("head", "label", "dormant on", "mass", "active on", "mass ", "difference", "q"),
    *("fresh mass", "fresh mass ", "fresh difference", "low", "high", "fresh q", "n"),
]
LOSSES = [
    *(
        "head",
        "active on",
        "Δloss",
        "Δloss low",
        "Δloss high",
        "hurt",
        "dormant on",
        "Δloss ",
        "hurt ",
        "Δloss difference",
    ),
    *("Δloss difference low", "Δloss difference high", "loss q", "above random heads", "above random heads low"),
    *("above random heads high", "random heads", "n"),
]
# What `make report` runs.
REPORT: dict[str, Any] = {"n_texts": 14, "n_heads": 3, "n_random": 6, "n_confirm": 12, "n_small": 3}


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
    window: int | None = None,
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
        window: of the eviction, whose texts are four times as long as the others; by default `length`.

    Returns:
        A section for a report.
    """
    start = document_start(model)
    specs, choosing, fresh = list(domains), {}, {}
    for spec in [*domains, *controls]:
        name, choosing[name], fresh[name] = halves(model, spec, length, n_texts, n_confirm, start)
    domains = list(choosing)[: len(specs)]
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
            "n_random": n_random,
            "texts": digests(confirming),
        },
    )
    table = confirm(chosen, again, ablated)
    few = {name: [ids[: max(length // 2, 3)] for ids in fresh[name][: max(2, n_small // 2)]] for name in domains[:2]}
    origins = reuse_or_make(
        out / "residual_peak_origin.parquet",
        lambda: residual_peak_origin(model, few),
        fingerprint=model.fingerprint,
        parameters={"texts": digests(few)},
    )
    longer = domain_sequences(model, specs[:2], 4 * length, n_small, bos=start, seed=1)
    evicted = reuse_or_make(
        out / "evict.parquet",
        lambda: evict(model, longer, window=window or length),
        fingerprint=model.fingerprint,
        parameters={"window": window or length, "texts": digests(longer)},
    )
    variants = variant_table(model, out, specs[:2], length, 2 * n_small, start)
    shown = domains[min(1, len(domains) - 1)]
    claims = [
        *sink_claims.heads(table),
        sink_claims.peak(scanned, shown),
        sink_claims.origin(origins),
        sink_claims.drain(scanned, shown),
        sink_claims.evict(evicted),
        sink_claims.first_token(variants),
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
        f"confirmed on {n_confirm} others, from other documents. Mass is the attention on the first token, mean over the "
        "queries that see it. "
        "Intervals are over texts, 95 %; where heads are named, those of differences are widened for the choice among heads and "
        "pairs.\n\n"
        "The first two tables have a row per confirmed head: its masses on the texts that chose it and on fresh texts; and how "
        "much the loss rises where the head is active and where it is dormant when it is switched off, beside random heads of "
        "the same layers, with the share of texts that it hurts by more than 0.01 nats."
    )
    return Section("Sinks: which heads sleep on which kind of text", text, items, claims)


def halves(
    model: Any, spec: str, length: int, n_first: int, n_second: int, start: Any
) -> tuple[str, list[list[int]], list[list[int]]]:
    """A domain's name, and texts from one half of its documents and from the other."""
    name, documents = read_domain(spec, model, length=length, n=2 * max(n_first, n_second))
    order = np.random.default_rng(0).permutation(len(documents))
    parts = [[documents[at] for at in order[half::2]] for half in (0, 1)]
    first, second = (
        sequences(model, part, length, n, bos=start) for part, n in zip(parts, (n_first, n_second), strict=True)
    )
    return name, first, second


def document_start(model: Any) -> Any:
    """What stood before a document in training: what the tokenizer adds, else <|endoftext|> where that is a token, else BOS.

    SmolLM2 adds nothing by itself and was pretrained on documents that <|endoftext|> separates.
    """
    tokenizer = model.tokenizer
    if len(tokenizer("a")["input_ids"]) > len(tokenizer("a", add_special_tokens=False)["input_ids"]):
        return "auto"
    return "<|endoftext|>" if "<|endoftext|>" in tokenizer.get_vocab() else True  # SmolLM2's unknown token too


def token_name(model: Any, start: Any) -> str:
    """For the text of the report."""
    return start if start not in ("auto", True) else f"the tokenizer's own {model.tokenizer.bos_token}"


def _scan(model: Any, out: Path, name: str, texts: dict[str, list[list[int]]]) -> Scan:
    result = reuse_or_make(
        out / f"{name}.parquet",
        lambda: scan(model, texts),
        fingerprint=model.fingerprint,
        parameters={"texts": digests(texts)},
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
    """The chosen heads on fresh texts: masses and loss changes, each with an interval; q over these heads.

    The random heads are those of the head's own layer, where there are any; the difference from them is paired by text.
    """
    values = again.values()
    frame = ablated.frame.astype({"domain": str, "arm": str})
    losses = frame.pivot(index=["domain", "text"], columns=["arm", "layer", "head"], values="delta_loss")
    rows = []
    for row in chosen.itertuples():
        key = (row.layer, row.head)
        asleep, awake = (values[name][key].to_numpy(dtype=float) for name in (row.dormant_on, row.active_on))
        low, high = bootstrap_difference(asleep, awake)
        on_active, on_dormant = (
            losses.loc[name][("head", *key)].to_numpy(dtype=float) for name in (row.active_on, row.dormant_on)
        )
        others = losses.loc[row.active_on].get("random", pd.DataFrame(index=losses.loc[row.active_on].index))
        same = [column for column in others.columns if column[0] == row.layer] or list(others.columns)
        against = (
            on_active - others[same].mean(axis=1).to_numpy(dtype=float) if same else np.full(len(on_active), np.nan)
        )
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
                **_two("Δloss", bootstrap_mean(on_active)),
                "hurt": float((on_active > HURT).mean()),
                "Δloss ": on_dormant.mean(),
                **_two("Δloss ", bootstrap_mean(on_dormant)),
                "hurt ": float((on_dormant > HURT).mean()),
                "Δloss difference": on_active.mean() - on_dormant.mean(),
                **_two("Δloss difference", bootstrap_difference(on_active, on_dormant)),
                "loss p": float(permutation_test(on_active, on_dormant)),
                "above random heads": against.mean(),
                **_two("above random heads", bootstrap_mean(against)),
                "random heads": len(same),
                "n": min(len(asleep), len(awake)),
            }
        )
    table = pd.DataFrame(rows)
    table["fresh q"] = false_discovery(table.pop("p").to_numpy())[0]
    table["loss q"] = false_discovery(table.pop("loss p").to_numpy())[0]
    return table


def _two(name: str, ends: tuple[Any, Any]) -> dict[str, float]:
    return {f"{name} low": float(ends[0]), f"{name} high": float(ends[1])}


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
