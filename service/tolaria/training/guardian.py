"""Stands between what goes wrong and what is done about it: safeguards, emergencies, and what each level asks for.

Owns the answer to every level. Must not know how training is held, nor how signals travel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import structlog

from leyline.v1.admin_service_pb2 import GetStatusResponse
from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT
from tolaria.config import EmergencySettings
from tolaria.emergency import (
    Cleared,
    Clearer,
    EmergencyController,
    EmergencyPolicy,
    EpochStreak,
    Escalated,
    Phase,
    Report,
    Trigger,
    recovered,
)
from tolaria.emergency.protocol import SENTINEL, TOLARIA
from tolaria.emergency.supervision import Heartbeats
from tolaria.errors import ClearanceRefusedError, EmergencyError
from tolaria.resilience.conservative import EMERGENCY
from tolaria.rollback import EmergencyRow
from tolaria.signals import Participant, SignalBoard
from tolaria.telemetry.emitter import Emitter
from tolaria.telemetry.metrics import Metrics
from tolaria.training.record_emergency import EmergencyRecorder
from tolaria.training.recovery.chronicle import Chronicle
from tolaria.training.safeguards import CHECKPOINT, Safeguards


class Guardian:
    """The safeguards and the emergency of one run. Used on the event loop only.

    `watch` must have been called before the first emergency.

    Args:
        board: open as long as this is used.
        participant: "tolaria", claimed on that board.
        settings: of emergencies.
        metrics: of all this.
        emitter: for its events.
        chronicle: where emergencies are noted.
        standing: the halt that the run came with from an earlier process, if there was one.
        changed: called after something has changed that a status shows.
    """

    def __init__(
        self,
        board: SignalBoard,
        participant: Participant,
        *,
        settings: EmergencySettings,
        metrics: Metrics,
        emitter: Emitter,
        chronicle: Chronicle,
        standing: EmergencyRow | None = None,
        changed: Callable[[], None],
    ) -> None:
        self._log = structlog.get_logger()
        self._settings = settings
        self._changed = changed
        self._chronicle = chronicle
        self._standing = standing
        self._halt: Callable[[str], None] = lambda _reason: None
        self._roll_back: Callable[[str, str], None] = lambda _reason, _origin: None
        self._streak = EpochStreak(settings.failed_epochs_max)
        self.hearts = Heartbeats(participant)
        self._recorder = EmergencyRecorder(metrics, emitter, degraded=board.degraded)
        self._adopted = board.adopted
        self.controller = EmergencyController(
            board,
            participant,
            broadcast=self._recorder.broadcast,
            observer=self._observe,
            policy=EmergencyPolicy(broadcasts_per_minute=settings.broadcasts_per_minute),
        )
        self.safeguards = Safeguards(
            recovery_epochs=settings.recovery_epochs,
            metrics=metrics,
            emitter=emitter,
            changed=changed,
            opened=self._opened,
        )

    @property
    def halting(self) -> bool:
        """Whether an emergency stands that training must not go on in."""
        return self.controller.state.level == EMERGENCY_LEVEL_HALT

    def watch(self, halt: Callable[[str], None], roll_back: Callable[[str, str], None]) -> None:
        """Begin: `halt` freezes training, and has `held` called when it stands. Takes in what the board says already.

        `roll_back` begins a fast rollback, given a reason and whose it is.

        A halt that only the sentinel had raised was about the process that this one has replaced; any other stands
        until somebody clears it, however the process was ended.
        """
        self._halt, self._roll_back = halt, roll_back
        self.controller.observe_board()
        if self._adopted and self.controller.state.origin == SENTINEL:
            with suppress(ClearanceRefusedError):  # others raised it too: it stands until an operator has looked
                self.controller.clear("restarted", TOLARIA, by=Clearer.RESTARTED)
        if self._standing is not None and not self.halting:  # the board was new, as after a drain or in a new container
            self.controller.escalate(EMERGENCY_LEVEL_HALT, self._standing.reason, self._standing.origin)

    def held(self) -> None:
        """Training stands: if that is what the emergency asks for, it is acknowledged."""
        if self.halting:
            self.controller.acknowledge()

    def epoch_over(self, *, breach: bool) -> None:
        """An epoch and its boundary are over, which may have been a `breach` of its budget."""
        healthy = self.safeguards.epoch_over(breach=breach)
        self._streak = self._streak.after(healthy=healthy)
        if breach:
            self._trigger(Trigger.BOUNDARY_BREACH, "over budget")
        if self._streak.spent:
            self._trigger(Trigger.FAILED_EPOCH_STREAK, f"{self._streak.failed} epochs in a row")
        self._recover()

    def hook_breach(self, detail: str) -> None:
        """Putting a question between epochs has taken longer than its budget."""
        self._trigger(Trigger.HOOK_BREACH, detail)

    def rollbacks_spent(self, reason: str) -> None:
        """Training has gone wrong by itself once more, and may not go back any more."""
        self._trigger(Trigger.ROLLBACK_BUDGET_SPENT, reason)

    def rollback_late(self, reason: str) -> None:
        """A rollback has missed its deadline: what somebody wanted undone is still live."""
        self._trigger(Trigger.ROLLBACK_DEADLINE_MISSED, reason)

    def tell(self, status: GetStatusResponse) -> None:
        """Add reasons, breakers and the level to a status."""
        self.safeguards.tell(status)
        status.emergency_level = self.controller.state.level

    def _recover(self) -> None:
        rule = recovered(
            self.controller.state,
            self._streak,
            recovery_epochs=self._settings.recovery_epochs,
            cause_remains=not self.safeguards.all_closed,
        )
        if rule:
            with suppress(EmergencyError):  # somebody has cleared or raised it in this very moment
                self.controller.clear(f"{self._streak.healthy} healthy epochs", TOLARIA, by=Clearer.RECOVERED)

    def _opened(self, breaker: str) -> None:
        """Of a disk that takes no checkpoints only operators are told: to go back would not help it."""
        if breaker != CHECKPOINT:
            self._trigger(Trigger.BREAKER_OPEN, breaker)

    def _trigger(self, trigger: Trigger, detail: str) -> None:
        self.controller.trigger(trigger, detail)

    def _observe(self, report: Report) -> None:
        """Act first, tell then."""
        match report:
            case Escalated():
                self._answer(report)
            case Cleared() if EMERGENCY.name in self.safeguards.mode.reasons:
                self.safeguards.mode.leave(EMERGENCY)
            case _:
                pass  # nothing but to be told
        self._recorder.take(report)
        self._chronicle.emergency(report)
        self._changed()

    def _answer(self, report: Escalated) -> None:
        state, response = report.state, report.response
        if response.halt:
            self._halt(f"emergency: {state.reason}")
        if response.conservative_mode:
            self.safeguards.mode.enter(EMERGENCY)
        if response.fast_rollback and self._settings.rollback:
            self._roll_back(f"emergency: {state.reason}", state.origin)
        if not response.halt and self.controller.state.phase is not Phase.CALM:
            self.controller.acknowledge()
