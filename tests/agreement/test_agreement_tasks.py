"""What a model reads and which of it is explained: by hand, and for byte-level tokenizers by counting bytes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plain_forward import PIECES, byte_pairs, exact, tiny_classifier, word_pieces
from tiny_models import VOCAB, tiny_encoder, tiny_hf, tiny_tokenizer

from interp.agreement.encoding import Encoded, encode_examples
from interp.agreement.tasks import (
    Classifier,
    Continuation,
    Example,
    NextToken,
    Task,
    Verbalizer,
    class_names,
    default_task,
)
from interp.errors import InputError
from interp.model import Model, load_model

LABELS = {"no": " old", "yes": " new"}


class Slow:
    """A tokenizer without character offsets."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self.fast = fast

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        return self.fast(text, add_special_tokens=add_special_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fast, name)


@pytest.fixture(scope="module")
def words() -> Model:
    """A causal LM with a vocabulary of whole words."""
    return exact()


@pytest.fixture(scope="module")
def slow() -> Model:
    return load_model(tiny_hf(), Slow(tiny_tokenizer()))


@pytest.fixture(scope="module")
def pieces() -> Model:
    """An encoder with three classes and BERT's way with words."""
    return load_model(tiny_classifier(vocab_size=len(PIECES)), word_pieces())


BYTES: dict[bool, Model] = {}


def byte_model(bos: bool = False) -> Model:
    if bos not in BYTES:
        BYTES[bos] = load_model(tiny_hf(vocab_size=300), byte_pairs(bos))
    return BYTES[bos]


def ids_of(*tokens: str) -> tuple[int, ...]:
    return tuple(VOCAB.index(token) for token in tokens)


def one(model: Model, task: Task, given: Any, **options: Any) -> Encoded:
    return encode_examples(model, task, [given], **options)[0]


# Prompts and templates


@pytest.mark.parametrize("which", ["words", "slow"])
def test_prompt_and_template_are_read_and_not_explained(which: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    shots = [(" red tea", "yes"), (" sea", "no")]
    task = Verbalizer(LABELS, template=" a{text} is", shots=shots, instruction="dog", separator=" of")
    shown = "a red tea is new of a sea is old of a"
    assert task.prompt() == (f"dog {shown}", " is")
    found = one(model, task, (" water keys", "yes"))
    before = ids_of("dog", *(f"▁{word}" for word in shown.split()))
    assert found.ids == before + ids_of("▁water", "▁keys", "▁is")
    assert found.positions == (13, 14)
    assert found.units == ((0,), (1,))
    assert found.text == " water keys"
    assert found.gold == (1,)
    assert found.n_reads == 1
    assert one(model, task, found.ids[13:15]).ids == found.ids  # the text as token ids
    assert one(model, task, found.ids[13:15]).positions == (13, 14)
    assert task.choices(model) == ids_of("▁old", "▁new")


def test_tokens_across_the_template_are_explained(words: Model) -> None:
    found = one(words, Verbalizer(LABELS, template=" a {text} is"), "dog tea")
    assert found.ids == ids_of("▁a", "▁dog", "▁tea", "▁is")
    assert found.positions == (1, 2)
    found = one(words, Verbalizer(LABELS, template=" a{text}s is"), " tea dog")
    assert found.ids == ids_of("▁a", "▁tea", "▁dogs", "▁is")
    assert found.positions == (1, 2)


@pytest.mark.parametrize("template", [" a {text} is", "{text}s is"])
def test_without_offsets_a_token_across_the_template_is_refused(slow: Model, template: str) -> None:
    with pytest.raises(InputError, match="example 0: Slow joins tokens across the end of the prompt or of the text"):
        one(slow, Verbalizer(LABELS, template=template), "dog")


def test_a_slow_tokenizer_reads_a_plain_text_as_a_fast_one(words: Model, slow: Model) -> None:
    for units in ("tokens", "words"):
        assert one(slow, NextToken(), " the dog of", units=units) == one(words, NextToken(), " the dog of", units=units)
    encoder = load_model(tiny_classifier(vocab_size=len(PIECES)), Slow(word_pieces()))
    found = one(encoder, Classifier(), "unaffable film")
    assert found.ids == (2, 6, 7, 8, 9, 3)
    assert found.positions == (1, 2, 3, 4)
    assert one(encoder, Classifier(), "unaffable film", special=True).positions == (0, 1, 2, 3, 4, 5)


# Sub-words, words, special tokens


def test_word_pieces(pieces: Model) -> None:
    text = "The  unaffable films, good!"
    found = one(pieces, Classifier(), text)
    assert found.ids == (2, 5, 6, 7, 8, 9, 10, 13, 11, 14, 3)
    assert found.positions == tuple(range(1, 10))
    assert found.n_reads == 0
    assert found.gold is None
    assert found.text == text
    found = one(pieces, Classifier(), text, units="words")
    assert found.units == ((0,), (1, 2, 3), (4, 5, 6), (7, 8))  # no white space before a comma
    assert [name.replace(" ", "") for name in found.names] == ["the", "unaffable", "films,", "good!"]


def test_special_tokens_are_explained_when_asked_for(pieces: Model) -> None:
    found = one(pieces, Classifier(), "good film", special=True)
    assert found.positions == (0, 1, 2, 3)
    assert found.names == ("[CLS]", "good", "film", "[SEP]")
    found = one(pieces, Classifier(), "good, film", special=True, units="words")
    assert found.units == ((0,), (1, 2), (3,), (4,))
    written = one(pieces, Classifier(), "good[MASK]film")  # in the text, and special all the same
    assert written.ids == (2, 11, 4, 9, 3)
    assert written.positions == (1, 3)
    assert one(pieces, Classifier(), "good[MASK]film", units="words").units == ((0,), (1,))
    assert one(pieces, Classifier(), "good[MASK]film", units="words", special=True).units == tuple(
        (at,) for at in range(5)
    )


def test_an_unknown_word_is_the_texts_own(pieces: Model, words: Model) -> None:
    assert one(pieces, Classifier(), "zebra good").positions == (1, 2)
    assert one(pieces, Classifier(), "zebra").positions == (1,)
    assert one(words, NextToken(), [1, 3, 9]).positions == (1, 2)  # <bos>, <unk>, a word
    shared = tiny_tokenizer()
    shared.unk_token = "<eos>"  # one token for both, as GPT-2 has
    assert one(load_model(tiny_hf(), shared), NextToken(), [9, 2, 9]).positions == (0, 2)


def test_the_first_token_of_a_llama_like_tokenizer() -> None:
    model = byte_model(bos=True)
    text = "the good film"
    found, plain = one(model, NextToken(), text), one(byte_model(), NextToken(), text)
    assert found.ids == (1, *plain.ids)
    assert found.positions == tuple(place + 1 for place in plain.positions)
    assert one(model, NextToken(), text, special=True).positions == (0, *found.positions)
    task = Verbalizer({"a": "g", "b": "b"}, shots=[("bad", "b")])
    from_text = one(model, task, text)
    own = from_text.ids[from_text.positions[0] : from_text.positions[-1] + 1]
    assert from_text.ids[0] == 1
    assert 0 not in one(model, task, text, special=True).positions  # part of the prompt
    assert one(model, task, own) == from_text  # as token ids, behind the same <bos>


def byte_spans(model: Model, ids: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where each token's bytes are: a byte-level token has a character per byte."""
    ends = np.cumsum([0, *(len(token) for token in model.tokenizer.convert_ids_to_tokens(list(ids)))])
    return list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))


@given(
    st.text(st.sampled_from("the god flm,\n\té😀 ß中"), min_size=1, max_size=24).filter(str.strip),
    st.sampled_from(["{text}", "film {text} => ", "the{text}film", "😀{text}😀\n"]),
)
@example(" the  unaffable\n\nfilm , good!", "{text} =>")
@example("a 😀😀b é", "{text}")
@settings(deadline=None, max_examples=150)
def test_byte_pairs_by_counting_bytes(text: str, template: str) -> None:
    model = byte_model()
    task = Verbalizer({"a": "g", "b": "b"}, template=template)
    before = len(task.prompt()[0].encode())
    runs = [  # words as intervals of bytes
        (before + len(text[: found.start()].encode()), before + len(text[: found.end()].encode()))
        for found in re.finditer(r"\S+", text)
    ]
    encoded = one(model, task, text)
    touched = [
        [word for word, (left, right) in enumerate(runs) if start < right and end > left]
        for start, end in byte_spans(model, encoded.ids)
    ]
    assert encoded.positions == tuple(place for place, some in enumerate(touched) if some)
    groups: list[list[int]] = []
    for unit, place in enumerate(encoded.positions):
        if unit and encoded.positions[unit - 1] + 1 == place and touched[place - 1][-1] == touched[place][0]:
            groups[-1].append(unit)
        else:
            groups.append([unit])
    assert one(model, task, text, units="words").units == tuple(map(tuple, groups))


@given(st.lists(st.sampled_from(["good", "film,", "😀", "é😀b", "中", "un-ab", "..."]), min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_words_of_token_ids_as_of_the_text(parts: list[str]) -> None:
    text = " ".join(parts)
    of_text = one(byte_model(), NextToken(), text, units="words")
    of_ids = one(byte_model(), NextToken(), of_text.ids, units="words")
    blank = [at for at in of_ids.positions if at not in of_text.positions]
    assert all(not byte_model().decode([of_text.ids[at]]).strip() for at in blank)
    assert len(of_text.units) == len(parts)
    if not blank:
        assert of_ids.units == of_text.units
        assert [name.strip() for name in of_ids.names] == parts


def test_white_space_alone_is_explained_in_token_ids_only() -> None:
    model = byte_model()
    found = one(model, NextToken(), "a\n\n\tb")
    assert len(found.ids) > 2
    assert found.names == ("a", "b")
    as_ids = one(model, NextToken(), found.ids, units="words")
    assert as_ids.positions == tuple(range(len(found.ids)))
    assert as_ids.units == tuple((at,) for at in range(len(found.ids)))


def test_names_without_a_tokenizer() -> None:
    model = load_model(tiny_hf())
    found = one(model, NextToken(), [5, 9, 9])
    assert found.names == ("5", "9", "9")
    assert found.text == "[5, 9, 9]"
    with pytest.raises(InputError, match="the model has no tokenizer"):
        one(model, NextToken(), "dog")
    with pytest.raises(InputError, match="the model has no tokenizer"):
        one(model, NextToken(), ([5], " dog"))
    assert one(model, NextToken(), ([5], 7)).gold == (7,)


# Examples


@pytest.mark.parametrize("given", [[9, 8], (9, 8), np.array([9, 8]), torch.tensor([9, 8]), Example([9, 8])], ids=type)
def test_token_ids_of_any_kind(words: Model, given: Any) -> None:
    found = one(words, NextToken(), given)
    assert found.ids == (9, 8)
    assert all(type(token) is int for token in found.ids)
    assert found.names == (" a", " the")


def test_labels_of_any_kind(words: Model) -> None:
    task = Verbalizer(LABELS)
    for labelled in ((" dog", "yes"), (" dog", 1), (" dog", np.int64(1)), Example(" dog", "yes"), ([4], 1)):
        assert one(words, task, labelled).gold == (1,)
    for unlabelled in ((" dog", None), " dog", Example(" dog")):
        assert one(words, task, unlabelled).gold is None
    found = encode_examples(words, task, (" dog", " tea"))  # a tuple of two texts is a list of texts here
    assert [each.text for each in found] == [" dog", " tea"]


def test_continuations(words: Model) -> None:
    found = one(words, Continuation(), (" the dog", " is red tea"))
    assert found.ids == ids_of("▁the", "▁dog", "▁is", "▁red")
    assert found.gold == ids_of("▁is", "▁red", "▁tea")
    assert found.positions == (0, 1)
    assert found.n_reads == 3
    found = one(words, Continuation(), ([9, 8], 5))
    assert (found.ids, found.gold, found.n_reads) == ((9, 8), (5,), 1)
    found = one(words, NextToken(), (" the", " dog"))
    assert (found.ids, found.gold, found.n_reads) == (ids_of("▁the"), ids_of("▁dog"), 1)
    assert one(words, NextToken(), " the").gold is None


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        (NextToken(), "", "example 1 is empty; expected at least one character"),
        (NextToken(), " \n\t ", "example 1 is empty; expected at least one character that is not white space"),
        (NextToken(), [], "example 1 is empty; expected at least one token"),
        (NextToken(), [1, 2], "example 1 has no tokens to explain"),  # <bos>, <eos>
        (NextToken(), [5, 64], "example 1 has token id 64, outside the vocabulary of 64"),
        (NextToken(), [5, -2], "example 1 has token id -2, outside"),
        (NextToken(), 5, "example 1 is 5; expected a text, token ids"),
        (NextToken(), None, "example 1 is None; expected a text"),
        (NextToken(), [1.5, 2.0], "example 1 is .1.5, 2.0.; expected a text"),
        (NextToken(), ["dog", "tea"], "example 1 is .'dog', 'tea'.; expected a text"),
        (NextToken(), (" dog", " tea", " sea"), "expected a text, token ids, a .text, label. pair"),
        (NextToken(), (" dog", 1.0), "expected a text"),
        (NextToken(), Example(3), "example 1 is Example"),  # type: ignore[arg-type]
        (NextToken(), Example(" dog", [1]), "example 1 is Example"),  # type: ignore[arg-type]
        (NextToken(), (" dog", " is red"), "' is red' is 2 tokens; expected one, or Continuation"),
        (NextToken(), (" dog", ""), "'' is 0 tokens; expected at least one"),
        (NextToken(), (" dog", 64), "label 64, outside the vocabulary of 64"),
        (Continuation(), (" dog", -1), "label -1, outside the vocabulary of 64"),
        (Continuation(), " dog", "example 1 has no label; Continuation"),
        (Continuation(), (" dog", ""), "0 tokens; expected at least one"),
        (Verbalizer(LABELS), (" dog", "maybe"), "the label 'maybe'; expected one of no, yes, or an index"),
        (Verbalizer(LABELS), (" dog", 2), "the label 2; expected one of no, yes"),
        (Verbalizer(LABELS), (" dog", -1), "the label -1; expected one of no, yes"),
        (NextToken(), " dog" * 65, "example 1 is 65 tokens with its prompt; the model's context is 64 tokens"),
        (Continuation(), (" dog" * 63, " is red tea"), "example 1 is 65 tokens .* context is 64 tokens"),
        (Verbalizer(LABELS, "{text} is"), " dog" * 64, "example 1 is 65 tokens .* context is 64 tokens"),
    ],
)
def test_examples_that_cannot_be_used(words: Model, task: Task, given: Any, message: str) -> None:
    good = (" dog", " tea") if isinstance(task, Continuation) else " dog"
    with pytest.raises(InputError, match=message):
        encode_examples(words, task, [good, given])


def test_a_text_as_long_as_the_context(words: Model) -> None:
    assert len(one(words, NextToken(), " dog" * 64).ids) == 64
    assert len(one(words, Continuation(), (" dog" * 62, " is red tea")).ids) == 64


@pytest.mark.parametrize("examples", [[], (), " dog", None, 3, Example(" dog"), iter([" dog"]), np.array([])], ids=str)
def test_no_list_of_examples(words: Model, examples: Any) -> None:
    with pytest.raises(InputError, match="no examples were given; expected a list of texts"):
        encode_examples(words, NextToken(), examples)


def test_unknown_units(words: Model) -> None:
    with pytest.raises(InputError, match="units='letters'; expected one of tokens, words"):
        one(words, NextToken(), " dog", units="letters")


# Tasks


@pytest.mark.parametrize("template", ["is", "{text} {text}", "{texts}", ""])
def test_a_template_has_the_text_once(template: str) -> None:
    with pytest.raises(InputError, match=r"expected \{text\} in it once"):
        Verbalizer(LABELS, template=template)


def test_braces_and_percent_signs_in_texts_are_plain() -> None:
    task = Verbalizer(LABELS, template="{0} {text} %s", shots=[("{text} {", "no")])
    assert task.prompt() == ("{0} {text} { %s old\n{0} ", " %s")


def test_verbalizers_that_cannot_be_used(words: Model) -> None:
    with pytest.raises(InputError, match="expected at least two classes"):
        Verbalizer({"no": " old"})
    with pytest.raises(InputError, match="a shot has the class 'maybe'; expected one of no, yes"):
        Verbalizer(LABELS, shots=[("a", "maybe")])
    with pytest.raises(InputError, match=r"' old sea' of class 'no' is 2 tokens \(\[' old', ' sea'\]\); expected one"):
        Verbalizer({"no": " old sea", "yes": " new"}).choices(words)
    with pytest.raises(InputError, match=r"'' of class 'no' is 0 tokens"):
        Verbalizer({"no": "", "yes": " new"}).choices(words)
    with pytest.raises(InputError, match="two classes have the same label word"):
        Verbalizer({"no": " old", "never": " old"}).choices(words)


def test_the_first_token_of_a_model_is_no_part_of_a_label_word() -> None:
    assert len(set(Verbalizer({"a": "g", "b": "b"}).choices(byte_model(bos=True)))) == 2


def test_tasks_and_the_models_that_they_are_for(words: Model, pieces: Model) -> None:
    llama = load_model(tiny_classifier("LlamaForSequenceClassification"), tiny_tokenizer())
    bare = load_model(tiny_encoder(), tiny_tokenizer())
    assert default_task(words) == NextToken()
    assert default_task(pieces) == Classifier()
    assert default_task(llama) == Classifier()
    with pytest.raises(InputError, match=r"BertModel\) has no classification head; load a class such as AutoModelFor"):
        default_task(bare)
    for model in (words, bare):
        with pytest.raises(InputError, match=r"has no classification head for Classifier\(\)"):
            one(model, Classifier(), " dog")
    for model in (pieces, llama, bare):
        for task in (Verbalizer(LABELS), NextToken(), Continuation()):
            with pytest.raises(InputError, match=f"has no LM head to ask for a {task.name}; use Classifier"):
                one(model, task, ("dog", "dog"))
    with pytest.raises(InputError, match="task='next_token'; expected a Verbalizer"):
        one(words, "next_token", " dog")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has one class; expected at least two"):
        one(load_model(tiny_classifier(n_classes=1), tiny_tokenizer()), Classifier(), " dog")


def test_names_of_classes(words: Model, pieces: Model) -> None:
    assert class_names(words, NextToken()) == ()
    assert class_names(words, Verbalizer(LABELS)) == ("no", "yes")
    assert class_names(pieces, Classifier()) == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert class_names(pieces, Classifier(("a", "b", "c"))) == ("a", "b", "c")
    assert one(pieces, Classifier(("a", "b", "c")), ("good", "b")).gold == (1,)
    assert one(pieces, Classifier(), ("good", "LABEL_2")).gold == (2,)
    with pytest.raises(InputError, match="the model has 3 classes"):
        one(pieces, Classifier(("a", "b")), "good")
    with pytest.raises(InputError, match="reads='all'; expected 'first', 'last' or 'mean'"):
        Classifier(reads="all")
