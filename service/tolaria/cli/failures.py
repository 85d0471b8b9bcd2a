"""What can go wrong on the command line beyond what the service itself raises, and every exit code.

Must not know how a failure is printed.

TolariaError
├── ServiceUnreachableError   no service answers; exit code 3
├── RequestRefusedError       a service answered no; exit code 1
├── DigestsDifferError        a rollback brought back another state than was captured; exit code 1
├── StorageDamagedError       a state directory does not hold what was written; exit code 1
├── RunFailedError            the run that was watched failed; exit code 1
├── DemoFailedError           the demo's service or its run failed; exit code 1
│   ├── PortTakenError        ... because an address is in use
│   └── StartRefusedError     ... because its settings or its job are wrong; exit code 2
├── OutputError               standard output cannot be written to; exit code 1
│   └── ReaderGoneError       ... because nobody reads it any more, which is told to nobody; exit code 1
└── SignalledError            SIGINT or SIGTERM ended the command; exit code 128 + the signal's number
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

from tolaria.errors import ConfigurationError, JobError, TolariaError

_SHOWN_LINES = 20


class ServiceUnreachableError(TolariaError):
    """Raised when no running service answers at an address, or it stops to."""


class RequestRefusedError(TolariaError):
    """Raised when a running service answers that it will not do what was asked; the message names the field."""


class DigestsDifferError(TolariaError):
    """Raised when a rollback is not proved by its digests: that of the state restored and that of its capture."""


class StorageDamagedError(TolariaError):
    """Raised when something that was committed in a state directory is not there as it was written."""


class RunFailedError(TolariaError):
    """Raised when the run that is watched has failed; the message is the service's reason."""


class DemoFailedError(TolariaError):
    """Raised when the demo's own service died or its run failed; the message ends with its last log lines."""

    def __init__(self, what: str, log_lines: Sequence[str]) -> None:
        shown = "\n".join(f"  {line}" for line in log_lines[-_SHOWN_LINES:])
        super().__init__(f"{what}\nlast lines of its log:\n{shown}" if shown else what)


class PortTakenError(DemoFailedError):
    """Raised when the demo's service could not listen on an address."""


class StartRefusedError(DemoFailedError):
    """Raised when the demo's service ended with the exit code of wrong settings or of a broken job."""


class OutputError(TolariaError):
    """Raised when standard output does not take what is written: a full disk, say."""


class ReaderGoneError(OutputError):
    """Raised when the reader of standard output has closed its end, as `head` does when it has seen enough."""


class SignalledError(TolariaError):
    """Raised out of a command that a signal has ended, after it has cleaned up behind itself."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(f"ended by {signal.Signals(signal_number).name}")


def exit_code(error: TolariaError) -> int:
    """The exit code that tells a script which kind of failure this was."""
    if isinstance(error, SignalledError):
        return 128 + error.signal_number
    return next(code for kind, code in _EXIT_CODES if isinstance(error, kind))


_EXIT_CODES: tuple[tuple[type[TolariaError], int], ...] = (
    (ConfigurationError, 2),
    (JobError, 2),
    (StartRefusedError, 2),
    (ServiceUnreachableError, 3),
    (TolariaError, 1),
)
