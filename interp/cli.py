"""The command line: `interp neurons|sinks|flow|conflict|agreement|report|resources …`.

A thin shell that imports nothing heavy until a command runs. Progress goes to stderr; a readable table, or JSON with
`--json`, goes to stdout. Errors that interp raises on purpose end the command with their message and exit status 1,
Ctrl-C with 130.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli_agreement import agreement
from interp.cli_conflict import conflict
from interp.cli_flow import flow
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
from interp.cli_sinks import sinks
from interp.errors import InputError, InterpError

app = typer.Typer(
    help="Mechanistic interpretability of transformers: which neurons hold which concept, which heads are sinks, "
    "what reaches the output through attention, who wins when instructions conflict, and whether explanations agree.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
neurons = typer.Typer(
    help="Decode MLP neurons through the LM head, find concepts, clamp, compare.", no_args_is_help=True
)
resources = typer.Typer(help="Pinned models and corpora that come from package registries.", no_args_is_help=True)
app.add_typer(neurons, name="neurons")
app.add_typer(sinks, name="sinks")
app.command("flow")(flow)
app.add_typer(conflict, name="conflict")
app.command("agreement")(agreement)
app.add_typer(resources, name="resources")

SiteOption = Annotated[str, typer.Option("--site", help="up, gate or down.")]
NormOption = Annotated[str, typer.Option("--norm", help="raw, rms, final or folded.")]


def main() -> None:
    """Run the command line; the console script `interp`."""
    try:
        app()
    except InterpError as error:
        sys.exit(f"interp: {error}")
    except KeyboardInterrupt:
        print("interp: interrupted; nothing half-written is left", file=sys.stderr)
        sys.exit(130)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Options before any command."""
    if show:
        from interp import __version__

        print(__version__)
        raise typer.Exit


@neurons.command("decode")
def neurons_decode(
    model: ModelOption = DEFAULT_MODEL,
    site: SiteOption = "up",
    norm: NormOption = "final",
    top_k: Annotated[int, typer.Option("--top-k", help="Tokens kept per neuron and sign.")] = 10,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read a safetensors folder layer by layer; --out is a folder.")
    ] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: SeedOption = 0,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Decode every neuron; print how peaked and how specialised each layer is."""
    if stream:
        from interp.neurons.checkpoint import decode_checkpoint

        if out is None:
            raise InputError("--stream writes one shard per layer: give --out, a folder")
        atlas = decode_checkpoint(model, out, site, norm, top_k=top_k, seed=seed, device=device or "cpu")
    else:
        from interp.neurons.decoding import decode

        atlas = decode(load(model, device, dtype), site, norm, top_k=top_k, seed=seed)
        save(atlas, out)
    show(atlas.by_layer(), as_json)


@neurons.command("find")
def neurons_find(
    concept: Annotated[
        list[str], typer.Argument(help='A word, usually with its leading space: " water"; or several tokens.')
    ],
    atlas: Annotated[Path | None, typer.Option("--atlas", help="A saved atlas; else the model is decoded.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    site: SiteOption = "up",
    norm: NormOption = "final",
    top: Annotated[int, typer.Option("--top", help="Neurons shown.")] = 20,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: SeedOption = 0,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """The neurons that hold a concept. --out keeps the atlas for the next question."""
    if atlas is not None:
        found_in = _load_atlas(atlas)
    else:
        from interp.neurons.decoding import decode

        found_in = decode(load(model, device, dtype), site, norm, seed=seed)
        save(found_in, out)
    found = found_in.find(concept[0] if len(concept) == 1 else concept, top=top)
    counted = found.attrs["concept"]
    print(f"tokens counted: {', '.join(map(repr, counted['tokens']))}", file=sys.stderr)
    if counted["dropped"]:
        print(f"several tokens, not counted: {', '.join(map(repr, counted['dropped']))}", file=sys.stderr)
    show(found, as_json)


@neurons.command("clamp")
def neurons_clamp(
    prompt: Annotated[str, typer.Argument(help="What the model continues, or answers with --chat.")],
    layer: Annotated[int, typer.Option("--layer")],
    neuron: Annotated[int, typer.Option("--neuron")],
    value: Annotated[
        list[float], typer.Option("--value", help="What the neuron is set to; give it again for a sweep.")
    ],
    site: Annotated[str, typer.Option("--site", help="up, gate or hidden.")] = "hidden",
    mode: Annotated[str, typer.Option("--mode", help="set, add or scale.")] = "set",
    positions: Annotated[str, typer.Option("--positions", help="all, prompt, generated or last.")] = "all",
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens")] = 40,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: SeedOption = 0,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Clamp a neuron and continue a prompt, beside no clamp and a random neuron of the layer at the same value."""
    import pandas as pd

    from interp.intervene import Clamp, intervene

    loaded = load(model, device, dtype)
    layer, neuron = loaded.arch.check_layer(layer), loaded.arch.check_neuron(neuron)
    control = _random_neuron(loaded.arch.d_mlp, neuron, seed)
    arms = [("none", -1, 0.0), *(("clamp", neuron, v) for v in value), *(("random", control, v) for v in value)]
    clamps = [
        Clamp(layer, index, [arms[row][2] for row in rows], site, mode, positions, rows)
        for index in dict.fromkeys((neuron, control))
        for rows in [[row for row, arm in enumerate(arms) if arm[1] == index]]
    ]
    with intervene(loaded, *clamps):
        texts = loaded.generate([prompt] * len(arms), chat=chat, max_new_tokens=max_new_tokens)
    frame = pd.DataFrame(
        [
            {"arm": arm, "layer": layer, "neuron": index, "site": site, "value": v, "text": text}
            for (arm, index, v), text in zip(arms, texts, strict=True)
        ]
    )
    if out is not None:
        from interp.results import Column, Provenance, Result

        columns = (
            Column("arm", "category", "", "none, clamp, or random: another neuron of the layer as control"),
            Column("layer", "int16", "layer", "0-based"),
            Column("neuron", "int32", "index", "clamped neuron; -1 for none"),
            Column("site", "category", "", "up, gate or hidden"),
            Column("value", "float64", "activation", f"what was given to mode {mode}"),
            Column("text", "str", "", "greedy continuation"),
        )
        parameters = {
            "prompt": prompt,
            "mode": mode,
            "positions": positions,
            "chat": chat,
            "max_new_tokens": max_new_tokens,
        }
        save(Result("neurons.clamp", frame, columns, Provenance.collect(loaded, seed=seed, parameters=parameters)), out)
    show(frame, as_json)


def _random_neuron(d_mlp: int, other_than: int, seed: int) -> int:
    import random

    return random.Random(seed).choice([index for index in range(d_mlp) if index != other_than])


@neurons.command("compare")
def neurons_compare(
    first: Annotated[Path, typer.Argument(help="A saved atlas.")],
    second: Annotated[Path, typer.Argument(help="Another, of the same shape and vocabulary.")],
    sign: Annotated[int, typer.Option("--sign", help="1 or -1.")] = 1,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Share of neurons with the same top-1 token in two atlases, by layer (−1: all)."""
    from interp.neurons.comparison import compare

    result = compare(_load_atlas(first), _load_atlas(second), sign=sign)
    save(result, out)
    show(result.frame, as_json)


@app.command("report")
def report(
    results: Annotated[list[Path], typer.Argument(help="Saved results (Parquet files or shard folders).")],
    out: Annotated[Path, typer.Option("--out", help="The HTML file.")] = Path("report.html"),
    title: Annotated[str, typer.Option("--title")] = "interp report",
) -> None:
    """One HTML file that opens offline, from any saved results."""
    from interp.report import write_report
    from interp.results import load_result

    print(write_report([load_result(path) for path in results], out, title=title))


@resources.command("list")
def resources_list(as_json: JsonOption = False) -> None:
    """What can be fetched, and what is cached."""
    import pandas as pd

    from interp.resources import list_resources

    rows = [
        {"name": r.name, "kind": r.kind, "license": r.license, "megabytes": round(r.size / 1e6), "cached": r.cached}
        for r in list_resources()
    ]
    show(pd.DataFrame(rows), as_json)


@resources.command("fetch")
def resources_fetch(name: Annotated[str, typer.Argument(help="A name from `interp resources list`.")]) -> None:
    """Fetch a resource into the cache and print its folder."""
    from interp.resources import fetch

    print(fetch(name))


def _load_atlas(path: Path) -> Any:
    from interp.neurons.atlas import Atlas
    from interp.results import load_result

    result = load_result(path)
    if not isinstance(result, Atlas):
        raise InputError(
            f"{path} is a result of kind {result.kind!r}; expected an atlas, as `interp neurons decode --out` writes"
        )
    return result
