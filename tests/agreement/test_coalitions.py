"""The target for every set of kept tokens, against a plain forward of each replaced sequence alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from plain_forward import PIECES, byte_pairs, exact, plain_logits, tiny_classifier, word_pieces
from tiny_models import SIZES, VOCAB, tiny_hf, tiny_tokenizer

from interp.agreement.coalitions import Coalitions, resolve_baseline
from interp.agreement.targets import TARGETS
from interp.agreement.tasks import Classifier, Continuation, NextToken, Task, Verbalizer
from interp.errors import InputError
from interp.model import Model, load_model

FEW_SHOT = Verbalizer(
    {"no": " old", "yes": " new", "so": " red"},
    "{text} is",
    shots=[(" red tea", "yes"), (" sea", "no")],
    separator=" of",
)
MODELS: dict[str, Model] = {}
GAMES: dict[str, tuple[Task, list[Any]]] = {
    "verbalizer": (
        FEW_SHOT,
        [(" water keys king", "yes"), (" dog", "so"), (" cat sea", "no"), (" tea of the sun", "no")],
    ),
    "next_token": (NextToken(), [(" the dog is", " old"), (" the cat", " king"), (" a sea of red", " tea")]),
    "continuation": (
        Continuation(),
        [(" the dog", " is old"), (" the cat is", " new"), (" sun", " of the red sea"), (" the sea", " is red")],
    ),
    "bert": (Classifier(), [("the film, good", 2), ("bad", 0), ("unaffable films", 1)]),
    "llama": (Classifier(), [(" the dog is", 2), (" sea", 0), (" water keys king old", 1)]),
}


def model_of(kind: str) -> Model:
    if kind not in MODELS:
        if kind == "bert":
            MODELS[kind] = load_model(tiny_classifier(vocab_size=len(PIECES)).double(), word_pieces())
        elif kind == "llama":
            hf = tiny_classifier("LlamaForSequenceClassification").double()
            MODELS[kind] = load_model(hf, tiny_tokenizer())
        else:
            MODELS[kind] = MODELS.setdefault("lm", exact())
    return MODELS[kind]


def game_of(kind: str, **options: Any) -> Coalitions:
    task, examples = GAMES[kind]
    return Coalitions(model_of(kind), examples, task=task, **options)


def everything(n: int) -> np.ndarray:
    return np.array(list(product([False, True], repeat=n)))


class Oracle:
    """One example's target from plain forwards, computed in float64 with numpy."""

    def __init__(self, game: Coalitions, example: int, choices: Sequence[int] | None) -> None:
        self.game, self.choices, self.one = game, choices, game.encoded[example]
        self.original = self.logits(self.one.ids)
        gold = game.of == "gold" or isinstance(game.task, Continuation)
        best = self.original.argmax(-1)
        self.wanted = np.array(self.one.gold) if gold else best
        others = self.original.copy()
        others[np.arange(len(others)), self.wanted] = -np.inf
        self.contrast = others.argmax(-1)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        vector = self.game.embedder.vector
        return plain_logits(self.game.model, ids, self.one.n_reads, self.choices, vector).numpy()

    def value(self, kept: np.ndarray) -> float:
        ids = list(self.one.ids)
        for keep, position in zip(kept, self.one.positions, strict=True):
            if not keep:
                ids[position] = self.game.baseline_id
        logits, reads = self.logits(ids), np.arange(max(1, self.one.n_reads))
        chosen = logits[reads, self.wanted]
        if self.game.target == "logit_difference":
            return float((chosen - logits[reads, self.contrast]).sum())
        log_prob = float((chosen - np.log(np.exp(logits).sum(-1))).sum())
        return log_prob if self.game.target == "log_prob" else math.exp(log_prob)


def choices_of(kind: str) -> list[int] | None:
    return [VOCAB.index(word) for word in ("▁old", "▁new", "▁red")] if kind == "verbalizer" else None


def check(game: Coalitions, kind: str) -> None:
    """All coalitions of all examples."""
    wanted = {example: everything(game.size(example)) for example in range(len(game))}
    found = game.values(wanted)
    for example, masks in wanted.items():
        oracle = Oracle(game, example, choices_of(kind))
        assert game.wanted[example] == oracle.wanted.tolist()
        assert game.contrast[example] == oracle.contrast.tolist()
        expected = np.array([oracle.value(mask) for mask in masks])
        tolerance = 0 if game.target == "probability" else 2e-5  # float32 logits; a probability may be tiny
        np.testing.assert_allclose(found[example], expected, rtol=1e-4, atol=tolerance)
        assert np.ptp(expected) > 1e-3 * np.abs(expected).max()
        assert game.full(example) == found[example][-1]
        assert game.empty(example) == found[example][0]
        np.testing.assert_array_equal(game.known(example, masks[::-1]), found[example][::-1])


@pytest.mark.parametrize("of", ["predicted", "gold"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", GAMES)
def test_every_coalition(kind: str, target: str, of: str) -> None:
    check(game_of(kind, target=target, of=of), kind)


@pytest.mark.parametrize("baseline", ["mask", "pad", "zero", "mean", 7, "good"])
def test_baselines_of_an_encoder(baseline: Any) -> None:
    game = game_of("bert", baseline=baseline)
    table = model_of("bert").hf.get_input_embeddings().weight
    ids = {"mask": 4, "pad": 0, "zero": 15, "mean": 15, 7: 7, "good": 11}
    vectors = {"zero": torch.zeros(16), "mean": table.mean(0)}
    assert game.baseline_id == ids[baseline]
    assert game.baseline == str(baseline)
    if baseline in vectors:
        torch.testing.assert_close(game.embedder.vector.double(), vectors[baseline].double(), rtol=1e-6, atol=1e-7)
    else:
        assert game.embedder.vector is None
    check(game, "bert")


@pytest.mark.parametrize("baseline", ["pad", "zero", "mean", 7, " code"])
@pytest.mark.parametrize("kind", ["verbalizer", "continuation", "llama"])
def test_baselines_of_a_decoder(kind: str, baseline: Any) -> None:
    game = game_of(kind, baseline=baseline)
    assert game.baseline_id == {"pad": 0, "zero": 64, "mean": 64, 7: 7, " code": VOCAB.index("▁code")}[baseline]
    check(game, kind)


def test_the_default_baseline() -> None:
    assert game_of("bert").baseline == "mask"
    assert game_of("verbalizer").baseline == "pad"
    assert resolve_baseline(load_model(tiny_hf()), None) == ("pad", 0, None)


def test_the_mean_of_a_scaled_embedding() -> None:
    model = exact("gemma3")
    mean = model.hf.get_input_embeddings()(torch.arange(64)).mean(0)
    found = resolve_baseline(model, "mean")[2]
    assert found is not None
    torch.testing.assert_close(found.double(), mean.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        (64, "baseline=64; expected a token id from 0 to 63"),
        (-1, "baseline=-1; expected a token id from 0 to 63"),
        (True, "baseline=True; expected 'mask', 'pad', 'zero', 'mean'"),
        (1.0, "baseline=1.0; expected"),
        ("mask", "has no mask token; use baseline='pad'"),
        (" the dog", "baseline=' the dog' is 2 tokens; expected one"),
        ("", "baseline='' is 0 tokens; expected one"),
    ],
)
def test_baselines_that_cannot_be_used(baseline: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        game_of("verbalizer", baseline=baseline)
    if baseline == " the dog":
        with pytest.raises(InputError, match="is a text, and the model has no tokenizer; give a token id"):
            Coalitions(load_model(tiny_hf()), [[5]], baseline=baseline)


# What is fixed on the original


def test_a_continuation_is_explained_also_where_it_is_one_token() -> None:
    game = Coalitions(model_of("lm"), [(" the cat is", " new"), (" the cat is", " new sea")], task=Continuation())
    assert game.wanted == [[VOCAB.index("▁new")], [VOCAB.index("▁new"), VOCAB.index("▁sea")]]
    assert game.about()[0]["explained"] == " new"


def test_a_continuation_is_teacher_forced() -> None:
    """Σ log p, each token after those before it."""
    model = model_of("lm")
    game = Coalitions(model, [(" the dog", " is old new")], task=Continuation())
    total, ids = 0.0, [VOCAB.index("▁the"), VOCAB.index("▁dog")]
    for token in (VOCAB.index(f"▁{word}") for word in ("is", "old", "new")):
        total += float(plain_logits(model, ids)[0].log_softmax(-1)[token])
        ids.append(token)
    assert game.full(0) == pytest.approx(total, rel=1e-5)
    assert float(game.probability[0]) == pytest.approx(math.exp(total), rel=1e-4)


def test_one_text_with_two_labels() -> None:
    """The same input is asked for two classes."""
    for kind, task, examples in (
        ("verbalizer", FEW_SHOT, [(" dog sea", label) for label in ("no", "yes", "no", "so")]),
        ("bert", Classifier(), [("good film", label) for label in (0, 1, 0, 2)]),
    ):
        for target in TARGETS:
            game = Coalitions(model_of(kind), examples, task=task, of="gold", target=target)
            check(game, kind)
            assert game.full(0) == game.full(2) != game.full(1)


def test_one_text_twice_with_the_predicted_class() -> None:
    game = Coalitions(model_of("lm"), [" dog sea", " dog sea"], task=NextToken())
    assert game.wanted[0] == game.wanted[1] != []
    assert game.predicted[0] == game.predicted[1] >= 0
    assert game.full(0) == game.full(1)


def test_the_baseline_input_of_texts_of_one_length_is_one_input_with_two_targets() -> None:
    texts = [
        " ".join(["", first, second]) for first, second in product(["dog", "sea", "king", "keys", "tea"], repeat=2)
    ]
    game = Coalitions(model_of("lm"), texts, task=NextToken())
    assert len({tuple(wanted) for wanted in game.wanted}) > 1
    for example in range(len(game)):
        oracle = Oracle(game, example, None)
        assert game.empty(example) == pytest.approx(oracle.value(np.zeros(2, dtype=bool)), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["next_token", "bert"])
def test_a_certain_model(kind: str) -> None:
    """Logits so far apart that the softmax is 1 exactly."""
    model = exact() if kind == "next_token" else load_model(tiny_classifier(vocab_size=15), word_pieces())
    head = model.hf.lm_head if kind == "next_token" else model.hf.classifier
    with torch.no_grad():
        head.weight.mul_(1e5)
    examples = [text for text, _ in GAMES[kind][1]]
    for target, full in (("log_prob", 0.0), ("probability", 1.0)):
        game = Coalitions(model, examples, target=target)
        assert [game.full(example) for example in range(3)] == [full] * 3
        assert game.probability.tolist() == [1.0] * 3
        assert all(np.isfinite(game.empty(example)) for example in range(3))
    game = Coalitions(model, examples, target="logit_difference")
    assert all(100 < game.full(example) < np.inf for example in range(3))
    assert all(one != other for one, other in zip(game.wanted, game.contrast, strict=True))


# Memory of what was asked


def calls_of(game: Coalitions) -> list[int]:
    counts: list[int] = []
    game.model.arch.layer(0).register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    return counts


def test_nothing_is_computed_twice() -> None:
    model = load_model(tiny_hf(), tiny_tokenizer())
    game = Coalitions(model, [" the dog is", " sea tea"], task=NextToken())
    assert game.asked.tolist() == game.computed.tolist() == [0, 0]
    counts = calls_of(game)
    game.full(0), game.empty(1)
    game.values({0: np.array([[True] * 3, [False] * 3])})
    assert counts == []
    assert game.asked.tolist() == [2, 0]
    assert game.computed.tolist() == [0, 0]
    some = np.array([[True, False, True], [True, False, True], [True, True, True], [False, True, True]])
    first = game.values({0: some})[0]
    assert counts != []
    assert game.asked.tolist() == [6, 0]
    assert game.computed.tolist() == [2, 0]  # one twice, one known
    assert first[0] == first[1]
    counts.clear()
    np.testing.assert_array_equal(game.values({0: some[::-1].astype(int)})[0], first[::-1])
    assert counts == []
    assert game.asked.tolist() == [10, 0]
    assert game.computed.tolist() == [2, 0]
    game.compute({0: ~some, 1: everything(2)})
    assert game.asked.tolist() == [14, 4]
    assert game.computed.tolist() == [4, 2]
    with pytest.raises(KeyError):
        game.known(0, np.array([[True, False, False], [True, True, False]]))
    assert game.values({}) == {}
    assert game.values({0: np.zeros((0, 3), dtype=bool)})[0].shape == (0,)


@pytest.mark.parametrize("kind", GAMES)
def test_the_budget_of_tokens_does_not_matter(kind: str) -> None:
    tables = []
    for max_tokens in (1, 7, 4096):
        game = game_of(kind, max_tokens=max_tokens)
        tables.append(
            np.concatenate(list(game.values({at: everything(game.size(at)) for at in range(len(game))}).values()))
        )
    np.testing.assert_allclose(tables[1], tables[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tables[2], tables[0], rtol=1e-5, atol=1e-6)


def test_examples_do_not_matter_for_each_other() -> None:
    task, examples = GAMES["continuation"]
    together = game_of("continuation")
    for example, given in enumerate(examples):
        alone = Coalitions(model_of("lm"), [given], task=task)
        assert alone.full(0) == pytest.approx(together.full(example), rel=1e-5)
        assert alone.empty(0) == pytest.approx(together.empty(example), rel=1e-5)


def test_the_input_of_a_coalition() -> None:
    game = game_of("verbalizer")
    one = game.encoded[0]
    ids = game.input(0, np.array([False, True, False]))
    assert ids[: one.positions[0]] == list(one.ids[: one.positions[0]])
    assert ids[one.positions[0] :] == [0, VOCAB.index("▁keys"), 0, VOCAB.index("▁is")]
    assert game.input(0, np.ones(3, dtype=bool)) == list(one.ids)


# The shared beginning


@pytest.mark.parametrize("kind", GAMES)
def test_the_shared_prefix_has_nothing_explained(kind: str) -> None:
    for special in (False, True):
        game = game_of(kind, special=special)
        length = len(game.prefix.ids)
        assert 0 <= length <= min(min(one.positions) for one in game.encoded)
        assert {one.ids[:length] for one in game.encoded} == {game.prefix.ids}
        assert all(length <= len(one.ids) - max(1, one.n_reads) for one in game.encoded)
    assert len(game_of(kind).prefix.ids) == {"verbalizer": 9}.get(kind, 0)  # the few-shot prompt; encoders keep nothing
    if kind == "bert":
        assert game_of(kind, special=True).prefix.ids == ()


def test_prefixes_by_hand() -> None:
    model = load_model(tiny_hf(vocab_size=300), byte_pairs(bos=True))
    assert Coalitions(model, ["the good film", "the bad"]).prefix.ids == (1,)  # <bos>
    assert Coalitions(model, ["the good film", "the bad"], special=True).prefix.ids == ()
    short_and_long = [(" dog", " is"), (" dog", " is old new red sea")]
    assert Coalitions(model_of("lm"), short_and_long, task=Continuation()).prefix.ids == ()
    assert Coalitions(model_of("lm"), [[1, 5], [1, 6, 7]]).prefix.ids == (1,)


# What is said about it


def test_about_a_verbalizer() -> None:
    game = game_of("verbalizer", of="gold")
    rows = game.about()
    oracle = Oracle(game, 0, choices_of("verbalizer"))
    probabilities = np.exp(oracle.original[0]) / np.exp(oracle.original[0]).sum()
    assert rows[0]["text"] == " water keys king"
    assert rows[0]["label"] == rows[0]["explained"] == "yes"
    assert rows[0]["predicted"] == ("no", "yes", "so")[int(probabilities.argmax())]
    assert rows[0]["probability"] == pytest.approx(probabilities[1], rel=1e-5)
    assert rows[0]["units"] == [" water", " keys", " king"]
    assert [row["label"] for row in rows] == ["yes", "so", "no", "no"]


def test_about_the_other_tasks() -> None:
    rows = game_of("continuation").about()
    assert (
        [row["explained"] for row in rows]
        == [row["label"] for row in rows]
        == [" is old", " new", " of the red sea", " is red"]
    )
    assert rows[0]["predicted"] is None
    best = int(plain_logits(model_of("lm"), [VOCAB.index(f"▁{word}") for word in ("the", "cat", "is")]).argmax())
    assert rows[1]["predicted"] == model_of("lm").decode([best], skip_special_tokens=False)
    unlabelled = Coalitions(model_of("lm"), [" the cat is"]).about()[0]  # the default task of a causal LM
    assert unlabelled["label"] is None
    assert unlabelled["explained"] == unlabelled["predicted"] == rows[1]["predicted"]
    named = Coalitions(model_of("bert"), ["bad", "the film"], task=Classifier(("a", "b", "c")), units="words").about()
    for row, ids in zip(named, ([2, 12, 3], [2, 5, 9, 3]), strict=True):
        logits = plain_logits(model_of("bert"), ids, 0)[0]
        assert row["predicted"] == row["explained"] == "abc"[int(logits.argmax())]
        assert row["probability"] == pytest.approx(float(logits.softmax(-1).max()), rel=1e-5)
    assert named[1]["units"] == ["the", "film"]
    bare = Coalitions(load_model(tiny_hf()), [[5, 9]]).about()[0]
    assert bare["predicted"] == str(int(plain_logits(load_model(tiny_hf()), [5, 9]).argmax()))


def test_bad_questions() -> None:
    with pytest.raises(InputError, match="example 1 has no label, and of='gold'"):
        Coalitions(model_of("lm"), [(" dog", " sea"), " dog"], of="gold")
    with pytest.raises(InputError, match="target='logits'"):
        Coalitions(model_of("lm"), [" dog"], target="logits")
    with pytest.raises(InputError, match="of='label'"):
        Coalitions(model_of("lm"), [" dog"], of="label")


@pytest.mark.parametrize("kind", ["Roberta", "Electra"])
def test_other_encoders_by_their_own_limits_and_widths(kind: str) -> None:
    sizes = {**SIZES, "max_position_embeddings": 22, "pad_token_id": 1}
    if kind == "Electra":
        sizes |= {"embedding_size": 8, "max_position_embeddings": 20}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = load_model(getattr(transformers, f"{kind}ForSequenceClassification")(config).eval(), tiny_tokenizer())
    assert model.arch.n_positions == 20
    longest = list(range(4, 24))
    game = Coalitions(model, [longest, longest[:5]], baseline="zero")
    assert np.isfinite([game.full(0), game.empty(0), game.full(1)]).all()
    with pytest.raises(InputError, match="context is 20 tokens"):
        Coalitions(model, [[*longest, 5]])
