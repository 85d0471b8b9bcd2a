"""The end of an epoch: tell the controller how things stand and give its answer a chance, within a budget.

Owns the budget. Must not know what answers are made of: a late one is settled elsewhere, whenever it comes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Self

import anyio

from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.config import ControlSettings
from tolaria.peers.consultation import Consultations

# Kept back from the budget so that letting training go on is still inside it.
GUARD_S = 0.001


@dataclass(frozen=True, slots=True)
class BoundaryPolicy:
    """How long a boundary may wait: in all, for Tamiyo's answer, and, where `patient`, for that answer beyond both.

    `patient` is for runs that have to repeat bit by bit: the answer then always takes effect at the same step.
    """

    budget_s: float
    tamiyo_s: float
    patient: bool
    patience_s: float

    @classmethod
    def of(cls, control: ControlSettings, *, patient: bool, patience_s: float) -> Self:
        """The policy that the settings ask for."""
        return cls(control.boundary_budget_ms / 1000, control.tamiyo_budget_ms / 1000, patient, patience_s)


class Boundary:
    """Puts the question of an epoch's end and waits as long as the policy lets it."""

    def __init__(self, consultant: Consultations, policy: BoundaryPolicy) -> None:
        self._consultant = consultant
        self.policy = policy

    async def wait_for_answer(
        self, state: SystemStatePacket, refusals: tuple[tuple[str, str], ...], *, since_s: float
    ) -> None:
        """Ask, then wait for the answer until the budget that began at `since_s` (monotonic) ends."""
        policy = self.policy
        consultation = self._consultant.ask(state, refusals)
        if policy.patient:
            with anyio.move_on_after(policy.patience_s):
                await consultation.settled.wait()
            return
        # A Tamiyo that has used up its share will not be followed by Kasmina in time either.
        with anyio.move_on_after(_left(since_s, policy.tamiyo_s)) as scope:
            await consultation.answered.wait()
        if not scope.cancelled_caught:
            with anyio.move_on_after(_left(since_s, policy.budget_s - GUARD_S)):
                await consultation.settled.wait()


def _left(since_s: float, budget_s: float) -> float:
    return max(0.0, since_s + budget_s - time.monotonic())
