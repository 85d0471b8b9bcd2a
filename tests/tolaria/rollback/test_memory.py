"""Memory to read an image into."""

from __future__ import annotations

import errno
import mmap

import pytest
import torch

from tolaria.rollback.memory import FreshMemory

PAGE_BYTES = mmap.PAGESIZE


@pytest.mark.parametrize("size_bytes", [0, 1, PAGE_BYTES - 1, PAGE_BYTES, 3 * PAGE_BYTES + 1])
def test_it_has_the_size_and_takes_bytes_to_the_last(size_bytes: int) -> None:
    """Whether its pages were asked for or not."""
    memory = FreshMemory(size_bytes)
    memory.provide(0, size_bytes // 2)
    memory.tensor.fill_(7)
    assert memory.tensor.shape == (size_bytes,)
    assert int(memory.tensor.sum(dtype=torch.int64)) == 7 * size_bytes


def test_asking_for_pages_changes_no_byte() -> None:
    """What was written stays, also when its page is asked for once more."""
    memory = FreshMemory(2 * PAGE_BYTES)
    memory.tensor.fill_(3)
    memory.provide(0, 2 * PAGE_BYTES)
    assert set(memory.tensor.tolist()) == {3}


def test_a_view_keeps_the_memory() -> None:
    """Whoever holds a part of it may go on reading when the whole is forgotten."""
    memory = FreshMemory(PAGE_BYTES)
    part = memory.tensor.fill_(3)[-64:].view(torch.float64)
    del memory
    FreshMemory(PAGE_BYTES).tensor.fill_(4)
    assert part.view(torch.uint8).tolist() == [3] * 64


def test_a_kernel_that_refuses_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older kernel gives the pages one by one; the memory is the same."""
    asked: list[tuple[int, ...]] = []

    class Refusing(mmap.mmap):
        def madvise(self, *arguments: int) -> None:
            asked.append(arguments)
            raise OSError(errno.EINVAL, "never heard of it")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    memory = FreshMemory(2 * PAGE_BYTES)
    memory.provide(0, PAGE_BYTES)
    memory.provide(PAGE_BYTES, 2 * PAGE_BYTES)
    assert asked == [(23, 0, PAGE_BYTES)]
    assert set(memory.tensor.fill_(5).tolist()) == {5}
