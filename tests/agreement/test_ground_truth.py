"""The known rankings are what they are said to be: autograd, sums over subsets and brute force agree."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from interp import load_model
from interp.agreement import ground_truth
from interp.agreement.ground_truth import (
    ANSWERS,
    FILLERS,
    QUERY,
    VOCABULARY,
    WEIGHTS,
    answer_accuracy,
    linear_classifier,
    marked_examples,
    marked_tokenizer,
    recovery,
    train_marked_tokens,
    true_scores,
    true_weights,
)
from interp.atomic import replace_folder
from interp.errors import InputError, ResourceError

IDS = [3, 1, 4, 1, 5]


@pytest.fixture
def linear() -> Any:
    return load_model(linear_classifier(n_tokens=12, d_model=6, n_classes=3, seed=1), check=False)


@pytest.fixture(scope="module")
def marked() -> Any:
    return train_marked_tokens(seed=0, steps=120)


# The linear classifier


def test_it_is_a_model_without_layers(linear: Any) -> None:
    arch = linear.arch
    assert (arch.n_layers, arch.d_model, arch.vocab_size, arch.family.decoder) == (0, 6, 12, False)
    assert arch.embedding() is linear.hf.get_input_embeddings()
    assert linear.name == "linear-classifier"
    with linear.attention_implementation("sdpa"):
        assert linear.attention == "sdpa"
    assert linear.attention == "eager"
    assert linear.device.type == "cpu"
    assert linear.dtype == torch.float32


def test_fingerprint_and_logits_follow_the_seed(linear: Any) -> None:
    again = load_model(linear_classifier(12, 6, 3, seed=1), check=False)
    other = load_model(linear_classifier(12, 6, 3, seed=2), check=False)
    assert linear.fingerprint == again.fingerprint != other.fingerprint
    before = torch.get_rng_state()
    linear_classifier(seed=5)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("target", [0, 2, (2, 0)])
@pytest.mark.parametrize("rows", [1, len(IDS)])
def test_true_scores_are_gradient_times_difference(linear: Any, target: Any, rows: int) -> None:
    baseline = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0)).squeeze(0)
    embeds = linear.arch.embedding()(torch.tensor([IDS])).detach().requires_grad_()

    def value(inputs: torch.Tensor) -> torch.Tensor:
        logits = linear.hf(inputs_embeds=inputs).logits[0]
        return logits[target] if isinstance(target, int) else logits[target[0]] - logits[target[1]]

    (gradient,) = torch.autograd.grad(value(embeds), embeds)
    expected = (gradient * (embeds - baseline)).sum(-1)[0]
    scores = true_scores(linear, IDS, baseline, target)
    torch.testing.assert_close(scores, expected)
    absent = baseline.expand(len(IDS), 6)[None]
    torch.testing.assert_close(scores.sum(), (value(embeds) - value(absent)).detach())
    # Leaving one out, which needs no gradient, says the same.
    for position in range(len(IDS)):
        without = embeds.detach().clone()
        without[0, position] = absent[0, position]
        torch.testing.assert_close(scores[position], (value(embeds) - value(without)).detach(), atol=1e-5, rtol=1e-5)


def test_ids_and_embeddings_agree_and_padding_counts_nothing(linear: Any) -> None:
    ids = torch.tensor([IDS])
    logits = linear.hf(ids).logits
    weight, bias = linear.hf.classifier.weight, linear.hf.classifier.bias
    torch.testing.assert_close(logits[0], sum(weight @ linear.hf.embed_tokens.weight[i] for i in IDS) + bias)
    torch.testing.assert_close(logits, linear.hf(inputs_embeds=linear.arch.embedding()(ids)).logits)
    for side in (0, 3):
        padded = torch.full((1, 8), 7)
        mask = torch.zeros(1, 8, dtype=torch.long)
        padded[0, side : side + 5], mask[0, side : side + 5] = ids[0], 1
        torch.testing.assert_close(linear.hf(input_ids=padded, attention_mask=mask).logits, logits)


@pytest.mark.parametrize("target", [3, -1, (0, 3), (0, 1, 2), ()])
def test_unknown_targets_are_refused(linear: Any, target: Any) -> None:
    with pytest.raises(InputError, match="from 0 to 2"):
        true_scores(linear, IDS, torch.zeros(6), target)


def test_other_wrong_input_is_refused(linear: Any, tiny: Any) -> None:
    with pytest.raises(InputError, match="baseline is"):
        true_scores(linear, IDS, torch.zeros(5), 0)
    with pytest.raises(InputError, match="LlamaForCausalLM"):
        true_scores(tiny(), IDS, torch.zeros(16), 0)
    with pytest.raises(InputError, match="either"):
        linear.hf()
    with pytest.raises(InputError, match="either"):
        linear.hf(torch.tensor([IDS]), inputs_embeds=torch.zeros(1, 5, 6))
    with pytest.raises(InputError, match="n_classes=1"):
        linear_classifier(n_classes=1)


# The marked-token task


def test_labels_are_the_sign_of_the_marked_weights() -> None:
    examples = marked_examples(300, seed=3)
    assert {example.label for example in examples} == {0, 1}
    assert 0.4 < np.mean([example.label for example in examples]) < 0.6
    for ids, label, relevant in examples:
        assert ids[-1] == QUERY
        assert 8 <= len(ids) - 1 <= 16
        assert 1 <= len(relevant) <= 4
        weights = true_weights(ids)
        assert set(np.flatnonzero(weights)) == set(relevant)
        assert weights.sum() != 0
        assert label == int(weights.sum() > 0)
        assert set(ids[:-1]) <= {*WEIGHTS, *FILLERS}


def test_fillers_do_not_matter_for_the_label() -> None:
    random = np.random.default_rng(0)
    for ids, label, relevant in marked_examples(50):
        changed = [token if at in relevant else int(random.choice(FILLERS)) for at, token in enumerate(ids[:-1])]
        assert int(true_weights(changed).sum() > 0) == label


def test_examples_are_reproducible_and_a_larger_n_changes_none() -> None:
    assert marked_examples(20, seed=1)[:5] == marked_examples(5, seed=1)
    assert marked_examples(5, seed=1) != marked_examples(5, seed=2)
    assert marked_examples(0) == []
    with pytest.raises(InputError, match="n=-1"):
        marked_examples(-1)


def test_the_tokenizer_reads_whole_words() -> None:
    tokenizer = marked_tokenizer()
    text = "the superb table awful ?"
    ids = tokenizer(text)["input_ids"]
    assert [VOCABULARY[i] for i in ids] == text.split()
    assert tokenizer.decode(ids) == text
    assert [tokenizer(word)["input_ids"] for word in ("no", "yes")] == [[answer] for answer in ANSWERS]
    assert tokenizer("unheard")["input_ids"] == [VOCABULARY.index("<unk>")]


def test_training_learns_the_task_from_what_is_marked(marked: Any) -> None:
    model, training = marked
    assert training.accuracy > 0.99
    assert training.n == 2000
    # Measured on other texts whose fillers are changed: the answers stay.
    random = np.random.default_rng(0)
    changed = []
    for ids, label, relevant in marked_examples(300, seed=7):
        new = [token if at in relevant else int(random.choice(FILLERS)) for at, token in enumerate(ids[:-1])]
        changed.append(ground_truth.MarkedExample([*new, QUERY], label, relevant))
    assert answer_accuracy(model.hf, changed) > 0.99
    assert model.arch.n_layers == 2
    assert model.name == "marked-tokens"


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second, other = (train_marked_tokens(seed, steps=3)[0].fingerprint for seed in (4, 4, 5))
    assert first == second != other


def test_a_saved_model_is_the_same_model(tmp_path: Path) -> None:
    model, _ = train_marked_tokens(seed=2, steps=2, out=tmp_path / "marked")
    loaded = load_model(tmp_path / "marked")
    assert loaded.encode("good ?") == [[VOCABULARY.index("good"), QUERY]]
    ids = torch.tensor([marked_examples(1)[0].ids])
    torch.testing.assert_close(loaded.hf(ids).logits, model.hf(ids).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["marked"]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(InputError, match="steps=0"):
        train_marked_tokens(steps=0)


# Recovery


def brute_force(scores: Any, relevant: Any) -> float:
    others = [at for at in range(len(scores)) if at not in relevant]
    pairs = [(scores[a] > scores[b]) + 0.5 * (scores[a] == scores[b]) for a in relevant for b in others]
    return float(np.mean(pairs))


def test_recovery_counts_pairs() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        n = int(random.integers(2, 9))
        scores = random.integers(-2, 3, n).astype(float)  # many ties
        relevant = random.permutation(n)[: random.integers(1, n)].tolist()
        expected = brute_force(scores, relevant)
        mask = np.isin(np.arange(n), relevant)
        assert recovery(scores, relevant) == pytest.approx(expected)
        assert recovery(torch.tensor(scores), mask) == pytest.approx(expected)
        assert recovery(-scores, relevant) == pytest.approx(1 - expected)
        assert recovery(3 * scores + 7, relevant) == pytest.approx(expected)


def test_recovery_is_one_half_by_chance_and_for_constants() -> None:
    assert recovery([0.0] * 5, [1, 2]) == 0.5
    orders = [recovery(list(order), [0, 3]) for order in itertools.permutations(range(5))]
    assert np.mean(orders) == pytest.approx(0.5)
    assert max(orders) == 1.0
    assert min(orders) == 0.0
    assert recovery([1.0, float("inf"), 0.0], [1]) == 1.0


def test_recovery_without_either_kind_is_nan() -> None:
    assert math.isnan(recovery([1.0, 2.0], []))
    assert math.isnan(recovery([1.0, 2.0], [0, 1]))
    assert math.isnan(recovery([1.0, float("nan")], [0]))
    assert math.isnan(recovery([], []))


@pytest.mark.parametrize(
    ("scores", "relevant"), [([1.0, 2.0], [2]), ([1.0, 2.0], [-1]), ([[1.0, 2.0]], [0]), ([1.0, 2.0], np.array([True]))]
)
def test_recovery_refuses_what_does_not_fit(scores: Any, relevant: Any) -> None:
    with pytest.raises(InputError, match="expected"):
        recovery(scores, relevant)


# Folders


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    replace_folder(folder, lambda new: (new / "a").write_text("1"))
    with pytest.raises(KeyboardInterrupt):
        replace_folder(folder, lambda new: (_ for _ in ()).throw(KeyboardInterrupt))
    assert (folder / "a").read_text() == "1"
    replace_folder(folder, lambda new: (new / "b").write_text("2"))
    assert [path.name for path in folder.iterdir()] == ["b"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        replace_folder(tmp_path / "file" / "model", lambda new: None)
