"""The target on examples of which some tokens are replaced: every such input passes through the model once.

A *coalition* is the set of explained tokens that an input keeps; all others become the baseline. Occlusion, LIME, KernelSHAP and
Shapley values, and the curves of faithfulness, ask for the same coalitions again and again.

1. `Coalitions` encodes the examples once, asks the model for its prediction, and fixes what is explained.
2. `values` takes any number of coalitions of any number of examples. What is not known yet is computed in one go
   (`interp.agreement.prefix_tree`: shared beginnings once, batches across examples) and remembered.
3. `known` looks coalitions up.

Baselines: "mask" (the tokenizer's mask token), "pad" (its padding token), "zero" and "mean" (a vector of zeros, the mean
embedding), a token id, or the text of one token. Positions stay: a replaced token's neighbours do not move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.agreement.encoding import encode_examples
from interp.agreement.prefix_tree import (
    Embedder,
    Prefix,
    Readout,
    packs,
    prefix_cache,
    read_logits,
    shared_prefix,
)
from interp.agreement.targets import check_target, runner_up, target_values
from interp.agreement.tasks import Classifier, Continuation, Task, Verbalizer, class_names, default_task
from interp.architectures import stored_weight
from interp.errors import InputError
from interp.model import Model

VECTORS = ("zero", "mean")


class Coalitions:
    """Examples as games: the target for every set of tokens that is kept.

    Attributes:
        model, task, encoded: what is asked of whom.
        target, of: see `interp.agreement.targets`.
        wanted, contrast: per example, the explained class or token at each read, and the runner-up.
        predicted, probability: per example, the model's class (or token) and the explained one's probability.
        baseline, baseline_id, embedder: what replaces a token.
        asked, computed: per example, how many coalitions were asked for, and how many inputs went through the model.
    """

    def __init__(
        self,
        model: Model,
        examples: Sequence[Any],
        *,
        task: Task | None = None,
        target: str = "log_prob",
        of: str = "predicted",
        baseline: str | int | None = None,
        units: str = "tokens",
        special: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        check_target(target, of)
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"max_tokens={max_tokens}; expected at least 1 token in a batch")
        self.model = model
        self.task: Task = default_task(model) if task is None else task
        self.encoded = encode_examples(model, self.task, examples, units=units, special=special)
        self.target, self.of, self.units, self.special = target, of, units, special
        self.baseline, self.baseline_id, vector = resolve_baseline(model, baseline)
        self.embedder = Embedder(model, vector)
        self.max_tokens = max_tokens or (512 if model.device.type == "cpu" else 4096)
        choices = self.task.choices(model) if isinstance(self.task, Verbalizer) else None
        self._choices = choices
        self.asked = np.zeros(len(self.encoded), dtype=np.int64)
        self.computed = np.zeros(len(self.encoded), dtype=np.int64)
        self._kept: list[dict[bytes, float]] = [{} for _ in self.encoded]
        self._look()

    def readout(self, n_reads: int) -> Readout:
        """Which logits are read of examples with that many reads."""
        return Readout(n_reads, self._choices)

    @cached_property
    def prefix(self) -> Prefix:
        """What all examples begin with and is not explained, such as a few-shot prompt; nothing where it cannot be cached."""
        if not packs(self.model, max(len(one.ids) for one in self.encoded)):
            return Prefix((), ())
        shared = shared_prefix([one.ids for one in self.encoded], 1)
        length = min(shared, *(one.positions[0] for one in self.encoded))  # reads come after the first explained token
        return prefix_cache(self.model, self.encoded[0].ids[:length])

    def __len__(self) -> int:
        return len(self.encoded)

    def size(self, example: int) -> int:
        """How many tokens of an example are explained."""
        return len(self.encoded[example].positions)

    def full(self, example: int) -> float:
        """The target on the example as it is."""
        return float(self.known(example, np.ones((1, self.size(example)), dtype=bool))[0])

    def empty(self, example: int) -> float:
        """The target with every explained token replaced."""
        return float(self.known(example, np.zeros((1, self.size(example)), dtype=bool))[0])

    def values(
        self, wanted: Mapping[int, Bool[np.ndarray, "coalition token"]], progress: bool | str = False
    ) -> dict[int, Float[np.ndarray, " coalition"]]:
        """The target for coalitions of some examples.

        Args:
            wanted: {example: (coalition, token), True where a token is kept}.
            progress: a progress bar on stderr.
        """
        self.compute(wanted, progress)
        return {example: self.known(example, kept) for example, kept in wanted.items()}

    def compute(self, wanted: Mapping[int, Bool[np.ndarray, "coalition token"]], progress: bool | str = False) -> None:
        """Make coalitions known."""
        rows: list[tuple[int, bytes]] = []
        sequences: list[list[int]] = []
        for example, kept in wanted.items():
            kept = np.asarray(kept, dtype=bool)
            self.asked[example] += len(kept)
            seen = self._kept[example]
            for key, one in {mask.tobytes(): mask for mask in kept}.items():
                if key not in seen:
                    rows.append((example, key))
                    sequences.append(self.input(example, one))
                    self.computed[example] += 1
        by_reads: dict[int, list[int]] = {}
        for at, (example, _) in enumerate(rows):
            by_reads.setdefault(self.encoded[example].n_reads, []).append(at)
        for n_reads, chosen in by_reads.items():
            owners = [rows[at][0] for at in chosen]

            def reduce(logits: Tensor, some: Sequence[int], owners: list[int] = owners) -> Tensor:
                return self.reduce(logits, [owners[one] for one in some])

            found = read_logits(
                self.model,
                [sequences[at] for at in chosen],
                self.readout(n_reads),
                reduce,
                embedder=self.embedder,
                prefix=self.prefix,
                max_tokens=self.max_tokens,
                progress=progress,
            )
            for at, value in zip(chosen, found, strict=True):
                example, key = rows[at]
                self._kept[example][key] = float(value)

    def known(self, example: int, kept: Bool[np.ndarray, "coalition token"]) -> Float[np.ndarray, " coalition"]:
        """The target for coalitions that were computed.

        Raises:
            KeyError: one was not.
        """
        seen = self._kept[example]
        return np.array([seen[mask.tobytes()] for mask in np.asarray(kept, dtype=bool)])

    def reduce(self, logits: Tensor, examples: Sequence[int]) -> Tensor:
        """The target of each input from its logits; differentiable."""
        wanted, contrast = (
            torch.tensor([kind[example] for example in examples], device=logits.device)
            for kind in (self.wanted, self.contrast)
        )
        return target_values(logits, wanted, contrast, self.target)

    def input(self, example: int, kept: Bool[np.ndarray, " token"]) -> list[int]:
        """Token ids of an example of which some tokens are kept."""
        one = self.encoded[example]
        ids = list(one.ids)
        for position in np.array(one.positions)[~np.asarray(kept, dtype=bool)]:
            ids[position] = self.baseline_id
        return ids

    def about(self) -> list[dict[str, Any]]:
        """What is explained, one dictionary per example."""
        names = class_names(self.model, self.task)

        def named(at: int) -> str:
            return (
                names[at]
                if names
                else self.model.decode([at], skip_special_tokens=False)
                if self.model.tokenizer
                else str(at)
            )

        rows = []
        for example, one in enumerate(self.encoded):
            classes = isinstance(self.task, (Verbalizer, Classifier))
            gold = None if one.gold is None else "".join(named(at) for at in one.gold)
            rows.append(
                {
                    "text": one.text,
                    "label": gold,
                    "explained": "".join(named(at) for at in self.wanted[example]),
                    "predicted": named(int(self.predicted[example])) if classes or one.n_reads == 1 else None,
                    "probability": float(self.probability[example]),
                    "units": list(one.names),
                }
            )
        return rows

    def _look(self) -> None:
        """The model's prediction on the examples as they are, and the target there and on the baseline."""
        if self.of == "gold":
            for at, one in enumerate(self.encoded):
                if one.gold is None:
                    raise InputError(
                        f"example {at} has no label, and of='gold' explains the gold class; give (text, label)"
                    )
        count = len(self.encoded)
        self.wanted: list[list[int]] = [[] for _ in range(count)]
        self.contrast: list[list[int]] = [[] for _ in range(count)]
        self.predicted = np.full(count, -1)
        self.probability = np.full(count, np.nan)
        for n_reads in {one.n_reads for one in self.encoded}:
            chosen = [at for at, one in enumerate(self.encoded) if one.n_reads == n_reads]

            def look(logits: Tensor, some: Sequence[int], chosen: list[int] = chosen) -> Tensor:
                examples = [chosen[one] for one in some]
                for row, at in zip(logits, examples, strict=True):
                    best = row.argmax(-1)
                    gold = self.encoded[at].gold
                    fixed = self.of == "gold" or isinstance(self.task, Continuation)
                    wanted = torch.tensor(gold, device=row.device) if fixed and gold is not None else best
                    self.wanted[at] = wanted.tolist()
                    self.contrast[at] = runner_up(row[None], wanted[None])[0].tolist()
                    self.predicted[at] = int(best[0])
                    self.probability[at] = float(row.log_softmax(-1).gather(-1, wanted[:, None]).sum().exp())
                return self.reduce(logits, examples)

            found = read_logits(
                self.model,
                [self.encoded[at].ids for at in chosen],
                self.readout(n_reads),
                look,
                embedder=self.embedder,
                prefix=self.prefix,
                max_tokens=self.max_tokens,
            )
            for at, value in zip(chosen, found, strict=True):
                self._kept[at][np.ones(self.size(at), dtype=bool).tobytes()] = float(value)
        self.compute({at: np.zeros((1, self.size(at)), dtype=bool) for at in range(count)})
        self.asked[:] = 0
        self.computed[:] = 0


def resolve_baseline(model: Model, baseline: str | int | None) -> tuple[str, int, Tensor | None]:
    """What stands in for a token: its name, an id, and where the id is the vocabulary's size its vector.

    Args:
        model: what `load_model` gave.
        baseline: see the module docstring; by default the mask token, or the padding token where there is none.

    Raises:
        InputError: the tokenizer has no such token, or the text is not one token.
    """
    tokenizer, size = model.tokenizer, model.arch.vocab_size
    if baseline is None:
        baseline = "mask" if getattr(tokenizer, "mask_token_id", None) is not None else "pad"
    if isinstance(baseline, bool) or not isinstance(baseline, (str, int)):
        raise InputError(
            f"baseline={baseline!r}; expected 'mask', 'pad', 'zero', 'mean', a token id or one token's text"
        )
    if baseline in VECTORS:
        weight = stored_weight(model.arch.embedding(), "weight")
        if baseline == "zero":
            return baseline, size, torch.zeros(weight.shape[1], device=model.device, dtype=weight.dtype)
        embedded = model.arch.embedding()(torch.arange(size, device=model.device)).detach()
        return baseline, size, embedded.float().mean(0).to(weight.dtype)
    if isinstance(baseline, int):
        if not 0 <= baseline < size:
            raise InputError(f"baseline={baseline}; expected a token id from 0 to {size - 1}")
        return str(baseline), baseline, None
    if baseline == "pad":
        return baseline, model.pad_id, None
    if baseline == "mask":
        token = getattr(tokenizer, "mask_token_id", None)
        if token is None:
            raise InputError(f"the tokenizer of {model.name} has no mask token; use baseline='pad', 'mean' or a token")
        return baseline, int(token), None
    if tokenizer is None:
        raise InputError(f"baseline={baseline!r} is a text, and the model has no tokenizer; give a token id")
    ids = tokenizer(baseline, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(f"baseline={baseline!r} is {len(ids)} tokens; expected one, or 'mask', 'pad', 'zero', 'mean'")
    return baseline, int(ids[0]), None
