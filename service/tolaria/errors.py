"""Every error that Tolaria raises on purpose, in one tree. Knows nothing of who raises or catches.

TolariaError
├── ConfigurationError            the settings are wrong; exit code 2
├── JobError                      the user's training job is wrong; exit code 2
│   ├── UnknownJobError
│   ├── BrokenJobError
│   ├── EmptyDatasetError
│   └── LossShapeError
├── BindError                     a listening address cannot be had
├── PeerError                     a call to Tamiyo or Kasmina came to nothing
│   ├── PeerTimeoutError
│   ├── PeerUnavailableError
│   ├── PeerProtocolError
│   └── BreakerOpenError
├── CommandRejectedError          a command failed a check and changed nothing
├── NonFiniteStepError            a step was voided before any parameter changed
├── GradientError                 gradients cannot be merged as asked
│   ├── NoGradientsError
│   ├── GradientMismatchError
│   ├── GradientWeightError
│   └── UnknownSourceError
├── LaneError                     the compute lane cannot do what was asked
│   ├── LaneFailedError
│   └── LaneStoppedError
├── SignalError                   the signal board cannot do what was asked
│   ├── BoardRefusedError
│   ├── BoardBusyError
│   ├── BoardLostError
│   ├── BlockOwnedError
│   └── SignalValueError
└── RequestError                  an operator's request cannot be served
    ├── InvalidFieldError
    ├── WrongStateError
    └── NotImplementedYetError
"""

from __future__ import annotations


class TolariaError(Exception):
    """Base of all; never raised itself."""


class ConfigurationError(TolariaError):
    """Raised at start when settings are unknown, malformed or impossible together.

    `problems` has one line for each, naming the setting and where it came from.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        noun = "problem" if len(problems) == 1 else "problems"
        super().__init__(f"configuration has {len(problems)} {noun}:\n" + "\n".join(f"  {p}" for p in problems))


class JobError(TolariaError):
    """Base of the mistakes that a training job can contain; the message says what to mend."""


class UnknownJobError(JobError):
    """Raised when `training.job` names nothing that can be loaded."""


class BrokenJobError(JobError):
    """Raised when a job's factory or one of its methods fails, or returns what it must not."""


class EmptyDatasetError(JobError):
    """Raised when a job's data holds not one batch."""


class LossShapeError(JobError):
    """Raised when a job returns a loss that is not a scalar that gradients can flow from."""


class BindError(TolariaError):
    """Raised when a server cannot listen on its address; the message holds the address."""

    def __init__(self, what: str, address: str, cause: str) -> None:
        self.address = address
        super().__init__(f"{what} cannot listen on {address}: {cause}")


class PeerError(TolariaError):
    """Base of what can go wrong with a call to a peer. `peer` names it."""

    def __init__(self, peer: str, detail: str) -> None:
        self.peer = peer
        self.detail = detail
        super().__init__(f"{peer}: {detail}")


class PeerTimeoutError(PeerError):
    """Raised when a call did not answer within its deadline; its handler has been cancelled."""


class PeerUnavailableError(PeerError):
    """Raised when a peer cannot be reached or answers with an error status."""


class PeerProtocolError(PeerError):
    """Raised when a peer's answer breaks the contract: NaN, unknown enum values, double ids."""


class BreakerOpenError(PeerError):
    """Raised instead of calling a peer whose circuit breaker is open."""


class CommandRejectedError(TolariaError):
    """Raised when a command fails a check. `reason` is its stable name in metrics and events."""

    def __init__(self, reason: str, command_id: str, detail: str) -> None:
        self.reason = reason
        self.command_id = command_id
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class NonFiniteStepError(TolariaError):
    """Raised when a loss or gradient is NaN or infinite, before any parameter changed."""


class GradientError(TolariaError):
    """Base of the reasons why gradients cannot be merged."""


class NoGradientsError(GradientError):
    """Raised when there is nothing to merge: no rows, or rows without elements."""

    def __init__(self) -> None:
        super().__init__("no gradients available for aggregation")


class GradientMismatchError(GradientError):
    """Raised when one gradient differs in dtype, device, shape or count from what it must match.

    `index` is the position of the first offender among those given.
    """

    def __init__(self, index: int, detail: str) -> None:
        self.index = index
        super().__init__(f"gradient {index}: {detail}")


class GradientWeightError(GradientError):
    """Raised when weights cannot be used. `index` is the first offender, None when it is all of them together."""

    def __init__(self, index: int | None, detail: str) -> None:
        self.index = index
        super().__init__(f"weights: {detail}" if index is None else f"weight {index}: {detail}")


class UnknownSourceError(GradientError):
    """Raised when a row or loss names a source that takes no part in this step, or one that does is missing."""


class LaneError(TolariaError):
    """Base of what the compute lane can answer instead of a result."""


class LaneFailedError(LaneError):
    """Raised to whoever waits for the lane when the job's own code raised in it; the cause is chained."""


class LaneStoppedError(LaneError):
    """Raised to whoever waits for the lane when it has been told to stop."""


class SignalError(TolariaError):
    """Base of what can go wrong with the signal board."""


class BoardRefusedError(SignalError):
    """Raised when a file cannot be used as a board.

    `reason` is its stable name: missing, io, platform, foreign, truncated, version, size, header, run or replaced.
    """

    def __init__(self, path: str, reason: str, detail: str) -> None:
        self.path = path
        self.reason = reason
        self.detail = detail
        super().__init__(f"{path} is refused ({reason}): {detail}")


class BoardBusyError(SignalError):
    """Raised when a board is to be created under a name that another living process holds."""


class BoardLostError(SignalError):
    """Raised when an attached board has been closed or its file was cut short."""


class BlockOwnedError(SignalError):
    """Raised when a block of the board is to be written by who does not own it."""


class SignalValueError(SignalError):
    """Raised when something does not belong on the board: an unknown level or name, a level below the standing one."""


class RequestError(TolariaError):
    """Base of the reasons why an operator's request is not served."""


class InvalidFieldError(RequestError):
    """Raised when a field of a request holds what it must not. `field` names it."""

    def __init__(self, field: str, description: str) -> None:
        self.field = field
        self.description = description
        super().__init__(f"{field}: {description}")


class WrongStateError(RequestError):
    """Raised when a request does not fit the state that the run is in."""


class NotImplementedYetError(RequestError):
    """Raised for a call of the contract that this version does not serve."""
