"""Graphs of every family against Hugging Face's own attentions, and what hooks read from its modules."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from flow_oracles import Largest
from tiny_models import tiny_encoder, tiny_hf, tiny_tokenizer
from torch import Tensor

from interp import load_model
from interp.errors import InputError, MemoryBudgetError
from interp.flow import attention_graph, maximum_flow
from interp.flow.graph import AttentionGraph, check_layers, merge_heads

TEXTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [30], [14, 15, 16, 17, 18, 19]]
# Where each family's residual stream after attention is an input, and which module's output is added there.
AFTER = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "phi3"], "post_attention_layernorm"),
    **dict.fromkeys(["gemma2", "gemma3"], "pre_feedforward_layernorm"),
    "olmo2": "mlp",
    "gpt2": "ln_2",
}


def random_pattern(seed: int, n_layers: int = 3, n_heads: int = 4, length: int = 5, causal: bool = True) -> Tensor:
    scores = torch.randn(n_layers, n_heads, length, length, generator=torch.Generator().manual_seed(seed)) * 2
    return (scores.masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf) if causal else scores).softmax(-1)


def own_attentions(hf: Any, ids: list[int]) -> Tensor:
    """(layer, head, query, key) as Hugging Face's eager attention gives them."""
    before = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        found = hf(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    hf.set_attn_implementation(before)
    return torch.cat(found).double()


def graph(*args: Any, **options: Any) -> AttentionGraph:
    found = attention_graph(*args, **options)
    assert isinstance(found, AttentionGraph)
    return found


def test_capacities_by_hand() -> None:
    pattern = torch.tensor([[[[1.0, 0.0], [0.2, 0.8]], [[1.0, 0.0], [0.6, 0.4]]]])  # one layer, two heads
    expected = {
        ("mean", "half"): [[1.0, 0.0], [0.2, 0.8]],
        ("mean", "plus_one"): [[2.0, 0.0], [0.4, 1.6]],
        ("mean", "none"): [[1.0, 0.0], [0.4, 0.6]],
        ("max", "none"): [[1.0, 0.0], [0.6 / 1.4, 0.8 / 1.4]],
        (1, "none"): [[1.0, 0.0], [0.6, 0.4]],
        (-2, "none"): [[1.0, 0.0], [0.2, 0.8]],
        ((0, 1), "half"): [[1.0, 0.0], [0.2, 0.8]],
    }
    for (heads, residual), capacity in expected.items():
        found = graph(pattern, heads=heads, residual=residual)
        assert torch.allclose(found.capacity, torch.tensor([capacity]))
        assert found.provenance.parameters["residual"] == residual
    assert torch.equal(graph(pattern).capacity, graph(pattern, residual="half").capacity)


def test_attention_is_the_models_own(tiny: Any, family: str) -> None:
    model = tiny(family)
    before, ids = model.attention, TEXTS[0]
    own = own_attentions(model.hf, ids)
    found = graph(model, ids)
    assert model.attention == before
    assert torch.allclose(found.attention.double(), own.mean(1), atol=1e-6)
    assert found.attention.dtype == torch.float32
    assert torch.allclose(found.capacity.sum(-1), torch.ones(3, 9), atol=1e-6)
    assert found.causal
    assert found.layers == (0, 1, 2)
    assert (found.n_layers, len(found)) == (3, 9)
    assert found.tokens == tuple(model.tokenizer.decode([token]) for token in ids)
    if family in ("mistral", "gemma2", "gemma3"):  # a window of 4 positions in some layers
        assert (found.attention[:, 8, 0] == 0).any()
    largest = own.amax(1)
    assert torch.allclose(graph(model, ids, heads="max").attention.double(), largest / largest.sum(-1, True), atol=1e-6)
    assert torch.allclose(graph(model, ids, heads=2).attention.double(), own[:, 2], atol=1e-6)
    assert torch.allclose(graph(model, ids, heads=[0, -1]).attention.double(), own[:, [0, 3]].mean(1), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"heads": "norm"}, {"capacity": "contribution"}, {"heads": "max"}])
def test_batches_equal_one_by_one(tiny: Any, family: str, options: dict[str, Any]) -> None:
    model = tiny(family)
    alone = [graph(model, ids, **options) for ids in TEXTS]
    for max_tokens in (4096, 12):
        together = attention_graph(model, TEXTS, max_tokens=max_tokens, **options)
        for one, many, ids in zip(alone, together, TEXTS, strict=True):
            assert many.attention.shape == (3, len(ids), len(ids))
            assert torch.allclose(one.attention, many.attention, atol=2e-5)
            assert one.tokens == many.tokens
            assert (many.attention.triu(1) == 0).all()
            assert torch.allclose(many.capacity.sum(-1), torch.ones(3, len(ids)), atol=1e-5)


def test_encoder() -> None:
    model = load_model(tiny_encoder())
    alone = [graph(model, ids) for ids in TEXTS]
    for ids, one in zip(TEXTS, alone, strict=True):
        assert torch.allclose(one.attention.double(), own_attentions(model.hf, ids).mean(1), atol=1e-6)
        assert one.tokens == tuple(str(token) for token in ids)
        assert not one.causal
    for max_tokens in (4096, 12):
        for one, many in zip(alone, attention_graph(model, TEXTS, max_tokens=max_tokens), strict=True):
            assert torch.allclose(one.attention, many.attention, atol=1e-6)
    with pytest.raises(InputError, match="is an encoder"):
        attention_graph(model, TEXTS, capacity="contribution")


def test_norm_weighted_heads_of_an_encoder() -> None:
    hf = tiny_encoder()
    for ids, one in zip(TEXTS, attention_graph(load_model(hf), TEXTS, heads="norm"), strict=True):
        hf.set_attn_implementation("eager")
        with torch.no_grad():
            out = hf(input_ids=torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
        for at, layer in enumerate(hf.encoder.layer):
            # What each head writes for each key, by a loop over heads and the modules' own weights.
            values = layer.attention.self.value(out.hidden_states[at])[0]
            weighted = torch.zeros(len(ids), len(ids))
            for head in range(4):
                columns = slice(4 * head, 4 * head + 4)
                written = values[:, columns] @ layer.attention.output.dense.weight[:, columns].T
                weighted += out.attentions[at][0, head] * written.norm(dim=-1)
            assert torch.allclose(one.attention[at], weighted / weighted.sum(-1, keepdim=True), atol=1e-5)


class Seen:
    """What a family's own modules take and give in one eager pass over a text, by layer."""

    def __init__(self, model: Any, family: str, ids: list[int]) -> None:
        hf = model.hf
        self.family, self.model = family, model
        self.value: dict[int, Tensor] = {}
        self.before: dict[int, Tensor] = {}
        self.after: dict[int, Tensor] = {}
        self.output: dict[int, Tensor] = {}
        self.normed: dict[int, Tensor] = {}
        handles = []
        for layer in range(3):
            block = hf.get_submodule(model.arch.family.layers[0])[layer]
            attention = getattr(block, model.arch.family.attention)
            handles.append(block.register_forward_pre_hook(self._keep(self.before, layer)))
            handles.append(attention.register_forward_hook(self._keep_output(self.output, layer)))
            projection = {"gpt2": "c_attn", "gpt_neox": "query_key_value", "phi3": "qkv_proj"}.get(family, "v_proj")
            handles.append(getattr(attention, projection).register_forward_hook(self._keep_output(self.value, layer)))
            if family in AFTER:
                handles.append(getattr(block, AFTER[family]).register_forward_pre_hook(self._keep(self.after, layer)))
            if family in ("gemma2", "gemma3", "olmo2"):
                norm = block.post_attention_layernorm
                handles.append(norm.register_forward_hook(self._keep_output(self.normed, layer)))
        self.pattern = own_attentions(hf, ids)
        for handle in handles:
            handle.remove()
        for layer in range(3):  # GPT-NeoX adds attention and MLP side by side
            self.after.setdefault(layer, self.before[layer] + self.output[layer])

    @staticmethod
    def _keep(into: dict[int, Tensor], layer: int) -> Any:
        return lambda module, args: into.__setitem__(layer, args[0][0].double())

    @staticmethod
    def _keep_output(into: dict[int, Tensor], layer: int) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            into[layer] = (output[0] if isinstance(output, tuple) else output)[0].double()

        return keep

    def values(self, layer: int) -> Tensor:
        """(head, position, d_head), key-value heads repeated as transformers repeats them."""
        from transformers.models.llama.modeling_llama import repeat_kv

        projected = self.value[layer]
        if self.family == "gpt2":  # [query, key, value]
            projected = projected[:, 32:]
        elif self.family == "phi3":  # 4 query heads, 2 key heads, 2 value heads
            projected = projected[:, 24:]
        elif self.family == "gpt_neox":  # by head: [query, key, value]
            return projected.reshape(len(projected), 4, 3, 4)[:, :, 2].transpose(0, 1)
        split = projected.reshape(1, len(projected), -1, 4).transpose(1, 2)
        return repeat_kv(split, 4 // split.shape[1])[0]

    def written(self, layer: int) -> Tensor:
        """(head, key, d_model): what a head adds for a key that it attends to with weight 1, without biases."""
        attention = self.model.arch.attention(layer)
        if self.family == "gpt2":
            weight = attention.c_proj.weight.T
        else:
            weight = (attention.dense if self.family == "gpt_neox" else attention.o_proj).weight
        columns = weight.detach().double().split(4, dim=1)  # one block of columns per head
        return torch.stack([value @ block.T for value, block in zip(self.values(layer), columns, strict=True)])

    def scale(self, layer: int) -> Tensor:
        """What a norm after attention does to each number of a position."""
        if layer not in self.normed:
            return torch.ones_like(self.output[layer])
        return self.normed[layer] / self.output[layer]

    def bias(self, layer: int) -> Tensor:
        projection = self.model.arch.o_proj(layer)
        bias = getattr(projection, "bias", None)
        return torch.zeros(16, dtype=torch.float64) if bias is None else bias.detach().double()


def test_norm_weighted_heads(tiny: Any, family: str) -> None:
    model, ids = tiny(family), TEXTS[0]
    seen = Seen(model, family, ids)
    found = graph(model, ids, heads="norm").attention
    for layer in range(3):
        weighted = torch.zeros(9, 9, dtype=torch.float64)
        for head, written in enumerate(seen.written(layer)):
            for key in range(9):
                weighted[:, key] += seen.pattern[layer, head, :, key] * written[key].square().sum().sqrt()
        assert torch.allclose(found[layer].double(), weighted / weighted.sum(1, True), atol=1e-5)


def test_contributions(tiny: Any, family: str) -> None:
    """Parts and residual stream make the stream after attention, and every edge is what its definition says."""
    model, ids = tiny(family), TEXTS[0]
    seen = Seen(model, family, ids)
    found = graph(model, ids, capacity="contribution")
    assert found.residual == "none"
    for layer in range(3):
        written, scale = seen.written(layer), seen.scale(layer)
        expected = torch.zeros(9, 9, dtype=torch.float64)
        for query in range(9):
            after = seen.after[layer][query]
            parts = [
                sum(seen.pattern[layer, head, query, key] * written[head, key] for head in range(4)) * scale[query]
                for key in range(9)
            ]
            own = seen.before[layer][query]
            assert torch.allclose(sum(parts) + seen.bias(layer) * scale[query] + own, after, atol=1e-4, rtol=1e-4)
            for key, part in [*enumerate(parts), (query, own)]:
                expected[query, key] += max(0.0, float(after.abs().sum() - (after - part).abs().sum()))
        assert torch.allclose(found.attention[layer].double(), expected / expected.sum(1, True), atol=1e-4)


def test_contributions_go_block_by_block(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A (query, key, d_model) tensor of 60 tokens would be 57,600 numbers; the model's own patterns are 14,400."""
    from interp.flow import patterns

    model, ids = tiny("gemma2"), [5 + at % 50 for at in range(60)]
    whole = graph(model, ids, capacity="contribution")
    monkeypatch.setattr(patterns, "_BLOCK", 7 * 60 * 16)
    with Largest() as largest:
        blocks = graph(model, ids, capacity="contribution")
    assert largest.numel <= 4 * 60 * 60
    assert torch.allclose(blocks.attention, whole.attention, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"heads": "norm"}, {"capacity": "contribution"}])
def test_subsets_of_layers(tiny: Any, options: dict[str, Any]) -> None:
    model = tiny("gemma2")
    whole = graph(model, TEXTS[0], **options)
    for layers, expected in [([1], [1]), ([0, 2], [0, 2]), ([-1], [2]), (range(2), [0, 1]), (1, [1])]:
        some = graph(model, TEXTS[0], layers=layers, **options)
        assert some.layers == tuple(expected)
        assert torch.allclose(some.attention, whole.attention[expected], atol=1e-6)
    assert torch.equal(graph(random_pattern(0), layers=[0, 2]).attention, graph(random_pattern(0)).attention[[0, 2]])


def test_bfloat16_model(family: str) -> None:
    """Rows of rounded weights are brought back to 1, and what comes out is float32."""
    half = load_model(tiny_hf(family).bfloat16(), tiny_tokenizer(), check=False)
    whole = load_model(half.hf.float(), tiny_tokenizer(), check=False)
    expected = [graph(whole, TEXTS[0], **options).attention for options in ({}, {"heads": "norm"})]
    half = load_model(tiny_hf(family).bfloat16(), tiny_tokenizer(), check=False)
    for options, close in zip(({}, {"heads": "norm"}), expected, strict=True):
        found = graph(half, TEXTS[0], **options).attention
        assert found.dtype == torch.float32
        assert torch.allclose(found.sum(-1), torch.ones(3, 9), atol=1e-6)
        assert (found[0] - close[0]).abs().max() < 0.1  # higher layers see what lower ones have rounded
    assert graph(half, TEXTS[0], capacity="contribution").attention.isfinite().all()


def test_texts_ids_and_chat(tiny: Any) -> None:
    model = tiny()
    ids = model.encode("the dog is red")[0]
    by_text = graph(model, "the dog is red")
    assert by_text.tokens[1:] == ("▁dog", "▁is", "▁red") or by_text.tokens[1:] == (" dog", " is", " red")
    for same in (ids, tuple(ids), torch.tensor(ids), np.array(ids)):
        assert torch.equal(graph(model, same).attention, by_text.attention)
    for several in ([ids], ["the dog is red"], torch.tensor([ids]), np.array([ids])):
        (found,) = attention_graph(model, several)
        assert torch.equal(found.attention, by_text.attention)
    mixed = attention_graph(model, ["the dog is red", [5, 6]])
    assert [len(one) for one in mixed] == [4, 2]
    model.tokenizer.chat_template = "{% for m in messages %}<bos>{{ m['content'] }}<eos>{% endfor %}"
    chat = graph(model, "the dog is red", chat=True)
    assert chat.tokens[0] == "<bos>"
    assert torch.allclose(chat.attention, graph(model, [1, *ids, 2]).attention, atol=1e-6)


def test_patterns_of_any_layout() -> None:
    pattern = random_pattern(0)
    expected = 0.5 * pattern.mean(1) + 0.5 * torch.eye(5)
    for given in (
        pattern,
        list(pattern),
        tuple(pattern),
        [layer[None] for layer in pattern],  # as Hugging Face gives one text
        pattern.mean(1),
        list(pattern.mean(1)),
        pattern.double(),
    ):
        found = graph(given, tokens="abcde")
        assert torch.allclose(found.capacity.float(), expected, atol=1e-6)
        assert found.tokens == tuple("abcde")
        assert found.causal
    assert graph(pattern).tokens == ("0", "1", "2", "3", "4")
    assert not graph(random_pattern(0, causal=False)).causal
    rounded = graph(pattern.bfloat16()).attention
    assert rounded.dtype == torch.float32
    assert torch.allclose(rounded.sum(-1), torch.ones(3, 5), atol=1e-6)
    assert graph(pattern.double()).attention.dtype == torch.float64
    assert graph(torch.ones(1, 1, 1, 1)).capacity.tolist() == [[[1.0]]]


def test_a_pattern_of_a_model_is_its_provenance(tiny: Any) -> None:
    model = tiny()
    found = graph(model, random_pattern(0))
    assert found.provenance.fingerprint == model.fingerprint
    assert torch.equal(found.attention, graph(random_pattern(0)).attention)
    assert graph(model, [5, 6], layers=[1]).provenance.parameters == {
        "residual": "half",
        "heads": "mean",
        "capacity": "attention",
        "layers": [1],
    }


def test_permuted_heads_change_nothing() -> None:
    pattern = random_pattern(0)
    order = torch.tensor([2, 0, 3, 1])
    for heads in ("mean", "max"):
        left, right = graph(pattern, heads=heads), graph(pattern[:, order], heads=heads)
        assert torch.allclose(left.capacity, right.capacity, atol=1e-7)
        assert torch.allclose(maximum_flow(left.capacity), maximum_flow(right.capacity), atol=1e-6)


def test_a_pattern_keeps_its_gradient() -> None:
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=random).requires_grad_()

    def flow(scores: Tensor) -> Tensor:
        return maximum_flow(graph(scores.softmax(-1), heads=[0, 2]).capacity, [-1])

    assert torch.autograd.gradcheck(flow, scores, eps=1e-7, atol=1e-5)
    (gradient,) = torch.autograd.grad(flow(scores).sum(), scores)
    assert (gradient[:, 1] == 0).all()
    assert (gradient[:, 0] != 0).any()


def test_below() -> None:
    whole = graph(random_pattern(0), tokens="abcde")
    for n_layers in (1, 2, 3):
        part = whole.below(n_layers)
        assert torch.equal(part.capacity, whole.capacity[:n_layers])
        assert (part.layers, part.tokens, part.causal) == (whole.layers[:n_layers], whole.tokens, True)
    for wrong in (0, 4, -1):
        with pytest.raises(InputError, match=f"n_layers={wrong}; expected 1 … 3"):
            whole.below(wrong)


def test_uniform() -> None:
    causal = graph(random_pattern(0)).uniform()
    assert torch.allclose(causal.attention, torch.stack([torch.ones(5, 5).tril() / torch.arange(1, 6)[:, None]] * 3))
    both = graph(random_pattern(0, causal=False), residual="plus_one").uniform()
    assert torch.allclose(both.capacity, torch.full((3, 5, 5), 0.2) + torch.eye(5))


@pytest.mark.parametrize("causal", [True, False])
def test_without_sinks(causal: bool) -> None:
    pattern = random_pattern(1, causal=causal).mean(1).clone()
    pattern[1, 3] = torch.tensor([1.0, 0, 0, 0, 0])  # a row that looks at the sink alone
    whole = graph(pattern)
    for sinks in ([0], [0, -1], [2]):
        left = whole.without(sinks)
        gone = [sink % 5 for sink in sinks]
        kept = [at for at in range(5) if at not in gone]
        assert torch.allclose(left.attention.sum(-1), torch.ones(3, 5), atol=1e-6)
        for layer in range(3):
            for query in range(5):
                row, before = left.attention[layer, query], pattern[layer, query]
                total = before[kept].sum()
                if query in gone or total == 0:
                    expected = torch.eye(5)[query]
                else:
                    expected = torch.where(
                        torch.tensor([at in kept for at in range(5)]), before / total, torch.zeros(5)
                    )
                assert torch.allclose(row, expected, atol=1e-6)
        flow = maximum_flow(left.capacity)
        assert (flow[kept][:, gone] == 0).all()
    for wrong, message in [
        ([5], "position 5 is out of range"),
        (range(5), "all 5 positions would be removed"),
        ([], "empty"),
    ]:
        with pytest.raises(InputError, match=message):
            whole.without(wrong)


def test_without_keeps_gradients_and_sums() -> None:
    scores = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    whole = graph(scores.softmax(-1))

    def attention(scores: Tensor) -> Tensor:
        return dataclasses.replace(whole, attention=scores.softmax(-1)).without([0]).attention

    assert torch.autograd.gradcheck(attention, scores)
    on_sink = torch.zeros(1, 3, 3)
    on_sink[:, :, 0] = 1.0
    on_sink.requires_grad_()
    left = graph(on_sink).without([0]).attention
    assert torch.equal(left, torch.eye(3)[None])
    (gradient,) = torch.autograd.grad(left.square().sum(), on_sink)
    assert gradient.isfinite().all()


def test_repr_and_graph_of_one_token(tiny: Any) -> None:
    one = graph(tiny(), [5])
    assert repr(one) == "AttentionGraph(3 layers × 1 tokens, residual='half', causal)"
    assert maximum_flow(one.capacity).tolist() == [[1.0]]
    assert torch.equal(one.uniform().capacity, one.capacity)


def test_sdpa_models_give_no_pattern(tiny: Any) -> None:
    for hf in (tiny_hf("llama"), tiny_encoder()):
        hf.set_attn_implementation("sdpa")
        with torch.no_grad():
            attentions = hf(input_ids=torch.tensor([[5, 6, 7]]), output_attentions=True).attentions
        with pytest.raises(InputError, match=r"sdpa attention returns none: call model\.set_attn_implementation"):
            attention_graph(attentions)
    model = load_model(tiny_hf("llama"), tiny_tokenizer(), attention="sdpa")
    assert len(graph(model, [5, 6, 7])) == 3
    assert model.attention == "sdpa"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "the pattern is empty"),
        ((), "no layers make no graph"),
        (torch.zeros(0, 2, 3, 3), r"shape \(0, 2, 3, 3\); expected at least one layer, head and token"),
        (torch.zeros(1, 0, 3, 3), "at least one layer, head and token"),
        (torch.zeros(1, 2, 0, 0), "at least one layer, head and token"),
        ([torch.ones(1, 2, 2), torch.ones(1, 3, 3)], r"shapes \[\(1, 2, 2\), \(1, 3, 3\)\]; expected one shape"),
        ([torch.ones(1, 1, 1), torch.ones(2, 1, 1)], "expected one shape"),
        (torch.ones(1, 2, 3), "with as many queries as keys"),
        (torch.ones(2, 2), r"the pattern has shape \(2, 2\)"),
        (torch.ones(1, 1, 1, 1, 1), "one text at a time"),
        ([torch.ones(2, 1, 1, 1)], "one text at a time"),
        (torch.full((1, 1, 2, 2), 0.4), r"row \[0, 0, 0\] sums to 0.8; expected rows that sum to 1"),
        (torch.tensor([[[1.0, 0.0], [1.0, 0.01]]]), r"row \[0, 1\] sums to 1.01"),
        (torch.tensor([[[1.5, -0.5], [0.0, 1.0]]]), r"the pattern at \[0, 0, 1\] is -0.5; expected finite weights"),
        (torch.tensor([[[1.0, 0.0], [torch.nan, 1.0]]]), r"the pattern at \[0, 1, 0\] is nan"),
        (torch.tensor([[[torch.inf, 0.0], [0.0, 1.0]]]), "is inf"),
        (torch.zeros(1, 1, 1), "sums to 0"),
        ("the dog", "str is neither a model nor a pattern"),
        (None, "NoneType is neither a model nor a pattern"),
        (torch.ones(1, 1, 1, dtype=torch.long), "Tensor is neither a model nor a pattern"),
    ],
)
def test_what_is_not_a_pattern(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attention_graph(given)


def test_options_that_do_not_fit(tiny: Any) -> None:
    model, pattern = tiny(), random_pattern(0)
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((pattern,), {"residual": "double"}, "residual='double'; expected one of half, plus_one, none"),
        ((pattern,), {"capacity": "value"}, "capacity='value'; expected one of attention, contribution"),
        ((pattern,), {"heads": "median"}, "heads='median'; expected 'mean'"),
        ((pattern,), {"heads": 4}, r"heads=\[4\]; expected heads from 0 to 3"),
        ((pattern,), {"heads": [-5]}, "expected heads from 0 to 3"),
        ((pattern,), {"heads": [0, True]}, "expected heads from 0 to 3"),
        ((pattern,), {"heads": []}, "heads is empty"),
        ((pattern,), {"heads": "norm"}, "need a model and a text, not a pattern"),
        ((pattern,), {"capacity": "contribution"}, "need a model and a text, not a pattern"),
        ((pattern.mean(1),), {"heads": 0}, "has no heads left"),
        ((pattern,), {"tokens": ["a"]}, "1 tokens were given for a pattern of 5 positions"),
        ((pattern,), {"layers": []}, "layers is empty"),
        ((pattern,), {"layers": [3]}, r"layers=\[3\]; expected layers from 0 to 2"),
        ((pattern,), {"layers": [1, 1]}, "each layer once, in ascending order"),
        ((pattern, "the dog"), {}, "a pattern and a text were given"),
        ((model,), {}, "no text was given"),
        ((model, "the dog"), {"tokens": ["a", "b"]}, "a text has its own"),
        ((model, "the dog"), {"layers": [2, 0]}, "in ascending order"),
        ((model, "the dog"), {"heads": "median"}, "heads='median'"),
        ((model, "the dog"), {"heads": [9]}, "expected heads from 0 to 3"),
        ((model, "the dog"), {"capacity": "contribution", "residual": "half"}, "use residual='none' and heads='mean'"),
        ((model, "the dog"), {"capacity": "contribution", "heads": "norm"}, "use residual='none' and heads='mean'"),
        ((model, ""), {}, "text 0 is empty"),
        ((model, [5, 99]), {}, "outside the model's vocabulary"),
        ((model, [[5], []]), {}, "text 1 is empty"),
        ((model, 5), {}, "the text is 5"),
        ((model, list(range(5, 40)) * 2), {}, "the model's context is 64 tokens"),
    ]
    for given, options, message in wrong:
        with pytest.raises(InputError, match=message):
            attention_graph(*given, **options)
    assert check_layers(None, 2) == [0, 1]
    with pytest.raises(InputError, match="heads='norm'"):
        merge_heads(pattern, "norm")


def test_texts_too_large_for_memory(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import interp.batching

    model = tiny()
    for free, what in [(100, "keeping whole tensors of 4 texts"), (4000, "one text of 9 tokens")]:
        monkeypatch.setattr(interp.batching, "available_memory", lambda device, free=free: free)
        with pytest.raises(MemoryBudgetError, match=f"{what} needs about .* GiB are free"):
            attention_graph(model, TEXTS)


def test_layers_without_softmax_attention_are_named(tiny: Any) -> None:
    from interp.errors import ModelError

    model = tiny()
    model.arch.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="layer 1: linear_attention"):
        attention_graph(model, [5, 6], heads="norm")


def test_contributions_are_compared_with_half_uniform_attention(tiny: Any) -> None:
    graph = attention_graph(tiny(), [4, 5, 6, 7], capacity="contribution")
    expected = 0.5 * torch.eye(4) + 0.5 * torch.tril(torch.ones(4, 4) / torch.arange(1.0, 5)[:, None])
    assert torch.allclose(graph.uniform().capacity, expected.expand(3, 4, 4))


def test_what_is_no_pattern_is_named(tiny: Any) -> None:
    with pytest.raises(InputError, match="sdpa"):
        attention_graph((None, None))
    with pytest.raises(InputError, match="no texts"):
        attention_graph(tiny(), [])
    with pytest.raises(InputError, match=r"attentions"):
        attention_graph({"attentions": ()})
