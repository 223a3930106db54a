"""Train the toy model and record how its sinks, drains and peaks come about.

Guo et al. 2024 (arXiv 2410.13835), sections 2 and 3.

1. A preset says everything: model, task, optimizer, steps (`bigram_settings`). Any field can be changed.
2. Every step's sequences are drawn with a seed made of the run's seed and the step, so nothing about the data has to be
   kept.
3. At log-spaced steps `bigram_dynamics.measure` is run on a fixed sample and its rows are written as one shard. Then,
   and every 20 seconds, weights and optimizer state are written as safetensors, whole or not at all.
4. Who starts the same run in the same folder goes on from there. On a CPU (with as many threads) the result is bit for
   bit that of a run that was never interrupted, whether it ended by Ctrl-C, kill -9 or a power cut.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from interp.atomic import write_atomically
from interp.columns import Column
from interp.errors import ResultError
from interp.provenance import Provenance
from interp.results import Result
from interp.shards import ShardedRun
from interp.sinks.bigram_dynamics import MEASURES, measure
from interp.sinks.bigram_model import ToyModel
from interp.sinks.bigram_settings import ToySettings, toy_settings
from interp.sources import find_device, find_dtype

KIND = "sinks.train_toy"
CHECKPOINT = "checkpoint.safetensors"
COLUMNS = (Column("step", "int32", "optimizer steps", "how many were taken before this was measured"), *MEASURES)
_SECONDS = 20.0  # between checkpoints where nothing is measured
_EVALUATION = 20_241_013_835  # seed of the sample that is measured, the same for every run; no run's step has it


def train_toy(
    preset: str = "laptop",
    *,
    layers: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool | str = True,
    **changes: Any,
) -> Result:
    """Trains one model on Bigram-Backcopy.

    Args:
        preset: "laptop" or "paper".
        layers: that many blocks with attention and MLP; short for `blocks`.
        seed: of weights and data.
        device: by default the GPU if there is one.
        dtype: of the weights; float32 unless there is a reason. Softmax and losses are float32 in any case.
        out: folder for measurements and checkpoint; by default nothing is kept but the result. `load_toy` reads the
            model from it.
        resume: go on with what is in `out`; False: refuse a folder that is not empty.
        progress: a progress bar on stderr; a string is its description.
        **changes: other values for fields of `ToySettings`.

    Returns:
        Rows of `COLUMNS`, one block per measured step.

    Raises:
        InputError: an unknown preset or field, or a value that cannot be.
        ResultError: `out` holds another run, or anything else.

    Source:
        Guo et al. 2024, arXiv 2410.13835, sections 2 and 3.
    """
    settings = toy_settings(preset, layers=layers, **changes)
    place, kind = find_device(device), find_dtype(dtype)
    with contextlib.ExitStack() as stack:
        folder = Path(out if out is not None else stack.enter_context(tempfile.TemporaryDirectory()))
        if not resume and folder.is_dir() and any(folder.iterdir()):
            raise ResultError(f"{folder} is not empty: give resume=True to go on with it, or choose another folder")
        provenance = replace(
            Provenance.collect(seed=seed, parameters={"preset": preset, **asdict(settings)}),
            model="Bigram-Backcopy transformer",
            fingerprint="trained from its seed",
            dtype=str(kind).removeprefix("torch."),
            attention=settings.attention,
            device=str(place),
        )
        units = {f"step-{step}": step for step in measured_steps(settings.steps)}
        run = ShardedRun(folder, KIND, COLUMNS, provenance, list(units))
        missing = {units[unit] for unit in run.missing()}
        if missing:
            _train(run, settings, seed, place, kind, missing, progress)
        return run.finish()


def load_toy(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> tuple[ToyModel, ToySettings]:
    """The model as it was at the last checkpoint of a run, and the run's settings.

    Args:
        folder: `out` of `train_toy`.
        device: where to.

    Raises:
        ResultError: there is no checkpoint, or it is damaged.
    """
    saved = _read_checkpoint(Path(folder) / CHECKPOINT)
    if saved is None:
        raise ResultError(
            f"{folder} holds no checkpoint of a toy model that can be read: train it with train_toy(out=…)"
        )
    tensors, about = saved
    try:
        settings = ToySettings(**{**about["settings"], "blocks": tuple(about["settings"]["blocks"])})
        model = ToyModel(settings.shape)
        model.load_state_dict(_under("model.", tensors))
    except (TypeError, KeyError, RuntimeError) as error:
        raise ResultError(f"the checkpoint in {folder} is of another version of interp: train it again") from error
    return model.to(device, next(iter(tensors.values())).dtype).eval(), settings


def measured_steps(steps: int) -> list[int]:
    """0, then ten per decade, then the last.

    Example:
        >>> measured_steps(20)
        [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20]
    """
    spaced = {round(10 ** (tenth / 10)) for tenth in range(100)}
    return sorted({0, *(step for step in spaced if step < steps), steps})


def evaluation_sample(settings: ToySettings, device: str | torch.device = "cpu") -> Tensor:
    """(sequence, position) the sequences that every run of these settings is measured on."""
    return settings.task.sample(settings.sample, settings.length, seed=_EVALUATION, device="cpu").to(device)


def _train(
    run: ShardedRun,
    settings: ToySettings,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    missing: set[int],
    progress: bool | str,
) -> None:
    """Takes every step that is not behind the checkpoint, and measures where a shard is missing."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = ToyModel(settings.shape)  # on the CPU, so that every device starts from the same weights
    model.to(device, dtype)
    optimizer = _optimizer(model, settings)
    path = run.folder / CHECKPOINT
    start = _restore(path, model, optimizer, missing)
    task, sample = settings.task, evaluation_sample(settings, device)
    saved_at = time.monotonic()
    label = progress if isinstance(progress, str) else f"toy, {len(settings.blocks)} block(s), {settings.optimizer}"
    with tqdm(total=settings.steps, initial=start, desc=label, unit="step", disable=not progress, leave=False) as bar:
        for step in range(start, settings.steps + 1):
            if step in missing:
                model.eval()
                run.write(f"step-{step}", measure(model, task, sample).assign(step=step))
            if step in missing or step == settings.steps or time.monotonic() - saved_at > _SECONDS:
                _write_checkpoint(path, model, optimizer, settings, step)
                saved_at = time.monotonic()
            if step == settings.steps:
                break
            loss = _take_step(model, optimizer, settings, seed, step, device)
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def _take_step(
    model: ToyModel,
    optimizer: torch.optim.Optimizer,
    settings: ToySettings,
    seed: int,
    step: int,
    device: torch.device,
) -> Tensor:
    """One step on fresh sequences; gives the loss in nats."""
    words = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    tokens = settings.task.sample(
        settings.batch, settings.length + 1, seed=int(words[0] >> np.uint64(1)), device=device
    )
    for group in optimizer.param_groups:
        group["lr"] = _rate(settings, step)
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def _rate(settings: ToySettings, step: int) -> float:
    """Learning rate of a step: rises over the warm-up, falls over the cooldown."""
    rate = settings.adamw_rate if settings.optimizer == "adamw" else settings.sgd_rate
    cooldown = min(settings.cooldown, settings.steps // 2)
    return rate * min(1.0, (step + 1) / (settings.warmup + 1), (settings.steps - step) / (cooldown + 1))


def _optimizer(model: ToyModel, settings: ToySettings) -> torch.optim.Optimizer:
    decay = settings.weight_decay
    if settings.optimizer == "adamw":
        betas = (0.9, settings.beta2)
        return torch.optim.AdamW(model.parameters(), settings.adamw_rate, betas=betas, weight_decay=decay)
    return torch.optim.SGD(model.parameters(), settings.sgd_rate, momentum=0.9, weight_decay=decay)


def _write_checkpoint(
    path: Path, model: ToyModel, optimizer: torch.optim.Optimizer, settings: ToySettings, step: int
) -> None:
    from safetensors.torch import save

    tensors = {f"model.{name}": value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value.cpu().contiguous() for name, value in state.items()}
    content = save(tensors, {"interp": json.dumps({"step": step, "settings": asdict(settings)})})
    write_atomically(path, lambda file: file.write(content))


def _restore(path: Path, model: ToyModel, optimizer: torch.optim.Optimizer, missing: set[int]) -> int:
    """Puts the last checkpoint into model and optimizer; gives the number of steps that are behind it.

    A measurement before it that is missing can only be made again from the beginning.
    """
    saved = _read_checkpoint(path)
    if saved is None or saved[1]["step"] > min(missing):
        return 0
    tensors, about = saved
    model.load_state_dict(_under("model.", tensors))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _under("optimizer.", tensors).items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(about["step"])


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and what was written about them; None if there is none that can be read."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["interp"])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        print(f"interp: {path.name} cannot be read ({type(error).__name__}): starting again", file=sys.stderr)
        return None


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(_strip(prefix, tensors))


def _strip(prefix: str, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in tensors.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), value
