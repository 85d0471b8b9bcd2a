"""The first moments of the process: signals that come before anybody takes them, and streams that are not open.

Must import next to nothing: what it guards against happens while the rest is imported.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType

_STDIN, _STDOUT, _STDERR = range(3)
_received: signal.Signals | None = None


def open_standard_streams() -> None:
    """Give the null device to each standard stream that the process was started without.

    Otherwise the next file or socket to be opened would get its number, and what is told its bytes.
    """
    for descriptor in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
    if sys.stdin is None:
        sys.stdin = os.fdopen(_STDIN, encoding="utf-8", closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(_STDOUT, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(_STDERR, "w", encoding="utf-8", closefd=False)


def take_early_signals() -> None:
    """Make SIGTERM and SIGINT end the process by KeyboardInterrupt, until somebody else takes them.

    The default of SIGTERM would be ignored in a process that is the first of its container, and SIGINT is in one that
    a shell without job control has started in the background.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def interrupted() -> bool:
    """Whether a signal has come early: then whatever fails has failed for that."""
    return _received is not None


def interrupted_code() -> int:
    """The exit code of a process that a signal ended: 128 + its number."""
    return 128 + (_received or signal.SIGINT)


class QuietWhenInterrupted:
    """A block that ends the process with the signal's exit code when one came; half an import may fail in any way."""

    def __enter__(self) -> None:
        """Nothing is taken."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises SystemExit in place of what a signal has caused."""
        if isinstance(error, KeyboardInterrupt) or (error is not None and interrupted()):
            sys.exit(interrupted_code())


def _interrupt(number: int, frame: FrameType | None) -> None:
    del frame
    global _received  # noqa: PLW0603 - a process has one end
    _received = signal.Signals(number)
    raise KeyboardInterrupt
