"""The common look, the ribbon, and the guards on size and type."""

import json

import numpy as np
import plotly.graph_objects as go
import pytest

from interp.errors import InputError
from interp.plotting import PALETTE, band, cap_cells, figure, to_float32, token_axis


def test_figure_has_units_and_escapes() -> None:
    drawn = figure("a <b> title", "dose", "p", x_unit="σ", y_unit="probability", subtitle="n = 3 & more")
    assert drawn.layout.title.text == "a &lt;b&gt; title"
    assert drawn.layout.title.subtitle.text == "n = 3 &amp; more"
    assert drawn.layout.xaxis.title.text == "dose [σ]"
    assert drawn.layout.yaxis.title.text == "p [probability]"
    assert tuple(drawn.layout.template.layout.colorway) == PALETTE


def test_band_is_a_ribbon_around_a_line() -> None:
    drawn = figure("t", "x", "y")
    band(drawn, [0, 1], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5], name="one")
    band(drawn, [0, 1], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5], name="<two>")
    high, low, line = drawn.data[3:]
    assert low.fill == "tonexty"
    assert [high.y.tolist(), low.y.tolist(), line.y.tolist()] == [[1.5, 2.5], [0.5, 1.5], [1.0, 2.0]]
    assert line.y.dtype == np.float32
    assert (drawn.data[2].line.color, line.line.color) == PALETTE[:2]
    assert line.name == "&lt;two&gt;"
    assert [trace.showlegend for trace in (high, low)] == [False, False]
    json.loads(drawn.to_json())
    with pytest.raises(InputError, match="one length"):
        band(drawn, [0, 1], [1.0], [0.5], [1.5], name="bad")


def test_palette_is_told_apart_without_colour_vision() -> None:
    """No two colours look alike to a red-blind or green-blind eye (Viénot, Brettel and Mollon 1999)."""
    srgb = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in PALETTE]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    blind = {
        "red": np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]]),
        "green": np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]),
    }
    for matrix in blind.values():
        seen = np.clip(linear @ (np.linalg.inv(lms) @ matrix @ lms).T, 0, 1) ** (1 / 2.2)
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(len(PALETTE), 1)]
        assert distances.min() > 0.1


def test_tensors_become_float32() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.tensor([1.5, 2.0], dtype=torch.bfloat16, requires_grad=True)
    assert to_float32(tensor).dtype == np.float32
    assert to_float32(tensor).tolist() == [1.5, 2.0]
    assert to_float32(torch.tensor([True, False])).tolist() == [1.0, 0.0]
    assert to_float32(np.float64(2)).dtype == np.float32


def test_cells_are_capped() -> None:
    assert cap_cells(np.ones((2, 3)), limit=6).shape == (2, 3)
    with pytest.raises(InputError, match=r"\(2, 3\) has 6 cells.*at most 5"):
        cap_cells(np.ones((2, 3)), limit=5)
    with pytest.raises(InputError, match="3 cells"):
        cap_cells([1, 2, 3], limit=2)


def test_token_axis_keeps_equal_tokens_apart() -> None:
    axis = token_axis([" a", " a", "12", "<b>"])
    assert axis["tickvals"] == [0, 1, 2, 3]
    assert axis["ticktext"] == ["␣a", "␣a", "12", "&lt;b&gt;"]
    go.Figure().update_xaxes(**axis)
