"""The search finds a planted neuron, and reports it on prompts that it was not chosen on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from interp.errors import InputError
from interp.neurons import decode, neuron_statistics, search_clamp
from interp.neurons.clamp_search import _choose, _Setting
from interp.results import load_result

SEARCH = [" the dog is in the water", " a cat", " tea"]
REPORT = [" the king of the sea is old !", " a red dog"]
LAYER, NEURON = 2, 7
ARGUMENTS: dict[str, Any] = {"unrelated": " water", "max_new_tokens": 4, "n_random": 2, "progress": False}


@pytest.fixture(scope="module")
def planted(tiny: Any) -> Any:
    """A model whose neuron (2, 7) writes " music", and in which several other neurons decode to it a little."""
    model = tiny()
    (token,) = model.tokenizer(" music", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.arch.head_weight().mul_(8)
        model.arch.down_weight(LAYER)[NEURON] = model.arch.head_weight()[token]
    return model


@pytest.fixture(scope="module")
def found(planted: Any) -> Any:
    # In this tiny model most continuations are improbable, so fluency is left out here.
    return search_clamp(
        planted, " music", SEARCH, REPORT, doses=[-50, -10, 10, 50], max_perplexity_ratio=1e9, **ARGUMENTS
    )


def test_finds_the_planted_neuron(found: Any) -> None:
    report = found.frame.query("stage == 'report'")
    best = report[report["chosen"]]
    assert len(best) == 1
    best = best.iloc[0]
    assert (best["site"], best["layer"], best["neuron"], best["arm"]) == ("hidden", LAYER, NEURON, "clamp")
    assert best["dose"] > 0
    assert best["mention_rate"] == 1
    assert best["p_concept"] > 0.9
    controls = report[~report["chosen"]]
    assert controls["arm"].value_counts().to_dict() == {"none": 1, "zero": 1, "random": 2, "clamp": 0}
    assert (controls["mention_rate"] < 1).all()
    assert (controls["p_concept"] < 0.9).all()
    assert (controls.query("arm == 'random'")["layer"] == LAYER).all()
    assert (controls.query("arm == 'random'")["dose"] == best["dose"]).all()


def test_stages(found: Any, tmp_path: Any) -> None:
    frame = found.frame
    screened, searched = (frame.query(f"stage == '{stage}' and arm == 'clamp'") for stage in ("screen", "search"))
    assert set(screened["site"]) == {"up", "gate", "hidden"}
    assert screened.groupby(["site", "layer", "neuron"], observed=True).size().eq(4).all()
    assert screened["mention_rate"].isna().all()
    assert screened["fluent"].isna().all()
    assert len(searched) == 4 * 2  # finalists × doses of one sign
    assert searched.groupby(["site", "layer", "neuron"], observed=True)["dose"].apply(lambda d: len(d) >= 2).all()
    # The chosen one is the best of the search, and the finalists are the best of the screen.
    chosen = searched[searched["chosen"]].iloc[0]
    assert chosen["mention_rate"] == searched["mention_rate"].max()
    top = screened.sort_values("p_concept").iloc[-1]
    assert ((searched["site"] == top["site"]) & (searched["neuron"] == top["neuron"])).any()
    assert set(frame.query("stage == 'report'")["n"]) == {len(REPORT)}
    assert {answer["prompt"] for answer in found.attachments["answers"]} == set(REPORT)
    assert load_result(found.save(tmp_path / "s.parquet")).equals(found)


def test_values_are_doses_of_the_own_sd(found: Any, planted: Any) -> None:
    moments = neuron_statistics(planted, SEARCH, ["up", "gate", "hidden"], progress=False).frame
    moments = moments.set_index(["site", "layer", "neuron"])
    for row in found.frame.query("arm in ['clamp', 'random']").itertuples():
        mean, sd = moments.loc[(row.site, row.layer, row.neuron), ["mean", "sd"]]
        assert row.value == pytest.approx(mean + row.dose * sd, rel=1e-5)


def test_given_atlases_and_statistics_change_nothing(found: Any, planted: Any) -> None:
    again = search_clamp(
        planted,
        " music",
        SEARCH,
        REPORT,
        doses=[-50, -10, 10, 50],
        max_perplexity_ratio=1e9,
        atlases={site: decode(planted, site=site, progress=False) for site in ("up", "gate", "down")},
        statistics=neuron_statistics(planted, SEARCH, ["up", "gate", "hidden"], progress=False),
        **ARGUMENTS,
    )
    np.testing.assert_allclose(again.frame["p_concept"], found.frame["p_concept"], rtol=1e-4, atol=1e-9)
    assert again.attachments["answers"][-1]["text"] == found.attachments["answers"][-1]["text"]


def _row(mention_rate: float, p_concept: float, dose: int, fluent: bool) -> dict[str, Any]:
    setting = _Setting("clamp", "hidden", 1, 2, dose=float(dose))
    return {"setting": setting, "mention_rate": mention_rate, "p_concept": p_concept, "fluent": fluent}


def test_choice_is_by_mentions_then_probability_then_size_among_the_fluent() -> None:
    rows = [
        {"setting": _Setting("none"), "mention_rate": 1.0, "p_concept": 1.0, "fluent": True},
        _row(1.0, 0.9, 5, False),
        _row(0.5, 0.9, 10, True),
        _row(0.8, 0.1, 20, True),
        _row(0.8, 0.2, 40, True),
        _row(0.8, 0.2, -30, True),
    ]
    assert _choose(rows) is rows[5]
    assert _choose(rows[:2]) is None


def test_nothing_is_chosen_where_nothing_is_fluent(planted: Any) -> None:
    result = search_clamp(
        planted, " music", SEARCH, REPORT, sites=["hidden"], doses=[50], max_perplexity_ratio=1e-9, **ARGUMENTS
    )
    assert not result.frame["chosen"].any()
    assert result.frame.query("stage == 'report'")["arm"].tolist() == ["none"]
    assert result.provenance.parameters["found"] is False
    assert not result.frame.query("stage == 'search'")["fluent"].any()


def test_a_family_without_gate(tiny: Any) -> None:
    result = search_clamp(tiny("gpt2"), " music", SEARCH[:1], REPORT[:1], doses=[-20, 20], **ARGUMENTS)
    assert set(result.frame.query("arm == 'clamp'")["site"]) <= {"up", "hidden"}
    assert result.provenance.parameters["sites"] == ["up", "hidden"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report_prompts": [*REPORT, " A CAT "]}, "1 prompts are in both sets, for example 'a cat'"),
        ({"search_prompts": []}, "0 search and 2 report prompts"),
        ({"report_prompts": []}, "3 search and 0 report"),
        ({"sites": ["down"]}, "sites"),
        ({"sites": []}, "sites"),
        ({"doses": [0.0, 1.0]}, "none 0"),
        ({"doses": []}, "doses"),
        ({"doses": [math.inf]}, "finite"),
        ({"n_candidates": 0}, "n_candidates=0"),
        ({"n_random": 0}, "n_random=0"),
        ({"max_perplexity_ratio": 0.0}, "max_perplexity_ratio"),
        ({"concept": " two words"}, "not a single token"),
        ({"search_prompts": [""]}, "empty"),
    ],
)
def test_bad_input(planted: Any, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"concept": " music", "search_prompts": SEARCH, "report_prompts": REPORT, **ARGUMENTS}
    with pytest.raises(InputError, match=message):
        search_clamp(planted, **{**arguments, **changes})


def test_plot(found: Any) -> None:
    from interp.neurons.clamping_plots import clamp_search

    figure = clamp_search(found)
    right = [trace for trace in figure.data if trace.xaxis == "x2"]
    assert len(right) == 1
    assert "chosen clamp" in right[0].x
    assert max(max(trace.marker.size) for trace in figure.data if trace.name and trace.name.startswith("site")) == 16
