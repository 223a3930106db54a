"""Families: shapes, weights that recompute the MLP by hand, norms, sites, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_models import FAMILIES, GATED, SIZES, tiny_encoder, tiny_hf, tiny_tokenizer
from torch.nn import functional

from interp import architectures, families
from interp.architectures import Architecture, Family, family_of, register, stored_weight
from interp.capture import Keep, run_probes
from interp.errors import InputError, InterpError, ModelError
from interp.intervene import clamp
from interp.model import load_model

TEXT = "the water is in the king dog"


def seen(model: Any, *sites: tuple[str, int], texts: Any = (TEXT,)) -> dict[tuple[str, int], torch.Tensor]:
    """Tensors of the first text."""
    probe = Keep(sites)
    run_probes(model, list(texts), [probe])
    return {site: probe.tensors[site][0] for site in sites}


def activation(model: Any) -> Any:
    """The MLP's activation, from the config rather than from the module."""
    config = model.arch.config
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    name = name or config.activation_function
    functions = {"silu": functional.silu, "gelu": functional.gelu}
    return functions.get(name, lambda x: functional.gelu(x, approximate="tanh"))


def bias(module: Any, rows: slice = slice(None)) -> Any:
    return 0 if getattr(module, "bias", None) is None else module.bias.detach()[rows]


def test_shapes(tiny: Any, family: str) -> None:
    arch = tiny(family).arch
    assert (arch.n_layers, arch.d_model, arch.d_mlp, arch.n_heads, arch.d_head, arch.vocab_size) == (
        3,
        16,
        24,
        4,
        4,
        64,
    )
    assert arch.n_kv_heads == (4 if family in ("gpt2", "gpt_neox") else 2)
    assert arch.n_positions == 64
    for layer in (0, 2, -1):
        assert arch.up_weight(layer).shape == arch.down_weight(layer).shape == (24, 16)
    assert arch.head_weight().shape == (64, 16)
    assert arch.embedding() is arch.hf.get_input_embeddings()
    assert arch.lm_head() is arch.hf.get_output_embeddings()
    if family in GATED:
        assert arch.gate_weight(1).shape == (24, 16)
        assert not torch.equal(arch.gate_weight(1), arch.up_weight(1))
    else:
        with pytest.raises(InputError, match="not gated"):
            arch.gate_weight(1)
        with pytest.raises(InputError, match="not gated"):
            arch.site("gate", 1)


@torch.no_grad()
def test_weights_recompute_the_mlp(tiny: Any, family: str) -> None:
    model = tiny(family)
    arch, layer = model.arch, 1
    names = ["up", "hidden", "mlp_out", *(["gate"] if family in GATED else [])]
    inputs: list[torch.Tensor] = []
    handle = arch.up_proj(layer).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    got = seen(model, *((name, layer) for name in names))
    handle.remove()
    x = inputs[0][0]
    up = x @ arch.up_weight(layer).T + bias(arch.up_proj(layer))
    torch.testing.assert_close(got["up", layer], up)
    act = activation(model)
    if family in GATED:
        gate = x @ arch.gate_weight(layer).T + bias(arch.gate_proj(layer))
        torch.testing.assert_close(got["gate", layer], gate)
        hidden = up * act(gate)
    else:
        hidden = act(up)
    torch.testing.assert_close(got["hidden", layer], hidden)
    torch.testing.assert_close(got["mlp_out", layer], hidden @ arch.down_weight(layer) + bias(arch.down_proj(layer)))


@torch.no_grad()
def test_norm_gain_and_bias_against_the_module(tiny: Any, family: str) -> None:
    arch = tiny(family).arch
    x = torch.randn(5, 16)
    norms = [arch.final_norm(), arch.pre_mlp_norm(1)]
    assert (norms[1] is None) == (family == "olmo2")
    for norm in norms:
        if norm is None:
            assert arch.norm_gain(norm) is None
            assert arch.norm_bias(norm) is None
            continue
        if arch.family.norm == "rms":
            expected = x / x.pow(2).mean(-1, keepdim=True).sqrt() * arch.norm_gain(norm)
            assert arch.norm_bias(norm) is None
        else:
            centred = x - x.mean(-1, keepdim=True)
            expected = centred / x.std(-1, keepdim=True, correction=0) * arch.norm_gain(norm) + arch.norm_bias(norm)
        torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_pre_mlp_norm_is_what_the_mlp_reads(tiny: Any, family: str) -> None:
    arch = tiny(family).arch
    calls: list[Any] = []
    norm = arch.pre_mlp_norm(1)
    handles = [arch.up_proj(1).register_forward_pre_hook(lambda module, args: calls.append(args[0]))]
    if norm is not None:
        handles.append(norm.register_forward_hook(lambda module, args, output: calls.append(output)))
    arch.hf(torch.tensor([[5, 6, 7]]))
    for handle in handles:
        handle.remove()
    if norm is not None:
        torch.testing.assert_close(calls[0], calls[1])


@torch.no_grad()
def test_setting_hidden_moves_mlp_out_along_the_neurons_column(tiny: Any, family: str) -> None:
    model, neuron, value = tiny(family), 5, 3.5
    before = seen(model, ("hidden", 1), ("mlp_out", 1))
    with clamp(model, layer=1, neuron=neuron, value=value):
        after = seen(model, ("hidden", 1), ("mlp_out", 1))
    moved = (value - before["hidden", 1][:, neuron, None]) * model.arch.down_weight(1)[neuron]
    torch.testing.assert_close(after["mlp_out", 1], before["mlp_out", 1] + moved)
    assert (after["hidden", 1][:, neuron] == value).all()


@torch.no_grad()
def test_every_site_is_written_where_it_is_read(tiny: Any, family: str) -> None:
    """What a visitor returns is what a later reader and the rest of the model see."""
    model = tiny(family)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = model.hf(ids).logits
    for name in (
        "resid_pre",
        "resid_post",
        "attn_out",
        "z",
        "up",
        "hidden",
        "mlp_out",
        *(["gate"] * (family in GATED)),
    ):
        site, read = model.arch.site(name, 1), []
        handles = [
            site.attach(lambda tensor: tensor * 0.5 + 1),
            site.attach(lambda tensor, read=read: read.append(tensor)),
        ]
        changed = model.hf(ids).logits
        for handle in handles:
            handle.remove()
        before = seen(model, (name, 1), texts=[[5, 6, 7, 8]])[name, 1]
        torch.testing.assert_close(read[0][0], before * 0.5 + 1, rtol=1e-4, atol=1e-5)
        assert (changed - plain).abs().max() > 1e-4, name
    torch.testing.assert_close(model.hf(ids).logits, plain)


@torch.no_grad()
def test_residual_sites_chain(tiny: Any, family: str) -> None:
    model = tiny(family)
    got = seen(model, ("resid_post", 0), ("resid_pre", 1), ("resid_post", 2), ("logits", -1), ("z", 1), ("attn_out", 1))
    torch.testing.assert_close(got["resid_post", 0], got["resid_pre", 1])
    assert got["z", 1].shape == (7, 16)
    logits = model.head_logits(got["resid_post", 2])
    cap = getattr(model.arch.config, "final_logit_softcapping", None)
    logits = torch.tanh(logits / cap) * cap if cap else logits
    torch.testing.assert_close(got["logits", -1], logits, rtol=1e-4, atol=1e-4)
    ids = torch.tensor([model.encode(TEXT)[0]])
    torch.testing.assert_close(got["logits", -1], model.hf(ids).logits[0], rtol=1e-4, atol=1e-4)
    handle = model.arch.site("logits").attach(lambda tensor: tensor + 1)
    torch.testing.assert_close(model.hf(ids).logits[0], got["logits", -1] + 1, rtol=1e-4, atol=1e-4)
    handle.remove()


def test_z_has_the_heads_side_by_side(tiny: Any) -> None:
    model = tiny("llama")
    got = seen(model, ("pattern", 1), ("z", 1))
    values: list[torch.Tensor] = []
    handle = model.arch.attention(1).v_proj.register_forward_hook(lambda module, args, output: values.append(output[0]))
    run_probes(model, [TEXT], [Keep([("resid_post", 2)])])
    handle.remove()
    for head in range(4):  # two query heads share a key-value head
        value = values[0][:, (head // 2) * 4 : (head // 2 + 1) * 4].detach()
        torch.testing.assert_close(got["z", 1][:, head * 4 : head * 4 + 4], got["pattern", 1][head] @ value)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_headless_module(family: str) -> None:
    hf = tiny_hf(family).base_model
    model = load_model(hf, tiny_tokenizer())
    assert model.arch.up_weight(0).shape == (24, 16)
    with pytest.raises(ModelError, match="no LM head"):
        model.arch.lm_head()
    with pytest.raises(InputError, match="LM head"):
        model.generate("the dog")


def test_multimodal_gemma3_uses_its_language_part() -> None:
    settings = {**FAMILIES["gemma3"][1]}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    config = transformers.Gemma3Config(text_config=settings, vision_config=vision, mm_tokens_per_image=1)
    hf = transformers.Gemma3ForConditionalGeneration(config).eval()
    for module in (hf, hf.model):
        arch = Architecture(module)
        assert arch.n_layers == 3
        assert arch.embedding().weight.shape == (64, 16)
        assert arch.final_norm() is not None


@pytest.mark.parametrize(
    ("check", "size"), [("check_layer", 3), ("check_neuron", 24), ("check_head", 4)], ids=["layer", "neuron", "head"]
)
def test_indices(tiny: Any, check: str, size: int) -> None:
    import numpy as np

    function = getattr(tiny().arch, check)
    assert function(-1) == size - 1
    assert function(np.int64(1)) == function(torch.tensor(1)) == 1
    for wrong in (size, -size - 1):
        with pytest.raises(InputError, match=f"{wrong} is out of range.*0 … {size - 1}"):
            function(wrong)


def test_an_index_must_be_whole() -> None:
    with pytest.raises(InputError, match=r"neuron 1.5 is not a whole number; a layer has 24 neurons"):
        architectures._index(1.5, 24, "neuron", "a layer has", "neurons")


def test_unknown_site(tiny: Any) -> None:
    with pytest.raises(InputError, match=r"unknown site 'mlp'.*hidden"):
        tiny().arch.site("mlp", 0)


def test_unknown_family_says_how_to_register_and_then_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    config = transformers.StableLmConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=32)
    hf = transformers.StableLmForCausalLM(config).eval()
    with pytest.raises(ModelError, match=r"unknown model_type 'stablelm'.*gpt2.*llama.*register\(") as caught:
        load_model(hf)
    assert isinstance(caught.value, InterpError)
    register(Family("StableLM", ("stablelm",), norm="layer"))
    model = load_model(hf)
    assert model.arch.up_weight(0).shape == (24, 16)
    got = seen(model, ("hidden", 1), texts=[[4, 5, 6]])
    assert got["hidden", 1].shape == (3, 24)


def test_register_refuses_what_cannot_be_right() -> None:
    with pytest.raises(InputError, match="names no model_type"):
        register(Family("Empty", ()))
    with pytest.raises(InputError, match="norm='batch'"):
        register(Family("Odd", ("odd",), norm="batch"))


def test_a_wrong_path_names_module_and_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    register(Family("Wrong", ("llama",), up="mlp.no_such"))
    with pytest.raises(ModelError, match=r"layer 0 of LlamaForCausalLM has no 'mlp.no_such'"):
        load_model(tiny_hf())
    register(Family("Wrong", ("llama",), layers=("model.blocks",)))
    with pytest.raises(ModelError, match=r"none of \('model.blocks',\)"):
        load_model(tiny_hf())


def test_an_attention_without_weights_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    register(Family("Wrong", ("llama",), attention="self_attn.o_proj"))  # returns one tensor, no pattern
    with pytest.raises(ModelError, match="no attention weights"):
        load_model(tiny_hf())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("Qwen2MoeConfig", {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}),
    ],
)
def test_mixture_of_experts_is_refused_by_name(name: str, changes: dict[str, int], tmp_path: Any) -> None:
    config = getattr(transformers, name)(**SIZES, num_key_value_heads=2, **changes)
    with pytest.raises(ModelError, match=rf"'{config.model_type}' is a mixture of 4 experts"):
        family_of(config)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="mixture of 4 experts"):
        load_model(tmp_path)


def test_encoder() -> None:
    model = load_model(tiny_encoder(), tiny_tokenizer())
    arch = model.arch
    assert arch.up_weight(0).shape == arch.down_weight(0).shape == (24, 16)
    assert arch.final_norm() is None
    texts = ["the water", TEXT, "a dog is in the sea"]
    probe = Keep(
        [("pattern", 0), ("pattern", 2), ("hidden", 1), ("up", 1), ("mlp_out", 1), ("resid_post", 2), ("z", 1)]
    )
    for side in ("right", "left"):
        run_probes(model, texts, [probe], side=side)
        for row, text in enumerate(texts):
            ids = torch.tensor(model.encode(text))
            with torch.no_grad(), model.attention_implementation("eager"):
                output = model.hf(ids, output_attentions=True)
            pattern = probe.tensors["pattern", 2][row]
            torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:2]))
            torch.testing.assert_close(pattern, output.attentions[2][0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                probe.tensors["resid_post", 2][row], output.last_hidden_state[0], rtol=1e-4, atol=1e-5
            )
            hidden = functional.gelu(probe.tensors["up", 1][row])
            torch.testing.assert_close(probe.tensors["hidden", 1][row], hidden)
    with pytest.raises(InputError, match="encoder"):
        model.generate("the water")
    with pytest.raises(InputError, match="encoder"):
        model.generate_ids([[4, 5]])


def test_masked_lm_head(tmp_path: Any) -> None:
    config = transformers.BertConfig(**SIZES, max_position_embeddings=64)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert type(model.hf).__name__ == "BertForMaskedLM"
    assert model.arch.head_weight().shape == (64, 16)
    transformers.BertModel(config).save_pretrained(tmp_path)
    assert type(load_model(tmp_path).hf).__name__ == "BertModel"


def test_stored_weight_on_meta() -> None:
    with torch.device("meta"):
        module = torch.nn.Linear(2, 3)
    with pytest.raises(ModelError, match=r"Linear.weight is on the meta device"):
        stored_weight(module, "weight")
