"""Pictures of agreement hold the results' own numbers, say what has none, and keep names and tokens as text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny_models import tiny_hf, tiny_tokenizer

from interp.agreement import Comparison, Verbalizer, clusters, compare, costs, faithfulness_means, plots
from interp.agreement.clustering import CLUSTER_COLUMNS
from interp.agreement.explanation_table import EXPLANATION_COLUMNS
from interp.agreement.pairs import PAIR_COLUMNS, matrix
from interp.agreement.removal import FAITHFULNESS_COLUMNS
from interp.errors import InputError
from interp.model import load_model
from interp.report import write_report
from interp.results import Provenance, Result, find_plot

EVIL = "<b>$x$"  # a user's own name for a ranking
SHOWN = "&lt;b&gt;&#36;x&#36;"
METHODS = ["attention", "rollout", "leave_one_out", "kernel_shap", "random"]
TEXTS = [" the dog is old", " a red sea of water", " new <script> keys", " code", " sun of the king"]
nan = float("nan")


@pytest.fixture(scope="module")
def compared() -> Comparison:
    """Five methods, an evil name and a constant ranking on five texts, one of a single unit."""
    model = load_model(tiny_hf("llama"), tiny_tokenizer())
    lengths = [len(text.split()) for text in TEXTS]
    custom = {
        "none": [[1.0] * length for length in lengths],
        EVIL: [np.random.default_rng(length).normal(size=length).tolist() for length in lengths],
    }
    task = Verbalizer({"pos": " sun", "neg": " sea"}, template="{text} is")
    examples = [(text, "pos") for text in TEXTS]
    return compare(model, examples, METHODS, task=task, custom=custom, options={"kernel_shap": {"n_samples": 8}})


def pairs(means: dict[tuple[str, str], float], measure: str = "kendall", k: int = 0, **columns: Any) -> Result:
    """{(method, method): mean} as what pairwise_agreement gives; the interval is the mean ± 0.1."""
    names = list(dict.fromkeys(name for pair in means for name in pair))
    frame = pd.DataFrame(means.keys(), columns=["method_a", "method_b"]).astype(pd.CategoricalDtype(names))
    mean = np.array(list(means.values()))
    settings = {"measure": measure, "k": k, "mean": mean, "sd": 0.2, "n": 9, "n_nan": 1, "low": mean - 0.1}
    settings |= {"high": mean + 0.1, "chance": 0.0, "ceiling": 0.9} | columns
    provenance = Provenance(model="tiny", parameters={"level": 0.9})
    return Result("agreement.pairwise_agreement", frame.assign(**settings), PAIR_COLUMNS, provenance)


def explanations(scores: dict[tuple[str, int], list[float]], tokens: list[str], **columns: Any) -> Result:
    """{(method, seed): unit scores} of one text as what explain gives."""
    rows = [
        {"method": method, "seed": seed, "unit": unit, "token": tokens[unit], "score": score}
        for (method, seed), vector in scores.items()
        for unit, score in enumerate(vector)
    ]
    filled = {column.name: 0 for column in EXPLANATION_COLUMNS if column.name not in rows[0]}
    frame = pd.DataFrame(rows).assign(**(filled | columns))
    frame["method"] = pd.Categorical(frame["method"], list(dict.fromkeys(frame["method"])))
    about = {"text": "".join(tokens), "label": "<i>", "explained": "yes", "predicted": None, "probability": 0.25}
    return Result(
        "agreement.explain",
        frame,
        EXPLANATION_COLUMNS,
        Provenance(model="tiny", parameters={"target": "log_prob", "baseline": "pad", "random_methods": ["lime"]}),
        {"examples": [{**about, "units": tokens}]},
    )


def all_text(drawn: Any) -> str:
    content = json.loads(drawn.to_json())
    return json.dumps(content["data"], ensure_ascii=False) + json.dumps(
        {key: value for key, value in content["layout"].items() if key != "template"}, ensure_ascii=False
    )


def small(drawn: Any) -> bool:
    """Whether every array of numbers is float32 or of small integers."""
    arrays = [trace[name] for trace in drawn.data for name in ("x", "y", "z", "customdata", "base") if name in trace]
    return all(array.dtype != np.float64 for array in arrays if isinstance(array, np.ndarray))


def named(drawn: Any, name: str) -> Any:
    (trace,) = [trace for trace in drawn.data if trace.name == name]
    return trace


# Pairs


def test_the_map_is_the_matrix_by_side(compared: Comparison) -> None:
    drawn = plots.pairwise_agreement(compared.agreement)
    grid, grey, numbers = drawn.data
    names = ["attention", "rollout", "leave_one_out", "kernel_shap", "random", "none", EVIL]
    assert list(drawn.layout.yaxis.ticktext) == [*names[:-1], SHOWN]
    expected = matrix(compared.agreement, "kendall").loc[names, names].to_numpy()
    np.testing.assert_allclose(grid.z, expected, rtol=1e-6)
    for at, column in enumerate(("mean", "low", "high", "n", "n_nan", "chance", "ceiling")):
        square = matrix(compared.agreement, "kendall", 0, column).loc[names, names].to_numpy(float)
        np.testing.assert_allclose(grid.customdata[..., at], square, rtol=1e-6)
    assert np.array_equal(np.isfinite(grey.z), np.isnan(expected))  # the constant ranking's row and column
    assert np.isfinite(grey.z).sum() == 13
    shown = np.array(numbers.text).reshape(7, 7)
    assert set(shown[5]) == {"–"}
    assert float(shown[0, 1].replace("−", "-")) == pytest.approx(expected[0, 1], abs=0.0051)
    assert "no number" in drawn.layout.title.subtitle.text
    labels = [note.text for note in drawn.layout.annotations]
    assert labels == [f"<b>{side}</b>" for side in ("attention", "attribution", "baseline", "custom") for _ in "xy"]
    assert {float(line.x0) for line in drawn.layout.shapes if line.x0 == line.x1} == {1.5, 3.5, 4.5}
    assert small(drawn)


@pytest.mark.parametrize(("measure", "chance"), [("kendall", 0.0), ("pairwise", 0.5), ("feature", 0.75), ("rank", 0.2)])
def test_white_is_chance_and_the_colours_are_as_strong_on_both_sides(measure: str, chance: float) -> None:
    result = pairs({("lime", "lime"): 1.0, ("lime", "flow"): 0.3, ("flow", "flow"): 1.0}, measure, chance=chance)
    grid = plots.pairwise_agreement(result).data[0]
    (_, blue), (middle, white), (_, orange) = grid.colorscale
    assert grid.zmin + middle * (grid.zmax - grid.zmin) == pytest.approx(chance)
    assert white == "#F7F7F7"
    far = max(chance - grid.zmin, 1 - chance)
    for away, found, full in ((chance - grid.zmin, blue, "#0072B2"), (1 - chance, orange, "#D55E00")):
        for start in (1, 3, 5):
            part = 0xF7 + (int(full[start : start + 2], 16) - 0xF7) * away / far
            assert int(found[start : start + 2], 16) == pytest.approx(part, abs=1)
    assert f"by chance {chance:.2f}" in plots.pairwise_agreement(result).layout.title.subtitle.text


def test_numbers_are_readable_on_their_cells() -> None:
    result = pairs({("lime", "lime"): 1.0, ("lime", "flow"): -0.95, ("flow", "flow"): 0.05})
    numbers = plots.pairwise_agreement(result).data[-1]
    assert numbers.text == ("0.05", "−0.95", "−0.95", "1.00")
    assert numbers.textfont.color == ("#000000", "#FFFFFF", "#FFFFFF", "#FFFFFF")


def test_without_kendall_the_first_measure_is_drawn_and_k_is_chosen() -> None:
    three = pairs({("a", "a"): 1.0, ("a", "b"): 0.3, ("b", "b"): 1.0}, "feature", 3)
    both = pd.concat([three.frame, three.frame.assign(k=5, mean=0.6)], ignore_index=True)
    result = dataclasses.replace(three, frame=both)
    assert "feature agreement of the top 3" in plots.pairwise_agreement(result).layout.title.text
    drawn = plots.pairwise_agreement(result, "feature", 5)
    assert "top 5" in drawn.layout.title.text
    assert (drawn.data[0].z == np.float32(0.6)).all()
    with pytest.raises(InputError, match="measure='rank'; the table holds feature"):
        plots.pairwise_agreement(result, "rank")
    with pytest.raises(InputError, match="k=4; of feature the table holds k = 3, 5"):
        plots.against_chance(result, "feature", 4)
    with pytest.raises(InputError, match=r"expected what interp\.agreement\.pairwise_agreement gives"):
        plots.pairwise_agreement(dataclasses.replace(result, kind="agreement.clusters"))


def test_pairs_are_sorted_with_interval_chance_and_ceiling() -> None:
    means = {("flow", "flow"): 1.0, ("flow", "lime"): 0.2, ("flow", "rollout"): 0.6, ("lime", "shapley"): 0.4}
    means |= {("lime", "random"): -0.1, ("flow", EVIL): 0.1, ("rollout", "random"): nan}
    drawn = plots.against_chance(pairs(means, chance=0.05, ceiling=0.8))
    labels = ["flow – rollout", "lime – shapley", "flow – lime", f"flow – {SHOWN}", "lime – random"]
    assert list(drawn.layout.yaxis.ticktext) == labels
    expected = {
        "attention – attention": (0, 0.6),
        "attribution – attribution": (1, 0.4),
        "attention – attribution": (2, 0.2),
        "with a custom ranking": (3, 0.1),
        "with a baseline": (4, -0.1),
    }
    for kind, (place, mean) in expected.items():
        trace = named(drawn, kind)
        assert trace.y.tolist() == [place]
        assert trace.x[0] == pytest.approx(mean)
        assert (trace.error_x.array[0], trace.error_x.arrayminus[0]) == pytest.approx((0.1, 0.1))
    assert len({(trace.marker.symbol, trace.marker.color) for trace in drawn.data[2:]}) == 5
    assert named(drawn, "by chance").x.tolist() == pytest.approx([0.05] * 5)
    assert named(drawn, "ceiling by noise").x.tolist() == pytest.approx([0.8] * 5)
    assert "1 pair has no number" in drawn.layout.title.subtitle.text
    assert "90 % interval" in drawn.layout.title.subtitle.text
    assert small(drawn)


def test_of_many_pairs_the_ends_are_shown_and_the_title_says_so() -> None:
    names = [f"attention:{at}" for at in range(12)]
    means = {(a, b): -((i * 12 + j) % 67) / 100 for i, a in enumerate(names) for j, b in enumerate(names) if i < j}
    drawn = plots.against_chance(pairs(means))
    (trace,) = [one for one in drawn.data if one.name == "attention – attention"]
    ordered = sorted(means.values(), reverse=True)
    np.testing.assert_allclose(trace.x, ordered[:20] + ordered[-20:], rtol=1e-6)
    assert trace.y.tolist() == [*range(20), *range(21, 41)]
    assert "20 highest and 20 lowest of 66" in drawn.layout.title.text
    assert drawn.layout.yaxis.ticktext[20] == "… 26 between"
    with pytest.raises(InputError, match="pairs=1"):
        plots.against_chance(pairs(means), pairs=1)
    with pytest.raises(InputError, match="no two methods have a mean kendall"):
        plots.against_chance(pairs({("a", "a"): 1.0, ("a", "b"): nan, ("b", "b"): 1.0}))


# Clusters


def test_the_tree_has_the_merges_heights_and_colours() -> None:
    means = {("flow", "flow"): 1.0, ("flow", "lime"): 0.1, ("flow", EVIL): 0.8, ("lime", "lime"): 1.0}
    means |= {("lime", EVIL): 0.3, (EVIL, EVIL): 1.0}
    result = clusters(pairs(means), threshold=0.5)
    drawn = plots.clusters(result)
    assert list(drawn.layout.yaxis.ticktext) == ["flow", SHOWN, "lime"]
    pair, above, merges = drawn.data
    np.testing.assert_allclose(pair.x, [0, 0.2, 0.2, 0, nan], rtol=1e-6)
    np.testing.assert_allclose(pair.y, [0, 0, 1, 1, nan])
    np.testing.assert_allclose(above.x, [0.2, 0.8, 0.8, 0, nan], rtol=1e-6)
    np.testing.assert_allclose(above.y, [0.5, 0.5, 2, 2, nan])
    assert (pair.name, above.name) == ("cluster 1: 2 methods", "merged above the threshold")
    np.testing.assert_allclose(merges.customdata, [0.8, 0.2], rtol=1e-6)
    assert merges.text[0] == f"flow<br>{SHOWN}"
    assert [line.x0 for line in drawn.layout.shapes] == [0.5]
    assert "1 − mean agreement" in drawn.layout.xaxis.title.text
    assert small(drawn)


def test_a_tree_says_what_is_left_out_and_stands_any_threshold() -> None:
    means = {("a", "a"): 1.0, ("a", "b"): 0.4, ("b", "b"): 1.0, ("a", "c"): nan, ("b", "c"): nan, ("c", "c"): nan}
    for threshold, lines in ((-2.0, ["cluster 1: 2 methods"]), (1.5, ["merged above the threshold"])):
        drawn = plots.clusters(clusters(pairs(means), threshold=threshold))
        assert [trace.name for trace in drawn.data[:-1]] == lines
        assert "left out, they lack numbers: c" in drawn.layout.title.subtitle.text
        low, high = drawn.layout.xaxis.range
        assert low <= min(0, 1 - threshold) <= max(0.6, 1 - threshold) <= high
    with pytest.raises(InputError, match=r"expected what interp\.agreement\.clusters gives"):
        plots.clusters(pairs(means))


def test_every_cluster_of_several_methods_has_its_own_line() -> None:
    names = [f"m{at:02d}" for at in range(20)]
    rows = [(at, 2 * at, 2 * at + 1, 0.1, 2, f"{names[2 * at]}, {names[2 * at + 1]}") for at in range(10)]
    rows += [(10 + at, 19 + at + (at == 0), 21 + at, 0.9, 4, "all") for at in range(1)]
    frame = pd.DataFrame(rows, columns=[column.name for column in CLUSTER_COLUMNS])
    made = {"measure": "kendall", "threshold": 0.5, "linkage": "average"}
    attachments = {"methods": names, "clusters": [at // 2 + 1 for at in range(20)]}
    drawn = plots.clusters(
        Result("agreement.clusters", frame, CLUSTER_COLUMNS, Provenance(parameters=made), attachments)
    )
    looks = [(trace.line.color, trace.line.dash) for trace in drawn.data[:10]]
    assert len(set(looks)) == 10


# Faithfulness


def panels(drawn: Any) -> list[str]:
    return [note.text for note in drawn.layout.annotations]


def test_every_panel_has_the_means_in_order_of_merit(compared: Comparison) -> None:
    drawn = plots.faithfulness(compared.faithfulness)
    means = faithfulness_means(compared.faithfulness)
    means = means[means["fraction"].isna()]
    titles = ["Comprehensiveness: higher is better", "Sufficiency: lower is better"]
    assert panels(drawn)[:2] == titles
    assert len(panels(drawn)) == 3
    for at, (measure, best) in enumerate((("comprehensiveness", max), ("sufficiency", min), ("leave_one_out", max))):
        name = "" if at == 0 else str(at + 1)
        rows = means[(means["measure"] == measure) & means["mean"].notna()].set_index("method")
        order = [label.removesuffix(": no number") for label in drawn.layout[f"yaxis{name}"].ticktext]
        assert order[0] == {EVIL: SHOWN}.get(rows["mean"].idxmax() if best is max else rows["mean"].idxmin(), order[0])
        assert drawn.layout[f"yaxis{name}"].ticktext[-1] == "none: no number"
        found = {}
        for trace in drawn.data:
            if trace.yaxis == f"y{name}":
                for x, y, plus, (low, high, n, n_nan) in zip(
                    trace.x, trace.y, trace.error_x.array, trace.customdata, strict=True
                ):
                    found[order[int(y)]] = x
                    row = rows.loc[order[int(y)] if order[int(y)] != SHOWN else EVIL]
                    assert (x, x + plus, low, high) == pytest.approx(
                        (row["mean"], row["high"], row["low"], row["high"])
                    )
                    assert (n, n_nan) == (row["n"], row["n_nan"])
        assert len(found) == len(rows) == 6
        values = [found[method] for method in order if method in found]
        assert values == sorted(values, reverse=best is max)
    bands = [shape for shape in drawn.layout.shapes if shape.type == "rect"]
    random = means[(means["method"] == "random") & (means["measure"] == "sufficiency")].iloc[0]
    assert (bands[1].x0, bands[1].x1) == pytest.approx((random["low"], random["high"]))
    assert "[nats]" in drawn.layout.xaxis.title.text
    assert small(drawn)


def faithful(values: dict[tuple[str, str, float], list[float]], **parameters: Any) -> Result:
    """{(method, measure, fraction): one value per example} as what faithfulness gives."""
    rows = [(at, *key[:1], 0, *key[1:], value) for key, some in values.items() for at, value in enumerate(some)]
    frame = pd.DataFrame(rows, columns=[column.name for column in FAITHFULNESS_COLUMNS])
    frame["method"] = pd.Categorical(frame["method"], list(dict.fromkeys(frame["method"])))
    return Result("agreement.faithfulness", frame, FAITHFULNESS_COLUMNS, Provenance(parameters=parameters))


def test_normalised_panels_and_the_target_s_unit() -> None:
    values = {
        (method, measure, nan): [0.1 + at, 0.3 + at]
        for measure in ("comprehensiveness", "normalised_sufficiency")
        for at, method in enumerate(("lime", "flow"))
    }
    drawn = plots.faithfulness(faithful(values, target="probability", n_normalised=2))
    assert panels(drawn) == ["Comprehensiveness: higher is better", "Normalised sufficiency: lower is better"]
    assert list(drawn.layout.yaxis.ticktext) == ["flow", "lime"]
    assert list(drawn.layout.yaxis2.ticktext) == ["lime", "flow"]
    assert "[probability]" in drawn.layout.xaxis.title.text
    assert "first 2 examples" in drawn.layout.title.subtitle.text
    assert plots.faithfulness(faithful(values), "lime").layout.yaxis.ticktext == ("lime",)


def test_nothing_with_a_number_is_a_picture_that_says_so() -> None:
    result = faithful({("mine", measure, nan): [nan, nan] for measure in ("comprehensiveness", "sufficiency")})
    assert plots.faithfulness(result).layout.yaxis.ticktext == ("mine: no number",)
    with pytest.raises(InputError, match="no method has a removal curve"):
        plots.removal_curves(result)
    with pytest.raises(InputError, match="no method 'lime' in this result; it has mine"):
        plots.faithfulness(result, ["lime"])
    with pytest.raises(InputError, match=r"expected what interp\.agreement\.faithfulness gives"):
        plots.removal_curves(pairs({("a", "b"): 1.0}))


def test_removal_curves_are_the_means_with_ribbons(compared: Comparison) -> None:
    drawn = plots.removal_curves(compared.faithfulness)
    means = faithfulness_means(compared.faithfulness)
    assert panels(drawn) == ["Comprehensiveness: higher is better", "Sufficiency: lower is better"]
    for axis, measure in (("x", "comprehensiveness"), ("x2", "sufficiency")):
        lines = {trace.name: trace for trace in drawn.data if trace.mode == "lines+markers" and trace.xaxis == axis}
        assert list(lines) == ["attention", "rollout", "leave_one_out", "kernel_shap", "random", SHOWN]
        for name, line in lines.items():
            rows = means[(means["method"] == (EVIL if name == SHOWN else name)) & (means["measure"] == measure)]
            rows = rows[rows["fraction"].notna()]
            np.testing.assert_allclose(line.x, rows["fraction"], rtol=1e-6)
            np.testing.assert_allclose(line.y, rows["mean"], rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(line.customdata, rows[["low", "high"]], rtol=1e-5, atol=1e-7)
            assert line.legendgroup == name
            assert line.showlegend is (axis == "x")
    assert "no ranking: none" in drawn.layout.title.subtitle.text
    assert len({trace.xaxis for trace in drawn.data if trace.legendgroup == "rollout"}) == 2
    assert small(drawn)


def test_many_curves_differ_in_colour_or_dash() -> None:
    values = {(f"m{at}", "comprehensiveness", q): [0.1, 0.2] for at in range(30) for q in (0.5, 1.0)}
    lines = [trace for trace in plots.removal_curves(faithful(values)).data if trace.mode == "lines+markers"]
    assert len({(line.line.color, line.line.dash) for line in lines}) == len(lines) == 30


# Explanations


def test_boxes_are_shares_of_the_methods_largest_score() -> None:
    tokens = [" <b>", "$x$", "\n", " z"]
    scores = {("flow", 0): [0.1, 0.2, 0.4, 0.0], ("lime", 0): [1.0, -2.0, nan, 0.5], ("lime", 1): [3.0, 3.0, 3.0, 3.0]}
    drawn = plots.explain(explanations(scores, tokens, completeness_error=0.031))
    flow, lime, failed = drawn.data
    np.testing.assert_allclose(flow.marker.color, [0.25, 0.5, 1, 0])
    np.testing.assert_allclose(lime.marker.color, [0.5, -1, 0.25])
    np.testing.assert_allclose(lime.customdata, [1, -2, 0.5])
    assert flow.text == ("␣&lt;b&gt;", "&#36;x&#36;", "↵", "␣z")
    assert lime.insidetextfont.color == ("#000000", "#FFFFFF", "#000000")
    assert failed.text == ("↵",)
    assert failed.marker.pattern.shape == "/"
    assert "failed" in failed.hovertemplate
    assert (drawn.layout.coloraxis.cmin, drawn.layout.coloraxis.cmax) == (-1, 1)
    assert drawn.layout.coloraxis.colorscale[1][0] == 0.5
    assert list(drawn.layout.yaxis.ticktext) == [
        "<b>flow</b><br>attention, largest 0.4",
        "<b>lime</b>, error 0.031<br>attribution, largest 2",
    ]
    title = drawn.layout.title.text + drawn.layout.title.subtitle.text
    for part in (
        "Why “yes”",
        "&lt;b&gt;&#36;x&#36;↵",
        "probability 25.0 %",
        "gold: “&lt;i&gt;”",
        "predicted: –",
        "nats",
    ):
        assert part in title
    assert small(drawn)
    assert plots.explain(explanations(scores, tokens), methods="lime", seed=1).data[0].marker.color.tolist() == [1] * 4


def test_long_texts_are_wrapped_and_too_long_ones_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [f" word{at}" for at in range(30)]
    result = explanations({("flow", 0): [1.0] * 30, ("lime", 0): [1.0] * 30}, tokens)
    drawn = plots.explain(result, width=40)
    flow, lime = drawn.data
    assert flow.y.max() > flow.y.min()
    assert lime.y.min() > flow.y.max()
    assert (flow.base + flow.x <= 40).all()
    assert drawn.layout.height > plots.explain(result, width=100).layout.height
    monkeypatch.setattr("interp.flow.flow_text_plots._BOXES", 59)
    with pytest.raises(InputError, match="60 tokens to draw, and a figure carries at most 59"):
        plots.explain(result)
    assert plots.explain(result, methods=["flow"]).data


def test_what_is_not_there_is_refused() -> None:
    result = explanations({("flow", 0): [1.0, 2.0], ("lime", 3): [1.0, 2.0]}, ["a", "b"])
    assert len(plots.explain(result).data) == 2  # the first seed of each
    for settings, message in (
        ({"example": 1}, "example=1; the result has 1 examples: expected 0 … 0"),
        ({"methods": ["rollout"]}, "no method 'rollout' in this result; it has flow, lime"),
        ({"methods": []}, "no method ''"),
        ({"seed": 0}, "seed=0; lime was run with 3"),
        ({"width": 0}, "width=0"),
    ):
        with pytest.raises(InputError, match=message):
            plots.explain(result, **settings)
    for draw in (plots.explain, plots.completeness, plots.costs):
        with pytest.raises(InputError, match=r"expected what interp\.agreement\.explain gives"):
            draw(pairs({("a", "b"): 1.0}))
    with pytest.raises(InputError, match="no attribution among the methods"):
        plots.completeness(explanations({("flow", 0): [1.0, 2.0]}, ["a", "b"]))


def test_completeness_shows_every_error_and_the_share_without() -> None:
    result = explanations({("flow", 0): [1.0], ("lime", 0): [1.0], ("lime", 1): [1.0], ("shapley", 0): [1.0]}, ["a"])
    frame = result.frame.assign(completeness_error=[nan, 0.3, nan, 0.0])
    drawn = plots.completeness(dataclasses.replace(result, frame=frame))
    lime, shapley = drawn.data
    assert lime.x.tolist() == pytest.approx([0.3])
    assert shapley.x.tolist() == pytest.approx([1e-8])  # exact, drawn at the end of a logarithmic axis
    assert shapley.customdata.tolist() == [0]
    assert list(drawn.layout.yaxis.ticktext) == ["lime<br>n = 2, 50 % NaN", "shapley<br>n = 1, 0 % NaN"]
    assert drawn.layout.xaxis.type == "log"
    assert [line.x0 for line in drawn.layout.shapes] == [0.1]
    assert drawn.layout.annotations[0].x == pytest.approx(-1)
    assert small(drawn)


def test_costs_are_the_table_s(compared: Comparison) -> None:
    drawn = plots.costs(compared.explanations)
    table = costs(compared.explanations).set_index("method").sort_values("seconds", ascending=False, kind="stable")
    assert list(drawn.layout.yaxis.ticktext) == [SHOWN if name == EVIL else name for name in table.index]
    for axis, measure in (("x", "model_calls"), ("x2", "seconds")):
        found = {}
        for trace in drawn.data:
            if trace.xaxis == axis:
                found |= {table.index[int(y)]: x for y, x in zip(trace.y, trace.x, strict=True)}
        assert found == pytest.approx(table[measure].where(table[measure] > 0).to_dict(), nan_ok=True)
    assert (drawn.layout.xaxis.type, drawn.layout.xaxis2.type) == ("log", "log")
    assert small(drawn)


# All of them


def test_results_find_their_pictures_and_a_report_holds_all(compared: Comparison, tmp_path: Path) -> None:
    tree = clusters(compared.agreement)
    assert {result.kind: find_plot(result.kind) for result in (*compared, tree)} == {
        "agreement.explain": plots.explain,
        "agreement.pairwise_agreement": plots.pairwise_agreement,
        "agreement.faithfulness": plots.faithfulness,
        "agreement.clusters": plots.clusters,
    }
    others = [
        plots.against_chance(compared.agreement),
        plots.removal_curves(compared.faithfulness),
        plots.explain(compared.explanations, example=2),
        plots.completeness(compared.explanations),
        plots.costs(compared.explanations),
    ]
    page = write_report([*compared, tree, *others], tmp_path / "report.html").read_text(encoding="utf-8")
    assert EVIL not in page.replace("\\u003c", "<").replace("\\u003e", ">")
    for drawn in [*others, *(result.plot() for result in (*compared, tree))]:
        assert drawn.layout.title.text
        assert drawn.layout.height >= 300
        assert "<script>" not in all_text(drawn)
        assert EVIL not in all_text(drawn)
        assert len(drawn.to_json()) < 100_000
