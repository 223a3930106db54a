"""Sequences: pieces of the documents and nothing else, and variants that change one thing.

Oracles: documents of consecutive token ids, no id twice, so that a sequence shows where it was cut; a tokenizer with
a token per ASCII character, so that a sequence is a piece of text to be found in its document.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_hf, tiny_tokenizer

from interp import load_model
from interp.errors import InputError
from interp.sinks import sequences as module
from interp.sinks.domains import domain_documents, plain_tokens
from interp.sinks.sequences import domain_sequences, sequences

VOCABULARY = 4096


def letters_tokenizer(template: str | None = None, bos: bool = True, eos: bool = True) -> Any:
    """A token per byte; <s> and </s> are special; `template` is what the tokenizer puts around a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, **{x: i for i, x in enumerate(letters, 2)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if template:
        specials = [("<s>", 0), ("</s>", 1)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    names = {"bos_token": "<s>" if bos else None, "eos_token": "</s>" if eos else None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def build(tokenizer: Any) -> Any:
    hf = tiny_hf("llama", vocab_size=VOCABULARY, max_position_embeddings=512)
    return load_model(hf, tokenizer, check=False)


@pytest.fixture(scope="module")
def letters() -> Any:
    return build(letters_tokenizer())


@pytest.fixture(scope="module")
def bare() -> Any:
    """A model without a tokenizer."""
    model = build(letters_tokenizer())
    model.tokenizer = None
    return model


def consecutive(*sizes: int) -> list[list[int]]:
    """Documents of these sizes whose ids count up, none twice."""
    ends = list(itertools.accumulate(sizes))
    return [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def document_of(token: int, documents: list[list[int]]) -> int:
    return next(row for row, document in enumerate(documents) if token in range(document[0], document[-1] + 1))


SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=30)
QUIET = settings(deadline=None, max_examples=60)


# Pieces


@given(SIZES, st.integers(1, 40), st.integers(1, 12), st.integers(0, 99), st.booleans())
@QUIET
def test_pieces_are_disjoint_and_running(sizes: list[int], length: int, n: int, seed: int, per_document: bool) -> None:
    documents = consecutive(*sizes)
    long = [size for size in sizes if size >= length]
    whole = sum(size // length for size in long)  # what long documents alone give
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if sum(sizes) < n * length:
            message = f"{len(sizes)} documents with {sum(sizes):,} tokens .*; {n} need at least {n * length:,} tokens"
            with pytest.raises(InputError, match=message):
                sequences(BARE, documents, length, n, per_document=per_document, seed=seed)
            return
        rows = []
        with contextlib.suppress(InputError):  # joined documents may or may not give what long ones alone do not
            rows = sequences(BARE, documents, length, n, per_document=per_document, seed=seed)
    if not rows:
        assert whole < n
        return
    assert [len(row) for row in rows] == [length] * n
    tokens = list(itertools.chain(*rows))
    assert len(set(tokens)) == len(tokens)
    joined = {token for row in rows for token in row if len(documents[document_of(token, documents)]) < length}
    for row in rows:
        steps = [(a, b) for a, b in itertools.pairwise(row) if b != a + 1]
        for a, b in steps:  # only where short documents are joined, from the end of one to the start of the next
            assert {a, b} <= joined
            assert a == documents[document_of(a, documents)][-1]
            assert b == documents[document_of(b, documents)][0]
    if per_document and len(long) >= n:
        assert len({document_of(row[0], documents) for row in rows}) == n
        assert not joined


@given(SIZES, st.integers(4, 30), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_a_larger_n_adds_and_changes_nothing(sizes: list[int], length: int, seed: int) -> None:
    documents = consecutive(*sizes, length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        n = 1
        before = sequences(BARE, documents, length, n, seed=seed)
        while True:
            try:
                after = sequences(BARE, documents, length, n + 1, seed=seed)
            except InputError:
                return
            assert after[:n] == before
            before, n = after, n + 1


def test_documents_give_once_before_any_gives_twice(bare: Any) -> None:
    documents = consecutive(*[100] * 5, *[25] * 3)
    with pytest.warns(UserWarning, match="8 documents of at least 20 tokens give 14 sequences: some share a document"):
        rows = sequences(bare, documents, 20, 14, seed=2)
    sources = [document_of(row[0], documents) for row in rows]
    assert sorted(sources[:8]) == list(range(8))
    assert sorted(sources[8:13]) == list(range(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sequences(bare, documents, 20, 8)
        anywhere = sequences(bare, documents, 20, 28, per_document=False)  # 5·5 + 3: all there are
    assert len({tuple(row) for row in anywhere}) == 28
    # Long documents give more: 10 of 28 pieces are all of different documents with probability below 1e-4.
    few = [document_of(row[0], documents) for row in sequences(bare, documents, 20, 10, per_document=False)]
    assert len(set(few)) < 8 or max(map(few.count, few)) > 2


def test_places_and_documents_follow_the_seed(bare: Any) -> None:
    documents = consecutive(*[97] * 20)
    one = sequences(bare, documents, 30, 10, seed=1)
    assert one == sequences(bare, documents, 30, 10, seed=1)
    assert one != sequences(bare, documents, 30, 10, seed=2)
    assert len({row[0] % 97 for row in one}) > 5  # not all at one place
    assert len({row[0] // 97 for row in one} ^ {row[0] // 97 for row in sequences(bare, documents, 30, 10, seed=2)}) > 0


WORDS = st.lists(st.from_regex(r"[a-z]{1,7}", fullmatch=True), min_size=12, max_size=60)


def most(text: str, length: int, seed: int) -> list[list[int]]:
    """As many sequences as there are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in range(len(text) // length, 0, -1):
            with contextlib.suppress(InputError):
                return sequences(LETTERS, [text], length, n, seed=seed)
    raise AssertionError("a text of at least `length` tokens gives none")


@given(WORDS, st.integers(12, 30), st.sampled_from([" ", "  ", "\n", "\t "]), st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_text_is_cut_at_words(words: list[str], length: int, space: str, seed: int) -> None:
    # A number before each word makes it unique, and no word is as long as a sequence: each is found at one place.
    text = space.join(f"{row:02d}{word}" for row, word in enumerate(words))
    places = []
    for row in most(text, length, seed):
        piece = LETTERS.decode(row)
        assert len(row) == len(piece) == length
        assert text.count(piece) == 1
        places.append(text.index(piece))
    places.sort()
    assert all(at == 0 or (text[at - 1].isspace() and not text[at].isspace()) for at in places)
    assert all(b - a >= length for a, b in itertools.pairwise(places))
    assert all(b - a < 2 * length for a, b in itertools.pairwise(places))  # and little is left out


def test_code_is_cut_at_lines_without_indentation(letters: Any) -> None:
    text = "".join(f"def f{row:02d}(x):\n    return x\n" for row in range(30))  # 26 tokens each, two lines
    with pytest.warns(UserWarning, match="give 3 sequences"):
        rows = sequences(letters, [text], 250, 3)  # 250 // 8 ≥ 26: a definition is always near
    assert all(letters.decode(row).startswith("def f") for row in rows)
    starts = {sequences(letters, [text], 250, 1, seed=seed)[0][5] for seed in range(20)}
    assert len(starts) > 1


def test_one_line_of_prose_begins_at_its_beginning(letters: Any) -> None:
    texts = ["The baker opens at six and closes at noon. " + 30 * f"word{row} " for row in range(4)]
    assert all(letters.decode(row).startswith("The baker") for row in sequences(letters, texts, 200, 4))


def test_a_script_without_spaces_is_cut_at_tokens(letters: Any) -> None:
    text = "x" * 100
    with pytest.warns(UserWarning, match="1 documents of at least 20 tokens give 5"):
        assert len(sequences(letters, [text], 20, 5)) == 5


def test_short_texts_are_joined_with_an_empty_line(letters: Any) -> None:
    texts = [f"tweet{row:03d}." for row in range(60)]  # 9 tokens
    rows = sequences(letters, texts, 40, 8)
    seen: list[str] = []
    for row in rows:
        first, *middle, last = letters.decode(row).split("\n\n")
        assert {first, *middle} <= {*texts}
        assert any(text.startswith(last) for text in texts)
        seen += [first, *middle]
    assert len(seen) == len(set(seen)) >= 8 * 3
    assert seen != sorted(seen)  # neighbours in the list are not neighbours in a sequence


def test_long_documents_come_before_joined_ones(letters: Any) -> None:
    texts = ["short one"] * 20 + ["x " * 30] * 3
    rows = sequences(letters, texts, 40, 5)
    assert [letters.decode(row).startswith("x x") for row in rows] == [True] * 3 + [False] * 2


def test_special_tokens_spelled_out_stay_text(letters: Any) -> None:
    row = sequences(letters, ["a <s> b </s> " * 5], 60, 1)[0]
    assert not {0, 1} & {*row}
    assert "<s>" in letters.decode(row)
    assert letters.tokenizer("<s>")["input_ids"] == [0]  # the tokenizer is as it was


def test_a_tokenizer_without_offsets_is_cut_anywhere() -> None:
    fast = letters_tokenizer()

    class Slow:
        is_fast = False
        all_special_ids = (0, 1)

        def __call__(self, text: Any, add_special_tokens: bool = True, **options: Any) -> Any:
            assert options.pop("return_offsets_mapping", False) is False
            return fast(text, add_special_tokens=add_special_tokens, **options)

    model = build(letters_tokenizer())
    model.tokenizer = Slow()
    text = "abcdefgh ijklmnop qrstuvwx " * 4
    row = sequences(model, [text], 20, 1)[0]
    assert fast.decode(row) in text


# Variants


@given(SIZES, st.integers(2, 30), st.integers(0, 99))
@QUIET
def test_a_bos_moves_the_same_text_by_one(sizes: list[int], length: int, seed: int) -> None:
    documents = consecutive(*sizes, *[length] * 3)
    without = sequences(BARE, documents, length, 3, bos=False, seed=seed)
    with_bos = sequences(BARE, documents, length, 3, bos=4000, seed=seed)
    assert with_bos == [[4000, *row[:-1]] for row in without]
    assert without == sequences(BARE, documents, length, 3, seed=seed)  # no tokenizer: nothing is added


@given(SIZES, st.integers(2, 30), st.integers(0, 99), st.booleans())
@QUIET
def test_the_first_text_token_alone_is_replaced(sizes: list[int], length: int, seed: int, bos: bool) -> None:
    documents = consecutive(*sizes, *[length] * 3)
    options: dict[str, Any] = {"bos": 4000 if bos else False, "seed": seed}
    plain = sequences(BARE, documents, length, 3, **options)
    replaced = sequences(BARE, documents, length, 3, first=4001, **options)
    assert replaced == [[*row[:bos], 4001, *row[bos + 1 :]] for row in plain]


@given(SIZES, st.integers(2, 30), st.integers(0, 99), st.booleans())
@QUIET
def test_shuffling_keeps_every_token_and_the_bos(sizes: list[int], length: int, seed: int, bos: bool) -> None:
    documents = consecutive(*sizes, *[length] * 3)
    options: dict[str, Any] = {"bos": 4000 if bos else False, "seed": seed}
    plain = sequences(BARE, documents, length, 3, **options)
    mixed = sequences(BARE, documents, length, 3, shuffle=True, **options)
    assert [sorted(row) for row in mixed] == [sorted(row) for row in plain]
    assert [row[:bos] for row in mixed] == [row[:bos] for row in plain]
    assert mixed == sequences(BARE, documents, length, 3, shuffle=True, **options)
    both = sequences(BARE, documents, length, 3, shuffle=True, first=4001, **options)
    assert both == [[*row[:bos], 4001, *row[bos + 1 :]] for row in mixed]


def test_shuffling_is_uniform_over_places(bare: Any) -> None:
    documents = consecutive(*[4] * 900)
    plain = sequences(bare, documents, 4, 900)
    mixed = sequences(bare, documents, 4, 900, shuffle=True)
    moved = torch.tensor([[a.index(token) for token in b] for a, b in zip(plain, mixed, strict=True)])
    for place in range(4):  # 225 expected; binomial standard deviation 13
        assert all(abs(int((moved[:, place] == source).sum()) - 225) < 5 * 13 for source in range(4))


TEXTS = ["The baker opens at six. " * 4 + str(row) for row in range(3)]


@pytest.mark.parametrize(
    ("template", "names", "bos", "prefix"),
    [
        (None, {}, "auto", []),
        (None, {}, True, [0]),
        (None, {}, False, []),
        (None, {"bos": False}, True, [1]),  # no bos: the eos token
        ("<s> $A", {}, "auto", [0]),
        ("<s> $A", {}, True, [0]),  # there already
        ("<s> $A", {}, False, []),
        ("<s> $A </s>", {}, "auto", [0]),  # what stands after the text is not added: the text is cut
        ("</s> $A", {}, True, [0, 1]),
        ("</s> $A", {}, "auto", [1]),
        ("$A </s>", {}, "auto", []),
        ("<s> $A", {}, "</s>", [1]),
        ("<s> $A", {}, 7, [7]),
        (None, {}, 0, [0]),
        (None, {}, 1, [1]),  # the id, not True
        (None, {}, "\n", "\n"),
    ],
)
def test_what_stands_before_the_text(template: str | None, names: dict[str, bool], bos: Any, prefix: Any) -> None:
    model = build(letters_tokenizer(template, **names))
    if isinstance(prefix, str):
        prefix = model.tokenizer(prefix, add_special_tokens=False)["input_ids"]
    bare_rows = sequences(model, TEXTS, 50, 3, bos=False)
    assert all(any(model.decode(row) in text for text in TEXTS) for row in bare_rows)
    assert sequences(model, TEXTS, 50, 3, bos=bos) == [[*prefix, *row[: 50 - len(prefix)]] for row in bare_rows]


def test_a_token_that_only_the_vocabulary_has() -> None:
    # The line break's own entry is written "Ċ", whose UTF-8 form is two tokens.
    model = build(letters_tokenizer())
    assert len(model.tokenizer("Ċ")["input_ids"]) == 2
    expected = model.tokenizer("\n")["input_ids"]
    assert sequences(model, TEXTS, 10, 1, bos="Ċ")[0][:1] == expected


# Domains


def test_domains_come_in_order_with_their_names(letters: Any, tmp_path: Path) -> None:
    for row in range(6):
        (tmp_path / f"{row}.txt").write_text(f"note {row} " * 20)
    found = domain_sequences(letters, ["json", f"mine={tmp_path}/*.txt", "random"], 30, 4, bos=True, seed=3)
    assert list(found) == ["json", "mine", "random"]
    assert all([len(row) for row in rows] == [30] * 4 and all(row[0] == 0 for row in rows) for rows in found.values())
    documents = domain_documents("json", length=30, n=4, seed=3)
    assert found["json"] == sequences(letters, documents, 30, 4, bos=True, seed=3)
    assert {token for row in found["random"] for token in row[1:]} <= {*plain_tokens(letters)}
    assert all(len(set(row)) == 1 for row in domain_sequences(letters, "repeated", 8, 2)["repeated"])


def test_options_reach_every_domain(letters: Any) -> None:
    plain = domain_sequences(letters, ["json", "numbers"], 40, 3)
    first = domain_sequences(
        letters, ["json", "numbers"], 40, 3, bos="</s>", first="#", shuffle=True, per_document=False
    )
    for name in plain:
        assert all(row[0] == 1 and letters.decode(row[1:2]) == "#" for row in first[name])


def test_errors_and_warnings_name_the_domain(letters: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two " * 10)
    with pytest.raises(
        InputError, match="domain 'mine': too little text: 1 documents with 80 tokens give 2 sequences of 30"
    ):
        domain_sequences(letters, ["json", f"mine={tmp_path}/a.txt"], 30, 4)
    with pytest.warns(UserWarning, match="domain 'mine': 1 documents of at least 30 tokens give 2 sequences"):
        domain_sequences(letters, f"mine={tmp_path}/a.txt", 30, 2)


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ([], "no domain was given"),
        (["json", "numbers", "json"], "domain 'json' was given 2 times"),
        (["json", "json=x/*.txt"], "domain 'json' was given 2 times"),
        (["prose"], "no domain 'prose'"),
    ],
)
def test_bad_domains(letters: Any, domains: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        domain_sequences(letters, domains, 10, 2)


# Bad input


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([], {}, "no documents were given"),
        (["a b", ""], {}, "document 1 is empty"),
        ([[1], []], {}, "document 1 is empty"),
        (["a b", [1, 2]], {}, "documents 0 and 1: one is text, one token ids"),
        ([1, 2, 3], {}, "document 0 is 1; expected a text or a sequence of token ids"),
        (
            [[1, VOCABULARY]],
            {},
            f"document 0 has token id {VOCABULARY}, outside the model's vocabulary of {VOCABULARY}",
        ),
        ([[5, -1]], {}, "token id -1, outside"),
        (["a b"], {"n": 0}, "n=0"),
        (["a b"], {"seed": -1}, "seed=-1"),
        (["a b"], {"length": 0}, "length=0 with 0 tokens before the text; expected at least 1"),
        (["a b"], {"length": 1, "bos": True}, "length=1 with 1 tokens before the text; expected at least 2"),
        (["a b"], {"length": 513}, "length=513 exceeds the model's context of 512 tokens"),
        (
            ["a b"],
            {"length": 2, "n": 2},
            "too little text: 1 documents with 3 tokens give 1 sequences of 2; 2 need at least 4",
        ),
        (
            ["a b", "c"],
            {},
            "2 documents with 6 tokens give 0 sequences of 20; 1 need at least 20",
        ),  # a line break joins them
        (["a b"], {"bos": "word"}, r"bos='word' is not one token of .*gives \['w', 'o', 'r', 'd'\]"),
        (["a b"], {"bos": ""}, "bos='' is not one token"),
        (["a b"], {"bos": None}, "bos=None; expected a token as text or id"),
        (["a b"], {"bos": VOCABULARY}, f"bos={VOCABULARY} is outside the model's vocabulary"),
        (["a b"], {"first": -2}, "first=-2 is outside the model's vocabulary"),
        (["a b"], {"first": True}, "first=True; expected a token"),
        (["a b"], {"first": "ab"}, "first='ab' is not one token"),
    ],
)
def test_bad_input(letters: Any, documents: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sequences(letters, documents, **{"length": 20, "n": 1, **options})


def test_a_word_that_the_tokenizer_does_not_know_is_no_token(tiny: Any) -> None:
    with pytest.raises(InputError, match=r"first='zebra' is not one token of .*gives \['<unk>'\]"):
        sequences(tiny(), ["dog the cat"], 2, 1, first="zebra")
    assert sequences(tiny(), ["dog the cat"], 2, 1, first="<unk>") == [[3, tiny_tokenizer()(" the")["input_ids"][0]]]


def test_without_a_tokenizer(bare: Any) -> None:
    with pytest.raises(InputError, match="no tokenizer; give token ids"):
        sequences(bare, ["a b"], 2, 1)
    with pytest.raises(InputError, match=r"bos=True, but the tokenizer of .* has neither a bos nor an eos token"):
        sequences(bare, [[1, 2, 3]], 2, 1, bos=True)
    with pytest.raises(InputError, match="first='x', but the model has no tokenizer; give the token's id"):
        sequences(bare, [[1, 2, 3]], 2, 1, first="x")
    assert sequences(bare, [torch.tensor([1, 2])], 2, 1) == [[1, 2]]


def test_a_tokenizer_with_neither_bos_nor_eos() -> None:
    model = build(letters_tokenizer(bos=False, eos=False))
    with pytest.raises(InputError, match="has neither a bos nor an eos token; name a token"):
        sequences(model, TEXTS, 10, 1, bos=True)


# Hypothesis' functions take no fixture of the module: one model of each kind for all their examples.
LETTERS = build(letters_tokenizer())
BARE = build(letters_tokenizer())
BARE.tokenizer = None


# The embedded model and the real corpora


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["code", "editorials", "product-reviews", "movie-reviews", "tweets", "numbers", "json"]
)
def test_every_domain_gives_64_independent_sequences(embedded: Any, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none shares a document
        found = domain_sequences(embedded, name, 256, 64, bos="<|endoftext|>")[name]
    assert [len(row) for row in found] == [256] * 64
    assert len({tuple(row) for row in found}) == 64
    assert all(row[0] == 0 and min(row[1:]) > 16 for row in found)  # ids 0 to 16 are special
    texts = [str(text) for text in domain_documents(name)]
    source = module._SEPARATOR.join(texts)
    for row in found[:8]:
        parts = (
            [embedded.decode(row[1:])]
            if name in ("code", "numbers", "json")
            else embedded.decode(row[1:]).split("\n\n")
        )
        assert all(part.strip("\n\ufffd") in source for part in parts)


@pytest.mark.slow
def test_the_embedded_tokenizer_adds_nothing_and_has_a_chat_token_as_bos(embedded: Any) -> None:
    texts = domain_documents("editorials")
    plain = sequences(embedded, texts, 64, 4)
    assert plain == sequences(embedded, texts, 64, 4, bos=False)
    for bos, token in ((True, 1), ("<|im_start|>", 1), ("<|endoftext|>", 0)):
        assert sequences(embedded, texts, 64, 4, bos=bos) == [[token, *row[:-1]] for row in plain]


@pytest.mark.slow
def test_endoftext_separates_documents_in_the_embedded_model(embedded: Any) -> None:
    """After it another article's first token is likelier than after the chat token or an empty line."""
    articles = embedded.tokenizer(domain_documents("editorials")[:17], add_special_tokens=False)["input_ids"]
    following = torch.tensor([article[0] for article in articles[1:]])
    loss = {}
    for separator in ("<|endoftext|>", "<|im_start|>", "\n\n"):
        (token,) = embedded.tokenizer(separator)["input_ids"]
        ids = torch.tensor([[*article[-24:], token] for article in articles[:-1]])
        with torch.no_grad():
            logits = embedded.hf(ids, logits_to_keep=1).logits[:, -1].log_softmax(-1)
        loss[separator] = float(-logits.gather(-1, following[:, None]).mean())
    # Measured on 48 articles of 60 tokens: 7.6 nats, against 19.4 and 15.1.
    assert loss["<|endoftext|>"] < min(loss["<|im_start|>"], loss["\n\n"]) - 4
