"""One call: explain examples by many methods, see how far the rankings agree, and which of them are faithful."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from interp.agreement.coalitions import Coalitions
from interp.agreement.explaining import Custom, explain_coalitions
from interp.agreement.pairs import pairwise_agreement
from interp.agreement.rankings import MEASURES
from interp.agreement.removal import faithfulness_of
from interp.agreement.tasks import Task
from interp.model import Model
from interp.results import Result


class Comparison(NamedTuple):
    """What `compare` gives; `interp.report(list(comparison), "report.html")` draws all of it.

    Attributes:
        explanations: "agreement.explain": every score, with completeness, model calls and time.
        agreement: "agreement.pairwise_agreement": every pair of methods, with chance and ceiling.
        faithfulness: "agreement.faithfulness".
    """

    explanations: Result
    agreement: Result
    faithfulness: Result


def compare(
    model: Model,
    examples: Sequence[Any],
    methods: Sequence[str] | str | None = None,
    *,
    task: Task | None = None,
    target: str = "log_prob",
    of: str = "predicted",
    baseline: str | int | None = None,
    units: str = "tokens",
    special: bool = False,
    seeds: Sequence[int] = (0, 1),
    measures: Sequence[str] | None = None,
    k: Sequence[int] = (3,),
    rank_by: str = "abs",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    custom: Custom | None = None,
    force: Sequence[str] = (),
    n_normalised: int | None = 0,
    max_tokens: int | None = None,
    out: str | Path | None = None,
    progress: bool | str = False,
) -> Comparison:
    """Do attention rankings agree with attribution rankings, and which are faithful?

    Args:
        model, examples, methods, task, target, of, baseline, units, special, options, custom, force, max_tokens, progress: see
            `interp.agreement.explain`.
        seeds: of the methods that draw; two at least, or there is no ceiling.
        measures, k: see `interp.agreement.pairwise_agreement`; all by default.
        rank_by: how rankings are compared: "abs", as Neely et al. (arXiv 2205.04559) do, or "signed". Faithfulness ranks by
            signed scores.
        n_normalised: on how many examples AOPC is normalised; none by default, as it asks for many inputs; `None`: all.
        out: a folder for the explanations, which a run that was killed goes on from.

    Returns:
        A `Comparison` of three results.

    Raises:
        InputError: see `explain` and `pairwise_agreement`.
    """
    coalitions = Coalitions(
        model,
        examples,
        task=task,
        target=target,
        of=of,
        baseline=baseline,
        units=units,
        special=special,
        max_tokens=max_tokens,
    )
    explanations = explain_coalitions(
        coalitions, methods, seeds=seeds, options=options, custom=custom, force=force, out=out, progress=progress
    )
    agreed = pairwise_agreement(
        explanations, tuple(MEASURES) if measures is None else measures, k=tuple(k), rank_by=rank_by
    )
    faithful = faithfulness_of(coalitions, explanations, n_normalised=n_normalised, progress=progress)
    return Comparison(explanations, agreed, faithful)
