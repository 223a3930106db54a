"""Preference pairs without a larger model: a chosen answer that obeys the system's rule, and a rejected one that does not.

For each pair of rules (A in the system turn, A′ in the user's) and task:

1. The prompt is the conflicting one; for a share of them also the consistent one, so that obedience without conflict is kept.
2. Chosen is the first of these that passes A's verifier: the model's own answer with A in the user turn; its answers with A in
   the system turn, alone or in both turns; its answer without any rule, rewritten to obey A by the family.
3. Rejected is the first of these that fails A: the model's own answer to the prompt; its answer to the user's rule A′ without
   A (not for the consistent prompt); its answer without any rule, rewritten to obey A′; that answer as it is.
4. An answer that repeats itself (fewer than half of its word trigrams differ) counts for nothing. Where the chosen or the
   rejected one is missing, the row says so and is not used.

Generation is greedy, and only what an earlier candidate did not settle is generated. An answer that ended by itself, or was
written whole by a rewrite, ends with the end-of-turn token; one that was cut off does not.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from interp.conflict.answers import Answer, check_pairs, digest, generate_answers
from interp.conflict.dialogues import Dialogue, encode_dialogue
from interp.conflict.pairs import Pair
from interp.conflict.preference_table import (
    KIND,
    PREFERENCE_COLUMNS,
    Preference,
    counts,
    read_preferences,
    tokenizer_hash,
)
from interp.conflict.text_units import repeats, sentences
from interp.conflict.verifiers import family
from interp.errors import InputError
from interp.model import Model
from interp.provenance import Provenance
from interp.results import Result
from interp.shards import ShardedRun

__all__ = ["PREFERENCE_COLUMNS", "Preference", "counts", "make_preferences", "read_preferences", "repeats"]
_ASKED = ("none", "system", "user", "agree", "conflict")  # prompts that answers are made of
_CHUNK = 96  # prompts that are worked on together; few that need many rounds cost as much as many

# (pair, "conflict" or "agree")
_Wanted = tuple[Pair, str]


def make_preferences(
    model: Model,
    pairs: Sequence[Pair],
    *,
    keep_consistent: float = 0.25,
    max_answer_tokens: int = 64,
    template: str | None = None,
    max_tokens: int = 4096,
    out: str | Path | None = None,
    progress: bool | str = True,
) -> Result:
    """Preference pairs for `align`, made by the model itself and the families' rewrites.

    Args:
        model: a causal LM with a chat template.
        pairs: of `make_pairs`, usually of the parts "training" and "validation" (one call each).
        keep_consistent: consistent prompts per conflicting one, from 0 to 1, of every rule.
        max_answer_tokens: where answers are cut.
        template: see `encode_dialogue`.
        max_tokens: budget of padded tokens in a batch.
        out: a folder; every 96 prompts become a shard there.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        A `Result` of kind "conflict.preferences" with `PREFERENCE_COLUMNS`, one row per prompt, also of those that are not used.

    Raises:
        InputError: no pair, ids that come twice, a share outside [0, 1]; see also `encode_dialogue`.

    Example:
        >>> made = make_preferences(load_model(), make_pairs("training", 60))              # doctest: +SKIP
        >>> counts(made)                                                                   # doctest: +SKIP
    """
    start = time.perf_counter()
    check_pairs(pairs, _ASKED)
    if not 0 <= keep_consistent <= 1:
        raise InputError(f"keep_consistent={keep_consistent}; expected a share from 0 to 1")
    if max_answer_tokens < 1:
        raise InputError(f"max_answer_tokens={max_answer_tokens}; expected at least 1")
    wanted = _wanted(pairs, keep_consistent)
    parameters = {
        "n_pairs": len(pairs),
        "pairs": digest(pairs, _ASKED),
        "keep_consistent": keep_consistent,
        "max_answer_tokens": max_answer_tokens,
        "template": template,
    }
    provenance = Provenance.collect(model, parameters=parameters)
    chunks = {f"pairs-{at:05d}": wanted[at : at + _CHUNK] for at in range(0, len(wanted), _CHUNK)}
    attachments = {"tokenizer": tokenizer_hash(model)}
    run = None
    if out is not None:
        run = ShardedRun(Path(out), KIND, PREFERENCE_COLUMNS, provenance, list(chunks), attachments)
    frames = []
    for number, (unit, chunk) in enumerate(chunks.items(), 1):
        if run is not None and unit not in run.missing():
            continue
        named = f"{progress if isinstance(progress, str) else 'preferences'} {number}/{len(chunks)}"
        answers = _Answers(model, max_answer_tokens, template, max_tokens, named if progress else False)
        frame = _rows(model, chunk, answers, template)
        frames.append(frame) if run is None else run.write(unit, frame)
    if run is not None:
        return run.finish()
    provenance = Provenance.collect(model, parameters=parameters, wall_time=time.perf_counter() - start)
    frame = pd.concat(frames, ignore_index=True)
    return Result(KIND, frame, PREFERENCE_COLUMNS, provenance, attachments)


def _wanted(pairs: Sequence[Pair], keep_consistent: float) -> list[_Wanted]:
    """Every pair's conflicting prompt, and the consistent one of a share of each rule's pairs."""
    seen: dict[tuple[str, str], int] = {}
    found: list[_Wanted] = []
    for pair in pairs:
        found.append((pair, "conflict"))
        kind = (pair.family, pair.system_rule)
        before = seen.get(kind, 0)
        seen[kind] = before + 1
        # Of a rule's n-th pair where n · share passes a whole number.
        if int((before + 1) * keep_consistent) > int(before * keep_consistent):
            found.append((pair, "agree"))
    return found


class _Answers:
    """Answers of one chunk, generated when they are first asked for."""

    def __init__(self, model: Model, length: int, template: str | None, max_tokens: int, progress: bool | str) -> None:
        self.model, self.length, self.template = model, length, template
        self.max_tokens, self.progress = max_tokens, progress
        self.known: dict[Dialogue, Answer] = {}

    def __call__(self, dialogues: Sequence[Dialogue]) -> list[Answer]:
        new = [dialogue for dialogue in dict.fromkeys(dialogues) if dialogue not in self.known]
        if new:
            made = generate_answers(
                self.model,
                new,
                max_new_tokens=self.length,
                template=self.template,
                max_tokens=self.max_tokens,
                progress=self.progress,
            )
            self.known.update(zip(new, map(self._ended, made), strict=True))
        return [self.known[dialogue] for dialogue in dialogues]

    def _ended(self, answer: Answer) -> Answer:
        """With the end token, also where the model went on with another turn instead."""
        end, ends = _end_id(self.model), self.model.end_ids()
        if (
            not answer.finished
            or end is None
            or (answer.ids and answer.ids[-1] in ends)
            or len(answer.ids) >= self.length
        ):
            return answer
        return dataclasses.replace(answer, ids=(*answer.ids, end))


# What a candidate is called, the prompt it needs, and the answer it makes of the model's answer to that prompt.
_Candidate = tuple[str, Dialogue, Callable[[Answer], Answer | None]]


def _rows(model: Model, wanted: Sequence[_Wanted], answers: _Answers, template: str | None) -> pd.DataFrame:
    chosen = _first([_chosen(model, pair, answers.length) for pair, _ in wanted], answers, _obeys(wanted, True))
    rejected = _first(
        [_rejected(model, pair, prompt, answers.length) for pair, prompt in wanted], answers, _obeys(wanted, False)
    )
    rows = []
    for (pair, prompt), (chosen_from, good), (rejected_from, bad) in zip(wanted, chosen, rejected, strict=True):
        encoded = encode_dialogue(model, pair.prompts[prompt], template=template)
        clear = encode_dialogue(model, pair.prompts["user"], template=template)
        row: dict[str, Any] = {
            "id": f"{pair.id}/{prompt}",
            "part": pair.task.part,
            "task": pair.task.id,
            **{name: getattr(pair, name) for name in ("family", "system_rule", "user_rule", "wording", "setting")},
            "prompt": prompt,
            "used": bool(good.ids and bad.ids),
            "chosen_from": chosen_from,
            "rejected_from": rejected_from,
            "chosen": good.text,
            "rejected": bad.text,
            "rejected_obeys_user": family(pair.family).verify(pair.user_rule, bad.text, bad.finished).passed,
            "n_prompt": len(encoded.ids),
            "n_chosen": len(good.ids),
            "n_rejected": len(bad.ids),
            "prompt_ids": _as_text(encoded.ids),
            "clear_ids": _as_text(clear.ids),
            "chosen_ids": _as_text(good.ids),
            "rejected_ids": _as_text(bad.ids),
            "rule_positions": _as_text(encoded.spans["system_rule"]),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _chosen(model: Model, pair: Pair, length: int) -> list[_Candidate]:
    own = [(name, pair.prompts[name], lambda answer: answer) for name in ("user", "system", "agree")]
    return [*own, ("rewrite", pair.prompts["none"], _rewriter(model, pair.family, pair.system_rule, length))]


def _rejected(model: Model, pair: Pair, prompt: str, length: int) -> list[_Candidate]:
    found: list[_Candidate] = [("own", pair.prompts[prompt], lambda answer: answer)]
    if prompt == "conflict":
        alone = tuple(turn for turn in pair.prompts["conflict"] if turn.role != "system")
        found.append(("user_rule", alone, lambda answer: answer))
    found.append(("rewrite", pair.prompts["none"], _rewriter(model, pair.family, pair.user_rule, length)))
    return [*found, ("none", pair.prompts["none"], lambda answer: answer)]


def _rewriter(model: Model, family_name: str, rule: str, length: int) -> Callable[[Answer], Answer | None]:
    def rewrite(answer: Answer) -> Answer | None:
        base, whole = answer.text, answer.finished
        if not whole:  # the sentence that was cut off goes, if others stand before it
            some = sentences(base)
            ends = [sentence for sentence in some if sentence.rstrip("\"'”’)]")[-1:] in (".", "!", "?", "…")]
            whole = bool(ends) and ends == some[: len(ends)]
            base = " ".join(ends) if whole else base
        text = family(family_name).rewrite(rule, base)
        if text is None:
            return None
        text = answer.text[: len(answer.text) - len(answer.text.lstrip())] + text  # some templates leave a space to it
        ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        end = _end_id(model)
        finished = whole and len(ids) < length and end is not None
        kept = [*ids[:length], *([end] if finished else [])]
        return Answer(model.decode(kept), tuple(kept), finished)

    return rewrite


def _obeys(wanted: Sequence[_Wanted], asked: bool) -> Callable[[int, Answer], bool]:
    """Whether an answer to the prompt of a row is good for the chosen (asked) or for the rejected place."""

    def fits(at: int, answer: Answer) -> bool:
        pair, _ = wanted[at]
        if not answer.ids or not answer.text.strip() or repeats(answer.text):
            return False
        return family(pair.family).verify(pair.system_rule, answer.text, answer.finished).passed == asked

    return fits


def _first(
    candidates: list[list[_Candidate]], answers: _Answers, fits: Callable[[int, Answer], bool]
) -> list[tuple[str, Answer]]:
    """Per row the first candidate that fits, and its name; round by round, so that each round is one batched generation."""
    found: dict[int, tuple[str, Answer]] = {}
    for place in range(max(map(len, candidates))):
        open_rows = [at for at in range(len(candidates)) if at not in found and place < len(candidates[at])]
        given = answers([candidates[at][place][1] for at in open_rows])
        for at, answer in zip(open_rows, given, strict=True):
            name, _, change = candidates[at][place]
            changed = change(answer)
            if changed is not None and fits(at, changed):
                found[at] = (name, changed)
    return [found.get(at, ("", Answer("", (), False))) for at in range(len(candidates))]


def _end_id(model: Model) -> int | None:
    """The token that ends a turn: the tokenizer's end token where the checkpoint names it among several."""
    ends, own = model.end_ids(), getattr(model.tokenizer, "eos_token_id", None)
    return own if own in ends or not ends else min(ends)


def _as_text(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))
