"""Contrasting answers: rewritten, the model's own, or left out with the reason; what is scored of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from chat_models import chat_tiny
from hypothesis import given
from hypothesis import strategies as st

from interp.conflict import contrasts as module
from interp.conflict.answers import Answer
from interp.conflict.contrasts import Contrast, make_contrast, make_contrasts, with_answers
from interp.conflict.dialogues import Dialogue
from interp.conflict.pairs import Pair, make_pair
from interp.conflict.verifiers import family
from interp.conflict.wordings import Task
from interp.errors import InputError

TASK = Task("sky", "training", "Why is the sky blue?")
LETTERS = st.lists(st.integers(0, 3), min_size=1, max_size=8).map(tuple)


def pair_of(name: str, first: bool = True) -> Pair:
    rules = family(name).rules if first else family(name).rules[::-1]
    return make_pair(name, *rules, task=TASK)


@pytest.fixture
def model() -> Any:
    return chat_tiny()


def answering(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[Dialogue]:
    """Let `answer(dialogue)` stand for the model's text; the dialogues that were asked."""
    asked: list[Dialogue] = []

    def generate(_: Any, dialogues: Sequence[Dialogue], **options: Any) -> list[Answer]:
        asked.extend(dialogues)
        return [Answer(answer(dialogue), (), True) for dialogue in dialogues]

    monkeypatch.setattr(module, "generate_answers", generate)
    return asked


def test_both_are_rewritten_from_the_answer_without_rules(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [pair_of("case"), pair_of("list"), pair_of("case", first=False)]
    asked = answering(monkeypatch, lambda _: "It scatters light. That is why.")
    made = make_contrasts(model, pairs[:2])
    assert asked == [pair.prompts["none"] for pair in pairs[:2]]
    assert made.left_out == {}
    case, listed = (made.found[pair.id] for pair in pairs[:2])
    assert (case.system, case.user) == ("IT SCATTERS LIGHT. THAT IS WHY.", "it scatters light. that is why.")
    assert (listed.system, listed.user) == ("1. It scatters light.\n2. That is why.", "It scatters light. That is why.")
    assert case.source == listed.source == "rewritten"
    swapped = make_contrasts(model, pairs[2:]).found[pairs[2].id]
    assert (swapped.system, swapped.user) == (case.user, case.system)


def test_answers_obey_and_end(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda _: "One here. Two here. Three here. Four here.")
    pair = pair_of("sentences")
    made = make_contrasts(model, [pair]).found[pair.id]
    assert made.system == "One here."
    end = model.tokenizer.eos_token_id
    assert made.system_ids[-1] == made.user_ids[-1] == end
    assert model.decode(made.system_ids) == made.system
    assert model.decode(made.user_ids) == made.user
    # What is asked is whether the answer ends after its first sentence.
    assert made.shared == len("One here.")
    assert made.cut(3).ids == (made.system_ids, made.user_ids[: made.shared + 3])
    for rule, text in ((pair.system_rule, made.system), (pair.user_rule, made.user)):
        assert family("sentences").verify(rule, text).passed


def test_what_cannot_be_rewritten_is_the_models_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(dialogue: Dialogue) -> str:
        french = any("french" in text.lower() for turn in dialogue for _, text in turn.pieces)
        return "Le ciel est bleu dans la lumière du jour." if french else "The sky is blue because of the light."

    asked = answering(monkeypatch, answer)
    for first in (True, False):
        pair = pair_of("language", first)
        made = make_contrasts(model, [pair]).found[pair.id]
        texts = {pair.system_rule: made.system, pair.user_rule: made.user}
        assert texts == {"french": answer(pair_of("language").prompts["user"]), "english": answer(pair.prompts["none"])}
        assert made.source == "own"
        # Asked by the user, and nothing in the system turn.
        assert [turn.role for turn in asked[-1]] == ["user"]
        rules = [text for turn in asked[-1] for kind, text in turn.pieces if kind == "user_rule"]
        assert len(rules) == 1
        assert "french" in rules[0].lower()


def test_left_out_with_the_reason(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda _: "One sentence alone is here")
    pairs = [pair_of("language"), pair_of("list"), pair_of("case")]
    made = make_contrasts(model, pairs)
    assert list(made.found) == [pairs[2].id]
    assert made.left_out[pairs[0].id].startswith("no answer obeys rule 'french'")
    assert made.left_out[pairs[1].id] == "no answer obeys rule 'list': no numbered items"
    chosen, answers, left_out = with_answers(model, pairs, None, 5)
    assert [pair.id for pair in chosen] == [pairs[2].id]
    assert list(map(len, answers[0].ids)) == [5, 5]
    assert left_out == made.left_out


def test_same_answers_are_left_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Same:
        name, rules = "same", ("one", "other")

        def rewrite(self, rule: str, answer: str) -> str:
            return answer

    answering(monkeypatch, lambda _: "Same.")
    monkeypatch.setattr(module, "family", lambda _: Same())
    made = make_contrasts(model, [pair_of("case")])
    assert made.found == {}
    assert "both answers are the same" in made.left_out[pair_of("case").id]


def test_the_first_space_stays(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda _: " It rains.")
    made = make_contrasts(model, [pair_of("case")]).found[pair_of("case").id]
    assert (made.system, made.user) == (" IT RAINS.", " it rains.")


def test_a_models_real_answers_or_reasons(model: Any) -> None:
    pairs = [pair_of("case"), pair_of("list"), pair_of("language")]
    made = make_contrasts(model, pairs, max_new_tokens=4)
    assert set(made.found) | set(made.left_out) == {pair.id for pair in pairs}
    assert not set(made.found) & set(made.left_out)


@given(LETTERS, LETTERS, st.integers(1, 5))
def test_shared_and_cut(first: tuple[int, ...], second: tuple[int, ...], n: int) -> None:
    contrast = Contrast("", "", first, second)
    shared = contrast.shared
    assert first[:shared] == second[:shared]
    assert first[shared : shared + 1] != second[shared : shared + 1] or shared == len(first) == len(second)
    ours, theirs = contrast.cut(n).ids
    assert ours == first[: shared + n]
    assert theirs == second[: shared + n]
    if first != second:
        assert contrast.cut(n).shared == shared


def test_contrasts_of_your_own(model: Any) -> None:
    made = make_contrast(model, "YES", "no")
    end = model.tokenizer.eos_token_id
    assert made.ids == ((*model.tokenizer("YES")["input_ids"], end), (*model.tokenizer("no")["input_ids"], end))
    with pytest.raises(InputError, match="the answer '' has no tokens"):
        make_contrast(model, "", "no")
    model.tokenizer = None
    with pytest.raises(InputError, match="has no tokenizer"):
        make_contrast(model, "YES", "no")


def test_the_end_token_of_several(model: Any) -> None:
    own = model.tokenizer.eos_token_id
    for ends, expected in (([7, own], own), ([9, 7], 7), (own, own), (None, own)):
        model.hf.generation_config.eos_token_id = ends
        assert make_contrast(model, "a", "b").system_ids[-1] == expected
    model.tokenizer.eos_token = None
    model.hf.generation_config.eos_token_id = None
    assert len(make_contrast(model, "a", "b").system_ids) == 1


def test_a_pair_without_the_prompt_that_is_needed(model: Any) -> None:
    whole = pair_of("language")
    bare = Pair(**{**vars(whole), "prompts": {"conflict": whole.prompts["conflict"]}})
    with pytest.raises(InputError, match="has no prompt 'none', from which its answers are made"):
        make_contrasts(model, [bare])
    with pytest.raises(InputError, match="no pair was given"):
        make_contrasts(model, [])
