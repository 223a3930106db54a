"""Pictures of scans hold the rows' own numbers, and text from users stays text."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from interp.errors import InputError
from interp.sinks import Scan, classify, compare, plots, scan

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def scanned(tiny: Any) -> Scan:
    random = torch.Generator().manual_seed(0)
    texts = {
        name: [torch.randint(low, low + 30, (12,), generator=random).tolist() for _ in range(5)]
        for name, low in (("a", 4), (EVIL, 30))
    }
    return scan(tiny(), texts, peak=1.2, progress=False)


def test_maps_show_means_by_layer_and_head(scanned: Scan) -> None:
    drawn = plots.scan(scanned, "mass_first")
    assert len(drawn.data) == 2
    for trace, name in zip(drawn.data, scanned.domains, strict=True):
        rows = scanned.frame[(scanned.frame["domain"] == name) & (scanned.frame["head"] >= 0)]
        expected = rows.groupby(["layer", "head"])["mass_first"].mean().unstack().to_numpy()
        assert np.allclose(trace.z, expected, atol=1e-6)
    assert drawn.layout.coloraxis.cmin == 0
    assert drawn.layout.coloraxis.cmax == 1
    one = plots.scan(scanned, "delta_logit", ["a"])
    assert len(one.data) == 1


def test_scatter_shows_both_domains_with_intervals(scanned: Scan) -> None:
    differences = compare(scanned, n_permutations=99)
    drawn = plots.domain_scatter(scanned, comparison=differences)
    heads = scanned.heads(["mass_first"]).set_index(["domain", "layer", "head"])
    x = np.concatenate([trace.x for trace in drawn.data[:2]])
    assert np.allclose(sorted(x), sorted(heads.loc["a", "mean"]), atol=1e-6)
    survive = int((differences.frame["q"] <= 0.05).sum())
    assert len(drawn.data[0].x) == survive
    low = np.concatenate([trace.x - trace.error_x.arrayminus for trace in drawn.data[:2]])
    assert np.allclose(sorted(low), sorted(heads.loc["a", "low"]), atol=1e-5)


def test_names_are_drawn_once_per_head(scanned: Scan) -> None:
    drawn = plots.classify(classify(scanned))
    assert sum(len(trace.x) for trace in drawn.data) == 12
    assert len({trace.marker.symbol for trace in drawn.data}) == 4


def test_norms_and_curves(scanned: Scan) -> None:
    drawn = plots.norms(scanned, ["a"])
    lines = [trace for trace in drawn.data if trace.mode == "lines+markers"]
    expected = scanned.layers(["resid_first"]).query("domain == 'a'")["mean"]
    assert np.allclose(lines[0].y, expected, rtol=1e-5)
    boxes = plots.value_norms(scanned).data
    assert [len(box.y) for box in boxes] == [12, 12]
    curve = plots.epsilon_curve(scanned).data[0]
    rows = scanned.frame.query("domain == 'a' and head >= 0")
    assert curve.y[0] == pytest.approx((rows["mass_first"] > 0.05).mean(), abs=1e-6)
    assert all(np.diff(curve.y) <= 1e-9)


def test_differences_are_the_largest(scanned: Scan) -> None:
    differences = compare(scanned, n_permutations=99)
    drawn = plots.compare(differences, top=5)
    shown = sorted(abs(value) for trace in drawn.data for value in trace.x)
    assert np.allclose(shown, sorted(differences.frame["difference"].abs().nlargest(5)), atol=1e-6)


def test_a_domains_name_never_becomes_markup(scanned: Scan) -> None:
    differences = compare(scanned, n_permutations=99)
    named = classify(scanned, comparison=compare(scanned))
    for drawn in (
        plots.scan(scanned),
        plots.domain_scatter(scanned, comparison=differences),
        plots.compare(differences),
        plots.classify(named),
        plots.norms(scanned),
        plots.value_norms(scanned),
        plots.epsilon_curve(scanned),
    ):
        text = json.dumps(json.loads(drawn.to_json())["data"]) + json.dumps(json.loads(drawn.to_json())["layout"])
        assert "<img" not in text


def test_results_find_their_plots(scanned: Scan) -> None:
    assert scanned.plot().data
    assert compare(scanned, n_permutations=99).plot().data


def test_unknown_domains_and_single_ones(scanned: Scan) -> None:
    with pytest.raises(InputError, match="no domain 'c'"):
        plots.scan(scanned, domains=["c"])
    with pytest.raises(InputError, match="at least two"):
        plots.domain_scatter(scanned.only(["a"]))
