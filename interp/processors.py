"""Work shared out among a CPU's processors, each with torch operations on one thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Processors:
    """n processors, and a `map` that shares calls out among them; its results come in order."""

    n: int
    _map: Callable[..., Iterator[Any]]

    def map(self, call: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        """One call per item. An exception, also Ctrl-C, waits for the calls that run and cancels the rest."""
        return self._map(call, items)


@contextlib.contextmanager
def one_processor_each(n: int) -> Iterator[Processors]:
    """Threads for calls whose torch operations are to use one processor each; with n = 1 the calls run here.

    Where calls go through several operations on the same data, this is faster than all processors on each operation: they
    need not wait for each other, and the data stay in a processor's own cache.

    Example:
        >>> with one_processor_each(2) as processors:
        ...     list(processors.map(abs, [-1, 2, -3]))
        [1, 2, 3]
    """
    if n == 1:
        yield Processors(1, map)
        return
    ready = threading.Barrier(n + 1)

    def start() -> None:
        torch.set_num_threads(1)
        ready.wait()

    before = torch.get_num_threads()
    with ThreadPoolExecutor(n, "interp", initializer=start) as pool:
        try:
            for _ in range(n):
                pool.submit(int)
            ready.wait()
        except BaseException:
            ready.abort()  # or the threads that have started would wait for ever
            raise
        finally:
            torch.set_num_threads(before)  # the number set last is also what threads to come start with
        yield Processors(n, pool.map)
