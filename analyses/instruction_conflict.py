"""Who wins when system and user disagree, which layers settle it, and can those layers alone be trained to obey?

Reproduces on any chat model what Wan et al., "Diagnose, Localize, Align" (arXiv 2509.23188; withdrawn by its authors,
released in part), say of instruction conflicts. Prints the table claim · paper · ours and writes a report.

    python -m analyses.instruction_conflict [--model NAME] [--train] [--out reports/instruction_conflict]

1. Diagnose: which rules the model follows at all, and who wins under conflict, by verifiers; CRAS by two judges and how far
   they agree. The families that count as followed are chosen on other tasks than those that are reported.
2. Localise: attention drift of every head beside two controls, a paraphrase and another demand, in our form and in the
   published one; how stable the choice is; then what patching and ablation say of the same layers and heads.
3. Align (`--train`; hours on a laptop): adapters on the focal layers, beside random, first, last and all layers and plain
   DPO, some under a second seed, measured on held-out tasks. A report that is made without it shows what is there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from analyses import conflict_arms, conflict_claims
from analyses.conflict_training import LAYERS, Job, Located, align_arms
from interp import load_model
from interp.cli import show
from interp.conflict import (
    RuleJudge,
    ablate_heads,
    ablation_summary,
    agreement_with_drift,
    compare_judges,
    cras,
    cras_summary,
    encode_pair,
    focal_heads,
    focal_layers,
    follow,
    follow_summary,
    followed_families,
    followed_rules,
    head_scores,
    layer_scores,
    localize,
    make_contrasts,
    make_pairs,
    middle_layers,
    patch,
    plots,
    queries_from_follow,
    recovery,
    restoring_layers,
    stability,
    thirds,
)
from interp.conflict.adapters import require_peft
from interp.conflict.local_judge import LocalJudge
from interp.conflict.pairs import HELD_OUT_FAMILIES
from interp.conflict.verifiers import BUILT_IN
from interp.errors import InputError, InterpError
from interp.report import Section, titled, write_report
from interp.report.claims import Claim, claims_frame, write_claims
from interp.results import Result

FLOOR = ("none", "system", "user", "agree", "conflict")
# What `make report` runs; no training.
REPORT: dict[str, Any] = {
    "n_choose": 128,
    "n_floor": 96,
    "n_peer": 0,
    "n_judged": 0,
    "n_localise": 96,
    "n_patch": 48,
    "n_head_patch": 0,
    "n_ablate": 12,
    "n_sets": 20,
}


def run(
    model: Any,
    out: Path,
    *,
    n_choose: int = 192,
    n_floor: int = 384,
    n_peer: int = 96,
    n_judged: int = 64,
    n_localise: int = 240,
    n_patch: int = 96,
    n_head_patch: int = 24,
    n_ablate: int = 48,
    n_sets: int = 40,
    train: Sequence[str] = (),
    n_train: int = 576,
    n_validation: int = 24,
    n_measure: int = 96,
    n_others: int = 40,
    settings: Mapping[str, Any] | None = None,
    template: str | None = None,
) -> Section:
    """Diagnose, localise, and show or train the alignment.

    Args:
        model: what `load_model` gave, with a chat template.
        out: folder for the results; what is there already is used again.
        n_choose: pairs of the localisation part that say which families are followed.
        n_floor: held-out pairs of the floor.
        n_peer: held-out pairs in which another agent contradicts; 0 for none.
        n_judged: answers that the model itself grades as a judge, beside the rules; 0 for none.
        n_localise: pairs of the localisation part whose drift is measured.
        n_patch: pairs whose layers are patched.
        n_head_patch: pairs whose heads are patched one by one; 0 for none.
        n_ablate: held-out pairs on which heads chosen by drift and by patching are ablated.
        n_sets: random sets beside them.
        train: arms to train, of `conflict_arms.ARMS`; those that were trained before are shown in any case.
        n_train, n_validation: pairs of the training and validation parts, of the families that are followed.
        n_measure, n_others: held-out pairs on which arms are measured, of these families and of the others.
        settings: of `align`.
        template: chat template; by default the model's own, and "plain" where it has none that fits.

    Returns:
        A section for a report.
    """
    claims: list[Claim] = []
    items: list[Any] = []
    # Another model's results stay beside these.
    job = Job(model, out / model.fingerprint, fitting_template(model) if template is None else template, claims, items)
    followed = diagnose(job, n_choose, n_floor, n_peer, n_judged)
    found = locate(job, n_localise, n_patch, n_head_patch, n_ablate, n_sets)
    sizes = {"n_train": n_train, "n_validation": n_validation, "n_measure": n_measure, "n_others": n_others}
    trained = align_arms(job, followed, found, train, sizes, dict(settings or {}))
    write_claims(out / "claims.json", claims)
    told = ", ".join(followed) if followed else "none"
    text = (
        f"Eight families of two opposed rules each, one in the system turn and the other from the user, on everyday "
        f"tasks; programs verify "
        f"the answers of {model.name}. Families with a rule that it follows more often than it would by itself, chosen on other "
        f"tasks: {told}. Intervals are over tasks, 95 %.\n\n"
        "Attention drift compares where the last token of the prompt looks (system rule, user rule, task, template, "
        "sink) when the rules "
        "agree and when they conflict; its controls are the same comparison with a paraphrase and with another demand "
        "that can be obeyed as well. The published form "
        "compares keys by their "
        "number instead. Patching puts a layer's attention output of the consistent prompt into the conflicting one.\n\n"
        + (
            "Adapters were trained on the layers named. What is claimed of one arm is of its seed 0, and intervals are over "
            "tasks for these very adapters: another seed gives another one, see the arms that have two."
            if trained
            else "No adapter has been trained here yet: see --train."
        )
    )
    return Section("Conflict: who wins when system and user disagree", text, items, claims)


def fitting_template(model: Any) -> str | None:
    """`None` where the model's own chat template has a system turn, else "plain"."""
    try:
        encode_pair(model, make_pairs("held-out", 1)[0], ("conflict",))
    except InputError as error:
        print(f"interp: {error}; using the template 'plain'", file=sys.stderr)
        return "plain"
    return None


def diagnose(job: Job, n_choose: int, n_floor: int, n_peer: int, n_judged: int) -> list[str]:
    """The floor and CRAS; returns the families that the model follows."""
    model, out, claims, items = job.model, job.out, job.claims, job.items
    ask = {"template": job.template}
    choosing = make_pairs("localisation", n_choose, families=BUILT_IN)
    followed = followed_families(follow(model, choosing, FLOOR, **ask, out=out / f"follow_localisation_{n_choose}"))
    pairs = make_pairs("held-out", n_floor, families=BUILT_IN)
    answers = follow(model, pairs, FLOOR, **ask, out=out / f"follow_held_out_{n_floor}")
    table = followed_rules(answers)
    items += [
        plots.follow(answers),
        titled(table, "Who follows what: share of answers that obey each rule (held-out tasks)"),
        titled(follow_summary(answers), "The same with intervals, by prompt"),
        answers,
    ]
    if followed:
        claims.append(conflict_claims.loses(answers, followed))
    if n_peer:
        peers = follow(
            model,
            make_pairs("held-out", n_peer, families=BUILT_IN, setting="peer"),
            FLOOR,
            **ask,
            out=out / f"follow_peer_{n_peer}",
        )
        items += [
            plots.follow(peers),
            titled(followed_rules(peers), "Another agent asks for the opposite: share of answers that obey each rule"),
        ]
        if followed:
            claims.append(conflict_claims.loses(peers, followed))
    queries = queries_from_follow(answers, pairs, prompts=("system", "agree", "conflict"))
    by_rule = cras(RuleJudge(), queries, out=out / f"cras_rule_{n_floor}")
    items += [plots.score(by_rule), titled(cras_summary(by_rule), "CRAS by the verifiers")]
    if n_judged:
        drawn = np.random.default_rng(0).permutation(len(queries))[:n_judged]  # of every prompt, rule and task
        some = [queries[at] for at in sorted(drawn)]
        graded = [cras(judge, some, out=out / f"cras_{name}_{n_judged}") for name, judge in judges(model).items()]
        items += [
            titled(cras_summary(graded[1]), "CRAS by the model as its own judge"),
            titled(compare_judges(graded), "Do the two judges agree?"),
        ]
    return followed


def judges(model: Any) -> dict[str, Any]:
    """The rules, and the model that is judged as its own judge."""
    return {"rules": RuleJudge(), "model": LocalJudge(model)}


def locate(job: Job, n_localise: int, n_patch: int, n_head_patch: int, n_ablate: int, n_sets: int) -> Located:
    """Drift, patching and ablation."""
    model, out, claims, items = job.model, job.out, job.claims, job.items
    ask = {"template": job.template}
    pairs = make_pairs("localisation", n_localise)
    drift = localize(model, pairs, **ask, out=out / f"drift_{n_localise}")
    published = localize(
        model, pairs, align="truncate", consistent="system", **ask, out=out / f"drift_published_{n_localise}"
    )
    beyond = localize(model, pairs, control="other", **ask, out=out / f"drift_other_{n_localise}")
    heads, layers, heads_beyond = head_scores(drift), layer_scores(drift), head_scores(beyond)
    thirds_of = middle_layers(drift)
    thirds_published = middle_layers(published, score="score_pooled")
    claims += [
        conflict_claims.drifts(heads),
        conflict_claims.drifts(heads_beyond, "another demand, which can be obeyed as well,"),
        conflict_claims.middle(thirds_of, "spans, beyond the paraphrase"),
        conflict_claims.middle(middle_layers(beyond), "spans, beyond another demand"),
        conflict_claims.middle(thirds_published, "published form: truncated rows, no control"),
    ]
    items += [
        plots.localize(drift),
        plots.layer_profile(drift),
        plots.span_masses(drift),
        plots.layer_profile(beyond),
        titled(shared_focal(heads, heads_beyond), "Focal heads beyond either control"),
        titled(layers[LAYERS], "Drift by layer: score, paraphrase control, and what is above it"),
        titled(
            heads.sort_values("excess", ascending=False).head(30), "The 30 heads that drift most beyond the control"
        ),
        titled(thirds_of, "Where the focal heads are"),
        titled(thirds_published, "Where they are in the published form"),
        titled(stability_table(drift), "Focal heads and layers of random halves, without each family, and of it alone"),
    ]
    some = make_pairs("localisation", n_patch)
    contrasts = make_contrasts(model, some, **ask, progress="answers to patch with").found
    patched = patch(
        model,
        some,
        site=("attn_out", "resid_post"),
        contrasts=contrasts,
        **ask,
        out=out / f"patch_{n_patch}",
        progress="patch",
    )
    kinds = [(pair.family, pair.system_rule, pair.wording) for pair in some]
    if len(set(kinds)) < len(kinds):  # the control needs another task under the same rules
        other = patch(
            model,
            some,
            contrasts=contrasts,
            **ask,
            donor="other",
            out=out / f"patch_other_{n_patch}",
            progress="patch from another task",
        )
        items.append(plots.patch(other))
    thirds_patched, agreed = thirds(patched, model.arch.n_layers), agreement_with_drift(patched, layers)
    claims += [conflict_claims.middle_patched(thirds_patched), conflict_claims.same_layers(agreed, "layers")]
    items += [
        plots.patch(patched),
        titled(recovery(patched), "What each patched layer brings back"),
        titled(thirds_patched, "The same by thirds: share of the gap per layer, attention outputs"),
        titled(agreed, "Drift and patching, by layer"),
    ]
    if n_head_patch:
        few = some[:n_head_patch]
        by_head = patch(
            model,
            few,
            site="head",
            contrasts={pair.id: contrasts[pair.id] for pair in few if pair.id in contrasts},
            **ask,
            out=out / f"patch_heads_{n_head_patch}",
            progress="patch heads",
        )
        agreed_heads = agreement_with_drift(by_head, heads)
        claims.append(conflict_claims.same_layers(agreed_heads, "heads"))
        items += [
            plots.patch(by_head),
            titled(
                recovery(by_head).sort_values("change", ascending=False).head(20), "The 20 heads that bring back most"
            ),
            titled(agreed_heads, "Drift and patching, by head"),
        ]
    focal = focal_heads(drift)
    chosen = {"drift": focal}
    if n_head_patch:
        top = recovery(by_head).nlargest(len(focal), "change")
        chosen["patching"] = [(int(row.layer), int(row.head)) for row in top.itertuples()]
    # On tasks that chose none of them.
    tried = make_pairs("held-out", n_ablate, families=[name for name in BUILT_IN if name not in HELD_OUT_FAMILIES])
    answers = make_contrasts(model, tried, **ask, progress="answers to ablate with").found
    for how, chosen_heads in chosen.items():
        ablated = ablate_heads(
            model,
            tried,
            chosen_heads,
            n_random_sets=n_sets,
            contrasts=answers,
            **ask,
            out=out / f"ablate_held_out_{how}_{n_ablate}_{n_sets}",
            progress=f"ablate heads by {how}",
        )
        summary = ablation_summary(ablated)
        claims.append(conflict_claims.heads_matter(summary, how))
        items += [plots.ablate_heads(ablated), titled(summary, f"Heads chosen by {how} ablated, and random sets")]
    chosen_layers = focal_layers(drift)
    changes = recovery(patched).query("site == 'attn_out'").set_index("layer")["change"]
    by_layer = pd.DataFrame({"drift": layers.set_index("layer")["excess"], "patching": changes})
    return Located(chosen_layers, restoring_layers(patched, len(chosen_layers)), focal, by_layer)


def shared_focal(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """How many heads are focal beyond both controls, by chance, and how the two rank all heads."""
    place = ["layer", "head"]
    both = first.merge(second, on=place, suffixes=("", "_other"))
    shared = int((both["focal"] & both["focal_other"]).sum())
    n = int(both["focal"].sum())
    rank = both["excess"].corr(both["excess_other"], method="spearman")
    row = {"focal": n, "shared": shared, "expected": n * both["focal_other"].mean(), "rank_correlation": rank}
    moved = {
        f"n_above_{name}": int(((both[f"q{end}"] <= 0.05) & (both[f"excess{end}"] > 0)).sum())
        for name, end in (("paraphrase", ""), ("other_demand", "_other"))
    }
    return pd.DataFrame([row | moved | {"n_heads": len(both)}])


def stability_table(drift: Result) -> pd.DataFrame:
    """Overlap of focal heads and layers between random halves, and without each family: means."""
    table = stability(drift)
    halves = table[table["kind"] == "halves"]
    numbers = ["heads", "heads_chance", "layers", "layers_chance", "rank_correlation"]
    mean = halves[numbers].mean().to_frame().T.assign(kind="halves", name=f"mean of {len(halves)}")
    rest = table.loc[table["kind"] != "halves", ["kind", "name", *numbers]]
    return pd.concat([mean[["kind", "name", *numbers]], rest], ignore_index=True)


def main(
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    train: Annotated[bool, typer.Option(help="Train all arms and measure them.")] = False,
    arm: Annotated[list[str] | None, typer.Option(help="Train only these; again for more.")] = None,
    short: Annotated[bool, typer.Option(help="The smaller run that the report uses.")] = False,
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path, typer.Option()] = Path("reports/instruction_conflict"),
) -> None:
    """Diagnose, localise, align, and write a report."""
    arms = arm or (list(conflict_arms.ARMS) if train else [])
    unknown = [name for name in arms if name not in conflict_arms.ARMS]
    if unknown:
        raise InputError(f"--arm {unknown[0]!r}; expected one of {', '.join(map(repr, conflict_arms.ARMS))}")
    if arms:
        require_peft()
    loaded = load_model(model, device=device, dtype=dtype)
    section = run(loaded, out, train=arms, **(REPORT if short else {}))
    for item in section.items:
        if isinstance(item, pd.DataFrame):
            show(item)
    show(claims_frame(section.claims))
    print(write_report([section], out / "report.html", title=f"Instruction conflicts in {loaded.name}"))


if __name__ == "__main__":
    try:
        typer.run(main)
    except InterpError as error:
        raise SystemExit(f"interp: {error}") from None
