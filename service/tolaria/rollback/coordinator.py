"""A rollback from trigger to proof: prepare, commit, confirm, with every participant, within one deadline.

Owns the order of events, the deadline and its cancellation, and what each rollback has become. Runs on the event loop;
must not know tensors, transports, metrics or the board's bytes.

Peers are asked one after the other, each within its own share of the budget; whoever refuses or is silent is asked no
more, and the rollback goes on without it. The lane then restores by the deadline or not at all: see `CommitGate`.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import anyio
import anyio.lowlevel

from leyline.v1.enums_pb2 import (
    ROLLBACK_TIER_FAST,
    ROLLBACK_TIER_FULL,
    ROLLBACK_TIER_UNSPECIFIED,
    RollbackTier,
)
from tolaria.errors import (
    InvalidFieldError,
    JournalError,
    JournalUnavailableError,
    LaneError,
    NoCheckpointError,
    RestoreAbandonedError,
    RestoreUnprovenError,
    TolariaError,
)
from tolaria.journal.rows import RollbackRow
from tolaria.rollback.budget import TOLARIA, RollbackBudgets
from tolaria.rollback.commit_gate import CommitGate
from tolaria.rollback.orders import (
    ID_BYTES_MAX,
    Ending,
    RestoreOrder,
    RestoreOutcome,
    Restorer,
    RollbackOutcome,
    RollbackRequest,
    RollbackRun,
    row_of,
    tier_word,
)
from tolaria.rollback.participants import Call, Seat, is_coordinated
from tolaria.rollback.phases import Phase, RollbackEvent, after
from tolaria.rollback.polling import abort_all, ask_in_turn

OUTCOMES_KEPT: Final = 128
RECORD_S_MAX: Final = 0.5
"""Longest that the end of a rollback, and with it the lane, waits for the journal."""

_LAST_EVENT: Final = {
    Ending.RESTORED: RollbackEvent.CONFIRMED,
    Ending.FAILED: RollbackEvent.FAILED,
    Ending.ABORTED: RollbackEvent.FAILED,
    Ending.DEADLINE_EXCEEDED: RollbackEvent.EXPIRED,
}

OnSlot = Callable[[Phase, str, int, int, RollbackTier.ValueType], None]
"""Takes state, rollback_id, target_step, deadline_ns (monotonic) and tier, as the board does. Must not raise."""


@dataclass(frozen=True, slots=True)
class Clocks:
    """Seconds that only go forward, for deadlines, read from the lane's thread too; wall-clock ns for the journal."""

    monotonic_s: Callable[[], float] = time.monotonic
    wall_ns: Callable[[], int] = time.time_ns


class RollbackCoordinator:
    """Carries rollbacks out, one at a time.

    Args:
        seats: the peers, in the order in which they are asked; each has a share in `budgets`.
        restorer: the lane's part.
        run_id: for the journal.
        budgets: how long it may take.
        on_slot: shows every phase on the board.
        record: writes the journal's row, not on the event loop; a `JournalError` of it is part of the outcome.
            Cancelled because it takes long, it has the row written later.
        clocks: time.
    """

    def __init__(
        self,
        seats: Sequence[Seat],
        restorer: Restorer,
        *,
        run_id: str,
        budgets: RollbackBudgets,
        on_slot: OnSlot,
        record: Callable[[RollbackRow], Awaitable[None]],
        clocks: Clocks,
    ) -> None:
        if unknown := [seat.name for seat in seats if seat.name not in budgets.shares or seat.name == TOLARIA]:
            raise ValueError(f"no share of the budget for {', '.join(unknown)}")
        self._seats = tuple(seats)
        self._restorer = restorer
        self._run_id = run_id
        self._budgets = budgets
        self._on_slot = on_slot
        self._record = record
        self._clocks = clocks
        self._phase = Phase.IDLE
        self._running: tuple[str, anyio.Event] | None = None
        self._outcomes: OrderedDict[str, RollbackOutcome] = OrderedDict()

    @property
    def phase(self) -> Phase:
        """Where the current rollback is, or how the last one ended: IDLE, ABORTED or DEADLINE."""
        return self._phase

    async def roll_back(self, request: RollbackRequest) -> RollbackOutcome:
        """Carry the request out; a failure is an outcome, not an exception.

        Asked again with an id that has been carried out, or is being, it answers with that rollback's outcome. Whoever
        is cancelled while waiting here cancels the rollback: it is taken back, or, once the lane has begun to copy, it
        is seen through; both are recorded. Only scopes may cancel: a task that others cancel directly, as gRPC does
        with its handlers, must let another one wait here. Errors that are not `TolariaError`s come out in a group.

        Raises:
            WrongStateError: another rollback is running. It is not queued: what that one restores is not what this
                one was asked for.
            InvalidFieldError: a rollback_id that is empty or longer than 64 bytes.
        """
        while self._running is not None and self._running[0] == request.rollback_id:
            await self._running[1].wait()
        if (known := self._outcomes.get(request.rollback_id)) is not None:
            return known
        run, ended = self._begin(request)
        try:
            await self._carry_out(run)
        finally:
            try:
                with anyio.CancelScope(shield=True):
                    outcome = await self._conclude(run)
            finally:
                self._running = None
                ended.set()
        return outcome

    # -- in order ------------------------------------------------------------------------------------------------

    def _begin(self, request: RollbackRequest) -> tuple[RollbackRun, anyio.Event]:
        if not 0 < len(request.rollback_id.encode()) <= ID_BYTES_MAX:
            raise InvalidFieldError("rollback_id", f"must have 1 to {ID_BYTES_MAX} bytes")
        phase = after(self._phase, RollbackEvent.BEGUN)
        now_s = self._clocks.monotonic_s()
        run = RollbackRun(
            request=request,
            started_s=now_s,
            at_ns=self._clocks.wall_ns(),
            tier=request.tier,
            target_step=request.target_step or 0,
            deadline_s=now_s + self._budgets.total_s(request.tier),
        )
        ended = anyio.Event()
        self._running = (request.rollback_id, ended)
        self._enter(run, phase)
        return run, ended

    async def _carry_out(self, run: RollbackRun) -> None:
        try:
            await self._prepare(run)
            await self._commit(run)
            await ask_in_turn(run, self._seats, Call.CONFIRM, self._budgets, self._clocks.monotonic_s)
            run.end(Ending.RESTORED, None)
        except RestoreAbandonedError as error:
            run.end(Ending.DEADLINE_EXCEEDED, error)
        except TolariaError as error:
            run.end(Ending.FAILED, error)
        except anyio.get_cancelled_exc_class():
            run.end(*_cancelled(run))
            raise

    async def _prepare(self, run: RollbackRun) -> None:
        with anyio.move_on_after(self._left_s(run)) as scope:
            run.tier, run.target_step = await self._locate(run.request)
        if scope.cancelled_caught:
            raise RestoreAbandonedError("looking for a point to go back to")
        run.deadline_s = run.started_s + self._budgets.total_s(run.tier)
        self._enter(run, self._phase)  # now with tier, target and deadline
        await ask_in_turn(run, self._seats, Call.PREPARE, self._budgets, self._clocks.monotonic_s)
        if self._left_s(run) <= 0:
            raise RestoreAbandonedError("preparing")
        self._move(run, RollbackEvent.PREPARED)

    async def _locate(self, request: RollbackRequest) -> tuple[RollbackTier.ValueType, int]:
        automatic = request.tier == ROLLBACK_TIER_UNSPECIFIED
        tiers = (ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL) if automatic else (request.tier,)
        for tier in tiers:
            step = await self._restorer.locate(tier, request.target_step)
            if step is not None:
                return tier, step
        where = "" if request.target_step is None else f" at or before step {request.target_step}"
        raise NoCheckpointError(f"nothing to go back to: no point of the {tier_word(request.tier)} tier{where}")

    async def _commit(self, run: RollbackRun) -> None:
        await ask_in_turn(run, self._seats, Call.COMMIT, self._budgets, self._clocks.monotonic_s)
        await self._restore(run)
        if not run.proven:
            raise RestoreUnprovenError(run.restored_step)

    async def _restore(self, run: RollbackRun) -> None:
        """Let the lane restore. At the deadline, or when cancelled, it is cancelled, unless it is copying by then."""
        gate = CommitGate(run.deadline_s, self._clocks.monotonic_s)
        order = RestoreOrder(
            run.request.rollback_id, run.tier, run.target_step, run.deadline_s, gate.expired, gate.refuses
        )
        missed = False

        async def watch() -> None:
            nonlocal missed
            try:
                await anyio.sleep(max(0.0, self._left_s(run)))
                missed = True
            finally:
                run.granted = not gate.shut()
                if not run.granted:
                    work.cancel()

        failure: TolariaError | None = None
        work = anyio.CancelScope(shield=True)  # against our own cancellation, which `watch` passes on if it may
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            with work:
                try:
                    self._landed(run, await self._restorer.restore(order))
                except TolariaError as error:
                    failure = error
            if work.cancelled_caught and not missed:
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
        if work.cancelled_caught:
            raise RestoreAbandonedError("waiting for the lane")
        if failure is not None:
            raise failure

    def _landed(self, run: RollbackRun, restored: RestoreOutcome) -> None:
        """Note what is true from now on, before anything else can happen to this task."""
        run.restored = restored
        run.decided_s = self._clocks.monotonic_s()
        self._move(run, RollbackEvent.RESTORED)

    async def _conclude(self, run: RollbackRun) -> RollbackOutcome:
        """Show, keep and record what it has become; abort peers if that is nothing. Runs shielded, but bounded."""
        run.decided_s = run.decided_s or self._clocks.monotonic_s()
        ending = run.ending or Ending.FAILED
        self._move(run, _LAST_EVENT[ending])
        if ending is not Ending.RESTORED:
            await abort_all(run, self._seats, self._budgets, self._clocks.monotonic_s)
        outcome = self._outcome(run, ending)
        outcome = replace(outcome, unrecorded=await self._unrecorded(row_of(outcome, run, self._run_id)))
        self._outcomes[outcome.rollback_id] = outcome
        if len(self._outcomes) > OUTCOMES_KEPT:
            self._outcomes.popitem(last=False)
        return outcome

    async def _unrecorded(self, row: RollbackRow) -> JournalError | None:
        """Record it; why the journal does not hold it."""
        try:
            with anyio.move_on_after(RECORD_S_MAX):
                await self._record(row)
                return None
        except JournalError as error:
            return error
        return JournalUnavailableError(f"it did not answer within {RECORD_S_MAX:g} s; the row is written later")

    # -- details -------------------------------------------------------------------------------------------------

    def _outcome(self, run: RollbackRun, ending: Ending) -> RollbackOutcome:
        restored = run.restored or RestoreOutcome(-1, "", "", 0.0)
        # Peers went to the target; where the lane had to go further back, they and we are not at one.
        together = is_coordinated(run.ballots, len(self._seats)) and restored.restored_step == run.target_step
        return RollbackOutcome(
            rollback_id=run.request.rollback_id,
            tier=run.tier,
            target_step=run.target_step,
            ending=ending,
            restored_step=restored.restored_step,
            state_digest=restored.state_digest,
            expected_digest=restored.expected_digest,
            latency_ms=((run.decided_s or run.started_s) - run.started_s) * 1000,
            restore_ms=restored.latency_ms,
            coordinated=together and ending is Ending.RESTORED,
            votes=tuple(run.ballots),
            error=run.error,
        )

    def _left_s(self, run: RollbackRun) -> float:
        return run.deadline_s - self._clocks.monotonic_s()

    def _move(self, run: RollbackRun, event: RollbackEvent) -> None:
        self._enter(run, after(self._phase, event))

    def _enter(self, run: RollbackRun, phase: Phase) -> None:
        self._phase = phase
        self._on_slot(phase, run.request.rollback_id, run.target_step, int(run.deadline_s * 1e9), run.tier)


def _cancelled(run: RollbackRun) -> tuple[Ending, TolariaError | None]:
    """What a rollback has become whose caller is gone."""
    if run.proven:
        return Ending.RESTORED, None
    if run.restored is not None:
        return Ending.FAILED, RestoreUnprovenError(run.restored_step)
    if run.granted:
        return Ending.FAILED, LaneError("nobody waited for the lane's copy: which state is live now is not known")
    return Ending.ABORTED, None
