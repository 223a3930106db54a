"""`python -m tests.benchmarks`: measure, print the table, write reports/bench.json.

Subjects run one after the other and the file is written after each, so that an interrupted run keeps what it has. With
`--only` the other subjects' earlier rows stay in the file. The exit status is 1 if a subject failed to run, never because
a target was missed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from tests.benchmarks.memory import ROOT
from tests.benchmarks.table import merged, read_rows, render, write_rows

SUBJECTS = (
    "imports",
    "generation",
    "decoding",
    "activations",
    "checkpoint",
    "sink_scan",
    "bigram_generator",
    "flow_solvers",
    "flow_growth",
    "attributions",
    "conflict_runs",
)


def main() -> int:
    """Run what was asked for."""
    modules = {name: importlib.import_module(f"tests.benchmarks.{name}") for name in SUBJECTS}
    suites = sorted({module.SUITE for module in modules.values()})
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description="Speed and memory against other tools."
    )
    choices = [*suites, *SUBJECTS]
    parser.add_argument("--only", choices=choices, metavar="SUITE", help=f"a suite or a subject: {', '.join(choices)}")
    parser.add_argument("--quick", action="store_true", help="slices of the work: minutes less, and noisier")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "bench.json", help="default: reports/bench.json")
    given = parser.parse_args()
    chosen = [name for name, module in modules.items() if given.only in (None, name, module.SUITE)]
    rows: list[dict[str, Any]] = read_rows(given.out) if given.only else []
    failed, fresh = [], []
    environment = _environment()
    warnings.filterwarnings("ignore")
    for name in chosen:
        print(f"{name} …", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            measured = modules[name].run(given.quick)
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        fresh += [row.as_dict() | {"environment": environment} for row in measured]
        rows = merged(rows, fresh)
        write_rows(given.out, rows)
    print(environment)
    print("ratio = ours / theirs, so less is better; range = over the repeats (pairs measured in turn)\n")
    print(render(fresh))
    if failed:
        print(f"\nNOT MEASURED, failed to run: {', '.join(failed)}")
    return 1 if failed else 0


def _environment() -> str:
    import torch
    import transformers

    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads, {versions}"


if __name__ == "__main__":
    sys.exit(main())
