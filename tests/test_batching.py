"""Batches: every text once, the budget kept, memory errors survived."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp import batching
from interp.batching import check_memory, current_rows, for_each_batch, is_out_of_memory, pad, text_count, token_batches
from interp.errors import InputError, MemoryBudgetError

TEXTS = st.lists(st.lists(st.integers(0, 63), min_size=1, max_size=12), min_size=1, max_size=20)
SIDE = st.sampled_from(["left", "right"])
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    RuntimeError("MPS backend out of memory"),
    MemoryError(),
]


def check_batch(batch: Any, texts: list[list[int]], pad_id: int = 0) -> None:
    """A batch holds exactly its texts, padding on its side alone."""
    assert batch.input_ids.shape == batch.mask.shape == (batch.size, max(len(texts[row]) for row in batch.rows))
    assert batch.lengths.tolist() == [len(texts[row]) for row in batch.rows]
    for at, row in enumerate(batch.rows):
        real = batch.mask[at]
        assert batch.input_ids[at][real].tolist() == texts[row]
        assert (batch.input_ids[at][~real] == pad_id).all()
        assert batch.position_ids[at][real].tolist() == list(range(len(texts[row])))
        assert (batch.position_ids[at][~real] == 0).all()
        start = 0 if batch.side == "right" else len(real) - len(texts[row])
        assert real[start : start + len(texts[row])].all()
        assert int(batch.last[at]) == start + len(texts[row]) - 1


@given(TEXTS, st.integers(1, 40), SIDE)
@settings(deadline=None, max_examples=60)
def test_every_text_once_within_the_budget_longest_first(texts: list[list[int]], budget: int, side: str) -> None:
    batches = token_batches(texts, max_tokens=budget, pad_id=7, side=side)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(texts)))
    lengths = [len(texts[row]) for batch in batches for row in batch.rows]
    assert lengths == sorted(lengths, reverse=True)
    for batch in batches:
        check_batch(batch, texts, pad_id=7)
        assert batch.tokens <= budget or batch.size == 1
    for one, after in itertools.pairwise(batches):  # no batch could have taken one text more
        assert one.input_ids.shape[1] * (one.size + 1) > budget or after.size == 0


@given(TEXTS.filter(lambda texts: len(texts) > 1), SIDE, st.data())
@settings(deadline=None, max_examples=60)
def test_halves_and_take(texts: list[list[int]], side: str, data: Any) -> None:
    batch = pad(texts, range(len(texts)), 0, side)
    first, second = batch.halves()
    assert first.rows + second.rows == batch.rows
    assert first.size > 0
    assert second.size > 0
    for part in (batch, first, second):
        check_batch(part, texts)
    start = data.draw(st.integers(0, len(texts) - 1))
    some = batch.take(slice(start, data.draw(st.integers(start + 1, len(texts)))))
    check_batch(some, texts)
    check_batch(batch.to("cpu"), texts)


@given(TEXTS, st.integers(1, 60), st.data())
@settings(deadline=None, max_examples=50)
def test_memory_errors_at_random_steps_lose_and_repeat_nothing(texts: list[list[int]], budget: int, data: Any) -> None:
    done: Counter[int] = Counter()

    def step(batch: Any) -> None:
        assert current_rows.get() is batch.rows
        assert text_count.get() == len(texts)
        check_batch(batch, texts)
        if batch.size > 1 and data.draw(st.booleans()):
            raise data.draw(st.sampled_from(OUT_OF_MEMORY))
        done.update(batch.rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "free_memory", lambda: None)  # collecting garbage takes all the time here
        for_each_batch(token_batches(texts, max_tokens=budget), step)
    assert done == Counter(range(len(texts)))
    assert current_rows.get() is None
    assert text_count.get() is None


def test_the_size_that_fitted_is_learned() -> None:
    sizes: list[int] = []

    def step(batch: Any) -> None:
        sizes.append(batch.tokens)
        if batch.tokens > 10:
            raise MemoryError

    for_each_batch(token_batches([[1, 2]] * 64, max_tokens=32), step)
    assert [size for size in sizes if size > 10] == [32, 16]
    assert sum(size for size in sizes if size <= 10) == 128


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_one_text_that_does_not_fit_is_an_error_with_its_length(error: Exception) -> None:
    def step(batch: Any) -> None:
        if batch.input_ids.shape[1] == 9:
            raise error

    with pytest.raises(MemoryBudgetError, match="single text of 9 tokens") as caught:
        for_each_batch(token_batches([[1], [1] * 9, [1, 2]], max_tokens=27), step)
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, MemoryError)
    assert current_rows.get() is None


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape mismatch"), ValueError("out of memory"), MemoryBudgetError("told so"), KeyboardInterrupt()],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_propagate_at_once(error: BaseException) -> None:
    calls: list[Any] = []

    def step(batch: Any) -> None:
        calls.append(batch.rows)
        raise error

    with pytest.raises(type(error)) as caught:
        for_each_batch(token_batches([[1], [2], [3]], max_tokens=2), step)
    assert caught.value is error
    assert len(calls) == 1
    assert current_rows.get() is None
    assert text_count.get() is None


def test_a_failed_step_is_freed_before_the_next() -> None:
    """The error's traceback must not keep the failed step's tensors alive."""
    import weakref

    alive: list[Any] = []

    def step(batch: Any) -> None:
        assert all(reference() is None for reference in alive)
        large = torch.zeros(10)
        alive.append(weakref.ref(large))
        if batch.size > 1:
            raise MemoryError

    for_each_batch(token_batches([[1]] * 4), step)
    assert len(alive) == 6  # 4, then 2, then one by one


def test_nested_runs_restore_the_outer_rows() -> None:
    def inner(batch: Any) -> None:
        assert current_rows.get() is batch.rows

    def outer(batch: Any) -> None:
        for_each_batch(token_batches([[1], [2, 3]]), inner)
        assert current_rows.get() is batch.rows
        assert text_count.get() == 3

    for_each_batch(token_batches([[1], [2], [3]], max_tokens=1), outer)


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="side 'top'"):
        token_batches([[1]], side="top")
    with pytest.raises(InputError, match="max_tokens=0"):
        token_batches([[1]], max_tokens=0)
    with pytest.raises(InputError, match="no texts"):
        token_batches([])
    with pytest.raises(InputError, match="text 1 has no tokens"):
        token_batches([[1], []])


def test_is_out_of_memory_reads_the_real_cpu_error() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("index out of range"))


def test_progress_counts_texts(capsys: pytest.CaptureFixture[str]) -> None:
    for_each_batch(token_batches([[1], [2], [3]]), lambda batch: None, progress="reading")
    assert "reading" in capsys.readouterr().err
    for_each_batch(token_batches([[1]]), lambda batch: None)
    assert capsys.readouterr().err == ""


def test_check_memory_gives_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "available_memory", lambda device: 2 * 2**30)
    check_memory(2**30, "cpu", "a run")
    with pytest.raises(MemoryBudgetError, match=r"a run needs about 3.0 GiB on cpu, where 2.0 GiB"):
        check_memory(3 * 2**30, "cpu", "a run")
    monkeypatch.undo()
    assert batching.available_memory("cpu") > 0
