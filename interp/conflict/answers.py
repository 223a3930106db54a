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

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from interp.conflict.dialogues import NEXT_TURN, Dialogue, encode_dialogue
from interp.conflict.pairs import ASKED, PROMPTS, Pair, make_pair
from interp.conflict.text_units import repeats
from interp.conflict.verifiers import family
from interp.conflict.wordings import read_tasks, tasks
from interp.errors import InputError
from interp.intervals import bootstrap_mean_clustered
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
    frame = _follow_frame(result, ()).drop_duplicates("pair")
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


def follow_summary(
    result: Result, by: Sequence[str] = ("family", "system_rule"), *, n_resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Compliance with the rule of the system turn, by rule and prompt, and what is above doing nothing.

    Args:
        result: what `follow` gave.
        by: columns to group by, beside the prompt.
        n_resamples, seed: of the bootstrap over tasks.

    Returns:
        The columns of `by`, prompt, obeys_system, low, high (share of answers that pass the verifier of the system's rule,
        with an interval over tasks), obeys_user (share that pass the opposite rule's), undecided (share that were cut off while
        they might still have come to obey; they count as not obeying, and a cut-off answer that obeys so far as obeying),
        loops (share that repeat themselves, whether they obey or not), n (answers), n_tasks, and, where the prompt "none" was
        asked, above_none, above_low, above_high: how many more answers obey than without any rule, task by task. A rule is
        followed at all where above_low of the prompt "user" is above 0.

    Raises:
        InputError: another kind of result, or no such column.
    """
    frame = _follow_frame(result, by)
    rows = []
    for key, group in frame.groupby([*by], observed=True, sort=False) if by else [((), frame)]:
        none = group[group["prompt"] == "none"]
        for name in PROMPTS:
            some = group[group["prompt"] == name]
            if some.empty:
                continue
            low, high = share_interval(some["obeys_system"], some["task"], n_resamples=n_resamples, seed=seed)
            row = dict(zip(by, key, strict=True)) | {"prompt": name, "obeys_system": some["obeys_system"].mean()}
            row |= {"low": low, "high": high, "obeys_user": some["obeys_user"].mean()}
            row |= {"undecided": 1 - some["decided"].mean(), "loops": some["loops"].mean()}
            row |= {"n": len(some), "n_tasks": some["task"].nunique(), "above_none": np.nan}
            row |= {"above_low": np.nan, "above_high": np.nan}
            if len(none):
                above = some.set_index("pair")["obeys_system"] - none.set_index("pair")["obeys_system"]
                task = some.set_index("pair")["task"].to_numpy()
                ends = bootstrap_mean_clustered(above.to_numpy(), task, n_resamples=n_resamples, seed=seed)
                row |= {"above_none": above.mean(), "above_low": float(ends[0]), "above_high": float(ends[1])}
            rows.append(row)
    return pd.DataFrame(rows)


def share_interval(
    passed: pd.Series, tasks: pd.Series, *, n_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval of a share of answers: bootstrap over tasks; where all agree, Wilson's with the tasks as trials.

    Args:
        passed: 1 or 0 of each answer.
        tasks: the answers' tasks.
        n_resamples, level, seed: of the bootstrap.

    Returns:
        (low, high).
    """
    if passed.nunique() > 1:
        low, high = bootstrap_mean_clustered(passed.to_numpy(), tasks.to_numpy(), n_resamples, level, seed)
        return float(low), float(high)
    from scipy.stats import binomtest

    n = tasks.nunique()
    ends = binomtest(n if passed.iloc[0] else 0, n).proportion_ci(level, method="wilson")
    return float(ends.low), float(ends.high)


def followed_rules(result: Result, *, seed: int = 0) -> pd.DataFrame:
    """Per rule: does the model follow it at all, where, and who wins under conflict.

    Args:
        result: what `follow` gave with the prompts "none", "system", "user" and "conflict".
        seed: of the bootstrap over tasks.

    Returns:
        family, rule, none, system, user, conflict (share of answers that obey the rule under each prompt, the rule being the
        system's in "system" and "conflict"), followed (above_low of the prompt "user" is above 0: obeyed more often than
        without any rule), heard (the same for "system"), other_wins (share of answers under conflict that obey the opposite
        rule), undecided, loops (of the answers under conflict: see `follow_summary`), n.

    A rule that is obeyed without being asked for ("paragraph") has no room above that and never counts as followed; a family is
    followed where one of its rules is. The intervals are each rule's own: of sixteen that do nothing, .4 would count by chance.

    Raises:
        InputError: another kind of result, or prompts that were not asked.
    """
    table = follow_summary(result, ("family", "system_rule"), seed=seed)
    lost = {"none", "system", "user", "conflict"} - set(table["prompt"])
    if lost:
        raise InputError(f"the prompts {', '.join(sorted(lost))} were not asked; give them to `follow`")
    rows = []
    for (name, rule), group in table.groupby(["family", "system_rule"], observed=True, sort=False):
        by_prompt = group.set_index("prompt")
        shares = by_prompt["obeys_system"]
        row = {"family": name, "rule": rule} | {key: shares[key] for key in ("none", "system", "user", "conflict")}
        row |= {"followed": by_prompt["above_low"]["user"] > 0, "heard": by_prompt["above_low"]["system"] > 0}
        row |= {"other_wins": by_prompt["obeys_user"]["conflict"], "undecided": by_prompt["undecided"]["conflict"]}
        rows.append(row | {"loops": by_prompt["loops"]["conflict"], "n": by_prompt["n"]["conflict"]})
    return pd.DataFrame(rows)


def _follow_frame(result: Result, by: Sequence[str]) -> pd.DataFrame:
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
