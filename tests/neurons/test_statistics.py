"""Activation statistics against numpy on the concatenated activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from interp.capture import Keep, run_probes
from interp.errors import InputError
from interp.neurons import neuron_statistics
from interp.neurons.statistics import merge_moments, reduce_tokens
from interp.results import load_result

TEXTS = [[5, 9, 12, 20, 33], [7], [8, 14, 30, 31, 32, 33, 34, 35, 36], [40, 41], [5, 9, 12]]


def _direct(model: Any, site: str, layer: int) -> np.ndarray:
    """All real tokens' activations, one text at a time: no padding anywhere."""
    probe = Keep([(site, layer)])
    for text in TEXTS:
        one = Keep([(site, layer)])
        run_probes(model, [text], [one])
        probe.tensors[site, layer][len(probe.tensors[site, layer])] = one.tensors[site, layer][0]
    return np.concatenate([piece.numpy() for piece in probe.tensors[site, layer].values()]).astype(np.float64)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_equals_numpy(tiny: Any, name: str) -> None:
    model = tiny(name)
    sites = ["up", "hidden"] if name == "gpt2" else ["up", "gate", "hidden"]
    frame = neuron_statistics(model, TEXTS, sites, max_tokens=12, progress=False).frame
    assert len(frame) == len(sites) * 3 * 24
    for (site, layer), rows in frame.groupby(["site", "layer"], observed=True):
        values = _direct(model, str(site), int(layer))
        assert rows["neuron"].tolist() == list(range(24))
        assert set(rows["n"]) == {len(values)} == {20}
        for column, wanted in {
            "mean": values.mean(0),
            "sd": values.std(0, ddof=1),
            "min": values.min(0),
            "max": values.max(0),
            "share_positive": (values > 0).mean(0),
        }.items():
            np.testing.assert_allclose(rows[column], wanted, rtol=1e-4, atol=1e-5, err_msg=f"{site} {layer} {column}")


def test_batch_size_and_order_do_not_matter(tiny: Any) -> None:
    model = tiny()
    whole = neuron_statistics(model, TEXTS, progress=False).frame
    again = neuron_statistics(model, TEXTS[::-1], max_tokens=1, progress=False).frame
    for column in ("mean", "sd", "min", "max"):
        assert (abs(whole[column] - again[column]) < 1e-4 * whole["sd"]).all()
    assert (whole["n"] == again["n"]).all()


def test_large_offset_loses_nothing() -> None:
    """The sum of squares minus the square of the sum would lose every digit here."""
    generator = torch.Generator().manual_seed(0)
    tokens = 10_000 + torch.randn(5_000, 300, generator=generator)
    moments = reduce_tokens(tokens)
    values = tokens.double().numpy()
    np.testing.assert_allclose(np.sqrt(moments.m2 / (moments.n - 1)), values.std(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-7)


def test_merging_is_the_same_in_any_grouping() -> None:
    tokens = torch.randn(90, 4, generator=torch.Generator().manual_seed(1)).double().float()
    parts = [reduce_tokens(tokens[a:b]) for a, b in ((0, 1), (1, 50), (50, 90))]
    left = merge_moments([merge_moments(parts[:2]), parts[2]])
    right = merge_moments([parts[2], merge_moments(parts[1::-1])])
    for name in ("mean", "m2", "low", "high", "positive"):
        np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=1e-12)
    np.testing.assert_allclose(left.m2 / 89, tokens.double().var(0).numpy(), rtol=1e-5)


def test_one_token_has_no_standard_deviation(tiny: Any) -> None:
    frame = neuron_statistics(tiny(), [[5]], layers=[-1], progress=False).frame
    assert set(frame["layer"]) == {2}
    assert frame["sd"].isna().all()
    assert (frame["min"] == frame["max"]).all()


def test_half_precision(tiny: Any) -> None:
    model = tiny()
    wanted = neuron_statistics(model, TEXTS, progress=False).frame
    model.hf.to(torch.bfloat16)
    got = neuron_statistics(model, TEXTS, progress=False).frame
    assert np.corrcoef(wanted["mean"], got["mean"])[0, 1] > 0.99
    assert set(got["n"]) == {20}


def test_file(tiny: Any, tmp_path: Any) -> None:
    result = neuron_statistics(tiny(), ["▁the▁water", "a dog"], layers=[1], progress=False)
    assert load_result(result.save(tmp_path / "s.parquet")).equals(result)
    assert result.provenance.parameters["n_texts"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": []}, "no texts"),
        ({"texts": ["a dog", ""]}, "text 1 is empty"),
        ({"texts": ["a dog"], "site": "resid_pre"}, "no neurons"),
        ({"texts": ["a dog"], "layers": [3]}, "layer 3 is out of range"),
        ({"texts": ["a dog"], "layers": []}, "at least one"),
    ],
)
def test_bad_input(tiny: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        neuron_statistics(tiny(), **arguments, progress=False)


def test_family_without_gate_says_so(tiny: Any) -> None:
    with pytest.raises(InputError, match="not gated"):
        neuron_statistics(tiny("gpt2"), ["a dog"], "gate", progress=False)
