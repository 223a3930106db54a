"""The origin of residual peaks: planted in one MLP or attention block, they must be found there and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import tiny_encoder, tiny_tokenizer

from interp.batching import pad
from interp.capture import Keep, run_probes
from interp.errors import InputError
from interp.model import load_model
from interp.sinks import evidence_plots
from interp.sinks.residual_peaks import _Arm, _zeroed, origin, residual_peak_origin

BOS = 1


def texts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Texts that begin with BOS, which appears nowhere else."""
    random = np.random.default_rng(seed)
    return [[BOS, *random.integers(4, 64, length - 1).tolist()] for length in lengths]


TEXTS = {"prose": texts_of(12, 7, 9), "code": texts_of(10, 5, seed=1)}


def flat_model(n_layers: int = 6) -> Any:
    """A Llama whose blocks write little; the token BOS alone has a first dimension, far above its others."""
    from tiny_models import tiny_hf

    model = load_model(tiny_hf("llama", num_hidden_layers=n_layers), tiny_tokenizer())
    arch = model.arch
    with torch.no_grad():
        for layer in range(n_layers):
            arch.down_proj(layer).weight.mul_(0.01)
            arch.o_proj(layer).weight.mul_(0.01)
        embedding = arch.embedding().weight
        embedding[:, 0] = 0
        embedding[BOS] = 0
        embedding[BOS, 0] = 4.0
    return model


def plant(model: Any, layer: int, size: float = 300.0) -> None:
    """Neuron 3 of a layer's MLP fires for BOS alone and writes a huge vector."""
    arch = model.arch
    with torch.no_grad():
        for matrix in (arch.up_proj(layer).weight, arch.gate_proj(layer).weight):
            matrix[3] = 0
            matrix[3, 0] = 2.0
        arch.down_proj(layer).weight[:, 3] = 0
        arch.down_proj(layer).weight[5, 3] = size


@pytest.mark.parametrize("layer", [0, 2])
def test_a_planted_mlp_is_found(layer: int) -> None:
    model = flat_model()
    plant(model, layer)
    result = residual_peak_origin(model, TEXTS, progress=False)
    table = origin(result)
    found = table[table["makes_peak"]]
    assert set(zip(found["domain"], found["block"], found["block_layer"], strict=True)) == {
        ("prose", "mlp", layer),
        ("code", "mlp", layer),
    }
    assert (found["remaining"] < 0.1).all()
    assert (table.loc[~table["makes_peak"], "remaining"] > 0.9).all()
    assert (result.frame["position"] == 0).all()
    assert sorted(table.loc[table["arm"] == "early", "block_layer"].unique()) == list(range(layer + 1))
    controls = table.loc[table["arm"] == "control", "block_layer"]
    assert len(controls)
    assert controls.min() > layer
    assert (table["depth"] > controls.max()).all()  # so that a control could have changed what is measured
    assert (table.loc[table["arm"] == "none", "appears"] == layer + 1).all()


def test_a_peak_that_attention_makes() -> None:
    model = flat_model()
    with torch.no_grad():
        arch = model.arch
        arch.attention(1).v_proj.weight[0] = 0
        arch.attention(1).v_proj.weight[0, 0] = 3.0  # heads 0 and 1 carry the first dimension in their first
        arch.o_proj(1).weight[:, 0] = 0
        arch.o_proj(1).weight[6, 0] = 400.0
        for layer in (0, 1):  # and every other token looks at itself
            arch.attention(layer).q_proj.weight.zero_()
    table = origin(residual_peak_origin(model, {"a": TEXTS["prose"]}, [0, 1, 2], progress=False))
    best = table.loc[table["remaining"].idxmin()]
    assert (best["block"], best["block_layer"]) == ("attention", 1)


def test_a_flat_model_has_no_peak() -> None:
    table = origin(residual_peak_origin(flat_model(), TEXTS, progress=False))
    assert not table["makes_peak"].any()
    assert table["appears"].isna().all()


def test_the_sink_may_stand_anywhere() -> None:
    model = flat_model()
    plant(model, 1)
    texts = [[5, 6, 7, BOS, 8, 9], [10, BOS, 11, 12, 13]]
    frame = residual_peak_origin(model, texts, progress=False).frame
    assert frame.groupby("text")["position"].unique().map(list).tolist() == [[3], [1]]
    plain = frame[(frame["arm"] == "none") & (frame["depth"] == 3)]
    assert (plain["norm_sink"] > 20 * plain["norm_first"]).all()


def test_norms_are_those_of_the_residual_stream(tiny: Any, family: str) -> None:
    model = tiny(family)
    frame = residual_peak_origin(model, TEXTS, max_tokens=20, progress=False).frame
    keep = Keep([("resid_pre", 0), *(("resid_post", layer) for layer in range(3))])
    run_probes(model, TEXTS["prose"], [keep])
    plain = frame[(frame["arm"] == "none") & (frame["domain"] == "prose")]
    assert len(plain) == 3 * 4
    for row in plain.itertuples():
        site = ("resid_pre", 0) if row.depth == 0 else ("resid_post", row.depth - 1)
        norms = keep.tensors[site][row.text].norm(dim=-1).numpy()
        others = [norm for at, norm in enumerate(norms) if at not in (0, row.position)]
        assert row.norm_sink == pytest.approx(norms[row.position], rel=1e-4)
        assert row.norm_first == pytest.approx(norms[0], rel=1e-4)
        assert row.norm_others == pytest.approx(np.median(others), rel=1e-4)


@torch.no_grad()
def test_zeroing_takes_away_what_is_added_and_nothing_else(tiny: Any, family: str) -> None:
    """With both blocks zeroed a layer hands on what it got; zeroing one leaves what the other adds to that input."""
    model = tiny(family)
    batch = pad(TEXTS["prose"][:1], (0,), 0)
    seen: dict[str, Any] = {}
    sites = [model.arch.site(name, 1) for name in ("resid_pre", "resid_post")]
    handles = [site.attach(lambda x, name=site.name: seen.__setitem__(name, x.clone())) for site in sites]

    def added(*blocks: str) -> Any:
        with _zeroed(model, _Arm("early", blocks[0], 1)), _zeroed(model, _Arm("early", blocks[-1], 1)):
            model.hf.base_model(batch.input_ids, use_cache=False)
        return seen["resid_post"] - seen["resid_pre"]

    assert added("attention", "mlp").abs().max() == 0
    assert added("attention").abs().max() > 1e-3  # the MLP's own part
    assert added("mlp").abs().max() > 1e-3
    model.hf.base_model(batch.input_ids, use_cache=False)
    whole = seen["resid_post"] - seen["resid_pre"]
    if family == "gpt_neox":  # both read the same stream, so that the parts add up
        torch.testing.assert_close(added("attention") + added("mlp"), whole, atol=1e-4, rtol=1e-4)
    for handle in handles:
        handle.remove()


def test_batches_do_not_matter() -> None:
    model = flat_model(3)
    plant(model, 0)
    one = residual_peak_origin(model, TEXTS, max_tokens=1, progress=False).frame
    pd.testing.assert_frame_equal(one, residual_peak_origin(model, TEXTS, progress=False).frame, rtol=1e-4)


def test_one_text_has_no_interval() -> None:
    model = flat_model(3)
    plant(model, 0)
    table = origin(residual_peak_origin(model, {"a": texts_of(9)}, n_controls=0, progress=False))
    assert table[["low", "high"]].isna().all(axis=None)
    assert table["makes_peak"].sum() == 1
    assert "control" not in set(table["arm"])


def test_plot() -> None:
    model = flat_model()
    plant(model, 1)
    result = residual_peak_origin(model, TEXTS, progress=False)
    drawn = evidence_plots.residual_peak_origin(result, top=1)
    named = {trace.name: trace for trace in drawn.data}
    assert list(named) == ["model as it is", "other tokens", "without MLP 1", "prose", "code"]
    assert named["model as it is"].y[2] > 10 * named["without MLP 1"].y[2]
    height = dict(zip(named["code"].x, named["code"].y, strict=True))
    assert height["MLP 1"] < 0.1
    assert min(value for name, value in height.items() if name != "MLP 1") > 0.9
    assert any("control" in name for name in height)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [3]}, "layer 3 is out of range"),
        ({"layers": []}, "layers is empty"),
        ({"n_controls": -1}, "n_controls=-1"),
        ({"texts": {"a": [[5, 6]]}}, "1 of 1 texts are shorter than the 3 tokens needed"),
        ({"texts": {}}, "no domain"),
    ],
)
def test_bad_input(tiny: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        residual_peak_origin(tiny(), progress=False, **{"texts": TEXTS, **changes})


def test_encoders_are_refused() -> None:
    with pytest.raises(InputError, match="encoder"):
        residual_peak_origin(load_model(tiny_encoder(), tiny_tokenizer()), TEXTS, progress=False)


@pytest.mark.slow
def test_embedded_model(embedded: Any) -> None:
    """The peak at <|endoftext|> is made by MLPs, the last of which is that of layer 11; no attention block makes it."""
    texts = [
        [0, *embedded.tokenizer(text)["input_ids"]]
        for text in ("The baker opens at six in the morning.", "import os\n")
    ]
    table = origin(residual_peak_origin(embedded, texts, n_controls=2, progress=False))
    makers = table[table["makes_peak"]]
    assert set(makers["block"]) == {"mlp"}
    assert makers["block_layer"].max() == 11
    assert table.loc[table["arm"] == "control", "remaining"].min() > 0.9
