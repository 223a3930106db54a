"""`interp sinks …` on a tiny model saved in a folder: tables, JSON, files, resumed folders, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_hf, tiny_tokenizer
from typer.testing import CliRunner

from interp import load_result
from interp.cli import app
from interp.errors import InputError
from interp.sinks import Scan

WORDS = ["the", "water", "of", "sea", "is", "red", "a", "king", "in", "old", "sun", "dog", "new", "code", "keys", "tea"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_hf("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two domains of files: --domain and its value, twice."""
    root = tmp_path_factory.mktemp("texts")
    arguments = []
    for number, name in enumerate(("one", "two")):
        for at in range(6):
            words = [WORDS[(at * 5 + step * (3 + 2 * number)) % len(WORDS)] for step in range(40)]
            (root / f"{name}-{at}.txt").write_text(" ".join(words))
        arguments += ["--domain", f"{name}={root}/{name}-*.txt"]
    return arguments


def run(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def rows(result: Any) -> list[dict[str, Any]]:
    lines = [line for line in result.stdout.splitlines() if line.startswith("[{")]
    return json.loads(lines[-1])


def test_domains() -> None:
    names = [row["domain"] for row in rows(run("sinks", "domains", "--json"))]
    assert {"code", "editorials", "random"} <= set(names)


def test_scan_prints_heads_and_saves(folder: Path, domains: list[str], tmp_path: Path) -> None:
    out = tmp_path / "scan.parquet"
    size = ["--length", 16, "--texts", 5, "--bos", "yes"]
    result = run("sinks", "scan", *domains, *size, "--model", folder, "--out", out, "--top", 4, "--json")
    found = rows(result)
    assert len(found) == 4
    assert {"layer", "head", "label", "evidence"} <= set(found[0])
    assert "one" in found[0]["evidence"]
    scanned = load_result(out)
    assert isinstance(scanned, Scan)
    assert scanned.domains == ["one", "two"]
    assert scanned.frame["n_tokens"].unique().tolist() == [16]
    table = run("sinks", "scan", *domains, *size, "--model", folder, "--engine", "eager", "--shuffle")
    assert "evidence" in table.stdout


def test_scan_into_a_folder_resumes(folder: Path, domains: list[str], tmp_path: Path) -> None:
    command = ["sinks", "scan", *domains, "--length", 16, "--texts", 5, "--model", folder, "--out", tmp_path / "run"]
    run(*command)
    shards = sorted((tmp_path / "run").glob("*.parquet"))
    assert shards
    kept = shards[0].stat().st_mtime_ns
    shards[-1].unlink()
    run(*command)
    assert shards[-1].exists()
    assert shards[0].stat().st_mtime_ns == kept


def test_ablate_prints_arms(folder: Path, domains: list[str], tmp_path: Path) -> None:
    size = ["--length", 12, "--texts", 3, "--model", folder, "--json"]
    found = rows(
        run("sinks", "ablate", "--head", "1:2", "--random", 2, *domains, *size, "--out", tmp_path / "a.parquet")
    )
    assert {(row["layer"], row["head"]) for row in found if row["arm"] == "head"} == {(1, 2)}
    assert sum(row["arm"] == "random" for row in found) == 2 * 2
    assert load_result(tmp_path / "a.parquet").kind == "sinks.ablate"
    every = rows(run("sinks", "ablate", "--all", "--mode", "mean", *domains, *size))
    assert len(every) == 2 * 12


def test_evict_prints_arms(folder: Path, domains: list[str]) -> None:
    size = ["--length", 30, "--texts", 3, "--model", folder, "--json"]
    found = rows(run("sinks", "evict", "--window", 8, "--sinks", 2, *domains, *size))
    assert {"full", "window", "sinks", "control"} <= {row["arm"] for row in found}


def test_train_toy_resumes(tmp_path: Path) -> None:
    command = ["sinks", "train-toy", "--steps", 2, "--out", tmp_path / "toy", "--json"]
    first = rows(run(*command))
    assert {row["step"] for row in first} == {2}
    assert rows(run(*command)) == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ablate"], "--head LAYER:HEAD, or take every head"),
        (["ablate", "--all", "--head", "1:2"], "or take every head"),
        (["ablate", "--head", "12"], "expected LAYER:HEAD"),
        (["ablate", "--head", "a:b"], "expected LAYER:HEAD"),
        (["ablate", "--head", "1:9"], "head 9 is out of range"),
        (["scan", "--domain", "nothing"], "nothing"),
        (["scan", "--domain", "mine=no-such-folder/*.txt"], "no-such-folder"),
        (["scan", "--bos", "two tokens"], "two tokens"),
        (["train-toy", "--preset", "huge"], "huge"),
    ],
)
def test_bad_input(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    model = [] if arguments[0] == "train-toy" else ["--model", str(folder), "--length", "12", "--texts", "2"]
    with pytest.raises(InputError, match=message):
        run("sinks", *arguments, *model, "--out", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
