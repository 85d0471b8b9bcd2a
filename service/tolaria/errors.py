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
├── LaneError                     the compute lane cannot do what was asked
│   ├── LaneFailedError
│   └── LaneStoppedError
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

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class NonFiniteStepError(TolariaError):
    """Raised when a loss or gradient is NaN or infinite, before any parameter changed."""


class LaneError(TolariaError):
    """Base of what the compute lane can answer instead of a result."""


class LaneFailedError(LaneError):
    """Raised to whoever waits for the lane when the job's own code raised in it; the cause is chained."""


class LaneStoppedError(LaneError):
    """Raised to whoever waits for the lane when it has been told to stop."""


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
