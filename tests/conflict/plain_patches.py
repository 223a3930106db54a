"""Patching written down plainly: a whole forward pass per layer, head, pair and answer, hooks on the family's own modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# family: layers, attention and output projection, as the family's own module names
_NAMES = {
    "gpt2": ("transformer.h", "attn", "attn.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention", "attention.dense"),
}


def module(hf: Any, site: str, layer: int) -> Any:
    """The module whose output ("attn_out", "resid_post") or input ("z") is the site."""
    layers, attention, projection = _NAMES.get(hf.config.model_type, ("model.layers", "self_attn", "self_attn.o_proj"))
    block = hf.get_submodule(layers)[layer]
    return {"attn_out": block.get_submodule(attention), "resid_post": block, "z": block.get_submodule(projection)}[site]


@contextlib.contextmanager
def hooked(hf: Any, site: str, layer: int, change: Callable[[Tensor], Tensor | None]) -> Any:
    """Inside the block the site is what `change` makes of it; `None` leaves it as it is."""

    def before(_: Any, args: Any) -> Any:
        new = change(args[0])
        return None if new is None else (new, *args[1:])

    def after(_: Any, __: Any, output: Any) -> Any:
        new = change(output[0] if isinstance(output, tuple) else output)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    where = module(hf, site, layer)
    handle = where.register_forward_pre_hook(before) if site == "z" else where.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def kept(hf: Any, ids: Sequence[int], site: str, layer: int) -> Tensor:
    """(position, width) the site on one text."""
    found: list[Tensor] = []
    with hooked(hf, site, layer, lambda tensor: found.append(tensor[0].clone())):
        hf(torch.tensor([list(ids)]), use_cache=False)
    return found[0]


@torch.no_grad()
def preference(hf: Any, ids: Sequence[int], answers: Sequence[Sequence[int]]) -> float:
    """Mean log-probability per token of the first answer minus the second's, from where they differ."""
    shared = next(at for at, (first, second) in enumerate(zip(*answers, strict=False)) if first != second)
    means = []
    for answer in answers:
        logprobs = hf(torch.tensor([[*ids, *answer]]), use_cache=False).logits[0].float().log_softmax(-1)
        means.append(np.mean([float(logprobs[len(ids) - 1 + at, answer[at]]) for at in range(shared, len(answer))]))
    return float(means[0] - means[1])


def patched_preference(
    hf: Any,
    ids: Sequence[int],
    donor: Sequence[int],
    answers: Sequence[Sequence[int]],
    site: str,
    layer: int,
    head: int,
    n_last: int,
    d_head: int,
) -> float:
    """The preference with the donor's site at the prompt's last tokens."""
    name = "z" if site == "head" else site
    given = kept(hf, donor, name, layer)[-n_last:]
    columns = slice(head * d_head, (head + 1) * d_head) if site == "head" else slice(None)
    places = slice(len(ids) - n_last, len(ids))

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[0, places, columns] = given[:, columns]
        return tensor

    with hooked(hf, name, layer, change):
        return preference(hf, ids, answers)
