"""A result documents itself, goes to disk whole or not at all, and comes back equal or with a clear error."""

import errno
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import interp.parquet
from interp.errors import InputError, ResourceError, ResultError
from interp.results import Column, Provenance, Result, find_plot, load_result, table_html

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint64", "Int8", "Int64", "UInt64")
FLOATS = ("float16", "float32", "float64")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


def make(frame: pd.DataFrame | None = None, **changes: Any) -> Result:
    frame = (
        pd.DataFrame({"layer": np.array([1, 2, 3], "int8"), "token": [" a", "\x00😀", None]})
        if frame is None
        else frame
    )
    columns = (Column("layer", "int8", "layer", "where"), Column("token", "str", "", "what"))
    values: dict[str, Any] = {
        "kind": "nosuchpackage.thing",
        "frame": frame,
        "columns": columns,
        "provenance": Provenance.collect(seed=1, parameters={"x": [1, float("nan")]}),
        "attachments": {"tokenizer": '{"a": "\ud800"}', "n": 3},
    }
    return Result(**{**values, **changes})


@st.composite
def results(draw: st.DrawFn) -> Result:
    rows = draw(st.integers(0, 6))
    columns, frame = [], {}
    for index, dtype in enumerate(
        draw(
            st.lists(
                st.sampled_from([*INTEGERS, *FLOATS, "bool", "boolean", "str", "category"]), min_size=1, max_size=5
            )
        )
    ):
        name = f"{index}{draw(TEXTS)}"
        columns.append(Column(name, dtype, draw(TEXTS), draw(TEXTS)))
        if dtype in INTEGERS:
            limits = np.iinfo(dtype.lower())
            values = st.integers(int(limits.min), int(limits.max))
        elif dtype in FLOATS:
            values = st.floats(width=int(dtype[5:]))  # NaN, infinities and -0.0 too
        elif dtype in ("bool", "boolean"):
            values = st.booleans()
        else:
            values = TEXTS | st.none()
        if dtype[0].isupper() or dtype == "boolean":
            values = values | st.none()
        cells = draw(st.lists(values, min_size=rows, max_size=rows))
        if dtype == "category":
            known = draw(st.permutations(list(dict.fromkeys([c for c in cells if c is not None] + ["unused"]))))
            frame[name] = pd.Series(pd.Categorical(cells, categories=known, ordered=draw(st.booleans())))
        elif dtype == "str":
            frame[name] = pd.Series(cells, dtype=object)
        else:
            frame[name] = pd.Series(cells, dtype=dtype)
    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
        max_leaves=5,
    )
    return Result(
        "nosuchpackage.thing",
        pd.DataFrame(frame),
        tuple(columns),
        Provenance(
            seed=draw(st.integers() | st.none()), parameters=draw(st.dictionaries(TEXTS, json_values, max_size=2))
        ),
        draw(st.dictionaries(TEXTS, json_values, max_size=2)),
    )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(result=results())
def test_round_trip(tmp_path: Path, result: Result) -> None:
    loaded = load_result(result.save(tmp_path / "r.parquet"))
    assert loaded.equals(result, check_provenance=True)
    pd.testing.assert_frame_equal(loaded.frame, result.frame, check_exact=True, check_categorical=True)
    for name in result.frame:  # bit for bit where numpy can tell: -0.0 and NaN payloads aside
        if result.frame[name].dtype.kind == "f":
            known = result.frame[name].notna()  # a NaN's sign is part of its payload
            signs = [np.signbit(frame.loc[known, name]) for frame in (loaded.frame, result.frame)]
            np.testing.assert_array_equal(*signs)


def test_any_parquet_reader_reads_the_table(tmp_path: Path) -> None:
    result = make()
    path = result.save(tmp_path / "deep" / "r.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(path), result.frame)
    header = json.loads(pq.ParquetFile(path).metadata.metadata[b"interp"])
    assert header["format"] == 1
    assert header["columns"][0] == {"name": "layer", "dtype": "int8", "unit": "layer", "meaning": "where"}


def test_categories_of_numbers_and_many_of_text(tmp_path: Path) -> None:
    """Parquet itself loses both: integer categories, and unused ones beyond a dictionary page of 1 MB."""
    names = [f"token {index:07d} {'x' * 20}" for index in range(60_000)][::-1]
    codes = pd.Series(pd.Categorical.from_codes([3, 59_999, -1], categories=names, ordered=True))
    numbers = pd.Series(pd.Categorical([7, 5, 7], categories=[9, 7, 5]))
    columns = (Column("token", "category", "", ""), Column("k", "category", "", ""))
    result = make(pd.DataFrame({"token": codes, "k": numbers}), columns=columns)
    loaded = load_result(result.save(tmp_path / "r.parquet"))
    assert loaded.frame["token"].cat.categories.tolist() == names
    assert loaded.frame["k"].tolist() == [7, 5, 7]
    assert loaded.equals(result)


def test_large_attachment_is_compressed_once(tmp_path: Path) -> None:
    attachment = json.dumps({f"token{index}": index for index in range(100_000)})  # about 1.7 MB
    path = make(attachments={"tokenizer.json": attachment}).save(tmp_path / "r.parquet")
    assert path.stat().st_size < len(attachment) / 2
    assert load_result(path).attachments == {"tokenizer.json": attachment}


def test_equals_sees_every_difference() -> None:
    result = make()
    assert result.equals(make())
    assert not result.equals("something else")
    assert not result.equals(make(kind="other.thing"))
    assert not result.equals(make(result.frame.iloc[::-1]))
    assert not result.equals(make(attachments={}))
    assert not result.equals(make(columns=(result.columns[0], Column("token", "str", "", "other"))))
    assert result.equals(make(provenance=Provenance(seed=2)))
    assert not result.equals(make(provenance=Provenance(seed=2)), check_provenance=True)


def test_input_is_checked() -> None:
    for kind in ("neurons", "a.b.c", "os.path.join", "../x.y", "A.b", "a.b\n", "_a.b", 3):
        with pytest.raises(InputError, match=r"package\.function"):
            make(kind=kind)
    with pytest.raises(InputError, match="declared but not in the frame: 'token'"):
        make(pd.DataFrame({"layer": [1]}))
    with pytest.raises(InputError, match=r"attachments\['x'\]"):
        make(attachments={"x": object()})


def test_the_given_frame_is_not_shared() -> None:
    frame = pd.DataFrame({"layer": np.array([1], "int8"), "token": ["a"]})
    result = make(frame)
    frame.loc[0, "layer"] = 9
    assert result.frame["layer"].tolist() == [1]


def test_full_disk_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make().save(tmp_path / "r.parquet")
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"r\.parquet.*MiB are free"):
        make(attachments={}).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["r.parquet"]


def test_load_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.parquet"
    with pytest.raises(ResultError, match="there is no result at"):
        load_result(path)
    path.write_text("hello")
    with pytest.raises(ResultError, match="not a Parquet file"):
        load_result(path)
    path.write_bytes(b"")
    with pytest.raises(ResultError, match="truncated"):
        load_result(path)
    pd.DataFrame({"a": [1]}).to_parquet(path)
    with pytest.raises(ResultError, match=r"not a result of interp; pandas\.read_parquet"):
        load_result(path)
    with monkeypatch.context() as patch:
        patch.setattr(interp.parquet, "FORMAT", 3)
        make().save(path)
    with pytest.raises(ResultError, match=r"format version 3.*up to 1.*upgrade"):
        load_result(path)
    with pytest.raises(ResultError, match="not a folder of results"):
        load_result(tmp_path)


def test_every_truncation_and_bit_flip_is_an_error_or_harmless(tmp_path: Path) -> None:
    result = make()
    path = result.save(tmp_path / "r.parquet")
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(ResultError, match=r"truncated|damaged"):
            load_result(path)
    wrong = 0
    for position in range(0, len(whole), 41):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            loaded = load_result(path)
        except ResultError:
            continue
        wrong += not loaded.frame.equals(result.frame)
    assert wrong == 0


@pytest.mark.parametrize(
    "change",
    [
        {b"interp": b"{"},
        {b"interp": b"[]"},
        {b"interp": b'{"format": "x"}'},
        {b"interp": b'{"format": 1}'},
        {b"interp": b'{"format": 1, "kind": "a.b", "columns": [], "provenance": {}}'},
        {b"interp.attachments": b"####"},
        {b"interp.attachments": b"eJw="},
        {b"interp.categories": b""},
    ],
)
def test_corrupt_metadata(tmp_path: Path, change: dict[bytes, bytes]) -> None:
    path = make().save(tmp_path / "r.parquet")
    metadata = dict(pq.ParquetFile(path).metadata.metadata) | change
    del metadata[b"ARROW:schema"]
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(ResultError, match="corrupt metadata"):
        load_result(path)


def test_a_table_that_is_not_its_columns(tmp_path: Path) -> None:
    path = make().save(tmp_path / "r.parquet")
    metadata = pq.ParquetFile(path).metadata.metadata
    mine = {key: value for key, value in metadata.items() if key.startswith(b"interp")}
    pq.write_table(pa.table({"other": [1]}).replace_schema_metadata(mine), path)
    with pytest.raises(ResultError, match="'other'"):
        load_result(path)


def test_kind_finds_its_class_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Special(Result):
        pass

    package, plots = ModuleType("interp.fakepackage"), ModuleType("interp.fakepackage.plots")
    package.RESULT_TYPES = {"fakepackage.thing": Special}  # type: ignore[attr-defined]
    plots.thing = lambda result, **options: (result.kind, options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, plots.__name__, plots)
    result = make(kind="fakepackage.thing")
    loaded = load_result(result.save(tmp_path / "r.parquet"))
    assert type(loaded) is Special
    assert loaded.equals(result)
    assert result.plot(top=3) == ("fakepackage.thing", {"top": 3})
    with pytest.raises(ResultError, match=r"fakepackage\.plots has no 'other'"):
        make(kind="fakepackage.other").plot()
    package.RESULT_TYPES = {"fakepackage.thing": dict}  # type: ignore[attr-defined]
    with pytest.raises(ResultError, match="must be a Result class"):
        load_result(tmp_path / "r.parquet")


def test_kind_without_package_or_plot(tmp_path: Path) -> None:
    assert find_plot("nosuchpackage.thing") is None
    assert find_plot("errors.input") is None  # interp.errors is no package
    assert type(load_result(make().save(tmp_path / "r.parquet"))) is Result


def test_html_shows_first_rows_and_escapes() -> None:
    frame = pd.DataFrame({"layer": range(30), "token": ["<script>alert(1)</script>", "\u202e", *"a" * 28]})
    shown = make(frame)._repr_html_()
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown
    assert "\\u202e" in shown
    assert "showing 20 of 30 rows" in shown
    cells = table_html(pd.DataFrame({"<b>": [1.23456789, np.nan], "y": pd.Series([pd.NA, "\ud800"], dtype=object)}))
    assert "&lt;b&gt;" in cells
    assert "1.235" in cells
    assert cells.count("–") == 2
    assert "\\ud800" in cells
