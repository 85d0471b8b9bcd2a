"""Coordinates a rollback: prepare, commit and confirm with every participant, or abort.

Peers are asked one after the other, each within its share of the budget; the rollback continues without a peer that
refuses or does not answer. They prepare while the lane is on its way to a step boundary. The budget begins there, and
one deadline bounds all that precedes the restore: the lane begins to change live state before it or never, as its
`RestoreGate` decides.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Mapping
from typing import Final, Protocol

import anyio
import anyio.lowlevel
import structlog

from tolaria.config import RollbackSettings
from tolaria.errors import (
    BreakerOpenError,
    CallRefusedError,
    InvalidFieldError,
    JournalError,
    JournalUnavailableError,
    LaneError,
    PeerError,
    RestoreAbandonedError,
    RestoreUnprovenError,
    SignalError,
    TolariaError,
)
from tolaria.journal.async_journal import AsyncJournal
from tolaria.rollback.protocol import (
    ID_BYTES_MAX,
    SHARES,
    TOLARIA,
    Call,
    Ending,
    ParticipantRequest,
    ParticipantResponse,
    Rollback,
    RollbackEvent,
    RollbackParticipant,
    Vote,
    VoteOutcome,
    may_be_asked,
    next_state,
    total_s,
)
from tolaria.signals import RollbackState, RollbackWriter

RECORD_S_MAX: Final = 0.5
"""Longest wait for the journal at the end of a rollback, during which the lane is held."""

_GRACE_S: Final = 0.02
"""Added to a participant's own timeout, whose error says more; bounds a participant without a timeout."""

_LAST_EVENT: Final = {
    Ending.RESTORED: RollbackEvent.CONFIRMED,
    Ending.FAILED: RollbackEvent.FAILED,
    Ending.ABORTED: RollbackEvent.FAILED,
    Ending.DEADLINE_EXCEEDED: RollbackEvent.EXPIRED,
}


class Restorer(Protocol):
    """The run's part in a rollback. The coroutines may be cancelled at any time and raise `TolariaError` on failure."""

    async def choose(self, rollback: Rollback, /) -> None:
        """Sets `tier`, `chosen_step` and `chosen`. Raises NoCheckpointError if there is no such restore point."""

    async def reach_boundary(self) -> None:
        """Returns when the lane is at a step boundary. Raises LaneStoppedError if it ends first."""

    async def keep(self, rollback: Rollback, /) -> None:
        """Sets `left_step`; saves the live state if it is to be, and sets `left_checkpoint_id` or `left_not_kept`."""

    async def restore(self, rollback: Rollback, /) -> None:
        """Restores the target at the next step boundary and sets `restored_step`, the digests and `restore_ms`.

        Raises RestoreAbandonedError past the deadline or after `forbid`; the live state is unchanged then.
        """

    def forbid(self, rollback: Rollback, /) -> bool:
        """Forbids the restore to change live state; returns False when the change has already begun."""


class RollbackCoordinator:
    """Carries out rollbacks, one at a time. Used on the event loop only.

    Args:
        participants: the peers by name, in the order in which they are asked; each has a share in `SHARES`.
        restorer: finds and restores the state.
        run_id: for the journal.
        settings: how long a rollback may take.
        board: shows every state of a rollback.
        journal: receives a row for each rollback.

    Raises:
        ValueError: a participant has no share.
    """

    def __init__(
        self,
        participants: Mapping[str, RollbackParticipant],
        restorer: Restorer,
        *,
        run_id: str,
        settings: RollbackSettings,
        board: RollbackWriter,
        journal: AsyncJournal,
    ) -> None:
        if unknown := participants.keys() - (SHARES.keys() - {TOLARIA}):
            raise ValueError(f"no share of the budget for {', '.join(sorted(unknown))}")
        self._calls = {
            name: {Call.PREPARE: p.prepare, Call.COMMIT: p.commit, Call.CONFIRM: p.confirm, Call.ABORT: p.abort}
            for name, p in participants.items()
        }
        self._restorer = restorer
        self._run_id = run_id
        self.settings = settings
        self._board = board
        self._journal = journal
        self._log = structlog.get_logger(__name__)
        self._state = RollbackState.IDLE

    async def run(self, rollback: Rollback) -> None:
        """Carries out `rollback` and sets how it ended; a failure is an ending, not an exception.

        When the caller is cancelled, the rollback is aborted, or completed once the lane has begun to change live
        state; both are recorded. Only cancel scopes may cancel: a task that is cancelled directly, as gRPC cancels its
        handlers, has to wait for another task that calls this. Errors other than `TolariaError` are raised in a group.

        Raises:
            WrongStateError: another rollback is running.
            InvalidFieldError: the rollback_id is empty or too long.
        """
        if not 0 < len(rollback.rollback_id.encode()) <= ID_BYTES_MAX:
            raise InvalidFieldError("rollback_id", f"must have 1 to {ID_BYTES_MAX} bytes")
        state = next_state(self._state, RollbackEvent.BEGUN)
        rollback.peers = len(self._calls)
        rollback.deadline_s = rollback.began_s + total_s(self.settings, rollback.tier)
        self._show(rollback, state)
        try:
            await self._carry_out(rollback)
        finally:
            with anyio.CancelScope(shield=True):
                await self._conclude(rollback)

    # -- phases ------------------------------------------------------------------------------------------------------

    async def _carry_out(self, rollback: Rollback) -> None:
        try:
            await self._choose(rollback)
            await self._prepare(rollback)
            await self._ask_in_turn(rollback, Call.COMMIT)
            await self._restore(rollback)
            if not rollback.proven:
                raise RestoreUnprovenError(rollback.restored_step)
            await self._ask_in_turn(rollback, Call.CONFIRM)
            rollback.end(Ending.RESTORED)
        except RestoreAbandonedError as error:
            rollback.end(Ending.DEADLINE_EXCEEDED, error)
        except TolariaError as error:
            rollback.end(Ending.FAILED, error)
        except anyio.get_cancelled_exc_class():
            rollback.end(*_ending_when_cancelled(rollback))
            raise

    async def _choose(self, rollback: Rollback) -> None:
        with anyio.move_on_after(self._left_s(rollback)) as scope:
            await self._restorer.choose(rollback)
        if scope.cancelled_caught:
            raise RestoreAbandonedError("looking for a restore point")

    async def _prepare(self, rollback: Rollback) -> None:
        """Has every participant prepare while the lane reaches a step boundary, where the budget begins.

        Before that the live state is saved, if it is to be. After a wait longer than a prepare may take they are asked
        once more.
        """
        failure: TolariaError | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._ask_in_turn, rollback, Call.PREPARE)
            try:
                await self._restorer.reach_boundary()
                await self._keep(rollback)
            except TolariaError as error:
                failure = error
                tasks.cancel_scope.cancel()
            reached_s = rollback.boundary_s = time.monotonic()
            rollback.votes_before = len(rollback.votes)
            rollback.deadline_s = reached_s + total_s(self.settings, rollback.tier)
            self._show(rollback, self._state)  # with the tier, target and deadline that are known now
        if failure is not None:
            raise failure
        if reached_s - rollback.began_s > self.settings.fast_budget_s:
            await self._ask_in_turn(rollback, Call.PREPARE)
        if self._left_s(rollback) <= 0:
            raise RestoreAbandonedError("preparing")
        self._move(rollback, RollbackEvent.PREPARED)

    async def _keep(self, rollback: Rollback) -> None:
        """Has the state that is left saved, once, within the full tier's budget; a failure stops no rollback."""
        if rollback.left_step >= 0:
            return
        started_s, limit_s = time.monotonic(), self.settings.full_budget_s
        with anyio.move_on_after(limit_s) as scope:
            await self._restorer.keep(rollback)
        if scope.cancelled_caught:
            rollback.left_not_kept = f"it was not on disk within {limit_s:g} s; restore-points lists it once it is"
        if rollback.saves_left:
            rollback.kept_ms = (time.monotonic() - started_s) * 1000

    async def _restore(self, rollback: Rollback) -> None:
        """Has the lane restore; at the deadline or when cancelled, forbids it unless live state is already changing."""
        late = finished = False

        async def watch() -> None:
            nonlocal late
            try:
                await anyio.sleep(max(0.0, self._left_s(rollback)))
                late = True
            finally:
                if not finished:
                    rollback.restore_begun = not self._restorer.forbid(rollback)
                    if not rollback.restore_begun:
                        work.cancel()

        work = anyio.CancelScope(shield=True)  # `watch` passes a cancellation on only if the lane has not begun
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            with work:
                try:
                    await self._restorer.restore(rollback)
                    rollback.decided_s = time.monotonic()
                    self._move(rollback, RollbackEvent.RESTORED)
                except TolariaError as error:
                    rollback.error = error
                finished = True
            if work.cancelled_caught and not late:
                await anyio.lowlevel.checkpoint()  # the caller was cancelled: its cancellation is raised here
            tasks.cancel_scope.cancel()
        if work.cancelled_caught:
            raise RestoreAbandonedError("waiting for the lane")
        if rollback.error is not None:
            raise rollback.error

    async def _conclude(self, rollback: Rollback) -> None:
        """Shows and records how the rollback ended, in bounded time; unless it succeeded, aborts it with the peers."""
        if rollback.decided_s is None:
            rollback.decided_s = time.monotonic()
        rollback.ending = rollback.ending or Ending.FAILED
        self._move(rollback, _LAST_EVENT[rollback.ending])
        if rollback.ending is not Ending.RESTORED:
            await self._abort(rollback)
        late = f"it did not answer within {RECORD_S_MAX:g} s; the row is written later"  # by `put`, when cancelled
        rollback.unrecorded = JournalUnavailableError(late)
        try:
            with anyio.move_on_after(RECORD_S_MAX):
                await self._journal.put(rollback.row(self._run_id))
                rollback.unrecorded = None
        except JournalError as error:
            rollback.unrecorded = error

    # -- participants ------------------------------------------------------------------------------------------------

    async def _ask_in_turn(self, rollback: Rollback, call: Call) -> None:
        """Asks every participant that may be asked, in order, each within the rest of its share."""
        for name in self._calls:
            if may_be_asked(rollback.votes, name, call):
                share_s = SHARES[name] * total_s(self.settings, rollback.tier)
                await self._ask(rollback, name, call, share_s - rollback.spent_s(name))

    async def _abort(self, rollback: Rollback) -> None:
        """Aborts with every participant that may have prepared, all at once, within its share of the fast tier."""
        async with anyio.create_task_group() as tasks:
            for name in self._calls:
                if may_be_asked(rollback.votes, name, Call.ABORT):
                    share_s = SHARES[name] * self.settings.fast_budget_s
                    tasks.start_soon(self._ask, rollback, name, Call.ABORT, share_s)

    async def _ask(self, rollback: Rollback, name: str, call: Call, timeout_s: float) -> None:
        if timeout_s <= 0:
            rollback.votes.append(Vote(name, call, VoteOutcome.NOT_ASKED, "its share of the budget is used up", 0.0))
            return
        request = ParticipantRequest(rollback.rollback_id, rollback.destination, rollback.reason, timeout_s)
        started_s = time.monotonic()
        outcome, detail = await _outcome(self._calls[name][call](request), timeout_s + _GRACE_S)
        rollback.votes.append(Vote(name, call, outcome, detail, (time.monotonic() - started_s) * 1000))

    # -- state -------------------------------------------------------------------------------------------------------

    def _left_s(self, rollback: Rollback) -> float:
        return rollback.deadline_s - time.monotonic()

    def _move(self, rollback: Rollback, event: RollbackEvent) -> None:
        self._show(rollback, next_state(self._state, event))

    def _show(self, rollback: Rollback, state: RollbackState) -> None:
        self._state = state
        try:
            self._board.write(
                state,
                rollback_id=rollback.rollback_id,
                target_step=rollback.destination,
                deadline_ns=int(rollback.deadline_s * 1e9),
                tier=rollback.tier,
            )
        except SignalError:  # a board that cannot be written does not stop a rollback
            self._log.exception("signal_board_not_written")


async def _outcome(call: Awaitable[ParticipantResponse], bound_s: float) -> tuple[VoteOutcome, str]:
    try:
        with anyio.move_on_after(bound_s):
            response = await call
            return (VoteOutcome.ACCEPTED if response.accepted else VoteOutcome.REFUSED), response.detail
    except (BreakerOpenError, CallRefusedError) as error:
        return VoteOutcome.NOT_ASKED, error.detail
    except PeerError as error:
        return VoteOutcome.SILENT, error.detail
    return VoteOutcome.SILENT, "no answer in time"


def _ending_when_cancelled(rollback: Rollback) -> tuple[Ending, TolariaError | None]:
    """Returns how a rollback whose caller has been cancelled ends."""
    if rollback.proven:
        return Ending.RESTORED, None
    if rollback.restored_step >= 0:
        return Ending.FAILED, RestoreUnprovenError(rollback.restored_step)
    if rollback.error is not None:
        return Ending.FAILED, rollback.error
    if rollback.restore_begun:
        return Ending.FAILED, LaneError("the restore was not waited for: which state is live now is not known")
    return Ending.ABORTED, None
