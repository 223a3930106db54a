"""Training: what is recorded, kept and resumed; and that the laptop preset shows what it was made to show."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from interp.errors import InputError, ResultError
from interp.results import Result, load_result
from interp.sinks import bigram_training
from interp.sinks.bigram_comparison import delta_logit_fit, summarise_toys
from interp.sinks.bigram_dynamics import measure
from interp.sinks.bigram_settings import PRESETS, toy_settings
from interp.sinks.bigram_training import evaluation_sample, load_toy, measured_steps, train_toy

TINY: dict[str, Any] = {"width": 8, "length": 12, "batch": 4, "steps": 12, "sample": 5, "cooldown": 0}
QUIET: dict[str, Any] = {"progress": False, "device": "cpu"}


def same_files(ours: Path, theirs: Path) -> None:
    names = sorted(path.name for path in ours.iterdir())
    assert names == sorted(path.name for path in theirs.iterdir())
    for name in names:
        if name != "manifest.json":  # holds times
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_paper_preset_has_the_published_settings() -> None:
    paper = PRESETS["paper"]
    assert (paper.width, paper.length, paper.batch, paper.steps, paper.n_heads) == (256, 256, 512, 10_000, 1)
    assert (paper.adamw_rate, paper.beta2, paper.weight_decay, paper.sgd_rate) == (3e-4, 0.99, 1e-4, 0.03)
    assert (paper.n_triggers, paper.start, paper.attention, paper.warmup, paper.cooldown) == (3, True, "softmax", 0, 0)
    shapes = {name: tuple(value.shape) for name, value in bigram_training.ToyModel(paper.shape).state_dict().items()}
    assert shapes["token.weight"] == (66, 256)
    assert shapes["position.weight"] == (256, 256)
    assert shapes["blocks.0.mlp.1.weight"] == (1024, 256)
    assert "blocks.0.mlp.1.bias" not in shapes
    assert "blocks.0.attention.query.bias" not in shapes
    assert shapes["output.weight"] == (66, 256)


def test_initial_figures_are_those_published() -> None:
    """Before the first step the paper's curve depends on nothing but its settings: 4.30, 4.43, .0225, 5.20."""
    settings = PRESETS["paper"]
    torch.manual_seed(0)
    frame = measure(bigram_training.ToyModel(settings.shape).eval(), settings.task, evaluation_sample(settings)[:16])
    value = frame.set_index(["quantity", "group"])["value"]
    assert value["risk", "trigger"] == pytest.approx(4.296, abs=0.15)
    assert value["risk", "bigram"] == pytest.approx(4.427, abs=0.15)
    assert value["value_norm", "start"] == pytest.approx(5.20, rel=0.15)
    assert value["sink_mass", "other"] == pytest.approx(0.0225, abs=0.008)


def test_steps_that_are_measured() -> None:
    assert measured_steps(1) == [0, 1]
    steps = measured_steps(10_000)
    assert steps[0] == 0
    assert steps[-1] == 10_000
    assert {10, 100, 1000} <= set(steps)
    assert len(steps) < 45


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_is_plain_torch(optimizer: str, tmp_path: Path) -> None:
    """The same steps written out with torch's optimizer give the same weights."""
    changes = {**TINY, "optimizer": optimizer, "warmup": 3, "cooldown": 2}
    train_toy(seed=7, out=tmp_path, **changes, **QUIET)
    trained, settings = load_toy(tmp_path)
    torch.manual_seed(7)
    model = bigram_training.ToyModel(settings.shape)
    made = {
        "adamw": lambda: torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=1e-4),
        "sgd": lambda: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4),
    }[optimizer]()
    base = made.param_groups[0]["lr"]
    factors = [1 / 4, 2 / 4, 3 / 4, *[1.0] * 7, 2 / 3, 1 / 3]
    for step, factor in enumerate(factors):
        made.param_groups[0]["lr"] = base * factor
        words = np.random.SeedSequence([7, step]).generate_state(1, np.uint64)
        tokens = settings.task.sample(4, 13, seed=int(words[0]) >> 1)
        log_p = model(tokens[:, :-1]).log_softmax(-1)
        made.zero_grad()
        (-log_p.gather(-1, tokens[:, 1:, None]).mean()).backward()
        made.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_rates_of_short_runs() -> None:
    """A preset's long cooldown takes half of a short run, not all of it."""
    settings = toy_settings("laptop", steps=10)
    rates = [bigram_training._rate(settings, step) / settings.adamw_rate for step in range(10)]
    assert rates == pytest.approx([1, 1, 1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_result_and_folder(tmp_path: Path) -> None:
    result = train_toy(seed=1, out=tmp_path / "run", layers=2, **TINY, **QUIET)
    assert result.kind == "sinks.train_toy"
    assert sorted(result.frame["step"].unique()) == measured_steps(12)
    assert set(result.frame["layer"].dropna()) == {0, 1}
    assert result.provenance.parameters["preset"] == "laptop"
    assert result.provenance.seed == 1
    assert load_result(tmp_path / "run").equals(result)
    assert load_result(result.save(tmp_path / "run.parquet")).equals(result, check_provenance=True)
    model, settings = load_toy(tmp_path / "run")
    last = measure(model, settings.task, evaluation_sample(settings))
    kept = result.frame[result.frame["step"] == 12].drop(columns="step").reset_index(drop=True)
    pd.testing.assert_frame_equal(kept.astype(last.dtypes.to_dict()), last)
    again = train_toy(seed=1, layers=2, **TINY, **QUIET)  # without a folder
    assert again.equals(result)
    assert not train_toy(seed=2, layers=2, **TINY, **QUIET).equals(result)


def test_global_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_toy(**TINY, **QUIET)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("stop", [0, 1, 7, 11])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, optimizer: str) -> None:
    """Ctrl-C in the middle of a step: the resumed run has the bytes of one that was never interrupted."""
    changes = {**TINY, "optimizer": optimizer}
    whole = train_toy(out=tmp_path / "whole", **changes, **QUIET)
    real = bigram_training._take_step

    def interrupted(model: Any, optimizer: Any, settings: Any, seed: int, step: int, device: Any) -> Any:
        if step == stop:
            with torch.no_grad():
                next(model.parameters()).add_(1)  # half of a step
            raise KeyboardInterrupt
        return real(model, optimizer, settings, seed, step, device)

    monkeypatch.setattr(bigram_training, "_take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_toy(out=tmp_path / "cut", **changes, **QUIET)
    with pytest.raises(ResultError, match="unfinished"):
        load_result(tmp_path / "cut")
    steps = []
    monkeypatch.setattr(bigram_training, "_take_step", lambda *a: steps.append(a[4]) or real(*a))
    assert train_toy(out=tmp_path / "cut", **changes, **QUIET).equals(whole)
    assert steps[0] == max(step for step in measured_steps(12) if step <= stop)  # not from the beginning
    same_files(tmp_path / "whole", tmp_path / "cut")
    steps.clear()
    assert train_toy(out=tmp_path / "cut", **changes, **QUIET).equals(whole)
    assert steps == []


def test_kill_9_in_another_process(tmp_path: Path) -> None:
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from interp.sinks.bigram_training import train_toy\n"
        "train_toy(out=sys.argv[1], progress=False, device='cpu', width=8, length=12, batch=4, steps=1500, sample=5)\n"
    )
    cut = tmp_path / "cut"
    process = subprocess.Popen([sys.executable, "-c", script, str(cut)])
    deadline = time.monotonic() + 120
    while len(list(cut.glob("*.parquet"))) < 15 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was over before it could be killed"
    before = len(list(cut.glob("*.parquet")))
    assert 15 <= before < len(measured_steps(1500))
    for folder in (cut, tmp_path / "whole"):
        subprocess.run([sys.executable, "-c", script, str(folder)], check=True, timeout=120)
    assert load_result(cut).equals(load_result(tmp_path / "whole"))
    same_files(tmp_path / "whole", cut)


@pytest.mark.parametrize("damage", ["truncate", "empty", "foreign", "remove"])
def test_a_damaged_checkpoint_means_starting_again(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train_toy(out=tmp_path / "whole", **TINY, **QUIET)
    path = tmp_path / "whole" / "checkpoint.safetensors"
    content = path.read_bytes()
    last = max((tmp_path / "whole").glob("*.parquet"), key=os.path.getmtime)
    last.unlink()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes({"truncate": content[: len(content) // 2], "empty": b"", "foreign": b"x" * 999}[damage])
        with pytest.raises(ResultError, match="no checkpoint"):
            load_toy(tmp_path / "whole")
        capsys.readouterr()
    assert train_toy(out=tmp_path / "whole", **TINY, **QUIET).equals(whole)
    assert ("starting again" in capsys.readouterr().err) == (damage != "remove")
    assert path.read_bytes() == content


def test_a_lost_measurement_is_made_again_from_the_beginning(tmp_path: Path) -> None:
    whole = train_toy(out=tmp_path, **TINY, **QUIET)
    sorted(tmp_path.glob("*.parquet"))[3].unlink()
    assert train_toy(out=tmp_path, **TINY, **QUIET).equals(whole)


def test_checkpoints_hold_the_optimizer_and_no_pickle(tmp_path: Path) -> None:
    train_toy(out=tmp_path, **TINY, **QUIET)
    tensors = load_file(tmp_path / "checkpoint.safetensors")
    parameters = [name for name in tensors if name.startswith("model.")]
    assert len([name for name in tensors if name.endswith(".exp_avg_sq")]) == len(parameters)
    assert tensors["optimizer.0.step"].item() == 12


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_file(
        {"model.token.weight": torch.zeros(2)}, path, {"interp": json.dumps({"step": 1, "settings": {"depth": 2}})}
    )
    with pytest.raises(ResultError, match="another version"):
        load_toy(tmp_path)


def test_folders_of_other_runs_are_refused(tmp_path: Path) -> None:
    train_toy(out=tmp_path / "run", **TINY, **QUIET)
    with pytest.raises(ResultError, match=r"parameters\.width is 8 there and 16 here"):
        train_toy(out=tmp_path / "run", **{**TINY, "width": 16}, **QUIET)
    with pytest.raises(ResultError, match="seed is 0 there and 1 here"):
        train_toy(out=tmp_path / "run", seed=1, **TINY, **QUIET)
    with pytest.raises(ResultError, match="not empty"):
        train_toy(out=tmp_path / "run", resume=False, **TINY, **QUIET)
    train_toy(out=tmp_path / "new", resume=False, **TINY, **QUIET)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ResultError, match=r"thesis\.txt"):
        train_toy(out=tmp_path / "mine", **TINY, **QUIET)
    with pytest.raises(ResultError, match="no checkpoint"):
        load_toy(tmp_path / "mine")


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("desktop", {}, "laptop"),
        ("laptop", {"depth": 2}, "unknown settings depth; expected some of blocks, width"),
        ("laptop", {"layers": 0}, "layers=0"),
        ("laptop", {"layers": 2, "blocks": ("both",)}, "not together with blocks"),
        ("laptop", {"optimizer": "lion"}, "adamw"),
        ("laptop", {"batch": 0}, "batch=0"),
        ("laptop", {"length": 2}, "length=2"),
        ("laptop", {"adamw_rate": 0.0}, "above 0"),
        ("laptop", {"attention": "linear"}, "softmax, relu"),
        ("laptop", {"n_triggers": 65}, "n_triggers=65"),
        ("laptop", {"n_heads": 5}, "multiple"),
    ],
)
def test_bad_settings(preset: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train_toy(preset, out=tmp_path / "run", **changes, **QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes(dtype: str, tmp_path: Path) -> None:
    result = train_toy(dtype=dtype, out=tmp_path, **TINY, **QUIET)
    assert result.provenance.dtype == dtype
    assert result.frame["value"].notna().all()
    assert next(load_toy(tmp_path)[0].parameters()).dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    "kinds", [{"blocks": ("mlp",)}, {"blocks": ("attention",)}, {"n_triggers": 0}, {"start": False}]
)
def test_every_kind_of_run_is_summarised(kinds: dict[str, Any]) -> None:
    table = summarise_toys(train_toy(**TINY, **kinds, **QUIET))
    assert len(table) == 1
    assert table["peak"].notna().all()
    assert ("mass" in table) == (kinds.get("blocks") != ("mlp",))


def test_fit_of_a_planted_line() -> None:
    result = train_toy(**{**TINY, "steps": 100}, **QUIET)
    frame = result.frame.copy()
    rows = (frame["quantity"] == "delta_logit") & (frame["step"] > 0)
    frame.loc[rows, "value"] = 2.5 * np.log(frame.loc[rows, "step"]) - 7
    fit = delta_logit_fit(Result(result.kind, frame, result.columns, result.provenance), since=10)
    assert fit.slope == pytest.approx(2.5)
    assert fit.intercept == pytest.approx(-7)
    assert fit.r_squared == pytest.approx(1)
    assert (fit.since, fit.until, fit.n) == (10, 100, 11)
    fit = delta_logit_fit(Result(result.kind, frame, result.columns, result.provenance), since=10, until=50)
    assert (fit.since, fit.until, fit.n) == (10, 50, 8)
    with pytest.raises(InputError, match="at least 3"):
        delta_logit_fit(result, since=90)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    result = train_toy(out=tmp_path, device="cuda", progress=False, **TINY)
    assert result.frame["value"].notna().all()
    cpu = train_toy(**TINY, **QUIET)  # the same weights at the beginning
    first = [one.frame.loc[one.frame["step"] == 0, "value"] for one in (result, cpu)]
    np.testing.assert_allclose(*first, rtol=1e-3)


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train_toy("laptop", **QUIET)


@pytest.mark.slow
def test_laptop_preset_shows_every_phase(laptop: Result) -> None:
    """The bands of the specification."""
    row = summarise_toys(laptop).iloc[0]
    assert row["bigram_excess"] < 0.01
    assert row["backcopy_risk"] < 0.05
    assert row["mass"] > 0.7
    assert row["trigger_mass"] < 0.1
    assert row["value_norm"] < row["value_max"] / 2
    frame = laptop.frame
    risk = frame[(frame["quantity"] == "risk") & (frame["group"] == "bigram")]["value"]
    entropy = frame[(frame["quantity"] == "entropy") & (frame["group"] == "bigram")]["value"]
    assert (risk.to_numpy() > entropy.to_numpy()).all()  # nobody beats the oracle
    fit = delta_logit_fit(laptop, since=100)
    assert fit.slope > 0


@pytest.mark.slow
def test_relu_attention_has_neither_sink_nor_drain() -> None:
    row = summarise_toys(train_toy("laptop", attention="relu", **QUIET)).iloc[0]
    assert row["backcopy_risk"] < 0.05
    assert row["mass"] < 0.01
    assert row["value_norm"] > 0.7 * row["value_max"]


@pytest.mark.slow
def test_adam_makes_a_residual_peak_and_sgd_does_not() -> None:
    """Three blocks, wider and shorter than the preset; both learn, and only AdamW's ⟨s⟩ grows."""
    changes = {"layers": 3, "width": 128, "length": 32, "batch": 32, "steps": 320, "cooldown": 0}
    runs = {optimizer: train_toy("laptop", optimizer=optimizer, **changes, **QUIET) for optimizer in ("adamw", "sgd")}
    norms = {}
    for optimizer, run in runs.items():
        rows = run.frame[(run.frame["quantity"] == "residual_norm") & (run.frame["group"] == "start")]
        risk = run.frame[(run.frame["quantity"] == "risk") & (run.frame["group"] == "bigram")]["value"]
        assert risk.iloc[-1] < 2.6 < 4 < risk.iloc[0]
        norms[optimizer] = rows[rows["step"] == 320]["value"].max()
    assert norms["adamw"] >= 2 * norms["sgd"]
