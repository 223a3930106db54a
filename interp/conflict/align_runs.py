"""A run of `align`: its settings, its folder, where it can go on, and the history that it ends with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from interp.atomic import remove_stale, write_atomically
from interp.conflict.adapters import read_adapter
from interp.errors import ResourceError, ResultError
from interp.provenance import Provenance
from interp.results import Column, Result, load_result

HISTORY_COLUMNS = (
    Column("step", "int32", "steps", "optimiser steps so far"),
    Column("epoch", "float64", "epochs", "passes over the pairs so far"),
    Column("split", "category", "", "train: mean since the row before; validation: all validation pairs"),
    Column(
        "loss",
        "float64",
        "nats",
        "what is minimised: −log σ(margin), mean over pairs, log 2 at the start; and the weighted chosen_nll and anchor_kl",
    ),
    Column(
        "margin", "float64", "nats", "credited reward of the chosen answer minus that of the rejected, mean over pairs"
    ),
    Column("accuracy", "float64", "share", "of pairs with a margin above 0"),
    Column("chosen_reward", "float64", "nats", "β Σ c_t d_t of the chosen answer"),
    Column(
        "chosen_nll", "float64", "nats", "negative log-probability of a token of the chosen answer, mean over pairs"
    ),
    Column(
        "anchor_kl", "float64", "nats", "KL(base ‖ policy) of a token of the anchors, mean over them; 0 without any"
    ),
    Column("rejected_reward", "float64", "nats", "the same of the rejected answer"),
    Column("learning_rate", "float64", "", "of the step; missing for validation"),
    Column("grad_norm", "float64", "", "of the step, before clipping; missing for validation"),
    Column("seconds", "float64", "seconds", "of training so far, those before a kill included"),
)
RUN, HISTORY, ADAPTER, CHECKPOINTS, MEASURED = "run.json", "history.parquet", "adapter", "checkpoints", "measured"
# Written last into a checkpoint.
MARK = "complete"


@dataclass(frozen=True)
class AlignSettings:
    """How to train, whatever the layers.

    Attributes:
        learning_rate: highest one; a linear schedule with a warm-up.
        epochs: passes over the pairs; in a second one the embedded model learns them by heart.
        batch_size: pairs per forward pass.
        gradient_accumulation: forward passes per optimiser step.
        evaluations: how often a run is validated and saved, where `checkpoint_steps` does not say.
        patience: validations without a better loss before the training ends.
        warmup: share of the steps.
        max_grad_norm: where gradients are clipped.
    """

    learning_rate: float = 2e-3
    epochs: float = 1.0
    batch_size: int = 4
    gradient_accumulation: int = 1
    evaluations: int = 5
    patience: int = 3
    warmup: float = 0.1
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class TrainingPlan:
    """What is trained, and how long.

    Attributes:
        settings: see there.
        targets: {full name of a matrix that gets an adapter: LoRA's rank}.
        lora_alpha: of LoRA, for the highest rank; all have its scale.
        beta: of the loss.
        likelihood: weight of the chosen answer's own loss beside it.
        anchors: token ids of ordinary texts, one for each pair in turn.
        anchor_weight: weight of the divergence from the base on them.
        n_steps: optimiser steps.
        every: steps between validations and checkpoints.
        seed: of the adapter's first values and of the order of pairs.
    """

    settings: AlignSettings
    targets: Mapping[str, int]
    lora_alpha: float
    beta: float
    likelihood: float
    anchors: tuple[tuple[int, ...], ...]
    anchor_weight: float
    n_steps: int
    every: int
    seed: int


def open_run(folder: Path, provenance: Provenance) -> Result | None:
    """Claims a folder for a run; gives the result if the run has ended.

    Raises:
        ResultError: it holds another run, or files that are not ours.
        ResourceError: it cannot be used.
    """
    identity = {
        "fingerprint": provenance.fingerprint,
        "dtype": provenance.dtype,
        "device": (provenance.device or "").split(":")[0],
        "seed": provenance.seed,
        **provenance.parameters,
    }
    path = folder / RUN
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder)
        occupied = sorted(item.name for item in folder.iterdir() if not item.name.startswith("."))
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise ResourceError(f"cannot use the folder {folder}: {error}; choose another folder") from error
    if there is None:
        if occupied:
            raise ResultError(
                f"{folder} holds other files ({', '.join(occupied[:3])}): choose an empty or a new folder"
            )
        text = json.dumps(identity, indent=1) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))
        return None
    if not isinstance(there, dict):
        raise ResultError(f"{path} is damaged; choose another folder")
    for name, here in identity.items():
        if there.get(name) != here:
            raise ResultError(
                f"{folder} holds another run: {name} is {there.get(name)!r:.80} there and {here!r:.80} here. Choose another"
            )
    if not (folder / HISTORY).exists():
        return None
    read_adapter(folder / ADAPTER)
    return load_result(folder / HISTORY)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole; those that were not are removed."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if not (path / MARK).exists():
            shutil.rmtree(path, ignore_errors=True)
        elif number.isdigit():
            whole.append((int(number), path))
    return max(whole)[1] if whole else None


def history_frame(entries: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Rows of `HISTORY_COLUMNS` from what a trainer logged."""
    rows = []
    for entry in entries:
        split, prefix = ("validation", "eval_") if "eval_loss" in entry else ("train", "")
        if f"{prefix}loss" not in entry:
            continue
        names = ("loss", "margin", "accuracy", "chosen_reward", "rejected_reward", "chosen_nll", "anchor_kl")
        row = {name: float(entry[prefix + name]) for name in names}
        row |= {name: float(entry.get(name, "nan")) for name in ("learning_rate", "grad_norm")}
        rows.append(
            {"step": entry["step"], "epoch": entry["epoch"], "split": split, "seconds": entry["seconds"], **row}
        )
    frame = pd.DataFrame(rows)
    return frame.assign(split=pd.Categorical(frame["split"], categories=["train", "validation"]))
