"""Peak memory of one call, in a fresh process.

1. A child process loads model and inputs and warms the call's libraries up on a little work.
2. It gives freed memory back to the system, resets the peak that the kernel keeps, and notes the resident memory: the
   baseline.
3. It runs the call once. *Extra peak memory* = peak resident memory during the call − baseline: everything that the call
   needed on top of model and inputs, its result included. *Peak of the process* is the largest resident memory since the
   process started: Python, torch, everything; pages of memory-mapped files count while they are resident.

The kernel's figures are VmHWM and VmRSS. On systems without /proc the peak cannot be reset and the largest resident
size since the start stands for both, which makes the extra peak too large, never too small.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
_MARK = "peak-memory:"
_STATUS = Path("/proc/self/status")


def measure(module: str, case: str, **parameters: Any) -> dict[str, Any]:
    """Run one case in a fresh process.

    Args:
        module: a module of this package that has a function `case`.
        case: takes the parameters, prepares, and returns the call to be measured. What the call returns, if it is a
            dict, is handed back under "said".
        parameters: plain values.

    Returns:
        baseline, extra, process (bytes), and with /proc the anonymous and file-mapped parts of the process's peak,
        sampled.
    """
    command = [sys.executable, "-m", f"{__package__}.memory", module, case, json.dumps(parameters)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not lines:
        sys.stderr.write(done.stderr)
        raise RuntimeError(f"{module}.{case} ended with exit status {done.returncode}")
    return json.loads(lines[-1].removeprefix(_MARK))


def child(module: str, case: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """What the fresh process does."""
    call: Callable[[], Any] = getattr(importlib.import_module(f"{__package__}.{module}"), case)(**parameters)
    before = resident()["peak"]
    _settle()
    baseline = resident()["now"]
    with _Sampler() as sampler:
        said = call()
    peak = resident()["peak"]
    figures: dict[str, Any] = {"baseline": baseline, "extra": peak - baseline, "process": max(peak, before)}
    figures |= {"anonymous": sampler.highest.get("anonymous"), "mapped": sampler.highest.get("mapped")}
    return figures | ({"said": said} if isinstance(said, dict) else {})


def resident() -> dict[str, int]:
    """Resident memory of this process in bytes: now, peak, and with /proc its anonymous and file-mapped parts."""
    if not _STATUS.exists():
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        import psutil

        return {"now": psutil.Process().memory_info().rss, "peak": peak}
    names = {"VmRSS": "now", "VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "mapped"}
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return {ours: int(fields[theirs].split()[0]) * 1024 for theirs, ours in names.items()}


def _settle() -> None:
    """Give freed memory back and reset the kernel's peak, so that loading the model hides nothing."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class _Sampler:
    """Looks at the parts of resident memory every 20 ms: the kernel keeps a peak of their sum alone."""

    def __init__(self) -> None:
        self.highest: dict[str, int] = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            seen = resident()
            if seen["now"] > self.highest["now"]:
                self.highest = seen

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


if __name__ == "__main__":
    print(_MARK + json.dumps(child(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
