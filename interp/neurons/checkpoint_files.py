"""A folder's safetensors files and config.json, read without a model library: headers checked, tensors mapped in parts.

The files are checked before anything is read from them: all are there, and their tensors fill them without gaps or overlaps.
What is mapped leaves memory together with the tensor that was given, so that a file may be much larger than memory.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.errors import ModelError

_MAPPED = 16 * 2**20  # bytes of a projection that are mapped at a time, where its columns are read
_DTYPES: dict[str, tuple[torch.dtype, Any]] = {
    "F32": (torch.float32, np.float32),
    "F16": (torch.float16, np.float16),
    "BF16": (torch.bfloat16, np.int16),
    "F64": (torch.float64, np.float64),
}


@dataclass(frozen=True)
class TensorFile:
    """One tensor's place in a safetensors file."""

    name: str
    path: Path
    stored: str  # the format's name of the dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    size: int  # bytes

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype; a `ModelError` where it is quantised or integer."""
        if self.stored not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise ModelError(
                f"{self.name} is stored as {self.stored}; expected {known}, a checkpoint without quantisation"
            )
        return _DTYPES[self.stored][0]

    def _memmap(self) -> np.ndarray:
        # Copy-on-write: torch refuses read-only arrays, and nothing may reach the file.
        return np.memmap(self.path, dtype=_DTYPES[self.stored][1], mode="c", offset=self.offset, shape=self.shape)

    def map(self, part: slice) -> Tensor:
        """Some rows, memory-mapped; they leave memory together with the tensor."""
        return torch.from_numpy(self._memmap()[part]).view(self.dtype)

    def read(self, at: Any = ()) -> Tensor:
        """A part, copied, so that the mapping does not outlive the call."""
        return torch.from_numpy(np.array(self._memmap()[at])).view(self.dtype)

    def read_columns(self, at: slice | np.ndarray) -> Tensor:
        """Some columns, copied. They touch every page, so only a part of the rows is mapped at a time."""
        step = max(1, _MAPPED * self.shape[0] // self.size)
        return torch.cat([self.read((slice(row, row + step), at)) for row in range(0, self.shape[0], step)])


class MatrixOnDisk:
    """A matrix of which only the rows in use are in memory (see `interp.neurons.vocabulary.Matrix`)."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self.shape, self.dtype, self.device = torch.Size(file.shape), file.dtype, torch.device("cpu")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> Tensor:
        return self._file.map(part)


def read_headers(folder: Path) -> dict[str, TensorFile]:
    """Every tensor of a folder's safetensors files; a `ModelError` where they are not all there and sound."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():  # as transformers, which then ignores an index
        return _read_header(single)
    if not index.is_file():
        pickled = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
        hint = f"; {pickled[0]} is pickled, which can run code: convert it to safetensors" if pickled else ""
        raise ModelError(f"{folder} has neither {single.name} nor {index.name}{hint}")
    weight_map = _parse(index.read_bytes(), index.name).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelError(f"{index.name} is damaged: it has no weight_map of tensors and files")
    tensors: dict[str, TensorFile] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file == "..":
            raise ModelError(f"{index.name} names {file!r}, which is outside the folder")
        if not (folder / file).is_file():
            raise ModelError(f"{folder} lacks {file}, which {index.name} lists: the checkpoint is incomplete")
        tensors |= {name: at for name, at in _read_header(folder / file).items() if weight_map.get(name) == file}
    lost = next((name for name in weight_map if name not in tensors), None)
    if lost is not None:
        raise ModelError(f"{index.name} lists {lost} in {weight_map[lost]}, which lacks it: the checkpoint is damaged")
    return tensors


def _read_header(path: Path) -> dict[str, TensorFile]:
    total = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > total or length > 100_000_000:
            raise ModelError(f"{path.name} is truncated or not a safetensors file: {total} bytes, header of {length}")
        header = _parse(file.read(length), f"the header of {path.name}")
    header.pop("__metadata__", None)
    base, end, result = 8 + length, 0, {}
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            shape, stored = tuple(entry["shape"]), str(entry["dtype"])
            # The format allows neither gaps nor overlaps.
            fits = all(type(n) is int and n >= 0 for n in (*shape, begin, stop)) and begin == end <= stop
            if fits and stored in _DTYPES:
                fits = math.prod(shape) * _DTYPES[stored][0].itemsize == stop - begin
            if not fits:
                raise ValueError(f"{name} has shape {shape} at bytes {begin} … {stop}, after byte {end}")
            result[name] = TensorFile(name, path, stored, shape, base + begin, stop - begin)
            end = stop
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the header of {path.name} is damaged: {error!s:.300}") from error
    if base + end != total:
        raise ModelError(f"{path.name} is truncated or damaged: it has {total} bytes, its header says {base + end}")
    return result


def read_config(folder: Path) -> SimpleNamespace:
    """config.json, of a multimodal model the language part; a `ModelError` where it is not there or damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json: expected a folder with config.json and *.safetensors")
    config = _parse(path.read_bytes(), str(path))
    text = config.get("text_config")
    # Multimodal configs nest the language model's, but say at the top whether embeddings are tied.
    top = {key: value for key, value in config.items() if key == "tie_word_embeddings"}
    return SimpleNamespace(**({"model_type": None} | config | (text if isinstance(text, dict) else {}) | top))


def _parse(text: bytes, what: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{what} is damaged: {error}") from error
    if not isinstance(parsed, dict):
        raise ModelError(f"{what} is damaged: expected a JSON object")
    return parsed
