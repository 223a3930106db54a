"""The analysis of agreement: its claims on planted values, both ways, and the whole of it on tiny models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from tiny_models import SIZES, tiny_hf, tiny_tokenizer

from analyses import attribution_agreement
from analyses.agreement_claims import ATTRIBUTIONS, PUBLISHED, agreement_claims, faithfulness_claims, special_claim
from analyses.agreement_runs import (
    ATTENTION,
    BASELINES,
    GRADIENT,
    PERTURBATION,
    SETTINGS,
    choose,
    few_shots,
    measured,
    pooled,
    without_special,
)
from interp.agreement import Classifier, NextToken
from interp.agreement.coalitions import Coalitions
from interp.errors import InputError
from interp.model import load_model

METHODS = (*ATTENTION, *PERTURBATION, *GRADIENT, *BASELINES)


def planted_pairs(values: dict[frozenset[str], float], others: float, n: int = 40, noise: float = 0.02) -> pd.DataFrame:
    """Kendall's τ by example around chosen means."""
    rng, rows = np.random.default_rng(0), []
    for at, first in enumerate(METHODS):
        for second in METHODS[at:]:
            mean = 1.0 if first == second else values.get(frozenset((first, second)), others)
            rows += [(example, first, second, mean + noise * rng.standard_normal()) for example in range(n)]
    return pd.DataFrame(rows, columns=["example", "method_a", "method_b", "value"])


def planted_faithful(means: dict[str, float], n: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    rows = [
        (example, method, "normalised_comprehensiveness", means.get(method, 0.5) + 0.02 * rng.standard_normal())
        for method in METHODS
        for example in range(n)
    ]
    return pd.DataFrame(rows, columns=["example", "method", "measure", "value"])


def holds(claims: list[Any], begins: str) -> Any:
    (found,) = [claim for claim in claims if claim.claim.startswith(begins)]
    return found.holds


SIBLINGS = {
    frozenset(("integrated_gradients", "gradient_shap")): 0.5,
    frozenset(("deeplift", "deepshap")): 0.6,
}


def test_the_papers_world_confirms_the_paper() -> None:
    claims = agreement_claims(planted_pairs(SIBLINGS, 0.1), "planted")
    assert holds(claims, "attention agrees weakly") is True
    assert holds(claims, "attributions that are no siblings") is True
    assert holds(claims, "siblings of one implementation agree (integrated") is True
    assert holds(claims, "siblings of one implementation agree (deeplift") is None  # the same by construction
    assert holds(claims, "only siblings agree") is True
    assert holds(claims, "perturbation methods agree") is False


def test_another_world_does_not() -> None:
    values = {frozenset(("flow", "lime")): 0.6, frozenset(("lime", "integrated_gradients")): 0.8}
    claims = agreement_claims(planted_pairs(values, 0.2), "planted")
    assert holds(claims, "attention agrees weakly") is False
    assert holds(claims, "attributions that are no siblings") is False
    assert holds(claims, "siblings of one implementation agree (integrated") is False
    assert holds(claims, "only siblings agree") is False
    (strongest,) = [claim.ours for claim in claims if claim.claim.startswith("attention agrees weakly")]
    assert "flow and lime" in strongest
    assert "pairs 1 surely above" in strongest


def test_few_reviews_leave_it_open() -> None:
    claims = agreement_claims(planted_pairs(SIBLINGS, 0.28, n=24, noise=0.2), "planted")
    assert holds(claims, "attention agrees weakly") is None


def test_one_review_gives_no_interval_and_no_verdict() -> None:
    for claim in agreement_claims(planted_pairs(SIBLINGS, 0.1, n=1), "planted"):
        assert claim.interval is None
        assert claim.holds is None


def test_agreement_that_predicts_faithfulness_is_told_from_agreement_that_does_not() -> None:
    compared = [name for name in METHODS if name not in BASELINES]
    ranks = {name: at / len(compared) for at, name in enumerate(compared)}
    values = {frozenset((a, b)): (ranks[a] + ranks[b]) / 2 for a in compared for b in compared if a != b}
    pairs = planted_pairs(values, 0.0, noise=0.001)
    with_it = faithfulness_claims(pairs, planted_faithful(ranks), "planted")
    against = faithfulness_claims(pairs, planted_faithful({name: 1 - rank for name, rank in ranks.items()}), "planted")
    assert holds(with_it, "agreement with the others does not predict") is False
    assert holds(against, "agreement with the others does not predict") is True
    assert holds(with_it, "nor among attributions") is False
    assert holds(against, "nor among attributions") is True
    mixed = {name: float(at % 2) + 0.01 * at for at, name in enumerate(compared)}
    assert holds(faithfulness_claims(pairs, planted_faithful(mixed), "planted"), "nor among attributions") is None


def test_faithfulness_of_attention() -> None:
    good = (
        dict.fromkeys(ATTRIBUTIONS, 0.9)
        | dict.fromkeys(ATTENTION, 0.4)
        | {"rollout": 0.6, "random": 0.5, "recency": 0.7}
    )
    claims = faithfulness_claims(planted_pairs(SIBLINGS, 0.1), planted_faithful(good), "planted")
    assert holds(claims, "attributions are more faithful") is True
    assert holds(claims, "the most faithful attention method is more faithful than a random") is True
    assert holds(claims, "the most faithful attention method is more faithful than position") is False


def test_special_tokens() -> None:
    more, less = planted_pairs(SIBLINGS, 0.4), planted_pairs(SIBLINGS, 0.1)
    assert special_claim(more, less, "planted").holds is True
    assert special_claim(less, more, "planted").holds is False
    assert special_claim(less, less, "planted").holds is False


def test_published_figures_are_those_of_the_specification() -> None:
    assert PUBLISHED["integrated_gradients", "gradient_shap"] == (0.55, 0.499, 0.478, 0.467, 0.393)
    assert (
        max(value for pair, row in PUBLISHED.items() if pair[0] in ("rollout", "flow") for value in row if value)
        == 0.268
    )
    assert all(len(row) == 5 for row in PUBLISHED.values())


@pytest.fixture(scope="module")
def reviews() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    words = ["water", "money", "music", "dog", "cat", "tea", "red", "sea", "king", "code"]
    rows = []
    for at in range(60):
        text = " ".join(rng.choice(words, int(rng.integers(5, 12))))
        rating = float(rng.choice([-1, 1]) * rng.uniform(1.6, 4))
        rows.append((at, rating, text, int(rating > 0), "test"))
    return pd.DataFrame(rows, columns=["id", "rating", "text", "label", "split"])


def test_reviews_and_shots_are_chosen_by_length(reviews: pd.DataFrame) -> None:
    model = load_model(tiny_hf("llama"), tiny_tokenizer())
    chosen = choose(model, reviews, 10, (6, 8))
    assert len({text for text, _ in chosen}) == 10
    assert all(6 <= len(text.split()) <= 8 for text, _ in chosen)
    assert chosen == choose(model, reviews, 10, (6, 8))
    assert {label for _, label in chosen} <= {"negative", "positive"}
    with pytest.raises(InputError, match="60 were asked for"):
        choose(model, reviews, 60, (6, 8))
    shots = few_shots(model, reviews)
    assert [label for _, label in shots] == ["negative", "positive", "negative", "positive"]
    ratings = reviews.set_index("text")["rating"]
    long_enough = reviews[reviews["text"].str.split().str.len() >= 6]
    assert math.isclose(abs(ratings[shots[0][0]]), long_enough[long_enough["label"] == 0]["rating"].abs().max())


@pytest.fixture(scope="module")
def runs(reviews: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """A decoder's and two encoders' results on tiny random models."""
    folder = tmp_path_factory.mktemp("agreement")
    texts = [(text, label) for text, label in zip(reviews["text"][:5], ["negative", "positive"] * 3, strict=False)]
    model = load_model(tiny_hf("llama"), tiny_tokenizer())
    coalitions = Coalitions(model, [text for text, _ in texts], task=NextToken(), **SETTINGS)
    methods = (*ATTENTION, "leave_one_out", "shapley", "lime", "kernel_shap", "shapley_sampling", *GRADIENT, *BASELINES)
    found = [measured("decoder", coalitions, methods, folder / "decoder", (0, 1), n_normalised=5, progress=False)]
    for seed in range(2):
        torch.manual_seed(seed)
        labels = {0: "negative", 1: "positive"}
        config = transformers.BertConfig(**{**SIZES, "max_position_embeddings": 64, "id2label": labels})
        hf = transformers.BertForSequenceClassification(config).eval()
        encoder = Coalitions(load_model(hf, tiny_tokenizer()), texts, task=Classifier(), special=True, **SETTINGS)
        found.append(
            measured(
                f"encoder {seed}", encoder, METHODS, folder / f"encoder-{seed}", (0,), n_normalised=2, progress=False
            )
        )
    return found


def test_runs_are_pooled_by_review(runs: list[Any]) -> None:
    pairs, faithful = pooled(runs[1:])
    alone = [pooled([run])[0].set_index(["example", "method_a", "method_b"])["value"] for run in runs[1:]]
    both = pairs.set_index(["example", "method_a", "method_b"])["value"]
    key = (0, "rollout", "leave_one_out")
    assert both[key] == pytest.approx(np.nanmean([one[key] for one in alone]))
    assert set(faithful["example"]) == set(range(5))
    assert len(without_special(runs[1]).frame) <= len(runs[1].explanations.frame)


def test_the_section_is_whole(runs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from interp.report import write_report

    monkeypatch.setattr(attribution_agreement, "measure_decoder", lambda *given, **settings: runs[0])
    monkeypatch.setattr(attribution_agreement, "measure_encoder", lambda seed, *given, **settings: runs[1 + seed])
    model = load_model(tiny_hf("llama"), tiny_tokenizer())
    section = attribution_agreement.run(model, tmp_path, n=5, n_encoders=2, n_encoded=5)
    assert {claim.claim.split(":")[-1].strip() for claim in section.claims} >= {"MiniLM, 2 training seeds"}
    tables = [item for item in section.items if isinstance(item, pd.DataFrame)]
    published = tables[1]
    assert list(published["pair"][:1]) == ["rollout – lime"]
    assert published["SST-2"].tolist()[0] == "0.136"
    assert not published["language model"].eq("–").any()
    page = write_report([section], tmp_path / "report.html", title="planted").read_text(encoding="utf-8")
    assert "attention rankings against attribution rankings" in page
