"""`interp conflict follow|score|localize|align`: who wins when instructions conflict, where it is settled, and training it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli_conflict_align import conflict_align
from interp.cli_conflict_score import conflict_score
from interp.cli_conflict_shared import (
    FamilyOption,
    PairsOption,
    PartOption,
    SettingOption,
    TasksOption,
    TemplateOption,
    WordingOption,
    make,
    read_template,
    records,
)
from interp.cli_shared import (
    DEFAULT_MODEL,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    SeedOption,
    load,
    save,
    show,
)

conflict = typer.Typer(
    help="Instruction conflicts: who wins when system and user disagree, which layers settle it, and training those layers.",
    no_args_is_help=True,
)
conflict.command("score")(conflict_score)
conflict.command("align")(conflict_align)


@conflict.command("families")
def conflict_families(as_json: JsonOption = False) -> None:
    """The built-in families of rules, with a wording of each."""
    import pandas as pd

    from interp.conflict.pairs import HELD_OUT_FAMILIES
    from interp.conflict.verifiers import family, family_names
    from interp.conflict.wordings import rule_texts

    rows = [
        {
            "family": name,
            "rule": rule,
            "wording": rule_texts(name, rule, "simple")[0],
            "held out": name in HELD_OUT_FAMILIES,
        }
        for name in family_names()
        for rule in family(name).rules
    ]
    show(pd.DataFrame(rows), as_json)


@conflict.command("follow")
def conflict_follow(
    pairs: PairsOption = 96,
    part: PartOption = "held-out",
    family: FamilyOption = None,
    wording: WordingOption = None,
    setting: SettingOption = "user",
    tasks: TasksOption = None,
    template: TemplateOption = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Longest answer in tokens.")] = 64,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="A folder that `interp conflict align` wrote: the trained model.")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Where to write the answers: a .parquet file, or a folder that an interrupted run resumes in."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Which rules the model follows at all, and who wins under conflict: share of answers that pass the verifiers."""
    from interp.conflict.answers import follow
    from interp.conflict.follow_summaries import followed_rules

    chosen = make(pairs, part, family, wording, setting, tasks, seed)
    loaded = load(model, device, dtype)
    if adapter is not None:
        from interp.conflict.adapters import load_adapter

        loaded = load_adapter(loaded, adapter)
    folder = out if out is not None and out.suffix != ".parquet" else None
    result = follow(
        loaded,
        chosen,
        ("none", "system", "user", "conflict"),
        max_new_tokens=tokens,
        template=read_template(template),
        out=folder,
    )
    if folder is None:
        save(result, out)
    show(followed_rules(result, seed=seed), as_json)


@conflict.command("localize")
def conflict_localize(
    pairs: PairsOption = 96,
    part: PartOption = "localisation",
    family: FamilyOption = None,
    wording: WordingOption = None,
    setting: SettingOption = "user",
    tasks: TasksOption = None,
    template: TemplateOption = None,
    align: Annotated[
        str, typer.Option("--align", help="spans: masses of the same pieces; truncate: keys by number, as published.")
    ] = "spans",
    consistent: Annotated[
        str, typer.Option("--consistent", help="agree: the user repeats the rule; system: no user rule, as published.")
    ] = "agree",
    control: Annotated[
        str,
        typer.Option(
            "--control", help="Beyond what: paraphrase, or other: a demand of another kind that can be obeyed as well."
        ),
    ] = "paraphrase",
    patch: Annotated[
        int, typer.Option("--patch", help="Also patch every layer on this many of the pairs: does drift mean anything?")
    ] = 0,
    heads: Annotated[int, typer.Option("--heads", help="Heads shown.")] = 10,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Where to write a report with every figure (HTML).")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Where to write the drift: a .parquet file, or a folder that an interrupted run resumes in."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Which layers' and heads' attention drifts under conflict, beyond a control; the focal ones."""
    from interp.conflict import agreement_with_drift, head_scores, layer_scores, localize, plots, recovery
    from interp.conflict import patch as patch_layers

    chosen = make(pairs, part, family, wording, setting, tasks, seed)
    loaded = load(model, device, dtype)
    folder = out if out is not None and out.suffix != ".parquet" else None
    read = read_template(template)
    result = localize(loaded, chosen, align=align, consistent=consistent, control=control, template=read, out=folder)
    if folder is None:
        save(result, out)
    layers, scored = layer_scores(result, seed=seed), head_scores(result, seed=seed)
    top = scored.sort_values("excess", ascending=False).head(heads)
    figures: list[Any] = [plots.localize(result), plots.layer_profile(result), plots.span_masses(result), result]
    if patch:
        patched = patch_layers(loaded, chosen[:patch], consistent=consistent, template=read, seed=seed)
        found = recovery(patched).set_index("layer")
        layers = layers.assign(
            recovery=layers["layer"].map(found["recovery"]), recovery_q=layers["layer"].map(found["q"])
        )
        figures += [plots.patch(patched), patched]
        rank = agreement_with_drift(patched, layers, seed=seed).iloc[0]
        print(
            f"drift and patching: Spearman {rank['value']:.2f} [{rank['low']:.2f}, {rank['high']:.2f}]", file=sys.stderr
        )
    focal = layers.loc[layers["focal"], "layer"].tolist()
    print(f"focal layers: {', '.join(map(str, focal))}", file=sys.stderr)
    if plot is not None:
        from interp.report import write_report

        print(f"wrote {write_report(figures, plot, title=f'Instruction conflicts in {loaded.name}')}", file=sys.stderr)
    keep = ["layer", "score", "control", "excess", "low", "high", "q", "n_focal_heads", "focal"]
    keep += [name for name in ("recovery", "recovery_q") if name in layers]
    columns = ["layer", "head", "score", "control", "excess", "low", "high", "q", "focal"]
    if as_json:
        print(json.dumps({"focal_layers": focal, "layers": records(layers[keep]), "heads": records(top[columns])}))
        return
    show(layers[keep])
    show(top[columns])
