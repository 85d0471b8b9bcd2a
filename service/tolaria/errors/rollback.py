"""Why training state cannot be captured, kept or brought back. Must not know how that is done."""

from __future__ import annotations

from tolaria.errors.base import TolariaError


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


class RestoreUnprovenError(RollbackError):
    """Raised when the live state, overwritten by a restore, has not the digest of what was captured: the proof failed.

    What is live then is no state that the run was ever in. `step` is the one that it was to be.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(f"the live state was overwritten and is not what was captured at step {step}")


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
