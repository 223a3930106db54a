"""Attributions from gradients of the target with respect to token embeddings: captum's methods on batches of examples.

1. What all examples begin with and is not explained, such as a few-shot prompt, is computed once; its keys and values
   stand before every input (`interp.agreement.prefix_tree`).
2. Inputs x and baselines x₀ are embeddings of the rest, equal where nothing is explained; examples of one length share a
   batch, and integration steps share it with them. Gradients that run out of memory are taken of half as many rows.
3. A token's score is the sum over its embedding's entries. Of a word's tokens they are summed again.
4. *Integrated gradients* double their steps on the examples whose completeness error |Σ − (f(x) − f(x₀))| / |f(x) − f(x₀)| is
   above the tolerance, up to a cap.

GradientSHAP draws from numpy and torch; each example has its own draws (as in `interp.agreement.perturbations`), so batches do
not matter. DeepLIFT needs every non-linearity to be a module that captum knows: on most Hugging Face models it is gradient ×
(x − x₀), which the completeness error shows. Sources: integrated gradients, arXiv 1703.01365; input × gradient and
DeepLIFT, arXiv 1704.02685; GradientSHAP and DeepSHAP, arXiv 1705.07874.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.agreement.coalitions import Coalitions
from interp.agreement.perturbations import draws_seed, own_draws
from interp.agreement.prefix_tree import padded_logits
from interp.batching import Batch, for_each_batch, token_batches
from interp.errors import InputError

# (inputs, baselines, examples' indices) -> attributions (batch, position, d_model)
Attribute = Callable[[Tensor, Tensor, Tensor], Tensor]


class EmbeddingTarget(nn.Module):
    """The target as a function of embeddings, a row per input.

    Args:
        coalitions: the examples.

    Attributes:
        skip: how many first tokens are cached and not part of the inputs.
        calls: per example, how many inputs went through the model.
        at_once: padded tokens that go forward and backward at once; half of it after running out of memory.
    """

    def __init__(self, coalitions: Coalitions) -> None:
        super().__init__()
        self.hf: Any = coalitions.model.hf  # a submodule: DeepLIFT looks for non-linearities below
        self.coalitions = coalitions
        self.skip = len(coalitions.prefix.ids)
        self.calls = np.zeros(len(coalitions), dtype=np.int64)
        self.at_once = gradient_budget(coalitions)

    def gradients(
        self, forward_fn: Any, inputs: Any, target_ind: Any = None, additional_forward_args: Any = None
    ) -> tuple[Tensor]:
        """What captum takes for its `gradient_func`: a row's gradient is its own, so rows may go one after the other."""
        (embedded,), given = inputs, additional_forward_args
        examples: Tensor = given[0] if isinstance(given, tuple) else given
        found = torch.empty_like(embedded)

        def step(batch: Batch) -> None:
            rows, before = list(batch.rows), self.calls.copy()
            try:
                with torch.enable_grad():
                    part = embedded[rows].detach().requires_grad_()
                    (gradient,) = torch.autograd.grad(self(part, examples[rows]).sum(), part)
                found[rows] = gradient
            except (RuntimeError, MemoryError):
                self.calls[:], self.at_once = before, max(1, batch.tokens // 2)
                raise

        for_each_batch(token_batches([range(embedded.shape[1])] * len(embedded), max_tokens=self.at_once), step)
        return (found,)

    def forward(self, embedded: Float[Tensor, "batch position d_model"], examples: Int[Tensor, ...]) -> Tensor:
        """(batch) targets."""
        embedded = embedded.to(self.coalitions.model.dtype)  # captum's GradientShap mixes in float32
        rows = examples.reshape(-1).tolist()
        rows = rows * (len(embedded) // len(rows))  # captum's DeepLiftShap repeats inputs, not a single index
        np.add.at(self.calls, rows, 1)
        encoded = [self.coalitions.encoded[row] for row in rows]
        lengths = torch.tensor([len(one.ids) - self.skip for one in encoded], device=embedded.device)
        readout = self.coalitions.readout(encoded[0].n_reads)
        logits = padded_logits(self.coalitions.model, embedded, lengths, readout, self.coalitions.prefix)
        return self.coalitions.reduce(logits, rows)


def input_x_gradient(
    coalitions: Coalitions, examples: Sequence[int], seed: int, progress: Any = False
) -> tuple[list[np.ndarray], np.ndarray]:
    """x · gradient at x: captum's InputXGradient, which knows no baseline (complete for a linear target and x₀ = 0).

    Args:
        coalitions: the examples and their target.
        examples: which.
        seed: not used; the same signature for all.
        progress: a progress bar on stderr.

    Returns:
        Per example (token) scores in the target's unit, NaN where a gradient is not finite; and the model calls per example.
    """
    from captum.attr import InputXGradient

    target = EmbeddingTarget(coalitions)

    def attribute(inputs: Tensor, baselines: Tensor, which: Tensor) -> Tensor:
        return _with_gradients(InputXGradient(target)).attribute(inputs, additional_forward_args=which)

    return _in_batches(target, examples, attribute, progress, one_length=False)


def integrated_gradients(
    coalitions: Coalitions,
    examples: Sequence[int],
    seed: int,
    progress: Any = False,
    *,
    n_steps: int = 50,
    max_steps: int = 200,
    tolerance: float = 0.05,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Captum's IntegratedGradients (Gauss–Legendre), steps doubled until complete.

    Args:
        coalitions, examples, seed, progress: see `input_x_gradient`.
        n_steps: first number of steps.
        max_steps: cap of the doubling.
        tolerance: completeness error that is good enough.

    Returns:
        As `input_x_gradient`.
    """
    from captum.attr import IntegratedGradients

    if not 1 <= n_steps <= max_steps or not tolerance >= 0:
        raise InputError(
            f"integrated_gradients: n_steps={n_steps}, max_steps={max_steps}, tolerance={tolerance}; expected 1 ≤ n_steps ≤ "
            f"max_steps and a tolerance of at least 0"
        )
    target = EmbeddingTarget(coalitions)
    found: dict[int, np.ndarray] = {}
    waiting, steps = list(examples), n_steps
    while waiting:

        def attribute(inputs: Tensor, baselines: Tensor, which: Tensor, steps: int = steps) -> Tensor:
            rows = max(len(inputs), gradient_budget(coalitions) // inputs.shape[1])
            return _with_gradients(IntegratedGradients(target)).attribute(
                inputs, baselines, additional_forward_args=which, n_steps=steps, internal_batch_size=rows
            )

        scores, _ = _in_batches(target, waiting, attribute, progress, one_length=True)
        found.update(zip(waiting, scores, strict=True))
        steps *= 2
        if steps > max_steps:
            break
        waiting = [
            example for example in waiting if not completeness_error(coalitions, example, found[example]) <= tolerance
        ]
        # What is not finite, or has no difference to share out, does not get better with more steps.
        waiting = [at for at in waiting if np.isfinite(completeness_error(coalitions, at, found[at]))]
    return [found[example] for example in examples], target.calls


def gradient_shap(
    coalitions: Coalitions, examples: Sequence[int], seed: int, progress: Any = False, *, n_samples: int = 25
) -> tuple[list[np.ndarray], np.ndarray]:
    """Captum's GradientShap from `n_samples` random points between baseline and input; as `input_x_gradient`."""
    from captum.attr import GradientShap

    if n_samples < 1:
        raise InputError(f"gradient_shap: n_samples={n_samples}; expected at least 1")

    def attribute(target: EmbeddingTarget, inputs: Tensor, baselines: Tensor, which: Tensor) -> Tensor:
        return _with_gradients(GradientShap(target)).attribute(
            inputs, baselines, n_samples=n_samples, additional_forward_args=which
        )

    return _one_by_one(coalitions, examples, attribute, seed, progress)


def deeplift(
    coalitions: Coalitions, examples: Sequence[int], seed: int, progress: Any = False
) -> tuple[list[np.ndarray], np.ndarray]:
    """Captum's DeepLift, complete only where every non-linearity is a module that it knows; as `input_x_gradient`."""
    from captum.attr import DeepLift

    def attribute(target: EmbeddingTarget, inputs: Tensor, baselines: Tensor, which: Tensor) -> Tensor:
        return DeepLift(target).attribute(inputs, baselines, additional_forward_args=which)

    return _one_by_one(coalitions, examples, attribute, seed, progress)


def deepshap(
    coalitions: Coalitions, examples: Sequence[int], seed: int, progress: Any = False
) -> tuple[list[np.ndarray], np.ndarray]:
    """Captum's DeepLiftShap with the one baseline, twice because captum wants several; as `deeplift`."""
    from captum.attr import DeepLiftShap

    def attribute(target: EmbeddingTarget, inputs: Tensor, baselines: Tensor, which: Tensor) -> Tensor:
        return DeepLiftShap(target).attribute(inputs, baselines.repeat(2, 1, 1), additional_forward_args=which)

    return _one_by_one(coalitions, examples, attribute, seed, progress)


def _with_gradients(method: Any) -> Any:
    """A captum method whose gradients survive running out of memory."""
    method.gradient_func = method.forward_func.gradients
    return method


def gradient_budget(coalitions: Coalitions) -> int:
    """Padded tokens that go forward and backward at once."""
    return max(256, 2 * coalitions.max_tokens)


def completeness_error(coalitions: Coalitions, example: int, scores: Float[np.ndarray, " token"]) -> float:
    """|Σ scores − (f(x) − f(x₀))| / |f(x) − f(x₀)|; NaN where the difference is 0 or a score is missing."""
    difference = coalitions.full(example) - coalitions.empty(example)
    if difference == 0 or not np.isfinite(difference):
        return float("nan")
    return float(abs(scores.sum() - difference) / abs(difference))


def _in_batches(
    target: EmbeddingTarget, examples: Sequence[int], attribute: Attribute, progress: Any, *, one_length: bool
) -> tuple[list[np.ndarray], np.ndarray]:
    """Attributions of examples in batches; of one length where steps fill them anyway, so that nothing is padded."""
    coalitions = target.coalitions
    found: dict[int, np.ndarray] = {}
    alike: dict[tuple[int, int], list[int]] = {}
    for example in examples:
        one = coalitions.encoded[example]
        alike.setdefault((one.n_reads, len(one.ids) if one_length else 0), []).append(example)
    for chosen in alike.values():

        def step(batch: Batch, chosen: list[int] = chosen) -> None:
            which = [chosen[row] for row in batch.rows]
            found.update(_attributions(target, which, attribute))

        rows = [coalitions.encoded[example].ids[target.skip :] for example in chosen]
        for_each_batch(
            token_batches(rows, max_tokens=max(1, gradient_budget(coalitions) // 8), pad_id=coalitions.model.pad_id),
            step,
            progress=progress,
            unit="example",
        )
    return [found[example] for example in examples], target.calls


def _one_by_one(
    coalitions: Coalitions,
    examples: Sequence[int],
    attribute: Callable[[EmbeddingTarget, Tensor, Tensor, Tensor], Tensor],
    seed: int,
    progress: Any,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Attributions whose samples are the batch: each example has its own draws."""
    target = EmbeddingTarget(coalitions)
    found: dict[int, np.ndarray] = {}

    def step(batch: Batch) -> None:
        example = examples[batch.rows[0]]
        with own_draws(draws_seed(seed, example)):
            found.update(_attributions(target, [example], lambda *given: attribute(target, *given)))

    rows = [coalitions.encoded[example].ids[target.skip :] for example in examples]
    batches = token_batches(rows, max_tokens=1, pad_id=coalitions.model.pad_id)
    for_each_batch(batches, step, progress=progress, unit="example")
    return [found[example] for example in examples], target.calls


def _attributions(target: EmbeddingTarget, which: Sequence[int], attribute: Attribute) -> dict[int, np.ndarray]:
    """(token) scores of some examples in one batch."""
    coalitions, device = target.coalitions, target.coalitions.model.device
    rows = [coalitions.encoded[example].ids[target.skip :] for example in which]
    replaced = [coalitions.input(example, np.zeros(coalitions.size(example), bool))[target.skip :] for example in which]
    width = max(map(len, rows))
    ids, others = (
        torch.tensor([[*row, *[coalitions.model.pad_id] * (width - len(row))] for row in some], device=device)
        for some in (rows, replaced)
    )
    before = target.calls.copy()
    try:
        with torch.no_grad():
            inputs, baselines = coalitions.embedder(ids).detach(), coalitions.embedder(others).detach()
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # captum on inputs that do not require gradients yet, and on its hooks
            found = attribute(inputs, baselines, torch.tensor(list(which), device=device))
    except BaseException:
        target.calls[:] = before
        raise
    scores = found.detach().float().sum(-1).cpu().double().numpy()
    explained: dict[int, np.ndarray] = {}
    for row, example in enumerate(which):
        own = scores[row, [position - target.skip for position in coalitions.encoded[example].positions]]
        explained[example] = own if np.isfinite(own).all() else np.full(len(own), np.nan)
    return explained
