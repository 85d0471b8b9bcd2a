"""Questions to the controller: at the end of an epoch, within a budget, and between epochs, without waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import anyio

from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.config import ControlSettings
from tolaria.emergency import Trigger
from tolaria.lane.messages import StepDone
from tolaria.peers.consultation import Consultations
from tolaria.run.health import Health
from tolaria.run.observers import RunObserver
from tolaria.run.safety import Safety
from tolaria.run.status import RunStatus, step_packet

GUARD_S: Final = 0.001  # reserved in the budget for letting training go on


@dataclass(frozen=True, slots=True)
class BoundaryPolicy:
    """How long an epoch boundary waits: in total, and for Tamiyo's answer. Up to `slack_s` beyond that is no breach.

    A `patient` boundary waits for the settled answer instead, up to `patience_s`, so that the answer always takes
    effect at the same step and a deterministic run is reproducible bit for bit.
    """

    budget_s: float
    tamiyo_s: float
    patient: bool
    patience_s: float
    slack_s: float = 0.0


class EpochBoundary:
    """Asks the controller at the end of an epoch and waits as long as the policy allows.

    Without consultations there is no controller.
    """

    def __init__(self, consultations: Consultations | None, policy: BoundaryPolicy) -> None:
        self._consultations = consultations
        self.policy = policy

    @property
    def asks(self) -> bool:
        """Whether there is a controller to ask."""
        return self._consultations is not None

    def rewound(self) -> None:
        """Makes the answers to questions from before a rollback stale."""
        if self._consultations is not None:
            self._consultations.rewound()

    async def wait_for_answer(
        self, state: SystemStatePacket, refusals: tuple[tuple[str, str], ...], *, since_s: float
    ) -> None:
        """Asks, then waits until the answer is settled or the budget that began at `since_s` (monotonic) ends."""
        policy = self.policy
        if self._consultations is None:
            return
        consultation = self._consultations.ask(state, refusals)
        if policy.patient:
            with anyio.move_on_after(policy.patience_s):
                await consultation.settled.wait()
            return
        # When Tamiyo has used up its share, Kasmina cannot answer in time either.
        with anyio.move_on_after(_left(since_s, policy.tamiyo_s)) as scope:
            await consultation.answered.wait()
        if not scope.cancelled_caught:
            with anyio.move_on_after(_left(since_s, policy.budget_s - GUARD_S)):
                await consultation.settled.wait()


class StepQuestions:
    """Asks the controller every `control.step_interval` steps, without waiting; in one frame, only about the last.

    Without consultations there is no controller.
    """

    def __init__(
        self,
        consultations: Consultations | None,
        control: ControlSettings,
        *,
        status: RunStatus,
        health: Health,
        observers: RunObserver,
        safety: Safety,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._consultations = consultations
        self.control = control
        self._status = status
        self._health = health
        self._observers = observers
        self._safety = safety
        self._clock = clock

    def step(self, step: StepDone) -> None:
        """Asks if a question is due after this step."""
        interval = self.control.step_interval
        if self._consultations is None or not interval or step.skipped or step.global_step % interval:
            return
        started_s = self._clock()
        packet = step_packet(self._status, self._health.averages, step, wall_ns=time.time_ns())
        self._consultations.ask_between_epochs(packet)
        latency_ms, budget_ms = (self._clock() - started_s) * 1000, self.control.hook_budget_ms
        breach = latency_ms > budget_ms
        self._observers.on_step_question(step.global_step, latency_ms, budget_ms=budget_ms, breach=breach)
        if breach:
            self._safety.trigger(Trigger.HOOK_BREACH, "over budget")


def _left(since_s: float, budget_s: float) -> float:
    return max(0.0, since_s + budget_s - time.monotonic())
