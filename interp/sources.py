"""Where a model can come from: embedded name, hub id, folder, GGUF file, or an object that is loaded already.

Every way ends in a plain Hugging Face module and a tokenizer. Remote code stays off, pickled weights are refused, weights that
are missing are an error instead of random numbers, and a failure says what to do.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interp.errors import InputError, InterpError, ModelError

DEFAULT_MODEL = "smollm2-135m-instruct"


def from_object(source: Any) -> tuple[Any, Any, str]:
    """Hugging Face module, tokenizer or `None`, and name of an object that is loaded already.

    Raises:
        InputError: it is no model.
    """
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
            tokenizer = load_tokenizer(path)
    return hf, tokenizer, Path(path).name if path else type(hf).__name__


def from_source(
    source: str,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    attention: str | None,
    with_tokenizer: bool,
) -> tuple[Any, Any, str]:
    """Model, tokenizer and name of a name, hub id, folder or file; the arguments are `interp.load_model`'s."""
    spread = str(device) == "auto"
    target = None if spread else find_device(device)
    on_cpu = target is not None and target.type == "cpu"
    wanted: Any = find_dtype(dtype) if dtype is not None else (torch.float32 if on_cpu else "auto")
    placed: dict[str, Any] = {"attn_implementation": attention, "device_map": "auto" if spread else None}
    where, name = _locate(source)
    if where.endswith(".gguf"):
        from interp.gguf_checkpoint import load_gguf

        hf, tokenizer = load_gguf(where, dtype=None if wanted == "auto" else wanted, **placed)
        return hf if target is None else hf.to(target), tokenizer, name
    try:
        hf, info = _auto_class(where).from_pretrained(
            where, dtype=wanted, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **placed
        )
    except InterpError:
        raise
    except Exception as error:
        raise _explain(source, error) from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ModelError(
            f"{source!r} lacks {len(missing)} weights of {type(hf).__name__}, or has them in another shape, for example "
            f"{missing[0]}; they would stay random, so the model is refused"
        )
    tokenizer = load_tokenizer(where) if with_tokenizer and _may_have_tokenizer(where) else None
    return hf if target is None else hf.to(target), tokenizer, name


def _locate(source: str) -> tuple[str, str]:
    """A folder, hub id or GGUF file, and the model's name."""
    from interp import resources

    path = Path(source).expanduser()
    if source in resources.RESOURCES:
        folder = resources.fetch(source)
        _refuse_pickles(folder)
        return str(folder), source
    if path.suffix == ".gguf":
        return str(path), path.name
    if path.is_dir():
        _refuse_pickles(path)
        return str(path), path.resolve().name
    if path.is_file():
        raise ModelError(f"{source!r} is a file, but not a .gguf file; give the folder that holds config.json")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        names = ", ".join(n for n, r in resources.RESOURCES.items() if r.kind == "model")
        raise ModelError(
            f"no model at {source!r}: there is no such folder or .gguf file, and it is not a hub id of the form "
            f"owner/name; embedded models: {names}"
        )
    return source, source


def _may_have_tokenizer(where: str) -> bool:
    """False for a folder without tokenizer files: it gives a model that takes token ids alone."""
    signs = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
    return not Path(where).is_dir() or any(any(Path(where).glob(sign)) for sign in signs)


def _auto_class(where: str) -> Any:
    """The class with the head that the checkpoint has: causal LM, classification, masked LM, or none."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
    )

    from interp.architectures import family_of

    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
    except Exception as error:
        raise _explain(where, error) from error
    classes = getattr(config, "architectures", None) or []
    family = family_of(config)
    if any("ForSequenceClassification" in name for name in classes):
        return AutoModelForSequenceClassification
    if family.decoder:
        return AutoModelForCausalLM
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


def load_tokenizer(source: str) -> Any:
    """A tokenizer from a folder or hub id.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise _explain(source, error) from error


def find_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; CUDA if present, else CPU, where none is.

    Raises:
        InputError: unknown, or not there.
    """
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


def find_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating-point dtype from its name.

    Raises:
        InputError: unknown.
    """
    result = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(result, torch.dtype) or not result.is_floating_point:
        raise InputError(f"unknown dtype {dtype!r}; expected 'float32', 'bfloat16' or 'float16'")
    return result
