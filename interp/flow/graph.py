"""Attention as a layered graph whose edges have capacities.

    pattern (layer, head, query, key) ── heads ──► attention (layer, query, key) ── residual ──► capacity (layer, query, key)

1. *Heads* become one matrix a layer: their mean, their maximum, one head, or their mean weighted by what a head writes for a key,
   ‖W_O v‖ (Kobayashi et al., arXiv 2004.10102). Where rows do not sum to 1 afterwards (max, norm) they are divided by their sum.
2. *Residual*: "half" ½ A + ½ I (Abnar & Zuidema, arXiv 2005.00928, section 3), "plus_one" A + I (Vico, arXiv
   2407.06182), "none" A.
3. Instead of attention, `capacity="contribution"` takes what each position adds to the residual stream after attention (Ferrando
   & Voita, arXiv 2403.00824, section 2): max(‖y‖₁ − ‖y − f_j‖₁, 0), over the parts f_j of y, the position's own residual stream
   among them, divided by their sum. There is no further residual edge then.
4. Node (l, i) is position i after l layers; edge (l + 1, i) → (l, j) has capacity[l, i, j].

Patterns are checked: finite, not negative, rows that sum to 1 within what half precision allows (then they are divided
by their sum). Everything is float32, or float64 where a pattern is; a pattern that carries a gradient keeps it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.flow.positions import check_targets, is_causal, is_whole, listed
from interp.model import Model
from interp.provenance import Provenance

RESIDUALS = ("half", "plus_one", "none")
CAPACITIES = ("attention", "contribution")
_NO_PATTERN = (
    "the pattern is empty. A model with sdpa attention returns none: call model.set_attn_implementation('eager'), or give "
    "attention_graph the model and the text; no layers make no graph"
)
_ROW_SUM = 5e-3  # bfloat16 attention rows sum to 1 ± 2e-3


@dataclass(frozen=True, eq=False)
class AttentionGraph:
    """One text's attention as a graph.

    Attributes:
        attention: (layer, query, key) heads made one, before the residual edge.
        residual: "half", "plus_one" or "none".
        tokens: one per position.
        layers: which layers of the model, from below.
        causal: whether positions see no position behind them.
        provenance: the model and how the graph was made.
    """

    attention: Float[Tensor, "layer query key"]
    residual: str
    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    causal: bool
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def capacity(self) -> Float[Tensor, "layer query key"]:
        """Capacities of the edges."""
        return with_residual(self.attention, self.residual)

    @property
    def n_layers(self) -> int:
        """How many layers it has."""
        return self.attention.shape[0]

    def __len__(self) -> int:
        """How many tokens it has."""
        return self.attention.shape[-1]

    def below(self, n_layers: int) -> AttentionGraph:
        """The graph of its first layers alone: what has reached a position after `n_layers` of them.

        Raises:
            InputError: fewer than one layer, or more than there are.
        """
        if not 1 <= n_layers <= self.n_layers:
            raise InputError(f"n_layers={n_layers}; expected 1 … {self.n_layers}, the graph's layers")
        return dataclasses.replace(self, attention=self.attention[:n_layers], layers=self.layers[:n_layers])

    def uniform(self) -> AttentionGraph:
        """The same graph with uniform attention: what position alone explains.

        Contributions hold the residual stream on their diagonal, and so does what stands for them: ½ uniform + ½ I.
        """
        one = torch.ones_like(self.attention[0])
        one = one.tril() if self.causal else one
        rows = one / one.sum(-1, keepdim=True)
        if self.provenance.parameters.get("capacity") == "contribution":
            rows = with_residual(rows, "half")
        return dataclasses.replace(self, attention=rows.expand_as(self.attention))

    def without(self, positions: Sequence[int]) -> AttentionGraph:
        """The same graph without some keys, such as an attention sink: nobody attends to them, rows again sum to what they did.

        A row with nothing else to attend to attends to itself; the removed positions keep themselves alone.

        Raises:
            InputError: a position out of range, or none left.
        """
        removed = check_targets(positions, len(self), "position")
        if len(set(removed)) == len(self):
            raise InputError(f"all {len(self)} positions would be removed; expected at least one to stay")
        kept = torch.ones(len(self), dtype=self.attention.dtype, device=self.attention.device)
        kept[removed] = 0
        before = self.attention.sum(-1, keepdim=True)
        rest = self.attention * kept
        total = rest.sum(-1, keepdim=True)
        itself = torch.eye(len(self), dtype=rest.dtype, device=rest.device) * before
        alone = (total <= 1e-12) | (kept[:, None] == 0)
        rows = torch.where(alone, itself, rest * before / total.clamp(min=1e-12))
        return dataclasses.replace(self, attention=rows)

    def __repr__(self) -> str:
        return (
            f"AttentionGraph({self.n_layers} layers × {len(self)} tokens, residual={self.residual!r}, "
            f"{'causal' if self.causal else 'bidirectional'})"
        )


def attention_graph(
    model: Model | Any,
    text: Any = None,
    *,
    residual: str | None = None,
    heads: str | int | Sequence[int] = "mean",
    capacity: str = "attention",
    layers: Sequence[int] | int | None = None,
    tokens: Sequence[str] | None = None,
    chat: bool = False,
    max_tokens: int = 4096,
    progress: bool | str = False,
) -> Any:
    """The attention graph of a text, of several texts, or of a pattern.

    Args:
        model: what `load_model` gave; or a pattern, and no text.
        text: a text, a sequence of token ids, a list of either; or a pattern (layer, head, query, key), also a list of layers
            (head, query, key) such as a Hugging Face model's `attentions` of one text, or (layer, query, key) with
            heads already made one.
        residual: see the module docstring, 2; "half" by default, "none" for contributions.
        heads: "mean", "max", "norm" (needs a model), a head, or several heads, whose mean is taken.
        capacity: "attention" or "contribution" (needs a causal model, as does heads="norm").
        layers: which layers, in ascending order; all by default.
        tokens: names of a pattern's positions.
        chat: wrap texts in the chat template.
        max_tokens: budget of padded tokens in a batch.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        An `AttentionGraph`; a list of them for a list of texts.

    Raises:
        InputError: see `encode`; an unknown residual, capacity or head; no layers; a pattern that is empty (a model
            with sdpa attention gives none: switch it to eager), of unequal shapes, not finite, negative, or whose rows
            do not sum to 1.
        MemoryBudgetError: the patterns do not fit, with both figures.

    Example:
        >>> pattern = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
        >>> attention_graph(pattern).capacity
        tensor([[[1.0000, 0.0000], [0.2500, 0.7500]]])
    """
    if capacity not in CAPACITIES:
        raise InputError(f"capacity={capacity!r}; expected one of {', '.join(CAPACITIES)}")
    if residual is None:
        residual = "none" if capacity == "contribution" else "half"
    if residual not in RESIDUALS:
        raise InputError(f"residual={residual!r}; expected one of {', '.join(RESIDUALS)}")
    if not isinstance(heads, str):
        heads = [int(head) if is_whole(head) else head for head in listed(heads, "heads")]
    if capacity == "contribution" and (residual != "none" or heads != "mean"):
        raise InputError(
            "contributions hold the residual stream and sum over heads: use residual='none' and heads='mean' with them"
        )
    parameters = {"residual": residual, "heads": heads, "capacity": capacity}
    given = text if isinstance(model, Model) else model
    if isinstance(model, Model) and isinstance(text, (list, tuple)) and not text:
        raise InputError("no texts were given; expected at least one text, or a sequence of token ids")
    if _is_pattern(given):
        if not isinstance(model, Model) and text is not None:
            raise InputError("a pattern and a text were given; give one of them")
        if heads == "norm" or capacity == "contribution":
            raise InputError("heads='norm' and capacity='contribution' need a model and a text, not a pattern")
        if text is None and isinstance(model, Model):
            raise InputError("no text was given; expected a text, token ids or a pattern")
        owner = model if isinstance(model, Model) else None
        return _from_pattern(given, residual, heads, layers, tokens, owner, parameters)
    if isinstance(given, (list, tuple)) and any(one is None for one in given):
        raise InputError(_NO_PATTERN)
    if not isinstance(model, Model):
        raise InputError(
            f"{type(model).__name__} is neither a model nor a pattern; expected what load_model gives, a "
            f"tensor (torch.as_tensor makes one), or a Hugging Face output's .attentions"
        )
    if text is None:
        raise InputError("no text was given; expected a text, token ids or a pattern")
    if tokens is not None:
        raise InputError("tokens name a pattern's positions; a text has its own")
    from interp.flow.patterns import attention_of_texts

    text = text.tolist() if hasattr(text, "tolist") else text  # ids of torch or numpy
    if not hasattr(text, "__len__"):
        raise InputError(f"the text is {text!r}; expected a text, token ids, or a list of either")
    single = isinstance(text, str) or (
        len(text) > 0 and not isinstance(text[0], str) and not hasattr(text[0], "__len__")
    )
    encoded = model.encode([text] if single else text, chat=chat)
    chosen = check_layers(layers, model.arch.n_layers)
    found = attention_of_texts(model, encoded, chosen, heads, capacity, max_tokens=max_tokens, progress=progress)
    provenance = Provenance.collect(model, parameters={**parameters, "layers": list(chosen)})
    causal = model.arch.family.decoder and all(is_causal(one) for one in found)
    graphs = [
        AttentionGraph(attention, residual, names(model, ids), tuple(chosen), causal, provenance)
        for attention, ids in zip(found, encoded, strict=True)
    ]
    return graphs[0] if single else graphs


def with_residual(attention: Float[Tensor, "*batch query key"], residual: str) -> Float[Tensor, "*batch query key"]:
    """Capacities from attention: see the module docstring, 2."""
    if residual == "none":
        return attention
    identity = torch.eye(attention.shape[-1], dtype=attention.dtype, device=attention.device)
    return 0.5 * attention + 0.5 * identity if residual == "half" else attention + identity


def merge_heads(pattern: Float[Tensor, "*batch head query key"], heads: str | int | Sequence[int]) -> Tensor:
    """(…, query, key) from the heads of a pattern; "norm" is not done here.

    Raises:
        InputError: an unknown name, or a head out of range.
    """
    if isinstance(heads, str):
        if heads == "mean":
            return pattern.mean(-3)
        if heads == "max":
            merged = pattern.amax(-3)
            return merged / merged.sum(-1, keepdim=True)
        raise InputError(f"heads={heads!r}; expected 'mean', 'max', 'norm', a head, or several heads")
    n_heads = pattern.shape[-3]
    chosen = listed(heads, "heads")
    if any(not is_whole(head) or not -n_heads <= head < n_heads for head in chosen):
        raise InputError(f"heads={heads!r}; expected heads from 0 to {n_heads - 1}")
    return pattern[..., chosen, :, :].mean(-3)


def check_layers(layers: Sequence[int] | int | None, n_layers: int) -> list[int]:
    """Layers as ascending indices from 0; all of them for `None`.

    Raises:
        InputError: none, out of range, twice, or not ascending.
    """
    chosen = list(range(n_layers)) if layers is None else listed(layers, "layers")
    if any(not is_whole(layer) or not -n_layers <= layer < n_layers for layer in chosen):
        raise InputError(f"layers={chosen}; expected layers from 0 to {n_layers - 1}")
    chosen = [int(layer) % n_layers for layer in chosen]
    if sorted(set(chosen)) != chosen:
        raise InputError(f"layers={chosen}; expected each layer once, in ascending order")
    return chosen


def check_rows(attention: Tensor, what: str = "attention") -> Tensor:
    """The same rows divided by their sums, which must be 1 within half precision.

    Raises:
        InputError: NaN, infinite or negative weights, or other sums; it says where.
    """
    values = attention.detach()
    bad = ~torch.isfinite(values) | (values < 0)
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        raise InputError(f"{what} at {at} is {values[tuple(at)].item():.4g}; expected finite weights of at least 0")
    sums = attention.sum(-1, keepdim=True)
    off = (sums.detach() - 1).abs() > _ROW_SUM
    if bool(off.any()):
        at = off.nonzero()[0].tolist()
        raise InputError(
            f"{what}: row {at[:-1]} sums to {sums.detach()[tuple(at)].item():.4g}; expected rows that sum to 1, as softmax "
            f"gives them"
        )
    return attention / sums


def names(model: Model, ids: Sequence[int]) -> tuple[str, ...]:
    """Tokens as text; ids where there is no tokenizer."""
    if model.tokenizer is None:
        return tuple(str(token) for token in ids)
    return tuple(model.decode([token], skip_special_tokens=False) for token in ids)


def _is_pattern(given: Any) -> bool:
    if isinstance(given, Tensor):
        return given.is_floating_point()
    return isinstance(given, (list, tuple)) and (
        len(given) == 0 or all(isinstance(one, Tensor) and one.is_floating_point() for one in given)
    )


def _from_pattern(
    given: Any,
    residual: str,
    heads: Any,
    layers: Sequence[int] | int | None,
    tokens: Sequence[str] | None,
    model: Model | None,
    parameters: dict[str, Any],
) -> AttentionGraph:
    if isinstance(given, (list, tuple)):
        if not given:
            raise InputError(_NO_PATTERN)
        shapes = [tuple(one.shape) for one in given]
        if len(set(shapes)) > 1:
            raise InputError(f"the layers' patterns have shapes {sorted(set(shapes))}; expected one shape")
        # Hugging Face keeps a batch dimension; a batch of one is one text.
        given = torch.stack([one[0] if one.ndim == 4 and one.shape[0] == 1 else one for one in given])
    if given.ndim not in (3, 4) or given.shape[-1] != given.shape[-2]:
        raise InputError(
            f"the pattern has shape {tuple(given.shape)}; expected (layer, head, query, key) or (layer, query, key) with as many "
            f"queries as keys, one text at a time"
        )
    if 0 in given.shape:
        raise InputError(f"the pattern has shape {tuple(given.shape)}; expected at least one layer, head and token")
    chosen = check_layers(layers, given.shape[0])
    pattern = check_rows(given[chosen].float() if given.dtype != torch.float64 else given[chosen], "the pattern")
    if given.ndim == 3 and heads != "mean":
        raise InputError(
            f"heads={heads!r}, but the pattern (layer, query, key) has no heads left; give (layer, head, query, key)"
        )
    attention = merge_heads(pattern, heads) if given.ndim == 4 else pattern
    length = attention.shape[-1]
    if tokens is not None and len(tokens) != length:
        raise InputError(f"{len(tokens)} tokens were given for a pattern of {length} positions")
    named = tuple(tokens) if tokens is not None else tuple(str(at) for at in range(length))
    causal = is_causal(attention)
    provenance = Provenance.collect(model, parameters={**parameters, "layers": chosen})
    return AttentionGraph(attention, residual, named, tuple(chosen), causal, provenance)
