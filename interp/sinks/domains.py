"""Documents of named domains: real text that needs no hub, controls without meaning, a user's own files or data sets.

1. A built-in domain (`DOMAINS`) is Python's standard library, a corpus of a pinned package (Hutto and Gilbert, VADER,
   ICWSM 2014; `interp.resources`), or made by a generator: arithmetic, JSON, a repeated token, random tokens. The last
   two are token ids.
2. A document is what belongs together: a module, an article, a review, a tweet. Nothing is joined or cut here;
   `interp.sinks.sequences` does that, and keeps documents apart.
3. A user's own domain is a line such as `code=src/**/*.py` (files) or `wiki=hf:org/name:config:split:column` (a Hugging
   Face data set, streamed; dataset scripts never run).

Everything is in a fixed order: that of the file, of the sorted paths, or of the seed. "code" is that of the running
Python: another version has other modules. Lengths are in tokens.
"""

from __future__ import annotations

import glob
import html
import json
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import InputError

if TYPE_CHECKING:
    from interp.model import Model

DOMAINS = {
    "code": "modules of Python's standard library, as installed (PSF license)",
    "editorials": "498 opinion articles of the New York Times, some sentences left out (VADER corpora)",
    "product-reviews": "300 customer reviews of 5 products, lower case (VADER corpora)",
    "movie-reviews": "10,605 single sentences of film reviews (VADER corpora)",
    "tweets": "4,200 tweets and tweet-like texts (VADER corpora)",
    "numbers": "generated: sums and products, and CSV tables",
    "json": "generated: records as indented JSON",
    "repeated": "token ids: one token again and again, another one in each document",
    "random": "token ids: uniform over the vocabulary without special tokens",
}
Document = str | Sequence[int]

_CORPORA = {
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "product-reviews": "amazonReviewSnippets_GroundTruth.txt",
    "movie-reviews": "movieReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
# Tests, an application, demos, tables of character codes, and packages that not every supported Python has any more.
_NOT_CODE = {"test", "tests", "idlelib", "turtledemo", "encodings", "pydoc_data", "distutils", "lib2to3"}
_MODULE_CHARACTERS = 4000  # smaller modules are mostly re-exports
_CHARACTERS_PER_TOKEN = 8  # generated text has 1 to 4, so that a sequence can begin anywhere in a document
_NAMES = ("Ada", "Bruno", "Chen", "Dina", "Emil", "Farah", "Goran", "Hana", "Ines", "Jonas", "Kofi", "Lena")
_CITIES = ("Lisbon", "Oslo", "Quito", "Nairobi", "Osaka", "Perth", "Riga", "Tunis")
_TAGS = ("new", "paid", "urgent", "archived", "internal", "draft", "shared", "late")


def domain_documents(
    name: str, model: Model | None = None, *, length: int = 256, n: int = 64, seed: int = 0
) -> list[Document]:
    """Documents of a built-in domain.

    Args:
        name: a key of `DOMAINS`.
        model: whose vocabulary "repeated" and "random" draw from; the other domains need none.
        length: tokens that a generated document should have at least; real documents have their own lengths.
        n: number of generated documents; of real ones all are returned.
        seed: of the generators.

    Returns:
        Texts, or for "repeated" and "random" token ids.

    Raises:
        InputError: an unknown domain, no model where one is needed, a Python without its sources.
        ResourceError: the corpora cannot be fetched.

    Example:
        >>> print(domain_documents("numbers", length=4, n=1)[0].strip())
        52 + 28 = 80
        9 x 3 = 27
        65 x 91 = 5915
    """
    if name not in DOMAINS:
        raise InputError(
            f"there is no domain {name!r}; expected one of {', '.join(DOMAINS)}, or your own as 'name=path/*.txt' or "
            f"'name=hf:dataset:config:split:column'"
        )
    if length < 1 or n < 1 or seed < 0:
        raise InputError(f"length={length}, n={n}, seed={seed}; expected at least 1, 1 and 0")
    if name == "code":
        return list(_standard_library())
    if name in _CORPORA:
        return list(_corpus(name))
    if name in ("numbers", "json"):
        write: Callable[[int, Any], str] = _numbers if name == "numbers" else _records
        # A generator of its own for every document: a larger n adds documents and changes none.
        return [write(length, np.random.default_rng([seed, row])) for row in range(n)]
    if model is None or model.tokenizer is None:
        raise InputError(f"domain {name!r} is made of a vocabulary's tokens; give a model that has a tokenizer")
    rng, tokens = np.random.default_rng(seed), plain_tokens(model)
    if name == "random":
        return list(rng.choice(tokens, size=(n, length)).tolist())
    return [[token] * length for token in rng.choice(tokens, size=n, replace=n > len(tokens)).tolist()]


def read_domain(
    spec: str, model: Model | None = None, *, length: int = 256, n: int = 64, seed: int = 0
) -> tuple[str, list[Document]]:
    """A domain from one line, as the command line gives it.

    Args:
        spec: `name` of a built-in domain; `name=GLOB` for text files in UTF-8, a document each (`.jsonl`: a document a
            line, in its field "text"; `**` reaches into folders; blank documents are left out); or
            `name=hf:dataset[:config][:split][:column]`, by default the split "train" and the column "text".
        model, length, n, seed: see `domain_documents`; `length` and `n` also end the reading of a data set, at 4·n
            documents with 32·n·length characters in all.

    Returns:
        The domain's name and its documents.

    Raises:
        InputError: no such domain, no match, a file that is unreadable, binary or not UTF-8, no text at all, a bad line
            of JSON (which), a data set or column that is not there, no package `datasets`.

    Example:
        >>> name, documents = read_domain("code")
        >>> name, len(documents) > 100
        ('code', True)
    """
    name, equals, source = spec.partition("=")
    name, source = name.strip(), source.strip()
    if not equals:
        return name, domain_documents(name, model, length=length, n=n, seed=seed)
    if not name or not source:
        raise InputError(f"domain {spec!r}; expected 'name=path/*.txt' or 'name=hf:dataset:config:split:column'")
    if source.startswith("hf:"):
        return name, list(_hugging_face(spec, source[3:], 4 * n, 32 * n * length))
    paths = sorted(
        path for path in map(Path, glob.glob(str(Path(source).expanduser()), recursive=True)) if path.is_file()
    )
    if not paths:
        raise InputError(
            f"domain {name!r}: no file matches {source!r}; check the path, and quote the pattern in a shell"
        )
    documents = [document for path in paths for document in _read_file(name, path) if document.strip()]
    if not documents:
        raise InputError(f"domain {name!r}: the {len(paths)} files that match {source!r} hold no text")
    return name, list(documents)


def plain_tokens(model: Model) -> list[int]:
    """Ids of the vocabulary without special tokens, ascending.

    Example:
        >>> plain_tokens(load_model())[:2]                                                # doctest: +SKIP
        [17, 18]
    """
    tokenizer = model.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}
    tokens = sorted(token for token in set(tokenizer.get_vocab().values()) - special if token < model.arch.vocab_size)
    if not tokens:
        raise InputError(f"the tokenizer of {model.name} has special tokens only")
    return tokens


def _standard_library() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        # The names that Python lists: site-packages and build configuration are not among them.
        if parts[0].removesuffix(".py") not in sys.stdlib_module_names or _NOT_CODE & {*parts}:
            continue
        with tokenize.open(path) as file:  # in the encoding that the module declares
            text = file.read()
        if len(text) >= _MODULE_CHARACTERS:
            documents.append(text)
    if not documents:
        raise InputError(
            f"this Python has no sources of its standard library in {root}; give your own: 'code=path/*.py'"
        )
    return documents


def _corpus(name: str) -> list[str]:
    """Articles and reviews of their sentences in order; snippets and tweets as they are."""
    from interp.resources import fetch

    lines = (fetch("hutto-icwsm-2014") / _CORPORA[name]).read_text(encoding="utf-8").split("\n")
    rows = [line.split("\t") for line in lines if line]
    documents: dict[int, list[tuple[int, str]]] = {}
    for key, _, text in rows:
        document, _, sentence = key.partition("_")  # "12_3": the third sentence of article 12
        # The corpus holds &amp; or &amp;amp; for an ampersand, and two apostrophes for a quotation mark.
        clean = html.unescape(html.unescape(text)).replace("''", '"').strip()
        documents.setdefault(int(document), []).append((int(sentence or 1), clean))
    return [" ".join(text for _, text in sorted(sentences)) for _, sentences in sorted(documents.items())]


def _numbers(length: int, rng: np.random.Generator) -> str:
    """A table, or lines of arithmetic."""
    columns = int(rng.integers(3, 7)) if rng.random() < 0.5 else 0
    lines = [",".join(["id", *(f"x{column}" for column in range(1, columns))])] if columns else []
    characters = 0
    while characters < _CHARACTERS_PER_TOKEN * length:
        if columns:
            line = ",".join([str(len(lines)), *(f"{x:.2f}" for x in rng.uniform(0, 1000, columns - 1))])
        else:
            a, b = rng.integers(2, 100, 2).tolist()
            line = f"{a} + {b} = {a + b}" if rng.random() < 0.5 else f"{a} x {b} = {a * b}"
        lines.append(line)
        characters += len(line)
    return "\n".join(lines) + "\n"


def _records(length: int, rng: np.random.Generator) -> str:
    records: list[dict[str, Any]] = []
    characters = 0
    while characters < _CHARACTERS_PER_TOKEN * length:
        month, day = rng.integers(1, [13, 29]).tolist()
        record = {
            "id": int(rng.integers(1000, 100_000)),
            "name": str(rng.choice(_NAMES)),
            "created": f"{int(rng.integers(2001, 2025))}-{month:02d}-{day:02d}",
            "address": {"city": str(rng.choice(_CITIES)), "number": int(rng.integers(1, 200))},
            "active": bool(rng.random() < 0.5),
            "score": round(float(rng.uniform(0, 10)), 2),
            "tags": rng.choice(_TAGS, size=int(rng.integers(0, 4)), replace=False).tolist(),
        }
        records.append(record)
        characters += len(json.dumps(record, indent=2))
    return json.dumps(records, indent=2) + "\n"


def _read_file(name: str, path: Path) -> list[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"domain {name!r}: {path} cannot be read: {error.strerror or error}") from error
    if b"\0" in content:
        raise InputError(f"domain {name!r}: {path} is a binary file; expected text in UTF-8: narrow the pattern")
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"domain {name!r}: {path} is not UTF-8 (byte {error.start} is 0x{content[error.start]:02x}); convert it, "
            f"for example with: iconv -f latin1 -t utf-8"
        ) from None
    if path.suffix.lower() != ".jsonl":
        return [text]
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                documents.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError):
                documents.append(None)
            if not isinstance(documents[-1], str):
                raise InputError(
                    f"domain {name!r}: line {number} of {path} is {line[:60]!r}; expected an object such as "
                    f'{{"text": "…"}}'
                )
    return documents


def _hugging_face(spec: str, source: str, enough: int, characters: int) -> list[str]:
    """Rows of a data set until there are enough documents and characters."""
    dataset, config, split, column, *rest = [*source.split(":"), "", "", ""]
    if not dataset or any(rest):
        raise InputError(f"domain {spec!r}; expected 'name=hf:dataset[:config][:split][:column]'")
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"domain {spec!r} needs the package datasets; install it with: pip install 'datasets>=4'"
        ) from error
    if int(datasets.__version__.split(".")[0]) < 4:
        raise InputError(
            f"domain {spec!r}: datasets {datasets.__version__} can run a data set's own script; install one that "
            f"cannot, with: pip install 'datasets>=4'"
        )
    split, column = split or "train", column or "text"
    documents: list[str] = []
    total = 0
    try:
        for row in datasets.load_dataset(dataset, config or None, split=split, streaming=True):
            if not isinstance(row.get(column), str):
                found = f"holds {type(row[column]).__name__}" if column in row else "is not there"
                raise InputError(
                    f"domain {spec!r}: the column {column!r} {found}; there are {', '.join(row)}: name one of text"
                )
            if row[column].strip():
                documents.append(row[column])
                total += len(row[column])
            if len(documents) >= enough and total >= characters:
                break
    except InputError:
        raise
    except Exception as error:  # the package raises a dozen classes: no such data set, config or split, no network, …
        raise InputError(
            f"domain {spec!r}: the data set {dataset!r} (config {config or 'default'}, split {split}) cannot be read: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not documents:
        raise InputError(f"domain {spec!r}: the data set has no text in its column {column!r}")
    return documents
