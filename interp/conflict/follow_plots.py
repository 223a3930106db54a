"""Which rules a model follows: a dot per rule and prompt with its interval. `Result -> plotly Figure`."""

from __future__ import annotations

from typing import Any

from interp.conflict.follow_summaries import follow_summary
from interp.conflict.pairs import PROMPTS
from interp.plotting import PALETTE, REFERENCE, error_bars, figure, to_float32
from interp.results import Result
from interp.tokens import for_plotly

# What a prompt is called in a legend, its colour and its mark; several marks of one rule stand below each other.
_LOOKS = {
    "none": ("no rule", REFERENCE, "line-ns-open"),
    "system": ("rule in the system turn", PALETTE[0], "circle"),
    "user": ("rule in the user turn", PALETTE[2], "square"),
    "agree": ("in both", PALETTE[5], "diamond"),
    "paraphrase": ("in both, other words", PALETTE[3], "x"),
    "other": ("in the system turn, another demand from the user", PALETTE[4], "cross"),
    "conflict": ("in the system turn, the opposite from the user", PALETTE[1], "triangle-up"),
}
_ROW = 46  # pixels of a rule


def follow(result: Result) -> Any:
    """Share of answers that obey a rule, by where the rule stands.

    Args:
        result: what `interp.conflict.follow` gave.

    Returns:
        One row per rule, the two rules of a family next to each other; 95 % intervals over tasks. The grey mark is what the model
        does without any rule.

    Raises:
        InputError: another kind of result.
    """
    import plotly.graph_objects as go

    table = follow_summary(result, ("family", "system_rule")).astype({"family": str, "system_rule": str})
    order = list(dict.fromkeys(table["family"]))
    rules = list(dict.fromkeys(zip(table["family"], table["system_rule"], strict=True)))
    rules.sort(key=lambda rule: order.index(rule[0]))  # the two rules of a family next to each other
    place = {rule: at for at, rule in enumerate(rules)}
    tasks = int(table["n_tasks"].max())
    settings = ", ".join(sorted(result.frame["setting"].astype(str).unique()))
    drawn = figure(
        "Which rules are followed, and which of them under conflict",
        "answers that obey the rule",
        "",
        x_unit="share",
        subtitle=f"{result.provenance.model}; the opposite comes from: {settings}; up to {tasks} tasks a rule, 95 % intervals",
    )
    shown = [name for name in PROMPTS if name in set(table["prompt"])]
    for at, name in enumerate(shown):
        label, color, symbol = _LOOKS[name]
        rows = table[table["prompt"] == name].rename(columns={"obeys_system": "mean"})
        shift = 0.7 * (at / max(1, len(shown) - 1) - 0.5)
        height = [place[rule] + shift for rule in zip(rows["family"], rows["system_rule"], strict=True)]
        drawn.add_trace(
            go.Scatter(
                x=to_float32(rows["mean"]),
                y=to_float32(height),
                error_x=error_bars(rows, color),
                mode="markers",
                name=label,
                marker={"color": color, "symbol": symbol, "size": 9, "line": {"width": 2, "color": color}},
                customdata=to_float32(rows[["low", "high", "n"]]),
                hovertemplate="%{x:.2f}, 95 % interval %{customdata[0]:.2f} … %{customdata[1]:.2f}, n = %{customdata[2]}",
            )
        )
    drawn.update_xaxes(range=[-0.02, 1.02])
    drawn.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(rules))),
        ticktext=[for_plotly(f"{name}: {rule}", inner=False) for name, rule in rules],
        range=[len(rules) - 0.4, -0.6],
    )
    drawn.update_layout(height=170 + _ROW * len(rules), legend={"orientation": "h", "y": -0.08, "yanchor": "top"})
    return drawn
