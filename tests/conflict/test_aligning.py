"""Aligning: what is trained, what is left alone, and runs that are interrupted."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_models import chat_tiny
from tiny_models import tiny_encoder, tiny_tokenizer

from interp.conflict import aligning
from interp.conflict.adapters import adapted, check_adapter, left_as_it_was, load_adapter, read_adapter
from interp.conflict.align_plots import align as plot
from interp.conflict.align_runs import history_frame
from interp.conflict.aligning import PRESETS, align
from interp.conflict.layer_arms import arms
from interp.conflict.preferences import Preference, make_preferences
from interp.errors import InputError, MemoryBudgetError, ModelError, ResourceError, ResultError
from interp.model import load_model
from interp.results import load_result
from interp.weight_hash import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
RANDOM = np.random.default_rng(1)


def ids(n: int) -> tuple[int, ...]:
    return tuple(int(token) for token in RANDOM.integers(3, 200, n))


def planted(n: int, name: str) -> list[Preference]:
    """Answers that begin with 70 are chosen, those with 80 rejected, whatever the prompt: something that can be learned."""
    return [
        Preference(f"{name}{at}", ids(6 + at % 4), (70, *ids(at % 3)), (80, *ids(at % 4)), ids(5), (2, 3))
        for at in range(n)
    ]


TRAIN, HELD = planted(12, "t"), planted(5, "v")
QUICK: dict[str, Any] = {
    "learning_rate": 0.02,
    "epochs": 4,
    "batch_size": 3,
    "gradient_accumulation": 2,
    "progress": False,
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def snapshot(model: Any) -> dict[str, Any]:
    hf = model.hf
    return {
        "state": {name: value.clone() for name, value in hf.state_dict().items()},
        "classes": {name: type(module) for name, module in hf.named_modules()},
        "attributes": set(vars(hf)),
        "flags": {name: value.requires_grad for name, value in hf.named_parameters()},
        "training": [module.training for module in hf.modules()],
        "config": hf.config.to_dict(),
        "generation": hf.generation_config.to_dict(),
        "pad": model.tokenizer.pad_token,
        "fingerprint": fingerprint(hf),
        "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in hf.modules()),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    states = before["state"].keys() == after["state"].keys() and all(
        torch.equal(value, after["state"][name]) for name, value in before["state"].items()
    )
    return states and all(before[name] == after[name] for name in before if name != "state")


@pytest.fixture(scope="module")
def model() -> Any:
    return chat_tiny()


@pytest.fixture(scope="module")
def whole(model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run without interruption; it may not open a connection nor change the model."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    before = snapshot(model)
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("a connection was opened")

        patch.setattr(socket.socket, "connect", refuse)
        patch.chdir(folder.parent)
        made = align(model, TRAIN, [1], out="run", validation=HELD, **QUICK)
        assert [path.name for path in folder.parent.iterdir()] == ["run"]
    assert same(before, snapshot(model))
    assert model.fingerprint == before["fingerprint"]
    assert model.hf.forward.__func__ is type(model.hf).forward
    return folder, made


def test_it_learns_what_is_planted_and_leaves_the_base_alone(model: Any, whole: tuple[Path, Any]) -> None:
    folder, made = whole
    validation = made.frame[made.frame["split"] == "validation"]
    assert validation["loss"].iloc[-1] < 0.66 < math.log(2)
    assert validation["accuracy"].iloc[-1] >= 0.8
    assert made.frame["loss"].iloc[0] == pytest.approx(math.log(2), abs=1e-5)  # the first step is the base itself
    assert made.attachments["trainable"] == 8 * (2 * (16 + 16) + 2 * (16 + 8))
    assert made.attachments["n_steps"] == made.frame["step"].max() == 8
    after = load_adapter(model, folder / "adapter")
    for item in HELD:
        prompt = torch.tensor([item.prompt])
        old, new = model.hf(prompt).logits[0, -1].log_softmax(-1), after.hf(prompt).logits[0, -1].log_softmax(-1)
        assert new[70] - new[80] > old[70] - old[80]
    changed = {
        name
        for (name, old), new in zip(model.hf.named_parameters(), after.hf.parameters(), strict=True)
        if not old.equal(new)
    }
    assert changed == {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"}


def test_losses_of_the_history_are_those_of_the_adapter(model: Any, whole: tuple[Path, Any]) -> None:
    """The last validation row from the saved adapter, with plain loops: margin, loss and accuracy."""
    folder, made = whole

    def total(hf: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> np.ndarray:
        with torch.no_grad():
            values = hf(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        return np.array([values[len(prompt) - 1 + at, token].item() for at, token in enumerate(answer)])

    after, margins = load_adapter(model, folder / "adapter"), []
    for item in HELD:
        sides = []
        for answer, sign in ((item.chosen, 1), (item.rejected, -1)):
            reference = total(model.hf, item.prompt, answer)
            factors = 1 + sign * 0.5 * 0.1 * (total(model.hf, item.clear, answer) - reference)
            sides.append(0.1 * (factors * (total(after.hf, item.prompt, answer) - reference)).sum())
        margins.append(sides[0] - sides[1])
    row = made.frame[
        (made.frame["split"] == "validation") & (made.frame["step"] == made.attachments["best_step"])
    ].iloc[0]
    assert row["margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert row["loss"] == pytest.approx(np.mean(np.log1p(np.exp(-np.array(margins)))), abs=1e-4)
    assert row["margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"], abs=1e-6)


def test_adapter_folder_and_the_two_ways_to_load_it(model: Any, whole: tuple[Path, Any], tmp_path: Path) -> None:
    from peft import PeftModel

    folder, _ = whole
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "interp_provenance.json",
    }
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0)
    known = read_adapter(folder / "adapter")
    assert known["fingerprint"] == model.fingerprint
    assert known["versions"]["peft"]
    assert known["parameters"]["layers"] == [1]
    assert known["parameters"]["credit"] == "reward"
    assert known["attachments"]["n_pairs"] == 12
    assert str(tmp_path.parent.parent) not in (folder / "adapter" / "interp_provenance.json").read_text()
    prompt = torch.tensor([TRAIN[0].prompt])
    with torch.no_grad():
        plain = PeftModel.from_pretrained(copy.deepcopy(model.hf), str(folder / "adapter"))(prompt).logits
        base = model.hf(prompt).logits
        before = snapshot(model)
        assert (plain - base).abs().max() > 0.05
        for merged in (True, False):
            loaded = load_adapter(model, folder / "adapter", merged=merged)
            torch.testing.assert_close(loaded.hf(prompt).logits, plain, atol=1e-5, rtol=1e-5)
            assert loaded.fingerprint != model.fingerprint
            assert loaded.name == "LlamaForCausalLM+adapter"
            with adapted(model, folder / "adapter", merged=merged) as same_model:
                assert same_model is model
                assert model.fingerprint != before["fingerprint"]
                torch.testing.assert_close(model.hf(prompt).logits, plain, atol=1e-5, rtol=1e-5)
            assert same(before, snapshot(model))
            assert model.hf(prompt).logits.equal(base)
        with pytest.raises(KeyError), adapted(model, folder / "adapter"):
            raise KeyError
    assert same(before, snapshot(model))


def test_resumed_after_an_interruption_gives_the_same_adapter(
    model: Any, whole: tuple[Path, Any], tmp_path: Path
) -> None:
    from transformers import TrainerCallback

    folder, made = whole

    class Killed(TrainerCallback):
        def __init__(self, at: int) -> None:
            self.at = at

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == self.at:
                raise KeyboardInterrupt

    before, options = snapshot(model), {"out": tmp_path / "run", "validation": HELD, **QUICK}
    with pytest.raises(KeyboardInterrupt):
        align(model, TRAIN, [1], callbacks=[Killed(6)], **options)
    assert same(before, snapshot(model))
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    # A checkpoint that a kill cut off does not count
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-6")
    (checkpoints / "checkpoint-6" / "complete").unlink()
    (checkpoints / "checkpoint-6" / "optimizer.pt").write_bytes(b"half")
    steps: list[int] = []

    class Counts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.append(state.global_step)

    again = align(model, TRAIN, [1], callbacks=[Counts()], **options)
    assert steps == [5, 6, 7, 8]
    for name, value in weights(folder).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], value, atol=1e-6, rtol=0)
    measured = [name for name in made.frame if name != "seconds"]
    np.testing.assert_allclose(
        again.frame[measured].drop(columns="split").astype(float),
        made.frame[measured].drop(columns="split").astype(float),
        atol=1e-6,
    )
    assert (again.frame["seconds"].diff().dropna() > 0).all()
    # A run that has ended is read
    assert align(model, TRAIN, [1], callbacks=[Killed(1)], **options).equals(again)
    with pytest.raises(ResultError, match="holds another run: layers is"):
        align(model, TRAIN, [0], **options)
    with pytest.raises(ResultError, match="holds another run: pairs is"):
        align(model, [*TRAIN[1:], *planted(1, "t")], [1], **options)


def kill_in_the_middle(out: Path) -> None:
    """For a process of its own: train as `whole` does, and be killed after six of eight steps."""
    from transformers import TrainerCallback

    class Kills(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 6:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    align(chat_tiny(), TRAIN, [1], out=out, validation=HELD, callbacks=[Kills()], **QUICK)


def test_a_process_that_was_killed_goes_on(model: Any, whole: tuple[Path, Any], tmp_path: Path) -> None:
    folder, made = whole
    places = [str(path) for path in (Path(__file__).parent, Path(__file__).parents[1], Path(__file__).parents[2])]
    script = f"import sys; sys.path[:0] = {places}; import test_aligning; test_aligning.kill_in_the_middle(sys.argv[1])"
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert not (tmp_path / "run" / "adapter").exists()
    again = align(model, TRAIN, [1], out=tmp_path / "run", validation=HELD, **QUICK)
    assert again.frame["step"].tolist() == made.frame["step"].tolist()
    assert again.frame["loss"].tolist() == pytest.approx(made.frame["loss"].tolist(), abs=1e-5)
    for name, value in weights(folder).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], value, atol=1e-5, rtol=0)


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("every", "validated"), [(2, [2, 4, 6]), (1, [1, 2, 3])])  # two steps are an epoch
def test_early_stopping_keeps_the_best(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, validated: list[int]
) -> None:
    """Validation that wants the opposite: it can only get worse, so the first checkpoint stays."""
    from transformers import TrainerCallback

    opposite = [
        Preference(f"o{at}", item.prompt, item.rejected, item.chosen, item.clear, item.rule_positions)
        for at, item in enumerate(HELD)
    ]
    options: dict[str, Any] = {
        "out": tmp_path / "run",
        "validation": opposite,
        "credit": "none",
        "patience": 2,
        "checkpoint_steps": every,
        **QUICK,
    }
    # Killed after it stopped and before it was saved: what goes on is the saving alone
    with monkeypatch.context() as killed:
        killed.setattr(aligning, "save_adapter", interrupt)
        with pytest.raises(KeyboardInterrupt):
            align(model, TRAIN, [1], **options)
    steps: list[int] = []

    class Counts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.append(state.global_step)

    made = align(model, TRAIN, [1], callbacks=[Counts()], **options)
    assert not steps
    validation = made.frame[made.frame["split"] == "validation"]
    assert validation["step"].tolist() == validated
    assert made.attachments["stopped_early"]
    assert made.attachments["best_step"] == every == validation["step"].iloc[validation["loss"].argmin()]
    from safetensors.torch import load_file

    best = load_file(tmp_path / "run" / "checkpoints" / f"checkpoint-{every}" / "adapter_model.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in weights(tmp_path / "run").items())
    drawn = plot(made)
    assert {trace.name for trace in drawn.data} == {"train", "validation"}
    assert list(drawn.data[1].y) == pytest.approx(validation["loss"].tolist())
    assert "896 trainable" in drawn.layout.title.subtitle.text
    with pytest.raises(InputError, match="expected one of loss"):
        plot(made, value="reward")


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "gemma2"])
def test_other_families_and_credits(name: str, tmp_path: Path) -> None:
    """Fused projections, Conv1D with its transposed weights, sliding windows; without a validation."""
    model = chat_tiny(name)
    before = snapshot(model)
    credit = {"gpt2": "attention", "phi3": "none"}.get(name, "reward")
    settings = {**QUICK, "epochs": 1, "max_steps": 2}
    made = align(model, TRAIN, [-1, 0], out=tmp_path / "run", heads=[(1, 2)], credit=credit, rank=2, **settings)
    assert same(before, snapshot(model))
    assert made.attachments["layers"] == [0, 2]
    assert made.attachments["best_step"] == 2
    assert set(made.frame["split"]) == {"train"}
    prompt = torch.tensor([TRAIN[0].prompt])
    with torch.no_grad():
        merged, beside = (
            load_adapter(model, tmp_path / "run" / "adapter", merged=way).hf(prompt).logits for way in (True, False)
        )
        assert (merged - model.hf(prompt).logits).abs().max() > 1e-3
    torch.testing.assert_close(merged, beside, atol=1e-5, rtol=1e-4)


def test_a_model_in_bfloat16(whole: tuple[Path, Any], tmp_path: Path) -> None:
    """The adapter and the loss are in float32; the base stays in half precision, and what is planted is learned."""
    half = chat_tiny()
    half = load_model(half.hf.to(torch.bfloat16), half.tokenizer)
    before = snapshot(half)
    made = align(half, TRAIN, [1], out=tmp_path / "run", validation=HELD, **QUICK)
    assert same(before, snapshot(half))
    assert {value.dtype for value in half.hf.state_dict().values() if value.is_floating_point()} == {torch.bfloat16}
    assert {value.dtype for value in weights(tmp_path / "run").values()} == {torch.float32}
    last, full = (one.frame[one.frame["split"] == "validation"].iloc[-1] for one in (made, whole[1]))
    assert last["accuracy"] == full["accuracy"]
    assert last["margin"] == pytest.approx(full["margin"], rel=0.15)
    with adapted(half, tmp_path / "run" / "adapter"):
        assert half.hf(torch.tensor([TRAIN[0].prompt])).logits.dtype == torch.bfloat16
    assert same(before, snapshot(half))


def test_a_rank_for_each_layer(model: Any, tmp_path: Path) -> None:
    """Shapes of the matrices, and one scale: the merged weights are W + 4 B A, whatever the rank."""
    from safetensors.torch import load_file

    settings = {**QUICK, "max_steps": 2, "lora_alpha": 12.0}
    made = align(model, TRAIN, [2, 0], out=tmp_path / "run", rank=(1, 3), **settings)
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert made.attachments["trainable"] == sum(value.numel() for value in weights.values())
    merged = load_adapter(model, tmp_path / "run" / "adapter", merged=True).hf
    for layer, rank in ((0, 1), (2, 3)):
        name = f"model.layers.{layer}.self_attn.q_proj"
        low, high = (weights[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert low.shape[0] == high.shape[1] == rank
        change = merged.get_submodule(name).weight - model.hf.get_submodule(name).weight
        assert change.abs().max() > 1e-5
        torch.testing.assert_close(change, 4 * high @ low, atol=1e-6, rtol=1e-3)


def test_layers_below_need_no_gradient(model: Any, tmp_path: Path) -> None:
    """Autograd keeps nothing of the layers below the lowest that is trained, and the adapter alone is trained."""
    from transformers import TrainerCallback

    seen: dict[str, list[bool]] = {"below": [], "above": []}
    handles: list[Any] = []

    class Looks(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            trained = {name for name, value in model.named_parameters() if value.requires_grad}
            assert trained
            assert all(".layers.2.self_attn." in name and ".lora_" in name for name in trained)
            assert sum(value.numel() for value in model.parameters() if value.requires_grad) == arm.n_parameters
            layers = model.get_base_model().model.layers
            for at, name in ((1, "below"), (2, "above")):
                handles.append(
                    layers[at].register_forward_hook(
                        lambda *given, name=name: seen[name].append(given[2].requires_grad)
                    )
                )

    arm = arms(model, [2], rank=3, n_random=0)["focal"]
    align(
        model,
        TRAIN,
        arm.layers,
        out=tmp_path / "run",
        rank=arm.rank,
        lora_alpha=arm.lora_alpha,
        callbacks=[Looks()],
        **{**QUICK, "max_steps": 1},
    )
    assert seen["below"]
    assert not any(seen["below"])
    assert all(seen["above"])
    for handle in handles:
        handle.remove()


def test_an_adapter_for_another_model(model: Any, whole: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = whole
    other = chat_tiny(seed=7)
    for load in (load_adapter, check_adapter, lambda *given: adapted(*given).__enter__()):
        with pytest.raises(InputError, match="is an adapter for another model: 'LlamaForCausalLM'") as raised:
            load(other, folder / "adapter")
        assert model.fingerprint in str(raised.value)
        assert other.fingerprint in str(raised.value)
    assert load_adapter(other, folder / "adapter", check=False).fingerprint != other.fingerprint
    smaller = chat_tiny(hidden_size=8)
    with pytest.raises(ModelError, match="does not fit LlamaForCausalLM"):
        load_adapter(smaller, folder / "adapter", check=False)
    shutil.copytree(folder / "adapter", tmp_path / "foreign")
    (tmp_path / "foreign" / "interp_provenance.json").unlink()
    with pytest.raises(InputError, match="does not say which model"):
        load_adapter(model, tmp_path / "foreign")
    assert load_adapter(model, tmp_path / "foreign", check=False).fingerprint != model.fingerprint
    (tmp_path / "foreign" / "interp_provenance.json").write_text("{")
    with pytest.raises(ModelError, match="is damaged"):
        load_adapter(model, tmp_path / "foreign")
    (tmp_path / "foreign" / "adapter_model.safetensors").rename(tmp_path / "foreign" / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        load_adapter(model, tmp_path / "foreign", check=False)


def test_preferences_of_another_tokenizer(model: Any, tmp_path: Path) -> None:
    from interp.conflict.pairs import make_pairs

    pairs = make_pairs("training", 2, families=["quotation"], swapped=False)
    made = make_preferences(model, pairs, max_answer_tokens=8, progress=False)
    other = chat_tiny(vocab_size=300)
    other.tokenizer.add_tokens(["<more>"])
    with pytest.raises(InputError, match="another tokenizer"):
        align(other, made, [0], out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_bad_input(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [Preference("long", ids(1000), ids(30), ids(2), ids(2), (1,))]
    calls: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"layers": []}, InputError, "expected at least one layer"),
        ({"layers": [3]}, InputError, "layer 3 is out of range"),
        ({"rank": 0}, InputError, "rank=0"),
        ({"rank": (2, 3, 4)}, InputError, "one for each layer"),
        ({"preset": "phone"}, InputError, "expected one of laptop, gpu"),
        ({"credit": "half"}, InputError, "expected one of reward"),
        ({"alpha": -1}, InputError, "alpha=-1"),
        ({"beta": 0}, InputError, "beta=0"),
        ({"learning_rate": 0}, InputError, "learning_rate=0"),
        ({"epochs": -1}, InputError, "epochs=-1"),
        ({"batch_size": 0}, InputError, "batch_size=0"),
        ({"max_steps": 0}, InputError, "max_steps=0"),
        ({"preferences": []}, InputError, "preferences: expected what make_preferences gave"),
        ({"preferences": ["a"]}, InputError, "preferences: expected what make_preferences gave"),
        ({"preferences": [Preference("a", ids(3), (), ids(2), ids(2), ())]}, InputError, "'a' has an empty prompt"),
        (
            {"preferences": [Preference("a", ids(3), (999,), ids(2), ids(2), ())]},
            InputError,
            "outside the vocabulary of 260",
        ),
        ({"preferences": long}, InputError, "'long' has 1030 tokens; the model's context is 1024"),
        ({"validation": TRAIN[:1]}, InputError, "both in preferences and in validation"),
        ({"validation": []}, InputError, "validation: expected"),
        ({"credit": "attention"}, InputError, "needs the focal heads"),
    ]
    for changes, error, message in calls:
        given = {"preferences": TRAIN, "layers": [1], "out": tmp_path / "new", "progress": False, **changes}
        with pytest.raises(error, match=message):
            align(model, **given)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ResultError, match=r"holds other files \(notes.txt\)"):
        align(model, TRAIN, [1], out=tmp_path / "full", progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot use the folder"):
        align(model, TRAIN, [1], out=tmp_path / "file", progress=False)
    encoder = load_model(tiny_encoder(), tiny_tokenizer())
    with pytest.raises(InputError, match="is an encoder"):
        align(encoder, TRAIN, [0], out=tmp_path / "encoder", progress=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"pip install 'interp\[align\]'"):
        align(model, TRAIN, [1], out=tmp_path / "none", progress=False)


def test_out_of_memory_says_what_to_do(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(model)

    def runs_out(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("interp.conflict.sail_trainer.answer_log_probs", runs_out)
    with pytest.raises(MemoryBudgetError, match="batch_size=3"):
        align(model, TRAIN, [1], out=tmp_path / "run", **QUICK)
    assert same(before, snapshot(model))


def test_left_as_it_was_puts_everything_back(model: Any) -> None:
    before = snapshot(model)
    with left_as_it_was(model):
        model.hf.train()
        model.hf.forward = lambda *_: None
        model.hf.config.pad_token_id = 77
        model.hf.generation_config.temperature = 0.3
        model.hf.model_tags = ["x"]
        model.hf.model.layers[0].self_attn.q_proj = torch.nn.Identity()
        model.hf.requires_grad_(False)
        assert not same(before, snapshot(model))
    assert same(before, snapshot(model))


def test_history_of_what_a_trainer_logs() -> None:
    numbers = {"margin": 0.1, "accuracy": 0.5, "chosen_reward": 0.2, "rejected_reward": 0.1}
    numbers |= {"chosen_nll": 1.5, "anchor_kl": 0.1}
    entries = [
        {"step": 1, "epoch": 0.5, "loss": 0.7, "learning_rate": 0.1, "grad_norm": 2.0, "seconds": 1.0, **numbers},
        {"step": 1, "epoch": 0.5, "eval_loss": 0.6, "seconds": 2.0, **{f"eval_{k}": v for k, v in numbers.items()}},
        {"step": 1, "train_runtime": 3.0, "train_loss": 0.7, "seconds": 3.0},
    ]
    frame = history_frame(entries)
    assert frame["split"].tolist() == ["train", "validation"]
    assert frame["loss"].tolist() == [0.7, 0.6]
    assert frame["learning_rate"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("n_pairs", "batch_size", "gradient_accumulation", "epochs", "steps"),
    [(250, 4, 1, 2.0, 126), (250, 4, 2, 2.0, 64), (5, 4, 1, 0.5, 1), (9, 4, 4, 1.0, 1)],
)
def test_steps_of_a_schedule(
    n_pairs: int, batch_size: int, gradient_accumulation: int, epochs: float, steps: int
) -> None:
    settings = dataclasses.replace(
        PRESETS["laptop"], epochs=epochs, batch_size=batch_size, gradient_accumulation=gradient_accumulation
    )
    assert aligning._n_steps(settings, None, n_pairs) == steps
    assert aligning._n_steps(settings, 3, n_pairs) == 3


def test_a_result_is_saved_beside_the_adapter(whole: tuple[Path, Any]) -> None:
    folder, made = whole
    assert load_result(folder / "history.parquet").equals(made, check_provenance=True)


@pytest.mark.slow
def test_embedded_model_learns_from_a_few_pairs(embedded: Any, tmp_path: Path) -> None:
    """Two lists against two sentences, in two of the middle layers; the loss falls, and the base does not change."""
    from interp.conflict.pairs import encode_pair, make_pairs

    examples = []
    for pair in make_pairs("training", 3, families=["list"], wordings=["simple"], swapped=False):
        prompts = encode_pair(embedded, pair, ("conflict", "user"))
        good, bad = (
            embedded.encode(text)[0] for text in ("1. The first part.\n2. The second part.", "It has two parts.")
        )
        spans = prompts["conflict"].spans["system_rule"]
        examples.append(
            Preference(pair.id, prompts["conflict"].ids, tuple(good), tuple(bad), prompts["user"].ids, spans)
        )
    before = snapshot(embedded)
    made = align(
        embedded,
        examples,
        [12, 13],
        out=tmp_path / "run",
        heads=[(12, 0), (13, 5)],
        credit="attention",
        learning_rate=2e-3,
        max_steps=4,
        batch_size=3,
        gradient_accumulation=1,
        progress=False,
    )
    assert same(before, snapshot(embedded))
    losses = made.frame["loss"].tolist()
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < 0.9 * losses[0]
    assert made.attachments["trainable_share"] == pytest.approx(0.00046, abs=1e-5)
    with adapted(embedded, tmp_path / "run" / "adapter"):
        assert embedded.fingerprint != before["fingerprint"]
