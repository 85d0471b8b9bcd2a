from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio
import pytest

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST
from support.runs import FakePeers, new_run, running
from tolaria.errors import PeerUnavailableError
from tolaria.rollback.participants import Call, RollbackOrder, Seat
from tolaria.rollback.protocol import Rollback

pytestmark = pytest.mark.anyio

BUDGET_S = 1.0


@dataclass(frozen=True)
class Said:
    """An answer."""

    accepted: bool
    detail: str = ""


Answer = Callable[[], Awaitable[Said]]


async def accepts() -> Said:
    """Yes."""
    return Said(accepted=True)


async def refuses() -> Said:
    """No."""
    return Said(accepted=False, detail="not now")


async def is_silent() -> Said:
    """Never answers."""
    await anyio.sleep_forever()
    raise AssertionError


async def is_dead() -> Said:
    """Cannot be reached."""
    raise PeerUnavailableError("kasmina", "connection refused")


class Participant:
    """Answers every call in one way, or from one on; notes which calls came, for which step."""

    def __init__(self, answer: Answer, since: Call = Call.PREPARE) -> None:
        self._answer = answer
        self._since = list(Call).index(since)
        self.calls: list[tuple[Call, int]] = []

    async def prepare(self, order: RollbackOrder, /) -> Said:
        return await self._meet(Call.PREPARE, order)

    async def commit(self, order: RollbackOrder, /) -> Said:
        return await self._meet(Call.COMMIT, order)

    async def confirm(self, order: RollbackOrder, /) -> Said:
        return await self._meet(Call.CONFIRM, order)

    async def abort(self, order: RollbackOrder, /) -> Said:
        return await self._meet(Call.ABORT, order)

    async def _meet(self, call: Call, order: RollbackOrder) -> Said:
        self.calls.append((call, order.target_step))
        return await (self._answer() if list(Call).index(call) >= self._since else accepts())


ALL = [Call.PREPARE, Call.COMMIT, Call.CONFIRM]


@pytest.mark.parametrize("since", ALL)
@pytest.mark.parametrize("answer", [accepts, refuses, is_silent, is_dead])
@pytest.mark.parametrize("other", [accepts, is_dead])
async def test_a_run_goes_back_with_whoever_takes_part(answer: Answer, other: Answer, since: Call) -> None:
    """Within the budget the state comes back whatever peers say; coordinated is 2 of 3; nobody is asked in vain."""
    tamiyo, kasmina = Participant(other), Participant(answer, since)
    peers = FakePeers()
    peers.seats = [Seat("tamiyo", tamiyo), Seat("kasmina", kasmina)]
    rollback = {"automatic": False, "every_steps": 1, "snapshots_max": 1000, "fast_budget_s": BUDGET_S}
    run = new_run(peers, epochs=10**6, sections={"rollback": rollback})
    async with running(run):
        await run.until(lambda: run.status.global_step > 10)
        outcome = await run.run.roll_back(Rollback(ROLLBACK_TIER_FAST, 7, "odd", "operator"))
        assert outcome.state_digest == outcome.expected_digest != ""
        assert outcome.latency_ms <= BUDGET_S * 1000
        assert outcome.coordinated == (accepts in {answer, other})
        last = ALL.index(Call.CONFIRM if answer is accepts else since)
        assert kasmina.calls == [(call, outcome.restored_step) for call in ALL[: last + 1]]
        step = run.module.global_step
        await run.until(lambda: run.module.global_step > step + 3)
        await run.run.stop("enough")
