"""Paired, interleaved timing: A B, B A, A B, … so that a machine that slows down or is shared hits both alike.

1. Every case runs once unmeasured.
2. Rounds: each runs every case once, every second round in reverse order.
3. The ratio is the median over rounds of ours / theirs within the round; lowest and highest are given with it.

Wall time decides. The processor time of the same calls (all threads) gives a second ratio, which other programs on the
machine disturb less.

How a time grows has no pair: `quickest` is the least of several calls, which others on the machine disturb least, and
`growth_exponent` the slope through the largest sizes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Times:
    """Seconds of each repeat of one case."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median wall time."""
        return statistics.median(self.wall)

    def add(self, call: Callable[[], Any]) -> Any:
        """Time one call."""
        processor, wall = time.process_time(), time.perf_counter()
        result = call()
        self.wall.append(time.perf_counter() - wall)
        self.processor.append(time.process_time() - processor)
        return result


def interleave(cases: Mapping[str, Callable[[], Any]], repeats: int, warm: bool = False) -> dict[str, Times]:
    """Time several calls in turn.

    Args:
        cases: name → call.
        repeats: rounds after the warm-up.
        warm: the cases have run already, on less work perhaps: no warm-up.
    """
    times = {name: Times() for name in cases}
    for call in () if warm else cases.values():
        call()
    for at in range(repeats):
        for name in list(cases)[:: 1 if at % 2 == 0 else -1]:
            times[name].add(cases[name])
    return times


def ratio_of(ours: Times, theirs: Times) -> dict[str, Any]:
    """What a `Row` says about two cases that were timed in turn."""
    ratios = [a / b for a, b in zip(ours.wall, theirs.wall, strict=True)]
    busy = [a / b for a, b in zip(ours.processor, theirs.processor, strict=True) if b > 0]
    return {
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "repeats": len(ratios),
        "ours": ours.median,
        "theirs": theirs.median,
        "unit": "s",
        "more": {"ratio_of_processor_time": statistics.median(busy)} if busy else None,
    }


def quickest(call: Callable[[], Any], seconds: float = 0.3, most: int = 1000) -> float:
    """Least wall time of the calls that fit into `seconds`: one at least, `most` at most."""
    times = Times()
    end = time.perf_counter() + seconds
    while not times.wall or (time.perf_counter() < end and len(times.wall) < most):
        times.add(call)
    return min(times.wall)


def growth_exponent(sizes: Sequence[float], times: Sequence[float], n: int = 3) -> float:
    """e of time ∝ size^e: the least-squares slope of the logarithms over the `n` largest sizes; NaN for one size."""
    pairs = sorted(zip(sizes, times, strict=True))[-n:]
    if len({size for size, _ in pairs}) < 2:
        return math.nan
    x, y = ([math.log(value) for value in column] for column in zip(*pairs, strict=True))
    return statistics.linear_regression(x, y).slope
