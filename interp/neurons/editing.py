"""Remove a concept from the weights: plan, apply and undo edits by Targeted Angular Reversal (TARS).

Source: H. J. Davies, G. Iacovides, D. P. Mandic, "Targeted Angular Reversal of Weights (TARS) for Knowledge Removal in Large
Language Models" (arXiv 2412.10257).

From the paper's abstract: the feed-forward rows that read the space of internal representations and have the highest cosine to
the concept vector (`interp.neurons.concept_vectors`) are replaced by its reverse. All that makes this exact is our own
definition:

1. What the MLP of layer l would read if the residual stream pointed along x:  t = γ_l ⊙ x / |γ_l ⊙ x|, γ_l the gain of its
   pre-MLP norm (x centred first for LayerNorm; its bias is left out; t = x / |x| where no norm stands before the MLP).
   A row w scores cos(w, t): how strongly it answers to the concept, per unit of |w|.
2. The n rows with the highest cosine, of all layers and sites together, become −|w| t. One edit is one row of one matrix.
3. Controls: the same number of random rows of the same layers and sites, reversed in the same way (`random_edit`); the same
   rows zeroed (an `Edit` without `values`). `interp.neurons.edit_effects` measures an edit beside them.

Edits are written in place, into fused (Phi-3) and transposed (GPT-2) matrices too, and taken back bit for bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, ModelError
from interp.model import Model
from interp.neurons.concept_vectors import ConceptVector
from interp.neurons.decoding import checked

SITES = ("gate", "up")


@dataclass(frozen=True)
class Row:
    """One row of a gate or up projection: layer, site, neuron (all 0-based), and its cosine to the concept."""

    layer: int
    site: str
    neuron: int
    cosine: float


@dataclass(frozen=True, eq=False)
class Edit:
    """Rows, and the direction (d_model,) that they are turned away from; without a direction they are zeroed."""

    rows: tuple[Row, ...]
    values: Tensor | None


def plan_edit(
    model: Model,
    vector: ConceptVector | Tensor,
    n: int | None = None,
    *,
    threshold: float | None = None,
    sites: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> Edit:
    """The rows closest to a concept vector: step 1 of the module's docstring. Changes nothing.

    Args:
        model: what `load_model` gave.
        vector: what `concept_vector` gave, or (d_model,) numbers in the residual stream's space.
        n: how many rows, over all layers and sites together; 1 by default.
        threshold: instead of `n`: all rows whose cosine is at least this.
        sites: "gate", "up" or both; by default all that the family has.
        layers: by default all.

    Returns:
        The edit, its rows by falling cosine.

    Raises:
        InputError: an unknown site, a gate where there is none, `n` or `threshold` out of range or both given, no row above the
            threshold (says the highest), a vector of another width, not finite, or zero.
        ModelError: weights that cannot be changed in place: on the meta device, offloaded, or quantised.
    """
    arch = model.arch
    given = vector.values if isinstance(vector, ConceptVector) else vector
    values = given.detach().to("cpu", torch.float32).flatten()
    if len(values) != arch.d_model or not torch.isfinite(values).all() or not values.any():
        raise InputError(f"expected a vector of d_model={arch.d_model} finite numbers, not all zero; got {values}")
    if sites is None:
        sites = SITES if arch.family.gate is not None else ("up",)
    sites = list(dict.fromkeys([sites] if isinstance(sites, str) else sites))
    unknown = [site for site in sites if site not in SITES]
    if unknown or not sites:
        raise InputError(f"sites={sites}; expected some of {', '.join(SITES)}: the rows that read the residual stream")
    chosen = list(dict.fromkeys(range(arch.n_layers) if layers is None else map(arch.check_layer, layers)))
    total = len(chosen) * len(sites) * arch.d_mlp
    if not total or (n is not None and threshold is not None):
        raise InputError(
            f"n={n}, threshold={threshold}, layers={chosen}; expected n or threshold, and at least one layer"
        )
    n = 1 if n is None and threshold is None else n
    if n is not None and not 1 <= n <= total:
        raise InputError(f"n={n} rows; expected 1 … {total}: {len(chosen)} layers × {len(sites)} sites × {arch.d_mlp}")
    if threshold is not None and not 0 < threshold <= 1:
        raise InputError(f"threshold={threshold}; expected a cosine above 0 and at most 1")
    rows = []
    for layer in chosen:
        for site in sites:
            cosines = _cosines(model, values, layer, site)
            best = cosines.topk(min(n, arch.d_mlp)).indices if n else (cosines >= (threshold or 1)).nonzero()[:, 0]
            rows += [Row(layer, site, int(at), float(cosines[at])) for at in best]
            if not n and not len(best):
                rows.append(Row(layer, site, -1, float(cosines.max())))  # only to say how close it came
    rows.sort(key=lambda row: (-row.cosine, row.layer, row.site, row.neuron))
    found = [row for row in rows if row.neuron >= 0][:n]
    if not found:
        raise InputError(
            f"no row has a cosine of at least {threshold} to the vector; the highest is {rows[0].cosine:.3f}"
        )
    return Edit(tuple(found), values)


def random_edit(model: Model, edit: Edit, seed: int = 0) -> Edit:
    """The control: as many random rows of the same layers and sites, none of the edit's own, in the same direction.

    Raises:
        InputError: a layer has not enough other rows.
    """
    generator = np.random.default_rng(seed)
    rows: list[Row] = []
    for layer, site in dict.fromkeys((row.layer, row.site) for row in edit.rows):
        taken = {row.neuron for row in edit.rows if (row.layer, row.site) == (layer, site)}
        others = [neuron for neuron in range(model.arch.d_mlp) if neuron not in taken]
        if len(others) < len(taken):
            raise InputError(
                f"the edit takes {len(taken)} of {model.arch.d_mlp} rows of {site} in layer {layer}, so there are not as many "
                f"others for the random control; use a smaller n or a higher threshold"
            )
        drawn = sorted(generator.choice(others, len(taken), replace=False).tolist())
        cosines = [math.nan] * model.arch.d_mlp if edit.values is None else _cosines(model, edit.values, layer, site)
        rows += [Row(layer, site, neuron, float(cosines[neuron])) for neuron in drawn]
    return Edit(tuple(rows), edit.values)


class AppliedEdit:
    """An edit that is in the weights, as `apply_edit` left it; `undo` takes it back.

    Attributes:
        edit: what was done.
        active: whether it is still there.
    """

    def __init__(self, model: Model, edit: Edit) -> None:
        self.model, self.edit, self.active = model, edit, False
        # Everything that undoing needs is kept before anything is written.
        self._before = [_weight(model, row.layer, row.site)[row.neuron].clone() for row in edit.rows]
        self._after: list[Tensor] = []

    @torch.no_grad()
    def _write(self) -> None:
        self.active = True
        self.model.__dict__.pop("fingerprint", None)  # the weights change, and with them their hash
        for row, before in zip(self.edit.rows, self._before, strict=True):
            weight = _weight(self.model, row.layer, row.site)
            if self.edit.values is None:
                weight[row.neuron] = 0
            else:
                away = -_mlp_input(self.model, self.edit.values, row.layer).to(weight.device)
                weight[row.neuron].copy_(away * before.to(weight.device).float().norm())
            self._after.append(weight[row.neuron].clone())

    @torch.no_grad()
    def _restore(self) -> None:
        for row, before in zip(self.edit.rows, self._before, strict=True):
            _weight(self.model, row.layer, row.site)[row.neuron].copy_(before)
        self.model.__dict__.pop("fingerprint", None)
        self.active = False

    def undo(self) -> None:
        """Give the rows their former values back; a second call does nothing.

        Raises:
            InputError: a row was changed again since: undo that first.
        """
        if not self.active:
            return
        for row, after in zip(self.edit.rows, self._after, strict=True):
            now = _weight(self.model, row.layer, row.site)[row.neuron]
            if not torch.equal(now, after.to(now.device, now.dtype)):
                raise InputError(
                    f"{row.site} row {row.neuron} of layer {row.layer} was changed again: undo that edit first"
                )
        self._restore()


def apply_edit(model: Model, edit: Edit) -> AppliedEdit:
    """Write an edit into the weights, for good or until it is undone.

    Args:
        model: changed in place; its `fingerprint` changes with it.
        edit: what `plan_edit` gave.

    Returns:
        What undoes it, bit for bit.

    Raises:
        ModelError: as `plan_edit`.
    """
    applied = AppliedEdit(model, edit)
    try:
        applied._write()
    except BaseException:
        applied._restore()
        raise
    return applied


@contextlib.contextmanager
def edited(model: Model, edit: Edit) -> Iterator[Edit]:
    """An edit inside a `with` block: the weights are restored bit for bit on leaving it, however it is left."""
    applied = AppliedEdit(model, edit)
    try:
        applied._write()
        yield edit
    finally:
        applied._restore()


@contextlib.contextmanager
def reverse(
    model: Model,
    vector: ConceptVector | Tensor,
    n: int | None = None,
    *,
    threshold: float | None = None,
    sites: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> Iterator[Edit]:
    """Remove a concept inside a `with` block: `plan_edit`, then `edited`. Arguments as there; `apply_edit` for good.

    Example:
        >>> with reverse(model, concept_vector(model, " water"), n=5):                # doctest: +SKIP
        ...     model.generate("The glass was filled with cold")
    """
    with edited(model, plan_edit(model, vector, n, threshold=threshold, sites=sites, layers=layers)) as edit:
        yield edit


def _weight(model: Model, layer: int, site: str) -> Tensor:
    """The rows of a projection as a view of the parameter, so that writing to it reaches the model."""
    arch = model.arch
    module = arch.up_proj(layer) if site == "up" else arch.gate_proj(layer)
    stored: Any = module.weight
    where = f"{site} weights of layer {layer}"
    if stored.is_meta:
        raise ModelError(
            f"{where} are on the meta device (not loaded, or offloaded to CPU or disk) and cannot be changed in place; load the "
            f"whole model on one device"
        )
    rows = None
    if stored.is_floating_point() and stored.numel() == (2 if arch.family.fused else 1) * arch.d_mlp * arch.d_model:
        rows = arch.up_weight(layer) if site == "up" else arch.gate_weight(layer)
    if rows is None or rows.untyped_storage().data_ptr() != stored.untyped_storage().data_ptr():
        raise ModelError(
            f"{where} are {stored.dtype} {tuple(stored.shape)}, no plain matrix that can be changed in place: load the model "
            f"without quantisation"
        )
    return rows


def _mlp_input(model: Model, values: Tensor, layer: int) -> Float[Tensor, " d_model"]:
    """t of step 1: what the layer's MLP reads of a direction, scaled to length 1."""
    norm = model.arch.pre_mlp_norm(layer)
    gain = model.arch.norm_gain(norm)
    if gain is not None:
        values = values.to(gain.device)
        values = (values - values.mean() if model.arch.family.norm == "layer" else values) * gain
    return values / values.norm()


def _cosines(model: Model, values: Tensor, layer: int, site: str) -> Float[Tensor, " d_mlp"]:
    weight = checked(_weight(model, layer, site), f"{site} weights of layer {layer}").float()
    tiny = torch.finfo(torch.float32).tiny
    return (weight @ _mlp_input(model, values, layer).to(weight.device) / weight.norm(dim=1).clamp(min=tiny)).cpu()
