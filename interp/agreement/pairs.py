"""Agreement of every two methods over the examples, with its interval, its chance level and its ceiling.

1. Per example and seed: `interp.agreement.rankings` compares method a under the seed with method b under the same seed. A
   method of one seed serves every seed; of two methods with several, the seeds that both have count.
2. Per example: the mean over the seeds that gave a number. No seed did (constant or failed explanation, a single unit): the
   example is NaN, and counted. A method that an example lacks counts as failed there.
3. A method with itself: the mean over all pairs of two different seeds. A method of one seed draws nothing and repeats
   itself: exactly 1 wherever it ranks anything, also where its own ties would make a measure at k less. If the explanations
   name it among their "random_methods", its repeat is unknown: NaN.
4. Per pair of methods: mean, standard deviation and n over the examples; percentile bootstrap of the mean over examples
   (`interp.intervals`), since the tokens and seeds of one example are not independent.
5. chance: the mean, over the same examples and seeds, of what the measure is worth when one method's scores are dealt to the
   units at random. ceiling: √ of the product of the two methods' agreement with themselves, what two rankings of the same
   thing would reach with that much noise (Spearman 1904's attenuation, exact for correlations, a guide for the others).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from interp.agreement.explanation_table import score_vectors, seeds_of
from interp.agreement.rankings import MEASURES, agreement_matrix, chance_matrix, check_measure
from interp.errors import InputError
from interp.intervals import bootstrap_mean
from interp.results import Column, Result

KIND = "agreement.pairwise_agreement"
PAIR_COLUMNS = (
    Column("measure", "category", "", "how agreement is measured, see interp.agreement.rankings"),
    Column("k", "int16", "units", "top units that are compared; 0: all, the measure has no k"),
    Column("method_a", "category", "", "one method"),
    Column("method_b", "category", "", "the other; the same: the method under another seed"),
    Column("mean", "float64", "agreement", "over the examples, each the mean of its seeds"),
    Column("sd", "float64", "agreement", "standard deviation over the examples; NaN below two"),
    Column("n", "int32", "examples", "that gave a number"),
    Column("n_nan", "int32", "examples", "that gave none: constant or failed explanation, one unit, no second seed"),
    Column("low", "float64", "agreement", "lower end of the mean's bootstrap interval over examples"),
    Column("high", "float64", "agreement", "upper end"),
    Column("chance", "float64", "agreement", "mean expected agreement with one method's scores dealt at random"),
    Column(
        "ceiling", "float64", "agreement", "√ of the product of both methods' agreement with themselves; NaN: unknown"
    ),
)


def pairwise_agreement(
    explanations: Result,
    measures: str | Sequence[str] = tuple(MEASURES),
    k: int | Sequence[int] = (3,),
    *,
    rank_by: str = "abs",
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Result:
    """How much every two methods agree, beside what chance gives and what two seeds of one method give.

    Args:
        explanations: what `interp.agreement.explain` gave: two methods or more.
        measures: names in `interp.agreement.rankings.MEASURES`; all by default.
        k: how many top units the measures at k look at, one or several numbers; in shorter texts all units count.
        rank_by: "abs", how far a score is from 0, or "signed". A sign is always the score's own.
        level: of the intervals.
        n_resamples: how often the examples are drawn with replacement.
        seed: of these draws.

    Returns:
        A `Result` of kind "agreement.pairwise_agreement" with `PAIR_COLUMNS`: one row per measure, k and unordered pair of
        methods, each method with itself included. The methods keep the order of the explanations.

    Raises:
        InputError: another kind of result, no example, fewer than two methods, units that differ between the methods of one
            example, an unknown measure or `rank_by`, k below 1, no resamples, a level outside (0, 1).

    Example:
        >>> from interp.agreement.explanation_table import EXPLANATION_COLUMNS
        >>> from interp.results import Provenance
        >>> table = pd.DataFrame({column.name: 0 for column in EXPLANATION_COLUMNS}, index=range(6))
        >>> table = table.assign(method=["rollout"] * 3 + ["lime"] * 3, unit=[0, 1, 2] * 2, token="a")
        >>> table = table.assign(score=[0.6, 0.3, 0.1, 2.0, -3.0, 1.0])
        >>> explanations = Result("agreement.explain", table, EXPLANATION_COLUMNS, Provenance())
        >>> found = pairwise_agreement(explanations, "pairwise").frame
        >>> found[["method_a", "method_b", "mean", "chance"]].round(2).values.tolist()
        [['rollout', 'rollout', 1.0, 0.5], ['rollout', 'lime', 0.67, 0.5], ['lime', 'lime', 1.0, 0.5]]
    """
    start = time.perf_counter()
    settings = _settings(measures, k, rank_by)
    if not 0 < level < 1:
        raise InputError(f"level={level}; expected a number between 0 and 1, such as 0.95")
    if n_resamples < 1:
        raise InputError(f"n_resamples={n_resamples}; expected at least 1, better 2000")
    compared = _compare(explanations, settings, rank_by)
    names, n_pairs = list(compared.methods), len(compared.pairs)
    values = compared.values.reshape(len(compared.examples), -1)  # (example, setting × pair)
    table = _summary(values, compared.chance.reshape(values.shape), level, n_resamples, seed)
    itself = np.array([a == b for a, b in compared.pairs])
    certain = np.tile([a == b and len(compared.methods[a]) == 1 for a, b in compared.pairs], len(settings))
    for end in ("low", "high"):  # also of one example: a method that draws nothing repeats itself
        table[end] = np.where(certain, table["mean"], table[end])
    ceilings = table["mean"].reshape(len(settings), n_pairs)[:, itself]  # (setting, method)
    first, second = np.array([[names.index(name) for name in pair] for pair in compared.pairs], dtype=np.int64).T
    labels = list(dict.fromkeys(measure for measure, _ in settings))
    frame = pd.DataFrame(
        {
            "measure": pd.Categorical(np.repeat([measure for measure, _ in settings], n_pairs), labels),
            "k": np.repeat([at for _, at in settings], n_pairs),
            "method_a": pd.Categorical(np.tile(np.array(names, object)[first], len(settings)), names),
            "method_b": pd.Categorical(np.tile(np.array(names, object)[second], len(settings)), names),
            **table,
            "ceiling": np.sqrt(np.clip(ceilings[:, first], 0, None) * np.clip(ceilings[:, second], 0, None)).ravel(),
        }
    )
    parameters = {
        **explanations.provenance.parameters,
        "measures": labels,
        "k": sorted({at for _, at in settings if at}),
        "rank_by": rank_by,
        "level": float(level),
        "n_resamples": int(n_resamples),
        "bootstrap_seed": int(seed),
        "n_examples": len(compared.examples),
    }
    provenance = dataclasses.replace(
        explanations.provenance, parameters=parameters, wall_time=time.perf_counter() - start
    )
    return Result(KIND, frame, PAIR_COLUMNS, provenance)


def pair_values(explanations: Result, measure: str = "kendall", k: int = 0, rank_by: str = "abs") -> pd.DataFrame:
    """The agreement of every two methods on every example, for comparisons of pairs over the same examples.

    Args:
        explanations: what `interp.agreement.explain` gave.
        measure: a name in `interp.agreement.rankings.MEASURES`.
        k: how many top units a measure at k looks at; the others do not use it.
        rank_by: "abs" or "signed".

    Returns:
        Columns example, method_a, method_b, value: the mean over seeds, NaN as the module docstring says; a method with
        itself included. Examples and pairs are in the order of the explanations.

    Raises:
        InputError: as `pairwise_agreement`.

    Example:
        >>> from interp.agreement.explanation_table import EXPLANATION_COLUMNS
        >>> from interp.results import Provenance
        >>> table = pd.DataFrame({column.name: 0 for column in EXPLANATION_COLUMNS}, index=range(4))
        >>> table = table.assign(method=["random", "random", "lime", "lime"], unit=[0, 1] * 2, token="a")
        >>> table = table.assign(score=[0.1, 0.2, 3.0, 1.0])
        >>> pair_values(Result("agreement.explain", table, EXPLANATION_COLUMNS, Provenance())).values.tolist()
        [[0, 'random', 'random', 1.0], [0, 'random', 'lime', -1.0], [0, 'lime', 'lime', 1.0]]
    """
    check_measure(measure, k, rank_by)
    compared = _compare(explanations, [(measure, int(k))], rank_by)
    n_examples, n_pairs = len(compared.examples), len(compared.pairs)
    return pd.DataFrame(
        {
            "example": np.repeat(compared.examples, n_pairs),
            "method_a": np.tile(np.array([a for a, _ in compared.pairs], object), n_examples),
            "method_b": np.tile(np.array([b for _, b in compared.pairs], object), n_examples),
            "value": compared.values.ravel(),
        }
    )


def matrix(result: Result, measure: str = "kendall", k: int = 0, column: str = "mean") -> pd.DataFrame:
    """One column of `pairwise_agreement` as a symmetric table, method by method.

    Args:
        result: of kind "agreement.pairwise_agreement".
        measure: one that it holds.
        k: of a measure at k: one that it holds; 0 where it holds only one.
        column: mean, sd, n, n_nan, low, high, chance or ceiling.

    Returns:
        (method, method), in the order of the explanations.

    Raises:
        InputError: another kind of result, or it does not hold the measure, the k or the column.
    """
    if getattr(result, "kind", None) != KIND:
        raise InputError(f"{result!r:.60}; expected what interp.agreement.pairwise_agreement gives")
    columns = [entry.name for entry in PAIR_COLUMNS[4:]]
    if column not in columns:
        raise InputError(f"column={column!r}; expected one of {', '.join(columns)}")
    rows = result.frame[(result.frame["measure"] == measure) & (result.frame["k"] == used_k(result, measure, k))]
    names = pd.Index([str(name) for name in rows["method_a"].cat.categories])
    first, second = (names.get_indexer(pd.Index(rows[side].astype(str))) for side in ("method_a", "method_b"))
    values = rows[column].to_numpy()
    square = np.zeros((len(names), len(names)), values.dtype)
    square[first, second] = square[second, first] = values
    return pd.DataFrame(square, index=names, columns=names)


def used_k(result: Result, measure: str, k: int) -> int:
    """The k that the table holds for a measure: the one asked for, or the only one.

    Raises:
        InputError: the table does not hold the measure, or the k.
    """
    rows = result.frame[result.frame["measure"] == measure]
    if rows.empty:
        held = ", ".join(result.frame["measure"].astype(str).unique())
        raise InputError(f"measure={measure!r}; the table holds {held}")
    known = [int(at) for at in rows["k"].unique()]
    at = known[0] if len(known) == 1 and (k == 0 or known == [0]) else k
    if at not in known:
        raise InputError(f"k={k!r}; of {measure} the table holds k = {', '.join(map(str, known))}")
    return at


@dataclasses.dataclass(frozen=True)
class _Compared:
    """Every pair of methods on every example: values and chance are (example, setting, pair), pairs are of methods."""

    examples: list[int]
    methods: dict[str, list[int]]
    pairs: list[tuple[str, str]]
    values: np.ndarray
    chance: np.ndarray


def _settings(measures: str | Sequence[str], k: int | Sequence[int], rank_by: str) -> list[tuple[str, int]]:
    """(measure, k) in order, each once; k is 0 where the measure has none."""
    names = [measures] if isinstance(measures, str) else list(measures)
    several = list(k) if isinstance(k, Sequence | np.ndarray) else [k]
    if not names:
        raise InputError(f"no measures were given; expected some of {', '.join(MEASURES)}")
    if not several:
        raise InputError("no k was given; expected one or more numbers of top units, such as k=3")
    for name in names:
        for at in several:
            check_measure(name, at, rank_by)
    return list(dict.fromkeys((name, int(at)) for name in names for at in (several if MEASURES[name].at_k else [0])))


def _compare(explanations: Result, settings: list[tuple[str, int]], rank_by: str) -> _Compared:
    vectors = score_vectors(explanations, "signed")
    methods = seeds_of(explanations)
    if not vectors:
        raise InputError("the explanations hold no example; expected one or more, each explained by two methods")
    if len(methods) < 2:
        raise InputError(f"agreement needs two methods; the explanations hold only {', '.join(methods)}")
    _check_units(explanations.frame)
    unknown = set(explanations.provenance.parameters.get("random_methods") or ())
    rows = {key: at for at, key in enumerate((name, seed) for name, seeds in methods.items() for seed in seeds)}
    names = list(methods)
    pairs = [(a, b) for at, a in enumerate(names) for b in names[at:]]
    compared = [
        (rows[one], rows[two], at) for at, pair in enumerate(pairs) for one, two in _runs(*pair, methods, unknown)
    ]
    left, right, owner = np.array(compared, dtype=np.intp).reshape(-1, 3).T
    repeats = left == right  # a method that draws nothing, with itself
    values = np.full((len(vectors), len(settings), len(pairs)), np.nan)
    by_chance = values.copy()
    for example, found in enumerate(vectors.values()):
        scores = np.full((len(rows), len(next(iter(found.values())))), np.nan)
        for key, vector in found.items():
            scores[rows[key]] = vector
        for at, (measure, k) in enumerate(settings):
            got = agreement_matrix(scores, measure, k, rank_by)[left, right]
            got[repeats & np.isfinite(got)] = 1.0
            expected = chance_matrix(scores, measure, k, rank_by)[left, right]
            values[example, at] = _mean_by(got, owner, len(pairs))
            by_chance[example, at] = _mean_by(expected, owner, len(pairs))
    return _Compared(list(vectors), methods, pairs, values, by_chance)


def _runs(a: str, b: str, methods: dict[str, list[int]], unknown: set[str]) -> list[tuple[Any, Any]]:
    """The two (method, seed) of every comparison that counts for a pair of methods."""
    if a == b:
        if len(methods[a]) == 1:
            return [] if a in unknown else [((a, methods[a][0]), (a, methods[a][0]))]
        return [((a, one), (a, two)) for one, two in combinations(methods[a], 2)]
    if len(methods[a]) == 1:
        return [((a, methods[a][0]), (b, seed)) for seed in methods[b]]
    if len(methods[b]) == 1:
        return [((a, seed), (b, methods[b][0])) for seed in methods[a]]
    return [((a, seed), (b, seed)) for seed in methods[a] if seed in methods[b]]


def _check_units(frame: pd.DataFrame) -> None:
    """Every method and seed of an example must score the same units, each once."""
    keys = ["example", "method", "seed"]
    if frame.duplicated([*keys, "unit"]).any():
        row = frame[frame.duplicated([*keys, "unit"])].iloc[0]
        raise InputError(f"example {row['example']}: {row['method']} scores unit {row['unit']} twice; expected once")
    expected = frame.drop_duplicates(["example", "unit"]).groupby("example").size()
    sizes = frame.groupby(keys, sort=False, observed=True).size().rename("size").reset_index()
    short = sizes[sizes["size"].to_numpy() != expected.loc[sizes["example"]].to_numpy()]
    if len(short):
        example, method, _, size = short.iloc[0]
        hint = "explain it again with every method over the same units"
        raise InputError(f"example {example}: {method} scores {size} of {expected.loc[example]} units; {hint}")


def _mean_by(values: np.ndarray, owner: np.ndarray, n: int) -> np.ndarray:
    """(pair) mean of the numbers among a pair's values; NaN where there is none."""
    known = np.isfinite(values)
    count = np.bincount(owner[known], minlength=n)
    total = np.bincount(owner[known], weights=values[known], minlength=n)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _summary(
    values: np.ndarray, by_chance: np.ndarray, level: float, n_resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Step 4 for every column of (example, column) values; columns that lack the same examples share their draws."""
    known = np.isfinite(values)
    n = known.sum(0)
    table = {name: np.full(values.shape[1], np.nan) for name in ("mean", "sd", "low", "high", "chance")}
    masks, group = np.unique(known, axis=1, return_inverse=True)
    for at, mask in enumerate(masks.T):
        if not mask.any():
            continue
        columns = np.flatnonzero(group.ravel() == at)
        chosen = values[np.ix_(mask, columns)]
        low, high = bootstrap_mean(chosen, n_resamples, level, seed)
        # All the same: exactly that number, which sums would round.
        same = (chosen == chosen[0]).all(0)
        exact = same & (mask.sum() > 1)
        table["mean"][columns] = np.where(same, chosen[0], chosen.mean(0))
        table["low"][columns], table["high"][columns] = (np.where(exact, chosen[0], end) for end in (low, high))
        table["chance"][columns] = by_chance[np.ix_(mask, columns)].mean(0)
        if mask.sum() > 1:
            table["sd"][columns] = np.where(same, 0.0, chosen.std(0, ddof=1))
    return {
        **{name: table[name] for name in ("mean", "sd")},
        "n": n,
        "n_nan": len(values) - n,
        **{name: table[name] for name in ("low", "high", "chance")},
    }
