"""The analysis of instruction conflicts runs on a tiny model, trains arms, uses again what is there, and its page opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conflict.chat_models import chat_tokenizer
from conflict.scripted_answers import script
from tiny_models import tiny_hf

from analyses import conflict_arms, conflict_training, instruction_conflict
from interp import load_model
from interp.errors import InputError, ResultError
from interp.provenance import Provenance
from interp.report import write_report
from interp.report.claims import read_claims
from interp.results import Column, Result

SMALL: dict[str, Any] = {
    **{"n_choose": 64, "n_floor": 32, "n_peer": 32, "n_judged": 4, "n_localise": 24, "n_patch": 26},
    **{"n_head_patch": 6, "n_ablate": 8, "n_sets": 4, "n_train": 8, "n_validation": 4, "n_measure": 8, "n_others": 8},
    "settings": {
        "epochs": 1.0,
        "batch_size": 2,
        "gradient_accumulation": 1,
        "progress": False,
        "anchors": ["The sea is cold."],
    },
}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    script(monkeypatch)
    monkeypatch.setattr(
        conflict_training, "read_jsonl", lambda _: [{"text": "The sea is cold."}, {"text": "It rains."}]
    )
    hf = tiny_hf("llama", vocab_size=260, max_position_embeddings=4096, num_hidden_layers=6)
    return load_model(hf, chat_tokenizer())


def test_all_stages(model: Any, tmp_path: Path) -> None:
    arms = ["focal", "focal, no credit", "focal, attention credit", "random 0", "patched", "all", "focal, as published"]
    arms += ["focal, plain DPO", "first", "last", "focal, seed 1"]
    section = instruction_conflict.run(model, tmp_path, train=arms, **SMALL)
    names = [claim.claim for claim in section.claims]
    assert read_claims(tmp_path / "claims.json") == section.claims
    for part in (
        "agents misprioritise",
        "middle layers (spans",
        "middle layers (published",
        "drift and patching",
        "heads chosen by drift matter",
        "heads chosen by patching matter",
    ):
        assert any(part in name for name in names), part
    for part in (
        "adapters on focal layers by drift: compliance",
        "SAIL by the published loss alone, on focal layers by drift: compliance",
        "patching: at least +30 points",
        "focal layers above random layers (compliance",
        "layers by patching above random layers (compliance",
        "focal layers by drift above as many by patching",
        "released credit above none",
        "attention credit above none",
        "the loss as published above plain DPO",
        "anchors above the loss as published",
        "CRAS",
        "neurons keep",
        "the more drift an arm's layers have",
        "the more patching an arm's layers have",
    ):
        assert any(part in name for name in names), part
    # The paper is the source of what the paper trained, and of nothing else that was.
    trained = [
        claim for claim in section.claims if "compliance with the system's rule under conflict rises" in claim.claim
    ]
    assert {claim.claim.split(":")[0]: "+5.60" in str(claim.paper) for claim in trained} == {
        "adapters on focal layers by drift": False,
        "adapters on as many layers by patching": False,
        "adapters on all layers, as many parameters": False,
        "SAIL by the published loss alone, on focal layers by drift": True,
    }
    # It obeys the list rule in the user turn alone, so that it is followed, and lost whenever the system asks for it.
    followed = next(item for item in section.items if isinstance(item, pd.DataFrame) and "followed" in item)
    assert set(followed.loc[followed["followed"], "rule"]) == {"list"}
    table = next(item for item in section.items if isinstance(item, pd.DataFrame) and "same_top" in item)
    assert set(table["arm"]) == {"untrained", *arms}
    assert set(table["families"]) == {"trained", "never trained, not followed"}
    by_seed = next(item for item in section.items if isinstance(item, pd.DataFrame) and "difference" in item)
    shares = table[table["families"] == "trained"].set_index("arm")["conflict"]
    assert by_seed[["arm", "seed"]].to_numpy().tolist() == [["focal", 1]]
    assert by_seed["difference"].tolist() == pytest.approx([shares["focal, seed 1"] - shares["focal"]])
    place = tmp_path / model.fingerprint / "arms"
    names = ("focal", "focal-seed-1", "focal-as-published", "focal-plain-DPO")
    one, again, bare, plain = (json.loads((place / name / "run.json").read_text()) for name in names)
    assert one["seed"] == bare["seed"] == 0
    assert one | {"seed": 1} == again
    assert [record["likelihood"] for record in (one, bare, plain)] == [0.2, 0.0, 0.0]
    assert [record["credit"] for record in (one, bare, plain)] == ["reward", "reward", "none"]
    assert [record["anchors"] == one["anchors"] for record in (bare, plain)] == [False, False]
    untrained = table[table["arm"] == "untrained"]
    assert (untrained["perplexity"] == 1).all()
    assert (untrained["same_top"] == 1).all()
    assert table.loc[table["arm"] == "focal", "share"].gt(0).all()
    by_rule = next(item for item in section.items if isinstance(item, pd.DataFrame) and "after" in item)
    focal = table[table["arm"] == "focal"]
    assert by_rule["n"].sum() == focal["n"].sum()
    for whole, column in (("conflict", "after"), ("change", "change"), ("user_wins", "user_wins"), ("loops", "loops")):
        assert by_rule[column] @ by_rule["n"] == pytest.approx(focal[whole] @ focal["n"])
    assert by_rule["before"].to_numpy() == pytest.approx(by_rule["after"] - by_rule["change"])
    page = write_report([section], tmp_path / "report.html", title="Conflict")
    assert "who wins when system and user disagree" in page.read_text()


def test_a_report_without_training_shows_what_was_trained(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    few = SMALL | {"n_peer": 0, "n_judged": 0, "n_head_patch": 0}
    before = instruction_conflict.run(model, tmp_path, **few)
    assert "No adapter has been trained here yet" in before.text
    assert not any("adapters on" in claim.claim for claim in before.claims)
    instruction_conflict.run(model, tmp_path, train=["focal"], **few)
    # An arm that was trained by another recipe is not compared with it.
    otherwise = few | {"settings": {**few["settings"], "likelihood": 0.5}}
    section = instruction_conflict.run(model, tmp_path, train=["random 0"], **otherwise)
    assert "arm random 0 was trained otherwise (likelihood)" in capsys.readouterr().err
    table = next(item for item in section.items if isinstance(item, pd.DataFrame) and "same_top" in item)
    assert set(table["arm"]) == {"untrained", "focal"}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(conflict_arms, "align", refuse)
    after = instruction_conflict.run(model, tmp_path, **few)
    assert any("adapters on" in claim.claim for claim in after.claims)
    assert "Adapters were trained" in after.text
    # Arms of other families are neither regrouped nor trained beside these.
    record = tmp_path / model.fingerprint / "arms" / "families.json"
    before_record = record.read_text()
    conflict_training.keep_families(record, ["list"], ["list", "case"])  # as it was found when these were trained
    assert record.read_text() == before_record
    with pytest.raises(ResultError, match="were trained on list; now list, case would be"):
        conflict_training.keep_families(record, ["list", "case"], ["list", "case"])
    # What another model's run left is not shown as this one's.
    other = load_model(
        tiny_hf("llama", seed=5, vocab_size=260, max_position_embeddings=4096, num_hidden_layers=6), chat_tokenizer()
    )
    assert conflict_arms.trained(tmp_path / model.fingerprint / "arms", "focal", model.fingerprint) is not None
    assert conflict_arms.trained(tmp_path / model.fingerprint / "arms", "focal", other.fingerprint) is None


def test_families_by_what_was_trained_and_followed() -> None:
    columns = (Column("family", "category", "", "of rules"),)
    frame = pd.DataFrame({"family": ["list", "json", "case", "words"]})
    answers = Result("conflict.follow", frame, columns, Provenance())
    assert conflict_training.family_groups(answers, ["list"], ["list", "json"]) == {
        "trained": ["list"],
        "never trained, followed": ["json"],
        "never trained, not followed": ["case", "words"],
    }


def test_an_unknown_arm_is_named_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--arm 'middle'; expected one of 'focal'"):
        instruction_conflict.main("no such model", arm=["middle"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_chat_template_gets_one(model: Any, capsys: pytest.CaptureFixture) -> None:
    model.tokenizer.chat_template = None
    assert instruction_conflict.fitting_template(model) == "plain"
    assert "using the template 'plain'" in capsys.readouterr().err
