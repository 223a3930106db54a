"""How do attention sinks come about? A toy that can be trained in minutes, taken apart while it learns.

Reproduces sections 2 and 3 of Guo et al. 2024, "Active-Dormant Attention Heads" (arXiv 2410.13835): emergence of sinks,
value drains and residual peaks on the Bigram-Backcopy task, their mutual reinforcement, and what prevents them (ReLU
attention, SGD). Prints the table claim · paper · ours and writes a report. The task, the model and what is measured are
in `interp.sinks.bigram_*`.

    python -m analyses.bigram_backcopy [--preset laptop|paper] [--device cuda] [--out reports/bigram_backcopy]

Every run is kept in the folder and goes on from where it was; `--effort short` is what `make report` runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from analyses.bigram_causes import FULL, JUDGED, SAMPLE, SHORT, Effort, Setup, deep, mitigation, mutual_reinforcement
from interp.cli import show
from interp.report import Section, write_report
from interp.report.claims import Claim, claims_frame, write_claims
from interp.results import Result
from interp.sinks import bigram_plots as plots
from interp.sinks import bigram_published as published
from interp.sinks.bigram_backcopy import BigramBackcopy
from interp.sinks.bigram_comparison import BASE, compare_toys, delta_logit_fit, summarise_toys, toy_folder
from interp.sinks.bigram_interventions import intervene_toy, toy_attention, toy_characters
from interp.sinks.bigram_settings import toy_settings
from interp.sinks.bigram_training import load_toy, train_toy
from interp.tokens import visible

SOURCE = published.SOURCE
REPORT = {"effort": SHORT}  # what `make report` runs


def run(out: Path, preset: str = "laptop", device: str | None = None, effort: Effort = FULL) -> Section:
    """Train, take apart and compare.

    Args:
        out: folder for runs and results; what is there already is used again.
        preset: "laptop" or "paper".
        device: by default the GPU if there is one.
        effort: FULL or SHORT.

    Returns:
        A section for a report.
    """
    name = preset if effort == FULL else f"{preset}-short"
    setup = Setup(preset, device, out / "runs" / name, effort)
    items: list[Any] = []
    claims = task_claims(toy_settings(preset, **effort.settings).length)
    claims += emergence(setup, items)
    claims += taken_apart(setup, items)
    claims += mutual_reinforcement(setup, items)
    claims += mitigation(setup, items)
    claims += deep(setup, items)
    for index, result in enumerate(item for item in items if isinstance(item, Result)):
        result.save(out / f"{name}_{index}_{result.kind.split('.')[1]}.parquet")
    write_claims(out / "claims.json", claims)
    settings = toy_settings(preset, **effort.settings)
    stated = plots.describe({"preset": preset, **effort.settings})
    text = (
        f"{stated.capitalize()}: width {settings.width}, length {settings.length}, batch {settings.batch}, "
        f"{settings.steps:,} steps. Sequences follow tiny Shakespeare's bigrams, except that after a trigger (space, e, t) the "
        "character before it comes again. A head that has nothing to copy puts its attention on ⟨s⟩: it is dormant there and "
        f"active on triggers. Trained models are judged on {JUDGED} fresh sequences; intervals are 95 % bootstrap over "
        "sequences, or the range over seeds where the claim says so. Published figures are of the paper's preset, which is "
        "larger and longer: what is compared is the phases, not the digits."
    )
    return Section("Sinks: a toy in which they emerge", text, items, claims)


def task_claims(length: int) -> list[Claim]:
    """Facts of the task, which need no model."""
    task = BigramBackcopy()
    exact = task.oracle(256)
    tokens = task.sample(4096, 256, seed=SAMPLE)
    trigger = task.is_trigger(tokens)
    pairs = int((trigger[:, 1:] & trigger[:, :-1]).sum())
    return [
        Claim(
            "the task: share of triggers among input positions (exact, length 256)",
            SOURCE,
            published.TRIGGER_SHARE,
            exact.trigger_share,
            None,
            None,
            abs(exact.trigger_share - published.TRIGGER_SHARE) < 0.001,
        ),
        Claim("the task: two triggers in a row", SOURCE, "never", f"{pairs} times", None, trigger.numel(), pairs == 0),
        Claim(
            f"the task: least bigram risk in nats (exact, length 256; at length {length}: {task.oracle(length).bigram_risk:.3f})",
            SOURCE,
            published.ORACLE,
            exact.bigram_risk,
            None,
            None,
            abs(exact.bigram_risk - published.ORACLE) < 0.005,
        ),
    ]


def emergence(setup: Setup, items: list[Any]) -> list[Claim]:
    """The plain one-layer run on every seed: phases, sink, drain, growth of Δlogit."""
    seeds, common = setup.effort.seeds, setup.effort.settings
    runs = compare_toys({BASE: {}}, setup.preset, seeds=seeds, out=setup.runs, device=setup.device, **common)
    table = summarise_toys(runs)
    one = [
        train_toy(setup.preset, seed=seed, out=toy_folder(setup.runs, BASE, seed), device=setup.device, **common)
        for seed in seeds
    ]
    items += [one[0], phase_table(one[0])]
    steps, cooldown = (one[0].provenance.parameters[name] for name in ("steps", "cooldown"))
    # The last tenfold, as in the paper, as long as the rate is constant.
    fits = [delta_logit_fit(run, max(1, steps // 10), steps - cooldown) for run in one]
    n, over = len(seeds), f"mean over {len(seeds)} seed(s)"
    last = published.CURVE[-1]
    drained = table["value_norm"] / table["value_max"]
    slopes = np.array([fit.slope for fit in fits])
    return [
        _over_seeds(
            f"backcopy is learned: risk at triggers, nats ({over})", last[1], table["backcopy_risk"], n, "<", 0.05
        ),
        _over_seeds(
            f"bigrams are learned: risk above the oracle's, as a share of it ({over})",
            last[2] / published.ORACLE - 1,
            table["bigram_excess"],
            n,
            "<",
            setup.effort.bigram_band,
        ),
        _over_seeds(f"attention of non-triggers is on ⟨s⟩ ({over})", last[3], table["mass"], n, ">", 0.7),
        _over_seeds(f"attention of triggers is not ({over})", "active", table["trigger_mass"], n, "<", 0.1),
        _over_seeds(
            f"the value of ⟨s⟩ drains: ‖W_O v‖ at the end over its maximum ({over})",
            last[4] / max(row[4] for row in published.CURVE),
            drained,
            n,
            "<",
            0.5,
        ),
        Claim(
            f"Δlogit grows with ln(step), steps {fits[0].since} to {fits[0].until}: slope ({over}; "
            f"R² {np.mean([fit.r_squared for fit in fits]):.2f}, {fits[0].n} points each)",
            SOURCE,
            f"{published.LOGIT_SLOPE} (R² {published.LOGIT_R2}; steps 1,000 to 10,000)",
            float(slopes.mean()),
            (float(slopes.min()), float(slopes.max())) if n > 1 else None,
            n,
            bool((slopes > 0).all() and min(fit.r_squared for fit in fits) > 0.9),
        ),
    ]


def phase_table(result: Result) -> pd.DataFrame:
    """Our curve at some steps, and the published one."""
    frame = result.frame
    wanted = {
        "backcopy_risk": ("risk", "trigger"),
        "bigram_risk": ("risk", "bigram"),
        "mass": ("sink_mass", "other"),
        "value_norm": ("value_norm", "start"),
        "delta_logit": ("delta_logit", "other"),
    }
    steps = np.array(sorted(frame["step"].unique()))
    marks = [0, *(steps[np.abs(np.log(steps[1:] / at)).argmin() + 1] for at in np.geomspace(10, steps[-1], 8))]
    rows = []
    for step in dict.fromkeys(marks):
        here = frame[frame["step"] == step]
        row: dict[str, Any] = {"curve": "ours", "step": int(step)}
        for name, (quantity, group) in wanted.items():
            row[name] = float(here.loc[(here["quantity"] == quantity) & (here["group"] == group), "value"].iloc[0])
        rows.append(row)
    for values in published.CURVE:
        rows.append({"curve": "published (preset paper)", **dict(zip(published.CURVE_COLUMNS, values, strict=True))})
    return pd.DataFrame(rows)


def taken_apart(setup: Setup, items: list[Any]) -> list[Claim]:
    """The trained one-layer model with parts left out, and character by character."""
    folder = toy_folder(setup.runs, BASE, setup.effort.seeds[0])
    model, settings = load_toy(folder)
    task = settings.task
    tokens = task.sample(JUDGED, settings.length, seed=SAMPLE)
    about = {"preset": setup.preset, **setup.effort.settings}
    zero = {"no attention": ["attention.0"], "no MLP": ["mlp.0"]}
    effects = intervene_toy(model, task, tokens, {"none": [], **zero}, about)
    characters = toy_characters(model, task, tokens, about)
    items += [toy_attention(model, task, tokens[0], about), characters, effects]
    measured = effects.frame[effects.frame["quantity"] == "risk"]

    def risk(part: str, group: str) -> pd.Series:
        return measured[(measured["intervention"] == part) & (measured["group"] == group)].iloc[0]

    before, without, flat = risk("none", "bigram"), risk("no attention", "bigram"), risk("no attention", "trigger")
    norms = characters.frame.groupby("group", observed=True)["value_norm"]
    start, others = norms.mean()["start"], norms.get_group("other")
    frequent = characters.frame[(characters.frame["group"] == "other") & (characters.frame["n"] >= 50)]
    common, triggers = frequent["value_norm"], norms.get_group("trigger")
    below = ", ".join(visible(one) for one in frequent.loc[common <= triggers.max(), "character"]) or "none"
    return [
        Claim(
            f"without attention, backcopy is lost (risk at triggers above 1 nat; with it {risk('none', 'trigger')['value']:.4f})",
            SOURCE,
            published.WITHOUT_ATTENTION[0],
            float(flat["value"]),
            (float(flat["low"]), float(flat["high"])),
            int(flat["n"]),
            bool(flat["low"] > 1),
        ),
        Claim(
            f"without attention, bigram prediction stays as it was (risk within 2 %; with it {before['value']:.4f})",
            SOURCE,
            published.WITHOUT_ATTENTION[1],
            float(without["value"]),
            (float(without["low"]), float(without["high"])),
            int(without["n"]),
            bool(abs(without["value"] / before["value"] - 1) < 0.02),
        ),
        Claim(
            "without the MLP both are lost: risk at triggers / elsewhere",
            SOURCE,
            " / ".join(map(str, published.WITHOUT_MLP)),
            f"{risk('no MLP', 'trigger')['value']:.2f} / {risk('no MLP', 'bigram')['value']:.2f}",
            None,
            JUDGED,
            bool(risk("no MLP", "trigger")["low"] > 0.5 and risk("no MLP", "bigram")["low"] > 1.1 * before["high"]),
        ),
        Claim(
            "‖W_O v‖ of ⟨s⟩ < of triggers < of other characters (those seen 50 times or more)",
            SOURCE,
            f"{published.VALUE_NORM_START} < {_range(*published.VALUE_NORM_TRIGGERS)} < {_range(*published.VALUE_NORM_OTHERS)}",
            f"{start:.2f} < {_range(triggers.min(), triggers.max())} < {_range(common.min(), common.max())}; "
            f"mean of all {len(others)} others {others.mean():.1f}; others not above every trigger: {below}",
            None,
            int(characters.frame["n"].sum()),
            bool(start < triggers.min() and triggers.max() < common.min()),
        ),
    ]


def _over_seeds(claim: str, paper: str | float, values: pd.Series, n: int, sign: str, bound: float) -> Claim:
    """A figure per seed against a band that all of them must keep."""
    holds = bool((values < bound).all() if sign == "<" else (values > bound).all())
    interval = (float(values.min()), float(values.max())) if n > 1 else None
    return Claim(f"{claim}; band {sign} {bound:g}", SOURCE, paper, float(values.mean()), interval, n, holds)


def _range(low: float, high: float) -> str:
    return f"{low:.3g}–{high:.3g}"


def main(
    preset: Annotated[str, typer.Option(help="laptop, or paper for a GPU.")] = "laptop",
    effort: Annotated[str, typer.Option(help="full, or short: one layer, one seed, fewer steps.")] = "full",
    device: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path, typer.Option()] = Path("reports/bigram_backcopy"),
) -> None:
    """Train the toy, take it apart and write a report."""
    efforts = {"full": FULL, "short": SHORT}
    if effort not in efforts:
        raise typer.BadParameter(f"{effort!r}; choose full or short")
    section = run(out, preset, device or None, efforts[effort])
    for item in section.items:
        if isinstance(item, pd.DataFrame):
            show(item)
    show(claims_frame(section.claims))
    print(write_report([section], out / "report.html", title="Attention sinks in a toy"))


if __name__ == "__main__":
    typer.run(main)
