"""Dose-response against one clamped prompt at a time, with a planted neuron, and against hand-computed summaries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp import batching
from interp.capture import forward
from interp.errors import InputError, MemoryBudgetError
from interp.intervene import Clamp, intervene
from interp.neurons import decode, dose_response, neuron_statistics
from interp.neurons.atlas import wilson
from interp.neurons.clamped_runs import Run, perplexities, run_clamped
from interp.neurons.clamping import summarise
from interp.neurons.concepts import Concept
from interp.neurons.responses import bootstrap, mention_pattern
from interp.results import load_result

PROMPTS = [" the dog is in the water", " a cat", " the king of the sea is old !", " tea"]
LAYER, NEURON = 2, 7
DOSES = [-20.0, -5.0, 0.0, 5.0, 20.0]


def plant(model: Any, word: str = " music", layer: int = LAYER, neuron: int = NEURON, peaked: bool = True) -> int:
    """Write a vocabulary row into W_down[:, neuron]: raising the neuron raises the word."""
    (token,) = model.tokenizer(word, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        if peaked:
            model.arch.head_weight().mul_(8)  # or no token could have much probability
        row = model.arch.head_weight()[token].clone()
        model.arch.down_weight(layer)[neuron] = row
    return token


@pytest.fixture(scope="module")
def planted(tiny: Any) -> Any:
    model = tiny()
    plant(model)
    return model


@pytest.fixture(scope="module")
def sweep(planted: Any) -> Any:
    return dose_response(
        planted,
        " music",
        PROMPTS,
        DOSES,
        neuron=(LAYER, NEURON),
        units="absolute",
        unrelated=" water",
        max_new_tokens=5,
        n_random=2,
        progress=False,
    )


def _alone(model: Any, ids: list[int], clamp: Clamp | None, length: int) -> tuple[torch.Tensor, list[int]]:
    """Next-token log-probabilities and greedy continuation of one prompt, no batching and no shared cache."""
    batch = batching.pad([ids], [0], 0)
    with torch.no_grad(), intervene(model, *([clamp] if clamp else [])):
        log_p = forward(model, batch).logits[0, -1].float().log_softmax(-1)
        out = model.generate_ids([ids], max_new_tokens=length)[0]
    return log_p, [token for token in out if token not in model.end_ids()]


@pytest.mark.parametrize("mode", ["set", "add", "scale"])
@pytest.mark.parametrize("site", ["up", "gate", "hidden"])
def test_rows_equal_one_by_one(planted: Any, site: str, mode: str) -> None:
    result = dose_response(
        planted,
        " music",
        PROMPTS[:2],
        [-2.0, 4.0],
        neuron=(1, 3),
        site=site,
        mode=mode,
        units="absolute",
        unrelated=" water",
        n_random=1,
        max_new_tokens=4,
        max_tokens=30,
        progress=False,
    )
    _check_rows(planted, result, mode)


def test_rows_equal_one_by_one_in_every_family(tiny: Any, family: str) -> None:
    model = tiny(family)
    result = dose_response(
        model,
        " music",
        PROMPTS[:2],
        [-3.0, 3.0],
        neuron=(1, 3),
        units="absolute",
        unrelated=" water",
        n_random=1,
        max_new_tokens=4,
        progress=False,
    )
    _check_rows(model, result, "set")


def _check_rows(model: Any, result: Any, mode: str) -> None:
    (music,), (water,) = (model.tokenizer(word)["input_ids"] for word in (" music", " water"))
    length = result.provenance.parameters["max_new_tokens"]
    bases = {text: _alone(model, *model.encode([text]), None, length)[0] for text in set(result.frame["prompt"])}
    for row in result.frame.itertuples():
        clamps = {
            "none": None,
            "zero": Clamp(row.layer, row.neuron, 0.0, row.site, "zero"),
        }
        clamp = clamps.get(row.arm, Clamp(row.layer, row.neuron, row.value, row.site, mode))
        (ids,) = model.encode([row.prompt])
        log_p, continuation = _alone(model, ids, clamp, length)
        base = bases[row.prompt]
        assert row.p_concept == pytest.approx(math.exp(log_p[music]), rel=1e-3, abs=1e-7)
        assert row.p_unrelated == pytest.approx(math.exp(log_p[water]), rel=1e-3, abs=1e-7)
        assert row.rank == 1 + int((log_p > log_p[music]).sum())
        assert row.kl == pytest.approx(float((log_p.exp() * (log_p - base)).sum()), rel=1e-3, abs=1e-5)
        assert row.text == (model.decode(continuation) if continuation else "")
        assert row.n_tokens == len(continuation)
        assert row.mentions == ("music" in row.text.lower().split())
        if not continuation:
            assert math.isnan(row.perplexity)
            continue
        with torch.no_grad():
            logits = model.hf(torch.tensor([[*ids, *continuation]])).logits[0].float()
        losses = torch.nn.functional.cross_entropy(logits[len(ids) - 1 : -1], torch.tensor(continuation))
        assert row.perplexity == pytest.approx(math.exp(losses), rel=1e-3)


def test_planted_neuron_responds_and_the_controls_do_not(sweep: Any) -> None:
    means = sweep.frame.groupby(["arm", "dose"], observed=True)["p_concept"].mean()
    clamp = means["clamp"].tolist()
    assert (np.diff(clamp) > -1e-6).all()
    assert clamp[-1] > 0.9 > 0.1 > clamp[0]
    assert (means["random"] < 0.5).all()
    usual = sweep.frame.query("arm == 'none'")["p_concept"].mean()
    assert abs(sweep.frame.query("arm == 'zero'")["p_concept"].mean() - usual) < 0.2
    answers = sweep.frame.query("arm == 'clamp' and dose == 20")
    assert answers["mentions"].all()
    assert (answers["rank"] == 1).all()
    assert (answers["kl"] > 0.1).all()


def test_layout_of_the_table(sweep: Any, tmp_path: Any) -> None:
    frame = sweep.frame
    assert frame["arm"].value_counts().to_dict() == {"none": 4, "zero": 4, "random": 2 * 5 * 4, "clamp": 5 * 4}
    assert (frame.query("arm == 'none'")["kl"] == 0).all()
    assert set(frame.query("arm == 'random'")["neuron"]) == set(sweep.provenance.parameters["random"])
    assert NEURON not in set(frame.query("arm == 'random'")["neuron"])
    assert frame.query("arm in ['none', 'zero']")["dose"].isna().all()
    assert load_result(sweep.save(tmp_path / "d.parquet")).equals(sweep)


@pytest.mark.parametrize("mode", ["set", "add"])
def test_doses_in_standard_deviations(planted: Any, mode: str) -> None:
    texts = ["▁the▁water▁is▁old", "▁a▁dog▁!"]
    arguments: dict[str, Any] = {"neuron": (LAYER, NEURON), "mode": mode, "unrelated": None, "max_new_tokens": 2}
    arguments |= {"progress": False, "n_random": 2}
    result = dose_response(planted, " music", PROMPTS[:1], [-2, 0, 2], sample_texts=texts, **arguments)
    table = neuron_statistics(planted, texts, layers=[LAYER], progress=False)
    moments = table.frame.set_index("neuron")
    for row in result.frame.query("arm in ['clamp', 'random']").itertuples():
        mean, sd = moments.loc[row.neuron, ["mean", "sd"]]
        assert row.value == pytest.approx(row.dose * sd + (mean if mode == "set" else 0))
    assert result.provenance.parameters["sample"] == "sample_texts"
    assert result.frame["p_unrelated"].isna().all()
    if mode == "add":
        assert (result.frame.query("dose == 0")["kl"] < 1e-6).all()
    again = dose_response(planted, " music", PROMPTS[:1], [-2, 0, 2], statistics=table, **arguments)
    pd.testing.assert_frame_equal(again.frame, result.frame)
    own = dose_response(planted, " music", PROMPTS[:2], [-2, 2], **arguments)
    assert own.provenance.parameters["sample"] == "prompts"


def test_the_neuron_is_found_by_decoding(planted: Any) -> None:
    arguments: dict[str, Any] = {"units": "absolute", "unrelated": None, "max_new_tokens": 2, "progress": False}
    result = dose_response(planted, " music", PROMPTS[:1], [2.0], **arguments)
    assert set(result.frame.query("arm == 'clamp'")["layer"]) == {LAYER}
    assert set(result.frame.query("arm == 'clamp'")["neuron"]) == {NEURON}
    atlas = decode(planted, site="down", progress=False)
    assert dose_response(planted, " music", PROMPTS[:1], [2.0], atlas=atlas, **arguments).equals(result)
    with pytest.raises(InputError, match="to clamp 'hidden' neurons"):
        dose_response(planted, " music", PROMPTS[:1], [2.0], atlas=decode(planted, progress=False), **arguments)


def test_samples_are_seeded(planted: Any) -> None:
    def texts(seed: int, prompts: list[str]) -> list[str]:
        arguments: dict[str, Any] = {"neuron": (1, 3), "units": "absolute", "unrelated": None, "progress": False}
        frame = dose_response(
            planted, " music", prompts, [1.0], temperature=1.5, n_seeds=3, seed=seed, max_new_tokens=6, **arguments
        ).frame
        assert frame.groupby(["arm", "neuron", "dose", "prompt_index"], observed=True, dropna=False).size().eq(3).all()
        return frame["text"].tolist()

    first = texts(1, PROMPTS[:2])
    assert texts(1, PROMPTS[:2]) == first
    assert texts(2, PROMPTS[:2]) != first
    assert len(set(first)) > 3


def test_runs_survive_out_of_memory(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch of more than two rows fails half-way: the outcomes are the same."""
    encoded = planted.encode(PROMPTS)
    runs = [Run(at, clamp) for at in range(4) for clamp in (None, *(Clamp(at % 3, 5, v) for v in (-4.0, 1.0, 4.0)))]
    wanted = run_clamped(planted, encoded, runs, [5], [6], max_new_tokens=3)
    usual = type(planted.hf).generate
    failed = []

    def generate(self: Any, input_ids: Any, **options: Any) -> Any:
        if input_ids.shape[0] > 3:  # an unclamped row comes with every batch
            failed.append(input_ids.shape[0])
            raise torch.OutOfMemoryError("out of memory")
        return usual(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(planted.hf), "generate", generate)
    got = run_clamped(planted, encoded, runs, [5], [6], max_new_tokens=3)
    assert failed
    for one, other in zip(got, wanted, strict=True):
        assert one.ids == other.ids
        assert one.p_concept == pytest.approx(other.p_concept, rel=1e-4)
        assert one.kl == pytest.approx(other.kl, abs=1e-5)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in planted.hf.modules())
    monkeypatch.setattr(type(planted.hf), "generate", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryBudgetError):
        run_clamped(planted, encoded, runs, [5], [6], max_new_tokens=3)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in planted.hf.modules())


@settings(max_examples=25, deadline=None)
@given(
    runs=st.lists(
        st.tuples(st.integers(0, 2), st.none() | st.tuples(st.integers(0, 2), st.integers(0, 23), st.floats(-5, 5))),
        min_size=1,
        max_size=8,
    ),
    max_tokens=st.integers(1, 60),
)
def test_any_mixture_of_layers_equals_one_by_one(planted: Any, runs: list[Any], max_tokens: int) -> None:
    encoded = planted.encode(PROMPTS[:3])
    given_runs = [Run(prompt, None if clamp is None else Clamp(*clamp)) for prompt, clamp in runs]
    together = run_clamped(planted, encoded, given_runs, [5], [6], max_tokens=max_tokens)
    for run, outcome in zip(given_runs, together, strict=True):
        log_p, _ = _alone(planted, encoded[run.prompt], run.clamp, 1)
        assert outcome.p_concept == pytest.approx(math.exp(log_p[5]), rel=1e-3, abs=1e-7)


def test_perplexity_of_nothing_is_missing(planted: Any) -> None:
    encoded = planted.encode(PROMPTS[:2])
    found = perplexities(planted, encoded, [(0, ()), (1, (5, 6)), (0, (5,)), (1, (5, 6))])
    assert math.isnan(found[0])
    assert found[1] == found[3]
    with torch.no_grad():
        loss = -planted.hf(torch.tensor([encoded[0]])).logits[0, -1].float().log_softmax(-1)[5]
    assert found[2] == pytest.approx(math.exp(loss), rel=1e-4)


def test_mentions_are_whole_words() -> None:
    pattern = mention_pattern(Concept(" tea", (1,), (" tea",), {" teas": (" te", "as")}))
    assert [bool(pattern.search(text)) for text in ("TEA!", "two teas", "a team", "plateau", "(tea)", "")] == [
        *(True, True, False, False, True, False)
    ]


def test_summary_by_hand() -> None:
    frame = pd.DataFrame(
        {
            "concept": "x",
            "arm": ["none", "clamp", "clamp", "clamp", "clamp"],
            "site": "hidden",
            "dose": [math.nan, 1.0, 1.0, 1.0, 1.0],
            "prompt_index": [0, 0, 0, 1, 1],
            "p_concept": [0.1, 0.2, 0.4, 0.6, 0.8],
            "rank": [9, 1, 2, 3, 10],
            "p_unrelated": math.nan,
            "kl": [0.0, 1.0, 1.0, 3.0, 3.0],
            "mentions": [False, True, True, True, False],
            "perplexity": [2.0, 2.0, math.nan, 4.0, 12.0],
            "n_tokens": [3, 3, 0, 3, 3],
        }
    )
    clamp, none = summarise(frame).iloc[0], summarise(frame).iloc[1]
    assert (clamp["arm"], clamp["n"], clamp["n_prompts"], clamp["n_empty"]) == ("clamp", 4, 2, 1)
    assert clamp["p_concept"] == pytest.approx(0.5)
    assert (clamp["kl"], clamp["kl_low"], clamp["kl_high"]) == (2.0, 1.0, 3.0)  # both prompts, only one, only the other
    assert (clamp["p_concept_low"], clamp["p_concept_high"]) == pytest.approx((0.3, 0.7))
    assert clamp["mention_rate"] == 0.75
    assert (clamp["mention_rate_low"], clamp["mention_rate_high"]) == wilson(3, 4)
    assert (clamp["perplexity"], clamp["perplexity_median"], clamp["rank"]) == (6.0, 4.0, 2.5)
    assert none["n"] == 1
    assert math.isnan(none["kl_low"])  # one prompt says nothing about others
    assert math.isnan(clamp["p_unrelated"])


def test_bootstrap_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        effects = generator.normal(size=30)
        values = np.repeat(effects, 3) + generator.normal(size=90)
        low, high = bootstrap(values, np.repeat(np.arange(30), 3), 400, trial)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": ["a dog", ""]}, "text 1 is empty"),
        ({"prompts": [" w1" * 63]}, "exceed the context"),
        ({"concept": ""}, "is empty"),
        ({"concept": " two words"}, "not a single token"),
        ({"unrelated": "music"}, "share|not a single token"),
        ({"unrelated": " music"}, "share"),
        ({"doses": []}, "doses"),
        ({"doses": [1.0, 1.0]}, "different"),
        ({"doses": [math.nan]}, "finite"),
        ({"doses": [1e39]}, "not a finite"),
        ({"units": "volts"}, "units='volts'; expected one of sd, absolute"),
        ({"mode": "zero"}, "expected set, add or scale"),
        ({"mode": "scale", "units": "sd"}, "no unit"),
        ({"site": "down"}, "site='down'"),
        ({"neuron": (3, 0)}, "layer 3 is out of range"),
        ({"neuron": (0, 24)}, "neuron 24 is out of range"),
        ({"n_random": 0}, "controls"),
        ({"n_random": 24}, "23 that can be drawn"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"n_seeds": 2}, "need a temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_tokens": 0}, "max_tokens=0"),
    ],
)
def test_bad_input(planted: Any, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"concept": " music", "prompts": PROMPTS[:1], "doses": [1.0], "neuron": (1, 3)}
    arguments |= {"units": "absolute", "unrelated": " water", "max_new_tokens": 2, "progress": False}
    with pytest.raises(InputError, match=message):
        dose_response(planted, **{**arguments, **changes})


def test_statistics_that_do_not_fit(planted: Any, tiny: Any) -> None:
    arguments: dict[str, Any] = {"neuron": (1, 3), "unrelated": None, "progress": False, "max_new_tokens": 2}
    wrong_layer = neuron_statistics(planted, PROMPTS, layers=[0], progress=False)
    with pytest.raises(InputError, match="layer 1; expected 24"):
        dose_response(planted, " music", PROMPTS, [1.0], statistics=wrong_layer, **arguments)
    other = neuron_statistics(tiny(), PROMPTS, progress=False)
    with pytest.raises(InputError, match="another model"):
        dose_response(planted, " music", PROMPTS, [1.0], statistics=other, **arguments)
    atlas = decode(planted, progress=False)
    with pytest.raises(InputError, match=r"neurons\.atlas"):
        dose_response(planted, " music", PROMPTS, [1.0], statistics=atlas, **arguments)


def test_a_silent_neuron_has_no_dose_in_sd(tiny: Any) -> None:
    model = tiny()
    with torch.no_grad():
        model.arch.up_weight(1)[3] = 0
    arguments: dict[str, Any] = {"unrelated": None, "progress": False, "max_new_tokens": 2}
    with pytest.raises(InputError, match="never varies"):
        dose_response(model, " music", PROMPTS, [1.0], neuron=(1, 3), **arguments)


def test_an_encoder_is_refused() -> None:
    from tiny_models import tiny_encoder, tiny_tokenizer

    from interp.model import load_model

    with pytest.raises(InputError, match="encoder"):
        run_clamped(load_model(tiny_encoder(), tiny_tokenizer()), [[5, 6]], [Run(0)], [5])


def test_plots(sweep: Any, planted: Any) -> None:
    from interp.neurons.clamping_plots import dose_response as draw
    from interp.neurons.clamping_plots import statistics

    figure = draw(sweep)
    assert {trace.yaxis for trace in figure.data} == {"y", "y2", "y3"}
    shown = [trace.name for trace in figure.data if trace.name and trace.showlegend is not False]
    assert shown == ["random neuron", "neuron of ' music'", "zero ablation", "unclamped"] or len(shown) == 4
    assert figure.layout.yaxis2.type == "log"
    drawn = statistics(neuron_statistics(planted, PROMPTS, ["up", "hidden"], progress=False))
    assert {trace.yaxis for trace in drawn.data} == {"y", "y2"}


@pytest.mark.slow
def test_the_embedded_model_speaks_of_music(embedded: Any) -> None:
    """What the specification saw: -50 makes the model speak of music, and a random neuron does not."""
    result = dose_response(
        embedded,
        " music",
        ["What is your favourite animal?"],
        [-50.0],
        neuron=(27, 1510),
        units="absolute",
        chat=True,
        n_random=1,
        max_new_tokens=8,
        progress=False,
    )
    rows = result.frame.set_index("arm")
    assert rows.at["none", "text"].startswith("The most elusive of all")
    assert rows.at["clamp", "text"].startswith("The music of the song")
    assert rows["mentions"].to_dict() == {"none": False, "zero": False, "random": False, "clamp": True}
    assert rows.at["clamp", "p_concept"] > 1000 * rows.at["none", "p_concept"]
