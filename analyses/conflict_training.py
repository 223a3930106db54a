"""The third stage of `analyses.instruction_conflict`: adapters on the focal layers and on others, and what they are worth.

Trained are the families that the model follows at all, by a measurement on other tasks; the others, and two that never count
among them, show whether a hierarchy was learned or those rules alone. Results stay in `arms/`; without training they are
read there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from analyses import conflict_arms, conflict_claims, conflict_figures
from analyses.neuron_clamping import read_jsonl
from interp import neurons
from interp.atomic import write_atomically
from interp.conflict import (
    RuleJudge,
    adapted,
    balanced,
    cras,
    layer_scores,
    localize,
    make_pairs,
    make_preferences,
    plots,
    queries_from_follow,
)
from interp.conflict.anchors import ANCHOR_WEIGHT
from interp.conflict.cras_summaries import answers as cras_by_answer
from interp.conflict.pairs import HELD_OUT_FAMILIES, Pair
from interp.conflict.preferences import counts
from interp.conflict.rubrics import DIMENSIONS
from interp.conflict.verifiers import BUILT_IN
from interp.errors import ResultError
from interp.report import titled
from interp.report.claims import Claim
from interp.results import Result
from interp.sinks.domains import domain_documents

# Beside the published loss, which by itself wins the conflict at the price of the language: chosen on validation tasks.
SETTINGS: dict[str, Any] = {"likelihood": 0.2, "anchor_weight": ANCHOR_WEIGHT}
N_ANCHORS = 300  # editorials; the prose that is measured is other text
# Arms of which every claim is made, and which layers they train.
CLAIMED = {
    "focal": "adapters on focal layers by drift",
    "patched": "adapters on as many layers by patching",
    "all": "adapters on all layers, as many parameters",
    "focal, as published": "SAIL by the published loss alone, on focal layers by drift",
}
# Groups of families beside the trained ones.
NEVER_TRAINED = ("never trained, followed", "never trained, not followed")
# Columns of a table of layers that are printed.
LAYERS = ["layer", "score", "control", "excess", "low", "high", "q", "n_focal_heads", "focal"]


@dataclass
class Job:
    """What every step needs: the model, where results go, how prompts are written, and what the section is to hold."""

    model: Any
    out: Path
    template: str | None
    claims: list[Claim]
    items: list[Any]


@dataclass(frozen=True)
class Located:
    """Where a conflict is settled.

    Attributes:
        layers: focal ones, by drift.
        patched: as many whose patched attention output brings back the most.
        heads: focal ones, (layer, head), by drift.
        by_layer: of every layer its drift beyond the paraphrase, and the change by patching its attention output.
    """

    layers: list[int]
    patched: list[int]
    heads: list[tuple[int, int]]
    by_layer: pd.DataFrame


def align_arms(
    job: Job,
    followed: list[str],
    located: Located,
    train: Sequence[str],
    sizes: Mapping[str, int],
    settings: dict[str, Any],
) -> bool:
    """Train arms, or show those that are trained; returns whether there are any."""
    model, out, claims, items = job.model, job.out, job.claims, job.items
    ask = {"template": job.template}
    place = out / "arms"
    record = place / "families.json"
    plan = conflict_arms.chosen_layers(model, located.layers, located.patched)
    prose = [str(row["text"]) for row in read_jsonl("sample_texts.jsonl")]
    taught = [name for name in followed if name not in HELD_OUT_FAMILIES]
    if train and not taught:
        print("interp: no family of rules is followed at all, so that none can be trained", file=sys.stderr)
        return False
    if train:
        settings = SETTINGS | settings
        if "anchors" not in settings:
            settings["anchors"] = [str(text) for text in domain_documents("editorials")[:N_ANCHORS]]
        preferences, validation = (
            balanced(
                make_preferences(
                    model,
                    make_pairs(part, n, families=taught),
                    **ask,
                    out=out / f"preferences_{part}_{n}",
                    progress=f"{part} pairs",
                )
            )
            for part, n in (("training", sizes["n_train"]), ("validation", sizes["n_validation"]))
        )
        lost = [name for name in taught if name not in set(preferences.frame.query("used")["family"].astype(str))]
        if lost:
            print(f"interp: {', '.join(lost)}: no pairs of both rules, so that none is trained", file=sys.stderr)
            taught = [name for name in taught if name not in lost]
        keep_families(record, taught, followed)
        pairs = held_out(taught, sizes["n_measure"], sizes["n_others"])
        conflict_arms.measure(model, place, "untrained", pairs, prose, None, job.template)
        for name in train:
            where = conflict_arms.spans(plan[conflict_arms.ARMS[name].layers].layers)
            print(f"interp: arm {name}, layers {where}", file=sys.stderr)
            adapter = conflict_arms.train_arm(
                model, place, name, preferences, validation, plan, located.heads, **settings
            )
            conflict_arms.measure(model, place, name, pairs, prose, adapter, job.template)
        items.append(titled(counts(preferences), "Preference pairs"))
    if not record.exists():
        return False
    # A shorter run may find fewer families followed than the one that trained.
    families = json.loads(record.read_text())
    taught = families["trained"]
    base = conflict_arms.measured(place, "untrained")
    every = {name: conflict_arms.trained(place, name, model.fingerprint) for name in conflict_arms.ARMS}
    about = {name: facts for name, facts in every.items() if facts is not None}
    known = {name: conflict_arms.measured(place, name) for name in about}
    names, differ = conflict_arms.comparable(place, [name for name, both in known.items() if both is not None])
    for name, what in differ.items():
        folder = place / conflict_arms.folder_name(name)
        print(
            f"interp: arm {name} was trained otherwise ({what}) and is left out; remove {folder} and train it again",
            file=sys.stderr,
        )
    found = {name: both for name in names if (both := known[name]) is not None}
    if base is None or not found:
        return False
    for name in conflict_arms.of_other_prose(found, base):
        print(f"interp: arm {name} was measured on other prose and is left out; name it with --arm", file=sys.stderr)
        del found[name]
    groups = family_groups(base[0], taught, families["followed"])
    table = conflict_arms.table(found, base, groups, about)
    items += [
        conflict_figures.arms(table, model.name),
        titled(table, "Arms on held-out tasks, beside the untrained model"),
    ]
    claims += arm_claims(table, found, groups)
    if "trained" in groups:
        by_seed = conflict_arms.seeds(found, about, groups["trained"])
        if len(by_seed):
            items.append(titled(by_seed, "The same arms under another seed: difference of compliance under conflict"))
        told = conflict_arms.foretold(table[table["families"] == "trained"], about, located.by_layer)
        items.append(titled(told, "What localisation says of the arms' layers, and what they gained"))
        claims += [conflict_claims.foretells(told, how) for how in ("drift", "patching") if len(told) > 4]
    plain = None
    for name in CLAIMED:
        if name not in found:
            continue
        by_rule = conflict_arms.by_rule(found[name][0], base[0])
        what = CLAIMED[name][0].upper() + CLAIMED[name][1:]
        items.append(titled(by_rule, f"{what}: each rule under conflict, before and after"))
        adapter = place / conflict_arms.folder_name(name) / "adapter"
        plain = neurons.decode(model) if plain is None else plain
        claims += after_claims(model, adapter, (base[0], found[name][0]), taught, table, name, plain)
        with adapted(model, adapter):
            after = localize(
                model,
                make_pairs("localisation", 96),
                **ask,
                out=adapter.parent / "drift",
                progress=f"drift after, {name}",
            )
        items += [titled(layer_scores(after)[LAYERS], f"{what}: drift after training"), plots.layer_profile(after)]
    return True


def held_out(taught: Sequence[str], n_taught: int, n_others: int) -> list[Pair]:
    """Held-out tasks of the families that were trained, and fewer of the others."""
    others = [name for name in BUILT_IN if name not in taught]
    rest = make_pairs("held-out", n_others, families=others) if others and n_others else []
    return [*make_pairs("held-out", n_taught, families=taught), *rest]


def keep_families(path: Path, trained: Sequence[str], followed: Sequence[str]) -> None:
    """Write which families are trained, or find that the arms that are there were trained on the same.

    Raises:
        ResultError: they were trained on others.
    """
    if not path.exists():
        families = {"trained": list(trained), "followed": list(followed)}
        write_atomically(path, lambda file: file.write(json.dumps(families).encode()))
    elif (there := json.loads(path.read_text())["trained"]) != list(trained):
        raise ResultError(
            f"{path.parent} holds arms that were trained on {', '.join(there)}; now {', '.join(trained)} would be. "
            f"Choose another --out, or remove that folder"
        )


def family_groups(answers: Result, taught: Sequence[str], followed: Sequence[str]) -> dict[str, list[str]]:
    """Families that were trained; those that were followed and not trained; and those that the model cannot follow at all."""
    there = [name for name in BUILT_IN if name in set(answers.frame["family"].astype(str))]
    groups = {
        "trained": [name for name in there if name in taught],
        NEVER_TRAINED[0]: [name for name in there if name not in taught and name in followed],
        NEVER_TRAINED[1]: [name for name in there if name not in taught and name not in followed],
    }
    return {name: some for name, some in groups.items() if some}


def arm_claims(
    table: pd.DataFrame, found: Mapping[str, tuple[Result, Result]], groups: Mapping[str, Sequence[str]]
) -> list[Claim]:
    """Claims on the trained arms, as far as they are there."""
    if "trained" not in groups:
        return []
    own, made = groups["trained"], []
    for name in (name for name in CLAIMED if name in found):
        rows = table[table["arm"] == name].set_index("families")
        row, where = rows.loc["trained"], CLAIMED[name]
        published = name == "focal, as published"
        made += [conflict_claims.obeys_more(row, where, published)]
        made += [conflict_claims.reaches(row, where), conflict_claims.keeps(row, where)]
        made += [conflict_claims.generalises(rows.loc[name], where, name) for name in NEVER_TRAINED if name in groups]
    n = int(table.loc[table["families"] == "trained", "n"].iloc[0])
    kinds = conflict_arms.ARMS
    for first, second, what in (
        ("focal", "random", "focal layers above random layers"),
        ("focal", "first", "focal layers above the first layers, as many"),
        ("focal", "last", "focal layers above the last layers, as many"),
        ("focal", "patched", "focal layers by drift above as many by patching"),
        ("focal", "all", "focal layers above all layers with a smaller rank"),
        ("patched", "random", "layers by patching above random layers"),
        ("focal", "focal, as published", "with the chosen answer's own loss and anchors above the loss as published"),
        ("focal", "focal, no credit", "released credit above none"),
        ("focal, attention credit", "focal, no credit", "attention credit above none"),
        ("focal, as published", "focal, plain DPO", "the loss as published above plain DPO"),
    ):
        # Arms of one seed are compared with each other; the interval is over tasks, for these very adapters.
        for seed in sorted({kinds[name].seed for name in found}):
            ours, others = (
                [name for name in found if kinds[name].seed == seed and like(name, which)] for which in (first, second)
            )
            if ours and others:
                drawn = f" (mean of {len(others)} draws)" if len(others) > 1 else ""
                again = f", seed {seed}" if seed else ""
                difference = conflict_arms.against(found[ours[0]][0], [found[name][0] for name in others], own)
                name = f"{what}{drawn}{again} (compliance under conflict)"
                made.append(conflict_claims.beats(name, difference, n))
    return made


def like(name: str, which: str) -> bool:
    """Whether an arm is another one, whatever its seed, or on layers drawn at random."""
    kinds = conflict_arms.ARMS
    if which == "random":
        return kinds[name].layers.startswith("random")
    return replace(kinds[name], seed=kinds[which].seed) == kinds[which]


def after_claims(
    model: Any,
    adapter: Path,
    answers: tuple[Result, Result],
    taught: Sequence[str],
    table: pd.DataFrame,
    arm: str,
    plain: Result,
) -> list[Claim]:
    """CRAS, of the families that were trained, and the neurons before and after an arm."""
    ids = set(answers[0].frame["pair"])
    pairs = [pair for pair in make_pairs("held-out", 10**6, families=BUILT_IN) if pair.id in ids]
    graded = []
    for name, result in zip(("before", "after"), answers, strict=True):
        queries = [
            query for query in queries_from_follow(result, pairs, prompts=("conflict",)) if query.family in taught
        ]
        scored = cras(RuleJudge(), queries, out=adapter.parent / f"cras_{name}", progress=False)
        graded.append(cras_by_answer(scored)[0].set_index("query")[list(DIMENSIONS)])
    tasks = pd.Series({f"{pair.id}/conflict": pair.task.id for pair in pairs}).reindex(graded[0].index)
    with adapted(model, adapter):
        trained = neurons.decode(model)
    same = neurons.compare(plain, trained).frame.query("layer == -1").iloc[0]
    same_top = float(table.loc[table["arm"] == arm, "same_top"].iloc[0])
    return [
        conflict_claims.scores(
            graded[0], graded[1].reindex(graded[0].index), tasks, CLAIMED[arm], arm == "focal, as published"
        ),
        conflict_claims.neurons_stay(float(same["agree"]), int(same["n"]), same_top, CLAIMED[arm]),
    ]
