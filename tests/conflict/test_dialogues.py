"""Dialogues: every token belongs to its piece, whatever the template does, or an error says why not."""

from __future__ import annotations

import pytest
from chat_models import chat_tiny, chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_hf, tiny_tokenizer

from interp.conflict.dialogues import SPANS, Dialogue, Turn, encode_dialogue, render
from interp.errors import InputError
from interp.model import Model, load_model

RULE, TASK, OTHER = "Use capital letters.", "Describe the sea.", "Use small letters."


def turns(rule: str = RULE, task: str = TASK, other: str = OTHER) -> Dialogue:
    return (
        Turn("system", (("system_rule", rule),)),
        Turn("user", (("task", task), ("other", " "), ("user_rule", other))),
    )


@pytest.fixture(scope="module")
def model() -> Model:
    return chat_tiny()


def test_spans_cover_the_prompt_and_hold_their_texts(model: Model) -> None:
    encoded = encode_dialogue(model, turns())
    assert sorted(at for positions in encoded.spans.values() for at in positions) == list(range(len(encoded.ids)))
    assert tuple(encoded.spans) == SPANS
    texts = {span: model.decode([encoded.ids[at] for at in at_]) for span, at_ in encoded.spans.items()}
    assert (texts["system_rule"], texts["task"], texts["user_rule"]) == (RULE, TASK, OTHER)
    assert encoded.spans["sink"] == (0,)
    # <|im_end|> \n <|im_start|> a s s i s t a n t \n
    assert encoded.suffix == 1 + 1 + 1 + len("assistant") + 1
    whole = model.tokenizer.apply_chat_template(
        [{"role": "system", "content": RULE}, {"role": "user", "content": f"{TASK} {OTHER}"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert list(encoded.ids) == model.tokenizer(whole, add_special_tokens=False)["input_ids"]


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(
    lambda text: text.strip() != "" and not text.strip().startswith("<|")
)


@given(rule=WORDS, task=WORDS, other=WORDS)
@settings(max_examples=60, deadline=None)
def test_any_text_keeps_its_place(rule: str, task: str, other: str) -> None:
    model = chat_tiny()
    encoded = encode_dialogue(model, turns(rule, task, other))
    for span, text in (("system_rule", rule), ("task", task), ("user_rule", other)):
        found = model.tokenizer.decode(
            [encoded.ids[at] for at in encoded.spans[span]], clean_up_tokenization_spaces=False
        )
        assert found.strip() == text.strip()


@pytest.mark.parametrize("rule", ["s", "|", "<", "user", "\n system", "im_end"])
def test_pieces_are_not_found_in_the_templates_own_words(model: Model, rule: str) -> None:
    whole = encode_dialogue(model, turns(f"{rule}{RULE}"))
    short = encode_dialogue(model, turns(rule))
    assert short.spans["system_rule"][0] == whole.spans["system_rule"][0]
    assert model.decode([short.ids[at] for at in short.spans["system_rule"]]).strip() == rule.strip()


def test_the_same_text_in_two_turns_is_found_in_both(model: Model) -> None:
    encoded = encode_dialogue(model, turns(RULE, TASK, RULE))
    assert len(encoded.spans["system_rule"]) == len(encoded.spans["user_rule"]) == len(RULE)
    assert max(encoded.spans["system_rule"]) < min(encoded.spans["task"]) < min(encoded.spans["user_rule"])


def test_a_dialogue_of_agents(model: Model) -> None:
    peers = (
        Turn("system", (("system_rule", RULE),)),
        Turn("user", (("task", TASK),)),
        Turn("assistant", (("other", "Later."),)),
        Turn("user", (("other", "Ben: "), ("user_rule", OTHER))),
    )
    encoded = encode_dialogue(model, peers)
    assert model.decode([encoded.ids[at] for at in encoded.spans["user_rule"]]) == OTHER
    between = model.decode([encoded.ids[at] for at in encoded.spans["template"]])
    assert "Later." in between
    assert "Ben:" in between


def test_tokens_that_reach_into_two_pieces_count_where_they_have_more(embedded: Model) -> None:
    encoded = encode_dialogue(embedded, turns())
    # The token " Use" has the blank before the rule.
    assert embedded.decode([encoded.ids[at] for at in encoded.spans["user_rule"]]) == f" {OTHER}"
    assert embedded.decode([encoded.ids[at] for at in encoded.spans["task"]]) == TASK


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_templates_by_name(name: str) -> None:
    model = chat_tiny(template=None)
    text, pieces = render(model, turns(), template=name)
    assert [text[start:end] for _, start, end in pieces] == [RULE, TASK, " ".strip() or OTHER]
    assert text.endswith("assistant\n" if name == "chatml" else "Assistant:")


MERGING = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
DROPPING = "{% for message in messages if message['role'] != 'system' %}<{{ message['content'] }}>{% endfor %}"
REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
)
SHOUTING = "{% for message in messages %}<{{ message['content'] | upper }}>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template; give template='chatml'"),
        (MERGING, "merges turns: nothing stands between a turn that ends with 'Use capital letters.'"),
        (
            DROPPING,
            "the system rule 'Use capital letters.' is not in the prompt .* drops or rewrites it; give template=",
        ),
        (
            REFUSING,
            "refuses turns of system, user .System role not supported.; if it knows no system turn, give template='chatml'",
        ),
        (SHOUTING, "the system rule 'Use capital letters.' is not in the prompt"),
    ],
)
def test_templates_that_lose_pieces_are_refused_and_another_is_offered(template: str | None, message: str) -> None:
    model = chat_tiny(template=template)
    with pytest.raises(InputError, match=message):
        encode_dialogue(model, turns())
    # What the message offers works.
    assert encode_dialogue(model, turns(), template="chatml").spans["system_rule"]


def test_a_template_with_an_error_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match=r"the chat template of .* refuses turns"):
        encode_dialogue(model, turns(), template="{% for message in messages %}")


@pytest.mark.parametrize(
    ("dialogue", "message"),
    [
        (turns(rule=" "), "an empty system rule in the system turn"),
        ((Turn("user", (("question", "?"),)),), "a piece of kind 'question'; expected one of system_rule"),
    ],
)
def test_pieces_that_are_none_are_refused(model: Model, dialogue: Dialogue, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode_dialogue(model, dialogue)


def test_a_dialogue_longer_than_the_context_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match=r"a dialogue of \d+ tokens; the model's context is 1024 tokens"):
        encode_dialogue(model, turns(task="sea " * 300))


def test_models_without_a_tokenizer_or_offsets_are_refused() -> None:
    with pytest.raises(InputError, match="has no tokenizer"):
        encode_dialogue(load_model(tiny_hf()), turns())

    class Slow:
        is_fast = False

        def __getattr__(self, name: str) -> object:
            return getattr(tiny_tokenizer(), name)

    slow = load_model(tiny_hf(), tiny_tokenizer())
    slow.tokenizer = Slow()
    with pytest.raises(InputError, match="does not know its tokens' offsets"):
        encode_dialogue(slow, turns())


def test_a_rule_that_shares_its_only_token_is_refused(embedded: Model) -> None:
    model = Model(embedded.hf, chat_tokenizer(None), "bytes")
    # Every piece begins at the first position, which is the sink.
    with pytest.raises(InputError, match="no token belongs to the system rule"):
        encode_dialogue(
            model, turns(rule="U"), template="{% for message in messages %}{{ message['content'] }}|{% endfor %}"
        )


def test_several_pieces_of_a_kind_are_all_found(model: Model) -> None:
    twice = (
        Turn("user", (("task", TASK), ("other", " "), ("user_rule", RULE), ("other", " "), ("task", "And the sun."))),
    )
    encoded = encode_dialogue(model, twice)
    assert model.decode([encoded.ids[at] for at in encoded.spans["task"]]) == f"{TASK}And the sun."


def test_a_named_template_begins_as_the_tokenizer_does() -> None:
    from tokenizers.processors import TemplateProcessing

    model = chat_tiny(template=None)
    model.tokenizer.bos_token = "<pad>"
    begins = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", model.tokenizer.bos_token_id)])
    model.tokenizer._tokenizer.post_processor = begins
    assert model.encode("a")[0][0] == model.tokenizer.bos_token_id
    encoded = encode_dialogue(model, turns(), template="plain")
    assert encoded.ids[0] == model.tokenizer.bos_token_id
    assert encoded.spans["sink"] == (0,)
    assert model.decode([encoded.ids[at] for at in encoded.spans["system_rule"]]) == RULE
