"""A hash of a model's config and weights, and a search for weights that are not finite; one pass over them each."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from interp.architectures import stored_weight
from interp.errors import ModelError


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
