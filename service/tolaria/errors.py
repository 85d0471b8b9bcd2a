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
├── OptimizationError             learning rates or the optimizer cannot be had as asked
│   ├── ScheduleError
│   ├── UnsuitableOptimizerError
│   ├── UnknownGroupError
│   ├── GroupConflictError
│   ├── AdjustmentRefusedError
│   ├── HyperparameterError
│   ├── ControllerStateError
│   └── RebuildFailedError
├── SeedError                     a seed cannot be grown as asked
│   ├── SlotError
│   ├── UnknownBlueprintError
│   ├── BlueprintError
│   │   └── BlueprintMisfitError
│   ├── OwnershipError
│   └── TopologyStateError
├── LaneError                     the compute lane cannot do what was asked
│   ├── LaneFailedError
│   └── LaneStoppedError
├── SignalError                   the signal board cannot do what was asked
│   ├── BoardRefusedError
│   ├── BoardBusyError
│   ├── BoardLostError
│   ├── BlockOwnedError
│   └── SignalValueError
├── RollbackError                 training state cannot be captured, kept or brought back as asked
│   ├── StateUnsupportedError
│   ├── StateMismatchError
│   ├── ImageDamagedError
│   ├── RestoreAbandonedError
│   ├── CheckpointError
│   │   ├── CheckpointWriteError
│   │   ├── CheckpointDamagedError
│   │   ├── CheckpointUnreadableError
│   │   └── NoCheckpointError
│   └── JournalError
│       ├── JournalUnavailableError
│       ├── JournalDamagedError
│       └── JournalNewerError
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


class OptimizationError(TolariaError):
    """Base of the reasons why a learning rate or an optimizer cannot be had as asked; nothing has changed."""


class ScheduleError(OptimizationError):
    """Raised when a learning-rate schedule is impossible. `field` names the part that is wrong."""

    def __init__(self, field: str, detail: str) -> None:
        self.field = field
        super().__init__(f"{field}: {detail}")


class UnsuitableOptimizerError(OptimizationError):
    """Raised when an optimizer cannot be governed: no `lr`, groups without or with equal names, nameless parameters."""


class UnknownGroupError(OptimizationError):
    """Raised when a param group is meant that nobody registered; the message lists those that are."""

    def __init__(self, group: str, known: list[str]) -> None:
        self.group = group
        super().__init__(f"no param group {group!r}; there are: {', '.join(sorted(known)) or 'none'}")


class GroupConflictError(OptimizationError):
    """Raised when a param group is registered twice, or without what its learning rate would follow from."""


class AdjustmentRefusedError(OptimizationError):
    """Raised when a change of learning rate is out of bounds or makes no sense. `field` names what is wrong."""

    def __init__(self, field: str, detail: str) -> None:
        self.field = field
        super().__init__(f"{field}: {detail}")


class HyperparameterError(OptimizationError):
    """Raised when an optimizer has no such hyperparameter, or not with such a value. `name` is the one asked for."""

    def __init__(self, name: str, detail: str) -> None:
        self.name = name
        super().__init__(f"{name}: {detail}")


class ControllerStateError(OptimizationError):
    """Raised when what should be the learning-rate controller's saved state is not."""


class RebuildFailedError(OptimizationError):
    """Raised when an optimizer could not be rebuilt; the old one stands untouched.

    `stage` is the stable name of where it failed: plan, build, carry, validate or swap. What failed is chained.
    """

    def __init__(self, stage: str, detail: str) -> None:
        self.stage = stage
        self.detail = detail
        super().__init__(f"rebuilding the optimizer failed ({stage}): {detail}")


class SeedError(TolariaError):
    """Base of why seeds cannot be grown, or not in this way."""


class SlotError(SeedError):
    """Raised when a host's slot is declared wrongly, or is given activations that it was not declared for."""


class UnknownBlueprintError(SeedError):
    """Raised when no blueprint of that name is registered; the message lists those that are."""


class BlueprintError(SeedError):
    """Raised when a blueprint cannot be imported or built, or its branch breaks its promises."""


class BlueprintMisfitError(BlueprintError):
    """Raised when a blueprint cannot make a branch for a slot. `blueprint` and `slot` name both."""

    def __init__(self, blueprint: str, slot: str, detail: str) -> None:
        self.blueprint = blueprint
        self.slot = slot
        super().__init__(f"blueprint {blueprint!r} does not fit slot {slot!r}: {detail}")


class OwnershipError(SeedError):
    """Raised when a parameter belongs to two owners, or to none."""


class TopologyStateError(SeedError):
    """Raised when a saved topology cannot be brought back in this model; nothing has changed."""

    def __init__(self, detail: str) -> None:
        super().__init__(f"the saved topology cannot be loaded: {detail}")


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


class RollbackError(TolariaError):
    """Base of the reasons why training state cannot be captured, kept or brought back."""


class StateUnsupportedError(RollbackError):
    """Raised when something in the training state has no faithful form: a sparse tensor, an object in a state dict."""

    def __init__(self, name: str, detail: str) -> None:
        self.name = name
        super().__init__(f"{name}: {detail}")


class StateMismatchError(RollbackError):
    """Raised before anything changed when a captured state does not fit the live one.

    `problems` has one line for each name, shape, dtype or part that differs.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        super().__init__("the captured state does not fit: " + "; ".join(problems[:5]) + more)


class ImageDamagedError(RollbackError):
    """Raised before anything changed when a captured state has no longer the digest that it was captured with."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"{name}: its bytes have changed since they were captured")


class RestoreAbandonedError(RollbackError):
    """Raised when a restore was told to give up, at its deadline for instance; the live state is as it was."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        super().__init__(f"the restore was abandoned while {stage}; the live state is as it was")


class CheckpointError(RollbackError):
    """Base of what can go wrong with checkpoints on disk."""


class CheckpointWriteError(CheckpointError):
    """Raised when a checkpoint could not be committed; what was committed before is as it was.

    `stage` is create, write, rename, sync_parent or journal; `reason` the errno's name (ENOSPC, EIO), or journal.
    """

    def __init__(self, stage: str, reason: str, detail: str) -> None:
        self.stage = stage
        self.reason = reason
        super().__init__(f"checkpoint not written ({stage}, {reason}): {detail}")


class CheckpointDamagedError(CheckpointError):
    """Raised when a checkpoint on disk is not what was written.

    `stage` is manifest, state or tensors; `reason` is missing, size, format, header or digest.
    """

    def __init__(self, checkpoint_id: str, stage: str, reason: str) -> None:
        self.checkpoint_id = checkpoint_id
        self.stage = stage
        self.reason = reason
        super().__init__(f"checkpoint {checkpoint_id} is damaged ({stage}, {reason})")


class CheckpointUnreadableError(CheckpointError):
    """Raised when the system refuses to read a checkpoint; it may be whole. `reason` is the errno's name."""

    def __init__(self, checkpoint_id: str, stage: str, reason: str) -> None:
        self.checkpoint_id = checkpoint_id
        self.stage = stage
        self.reason = reason
        super().__init__(f"checkpoint {checkpoint_id} cannot be read ({stage}, {reason})")


class NoCheckpointError(CheckpointError):
    """Raised when no committed checkpoint can be loaded; the message tells of those that were tried."""


class JournalError(RollbackError):
    """Base of what can go wrong with the journal."""


class JournalUnavailableError(JournalError):
    """Raised when the system refuses to open, read or write the journal: no space, no permission, locked."""


class JournalDamagedError(JournalError):
    """Raised when the journal's bytes are not what was written."""


class JournalNewerError(JournalError):
    """Raised when the journal was written by a newer Tolaria; it is left alone."""


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
