"""Sequences of the Bigram-Backcopy task: against Python loops that draw a character at a time.

*Loop*: numpy's `Generator.choice` with the character's law, one call per character: a direct reading of the task, and what the
public code does. *Bisection*: the quickest plain Python that we found, `bisect` on cumulative sums made beforehand and one
`random.random()` per character. Ours makes 512 sequences of 257 tokens, a training step of the paper's; the loops make fewer
and are compared by time per character. All on one thread.
"""

from __future__ import annotations

import bisect
import random
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from tests.benchmarks.table import Row
from tests.benchmarks.timing import Times, interleave, ratio_of

SUITE = "sinks"


def run(quick: bool) -> list[Row]:
    """Time per character, against both loops."""
    from interp.sinks.bigram_backcopy import BigramBackcopy

    task = BigramBackcopy()
    batch, length, repeats = (512, 257, 3) if quick else (512, 257, 7)
    loops = {"choice": 4, "bisection": 40}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = interleave(
        {
            "ours": lambda: task.sample(batch, length),
            "choice": lambda: by_choice(task, loops["choice"], length),
            "bisection": lambda: by_bisection(task, loops["bisection"], length),
        },
        repeats,
    )
    torch.set_num_threads(threads)
    ours = _per_character(times["ours"], batch * length)
    about: dict[str, Any] = {"suite": SUITE, "subject": "bigram_generator", "quick": quick}
    work = f"{batch} × {length} tokens at once"
    return [
        Row(
            **about,
            **(
                ratio_of(ours, _per_character(times["choice"], loops["choice"] * length)) | {"unit": "µs per character"}
            ),
            name="Bigram-Backcopy sequences",
            against="Python loop per character",
            target="<= 0.02",
            n=work,
            note="the loop draws with numpy's Generator.choice",
        ),
        Row(
            **about,
            **(
                ratio_of(ours, _per_character(times["bisection"], loops["bisection"] * length))
                | {"unit": "µs per character"}
            ),
            name="Bigram-Backcopy sequences",
            against="quickest Python loop",
            target="< 1",
            n=work,
            note="the loop bisects cumulative sums that were made beforehand",
        ),
    ]


def by_choice(task: Any, n: int, length: int) -> list[list[int]]:
    """The task as it is stated."""
    generator = np.random.default_rng(0)
    triggers, first, laws = set(task.triggers), task._first, task._bigram
    sequences = []
    for _ in range(n):
        tokens = [task.start_token, int(generator.choice(len(first), p=first))]
        while len(tokens) < length:
            here = tokens[-1]
            tokens.append(tokens[-2] if here in triggers else int(generator.choice(len(first), p=laws[here])))
        sequences.append(tokens)
    return sequences


def by_bisection(task: Any, n: int, length: int) -> list[list[int]]:
    """The same with everything made beforehand that can be."""
    triggers = set(task.triggers)
    first, *laws = ([*accumulate(law)] for law in (task._first, *task._bigram))
    draw, last = random.Random(0).random, len(first) - 1
    sequences = []
    for _ in range(n):
        before, here = task.start_token, min(last, bisect.bisect(first, draw()))
        tokens = [before, here]
        for _ in range(length - 2):
            before, here = here, before if here in triggers else min(last, bisect.bisect(laws[here], draw()))
            tokens.append(here)
        sequences.append(tokens)
    return sequences


def _per_character(times: Times, characters: int) -> Times:
    """Seconds → microseconds per character."""
    return Times([one / characters * 1e6 for one in times.wall], [one / characters * 1e6 for one in times.processor])
