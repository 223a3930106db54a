"""Models from anywhere: what loads, what is refused and how, what identifies a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, VOCAB, tiny_encoder, tiny_hf, tiny_tokenizer

from interp import sources, weight_hash
from interp.errors import InputError, InterpError, ModelError
from interp.intervene import clamp
from interp.model import load_model, set_seed

PROMPTS = ["the dog", "a king is in the sea ?"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as save_pretrained writes it, with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_hf().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


# What loads


def test_folder(saved: Path) -> None:
    model = load_model(saved)
    original = tiny_hf()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model.hf(ids).logits, original(ids).logits)
    assert model.name == saved.name
    assert model.dtype == torch.float32
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert not model.hf.training
    assert model.generate("the dog", max_new_tokens=3) == load_model(original, tiny_tokenizer()).generate(
        "the dog", max_new_tokens=3
    )
    assert "Llama, 3 layers × 24 neurons" in repr(model)
    assert load_model(str(saved), attention="eager").attention == "eager"


def test_every_family_loads_from_a_folder(family: str, tmp_path: Path) -> None:
    hf = tiny_hf(family)
    hf.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.arch.family.model_types[0].startswith(family[:4]) or family == "gemma3"
    assert loaded.fingerprint == load_model(hf).fingerprint
    assert loaded.tokenizer is None


def test_relative_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    assert load_model(".").name == saved.name
    monkeypatch.chdir(saved.parent)
    assert load_model(saved.name).name == saved.name


def test_loaded_module() -> None:
    hf = tiny_hf().train()
    model = load_model(hf, tiny_tokenizer(), dtype="float64")
    assert model.hf is hf
    assert not hf.training
    assert model.dtype == torch.float64
    assert load_model(hf, attention="eager").attention == "eager"
    with pytest.raises(InputError, match="cannot use dict as a model"):
        load_model({})
    with pytest.raises(InputError, match="cannot use Linear as a model"):
        load_model(torch.nn.Linear(1, 1))


def test_tokenizer_from_elsewhere(saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved / "config.json", tmp_path)
    shutil.copy(saved / "model.safetensors", tmp_path)
    bare = load_model(tmp_path)
    assert bare.tokenizer is None
    assert len(bare.generate_ids([[5, 6]], max_new_tokens=2)[0]) in (1, 2)
    with pytest.raises(InputError, match="no tokenizer; give token ids"):
        bare.generate("the dog")
    with pytest.raises(InputError, match="no tokenizer"):
        bare.decode([5])
    for tokenizer in (saved, str(saved), tiny_tokenizer()):
        assert load_model(tmp_path, tokenizer).encode("the dog") == load_model(saved).encode("the dog")
    # A broken tokenizer of its own does not matter if another is given.
    (tmp_path / "tokenizer.json").write_text("{")
    assert load_model(tmp_path, saved).encode("the dog")
    with pytest.raises(ModelError, match="cannot load"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="cannot load"):
        load_model(saved, tmp_path)


def test_bfloat16(saved: Path) -> None:
    model = load_model(saved, dtype="bfloat16")
    assert model.dtype == model.arch.up_weight(1).dtype == torch.bfloat16
    with clamp(model, layer=1, neuron=3, value=5):
        assert len(model.generate(PROMPTS, max_new_tokens=3)) == 2
    assert model.fingerprint != load_model(saved).fingerprint


def test_half_precision_checkpoint_is_float32_on_cpu(tmp_path: Path) -> None:
    tiny_hf().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu").dtype == torch.float32
    assert load_model(tmp_path, device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_meta_device() -> None:
    config = transformers.LlamaConfig(**FAMILIES["llama"][1])
    with torch.device("meta"):
        hf = transformers.LlamaForCausalLM(config)
    model = load_model(hf, tiny_tokenizer())
    assert model.device.type == "meta"
    assert model.arch.d_mlp == 24
    assert len(model.fingerprint) == 16
    with pytest.raises(ModelError, match="meta device"):
        model.arch.up_weight(0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch to cpu", "dispatch to disk"])
def test_offloaded_weights(how: str, tied: bool, tmp_path: Path) -> None:
    import accelerate

    reference = load_model(tiny_hf(tie_word_embeddings=tied), tiny_tokenizer())
    hf = tiny_hf(tie_word_embeddings=tied)
    if how == "cpu":
        accelerate.cpu_offload(hf)
    elif how == "disk":
        accelerate.disk_offload(hf, str(tmp_path))
    else:
        away = how.split()[-1]
        parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        layers = {"model.layers.0": "cpu", "model.layers.1": away, "model.layers.2": away}
        hf = accelerate.dispatch_model(
            hf, parts | layers, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
        )
    model = load_model(hf, tiny_tokenizer())
    assert model.device.type == "cpu"
    assert model.dtype == torch.float32
    for layer in range(3):
        assert torch.equal(model.arch.up_weight(layer), reference.arch.up_weight(layer))
    assert torch.equal(model.arch.head_weight(), reference.arch.head_weight())
    assert model.fingerprint == reference.fingerprint
    with clamp(model, layer=1, neuron=3, value=5.0, positions="last"):
        tokens = model.generate(PROMPTS, max_new_tokens=3)
    with clamp(reference, layer=1, neuron=3, value=5.0, positions="last"):
        assert tokens == reference.generate(PROMPTS, max_new_tokens=3)
    if how in ("cpu", "disk"):
        assert hf.model.layers[2].mlp.up_proj.weight.is_meta


# What is refused


def test_missing_folder() -> None:
    for source in ("/no/such/folder", "./nothing", "~/no-such-folder-here", "nothing", "a/b/c", "no-such-folder/"):
        with pytest.raises(ModelError, match=r"no model at|cannot be reached") as caught:
            load_model(source)
        assert "smollm2-135m-instruct" in str(caught.value)


def test_folder_without_weights_or_config(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights: expected \*.safetensors"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config.json"):
        load_model(folder)
    with pytest.raises(ModelError, match=r"is a file, but not a .gguf file"):
        load_model(folder / "tokenizer.json")


def test_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.bin\).*safetensors"):
        load_model(folder)


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:-1], whole[:4], b""):
        weights.write_bytes(part)
        with pytest.raises(ModelError, match="cannot load"):
            load_model(folder)


def test_tampered_header(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for changed in (
        b"\xff" * 8 + whole[8:],  # a header longer than the file
        whole[:8] + b"x" + whole[9:],  # no JSON
        whole.replace(b'"F32"', b'"F99"', 1),
        whole.replace(b'"shape":[16]', b'"shape":[17]', 1),
    ):
        assert changed != whole
        weights.write_bytes(changed)
        with pytest.raises(ModelError, match="cannot load"):
            load_model(folder)


def test_missing_tensors_and_wrong_shapes(folder: Path) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        save_file({key: value for key, value in tensors.items() if key != name}, weights, {"format": "pt"})
        with pytest.raises(ModelError, match=rf"lacks 1 weights.*{name}.*random"):
            load_model(folder)
    save_file(tensors | {"model.norm.weight": torch.ones(17)}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match=r"cannot load|another shape"):
        load_model(folder)


def test_sharded_index_with_a_missing_shard(tmp_path: Path) -> None:
    tiny_hf().save_pretrained(tmp_path, max_shard_size="8KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert load_model(tmp_path).arch.n_layers == 3
    shards[1].unlink()
    with pytest.raises(ModelError, match="cannot load") as caught:
        load_model(tmp_path)
    assert shards[1].name in str(caught.value)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load"):
        load_model(tmp_path)


def test_config_that_is_no_config(folder: Path) -> None:
    for text in ("", "{", "[]", "{}"):
        (folder / "config.json").write_text(text)
        with pytest.raises(ModelError):
            load_model(folder)
    change_config(folder, model_type="no-such-model")
    with pytest.raises(ModelError, match="no-such-model"):
        load_model(folder)


@pytest.mark.parametrize("model_type", ["llama", "not-in-transformers"])
def test_remote_code_does_not_run(folder: Path, model_type: str) -> None:
    marker = folder / "ran"
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
    (folder / "modeling_evil.py").write_text(code)
    names = {"AutoConfig": "modeling_evil.LlamaConfig", "AutoModelForCausalLM": "modeling_evil.LlamaForCausalLM"}
    change_config(folder, model_type=model_type, auto_map=names)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["modeling_evil.Evil", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if model_type == "llama":
        assert load_model(folder).arch.n_layers == 3
    else:
        with pytest.raises(ModelError):
            load_model(folder)
    assert not marker.exists()


def test_hub_id_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"hub cannot be reached.*load_model\('smollm2-135m-instruct'\)"):
        load_model("no-such-owner/no-such-model")


@pytest.mark.parametrize(
    ("error", "offline"),
    [
        (OSError("We couldn't connect to 'the hub' to load the files"), True),
        (ConnectionError("[Errno -2] Name or service not known"), True),
        (OSError("401 Client Error. Cannot access gated repo for url …/owner/name/resolve/main/config.json"), False),
        (OSError("owner/name is not a local folder and is not a valid model identifier"), False),
        (ValueError(""), False),
    ],
    ids=str,
)
def test_what_counts_as_offline(error: Exception, offline: bool) -> None:
    message = str(sources._explain("owner/name", error))
    assert ("cannot be reached" in message) == offline
    assert "owner/name" in message


def test_gguf(tmp_path: Path) -> None:
    pytest.importorskip("interp.gguf_checkpoint")
    with pytest.raises(InterpError, match=r"x.gguf"):
        load_model(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    with pytest.raises(InterpError, match=r"x.gguf"):
        load_model(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_name_the_tensor(value: float) -> None:
    """Also where the few tokens of the self-check never go."""
    for name in ("model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "lm_head.weight"):
        hf = tiny_hf()
        with torch.no_grad():
            hf.get_parameter(name)[-1, -1] = value
        with pytest.raises(ModelError, match=rf"NaN or infinite values in {name}"):
            load_model(hf)
        load_model(hf, check=False)


def test_overflow_is_told_apart_from_bad_weights() -> None:
    hf = tiny_hf()
    with torch.no_grad():
        hf.model.norm.weight.fill_(3e38)
        hf.lm_head.weight.fill_(10)
    with pytest.raises(ModelError, match="its weights are: it overflows"):
        load_model(hf)


def test_self_check_names_the_module() -> None:
    hf = tiny_hf()
    hf.model.layers[0].self_attn.register_forward_hook(lambda module, args, output: (output[0], output[1] * 2))
    with pytest.raises(ModelError, match=r"layer 0, self_attn: attention rows sum to 2.0000 … 2.0000"):
        load_model(hf)
    hf = tiny_hf()
    hf.config.intermediate_size = 25
    with pytest.raises(ModelError, match=r"layer 0, mlp.up_proj: site 'up' is 24 wide, expected d_mlp=25"):
        load_model(hf)
    assert hf.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())


def test_tokenizer_larger_than_the_embedding(saved: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extra"])
    with pytest.raises(ModelError, match=r"tokenizer and model disagree.*ids up to 64.*64 rows"):
        load_model(saved, tokenizer)
    assert load_model(tiny_hf(vocab_size=80), tokenizer).arch.vocab_size == 80  # a padded embedding is common


def test_device_and_dtype(saved: Path) -> None:
    for device in ("gpu", "cpu:x", "?"):
        with pytest.raises(InputError, match="unknown device"):
            load_model(saved, device=device)
    for dtype in ("float31", "int8", "Tensor", torch.int64):
        with pytest.raises(InputError, match="unknown dtype"):
            load_model(saved, dtype=dtype)
    assert load_model(saved, device=torch.device("cpu")).device.type == "cpu"


def test_cuda_asked_for_and_absent(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for source in (saved, tiny_hf()):
        with pytest.raises(InputError, match=r"'cuda' was asked for, but torch sees no CUDA GPU.*device='cpu'"):
            load_model(source, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="there are 1 CUDA GPUs"):
        load_model(saved, device="cuda:3")
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match="'mps' was asked for"):
        load_model(saved, device="mps")


# Fingerprint


def test_fingerprint_sees_one_changed_value_in_any_tensor(family: str) -> None:
    hf = tiny_hf(family)
    before = load_model(hf).fingerprint
    generator = torch.Generator().manual_seed(1)
    for name, parameter in hf.named_parameters():
        at = int(torch.randint(parameter.numel(), (1,), generator=generator))
        with torch.no_grad():
            flat = parameter.view(-1)
            old = flat[at].clone()
            flat[at] = torch.nextafter(old, old + 1)
            assert weight_hash.fingerprint(hf) != before, name
            flat[at] = old
    assert weight_hash.fingerprint(hf) == before


def test_fingerprint_sees_swapped_rows_columns_and_tensors() -> None:
    hf = tiny_hf()
    before = weight_hash.fingerprint(hf)
    first, second = (hf.model.layers[at].mlp.up_proj.weight for at in (0, 1))
    with torch.no_grad():
        for change in (
            lambda: first.copy_(first.flip(0)),
            lambda: first.copy_(first.flip(1)),
            lambda: swap(first, second),
        ):
            change()
            assert weight_hash.fingerprint(hf) != before
            change()
            assert weight_hash.fingerprint(hf) == before


def swap(first: torch.Tensor, second: torch.Tensor) -> None:
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def test_fingerprint_of_large_tensors_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny_hf()
    before = weight_hash.fingerprint(hf)
    monkeypatch.setattr(weight_hash, "_CHUNK", 50)
    assert weight_hash.fingerprint(hf) == before


def test_fingerprint_sees_the_config(saved: Path, folder: Path) -> None:
    before = load_model(saved).fingerprint
    change_config(folder, rms_norm_eps=1e-3)
    assert load_model(folder).fingerprint != before


def test_fingerprint_ignores_reloads_attention_and_place(saved: Path, tmp_path: Path) -> None:
    model = load_model(saved)
    assert load_model(saved, attention="eager").fingerprint == model.fingerprint
    assert load_model(tiny_hf()).fingerprint == model.fingerprint
    model.hf.save_pretrained(tmp_path / "again")
    assert load_model(tmp_path / "again").fingerprint == model.fingerprint
    encoder = tiny_encoder()
    before = weight_hash.fingerprint(encoder)
    encoder.save_pretrained(tmp_path / "encoder")
    assert weight_hash.fingerprint(encoder) == before == load_model(tmp_path / "encoder").fingerprint


# Text in, text out


def test_encode_and_decode(tiny: Any) -> None:
    model = tiny()
    assert model.encode(" the dog") == [[VOCAB.index("▁the"), VOCAB.index("▁dog")]]
    assert model.encode([[5, 6], "the dog"])[0] == [5, 6]
    assert model.encode(torch.tensor([[5, 6]]).tolist()) == [[5, 6]]
    assert model.decode([VOCAB.index("dog"), VOCAB.index("▁cat")]) == "dog cat"
    with pytest.raises(InputError, match="text 0 is the number 5; expected a string or a sequence of token ids"):
        model._encode_one(0, 5, False)
    with pytest.raises(InputError, match="no chat template"):
        model.encode("the dog", chat=True)


def test_chat_template(tiny: Any) -> None:
    model = tiny()
    model.tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %} ?{% endif %}"
    )
    assert model.encode(" the dog", chat=True) == model.encode(" the dog ?")
    with pytest.raises(InputError, match="text 1 is empty"):
        model.encode(["the", "  "], chat=True)


def test_generate_keeps_order_and_equals_one_at_a_time(family: str, tiny: Any) -> None:
    model = tiny(family)
    prompts = ["the dog", "a king is in the sea ?", "water music tea code", "the"]
    together = model.generate(prompts, max_new_tokens=5)
    assert together == model.generate(prompts, max_new_tokens=5, max_tokens=12)
    assert together == [model.generate(prompt, max_new_tokens=5) for prompt in prompts]


def test_generate_stops_after_the_end_token() -> None:
    hf = tiny_hf()
    plain = load_model(hf, tiny_tokenizer())
    ids = plain.generate_ids([[5, 6, 7]], max_new_tokens=6)[0]
    for end in (ids[2], [ids[2], 63]):
        hf.generation_config.eos_token_id = end
        expected = ids[: ids.index(ids[2]) + 1]
        assert plain.generate_ids([[5, 6, 7], [8, 9]], max_new_tokens=6)[0] == expected


def test_sampling_is_seeded(tiny: Any) -> None:
    model = tiny()
    options = {"max_new_tokens": 8, "temperature": 1.5}
    assert model.generate(PROMPTS, seed=3, **options) == model.generate(PROMPTS, seed=3, **options)
    texts = {tuple(model.generate(PROMPTS, seed=seed, **options)) for seed in range(6)}
    assert len(texts) > 1


def test_generate_refuses(tiny: Any) -> None:
    model = tiny()
    for prompts, options, message in (
        ("", {}, "text 0 is empty"),
        ([], {}, "no prompts"),
        ("the", {"max_new_tokens": 0}, "max_new_tokens=0"),
        ("the", {"temperature": -1.0}, "temperature=-1.0"),
        ("the " * 60, {"max_new_tokens": 10}, "exceed the context of 64"),
        ("the " * 70, {}, "context is 64 tokens"),
    ):
        with pytest.raises(InputError, match=message):
            model.generate(prompts, **options)


def test_set_seed() -> None:
    import random

    import numpy as np

    draws = []
    for _ in range(2):
        set_seed(2**40 + 5)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(1))))  # noqa: NPY002
    assert draws[0] == draws[1]


def test_attention_implementation_comes_back_after_an_error(tiny: Any) -> None:
    model = tiny()
    with pytest.raises(KeyboardInterrupt), model.attention_implementation("eager"):
        raise KeyboardInterrupt
    assert model.attention == "sdpa"


def test_pad_id(tiny: Any) -> None:
    model = tiny()
    assert model.pad_id == 0
    model.tokenizer.pad_token = None
    assert model.pad_id == 2
    model.tokenizer.eos_token = None
    assert model.pad_id == 0
