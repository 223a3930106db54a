"""Whether turning a few weight rows round removes a concept: before and after, beside random and zeroed rows.

Reproduces what H. J. Davies et al. (arXiv 2412.10257, "TARS") report, on any model. How rows are chosen and what is measured is
in `interp.neurons.editing` and `interp.neurons.edit_effects`; the trigger prompts are ours (data/triggers.jsonl).

    python -m analyses.concept_editing [--model NAME] [--out reports/concept_editing]
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer

from analyses.neuron_clamping import bootstrap_mean, if_token, read_jsonl
from interp import load_model
from interp.cli import show
from interp.neurons import concept_vector, edit_report, edited, plan_edit
from interp.neurons.edit_effects import summarise_edit
from interp.report import Section, write_report
from interp.report.claims import Claim, claims_frame, write_claims
from interp.results import Result
from interp.reuse import reuse_or_make

SOURCE = "Davies et al. 2024, arXiv 2412.10257"
COUNTS = (1, 5)  # edits per concept
COLUMNS = ["concept", "arm", "n_rows", "n_prompts", "p_concept", "p_concept_low", "p_concept_high", "p_unrelated", "kl"]
NOTHING = pd.DataFrame({name: [] for name in (*COLUMNS, "perplexity")})  # where no concept is a token
REPORT = {"n_texts": 6}  # what `make report` runs


def run(model: Any, out: Path, n_texts: int = 16) -> Section:
    """Edit each concept of data/triggers.jsonl out of the model, alone and all of them together.

    Args:
        model: what `load_model` gave.
        out: folder for the results; what is there already is used again.
        n_texts: how many of data/sample_texts.jsonl the divergence is measured on.

    Returns:
        A section for a report.
    """
    triggers: dict[str, list[str]] = {}
    for row in read_jsonl("triggers.jsonl"):
        if if_token(model, row["concept"]) is not None:
            triggers.setdefault(row["concept"], []).append(row["text"])
    texts = [row["text"] for row in read_jsonl("sample_texts.jsonl")][:n_texts]
    found: list[Result] = []
    for concept, prompts in triggers.items():
        for n in COUNTS:
            found.append(
                reuse_or_make(
                    out / f"edit_{concept.strip()}_{n}.parquet",
                    lambda concept=concept, prompts=prompts, n=n: edit_report(  # type: ignore[misc]
                        model,
                        concept,
                        prompts,
                        texts,
                        n=n,
                        unrelated=if_token(model, " chair"),
                        progress=f"edit {concept.strip()}, {n}",
                    ),
                    fingerprint=model.fingerprint,
                    parameters={"n_texts": len(texts), "n_prompts": len(prompts)},
                )
            )
    table = pd.concat([summarise_edit(result) for result in found] or [NOTHING], ignore_index=True)
    table = table.drop_duplicates(["concept", "arm", "n_rows"], ignore_index=True)  # "none" is the same for every count
    claims = [removal_claim(table), divergence_claim(model, list(triggers), texts)]
    write_claims(out / "claims.json", claims)
    text = (
        f"For {len(triggers)} concepts, the {' or '.join(map(str, COUNTS))} gate and up rows closest to the concept's vector are "
        "reversed. The concept's probability is that of the next token after prompts that lead to it; divergence and perplexity "
        f"are those of {len(texts)} neutral texts. Beside it: random rows of the same layers reversed, and the same rows zeroed. "
        "The model is left as it was."
    )
    return Section("Neurons: editing a concept out", text, [table[[*COLUMNS, "perplexity"]]], claims)


def removal_claim(table: pd.DataFrame) -> Claim:
    """Mean over concepts of p after one edit, with an interval over concepts."""
    claim, paper = "one edit removes a concept: its probability after trigger prompts falls to 0.00", "0.00"
    one = table[table["n_rows"].isin([0, COUNTS[0]])].groupby(["concept", "arm"], observed=True)["p_concept"].first()
    arms = one.unstack()
    if arms.empty:
        return Claim(claim, SOURCE, paper, "no concept is a token of this model", None, 0, None)
    after, n = arms["reversed"].to_numpy(), len(arms)
    ours = (
        f"from {arms['none'].mean():.3f} to {after.mean():.3f} (means over concepts); random rows reversed "
        f"{arms['random'].mean():.3f}, same rows zeroed {arms['zeroed'].mean():.3f}"
    )
    return Claim(claim, SOURCE, paper, ours, bootstrap_mean(after) if n > 1 else None, n, bool((after < 0.005).all()))


def divergence_claim(model: Any, concepts: Sequence[str], texts: Sequence[str]) -> Claim:
    """Median KL of the next token after one edit for each of the concepts, all at once, with an interval over texts."""
    claim = f"after editing {len(concepts)} concepts out, neutral text is hardly touched: median KL of the next token"
    if not concepts:
        return Claim(claim, SOURCE, "0.002 nats (Wikipedia)", "no concept is a token of this model", None, 0, None)
    edits = [plan_edit(model, concept_vector(model, concept), 1) for concept in concepts]
    before = [next_token(model, text) for text in texts]
    with contextlib.ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edited(model, edit))
        after = [next_token(model, text) for text in texts]
    by_text = [(b.exp() * (b - a)).sum(-1).clamp(min=0).numpy() for b, a in zip(before, after, strict=True)]
    kl, rng = np.concatenate(by_text), np.random.default_rng(0)
    low, median, high = np.quantile(kl, [0.25, 0.5, 0.75])
    drawn = [
        np.median(np.concatenate([by_text[at] for at in rng.integers(0, len(texts), len(texts))])) for _ in range(1000)
    ]
    start, end = np.quantile(drawn, [0.025, 0.975])
    ours = f"{median:.4f} nats over the positions of {len(texts)} texts; quartiles {low:.4f} and {high:.4f}"
    return Claim(
        claim, SOURCE, "0.002 nats (Wikipedia)", ours, (float(start), float(end)), len(kl), bool(median <= 0.002)
    )


@torch.no_grad()
def next_token(model: Any, text: str) -> torch.Tensor:
    """Log-probabilities (position, vocab) of the next token, on the CPU."""
    ids = torch.tensor(model.encode(text), device=model.device)
    return model.hf(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1).cpu()


def main(
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path, typer.Option()] = Path("reports/concept_editing"),
) -> None:
    """Edit concepts out and write a report."""
    loaded = load_model(model, device=device, dtype=dtype)
    section = run(loaded, out)
    show(section.items[0])
    show(claims_frame(section.claims))
    print(write_report([section], out / "report.html", title=f"Concepts edited out of {loaded.name}"))


if __name__ == "__main__":
    typer.run(main)
