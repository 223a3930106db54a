"""Gradient ascent of a prompt's attention flows by its token embeddings; the weights stay as they are.

    embeddings + δ ──► flow A_i of each concept (`interp.flow.embedded_flows`) ──► objective
           ▲                                                                          │
           └──────────────────── Adam on δ, prompt by prompt ◄── its gradient ◄───────┘

1. *Objectives*, both maximised (Yang & Wang, arXiv 2407.06182, section 3): "min": min_i A_i; "variance":
   −Σ_i (A_i − mean A)².
2. *Steps*: δ starts at 0. Prompts share a forward pass, but each has a graph and an Adam of its own (Adam is
   elementwise). Adam's ε is far below the gradients: through many layers they are small, and only their direction
   counts.
3. *Stop*, prompt by prompt: where the smallest flow has reached `threshold` times their mean; after a step that takes
   ‖δ‖ / ‖embeddings‖ to `max_norm`, where δ is scaled back to it; where the gradient is zero ("flat").
4. The iterate with the highest objective is kept, δ = 0 among them: a step too far is not.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.batching import Batch, available_memory, check_memory, for_each_batch, token_batches
from interp.capture import estimate_bytes
from interp.errors import InputError
from interp.flow.embedded_flows import concept_flows, embedded
from interp.flow.positions import Group
from interp.model import Model

OBJECTIVES = ("min", "variance")
DIFFERENTIABLE = ("soft", "exact", "widest", "rollout")
# Adam's: on the embedded model gradients at the embeddings are 1e-3 (exact) to 1e-9 (rollout).
_EPSILON = 1e-20


@dataclass(frozen=True)
class Settings:
    """How to ascend.

    Attributes:
        objective: "min" or "variance".
        method: of the flow, see `DIFFERENTIABLE`.
        steps: most steps.
        learning_rate: of Adam, as a share of the embeddings' root mean square: the first step moves each coordinate by
            that much, and so takes ‖δ‖ / ‖embeddings‖ to it.
        threshold: stop where the smallest flow is this share of their mean.
        max_norm: stop where ‖δ‖ is this share of the embeddings' norm (Frobenius, over the prompt).
        temperature, bias: of "soft", see `interp.flow.widest`.
        residual: of the graph, see `interp.flow.graph`.
    """

    objective: str
    method: str
    steps: int
    learning_rate: float
    threshold: float
    max_norm: float
    temperature: float
    bias: str
    residual: str


@dataclass(frozen=True)
class Ascent:
    """What became of one prompt.

    Attributes:
        delta: (position, d_model) float32, on the CPU.
        steps: steps that were taken.
        stopped: "threshold", "norm", "flat" or "steps".
        trace: (step + 1, concept) flows by the method, before the first step and after each.
        kept: the step whose δ is given back.
    """

    delta: Float[Tensor, "position d_model"]
    steps: int
    stopped: str
    trace: Float[np.ndarray, "step concept"]
    kept: int


@dataclass
class _State:
    """Adam of one prompt."""

    delta: Tensor
    first: Tensor
    second: Tensor
    best: Tensor
    steps: int = 0
    kept: int = 0
    highest: float = -math.inf
    full: bool = False
    stopped: str = ""
    trace: list[np.ndarray] = field(default_factory=list)


def ascend(
    model: Model,
    encoded: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Group]],
    settings: Settings,
    *,
    max_tokens: int = 1024,
    progress: bool | str = False,
) -> list[Ascent]:
    """Perturbations of each prompt's embeddings that equalise its flows.

    Args:
        model: a decoder.
        encoded: token ids of each prompt.
        groups: of each prompt, the positions of each concept.
        settings: see `Settings`.
        max_tokens: budget of padded tokens in a batch, cut further where the gradient would not fit.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        One `Ascent` per prompt.

    Raises:
        InputError: a gradient that is not finite (the prompt is named), attention that is not.
        ModelError: the model gives no attention patterns.
        MemoryBudgetError: one prompt alone does not fit.
    """
    found: dict[int, Ascent] = {}

    def step(batch: Batch) -> None:
        found.update(_ascend_batch(model, batch.to(model.device), groups, settings))

    budget = _budget(model, encoded, max_tokens)
    with _frozen(model), model.attention_implementation("eager"):
        for_each_batch(
            token_batches(encoded, max_tokens=budget, pad_id=model.pad_id), step, progress=progress, unit="prompt"
        )
    return [found[prompt] for prompt in range(len(encoded))]


def objective_value(flows: Float[Tensor, " concept"], objective: str) -> Float[Tensor, ""]:
    """What is ascended: see the module docstring, 1.

    Example:
        >>> import torch
        >>> [float(objective_value(torch.tensor([0.25, 0.75]), name)) for name in ("min", "variance")]
        [0.25, -0.125]
    """
    return flows.min() if objective == "min" else -(flows - flows.mean()).square().sum()


def _ascend_batch(
    model: Model, batch: Batch, groups: Sequence[Sequence[Group]], settings: Settings
) -> dict[int, Ascent]:
    start = embedded(model, batch)
    sizes, states = [], []
    for row in range(batch.size):
        own = start[row][batch.mask[row]]
        own = own if own.dtype == torch.float64 else own.float()
        sizes.append(own.norm().item())
        zero = torch.zeros_like(own)
        states.append(_State(zero, zero.clone(), zero.clone(), zero.clone()))
    # One pass more than steps: the last iterate is looked at too.
    for last in [False] * settings.steps + [True]:
        active = [row for row in range(batch.size) if not states[row].stopped]
        if not active:
            break
        rows = torch.tensor(active, device=batch.mask.device)
        width = int(batch.lengths[rows].max())
        part = Batch(
            batch.input_ids[rows, :width],
            batch.mask[rows, :width],
            tuple(batch.rows[row] for row in active),
            batch.side,
        )
        deltas = [states[row].delta.clone().requires_grad_() for row in active]
        with torch.enable_grad():
            flows = concept_flows(
                model,
                embedded(model, part, deltas),
                part,
                [groups[prompt] for prompt in part.rows],
                method=settings.method,
                residual=settings.residual,
                temperature=settings.temperature,
                bias=settings.bias,
            )
            values = [objective_value(one, settings.objective) for one in flows]
            going = [
                at
                for at, row in enumerate(active)
                if _look(states[row], flows[at].detach(), float(values[at].detach()), settings, last)
            ]
            if not going:
                continue
            gradients = torch.autograd.grad(
                torch.stack([values[at] for at in going]).sum(), [deltas[at] for at in going]
            )
        for at, gradient in zip(going, gradients, strict=True):
            if not bool(torch.isfinite(gradient).all()):
                raise InputError(
                    f"the gradient of prompt {part.rows[at]} is not finite at step {states[active[at]].steps}: use a "
                    f"smaller learning_rate, a larger temperature, or float32 weights"
                )
            _adam(states[active[at]], gradient, sizes[active[at]], settings)
    return {
        prompt: Ascent(state.best.cpu(), state.steps, state.stopped, np.stack(state.trace), state.kept)
        for prompt, state in zip(batch.rows, states, strict=True)
    }


def _look(state: _State, flows: Tensor, value: float, settings: Settings, last: bool) -> bool:
    """Takes in the flows of an iterate; whether to go on."""
    state.trace.append(flows.double().cpu().numpy())
    if value > state.highest:
        state.highest, state.best, state.kept = value, state.delta, state.steps
    mean = float(flows.mean())
    if mean > 0 and float(flows.min()) >= settings.threshold * mean:
        state.stopped = "threshold"
    elif state.steps and state.full:
        state.stopped = "norm"
    elif last:
        state.stopped = "steps"
    return not state.stopped


def _adam(state: _State, gradient: Tensor, size: float, settings: Settings) -> None:
    """One step upwards (Kingma & Ba 2015, β = .9 and .999)."""
    if not bool(gradient.any()):
        state.stopped = "flat"
        return
    state.steps += 1
    state.first = 0.9 * state.first + 0.1 * gradient
    state.second = 0.999 * state.second + 0.001 * gradient.square()
    mean = state.first / (1 - 0.9**state.steps)
    square = state.second / (1 - 0.999**state.steps)
    rate = settings.learning_rate * size / gradient.numel() ** 0.5
    state.delta = state.delta + rate * mean / (square.sqrt() + _EPSILON)
    norm, most = state.delta.norm().item(), settings.max_norm * size
    if norm >= most:
        state.delta, state.full = state.delta * (most / norm), True


def _budget(model: Model, encoded: Sequence[Sequence[int]], max_tokens: int) -> int:
    """Padded tokens in a batch: what every layer keeps for the gradient has to fit."""
    longest, n_layers = max(len(ids) for ids in encoded), model.arch.n_layers

    def needed(n_prompts: int) -> int:
        return n_layers * estimate_bytes(model, {"pattern"}, n_prompts, longest)

    check_memory(needed(1), model.device, f"the gradient through {n_layers} layers of one prompt of {longest} tokens")
    while max_tokens > longest and needed(max(1, max_tokens // longest)) > 0.5 * available_memory(model.device):
        max_tokens //= 2
    return max_tokens


@contextlib.contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """No gradients of weights: what they would keep is not kept. Afterwards each is as it was."""
    wanted = [parameter for parameter in model.hf.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
