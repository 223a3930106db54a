"""Answers: a model whose answers are known, judged by the verifiers; resumed runs; the shares and their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chat_models import chat_tiny

from interp.conflict import answers as answers_module
from interp.conflict.answers import FOLLOW_COLUMNS, follow, generate_answers
from interp.conflict.dialogues import encode_dialogue
from interp.conflict.follow_summaries import (
    change_interval,
    follow_summary,
    followed_families,
    followed_rules,
    obedience_change,
    share_interval,
)
from interp.conflict.pairs import ASKED, make_pairs
from interp.errors import InputError
from interp.model import Model
from interp.provenance import Provenance
from interp.results import Result, load_result


class Obeys:
    """A model's `generate_ids` that writes capitals where the last rule of the prompt that it heeds asks for them."""

    def __init__(self, model: Model, heeds: str) -> None:
        self.model, self.heeds, self.asked = model, heeds, 0

    def __call__(self, encoded: list[Any], **_: Any) -> list[list[int]]:
        self.asked += len(encoded)
        made = []
        for ids in encoded:
            prompt = self.model.decode(ids, skip_special_tokens=False)
            system, _, user = prompt.rpartition("<|im_start|>user")
            text = {"system": system, "user": user}[self.heeds]
            loud = "apital" in text and "without any capital" not in text and "may be a capital" not in text
            answer = (
                "THE SEA IS DEEP."
                if loud and "small letter may" not in text.split("capital")[0]
                else "The Sea is deep."
            )
            made.append([*self.model.tokenizer(answer)["input_ids"], self.model.tokenizer.eos_token_id])
        return made


@pytest.fixture
def case_pairs() -> list[Any]:
    return [
        pair
        for pair in make_pairs("held-out", families=["case"], wordings=["simple"])
        if pair.system_rule == "capitals"
    ][:8]


def test_a_model_that_heeds_the_user_turn_alone(case_pairs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = chat_tiny()
    monkeypatch.setattr(model, "generate_ids", Obeys(model, "user"))
    monkeypatch.setattr(model, "end_ids", lambda: {model.tokenizer.eos_token_id})
    result = follow(model, case_pairs, progress=False)
    assert len(result.frame) == 8 * len(ASKED)
    assert result.frame["finished"].all()
    shares = result.frame.groupby("prompt", observed=True)["obeys_system"].mean()
    assert shares[["none", "system", "conflict"]].tolist() == [0, 0, 0]
    assert shares[["user", "agree", "paraphrase"]].tolist() == [1, 1, 1]
    rule = followed_rules(result).iloc[0]
    assert (rule["rule"], rule["none"], rule["user"], rule["conflict"]) == ("capitals", 0, 1, 0)
    assert (bool(rule["followed"]), bool(rule["heard"]), rule["other_wins"], rule["n"]) == (True, False, 0, 8)


def test_equal_prompts_are_answered_once(case_pairs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = chat_tiny()
    scripted = Obeys(model, "system")
    monkeypatch.setattr(model, "generate_ids", scripted)
    both = [
        *case_pairs,
        *[
            pair
            for pair in make_pairs("held-out", families=["case"], wordings=["simple"])
            if pair.system_rule == "small"
        ],
    ]
    follow(model, both, ("none", "conflict"), chunk=4, progress=False)
    assert scripted.asked == len({pair.task.id for pair in both}) + len(both)


def test_an_interrupted_run_goes_on(case_pairs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chat_tiny()
    scripted = Obeys(model, "system")
    monkeypatch.setattr(model, "generate_ids", scripted)
    whole = follow(model, case_pairs, progress=False)
    asked, original = scripted.asked, answers_module.answer_ids
    calls = []

    def dies(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(answers_module, "answer_ids", dies)
    with pytest.raises(KeyboardInterrupt):
        follow(model, case_pairs, chunk=2, out=tmp_path / "run", progress=False)
    scripted.asked = 0
    resumed = follow(model, case_pairs, chunk=2, out=tmp_path / "run", progress=False)
    assert 0 < scripted.asked < asked
    assert resumed.equals(whole)
    assert load_result(tmp_path / "run").equals(whole)


def test_answers_are_the_models_own_greedy_ones() -> None:
    model = chat_tiny(seed=3)
    dialogues = [pair.prompts["conflict"] for pair in make_pairs("held-out", 3)]
    answers = generate_answers(model, dialogues, max_new_tokens=5)
    for dialogue, answer in zip(dialogues, answers, strict=True):
        ids = list(encode_dialogue(model, dialogue).ids)
        for at in range(len(answer.ids)):
            logits = model.hf(input_ids=torch.tensor([[*ids, *answer.ids[:at]]])).logits[0, -1]
            assert int(logits.argmax()) == answer.ids[at]
        assert answer.text == model.decode(answer.ids)
        assert answer.finished == (answer.ids[-1] in model.end_ids())


def frame(rows: list[tuple[str, str, str, str, bool, bool]]) -> Result:
    made = [
        {
            **{"pair": f"{task}/{rule}", "part": "held-out", "task": task, "family": name, "system_rule": rule},
            **{
                "user_rule": "other",
                "wording": "simple",
                "setting": "user",
                "prompt": prompt,
                "answer": "",
                "n_tokens": 1,
            },
            **{"finished": True, "obeys_system": ours, "obeys_user": theirs, "reason": ""},
            **{"decided": ours or at % 4 > 0, "loops": at % 5 == 0},
        }
        for at, (name, rule, task, prompt, ours, theirs) in enumerate(rows)
    ]
    return Result("conflict.follow", pd.DataFrame(made), FOLLOW_COLUMNS, Provenance())


def test_shares_by_hand() -> None:
    rows = []
    for at in range(10):
        rows += [
            ("case", "capitals", f"t{at}", "none", at < 5, False),
            ("case", "capitals", f"t{at}", "system", at < 5, False),
        ]
        rows += [
            ("case", "capitals", f"t{at}", "user", True, False),
            ("case", "capitals", f"t{at}", "conflict", False, at < 7),
        ]
    result = frame(rows)
    table = follow_summary(result).set_index("prompt")
    assert table["obeys_system"].to_dict() == {"none": 0.5, "system": 0.5, "user": 1.0, "conflict": 0.0}
    assert table.loc["user", "above_none"] == 0.5
    assert 0.1 <= table.loc["user", "above_low"] <= 0.3
    assert table.loc["system", ["above_none", "above_low", "above_high"]].tolist() == [0, 0, 0]
    assert table.loc["conflict", "obeys_user"] == 0.7
    # Rows of a prompt are every fourth one; the conflict's are 3, 7, 11 …, the first prompt's 0, 4, 8 …
    assert table["undecided"].to_dict() == {"none": 0.5, "system": 0, "user": 0, "conflict": 0}
    assert table["loops"].to_dict() == dict.fromkeys(("none", "system", "user", "conflict"), 0.2)
    rule = followed_rules(result).iloc[0]
    assert (bool(rule["followed"]), bool(rule["heard"]), rule["other_wins"]) == (True, False, 0.7)
    # 0 of ten tasks: Wilson's interval.
    assert (rule["conflict_low"], rule["conflict_high"]) == pytest.approx((0, 3.8415 / 13.8415), abs=1e-4)
    assert (rule["undecided"], rule["loops"]) == (0, 0.2)


def test_the_interval_is_over_tasks() -> None:
    # Two tasks with fifty answers each are two observations, not a hundred.
    passed, tasks = pd.Series([1.0] * 50 + [0.0] * 50), pd.Series(["a"] * 50 + ["b"] * 50)
    assert share_interval(passed, tasks) == (0.0, 1.0)
    # Where all agree, Wilson's interval: z² / (n + z²) for 0 of n.
    low, high = share_interval(pd.Series(np.zeros(20)), pd.Series([str(at) for at in range(20)]))
    assert low == pytest.approx(0, abs=1e-12)
    assert high == pytest.approx(1.959964**2 / (20 + 1.959964**2), rel=1e-4)


def test_changes_are_counted_pair_by_pair() -> None:
    def answers(obeys: str, *, backwards: bool = False) -> Result:
        # Two pairs of each task; "case" on the tasks a and b, "list" on c alone.
        rows = [
            (name, rule, task, "conflict", mark == "S", False)
            for mark, (name, rule, task) in zip(
                obeys,
                [(name, rule, task) for name, task in (("case", "a"), ("case", "b"), ("list", "c")) for rule in "xy"],
                strict=True,
            )
        ]
        return frame(rows[::-1] if backwards else rows)

    before, after = answers("..S..S"), answers("SS.S.S", backwards=True)
    table = obedience_change(before, after).set_index("family")
    assert table.loc["case", ["prompt", "before", "after", "change", "n"]].tolist() == ["conflict", 0.25, 0.75, 0.5, 4]
    # Changes by task: 1 and 1 in a, −1 and 1 in b.
    assert table.loc["case", ["low", "high"]].tolist() == [0.0, 1.0]
    assert table.loc["list", ["before", "after", "change", "n"]].tolist() == [0.5, 0.5, 0, 2]
    assert table.loc["list", ["low", "high"]].isna().all()  # a single task
    whole = obedience_change(before, after, ()).iloc[0]
    assert whole["n_tasks"] == 3
    assert whole[["before", "after", "change", "n"]].tolist() == pytest.approx([2 / 6, 4 / 6, 2 / 6, 6])
    rules = obedience_change(before, after, ("system_rule",)).set_index("system_rule")
    assert rules["change"].to_dict() == pytest.approx({"x": 0.0, "y": 2 / 3})
    # What one of the two was not asked is left out, other pairs are refused.
    more = frame([("case", "x", "a", "conflict", True, False), ("case", "x", "a", "agree", True, False)])
    fewer = frame([("case", "x", "a", "conflict", False, True)])
    assert obedience_change(fewer, more)[["prompt", "change"]].to_numpy().tolist() == [["conflict", 1.0]]
    for other in (answers("S....."), frame([("case", "x", "a", "agree", True, False)])):
        with pytest.raises(InputError, match="answers to other pairs or prompts"):
            obedience_change(fewer, other)


@pytest.mark.parametrize(("change", "low", "high"), [(0.0, -1, 1), (1.0, -2, 0), (-1.0, 0, 2), (0.5, -1.5, 0.5)])
def test_tasks_that_change_alike_do_not_make_it_certain(change: float, low: float, high: float) -> None:
    tasks = pd.Series([f"t{at // 2}" for at in range(20)])
    other = 1.959964**2 / (10 + 1.959964**2)  # of ten tasks
    ends = change_interval(pd.Series([change] * 20), tasks)
    assert ends == pytest.approx((change + low * other, change + high * other), abs=1e-6)


def test_what_is_above_none_is_pair_by_pair_in_any_order() -> None:
    rows = [
        ("case", rule, task, prompt, prompt == "user" and task == "a", False)
        for rule in "xyz"
        for task in "ab"
        for prompt in ("none", "user")
    ]
    made = frame(rows)
    for seed in range(5):
        mixed = Result(made.kind, made.frame.sample(frac=1, random_state=seed), made.columns, made.provenance)
        row = follow_summary(mixed, ("family",)).set_index("prompt").loc["user"]
        # One task with and one without: the tasks' means are the ends.
        assert row[["above_none", "above_low", "above_high"]].tolist() == [0.5, 0.0, 1.0]


def test_families_that_are_followed() -> None:
    tasks = [f"t{at}" for at in range(8)]
    rows = [
        (name, rule, task, prompt, obeys, False)
        for task in tasks
        for name, rule, asked, by_itself in (
            ("sentences", "one-sentence", True, False),
            ("case", "capitals", False, False),
            ("case", "small", True, False),
            ("list", "paragraph", True, True),
            ("digits", "digits", task == "t0", False),
        )
        for prompt, obeys in (("none", by_itself), ("user", asked))
    ]
    assert followed_families(frame(rows)) == ["case", "sentences"]
    with pytest.raises(InputError, match="the prompts user were not asked"):
        followed_families(frame([row for row in rows if row[3] == "none"]))


def test_what_cannot_be_followed_is_refused(case_pairs: list[Any]) -> None:
    model = chat_tiny()
    with pytest.raises(InputError, match="no pair or no prompt"):
        follow(model, [])
    with pytest.raises(InputError, match="has no prompt 'loud'"):
        follow(model, case_pairs, ("loud",))
    with pytest.raises(InputError, match="two pairs have the id"):
        follow(model, [case_pairs[0], case_pairs[0]])
    with pytest.raises(InputError, match="a result of kind 'conflict\\.other'"):
        follow_summary(_other_kind())
    with pytest.raises(InputError, match="no column 'loud'"):
        follow_summary(frame([("case", "capitals", "t", "none", True, False)]), ("loud",))
    with pytest.raises(InputError, match="the prompts conflict, system, user were not asked"):
        followed_rules(frame([("case", "capitals", "t", "none", True, False)]))


def _other_kind() -> Result:
    one = frame([("case", "capitals", "t", "none", True, False)])
    return Result("conflict.other", one.frame, FOLLOW_COLUMNS, Provenance())


@pytest.mark.slow
def test_the_embedded_model_obeys_a_list_rule_in_the_user_turn_and_not_in_the_system_turn(embedded: Model) -> None:
    pairs = [
        pair for pair in make_pairs("held-out", families=["list"], wordings=["simple"]) if pair.system_rule == "list"
    ][:6]
    result = follow(embedded, pairs, ("system", "user", "conflict"), max_new_tokens=40, progress=False)
    shares = result.frame.groupby("prompt", observed=True)["obeys_system"].mean()
    assert shares["user"] >= 0.5
    assert shares["system"] <= 0.35
    assert shares["conflict"] <= 0.35


@pytest.mark.parametrize(
    ("template", "said", "kept", "finished"),
    [
        ("plain", " The sea.\n\nUser: And rain?", " The sea.\n", True),
        ("plain", " The sea.\n\nAssistant: x\nUser: y", " The sea.\n", True),
        ("plain", " Users: many", " Users: many", False),
        ("chatml", "The sea.<|im_end|>\n<|im_start|>user", "The sea.", True),
        (None, "The sea.\nUser: x", "The sea.\nUser: x", False),
    ],
)
def test_an_answer_ends_where_the_model_writes_the_next_turn(
    monkeypatch: pytest.MonkeyPatch, template: str | None, said: str, kept: str, finished: bool
) -> None:
    model = chat_tiny()
    ids = model.tokenizer(said, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(model, "generate_ids", lambda prompts, **_: [list(ids) for _ in prompts])
    (answer,) = answers_module.answer_ids(model, [[5, 6]], template=template)
    assert (answer.text, answer.finished) == (kept, finished)
    assert model.decode(answer.ids) == kept


def test_answers_of_an_older_version_say_so() -> None:
    made = frame([("case", "capitals", "t", "none", True, False)])
    old = Result(
        made.kind,
        made.frame.drop(columns=["decided", "loops"]),
        FOLLOW_COLUMNS[:-3] + FOLLOW_COLUMNS[-1:],
        Provenance(),
    )
    with pytest.raises(InputError, match="made by an older version"):
        follow_summary(old)
