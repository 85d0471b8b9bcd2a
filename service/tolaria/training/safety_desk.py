"""What operators ask of a run's safeguards. Must not know how a request reached it."""

from __future__ import annotations

from typing import Protocol

import anyio

from leyline.v1.enums_pb2 import EmergencyLevel
from tolaria.emergency import RESPONSES, Clearer, EmergencyState, Phase
from tolaria.training.feed import StatusFeed
from tolaria.training.guardian import Guardian

# How long a raise waits for acknowledgements beyond what its level allows: who is late shall be in the answer too.
_STRAGGLERS_S = 1.0
_OPERATOR = "operator"


class Telling(Protocol):
    """A run that tells of changes."""

    @property
    def feed(self) -> StatusFeed:
        """Tells of every change."""


class SafetyDesk:
    """Serves operators. Used on the event loop only."""

    def __init__(self, run: Telling, guardian: Guardian) -> None:
        self._run = run
        self._guardian = guardian

    def set_conservative(self, *, enabled: bool) -> tuple[str, ...]:
        """Switch conservative mode by an operator's wish; the reasons that stand now.

        Switching off leaves the reasons whose cause stands: open breakers, a standing emergency.
        """
        mode = self._guardian.safeguards.mode
        if enabled:
            mode.force_on()
        else:
            mode.force_off()
        return mode.reasons

    async def raise_emergency(self, level: EmergencyLevel.ValueType, reason: str) -> EmergencyState:
        """Raise a level and wait until everyone has acknowledged, or no longer than a little past its deadline.

        Raises:
            UnknownLevelError: there is no such level; nothing has changed.
        """
        controller = self._guardian.controller
        controller.escalate(level, reason, _OPERATOR)
        with anyio.move_on_after(RESPONSES[level].deadline_ms / 1000 + _STRAGGLERS_S):
            await self._run.feed.until(lambda: controller.state.phase in {Phase.ANSWERED, Phase.CALM})
        return controller.state

    def clear_emergency(self, reason: str) -> None:
        """End the emergency; a halted run stays halted until it is resumed.

        Raises:
            IllegalEmergencyEventError: there is none.
        """
        self._guardian.controller.clear(reason, _OPERATOR, by=Clearer.OPERATOR)
