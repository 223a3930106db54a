"""What the commands share: options, loading a model, saving a result, printing a table. Nothing heavy loads on import."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

ModelOption = Annotated[str, typer.Option("--model", help="Embedded name, hub id, folder or .gguf file.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1 or auto; default: cuda if present.")
]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seeds torch, numpy and random.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Where to write the result (Parquet).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

DEFAULT_MODEL = "smollm2-135m-instruct"


def load(source: str, device: str | None, dtype: str | None) -> Model:
    """The model that --model, --device and --dtype name."""
    from interp.model import load_model

    return load_model(source, device=device, dtype=dtype)


def save(result: Any, out: Path | None) -> None:
    """Write a result where --out says, if it says."""
    if out is not None:
        print(f"wrote {result.save(out)}", file=sys.stderr)


def show(frame: pd.DataFrame, as_json: bool = False) -> None:
    """Print a frame: JSON records, or a table with visible spaces in text, 4 digits in numbers and – for what is missing.

    A title that `interp.report.titled` gave it stands above.
    """
    if as_json:
        print(frame.to_json(orient="records", force_ascii=False))
        return
    import pandas as pd
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from interp.tokens import visible

    def cell(value: Any) -> Text:
        if isinstance(value, str):
            return Text(visible(value, inner=False))  # Text, not markup: tokens such as "[/]" stay text
        if pd.api.types.is_scalar(value) and pd.isna(value):
            return Text("–")
        return Text(f"{value:.4g}" if isinstance(value, float) else str(value))

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in frame.columns:
        text = frame[name].dtype == object or str(frame[name].dtype) in ("str", "category")
        table.add_column(str(name), justify="left" if text else "right", overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*map(cell, row))
    wide = None if sys.stdout.isatty() else 160
    console = Console(width=wide, highlight=False)
    if frame.attrs.get("title"):
        console.print(Text(f"\n{visible(str(frame.attrs['title']), inner=False)}", style="bold"))
    console.print(table)
