"""Load a transformer from anywhere into a `Model`: the plain Hugging Face module with what interp needs around it.

    load_model("smollm2-135m-instruct")     the embedded default, fetched from a package registry once
    load_model("folder/")                   a local Hugging Face folder with safetensors weights
    load_model("model.gguf")                a GGUF file, dequantised
    load_model("org/name")                  a hub id
    load_model(hf_module, tokenizer)        what a user has already loaded; also a TransformerBridge or nnsight model

    Model
    ├── hf          the Hugging Face module, never rewired
    ├── tokenizer   or None: then only token ids can be given
    ├── arch        where the family keeps its parts: interp.architectures.Architecture
    └── name, device, dtype, attention, fingerprint

At load the model checks itself on a few tokens: logits are finite, the neuron site is d_mlp wide, attention rows sum to
1; a failed check names the module. Remote code stays off and pickled weights are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.architectures import Architecture, offload_hooks
from interp.batching import for_each_batch, token_batches
from interp.errors import InputError, ModelError
from interp.self_check import self_check
from interp.sources import DEFAULT_MODEL, find_device, find_dtype, from_object, from_source, load_tokenizer
from interp.weight_hash import fingerprint


@dataclass(eq=False)
class Model:
    """A Hugging Face module, its tokenizer, and where its parts are.

    Attributes:
        hf: the module, in evaluation mode.
        tokenizer: a Hugging Face tokenizer or `None`.
        arch: accessors for layers, weights and sites.
        name: where it came from, for provenance.
    """

    hf: Any
    tokenizer: Any
    name: str
    arch: Architecture = field(init=False)

    def __post_init__(self) -> None:
        self.arch = Architecture(self.hf)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the embedding's device."""
        weight: Any = self.arch.embedding().weight
        if not weight.is_meta:
            return weight.device
        targets = [getattr(hook, "execution_device", None) for hook in offload_hooks(self.arch.embedding())]
        return torch.device(next((target for target in targets if target is not None), "meta"))

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        weight: Any = self.arch.embedding().weight
        return weight.dtype

    @property
    def attention(self) -> str:
        """The attention implementation in use, e.g. "sdpa" or "eager"."""
        return str(self.arch.config._attn_implementation)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the config and with any weight (row and column checksums of every tensor)."""
        return fingerprint(self.hf)

    @property
    def pad_id(self) -> int:
        """The id written into padding: the tokenizer's pad or end token, else 0; it is always masked."""
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(self.tokenizer, name, None)
            if isinstance(value, int) and 0 <= value < self.arch.vocab_size:
                return value
        return 0

    def encode(
        self, texts: str | Sequence[str | Sequence[int]], *, chat: bool = False, length: int | None = None
    ) -> list[list[int]]:
        """Token ids of texts, checked against the context length.

        Args:
            texts: one text, or several; a sequence of ids passes through unchanged.
            chat: wrap each text as a user turn in the tokenizer's chat template, ready for the answer.
            length: cut each text to this many tokens, before it is checked against the context.

        Returns:
            One list of ids per text, special tokens as the tokenizer adds them.

        Raises:
            InputError: no tokenizer, no chat template, an empty text, a text longer than the context, an id outside
                the vocabulary.
        """
        rows = [texts] if isinstance(texts, str) else list(texts)
        encoded = [self._encode_one(row, text, chat)[:length] for row, text in enumerate(rows)]
        for row, ids in enumerate(encoded):
            if not ids:
                raise InputError(f"text {row} is empty; expected at least one token")
            limit = self.arch.n_positions
            if limit is not None and len(ids) > limit:
                raise InputError(f"text {row} has {len(ids)} tokens; the model's context is {limit} tokens: shorten it")
            if max(ids) >= self.arch.vocab_size or min(ids) < 0:
                raise InputError(
                    f"text {row} has token id {max(ids) if min(ids) >= 0 else min(ids)}, outside the model's vocabulary "
                    f"of {self.arch.vocab_size}"
                )
        return encoded

    def _encode_one(self, row: int, text: Any, chat: bool) -> list[int]:
        if isinstance(text, int):
            raise InputError(f"text {row} is the number {text}; expected a string or a sequence of token ids")
        if not isinstance(text, str):
            try:
                return [int(token) for token in text]
            except TypeError:
                raise InputError(f"text {row} is {text!r:.40}; expected a string or a sequence of token ids") from None
        if self.tokenizer is None:
            raise InputError("the model has no tokenizer; give token ids, or a tokenizer to load_model")
        if not text or (chat and not text.strip()):
            raise InputError(f"text {row} is empty; expected at least one character")
        if not chat:
            return list(self.tokenizer(text, verbose=False)["input_ids"])  # not verbose: we check the length ourselves
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(f"the tokenizer of {self.name} has no chat template; use chat=False")
        turns = [{"role": "user", "content": text}]
        # As text first: the template writes its own special tokens.
        rendered = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int] | Tensor, *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        if self.tokenizer is None:
            raise InputError("the model has no tokenizer; give one to load_model")
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    @torch.no_grad()
    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        top_p: float = 1.0,
        chat: bool = False,
        seed: int | None = None,
        max_tokens: int = 4096,
        progress: bool | str = False,
    ) -> Any:
        """Continue prompts, batched, with a KV cache; greedy unless a temperature is given.

        Args:
            prompts: one prompt or several (text or token ids).
            max_new_tokens: longest continuation in tokens; it ends earlier at the end token.
            temperature: 0 for greedy decoding, above 0 to sample.
            top_p: nucleus of the sampling.
            chat: wrap each prompt as a user turn in the chat template.
            seed: seeds torch, numpy and random before sampling.
            max_tokens: budget of padded tokens (prompt and continuation) in a batch.
            progress: a progress bar on stderr.

        Returns:
            The continuation for a single string, else a list of them, in the order given.

        Raises:
            InputError: see `encode`; also when prompt and continuation exceed the context, or the family is an encoder.
        """
        self._check_generates()
        encoded = self.encode(prompts, chat=chat)
        ids = self.generate_ids(
            encoded,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            max_tokens=max_tokens,
            progress=progress,
        )
        texts = [self.decode(row) for row in ids]
        return texts[0] if isinstance(prompts, str) else texts

    @torch.no_grad()
    def generate_ids(
        self,
        encoded: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        max_tokens: int = 4096,
        progress: bool | str = False,
    ) -> list[list[int]]:
        """As `generate`, from token ids to the continuations' token ids (end token included, padding not)."""
        self._check_generates()
        if not encoded:
            raise InputError("no prompts were given; expected at least one")
        limit, longest = self.arch.n_positions, max(len(ids) for ids in encoded)
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens}; expected at least 1")
        if temperature < 0:
            raise InputError(f"temperature={temperature}; expected 0 (greedy) or more")
        if limit is not None and longest + max_new_tokens > limit:
            raise InputError(
                f"a prompt of {longest} tokens and {max_new_tokens} new tokens exceed the context of {limit} tokens"
            )
        if seed is not None:
            set_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        settings: dict[str, Any] = sampling if temperature > 0 else {"do_sample": False, **NO_SAMPLING}
        ends = self.end_ids()
        output: list[list[int]] = [[] for _ in encoded]
        budget = max(1, max_tokens * longest // (longest + max_new_tokens))

        def step(batch: Any) -> None:
            batch = batch.to(self.device)
            rows = self.hf.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.mask.long(),
                max_new_tokens=max_new_tokens,
                pad_token_id=self.pad_id,
                **PLAIN_GENERATION,
                **settings,
            )[:, batch.input_ids.shape[1] :].tolist()
            for row, ids in zip(batch.rows, rows, strict=True):
                stop = next((at + 1 for at, token in enumerate(ids) if token in ends), len(ids))
                output[row] = ids[:stop]

        batches = token_batches(encoded, max_tokens=budget, pad_id=self.pad_id, side="left")
        for_each_batch(batches, step, progress=progress, unit="prompt")
        return output

    def _check_generates(self) -> None:
        if not self.arch.family.decoder:
            raise InputError(f"{self.name} is an encoder ({self.arch.family.name}): it cannot generate text")
        if not hasattr(self.hf, "generate"):
            raise InputError(f"{type(self.hf).__name__} cannot generate text: load the class with the LM head")

    def end_ids(self) -> set[int]:
        """Token ids that end a generation, by the checkpoint's generation config; empty where it names none."""
        ends = getattr(getattr(self.hf, "generation_config", None), "eos_token_id", None)
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)

    @contextlib.contextmanager
    def attention_implementation(self, name: str) -> Iterator[None]:
        """Switch the attention implementation ("eager", "sdpa", …) inside a `with` block."""
        before = self.attention
        if name != before:
            self.hf.set_attn_implementation(name)
        try:
            yield
        finally:
            if name != before:
                self.hf.set_attn_implementation(before)

    def head_logits(self, hidden: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
        """What final residual vectors give: final norm, then LM head; Gemma 2's soft cap on the logits is left out."""
        norm = self.arch.final_norm()
        return self.arch.lm_head()(hidden if norm is None else norm(hidden))

    def __repr__(self) -> str:
        arch = self.arch
        return (
            f"Model({self.name!r}, {arch.family.name}, {arch.n_layers} layers × {arch.d_mlp} neurons, d_model="
            f"{arch.d_model}, {arch.n_heads} heads, {arch.vocab_size} tokens, {self.dtype}, {self.device})"
        )


# Settings of `generate` for greedy decoding: with a generation config that asks for sampling, each would cause a warning.
NO_SAMPLING = {"temperature": None, "top_p": None, "top_k": None}
# Settings of `generate` against what a checkpoint's own config may ask for, and greedy decoding or plain sampling is not.
PLAIN_GENERATION = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "return_dict_in_generate": False,
    "use_cache": True,
}


def load_model(
    source: Any = DEFAULT_MODEL,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str | None = None,
    *,
    check: bool = True,
) -> Model:
    """Load a transformer, or wrap one that is loaded.

    Args:
        source: the embedded default's name, a hub id, a local folder, a `.gguf` file, a Hugging Face module, a
            TransformerBridge or an nnsight model.
        tokenizer: a tokenizer, or a folder or hub id of one; by default the one that comes with the source.
        device: "cpu", "cuda", "cuda:1", …; "auto" spreads the model over all GPUs (`device_map="auto"`). By default
            CUDA if present, else CPU; Apple's MPS only when asked for. A loaded module stays where it is.
        dtype: by default the checkpoint's own on CUDA and float32 on CPU. A loaded module keeps its own.
        attention: "sdpa", "eager", …; by default what transformers chooses. Probes that need patterns switch to
            "eager" by themselves.
        check: run the self-check on a few tokens.

    Raises:
        InputError: an unknown device or dtype, CUDA asked for and absent.
        ModelError: not found (no network included), unknown family, pickled weights, missing or damaged tensors,
            tokenizer and model that disagree, a failed self-check.

    Example:
        >>> load_model("smollm2-135m-instruct").arch.n_layers          # doctest: +SKIP
        30
    """
    if isinstance(source, (str, Path)):
        hf, own_tokenizer, name = from_source(str(source), device, dtype, attention, tokenizer is None)
    else:
        hf, own_tokenizer, name = from_object(source)
        if device is not None and str(device) != "auto":
            hf = hf.to(find_device(device))
        if dtype is not None:
            hf = hf.to(find_dtype(dtype))
        if attention is not None:
            hf.set_attn_implementation(attention)
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(str(tokenizer))
    model = Model(hf.eval(), tokenizer if tokenizer is not None else own_tokenizer, name)
    _check_tokenizer(model)
    if check:
        self_check(model)
    return model


def _check_tokenizer(model: Model) -> None:
    if model.tokenizer is None:
        return
    size = max(model.tokenizer.get_vocab().values(), default=-1) + 1
    if size > model.arch.vocab_size:
        raise ModelError(
            f"tokenizer and model disagree: the tokenizer has ids up to {size - 1}, the embedding of {model.name} has "
            f"{model.arch.vocab_size} rows; give the tokenizer that belongs to the model"
        )


def set_seed(seed: int) -> None:
    """Seed torch (all devices), numpy and random."""
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries that we call draw from the global generator
    torch.manual_seed(seed)
