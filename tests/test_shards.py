"""A sharded run survives kill -9, damage and a second process, and refuses another run's folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import interp.shards
from interp.errors import InputError, ResultError
from interp.results import Column, Provenance, Result, load_result
from interp.shards import ShardedRun

COLUMNS = (Column("x", "float32", "", "a number"), Column("token", "category", "", "a token"))
UNITS = [f"layer/{index}" for index in range(6)]
PROVENANCE = Provenance(model="m", fingerprint="abc", device="cuda:0", seed=1, parameters={"k": 3})

SCRIPT = """
import sys, time
sys.path.insert(0, {here!r})
from test_shards import COLUMNS, PROVENANCE, UNITS, rows
from interp.shards import ShardedRun
run = ShardedRun({folder!r}, "nosuchpackage.thing", COLUMNS, PROVENANCE, UNITS, {{"t": 1}})
print("opened", flush=True)
for unit in run.missing():
    time.sleep({pause})
    run.write(unit, rows(unit))
    print(unit, flush=True)
{after}
"""


def rows(unit: str) -> pd.DataFrame:
    rng = np.random.default_rng(UNITS.index(unit))
    return pd.DataFrame({"x": rng.random(2000), "token": [f"{unit}-{index % 7}" for index in range(2000)]})


def open_run(folder: Path, **changes: object) -> ShardedRun:
    values = {"kind": "nosuchpackage.thing", "columns": COLUMNS, "provenance": PROVENANCE, "units": UNITS}
    return ShardedRun(folder, **{"attachments": {"t": 1}, **values, **changes})  # type: ignore[arg-type]


def start(folder: Path, pause: float = 0.0, after: str = "") -> "subprocess.Popen[str]":
    code = SCRIPT.format(here=str(Path(__file__).parent), folder=str(folder), pause=pause, after=after)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run = open_run(folder)
    for unit in run.missing():
        run.write(unit, rows(unit))
    run.finish()
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_result_is_the_shards_in_order(whole: Path) -> None:
    result = load_result(whole)
    frame = pd.concat([rows(unit) for unit in UNITS], ignore_index=True)
    np.testing.assert_array_equal(result.frame["x"], frame["x"].astype("float32"))
    assert result.frame["token"].astype(object).tolist() == frame["token"].tolist()
    assert str(result.frame["token"].dtype) == "category"
    assert result.attachments == {"t": 1}
    assert result.provenance.wall_time > 0
    assert replace(result.provenance, wall_time=0.0) == PROVENANCE
    again = open_run(whole)
    assert again.missing() == []
    assert again.finish().equals(result, check_provenance=True)


def test_kill_9_and_resume(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder, pause=0.05)
    assert process.stdout is not None
    seen = [process.stdout.readline() for _ in range(3)]  # opened, two shards
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert seen[0] == "opened\n"
    with pytest.raises(ResultError, match=r"unfinished: \d of 6 units are missing.*layer/5.*run the same command"):
        load_result(folder)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert 2 <= len(kept) < 6
    run = open_run(folder)
    assert len(run.missing()) == 6 - len(kept)
    for unit in run.missing():
        run.write(unit, rows(unit))
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    assert run.finish().equals(load_result(whole))
    assert shard_bytes(folder) == shard_bytes(whole)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(whole))


def test_killed_at_any_moment(tmp_path: Path, whole: Path) -> None:
    """Killed in the middle of a write, again and again, until the run is done; a lock tells its leftovers as stale."""
    folder = tmp_path / "run"
    slow = "time.sleep(60)"
    for moment in (0.0, 0.004, 0.011, 0.02):
        process = start(folder, after=slow)
        assert process.stdout is not None
        assert process.stdout.readline() == "opened\n"
        time.sleep(moment)
        process.kill()
        process.wait()
    run = open_run(folder)
    for unit in run.missing():
        run.write(unit, rows(unit))
    assert run.finish().equals(load_result(whole))
    assert shard_bytes(folder) == shard_bytes(whole)
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]


def test_two_processes_on_one_folder(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    check = "assert run.missing() == []; run.finish()"
    processes = [start(folder, pause=0.01, after=check) for _ in range(2)]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert load_result(folder).equals(load_result(whole))
    assert shard_bytes(folder) == shard_bytes(whole)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(whole))


@pytest.mark.parametrize("damage", ["truncate", "empty", "remove", "flip", "swap"])
def test_a_damaged_shard_is_made_again(copy: Path, whole: Path, damage: str) -> None:
    path = sorted(copy.glob("*.parquet"))[2]
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "remove":
        path.unlink()
    elif damage == "flip":
        path.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    else:
        path.write_bytes(sorted(copy.glob("*.parquet"))[3].read_bytes())
    with pytest.raises(ResultError, match=r"1 of 6 units are missing or damaged \('layer/2'\)"):
        load_result(copy)
    run = open_run(copy)
    assert run.missing() == ["layer/2"]
    with pytest.raises(ResultError, match="unfinished"):
        run.finish()
    run.write("layer/2", rows("layer/2"))
    assert run.missing() == []
    assert run.finish().equals(load_result(whole))
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"provenance": replace(PROVENANCE, fingerprint="xyz")}, "fingerprint is 'abc' there and 'xyz' here"),
        ({"provenance": replace(PROVENANCE, parameters={"k": 4})}, "parameters.k is 3 there and 4 here"),
        ({"provenance": replace(PROVENANCE, seed=2)}, "seed is 1 there and 2 here"),
        ({"provenance": replace(PROVENANCE, device="cpu")}, "device is 'cuda' there and 'cpu' here"),
        ({"kind": "other.thing"}, "kind is 'nosuchpackage.thing' there and 'other.thing' here"),
        ({"columns": (replace(COLUMNS[0], dtype="float64"), COLUMNS[1])}, "columns is"),
        ({"units": UNITS[:2]}, "units is"),
        ({"attachments": {}}, "attachments is"),
    ],
)
def test_a_folder_of_another_run_is_refused(copy: Path, changes: dict, message: str) -> None:
    before = shard_bytes(copy)
    with pytest.raises(ResultError, match=message) as caught:
        open_run(copy, **changes)
    assert "another folder" in str(caught.value)
    assert shard_bytes(copy) == before


def test_what_does_not_change_numbers_may_change(copy: Path) -> None:
    provenance = replace(PROVENANCE, model="renamed", device="cuda:1", command="other", created="later")
    assert open_run(copy, provenance=provenance).missing() == []


def test_foreign_folders(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ResultError, match=r"thesis\.txt.*new folder"):
        open_run(tmp_path)
    with pytest.raises(ResultError, match="not a folder of results"):
        load_result(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]
    for text, message in (("{", "damaged"), ("{}", "not of a sharded run"), ("[1]", "not of a sharded run")):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ResultError, match=message):
            open_run(tmp_path)


def test_newer_and_damaged_folders(copy: Path) -> None:
    (copy / "attachments.json.zlib").write_bytes(b"x")
    with pytest.raises(ResultError, match=r"attachments\.json\.zlib is missing or damaged"):
        load_result(copy)
    open_run(copy)
    assert load_result(copy).attachments == {"t": 1}
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format": 9}))
    with pytest.raises(ResultError, match=r"version 9.*upgrade"):
        load_result(copy)
    del manifest["run"]["kind"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ResultError, match="damaged"):
        load_result(copy)


def test_input_is_checked(tmp_path: Path) -> None:
    for units in ([], ["a", "a"]):
        with pytest.raises(InputError, match="different names"):
            open_run(tmp_path, units=units)
    run = open_run(tmp_path)
    with pytest.raises(InputError, match="not a unit"):
        run.write("nowhere", rows(UNITS[0]))
    with pytest.raises(InputError, match="'token'"):
        run.write(UNITS[0], rows(UNITS[0])[["x"]])
    assert list(tmp_path.glob("*.parquet")) == []


def test_names_of_units_cannot_leave_the_folder(tmp_path: Path) -> None:
    units = ["../../evil", "a b", "a-b", "", "ü" * 300]
    run = open_run(tmp_path / "run", units=units)
    for unit in units:
        run.write(unit, rows(UNITS[0]).head(1))
    assert len(list((tmp_path / "run").glob("*.parquet"))) == 5
    assert os.listdir(tmp_path) == ["run"]
    assert len(run.finish().frame) == 5


def test_empty_shards_and_own_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    real = interp.shards.build_result
    monkeypatch.setattr(interp.shards, "build_result", lambda *a: built.append(a[0]) or real(*a))
    run = open_run(tmp_path, units=["a", "b"])
    run.write("a", rows(UNITS[0]).head(0))
    run.write("b", rows(UNITS[0]).head(3))
    result = run.finish()
    assert isinstance(result, Result)
    assert len(result.frame) == 3
    assert str(result.frame["x"].dtype) == "float32"
    assert built == ["nosuchpackage.thing"]
    loaded = load_result(result.save(tmp_path.parent / f"{tmp_path.name}.parquet"))
    assert loaded.equals(result, check_provenance=True)
