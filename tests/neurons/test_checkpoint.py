"""Decoding from disk: equal to decoding the loaded model, resumable, and clear about what is wrong with a checkpoint."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import GATED, VOCAB, tiny_encoder, tiny_hf, tiny_tokenizer

import interp
from interp import architectures, shards
from interp.errors import InputError, ModelError, ResourceError, ResultError
from interp.model import load_model
from interp.neurons import checkpoint, checkpoint_files
from interp.neurons.atlas import Atlas
from interp.neurons.checkpoint import CheckpointWeights, decode_checkpoint
from interp.neurons.decoding import DecodeOptions, decode

ROOT = Path(__file__).resolve().parents[2]
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WAYS = [(site, norm) for site in ("up", "gate", "down") for norm in ("raw", "rms", "final", "folded")]


def save(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny model's checkpoint, with its tokenizer."""
    hf = tiny_hf(family, **changes).to(dtype)
    hf.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def shard(folder: Path, family: str = "llama") -> Path:
    """The same in several files with an index."""
    tiny_hf(family).save_pretrained(folder, max_shard_size=4000)
    tiny_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert (folder / INDEX).exists()
    return folder


def run(folder: Path, out: Path, *args: Any, **options: Any) -> Atlas:
    return decode_checkpoint(folder, out, *args, **{"top_k": 5, "progress": False, **options})


def loaded(folder: Path) -> Any:
    # Given the tokenizer: for some families transformers builds its own decoder around a saved vocabulary.
    return load_model(folder, tiny_tokenizer(), device="cpu", check=False)


def same(ours: Atlas, theirs: Atlas) -> None:
    """Equal values, ids and texts; the order of summation may differ in memory that is laid out differently."""
    a, b = (atlas.frame.astype({"token": str}) for atlas in (ours, theirs))
    pd.testing.assert_frame_equal(a, b, rtol=1e-4, atol=1e-6)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]) -> None:
    tensors = load_file(folder / SINGLE)
    changed = change(tensors)
    # Each with memory of its own, as safetensors wants it.
    save_file({name: t.clone().contiguous() for name, t in (changed or tensors).items()}, folder / SINGLE)


def edit_header(folder: Path, change: Callable[[Any], Any], pad: int = 0) -> None:
    raw = (folder / SINGLE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps(change(header) or header).encode() + b" " * pad
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return save(tmp_path_factory.mktemp("checkpoints") / "tiny-llama")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """To be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# Equal to the loaded model


@pytest.mark.parametrize("files", ["single", "sharded"])
def test_equals_decode_of_the_loaded_model(family: str, files: str, tmp_path: Path) -> None:
    folder = (save if files == "single" else shard)(tmp_path / family, family)
    model = loaded(folder)
    for number, (site, norm) in enumerate(WAYS if files == "single" else WAYS[2::4]):
        out = tmp_path / str(number)
        if (site == "gate" and family not in GATED) or (site, norm) == ("down", "folded"):
            with pytest.raises(InputError, match="no gate projection" if site == "gate" else "folded"):
                run(folder, out, site, norm)
            continue
        layers = None if norm == "final" else [1]
        ours = run(folder, out, site, norm, layers=layers)
        same(ours, decode(model, site, norm, top_k=5, layers=layers, progress=False))
        assert set(ours.frame["token"]) <= {word.replace("▁", " ") for word in VOCAB}


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(tmp_path / "half", family, dtype)
    model = loaded(folder)
    for site in ("up", "down"):
        ours = run(folder, tmp_path / site, site)
        same(ours, decode(model, site, top_k=5, progress=False))
        assert ours.provenance.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stated", [True, False])
def test_tied_and_untied_heads(family: str, tied: bool, stated: bool, tmp_path: Path, out: Path) -> None:
    folder = save(tmp_path / "heads", family, tie_word_embeddings=tied)
    expected = decode(loaded(folder), top_k=5, progress=False)
    if not stated:
        edit_config(folder, lambda config: config.pop("tie_word_embeddings"))
        if tied and family in (
            "llama",
            "gpt_neox",
        ):  # not tied where the config does not say so: load_model refuses too
            with pytest.raises(ModelError, match="does not tie it to the embedding"):
                run(folder, out)
            return
    same(run(folder, out), expected)


def test_a_head_in_the_file_counts_though_the_config_ties_it(tmp_path: Path, out: Path) -> None:
    folder = save(tmp_path / "both", tie_word_embeddings=True)
    edit_tensors(folder, lambda tensors: {**tensors, "lm_head.weight": torch.randn(64, 16)})
    same(run(folder, out), decode(loaded(folder), top_k=5, progress=False))


def test_unstated_ties_follow_transformers() -> None:
    from transformers import AutoConfig

    for model_type, family in architectures.FAMILIES.items():
        if family.decoder:
            default = AutoConfig.for_model(model_type).tie_word_embeddings
            assert default == (model_type in checkpoint._TIED), model_type


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_biases(family: str, tmp_path: Path, out: Path) -> None:
    folder = save(tmp_path / "biases", family)
    model = loaded(folder)
    same(run(folder, out, bias=True), decode(model, top_k=5, bias=True, progress=False))


@pytest.mark.parametrize(
    "options",
    [
        {"layers": [2, 0]},
        {"layers": [-1]},
        {"sample": 5, "seed": 3},
        {"sample": 5, "site": "down"},
        {"sample": 99},
        {"shuffle": True, "seed": 3},
        {"signs": (-1,), "top_k": 64},
        {"memory_budget": 1},
    ],
)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_options_mean_what_they_mean_in_decode(family: str, options: dict[str, Any], tmp_path: Path, out: Path) -> None:
    folder = save(tmp_path / "options", family)
    options = {"top_k": 5, "progress": False, **options}
    model = loaded(folder)
    same(decode_checkpoint(folder, out, **options), decode(model, **options))


# Names that checkpoints of other ages and kinds use


def renamed(folder: Path, rename: Callable[[str], str], more: dict[str, torch.Tensor] | None = None) -> None:
    edit_tensors(folder, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()} | (more or {}))


def test_original_gpt2_has_no_prefix_and_states_no_tie(tmp_path: Path, out: Path) -> None:
    folder = save(tmp_path / "gpt2", "gpt2")
    expected = decode(loaded(folder), "up", "folded", top_k=5, progress=False)
    mask = torch.ones(1, 1, 64, 64).tril()
    renamed(folder, lambda name: name.removeprefix("transformer."), {"h.0.attn.bias": mask})
    edit_config(folder, lambda config: config.pop("tie_word_embeddings", None))
    assert "h.0.mlp.c_fc.weight" in load_file(folder / SINGLE)
    same(run(folder, out, "up", "folded"), expected)


@pytest.mark.parametrize("head", ["embed_out", "lm_head"])
@pytest.mark.parametrize("prefix", ["gpt_neox.", ""])
def test_gpt_neox_names_and_buffers(head: str, prefix: str, tmp_path: Path, out: Path) -> None:
    folder = save(tmp_path / "neox", "gpt_neox")
    expected = decode(loaded(folder), top_k=5, progress=False)
    buffers = {f"{prefix}layers.0.attention.bias": torch.ones(1, 1, 8, 8).tril().bool()}  # of a dtype never decoded
    buffers[f"{prefix}layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    renamed(folder, lambda name: name.replace("embed_out", head).replace("gpt_neox.", prefix), buffers)
    same(run(folder, out), expected)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize("tied", [True, False])
def test_the_language_part_of_a_multimodal_checkpoint(prefix: str, tied: bool, tmp_path: Path, out: Path) -> None:
    folder = save(tmp_path / "gemma3", "gemma3", tie_word_embeddings=tied)
    expected = decode(loaded(folder), "gate", "folded", top_k=5, progress=False)
    head = "language_model.lm_head" if prefix.startswith("language") else "lm_head"
    vision = {
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(8, 8),
        "vision_tower.vision_model.encoder.layers.0.mlp.up_proj.weight": torch.zeros(8, 8),
    }

    def rename(name: str) -> str:
        return name.replace("lm_head", head) if name.startswith("lm_head") else prefix + name.removeprefix("model.")

    renamed(folder, rename, vision)
    text = json.loads((folder / "config.json").read_text())
    nested = {"model_type": "gemma3", "text_config": text, "vision_config": {"num_hidden_layers": 1}}
    for tie in ("top", "text", "unstated") if tied else ("top",):
        text.pop("tie_word_embeddings", None)
        if tie == "text":
            text["tie_word_embeddings"] = tied
        (folder / "config.json").write_text(
            json.dumps(nested | ({"tie_word_embeddings": tied} if tie == "top" else {}))
        )
        same(run(folder, out / tie, "gate", "folded"), expected)


def test_a_registered_family(copy: Path, out: Path) -> None:
    expected = decode(loaded(copy), "up", "folded", top_k=5, progress=False)
    paths = {"model.layers": "body.blocks", "model.norm": "last_norm", "lm_head": "unembed.matrix"}
    paths |= {"mlp.": "feed.", "post_attention_layernorm": "feed_norm"}

    def rename(name: str) -> str:
        for old, new in paths.items():
            name = name.replace(old, new)
        return name

    renamed(copy, rename)
    edit_config(copy, lambda config: config.update(model_type="mine"))
    family = architectures.Family(
        "Mine",
        ("mine",),
        layers=("body.blocks",),
        final_norm=("last_norm",),
        head=("unembed.matrix",),
        up="feed.up_proj",
        gate="feed.gate_proj",
        down="feed.down_proj",
        pre_mlp_norm="feed_norm",
    )
    architectures.register(family)
    try:
        same(run(copy, out, "up", "folded"), expected)
    finally:
        architectures.FAMILIES.pop("mine")


def test_tensors_at_odd_bytes(copy: Path, llama: Path, out: Path) -> None:
    edit_header(copy, lambda header: None, pad=3)
    assert run(copy, out).frame.equals(run(llama, out.with_name("plain")).frame)


def test_one_file_comes_before_an_index_as_in_transformers(copy: Path, llama: Path, out: Path) -> None:
    (copy / INDEX).write_text(json.dumps({"weight_map": {"x": "lost.safetensors"}}))
    assert run(copy, out).frame.equals(run(llama, out.with_name("plain")).frame)


def test_without_a_tokenizer(copy: Path, out: Path) -> None:
    (copy / "tokenizer.json").unlink()
    atlas = run(copy, out)
    assert set(atlas.frame["token"]) == {""}
    assert atlas.attachments == {}


# Reads what it needs, and no more


def test_reads_only_what_it_needs(llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()
    memmap = checkpoint_files.TensorFile._memmap
    monkeypatch.setattr(checkpoint_files.TensorFile, "_memmap", lambda self: names.add(self.name) or memmap(self))
    run(llama, out, layers=[1])
    projections = {f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "down")}
    assert names == {"lm_head.weight", "model.norm.weight"} | projections


def test_nothing_else_need_be_finite(copy: Path, llama: Path, out: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"):
            tensors[name][:] = float("nan")
        tensors["model.layers.1.mlp.gate_proj.weight"][3] = float("nan")

    edit_tensors(copy, spoil)
    assert run(copy, out).frame.equals(run(llama, out.with_name("plain")).frame)


MEMORY = """
import sys
from pathlib import Path
import torch
from interp.neurons.checkpoint import decode_checkpoint

def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

torch.set_num_threads(1)
Path("/proc/self/clear_refs").write_text("5")
before = kib("VmRSS")
decode_checkpoint(sys.argv[1], sys.argv[2], sample=2, progress=False)
print((kib("VmHWM") - before) // 1024, sorted({"transformers", "accelerate"} & sys.modules.keys()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_the_lm_head_is_never_in_memory_as_a_whole_and_no_model_library_is_imported(tmp_path: Path, out: Path) -> None:
    d_model, vocab, folder = 1024, 262_144, tmp_path / "large"
    shapes = {
        "lm_head.weight": (vocab, d_model),  # 512 MiB
        "model.embed_tokens.weight": (vocab, d_model),  # 512 MiB that nobody needs
        "model.layers.0.mlp.down_proj.weight": (d_model, 32_768),  # 64 MiB, of which two columns are needed
        "model.layers.0.mlp.up_proj.weight": (32_768, d_model),
        "model.norm.weight": (d_model,),
    }
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / SINGLE, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # zeros that take no room on the disk
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    done = child(MEMORY, folder, out)
    said, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    extra, imported = said.split(maxsplit=1)
    assert imported.strip() == "[]"
    # Most of it is the compiler.
    assert 32 <= int(extra) <= 128 + 112


# Interruptions, and several at once

CHILD = """
import sys, time
import torch
from interp import shards
from interp.neurons.checkpoint import decode_checkpoint

torch.set_num_threads(1)
folder, out, mode = sys.argv[1:]
write, calls = shards.write_parquet, 0

def slow(file, rows, header):
    global calls
    calls += 1
    if mode == "stop" and calls == 3:
        file.write(b"half a shard")
        file.flush()
        print("ready", flush=True)
        time.sleep(600)
    time.sleep(0.1)
    write(file, rows, header)

shards.write_parquet = slow
if mode == "together":
    print("ready", flush=True)
    sys.stdin.readline()
decode_checkpoint(folder, out, top_k=5, progress=False)
"""


def child(code: str, *arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes)  # type: ignore[call-overload]


def written(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.parquet"))}


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}


def test_resumes_after_a_kill(llama: Path, tmp_path: Path) -> None:
    whole = run(llama, tmp_path / "whole")
    out = tmp_path / "killed"
    process = child(CHILD, llama, out, "stop")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = times(out)
    assert len(before) == 2
    assert len(list(out.glob(".*.tmp"))) == 1
    with pytest.raises(ResultError, match="unfinished"):
        interp.load_result(out)
    resumed = run(llama, out)
    assert resumed.frame.equals(whole.frame)
    assert written(out) == written(tmp_path / "whole")
    assert len(written(out)) == 3
    assert {name: times(out)[name] for name in before} == before
    assert not list(out.glob(".*.tmp"))


def test_two_processes_on_one_folder(llama: Path, tmp_path: Path) -> None:
    whole, out = run(llama, tmp_path / "whole"), tmp_path / "both"
    processes = [child(CHILD, llama, out, "together") for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    result = interp.load_result(out)
    assert isinstance(result, Atlas)
    assert result.frame.equals(whole.frame)
    assert written(out) == written(tmp_path / "whole")


def test_the_folder_loads_as_an_atlas(llama: Path, out: Path) -> None:
    atlas = run(llama, out)
    result = interp.load_result(out)
    assert isinstance(result, Atlas)
    assert result.frame.equals(atlas.frame)
    assert result.attachments.keys() == {"tokenizer"}
    assert result.find(" water", top=3).equals(atlas.find(" water", top=3))
    assert result.provenance.model == "tiny-llama"
    assert result.provenance.parameters["d_mlp"] == 24
    assert str(llama.parent) not in json.dumps(result.provenance.to_json())


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_shard_is_made_again_and_no_other(damage: str, llama: Path, out: Path, monkeypatch: Any) -> None:
    atlas = run(llama, out)
    content, before = written(out), times(out)
    path = sorted(out.glob("*.parquet"))[1]
    raw = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        raw[200] ^= 0xFF
        path.write_bytes(raw[: len(raw) // 2] if damage == "truncate" else raw)
    layers: list[int] = []
    original = checkpoint.decode_layer
    monkeypatch.setattr(
        checkpoint, "decode_layer", lambda w, h, layer, *r: layers.append(layer) or original(w, h, layer, *r)
    )
    assert run(llama, out).frame.equals(atlas.frame)
    assert layers == [1]
    assert written(out) == content
    assert {name for name in before if times(out)[name] != before[name]} == {path.name}


def test_a_finished_run_reads_no_weights(llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atlas = run(llama, out)
    monkeypatch.setattr(CheckpointWeights, "head", lambda self: pytest.fail("the LM head was read"))
    assert run(llama, out).frame.equals(atlas.frame)


@pytest.mark.parametrize("first_call", [1, 3, 7])
def test_a_full_disk_leaves_nothing_half_written(first_call: int, llama: Path, out: Path) -> None:
    """The manifest, the tokenizer and the second shard do not get on the disk (each file's flush is followed by its folder's)."""
    calls, fsync = 0, os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= first_call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("interp.atomic.os.fsync", full)
        with pytest.raises(ResourceError, match="No space left"):
            run(llama, out)
    assert not list(out.glob(".*.tmp"))
    assert len(written(out)) == (1 if first_call == 7 else 0)
    assert run(llama, out).frame.equals(run(llama, out.with_name("whole")).frame)
    assert written(out) == written(out.with_name("whole"))


def test_a_disk_that_fills_while_a_shard_is_written(llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = shards.write_parquet, 0

    def full(file: Any, rows: Any, header: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            file.write(b"half a shard")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, rows, header)

    monkeypatch.setattr(shards, "write_parquet", full)
    with pytest.raises(ResourceError, match="No space left"):
        run(llama, out)
    assert len(written(out)) == 1
    assert not list(out.glob(".*.tmp"))
    assert len(run(llama, out).neurons) == 3 * 24 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "rms"}, "norm is 'final' there and 'rms' here"),
        ({"site": "gate"}, "site is 'up' there and 'gate' here"),
        ({"top_k": 6}, "top_k is 5 there and 6 here"),
        ({"layers": [0]}, "units"),
        ({"seed": 1}, "seed"),
    ],
)
def test_another_run_in_the_folder(change: dict[str, Any], message: str, llama: Path, out: Path) -> None:
    run(llama, out)
    with pytest.raises(ResultError, match=message):
        run(llama, out, **change)


def test_another_model_in_the_folder(llama: Path, copy: Path, out: Path) -> None:
    run(llama, out)
    edit_tensors(copy, lambda tensors: tensors | {UP: 2 * tensors[UP]})
    with pytest.raises(ResultError, match="fingerprint"):
        run(copy, out)


def test_outputs_that_cannot_be_used(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="not of a sharded run"):
        run(llama, llama)
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        with pytest.raises(ResourceError):
            run(llama, out)


def test_progress(llama: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(llama, out)
    assert capsys.readouterr() == ("", "")
    run(llama, out.with_name("shown"), progress=True)
    run(llama, out.with_name("named"), progress="my bar")
    said = capsys.readouterr()
    assert said.out == ""
    assert "decode up of tiny-llama" in said.err
    assert "my bar" in said.err


# What is wrong with a checkpoint


def entry(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(changes)


UP = "model.layers.1.mlp.up_proj.weight"


def put(name: str, value: float) -> Callable[[Path], None]:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return lambda folder: edit_tensors(folder, spoil)


def shifted(header: dict[str, Any]) -> dict[str, Any]:
    """Every tensor four bytes later: a gap before the first."""
    return {
        name: value if name == "__metadata__" else value | {"data_offsets": [at + 4 for at in value["data_offsets"]]}
        for name, value in header.items()
    }


def cut(folder: Path, size: int) -> None:
    raw = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(raw[:size])


def to_dtype(name: str, dtype: torch.dtype) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors | {name: tensors[name].to(dtype)})


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(
        folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}
    )


def reshaped(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors | {name: torch.ones(shape)})


def pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda config: config.update(changes))


def bad_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["one more"] = 64
    path.write_text(json.dumps(tokenizer))


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no config.json"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
    "config is no text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), "is damaged"),
    "config is a list": (
        lambda folder: (folder / "config.json").write_text("[1]"),
        "is damaged: expected a JSON object",
    ),
    "config is deep": (lambda folder: (folder / "config.json").write_text("[" * 200_000), "is damaged"),
    "encoder": (configured(model_type="bert"), "is an encoder"),
    "mixture": (configured(model_type="mixtral", num_local_experts=8), "mixture of 8 experts"),
    "unknown family": (configured(model_type="mamba"), "unknown model_type 'mamba'"),
    "no family": (lambda folder: edit_config(folder, lambda c: c.pop("model_type")), "unknown model_type None"),
    "another family": (configured(model_type="gpt2"), r"no tensors named like transformer.h.0.mlp.c_fc.weight"),
    "layers as text": (configured(num_hidden_layers="3"), "states '3' layers"),
    "too many layers": (configured(num_hidden_layers=10**15), "no tensor model.layers.3.mlp.up_proj.weight"),
    "no weights": (lambda folder: (folder / SINGLE).unlink(), "has neither model.safetensors nor"),
    "pickled": (pickled, "pytorch_model.bin is pickled, which can run code"),
    "empty file": (lambda folder: cut(folder, 0), "truncated or not a safetensors file"),
    "cut in the length": (lambda folder: cut(folder, 5), "truncated or not a safetensors file"),
    "cut in the header": (lambda folder: cut(folder, 100), "truncated or not a safetensors file"),
    "cut in the tensors": (lambda folder: cut(folder, -1), "truncated"),
    "longer than its tensors": (lambda folder: (folder / SINGLE).open("ab").write(b"1"), "truncated or damaged"),
    "header beyond the file": (
        lambda folder: (folder / SINGLE).write_bytes((2**63).to_bytes(8, "little") + b"{}"),
        "truncated or not a safetensors file: 10 bytes, header of 9223372036854775808",
    ),
    "header is no JSON": (
        lambda folder: (folder / SINGLE).write_bytes((2).to_bytes(8, "little") + b"{["),
        "header of model.safetensors is damaged",
    ),
    "header is a list": (lambda folder: edit_header(folder, lambda header: [1]), "header of .* is damaged"),
    "tensor is a list": (lambda f: edit_header(f, lambda header: header.update({UP: [1]})), "header of .* is damaged"),
    "no dtype": (lambda f: edit_header(f, lambda header: header[UP].pop("dtype") and None), "header of .* is damaged"),
    "shape of other size": (lambda f: edit_header(f, entry(UP, shape=[25, 16])), rf"{UP} has shape \(25, 16\)"),
    "negative sizes": (lambda f: edit_header(f, entry(UP, shape=[-24, -16])), rf"{UP} has shape \(-24, -16\)"),
    "sizes that overflow": (lambda f: edit_header(f, entry(UP, shape=[2**63, 2, 384])), f"{UP} has shape"),
    "fractional sizes": (lambda f: edit_header(f, entry(UP, shape=[24.0, 16.0])), f"{UP} has shape"),
    "sizes as text": (lambda f: edit_header(f, entry(UP, shape="88")), f"{UP} has shape"),
    "overlap": (lambda f: edit_header(f, entry(UP, data_offsets=[4, 4 + 24 * 16 * 4])), "is damaged"),
    "negative offset": (lambda f: edit_header(f, entry(UP, data_offsets=[-8, 24 * 16 * 4 - 8])), "is damaged"),
    "backward offsets": (lambda f: edit_header(f, entry(UP, data_offsets=[8, 0])), "is damaged"),
    "three offsets": (lambda f: edit_header(f, entry(UP, data_offsets=[0, 1, 2])), "is damaged"),
    "gap": (lambda f: edit_header(f, shifted), "is damaged"),
    "no up": (without(UP), f"no tensor {UP}"),
    "no down": (without("model.layers.2.mlp.down_proj.weight"), "no tensor model.layers.2.mlp.down_proj.weight"),
    "no layers": (without(*(f"model.layers.{n}.mlp.up_proj.weight" for n in range(3))), "no tensors named like"),
    "no final norm": (without("model.norm.weight"), "no tensor model.norm.weight"),
    "no head": (without("lm_head.weight"), "no lm_head.weight, and config.json does not tie it"),
    "two sets of layers": (
        lambda f: edit_tensors(
            f,
            lambda t: (
                {f"{p}.{n}": v for n, v in t.items() for p in ("one", "two")} | {"lm_head.weight": t["lm_head.weight"]}
            ),
        ),
        "several sets of them",
    ),
    "float8": (to_dtype(UP, torch.float8_e4m3fn), rf"{UP} is stored as F8_E4M3; expected F32, F16, BF16, F64"),
    "int8": (to_dtype("lm_head.weight", torch.int8), "lm_head.weight is stored as I8"),
    "int8 norm": (to_dtype("model.norm.weight", torch.int8), "model.norm.weight is stored as I8"),
    "flat up": (reshaped(UP, 24 * 16), rf"{UP} has shape \(384,\), expected"),
    "a layer of its own width": (reshaped(UP, 25, 16), rf"{UP} has shape \(25, 16\), expected \(24, 16\)"),
    "down of another width": (reshaped("model.layers.0.mlp.down_proj.weight", 16, 25), r"expected \(16, 24\)"),
    "norm of another width": (
        reshaped("model.norm.weight", 15),
        r"model.norm.weight has shape \(15,\), expected \(16,\)",
    ),
    "head of another width": (reshaped("lm_head.weight", 64, 17), r"up_proj.weight has shape .* expected \(24, 17\)"),
    "flat head": (reshaped("lm_head.weight", 64), r"lm_head.weight has shape \(64,\), expected"),
    "empty head": (reshaped("lm_head.weight", 0, 16), r"lm_head.weight has shape \(0, 16\), expected"),
    "NaN in up": (put(UP, float("nan")), f"{UP}: 1 of .* NaN or infinite"),
    "infinite down": (put("model.layers.2.mlp.down_proj.weight", float("inf")), "layers.2.mlp.down_proj.weight: 1 of"),
    "NaN in the final norm": (put("model.norm.weight", float("nan")), "model.norm.weight: 1 of"),
    "NaN in the head": (put("lm_head.weight", float("nan")), "lm_head.weight: 1 of"),
    "tokenizer damaged": (
        lambda f: (f / "tokenizer.json").write_text('{"model":'),
        "tokenizer.json is not a tokenizer",
    ),
    "tokenizer too large": (bad_tokenizer, "tokenizer and model disagree: tokenizer.json has ids up to 64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case: str, copy: Path, out: Path) -> None:
    damage, message = WRONG[case]
    damage(copy)
    with pytest.raises(ModelError, match=message):
        run(copy, out)
    assert not list(out.glob(".*.tmp"))
    if "NaN" not in case and "infinite" not in case:
        assert not out.exists()  # found before anything was written


def test_a_missing_pre_mlp_norm_is_found_before_anything_is_written(copy: Path, out: Path) -> None:
    without("model.layers.2.post_attention_layernorm.weight")(copy)
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.2\.post_attention_layernorm"):
        run(copy, out, norm="folded")
    assert not out.exists()
    assert len(run(copy, out, norm="final").frame)


def index_with(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return edit


WRONG_INDEX: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no JSON": (lambda folder: (folder / INDEX).write_text("{"), "index.json is damaged"),
    "a list": (lambda folder: (folder / INDEX).write_text("[]"), "index.json is damaged"),
    "no map": (lambda folder: (folder / INDEX).write_text("{}"), "no weight_map"),
    "a list as map": (lambda folder: (folder / INDEX).write_text('{"weight_map": []}'), "no weight_map"),
    "a number as file": (index_with(lambda m: m.update(x=3)), "no weight_map"),
    "an empty map": (lambda folder: (folder / INDEX).write_text('{"weight_map": {}}'), "no tensors named like"),
    "a missing file": (lambda folder: next(folder.glob("*2-of*")).unlink(), r"lacks model-.*, which .* lists"),
    "a missing tensor": (index_with(lambda m: m.update(x=m[UP])), "lists x in model-.*, which lacks it"),
    "a tensor in another file": (index_with(lambda m: m.update({UP: m["lm_head.weight"]})), f"lists {UP} in"),
    "the folder above": (index_with(lambda m: m.update(x="../x.safetensors")), "'../x.safetensors', which is outside"),
    "just above": (index_with(lambda m: m.update(x="..")), r"'..', which is outside"),
    "an absolute path": (index_with(lambda m: m.update(x="/x.safetensors")), "'/x.safetensors', which is outside"),
    "this folder": (index_with(lambda m: m.update(x=".")), "index.json names '.'|lacks ., which"),
    "no name": (index_with(lambda m: m.update(x="")), "index.json names ''|lacks , which"),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    folder = shard(tmp_path_factory.mktemp("sharded") / "tiny")
    (folder.parent / "x.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


@pytest.mark.parametrize("case", WRONG_INDEX)
def test_what_is_wrong_with_an_index_is_said(case: str, sharded: Path, tmp_path: Path, out: Path) -> None:
    folder = Path(shutil.copytree(sharded.parent, tmp_path / "copy")) / sharded.name
    damage, message = WRONG_INDEX[case]
    damage(folder)
    with pytest.raises(ModelError, match=message):
        run(folder, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [3]}, r"layer 3 is out of range: the checkpoint has 3 layers \(0 … 2\)"),
        ({"layers": [-4]}, "layer -4 is out of range"),
        ({"layers": [2, -1]}, "names a layer twice"),
        ({"layers": []}, "no layers"),
        ({"site": "hidden"}, "site 'hidden'"),
        ({"norm": "l2"}, "norm='l2'"),
        ({"signs": (1, 1)}, "signs"),
        ({"top_k": 65}, "top_k=65"),
        ({"sample": 0}, "sample=0"),
        ({"device": "cuda:7"}, "device 'cuda:7' cannot be used here"),
        ({"device": "toaster"}, "device 'toaster' cannot be used here"),
    ],
)
def test_bad_options(change: dict[str, Any], message: str, llama: Path, out: Path) -> None:
    with pytest.raises(InputError, match=message):
        run(llama, out, **change)
    assert not out.exists()


def test_an_encoders_checkpoint(tmp_path: Path, out: Path) -> None:
    tiny_encoder().save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="is an encoder"):
        run(tmp_path / "bert", out)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4),
    keep=st.floats(0, 1) | st.just(1),
)
def test_any_damage_to_a_header_is_a_model_error_or_harmless(copy: Path, llama: Path, flips: Any, keep: float) -> None:
    raw = bytearray((llama / SINGLE).read_bytes())
    length = 8 + int.from_bytes(raw[:8], "little")
    for at, bits in flips:
        raw[int(at * (length - 1))] ^= bits
    (copy / SINGLE).write_bytes(raw[: int(keep * len(raw))])
    try:
        weights = CheckpointWeights(copy, torch.device("cpu"))
        weights.require(DecodeOptions(norm="folded"), range(weights.n_layers))
    except ModelError:
        return
    assert weights.rows("up", 0, slice(0, 2)).shape == (2, 16)
    assert weights.fingerprint
