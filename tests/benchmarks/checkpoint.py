"""Decode one layer of Llama-3.1-8B's shape from a safetensors checkpoint on disk: peak memory of the whole process.

The checkpoint is synthetic: 14,336 neurons × 4,096, vocabulary 128,256, bfloat16, untied head, one layer, no embedding or
attention (they would not be read) and no tokenizer. It is written a few megabytes at a time and removed afterwards.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.memory import MIB, measure
from tests.benchmarks.table import Row

SUITE = "neurons"
SHAPE = {"d_mlp": 14_336, "d_model": 4_096, "vocab": 128_256}
ALLOWANCE = 512 * MIB
NAME = "decode one layer of Llama-3.1-8B's shape from disk: peak memory"


def run(quick: bool) -> list[Row]:
    """One row."""
    head = SHAPE["vocab"] * SHAPE["d_model"] * 2
    limit = head + ALLOWANCE
    about: dict[str, Any] = {
        "suite": SUITE,
        "subject": "checkpoint",
        "name": NAME,
        "against": "LM head + 512 MiB",
        "target": "<= 1",
        "quick": quick,
    }
    needed = head + 3 * SHAPE["d_mlp"] * SHAPE["d_model"] * 2 + 200 * MIB
    with tempfile.TemporaryDirectory() as folder:
        free = shutil.disk_usage(folder).free
        if free < 2 * needed:
            return [Row(**about, ratio=None, note=f"{needed / MIB:,.0f} MiB of free disk are not there twice")]
        write_checkpoint(Path(folder) / "checkpoint", **SHAPE)
        sample = 1024 if quick else None
        seen = measure("checkpoint", "decode_from_disk", folder=folder, sample=sample)
    mapped, anonymous = seen["mapped"], seen["anonymous"]
    parts = f"; at the peak {mapped / MIB:,.0f} MiB of mapped files, {anonymous / MIB:,.0f} MiB own" if mapped else ""
    return [
        Row(
            **about,
            ratio=seen["process"] / limit,
            repeats=1,
            ours=seen["process"] / MIB,
            theirs=limit / MIB,
            unit="MiB",
            n=f"{sample or SHAPE['d_mlp']:,} of {SHAPE['d_mlp']:,} neurons × {SHAPE['d_model']:,}, {SHAPE['vocab']:,} tokens, "
            f"bfloat16, both signs",
            note=f"largest resident memory of the whole process, Python and torch included; the LM head has "
            f"{head / MIB:,.0f} MiB; {(seen['process'] - seen['baseline']) / MIB:,.0f} MiB above a process that only imported "
            f"decode_checkpoint ({seen['baseline'] / MIB:,.0f} MiB){parts}; took {seen['said']['seconds']:.0f} s",
            more={"above_imports_mib": (seen["process"] - seen["baseline"]) / MIB, "seconds": seen["said"]["seconds"]},
        )
    ]


def write_checkpoint(folder: Path, d_mlp: int, d_model: int, vocab: int, seed: int = 0) -> None:
    """A one-layer Llama checkpoint with random weights, written a piece at a time."""
    folder.mkdir()
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (vocab, d_model),
        "model.layers.0.mlp.down_proj.weight": (d_model, d_mlp),
        "model.layers.0.mlp.gate_proj.weight": (d_mlp, d_model),
        "model.layers.0.mlp.up_proj.weight": (d_mlp, d_model),
        "model.layers.0.post_attention_layernorm.weight": (d_model,),
        "model.norm.weight": (d_model,),
    }
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for piece in _random_bfloat16(math.prod(shape), centre=1.0 if "norm" in name else 0.0, seed=seed):
                file.write(piece)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": d_model,
        "intermediate_size": d_mlp,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def _random_bfloat16(count: int, centre: float, seed: int) -> Iterator[bytes]:
    import torch

    generator = torch.Generator().manual_seed(seed + count % 7919)
    step = 4 * MIB
    for start in range(0, count, step):
        numbers = torch.randn(min(step, count - start), generator=generator) * 0.02 + centre
        yield numbers.bfloat16().view(torch.int16).numpy().tobytes()


def decode_from_disk(folder: str, sample: int | None) -> Callable[[], dict[str, float]]:
    """For `memory`: decode_checkpoint with its default settings."""
    from interp.neurons.checkpoint import decode_checkpoint

    def call() -> dict[str, float]:
        start = time.perf_counter()
        decode_checkpoint(Path(folder) / "checkpoint", Path(folder) / "atlas", sample=sample, progress=False)
        return {"seconds": time.perf_counter() - start}

    return call
