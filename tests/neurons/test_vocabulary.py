"""Top-k, log-sum-exp and entropy, compiled and by torch, against torch's own stable sort and float64 softmax."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from interp.neurons import vocabulary
from interp.neurons.vocabulary import TopTokens, top_tokens
from interp.neurons.vocabulary_cpu import RunningTop


def oracle(logits: torch.Tensor, k: int, sign: int) -> tuple[torch.Tensor, ...]:
    z = logits.double() * sign
    order = torch.sort(z, dim=1, descending=True, stable=True).indices[:, :k]
    p = z.softmax(1)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(1)
    return order, p.gather(1, order), z.logsumexp(1), entropy


def results(logits: torch.Tensor, k: int, tile: int = 100) -> Iterator[tuple[int, TopTokens]]:
    """Of both ways, through a head that passes the logits on as they are."""
    head = torch.eye(logits.shape[1])
    with mock.patch.object(vocabulary, "TILE", tile):
        yield from top_tokens(logits, head, k).items()
    with mock.patch.object(vocabulary, "_in_tiles", vocabulary._at_once):
        yield from top_tokens(logits, head, k).items()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 9),
    vocab=st.integers(3, 400),
    scale=st.sampled_from([0.01, 1.0, 30.0, 1e4]),
    ties=st.booleans(),
    tile=st.integers(1, 500),
)
def test_equals_a_stable_sort_and_float64_softmax(
    seed: int, n: int, vocab: int, scale: float, ties: bool, tile: int
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(n, vocab) * scale
    if ties:
        logits = (logits / scale).round() * scale  # a handful of distinct values
    k = min(7, vocab)
    for sign, top in results(logits, k, tile):
        ids, p, lse, entropy = oracle(logits, k, sign)
        assert torch.equal(top.token_id, ids)
        torch.testing.assert_close(top.probability.double(), p, atol=2e-6, rtol=2e-4 * max(1.0, scale / 30))
        torch.testing.assert_close(top.logsumexp.double(), lse, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(top.entropy.double(), entropy, atol=1e-3 * max(1.0, scale / 30), rtol=1e-3)


def test_minus_zero_ties_with_zero() -> None:
    zeros = torch.tensor([[0.0, -0.0, 0.0, -0.0]])
    running = RunningTop(1, 4, (1, -1))
    running.add(zeros.numpy(), 0)
    assert running.ids.tolist() == [[[0, 1, 2, 3]]] * 2
    for sign in (1, -1):
        assert vocabulary._top(zeros, zeros[:, :1] * sign, 4, sign)[1].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("far", [60.0, 69.9, 70.1, 300.0, 1e5])
def test_logits_whose_exponentials_do_not_fit_in_float32(far: float) -> None:
    logits = torch.randn(3, 500)
    logits[0, 7], logits[1, 400], logits[2, ::2] = far, -far, far  # in some tiles alone
    for sign, top in results(logits, 5, tile=64):
        ids, p, lse, entropy = oracle(logits, 5, sign)
        assert torch.equal(top.token_id, ids)
        torch.testing.assert_close(top.probability.double(), p, atol=1e-6, rtol=1e-4 * max(1.0, far / 30))
        torch.testing.assert_close(top.logsumexp.double(), lse, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(top.entropy.double(), entropy, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("vocab", [64, 65, 127, 128, 1000])
def test_ties_across_blocks_go_to_the_lower_id(vocab: int) -> None:
    for _, top in results(torch.zeros(2, vocab), 10):
        assert top.token_id.tolist() == [list(range(10))] * 2


def test_one_sign_alone_gives_the_same() -> None:
    v, head = torch.randn(5, 12), torch.randn(300, 12)
    both, alone = top_tokens(v, head, 4), top_tokens(v, head, 4, (-1,))
    assert torch.equal(both[-1].token_id, alone[-1].token_id)
    torch.testing.assert_close(both[-1].logsumexp, alone[-1].logsumexp)
    assert set(alone) == {-1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_product_is_float32_whatever_the_heads_dtype(dtype: torch.dtype) -> None:
    v, head, bias = torch.randn(4, 24), torch.randn(150, 24).to(dtype), torch.randn(150)
    logits = v.double() @ head.double().T + bias.double()
    for way in (vocabulary._in_tiles, vocabulary._at_once):
        with mock.patch.object(vocabulary, "TILE", 64), mock.patch.object(vocabulary, "_in_tiles", way):
            top = top_tokens(v, head, 6, (1,), bias)[1]
        torch.testing.assert_close(top.logsumexp.double(), logits.logsumexp(1), atol=1e-5, rtol=1e-6)
        assert torch.equal(top.token_id, logits.topk(6, dim=1).indices)
