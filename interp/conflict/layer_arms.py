"""Which layers to train, at equal numbers of trainable parameters: the focal ones against others.

    focal      the localised layers, rank r
    random-i   as many other layers, drawn; focal ones only where too few others are left
    first      as many, from the bottom
    last       as many, from the top
    all        every layer, with the largest ranks that stay within the focal arm's number of parameters: equal up to one, the
               higher ones evenly spread, at least 1

Of LoRA (Hu et al., arXiv 2106.09685) a matrix (in, out) has r (in + out) parameters. `lora_alpha` goes with the rank, so that the
scale lora_alpha / r is the same in every arm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from interp.errors import InputError
from interp.model import Model


@dataclass(frozen=True)
class LayerArm:
    """Layers to train and how.

    Attributes:
        layers: 0-based, ascending.
        rank: of LoRA, or one for each layer.
        lora_alpha: of LoRA, for the highest rank.
        n_parameters: trainable ones.
    """

    layers: tuple[int, ...]
    rank: int | tuple[int, ...]
    lora_alpha: float
    n_parameters: int


def arms(
    model: Model,
    focal: Iterable[int],
    rank: int = 8,
    *,
    lora_alpha: float = 16.0,
    n_random: int = 3,
    seed: int = 0,
) -> dict[str, LayerArm]:
    """Arms of a comparison, the focal layers first.

    Args:
        model: a causal LM.
        focal: the localised layers; negative ones count from the end.
        rank: of the focal arm.
        lora_alpha: of the focal arm.
        n_random: draws of random layers, different from each other and from the focal ones where there are enough.
        seed: of the draws.

    Returns:
        {"focal", "random-0" …, "first", "last", "all": arm}. Where layers differ in size, arms differ in their `n_parameters`.

    Raises:
        InputError: no layer, one out of range, a rank below 1, or a negative number of draws.

    Example:
        >>> {name: arm.layers for name, arm in arms(load_model(), range(10, 14)).items()}          # doctest: +SKIP
    """
    chosen = tuple(sorted({model.arch.check_layer(layer) for layer in focal}))
    if not chosen:
        raise InputError("no focal layer was given; expected at least one")
    if rank < 1 or n_random < 0:
        raise InputError(
            f"rank={rank}, n_random={n_random}; expected a rank of at least 1 and no negative number of draws"
        )
    n_layers, size = model.arch.n_layers, len(chosen)
    found = {"focal": _arm(model, chosen, rank, lora_alpha)}
    for number, drawn in enumerate(_draws(chosen, n_layers, n_random, seed)):
        found[f"random-{number}"] = _arm(model, drawn, rank, lora_alpha)
    found["first"] = _arm(model, tuple(range(size)), rank, lora_alpha)
    found["last"] = _arm(model, tuple(range(n_layers - size, n_layers)), rank, lora_alpha)
    every = tuple(range(n_layers))
    ranks = _even_ranks([lora_parameters(model, [layer], 1) for layer in every], found["focal"].n_parameters)
    smaller = ranks[0] if len(set(ranks)) == 1 else ranks
    found["all"] = _arm(model, every, smaller, lora_alpha * max(ranks) / rank)
    return found


def _arm(model: Model, layers: tuple[int, ...], rank: int | tuple[int, ...], lora_alpha: float) -> LayerArm:
    return LayerArm(layers, rank, lora_alpha, lora_parameters(model, layers, rank))


def _even_ranks(sizes: Sequence[int], budget: int) -> tuple[int, ...]:
    """Ranks of layers of these sizes at rank 1: all equal, and as many one higher, evenly spread, as the budget allows.

    Example:
        >>> _even_ranks([10, 10, 10, 10], 60)
        (2, 1, 2, 1)
        >>> _even_ranks([10, 10], 5)
        (1, 1)
    """
    n = len(sizes)
    low = max(1, budget // sum(sizes))
    for more in range(n - 1, 0, -1):
        ranks = tuple(low + ((at * more) % n < more) for at in range(n))
        if sum(rank * size for rank, size in zip(ranks, sizes, strict=True)) <= budget:
            return ranks
    return (low,) * n


def _draws(focal: tuple[int, ...], n_layers: int, n_random: int, seed: int) -> list[tuple[int, ...]]:
    """Sets of as many layers, others first; a set comes twice only when a hundred draws in a row gave nothing new."""
    random = np.random.default_rng(seed)
    others = [layer for layer in range(n_layers) if layer not in focal]
    missing = max(0, len(focal) - len(others))
    found: list[tuple[int, ...]] = []
    for _ in range(n_random):
        drawn: tuple[int, ...] = ()
        for _ in range(100):
            some = random.permutation(others)[: len(focal) - missing].tolist()
            more = random.permutation(focal)[:missing].tolist()
            drawn = tuple(sorted(int(layer) for layer in (*some, *more)))
            if drawn not in found:
                break
        found.append(drawn)
    return found


def attention_projections(model: Model, layers: Iterable[int]) -> dict[str, Any]:
    """{full name: module} of the matrices in the attention of some layers: q, k, v, o, fused or not, in any family.

    Raises:
        InputError: a layer out of range, or an encoder.
    """
    if not model.arch.family.decoder:
        raise InputError(
            f"{model.name} is an encoder ({model.arch.family.name}); only causal language models are aligned"
        )
    inside = {model.arch.attention(layer) for layer in layers}
    found: dict[str, Any] = {}
    for name, module in model.hf.named_modules():
        if module in inside:
            found |= {f"{name}.{part}": child for part, child in module.named_modules() if _matrix(child) is not None}
    if not found:
        raise InputError(
            f"the attention of {type(model.hf).__name__} has no linear projection that LoRA could be put on"
        )
    return found


def lora_parameters(model: Model, layers: Iterable[int], rank: int | Sequence[int]) -> int:
    """How many parameters LoRA has on these layers' attention; `rank` as `layer_ranks` reads it."""
    total = 0
    for layer, own in layer_ranks(model, layers, rank).items():
        shapes = (_matrix(module) for module in attention_projections(model, [layer]).values())
        total += sum(own * sum(shape) for shape in shapes if shape is not None)
    return total


def layer_ranks(model: Model, layers: Iterable[int], rank: int | Sequence[int]) -> dict[int, int]:
    """{layer: rank}, ascending, each layer once.

    Args:
        model: a causal LM.
        layers: negative ones count from the end.
        rank: one for all, or one for each layer in ascending order.

    Raises:
        InputError: no layer, one out of range, a rank below 1, or another number of ranks than of layers.
    """
    chosen = sorted({model.arch.check_layer(layer) for layer in layers})
    ranks = [rank] * len(chosen) if isinstance(rank, int) else list(rank)
    if not chosen or len(ranks) != len(chosen) or min(ranks) < 1:
        raise InputError(
            f"layers={chosen}, rank={rank}; expected at least one layer, and one rank of at least 1 or one for each layer"
        )
    return dict(zip(chosen, ranks, strict=True))


def _matrix(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear module or a Conv1D of GPT-2; `None` for anything else."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return None
