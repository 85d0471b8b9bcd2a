"""The two-phase rollback protocol as data: states, participants, votes, budgets, and the record of one rollback."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, unique
from types import MappingProxyType
from typing import Final, Protocol

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL, ROLLBACK_TIER_UNSPECIFIED, RollbackTier
from tolaria.config import RollbackSettings
from tolaria.errors import JournalError, TolariaError, WrongStateError
from tolaria.journal.rows import RollbackRow
from tolaria.signals import RollbackState
from tolaria.values.optimization import OPERATOR, Adjustment
from tolaria.values.spans import SpanContext, current_span

ID_BYTES_MAX: Final = 64
"""Bytes of a rollback_id that fit on the signal board."""

TIERS: Final[Mapping[str, RollbackTier.ValueType]] = MappingProxyType(
    {"auto": ROLLBACK_TIER_UNSPECIFIED, "fast": ROLLBACK_TIER_FAST, "full": ROLLBACK_TIER_FULL}
)
"""Tiers by the names that operators and the journal use."""

TOLARIA: Final = "tolaria"

HEALTH: Final = "health"
TAMIYO: Final = "tamiyo"
EMERGENCY: Final = "emergency"
ORIGINS: Final = (OPERATOR, HEALTH, TAMIYO, EMERGENCY)
"""Origins of rollbacks; `EMERGENCY` is a resume after a halt on an ill state."""

AUTOMATIC_ORIGINS: Final = frozenset({HEALTH, TAMIYO})

SHARES: Final[Mapping[str, float]] = MappingProxyType({"tamiyo": 0.3, "kasmina": 0.5, TOLARIA: 0.2})
"""Each participant's share of the budget for all its calls: 150, 250 and 100 ms of the fast tier's 500.

Time that peers do not use is Tolaria's; its own share cannot be used up by peers.
"""

# -- states ----------------------------------------------------------------------------------------------------------


@unique
class RollbackEvent(Enum):
    """Events of a rollback."""

    BEGUN = "begun"
    PREPARED = "prepared"
    """A restore point is chosen, the lane is at a step boundary, and every participant has been asked to prepare."""
    RESTORED = "restored"
    """The live state is that of the restore point."""
    CONFIRMED = "confirmed"
    FAILED = "failed"
    """The rollback is given up; before RESTORED the live state is unchanged."""
    EXPIRED = "expired"
    """The deadline passed before the live state changed."""


_GIVEN_UP: Final = {RollbackEvent.FAILED: RollbackState.ABORTED, RollbackEvent.EXPIRED: RollbackState.DEADLINE}

TRANSITIONS: Final[Mapping[RollbackState, Mapping[RollbackEvent, RollbackState]]] = MappingProxyType(
    {
        RollbackState.IDLE: {RollbackEvent.BEGUN: RollbackState.PREPARE},
        RollbackState.PREPARE: {RollbackEvent.PREPARED: RollbackState.COMMIT, **_GIVEN_UP},
        RollbackState.COMMIT: {RollbackEvent.RESTORED: RollbackState.CONFIRM, **_GIVEN_UP},
        # The deadline has been met, but the proof may fail.
        RollbackState.CONFIRM: {
            RollbackEvent.CONFIRMED: RollbackState.IDLE,
            RollbackEvent.FAILED: RollbackState.ABORTED,
        },
        # The board shows these two until the next rollback begins.
        RollbackState.ABORTED: {RollbackEvent.BEGUN: RollbackState.PREPARE},
        RollbackState.DEADLINE: {RollbackEvent.BEGUN: RollbackState.PREPARE},
    }
)


def next_state(state: RollbackState, event: RollbackEvent) -> RollbackState:
    """Returns the state after `event`. Raises WrongStateError for an event that is not in the table."""
    following = TRANSITIONS[state].get(event)
    if following is None:
        idle = RollbackEvent.BEGUN in TRANSITIONS[state]
        running = "no rollback is running" if idle else "another rollback is running"
        raise WrongStateError(f"a rollback cannot be {event.value}: {running} ({state.name.lower()})")
    return following


# -- participants ----------------------------------------------------------------------------------------------------


@unique
class Call(Enum):
    """Calls to a participant."""

    PREPARE = "prepare"
    COMMIT = "commit"
    CONFIRM = "confirm"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class ParticipantRequest:
    """The arguments of one call; `timeout_s` is the time that is left for its answer."""

    rollback_id: str
    target_step: int
    reason: str
    timeout_s: float


class ParticipantResponse(Protocol):
    """Whether a participant accepted the call, and a human-readable detail."""

    @property
    def accepted(self) -> bool: ...  # noqa: D102 - described by the class
    @property
    def detail(self) -> str: ...  # noqa: D102 - described by the class


class RollbackParticipant(Protocol):
    """A peer that takes part in rollbacks. Calls are idempotent by rollback_id and raise `PeerError` when they fail."""

    async def prepare(self, request: ParticipantRequest, /) -> ParticipantResponse:
        """Promises to roll back; changes nothing."""

    async def commit(self, request: ParticipantRequest, /) -> ParticipantResponse:
        """Rolls back."""

    async def confirm(self, request: ParticipantRequest, /) -> ParticipantResponse:
        """Makes the rollback final."""

    async def abort(self, request: ParticipantRequest, /) -> ParticipantResponse:
        """Withdraws the promise, or undoes the commit."""


@unique
class VoteOutcome(Enum):
    """Outcome of one call."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    SILENT = "silent"
    """No answer: the call may have taken effect or not."""
    NOT_ASKED = "not_asked"
    """The peer is known to be unreachable, or its share of the budget is used up."""


@dataclass(frozen=True, slots=True)
class Vote:
    """One call to a participant and its outcome; `latency_ms` is the time that Tolaria waited."""

    participant: str
    call: Call
    outcome: VoteOutcome
    detail: str
    latency_ms: float


_REQUIRED: Final = {Call.COMMIT: Call.PREPARE, Call.CONFIRM: Call.COMMIT}


def may_be_asked(votes: Sequence[Vote], participant: str, call: Call) -> bool:
    """Whether `call` applies after these votes: commit and confirm need an accepted call, abort a possible effect."""
    own = [vote for vote in votes if vote.participant == participant]
    if call is Call.PREPARE:
        return True
    if call is Call.ABORT:
        return any(vote.outcome in {VoteOutcome.ACCEPTED, VoteOutcome.SILENT} for vote in own)
    return any(vote.call is _REQUIRED[call] and vote.outcome is VoteOutcome.ACCEPTED for vote in own)


def has_quorum(votes: Sequence[Vote], peers: int) -> bool:
    """Whether a majority of all participants confirmed; Tolaria counts as having confirmed: 2 of 3."""
    confirmed = sum(vote.call is Call.CONFIRM and vote.outcome is VoteOutcome.ACCEPTED for vote in votes)
    return confirmed + 1 >= (peers + 1) // 2 + 1


def total_s(settings: RollbackSettings, tier: RollbackTier.ValueType) -> float:
    """Returns the whole budget in seconds; that of the full tier while the tier is unspecified."""
    return settings.fast_budget_s if tier == ROLLBACK_TIER_FAST else settings.full_budget_s


# -- one rollback ----------------------------------------------------------------------------------------------------


@unique
class Ending(Enum):
    """How a rollback ended, in the journal's words.

    Live state has changed after RESTORED, and after FAILED if `restored_step` is set: then the proof failed.
    """

    RESTORED = "restored"
    FAILED = "failed"
    ABORTED = "aborted"
    DEADLINE_EXCEEDED = "deadline_exceeded"


def rollback_id_of(request_id: str) -> str:
    """Returns the rollback_id for an operator's request: the same id where it fits on the board, else its digest."""
    encoded = request_id.encode()
    return request_id if len(encoded) <= ID_BYTES_MAX else hashlib.sha256(encoded).hexdigest()


@dataclass(slots=True, eq=False)
class Rollback:
    """One rollback, from the request to its outcome. The coordinator and the restorer fill it in.

    Args:
        tier: UNSPECIFIED takes the best restore point of both tiers; set when one is chosen.
        target_step: the nearest restore point at or before it is taken; None: as `run.restore_points.choose` does.
        reason: for the journal and the participants.
        origin: `OPERATOR`, `HEALTH`, `TAMIYO` or `EMERGENCY`.
        rollback_id: 1 to `ID_BYTES_MAX` bytes.
        checkpoint_id: exactly this checkpoint is taken, also a superseded one.
        before_step: restore points of this step and later ones are not taken; that of the first evidence, or the one
            that an earlier automatic rollback has restored.
        preferred_before: restore points of earlier steps than this are better, if there are any.
        lr_cut: adjustment of learning rates after the restore.
        trend: what is to be undone may be no illness: if that fails, training goes on.
        global_step: step of the run when the rollback was requested.
        began_s: time of the request in monotonic seconds.
        at_ns: time of the request in Unix nanoseconds.
        span: its span in a trace; until it begins, that of the request.
    """

    tier: RollbackTier.ValueType
    target_step: int | None
    reason: str
    origin: str
    rollback_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    checkpoint_id: str = ""
    before_step: int | None = None
    preferred_before: int | None = None
    lr_cut: Adjustment | None = None
    trend: bool = False
    global_step: int = 0
    began_s: float = field(default_factory=time.monotonic)
    at_ns: int = field(default_factory=time.time_ns)
    span: SpanContext | None = field(default_factory=current_span)

    chosen_step: int | None = field(default=None, init=False)
    """Step of the chosen restore point; None while none is chosen."""
    chosen: str = field(default="", init=False)
    """Which restore point was chosen, and why."""
    boundary_s: float | None = field(default=None, init=False)
    """When the lane was at a step boundary, and the live state saved if it is to be: the budget starts then."""
    saves_left: bool = field(default=False, init=False)
    """Whether the state that is left is to have a checkpoint, by which the rollback can be undone."""
    left_step: int = field(default=-1, init=False)
    """Step of the state that is left; -1 before the step boundary."""
    left_checkpoint_id: str = field(default="", init=False)
    """The checkpoint of that state; empty if it has none."""
    left_kept_until_ns: int = field(default=0, init=False)
    """Unix time until which that checkpoint, superseded, is kept, unless `superseded_kept` others follow it."""
    superseded_kept: int = field(default=0, init=False)
    left_not_kept: str = field(default="", init=False)
    """Why that state has no checkpoint."""
    made_checkpoint_id: str = field(default="", init=False)
    """The checkpoint of that state if it was made for this rollback, which must not go to it."""
    kept_ms: float = field(default=0.0, init=False)
    """Time that saving that state took; not part of the budget."""
    deadline_s: float = field(default=0.0, init=False)
    """Monotonic seconds by which the change of live state must have begun; it never begins later."""
    peers: int = field(default=0, init=False)
    votes: list[Vote] = field(default_factory=list, init=False)
    restore_begun: bool = field(default=False, init=False)
    """Whether the lane had begun to change live state when the restore could no longer be waited for."""
    restored_step: int = field(default=-1, init=False)
    """Step of the restored state; -1 while live state is unchanged."""
    state_digest: str = field(default="", init=False)
    """Digest of the live state after the restore; empty before."""
    expected_digest: str = field(default="", init=False)
    """Digest recorded when the restored state was captured."""
    restore_ms: float = field(default=0.0, init=False)
    """The lane's own work, without the wait for a step boundary."""
    decided_s: float | None = field(default=None, init=False)
    """When the state was restored, or the rollback given up."""
    attempt: int = field(default=0, init=False)
    """The attempt that training continues with; 0 before."""
    superseded: int = field(default=0, init=False)
    """Checkpoints that are no longer ancestors of the live state."""
    votes_before: int = field(default=0, init=False)
    """Votes from before the step boundary, whose time is not part of the budget."""
    ending: Ending | None = field(default=None, init=False)
    error: TolariaError | None = field(default=None, init=False)
    replaced_by: Rollback | None = field(default=None, init=False)
    """The second try, with another restore point, after this one failed; it is the one that counts."""
    unrecorded: JournalError | None = field(default=None, init=False)
    """Why the journal has no row for this rollback."""

    @property
    def automatic(self) -> bool:
        """Whether health or the controller has begun it, also to a named step: then only proven points count."""
        return self.origin in AUTOMATIC_ORIGINS

    @property
    def destination(self) -> int:
        """The step of the chosen restore point, or the one that was asked for; 0 while there is none."""
        return (self.target_step or 0) if self.chosen_step is None else self.chosen_step

    @property
    def proven(self) -> bool:
        """Whether the live state is, byte for byte, the captured one."""
        return self.restored_step >= 0 and self.state_digest == self.expected_digest

    @property
    def unproven(self) -> bool:
        """Whether live state was overwritten and is not what was captured: training must not continue on it."""
        return self.ending is Ending.FAILED and self.restored_step >= 0

    @property
    def coordinated(self) -> bool:
        """Whether a quorum of participants is at the step of the restored state."""
        same_step = self.restored_step == self.chosen_step
        return self.ending is Ending.RESTORED and same_step and has_quorum(self.votes, self.peers)

    @property
    def latency_ms(self) -> float:
        """Time from the request until the state was restored, or the rollback given up; 0 before."""
        return 0.0 if self.decided_s is None else (self.decided_s - self.began_s) * 1000

    @property
    def waited_ms(self) -> float:
        """Time from the request until the lane reached a step boundary, or until now; not part of the budget."""
        return ((self.boundary_s or self.decided_s or time.monotonic()) - self.began_s) * 1000 - self.kept_ms

    @property
    def restored_ms(self) -> float:
        """Time from the step boundary until the state was restored, or the rollback given up; 0 before."""
        if self.boundary_s is None or self.decided_s is None:
            return 0.0
        return (self.decided_s - self.boundary_s) * 1000

    def spent_s(self, participant: str) -> float:
        """Returns how much of its share a participant has used since the step boundary."""
        counted = self.votes[self.votes_before :]
        return sum(vote.latency_ms for vote in counted if vote.participant == participant) / 1000

    def again(self, tier: RollbackTier.ValueType) -> Rollback:
        """Returns a new rollback with the same purpose, limited to a tier."""
        rollback = Rollback(tier, self.target_step, self.reason, self.origin, before_step=self.before_step)
        rollback.lr_cut, rollback.global_step = self.lr_cut, self.global_step
        rollback.preferred_before, rollback.made_checkpoint_id = self.preferred_before, self.made_checkpoint_id
        rollback.left_step, rollback.left_checkpoint_id = self.left_step, self.left_checkpoint_id
        rollback.left_kept_until_ns, rollback.superseded_kept = self.left_kept_until_ns, self.superseded_kept
        rollback.left_not_kept, rollback.kept_ms, rollback.trend = self.left_not_kept, self.kept_ms, self.trend
        return rollback

    def end(self, ending: Ending, error: TolariaError | None = None) -> None:
        """Sets how the rollback ended, and why."""
        self.ending, self.error = ending, error

    def row(self, run_id: str) -> RollbackRow:
        """Returns the journal's row of a rollback that has ended; its reason includes the error."""
        ending = self.ending or Ending.FAILED
        return RollbackRow(
            rollback_id=self.rollback_id,
            at_ns=self.at_ns,
            run_id=run_id,
            tier=tier_name(self.tier),
            global_step=self.global_step if self.left_step < 0 else self.left_step,
            restored_step=self.restored_step if ending is Ending.RESTORED else -1,
            outcome=ending.value,
            reason=self.reason if self.error is None else f"{self.reason}: {self.error}",
            state_digest=self.state_digest,
            expected_digest=self.expected_digest,
            latency_ms=self.latency_ms,
            coordinated=int(self.coordinated),
            origin=self.origin,
            attempt=self.attempt if ending is Ending.RESTORED else 0,
            checkpoint_id=self.checkpoint_id,
            waited_ms=self.waited_ms,
            chosen=self.chosen,
        )


def tier_name(tier: RollbackTier.ValueType) -> str:
    """Returns auto, fast or full."""
    return next(name for name, value in TIERS.items() if value == tier)
