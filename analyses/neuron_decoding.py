"""Which MLP neurons hold which concept? Decode them all through the LM head.

Reproduces what H. J. Davies, "Decoding specialised feature neurons in LLMs with the final projection layer" (arXiv 2501.02688),
reports for Llama 3.1 8B, on any model. Prints the table claim · paper · ours and writes a report.

    python -m analyses.neuron_decoding [--model NAME] [--base OTHER] [--out reports/neuron_decoding]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from interp import load_model
from interp.cli import show
from interp.errors import InputError
from interp.neurons import compare, decode, plots
from interp.neurons.atlas import Atlas, wilson
from interp.report import Section, write_report
from interp.report.claims import Claim, claims_frame, write_claims
from interp.reuse import reuse_or_make

SOURCE = "Davies 2025, arXiv 2501.02688"
CONCEPTS = Path(__file__).parent.parent / "data" / "concepts.jsonl"
SITES = ("up", "gate", "down")


def run(model: Any, out: Path, base: Any = None) -> Section:
    """Decode a model's neurons at every site, beside a control with shuffled weights.

    Args:
        model: what `load_model` gave.
        out: folder for the results; what is there already is used again.
        base: a second model of the same shape, to compare neuron by neuron.

    Returns:
        A section for a report.
    """
    sites = SITES if model.arch.family.gate is not None else ("up", "down")
    atlases = {site: atlas(model, out, site) for site in sites}
    controls = {site: atlas(model, out, site, shuffle=True, sample=min(256, model.arch.d_mlp)) for site in sites}
    concepts = [*concept_words(), " California"]
    best = concept_table(atlases, concepts)
    claims = [*existence_claims(atlases, controls, best), cost_claim(atlases["up"])]
    items: list[Any] = [
        best,
        summary_table(atlases, controls),
        plots.atlas(atlases["up"], controls["up"]),
        *(plots.specialised(atlases[site], controls[site]) for site in sites),
    ]
    strongest = best.sort_values("probability", ascending=False).iloc[0]
    at = (int(strongest["layer"]), int(strongest["neuron"]), int(strongest["sign"]))
    items.append(plots.card(atlases[strongest["site"]], *at))
    items.append(atlases[strongest["site"]].nearest(*at))
    sites_compared = compare(atlases["up"], atlases[sites[1]])
    sites_compared.save(out / "up_against_gate.parquet")
    items.append(sites_compared)
    claims.append(base_claim(model, base, atlases["up"], out, items))
    write_claims(out / "claims.json", claims)
    text = (
        f"Every MLP neuron of {model.name} ({model.arch.n_layers} layers × {model.arch.d_mlp}) is decoded through the final norm "
        "and the LM head, with both signs of its weights. The control decodes the same weights, shuffled within each neuron. "
        "The table of concepts shows the best neuron at each site: its probability is the sum over the concept's "
        "single-token spellings."
    )
    return Section("Neurons: which hold which concept", text, items, claims)


def atlas(model: Any, out: Path, site: str, **options: Any) -> Atlas:
    """One site's atlas, decoded or taken from an earlier run."""
    name = f"atlas_{site}{'_shuffled' if options.get('shuffle') else ''}.parquet"
    wanted = {"site": site, "norm": "final", "top_k": 10, "sample": None, "shuffle": False, **options}
    result = reuse_or_make(
        out / name, lambda: decode(model, site, **options), fingerprint=model.fingerprint, parameters=wanted
    )
    assert isinstance(result, Atlas)
    return result


def concept_words() -> list[str]:
    """The concepts of data/concepts.jsonl."""
    return [json.loads(line)["concept"] for line in CONCEPTS.read_text().splitlines() if line.strip()]


def concept_table(atlases: dict[str, Atlas], concepts: list[str]) -> pd.DataFrame:
    """The best neuron of every concept at every site; concepts that are no token of this model are left out."""
    rows = []
    for concept in concepts:
        for site, found_in in atlases.items():
            try:
                found = found_in.find(concept, top=1)
            except InputError:
                continue
            if len(found):
                row = found.iloc[0].to_dict()
                rows.append({"concept": concept, "site": site, **row})
    return pd.DataFrame(rows)


def summary_table(atlases: dict[str, Atlas], controls: dict[str, Atlas]) -> pd.DataFrame:
    """Per site, real and shuffled weights: peaked and specialised shares, coverage of the vocabulary."""
    rows = []
    for site in atlases:
        for weights, one in (("real", atlases[site]), ("shuffled", controls[site])):
            table = one.neurons
            special = int(table["specialised"].sum())
            low, high = wilson(special, len(table))
            row = {"site": site, "weights": weights, "neurons and signs": len(table)}
            row |= {"median top-1 probability": float(table["probability"].median())}
            row |= {"specialised": special / len(table), "low": low, "high": high}
            row |= {f"vocabulary covered, {name}": one.coverage()[name] for name in ("top1", "specialised")}
            rows.append(row)
    return pd.DataFrame(rows)


def existence_claims(atlases: dict[str, Atlas], controls: dict[str, Atlas], best: pd.DataFrame) -> list[Claim]:
    """The paper's "dog" and "California" neurons, and specialised neurons against shuffled weights."""
    claims = []
    for word in (" dog", " California"):
        rows = best[best["concept"] == word] if len(best) else best
        if rows.empty:
            claims.append(
                Claim(f'a "{word.strip()}" neuron exists', SOURCE, "one is shown", "not a token here", None, 0, None)
            )
            continue
        row = rows.sort_values("probability", ascending=False).iloc[0]
        where = f"layer {row['layer']}, neuron {row['neuron']}, sign {row['sign']:+d}, {row['site']}"
        ours = f"p = {row['probability']:.3f} ({where}; {'' if row['specialised'] else 'not '}specialised)"
        n = sum(len(one.neurons) for one in atlases.values())
        claims.append(
            Claim(f'a "{word.strip()}" neuron exists', SOURCE, "one is shown", ours, None, n, bool(row["rank"] == 1))
        )
    for site, one in atlases.items():
        table, control = one.neurons, controls[site].neurons
        share, chance = table["specialised"].mean(), control["specialised"].mean()
        low, high = wilson(int(table["specialised"].sum()), len(table))
        top = wilson(int(control["specialised"].sum()), len(control))[1]
        claims.append(
            Claim(
                f"specialised neurons exist: {site} weights, more than with shuffled weights",
                f"{SOURCE}; our definition and control",
                "no share is given",
                f"{share:.2%} of neurons and signs; shuffled {chance:.2%} (n = {len(control)})",
                (low, high),
                len(table),
                bool(low > top),
            )
        )
    return claims


def cost_claim(up: Atlas) -> Claim:
    """What a full map costs. The paper names neither hardware nor norm, so this is beside it, not against it."""
    parameters = up.provenance.parameters
    neurons = parameters["n_layers"] * parameters["d_mlp"]
    return Claim(
        "cost of a full map of the up-projection",
        SOURCE,
        "458,752 neurons, 128,256 tokens: under 15 min (v1), under 10 s for the top features (v2)",
        f"{neurons:,} neurons, {parameters['vocab_size']:,} tokens: {up.provenance.wall_time:.0f} s on {up.provenance.device}",
        None,
        1,
        None,
    )


def base_claim(model: Any, base: Any, up: Atlas, out: Path, items: list[Any]) -> Claim:
    """Same top-1 token in base and instruct model."""
    claim, paper = "base and instruct have the same top-1 token in most up neurons", "75.4 % of 458,752"
    if base is None:
        ours = "not measured: no base model was given (--base)"
        return Claim(claim, SOURCE, paper, ours, None, 0, None)
    theirs = atlas(base, out / "base", "up")
    result = compare(up, theirs)
    result.save(out / "base_against_instruct.parquet")
    items.append(result)
    row = result.frame[result.frame["layer"] == -1].iloc[0]
    ours = f"{row['agree']:.1%}; chance {row['chance']:.1%}"
    interval = (float(row["low"]), float(row["high"]))
    return Claim(
        f"{claim} ({base.name}, {model.name})", SOURCE, paper, ours, interval, int(row["n"]), bool(row["low"] > 0.5)
    )


def main(
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    base: Annotated[str | None, typer.Option(help="A base model to compare with.")] = None,
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path, typer.Option()] = Path("reports/neuron_decoding"),
) -> None:
    """Decode a model's neurons and write a report."""
    loaded = load_model(model, device=device, dtype=dtype)
    section = run(loaded, out, None if base is None else load_model(base, device=device, dtype=dtype))
    show(section.items[0][["concept", "site", "layer", "neuron", "sign", "probability", "tokens", "specialised"]])
    show(claims_frame(section.claims))
    print(write_report([section], out / "report.html", title=f"Neurons of {loaded.name}"))


if __name__ == "__main__":
    typer.run(main)
