"""`interp conflict …` on a tiny model saved in a folder: tables, JSON, files, resumed folders, errors."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conflict.chat_models import save_chat_model
from conflict.scripted_answers import answer, script
from typer.testing import CliRunner

from interp import load_result
from interp.cli import app
from interp.conflict import adapters, answers, focal_layers
from interp.errors import InputError, InterpError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "tiny-chat")


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch)


def run(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def parsed(result: Any) -> Any:
    lines = [line for line in result.stdout.splitlines() if line.startswith(("[{", "{"))]
    return json.loads(lines[-1])


SOME = ["--family", "list", "--wording", "simple"]


def test_families() -> None:
    rows = parsed(run("conflict", "families", "--json"))
    assert len(rows) == 16
    assert {row["family"] for row in rows if row["held out"]} == {"json", "words"}


def test_follow_prints_rules_and_saves(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.parquet"
    rows = parsed(run("conflict", "follow", "--pairs", 6, *SOME, "--model", folder, "--out", out, "--json"))
    by_rule = {row["rule"]: row for row in rows}
    assert set(by_rule) == {"list", "paragraph"}
    assert by_rule["list"]["system"] == 0
    assert by_rule["list"]["n"] == 3
    assert set(load_result(out).frame["prompt"].astype(str)) == {"none", "system", "user", "conflict"}
    table = run("conflict", "follow", "--pairs", 6, *SOME, "--model", folder, "--out", tmp_path / "resumes")
    assert "paragraph" in table.stdout
    assert load_result(tmp_path / "resumes").equals(load_result(out))


def test_localize_prints_layers_and_heads_and_draws(folder: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "drift", tmp_path / "drift.html"
    result = run(
        *("conflict", "localize", "--pairs", 8, *SOME, "--model", folder, "--out", out, "--plot", page, "--json"),
        *("--patch", 4, "--heads", 3),
    )
    found = parsed(result)
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2]
    assert all("recovery" in row for row in found["layers"])
    assert len(found["heads"]) == 3
    assert found["focal_layers"] == [row["layer"] for row in found["layers"] if row["focal"]]
    assert "focal layers:" in result.stderr
    assert "plotly" in page.read_text()
    assert load_result(out).kind == "conflict.localize"
    published = run(
        *(
            "conflict",
            "localize",
            "--pairs",
            4,
            *SOME,
            "--model",
            folder,
            "--align",
            "truncate",
            "--consistent",
            "system",
        ),
        *("--setting", "peer"),
    )
    assert "excess" in published.stdout


def test_score_by_two_judges_and_their_agreement(folder: Path, tmp_path: Path) -> None:
    arguments = ["conflict", "score", "--pairs", 4, *SOME, "--model", folder, "--out", tmp_path / "scores"]
    found = parsed(run(*arguments, "--judge", "rule", "--judge", "local", "--json"))
    assert {row["what"] for row in found["scores"]} >= {"cras", "constraint_compliance"}
    assert len({row["judge"] for row in found["scores"]}) == 2
    assert found["agreement"]
    # The answers that a run left are graded again, by other weights.
    again = parsed(
        run(
            *("conflict", "score", "--answers", tmp_path / "scores" / "answers", "--json"),
            *("--weight", "constraint_compliance=1", "--by", "family"),
        )
    )
    rows = {row["what"]: row["mean"] for row in again["scores"]}
    assert rows["cras"] == rows["constraint_compliance"]
    with pytest.raises(InputError, match="--pairs, --family choose what is answered here; leave them out"):
        run("conflict", "score", "--answers", tmp_path / "scores" / "answers", "--pairs", 3, "--family", "list")


def test_align_trains_and_measures(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from interp.conflict.aligning import PRESETS
    from interp.conflict.sail_trainer import AlignSettings

    monkeypatch.setitem(PRESETS, "laptop", AlignSettings(epochs=1.0, batch_size=2, gradient_accumulation=1))
    arguments = ["conflict", "align", "--pairs", 6, "--validation", 2, "--measure", 4, *SOME, "--model", folder]
    (tmp_path / "notes.txt").write_text("The sea is cold. It rains.")
    arguments += ["--anchors", f"mine={tmp_path / 'notes.txt'}"]
    rows = parsed(run(*arguments, "--out", tmp_path / "run", "--credit", "attention", "--json"))
    # The scripted model does what the user asks, whatever was trained.
    assert {(row["family"], row["prompt"], row["change"], row["n"]) for row in rows} == {
        (name, prompt, 0.0, 4) for name in ("list", "all") for prompt in ("agree", "conflict")
    }
    assert {(row["before"], row["after"]) for row in rows if row["prompt"] == "conflict"} == {(0.0, 0.0)}
    assert (tmp_path / "run" / "run" / "adapter" / "adapter_model.safetensors").exists()
    followed = run(
        *(
            "conflict",
            "follow",
            "--pairs",
            2,
            *SOME,
            "--model",
            folder,
            "--adapter",
            tmp_path / "run" / "run" / "adapter",
        )
    )
    assert "list" in followed.stdout
    # A second call finds what is there.
    assert parsed(run(*arguments, "--out", tmp_path / "run", "--credit", "attention", "--json")) == rows
    # Layers by hand, without measuring; the same folder, so that the pairs are there.
    made = (tmp_path / "run" / "preferences" / "manifest.json").stat().st_mtime_ns
    table = run(
        *("conflict", "align", "--pairs", 6, "--validation", 2, "--measure", 0, *SOME, "--model", folder),
        *(
            "--out",
            tmp_path / "run",
            "--run",
            "other",
            "--epochs",
            0.5,
            "--batch-size",
            1,
            "--learning-rate",
            0.001,
            "--layer",
            0,
            "--layer",
            2,
            "--credit",
            "none",
            "--anchors",
            "none",
        ),
    )
    assert "loss" in table.stdout
    assert (tmp_path / "run" / "preferences" / "manifest.json").stat().st_mtime_ns == made
    record = json.loads((tmp_path / "run" / "other" / "run.json").read_text())
    assert record["layers"] == [0, 2]
    assert [record["settings"][name] for name in ("epochs", "batch_size", "learning_rate")] == [0.5, 1, 0.001]
    # Layers by patching: one of three, the one that the analysis of what was patched names.
    chosen = run(
        *("conflict", "align", "--pairs", 4, "--validation", 0, "--measure", 0, *SOME, "--model", folder),
        *("--out", tmp_path / "patched", "--select", "patch", "--credit", "none", "--anchors", "none"),
    )
    changes = load_result(tmp_path / "patched" / "patch").frame
    changes = (changes["logdiff_patched"] - changes["logdiff_conflict"]).groupby(changes["layer"]).mean()
    assert f"layers: {changes.idxmax()}\n" in chosen.stderr
    assert not (tmp_path / "patched" / "drift").exists()
    # All layers, by default, with as many parameters as one of rank 8.
    run(
        *("conflict", "align", "--pairs", 4, "--validation", 0, "--measure", 0, *SOME, "--model", folder),
        *("--out", tmp_path / "patched", "--run", "every", "--credit", "none", "--anchors", "none"),
    )
    record = json.loads((tmp_path / "patched" / "every" / "run.json").read_text())
    assert (record["layers"], record["rank"], record["lora_alpha"]) == ([0, 1, 2], [3, 2, 3], 6.0)
    for spec, message in (("random", "made of a vocabulary's tokens"), ("poems", "there is no domain 'poems'")):
        with pytest.raises(InputError, match=message):
            run("conflict", "align", *SOME, "--model", folder, "--out", tmp_path / "no", "--anchors", spec)


def test_align_trains_the_families_that_are_followed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "conflict",
        "align",
        "--pairs",
        4,
        "--validation",
        0,
        "--measure",
        2,
        "--layer",
        1,
        "--anchors",
        "none",
    ]
    arguments += ["--wording", "simple", "--credit", "none", "--model", folder, "--json"]
    said, put_on = answers.answer_ids, adapters.adapted
    on: list[Path] = []

    @contextmanager
    def noted(model: Any, adapter: Path) -> Any:
        with put_on(model, adapter):
            on.append(adapter)
            yield
            on.clear()

    monkeypatch.setattr(adapters, "adapted", noted)

    def heeds(model: Any, encoded: Any, **rest: Any) -> list[Any]:
        """With an adapter it obeys the system instead."""
        if not on:
            return said(model, encoded, **rest)
        asked = [model.decode(ids, skip_special_tokens=False).lower() for ids in encoded]
        asked = [text[: text.index("user")].replace("system", "user") for text in asked]
        return [answer(model, model.tokenizer(text)["input_ids"]) for text in asked]

    monkeypatch.setattr(answers, "answer_ids", heeds)
    # By itself it writes a list when the user asks for one, and prose whatever else is asked.
    result = run(*arguments, "--out", tmp_path / "run")
    assert "families: list\n" in result.stderr
    rows = {(row["family"], row["prompt"]): (row["before"], row["after"], row["change"]) for row in parsed(result)}
    assert rows[("list", "conflict")] == rows[("all", "conflict")] == (0.0, 1.0, 1.0)
    assert rows[("list", "agree")] == rows[("all", "agree")] == (1.0, 1.0, 0.0)
    assert set(load_result(tmp_path / "run" / "preferences").frame["family"]) == {"list"}
    assert set(load_result(tmp_path / "run" / "follow").frame["part"]) == {"training"}

    # The layers are chosen on the same families.
    at = arguments.index("--layer")
    arguments[at : at + 2] = []
    arguments[arguments.index("--measure") + 1] = 0
    assert "families: list\n" in run(*arguments, "--select", "drift", "--out", tmp_path / "drifts").stderr
    assert set(load_result(tmp_path / "drifts" / "drift").frame["family"]) == {"list"}

    # So they are by a file that says where it drifts; another file is refused before anything is measured.
    arguments += ["--family", "list"]
    chosen = run(*arguments, "--drift", tmp_path / "drifts" / "drift", "--out", tmp_path / "told").stderr
    assert not (tmp_path / "told" / "drift").exists()
    assert f"layers: {', '.join(map(str, focal_layers(load_result(tmp_path / 'drifts' / 'drift'))))}\n" in chosen
    with pytest.raises(InputError, match=r"conflict\.localize"):
        run(*arguments, "--drift", tmp_path / "run" / "preferences", "--out", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    arguments[-2:] = []

    def prose(model: Any, encoded: Any, **_: Any) -> list[Any]:
        return [answer(model, model.tokenizer("user")["input_ids"]) for _ in encoded]

    monkeypatch.setattr(answers, "answer_ids", prose)
    with pytest.raises(InputError, match=r"obeys no rule more often when the user asks .* name families with --family"):
        run(*arguments, "--out", tmp_path / "deaf")
    assert not (tmp_path / "deaf" / "preferences").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["follow", "--family", "rhyme"], "no family 'rhyme'"),
        (["follow", "--part", "middle"], "part='middle'"),
        (["follow", "--tasks", "none.jsonl"], "cannot read none.jsonl"),
        (
            ["follow", "--pairs", "2", "--template", "none.jinja"],
            "--template 'none.jinja'; expected chatml, plain or a file",
        ),
        (["localize", "--pairs", "2", "--align", "middle"], "middle"),
        (["localize", "--pairs", "2", "--control", "none"], "paraphrase, other"),
        (["score", "--judge", "api"], "--judge api needs --base-url"),
        (["score", "--judge", "boss"], "--judge boss; expected rule, local or api"),
        (["score", "--weight", "goal"], "--weight 'goal'; expected DIMENSION=λ"),
        (["align", "--out", "x", "--preset", "boss", "--pairs", "2"], "boss"),
        (["align", "--out", "x", "--select", "boss"], "--select 'boss'; expected drift, patch or all"),
        (["align", "--out", "x", "--select", "patch", "--layer", "1"], "give one of the two"),
        (
            ["align", "--out", "x", "--select", "patch", "--drift", "d.parquet"],
            "--drift is not used with --select patch",
        ),
        (["align", "--out", "x", "--layer", "1", "--drift", "d.parquet"], "--drift is not used with --layer"),
        (["align", "--out", "x", "--run", "drift"], "--run 'drift'; expected a folder's name"),
        (["align", "--out", "x", "--run", "../y"], "--run '../y'; expected a folder's name"),
        (["align", "--out", "x", "--run", ""], "--run ''; expected a folder's name"),
        (["align", "--out", "x", "--gradient-accumulation", "0"], "gradient_accumulation=0"),
        (["align", "--out", "x", "--credit", "boss"], "boss"),
        (["align", "--out", "x", "--layer", "99"], "99"),
        (["align", "--out", "x", "--rank", "0"], "rank=0"),
        (["align", "--out", "x", "--pairs", "0"], "n=0; expected at least 1 pair"),
        (["align", "--out", "x", "--batch-size", "0"], "batch_size=0"),
    ],
)
def test_bad_options_say_what_is_expected(
    folder: Path, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InterpError, match=message):
        run("conflict", *arguments, "--model", folder)
    assert not list(tmp_path.iterdir())  # said before anything was measured


def test_answers_of_other_tasks_need_their_file(folder: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    rows = [{"id": f"mine-{at}", "part": "held-out", "text": f"What is number {at}?"} for at in range(3)]
    tasks.write_text("\n".join(map(json.dumps, rows)))
    run(
        "conflict",
        "follow",
        "--pairs",
        2,
        *SOME,
        "--model",
        folder,
        "--tasks",
        tasks,
        "--out",
        tmp_path / "mine.parquet",
    )
    with pytest.raises(InputError, match=r"task 'mine-.' of the answers is not among the tasks"):
        run("conflict", "score", "--answers", tmp_path / "mine.parquet")
    found = parsed(run("conflict", "score", "--answers", tmp_path / "mine.parquet", "--tasks", tasks, "--json"))
    assert found["scores"]


def test_a_model_without_chat_template_is_offered_one(tmp_path: Path) -> None:
    path = save_chat_model(tmp_path / "plain", None)
    arguments = ["conflict", "follow", "--pairs", 2, *SOME, "--model", path]
    with pytest.raises(InputError, match="has no chat template; give template='chatml'"):
        run(*arguments)
    assert "list" in run(*arguments, "--template", "plain").stdout
