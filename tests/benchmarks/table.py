"""Rows of the benchmark: what is compared with what, the printed table, and reports/bench.json.

A ratio is ours divided by theirs, so less is better, and `met` is computed from the ratio and the target alone. The file
is a list of rows with the keys suite, name, against, ratio, target, met (`ratio` and `met` are null where nothing was
measured, `target` and `met` where a figure is only printed) and more about how they came about.
"""

from __future__ import annotations

import json
import math
import operator
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from interp.atomic import write_atomically

KEYS = ("suite", "name", "against", "ratio", "target", "met")
_COMPARE = {"<=": operator.le, "<": operator.lt}
_TARGET = re.compile(r"(<=|<) (\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        suite: "core", or a method such as "neurons".
        subject: the module that measured it.
        name, against: what was measured, and what it is compared with.
        ratio: ours / theirs, or `None` if it was not measured.
        target: "<= 1.15" or "< 1"; `None` for a figure that is printed without one.
        lowest, highest: range of the ratio over the repeats.
        repeats: how many pairs the ratio comes from.
        ours, theirs: the two figures, in `unit`.
        n: how much work one repeat was, in words.
        quick: measured on a slice of the work.
        note: what a reader has to know.
        more: other figures, by name.
    """

    suite: str
    subject: str
    name: str
    against: str
    ratio: float | None
    target: str | None
    lowest: float | None = None
    highest: float | None = None
    repeats: int | None = None
    ours: float | None = None
    theirs: float | None = None
    unit: str = ""
    n: str = ""
    quick: bool = False
    note: str = ""
    more: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.target is not None and not _TARGET.fullmatch(self.target):
            raise ValueError(f"target {self.target!r}; expected something like '<= 1.15' or '< 1'")

    @property
    def met(self) -> bool | None:
        """Whether the ratio reaches the target; `None` if there is no ratio or no target."""
        if self.target is None or self.ratio is None or not math.isfinite(self.ratio):
            return None
        match = _TARGET.fullmatch(self.target)
        assert match is not None
        return _COMPARE[match[1]](self.ratio, float(match[2]))

    def as_dict(self) -> dict[str, Any]:
        """The row as it is in the file: the six keys first, numbers rounded to four digits."""
        row = asdict(self) | {"met": self.met}
        row = {key: row[key] for key in (*KEYS, *(key for key in row if key not in KEYS))}
        return {key: _rounded(value) for key, value in row.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of an earlier run; none if there is no such file, or it is not ours."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(KEYS) <= set(row) for row in rows):
        return []
    return rows


def merged(old: Iterable[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Earlier rows of subjects that were not measured again, then the new rows."""
    measured = {(row["suite"], row["subject"]) for row in new}
    return [row for row in old if (row["suite"], row.get("subject")) not in measured] + list(new)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the file, whole or not at all."""
    text = json.dumps(list(rows), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def render(rows: Sequence[dict[str, Any]], width: int = 150) -> str:
    """The table as text, notes below it."""
    head = ("suite", "name", "against", "ours", "theirs", "ratio", "range", "target", "met")
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(head))]
    right = {3, 4, 5, 6}
    lines = [
        "  ".join(
            cell.rjust(size) if at in right else cell.ljust(size) for at, (cell, size) in enumerate(pairs)
        ).rstrip()
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    ]
    lines.insert(1, "-" * len(lines[0]))
    for row in rows:
        about = "; ".join(part for part in (row.get("n"), row.get("note")) if part)
        if about:
            start = f"{row['name']} / {row['against']}: "
            lines.append(textwrap.fill(start + about, width, initial_indent="* ", subsequent_indent="  "))
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    unit = row.get("unit") or ""
    low, high = row.get("lowest"), row.get("highest")
    met = {True: "yes", False: "NO", None: "not measured"}[row["met"]] if row["target"] else "–"
    return (
        row["suite"],
        row["name"] + (" (quick)" if row.get("quick") else ""),
        row["against"],
        _figure(row.get("ours"), unit),
        _figure(row.get("theirs"), unit),
        _figure(row["ratio"], ""),
        "" if low is None or high is None else f"{_figure(low, '')}–{_figure(high, '')}",
        row["target"] or "–",
        met,
    )


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    if 0 < abs(value) < 0.01:
        return f"{value:.2g} {unit}".rstrip()
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    return f"{value:,.{digits}f} {unit}".rstrip()
