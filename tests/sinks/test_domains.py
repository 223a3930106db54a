"""Domains: documents that are what they claim to be, and a message for everything that is not."""

from __future__ import annotations

import ast
import csv
import inspect
import json
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.errors import InputError
from interp.sinks import domains
from interp.sinks.domains import DOMAINS, domain_documents, plain_tokens, read_domain

FILES = {
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "product-reviews": "amazonReviewSnippets_GroundTruth.txt",
    "movie-reviews": "movieReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}


@pytest.fixture
def corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the fetched corpora: CRLF, sentences out of order, an apostrophe pair, an entity."""
    by_article = [
        "2_2\t0.1\tMore of two.",
        "1_1\t-1\tTom &amp; Ann said ''no''.",
        "10_1\t0\tTen &amp;amp; a half.",
        "2_1\t1\tTwo.",
    ]
    single = ["2\t0.1\tsecond ", "1\t-0.5\tfirst\u0085one"]
    for name, file in FILES.items():
        rows = by_article if name in ("editorials", "product-reviews") else single
        (tmp_path / file).write_bytes("".join(row + "\r\n" for row in rows).encode())
    monkeypatch.setattr("interp.resources.fetch", lambda name: tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["editorials", "product-reviews"])
def test_articles_and_reviews_are_joined_in_the_order_of_their_sentences(corpora: Path, name: str) -> None:
    assert domain_documents(name) == ['Tom & Ann said "no".', "Two. More of two.", "Ten & a half."]


@pytest.mark.parametrize("name", ["movie-reviews", "tweets"])
def test_snippets_and_tweets_are_documents_of_their_own(corpora: Path, name: str) -> None:
    assert domain_documents(name) == ["first\u0085one", "second"]


@pytest.mark.slow
def test_the_real_corpora_have_the_published_sizes() -> None:
    # The corpus' own readme counts 10,605 snippets on films and 4,200 tweets, "500" articles and "309" reviews.
    documents = {name: domain_documents(name) for name in FILES}
    assert {name: len(texts) for name, texts in documents.items()} == {
        "editorials": 498,
        "product-reviews": 300,
        "movie-reviews": 10_605,
        "tweets": 4200,
    }
    assert documents["editorials"][0].startswith("On Dec. 19, around noon, New York City's Union Square")
    for texts in documents.values():
        assert not any("''" in text or "&amp;" in text or "\r" in text or "\t" in text or not text for text in texts)


def test_code_is_the_standard_library_without_tests_and_parses() -> None:
    import argparse
    import asyncio.base_events
    import json.decoder

    texts = domain_documents("code")
    assert len(texts) > 100
    assert len(set(texts)) == len(texts)
    assert texts == domain_documents("code", seed=5, n=1)
    for module in (argparse, asyncio.base_events, json.decoder):
        assert inspect.getsource(module) in texts
    assert texts.index(inspect.getsource(argparse)) < texts.index(inspect.getsource(json.decoder))
    assert min(map(len, texts)) >= 4000
    for text in texts[::20]:
        ast.parse(str(text))
    folder = Path(inspect.getfile(argparse)).parent
    for outside in ("idlelib/editor.py", "unittest/test/test_case.py", "test/test_argparse.py", "encodings/cp037.py"):
        if (folder / outside).is_file():
            assert (folder / outside).read_text(encoding="utf-8") not in texts


def test_a_python_without_sources_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domains.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "json.py").write_text("x = 1\n")  # too small to count
    with pytest.raises(InputError, match=r"no sources of its standard library in .*; give your own: 'code=path"):
        domain_documents("code")


@given(st.integers(1, 300), st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_numbers_are_right(length: int, seed: int) -> None:
    for text in domain_documents("numbers", length=length, n=4, seed=seed):
        assert len(str(text)) >= 8 * length
        lines = str(text).splitlines()
        if lines[0].startswith("id,"):
            table = list(csv.reader(lines))
            assert {len(row) for row in table} == {len(table[0])}
            assert [int(row[0]) for row in table[1:]] == list(range(1, len(table)))
            assert all(0 <= float(x) <= 1000 for row in table[1:] for x in row[1:])
        else:
            for line in lines:
                left, sign, right, equals, result = line.split()
                found = int(left) + int(right) if sign == "+" else int(left) * int(right)
                assert (sign in "+x", equals, result) == (True, "=", str(found))


def test_both_kinds_of_numbers_come() -> None:
    kinds = Counter(str(text).startswith("id,") for text in domain_documents("numbers", length=4, n=64))
    assert min(kinds.values()) > 16


def test_json_is_json() -> None:
    for text in domain_documents("json", length=100, n=5, seed=1):
        assert len(str(text)) >= 800
        records = json.loads(str(text))
        assert all({*record} == {"id", "name", "created", "address", "active", "score", "tags"} for record in records)
        assert json.dumps(records, indent=2) + "\n" == text


@pytest.mark.parametrize("name", ["numbers", "json"])
def test_generators_follow_the_seed_and_grow_without_change(name: str) -> None:
    few = domain_documents(name, length=20, n=3, seed=7)
    assert few == domain_documents(name, length=20, n=9, seed=7)[:3]
    assert few != domain_documents(name, length=20, n=3, seed=8)
    assert len(set(few)) == 3


def test_plain_tokens_leave_out_special_ones_and_rows_that_no_token_has(tiny: Any) -> None:
    model = tiny()
    assert plain_tokens(model) == list(range(4, 64))
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<script>"]})
    assert model.tokenizer.convert_tokens_to_ids("<script>") not in plain_tokens(model)


def test_random_tokens_are_uniform_over_plain_tokens(tiny: Any) -> None:
    model = tiny()
    rows = domain_documents("random", model, length=300, n=20, seed=3)
    assert [len(row) for row in rows] == [300] * 20
    counts = Counter(token for row in rows for token in row)
    assert {*counts} == {*range(4, 64)}
    expected = 300 * 20 / 60
    # Chi-squared with 59 degrees of freedom: mean 59, standard deviation 11.
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 59 + 5 * 11
    assert rows == domain_documents("random", model, length=300, n=20, seed=3)
    assert rows != domain_documents("random", model, length=300, n=20, seed=4)


def test_repeated_is_one_token_another_in_each_document(tiny: Any) -> None:
    rows = domain_documents("repeated", tiny(), length=9, n=60)
    assert all(len(row) == 9 and len(set(row)) == 1 for row in rows)
    assert sorted(row[0] for row in rows) == list(range(4, 64))
    assert len(domain_documents("repeated", tiny(), length=2, n=61)) == 61  # more documents than tokens


@pytest.mark.parametrize("name", ["random", "repeated"])
def test_tokens_need_a_vocabulary(name: str) -> None:
    with pytest.raises(InputError, match=f"domain '{name}' is made of a vocabulary's tokens; give a model"):
        domain_documents(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "prose"}, r"no domain 'prose'; expected one of code, editorials, .*'name=path/\*.txt'"),
        ({"name": "texts/*.txt"}, r"no domain 'texts/\*.txt'"),
        ({"name": ""}, "no domain ''"),
        ({"name": "json", "n": 0}, "n=0"),
        ({"name": "json", "length": 0}, "length=0"),
        ({"name": "json", "seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        domain_documents(**arguments)


def test_every_domain_has_its_line() -> None:
    assert list(DOMAINS) == [
        *("code", "editorials", "product-reviews", "movie-reviews", "tweets", "numbers", "json", "repeated", "random"),
    ]
    assert all(line and "\n" not in line for line in DOMAINS.values())


# A user's own files


def test_files_are_documents_in_the_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_bytes("\ufeffzwölf\r\nlines".encode())
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "sub" / "c.txt").write_text("three", encoding="utf-8")
    (tmp_path / "__init__.py").write_text("\n", encoding="utf-8")  # blank: left out
    assert read_domain(f" mine = {tmp_path}/**/*") == ("mine", ["one", "zwölf\nlines", "three"])
    assert read_domain(f"code={tmp_path}/*.txt") == ("code", ["one"])  # a built-in's name may be taken


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a.txt").write_text("one=1", encoding="utf-8")
    assert read_domain("mine=~/a.txt") == ("mine", ["one=1"])


def test_json_lines_have_a_document_each(tmp_path: Path) -> None:
    rows = [{"text": "a\nb"}, {"id": 3, "text": "c\u2028d"}, {"text": "  "}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "x.jsonl").write_text(lines, encoding="utf-8")
    assert read_domain(f"mine={tmp_path}/x.jsonl") == ("mine", ["a\nb", "c\u2028d"])


@pytest.mark.parametrize("line", ["{", '"text"', "[1]", "3", '{"content": "x"}', '{"text": 3}', '{"text": null}'])
def test_a_bad_line_is_shown_with_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n\n' + line, encoding="utf-8")
    with pytest.raises(InputError, match=r"domain 'mine': line 3 of .*x.jsonl is .*; expected an object such as"):
        read_domain(f"mine={tmp_path}/x.jsonl")


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "empty.jsonl").write_text("")
    for file, message in {
        "a.bin": "a.bin is a binary file; expected text in UTF-8: narrow the pattern",
        "latin.txt": r"latin.txt is not UTF-8 \(byte 3 is 0xe9\); convert it",
        "blank.txt": "the 1 files that match .* hold no text",
        "empty.jsonl": "hold no text",
        "*.py": r"no file matches '.*\*.py'; check the path",
        ".": "no file matches",  # a folder
    }.items():
        with pytest.raises(InputError, match=f"domain 'mine': .*{message}"):
            read_domain(f"mine={tmp_path}/{file}")


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")

    def refuse(path: Path) -> bytes:  # root may read everything, so that no permission would show it
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"a.txt cannot be read: Permission denied"):
        read_domain(f"mine={tmp_path}/a.txt")


@pytest.mark.parametrize("spec", ["=x.txt", "mine=", " = ", "mine=hf:", "mine=hf::config", "mine=hf:a:b:c:d:e"])
def test_incomplete_lines(spec: str) -> None:
    with pytest.raises(InputError, match=r"expected 'name=.*hf:dataset"):
        read_domain(spec)


def test_a_bare_name_is_a_built_in_domain() -> None:
    assert read_domain("json", length=5, n=2) == ("json", domain_documents("json", length=5, n=2))


# Hugging Face data sets


class FakeDatasets(types.ModuleType):
    """Stands for the package: keeps the calls, gives rows or raises."""

    def __init__(self, rows: Any, version: str = "5.2.0") -> None:
        super().__init__("datasets")
        self.__version__ = version
        self.rows, self.calls, self.read = rows, [], 0

    def load_dataset(self, *arguments: Any, **options: Any) -> Any:
        self.calls.append((arguments, options))
        if isinstance(self.rows, Exception):
            raise self.rows

        def stream() -> Any:
            for row in self.rows:
                self.read += 1
                yield row

        return stream()


def fake(monkeypatch: pytest.MonkeyPatch, rows: Any, version: str = "5.2.0") -> FakeDatasets:
    module = FakeDatasets(rows, version)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


@pytest.mark.parametrize(
    ("source", "config", "split", "column"),
    [
        ("org/name", None, "train", "text"),
        ("org/name:en", "en", "train", "text"),
        ("org/name::test", None, "test", "text"),
        ("org/name:en:test:body", "en", "test", "body"),
        ("org/name:::body", None, "train", "body"),
    ],
)
def test_a_data_set_is_streamed_and_no_script_is_trusted(
    monkeypatch: pytest.MonkeyPatch, source: str, config: str | None, split: str, column: str
) -> None:
    module = fake(monkeypatch, [{column: "one", "id": 1}, {column: " \n", "id": 2}, {column: "two", "id": 3}])
    assert read_domain(f"wiki=hf:{source}") == ("wiki", ["one", "two"])
    assert module.calls == [(("org/name", config), {"split": split, "streaming": True})]


def test_reading_ends_when_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "x" * 100} for _ in range(10_000)]
    module = fake(monkeypatch, rows)
    assert (
        len(read_domain("wiki=hf:a", length=10, n=5)[1]) == module.read == 20
    )  # 4·5 documents, 2,000 ≥ 1,600 characters
    module = fake(monkeypatch, rows)
    assert len(read_domain("wiki=hf:a", length=100, n=5)[1]) == module.read == 160  # 32·5·100 characters


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"body": "x", "id": 1}], "the column 'text' is not there; there are body, id: name one of text"),
        ([{"text": 3}], "the column 'text' holds int"),
        ([{"text": "ok"}, {"text": None}], "the column 'text' holds NoneType"),
        ([], "has no text in its column 'text'"),
        ([{"text": ""}], "has no text in its column 'text'"),
        (
            ConnectionError("offline"),
            r"data set 'a/b' \(config default, split train\) cannot be read: ConnectionError: offline",
        ),
        (ValueError("Unknown split"), "cannot be read: ValueError: Unknown split"),
    ],
)
def test_a_data_set_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, rows: Any, message: str) -> None:
    fake(monkeypatch, rows)
    with pytest.raises(InputError, match=f"domain 'wiki=hf:a/b'.*{message}"):
        read_domain("wiki=hf:a/b")


def test_without_the_package_or_with_one_that_runs_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake(monkeypatch, [{"text": "x"}], version="3.6.0")
    with pytest.raises(
        InputError, match=r"datasets 3.6.0 can run a data set's own script; .*pip install 'datasets>=4'"
    ):
        read_domain("wiki=hf:a")
    assert module.calls == []
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the package datasets; install it with: pip install 'datasets>=4'"):
        read_domain("wiki=hf:a")


@pytest.mark.slow
def test_the_real_package_reads_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", minversion="4")
    (tmp_path / "train.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n', encoding="utf-8")
    assert read_domain(f"wiki=hf:{tmp_path}:::body") == ("wiki", ["one", "two"])
    with pytest.raises(InputError, match="the column 'text' is not there; there are body"):
        read_domain(f"wiki=hf:{tmp_path}")
    with pytest.raises(InputError, match=r"split test.* cannot be read"):
        read_domain(f"wiki=hf:{tmp_path}::test")
