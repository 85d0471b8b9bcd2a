"""What one rollback is asked, what it becomes, and what is kept of it. Data only; knows no clock and no peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, unique
from typing import Final, Protocol

from leyline.v1.enums_pb2 import RollbackTier
from tolaria.errors import JournalError, TolariaError
from tolaria.journal.rows import RollbackRow
from tolaria.rollback.participants import Ballot

ID_BYTES_MAX: Final = 64
"""Of a rollback_id: the board has room for that."""


@dataclass(frozen=True, slots=True)
class RollbackRequest:
    """What is asked for.

    Args:
        rollback_id: 1 to `ID_BYTES_MAX` bytes; the same one is carried out once.
        tier: UNSPECIFIED takes the fast one if it has a point, else the full one.
        target_step: go to the nearest point at or before it; None: to the newest.
        global_step: where training is now, for the journal.
        reason: for the journal and the participants.
    """

    rollback_id: str
    tier: RollbackTier.ValueType
    target_step: int | None
    global_step: int
    reason: str


@dataclass(frozen=True, slots=True)
class RestoreOrder:
    """What the lane shall do: bring back the tier's point nearest at or before `target_step`.

    `deadline_s` is on the coordinator's clock. `expired` may be asked as often as one likes while nothing changes;
    `refuses` exactly before live state does: False is the permission, after which the coordinator waits for the end.
    """

    rollback_id: str
    tier: RollbackTier.ValueType
    target_step: int
    deadline_s: float
    expired: Callable[[], bool]
    refuses: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class RestoreOutcome:
    """What the lane has brought back. `latency_ms` is the lane's own work, without waiting for a fence.

    `state_digest` is of the live state afterwards, `expected_digest` the one recorded when it was captured.
    """

    restored_step: int
    state_digest: str
    expected_digest: str
    latency_ms: float


class Restorer(Protocol):
    """The lane's part. Both methods may be cancelled at any time, and raise `TolariaError`s when they fail."""

    async def locate(self, tier: RollbackTier.ValueType, at_or_before: int | None, /) -> int | None:
        """The step of the tier's nearest point, FAST or FULL; None: it has none."""
        ...

    async def restore(self, order: RestoreOrder, /) -> RestoreOutcome:
        """Bring it back at the next fence. Raises RestoreAbandonedError once `order` says so; nothing changed then."""
        ...


@unique
class Ending(Enum):
    """How a rollback ended; the values are the journal's words. Only RESTORED may have changed live state.

    FAILED with `restored_step` set is the exception: the copy was made, and the proof of it failed. The live state is
    then neither what it was nor what was captured; see `RollbackOutcome.unproven`.
    """

    RESTORED = "restored"
    FAILED = "failed"
    ABORTED = "aborted"
    DEADLINE_EXCEEDED = "deadline_exceeded"


@dataclass(frozen=True, slots=True)
class RollbackOutcome:
    """How a rollback ended. `restored_step` is -1 and the digests are empty where nothing was copied.

    `latency_ms`: from the trigger until the live state was back, or given up. `restore_ms`: the lane's own part.
    `unrecorded`: why the journal does not hold it.
    """

    rollback_id: str
    tier: RollbackTier.ValueType
    target_step: int
    ending: Ending
    restored_step: int
    state_digest: str
    expected_digest: str
    latency_ms: float
    restore_ms: float
    coordinated: bool
    votes: tuple[Ballot, ...]
    error: TolariaError | None
    unrecorded: JournalError | None = None

    @property
    def unproven(self) -> bool:
        """Whether live state was overwritten with something else than what was captured: nobody may train on."""
        return self.ending is Ending.FAILED and self.restored_step >= 0


@dataclass(slots=True)
class RollbackRun:
    """One rollback while it runs. `granted`: the lane was seen to have begun to copy; what came of it is `restored`."""

    request: RollbackRequest
    started_s: float
    at_ns: int
    tier: RollbackTier.ValueType
    target_step: int
    deadline_s: float
    ballots: list[Ballot] = field(default_factory=list)
    spent_s: dict[str, float] = field(default_factory=dict)
    granted: bool = False
    restored: RestoreOutcome | None = None
    decided_s: float | None = None
    ending: Ending | None = None
    error: TolariaError | None = None

    @property
    def restored_step(self) -> int:
        """The step that the lane copied; -1: none."""
        return -1 if self.restored is None else self.restored.restored_step

    @property
    def proven(self) -> bool:
        """Whether the live state is, byte for byte, what was captured."""
        return self.restored is not None and self.restored.state_digest == self.restored.expected_digest

    def end(self, ending: Ending, error: TolariaError | None) -> None:
        """It is over, and why."""
        self.ending, self.error = ending, error


def tier_word(tier: RollbackTier.ValueType) -> str:
    """auto, fast or full."""
    name = RollbackTier.Name(tier).removeprefix("ROLLBACK_TIER_").lower()
    return "auto" if name == "unspecified" else name


def row_of(outcome: RollbackOutcome, run: RollbackRun, run_id: str) -> RollbackRow:
    """The journal's row; its reason holds the error, if there was one."""
    reason = run.request.reason if outcome.error is None else f"{run.request.reason}: {outcome.error}"
    return RollbackRow(
        rollback_id=outcome.rollback_id,
        at_ns=run.at_ns,
        run_id=run_id,
        tier=tier_word(outcome.tier),
        global_step=run.request.global_step,
        restored_step=outcome.restored_step if outcome.ending is Ending.RESTORED else -1,
        outcome=outcome.ending.value,
        reason=reason,
        state_digest=outcome.state_digest,
        expected_digest=outcome.expected_digest,
        latency_ms=outcome.latency_ms,
        coordinated=int(outcome.coordinated),
    )
