"""The main job: every analysis that is there, on one model, in one report that opens offline.

    make report [MODEL=name, hub id, folder or .gguf] [DEVICE=cuda]

Writes reports/index.html, and each analysis's results as Parquet with its claims beside it. A second run uses what is there.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from analyses import (
    attention_flow,
    attribution_agreement,
    bigram_backcopy,
    concept_editing,
    flow_equalisation,
    instruction_conflict,
    neuron_clamping,
    neuron_decoding,
    sink_heads,
    subject_verb_flow,
)
from interp import load_model
from interp.cli import show
from interp.errors import InterpError
from interp.report import Section, write_report
from interp.report.claims import claims_frame


def main(
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path, typer.Option()] = Path("reports"),
) -> None:
    """Run every analysis on a model and write one report."""
    start = time.perf_counter()
    loaded = load_model(model, device=device or None, dtype=dtype or None)
    print(loaded)
    sections, seconds = [], []
    for name, analysis in (
        ("neuron_decoding", lambda folder: neuron_decoding.run(loaded, folder)),
        (
            "neuron_clamping",
            lambda folder: neuron_clamping.run(loaded, folder, **neuron_clamping.REPORT),
        ),
        ("concept_editing", lambda folder: concept_editing.run(loaded, folder, **concept_editing.REPORT)),
        ("sink_heads", lambda folder: sink_heads.run(loaded, folder, **sink_heads.REPORT)),
        (
            "bigram_backcopy",
            lambda folder: bigram_backcopy.run(folder, device=device or None, **bigram_backcopy.REPORT),
        ),
        ("attention_flow", lambda folder: attention_flow.run(loaded, folder, **attention_flow.REPORT)),
        ("subject_verb_flow", lambda folder: subject_verb_flow.run(loaded, folder, **subject_verb_flow.REPORT)),
        ("flow_equalisation", lambda folder: flow_equalisation.run(loaded, folder, **flow_equalisation.REPORT)),
        (
            "instruction_conflict",
            lambda folder: instruction_conflict.run(loaded, folder, **instruction_conflict.REPORT),
        ),
        (
            "attribution_agreement",
            lambda folder: attribution_agreement.run(loaded, folder, **attribution_agreement.REPORT),
        ),
    ):
        began = time.perf_counter()
        sections.append(analysis(out / name))
        seconds.append({"analysis": name, "seconds": round(time.perf_counter() - began, 1), "results": str(out / name)})
    text = "Each section states what is measured, its controls and intervals; tables claim · paper · ours say what reproduces."
    overview = Section(f"What was asked of {loaded.name}", text, [pd.DataFrame(seconds)])
    index = write_report([overview, *sections], out / "index.html", title=f"interp: {loaded.name}")
    show(claims_frame([claim for section in sections for claim in section.claims]))
    show(pd.DataFrame(seconds))
    print(f"report: {index}  ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    try:
        typer.run(main)
    except InterpError as error:
        raise SystemExit(f"interp: {error}") from None
