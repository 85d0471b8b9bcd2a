from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import anyio
import pytest

from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.peers.consultation import Consultation, Consultations
from tolaria.run.boundary import BoundaryPolicy, EpochBoundary

pytestmark = pytest.mark.anyio

NEVER_S = 1000.0
STATE = SystemStatePacket(packet_id="1")
REFUSALS = (("a", "no room"),)


class FakeConsultations:
    """Consultations whose one question the test answers and settles."""

    def __init__(self) -> None:
        self.question = Consultation(SystemStatePacket())

    def ask(self, state: SystemStatePacket, refusals: tuple[tuple[str, str], ...] = ()) -> Consultation:
        self.question.state, self.question.refusals = state, refusals
        return self.question


class Waiting:
    """A boundary that waits until it is `over`."""

    def __init__(self, consultations: FakeConsultations) -> None:
        self.consultations = consultations
        self.question = consultations.question
        self.over = False

    async def still(self) -> bool:
        """Whether it still waits when everything else is blocked."""
        await anyio.wait_all_tasks_blocked()
        return not self.over


@asynccontextmanager
async def waiting(
    *, budget_s: float = NEVER_S, tamiyo_s: float = NEVER_S, patient: bool = False, patience_s: float = 0.0
) -> AsyncIterator[Waiting]:
    """A boundary that began now, under that policy, and has asked."""
    it = Waiting(FakeConsultations())
    policy = BoundaryPolicy(budget_s, tamiyo_s, patient, patience_s)

    async def wait() -> None:
        boundary = EpochBoundary(cast("Consultations", it.consultations), policy)
        await boundary.wait_for_answer(STATE, REFUSALS, since_s=time.monotonic())
        it.over = True

    with anyio.fail_after(180):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            yield it


async def test_it_waits_until_all_is_settled() -> None:
    """Tamiyo's answer is not enough: Kasmina is asked after it. The question has the state and the refusals."""
    async with waiting() as it:
        assert (it.question.state, it.question.refusals) == (STATE, REFUSALS)
        assert await it.still()
        it.question.answered.set()
        assert await it.still()
        it.question.settled.set()
    assert it.over


async def test_a_tamiyo_that_has_used_up_its_share_is_not_waited_for() -> None:
    """Training goes on although the budget is far from spent."""
    async with waiting(tamiyo_s=0.0) as it:
        pass
    assert it.over
    assert not it.question.answered.is_set()


async def test_the_budget_ends_the_waiting_for_kasmina() -> None:
    """Tamiyo has answered in time; what is not settled when the budget ends is settled later."""
    async with waiting(budget_s=0.05) as it:
        it.question.answered.set()
    assert it.over
    assert not it.question.settled.is_set()


async def test_a_patient_boundary_ignores_the_budget() -> None:
    """It waits for the whole consultation, though budget and share are spent at once."""
    async with waiting(budget_s=0.0, tamiyo_s=0.0, patient=True, patience_s=NEVER_S) as it:
        it.question.answered.set()
        assert await it.still()
        it.question.settled.set()
    assert it.over


async def test_patience_ends() -> None:
    """A peer that never answers does not hold training up for good."""
    async with waiting(patient=True, patience_s=0.0) as it:
        pass
    assert it.over
