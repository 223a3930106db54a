"""The transformer that is trained on Bigram-Backcopy: small enough to read, open for intervention.

Guo et al. 2024 (arXiv 2410.13835), section 2: learned positions, pre-LayerNorm, attention without biases, a ReLU MLP
four times as wide without biases, an untied output. Weights start as PyTorch's layers do, as theirs did.

1. A model is a sequence of blocks: "both" (attention, then MLP), "attention" or "mlp" alone, each added to the residual
   stream.
2. Attention is softmax, or ReLU: weights ReLU(q·k / √d) / i for the query that sees i keys, which need not sum to 1.
3. Two changes test what drives a sink, in training as well: `start_norm` holds ‖W_O v‖ of key 0 at a given size (its
   direction is learned), and `see_start=False` hides key 0 from all later queries.
4. `trace` gives everything that is measured; `zero` leaves out the output of attention or MLP blocks, such as "mlp.0".
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.errors import InputError

BLOCKS = ("both", "attention", "mlp")
ATTENTIONS = ("softmax", "relu")


@dataclass(frozen=True)
class ToyShape:
    """What a model is made of.

    Attributes:
        blocks: each "both", "attention" or "mlp", from below.
        width: of the residual stream.
        n_heads: of each attention.
        length: most positions.
        vocabulary: tokens.
        attention: "softmax" or "relu".
        start_norm: ‖W_O v‖ per head at key 0, held at this; None: learned like any other.
        see_start: whether queries behind position 0 see it.

    Raises:
        InputError: a value is not one of those, or the width is not a multiple of the heads.
    """

    blocks: tuple[str, ...] = ("both",)
    width: int = 256
    n_heads: int = 1
    length: int = 256
    vocabulary: int = 66
    attention: str = "softmax"
    start_norm: float | None = None
    see_start: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not self.blocks or not set(self.blocks) <= set(BLOCKS):
            raise InputError(f"blocks={self.blocks!r}; expected at least one, each of {', '.join(BLOCKS)}")
        if self.attention not in ATTENTIONS:
            raise InputError(f"attention={self.attention!r}; expected one of {', '.join(ATTENTIONS)}")
        for name in ("width", "n_heads", "length", "vocabulary"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r}; expected a whole number of at least 1")
        if self.width % self.n_heads:
            raise InputError(f"width={self.width} cannot be split among n_heads={self.n_heads}; make it a multiple")
        if self.start_norm is not None and not (math.isfinite(self.start_norm) and self.start_norm >= 0):
            raise InputError(f"start_norm={self.start_norm!r}; expected a length of at least 0, or None")

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Blocks that have attention."""
        return tuple(layer for layer, kind in enumerate(self.blocks) if kind != "mlp")


@dataclass
class Trace:
    """What happened inside, float32; layers without attention have no entry.

    Attributes:
        logits: (sequence, position, vocabulary).
        scores: layer → (sequence, head, query, key) q·k / √d; what a query cannot see is −inf.
        pattern: layer → (sequence, head, query, key) attention weights.
        value_norm: layer → (sequence, head, key) ‖W_O v‖ of each head.
        resid: one (sequence, position, width) for the embedding and for each block's output.
    """

    logits: Tensor
    scores: dict[int, Tensor] = field(default_factory=dict)
    pattern: dict[int, Tensor] = field(default_factory=dict)
    value_norm: dict[int, Tensor] = field(default_factory=dict)
    resid: list[Tensor] = field(default_factory=list)


class ToyModel(nn.Module):
    """A transformer of 1 to 3 (or more) blocks.

    Args:
        shape: what it is made of. Weights are drawn from torch's global generator, as by any torch layer.
    """

    def __init__(self, shape: ToyShape) -> None:
        super().__init__()
        self.shape = shape
        self.token = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.ModuleList(_Block(shape, kind) for kind in shape.blocks)
        self.norm = nn.LayerNorm(shape.width)
        self.output = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(
        self, tokens: Int[Tensor, "sequence position"], zero: Collection[str] = (), into: Trace | None = None
    ) -> Float[Tensor, "sequence position vocabulary"]:
        """Logits of the next token.

        Args:
            tokens: at most `length` positions.
            zero: parts whose output is left out: "attention.0", "mlp.2" …
            into: filled with what happens inside.

        Raises:
            InputError: too many positions, or a part that the model does not have.
        """
        if tokens.shape[-1] > self.shape.length:
            raise InputError(f"{tokens.shape[-1]} positions; this model has {self.shape.length}")
        unknown = set(zero) - set(self.parts())
        if unknown:
            raise InputError(f"zero={sorted(unknown)}; this model's parts are {', '.join(self.parts())}")
        resid = self.token(tokens) + self.position.weight[: tokens.shape[-1]]
        if into is not None:
            into.resid.append(resid.float())
        for layer, block in enumerate(self.blocks):
            resid = block(resid, layer, zero, into)
            if into is not None:
                into.resid.append(resid.float())
        return self.output(self.norm(resid))

    @torch.no_grad()
    def trace(self, tokens: Int[Tensor, "sequence position"], zero: Collection[str] = ()) -> Trace:
        """One pass that keeps everything. Its memory grows with the square of the positions."""
        into = Trace(logits=torch.empty(0))
        into.logits = self(tokens, zero, into).float()
        return into

    def parts(self) -> Iterator[str]:
        """Names of the blocks' parts, from below."""
        for layer, kind in enumerate(self.shape.blocks):
            yield from (f"{part}.{layer}" for part in ("attention", "mlp") if kind in ("both", part))


class _Block(nn.Module):
    def __init__(self, shape: ToyShape, kind: str) -> None:
        super().__init__()
        width = shape.width
        self.attention = _Attention(shape) if kind != "mlp" else None
        self.mlp = None
        if kind != "attention":
            up, down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
            self.mlp = nn.Sequential(nn.LayerNorm(width), up, nn.ReLU(), down)

    def forward(self, resid: Tensor, layer: int, zero: Collection[str], into: Trace | None) -> Tensor:
        if self.attention is not None:
            added = self.attention(resid, layer, into)
            resid = resid if f"attention.{layer}" in zero else resid + added
        if self.mlp is not None and f"mlp.{layer}" not in zero:
            resid = resid + self.mlp(resid)
        return resid


class _Attention(nn.Module):
    def __init__(self, shape: ToyShape) -> None:
        super().__init__()
        self.shape = shape
        self.norm = nn.LayerNorm(shape.width)
        self.query, self.key, self.value, self.out = (nn.Linear(shape.width, shape.width, bias=False) for _ in range(4))

    def forward(self, resid: Tensor, layer: int, into: Trace | None) -> Tensor:
        sequences, positions, width = resid.shape
        heads = self.shape.n_heads
        normed = self.norm(resid)
        query, key, value = (
            linear(normed).view(sequences, positions, heads, -1).transpose(1, 2)  # (sequence, head, position, d_head)
            for linear in (self.query, self.key, self.value)
        )
        if self.shape.start_norm is not None:
            value = self._hold_start(value)
        scores = query @ key.mT / math.sqrt(width // heads)  # (sequence, head, query, key)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores.masked_fill(self._hidden(positions, resid.device), -math.inf)
        if self.shape.attention == "softmax":
            pattern = scores.softmax(-1)
        else:
            visible = torch.arange(1, positions + 1, device=resid.device)
            pattern = scores.relu() / visible[:, None]  # relu(−inf) is 0
        mixed = (pattern.to(value.dtype) @ value).transpose(1, 2).reshape(sequences, positions, width)
        if into is not None:
            into.scores[layer], into.pattern[layer] = scores.float(), pattern.float()
            into.value_norm[layer] = self._written(value).float().norm(dim=-1)
        return self.out(mixed)

    def _hidden(self, positions: int, device: torch.device) -> Tensor:
        """(query, key) what a query cannot see."""
        hidden = torch.ones(positions, positions, dtype=torch.bool, device=device).triu(1)
        if not self.shape.see_start:
            hidden[1:, 0] = True
        return hidden

    def _written(self, value: Tensor) -> Tensor:
        """(sequence, head, position, width) W_O v of each head."""
        by_head = self.out.weight.view(self.shape.width, self.shape.n_heads, -1)  # (width, head, d_head)
        return torch.einsum("shpd,whd->shpw", value, by_head)

    def _hold_start(self, value: Tensor) -> Tensor:
        """Key 0's value, scaled to write a vector of the given length; the gradient can turn it but not shrink it."""
        first = value[:, :, :1]
        length = self._written(first).norm(dim=-1, keepdim=True).clamp_min(1e-6)
        return torch.cat([first * (self.shape.start_norm / length), value[:, :, 1:]], dim=2)
