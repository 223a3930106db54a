"""`interp conflict align`: train adapters on some layers, and measure held-out tasks before and after."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp.cli_conflict_shared import (
    SettingOption,
    TasksOption,
    TemplateOption,
    WordingOption,
    make,
    read_template,
)
from interp.cli_shared import DEFAULT_MODEL, DeviceOption, DtypeOption, JsonOption, ModelOption, SeedOption, load, show
from interp.errors import InputError

if TYPE_CHECKING:
    from interp.conflict.pairs import Pair
    from interp.model import Model
    from interp.results import Result

_N_ANCHORS = 300
# Pairs that choose the layers, where no file and no --layer does.
_N_LOCALISE, _N_PATCH = 96, 48
# Pairs that say which families are followed, where no --family does.
_N_FOLLOW = 96
# What stands in --out beside the runs.
_OWN = ("follow", "drift", "patch", "preferences", "validation", "measured", "before")


def conflict_align(
    out: Annotated[
        Path,
        typer.Option("--out", help="Folder for preferences, checkpoints and adapter; a run that was killed resumes."),
    ],
    layer: Annotated[
        list[int] | None,
        typer.Option("--layer", help="A layer to train; again for more. Default: what --select chooses."),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            "--select",
            help="drift: the focal layers, as in the paper; patch: a fifth of the layers, those whose attention output "
            "brings back the system's rule when it is patched; all: every layer, by smaller ranks as many parameters as a "
            "fifth of them has. Default: all, which gains more than drift on the embedded model; with --drift, drift.",
        ),
    ] = None,
    drift: Annotated[
        Path | None,
        typer.Option(
            "--drift", help="What `interp conflict localize --out` wrote; else it is measured where it is needed."
        ),
    ] = None,
    credit: Annotated[
        str, typer.Option("--credit", help="reward (as released), attention (as in the abstract), or none.")
    ] = "reward",
    alpha: Annotated[float, typer.Option("--alpha", help="Weight of the credit; 0 is none.")] = 0.5,
    beta: Annotated[float, typer.Option("--beta", help="Of DPO.")] = 0.1,
    likelihood: Annotated[
        float, typer.Option("--likelihood", help="Weight of the chosen answer's own loss; 0 in the published loss.")
    ] = 0.2,
    anchors: Annotated[
        str,
        typer.Option(
            "--anchors",
            help="Ordinary text whose next tokens stay, the first 48 tokens of each document: a domain (`interp sinks domains`), "
            "'mine=notes/*.txt', or none, as in the published loss.",
        ),
    ] = "editorials",
    anchor_weight: Annotated[
        float | None, typer.Option("--anchor-weight", help="Of the divergence on them; 2 by default.")
    ] = None,
    rank: Annotated[int, typer.Option("--rank", help="Of LoRA.")] = 8,
    preset: Annotated[
        str, typer.Option("--preset", help="laptop (two cores) or gpu; the next four change one entry of it.")
    ] = "laptop",
    epochs: Annotated[float | None, typer.Option("--epochs", help="Passes over the pairs.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Pairs per forward pass; fewer where memory is short.")
    ] = None,
    gradient_accumulation: Annotated[
        int | None, typer.Option("--gradient-accumulation", help="Forward passes per step.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="The highest.")] = None,
    run: Annotated[
        str,
        typer.Option(
            "--run",
            help="Folder within --out for this training; others beside it share the pairs and what is measured.",
        ),
    ] = "run",
    pairs: Annotated[int, typer.Option("--pairs", help="Training pairs of prompts.")] = 288,
    validation: Annotated[
        int, typer.Option("--validation", help="Validation pairs; training stops early on them.")
    ] = 32,
    balance: Annotated[
        bool, typer.Option(help="Use as many pairs of a rule as of its opposite, and leave the rest out.")
    ] = True,
    family: Annotated[
        list[str] | None,
        typer.Option(
            "--family",
            help="A family of rules (`interp conflict families`); again for more. Default: those that the model follows when the "
            "user asks, measured on training tasks; a rule that it cannot follow is not learned.",
        ),
    ] = None,
    wording: WordingOption = None,
    setting: SettingOption = "user",
    tasks: TasksOption = None,
    template: TemplateOption = None,
    measure: Annotated[
        int,
        typer.Option("--measure", help="Held-out pairs on which the model is measured before and after; 0 for none."),
    ] = 48,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Train layers to obey the system's rule (SAIL); print how many answers to held-out tasks obey it before and after."""
    import pandas as pd

    from interp.conflict import (
        adapted,
        align,
        arms,
        balanced,
        focal_heads,
        focal_layers,
        follow,
        followed_families,
        localize,
        make_preferences,
        obedience_change,
        restoring_layers,
    )
    from interp.conflict import patch as patch_layers
    from interp.conflict.aligning import check_settings
    from interp.conflict.anchors import ANCHOR_WEIGHT, encode_anchors

    if select not in (None, "drift", "patch", "all"):
        raise InputError(f"--select {select!r}; expected drift, patch or all")
    if layer and select:
        raise InputError(f"--layer names the layers and --select {select} chooses them; give one of the two")
    if drift is not None and (select in ("patch", "all") or layer) and credit != "attention":
        other = "--layer" if layer else f"--select {select}"
        raise InputError(f"--drift is not used with {other}; leave one of the two out")
    if not (layer or select):
        select = "all" if drift is None else "drift"
    if not run or run in _OWN or Path(run).name != run or run.startswith("."):
        raise InputError(f"--run {run!r}; expected a folder's name other than {', '.join(_OWN)}")
    settings: dict[str, Any] = {
        "credit": credit,
        "alpha": alpha,
        "beta": beta,
        "likelihood": likelihood,
        "anchor_weight": ANCHOR_WEIGHT if anchor_weight is None else anchor_weight,
        "rank": rank,
        "preset": preset,
        "epochs": epochs,
        "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation,
        "learning_rate": learning_rate,
    }
    read, texts = read_template(template), read_anchors(anchors)
    parts = {"training": pairs, "validation": validation, "held-out": measure}

    def chosen(names: list[str] | None) -> list[list[Pair]]:
        return [
            make(n, part, names, wording, setting, tasks, seed) if n or part == "training" else []
            for part, n in parts.items()
        ]

    training, checking, held_out = chosen(family)
    loaded = load(model, device, dtype)
    # What is wrong with these is said before anything is measured.
    check_settings(loaded, layer or None, **settings)
    encode_anchors(loaded, texts)
    measured = None if drift is None else read_drift(drift, loaded)
    if not family:
        asked = make(_N_FOLLOW, "training", None, wording, setting, tasks, seed)
        family = followed_families(follow(loaded, asked, ("none", "user"), template=read, out=out / "follow"))
        if not family:
            raise InputError(
                f"{loaded.name} obeys no rule more often when the user asks for it than without it, so that there is nothing to "
                f"teach; see `interp conflict follow`, or name families with --family"
            )
        print(f"families: {', '.join(family)}", file=sys.stderr)
        training, checking, held_out = chosen(family)
    if measured is None and (credit == "attention" or select == "drift"):
        where = make(_N_LOCALISE, "localisation", family, wording, setting, tasks, seed)
        measured = localize(loaded, where, template=read, out=out / "drift")
    if layer:
        layers = list(layer)
    elif select == "patch":
        where = make(_N_PATCH, "localisation", family, wording, setting, tasks, seed)
        layers = restoring_layers(patch_layers(loaded, where, template=read, out=out / "patch"))
    elif select == "all":
        n_layers = loaded.arch.n_layers
        every = arms(loaded, range(max(1, round(n_layers / 5))), rank, n_random=0)["all"]
        layers = list(every.layers)
        settings |= {"rank": every.rank, "lora_alpha": every.lora_alpha}
    else:
        layers = focal_layers(measured)  # type: ignore[arg-type]
    print(f"layers: {', '.join(map(str, layers))}", file=sys.stderr)
    prompts = ("agree", "conflict")
    before = follow(loaded, held_out, prompts, template=read, out=out / "before") if held_out else None
    preferences = make_preferences(loaded, training, template=read, out=out / "preferences")
    checks = make_preferences(loaded, checking, template=read, out=out / "validation") if checking else None
    history = align(
        loaded,
        balanced(preferences) if balance else preferences,
        layers,
        out=out / run,
        validation=balanced(checks) if checks is not None and balance else checks,
        heads=focal_heads(measured) if credit == "attention" and measured is not None else None,
        anchors=texts,
        measured=out / "measured",
        seed=seed,
        **settings,
    )
    adapter = out / run / "adapter"
    print(f"wrote {adapter}", file=sys.stderr)
    if before is None:
        show(history.frame.tail(5), as_json)
        return
    with adapted(loaded, adapter):
        after = follow(loaded, held_out, prompts, template=read, out=out / run / "after")
    table = pd.concat(
        [obedience_change(before, after), obedience_change(before, after, ()).assign(family="all")], ignore_index=True
    )
    show(table.sort_values("prompt", kind="stable"), as_json)


def read_drift(path: Path, model: Model) -> Result:
    """What `interp conflict localize --out` wrote of this model.

    Raises:
        InputError: it is of another model, or something else.
    """
    from interp.conflict.focal import drifts
    from interp.results import load_result

    measured = load_result(path)
    drifts(measured)
    if measured.provenance.fingerprint != model.fingerprint:
        raise InputError(
            f"{path} is of another model ({measured.provenance.model}); localize {model.name}, or leave --drift out and "
            f"name layers with --layer"
        )
    return measured


def read_anchors(spec: str) -> list[str]:
    """The texts that --anchors names: the first 300 documents of a domain.

    Raises:
        InputError: no such domain, or one of token ids; see `interp.sinks.domains.read_domain`.
    """
    from interp.sinks.domains import read_domain

    if spec == "none":
        return []
    name, documents = read_domain(spec, n=_N_ANCHORS)
    texts = [text for text in documents[:_N_ANCHORS] if isinstance(text, str)]
    if not texts:
        raise InputError(f"--anchors {spec!r}: domain {name!r} has no text; expected editorials, for example, or none")
    return texts
