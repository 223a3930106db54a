"""Attributions of film reviews behind a few-shot prompt: `interp.agreement` against captum, on the embedded model.

1. *Leave-one-out* and *KernelSHAP* against captum's `LLMAttribution`, which computes the prompt again for every perturbed
   input. Ours reads two logits at the end of each input, theirs the vocabulary's at every position, as it is documented.
2. *Integrated gradients* with the same number of steps against captum's `IntegratedGradients`, one review at a time: on whole
   prompts, and behind a cached prompt, so that it is seen what the cached prompt alone gives.
3. *The whole default comparison*: seconds and passes per method, and how many tokens pass through the model for all inputs
   that are asked for.

The target is the logit difference of the two label words, the baseline one token, dtype and threads are the same. Ours makes
its `Coalitions` within the time: encoding, prediction, f(x) and f(x₀). Scores are compared on the first reviews. What theirs
is too slow for on all reviews is timed on fewer, by both on the same; ours would gain from more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.benchmarks.captum_peers import integrated_gradients, word_scores
from tests.benchmarks.models import embedded
from tests.benchmarks.table import Row
from tests.benchmarks.timing import Times, ratio_of

SUITE = "agreement"
_WORDS = {"negative": " negative", "positive": " positive"}
_LENGTHS = range(6, 17)  # tokens
_CLEAR = 1.5  # |rating| above which a review is clear
_OF_COALITIONS = ("leave_one_out", "lime", "kernel_shap", "shapley_sampling", "shapley")
_QUICK_DRAWS = {
    "kernel_shap": {"n_samples": 20},
    "lime": {"n_samples": 20},
    "shapley_sampling": {"n_samples": 2},
    "gradient_shap": {"n_samples": 5},
    "integrated_gradients": {"n_steps": 5, "max_steps": 5},
}


@dataclass(frozen=True)
class Work:
    """What is measured on.

    Attributes:
        model, task, reviews: the model, what it is asked, and about which texts.
        quick: a slice of the work.
        whole: how often leave-one-out runs on all reviews.
        shap: groups of reviews for KernelSHAP, one pair each.
        n_samples: KernelSHAP's.
        gradient: groups of reviews for integrated gradients.
        n_steps: theirs.
        rows: internal batch sizes that captum may choose from.
        options: of the default comparison's methods.
    """

    model: Any
    task: Any
    reviews: list[str]
    quick: bool = False
    whole: int = 2
    shap: tuple[tuple[int, ...], ...] = ((0, 1), (2, 3), (4, 5))
    n_samples: int = 200
    gradient: tuple[tuple[int, ...], ...] = tuple(tuple(range(at, at + 4)) for at in range(0, 12, 4))
    n_steps: int = 50
    rows: tuple[int, ...] = (16, 50)
    options: Mapping[str, Mapping[str, Any]] | None = None

    def game(self, some: Sequence[int] | None = None) -> Any:
        """Fresh `Coalitions` of some reviews, or all."""
        from interp.agreement import Coalitions

        texts = self.reviews if some is None else [self.reviews[at] for at in some]
        return Coalitions(self.model, texts, task=self.task, target="logit_difference")

    def row(self, **about: Any) -> Row:
        """A row of this subject."""
        return Row(suite=SUITE, subject="attributions", quick=self.quick, **about)


def run(quick: bool) -> list[Row]:
    """All rows."""
    model = embedded()
    task, reviews = film_reviews(model.tokenizer, 2 if quick else 32)
    work = Work(model, task, reviews)
    if quick:
        work = Work(
            *(model, task, reviews, True),
            **{"whole": 1, "shap": ((1,),), "n_samples": 20, "gradient": ((0, 1),), "n_steps": 5, "rows": (5,)},
            options=_QUICK_DRAWS,
        )
    return [leave_one_out_row(work), kernel_shap_row(work), *gradient_rows(work), *comparison_rows(work)]


def film_reviews(tokenizer: Any, n: int) -> tuple[Any, list[str]]:
    """A few-shot task with four reviews as shots, and `n` others: short clear ones, a positive and a negative in turn."""
    from analyses.encoder_classifier import read_reviews
    from interp.agreement import Verbalizer

    frame = read_reviews()
    frame = frame[frame["rating"].abs() > _CLEAR].sample(frac=1, random_state=0)
    tokens = tokenizer([f" {text}" for text in frame["text"]], add_special_tokens=False)["input_ids"]
    frame = frame[[len(ids) in _LENGTHS for ids in tokens]]
    by_class = {
        "positive": frame[frame["rating"] > 0]["text"].tolist(),
        "negative": frame[frame["rating"] < 0]["text"].tolist(),
    }
    shots = [(texts[at], label) for at in range(2) for label, texts in by_class.items()]
    task = Verbalizer(_WORDS, template="Review: {text}\nSentiment:", shots=shots, separator="\n\n")
    return task, [texts[2 + at // 2] for at in range(n) for texts in [list(by_class.values())[at % 2]]]


def leave_one_out_row(work: Work) -> Row:
    """All reviews at once against `FeatureAblation` one after the other."""
    from captum.attr import FeatureAblation

    from interp.agreement.perturbations import leave_one_out

    asked = work.game()

    def ours(some: Sequence[int]) -> list[np.ndarray]:
        return leave_one_out(work.game(some), range(len(some)), seed=0)

    def theirs(some: Sequence[int]) -> list[np.ndarray]:
        return [word_scores(asked, at, _word(asked, at), FeatureAblation) for at in some]

    everything = tuple(range(len(work.reviews)))
    times, found = in_turn({"ours": ours, "theirs": theirs}, [everything] * work.whole)
    checked = everything[: 1 if work.quick else 2]
    other = [word_scores(asked, at, _word(asked, at, other=True), FeatureAblation) for at in checked]
    return work.row(
        name="leave-one-out: time",
        against="captum LLMAttribution",
        target="<= 0.2",
        **ratio_of(times["ours"], times["theirs"]),
        n=f"{len(everything)} reviews behind {len(asked.prefix.ids)} shared tokens",
        note=_agree(found["ours"], [a - b for a, b in zip(found["theirs"], other, strict=False)])
        + "; perturbations_per_eval=1, more raises",
    )


def kernel_shap_row(work: Work) -> Row:
    """A few reviews at a time, the same for both."""
    from captum.attr import KernelShap

    from interp.agreement.perturbations import kernel_shap

    asked = work.game()
    drawn = {"seed": 0, "n_samples": work.n_samples}

    def ours(some: Sequence[int]) -> list[np.ndarray]:
        return kernel_shap(work.game(some), range(len(some)), **drawn)

    def theirs(some: Sequence[int]) -> list[np.ndarray]:
        return [word_scores(asked, at, _word(asked, at), KernelShap, **drawn) for at in some]

    times, found = in_turn({"ours": ours, "theirs": theirs}, work.shap)
    at, n_each = work.shap[0][0], len(work.shap[0])  # the first of a group has the draws of example 0 on both sides
    other = word_scores(asked, at, _word(asked, at, other=True), KernelShap, **drawn)
    figures = ratio_of(times["ours"], times["theirs"])
    everything = Times()
    everything.add(lambda: ours(range(len(work.reviews))))
    alone = sum(times["theirs"].wall) / sum(map(len, work.shap))
    figures["more"] = {
        **(figures["more"] or {}),
        "seconds_per_review_all_at_once": everything.median / len(work.reviews),
        "their_seconds_per_review": alone,
    }
    return work.row(
        name="KernelSHAP: time",
        against="captum LLMAttribution",
        target="<= 0.2",
        **figures,
        n=f"{work.n_samples} samples × {n_each} review{'s' * (n_each > 1)} a pair, {sum(map(len, work.shap))} in all",
        note=f"{_agree(found['ours'][:1], [found['theirs'][0] - other])}; theirs takes {alone:.1f} s a review, ours on all "
        f"{len(work.reviews)} at once {everything.median / len(work.reviews):.2f} s; ours computes no input twice",
    )


def gradient_rows(work: Work) -> list[Row]:
    """Integrated gradients with fixed steps, against whole prompts and against the same cached prompt."""
    from interp.agreement.gradients import integrated_gradients as integrated
    from interp.agreement.prefix_tree import prefix_cache

    asked, n_steps = work.game(), work.n_steps

    def ours(some: Sequence[int]) -> list[np.ndarray]:
        return integrated(work.game(some), range(len(some)), 0, n_steps=n_steps, max_steps=n_steps)[0]

    def whole(some: Sequence[int], rows: int) -> list[np.ndarray]:
        return [integrated_gradients(asked, at, n_steps, rows) for at in some]

    def cached(some: Sequence[int]) -> list[np.ndarray]:
        prefix = prefix_cache(work.model, asked.prefix.ids)
        return [integrated_gradients(asked, at, n_steps, n_steps, prefix) for at in some]

    tried = {rows: Times() for rows in work.rows}
    for rows in tried if len(tried) > 1 else ():
        tried[rows].add(lambda rows=rows: whole([0], rows))
    best = min(tried, key=lambda rows: sum(tried[rows].wall))
    cases = {"ours": ours, "whole": lambda some: whole(some, best), "cached": cached}
    times, found = in_turn(cases, work.gradient)
    n = f"{n_steps} steps × {len(work.gradient[0])} reviews a pair, {sum(map(len, work.gradient))} in all"
    rivals = (
        ("whole", "captum, whole prompts", "<= 0.6667", f"internal_batch_size={best}, the best of {_listed(tried)}"),
        (
            "cached",
            "captum, the prompt cached",
            None,
            f"keys and values of {len(asked.prefix.ids)} tokens computed once, as in ours",
        ),
    )
    return [
        work.row(
            name="integrated gradients: time",
            against=against,
            target=target,
            **ratio_of(times["ours"], times[case]),
            n=n,
            note=f"{_agree(found['ours'], found[case])}; theirs one review at a time; {more}",
        )
        for case, against, target, more in rivals
    ]


def comparison_rows(work: Work) -> list[Row]:
    """What the default methods cost on all reviews, all in all, and how many tokens pass through the model for them."""
    from interp.agreement import compare, costs

    all_in_all = Times()
    with counted_tokens(work.model) as seen:
        made = all_in_all.add(lambda: compare(work.model, work.reviews, task=work.task, options=work.options))
    each = costs(made.explanations)
    about = {"against": "–", "ratio": None, "target": None, "unit": "s", "repeats": 1}
    rows = [
        work.row(
            **about,
            name=f"compare, {one.method}: a review",
            ours=float(one.seconds),
            n=f"{one.model_calls:.0f} passes asked for, {one.computed:.1f} computed, of a review and seed",
            more={key: float(getattr(one, key)) for key in ("model_calls", "computed", "completeness_error")},
        )
        for one in each.itertuples()
    ]
    faithful = made.faithfulness.provenance.parameters
    n = f"{len(work.reviews)} reviews, {len(each)} methods, 2 seeds"
    total = work.row(
        **about,
        name="compare, all default methods",
        ours=all_in_all.median,
        n=n,
        note=f"explanations, agreement and faithfulness ({faithful['asked']:,} inputs asked for, {faithful['computed']:,} "
        f"computed); draws and steps {'reduced' if work.quick else 'by default'}",
        more={"seconds_per_review": all_in_all.median / len(work.reviews)},
    )
    asked = seen["asked"] + _tokens_of_passes(work, made.explanations)
    shared = work.row(
        name="compare: tokens through the model",
        against="every input in full",
        ratio=seen["computed"] / asked,
        target=None,
        repeats=1,
        ours=float(seen["computed"]),
        theirs=float(asked),
        n=n,
        note="no input twice, shared beginnings once; padding, predictions and DeepLIFT's trial are counted in ours",
    )
    return [*rows, total, shared]


def in_turn(
    cases: Mapping[str, Callable[[Sequence[int]], Sequence[Any]]], groups: Sequence[Sequence[int]]
) -> tuple[dict[str, Times], dict[str, list[Any]]]:
    """Times of every case on each group, in turn as in `interleave`, after a small warm-up; and what was found in that order."""
    times: dict[str, Times] = {name: Times() for name in cases}
    found: dict[str, list[Any]] = {name: [] for name in cases}
    cases["ours"](groups[0][:1])
    for at, group in enumerate(groups):
        for name in list(cases)[:: 1 if at % 2 == 0 else -1]:
            found[name] += times[name].add(lambda name=name, group=group: cases[name](group))
    return times, found


@contextlib.contextmanager
def counted_tokens(model: Any) -> Iterator[dict[str, int]]:
    """Tokens that pass through the model forward, padding included, and those of all inputs asked of `Coalitions`."""
    from interp.agreement import Coalitions

    seen = {"computed": 0, "asked": 0}
    original = Coalitions.compute

    def note(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        known = [*args[:1], given.get("input_ids"), given.get("inputs_embeds")]
        inputs = next(one for one in known if one is not None)
        seen["computed"] += inputs.shape[0] * inputs.shape[1]

    def compute(self: Any, wanted: Any, *more: Any) -> None:
        seen["asked"] += sum(len(kept) * len(self.encoded[example].ids) for example, kept in wanted.items())
        original(self, wanted, *more)

    hook = model.hf.base_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with patch.object(Coalitions, "compute", compute):
            yield seen
    finally:
        hook.remove()


def _tokens_of_passes(work: Work, explanations: Any) -> int:
    """Tokens of all inputs that methods ask for which do not go through `Coalitions`: gradients and attention."""
    from interp.agreement.encoding import encode_examples
    from interp.agreement.explanation_table import runs

    lengths = [len(one.ids) for one in encode_examples(work.model, work.task, work.reviews)]
    return sum(
        int(one.model_calls) * lengths[one.example]
        for one in runs(explanations).itertuples()
        if str(one.method) not in _OF_COALITIONS
    )


def _word(asked: Any, at: int, other: bool = False) -> str:
    """The explained label word of a review, or the other."""
    classes = asked.contrast if other else asked.wanted
    return list(asked.task.labels.values())[classes[at][0]]


def _agree(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> str:
    """How far the scores are apart."""
    pairs = list(zip(ours, theirs, strict=False))
    error = max(np.abs(a - b).max() for a, b in pairs)
    largest = max(np.abs(a).max() for a, _ in pairs)
    return f"scores of {len(pairs)} review{'s' * (len(pairs) > 1)} agree within {error:.0e} (largest {largest:.2f})"


def _listed(tried: Mapping[int, Any]) -> str:
    return " and ".join(map(str, tried))
