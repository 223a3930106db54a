"""Cheap checks at load: what interp relies on holds for this model, or an error names the module."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from interp.errors import ModelError
from interp.weight_hash import non_finite_weights


@torch.no_grad()
def self_check(model: Any) -> None:
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
        for name in ("up", "hidden", "pattern") if arch.n_layers else ():
            stack.callback(arch.site(name, 0).attach(keep(name)).remove)
        stack.enter_context(model.attention_implementation("eager"))
        output = model.hf(input_ids=ids, **({"use_cache": False} if arch.family.decoder else {}))
    last = output.logits if hasattr(output, "logits") else output[0]
    if not torch.isfinite(last).all():
        raise ModelError(
            f"{model.name} gives outputs that are not finite, though its weights are: it overflows; try dtype='float32'"
        )
    if not arch.n_layers:
        return
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
