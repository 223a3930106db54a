"""Provenance reads a model by its attributes, holds no folder of this machine, and is JSON."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from interp.errors import InputError
from interp.provenance import Provenance, _command, _without_folders, as_json


def test_collect_reads_a_model_by_its_attributes() -> None:
    model = SimpleNamespace(name="/a/b/llama", fingerprint="abc", dtype="torch.bfloat16", device="cuda:0")
    got = Provenance.collect(model, seed=np.int64(3), parameters={"k": np.float32(0.5), "a": np.arange(2)}, wall_time=2)
    assert (got.model, got.fingerprint, got.dtype, got.attention, got.device) == (
        "llama",
        "abc",
        "bfloat16",
        None,
        "cuda:0",
    )
    assert got.parameters == {"k": 0.5, "a": [0, 1]}
    assert type(got.seed) is int
    assert got.versions["numpy"] == np.__version__
    assert got.created.endswith("+00:00")
    assert Provenance.from_json(got.to_json()) == got


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/home/someone/x.parquet", "x.parquet"),
        ("/home/some one/x y.parquet", "x y.parquet"),
        ("--out=/home/someone/x.parquet", "--out=x.parquet"),
        ("prose:/home/someone/p.txt", "prose:p.txt"),
        ("file:///home/someone/p.txt", "file:p.txt"),
        (r"C:\Users\someone\x.txt", "x.txt"),
        ("see /home/someone/x and /etc/y", "see x and y"),
        ("https://host/a/b", "https://host/a/b"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("out/x.parquet", "out/x.parquet"),
        ("1/2 yes/no a / b", "1/2 yes/no a / b"),
        ("/", "/"),
    ],
)
def test_no_folder_stays_in_an_argument(given: str, expected: str) -> None:
    assert _without_folders(given) == expected


def test_command() -> None:
    assert (
        _command(["/venv/bin/interp", "neurons", "two words", "--out=/tmp/x"]) == "interp neurons 'two words' --out=x"
    )
    assert _command(["/site-packages/interp/__main__.py", "x"]) == "-m interp x"
    assert _command([]) == "''"


def test_as_json() -> None:
    assert as_json({"p": Path("/a/b.txt"), "t": (1, {2, 1}), "n": np.float64(1.5)}, "x") == {
        "p": "b.txt",
        "t": [1, [1, 2]],
        "n": 1.5,
    }
    with pytest.raises(InputError, match=r"parameters\['a'\]\[1\]: a object"):
        as_json({"a": [1, object()]}, "parameters")
    with pytest.raises(InputError, match="keys must be strings"):
        as_json({1: 2}, "parameters")


def test_importing_results_is_light() -> None:
    code = (
        "import sys, interp.results, interp.shards, interp.report, interp.plotting\n"
        "interp.results.Provenance.collect()\n"
        "print([name for name in ('torch', 'pandas', 'pyarrow', 'plotly', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
