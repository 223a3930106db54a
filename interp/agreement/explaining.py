"""Explain predictions by many methods over the same tokens, in one table.

1. The examples are encoded, the model predicts, and the target is fixed (`interp.agreement.coalitions`).
2. Each method runs on all examples; those that replace tokens share what is already known, those of attention share passes.
3. Token scores are summed over words if words are asked for.
4. Every attribution comes with f(x), f(x₀), its completeness error, its model calls and its time.

A method whose completeness fails by what it is (DeepLIFT on most transformers) is measured first and left out with the reason,
unless forced. With `out` every method and seed is a file: a run that is killed goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interp.agreement.attention_scores import attention_scores
from interp.agreement.coalitions import Coalitions
from interp.agreement.explanation_table import EXPLANATION_COLUMNS
from interp.agreement.gradients import completeness_error
from interp.agreement.methods import DEFAULT_METHODS, Method, check_options, method_named, side_of
from interp.agreement.tasks import Task
from interp.errors import InputError
from interp.model import Model
from interp.provenance import Provenance, as_json
from interp.results import Result
from interp.shards import ShardedRun

# {name: one score per unit of every example}
Custom = Mapping[str, Sequence[Sequence[float]]]


def explain(
    model: Model,
    examples: Sequence[Any],
    methods: Sequence[str] | str | None = None,
    *,
    task: Task | None = None,
    target: str = "log_prob",
    of: str = "predicted",
    baseline: str | int | None = None,
    units: str = "tokens",
    special: bool = False,
    seeds: Sequence[int] = (0,),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    custom: Custom | None = None,
    force: Sequence[str] = (),
    max_tokens: int | None = None,
    out: str | Path | None = None,
    progress: bool | str = False,
) -> Result:
    """Explanations of a model's predictions.

    Args:
        model: what `load_model` gave: a causal language model, or a model with a classification head.
        examples: texts, (text, label) pairs, or `interp.agreement.Example`s.
        methods: names, see `interp.agreement.methods`; by default all that need no exact enumeration.
        task: `Verbalizer(…)`, `NextToken()`, `Continuation()` or `Classifier()`; by default `NextToken` for language models.
        target: "log_prob", "logit_difference" or "probability".
        of: "predicted" or "gold" class; a continuation of several tokens is always the given one.
        baseline: what replaces a token: "mask", "pad", "zero", "mean", a token id or one token's text; by default the
            tokenizer's mask token, else its padding token.
        units: "tokens" or "words" (sums over their tokens).
        special: explain special tokens too.
        seeds: of the methods that draw; the others run once.
        options: {method: {option: value}}, such as {"lime": {"n_samples": 1000}}.
        custom: rankings of your own: {name: one score per unit of every example}.
        force: methods to run although their completeness fails.
        max_tokens: tokens in a batch; by default 512 on CPUs and 4,096 elsewhere.
        out: a folder; what is there already of the same run is used again.
        progress: progress bars on stderr.

    Returns:
        A `Result` of kind "agreement.explain" with `EXPLANATION_COLUMNS`. The attachment "examples" says what was explained; the
        parameter "refused" which methods were left out and why, "random_methods" which draw.

    Raises:
        InputError: see `encode_examples`; an unknown method, option, target or baseline; no method that is valid; scores of
            your own that are not one per unit.
        MemoryBudgetError: a single example does not fit.
    """
    coalitions = Coalitions(
        model,
        examples,
        task=task,
        target=target,
        of=of,
        baseline=baseline,
        units=units,
        special=special,
        max_tokens=max_tokens,
    )
    return explain_coalitions(
        coalitions, methods, seeds=seeds, options=options, custom=custom, force=force, out=out, progress=progress
    )


def explain_coalitions(
    coalitions: Coalitions,
    methods: Sequence[str] | str | None = None,
    *,
    seeds: Sequence[int] = (0,),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    custom: Custom | None = None,
    force: Sequence[str] = (),
    out: str | Path | None = None,
    progress: bool | str = False,
) -> Result:
    """As `explain`, of examples that are encoded already."""
    start = time.perf_counter()
    options, custom = dict(options or {}), dict(custom or {})
    chosen, refused = _choose(coalitions, methods, options, custom, force)
    draws = _check_seeds(seeds)
    wanted = {name: draws if one.random else [0] for name, one in chosen.items()}
    units = [f"{name}-{seed}" for name, some in wanted.items() for seed in some]
    attachments = {"examples": coalitions.about()}
    provenance = Provenance.collect(
        coalitions.model,
        seed=draws[0],
        parameters={
            **about_run(coalitions),
            "methods": list(chosen),
            "seeds": draws,
            "random_methods": [name for name, one in chosen.items() if one.random],
            "refused": refused,
            "forced": [name for name in force if name in chosen],
            "options": {name: dict(given) for name, given in options.items()},
            "custom": _digest(custom) if custom else None,
        },
    )
    if out is None:
        frames = dict(_frames(coalitions, chosen, wanted, units, options, progress))
        table = pd.concat([frames[unit] for unit in units], ignore_index=True)
        table["method"] = pd.Categorical(table["method"], list(chosen))  # in order, as shards have them
        provenance = dataclasses.replace(provenance, wall_time=time.perf_counter() - start)
        return Result("agreement.explain", table, EXPLANATION_COLUMNS, provenance, attachments)
    run = ShardedRun(out, "agreement.explain", EXPLANATION_COLUMNS, provenance, units, attachments)
    for unit, frame in _frames(coalitions, chosen, wanted, run.missing(), options, progress):
        run.write(unit, frame)
    return run.finish()


def about_run(coalitions: Coalitions) -> dict[str, Any]:
    """What was asked of the model, as parameters of a provenance."""
    return {
        "task": as_json(dataclasses.asdict(coalitions.task), "task"),
        "target": coalitions.target,
        "of": coalitions.of,
        "baseline": coalitions.baseline,
        "baseline_id": coalitions.baseline_id,
        "units": coalitions.units,
        "special": coalitions.special,
        "n_examples": len(coalitions),
        "examples": _digest([one.ids for one in coalitions.encoded]),
    }


def _choose(
    coalitions: Coalitions,
    methods: Sequence[str] | str | None,
    options: Mapping[str, Mapping[str, Any]],
    custom: Custom,
    force: Sequence[str],
) -> tuple[dict[str, Method], dict[str, str]]:
    """The methods to run, and those that are left out with the reason."""
    given = DEFAULT_METHODS if methods is None else [methods] if isinstance(methods, str) else list(methods)
    if not given and not custom:
        raise InputError("no methods were given; expected some, such as ['attention', 'leave_one_out']")
    found = {
        name: method_named(name, coalitions)
        for name in dict.fromkeys(given)
        if methods is not None or _exists(name, coalitions)
    }
    check_options(found, options)
    unknown = [name for name in force if name not in found]
    if unknown:
        raise InputError(f"force={unknown[0]!r} is not among the methods: {', '.join(found)}")
    refused = {
        name: reason
        for name, one in found.items()
        if name not in force and one.refuse is not None and (reason := one.refuse(coalitions, options.get(name, {})))
    }
    for name, reason in refused.items():
        if methods is not None:
            warnings.warn(f"{name} is left out: {reason}", stacklevel=4)
        del found[name]
    for name, scores in custom.items():
        found[name] = _custom(name, scores, coalitions, found)
    if not found:
        raise InputError("no method is left: " + "; ".join(refused.values()))
    return found, refused


def _exists(name: str, coalitions: Coalitions) -> bool:
    """Whether a default method has something to look at in this model."""
    return side_of(name) != "attention" or coalitions.model.arch.n_layers > 0


def _custom(name: str, scores: Sequence[Sequence[float]], coalitions: Coalitions, taken: Mapping[str, Any]) -> Method:
    if side_of(name) != "custom" or name in taken:
        raise InputError(f"custom={name!r} is the name of a method; choose another")
    if len(scores) != len(coalitions):
        raise InputError(f"custom[{name!r}] has scores of {len(scores)} examples; expected {len(coalitions)}")
    kept = [np.asarray(one.detach().cpu() if hasattr(one, "detach") else one, dtype=float) for one in scores]
    for at, (one, encoded) in enumerate(zip(kept, coalitions.encoded, strict=True)):
        if one.shape != (len(encoded.units),):
            raise InputError(
                f"custom[{name!r}]: example {at} has scores of shape {one.shape}, and its text is {len(encoded.units)} "
                f"{coalitions.units} here ({' | '.join(encoded.names)[:120]}): tokenisations disagree; give one score per unit"
            )

    def run(coalitions: Coalitions, examples: Sequence[int], seed: int, progress: Any = False) -> list[np.ndarray]:
        return [kept[example] for example in examples]

    return Method("custom", run)


def _check_seeds(seeds: Sequence[int] | int) -> list[int]:
    given = [seeds] if isinstance(seeds, int) else list(seeds)
    if not given or len(set(given)) < len(given) or any(not 0 <= seed < 2**15 for seed in given):
        raise InputError(f"seeds={given}; expected different whole numbers from 0 to {2**15 - 1}")
    return [int(seed) for seed in given]


def _frames(
    coalitions: Coalitions,
    methods: Mapping[str, Method],
    seeds: Mapping[str, Sequence[int]],
    units: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
    progress: bool | str,
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every unit of work's rows."""
    everything = list(range(len(coalitions)))
    looked = [name for name, one in methods.items() if one.side == "attention" and f"{name}-0" in units]
    if looked:
        shared = attention_scores(coalitions, everything, looked, "attention" if progress else False)
        ones = np.ones(len(coalitions), dtype=np.int64)
        for name, (scores, seconds) in shared.items():
            yield f"{name}-0", _frame(coalitions, name, 0, methods[name], scores, ones, ones, seconds)
    for name, method in methods.items():
        for seed in seeds[name]:
            unit = f"{name}-{seed}"
            if unit not in units or name in looked:
                continue
            began, asked, computed = time.perf_counter(), coalitions.asked.copy(), coalitions.computed.copy()
            found = method.run(coalitions, everything, seed, name if progress else False, **options.get(name, {}))
            scores, calls = found if isinstance(found, tuple) else (found, coalitions.asked - asked)
            new = calls if isinstance(found, tuple) else coalitions.computed - computed
            yield unit, _frame(coalitions, name, seed, method, scores, calls, new, time.perf_counter() - began)


def _frame(
    coalitions: Coalitions,
    name: str,
    seed: int,
    method: Method,
    scores: Sequence[np.ndarray],
    calls: np.ndarray,
    computed: np.ndarray,
    seconds: float,
) -> pd.DataFrame:
    """A method's rows of all examples."""
    frames = []
    for example, one in enumerate(coalitions.encoded):
        own = scores[example]
        error = completeness_error(coalitions, example, own) if method.side == "attribution" else float("nan")
        summed = (
            own if method.side in ("custom", "baseline") else np.array([own[list(group)].sum() for group in one.units])
        )
        frames.append(
            pd.DataFrame(
                {
                    "example": example,
                    "method": name,
                    "seed": seed,
                    "unit": np.arange(len(one.units)),
                    "position": [one.positions[group[0]] for group in one.units],
                    "token": list(one.names),
                    "score": summed,
                    "value": coalitions.full(example),
                    "baseline_value": coalitions.empty(example),
                    "completeness_error": error,
                    "model_calls": int(calls[example]),
                    "computed": int(computed[example]),
                    "seconds": seconds / len(coalitions),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=lambda one: np.asarray(one).tolist()).encode()).hexdigest()[:16]
