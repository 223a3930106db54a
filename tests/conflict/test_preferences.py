"""Preference pairs: which answer is taken, from answers that are planted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_models import chat_tiny
from hypothesis import given
from hypothesis import strategies as st

from interp.conflict import preferences
from interp.conflict.align_plots import preferences as plot
from interp.conflict.answers import Answer
from interp.conflict.dialogues import Dialogue, encode_dialogue
from interp.conflict.pairs import Pair, make_pairs
from interp.conflict.preference_table import balanced
from interp.conflict.preferences import counts, make_preferences, read_preferences
from interp.conflict.text_units import repeats
from interp.conflict.verifiers import family
from interp.errors import InputError
from interp.results import Result, load_result

LIST = "1. A cat sat.\n2. A dog ran."
CATEGORIES = dict.fromkeys(("system_rule", "user_rule", "prompt"), "category")
PROSE = "A cat sat on the mat. A dog ran to the sea."


def plant(monkeypatch: pytest.MonkeyPatch, model: Any, say: Callable[[str], tuple[str, bool]]) -> list[str]:
    """`say` maps the name of a prompt to (text, finished); gives the list of what was asked, round by round."""
    asked: list[str] = []

    def generate(model_: Any, dialogues: Sequence[Dialogue], *, max_new_tokens: int, **_: Any) -> list[Answer]:
        asked.append(" ".join(sorted(name_of(dialogue) for dialogue in dialogues)))
        made = []
        for dialogue in dialogues:
            text, finished = say(name_of(dialogue))
            ids = model.tokenizer(text, add_special_tokens=False)["input_ids"][:max_new_tokens]
            made.append(Answer(text, tuple([*ids, 2] if finished else ids), finished))
        return made

    monkeypatch.setattr(preferences, "generate_answers", generate)
    return asked


def name_of(dialogue: Dialogue) -> str:
    for pair in PAIRS:
        for name, known in pair.prompts.items():
            if known == dialogue:
                return name
        if pair.prompts["conflict"][1:] == dialogue:
            return "user_rule"
    raise AssertionError(dialogue)


PAIRS: list[Pair] = make_pairs("training", 1, families=["list"], wordings=["simple"])
ALONE = {"keep_consistent": 0.0, "max_answer_tokens": 90, "progress": False}


@pytest.fixture
def model() -> Any:
    return chat_tiny()


@pytest.mark.parametrize(
    ("said", "chosen", "rejected", "rounds"),
    [
        ({"user": LIST, "conflict": PROSE}, ("user", LIST), ("own", PROSE), ["user", "conflict"]),
        ({"system": LIST, "conflict": PROSE}, ("system", LIST), ("own", PROSE), ["user", "system", "conflict"]),
        ({"agree": LIST, "conflict": PROSE}, ("agree", LIST), ("own", PROSE), ["user", "system", "agree", "conflict"]),
        (
            {"conflict": LIST, "user": LIST, "user_rule": PROSE},
            ("user", LIST),
            ("user_rule", PROSE),
            ["user", "conflict", "user_rule"],
        ),
        (
            {"conflict": LIST, "user": LIST, "user_rule": LIST, "none": PROSE},
            ("user", LIST),
            ("rewrite", PROSE),
            ["user", "conflict", "user_rule", "none"],
        ),
        (
            {"none": PROSE},
            ("rewrite", "1. A cat sat on the mat.\n2. A dog ran to the sea."),
            ("own", "no list here."),
            ["user", "system", "agree", "none", "conflict"],
        ),
        ({"none": "One sentence."}, None, ("own", "no list here."), ["user", "system", "agree", "none", "conflict"]),
        (dict.fromkeys(("user", "conflict", "user_rule"), LIST) | {"none": "cat " * 30}, ("user", LIST), None, None),
    ],
)
def test_order_of_candidates(
    monkeypatch: pytest.MonkeyPatch, model: Any, said: dict[str, str], chosen: Any, rejected: Any, rounds: Any
) -> None:
    """A is "list", A′ "paragraph"; whatever is not planted is answered with a sentence that is no list."""
    asked = plant(monkeypatch, model, lambda name: (said.get(name, "no list here."), True))
    frame = make_preferences(model, PAIRS, **ALONE).frame
    (row,) = frame.to_dict("records")
    for found, text, expected in (
        (row["chosen_from"], row["chosen"], chosen),
        (row["rejected_from"], row["rejected"], rejected),
    ):
        assert (found, text) == (expected or ("", ""))
    assert row["used"] == (chosen is not None and rejected is not None)
    if rounds is not None:
        assert asked == rounds  # nothing is generated that is not needed


def test_row_holds_what_training_needs(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    plant(monkeypatch, model, lambda name: (LIST if name == "user" else PROSE, name == "user"))
    made = make_preferences(model, PAIRS, **ALONE)
    (item,) = read_preferences(made)
    row = made.frame.iloc[0]
    prompt = encode_dialogue(model, PAIRS[0].prompts["conflict"])
    assert item.prompt == prompt.ids
    assert item.rule_positions == prompt.spans["system_rule"]
    assert item.clear == encode_dialogue(model, PAIRS[0].prompts["user"]).ids
    assert model.decode(item.chosen) == LIST == row["chosen"]
    assert item.chosen[-1] == 2
    assert model.decode(item.rejected) == PROSE
    assert item.rejected[-1] != 2
    assert (row["n_prompt"], row["n_chosen"], row["n_rejected"]) == tuple(
        map(len, (item.prompt, item.chosen, item.rejected))
    )
    assert row["rejected_obeys_user"]
    assert (row["system_rule"], row["user_rule"]) == ("list", "paragraph")


def test_rewrites_end_only_where_the_text_does(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    pairs = make_pairs("training", 1, families=["case"], wordings=["simple"])
    monkeypatch.setitem(globals(), "PAIRS", pairs)

    def chosen(text: str, finished: bool, length: int = 90) -> tuple[str, bool]:
        plant(monkeypatch, model, lambda name: (text, finished))
        made = make_preferences(model, pairs, keep_consistent=0, max_answer_tokens=length, progress=False)
        (item,) = read_preferences(made)
        return made.frame["chosen"][0], item.chosen[-1] == 2

    assert chosen("It rains. It is cold", True) == ("IT RAINS. IT IS COLD", True)
    assert chosen("It rains. It is co", False) == ("IT RAINS.", True)  # the sentence that was cut off goes
    assert chosen("It rains and is co", False) == ("IT RAINS AND IS CO", False)
    assert chosen("It rains. It is cold.", True, length=12) == ("IT RAINS. IT", False)


def test_consistent_prompts_are_a_share_and_break_the_rule_otherwise(
    monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    pairs = make_pairs("training", 8, families=["list"], wordings=["simple"], swapped=False)
    monkeypatch.setitem(globals(), "PAIRS", pairs)
    plant(monkeypatch, model, lambda name: (LIST if name in ("user", "agree") else PROSE, True))
    for share, n in ((0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)):
        frame = make_preferences(model, pairs, keep_consistent=share, max_answer_tokens=90, progress=False).frame
        consistent = frame[frame["prompt"] == "agree"]
        assert len(consistent) == n
        assert len(frame) == 8 + n
        assert frame["used"].all()
        # The model obeys where the user agrees, so the rejected answer is made; the user's rule is no excuse there
        assert set(consistent["rejected_from"]) <= {"rewrite"}
        assert set(consistent["rejected"]) <= {PROSE}
    assert frame["id"].is_unique


def test_every_used_row_passes_its_verifiers_and_left_out_ones_are_counted(
    monkeypatch: pytest.MonkeyPatch, model: Any, tmp_path: Path
) -> None:
    pairs = make_pairs("training", 40)
    monkeypatch.setitem(globals(), "PAIRS", pairs)
    texts = [LIST, PROSE, "il pleut sur la mer et dans le port", 'He said "no" 12 345 times.', "cat " * 20, ""]
    plant(monkeypatch, model, lambda name: (texts[sum(map(ord, name)) % len(texts)], len(name) % 2 == 0))
    made = make_preferences(model, pairs, max_answer_tokens=60, progress=False)
    frame = made.frame
    used = frame[frame["used"]]
    assert 0 < len(used) < len(frame)
    rules = family
    for row, item in zip(used.itertuples(), read_preferences(made), strict=True):
        for ids, passes in ((item.chosen, True), (item.rejected, False)):
            assert len(ids) <= 61
            text = model.decode(ids)
            assert rules(row.family).verify(row.system_rule, text, ids[-1] == 2).passed == passes
            assert not repeats(text)
    table = counts(made)
    # A quarter of each rule's pairs has its consistent prompt: 40 pairs, three or four of each of twelve rules
    each = table.set_index(["system_rule", "prompt"])["n"]
    for rule in set(table["system_rule"]):
        assert each.get((rule, "agree"), 0) == each[rule, "conflict"] // 4
    assert table["n"].sum() == len(frame)
    assert table["n_used"].sum() == len(used)
    lost = (table["n_no_chosen"] + table["n_no_rejected"]) >= (table["n"] - table["n_used"])
    assert lost.all()
    made.save(tmp_path / "made.parquet")
    again = load_result(tmp_path / "made.parquet")
    assert again.equals(made)
    assert read_preferences(again) == read_preferences(made)
    drawn = plot(made)
    assert sum(sum(bar.y) for bar in drawn.data) == len(frame)
    assert sum(drawn.data[2].y) == len(frame) - len(used)


def test_a_rewrite_keeps_the_space_that_the_template_leaves_to_the_answer(
    monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    plant(monkeypatch, model, lambda name: (" " + PROSE if name == "none" else " no list", True))
    row = make_preferences(model, PAIRS, template="plain", **ALONE).frame.iloc[0]
    assert row["chosen_from"] == "rewrite"
    assert row["chosen"] == " 1. A cat sat on the mat.\n2. A dog ran to the sea."


def test_an_answer_that_ended_ends_with_the_end_token(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    plant(monkeypatch, model, lambda name: (LIST if name == "user" else PROSE, True))
    planted = preferences.generate_answers

    def without_end(*args: Any, **options: Any) -> list[Answer]:  # the model went on with another turn instead
        return [dataclasses.replace(answer, ids=answer.ids[:-1]) for answer in planted(*args, **options)]

    (whole,) = read_preferences(make_preferences(model, PAIRS, **ALONE))
    monkeypatch.setattr(preferences, "generate_answers", without_end)
    (item,) = read_preferences(make_preferences(model, PAIRS, **ALONE))
    end = preferences._end_id(model)
    assert (item.chosen[-1], item.rejected[-1]) == (end, end)
    assert (item.chosen[:-1], item.rejected[:-1]) == (whole.chosen[:-1], whole.rejected[:-1])


def test_balanced_uses_as_many_of_both_rules(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    plant(monkeypatch, model, lambda name: (LIST if name == "user" else PROSE, True))
    made = make_preferences(model, PAIRS, **ALONE)
    one = made.frame.iloc[0].to_dict()
    planned = {("list", "conflict"): 7, ("paragraph", "conflict"): 3, ("list", "agree"): 2}  # no paragraph agrees
    rows = [
        one | {"id": f"{rule} {prompt} {at}", "system_rule": rule, "prompt": prompt, "used": used}
        | {"user_rule": "paragraph" if rule == "list" else "list"}
        for (rule, prompt), n in planned.items()
        for at, used in enumerate([True] * n + [False])
    ]  # fmt: skip
    frame = made.frame.iloc[[0] * len(rows)].assign(**{name: [row[name] for row in rows] for name in one})
    table = Result(made.kind, frame.astype(made.frame.dtypes.to_dict() | CATEGORIES), made.columns, made.provenance)
    even = balanced(table)
    kept = even.frame[even.frame["used"]]
    assert kept.groupby(["system_rule", "prompt"], observed=True).size().to_dict() == {
        ("list", "conflict"): 3, ("paragraph", "conflict"): 3,
    }  # fmt: skip
    assert [name for name in kept["id"] if name.startswith("list")] == [f"list conflict {at}" for at in (0, 2, 4)]
    assert counts(even).set_index(["system_rule", "prompt"])["n_left_out"].to_dict() == {
        ("list", "agree"): 2 + 1, ("list", "conflict"): 4 + 1, ("paragraph", "conflict"): 1,
    }  # fmt: skip
    # Where the opposite was never asked for there is nothing to balance with
    alone = dataclasses.replace(table, frame=table.frame[table.frame["system_rule"] == "list"])
    assert balanced(alone).frame["used"].sum() == 9
    lost = table.frame.assign(used=table.frame["used"] & (table.frame["system_rule"] == "list"))
    with pytest.raises(InputError, match="no family has usable pairs of both its rules"):
        balanced(dataclasses.replace(table, frame=lost))
    assert table.frame["used"].sum() == 12  # the table that was given is as it was
    assert balanced(even).equals(even)
    with pytest.raises(InputError, match="are no preferences"):
        balanced("pairs")  # type: ignore[arg-type]


def test_a_real_model_and_a_run_that_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = chat_tiny()
    pairs = make_pairs("training", 6, families=["case", "quotation"])
    plain = make_preferences(model, pairs, max_answer_tokens=6, keep_consistent=0.5, progress=False)
    monkeypatch.setattr(preferences, "_CHUNK", 3)
    real, calls = preferences._rows, []

    def dies(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(preferences, "_rows", dies)
    options: dict[str, Any] = {
        "max_answer_tokens": 6,
        "keep_consistent": 0.5,
        "progress": False,
        "out": tmp_path / "run",
    }
    with pytest.raises(KeyboardInterrupt):
        make_preferences(model, pairs, **options)
    made = make_preferences(model, pairs, **options)
    assert len(calls) == 4  # the third chunk alone was made again
    assert made.frame.astype(object).equals(plain.frame.astype(object))
    assert made.attachments == plain.attachments


@given(st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=30))
def test_repeats_counts_trigrams(words: list[str]) -> None:
    trigrams = [tuple(words[at : at + 3]) for at in range(len(words) - 2)]
    assert repeats(" ".join(words)) == (len(trigrams) > 0 and len(set(trigrams)) / len(trigrams) < 0.5)


def test_errors(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[dict[str, Any], str]] = [
        ({"pairs": []}, "no pair or no prompt was given"),
        ({"pairs": [*PAIRS, *PAIRS]}, "two pairs have the id"),
        ({"keep_consistent": 1.5}, "expected a share"),
        ({"max_answer_tokens": 0}, "expected at least 1"),
    ]
    for changes, message in calls:
        with pytest.raises(InputError, match=message):
            make_preferences(model, **{"pairs": PAIRS, "progress": False, **changes})
    plant(monkeypatch, model, lambda name: ("", True))
    nothing = make_preferences(model, PAIRS, **ALONE)
    assert not nothing.frame["used"].any()
    with pytest.raises(InputError, match="no preference pair is usable"):
        read_preferences(nothing)
    with pytest.raises(InputError, match="are no preferences"):
        read_preferences("pairs")  # type: ignore[arg-type]
