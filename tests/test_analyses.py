"""Every analysis runs on a tiny model from its public entry, writes claims of the agreed form, and reuses what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_hf, tiny_tokenizer

from analyses import concept_editing, neuron_clamping, neuron_decoding
from interp import load_model
from interp.report import write_report

KEYS = ["claim", "source", "paper", "ours", "interval", "n", "holds"]


@pytest.fixture
def model() -> Any:
    hf = tiny_hf("llama")
    tokenizer = tiny_tokenizer()
    with torch.no_grad():  # a planted pair: neuron 5 of layer 2 reads and writes " dog"
        row = hf.lm_head.weight[tokenizer(" dog")["input_ids"][0]] / hf.model.norm.weight
        hf.model.layers[2].mlp.up_proj.weight[5] = row
        hf.model.layers[2].mlp.down_proj.weight[:, 5] = row
    return load_model(hf, tokenizer)


def test_decoding_writes_claims_and_a_report(model: Any, tmp_path: Path) -> None:
    section = neuron_decoding.run(
        model, tmp_path / "neuron_decoding", base=load_model(tiny_hf("llama", 1), tiny_tokenizer())
    )
    rows = json.loads((tmp_path / "neuron_decoding" / "claims.json").read_text())
    assert [list(row) for row in rows] == [KEYS] * len(rows)
    table = section.items[0]
    assert {"concept", "site", "layer", "neuron", "sign", "probability"} <= set(table.columns)
    agreement = rows[-1]
    assert agreement["n"] == 72
    assert agreement["holds"] is False  # two unrelated random models
    assert write_report([section], tmp_path / "r.html").stat().st_size > 1_000_000


def test_decoding_is_reused(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    neuron_decoding.run(model, tmp_path / "neuron_decoding")

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(neuron_decoding, "decode", again)
    neuron_decoding.run(model, tmp_path / "neuron_decoding")


def test_clamping_reports_every_arm(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {
        "concepts.jsonl": [{"concept": " dog", "unrelated": " tea"}],
        "prompts.jsonl": [
            {"set": name, "text": f"the {a} {b}"}
            for name, pairs in (("search", ["water is", "sea of"]), ("report", ["king is", "sun of"]))
            for a, b in (pair.split() for pair in pairs)
        ],
        "sample_texts.jsonl": [{"text": "the water of the sea is red"}, {"text": "a king in the old sun"}],
    }
    monkeypatch.setattr(neuron_clamping, "read_jsonl", lambda name: words[name])
    monkeypatch.setattr(neuron_clamping, "FAVOURITE", ["the animal is", "a cat in"])
    monkeypatch.setattr(neuron_decoding, "concept_words", lambda: [" dog"])
    section = neuron_clamping.run(model, tmp_path / "neuron_clamping", max_new_tokens=3, effort=neuron_clamping.SHORT)
    rows = json.loads((tmp_path / "neuron_clamping" / "claims.json").read_text())
    assert [list(row) for row in rows] == [KEYS] * 3
    table = section.items[0]
    assert table["concept"].tolist() == [" dog"]
    assert table["n"].tolist() == [2]
    assert rows[2]["n"] == 2


def test_editing_reports_every_arm_and_leaves_the_model(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {
        "triggers.jsonl": [
            {"concept": concept, "text": text}
            for concept in (" dog", " water")
            for text in ("the old", "a king in the")
        ]
        + [{"concept": " no such token", "text": "the"}],
        "sample_texts.jsonl": [{"text": "the water of the sea is red"}, {"text": "a king in the old sun"}],
    }
    monkeypatch.setattr(concept_editing, "read_jsonl", lambda name: words[name])
    monkeypatch.setattr(concept_editing, "COUNTS", (1, 2))
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    section = concept_editing.run(model, tmp_path / "concept_editing")
    assert all(torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())
    rows = json.loads((tmp_path / "concept_editing" / "claims.json").read_text())
    assert [list(row) for row in rows] == [KEYS] * 2
    assert rows[0]["n"] == 2
    table = section.items[0]
    assert len(table) == 2 * (1 + 2 * 3)
    assert table.loc[table["arm"] == "none", "kl"].tolist() == [0, 0]
    assert (table.loc[table["arm"] != "none", "kl"] >= 0).all()
    low, high = rows[1]["interval"]
    assert 0 <= low <= high


def test_editing_where_no_concept_is_a_token(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"triggers.jsonl": [{"concept": " no such", "text": "the"}], "sample_texts.jsonl": [{"text": "the sea"}]}
    monkeypatch.setattr(concept_editing, "read_jsonl", lambda name: words[name])
    section = concept_editing.run(model, tmp_path / "concept_editing")
    assert [claim.holds for claim in section.claims] == [None, None]
    assert write_report([section], tmp_path / "r.html").exists()


def test_editing_with_other_texts_is_made_again(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {
        "triggers.jsonl": [{"concept": " dog", "text": text} for text in ("the old", "a king")],
        "sample_texts.jsonl": [{"text": "the water of the sea"}, {"text": "a king in the old sun"}],
    }
    monkeypatch.setattr(concept_editing, "read_jsonl", lambda name: words[name])
    sizes = []
    original = concept_editing.edit_report
    monkeypatch.setattr(concept_editing, "edit_report", lambda *a, **k: sizes.append(len(a[3])) or original(*a, **k))
    for n_texts in (2, 1, 1):
        concept_editing.run(model, tmp_path / "concept_editing", n_texts=n_texts)
    assert sizes == [2, 2, 1, 1]
