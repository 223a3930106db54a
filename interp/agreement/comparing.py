"""One call: explain examples by many methods, see how far the rankings agree, and which of them are faithful."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from interp.agreement.coalitions import Coalitions
from interp.agreement.explaining import Custom, explain_coalitions
from interp.agreement.pairs import pairwise_agreement
from interp.agreement.rankings import MEASURES, check_measure
from interp.agreement.removal import faithfulness_of
from interp.agreement.tasks import Task
from interp.errors import InputError
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

    def save(self, folder: str | Path) -> Path:
        """Writes explanations.parquet, agreement.parquet and faithfulness.parquet; `interp.load_result` reads each.

        Args:
            folder: new or existing.

        Returns:
            The folder.

        Raises:
            ResourceError: a file cannot be written.
        """
        for name, result in zip(self._fields, self, strict=True):
            result.save(Path(folder) / f"{name}.parquet")
        return Path(folder)

    def plot(self, **options: Any) -> Any:
        """Every two methods' agreement; see `interp.agreement.plots.pairwise_agreement`."""
        return self.agreement.plot(**options)


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
    k: int | Sequence[int] = (3,),
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
    measures = tuple(MEASURES) if measures is None else tuple(measures)
    top = [k] if isinstance(k, int) else list(k)
    for name in measures:
        for at in top or [0]:
            check_measure(name, at, rank_by)
    if methods is not None and len({methods} if isinstance(methods, str) else set(methods)) + len(custom or {}) < 2:
        raise InputError(
            f"methods={methods!r}; expected at least two to compare; interp.agreement.explain runs one alone"
        )
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
    agreed = pairwise_agreement(explanations, measures, k=top, rank_by=rank_by)
    faithful = faithfulness_of(coalitions, explanations, n_normalised=n_normalised, progress=progress)
    return Comparison(explanations, agreed, faithful)
