"""Do heads attend to the sink more on one domain than on another? Every pair of domains, every head.

1. Per head and domain, one number per text (by default m_0, the attention on key 0); the difference of the means.
2. Its bootstrap interval over texts, and a permutation test of the texts' domain labels (`interp.intervals`).
3. False discoveries are controlled over all heads and all pairs together (Benjamini–Hochberg), and the second interval is
   widened to match (`low_fcr`, `high_fcr`; Benjamini–Yekutieli 2005): among the heads that pass, at most a share alpha of these
   intervals misses.

Texts of different lengths have different masses whatever the head does; compare domains of one length.
"""

from __future__ import annotations

import math
import time
from itertools import combinations

import numpy as np
import pandas as pd

from interp.errors import InputError
from interp.intervals import bootstrap_difference, false_discovery, permutation_test
from interp.provenance import Provenance
from interp.results import Column, Result
from interp.sinks.scan_table import Scan

_TAIL = 20  # resamples that lie beyond each end of an interval
_MOST = 400_000  # permutations or resamples of a single head
COMPARE_COLUMNS = (
    Column("domain_a", "category", "", "first domain"),
    Column("domain_b", "category", "", "second domain"),
    Column("layer", "int16", "layer", "0-based"),
    Column("head", "int16", "head", "0-based"),
    Column("mean_a", "float64", "", "mean of the measure over the texts of domain_a"),
    Column("mean_b", "float64", "", "the same of domain_b"),
    Column("difference", "float64", "", "mean_a − mean_b"),
    Column("low", "float64", "", "lower end of its 95 % bootstrap interval over texts"),
    Column("high", "float64", "", "upper end"),
    Column("p", "float64", "probability", "two-sided permutation test of the domain labels"),
    Column("q", "float64", "probability", "p after Benjamini–Hochberg over all heads and pairs"),
    Column("low_fcr", "float64", "", "lower end of the interval widened for selection (Benjamini–Yekutieli)"),
    Column("high_fcr", "float64", "", "upper end"),
    Column("n_a", "int32", "texts", "texts of domain_a"),
    Column("n_b", "int32", "texts", "texts of domain_b"),
)


def compare(
    scan: Scan,
    measure: str = "mass_first",
    *,
    alpha: float = 0.05,
    n_permutations: int = 9999,
    n_resamples: int = 5000,
    seed: int = 0,
    unequal_lengths: bool = False,
) -> Result:
    """Every pair of domains, head by head.

    Args:
        scan: of at least two domains.
        measure: a head's measure: "mass_first", "mass_sinks", "value_ratio", "delta_logit", ….
        alpha: share of false discoveries that is accepted.
        n_permutations: label assignments of the test; all of them where there are fewer. Heads that none of them reached, and
            that could pass with more, get as many as the number of tests asks for.
        n_resamples: of the bootstrap; more for the widened intervals of the heads that pass, where their level asks for it.
        seed: of both.
        unequal_lengths: compare texts of different lengths all the same.

    Returns:
        A `Result` of kind "sinks.compare": one row per pair, layer and head. A domain of one text has no interval (missing).

    Raises:
        InputError: fewer than two domains, an unknown measure, alpha outside (0, 1), texts of different lengths.
    """
    start = time.perf_counter()
    if not isinstance(scan, Scan):
        raise InputError(f"compare takes what interp.sinks.scan gave, got {type(scan).__name__}")
    if len(scan.domains) < 2:
        raise InputError(f"the scan has one domain, {scan.domains[0]!r}; give scan at least two to compare")
    if not 0 < alpha < 1:
        raise InputError(f"alpha={alpha}; expected a number between 0 and 1, such as 0.05")
    _check_lengths(scan, unequal_lengths)
    values = by_text(scan, measure)
    pairs = list(combinations(scan.domains, 2))
    arrays = {name: values[name].to_numpy(dtype=np.float64) for name in scan.domains}
    parts = []
    for a, b in pairs:
        first, second = arrays[a], arrays[b]
        low, high = bootstrap_difference(first, second, n_resamples, seed=seed)
        parts.append(
            values[a]
            .columns.to_frame(index=False)
            .assign(domain_a=a, domain_b=b, mean_a=first.mean(0), mean_b=second.mean(0), low=low, high=high)
            .assign(p=permutation_test(first, second, n_permutations, seed), n_a=len(first), n_b=len(second))
        )
    frame = pd.concat(parts, ignore_index=True)
    frame["difference"] = frame["mean_a"] - frame["mean_b"]
    width = len(parts[0])
    p = np.stack([part["p"].to_numpy() for part in parts])  # (pair, head)
    _refine(p, [(arrays[a], arrays[b]) for a, b in pairs], alpha, n_permutations, seed)
    q, level = false_discovery(p, alpha)
    frame["p"], frame["q"] = p.ravel(), q.ravel()
    # Tails beyond what the usual number of resamples shows; only heads that pass need them.
    enough = min(_MOST, max(n_resamples, math.ceil(2 * _TAIL / (1 - level))))
    wide = np.empty((2, len(pairs), width))
    for at, (a, b) in enumerate(pairs):
        wide[:, at] = bootstrap_difference(arrays[a], arrays[b], n_resamples, level, seed)
        passed = q[at] <= alpha
        if enough > n_resamples and passed.any():
            wide[:, at, passed] = bootstrap_difference(arrays[a][:, passed], arrays[b][:, passed], enough, level, seed)
    frame["low_fcr"], frame["high_fcr"] = wide[0].ravel(), wide[1].ravel()
    for name in ("domain_a", "domain_b"):
        frame[name] = pd.Categorical(frame[name], categories=scan.domains)
    parameters = {
        **scan.provenance.parameters,
        "measure": measure,
        "alpha": alpha,
        "fcr_level": level,
        "n_permutations": n_permutations,
        "n_resamples": n_resamples,
    }
    provenance = provenance_of(scan, parameters, seed, time.perf_counter() - start)
    return Result("sinks.compare", frame[[column.name for column in COMPARE_COLUMNS]], COMPARE_COLUMNS, provenance)


def by_text(scan: Scan, measure: str) -> dict[str, pd.DataFrame]:
    """One measure by text and head; a text without any sink puts no mass on sinks."""
    values = scan.values(measure)
    return {name: table.fillna(0.0) for name, table in values.items()} if measure == "mass_sinks" else values


def _check_lengths(scan: Scan, unequal_lengths: bool) -> None:
    lengths = scan.frame.groupby("domain", observed=True)["n_tokens"].agg(["min", "max"])
    if not unequal_lengths and lengths["min"].min() < lengths["max"].max():
        named = ", ".join(f"{name}: {row['min']}–{row['max']}" for name, row in lengths.iterrows())
        raise InputError(
            f"the texts have different lengths ({named} tokens), and a head's mass depends on the length whatever it does; scan "
            f"with length=…, or pass unequal_lengths=True"
        )


def _refine(
    p: np.ndarray, domains: list[tuple[np.ndarray, np.ndarray]], alpha: float, n_permutations: int, seed: int
) -> None:
    """More permutations, in place, for heads at the smallest p there can be, where that alone keeps them from passing."""
    q, _ = false_discovery(p, alpha)
    # The best of m tests passes from p = alpha / m on.
    needed = math.ceil(2 * np.isfinite(p).sum() / alpha)
    for at, (first, second) in enumerate(domains):
        stuck = (p[at] <= 1.5 / (1 + n_permutations)) & (q[at] > alpha)
        if stuck.any() and needed > n_permutations:
            p[at, stuck] = permutation_test(first[:, stuck], second[:, stuck], min(needed, _MOST), seed)


def provenance_of(scan: Scan, parameters: dict, seed: int, wall_time: float) -> Provenance:
    """The scan's model and machine, with what was computed from it."""
    from dataclasses import replace

    now = Provenance.collect(seed=seed, parameters=parameters, wall_time=wall_time)
    return replace(
        scan.provenance, seed=now.seed, parameters=now.parameters, wall_time=now.wall_time, created=now.created
    )
