"""Pictures of a localisation hold the summaries' own numbers, and text from users stays text."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from made_drifts import made_result

from interp.conflict import localize_plots as plots
from interp.conflict.dialogues import SPANS
from interp.conflict.focal import focal_heads, head_scores, layer_scores
from interp.conflict.span_attention import attention_by_span
from interp.errors import InputError
from interp.results import Result

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def made() -> Result:
    values = np.random.default_rng(0).gamma(2, size=(8, 2, 6, 4, 3))
    values[:, 0, 2, 1] += 4
    return made_result(values, [f"task-{pair // 2}" for pair in range(8)], name=EVIL)


@pytest.mark.parametrize("score", ["excess", "score", "score_pooled"])
def test_map_shows_every_head_and_marks_the_focal(made: Result, score: str) -> None:
    drawn = plots.localize(made, score=score, share=0.2)
    table = head_scores(made, score=score, share=0.2)
    heat, circles = drawn.data
    assert np.allclose(heat.z, table[score].to_numpy().reshape(6, 4), atol=1e-6)
    assert np.allclose(heat.customdata[2, 1, 5], table.set_index(["layer", "head"]).loc[(2, 1), "q"], atol=1e-6)
    assert set(zip(circles.y, circles.x, strict=True)) == set(focal_heads(made, score=score, share=0.2))
    assert (heat.zmid == 0) == (score == "excess")
    assert "8 pairs of 4 tasks" in drawn.layout.title.subtitle.text


def test_profile_has_interval_control_and_focal_layers(made: Result) -> None:
    drawn = plots.layer_profile(made)
    table = layer_scores(made)
    lines = {trace.name: trace for trace in drawn.data if trace.name}
    for name, label in (
        ("score", "conflict"),
        ("control", "control: paraphrase"),
        ("excess", "excess: conflict − control"),
    ):
        assert np.allclose(lines[label].y, table[name], atol=1e-6)
    ribbons = [trace.y for trace in drawn.data if trace.mode == "lines"]
    for expected, found in zip(("control_high", "control_low", "score_high", "score_low"), ribbons, strict=True):
        assert np.allclose(found, table[expected], atol=1e-6)
    bars = lines["excess: conflict − control"]
    assert np.allclose(bars.y - bars.error_y.arrayminus, table["low"], atol=1e-6)
    assert list(lines["focal layers, rule 'half'"].x) == table["layer"][table["focal"]].tolist()
    assert list(lines["focal layers, rule 'sigma'"].x) == table["layer"][table["focal_sigma"]].tolist()
    assert min(lines["focal layers, rule 'half'"].y) > table["score_high"].max()


@pytest.mark.parametrize("heads", [None, [(2, 1), (4, 0)]])
def test_spans_in_three_prompts(made: Result, heads: Any) -> None:
    drawn = plots.span_masses(made, heads)
    table = attention_by_span(made, heads).set_index(["span", "prompt"])
    lines = [trace for trace in drawn.data if trace.mode == "lines+markers"]
    assert len(lines) == 15
    assert len({trace.yaxis for trace in lines}) == 5
    assert sum(bool(trace.showlegend) for trace in lines) == 3
    for at, trace in enumerate(lines):
        rows = table.loc[(SPANS[at // 3], trace.name)]
        assert np.allclose(trace.y, rows["mean"], atol=1e-6)
        assert np.array_equal(trace.x, rows["layer"])
        assert np.allclose(trace.customdata[:, 1], rows["high"], atol=1e-6)
    assert ("2 heads" in drawn.layout.title.subtitle.text) == (heads is not None)


def test_a_single_task_has_no_interval_and_is_drawn(made: Result) -> None:
    single = made_result(np.random.default_rng(1).gamma(2, size=(3, 2, 6, 4, 3)), ["one"] * 3)
    for draw in (plots.localize, plots.layer_profile, plots.span_masses):
        assert len(draw(single).to_json()) > 1000
    assert min(plots.layer_profile(single).data[-1].y, default=1) > 0


def test_names_stay_text(made: Result) -> None:
    for draw in (plots.localize, plots.layer_profile, plots.span_masses):
        assert EVIL not in json.dumps(draw(made).to_plotly_json(), default=str)
    with pytest.raises(InputError, match="expected one of"):
        plots.localize(made, score="size")
