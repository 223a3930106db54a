"""The command line on a tiny model saved in a folder: tables, JSON, files, errors, and nothing heavy at start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_hf, tiny_tokenizer
from typer.testing import CliRunner

from interp import load_result
from interp.cli import app, main

HEAVY = ("torch", "transformers", "pandas", "pyarrow", "plotly", "numpy", "transformer_lens", "nnsight", "captum")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_hf("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def run(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_help_and_import_load_nothing_heavy() -> None:
    code = f"import sys, interp, interp.cli\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_console_script_prints_help_and_version() -> None:
    program = Path(sys.executable).parent / "interp"
    assert "neurons" in subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    assert subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip() == "0.1.0"


def test_decode_then_find_then_compare(folder: Path, tmp_path: Path) -> None:
    up, down = tmp_path / "up.parquet", tmp_path / "down.parquet"
    rows = json.loads(run("neurons", "decode", "--model", folder, "--out", up, "--json").stdout)
    assert [row["layer"] for row in rows] == [0, 1, 2]
    run("neurons", "decode", "--model", folder, "--site", "down", "--top-k", 5, "--out", down)
    atlas = load_result(up)
    assert atlas.provenance.parameters["top_k"] == 10
    found = run("neurons", "find", " dog", "--atlas", up, "--top", 3, "--json")
    assert json.loads(found.stdout) == json.loads(
        atlas.find(" dog", top=3).to_json(orient="records", force_ascii=False)
    )
    assert "' dog'" in found.stderr
    assert json.loads(run("neurons", "find", " dog", "--model", folder, "--top", 3, "--json").stdout) == json.loads(
        found.stdout
    )
    both = json.loads(run("neurons", "compare", up, down, "--out", tmp_path / "c.parquet", "--json").stdout)
    assert both[0]["layer"] == -1
    assert load_result(tmp_path / "c.parquet").kind == "neurons.compare"


def test_stream_writes_shards_and_equals_decode(folder: Path, tmp_path: Path) -> None:
    run("neurons", "decode", "--model", folder, "--stream", "--out", tmp_path / "shards")
    run("neurons", "decode", "--model", folder, "--out", tmp_path / "up.parquet")
    streamed, loaded = load_result(tmp_path / "shards"), load_result(tmp_path / "up.parquet")
    assert streamed.frame["token_id"].equals(loaded.frame["token_id"])


def test_clamp_shows_controls(folder: Path, tmp_path: Path) -> None:
    arguments = [
        "neurons",
        "clamp",
        "the dog is",
        "--model",
        folder,
        "--layer",
        1,
        "--neuron",
        3,
        "--max-new-tokens",
        4,
    ]
    rows = json.loads(run(*arguments, "--value", 90, "--value", 0.0, "--out", tmp_path / "c.parquet", "--json").stdout)
    assert [row["arm"] for row in rows] == ["none", "clamp", "clamp", "random", "random"]
    assert rows[3]["neuron"] not in (3, -1)
    from interp import clamp, load_model

    model = load_model(str(folder), device="cpu")
    assert rows[0]["text"] == model.generate("the dog is", max_new_tokens=4)
    with clamp(model, layer=1, neuron=3, value=90):
        assert rows[1]["text"] == model.generate("the dog is", max_new_tokens=4)
    assert load_result(tmp_path / "c.parquet").frame["text"].tolist() == [row["text"] for row in rows]


def test_report_from_saved_results(folder: Path, tmp_path: Path) -> None:
    run("neurons", "decode", "--model", folder, "--out", tmp_path / "up.parquet")
    run("report", tmp_path / "up.parquet", "--out", tmp_path / "r.html", "--title", "A <b>title</b>")
    html = (tmp_path / "r.html").read_text()
    assert "A &lt;b&gt;title&lt;/b&gt;" in html
    assert "<script>alert" not in html


def test_tables_keep_brackets_and_control_characters_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    import pandas as pd

    from interp.cli import show

    show(pd.DataFrame({"token": ["[/bold]", "\x1b[31mred", " a"], "p": [0.123456, 1.0, 0.5]}))
    out = capsys.readouterr().out
    assert "[/bold]" in out
    assert "\x1b" not in out
    assert "␣a" in out
    assert "0.1235" in out


def test_tables_show_what_is_missing_as_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    import pandas as pd

    from interp.cli import show

    show(pd.DataFrame({"low": [float("nan"), 0.5], "known": pd.array([pd.NA, True], dtype="boolean")}))
    out = capsys.readouterr().out
    assert out.count("–") == 2
    assert "nan" not in out.lower()
    assert "<NA>" not in out


def test_resources_list_names_the_embedded_model() -> None:
    assert "smollm2-135m-instruct" in run("resources", "list").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["neurons", "decode", "--model", "no/such/folder"], "no model at"),
        (["neurons", "find", " water", "--atlas", "missing.parquet"], "missing.parquet"),
        (["neurons", "decode", "--stream"], "--out"),
        (["resources", "fetch", "nothing"], "nothing"),
    ],
)
def test_errors_are_one_line_with_status_1(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["interp", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert message in str(ended.value.code)
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_says_so_and_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import interp.neurons.decoding as decoding

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "decode_layer", interrupted)
    out = tmp_path / "up.parquet"
    monkeypatch.setattr(sys, "argv", ["interp", "neurons", "decode", "--model", str(folder), "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert list(tmp_path.iterdir()) == []
