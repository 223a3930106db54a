"""One table of explanations: its columns, words, special tokens, own scores, refusals, and runs that were killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from plain_games import PlainGame, additive_model, tiny_classifier

from interp.agreement import explain, pairwise_agreement
from interp.agreement import explaining as module
from interp.agreement.coalitions import Coalitions
from interp.agreement.explaining import explain_coalitions
from interp.agreement.explanation_table import EXPLANATION_COLUMNS, costs, explained, runs, score_vectors, seeds_of
from interp.agreement.methods import DEFAULT_METHODS, METHODS
from interp.agreement.tasks import Verbalizer
from interp.errors import InputError, ResultError
from interp.results import load_result

TASK = Verbalizer(
    {"no": " water", "yes": " money"}, template="{text} is", shots=[(" the dog is old", "yes")], separator=""
)
TEXTS = [(" the dog of the sea", "no"), (" a king", "yes"), " the old cat in water code"]
FAST = {"lime": {"n_samples": 20}, "kernel_shap": {"n_samples": 20}, "integrated_gradients": {"max_steps": 50}}
SEVERAL = ("attention", "rollout", "leave_one_out", "lime", "input_x_gradient", "random")


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return tiny()


@pytest.fixture(scope="module")
def result(model: Any) -> Any:
    return explain(model, TEXTS, SEVERAL, task=TASK, seeds=(0, 3), options={"lime": {"n_samples": 20}})


# The table


def test_the_table_has_every_unit_of_every_method_and_seed(model: Any, result: Any) -> None:
    assert result.kind == "agreement.explain"
    assert tuple(result.frame.columns) == tuple(column.name for column in EXPLANATION_COLUMNS)
    seeds = {"lime": [0, 3], "random": [0, 3]}
    assert seeds_of(result) == {method: seeds.get(method, [0]) for method in SEVERAL}
    game = Coalitions(model, TEXTS, task=TASK)
    for (example, _, _), group in result.frame.groupby(["example", "method", "seed"], observed=True):
        one = game.encoded[example]
        assert group["unit"].tolist() == list(range(len(one.positions)))
        assert group["position"].tolist() == list(one.positions)
        assert group["token"].tolist() == [
            model.decode([one.ids[at]], skip_special_tokens=False) for at in one.positions
        ]
        assert group["score"].notna().all()
    assert len(result.frame) == 8 * sum(game.size(at) for at in range(3))


def test_values_and_completeness_are_those_of_the_model(model: Any, result: Any) -> None:
    game = Coalitions(model, TEXTS, task=TASK)
    table = runs(result)
    for example in range(3):
        plain = PlainGame(game, example)
        full, empty = plain.value([True] * game.size(example)), plain.value([False] * game.size(example))
        rows = table[table["example"] == example]
        np.testing.assert_allclose(rows["value"], full, atol=1e-5)
        np.testing.assert_allclose(rows["baseline_value"], empty, atol=1e-5)
        for (method, seed), scores in score_vectors(result, "signed")[example].items():
            row = rows[(rows["method"] == method) & (rows["seed"] == seed)].iloc[0]
            if METHODS.get(method) is not None and METHODS[method].side == "attribution":
                expected = abs(scores.sum() - (full - empty)) / abs(full - empty)
                assert row["completeness_error"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
            else:
                assert np.isnan(row["completeness_error"])


def test_model_calls_count_what_was_asked_and_computed(model: Any, result: Any) -> None:
    table = runs(result).set_index(["method", "seed", "example"]).sort_index()
    sizes = [Coalitions(model, TEXTS, task=TASK).size(at) for at in range(3)]
    for example, n in enumerate(sizes):
        assert table.loc[("leave_one_out", 0, example), "model_calls"] == n + 1  # the text, and each token without
        # Of the ends, the whole text is known; of two tokens each coalition is.
        assert table.loc[("leave_one_out", 0, example), "computed"] == n
        assert table.loc[("lime", 3, example), "computed"] < table.loc[("lime", 3, example), "model_calls"]
        assert table.loc[("attention", 0, example), "model_calls"] == 1
        assert table.loc[("input_x_gradient", 0, example), "model_calls"] == 1
        assert table.loc[("random", 0, example), "model_calls"] == 0
    assert (table["seconds"] >= 0).all()
    assert table.loc["lime", "seconds"].min() > 0


def test_what_was_explained_is_attached(model: Any, result: Any) -> None:
    rows = explained(result)
    assert [row["label"] for row in rows] == ["no", "yes", None]
    for example, row in enumerate(rows):
        plain = PlainGame(Coalitions(model, TEXTS, task=TASK), example)
        assert row["predicted"] == row["explained"] == ["no", "yes"][int(plain.wanted)]
        assert row["probability"] == pytest.approx(np.exp(plain.value([True] * len(plain.positions))), abs=1e-5)
        assert "".join(row["units"]) == row["text"]
    parameters = result.provenance.parameters
    assert parameters["methods"] == list(SEVERAL)
    assert parameters["random_methods"] == ["lime", "random"]
    assert parameters["options"] == {"lime": {"n_samples": 20}}
    assert parameters["baseline"] == "pad"
    assert result.provenance.fingerprint == model.fingerprint


def test_costs_are_means_over_examples_and_seeds(result: Any) -> None:
    table = costs(result).set_index("method")
    each = runs(result)
    lime = each[each["method"] == "lime"]
    assert table.loc["lime", "n"] == 6
    assert table.loc["lime", "model_calls"] == pytest.approx(lime["model_calls"].mean())
    assert table.loc["lime", "completeness_error"] == pytest.approx(lime["completeness_error"].median())
    assert (table["failed"] == 0).all()


def test_baselines_without_a_model(model: Any) -> None:
    vectors = score_vectors(explain(model, TEXTS, ["recency", "first", "rarity", "random"], task=TASK, seeds=(1, 2)))
    ids = Coalitions(model, TEXTS, task=TASK).encoded[0]
    found = vectors[0]
    assert found["recency", 0].tolist() == [1, 2, 3, 4, 5]
    assert found["first", 0].tolist() == [5, 4, 3, 2, 1]
    assert np.argsort(found["rarity", 0]).tolist() == np.argsort([ids.ids[at] for at in ids.positions]).tolist()
    assert sorted(found["random", 1]) == [1, 2, 3, 4, 5]
    assert found["random", 1].tolist() != found["random", 2].tolist()
    alone = score_vectors(explain(model, TEXTS[:1], ["random"], task=TASK, seeds=(1,)))
    assert alone[0]["random", 1].tolist() == found["random", 1].tolist()


def test_defaults_run_everything_but_what_is_not_valid(model: Any) -> None:
    result = explain(model, TEXTS[:2], task=TASK, options=FAST)
    parameters = result.provenance.parameters
    assert set(parameters["refused"]) == {"deeplift"}
    assert parameters["methods"] == [name for name in DEFAULT_METHODS if name != "deeplift"]
    assert not result.frame["score"].isna().any()


# Units


def test_words_are_sums_of_their_tokens(model: Any) -> None:
    vocab = model.tokenizer.get_vocab()
    ids = [vocab[token] for token in ("▁the", "▁dog", "dog", "?", "▁sea", "Dog")]
    methods = ("leave_one_out", "integrated_gradients", "attention", "rollout")
    tokens, words = (explain(model, [ids], methods, units=units) for units in ("tokens", "words"))
    by_token, by_word = score_vectors(tokens, "signed")[0], score_vectors(words, "signed")[0]
    for key, scores in by_token.items():
        expected = [scores[0], scores[1:4].sum(), scores[4:].sum()]
        np.testing.assert_allclose(by_word[key], expected, atol=1e-6)
    rows = words.frame[words.frame["method"] == "attention"]
    assert rows["token"].str.strip().tolist() == ["the", "dogdog?", "seaDog"]
    assert rows["position"].tolist() == [0, 1, 4]
    # Completeness is of the tokens, whose sum is the same.
    one, two = (runs(result).set_index("method")["completeness_error"] for result in (tokens, words))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_special_tokens_are_explained_when_asked() -> None:
    classifier = tiny_classifier()
    plain, special = (
        explain(classifier, ["the dog of sea"], ["attention", "leave_one_out"], special=on) for on in (False, True)
    )
    assert plain.frame["token"].tolist()[:4] == ["the", "dog", "of", "sea"]
    assert special.frame["token"].tolist()[:6] == ["[CLS]", "the", "dog", "of", "sea", "[SEP]"]
    first, second = (score_vectors(result, "signed")[0]["attention", 0] for result in (plain, special))
    np.testing.assert_allclose(second[1:-1], first, atol=1e-6)
    game = Coalitions(classifier, ["the dog of sea"], special=True)
    expected = PlainGame(game, 0)
    whole = expected.value([True] * 6)
    without_cls = whole - expected.value([False] + [True] * 5)
    assert score_vectors(special, "signed")[0]["leave_one_out", 0][0] == pytest.approx(without_cls, abs=1e-5)


# Scores of one's own


def test_own_scores_stand_beside_the_methods(model: Any) -> None:
    mine = [[1.0, -2.0, 3.0, 4.0, 5.0], [0.5, float("nan")], [1.0] * 6]
    result = explain(model, TEXTS, ["recency"], task=TASK, custom={"mine": mine})
    for example, scores in enumerate(mine):
        np.testing.assert_array_equal(score_vectors(result, "signed")[example]["mine", 0], scores)
    table = costs(result).set_index("method")
    assert table.loc["mine", "failed"] == 1
    assert np.isnan(table.loc["mine", "completeness_error"])
    # Constant and failed scores rank nothing: counted, not dropped.
    row = pairwise_agreement(result, "kendall").frame.query("method_a == 'recency' and method_b == 'mine'").iloc[0]
    assert (row["n"], row["n_nan"]) == (1, 2)
    other = explain(model, TEXTS, ["recency"], task=TASK, custom={"mine": [[0.0] * 5, [0.0] * 2, [0.0] * 6]})
    assert other.provenance.parameters["custom"] != result.provenance.parameters["custom"]


@pytest.mark.parametrize(
    ("custom", "message"),
    [
        (
            {"mine": [[1, 2, 3, 4], [1, 2], [1] * 6]},
            r"example 0 .*shape \(4,\).* 5 tokens here .*tokenisations disagree",
        ),
        ({"mine": [[1] * 5, [1, 2]]}, "scores of 2 examples; expected 3"),
        ({"lime": [[1] * 5, [1, 2], [1] * 6]}, "custom='lime' is the name of a method"),
        ({"attention:1": [[1] * 5, [1, 2], [1] * 6]}, "is the name of a method"),
    ],
)
def test_own_scores_that_do_not_fit_are_refused(model: Any, custom: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        explain(model, TEXTS, ["recency"], task=TASK, custom=custom)


def test_own_scores_alone_are_enough(model: Any) -> None:
    result = explain(model, TEXTS[1:2], [], task=TASK, custom={"mine": [[2, 1]]})
    assert result.frame["score"].tolist() == [2, 1]


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ["saliency"]}, "no method 'saliency'; expected one of attention.*leave_one_out"),
        ({"methods": []}, "no methods were given"),
        ({"methods": ["attention:9"]}, "expected layers from 0 to 2"),
        ({"methods": ["lime"], "options": {"kernel_shap": {}}}, "'kernel_shap', which is not among the methods: lime"),
        ({"methods": ["lime"], "options": {"lime": {"samples": 3}}}, "no option 'samples'; it has n_samples"),
        ({"methods": ["recency"], "options": {"recency": {"n": 3}}}, "no option 'n'; it has none"),
        ({"methods": ["lime"], "force": ["deeplift"]}, "force='deeplift' is not among the methods"),
        ({"methods": ["lime"], "seeds": []}, "seeds="),
        ({"methods": ["lime"], "seeds": [1, 1]}, "seeds="),
        ({"methods": ["lime"], "seeds": [-1]}, "from 0 to 32767"),
        ({"methods": ["lime"], "seeds": 2**15}, "from 0 to 32767"),
        ({"methods": ["lime"], "target": "loss"}, "target='loss'"),
        ({"methods": ["lime"], "of": "gold"}, "example 2 has no label"),
        ({"methods": ["lime"], "units": "lines"}, "units='lines'"),
        ({"methods": ["shapley"], "options": {"shapley": {"longest": 3}}}, "at most 3"),
    ],
)
def test_wrong_settings_are_refused(model: Any, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        explain(model, TEXTS, task=TASK, **settings)


def test_a_method_named_alone_and_twice(model: Any) -> None:
    alone = explain(model, TEXTS[:1], "recency", task=TASK, seeds=7)
    twice = explain(model, TEXTS[:1], ["recency", "recency"], task=TASK)
    pd.testing.assert_frame_equal(alone.frame.drop(columns="seconds"), twice.frame.drop(columns="seconds"))


# Nothing to rank


def test_a_certain_model_has_nothing_to_share_out() -> None:
    model = additive_model([90.0, 80.0, 70.0, 200.0])
    methods = ("leave_one_out", "integrated_gradients", "shapley", "kernel_shap", "gradient_shap")
    with torch.no_grad():
        model.hf.classifier.bias.copy_(torch.tensor([0.0, 500.0]))
    result = explain(model, [[0, 1, 2], [3, 0]], methods, baseline="zero", target="log_prob")
    assert (result.frame["value"] == 0).all()
    assert (result.frame["baseline_value"] == 0).all()
    assert explained(result)[0]["probability"] == 1
    assert result.frame["completeness_error"].isna().all()
    np.testing.assert_allclose(result.frame["score"], 0, atol=1e-6)
    exact = result.frame[result.frame["method"].isin(["leave_one_out", "shapley"])]
    assert (exact["score"] == 0).all()
    ig = result.frame[result.frame["method"] == "integrated_gradients"]
    assert (ig["model_calls"] == 50).all()  # no number of steps helps
    table = pairwise_agreement(result, "kendall").frame.query("method_a == 'leave_one_out' and method_b == 'shapley'")
    assert table["n_nan"].item() == 2


# Runs that were killed


def test_a_killed_run_goes_on_where_it_was(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: Any = {"task": TASK, "seeds": (0, 3), "options": {"lime": {"n_samples": 20}}}
    whole = explain(model, TEXTS, SEVERAL, out=tmp_path / "whole", **settings)
    ran: list[tuple[str, int]] = []
    real = module._frame

    def killed(coalitions: Any, name: str, seed: int, *rest: Any) -> Any:
        if (name, seed) == ("lime", 3):
            raise KeyboardInterrupt
        ran.append((name, seed))
        return real(coalitions, name, seed, *rest)

    monkeypatch.setattr(module, "_frame", killed)
    with pytest.raises(KeyboardInterrupt):
        explain(model, TEXTS, SEVERAL, out=tmp_path / "killed", **settings)
    assert ran == [("attention", 0), ("rollout", 0), ("leave_one_out", 0), ("lime", 0)]
    ran.clear()

    def noted(coalitions: Any, name: str, seed: int, *rest: Any) -> Any:
        ran.append((name, seed))
        return real(coalitions, name, seed, *rest)

    monkeypatch.setattr(module, "_frame", noted)
    again = explain(model, TEXTS, SEVERAL, out=tmp_path / "killed", **settings)
    assert ran == [("lime", 3), ("input_x_gradient", 0), ("random", 0), ("random", 3)]
    # Time and what another method had computed before are of the process. Inputs share other batches: float32 rounds.
    own = ["seconds", "computed"]
    pd.testing.assert_frame_equal(again.frame.drop(columns=own), whole.frame.drop(columns=own), rtol=0, atol=1e-6)
    assert again.attachments == whole.attachments
    assert again.provenance.parameters == whole.provenance.parameters
    in_memory = explain(model, TEXTS, SEVERAL, **settings)
    pd.testing.assert_frame_equal(
        in_memory.frame.drop(columns="seconds"), whole.frame.drop(columns="seconds"), check_exact=True
    )
    loaded = load_result(tmp_path / "killed")
    pd.testing.assert_frame_equal(loaded.frame, again.frame)
    ran.clear()
    explain(model, TEXTS, SEVERAL, out=tmp_path / "killed", **settings)
    assert ran == []


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": (0, 4)},
        {"target": "probability"},
        {"baseline": "mean"},
        {"methods": ("lime", "recency")},
        {"options": {"lime": {"n_samples": 21}}},
        {"examples": [TEXTS[0]]},
        {"task": Verbalizer({"no": " water", "yes": " money"}, template="{text} is")},
        {"custom": {"mine": [[1] * 5, [1, 2], [1] * 6]}},
    ],
)
def test_another_run_in_the_same_folder_is_refused(model: Any, tmp_path: Path, change: Any) -> None:
    settings = {"examples": TEXTS, "methods": ("recency", "lime"), "task": TASK, "seeds": (0, 3)}
    settings |= {"options": {"lime": {"n_samples": 20}}}
    explain(model, out=tmp_path, **settings)
    with pytest.raises(ResultError, match="holds another run"):
        explain(model, out=tmp_path, **{**settings, **change})


def test_results_can_be_saved(result: Any, tmp_path: Path) -> None:
    loaded = load_result(result.save(tmp_path / "explanations.parquet"))
    pd.testing.assert_frame_equal(loaded.frame, result.frame)
    assert loaded.attachments == result.attachments
    assert loaded.provenance == result.provenance


def test_encoded_examples_are_explained_the_same(model: Any) -> None:
    game = Coalitions(model, TEXTS, task=TASK)
    first = explain_coalitions(game, ["leave_one_out", "shapley"])
    second = explain_coalitions(game, ["shapley"])
    assert (second.frame["computed"] == 0).all()  # all is known already
    expected = first.frame[first.frame["method"] == "shapley"]["score"].to_numpy()
    np.testing.assert_array_equal(second.frame["score"], expected)


def test_baselines_score_words_not_their_tokens(tiny: Any) -> None:
    model = tiny()
    words = explain(model, [[20, 4, 21, 4, 5, 22]], ["recency", "first", "rarity"], units="words").frame
    n = int(words["unit"].max()) + 1
    assert n < 6  # "Dog" without its space continues a word
    assert words[words["method"] == "recency"]["score"].tolist() == list(range(1, n + 1))
    assert words[words["method"] == "first"]["score"].tolist() == list(range(n, 0, -1))


def test_a_target_that_is_not_finite_fails_its_own_example_alone(tiny: Any) -> None:
    model = tiny()
    bad = 40
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[bad] = float("nan")
    methods = ["attention", "flow", "leave_one_out", "lime", "kernel_shap", "shapley_sampling", "integrated_gradients"]
    made = explain(model, [[5, 6, 7], [5, bad, 7]], methods, baseline=0)
    failed = made.frame.groupby(["method", "example"], observed=True)["score"].apply(lambda score: score.isna().all())
    assert failed.unstack().to_numpy().tolist() == [[False, True]] * len(methods)


@pytest.mark.parametrize("method", ["leave_one_out", "lime", "kernel_shap", "shapley_sampling", "shapley"])
def test_a_constant_target_gives_no_ranking(tiny: Any, method: str) -> None:
    model = tiny()
    with torch.no_grad():
        model.arch.lm_head().weight.zero_()
    made = explain(model, [[5, 6, 7, 8], [5, 9, 7]], [method])
    assert (made.frame["score"] == 0).all()
