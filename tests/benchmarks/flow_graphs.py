"""The graphs that flows are timed on, and small steps that both subjects share.

A graph is the embedded model's attention, 30 layers, mean over heads, half of it residual, on source code of Python's
standard library behind `<|endoftext|>`. Attention is causal, so that the graph of the first T tokens is a corner of that
of more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.activations import standard_library_texts
from tests.benchmarks.models import embedded


def real_capacity(length: int) -> Tensor:
    """(layer, query, key) capacities of the embedded model on source code behind `<|endoftext|>`."""
    from interp.flow.graph import attention_graph

    model = embedded()
    start = model.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return attention_graph(model, [start, *standard_library_texts(model, 1, length - 1)[0]]).capacity


def corner(capacity: Tensor, length: int) -> Tensor:
    """The graph of the first tokens."""
    return capacity[:, :length, :length].contiguous()


def warm_up(capacity: Tensor) -> None:
    """Every compiled function, once: forward, the cut, and the bound alone."""
    from interp.flow.exact import maximum_flow
    from interp.flow.rollout import layer_bound

    few = corner(capacity, 8).requires_grad_()
    maximum_flow(few, [-1]).sum().backward()
    layer_bound(few.detach(), [-1])


def on_one_thread(call: Callable[[], Any]) -> Any:
    """The call with one torch thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return call()
    finally:
        torch.set_num_threads(threads)


def spread(length: int, n: int) -> list[int]:
    """Up to `n` positions, evenly from the first to the last."""
    if n >= length:
        return list(range(length))
    return [round(at * (length - 1) / (n - 1)) for at in range(n)] if n > 1 else [length - 1]
