"""Wordings of rules, and tasks: JSON Lines files, ours in `data/`, and yours.

    conflict_rules.jsonl     {"family": "case", "rule": "capitals", "wording": "simple", "text": "Write in capital letters only."}
    conflict_tasks.jsonl     {"id": "held-out-01", "part": "held-out", "text": "Describe a rainy day."}

A rule has at least three texts of each wording, "simple" (the bare instruction) and "rich" (with a reason or context): one
for the system turn, one for the user's, one for the paraphrase control.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from interp.conflict.verifiers import Family, add_family, family
from interp.errors import InputError, ResourceError

WORDINGS = ("simple", "rich")
PARTS = ("localisation", "training", "validation", "held-out")
N_TEXTS = 3

# {(family, rule, wording): texts}
_added: dict[tuple[str, str, str], tuple[str, ...]] = {}


@dataclass(frozen=True)
class Task:
    """What the model is asked about, whatever the rules.

    Attributes:
        id: unique.
        part: one of `PARTS`; no task is in two.
        text: the question or request.
    """

    id: str
    part: str
    text: str


def rule_texts(family_name: str, rule: str, wording: str) -> tuple[str, ...]:
    """A rule's texts in one wording, at least three.

    Raises:
        InputError: an unknown family, rule or wording.

    Example:
        >>> len(rule_texts("case", "capitals", "simple")) >= 3
        True
    """
    if wording not in WORDINGS:
        raise InputError(f"wording={wording!r}; expected one of {', '.join(WORDINGS)}")
    known = {**_built_in_rules(), **_added}
    key = (family_name, rule, wording)
    if key not in known:
        rules = family(family_name).rules
        raise InputError(f"family {family_name!r} has no texts of rule {rule!r}; its rules are {', '.join(rules)}")
    return known[key]


@cache
def tasks() -> tuple[Task, ...]:
    """Our tasks, in the order of the file."""
    rows = [Task(**row) for row in read_rows(data_path("conflict_tasks.jsonl"), ("id", "part", "text"))]
    return tuple(rows)


def read_tasks(path: str | Path) -> list[Task]:
    """Tasks of your own from a JSON Lines file with `id`, `part` and `text`.

    Raises:
        InputError: a line that is no task, an unknown part, or an id that comes twice.
        ResourceError: the file cannot be read.
    """
    found: dict[str, Task] = {}
    for number, row in enumerate(read_rows(path, ("id", "part", "text")), 1):
        if row["part"] not in PARTS:
            raise InputError(f"{path}, line {number}: part {row['part']!r}; expected one of {', '.join(PARTS)}")
        if row["id"] in found:
            raise InputError(f"{path}, line {number}: id {row['id']!r} comes twice")
        found[row["id"]] = Task(**row)
    return list(found.values())


def register(new: Family, path: str | Path) -> None:
    """Add a family of rules: its class and its wordings.

    Args:
        new: see `interp.conflict.verifiers`.
        path: a JSON Lines file with `family`, `rule`, `wording` and `text`: at least three texts of each rule in each wording.

    Raises:
        InputError: the class lacks something, a line is malformed, of another family or rule, or there are too few texts. Then
            nothing is added.
        ResourceError: the file cannot be read.
    """
    texts: dict[tuple[str, str, str], list[str]] = {}
    for number, row in enumerate(read_rows(path, ("family", "rule", "wording", "text")), 1):
        if row["family"] != new.name or row["rule"] not in new.rules or row["wording"] not in WORDINGS:
            raise InputError(
                f"{path}, line {number}: {row['family']!r}, {row['rule']!r}, {row['wording']!r}; expected family {new.name!r}, a "
                f"rule of {', '.join(new.rules)}, and a wording of {', '.join(WORDINGS)}"
            )
        texts.setdefault((row["family"], row["rule"], row["wording"]), []).append(row["text"])
    for rule in new.rules:
        for wording in WORDINGS:
            n = len(set(texts.get((new.name, rule, wording), ())))
            if n < N_TEXTS:
                raise InputError(
                    f"{path} has {n} different texts of rule {rule!r} in the {wording} wording; expected at least {N_TEXTS}"
                )
    add_family(new)
    for key in [key for key in _added if key[0] == new.name]:
        del _added[key]
    _added.update({key: tuple(dict.fromkeys(some)) for key, some in texts.items()})


@cache
def _built_in_rules() -> Mapping[tuple[str, str, str], tuple[str, ...]]:
    texts: dict[tuple[str, str, str], list[str]] = {}
    for row in read_rows(data_path("conflict_rules.jsonl"), ("family", "rule", "wording", "text")):
        texts.setdefault((row["family"], row["rule"], row["wording"]), []).append(row["text"])
    return MappingProxyType({key: tuple(some) for key, some in texts.items()})


def read_rows(path: str | Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """Objects of a JSON Lines file, each with exactly these fields of text.

    Raises:
        InputError: a line that is no such object; the message has the line's number.
        ResourceError: the file cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ResourceError(f"cannot read {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(row, dict) or set(row) != set(fields):
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise InputError(f"{path}, line {number} has {found}; expected {', '.join(fields)}")
        if not all(isinstance(value, str) and value.strip() for value in row.values()):
            raise InputError(f"{path}, line {number}: every field is text, and none is empty")
        rows.append(row)
    if not rows:
        raise InputError(f"{path} is empty; expected at least one line")
    return rows


def data_path(name: str) -> Path:
    """A file of `data/`: in the package where it was installed as a wheel, else in the checkout."""
    inside = Path(__file__).with_name("data") / name
    return inside if inside.exists() else Path(__file__).parents[2] / "data" / name
