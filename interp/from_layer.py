"""Forward passes that begin at a layer: what lies below is kept from an earlier pass and does not run again.

The model's own forward runs, with masks, positions and what else a family prepares. Layers below hand on what they get, and the
residual stream that was kept takes the place of the embeddings' remains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from jaxtyping import Float
from torch import Tensor

from interp.model import Model


@contextlib.contextmanager
def from_layer(model: Model, layer: int, residual: Float[Tensor, "row position d_model"]) -> Iterator[None]:
    """Inside the block, forward passes of batches of `residual`'s shape begin at `layer`, which reads `residual`.

    No other thread may use the model meanwhile. Layers below do not touch a key-value cache either.

    Args:
        model: what `load_model` gave.
        layer: 0-based.
        residual: site "resid_pre" of that layer, from a pass over the same tokens.

    Raises:
        InputError: the layer is out of range.

    Example:
        >>> with from_layer(model, 12, residual):                                          # doctest: +SKIP
        ...     hidden = forward(model, batch, logits=False).last_hidden_state
    """
    skipped = [model.arch.layer(below) for below in range(layer)]
    # accelerate keeps a forward of its own on the instance; most models have the class's alone.
    before = [module.__dict__.get("forward") for module in skipped]
    with contextlib.ExitStack() as stack:
        stack.callback(model.arch.site("resid_pre", layer).attach(lambda _: residual).remove)
        for module, own in zip(skipped, before, strict=True):
            stack.callback(_restore_forward, module, own)
            module.forward = _hand_on
        yield


def _hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _restore_forward(module: Any, own: Any) -> None:
    if own is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = own
