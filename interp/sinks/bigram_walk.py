"""The walk of Bigram-Backcopy on a CPU: the lookups of `bigram_backcopy`, compiled by numba.

On a CPU the loop over positions costs torch more for calling its operations than for doing them. Here it is one call; the random
numbers come from torch either way, so both ways give the same sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np
from numba import njit


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use, and keep what was compiled where that can be written."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no place for the cache
        return njit(nogil=True)(function)


@_compiled
@no_type_check  # what checks types in the tests would wrap the function, and numba cannot compile a wrapper
def walk(
    slots: np.ndarray, uniform: np.ndarray, threshold: np.ndarray, outcome: np.ndarray, beginning: int, characters: int
) -> np.ndarray:
    """States of every sequence.

    Args:
        slots: (step, sequence) int64, which slot of the state's alias table is drawn.
        uniform: (step, sequence) float32, whether the slot's own outcome is taken, or its alias.
        threshold: (state · character) float32.
        outcome: (state · character · 2) int64.
        beginning: the first state.
        characters: slots per state.

    Returns:
        (step, sequence) int64.
    """
    steps, sequences = slots.shape
    states = np.empty((steps, sequences), dtype=np.int64)
    state = np.full(sequences, beginning)
    for step in range(steps):
        for sequence in range(sequences):
            cell = state[sequence] * characters + slots[step, sequence]
            after = outcome[2 * cell + (uniform[step, sequence] >= threshold[cell])]
            state[sequence] = after
            states[step, sequence] = after
    return states
