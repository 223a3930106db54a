"""`interp conflict score`: grade answers by CRAS, with one judge or several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli_conflict_shared import (
    FamilyOption,
    PairsOption,
    PartOption,
    SettingOption,
    TasksOption,
    TemplateOption,
    WordingOption,
    make,
    read_template,
    records,
)
from interp.cli_shared import DEFAULT_MODEL, DeviceOption, DtypeOption, JsonOption, ModelOption, SeedOption, load, show
from interp.errors import InputError


def conflict_score(
    context: typer.Context,
    answers: Annotated[
        Path | None,
        typer.Option(
            "--answers", help="What `interp conflict follow --out` wrote; without it the answers are made here."
        ),
    ] = None,
    judge: Annotated[
        list[str] | None, typer.Option("--judge", help="rule, local or api; again for more, and for their agreement.")
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option(
            "--judge-model",
            help="The judging model: for local a name, folder or .gguf file, by default --model; for api a name.",
        ),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option("--base-url", help="Of an OpenAI-compatible server, for --judge api.")
    ] = None,
    key_env: Annotated[
        str, typer.Option("--key-env", help="Environment variable with the server's key.")
    ] = "OPENAI_API_KEY",
    weight: Annotated[
        list[str] | None,
        typer.Option("--weight", help="DIMENSION=λ, such as constraint_compliance=0.4; they sum to 1."),
    ] = None,
    by: Annotated[list[str] | None, typer.Option("--by", help="Columns to group by; default: prompt.")] = None,
    pairs: PairsOption = 24,
    part: PartOption = "held-out",
    family: FamilyOption = None,
    wording: WordingOption = None,
    setting: SettingOption = "user",
    tasks: TasksOption = None,
    template: TemplateOption = None,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="A folder for answers and scores; an interrupted run resumes there.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Grade answers by CRAS (goal, role, knowledge boundary, constraint; 1 to 5), with one judge or several."""
    import pandas as pd

    from interp.conflict import compare_judges, cras, cras_summary, follow, queries_from_follow
    from interp.results import load_result

    names = judge or ["rule"]
    unknown = [name for name in names if name not in ("rule", "local", "api")]
    if unknown or len(set(names)) < len(names):
        raise InputError(f"--judge {', '.join(names)}; expected rule, local or api, each at most once")
    weights = read_weights(weight)
    prompts = ("system", "agree", "conflict")
    if "api" in names:
        check_api(base_url, judge_model)
    if answers is not None:
        from interp.conflict.answers import pairs_of

        check_unused(context, ("pairs", "part", "family", "wording", "setting", "template", "seed"))
        answered = load_result(answers)
        asked = pairs_of(answered, None if tasks is None else tasks)
    else:
        asked = make(pairs, part, family, wording, setting, tasks, seed)
    loaded = load(model, device, dtype) if answers is None or ("local" in names and judge_model is None) else None
    if answers is None:
        place = None if out is None else out / "answers"
        answered = follow(loaded, asked, prompts, template=read_template(template), out=place)
    here = [name for name in prompts if name in set(answered.frame["prompt"].astype(str))]
    queries = queries_from_follow(answered, asked, prompts=here)
    results = []
    for name in names:
        made = make_judge(name, loaded, judge_model, base_url, key_env, device, dtype, out)
        results.append(cras(made, queries, weights=weights, out=None if out is None else out / f"scores-{name}"))
    table = pd.concat([cras_summary(result, by=by or ("prompt",)) for result in results], ignore_index=True)
    agreed = compare_judges(results) if len(results) > 1 else None
    if as_json:
        found = {"scores": records(table)} | ({} if agreed is None else {"agreement": records(agreed)})
        print(json.dumps(found))
        return
    show(table)
    if agreed is not None:
        show(agreed)


def make_judge(
    name: str,
    loaded: Any,
    judge_model: str | None,
    base_url: str | None,
    key_env: str,
    device: str | None,
    dtype: str | None,
    out: Path | None,
) -> Any:
    """The judge that the options name."""
    if name == "rule":
        from interp.conflict import RuleJudge

        return RuleJudge()
    if name == "local":
        from interp.conflict import LocalJudge

        return LocalJudge(loaded if judge_model is None else load(judge_model, device, dtype))
    from interp.conflict import ApiJudge

    return ApiJudge(base_url, judge_model, key_env=key_env, cache=None if out is None else out / "replies")


def check_unused(context: typer.Context, names: Sequence[str]) -> None:
    """Refuses options that say which answers to make, where the answers are given.

    Raises:
        InputError: it names them.
    """
    given = [f"--{name}" for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if given:
        raise InputError(f"{', '.join(given)} choose what is answered here; leave them out with --answers")


def check_api(base_url: str | None, judge_model: str | None) -> None:
    """Refuses an API judge without an address or a model.

    Raises:
        InputError: it says what to add.
    """
    if not base_url or not judge_model:
        raise InputError("--judge api needs --base-url, such as http://localhost:8000/v1, and --judge-model")


def read_weights(given: list[str] | None) -> dict[str, float] | None:
    """DIMENSION=λ options as a mapping.

    Raises:
        InputError: not of that form.
    """
    if not given:
        return None
    weights = {}
    for entry in given:
        name, _, number = entry.partition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            raise InputError(f"--weight {entry!r}; expected DIMENSION=λ, such as constraint_compliance=0.4") from None
    return weights
