"""`interp agreement` on tiny models saved in folders: tables, JSON, files, the report, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_hf, tiny_tokenizer
from typer.testing import CliRunner

from interp import load_model, load_result
from interp.agreement import Continuation, NextToken, Verbalizer, compare
from interp.cli import app, main
from interp.errors import InputError, ResultError

TEXT, OTHER = " water of the sea is red", " the old king is in the sea"
QUICK = ["--method", "attention", "--method", "leave_one_out", "--method", "random"]
LABELS = ["--label", "pet= dog", "--label", "drink= tea"]
CLASSES = {"pet": " dog", "drink": " tea"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_hf("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(str(folder), device="cpu")


def run(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, ["agreement", *(str(argument) for argument in arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def tables(result: Any) -> dict[str, list[dict[str, Any]]]:
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))


def scores(folder: Path) -> list[float]:
    return load_result(folder / "explanations.parquet").frame["score"].tolist()


def lines(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return path


def test_tables_for_people(folder: Path) -> None:
    result = run("--text", TEXT, "--text", OTHER, "--model", folder)
    for title in ("Explained", "Agreement: kendall", "pairs that agree most, of 36", "Faithfulness", "Costs"):
        assert title in result.stdout
    assert "by chance 0" in result.stdout
    assert "Left out" not in result.stdout
    for name in ("attention:-1", "flow", "integrated_gradients", "kernel_shap", "recency", "comprehensiveness"):
        assert name in result.stdout
    assert "␣water of the sea is red" in result.stdout


def test_json_and_files_are_what_compare_gives(folder: Path, model: Any, tmp_path: Path) -> None:
    out = tmp_path / "results"
    result = run("--text", TEXT, "--text", OTHER, "--model", folder, *QUICK, "--out", out, "--json")
    wanted = compare(model, [TEXT, OTHER], ["attention", "leave_one_out", "random"])
    found = tables(result)
    assert list(found) == ["explained", "agreement", "faithfulness", "costs", "refused"]
    assert [row["text"] for row in found["explained"]] == [TEXT, OTHER]
    assert [row["units"] for row in found["explained"]] == [6, 7]
    assert found["explained"][0]["f_x"] == pytest.approx(wanted.explanations.frame["value"].iloc[0], abs=1e-6)
    means = [row["mean"] for row in found["agreement"]]
    assert means == pytest.approx(wanted.agreement.frame["mean"].tolist(), abs=1e-6, nan_ok=True)
    assert [row["method"] for row in found["costs"]] == ["attention", "leave_one_out", "random"]
    assert {row["measure"] for row in found["faithfulness"]} == {"comprehensiveness", "sufficiency", "leave_one_out"}
    assert found["refused"] == []
    kinds = {"explanations": "explain", "agreement": "pairwise_agreement", "faithfulness": "faithfulness"}
    for name, kind in kinds.items():
        assert load_result(out / f"{name}.parquet").kind == f"agreement.{kind}"
    assert scores(out) == pytest.approx(wanted.explanations.frame["score"].tolist(), abs=1e-6)


def test_out_is_resumed_and_belongs_to_one_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results"
    common = ["--text", TEXT, "--model", folder, "--method", "rollout", "--out", out]
    run(*common, "--method", "leave_one_out")
    before = scores(out)
    (out / "explanations.parquet").unlink()
    next((out / "runs").glob("*rollout*")).unlink()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("interp.agreement.perturbations._ask_and_answer", never)
    run(*common, "--method", "leave_one_out")
    assert scores(out) == pytest.approx(before, abs=1e-6)
    with pytest.raises(ResultError):
        run(*common, "--method", "recency")


@pytest.mark.parametrize(
    ("arguments", "examples", "options"),
    [
        (["--target", "probability", "--units", "words"], [TEXT], {"target": "probability", "units": "words"}),
        (["--baseline", "zero", "--special"], [TEXT], {"baseline": "zero", "special": True}),
        (["--baseline", " dog"], [TEXT], {"baseline": " dog"}),
        (["--baseline", "7"], [TEXT], {"baseline": 7}),
        (["--draws", "3", "--seed", "5"], [TEXT], {"seeds": [5, 6, 7]}),
        (
            ["--method", "kernel_shap", "--option", "kernel_shap.n_samples=20"],
            [TEXT],
            {"more": ["kernel_shap"], "options": {"kernel_shap": {"n_samples": 20}}},
        ),
        (
            ["--method", "integrated_gradients", "--option", "integrated_gradients.tolerance=0.5"],
            [TEXT],
            {"more": ["integrated_gradients"], "options": {"integrated_gradients": {"tolerance": 0.5}}},
        ),
        (["--continuation", " red king"], [(TEXT, " red king")], {"task": Continuation()}),
        (
            ["--continuation", " king", "--task", "next_token", "--of", "gold"],
            [(TEXT, " king")],
            {"task": NextToken(), "of": "gold"},
        ),
        (LABELS, [TEXT], {"task": Verbalizer(CLASSES)}),
        (
            [
                *(*LABELS, "--template", "{text} ?", "--instruction", "is"),
                *("--shot", "drink= water = red", "--target", "logit_difference"),
            ],
            [TEXT],
            {
                "task": Verbalizer(CLASSES, "{text} ?", shots=((" water = red", "drink"),), instruction="is"),
                "target": "logit_difference",
            },
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) and isinstance(value[0], str) else "",
)
def test_options_reach_compare(
    folder: Path, model: Any, tmp_path: Path, arguments: list[str], examples: list[Any], options: dict[str, Any]
) -> None:
    run("--text", TEXT, "--model", folder, *QUICK, *arguments, "--out", tmp_path)
    methods = ["attention", "leave_one_out", "random", *options.pop("more", [])]
    wanted = compare(model, examples, methods, **options)
    assert scores(tmp_path) == pytest.approx(wanted.explanations.frame["score"].tolist(), abs=1e-5)


def test_measures_and_k(folder: Path, tmp_path: Path) -> None:
    common = ["--text", TEXT, "--text", OTHER, "--model", folder, *QUICK, "--out", tmp_path, "--normalised", "1"]
    result = run(*common, "--measure", "feature", "--measure", "kendall", "--k", 2, "--k", 1, "--rank-by", "signed")
    assert "Agreement: feature of the top 2, ranked by score;" in result.stdout
    assert "normalised_sufficiency" in result.stdout
    frame = load_result(tmp_path / "agreement.parquet").frame
    assert frame[["measure", "k"]].drop_duplicates().astype({"measure": str}).to_numpy().tolist() == [
        ["feature", 2],
        ["feature", 1],
        ["kendall", 0],
    ]
    one = run(*common[:2], "--model", folder, *QUICK, "--top", 1)
    assert "The 1 pairs that agree most, of 3" in one.stdout


def test_files(folder: Path, model: Any, tmp_path: Path) -> None:
    text = tmp_path / "texts.txt"
    text.write_bytes(f"{OTHER}\r\n\r\n{TEXT}\r\n".encode())
    found = tables(run("--text", " a dog", "--file", text, "--model", folder, *QUICK, "--json"))
    assert [row["text"] for row in found["explained"]] == [" a dog", OTHER, TEXT]
    examples = lines(tmp_path / "a.jsonl", {"text": TEXT, "label": "drink"}, {"text": OTHER, "label": 0, "more": 1})
    shots = lines(tmp_path / "shots.jsonl", {"text": " old cat", "label": "pet"}, {"text": " sea", "label": "drink"})
    out = tmp_path / "out"
    shown = run("--file", examples, *LABELS, "--shots", shots, "--of", "gold", "--model", folder, *QUICK, "--out", out)
    assert "drink" in shown.stdout
    task = Verbalizer(CLASSES, shots=((" old cat", "pet"), (" sea", "drink")))
    wanted = compare(model, [(TEXT, 1), (OTHER, 0)], ["attention", "leave_one_out", "random"], task=task, of="gold")
    assert scores(out) == pytest.approx(wanted.explanations.frame["score"].tolist(), abs=1e-5)
    given = lines(tmp_path / "b.jsonl", {"text": TEXT, "label": " red king"})
    rows = tables(run("--file", given, "--task", "continuation", "--model", folder, *QUICK, "--json"))["explained"]
    assert [row["explained"] for row in rows] == [" red king"]


def test_a_folder_with_a_classification_head(tmp_path: Path) -> None:
    import torch
    import transformers
    from tiny_models import GQA

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**GQA, "id2label": {0: "calm", 1: "wild"}, "label2id": {"calm": 0, "wild": 1}})
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    found = tables(run("--text", TEXT, "--model", tmp_path / "model", *QUICK, "--json"))
    assert found["explained"][0]["predicted"] in ("calm", "wild")
    with pytest.raises(InputError, match="Classifier"):
        run("--text", TEXT, "--model", tmp_path / "model", *QUICK, *LABELS)


def test_refused_methods_come_with_their_reason(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    arguments = ["--text", TEXT, "--text", OTHER, "--model", folder, *QUICK, "--method", "deeplift"]
    result = run(*arguments)
    assert "Left out" in result.stdout
    assert "deeplift" in result.stdout.split("Left out")[1]
    assert not [warning for warning in recwarn if "left out" in str(warning.message)]
    assert [row["method"] for row in tables(run(*arguments, "--json"))["refused"]] == ["deeplift"]
    forced = tables(run(*arguments, "--force", "deeplift", "--json"))
    assert forced["refused"] == []
    assert "deeplift" in {row["method"] for row in forced["costs"]}


def test_the_report_has_every_figure_and_no_markup_of_the_text(folder: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plots" / "out.html"
    texts = ["--text", "<script> the dog is red", "--text", "\x07[/] sea of <b>tea", "--text", OTHER, "--text", TEXT]
    result = run(*texts, "--model", folder, *QUICK, "--plot", plot)
    assert f"wrote {plot}" in result.stderr
    page = plot.read_text()
    for heading in ("Explained", "first texts: 3 of 4", "Agreement", "Faithfulness", "Completeness and costs"):
        assert f"{heading}</h2>" in page
    figures = figures_of(page)
    assert len(figures) == 10  # three texts; matrix, pairs, tree; faithfulness, removal; completeness, costs
    titles = [figure["layout"]["title"]["text"] for figure in figures]
    assert any("Kendall" in title for title in titles)
    assert not any("of the top" in title for title in titles)  # Kendall's τ has no k
    assert "Provenance" in page
    assert "&lt;script&gt;" in json.dumps(figures)
    assert "<script>" not in json.dumps(figures)
    assert "<script> the dog" not in page
    assert "<b>tea" not in page
    assert "http://" not in page.split("<body")[0]
    assert "[/] sea" in result.stdout
    two = tmp_path / "two.html"
    shown = run(
        "--text", TEXT, "--model", folder, "--method", "rollout", "--method", "random", "--seed", 5, "--plot", two
    )
    assert len(figures_of(two.read_text())) == 6  # no tree of two methods, no attribution
    assert "not in the report: no attribution" in shown.stderr


def test_a_text_of_one_token(folder: Path, tmp_path: Path) -> None:
    result = run("--text", " dog", "--model", folder, *QUICK, "--plot", tmp_path / "out.html")
    assert "not in the report: no two methods have a mean kendall" in result.stderr
    assert "by chance unknown" in result.stdout


def figures_of(page: str) -> list[dict[str, Any]]:
    """The figures' JSON in a report."""
    parts = page.split('class="plot-json"')[1:]
    return [json.loads(part[part.index(">") + 1 : part.index("</script>")]) for part in parts]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to explain; give --text"),
        (["--text", " "], "--text ' '; expected at least one character"),
        (["--text", "a", "--method", "strong"], "no method 'strong'; expected one of attention"),
        (["--text", "a", "--method", "attention:x", "--method", "lime"], "expected a layer's number"),
        (["--text", "a", "--method", "lime", "--method", "lime"], "--method lime alone; agreement needs two"),
        (["--text", "a", "--force", "deeplift"], "--force 'deeplift' is not among the methods: attention"),
        (["--text", "a", "--option", "n_samples=3"], "expected METHOD.NAME=VALUE"),
        (["--text", "a", "--option", "lime.n_samples=3"], "options for 'lime', which is not among"),
        (["--text", "a", "--option", "kernel_shap.steps=3"], "no option 'steps'; it has n_samples"),
        (["--text", "a", "--option", "kernel_shap.n_samples=3.5"], "n_samples=3.5; expected a whole number"),
        (["--text", "a", "--option", "kernel_shap.n_samples=0"], "n_samples=0; expected a whole number"),
        (["--text", "a", "--option", "integrated_gradients.tolerance=x"], "tolerance=x; expected a number above 0"),
        (["--text", "a", "--target", "loss"], "target='loss'; expected one of log_prob"),
        (["--text", "a", "--of", "all"], "of='all'; expected one of predicted"),
        (["--text", "a", "--units", "letters"], "--units 'letters'; expected one of tokens"),
        (["--text", "a", "--task", "chat"], "--task 'chat'; expected one of verbalizer"),
        (["--text", "a", "--measure", "tau"], "measure='tau'; expected one of kendall"),
        (["--text", "a", "--rank-by", "size"], "rank_by='size'"),
        (["--text", "a", "--k", "0"], "--k 0; expected"),
        (["--text", "a", "--draws", "0"], "--draws 0; expected seeds"),
        (["--text", "a", "--seed", "-1"], "--seed -1 --draws 2; expected seeds"),
        (["--text", "a", "--normalised", "-1"], "--normalised -1"),
        (["--text", "a", "--out", "{here}/a.parquet"], "expected a folder: three results"),
        (["--text", "a", "--label", "pet"], "--label 'pet'; expected NAME=WORD"),
        (["--text", "a", "--label", "pet= dog"], "--label was given 1 times"),
        (["--text", "a", *LABELS, "--label", "pet= cat"], "the class 'pet' was given before"),
        (["--text", "a", *LABELS, "--template", "none"], "template='none'; expected {text}"),
        (["--text", "a", *LABELS, "--shot", "A gem."], "--shot 'A gem.'; expected CLASS=TEXT"),
        (["--text", "a", *LABELS, "--shot", "car=A gem."], "class 'car'; expected one of pet, drink"),
        (["--text", "a", "--shot", "pet=A gem."], "--shot goes with label words"),
        (["--text", "a", "--template", "{text}"], "--template goes with label words"),
        (["--text", "a", *LABELS, "--task", "next_token"], "--label is for --task verbalizer"),
        (["--text", "a", "--continuation", " b", "--task", "classifier"], "--continuation is for --task continuation"),
        (["--text", "a", "--continuation", " b", "--continuation", " c"], "given 2 times and --text 1 times"),
        (["--file", "{here}/none.jsonl"], "none.jsonl cannot be read: No such file"),
        (["--file", "{here}/a.csv"], "a.csv; expected a file that ends in .jsonl or .txt"),
        (["--file", "{here}/empty.txt"], "empty.txt has no line with a text"),
        (["--file", "{here}/latin.txt"], "latin.txt is not UTF-8 text"),
        (["--file", "{here}/bad.jsonl"], "bad.jsonl, line 2 is not JSON"),
        (["--file", "{here}/list.jsonl"], 'list.jsonl, line 1; expected an object with a "text"'),
        (["--file", "{here}/label.jsonl"], "label.jsonl, line 1 has the label 0.5"),
        (["--text", "a", *LABELS, "--shots", "{here}/empty.txt"], "expected a file that ends in .jsonl"),
        (["--text", "a", *LABELS, "--shots", "{here}/shots.jsonl"], "shots.jsonl: text 0 has the label None"),
    ],
)
def test_bad_input_is_refused_before_the_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("interp.model.load_model", lambda *_, **__: pytest.fail("loaded"))
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "empty.txt").write_text("\n \n")
    (inputs / "latin.txt").write_bytes("café".encode("latin-1"))
    (inputs / "bad.jsonl").write_text('{"text": "a"}\n{text: b}\n')
    lines(inputs / "list.jsonl", ["a"])
    lines(inputs / "label.jsonl", {"text": "a", "label": 0.5})
    lines(inputs / "shots.jsonl", {"text": "a"})
    given = [argument.replace("{here}", str(inputs)) for argument in arguments]
    with pytest.raises(InputError) as caught:
        run(*given, "--plot", tmp_path / "no.html")
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "attention:9"], "9"),
        (["--of", "gold"], "example 0 has no label"),
        (["--baseline", "mask"], "has no mask token"),
        (["--baseline", "two words"], "expected one, or 'mask'"),
        (["--label", "pet= dog", "--label", "both= dog tea"], "is 2 tokens"),
        (["--task", "classifier"], "has no classification head"),
        (["--task", "continuation"], "has no label"),
    ],
)
def test_bad_input_that_only_the_model_shows(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        run("--text", TEXT, "--model", folder, *QUICK, *arguments, "--out", tmp_path / "no")
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_errors_end_with_their_message_and_status_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["interp", "agreement", "--text", "a", "--of", "gold", "--model", str(folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert str(ended.value.code).startswith("interp: example 0 has no label")
    monkeypatch.setattr(sys, "argv", ["interp", "agreement", "--model", "no-such-model"])
    with pytest.raises(SystemExit, match="interp: there is nothing to explain"):  # before any model is looked for
        main()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom interp.cli import app\n"
        "for command in ([], ['agreement']):\n"
        "    done = CliRunner().invoke(app, [*command, '--help'])\n    assert 'agree' in done.output, done.output\n"
        "heavy = ('torch', 'numpy', 'pandas', 'plotly', 'numba', 'captum', 'sklearn')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_embedded_model(embedded: Any, tmp_path: Path) -> None:
    plot = tmp_path / "agreement.html"
    texts = ["A gem of a film.", "Dull and far too long."]
    labels = ["--label", "negative= negative", "--label", "positive= positive", "--shot", "positive=I loved it."]
    given = [argument for text in texts for argument in ("--text", text)]
    result = run(*given, *labels, "--device", "cpu", *QUICK, "--plot", plot, "--out", tmp_path / "out", "--json")
    task = Verbalizer({"negative": " negative", "positive": " positive"}, shots=(("I loved it.", "positive"),))
    wanted = compare(embedded, texts, ["attention", "leave_one_out", "random"], task=task)
    assert scores(tmp_path / "out") == pytest.approx(wanted.explanations.frame["score"].tolist(), abs=1e-4)
    assert len(tables(result)["agreement"]) == len(wanted.agreement.frame)
    assert len(figures_of(plot.read_text())) == 9
