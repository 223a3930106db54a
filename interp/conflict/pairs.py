"""Pairs of prompts: the same task with rules that agree and with rules that conflict, and what is needed to compare them with.

    prompt         system turn       user turn                      what for
    "none"                           task                           what the model does by itself
    "system"       rule A            task                           does it obey the system turn (the published "normal" prompt)
    "user"                           task, rule A                   does it obey the rule at all
    "agree"        rule A            task, rule A in other words    the consistent prompt
    "paraphrase"   rule A            task, rule A in others still   a control: as "agree", no conflict, other words
    "other"        rule A            task, a rule about another     a control: something else is asked, and both can be obeyed
                                     matter
    "conflict"     rule A            task, rule A′                  the conflicting prompt

A and A′ are the two rules of a family, and either may stand in the system turn ("swapped" roles). In the setting "peer" the
second rule does not come from the user but from another agent in a dialogue of several agents:

    system: rule A · user: the task · assistant: a promise to answer · user: "Message from agent Ben: rule A′"

Texts of one number have one form in both rules of a family ("Use capital letters only.", "Use lowercase letters only."): the
paraphrase and the conflicting rule have the same form, another than the rule in "agree" has. The rule about another matter is
one of language; where the family is that of language itself, one of the number of sentences. Wordings are rotated over tasks,
so that no drift is that of one sentence. Tasks are split into parts that share none, and two
families are held out of localisation and training.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from interp.conflict.dialogues import Dialogue, Encoded, Turn, encode_dialogue
from interp.conflict.verifiers import family, family_names
from interp.conflict.wordings import N_TEXTS, PARTS, WORDINGS, Task, rule_texts, tasks
from interp.errors import InputError
from interp.model import Model

PROMPTS = ("none", "system", "user", "agree", "paraphrase", "other", "conflict")
ASKED = tuple(name for name in PROMPTS if name != "other")  # what `follow` asks by default
SETTINGS = ("user", "peer")
# Held out of localisation and training. Each has a relative that is not: a format (the list), a length (sentences).
HELD_OUT_FAMILIES = ("json", "words")

# The family that the control "other" asks for: whichever of its rules, an answer can obey it and every other family's.
OTHER_FAMILY, OTHER_OF_THAT = "language", "sentences"


@dataclass(frozen=True)
class Pair:
    """Prompts of one task under one rule in the system turn and its opposite in the user turn.

    Attributes:
        id: unique among the pairs of one call.
        family: of the rules.
        system_rule: A, the rule of the system turn.
        user_rule: A′, what the conflicting prompt's user (or peer) asks for.
        wording: "simple" or "rich".
        setting: "user" or "peer".
        task: what is asked.
        prompts: {name of `PROMPTS`: dialogue}.
    """

    id: str
    family: str
    system_rule: str
    user_rule: str
    wording: str
    setting: str
    task: Task
    prompts: Mapping[str, Dialogue]


def make_pairs(
    part: str = "localisation",
    n: int | None = None,
    *,
    families: Sequence[str] | None = None,
    wordings: Sequence[str] = WORDINGS,
    setting: str = "user",
    swapped: bool = True,
    tasks_from: Sequence[Task] | None = None,
    seed: int = 0,
) -> list[Pair]:
    """Pairs of one part, evenly over families, roles and wordings.

    Args:
        part: "localisation", "training", "validation" or "held-out": whose tasks.
        n: how many at most; all combinations of family, roles, wording and task by default.
        families: by default all but `HELD_OUT_FAMILIES` for localisation, training and validation, and all for "held-out".
        wordings: "simple", "rich" or both.
        setting: "user", or "peer" for a dialogue of agents.
        swapped: let either rule of a family be the system's; otherwise its first alone.
        tasks_from: tasks of your own instead of ours.
        seed: of the tasks' order.

    Raises:
        InputError: an unknown part, family, wording or setting; no task of that part.

    Example:
        >>> pair = make_pairs("held-out", 1, families=["case"])[0]
        >>> pair.system_rule, pair.user_rule
        ('capitals', 'small')
    """
    if part not in PARTS:
        raise InputError(f"part={part!r}; expected one of {', '.join(PARTS)}")
    if setting not in SETTINGS:
        raise InputError(f"setting={setting!r}; expected one of {', '.join(SETTINGS)}")
    if n is not None and n < 1:
        raise InputError(f"n={n}; expected at least 1 pair")
    for wording in wordings:
        if wording not in WORDINGS:
            raise InputError(f"wording {wording!r}; expected one of {', '.join(WORDINGS)}")
    if families is None:
        families = [name for name in family_names() if part == "held-out" or name not in HELD_OUT_FAMILIES]
    chosen = [task for task in (tasks() if tasks_from is None else tasks_from) if task.part == part]
    if not chosen or not families or not wordings:
        raise InputError(f"no task, family or wording for the part {part!r}; expected at least one of each")
    kinds = [
        (name, rules[place], rules[1 - place], wording)
        for place in ((0, 1) if swapped else (0,))
        for wording in wordings
        for name in families
        for rules in (family(name).rules,)
    ]
    # Round by round, each kind gets its next task; each has an order of its own.
    orders = {
        kind: np.random.default_rng([seed, zlib.crc32("/".join(kind).encode())]).permutation(len(chosen))
        for kind in kinds
    }
    total = len(kinds) * len(chosen)
    found = [
        make_pair(*kind, task=chosen[int(orders[kind][round_])], setting=setting)
        for round_ in range(len(chosen))
        for kind in kinds
    ]
    return found[: min(n or total, total)]


def make_pair(
    family_name: str, system_rule: str, user_rule: str, wording: str = "simple", *, task: Task, setting: str = "user"
) -> Pair:
    """One pair; its wordings depend on the task's id, and so are the same on every machine.

    Raises:
        InputError: unknown names, or rules that are not the two of the family.
    """
    if {system_rule, user_rule} != set(family(family_name).rules):
        raise InputError(f"rules {system_rule!r} and {user_rule!r} are not the two of family {family_name!r}")
    ours, theirs = (rule_texts(family_name, rule, wording) for rule in (system_rule, user_rule))
    turn = zlib.crc32(task.id.encode())
    first, second, third = (ours[(turn + step) % len(ours)] for step in range(N_TEXTS))
    # In the form of the paraphrase: what the conflict changes beyond it is what the rule says.
    other = theirs[(turn + 2) % len(theirs)]
    away = OTHER_OF_THAT if family_name == OTHER_FAMILY else OTHER_FAMILY
    elsewhere = rule_texts(away, family(away).rules[(turn >> 8) % 2], wording)
    asked = {"system": None, "agree": second, "paraphrase": third, "conflict": other}
    asked["other"] = elsewhere[(turn + 2) % len(elsewhere)]
    prompts: dict[str, Dialogue] = {
        "none": dialogue(None, task.text, None, setting),
        "user": dialogue(None, task.text, first, setting),
        **{name: dialogue(first, task.text, rule, setting) for name, rule in asked.items()},
    }
    name = f"{task.id}/{family_name}/{system_rule}/{wording}/{setting}"
    return Pair(name, family_name, system_rule, user_rule, wording, setting, task, prompts)


def dialogue(system_rule: str | None, task: str, user_rule: str | None, setting: str = "user") -> Dialogue:
    """Turns of a task with a rule in the system turn, one from the user or a peer, both or none."""
    before = [] if system_rule is None else [Turn("system", (("system_rule", system_rule),))]
    if setting == "peer" and user_rule is not None:
        return (
            *before,
            Turn("user", (("task", task),)),
            Turn("assistant", (("other", "I will answer once the other agents have spoken."),)),
            Turn("user", (("other", "Message from agent Ben: "), ("user_rule", user_rule))),
        )
    rule = () if user_rule is None else (("other", " "), ("user_rule", user_rule))
    return (*before, Turn("user", (("task", task), *rule)))


def encode_pair(
    model: Model, pair: Pair, names: Sequence[str] = ("agree", "paraphrase", "conflict"), *, template: str | None = None
) -> dict[str, Encoded]:
    """Token ids and spans of some of a pair's prompts.

    Args:
        model: see `encode_dialogue`.
        pair: what `make_pairs` gave, or one of your own.
        names: keys of its prompts.
        template: see `encode_dialogue`.

    Raises:
        InputError: see `encode_dialogue`; a pair without such a prompt, or whose prompts ask different tasks.
    """
    missing = [name for name in names if name not in pair.prompts]
    if missing:
        raise InputError(f"pair {pair.id!r} has no prompt {missing[0]!r}; it has {', '.join(pair.prompts)}")
    asked = {
        name: "".join(text for turn in pair.prompts[name] for kind, text in turn.pieces if kind == "task")
        for name in names
    }
    if len(set(asked.values())) > 1:
        first, *others = names
        other = next(name for name in others if asked[name] != asked[first])
        raise InputError(
            f"pair {pair.id!r} asks different tasks: {asked[first]!r:.60} in {first!r} and {asked[other]!r:.60} in {other!r}; "
            f"the prompts of a pair differ in their rules alone"
        )
    try:
        return {name: encode_dialogue(model, pair.prompts[name], template=template) for name in names}
    except InputError as error:
        raise InputError(f"pair {pair.id!r}: {error}") from error
