"""Runs of the toy that differ in one setting: what a sink needs, what prevents it, what makes a residual peak.

Guo et al. 2024 (arXiv 2410.13835), section 3.

1. `compare_toys` trains arms on the same seeds. Arms for the paper's questions are here: `reinforcement` (the sink hidden, or
   its value held where it is), MITIGATION (ReLU attention, SGD), STRUCTURES (which blocks make a residual peak) and START
   (without ⟨s⟩).
2. `summarise_toys` reduces runs to one row per arm and seed.
3. `delta_logit_fit` fits Δlogit = slope · ln(step) + intercept.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.columns import Column
from interp.errors import InputError
from interp.provenance import Provenance
from interp.results import Result
from interp.sinks.bigram_settings import toy_settings
from interp.sinks.bigram_training import COLUMNS, train_toy

if TYPE_CHECKING:
    import pandas as pd

BASE = "AdamW, softmax"  # the preset as it is; every set of arms has it under this name, so that it is trained once
MITIGATION: dict[str, dict[str, Any]] = {
    BASE: {},
    "SGD, softmax": {"optimizer": "sgd"},
    "AdamW, ReLU": {"attention": "relu"},
}
STRUCTURES: dict[str, dict[str, Any]] = {
    "both": {"blocks": ("both",)},
    "both + both": {"blocks": ("both",) * 2},
    "mlp + both": {"blocks": ("mlp", "both")},
    "attention + both": {"blocks": ("attention", "both")},
    "both + mlp": {"blocks": ("both", "mlp")},
    "both + both + mlp": {"blocks": ("both", "both", "mlp")},
    "mlp + both + mlp": {"blocks": ("mlp", "both", "mlp")},
    "attention + both + attention": {"blocks": ("attention", "both", "attention")},
}
START: dict[str, dict[str, Any]] = {BASE: {}, "without ⟨s⟩": {"start": False}}

COMPARISON_COLUMNS = (
    Column("arm", "category", "", "which settings"),
    Column("seed", "int32", "", "of weights and data"),
    *COLUMNS,
)


@dataclass(frozen=True)
class LogFit:
    """Least squares of Δlogit = slope · ln(step) + intercept.

    Attributes:
        slope, intercept: of the fit.
        r_squared: share of the variance that it explains.
        n: measured steps in it.
        since, until: first and last of them.
    """

    slope: float
    intercept: float
    r_squared: float
    n: int
    since: int
    until: int


def reinforcement(width: int) -> dict[str, dict[str, Any]]:
    """Arms that take one half of mutual reinforcement away.

    Args:
        width: of the model. PyTorch's initial weights make ‖W_O v‖ = √width / 3: each of the two maps takes a factor √3
            off the √width that LayerNorm gives.
    """
    initial = math.sqrt(width) / 3
    return {
        BASE: {},
        "⟨s⟩ hidden from later queries": {"see_start": False},
        "‖W_O v‖ of ⟨s⟩ held at 0": {"start_norm": 0.0},
        "‖W_O v‖ of ⟨s⟩ held at its initial size": {"start_norm": initial},
        "‖W_O v‖ of ⟨s⟩ held at 4 × its initial size": {"start_norm": 4 * initial},
    }


def compare_toys(
    arms: Mapping[str, Mapping[str, Any]],
    preset: str = "laptop",
    *,
    seeds: Sequence[int] = (0,),
    out: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    progress: bool = True,
    **common: Any,
) -> Result:
    """Trains every arm on every seed.

    Args:
        arms: name → settings that differ from the preset's.
        preset: "laptop" or "paper".
        seeds: of weights and data, the same for every arm.
        out: folder; each run is kept in `toy_folder(out, arm, seed)` and goes on from there.
        device, dtype, progress: as for `train_toy`.
        **common: settings that all arms share.

    Returns:
        The columns of `COMPARISON_COLUMNS`.

    Raises:
        InputError: no arm, no seed, or a setting that cannot be; checked before anything is trained.
    """
    import pandas as pd

    if not arms or not seeds:
        raise InputError(f"{len(arms)} arms and {len(seeds)} seeds; expected at least one of each")
    settings = {name: toy_settings(preset, **{**common, **changes}) for name, changes in arms.items()}
    frames = []
    for name, changes in arms.items():
        for seed in seeds:
            folder = None if out is None else toy_folder(out, name, seed)
            label = f"{name}, seed {seed}" if progress else False
            run = train_toy(
                preset, seed=seed, device=device, dtype=dtype, out=folder, progress=label, **{**common, **changes}
            )
            frames.append(run.frame.assign(arm=name, seed=seed))
    frame = pd.concat(frames, ignore_index=True)
    frame["arm"] = pd.Categorical(frame["arm"], list(arms))
    parameters = {"preset": preset, "seeds": list(seeds), "arms": {name: asdict(one) for name, one in settings.items()}}
    return Result("sinks.compare_toys", frame, COMPARISON_COLUMNS, Provenance.collect(parameters=parameters))


def toy_folder(out: str | os.PathLike[str], arm: str, seed: int) -> Path:
    """Where `compare_toys` keeps a run."""
    return Path(out) / f"{re.sub('[^a-z0-9]+', '-', arm.lower()).strip('-')}-seed-{seed}"


def summarise_toys(result: Result) -> pd.DataFrame:
    """One row per arm and seed, at the last step.

    Args:
        result: of `train_toy` or `compare_toys`.

    Returns:
        arm, seed, step; backcopy_risk; bigram_excess (risk − entropy over entropy); for the head with most mass on key
        0: its layer, mass and trigger_mass, value_norm at the start with its value_max over the run and that of others
        (value_others); peak (largest over blocks of ‖x‖ at the start over the median of the rest), peak_norm and
        peak_layer.
    """
    import pandas as pd

    frame = result.frame
    if "arm" not in frame:
        frame = frame.assign(arm="run", seed=result.provenance.seed)
    rows = []
    for (arm, seed), run in frame.groupby(["arm", "seed"], observed=True, sort=False):
        last = run[run["step"] == run["step"].max()]
        value = last.set_index(["quantity", "group", "layer", "head"])["value"]
        row = {"arm": arm, "seed": seed, "step": int(last["step"].iloc[0])}
        row["backcopy_risk"] = _only(last, "risk", "trigger")
        row["bigram_excess"] = _only(last, "risk", "bigram") / _only(last, "entropy", "bigram") - 1
        masses = last[(last["quantity"] == "sink_mass") & (last["group"] == "other")]
        if len(masses):
            sink = masses.loc[masses["value"].idxmax()]
            where = (sink["layer"], sink["head"])
            history = run[(run["quantity"] == "value_norm") & (run["group"] == "start")]
            history = history[(history["layer"] == where[0]) & (history["head"] == where[1])]["value"]
            row |= {"layer": int(where[0]), "mass": sink["value"]}
            row["trigger_mass"] = value.get(("sink_mass", "trigger", *where), math.nan)
            row |= {"value_norm": history.iloc[-1], "value_max": history.max()}
            row["value_others"] = value["value_norm", "other", where[0], where[1]]
        start = _by_layer(last, "residual_norm", "start")
        ratio = start / _by_layer(last, "residual_median", "rest")
        most = int(ratio.to_numpy().argmax())
        row |= {"peak": ratio.iloc[most], "peak_norm": start.iloc[most], "peak_layer": most}
        rows.append(row)
    return pd.DataFrame(rows)


def delta_logit_fit(
    result: Result, since: int, until: int | None = None, group: str = "other", layer: int = 0, head: int = 0
) -> LogFit:
    """How Δlogit grows with the logarithm of the step.

    Args:
        result: of `train_toy`, of one run.
        since: first step of the fit.
        until: last step of the fit; by default the run's.
        group: queries: "other" or "trigger".
        layer, head: which head.

    Raises:
        InputError: fewer than three measured steps from there on.
    """
    frame = result.frame
    chosen = (frame["quantity"] == "delta_logit") & (frame["group"] == group) & (frame["step"] >= max(1, since))
    chosen &= (frame["layer"] == layer) & (frame["head"] == head)
    if until is not None:
        chosen &= frame["step"] <= until
    steps, values = (frame.loc[chosen, name].to_numpy(dtype=np.float64) for name in ("step", "value"))
    if len(steps) < 3:
        raise InputError(f"{len(steps)} measured steps from {since} to {until or 'the end'}; a fit needs at least 3")
    slope, intercept = np.polyfit(np.log(steps), values, 1)
    left = values - slope * np.log(steps) - intercept
    explained = 1 - float((left**2).sum() / ((values - values.mean()) ** 2).sum())
    return LogFit(float(slope), float(intercept), explained, len(steps), int(steps[0]), int(steps[-1]))


def _only(last: pd.DataFrame, quantity: str, group: str) -> float:
    values = last.loc[(last["quantity"] == quantity) & (last["group"] == group), "value"]
    return float(values.iloc[0]) if len(values) else math.nan


def _by_layer(last: pd.DataFrame, quantity: str, group: str) -> pd.Series:
    return last[(last["quantity"] == quantity) & (last["group"] == group)].set_index("layer")["value"]
