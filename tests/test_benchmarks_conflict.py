"""The benchmark of instruction conflicts: its rows are well formed, and what it is timed against gives the same."""

from __future__ import annotations

from typing import Any

import pytest
from conflict.chat_models import chat_tiny
from conflict.scripted_answers import script

from interp.conflict import make_contrasts, make_pairs, patch


def subject() -> Any:
    return pytest.importorskip("tests.benchmarks.conflict_runs", reason="needs the repository's root on the path")


def test_the_plain_sweep_gives_the_same_preferences(monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch)
    model = chat_tiny(seed=2)
    pairs = make_pairs("localisation", 3, families=["case"])
    contrasts = make_contrasts(model, pairs).found
    found = subject().plain_sweep(model, pairs, contrasts, [0, 2])
    result = patch(model, pairs, layers=[0, 2], contrasts=contrasts, answer_tokens=12, progress=False)
    ours = result.frame.set_index(["pair", "layer"])["logdiff_patched"]
    assert len(found) == len(ours) == 6
    assert {key: ours[key] for key in found} == pytest.approx(found, abs=1e-5)


def test_the_plain_sweep_captures_once_per_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass of the consistent prompt per pair, whatever the layers; else one of a single text per layer, pair and answer."""
    script(monkeypatch)
    model = chat_tiny(seed=2)
    pairs = make_pairs("localisation", 3, families=["case"])
    contrasts = make_contrasts(model, pairs).found
    texts: list[int] = []
    heads: list[int] = []
    model.hf.base_model.register_forward_hook(lambda _, __, out: texts.append(len(out.last_hidden_state)))
    model.hf.lm_head.register_forward_hook(lambda _, __, out: heads.append(len(out)))
    found = subject().plain_sweep(model, pairs, contrasts, [0, 1, 2])
    assert len(found) == 3 * 3
    assert texts == [1] * (3 + 3 * 3 * 2)
    assert heads == [1] * (3 * 3 * 2)
    assert not any(model.arch.attention(layer)._forward_hooks for layer in range(3))


def test_rows_are_well_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch)
    module, model = subject(), chat_tiny()
    rows = [module.drift_row(model, 2, 1, True), module.patch_row(model, 1, [0], True)]
    for row in rows:
        assert (row.suite, row.subject, row.quick) == ("conflict", "conflict_runs", True)
        assert row.ratio is not None
        assert row.ratio > 0
        assert row.met is not None


def test_answers_are_compared_token_by_token() -> None:
    row = subject().answers_row(chat_tiny(), 2, 3, True)
    assert row.ours > 0
    assert "2 of 2 answers are the same" in row.note
