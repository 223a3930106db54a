"""Verifiers: answers written by hand for each rule, and properties that hold for any text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interp.conflict.text_units import sentences, words
from interp.conflict.verifiers import BUILT_IN, CheckedFamily, Verdict, add_family, family
from interp.errors import InputError

# (family, rule, answer, finished, passes)
CASES = [
    ("case", "capitals", "THE SEA IS 3 KM DEEP.", True, True),
    ("case", "capitals", "THE SEA IS deep.", True, False),
    ("case", "capitals", "1234", True, False),
    ("case", "small", "the sea is deep, i say.", True, True),
    ("case", "small", "The sea", True, False),
    ("case", "small", "ÉTÉ", True, False),
    ("digits", "digits", "In 1998", True, True),
    ("digits", "digits", "In 98 ships", True, False),
    ("digits", "no-digits", "two ships", True, True),
    ("digits", "no-digits", "2 ships", True, False),
    ("json", "json", '{"answer": "yes"}', True, True),
    ("json", "json", '```json\n{"answer": "yes"}\n```', True, True),
    ("json", "json", '{"reply": "yes"}', True, False),
    ("json", "json", '{"answer": "ye', False, False),
    ("json", "json", '["answer"]', True, False),
    ("json", "json", 'Here: {"answer": "yes"}', True, False),
    ("json", "prose", "A sentence.", True, True),
    ("json", "prose", '{"answer": "yes"}', True, False),
    ("language", "french", "La mer est une grande étendue d'eau.", True, True),
    ("language", "french", "L’eau de la mer est salée et elle est froide.", True, True),
    ("language", "french", "The sea is a large body of water.", True, False),
    ("language", "french", "La mer est belle. The sea is a large body of water and it is cold.", True, False),
    ("language", "english", "The sea is a large body of water.", True, True),
    ("language", "english", "La mer est une grande étendue d'eau.", True, False),
    ("language", "english", "Bonjour!", True, False),
    ("list", "list", "1. Bread\n2. Milk", True, True),
    ("list", "list", "1) Bread\n2) Milk\n3) Tea", True, True),
    ("list", "list", "1. Bread", True, False),
    ("list", "list", "Here you are:\n1. Bread\n2. Milk", True, False),
    ("list", "list", "1. Bread\n3. Milk", True, False),
    ("list", "list", "- Bread\n- Milk", True, False),
    ("list", "paragraph", "Bread and milk. I need 2. of them.", True, True),
    ("list", "paragraph", "1. Bread\n2. Milk", True, False),
    ("list", "paragraph", "- Bread", True, False),
    ("list", "paragraph", "One.\n\nTwo.", True, False),
    ("quotation", "quoted", '"The sea is deep."', True, True),
    ("quotation", "quoted", "“The sea is deep.”", True, True),
    ("quotation", "quoted", '"The sea" is deep.', True, False),
    ("quotation", "quoted", '"The sea is', False, False),
    ("quotation", "unquoted", "The sea isn't deep.", True, True),
    ("quotation", "unquoted", 'The "sea".', True, False),
    ("sentences", "one-sentence", "The sea is deep.", True, True),
    ("sentences", "one-sentence", "Dr. No and J. Doe pay 3.5 dollars, e.g. for tea.", True, True),
    ("sentences", "one-sentence", "The sea is deep. It is cold.", True, False),
    ("sentences", "one-sentence", "The sea is so deep that", False, False),
    ("sentences", "several-sentences", "One. Two. Three! Four?", True, True),
    ("sentences", "several-sentences", "One. Two. Three! Four", False, True),
    ("sentences", "several-sentences", "One. Two.", True, False),
    ("sentences", "several-sentences", "1. Apples are red.\n2. Bananas are yellow.", True, False),
    ("sentences", "several-sentences", "- Sun\n- Rain\n- Wind", True, True),
    ("sentences", "one-sentence", "- Sun\n- Rain", True, False),
    ("sentences", "one-sentence", "1. Dogs are loyal.", True, True),
    ("sentences", "one-sentence", "# The sea\nIt is deep", True, False),
    ("words", "few-words", "The sea is deep.", True, True),
    ("words", "few-words", "a b c d e f g h i j k", True, False),
    ("words", "few-words", "a b c", False, False),
    ("words", "many-words", "well-known " * 30, False, True),
    ("words", "many-words", "don't " * 29, True, False),
]


@pytest.mark.parametrize(("name", "rule", "answer", "finished", "passes"), CASES)
def test_answers_written_by_hand(name: str, rule: str, answer: str, finished: bool, passes: bool) -> None:
    verdict = family(name).verify(rule, answer, finished)
    assert verdict.passed is passes, verdict.reason
    assert verdict.reason


def test_every_rule_has_an_answer_that_passes_and_one_that_fails() -> None:
    for name in BUILT_IN:
        for rule in family(name).rules:
            outcomes = {passes for case in CASES if case[:2] == (name, rule) for passes in [case[4]]}
            assert outcomes == {True, False}, (name, rule)


ANSWERS = st.one_of(
    st.text(max_size=80),
    st.lists(
        st.sampled_from(["The sea is deep.", "il est", "1. A", "2. B", "\n", '"', "{", "}", "12", "HELLO", "the"])
    ).map(" ".join),
)


@given(answer=ANSWERS, finished=st.booleans())
def test_no_answer_obeys_both_rules_of_a_family(answer: str, finished: bool) -> None:
    for name in BUILT_IN:
        some = family(name)
        passed = [rule for rule in some.rules if some.verify(rule, answer, finished).passed]
        assert len(passed) < 2, (name, passed)


@pytest.mark.parametrize(
    ("name", "rule", "answer", "decided"),
    [
        ("sentences", "one-sentence", "The sea is so deep that", False),
        ("sentences", "one-sentence", "The sea. The", True),
        ("sentences", "several-sentences", "One. Two", False),
        ("words", "many-words", "a b", False),
        ("words", "few-words", "a b", False),
        ("digits", "digits", "1 and 2", False),
        ("digits", "no-digits", "1 and 2", True),
        ("list", "list", "1. Apples and", False),
        ("list", "list", "Apples and", True),
        ("json", "json", '{"answer": "The', False),
        ("json", "json", "The", True),
        ("quotation", "quoted", '"The sea', False),
        ("quotation", "quoted", "The sea", True),
        ("case", "capitals", "The sea", True),
        ("language", "french", "The sea and the wind", True),
    ],
)
def test_a_cut_off_answer_may_be_undecided(name: str, rule: str, answer: str, decided: bool) -> None:
    verdict = family(name).verify(rule, answer, False)
    assert (verdict.passed, verdict.decided) == (False, decided)
    assert family(name).verify(rule, answer, True).decided


@given(answer=ANSWERS, more=ANSWERS, glue=st.sampled_from(["", " ", "\n"]))
def test_what_is_decided_stays_so_however_the_answer_goes_on(answer: str, more: str, glue: str) -> None:
    for name in sorted(set(BUILT_IN) - {"language"}):  # a share of words, which later words can turn
        some = family(name)
        for rule in some.rules:
            verdict = some.verify(rule, answer, False)
            if not verdict.passed and verdict.decided:
                assert not some.verify(rule, answer.strip() + glue + more, True).passed, (name, rule, verdict.reason)


@given(answer=ANSWERS)
def test_what_is_rewritten_obeys(answer: str) -> None:
    for name in BUILT_IN:
        for rule in family(name).rules:
            made = family(name).rewrite(rule, answer)
            assert made is None or family(name).verify(rule, made).passed


PROSE = (
    "The ocean is very deep and cold in most places. It holds 97 percent of the water of the earth. Fish and whales live there. "
    "We do not know all of it."
)


def test_ordinary_prose_can_be_rewritten_to_every_rule_but_french() -> None:
    for name in BUILT_IN:
        for rule in family(name).rules:
            made = family(name).rewrite(rule, PROSE)
            assert (made is None) == (rule == "french"), (name, rule)
    assert family("case").rewrite("capitals", PROSE) == PROSE.upper()
    assert json.loads(family("json").rewrite("json", PROSE) or "") == {"answer": " ".join(sentences(PROSE)[:2])}
    assert family("list").rewrite("list", PROSE) == "\n".join(
        f"{number}. {sentence}" for number, sentence in enumerate(sentences(PROSE)[:3], 1)
    )
    assert family("digits").rewrite("no-digits", PROSE) == " ".join(sentences(PROSE)[at] for at in (0, 2, 3))
    assert family("words").rewrite("few-words", PROSE) == "The ocean is very deep and cold in most places."


def test_sentences_and_words() -> None:
    assert len(sentences('He said: "Go!" Then he went.')) == 2
    assert sentences("   ") == []
    assert sentences("... ") == []
    assert words("well-known 3.5 l'eau don’t _x_") == ["well-known", "3", "5", "l'eau", "don’t", "x"]


def test_an_empty_answer_obeys_nothing() -> None:
    for name in BUILT_IN:
        for rule in family(name).rules:
            assert not family(name).verify(rule, " \n").passed


def test_unknown_names_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(InputError, match="no family 'rhyme'; there are case, digits"):
        family("rhyme")
    with pytest.raises(InputError, match="has no rule 'loud'; its rules are capitals, small"):
        family("case").verify("loud", "A")
    with pytest.raises(InputError, match="has no rule 'loud'"):
        family("case").rewrite("loud", "A")


def _passes(answer: str, finished: bool) -> Verdict:
    return Verdict(True, "always")


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (object(), "object is no family"),
        (CheckedFamily("case", {"a": _passes, "b": _passes}, {}), "a name that no built-in family has"),
    ],
)
def test_what_is_no_new_family_is_refused(new: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        add_family(new)  # type: ignore[arg-type]
