"""What `interp agreement` prints and draws: tables, one JSON object, a report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.cli_shared import show
from interp.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from interp.agreement.comparing import Comparison

DRAWN_TEXTS = 3  # explanations in the report's pictures


def print_json(comparison: Comparison) -> None:
    """One object of tables, each a list of records."""
    from interp.agreement import costs, faithfulness_means

    tables = {
        "explained": _explained(comparison),
        "agreement": comparison.agreement.frame,
        "faithfulness": faithfulness_means(comparison.faithfulness),
        "costs": costs(comparison.explanations),
        "refused": _refused(comparison),
    }
    records = (f'"{name}": {frame.to_json(orient="records", force_ascii=False)}' for name, frame in tables.items())
    print(f"{{{', '.join(records)}}}")


def print_tables(comparison: Comparison, measure: str, k: int, top: int) -> None:
    """What was explained, agreement by one measure, its `top` pairs, faithfulness, costs, and what was left out."""
    from interp.agreement import costs
    from interp.agreement.pairs import matrix

    of_texts = _explained(comparison)
    text = of_texts["text"].map(lambda whole: whole if len(whole) <= 60 else f"{whole[:59]}…")
    _show("Explained", of_texts.assign(text=text))
    rows = comparison.agreement.frame.query("measure == @measure and k == @k").astype({"method_a": str})
    rows = rows.astype({"method_b": str})
    others = rows[rows["method_a"] != rows["method_b"]]
    by = comparison.agreement.provenance.parameters["rank_by"]
    named = f"{measure} of the top {k}" if k else measure
    _show(
        f"Agreement: {named}, ranked by {'|score|' if by == 'abs' else 'score'}; on the diagonal the method under another "
        f"seed; by chance {_range(others['chance'])}",
        matrix(comparison.agreement, measure, k).rename_axis("method").reset_index(),
    )
    pairs = others.sort_values("mean", ascending=False, kind="stable").head(top)
    _show(
        f"The {len(pairs)} pairs that agree most, of {len(others)}; 95 % intervals over the texts",
        pairs[["method_a", "method_b", "mean", "low", "high", "n", "n_nan", "chance", "ceiling"]],
    )
    _show(
        "Faithfulness: mean over the texts, and its 95 % interval; comprehensiveness is better high, sufficiency low",
        _faithful(comparison),
    )
    _show("Costs: per text and seed; completeness error: median", costs(comparison.explanations))
    if len(refused := _refused(comparison)):
        _show("Left out", refused)


def _show(title: str, frame: pd.DataFrame) -> None:
    print(f"\n{title}")
    show(frame)


def _explained(comparison: Comparison) -> pd.DataFrame:
    """A row per text: what the model said, and the target with and without the text."""
    import pandas as pd

    from interp.agreement.explanation_table import explained

    rows = [{**about, "units": len(about["units"])} for about in explained(comparison.explanations)]
    ends = comparison.explanations.frame.drop_duplicates("example").set_index("example")
    return (
        pd.DataFrame(rows)
        .assign(f_x=ends["value"], f_baseline=ends["baseline_value"])
        .rename_axis("example")
        .reset_index()
    )


def _faithful(comparison: Comparison) -> pd.DataFrame:
    """A row per method, a column per measure."""
    from interp.agreement import faithfulness_means

    means = faithfulness_means(comparison.faithfulness)
    means = means[means["fraction"].isna()]
    cells = [
        f"{row.mean:.3g} ({row.low:.2g} … {row.high:.2g})" if row.n > 1 else f"{row.mean:.3g}" if row.n else "–"
        for row in means.itertuples()
    ]
    wide = means.assign(cell=cells).pivot(index="method", columns="measure", values="cell")
    wide = wide.loc[means["method"].unique(), means["measure"].unique()]
    numbers = means.groupby("method", sort=False)["n"]
    counts = [
        f"{low}" if low == high else f"{low} … {high}" for low, high in zip(numbers.min(), numbers.max(), strict=True)
    ]
    return wide.assign(n=counts).reset_index().rename_axis(columns=None)


def _refused(comparison: Comparison) -> pd.DataFrame:
    import pandas as pd

    refused = comparison.explanations.provenance.parameters["refused"]
    return pd.DataFrame(list(refused.items()), columns=["method", "reason"])


def _range(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    if low != low:
        return "unknown"
    return f"{low:.3g}" if low == high else f"{low:.3g} … {high:.3g}"


def write_page(comparison: Comparison, measure: str, k: int, path: Path) -> Path:
    """One page: the first texts' explanations, agreement, the tree of methods, faithfulness, costs."""
    from interp.agreement import clusters, costs, plots
    from interp.report import Section, write_report

    explanations, agreed, faithful = comparison
    seed = explanations.provenance.parameters["seeds"][0]
    n_texts = int(explanations.frame["example"].nunique())
    pictures = [plots.explain(explanations, example=at, seed=seed) for at in range(min(n_texts, DRAWN_TEXTS))]
    refused = _refused(comparison)
    several = len(agreed.frame["method_a"].cat.categories) > 2
    sections = [
        Section("Explained", "", [_explained(comparison)]),
        Section(f"Explanations of the first texts: {len(pictures)} of {n_texts}", "", pictures),
        Section(
            "Agreement",
            "On the diagonal a method's agreement with itself under another seed. The chance level is what "
            "one method's scores give when they are dealt at random.",
            [
                plots.pairwise_agreement(agreed, measure=measure, k=k),
                *_if_any(plots.against_chance, agreed, measure=measure, k=k),
                *(_if_any(clusters, agreed, measure, k) if several else []),
                agreed.frame,
            ],
        ),
        Section(
            "Faithfulness",
            "How far the target falls when the units that a method ranks first are taken away (comprehensiveness, better "
            "high) or kept alone (sufficiency, better low). Agreement says nothing about either.",
            [*([faithful] if _if_any(plots.faithfulness, faithful) else []), *_if_any(plots.removal_curves, faithful)],
        ),
        Section(
            "Completeness and costs",
            "",
            [
                *_if_any(plots.completeness, explanations),
                plots.costs(explanations),
                costs(explanations),
                *([refused] if len(refused) else []),
            ],
        ),
    ]
    return write_report(sections, path, title="Agreement of explanations")


def _if_any(make: Callable[..., Any], *given: Any, **options: Any) -> list[Any]:
    """What a figure shows, if there is anything: without an attribution or a ranking there may be nothing."""
    try:
        return [make(*given, **options)]
    except InputError as error:
        print(f"not in the report: {error}", file=sys.stderr)
        return []
