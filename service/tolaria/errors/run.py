"""What keeps a run from going on as asked: its job, its lane, its operator's requests. Must not know training."""

from __future__ import annotations

from tolaria.errors.base import TolariaError


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


class StillUnderwayError(WrongStateError):
    """Raised when what was asked for takes longer than a call may wait; it goes on, and a repeat waits for it."""


class ProfileFailedError(RequestError):
    """Raised when a profile that was asked for has left no trace; training is as if nobody had asked."""


class NotImplementedYetError(RequestError):
    """Raised for a call of the contract that this version does not serve."""
