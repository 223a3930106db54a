"""Attention as an explanation, against Hugging Face's eager attentions, loops, numpy and networkx."""

from __future__ import annotations

import copy
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from plain_games import additive_model, tiny_classifier

from interp.agreement import attention_scores as module
from interp.agreement.attention_scores import attention_scores, split_layer, target_positions
from interp.agreement.coalitions import Coalitions
from interp.agreement.tasks import Classifier, Continuation, Verbalizer
from interp.errors import InputError

TASK = Verbalizer(
    {"no": " water", "yes": " money"}, template="{text} is", shots=[(" the dog is old", "yes")], separator=""
)
TEXTS = [" the dog of the sea", " a king", " the old cat in water code"]
METHODS = (
    "attention",
    "attention:0",
    "attention:-1",
    "attention_norm",
    "attention_norm:1",
    "rollout",
    "widest",
    "flow",
)


def run(game: Coalitions, *methods: str) -> dict[str, list[np.ndarray]]:
    found = attention_scores(game, range(len(game)), methods)
    assert all(seconds > 0 for _, seconds in found.values())
    return {method: scores for method, (scores, _) in found.items()}


@torch.no_grad()
def eager(game: Coalitions, example: int) -> np.ndarray:
    """(layer, head, query, key) of the whole input, by Hugging Face's own eager path."""
    hf = copy.deepcopy(game.model.hf)
    hf.set_attn_implementation("eager")
    output = hf(torch.tensor([game.encoded[example].ids]), output_attentions=True)
    return torch.stack(output.attentions)[:, 0].double().numpy()


def rows_read(game: Coalitions, example: int) -> tuple[list[int], list[int]]:
    one = game.encoded[example]
    last = len(one.ids)
    return list(range(last - max(1, one.n_reads), last)), list(one.positions)


@pytest.fixture(scope="module")
def game(tiny: Any) -> Coalitions:
    return Coalitions(tiny(), TEXTS, task=TASK)


@pytest.fixture(scope="module")
def found(game: Coalitions) -> dict[str, list[np.ndarray]]:
    return run(game, *METHODS)


@pytest.mark.parametrize("example", range(len(TEXTS)))
def test_attention_is_the_last_row_with_heads_averaged(game: Coalitions, found: Any, example: int) -> None:
    heads = eager(game, example).mean(1)  # (layer, query, key)
    positions = list(game.encoded[example].positions)
    assert 0 < positions[0] <= positions[-1] < len(game.encoded[example].ids) - 1  # a prompt before, a template behind
    np.testing.assert_allclose(found["attention"][example], heads[:, -1, positions].mean(0), atol=1e-6)
    np.testing.assert_allclose(found["attention:0"][example], heads[0, -1, positions], atol=1e-6)
    np.testing.assert_allclose(found["attention:-1"][example], heads[2, -1, positions], atol=1e-6)
    assert found["attention"][example].sum() < 1  # the rest goes to what is not explained


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_attention_of_other_families(tiny: Any, family: str) -> None:
    game = Coalitions(tiny(family), TEXTS)
    for example, scores in enumerate(run(game, "attention:1")["attention:1"]):
        np.testing.assert_allclose(scores, eager(game, example).mean(1)[1, -1], atol=1e-6)


def test_attention_norm_by_a_loop(game: Coalitions, found: Any) -> None:
    example = 0
    ids, positions = game.encoded[example].ids, game.encoded[example].positions
    pattern = eager(game, example)
    values: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda module, given, output: values.append(output[0].detach()))
        for layer in game.model.hf.model.layers
    ]
    with torch.no_grad():
        game.model.hf(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    expected = []
    for layer, block in enumerate(game.model.hf.model.layers):
        output = block.self_attn.o_proj.weight.detach().double().numpy()  # (d_model, head × d_head)
        row = np.zeros(len(ids))
        for key in range(len(ids)):
            for head in range(4):
                # Two heads share a key-value head.
                value = values[layer][key].double().numpy()[(head // 2) * 4 : (head // 2) * 4 + 4]
                written = output[:, head * 4 : head * 4 + 4] @ value
                row[key] += pattern[layer, head, -1, key] * np.linalg.norm(written)
        expected.append(row / row.sum())
    np.testing.assert_allclose(found["attention_norm"][example], np.mean(expected, 0)[list(positions)], atol=1e-6)
    np.testing.assert_allclose(found["attention_norm:1"][example], expected[1][list(positions)], atol=1e-6)
    assert np.abs(found["attention_norm"][example] - found["attention"][example]).max() > 1e-3


def with_residual(game: Coalitions, example: int) -> np.ndarray:
    attention = eager(game, example).mean(1)
    return 0.5 * attention + 0.5 * np.eye(attention.shape[-1])


def test_rollout_is_a_product_of_matrices(game: Coalitions, found: Any) -> None:
    for example in range(len(TEXTS)):
        product = np.eye(len(game.encoded[example].ids))
        for layer in with_residual(game, example):
            product = layer @ product
        expected = product[-1, list(game.encoded[example].positions)]
        np.testing.assert_allclose(found["rollout"][example], expected, atol=1e-6)


def test_widest_is_the_best_bottleneck(game: Coalitions, found: Any) -> None:
    example = 1
    width = np.where(np.eye(len(game.encoded[example].ids)) > 0, np.inf, 0)
    for layer in with_residual(game, example):
        width = np.minimum(layer[:, :, None], width[None]).max(1)
    expected = width[-1, list(game.encoded[example].positions)]
    np.testing.assert_allclose(found["widest"][example], expected, atol=1e-6)


def test_flow_is_networkxs(game: Coalitions, found: Any) -> None:
    example = 1
    capacity = with_residual(game, example)
    n_layers, length, _ = capacity.shape
    graph = nx.DiGraph()
    for layer, query, key in np.ndindex(capacity.shape):
        graph.add_edge((layer + 1, query), (layer, key), capacity=float(capacity[layer, query, key]))
    expected = [
        nx.maximum_flow_value(graph, (n_layers, length - 1), (0, source)) for source in game.encoded[example].positions
    ]
    np.testing.assert_allclose(found["flow"][example], expected, atol=1e-5)


def test_flows_and_widths_keep_their_order(found: Any) -> None:
    for widest, flow in zip(found["widest"], found["flow"], strict=True):
        assert (widest <= flow + 1e-6).all()
        assert (widest > 0).all()


@pytest.mark.parametrize("method", ["attention", "rollout"])
def test_several_reads_are_averaged(tiny: Any, method: str) -> None:
    examples = [(" the dog of", " the sea"), (" a king in", " tea water code"), (" red", " sun")]
    game = Coalitions(tiny(), examples, task=Continuation())
    scores = run(game, method)[method]
    for example, n_reads in enumerate([2, 3, 1]):
        reads, positions = rows_read(game, example)
        assert len(reads) == n_reads == len(target_positions(game, example))
        if method == "attention":
            expected = eager(game, example).mean(1)[:, reads][:, :, positions].mean((0, 1))
        else:
            product = np.eye(len(game.encoded[example].ids))
            for layer in with_residual(game, example):
                product = layer @ product
            expected = product[reads][:, positions].mean(0)
        np.testing.assert_allclose(scores[example], expected, atol=1e-6)


@pytest.mark.parametrize(("reads", "rows"), [(None, [0]), ("first", [0]), ("last", [-1]), ("mean", None)])
def test_an_encoder_is_looked_at_where_its_head_reads(reads: str | None, rows: list[int] | None) -> None:
    game = Coalitions(tiny_classifier(), ["the dog of sea", "music", "a red king"], task=Classifier(reads=reads))
    scores = run(game, "attention", "rollout", "attention_norm")
    for example, one in enumerate(game.encoded):
        heads = eager(game, example).mean(1)
        chosen = list(range(len(one.ids))) if rows is None else rows
        assert one.positions == tuple(range(1, len(one.ids) - 1))  # neither [CLS] nor [SEP]
        expected = heads[:, chosen][:, :, list(one.positions)].mean((0, 1))
        np.testing.assert_allclose(scores["attention"][example], expected, atol=1e-6)
        product = np.eye(len(one.ids))
        for layer in with_residual(game, example):
            product = layer @ product
        expected = product[chosen][:, list(one.positions)].mean(0)
        np.testing.assert_allclose(scores["rollout"][example], expected, atol=1e-6)
        assert (scores["attention_norm"][example] > 0).all()


def test_special_tokens_count_where_they_are_asked_for() -> None:
    model = tiny_classifier()
    without, with_them = (run(Coalitions(model, ["a red king"], special=on), "attention") for on in (False, True))
    np.testing.assert_allclose(with_them["attention"][0][1:-1], without["attention"][0], atol=1e-7)
    assert with_them["attention"][0].sum() == pytest.approx(1, abs=1e-5)


def test_methods_share_passes(game: Coalitions, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[dict[str, Any]] = []
    real = module.attention_graph

    def spy(model: Any, ids: Any, **options: Any) -> Any:
        passes.append(options)
        return real(model, ids, **options)

    monkeypatch.setattr(module, "attention_graph", spy)
    run(game, *METHODS)
    assert [one["heads"] for one in passes] == ["mean", "norm"]
    passes.clear()
    run(game, "attention:2", "attention:0")
    assert [one["layers"] for one in passes] == [[0, 2]]  # no layer that nobody wants
    passes.clear()
    monkeypatch.setattr(module, "_AT_ONCE", 1)
    split = run(game, *METHODS)
    assert len(passes) == 2 * len(TEXTS)
    whole = run(game, "flow")["flow"]
    for one, two in zip(split["flow"], whole, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


def test_some_examples_alone_give_the_same(game: Coalitions, found: Any) -> None:
    for example in range(len(TEXTS)):
        for method, (scores, _) in attention_scores(game, [example], ["attention_norm", "rollout"]).items():
            np.testing.assert_allclose(scores[0], found[method][example], atol=1e-6)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("attention:3", "expected layers from 0 to 2"),
        ("attention:-4", "expected layers from 0 to 2"),
        ("attention_norm:9", "expected layers from 0 to 2"),
        ("attention:", "expected a layer's number"),
        ("attention:last", "expected a layer's number"),
        ("rollout:1", "attention:LAYER"),
        ("flow:0", "attention:LAYER"),
        ("saliency", "of attention there are attention, attention_norm, rollout, widest, flow"),
    ],
)
def test_wrong_methods_and_layers_are_refused(game: Coalitions, method: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(game, method)


def test_layers_are_split_off(game: Coalitions) -> None:
    model = game.model
    assert split_layer("attention:-1", model) == ("attention", 2)
    assert split_layer("attention_norm:0", model) == ("attention_norm", 0)
    assert split_layer("flow", model) == ("flow", None)


def test_a_model_without_attention_is_refused() -> None:
    game = Coalitions(additive_model([1.0, 2.0, 3.0]), [[0, 1, 2]], baseline="zero")
    with pytest.raises(InputError, match="no attention layers: rollout"):
        run(game, "rollout")
