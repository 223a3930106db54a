"""Gradient attributions: captum on whole inputs one at a time, completeness, what fails alone, what is refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from plain_games import PlainGame, TableGame, tiny_classifier
from torch import nn

from interp import batching
from interp.agreement import gradients
from interp.agreement.coalitions import Coalitions
from interp.agreement.explaining import explain_coalitions
from interp.agreement.explanation_table import costs
from interp.agreement.gradients import EmbeddingTarget, completeness_error
from interp.agreement.ground_truth import linear_classifier
from interp.agreement.perturbations import draws_seed
from interp.agreement.tasks import Classifier, Continuation, Verbalizer
from interp.errors import InputError, MemoryBudgetError
from interp.model import load_model

METHODS = ("integrated_gradients", "input_x_gradient", "gradient_shap")
TASK = Verbalizer(
    {"no": " water", "yes": " money"}, template="{text} is", shots=[(" the dog is old", "yes")], separator=""
)
TEXTS = [" the dog of the sea", " a king", " music", " the old cat in water code"]
GAMES: dict[str, Any] = {
    "few-shot": lambda tiny: Coalitions(tiny(), TEXTS, task=TASK),
    "next token": lambda tiny: Coalitions(tiny(), TEXTS, target="logit_difference", baseline="mean"),
    "learned positions": lambda tiny: Coalitions(tiny("gpt2"), TEXTS, task=TASK, target="probability"),
    "sliding window": lambda tiny: Coalitions(tiny("mistral"), TEXTS, task=TASK, baseline="zero"),
    "continuation": lambda tiny: Coalitions(
        tiny(), [(" the dog of", " the sea"), (" a king in", " tea water"), (" red", " sun")], task=Continuation()
    ),
    "encoder": lambda tiny: Coalitions(tiny_classifier(), ["the dog of sea", "music", "a red king in water"]),
}
# Four of one length, so that they share batches, and others.
CROWD = ["a red king", "the old dog", "music in code", "sun is new", "the dog of sea", "tea"]


def crowd(kind: str, tiny: Any) -> Coalitions:
    if kind == "encoder":
        return Coalitions(tiny_classifier(), CROWD)
    return Coalitions(tiny(), [f" {text}" for text in CROWD], task=TASK)


def run(game: Coalitions, method: str, examples: Sequence[int] | None = None, seed: int = 0, **options: Any) -> Any:
    if method == "integrated_gradients":
        options = {"n_steps": 24, "max_steps": 24, **options}
    chosen = list(range(len(game))) if examples is None else list(examples)
    return getattr(gradients, method)(game, chosen, seed, **options)


def captum_on(plain: PlainGame, method: str, seed: int) -> np.ndarray:
    """Captum's own call on the whole input, summed over embedding entries, at the explained positions."""
    from captum.attr import GradientShap, InputXGradient, IntegratedGradients

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  captum draws from it
    torch.manual_seed(seed)
    inputs = plain.embeds.clone().requires_grad_()
    calls = {
        "integrated_gradients": lambda: IntegratedGradients(plain).attribute(inputs, plain.baseline, n_steps=24),
        "input_x_gradient": lambda: InputXGradient(plain).attribute(inputs),
        "gradient_shap": lambda: GradientShap(plain).attribute(inputs, plain.baseline, n_samples=25),
    }
    return calls[method]().detach().sum(-1)[0, plain.positions].double().numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", GAMES)
def test_each_method_is_captums_on_whole_inputs(tiny: Any, kind: str, method: str) -> None:
    game = GAMES[kind](tiny)
    # Prompts are cached where a tree mask is exact; the texts of "next token" begin with different tokens.
    assert (EmbeddingTarget(game).skip > 0) == (kind in ("few-shot", "learned positions"))
    scores, calls = run(game, method, seed=4)
    scale = max(np.abs(own).max() for own in scores)
    assert (calls == {"integrated_gradients": 24, "input_x_gradient": 1, "gradient_shap": 25}[method]).all()
    for example, found in enumerate(scores):
        expected = captum_on(PlainGame(game, example), method, draws_seed(4, example))
        np.testing.assert_allclose(found, expected, atol=2e-4 * scale)


@pytest.mark.filterwarnings("ignore")
def test_integrated_gradients_of_every_family(tiny: Any, family: str) -> None:
    game = Coalitions(tiny(family), [" the dog of the sea", " a king in the water"])
    for example, found in enumerate(run(game, "integrated_gradients")[0]):
        expected = captum_on(PlainGame(game, example), "integrated_gradients", 0)
        np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["few-shot", "encoder"])
def test_company_and_budget_do_not_matter(tiny: Any, kind: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    game = crowd(kind, tiny)
    sizes: list[int] = []
    real = EmbeddingTarget.forward

    def spy(self: Any, embedded: torch.Tensor, examples: torch.Tensor) -> torch.Tensor:
        sizes.append(len(embedded))
        return real(self, embedded, examples)

    monkeypatch.setattr(EmbeddingTarget, "forward", spy)
    together = run(game, method, seed=2)[0]
    largest = max(sizes)
    sizes.clear()
    monkeypatch.setattr(gradients, "gradient_budget", lambda coalitions: 1)
    single = run(game, method, seed=2)[0]
    assert max(sizes) == 1 < largest
    backwards = run(game, method, range(len(game))[::-1], seed=2)[0][::-1]
    for one, two, three in zip(together, single, backwards, strict=True):
        np.testing.assert_allclose(two, one, atol=1e-5, rtol=1e-4)
        np.testing.assert_allclose(three, one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["few-shot", "next token", "learned positions", "encoder"])
def test_padding_does_not_matter(tiny: Any, kind: str) -> None:
    game = GAMES[kind](tiny)
    target, every = EmbeddingTarget(game), list(range(len(game)))
    assert len({game.size(example) for example in every}) == len(every)

    def attribute(inputs: torch.Tensor, baselines: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        assert len(inputs) == len(every)  # all in one batch, padded
        part = inputs.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(target(part, which).sum(), part)
        return part * gradient

    found = gradients._attributions(target, every, attribute)
    for example in every:
        expected = captum_on(PlainGame(game, example), "input_x_gradient", 0)
        np.testing.assert_allclose(found[example], expected, atol=1e-5, rtol=1e-3)


def test_gradient_shap_follows_the_seed(tiny: Any) -> None:
    game = GAMES["few-shot"](tiny)
    first, again, other = (run(game, "gradient_shap", [0], seed)[0][0] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-4)


# Completeness


def test_completeness_error_by_hand() -> None:
    game: Any = TableGame([1.0, 0.0, 0.0, 5.0], [2.0, 2.0])
    assert completeness_error(game, 0, np.array([1.0, 2.0])) == pytest.approx(0.25)  # |3 − 4| / 4
    assert completeness_error(game, 0, np.array([-1.0, -3.0])) == pytest.approx(2.0)
    assert completeness_error(game, 0, np.array([6.0, -2.0])) == 0
    assert np.isnan(completeness_error(game, 0, np.array([np.nan, 1.0])))
    assert np.isnan(completeness_error(game, 1, np.array([0.0])))  # nothing to share out


def test_steps_double_until_complete_or_the_cap(tiny: Any) -> None:
    game = GAMES["next token"](tiny)
    scores, calls = run(game, "integrated_gradients", n_steps=2, max_steps=2)
    errors = [completeness_error(game, at, own) for at, own in enumerate(scores)]
    assert calls.tolist() == [2] * 4
    assert min(errors) > 0
    calls = run(game, "integrated_gradients", n_steps=2, max_steps=2, tolerance=0.0)[1]
    assert calls.tolist() == [2] * 4
    # The cap stops the doubling: 2 + 4 + 8 steps, as 16 would be too many.
    calls = run(game, "integrated_gradients", n_steps=2, max_steps=15, tolerance=0.0)[1]
    assert calls.tolist() == [14] * 4
    # Only those above the tolerance go on.
    tolerance = float(np.median(errors))
    better, calls = run(game, "integrated_gradients", n_steps=2, max_steps=256, tolerance=tolerance)
    for at, error in enumerate(errors):
        assert (calls[at] > 2) == (error > tolerance)
        assert completeness_error(game, at, better[at]) <= tolerance
        if error <= tolerance:
            np.testing.assert_allclose(better[at], scores[at], atol=1e-5)
    many = run(game, "integrated_gradients", n_steps=256, max_steps=256)[0]
    final = [completeness_error(game, at, own) for at, own in enumerate(many)]
    assert max(final) < 0.01
    assert max(final) < max(errors) / 4


def test_a_gradient_that_is_not_finite_fails_alone(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    game = GAMES["few-shot"](tiny)
    clean = {method: run(game, method)[0] for method in METHODS}
    real = game.reduce

    def broken(logits: torch.Tensor, examples: Sequence[int]) -> torch.Tensor:
        values = real(logits, examples)
        rows = torch.tensor([row for row, example in enumerate(examples) if example == 1], dtype=torch.long)
        # The value stays; the gradient of a root at 0 is infinite, times 0.
        return values.index_add(0, rows, (values[rows] - values[rows]).sqrt())

    monkeypatch.setattr(game, "reduce", broken)
    result = explain_coalitions(game, METHODS, options={"integrated_gradients": {"n_steps": 24, "max_steps": 96}})
    for method in METHODS:
        rows = result.frame[result.frame["method"] == method]
        for example, group in rows.groupby("example"):
            assert group["score"].isna().all() if example == 1 else group["score"].notna().all()
            assert group["completeness_error"].isna().all() == (example == 1)
        np.testing.assert_allclose(rows[rows["example"] == 0]["score"], clean[method][0], atol=1e-2)
    table = costs(result).set_index("method")
    assert table["failed"].to_dict() == dict.fromkeys(METHODS, 1)
    assert (table["n"] == 4).all()
    # More steps do not mend it.
    ig = result.frame[(result.frame["method"] == "integrated_gradients") & (result.frame["example"] == 1)]
    assert set(ig["model_calls"]) == {24}


def test_one_missing_score_fails_the_example(tiny: Any) -> None:
    game = GAMES["few-shot"](tiny)
    target = EmbeddingTarget(game)

    def attribute(inputs: torch.Tensor, baselines: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        found = torch.ones_like(inputs)
        found[0, game.encoded[0].positions[1] - target.skip, 3] = torch.inf
        return found

    found = gradients._attributions(target, [0, 1], attribute)
    assert np.isnan(found[0]).all()  # the others cannot be ranked without it
    np.testing.assert_allclose(found[1], [16, 16])


# DeepLIFT


def relu_network() -> Any:
    """A sum of embeddings through a linear layer, ReLU modules and a linear layer: DeepLIFT's rescale rule is complete on it."""
    hf = linear_classifier(n_tokens=20, d_model=6, n_classes=2, seed=3)
    torch.manual_seed(0)
    hf.classifier = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    return load_model(hf.eval(), check=False)


@pytest.mark.parametrize("method", ["deeplift", "deepshap"])
def test_deeplift_by_hand_where_it_is_complete(method: str) -> None:
    model = relu_network()
    texts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]
    game = Coalitions(model, texts, target="logit_difference", baseline="mean")
    result = explain_coalitions(game, [method, "input_x_gradient"])
    assert result.provenance.parameters["refused"] == {}
    first, last = model.hf.classifier[0], model.hf.classifier[2]
    crossed = 0
    with torch.no_grad():
        for example, ids in enumerate(texts):
            embeds = model.hf.embed_tokens(torch.tensor(ids))
            absent = model.hf.embed_tokens.weight.mean(0)
            before, at_baseline = first(embeds.sum(0)), first(len(ids) * absent)
            # Rescale: (relu(z) − relu(z₀)) / (z − z₀) instead of the gradient.
            slopes = (before.relu() - at_baseline.relu()) / (before - at_baseline)
            crossed += int(((before > 0) != (at_baseline > 0)).sum())
            rows = last.weight[game.wanted[example]] - last.weight[game.contrast[example]]
            expected = (embeds - absent) @ ((rows[0] * slopes) @ first.weight)
            mine = result.frame[(result.frame["method"] == method) & (result.frame["example"] == example)]
            np.testing.assert_allclose(mine["score"], expected, atol=1e-5)
            assert (mine["completeness_error"] < 1e-4).all()
    assert crossed > 0
    others = result.frame[result.frame["method"] == "input_x_gradient"]
    assert (others.groupby("example")["completeness_error"].first() > 0.01).any()


@pytest.mark.parametrize("kind", ["few-shot", "encoder"])
@pytest.mark.parametrize("method", ["deeplift", "deepshap"])
def test_deeplift_is_refused_on_transformers_with_the_figure(tiny: Any, kind: str, method: str) -> None:
    game = GAMES[kind](tiny)
    scores, calls = run(game, method)
    assert (calls > 0).all()
    errors = [completeness_error(game, at, own) for at, own in enumerate(scores)]
    assert np.median(errors) > 0.1
    with pytest.warns(UserWarning, match=f"{method} is left out"):
        result = explain_coalitions(game, [method, "recency"])
    reason = result.provenance.parameters["refused"][method]
    assert f"{np.median(errors):.0%} (median of {len(game)} examples" in reason
    assert set(result.frame["method"]) == {"recency"}
    with pytest.warns(UserWarning, match="left out"), pytest.raises(InputError, match="no method is left"):
        explain_coalitions(game, method)
    forced = explain_coalitions(game, [method], force=(method,))
    assert forced.provenance.parameters["forced"] == [method]
    for example, own in enumerate(scores):
        rows = forced.frame[forced.frame["example"] == example]
        np.testing.assert_allclose(rows["score"], own, atol=1e-6)
        assert rows["completeness_error"].iloc[0] == pytest.approx(errors[example], abs=1e-6)


# Out of memory


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("most", [1, 3])
def test_out_of_memory_takes_fewer_rows_at_once(
    tiny: Any, method: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    game = crowd("few-shot", tiny)
    before, calls_before = run(game, method)
    real = EmbeddingTarget.forward
    failures = 0
    monkeypatch.setattr(batching, "free_memory", lambda: None)  # 0.3 s a time

    def small(self: Any, embedded: torch.Tensor, examples: torch.Tensor) -> torch.Tensor:
        nonlocal failures
        if len(embedded) > most:
            failures += 1
            raise torch.OutOfMemoryError("out of memory")
        return real(self, embedded, examples)

    monkeypatch.setattr(EmbeddingTarget, "forward", small)
    after, calls = run(game, method)
    assert failures > 0
    assert calls.tolist() == calls_before.tolist()
    for one, two in zip(before, after, strict=True):
        np.testing.assert_allclose(two, one, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(EmbeddingTarget, "forward", lambda *given: (_ for _ in ()).throw(torch.OutOfMemoryError("oom")))
    with pytest.raises(MemoryBudgetError, match="single text"):
        run(game, method)


def test_what_memory_there_is_is_remembered(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    game = GAMES["few-shot"](tiny)
    sizes: list[int] = []
    real = EmbeddingTarget.forward
    monkeypatch.setattr(batching, "free_memory", lambda: None)

    def small(self: Any, embedded: torch.Tensor, examples: torch.Tensor) -> torch.Tensor:
        sizes.append(len(embedded))
        if len(embedded) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, embedded, examples)

    monkeypatch.setattr(EmbeddingTarget, "forward", small)
    run(game, "gradient_shap", [0, 0, 0])
    assert sum(size > 4 for size in sizes) < 5  # 25, 12, 6 rows: once
    assert sum(size for size in sizes if size <= 4) == 75


def test_other_errors_are_not_taken_for_memory(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    game = GAMES["few-shot"](tiny)

    def broken(self: Any, *given: Any) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(EmbeddingTarget, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        run(game, "integrated_gradients")


# The model is left as it was


def test_weights_and_gradients_are_left_alone(tiny: Any) -> None:
    game = GAMES["encoder"](tiny)
    before = copy.deepcopy(game.model.hf.state_dict())
    for method in (*METHODS, "deeplift"):
        run(game, method)
    assert all(torch.equal(value, before[name]) for name, value in game.model.hf.state_dict().items())
    assert all(parameter.grad is None for parameter in game.model.hf.parameters())
    hooks = [module for module in game.model.hf.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert hooks == []


def test_a_decoder_classifier_reads_its_last_position(tokenizer: Any) -> None:
    import transformers
    from tiny_models import GQA

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**GQA, "num_labels": 3})
    hf = transformers.LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    game = Coalitions(load_model(hf, tokenizer), [" the dog of the sea", " a king"], task=Classifier())
    for example, found in enumerate(run(game, "integrated_gradients")[0]):
        # The head finds the last token of embeddings without padding by itself.
        expected = captum_on(PlainGame(game, example), "integrated_gradients", 0)
        np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))
