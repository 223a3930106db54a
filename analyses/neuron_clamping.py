"""What happens when concept neurons are clamped: a fair search, tested on other prompts, beside its controls.

Reproduces what H. J. Davies (arXiv 2501.02688) reports of clamping, on any model. The paper names no prompts, doses, sites or
signs, so the search for them is ours: chosen on some prompts, reported on others.

    python -m analyses.neuron_clamping [--model NAME] [--concepts 10] [--out reports/neuron_clamping]
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from analyses.neuron_decoding import SITES, SOURCE, atlas
from interp import load_model
from interp.cli import show
from interp.errors import InputError
from interp.neurons import concept_of, dose_response, neuron_statistics, search_clamp
from interp.neurons.atlas import wilson
from interp.report import Section, write_report
from interp.report.claims import Claim, claims_frame, write_claims
from interp.results import Result
from interp.reuse import reuse_or_make

DATA = Path(__file__).parent.parent / "data"
FAVOURITE = [
    "What is your favourite animal?",
    "Which animal do you like best?",
    "Tell me about your favourite animal.",
    "If you could be any animal, which one would you be?",
    "What animal would you choose as a pet?",
    "Name one animal that you love.",
]


# How much is searched per concept. SHORT keeps ten concepts within a few minutes on two CPU cores.
FULL: dict[str, Any] = {"n_candidates": 4, "n_finalists": 4, "n_random": 3}
SHORT: dict[str, Any] = {
    "n_candidates": 3,
    "n_finalists": 3,
    "n_random": 2,
    "doses": (-80.0, -40.0, -20.0, 20.0, 40.0, 80.0),
}


def run(
    model: Any,
    out: Path,
    n_concepts: int = 10,
    n_prompts: int = 12,
    max_new_tokens: int = 24,
    effort: dict[str, Any] = FULL,
) -> Section:
    """Search the best clamp of each concept, report it on other prompts, and sweep its dose.

    Args:
        model: what `load_model` gave.
        out: folder for the results; what is there already is used again. Atlases are shared with
            `analyses.neuron_decoding` where that wrote beside it.
        n_concepts: how many concepts of data/concepts.jsonl.
        n_prompts: how many search prompts, and as many report prompts, of data/prompts.jsonl.
        max_new_tokens: length of the answers.
        effort: `FULL` or `SHORT`.

    Returns:
        A section for a report.
    """
    chat = bool(getattr(model.tokenizer, "chat_template", None))
    prompts = read_jsonl("prompts.jsonl")
    search, report = (
        [row["text"] for row in prompts if row["set"] == name][:n_prompts] for name in ("search", "report")
    )
    sample = [row["text"] for row in read_jsonl("sample_texts.jsonl")]
    sites = SITES if model.arch.family.gate is not None else ("up", "down")
    atlases = {site: atlas(model, out.parent / "neuron_decoding", site) for site in sites}
    # Each neuron's own spread, over neutral prose, is the unit of its doses.
    statistics = reuse_or_make(
        out / "statistics.parquet",
        lambda: neuron_statistics(model, sample, [site if site != "down" else "hidden" for site in sites]),
        fingerprint=model.fingerprint,
    )
    settings = {"chat": chat, "max_new_tokens": max_new_tokens, "statistics": statistics}
    found: dict[str, Result] = {}
    for row in read_jsonl("concepts.jsonl")[:n_concepts]:
        concept = row["concept"]
        try:
            found[concept] = reuse_or_make(
                out / f"search_{concept.strip()}.parquet",
                lambda concept=concept, row=row: search_clamp(  # type: ignore[misc]
                    model,
                    concept,
                    search,
                    report,
                    atlases=atlases,
                    unrelated=if_token(model, row["unrelated"]),
                    **settings,
                    **effort,
                ),
                fingerprint=model.fingerprint,
                parameters={"chat": chat, "max_new_tokens": max_new_tokens, "n_candidates": effort["n_candidates"]},
            )
        except InputError as error:  # not a token of this model, or no neuron decodes to it
            print(f"{concept!r} left out: {error}")
    table = outcome_table(found)
    dog = favourite_animal(model, found.get(" dog"), out, settings)
    claims = [probability_claim(table), mention_claim(table), favourite_claim(dog)]
    write_claims(out / "claims.json", claims)
    items: list[Any] = [table, *([dog] if dog is not None else []), answers(found), *found.values()]
    text = (
        f"For {len(found)} concepts, the neurons that decode to the concept are clamped at up, gate and hidden, with doses of "
        "both signs in standard deviations of the neuron. The clamp is chosen on "
        f"{len(search)} prompts and reported on {len(report)} others, beside random neurons of the same layer at the same dose, "
        "zero ablation and the model as it is. Fluency is the perplexity of the answer under the unclamped model."
    )
    return Section("Neurons: what clamping them does", text, items, claims)


# What `make report` runs.
REPORT: dict[str, Any] = {"n_prompts": 6, "max_new_tokens": 12, "effort": SHORT}


def read_jsonl(name: str) -> list[dict[str, Any]]:
    """Rows of one of our own data files."""
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines() if line.strip()]


def if_token(model: Any, word: str) -> str | None:
    """A control word, unless this model's tokenizer cuts it into pieces."""
    try:
        concept_of(model, word)
    except InputError:
        return None
    return word


def outcome_table(found: dict[str, Result]) -> pd.DataFrame:
    """Per concept: the chosen clamp, and mention rate, probability and fluency of each arm on the report prompts."""
    rows = []
    for concept, result in found.items():
        report = result.frame[result.frame["stage"] == "report"].set_index("arm")
        row: dict[str, Any] = {"concept": concept}
        if "clamp" in report.index:
            chosen = report.loc["clamp"]
            row |= {name: chosen[name] for name in ("site", "layer", "neuron", "dose", "value")}
            row |= {
                "mentions": chosen["mention_rate"],
                "low": chosen["mention_rate_low"],
                "high": chosen["mention_rate_high"],
            }
        for arm in ("none", "random", "zero"):
            row[f"mentions, {arm}"] = arm_mean(report, arm, "mention_rate")
        for arm in ("clamp", "none", "random"):
            row[f"p, {arm}"] = arm_mean(report, arm, "p_concept")
        row["perplexity ratio"] = arm_mean(report, "clamp", "perplexity_ratio")
        row["n"] = int(report.loc["none", "n"])
        rows.append(row)
    return pd.DataFrame(rows)


def arm_mean(report: pd.DataFrame, arm: str, column: str) -> float:
    """Mean over an arm's rows (several random neurons); NaN where it was not run."""
    return float(np.mean(report.loc[[arm], column].to_numpy(dtype=float))) if arm in report.index else math.nan


def answers(found: dict[str, Result]) -> pd.DataFrame:
    """The first two report prompts' answers of every concept and arm, to be read."""
    rows = []
    for concept, result in found.items():
        texts = pd.DataFrame(result.attachments.get("answers", []))
        if len(texts):
            first = texts.drop_duplicates("prompt")["prompt"].head(2)
            rows.append(texts[texts["prompt"].isin(first)].assign(concept=concept))
    if not rows:
        return pd.DataFrame({"concept": []})
    table = pd.concat(rows, ignore_index=True)
    first_columns = ["concept", "arm", "prompt", "text"]
    return table[first_columns + [name for name in table.columns if name not in first_columns]]


def favourite_animal(model: Any, found: Result | None, out: Path, settings: dict[str, Any]) -> Result | None:
    """The paper's experiment: the dog neuron clamped, the favourite animal asked for; doses around the chosen one."""
    if found is None:
        return None
    tried = found.frame[(found.frame["stage"] == "search") & (found.frame["arm"] == "clamp")]
    # The paper asks for dogs, not for fluency: where no clamp stayed fluent, the one that mentioned most.
    chosen = tried.sort_values(["chosen", "mention_rate", "p_concept"], ascending=False).iloc[0]
    dose = float(chosen["dose"])
    doses = sorted({round(dose * factor, 3) for factor in (-1, 0.25, 0.5, 1, 1.5)})
    return reuse_or_make(
        out / "favourite_animal.parquet",
        lambda: dose_response(
            model,
            " dog",
            FAVOURITE,
            doses,
            neuron=(int(chosen["layer"]), int(chosen["neuron"])),
            site=chosen["site"],
            n_random=2,
            unrelated=if_token(model, " chair"),
            **settings,
        ),
        fingerprint=model.fingerprint,
        parameters={"max_new_tokens": settings["max_new_tokens"]},
    )


def probability_claim(table: pd.DataFrame) -> Claim:
    """Does the clamp raise the concept's probability on new prompts more than random neurons do?"""
    claim = "clamping a concept's neuron changes the concept's probability in the output"
    paper = "yes; no figure given"
    done = table.dropna(subset=["p, clamp"]) if "p, clamp" in table else table.iloc[:0]
    if len(done) < 2:
        return Claim(claim, SOURCE, paper, "no clamp stayed fluent", None, len(done), None)
    floor = 1e-12  # float32 probabilities can be 0
    change = np.log10(done["p, clamp"].clip(lower=floor)) - np.log10(done["p, none"].clip(lower=floor))
    control = np.log10(done["p, random"].clip(lower=floor)) - np.log10(done["p, none"].clip(lower=floor))
    low, high = bootstrap_mean((change - control).to_numpy())
    ours = (
        f"× {10 ** change.mean():.3g} on new prompts; random neurons at the same dose × {10 ** control.mean():.3g} "
        "(geometric means over concepts); interval: log10 of their ratio"
    )
    return Claim(claim, SOURCE, paper, ours, (low, high), len(done), bool(low > 0 or high < 0))


def mention_claim(table: pd.DataFrame) -> Claim:
    """Do the answers speak of the concept?"""
    claim = "clamped, the model speaks of the concept more often than with random neurons clamped"
    source = f"ours, after {SOURCE}: other concepts, prompts about other things"
    done = table.dropna(subset=["mentions"]) if "mentions" in table else table.iloc[:0]
    if done.empty:
        return Claim(claim, source, None, "no clamp stayed fluent", None, 0, None)
    hits, n = round(float((done["mentions"] * done["n"]).sum())), int(done["n"].sum())
    low, high = wilson(hits, n)
    random = float(done["mentions, random"].mean())
    ours = f"{hits / n:.0%} of answers; random neurons {random:.0%}; unclamped {done['mentions, none'].mean():.0%}"
    return Claim(claim, source, None, ours, (low, high), n, bool(low > random))


def favourite_claim(result: Result | None) -> Claim:
    """The paper's sentence about the instruct model, word for word testable: always."""
    claim = 'with the "dog" neuron clamped, the model always talks about dogs when asked for its favourite animal'
    paper = "always"
    if result is None:
        return Claim(claim, SOURCE, paper, "not measured: no dog neuron was found", None, 0, None)
    frame = result.frame
    rates = frame[frame["arm"] == "clamp"].groupby("dose")["mentions"].agg(["mean", "sum", "size"])
    best = rates["mean"].idxmax()
    row = rates.loc[best]
    control = frame[(frame["arm"] == "random") & (frame["dose"] == best)]["mentions"].mean()
    plain = frame[frame["arm"] == "none"]["mentions"].mean()
    interval = wilson(int(row["sum"]), int(row["size"]))
    perplexity = {arm: frame[frame["arm"] == arm] for arm in ("clamp", "none")}
    at_best = perplexity["clamp"][perplexity["clamp"]["dose"] == best]
    ratio = at_best["perplexity"].median() / perplexity["none"]["perplexity"].median()
    ours = (
        f"{row['mean']:.0%} of {int(row['size'])} wordings at {best:g} sd, the best of {len(rates)} doses, at {ratio:.1f} times "
        f"the perplexity; random neurons {control:.0%}; unclamped {plain:.0%}"
    )
    return Claim(claim, SOURCE, paper, ours, interval, int(row["size"]), bool(row["mean"] == 1))


def bootstrap_mean(values: np.ndarray, n: int = 5000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a mean."""
    drawn = np.random.default_rng(seed).choice(values, size=(n, len(values)))
    low, high = np.quantile(drawn.mean(1), [0.025, 0.975])
    return float(low), float(high)


def main(
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    concepts: Annotated[int, typer.Option(help="How many concepts of data/concepts.jsonl.")] = 10,
    short: Annotated[bool, typer.Option(help="The smaller search that the report uses.")] = False,
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path, typer.Option()] = Path("reports/neuron_clamping"),
) -> None:
    """Clamp concept neurons and write a report."""
    loaded = load_model(model, device=device, dtype=dtype)
    section = run(loaded, out, concepts, **(REPORT if short else {}))
    show(section.items[0])
    show(claims_frame(section.claims))
    print(write_report([section], out / "report.html", title=f"Clamped neurons of {loaded.name}"))


if __name__ == "__main__":
    typer.run(main)
