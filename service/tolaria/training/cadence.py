"""Asks the controller between epochs, every so many updates. Must not know what becomes of the answers."""

from __future__ import annotations

import time
from collections.abc import Callable

from tolaria.peers.consultation import Consultations
from tolaria.training.packet import step_packet
from tolaria.training.progress import Progress
from tolaria.training.reports import StepReport


class StepCadence:
    """Puts a question every `interval` updates; 0: never. Nothing waits for answers.

    Steps come in frames: of several due ones in a frame the last is what the consultant asks.

    Args:
        consultant: whom to ask.
        progress: what a question tells beside the step.
        interval: updates between two questions.
        on_hook: told, for every question, its global step and the milliseconds that making and putting it took.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        consultant: Consultations,
        progress: Progress,
        *,
        interval: int,
        on_hook: Callable[[int, float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._consultant = consultant
        self._progress = progress
        self._interval = interval
        self._on_hook = on_hook
        self._clock = clock

    def step(self, step: StepReport) -> None:
        """One more step is done."""
        if self._interval and not step.void and step.global_step % self._interval == 0:
            started_s = self._clock()
            self._consultant.ask_between_epochs(step_packet(self._progress, step, wall_ns=time.time_ns()))
            self._on_hook(step.global_step, (self._clock() - started_s) * 1000)
