"""The fused attention against a plain softmax written out here, and against each model's own eager function."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_encoder, tiny_hf

from interp import load_model, recorded_attention
from interp.errors import InputError, ModelError
from interp.recorded_attention import attention_with_lse, check_causal, recording


def written_out(
    query: Any, key: Any, value: Any, scaling: float, window: Any, softcap: Any, sinks: Any
) -> tuple[Any, Any]:
    """Query by query, in float64."""
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    output, lse = torch.zeros_like(query, dtype=torch.float64), torch.zeros(batch, heads, length, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for q in range(length):
                first = 0 if window is None else max(0, q - window + 1)
                keys, values = (x[b, h // groups, first : q + 1].double() for x in (key, value))
                scores = keys @ query[b, h, q].double() * scaling
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                total = scores.exp().sum() + (0 if sinks is None else sinks[h].double().exp())
                output[b, h, q] = (scores.exp() / total) @ values
                lse[b, h, q] = total.log()
    return output, lse


def random_inputs(seed: int, heads: int, kv: int, length: int, width: int, batch: int = 2) -> tuple[Any, Any, Any]:
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, heads, length, width, generator=random) * 2,
        torch.randn(batch, kv, length, width, generator=random) * 2,
        torch.randn(batch, kv, length, width, generator=random),
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    shape=st.sampled_from([(1, 1), (4, 2), (6, 2), (4, 4)]),
    length=st.integers(1, 19),
    window=st.sampled_from([None, 1, 3, 8, 40]),
    softcap=st.sampled_from([None, 2.0]),
    sink=st.booleans(),
    block=st.sampled_from([None, 1, 4]),
)
def test_attention_and_lse(
    seed: int, shape: Any, length: int, window: Any, softcap: Any, sink: bool, block: Any
) -> None:
    query, key, value = random_inputs(seed, *shape, length, 8)
    sinks = torch.linspace(-2, 3, shape[0]) if sink else None
    output, lse = attention_with_lse(
        query, key, value, 0.3, window=window, softcap=softcap, sink_logits=sinks, block=block
    )
    expected, expected_lse = written_out(query, key, value, 0.3, window, softcap, sinks)
    assert (output - expected).abs().max() < 1e-5
    assert (lse - expected_lse).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_lse(dtype: torch.dtype) -> None:
    inputs = [tensor.to(dtype) for tensor in random_inputs(0, 4, 2, 33, 16)]
    expected, expected_lse = written_out(*inputs, 0.25, None, None, None)
    for block in (None, 8):
        output, lse = attention_with_lse(*inputs, 0.25, block=block)
        assert output.dtype == dtype
        assert lse.dtype == torch.float32
        assert (lse - expected_lse).abs().max() < 2e-2
        assert (output - expected).abs().max() < 5e-2


def test_cuda_kernel_is_called_as_it_wants() -> None:
    """Signature and shapes by torch's own description of the CUDA kernel; its numbers need a GPU."""
    query = torch.empty(2, 8, 45, 64, device="meta", dtype=torch.bfloat16)
    output, lse = recorded_attention._efficient_on_cuda(query, query, query, 0.125)
    assert output.shape == query.shape
    assert output.dtype == torch.bfloat16
    assert lse.shape == (2, 8, 45)
    assert lse.dtype == torch.float32


@pytest.mark.parametrize(("width", "size", "fits"), [(64, 2, True), (80, 4, True), (3, 4, False), (1024, 2, False)])
def test_cuda_kernel_is_chosen_where_it_fits(width: int, size: int, fits: bool) -> None:
    query: Any = SimpleNamespace(shape=(1, 2, 5, width), device=torch.device("cuda"), element_size=lambda: size)
    assert (recorded_attention._kernel(query) is recorded_attention._efficient_on_cuda) == fits


def test_devices_without_a_kernel_go_block_by_block() -> None:
    meta = torch.empty(1, 4, 9, 8, device="meta")
    assert recorded_attention._kernel(meta) is None
    output, lse = attention_with_lse(meta, meta[:, :2], meta[:, :2], 1.0)
    assert output.shape == meta.shape
    assert lse.shape == (1, 4, 9)


def test_blocks_of_a_window_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of b queries sees b + window − 1 keys: that product, and not b · window, has to fit."""
    sizes = []
    original = recorded_attention.block_scores

    def noted(*given: Any) -> Any:
        scores = original(*given)
        sizes.append(scores.numel())
        return scores

    monkeypatch.setattr(recorded_attention, "block_scores", noted)
    monkeypatch.setattr(recorded_attention, "_BLOCK_SCORES", 2**12)
    inputs = random_inputs(0, 2, 2, 400, 4, batch=1)
    attention_with_lse(*inputs, 0.5, window=8)
    assert max(sizes) <= 2**12
    assert len(sizes) < 20


def test_gpt_oss_sink_logits_against_its_own_function() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    query, key, value = random_inputs(3, 4, 2, 11, 8)
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks = 2, torch.nn.Parameter(torch.tensor([1.0, -1.0, 3.0, 0.0]))
    mask = torch.full((11, 11), float("-inf")).triu(1)[None, None]
    expected, pattern = eager_attention_forward(module.eval(), query, key, value, mask, scaling=0.4)
    output, lse = attention_with_lse(query, key, value, 0.4, sink_logits=module.sinks.detach())
    assert (output.transpose(1, 2) - expected).abs().max() < 1e-5
    to_first = (query @ key[:, :, :1].repeat_interleave(2, 1).transpose(-1, -2))[..., 0] * 0.4
    assert ((to_first - lse).exp() - pattern[..., 0]).abs().max() < 1e-5


def test_recorded_patterns_are_the_models_own(tiny: Any, family: str) -> None:
    """exp(score − lse) of the fused engine is the pattern that the model gives under output_attentions."""
    model = tiny(family)
    ids = torch.randint(3, 64, (2, 13), generator=torch.Generator().manual_seed(0))
    with model.attention_implementation("eager"), torch.no_grad():
        own = model.hf(input_ids=ids, output_attentions=True).attentions
    recorded: list[Any] = []

    def keep(seen: Any) -> None:
        groups = seen.query.shape[1] // seen.key.shape[1]
        scores = seen.query @ seen.key.repeat_interleave(groups, 1).transpose(-1, -2) * seen.scaling
        if seen.softcap is not None:
            scores = seen.softcap * (scores / seen.softcap).tanh()
        recorded.append((scores - seen.lse[..., None]).exp())

    before = model.attention
    with recording(model, "fused", keep), torch.no_grad():
        model.hf(input_ids=ids)
    assert model.attention == before
    assert len(recorded) == model.arch.n_layers
    for ours, theirs in zip(recorded, own, strict=True):
        assert (ours - theirs)[theirs > 0].abs().max() < 1e-5


def test_other_threads_are_not_recorded(tiny: Any) -> None:
    import threading

    model, calls = tiny(), []
    with recording(model, "fused", calls.append), torch.no_grad():
        thread = threading.Thread(target=lambda: model.hf(input_ids=torch.tensor([[5, 6]])))
        thread.start()
        thread.join()
        assert calls == []
        model.hf(input_ids=torch.tensor([[5, 6]]))
    assert len(calls) == 3


def test_what_cannot_be_measured_is_refused_by_name(tiny: Any) -> None:
    model = tiny()
    with pytest.raises(InputError, match="expected one of fused, eager"), recording(model, "flash", print):
        pass
    with pytest.raises(InputError, match="both directions"):
        check_causal(load_model(tiny_encoder()))
    model.arch.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="layer 1: linear_attention"):
        check_causal(model)
    check_causal(model, layers=[0, 2])
    both = tiny("gemma3", use_bidirectional_attention=True)
    with pytest.raises(InputError, match="both directions"):
        check_causal(both)
    caching = tiny()
    with recording(caching, "fused", lambda seen: None), pytest.raises(ModelError, match="cache of its own"):
        caching.hf.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, pad_token_id=0)


def test_attention_is_restored_after_an_error(tiny: Any) -> None:
    model = load_model(tiny_hf("llama"), attention="sdpa")
    with pytest.raises(ZeroDivisionError), recording(model, "eager", lambda seen: 1 // 0), torch.no_grad():
        model.hf(input_ids=torch.tensor([[5, 6]]))
    assert model.attention == "sdpa"
    assert recorded_attention._recorder.get() is None
