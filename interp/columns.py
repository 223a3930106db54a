"""Columns: the documented layout of a result's table, and the check that a frame follows it.

Every column has a name, a dtype, a unit and a meaning. `conform` gives a frame exactly the declared columns, order and
dtypes. It casts where nothing is lost (float64 → float32 counts as that, int64 → int8 only when every value fits) and
refuses the rest, so that what a table says about itself is true, in memory and in a file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from interp.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

_INTEGERS = {f"{kind}{bits}" for kind in ("int", "uint", "Int", "UInt") for bits in (8, 16, 32, 64)}
_FLOATS = {"float16", "float32", "float64"}
DTYPES = frozenset(_INTEGERS | _FLOATS | {"bool", "boolean", "str", "category"})
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Column:
    """One column of a result.

    Attributes:
        name: as in the frame.
        dtype: bool, int8 … uint64, float16 … float64, str, category (of strings or integers), or with missing values
            boolean, Int8 … UInt64.
        unit: such as `probability`, `nats`, `layer`; empty where there is none.
        meaning: one phrase for a reader who has only the table.
    """

    name: str
    dtype: str
    unit: str
    meaning: str

    def __post_init__(self) -> None:
        for field in ("name", "dtype", "unit", "meaning"):
            value = getattr(self, field)
            if not isinstance(value, str) or _SURROGATE.search(value):
                raise InputError(f"a column's {field} must be a string of valid Unicode, got {value!r}")
        if not self.name or self.name.startswith("__index_level_"):
            raise InputError(f"{self.name!r} cannot be a column's name")
        if self.dtype not in DTYPES:
            known = ", ".join(sorted(DTYPES))
            raise InputError(f"column {self.name!r}: unknown dtype {self.dtype!r}; choose from {known}")


def conform(frame: "pd.DataFrame", columns: Sequence[Column]) -> "pd.DataFrame":
    """The same rows with exactly the declared columns, in that order, with those dtypes, and a plain index.

    Args:
        frame: long-form rows; an unnamed index is dropped.
        columns: what they should be.

    Returns:
        A new frame; the given one is not changed.

    Raises:
        InputError: columns are missing, undeclared or double, the index is named, or a value does not fit.

    Example:
        >>> import pandas as pd
        >>> conform(pd.DataFrame({"layer": [3]}), [Column("layer", "int8", "layer", "which one")]).dtypes["layer"]
        dtype('int8')
    """
    import pandas as pd

    if not isinstance(frame, pd.DataFrame):
        raise InputError(f"expected a pandas DataFrame, got a {type(frame).__name__}")
    declared = [column.name for column in columns]
    present = list(frame.columns)
    problems = [
        f"{label}: {', '.join(map(repr, names))}"
        for label, names in (
            ("declared but not in the frame", [name for name in declared if name not in present]),
            ("in the frame but not declared", [name for name in present if name not in declared]),
            ("declared twice", sorted({name for name in declared if declared.count(name) > 1})),
            ("in the frame twice", [name for name in dict.fromkeys(present) if present.count(name) > 1]),
        )
        if names
    ]
    if problems or not declared:
        raise InputError("columns do not match the frame: " + ("; ".join(problems) or "none is declared"))
    if any(name is not None for name in frame.index.names):
        raise InputError(f"the frame's index {list(frame.index.names)} would be lost: call reset_index() first")
    frame = frame.reset_index(drop=True)
    series = {column.name: _cast(frame[column.name], column) for column in columns}
    shared = int(pd.__version__.split(".")[0]) >= 3  # from pandas 3 on, whoever changes shared values gets a copy
    return pd.DataFrame(series, index=frame.index, copy=not shared)


def _cast(series: "pd.Series", column: Column) -> "pd.Series":
    import numpy as np
    import pandas as pd

    if series.empty and not isinstance(series.dtype, pd.CategoricalDtype):
        series = series.astype(object)  # the dtype of an empty list is an accident
    if column.dtype == "str":
        return _strings(series, column)
    if column.dtype == "category":
        return _categories(series, column)
    if str(series.dtype) == column.dtype:
        return series
    inferred = pd.api.types.infer_dtype(series, skipna=True)
    allowed = {"boolean", "empty"}
    if column.dtype not in ("bool", "boolean"):
        allowed |= {"integer", "floating", "mixed-integer-float"}
    if inferred not in allowed:
        raise _misfit(column, f"holds {inferred} values ({series.dtype})")
    if column.dtype in _INTEGERS:
        _check_integers(series, column)
    try:
        with np.errstate(over="ignore"):  # checked below
            cast = series.astype(column.dtype)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError) as error:
        raise _misfit(column, str(error)) from error
    if column.dtype in _FLOATS:
        infinite = (cast.abs() == float("inf")) & ~(series.astype("float64").abs() == float("inf"))
        if infinite.any():
            raise _misfit(column, f"{series[infinite].iloc[0]} is too large")
    elif column.dtype == "bool" and series.isna().any():
        raise _misfit(column, "holds missing values; declare 'boolean'")
    return cast


def _check_integers(series: "pd.Series", column: Column) -> None:
    import numpy as np

    known = series.dropna()
    if len(known) < len(series) and column.dtype[0].islower():
        nullable = column.dtype.replace("uint", "UInt").replace("int", "Int")
        raise _misfit(column, f"holds missing values; declare {nullable!r}")
    if not len(known):
        return
    limits = np.iinfo(column.dtype.lower())
    for value in (known.min(), known.max()):  # .item(): numpy would round the limit to compare it with a float
        value = value.item() if hasattr(value, "item") else value
        if not limits.min <= value <= limits.max:
            raise _misfit(column, f"{value} is out of range")
    fractional = known[known % 1 != 0]
    if len(fractional):
        raise _misfit(column, f"{fractional.iloc[0]} is not whole")


def _strings(series: "pd.Series", column: Column) -> "pd.Series":
    import pandas as pd

    if str(series.dtype) == "str":
        return series
    if isinstance(series.dtype, pd.CategoricalDtype):
        series = series.astype(object)
    if series.dtype == object:
        _check_text(series, column)
    elif not pd.api.types.is_string_dtype(series.dtype):
        raise _misfit(column, f"holds {series.dtype}")
    values = [None if missing else value for value, missing in zip(series, series.isna(), strict=True)]
    return pd.Series(values, dtype=_TEXT[int(pd.__version__.split(".")[0]) >= 3])


# pandas 3 has a string dtype of its own; before that, strings are objects (and "str" would turn None into "None")
_TEXT = {True: "str", False: "object"}


def _categories(series: "pd.Series", column: Column) -> "pd.Series":
    import pandas as pd

    if not isinstance(series.dtype, pd.CategoricalDtype):
        if series.dtype == object:
            _check_text(series, column)
        series = series.astype("category")
    categories = series.cat.categories
    if pd.api.types.is_integer_dtype(categories.dtype):
        plain = pd.Index(categories.astype("int64"))
    else:
        _check_text(categories, column)
        plain = pd.Index(list(categories), dtype=_TEXT[int(pd.__version__.split(".")[0]) >= 3])
    codes = pd.Categorical.from_codes(series.cat.codes.to_numpy(), categories=plain, ordered=bool(series.cat.ordered))
    return pd.Series(codes)


def _check_text(values: "pd.Series | pd.Index", column: Column) -> None:
    import pandas as pd

    for value in pd.unique(values.dropna()):
        if not isinstance(value, str):
            raise _misfit(column, f"holds a {type(value).__name__}, {value!r}")
        if _SURROGATE.search(value):
            hint = "which no file can keep; interp.tokens.visible shows it as text"
            raise _misfit(column, f"{value!r} holds half of a surrogate pair, {hint}")


def _misfit(column: Column, why: str) -> InputError:
    return InputError(f"column {column.name!r} is declared {column.dtype}, but {why}")
