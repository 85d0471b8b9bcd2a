"""Asking participants within their shares of the budget, and writing down what came of it.

Owns the bound on every question and the table from what went wrong to a stance. Must not know what follows from it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, assert_never

import anyio

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST
from tolaria.errors import BreakerOpenError, CallRefusedError, PeerError
from tolaria.rollback.budget import RollbackBudgets
from tolaria.rollback.orders import RollbackRun
from tolaria.rollback.participants import (
    Ballot,
    Call,
    RollbackOrder,
    RollbackParticipant,
    Seat,
    Stance,
    Vote,
    may_be_asked,
)

_GRACE_S: Final = 0.02
"""A participant's own timeout comes first, since it knows better what to say of it; this bounds one that has none."""


async def ask_in_turn(
    run: RollbackRun, seats: Sequence[Seat], call: Call, budgets: RollbackBudgets, clock: Callable[[], float]
) -> None:
    """Ask every participant that it makes sense to ask, in order, each within what it has left of its share."""
    for seat in seats:
        if may_be_asked(run.ballots, seat.name, call):
            left_s = budgets.share_s(seat.name, run.tier) - run.spent_s.get(seat.name, 0.0)
            await _ask(run, seat, call, left_s, clock)


async def abort_all(
    run: RollbackRun, seats: Sequence[Seat], budgets: RollbackBudgets, clock: Callable[[], float]
) -> None:
    """Tell every participant that may have prepared, all at once: whatever the tier, each within a fast share."""
    told = [seat for seat in seats if may_be_asked(run.ballots, seat.name, Call.ABORT)]
    async with anyio.create_task_group() as tasks:
        for seat in told:
            tasks.start_soon(_ask, run, seat, Call.ABORT, budgets.share_s(seat.name, ROLLBACK_TIER_FAST), clock)


async def _ask(run: RollbackRun, seat: Seat, call: Call, timeout_s: float, clock: Callable[[], float]) -> None:
    if timeout_s <= 0:
        run.ballots.append(Ballot(seat.name, call, Stance.NOT_ASKED, "its share of the budget is spent", 0.0))
        return
    order = RollbackOrder(run.request.rollback_id, run.target_step, run.request.reason, timeout_s)
    started_s = clock()
    stance, detail = await _answer(_bound_method(seat.participant, call)(order), timeout_s + _GRACE_S)
    waited_s = clock() - started_s
    run.spent_s[seat.name] = run.spent_s.get(seat.name, 0.0) + waited_s
    run.ballots.append(Ballot(seat.name, call, stance, detail, waited_s * 1000))


async def _answer(answer: Awaitable[Vote], bound_s: float) -> tuple[Stance, str]:
    try:
        with anyio.move_on_after(bound_s):
            vote = await answer
            return (Stance.ACCEPTED if vote.accepted else Stance.REFUSED), vote.detail
    except (BreakerOpenError, CallRefusedError) as error:
        return Stance.NOT_ASKED, error.detail
    except PeerError as error:
        return Stance.SILENT, error.detail
    return Stance.SILENT, "no answer in time"


def _bound_method(participant: RollbackParticipant, call: Call) -> Callable[[RollbackOrder], Awaitable[Vote]]:
    match call:
        case Call.PREPARE:
            return participant.prepare
        case Call.COMMIT:
            return participant.commit
        case Call.CONFIRM:
            return participant.confirm
        case Call.ABORT:
            return participant.abort
        case _:
            assert_never(call)
