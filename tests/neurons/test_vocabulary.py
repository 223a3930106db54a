"""Top-k, log-sum-exp and entropy against torch's own stable sort and float64 softmax."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from interp.neurons.vocabulary import top_tokens


def oracle(logits: torch.Tensor, k: int, sign: int) -> tuple[torch.Tensor, ...]:
    z = logits.double() * sign
    order = torch.sort(z, dim=1, descending=True, stable=True).indices[:, :k]
    p = z.softmax(1)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(1)
    return order, p.gather(1, order), z.logsumexp(1), entropy


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 9),
    vocab=st.integers(3, 400),
    scale=st.sampled_from([0.01, 1.0, 30.0, 1e4]),
    ties=st.booleans(),
)
def test_equals_a_stable_sort_and_float64_softmax(seed: int, n: int, vocab: int, scale: float, ties: bool) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(n, vocab) * scale
    if ties:
        logits = (logits / scale).round() * scale  # a handful of distinct values
    k = min(7, vocab)
    top = top_tokens(logits, k)
    for sign in (1, -1):
        ids, p, lse, entropy = oracle(logits, k, sign)
        assert torch.equal(top[sign].token_id, ids)
        torch.testing.assert_close(top[sign].probability.double(), p, atol=2e-6, rtol=2e-4 * max(1.0, scale / 30))
        torch.testing.assert_close(top[sign].logsumexp.double(), lse, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(top[sign].entropy.double(), entropy, atol=1e-3 * max(1.0, scale / 30), rtol=1e-3)


def test_minus_zero_ties_with_zero() -> None:
    top = top_tokens(torch.tensor([[0.0, -0.0, 0.0, -0.0]]), 4)
    assert top[1].token_id.tolist() == [[0, 1, 2, 3]]
    assert top[-1].token_id.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("vocab", [64, 65, 127, 128, 1000])
def test_ties_across_blocks_go_to_the_lower_id(vocab: int) -> None:
    logits = torch.zeros(2, vocab)
    assert top_tokens(logits, 10)[1].token_id.tolist() == [list(range(10))] * 2


def test_one_sign_alone_gives_the_same() -> None:
    logits = torch.randn(5, 300)
    both, alone = top_tokens(logits, 4), top_tokens(logits, 4, (-1,))
    assert torch.equal(both[-1].token_id, alone[-1].token_id)
    torch.testing.assert_close(both[-1].logsumexp, alone[-1].logsumexp)
    assert set(alone) == {-1}
