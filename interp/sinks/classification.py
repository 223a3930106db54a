"""Name heads: dormant, active, mixed and active-dormant.

A head is *dormant* on a domain where its attention on the sink exceeds 0.9, *active* where it is below 0.5 (parameters; Guo et
al., arXiv 2410.13835, show such heads without giving thresholds). Over all domains of a scan it is

    dormant          dormant on every domain
    active           active on every domain
    active-dormant   dormant on one domain, active on another, and the difference survives: q ≤ alpha, and its interval,
                     widened for the selection of heads and pairs, excludes zero (`interp.sinks.compare`)
    mixed            everything else

`domain_dependent` says whether the largest difference survives, whatever the thresholds. A name is no proof that the head
matters: confirm with `interp.sinks.ablate`, on other texts.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from interp.errors import InputError
from interp.results import Column, Result
from interp.sinks.comparison import by_text, compare, provenance_of
from interp.sinks.scan_table import Scan, mean_and_interval

LABELS = ("active-dormant", "dormant", "active", "mixed")
CLASSIFY_COLUMNS = (
    Column("layer", "int16", "layer", "0-based"),
    Column("head", "int16", "head", "0-based"),
    Column("label", "category", "", "active-dormant, dormant, active or mixed"),
    Column(
        "domain_dependent", "boolean", "", "the largest difference between domains survives; missing with one domain"
    ),
    Column("domain_high", "category", "", "domain with the largest mass on the sink"),
    Column("mean_high", "float64", "probability", "mean mass there"),
    Column("low_high", "float64", "probability", "lower end of its 95 % interval"),
    Column("high_high", "float64", "probability", "upper end"),
    Column("domain_low", "category", "", "domain with the smallest mass on the sink"),
    Column("mean_low", "float64", "probability", "mean mass there"),
    Column("low_low", "float64", "probability", "lower end of its 95 % interval"),
    Column("high_low", "float64", "probability", "upper end"),
    Column("difference", "float64", "probability", "mean_high − mean_low"),
    Column("low", "float64", "probability", "lower end of its interval, widened for selection"),
    Column("high", "float64", "probability", "upper end"),
    Column("p", "float64", "probability", "permutation test"),
    Column("q", "float64", "probability", "p after Benjamini–Hochberg over all heads and pairs"),
    Column("evidence", "str", "", "the same in words"),
)


def classify(
    scan: Scan,
    *,
    dormant: float = 0.9,
    active: float = 0.5,
    alpha: float = 0.05,
    measure: str = "mass_first",
    comparison: Result | None = None,
    seed: int = 0,
    unequal_lengths: bool = False,
) -> Result:
    """A name for every head, with its evidence.

    Args:
        scan: of any number of domains; active-dormant heads need at least two.
        dormant: mass from which a head is dormant on a domain.
        active: mass below which it is active.
        alpha: share of false discoveries that is accepted.
        measure: "mass_first" or "mass_sinks".
        comparison: what `compare` gave for this scan, measure and alpha; by default it is made here.
        seed: of the intervals and tests.
        unequal_lengths: name heads from texts of different lengths all the same.

    Returns:
        A `Result` of kind "sinks.classify": one row per layer and head, active-dormant heads first, by difference.

    Raises:
        InputError: thresholds that are not 0 ≤ active ≤ dormant ≤ 1, a comparison of another scan, measure or alpha, a measure
            that is no mass, or texts of different lengths.
    """
    check_thresholds(dormant, active)
    if measure not in ("mass_first", "mass_sinks"):
        raise InputError(f"measure {measure!r} is not a mass; expected 'mass_first' or 'mass_sinks'")
    domains, values = list(scan.domains), by_text(scan, measure)
    ends = [mean_and_interval(values[name].to_numpy(dtype=np.float64), 2000, 0.95, seed) for name in domains]
    table = {
        name: np.stack([end[at] for end in ends], 1) for at, name in enumerate(("mean", "low", "high"))
    }  # (head, domain)
    means = table["mean"]
    top, bottom = means.argmax(1), means.argmin(1)
    at = np.arange(len(means))
    frame = values[domains[0]].columns.to_frame(index=False)
    for end, chosen in (("high", top), ("low", bottom)):
        frame[f"domain_{end}"] = pd.Categorical([domains[code] for code in chosen], categories=domains)
        for name in ("mean", "low", "high"):
            frame[f"{name}_{end}"] = table[name][at, chosen]
    frame["difference"] = frame["mean_high"] - frame["mean_low"]
    is_dormant, is_active = (means > dormant).all(1), (means < active).all(1)
    if len(domains) > 1:
        pairs = _checked(comparison, scan, measure, alpha, seed, unequal_lengths)
        frame = frame.merge(_largest(pairs.frame, frame), on=["layer", "head"], how="left", validate="one_to_one")
        survives = ((frame["q"] <= alpha) & (frame["low"] > 0)).to_numpy()
        both = survives & (frame["mean_high"] > dormant).to_numpy() & (frame["mean_low"] < active).to_numpy()
    else:
        frame = frame.assign(low=np.nan, high=np.nan, p=np.nan, q=np.nan)
        survives, both = None, np.zeros(len(frame), dtype=bool)
    labels = np.select([both, is_dormant, is_active], ["active-dormant", "dormant", "active"], "mixed")
    frame["label"] = pd.Categorical(labels, categories=LABELS)
    frame["domain_dependent"] = pd.array([pd.NA] * len(frame) if survives is None else survives, dtype="boolean")
    frame["evidence"] = [_words(row, len(domains)) for row in frame.itertuples()]
    frame = frame.sort_values(["label", "difference"], ascending=[True, False], kind="stable")
    parameters = {
        **scan.provenance.parameters,
        "dormant": dormant,
        "active": active,
        "alpha": alpha,
        "measure": measure,
        "domains": domains,
    }
    provenance = provenance_of(scan, parameters, seed, 0.0)
    return Result("sinks.classify", frame[[column.name for column in CLASSIFY_COLUMNS]], CLASSIFY_COLUMNS, provenance)


def check_thresholds(dormant: float, active: float) -> None:
    """Refuses thresholds that no head could meet, before any work is done.

    Raises:
        InputError: they are not 0 ≤ active ≤ dormant ≤ 1.
    """
    if not 0 <= active <= dormant <= 1:
        raise InputError(f"active={active} and dormant={dormant}; expected 0 ≤ active ≤ dormant ≤ 1")


def _checked(
    comparison: Result | None, scan: Scan, measure: str, alpha: float, seed: int, unequal_lengths: bool
) -> Result:
    if comparison is None:
        return compare(scan, measure, alpha=alpha, seed=seed, unequal_lengths=unequal_lengths)
    made = comparison.provenance.parameters
    ours, theirs = scan.provenance, comparison.provenance
    same = comparison.kind == "sinks.compare" and list(comparison.frame["domain_a"].cat.categories) == scan.domains
    same = same and (ours.fingerprint, ours.parameters.get("texts")) == (theirs.fingerprint, made.get("texts"))
    if not same or made.get("measure") != measure or made.get("alpha") != alpha:
        raise InputError(
            f"the comparison is of another scan, or of measure {made.get('measure')!r}, alpha {made.get('alpha')!r}; expected "
            f"one of this scan with measure {measure!r} and alpha {alpha}"
        )
    return comparison


def _largest(pairs: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """Test and interval of the pair (domain_high, domain_low) of every head, signed so that the difference is positive."""
    both = frame[["layer", "head", "domain_high", "domain_low"]].astype({"domain_high": str, "domain_low": str})
    given = pairs.astype({"domain_a": str, "domain_b": str})
    turned = given.assign(
        domain_a=given["domain_b"], domain_b=given["domain_a"], low_fcr=-given["high_fcr"], high_fcr=-given["low_fcr"]
    )
    every = pd.concat([given, turned])[["layer", "head", "domain_a", "domain_b", "p", "q", "low_fcr", "high_fcr"]]
    found = both.merge(
        every.rename(
            columns={"domain_a": "domain_high", "domain_b": "domain_low", "low_fcr": "low", "high_fcr": "high"}
        ),
        on=["layer", "head", "domain_high", "domain_low"],
        how="left",
    )
    return found[["layer", "head", "low", "high", "p", "q"]]


def _words(row: object, n_domains: int) -> str:
    def one(end: str) -> str:
        mean, low, high = (getattr(row, f"{name}_{end}") for name in ("mean", "low", "high"))
        return f"{getattr(row, f'domain_{end}')} {mean:.2f} [{low:.2f}, {high:.2f}]"

    if n_domains == 1:
        return one("high")
    difference, low, high, q = (getattr(row, name) for name in ("difference", "low", "high", "q"))
    return f"{one('high')}; {one('low')}; difference {difference:.2f} [{low:.2f}, {high:.2f}], q = {q:.2g}"
