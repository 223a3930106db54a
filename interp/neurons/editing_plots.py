"""The picture of an edit: `Result -> plotly Figure`. What is averaged is averaged by `summarise_edit`."""

from __future__ import annotations

from typing import Any

from interp.neurons.edit_effects import ARMS, summarise_edit
from interp.plotting import PALETTE, REFERENCE, figure, to_float32
from interp.results import Result
from interp.tokens import for_plotly

_COLORS = {"none": REFERENCE, "reversed": PALETTE[1], "random": PALETTE[0], "zeroed": PALETTE[2]}
_SYMBOLS = {"none": "line-ew-open", "reversed": "circle", "random": "square", "zeroed": "diamond"}
_NAMES = {"none": "before", "reversed": "rows reversed", "random": "random rows reversed", "zeroed": "same rows zeroed"}


def edit(result: Result) -> Any:
    """The concept's probability after each trigger prompt, by arm, with the mean and the divergence on neutral text.

    Args:
        result: what `edit_report` gave.
    """
    summary = summarise_edit(result).set_index("arm")
    concept, about = str(result.frame["concept"].iloc[0]), result.provenance.parameters
    drawn = figure(
        f"Reversing {len(about['rows'])} weight rows: probability of {concept!r} after prompts that lead to it",
        "prompt",
        "p(concept) as next token",
        y_unit="probability",
        subtitle=f"{result.provenance.model}; {about['n_prompts']} prompts, {about['n_texts']} neutral texts",
    )
    prompts = result.frame[result.frame["item"] == "prompt"]
    for arm in ARMS:
        rows = prompts[prompts["arm"] == arm]
        one = summary.loc[arm]
        drawn.add_scatter(
            x=rows["index"].to_numpy(),
            y=to_float32(rows["p_concept"]),
            mode="markers",
            marker={"color": _COLORS[arm], "symbol": _SYMBOLS[arm], "size": 11, "line": {"width": 2}},
            customdata=[[for_plotly(prompt, inner=False)] for prompt in rows["text"]],
            name=f"{_NAMES[arm]}: mean {one['p_concept']:.3f}, KL on text {one['kl']:.4f} nats",
            hovertemplate=f"%{{customdata[0]}}<br>{_NAMES[arm]}: %{{y:.4f}}<extra></extra>",
        )
    drawn.update_xaxes(dtick=1)
    drawn.update_yaxes(range=[-0.03, 1.03])
    drawn.update_layout(legend={"orientation": "h", "y": -0.2})
    return drawn
