"""A loaded module's layers, projections, norms and head, by the same names for every family.

An `Architecture` is a row of the table of families (`interp.families`) applied to a loaded module; everything else in interp
reads modules and weights through it.

    layers[l] ── attention ── o_proj          site "pattern": attention weights   (batch, head, query, key)
       │             └─────────────────────── site "z": input of o_proj           (batch, position, head · d_head)
       ├── pre_mlp_norm                       site "attn_out": attention's output (batch, position, d_model)
       └── up, gate ── product ── down        sites "up", "gate", "hidden"        (batch, position, d_mlp)
                                              site "mlp_out": output of down      (batch, position, d_model)
    sites "resid_pre", "resid_post": a layer's input and output; site "logits": the model's, with Gemma 2's soft cap

Weights are handed out as `(d_mlp, d_model)`, one row per neuron, also where a family fuses gate and up in one matrix
(Phi-3) or stores the transpose (GPT-2's Conv1D).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.errors import InputError, ModelError
from interp.families import FAMILIES, Family, family_of, register, text_config

__all__ = [
    "FAMILIES",
    "LAYER_SITES",
    "NEURON_SITES",
    "SITES",
    "Architecture",
    "Family",
    "Site",
    "family_of",
    "register",
]

NEURON_SITES = ("up", "gate", "hidden")
LAYER_SITES = ("resid_pre", "resid_post", "attn_out", "pattern", "z", *NEURON_SITES, "mlp_out")
SITES = (*LAYER_SITES, "logits")


@dataclass(frozen=True)
class Site:
    """A tensor inside the model that probes read and interventions change.

    Attributes:
        name: one of `SITES`.
        layer: 0-based layer; -1 for "logits".
        module: the module whose call carries the tensor.
        side: "input" (first positional argument) or "output".
        index: which element of a tuple output; `None` if the output is the tensor itself or its first element.
        columns: the part of the last dimension, where a family fuses several projections in one.
    """

    name: str
    layer: int
    module: nn.Module
    side: str
    index: int | None = None
    columns: slice | None = None

    def attach(self, visit: Callable[[Tensor], Tensor | None]) -> torch.utils.hooks.RemovableHandle:
        """Call `visit(tensor)` whenever the module runs; a returned tensor takes the tensor's place."""
        if self.side == "input":

            def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
                name = None if args else next(iter(kwargs))
                new = visit(args[0] if name is None else kwargs[name])
                if new is None:
                    return None
                return ((new, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: new})

            return self.module.register_forward_pre_hook(before, with_kwargs=True)

        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            at = self.index or 0
            named = self.name == "logits" and not isinstance(output, tuple)
            elements = output if isinstance(output, tuple) else (output.logits if named else output,)
            whole = elements[at] if at < len(elements) else None
            if whole is None:
                raise ModelError(
                    f"{type(module).__name__} of layer {self.layer} gave no attention weights: the model runs with a "
                    f"fused attention; load it with attention='eager'"
                )
            tensor = whole if self.columns is None else whole[..., self.columns]
            new = visit(tensor)
            if new is None or new is tensor:  # a slice that was changed in place changed `whole`
                return None
            if self.columns is not None:
                whole = whole.clone()
                whole[..., self.columns] = new
                new = whole
            if named:
                output.logits = new
                return output
            return (*output[:at], new, *output[at + 1 :]) if isinstance(output, tuple) else new

        return self.module.register_forward_hook(after)


class Architecture:
    """A family's table row applied to one loaded module.

    Attributes:
        family: the row.
        n_layers, d_model, d_mlp, n_heads, n_kv_heads, d_head, vocab_size, n_positions: sizes; `n_positions` is the
            longest context, or `None` where the config states none.
    """

    def __init__(self, hf: nn.Module) -> None:
        self.hf = hf
        self.config = text_config(hf.config)
        self.family = family_of(hf.config)
        self._layers = self._first(self.family.layers)
        if self._layers is None:
            raise ModelError(
                f"{type(hf).__name__} has none of {self.family.layers}; a {self.family.name} model keeps its layers there"
            )
        self.n_layers = len(self._layers)
        self.d_model = int(self.config.hidden_size)
        self.n_heads = int(self.config.num_attention_heads)
        self.n_kv_heads = int(getattr(self.config, "num_key_value_heads", None) or self.n_heads)
        self.d_head = int(getattr(self.config, "head_dim", None) or self.d_model // self.n_heads)
        self.d_mlp = self._d_mlp()
        embedding: Any = self.embedding()
        self.vocab_size = int(embedding.weight.shape[0])
        positions = getattr(self.config, "max_position_embeddings", None)
        self.n_positions = int(positions) - self._unused_positions() if positions else None

    def _unused_positions(self) -> int:
        """RoBERTa's positions begin behind the padding id."""
        counted = str(getattr(self.config, "model_type", "")) in ("roberta", "xlm-roberta")
        return int(self.config.pad_token_id or 0) + 1 if counted else 0

    def _d_mlp(self) -> int:
        width = getattr(self.config, "intermediate_size", None) or getattr(self.config, "n_inner", None)
        return int(width or 4 * self.d_model)

    def _first(self, paths: tuple[str, ...], root: nn.Module | None = None) -> Any:
        for path in paths:
            module: Any = self.hf if root is None else root
            for part in path.split("."):
                module = getattr(module, part, None)
                if module is None:
                    break
            if module is not None:
                return module
        return None

    def check_layer(self, layer: SupportsIndex) -> int:
        """`layer` as a non-negative index; negative counts from the end.

        Raises:
            InputError: out of range, or not a whole number.
        """
        return _index(layer, self.n_layers, "layer", "the model has", "layers")

    def check_neuron(self, neuron: SupportsIndex) -> int:
        """`neuron` as a non-negative index into d_mlp.

        Raises:
            InputError: out of range, or not a whole number.
        """
        return _index(neuron, self.d_mlp, "neuron", "a layer has", "neurons")

    def check_head(self, head: SupportsIndex) -> int:
        """`head` as a non-negative index.

        Raises:
            InputError: out of range, or not a whole number.
        """
        return _index(head, self.n_heads, "head", "a layer has", "heads")

    # Modules

    def layer(self, layer: int) -> nn.Module:
        """Layer `layer`'s block."""
        return self._layers[self.check_layer(layer)]

    def _part(self, layer: int, path: str | None, what: str) -> Any:
        if path is None:
            raise InputError(f"{self.family.name} has no {what}")
        module = self._first((path,), self.layer(layer))
        if module is None:
            raise ModelError(f"layer {layer} of {type(self.hf).__name__} has no {path!r} ({what})")
        return module

    def attention(self, layer: int) -> nn.Module:
        """The module that returns `(attention output, pattern)`."""
        return self._part(layer, self.family.attention, "attention")

    def o_proj(self, layer: int) -> nn.Module:
        """The attention's output projection."""
        return self._part(layer, self.family.o_proj, "attention output projection")

    def up_proj(self, layer: int) -> nn.Module:
        """The up projection (of a fused family: the module that holds it)."""
        return self._part(layer, self.family.up, "up projection")

    def gate_proj(self, layer: int) -> nn.Module:
        """The gate projection; families without a gate raise `InputError`."""
        return self._part(layer, self.family.gate, "gate projection (its MLP is not gated; use 'up' or 'hidden')")

    def down_proj(self, layer: int) -> nn.Module:
        """The down projection."""
        return self._part(layer, self.family.down, "down projection")

    def final_norm(self) -> nn.Module | None:
        """The norm before the LM head, `None` for encoders."""
        return self._first(self.family.final_norm)

    def pre_mlp_norm(self, layer: int) -> nn.Module | None:
        """The norm whose output the MLP reads; `None` where the MLP reads the residual stream itself."""
        return None if self.family.pre_mlp_norm is None else self._part(layer, self.family.pre_mlp_norm, "pre-MLP norm")

    def lm_head(self) -> nn.Module:
        """The LM head.

        Raises:
            ModelError: the module was loaded without one.
        """
        head = self._first(self.family.head)
        if head is None:
            raise ModelError(
                f"{type(self.hf).__name__} has no LM head ({' or '.join(self.family.head)}); load the causal LM class, "
                f"for example AutoModelForCausalLM"
            )
        return head

    def embedding(self) -> nn.Module:
        """The token embedding."""
        module = self._first(self.family.embedding)
        if module is None:
            raise ModelError(f"{type(self.hf).__name__} has none of {self.family.embedding} (token embedding)")
        return module

    # Weights: one row per neuron

    def _rows(self, module: nn.Module, writes: bool = False) -> Tensor:
        weight = stored_weight(module, "weight")
        return weight if self.family.transposed == writes else weight.T

    def up_weight(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """Rows of the up projection: what each neuron reads."""
        rows = self._rows(self.up_proj(layer))
        return rows[self.d_mlp :] if self.family.fused else rows

    def gate_weight(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """Rows of the gate projection."""
        rows = self._rows(self.gate_proj(layer))
        return rows[: self.d_mlp] if self.family.fused else rows

    def down_weight(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """Columns of the down projection as rows: what each neuron writes."""
        return self._rows(self.down_proj(layer), writes=True)

    def output_weight(self, layer: int) -> Float[Tensor, "n_heads d_head d_model"]:
        """The attention's output projection by head: a head's value vector `v` adds `v @ weight[head]`."""
        rows = self._rows(self.o_proj(layer), writes=True)
        return rows.reshape(self.n_heads, self.d_head, self.d_model)

    def head_weight(self) -> Float[Tensor, "vocab d_model"]:
        """The LM head's matrix."""
        return stored_weight(self.lm_head(), "weight")

    def norm_gain(self, norm: nn.Module | None) -> Float[Tensor, " d_model"] | None:
        """A norm's multiplicative gain in float32, or `None` for no norm."""
        return None if norm is None else stored_weight(norm, "weight").float() + self.family.norm_offset

    def norm_bias(self, norm: nn.Module | None) -> Float[Tensor, " d_model"] | None:
        """A LayerNorm's bias in float32; `None` where there is none."""
        if norm is None or getattr(norm, "bias", None) is None:
            return None
        return stored_weight(norm, "bias").float()

    # Sites

    def site(self, name: str, layer: int = -1) -> Site:
        """Where `name` can be read and changed at `layer`.

        Raises:
            InputError: the name is unknown, the layer is out of range, or the family has no such site.
        """
        if name == "logits":
            self.lm_head()  # says so where there is none
            return Site(name, -1, self.hf, "output")
        if name not in LAYER_SITES:
            raise InputError(f"unknown site {name!r}; expected one of {', '.join(SITES)}")
        layer = self.check_layer(layer)
        if name in ("resid_pre", "resid_post"):
            return Site(name, layer, self.layer(layer), "input" if name == "resid_pre" else "output")
        if name == "attn_out":
            # BERT-like attention modules end before the output projection.
            module = self.attention(layer) if self.family.decoder else self.o_proj(layer)
            return Site(name, layer, module, "output", index=0)
        if name == "pattern":
            return Site(name, layer, self.attention(layer), "output", index=1)
        if name == "z":
            return Site(name, layer, self.o_proj(layer), "input")
        if name == "hidden":
            return Site(name, layer, self.down_proj(layer), "input")
        if name == "mlp_out":
            return Site(name, layer, self.down_proj(layer), "output")
        module = self.up_proj(layer) if name == "up" else self.gate_proj(layer)
        columns = None
        if self.family.fused:
            columns = slice(self.d_mlp, None) if name == "up" else slice(0, self.d_mlp)
        return Site(name, layer, module, "output", columns=columns)


def stored_weight(module: nn.Module, name: str) -> Tensor:
    """A parameter's values, also where accelerate offloaded them to CPU or disk and left a meta tensor behind.

    Raises:
        ModelError: the parameter is on the meta device and no offloaded copy is known.
    """
    weight = getattr(module, name)
    if not weight.is_meta:
        return weight.detach()
    for hook in offload_hooks(module):
        weights = getattr(hook, "weights_map", None)
        if weights is not None:
            return weights[name]
    raise ModelError(
        f"{type(module).__name__}.{name} is on the meta device: it has a shape but no values; load the weights first"
    )


def offload_hooks(module: nn.Module) -> tuple[Any, ...]:
    """The hooks with which accelerate places a module's weights, if any."""
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,)))  # several are kept in a SequentialHook


def _index(value: Any, size: int, what: str, who: str, unit: str) -> int:
    try:
        index = operator.index(value)  # also numpy's and torch's integers
    except TypeError as error:
        raise InputError(f"{what} {value!r} is not a whole number; {who} {size} {unit}") from error
    if not -size <= index < size:
        raise InputError(f"{what} {index} is out of range: {who} {size} {unit} (0 … {size - 1})")
    return index % size
