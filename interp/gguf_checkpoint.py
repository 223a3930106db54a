"""GGUF files: check one, load it as a plain Hugging Face model, or convert it once to a safetensors folder.

1. `check_gguf` parses the metadata and the tensor table without touching the weights, and refuses a file that is
   no GGUF, is cut short, is one part of several, or is of a version that nobody reads any more.
2. `load_gguf` lets transformers dequantise the weights, removes the traces of quantisation (so that the model saves,
   hooks and clamps like any other) and makes the tokenizer agree with the file's metadata.
3. `convert_gguf` writes that model and tokenizer as a folder that `from_pretrained` opens in a second.

Dequantised weights are what the quantised model computes with, held as floats: nothing is recovered that quantisation
lost. A folder takes 4 bytes per parameter in float32.

Format: the GGUF specification of ggml. Which text splitter a vocabulary was trained with: `llama-vocab.cpp` of
llama.cpp. transformers 5.23 knows the regular expressions of Llama 3, Qwen 2 and a few others, but falls back to
GPT-2's splitter for the families that split every digit first (SmolLM, StarCoder, Command-R), which changes the
tokens of `"x  1"` and of `" ½"`; `load_gguf` corrects that.
"""

import math
import os
import shutil
import struct
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from interp.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GGUF_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 counted in 32 bits and lived for a few weeks of 2023
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

# tokenizer.ggml.pre of the vocabularies that put every digit on its own, then split as GPT-2 does
_DIGITS_FIRST = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
# … and of those that split as GPT-2 does and nothing else
_AS_GPT2 = frozenset({"gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2", "trillion", "granite-docling", "roberta-bpe"})


@dataclass(frozen=True)
class GGUFTensor:
    """One row of the tensor table."""

    name: str
    shape: tuple[int, ...]  # in torch order, slowest dimension first
    type_name: str  # ggml's name: F32, F16, Q4_1, Q8_0, …
    offset: int  # bytes from the start of the file
    n_bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says about itself, without its weights."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]

    @property
    def architecture(self) -> str:
        """The family name in ggml's spelling: `llama`, `qwen2`, `gpt2`, …"""
        return str(self.metadata["general.architecture"])

    @property
    def n_parameters(self) -> int:
        """Weights in the file, biases and norms included."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


def check_gguf(path: str | Path) -> GGUFHeader:
    """Read the metadata and the tensor table of a GGUF file, and check that the whole file is there.

    Args:
        path: A `.gguf` file.

    Returns:
        The header; offsets and sizes are in bytes and lie inside the file.

    Raises:
        ModelError: The file is missing, is no GGUF, is truncated or damaged, is one part of a split model, or has a
            version or tensor type that cannot be read.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ModelError(f"No file at {path}. Expected a .gguf file.")
    with path.open("rb") as file:
        reader = _HeaderReader(file, path)
        magic = file.read(4)
        if magic != GGUF_MAGIC:
            raise ModelError(
                f"{path} is no GGUF file: it starts with {magic!r}, expected {GGUF_MAGIC!r}. "
                "Give a .gguf file, a folder with config.json, or a hub id."
            )
        (version,) = reader.unpack("I")
        if version not in _VERSIONS:
            hint = "it is big-endian" if version & 0xFFFF == 0 else f"its version is {version}"
            raise ModelError(f"{path} cannot be read: {hint}, expected a little-endian GGUF of version 2 or 3.")
        n_tensors, n_fields = reader.unpack("QQ")
        metadata = {}
        for _ in range(n_fields):
            key = reader.string()
            metadata[key] = reader.value(*reader.unpack("I"))
        rows = [reader.tensor_row() for _ in range(n_tensors)]
        tensors = _place_tensors(rows, file.tell(), metadata.get("general.alignment", _DEFAULT_ALIGNMENT), path)
    if "general.architecture" not in metadata:
        raise ModelError(f"{path} does not name its architecture (general.architecture), so it cannot be loaded.")
    if metadata.get("split.count", 0) > 1:
        raise ModelError(
            f"{path} is one of {metadata['split.count']} parts. Merge them first with llama.cpp's gguf-split --merge."
        )
    end = max((tensor.offset + tensor.n_bytes for tensor in tensors), default=0)
    if end > reader.size:
        raise reader.truncated(f"its tensors need {end:,} bytes")
    return GGUFHeader(path, version, metadata, tensors)


def load_gguf(
    path: str | Path, *, dtype: "torch.dtype | None" = None, **options: Any
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a GGUF file as a plain Hugging Face model and tokenizer.

    Args:
        path: A `.gguf` file of a decoder that transformers can read.
        dtype: Type of the dequantised weights; float32 if None.
        options: Passed on to `from_pretrained` of the model: `device_map`, `attn_implementation`.

    Returns:
        The model in evaluation mode, without any trace of quantisation, and its tokenizer; special token ids are the
        file's, and padding uses the end-of-text token where the file names none.

    Raises:
        ModelError: See `check_gguf`; or the architecture or tokenizer is one that transformers cannot read, or the
            file lacks weights of the model.
    """
    header = check_gguf(path)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(header.path.parent.resolve())
    try:
        with _quiet_progress_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                source,
                gguf_file=header.path.name,
                dtype=dtype or torch.float32,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=header.path.name, local_files_only=True)
    except (ValueError, NotImplementedError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"transformers cannot load {header.path} (architecture {header.architecture!r}): {error}. "
            "Give the model's original safetensors folder or hub id instead."
        ) from error
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing:
        raise ModelError(
            f"{header.path} lacks {len(missing)} weights of {type(model).__name__}, for example {missing[0]}; they "
            "would be random, so the model is refused."
        )
    _forget_quantisation(model)
    _fix_pre_tokenizer(tokenizer, header)
    _fix_special_tokens(model, tokenizer, header)
    return model.eval(), tokenizer


def convert_gguf(path: str | Path, folder: str | Path, *, dtype: "torch.dtype | None" = None) -> Path:
    """Convert a GGUF file to a folder of safetensors, tokenizer, chat template and generation settings.

    The folder appears complete or not at all.

    Args:
        path: A `.gguf` file.
        folder: The folder to make; it must not exist or be empty.
        dtype: Type of the saved weights; float32 if None.

    Returns:
        The folder.

    Raises:
        ModelError: See `load_gguf`; or the folder has files in it.
        OSError: The folder cannot be written, for instance because the disk is full.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} is already there. Give a new or empty folder for the converted model.")
    model, tokenizer = load_gguf(path, dtype=dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    try:
        with _quiet_progress_bars():
            model.save_pretrained(workspace)
            tokenizer.save_pretrained(workspace)
        workspace.chmod(0o755)  # mkdtemp makes it private
        os.replace(workspace, folder)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return folder


class _HeaderReader:
    """A position in the header that never reads past the end of the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path
        self.size = os.fstat(file.fileno()).st_size

    def truncated(self, need: str) -> ModelError:
        return ModelError(
            f"{self.path} is cut short or damaged: it has {self.size:,} bytes and {need}. Download or copy it again."
        )

    def take(self, n_bytes: int) -> bytes:
        if self.file.tell() + n_bytes > self.size:
            raise self.truncated(f"its header needs {self.file.tell() + n_bytes:,} bytes")
        return self.file.read(n_bytes)

    def unpack(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self) -> str:
        (length,) = self.unpack("Q")
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ModelError(f"{self.path} is damaged: a metadata field has type {kind}, which GGUF does not define.")
        element, length = self.unpack("IQ")
        if element not in _SCALARS:
            if length > self.size:  # an element takes 8 bytes or more, so the count itself is damaged
                raise self.truncated(f"one of its arrays claims {length:,} elements")
            return [self.value(element) for _ in range(length)]
        code = _SCALARS[element]
        return list(struct.unpack(f"<{length}{code}", self.take(length * struct.calcsize(code))))

    def tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        (n_dimensions,) = self.unpack("I")
        if n_dimensions > _MAX_DIMENSIONS:
            raise ModelError(f"{self.path} is damaged: tensor {name!r} has {n_dimensions} dimensions.")
        shape = self.unpack(f"{n_dimensions}Q")
        kind, offset = self.unpack("IQ")
        return name, tuple(reversed(shape)), kind, offset


def _place_tensors(
    rows: list[tuple[str, tuple[int, ...], int, int]], header_end: int, alignment: int, path: Path
) -> tuple[GGUFTensor, ...]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    alignment = alignment if alignment > 0 else _DEFAULT_ALIGNMENT
    data_start = -(-header_end // alignment) * alignment
    tensors = []
    for name, shape, kind, offset in rows:
        try:
            ggml_type = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        except (ValueError, KeyError) as error:
            raise ModelError(
                f"{path}: tensor {name!r} has the unknown ggml type {kind}; is gguf up to date?"
            ) from error
        n_bytes = math.prod(shape) // block * block_bytes
        tensors.append(GGUFTensor(name, shape, ggml_type.name, data_start + offset, n_bytes))
    return tuple(tensors)


def _forget_quantisation(model: Any) -> None:
    """Make a dequantised model an ordinary one; while it claims to be quantised, `save_pretrained` refuses."""
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    model.config.architectures = [type(model).__name__]  # TransformerLens asks for it


def _fix_pre_tokenizer(tokenizer: Any, header: GGUFHeader) -> None:
    """Split text as the vocabulary was trained to, where transformers fell back to GPT-2's splitter."""
    from tokenizers import pre_tokenizers

    if header.metadata.get("tokenizer.ggml.model") != "gpt2":
        return
    splitter = header.metadata.get("tokenizer.ggml.pre", "default")
    backend = tokenizer.backend_tokenizer
    if splitter in _DIGITS_FIRST:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif splitter not in _AS_GPT2 and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        warnings.warn(
            f"{header.path.name} was trained with the text splitter {splitter!r}, which is not known here: GPT-2's is "
            "used, and some tokens may differ from the original model's. Prefer its safetensors folder or hub id.",
            stacklevel=3,
        )


def _fix_special_tokens(model: Any, tokenizer: Any, header: GGUFHeader) -> None:
    """Give tokenizer and model the special token ids, the BOS habit and the context length that the file states."""
    fields = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
    for role, field in fields.items():
        token_id = header.metadata.get(f"tokenizer.ggml.{field}")
        if token_id is not None and getattr(tokenizer, f"{role}_token_id") != token_id:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token_id))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    for settings in (model.config, model.generation_config):
        for role in ("bos", "eos", "pad"):
            if getattr(settings, f"{role}_token_id", None) is None:
                setattr(settings, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
    add_bos = header.metadata.get("tokenizer.ggml.add_bos_token")
    if add_bos is not None and bool(add_bos) != bool(getattr(tokenizer, "add_bos_token", False)):
        tokenizer.add_bos_token = bool(add_bos)
    context = header.metadata.get(f"{header.architecture}.context_length")
    if context:
        tokenizer.model_max_length = int(context)


@contextmanager
def _quiet_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
