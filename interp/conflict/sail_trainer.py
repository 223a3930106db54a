"""A DPO trainer of trl whose loss is SAIL's, on token ids, reference and factors that were measured before.

1. The dataset holds token ids, ℓ_ref and c_t of every answer token; nothing is tokenised or templated again.
2. A step reads each prompt once for both answers (`interp.conflict.shared_prompts`) and takes `interp.conflict.sail_loss`. No
   reference model runs but for anchors (`interp.conflict.anchors`), and below the lowest trained layer autograd keeps nothing.
3. Modules stay in evaluation mode: dropout would make a policy that is still the base differ from its reference.
4. Checkpoints carry a mark that is written last; one without it was cut off by a kill and does not count.

Optimiser, schedule, checkpoints, resuming, early stopping and the best checkpoint are those of trl and transformers. Nothing is
reported to anyone, and nothing is written outside the run's folder.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import time
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from interp.batching import is_out_of_memory, pad
from interp.conflict.align_runs import MARK, AlignSettings, TrainingPlan, last_checkpoint
from interp.conflict.anchors import anchor_divergence, split_anchors
from interp.conflict.credits import CreditedPair
from interp.conflict.sail_loss import chosen_nll, sail_loss
from interp.conflict.shared_prompts import AnswerPairs, answer_log_probs, pad_pairs
from interp.errors import MemoryBudgetError
from interp.model import Model

__all__ = ["AlignSettings", "TrainingPlan", "build_trainer", "collate", "dataset_of", "train", "trainer_class"]


def dataset_of(pairs: Sequence[CreditedPair], anchors: Sequence[Sequence[int]] = ()) -> Any:
    """Credited pairs as a dataset in memory; the i-th has the i-th anchor, or the one that comes after as many rounds."""
    from datasets import Dataset

    rows = [
        {
            "prompt_ids": list(pair.preference.prompt),
            "chosen_ids": list(pair.preference.chosen),
            "rejected_ids": list(pair.preference.rejected),
            "chosen_reference": pair.chosen_reference.tolist(),
            "rejected_reference": pair.rejected_reference.tolist(),
            "chosen_factors": pair.chosen_factors.tolist(),
            "rejected_factors": pair.rejected_factors.tolist(),
            "anchor_ids": list(anchors[at % len(anchors)]) if anchors else [],
        }
        for at, pair in enumerate(pairs)
    ]
    return Dataset.from_list(rows)


def collate(rows: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """One batch: `AnswerPairs`' tensors, reference and factors of the same shape as the answers, and anchors if there are any."""
    prompts, first, second = ([row[f"{name}_ids"] for row in rows] for name in ("prompt", "chosen", "rejected"))
    pairs = pad_pairs(prompts, first, second, pad_id)
    batch: dict[str, Any] = dict(vars(pairs))
    for name in ("reference", "factors"):
        values = torch.zeros(pairs.answer_ids.shape)
        given = [row[f"{which}_{name}"] for which in ("chosen", "rejected") for row in rows]
        for at, some in enumerate(given):
            values[at, : len(some)] = torch.tensor(some)
        batch[name] = values
    anchors = [row["anchor_ids"] for row in rows]
    if all(anchors):
        padded = pad(anchors, range(len(anchors)), pad_id)
        batch |= {"anchor_ids": padded.input_ids, "anchor_mask": padded.mask}
    return batch


def build_trainer(
    model: Model, train: Sequence[CreditedPair], held: Sequence[CreditedPair], plan: TrainingPlan, folder: Path
) -> Any:
    """A trainer on the model itself, which gets its adapter in place: see `interp.conflict.adapters.left_as_it_was`.

    Args:
        model: the base.
        train, held: pairs of training and validation; the latter may be empty.
        plan: see there.
        folder: for checkpoints.
    """
    from peft import LoraConfig
    from transformers import PrinterCallback

    settings, every = plan.settings, plan.every
    on_cpu = model.device.type == "cpu"
    arguments = arguments_class()(
        output_dir=str(folder),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(settings.warmup * plan.n_steps),
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        max_steps=plan.n_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        activation_checkpointing=False,
        logging_steps=max(1, every // 4),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        eval_strategy="steps" if held else "no",
        eval_steps=every if held else None,
        load_best_model_at_end=bool(held),
        metric_for_best_model="eval_loss" if held else None,
        greater_is_better=False if held else None,
        restore_callback_states_from_checkpoint=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        bf16=False,
        fp16=not on_cpu and str(model.dtype) == "torch.float16",  # scales gradients that would vanish
        use_cpu=on_cpu,
        seed=plan.seed,
        beta=plan.beta,
        max_length=None,
        disable_dropout=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # no nn.DataParallel: the model lies where it is
    pad_id = model.pad_id
    anchors, held_anchors = split_anchors(plan.anchors, len(held))
    rank = max(plan.targets.values())
    lower = {re.escape(name): own for name, own in plan.targets.items() if own < rank}
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        rank_pattern=lower,
        lora_alpha=plan.lora_alpha,  # type: ignore[arg-type]
        alpha_pattern={name: plan.lora_alpha * own / rank for name, own in lower.items()},
        lora_dropout=0.0,
        target_modules=list(plan.targets),
        fan_in_fan_out=model.arch.family.transposed,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)  # peft reads an old name
        trainer = trainer_class()(
            model=model.hf,
            args=arguments,
            data_collator=lambda rows: collate(rows, pad_id),
            train_dataset=dataset_of(train, anchors),
            eval_dataset=dataset_of(held, held_anchors) if held else None,
            processing_class=copy.deepcopy(model.tokenizer),  # trl writes its pad token
            peft_config=lora,
        )
    trainer.likelihood, trainer.anchor_weight = plan.likelihood, plan.anchor_weight
    trainer.model.peft_config["default"].base_model_name_or_path = model.name
    trainer.processing_class = None  # not needed in every checkpoint
    trainer.accelerator.device_placement = False
    trainer.remove_callback(PrinterCallback)  # it prints to stdout
    return trainer


def train(
    trainer: Any, plan: TrainingPlan, *, callbacks: Sequence[Any] = (), description: str | None = None
) -> tuple[list[dict[str, Any]], int]:
    """Train to the end, from the last checkpoint if there is one.

    Args:
        trainer: of `build_trainer`.
        plan: the same.
        callbacks: of transformers.
        description: of the progress bar; none for no bar.

    Returns:
        (log entries, the step whose adapter the trainer now holds).

    Raises:
        MemoryBudgetError: a batch does not fit.
    """
    from transformers import EarlyStoppingCallback, TrainerState

    validated = trainer.eval_dataset is not None
    if validated:
        trainer.add_callback(EarlyStoppingCallback(plan.settings.patience))
    if description is not None:
        trainer.add_callback(progress_callback(description))
    for callback in callbacks:
        trainer.add_callback(callback)
    checkpoint = last_checkpoint(Path(trainer.args.output_dir))
    if checkpoint is not None:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        trainer.earlier_seconds = max((entry.get("seconds", 0.0) for entry in state["log_history"]), default=0.0)
        stopping = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {}).get("attributes", {})
        if stopping.get("early_stopping_patience_counter", 0) >= plan.settings.patience:
            # It had stopped when it was killed: transformers would take one step more before it saw that.
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            trainer._load_best_model()
            return trainer.state.log_history, int(trainer.state.best_global_step)
    trainer.started = time.perf_counter()
    noisy = logging.getLogger("transformers.trainer_utils")  # warns of file systems' clocks at every checkpoint
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryBudgetError(
            f"out of memory with batch_size={plan.settings.batch_size} pairs; use a smaller one with more "
            f"gradient_accumulation, in another folder"
        ) from error
    finally:
        noisy.setLevel(level)
    state = trainer.state
    return state.log_history, int((state.best_global_step if validated else None) or state.global_step)


@cache
def trainer_class() -> Any:
    """The trainer; made when it is needed, since trl takes seconds to import."""
    from transformers import Trainer
    from trl import DPOTrainer

    class SailTrainer(DPOTrainer):
        """See the module."""

        likelihood = anchor_weight = 0.0
        earlier_seconds = 0.0
        started = 0.0

        def _send_telemetry(self) -> None:
            pass

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
            training = self.model.training
            self.model.eval()
            try:
                home = self.model.get_input_embeddings().weight.device
                names = ("prompt_ids", "prompt_mask", "answer_ids", "answer_mask")
                pairs = AnswerPairs(*(inputs[name] for name in names)).to(home)
                log_probs = answer_log_probs(model, pairs)
                if "anchor_ids" in inputs:
                    anchors = (inputs[name].to(home) for name in ("anchor_ids", "anchor_mask"))
                    strayed = anchor_divergence(self.accelerator.unwrap_model(model), *anchors)
                else:
                    strayed = log_probs.new_zeros(len(pairs.prompt_ids))
            finally:
                self.model.train(training)
            there = log_probs.device
            losses = sail_loss(
                log_probs,
                inputs["reference"].to(there),
                inputs["factors"].to(there),
                pairs.answer_mask.to(there),
                self.beta,
            )
            margin = losses.chosen - losses.rejected
            unlikely = chosen_nll(log_probs, pairs.answer_mask.to(there))
            metrics = self._metrics["train" if training else "eval"]
            for name, values in (
                ("chosen_reward", losses.chosen),
                ("rejected_reward", losses.rejected),
                ("margin", margin),
                ("accuracy", (margin > 0).float()),
                ("chosen_nll", unlikely.detach()),
                ("anchor_kl", strayed.detach()),
            ):
                metrics[name].extend(values.tolist())  # by pair: a short last batch weighs less
            loss = (losses.loss + self.likelihood * unlikely + self.anchor_weight * strayed.to(there)).mean()
            return (loss, {}) if return_outputs else loss

        def floating_point_ops(self, inputs: dict[str, Any]) -> int:
            return 0  # transformers would look for input_ids, and warn

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            seconds = self.earlier_seconds + time.perf_counter() - self.started
            super().log({**logs, "seconds": seconds}, start_time)

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            # Not "auto": peft would ask a hub whether the vocabulary was resized.
            self.model.save_pretrained(output_dir or self.args.output_dir, save_embedding_layers=False)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            Trainer._save_checkpoint(self, model, trial)  # trl's would also write a model card
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            if folder.is_dir():
                (folder / MARK).write_text("")

    return SailTrainer


@cache
def arguments_class() -> Any:
    """trl's settings, with the model left on the device where it is."""
    from trl import DPOConfig

    class SailArguments(DPOConfig):
        """See the module."""

        @property
        def place_model_on_device(self) -> bool:
            return False

    return SailArguments


def progress_callback(description: str) -> Any:
    """A progress bar on stderr: steps, loss and what the validation says."""
    from tqdm.auto import tqdm
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """See the function."""

        bar: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=description, unit="step", leave=False
            )

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            shown = {"loss": "loss", "eval_loss": "validation loss", "eval_accuracy": "validation accuracy"}
            for name, value in (logs or {}).items():
                if name in shown and self.bar is not None:
                    self._shown = {**getattr(self, "_shown", {}), shown[name]: f"{value:.3f}"}
                    self.bar.set_postfix(self._shown)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.close()

    return Progress()
