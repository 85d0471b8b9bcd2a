"""SIGINT and SIGTERM as the cancellation of one task, so that what it has started is ended by its own `finally`.

Must not know what the task does.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tolaria.cli.failures import SignalledError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Which signal came, if any."""

    def __init__(self) -> None:
        self.received: int | None = None

    @contextmanager
    def as_end_of_wait(self) -> Iterator[None]:
        """A block that waits for nothing but the signal: its coming is no failure here."""
        task = _current_task()
        try:
            yield
        except asyncio.CancelledError:
            if self.received is None or task.uncancel() > 0:
                raise
            self.received = None


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Cancel the current task when a signal comes; a second one cancels the cleanup too.

    Raises:
        SignalledError: after the block has ended by a signal.
    """
    loop, task, state = asyncio.get_running_loop(), _current_task(), Interrupts()

    def take(signal_number: int) -> None:
        state.received = signal_number
        task.cancel()

    for number in _SIGNALS:
        loop.add_signal_handler(number, take, number)
    try:
        yield state
    except asyncio.CancelledError:
        if state.received is None:
            raise
        task.uncancel()
        raise SignalledError(state.received) from None
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


def _current_task() -> asyncio.Task[object]:
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("signals can only end a task")
    return task
