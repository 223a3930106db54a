"""`interp flow TEXT` on a tiny model saved in a folder: tables, JSON, files, the report, errors."""

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
from interp.cli import app, main
from interp.errors import InputError
from interp.flow import attention_flow, attention_graph

TEXT = " water of the sea is red"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_hf("llama").save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<bos>{{ message.content }}<eos>{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(str(folder), device="cpu")


def run(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, ["flow", *(str(argument) for argument in arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def rows(result: Any) -> list[dict[str, Any]]:
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith("[{")))


def expected(model: Any, graph: dict[str, Any], **options: Any) -> dict[tuple[int, int], float]:
    frame = attention_flow(attention_graph(model, TEXT, **graph), **options).frame
    return {(row.target, row.source): row.flow for row in frame.itertuples()}


def found(result: Any, method: str = "exact") -> dict[tuple[int, int], float]:
    return {(row["target"], row["source"]): row[method] for row in rows(result)}


def test_a_row_per_token_a_column_per_method(folder: Path, model: Any, tmp_path: Path) -> None:
    out = tmp_path / "flow.parquet"
    result = run(TEXT, "--model", folder, "--method", "exact", "--method", "widest", "--out", out, "--json")
    assert [row["token"] for row in rows(result)] == [" water", " of", " the", " sea", " is", " red"]
    assert list(rows(result)[0]) == ["target", "source", "token", "exact", "widest"]
    for method in ("exact", "widest"):
        assert found(result, method) == pytest.approx(expected(model, {}, method=method), abs=1e-6)
    saved = load_result(out)
    assert saved.kind == "flow.attention_flow"
    assert set(saved.frame["method"]) == {"exact", "widest"}
    table = run(TEXT, "--model", folder).stdout
    assert "␣water" in table
    assert "exact" in table


@pytest.mark.parametrize(
    ("arguments", "graph", "options"),
    [
        (["--target", 2, "--target", -1], {}, {"targets": [2, -1]}),
        (["--all-targets", "--method", "rollout"], {}, {"targets": None, "method": "rollout"}),
        (["--residual", "plus_one", "--heads", "max"], {"residual": "plus_one", "heads": "max"}, {}),
        (["--heads", "1", "--layers", "1:3"], {"heads": 1, "layers": [1, 2]}, {}),
        (["--heads", "0,3", "--layers", ":2"], {"heads": [0, 3], "layers": [0, 1]}, {}),
        (["--heads", "norm", "--layers", "2"], {"heads": "norm", "layers": [2]}, {}),
        (["--capacity", "contribution", "--layers", "1:"], {"capacity": "contribution", "layers": [1, 2]}, {}),
        (["--correction", "uniform"], {}, {"correction": "uniform"}),
        (["--method", "soft", "--temperature", 0.1], {}, {"method": "soft", "temperature": 0.1}),
        (["--chat"], {"chat": True}, {}),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else "",
)
def test_options_reach_the_graph_and_the_method(
    folder: Path, model: Any, arguments: list[Any], graph: dict[str, Any], options: dict[str, Any]
) -> None:
    method = options.get("method", "exact")
    assert found(run(TEXT, "--model", folder, *arguments, "--json"), method) == pytest.approx(
        expected(model, graph, **options), abs=1e-6
    )


def test_dropped_sinks_have_no_value(folder: Path, model: Any) -> None:
    result = run(TEXT, "--model", folder, "--correction", "drop_sink", "--sink", 1, "--sink", 2, "--json")
    assert [row["exact"] is None for row in rows(result)] == [False, True, True, False, False, False]
    kept = {key: value for key, value in found(result).items() if value is not None}
    wanted = expected(model, {}, correction="drop_sink", sinks=[1, 2])
    assert kept == pytest.approx({key: wanted[key] for key in kept}, abs=1e-6)


def test_a_text_that_begins_with_a_dash(folder: Path) -> None:
    result = run("--model", folder, "--json", "--", "- the dog")
    assert rows(result)[-1]["token"] == " dog"


def test_the_report_has_text_flow_and_routes(folder: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plots" / "out.html"
    result = run("<script> the dog is red", "--model", folder, "--plot", plot)
    assert f"wrote {plot}" in result.stderr
    page = plot.read_text()
    for heading in ("Influence of each token", "One maximum flow", "The strongest routes"):
        assert heading in page
    figures = figures_of(page)
    assert [figure["data"][-1]["type"] for figure in figures] == ["bar", "scatter", "sankey"]
    assert "&lt;script&gt;" in json.dumps(figures)
    assert "<script>" not in json.dumps(figures)
    assert "http://" not in page.split("<body")[0]


def test_the_report_draws_the_chosen_source_or_the_strongest(folder: Path, model: Any, tmp_path: Path) -> None:
    flows = expected(model, {"layers": [1]}, targets=[4])
    assert max(flows, key=lambda pair: flows[pair]) == (4, 4)  # half of one layer is the residual edge
    strongest = max((source for _, source in flows if source != 4), key=lambda source: flows[4, source])
    common = [TEXT, "--model", folder, "--layers", 1, "--target", 4]
    run(*common, "--plot", tmp_path / "a.html")
    run(*common, "--source", 3, "--plot", tmp_path / "b.html")
    for name, source, routes in (("a", strongest, "the whole input"), ("b", 3, "(3)")):
        _, edges, path = figures_of((tmp_path / f"{name}.html").read_text())
        assert f"({source}) to “ is” (4)" in edges["layout"]["title"]["text"]
        assert routes in path["layout"]["title"]["text"]


def test_the_report_with_every_target_and_dropped_sinks(folder: Path, model: Any, tmp_path: Path) -> None:
    plot = tmp_path / "out.html"
    run(TEXT, "--model", folder, "--all-targets", "--correction", "drop_sink", "--plot", plot)
    figures = figures_of(plot.read_text())
    assert [figure["data"][0]["type"] for figure in figures] == ["heatmap", "bar", "scatter", "sankey"]
    source = next(trace for trace in figures[2]["data"] if trace.get("name") == "source")
    assert source["x"] != [0]
    flow = expected(model, {}, targets=[5], correction="drop_sink")[5, source["x"][0]]
    assert f"flow {flow:.3g};" in figures[2]["layout"]["title"]["subtitle"]["text"]
    assert f"flow {expected(model, {}, targets=[5])[5, source['x'][0]]:.3g};" not in json.dumps(figures[2])
    one = tmp_path / "one.html"
    run(" dog", "--model", folder, "--plot", one)
    assert len(figures_of(one.read_text())) == 3


def figures_of(page: str) -> list[dict[str, Any]]:
    """The figures' JSON in a report."""
    parts = page.split('class="plot-json"')[1:]
    return [json.loads(part[part.index(">") + 1 : part.index("</script>")]) for part in parts]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "6"], "target 6 is out of range; the text has 6 tokens"),
        (["--target", "1", "--all-targets"], "give one of them"),
        (["--source", "9"], "source 9 is out of range"),
        (["--method", "strong"], "--method 'strong'; expected one of exact, widest"),
        (["--residual", "third"], "--residual 'third'; expected one of half"),
        (["--capacity", "none"], "--capacity 'none'; expected one of attention"),
        (["--correction", "drop"], "--correction 'drop'; expected one of none"),
        (["--correction", "drop_sink", "--sink", "8"], "8 is out of range"),
        (["--heads", "all"], "--heads 'all'; expected mean, max, norm"),
        (["--heads", "7"], "heads from 0 to 3"),
        (["--layers", "a:b"], "--layers 'a:b'; expected a range"),
        (["--layers", "2:9"], "--layers 2:9; expected a range within 0:3"),
        (["--layers", "2:2"], "--layers 2:2; expected"),
        (["--capacity", "contribution", "--residual", "half"], "contributions hold the residual stream"),
        (["--method", "soft", "--temperature", "-1"], "temperature"),
    ],
)
def test_bad_input(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        run(TEXT, "--model", folder, *arguments, "--out", tmp_path / "no.parquet", "--plot", tmp_path / "no.html")
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_errors_end_with_their_message_and_status_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["interp", "flow", "", "--model", str(folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert str(ended.value.code).startswith("interp: text 0 is empty")
    monkeypatch.setattr(sys, "argv", ["interp", "flow", "a", "--method", "x", "--model", "no-such-model"])
    with pytest.raises(SystemExit, match="interp: --method 'x'"):  # before any model is looked for
        main()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom interp.cli import app\n"
        "done = CliRunner().invoke(app, ['flow', '--help'])\nassert '--all-targets' in done.output, done.output\n"
        "print([name for name in ('torch', 'numpy', 'pandas', 'plotly', 'numba') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_embedded_model(embedded: Any, tmp_path: Path) -> None:
    plot = tmp_path / "flow.html"
    text = "The keys to the cabinet are on the table."
    result = run(text, "--device", "cpu", "--method", "exact", "--method", "layer_bound", "--plot", plot, "--json")
    frame = attention_flow(attention_graph(embedded, text), method="exact").frame
    assert list(found(result).values()) == pytest.approx(frame["flow"].tolist(), abs=1e-5)
    assert all(row["exact"] <= row["layer_bound"] + 1e-6 for row in rows(result))
    assert len(figures_of(plot.read_text())) == 3


def test_a_wrong_source_is_refused_before_the_flows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("solved")

    monkeypatch.setattr("interp.flow.influences.attention_flow", never)
    plot = tmp_path / "out.html"
    with pytest.raises(InputError, match="source 9 is out of range"):
        CliRunner().invoke(
            app, ["flow", TEXT, "--model", str(folder), "--source", "9", "--plot", str(plot)], catch_exceptions=False
        )
    assert not plot.exists()
    with pytest.raises(InputError, match="--plot"):
        CliRunner().invoke(app, ["flow", TEXT, "--model", str(folder), "--source", "1"], catch_exceptions=False)
