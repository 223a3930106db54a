"""Top-k, Σ exp and Σ z·exp of logits as they come, a tile of the vocabulary at a time: compiled by numba, for the CPU.

As separate torch operations these cost nearly half of the matrix product before them, each going through memory by itself.
Here a tile of logits is read once, while it is still in the cache. Per block of its logits:

1. The largest and the smallest. Floats whose negative ones have their magnitude bits flipped sort as integers, and integer
   maxima are what the compiler turns into vector instructions.
2. exp(x) = 2^m · 2^f with m = round(x·log2 e) and |f| ≤ ½. 2^f by its Taylor polynomial of degree 6 (relative error below
   2e-7), as even + odd part, so that exp(−x) = 2^−m · (even − odd) comes for free; 2^m by writing m into a float's exponent.
   Sums are float32 within a block and float64 between blocks, whose exponents are brought together where they differ.

Only blocks whose maximum beats the k-th largest logit so far are searched, in order of id, so that ties go to the lower id.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_BLOCK = 128
_f, _i = np.float32, np.int32
_LOG2_E, _HALF, _LARGE = _f(1 / math.log(2)), _f(0.5), _f(70.0)  # e^70 is finite and e^−70 normal in float32
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = (_f(math.log(2) ** n / math.factorial(n)) for n in range(7))
_MAGNITUDE, _ONE, _LARGEST, _SMALLEST = _i(0x7FFFFFFF), _i(127 << 23), _i(2**31 - 1), _i(-(2**31))
_REORDER = {"reassoc", "contract", "nsz", "arcp"}  # sums in any order; NaN and infinity keep their meaning


def _compile(**options: Any) -> Any:
    """Compile on first use, and keep what was compiled beside the source or in the user's cache, if either can be written."""

    def decorate(function: Any) -> Any:
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:
            return njit(nogil=True, **options)(function)

    return decorate


def _reinterpret(to: Any, of: Any, kind: ir.Type) -> Any:
    """What takes a number's bits for a number of another type."""

    def typed(typingctx: Any, x: Any) -> Any:
        return to(of), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], kind)

    return intrinsic(typed)


_bits = _reinterpret(types.int32, types.float32, ir.IntType(32))
_float = _reinterpret(types.float32, types.int32, ir.FloatType())


@_compile()
def _extremes(z: Any) -> Any:
    high, low = _SMALLEST, _LARGEST
    for j in range(len(z)):
        bits = _bits(z[j])
        key = _i(bits ^ _i(_i(bits >> _i(31)) & _MAGNITUDE))
        high, low = max(high, key), min(low, key)
    return (
        _float(_i(high ^ _i(_i(high >> _i(31)) & _MAGNITUDE))),
        _float(_i(low ^ _i(_i(low >> _i(31)) & _MAGNITUDE))),
    )


@_compile(fastmath=_REORDER)
def _exp_sums(z: Any, shift: Any) -> Any:
    """Σ e^x, Σ x·e^x, Σ e^−x, Σ −x·e^−x of x = z − shift."""
    a = b = c = d = _f(0)
    for j in range(len(z)):
        x = z[j] - shift
        t = x * _LOG2_E
        m = np.floor(t + _HALF)
        exponent = _i(_i(min(max(_i(m), _i(-126)), _i(126))) << _i(23))
        f = t - m
        g = f * f
        even = _C0 + g * (_C2 + g * (_C4 + g * _C6))
        odd = f * (_C1 + g * (_C3 + g * _C5))
        plus = (even + odd) * _float(_i(_ONE + exponent))
        minus = (even - odd) * _float(_i(_ONE - exponent))
        a += plus
        b += x * plus
        c += minus
        d -= x * minus
    return a, b, c, d


@_compile()
def _add(state: Any, at: int, n: int, shift: float, total: float, dot: float) -> None:
    """Add Σ e^x and Σ x·e^x of x = z − shift to a state (shift, Σ, Σ) that may have another shift."""
    have = state[at, n, 0]
    if shift > have:
        change = math.exp(have - shift)
        state[at, n, 2] = (state[at, n, 2] + (have - shift) * state[at, n, 1]) * change if change > 0.0 else 0.0
        state[at, n, 1] *= change
        state[at, n, 0] = shift
    elif shift < have:
        change = math.exp(shift - have)
        dot = (dot + (shift - have) * total) * change if change > 0.0 else 0.0
        total *= change
    state[at, n, 1] += total
    state[at, n, 2] += dot


@_compile()
def _insert(values: Any, ids: Any, at: int, n: int, value: Any, new: int) -> None:
    """Into a descending list, behind what is equal; the last one drops out."""
    k = values.shape[2] - 1
    while k > 0 and values[at, n, k - 1] < value:
        values[at, n, k], ids[at, n, k] = values[at, n, k - 1], ids[at, n, k - 1]
        k -= 1
    values[at, n, k], ids[at, n, k] = value, new


@_compile()
def _add_tile(logits: Any, first: int, signs: Any, values: Any, ids: Any, state: Any) -> None:
    """Bring the running top-k and sums of some rows up to date with a tile of their logits."""
    vocab, last = logits.shape[1], values.shape[2] - 1
    n_blocks = (vocab + _BLOCK - 1) // _BLOCK
    extremes = np.empty((2, n_blocks), np.float32)
    for n in range(len(logits)):
        plus = plus_dot = minus = minus_dot = 0.0
        for block in range(n_blocks):
            z = logits[n, block * _BLOCK : min((block + 1) * _BLOCK, vocab)]
            high, low = _extremes(z)
            extremes[0, block], extremes[1, block] = high, -low
            if high < _LARGE and low > -_LARGE:
                a, b, c, d = _exp_sums(z, _f(0))
                plus, plus_dot, minus, minus_dot = plus + a, plus_dot + b, minus + c, minus_dot + d
                continue
            for at in range(len(signs)):
                if signs[at] == 1:
                    a, b, c, d = _exp_sums(z, high)
                    _add(state, at, n, high, a, b)
                else:
                    a, b, c, d = _exp_sums(z, low)
                    _add(state, at, n, -low, c, d)
        for at in range(len(signs)):
            if plus > 0.0:
                if signs[at] == 1:
                    _add(state, at, n, 0.0, plus, plus_dot)
                else:
                    _add(state, at, n, 0.0, minus, minus_dot)
            side, sign = (0 if signs[at] == 1 else 1), _f(signs[at])
            worst = values[at, n, last]
            for block in range(n_blocks):
                if extremes[side, block] > worst:
                    for j in range(block * _BLOCK, min((block + 1) * _BLOCK, vocab)):
                        if sign * logits[n, j] > worst:
                            _insert(values, ids, at, n, sign * logits[n, j], first + j)
                            worst = values[at, n, last]


class RunningTop:
    """Top-k, log-sum-exp and entropy of ± logits that arrive a tile of the vocabulary at a time.

    Args:
        n: rows.
        k: tokens kept, at most the vocabulary.
        signs: 1, −1 or both.
    """

    def __init__(self, n: int, k: int, signs: tuple[int, ...]) -> None:
        self.signs = np.array(signs, np.int32)
        self.values = np.full((len(signs), n, k), -np.inf, np.float32)  # signed logits, best first
        self.ids = np.zeros((len(signs), n, k), np.int64)
        self._state = np.zeros((len(signs), n, 3))
        self._state[:, :, 0] = -np.inf

    def add(self, logits: np.ndarray, first: int) -> None:
        """The next tile: (neuron, token) float32, finite, of the tokens from id `first` on."""
        _add_tile(logits, first, self.signs, self.values, self.ids, self._state)

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Log-sum-exp and entropy in nats, (sign, neuron) each, of all tiles so far."""
        shift, total, dot = np.moveaxis(self._state, 2, 0)
        log = np.log(total)
        return (shift + log).astype(np.float32), np.maximum(log - dot / total, 0).astype(np.float32)
