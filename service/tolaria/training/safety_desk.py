"""What operators ask of a run's safeguards. Must not know how a request reached it."""

from __future__ import annotations

from typing import Protocol

from tolaria.training.safeguards import Safeguards


class Stepping(Protocol):
    """A run that counts its updates."""

    @property
    def global_step(self) -> int:
        """Updates done."""


class SafetyDesk:
    """Serves operators. Used on the event loop only."""

    def __init__(self, run: Stepping, safeguards: Safeguards) -> None:
        self._run = run
        self._safeguards = safeguards

    @property
    def global_step(self) -> int:
        """Updates done, as far as reported."""
        return self._run.global_step

    def set_conservative(self, *, enabled: bool) -> tuple[str, ...]:
        """Switch conservative mode by an operator's wish; the reasons that stand now.

        Switching off leaves the reasons whose cause stands: open breakers, a standing emergency.
        """
        mode = self._safeguards.mode
        if enabled:
            mode.force_on()
        else:
            mode.force_off()
        return mode.reasons
