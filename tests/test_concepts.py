"""Concepts as single tokens."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import VOCAB

from interp.errors import InputError
from interp.neurons.concepts import Concept, concept_of, find_concept, plural, spellings


def test_spellings_start_with_what_was_given_and_repeat_nothing() -> None:
    assert spellings("cat")[0] == "cat"
    assert spellings(" Cat")[0] == " Cat"
    for word in ("cat", " sea", "SUN", "é", "水"):
        tried = spellings(word)
        assert len(tried) == len(set(tried))
        assert {word.strip().lower(), " " + word.strip().lower()} <= set(tried)


@pytest.mark.parametrize(
    ("word", "expected"),
    [("dog", "dogs"), ("city", "cities"), ("key", "keys"), ("box", "boxes"), ("church", "churches"), ("y", "ys")],
)
def test_plural(word: str, expected: str) -> None:
    assert plural(word) == expected


def test_variants_that_are_single_tokens_are_kept_and_the_others_named(tiny: Any) -> None:
    concept = concept_of(tiny(), " dog")
    expected = ["▁dog", "dog", "▁Dog", "Dog", "▁dogs"]
    assert list(concept.token_ids) == [VOCAB.index(token) for token in expected]
    assert concept.tokens == (" dog", "dog", " Dog", "Dog", " dogs")
    assert set(concept.dropped) == {" DOG", "DOG", "dogs", " Dogs", "Dogs"}
    assert concept.word == "dog"
    assert concept_of(tiny(), concept) is concept


def test_without_variants(tiny: Any) -> None:
    assert concept_of(tiny(), " dog", variants=False).tokens == (" dog",)
    with pytest.raises(InputError, match="not a single token"):
        concept_of(tiny(), " dog water", variants=False)


def test_several_strings_are_taken_as_they_are(tiny: Any) -> None:
    for variants in (True, False):
        for words in ([" cat", " zebra", " sea"], [" zebra", " cat", " sea"]):
            concept = concept_of(tiny(), words, variants=variants)
            assert concept.tokens == (" cat", " sea")
            assert list(concept.dropped) == [" zebra"]


def test_a_concept_of_several_tokens_names_its_pieces(tiny: Any) -> None:
    with pytest.raises(InputError, match=r"' dog water' is not a single token.*' dog', ' water'"):
        concept_of(tiny(), " dog water")


def test_pieces_of_a_word() -> None:
    pieces = {0: "ze", 1: "bra"}
    with pytest.raises(InputError, match="'zebra' is not a single token of this tokenizer; its pieces are 'ze', 'bra'"):
        find_concept("zebra", lambda text: [0, 1], pieces.__getitem__)


def test_the_unknown_token_is_no_concept() -> None:
    with pytest.raises(InputError, match="pieces are '<unk>'"):
        find_concept("zebra", lambda text: [3], lambda i: "<unk>", unknown=3)


def test_the_same_token_by_two_spellings_counts_once() -> None:
    concept = find_concept(" dog", lambda text: [len(text.strip())], str)
    assert concept.token_ids == (3, 4)  # the words, then the plurals


@pytest.mark.parametrize("concept", ["", "  ", [], [" dog", ""]])
def test_empty(tiny: Any, concept: Any) -> None:
    with pytest.raises(InputError, match="is empty"):
        concept_of(tiny(), concept)


def test_no_tokenizer() -> None:
    class Bare:
        tokenizer = None

    with pytest.raises(InputError, match="no tokenizer"):
        concept_of(Bare(), " dog")
    ready = Concept(" dog", (1,), (" dog",), {})
    assert concept_of(Bare(), ready) is ready
