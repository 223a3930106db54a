"""A causal language model as judge: the expected score under its own probabilities, without any parsing.

1. The judge's prompt is the rubric, then role, task and answer, then the question about one dimension, then "Score:".
   Keys and values of what prompts share are computed once: the rubric's for all answers that are graded by it, an
   answer's for its four questions.
2. The score is E = Σ_k k·p(k) / Σ_k p(k) over the tokens "1" … "5" at the next position (the weighting of G-Eval, Liu
   et al. 2023, section 2, with exact probabilities for sampled ones). Σ_k p(k) is reported as `mass`: a judge that
   wants to say something else shows there.
3. Batches by token budget, halved when memory runs out. The fixed rubric is the default; a written one asks the model
   for one sentence per dimension and level.

A model that judges its own answers may favour them; and an answer may hold instructions to its judge
(`interp.conflict.judge_prompts`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.batching import Batch, for_each_batch, pad, token_batches
from interp.conflict.dialogues import Turn, render
from interp.conflict.judge_prompts import grading, material, one_dimension, one_level
from interp.conflict.judges import RoleQuery, Score, Scores
from interp.conflict.rubrics import DIMENSIONS, LEVELS, TEMPLATE, Rubric
from interp.errors import InputError
from interp.model import Model

RUBRICS = ("template", "written")
_CUE = "Score:"
_WORTH = 3  # answers under one rubric
_WRITTEN = 40  # tokens of one line of a written rubric


@dataclass(eq=False, repr=False)
class LocalJudge:
    """A causal LM as judge; see the module.

    Attributes:
        model: any causal LM with a fast tokenizer in which "1" … "5" are single tokens.
        rubric: "template" (the fixed text), or "written" by the model.
        template: a chat template or the name of one (`interp.conflict.dialogues.TEMPLATES`); by default the
            tokenizer's own, and "plain" where it has none.
        max_tokens: budget of padded tokens in a batch.
        chunk: answers per unit of work.
        label: name of the judge; by default the model's.

    Raises:
        InputError: an encoder, no tokenizer, scores that are not single tokens, an unknown rubric.

    Example:
        >>> judge = LocalJudge(load_model())                                             # doctest: +SKIP
        >>> cras(judge, queries_from_follow(answers, pairs))                            # doctest: +SKIP
    """

    model: Model
    rubric: str = "template"
    template: str | None = None
    max_tokens: int = 4096
    chunk: int = 64
    label: str = ""

    def __post_init__(self) -> None:
        if self.rubric not in RUBRICS:
            raise InputError(f"rubric={self.rubric!r}; expected one of {', '.join(RUBRICS)}")
        if self.chunk < 1:
            raise InputError(f"chunk={self.chunk}; expected at least 1 answer")
        if not self.model.arch.family.decoder:
            raise InputError(f"{self.model.name} is an encoder: it cannot judge by its next token; give a causal LM")
        if self.model.tokenizer is None:
            raise InputError(f"{self.model.name} has no tokenizer; give one to load_model")
        self.cue, self.digits  # noqa: B018 - refuse now and not after the rubrics

    @property
    def name(self) -> str:
        """ "local:" and the model's name."""
        return self.label or f"local:{self.model.name}"

    @property
    def writes_rubrics(self) -> bool:
        """Whether the model writes them."""
        return self.rubric == "written"

    def about(self) -> dict[str, Any]:
        """Model, rubric and template."""
        return {
            "kind": "local",
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "rubric": self.rubric,
            "template": self._template,
        }

    @cached_property
    def _template(self) -> str | None:
        return self.template or (None if getattr(self.model.tokenizer, "chat_template", None) else "plain")

    @cached_property
    def _special(self) -> tuple[str, ...]:
        """What in an answer would become a special token."""
        return tuple(str(token) for token in self.model.tokenizer.get_added_vocab())

    @cached_property
    def cue(self) -> str:
        """What stands before the score: "Score:", or "Score: " where a space and a digit are not one token."""
        return self._cue_and_digits[0]

    @cached_property
    def digits(self) -> tuple[int, ...]:
        """Token ids of the scores 1 … 5 behind the cue."""
        return self._cue_and_digits[1]

    @cached_property
    def _cue_and_digits(self) -> tuple[str, tuple[int, ...]]:
        for cue, gap in ((_CUE, " "), (_CUE + " ", ""), (_CUE, "")):
            before = self._ids(cue)
            after = [self._ids(f"{cue}{gap}{level}") for level in LEVELS]
            found = {ids[-1] for ids in after if ids[:-1] == before}
            unknown = getattr(self.model.tokenizer, "unk_token_id", None)
            if len(found) == len(LEVELS) and unknown not in found:
                return cue, tuple(ids[-1] for ids in after)
        raise InputError(
            f'the tokenizer of {self.model.name} has no single tokens for "1" … "5" behind "{_CUE}"; choose another '
            f"model as judge"
        )

    def _ids(self, text: str) -> list[int]:
        return list(self.model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def rubrics(self, asked: Sequence[tuple[str, str]]) -> list[Rubric]:
        """The fixed rubric, or one sentence per dimension and level, generated in batches.

        An empty sentence is replaced by the fixed text's.

        Raises:
            InputError: a prompt longer than the context.
        """
        if not self.writes_rubrics or not asked:
            return [TEMPLATE] * len(asked)
        prompts = [
            self._ids(self._prompt(material(role, task, None, self._special), one_level(name, level)) + f"{level}:")
            for role, task in asked
            for name in DIMENSIONS
            for level in LEVELS
        ]
        made = self.model.generate_ids(prompts, max_new_tokens=_WRITTEN, max_tokens=self.max_tokens)
        lines = iter([self.model.decode(ids).strip().split("\n")[0].strip() for ids in made])
        return [
            Rubric(
                {name: tuple(next(lines) or fixed for fixed in TEMPLATE.levels[name]) for name in DIMENSIONS}, self.name
            )
            for _ in asked
        ]

    def scores(self, graded: Sequence[tuple[RoleQuery, Rubric]]) -> list[Scores]:
        """Expected scores of answers, in batches.

        Raises:
            InputError: see `interp.conflict.dialogues.render`; a prompt longer than the context.
            MemoryBudgetError: a single answer does not fit.
        """
        prompts = self._encode(graded)
        groups: dict[str, list[int]] = {}
        if self._within_window(prompts):
            for row, (_, rubric) in enumerate(graded):
                groups.setdefault(grading(rubric), []).append(row)
        probabilities = self._probabilities(prompts, list(groups.values()))  # (answer, dimension, level) of all tokens
        mass = probabilities.sum(-1)
        shares = probabilities / mass[..., None]
        expected = (shares * torch.arange(1, 6, dtype=shares.dtype)).sum(-1)
        return [
            {name: _score(expected[row, at], mass[row, at], shares[row, at]) for at, name in enumerate(DIMENSIONS)}
            for row in range(len(graded))
        ]

    def _prompt(self, *parts: str) -> str:
        """The judge's prompt, up to where it answers."""
        turn = Turn("user", (("other", "\n\n".join(parts)),))
        return render(self.model, (turn,), template=self._template)[0]

    def _encode(self, graded: Sequence[tuple[RoleQuery, Rubric]]) -> list[list[list[int]]]:
        """Token ids of the four prompts of each answer."""
        found, limit, special = [], self.model.arch.n_positions, self._special
        for query, rubric in graded:
            before = grading(rubric, special), material(query.role, query.task, query.answer, special)
            found.append([self._ids(self._prompt(*before, one_dimension(name)) + self.cue) for name in DIMENSIONS])
            longest = max(map(len, found[-1]))
            if limit is not None and longest > limit:
                raise InputError(
                    f"query {query.id!r}: the judge's prompt has {longest} tokens, and the context of "
                    f"{self.model.name} is {limit} tokens; shorten role, task or answer, or take another judge"
                )
        return found

    @torch.no_grad()
    def _probabilities(
        self, prompts: Sequence[Sequence[Sequence[int]]], groups: Sequence[Sequence[int]]
    ) -> Float[Tensor, "answer dimension level"]:
        """Probabilities of the five scores; without groups every prompt is computed whole."""
        found = torch.zeros(len(prompts), len(DIMENSIONS), len(LEVELS), dtype=torch.float64)
        model, digits = self.model, list(self.digits)

        def take(done: Extended) -> Tensor:
            assert done.logits is not None
            return done.logits[:, -1].float().softmax(-1)[:, digits].double().cpu()

        if not groups:

            def whole(batch: Batch) -> None:
                found.view(-1, len(LEVELS))[list(batch.rows)] = take(extend(model, batch, None))

            every = [ids for four in prompts for ids in four]
            for_each_batch(token_batches(every, max_tokens=self.max_tokens, pad_id=model.pad_id, side="left"), whole)
            return found
        # Rubrics of one or two answers are not worth a pass of their own.
        alone = [row for rows in groups if len(rows) < _WORTH for row in rows]
        for rows in [*(rows for rows in groups if len(rows) >= _WORTH), alone]:
            if not rows:
                continue
            common = [_shared(prompts[row]) for row in rows]
            n = (
                _shared([prompts[row][0][:end] for row, end in zip(rows, common, strict=True)])
                if rows is not alone
                else 0
            )
            start = None
            if n > 0:
                base = pad([prompts[rows[0]][0][:n]], (0,), model.pad_id, side="left")
                start = extend(model, base, None, logits=False)
            middles = [prompts[row][0][n:end] for row, end in zip(rows, common, strict=True)]
            tails = [[ids[end:] for ids in prompts[row]] for row, end in zip(rows, common, strict=True)]
            longest, tail = max(map(len, middles)), max(len(ids) for four in tails for ids in four)
            budget = max(1, self.max_tokens * longest // (longest + len(DIMENSIONS) * tail))

            def shared(batch: Batch, rows: Any = rows, start: Any = start, tails: Any = tails) -> None:
                answers = extend(model, batch, start, logits=False)
                questions = [ids for at in batch.rows for ids in tails[at]]
                padded = pad(questions, range(len(questions)), model.pad_id, side="left")
                scores = take(extend(model, padded, answers))
                found[[rows[at] for at in batch.rows]] = scores.view(-1, len(DIMENSIONS), len(LEVELS))

            for_each_batch(token_batches(middles, max_tokens=budget, pad_id=model.pad_id, side="left"), shared)
        return found

    def _within_window(self, prompts: Sequence[Sequence[Sequence[int]]]) -> bool:
        """Whether padding cannot push a token out of a sliding window, which counts it; there are less than as many of it."""
        window = getattr(self.model.arch.config, "sliding_window", None)
        return window is None or max(len(ids) for four in prompts for ids in four) < window // 2


@dataclass(frozen=True)
class Extended:
    """Prompts that were computed so far.

    Attributes:
        cache: their keys and values.
        mask: (prompt, position), True at real tokens.
        logits: (prompt, 1, vocab) at the last position, if wanted.
    """

    cache: Any
    mask: Bool[Tensor, "prompt position"]
    logits: Tensor | None


def extend(model: Model, batch: Batch, before: Extended | None, *, logits: bool = True) -> Extended:
    """Go on from prompts whose keys and values are known; each of them gets an equal share of the batch, in order.

    Args:
        model: a causal LM.
        batch: padded on the left: what comes next.
        before: what stands before it; it stays as it is.
        logits: run the LM head on the last position.
    """
    batch = batch.to(model.device)
    mask, positions, cache = batch.mask, batch.position_ids, None
    if before is not None:
        times = batch.size // len(before.mask)
        cache = copy.copy(before.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]  # repeating and growing make new tensors
        cache.batch_repeat_interleave(times)
        earlier = before.mask.repeat_interleave(times, 0)
        positions = (positions + earlier.sum(1, keepdim=True)) * mask
        mask = torch.cat([earlier, mask], dim=1)
    inputs = {"input_ids": batch.input_ids, "attention_mask": mask.long(), "position_ids": positions, "use_cache": True}
    if logits:
        out = model.hf(**inputs, past_key_values=cache, logits_to_keep=1)
        return Extended(out.past_key_values, mask, out.logits)
    return Extended(model.hf.base_model(**inputs, past_key_values=cache).past_key_values, mask, None)


def _shared(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them begin with, at least one less than the shortest has.

    Of tokens, not of texts: a tokenizer may join what stands on both sides of a cut.
    """
    differs = (at for at, tokens in enumerate(zip(*sequences, strict=False)) if len(set(tokens)) > 1)
    return min(next(differs, len(sequences[0])), min(map(len, sequences)) - 1)


def _score(expected: Tensor, mass: Tensor, shares: Tensor) -> Score:
    value = float(expected)
    if not math.isfinite(value):
        return Score(math.nan, "the model gave no finite probabilities", float(mass), readable=False)
    spread = ", ".join(f"{level}: {float(share):.2f}" for level, share in zip(LEVELS, shares, strict=True))
    # Rounding may leave the mean of values from 1 to 5 a hair outside.
    return Score(min(5.0, max(1.0, value)), f"among 1 … 5 {spread}", float(mass))
