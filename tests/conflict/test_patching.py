"""Patching against whole forward passes one at a time; summaries by hand; interruptions, out of memory, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chat_models import chat_tiny, chat_tokenizer
from plain_patches import patched_preference, preference
from scipy.stats import hypergeom, spearmanr
from tiny_models import tiny_encoder, tiny_hf

from interp.conflict import kept_keys, patch_plots, patched_runs, patching
from interp.conflict.contrasts import Contrast, make_contrast
from interp.conflict.kept_keys import keeps_keys
from interp.conflict.pairs import encode_pair, make_pair
from interp.conflict.patched_runs import packs
from interp.conflict.patching import PATCH_COLUMNS, patch
from interp.conflict.recoveries import agreement_with_drift, ratio_interval, recovery, restoring_layers, thirds
from interp.conflict.wordings import Task
from interp.errors import InputError, MemoryBudgetError, ResultError
from interp.model import load_model
from interp.provenance import Provenance
from interp.results import Result, load_result

SITES = ("attn_out", "resid_post", "head")
PAIRS = [
    make_pair("case", "capitals", "small", task=Task("sky", "training", "Sky?")),
    make_pair("case", "small", "capitals", task=Task("sky", "training", "Sky?")),
    make_pair("case", "capitals", "small", task=Task("sea", "training", "What is the sea?")),
]
TEXTS = {PAIRS[0].id: ("ON", "on it"), PAIRS[1].id: ("up", "UP AND ON"), PAIRS[2].id: ("a SEA", "a sea")}


def contrasts_of(model: Any, texts: dict[str, tuple[str, str]] = TEXTS) -> dict[str, Contrast]:
    return {name: make_contrast(model, *both) for name, both in texts.items()}


def run(model: Any, pairs: Any = PAIRS, **options: Any) -> Result:
    given = {"contrasts": contrasts_of(model), "answer_tokens": 4, "progress": False, **options}
    return patch(model, pairs, **given)


def plain(model: Any, result: Result, row: Any, donor: int | None = None) -> tuple[float, float, float]:
    """(consistent, conflict, patched) of one row, each from whole forward passes."""
    at = next(at for at, pair in enumerate(PAIRS) if pair.id == row.pair)
    consistent = result.provenance.parameters["consistent"]
    both = encode_pair(model, PAIRS[at], (consistent, "conflict"))
    given = both if donor is None else encode_pair(model, PAIRS[donor], (consistent,))
    answers = contrasts_of(model)[row.pair].cut(4).ids
    ids = both["conflict"].ids
    patched = patched_preference(
        model.hf, ids, given[consistent].ids, answers, row.site, row.layer, row.head, row.n_patched, model.arch.d_head
    )
    return preference(model.hf, both[consistent].ids, answers), preference(model.hf, ids, answers), patched


def check_rows(model: Any, result: Result, every: int, tolerance: float) -> None:
    for row in list(result.frame.itertuples())[::every]:
        found = (row.logdiff_consistent, row.logdiff_conflict, row.logdiff_patched)
        np.testing.assert_allclose(found, plain(model, result, row), atol=tolerance)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox"])
def test_every_site_as_a_plain_forward(name: str) -> None:
    cap = {"final_logit_softcapping": 5.0} if name == "gemma2" else {}
    window = {"sliding_window": 48} if name in ("mistral", "gemma2", "gemma3") else {}
    model = chat_tiny(name, **cap, **window)
    result = run(model, site=SITES)
    assert len(result.frame) == 3 * 3 * (1 + 1 + 4)
    # The template's "<|im_end|>", line ends and "<|im_start|>assistant", where every byte is a token.
    assert set(result.frame["n_patched"]) == {1 + 1 + 1 + len("assistant") + 1}
    check_rows(model, result, 5, 1e-5)
    effects = (result.frame["logdiff_patched"] - result.frame["logdiff_conflict"]).abs()
    least = effects.groupby([result.frame["site"], result.frame["layer"]], observed=True).max().min()
    assert least > 1e-4  # ten times the tolerance


@pytest.mark.parametrize("window", [5, 20, 100])
def test_windows_shorter_than_the_suffix_and_longer_than_a_prompt(window: int) -> None:
    model = chat_tiny("mistral", sliding_window=window)
    result = run(model, site=("attn_out", "resid_post"), consistent="none")
    check_rows(model, result, 4, 1e-4)
    changed = (result.frame["logdiff_patched"] - result.frame["logdiff_conflict"]).abs().max() > 1e-4
    assert changed == (window > 5)  # tokens that see nothing but the suffix, as in both prompts, differ in nothing


def test_eager_attention_and_the_last_token_alone() -> None:
    model = chat_tiny("qwen2")
    model.hf.set_attn_implementation("eager")
    result = run(model, site=SITES, positions="last", consistent="system")
    assert set(result.frame["n_patched"]) == {1}
    check_rows(model, result, 4, 1e-4)


def test_the_patch_of_another_task() -> None:
    model = chat_tiny()
    result = run(model, site=("attn_out", "head"), donor="other")
    assert set(result.frame["pair"]) == {PAIRS[0].id, PAIRS[2].id}
    assert list(result.attachments["left_out"]) == [PAIRS[1].id]
    assert "no other task" in result.attachments["left_out"][PAIRS[1].id]
    for row in list(result.frame.itertuples())[::3]:
        donor = 2 if row.pair == PAIRS[0].id else 0
        assert row.logdiff_patched == pytest.approx(plain(model, result, row, donor)[2], abs=1e-4)
    own = run(model, site=("attn_out", "head")).frame
    same = own[own["pair"] != PAIRS[1].id]
    assert (result.frame["logdiff_patched"] - same["logdiff_patched"].to_numpy()).abs().max() > 1e-4
    with pytest.raises(InputError, match="no pair has another task"):
        run(model, PAIRS[:2], donor="other")


def test_bfloat16() -> None:
    model = load_model(
        tiny_hf("llama", vocab_size=260, max_position_embeddings=1024), chat_tokenizer(), dtype="bfloat16"
    )
    result = run(model, site="attn_out")
    check_rows(model, result, 2, 0.2)
    assert result.frame["logdiff_patched"].notna().all()
    # Log-probabilities of bfloat16 logits, computed in float32: not rounded to multiples of 1/64.
    assert any(abs(value * 64 - round(value * 64)) > 1e-3 for value in result.frame["logdiff_conflict"])


def test_batches_groups_and_kept_keys_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chat_tiny("gemma3", sliding_window=512)
    assert packs(model, 512)
    whole = run(model, site=SITES).frame
    pd.testing.assert_frame_equal(run(model, site=SITES, max_tokens=1).frame, whole, atol=1e-5)
    monkeypatch.setattr(kept_keys, "_KEPT", 0.0)  # keys and values on the CPU
    pd.testing.assert_frame_equal(run(model, site=SITES).frame, whole, atol=1e-6)
    monkeypatch.setattr(patched_runs, "packs", lambda *_: False)  # each answer in a row of its own
    pd.testing.assert_frame_equal(run(model, site=SITES).frame, whole, atol=1e-5)
    monkeypatch.setattr(patched_runs, "keeps_keys", lambda _: False)
    pd.testing.assert_frame_equal(run(model, site=SITES).frame, whole, atol=1e-5)
    monkeypatch.undo()
    monkeypatch.setattr(patching, "_GROUP", 1)
    keys = ["pair", "site", "layer", "head"]
    ours, theirs = (
        frame.astype({"site": str}).sort_values(keys, ignore_index=True)
        for frame in (run(model, site=SITES).frame, whole)
    )
    numbers = ["logdiff_consistent", "logdiff_conflict", "logdiff_patched"]
    pd.testing.assert_frame_equal(ours[[*keys, *numbers]], theirs[[*keys, *numbers]], atol=1e-5)


def test_answers_share_a_row_where_that_is_exact() -> None:
    for name in ("llama", "qwen3", "gpt2", "gpt_neox"):
        assert packs(chat_tiny(name), 1000)
    for name in ("mistral", "gemma3"):
        assert packs(chat_tiny(name, sliding_window=100), 100)
        assert not packs(chat_tiny(name, sliding_window=100), 101)
    model = chat_tiny()
    model.hf.config._attn_implementation = "flash_attention_2"
    assert not packs(model, 10)


def test_keys_are_kept_where_that_is_exact() -> None:
    for name in ("llama", "gemma3", "gpt2", "mistral"):
        assert keeps_keys(chat_tiny(name))
    model = chat_tiny("qwen3")
    model.arch.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    assert not keeps_keys(model)
    model.arch.config.layer_types = ["linear_attention"] * 3
    assert not keeps_keys(model)


def test_a_layer_that_writes_nothing_brings_nothing_back() -> None:
    model = chat_tiny()
    with torch.no_grad():
        model.arch.o_proj(1).weight[:, 4:8] = 0  # head 1 of width 4
    frame = run(model, site="head").frame
    silent = (frame["layer"] == 1) & (frame["head"] == 1)
    changes = (frame["logdiff_patched"] - frame["logdiff_conflict"]).abs()
    assert changes[silent].max() < 1e-6
    assert changes[~silent].groupby([frame["layer"], frame["head"]]).max().min() > 1e-5


def test_chosen_layers_and_heads() -> None:
    model = chat_tiny()
    frame = run(model, site=("attn_out", "head"), layers=[-1], heads=[(2, 1), (0, 3)]).frame
    assert set(zip(frame["site"], frame["layer"], frame["head"], strict=True)) == {("attn_out", 2, -1), ("head", 2, 1)}
    frame = run(model, site="head", heads=[(2, 1), (0, -1), (2, 1)]).frame
    assert set(zip(frame["layer"], frame["head"], strict=True)) == {(2, 1), (0, 3)}
    assert len(frame) == 6
    full = run(model, site="head").frame.set_index(["pair", "layer", "head"])["logdiff_patched"]
    for row in frame.itertuples():
        assert row.logdiff_patched == pytest.approx(full[row.pair, row.layer, row.head], abs=1e-5)


def test_work_is_a_fifth_of_plain_passes() -> None:
    model = chat_tiny(num_hidden_layers=8)
    tokens = 0

    def count(module: Any, args: Any) -> None:
        nonlocal tokens
        tokens += args[0].shape[0] * args[0].shape[1]

    for layer in range(8):
        model.arch.o_proj(layer).register_forward_pre_hook(count)
    result = run(model, positions="last")
    ours, tokens = tokens, 0
    check_rows(model, result, 24, 1e-4)
    runs = 2 * 2 * 1 + 2  # both prompts with two answers each, the donor, and one patched run of two answers
    per_run = tokens / runs
    assert ours < 8 * 2 * len(PAIRS) * per_run / 5


def test_out_of_memory_halves_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain_run = chat_tiny("qwen3"), patched_runs._run
    whole = run(model, layers=[1]).frame
    sizes: list[int] = []

    def small(model: Any, prepared: Any, rows: Any, layer: int) -> Any:
        hidden = plain_run(model, prepared, rows, layer)
        sizes.append(len(rows.lines))
        if len(rows.lines) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden

    monkeypatch.setattr(patched_runs, "_run", small)
    pd.testing.assert_frame_equal(run(model, layers=[1]).frame, whole, atol=1e-5)
    assert max(sizes) > 2

    def never(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(patched_runs, "_run", never)
    with pytest.raises(MemoryBudgetError):
        run(model, layers=[1])
    monkeypatch.undo()
    pd.testing.assert_frame_equal(run(model, layers=[1]).frame, whole, atol=1e-6)  # nothing stays behind


def test_out_of_memory_while_keys_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chat_tiny()
    whole = run(model).frame
    own, sizes = model.hf.base_model.forward, []

    def small(*args: Any, **named: Any) -> Any:
        sizes.append(len(named["input_ids"]))
        if sizes[-1] > 1 and "position_ids" not in named:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(*args, **named)

    monkeypatch.setattr(model.hf.base_model, "forward", small)
    pd.testing.assert_frame_equal(run(model).frame, whole, atol=1e-5)
    assert max(sizes) > 1


def test_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain_frame = chat_tiny(), patching._layer_frame
    monkeypatch.setattr(patching, "_GROUP", 2)
    whole = run(model, site=SITES)
    done: list[int] = []

    def interrupted(model: Any, base: Any, given: Any, table: Any, layer: int, *rest: Any) -> Any:
        if len(done) == 4:
            done.append(-1)
            raise KeyboardInterrupt
        done.append(layer)
        return plain_frame(model, base, given, table, layer, *rest)

    monkeypatch.setattr(patching, "_layer_frame", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, site=SITES, out=tmp_path / "run")
    found = run(model, site=SITES, out=tmp_path / "run")
    assert done == [0, 1, 2, 0, -1, 1, 2]
    pd.testing.assert_frame_equal(found.frame, whole.frame, atol=1e-6)
    assert load_result(tmp_path / "run").equals(found)
    assert len(run(model, site=SITES, out=tmp_path / "run").frame) == len(found.frame)
    assert done == [0, 1, 2, 0, -1, 1, 2]
    with pytest.raises(ResultError, match="positions"):
        run(model, site=SITES, positions="last", out=tmp_path / "run")
    other = contrasts_of(model, {**TEXTS, PAIRS[0].id: ("ON", "in")})
    with pytest.raises(ResultError, match="prompts"):
        run(model, site=SITES, contrasts=other, out=tmp_path / "run")


def test_left_out_and_attached() -> None:
    model = chat_tiny()
    found = contrasts_of(model, {PAIRS[0].id: TEXTS[PAIRS[0].id]})
    result = run(model, contrasts=found)
    assert set(result.frame["pair"]) == {PAIRS[0].id}
    assert result.attachments["left_out"] == dict.fromkeys([PAIRS[1].id, PAIRS[2].id], "no contrast was given")
    assert result.attachments["answers"] == {PAIRS[0].id: ["ON", "on it"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site": "mlp_out"}, "site 'mlp_out'; expected one of attn_out, resid_post, head"),
        ({"site": []}, "no layer or head to patch"),
        ({"layers": [3]}, "layer 3 is out of range"),
        ({"layers": []}, "no layer or head to patch"),
        ({"heads": [(0, 1)]}, "give site='head'"),
        ({"site": "head", "heads": [(0, 4)]}, "head 4 is out of range"),
        ({"site": "head", "heads": [3]}, "expected .layer, head. pairs"),
        ({"site": "head", "heads": []}, "no head was given"),
        ({"consistent": "conflict"}, "consistent='conflict'; expected one of none, system"),
        ({"positions": "all"}, "expected one of suffix, last"),
        ({"donor": "random"}, "expected one of same, other"),
        ({"answer_tokens": 0}, "answer_tokens=0"),
        ({"pairs": []}, "no pair was given"),
        ({"pairs": [PAIRS[0], PAIRS[0]]}, "two pairs have the id"),
        ({"contrasts": {}}, "none of 3 pairs has an answer under either rule"),
        ({"contrasts": {PAIRS[0].id: Contrast("a", "a", (5, 6), (5, 6))}}, "one answer is the other's beginning"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(chat_tiny(), **changes)


def test_encoders_and_short_contexts_are_refused() -> None:
    with pytest.raises(InputError, match="is an encoder"):
        patch(load_model(tiny_encoder()), PAIRS, progress=False)
    model = chat_tiny()
    longest = max(len(encode_pair(model, pair, ("conflict",))["conflict"].ids) for pair in PAIRS)
    with pytest.raises(
        InputError, match=f"a prompt of .* and an answer of .* exceed the context of {longest + 2} tokens"
    ):
        run(chat_tiny(max_position_embeddings=longest + 2))


def result_of(rows: list[tuple[str, str, str, int, int, float, float, float]]) -> Result:
    names = ["task", "pair", "site", "layer", "head", "logdiff_consistent", "logdiff_conflict", "logdiff_patched"]
    frame = pd.DataFrame(rows, columns=names).assign(
        family="case",
        system_rule="capitals",
        user_rule="small",
        wording="simple",
        setting="user",
        donor="same",
        n_patched=3,
    )
    return Result("conflict.patch", frame, PATCH_COLUMNS, Provenance())


def test_recovery_by_hand() -> None:
    # Task a has two pairs with gaps 2 and 4, task b one with gap 1; changes at layer 0: 1, 1, 1; at layer 1: 0, 0, 2.
    rows = []
    for task, pair, base, gap, changes in (
        ("a", "1", -1.0, 2.0, (1, 0)),
        ("a", "2", -3.0, 4.0, (1, 0)),
        ("b", "3", 0.5, 1.0, (1, 2)),
    ):
        rows += [(task, pair, "attn_out", layer, -1, base + gap, base, base + changes[layer]) for layer in (0, 1)]
    table = recovery(result_of(rows), ("layer",), n_resamples=500).set_index("layer")
    assert table.loc[0, "change"] == pytest.approx(1)
    assert table.loc[1, "change"] == pytest.approx(2 / 3)
    assert table["gap"].tolist() == pytest.approx([7 / 3] * 2)
    assert table.loc[0, "recovery"] == pytest.approx(3 / 7)  # a mean of ratios would be 7/12
    assert table.loc[1, "recovery"] == pytest.approx(2 / 7)
    # Tasks are drawn whole: aa, ab, ba, bb.
    assert (table.loc[0, "low"], table.loc[0, "high"]) == pytest.approx((2 / 6, 1.0))
    assert (table.loc[1, "low"], table.loc[1, "high"]) == pytest.approx((0.0, 2.0))
    assert (table.loc[1, "change_low"], table.loc[1, "change_high"]) == pytest.approx((0.0, 2.0))
    assert table.loc[0, "p"] == 0.5  # sums 2 and 1: 2 of the 4 signs are as far from zero
    assert table.loc[1, "p"] == 1.0
    assert table["q"].tolist() == pytest.approx([1.0, 1.0])
    assert table["n"].tolist() == [3, 3]
    assert table["n_tasks"].tolist() == [2, 2]
    by_pair = recovery(result_of(rows), ("pair", "layer"))
    assert by_pair.set_index(["pair", "layer"]).loc[("2", 0), "recovery"] == pytest.approx(1 / 4)
    assert by_pair[["low", "high", "p"]].isna().all(axis=None)  # one task each


def test_restoring_layers_by_hand() -> None:
    rows = [
        ("a", "1", site, layer, -1, 1.0, 0.0, change)
        for site, changes in (("attn_out", (0.1, 0.4, -0.9, 0.3, 0.2)), ("resid_post", (0.9, 0.1, 0.2, 0.3, 0.4)))
        for layer, change in enumerate(changes)
    ]
    assert restoring_layers(result_of(rows)) == [1]
    assert restoring_layers(result_of(rows), 3) == [1, 3, 4]
    assert restoring_layers(result_of(rows), 2, site="resid_post") == [0, 4]
    with pytest.raises(InputError, match="n=6; expected 1 … 5"):
        restoring_layers(result_of(rows), 6)
    with pytest.raises(InputError, match="site 'head' was not patched"):
        restoring_layers(result_of(rows), site="head")


def test_no_gap_no_recovery() -> None:
    rows = [(task, task, "attn_out", 0, -1, gap, 0.0, 0.5) for task, gap in (("a", -1.0), ("b", 0.5))]
    row = recovery(result_of(rows)).iloc[0]
    assert row["change"] == pytest.approx(0.5)
    assert np.isnan([row["recovery"], row["low"], row["high"]]).all()
    assert ratio_interval(np.array([1.0]), np.array([2.0]))[0] == 0.5
    assert np.isnan(ratio_interval(np.array([1.0]), np.array([2.0]))[1:]).all()


def test_agreement_with_drift_by_scipy() -> None:
    random = np.random.default_rng(0)
    changes = random.normal(size=(5, 12)) + np.arange(12) * 0.3  # (task, layer)
    rows = [
        (f"t{task}", f"p{task}", "attn_out", layer, -1, 1.0, 0.0, changes[task, layer])
        for task in range(5)
        for layer in range(12)
    ]
    drift = random.normal(size=12) + np.arange(12) * 0.2
    scores = pd.DataFrame({"layer": np.arange(12), "excess": drift})
    table = agreement_with_drift(result_of(rows), scores, top=4).set_index("what")
    expected = spearmanr(drift, changes.mean(0))
    assert table.loc["rank correlation", "value"] == pytest.approx(expected.statistic)
    assert table.loc["rank correlation", "p"] == pytest.approx(expected.pvalue, abs=0.03)
    assert table.loc["rank correlation", "low"] <= expected.statistic <= table.loc["rank correlation", "high"]
    shared = len(set(np.argsort(drift)[-4:]) & set(np.argsort(changes.mean(0))[-4:]))
    assert table.loc["shared top", "value"] == shared
    assert table.loc["shared top", "expected"] == pytest.approx(16 / 12)
    assert table.loc["shared top", "p"] == pytest.approx(sum(hypergeom.pmf(k, 12, 4, 4) for k in range(shared, 5)))
    # Layers in another order, and one that was not scored, change nothing but the number.
    again = agreement_with_drift(result_of(rows), scores.iloc[::-1], top=4).set_index("what")
    pd.testing.assert_frame_equal(again, table)
    assert set(agreement_with_drift(result_of(rows), scores.drop(index=3))["n"]) == {11}


def test_agreement_refuses() -> None:
    rows = [("a", "1", "attn_out", layer, -1, 1.0, 0.0, 0.5) for layer in range(4)]
    scores = pd.DataFrame({"layer": range(4), "excess": range(4)})
    for changed, options, message in (
        (scores.drop(columns="excess"), {}, "no column 'excess'"),
        (pd.concat([scores, scores]), {}, "two rows of one layer"),
        (scores.iloc[:2], {}, "2 layers or heads"),
        (scores, {"site": "head"}, "site 'head' was not patched; the result has attn_out"),
        (scores, {"top": 5}, "top=5; expected 1 … 4"),
        (scores, {"level": 1.0}, "level=1.0"),
    ):
        with pytest.raises(InputError, match=message):
            agreement_with_drift(result_of(rows), changed, **options)
    other = Result("conflict.follow", result_of(rows).frame, PATCH_COLUMNS, Provenance())
    with pytest.raises(InputError, match=r"kind 'conflict\.follow'; expected"):
        agreement_with_drift(other, scores)
    with pytest.raises(InputError, match="by=\\['colour'\\]"):
        recovery(result_of(rows), ("colour",))


def test_thirds_by_hand() -> None:
    # 7 layers: first 0…2, middle 3…4, last 5…6.
    rows = [
        (task, task, "attn_out", layer, -1, 2.0, 0.0, change * (layer in (3, 4)))
        for task, change in (("a", 1.0), ("b", 0.5))
        for layer in range(7)
    ]
    table = thirds(result_of(rows)).set_index("what")
    assert table["layers"].tolist() == ["0…2", "3…4", "5…6", "3…4"]
    assert table["mean"].tolist() == pytest.approx([0, 1.5 / 4, 0, 1.5 / 4])
    assert table.loc["middle − others", ["low", "high"]].tolist() == pytest.approx([0.25, 0.5])
    assert table.loc["middle − others", "p"] == 0.5
    shifted = thirds(result_of(rows), 12).set_index("what")  # of 12 layers: 0…3, 4…7, 8…11
    assert shifted.loc["first", "mean"] == pytest.approx(1.5 / 4 / 4)
    with pytest.raises(InputError, match="n_layers=5"):
        thirds(result_of(rows), 5)


def test_plots() -> None:
    model = chat_tiny()
    result = run(model, site=SITES)
    table = recovery(result)
    measure = "recovery" if table["recovery"].notna().all() else "change"
    drawn = patch_plots.patch(result)
    lines = {trace.name: trace for trace in drawn.data if trace.mode == "lines+markers"}
    assert list(lines) == ["attention output", "residual stream after the layer"]
    np.testing.assert_allclose(lines["attention output"].y, table[table["site"] == "attn_out"][measure], rtol=1e-5)
    heat = patch_plots.patch(result, view="heads").data[0]
    assert np.asarray(heat.z).shape == (4, 3)
    rows = table[table["site"] == "head"].set_index(["head", "layer"])[measure]
    assert float(np.asarray(heat.z)[1, 2]) == pytest.approx(rows[1, 2], rel=1e-5)
    assert heat.zmax == -heat.zmin
    sparse = patch_plots.patch(run(model, site="head", heads=[(0, 1), (2, 1), (2, 3)])).data[0]
    assert np.asarray(sparse.customdata).tolist() == [[[0, 1], [2, 1]], [[0, 3], [2, 3]]]
    assert np.isnan(np.asarray(sparse.z)[1, 0])
    assert patch_plots.patch(run(model, site="head")).data[0].type == "heatmap"
    with pytest.raises(InputError, match="no heads were patched; call patch with site='head'"):
        patch_plots.patch(run(model), view="heads")
    with pytest.raises(InputError, match="expected 'layers' or 'heads'"):
        patch_plots.patch(result, view="tokens")


@pytest.mark.slow
def test_embedded_model_as_a_plain_forward(embedded: Any) -> None:
    texts = {
        PAIRS[0].id: ("THE SKY IS BLUE.", "the sky is blue."),
        PAIRS[2].id: ("THE SEA IS WATER.", "the sea is water."),
    }
    pairs = [PAIRS[0], PAIRS[2]]
    made = contrasts_of(embedded, texts)
    result = patch(embedded, pairs, site=("attn_out", "head"), layers=[0, 14, 29], contrasts=made, progress=False)
    chosen = result.frame[(result.frame["head"] == -1) | (result.frame["head"] == 4)]
    for row in chosen.itertuples():
        pair = next(pair for pair in pairs if pair.id == row.pair)
        both = encode_pair(embedded, pair, ("agree", "conflict"))
        expected = patched_preference(
            embedded.hf,
            both["conflict"].ids,
            both["agree"].ids,
            made[row.pair].cut(12).ids,
            row.site,
            row.layer,
            row.head,
            row.n_patched,
            64,
        )
        assert row.logdiff_patched == pytest.approx(expected, abs=1e-4)
