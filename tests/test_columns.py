"""A frame gets exactly the declared columns and dtypes, or an error that says what does not fit."""

import numpy as np
import pandas as pd
import pytest

from interp.columns import Column, conform
from interp.errors import InputError


def column(name: str, dtype: str) -> Column:
    return Column(name, dtype, "", "")


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([1, 2], "int8", np.array([1, 2], "int8")),
        ([1.0, 2.0], "int16", np.array([1, 2], "int16")),
        (np.array([1.5, np.nan]), "float32", np.array([1.5, np.nan], "float32")),
        ([1, None], "float64", np.array([1, np.nan])),
        ([True, False], "float32", np.array([1, 0], "float32")),
        (pd.Series([True, False], dtype=object), "bool", np.array([True, False])),
        ([np.inf, 1], "float16", np.array([np.inf, 1], "float16")),
    ],
)
def test_lossless_casts(values: object, dtype: str, expected: np.ndarray) -> None:
    got = conform(pd.DataFrame({"x": values}), [column("x", dtype)])["x"].to_numpy()
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        ([1, 300], "int8", "300.*out of range"),
        ([-1], "uint8", "out of range"),
        ([2**63], "int64", "out of range"),
        ([float(2**63)], "int64", "out of range"),
        ([1.5], "int64", "not whole"),
        ([1.0, None], "int16", "declare 'Int16'"),
        ([1.0, None], "uint16", "declare 'UInt16'"),
        ([1, 300, None], "Int8", "out of range"),
        (["1", "2"], "int64", "string"),
        ([1e300], "float32", "too large"),
        ([1, 0], "bool", "integer"),
        (pd.Series([True, None], dtype=object), "bool", "boolean"),
        ([1, 2], "str", "int64"),
        (pd.Series(["a", 1], dtype=object), "str", "holds a int"),
        (pd.Series(["a", "\ud800"], dtype=object), "str", "surrogate"),
        (pd.Series(["a", "\ud800"], dtype=object), "category", "surrogate"),
        (pd.Series([b"a"], dtype=object), "str", "bytes"),
        (pd.Series([[1]], dtype=object), "float32", "mixed"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(values: object, dtype: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        conform(pd.DataFrame({"x": values}), [column("x", dtype)])
    assert "'x'" in str(caught.value)


def test_missing_values() -> None:
    frame = pd.DataFrame(
        {"i": [1, None], "b": pd.Series([True, None], dtype=object), "s": ["a", None], "c": ["a", None]}
    )
    got = conform(frame, [column("i", "Int8"), column("b", "boolean"), column("s", "str"), column("c", "category")])
    assert got.isna().to_numpy().tolist() == [[False] * 4, [True] * 4]
    assert str(got["i"].dtype) == "Int8"
    assert str(got["b"].dtype) == "boolean"
    assert got["c"].cat.categories.tolist() == ["a"]


def test_no_rows() -> None:
    names = ["bool", "int8", "float32", "str", "category", "Int64", "boolean"]
    got = conform(pd.DataFrame({name: [] for name in names}), [column(name, name) for name in names])
    assert len(got) == 0
    assert [str(dtype) for dtype in got.dtypes if str(dtype) != "object"][:3] == ["bool", "int8", "float32"]


def test_differences_are_named() -> None:
    with pytest.raises(InputError, match=r"not in the frame: 'b'.*not declared: 'z'"):
        conform(pd.DataFrame({"a": [1], "z": [1]}), [column("a", "int8"), column("b", "int8")])
    with pytest.raises(InputError, match="declared twice: 'a'"):
        conform(pd.DataFrame({"a": [1]}), [column("a", "int8"), column("a", "int8")])
    with pytest.raises(InputError, match="in the frame twice: 'a'"):
        conform(pd.DataFrame([[1, 2]], columns=["a", "a"]), [column("a", "int8")])
    with pytest.raises(InputError, match="none is declared"):
        conform(pd.DataFrame(), [])


def test_index_and_order() -> None:
    frame = pd.DataFrame({"a": [3, 1, 2], "b": [1, 2, 3]}).sort_values("a")
    got = conform(frame, [column("b", "int64"), column("a", "int64")])
    assert got.to_dict("list") == {"b": [2, 3, 1], "a": [1, 2, 3]}
    assert got.index.tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="reset_index"):
        conform(frame.set_index("a"), [column("b", "int64")])


def test_columns_are_checked() -> None:
    with pytest.raises(InputError, match=r"unknown dtype 'object'.*float32"):
        column("a", "object")
    with pytest.raises(InputError, match="name"):
        column("", "int8")
    with pytest.raises(InputError, match="Unicode"):
        column("\ud800", "int8")
