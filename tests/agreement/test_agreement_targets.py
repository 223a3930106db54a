"""The explained number, against sums of logarithms written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.agreement.targets import TARGETS, check_target, runner_up, target_values
from interp.errors import InputError

LOGITS = torch.tensor(
    [
        [[0.0, math.log(3), math.log(4)], [math.log(2), 0.0, math.log(5)]],
        [[1.0, 1.0, 1.0], [0.0, -1.0, 2.0]],
    ]
)
WANTED, CONTRAST = torch.tensor([[1, 0], [2, 1]]), torch.tensor([[2, 2], [0, 2]])


def test_values_by_hand() -> None:
    # Two reads: 3/8 and 2/8 of the first, 1/3 and e^-1 / (1 + e^-1 + e^2) of the second.
    second = math.exp(-1) / (1 + math.exp(-1) + math.exp(2)) / 3
    probability = target_values(LOGITS, WANTED, CONTRAST, "probability")
    torch.testing.assert_close(probability, torch.tensor([3 / 32, second]))
    log_prob = target_values(LOGITS, WANTED, CONTRAST, "log_prob")
    torch.testing.assert_close(log_prob, torch.tensor([math.log(3 / 32), math.log(second)]))
    difference = target_values(LOGITS, WANTED, CONTRAST, "logit_difference")
    torch.testing.assert_close(difference, torch.tensor([math.log(3 / 4) + math.log(2 / 5), -3.0]))


def test_the_runner_up_is_the_best_of_the_others() -> None:
    assert runner_up(LOGITS, WANTED).tolist() == [[2, 2], [0, 2]]
    assert runner_up(LOGITS, torch.tensor([[2, 2], [0, 2]])).tolist() == [[1, 0], [1, 0]]


def test_certainty_is_zero_nats() -> None:
    logits = torch.tensor([[[0.0, 1e6]]])
    yes, no = torch.tensor([[1]]), torch.tensor([[0]])
    assert target_values(logits, yes, no, "log_prob").tolist() == [0.0]
    assert target_values(logits, yes, no, "probability").tolist() == [1.0]
    assert target_values(logits, no, yes, "probability").tolist() == [0.0]
    assert target_values(logits, no, yes, "log_prob").tolist() == [-1e6]


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=6), st.floats(-50, 50), st.data())
@settings(deadline=None)
def test_a_constant_on_all_logits_changes_nothing(values: list[float], shift: float, data: st.DataObject) -> None:
    logits = torch.tensor(values, dtype=torch.float64)[None, None]
    wanted = torch.tensor([[data.draw(st.integers(0, len(values) - 1))]])
    contrast = runner_up(logits, wanted)
    assert int(contrast) != int(wanted)
    assert float(logits[0, 0, contrast]) == max(value for at, value in enumerate(values) if at != int(wanted))
    for target in TARGETS:
        one, other = (target_values(some, wanted, contrast, target) for some in (logits, logits + shift))
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_by_finite_differences(target: str) -> None:
    logits = LOGITS.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda some: target_values(some, WANTED, CONTRAST, target), logits)


def test_unknown_names() -> None:
    check_target("probability", "gold")
    with pytest.raises(InputError, match="target='logit'; expected one of log_prob, logit_difference, probability"):
        check_target("logit", "gold")
    with pytest.raises(InputError, match="of='best'; expected one of predicted, gold"):
        check_target("log_prob", "best")
