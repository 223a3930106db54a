"""Causes of the toy's sinks: each half of mutual reinforcement taken away, ReLU attention, SGD, other structures.

The part of `analyses.bigram_backcopy` that compares runs which differ in one setting; section 3 of Guo et al. 2024
(arXiv 2410.13835).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp.report.claims import Claim
from interp.results import Result
from interp.sinks import bigram_plots as plots
from interp.sinks import bigram_published as published
from interp.sinks.bigram_comparison import (
    BASE,
    MITIGATION,
    START,
    STRUCTURES,
    compare_toys,
    reinforcement,
    summarise_toys,
    toy_folder,
)
from interp.sinks.bigram_interventions import intervene_toy, toy_characters
from interp.sinks.bigram_settings import toy_settings
from interp.sinks.bigram_training import load_toy
from interp.tokens import visible

SOURCE = published.SOURCE
SAMPLE = 7_654_321  # seed of the sequences on which trained models are judged; no run is trained or followed on them
JUDGED = 512  # how many
SUMMARY = [
    *("arm", "step", "backcopy_risk", "bigram_excess", "layer", "mass", "trigger_mass"),
    *("value_norm", "value_max", "value_others", "peak", "peak_norm", "peak_layer"),
]


@dataclass(frozen=True)
class Effort:
    """How much is trained.

    Attributes:
        settings: changes to the preset, for one-layer runs.
        seeds: of the plain one-layer run.
        deep: changes to the laptop preset for runs of several blocks; None: they are left out.
        bigram_band: a run that has learned bigrams is at most this share above the oracle.
        relu_band: a run without a sink has less attention than this on ⟨s⟩.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    deep: Mapping[str, Any] | None = None
    bigram_band: float = 0.01
    relu_band: float = 0.01


# What a residual peak needs is width and many steps of AdamW; short sequences make them affordable.
DEEP = {"width": 128, "length": 32, "batch": 32, "steps": 1500, "cooldown": 0}
FULL = Effort(deep=DEEP)
SHORT = Effort({"steps": 400, "adamw_rate": 3e-3, "cooldown": 150}, seeds=(0,), bigram_band=0.02, relu_band=0.05)


@dataclass(frozen=True)
class Setup:
    """What every part of the analysis needs.

    Attributes:
        preset, device: of all runs.
        runs: folder for them.
        effort: how much is trained.
    """

    preset: str
    device: str | None
    runs: Path
    effort: Effort

    def compare(self, arms: Mapping[str, Mapping[str, Any]], **changes: Any) -> Result:
        """One-layer arms on the first seed; the plain arm is the same run in every comparison."""
        common = {**self.effort.settings, **changes}
        return compare_toys(arms, self.preset, out=self.runs, device=self.device, seeds=self.effort.seeds[:1], **common)


def mutual_reinforcement(setup: Setup, items: list[Any]) -> list[Claim]:
    """Runs in which one half of the loop is taken away from the first step on."""
    arms = reinforcement(toy_settings(setup.preset, **setup.effort.settings).width)
    if setup.effort.deep is None:
        arms = dict(list(arms.items())[:3])
    result = setup.compare(arms)
    table = summarise_toys(result)
    items += [result, table[SUMMARY]]
    table = table.set_index("arm")
    free, hidden = table.loc[BASE], table.loc[next(name for name, arm in arms.items() if "see_start" in arm)]
    drained = {name: row["value_norm"] / row["value_max"] for name, row in (("free", free), ("hidden", hidden))}
    held = {
        float(arm["start_norm"]): float(table.loc[name, "mass"]) for name, arm in arms.items() if "start_norm" in arm
    }
    masses = [held[norm] for norm in sorted(held)]
    falling = all(less < more for more, less in itertools.pairwise(masses))
    return [
        Claim(
            "the sink makes the drain: with ⟨s⟩ hidden from later queries its value does not drain (‖W_O v‖, end / maximum)",
            f"{SOURCE}, mutual reinforcement; our intervention",
            "no such run",
            f"{drained['hidden']:.2f}; free {drained['free']:.2f}",
            None,
            1,
            bool(drained["hidden"] > 2 * drained["free"]),
        ),
        Claim(
            "the drain makes the sink: the smaller ‖W_O v‖ of ⟨s⟩ is held, the more attention ⟨s⟩ gets",
            f"{SOURCE}, mutual reinforcement; our intervention",
            "no such run",
            "; ".join(f"held at {norm:.1f}: {held[norm]:.3f}" for norm in sorted(held))
            + f"; free ({free['value_max']:.1f} at most, {free['value_norm']:.1f} at the end): {free['mass']:.3f}",
            None,
            len(held) + 1,
            bool(falling and masses[0] > free["mass"] + 0.05),
        ),
        Claim(
            "the drain is needed for the sink: held at its largest, there is none (attention below 0.3)",
            "ours",
            None,
            f"{masses[-1]:.3f} at {max(held):.1f}" if len(held) > 1 else "not run in the short effort",
            None,
            len(held) - 1,
            bool(masses[-1] < 0.3) if len(held) > 1 else None,
        ),
    ]


def mitigation(setup: Setup, items: list[Any]) -> list[Claim]:
    """ReLU attention, and sequences without ⟨s⟩, in one layer."""
    arms: dict[str, dict[str, Any]] = {BASE: {}, "AdamW, ReLU": MITIGATION["AdamW, ReLU"]}
    if setup.effort.deep is not None:
        arms |= START
    result = setup.compare(arms)
    table = summarise_toys(result).set_index("arm")
    items += [result, table.reset_index()[SUMMARY]]
    relu, base = table.loc["AdamW, ReLU"], table.loc[BASE]
    claims = [
        Claim(
            f"ReLU attention: no sink (attention of non-triggers on ⟨s⟩; band < {setup.effort.relu_band:g})",
            SOURCE,
            f"< {published.RELU_MASS}",
            f"{relu['mass']:.4f}; softmax {base['mass']:.3f}",
            None,
            1,
            bool(relu["mass"] < setup.effort.relu_band),
        ),
        Claim(
            "ReLU attention: no drain (‖W_O v‖ of ⟨s⟩, end over maximum)",
            SOURCE,
            "no drain",
            f"{relu['value_norm'] / relu['value_max']:.2f}; softmax {base['value_norm'] / base['value_max']:.2f}",
            None,
            1,
            bool(relu["value_norm"] / relu["value_max"] > 0.7),
        ),
    ]
    if "without ⟨s⟩" in table.index:
        claims += without_start(setup, float(table.loc["without ⟨s⟩", "mass"]), float(base["mass"]), items)
    return claims


def without_start(setup: Setup, mass: float, usual: float, items: list[Any]) -> list[Claim]:
    """Where attention goes when sequences have no ⟨s⟩."""
    model, settings = load_toy(toy_folder(setup.runs, "without ⟨s⟩", setup.effort.seeds[0]))
    tokens = settings.task.sample(JUDGED, settings.length, seed=SAMPLE)
    about = {"preset": setup.preset, **setup.effort.settings, "start": False}
    characters = toy_characters(model, settings.task, tokens, about)
    items.append(characters)
    frame = characters.frame
    triggers = float(frame.loc[frame["group"] == "trigger", "received"].sum())
    share = float(settings.task.is_trigger(tokens).float().mean())
    most = frame.sort_values("received", ascending=False).head(4)
    smallest = frame[frame["n"] >= 50].sort_values("value_norm").head(4)
    names = ", ".join(visible(character) for character in most["character"])
    return [
        Claim(
            "without ⟨s⟩ the first character, whatever it is, becomes the sink (attention of non-triggers on it)",
            "ours",
            None,
            f"{mass:.3f}; with ⟨s⟩ {usual:.3f}",
            None,
            1,
            bool(mass > 0.5),
        ),
        Claim(
            "without ⟨s⟩ the tokens with the smallest values become the sinks: attention of non-triggers on triggers",
            "ours",
            None,
            f"{triggers:.3f} (triggers are {share:.2f} of positions); most goes to {names}; the smallest ‖W_O v‖ have "
            f"{', '.join(visible(character) for character in smallest['character'])}",
            None,
            JUDGED,
            bool(triggers > 2 * share and set(most["character"]) == set(smallest["character"])),
        ),
    ]


def deep(setup: Setup, items: list[Any]) -> list[Claim]:
    """Three blocks: the residual peak under AdamW, SGD and ReLU attention; and which blocks make one."""
    paper = {name: f"{norm:g}" for name, norm in published.RESIDUAL_NORM.items()}
    claim = "three blocks: ‖x‖ at ⟨s⟩ under AdamW is at least twice that under SGD"
    both = f"{paper[BASE]} against {paper['SGD, softmax']}"
    if setup.effort.deep is None:
        ours = "not run in the short effort: python -m analyses.bigram_backcopy"
        return [Claim(claim, SOURCE, both, ours, None, 0, None)]
    folder, changes = setup.runs / "deep", {} if setup.preset == "paper" else dict(setup.effort.deep)
    common = {"seeds": setup.effort.seeds[:1], "device": setup.device, **changes}
    three = compare_toys(MITIGATION, setup.preset, out=folder, layers=3, **common)
    structures = compare_toys({BASE: {"blocks": ("both",) * 3}, **STRUCTURES}, setup.preset, out=folder, **common)
    panels = [("residual_norm", "start"), ("residual_median", "rest")]
    shapes = summarise_toys(structures)
    items += [
        plots.compare_toys(three, panels),
        summarise_toys(three)[SUMMARY],
        plots.compare_toys(structures, panels),
        shapes[SUMMARY],
    ]
    norms = {arm: largest_norm(three, arm) for arm in MITIGATION}
    table = summarise_toys(three).set_index("arm")
    peaks = table["peak"]
    ordered = shapes.sort_values("peak", ascending=False)
    made = structures.provenance.parameters["arms"]
    names = ["both + both + both" if arm == BASE else arm for arm in ordered["arm"]]
    wrong = [
        name
        for name, arm, peak in zip(names, ordered["arm"], ordered["peak"], strict=True)
        if attention_above_mlp(made[arm]["blocks"]) != (peak >= 2)
    ]
    return [
        peak_origin(setup, folder, changes, int(table.loc[BASE, "peak_layer"]), items),
        Claim(
            claim,
            SOURCE,
            both,
            f"{norms[BASE]:.1f} against {norms['SGD, softmax']:.1f} (largest over blocks, last step)",
            None,
            1,
            bool(norms[BASE] >= 2 * norms["SGD, softmax"]),
        ),
        Claim(
            "three blocks, AdamW: the residual at ⟨s⟩ stands out (largest ratio of ‖x‖ there to the others' median; band ≥ 2)",
            SOURCE,
            "a peak",
            f"{peaks[BASE]:.2f} at block {table.loc[BASE, 'peak_layer']}; SGD {peaks['SGD, softmax']:.2f}",
            None,
            1,
            bool(peaks[BASE] >= 2 > peaks["SGD, softmax"]),
        ),
        Claim(
            "three blocks: ReLU attention prevents the peak (ratio below 2)",
            SOURCE,
            f"‖x‖ {paper['AdamW, ReLU']} against softmax's {paper[BASE]}",
            f"ratio {peaks['AdamW, ReLU']:.2f} against {peaks[BASE]:.2f}; largest ‖x‖ {norms['AdamW, ReLU']:.1f} against "
            f"{norms[BASE]:.1f}",
            None,
            1,
            bool(peaks["AdamW, ReLU"] < 2),
        ),
        Claim(
            "which structures make a peak (ratio of ‖x‖ at ⟨s⟩ to the others' median, at least 2)",
            SOURCE,
            "its repository trains mlp + both + mlp, attention + both + attention and both + both + mlp; no figures at hand",
            "; ".join(f"{name} {peak:.2f}" for name, peak in zip(names, ordered["peak"], strict=True)),
            None,
            len(shapes),
            bool(ordered["peak"].iloc[0] >= 2),
        ),
        Claim(
            "a peak appears where an MLP has attention above it, and nowhere else (ratio at least 2)",
            "ours",
            None,
            f"{len(ordered) - len(wrong)} of {len(ordered)} structures; not: {', '.join(wrong) or 'none'}",
            None,
            len(ordered),
            not wrong,
        ),
    ]


def attention_above_mlp(blocks: Sequence[str]) -> bool:
    """Whether some MLP's output is seen by an attention."""
    first = next((layer for layer, kind in enumerate(blocks) if kind != "attention"), len(blocks))
    return any(kind != "mlp" for kind in blocks[first + 1 :])


def peak_origin(setup: Setup, folder: Path, changes: Mapping[str, Any], block: int, items: list[Any]) -> Claim:
    """‖x‖ at ⟨s⟩ behind the block with the peak, with its MLP or its attention left out."""
    model, settings = load_toy(toy_folder(folder, BASE, setup.effort.seeds[0]))
    tokens = settings.task.sample(JUDGED, settings.length, seed=SAMPLE)
    effects = intervene_toy(
        model, settings.task, tokens, about={"preset": setup.preset, **changes, "blocks": settings.blocks}
    )
    items.append(effects)
    frame = effects.frame[(effects.frame["quantity"] == "residual_norm") & (effects.frame["group"] == "start")]
    norm = frame[frame["layer"] == block].set_index("intervention")["value"]
    whole, no_mlp, no_attention = (float(norm[part]) for part in ("none", f"mlp.{block}", f"attention.{block}"))
    return Claim(
        f"three blocks: the residual at ⟨s⟩ is made by the MLP of block {block}, not by its attention (‖x‖ behind the block)",
        f"{SOURCE}; in Llama-3.1-8B",
        "Llama: 496; 27–34 without the MLP of block 0 or 1; attention is irrelevant",
        f"{whole:.1f}; without its MLP {no_mlp:.1f}, without its attention {no_attention:.1f}",
        None,
        JUDGED,
        bool(no_mlp < 0.5 * whole and no_attention > 0.8 * whole),
    )


def largest_norm(result: Result, arm: str) -> float:
    """‖x‖ at position 0 behind the block where it is largest, at the last step."""
    frame = result.frame[result.frame["arm"] == arm]
    last = frame[(frame["step"] == frame["step"].max()) & (frame["quantity"] == "residual_norm")]
    return float(last.loc[last["group"] == "start", "value"].max())
