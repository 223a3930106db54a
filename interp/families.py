"""Where each family of transformers keeps its layers, projections, norms and head: one table.

A `Family` is a row of that table: dotted paths, relative to the Hugging Face module or to one of its layers. Register a family
of your own with `register`; `interp.architectures` applies a row to a loaded module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from interp.errors import InputError, ModelError


@dataclass(frozen=True)
class Family:
    """How one family names its parts.

    Attributes:
        name: the family's name in messages.
        model_types: values of `config.model_type` that belong to it.
        layers, final_norm, head, embedding: dotted paths from the module; the first that exists is used.
        attention, o_proj, up, gate, down, pre_mlp_norm: dotted paths from a layer; `None` where there is none.
        fused: gate and up are one matrix, rows `[gate; up]`; `up` and `gate` then name the same module.
        transposed: weights are stored `(in, out)` as in GPT-2's Conv1D.
        norm: "rms" or "layer".
        norm_offset: what is added to a norm's weight to give its gain (1 for Gemma).
        decoder: False for encoders such as BERT, which have attention sites and neurons but no causal LM head.
    """

    name: str
    model_types: tuple[str, ...]
    layers: tuple[str, ...] = ("model.layers", "layers")
    final_norm: tuple[str, ...] = ("model.norm", "norm")
    head: tuple[str, ...] = ("lm_head",)
    embedding: tuple[str, ...] = ("model.embed_tokens", "embed_tokens")
    attention: str = "self_attn"
    o_proj: str = "self_attn.o_proj"
    up: str = "mlp.up_proj"
    gate: str | None = "mlp.gate_proj"
    down: str = "mlp.down_proj"
    pre_mlp_norm: str | None = "post_attention_layernorm"
    fused: bool = False
    transposed: bool = False
    norm: str = "rms"
    norm_offset: float = 0.0
    decoder: bool = True


_GEMMA = {
    "pre_mlp_norm": "pre_feedforward_layernorm",
    "norm_offset": 1.0,
    "layers": ("model.layers", "model.language_model.layers", "layers", "language_model.layers"),
    "final_norm": ("model.norm", "model.language_model.norm", "norm", "language_model.norm"),
    "embedding": (
        "model.embed_tokens",
        "model.language_model.embed_tokens",
        "embed_tokens",
        "language_model.embed_tokens",
    ),
}
_BERT = {
    "layers": ("bert.encoder.layer", "roberta.encoder.layer", "electra.encoder.layer", "encoder.layer"),
    "final_norm": (),
    "head": ("cls.predictions.decoder", "lm_head.decoder"),
    "embedding": tuple(f"{p}embeddings.word_embeddings" for p in ("bert.", "roberta.", "electra.", "")),
    "attention": "attention.self",
    "o_proj": "attention.output.dense",
    "up": "intermediate.dense",
    "gate": None,
    "down": "output.dense",
    "pre_mlp_norm": None,
    "norm": "layer",
    "decoder": False,
}

FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Add a family, or replace one, for every `config.model_type` that it names.

    Args:
        family: the row to add. Paths are checked when a model of the family is loaded.

    Raises:
        InputError: `family` names no model type, or its norm is neither "rms" nor "layer".

    Example:
        >>> register(Family(name="My Llama", model_types=("my_llama",)))
        >>> FAMILIES.pop("my_llama").name
        'My Llama'
    """
    if not family.model_types:
        raise InputError(f"family {family.name!r} names no model_type; give at least one, as in config.model_type")
    if family.norm not in ("rms", "layer"):
        raise InputError(f"family {family.name!r} has norm={family.norm!r}; expected 'rms' or 'layer'")
    for model_type in family.model_types:
        FAMILIES[model_type] = family


for _family in (
    Family("Llama", ("llama",)),
    Family("Mistral", ("mistral",)),
    Family("Qwen2", ("qwen2",)),
    Family("Qwen3", ("qwen3",)),
    Family("Gemma", ("gemma",), norm_offset=1.0),
    Family("Gemma 2", ("gemma2",), **_GEMMA),  # type: ignore[arg-type]
    Family("Gemma 3", ("gemma3_text", "gemma3"), **_GEMMA),  # type: ignore[arg-type]
    # OLMo 2 normalises what attention and MLP write, not what they read.
    Family("OLMo 2", ("olmo2", "olmo3"), pre_mlp_norm=None),
    Family("Phi-3", ("phi3",), up="mlp.gate_up_proj", gate="mlp.gate_up_proj", fused=True),
    Family(
        "GPT-2",
        ("gpt2",),
        layers=("transformer.h", "h"),
        final_norm=("transformer.ln_f", "ln_f"),
        embedding=("transformer.wte", "wte"),
        attention="attn",
        o_proj="attn.c_proj",
        up="mlp.c_fc",
        gate=None,
        down="mlp.c_proj",
        pre_mlp_norm="ln_2",
        transposed=True,
        norm="layer",
    ),
    Family(
        "GPT-NeoX",
        ("gpt_neox",),
        layers=("gpt_neox.layers", "layers"),
        final_norm=("gpt_neox.final_layer_norm", "final_layer_norm"),
        head=("lm_head", "embed_out"),
        embedding=("gpt_neox.embed_in", "embed_in"),
        attention="attention",
        o_proj="attention.dense",
        up="mlp.dense_h_to_4h",
        gate=None,
        down="mlp.dense_4h_to_h",
        norm="layer",
    ),
    Family("BERT", ("bert", "roberta", "electra", "xlm-roberta"), **_BERT),  # type: ignore[arg-type]
):
    register(_family)


def family_of(config: Any) -> Family:
    """The family of a Hugging Face config.

    Raises:
        ModelError: the model is a mixture of experts, or its `model_type` is not in the table.
    """
    text = text_config(config)
    model_type = getattr(text, "model_type", None)
    for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        experts = getattr(text, name, None)
        if isinstance(experts, int) and experts > 1:
            raise ModelError(
                f"{model_type!r} is a mixture of {experts} experts ({name}={experts}): its neurons belong to experts, "
                f"which interp does not support; use a dense model"
            )
    family = FAMILIES.get(str(model_type)) or FAMILIES.get(str(getattr(config, "model_type", None)))
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(
            f"unknown model_type {model_type!r}; known: {known}. To add it: interp.architectures.register("
            f'Family(name=…, model_types=("{model_type}",), layers=(…), up=…, gate=…, down=…, …))'
        )
    return family


def text_config(config: Any) -> Any:
    """The language part of a config: itself, or what a multimodal config nests."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config
