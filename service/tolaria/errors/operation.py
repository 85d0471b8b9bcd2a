"""Errors of peers, signals, emergencies, rollbacks, storage and requests."""

from __future__ import annotations

from collections.abc import Sequence

from tolaria import __version__
from tolaria.errors.base import TolariaError


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
    """A newer version of Tolaria has written the state in `directory`, with a later schema; it is unchanged.

    `writer` is that version; empty if it is unknown.
    """

    def __init__(self, directory: object, found: int, supported: int, writer: str) -> None:
        self.found, self.supported, self.writer = found, supported, writer
        newer = f"Tolaria {writer}" if writer else "a newer version of Tolaria"
        super().__init__(
            f"{directory} has schema {found}, written by {newer}, and this is Tolaria {__version__}, which supports "
            f"schemas up to {supported}; nothing has been changed. Use {newer} or a later one; if it can, its command "
            f"`tolaria state downgrade --to {supported} --state-dir {directory}` makes this version able to read it",
            *(str(directory), found, supported, writer),
        )


class BackupError(TolariaError):
    """A backup could not be made or restored; nothing is left that looks like a whole one."""


class BackupDamagedError(BackupError):
    """The file or directory `place` is not a whole backup."""

    def __init__(self, place: str, detail: str) -> None:
        self.place, self.detail = place, detail
        super().__init__(f"{place} is not a whole backup: {detail}", place, detail)


class StateRefusedError(TolariaError):
    """A state directory cannot be used as it is, or not for this; the message says why and what to do."""


class ExportError(TolariaError):
    """Base class for models that cannot be taken out of a run, or not be loaded again."""


class BranchRefusedError(TolariaError):
    """A branch of a run cannot be made in this directory; nothing has been written."""


class ExportRefusedError(ExportError):
    """What was asked for cannot be exported, or not to this place; nothing has been written."""


class ExportFailedError(ExportError):
    """An export could not be written; nothing is left at its place."""


class ExportDamagedError(ExportError):
    """The directory `place` is not a whole export."""

    def __init__(self, place: str, detail: str) -> None:
        super().__init__(f"{place} is not a whole export: {detail}", place, detail)


class ExportMismatchError(ExportError):
    """The export at `place` does not fit the model."""

    def __init__(self, place: str, detail: str) -> None:
        super().__init__(f"the export {place} does not fit the model: {detail}", place, detail)


class RequestError(TolariaError):
    """Base class for rejected requests of an operator."""


class InvalidFieldError(RequestError):
    """The request's field `field` has an invalid value."""

    def __init__(self, field: str, description: str) -> None:
        self.field, self.description = field, description
        super().__init__(f"{field}: {description}", field, description)


class NotAuthenticatedError(RequestError):
    """The caller presents no token, or one that is unknown or has expired."""


class NotPermittedError(RequestError):
    """The caller's role does not include the call."""


class TooManyCallsError(RequestError):
    """The caller has reached one of its limits; nothing was done, and it may try again later."""


class WrongStateError(RequestError):
    """The run's state does not allow the request."""


class ServiceDrainingError(RequestError):
    """The service is about to end and takes no further operation; one that is started again does."""


class StillUnderwayError(WrongStateError):
    """The operation takes longer than one call may wait; it continues, and a repeated request waits for it."""


class ProfileFailedError(RequestError):
    """A requested profile produced no trace; training is unaffected."""


class TooManySubscribersError(RequestError):
    """As many subscribers as the settings allow receive telemetry already."""


class SubscriberTooSlowError(RequestError):
    """A subscriber to telemetry leaves critical packets unread and is disconnected."""
