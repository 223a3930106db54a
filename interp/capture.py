"""Run a model once over many texts and feed any number of probes; memory constant in texts and layers.

1. Texts become token-budget batches (`interp.batching`), longest first.
2. One forward pass per batch carries hooks for every site that some probe wants. A probe sees one layer's tensor at a
   time and reduces it at once, on the device (`update` returns the small partial).
3. When the whole batch has passed, its partials are merged (`merge`): a batch that ran out of memory half-way leaves
   nothing behind, is halved and run again.
4. The LM head runs only if a probe wants "logits"; layers above the last that is wanted do not run at all.

Patterns need eager attention, which is switched on for the run. Padding is marked in `batch.mask`, and no probe may let it
enter a mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from interp.architectures import LAYER_SITES, NEURON_SITES
from interp.batching import Batch, available_memory, check_memory, for_each_batch, is_out_of_memory, token_batches
from interp.errors import InputError, MemoryBudgetError
from interp.model import Model


@runtime_checkable
class Probe(Protocol):
    """What `run_probes` feeds. A probe asks for sites, reduces what it sees, and gives a result at the end.

    One that keeps whole tensors on the CPU may say how much, in `kept_bytes(model, lengths)`; see `Keep`.
    """

    @property
    def sites(self) -> Sequence[tuple[str, int]]:
        """(site, layer) pairs that it wants; layer -1 for "logits". A negative layer counts from the end."""
        ...

    def update(self, site: str, layer: int, tensor: Tensor, batch: Batch) -> Any:
        """Reduce one site's tensor of one batch to a small partial, without changing the probe or the tensor."""
        ...

    def merge(self, site: str, layer: int, partial: Any, batch: Batch) -> None:
        """Take in a partial; called once the batch has passed whole."""
        ...


class _Stop(Exception):
    """Raised by the last hook that is wanted, to skip the layers above."""


@torch.no_grad()
def run_probes(
    model: Model,
    texts: Sequence[str | Sequence[int]],
    probes: Sequence[Probe],
    *,
    max_tokens: int = 4096,
    side: str = "right",
    chat: bool = False,
    progress: bool | str = False,
) -> None:
    """Pass texts through the model once and feed the probes.

    Args:
        model: what `load_model` gave.
        texts: strings, or sequences of token ids.
        probes: see `Probe`. They are changed in place.
        max_tokens: budget of padded tokens in a batch; cut further where the estimated memory would not fit.
        side: where padding goes, "right" or "left"; results agree within 1e-4 in float32. Encoders are padded right.
        chat: wrap texts in the chat template.
        progress: a progress bar on stderr; a string is its description.

    Raises:
        InputError: empty or too long texts, an unknown site, a layer out of range.
        MemoryBudgetError: the longest text alone needs more memory than there is (both figures are given).
    """
    if not isinstance(texts, str) and len(texts) == 0:
        raise InputError("no texts were given; expected at least one")
    encoded = model.encode(texts, chat=chat)
    wanted = _wanted(model, probes)
    side = side if model.arch.family.decoder else "right"  # encoders count positions from the first column
    names = {site for site, _ in wanted}
    lengths = [len(ids) for ids in encoded]
    kept = sum(probe.kept_bytes(model, lengths) for probe in probes if hasattr(probe, "kept_bytes"))
    if kept:
        check_memory(kept, "cpu", f"keeping whole tensors of {len(lengths)} texts")
    longest = max(lengths)
    check_memory(estimate_bytes(model, names, 1, longest), model.device, f"one text of {longest} tokens")
    while max_tokens > longest and estimate_bytes(
        model, names, max(1, max_tokens // longest), longest
    ) > 0.8 * available_memory(model.device):
        max_tokens //= 2
    batches = token_batches(encoded, max_tokens=max_tokens, pad_id=model.pad_id, side=side)
    eager = model.attention_implementation("eager") if "pattern" in names else contextlib.nullcontext()
    with eager:
        for_each_batch(batches, lambda batch: _run_batch(model, batch, wanted), progress=progress)


# {(site, layer): [(probe, the layer as the probe asked for it, which may be negative)]}
_Wanted = dict[tuple[str, int], list[tuple[Probe, int]]]


def _wanted(model: Model, probes: Iterable[Probe]) -> _Wanted:
    wanted: _Wanted = {}
    for probe in probes:
        for name, layer in dict.fromkeys(probe.sites):
            site = model.arch.site(name, layer)
            wanted.setdefault((site.name, site.layer), []).append((probe, layer))
    if not wanted:
        raise InputError("no probe asks for a site; expected at least one (site, layer)")
    return wanted


def _run_batch(model: Model, batch: Batch, wanted: _Wanted) -> None:
    batch = batch.to(model.device)
    partials: list[tuple[Probe, str, int, Any]] = []
    remaining = dict.fromkeys(wanted)

    def visitor(name: str, layer: int) -> Any:
        def visit(tensor: Tensor) -> None:
            here = batch if tensor.device == batch.mask.device else batch.to(tensor.device)
            for probe, asked in wanted[name, layer]:
                partials.append((probe, name, asked, probe.update(name, asked, tensor.detach(), here)))
            remaining.pop((name, layer), None)
            if not remaining:
                raise _Stop

        return visit

    with contextlib.ExitStack() as stack:
        for name, layer in wanted:
            stack.callback(model.arch.site(name, layer).attach(visitor(name, layer)).remove)
        with contextlib.suppress(_Stop):
            forward(model, batch, logits=("logits", -1) in wanted)
    try:
        for probe, name, layer, partial in partials:
            probe.merge(name, layer, partial, batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Some partials are merged: running the batch again would count them twice.
        raise MemoryBudgetError(
            f"out of memory while {type(probe).__name__} took in a batch of {batch.size} texts; its result is incomplete: "
            f"use fewer texts or sites"
        ) from error


def forward(model: Model, batch: Batch, *, logits: bool = True) -> Any:
    """One forward pass of a batch, with the right positions under left padding.

    Args:
        model: what `load_model` gave.
        batch: on the model's device.
        logits: run the LM head; without it the last hidden states are computed alone.

    Returns:
        The Hugging Face output.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.mask.long()}
    if model.arch.family.decoder:
        inputs["use_cache"] = False
        if batch.side == "left":
            inputs["position_ids"] = batch.position_ids
    elif batch.side == "left":
        raise InputError(f"{model.name} is an encoder: pad its batches on the right")
    return (model.hf if logits else model.hf.base_model)(**inputs)


def estimate_bytes(model: Model, sites: Iterable[str], n_texts: int, length: int) -> int:
    """Peak bytes that a forward pass adds for a batch of `n_texts` texts of `length` tokens.

    An upper estimate: residual stream and attention inputs, the MLP's intermediate tensors, twice the pattern where it is
    wanted (scores and softmax live together), the logits where they are wanted, in the model's dtype or float32.
    """
    arch, size = model.arch, model.dtype.itemsize
    sites = set(sites)
    tokens = n_texts * length
    per_token = 6 * arch.d_model + 2 * arch.n_heads * arch.d_head + 3 * arch.d_mlp
    total = tokens * per_token * size
    if "pattern" in sites or "eager" in model.attention:
        total += n_texts * arch.n_heads * length * length * (size + 2 * 4)
    if "logits" in sites:
        total += tokens * arch.vocab_size * (size + 4)
    return total


class Keep:
    """A probe that keeps whole tensors, one per text, on the CPU with padding cut off: for a few texts.

    Attributes:
        tensors: {(site, layer): {text index: tensor}}, positions along the first dimension; a pattern is
            (head, query, key).

    Example:
        >>> probe = Keep([("hidden", 3)])                              # doctest: +SKIP
        >>> run_probes(model, ["The water is cold."], [probe])         # doctest: +SKIP
        >>> probe.tensors["hidden", 3][0].shape                        # doctest: +SKIP
        torch.Size([5, 1536])
    """

    def __init__(self, sites: Sequence[tuple[str, int]]) -> None:
        self.sites = [(name, layer) for name, layer in sites]
        unknown = [name for name, _ in self.sites if name not in (*LAYER_SITES, "logits")]
        if unknown:
            raise InputError(f"unknown site {unknown[0]!r}; expected one of {', '.join((*LAYER_SITES, 'logits'))}")
        self.tensors: dict[tuple[str, int], dict[int, Tensor]] = {site: {} for site in self.sites}

    def kept_bytes(self, model: Model, lengths: Sequence[int]) -> int:
        """What texts of these lengths will take on the CPU."""
        arch, tokens, pairs = model.arch, sum(lengths), sum(length**2 for length in lengths)
        widths = dict.fromkeys(NEURON_SITES, arch.d_mlp) | {"z": arch.n_heads * arch.d_head, "logits": arch.vocab_size}
        patterns = sum(name == "pattern" for name, _ in self.sites)
        numbers = arch.n_heads * pairs * patterns
        numbers += sum(widths.get(name, arch.d_model) * tokens for name, _ in self.sites if name != "pattern")
        return numbers * model.dtype.itemsize

    def update(self, site: str, layer: int, tensor: Tensor, batch: Batch) -> list[Tensor]:
        """Cut padding off and move to the CPU."""
        kept = []
        for row in range(batch.size):
            real = batch.mask[row]
            piece = tensor[row][:, real][:, :, real] if site == "pattern" else tensor[row][real]
            kept.append(piece.to("cpu", copy=True))
        return kept

    def merge(self, site: str, layer: int, partial: list[Tensor], batch: Batch) -> None:
        """Store by text index."""
        for text, piece in zip(batch.rows, partial, strict=True):
            self.tensors.setdefault((site, layer), {})[text] = piece
