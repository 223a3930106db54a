"""Decode a safetensors checkpoint layer by layer, without ever building the model.

1. Headers of all files are read and checked: the tensors must fill their file without gaps or overlaps.
2. The family's table row (`interp.families`) says which tensors are needed: one layer's up, gate or down, norms, head.
   Their names, shapes and dtypes are checked before anything is written.
3. Everything is memory-mapped, and only while it is in use: of the LM head a tile of the vocabulary, of the MLP the rows of some
   neurons. A Llama-3.1-8B or 70B folder needs a few hundred megabytes, less than its LM head.
4. One Parquet shard per layer. After a kill the next call goes on with the missing layers, and the result is identical to
   one made without interruption; two processes on one folder do not disturb each other.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import SupportsIndex

import torch
from torch import Tensor
from tqdm.auto import tqdm

from interp.architectures import Family, family_of
from interp.errors import InputError, ModelError
from interp.neurons.atlas import ATLAS_COLUMNS, Atlas, atlas_frame
from interp.neurons.checkpoint_files import MatrixOnDisk, TensorFile, read_config, read_headers
from interp.neurons.decoding import (
    DecodeOptions,
    atlas_parameters,
    check_options,
    checked,
    decode_layer,
    decoding_processors,
    vocabulary_of,
)
from interp.neurons.vocabulary import Matrix
from interp.provenance import Provenance
from interp.shards import ShardedRun

# More than decode's: a head in half precision is turned to float32 once per piece of neurons.
CHECKPOINT_BUDGET = 64 * 2**20
_CHECKED = 4096  # rows of the LM head that are checked at a time
# Where a config leaves out tie_word_embeddings, its model type's default counts: True for these.
_TIED = {"gemma", "gemma2", "gemma3", "gemma3_text", "gpt2"}


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
        folder: a Hugging Face folder with config.json and model.safetensors, or several files with an index.
        out: the folder for the shards; made if absent, resumed if it holds part of the same run.
        site, norm, signs, top_k, bias, layers, sample, shuffle, seed: as in `interp.neurons.decoding`.
        device: where the products run.
        memory_budget: bytes of logits and weights held at a time.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        The `Atlas`, equal to `decode` of the loaded model; `interp.load_result(out)` reads it again.

    Raises:
        InputError: see `decode`.
        ModelError: no safetensors, a truncated or damaged file, a missing tensor, an unknown family, NaN or infinite weights.
        ResultError: `out` belongs to another run.
    """
    try:
        device = str(torch.empty(0, device=device).device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    weights = CheckpointWeights(Path(folder).expanduser().absolute(), torch.device(device))
    options = DecodeOptions(site, norm, tuple(signs), top_k, bias, sample, shuffle, seed)
    chosen = [_layer(layer, weights.n_layers) for layer in (range(weights.n_layers) if layers is None else layers)]
    if len(set(chosen)) < len(chosen):
        raise InputError(f"layers={list(layers or ())!r:.200} names a layer twice")
    check_options(options, weights, weights.vocab_size, chosen)
    weights.require(options, chosen)
    tokenizer_json, tokens = weights.vocabulary()
    parameters = atlas_parameters(options, weights, chosen, weights.vocab_size)
    described = SimpleNamespace(
        name=weights.folder.name, fingerprint=weights.fingerprint, dtype=weights.dtype, attention=None, device=device
    )
    units = {f"layer-{layer:03d}": layer for layer in chosen}
    run = ShardedRun(
        Path(out).expanduser(),
        kind="neurons.atlas",
        columns=ATLAS_COLUMNS,
        provenance=Provenance.collect(described, seed=seed, parameters=parameters),
        units=list(units),
        attachments={} if tokenizer_json is None else {"tokenizer": tokenizer_json},
    )
    per_layer = min(weights.d_mlp, sample or weights.d_mlp)
    description = progress if isinstance(progress, str) else f"decode {site} of {weights.folder.name}"
    with (
        tqdm(total=len(chosen) * per_layer, desc=description, unit="neuron", disable=not progress, leave=False) as bar,
        decoding_processors(weights.device) as processors,
    ):
        head: Matrix | None = None
        for unit, layer in units.items():
            if unit not in run.missing():  # asked every time: another process may have made it meanwhile
                bar.update(per_layer)
                continue
            head = weights.head() if head is None else head
            part = decode_layer(weights, head, layer, options, processors, memory_budget, bar)
            run.write(unit, atlas_frame([part], tokens))
    result = run.finish()
    assert isinstance(result, Atlas)
    return result


def _layer(layer: SupportsIndex, n_layers: int) -> int:
    if not hasattr(layer, "__index__") or not -n_layers <= operator.index(layer) < n_layers:
        raise InputError(f"layer {layer!r} is out of range: the checkpoint has {n_layers} layers (0 … {n_layers - 1})")
    return operator.index(layer) % n_layers


class CheckpointWeights:
    """A safetensors folder as a source of weights (see `interp.neurons.decoding.Weights`)."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.config = read_config(folder)
        self.family: Family = family_of(self.config)
        if not self.family.decoder:
            raise ModelError(f"{folder.name} is an encoder ({self.family.name}): it has no LM head to decode through")
        self.tensors = read_headers(folder)
        self.prefix, self.n_layers = self._find_layers()
        self.layer_norm = self.family.norm == "layer"
        self.head_name = self._find_head()
        self.vocab_size, self.d_model = self._get(self.head_name, None, None).shape
        up = self._get(f"{self.prefix}0.{self.family.up}.weight", None, None)
        self.d_mlp = up.shape[1 if self.family.transposed else 0] // (2 if self.family.fused else 1)
        self.dtype = str(up.dtype)

    def _find_layers(self) -> tuple[str, int]:
        """The prefix of layer tensors, such as "model.layers.", and the number of layers."""
        pattern = re.compile(rf"^((?:.*\.)?)\d+\.{re.escape(self.family.up)}\.weight$")
        found = [match[1] for match in map(pattern.match, self.tensors) if match]
        usual = {prefix for prefix in found if prefix.rstrip(".") in self.family.layers}
        known = usual or {prefix for prefix in found if "vision" not in prefix}
        if len(known) != 1:
            name = f"{self.family.layers[0]}.0.{self.family.up}.weight"
            raise ModelError(f"{self.folder} has no tensors named like {name}, or several sets of them")
        prefix = known.pop()
        stated = getattr(self.config, "num_hidden_layers", None) or getattr(self.config, "n_layer", None)
        n_layers = found.count(prefix) if stated is None else stated
        if type(n_layers) is not int or n_layers < 1:
            raise ModelError(f"{self.folder / 'config.json'} is damaged: it states {n_layers!r:.40} layers")
        for layer in range(n_layers):
            self._get(f"{prefix}{layer}.{self.family.up}.weight", None, None)
        return prefix, n_layers

    def _beside(self, paths: tuple[str, ...]) -> str:
        """A module that lives next to the layers, such as the final norm, or where the family says."""
        base = self.prefix.rstrip(".").rpartition(".")[0]
        names = [".".join(filter(None, (base, path.rpartition(".")[2]))) for path in paths] + list(paths)
        return next((name for name in names if f"{name}.weight" in self.tensors), names[0])

    def _find_head(self) -> str:
        heads = "|".join(map(re.escape, self.family.head))
        names = [name for name in self.tensors if re.search(rf"(^|\.)({heads})\.weight$", name)]
        if names:  # transformers takes it too, whatever the config says about tying
            return names[0]
        tied = getattr(self.config, "tie_word_embeddings", None)
        if tied if tied is not None else self.config.model_type in _TIED:
            return self._beside(self.family.embedding) + ".weight"
        head = f"{self.family.head[0]}.weight"
        raise ModelError(f"{self.folder} has no {head}, and config.json does not tie it to the embedding: incomplete")

    def _get(self, name: str, *shape: int | None) -> TensorFile:
        """A tensor, checked to be there, to have this shape (`None`: any size but 0) and a dtype that can be read."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ModelError(f"{self.folder} has no tensor {name}: the checkpoint is incomplete")
        expected = tuple(size or max(found, 1) for size, found in zip(shape, (*tensor.shape, 1, 1), strict=False))
        if tensor.shape != expected:
            raise ModelError(f"{name} has shape {tensor.shape}, expected {expected}: the checkpoint is damaged")
        assert tensor.dtype  # says so where it is not supported
        return tensor

    def _projection(self, site: str, layer: int) -> tuple[TensorFile, bool]:
        """A projection, and whether neurons are its columns: so where it writes, but Conv1D stores the transpose."""
        path = {"up": self.family.up, "gate": self.family.gate, "down": self.family.down}[site]
        if path is None:
            raise InputError(f"{self.family.name} has no gate projection (its MLP is not gated); use 'up' or 'down'")
        wide = self.d_mlp * (2 if self.family.fused and site != "down" else 1)
        columns = (site == "down") != self.family.transposed
        shape = (self.d_model, wide) if columns else (wide, self.d_model)
        return self._get(f"{self.prefix}{layer}.{path}.weight", *shape), columns

    def require(self, options: DecodeOptions, layers: Sequence[int]) -> None:
        """Check that every tensor a run will read is there, with the right shape and dtype, before it starts."""
        for layer in layers:
            for site in dict.fromkeys((options.site, "up", "down")):
                self._projection(site, layer)
            if options.norm == "folded":
                self.pre_mlp_gain(layer)
        self.final_norm()

    def rows(self, site: str, layer: int, neurons: slice | Tensor) -> Tensor:
        """Weights of some neurons; only these are read."""
        tensor, columns = self._projection(site, layer)
        at = neurons if isinstance(neurons, slice) else neurons.numpy()
        if self.family.fused and site == "up":
            at = slice(at.start + self.d_mlp, at.stop + self.d_mlp) if isinstance(at, slice) else at + self.d_mlp
        return checked(tensor.read_columns(at).T if columns else tensor.read(at), tensor.name)

    def head(self) -> Matrix:
        """The LM head, checked to be finite: on the device, or on disk where the device is a CPU."""
        head = MatrixOnDisk(self.tensors[self.head_name])
        for start in range(0, len(head), _CHECKED):
            some = head[start : start + _CHECKED]
            checked(some, f"rows {start} … {start + len(some) - 1} of {self.head_name}")
        return head if self.device.type == "cpu" else head[:].to(self.device)

    def _vector(self, name: str, size: int) -> Tensor:
        return checked(self._get(name, size).read().float(), name).to(self.device)

    def head_bias(self) -> Tensor | None:
        """The LM head's bias."""
        name = self.head_name.removesuffix("weight") + "bias"
        return self._vector(name, self.vocab_size) if name in self.tensors else None

    def final_norm(self) -> tuple[Tensor | None, Tensor | None]:
        """Gain and bias of the final norm."""
        name = self._beside(self.family.final_norm)
        bias = self._vector(f"{name}.bias", self.d_model) if f"{name}.bias" in self.tensors else None
        return self._vector(f"{name}.weight", self.d_model) + self.family.norm_offset, bias

    def pre_mlp_gain(self, layer: int) -> Tensor | None:
        """Gain of the norm that the MLP reads through."""
        if self.family.pre_mlp_norm is None:
            return None
        name = f"{self.prefix}{layer}.{self.family.pre_mlp_norm}.weight"
        return self._vector(name, self.d_model) + self.family.norm_offset

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
        size = max(tokenizer.get_vocab().values(), default=-1) + 1
        if size > self.vocab_size:
            raise ModelError(
                f"tokenizer and model disagree: {path.name} has ids up to {size - 1}, {self.head_name} {self.vocab_size} rows"
            )
        return vocabulary_of(tokenizer, self.vocab_size)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of config, tensor layout and 12 KiB of every tensor's bytes."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.shape} {tensor.stored}".encode())
            with open(tensor.path, "rb") as file:
                for share in (0, 0.5, 1):
                    file.seek(tensor.offset + int(share * max(tensor.size - 4096, 0)))
                    digest.update(file.read(min(4096, tensor.size)))
        return digest.hexdigest()[:16]
