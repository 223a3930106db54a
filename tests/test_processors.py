"""Work shared out among processors: order, threads, exceptions, and torch's settings left as they were."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from interp.processors import one_processor_each


@pytest.mark.parametrize("n", [1, 2, 5])
def test_results_come_in_order_and_torch_is_left_as_it_was(n: int) -> None:
    before = torch.get_num_threads()

    def call(item: int) -> tuple[int, str]:
        time.sleep(0.002 * (item % 3))
        return item * item, threading.current_thread().name

    with one_processor_each(n) as processors:
        results = list(processors.map(call, range(20)))
    assert [value for value, _ in results] == [item * item for item in range(20)]
    assert len({name for _, name in results}) == n
    assert torch.get_num_threads() == before
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [before]


def test_torch_uses_one_thread_in_each() -> None:
    with one_processor_each(3) as processors:
        assert list(processors.map(lambda _: torch.get_num_threads(), range(6))) == [1] * 6


def test_an_exception_cancels_what_has_not_begun() -> None:
    done: list[int] = []

    def call(item: int) -> None:
        if item == 1:
            raise ValueError("no")
        time.sleep(0.01)
        done.append(item)

    with pytest.raises(ValueError, match="no"), one_processor_each(2) as processors:
        list(processors.map(call, range(200)))
    assert len(done) < 100


def test_an_interruption_at_the_start_leaves_nothing_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    before, submitted = torch.get_num_threads(), []
    submit = ThreadPoolExecutor.submit

    def interrupted(pool: ThreadPoolExecutor, *args: object) -> object:
        submitted.append(args)
        if len(submitted) == 2:
            raise KeyboardInterrupt
        return submit(pool, *args)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt), one_processor_each(3):
        raise AssertionError("not reached")
    assert torch.get_num_threads() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("interp")]
