"""Figure of the third stage of `analyses.instruction_conflict`: a table of arms in, a plotly figure out."""

from __future__ import annotations

from typing import Any

import pandas as pd

from interp.plotting import PALETTE, REFERENCE, figure


def arms(table: pd.DataFrame, model: str) -> Any:
    """What each arm gained under conflict, by group of families, beside what it cost in perplexity.

    Args:
        table: what `analyses.conflict_arms.table` gave.
        model: its name.
    """
    import plotly.graph_objects as go

    rows = table[table["arm"] != "untrained"]
    order = rows[rows["families"] == rows["families"].iloc[0]].sort_values("change")["arm"].tolist()
    drawn = figure(
        "Adapters by their layers: what is gained under conflict on held-out tasks",
        "change of the answers that obey the system's rule",
        "",
        x_unit="share",
        subtitle=f"{model}; pair by pair against the untrained model, 95 % interval over tasks",
    )
    for at, (name, some) in enumerate(rows.groupby("families", sort=False)):
        drawn.add_trace(
            go.Scatter(
                x=some["change"],
                y=[order.index(arm) + 0.18 * (1 - 2 * at) for arm in some["arm"]],
                error_x={
                    "type": "data",
                    "array": some["high"] - some["change"],
                    "arrayminus": some["change"] - some["low"],
                    "thickness": 1.2,
                },
                mode="markers",
                name=f"{name} (n = {some['n'].max()})",
                marker={"color": PALETTE[at], "symbol": ("circle", "diamond", "square")[at], "size": 8},
                customdata=some[["layers", "conflict", "perplexity"]],
                hovertemplate="layers %{customdata[0]}<br>%{x:+.2f} to %{customdata[1]:.0%}, perplexity × %{customdata[2]:.3f}",
            )
        )
    facts = rows.drop_duplicates("arm").set_index("arm").loc[order]
    places = [f"{row.Index}: {row.layers}<br>perplexity × {row.perplexity:.3f}" for row in facts.itertuples()]
    drawn.update_yaxes(tickvals=list(range(len(order))), ticktext=places, automargin=True)
    drawn.add_vline(0.0, line_color=REFERENCE, line_width=1)
    drawn.update_layout(height=160 + 52 * len(order))
    return drawn
