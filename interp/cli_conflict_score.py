"""`interp conflict score`: grade answers by CRAS, with one judge or several."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from interp.errors import InputError, InterpError, ResourceError

if TYPE_CHECKING:
    import pandas as pd

    from interp.results import Result

# What messages of the Python functions advise, as options.
_AS_OPTION = {
    "out_of_range='drop'": "--out-of-range drop",
    "key_env=None": "--key-env none",
    "name that as key_env": "name that with --key-env",
    "base_url=": "--base-url ",
    "base_url holds": "--base-url holds",
    "rubric='template'": "--rubric template",
}
# The rubric of a judge that is not told which; scores by another one are kept beside these.
_OWN_RUBRIC = {"local": "template", "api": "written"}


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
            help="The judge's model: for api its name on the server; without api the same as --local-model.",
        ),
    ] = None,
    local_model: Annotated[
        str | None,
        typer.Option(
            "--local-model",
            help="The local judge's model: a name, folder or .gguf file. Default: --model, which answers.",
        ),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option("--base-url", help="Of an OpenAI-compatible server, for --judge api.")
    ] = None,
    key_env: Annotated[
        str,
        typer.Option("--key-env", help="Environment variable with the server's key; none for a server without keys."),
    ] = "OPENAI_API_KEY",
    rubric: Annotated[
        str | None,
        typer.Option(
            "--rubric",
            help="What 1 to 5 mean: template, a fixed text, or written by the judge for each role and task. "
            "Default: template for local, written for api.",
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight",
            help="DIMENSION=λ, such as constraint_compliance=0.4; they sum to 1. With the same --out nothing is asked again.",
        ),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by",
            help="A column to group by: family, system_rule, user_rule, prompt, setting, wording or model; again for more. "
            "Default: prompt.",
        ),
    ] = None,
    out_of_range: Annotated[
        str,
        typer.Option(
            "--out-of-range",
            help="Where a judge's score is unreadable or not from 1 to 5: refuse to average that judge (the other judges are "
            "printed, then the command fails), or drop the answers concerned. With the same --out nothing is asked again.",
        ),
    ] = "refuse",
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
    from interp.conflict import cras, follow, queries_from_follow
    from interp.results import load_result

    names = judge or ["rule"]
    unknown = [name for name in names if name not in ("rule", "local", "api")]
    if unknown or len(set(names)) < len(names):
        raise InputError(f"--judge {', '.join(names)}; expected rule, local or api, each at most once")
    if "api" in names:
        check_api(base_url, judge_model)
    source = local_source(names, judge_model, local_model)
    check_rubric(rubric, names)
    if out_of_range not in ("refuse", "drop"):
        raise InputError(f"--out-of-range {out_of_range!r}; expected refuse or drop")
    weights, columns = read_weights(weight), read_columns(by)
    prompts = ("system", "agree", "conflict")
    read = read_template(template)
    with keeping(out) as folder:
        # What can be wrong with a server's judge is said before a model is loaded.
        made = {name: make_judge(name, judge_model, base_url, key_env, rubric, folder) for name in names}
        if answers is not None:
            from interp.conflict.answers import pairs_of

            check_unused(context, ("pairs", "part", "family", "wording", "setting", "template", "seed"))
            answered = load_result(answers)
            asked = pairs_of(answered, None if tasks is None else tasks)
        else:
            asked = make(pairs, part, family, wording, setting, tasks, seed)
        loaded = load(model, device, dtype) if answers is None or ("local" in names and source is None) else None
        if "local" in names:
            judging = loaded if source is None else load(source, device, dtype)
            made["local"] = make_local_judge(judging, rubric)
        if answers is None:
            answered = follow(loaded, asked, prompts, template=read, out=folder / "answers")
        here = [name for name in prompts if name in set(answered.frame["prompt"].astype(str))]
        queries = queries_from_follow(answered, asked, prompts=here)
        results = []
        for name in names:
            own = rubric is None or rubric == _OWN_RUBRIC.get(name, rubric)
            place = f"scores-{name}" if own else f"scores-{name}-{rubric}"
            # Without weights: they are of the tables, and scores of one folder serve all weights.
            results.append(cras(made[name], queries, out=folder / place))
        averaged, table, refused = summarise(results, columns, weights, out_of_range)
        agreed = agreement(averaged, weights, out_of_range)
        if table is not None and as_json:
            found = {"scores": records(table)} | ({} if agreed is None else {"agreement": records(agreed)})
            print(json.dumps(found))
        elif table is not None:
            show(table)
            if agreed is not None:
                show(agreed)
        if refused:
            raise InputError(refused)


@contextmanager
def keeping(out: Path | None) -> Iterator[Path]:
    """The folder of a run: --out, or one of our own that goes when all is well and stays where something would be lost.

    Raises:
        ResourceError: there is no place for a folder.
        InterpError: what went wrong inside, with advice as options, and with the folder that keeps what was made.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="interp-score-")) if out is None else out
    except OSError as error:
        raise ResourceError(f"no folder for answers and scores: {error}; name one with --out") from error
    kept = False
    try:
        yield folder
    except BaseException as error:
        kept = out is None and any(
            path.suffix in (".parquet", ".json") and path.name != "manifest.json" for path in folder.rglob("*")
        )
        note = f"Give --out {folder} to go on from what was answered and graded"
        if isinstance(error, InterpError):
            from interp.conflict.adherence import GO_ON

            message = str(error)
            if out is None:  # the same again would begin anew
                message = message.replace(GO_ON, "")
            for given, option in _AS_OPTION.items():
                message = message.replace(given, option)
            error.args = (f"{message}. {note}" if kept else message,)
        elif kept:
            print(f"interp: {note}", file=sys.stderr)
        raise
    finally:
        if out is None and not kept:
            shutil.rmtree(folder, ignore_errors=True)


def make_judge(
    name: str, judge_model: str | None, base_url: str | None, key_env: str, rubric: str | None, folder: Path
) -> Any:
    """The judge that the options name; `None` for the local one, which waits for a model."""
    if name == "rule":
        from interp.conflict import RuleJudge

        return RuleJudge()
    if name == "local":
        return None
    from interp.conflict import ApiJudge

    return ApiJudge(
        base_url,
        judge_model,
        key_env=None if key_env == "none" else key_env,
        rubric=rubric or _OWN_RUBRIC[name],
        cache=folder / "replies",
    )


def make_local_judge(model: Any, rubric: str | None) -> Any:
    """The judge that is a model."""
    from interp.conflict import LocalJudge

    return LocalJudge(model, rubric=rubric or _OWN_RUBRIC["local"])


def summarise(
    results: Sequence[Result], by: Sequence[str], weights: Mapping[str, float] | None, out_of_range: str
) -> tuple[list[Result], pd.DataFrame | None, str]:
    """CRAS of every judge that can be averaged.

    Returns:
        (their results, their table if there are any, why the others are refused and how many scores are kept).
    """
    import pandas as pd

    from interp.conflict import cras_summary

    averaged, tables, errors = [], [], []
    for result in results:
        try:
            tables.append(cras_summary(result, by=by, weights=weights, out_of_range=out_of_range))
            averaged.append(result)
        except InputError as error:
            errors.append(str(error))
    if errors:
        n = sum(len(result.frame) for result in results)
        errors.append(f"All {n} scores are kept, and no judge is asked for them again")
    return averaged, pd.concat(tables, ignore_index=True) if tables else None, ". ".join(errors)


def agreement(results: Sequence[Result], weights: Mapping[str, float] | None, out_of_range: str) -> pd.DataFrame | None:
    """How far every two judges agree; without the pairs of which that cannot be said, and why on stderr."""
    import pandas as pd

    from interp.conflict import compare_judges

    tables = []
    for two in combinations(results, 2):
        try:
            tables.append(compare_judges(two, weights=weights, out_of_range=out_of_range))
        except InputError as error:
            print(f"no agreement: {error}", file=sys.stderr)
    return pd.concat(tables, ignore_index=True) if tables else None


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
    if not base_url or not (judge_model or "").strip():
        raise InputError("--judge api needs --base-url, such as http://localhost:8000/v1, and --judge-model")


def local_source(names: Sequence[str], judge_model: str | None, local_model: str | None) -> str | None:
    """What the local judge is loaded from; `None` for the model that answers. With a server --judge-model is the server's.

    Raises:
        InputError: a model for a local judge that is not asked, or two models for it.
    """
    if local_model is not None and "local" not in names:
        raise InputError("--local-model is the model of --judge local; add that, or leave it out")
    if "api" in names or judge_model is None:
        return local_model
    if local_model is not None:
        raise InputError("--judge-model and --local-model both name the local judge's model; give one of the two")
    return judge_model


def check_rubric(rubric: str | None, names: Sequence[str]) -> None:
    """Refuses a rubric that no judge can use.

    Raises:
        InputError: it is unknown, or the rule judge is alone.
    """
    if rubric not in (None, "template", "written"):
        raise InputError(f"--rubric {rubric!r}; expected template or written")
    if rubric is not None and not set(names) & set(_OWN_RUBRIC):
        raise InputError("--rubric is not used by --judge rule, whose rubric is its rules; leave it out")


def read_columns(given: list[str] | None) -> list[str]:
    """The columns to group by.

    Raises:
        InputError: an unknown one.
    """
    from interp.conflict.cras_summaries import FACTS

    unknown = [name for name in given or () if name not in FACTS]
    if unknown:
        raise InputError(f"--by {unknown[0]!r}; expected some of {', '.join(FACTS)}")
    return list(dict.fromkeys(given or ["prompt"]))


def read_weights(given: list[str] | None) -> dict[str, float] | None:
    """DIMENSION=λ options as a mapping.

    Raises:
        InputError: not of that form, or no weights of dimensions.
    """
    from interp.conflict.cras_summaries import check_weights

    if not given:
        return None
    weights = {}
    for entry in given:
        name, _, number = entry.partition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            raise InputError(f"--weight {entry!r}; expected DIMENSION=λ, such as constraint_compliance=0.4") from None
    try:
        check_weights(weights)
    except InputError as error:
        raise InputError(f"--weight: {error}") from None
    return weights
