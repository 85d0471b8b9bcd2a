from __future__ import annotations

import ctypes
import platform
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tolaria.signals import futex
from tolaria.signals.futex import Bell, futex_available, futex_wait

needs_futex = pytest.mark.skipif(not futex_available(), reason="this platform has no futex")


@pytest.fixture(params=[pytest.param(True, marks=needs_futex), False], ids=["futex", "poll"])
def bell(request: pytest.FixtureRequest) -> Iterator[Bell]:
    """A bell over private memory, with and without futexes."""
    memory = bytearray(64)
    bell = Bell(memoryview(memory), 0, futex=request.param)
    yield bell
    if not bell.closed:
        bell.close()


def test_wait_returns_at_once_when_the_word_moved(bell: Bell) -> None:
    """A change before the wait is not missed."""
    bell.ring(5)
    assert bell.wait(4, timeout_s=60.0) == 5


def test_wait_ends_with_the_timeout(bell: Bell) -> None:
    """Without a ring the wait returns the unchanged word, not before the timeout."""
    started = time.monotonic()
    assert bell.wait(0, timeout_s=0.02) == 0
    assert time.monotonic() - started >= 0.02


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan")])
def test_wait_without_a_positive_timeout_does_not_sleep(bell: Bell, timeout_s: float) -> None:
    """Zero, negative and NaN timeouts return at once."""
    assert bell.wait(0, timeout_s) == 0


def test_every_waiter_wakes(bell: Bell) -> None:
    """One ring wakes all waiting threads."""
    with ThreadPoolExecutor(4) as pool:
        waits = [pool.submit(bell.wait, 0, 60.0) for _ in range(4)]
        bell.ring(9)
        assert [wait.result(60) for wait in waits] == [9] * 4


def test_a_waiter_does_not_hold_the_gil(bell: Bell) -> None:
    """The main thread runs and rings while another one waits."""
    waiter = threading.Thread(target=bell.wait, args=(0, 600.0))
    waiter.start()
    count = sum(1 for _ in range(100_000))
    bell.ring(1)
    waiter.join(180)
    assert (count, waiter.is_alive()) == (100_000, False)


def test_close_ends_waits(bell: Bell) -> None:
    """Closing ends a wait of ten minutes."""
    waiter = threading.Thread(target=bell.wait, args=(0, 600.0))
    waiter.start()
    while not bell.waiters:
        threading.Event().wait(0.001)
    bell.close()
    waiter.join(180)
    assert not waiter.is_alive()


@needs_futex
def test_unexpected_errors_are_raised() -> None:
    """A misaligned address is an error and no silent return."""
    with pytest.raises(OSError, match="Invalid argument"):
        futex_wait(ctypes.addressof(ctypes.create_string_buffer(8)) | 1, 0, 0.001)


def test_unknown_machines_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a known call number there is no futex."""
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert not futex_available.__wrapped__()


def test_a_sandbox_that_forbids_the_call_makes_it_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the probing call means that there is no futex."""

    def forbidden(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(futex, "futex_wait", forbidden)
    assert not futex_available.__wrapped__()
