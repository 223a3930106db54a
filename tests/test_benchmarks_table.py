"""The benchmark's rows: `met` follows from ratio and target, the file has the promised keys, the table shows every row.

And what computes in it: paired times, growth exponents.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks.table import KEYS, Row, merged, read_rows, render, write_rows
from benchmarks.timing import Times, growth_exponent, interleave, quickest, ratio_of


def row(**changes: Any) -> Row:
    given = {"suite": "neurons", "subject": "decoding", "name": "decode", "against": "products", "target": "<= 1.15"}
    return Row(**{**given, "ratio": 1.1, **changes})


@pytest.mark.parametrize(
    ("ratio", "target", "met"),
    [
        (1.15, "<= 1.15", True),
        (1.1501, "<= 1.15", False),
        (1.0, "< 1", False),
        (0.99, "< 1", True),
        (0.0, "<= 0", True),
        (None, "< 1", None),
        (float("nan"), "< 1", None),
        (float("inf"), "< 1", None),
        (0.5, None, None),
        (None, None, None),
    ],
)
def test_met_follows_from_ratio_and_target(ratio: float | None, target: str | None, met: bool | None) -> None:
    assert row(ratio=ratio, target=target).met is met


def test_a_target_that_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="faster"):
        row(target="faster")


def test_file_is_a_list_of_rows_with_the_promised_keys_first(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "bench.json"
    rows = [row(ours=2.34567, unit="s", more={"seconds": 1.23456}).as_dict(), row(ratio=float("nan")).as_dict()]
    write_rows(path, rows)
    read = json.loads(path.read_text(encoding="utf-8"))
    assert [tuple(entry)[: len(KEYS)] for entry in read] == [KEYS, KEYS]
    assert read == rows == read_rows(path)
    assert read[0]["ours"] == 2.346
    assert read[0]["more"] == {"seconds": 1.235}
    assert read[1]["ratio"] is None
    assert read[1]["met"] is None
    assert [file.name for file in path.parent.iterdir()] == ["bench.json"]


def test_a_file_that_is_not_ours_counts_as_empty(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    assert read_rows(path) == []
    for text in ("{", '{"rows": []}', '[{"suite": "neurons"}]'):
        path.write_text(text)
        assert read_rows(path) == []


def test_subjects_measured_again_replace_their_rows_and_leave_the_others() -> None:
    old = [row(subject="imports", suite="core").as_dict(), row(name="old").as_dict(), row(name="older").as_dict()]
    new = [row(name="new").as_dict()]
    assert [entry["name"] for entry in merged(old, new)] == ["decode", "new"]


def test_table_shows_figures_range_and_notes() -> None:
    good = row(ours=1234.5, theirs=0.5, unit="MiB", lowest=1.0, highest=1.2, n="2 layers", note="one note", quick=True)
    text = render([good.as_dict(), row(ratio=None, name="absent").as_dict(), row(ratio=2.0, name="slow").as_dict()])
    lines = {line.split("  ")[1].strip(): line for line in text.splitlines() if line.startswith("neurons")}
    assert "1,234 MiB" in lines["decode (quick)"]
    assert "1.000–1.200" in lines["decode (quick)"]
    assert lines["decode (quick)"].endswith("yes")
    assert lines["absent"].endswith("not measured")
    assert lines["slow"].endswith("NO")
    assert "2 layers; one note" in text


def test_a_figure_without_a_target_is_shown_and_judged_by_nothing() -> None:
    bare = row(name="long", against="–", ratio=None, target=None, ours=12.5, unit="s").as_dict()
    assert (bare["target"], bare["met"], bare["ratio"]) == (None, None, None)
    line = next(line for line in render([bare]).splitlines() if "long" in line)
    assert "12.50 s" in line
    assert line.split()[-3:] == ["–", "–", "–"]  # ratio, target, met; the range is empty


@pytest.mark.parametrize(
    ("value", "shown"), [(0.00412, "0.0041"), (0.0123, "0.012"), (0.0, "0.000"), (7.8e-5, "7.8e-05")]
)
def test_small_ratios_keep_two_digits(value: float, shown: str) -> None:
    line = next(line for line in render([row(ratio=value).as_dict()]).splitlines() if line.startswith("neurons"))
    assert shown in line.split()


def test_cases_run_in_turn_and_every_second_round_backwards() -> None:
    calls: list[str] = []
    times = interleave({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"  # warm-up first
    assert [len(times[name].wall) for name in "ab"] == [3, 3]


def test_ratio_is_the_median_of_the_pairs() -> None:
    figures = ratio_of(Times([1.0, 4.0, 3.0], [1.0, 1.0, 1.0]), Times([2.0, 2.0, 2.0], [1.0, 2.0, 4.0]))
    assert (figures["ratio"], figures["lowest"], figures["highest"], figures["repeats"]) == (1.5, 0.5, 2.0, 3)
    assert (figures["ours"], figures["theirs"], figures["unit"]) == (3.0, 2.0, "s")
    assert figures["more"] == {"ratio_of_processor_time": 0.5}


def test_growth_exponent_is_the_slope_of_the_largest_sizes() -> None:
    sizes = [1, 2, 4, 8, 16]
    assert growth_exponent(sizes, [5.0, 5.0, *(0.1 * size**2.5 for size in sizes[2:])]) == pytest.approx(2.5)
    assert growth_exponent(sizes[::-1], [0.1 * size**2.5 for size in sizes[:1:-1]] + [5.0, 5.0]) == pytest.approx(2.5)
    assert growth_exponent([8, 16], [1.0, 4.0]) == pytest.approx(2)
    assert math.isnan(growth_exponent([8], [1.0]))


def test_quickest_is_the_least_of_the_calls_and_calls_once_at_least() -> None:
    waits = iter([0.02, 0.002, 0.02])
    assert 0.002 <= quickest(lambda: time.sleep(next(waits)), seconds=10, most=3) < 0.02
    assert quickest(lambda: time.sleep(0.002), seconds=0) >= 0.002
