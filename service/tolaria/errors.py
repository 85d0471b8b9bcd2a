"""The errors that Tolaria raises on purpose, in one tree.

TolariaError
├── ConfigurationError, BindError, ChildFailedError, StateHeldError, CommandRejectedError, IllegalTransitionError,
│   IllegalMoveError
├── JobError: UnknownJobError, BrokenJobError, EmptyDatasetError, LossShapeError
├── PeerError: PeerTimeoutError, PeerUnavailableError, PeerProtocolError, BreakerOpenError, CallRefusedError
├── GradientError: NoGradientsError, GradientMismatchError, GradientWeightError, UnknownSourceError,
│                  UnmergeableParameterError
├── OptimizationError: ScheduleError, UnsuitableOptimizerError, UnknownGroupError, GroupConflictError,
│                      AdjustmentRefusedError, HyperparameterError, ControllerStateError, RebuildFailedError
├── SeedError: SlotError, UnknownBlueprintError, OwnershipError, TopologyStateError
│   └── BlueprintError: BlueprintMisfitError
├── LaneError: LaneFailedError, PeerLostError, RanksDifferError, LaneStoppedError, LaneLostError, WireError
├── SignalError: BoardRefusedError, BoardBusyError, BoardLostError, BlockOwnedError, SignalValueError
├── EmergencyError: UnknownLevelError, IllegalEmergencyEventError, ClearanceRefusedError, BroadcastFailedError
├── RollbackError: StateUnsupportedError, StateMismatchError, ImageDamagedError, RestoreUnprovenError,
│   │              RestoreAbandonedError
│   ├── CheckpointError: CheckpointWriteError, CheckpointDamagedError, CheckpointUnreadableError, NoCheckpointError
│   └── JournalError: JournalUnavailableError, JournalDamagedError, JournalNewerError
└── RequestError: InvalidFieldError, ProfileFailedError, NotImplementedYetError
    └── WrongStateError: StillUnderwayError
"""

from __future__ import annotations

from collections.abc import Sequence


class TolariaError(Exception):
    """Base class of all errors; `fields` are the constructor's arguments if they are not just the message."""

    def __init__(self, message: str, *fields: object) -> None:
        super().__init__(message)
        self.fields = fields or (message,)


class ConfigurationError(TolariaError):
    """Settings are unknown, malformed or inconsistent; each of `problems` names a setting and its source."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems, head = list(problems), f"configuration has {len(problems)} problem{'s' * (len(problems) != 1)}:"
        super().__init__("\n  ".join([head, *problems]), problems)


class JobError(TolariaError):
    """Base class for mistakes in a training job; the message says what to correct."""


class UnknownJobError(JobError):
    """`training.job` names nothing that can be loaded."""


class BrokenJobError(JobError):
    """A job's factory or method raises, or returns an invalid value."""


class EmptyDatasetError(JobError):
    """A job's dataset has no batch."""


class LossShapeError(JobError):
    """A job returns a loss that is not a differentiable scalar, or a mapping without the required sources."""


class BindError(TolariaError):
    """A server cannot listen on `address`."""

    def __init__(self, what: str, address: str, cause: str) -> None:
        super().__init__(f"{what} cannot listen on {address}: {cause}", what, address, cause)


class ChildFailedError(TolariaError):
    """A child process cannot be started, ends early, or does not announce itself as expected."""

    def __init__(self, child: str, detail: str) -> None:
        self.child, self.detail = child, detail
        super().__init__(f"{child}: {detail}", child, detail)


class StateHeldError(TolariaError):
    """Another process uses the state directory; `holder_pid` is 0 when it is unknown."""

    def __init__(self, directory: str, holder_pid: int) -> None:
        self.directory, self.holder_pid = directory, holder_pid
        held = f"is in use by {f'process {holder_pid}' if holder_pid else 'another process'}"
        super().__init__(
            f"state.dir: {directory} {held}; a directory serves one service at a time", directory, holder_pid
        )


class PeerError(TolariaError):
    """Base class for failed calls to `peer`, which is Tamiyo or Kasmina."""

    def __init__(self, peer: str, detail: str) -> None:
        self.peer, self.detail = peer, detail
        super().__init__(f"{peer}: {detail}", peer, detail)


class PeerTimeoutError(PeerError):
    """A call did not complete within its deadline; the peer's handler has been cancelled."""


class PeerUnavailableError(PeerError):
    """A peer cannot be reached, or answers with an error status."""


class PeerProtocolError(PeerError):
    """A peer's response violates the contract: undecodable bytes, NaN, unknown enum values, duplicate ids."""


class BreakerOpenError(PeerError):
    """The call was not made because the peer's circuit breaker is open."""


class CallRefusedError(PeerError):
    """The call was not made because too many calls are in flight or the channel is closing."""


class IllegalTransitionError(TolariaError):
    """A circuit breaker or conservative mode has no transition for this event; its state is unchanged."""


class CommandRejectedError(TolariaError):
    """A controller's command fails a check; `reason` is its stable name in metrics and events."""

    def __init__(self, reason: str, command_id: str, detail: str) -> None:
        self.reason, self.command_id, self.detail = reason, command_id, detail
        super().__init__(f"{reason}: {detail}", reason, command_id, detail)


class GradientError(TolariaError):
    """Base class for gradients that cannot be merged."""


class NoGradientsError(GradientError, RuntimeError):
    """There are no gradients to merge: no rows, or rows without elements."""

    def __init__(self, message: str = "no gradients available for aggregation") -> None:
        super().__init__(message)


class UnmergeableParameterError(GradientError, JobError):
    """The gradients of several sources cannot be merged over a parameter, which the message names."""


class GradientMismatchError(GradientError):
    """Gradient `index`, the first of several, differs in dtype, device, shape or count from what is required."""

    def __init__(self, index: int, detail: str) -> None:
        self.index = index
        super().__init__(f"gradient {index}: {detail}", index, detail)


class GradientWeightError(GradientError):
    """A weight is invalid; `index` is the first such weight, or None when the weights together are invalid."""

    def __init__(self, index: int | None, detail: str) -> None:
        self.index = index
        super().__init__(f"weights: {detail}" if index is None else f"weight {index}: {detail}", index, detail)


class UnknownSourceError(GradientError):
    """The rows or losses do not name exactly the sources of this step."""


class OptimizationError(TolariaError):
    """Base class for rejected changes of learning rates or the optimizer, which are unchanged."""


class ScheduleError(OptimizationError):
    """The field `field` of a learning-rate schedule is invalid."""

    def __init__(self, field: str, detail: str) -> None:
        self.field = field
        super().__init__(f"{field}: {detail}", field, detail)


class UnsuitableOptimizerError(OptimizationError):
    """The optimizer cannot be controlled: a group has no `lr` or no unique name, or a parameter is not the model's."""


class UnknownGroupError(OptimizationError):
    """No param group is named `group`; the message lists the registered groups."""

    def __init__(self, group: str, known: Sequence[str]) -> None:
        super().__init__(f"no param group {group!r}; there are: {', '.join(sorted(known)) or 'none'}", group, known)


class GroupConflictError(OptimizationError):
    """A param group is registered twice, or without a base learning rate."""


class AdjustmentRefusedError(OptimizationError):
    """The field `field` of a learning-rate adjustment is invalid or out of bounds."""

    def __init__(self, field: str, detail: str) -> None:
        self.field = field
        super().__init__(f"{field}: {detail}", field, detail)


class HyperparameterError(OptimizationError):
    """The optimizer has no hyperparameter `name`, or does not accept the value."""

    def __init__(self, name: str, detail: str) -> None:
        self.name = name
        super().__init__(f"{name}: {detail}", name, detail)


class ControllerStateError(OptimizationError):
    """The saved state of the learning-rate controller is invalid."""


class RebuildFailedError(OptimizationError):
    """Rebuilding the optimizer failed at `stage` (plan, build, carry, validate, swap); the old one stays in use."""

    def __init__(self, stage: str, detail: str) -> None:
        self.stage, self.detail = stage, detail
        super().__init__(f"rebuilding the optimizer failed ({stage}): {detail}", stage, detail)


class SeedError(TolariaError):
    """A seed cannot be grafted, trained or removed as requested."""


class SlotError(SeedError):
    """A slot of the host is declared incorrectly, or receives activations of another shape."""


class UnknownBlueprintError(SeedError):
    """No blueprint of this name is registered; the message lists the registered ones."""


class BlueprintError(SeedError):
    """A blueprint cannot be imported or built, or its branch violates the blueprint contract."""


class BlueprintMisfitError(BlueprintError):
    """The blueprint `blueprint` cannot build a branch for `slot`."""

    def __init__(self, blueprint: str, slot: str, detail: str) -> None:
        super().__init__(f"blueprint {blueprint!r} does not fit slot {slot!r}: {detail}", blueprint, slot, detail)


class OwnershipError(SeedError):
    """A parameter has two owners or none."""


class TopologyStateError(SeedError):
    """A saved topology cannot be loaded into this model, which is unchanged."""

    def __init__(self, detail: str) -> None:
        super().__init__(f"the saved topology cannot be loaded: {detail}", detail)


class IllegalMoveError(TolariaError):
    """A seed's lifecycle does not allow this command; the seed stays in its stage."""


class LaneError(TolariaError):
    """The compute lane cannot execute a command."""


class LaneFailedError(LaneError):
    """The job's code raised an exception in the lane."""


class PeerLostError(LaneError):
    """Another rank of the group has gone; the group has to start again."""


class RanksDifferError(LaneError):
    """The ranks of a group do not do the same: they have read other data, or have other states."""


class LaneStoppedError(LaneError):
    """The lane stopped before it executed a command."""


class LaneLostError(LaneError):
    """The lane's process ended, and with it whatever it had not answered."""


class WireError(LaneError):
    """What the other side of the lane's connection sent, or was to be sent to it, is no frame."""


class SignalError(TolariaError):
    """Base class for errors of the signal board."""


class BoardRefusedError(SignalError):
    """The file cannot be used as a signal board; `reason` is the stable name of the failed check."""

    def __init__(self, path: str, reason: str, detail: str) -> None:
        self.path, self.reason, self.detail = path, reason, detail
        super().__init__(f"{path} is refused ({reason}): {detail}", path, reason, detail)


class BoardBusyError(SignalError):
    """Another running process holds the board of this name."""


class BoardLostError(SignalError):
    """An attached board has been closed, or its file was truncated."""


class BlockOwnedError(SignalError):
    """A block of the board is written by a process that does not own it."""


class SignalValueError(SignalError):
    """A value cannot be written to the board: an unknown name or level, a level below the active one, a long id."""


class EmergencyError(TolariaError):
    """Base class for rejected or failed emergency operations."""


class UnknownLevelError(EmergencyError):
    """There is no emergency level of this number."""


class IllegalEmergencyEventError(EmergencyError):
    """The emergency has no transition for this event in its state; the emergency is unchanged."""


class ClearanceRefusedError(EmergencyError):
    """Only an operator may clear this emergency; it stays active."""


class BroadcastFailedError(EmergencyError):
    """An emergency broadcast could not be delivered; it is retried."""


class RollbackError(TolariaError):
    """Base class for training state that cannot be captured, stored or restored."""


class StateUnsupportedError(RollbackError):
    """The training state contains a value that cannot be captured, such as a sparse tensor; `name` is its key."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"{name}: {detail}", name, detail)


class StateMismatchError(RollbackError):
    """A captured state does not fit the live one, which is unchanged; `problems` has a line for each difference."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        super().__init__("the captured state does not fit: " + "; ".join(problems[:5]) + more, problems)


class ImageDamagedError(RollbackError):
    """The bytes of a captured state no longer match its digest; the live state is unchanged."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: its bytes have changed since they were captured", name)


class RestoreUnprovenError(RollbackError):
    """The live state was overwritten, but its digest differs from that of the state captured at `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the live state was overwritten but differs from the state captured at step {step}", step)


class RestoreAbandonedError(RollbackError):
    """A restore was cancelled at `stage`, for example at its deadline; the live state is unchanged."""

    def __init__(self, stage: str) -> None:
        super().__init__(f"the restore was abandoned while {stage}; the live state is unchanged", stage)


class CheckpointError(RollbackError):
    """Base class for errors of checkpoints on disk."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be committed at `stage`; `reason` is the errno's name, or journal."""

    def __init__(self, stage: str, reason: str, detail: str) -> None:
        self.stage, self.reason = stage, reason
        super().__init__(f"checkpoint not written ({stage}, {reason}): {detail}", stage, reason, detail)


class CheckpointDamagedError(CheckpointError):
    """A checkpoint is corrupt: its `stage` (manifest, state or tensors) fails the check `reason`."""

    def __init__(self, checkpoint_id: str, stage: str, reason: str) -> None:
        self.checkpoint_id, self.stage, self.reason = checkpoint_id, stage, reason
        super().__init__(f"checkpoint {checkpoint_id} is damaged ({stage}, {reason})", checkpoint_id, stage, reason)


class CheckpointUnreadableError(CheckpointError):
    """The operating system cannot read a checkpoint, which may be intact; `reason` is the errno's name."""

    def __init__(self, checkpoint_id: str, stage: str, reason: str) -> None:
        self.checkpoint_id, self.stage, self.reason = checkpoint_id, stage, reason
        super().__init__(f"checkpoint {checkpoint_id} cannot be read ({stage}, {reason})", checkpoint_id, stage, reason)


class NoCheckpointError(CheckpointError):
    """No restore point can be loaded; the message lists the ones that were tried."""


class JournalError(RollbackError):
    """Base class for errors of the journal."""


class JournalUnavailableError(JournalError):
    """The operating system cannot open, read or write the journal: no space, no permission, locked."""


class JournalDamagedError(JournalError):
    """The content of the journal differs from what was written."""


class JournalNewerError(JournalError):
    """The journal was written by a newer version of Tolaria; it is unchanged."""


class RequestError(TolariaError):
    """Base class for rejected requests of an operator."""


class InvalidFieldError(RequestError):
    """The request's field `field` has an invalid value."""

    def __init__(self, field: str, description: str) -> None:
        self.field, self.description = field, description
        super().__init__(f"{field}: {description}", field, description)


class WrongStateError(RequestError):
    """The run's state does not allow the request."""


class StillUnderwayError(WrongStateError):
    """The operation takes longer than one call may wait; it continues, and a repeated request waits for it."""


class ProfileFailedError(RequestError):
    """A requested profile produced no trace; training is unaffected."""


class NotImplementedYetError(RequestError):
    """This version does not implement the call."""
