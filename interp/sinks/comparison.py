"""Do heads attend to the sink more on one domain than on another? Every pair of domains, every head.

1. Per head and domain, one number per text (by default m_0, the attention on key 0); the difference of the means.
2. Its bootstrap interval over texts, and a permutation test of the texts' domain labels (`interp.sinks.intervals`).
3. False discoveries are controlled over all heads and all pairs together (Benjamini–Hochberg), and the second interval is
   widened to match (`low_fcr`, `high_fcr`; Benjamini–Yekutieli 2005): among the heads that pass, at most a share alpha of these
   intervals misses.

Texts of different lengths have different masses whatever the head does; compare domains of one length.
"""

from __future__ import annotations

import time
from itertools import combinations

import numpy as np
import pandas as pd

from interp.errors import InputError
from interp.provenance import Provenance
from interp.results import Column, Result
from interp.sinks.intervals import bootstrap_difference, false_discovery, permutation_test
from interp.sinks.scan_table import Scan

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
) -> Result:
    """Every pair of domains, head by head.

    Args:
        scan: of at least two domains.
        measure: a head's measure: "mass_first", "mass_sinks", "value_ratio", "delta_logit", ….
        alpha: share of false discoveries that is accepted.
        n_permutations: label assignments of the test; all of them where there are fewer.
        n_resamples: of the bootstrap.
        seed: of both.

    Returns:
        A `Result` of kind "sinks.compare": one row per pair, layer and head. A domain of one text has no interval (missing).

    Raises:
        InputError: fewer than two domains, an unknown measure, alpha outside (0, 1).
    """
    start = time.perf_counter()
    if not isinstance(scan, Scan):
        raise InputError(f"compare takes what interp.sinks.scan gave, got {type(scan).__name__}")
    if len(scan.domains) < 2:
        raise InputError(f"the scan has one domain, {scan.domains[0]!r}; give scan at least two to compare")
    if not 0 < alpha < 1:
        raise InputError(f"alpha={alpha}; expected a number between 0 and 1, such as 0.05")
    values = scan.values(measure)
    settings = {"n_resamples": n_resamples, "seed": seed}
    parts, draws = [], []
    for a, b in combinations(scan.domains, 2):
        first, second = (values[name].to_numpy(dtype=np.float64) for name in (a, b))
        low, high = bootstrap_difference(first, second, **settings)  # type: ignore[arg-type]
        draws.append((first, second))
        parts.append(
            values[a]
            .columns.to_frame(index=False)
            .assign(domain_a=a, domain_b=b, mean_a=first.mean(0), mean_b=second.mean(0), low=low, high=high)
            .assign(p=permutation_test(first, second, n_permutations, seed), n_a=len(first), n_b=len(second))
        )
    frame = pd.concat(parts, ignore_index=True)
    frame["difference"] = frame["mean_a"] - frame["mean_b"]
    frame["q"], level = false_discovery(frame["p"].to_numpy(), alpha)
    wide = [bootstrap_difference(first, second, level=level, **settings) for first, second in draws]  # type: ignore[arg-type]
    frame["low_fcr"], frame["high_fcr"] = (np.concatenate([pair[end] for pair in wide]) for end in (0, 1))
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


def provenance_of(scan: Scan, parameters: dict, seed: int, wall_time: float) -> Provenance:
    """The scan's model and machine, with what was computed from it."""
    from dataclasses import replace

    now = Provenance.collect(seed=seed, parameters=parameters, wall_time=wall_time)
    return replace(
        scan.provenance, seed=now.seed, parameters=now.parameters, wall_time=now.wall_time, created=now.created
    )
