"""Failures of the command line, their exit codes, how they are reported, and signals that arrive during start-up.

TolariaError
├── ServiceUnreachableError   no service answers; exit code 3
├── CommandFailedError        the command's outcome is a failure, such as a refusal or a failed run; exit code 1
│   └── StartRefusedError     ... of the demo: the settings or the job are wrong; exit code 2
│       └── PortTakenError    ... an address is in use; exit code 2
├── OutputError               standard output cannot be written to; exit code 1
│   └── ReaderGoneError       ... because its reader closed the pipe; not reported; exit code 1
└── SignalledError            SIGINT or SIGTERM ended the command; exit code 128 + the signal's number
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from tolaria.errors import (
    BindError,
    ConfigurationError,
    CredentialsError,
    JobError,
    JournalNewerError,
    StateHeldError,
    StateRefusedError,
    TolariaError,
)


class ServiceUnreachableError(TolariaError):
    """Raised when no service answers at an address, or a service stops answering."""


class CommandFailedError(TolariaError):
    """Raised when a command cannot succeed or reports a failure; the message says what failed and why."""


class StartRefusedError(CommandFailedError):
    """Raised when the demo's service exits with the code of wrong settings or a broken job."""


class PortTakenError(StartRefusedError):
    """Raised when the demo's service cannot listen on an address."""


class OutputError(TolariaError):
    """Raised when writing to standard output fails, for example on a full disk."""


class ReaderGoneError(OutputError):
    """Raised when the reader of standard output has closed its end, as `head` does."""


class SignalledError(TolariaError):
    """Raised when a signal has ended a command, after the command has cleaned up."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(f"ended by {signal.Signals(signal_number).name}")


def exit_code(error: TolariaError) -> int:
    """Returns the exit code for this kind of failure."""
    match error:
        case SignalledError():
            return 128 + error.signal_number
        case ConfigurationError() | CredentialsError() | JobError() | BindError():
            return 2
        case StateHeldError() | StateRefusedError() | JournalNewerError():
            return 2
        case StartRefusedError():
            return 2
        case ServiceUnreachableError():
            return 3
        case _:
            return 1


def report(failures: Sequence[TolariaError]) -> int:
    """Prints one message for each failure to standard error; returns the exit code of the first."""
    for failure in failures:
        # Where standard error cannot be written to either, only the exit code is left.
        with suppress(OSError):
            if not isinstance(failure, ReaderGoneError):
                sys.stderr.write(f"tolaria: {failure}\n")
                sys.stderr.flush()
    return exit_code(failures[0])


def failures_in(raised: BaseException) -> list[TolariaError]:
    """Returns the failures inside the exception groups of task groups; raises `raised` if it holds anything else."""
    if isinstance(raised, TolariaError):
        return [raised]
    if not isinstance(raised, BaseExceptionGroup) or raised.split(TolariaError)[1] is not None:
        raise raised
    return [failure for error in raised.exceptions for failure in failures_in(error)]


class EarlySignals:
    """Handles SIGINT and SIGTERM by KeyboardInterrupt until the service installs its own handlers.

    SIGHUP does nothing until then: the settings are just being read.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def install(self) -> None:
        """Installs the handlers.

        By default, SIGTERM is ignored in the first process of a container, and SIGINT in a process that a shell
        without job control starts in the background.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(signal.SIGHUP, lambda _number, _frame: None)  # a function: children do not inherit it

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal received, by default that of SIGINT."""
        return 128 + (self.received or signal.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = signal.Signals(number)
        raise KeyboardInterrupt


early_signals = EarlySignals()
"""A process has one set of signal handlers."""
