"""Eviction against a forward pass with the pattern's mask written out, and against a growing cache; windows; bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import tiny_encoder, tiny_tokenizer

from interp import batching
from interp.errors import InputError, ModelError
from interp.model import load_model
from interp.provenance import Provenance
from interp.results import Result
from interp.sinks import eviction, evidence_plots
from interp.sinks.eviction import ARMS, EVICTION_COLUMNS, evict, summary, visible_keys

WINDOW, SINKS = 5, 2


def texts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(4, 64, length).tolist() for length in lengths]


TEXTS = {"prose": texts_of(14, 9, 20), "code": texts_of(11, seed=1)}
# Sliding-window families get a window as long as the texts, which then evicts nothing by itself.
WIDE = {"mistral": {"sliding_window": 20}, "gemma2": {"sliding_window": 20}, "gemma3": {"sliding_window": 20}}


def written_out(arm: str, query: int) -> set[int]:
    """Keys that a query sees, by counting."""
    before = list(range(query + 1))
    if arm == "full":
        return set(before)
    if arm == "window":
        return set(before[-WINDOW:])
    kept = range(SINKS) if arm == "sinks" else range(SINKS, 2 * SINKS)
    return set(before[-(WINDOW - SINKS) :]) | (set(kept) & set(before))


@pytest.mark.parametrize("arm", ARMS)
def test_visible_keys(arm: str) -> None:
    seen = visible_keys(arm, 20, WINDOW, SINKS)
    for query in range(20):
        assert set(seen[query].nonzero()[:, 0].tolist()) == written_out(arm, query)
    if arm != "full":
        assert (seen.sum(1)[WINDOW + SINKS :] == WINDOW).all()


@torch.no_grad()
def oracle(model: Any, arm: str, ids: list[int]) -> float:
    """Eager attention, each layer's scores masked by our own hook on the mask that the attention module receives."""
    hidden = torch.tensor(
        [[key not in written_out(arm, query) for key in range(len(ids))] for query in range(len(ids))]
    )

    def masked(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = torch.zeros(1, 1, len(ids), len(ids)).masked_fill(hidden, float("-inf"))
        return args, {**kwargs, "attention_mask": mask}

    handles = [
        model.arch.attention(layer).register_forward_pre_hook(masked, with_kwargs=True)
        for layer in range(model.arch.n_layers)
    ]
    with model.attention_implementation("eager"):
        logits = model.hf(torch.tensor([ids]), use_cache=False).logits[0].float()
    for handle in handles:
        handle.remove()
    start = WINDOW + SINKS
    return float(torch.nn.functional.cross_entropy(logits[start:-1], torch.tensor(ids[start + 1 :])))


def test_every_arm_as_eager_attention(tiny: Any, family: str) -> None:
    model = tiny(family, **WIDE.get(family, {}))
    found = evict(model, TEXTS, WINDOW, SINKS, max_tokens=40, progress=False).frame
    assert len(found) == 4 * 4
    for row in found.itertuples():
        ids = TEXTS[row.domain][row.text]
        assert row.loss == pytest.approx(oracle(model, row.arm, ids), abs=1e-5)
        assert row.n_predictions == len(ids) - 1 - WINDOW - SINKS
    full = found[found["arm"] == "full"].set_index(["domain", "text"])["loss"]
    for row in found.itertuples():
        assert row.delta_loss == pytest.approx(row.loss - full[row.domain, row.text])
    assert found.groupby("arm", observed=True)["loss"].mean().nunique() == 4


@torch.no_grad()
def test_one_layer_as_a_cache_that_drops_keys(tiny: Any) -> None:
    """Token by token with a KV cache from which all but the kept keys are cut: what deployment does, at the text's positions."""
    model = tiny("llama", num_hidden_layers=2)
    ids = TEXTS["prose"][2]
    found = evict(model, [ids], WINDOW, SINKS, progress=False).frame.set_index("arm")["loss"]
    for arm in ARMS:
        cache, held, losses = None, [], []
        for query, token in enumerate(ids[:-1]):
            keep = [at for at, key in enumerate(held) if key in written_out(arm, query)]
            if cache is not None:
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
            held = [held[at] for at in keep] + [query]
            mask = torch.zeros(1, 1, 1, len(held))  # the cache holds what is seen and nothing else
            output = model.hf(
                torch.tensor([[token]]),
                attention_mask=mask,
                position_ids=torch.tensor([[query]]),
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            if query >= WINDOW + SINKS:
                losses.append(float(-output.logits[0, -1].log_softmax(-1)[ids[query + 1]]))
        assert found[arm] == pytest.approx(np.mean(losses), abs=1e-5)


def test_a_model_that_attends_to_its_first_key_only_needs_it(tiny: Any) -> None:
    """Planted: tokens before 30 have a key that every query of layer 0 likes; evicting it changes the loss, other keys do not."""
    model = tiny("gpt2", n_layer=1, n_head=1)
    arch = model.arch
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.mul_(0.3)
        qkv = arch.attention(0).c_attn
        qkv.weight[:, :32] = 0
        qkv.bias[:16] = 0
        qkv.bias[0] = 400.0  # query: the first dimension alone
        qkv.bias[16:32] = 0
        arch.layer(0).ln_1.weight.fill_(1)
        arch.layer(0).ln_1.bias.fill_(0)
        qkv.weight[0, 16] = 10.0  # key: how far along dimension 0 the token is
        arch.embedding().weight[:, 0] = 0
        arch.embedding().weight[5, 0] = 50.0
        model.hf.transformer.wpe.weight[:, 0] = 0
    texts = [[5, *ids] for ids in texts_of(20, 22, 24, seed=3)]
    texts = [[ids[0], *(6 if token == 5 else token for token in ids[1:])] for ids in texts]
    table = summary(evict(model, texts, WINDOW, SINKS, progress=False)).set_index("arm")
    assert abs(table.loc["sinks", "delta"]) < 1e-4
    assert abs(table.loc["window", "delta"]) > 1e-2
    assert abs(table.loc["control", "delta"]) > 1e-2


def test_batches_and_memory_do_not_matter(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = tiny("phi3"), eviction.mean_losses
    whole = evict(model, TEXTS, WINDOW, SINKS, progress=False).frame

    def small(model: Any, hidden: Any, batch: Any, **options: Any) -> Any:
        if batch.size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, hidden, batch, **options)

    monkeypatch.setattr(eviction, "mean_losses", small)
    pd.testing.assert_frame_equal(evict(model, TEXTS, WINDOW, SINKS, progress=False).frame, whole, atol=1e-5)
    assert batching.current_rows.get() is None
    assert model.attention == "sdpa"


def test_summary_by_hand() -> None:
    losses = {"full": [1.0, 2.0], "window": [4.0, 6.0], "sinks": [1.5, 2.1], "control": [3.5, 5.1]}
    rows = [("a", t, arm, x, x - losses["full"][t]) for arm, xs in losses.items() for t, x in enumerate(xs)]
    frame = pd.DataFrame(rows, columns=["domain", "text", "arm", "loss", "delta_loss"])
    result = Result("sinks.evict", frame.assign(n_tokens=20, n_predictions=10), EVICTION_COLUMNS, Provenance())
    table = summary(result).set_index("arm")
    assert table.loc["window", "delta"] == pytest.approx(3.5)
    assert table.loc["window", ["low", "high"]].tolist() == pytest.approx([3.0, 4.0])
    assert table.loc["sinks − control", "delta"] == pytest.approx(-2.5)
    assert table.loc["full", "perplexity"] == pytest.approx(np.exp(1.5))
    assert table.loc["full", ["delta", "low", "high"]].tolist() == [0, 0, 0]


def test_one_text_has_no_interval(tiny: Any) -> None:
    table = summary(evict(tiny(), {"a": texts_of(14)}, WINDOW, SINKS, progress=False))
    assert table["delta"].notna().all()
    assert table[["low", "high"]].isna().all(axis=None)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_sliding_windows_are_refused_by_name(tiny: Any, family: str) -> None:
    with pytest.raises(ModelError, match=r"sliding window of 4 tokens, and the longest text has 20"):
        evict(tiny(family), TEXTS, WINDOW, SINKS, progress=False)


def test_plot(tiny: Any) -> None:
    result = evict(tiny(), TEXTS, WINDOW, SINKS, progress=False)
    drawn = evidence_plots.evict(result)
    table = summary(result).set_index(["domain", "arm"])["delta"]
    assert len(drawn.data) == 2
    np.testing.assert_allclose(
        drawn.data[0].y, [table["prose", arm] for arm in ("window", "control", "sinks")], rtol=1e-5
    )
    assert "W = 5, s = 2" in drawn.layout.title.subtitle.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": {"a": texts_of(20, 8)}}, "domain 'a': 1 of 2 texts are shorter than the 9 tokens needed"),
        ({"texts": {}}, "no domain"),
        ({"texts": {"a": []}}, "has no texts"),
        ({"window": 4}, "window=4 with n_sinks=2"),
        ({"n_sinks": 0}, "expected at least one sink"),
    ],
)
def test_bad_input(tiny: Any, changes: dict[str, Any], message: str) -> None:
    given = {"texts": TEXTS, "window": WINDOW, "n_sinks": SINKS, **changes}
    with pytest.raises(InputError, match=message):
        evict(tiny(), progress=False, **given)


def test_encoders_are_refused() -> None:
    with pytest.raises(InputError, match="encoder"):
        evict(load_model(tiny_encoder(), tiny_tokenizer()), TEXTS, WINDOW, SINKS, progress=False)
