"""A conflict circuit planted by hand is found in its layer and head by drift and by patching; patching sees through a decoy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from planted_conflict import VOCAB, Planted, planted_model, planted_pairs

from interp.conflict import verifiers
from interp.conflict.focal import focal_heads, focal_layers, head_scores, layer_scores
from interp.conflict.head_ablation import ablate_heads, ablation_summary
from interp.conflict.localization import localize
from interp.conflict.pairs import encode_pair
from interp.conflict.patching import patch
from interp.conflict.recoveries import agreement_with_drift, recovery, restoring_layers, thirds

PLACES = [(0, 0), (0, 3), (1, 2), (2, 1), (2, 3)]


@pytest.fixture(autouse=True)
def family_of_planted_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verifiers._FAMILIES, "planted", Planted())


@torch.no_grad()
def says(model: Any, pair: Any, prompt: str) -> str:
    ids = encode_pair(model, pair, (prompt,))[prompt].ids
    return VOCAB[int(model.hf(torch.tensor([ids])).logits[0, -1].argmax())].lower()


@pytest.mark.parametrize("place", PLACES)
def test_the_planted_model_obeys_whom_it_should(place: tuple[int, int]) -> None:
    model = planted_model(*place)
    for pair in planted_pairs(3):
        assert (
            says(model, pair, "agree")
            == says(model, pair, "paraphrase")
            == says(model, pair, "system")
            == pair.system_rule
        )
        assert says(model, pair, "conflict") == pair.user_rule


@pytest.mark.parametrize("place", PLACES)
def test_drift_and_patching_rank_the_planted_head_first(place: tuple[int, int]) -> None:
    model, pairs = planted_model(*place), planted_pairs(5)
    drift = localize(model, pairs, progress=False)
    patched = patch(model, pairs, site=("attn_out", "head", "resid_post"), progress=False)

    assert focal_heads(drift)[0] == place
    assert focal_layers(drift) == restoring_layers(patched, 1) == [place[0]]
    scores = head_scores(drift).set_index(["layer", "head"])["excess"]
    assert scores[place] > 100 * scores.drop(index=place).abs().max()

    table = recovery(patched)
    heads = table[table["site"] == "head"].set_index(["layer", "head"])["recovery"]
    assert heads.idxmax() == place
    assert heads[place] == pytest.approx(1, abs=0.01)
    assert heads.drop(index=place).abs().max() < 0.01
    layers = table[table["site"] == "attn_out"].set_index("layer")["recovery"]
    assert layers.idxmax() == place[0]
    assert layers[place[0]] == pytest.approx(1, abs=0.01)
    assert layers.drop(index=place[0]).abs().max() < 0.01
    # The residual stream carries the decision from that layer on, and before it nothing.
    stream = table[table["site"] == "resid_post"].set_index("layer")["recovery"]
    np.testing.assert_allclose(stream, (stream.index >= place[0]).astype(float), atol=0.01)

    for scored in (layer_scores(drift), head_scores(drift)):
        shared = agreement_with_drift(patched, scored, top=1).set_index("what").loc["shared top"]
        assert shared["value"] == 1
        assert shared["p"] == pytest.approx(1 / len(scored))


def test_a_decoy_drifts_and_patching_is_not_fooled() -> None:
    model, pairs = planted_model(2, 1, decoy=(0, 3)), planted_pairs(5)
    assert set(focal_heads(localize(model, pairs, progress=False), share=2 / 12)) == {(2, 1), (0, 3)}
    heads = recovery(patch(model, pairs, site="head", progress=False)).set_index(["layer", "head"])["recovery"]
    assert heads[2, 1] == pytest.approx(1, abs=0.01)
    assert abs(heads[0, 3]) < 1e-6
    ablated = ablate_heads(model, pairs, [(2, 1)], n_random_sets=11, progress=False)
    row = ablation_summary(ablated).set_index("what").loc["focal"]
    assert row["p_sets"] == pytest.approx(1 / 12)
    decoyed = ablation_summary(ablate_heads(model, pairs, [(0, 3)], n_random_sets=11, progress=False)).set_index("what")
    assert abs(decoyed.loc["focal", "mean"]) < 1e-6
    assert decoyed.loc["focal", "p_sets"] == 1


def test_ablated_the_planted_head_obeys_nobody() -> None:
    model, pairs = planted_model(1, 2), planted_pairs(4)
    for mode in ("zero", "mean"):
        for positions in ("suffix", "all"):
            result = ablate_heads(
                model, pairs, [(1, 2)], mode=mode, positions=positions, n_random_sets=3, progress=False
            )
            assert result.frame["logdiff_conflict"].max() < -3
            focal = result.frame[result.frame["arm"] == "focal"]
            assert focal["logdiff_ablated"].abs().max() < 0.5
            others = result.frame[result.frame["arm"] == "random"]
            np.testing.assert_allclose(others["logdiff_ablated"], others["logdiff_conflict"], atol=0.05)


def test_the_patch_of_another_task_decides_as_well() -> None:
    # What the planted head writes does not depend on the task: a control that must not differ here.
    model, pairs = planted_model(1, 0), planted_pairs(3)
    other = recovery(patch(model, pairs, site="head", heads=[(1, 0)], donor="other", progress=False))
    assert other["recovery"].item() == pytest.approx(1, abs=0.01)


def test_the_middle_layers_claim_is_told_apart() -> None:
    pairs = planted_pairs(6)
    for layer, expected in ((1, True), (2, False)):
        table = thirds(patch(planted_model(layer, 0), pairs, progress=False)).set_index("what")
        assert (table.loc["middle − others", "low"] > 0) == expected
        assert (table.loc["middle − others", "high"] < 0) != expected
        assert table.loc["middle − others", "p"] == pytest.approx(2 / 2**6)
