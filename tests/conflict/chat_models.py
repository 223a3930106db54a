"""A tokenizer of bytes with a chat template, and tiny random models that speak it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_models import tiny_hf

SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]


def chat_tokenizer(template: str | None = "chatml") -> Any:
    """One token per byte of UTF-8 and one per mark of a turn; `template`: a name of TEMPLATES, a Jinja template, or none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from interp.conflict.dialogues import TEMPLATES

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: at for at, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = TEMPLATES.get(template or "", template)
    return fast


def save_chat_model(path: Path, template: str | None = "chatml") -> Path:
    """A tiny random Llama that reads bytes, and its tokenizer, as a folder; context of 4,096 tokens."""
    tiny_hf("llama", vocab_size=260, max_position_embeddings=4096).save_pretrained(path)
    chat_tokenizer(template).save_pretrained(path)
    return path


def chat_tiny(family: str = "llama", template: str | None = "chatml", seed: int = 0, **changes: Any) -> Any:
    """A fresh tiny random model of a family that reads bytes, wrapped by load_model; context of 1,024 tokens."""
    from interp.model import load_model

    sizes = {"vocab_size": 260, "max_position_embeddings": 1024}
    if family == "gpt2":
        sizes = {"vocab_size": 260, "n_positions": 1024}
    return load_model(tiny_hf(family, seed, **{**sizes, **changes}), chat_tokenizer(template))
