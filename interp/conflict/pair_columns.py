"""Columns that say which pair a row is of, and a digest of what a run asks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from interp.conflict.pairs import Pair
from interp.results import Column

PAIR_COLUMNS = (
    Column("pair", "str", "", "id of the pair"),
    Column("task", "str", "", "id of its task; pairs of one task are not independent"),
    Column("family", "category", "", "family of the rules"),
    Column("system_rule", "category", "", "rule A of the system turn"),
    Column("user_rule", "category", "", "rule A′ that the conflicting prompt's user or peer asks for"),
    Column("wording", "category", "", "simple or rich"),
    Column("setting", "category", "", "user or peer: who contradicts"),
)


def pair_table(pairs: Sequence[Pair]) -> pd.DataFrame:
    """`PAIR_COLUMNS` of pairs, one row each."""
    names = ("family", "system_rule", "user_rule", "wording", "setting")
    rows = [(pair.id, pair.task.id, *(getattr(pair, name) for name in names)) for pair in pairs]
    return pd.DataFrame(rows, columns=["pair", "task", *names])


def digest(values: Any) -> str:
    """16 hex digits of JSON values, so that a folder is not resumed with other prompts or answers.

    Example:
        >>> digest([1, 2]) == digest((1, 2)), digest([1, 2]) == digest([2, 1])
        (True, False)
    """
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
