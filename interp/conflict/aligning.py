"""SAIL: train low-rank adapters on the attention of a few layers, so that the system's rule wins a conflict.

Source: Wan et al., arXiv 2509.23188 (SAIL, and its released code): LoRA of rank 8 and α 16 without dropout on q, k, v, o of the
focal layers; β = 0.1, α = 0.5.

1. Reference log-probabilities and the credit of every answer token are measured once, on the base (`interp.conflict.credits`).
2. A DPO trainer minimises the credited loss (`interp.conflict.sail_trainer`, `sail_loss`); the base's weights do not move.
3. Every few steps the validation pairs are scored and a checkpoint is written. Training ends after `patience` scores without a
   better loss, and the best checkpoint counts.
4. The adapter is written in peft's format, and the module is again what it was (`interp.conflict.adapters`).

    out/
    ├── run.json              which run the folder belongs to; another one is refused
    ├── measured/             log-probabilities of the base and the reward model
    ├── checkpoints/          to go on after a kill: call again with the same arguments
    ├── adapter/              the result
    └── history.parquet       the history; written last
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from interp.conflict.adapters import left_as_it_was, require_peft, save_adapter
from interp.conflict.align_runs import (
    ADAPTER,
    CHECKPOINTS,
    HISTORY,
    HISTORY_COLUMNS,
    MEASURED,
    AlignSettings,
    TrainingPlan,
    history_frame,
    open_run,
)
from interp.conflict.anchors import ANCHOR_WEIGHT, encode_anchors
from interp.conflict.credits import Head, RewardModel, credit_pairs
from interp.conflict.layer_arms import attention_projections, layer_ranks, lora_parameters
from interp.conflict.preference_table import Preference, read_preferences, tokenizer_hash
from interp.conflict.sail_loss import check_credit
from interp.conflict.sail_trainer import build_trainer, train
from interp.errors import InputError, ResultError
from interp.model import Model
from interp.provenance import Provenance
from interp.results import Result

KIND = "conflict.align"
PRESETS = {
    # SmolLM2-135M, all layers, float32, two threads of a server's CPU: 1.4 s per pair and epoch with anchors. All of
    # `interp conflict align`, from the families that are followed to held-out answers, took 23 minutes for 288 pairs of prompts.
    "laptop": AlignSettings(),
    "gpu": AlignSettings(
        learning_rate=2e-4, epochs=3.0, batch_size=16, gradient_accumulation=1, evaluations=12, patience=3
    ),
}


def align(
    model: Model,
    preferences: Result | Sequence[Preference],
    layers: Iterable[int],
    *,
    out: str | Path,
    validation: Result | Sequence[Preference] | None = None,
    heads: Sequence[Head] | None = None,
    credit: str = "reward",
    alpha: float = 0.5,
    beta: float = 0.1,
    likelihood: float = 0.0,
    anchors: Sequence[str] = (),
    anchor_weight: float = ANCHOR_WEIGHT,
    reward_model: Model | RewardModel | None = None,
    rank: int | Sequence[int] = 8,
    lora_alpha: float = 16.0,
    preset: str = "laptop",
    learning_rate: float | None = None,
    epochs: float | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    gradient_accumulation: int | None = None,
    patience: int | None = None,
    checkpoint_steps: int | None = None,
    measured: str | Path | None = None,
    seed: int = 0,
    max_tokens: int = 4096,
    callbacks: Sequence[Any] = (),
    progress: bool | str = True,
) -> Result:
    """Train an adapter on some layers' attention and write it to `out/adapter`.

    Args:
        model: a causal LM; it is the base and the reference, and the same afterwards.
        preferences: what `make_preferences` gave, or examples of your own.
        layers: whose attention is trained; negative ones count from the end. For comparisons at equal size see
            `interp.conflict.layer_arms.arms`.
        out: the run's folder. A run that was killed goes on from its last checkpoint; one that has ended is read.
        validation: pairs of other tasks; without any, the last step counts and nothing stops early.
        heads: focal heads, for credit "attention".
        credit: "reward" (released loss), "attention" (the abstract's), or "none" (plain DPO).
        alpha, beta: of the loss.
        likelihood: weight of the chosen answer's own loss per token beside it, see `interp.conflict.sail_loss.chosen_nll`; 0
            in the published loss.
        anchors: ordinary texts whose next tokens are to be predicted as before, see `interp.conflict.anchors`; the first 48
            tokens of each, one for each pair in turn, and up to a fifth of them for the validation alone. None in the published
            loss.
        anchor_weight: weight of the divergence on them, per nat and token.
        reward_model: of credit "reward", see `interp.conflict.credits`.
        rank: of LoRA; one number, or one for each layer in ascending order.
        lora_alpha: of LoRA; the scale of all layers is lora_alpha / the highest rank.
        preset: "laptop" or "gpu": an `AlignSettings`; the next arguments change one of its entries.
        learning_rate, epochs, batch_size, gradient_accumulation, patience: see `AlignSettings`.
        max_steps: optimiser steps, instead of epochs.
        checkpoint_steps: steps between validations and checkpoints.
        measured: a folder for log-probabilities that do not depend on the layers, which several runs can share; by default within
            `out`.
        seed: of the adapter's first values and of the order of pairs.
        max_tokens: budget of padded tokens while credits are measured.
        callbacks: of transformers, for the trainer.
        progress: progress bars on stderr; a string is their description.

    Returns:
        A `Result` of kind "conflict.align" with `HISTORY_COLUMNS`. Attachments: adapter (folder within `out`), layers, n_pairs,
        n_validation, trainable, trainable_share, best_step, n_steps (of the whole schedule), stopped_early, smallest_factor.

    Raises:
        InputError: an encoder, no layer, pairs of another tokenizer, an unknown preset or credit, settings out of range.
        ResourceError: peft or trl is not installed.
        ResultError: the folder holds another run, or the loss is not finite.
        MemoryBudgetError: a batch does not fit.

    Example:
        >>> history = align(model, made, [12, 13, 14], out="run", validation=held)             # doctest: +SKIP
        >>> after = load_adapter(model, "run/adapter")                                         # doctest: +SKIP
    """
    start = time.perf_counter()
    changes = {
        "learning_rate": learning_rate,
        "epochs": epochs,
        "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation,
        "patience": patience,
    }
    layers = list(layers)
    settings = check_settings(
        model,
        layers,
        credit=credit,
        alpha=alpha,
        beta=beta,
        likelihood=likelihood,
        anchor_weight=anchor_weight,
        rank=rank,
        preset=preset,
        **changes,
    )
    ranks = layer_ranks(model, layers, rank)
    chosen = list(ranks)
    targets = {name: own for layer, own in ranks.items() for name in attention_projections(model, [layer])}
    train_pairs = _examples(model, preferences, "preferences")
    held_pairs = [] if validation is None else _examples(model, validation, "validation")
    shared = {item.prompt for item in train_pairs} & {item.prompt for item in held_pairs}
    if shared:
        raise InputError(f"{len(shared)} prompts are both in preferences and in validation; split by task")
    n_steps = _n_steps(settings, max_steps, len(train_pairs))
    every = checkpoint_steps or max(1, math.ceil(n_steps / settings.evaluations))
    kept = tuple(encode_anchors(model, anchors))
    plan = TrainingPlan(settings, targets, lora_alpha, beta, likelihood, kept, anchor_weight, n_steps, every, seed)
    parameters = {
        "layers": list(chosen),
        "heads": None if heads is None else [list(head) for head in heads],
        "credit": credit,
        "alpha": alpha,
        "beta": beta,
        "likelihood": likelihood,
        "anchors": hashlib.sha256(repr(kept).encode()).hexdigest()[:16] if kept else None,
        "anchor_weight": anchor_weight if kept else None,
        "reward_model": _named(reward_model),
        "rank": rank if isinstance(rank, int) else list(rank),
        "lora_alpha": lora_alpha,
        "settings": dataclasses.asdict(settings),
        "n_steps": n_steps,
        "checkpoint_steps": every,
        "n_pairs": len(train_pairs),
        "n_validation": len(held_pairs),
        "pairs": _digest(train_pairs),
        "validation": _digest(held_pairs),
    }
    provenance = Provenance.collect(model, seed=seed, parameters=parameters)
    if credit == "attention" and not heads:
        raise InputError("credit='attention' needs the focal heads: give heads, (layer, head) pairs")
    folder = Path(out).absolute()
    done = open_run(folder, provenance)
    if done is not None:
        return done
    measure = partial(
        credit_pairs,
        model,
        credit=credit,
        heads=heads,
        alpha=alpha,
        beta=beta,
        reward_model=reward_model,
        max_tokens=max_tokens,
        folder=folder / MEASURED if measured is None else measured,
        progress=progress,
    )
    credited, credited_held = measure(train_pairs), measure(held_pairs) if held_pairs else []
    trainable = lora_parameters(model, chosen, rank)
    total = sum(parameter.numel() for parameter in model.hf.parameters())
    attachments: dict[str, Any] = {
        "adapter": ADAPTER,
        "layers": list(chosen),
        "n_pairs": len(train_pairs),
        "n_validation": len(held_pairs),
        "trainable": trainable,
        "trainable_share": trainable / total,
        "n_steps": n_steps,
        "smallest_factor": min(
            float(part.min()) for pair in credited for part in (pair.chosen_factors, pair.rejected_factors)
        ),
    }
    named = progress if isinstance(progress, str) else f"align, {100 * trainable / total:.2f} % trainable"
    # The module comes back as it was also when the training is interrupted.
    with left_as_it_was(model):
        trainer = build_trainer(model, credited, credited_held, plan, folder / CHECKPOINTS)
        entries, best = train(trainer, plan, callbacks=callbacks, description=named if progress else None)
        history = history_frame(entries)
        if not np.isfinite(history["loss"]).all():
            raise ResultError("the loss is not finite: use a smaller learning_rate, and a new folder")
        attachments |= {"best_step": best, "stopped_early": bool(trainer.state.global_step < n_steps)}
        provenance = dataclasses.replace(provenance, wall_time=time.perf_counter() - start)
        record = provenance.to_json() | {"attachments": attachments}
        record["versions"] |= {name: version(name) for name in ("peft", "trl", "accelerate")}
        save_adapter(trainer.model, folder / ADAPTER, record)
    result = Result(KIND, history, HISTORY_COLUMNS, provenance, attachments)
    result.save(folder / HISTORY)
    return result


def check_settings(
    model: Model,
    layers: Sequence[int] | None = None,
    *,
    credit: str = "reward",
    alpha: float = 0.5,
    beta: float = 0.1,
    likelihood: float = 0.0,
    anchor_weight: float = ANCHOR_WEIGHT,
    rank: int | Sequence[int] = 8,
    preset: str = "laptop",
    **changes: Any,
) -> AlignSettings:
    """What `align` refuses before it looks at any pair: for runs that make their pairs first.

    Args:
        model, credit, alpha, beta, likelihood, anchor_weight, rank, preset: as `align`.
        layers: as `align`; `None` where they are not known yet.
        changes: learning_rate, epochs, batch_size, gradient_accumulation, patience; `None` leaves the preset's.

    Returns:
        The preset with the changes.

    Raises:
        InputError, ResourceError: as `align`.
    """
    require_peft()
    if preset not in PRESETS:
        raise InputError(f"preset={preset!r}; expected one of {', '.join(PRESETS)}")
    settings = dataclasses.replace(
        PRESETS[preset], **{name: value for name, value in changes.items() if value is not None}
    )
    for name in ("learning_rate", "epochs", "batch_size", "gradient_accumulation", "patience"):
        if not 0 < getattr(settings, name) < float("inf"):
            raise InputError(f"{name}={getattr(settings, name)}; expected a number above 0")
    check_credit(credit, alpha, beta)
    for name, weight in (("likelihood", likelihood), ("anchor_weight", anchor_weight)):
        if not 0 <= weight < float("inf"):
            raise InputError(f"{name}={weight}; expected a number of at least 0")
    if layers is None:  # as many as there are ranks
        layers = range(1 if isinstance(rank, int) else len(rank))
    attention_projections(model, layer_ranks(model, layers, rank))
    return settings


def _examples(model: Model, given: Result | Sequence[Preference], what: str) -> list[Preference]:
    made_with = given.attachments.get("tokenizer") if isinstance(given, Result) else None
    if made_with is not None and (model.tokenizer is None or made_with != tokenizer_hash(model)):
        raise InputError(
            f"{what} were made with another tokenizer than that of {model.name}; make them with this model"
        )
    examples = read_preferences(given) if isinstance(given, Result) else list(given)
    if not examples or not all(isinstance(item, Preference) for item in examples):
        raise InputError(f"{what}: expected what make_preferences gave, or at least one Preference")
    limit = model.arch.n_positions
    for item in examples:
        ids = (*item.prompt, *item.chosen, *item.rejected, *item.clear)
        if not (item.prompt and item.chosen and item.rejected and item.clear):
            raise InputError(f"{what}: {item.id!r} has an empty prompt or answer; expected at least one token of each")
        if not 0 <= min(ids) <= max(ids) < model.arch.vocab_size:
            raise InputError(f"{what}: {item.id!r} has token ids outside the vocabulary of {model.arch.vocab_size}")
        longest = max(len(item.prompt), len(item.clear)) + max(len(item.chosen), len(item.rejected))
        if limit is not None and longest > limit:
            raise InputError(f"{what}: {item.id!r} has {longest} tokens; the model's context is {limit} tokens")
    return examples


def _n_steps(settings: AlignSettings, max_steps: int | None, n_pairs: int) -> int:
    if max_steps is not None:
        if max_steps < 1:
            raise InputError(f"max_steps={max_steps}; expected at least 1")
        return max_steps
    batches = math.ceil(n_pairs / settings.batch_size)
    return math.ceil(settings.epochs * math.ceil(batches / settings.gradient_accumulation))


def _named(reward_model: Any) -> str | None:
    if reward_model is None:
        return None
    if isinstance(reward_model, Model):
        return f"{reward_model.name} {reward_model.fingerprint}"
    return getattr(reward_model, "__qualname__", type(reward_model).__name__)


def _digest(examples: Sequence[Preference]) -> str:
    text = repr([dataclasses.astuple(item)[1:] for item in examples])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
