"""The table of preference pairs: its columns, its rows as training examples, and how many each rule gave."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

import pandas as pd

from interp.errors import InputError
from interp.model import Model
from interp.results import Column, Result

KIND = "conflict.preferences"
PREFERENCE_COLUMNS = (
    Column("id", "str", "", "id of the pair of rules, and which prompt"),
    Column("part", "category", "", "part of the tasks"),
    Column("task", "str", "", "id of the task"),
    Column("family", "category", "", "family of the rules"),
    Column("system_rule", "category", "", "rule A of the system turn, which the chosen answer obeys"),
    Column("user_rule", "category", "", "rule A′ of the conflicting prompt's user turn"),
    Column("wording", "category", "", "simple or rich"),
    Column("setting", "category", "", "user, or peer: another agent"),
    Column("prompt", "category", "", "conflict: the user asks for A′; agree: the user asks for A as well"),
    Column("used", "bool", "", "whether both answers were found, and `balanced` did not leave it out"),
    Column("chosen_from", "category", "", "prompt that gave the chosen answer, or rewrite; empty where none was found"),
    Column("rejected_from", "category", "", "the same of the rejected answer; own: the model's answer to this prompt"),
    Column("chosen", "str", "", "answer that obeys A"),
    Column("rejected", "str", "", "answer that does not"),
    Column("rejected_obeys_user", "bool", "", "whether the rejected answer passes the verifier of A′"),
    Column("n_prompt", "int32", "tokens", "length of the prompt"),
    Column("n_chosen", "int32", "tokens", "length of the chosen answer"),
    Column("n_rejected", "int32", "tokens", "length of the rejected answer"),
    Column("prompt_ids", "str", "token ids", "the prompt, separated by spaces"),
    Column("clear_ids", "str", "token ids", "the same task with A in the user turn and nothing else"),
    Column("chosen_ids", "str", "token ids", "the chosen answer"),
    Column("rejected_ids", "str", "token ids", "the rejected answer"),
    Column("rule_positions", "str", "positions", "where the system's rule stands in the prompt"),
)


@dataclass(frozen=True)
class Preference:
    """One training example, in token ids.

    Attributes:
        id: see `PREFERENCE_COLUMNS`; also the others.
        prompt, chosen, rejected, clear: token ids.
        rule_positions: of the system's rule in the prompt.
    """

    id: str
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    clear: tuple[int, ...]
    rule_positions: tuple[int, ...]


def read_preferences(result: Result) -> list[Preference]:
    """The rows that are used, as token ids.

    Raises:
        InputError: a result of another kind, or one without a single usable row.
    """
    _check_kind(result)
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "clear_ids", "rule_positions")
    rows = result.frame[result.frame["used"]]
    if rows.empty:
        raise InputError("no preference pair is usable: for none both answers were found; see counts(preferences)")
    ids = (([int(token) for token in text.split()] for text in rows[name]) for name in names)
    return [Preference(name, *(tuple(some) for some in row)) for name, *row in zip(rows["id"], *ids, strict=True)]


def _check_kind(result: Result) -> None:
    if not isinstance(result, Result) or result.kind != KIND:
        raise InputError(
            f"{getattr(result, 'kind', type(result).__name__)!r} are no preferences; give what make_preferences gave"
        )


def counts(result: Result) -> pd.DataFrame:
    """How many pairs each rule gave.

    Returns:
        family, system_rule, prompt, n (prompts), n_used, n_rewritten (chosen answers by a rewrite), n_no_chosen, n_no_rejected,
        n_left_out (both were found, and `balanced` left them out).
    """
    frame = result.frame.assign(
        n_used=result.frame["used"],
        n_rewritten=result.frame["used"] & (result.frame["chosen_from"] == "rewrite"),
        n_no_chosen=result.frame["chosen_from"] == "",
        n_no_rejected=result.frame["rejected_from"] == "",
        n_left_out=~result.frame["used"] & (result.frame["chosen_from"] != "") & (result.frame["rejected_from"] != ""),
    )
    by = frame.groupby(["family", "system_rule", "prompt"], observed=True)
    table = by[["n_used", "n_rewritten", "n_no_chosen", "n_no_rejected", "n_left_out"]].sum()
    table.insert(0, "n", by.size())
    return table.reset_index()


def balanced(result: Result) -> Result:
    """The same pairs, of which both rules of a family use equally many per prompt: as many as the rarer rule has.

    Answers that obey are rarer for one rule than for its opposite ("three sentences or more" than "one sentence"), and what is
    trained on them would favour the other. Kept are rows spread evenly over the table; the rest says `used` = False, and `counts`
    calls it left out. A family one of whose rules gave nothing is left out whole; one with a single rule in the system turn
    stays.

    Raises:
        InputError: a result of another kind, or one of which nothing would be left.
    """
    _check_kind(result)
    frame = result.frame.reset_index(drop=True)
    used = frame["used"].to_numpy().copy()
    asked = set(frame["system_rule"])
    for _, group in frame[used].groupby(["family", "prompt"], observed=True):
        by_rule = group.groupby("system_rule", observed=True).groups
        rules = {rule for pair in zip(group["system_rule"], group["user_rule"], strict=True) for rule in pair}
        least = min(len(by_rule.get(rule, ())) for rule in rules & asked)
        for rows in by_rule.values():
            kept = {int(rows[at * len(rows) // least]) for at in range(least)}
            used[[int(row) for row in rows if int(row) not in kept]] = False
    if frame["used"].any() and not used.any():
        raise InputError(
            "no family has usable pairs of both its rules to balance; give more pairs, or train on them as they are"
        )
    return dataclasses.replace(result, frame=frame.assign(used=used))


def tokenizer_hash(model: Model) -> str:
    """16 hex digits of a tokenizer's vocabulary: preferences are token ids, and mean nothing to another one."""
    vocab = sorted(model.tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocab).encode()).hexdigest()[:16]
