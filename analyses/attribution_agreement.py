"""Do attention rankings agree with attribution rankings, and does agreement say which of them are faithful?

Repeats "A Song of (Dis)agreement" (Neely, Schouten, Bleeker & Lucic 2022, arXiv 2205.04559) on rated film reviews, with a
language model and with BERT classifiers, and adds what the paper recommends instead: faithfulness between the worst and the
best order of each text. Prints its table beside ours and writes a report.

    python -m analyses.attribution_agreement [--model NAME] [--reviews 150] [--encoders 3] [--out reports/attribution_agreement]

1. `analyses.agreement_runs`: explanations of the language model's and the classifiers' predictions.
2. Pairs of methods: Kendall's τ, chance, ceiling; clusters; the same without special tokens.
3. `analyses.agreement_claims`: the paper's conclusions, one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from analyses.agreement_claims import (
    DATA,
    PUBLISHED,
    agreement_claims,
    faithfulness_claims,
    special_claim,
    wide,
)
from analyses.agreement_runs import Measured, measure_decoder, measure_encoder, pooled
from analyses.encoder_classifier import read_stamp
from interp import load_model
from interp.agreement import clusters, costs, faithfulness_means, plots
from interp.agreement.methods import side_of
from interp.cli import show
from interp.intervals import bootstrap_mean
from interp.report import Section, write_report
from interp.report.claims import claims_frame, write_claims

# What `make report` runs.
REPORT: dict[str, Any] = {
    "n": 24,
    "seeds": (0, 1),
    "lengths": (6, 8),
    "n_encoders": 1,
    "n_encoded": 24,
    "n_normalised": 8,
}


def run(
    model: Any,
    out: Path,
    *,
    n: int = 150,
    seeds: Sequence[int] = (0, 1, 2),
    lengths: tuple[int, int] = (6, 9),
    n_encoders: int = 3,
    n_encoded: int = 150,
    n_normalised: int = 48,
) -> Section:
    """Explain, compare, draw.

    Args:
        model: a causal language model.
        out: folder for results and classifiers; what is there already is used again.
        n: reviews that the language model classifies.
        seeds: of the methods that draw.
        lengths: least and most tokens of these reviews.
        n_encoders: classifiers, of the training seeds 0, 1, …
        n_encoded: reviews that they classify.
        n_normalised: of these, reviews on which AOPC is normalised, by a beam search.

    Returns:
        A section for a report.
    """
    decoder = measure_decoder(model, out / "decoder", n=n, seeds=seeds, lengths=lengths)
    # The first classifier shows how far a method agrees with itself under another seed; the others are other seeds of training.
    encoders = [
        measure_encoder(
            seed, out / f"encoder-{seed}", n=n_encoded, seeds=(0, 1) if seed == 0 else (0,), n_normalised=n_normalised
        )
        for seed in range(n_encoders)
    ]
    who = {"decoder": str(model.name), "encoder": f"MiniLM, {n_encoders} training seed{'s' * (n_encoders > 1)}"}
    both = {"decoder": pooled([decoder]), "encoder": pooled(encoders)}
    plain, _ = pooled(encoders, special=False)
    claims = [claim for name, (pairs, _) in both.items() for claim in agreement_claims(pairs, who[name])]
    claims.append(special_claim(both["encoder"][0], plain, who["encoder"]))
    for name, (pairs, faithful) in both.items():
        claims += faithfulness_claims(pairs, faithful, who[name])
    write_claims(out / "claims.json", claims)
    items: list[Any] = [
        models_table([decoder, *encoders], out),
        published_table(both["decoder"][0], both["encoder"][0], plain),
    ]
    for one in (decoder, encoders[0]):
        items += [
            agreement_table(one),
            plots.pairwise_agreement(one.agreement),
            plots.against_chance(one.agreement),
            plots.clusters(clusters(one.agreement)),
            faithfulness_table(one),
            plots.faithfulness(one.faithfulness),
            plots.removal_curves(one.faithfulness),
            plots.explain(one.explanations),
            costs(one.explanations),
        ]
    items += [one.agreement for one in (decoder, encoders[0])]
    text = (
        f"{model.name} classifies {n} short film reviews ({lengths[0]} to {lengths[1]} tokens) by a few-shot prompt and the "
        f"label words “ negative” and “ positive”; {n_encoders} MiniLM classifier{'s' * (n_encoders > 1)} (training seeds 0 …) "
        f"classify {n_encoded} reviews of their test split. Explained is the probability of the predicted class; a removed "
        "token becomes the padding token, for faithfulness too, which is near to what leave-one-out and Shapley values ask; "
        "rankings are compared by absolute score, special tokens of the encoder included, as "
        "in the paper; faithfulness ranks by signed score. For the language model every coalition of tokens was computed, so "
        "that Shapley values and the best and worst order of removal are exact. DeepLIFT and DeepSHAP are not complete on "
        "transformers and would be refused; they run because the paper has them.\n\n"
        "Chance is the mean agreement of a ranking with one dealt at random; a method's agreement with itself under another "
        "seed says how noisy it is, and the ceiling of a pair is the geometric mean of both. Intervals are bootstraps over "
        "reviews, 95 %."
    )
    return Section("Agreement: attention rankings against attribution rankings", text, items, claims)


def models_table(runs: Sequence[Measured], out: Path) -> pd.DataFrame:
    """Who was explained: accuracy on the explained reviews, and of classifiers on their whole test split."""
    rows = []
    for one in runs:
        row: dict[str, Any] = {"model": one.name, "accuracy on the explained": one.accuracy}
        folder = out / one.name.replace(" ", "-") / "model"
        stamp = read_stamp(folder) if folder.exists() else None
        tested = (stamp or {}).get("measured", {})
        row["accuracy on test"] = tested.get("accuracy", float("nan"))
        row["AUC on test"] = tested.get("auc", float("nan"))
        frame = one.explanations.frame
        sizes = frame.drop_duplicates(["example", "unit"]).groupby("example").size()
        row["reviews"], row["units"] = len(sizes), f"{sizes.min()} … {sizes.max()}"
        rows.append(row)
    return pd.DataFrame(rows)


def published_table(decoder: pd.DataFrame, encoder: pd.DataFrame, plain: pd.DataFrame) -> pd.DataFrame:
    """The paper's table beside ours: mean Kendall's τ [interval]."""
    rows = []
    tables = {"language model": wide(decoder), "encoder": wide(encoder), "encoder, no special tokens": wide(plain)}
    for pair, published in PUBLISHED.items():
        row: dict[str, Any] = {"pair": " – ".join(pair)}
        row |= {name: "–" if value is None else f"{value:.3f}" for name, value in zip(DATA, published, strict=True)}
        for name, table in tables.items():
            column = pair if pair in table.columns else pair[::-1]
            row[name] = interval_text(table[column]) if column in table.columns else "–"
        rows.append(row)
    return pd.DataFrame(rows)


def agreement_table(one: Measured) -> pd.DataFrame:
    """Every method with the others by side: mean τ with attention, with attributions, with position; its ceiling."""
    frame = one.agreement.frame.astype({"measure": str, "method_a": str, "method_b": str})
    kendall = frame[frame["measure"] == "kendall"]
    names = list(dict.fromkeys(kendall["method_a"]))
    means = {
        (a, b): value for a, b, value in zip(kendall["method_a"], kendall["method_b"], kendall["mean"], strict=True)
    }

    def mean(name: str, side: str) -> float:
        others = [other for other in names if other != name and side_of(other) == side]
        return float(np.nanmean([means.get((name, other), means.get((other, name), np.nan)) for other in others]))

    return pd.DataFrame(
        {
            f"{one.name}: method": names,
            "τ with attention": [mean(name, "attention") for name in names],
            "τ with attributions": [mean(name, "attribution") for name in names],
            "τ with recency": [means.get((name, "recency"), means.get(("recency", name), np.nan)) for name in names],
            "ceiling (itself)": [means[name, name] for name in names],
            "constant or failed": [
                int(kendall[(kendall["method_a"] == name) & (kendall["method_b"] == name)]["n_nan"].iloc[0])
                for name in names
            ],
        }
    )


def faithfulness_table(one: Measured) -> pd.DataFrame:
    """Mean [interval] of every measure, the most faithful first."""
    table = faithfulness_means(one.faithfulness)
    table = table[table["fraction"].isna()]
    cells = table.assign(cell=[_cell(row) for row in table.to_dict("records")])
    order = table[table["measure"] == "normalised_comprehensiveness"].sort_values("mean", ascending=False)["method"]
    shown = cells.pivot(index="method", columns="measure", values="cell").reindex(order)
    counts = (
        table[table["measure"] == "normalised_comprehensiveness"].set_index("method")["n"].reindex(order).to_numpy()
    )
    measures = [
        "comprehensiveness",
        "sufficiency",
        "normalised_comprehensiveness",
        "normalised_sufficiency",
        "leave_one_out",
    ]
    return shown[measures].reset_index().rename(columns={"method": f"{one.name}: method"}).assign(n_normalised=counts)


def interval_text(values: pd.Series) -> str:
    """Mean [low, high] of what is known."""
    known = values.to_numpy(float)
    known = known[np.isfinite(known)]
    if not len(known):
        return "–"
    low, high = bootstrap_mean(known)
    return _cell({"mean": known.mean(), "low": float(low), "high": float(high)})


def _cell(row: Any) -> str:
    if not math.isfinite(row["mean"]):
        return "–"
    return f"{row['mean']:.3f}" + (f" [{row['low']:.3f}, {row['high']:.3f}]" if math.isfinite(row["low"]) else "")


def main(
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    reviews: Annotated[int, typer.Option(help="Reviews, of each kind of model.")] = 150,
    encoders: Annotated[int, typer.Option(help="Classifiers that are trained.")] = 3,
    out: Annotated[Path, typer.Option()] = Path("reports/attribution_agreement"),
) -> None:
    """Compare attention and attribution rankings on film reviews and write a report."""
    loaded = load_model(model, device=device, dtype=dtype)
    section = run(loaded, out, n=reviews, n_encoders=encoders, n_encoded=reviews)
    report = write_report([section], out / "report.html", title=f"Agreement of explanations of {loaded.name}")
    show(claims_frame(section.claims))
    for item in section.items:
        if isinstance(item, pd.DataFrame):
            show(item)
    print(f"report: {report}")


if __name__ == "__main__":
    typer.run(main)
