"""Judges: one interface for whoever grades answers, and the judge that is a program.

A judge has a name, makes a rubric for a role prompt and a task, and grades answers by it. There are three:
`RuleJudge` here, `LocalJudge` (`interp.conflict.local_judge`) and `ApiJudge` (`interp.conflict.api_judge`); one of
your own is a class with what `Judge` lists.

What `RuleJudge` sees, without any model:

    constraint_compliance   the family's verifier of the system rule: 5 if the answer passes, 1 if not
    role_consistency        5 if it passes the system rule, 1 if it passes the opposite rule instead, 3 if neither
    goal_alignment          1 no word; 2 the same words over and over; 3 no content word of the task; 4 cut off; 5 else
    knowledge_boundary      missing: no rule knows what a role may know

So it does not see whether an answer is true, good, or more than loosely about its task; a content word is recognised
by its beginning and not by meaning. An answer of the family "language" that shares no word with its task may be a
translation: goal alignment is then missing. Missing scores are left out of CRAS and the other weights are scaled up
(`interp.conflict.adherence`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from interp.conflict.rubrics import DIMENSIONS, Rubric
from interp.conflict.text_units import words
from interp.conflict.verifiers import family
from interp.errors import InputError


@dataclass(frozen=True)
class RoleQuery:
    """One answer to be graded.

    Attributes:
        id: of the query; the turns of one dialogue share it.
        role: the role prompt: the system turn's text.
        task: what was asked.
        answer: what the model said.
        turn: which turn of the dialogue.
        finished: whether the answer ended by itself.
        family: of the system rule; with `system_rule` what `RuleJudge` needs. Empty where there is none.
        system_rule: the rule of the role prompt.
        user_rule: the rule that somebody else asked for.
        prompt: kind of the prompt, such as "conflict".
        setting: "user" or "peer".
        wording: "simple" or "rich".
        model: who answered.

    Raises:
        InputError: no id, role prompt or task; a text that is none.
    """

    id: str
    role: str
    task: str
    answer: str
    turn: int = 0
    finished: bool = True
    family: str = ""
    system_rule: str = ""
    user_rule: str = ""
    prompt: str = ""
    setting: str = ""
    wording: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        for name in ("id", "role", "task"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"a query's {name} is {value!r:.60}; expected a text that is not empty")
        if not isinstance(self.answer, str):
            raise InputError(
                f"query {self.id!r}: the answer is {self.answer!r:.60}; expected a text, which may be empty"
            )


@dataclass(frozen=True)
class Score:
    """One dimension's score.

    Attributes:
        value: 1 … 5; NaN where the judge cannot tell. What a judge answered out of range stands as it was answered.
        justification: why.
        mass: probability of the five scores among all tokens, of judges that have it; else NaN.
        readable: False where the judge's reply held no score.
    """

    value: float
    justification: str = ""
    mass: float = math.nan
    readable: bool = True

    @property
    def in_range(self) -> bool:
        """Whether it can be averaged: from 1 to 5, or known to be missing."""
        return self.readable and (math.isnan(self.value) or 1 <= self.value <= 5)


# {dimension: score}, all four of them.
Scores = Mapping[str, Score]


@runtime_checkable
class Judge(Protocol):
    """What a judge has to have; see the module."""

    @property
    def name(self) -> str:
        """Short, and different from other judges'."""
        ...

    @property
    def chunk(self) -> int:
        """How many answers it is given at once, and so at most lost when it stops."""
        ...

    @property
    def writes_rubrics(self) -> bool:
        """Whether its rubrics are its own writing, and worth keeping; a fixed text is not."""
        ...

    def about(self) -> dict[str, Any]:
        """What its scores depend on, as JSON values, without any secret."""
        ...

    def rubrics(self, asked: Sequence[tuple[str, str]]) -> list[Rubric]:
        """One rubric for each (role prompt, task)."""
        ...

    def scores(self, graded: Sequence[tuple[RoleQuery, Rubric]]) -> list[Scores]:
        """The scores of each answer, all four dimensions."""
        ...


RULES = Rubric(
    {
        "goal_alignment": (
            "The answer has no word.",
            "It says the same words over and over.",
            "It has no content word of the task.",
            "It has a content word of the task and was cut off.",
            "It has a content word of the task and ended by itself.",
        ),
        "role_consistency": (
            "The answer passes the verifier of the opposite rule.",
            "Not given.",
            "It passes neither rule's verifier.",
            "Not given.",
            "It passes the verifier of the system rule.",
        ),
        "knowledge_boundary": ("Not given.",) * 5,
        "constraint_compliance": (
            "The answer does not pass the verifier of the system rule.",
            *("Not given.",) * 3,
            "It passes the verifier of the system rule.",
        ),
    },
    "rule",
)


@dataclass(frozen=True)
class RuleJudge:
    """Deterministic checks, no model; see the module for what they see.

    Example:
        >>> facts = {"family": "case", "system_rule": "capitals"}
        >>> query = RoleQuery("1", "Use capital letters.", "Describe rain.", "RAIN FALLS.", **facts)
        >>> RuleJudge().scores([(query, RULES)])[0]["constraint_compliance"].value
        5.0
    """

    name: str = "rule"
    chunk: int = 4096
    writes_rubrics: bool = False

    def about(self) -> dict[str, Any]:
        """Its kind."""
        return {"kind": "rule"}

    def rubrics(self, asked: Sequence[tuple[str, str]]) -> list[Rubric]:
        """The fixed text of what it checks."""
        return [RULES for _ in asked]

    def scores(self, graded: Sequence[tuple[RoleQuery, Rubric]]) -> list[Scores]:
        """Scores by the checks above.

        Raises:
            InputError: an unknown family, or a rule that is not of it.
        """
        return [_grade(query) for query, _ in graded]


def _grade(query: RoleQuery) -> Scores:
    found = {name: Score(math.nan, "no rule can tell") for name in DIMENSIONS}
    found["goal_alignment"] = _goal(query)
    if not (query.family and query.system_rule):
        return found
    rules = family(query.family)
    ours = rules.verify(query.system_rule, query.answer, query.finished)
    opposite = next(rule for rule in rules.rules if rule != query.system_rule)
    theirs = rules.verify(opposite, query.answer, query.finished)
    found["constraint_compliance"] = Score(5.0 if ours.passed else 1.0, f"{query.system_rule}: {ours.reason}")
    obeyed, value = (
        (query.system_rule, 5.0) if ours.passed else (opposite, 1.0) if theirs.passed else ("neither rule", 3.0)
    )
    found["role_consistency"] = Score(value, f"obeys {obeyed}")
    return found


def _goal(query: RoleQuery) -> Score:
    said = [word.lower() for word in words(query.answer)]
    if not said:
        return Score(1.0, "no word")
    triples = [tuple(said[at : at + 3]) for at in range(len(said) - 2)]
    if len(said) >= 12 and len(set(triples)) < 0.5 * len(triples):
        return Score(2.0, f"{len(set(triples))} different of {len(triples)} word triples")
    wanted, stems = _stems(query.task), _stems(query.answer)
    shared = sorted(stem for stem in wanted if any(one.startswith(stem) or stem.startswith(one) for one in stems))
    if not shared and query.family == "language":
        return Score(math.nan, "no word of the task, and perhaps another language")
    if not shared and wanted:
        return Score(3.0, "no content word of the task")
    reason = f"shares {', '.join(shared[:5])}" if shared else "the task has no content word"
    return Score(5.0, reason) if query.finished else Score(4.0, f"{reason}; cut off")


# What tasks are asked with, and what does not say what they are about.
_ASKING = frozenset(
    words(
        "the and are for from that this these those with your you their there what which when where who whom whose why "
        "how does did can could would should will may might has have had was were been being about into than then them "
        "they its his her our some any all more most describe explain tell give write list name say show make help "
        "please briefly short answer question sentence sentences words paragraph important good best way ways thing "
        "things people someone something"
    )
)


def _stems(text: str) -> set[str]:
    """Beginnings of content words: five letters at most, without a plural's s."""
    kept = [word.lower() for word in words(text)]
    kept = [word for word in kept if len(word) >= 3 and word not in _ASKING]
    return {(word[:-1] if word.endswith("s") and len(word) > 3 else word)[:5] for word in kept}
