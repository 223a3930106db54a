"""Explanations of two models on rated film reviews, measured for `analyses.attribution_agreement`.

1. *Decoder*: a language model classifies short reviews by a few-shot prompt and a label word. Reviews are so short (6 to 9
   tokens) that all 2ⁿ coalitions are asked for: Shapley values and the best and worst order of removal are exact, and every
   sampled method finds its values known.
2. *Encoder*: BERT classifiers of several training seeds (`analyses.encoder_classifier`) on longer reviews of their test split.
3. Settings of Neely et al. (arXiv 2205.04559) where they apply: probability of the predicted class, padding token as baseline,
   |sum over the embedding| per token, special tokens included, captum's defaults for GradientSHAP. LIME has fewer samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analyses.encoder_classifier import read_reviews, split_reviews, train_encoder
from interp.agreement import Classifier, Verbalizer
from interp.agreement.coalitions import Coalitions
from interp.agreement.explaining import about_run, explain_coalitions
from interp.agreement.explanation_table import explained
from interp.agreement.pairs import pair_values, pairwise_agreement
from interp.agreement.removal import faithfulness_of, scores_digest
from interp.errors import InputError
from interp.model import Model
from interp.results import Result
from interp.reuse import reuse_or_make

ATTENTION = ("attention", "attention:-1", "attention_norm", "rollout", "widest", "flow")
PERTURBATION = ("leave_one_out", "lime", "kernel_shap", "shapley_sampling")
GRADIENT = ("integrated_gradients", "gradient_shap", "input_x_gradient", "deeplift", "deepshap")
BASELINES = ("random", "recency", "first", "rarity")
FORCED = ("deeplift", "deepshap")  # not complete on transformers; run because the paper has them
OPTIONS: dict[str, dict[str, Any]] = {
    "gradient_shap": {"n_samples": 5},  # captum's default, as in the paper
    "integrated_gradients": {"n_steps": 50, "max_steps": 200},
    "lime": {"n_samples": 200},
    "kernel_shap": {"n_samples": 200},
    "shapley_sampling": {"n_samples": 10},
}
SETTINGS: dict[str, Any] = {"target": "probability", "of": "predicted", "baseline": "pad"}
LABELS = {"negative": " negative", "positive": " positive"}
SPECIALS = ("[CLS]", "[SEP]")
ENCODER_LENGTHS = (6, 16)


@dataclass(frozen=True)
class Measured:
    """One model's results.

    Attributes:
        name: "decoder", or "encoder" with its training seed.
        explanations, agreement, faithfulness: see `interp.agreement.Comparison`.
        accuracy: share of the explained reviews that the model classifies as people do.
        n_special: how many units of a text are special tokens.
    """

    name: str
    explanations: Result
    agreement: Result
    faithfulness: Result
    accuracy: float
    n_special: int


def measure_decoder(
    model: Model,
    out: Path,
    *,
    n: int,
    seeds: Sequence[int],
    lengths: tuple[int, int] = (6, 9),
    progress: bool | str = True,
) -> Measured:
    """Every method on short reviews, exactly.

    Args:
        model: a causal language model.
        out: folder; a run that was killed goes on there.
        n: reviews.
        seeds: of the methods that draw.
        lengths: least and most tokens of a review.
        progress: progress bars on stderr.
    """
    reviews = split_reviews(read_reviews())
    shots = few_shots(model, reviews[reviews["split"] == "train"])
    task = Verbalizer(LABELS, "Review: {text}\nSentiment:", shots, separator="\n\n")
    rest = reviews[~reviews["text"].isin([text for text, _ in shots])]
    examples = choose(model, rest, n, lengths)
    methods = (*ATTENTION, "leave_one_out", "shapley", "lime", "kernel_shap", "shapley_sampling", *GRADIENT, *BASELINES)
    coalitions = Coalitions(model, examples, task=task, **SETTINGS)
    return measured("decoder", coalitions, methods, out, seeds, n_normalised=n, progress=progress)


def measure_encoder(
    training_seed: int, out: Path, *, n: int, seeds: Sequence[int], n_normalised: int, progress: bool | str = True
) -> Measured:
    """Every method but the exact ones on reviews of the test split.

    Args:
        training_seed: of the classifier, which is trained if it is not there.
        out: folder.
        n: reviews.
        seeds: of the methods that draw.
        n_normalised: reviews on which AOPC is normalised by a beam search.
        progress: progress bars on stderr.
    """
    model = train_encoder(training_seed, out / "model")
    reviews = split_reviews(read_reviews())
    examples = choose(model, reviews[reviews["split"] == "test"], n, ENCODER_LENGTHS)
    coalitions = Coalitions(model, examples, task=Classifier(), special=True, **SETTINGS)
    methods = (*ATTENTION, *PERTURBATION, *GRADIENT, *BASELINES)
    name = f"encoder {training_seed}"
    return measured(name, coalitions, methods, out, seeds, n_normalised=n_normalised, progress=progress)


def measured(
    name: str,
    coalitions: Coalitions,
    methods: Sequence[str],
    out: Path,
    seeds: Sequence[int],
    *,
    n_normalised: int,
    progress: bool | str,
) -> Measured:
    """Explanations, agreement and faithfulness of encoded examples; what is there already is used again."""
    options = {method: OPTIONS[method] for method in methods if method in OPTIONS}
    explanations = explain_coalitions(
        coalitions, methods, seeds=seeds, options=options, force=FORCED, out=out / "explanations", progress=progress
    )
    faithful = reuse_or_make(
        out / "faithfulness.parquet",
        lambda: faithfulness_of(coalitions, explanations, n_normalised=n_normalised, beam=3, progress=progress),
        fingerprint=coalitions.model.fingerprint,
        parameters={**about_run(coalitions), "scores": scores_digest(explanations), "n_normalised": n_normalised},
    )
    agreed = pairwise_agreement(explanations)
    agreed.save(out / "agreement.parquet")
    right = [one["label"] == one["predicted"] for one in explained(explanations)]
    specials = set(coalitions.model.tokenizer.all_special_ids)
    first = coalitions.encoded[0]
    n_special = sum(first.ids[position] in specials for position in first.positions)
    return Measured(name, explanations, agreed, faithful, float(np.mean(right)), n_special)


def few_shots(model: Model, reviews: pd.DataFrame, each: int = 2, seed: int = 0) -> list[tuple[str, str]]:
    """The clearest short reviews of each class, in turn: (text, class).

    Args:
        model: whose tokens are counted.
        reviews: of a split that is not explained, with text, rating and label.
        each: reviews of a class.
        seed: of the order among equal ratings.
    """
    found = {}
    for label, name in enumerate(LABELS):
        rows = reviews[reviews["label"] == label].sample(frac=1, random_state=seed)
        rows = rows[[6 <= count <= 12 for count in _lengths(model, rows["text"])]]
        found[name] = (
            rows.sort_values("rating", key=lambda rating: -rating.abs(), kind="stable")["text"].head(each).tolist()
        )
    return [
        (text, name) for texts in zip(*found.values(), strict=True) for name, text in zip(found, texts, strict=True)
    ]


def choose(
    model: Model, reviews: pd.DataFrame, n: int, lengths: tuple[int, int], seed: int = 0
) -> list[tuple[str, str]]:
    """(text, class) of random reviews with that many tokens, each text once.

    Raises:
        InputError: there are fewer.
    """
    rows = reviews.drop_duplicates("text").sample(frac=1, random_state=seed)
    rows = rows[[lengths[0] <= count <= lengths[1] for count in _lengths(model, rows["text"])]]
    if len(rows) < n:
        raise InputError(f"{len(rows)} reviews have {lengths[0]} to {lengths[1]} tokens; {n} were asked for")
    names = list(LABELS)
    return [(str(row.text), names[row.label]) for row in rows.head(n).itertuples()]


def _lengths(model: Model, texts: Any) -> list[int]:
    return [len(model.tokenizer(" " + text, add_special_tokens=False)["input_ids"]) for text in texts]


def without_special(one: Measured) -> Result:
    """The same explanations, special tokens not ranked."""
    frame = one.explanations.frame
    kept = frame[~frame["token"].isin(SPECIALS)].reset_index(drop=True)
    return dataclasses.replace(one.explanations, frame=kept)


def pooled(runs: Sequence[Measured], special: bool = True) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What claims rest on: runs on the same reviews (classifiers of several training seeds), averaged by review.

    Args:
        runs: of one kind of model.
        special: whether special tokens are ranked; without them there is agreement alone.

    Returns:
        (Kendall's τ: example, method_a, method_b, value; faithfulness: example, method, measure, value).
    """
    pairs = [pair_values(run.explanations if special else without_special(run)) for run in runs]
    faithful = [run.faithfulness.frame.astype({"method": str, "measure": str}) for run in runs]
    scores = pd.concat(faithful, ignore_index=True)
    scores = scores[scores["fraction"].isna()]
    return (
        _mean(pd.concat(pairs, ignore_index=True), ["example", "method_a", "method_b"]),
        _mean(scores, ["example", "method", "measure"]),
    )


def _mean(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    return frame.groupby(keys, sort=False)["value"].mean().reset_index()
