"""Questions to an atlas, against answers worked out by hand on planted rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import VOCAB, tiny_hf, tiny_tokenizer

from interp.errors import InputError, ResultError
from interp.model import load_model
from interp.neurons.atlas import ATLAS_COLUMNS, Atlas, _stems, atlas_frame, wilson
from interp.neurons.comparison import compare
from interp.neurons.decoding import LayerPart, decode
from interp.provenance import Provenance
from interp.results import load_result


def handmade(tops: dict[tuple[int, int], list[str]], probabilities: list[float] | None = None) -> Atlas:
    """An atlas of one sign whose neurons have the given tokens."""
    p = probabilities or [0.5, 0.2, 0.1, 0.05, 0.01]
    parts = []
    for layer in sorted({layer for layer, _ in tops}):
        ids = np.array([[[VOCAB.index(t) for t in tokens]] for (at, _), tokens in sorted(tops.items()) if at == layer])
        n = len(ids)
        parts.append(
            LayerPart(
                layer,
                np.arange(n),
                (1,),
                ids,
                np.tile(np.array(p, dtype=np.float32), (n, 1, 1)),
                np.zeros((n, 1), np.float32),
                np.ones((n, 1), np.float32),
                np.zeros(n, np.float32),
            )
        )
    parameters = {"site": "up", "norm": "final", "top_k": 5, "signs": [1], "layers": sorted({la for la, _ in tops})}
    parameters |= {"n_layers": 2, "d_mlp": 2, "vocab_size": len(VOCAB)}
    tokens = [token.replace("▁", " ") for token in VOCAB]
    tokenizer = {"tokenizer": tiny_tokenizer().backend_tokenizer.to_str()}
    return Atlas(
        "neurons.atlas", atlas_frame(parts, tokens), ATLAS_COLUMNS, Provenance(parameters=parameters), tokenizer
    )


DOGS = ["▁dog", "dog", "▁Dog", "▁dogs", "▁water"]


@pytest.fixture
def atlas() -> Atlas:
    return handmade(
        {
            (0, 0): DOGS,
            (0, 1): ["▁water", "▁dog", "▁of", "▁in", "▁is"],
            (1, 0): ["▁is", "▁in", "▁of", "▁a", "?"],
            (1, 1): ["?", ".", "!", "▁a", "▁in"],
        }
    )


def test_find_sums_spellings_and_ranks(atlas: Atlas) -> None:
    found = atlas.find(" dog")
    assert found[["layer", "neuron", "sign", "rank"]].values.tolist() == [[0, 0, 1, 1], [0, 1, 1, 2]]
    assert found["probability"].tolist() == pytest.approx([0.85, 0.2])
    assert found["specialised"].tolist() == [True, False]
    assert set(found.attrs["concept"]["tokens"]) == {" dog", "dog", " Dog", "Dog", " dogs"}
    assert " DOG" in found.attrs["concept"]["dropped"]
    alone = atlas.find(" dog", variants=False)
    assert alone["probability"].tolist() == pytest.approx([0.5, 0.2])
    assert atlas.find([" water", " of"])["probability"].tolist() == pytest.approx([0.6, 0.1, 0.01])
    assert len(atlas.find(" dog", top=1)) == 1
    assert atlas.find(" money").empty


def test_find_refuses_what_is_no_token(atlas: Atlas) -> None:
    with pytest.raises(InputError, match=r"not a single token.*pieces"):
        atlas.find([" dog water"])
    with pytest.raises(InputError, match="empty"):
        atlas.find("  ")
    bare = Atlas(atlas.kind, atlas.frame, atlas.columns, atlas.provenance)
    with pytest.raises(InputError, match="without a tokenizer"):
        bare.find(" dog")


def test_specialised_and_by_layer(atlas: Atlas) -> None:
    assert atlas.neurons["specialised"].tolist() == [True, False, False, False]  # punctuation is no word
    layers = atlas.by_layer()
    assert layers["specialised"].tolist() == [0.5, 0.0]
    assert layers["n"].tolist() == [2, 2]
    assert layers["p50"].tolist() == [0.5, 0.5]
    assert layers[["low", "high"]].iloc[0].tolist() == pytest.approx(wilson(1, 2))


def test_coverage(atlas: Atlas) -> None:
    coverage = atlas.coverage(threshold=0.5)
    assert coverage["top1"] == pytest.approx(4 / 64)
    assert coverage["peaked"] == pytest.approx(4 / 64)
    assert coverage["specialised"] == pytest.approx(1 / 64)
    assert atlas.coverage(threshold=0.6)["peaked"] == 0


def test_nearest_equals_a_dense_cosine(atlas: Atlas) -> None:
    nearest = atlas.nearest(0, 0, top=3)
    dense = np.zeros((4, 64))
    ids, p = atlas.frame["token_id"].to_numpy().reshape(4, 5), atlas.frame["probability"].to_numpy().reshape(4, 5)
    for row in range(4):
        dense[row, ids[row]] = p[row]
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    cosine = dense[1:] @ dense[0]
    assert nearest["similarity"].tolist() == pytest.approx(sorted(cosine, reverse=True), abs=1e-6)
    assert (nearest.iloc[0]["layer"], nearest.iloc[0]["neuron"]) == (0, 1)
    with pytest.raises(InputError, match="no neuron"):
        atlas.nearest(0, 9)


def test_card_and_saved_atlas(atlas: Atlas, tmp_path: Any) -> None:
    assert atlas.card(0, 0)["token"].tolist() == [" dog", "dog", " Dog", " dogs", " water"]
    with pytest.raises(InputError, match="no neuron"):
        atlas.card(0, 0, -1)
    loaded = load_result(atlas.save(tmp_path / "a.parquet"))
    assert isinstance(loaded, Atlas)
    assert loaded.equals(atlas)
    pd.testing.assert_frame_equal(loaded.find(" dog"), atlas.find(" dog"))


def test_a_reordered_atlas_is_refused(atlas: Atlas) -> None:
    shuffled = Atlas(atlas.kind, atlas.frame.iloc[::-1], atlas.columns, atlas.provenance)
    with pytest.raises(ResultError, match="not ordered"):
        _ = shuffled.neurons


def test_stems() -> None:
    same = _stems([" dog", "Dog", "dogs", " DOGS"])
    assert len(set(same)) == 1
    assert len(set(_stems(["city", " Cities"]))) == 1
    assert len(set(_stems(["box", "boxes"]))) == 1
    assert len(set(_stems(["glass", "glas"]))) == 2
    assert _stems(["?", " 12", ""]).tolist() == [-1, -1, -1]


def test_tokens_that_share_a_text_stay_apart(tiny: Any) -> None:
    """Bytes that are no text by themselves all decode to the replacement character."""
    frame = atlas_frame(
        [
            LayerPart(
                0,
                np.array([0]),
                (1,),
                np.array([[[0, 1]]]),
                np.array([[[0.6, 0.4]]], dtype=np.float32),
                *[np.zeros((1, 1), np.float32)] * 2,
                np.zeros(1, np.float32),
            )
        ],
        ["�", "�"],
    )
    assert frame["token_id"].tolist() == [0, 1]
    assert frame["token"].tolist() == ["�", "�"]


def test_plots_show_every_layer_and_hostile_tokens_as_text(atlas: Atlas) -> None:
    from interp.neurons import plots

    drawn = atlas.plot(control=atlas)
    assert sum(trace.name is not None for trace in drawn.data) == 2
    assert plots.specialised(atlas).data
    hostile = handmade({(0, 0): ["<script>", "\x07", "▁a", "▁in", "?"]})
    labels = plots.card(hostile, 0, 0).layout.yaxis.ticktext
    assert "<script>" not in labels[0]
    assert "\x07" not in labels[1]


# compare


def test_compare_counts_by_hand(atlas: Atlas) -> None:
    other = handmade(
        {
            (0, 0): DOGS,
            (0, 1): ["▁of", "▁dog", "▁water", "▁in", "▁sea"],
            (1, 0): DOGS,
            (1, 1): ["?", ".", "!", "▁a", "▁in"],
        }
    )
    rows = compare(atlas, other).frame.set_index("layer")
    assert rows["agree"].tolist() == [0.5, 0.5, 0.5]
    assert rows.loc[0, "overlap"] == pytest.approx((1 + 0.8) / 2)
    # Layer 0: {dog, water} against {dog, of}: a random pairing agrees with 1/2 · 1/2.
    assert rows.loc[0, "chance"] == pytest.approx(0.25)
    assert rows.loc[-1, "n"] == 4
    assert rows.loc[-1, ["low", "high"]].tolist() == pytest.approx(wilson(2, 4))
    compare(atlas, other).plot()


def test_compare_two_models_and_two_sites(tiny: Any) -> None:
    model = tiny("llama")
    a = decode(model, top_k=5, progress=False)
    assert compare(a, a).frame["agree"].eq(1).all()
    with torch.no_grad():
        changed = tiny_hf("llama")
        changed.model.layers[1].mlp.up_proj.weight.normal_(generator=torch.Generator().manual_seed(5))
    rows = compare(a, decode(load_model(changed, tiny_tokenizer()), top_k=5, progress=False)).frame.set_index("layer")
    assert rows.loc[0, "agree"] == rows.loc[2, "agree"] == 1
    assert rows.loc[1, "agree"] < 0.5
    sites = compare(a, decode(model, "down", top_k=5, progress=False))
    assert sites.provenance.parameters["b"]["site"] == "down"


def test_compare_says_what_differs(tiny: Any, atlas: Atlas) -> None:
    a = decode(tiny("llama"), top_k=5, progress=False)
    for changes, message in [
        ({"num_hidden_layers": 2}, "number of layers differs"),
        ({"intermediate_size": 32}, "neurons per layer differs"),
        ({"vocab_size": 80}, "vocabulary size differs"),
    ]:
        with pytest.raises(InputError, match=message):
            compare(a, decode(tiny("llama", **changes), top_k=5, progress=False))
    with pytest.raises(InputError, match="norm differs"):
        compare(a, decode(tiny("llama"), norm="raw", top_k=5, progress=False))
    with pytest.raises(InputError, match="signs"):
        compare(a, decode(tiny("llama"), signs=(1,), top_k=5, progress=False), sign=-1)
    tokenizer = a.attachments["tokenizer"]
    swapped = tokenizer.replace('"▁w1"', '"▁xx"').replace('"▁w2"', '"▁yy"')
    other = Atlas(a.kind, a.frame, a.columns, a.provenance, {"tokenizer": swapped})
    with pytest.raises(InputError, match=r"vocabularies differ at 2 of 64 ids.*▁w1.*▁xx"):
        compare(a, other)
