"""CRAS, the Contextualized Role Adherence Score: how well answers keep to a role, by a judge.

1. Rubric: what 1 … 5 mean on each dimension, for a role prompt and a task (`interp.conflict.rubrics`).
2. Score: a judge grades each answer on four dimensions by the rubric, with a justification (`interp.conflict.judges`).
3. CRAS = Σ_d λ_d s_d, λ = ¼ each by default; (CRAS − 1) / 4 on [0, 1]. Mean over a query's turns, then over queries.

Source: Wan et al., arXiv 2509.23188 (the arXiv version carries a withdrawal note), and its public code LeixinSun/DLA:
dimensions, scale and the two steps. The code stops at scores; the sum of step 3 is not in it.

A score that a judge cannot give is missing; CRAS is then over the dimensions that are known, their weights scaled up
to a sum of 1, and the summary says how many answers that concerns. A score out of range, or a reply without one, is
neither guessed nor clipped: it is kept as it was answered, and the summary refuses to average that judge until these
answers are dropped by request.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from interp.conflict.cras_summaries import FACTS, check_weights
from interp.conflict.judges import Judge, RoleQuery, Scores
from interp.conflict.pairs import PROMPTS, Pair
from interp.conflict.rubrics import DIMENSIONS, Rubric, rubrics_for
from interp.errors import InputError, ModelError, ResourceError
from interp.provenance import Provenance
from interp.results import Column, Result
from interp.shards import ShardedRun

# Said where the judge fails and what it graded is in a folder that the same call opens again.
GO_ON = "; run the same again to go on"
# Prompts with a system turn: without one there is no role to keep to.
WITH_ROLE = ("system", "agree", "paraphrase", "other", "conflict")
SCORE_COLUMNS = (
    Column("query", "str", "", "id of the query"),
    Column("turn", "int32", "", "turn of the dialogue"),
    Column("judge", "category", "", "who graded"),
    Column("dimension", "category", "", "what was graded"),
    Column("score", "float64", "1…5", "as the judge gave it; missing where it cannot tell or its reply was unreadable"),
    Column("in_range", "bool", "", "whether it can be averaged: from 1 to 5, or missing because the judge cannot tell"),
    Column("mass", "float64", "probability", "of the tokens 1 … 5 among all tokens, of judges that have it"),
    Column("justification", "str", "", "why, in the judge's words"),
    Column("rubric", "category", "", "what 1 … 5 meant"),
    Column("family", "category", "", "family of the rules"),
    Column("system_rule", "category", "", "rule of the role prompt"),
    Column("user_rule", "category", "", "rule that somebody else asked for"),
    Column("prompt", "category", "", "kind of prompt"),
    Column("setting", "category", "", "user, or peer: another agent"),
    Column("wording", "category", "", "simple or rich"),
    Column("model", "category", "", "who answered"),
    Column("role", "category", "", "role prompt"),
    Column("task", "category", "", "what was asked"),
    Column("answer", "str", "", "what was graded"),
    Column("finished", "bool", "", "whether it ended by itself"),
    Column("digest", "str", "", "hash of all that was graded"),
)


def queries_from_follow(
    result: Result, pairs: Sequence[Pair], *, prompts: Sequence[str] = WITH_ROLE, model: str | None = None
) -> list[RoleQuery]:
    """What there is to grade in a table of answers.

    Args:
        result: of kind "conflict.follow".
        pairs: those that were answered; the role prompt is their system turn.
        prompts: which kinds; without a system turn ("none", "user") there is no role.
        model: who answered; by default the result's model.

    Raises:
        InputError: another kind of result, a pair that is not among `pairs`, a kind of prompt without a system turn,
            or nothing left.
    """
    if result.kind != "conflict.follow":
        raise InputError(f"a result of kind {result.kind!r}; expected one of 'conflict.follow'")
    wrong = [name for name in prompts if name not in WITH_ROLE]
    if wrong:
        what = "has no system turn, so no role" if wrong[0] in PROMPTS else "is unknown"
        raise InputError(f"prompt {wrong[0]!r} {what}; expected some of {', '.join(WITH_ROLE)}")
    known = {pair.id: pair for pair in pairs}
    who = result.provenance.model or "" if model is None else model
    found = []
    for row in map(dict[Any, Any], result.frame[result.frame["prompt"].isin(list(prompts))].to_dict("records")):
        if row["pair"] not in known:
            raise InputError(
                f"pair {row['pair']!r} of the answers is not among the {len(known)} pairs given; give those that were "
                f"answered"
            )
        pair, prompt = known[row["pair"]], str(row["prompt"])
        role = "".join(text for turn in pair.prompts[prompt] if turn.role == "system" for _, text in turn.pieces)
        answer = row["answer"] if isinstance(row["answer"], str) else ""
        found.append(
            RoleQuery(
                f"{pair.id}/{prompt}",
                role,
                pair.task.text,
                answer,
                finished=bool(row["finished"]),
                family=str(row["family"]),
                system_rule=str(row["system_rule"]),
                user_rule=str(row["user_rule"]),
                prompt=prompt,
                setting=str(row["setting"]),
                wording=str(row["wording"]),
                model=who,
            )
        )
    if not found:
        raise InputError(
            f"the table has no answer to {', '.join(prompts)}; it has answers to "
            f"{', '.join(map(str, result.frame['prompt'].unique()))}"
        )
    return found


def cras(
    judge: Judge,
    queries: Sequence[RoleQuery],
    *,
    weights: Mapping[str, float] | None = None,
    out: str | Path | None = None,
    progress: bool | str = True,
) -> Result:
    """Let a judge grade answers.

    Args:
        judge: `RuleJudge()`, `LocalJudge(model)`, `ApiJudge(…)` or one of your own.
        queries: answers, such as `queries_from_follow` gives.
        weights: {dimension: λ}, not negative, of sum 1; a dimension left out has weight 0. A quarter each by default.
        out: a folder. What was graded is there whatever happens, and the same call goes on where it was.
        progress: progress bars on stderr; a string is the description.

    Returns:
        A `Result` of kind "conflict.score" with `SCORE_COLUMNS`: one row per answer and dimension. `cras_summary`
        reduces it.

    Raises:
        InputError: no queries, two of the same id and turn, weights that are none.
        ResourceError: the judge cannot be reached; the message says how many answers are graded and where they are.
        ModelError: a judge that does not give the four dimensions, or could not write a rubric.

    Example:
        >>> facts = {"family": "case", "system_rule": "capitals"}
        >>> query = RoleQuery("1", "Use capital letters.", "Describe rain.", "RAIN FALLS.", **facts)
        >>> from interp.conflict.cras_summaries import cras_summary
        >>> from interp.conflict.judges import RuleJudge
        >>> cras_summary(cras(RuleJudge(), [query], progress=False), by=())["mean"].round(2).tolist()
        [5.0, 5.0, 5.0, nan, 5.0]
    """
    started = time.monotonic()
    queries = _checked(queries)
    lambdas = check_weights(weights)
    model = getattr(judge, "model", None)
    provenance = Provenance.collect(
        SimpleNamespace(name=model) if isinstance(model, str) else model,
        parameters={
            "judge": {"name": judge.name, **judge.about()},
            "weights": lambdas,
            "n_queries": len(queries),
            "queries": hashlib.sha256("".join(digest(query) for query in queries).encode()).hexdigest()[:16],
        },
    )
    size = max(1, judge.chunk)
    units = {f"answers-{start:06d}": queries[start : start + size] for start in range(0, len(queries), size)}
    run = None if out is None else ShardedRun(out, "conflict.score", SCORE_COLUMNS, provenance, list(units))
    waiting = list(units) if run is None else run.missing()
    n_waiting = sum(len(units[unit]) for unit in waiting)
    frames, done = [], len(queries) - n_waiting
    description = progress if isinstance(progress, str) else f"score ({judge.name})"
    bar = tqdm(total=len(queries), initial=done, desc=description, unit="answer", disable=not progress, leave=False)
    with bar:
        try:
            asked = [(query.role, query.task) for unit in waiting for query in units[unit]]
            folder = None if out is None else Path(out, "rubrics")
            rubrics = rubrics_for(judge, asked, folder, progress=bool(progress))
            for unit in waiting:
                graded = [(query, rubrics[query.role, query.task]) for query in units[unit]]
                frame = _frame(judge, graded, judge.scores(graded))
                frames.append(frame) if run is None else run.write(unit, frame)
                done += len(graded)
                bar.update(len(graded))
        except ResourceError as error:
            kept = (
                "and lost; give out= a folder to keep them" if done else "yet; give out= a folder to keep what will be"
            )
            if out is not None:
                kept = (f"and kept in {Path(out).name}" if done else "yet") + GO_ON
            raise ResourceError(f"{error}. {done} of {len(queries)} answers are graded {kept}") from None
    if run is not None:
        return run.finish()
    provenance = Provenance(**{**vars(provenance), "wall_time": time.monotonic() - started})
    return Result("conflict.score", pd.concat(frames, ignore_index=True), SCORE_COLUMNS, provenance)


def digest(query: RoleQuery) -> str:
    """16 hex digits of what is graded: role prompt, task, answer, whether it ended, and its rule."""
    graded = json.dumps([query.role, query.task, query.answer, query.finished, query.family, query.system_rule])
    return hashlib.sha256(graded.encode()).hexdigest()[:16]


def _writable(text: str) -> str:
    """A text without halves of surrogate pairs, which no file can keep."""
    return text.encode("utf-8", "replace").decode()


def _checked(queries: Sequence[RoleQuery]) -> list[RoleQuery]:
    given = list(queries)
    if not given:
        raise InputError("no answers were given; expected at least one RoleQuery")
    seen: set[tuple[str, int]] = set()
    for query in given:
        if not isinstance(query, RoleQuery):
            raise InputError(f"{query!r:.60} is no RoleQuery; make some, or use queries_from_follow")
        if (query.id, query.turn) in seen:
            raise InputError(
                f"query {query.id!r} has turn {query.turn} twice; give each answer an id and turn of its own"
            )
        seen.add((query.id, query.turn))
    return given


def _frame(judge: Judge, graded: Sequence[tuple[RoleQuery, Rubric]], scores: Sequence[Scores]) -> pd.DataFrame:
    """Rows of `SCORE_COLUMNS`; whether a score is in range is looked at here, whatever the judge says."""
    if len(scores) != len(graded):
        raise ModelError(f"judge {judge.name!r} gave scores of {len(scores)} answers; expected {len(graded)}")
    rows = []
    for (query, rubric), found in zip(graded, scores, strict=True):
        missing = [name for name in DIMENSIONS if name not in found]
        if missing:
            raise ModelError(
                f"judge {judge.name!r} gave no score of {missing[0]!r} for query {query.id!r}; expected all four "
                f"dimensions"
            )
        facts = {name: getattr(query, name) for name in (*FACTS, "finished")}
        facts |= {name: _writable(getattr(query, name)) for name in ("role", "task", "answer")}
        for name in DIMENSIONS:
            one = found[name]
            rows.append(
                {
                    "query": query.id,
                    "turn": query.turn,
                    "judge": judge.name,
                    "dimension": name,
                    "score": float(one.value),
                    "in_range": one.in_range,
                    "mass": float(one.mass),
                    "justification": _writable(one.justification),
                    "rubric": rubric.text(name),
                    "digest": digest(query),
                    **facts,
                }
            )
    return pd.DataFrame(rows).assign(dimension=lambda table: pd.Categorical(table["dimension"], DIMENSIONS))
