"""How the time of every flow method grows with the number of tokens T and of layers L.

One target, the last token, and all sources. The capacities are those of `flow_graphs.real_capacity`: the first T
tokens of its text with all layers, and 64 tokens with the lowest L layers. One torch thread, so that the growth is the
method's own; the quickest of the calls that fit into .3 s. The exponent is fitted through the three largest sizes:
below them much of the time is that of a call. Numbers and curves are in reports/flow_growth.html.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
from torch import Tensor

from tests.benchmarks.flow_graphs import corner, on_one_thread, real_capacity, warm_up
from tests.benchmarks.memory import ROOT
from tests.benchmarks.table import Row
from tests.benchmarks.timing import growth_exponent, quickest

SUITE = "flow"
_AXES = {"tokens": "T", "layers": "L"}
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross")
_REPORT = ROOT / "reports" / "flow_growth.html"


def run(quick: bool) -> list[Row]:
    """A row per method and axis, all without a target; the figure is written beside them."""
    from interp.report import Section, write_report

    lengths = [8, 16, 32, 64, 128] if quick else [8, 16, 32, 64, 128, 256, 512]
    depths = [2, 4, 8, 15, 30]
    capacity = real_capacity(lengths[-1])
    frame = on_one_thread(lambda: measured(capacity, lengths, depths))
    n_layers, length = len(capacity), 64
    figures = [
        growth_figure(frame, "tokens", f"{n_layers} layers of the embedded model"),
        growth_figure(frame, "layers", f"the lowest layers of the embedded model, {length} tokens"),
    ]
    numbers = Section("The same in milliseconds", items=[table(frame)])
    write_report([*figures, numbers], _REPORT, title="Flow: how time grows")
    return _rows(frame, quick)


def measured(capacity: Tensor, lengths: Iterable[int], depths: Iterable[int], length: int = 64) -> pd.DataFrame:
    """One row per method and point: axis, method, tokens, layers, seconds.

    Args:
        capacity: (layer, query, key) of the longest text.
        lengths: tokens, with all layers.
        depths: layers, with `length` tokens.
        length: see `depths`.
    """
    from interp.flow.influences import METHODS

    warm_up(capacity)
    points = [("tokens", at, len(capacity)) for at in lengths] + [("layers", length, at) for at in depths]
    rows = []
    for axis, n_tokens, n_layers in points:
        graph = corner(capacity[:n_layers], n_tokens)
        for name, method in METHODS.items():
            seconds = quickest(_call(method, graph))
            rows.append({"axis": axis, "method": name, "tokens": n_tokens, "layers": n_layers, "seconds": seconds})
    return pd.DataFrame(rows)


def _call(method: Callable[..., Tensor], graph: Tensor) -> Callable[[], Tensor]:
    return lambda: method(graph, [-1])


def exponents(frame: pd.DataFrame, axis: str) -> dict[str, float]:
    """Method → exponent along "tokens" or "layers"."""
    along = frame[frame["axis"] == axis]
    return {
        str(name): growth_exponent(part[axis].tolist(), part["seconds"].tolist())
        for name, part in along.groupby("method", sort=False)
    }


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """A line per axis and size, milliseconds of every method; the exponents below."""
    parts = []
    for axis, letter in _AXES.items():
        along = frame[frame["axis"] == axis]
        wide = along.pivot(index=axis, columns="method", values="seconds")[list(along["method"].unique())] * 1000
        wide.index = [f"{letter} = {size}" for size in wide.index]
        wide.loc[f"exponent of {letter}"] = exponents(frame, axis)
        parts.append(wide)
    whole = pd.concat(parts).map(lambda value: float(f"{value:.3g}"))
    whole.index.name = "milliseconds"
    return whole.reset_index()


def growth_figure(frame: pd.DataFrame, axis: str, subtitle: str) -> Any:
    """Milliseconds against tokens or layers, both logarithmic, a line per method with its exponent in the legend."""
    import plotly.graph_objects as go

    from interp.plotting import PALETTE, figure

    letter = _AXES[axis]
    drawn = figure(
        f"Time of all flows to the last token, by {axis}",
        f"{axis} {letter}",
        "time",
        y_unit="ms",
        subtitle=f"{subtitle}; all sources, one thread; exponents through the three largest sizes",
    )
    along = frame[frame["axis"] == axis]
    for at, (name, exponent) in enumerate(exponents(frame, axis).items()):
        part = along[along["method"] == name]
        drawn.add_trace(
            go.Scatter(
                x=part[axis],
                y=part["seconds"] * 1000,
                mode="lines+markers",
                name=f"{name}: {letter}<sup>{exponent:.1f}</sup>",
                line={"color": PALETTE[at % len(PALETTE)]},
                marker={"symbol": _SYMBOLS[at % len(_SYMBOLS)], "size": 9},
                hovertemplate=f"{letter} = %{{x}}: %{{y:.3g}} ms",
            )
        )
    sizes = sorted(along[axis].unique().tolist())
    drawn.update_xaxes(type="log", tickvals=sizes, ticktext=[str(size) for size in sizes])
    drawn.update_yaxes(type="log", dtick=1, exponentformat="none")
    return drawn


def _rows(frame: pd.DataFrame, quick: bool) -> list[Row]:
    rows = []
    for axis, letter in _AXES.items():
        for name, exponent in exponents(frame, axis).items():
            part = frame[(frame["axis"] == axis) & (frame["method"] == name)].sort_values(axis)
            sizes, seconds = part[axis].tolist(), part["seconds"].tolist()
            series = ", ".join(f"{size}: {_short(one)}" for size, one in zip(sizes, seconds, strict=True))
            rows.append(
                Row(
                    suite=SUITE,
                    subject="flow_growth",
                    name=f"{name}, last token, {letter} = {sizes[-1]}",
                    against=f"the same at {letter} = {sizes[-2]}",
                    ratio=seconds[-1] / seconds[-2],
                    target=None,
                    ours=seconds[-1] * 1000,
                    theirs=seconds[-2] * 1000,
                    unit="ms",
                    quick=quick,
                    note=f"time grows as {letter}^{exponent:.2f}; {letter} … {series}; the figure is in "
                    f"{_REPORT.relative_to(ROOT)}",
                    more={
                        "exponent": exponent,
                        **{f"{letter}={size}": one for size, one in zip(sizes, seconds, strict=True)},
                    },
                )
            )
    return rows


def _short(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
