"""Decode a safetensors checkpoint layer by layer, without ever building the model.

1. Headers of all files are read and checked: every tensor's bytes must lie within its file.
2. The family's table row (`interp.architectures`) says which tensors are needed: one layer's up, gate or down, norms, head.
3. The LM head is memory-mapped once; of everything else only the rows of the running chunk are in memory. A Llama-3.1-8B
   or 70B folder needs its LM head and a few hundred megabytes.
4. One Parquet shard per layer. After a kill the next call goes on with the missing layers, and the result is identical to
   one made without interruption; two processes on one folder do not disturb each other.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from interp.architectures import Family, family_of
from interp.errors import InputError, ModelError
from interp.neurons.atlas import ATLAS_COLUMNS, Atlas, atlas_frame
from interp.neurons.decoding import DecodeOptions, atlas_parameters, check_options, checked, decode_layer, vocabulary_of
from interp.provenance import Provenance
from interp.shards import ShardedRun

CHECKPOINT_BUDGET = 128 * 2**20
_DTYPES = {
    "F32": (torch.float32, np.float32),
    "F16": (torch.float16, np.float16),
    "BF16": (torch.bfloat16, np.int16),
    "F64": (torch.float64, np.float64),
}


def decode_checkpoint(
    folder: str | Path,
    out: str | Path,
    site: str = "up",
    norm: str = "final",
    *,
    signs: Sequence[int] = (1, -1),
    top_k: int = 10,
    bias: bool = False,
    layers: Sequence[int] | None = None,
    sample: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    device: str = "cpu",
    memory_budget: int = CHECKPOINT_BUDGET,
    progress: bool | str = True,
) -> Atlas:
    """Decode the neurons of a checkpoint on disk, streaming.

    Args:
        folder: a Hugging Face folder with config.json and *.safetensors (one file, or several with an index).
        out: the folder for the shards; made if absent, resumed if it holds part of the same run.
        site, norm, signs, top_k, bias, layers, sample, shuffle, seed: as in `interp.neurons.decoding`.
        device: where the products run.
        memory_budget: bytes of logits held at a time.
        progress: a progress bar on stderr.

    Returns:
        The `Atlas`, equal to `decode` of the loaded model. `interp.load_result(out)` reads it again.

    Raises:
        InputError: see `decode`.
        ModelError: no safetensors, a truncated or damaged file, a missing tensor, an unknown family, NaN or infinite weights.
        ResultError: `out` belongs to another run.
    """
    weights = CheckpointWeights(Path(folder).expanduser(), torch.device(device))
    options = DecodeOptions(site, norm, tuple(signs), top_k, bias, sample, shuffle, seed)
    every = range(weights.n_layers)
    chosen = list(every) if layers is None else [_layer(layer, weights.n_layers) for layer in layers]
    check_options(options, weights, weights.vocab_size, chosen)
    weights.require(site, chosen)
    tokenizer_json, tokens = weights.vocabulary()
    parameters = atlas_parameters(options, weights, chosen, weights.vocab_size)
    described = SimpleNamespace(
        name=weights.folder.name, fingerprint=weights.fingerprint, dtype=weights.dtype, attention=None, device=device
    )
    run = ShardedRun(
        out,
        kind="neurons.atlas",
        columns=ATLAS_COLUMNS,
        provenance=Provenance.collect(described, seed=seed, parameters=parameters),
        units=[f"layer-{layer:03d}" for layer in chosen],
        attachments={} if tokenizer_json is None else {"tokenizer": tokenizer_json},
    )
    missing = set(run.missing())
    todo = [layer for layer in chosen if f"layer-{layer:03d}" in missing]
    per_layer = min(weights.d_mlp, sample or weights.d_mlp)
    description = progress if isinstance(progress, str) else f"decode {site} of {weights.folder.name}"
    bar = tqdm(
        total=len(chosen) * per_layer,
        initial=(len(chosen) - len(todo)) * per_layer,
        desc=description,
        unit="neuron",
        disable=not progress,
        leave=False,
    )
    with bar:
        if todo:
            head = checked(weights.head(), weights.head_name)
        for layer in todo:
            part = decode_layer(weights, head, layer, options, memory_budget, bar)
            run.write(f"layer-{layer:03d}", atlas_frame([part], tokens))
    result = run.finish()
    assert isinstance(result, Atlas)
    return result


def _layer(layer: int, n_layers: int) -> int:
    if not -n_layers <= layer < n_layers:
        raise InputError(f"layer {layer} is out of range: the checkpoint has {n_layers} layers (0 … {n_layers - 1})")
    return layer % n_layers


class CheckpointWeights:
    """A safetensors folder as a source of weights (see `interp.neurons.decoding.Weights`)."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.config = _read_config(folder)
        self.family: Family = family_of(self.config)
        if not self.family.decoder:
            raise ModelError(
                f"{folder.name} is an encoder ({self.family.name}): it has no causal LM head to decode through"
            )
        self.tensors = read_headers(folder)
        self.prefix, self.n_layers = self._find_layers()
        self.layer_norm = self.family.norm == "layer"
        self.head_name = self._find_head()
        self.vocab_size, self.d_model = self.tensors[self.head_name].shape
        shape = self._tensor("up", 0).shape
        wide = shape[1] if self.family.transposed else shape[0]
        self.d_mlp = wide // 2 if self.family.fused else wide
        self.dtype = str(self._tensor("up", 0).dtype)

    def _find_layers(self) -> tuple[str, int]:
        """The prefix of layer tensors, such as "model.layers.", and the number of layers."""
        pattern = re.compile(rf"^((?:.*\.)?)(\d+)\.{re.escape(self.family.up)}\.weight$")
        found: dict[str, set[int]] = {}
        for name in self.tensors:
            match = pattern.match(name)
            if match:
                found.setdefault(match[1], set()).add(int(match[2]))
        known = [prefix for prefix in found if prefix.rstrip(".") in self.family.layers] or [
            prefix for prefix in found if "vision" not in prefix
        ]
        if len(known) != 1:
            raise ModelError(
                f"{self.folder} has no tensors named like {self.family.layers[0]}.0.{self.family.up}.weight, which a "
                f"{self.family.name} checkpoint has"
            )
        layers = found[known[0]]
        expected = (
            getattr(self.config, "num_hidden_layers", None) or getattr(self.config, "n_layer", None) or len(layers)
        )
        lost = sorted(set(range(expected)) - layers)
        if lost:
            raise ModelError(
                f"{self.folder} lacks {known[0]}{lost[0]}.{self.family.up}.weight: the checkpoint is incomplete"
            )
        return known[0], int(expected)

    def _beside(self, path: str) -> str:
        """A tensor that lives next to the layers, e.g. the final norm."""
        base = ".".join(self.prefix.rstrip(".").split(".")[:-1])
        last = path.split(".")[-1]
        return f"{base}.{last}" if base else last

    def _find_head(self) -> str:
        tied = getattr(self.config, "tie_word_embeddings", None)
        names = [
            name for name in self.tensors for head in self.family.head if re.search(rf"(^|\.){head}\.weight$", name)
        ]
        if names and not tied:
            return names[0]
        embedding = self._beside(self.family.embedding[0]) + ".weight"
        # Configs leave out tie_word_embeddings where it has its default, which differs between families.
        if embedding in self.tensors and tied is not False:
            return embedding
        raise ModelError(f"{self.folder} has no {self.family.head[0]}.weight: the checkpoint is incomplete")

    def _name(self, site: str, layer: int) -> str:
        path = {"up": self.family.up, "gate": self.family.gate, "down": self.family.down}[site]
        if path is None:
            raise InputError(
                f"{self.family.name} has no gate projection (its MLP is not gated); use site='up' or 'down'"
            )
        return f"{self.prefix}{layer}.{path}.weight"

    def _tensor(self, site: str, layer: int) -> TensorFile:
        name = self._name(site, layer)
        if name not in self.tensors:
            raise ModelError(f"{self.folder} has no tensor {name}: the checkpoint is incomplete")
        return self.tensors[name]

    def require(self, site: str, layers: Sequence[int]) -> None:
        """Check that every tensor a run will read is there, before it starts."""
        for layer in layers:
            for name in dict.fromkeys((site, "up", "down")):
                self._tensor(name, layer)
        self.final_norm()

    def rows(self, site: str, layer: int, neurons: slice | Tensor) -> Tensor:
        """Weights of some neurons; only these are read."""
        tensor = self._tensor(site, layer)
        at = neurons if isinstance(neurons, slice) else neurons.numpy()
        if self.family.fused and site == "up":
            at = slice(at.start + self.d_mlp, at.stop + self.d_mlp) if isinstance(at, slice) else at + self.d_mlp
        # A projection that writes has neurons along its input; Conv1D stores the transpose.
        along_columns = (site == "down") != self.family.transposed
        return tensor.read((slice(None), at)).T if along_columns else tensor.read((at,))

    def head(self) -> Tensor:
        """The LM head, memory-mapped (or on the device)."""
        return self.tensors[self.head_name].map().to(self.device)

    def head_bias(self) -> Tensor | None:
        """The LM head's bias."""
        name = self.head_name.removesuffix("weight") + "bias"
        return self.tensors[name].read(()).float() if name in self.tensors else None

    def _vector(self, name: str) -> Tensor | None:
        return self.tensors[name].read(()).float().to(self.device) if name in self.tensors else None

    def final_norm(self) -> tuple[Tensor | None, Tensor | None]:
        """Gain and bias of the final norm."""
        name = self._beside(self.family.final_norm[0])
        gain = self._vector(f"{name}.weight")
        if gain is None:
            raise ModelError(f"{self.folder} has no tensor {name}.weight: the checkpoint is incomplete")
        return gain + self.family.norm_offset, self._vector(f"{name}.bias")

    def pre_mlp_gain(self, layer: int) -> Tensor | None:
        """Gain of the norm that the MLP reads through."""
        if self.family.pre_mlp_norm is None:
            return None
        name = f"{self.prefix}{layer}.{self.family.pre_mlp_norm}.weight"
        gain = self._vector(name)
        if gain is None:
            raise ModelError(f"{self.folder} has no tensor {name}: the checkpoint is incomplete")
        return gain + self.family.norm_offset

    def vocabulary(self) -> tuple[str | None, list[str]]:
        """tokenizer.json, if the folder has one, and the text of every id."""
        path = self.folder / "tokenizer.json"
        if not path.exists():
            return None, [""] * self.vocab_size
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise ModelError(f"{path} is not a tokenizer: {error}") from error
        if tokenizer.get_vocab_size() > self.vocab_size:
            raise ModelError(
                f"tokenizer and model disagree: {path.name} has {tokenizer.get_vocab_size()} tokens, {self.head_name} "
                f"{self.vocab_size} rows"
            )
        return vocabulary_of(tokenizer, self.vocab_size)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of config, tensor layout and 12 KiB of every tensor's bytes."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
            with open(tensor.path, "rb") as file:
                for share in (0, 0.5, 1):
                    file.seek(tensor.offset + int(share * max(tensor.size - 4096, 0)))
                    digest.update(file.read(min(4096, tensor.size)))
        return digest.hexdigest()[:16]


class TensorFile:
    """One tensor's place in a safetensors file."""

    def __init__(self, path: Path, dtype: str, shape: tuple[int, ...], offset: int, size: int) -> None:
        self.path, self.shape, self.offset, self.size, self._dtype = path, shape, offset, size, dtype

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype.

        Raises:
            ModelError: a quantised or integer tensor.
        """
        if self._dtype not in _DTYPES:
            raise ModelError(
                f"a tensor in {self.path.name} has dtype {self._dtype}; expected one of {', '.join(_DTYPES)}"
            )
        return _DTYPES[self._dtype][0]

    def _memmap(self) -> np.ndarray:
        dtype = self.dtype  # says so where it is not supported
        # Copy-on-write: torch refuses read-only arrays, and nothing may reach the file.
        array = np.memmap(self.path, dtype=_DTYPES[self._dtype][1], mode="c", offset=self.offset, shape=self.shape)
        assert array.itemsize == dtype.itemsize
        return array

    def map(self) -> Tensor:
        """The whole tensor, memory-mapped."""
        return torch.from_numpy(self._memmap()).view(self.dtype)

    def read(self, at: tuple) -> Tensor:
        """A part, copied, so that the mapping does not outlive the call."""
        return torch.from_numpy(np.array(self._memmap()[at])).view(self.dtype)


def read_headers(folder: Path) -> dict[str, TensorFile]:
    """Every tensor of a folder's safetensors files, checked to lie within its file.

    Raises:
        ModelError: no safetensors, a missing shard, a header that is damaged, tensors beyond the end of a file.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            files = sorted({str(name) for name in weight_map.values()})
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index.name} is damaged: {error!r}") from error
        strange = [name for name in files if Path(name).name != name]
        if strange:
            raise ModelError(f"{index.name} names {strange[0]!r}, which is outside the folder")
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            pickled = [path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth")]
            hint = f"; {pickled[0]} is pickled, which can run code: convert it to safetensors" if pickled else ""
            raise ModelError(f"{folder} has no *.safetensors{hint}")
        weight_map = None
    tensors: dict[str, TensorFile] = {}
    for name in files:
        if not (folder / name).exists():
            raise ModelError(f"{folder} lacks {name}, which {index.name} lists: the checkpoint is incomplete")
        tensors |= _read_header(folder / name)
    lost = [name for name in weight_map or () if name not in tensors]
    if lost:
        raise ModelError(f"{index.name} lists {lost[0]}, but no file has it: the checkpoint is damaged")
    return tensors


def _read_header(path: Path) -> dict[str, TensorFile]:
    total = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(total - 8, 100_000_000):
            raise ModelError(f"{path.name} is truncated or not a safetensors file: {total} bytes, header of {length}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = [
                (
                    str(name),
                    str(e["dtype"]),
                    tuple(map(int, e["shape"])),
                    int(e["data_offsets"][0]),
                    int(e["data_offsets"][1]),
                )
                for name, e in header.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(f"{path.name} has a damaged header: {error!r}") from error
    base, result = 8 + length, {}
    for name, dtype, shape, begin, end in entries:
        known = _DTYPES.get(dtype)
        wrong = known is not None and int(np.prod(shape, dtype=np.int64)) * known[0].itemsize != end - begin
        if begin < 0 or end < begin or wrong:
            raise ModelError(f"{path.name} has a damaged header: {name} has shape {shape} in {end - begin} bytes")
        if base + end > total:
            raise ModelError(f"{path.name} is truncated: {name} ends at byte {base + end}, the file at {total}")
        result[name] = TensorFile(path, dtype, shape, base + begin, end - begin)
    return result


def _read_config(folder: Path) -> Any:
    path = folder / "config.json"
    if not folder.is_dir() or not path.exists():
        raise ModelError(f"{folder} has no config.json: expected a folder with config.json and *.safetensors")
    try:
        config = json.loads(path.read_text())
        text = config.get("text_config")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    merged = {**config, **text} if isinstance(text, dict) else config
    return SimpleNamespace(**merged)
