"""Trained models taken apart, arms compared, and their pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from interp.errors import InputError
from interp.results import load_result
from interp.sinks import bigram_plots as plots
from interp.sinks.bigram_backcopy import BigramBackcopy
from interp.sinks.bigram_comparison import (
    BASE,
    MITIGATION,
    START,
    STRUCTURES,
    compare_toys,
    reinforcement,
    summarise_toys,
    toy_folder,
)
from interp.sinks.bigram_interventions import intervene_toy, toy_attention, toy_characters
from interp.sinks.bigram_model import ToyModel, ToyShape
from interp.sinks.bigram_settings import toy_settings
from interp.sinks.bigram_training import load_toy, train_toy

TASK = BigramBackcopy()
TINY: dict[str, Any] = {"width": 8, "length": 12, "batch": 4, "steps": 5, "sample": 5, "cooldown": 0}


@pytest.fixture(scope="module")
def model() -> ToyModel:
    torch.manual_seed(3)
    return ToyModel(ToyShape(("both", "mlp"), width=12, n_heads=2, length=20)).eval()


def copier() -> ToyModel:
    """A model written by hand: attention alone, on the token before for triggers and on ⟨s⟩, whose value is 0, for others."""
    width = 66 + 20 + 1  # token, position, "asks for ⟨s⟩"
    model = ToyModel(ToyShape(("attention",), width=width, length=20)).eval()
    block = model.blocks[0].attention
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.token.weight[:, :66] = torch.eye(66)
        model.position.weight[:, 66:86] = torch.eye(20)
        # Two ones among zeros: LayerNorm makes equal zeros and equal ones of them, and its bias puts the zeros back to 0.
        mean = 2 / width
        for norm in (block.norm, model.norm):
            norm.weight.fill_(1)
        block.norm.bias.fill_(mean / (mean - mean**2) ** 0.5)
        for position in range(1, 20):  # every query asks for the position before
            block.query.weight[66 + position - 1, 66 + position] = 10
        block.key.weight[66:86, 66:86] = torch.eye(20)
        for token in set(range(66)) - set(TASK.triggers):  # and all but triggers ask twice as loud for ⟨s⟩
            block.query.weight[86, token] = 20
        block.key.weight[86, TASK.start_token] = 1
        block.value.weight[:65, :65] = torch.eye(65)  # ⟨s⟩ has no value
        block.out.weight[:65, :65] = torch.eye(65)
        model.output.weight[:65, :65] = 5 * torch.eye(65)
    return model


def test_a_head_made_dormant_by_hand_is_seen_as_such() -> None:
    tokens = TASK.sample(40, 20, seed=1)
    made = copier()
    effects = intervene_toy(made, TASK, tokens, {"none": [], "no attention": ["attention.0"]}).frame
    value = effects.set_index(["intervention", "quantity", "group"])["value"]
    assert value["none", "sink_mass", "other"] > 0.99
    assert value["none", "sink_mass", "trigger"] < 0.01
    assert value["none", "risk", "trigger"] < 0.01
    assert value["no attention", "risk", "trigger"] > 1
    assert value["no attention", "risk", "bigram"] == pytest.approx(value["none", "risk", "bigram"], rel=0.15)
    characters = toy_characters(made, TASK, tokens).frame
    triggers = characters["group"] == "trigger"
    assert (characters.loc[triggers, "sink_mass"] < 0.01).all()
    assert (characters.loc[characters["group"] == "other", "sink_mass"] > 0.99).all()
    start = characters[characters["group"] == "start"].iloc[0]
    assert start["value_norm"] < 0.5 * characters.loc[~triggers & (characters["group"] == "other"), "value_norm"].min()
    assert np.isnan(start["sink_mass"])
    assert start["received"] > 0.99
    assert characters["received"].sum() == pytest.approx(1, abs=0.01)  # but for what goes to the query itself


def test_interventions_by_hand(model: ToyModel) -> None:
    tokens = TASK.sample(7, 15, seed=2)
    frame = intervene_toy(model, TASK, tokens).frame
    assert list(frame["intervention"].cat.categories) == ["none", "attention.0", "mlp.0", "mlp.1"]
    law = TASK.law(tokens)
    for part in frame["intervention"].cat.categories:
        zero = () if part == "none" else (part,)
        log_p = model(tokens, zero).detach().log_softmax(-1)
        per_sequence = []
        for row in range(7):
            at = [query for query in range(15) if int(tokens[row, query]) in TASK.triggers]
            if at:
                per_sequence.append(np.mean([-(law[row, query] * log_p[row, query]).sum().item() for query in at]))
        rows = frame[(frame["intervention"] == part) & (frame["quantity"] == "risk") & (frame["group"] == "trigger")]
        assert rows["value"].item() == pytest.approx(np.mean(per_sequence), abs=1e-5)
        assert rows["n"].item() == len(per_sequence)
        assert rows["low"].item() <= rows["value"].item() <= rows["high"].item()
    peak = frame[
        (frame["quantity"] == "residual_norm") & (frame["group"] == "start") & (frame["intervention"] == "none")
    ]
    norms = [resid[0, 0].norm().item() for resid in model.trace(tokens).resid[1:]]
    np.testing.assert_allclose(peak.sort_values("layer")["value"], norms, rtol=1e-5)


def test_attention_is_shown_as_it_is(model: ToyModel) -> None:
    tokens = TASK.sample(1, 15, seed=2)[0]
    result = toy_attention(model, TASK, tokens, {"preset": "laptop"})
    pattern = model.trace(tokens[None]).pattern[0][0]
    for row in result.frame.itertuples():
        assert row.weight == pattern[row.head, row.query, row.key].item()
    assert len(result.frame) == 2 * 15 * 16 / 2
    drawn = plots.toy_attention(result, head=1, positions=10).data[0].z
    np.testing.assert_array_equal(drawn[np.tril_indices(10)], pattern[1, :10, :10].numpy()[np.tril_indices(10)])
    assert np.isnan(drawn[0, 1])
    with pytest.raises(InputError, match="block 1"):
        plots.toy_attention(result, layer=1)


def test_comparisons_are_the_single_runs(tmp_path: Path) -> None:
    arms = {BASE: {}, "without ⟨s⟩": {"start": False}}
    result = compare_toys(arms, seeds=(0, 4), out=tmp_path, device="cpu", progress=False, **TINY)
    for arm, changes in arms.items():
        for seed in (0, 4):
            single = train_toy(seed=seed, device="cpu", progress=False, **TINY, **changes).frame
            kept = result.frame[(result.frame["arm"] == arm) & (result.frame["seed"] == seed)]
            assert kept["value"].tolist() == single["value"].tolist()
            assert load_toy(toy_folder(tmp_path, arm, seed))[1] == toy_settings(**TINY, **changes)
    table = summarise_toys(result)
    assert table[["arm", "seed"]].to_numpy().tolist() == [[arm, seed] for arm in arms for seed in (0, 4)]
    row, frame = table.iloc[2], result.frame[result.frame["arm"] == "without ⟨s⟩"]
    frame = frame[frame["seed"] == 0]
    last = frame[frame["step"] == 5].set_index(["quantity", "group"])["value"]
    assert row["mass"] == last["sink_mass", "other"]
    assert row["bigram_excess"] == pytest.approx(last["risk", "bigram"] / last["entropy", "bigram"] - 1)
    assert row["peak"] == last["residual_norm", "start"] / last["residual_median", "rest"]
    assert row["value_max"] == frame[(frame["quantity"] == "value_norm") & (frame["group"] == "start")]["value"].max()
    assert load_result(result.save(tmp_path / "arms.parquet")).equals(result)


def test_every_arm_of_the_paper_can_be_trained() -> None:
    arms = {**MITIGATION, **STRUCTURES, **START, **reinforcement(8)}
    result = compare_toys(arms, device="cpu", progress=False, **{**TINY, "steps": 1})
    assert len(summarise_toys(result)) == len(arms)
    names = [str(toy_folder("x", arm, 0)) for arm in arms]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("x/[a-z0-9-]+", name) for name in names)


def test_bad_arms_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one of each"):
        compare_toys({})
    with pytest.raises(InputError, match="at least one of each"):
        compare_toys({"a": {}}, seeds=())
    with pytest.raises(InputError, match="unknown settings depth"):
        compare_toys({"a": {}, "b": {"depth": 3}}, out=tmp_path, **TINY)
    assert not list(tmp_path.iterdir())


def test_figures_are_the_rows(model: ToyModel) -> None:
    run = train_toy(seed=2, device="cpu", progress=False, layers=2, **TINY)
    drawn = plots.train_toy(run)
    assert "preset laptop with" in drawn.layout.title.subtitle.text
    assert "seed 2" in drawn.layout.title.subtitle.text
    frame = run.frame
    rows = frame[(frame["quantity"] == "sink_mass") & (frame["group"] == "trigger") & (frame["layer"] == 1)]
    shown = [trace for trace in drawn.data if np.array_equal(trace.y, rows["value"].to_numpy(np.float32))]
    assert len(shown) == 1
    assert not any(trace.name and "published" in trace.name for trace in drawn.data)  # another model
    one = plots.train_toy(train_toy(device="cpu", progress=False, **TINY))
    published = [trace for trace in one.data if trace.name and "published" in trace.name]
    assert list(published[0].y) == pytest.approx([4.296, 2.304, 0.283, 0.0075, 8e-5])
    arms = compare_toys({"a": {}, "b": {"attention": "relu"}}, device="cpu", progress=False, **TINY)
    assert "preset laptop with" in plots.compare_toys(arms).layout.title.subtitle.text
    assert len(plots.compare_toys(arms, [("risk", "trigger")]).data) == 2
    with pytest.raises(InputError, match="no 'mass' of 'other'"):
        plots.compare_toys(arms, [("mass", "other")])
    tokens = TASK.sample(7, 15, seed=2)
    about = {"preset": "laptop", "steps": 5}
    bars = plots.intervene_toy(intervene_toy(model, TASK, tokens, about=about))
    assert len(bars.data) == 2
    assert "steps=5" in bars.layout.title.subtitle.text
    characters = plots.toy_characters(toy_characters(model, TASK, tokens, about))
    assert sum(len(trace.x) for trace in characters.data) == len(tokens.unique()) - 1
    assert len(characters.layout.shapes) == 1  # ⟨s⟩
    assert plots.describe({}) == "preset not stated"
