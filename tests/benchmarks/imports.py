"""`import interp` and `interp --help`: no torch, and well under a second.

Each is a fresh process, timed from its start to its end and in turn with a Python process that does nothing. Afterwards the
same code runs once more and lists the heavy packages that it has loaded.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

from tests.benchmarks.memory import ROOT
from tests.benchmarks.table import Row
from tests.benchmarks.timing import interleave

SUITE = "core"
HEAVY = (
    "torch",
    "transformers",
    "transformer_lens",
    "nnsight",
    "captum",
    "pandas",
    "numpy",
    "scipy",
    "plotly",
    "pyarrow",
)
_HELP = "import sys; sys.argv = ['interp', '--help']\nfrom interp.cli import main\nmain()"
_LIST = "\nimport json, sys\nprint('loaded:' + json.dumps([name for name in {heavy!r} if name in sys.modules]))"


def run(quick: bool) -> list[Row]:
    """Two rows per command: seconds, and heavy packages loaded."""
    rows = []
    for name, code in (("import interp", "import interp"), ("interp --help", _HELP)):
        about: dict[str, Any] = {"suite": SUITE, "subject": "imports", "quick": quick}
        if name == "interp --help" and importlib.util.find_spec("interp.cli") is None:
            rows.append(
                Row(**about, name=f"{name}: time", against="1 second", ratio=None, target="< 1", note="no interp.cli")
            )
            continue
        repeats = 3 if quick else 11
        times = interleave({"ours": lambda c=code: _python(c), "bare": lambda: _python("pass")}, repeats)
        ours, bare = times["ours"], times["bare"]
        rows.append(
            Row(
                **about,
                name=f"{name}: time",
                against="1 second",
                ratio=ours.median,
                target="< 1",
                lowest=min(ours.wall),
                highest=max(ours.wall),
                repeats=repeats,
                ours=ours.median,
                theirs=1.0,
                unit="s",
                note=f"whole process, Python's own start included, which alone takes {bare.median:.3f} s",
                more={"python_alone_seconds": bare.median, "times_python_alone": ours.median / bare.median},
            )
        )
        loaded = _loaded(code)
        heavy = [package for package in loaded if package in ("torch", "transformers")]
        rows.append(
            Row(
                **about,
                name=f"{name}: torch loaded",
                against="not at all",
                ratio=float(len(heavy)),
                target="<= 0",
                repeats=1,
                note=f"of {', '.join(HEAVY)} it loads: {', '.join(loaded) or 'none'}",
            )
        )
    return rows


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise RuntimeError(f"python -c ended with exit status {done.returncode}")
    return done.stdout


def _loaded(code: str) -> list[str]:
    guarded = f"try:\n exec({code!r})\nexcept SystemExit:\n pass" + _LIST.format(heavy=HEAVY)
    line = [line for line in _python(guarded).splitlines() if line.startswith("loaded:")][-1]
    return json.loads(line.removeprefix("loaded:"))
