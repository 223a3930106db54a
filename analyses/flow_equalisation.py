"""Does a language model name more of a prompt's concepts when their attention flows are made equal?

Carries over to text what X. Yang & X. Wang, "Compositional Video Generation as Flow Equalization" (Vico, arXiv
2407.06182), report for text-to-video models. Prompts that name four or five things (data/concept_prompts.jsonl) are
answered as they are and with changed embeddings, and we count which things the answers name. Prints the table claim ·
paper · ours and writes a report.

    python -m analyses.flow_equalisation [--model NAME] [--out reports/flow_equalisation]
    python -m analyses.flow_equalisation --tune      # how the step sizes were chosen

Arms, each on the same prompts:

    none            the embeddings as they are
    min soft        ascends min_i A_i, A_i the softened widest path (Vico's own)
    min exact       ascends min_i A_i, A_i the maximum flow, by its minimum cut
    variance soft   ascends −Σ (A_i − mean A)² (Vico's ablation)
    random like …   random directions with the norms of that arm's perturbation, position by position

What was chosen on the tuning prompts alone: step sizes (`choose`: of four per arm the one that mentions most while
perplexity rises by at most a tenth), and prompts of which the embedded model names about half by itself. Everything else
is measured on the test prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from analyses import flow_equalisation_claims as claimed
from analyses.neuron_clamping import read_jsonl
from interp import load_model
from interp.cli import show
from interp.flow.equalization import digest, equalize
from interp.flow.equalized_arms import combine, differences, summary
from interp.report import Section, write_report
from interp.report.claims import claims_frame, write_claims
from interp.results import Result
from interp.reuse import reuse_or_make

# Arm: (objective, method, learning rate). The rates are what `--tune` chose on the embedded model.
ASCENTS: dict[str, tuple[str, str, float]] = {
    "min soft": ("min", "soft", 0.01),
    "min exact": ("min", "exact", 0.01),
    "variance soft": ("variance", "soft", 0.01),
}
RANDOM_LIKE = ("min soft", "min exact")
# What `--tune` tries; the perturbation's share of the embeddings' norm after one step.
RATES = (0.001, 0.003, 0.01, 0.03)
FLUENT = 1.1  # how much perplexity may rise
SETTINGS: dict[str, Any] = {"steps": 8, "threshold": 0.99, "max_norm": 0.5, "temperature": 0.01}
# Columns of the two tables of arms, and their headings.
OUTCOMES = {
    **{"arm": "arm", "n": "n", "mentioned": "named", "mentioned_low": "named from", "mentioned_high": "named to"},
    **{"all_mentioned": "all named", "all_mentioned_low": "all from", "all_mentioned_high": "all to"},
    **{"perplexity": "perplexity", "norm": "‖δ‖ share", "steps": "steps"},
}
FLOWS = {
    **{"arm": "arm", "min_flow_before": "least before", "min_flow": "least after"},
    **{"mean_flow_before": "mean before", "mean_flow": "mean after"},
    **{"evenness_before": "even before", "evenness": "even after"},
    **{"own_min_flow_before": "own least before", "own_min_flow": "own least after"},
    **{"own_evenness_before": "own even before", "own_evenness": "own even after"},
}
# What `make report` runs.
REPORT: dict[str, Any] = {"n_prompts": 8, "arms": ("min exact",)}


def run(
    model: Any,
    out: Path,
    *,
    n_prompts: int | None = None,
    arms: Sequence[str] = tuple(ASCENTS),
    steps: int = SETTINGS["steps"],
    max_new_tokens: int = 32,
    chat: bool | None = None,
) -> Section:
    """Answer the test prompts in every arm and compare.

    Args:
        model: what `load_model` gave.
        out: folder for the results; what is there already is used again.
        n_prompts: of the test prompts; all by default.
        arms: which of `ASCENTS`; "none" and random directions are always there.
        steps: of an ascent.
        max_new_tokens: longest answer, in tokens.
        chat: wrap prompts in the chat template; by default where the tokenizer has one.

    Returns:
        A section for a report.
    """
    prompts, concepts = concept_prompts("test", n_prompts)
    settings = {**SETTINGS, "steps": steps, "max_new_tokens": max_new_tokens, "chat": has_template(model, chat)}
    found = {"none": arm(model, out, "none", prompts, concepts, objective="none", **settings)}
    for name in arms:
        objective, method, rate = ASCENTS[name]
        options = {"objective": objective, "method": method, "learning_rate": rate, **settings}
        found[name] = arm(model, out, name, prompts, concepts, **options)
    for name in RANDOM_LIKE:
        if name in found:
            options = {"objective": "random", "like": found[name], **settings}
            found[f"random like {name}"] = arm(model, out, f"random like {name}", prompts, concepts, **options)
    result = combine(list(found.values()))
    claims = claimed.claims(result)
    write_claims(out / "claims.json", claims)
    table = summary(result)
    text = (
        f"{len(prompts)} prompts that name four or five things, answered by {model.name} in at most {max_new_tokens} "
        "tokens, greedily: with the prompt's embeddings as they are; after Adam has raised the flow of attention from "
        "the prompt's last position to the concept that has least of it; and after random perturbations of the same "
        "norm. Step sizes were chosen on other prompts. Intervals are over prompts, 95 %; differences are paired by "
        "prompt.\n\n"
        "Flows are maximum flows in every arm; `own` is by the method that the arm ascends; even: smallest / mean flow "
        "of a prompt's concepts. Shares of concepts are means over prompts. `python -m analyses.flow_equalisation` runs all "
        "48 prompts and every arm."
    )
    outcomes, flows = (table[list(names)].rename(columns=names) for names in (OUTCOMES, FLOWS))
    items = [outcomes, differences(result), flows, result, sample(result)]
    return Section("Flow: equalised over the things a prompt names", text, items, claims)


def arm(
    model: Any, out: Path, name: str, prompts: Sequence[str], concepts: Sequence[Sequence[str]], **options: Any
) -> Result:
    """One arm, or what an earlier run left of it."""
    asked = {key: value for key, value in options.items() if key not in ("like", "progress")}
    if options["objective"] in ("none", "random"):
        asked = {key: value for key, value in asked.items() if key in ("objective", "max_new_tokens", "chat")}
    asked["prompts"] = digest([list(prompts), [list(named) for named in concepts]])
    if options.get("like") is not None:
        asked["like"] = digest(options["like"].attachments["position_norms"])
    return reuse_or_make(
        out / f"{name.replace(' ', '_')}.parquet",
        lambda: equalize(model, prompts, concepts, progress="equalise", **options),
        fingerprint=model.fingerprint,
        parameters=asked,
    )


def concept_prompts(split: str, n: int | None = None) -> tuple[list[str], list[list[str]]]:
    """Prompts of a split of data/concept_prompts.jsonl, and the concepts of each."""
    rows = [row for row in read_jsonl("concept_prompts.jsonl") if row["split"] == split][:n]
    return [row["text"] for row in rows], [row["concepts"] for row in rows]


def has_template(model: Any, chat: bool | None) -> bool:
    """Whether to use the chat template: as asked, or where there is one."""
    return bool(getattr(model.tokenizer, "chat_template", None)) if chat is None else chat


def sample(result: Result, n: int = 4) -> pd.DataFrame:
    """The first prompts' answers in every arm, to be read."""
    first = result.frame.drop_duplicates(["arm", "prompt"])
    return first[first["prompt"] < n].sort_values("prompt", kind="stable")[["prompt_text", "arm", "text", "perplexity"]]


def tune(
    model: Any, out: Path, *, rates: Sequence[float] = RATES, max_new_tokens: int = 32, chat: bool | None = None
) -> pd.DataFrame:
    """Every arm at several learning rates on the tuning prompts.

    Args:
        model, out, max_new_tokens, chat: see `run`.
        rates: learning rates.

    Returns:
        A row per arm and rate: share mentioned, perplexity's ratio to "none", the perturbation's norm, smallest flow
        and evenness by maximum flows and by the arm's own method; `chosen` marks one rate per arm, see `choose`.
    """
    prompts, concepts = concept_prompts("tuning")
    settings = {**SETTINGS, "max_new_tokens": max_new_tokens, "chat": has_template(model, chat)}
    plain = arm(model, out, "none", prompts, concepts, objective="none", **settings)
    rows = [summary(plain).iloc[0].to_dict() | {"rate": math.nan}]
    for name, (objective, method, _) in ASCENTS.items():
        for rate in rates:
            options = {"objective": objective, "method": method, "learning_rate": rate, **settings}
            found = arm(model, out, f"{name} {rate}", prompts, concepts, **options)
            rows.append(summary(found).iloc[0].to_dict() | {"rate": rate})
    table = pd.DataFrame(rows)
    table["perplexity_ratio"] = table["perplexity"] / table["perplexity"].iloc[0]
    columns = ["arm", "rate", "mentioned", "all_mentioned", "perplexity_ratio", "norm", "min_flow", "evenness"]
    return choose(table)[[*columns, "own_min_flow", "own_evenness", "chosen"]]


def choose(table: pd.DataFrame) -> pd.DataFrame:
    """Marks one rate per arm: the one that mentions most among those whose perplexity rises by at most a tenth.

    Ties go to the larger rate; where none is fluent, the one whose perplexity rises least.
    """
    chosen = pd.Series(False, index=table.index)
    for _, rows in table[table["rate"].notna()].groupby("arm", sort=False):
        fluent = rows[rows["perplexity_ratio"] <= FLUENT]
        if len(fluent):
            best = fluent.sort_values(["mentioned", "rate"]).index[-1]
        else:
            best = rows["perplexity_ratio"].idxmin()
        chosen[best] = True
    return table.assign(chosen=chosen)


def main(
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    prompts: Annotated[int | None, typer.Option(help="How many of the test prompts; all by default.")] = None,
    tuning: Annotated[
        bool, typer.Option("--tune", help="Print what the step sizes are chosen from, and stop.")
    ] = False,
    short: Annotated[bool, typer.Option(help="The smaller run that the report uses.")] = False,
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path, typer.Option()] = Path("reports/flow_equalisation"),
) -> None:
    """Equalise, answer, compare, and write a report."""
    loaded = load_model(model, device=device, dtype=dtype)
    if tuning:
        show(tune(loaded, out / "tuning"))
        return
    section = run(loaded, out, **(REPORT if short else {"n_prompts": prompts}))
    for table in section.items[:3]:
        assert isinstance(table, pd.DataFrame)
        show(table)
    show(claims_frame(section.claims))
    print(write_report([section], out / "report.html", title=f"Flows equalised in {loaded.name}"))


if __name__ == "__main__":
    typer.run(main)
