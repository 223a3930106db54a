"""`interp agreement`: one prediction explained by several methods, how far their rankings agree, which are faithful."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp.cli_agreement_output import print_json, print_tables, write_page
from interp.cli_shared import (
    DEFAULT_MODEL,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    SeedOption,
    load,
    save,
)
from interp.errors import InputError

if TYPE_CHECKING:
    from interp.agreement.tasks import Example, Task

# Quick ones of every kind: attention, attributions, baselines.
METHODS = (
    *("attention", "attention:-1", "rollout", "flow"),
    *("leave_one_out", "integrated_gradients", "kernel_shap"),
    *("random", "recency"),
)
TASKS = ("verbalizer", "next_token", "continuation", "classifier")


def agreement(
    text: Annotated[list[str] | None, typer.Option("--text", help="A text to explain; again for more.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help='More of them: a .txt, a text a line, or a .jsonl with "text" and maybe "label".'),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", help='A class and its label word, one token: "positive= positive"; again for every class.'
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", help='How a text is written before its label word; "{text} =>".')
    ] = None,
    instruction: Annotated[
        str | None, typer.Option("--instruction", help="What goes before all shots; only with --label.")
    ] = None,
    shot: Annotated[
        list[str] | None, typer.Option("--shot", help='An example that goes before: "positive=I loved it."; again.')
    ] = None,
    shots: Annotated[
        Path | None, typer.Option("--shots", help='The same from a .jsonl with "text" and "label".')
    ] = None,
    continuation: Annotated[
        list[str] | None,
        typer.Option("--continuation", help='Explain this continuation, such as " Paris"; one for every --text.'),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="verbalizer, continuation, next_token or classifier; default: what --label or --continuation says, "
            "else classifier for models with a classification head and next_token for others.",
        ),
    ] = None,
    target: Annotated[str, typer.Option("--target", help="log_prob, logit_difference or probability.")] = "log_prob",
    of: Annotated[str, typer.Option("--of", help="predicted or gold: which class is explained.")] = "predicted",
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            help="What replaces a token: mask, pad, zero, mean, a token, or a token id; default: mask, else pad.",
        ),
    ] = None,
    units: Annotated[str, typer.Option("--units", help="tokens or words.")] = "tokens",
    special: Annotated[bool, typer.Option("--special", help="Explain special tokens too.")] = False,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help=f"Again for more; default: {', '.join(METHODS)}."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="METHOD.NAME=VALUE, such as kernel_shap.n_samples=500; again for more."),
    ] = None,
    force: Annotated[
        list[str] | None,
        typer.Option("--force", help="A method to run although its completeness fails; again for more."),
    ] = None,
    draws: Annotated[
        int, typer.Option("--draws", help="Seeds of the methods that draw, from --seed on; one gives no ceiling.")
    ] = 2,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            "--measure", help="Of agreement; again for more; the first is shown. Default: all, kendall first."
        ),
    ] = None,
    k: Annotated[list[int] | None, typer.Option("--k", help="Top units of the measures at k; default: 3.")] = None,
    rank_by: Annotated[str, typer.Option("--rank-by", help="abs or signed: how rankings are compared.")] = "abs",
    normalised: Annotated[
        int, typer.Option("--normalised", help="On how many texts faithfulness is normalised; asks for many inputs.")
    ] = 0,
    top: Annotated[int, typer.Option("--top", help="Pairs of methods shown with their intervals.")] = 20,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Where to write a report with every figure (HTML).")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the three results, which an interrupted run resumes in."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Explain predictions by many methods; print how far they agree, by chance and at most, and which are faithful."""
    from interp.agreement import compare
    from interp.agreement.rankings import MEASURES
    from interp.model import set_seed

    methods, measures, top_units = list(dict.fromkeys(method or METHODS)), list(measure or MEASURES), list(k or [3])
    forced = list(dict.fromkeys(force or []))
    options = _check_methods(methods, forced, option or [])  # all of it before the model loads
    _check_choices(target, of, units, measures, top_units, rank_by, task)
    seeds = _seeds(seed, draws)
    if normalised < 0 or top < 1:
        raise InputError(f"--normalised {normalised} --top {top}; expected at least 0 and at least 1")
    if out is not None and (out.suffix == ".parquet" or out.is_file()):
        raise InputError(f"--out {out}; expected a folder: three results are written")
    prompt = {"template": template, "instruction": instruction, "shot": shot, "shots": shots}
    asked = _task(task, label or [], continuation or [], prompt)
    examples = _examples(text or [], file, continuation or [])
    set_seed(seed)
    loaded = load(model, device, dtype)
    with _without_warnings_of_refusals():
        comparison = compare(
            loaded,
            examples,
            methods,
            task=asked,
            target=target,
            of="gold" if continuation and task == "next_token" else of,
            baseline=_baseline(baseline),
            units=units,
            special=special,
            seeds=seeds,
            measures=measures,
            k=top_units,
            rank_by=rank_by,
            options=options,
            force=forced,
            n_normalised=normalised,
            out=None if out is None else out / "runs",
            progress=True,
        )
    if out is not None:
        for name, result in zip(comparison._fields, comparison, strict=True):
            save(result, out / f"{name}.parquet")
    shown = measures[0], top_units[0] if MEASURES[measures[0]].at_k else 0
    if plot is not None:
        print(f"wrote {write_page(comparison, *shown, plot)}", file=sys.stderr)
    if as_json:
        print_json(comparison)
    else:
        print_tables(comparison, *shown, top)


def _check_methods(methods: list[str], forced: list[str], given: list[str]) -> dict[str, dict[str, Any]]:
    """The methods' options, all of them known."""
    from interp.agreement.methods import check_options, method_named

    found = {name: method_named(name) for name in methods}
    for name in methods:
        _, colon, layer = name.partition(":")
        if colon and not layer.removeprefix("-").isdecimal():
            raise InputError(f"--method {name!r}; expected a layer's number behind the colon, such as attention:-1")
    if len(methods) < 2:
        raise InputError(f"--method {methods[0]} alone; agreement needs two methods: give --method again")
    unknown = [name for name in forced if name not in methods]
    if unknown:
        raise InputError(f"--force {unknown[0]!r} is not among the methods: {', '.join(methods)}")
    options: dict[str, dict[str, Any]] = {}
    for one in given:
        place, separator, value = one.partition("=")
        name, dot, key = place.rpartition(".")
        if not (separator and dot and name and key):
            raise InputError(f"--option {one!r}; expected METHOD.NAME=VALUE, such as kernel_shap.n_samples=500")
        options.setdefault(name, {})[key] = value
    check_options(found, options)
    return {
        name: {key: _number(name, key, value, found[name].run) for key, value in some.items()}
        for name, some in options.items()
    }


def _number(method: str, key: str, value: str, run: Any) -> int | float:
    """An option's value: a number with a fraction where the default is one, else a whole number."""
    import inspect

    kind = float if isinstance(inspect.signature(run).parameters[key].default, float) else int
    try:
        number = kind(value)
        if not 0 < number < float("inf"):
            raise ValueError
    except (ValueError, OverflowError):
        expected = "a whole number from 1 on" if kind is int else "a number above 0"
        raise InputError(f"--option {method}.{key}={value}; expected {expected}") from None
    return number


def _check_choices(
    target: str, of: str, units: str, measures: list[str], k: list[int], rank_by: str, task: str | None
) -> None:
    from interp.agreement.encoding import UNITS
    from interp.agreement.rankings import check_measure
    from interp.agreement.targets import check_target

    check_target(target, of)
    for name in measures:
        check_measure(name, 1, rank_by)
    for option, given, known in (("--units", units, UNITS), ("--task", task, TASKS)):
        if given is not None and given not in known:
            raise InputError(f"{option} {given!r}; expected one of {', '.join(known)}")
    if min(k) < 1:
        raise InputError(f"--k {min(k)}; expected a number of top units, at least 1")


def _seeds(seed: int, draws: int) -> range:
    if draws < 1 or not 0 <= seed <= 2**15 - draws:
        raise InputError(f"--seed {seed} --draws {draws}; expected seeds from 0 to {2**15 - 1}, and at least one")
    return range(seed, seed + draws)


def _task(task: str | None, labels: list[str], continuations: list[str], prompt: Mapping[str, Any]) -> Task | None:
    """What the model is asked; `None` leaves it to the model."""
    from interp.agreement import Classifier, Continuation, NextToken, Verbalizer

    implied = "verbalizer" if labels else "continuation" if continuations else None
    name = task or implied
    if labels and name != "verbalizer":
        raise InputError(f"--label is for --task verbalizer, and --task is {name}")
    if continuations and name not in ("continuation", "next_token"):
        raise InputError(f"--continuation is for --task continuation or next_token, and the task is {name}")
    if name == "verbalizer":
        return Verbalizer(_classes(labels), **_prompt(prompt))
    needless = [key for key, value in prompt.items() if value]
    if needless:
        raise InputError(f"--{needless[0]} goes with label words; give --label NAME=WORD for every class")
    return {"continuation": Continuation, "next_token": NextToken, "classifier": Classifier}[name]() if name else None


def _classes(labels: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in labels:
        name, separator, word = one.partition("=")
        if not (separator and name and word):
            raise InputError(f'--label {one!r}; expected NAME=WORD, such as "positive= positive"')
        if name in found:
            raise InputError(f"--label {one!r}; the class {name!r} was given before")
        found[name] = word
    if len(found) < 2:
        raise InputError(f"--label was given {len(found)} times; expected once for every class, at least twice")
    return found


def _prompt(given: Mapping[str, Any]) -> dict[str, Any]:
    """Template, instruction and shots of a `Verbalizer`, as far as they are given."""
    shots: list[tuple[str, str]] = []
    for one in given["shot"] or []:
        name, separator, text = one.partition("=")
        if not (separator and name and text):
            raise InputError(f'--shot {one!r}; expected CLASS=TEXT, such as "positive=I loved it."')
        shots.append((text, name))
    if given["shots"] is not None:
        for at, (text, label) in enumerate(_read("--shots", given["shots"])):
            if not isinstance(label, str):
                raise InputError(
                    f"--shots {given['shots']}: text {at} has the label {label!r}; expected a class's name"
                )
            shots.append((text, label))
    texts = {key: given[key] for key in ("template", "instruction") if given[key] is not None}
    return {"shots": tuple(shots), **texts}


def _examples(texts: list[str], file: Path | None, continuations: list[str]) -> list[Example]:
    from interp.agreement import Example

    empty = [at for at, one in enumerate(texts) if not one.strip()]
    if empty:
        raise InputError(f"--text {texts[empty[0]]!r}; expected at least one character that is not white space")
    labels: Sequence[str | None] = [None] * len(texts)
    if continuations:
        if len(continuations) != len(texts):
            raise InputError(
                f"--continuation was given {len(continuations)} times and --text {len(texts)} times; expected one for every "
                'text; those of --file are its "label"s, with --task continuation'
            )
        labels = continuations
    examples = [Example(one, label) for one, label in zip(texts, labels, strict=True)]
    if file is not None:
        examples += [Example(one, label) for one, label in _read("--file", file)]
    if not examples:
        raise InputError("there is nothing to explain; give --text TEXT, or --file FILE.jsonl or FILE.txt")
    return examples


def _read(option: str, path: Path) -> list[tuple[str, str | int | None]]:
    """(text, label or `None`) of every line that is not blank."""
    known = (".jsonl",) if option == "--shots" else (".jsonl", ".txt")
    if path.suffix not in known:
        raise InputError(f"{option} {path}; expected a file that ends in {' or '.join(known)}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{option} {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{option} {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not filled:
        raise InputError(f"{option} {path} has no line with a text")
    if path.suffix == ".txt":
        return [(line, None) for _, line in filled]
    return [_record(f"{option} {path}, line {number}", line) for number, line in filled]


def _record(where: str, line: str) -> tuple[str, str | int | None]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{where}; expected an object with a "text" that is not empty, such as {{"text": "A gem."}}')
    label = record.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise InputError(f"{where} has the label {label!r}; expected a text or a whole number")
    return text, label


def _baseline(given: str | None) -> str | int | None:
    return int(given) if given is not None and given.isdecimal() else given


@contextlib.contextmanager
def _without_warnings_of_refusals() -> Iterator[None]:
    """They are printed as a table."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* is left out: ")
        yield
