"""What the commands of `interp conflict` share: options that name pairs of prompts, and the pairs that they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp.errors import InputError

if TYPE_CHECKING:
    from interp.conflict.pairs import Pair

PairsOption = Annotated[int, typer.Option("--pairs", help="How many pairs of prompts, evenly over rules and wordings.")]
PartOption = Annotated[str, typer.Option("--part", help="Whose tasks: localisation, training, validation or held-out.")]
FamilyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--family", help="A family of rules (`interp conflict families`); again for more. Default: the part's."
    ),
]
WordingOption = Annotated[list[str] | None, typer.Option("--wording", help="simple or rich; both by default.")]
SettingOption = Annotated[
    str, typer.Option("--setting", help="Who contradicts the system: user, or peer, another agent of a dialogue.")
]
TasksOption = Annotated[
    Path | None, typer.Option("--tasks", help='Tasks of your own: a .jsonl with "id", "part" and "text".')
]
TemplateOption = Annotated[
    str | None,
    typer.Option("--template", help="chatml, plain, or a file with a Jinja chat template; default: the model's own."),
]


def make(
    n: int,
    part: str,
    families: list[str] | None,
    wordings: list[str] | None,
    setting: str,
    tasks: Path | None,
    seed: int,
) -> list[Pair]:
    """The pairs that the options name."""
    from interp.conflict.pairs import make_pairs
    from interp.conflict.wordings import WORDINGS, read_tasks

    return make_pairs(
        part,
        n,
        families=families,
        wordings=wordings or WORDINGS,
        setting=setting,
        tasks_from=None if tasks is None else read_tasks(tasks),
        seed=seed,
    )


def read_template(template: str | None) -> str | None:
    """A named template, or what stands in a file.

    Raises:
        InputError: neither.
    """
    from interp.conflict.dialogues import TEMPLATES

    if template is None or template in TEMPLATES:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--template {template!r}; expected {', '.join(TEMPLATES)} or a file: {error}") from error


def records(frame: Any) -> list[dict[str, Any]]:
    """Rows as JSON values."""
    return json.loads(frame.to_json(orient="records"))
