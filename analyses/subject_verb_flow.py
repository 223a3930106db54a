"""Does attention flow find the subject? Agreement with an attractor, on sentences in which the nouns exchange roles.

Abnar & Zuidema, "Quantifying Attention Flow in Transformers" (arXiv 2005.00928), ask it of an encoder trained for the
task: in "the key to the cabinets" attention to "key" helps and attention to "cabinets" does not. Here a causal language
model reads the beginning of a sentence, and the scores are those at its last position, where the verb is predicted.

    python -m analyses.subject_verb_flow [--model NAME] [--pairs 128] [--out reports/subject_verb_flow]

1. Pairs of sentences: the same nouns at the same positions in exchanged roles (`analyses.subject_verb_sentences`).
2. What the model does, and what it does after a noun is replaced: the reference (`analyses.subject_verb_measures`).
3. *Balanced accuracy*: how often a score ranks the subject above the attractor, mean over both sentences of a pair.
   What depends on positions and nouns alone gets exactly 50 %. A tie counts a half.
4. *Position controlled*: whether a noun scores more as the subject than at the same position as the attractor: mean
   over both nouns of (subject − attractor) / (subject + attractor), and the share of pairs where it is above 0. The
   words around the nouns change with the roles, so a score may rise without knowing them: what layer 0 takes from the
   noun and what the target's own row gives to positions from it on are the controls.
5. Pairs are the unit of intervals; sentences are where the model's accuracy or a share of sentences is meant (Wilson).
   Where a depth, a correction or a head is chosen, it is on one half of the pairs, and what is printed is from the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from analyses import subject_verb_claims as claim
from analyses import subject_verb_tables as tables
from analyses.subject_verb_heads import best_heads, controls_of, head_table, heads, layer_figure, switched_off
from analyses.subject_verb_measures import agreement, log_odds, scores
from analyses.subject_verb_sentences import digest, generate
from interp import load_model
from interp.cli import show
from interp.errors import InputError
from interp.report import Section, write_report
from interp.report.claims import claims_frame, write_claims
from interp.reuse import reuse_or_make

# What `make report` runs.
REPORT: dict[str, Any] = {"n_pairs": 32, "n_depths": 3}


def run(model: Any, out: Path, *, n_pairs: int = 128, n_depths: int = 6, words: Any = None, seed: int = 0) -> Section:
    """Generate, measure, compare.

    Args:
        model: what `load_model` gave.
        out: folder for the results; what is there already is used again.
        n_pairs: pairs of sentences; a multiple of 32 is balanced.
        n_depths: at how many depths scores are looked at, the whole depth last.
        words: see `generate`; our own by default.
        seed: of the choice of words, and of the halves.

    Returns:
        A section for a report.

    Raises:
        InputError: see `generate`; fewer than one depth, an encoder.
    """
    depths = depth_list(model.arch.n_layers, n_depths)
    whole = depths[-1]
    sentences = generate(model, n_pairs, words=words, seed=seed)
    neutral = None if words is None else words["neutral"][0]["word"]
    made: dict[str, Any] = {"sentences": digest(sentences)}

    def reused(name: str, make: Any, **parameters: Any) -> Any:
        return reuse_or_make(out / f"{name}.parquet", make, fingerprint=model.fingerprint, parameters=made | parameters)

    agreed = reused("agreement", lambda: agreement(model, sentences, neutral, progress="agreement"))
    odds = log_odds(agreed)
    effects = tables.blank_effects(odds)
    scored = reused("scores", lambda: scores(model, sentences, effects, depths, progress="graphs"), depths=depths)
    by_head = reused("heads", lambda: heads(model, sentences, progress="heads"))
    plain = scored.frame.astype({key: str for key in tables.KEYS if key != "n_layers"})
    pairs = tables.paired(pd.concat([plain, tables.reference(odds, whole)]))
    half = tables.halves(pairs, seed)
    best = best_heads(by_head.frame, half, tables.accuracies(pairs, whole))
    head = (int(best.iloc[0]["layer"]), int(best.iloc[0]["index"]))
    controls = controls_of(head, model.arch.n_heads, seed=seed)
    fresh = [one for one in sentences if not half[one.pair]]
    off = None
    if fresh:
        off = reuse_or_make(
            out / "switched_off.parquet",
            lambda: switched_off(model, fresh, head, controls),
            fingerprint=model.fingerprint,
            parameters={"sentences": digest(fresh), "head": list(head), "controls": [list(one) for one in controls]},
        )
    untouched = odds[odds["replacement"] == "none"]
    claims = [
        claim.agrees(untouched),
        claim.reference(pairs),
        *claim.ranks(pairs, whole),
        claim.chosen(pairs, half, "below"),
        claim.chosen(pairs, half, "above"),
        *claim.worth(pairs, whole),
        claim.controlled(pairs, whole),
        claim.head(best),
        *([] if off is None else [claim.used(off.frame)]),
        claim.cut(plain, whole),
        claim.correlation(pairs, plain, whole),
    ]
    write_claims(out / "claims.json", claims)
    items: list[Any] = [
        tables.in_short(pairs, best, whole),
        tables.depth_figure(pairs, "below", model.name),
        tables.depth_figure(pairs, "above", model.name),
        layer_figure(by_head.frame, model.name),
        head_table(best),
        tables.by_kind(pairs, untouched, whole),
        tables.agreement_table(odds),
        tables.examples(sentences, odds),
        tables.overview(pairs, whole),
        scored,
        agreed,
        by_head,
        *([] if off is None else [off]),
    ]
    title = "Subject–verb agreement: does attention flow find the subject?"
    return Section(title, text(model.name, n_pairs, depths), items, claims)


def text(name: str, n_pairs: int, depths: Sequence[int]) -> str:
    """What the report says before the tables."""
    return (
        f"{name} reads {2 * n_pairs} beginnings such as “And the keys near the cabinet” or “Near the keys, the "
        f"cabinet”: {n_pairs} pairs with the same two nouns at the same positions, one the subject of the verb that "
        "comes next, the other an attractor, in exchanged roles. So a score that goes by position, or by the noun, "
        "ranks the subject above the attractor in exactly half of them: balanced accuracy 50 %. Scores are those at "
        "the last position, where the verb is predicted. Blank-out, the reference that is not attention: by how much "
        "log p(right verb) − log p(wrong verb) changes when a noun gets its other number or becomes one without.\n\n"
        "“Subject first” and “second” are the accuracies where the first or the second noun is the subject. The first "
        "two figures: graphs of the first or of the last layers. The third: attention of single layers and heads. "
        "Then tables: heads, chosen on one half of the pairs and measured on the other; balanced accuracy by kind of "
        "sentence; how often the right verb is likelier, and by how many nats its lead changes when a noun is "
        "replaced; examples.\n\n"
        f"The last of them has all scores on all {depths[-1]} layers. “Controlled” is the share of pairs in which a "
        "noun scores more as the subject than at the same position as the attractor, “contrast” by how much, in "
        "percent of the score. The words around the nouns change with the roles, so a score may rise without knowing "
        "them; “ends” is the control: the smaller of what layer 0 takes from the noun and what the target's own row "
        "gives to positions from the noun on (“target_cut”). “Spearman” compares with blank-out over all words, each "
        "in turn replaced by “ _”. The graph “uniform” is uniform attention, position alone. Intervals are over "
        "pairs, 95 %."
    )


def depth_list(n_layers: int, n_depths: int) -> list[int]:
    """Numbers of layers, evenly spaced, all of them last.

    Raises:
        InputError: fewer than one depth.

    Example:
        >>> depth_list(30, 6)
        [5, 10, 15, 20, 25, 30]
    """
    if n_depths < 1:
        raise InputError(f"n_depths={n_depths}; expected at least 1")
    return sorted({max(1, round(n_layers * step / n_depths)) for step in range(1, n_depths + 1)})


def main(
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    pairs: Annotated[int, typer.Option(help="Pairs of sentences.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the words.")] = 0,
    short: Annotated[bool, typer.Option(help="The smaller run that the report uses.")] = False,
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path, typer.Option()] = Path("reports/subject_verb_flow"),
) -> None:
    """Ask every score for the subject, and write a report."""
    loaded = load_model(model, device=device, dtype=dtype)
    section = run(loaded, out, seed=seed, **(REPORT if short else {"n_pairs": pairs}))
    for item in section.items:
        if isinstance(item, pd.DataFrame):
            show(item)
    show(claims_frame(section.claims))
    print(write_report([section], out / "report.html", title=f"Subject–verb agreement in {loaded.name}"))


if __name__ == "__main__":
    typer.run(main)
