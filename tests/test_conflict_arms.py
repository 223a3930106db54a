"""The arms' measures against plain forwards of single texts, and their differences against numbers by hand."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conflict.chat_models import chat_tiny
from conflict.scripted_answers import script
from torch.nn.functional import cross_entropy

from analyses import conflict_arms, conflict_training
from interp.batching import token_batches
from interp.conflict import make_pairs
from interp.conflict.adapters import save_adapter
from interp.conflict.answers import FOLLOW_COLUMNS
from interp.provenance import Provenance
from interp.results import Result, load_result

# One token per byte: two batches of at most 1,024 padded tokens, both with padding.
TEXTS = [
    "It rains in the hills, and the river rises.",
    "Bread " * 60,
    "ab",
    "The sea is deep and cold. " * 11,
    "Müller went home early, as he did on every other day of the week.",
    "The king keeps old keys in a red box. " * 4,
]


@pytest.fixture
def model() -> Any:
    return chat_tiny(seed=3)


def lora(model: Any, folder: Path, seed: int = 0) -> tuple[Path, Any]:
    """An adapter that changes something, on disk, and a copy of the module with it beside the weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    module = get_peft_model(copy.deepcopy(model.hf), config).eval()
    for name, value in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    return save_adapter(module, folder, {"fingerprint": model.fingerprint, "model": model.name}), module


@torch.no_grad()
def plain(model: Any, hf: Any, text: str) -> tuple[int, float, list[int]]:
    """Predictions of one text by itself, their mean loss, and the most likely token at each."""
    ids = torch.tensor(model.tokenizer(text)["input_ids"])
    logits = hf(ids[None]).logits[0, :-1].float()
    return len(ids) - 1, float(cross_entropy(logits, ids[1:])), logits.argmax(-1).tolist()


def check(result: Result, model: Any, hf: Any, base: Any) -> None:
    """Every row of `_prose` against the text's own forward in both modules."""
    frame = result.frame
    assert frame["text"].tolist() == list(range(len(TEXTS)))
    for row, text in zip(frame.itertuples(), TEXTS, strict=True):
        n, loss, tops = plain(model, hf, text)
        old = plain(model, base, text)[2]
        assert row.n_tokens == n == len(text.encode()) - 1
        assert row.nll == pytest.approx(loss, abs=1e-4)
        assert row.same_top == pytest.approx(np.mean([a == b for a, b in zip(tops, old, strict=True)]))


# Prose


def test_losses_of_padded_texts_are_those_of_the_texts_alone(model: Any) -> None:
    assert [batch.rows for batch in token_batches(model.encode(TEXTS), max_tokens=1024)] == [(1, 3), (5, 4, 0, 2)]
    tops = conflict_arms._top_tokens(model, TEXTS)
    assert [list(one) for one in tops] == [plain(model, model.hf, text)[2] for text in TEXTS]
    result = conflict_arms._prose(model, TEXTS, tops)
    check(result, model, model.hf, model.hf)
    assert (result.frame["same_top"] == 1).all()
    # Another model's tokens are not the model's own: the share counts the same positions, and no other.
    shifted = [(one + (np.arange(len(one)) % 3 == 0)) % 260 for one in tops]
    found = conflict_arms._prose(model, TEXTS, shifted).frame["same_top"]
    assert found.tolist() == pytest.approx([1 - math.ceil(len(one) / 3) / len(one) for one in tops])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_an_arm_is_measured_with_its_adapter_against_the_untrained_model(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch)
    base = copy.deepcopy(model.hf)
    adapter, trained = lora(model, tmp_path / "adapter")
    pairs = make_pairs("held-out", 2, families=["case"])
    before = conflict_arms.measure(model, tmp_path, "untrained", pairs, TEXTS, None)
    after = conflict_arms.measure(model, tmp_path, "focal, no credit", pairs, TEXTS, adapter)
    check(before[1], model, base, base)
    check(after[1], model, trained, base)
    # The adapter changes losses and tokens, or the two could not be told apart.
    assert (before[1].frame["nll"] - after[1].frame["nll"]).abs().min() > 1e-3
    assert after[1].frame.query("n_tokens > 1")["same_top"].between(0.05, 0.95).all()
    assert before[1].provenance.fingerprint == model.fingerprint != after[1].provenance.fingerprint
    assert after[0].provenance.fingerprint == after[1].provenance.fingerprint
    # The base is as it was, and what is left on disk is what was returned.
    assert all(a.equal(b) for a, b in zip(base.parameters(), model.hf.parameters(), strict=True))
    answers, losses = conflict_arms.measured(tmp_path, "focal, no credit") or (None, None)
    assert losses is not None
    assert losses.equals(after[1])
    assert answers is not None
    assert answers.equals(after[0])
    assert set(answers.frame["prompt"]) == set(conflict_arms.PROMPTS)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_prose_is_measured_again_with_another_adapter_and_with_other_texts(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch)
    pairs = make_pairs("held-out", 1, families=["case"])
    base, file = copy.deepcopy(model.hf), tmp_path / "0" / "focal" / "prose.parquet"
    for seed in (0, 1):
        adapter, trained = lora(model, tmp_path / f"adapter-{seed}", seed)
        result = conflict_arms.measure(model, tmp_path / f"{seed}", "focal", pairs, TEXTS, adapter)[1]
        check(result, model, trained, base)
        if seed:  # put where the other's was
            result.save(file)
    adapter = tmp_path / "adapter-0"
    again = conflict_arms.measure(model, tmp_path / "0", "focal", pairs, TEXTS, adapter)[1]
    assert not again.frame["nll"].equals(result.frame["nll"])
    assert load_result(file).equals(again)
    written = file.stat().st_mtime_ns
    kept = conflict_arms.measure(model, tmp_path / "0", "focal", pairs, TEXTS, adapter)[1]
    assert kept.equals(again)
    assert file.stat().st_mtime_ns == written  # not made again
    turned = conflict_arms.measure(model, tmp_path / "0", "focal", pairs, TEXTS[::-1], adapter)[1]
    assert turned.frame["n_tokens"].tolist() == again.frame["n_tokens"].tolist()[::-1]
    assert turned.frame["nll"].to_numpy() == pytest.approx(again.frame["nll"].to_numpy()[::-1], abs=1e-4)


# Perplexity


def prose(losses: dict[int, float]) -> Result:
    """{predictions of a text: its mean loss}."""
    rows = [{"text": at, "n_tokens": n, "nll": nll, "same_top": 1.0} for at, (n, nll) in enumerate(losses.items())]
    return Result("conflict.prose", pd.DataFrame(rows), conflict_arms.PROSE_COLUMNS, Provenance())


def test_losses_of_other_texts_are_not_compared() -> None:
    first, second = (
        Result(one.kind, one.frame, one.columns, Provenance(parameters={"texts": texts}))
        for one, texts in ((prose({10: 2.0}), "a"), (prose({10: 2.4}), "b"))
    )
    with pytest.raises(ValueError, match="different texts"):
        conflict_arms.perplexity_ratio(first, second)
    asked = answers("SU")
    found = {"focal": (asked, second), "last": (asked, first)}
    assert conflict_arms.of_other_prose(found, (asked, first)) == ["focal"]


def test_the_perplexity_ratio_weighs_texts_by_their_tokens() -> None:
    before, after = prose({10: 2.0, 30: 3.0}), prose({10: 2.4, 30: 2.9})
    ratio, low, high = conflict_arms.perplexity_ratio(after, before)
    assert ratio == pytest.approx(math.exp((10 * 0.4 - 30 * 0.1) / 40))
    assert low <= ratio <= high
    # Of two texts, either alone is a quarter of the resamples.
    assert (low, high) == pytest.approx((math.exp(-0.1), math.exp(0.4)))
    assert conflict_arms.perplexity_ratio(before, before) == (1.0, 1.0, 1.0)
    assert conflict_arms.perplexity_ratio(before, after)[0] == pytest.approx(1 / ratio)


def test_the_share_of_same_tokens_is_over_tokens() -> None:
    losses = prose({10: 2.0, 30: 3.0})
    losses.frame["same_top"] = [0.5, 0.9]
    asked = result(answers("SSUU"))
    table = conflict_arms.table({"focal": (asked, losses)}, (asked, prose({10: 2.0, 30: 3.0})), {"all": ["list"]}, {})
    assert table["same_top"].tolist() == pytest.approx([1.0, 0.8])


def test_the_interval_of_the_perplexity_ratio_is_that_of_every_resample() -> None:
    """Four texts can be drawn in 256 ways, each as likely."""
    tokens, change = np.array([5, 20, 11, 40]), np.array([0.3, -0.1, 0.05, 0.2])
    before = prose(dict.fromkeys(tokens.tolist(), 2.0))
    after = prose(dict(zip(tokens.tolist(), (2.0 + change).tolist(), strict=True)))
    draws = np.array(list(itertools.product(range(4), repeat=4)))
    ratios = np.sort(np.exp((tokens * change)[draws].sum(1) / tokens[draws].sum(1)))
    ratio, low, high = conflict_arms.perplexity_ratio(after, before)
    assert ratio == pytest.approx(math.exp(tokens @ change / tokens.sum()))
    # 2,000 draws: the share below an end is off by less than a percentage point and a half.
    for end, share in ((low, 0.025), (high, 0.975)):
        assert (ratios < end - 1e-9).mean() - 0.015 <= share <= (ratios <= end + 1e-9).mean() + 0.015
    assert low < ratio < high


# Answers

# Share of further tasks that might do otherwise where two do alike: Wilson's z² / (n + z²).
OTHER = 1.959964**2 / (2 + 1.959964**2)


def answers(obeys: str, prompt: str = "conflict", family: str = "list", rule: str = "list") -> pd.DataFrame:
    """One pair per letter, two pairs per task: S obeys the system, U the user, L neither and in a loop, ? is undecided."""
    rows = [
        {
            **{"pair": f"{family}-{rule}-{at}", "part": "held-out", "task": f"t{at // 2}", "family": family},
            **{"system_rule": rule, "user_rule": "other", "wording": "simple", "setting": "user", "prompt": prompt},
            **{"answer": "a", "n_tokens": 1, "finished": letter != "?", "obeys_system": letter == "S"},
            **{"obeys_user": letter == "U", "decided": letter != "?", "loops": letter == "L", "reason": ""},
        }
        for at, letter in enumerate(obeys)
    ]
    return pd.DataFrame(rows)


def result(*frames: pd.DataFrame, order: int | None = None) -> Result:
    """All rows as one result, in another order where one is given."""
    frame = pd.concat(frames, ignore_index=True)
    if order is not None:
        frame = frame.sample(frac=1, random_state=order)
    return Result("conflict.follow", frame, FOLLOW_COLUMNS, Provenance())


def test_a_change_is_of_one_prompt_and_some_families_in_any_order() -> None:
    before = result(answers("SUUU"), answers("SSSS", "agree"), answers("SSUU", family="json"), order=1)
    after = result(answers("SSSU"), answers("SSUS", "agree"), answers("UUUU", family="json"), order=2)
    # t0: one of two more; t1: one of two more; two tasks that change alike do not make it certain.
    assert conflict_arms.change(after, before, ["list"]) == pytest.approx((0.5, 0.5 - 1.5 * OTHER, 0.5 + 0.5 * OTHER))
    # Both ends are the tasks' means, since each alone is a quarter of the resamples.
    assert conflict_arms.change(after, before, ["list"], "agree") == pytest.approx((-0.25, -0.5, 0.0))
    assert conflict_arms.change(after, before, ["json"]) == pytest.approx((-0.5, -1.0, 0.0))
    assert conflict_arms.change(after, before, ["list", "json"]) == pytest.approx((0.0, -0.25, 0.25))
    assert np.isnan(conflict_arms.change(after, before, ["case"])).all()
    assert np.isnan(conflict_arms.change(after, before, ["json"], "agree")).all()


def test_a_comparison_with_several_arms_is_with_their_mean_pair_by_pair() -> None:
    ours = result(answers("SSSU"), answers("UUUU", "agree"), answers("UUUU", family="json"), order=3)
    first = result(answers("SUUU"), answers("SUUU", "agree"), answers("SSSS", family="json"), order=4)
    second = result(answers("UUSS"), answers("UUSS", "agree"), answers("SSSS", family="json"), order=5)
    # pairs: 1 − ½, 1 − 0, 1 − ½, 0 − ½; tasks ¾ and 0
    assert conflict_arms.against(ours, [first, second], ["list"]) == pytest.approx((0.375, 0.0, 0.75))
    assert conflict_arms.against(ours, [first, second], ["list"], "agree") == pytest.approx((-0.375, -0.5, -0.25))
    assert conflict_arms.against(ours, [first], ["list"]) == conflict_arms.change(ours, first, ["list"])
    with pytest.raises(ValueError, match="different pairs"):
        conflict_arms.against(ours, [first, result(answers("SUU"))], ["list"])


def test_arms_under_two_seeds() -> None:
    assert conflict_arms.ARMS["focal, seed 1"] == conflict_arms.ArmKind("focal", seed=1)
    first, second = result(answers("SUUU"), order=7), result(answers("SSSU"), order=8)
    found = {
        name: (answered, None) for name, answered in (("random 1", first), ("focal", first), ("focal, seed 1", second))
    }
    about = {"focal": {"layers": [1, 2]}, "focal, seed 1": {"layers": [1, 2]}}
    table = conflict_arms.seeds(found, about, ["list"])
    assert table[["arm", "seed", "difference"]].to_numpy().tolist() == [["focal", 1, 0.5]]
    # Other layers are another arm; without seed 0 there is nothing to compare with.
    assert conflict_arms.seeds(found, about | {"focal": {"layers": [1, 3]}}, ["list"]).empty
    assert conflict_arms.seeds({"focal, seed 1": (second, None), "random 1": (first, None)}, about, ["list"]).empty


def test_arms_of_one_seed_are_compared() -> None:
    names = ("focal", "random 0", "random 1", "all", "focal, seed 1", "random 0, seed 1")
    obeys = ("SSUU", "SUUU", "UUUU", "SSSS", "UUUU", "SSUU")
    found = {name: (result(answers(marks)), prose({10: 2.0})) for name, marks in zip(names, obeys, strict=True)}
    groups = {"trained": ["list"]}
    table = conflict_arms.table(found, (result(answers("UUUU")), prose({10: 2.0})), groups, {})
    claims = conflict_training.arm_claims(table, found, groups)
    told = {claim.claim: claim.ours for claim in claims if "above" in claim.claim}
    assert told == {
        "focal layers above random layers (mean of 2 draws) (compliance under conflict)": "+0.38 (interval)",
        "focal layers above random layers, seed 1 (compliance under conflict)": "-0.50 (interval)",
        "focal layers above all layers with a smaller rank (compliance under conflict)": "-0.50 (interval)",
    }


def test_each_rule_is_counted_by_itself() -> None:
    before = result(
        answers("SUUU", rule="list"),
        answers("UUUU", rule="prose"),
        answers("SSSS", "agree", rule="list"),
        answers("SS", family="case", rule="upper"),
        order=6,
    )
    after = result(
        answers("SS?U", rule="list"),
        answers("SULL", rule="prose"),
        answers("UUUU", "agree", rule="list"),
        answers("SU", family="case", rule="upper"),
    )
    table = conflict_arms.by_rule(after, before).set_index("rule")
    assert table.index.tolist() == ["list", "prose", "upper"]
    assert table["family"].tolist() == ["list", "list", "case"]
    expected = {
        "before": [0.25, 0.0, 1.0],
        "after": [0.5, 0.25, 0.5],
        "change": [0.25, 0.25, -0.5],
        "low": [0.0, 0.0, math.nan],  # tasks: ½ and 0 in both rules; one task has no interval
        "high": [0.5, 0.5, math.nan],
        "user_wins": [0.25, 0.25, 0.5],
        "undecided": [0.25, 0.0, 0.0],
        "loops": [0.0, 0.5, 0.0],
        "n": [4, 4, 2],
    }
    for name, values in expected.items():
        assert table[name].tolist() == pytest.approx(values, nan_ok=True), name


def test_rules_of_one_name_in_two_families_are_two() -> None:
    before = result(answers("UUUU"), answers("UUUU", family="json"))
    after = result(answers("SSSS"), answers("SUUU", family="json"))
    table = conflict_arms.by_rule(after, before)
    assert table[["family", "rule"]].to_numpy().tolist() == [["list", "list"], ["json", "list"]]
    assert table["change"].tolist() == [1.0, 0.25]
    assert table["after"].tolist() == [1.0, 0.25]
    assert table["n"].tolist() == [4, 4]
