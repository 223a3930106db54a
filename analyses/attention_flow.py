"""How much of each token reaches the output through attention, and is the maximum flow worth what it costs?

Puts the attention flow of Abnar & Zuidema (arXiv 2005.00928), exact, beside its stand-ins (Vico's widest path, arXiv 2407.06182,
rollout, two bounds) and asks which of them ranks tokens as their effect on the prediction does. Prints the table
claim · paper · ours and writes a report.

    python -m analyses.attention_flow [--model NAME] [--texts 240] [--out reports/attention_flow]

1. `analyses.flow_faithfulness`: rank correlations with blank-out and input gradients on real sentences, by depth, with
   and without corrections of the causal bias.
2. `analyses.flow_lengths`: every stand-in against the exact flow, and time, as texts get longer; random attention beside.
3. Pictures of one sentence: what reaches the last token, the flow layer by layer with its minimum cut, the strongest routes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from analyses import flow_figures
from analyses.flow_claims import faithfulness_claims, length_claims
from analyses.flow_faithfulness import NEUTRAL, digest, faithfulness, means, sentences
from analyses.flow_lengths import against_exact, length_means
from analyses.sink_heads import document_start, token_name
from interp import load_model
from interp.cli import show
from interp.flow import attention_flow, attention_graph, edge_flows, path, plots
from interp.report import Section, write_report
from interp.report.claims import Claim, claims_frame, verdict, write_claims
from interp.reuse import reuse_or_make

LENGTHS = (8, 16, 32, 64, 128)
EXAMPLE = (
    "The keys to the old cabinet in the hall are still lying on the table near the door, and nobody knows why they"
)
# What `make report` runs.
REPORT: dict[str, Any] = {"n_texts": 48, "n_lengths": 5, "n_ceiling": 24, "lengths": (16, 32, 64, 128)}


def run(
    model: Any,
    out: Path,
    *,
    n_texts: int = 240,
    n_lengths: int = 16,
    n_ceiling: int = 64,
    lengths: Sequence[int] = LENGTHS,
    example: str = EXAMPLE,
) -> Section:
    """Measure, compare, draw.

    Args:
        model: what `load_model` gave.
        out: folder for the results; what is there already is used again.
        n_texts: sentences.
        n_lengths: texts of each length.
        n_ceiling: sentences on which blank-out is repeated with another neutral token.
        lengths: tokens.
        example: the text of the pictures.

    Returns:
        A section for a report.
    """
    start = document_start(model)
    depths = depths_of(model.arch.n_layers)
    texts = sentences(model, n_texts, start=start)
    made = reuse_or_make(
        out / "faithfulness.parquet",
        lambda: faithfulness(model, texts, depths, n_ceiling=n_ceiling),
        fingerprint=model.fingerprint,
        parameters={"texts": digest(texts), "depths": depths, "neutral": list(NEUTRAL), "n_ceiling": n_ceiling},
    )
    compared = reuse_or_make(
        out / "against_exact.parquet",
        lambda: against_exact(model, lengths, n_lengths, start=start),
        fingerprint=model.fingerprint,
        parameters={"lengths": list(lengths), "n": n_lengths},
    )
    claims = [*length_claims(compared), *faithfulness_claims(made, max(depths))]
    write_claims(out / "claims.json", claims)
    by_length, by_score = length_means(compared), means(made)
    items: list[Any] = [
        answers(claims),
        score_table(by_score, max(depths), "blank-out"),
        score_table(means(made, "kendall"), max(depths), "blank-out", "Kendall's τ"),
        depth_table(by_score, "blank-out"),
        flow_figures.by_depth(by_score, "none", "blank-out"),
        flow_figures.by_depth(by_score, "uniform", "blank-out"),
        partial_table(means(made, "partial"), means(made, "with_position"), max(depths)),
        score_table(by_score, max(depths), "gradient"),
        depth_table(by_score, "gradient"),
        flow_figures.by_depth(by_score, "none", "gradient"),
        flow_figures.by_graph(by_score, "blank-out"),
        stand_in_table(by_length),
        flow_figures.against_length(by_length, "kendall", ("widest", "rollout", "bound", "layer_bound")),
        flow_figures.against_length(by_length, "ratio", ("widest", "bound", "layer_bound")),
        soft_table(by_length),
        flow_figures.time_against_length(by_length),
        *pictures(model, example),
        by_score,
        made,
        compared,
    ]
    text = (
        f"{len(texts)} single sentences of film reviews, each cut before a word that {model.name} is to predict, all beginning "
        f"with {token_name(model, start)}, which is not ranked; {texts_length(texts)} tokens are. A graph's capacities are "
        "½ attention + ½ identity, heads averaged, unless said otherwise. Blank-out replaces a token by “ the” and takes the "
        "absolute change of the log-probability of the true next word's first token; the ceiling is how well blank-out agrees "
        "with blank-out by a comma. Position is the score that knows nothing but the order. Intervals are bootstraps over "
        "sentences, 95 %.\n\n"
        "The table of questions below the claims answers what this section exists for."
    )
    return Section(
        "Flow: what reaches the output through attention, and is the maximum flow worth it", text, items, claims
    )


def depths_of(n_layers: int) -> list[int]:
    """Numbers of layers at which graphs are cut: the first, and every sixth of the depth.

    Example:
        >>> depths_of(30)
        [1, 5, 10, 15, 20, 25, 30]
    """
    return sorted({1, *(max(1, round(n_layers * part / 6)) for part in range(1, 7))})


def answers(claims: Sequence[Claim]) -> pd.DataFrame:
    """The questions of this section, answered by the claims on them."""
    over_rollout, over_bound = "exact flow is worth its cost over rollout", "exact flow beats the trivial bound"
    narrowest = "exact flow beats the bound by its narrowest layer"
    plain, divided = "(blank-out, as it is", "(blank-out, against"
    asked = {
        "is the widest path a usable stand-in for the maximum flow?": "the widest path ranks",
        "is exact flow worth its cost over rollout?": f"{over_rollout} {plain}",
        "is it, both against uniform attention and with position held constant?": f"{over_rollout} {divided}",
        "is exact flow worth its cost over the trivial bound?": f"{over_bound} {plain}",
        "is it worth it over that bound, likewise?": f"{over_bound} {divided}",
        "is it worth it over the bound by its narrowest layer, likewise?": f"{narrowest} {divided}",
        "is there anything in the flow beyond its narrowest layer?": "the maximum flow is what",
        "does the flow say anything that a token's position does not?": "exact flow says something",
        "does it on contributions instead of attention?": "exact flow on contributions says something",
    }
    rows = []
    for question, begins in asked.items():
        (claim,) = [claim for claim in claims if claim.claim.startswith(begins)]
        holds = (
            claim.holds if not question.startswith("is there") else (None if claim.holds is None else not claim.holds)
        )
        answer = verdict(dataclasses.replace(claim, holds=holds))
        interval = "–" if claim.interval is None else f"{claim.interval[0]:.3f} … {claim.interval[1]:.3f}"
        rows.append({"question": question, "answer": answer, "because": claim.ours, "interval": interval, "n": claim.n})
    return pd.DataFrame(rows)


def depth_table(table: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Spearman by depth, mean [interval], a row per score and correction; heads averaged."""
    rows = table[(table["reference"] == reference) & (table["graph"] == "mean")]
    rows = rows[~((rows["method"] == "raw") & (rows["correction"] != "none"))]  # the same ranking
    cells = rows.assign(cell=[_interval(row) for row in rows.to_dict("records")])
    wide = cells.pivot(index=["method", "correction"], columns="n_layers", values="cell")
    wide = wide.reindex(rows.drop_duplicates(["method", "correction"]).set_index(["method", "correction"]).index)
    wide.columns = [f"{depth} layers" if depth > 1 else "1 layer" for depth in wide.columns]
    frame = wide.reset_index().rename(columns={"method": f"score (Spearman with {reference})"})
    return frame.assign(correction=frame["correction"].map(flow_figures.CORRECTED), n=int(rows["n"].max()))


def score_table(table: pd.DataFrame, depth: int, reference: str, statistic: str = "Spearman") -> pd.DataFrame:
    """Correlation of every score on the whole depth, mean [interval], a column per correction."""
    rows = table[
        (table["reference"] == reference) & (table["n_layers"].isin([0, depth])) & table["graph"].isin(["", "mean"])
    ]
    cells = rows.assign(cell=[_interval(row) for row in rows.to_dict("records")])
    wide = cells.pivot(index="method", columns="correction", values="cell")
    names = list(dict.fromkeys(rows["method"]))
    order = sorted(
        names, key=lambda name: -float(rows[(rows["method"] == name) & (rows["correction"] == "none")]["mean"].iloc[0])
    )
    wide = wide.reindex(index=order, columns=["none", "uniform", "drop_sink"]).fillna("–")
    wide.columns = [flow_figures.CORRECTED[name] for name in wide.columns]
    counts = rows[rows["correction"] == "none"].set_index("method")["n"].reindex(order).to_numpy()
    named = wide.rename(index={"ceiling": "blank-out by a comma", "position": "position alone"}).reset_index()
    return named.rename(columns={"method": f"score ({statistic} with {reference})"}).assign(n=counts)


def partial_table(partial: pd.DataFrame, follows: pd.DataFrame, depth: int) -> pd.DataFrame:
    """What each score says beyond position, and how it follows position itself; blank-out, all layers."""
    keys = ["graph", "method", "correction"]
    chosen = [
        rows[(rows["reference"] == "blank-out") & (rows["n_layers"] == depth)].set_index(keys)
        for rows in (partial, follows)
    ]
    rows = [
        {
            "graph": key[0],
            "score": key[1],
            "correction": flow_figures.CORRECTED[key[2]],
            "Spearman with blank-out, position held constant": _interval(row),
            "Spearman with position": _interval(chosen[1].loc[key].to_dict()),
            "n": row["n"],
        }
        for key, row in chosen[0].to_dict("index").items()
        if key[2] != "drop_sink"
    ]
    return pd.DataFrame(rows)


def _interval(row: dict[Any, Any]) -> str:
    if not math.isfinite(row["low"]):  # of a single sentence
        return "–" if math.isnan(row["mean"]) else f"{row['mean']:.2f}"
    return f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def stand_in_table(table: pd.DataFrame) -> pd.DataFrame:
    """τ and share of the exact flow by length and method, texts of the model alone."""
    rows = table[
        (table["attention"] == "model") & table["method"].isin(["widest", "rollout", "bound", "layer_bound", "exact"])
    ]
    return pd.DataFrame(
        {
            "tokens": rows["n_tokens"],
            "method": rows["method"],
            "Kendall's τ with exact": [_cell(row, "kendall") for row in rows.to_dict("records")],
            "share of exact": [_cell(row, "ratio") for row in rows.to_dict("records")],
            "equal to exact": [_cell(row, "equal") for row in rows.to_dict("records")],
            "ms": rows["ms"],
            "n": rows["n"],
        }
    )


def soft_table(table: pd.DataFrame) -> pd.DataFrame:
    """What Vico's softened form does at this depth, by temperature and by what is done about its bias."""
    rows = table[(table["attention"] == "model") & table["method"].str.startswith(("soft", "widest"))]
    return pd.DataFrame(
        {
            "tokens": rows["n_tokens"],
            "form": rows["method"],
            "Kendall's τ with exact": [_cell(row, "kendall") for row in rows.to_dict("records")],
            "share of exact": [_cell(row, "ratio") for row in rows.to_dict("records")],
            "n": rows["n"],
        }
    )


def _cell(row: dict[Any, Any], name: str) -> str:
    return f"{row[name]:.2f} [{row[f'{name} low']:.2f}, {row[f'{name} high']:.2f}]"


def pictures(model: Any, example: str) -> list[Any]:
    """One text: what reaches its last token, the flow of its second token layer by layer, the strongest routes."""
    graph = attention_graph(model, example)
    everything = attention_flow(graph, method=["exact", "rollout", "widest", "bound"])
    matrix = attention_flow(graph, None, method=["exact", "rollout", "widest"])
    source = min(1, len(graph) - 1)
    return [
        plots.coloured_text(everything),
        plots.edge_flows(edge_flows(graph, -1, source)),
        plots.path(path(graph, -1, source, top=12)),
        plots.attention_flow(matrix),
    ]


def texts_length(texts: Sequence[Sequence[int]]) -> str:
    """Shortest and longest number of ranked tokens."""
    sizes = [len(ids) - 2 for ids in texts]
    return f"{min(sizes)} to {max(sizes)}"


def main(
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    texts: Annotated[int, typer.Option(help="Sentences.")] = 240,
    out: Annotated[Path, typer.Option()] = Path("reports/attention_flow"),
) -> None:
    """Measure attention flow on a model and write a report."""
    loaded = load_model(model, device=device, dtype=dtype)
    section = run(loaded, out, n_texts=texts)
    report = write_report([section], out / "report.html", title=f"Attention flow in {loaded.name}")
    show(claims_frame(section.claims))
    for item in section.items:
        if isinstance(item, pd.DataFrame) and len(item) <= 60:
            show(item)
    print(f"report: {report}")


if __name__ == "__main__":
    typer.run(main)
