"""How well answers keep to a role, dimension by dimension, in one figure. `Result -> plotly Figure`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interp.conflict.cras_summaries import FACTS, cras_summary
from interp.conflict.rubrics import DIMENSIONS
from interp.errors import InputError
from interp.plotting import PALETTE, REFERENCE, error_bars, figure, to_float32
from interp.results import Result
from interp.tokens import for_plotly

_NAMES = {"cras": "<b>CRAS</b>", **{name: name.replace("_", " ") for name in DIMENSIONS}}
_SYMBOLS = ("circle", "triangle-up", "square", "diamond", "x", "star", "pentagon")
_ROW = 18  # pixels of a group in a dimension


def score(
    result: Result, by: str = "prompt", *, weights: Mapping[str, float] | None = None, out_of_range: str = "refuse"
) -> Any:
    """CRAS and the mean of each dimension, by kind of prompt, family or another fact.

    Args:
        result: what `interp.conflict.cras` gave.
        by: "prompt", "family", "system_rule", "user_rule", "setting", "wording" or "model"; a colour and a mark each.
        weights: of CRAS, see `interp.conflict.cras`.
        out_of_range: "refuse" a judge that answered out of range, or "drop" the answers concerned.

    Returns:
        One row per dimension and CRAS, 1 to 5, with 95 % intervals over tasks; a row without marks is one that the judge
        cannot tell.

    Raises:
        InputError: see `interp.conflict.cras_summary`.
    """
    import plotly.graph_objects as go

    if by not in FACTS:
        raise InputError(f"by={by!r}; expected one of {', '.join(FACTS)}")
    table = cras_summary(result, (by,), weights=weights, out_of_range=out_of_range).astype({by: str})
    groups, whats = list(dict.fromkeys(table[by])), list(_NAMES)
    judge, n = str(table["judge"].iloc[0]), int(table.loc[table["what"] == "cras", "n"].sum())
    partial, dropped = int(table.loc[table["what"] == "cras", "n_missing"].sum()), _dropped(table)
    notes = [f"judge {judge}", f"{n} answers", "95 % intervals over tasks"]
    notes += [f"{partial} of them on fewer dimensions"] if partial else []
    notes += [f"{dropped} out of range left out"] if dropped else []
    drawn = figure("Adherence to the role, by dimension", "score", "", x_unit="1…5", subtitle=", ".join(notes))
    for at, name in enumerate(groups):
        rows = table[(table[by] == name) & (table["n"] > 0)]
        color = PALETTE[at % len(PALETTE)]
        shift = 0.7 * (at / max(1, len(groups) - 1) - 0.5) if len(groups) > 1 else 0.0
        symbol = _SYMBOLS[(at + at // len(PALETTE)) % len(_SYMBOLS)]  # another pairing after each round of colours
        drawn.add_trace(
            go.Scatter(
                x=to_float32(rows["mean"]),
                y=to_float32([whats.index(what) + shift for what in rows["what"]]),
                error_x=error_bars(rows, color),
                mode="markers",
                name=for_plotly(name or "all", inner=False),
                marker={"color": color, "symbol": symbol, "size": 9},
                customdata=to_float32(rows[["low", "high", "n", "n_missing"]]),
                hovertemplate=(
                    "%{x:.2f}, 95 % interval %{customdata[0]:.2f} … %{customdata[1]:.2f}<br>n = %{customdata[2]}, "
                    "without it or a part of it: %{customdata[3]}"
                ),
            )
        )
    for what in DIMENSIONS:
        if not (table.loc[table["what"] == what, "n"] > 0).any():
            note = {"text": "the judge cannot tell", "showarrow": False, "font": {"color": REFERENCE}}
            drawn.add_annotation(x=3, y=whats.index(what), **note)
    drawn.add_hline(y=0.5, line={"color": REFERENCE, "width": 1, "dash": "dot"})
    drawn.update_xaxes(range=[0.9, 5.1], dtick=1)
    drawn.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(whats))),
        ticktext=list(_NAMES.values()),
        range=[len(whats) - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
    )
    height = 190 + len(whats) * max(40, _ROW * len(groups))
    drawn.update_layout(height=height, legend={"title": {"text": by.replace("_", " ")}}, showlegend=True)
    return drawn


def _dropped(table: Any) -> int:
    return int(table.loc[table["what"] == "cras", "n_dropped"].sum())
