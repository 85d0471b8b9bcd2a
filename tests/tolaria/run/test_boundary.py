from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import anyio
import pytest

from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.config import ControlSettings
from tolaria.peers.consultation import Consultation, Consultations
from tolaria.training.boundary import Boundary, BoundaryPolicy

pytestmark = pytest.mark.anyio

NEVER_S = 1000.0
STATE = SystemStatePacket(packet_id="1")
REFUSALS = (("a", "no room"),)


class Asked:
    """Stands where the consultant does: the test says when the question is answered and settled."""

    def __init__(self) -> None:
        self.it = Consultation(SystemStatePacket())

    def ask(self, state: SystemStatePacket, refusals: tuple[tuple[str, str], ...] = ()) -> Consultation:
        self.it.state, self.it.refusals = state, refusals
        return self.it


class Waiting:
    """A boundary that waits; `over` once it does no more."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.over = False

    async def still(self) -> bool:
        """Whether it waits when nothing more is to happen."""
        await anyio.wait_all_tasks_blocked()
        return not self.over


@asynccontextmanager
async def waiting(
    *, budget_s: float = NEVER_S, tamiyo_s: float = NEVER_S, patient: bool = False, patience_s: float = 0.0
) -> AsyncIterator[Waiting]:
    """A boundary that began just now, under that policy, and has put its question."""
    it = Waiting(Rollback())
    policy = BoundaryPolicy(budget_s, tamiyo_s, patient, patience_s)

    async def wait() -> None:
        await Boundary(cast("Consultations", it.asked), policy).wait_for_answer(
            STATE, REFUSALS, since_s=time.monotonic()
        )
        it.over = True

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            yield it


def test_the_policy_is_the_settings_in_seconds() -> None:
    """They are milliseconds there."""
    control = ControlSettings(boundary_budget_ms=20, tamiyo_budget_ms=15)
    assert BoundaryPolicy.of(control, patient=True, patience_s=7.0) == BoundaryPolicy(0.02, 0.015, True, 7.0)


async def test_it_waits_until_all_is_settled() -> None:
    """Tamiyo's answer alone is not all: Kasmina is told then. The question holds the state and the refusals."""
    async with waiting() as it:
        assert (it.asked.it.state, it.asked.it.refusals) == (STATE, REFUSALS)
        assert await it.still()
        it.asked.it.answered.set()
        assert await it.still()
        it.asked.it.settled.set()
    assert it.over


async def test_a_tamiyo_that_has_used_up_her_share_is_not_waited_for() -> None:
    """Training goes on although the budget is far from spent."""
    async with waiting(tamiyo_s=0.0) as it:
        pass
    assert it.over
    assert not it.asked.it.answered.is_set()


async def test_the_budget_ends_the_waiting_for_kasmina() -> None:
    """Tamiyo has answered in time; what is not settled when the budget ends is settled later."""
    async with waiting(budget_s=0.05) as it:
        it.asked.it.answered.set()
    assert it.over
    assert not it.asked.it.settled.is_set()


async def test_a_patient_boundary_knows_no_budget() -> None:
    """It waits for the whole consultation, though budget and share are spent at once."""
    async with waiting(budget_s=0.0, tamiyo_s=0.0, patient=True, patience_s=NEVER_S) as it:
        it.asked.it.answered.set()
        assert await it.still()
        it.asked.it.settled.set()
    assert it.over


async def test_patience_ends() -> None:
    """A peer that never answers holds nobody up for good."""
    async with waiting(patient=True, patience_s=0.0) as it:
        pass
    assert it.over
