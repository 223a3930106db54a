"""Decoding against a direct computation through the model's own norm and head, and planted neurons."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import GATED, VOCAB, tiny_encoder, tiny_hf, tiny_tokenizer

from interp.errors import InputError, ModelError
from interp.model import load_model
from interp.neurons import decoding, vocabulary
from interp.neurons.decoding import decode


@torch.no_grad()
def direct(model: Any, layer: int, neuron: int, site: str, norm: str, sign: int, bias: bool = False) -> torch.Tensor:
    """softmax(± W_U N(w)) in float64, from the modules themselves."""
    arch = model.arch
    w = {"up": arch.up_weight, "gate": arch.gate_weight, "down": arch.down_weight}[site](layer)[neuron].double()
    is_layer_norm = arch.family.norm == "layer"
    if norm == "folded" and arch.pre_mlp_norm(layer) is not None:
        w = w * (arch.pre_mlp_norm(layer).weight.double() + arch.family.norm_offset)
    if norm in ("final", "folded") and is_layer_norm:
        w = w - w.mean()
    if norm != "raw":
        w = w / w.pow(2).mean().sqrt()
    if norm in ("final", "folded"):
        w = w * (arch.final_norm().weight.double() + arch.family.norm_offset)
    w = w * sign
    if bias:
        w = w + arch.final_norm().bias.double()
    return (arch.head_weight().double() @ w).softmax(0)


@pytest.mark.parametrize("site", ["up", "gate", "down"])
@pytest.mark.parametrize("norm", ["raw", "rms", "final", "folded"])
def test_every_neuron_equals_the_direct_computation(tiny: Any, family: str, site: str, norm: str) -> None:
    model = tiny(family)
    if site == "gate" and family not in GATED:
        with pytest.raises(InputError, match="no gate projection"):
            decode(model, site, norm, progress=False)
        return
    if site == "down" and norm == "folded":
        with pytest.raises(InputError, match="folded"):
            decode(model, site, norm, progress=False)
        return
    atlas = decode(model, site, norm, top_k=5, layers=[0, 2], memory_budget=4 * 64 * 7, progress=False)
    assert len(atlas.frame) == 2 * 24 * 2 * 5
    for layer, neuron, sign in [(0, 0, 1), (0, 23, -1), (2, 11, 1), (2, 5, -1)]:
        card = atlas.card(layer, neuron, sign)
        p = direct(model, layer, neuron, site, norm, sign)
        best = p.topk(5)
        np.testing.assert_allclose(card["probability"], best.values, rtol=2e-4)
        assert card["token_id"].tolist() == best.indices.tolist()
        np.testing.assert_allclose(card["entropy"], -(p * p.log()).sum(), rtol=1e-3)


def test_final_is_what_the_models_own_norm_and_head_give(tiny: Any, family: str) -> None:
    model = tiny(family)
    atlas = decode(model, "up", "final", top_k=3, layers=[1], progress=False, bias=family in ("gpt2", "gpt_neox"))
    row = 100 * model.arch.up_weight(1)[4]  # long rows, so that the norm's epsilon does not show
    p = model.head_logits(row[None])[0].double().softmax(0)
    np.testing.assert_allclose(atlas.card(1, 4)["probability"], p.topk(3).values.detach(), rtol=1e-3)


@pytest.mark.parametrize("site", ["up", "gate", "down"])
@pytest.mark.parametrize("norm", ["raw", "rms", "final", "folded"])
def test_a_planted_neuron_is_found_at_every_site(family: str, site: str, norm: str) -> None:
    """A vocabulary row written into the weights: decode must find its token first, with the right sign."""
    if (site == "gate" and family not in GATED) or (site == "down" and norm == "folded"):
        pytest.skip("this family has no gate" if site == "gate" else "folded is about what a neuron reads")
    hf = tiny_hf(family)
    model = load_model(hf, tiny_tokenizer())
    arch, token = model.arch, VOCAB.index("▁water")
    with torch.no_grad():
        arch.lm_head().weight[token] *= 3  # in 16 dimensions a longer row could otherwise win by its length
    row = arch.head_weight()[token].clone()
    row = row - row.mean() if arch.family.norm == "layer" else row
    # Undo the gains that decoding multiplies with, so that the decoded direction is the vocabulary row itself.
    if norm in ("final", "folded"):
        row = row / arch.norm_gain(arch.final_norm())
    if norm == "folded" and arch.pre_mlp_norm(1) is not None:
        row = row / arch.norm_gain(arch.pre_mlp_norm(1))
    with torch.no_grad():
        {"up": arch.up_weight, "gate": arch.gate_weight, "down": arch.down_weight}[site](1)[7] = -20 * row
    atlas = decode(model, site, norm, progress=False)
    assert atlas.card(1, 7, -1)["token_id"].iloc[0] == token
    found = atlas.find(" water", top=5, variants=False)
    assert ((found["layer"] == 1) & (found["neuron"] == 7) & (found["sign"] == -1) & (found["rank"] == 1)).any()


@pytest.mark.parametrize("shuffle", [False, True])
def test_pieces_and_processors_change_nothing(tiny: Any, monkeypatch: pytest.MonkeyPatch, shuffle: bool) -> None:
    model = tiny("llama")
    monkeypatch.setattr(decoding, "_STEP", 8)
    before = torch.get_num_threads()
    whole = decode(model, shuffle=shuffle, progress=False).frame
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            pieces = decode(model, shuffle=shuffle, memory_budget=1, progress=False).frame
            assert whole["token_id"].equals(pieces["token_id"])
            np.testing.assert_allclose(whole["probability"], pieces["probability"], rtol=1e-5)
            np.testing.assert_allclose(whole["entropy"], pieces["entropy"], rtol=1e-5)
    finally:
        torch.set_num_threads(before)
    assert whole.equals(decode(model, shuffle=shuffle, progress=False).frame)  # bit for bit


def test_the_way_of_other_devices_gives_the_same(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    tiles = decode(model, top_k=6, progress=False).frame
    monkeypatch.setattr(vocabulary, "_in_tiles", vocabulary._at_once)
    at_once = decode(model, top_k=6, progress=False).frame
    assert tiles["token_id"].equals(at_once["token_id"])
    for column in ("probability", "logsumexp", "entropy"):
        np.testing.assert_allclose(tiles[column], at_once[column], rtol=1e-5)


def test_half_precision_is_decoded_in_float32(tiny: Any) -> None:
    model = load_model(tiny_hf("llama").bfloat16(), tiny_tokenizer())
    atlas = decode(model, top_k=4, progress=False)
    np.testing.assert_allclose(
        atlas.card(1, 3, -1)["probability"], direct(model, 1, 3, "up", "final", -1).topk(4).values, rtol=1e-3
    )


def test_sample_and_shuffle(tiny: Any) -> None:
    model = tiny("llama")
    sample = decode(model, sample=5, seed=3, progress=False)
    assert sample.neurons.groupby("layer")["neuron"].nunique().tolist() == [5, 5, 5]
    full = decode(model, progress=False)
    row = sample.neurons.iloc[0]
    assert full.card(row.layer, row.neuron, row.sign)["token_id"].iloc[0] == row.token_id
    control = decode(model, shuffle=True, seed=3, progress=False)
    assert control.frame.equals(decode(model, shuffle=True, seed=3, progress=False).frame)
    assert (control.neurons["token_id"] != full.neurons["token_id"]).mean() > 0.7
    np.testing.assert_allclose(control.neurons["cosine"], full.neurons["cosine"])


def test_head_from_another_model(tiny: Any) -> None:
    a, b = tiny("llama"), tiny("llama", seed=1)
    mixed = decode(b, head_from=a, top_k=4, progress=False)
    with torch.no_grad():
        b.hf.lm_head.weight.copy_(a.hf.lm_head.weight)
        b.hf.model.norm.weight.copy_(a.hf.model.norm.weight)
    np.testing.assert_allclose(
        mixed.frame["probability"], decode(b, top_k=4, progress=False).frame["probability"], rtol=1e-5
    )
    with pytest.raises(InputError, match="does not fit"):
        decode(b, head_from=tiny("llama", hidden_size=32), progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"site": "hidden"}, "site 'hidden'"),
        ({"norm": "l2"}, "norm='l2'"),
        ({"signs": ()}, "signs"),
        ({"signs": (2,)}, "signs"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 65}, "top_k=65"),
        ({"layers": [3]}, "layer 3 is out of range"),
        ({"layers": []}, "no layers"),
        ({"sample": 0}, "sample=0"),
        ({"norm": "rms", "bias": True}, "bias"),
    ],
)
def test_bad_options(tiny: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode(tiny("llama"), progress=False, **change)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_tensor(tiny: Any, value: float) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.hf.model.layers[1].mlp.up_proj.weight[3, 3] = value
    with pytest.raises(ModelError, match="up weights of layer 1"):
        decode(model, progress=False)
    model = tiny("llama")
    with torch.no_grad():
        model.hf.lm_head.weight[3, 3] = value
    with pytest.raises(ModelError, match="LM head"):
        decode(model, progress=False)


def test_an_encoder_has_no_lm_head(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="no LM head"):
        decode(load_model(tiny_encoder(), tokenizer), progress=False)


@pytest.mark.slow
def test_known_neurons_of_the_embedded_model(embedded: Any) -> None:
    """Probabilities measured independently of this code, with the paper's kind of decoding (final norm)."""
    atlas = decode(embedded, "up", layers=[12, 16, 21, 24, 28], progress=False)
    for token, p, layer, neuron, sign in [
        (" water", 0.957, 28, 876, -1),
        (" water", 0.866, 21, 1291, 1),
        (" money", 0.732, 24, 712, -1),
        (" animal", 0.711, 16, 883, 1),
        (" music", 0.488, 12, 1326, 1),
    ]:
        card = atlas.card(layer, neuron, sign)
        assert card["token"].iloc[0] == token
        assert card["probability"].iloc[0] == pytest.approx(p, abs=2e-3)
