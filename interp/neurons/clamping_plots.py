"""Pictures of clamped neurons: `Result -> plotly Figure`. What is averaged is averaged by `summarise` and `by_layer`."""

from __future__ import annotations

from typing import Any

import pandas as pd

from interp.neurons.clamping import summarise
from interp.neurons.statistics import by_layer
from interp.plotting import PALETTE, REFERENCE, band, figure, to_float32
from interp.results import Result
from interp.tokens import for_plotly

_Panel = tuple[str, str, str, dict[str, Any]]  # measure, name, unit, settings of its axis
_GAP = 0.05  # of the figure's height, between panels
_SYMBOLS = {"up": "triangle-up", "gate": "square", "hidden": "circle"}
_ARMS = {"clamp": PALETTE[1], "random": PALETTE[0], "zero": PALETTE[2], "none": REFERENCE}


def dose_response(result: Result, summary: pd.DataFrame | None = None) -> Any:
    """Mention rate, probability of the concept and fluency against the dose, beside the controls.

    Args:
        result: what `dose_response` gave.
        summary: what `summarise` made of it; made here if missing.
    """
    table = summarise(result) if summary is None else summary
    about = result.provenance.parameters
    main = result.frame[result.frame["arm"] == "clamp"].iloc[0]
    concept = str(main["concept"])
    drawn = figure(
        f"Clamping a neuron of {concept!r}: dose and response",
        "dose",
        "",
        x_unit=_unit(about),
        subtitle=(
            f"{result.provenance.model}, {main['site']} ({main['layer']}, {main['neuron']}), mode {about['mode']}; "
            f"{about['n_prompts']} prompts × {about['n_seeds']} samples, {len(about['random'])} random neurons of the layer"
        ),
    )
    panels: list[_Panel] = [
        ("mention_rate", "answers that mention it", "share", {"range": [-0.03, 1.03]}),
        ("p_concept", "p(concept) as next token", "probability", {"type": "log", "exponentformat": "power"}),
        ("perplexity", "perplexity of the answer", "unclamped model", {"type": "log", "exponentformat": "power"}),
    ]
    _stack(drawn, panels)
    doses = table.loc[table["arm"].isin(["clamp", "random"]), "dose"]
    for at, (measure, *_) in enumerate(panels):
        axis = "y" if at == 0 else f"y{at + 1}"
        for arm, name in (("random", "random neuron"), ("clamp", f"neuron of {concept!r}")):
            rows = table[table["arm"] == arm].sort_values("dose")
            before = len(drawn.data)
            columns = [rows[column] for column in ("dose", measure, f"{measure}_low", f"{measure}_high")]
            band(drawn, *columns, name=name, color=_ARMS[arm])
            for trace in drawn.data[before:]:
                trace.update(yaxis=axis)
                if at and trace.showlegend is not False:
                    trace.update(showlegend=False)
        for arm, name, dash in (("zero", "zero ablation", "dot"), ("none", "unclamped", "dash")):
            rows = table[table["arm"] == arm]
            if len(rows):
                drawn.add_scatter(
                    x=to_float32([doses.min(), doses.max()]),
                    y=to_float32([rows[measure].iloc[0]] * 2),
                    mode="lines",
                    line={"color": _ARMS[arm], "dash": dash},
                    name=name,
                    legendgroup=name,
                    showlegend=at == 0,
                    yaxis=axis,
                    hovertemplate=f"{name}: %{{y:.4g}}<extra></extra>",
                )
    drawn.update_layout(height=760, legend={"orientation": "h", "y": -0.1})
    return drawn


def clamp_search(result: Result) -> Any:
    """Every clamp that answered the search prompts, and how the chosen one and the controls did on the report prompts.

    Args:
        result: what `search_clamp` gave.
    """
    frame, about = result.frame, result.provenance.parameters
    concept = str(frame["concept"].iloc[0])
    drawn = figure(
        f"Search for the best clamp of {concept!r}",
        "perplexity of answers over that of unclamped ones",
        "answers that mention it",
        y_unit="share",
        subtitle=(
            f"{result.provenance.model}; left: {len(about['search_prompts'])} search prompts, at most "
            f"{about['max_perplexity_ratio']:g}× the perplexity; right: {len(about['report_prompts'])} other prompts"
        ),
    )
    searched = frame[(frame["stage"] == "search") & (frame["arm"] == "clamp")]
    for at, (site, rows) in enumerate(searched.groupby("site", observed=True)):
        drawn.add_scatter(
            x=to_float32(rows["perplexity_ratio"]),
            y=to_float32(rows["mention_rate"]),
            mode="markers",
            name=f"site {site}",
            marker={
                "symbol": _SYMBOLS.get(str(site), "circle"),
                "color": PALETTE[at],
                "size": [16 if chosen else 9 for chosen in rows["chosen"]],
                "line": {"color": "#222222", "width": [2.5 if chosen else 0 for chosen in rows["chosen"]]},
            },
            text=[_label(row) for row in rows.itertuples()],
            hovertemplate="%{text}<br>mentions %{y:.0%}, perplexity ×%{x:.3g}<extra></extra>",
        )
    limit = float(about["max_perplexity_ratio"])
    drawn.add_scatter(
        x=to_float32([limit, limit]),
        y=to_float32([0, 1]),
        mode="lines",
        line={"color": REFERENCE, "dash": "dash"},
        name="limit of fluency",
        hoverinfo="skip",
    )
    reported = frame[frame["stage"] == "report"]
    names = [_report_name(row) for row in reported.itertuples()]
    middle, low, high = (to_float32(reported[f"mention_rate{end}"]) for end in ("", "_low", "_high"))
    drawn.add_scatter(
        x=names,
        y=middle,
        error_y={"type": "data", "symmetric": False, "array": high - middle, "arrayminus": middle - low},
        mode="markers",
        marker={"color": [_ARMS[str(arm)] for arm in reported["arm"]], "size": 11},
        xaxis="x2",
        showlegend=False,
        text=[_label(row) for row in reported.itertuples()],
        hovertemplate="%{text}<br>mentions %{y:.0%}<extra></extra>",
    )
    drawn.update_xaxes(domain=[0, 0.58], type="log")
    drawn.update_layout(
        xaxis2={"domain": [0.64, 1], "anchor": "y", "title": {"text": "on the report prompts"}, "type": "category"},
        yaxis={"range": [-0.03, 1.03], "tickformat": ".0%"},
        legend={"orientation": "h", "y": -0.2},
    )
    return drawn


def statistics(result: Result) -> Any:
    """Standard deviation of the neurons' activations and how often they are positive, by layer: median and quartiles.

    Args:
        result: what `neuron_statistics` gave.
    """
    table = by_layer(result)
    drawn = figure(
        "How active neurons are, by layer",
        "layer",
        "",
        subtitle=f"{result.provenance.model}, {int(table['n'].max()):,} tokens; ribbons: quartiles over neurons",
    )
    panels: list[_Panel] = [
        ("sd", "standard deviation", "activation", {"type": "log", "exponentformat": "power"}),
        ("share_positive", "tokens where it is positive", "share", {"range": [-0.03, 1.03], "tickformat": ".0%"}),
    ]
    _stack(drawn, panels)
    for at, (measure, *_) in enumerate(panels):
        for color, (site, rows) in zip(PALETTE, table.groupby("site", observed=True), strict=False):
            before = len(drawn.data)
            columns = [rows["layer"], *(rows[f"{measure}_p{percent}"] for percent in (50, 25, 75))]
            band(drawn, *columns, name=f"site {site}", color=color, interval="quartiles")
            for trace in drawn.data[before:]:
                trace.update(yaxis="y" if at == 0 else "y2")
                if at and trace.showlegend is not False:
                    trace.update(showlegend=False)
    drawn.update_layout(height=560)
    return drawn


def _stack(drawn: Any, panels: list[_Panel]) -> None:
    """Panels above each other on one horizontal axis, the first on top."""
    height = (1 + _GAP) / len(panels)
    for at, (_, name, unit, settings) in enumerate(panels):
        top = 1 - at * height
        axis = {
            "domain": [max(0.0, top - height + _GAP), top],
            "title": {"text": f"{name}<br>[{unit}]", "font": {"size": 12}},
            **settings,
        }
        drawn.update_layout({"yaxis" if at == 0 else f"yaxis{at + 1}": axis})
    drawn.update_xaxes(anchor="y" if len(panels) == 1 else f"y{len(panels)}")


def _unit(about: dict[str, Any]) -> str:
    if about["units"] == "sd":
        return "standard deviations of the neuron's activation"
    return "factor" if about["mode"] == "scale" else "activation"


def _label(row: Any) -> str:
    return for_plotly(f"{row.arm} {row.site} ({row.layer}, {row.neuron}) at {row.dose:+g} sd", inner=False)


def _report_name(row: Any) -> str:
    names = {"clamp": "chosen clamp", "zero": "zero ablation", "none": "unclamped"}
    return names.get(str(row.arm), f"random {row.neuron}")
