"""Results: a long-form table that documents itself, and its way to disk and back.

A `Result` is a frame, its documented columns (`interp.columns`), where it came from (`interp.provenance`) and
attachments, JSON values that it cannot be read without, such as a tokenizer. `save` writes all of it into one Parquet
file, whole or not at all; `load_result` gives it back equal. Runs that take long are written shard by shard:
`interp.shards`.

A result's kind is "package.function", such as "neurons.dose_response". By that name alone it finds how it is drawn
(`interp.neurons.plots.dose_response`) and, where a package has a table RESULT_TYPES, its own class; nothing here
knows any method.
"""

import html
import importlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from interp.atomic import write_atomically
from interp.columns import Column, conform
from interp.errors import InputError, ResultError
from interp.parquet import read_parquet, write_parquet
from interp.provenance import Provenance, as_json
from interp.tokens import visible

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["Column", "Provenance", "Result", "build_result", "conform", "find_plot", "load_result", "table_html"]

_KIND = re.compile(r"[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*")


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """A tidy table with its documentation and provenance.

    Attributes:
        kind: "package.function" that made it.
        frame: long-form rows, with exactly the declared columns and dtypes (see `columns.conform`).
        columns: what each column holds.
        provenance: what made it.
        attachments: JSON values that the table cannot be read without.

    Raises:
        InputError: the kind is malformed, the columns do not cover the frame, or an attachment is not JSON.

    Example:
        >>> import pandas as pd
        >>> column = Column("layer", "int16", "layer", "where the neuron sits")
        >>> Result("neurons.find", pd.DataFrame({"layer": [3, 5]}), (column,), Provenance())
        Result('neurons.find', 2 rows: layer)
    """

    kind: str
    frame: "pd.DataFrame"
    columns: tuple[Column, ...]
    provenance: Provenance
    attachments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_kind(self.kind)
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "frame", conform(self.frame, self.columns))
        object.__setattr__(self, "attachments", as_json(self.attachments, "attachments"))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one Parquet file, whole or not at all; missing folders are made.

        Args:
            path: the file to make or replace.

        Returns:
            The path.

        Raises:
            ResourceError: it cannot be written; a file that was there is untouched.
        """
        header = {
            "kind": self.kind,
            "columns": [vars(column) for column in self.columns],
            "provenance": self.provenance.to_json(),
        }
        return write_atomically(
            path, lambda file: write_parquet(file, self.frame, header, attachments=self.attachments)
        )

    def equals(self, other: object, check_provenance: bool = False) -> bool:
        """Whether both hold the same: kind, columns, rows in order, dtypes, categories and attachments.

        Args:
            other: another result.
            check_provenance: whether to compare where they came from, time and command included.
        """
        return (
            isinstance(other, Result)
            and self.kind == other.kind
            and self.columns == other.columns
            and self.frame.equals(other.frame)
            and all(_same_categories(self.frame[name], other.frame[name]) for name in self.frame.columns)
            and repr(_ordered(self.attachments)) == repr(_ordered(other.attachments))  # repr: NaN equals NaN
            and (
                not check_provenance
                or repr(_ordered(self.provenance.to_json())) == repr(_ordered(other.provenance.to_json()))
            )
        )

    def plot(self, **options: Any) -> "go.Figure":
        """Draws it with the plot function of its kind.

        Args:
            **options: for that function.

        Raises:
            ResultError: there is none.
        """
        draw = find_plot(self.kind)
        if draw is None:
            package, function = self.kind.split(".")
            raise ResultError(f"results of kind {self.kind!r} have no plot: interp.{package}.plots has no {function!r}")
        return draw(self, **options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind!r}, {len(self.frame):,} rows: {', '.join(self.frame.columns)})"

    def _repr_html_(self) -> str:
        """What Jupyter shows: the first rows, with every string escaped."""
        provenance = self.provenance
        origin = " · ".join(
            text(part) for part in (self.kind, provenance.model, provenance.dtype, provenance.created) if part
        )
        return f"<div><p><b>{origin}</b></p>{table_html(self.frame, rows=20)}</div>"


def load_result(path: str | os.PathLike[str]) -> Result:
    """Reads what `Result.save` wrote, or the folder of a finished sharded run.

    Args:
        path: a file or folder.

    Returns:
        A result equal to the saved one, of its kind's own class where there is one.

    Raises:
        ResultError: nothing is there, it is not ours, from a newer version, truncated, damaged or unfinished.
    """
    path = Path(path)
    if path.is_dir():
        from interp.shards import load_folder

        return load_folder(path)
    frame, header, values = read_parquet(path)
    try:
        columns = tuple(Column(**entry) for entry in header["columns"])
        provenance = Provenance.from_json(header["provenance"])
        return build_result(header["kind"], frame, columns, provenance, values["attachments"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ResultError(f"{path} has corrupt metadata ({reason}); make it again") from error


def build_result(
    kind: str,
    frame: "pd.DataFrame",
    columns: tuple[Column, ...],
    provenance: Provenance,
    attachments: Mapping[str, Any] | None = None,
) -> Result:
    """A result of the class that its kind's package names in RESULT_TYPES, or a plain one.

    Raises:
        InputError: as `Result`.
        ResultError: the class named there is not a Result.
    """
    check_kind(kind)
    package = _find_module(f"interp.{kind.split('.')[0]}")
    result_type = getattr(package, "RESULT_TYPES", {}).get(kind, Result)
    if not (isinstance(result_type, type) and issubclass(result_type, Result)):
        raise ResultError(f"RESULT_TYPES[{kind!r}] of its package must be a Result class, got {result_type!r}")
    return result_type(kind, frame, columns, provenance, dict(attachments or {}))


def find_plot(kind: str) -> "Callable[..., go.Figure] | None":
    """The function that draws results of this kind: `interp.<package>.plots.<function>`; None if there is none."""
    check_kind(kind)
    package, function = kind.split(".")
    draw = getattr(_find_module(f"interp.{package}.plots"), function, None)
    return draw if callable(draw) else None


def check_kind(kind: object) -> None:
    """Refuses what is not "package.function"; what passes can only name a module inside interp.

    Raises:
        InputError: it says what is expected.
    """
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise InputError(f"a kind is 'package.function' in lower case, such as 'neurons.decode', got {kind!r}")


def table_html(frame: "pd.DataFrame", rows: int = 50) -> str:
    """The first rows of a frame as an HTML table, every string escaped and its invisible characters shown.

    Args:
        frame: any frame.
        rows: how many to show.

    Returns:
        HTML that says "showing N of M rows".
    """
    import pandas as pd

    numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in frame.dtypes]
    kinds = [' class="number"' if right else "" for right in numeric]
    head = "".join(f"<th{kind}>{text(name)}</th>" for kind, name in zip(kinds, frame.columns, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{text(_cell(value))}</td>' for kind, value in zip(kinds, row, strict=True))}</tr>"
        for row in frame.head(rows).itertuples(index=False, name=None)
    )
    note = f"showing {min(rows, len(frame)):,} of {len(frame):,} rows"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{note}</p>"


def text(value: object) -> str:
    """Any value as safe HTML text: invisible characters shown, then escaped."""
    return html.escape(visible(str(value), inner=False))


def _cell(value: object) -> str:
    import pandas as pd

    if value is None or (pd.api.types.is_scalar(value) and pd.isna(value)):  # type: ignore[call-overload]
        return "–"
    return f"{value:.4g}" if isinstance(value, float) or pd.api.types.is_float(value) else str(value)


def _find_module(name: str) -> ModuleType | None:
    """Imports a module inside interp; None if it, or the package around it, does not exist."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            return None
        raise  # it exists, but something that it needs does not


def _same_categories(ours: "pd.Series", theirs: "pd.Series") -> bool:
    import pandas as pd

    if not isinstance(ours.dtype, pd.CategoricalDtype):
        return True
    return ours.cat.categories.equals(theirs.cat.categories) and ours.cat.ordered == theirs.cat.ordered


def _ordered(value: Any) -> Any:
    """The same JSON value with sorted keys, for comparison."""
    if isinstance(value, dict):
        return {key: _ordered(value[key]) for key in sorted(value)}
    return [_ordered(entry) for entry in value] if isinstance(value, list) else value
