"""Editing: a planted detector is found and reversed, the weights come back bit for bit, measures against direct ones."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import GATED, VOCAB, tiny_encoder, tiny_hf, tiny_tokenizer

from interp.errors import InputError, ModelError
from interp.model import load_model
from interp.neurons.concept_vectors import ConceptVector, concept_vector
from interp.neurons.edit_effects import edit_report, summarise_edit
from interp.neurons.editing import Edit, Row, apply_edit, edited, plan_edit, random_edit, reverse
from interp.results import load_result

WATER = VOCAB.index("▁water")
PROMPTS = ["the dog is in the", "a cat of the sea is", "the king"]
TEXTS = ["the red sea is in a code", "old keys of the new king . the sun", "music is a"]


def sites_of(family: str) -> tuple[str, ...]:
    return ("gate", "up") if family in GATED else ("up",)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}


def changed(model: Any, before: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in model.hf.state_dict().items() if not torch.equal(tensor, before[name])]


def direction(seed: int = 3) -> torch.Tensor:
    return torch.randn(16, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read_by_mlp(model: Any, layer: int, x: torch.Tensor) -> torch.Tensor:
    """What the layer's own norm makes of a long vector, without the bias: an independent way to step 1 of `editing`."""
    norm = model.arch.pre_mlp_norm(layer)
    if norm is None:
        return x
    norm = copy.deepcopy(norm)
    if getattr(norm, "bias", None) is not None:
        norm.bias.zero_()
    return norm(1e3 * x[None])[0]


def rows_of(model: Any, layer: int, site: str) -> torch.Tensor:
    return model.arch.up_weight(layer) if site == "up" else model.arch.gate_weight(layer)


@torch.no_grad()
def plant(model: Any, x: torch.Tensor, layer: int, site: str, neuron: int) -> None:
    """A row that answers to x and to nothing else as strongly."""
    t = read_by_mlp(model, layer, x)
    rows_of(model, layer, site)[neuron] = 2 * t / t.norm()


def planted_circuit() -> tuple[Any, torch.Tensor]:
    """A Llama whose residual stream carries a concept's direction, which one neuron turns into the concept's token.

    The embedding of "dog" holds the direction x, attention writes nothing; neuron (1, 7) opens on x and writes the
    LM head's row of "water". Without that neuron nothing leads to "water".
    """
    model = load_model(tiny_hf("llama"), tiny_tokenizer())
    arch, x = model.arch, direction()
    with torch.no_grad():
        for layer in range(arch.n_layers):
            arch.o_proj(layer).weight.zero_()
            arch.down_proj(layer).weight.zero_()
        arch.final_norm().weight.fill_(1.0)
        head = torch.nn.functional.normalize(torch.randn(64, 16, generator=torch.Generator().manual_seed(1)), dim=1)
        head[WATER] = torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(2)), dim=0)
        x = x - (x @ head[WATER]) * head[WATER]
        arch.lm_head().weight.copy_(4 * head)
        arch.embedding().weight[VOCAB.index("▁dog")] = x
        plant(model, x, 1, "gate", 7)
        plant(model, x, 1, "up", 7)
        arch.down_proj(1).weight[:, 7] = 2 * head[WATER]
    return model, x


def probability(model: Any, prompt: str, token: int = WATER) -> float:
    with torch.no_grad():
        return float(model.hf(input_ids=torch.tensor(model.encode(prompt))).logits[0, -1].softmax(-1)[token])


@pytest.mark.parametrize("site", ["up", "gate"])
def test_a_planted_detector_is_found_reversed_and_restored_in_every_family(family: str, site: str, tiny: Any) -> None:
    if site not in sites_of(family):
        with pytest.raises(InputError, match="no gate projection"):
            plan_edit(tiny(family), direction(), sites=["gate"])
        return
    model = tiny(family)
    x = direction()
    plant(model, x, 2, site, 11)
    before, fingerprint = weights(model), model.fingerprint
    row = rows_of(model, 2, site)[11].clone()
    with reverse(model, x) as edit:
        assert [(found.layer, found.site, found.neuron) for found in edit.rows] == [(2, site, 11)]
        assert edit.rows[0].cosine == pytest.approx(1, abs=1e-3)
        # The parameter itself, one row of one matrix, has become its own reverse.
        torch.testing.assert_close(rows_of(model, 2, site)[11], -row, rtol=2e-3, atol=2e-3)
        names = changed(model, before)
        assert len(names) == 1
        assert int((model.hf.state_dict()[names[0]] != before[names[0]]).sum()) <= 16
        assert model.fingerprint != fingerprint
    assert changed(model, before) == []
    assert model.fingerprint == fingerprint


def test_cosines_are_those_of_rows_and_what_the_norm_hands_to_the_mlp(family: str, tiny: Any) -> None:
    model, x = tiny(family), direction()
    edit = plan_edit(model, x, n=5)
    best = []
    for layer in range(3):
        for site in sites_of(family):
            t = read_by_mlp(model, layer, x).double()
            cosines = torch.nn.functional.cosine_similarity(rows_of(model, layer, site).double(), t[None])
            best += [(float(value), layer, site, at) for at, value in enumerate(cosines)]
    best.sort(reverse=True)
    assert [(row.layer, row.site, row.neuron) for row in edit.rows] == [one[1:] for one in best[:5]]
    np.testing.assert_allclose([row.cosine for row in edit.rows], [one[0] for one in best[:5]], rtol=1e-3)
    threshold = (best[2][0] + best[3][0]) / 2
    assert plan_edit(model, x, threshold=threshold).rows == edit.rows[:3]
    only = plan_edit(model, x, n=4, sites="up", layers=[-1])
    assert {(row.layer, row.site) for row in only.rows} == {(2, "up")}


def test_the_edit_removes_a_planted_concept_and_its_controls_do_not() -> None:
    model, x = planted_circuit()
    prompts = ["the dog", "a red dog", "is the dog"]
    before = [probability(model, prompt) for prompt in prompts]
    assert min(before) > 0.5
    kept = weights(model)
    with reverse(model, x, n=2) as edit:
        assert {(row.layer, row.site, row.neuron) for row in edit.rows} == {(1, "gate", 7), (1, "up", 7)}
        assert max(probability(model, prompt) for prompt in prompts) < 0.1
    assert [probability(model, prompt) for prompt in prompts] == before
    assert changed(model, kept) == []
    result = edit_report(model, " water", prompts, TEXTS, vector=x, n=2, unrelated=" king", progress=False)
    arms = summarise_edit(result).set_index("arm")
    assert arms.loc["none", "p_concept"] == pytest.approx(np.mean(before), rel=1e-4)
    assert arms.loc["reversed", "p_concept"] < 0.1
    assert arms.loc["zeroed", "p_concept"] < 0.1
    assert arms.loc["random", "p_concept"] == pytest.approx(np.mean(before), rel=1e-3)  # other neurons write nothing
    assert arms.loc["none", "kl"] == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_weights_come_back_bit_for_bit_after_an_exception(error: type[BaseException], tiny: Any, family: str) -> None:
    model = tiny(family)
    model.hf.to(torch.bfloat16)
    before = weights(model)
    seen = []

    def fails() -> None:
        with reverse(model, direction(), n=9):
            seen.extend(changed(model, before))
            raise error

    with pytest.raises(error):
        fails()
    assert seen
    assert changed(model, before) == []


def test_an_interrupted_write_leaves_nothing_behind(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import interp.neurons.editing as editing

    model = tiny()
    before, edit = weights(model), plan_edit(model, direction(), n=6)
    calls = []

    def interrupted(*given: Any) -> torch.Tensor:
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return torch.ones(16)

    monkeypatch.setattr(editing, "_mlp_input", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_edit(model, edit)
    assert changed(model, before) == []
    calls.clear()
    with pytest.raises(KeyboardInterrupt), edited(model, edit):
        raise AssertionError("not reached")
    assert changed(model, before) == []


def test_an_edit_for_good_is_undone_in_the_right_order_only(tiny: Any) -> None:
    model = tiny()
    before = weights(model)
    first = apply_edit(model, plan_edit(model, direction(), n=3))
    other = Edit(first.edit.rows[:1], direction(9))
    second = apply_edit(model, other)
    with pytest.raises(InputError, match="changed again: undo that edit first"):
        first.undo()
    second.undo()
    assert first.active
    assert not second.active
    first.undo()
    first.undo()
    assert changed(model, before) == []
    with reverse(model, direction()), reverse(model, direction(9), n=4):
        pass
    assert changed(model, before) == []


def test_the_reversed_row_keeps_its_length_and_points_away(tiny: Any) -> None:
    model, x = tiny(), direction()
    edit = plan_edit(model, x, n=4)
    lengths = [rows_of(model, row.layer, row.site)[row.neuron].norm() for row in edit.rows]
    with edited(model, edit):
        for row, length in zip(edit.rows, lengths, strict=True):
            new = rows_of(model, row.layer, row.site)[row.neuron]
            torch.testing.assert_close(new.norm(), length)
            t = read_by_mlp(model, row.layer, x)
            assert float(torch.cosine_similarity(new, t, dim=0)) == pytest.approx(-1, abs=1e-4)
    with edited(model, Edit(edit.rows, None)):
        assert all(not rows_of(model, row.layer, row.site)[row.neuron].any() for row in edit.rows)


def test_random_rows_are_others_of_the_same_layers_and_sites(tiny: Any) -> None:
    model = tiny()
    edit = plan_edit(model, direction(), n=30)
    control = random_edit(model, edit, seed=1)

    def places(some: Edit) -> list[tuple[int, str]]:
        return sorted((row.layer, row.site) for row in some.rows)

    assert places(control) == places(edit)
    theirs = {(row.layer, row.site, row.neuron) for row in control.rows}
    assert len(theirs) == 30
    assert not theirs & {(row.layer, row.site, row.neuron) for row in edit.rows}
    assert random_edit(model, edit, seed=1).rows == control.rows
    with pytest.raises(InputError, match="not as many others"):
        random_edit(model, plan_edit(model, direction(), n=20, layers=[0], sites=["up"]))


def test_a_concept_vector_triggers_its_token_and_is_reproducible() -> None:
    model, _ = planted_circuit()
    vector = concept_vector(model, " water", target=0.6)
    assert vector.token_id == WATER
    assert vector.probability >= 0.6 > vector.approximate
    with torch.no_grad():
        p = model.head_logits(vector.values[None])[0].softmax(-1)
    assert float(p[WATER]) == pytest.approx(vector.probability, rel=1e-4)
    assert float(vector.values.pow(2).mean()) == pytest.approx(1, rel=1e-5)
    again = concept_vector(model, " water", target=0.6)
    torch.testing.assert_close(again.values, vector.values, rtol=0, atol=0)
    assert not torch.equal(concept_vector(model, " water", target=0.6, seed=1).values, vector.values)


def test_a_detector_of_the_concepts_token_is_found_by_its_concept_vector() -> None:
    model, _ = planted_circuit()
    plant(model, model.arch.head_weight()[WATER].clone(), 2, "up", 5)
    vector = concept_vector(model, " water", ["the dog", "a red dog"], baseline=[], target=0.99)
    assert [(row.layer, row.site, row.neuron) for row in plan_edit(model, vector).rows] == [(2, "up", 5)]


def test_own_prompts_and_no_baseline_give_the_mean_representation(tiny: Any) -> None:
    model = tiny()
    with torch.no_grad():
        states = [model.hf(input_ids=torch.tensor(model.encode(text)), output_hidden_states=True) for text in PROMPTS]
        token = int(states[0].logits[0, -1].argmax())
    word = model.decode([token])
    try:
        vector = concept_vector(model, word, PROMPTS[:1], baseline=[], max_steps=0)
    except InputError:
        pytest.skip("the random model's favourite is no word")
    kept: list[torch.Tensor] = []
    handle = model.arch.site("resid_post", 2).attach(lambda tensor: kept.append(tensor[0, -1].detach()))
    with torch.no_grad():
        model.hf(input_ids=torch.tensor(model.encode(PROMPTS[0])))
    handle.remove()
    torch.testing.assert_close(vector.values, kept[0] / kept[0].pow(2).mean().sqrt())
    assert vector.steps == 0


def test_report_measures_what_a_direct_computation_gives(family: str, tiny: Any) -> None:
    model, x = tiny(family), direction()
    before = weights(model)
    result = edit_report(
        model, " water", PROMPTS, TEXTS, vector=x, n=4, n_random=2, unrelated=" king", max_tokens=12, progress=False
    )
    assert changed(model, before) == []
    frame = result.frame
    assert result.kind == "neurons.edit"
    assert len(frame) == 5 * (3 + 3 + 1)
    assert result.provenance.fingerprint == model.fingerprint

    @torch.no_grad()
    def log_p(text: str) -> torch.Tensor:
        return model.hf(input_ids=torch.tensor(model.encode(text))).logits[0].double().log_softmax(-1)

    plain = {text: log_p(text) for text in PROMPTS + TEXTS}
    with reverse(model, x, n=4):
        new = {text: log_p(text) for text in PROMPTS + TEXTS}
    kl = {text: (plain[text].exp() * (plain[text] - new[text])).sum(-1) for text in plain}
    mine = frame[frame["arm"] == "reversed"]
    for index, prompt in enumerate(PROMPTS):
        row = mine[(mine["item"] == "prompt") & (mine["index"] == index)].iloc[0]
        assert row["p_concept"] == pytest.approx(float(new[prompt][-1, WATER].exp()), rel=1e-3)
        assert row["p_unrelated"] == pytest.approx(float(new[prompt][-1, VOCAB.index("▁king")].exp()), rel=1e-3)
        assert row["rank"] == 1 + int((new[prompt][-1] > new[prompt][-1, WATER]).sum())
        assert row["kl"] == pytest.approx(float(kl[prompt][-1]), rel=1e-2, abs=1e-5)
    losses = []
    for index, text in enumerate(TEXTS):
        row = mine[(mine["item"] == "text") & (mine["index"] == index)].iloc[0]
        quartiles = np.quantile(kl[text].numpy(), [0.25, 0.5, 0.75])
        np.testing.assert_allclose(row[["kl_q25", "kl", "kl_q75"]].astype(float), quartiles, rtol=1e-2, atol=1e-5)
        ids = torch.tensor(model.encode(text)[0])
        loss = -new[text][:-1].gather(1, ids[1:, None])[:, 0]
        losses.append(loss)
        assert row["perplexity"] == pytest.approx(float(loss.mean().exp()), rel=1e-3)
        assert np.isnan(row["p_concept"])
    pooled = mine[mine["item"] == "all"].iloc[0]
    assert pooled["kl"] == pytest.approx(float(np.median(torch.cat([kl[text] for text in TEXTS]))), rel=1e-2, abs=1e-5)
    assert pooled["perplexity"] == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-3)


def test_report_is_saved_summarised_and_does_not_depend_on_batches(tiny: Any, tmp_path: Any) -> None:
    model = tiny()
    options: dict[str, Any] = {"vector": direction(), "n": 2, "unrelated": None, "progress": False}
    small = edit_report(model, " water", PROMPTS, [*TEXTS, [5, 6, 7]], max_tokens=3, **options)
    large = edit_report(model, " water", PROMPTS, [*TEXTS, [5, 6, 7]], max_tokens=999, **options)
    for name in ("p_concept", "kl", "perplexity"):
        np.testing.assert_allclose(small.frame[name], large.frame[name], rtol=1e-3, atol=1e-6)
    assert load_result(small.save(tmp_path / "edit.parquet")).equals(small)
    summary = summarise_edit(small)
    assert summary["arm"].tolist() == ["none", "reversed", "random", "zeroed"]
    assert (summary["p_concept_low"] <= summary["p_concept"]).all()
    assert (summary["p_concept"] <= summary["p_concept_high"]).all()
    assert summary["p_unrelated"].isna().all()


def test_bad_arguments_are_refused(tiny: Any) -> None:
    model, x = tiny(), direction()
    for options, message in [
        ({"sites": ["down"]}, "sites=.*expected some of gate, up"),
        ({"sites": []}, "sites="),
        ({"n": 0}, "expected 1 … 144: 3 layers × 2 sites × 24"),
        ({"n": 25, "layers": [0], "sites": ["up"]}, "expected 1 … 24"),
        ({"n": 1, "threshold": 0.5}, "n or threshold"),
        ({"threshold": 0.0}, "above 0"),
        ({"threshold": 1.0}, "the highest is 0"),
        ({"layers": [3]}, "layer 3 is out of range"),
        ({"layers": []}, "at least one layer"),
    ]:
        with pytest.raises(InputError, match=message):
            plan_edit(model, x, **options)
    for wrong in (torch.zeros(16), torch.ones(15), torch.full((16,), float("nan"))):
        with pytest.raises(InputError, match="d_model=16"):
            plan_edit(model, wrong)
    with pytest.raises(InputError, match="not a single token"):
        concept_vector(model, " water money")
    with pytest.raises(InputError, match="target=1"):
        concept_vector(model, " water", target=1.0)
    with pytest.raises(InputError, match="share a token"):
        edit_report(model, " water", PROMPTS, TEXTS, vector=x, unrelated=" water", progress=False)
    with pytest.raises(InputError, match="0 prompts"):
        edit_report(model, " water", [], TEXTS, vector=x, progress=False)
    encoder = load_model(tiny_encoder(), tiny_tokenizer())
    with pytest.raises(InputError, match="encoder"):
        concept_vector(encoder, " water")
    with pytest.raises(InputError, match="encoder"):
        edit_report(encoder, " water", PROMPTS, TEXTS, vector=x, progress=False)


def test_a_vector_that_does_not_stand_for_the_concept_is_refused(tiny: Any) -> None:
    with pytest.raises(InputError, match="decodes to"):
        concept_vector(tiny(), " water", max_steps=0)


def test_weights_that_cannot_be_changed_in_place_are_refused(tiny: Any) -> None:
    model = tiny()
    edit = plan_edit(model, direction())
    quantised = model.arch.up_proj(1)
    quantised.weight = torch.nn.Parameter(quantised.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"up weights of layer 1 are torch\.int8"):
        plan_edit(model, direction())
    model.hf.to("meta")
    with pytest.raises(ModelError, match="meta device"):
        plan_edit(model, direction())
    with pytest.raises(ModelError, match="meta device"):
        apply_edit(model, edit)
    with pytest.raises(ModelError, match="meta device"), edited(model, edit):
        pass


def test_an_offloaded_layer_is_refused(tiny: Any, tmp_path: Any) -> None:
    """accelerate leaves a meta tensor behind and hands out a copy, which an edit would not survive."""
    from accelerate import cpu_offload

    model = tiny()
    cpu_offload(model.hf, execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match="offloaded"):
        plan_edit(model, direction())


def test_a_row_says_where_it_is() -> None:
    assert Row(1, "up", 7, 0.5) == Row(1, "up", 7, 0.5)
    assert ConceptVector(" a", 1, torch.ones(2), 0.9, 0.1, 3).steps == 3


@pytest.mark.slow
def test_the_embedded_model_gives_a_vector_of_water_and_keeps_its_weights(embedded: Any) -> None:
    before = weights(embedded)
    vector = concept_vector(embedded, " water")
    assert vector.probability >= 0.9
    with reverse(embedded, vector, n=5):
        assert len(changed(embedded, before)) >= 1
    assert changed(embedded, before) == []


def test_the_figure_shows_every_prompt_in_every_arm(tiny: Any) -> None:
    from interp.neurons.editing_plots import edit

    prompts = ["the dog is <b>", *PROMPTS]
    result = edit_report(
        tiny(), " water", prompts, TEXTS, vector=direction(), n_random=2, unrelated=None, progress=False
    )
    drawn = edit(result)
    assert [len(trace.y) for trace in drawn.data] == [4, 4, 8, 4]
    before = result.frame[(result.frame["arm"] == "none") & (result.frame["item"] == "prompt")]
    np.testing.assert_allclose(drawn.data[0].y, before["p_concept"], rtol=1e-6)
    assert "&lt;b&gt;" in drawn.data[0].customdata[0][0]
    assert "KL on text 0.0000 nats" in drawn.data[0].name
