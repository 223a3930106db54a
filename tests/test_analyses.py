"""Every analysis runs on a tiny model from its public entry, writes claims of the agreed form, and reuses what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_hf, tiny_tokenizer

from analyses import concept_editing, neuron_clamping, neuron_decoding, sink_heads
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


def sink_domains(folder: Path) -> list[str]:
    """Two domains of files whose words differ."""
    words = {"one": ["the", "water", "of", "sea", "is", "red"], "two": ["a", "king", "in", "old", "sun", "dog"]}
    for name, choice in words.items():
        for at in range(12):
            text = " ".join(choice[(at + step * (1 + at % 5)) % 6] for step in range(60))
            (folder / f"{name}-{at}.txt").write_text(text)
    return [f"{name}={folder}/{name}-*.txt" for name in words]


def test_sink_heads_reports_every_part(model: Any, tmp_path: Path) -> None:
    sizes = {"length": 12, "n_texts": 6, "n_confirm": 4, "n_heads": 2, "n_random": 2, "n_small": 2, "window": 10}
    domains = sink_domains(tmp_path)
    out = tmp_path / "sink_heads"
    section = sink_heads.run(model, out, domains, ["repeated"], **sizes)
    rows = json.loads((out / "claims.json").read_text())
    assert [list(row) for row in rows] == [KEYS] * len(rows)
    assert len(rows) == 10
    heads = section.items[0]
    assert len(heads) == 2
    assert set(heads["dormant on"]) | set(heads["active on"]) <= {"one", "two"}
    assert (heads["n"] == 4).all()
    assert rows[0]["n"] == 4
    # A random model has no such head, and no peak.
    assert rows[0]["holds"] is False
    assert write_report([section], tmp_path / "r.html").stat().st_size > 1_000_000
    # Nothing is measured again.
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("scan*.parquet")}
    sink_heads.run(model, out, domains, ["repeated"], **sizes)
    assert stamps == {path.name: path.stat().st_mtime_ns for path in out.glob("scan*.parquet")}


def test_sink_heads_chooses_and_confirms_on_different_documents(model: Any, tmp_path: Path) -> None:
    seen = {}
    original = sink_heads.scan
    try:
        sink_heads.scan = lambda model, texts: (
            seen.setdefault(len(seen), texts) and original(model, texts, progress=False)
        )
        sink_heads.run(
            model,
            tmp_path / "out",
            sink_domains(tmp_path),
            [],
            length=12,
            n_texts=6,
            n_confirm=4,
            n_heads=1,
            n_random=1,
            n_small=2,
            window=10,
        )
    finally:
        sink_heads.scan = original
    chosen, confirmed = seen[0], seen[1]
    for name, texts in confirmed.items():
        assert len(texts) == 4
        assert not {tuple(ids) for ids in texts} & {tuple(ids) for ids in chosen[name]}


def test_a_texts_beginning_is_found() -> None:
    class Tokenizer:
        def __init__(self, adds: bool, knows: bool) -> None:
            self.adds, self.knows = adds, knows

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1, 9] if self.adds and add_special_tokens else [9]}

        def get_vocab(self) -> dict[str, int]:
            return {"<|endoftext|>": 0} if self.knows else {}

    found = [
        sink_heads.document_start(type("Model", (), {"tokenizer": Tokenizer(adds, knows)}))
        for adds, knows in ((True, True), (False, True), (False, False))
    ]
    assert found == ["auto", "<|endoftext|>", True]


@pytest.mark.slow
def test_documents_of_the_embedded_model_begin_with_its_separator(embedded: Any) -> None:
    """Its unknown token is the same one, which hides it from a comparison of ids."""
    assert sink_heads.document_start(embedded) == "<|endoftext|>"


def test_sink_heads_of_other_texts_or_settings_are_made_again(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    for name in ("scan", "ablate", "evict", "residual_peak_origin"):
        original = getattr(sink_heads, name)
        monkeypatch.setattr(
            sink_heads, name, lambda *a, _name=name, _original=original, **k: made.append(_name) or _original(*a, **k)
        )
    sizes = {"length": 12, "n_texts": 6, "n_confirm": 4, "n_heads": 1, "n_random": 1, "n_small": 2, "window": 10}
    domains, out = sink_domains(tmp_path), tmp_path / "out"
    sink_heads.run(model, out, domains, [], **sizes)
    first = list(made)
    assert {"scan", "ablate", "evict", "residual_peak_origin"} == set(first)
    for changes, again in (
        ({}, set()),
        ({"n_random": 2}, {"ablate"}),
        ({"length": 10}, {"scan", "ablate", "evict", "residual_peak_origin"}),
    ):
        made.clear()
        sink_heads.run(model, out, domains, [], **{**sizes, **changes})
        assert set(made) == again
    for path in tmp_path.glob("one-*.txt"):
        path.write_text(path.read_text().replace("water", "code"))
    made.clear()
    sink_heads.run(model, out, domains, [], **{**sizes, "length": 10, "n_random": 2})
    assert set(made) == {"scan", "ablate", "evict", "residual_peak_origin"}
