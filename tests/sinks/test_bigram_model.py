"""The toy transformer and its measurements against the same arithmetic written out in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from interp.errors import InputError
from interp.sinks.bigram_backcopy import BigramBackcopy
from interp.sinks.bigram_dynamics import measure
from interp.sinks.bigram_model import ToyModel, ToyShape

TASK = BigramBackcopy()


def small(seed: int = 0, **changes: Any) -> ToyModel:
    torch.manual_seed(seed)
    model = ToyModel(ToyShape(**{"blocks": ("both",), "width": 12, "length": 16, **changes}))
    with torch.no_grad():  # norms that are not the identity, attention that is not flat
        for name, weight in model.named_parameters():
            weight += torch.randn_like(weight) * (0.3 if "norm" in name or "mlp.0" in name else 0.2)
    return model.double().eval()


def by_hand(model: ToyModel, tokens: np.ndarray, zero: tuple[str, ...] = ()) -> dict[str, Any]:
    """One sequence, head by head and query by query."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    shape = model.shape

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["token.weight"][tokens] + weights["position.weight"][: len(tokens)]
    out: dict[str, Any] = {"pattern": {}, "value_norm": {}, "scores": {}, "resid": [x]}
    size = shape.width // shape.n_heads
    for layer, kind in enumerate(shape.blocks):
        name = f"blocks.{layer}"
        if kind != "mlp":
            normed = norm(x, f"{name}.attention.norm")
            added = np.zeros_like(x)
            for head in range(shape.n_heads):
                part = slice(head * size, (head + 1) * size)
                q, k, v = (
                    normed @ weights[f"{name}.attention.{one}.weight"][part].T for one in ("query", "key", "value")
                )
                writes = v @ weights[f"{name}.attention.out.weight"][:, part].T
                if shape.start_norm is not None:
                    writes[0] *= shape.start_norm / np.linalg.norm(writes[0])
                pattern = np.zeros((len(tokens), len(tokens)))
                for query in range(len(tokens)):
                    seen = [key for key in range(query + 1) if shape.see_start or query == 0 or key > 0]
                    logits = np.array([q[query] @ k[key] for key in seen]) / math.sqrt(size)
                    if shape.attention == "softmax":
                        pattern[query, seen] = np.exp(logits) / np.exp(logits).sum()
                    else:
                        pattern[query, seen] = np.maximum(logits, 0) / (query + 1)
                added += pattern @ writes
                out["pattern"][layer, head], out["scores"][layer, head] = pattern, q @ k.T / math.sqrt(size)
                out["value_norm"][layer, head] = np.linalg.norm(writes, axis=1)
            if f"attention.{layer}" not in zero:
                x = x + added
        if kind != "attention" and f"mlp.{layer}" not in zero:
            hidden = np.maximum(norm(x, f"{name}.mlp.0") @ weights[f"{name}.mlp.1.weight"].T, 0)
            x = x + hidden @ weights[f"{name}.mlp.3.weight"].T
        out["resid"].append(x)
    out["logits"] = norm(x, "norm") @ weights["output.weight"].T
    return out


VARIANTS: list[dict[str, Any]] = [
    {},
    {"n_heads": 3},
    {"attention": "relu"},
    {"attention": "relu", "n_heads": 2},
    {"blocks": ("mlp", "both", "attention")},
    {"blocks": ("both", "both", "both")},
    {"start_norm": 2.5},
    {"start_norm": 0.7, "n_heads": 2},
    {"see_start": False},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_forward_pass_by_hand(changes: dict[str, Any]) -> None:
    model = small(**changes)
    tokens = TASK.sample(2, 11, seed=4)
    trace = model.trace(tokens)
    assert torch.equal(model(tokens).float(), trace.logits)
    for row in range(2):
        expected = by_hand(model, tokens[row].numpy())
        np.testing.assert_allclose(trace.logits[row], expected["logits"], atol=1e-5)
        for (layer, head), pattern in expected["pattern"].items():
            np.testing.assert_allclose(trace.pattern[layer][row, head], pattern, atol=1e-6)
            np.testing.assert_allclose(
                trace.value_norm[layer][row, head], expected["value_norm"][layer, head], atol=1e-5
            )
        for ours, theirs in zip(trace.resid, expected["resid"], strict=True):
            np.testing.assert_allclose(ours[row], theirs, atol=1e-5)


def test_relu_attention_is_the_formula_of_the_specification() -> None:
    trace = small(attention="relu").trace(TASK.sample(3, 10))
    visible = torch.arange(1, 11)[:, None]
    seen = torch.ones(10, 10).tril().bool()
    torch.testing.assert_close(trace.pattern[0][:, 0][:, seen], (trace.scores[0][:, 0].relu() / visible)[:, seen])
    assert trace.pattern[0][:, 0][:, ~seen].abs().max() == 0


@pytest.mark.parametrize("zero", [("attention.0",), ("mlp.1",), ("attention.2", "mlp.0")])
def test_parts_left_out(zero: tuple[str, ...]) -> None:
    model = small(blocks=("both", "both", "both"))
    tokens = TASK.sample(1, 9)
    expected = by_hand(model, tokens[0].numpy(), zero)
    np.testing.assert_allclose(model(tokens, zero)[0].detach(), expected["logits"], atol=1e-8)


def test_held_start_cannot_shrink_but_can_turn() -> None:
    model = small(start_norm=1.5)
    tokens = TASK.sample(4, 9)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    before = model.trace(tokens)
    written = model.blocks[0].attention.out.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens).logsumexp(-1).sum().backward()
        optimizer.step()
    assert not torch.equal(written, model.blocks[0].attention.out.weight)
    after = model.trace(tokens)
    for trace in (before, after):
        torch.testing.assert_close(trace.value_norm[0][:, :, 0], torch.full((4, 1), 1.5), atol=1e-5, rtol=0)


def test_hidden_start_gets_no_gradient_through_attention() -> None:
    """Whatever ⟨s⟩'s embedding is, later positions predict the same."""
    model, tokens = small(see_start=False), TASK.sample(3, 9)
    before = model(tokens)[:, 1:]
    with torch.no_grad():
        model.token.weight[TASK.start_token] += 5
    assert torch.equal(before, model(tokens)[:, 1:])


def test_measures_by_hand() -> None:
    """Every quantity from the hand-written pass, with plain loops over positions."""
    model, tokens = small(blocks=("both", "mlp"), n_heads=2), TASK.sample(6, 14, seed=9)
    frame = measure(model, TASK, tokens)
    found = {
        (row.quantity, row.group, None if row.layer is None else row.layer, row.head): (row.value, row.n)
        for row in frame.astype(object).where(frame.notna(), None).itertuples()
    }
    values: dict[Any, list[float]] = {}
    law = TASK.law(tokens).double().numpy()
    for row, sequence in enumerate(tokens.numpy()):
        by = by_hand(model, sequence)
        logits = by["logits"] - np.log(np.exp(by["logits"]).sum(-1, keepdims=True))
        for query, token in enumerate(sequence):
            kind = "start" if query == 0 else "trigger" if token in TASK.triggers else "other"
            risk_group = "trigger" if kind == "trigger" else "bigram"
            certain = law[row, query] > 0
            values.setdefault(("risk", risk_group, None, None), []).append(-(law[row, query] * logits[query]).sum())
            entropy = -(law[row, query][certain] * np.log(law[row, query][certain])).sum()
            values.setdefault(("entropy", risk_group, None, None), []).append(entropy)
            for layer in (0, 1):
                norm = np.linalg.norm(by["resid"][layer + 1][query])
                values.setdefault(("residual_norm", kind, layer, None), []).append(norm)
            for head in (0, 1):
                pattern, scores = by["pattern"][0, head], by["scores"][0, head]
                values.setdefault(("value_norm", kind, 0, head), []).append(by["value_norm"][0, head][query])
                if kind == "start":
                    continue
                values.setdefault(("sink_mass", kind, 0, head), []).append(pattern[query, 0])
                values.setdefault(("previous_mass", kind, 0, head), []).append(pattern[query, query - 1])
                if query >= 2:
                    difference = scores[query, 0] - scores[query, 1:query].mean()
                    values.setdefault(("delta_logit", kind, 0, head), []).append(difference)
    for key, several in values.items():
        assert found[key][0] == pytest.approx(np.mean(several), abs=1e-5), key
        assert found[key][1] == len(several), key
    extra = set(found) - set(values)
    assert {key[0] for key in extra} == {"residual_median", "residual_max"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": ()}, "at least one"),
        ({"blocks": ("both", "linear")}, "both, attention, mlp"),
        ({"attention": "sigmoid"}, "softmax, relu"),
        ({"width": 10, "n_heads": 3}, "multiple"),
        ({"width": 0}, "width=0"),
        ({"start_norm": -1.0}, "at least 0"),
        ({"start_norm": math.nan}, "at least 0"),
    ],
)
def test_bad_shapes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ToyShape(**changes)


def test_bad_calls() -> None:
    model = small()
    with pytest.raises(InputError, match="17 positions; this model has 16"):
        model(TASK.sample(1, 17))
    with pytest.raises(InputError, match=r"mlp\.1.*attention\.0, mlp\.0"):
        model(TASK.sample(1, 5), zero=["mlp.1"])
