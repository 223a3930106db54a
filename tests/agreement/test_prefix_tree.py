"""Logits at the ends of many sequences, against the model's own forward of each whole sequence alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_forward import exact, plain_logits, tiny_classifier
from tiny_models import FAMILIES, tiny_hf, tiny_tokenizer
from torch import Tensor

import interp.batching
from interp.agreement.prefix_tree import Embedder, Readout, packs, prefix_cache, read_logits, shared_prefix
from interp.errors import MemoryBudgetError
from interp.model import Model, load_model

PROMPT = [1, 9, 12, 30, 9, 9]
SEQUENCES = [
    [*PROMPT, 7, 8, 20, 21, 22],
    [*PROMPT, 7, 0, 20, 21, 22],
    [*PROMPT, 7, 8, 20, 21, 23],
    [*PROMPT, 7, 8, 20],  # what the first begins with
    [*PROMPT, 7, 8, 20, 21, 22],  # the first again
    [*PROMPT, 0, 0, 0, 0, 0, 40, 41],
    [*PROMPT, 5, 8],
    [*PROMPT, 0, 0, 0],
]
SLIDING = ("gemma2", "gemma3", "mistral")  # their window in the tests is 4 tokens
# Hugging Face runs Gemma 2, which caps attention scores, without sdpa.
KERNELS = [
    (family, kind) for family in sorted(FAMILIES) for kind in ("eager", "sdpa") if (family, kind) != ("gemma2", "sdpa")
]


def weighed(n_reads: int, n_classes: int) -> Tensor:
    """Weights of logits: a sum that no swap of positions or classes leaves as it is."""
    return torch.rand(max(1, n_reads), n_classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5


def check(
    model: Model,
    sequences: Sequence[Sequence[int]],
    n_reads: int = 1,
    choices: Sequence[int] | None = None,
    vector: Tensor | None = None,
    max_tokens: int = 512,
    tolerance: float = 1e-5,
) -> np.ndarray:
    """`read_logits` agrees with plain forwards, for every sequence in its own place."""
    expected = [plain_logits(model, ids, n_reads, choices, vector) for ids in sequences]
    weights = weighed(n_reads, expected[0].shape[-1])

    def reduce(logits: Tensor, rows: Sequence[int]) -> Tensor:
        assert logits.shape == (len(rows), *weights.shape)
        assert logits.dtype == torch.float32
        return (logits.double() * weights).sum((1, 2)) * (1 + torch.tensor(list(rows)))

    found = read_logits(
        model,
        sequences,
        Readout(n_reads, None if choices is None else tuple(choices)),
        reduce,
        embedder=Embedder(model, vector),
        max_tokens=max_tokens,
    )
    sums = np.array([float((logits * weights).sum()) * (1 + row) for row, logits in enumerate(expected)])
    scale = max(float(logits.abs().max()) for logits in expected)
    np.testing.assert_allclose(found, sums, rtol=tolerance, atol=tolerance * scale * len(sequences))
    assert len({round(float(value), 6) for value in sums}) > 1 or len(sequences) == 1
    return found


def count_tokens(model: Model) -> tuple[list[int], Any]:
    """Tokens of every call of the first layer."""
    counts: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        counts.append(hidden.shape[0] * hidden.shape[1])

    return counts, model.arch.layer(0).register_forward_pre_hook(note, with_kwargs=True)


def beginnings(sequences: Sequence[Sequence[int]]) -> int:
    """Nodes of the trie."""
    return len({tuple(ids[:length]) for ids in sequences for length in range(1, len(ids) + 1)})


def limited(model: Model, monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """The model runs out of memory above so many tokens."""
    base, sizes = model.hf.base_model, []
    forward: Callable[..., Any] = base.forward

    def small(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("inputs_embeds", kwargs.get("input_ids"))
        sizes.append(given.shape[0] * given.shape[1])
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(base, "forward", small)
    monkeypatch.setattr(interp.batching, "free_memory", lambda: None)
    return sizes


@pytest.mark.parametrize(("family", "attention"), KERNELS)
@pytest.mark.parametrize("max_tokens", [1, 20, 512])
def test_every_family_as_whole_sequences(family: str, attention: str, max_tokens: int) -> None:
    window = {"sliding_window": 13} if family in SLIDING else {}
    model = exact(family, attn_implementation=attention, **window)
    assert model.attention == attention
    assert packs(model, 13)
    check(model, SEQUENCES, max_tokens=max_tokens)
    check(model, SEQUENCES, n_reads=2, choices=(3, 60, 8), max_tokens=max_tokens)


@pytest.mark.parametrize(("family", "attention"), [pair for pair in KERNELS if pair[0] in SLIDING])
def test_windows_shorter_than_the_sequences(family: str, attention: str) -> None:
    model = exact(family, attn_implementation=attention)
    assert packs(model, 4)
    assert not packs(model, 5)
    for max_tokens in (1, 30, 512):
        check(model, SEQUENCES, n_reads=2, max_tokens=max_tokens)
    check(model, [ids[-4:] for ids in SEQUENCES[:3]] + [SEQUENCES[3][:2]], n_reads=1)  # as long as the window
    wide, narrow = exact(family, sliding_window=13), model
    changed = plain_logits(wide, SEQUENCES[0]) - plain_logits(narrow, SEQUENCES[0])
    assert float(changed.abs().max()) > 1e-3  # or the test above could not fail


def test_a_decoder_that_sees_both_ways_does_not_see_padding() -> None:
    both, causal = (exact("gemma3", use_bidirectional_attention=ways, sliding_window=60) for ways in (True, False))
    difference = plain_logits(both, SEQUENCES[0], 3) - plain_logits(causal, SEQUENCES[0], 3)
    assert float(difference.abs().max()) > 1e-3
    for max_tokens in (1, 512):
        check(both, SEQUENCES, n_reads=2, max_tokens=max_tokens)


def test_who_is_packed() -> None:
    llama = exact()
    assert packs(llama, 60)
    assert packs(exact("qwen2", sliding_window=4, use_sliding_window=False), 60)
    assert not packs(exact("qwen2", sliding_window=4, use_sliding_window=True, max_window_layers=1), 60)
    assert not packs(load_model(tiny_classifier()), 5)
    llama.hf.config._attn_implementation = "flash_attention_2"
    assert not packs(llama, 5)
    assert not packs(exact("gemma3", use_bidirectional_attention=True, sliding_window=60), 5)


def test_packs_on_the_meta_device() -> None:
    with torch.device("meta"):
        import transformers

        name, changes = FAMILIES["llama"]
        hf = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**changes))
    assert packs(load_model(hf, tiny_tokenizer()), 8)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("max_tokens", [1, 30, 512])
def test_an_encoder_with_classes(attention: str, max_tokens: int) -> None:
    hf = tiny_classifier()
    hf.set_attn_implementation(attention)
    model = load_model(hf.double())
    check(model, SEQUENCES, n_reads=0, max_tokens=max_tokens)
    vector = torch.randn(16, dtype=torch.float64)
    check(model, [[1, 64, 3], [64], [1, 64, 64, 5]], n_reads=0, vector=vector, max_tokens=max_tokens)


@pytest.mark.parametrize("pad_token_id", [0, None])
@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "GPTNeoXForSequenceClassification"])
def test_a_decoder_with_classes_reads_its_last_real_token(kind: str, pad_token_id: int | None) -> None:
    model = load_model(tiny_classifier(kind, pad_token_id=pad_token_id).double())
    for max_tokens in (1, 30, 512):
        check(model, SEQUENCES, n_reads=0, max_tokens=max_tokens)
    # From ids, Hugging Face reads the last token that is not padding.
    ids = SEQUENCES[0]
    logits: list[Tensor] = []
    read_logits(model, [ids, [*ids, 5]], Readout(0), lambda found, rows: logits.append(found) or found[:, 0, 0])  # type: ignore[func-returns-value]
    with torch.no_grad():
        own = model.hf(input_ids=torch.tensor([ids])).logits
    torch.testing.assert_close(logits[0][-1].double(), own, rtol=1e-5, atol=1e-5)


def test_gpt2_with_classes() -> None:
    _, changes = FAMILIES["gpt2"]
    check(load_model(tiny_classifier("GPT2ForSequenceClassification", **changes).double()), SEQUENCES, n_reads=0)


@pytest.mark.parametrize("kind", ["zero", "mean"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2"])
def test_a_vector_that_is_no_token(family: str, kind: str) -> None:
    model = exact(family, **({"sliding_window": 60} if family in SLIDING else {}))
    table = model.hf.get_input_embeddings()
    embedded = table(torch.arange(64)).detach()
    vector = embedded.mean(0) if kind == "mean" else torch.zeros_like(embedded[0])
    sequences = [[token if at % 3 else 64 for at, token in enumerate(ids)] for ids in SEQUENCES]  # the first token too
    for max_tokens in (1, 512):
        check(model, sequences, vector=vector, max_tokens=max_tokens)
        check(model, [[1, 2, *ids] for ids in sequences], vector=vector, max_tokens=max_tokens)


def test_the_embedder() -> None:
    model = exact("gemma3")
    ids = torch.tensor([[3, 64], [64, 63]])
    vector = torch.arange(16.0)
    found = Embedder(model, vector)(ids)
    own = model.hf.get_input_embeddings()(ids.clamp(max=63))
    torch.testing.assert_close(found[0, 0], own[0, 0])
    torch.testing.assert_close(found[1, 1], own[1, 1])
    assert torch.equal(found[0, 1], vector.double())
    assert torch.equal(found[1, 0], vector.double())
    assert torch.equal(Embedder(model)(ids.clamp(max=63)), own)


def test_soft_cap_on_the_logits() -> None:
    capped, plain = (exact("gemma2", sliding_window=60, final_logit_softcapping=cap) for cap in (2.0, None))
    check(capped, SEQUENCES)
    check(capped, SEQUENCES, choices=(9, 4))
    raw = plain_logits(plain, SEQUENCES[0])
    assert float(raw.abs().max()) > 2  # the cap does something
    torch.testing.assert_close(plain_logits(capped, SEQUENCES[0]), 2 * (raw / 2).tanh())


def test_a_head_with_a_bias() -> None:
    model = exact()
    model.hf.lm_head.bias = torch.nn.Parameter(torch.linspace(-3, 3, 64, dtype=torch.float64))
    check(model, SEQUENCES)
    check(model, SEQUENCES, choices=(63, 0))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_is_as_near_to_float32_as_a_plain_forward(family: str) -> None:
    hf = tiny_hf(family).to(torch.bfloat16)
    wide = load_model(tiny_hf(family), tiny_tokenizer())
    wide.hf.load_state_dict(hf.state_dict())
    narrow = load_model(hf, tiny_tokenizer())
    exactly = torch.stack([plain_logits(wide, ids)[0] for ids in SEQUENCES])
    plainly = torch.stack([plain_logits(narrow, ids)[0] for ids in SEQUENCES])
    found = torch.zeros_like(exactly)

    def keep(logits: Tensor, rows: Sequence[int]) -> Tensor:
        found[list(rows)] = logits[:, 0].double()
        return logits[:, 0, 0]

    read_logits(narrow, SEQUENCES, Readout(1), keep)
    error, plain_error = ((some - exactly).square().mean().sqrt() for some in (found, plainly))
    assert float(plain_error) > 0
    assert float(error) < 2 * float(plain_error)


@pytest.mark.parametrize("packed", [True, False])
def test_out_of_memory_halves_and_changes_nothing(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact("mistral", sliding_window=60 if packed else 4)
    expected = check(model, SEQUENCES, n_reads=2)
    sizes = limited(model, monkeypatch, 14)
    weights = weighed(2, 64)
    seen: list[int] = []

    def reduce(logits: Tensor, rows: Sequence[int]) -> Tensor:
        seen.extend(rows)
        return (logits.double() * weights).sum((1, 2)) * (1 + torch.tensor(list(rows)))

    found = read_logits(model, SEQUENCES, Readout(2), reduce)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert max(sizes) > 14  # it did run out
    assert sorted(seen) == list(range(len(SEQUENCES)))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("most", [4, 6])
def test_one_sequence_that_does_not_fit(packed: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 4 tokens the shared beginning of 6 does not fit, at 6 a longer rest."""
    model = exact("mistral", sliding_window=60 if packed else 4)
    limited(model, monkeypatch, most)
    with pytest.raises(MemoryBudgetError, match="out of memory"):
        read_logits(model, SEQUENCES, Readout(1), lambda logits, rows: logits[:, 0, 0])


def test_another_error_on_the_shared_beginning_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact()

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(model.hf.base_model, "forward", fail)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        prefix_cache(model, [1, 2])


def test_every_beginning_is_computed_once() -> None:
    model = exact()
    counts, hook = count_tokens(model)
    read_logits(model, SEQUENCES, Readout(1), lambda logits, rows: logits[:, 0, 0])
    assert counts == [6, beginnings(SEQUENCES) - 6]  # the prompt, then one row with all that differs
    counts.clear()
    read_logits(model, [ids[3:] for ids in SEQUENCES], Readout(3), lambda logits, rows: logits[:, 0, 0])
    assert sum(counts) == beginnings([ids[3:] for ids in SEQUENCES])
    counts.clear()
    read_logits(model, SEQUENCES, Readout(1), lambda logits, rows: logits[:, 0, 0], max_tokens=1)
    assert sorted(counts) == sorted([6, *(len(ids) - 6 for ids in {tuple(ids) for ids in SEQUENCES})])
    counts.clear()
    read_logits(model, SEQUENCES, Readout(1), lambda logits, rows: logits[:, 0, 0], max_tokens=9)
    assert all(count <= 9 for count in counts)  # no rest is longer
    assert len(counts) > 2
    hook.remove()


def test_rows_compute_each_different_sequence_once() -> None:
    model = exact("mistral")
    counts, hook = count_tokens(model)
    read_logits(model, SEQUENCES, Readout(1), lambda logits, rows: logits[:, 0, 0], max_tokens=1)
    assert sum(counts) == sum(len(ids) for ids in {tuple(ids) for ids in SEQUENCES})
    hook.remove()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_equal_sequences_are_reduced_each_by_itself(family: str) -> None:
    """The same input may be asked for another class."""
    model = exact(family)
    same = [SEQUENCES[0]] * 7 + [SEQUENCES[1]] * 2
    calls: list[int] = []

    def pick(logits: Tensor, rows: Sequence[int]) -> Tensor:
        calls.extend(rows)
        return logits[torch.arange(len(rows)), 0, torch.tensor(list(rows))]

    found = read_logits(model, same, Readout(1), pick)
    expected = [float(plain_logits(model, ids)[0, row]) for row, ids in enumerate(same)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert sorted(calls) == list(range(9))


def test_more_sequences_than_rows_of_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp.agreement.prefix_tree._HEAD_ROWS", 3)
    check(exact(), SEQUENCES)
    check(exact(), SEQUENCES, n_reads=2)


def test_order_and_company_do_not_matter() -> None:
    model = exact()
    mixed = list(range(len(SEQUENCES)))
    random.Random(0).shuffle(mixed)
    values = check(model, SEQUENCES) / (1 + np.arange(len(SEQUENCES)))
    shuffled = check(model, [SEQUENCES[at] for at in mixed]) / (1 + np.arange(len(SEQUENCES)))
    np.testing.assert_allclose(shuffled, values[mixed], rtol=1e-6)
    assert values[0] == values[4]
    assert check(model, SEQUENCES[:1])[0] == pytest.approx(values[0], rel=1e-6)  # all but the last token are the prefix


def test_no_sequences() -> None:
    assert read_logits(exact(), [], Readout(1), lambda logits, rows: logits[:, 0, 0]).shape == (0,)


MODEL: dict[str, Any] = {}
PLAIN: dict[tuple[int, ...], Tensor] = {}


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=7), min_size=1, max_size=12),
    st.integers(1, 2),
    st.integers(1, 30),
)
@settings(deadline=None, max_examples=60)
def test_any_sequences(sequences: list[list[int]], n_reads: int, max_tokens: int) -> None:
    model = MODEL.setdefault("llama", exact())
    weights = weighed(n_reads, 64)

    def reduce(logits: Tensor, rows: Sequence[int]) -> Tensor:
        return (logits.double() * weights).sum((1, 2))

    found = read_logits(model, sequences, Readout(n_reads), reduce, max_tokens=max_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("interp.agreement.prefix_tree.packs", lambda model, longest: False)
        rows = read_logits(model, sequences, Readout(n_reads), reduce, max_tokens=max_tokens)
    for ids, value, of_row in zip(sequences, found, rows, strict=True):
        if tuple(ids) not in PLAIN:
            PLAIN[tuple(ids)] = plain_logits(model, ids, 2)
        expected = float((PLAIN[tuple(ids)][-n_reads:] * weights).sum())
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert of_row == pytest.approx(expected, rel=1e-5, abs=1e-4)


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=3, max_size=9).map(tuple), min_size=1, max_size=9), st.integers(0, 3)
)
def test_shared_prefix_by_definition(sequences: list[tuple[int, ...]], n_reads: int) -> None:
    same = 0
    while all(len(ids) > same and ids[same] == sequences[0][same] for ids in sequences):
        same += 1
    assert shared_prefix(sequences, n_reads) == min(same, min(map(len, sequences)) - max(1, n_reads))


def test_the_cache_is_not_changed_by_who_uses_it() -> None:
    model = exact()
    assert prefix_cache(model, []).ids == ()
    assert prefix_cache(model, []).cache() is None
    prefix = prefix_cache(model, PROMPT)
    kept = prefix.kept
    before = [(keys.clone(), values.clone()) for keys, values in kept]
    assert len(kept) == 3
    assert kept[0][0].shape == (1, 2, 6, 4)
    with torch.no_grad():
        ends = torch.tensor([[7, 8], [3, 2]])
        logits = model.hf(input_ids=ends, past_key_values=prefix.cache(2), use_cache=True).logits
    for row, end in enumerate(ends.tolist()):
        torch.testing.assert_close(logits[row, -1], plain_logits(model, [*PROMPT, *end])[0])
    for (keys, values), (old_keys, old_values) in zip(kept, before, strict=True):
        assert torch.equal(keys, old_keys)
        assert torch.equal(values, old_values)
