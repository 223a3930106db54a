"""Attributions that replace tokens: leave-one-out, LIME, KernelSHAP, Shapley sampling (captum) and exact Shapley values.

Captum calls a model again and again with a few perturbed inputs, and LIME and KernelSHAP go through examples one by one. Which
inputs they ask for depends on their random draws alone, never on what the model answers. So a method runs twice:

1. *Ask*: captum runs against a function that notes the coalitions (`interp.agreement.coalitions`) and answers 0.
2. All coalitions of all examples are computed at once: batches across examples, shared beginnings once, none twice.
3. *Answer*: captum runs again with the same draws, and finds the values known.

Draws are seeded by (seed, example), so neither batches nor other examples matter. One explained token gets f(x) − f(x₀) from
every method, exactly.

Exact Shapley values (Shapley 1953) need the 2ⁿ coalitions of n tokens: φᵢ = Σ_S |S|! (n − |S| − 1)! / n! · (v(S ∪ i) − v(S)).
Sources: LIME, arXiv 1602.04938; KernelSHAP, arXiv 1705.07874; sampling, Castro et al. 2009.
"""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.agreement.coalitions import Coalitions
from interp.errors import InputError
from interp.model import set_seed

LONGEST_EXACT = 12  # tokens: 4,096 coalitions
_TOKENS_ASKED = 4_000_000  # of explained tokens in all inputs that are asked for before they are computed
_ROUNDING = 1e-6  # relative; of float32 logits in different batches


def leave_one_out(
    coalitions: Coalitions, examples: Sequence[int], seed: int, progress: Any = False
) -> list[np.ndarray]:
    """f(x) − f(x without token i) (captum's FeatureAblation).

    Args:
        coalitions: the game.
        examples: which.
        seed: not used; the same signature for all.
        progress: a progress bar on stderr.

    Returns:
        Per example (token) scores in the target's unit.
    """
    from captum.attr import FeatureAblation

    def attribute(forward: Any, ones: Tensor) -> Tensor:
        return FeatureAblation(forward).attribute(ones, perturbations_per_eval=ones.shape[1])

    return _ask_and_answer(coalitions, examples, attribute, seed, progress)


def shapley_sampling(
    coalitions: Coalitions, examples: Sequence[int], seed: int, progress: Any = False, *, n_samples: int = 25
) -> list[np.ndarray]:
    """Shapley values from `n_samples` random orders (captum's ShapleyValueSampling); see `leave_one_out`."""
    from captum.attr import ShapleyValueSampling

    _check_samples("shapley_sampling", n_samples, 1)

    def attribute(forward: Any, ones: Tensor) -> Tensor:
        return ShapleyValueSampling(forward).attribute(ones, n_samples=n_samples, perturbations_per_eval=ones.shape[1])

    return _ask_and_answer(coalitions, examples, attribute, seed, progress)


def kernel_shap(
    coalitions: Coalitions, examples: Sequence[int], seed: int, progress: Any = False, *, n_samples: int | None = None
) -> list[np.ndarray]:
    """KernelSHAP from `n_samples` coalitions, the full and the empty one among them; see `leave_one_out`.

    By default 200, or four times as many as tokens. Fewer than tokens fit no regression: a warning says so.
    """
    from captum.attr import KernelShap

    _check_samples("kernel_shap", n_samples, 3, max(map(coalitions.size, examples)))

    def attribute(forward: Any, ones: Tensor) -> Tensor:
        count = n_samples or max(200, 4 * ones.shape[1])
        return KernelShap(forward).attribute(ones, n_samples=count, perturbations_per_eval=count)

    return _ask_and_answer(coalitions, examples, attribute, seed, progress)


def lime(
    coalitions: Coalitions, examples: Sequence[int], seed: int, progress: Any = False, *, n_samples: int | None = None
) -> list[np.ndarray]:
    """LIME with a linear regression (captum's default, a lasso, ties most tokens at zero); samples as in `kernel_shap`."""
    from captum._utils.models.linear_model import SkLearnLinearRegression
    from captum.attr import Lime

    _check_samples("lime", n_samples, 2, max(map(coalitions.size, examples)))

    def attribute(forward: Any, ones: Tensor) -> Tensor:
        surrogate, count = SkLearnLinearRegression(), n_samples or max(200, 4 * ones.shape[1])
        return Lime(forward, interpretable_model=surrogate).attribute(
            ones, n_samples=count, perturbations_per_eval=count
        )

    return _ask_and_answer(coalitions, examples, attribute, seed, progress)


def shapley(
    coalitions: Coalitions,
    examples: Sequence[int],
    seed: int,
    progress: Any = False,
    *,
    longest: int = LONGEST_EXACT,
) -> list[np.ndarray]:
    """Exact Shapley values from every coalition; see `leave_one_out`.

    Raises:
        InputError: an example has more than `longest` tokens.
    """
    sizes = {example: coalitions.size(example) for example in examples}
    if max(sizes.values()) > longest:
        raise InputError(too_long(max(sizes.values()), longest))
    found = coalitions.values({example: every_coalition(n) for example, n in sizes.items()}, progress)
    return [exact_shapley(found[example], sizes[example]) for example in examples]


def too_long(most: int, longest: int) -> str:
    """Why exact Shapley values are not computed."""
    return (
        f"exact Shapley values need 2^n inputs, and an example has {most} tokens; at most {longest} are allowed: use "
        f"shapley_sampling or kernel_shap, or set shapley's option `longest`"
    )


def every_coalition(n: int) -> np.ndarray:
    """(2ⁿ, n) all sets; row r keeps token i where bit i of r is set."""
    return (np.arange(2**n)[:, None] >> np.arange(n)) & 1 == 1


def exact_shapley(values: Float[np.ndarray, " coalition"], n: int) -> Float[np.ndarray, " token"]:
    """Shapley values of the game whose coalitions are in `every_coalition`'s order.

    Example:
        >>> exact_shapley(np.array([0.0, 1.0, 2.0, 5.0]), 2).tolist()
        [2.0, 3.0]
    """
    rows = np.arange(2**n)
    sizes = np.array([int(row).bit_count() for row in rows])
    weights = np.array([math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n) for size in range(n)])
    scores = np.empty(n)
    for token in range(n):
        without = rows[(rows >> token) & 1 == 0]
        scores[token] = (weights[sizes[without]] * (values[without | (1 << token)] - values[without])).sum()
    return scores


def _check_samples(name: str, n_samples: int | None, least: int, tokens: int = 0) -> None:
    if n_samples is not None and n_samples < least:
        raise InputError(
            f"{name}: n_samples={n_samples}; expected at least {least}, and several times as many as tokens"
        )
    if n_samples is not None and n_samples <= tokens:
        warnings.warn(
            f"{name}: {n_samples} samples for {tokens} tokens determine no regression; take more", stacklevel=2
        )


def _ask_and_answer(
    coalitions: Coalitions,
    examples: Sequence[int],
    attribute: Callable[[Any, Tensor], Tensor],
    seed: int,
    progress: Any,
) -> list[np.ndarray]:
    """The three steps of the module docstring, a group of examples at a time."""
    found: dict[int, np.ndarray] = {}
    asked: dict[int, np.ndarray] = {}
    waiting, name = 0, progress if isinstance(progress, str) else ""
    for example in tqdm(examples, desc=f"{name} asks", disable=not progress, leave=False):
        size = coalitions.size(example)
        if size == 1:
            found[example] = np.array([coalitions.full(example) - coalitions.empty(example)])
            continue
        noted: list[np.ndarray] = []

        def note(masks: Tensor, noted: list[np.ndarray] = noted) -> Tensor:
            noted.append(masks.numpy() > 0.5)
            return torch.zeros(len(masks), dtype=torch.float64)

        _run(attribute, note, size, seed, example)
        asked[example] = np.concatenate(noted)
        waiting += asked[example].size
        if waiting > _TOKENS_ASKED:
            found |= _answers(coalitions, asked, attribute, seed, progress)
            asked, waiting = {}, 0
    found |= _answers(coalitions, asked, attribute, seed, progress)
    return [found[example] for example in examples]


def _answers(
    coalitions: Coalitions,
    asked: dict[int, np.ndarray],
    attribute: Callable[[Any, Tensor], Tensor],
    seed: int,
    progress: Any,
) -> dict[int, np.ndarray]:
    """Scores from values that are computed here; NaN where one is not finite, 0 where all are the same but for rounding."""
    scores = {}
    for example, values in coalitions.values(asked, progress).items():
        if not np.isfinite(values).all():
            scores[example] = np.full(coalitions.size(example), np.nan)
        elif np.ptp(values) <= _ROUNDING * np.abs(values).max():
            scores[example] = np.zeros(coalitions.size(example))
        else:

            def answer(masks: Tensor, example: int = example) -> Tensor:
                return torch.from_numpy(coalitions.known(example, masks.numpy() > 0.5))

            scores[example] = _run(attribute, answer, coalitions.size(example), seed, example)
    return scores


def _run(attribute: Callable[[Any, Tensor], Tensor], forward: Any, size: int, seed: int, example: int) -> np.ndarray:
    """One example's scores, with its own draws."""
    with _one_thread(), own_draws(draws_seed(seed, example)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum and scikit-learn on constant answers
        found = attribute(forward, torch.ones(1, size, dtype=torch.float64))
    return found[0].double().numpy()


@contextlib.contextmanager
def own_draws(seed: int) -> Iterator[None]:
    """Seeded draws of torch, numpy and random inside the block; afterwards each generator (of the CPU) goes on as before."""
    numpys, pythons = np.random.get_state(), random.getstate()  # noqa: NPY002 - captum draws from the global one
    with torch.random.fork_rng(devices=[]):
        set_seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpys)  # noqa: NPY002
            random.setstate(pythons)


def draws_seed(seed: int, example: int) -> int:
    """A seed for one example's draws: the same whatever runs beside it."""
    return int(np.random.SeedSequence([seed, example]).generate_state(1)[0])


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Tiny tensors on several threads wait for each other more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
