"""Equalisation: gradients by finite differences, batches against single prompts, answers against plain generation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import tiny_encoder, tiny_hf, tiny_tokenizer

from interp.batching import pad
from interp.errors import InputError, ModelError
from interp.flow import embedded_flows, embedding_ascent, equalize_plots
from interp.flow.changed_answers import answer, answer_losses
from interp.flow.embedded_flows import concept_flows, embedded, exact_flows
from interp.flow.embedding_ascent import DIFFERENTIABLE, Settings, ascend, objective_value
from interp.flow.equalization import EQUALIZE_COLUMNS, equalize
from interp.flow.equalized_arms import by_prompt, combine, difference, differences, summary
from interp.flow.exact import maximum_flow
from interp.flow.graph import attention_graph
from interp.flow.named_concepts import concept_positions, mentions
from interp.model import load_model
from interp.results import Provenance, Result, load_result

PROMPTS = [" the dog is in the sea", " a cat of the old king is red", " water is tea"]
CONCEPTS = [["dog", "sea"], ["cat", "king", "red"], ["water", "tea"]]
SETTINGS = Settings("min", "soft", 4, 0.02, 1.0, 9.0, 0.01, "entropy", "half")
FAST: dict[str, Any] = {"chat": False, "max_new_tokens": 3, "steps": 3, "learning_rate": 0.02}


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def asked(model: Any) -> tuple[list[list[int]], list[Any]]:
    encoded = model.encode(PROMPTS)
    return encoded, [concept_positions(model, *row) for row in zip(encoded, PROMPTS, CONCEPTS, strict=True)]


# Concepts among tokens


@pytest.mark.parametrize(
    ("concept", "text", "found"),
    [
        ("owl", "Two OWLS sat.", True),
        ("owl", "the owl's nest", True),
        ("owl", "an owlet, a bowl", False),
        ("box", "boxes", True),
        ("cherry", "cherries", True),
        ("knife", "knives", True),
        ("wolf", "wolves", True),
        ("hot-air balloon", "hot-air  balloons", True),
        ("hot air balloon", "a hot-air balloon", True),
        ("c++", "in C++, say", True),
        ("lighthouse", "light house", False),
    ],
)
def test_mentions(concept: str, text: str, found: bool) -> None:
    assert mentions(text, concept) is found


def test_positions_are_all_tokens_of_the_concept_in_the_prompt_and_not_in_the_template() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Bytes: every token is a character or less, "é" is two tokens.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({byte: at for at, byte in enumerate(alphabet)}, []))
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built)
    tokenizer.chat_template = "a dog says: {{ messages[0]['content'] }} |"
    model = load_model(tiny_hf("llama", vocab_size=256), tokenizer)
    prompt = "A dog, a café and dogs."
    (ids,) = model.encode([prompt], chat=True)
    dog, cafe = concept_positions(model, ids, prompt, ["dog", "café"])
    start = len("a dog says: ")
    assert dog == tuple(range(start + 2, start + 5)) + tuple(range(start + 19, start + 23))
    assert cafe == tuple(range(start + 9, start + 14))  # five bytes
    assert bytes(tokenizer.decode([ids[at] for at in cafe]), "utf-8") == "café".encode()


def test_concepts_that_cannot_be_found_are_named(model: Any) -> None:
    with pytest.raises(InputError, match=r"' the dog is in the sea' does not name 'piano'"):
        equalize(model, PROMPTS[:1], [["dog", "piano"]], **FAST)
    with pytest.raises(InputError, match=r"'dog' and 'the dog' share a token"):
        equalize(model, PROMPTS[:1], [["dog", "the dog"]], **FAST)


# Flows and their gradient


def test_flows_are_those_of_the_graph(model: Any, asked: Any) -> None:
    encoded, groups = asked
    for ids, group, flows in zip(encoded, groups, exact_flows(model, encoded, groups), strict=True):
        capacity = attention_graph(model, ids).capacity
        assert flows == pytest.approx(maximum_flow(capacity, [-1], group)[0].double().numpy(), abs=1e-6)


@pytest.mark.parametrize("method", DIFFERENTIABLE)
@pytest.mark.parametrize("objective", ["min", "variance"])
def test_gradient_against_finite_differences(method: str, objective: str) -> None:
    # GPT-2's eager softmax stays float64; Llama's is float32 whatever the weights are.
    model = load_model(tiny_hf("gpt2").double(), tiny_tokenizer())
    (ids,) = model.encode(PROMPTS[1:2])
    groups = [concept_positions(model, ids, PROMPTS[1], CONCEPTS[1])]
    batch = pad([ids], [0], 0)

    def value(delta: torch.Tensor) -> torch.Tensor:
        inputs = embedded(model, batch, [delta])
        (flows,) = concept_flows(model, inputs, batch, groups, method=method)
        assert flows.dtype == torch.float64
        return objective_value(flows, objective)

    delta = torch.zeros(len(ids), 16, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(1)
    with model.attention_implementation("eager"):
        (gradient,) = torch.autograd.grad(value(delta), delta)
        assert gradient.any()
        for _ in range(4):
            direction = torch.randn(delta.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                change = (value(1e-6 * direction) - value(-1e-6 * direction)) / 2e-6
            assert float((gradient * direction).sum()) == pytest.approx(float(change), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("method", DIFFERENTIABLE)
def test_the_smallest_flow_rises_from_step_to_step(model: Any, asked: Any, method: str) -> None:
    settings = dataclasses.replace(SETTINGS, method=method, steps=6, learning_rate=0.003)
    for ascent in ascend(model, *asked, settings):
        smallest = ascent.trace.min(1)
        assert (np.diff(smallest) > 0).all()
        assert (ascent.kept, ascent.steps, len(smallest), ascent.stopped) == (6, 6, 7, "steps")


def test_the_variance_falls(model: Any, asked: Any) -> None:
    settings = dataclasses.replace(SETTINGS, objective="variance", method="exact", steps=6, learning_rate=0.01)
    for ascent in ascend(model, *asked, settings):
        assert (np.diff(ascent.trace.var(1)) < 0).all()


def test_a_step_too_far_is_not_kept(model: Any, asked: Any) -> None:
    settings = dataclasses.replace(SETTINGS, method="exact", steps=2, learning_rate=20.0, max_norm=1e9)
    for ascent in ascend(model, *asked, settings):
        assert ascent.kept == ascent.trace.min(1).argmax()


def test_a_batch_gives_what_single_prompts_give(model: Any, asked: Any) -> None:
    encoded, groups = asked
    together = ascend(model, encoded, groups, SETTINGS)
    for at, ascent in enumerate(together):
        (alone,) = ascend(model, encoded[at : at + 1], groups[at : at + 1], SETTINGS)
        assert ascent.trace == pytest.approx(alone.trace, abs=1e-5)
        assert torch.allclose(ascent.delta, alone.delta, atol=1e-3)
        assert ascent.delta.shape == (len(encoded[at]), 16)


def test_what_is_kept_is_what_the_changed_embeddings_give(model: Any, asked: Any) -> None:
    encoded, groups = asked
    ascents = ascend(model, encoded, groups, dataclasses.replace(SETTINGS, method="exact"))
    flows = exact_flows(model, encoded, groups, [one.delta for one in ascents])
    for one, found in zip(ascents, flows, strict=True):
        assert found == pytest.approx(one.trace[one.kept], abs=1e-5)


# Stopping


def test_equal_flows_need_no_step(model: Any, asked: Any) -> None:
    for ascent in ascend(model, *asked, dataclasses.replace(SETTINGS, threshold=0.0)):
        assert (ascent.stopped, ascent.steps, ascent.kept) == ("threshold", 0, 0)
        assert not ascent.delta.any()


def test_prompts_stop_by_themselves(model: Any, asked: Any) -> None:
    settings = dataclasses.replace(SETTINGS, method="exact", steps=20, threshold=0.9)
    ascents = ascend(model, *asked, settings)
    assert [one.stopped for one in ascents] == ["threshold", "steps", "threshold"]
    assert len({one.steps for one in ascents}) == 3
    for one in ascents:
        even = one.trace.min(1) / one.trace.mean(1)
        assert (even[:-1] < 0.9).all()
        assert (even[-1] >= 0.9) == (one.stopped == "threshold")


def test_the_norm_is_bounded(model: Any, asked: Any) -> None:
    encoded, groups = asked
    for at, one in enumerate(ascend(model, encoded, groups, dataclasses.replace(SETTINGS, max_norm=0.03))):
        assert one.stopped == "norm"
        assert one.steps == 2  # a first step goes to 0.02
        size = model.arch.embedding()(torch.tensor(encoded[at])).detach().norm()
        assert float(one.delta.norm() / size) == pytest.approx(0.03, rel=1e-4)


def test_the_first_step_has_the_learning_rate_s_norm(model: Any, asked: Any) -> None:
    encoded, groups = asked
    settings = dataclasses.replace(SETTINGS, method="rollout", steps=1, learning_rate=0.01)
    for at, one in enumerate(ascend(model, encoded, groups, settings)):
        size = model.arch.embedding()(torch.tensor(encoded[at])).detach().norm()
        # Below it where embeddings have no gradient at all.
        assert 0.005 < float(one.delta.norm() / size) < 0.01001


def test_a_flat_objective_stops(model: Any, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = {"soft": lambda capacity, targets, groups, **_: 0 * capacity.sum() + torch.tensor([[1.0, 2.0]])}
    monkeypatch.setattr(embedded_flows, "METHODS", flat)
    for one in ascend(model, *asked, SETTINGS):
        assert (one.stopped, one.steps) == ("flat", 0)


def test_a_gradient_that_is_not_finite_is_an_error_and_leaves_the_model(
    model: Any, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(capacity: torch.Tensor, targets: Any, groups: Any, **_: Any) -> torch.Tensor:
        return (capacity.sum() * 0).sqrt() + torch.tensor([[1.0, 2.0]])

    monkeypatch.setattr(embedded_flows, "METHODS", {"soft": broken})
    weight = model.hf.lm_head.weight
    weight.requires_grad_(False)
    before = {name: one.requires_grad for name, one in model.hf.named_parameters()}
    try:
        with pytest.raises(InputError, match="gradient of prompt 1 is not finite at step 0"):
            ascend(model, *asked, SETTINGS)
        assert {name: one.requires_grad for name, one in model.hf.named_parameters()} == before
        assert model.attention == "sdpa"
    finally:
        weight.requires_grad_(True)


def test_weights_and_their_flags_are_left(tiny: Any) -> None:
    model = tiny("llama")
    model.hf.lm_head.weight.requires_grad_(False)
    before = {name: (one.requires_grad, one.detach().clone()) for name, one in model.hf.named_parameters()}
    equalize(model, PROMPTS, CONCEPTS, **FAST)
    for name, one in model.hf.named_parameters():
        assert one.requires_grad is before[name][0]
        assert one.grad is None
        assert torch.equal(one, before[name][1])


# Answers


def test_without_a_change_answers_are_those_of_generate(family: str, tiny: Any) -> None:
    model = tiny(family)
    encoded = model.encode(PROMPTS)
    plain = model.generate_ids(encoded, max_new_tokens=6)
    assert answer(model, encoded, max_new_tokens=6) == plain
    zeros = [torch.zeros(len(ids), 16) for ids in encoded]
    assert answer(model, encoded, zeros, max_new_tokens=6) == plain


@torch.no_grad()
def test_answers_continue_the_changed_embeddings(model: Any, asked: Any) -> None:
    encoded, _ = asked
    deltas = [torch.randn(len(ids), 16, generator=torch.Generator().manual_seed(at)) for at, ids in enumerate(encoded)]
    answers = answer(model, encoded, deltas, max_new_tokens=4)
    assert answers != model.generate_ids(encoded, max_new_tokens=4)
    for ids, delta, found in zip(encoded, deltas, answers, strict=True):
        inputs = model.arch.embedding()(torch.tensor([ids])) + delta
        for token in found:  # without a cache
            assert int(model.hf(inputs_embeds=inputs).logits[0, -1].argmax()) == token
            inputs = torch.cat([inputs, model.arch.embedding()(torch.tensor([[token]]))], 1)


@torch.no_grad()
def test_losses_are_of_the_answer_after_the_prompt(model: Any, asked: Any) -> None:
    encoded, _ = asked
    answers = [[5, 9, 2], [7], [8, 30]]
    for ids, more, loss in zip(encoded, answers, answer_losses(model, encoded, answers), strict=True):
        scores = model.hf(input_ids=torch.tensor([ids + more])).logits[0].log_softmax(-1)
        by_hand = [-float(scores[len(ids) - 1 + at, token]) for at, token in enumerate(more)]
        assert loss == pytest.approx(np.mean(by_hand), abs=1e-4)


# One arm


def test_every_family_equalises(family: str, tiny: Any) -> None:
    result = equalize(tiny(family), PROMPTS, CONCEPTS, method="exact", **FAST)
    frame = result.frame
    assert frame["concept"].tolist() == [concept for named in CONCEPTS for concept in named]
    smallest = frame.groupby("prompt")[["flow_before", "flow_after"]].min()
    assert (smallest["flow_after"] >= smallest["flow_before"] - 1e-6).all()
    assert frame["own_after"].tolist() == pytest.approx(frame["flow_after"].tolist(), abs=1e-4)


def test_the_table_says_what_happened(model: Any, tmp_path: Any) -> None:
    result = equalize(model, PROMPTS, CONCEPTS, **FAST)
    frame = result.frame
    assert result.kind == "flow.equalize"
    assert [column.name for column in EQUALIZE_COLUMNS] == list(frame.columns)
    assert frame["arm"].unique().tolist() == ["min soft"]
    for row in frame.itertuples():
        assert row.mentioned == mentions(row.text, row.concept)
        assert row.perplexity == pytest.approx(math.exp(row.nll))
        assert 0 < row.norm < 0.1
        trace = result.attachments["trace"]["min soft"][row.prompt]
        own = [trace[step][CONCEPTS[row.prompt].index(row.concept)] for step in (0, row.kept_step)]
        assert [row.own_before, row.own_after] == pytest.approx(own, abs=1e-5)
    norms = result.attachments["position_norms"]["min soft"]
    sizes = [model.arch.embedding()(torch.tensor(ids)).norm().item() for ids in model.encode(PROMPTS)]
    expected = [np.linalg.norm(row) / size for row, size in zip(norms, sizes, strict=True)]
    assert frame.groupby("prompt")["norm"].first().tolist() == pytest.approx(expected, rel=1e-4)
    assert load_result(result.save(tmp_path / "arm.parquet")).equals(result)


def test_none_is_the_model_as_it_is(model: Any) -> None:
    result = equalize(model, PROMPTS, CONCEPTS, objective="none", **FAST)
    assert result.frame["flow_after"].equals(result.frame["flow_before"].rename("flow_after"))
    assert result.frame.drop_duplicates("prompt")["text"].tolist() == model.generate(PROMPTS, max_new_tokens=3)
    assert (result.frame["norm"] == 0).all()
    assert result.frame["own_after"].isna().all()


def test_a_random_direction_has_the_norms_of_the_other_arm(model: Any) -> None:
    ascended = equalize(model, PROMPTS, CONCEPTS, **FAST)
    random = equalize(model, PROMPTS, CONCEPTS, objective="random", like=ascended, **FAST)
    assert random.frame["arm"].unique().tolist() == ["random like min soft"]
    assert random.frame["norm"].tolist() == pytest.approx(ascended.frame["norm"].tolist(), rel=1e-4)
    ours = random.attachments["position_norms"]["random like min soft"]
    for row, other in zip(ours, ascended.attachments["position_norms"]["min soft"], strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-7)
    assert random.frame["flow_after"].tolist() != pytest.approx(ascended.frame["flow_after"].tolist(), abs=1e-4)
    again, another = (
        equalize(model, PROMPTS, CONCEPTS, objective="random", like=ascended, seed=seed, **FAST) for seed in (0, 1)
    )
    assert again.equals(random)
    assert not another.equals(random)


def test_a_random_direction_by_itself_has_the_norm_asked_for(model: Any) -> None:
    random = equalize(model, PROMPTS, CONCEPTS, objective="random", max_norm=0.25, **FAST)
    assert random.frame["norm"].tolist() == pytest.approx([0.25] * 7, rel=1e-4)


def test_half_precision(tiny: Any) -> None:
    model = load_model(tiny_hf("llama").bfloat16(), tiny_tokenizer())
    result = equalize(model, PROMPTS, CONCEPTS, method="exact", **{**FAST, "learning_rate": 0.05})
    smallest = result.frame.groupby("prompt")[["flow_before", "flow_after"]].min()
    assert (smallest["flow_after"] > smallest["flow_before"]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [], "concepts": []}, "no prompts were given"),
        ({"prompts": PROMPTS[0]}, "prompts and concepts are lists"),
        ({"concepts": CONCEPTS[:1]}, "3 prompts and concepts for 1"),
        ({"prompts": [[5, 6], *PROMPTS[1:]]}, "prompt 0 is"),
        ({"concepts": [["dog"], *CONCEPTS[1:]]}, "prompt 0 has the concepts"),
        ({"concepts": ["dog", *CONCEPTS[1:]]}, "at least two different ones"),
        ({"concepts": [["dog", " "], *CONCEPTS[1:]]}, "has no letters"),
        ({"objective": "max"}, "objective='max'; expected one of min, variance, none, random"),
        ({"method": "bound"}, "method='bound'"),
        ({"residual": "double"}, "residual='double'"),
        ({"bias": "some"}, "bias='some'"),
        ({"steps": 0}, "steps=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"max_norm": -1.0}, "max_norm=-1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"max_new_tokens": 60}, r"a prompt of 8 tokens and 60 new tokens exceed the context of 64 tokens"),
        ({"prompts": [" the" * 70 + " dog sea", *PROMPTS[1:]]}, "the model's context is 64 tokens"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_bad_input_is_refused_with_the_reason(model: Any, changes: dict[str, Any], message: str) -> None:
    arguments = {"prompts": PROMPTS, "concepts": CONCEPTS, **FAST, **changes}
    with pytest.raises(InputError, match=message):
        equalize(model, **arguments)


def test_encoders_and_wrong_likes_are_refused(model: Any) -> None:
    with pytest.raises(InputError, match="is an encoder"):
        equalize(load_model(tiny_encoder(), tiny_tokenizer()), PROMPTS, CONCEPTS, **FAST)
    arm = equalize(model, PROMPTS, CONCEPTS, objective="none", **FAST)
    with pytest.raises(InputError, match="`like` is for objective='random'"):
        equalize(model, PROMPTS, CONCEPTS, like=arm, **FAST)
    with pytest.raises(InputError, match="`like` is an arm of other prompts"):
        equalize(model, PROMPTS[:2], CONCEPTS[:2], objective="random", like=arm, **FAST)
    both = combine([arm, equalize(model, PROMPTS, CONCEPTS, **FAST)])
    with pytest.raises(InputError, match="`like` has several arms"):
        equalize(model, PROMPTS, CONCEPTS, objective="random", like=both, **FAST)


def test_a_model_without_patterns_is_named(model: Any, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = model.hf.model.forward

    def without(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        output.attentions = None
        return output

    monkeypatch.setattr(model.hf.model, "forward", without)
    with pytest.raises(ModelError, match="gave no attention patterns"):
        exact_flows(model, *asked)


# Arms together


def made(arm: str, rows: list[tuple[int, str, float, float, bool, float]], model: str = "m") -> Result:
    """An arm from (prompt, concept, flow before, flow after, mentioned, nll)."""
    frame = pd.DataFrame(rows, columns=["prompt", "concept", "flow_before", "flow_after", "mentioned", "nll"])
    fill: dict[str, Any] = {"first_position": 1, "n_positions": 1, "text": "t", "n_tokens": 3, "norm": 0.1, "steps": 2}
    fill |= {"arm": arm, "prompt_text": "p", "kept_step": 2, "stopped": "steps", "own_before": 0.1, "own_after": 0.2}
    frame = frame.assign(perplexity=np.exp(frame["nll"]), **fill)
    provenance = Provenance(model=model, fingerprint=model, parameters={"arm": arm, "steps": 2})
    attachments = {"position_norms": {arm: []}, "trace": {}}
    return Result("flow.equalize", frame, EQUALIZE_COLUMNS, provenance, attachments)


NONE = made("none", [(0, "a", 0.2, 0.2, True, 1.0), (0, "b", 0.4, 0.4, False, 1.0), (1, "a", 0.3, 0.3, True, 3.0)])
MIN = made("min soft", [(0, "a", 0.2, 0.5, True, 2.0), (0, "b", 0.4, 0.5, True, 2.0), (1, "a", 0.3, 0.3, False, 3.0)])


def test_arms_side_by_side_by_hand() -> None:
    result = combine([NONE, MIN])
    assert result.provenance.parameters == {
        "steps": 2,
        "arms": {"none": {"arm": "none"}, "min soft": {"arm": "min soft"}},
    }
    table = by_prompt(result)
    assert table.loc[("none", 0), ["mentioned", "all_mentioned", "min_flow"]].tolist() == [0.5, 0.0, 0.2]
    assert table.loc[("min soft", 0), ["mentioned", "min_flow_before", "min_flow"]].tolist() == [1.0, 0.2, 0.5]
    assert table.loc[("min soft", 0), "evenness_before"] == pytest.approx(0.2 / 0.3)
    rows = summary(result).set_index("arm")
    assert rows.loc["none", "mentioned"] == 0.75
    assert rows.loc["min soft", "mentioned"] == 0.5
    assert rows.loc["none", "perplexity"] == pytest.approx(math.exp(2.0))
    change = difference(result, "min soft", "none")
    assert (change["mean"], change["low"], change["high"], change["n"]) == (-0.25, -1.0, 0.5, 2)
    assert difference(result, "min soft", "before", "min_flow")["mean"] == pytest.approx(0.15)
    listed = differences(result)
    assert listed[["arm", "baseline"]].drop_duplicates().values.tolist() == [["min soft", "none"]]


def test_arms_that_do_not_belong_together_are_refused() -> None:
    other = made("min soft", [(0, "a", 0.2, 0.2, True, 1.0)])
    foreign = made("min soft", [(0, "a", 0.2, 0.2, True, 1.0)], model="n")
    for arms, message in (
        ([], "no arms were given"),
        ([NONE, NONE], "one of them is there twice"),
        ([NONE, other], "answer other prompts"),
        ([NONE, foreign], "arms of two models"),
    ):
        with pytest.raises(InputError, match=message):
            combine(arms)
    with pytest.raises(InputError, match="there is no arm 'min exact'; expected one of none, min soft"):
        difference(combine([NONE, MIN]), "min exact", "none")
    with pytest.raises(InputError, match="outcome='tokens'"):
        difference(combine([NONE, MIN]), "min soft", "none", "tokens")
    with pytest.raises(InputError, match=r"expected one of 'flow.equalize'"):
        by_prompt(dataclasses.replace(NONE, kind="flow.other"))


def test_the_plot_shows_the_summary() -> None:
    result = combine([NONE, MIN])
    drawn = equalize_plots.equalize(result)
    rows = summary(result)
    shares = next(trace for trace in drawn.data if trace.name == "concepts named")
    assert list(shares.x) == pytest.approx(rows["mentioned"].tolist())
    assert list(shares.error_x.array) == pytest.approx((rows["mentioned_high"] - rows["mentioned"]).tolist())
    change = difference(result, "min soft", "none")
    changes = next(trace for trace in drawn.data if trace.name == shares.name and trace.xaxis == "x2")
    assert [*changes.x, *changes.error_x.array] == pytest.approx([change["mean"], change["high"] - change["mean"]])
    flows = [trace for trace in drawn.data if trace.name == "least flow of a prompt"]
    assert [list(trace.x) for trace in flows] == [
        pytest.approx(rows["min_flow_before"].tolist()),
        pytest.approx(rows["min_flow"].tolist()),
    ]
    assert list(drawn.layout.yaxis.ticktext) == ["none", "min soft"]


def test_one_prompt_is_drawn_and_has_no_interval(model: Any) -> None:
    result = equalize(model, PROMPTS[:1], CONCEPTS[:1], **FAST)
    assert summary(result)["mentioned_low"].isna().all()
    assert len(equalize_plots.equalize(result).to_json()) < 200_000


@pytest.mark.slow
def test_the_embedded_model_equalises(embedded: Any) -> None:
    prompts, concepts = ["Write one sentence about a dog, a piano and a lighthouse."], [["dog", "piano", "lighthouse"]]
    for method in ("soft", "exact"):
        result = equalize(embedded, prompts, concepts, method=method, steps=4, learning_rate=0.005, max_new_tokens=4)
        frame = result.frame
        assert frame["own_after"].min() > 1.02 * frame["own_before"].min()
        assert frame["norm"].max() < 0.03
        assert embedding_ascent.OBJECTIVES == ("min", "variance")
