"""Wordings and tasks: ours are whole and split cleanly, yours are checked line by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_models import chat_tiny
from scripted_answers import script

from interp.conflict import RuleJudge, cras, follow, make_pairs, make_preferences, queries_from_follow, register
from interp.conflict import verifiers as verifiers_module
from interp.conflict import wordings as wordings_module
from interp.conflict.verifiers import BUILT_IN, Verdict, family, family_names
from interp.conflict.wordings import N_TEXTS, PARTS, WORDINGS, data_path, read_tasks, rule_texts, tasks
from interp.errors import InputError, ResourceError


class Rhyme:
    name, rules = "rhyme", ("rhymed", "unrhymed")

    def verify(self, rule: str, answer: str, finished: bool = True) -> Verdict:
        rhymed = answer[-3:] == answer.split(",")[0][-3:]
        return Verdict(rhymed == (rule == "rhymed"), "rhymes" if rhymed else "does not rhyme")

    def rewrite(self, rule: str, answer: str) -> str | None:
        return None


ROWS = [
    {"family": "rhyme", "rule": rule, "wording": wording, "text": f"{rule} {wording} {number}"}
    for rule in Rhyme.rules
    for wording in WORDINGS
    for number in range(3)
]


@pytest.fixture(autouse=True)
def only_built_in_families() -> Any:
    yield
    for name in [name for name in family_names() if name not in BUILT_IN]:
        del verifiers_module._FAMILIES[name]
    wordings_module._added.clear()


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_every_rule_has_texts_of_its_own() -> None:
    every = [
        text
        for name in BUILT_IN
        for rule in family(name).rules
        for wording in WORDINGS
        for text in rule_texts(name, rule, wording)
    ]
    assert len(every) == len(set(every)) >= len(BUILT_IN) * 2 * len(WORDINGS) * N_TEXTS
    assert all(
        len(rule_texts(name, rule, "rich")[0]) > len(rule_texts(name, rule, "simple")[0])
        for name in BUILT_IN
        for rule in family(name).rules
    )


def test_tasks_are_split_and_unique() -> None:
    some = tasks()
    assert {task.part for task in some} == set(PARTS)
    assert len({task.id for task in some}) == len({task.text.lower() for task in some}) == len(some)
    assert read_tasks(data_path("conflict_tasks.jsonl")) == list(some)


def test_a_family_of_ones_own(tmp_path: Path) -> None:
    register(Rhyme(), write(tmp_path / "rhyme.jsonl", ROWS))
    pairs = make_pairs("held-out", families=["rhyme"])
    assert {pair.system_rule for pair in pairs} == {"rhymed", "unrhymed"}
    assert pairs[0].prompts["conflict"][0].content.startswith("rhymed simple")
    assert family("rhyme").verify("rhymed", "the cat, the hat").passed is False
    register(Rhyme(), write(tmp_path / "again.jsonl", [{**row, "text": row["text"] + "!"} for row in ROWS]))
    assert all(text.endswith("!") for text in rule_texts("rhyme", "rhymed", "simple"))


def test_a_family_of_ones_own_is_asked_graded_and_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripted model says prose without a comma to everything, which the verifier takes for a rhyme."""
    script(monkeypatch)
    register(Rhyme(), write(tmp_path / "rhyme.jsonl", ROWS))
    model, pairs = chat_tiny(), make_pairs("held-out", 4, families=["rhyme"])
    answers = follow(model, pairs, ("agree", "conflict"), progress=False)
    asked = answers.frame["system_rule"].astype(str) == "rhymed"
    assert 0 < asked.sum() < len(asked)
    assert (answers.frame["obeys_system"] == asked).all()
    graded = cras(RuleJudge(), queries_from_follow(answers, pairs, prompts=("conflict",)), progress=False).frame
    graded = graded[graded["dimension"] == "constraint_compliance"]
    assert (graded["score"] == graded["system_rule"].astype(str).map({"rhymed": 5.0, "unrhymed": 1.0})).all()
    # Neither rule has both answers: what it says always rhymes, and nothing is rewritten.
    made = make_preferences(model, make_pairs("training", 4, families=["rhyme"]), progress=False).frame
    assert set(made["family"].astype(str)) == {"rhyme"}
    assert not made["used"].any()
    assert (made["chosen"].astype(bool) == (made["system_rule"].astype(str) == "rhymed")).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "line 1 is no JSON"),
        ([[1]], "line 1 has list; expected family, rule, wording, text"),
        ([{"family": "rhyme"}], "line 1 has family; expected family, rule, wording, text"),
        ([*ROWS, {**ROWS[0], "text": " "}], "line 13: every field is text, and none is empty"),
        ([{**ROWS[0], "text": 3}], "every field is text"),
        (
            [{**ROWS[0], "rule": "loud"}],
            "line 1: 'rhyme', 'loud', 'simple'; expected family 'rhyme', a rule of rhymed, unrhymed",
        ),
        (ROWS[:-1], "has 2 different texts of rule 'unrhymed' in the rich wording; expected at least 3"),
        ([], "is empty"),
    ],
)
def test_a_malformed_file_adds_nothing(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        register(Rhyme(), write(tmp_path / "rhyme.jsonl", rows))
    assert "rhyme" not in family_names()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"cannot read .*no\.jsonl"):
        register(Rhyme(), tmp_path / "no.jsonl")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a", "part": "middle", "text": "?"}], "line 1: part 'middle'; expected one of localisation"),
        ([{"id": "a", "part": "training", "text": "?"}] * 2, "line 2: id 'a' comes twice"),
    ],
)
def test_malformed_tasks_are_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_tasks(write(tmp_path / "tasks.jsonl", rows))


def test_unknown_wordings_and_rules_are_refused() -> None:
    with pytest.raises(InputError, match="wording='loud'"):
        rule_texts("case", "capitals", "loud")
    with pytest.raises(InputError, match="has no texts of rule 'loud'; its rules are capitals, small"):
        rule_texts("case", "loud", "simple")
