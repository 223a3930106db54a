"""What is said of flow and the subject beside what `analyses.subject_verb_flow` measured: one function per claim.

A claim holds where the interval that is printed with it says so. Position alone has a balanced accuracy of one half.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from analyses.subject_verb_tables import KEYS
from interp.intervals import bootstrap_mean
from interp.neurons.atlas import wilson
from interp.report.claims import Claim

ABNAR = "Abnar & Zuidema 2020, arXiv 2005.00928"
CUT = 1e-4  # relative: the maximum flow counts as equal to a bound
# {(graph, method): (name, what the paper shows)}
RANKED = {
    ("mean", "exact"): ("attention flow (exact)", "by examples: more on “key” than on “cabinets”"),
    ("mean", "rollout"): ("rollout", "by examples: more on “key” than on “cabinets”"),
    ("mean", "raw"): ("raw attention of the top layer", "by examples: nearly uniform above layer 3 of 6"),
    ("mean", "widest"): ("the widest path", None),
    ("contribution", "rollout"): ("rollout on contributions to the residual stream", None),
}


def agrees(untouched: pd.DataFrame) -> Claim:
    """The model's own agreement where the nouns differ in number.

    Args:
        untouched: rows of `analyses.subject_verb_measures.log_odds` without a replacement.
    """
    congruent, right = untouched["congruent"].astype(bool), untouched["log_odds"] > 0
    hard = right[~congruent]
    hits, n = int(hard.sum()), len(hard)
    first = untouched["order"].astype(str) == "first"
    return Claim(
        "the model's verb agrees with the subject despite an attractor of the other number (more often than not)",
        ABNAR,
        "accuracy .96: an encoder of 6 layers trained for it, all sentences",
        f"{_share(hard.mean())} (interval): {_share(hard[first].mean())} where the subject is the first noun, "
        f"{_share(hard[~first].mean())} where it is the second; {_share(right[congruent].mean())} with nouns of one "
        "number",
        wilson(hits, n),
        n,
        bool(wilson(hits, n)[0] > 0.5) if n else None,
    )


def reference(pairs: pd.DataFrame) -> Claim:
    """Blank-out: the reference knows the subject.

    Args:
        pairs: what `analyses.subject_verb_tables.paired` gave, blank-out among it.
    """
    number, neutral = (
        _chosen(pairs, graph="blank-out", method=method)["accuracy"].to_numpy() for method in ("number", "neutral")
    )
    return Claim(
        "blank-out finds the subject: changing its number changes the verb more than changing the attractor's",
        "ours",
        None,
        f"balanced accuracy {_share(number.mean())} (interval); {_share(neutral.mean())} where the noun becomes one "
        "without number",
        _interval(number),
        len(number),
        _above(number, 0.5),
    )


def ranks(pairs: pd.DataFrame, n_layers: int) -> list[Claim]:
    """Each method on the whole depth, without correction."""
    claims = []
    for (graph, method), (name, paper) in RANKED.items():
        rows = _chosen(pairs, graph=graph, method=method, **_whole(n_layers))
        values = rows["accuracy"].to_numpy()
        claims.append(
            Claim(
                f"{name} finds the subject: ranks it above the attractor more often than position alone (50 %)",
                ABNAR if paper and method != "raw" else "ours",
                paper,
                f"balanced accuracy {_share(values.mean())}: {_orders(rows)}; {n_layers} layers",
                _interval(values),
                len(values),
                _above(values, 0.5),
            )
        )
    return claims


def chosen(pairs: pd.DataFrame, half: pd.Series, side: str) -> Claim:
    """Exact flow at its best graph, depth and correction, chosen on one half of the pairs, confirmed on the other.

    Args:
        pairs: what `analyses.subject_verb_tables.paired` gave.
        half: what `analyses.subject_verb_tables.halves` gave.
        side: "below" or "above".
    """
    rows = _chosen(pairs, method="exact", side=side)
    rows = rows[rows["graph"] != "uniform"]
    chooses = rows["pair"].map(half).astype(bool)
    means = rows[chooses].groupby(KEYS, observed=True)["accuracy"].mean()
    best = dict(zip(KEYS, means.index[int(means.to_numpy().argmax())], strict=True))
    confirmed = _chosen(rows[~chooses], **best)
    values = confirmed["accuracy"].to_numpy()
    below = side == "below"
    what = "from the input, at its best depth and correction," if below else "through the last layers alone"
    where = (
        f"{'first' if below else 'last'} {best['n_layers']} layers, {best['graph']}, correction {best['correction']}"
    )
    return Claim(
        f"attention flow {what} finds the subject (more often than 50 %)",
        "ours",
        None,
        f"balanced accuracy {_share(values.mean() if len(values) else math.nan)} on pairs that did not choose it "
        f"({where}): {_orders(confirmed)}",
        _interval(values),
        len(values),
        _above(values, 0.5),
    )


def worth(pairs: pd.DataFrame, n_layers: int) -> list[Claim]:
    """Exact flow against rollout and against the trivial bound, paired."""
    at = {"graph": "mean", **_whole(n_layers)}
    exact = _chosen(pairs, method="exact", **at).set_index("pair")["accuracy"]
    claims = []
    for method, name in (("rollout", "rollout"), ("bound", "the trivial bound (layer 0's column sums)")):
        values = (exact - _chosen(pairs, method=method, **at).set_index("pair")["accuracy"]).to_numpy()
        claims.append(
            Claim(
                f"attention flow finds the subject more often than {name}",
                "ours",
                None,
                f"balanced accuracy {_signed(values.mean())} on {n_layers} layers, paired",
                _interval(values),
                len(values),
                _above(values, 0.0),
            )
        )
    return claims


def controlled(pairs: pd.DataFrame, n_layers: int) -> Claim:
    """The same noun at the same position: more flow as the subject, and beyond what the two ends of its routes show."""
    at = {"graph": "mean", **_whole(n_layers)}
    exact, ends, rollout = (
        _chosen(pairs, method=name, **at).set_index("pair") for name in ("exact", "ends", "rollout")
    )
    beyond = (exact["contrast"] - ends["contrast"]).to_numpy()
    share = _interval(exact["controlled"].to_numpy())

    def shown(rows: pd.DataFrame) -> str:
        return f"in {_share(rows['controlled'].mean())} of pairs, by {_signed(rows['contrast'].mean())} of the score"

    return Claim(
        "at the same position a noun gets more flow as the subject than as the attractor, beyond what layer 0's column "
        "and the target's own row alone show (by any amount)",
        "ours",
        None,
        f"{shown(exact)}; those two alone: {shown(ends)}; rollout: {shown(rollout)}; interval: difference of the "
        "first two",
        _interval(beyond),
        len(beyond),
        None if share is None else bool(share[0] > 0.5 and _above(beyond, 0.0)),
    )


def head(best: pd.DataFrame) -> Claim:
    """One head against the flow through all layers.

    Args:
        best: what `analyses.subject_verb_heads.best_heads` gave.
    """
    row = best.iloc[0]
    mean = _share(row["its layer's mean"])
    own = "" if math.isnan(row["accuracy low"]) else f" [{row['accuracy low']:.2f}, {row['accuracy high']:.2f}]"
    ends = None if math.isnan(row["above flow low"]) else (row["above flow low"], row["above flow high"])
    return Claim(
        "attention itself finds the subject: one head does (more often than 50 %), and more often than attention flow",
        "ours",
        None,
        f"{row['head']}: balanced accuracy {_share(row['accuracy'])}{own} on pairs that did not choose it: "
        f"{_orders(row)}; the mean of its layer's heads {mean}; interval: above the exact flow of all layers, paired",
        ends,
        int(row["n"]),
        None if ends is None else bool(row["accuracy low"] > 0.5 and ends[0] > 0),
    )


def used(off: pd.DataFrame) -> Claim:
    """The head switched off, beside other heads of its layer.

    Args:
        off: frame of the result of `analyses.subject_verb_heads.switched_off`.
    """
    rows = off.astype({"arm": str, "order": str})
    lead = rows.groupby(["pair", "arm"])["log_odds"].mean().unstack("arm")  # of the controls the mean
    cost = (lead["none"] - lead["head"]).to_numpy()
    named = rows[rows["arm"] == "head"].iloc[0]
    hard = rows[(rows["order"] == "first") & ~rows["congruent"]]
    right = (hard["log_odds"] > 0).groupby(hard["arm"]).mean()
    shown = f"L{named['layer']}H{named['head']}: the right verb leads by {cost.mean():.2f} nats less"
    claim = "the model uses that head: switched off, it costs the right verb more than other heads of its layer do"
    if "control" not in lead:
        return Claim(claim, "ours", None, f"{shown}; its layer has no other head", None, len(cost), None)
    beyond = (lead["control"] - lead["head"]).to_numpy()
    n_controls = rows[rows["arm"] == "control"]["head"].nunique()
    steps = [_share(float(right.get(arm, math.nan))) for arm in ("none", "head", "control")]
    return Claim(
        claim,
        "ours",
        None,
        f"{shown} (of {lead['none'].mean():.2f}), {beyond.mean():.2f} less than without another (interval, paired, "
        f"mean of {n_controls}); model right where the first noun is the subject, the attractor of the other number: "
        f"{steps[0]}, without the head {steps[1]}, without another {steps[2]}",
        _interval(beyond),
        len(beyond),
        _above(beyond, 0.0),
    )


def cut(scored: pd.DataFrame, n_layers: int) -> Claim:
    """Why: where the minimum cut of the flow from the first noun is.

    Args:
        scored: rows of the result of `analyses.subject_verb_measures.scores`.
        n_layers: the whole depth.
    """
    at = {"graph": "mean", **_whole(n_layers)}
    flow, target = (_chosen(scored, method=method, **at).set_index("sentence") for method in ("exact", "target_cut"))
    order, target = flow["order"].astype(str), target.loc[flow.index]
    equal = {}
    for noun in ("first", "second"):
        have, most = (np.where(order == noun, rows["subject"], rows["attractor"]) for rows in (flow, target))
        equal[noun] = np.isclose(have, most, rtol=CUT, atol=0.0)
    hits, n = int(equal["first"].sum()), len(flow)
    return Claim(
        "the flow from the first noun is no more than what the target's own top row gives to positions from it on: "
        "the cut is there and knows nothing of the noun (in most sentences)",
        "ours",
        None,
        f"in {_share(hits / n)} of sentences (interval); from the second noun in {_share(equal['second'].mean())}; "
        f"{n_layers} layers",
        wilson(hits, n),
        n,
        bool(wilson(hits, n)[0] > 0.5),
    )


def correlation(pairs: pd.DataFrame, scored: pd.DataFrame, n_layers: int) -> Claim:
    """Spearman with blank-out over all words, as in the paper's table 1."""
    at = {"graph": "mean", **_whole(n_layers)}
    raw, rollout, flow = (
        _chosen(pairs, method=name, **at).set_index("pair")["spearman"] for name in ("raw", "rollout", "exact")
    )
    above = [(values - raw).dropna().to_numpy() for values in (flow, rollout)]
    ends = [_interval(values) for values in above]
    alone = float(_chosen(pairs, **at | {"graph": "uniform"}, method="exact")["spearman"].mean())
    names = {"raw": "raw", "rollout": "rollout", "exact": "flow"}
    each = {method: _chosen(scored, method=method, **at)["spearman"] for method in names}
    shown = ", ".join(f"{names[method]} {values.mean():.2f} ± {values.std():.2f}" for method, values in each.items())
    return Claim(
        "flow and rollout rank all words closer to blank-out than raw attention of the top layer does",
        ABNAR,
        "Spearman, layer 6 of 6: raw .29 ± .39, rollout .71 ± .24, flow .70 ± .22",
        f"{shown} over sentences, {n_layers} layers; flow on uniform attention {alone:.2f}; interval: flow − raw"
        + ("" if ends[1] is None else f"; rollout − raw {above[1].mean():+.2f} [{ends[1][0]:+.2f}, {ends[1][1]:+.2f}]"),
        ends[0],
        len(above[0]),
        None if None in ends else bool(_above(above[0], 0.0) and _above(above[1], 0.0)),
    )


def _whole(n_layers: int) -> dict[str, Any]:
    return {"side": "below", "n_layers": n_layers, "correction": "none"}


def _chosen(rows: pd.DataFrame, **values: Any) -> pd.DataFrame:
    for name, value in values.items():
        rows = rows[rows[name] == value]
    return rows


def _orders(row: Any) -> str:
    first, second = (float(np.mean(row[order])) if np.size(row[order]) else math.nan for order in ("first", "second"))
    return f"{_share(first)} where the subject is the first noun, {_share(second)} where it is the second"


def _interval(values: np.ndarray) -> tuple[float, float] | None:
    if len(values) < 2 or np.isnan(values).any():
        return None
    low, high = bootstrap_mean(values)
    return float(low), float(high)


def _above(values: np.ndarray, bound: float) -> bool | None:
    ends = _interval(values)
    return None if ends is None else bool(ends[0] > bound)


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}" if value in (0.0, 0.5, 1.0) else f"{value:.1%}"


def _signed(value: float) -> str:
    return f"{value:+.1%}"
