"""Answers to dialogues, generated in batches, and whether they obey: which rules does a model follow at all?

1. Every prompt of every pair is rendered once; equal prompts are answered once.
2. Greedy decoding in token-budget batches; an answer that does not end by itself within the budget counts as cut off.
3. The family's verifiers judge each answer by both rules of its pair.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from interp.conflict.dialogues import NEXT_TURN, Dialogue, encode_dialogue
from interp.conflict.pairs import ASKED, Pair, make_pair
from interp.conflict.text_units import repeats
from interp.conflict.verifiers import family
from interp.conflict.wordings import read_tasks, tasks
from interp.errors import InputError
from interp.model import Model
from interp.provenance import Provenance
from interp.results import Column, Result
from interp.shards import ShardedRun

MAX_NEW_TOKENS = 64
FOLLOW_COLUMNS = (
    Column("pair", "str", "", "id of the pair"),
    Column("part", "category", "", "part of the tasks"),
    Column("task", "str", "", "id of the task"),
    Column("family", "category", "", "family of the rules"),
    Column("system_rule", "category", "", "rule A of the system turn"),
    Column("user_rule", "category", "", "rule A′ that the conflicting prompt's user or peer asks for"),
    Column("wording", "category", "", "simple or rich"),
    Column("setting", "category", "", "user, or peer: another agent"),
    Column("prompt", "category", "", "none, system, user, agree, paraphrase or conflict: which rules the prompt has"),
    Column("answer", "str", "", "the model's answer"),
    Column("n_tokens", "int32", "tokens", "its length"),
    Column("finished", "bool", "", "whether it ended by itself"),
    Column("obeys_system", "bool", "", "whether it passes the verifier of rule A"),
    Column("obeys_user", "bool", "", "whether it passes the verifier of rule A′"),
    Column("decided", "bool", "", "False where a cut-off answer fails rule A only for what it might still have said"),
    Column("loops", "bool", "", "whether it repeats itself: fewer than half of its word trigrams differ"),
    Column("reason", "str", "", "what the verifier of rule A says"),
)


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: without special tokens.
        ids: token ids, the end token included; without one where the model went on with another turn.
        finished: whether it ended by itself.
    """

    text: str
    ids: tuple[int, ...]
    finished: bool


def generate_answers(
    model: Model,
    dialogues: Sequence[Dialogue],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    template: str | None = None,
    max_tokens: int = 4096,
    progress: bool | str = False,
) -> list[Answer]:
    """Greedy answers, batched; equal prompts are answered once.

    Args:
        model: a causal LM with a chat template.
        dialogues: what to answer.
        max_new_tokens: longest answer in tokens.
        template: see `encode_dialogue`.
        max_tokens: budget of padded tokens (prompt and answer) in a batch.
        progress: a progress bar on stderr; a string is its description.

    Raises:
        InputError: see `encode_dialogue` and `Model.generate_ids`.
    """
    encoded = [encode_dialogue(model, dialogue, template=template).ids for dialogue in dialogues]
    return answer_ids(
        model, encoded, max_new_tokens=max_new_tokens, template=template, max_tokens=max_tokens, progress=progress
    )


def answer_ids(
    model: Model,
    encoded: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    template: str | None = None,
    max_tokens: int = 4096,
    progress: bool | str = False,
) -> list[Answer]:
    """As `generate_answers`, from token ids; under one of our templates an answer ends where the next turn begins."""
    different = list(dict.fromkeys(tuple(ids) for ids in encoded))
    if not different:
        return []
    made = model.generate_ids(different, max_new_tokens=max_new_tokens, max_tokens=max_tokens, progress=progress)
    ends, turns = model.end_ids(), NEXT_TURN.get(template or "", ())
    known = {}
    for prompt, ids in zip(different, made, strict=True):
        finished = bool(ids) and ids[-1] in ends
        n = _before(model, ids[: len(ids) - finished], turns)
        known[prompt] = (
            Answer(model.decode(ids), tuple(ids), finished)
            if n is None
            else Answer(model.decode(ids[:n]), tuple(ids[:n]), True)
        )
    return [known[tuple(ids)] for ids in encoded]


def _before(model: Model, ids: Sequence[int], turns: Sequence[str]) -> int | None:
    """How many tokens stand before the next turn; `None` where there is none. Marks may be special tokens or plain text."""
    text = model.decode(ids, skip_special_tokens=False) if turns and ids else ""
    found = [text.index(turn) for turn in turns if turn in text]
    if not found:
        return None
    return next(
        n for n in range(len(ids), -1, -1) if len(model.decode(ids[:n], skip_special_tokens=False)) <= min(found)
    )


def follow(
    model: Model,
    pairs: Sequence[Pair],
    prompts: Sequence[str] = ASKED,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    template: str | None = None,
    max_tokens: int = 4096,
    chunk: int = 32,
    out: str | Path | None = None,
    progress: bool | str = True,
) -> Result:
    """Which rules a model follows: answers to the prompts of pairs, each judged by both rules of its pair.

    Args:
        model: a causal LM with a chat template.
        pairs: what `make_pairs` gave, or your own.
        prompts: which of their prompts; "other", a control of `localize`, is not among them by default.
        max_new_tokens: longest answer; the built-in rules can be met in some 60 tokens.
        template: see `encode_dialogue`.
        max_tokens: budget of padded tokens in a batch.
        chunk: pairs in a unit of work, after which `out` has one shard more.
        out: a folder; an interrupted run goes on there.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        A `Result` of kind "conflict.follow" with `FOLLOW_COLUMNS`: one row per pair and prompt. `follow_summary` reduces it.

    Raises:
        InputError: no pair, an unknown prompt, two pairs of one id, or what `encode_dialogue` refuses.

    Example:
        >>> result = follow(load_model(), make_pairs("held-out", 48))                   # doctest: +SKIP
        >>> follow_summary(result)                                                      # doctest: +SKIP
    """
    start = time.perf_counter()
    check_pairs(pairs, prompts)
    parameters = {
        "pairs": [pair.id for pair in pairs],
        "texts": digest(pairs, prompts),
        "prompts": list(prompts),
        "max_new_tokens": max_new_tokens,
        "template": template,
    }
    provenance = Provenance.collect(model, parameters=parameters)
    units = [f"pairs-{at}" for at in range(0, len(pairs), chunk)]
    run = None if out is None else ShardedRun(Path(out), "conflict.follow", FOLLOW_COLUMNS, provenance, units)
    frames: list[pd.DataFrame] = []
    asked: dict[tuple[int, ...], Answer] = {}  # the prompts without a system rule come again with other pairs
    encoded = [
        [encode_dialogue(model, pair.prompts[name], template=template).ids for name in prompts] for pair in pairs
    ]
    waiting = units if run is None else run.missing()
    with tqdm(total=len(waiting), unit="chunk", disable=not progress, leave=False, desc=_bar_name(progress)) as bar:
        for unit in waiting:
            at = int(unit.removeprefix("pairs-"))
            here = encoded[at : at + chunk]
            new = [ids for ids in dict.fromkeys(ids for row in here for ids in row) if ids not in asked]
            made = answer_ids(model, new, max_new_tokens=max_new_tokens, template=template, max_tokens=max_tokens)
            asked.update(zip(new, made, strict=True))
            frame = _rows(pairs[at : at + chunk], prompts, [[asked[ids] for ids in row] for row in here])
            frames.append(frame) if run is None else run.write(unit, frame)
            bar.update()
    if run is not None:
        return run.finish()
    provenance = Provenance.collect(model, parameters=parameters, wall_time=time.perf_counter() - start)
    return Result("conflict.follow", pd.concat(frames, ignore_index=True), FOLLOW_COLUMNS, provenance)


def pairs_of(result: Result, tasks_path: str | Path | None = None) -> list[Pair]:
    """The pairs that were answered, made again from their names.

    Args:
        result: what `follow` gave.
        tasks_path: the file of tasks, where they were not ours.

    Raises:
        InputError: another kind of result, or a task that is not among the tasks.
    """
    frame = follow_frame(result, ()).drop_duplicates("pair")
    known = {task.id: task for task in (tasks() if tasks_path is None else read_tasks(tasks_path))}
    lost = [name for name in frame["task"] if name not in known]
    if lost:
        raise InputError(f"task {lost[0]!r} of the answers is not among the tasks; name the file that it came from")
    return [
        make_pair(
            str(row.family),
            str(row.system_rule),
            str(row.user_rule),
            str(row.wording),
            task=known[str(row.task)],
            setting=str(row.setting),
        )
        for row in frame.itertuples()
    ]


def check_pairs(pairs: Sequence[Pair], prompts: Sequence[str]) -> None:
    """Refuses what no run over pairs can use.

    Raises:
        InputError: no pair, a pair without one of the prompts, or two pairs of one id.
    """
    if not pairs or not prompts:
        raise InputError("no pair or no prompt was given; expected at least one of each")
    for pair in pairs:
        unknown = [name for name in prompts if name not in pair.prompts]
        if unknown:
            raise InputError(f"pair {pair.id!r} has no prompt {unknown[0]!r}; it has {', '.join(pair.prompts)}")
    twice = [name for name, n in Counter(pair.id for pair in pairs).items() if n > 1]
    if twice:
        raise InputError(f"two pairs have the id {twice[0]!r}; every id must be unique")


def digest(pairs: Sequence[Pair], prompts: Sequence[str]) -> str:
    """16 hex digits that change with any word of the prompts; what a result's provenance knows its pairs by."""
    texts = [[(turn.role, turn.pieces) for turn in pair.prompts[name]] for pair in pairs for name in prompts]
    return hashlib.sha256(repr(texts).encode()).hexdigest()[:16]


def _bar_name(progress: bool | str) -> str | None:
    return progress if isinstance(progress, str) else "answers"


def _rows(pairs: Sequence[Pair], prompts: Sequence[str], answers: Sequence[Sequence[Answer]]) -> pd.DataFrame:
    rows = []
    for pair, given in zip(pairs, answers, strict=True):
        rules = family(pair.family)
        for name, answer in zip(prompts, given, strict=True):
            ours = rules.verify(pair.system_rule, answer.text, answer.finished)
            theirs = rules.verify(pair.user_rule, answer.text, answer.finished)
            rows.append(
                {
                    "pair": pair.id,
                    "part": pair.task.part,
                    "task": pair.task.id,
                    "family": pair.family,
                    "system_rule": pair.system_rule,
                    "user_rule": pair.user_rule,
                    "wording": pair.wording,
                    "setting": pair.setting,
                    "prompt": name,
                    "answer": answer.text,
                    "n_tokens": len(answer.ids),
                    "finished": answer.finished,
                    "obeys_system": ours.passed,
                    "obeys_user": theirs.passed,
                    "decided": ours.decided,
                    "loops": repeats(answer.text),
                    "reason": ours.reason,
                }
            )
    return pd.DataFrame(rows)


def follow_frame(result: Result, by: Sequence[str]) -> pd.DataFrame:
    """The rows of what `follow` gave, `obeys_system` and `obeys_user` as numbers.

    Raises:
        InputError: another kind of result, an older one, or none of the columns `by`.
    """
    if result.kind != "conflict.follow":
        raise InputError(f"a result of kind {result.kind!r}; expected one of 'conflict.follow'")
    if not {"decided", "loops"} <= set(result.frame.columns):
        raise InputError(
            "these answers were made by an older version, without `decided` and `loops`; run `follow` again"
        )
    unknown = [name for name in by if name not in result.frame.columns]
    if unknown:
        raise InputError(f"no column {unknown[0]!r}; the columns are {', '.join(result.frame.columns)}")
    return result.frame.assign(
        obeys_system=result.frame["obeys_system"].astype(float), obeys_user=result.frame["obeys_user"].astype(float)
    )
