"""The scan: engines against each other and against patterns reduced by hand; planted sinks and heads; bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_encoder, tiny_hf, tiny_tokenizer

from interp import load_model, load_result
from interp.capture import Keep, run_probes
from interp.errors import InputError, MemoryBudgetError, ModelError, ResultError
from interp.sinks import Scan, scan
from interp.sinks.measures import ATTENTION_MEASURES, find_sinks, output_factors

QUIET: dict[str, Any] = {"progress": False}


def token_ids(seed: int, *lengths: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, (length,), generator=random).tolist() for length in lengths]


def numbers(result: Scan) -> pd.DataFrame:
    frame = result.frame.set_index(["domain", "text", "layer", "head"]).drop(columns="sink_tokens")
    return frame.astype("float64")


def assert_same(a: Scan, b: Scan, tolerance: float = 1e-5) -> None:
    pd.testing.assert_frame_equal(numbers(a), numbers(b), rtol=tolerance, atol=tolerance)


def test_engines_agree_on_every_family(tiny: Any, family: str) -> None:
    """Ragged lengths, windows shorter than the texts, and sinks that are not at position 0 (a low `peak`)."""
    texts = {"a": token_ids(0, 5, 12, 12, 7), "b": token_ids(1, 2, 2, 3, 20)}
    model = tiny(family)
    fused, eager = (scan(model, texts, engine=engine, peak=1.1, **QUIET) for engine in ("fused", "eager"))
    assert fused.frame["mass_sinks"].notna().any()
    assert (fused.frame["n_sinks"].dropna() > 1).any()
    assert_same(fused, eager)


def test_measures_by_hand(tiny: Any, family: str) -> None:
    """Every measure of a text from the model's own patterns and residual streams, in loops that read like the definitions."""
    model, length, peak = tiny(family), 11, 1.15
    ids = token_ids(2, length)
    sites = [(site, layer) for layer in range(3) for site in ("pattern", "z", "resid_pre", "resid_post")]
    keep = Keep(sites)
    run_probes(model, ids, [keep])
    values: list[Any] = []  # per layer (head, position, d_head), from the attention function's inputs
    from interp.recorded_attention import recording

    with recording(model, "fused", lambda seen: values.append(seen)), torch.no_grad():
        model.hf(input_ids=torch.tensor(ids))
    frame = scan(model, ids, peak=peak, **QUIET).frame.set_index(["layer", "head"])
    sinks: set[int] = set()
    for layer in range(3):
        pre, post = (keep.tensors[site, layer][0].norm(dim=-1) for site in ("resid_pre", "resid_post"))
        sinks |= {at for at in range(length) if pre[at] > peak * pre.median()}
        pattern, z = keep.tensors["pattern", layer][0], keep.tensors["z", layer][0].reshape(length, 4, -1)
        others = [at for at in range(1, length) if at not in sinks]
        weight = model.arch.o_proj(layer).weight
        weight = (
            (weight if family == "gpt2" else weight.T).detach().reshape(4, z.shape[-1], -1)
        )  # (head, d_head, d_model)
        seen = values[layer]
        window = seen.window or length
        for head in range(4):
            row = frame.loc[layer, head]
            assert row["mass_first"] == pytest.approx(pattern[head, :window, 0].mean().item(), abs=1e-5)
            seers = [q for q in range(length) if any(k <= q < k + window for k in sinks)]
            if seers:
                mass = np.mean([sum(pattern[head, q, k].item() for k in sinks) for q in seers])
                assert row["mass_sinks"] == pytest.approx(mass, abs=1e-5)
            else:
                assert np.isnan(row["mass_sinks"])
            group = head // (4 // seen.value.shape[1])
            norms = (seen.value[0, group] @ weight[head]).norm(dim=-1)
            assert row["value_first"] == pytest.approx(norms[0].item(), rel=1e-4)
            assert row["value_others"] == pytest.approx(norms[others].median().item(), rel=1e-4)
            written = (z[:, head] @ weight[head]).norm(dim=-1)
            assert row["output_norm"] == pytest.approx(written[1:].mean().item(), rel=1e-4)
            # Differences of log attention are differences of scores.
            gaps = [
                (pattern[head, q, 0].log() - pattern[head, q, 1:q].log().mean()).item()
                for q in range(2, min(window, length))
            ]
            assert row["delta_logit"] == pytest.approx(np.mean(gaps), abs=1e-3)
        row = frame.loc[layer, -1]
        after = sinks | {at for at in range(length) if post[at] > peak * post.median()}
        left = [at for at in range(1, length) if at not in after]
        x = keep.tensors["resid_post", layer][0]
        assert row["n_sinks"] == len(after)
        assert row["resid_first"] == pytest.approx(post[0].item(), rel=1e-5)
        assert row["resid_others"] == pytest.approx(post[left].median().item(), rel=1e-5)
        assert row["resid_others_max"] == pytest.approx(post[left].max().item(), rel=1e-5)
        largest = np.argsort(-x.abs().numpy().ravel(), kind="stable")[:3]
        for rank, at in enumerate(largest, 1):
            assert row[f"massive_{rank}"] == pytest.approx(x.flatten()[at].item(), rel=1e-5)
            assert (row[f"massive_{rank}_position"], row[f"massive_{rank}_dim"]) == divmod(at, 16)
        assert row["median_abs"] == pytest.approx(x.abs().median().item(), rel=1e-5)


def test_padding_and_batches_change_nothing(tiny: Any) -> None:
    model, texts = tiny(), token_ids(3, 4, 9, 17, 2, 30)
    alone = [scan(model, [ids], peak=1.1, **QUIET).frame.assign(text=at) for at, ids in enumerate(texts)]
    whole = scan(model, texts, peak=1.1, **QUIET)
    together = pd.concat(alone, ignore_index=True)
    for name in (*ATTENTION_MEASURES, "resid_others", "massive_2", "median_abs"):
        np.testing.assert_allclose(together[name].to_numpy(), whole.frame[name].to_numpy(), rtol=1e-4, atol=1e-5)
    assert together["sink_tokens"].tolist() == whole.frame["sink_tokens"].tolist()


def test_a_long_neighbour_changes_nothing(tiny: Any) -> None:
    """Longer than what the median samples: its spacing is each text's own."""
    model = tiny("llama", max_position_embeddings=512)
    short, long = token_ids(20, 8)[0], token_ids(21, 300)[0]
    alone = [scan(model, [ids], **QUIET).frame["median_abs"].dropna().to_numpy() for ids in (short, long)]
    together = scan(model, [short, long], **QUIET).frame["median_abs"].dropna().to_numpy()
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 50), length=st.integers(2, 25))
def test_masses_are_probabilities(seed: int, length: int) -> None:
    model = load_model(tiny_hf("llama"), tiny_tokenizer(), check=False)
    heads = scan(model, token_ids(seed, length), peak=1.05, **QUIET).frame.query("head >= 0")
    for name in ("mass_first", "mass_sinks"):
        known = heads[name].dropna()
        assert ((known >= 0) & (known <= 1 + 1e-5)).all()
    # Query 0 sees key 0 alone.
    assert (heads["mass_first"] >= 1 / length - 1e-5).all()


def test_out_of_memory_halves_the_batch(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from interp.sinks import sink_probe

    model, texts = tiny(), token_ids(4, 9, 9, 9, 9)
    expected = scan(model, texts, **QUIET)
    original, failed = sink_probe.attention_measures, []

    def sometimes(seen: Any, mask: Any, *rest: Any) -> Any:
        if len(mask) > 2:
            failed.append(len(mask))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(seen, mask, *rest)

    monkeypatch.setattr(sink_probe, "attention_measures", sometimes)
    assert_same(scan(model, texts, **QUIET), expected)
    assert failed == [4]


def test_bfloat16_runs_and_is_near(tiny: Any) -> None:
    model = tiny()
    half = load_model(tiny_hf("llama"), tiny_tokenizer(), dtype="bfloat16")
    texts = token_ids(5, 12, 12)
    a, b = (scan(m, texts, peak=1.5, **QUIET).frame["mass_first"] for m in (model, half))
    assert b.dtype == np.float32
    assert np.nanmax(np.abs(a - b)) < 0.1


def test_output_factors_keep_norms() -> None:
    weight = torch.randn(3, 4, 10)
    vectors = torch.randn(3, 7, 4)
    assert torch.allclose((vectors @ output_factors(weight)).norm(dim=-1), (vectors @ weight).norm(dim=-1), atol=1e-5)


def test_a_planted_peak_is_the_sink(tiny: Any) -> None:
    """One word's embedding is made 100 times longer: it is the sink wherever it stands, and is named."""
    model = tiny()
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[40] *= 100
    result = scan(model, {"late": [[5, 6, 40, 7, 8, 9, 10]], "none": [[5, 6, 7, 8, 9, 10, 11]]}, peak=10, **QUIET)
    tokens = result.sink_tokens()
    assert tokens[["domain", "token_id", "first", "texts"]].values.tolist() == [["late", 40, 0.0, 1.0]]
    layer = result.frame.query("head < 0 and domain == 'late'")
    assert (layer["massive_1_position"] == 2).all()
    assert (layer["resid_sinks"] > 10 * layer["resid_others"]).all()
    assert result.frame.query("head >= 0 and domain == 'none'")["mass_sinks"].isna().all()


def test_find_sinks_ignores_padding() -> None:
    norms = torch.tensor([[1.0, 30.0, 1.2, 1e9]])
    assert find_sinks(norms, torch.tensor([[True, True, True, False]]), 10.0).tolist() == [[False, True, False, False]]


def test_chosen_layers_only(tiny: Any) -> None:
    model, texts = tiny(), token_ids(6, 8, 8)
    part, whole = scan(model, texts, layers=[-1, 0], **QUIET), scan(model, texts, **QUIET)
    assert sorted(part.frame.query("head >= 0")["layer"].unique()) == [0, 2]
    assert sorted(part.frame.query("head < 0")["layer"].unique()) == [0, 1, 2]
    keys = ["text", "layer", "head"]
    merged = part.frame.merge(whole.frame, on=keys, suffixes=("", "_w"))
    assert len(merged) == len(part.frame)
    assert np.allclose(merged["mass_first"], merged["mass_first_w"], equal_nan=True)


def test_saved_and_loaded(tiny: Any, tmp_path: Path) -> None:
    result = scan(tiny(), {"a": token_ids(7, 8, 8), "b": token_ids(8, 8)}, peak=1.1, **QUIET)
    loaded = load_result(result.save(tmp_path / "scan.parquet"))
    assert isinstance(loaded, Scan)
    assert loaded.equals(result)
    assert loaded.heads().equals(result.heads())


def test_summaries_against_pandas(tiny: Any) -> None:
    result = scan(tiny(), {"a": token_ids(9, 8, 8, 8), "b": token_ids(10, 8, 8)}, **QUIET)
    heads = result.heads().set_index(["measure", "domain", "layer", "head"])
    rows = result.frame.query("head >= 0").assign(value_ratio=lambda f: f["value_first"] / f["value_others"])
    expected = rows.groupby(["domain", "layer", "head"], observed=True)[["mass_first", "value_ratio"]].mean()
    for measure in ("mass_first", "value_ratio"):
        assert np.allclose(heads.loc[measure, "mean"].sort_index(), expected[measure].sort_index(), rtol=1e-5)
    known = heads.loc["mass_first"]
    assert ((known["low"] <= known["mean"]) & (known["mean"] <= known["high"])).all()
    assert known["n"].unique().tolist() == [3, 2]
    rate = result.sink_rate([0.2, 0.3])
    share = (
        rows.assign(above=rows["mass_first"] > 0.3).groupby(["domain", "layer", "head"], observed=True)["above"].mean()
    )
    found = rate[rate["epsilon"] == 0.3].set_index(["domain", "layer", "head"])["rate"]
    assert np.allclose(found.sort_index(), share.sort_index())
    massive = result.massive_activations()
    assert len(massive) == 2 * 3
    assert massive["share"].between(0, 1).all()


def test_one_text_has_means_and_no_intervals(tiny: Any) -> None:
    heads = scan(tiny(), token_ids(11, 9), **QUIET).heads(["mass_first"])
    assert heads["mean"].notna().all()
    assert heads[["low", "high"]].isna().all(axis=None)


def test_resumed_after_a_kill_is_the_same(tiny: Any, tmp_path: Path) -> None:
    """The process is killed after its second shard; the folder goes on from there and equals an uninterrupted run."""
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import torch; torch.set_num_threads(1)
from tiny_models import tiny_hf, tiny_tokenizer
from interp import load_model, shards
from interp.sinks import scan
model = load_model(tiny_hf("llama"), tiny_tokenizer())
write, done = shards.ShardedRun.write, []
def killed(self, *a):
    write(self, *a); done.append(1)
    if len(done) == 2: os.kill(os.getpid(), 9)
shards.ShardedRun.write = killed
texts = {{"a": {token_ids(12, *[8] * 6)}, "b": {token_ids(13, *[8] * 3)}}}
scan(model, texts, max_tokens=16, out={str(tmp_path / "run")!r}, progress=False)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    texts = {"a": token_ids(12, *[8] * 6), "b": token_ids(13, *[8] * 3)}
    model = tiny()
    with pytest.raises(ResultError, match="unfinished"):
        load_result(tmp_path / "run")
    shards = sorted((tmp_path / "run").glob("*.parquet"))
    assert len(shards) == 2
    stamps = [path.stat().st_mtime_ns for path in shards]
    resumed = scan(model, texts, max_tokens=16, out=tmp_path / "run", **QUIET)
    assert [path.stat().st_mtime_ns for path in shards] == stamps
    fresh = scan(model, texts, max_tokens=16, out=tmp_path / "fresh", **QUIET)
    assert resumed.equals(fresh)
    assert_same(resumed, scan(model, texts, **QUIET))
    with pytest.raises(ResultError, match="another run"):
        scan(model, {**texts, "b": token_ids(14, 8, 8, 8)}, max_tokens=16, out=tmp_path / "run", **QUIET)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ({}, {}, "no domain"),
        ({"a": []}, {}, "domain 'a' has no texts"),
        ({"a": [[5], []]}, {}, "domain 'a': text 1 is empty"),
        ({"a": [[5, 6, 7, 8], [5]]}, {"length": 4}, "1 of 2 texts are shorter than the 4 tokens needed .text 1 has 1"),
        ({"a": [[5, 6, 7], [5]]}, {}, "1 of 2 texts are shorter than the 2 tokens needed .text 1 has 1"),
        ({"a": [[5] * 65]}, {}, "context is 64"),
        ({"a": [[99]]}, {}, "outside the model's vocabulary"),
        ({"a": [[5, 6, 7]]}, {"length": 1}, "length=1; expected at least 2 tokens"),
        ({"a": [[5, 6, 7]]}, {"layers": [3]}, "layer 3 is out of range"),
        ({"a": [[5, 6, 7]]}, {"layers": []}, "layers is empty"),
        ({"a": [[5, 6, 7]]}, {"engine": "flash"}, "expected one of fused, eager"),
        ({"a": [[5, 6, 7]]}, {"peak": 1}, "peak=1"),
        ({"a": [[5, 6, 7]]}, {"peak": float("nan")}, "peak=nan"),
        ({3: [[5]]}, {}, "must be a string"),
    ],
)
def test_bad_input(tiny: Any, texts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scan(tiny(), texts, **options, **QUIET)


def test_length_cuts_texts_longer_than_the_context(tiny: Any) -> None:
    result = scan(tiny(), {"a": ["the " * 90, [5] * 80]}, length=16, **QUIET)
    assert result.frame["n_tokens"].unique().tolist() == [16]


def test_encoders_are_refused() -> None:
    with pytest.raises(InputError, match="both directions"):
        scan(load_model(tiny_encoder()), [[5, 6, 7]], **QUIET)


def test_a_layer_without_softmax_attention_is_named(tiny: Any) -> None:
    """Layer 1's attention is replaced by a module that never calls the attention function."""

    class Linear(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.o_proj = inner.o_proj

        def forward(self, hidden_states: Any, **_: Any) -> Any:
            return self.o_proj(hidden_states), None

    model = tiny()
    model.hf.model.layers[1].self_attn = Linear(model.hf.model.layers[1].self_attn)
    with pytest.raises(ModelError, match=r"layer 1 \(Linear\) did not call softmax attention"):
        scan(model, token_ids(15, 6), **QUIET)
    rest = scan(model, token_ids(15, 6), layers=[0, 2], **QUIET)
    assert sorted(rest.frame.query("head >= 0")["layer"].unique()) == [0, 2]


def test_eager_refuses_what_cannot_fit(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp.batching.available_memory", lambda device: 10_000)
    with pytest.raises(MemoryBudgetError, match="engine='fused' needs far less"):
        scan(tiny(), token_ids(16, 40), engine="eager", **QUIET)


@pytest.mark.slow
def test_engines_agree_on_the_embedded_model(embedded: Any) -> None:
    source = Path(np.__file__).read_text(encoding="utf-8")
    code = [[0, *embedded.tokenizer(source, verbose=False)["input_ids"][at : at + 199]] for at in (0, 200, 400)]
    fused, eager = (scan(embedded, {"code": code}, engine=engine, **QUIET) for engine in ("fused", "eager"))
    a, b = numbers(fused), numbers(eager)
    for name in ("mass_first", "mass_sinks"):
        assert np.nanmax(np.abs(a[name] - b[name])) < 1e-5
    for name in ("value_first", "value_others", "output_norm", "delta_logit", "resid_first", "massive_1"):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-4)
    # What the literature says of such models: the first token's residual norm is far above the others'.
    ratio = fused.layers(["resid_ratio"]).set_index("layer")["mean"]
    assert ratio[15] > 50


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_offloaded_weights_change_nothing(tiny: Any, family: str) -> None:
    """With weights kept elsewhere by accelerate, as under `device_map`, parameters are meta tensors between the layers."""
    from accelerate import cpu_offload

    from interp.sinks import ablate, residual_peak_origin

    texts = {"a": token_ids(30, 9, 9), "b": token_ids(31, 9, 6)}
    model = tiny(family)
    expected = scan(model, texts, peak=1.2, **QUIET)
    loss = ablate(model, [(1, 2)], texts, n_random=0, **QUIET).frame["delta_loss"]
    peaks = residual_peak_origin(model, texts, layers=[0], n_controls=0, **QUIET).frame["norm_sink"]
    cpu_offload(model.hf, execution_device=torch.device("cpu"))
    assert model.arch.o_proj(0).weight.is_meta
    assert_same(scan(model, texts, peak=1.2, **QUIET), expected)
    assert np.allclose(ablate(model, [(1, 2)], texts, n_random=0, **QUIET).frame["delta_loss"], loss, atol=1e-6)
    again = residual_peak_origin(model, texts, layers=[0], n_controls=0, **QUIET).frame["norm_sink"]
    assert np.allclose(again, peaks, rtol=1e-5)
