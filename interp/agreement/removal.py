"""Faithfulness: does the target fall when the tokens that an explanation ranks first are taken away?

1. Units are ranked, the highest first; equal ones in random order. *Comprehensiveness* at a fraction q: f(x) − f(x
   without the first ⌈q n⌉ of n units); *sufficiency*: f(x) − f(x with the first ⌈q n⌉ alone). Their AOPC is the mean
   over q = 10 % … 100 % (ERASER, arXiv 1911.03429, section 4; DeYoung et al.). Comprehensiveness is better high,
   sufficiency low.
2. AOPC depends on the model and the text as much as on the explanation. *Normalised* AOPC (Edin et al., arXiv
   2408.08137) removes one unit after the other, takes the mean of f(x) − f(what is left) over all n steps, and puts it
   between the worst (0) and the best (1) order of the same text. These are exact, from all 2ⁿ coalitions, up to
   `longest_exact` units, else found by beam search,
   widened by what the
   rankings themselves reach. For sufficiency the lowest goes first, and 0 is best.
3. *Leave-one-out*: Spearman's correlation with the drop from removing each token alone.

Removing means replacing by the baseline of `Coalitions`: inputs that are asked for by several methods run once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp.agreement.coalitions import Coalitions
from interp.agreement.explaining import about_run
from interp.agreement.explanation_table import score_vectors
from interp.agreement.perturbations import every_coalition
from interp.agreement.rankings import agreement
from interp.agreement.tasks import Task
from interp.errors import InputError
from interp.intervals import bootstrap_mean
from interp.model import Model
from interp.results import Column, Result

FRACTIONS = tuple(round(0.1 * step, 1) for step in range(1, 11))
MEASURES = (
    "comprehensiveness",
    "sufficiency",
    "normalised_comprehensiveness",
    "normalised_sufficiency",
    "leave_one_out",
)
FAITHFULNESS_COLUMNS = (
    Column("example", "int32", "index", "0-based index of the example"),
    Column("method", "category", "", "whose ranking"),
    Column("seed", "int16", "", "of the method's random draws"),
    Column("measure", "category", "", ", ".join(MEASURES)),
    Column("fraction", "float64", "", "share of the units that is removed or kept; NaN: the mean over all (AOPC)"),
    Column(
        "value", "float64", "", "in the target's unit; normalised: 0 worst … 1 best order; leave_one_out: correlation"
    ),
)


def faithfulness(
    model: Model,
    examples: Sequence[Any],
    explanations: Result,
    *,
    task: Task | None = None,
    max_tokens: int | None = None,
    **settings: Any,
) -> Result:
    """Faithfulness of explanations, by the same target and baseline.

    Args:
        model, examples, task: those that were explained.
        explanations: what `interp.agreement.explain` gave for them.
        max_tokens: tokens in a batch.
        **settings: see `faithfulness_of`.

    Returns:
        A `Result` of kind "agreement.faithfulness" with `FAITHFULNESS_COLUMNS`.

    Raises:
        InputError: another model or other examples were explained (tokenisations disagree), or settings out of range.
    """
    if getattr(explanations, "kind", None) != "agreement.explain":
        raise InputError(f"{explanations!r:.60}; expected what interp.agreement.explain gives")
    made = explanations.provenance.parameters
    coalitions = Coalitions(
        model,
        examples,
        task=task,
        target=made["target"],
        of=made["of"],
        baseline=_baseline(made),
        units=made["units"],
        special=made["special"],
        max_tokens=max_tokens,
    )
    return faithfulness_of(coalitions, explanations, **settings)


def faithfulness_of(
    coalitions: Coalitions,
    explanations: Result,
    *,
    rank_by: str = "signed",
    fractions: Sequence[float] = FRACTIONS,
    n_normalised: int | None = None,
    longest_exact: int = 10,
    beam: int = 5,
    seed: int = 0,
    progress: bool | str = False,
) -> Result:
    """As `faithfulness`, of examples that are encoded already.

    Args:
        coalitions: the examples.
        explanations: of the same examples.
        rank_by: "signed": what speaks for the target first; "abs": what matters first.
        fractions: of the units, each above 0 and at most 1.
        n_normalised: on how many examples, the first, AOPC is normalised; all by default, 0 for none.
        longest_exact: units up to which the best and worst orders are exact.
        beam: orders that are kept where they are not.
        seed: of the order of equal scores.
        progress: progress bars on stderr.
    """
    start = time.perf_counter()
    _check_same(coalitions, explanations)
    if not fractions or any(not 0 < fraction <= 1 for fraction in fractions) or beam < 1 or longest_exact < 0:
        raise InputError(
            f"fractions={tuple(fractions)}, beam={beam}; expected fractions in (0, 1] and a beam of at least 1"
        )
    if n_normalised is not None and n_normalised < 0:
        raise InputError(f"n_normalised={n_normalised}; expected at least 0, or None for all examples")
    vectors = score_vectors(explanations, rank_by)
    asked_before, computed_before = int(coalitions.asked.sum()), int(coalitions.computed.sum())
    normalised = list(vectors)[: len(vectors) if n_normalised is None else n_normalised]
    orders = {
        (example, *key): _order(scores, np.random.default_rng([seed, example, zlib.crc32(key[0].encode()), key[1]]))
        for example, found in vectors.items()
        for key, scores in found.items()
    }
    wanted: dict[int, list[np.ndarray]] = {example: [] for example in vectors}
    for (example, *_), order in orders.items():
        n = len(coalitions.encoded[example].units)
        if order is not None:
            wanted[example] += [_first(order, _count(fraction, n)) for fraction in fractions]
            wanted[example] += [~_first(order, _count(fraction, n)) for fraction in fractions]
            if example in normalised:
                wanted[example] += _chain(order) + _chain(order[::-1])
        wanted[example] += list(np.eye(n, dtype=bool))
    _drops(coalitions, wanted, progress and "removal")
    bounds = _bounds(coalitions, normalised, longest_exact, beam, progress)
    areas: dict[tuple[Any, ...], float] = {}
    for (example, *key), order in orders.items():
        if order is not None and example in bounds:
            for name, way in (("comprehensiveness", order), ("sufficiency", order[::-1])):
                area = float(_drops(coalitions, {example: _chain(way)})[example].mean())
                areas[example, *key, name] = area
                # Exact bounds hold; a beam search may have missed what a ranking found.
                bounds[example] = min(bounds[example][0], area), max(bounds[example][1], area)
    rows: list[tuple[Any, ...]] = []
    for (example, method, draw), order in orders.items():
        n = len(coalitions.encoded[example].units)
        measured = dict.fromkeys(MEASURES, float("nan"))
        points: dict[str, list[float]] = {"comprehensiveness": [], "sufficiency": []}
        if order is not None:
            firsts = [_first(order, _count(fraction, n)) for fraction in fractions]
            points["comprehensiveness"] = _drops(coalitions, {example: firsts})[example].tolist()
            points["sufficiency"] = _drops(coalitions, {example: [~one for one in firsts]})[example].tolist()
            measured |= {name: float(np.mean(values)) for name, values in points.items()}
            alone = _drops(coalitions, {example: list(np.eye(n, dtype=bool))})[example]
            measured["leave_one_out"] = agreement(vectors[example][method, draw], alone, "spearman", rank_by=rank_by)
            if example in bounds:
                low, high = bounds[example]
                for name in points:
                    area = areas[example, method, draw, name]
                    measured[f"normalised_{name}"] = (area - low) / (high - low) if high > low else float("nan")
        for name, values in points.items():
            rows += [(example, method, draw, name, at, value) for at, value in zip(fractions, values, strict=False)]
        rows += [
            (example, method, draw, name, float("nan"), value)
            for name, value in measured.items()
            if example in bounds or not name.startswith("normalised")
        ]
    frame = pd.DataFrame(rows, columns=[column.name for column in FAITHFULNESS_COLUMNS])
    parameters = {
        **explanations.provenance.parameters,
        "scores": scores_digest(explanations),
        "faithful_rank_by": rank_by,
        "fractions": list(fractions),
        "n_normalised": len(normalised),
        "longest_exact": longest_exact,
        "beam": beam,
        "asked": int(coalitions.asked.sum()) - asked_before,
        "computed": int(coalitions.computed.sum()) - computed_before,
    }
    provenance = dataclasses.replace(
        explanations.provenance, parameters=parameters, wall_time=time.perf_counter() - start
    )
    return Result("agreement.faithfulness", frame, FAITHFULNESS_COLUMNS, provenance)


def faithfulness_means(result: Result, level: float = 0.95, n_resamples: int = 2000) -> pd.DataFrame:
    """Mean of every measure by method, seeds averaged within an example, with a bootstrap interval over examples.

    Args:
        result: what `faithfulness` gave.
        level, n_resamples: of the interval.

    Returns:
        Columns method, measure, fraction (NaN: AOPC), mean, sd, low, high, n, n_nan.
    """
    keys = ["method", "measure", "fraction"]
    frame = result.frame.astype({"method": str, "measure": str})
    each = frame.groupby([*keys, "example"], sort=False, dropna=False)["value"].mean().reset_index()
    rows = []
    for key, group in each.groupby(keys, sort=False, dropna=False):
        values = group["value"].to_numpy(float)
        known = values[np.isfinite(values)]
        low, high = bootstrap_mean(known, n_resamples, level)
        mean = float(known.mean()) if len(known) else float("nan")
        sd = float(known.std(ddof=1)) if len(known) > 1 else float("nan")
        rows.append((*key, mean, sd, float(low), float(high), len(known), len(values) - len(known)))
    return pd.DataFrame(rows, columns=[*keys, "mean", "sd", "low", "high", "n", "n_nan"])


def best_and_worst(values: np.ndarray, n: int) -> tuple[float, float]:
    """The least and the greatest mean of a chain of removals, over all n! orders.

    Args:
        values: (2ⁿ) drops f(x) − f(x without the set), sets in `every_coalition`'s order (here what is *removed*).
        n: units.

    Returns:
        (worst, best): by dynamic programming over sets, best[S] = drop(S) + max over i in S of best[S without i].

    Example:
        >>> best_and_worst(np.array([0.0, 1.0, 3.0, 4.0]), 2)
        (2.5, 3.5)
    """
    rows = np.arange(2**n)
    sizes = np.array([int(row).bit_count() for row in rows])
    least, most = np.full(2**n, np.inf), np.full(2**n, -np.inf)
    least[0] = most[0] = 0.0
    for size in range(1, n + 1):
        here = rows[sizes == size]
        for unit in range(n):
            holds = here[(here >> unit) & 1 == 1]
            least[holds] = np.minimum(least[holds], least[holds ^ (1 << unit)])
            most[holds] = np.maximum(most[holds], most[holds ^ (1 << unit)])
        least[here] += values[here]
        most[here] += values[here]
    return float(least[-1] / n), float(most[-1] / n)


def _bounds(
    coalitions: Coalitions, examples: Sequence[int], longest_exact: int, beam: int, progress: Any
) -> dict[int, tuple[float, float]]:
    """(worst, best) AOPC of every example."""
    sizes = {example: len(coalitions.encoded[example].units) for example in examples}
    exact = [example for example in examples if sizes[example] <= longest_exact]
    every = _drops(coalitions, {at: list(every_coalition(sizes[at])) for at in exact}, progress and "every order")
    found = {example: best_and_worst(every[example], sizes[example]) for example in exact}
    rest = [example for example in examples if sizes[example] > longest_exact]
    ends = {sign: _beam_search(coalitions, rest, beam, sign, progress) for sign in (-1, 1)}
    return found | {example: (ends[-1][example], ends[1][example]) for example in rest}


def _beam_search(
    coalitions: Coalitions, examples: Sequence[int], beam: int, sign: int, progress: Any
) -> dict[int, float]:
    """The greatest (sign 1) or least (−1) AOPC that a beam search over orders finds."""
    sizes = {example: len(coalitions.encoded[example].units) for example in examples}
    kept: dict[int, dict[bytes, float]] = {example: {bytes(sizes[example]): 0.0} for example in examples}
    for step in range(max(sizes.values(), default=0)):
        grown: dict[int, dict[bytes, float]] = {}
        for example in examples:
            if step >= sizes[example]:
                continue
            grown[example] = {}
            for removed, total in kept[example].items():
                for unit in range(sizes[example]):
                    if not removed[unit]:
                        more = removed[:unit] + b"\1" + removed[unit + 1 :]
                        best = grown[example].get(more)
                        grown[example][more] = total if best is None or sign * total > sign * best else best
        asked = {at: [np.frombuffer(one, dtype=bool) for one in sets] for at, sets in grown.items()}
        drops = _drops(coalitions, asked, progress and f"orders, step {step + 1}")
        for example, sets in grown.items():
            totals = [(total + drop, one) for (one, total), drop in zip(sets.items(), drops[example], strict=True)]
            totals.sort(key=lambda pair: -sign * pair[0])
            kept[example] = {one: total for total, one in totals[:beam]}
    return {
        example: sign * max(sign * total for total in kept[example].values()) / sizes[example] for example in examples
    }


def _drops(
    coalitions: Coalitions, removed: dict[int, list[np.ndarray]], progress: Any = False
) -> dict[int, np.ndarray]:
    """f(x) − f(x without some units), for sets of removed units."""
    kept = {example: _tokens_kept(coalitions, example, sets) for example, sets in removed.items() if len(sets)}
    values = coalitions.values(kept, progress)
    return {example: coalitions.full(example) - values[example] for example in kept}


def _tokens_kept(coalitions: Coalitions, example: int, removed: Sequence[np.ndarray]) -> np.ndarray:
    groups = coalitions.encoded[example].units
    owner = np.empty(coalitions.size(example), dtype=int)
    for unit, group in enumerate(groups):
        owner[list(group)] = unit
    return ~np.stack(list(removed))[:, owner]


def _order(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """Units from the highest score to the lowest, equal ones at random; `None` where there is no ranking."""
    if len(scores) < 2 or not np.isfinite(scores).all() or np.ptp(scores) == 0:
        return None
    return np.lexsort([rng.random(len(scores)), -scores])


def _first(order: np.ndarray, count: int) -> np.ndarray:
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order[:count]] = True
    return chosen


def _chain(order: np.ndarray) -> list[np.ndarray]:
    return [_first(order, count) for count in range(1, len(order) + 1)]


def _count(fraction: float, n: int) -> int:
    return int(np.ceil(round(fraction * n, 9)))


def _check_same(coalitions: Coalitions, explanations: Result) -> None:
    made, here = explanations.provenance.parameters, about_run(coalitions)
    different = [key for key in here if made.get(key) != here[key]]
    if explanations.provenance.fingerprint != coalitions.model.fingerprint:
        different.append("model")
    if different:
        raise InputError(
            f"the explanations are of another {', '.join(different)}: tokens or targets would not match; explain these examples "
            f"with this model and task first"
        )


def scores_digest(explanations: Result) -> str:
    """Which scores were ranked: 16 hex digits."""
    return hashlib.sha256(explanations.frame["score"].to_numpy(float).tobytes()).hexdigest()[:16]


def _baseline(made: Mapping[str, Any]) -> str | int:
    """As it was given: an id's name is the id, and a text of digits has another id than its number."""
    name, token = str(made["baseline"]), int(made["baseline_id"])
    return token if name == str(token) else name
