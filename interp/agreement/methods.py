"""Which explanations there are: one table, and how each is run on examples.

| side | methods |
|---|---|
| attention | attention, attention:L, attention_norm, attention_norm:L, rollout, widest, flow |
| attribution | leave_one_out, integrated_gradients, input_x_gradient, gradient_shap, lime, kernel_shap, shapley_sampling, |
| | shapley (exact), deeplift and deepshap (refused where they are not complete) |
| baseline | random, recency (the later the higher), first (the earlier the higher), rarity (the higher a token's id, the rarer) |

Rarity: byte-pair and word-piece vocabularies are built from frequent to rare, so that an id is a rank of rarity; specials
apart. A word is as rare as its rarest token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from interp.agreement import gradients, perturbations
from interp.agreement.attention_scores import ATTENTION_METHODS, attention_scores, split_layer
from interp.agreement.coalitions import Coalitions
from interp.errors import InputError

TOLERANCE = 0.1  # completeness error above which DeepLIFT and DeepSHAP are refused
_TRIAL = 8  # examples on which that is measured


@dataclass(frozen=True)
class Method:
    """One explanation.

    Attributes:
        side: "attention", "attribution" or "baseline".
        run: (coalitions, examples, seed, progress, **options) -> scores, or (scores, model calls per example).
        random: whether seeds matter.
        refuse: says why the method is not valid for some examples, or `None`; asked before anything is run.
    """

    side: str
    run: Callable[..., Any]
    random: bool = False
    refuse: Callable[[Coalitions, Mapping[str, Any]], str | None] | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """Names of its options."""
        kinds = inspect.signature(self.run).parameters.values()
        return tuple(one.name for one in kinds if one.kind is inspect.Parameter.KEYWORD_ONLY)


# Baselines score units, not tokens: a word of many tokens is one place in the text.


def _random(coalitions: Coalitions, examples: Sequence[int], seed: int, progress: Any = False) -> list[np.ndarray]:
    draws = [np.random.default_rng([seed, example]) for example in examples]
    sizes = [len(coalitions.encoded[example].units) for example in examples]
    return [rng.permutation(size) + 1.0 for rng, size in zip(draws, sizes, strict=True)]


def _recency(coalitions: Coalitions, examples: Sequence[int], seed: int, progress: Any = False) -> list[np.ndarray]:
    return [np.arange(len(coalitions.encoded[example].units)) + 1.0 for example in examples]


def _first(coalitions: Coalitions, examples: Sequence[int], seed: int, progress: Any = False) -> list[np.ndarray]:
    return [score[::-1].copy() for score in _recency(coalitions, examples, seed)]


def _rarity(coalitions: Coalitions, examples: Sequence[int], seed: int, progress: Any = False) -> list[np.ndarray]:
    encoded = [coalitions.encoded[example] for example in examples]
    return [np.array([max(one.ids[one.positions[at]] for at in group) + 1.0 for group in one.units]) for one in encoded]


def _too_long(coalitions: Coalitions, options: Mapping[str, Any]) -> str | None:
    """Exact Shapley values of long texts would not end."""
    longest = int(options.get("longest", perturbations.LONGEST_EXACT))
    most = max(map(coalitions.size, range(len(coalitions))))
    return None if most <= longest else perturbations.too_long(most, longest)


def _incomplete(name: str, coalitions: Coalitions, options: Mapping[str, Any]) -> str | None:
    """The measured reason why DeepLIFT or DeepSHAP is not valid for the model."""
    trial = list(range(min(_TRIAL, len(coalitions))))
    try:
        scores, _ = METHODS[name].run(coalitions, trial, 0)
    except Exception as error:  # captum's own refusals: reused modules, shapes
        return f"captum's {name} fails on {coalitions.model.name}: {type(error).__name__}: {str(error)[:200]}"
    errors = [gradients.completeness_error(coalitions, at, score) for at, score in zip(trial, scores, strict=True)]
    known = [error for error in errors if np.isfinite(error)]
    if not known:
        return f"{name} cannot be shown to be valid: f(x) = f(x₀), or a gradient is not finite, on all {len(trial)} examples"
    median = float(np.median(known))
    if median <= TOLERANCE:
        return None
    return (
        f"{name} is not valid here: its scores miss f(x) − f(x₀) by {median:.0%} (median of {len(known)} examples; "
        f"{TOLERANCE:.0%} is allowed). Captum replaces the gradient of activation modules that it knows, and this model's "
        f"attention, norms and activations are none of them; force=({name!r},) runs it all the same"
    )


METHODS: dict[str, Method] = {
    "leave_one_out": Method("attribution", perturbations.leave_one_out),
    "integrated_gradients": Method("attribution", gradients.integrated_gradients),
    "input_x_gradient": Method("attribution", gradients.input_x_gradient),
    "gradient_shap": Method("attribution", gradients.gradient_shap, random=True),
    "lime": Method("attribution", perturbations.lime, random=True),
    "kernel_shap": Method("attribution", perturbations.kernel_shap, random=True),
    "shapley_sampling": Method("attribution", perturbations.shapley_sampling, random=True),
    "shapley": Method("attribution", perturbations.shapley, refuse=_too_long),
    "deeplift": Method("attribution", gradients.deeplift, refuse=partial(_incomplete, "deeplift")),
    "deepshap": Method("attribution", gradients.deepshap, refuse=partial(_incomplete, "deepshap")),
    "random": Method("baseline", _random, random=True),
    "recency": Method("baseline", _recency),
    "first": Method("baseline", _first),
    "rarity": Method("baseline", _rarity),
}
# What `compare` runs by default: everything that every causal language model and encoder has, exact Shapley values apart.
DEFAULT_METHODS = (
    *("attention", "attention:-1", "attention_norm", "rollout", "widest", "flow"),
    *("leave_one_out", "integrated_gradients", "input_x_gradient", "gradient_shap", "lime", "kernel_shap"),
    *("shapley_sampling", "deeplift", "random", "recency", "first", "rarity"),
)


def method_named(name: str, coalitions: Coalitions | None = None) -> Method:
    """The method of that name.

    Args:
        name: a key of `METHODS`, or an attention method, with a layer perhaps.
        coalitions: whose model says which layers there are; without it a layer is not checked.

    Raises:
        InputError: there is none; it names those that there are.
    """
    if name in METHODS:
        return METHODS[name]
    if not isinstance(name, str) or name.partition(":")[0] not in ATTENTION_METHODS:
        known = ", ".join((*ATTENTION_METHODS, "attention:LAYER", *METHODS))
        raise InputError(f"there is no method {name!r}; expected one of {known}")
    if coalitions is not None:
        split_layer(name, coalitions.model)

    def run(coalitions: Coalitions, examples: Sequence[int], seed: int, progress: Any = False) -> list[np.ndarray]:
        return attention_scores(coalitions, examples, [name], progress)[name][0]

    return Method("attention", run)


def side_of(name: str) -> str:
    """ "attention", "attribution" or "baseline"; "custom" for a name that is no method.

    Example:
        >>> side_of("attention:3"), side_of("lime"), side_of("mine")
        ('attention', 'attribution', 'custom')
    """
    if name.partition(":")[0] in ATTENTION_METHODS:
        return "attention"
    return METHODS[name].side if name in METHODS else "custom"


def check_options(methods: Mapping[str, Method], options: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses options of methods that are not run, or that a method does not have.

    Raises:
        InputError: it says which there are.
    """
    for name, given in options.items():
        if name not in methods:
            raise InputError(f"options for {name!r}, which is not among the methods: {', '.join(methods)}")
        unknown = [key for key in given if key not in methods[name].options]
        if unknown:
            has = ", ".join(methods[name].options) or "none"
            raise InputError(f"{name} has no option {unknown[0]!r}; it has {has}")
