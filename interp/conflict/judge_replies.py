"""Replies of a judge as text: the JSON object in it, four scores or a rubric, and what is wrong with them.

A reply may stand in a code fence, have words around it, or be cut off after its scores. Nothing is guessed: what is
no number is no score, and a number outside 1 … 5 stays what it is, marked as out of range.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from interp.conflict.judges import Score, Scores
from interp.conflict.rubrics import DIMENSIONS, Rubric
from interp.errors import InputError

_LONGEST = 2000  # characters of a justification that are kept


def find_object(reply: str, key: str) -> dict[str, Any] | None:
    """The first JSON object in a text that has a key; of an object that was cut off, what is complete.

    Example:
        >>> find_object('Here: {"a": 1}\\n```json\\n{"b": {"a": 2}}```', "b")
        {'b': {'a': 2}}
        >>> find_object('{"a": 1, "b": 2, "c": "it is', "a")
        {'a': 1, 'b': 2}
    """
    decoder, at = json.JSONDecoder(), reply.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(reply, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            if isinstance(value, dict) and key in value:
                return value
        at = reply.find("{", end)
    found = _complete_members(reply, reply.find("{"))
    return found if key in found else None


_NAME = re.compile(r'[\s,]*("(?:[^"\\]|\\.)*")\s*:\s*')
_END = re.compile(r"\s*[,}]")


def _complete_members(reply: str, at: int) -> dict[str, Any]:
    """The members of an object without an end, up to where it breaks off or begins to repeat itself."""
    found: dict[str, Any] = {}
    decoder, at = json.JSONDecoder(), at + 1
    while at > 0 and (name := _NAME.match(reply, at)):
        try:
            key = json.loads(name.group(1))
            value, at = decoder.raw_decode(reply, name.end())
        except (ValueError, RecursionError):
            break
        if key in found or not _END.match(reply, at):  # a number without an end may be half a number
            break
        found[key] = value
    return found


def read_scores(reply: str) -> tuple[Scores, str]:
    """The four scores of a reply.

    Args:
        reply: text with {dimension: {"score": number, "justification": text}}, or with {dimension: number} and
            {"justification": text} in one object.

    Returns:
        (scores, problem): the problem is "" when all four are there and in range. A score that is not there is
        missing and unreadable.

    Example:
        >>> scores, problem = read_scores('{"goal_alignment": {"score": 7, "justification": "Great."}}')
        >>> scores["goal_alignment"].value, problem
        (7.0, 'goal_alignment is 7, and scores are from 1 to 5')
    """
    found = next((value for name in DIMENSIONS if (value := find_object(reply, name)) is not None), None)
    if found is None:
        problem = "it holds no JSON object with the dimensions as keys" if reply.strip() else "it is empty"
        return dict.fromkeys(DIMENSIONS, Score(math.nan, f"unreadable reply: {reply[:200]!r}", readable=False)), problem
    scores = {name: _read_score(found.get(name), found.get("justification")) for name in DIMENSIONS}
    for name, one in scores.items():
        if not one.readable:
            return scores, f"{name} has no number as its score"
        if not one.in_range:
            return scores, f"{name} is {one.value:g}, and scores are from 1 to 5"
    return scores, ""


def _read_score(value: Any, justification: Any) -> Score:
    number = value
    if isinstance(value, dict):
        number, justification = value.get("score"), value.get("justification")
    text = justification[:_LONGEST] if isinstance(justification, str) else ""
    try:
        # A bool is an int to Python, and no score.
        parsed = math.nan if isinstance(number, bool) or number is None else float(number)
    except (TypeError, ValueError, OverflowError):
        parsed = math.nan
    if math.isnan(parsed):
        return Score(math.nan, text or f"no number: {str(number)[:80]!r}", readable=False)
    return Score(parsed, text)


def read_rubric(reply: str, judge: str) -> tuple[Rubric | None, str]:
    """The rubric in a reply, or `None` and what is wrong with it.

    Args:
        reply: text with {"levels": {dimension: {"1": text, …, "5": text}}}.
        judge: who wrote it.
    """
    found = find_object(reply, "levels")
    if found is None:
        return None, "it holds no JSON object with the key levels"
    try:
        return Rubric.from_json({"levels": found["levels"], "written_by": judge}), ""
    except InputError as error:
        return None, str(error)
