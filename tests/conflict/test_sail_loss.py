"""The loss against hand-computed numbers, trl's DPO and calculus."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_models import chat_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.conflict.adapters import left_as_it_was
from interp.conflict.align_runs import AlignSettings, TrainingPlan
from interp.conflict.credits import credit_pairs
from interp.conflict.layer_arms import attention_projections
from interp.conflict.preferences import Preference
from interp.conflict.sail_loss import attention_factors, check_credit, reward_factors, sail_loss
from interp.conflict.sail_trainer import build_trainer, collate, dataset_of
from interp.errors import InputError


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values)


def test_numbers_by_hand() -> None:
    """Chosen: d = (0.5, −0.2), c = (1.2, 0.8); rejected: d = (−0.4), c = (1.5). β = 0.1.

    β Σ c d = 0.1 (0.6 − 0.16) = 0.044 and 0.1 · −0.6 = −0.06; L = log(1 + e^−0.104).
    """
    log_probs, reference = rows([-0.5, -1.2], [-2.4, 9.0]), rows([-1.0, -1.0], [-2.0, -9.0])
    factors, mask = rows([1.2, 0.8], [1.5, 7.0]), torch.tensor([[True, True], [True, False]])
    found = sail_loss(log_probs, reference, factors, mask, beta=0.1)
    assert found.chosen.item() == pytest.approx(0.044, abs=1e-7)
    assert found.rejected.item() == pytest.approx(-0.06, abs=1e-7)
    assert found.loss.item() == pytest.approx(math.log1p(math.exp(-0.104)), abs=1e-6)


def test_factors_by_hand() -> None:
    rewards = np.array([0.2, -0.4])
    np.testing.assert_allclose(reward_factors(rewards, 0.5, chosen=True), [1.1, 0.8])
    np.testing.assert_allclose(reward_factors(rewards, 0.5, chosen=False), [0.9, 1.2])
    np.testing.assert_allclose(attention_factors(np.array([0.02, 0.06, 0.04]), 0.5), [0.75, 1.25, 1.0])
    np.testing.assert_array_equal(attention_factors(np.zeros(3), 0.5), np.ones(3))


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pairs, width = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    numbers = st.floats(-8, 0, width=32)
    values = draw(st.lists(numbers, min_size=4 * pairs * width, max_size=4 * pairs * width))
    both = torch.tensor(values).reshape(2, 2 * pairs, width)
    lengths = draw(st.lists(st.integers(1, width), min_size=2 * pairs, max_size=2 * pairs))
    return both[0], both[1], torch.arange(width)[None] < torch.tensor(lengths)[:, None]


@settings(max_examples=60, deadline=None)
@given(batches(), st.floats(0.05, 2), st.floats(0.25, 4))
def test_limits(batch: Any, beta: float, constant: float) -> None:
    log_probs, reference, mask = batch
    sums = ((log_probs - reference) * mask).sum(1)
    chosen, rejected = sums.chunk(2)
    plain = torch.log1p(torch.exp(-(beta * (chosen - rejected)).double()))
    ones = torch.ones_like(log_probs)
    # Plain DPO is the sum over tokens first; a constant credit is DPO with another β
    torch.testing.assert_close(
        sail_loss(log_probs, reference, ones, mask, beta).loss.double(), plain, atol=1e-5, rtol=1e-4
    )
    scaled = sail_loss(log_probs, reference, constant * ones, mask, beta).loss
    other = sail_loss(log_probs, reference, ones, mask, constant * beta).loss
    torch.testing.assert_close(scaled, other, atol=1e-5, rtol=1e-4)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0, 1))
def test_attention_factors_keep_the_mean(attention: list[float], alpha: float) -> None:
    factors = attention_factors(np.array(attention), alpha)
    assert factors.mean() == pytest.approx(1)
    assert (factors >= 1 - alpha - 1e-9).all()
    order = np.argsort(attention, kind="stable")
    assert (np.diff(factors[order]) >= -1e-9).all()


def test_gradient_is_that_of_calculus_and_enters_the_policy_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs, reference, factors = (torch.randn(4, 3, generator=generator).requires_grad_() for _ in range(3))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    found = sail_loss(log_probs, reference, factors, mask, beta=0.3)
    found.loss.sum().backward()
    assert factors.grad is None
    assert reference.grad is None
    slope = -torch.sigmoid(-(found.chosen - found.rejected))  # of −log σ
    expected = 0.3 * factors.detach() * mask * torch.cat([slope, -slope])[:, None]
    torch.testing.assert_close(log_probs.grad, expected)
    assert not found.chosen.requires_grad
    assert not found.rejected.requires_grad


def test_padding_is_never_read() -> None:
    log_probs = rows([-1.0, float("nan")], [-2.0, -1.0]).requires_grad_()
    reference, factors = rows([-1.5, float("inf")], [-1.0, -1.0]), rows([1.0, float("nan")], [1.0, 1.0])
    mask = torch.tensor([[True, False], [True, True]])
    found = sail_loss(log_probs, reference, factors, mask, beta=1.0)
    assert found.loss.item() == pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-6)
    found.loss.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad[0, 1] == 0
    assert torch.isfinite(log_probs.grad).all()


def test_errors() -> None:
    with pytest.raises(InputError, match="expected one shape"):
        sail_loss(torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2, 3), torch.ones(2, 3).bool())
    with pytest.raises(InputError, match="expected one shape"):
        sail_loss(*(torch.zeros(3, 2) for _ in range(3)), torch.ones(3, 2).bool())
    for given_, message in (
        (("rewards", 0.5, 0.1), "expected one of reward, attention, none"),
        (("reward", -0.5, 0.1), "alpha=-0.5"),
        (("reward", math.nan, 0.1), "alpha=nan"),
        (("reward", 0.5, 0.0), "beta=0.0"),
    ):
        with pytest.raises(InputError, match=message):
            check_credit(*given_)


PAIRS = [
    Preference("a", (9, 8, 7, 6, 5), (20, 21, 22), (30, 31), (9, 5), (1, 2)),
    Preference("b", (9, 4, 3), (40,), (50, 51, 52, 53), (9, 5, 6), (1,)),
]


def randomised(trainer: Any) -> dict[str, torch.Tensor]:
    """Fill the adapter, whose B starts at zero, with the same numbers in every trainer."""
    generator = torch.Generator().manual_seed(1)
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for value in trained.values():
            value.copy_(0.8 * torch.randn(value.shape, generator=generator))
    return trained


@pytest.mark.parametrize("credit", ["reward", "attention", "none"])
def test_alpha_zero_is_the_dpo_of_trl(credit: str, tmp_path: Path) -> None:
    """Value and gradient, on the same batch, against trl's own trainer with its own collator and reference pass."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    model = chat_tiny("llama")
    targets = tuple(attention_projections(model, [0, 2]))

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

        def _send_telemetry(self) -> None:
            pass

    columns = [
        {"prompt_ids": list(p.prompt), "chosen_ids": list(p.chosen), "rejected_ids": list(p.rejected)} for p in PAIRS
    ]
    theirs = Tokenised(
        model=copy.deepcopy(model.hf),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"),
            beta=0.3,
            report_to="none",
            bf16=False,
            use_cpu=True,
            activation_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(columns),
        processing_class=copy.deepcopy(model.tokenizer),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM"),
    )
    expected = randomised(theirs)
    theirs.model.train()
    loss = theirs.compute_loss(theirs.model, theirs.data_collator(columns))
    loss.backward()

    def ours(alpha: float, likelihood: float = 0.0) -> tuple[float, dict[str, Any]]:
        credited = credit_pairs(model, PAIRS, credit, heads=[(0, 1), (2, 3)], alpha=alpha, beta=0.3)
        plan = TrainingPlan(AlignSettings(), dict.fromkeys(targets, 4), 8.0, 0.3, likelihood, (), 0.0, 1, 1, 0)
        with left_as_it_was(model):
            trainer = build_trainer(model, credited, [], plan, tmp_path / "ours")
            trained = randomised(trainer)
            trainer.model.train()
            found = trainer.compute_loss(trainer.model, collate(list(dataset_of(credited)), model.pad_id))
            found.backward()
            return found.item(), {name: value.grad.clone() for name, value in trained.items()}

    value, gradients = ours(alpha=0.0)
    assert value == pytest.approx(loss.item(), abs=1e-5)
    assert abs(value - math.log(2)) > 0.01  # the adapter does something
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert expected[name].grad is not None
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, expected[name].grad, atol=1e-5, rtol=1e-3)
    credited_value, _ = ours(alpha=0.9)
    assert (abs(credited_value - value) > 1e-4) == (credit != "none")
    # The chosen answers' own loss, from the model's plain forward pass with the adapter that is randomised alike.
    theirs.model.eval()
    own = []
    for pair in PAIRS:
        ids = torch.tensor([[*pair.prompt, *pair.chosen]])
        scores = theirs.model(input_ids=ids).logits[0, len(pair.prompt) - 1 : -1].log_softmax(-1)
        own.append(-scores.gather(1, ids[0, len(pair.prompt) :, None]).mean().item())
    both, _ = ours(alpha=0.0, likelihood=0.7)
    assert both == pytest.approx(value + 0.7 * sum(own) / len(own), abs=1e-5)
