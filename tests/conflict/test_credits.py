"""Credits and log-probabilities against plain loops over whole texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_models import chat_tiny

from interp.conflict import credits
from interp.conflict.credits import credit_pairs, pair_log_probs, rule_attention
from interp.conflict.preferences import Preference
from interp.conflict.shared_prompts import answer_log_probs, pad_pairs
from interp.errors import InputError, MemoryBudgetError

RANDOM = np.random.default_rng(0)


def ids(n: int) -> tuple[int, ...]:
    return tuple(int(token) for token in RANDOM.integers(3, 250, n))


PREFERENCES = [
    Preference("a", ids(9), ids(5), ids(2), ids(4), (2, 3, 4)),
    Preference("b", ids(3), ids(1), ids(7), ids(8), (1,)),
    Preference("c", ids(14), ids(3), ids(4), ids(2), (5, 6, 9)),
]
TEXTS = [(item.prompt, item.chosen, item.rejected) for item in PREFERENCES]


def plain(hf: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    """One text at a time, no cache, no padding."""
    log_probs = hf(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0].float().log_softmax(-1)
    return torch.stack([log_probs[len(prompt) - 1 + at, token] for at, token in enumerate(answer)])


def test_log_probs_and_their_gradient_in_every_family(family: str) -> None:
    model = chat_tiny(family)
    weight = model.arch.o_proj(0).weight
    prompts, first, second = zip(*TEXTS, strict=True)
    found = answer_log_probs(model.hf, pad_pairs(prompts, first, second, model.pad_id))
    assert found.shape == (6, 7)
    expected = [plain(model.hf, *both) for both in zip(prompts + prompts, first + second, strict=True)]
    for row, values in zip(found, expected, strict=True):
        torch.testing.assert_close(row[: len(values)], values, atol=1e-5, rtol=1e-5)
        assert (row[len(values) :] == 0).all()
    (ours,) = torch.autograd.grad(found.sin().sum(), weight)
    (theirs,) = torch.autograd.grad(sum(values.sin().sum() for values in expected), weight)
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-3)


def test_answers_of_one_token() -> None:
    model = chat_tiny()
    found = answer_log_probs(model.hf, pad_pairs([(5, 6, 7)], [(8,)], [(9,)], 0))
    for row, token in zip(found, (8, 9), strict=True):
        assert row.item() == pytest.approx(plain(model.hf, (5, 6, 7), (token,)).item(), abs=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 25, 4096])
def test_batches_do_not_matter(max_tokens: int) -> None:
    model = chat_tiny("mistral")
    with torch.no_grad():
        for (prompt, *answers), found in zip(TEXTS, pair_log_probs(model, TEXTS, max_tokens=max_tokens), strict=True):
            for answer, values in zip(answers, found, strict=True):
                np.testing.assert_allclose(values, plain(model.hf, prompt, answer).numpy(), atol=1e-5)
    assert not any(parameter.grad is not None for parameter in model.hf.parameters())


def test_out_of_memory_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, real, sizes = chat_tiny(), credits.answer_log_probs, []
    expected = pair_log_probs(model, TEXTS)

    def limited(hf: Any, pairs: Any) -> torch.Tensor:
        sizes.append(len(pairs.prompt_ids))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(hf, pairs)

    monkeypatch.setattr(credits, "answer_log_probs", limited)
    found = pair_log_probs(model, TEXTS)
    assert sizes[0] == 3
    assert sizes.count(1) == 3
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.concatenate(ours), np.concatenate(theirs), atol=1e-5)

    def never(hf: Any, pairs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(credits, "answer_log_probs", never)
    with pytest.raises(MemoryBudgetError):
        pair_log_probs(model, TEXTS)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
def test_rule_attention_is_that_of_the_whole_pattern(name: str) -> None:
    """g_t from the pattern that transformers itself returns, one text at a time."""
    model = chat_tiny(name)
    heads = [(0, 1), (2, 0), (-1, 3)]
    found = rule_attention(model, PREFERENCES, heads, max_tokens=40)
    with model.attention_implementation("eager"), torch.no_grad():
        for item, both in zip(PREFERENCES, found, strict=True):
            for answer, values in zip((item.chosen, item.rejected), both, strict=True):
                patterns = model.hf(torch.tensor([[*item.prompt, *answer]]), output_attentions=True).attentions
                expected = [
                    np.mean(
                        [
                            sum(float(patterns[layer][0, head, at - 1, key]) for key in item.rule_positions)
                            for layer, head in ((0, 1), (2, 0), (2, 3))
                        ]
                    )
                    for at in range(len(item.prompt), len(item.prompt) + len(answer))
                ]
                np.testing.assert_allclose(values, expected, atol=1e-6)
    same = rule_attention(model, PREFERENCES, [*heads, (2, 3)])  # a head that is named twice counts once
    np.testing.assert_allclose(same[0][0], found[0][0], atol=1e-6)


def test_reward_by_default_is_the_base_that_is_told_clearly() -> None:
    model = chat_tiny()
    found = credit_pairs(model, PREFERENCES, "reward", alpha=0.5, beta=0.2)
    with torch.no_grad():
        for item, pair in zip(PREFERENCES, found, strict=True):
            assert pair.preference is item
            for answer, reference, credit, factors, sign in (
                (item.chosen, pair.chosen_reference, pair.chosen_credit, pair.chosen_factors, 1),
                (item.rejected, pair.rejected_reference, pair.rejected_credit, pair.rejected_factors, -1),
            ):
                before, clear = (
                    plain(model.hf, item.prompt, answer).numpy(),
                    plain(model.hf, item.clear, answer).numpy(),
                )
                np.testing.assert_allclose(reference, before, atol=1e-5)
                np.testing.assert_allclose(credit, 0.2 * (clear - before), atol=1e-5)
                np.testing.assert_allclose(factors, 1 + sign * 0.5 * 0.2 * (clear - before), atol=1e-5)
                assert factors.dtype == np.float32


def test_reward_model_as_in_the_released_code_reads_the_same_prompt() -> None:
    model, other = chat_tiny(), chat_tiny(seed=5)
    found = credit_pairs(model, PREFERENCES, "reward", beta=0.2, reward_model=other)
    with torch.no_grad():
        for item, pair in zip(PREFERENCES, found, strict=True):
            expected = plain(other.hf, item.prompt, item.chosen) - plain(model.hf, item.prompt, item.chosen)
            np.testing.assert_allclose(pair.chosen_credit, 0.2 * expected.numpy(), atol=1e-5)
    itself = credit_pairs(model, PREFERENCES, "reward", reward_model=model)
    assert max(abs(pair.chosen_credit).max() for pair in itself) == 0

    def constant(given: Any) -> list[tuple[list[float], list[float]]]:
        return [([-1.0] * len(item.chosen), [-2.0] * len(item.rejected)) for item in given]

    pair = credit_pairs(model, PREFERENCES, "reward", beta=0.2, reward_model=constant)[0]
    np.testing.assert_allclose(pair.chosen_credit, 0.2 * (-1 - pair.chosen_reference), rtol=1e-5)
    np.testing.assert_allclose(pair.rejected_credit, 0.2 * (-2 - pair.rejected_reference), rtol=1e-5)


def test_attention_factors_of_each_answer_have_mean_one_and_none_is_all_ones() -> None:
    model = chat_tiny()
    for pair in credit_pairs(model, PREFERENCES, "attention", heads=[(1, 2)], alpha=0.5):
        assert pair.chosen_factors.mean() == pytest.approx(1, abs=1e-6)
        expected = 1 + 0.5 * (pair.rejected_credit / pair.rejected_credit.mean() - 1)
        np.testing.assert_allclose(pair.rejected_factors, expected, rtol=1e-5)
        assert pair.rejected_factors.std() > 0
    for pair in credit_pairs(model, PREFERENCES, "none"):
        assert (pair.chosen_factors == 1).all()
        assert (pair.rejected_factors == 1).all()
        assert len(pair.chosen_factors) == len(pair.preference.chosen)


def test_kept_log_probs_are_of_this_model_and_these_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, real, calls = chat_tiny(), credits.pair_log_probs, []

    def counts(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    def credited(some: Any, credit: str = "reward", model: Any = model) -> list[Any]:
        return credit_pairs(model, some, credit, folder=tmp_path / "kept")

    monkeypatch.setattr(credits, "pair_log_probs", counts)
    first = credited(PREFERENCES)
    assert len(calls) == 2  # the conflicting and the clear prompts
    again = credited(PREFERENCES)
    credited(PREFERENCES, "none")
    assert len(calls) == 2
    for ours, theirs in zip(again, first, strict=True):
        for name in ("chosen_reference", "rejected_reference", "chosen_factors", "rejected_factors"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    credited(PREFERENCES[1:])
    credited(PREFERENCES, model=chat_tiny(seed=3))
    assert len(calls) == 6
    for path in (tmp_path / "kept").iterdir():
        path.write_bytes(path.read_bytes()[:-3])  # damaged
    np.testing.assert_array_equal(credited(PREFERENCES)[2].rejected_factors, first[2].rejected_factors)
    assert len(calls) == 8


def test_errors() -> None:
    model = chat_tiny()
    nothing = [Preference("z", ids(3), ids(2), ids(2), ids(3), ())]
    smaller = chat_tiny(vocab_size=300)
    smaller.tokenizer.add_tokens(["<more>"])
    calls: list[tuple[dict[str, Any], str]] = [
        ({"credit": "attention"}, "needs the focal heads"),
        ({"credit": "attention", "heads": []}, "needs the focal heads"),
        ({"credit": "attention", "heads": [(9, 0)]}, "layer 9 is out of range"),
        ({"credit": "attention", "heads": [(0, 4)]}, "head 4 is out of range"),
        ({"credit": "attention", "heads": [(0, 0)], "preferences": nothing}, "'z' has no system rule"),
        ({"credit": "half"}, "expected one of reward"),
        ({"preferences": []}, "no preferences"),
        ({"reward_model": smaller}, "another tokenizer"),
        ({"reward_model": lambda given: [([0.0], [0.0]) for _ in given]}, "one log-probability per token"),
        (
            {"reward_model": lambda given: [([float("nan")] * len(p.chosen), [0.0] * len(p.rejected)) for p in given]},
            "not finite",
        ),
    ]
    for changes, message in calls:
        with pytest.raises(InputError, match=message):
            credit_pairs(model, **{"preferences": PREFERENCES, **changes})
