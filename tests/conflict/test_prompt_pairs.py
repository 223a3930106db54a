"""Pairs: balanced, disjoint between parts, and alike but for the rules."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from chat_models import chat_tiny

from interp.conflict.dialogues import Turn
from interp.conflict.pairs import HELD_OUT_FAMILIES, PROMPTS, encode_pair, make_pair, make_pairs
from interp.conflict.verifiers import BUILT_IN, family
from interp.conflict.wordings import PARTS, rule_texts, tasks
from interp.errors import InputError


def kinds(pair: object, prompt: str) -> list[tuple[str, str, str]]:
    return [(turn.role, kind, text) for turn in pair.prompts[prompt] for kind, text in turn.pieces if kind != "other"]  # type: ignore[attr-defined]


def test_pairs_are_balanced_and_complete() -> None:
    pairs = make_pairs("held-out")
    n_tasks = sum(task.part == "held-out" for task in tasks())
    counts = Counter((pair.family, pair.system_rule, pair.wording) for pair in pairs)
    assert len(counts) == len(BUILT_IN) * 2 * 2
    assert set(counts.values()) == {n_tasks}
    assert len({pair.id for pair in pairs}) == len(pairs)
    some = make_pairs("held-out", 37)
    assert some == pairs[:37]
    assert max(Counter((pair.family, pair.system_rule, pair.wording) for pair in some).values()) == 2


def test_parts_share_no_task_and_held_out_families_are_held_out() -> None:
    used = {part: {pair.task.text for pair in make_pairs(part)} for part in PARTS}
    for first in PARTS:
        for second in PARTS:
            assert first == second or not used[first] & used[second]
    for part in PARTS:
        families = {pair.family for pair in make_pairs(part)}
        assert (set(HELD_OUT_FAMILIES) <= families) == (part == "held-out")


@pytest.mark.parametrize("setting", ["user", "peer"])
def test_prompts_differ_in_their_rules_alone(setting: str) -> None:
    others = set()
    for pair in make_pairs("localisation", 48, setting=setting):
        ours, theirs = (set(rule_texts(pair.family, rule, pair.wording)) for rule in (pair.system_rule, pair.user_rule))
        found = {name: kinds(pair, name) for name in PROMPTS}
        task = ("user", "task", pair.task.text)
        assert found["none"] == [task]
        first = found["system"][0]
        assert first[:2] == ("system", "system_rule")
        assert first[2] in ours
        assert found["system"] == [first, task]
        for name, texts in (("agree", ours), ("paraphrase", ours), ("conflict", theirs)):
            assert found[name][:2] == [first, task]
            assert found[name][2][:2] == ("user", "user_rule")
            assert found[name][2][2] in texts
        assert found["user"] == [task, ("user", "user_rule", first[2])]
        assert len({first[2], found["agree"][2][2], found["paraphrase"][2][2]}) == 3
        places = [
            rule_texts(pair.family, rule, pair.wording).index(found[name][2][2])
            for name, rule in (("paraphrase", pair.system_rule), ("conflict", pair.user_rule))
        ]
        assert places[0] == places[1]  # one form
        away = "sentences" if pair.family == "language" else "language"
        asked = [rule for rule in family(away).rules if found["other"][2][2] in rule_texts(away, rule, pair.wording)]
        assert found["other"][:2] == [first, task]
        assert len(asked) == 1
        assert rule_texts(away, asked[0], pair.wording).index(found["other"][2][2]) == places[0]
        others.add((away, asked[0]))
        assert len(pair.prompts["conflict"]) == (4 if setting == "peer" else 2)
    assert others == {(away, rule) for away in ("sentences", "language") for rule in family(away).rules}


TEXTS = {
    "french": "La mer est profonde et le vent est fort. Il pleut sur les villes et dans la nuit. Les bateaux sont au "
    "port, et les hommes ne sont pas sur le pont.",
    "english": "The sea is deep and the wind is strong. It rains on the towns and in the night. The boats are in the "
    "port, and the men are not on the deck.",
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_other_demand_can_be_obeyed_as_well(name: str) -> None:
    """Both rules of a family, each with both rules of the other family that is asked for beside it."""
    for rule in family(name).rules:
        for language, text in TEXTS.items():
            if name == "language":
                for away in family("sentences").rules:
                    answer = family("sentences").rewrite(away, TEXTS[rule])
                    assert family("language").verify(rule, answer or "").passed
            else:
                answer = family(name).rewrite(rule, text)
                assert answer is not None
                assert family(name).verify(rule, answer).passed
                assert family("language").verify(language, answer).passed, answer


def test_rules_swap_places() -> None:
    for pair in make_pairs("localisation", swapped=False):
        assert (pair.system_rule, pair.user_rule) == family(pair.family).rules
    both = {(pair.family, pair.system_rule) for pair in make_pairs("localisation")}
    assert both == {(name, rule) for name in BUILT_IN if name not in HELD_OUT_FAMILIES for rule in family(name).rules}


def test_wordings_are_rotated_over_tasks() -> None:
    first = Counter(
        kinds(pair, "system")[0][2] for pair in make_pairs("localisation", families=["case"], wordings=["simple"])
    )
    assert len(first) == 6
    assert min(first.values()) >= 3


def test_the_seed_orders_tasks() -> None:
    assert make_pairs("training", 24) == make_pairs("training", 24)
    assert [pair.id for pair in make_pairs("training", 24)] != [pair.id for pair in make_pairs("training", 24, seed=1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"part": "test"}, "part='test'; expected one of localisation"),
        ({"n": 0}, "n=0; expected at least 1 pair"),
        ({"wordings": ["long"]}, "wording 'long'"),
        ({"wordings": []}, "expected at least one of each"),
        ({"setting": "boss"}, "setting='boss'; expected one of user, peer"),
        ({"families": ["rhyme"]}, "no family 'rhyme'"),
        ({"tasks_from": []}, "no task, family or wording for the part 'localisation'"),
    ],
)
def test_what_cannot_be_paired_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_pairs(**arguments)
    with pytest.raises(InputError, match="are not the two of family 'case'"):
        make_pair("case", "capitals", "list", task=tasks()[0])


def test_pairs_of_unequal_tasks_are_refused() -> None:
    pair = make_pairs(n=1)[0]
    other = (*pair.prompts["agree"][:1], Turn("user", (("task", "Something else?"), ("user_rule", "Shout."))))
    broken = replace(pair, prompts={**pair.prompts, "agree": other})
    with pytest.raises(InputError, match=r"asks different tasks: 'Something else\?' in 'agree' and .* in 'paraphrase'"):
        encode_pair(chat_tiny(), broken)


def test_a_prompt_that_a_pair_does_not_have_is_refused() -> None:
    pair = make_pairs(n=1)[0]
    with pytest.raises(InputError, match="has no prompt 'loud'; it has none, user, system"):
        encode_pair(chat_tiny(), pair, ("loud",))


def test_an_error_names_its_pair() -> None:
    pair = make_pairs(n=1)[0]
    with pytest.raises(InputError, match=f"pair '{pair.id}': a dialogue of"):
        encode_pair(chat_tiny(max_position_embeddings=64), pair)
