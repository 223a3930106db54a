"""What the papers on attention flow claim, beside what `analyses.attention_flow` measured."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analyses.flow_faithfulness import means, paired
from analyses.flow_lengths import length_means
from interp.report.claims import Claim
from interp.results import Result

ABNAR = "Abnar & Zuidema 2020, arXiv 2005.00928"
VICO = "Yang & Wang 2024 (Vico), arXiv 2407.06182"
OURS = "ours"
STAND_IN = 0.8  # Kendall's τ from which a ranking may stand in for another
FREE = 0.3  # Spearman's ρ with position below which a ranking counts as free from it
MARGIN = 0.05  # of Spearman's ρ, from which one score is worth another's cost


def faithfulness_claims(result: Result, depth: int) -> list[Claim]:
    """Rank correlation with blank-out and with gradients on the graph of `depth` layers.

    Args:
        result: what `analyses.flow_faithfulness.faithfulness` gave.
        depth: layers of the graph.
    """
    keys = ["graph", "n_layers", "method", "correction", "reference"]
    tables = {name: means(result, name).set_index(keys) for name in ("spearman", "partial")}

    def shown(method: str, reference: str = "blank-out", correction: str = "none", statistic: str = "spearman") -> str:
        key = ("", 0) if method in ("position", "ceiling") else ("mean", depth)
        row = tables[statistic].loc[(*key, method, correction, reference)]
        return f"{row['mean']:.2f} ± {row['sd']:.2f}"

    def versus(
        first: str,
        second: str,
        reference: str = "blank-out",
        corrections: tuple[str, str] = ("none", "none"),
        statistic: str = "spearman",
    ) -> Any:
        chosen = []
        for method, correction in zip((first, second), corrections, strict=True):
            alone = method in ("position", "ceiling")
            chosen.append(
                {
                    "graph": "" if alone else "mean",
                    "n_layers": 0 if alone else depth,
                    "method": method,
                    "correction": correction,
                    "reference": reference,
                }
            )
        return paired(result, *chosen, statistic=statistic)

    flow_names = {"bound": "bound", "layer_bound": "layer bound", "rollout": "rollout"}
    found = []

    def add(
        claim: str, source: str, paper: str | None, ours: str, difference: dict[str, float], margin: float = 0.0
    ) -> None:
        ends = (difference["low"], difference["high"])
        known = difference["n"] > 1 and all(end == end for end in ends)
        found.append(
            Claim(
                claim,
                source,
                paper,
                f"{ours}; interval: the difference, {difference['difference']:+.2f}",
                ends if known else None,
                int(difference["n"]),
                bool(ends[0] > margin) if known else None,
            )
        )

    add(
        "rollout ranks tokens by blank-out better than raw attention does (Spearman, all layers)",
        ABNAR,
        "subject–verb, layer 6: rollout .71 ± .24, raw .29 ± .39; layer 3: .51, −.11",
        f"rollout {shown('rollout')}, raw {shown('raw')}",
        versus("rollout", "raw"),
    )
    add(
        "attention flow ranks tokens by blank-out better than raw attention does (Spearman, all layers)",
        ABNAR,
        "subject–verb, layer 6: flow .70 ± .22, raw .29 ± .39; layer 3: .70, −.11",
        f"exact flow {shown('exact')}, raw {shown('raw')}",
        versus("exact", "raw"),
    )
    add(
        "attention flow ranks tokens by input gradients better than raw attention does",
        ABNAR,
        "DistilBERT on SST-2, last layer: raw .09, rollout .13, flow .14",
        f"exact flow {shown('exact', 'gradient')}, rollout {shown('rollout', 'gradient')}, raw {shown('raw', 'gradient')}",
        versus("exact", "raw", "gradient"),
    )
    # Divided by uniform attention's, scores follow position the other way round: what counts is what they say beyond it.
    for correction, words in (("none", "as it is"), ("uniform", "against uniform attention, position held constant")):
        statistic = "spearman" if correction == "none" else "partial"
        for other, claim in (
            ("bound", "exact flow beats the trivial bound"),
            ("layer_bound", "exact flow beats the bound by its narrowest layer"),
            ("rollout", "exact flow is worth its cost over rollout"),
        ):
            add(
                f"{claim} (blank-out, {words}: by more than {MARGIN})",
                OURS,
                None,
                f"exact {shown('exact', correction=correction, statistic=statistic)}, {flow_names[other]} "
                f"{shown(other, correction=correction, statistic=statistic)}",
                versus("exact", other, corrections=(correction, correction), statistic=statistic),
                MARGIN,
            )
    add(
        "corrected exact flow says more than a token's position (blank-out)",
        OURS,
        None,
        f"against uniform {shown('exact', correction='uniform')}, position {shown('position')}; ceiling (blank-out by "
        f"another token) {shown('ceiling')}",
        versus("exact", "position", corrections=("uniform", "none")),
    )
    found.append(unbiased(result, depth))
    beyond = (("mean", "raw"), ("mean", "exact"), ("contribution", "exact"), ("contribution", "rollout"))
    known = set(result.frame["graph"].astype(str))
    return [*found, *(beyond_position(result, depth, *which) for which in beyond if which[0] in known)]


def unbiased(result: Result, depth: int) -> Claim:
    """Whether dividing by uniform attention's flow frees the ranking from position.

    Args:
        result: what `analyses.flow_faithfulness.faithfulness` gave.
        depth: layers of the graph.
    """
    table = means(result, "with_position").set_index(["graph", "n_layers", "method", "correction", "reference"])
    before, after, dropped = (
        table.loc[("mean", depth, "exact", correction, "blank-out")] for correction in ("none", "uniform", "drop_sink")
    )
    known = after["low"] == after["low"]
    return Claim(
        f"dividing by uniform attention's flow frees exact flow's ranking from position (Spearman with it within ±{FREE})",
        ABNAR,
        "“normalise by the receptive field”, no figure",
        f"with position {before['mean']:+.2f} as it is, {after['mean']:+.2f} against uniform attention (interval), "
        f"{dropped['mean']:+.2f} without the sink",
        (float(after["low"]), float(after["high"])) if known else None,
        int(after["n"]),
        bool(max(-after["low"], after["high"]) < FREE) if known else None,
    )


def beyond_position(result: Result, depth: int, graph: str, method: str) -> Claim:
    """Whether a score says anything about blank-out with position held constant.

    Args:
        result: what `analyses.flow_faithfulness.faithfulness` gave.
        depth: layers of the graph.
        graph: "mean", "norm" or "contribution".
        method: which score, as it is.
    """
    table = means(result, "partial").set_index(["graph", "n_layers", "method", "correction", "reference"])
    key = (graph, depth, method, "none", "blank-out")
    row = table.loc[key]
    follows = means(result, "with_position").set_index(table.index.names).loc[key]
    known = row["low"] == row["low"]
    name = {"raw": "raw attention", "exact": "exact flow", "rollout": "rollout"}[method]
    name += " on contributions" if graph == "contribution" else ""
    n = int(follows["n"])
    same = n - int(row["n"])
    return Claim(
        f"{name} says something about blank-out that position does not (Spearman with position held constant above 0)",
        OURS,
        None,
        f"{row['mean']:.2f} ± {row['sd']:.2f} (interval: the mean); with position itself it correlates {follows['mean']:+.2f}"
        + (f", and in {same} of {n} sentences, left out here, its ranking is position's" if same else ""),
        (float(row["low"]), float(row["high"])) if known else None,
        int(row["n"]),
        bool(row["low"] > 0) if known else None,
    )


def length_claims(result: Result) -> list[Claim]:
    """The widest path, rollout and the layer bound against the exact flow.

    Args:
        result: what `analyses.flow_lengths.against_exact` gave.
    """
    table = length_means(result).set_index(["attention", "method", "n_tokens"]).sort_index()
    lengths = sorted(result.frame["n_tokens"].unique())
    short, middle, long = lengths[0], lengths[len(lengths) // 2], lengths[-1]

    def row(method: str, length: int, attention: str = "model") -> pd.Series:
        return table.loc[(attention, method, length)]

    def series(method: str, name: str, attention: str = "model") -> str:
        return ", ".join(f"{row(method, length, attention)[name]:.2f} at {length}" for length in lengths)

    def ends(values: pd.Series, name: str) -> tuple[float, float] | None:
        pair = (float(values[f"{name} low"]), float(values[f"{name} high"]))
        return pair if all(end == end for end in pair) else None

    found = []
    for method, paper in (("widest", "assumed; no accuracy is reported"), ("rollout", None)):
        at = row(method, middle)
        interval = ends(at, "kendall")
        name = "the widest path" if method == "widest" else "rollout"
        found.append(
            Claim(
                f"{name} ranks tokens as the exact flow does (Kendall's τ at least {STAND_IN})",
                VICO if method == "widest" else OURS,
                paper,
                f"τ {series(method, 'kendall')} tokens; random attention {series(method, 'kendall', 'random')}; interval: at "
                f"{middle} tokens",
                interval,
                int(at["n"]),
                None if interval is None else bool(interval[0] >= STAND_IN),
            )
        )
    first, last = row("widest", short), row("widest", long)
    interval = ends(last, "ratio")
    found.append(
        Claim(
            "the widest path's share of the exact flow falls with length",
            OURS,
            None,
            f"{series('widest', 'ratio')} tokens; random attention {series('widest', 'ratio', 'random')}; interval: at {long} "
            "tokens",
            interval,
            int(last["n"]),
            None if interval is None else bool(interval[1] < first["ratio low"]),
        )
    )
    times = {method: row(method, long)["ms"] / 1e3 for method in ("exact", "soft τ=0.01 entropy", "rollout")}
    found.append(
        Claim(
            "the exact flow takes seconds per token, the softened path and rollout hundredths of one",
            VICO,
            "Table 6: exact 8 s, soft .037 s, rollout .042 s",
            f"all tokens of one target at {long}: exact {times['exact']:.2g} s, soft {times['soft τ=0.01 entropy']:.2g} s, "
            f"rollout {times['rollout']:.2g} s",
            None,
            int(row("exact", long)["n"]),
            bool(times["exact"] > 1),
        )
    )
    found.append(
        Claim(
            "flow segments objects better than cross-attention and rollout do",
            VICO,
            "zero-shot segmentation, J&F: cross-attention 32.1, rollout 38.0, flow 38.2",
            "no images here",
            None,
            None,
            None,
        )
    )
    at = row("layer_bound", long)
    interval = ends(at, "equal")
    found.append(
        Claim(
            "the maximum flow is what its narrowest layer lets through (equal to 1e-6 for at least 99 % of tokens)",
            OURS,
            None,
            f"{series('layer_bound', 'equal')} tokens; random attention {series('layer_bound', 'equal', 'random')}; the trivial "
            f"bound {series('bound', 'equal')}; interval: at {long} tokens",
            interval,
            int(at["n"]),
            None if interval is None else bool(interval[0] >= 0.99),
        )
    )
    return found
