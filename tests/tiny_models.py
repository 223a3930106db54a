"""Tiny random models of every family, and a tokenizer of whole words, built without any download."""

from __future__ import annotations

from typing import Any

import torch

WORDS = ["the", "a", "of", "is", "in", "water", "money", "music", "dog", "animal", "cat", "tea"]
WORDS += ["red", "sea", "king", "code", "sun", "old", "new", "keys"]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
VOCAB = [*SPECIAL, "dog", "Dog", "▁dogs", "▁Dog", *(f"▁{word}" for word in WORDS), "?", ".", "!", "<script>", "\x07"]
VOCAB += [f"▁w{i}" for i in range(64 - len(VOCAB))]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
COMMON = {**SIZES, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GQA = {**COMMON, "num_key_value_heads": 2}

# family: (config class, changes)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GQA),
    "mistral": ("MistralConfig", {**GQA, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", GQA),
    "qwen3": ("Qwen3Config", {**GQA, "head_dim": 4}),
    "gemma2": ("Gemma2Config", {**GQA, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {**GQA, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 4}),
    "olmo2": ("Olmo2Config", GQA),
    "phi3": ("Phi3Config", GQA),
    "gpt2": (
        "GPT2Config",
        {
            "n_embd": 16,
            "n_inner": 24,
            "n_layer": 3,
            "n_head": 4,
            "vocab_size": 64,
            "n_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", COMMON),
}
GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "phi3"}


def tiny_tokenizer() -> Any:
    """A tokenizer whose words carry their leading space, as SentencePiece's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="never")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_hf(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A fresh random causal LM of a family, with norms' weights and biases random too."""
    import transformers

    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**{**settings, **changes})
    torch.manual_seed(seed)
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in hf.named_parameters():
            # Random norms and biases, or a test could not see whether they are used.
            if "norm" in parameter_name or "ln_" in parameter_name or parameter_name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(8)
    return hf


def tiny_encoder(seed: int = 0) -> Any:
    """A fresh random BERT."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(**{**SIZES, "max_position_embeddings": 64})
    return transformers.BertModel(config).eval()
