"""The tree of methods that agree, and its clusters. `Result -> plotly Figure`."""

from __future__ import annotations

from typing import Any

import numpy as np

from interp.agreement.method_looks import DASHES, headline, measure_name, plain, subtitle
from interp.errors import InputError
from interp.plotting import PALETTE, REFERENCE, figure, to_float32
from interp.results import Result

_INKS = PALETTE[:6]  # yellow is too pale for a line


def clusters(result: Result) -> Any:
    """The tree of methods: the nearer to the left two branches meet, the more their methods agree.

    Args:
        result: what `interp.agreement.clusters` gave.

    Returns:
        A dendrogram, leaves from the top in the result's order, merges at 1 − mean agreement. Clusters of two methods or more
        have a colour each, what is merged above the threshold is grey.

    Raises:
        InputError: another kind of result.
    """
    import plotly.graph_objects as go

    if getattr(result, "kind", None) != "agreement.clusters":
        raise InputError(f"{result!r:.60}; expected what interp.agreement.clusters gives")
    made, names = result.provenance.parameters, result.attachments["methods"]
    member = [int(at) for at in result.attachments["clusters"]]  # of every node: leaves, then merges
    sizes = {own: member.count(own) for own in member}
    several = [own for own in sizes if sizes[own] > 1]
    cut = 1 - made["threshold"]
    place, height = [float(at) for at in range(len(names))], [0.0] * len(names)
    lines: dict[int, list[tuple[float, float]]] = {own: [] for own in [*several, 0]}  # NaN parts branches; 0: above
    merges = zip(*(result.frame[column].tolist() for column in ("left", "right", "height")), strict=True)
    for one, two, top in merges:
        own = member[one] if member[one] == member[two] else 0
        lines[own] += [(height[one], place[one]), (top, place[one]), (top, place[two]), (height[two], place[two])]
        lines[own].append((np.nan, np.nan))
        place.append((place[one] + place[two]) / 2)
        height.append(top)
        member.append(own)
    drawn = figure("", "1 − mean agreement of the branches' methods", "")
    for at, (own, points) in enumerate(lines.items()):
        if points:
            x, y = np.array(points, dtype=np.float32).T
            ink = {"color": _INKS[at % len(_INKS)], "dash": DASHES[at // len(_INKS) % len(DASHES)], "width": 3}
            drawn.add_trace(
                go.Scatter(
                    x=x,
                    y=y,
                    mode="lines",
                    line=ink if own else {"color": "#999999", "width": 1.5},
                    name=f"cluster {own}: {sizes[own]} methods" if own else "merged above the threshold",
                    hoverinfo="skip",
                )
            )
    leaves = len(names)
    drawn.add_trace(
        go.Scatter(
            x=to_float32(height[leaves:]),
            y=to_float32(place[leaves:]),
            mode="markers",
            marker={"color": "#444444", "size": 5},
            text=[plain(methods).replace(", ", "<br>") for methods in result.frame["methods"]],
            customdata=to_float32(1 - np.array(height[leaves:])),
            hovertemplate="mean agreement %{customdata:.3f}<br>%{text}<extra></extra>",
            showlegend=False,
        )
    )
    drawn.add_vline(
        x=cut,
        line={"color": REFERENCE, "dash": "dot"},
        annotation_text=f"threshold: agreement {made['threshold']:g}",
        annotation_position="top",
        annotation_font_size=12,
    )
    without = f"; left out, they lack numbers: {', '.join(made['left_out'])}" if made.get("left_out") else ""
    headline(
        drawn,
        f"Which methods say the same: {measure_name(made['measure'], made.get('clustered_k', 0))}",
        subtitle(result, f"{made['linkage']} linkage{without}"),
        190 + 24 * max(leaves, 6),
        room=20,
    )
    drawn.update_xaxes(range=[min(0.0, cut) - 0.005, max([*height, cut]) * 1.05 + 0.01], zeroline=False)
    drawn.update_yaxes(
        tickvals=list(range(leaves)),
        ticktext=[plain(name) for name in names],
        range=[leaves - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
    )
    return drawn
