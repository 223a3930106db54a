"""Anchors: the divergence against scipy on two models, and that a training keeps to it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_models import chat_tiny

from interp.conflict.aligning import align
from interp.conflict.anchors import anchor_divergence, encode_anchors, split_anchors
from interp.conflict.preferences import Preference
from interp.errors import InputError, ResultError

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
TEXTS = ["The sea is cold.", "It rains in the hills, and the river rises.", "Bread"]
PAIRS = [
    Preference(f"p{at}", (3 + at, 9, 14), (70, 5 + at), (80, 6 + at, 7), (9, 14), (0, 1)) for at in range(8)
]  # fmt: skip


def test_divergence_is_that_of_scipy_and_moves_the_adapter_alone() -> None:
    from peft import LoraConfig, get_peft_model
    from scipy.special import rel_entr

    model = chat_tiny()
    base = copy.deepcopy(model.hf)
    policy = get_peft_model(model.hf, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, value in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    rows = encode_anchors(model, TEXTS, n_tokens=12)
    assert [len(row) for row in rows] == [12, 12, 5]  # bytes
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[at < len(row) for at in range(longest)] for row in rows])
    found = anchor_divergence(policy, ids, mask)
    policy.merge_adapter()
    for row, value in zip(rows, found, strict=True):
        one = torch.tensor([row])
        with torch.no_grad():
            theirs, ours = (m(one).logits[0].double().softmax(-1).numpy() for m in (base, policy))
        assert value.item() == pytest.approx(rel_entr(theirs, ours).sum(-1).mean(), rel=1e-3)
        assert value.item() > 1e-3
    policy.unmerge_adapter()
    found.sum().backward()
    with_gradient = {name for name, value in policy.named_parameters() if value.grad is not None}
    assert with_gradient
    assert all("lora_" in name for name in with_gradient)


def test_a_training_with_anchors_stays_nearer(tmp_path: Path) -> None:
    model = chat_tiny()
    quick: dict[str, Any] = {"learning_rate": 0.02, "epochs": 6, "batch_size": 4, "progress": False, "anchors": TEXTS}
    runs = {
        weight: align(model, PAIRS, [1], out=tmp_path / str(weight), anchor_weight=weight, **quick).frame
        for weight in (0.0, 20.0)
    }
    last = {weight: frame["anchor_kl"].iloc[-1] for weight, frame in runs.items()}
    assert 0 < last[20.0] < last[0.0] / 2
    rows = runs[20.0]
    dpo = -np.log(1 / (1 + np.exp(-rows["margin"])))
    # Of one pair −log σ(margin) is exact; of a batch the mean of losses is at least the loss of the mean margin.
    assert (rows["loss"] - 20 * rows["anchor_kl"] >= dpo - 1e-6).all()
    assert rows["anchor_kl"].iloc[0] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ResultError, match="holds another run: anchor"):
        align(model, PAIRS, [1], out=tmp_path / "20.0", anchor_weight=20.0, **{**quick, "anchors": TEXTS[:1]})


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["The sea.", "S"], "expected at least two"),
        (["", "The sea."], "is empty"),
        ("The sea.", "not str"),
        ([3], "not int"),
    ],
)
def test_errors(texts: Any, message: str, tmp_path: Path) -> None:
    model = chat_tiny()
    with pytest.raises(InputError, match=message):
        align(model, PAIRS, [1], out=tmp_path / "run", anchors=texts, progress=False)
    with pytest.raises(InputError, match="anchor_weight=-1"):
        align(model, PAIRS, [1], out=tmp_path / "run", anchors=["The sea."], anchor_weight=-1, progress=False)
    with pytest.raises(InputError, match="likelihood=nan"):
        align(model, PAIRS, [1], out=tmp_path / "run", likelihood=float("nan"), progress=False)
    assert not (tmp_path / "run").exists()


def test_validation_has_anchors_of_its_own() -> None:
    assert split_anchors(range(100), 8) == (range(92), range(92, 100))
    assert split_anchors(range(10), 8) == (range(8), range(8, 10))
    assert split_anchors(range(4), 8) == (range(4), range(4))
    assert split_anchors((), 8) == ((), ())
    assert split_anchors(range(100), 0) == (range(100), range(100))
