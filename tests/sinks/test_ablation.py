"""Ablation against a plain forward pass, one head and one text at a time; planted heads; interruptions; bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import tiny_encoder, tiny_hf, tiny_tokenizer

from interp.batching import pad
from interp.capture import Keep, run_probes
from interp.errors import InputError, MemoryBudgetError, ResultError
from interp.intervene import HeadAblation, intervene
from interp.model import load_model
from interp.provenance import Provenance
from interp.results import Result, load_result
from interp.sinks import ablated_runs, evidence_plots
from interp.sinks.ablated_runs import from_layer
from interp.sinks.ablation import ABLATION_COLUMNS, ablate, against_random, between_domains, summary
from interp.sinks.losses import mean_losses
from interp.sinks.scanning import scan


def texts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(4, 64, length).tolist() for length in lengths]


TEXTS = {"prose": texts_of(9, 2, 5), "code": texts_of(12, 7, seed=1)}


@torch.no_grad()
def plain_loss(model: Any, ids: list[int]) -> float:
    """The model's own logits of one text without padding, and the loss written out."""
    logits = model.hf(torch.tensor([ids]), use_cache=False).logits[0].float()
    return float(-logits[:-1].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]].mean())


@torch.no_grad()
def replacement(model: Any, mode: str, layer: int, head: int, domain: str, ids: list[int]) -> list[float] | None:
    """What the head's z becomes, not read from where `ablate` reads it."""
    arch = model.arch
    if mode == "zero":
        return None
    if mode == "to_sink":  # the value vector in the model's KV cache
        # Of the first token alone: a sliding window's cache drops key 0, whose value does not depend on what follows.
        values = model.hf(torch.tensor([ids[:1]]), use_cache=True).past_key_values.layers[layer].values
        return values[0, head // (arch.n_heads // arch.n_kv_heads), 0].tolist()
    keep = Keep([("z", layer)])
    run_probes(model, TEXTS[domain], [keep])
    together = torch.cat(list(keep.tensors["z", layer].values()))
    return together.unflatten(-1, (arch.n_heads, arch.d_head))[:, head].mean(0).tolist()


@pytest.mark.parametrize("mode", ["zero", "to_sink", "mean"])
def test_every_head_as_a_plain_forward(tiny: Any, family: str, mode: str) -> None:
    model = tiny(family)
    plain = {(domain, at): plain_loss(model, ids) for domain, texts in TEXTS.items() for at, ids in enumerate(texts)}
    found = ablate(model, "all", TEXTS, mode, max_tokens=30, progress=False).frame
    assert len(found) == 12 * 5
    for row in found[found["head"] % 2 == found["layer"] % 2].itertuples():
        ids = TEXTS[row.domain][row.text]
        value = replacement(model, mode, row.layer, row.head, row.domain, ids)
        with intervene(model, HeadAblation(row.layer, row.head, value)):
            ablated = plain_loss(model, ids)
        assert row.loss == pytest.approx(plain[row.domain, row.text], abs=1e-5)
        assert row.loss_ablated == pytest.approx(ablated, abs=1e-5)
        assert row.delta_loss == row.loss_ablated - row.loss
        assert row.n_tokens == len(ids)
    assert found["delta_loss"].abs().max() > 1e-3
    assert (found["arm"] == "head").all()


def test_batches_do_not_matter(tiny: Any) -> None:
    model = tiny("gemma2")
    one = ablate(model, [(1, 0), (2, 3)], TEXTS, max_tokens=1, progress=False).frame
    all_in_one = ablate(model, [(1, 0), (2, 3)], TEXTS, max_tokens=10_000, progress=False).frame
    pd.testing.assert_frame_equal(one, all_in_one, atol=1e-5)


def test_residual_streams_of_a_few_layers_at_a_time(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    whole = ablate(model, "all", TEXTS, progress=False).frame
    monkeypatch.setattr(ablated_runs, "_KEPT", 0.0)
    pd.testing.assert_frame_equal(ablate(model, "all", TEXTS, progress=False).frame, whole)


def test_bfloat16_has_its_losses_in_float32(tiny: Any) -> None:
    model = load_model(tiny_hf("llama"), tiny_tokenizer(), dtype="bfloat16")
    found = ablate(model, [(0, 1)], TEXTS, n_random=0, progress=False).frame
    for row in found.itertuples():
        with intervene(model, HeadAblation(0, 1)):
            assert row.loss_ablated == pytest.approx(plain_loss(model, TEXTS[row.domain][row.text]), abs=0.05)
    assert len(set(found["loss"])) == 5  # bfloat16 losses near 4 would be multiples of 1/64
    assert any(abs(loss * 64 - round(loss * 64)) > 1e-3 for loss in found["loss"])


def test_a_head_that_writes_nothing_changes_nothing(tiny: Any) -> None:
    model = tiny()
    with torch.no_grad():
        model.arch.o_proj(1).weight[:, 8:12] = 0  # head 2 of width 4
    deltas = ablate(model, "all", TEXTS, progress=False).frame
    silent = (deltas["layer"] == 1) & (deltas["head"] == 2)
    assert deltas.loc[silent, "delta_loss"].abs().max() < 1e-6
    assert deltas.loc[~silent].groupby(["layer", "head"])["delta_loss"].apply(lambda d: d.abs().max()).min() > 1e-4


def test_out_of_memory_halves_and_changes_nothing(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = tiny("qwen3"), ablated_runs.forward
    whole = ablate(model, [(1, 0), (1, 3)], TEXTS, n_random=0, progress=False).frame
    sizes: list[int] = []

    def small(model: Any, batch: Any, **options: Any) -> Any:
        output = plain(model, batch, **options)
        sizes.append(batch.size)
        if batch.size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return output

    monkeypatch.setattr(ablated_runs, "forward", small)
    pd.testing.assert_frame_equal(
        ablate(model, [(1, 0), (1, 3)], TEXTS, n_random=0, progress=False).frame, whole, atol=1e-5
    )
    assert max(sizes) > 3

    def never(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ablated_runs, "forward", never)
    with pytest.raises(MemoryBudgetError):
        ablate(model, [(1, 0), (1, 3)], TEXTS, n_random=0, progress=False)
    monkeypatch.undo()
    assert plain_loss(model, TEXTS["code"][0]) == pytest.approx(whole["loss"][3], abs=1e-5)  # nothing stays behind


def test_from_layer_restores_the_layers(tiny: Any) -> None:
    model = tiny()
    batch = pad(texts_of(5), (0,), 0)
    first, second = model.arch.layer(0), model.arch.layer(1)
    own = second.forward
    second.forward = lambda *given, **named: own(*given, **named)  # as accelerate does
    kept = second.forward
    before = plain_loss(model, texts_of(5)[0])

    def fail(_: Any) -> None:
        raise ZeroDivisionError

    failing = model.arch.layer(2).register_forward_hook(lambda *_: fail(_))
    with failing, pytest.raises(ZeroDivisionError), from_layer(model, 2, torch.zeros(1, 5, 16)):
        model.hf.base_model(batch.input_ids, use_cache=False)
    assert "forward" not in first.__dict__
    assert second.forward is kept
    assert not model.arch.layer(2)._forward_pre_hooks
    assert plain_loss(model, texts_of(5)[0]) == before


def test_interrupted_and_resumed(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = tiny(), ablated_runs._run_layer
    whole = ablate(model, "all", TEXTS, progress=False)
    done: list[int] = []

    def interrupted(model: Any, encoded: Any, layer: int, *rest: Any) -> Any:
        if layer == 2 and not done.count(2):
            done.append(2)
            raise KeyboardInterrupt
        done.append(layer)
        return plain(model, encoded, layer, *rest)

    monkeypatch.setattr(ablated_runs, "_run_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ablate(model, "all", TEXTS, out=tmp_path / "run", progress=False)
    found = ablate(model, "all", TEXTS, out=tmp_path / "run", progress=False)
    assert done == [0, 1, 2, 2]
    pd.testing.assert_frame_equal(found.frame, whole.frame)
    assert load_result(tmp_path / "run").equals(found)
    assert len(ablate(model, "all", TEXTS, out=tmp_path / "run", progress=False).frame) == 60
    assert done == [0, 1, 2, 2]
    with pytest.raises(ResultError, match="another run"):
        ablate(model, "all", TEXTS, "mean", out=tmp_path / "run", progress=False)
    with pytest.raises(ResultError, match="texts"):
        ablate(model, "all", {**TEXTS, "code": texts_of(12, 7)}, out=tmp_path / "run", progress=False)


def test_random_heads_are_a_control_of_the_same_layers(tiny: Any) -> None:
    model = tiny()
    chosen = [(1, 0), (-1, 2)]
    found = ablate(model, chosen, TEXTS, n_random=4, seed=3, progress=False)
    pairs = {
        arm: set(zip(rows["layer"], rows["head"], strict=True))
        for arm, rows in found.frame.groupby("arm", observed=True)
    }
    assert pairs["head"] == {(1, 0), (2, 2)}
    assert len(pairs["random"]) == 4
    assert [layer for layer, _ in sorted(pairs["random"])] == [1, 1, 2, 2]
    again = ablate(model, chosen, TEXTS, n_random=4, seed=3, progress=False)
    pd.testing.assert_frame_equal(found.frame, again.frame)
    other = ablate(model, chosen, TEXTS, n_random=4, seed=5, progress=False)
    assert other.provenance.parameters["random"] != found.provenance.parameters["random"]
    everything = ablate(
        model, [(0, 0)], TEXTS, n_random=11, progress=False
    ).frame  # other layers once layer 0 is used up
    assert len(everything.groupby(["layer", "head"])) == 12


def test_mass_on_the_first_key(tiny: Any) -> None:
    model = tiny()
    measured = ablate(model, [(1, 2)], TEXTS, n_random=0, progress=False).frame
    keep = Keep([("pattern", 1)])
    run_probes(model, TEXTS["prose"], [keep])
    for row in measured[measured["domain"] == "prose"].itertuples():
        assert row.mass_first == pytest.approx(float(keep.tensors["pattern", 1][row.text][2, :, 0].mean()), abs=1e-5)
    scanned = scan(model, TEXTS, progress=False)
    looked_up = ablate(model, [(1, 2)], TEXTS, n_random=0, scan=scanned, progress=False).frame
    pd.testing.assert_frame_equal(looked_up, measured, atol=1e-5)
    without = ablate(model, [(1, 2)], TEXTS, n_random=0, scan=False, progress=False).frame
    assert without["mass_first"].isna().all()
    with pytest.raises(InputError, match="scan is of other texts"):
        ablate(model, [(1, 2)], {"prose": TEXTS["code"]}, scan=scanned, progress=False)
    with pytest.raises(InputError, match="expected True, False or a Result"):
        ablate(model, [(1, 2)], TEXTS, scan="yes", progress=False)  # type: ignore[arg-type]


def result_of(rows: list[tuple[str, int, int, str, float]]) -> Result:
    """(domain, text, head, arm, delta)."""
    frame = pd.DataFrame(rows, columns=["domain", "text", "head", "arm", "delta_loss"])
    frame = frame.assign(layer=1, n_tokens=5, mass_first=0.5, loss=1.0, loss_ablated=1.0 + frame["delta_loss"])
    return Result("sinks.ablate", frame, ABLATION_COLUMNS, Provenance())


def test_summaries_by_hand() -> None:
    deltas = {
        ("a", 0): [0.2, 0.4, 0.009],
        ("a", 1): [0.0, 0.1, 0.02],
        ("b", 0): [0.0, -0.1, 0.1],
        ("b", 1): [0.3, 0.3, 0.3],
    }
    arms = {0: "head", 1: "random"}
    result = result_of([(d, t, h, arms[h], x) for (d, h), xs in deltas.items() for t, x in enumerate(xs)])
    table = summary(result).set_index(["domain", "head"])
    for key, values in deltas.items():
        assert table.loc[key, "mean"] == pytest.approx(np.mean(values))
        assert table.loc[key, "low"] <= table.loc[key, "mean"] <= table.loc[key, "high"]
        assert table.loc[key, "share_hurt"] == pytest.approx(np.mean(np.array(values) > 0.01))
        assert table.loc[key, "n"] == 3
    assert table.loc[("b", 1), "low"] == pytest.approx(0.3)
    assert table.loc[("a", 0), "low"] >= 0.009
    together = against_random(result).set_index(["domain", "what"])
    assert together.loc[("a", "head"), "mean"] == pytest.approx(0.203)
    assert together.loc[("a", "difference"), "mean"] == pytest.approx(0.163)
    # Texts are paired: the differences are .2, .3 and -.011
    assert together.loc[("a", "difference"), "low"] >= -0.011 - 1e-12
    assert together.loc[("a", "difference"), "high"] <= 0.3 + 1e-12
    contrast = between_domains(result, "a", "b").set_index("head")
    assert contrast.loc[0, "difference"] == pytest.approx(0.203)
    assert contrast.loc[1, "difference"] == pytest.approx(-0.26)
    assert contrast.loc[1, "high"] < 0
    assert contrast.loc[1, "p"] == pytest.approx(
        2 / 20
    )  # 3 of 6: 20 assignments, the observed one and its mirror image
    with pytest.raises(InputError, match="'c' was not ablated"):
        between_domains(result, "a", "c")


def test_one_text_has_no_interval() -> None:
    result = result_of([("a", 0, 0, "head", 0.2), ("b", 0, 0, "head", 0.1)])
    table = summary(result)
    assert table["mean"].tolist() == pytest.approx([0.2, 0.1])
    assert table[["low", "high"]].isna().all(axis=None)
    assert against_random(result)["what"].tolist() == ["head", "head"]
    assert between_domains(result, "a", "b")[["low", "high", "p", "q"]].isna().all(axis=None)


def test_losses_of_a_part_of_a_text(tiny: Any) -> None:
    model = tiny("gemma3", final_logit_softcapping=3.0)
    batch = pad(TEXTS["prose"], (0, 1, 2), 0)
    hidden = model.hf.base_model(batch.input_ids, attention_mask=batch.mask.long(), use_cache=False).last_hidden_state
    with torch.no_grad():
        logits = model.hf(batch.input_ids, attention_mask=batch.mask.long(), use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[0, 4:8], torch.tensor(TEXTS["prose"][0][5:]))
    found = mean_losses(model, hidden, batch, start=4)
    assert found[0] == pytest.approx(float(expected), abs=1e-5)
    assert np.isnan(found[1:]).all()


def test_plots(tiny: Any) -> None:
    result = ablate(tiny(), [(0, 1), (2, 2)], TEXTS, n_random=3, progress=False)
    drawn = evidence_plots.ablate(result)
    bars = {trace.name: trace for trace in drawn.data if trace.type == "bar"}
    table = summary(result).query("arm == 'head'")
    for domain, rows in table.groupby("domain"):
        assert bars[domain].x == ("L0H1", "L2H2")
        np.testing.assert_allclose(bars[domain].y, rows["mean"], rtol=1e-5)
        np.testing.assert_allclose(bars[domain].y + bars[domain].error_y.array, rows["high"], rtol=1e-5, atol=1e-7)
    assert sum("3 random heads" in trace.name for trace in drawn.data) == 2
    assert len(next(trace.x for trace in evidence_plots.ablate(result, top=1).data if trace.type == "bar")) == 1
    scatter = evidence_plots.ablation_scatter(result, 2, 2)
    points = {trace.name: trace for trace in scatter.data}
    rows = result.frame.query("layer == 2 and head == 2 and domain == 'code'")
    np.testing.assert_allclose(points["code"].x, rows["mass_first"], rtol=1e-6)
    np.testing.assert_allclose(points["code"].y, rows["delta_loss"], rtol=1e-5)
    masses = (
        summary(result).query("arm == 'head'").pivot(index=["layer", "head"], columns="domain", values="mass_first")
    )
    layer, head = (masses["prose"] - masses["code"]).abs().idxmax()
    assert f"L{layer}H{head}" in evidence_plots.ablation_scatter(result).layout.title.text
    with pytest.raises(InputError, match="L1H0 was not ablated"):
        evidence_plots.ablation_scatter(result, 1, 0)
    with pytest.raises(InputError, match="give both"):
        evidence_plots.ablation_scatter(result, 1)
    unmeasured = ablate(tiny(), [(0, 1)], {"a": texts_of(5)}, n_random=0, scan=False, progress=False)
    with pytest.raises(InputError, match="was not measured"):
        evidence_plots.ablation_scatter(unmeasured)
    assert "random" not in evidence_plots.ablate(unmeasured).layout.title.subtitle.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": [(3, 0)]}, "layer 3 is out of range"),
        ({"heads": [(0, 4)]}, "head 4 is out of range"),
        ({"heads": [5]}, "expected .layer, head. pairs"),
        ({"heads": "some"}, "or 'all'"),
        ({"heads": []}, "no head was given"),
        ({"mode": "resample"}, "expected one of zero, to_sink, mean"),
        ({"texts": {}}, "no domain was given"),
        ({"texts": {"a": []}}, "domain 'a' has no texts"),
        ({"texts": {"a": [[5, 6], []]}}, "domain 'a': text 1 is empty"),
        ({"texts": {"a": [[5, 6], [7]]}}, "domain 'a': 1 of 2 texts are shorter than the 2 tokens needed"),
        ({"texts": {"a": [[5, 64]]}}, "token id 64"),
        ({"texts": {"a": [[5] * 65]}}, "context is 64 tokens"),
        ({"texts": {"": [[5, 6]]}}, "name must be a string"),
        ({"n_random": 12}, "11 heads are left beside the 1 chosen"),
        ({"n_random": -1}, "n_random=-1"),
    ],
)
def test_bad_input(tiny: Any, changes: dict[str, Any], message: str) -> None:
    given = {"heads": [(0, 0)], "texts": TEXTS, **changes}
    with pytest.raises(InputError, match=message):
        ablate(tiny(), progress=False, **given)


def test_encoders_are_refused() -> None:
    with pytest.raises(InputError, match="encoder"):
        ablate(load_model(tiny_encoder(), tiny_tokenizer()), [(0, 0)], TEXTS, progress=False)


@pytest.mark.slow
def test_embedded_model_as_a_plain_forward(embedded: Any) -> None:
    ids = [0, *embedded.tokenizer("def add(a, b):\n    return a + b\n")["input_ids"]]
    found = ablate(embedded, [(0, 3), (15, 3), (29, 8)], {"code": [ids]}, n_random=0, progress=False).frame
    for row in found.itertuples():
        with intervene(embedded, HeadAblation(row.layer, row.head)):
            assert row.loss_ablated == pytest.approx(plain_loss(embedded, ids), abs=1e-5)
