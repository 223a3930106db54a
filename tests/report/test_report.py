"""A report is one file that opens offline, holds everything, and lets no string in it act."""

import html
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

import interp.report
from interp.cli_shared import show
from interp.errors import InputError, ResourceError
from interp.plotting import band, figure, token_axis
from interp.report import Claim, Section, write_report
from interp.results import Column, Provenance, Result

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>document.title='owned'</script>",
    "</style><img src=x onerror=document.title='owned'>",
    '"><img src=x onerror=document.title="owned">',
    "<b>bold</b><a href='javascript:alert(1)'>link</a>",
    "\x00\x1b",
    "\u202eevil\u2066",
    "\ud800",
    "{{ 7*7 }}{% raw %}",
    "<!--<script>",
    "\u2028\u2029&lt;",
    "$x$ %{y}",
)


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def drawn(result: Result) -> go.Figure:
    tokens = [str(token) for token in result.frame["token"]]
    chart = figure(f"Hostile {HOSTILE[0]}", "token", "probability", subtitle=HOSTILE[3])
    band(
        chart, range(len(tokens)), result.frame["p"], result.frame["p"] - 0.1, result.frame["p"] + 0.1, name=HOSTILE[1]
    )
    return chart.update_xaxes(**token_axis(tokens))


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> Result:
    plots = ModuleType("interp.hostilepackage.plots")
    plots.thing = drawn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "interp.hostilepackage", ModuleType("interp.hostilepackage"))
    monkeypatch.setitem(sys.modules, "interp.hostilepackage.plots", plots)
    tokens = [token for token in HOSTILE if "\ud800" not in token] * 7
    columns = (
        Column("token", "str", "", f"meaning {HOSTILE[0]}"),
        Column("p", "float32", HOSTILE[2], "a probability"),
    )
    provenance = Provenance(
        model=HOSTILE[0], fingerprint="abc", parameters={HOSTILE[3]: HOSTILE[1]}, created="2025-01-01"
    )
    frame = pd.DataFrame({"token": tokens, "p": np.linspace(0.1, 0.9, len(tokens))})
    return Result("hostilepackage.thing", frame, columns, provenance, {"tokenizer.json": "{}"})


@pytest.fixture
def items(result: Result) -> list[object]:
    raw = go.Figure(
        go.Bar(x=list(HOSTILE[:7]), y=list(range(7)), text=list(HOSTILE[:7])), {"title": {"text": HOSTILE[0]}}
    )
    claims = [
        Claim(HOSTILE[0], HOSTILE[2], HOSTILE[3], 0.5, (0.4, 0.6), 12, True),
        Claim("second", "ours", None, "x", None, None, None),
    ]
    frame = pd.DataFrame({HOSTILE[3]: pd.Series(HOSTILE, dtype=object), "plain": range(len(HOSTILE))})
    section = Section(HOSTILE[1], f"First {HOSTILE[0]}\nline.\n\nSecond.", [frame, result], claims, HOSTILE[4])
    return [result, raw, section]


@pytest.fixture
def page(items: list[object], tmp_path: Path) -> Path:
    return write_report(items, tmp_path / "report.html", title=HOSTILE[1])


def test_no_string_becomes_an_element(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    elements = Elements(text)
    assert elements.named("img") == []
    assert {attributes["href"] for attributes in elements.named("a")} == {"#section-1", "#section-2", "#section-3"}
    assert [attributes.get("type") for attributes in elements.named("script")] == ["application/json"] * 3 + [None] * 2
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    assert not set("\x00\x1b\u202e\u2066\u2028\u2029") & set(text.replace(elements.scripts[-2], ""))
    assert "{{ 7*7 }}" in text  # shown, not computed
    assert "\\ud800" in text


def test_figures_json_is_whole_and_escaped(page: Path, items: list[object]) -> None:
    blocks = Elements(page.read_text(encoding="utf-8")).scripts[:3]
    assert not set("<>&\u2028\u2029") & set("".join(blocks))
    figures = [json.loads(block) for block in blocks]
    assert figures[1]["data"][0]["x"] == list(HOSTILE[:7])
    assert figures[0] == figures[2] == json.loads(drawn(items[0]).to_json())  # type: ignore[arg-type]


def test_nothing_is_loaded_and_plotly_is_there_once(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    elements = Elements(text)
    assert text.count("* plotly.js v") == 1
    policy = next(meta["content"] for meta in elements.named("meta") if "http-equiv" in meta) or ""
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("style-src")[0]
    assert "unsafe-eval" not in policy
    assert not [attributes for _, attributes in elements.found if attributes.get("src")]
    assert not re.search(r"@import|url\(", text.replace(elements.scripts[-2], ""))


def test_results_come_with_table_columns_and_provenance(page: Path, result: Result) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count(f"showing 50 of {len(result.frame)} rows") == 2
    assert text.count("<summary>Columns</summary>") == text.count("<summary>Provenance</summary>") == 2
    assert text.count(html.escape(f"meaning {HOSTILE[0]}")) == 2
    assert "<dt>fingerprint</dt><dd>abc</dd>" in text
    assert "tokenizer.json (4 bytes)" in text
    assert "not testable" in text
    assert text.count("<h2>") == 3


def test_same_items_same_bytes(items: list[object], page: Path, tmp_path: Path) -> None:
    again = write_report(items, tmp_path / "again.html", title=HOSTILE[1])
    assert again.read_bytes() == page.read_bytes()


def test_the_package_is_the_function(result: Result, tmp_path: Path) -> None:
    path = interp.report([result], tmp_path / "deep" / "r.html", title="T", rows=2)  # type: ignore[operator]
    assert "showing 2 of 77 rows" in path.read_text(encoding="utf-8")
    assert isinstance(interp.report, ModuleType)


def test_without_figures_there_is_no_script(tmp_path: Path) -> None:
    path = write_report([pd.DataFrame({"a": [1]}), Section("only text", "words")], tmp_path / "r.html")
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "script-src &#39;none&#39;" in text
    assert path.stat().st_size < 20_000


def test_result_without_plot_gets_its_table(tmp_path: Path) -> None:
    plain = Result("nosuchpackage.thing", pd.DataFrame({"a": [1]}), (Column("a", "int8", "", ""),), Provenance())
    assert "<figure" not in write_report([plain], tmp_path / "r.html").read_text(encoding="utf-8")


def test_wrong_items(result: Result, tmp_path: Path) -> None:
    for items in ([], "text", result, Section("x"), None):
        with pytest.raises(InputError, match="needs a list"):
            write_report(items, tmp_path / "r.html")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"item 1 of the report is a dict"):
        write_report([result, {}], tmp_path / "r.html")  # type: ignore[list-item]
    with pytest.raises(InputError, match="rows"):
        write_report([result], tmp_path / "r.html", rows=0)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        write_report([result], tmp_path / "file" / "r.html")


def test_a_plot_that_fails_says_where(result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["interp.hostilepackage.plots"], "thing", lambda result: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        write_report([result], tmp_path / "r.html")
    assert "while drawing item 0" in caught.value.__notes__[0]


def test_traces_that_cannot_be_drawn_offline(tmp_path: Path) -> None:
    path = write_report([go.Figure([go.Scattergl(y=[1, 2]), go.Heatmap(z=[[1]]), go.Treemap()])], tmp_path / "r.html")
    (block,) = Elements(path.read_text(encoding="utf-8")).scripts[:1]
    assert [trace["type"] for trace in json.loads(block)["data"]] == ["scatter", "heatmap", "treemap"]
    for trace in (go.Splom(), go.Choropleth(), go.Scattermap(), go.Densitymap()):
        with pytest.raises(InputError, match=f"{trace.type} trace, which cannot be drawn offline"):
            write_report([go.Figure(trace)], tmp_path / "r.html")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(page: Path, folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [CHROMIUM or "", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
    command += ["--disable-dev-shm-usage", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=20000", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on this machine")
def test_in_a_browser(page: Path, tmp_path: Path) -> None:
    """The figures draw under the strict policy, and no string became an element or ran."""
    done = browse(page, tmp_path, "--dump-dom")
    elements = Elements(done.stdout)
    assert html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]) == HOSTILE[1]  # type: ignore[index]
    assert elements.named("img") == []
    assert [attributes.get("type") for attributes in elements.named("script")] == ["application/json"] * 3 + [None] * 2
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    assert not [
        link for link in elements.named("a") if "javascript" in (link.get("href") or link.get("xlink:href") or "")
    ]
    plots = [attributes for attributes in elements.named("div") if "js-plotly-plot" in (attributes.get("class") or "")]
    assert len(plots) == 3
    assert len([path for path in elements.named("path") if "js-line" in (path.get("class") or "")]) >= 2
    assert "could not be drawn" not in done.stdout.replace(elements.scripts[-1], "")
    assert "␣" in done.stdout
    assert "Content Security Policy" not in done.stderr, done.stderr
    assert "Uncaught" not in done.stderr, done.stderr


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on this machine")
def test_screenshot_is_not_blank(page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    browse(page, tmp_path, f"--screenshot={picture}", "--window-size=500,1200")
    content = picture.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (500, 1200)
    chunks, position = b"", 8
    while position < len(content):
        (length,) = struct.unpack(">I", content[position : position + 4])
        if content[position + 4 : position + 8] == b"IDAT":
            chunks += content[position + 8 : position + 8 + length]
        position += 12 + length
    assert len(set(zlib.decompress(chunks))) > 50  # many different bytes: something is drawn


@pytest.mark.parametrize("title", ["Focal layers", *HOSTILE])
def test_a_frame_with_a_title_has_a_heading(tmp_path: Path, title: str, capsys: pytest.CaptureFixture) -> None:
    plain = pd.DataFrame({"layer": [3]})
    made = interp.report.titled(plain, title)
    assert not plain.attrs
    page = write_report([Section("Where", items=[made, plain])], tmp_path / "page.html").read_text()
    assert page.count("<h3>") == 1
    assert len(Elements(page).scripts) == 0
    shown = html.unescape(page.split("<h3>")[1].split("</h3>")[0])
    assert "Focal layers" not in title or shown == title
    assert "<script>alert" not in page
    show(made)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].strip() == "3"
    assert "Focal layers" not in title or title in printed
