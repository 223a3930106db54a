"""The report: items → blocks → one HTML file that opens offline.

1. Every item becomes blocks of HTML: a figure, a table, documentation, provenance. Text is escaped by the template,
   which first shows invisible and bidirectional characters, so that nothing in it can act.
2. A figure's JSON goes into a data block with <, > and & as \\u escapes: no string in it can end the block.
3. plotly.js goes in once. A Content-Security-Policy lets only our two scripts run, by their hashes, and forbids any
   connection, so that not even a gap in step 1 or 2 could run or send anything.

The bytes depend on the items alone.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from interp.atomic import write_atomically
from interp.errors import InputError
from interp.report.claims import Claim, claims_frame
from interp.results import Result, find_plot, table_html
from interp.tokens import visible

if TYPE_CHECKING:
    import jinja2
    import pandas as pd
    import plotly.graph_objects as go

_FOLDER = Path(__file__).parent
# plotly.js compiles shaders for these at run time, which the policy forbids; SVG draws the same picture.
_DRAWN_WITHOUT_EVAL = {"scattergl": "scatter", "scatterpolargl": "scatterpolar"}
_NOT_OFFLINE = frozenset({"splom", "parcoords", "choropleth", "scattergeo"})  # and every kind of map


@dataclass(frozen=True)
class Section:
    """Items under one heading.

    Attributes:
        title: the heading.
        text: plain text; an empty line starts a paragraph.
        items: results, figures or frames (`titled` gives a frame a heading).
        claims: shown as a table.
        caption: below the items.
    """

    title: str
    text: str = ""
    items: "Sequence[Result | go.Figure | pd.DataFrame]" = ()
    claims: Sequence[Claim] = ()
    caption: str = ""


@dataclass(frozen=True)
class _Block:
    """One item as the template wants it; HTML that is ready is Markup, everything else gets escaped."""

    title: str = ""
    figure: Markup | None = None
    height: int = 450
    table: Markup | None = None
    columns: Sequence[Any] = ()
    provenance: Sequence[tuple[str, str]] = ()


def write_report(
    items: "Sequence[Result | go.Figure | pd.DataFrame | Section]",
    path: str | os.PathLike[str],
    *,
    title: str = "Report",
    rows: int = 50,
) -> Path:
    """Writes one self-contained HTML file.

    Args:
        items: in order; a result comes with its figure, its first rows, its columns and its provenance.
        path: the file to make or replace.
        title: of the page.
        rows: of each table that are shown.

    Returns:
        The path.

    Raises:
        InputError: there are no items, or one is of another type.
        ResourceError: the file cannot be written; what was there stays.
    """
    if isinstance(items, str | bytes | Result | Section) or not isinstance(items, Sequence) or not items:
        raise InputError(f"a report needs a list of results, figures, frames or sections, got {type(items).__name__}")
    if not isinstance(rows, int) or rows < 1:
        raise InputError(f"rows must be a number from 1, got {rows!r}")
    sections: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        section = item if isinstance(item, Section) else Section("", items=(item,))
        blocks = [_block(entry, rows, f"item {index}") for entry in section.items]
        if isinstance(item, Section):
            heading = section.title
        else:  # the item's own title is the heading
            heading = blocks[0].title
            blocks = [replace(blocks[0], title="")]
        sections.append(
            {
                "title": heading or f"Part {index + 1}",
                "paragraphs": [part.splitlines() for part in re.split(r"\n\s*\n", section.text.strip()) if part],
                "blocks": blocks,
                "claims": list(zip(section.claims, claims_frame(section.claims).to_dict("records"), strict=True)),
                "caption": section.caption,
            }
        )
    drawn = any(block.figure for section in sections for block in section["blocks"])
    page = _page(title, sections, drawn)
    return write_atomically(path, lambda file: file.write(page.encode()))


def titled(frame: "pd.DataFrame", title: str) -> "pd.DataFrame":
    """The frame with a title, which stands above it in a report and where it is printed.

    Example:
        >>> import pandas as pd
        >>> titled(pd.DataFrame({"layer": [3]}), "Focal layers").attrs["title"]
        'Focal layers'
    """
    made = frame.copy()
    made.attrs["title"] = title
    return made


def _page(title: str, sections: list[dict[str, Any]], drawn: bool) -> str:
    scripts = [_plotly_js(), _script("draw.js")] if drawn else []
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts) or "'none'"
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
        "connect-src 'none'; form-action 'none'; base-uri 'none'"
    )
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            policy=policy,
            style=Markup(_script("style.css")),
            scripts=[Markup(script) for script in scripts],
            sections=sections,
        )
    )


def _block(item: object, rows: int, where: str) -> _Block:
    import pandas as pd
    import plotly.graph_objects as go

    if isinstance(item, Result):
        draw = find_plot(item.kind)
        try:
            figure = None if draw is None else draw(item)
        except Exception as error:
            error.add_note(f"while drawing {where} of the report, {item!r}")
            raise
        return _Block(
            title=item.kind + (f" · {item.provenance.model}" if item.provenance.model else ""),
            figure=None if figure is None else _figure_json(figure, where),
            height=_height(figure),
            table=Markup(table_html(item.frame, rows)),
            columns=item.columns,
            provenance=_provenance(item),
        )
    if isinstance(item, go.Figure):
        title = _plain(item.layout.title.text or "")
        return _Block(title=title, figure=_figure_json(item, where), height=_height(item))
    if isinstance(item, pd.DataFrame):
        return _Block(title=str(item.attrs.get("title", "")), table=Markup(table_html(item, rows)))
    expected = "a Result, a plotly Figure, a DataFrame or a Section"
    raise InputError(f"{where} of the report is a {type(item).__name__}; expected {expected}")


def _figure_json(figure: "go.Figure", where: str) -> Markup:
    """The figure as JSON that can stand in a script element."""
    import plotly.io

    content = json.loads(plotly.io.to_json(figure, validate=False, engine="json"))
    for trace in content["data"]:
        kind = trace.get("type", "scatter")
        if kind in _DRAWN_WITHOUT_EVAL:
            trace["type"] = _DRAWN_WITHOUT_EVAL[kind]
        elif kind in _NOT_OFFLINE or "map" in kind.removeprefix("heatmap").removeprefix("treemap"):
            raise InputError(f"{where} of the report has a {kind} trace, which cannot be drawn offline; choose another")
    text = json.dumps(content, separators=(",", ":"))  # ASCII: everything else is escaped already
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _height(figure: "go.Figure | None") -> int:
    return int(figure.layout.height) if figure is not None and figure.layout.height else 450


def _plain(label: str) -> str:
    """A plotly label without its markup, for a heading."""
    import html

    return html.unescape(re.sub(r"</?(?:a|b|br|em|i|s|span|strong|sub|sup|u)\b[^>]*>", " ", label)).strip()


def _provenance(result: Result) -> list[tuple[str, str]]:
    fields = result.provenance.to_json()
    parameters = [(name, json.dumps(value, ensure_ascii=False)) for name, value in fields.pop("parameters").items()]
    versions = ", ".join(f"{package} {version}" for package, version in fields.pop("versions").items())
    wall_time = f"{fields.pop('wall_time'):.3g} s"
    rows = [(name, str(value)) for name, value in fields.items() if value not in (None, "")]
    rows += [("wall time", wall_time)] + [(f"parameter {name}", value) for name, value in parameters]
    rows += [("versions", versions)] if versions else []
    sizes = [f"{name} ({len(json.dumps(value)):,} bytes)" for name, value in result.attachments.items()]
    return rows + ([("attachments", ", ".join(sizes))] if sizes else [])


@cache
def _plotly_js() -> str:
    import plotly.offline

    # The parser turns CRLF into LF before the policy's hash is checked.
    script = plotly.offline.get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")
    if re.search(r"</script|<!--", script, re.IGNORECASE):
        raise InputError("this version of plotly.js cannot stand inside a page; install another plotly")
    return script


def _script(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8").strip()


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _environment() -> "jinja2.Environment":
    import jinja2

    def shown(value: object) -> object:
        return value if isinstance(value, Markup) else visible(str(value), inner=False)

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        finalize=shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
