"""A model's attention on texts, one (query, key) matrix a layer, in one pass (`interp.capture`).

1. Mean, maximum or chosen heads: the pattern is reduced on the device as soon as its layer has run.
2. Norm-weighted heads and contributions also need value states: the layer's attention is recorded
   (`interp.recorded_attention`, eager; of encoders the output of the value projection), and what head h writes for key j,
   u_hj = W_O^h v_hj, is computed with it. Then f_ij = Σ_h pattern[h, i, j] u_hj is what key j adds to position i. Where a
   norm follows attention (Gemma 2 and 3, OLMo 2), f is scaled as that norm scales the sum.
3. Contribution of a part f of y: max(‖y‖₁ − ‖y − f‖₁, 0), with y the residual stream after attention; the parts are the
   f_ij and the residual stream itself, on the diagonal. Biases of the output projection are no part.

What is kept is (layer, query, key) float32 a text, on the CPU, estimated before the run. Queries go block by block, so that no
(query, key, d_model) tensor is larger than 64 MiB.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from interp.batching import Batch
from interp.capture import run_probes
from interp.errors import InputError, ModelError
from interp.flow.graph import check_rows, merge_heads
from interp.model import Model
from interp.recorded_attention import Seen, recording

_BLOCK = 2**24  # numbers in a (query, key, d_model) block


def attention_of_texts(
    model: Model,
    encoded: Sequence[Sequence[int]],
    layers: Sequence[int],
    heads: str | int | Sequence[int],
    capacity: str,
    *,
    max_tokens: int = 4096,
    progress: bool | str = False,
) -> list[Tensor]:
    """(layer, query, key) float32 of every text; rows sum to 1.

    Args:
        model: what `load_model` gave.
        encoded: token ids.
        layers, heads, capacity: see `interp.flow.attention_graph`.
        max_tokens: budget of padded tokens in a batch.
        progress: a progress bar on stderr; a string is its description.

    Raises:
        InputError: contributions of an encoder, an unknown head.
        ModelError: attention that is not softmax attention (the layer is named).
        MemoryBudgetError: the matrices do not fit, with both figures.
    """
    probe: Any
    recorded: Any = contextlib.nullcontext()
    if heads == "norm" and not model.arch.family.decoder:
        probe = _NormsOfEncoder(model, layers)
        recorded = probe.recording()
    elif heads == "norm" or capacity == "contribution":
        probe = _WrittenByHeads(model, layers, capacity)
        recorded = recording(model, "eager", probe.record, layers)
    else:
        if not isinstance(heads, str):  # before the run, not after a layer
            merge_heads(torch.ones(model.arch.n_heads, 1, 1), heads)
        elif heads not in ("mean", "max"):
            raise InputError(f"heads={heads!r}; expected 'mean', 'max', 'norm', a head, or several heads")
        probe = _Patterns(layers, heads)
    with recorded:
        run_probes(model, encoded, [probe], max_tokens=max_tokens, progress=progress)
    return [torch.stack([probe.found[layer][text] for layer in layers]) for text in range(len(encoded))]


class _Patterns:
    """Heads made one, for every text and layer."""

    def __init__(self, layers: Sequence[int], heads: str | int | Sequence[int]) -> None:
        self.heads = heads
        self.sites: list[tuple[str, int]] = [("pattern", layer) for layer in layers]
        self.found: dict[int, dict[int, Tensor]] = {layer: {} for layer in layers}

    def kept_bytes(self, model: Model, lengths: Sequence[int]) -> int:
        """What stays on the CPU, and once more while it is stacked."""
        return 8 * len(self.found) * sum(length**2 for length in lengths)

    def update(self, site: str, layer: int, tensor: Tensor, batch: Batch) -> list[Tensor] | None:
        """One matrix a text, with padding cut off."""
        rows = []
        for row in range(batch.size):
            real = batch.mask[row]
            pattern = check_rows(tensor[row].float()[:, real][:, :, real], f"layer {layer}'s pattern")
            rows.append(merge_heads(pattern, self.heads).cpu())
        return rows

    def merge(self, site: str, layer: int, partial: list[Tensor] | None, batch: Batch) -> None:
        """Keep by text."""
        for text, matrix in zip(batch.rows, partial or [], strict=partial is not None):
            self.found[layer][text] = matrix


class _NormsOfEncoder(_Patterns):
    """Norm-weighted heads of an encoder, whose attention modules keep their value projection under `value`."""

    def __init__(self, model: Model, layers: Sequence[int]) -> None:
        super().__init__(layers, "norm")
        self.model = model
        self._values: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep each layer's value states until its pattern comes."""
        with contextlib.ExitStack() as stack:
            for layer in self.found:
                projection = getattr(self.model.arch.attention(layer), "value", None)
                if projection is None:
                    raise ModelError(
                        f"{self.model.name}: layer {layer}'s attention has no value projection; use heads='mean'"
                    )

                def keep(module: Any, given: Any, output: Tensor, layer: int = layer) -> None:
                    self._values[layer] = output.detach()

                stack.callback(projection.register_forward_hook(keep).remove)
            yield

    def update(self, site: str, layer: int, tensor: Tensor, batch: Batch) -> list[Tensor]:
        """One matrix a text."""
        weight = self.model.arch.output_weight(layer).float()  # (head, d_head, d_model)
        values = self._values.pop(layer).float().unflatten(-1, weight.shape[:2])  # (batch, position, head, d_head)
        rows = []
        for row in range(batch.size):
            real = batch.mask[row]
            pattern = check_rows(tensor[row].float()[:, real][:, :, real], f"layer {layer}'s pattern")
            norms = torch.einsum("khd,hdm->hkm", values[row][real], weight.to(values.device)).norm(dim=-1)
            rows.append(check_rows(_to_one((pattern * norms[:, None]).sum(0)), f"layer {layer}").cpu())
        return rows


class _WrittenByHeads(_Patterns):
    """Norm-weighted heads, or contributions to the residual stream."""

    def __init__(self, model: Model, layers: Sequence[int], capacity: str) -> None:
        super().__init__(layers, "norm")
        self.model, self.contributes = model, capacity == "contribution"
        self.sites = [(site, layer) for layer in layers for site in ("resid_pre", "attn_out")]
        self._layer_of = {id(model.arch.attention(layer)): layer for layer in layers}
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._before: dict[int, Tensor] = {}

    def record(self, seen: Seen) -> None:
        """Keep a layer's pattern and values until its output comes."""
        layer = self._layer_of.get(id(seen.module))
        if layer is not None:
            assert seen.pattern is not None
            self._seen[layer] = (seen.pattern.detach(), seen.value.detach())

    def update(self, site: str, layer: int, tensor: Tensor, batch: Batch) -> list[Tensor] | None:
        """At the attention's output all is there that the layer's matrix needs."""
        if site == "resid_pre":
            self._before[layer] = tensor
            return None
        before = self._before.pop(layer)
        if layer not in self._seen:
            raise ModelError(
                f"{self.model.name}: layer {layer} did not call softmax attention; leave it out with layers=…"
            )
        pattern, value = self._seen.pop(layer)
        weight = self.model.arch.output_weight(layer).float().to(value.device)  # (head, d_head, d_model)
        rows = []
        for row in range(batch.size):
            real = batch.mask[row]
            heads = pattern[row].float()[:, real][:, :, real]
            values = value[row].float()[:, real].repeat_interleave(weight.shape[0] // value.shape[1], 0)
            written = values @ weight  # (head, key, d_model)
            if self.contributes:
                matrix = self._contributions(layer, heads, written, before[row][real], tensor[row][real])
            else:
                matrix = (heads * written.norm(dim=-1)[:, None]).sum(0)
            rows.append(check_rows(_to_one(matrix), f"layer {layer}").cpu())
        return rows

    def _contributions(self, layer: int, heads: Tensor, written: Tensor, before: Tensor, output: Tensor) -> Tensor:
        before, output = before.float(), output.float()
        norm = self._norm_after(layer)
        scale = torch.ones_like(output)
        if norm is not None:
            eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6))
            gain = self.model.arch.norm_gain(norm)
            assert gain is not None
            scale = gain.to(output.device) * (output.square().mean(-1, keepdim=True) + eps).rsqrt()
        after = before + output * scale  # (position, d_model)
        size = after.abs().sum(-1)
        length = len(after)
        matrix = torch.zeros(length, length, device=after.device)
        step = max(1, _BLOCK // (length * after.shape[-1]))
        for start in range(0, length, step):
            rows = slice(start, start + step)
            parts = torch.einsum("hqk,hkd->qkd", heads[:, rows], written) * scale[rows, None]
            matrix[rows] = size[rows, None] - (after[rows, None] - parts).abs().sum(-1)
        matrix = matrix.clamp(min=0)
        return matrix + torch.diag((size - output.mul(scale).abs().sum(-1)).clamp(min=0))

    def _norm_after(self, layer: int) -> Any:
        """The norm between attention's output and the residual stream, where a family has one."""
        block: Any = self.model.arch.layer(layer)
        name = "post_attention_layernorm"
        return getattr(block, name, None) if self.model.arch.family.pre_mlp_norm != name else None


def _to_one(matrix: Tensor) -> Tensor:
    """Rows divided by their sums; a row of zeros keeps to itself."""
    sums = matrix.sum(-1, keepdim=True)
    itself = torch.eye(len(matrix), device=matrix.device)
    return torch.where(sums > 0, matrix / sums.clamp(min=1e-30), itself)
