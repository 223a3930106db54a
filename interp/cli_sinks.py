"""`interp sinks scan|ablate|evict|train-toy`: attention sinks by domain, their causal evidence, and the toy model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp.cli_shared import (
    DEFAULT_MODEL,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OutOption,
    SeedOption,
    load,
    save,
    show,
)
from interp.errors import InputError

if TYPE_CHECKING:
    from interp.model import Model

sinks = typer.Typer(
    help="Attention sinks: which heads look at the first token, on which kind of text, and whether it matters.",
    no_args_is_help=True,
)

DomainOption = Annotated[
    list[str] | None,
    typer.Option(
        "--domain",
        help="A built-in domain (`interp sinks domains`), NAME=GLOB for files, or NAME=hf:DATASET[:CONFIG[:SPLIT[:COLUMN]]]; "
        "give it again for more. Default: code and editorials.",
    ),
]
LengthOption = Annotated[int, typer.Option("--length", help="Tokens per text; all texts have this length.")]
TextsOption = Annotated[int, typer.Option("--texts", help="Texts per domain.")]
BosOption = Annotated[
    str,
    typer.Option("--bos", help='What stands before a text: auto (as the tokenizer does), yes, no, or a token: "<s>".'),
]
FirstOption = Annotated[str | None, typer.Option("--first", help="Replace the first token of every text by this one.")]
ShuffleOption = Annotated[bool, typer.Option("--shuffle", help="Shuffle the tokens of every text.")]


@sinks.command("domains")
def sinks_domains(as_json: JsonOption = False) -> None:
    """The built-in domains."""
    import pandas as pd

    from interp.sinks.domains import DOMAINS

    show(pd.DataFrame(DOMAINS.items(), columns=["domain", "what it is"]), as_json)


@sinks.command("scan")
def sinks_scan(
    domain: DomainOption = None,
    length: LengthOption = 256,
    texts: TextsOption = 64,
    bos: BosOption = "auto",
    first: FirstOption = None,
    shuffle: ShuffleOption = False,
    engine: Annotated[str, typer.Option("--engine", help="fused or eager.")] = "fused",
    dormant: Annotated[
        float, typer.Option("--dormant", help="Mass on the first token from which a head is dormant.")
    ] = 0.9,
    active: Annotated[float, typer.Option("--active", help="Mass below which it is active.")] = 0.5,
    top: Annotated[int, typer.Option("--top", help="Heads shown.")] = 20,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Where to write the scan: a .parquet file, or a folder that an interrupted scan resumes in."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure every head on every domain; print the heads that differ most, with evidence."""
    from interp.sinks import classify, scan
    from interp.sinks.classification import check_thresholds

    check_thresholds(dormant, active)
    loaded = load(model, device, dtype)
    chosen = _texts(loaded, domain, length, texts, bos, first, shuffle, seed)
    folder = out if out is not None and out.suffix != ".parquet" else None
    result = scan(loaded, chosen, engine=engine, out=folder)
    if folder is None:
        save(result, out)
    named = classify(result, dormant=dormant, active=active, seed=seed).frame
    counts = named["label"].value_counts()
    print(", ".join(f"{counts[label]} {label}" for label in counts.index), file=sys.stderr)
    columns = ["layer", "head", "label", "domain_dependent", "evidence"]
    show(named.sort_values(["label", "difference"], ascending=[True, False])[columns].head(top), as_json)


@sinks.command("ablate")
def sinks_ablate(
    head: Annotated[list[str] | None, typer.Option("--head", help="LAYER:HEAD, such as 15:3; again for more.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every head of the model.")] = False,
    mode: Annotated[str, typer.Option("--mode", help="zero, to_sink or mean.")] = "zero",
    random: Annotated[
        int | None,
        typer.Option("--random", help="Random heads as control; default: as many as heads, at least 4 if there are."),
    ] = None,
    domain: DomainOption = None,
    length: LengthOption = 128,
    texts: TextsOption = 16,
    bos: BosOption = "auto",
    first: FirstOption = None,
    shuffle: ShuffleOption = False,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Where to write the rows: a .parquet file, or a folder that an interrupted run resumes in."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Switch heads off one at a time; print the change of the loss by domain, beside random heads."""
    from interp.sinks import ablate
    from interp.sinks.ablation import summary

    if every == bool(head):
        raise InputError("name heads with --head LAYER:HEAD, or take every head with --all")
    loaded = load(model, device, dtype)
    chosen = _texts(loaded, domain, length, texts, bos, first, shuffle, seed)
    folder = out if out is not None and out.suffix != ".parquet" else None
    result = ablate(
        loaded,
        "all" if every else [_head(name) for name in head or []],
        chosen,
        mode=mode,
        n_random=random,
        seed=seed,
        out=folder,
    )
    if folder is None:
        save(result, out)
    show(summary(result), as_json)


@sinks.command("evict")
def sinks_evict(
    window: Annotated[int, typer.Option("--window", help="Keys that a query sees, kept sinks included.")] = 128,
    sinks_kept: Annotated[int, typer.Option("--sinks", help="First keys that are kept.")] = 4,
    domain: DomainOption = None,
    length: LengthOption = 512,
    texts: TextsOption = 8,
    bos: BosOption = "auto",
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: SeedOption = 0,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity under a sliding window with the first keys kept, or removed (StreamingLLM)."""
    from interp.sinks import evict
    from interp.sinks.eviction import summary

    loaded = load(model, device, dtype)
    chosen = _texts(loaded, domain, length, texts, bos, None, False, seed)
    result = evict(loaded, chosen, window=window, n_sinks=sinks_kept)
    save(result, out)
    show(summary(result), as_json)


@sinks.command("train-toy")
def sinks_train_toy(
    preset: Annotated[str, typer.Option("--preset", help="laptop (two cores) or paper (exact; for a GPU).")] = "laptop",
    attention: Annotated[str, typer.Option("--attention", help="softmax or relu.")] = "softmax",
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw or sgd.")] = "adamw",
    layers: Annotated[int, typer.Option("--layers", help="1 to 3.")] = 1,
    steps: Annotated[int | None, typer.Option("--steps", help="Training steps; the preset's by default.")] = None,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for checkpoints and curves; a run that was killed resumes.")
    ] = Path("toy"),
    as_json: JsonOption = False,
) -> None:
    """Train the Bigram-Backcopy model and print how its sink emerges: the last measured step of every quantity."""
    from interp.sinks import train_toy

    changes = {} if steps is None else {"steps": steps}
    result = train_toy(
        preset, layers=layers, attention=attention, optimizer=optimizer, device=device, seed=seed, out=out, **changes
    )
    show(result.frame[result.frame["step"] == result.frame["step"].max()], as_json)


def _texts(
    model: Model,
    domains: list[str] | None,
    length: int,
    n: int,
    bos: str,
    first: str | None,
    shuffle: bool,
    seed: int,
) -> dict[str, list[list[int]]]:
    from interp.sinks.sequences import domain_sequences

    before: Any = {"yes": True, "no": False}.get(bos, bos)
    return domain_sequences(
        model, domains or ["code", "editorials"], length, n, bos=before, first=first, shuffle=shuffle, seed=seed
    )


def _head(name: str) -> tuple[int, int]:
    layer, separator, head = name.partition(":")
    try:
        if not separator:
            raise ValueError
        return int(layer), int(head)
    except ValueError:
        raise InputError(f"--head {name!r}; expected LAYER:HEAD, such as 15:3") from None
