"""Sets of heads ablated together, against whole forward passes with hooks; random sets; summaries by hand."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chat_models import chat_tiny, chat_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from plain_patches import hooked, kept, preference
from tiny_models import tiny_hf
from torch import Tensor

from interp.conflict import head_ablation, patch_plots, patched_runs
from interp.conflict.contrasts import Contrast, make_contrast
from interp.conflict.head_ablation import (
    HEAD_ABLATION_COLUMNS,
    ablate_heads,
    ablation_summary,
    random_sets,
    set_changes,
)
from interp.conflict.pairs import encode_pair, make_pair
from interp.conflict.wordings import Task
from interp.errors import InputError, ResultError
from interp.model import load_model
from interp.provenance import Provenance
from interp.results import Result, load_result

PAIRS = [
    make_pair("case", "capitals", "small", task=Task("sky", "training", "Sky?")),
    make_pair("case", "small", "capitals", task=Task("sea", "training", "What is the sea?")),
]
HEADS = [(2, 1), (0, 3), (2, 0)]
D_HEAD = 4


def contrasts_of(model: Any) -> dict[str, Contrast]:
    return {PAIRS[0].id: make_contrast(model, "ON", "on it"), PAIRS[1].id: make_contrast(model, "up", "UP AND ON")}


def run(model: Any, heads: Any = HEADS, **options: Any) -> Result:
    given = {"contrasts": contrasts_of(model), "answer_tokens": 4, "n_random_sets": 2, "progress": False, **options}
    return ablate_heads(model, given.pop("pairs", PAIRS), heads, **given)


def mean_z(model: Any, layer: int, positions: str) -> Tensor:
    """(back, width) or (1, width) mean over both prompts of both pairs."""
    found = []
    for pair in PAIRS:
        for encoded in encode_pair(model, pair, ("agree", "conflict")).values():
            z = kept(model.hf, encoded.ids, "z", layer)
            found.append(z if positions == "all" else z[-encoded.suffix :].flip(0)[None])
    return torch.cat(found).mean(0, keepdim=positions == "all")


def plain(model: Any, pair: Any, heads: Any, mode: str, positions: str) -> float:
    """The preference in the conflicting prompt, one whole pass per answer."""
    encoded = encode_pair(model, pair, ("conflict",))["conflict"]
    n = len(encoded.ids)

    def change(layer: int, columns: list[int]) -> Any:
        mean = mean_z(model, layer, positions)

        def visit(z: Tensor) -> Tensor:
            z = z.clone()
            for position in range(z.shape[1]) if positions == "all" else range(n - encoded.suffix, n):
                value = mean[0] if positions == "all" else mean[n - 1 - position]
                z[0, position, columns] = 0 if mode == "zero" else value[columns]
            return z

        return visit

    columns = {
        layer: [h * D_HEAD + at for where, h in heads if where == layer for at in range(D_HEAD)] for layer, _ in heads
    }
    changes = {
        layer: change(layer, some) for layer, some in columns.items()
    }  # before any hook: means are of the plain model
    with contextlib.ExitStack() as stack:
        for layer, visit in changes.items():
            stack.enter_context(hooked(model.hf, "z", layer, visit))
        return preference(model.hf, encoded.ids, contrasts_of(model)[pair.id].cut(4).ids)


@pytest.mark.parametrize("positions", ["suffix", "all"])
@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_sets_as_plain_forwards(name: str, mode: str, positions: str) -> None:
    model = chat_tiny(name, **({"sliding_window": 48} if name == "gemma3" else {}))
    result = run(model, mode=mode, positions=positions)
    sets = result.attachments["sets"]
    assert sets[0] == [[0, 3], [2, 0], [2, 1]]
    assert len(result.frame) == 2 * 3
    for row in result.frame.itertuples():
        pair = next(pair for pair in PAIRS if pair.id == row.pair)
        expected = plain(model, pair, [tuple(head) for head in sets[row.set]], mode, positions)
        assert row.logdiff_ablated == pytest.approx(expected, abs=1e-5)
        ids = encode_pair(model, pair, ("conflict",))["conflict"].ids
        assert row.logdiff_conflict == pytest.approx(
            preference(model.hf, ids, contrasts_of(model)[pair.id].cut(4).ids), abs=1e-5
        )
    assert set_changes(result).abs().to_numpy().max() > 1e-3


def test_bfloat16_and_batches() -> None:
    model = load_model(
        tiny_hf("llama", vocab_size=260, max_position_embeddings=1024), chat_tokenizer(), dtype="bfloat16"
    )
    for row in run(model, mode="mean", n_random_sets=0).frame.itertuples():
        pair = next(pair for pair in PAIRS if pair.id == row.pair)
        assert row.logdiff_ablated == pytest.approx(plain(model, pair, HEADS, "mean", "suffix"), abs=0.2)
    model = chat_tiny("qwen3")
    for positions in ("suffix", "all"):
        one = run(model, positions=positions, max_tokens=1).frame
        pd.testing.assert_frame_equal(one, run(model, positions=positions).frame, atol=1e-5)


def test_out_of_memory_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain_run = chat_tiny(), patched_runs._run
    whole = run(model, mode="mean", n_random_sets=1).frame

    sizes: list[int] = []

    def small(model: Any, prepared: Any, rows: Any, layer: int) -> Any:
        sizes.append(len(rows.lines))
        if len(rows.lines) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain_run(model, prepared, rows, layer)

    monkeypatch.setattr(patched_runs, "_run", small)
    pd.testing.assert_frame_equal(run(model, mode="mean", n_random_sets=1).frame, whole, atol=1e-5)
    assert max(sizes) > 1


def test_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain_change = chat_tiny(), head_ablation._ablation
    whole = run(model)
    done: list[int] = []

    def interrupted(*given: Any) -> Any:
        done.append(len(done))
        if len(done) == 2:
            raise KeyboardInterrupt
        return plain_change(*given)

    monkeypatch.setattr(head_ablation, "_ablation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, out=tmp_path / "run")
    found = run(model, out=tmp_path / "run")
    assert len(done) == 4  # the set that was done is not run again
    pd.testing.assert_frame_equal(found.frame, whole.frame, atol=1e-6)
    assert load_result(tmp_path / "run").attachments == whole.attachments
    with pytest.raises(ResultError, match="seed is 0 there and 1 here"):
        run(model, out=tmp_path / "run", seed=1)


@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_random_sets(n_layers: int, n_heads: int, drawn: Any) -> None:
    every = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    heads = drawn.draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    if len(heads) > len(every) - len(heads):
        with pytest.raises(InputError, match="heads are left beside"):
            random_sets(heads, 1, (n_layers, n_heads))
        return
    sets = random_sets(heads, 3, (n_layers, n_heads), seed=drawn.draw(st.integers(0, 9)))
    for found in sets:
        assert len(found) == len(set(found)) == len(heads)
        assert set(found) <= set(every) - set(heads)
        for layer in range(n_layers):
            asked = sum(at == layer for at, _ in heads)
            there = sum(at == layer for at, _ in found)
            assert there >= min(asked, n_heads - asked)
            if all(2 * sum(at == other for at, _ in heads) <= n_heads for other in range(n_layers)):
                assert there == asked


def test_random_sets_are_drawn_evenly_and_by_seed() -> None:
    sets = random_sets([(1, 0)], 4000, (2, 5), seed=1)
    counts = pd.Series([tuple(found[0]) for found in sets]).value_counts()
    assert set(counts.index) == {(1, head) for head in range(1, 5)}
    assert counts.min() > 900
    assert random_sets([(1, 0)], 5, (2, 5), seed=1) == sets[:5]
    assert random_sets([(1, 0)], 50, (2, 5), seed=2) != sets[:50]


def result_of(changes: dict[tuple[str, str], list[float]]) -> Result:
    """{(task, pair): change by set}."""
    rows = [
        (task, pair, "focal" if at == 0 else "random", at, 0.5, 0.5 + change)
        for (task, pair), some in changes.items()
        for at, change in enumerate(some)
    ]
    frame = pd.DataFrame(rows, columns=["task", "pair", "arm", "set", "logdiff_conflict", "logdiff_ablated"])
    frame = frame.assign(family="case", system_rule="a", user_rule="b", wording="simple", setting="user", n_heads=2)
    sets = [[[0, 1], [1, 1]]] * (1 + int(frame["set"].max()))
    return Result("conflict.ablate_heads", frame, HEAD_ABLATION_COLUMNS, Provenance(), {"sets": sets})


def test_summary_by_hand() -> None:
    # Focal means: (1 + 3 + 2) / 3 = 2; random sets: 2, −3, 0.
    result = result_of({("a", "1"): [1.0, 2, -3, 0], ("a", "2"): [3.0, 2, -3, 0], ("b", "3"): [2.0, 2, -3, 0]})
    table = ablation_summary(result).set_index("what")
    assert table["mean"].tolist() == pytest.approx([2, -1 / 3, 2 + 1 / 3, 2, 5 / 3, 1 / 3])
    assert table.loc["focal", "p_sets"] == pytest.approx((1 + 2) / 4)  # 2 and −3 are as far from zero
    assert table.loc["focal", "p"] == 0.5
    assert (table.loc["focal", "low"], table.loc["focal", "high"]) == pytest.approx((2, 2))  # every task's mean is 2
    assert table["n_sets"].tolist() == [3] * 6
    assert (table["n"].tolist(), table["n_tasks"].tolist()) == ([3] * 6, [2] * 6)
    # A set that moves one pair up and the other down moves both
    torn = ablation_summary(result_of({("a", "1"): [4.0, 1, 1], ("b", "2"): [-4.0, 1, 1]})).set_index("what")
    assert torn.loc[["focal", "random", "|focal|", "|random|", "|focal| − |random|"], "mean"].tolist() == [
        0,
        1,
        4,
        1,
        3,
    ]
    assert torn.loc[["focal", "|focal|"], "p_sets"].tolist() == pytest.approx([1, 1 / 3])
    assert torn.loc[["|focal|", "|random|", "random"], "p"].isna().all()
    alone = ablation_summary(result_of({("a", "1"): [1.0]}))
    assert alone["what"].tolist() == ["focal", "|focal|"]
    assert alone[["low", "high", "p", "p_sets"]].isna().all(axis=None)
    other = Result("conflict.follow", result.frame, HEAD_ABLATION_COLUMNS, Provenance())
    with pytest.raises(InputError, match="expected 'conflict"):
        ablation_summary(other)


def test_plot() -> None:
    result = result_of({("a", "1"): [1.0, 2, -3], ("a", "2"): [3.0, 2, -3], ("b", "<b>3"): [2.5, 2, -3]})
    drawn = patch_plots.ablate_heads(result)
    traces = {trace.name: trace for trace in drawn.data}
    np.testing.assert_allclose(sorted(traces["focal, one pair"].y), [1, 2.5, 3])
    assert not any("<b>" in text for text in traces["focal, one pair"].text)
    np.testing.assert_allclose(traces["one random set, mean of pairs"].y, [2, -3])
    assert traces["focal, mean"].y[0] == pytest.approx(6.5 / 3)
    assert traces["random, mean"].y[0] == pytest.approx(-0.5)
    table = ablation_summary(result).set_index("what")
    top = traces["focal, mean"].y[0] + traces["focal, mean"].error_y.array[0]
    assert top == pytest.approx(table.loc["focal", "high"], rel=1e-5)
    assert len(patch_plots.ablate_heads(result_of({("a", "1"): [1.0], ("b", "2"): [2.0]})).data) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": []}, "no head was given"),
        ({"heads": [(3, 0)]}, "layer 3 is out of range"),
        ({"heads": ["a"]}, "expected .layer, head. pairs"),
        ({"mode": "to_sink"}, "expected one of zero, mean"),
        ({"positions": "last"}, "expected one of suffix, all"),
        ({"n_random_sets": -1}, "n_random_sets=-1"),
        ({"heads": [(layer, head) for layer in (0, 1) for head in range(4)]}, "4 heads are left beside the 8 given"),
        ({"pairs": []}, "no pair was given"),
        ({"contrasts": {}}, "none of 2 pairs has an answer"),
        ({"answer_tokens": 0}, "answer_tokens=0"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(chat_tiny(), **changes)
