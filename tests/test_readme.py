"""The README's Python and shell examples run as they stand, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def test_there_are_examples() -> None:
    assert blocks("python")
    assert blocks("sh")


@pytest.mark.slow
def test_python_examples(tmp_path: Path) -> None:
    script = tmp_path / "examples.py"
    script.write_text("\n".join(blocks("python")))
    done = subprocess.run([sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # What a comment says a line prints, it prints.
    for line in re.findall(r"print\(.*\)\s+# (.+)$", script.read_text(), flags=re.MULTILINE):
        assert line in done.stdout


@pytest.mark.slow
def test_shell_examples(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for text in blocks("sh"):
        commands = "\n".join(line for line in text.splitlines() if line.startswith("interp "))
        done = subprocess.run(
            ["bash", "-euc", commands], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PATH": path}
        )
        assert done.returncode == 0, f"{commands}\n{done.stderr[-3000:]}"
