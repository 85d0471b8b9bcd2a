"""The safety mechanisms of a run: breakers, conservative mode, failed epochs and the emergency with its responses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

import anyio

from leyline.v1 import enums_pb2 as enums
from leyline.v1.admin_service_pb2 import GetStatusResponse
from tolaria import emergency
from tolaria.config import EmergencySettings
from tolaria.emergency.protocol import SENTINEL, TOLARIA
from tolaria.errors import ClearanceRefusedError, EmergencyError, IllegalEmergencyEventError
from tolaria.journal.rows import EmergencyRow
from tolaria.lane.messages import SeedsChanged, StepDone
from tolaria.resilience.breaker import Breaker
from tolaria.resilience.conservative import EMERGENCY, ConservativeMode, ModeChange, breaker_open, epoch_failed
from tolaria.resilience.conservative import OPERATOR as OPERATOR_REASON
from tolaria.rollback.protocol import TAMIYO
from tolaria.run.conditions import Conditions
from tolaria.run.missing_metrics import MissingMetrics
from tolaria.run.observers import RunObserver
from tolaria.run.run_state import Lifecycle
from tolaria.run.safety_telemetry import SafetyTelemetry
from tolaria.run.status import RunStatus
from tolaria.signals import ParticipantWriter, SignalBoard
from tolaria.values.optimization import OPERATOR

KASMINA: Final = "kasmina"
BOUNDARY, LR_INTEGRITY, OPTIMIZER, CHECKPOINT = "boundary", "lr_integrity", "optimizer", "checkpoint"
BREAKERS: Final = (TAMIYO, KASMINA, BOUNDARY, LR_INTEGRITY, OPTIMIZER, CHECKPOINT)

# Reasons for conservative mode. Those of ill training are causes of a failed epoch; late clocks and peers are not.
BREACH, PEER_FAILURE = "boundary_breach", "peer_failure"
NON_FINITE, EXPLOSION, COLLAPSE = "non_finite", "loss_explosion", "accuracy_collapse"

REASONS: Final = (
    *(reason.name for reason in (OPERATOR_REASON, EMERGENCY)),
    *(breaker_open(name).name for name in BREAKERS),
    *(epoch_failed(cause).name for cause in (BREACH, PEER_FAILURE, NON_FINITE, EXPLOSION, COLLAPSE)),
)
"""Names of all reasons for conservative mode."""

_LATE_ACKNOWLEDGEMENTS_S: Final = 1.0
"""How long raising an emergency waits beyond its deadline, so that late acknowledgements are in the answer."""


class Safeguards:
    """The breakers of a run and its conservative mode. Used on the event loop only.

    A failed epoch is forgiven after `recovery_epochs` healthy ones in a row. `clock` gives monotonic seconds.
    """

    def __init__(
        self,
        observers: RunObserver,
        status: RunStatus,
        *,
        recovery_epochs: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._observers = observers
        self._feed = status.feed
        self.mode = ConservativeMode(recovery_epochs=recovery_epochs, on_change=self._mode_changed)
        self.breakers: Mapping[str, Breaker] = {
            name: Breaker(name, clock=clock, on_change=self._breaker_changed) for name in BREAKERS
        }
        self.metrics = MissingMetrics(observers)
        self.foreign_rates = 0
        """Steps before which other code had changed a learning rate."""
        self._causes: set[str] = set()
        self._disturbed = False
        """Whether peers or clocks have given a reason for conservative mode in this epoch."""
        self._failed: set[str] = set()
        """The lane's breakers that recorded a failure in this epoch; for the others the epoch is a success."""
        self._opened: list[str] = []

    @property
    def all_closed(self) -> bool:
        """Whether no breaker is open or half-open."""
        return all(breaker.state == enums.CIRCUIT_STATE_CLOSED for breaker in self.breakers.values())

    def permits(self, peer: str) -> bool:
        """Whether a peer may be called now."""
        return self.mode.permits_call(peer, self.breakers[peer].state)

    def add_to(self, status: GetStatusResponse) -> None:
        """Adds the reasons for conservative mode and the breakers to a status."""
        status.conservative_reasons.extend(self.mode.reasons)
        status.breakers.update({name: breaker.state for name, breaker in self.breakers.items()})

    def force(self, name: str, state: enums.CircuitBreakerState.ValueType) -> None:
        """Opens or closes a breaker. Raises KeyError for an unknown name, ValueError for any other state."""
        self.breakers[name].force(state)

    def step(self, step: StepDone) -> None:
        """Counts the learning-rate violations of one step."""
        if step.violations:
            self.foreign_rates += 1
            self._fail(LR_INTEGRITY)

    def seeds_changed(self, change: SeedsChanged) -> None:
        """Counts a failed rebuild of the optimizer."""
        if change.rebuild_error:
            self._fail(OPTIMIZER)

    def epoch_failing(self, cause: str) -> None:
        """Counts the current epoch as failed, because training was ill, and enters conservative mode."""
        self._causes.add(cause)
        self.mode.enter(epoch_failed(cause))

    def disturbed(self, cause: str) -> None:
        """Enters conservative mode because of peers or clocks, which do not make training ill."""
        self._disturbed = True
        self.mode.enter(epoch_failed(cause))

    def rolled_back(self) -> None:
        """Forgets the failures of undone steps; automatic rollbacks have a separate limit."""
        self._causes -= {NON_FINITE, EXPLOSION}

    def epoch_over(self, *, breach: bool) -> bool:
        """Counts an epoch and its boundary; returns whether training was healthy in the epoch."""
        if breach:
            self.disturbed(BREACH)
        healthy, disturbed = not self._causes, self._disturbed
        self._causes, self._disturbed = set(), False
        self._count(BOUNDARY, healthy=not breach)
        for name in (LR_INTEGRITY, OPTIMIZER):
            if name not in self._failed:
                self._count(name, healthy=True)
        self._failed = set()
        if not healthy:
            self._observers.on_epoch_failed()
        if healthy and not disturbed:
            self.mode.healthy_epoch()
        else:
            self.mode.failed_epoch()
        return healthy

    def take_opened(self) -> list[str]:
        """Returns the breakers that have opened since the last call."""
        opened, self._opened = self._opened, []
        return opened

    def _fail(self, name: str) -> None:
        self._failed.add(name)
        self._count(name, healthy=False)

    def _count(self, name: str, *, healthy: bool) -> None:
        breaker = self.breakers[name]
        if breaker.allows():  # else it is open, and has not cooled down yet
            record = breaker.succeeded if healthy else breaker.failed
            record()

    def _breaker_changed(self, name: str, state: enums.CircuitBreakerState.ValueType) -> None:
        self._observers.on_breaker(name, state)
        reason = breaker_open(name)
        if state == enums.CIRCUIT_STATE_OPEN:
            self.mode.enter(reason)
            self._opened.append(name)
        elif state == enums.CIRCUIT_STATE_CLOSED and reason.name in self.mode.reasons:
            self.mode.leave(reason)
        self._feed.changed()

    def _mode_changed(self, change: ModeChange) -> None:
        self._observers.on_mode(change)
        self._feed.changed()


class Safety:
    """The safeguards and the emergency of one run, and what each emergency level does to it.

    Used on the event loop only. `start` has to be called before the first emergency. `participant` is "tolaria" on
    `board`; `active` is the halt that the run was resumed with, if there is one.
    """

    def __init__(
        self,
        board: SignalBoard,
        participant: ParticipantWriter,
        settings: EmergencySettings,
        *,
        lifecycle: Lifecycle,
        safeguards: Safeguards,
        observers: RunObserver,
        telemetry: SafetyTelemetry,
        active: EmergencyRow | None = None,
    ) -> None:
        self._settings = settings
        self._lifecycle = lifecycle
        self._observers = observers
        self._active = active
        self._started = False
        self._board = board
        self._streak = emergency.EpochStreak(settings.failed_epochs_max)
        self.safeguards = safeguards
        self.controller = emergency.EmergencyController(
            board,
            participant,
            broadcast=telemetry.broadcast,
            observer=self._observe,
            broadcasts_per_minute=settings.broadcasts_per_minute,
            attributes=lifecycle.attributes,
        )

    @property
    def halting(self) -> bool:
        """Whether an emergency halts training, or will as soon as the run starts."""
        pending = self._active is not None and not self._started
        return pending or self.controller.state.level == enums.EMERGENCY_LEVEL_HALT

    def start(self) -> None:
        """Adopts what is on the board, and raises the halt that the run was resumed with. Later calls do nothing.

        A halt that only the sentinel raised concerned the process that this one has replaced, and is cleared; any
        other stays until an operator clears it.
        """
        if self._started:
            return
        self._started = True
        self.controller.observe_board()
        if self._board.adopted and self.controller.state.origin == SENTINEL:
            with suppress(ClearanceRefusedError):  # others raised it as well
                self.controller.clear("restarted", TOLARIA, by=emergency.Clearer.RESTARTED)
                if self._active is None:
                    self._lifecycle.resume("restarted: the process that was silent has been replaced")
        if self._active is not None and not self.halting:
            self.controller.escalate(enums.EMERGENCY_LEVEL_HALT, self._active.reason, self._active.origin)

    def lane_held(self) -> None:
        """Acknowledges a halt once the lane is held."""
        if self.halting:
            self.controller.acknowledge()

    def check_breakers(self) -> None:
        """Raises the emergency of every breaker that has opened, except that of checkpoints: training can go on."""
        for name in self.safeguards.take_opened():
            if name != CHECKPOINT:
                self.controller.trigger(emergency.Trigger.BREAKER_OPEN, name)

    def epoch_over(self, *, breach: bool) -> None:
        """Counts an epoch and its boundary, and raises or clears the emergency accordingly."""
        healthy = self.safeguards.epoch_over(breach=breach)
        self.check_breakers()
        self._streak = self._streak.after(healthy=healthy)
        if breach:
            self.controller.trigger(emergency.Trigger.BOUNDARY_BREACH, "over budget")
        if self._streak.spent:
            self.controller.trigger(emergency.Trigger.FAILED_EPOCH_STREAK, f"{self._streak.failed} epochs in a row")
        recovered = emergency.recovered(
            self.controller.state,
            self._streak,
            recovery_epochs=self._settings.recovery_epochs,
            cause_remains=not self.safeguards.all_closed,
        )
        if recovered:
            with suppress(EmergencyError):  # cleared or raised in the meantime
                self.controller.clear(f"{self._streak.healthy} healthy epochs", TOLARIA, by=emergency.Clearer.RECOVERED)

    def disturbed(self, cause: str, trigger: emergency.Trigger) -> None:
        """Enters conservative mode and notifies because of peers or clocks."""
        self.safeguards.disturbed(cause)
        self.controller.trigger(trigger, cause)

    def trigger(self, trigger: emergency.Trigger, detail: str) -> None:
        """Raises the emergency of a trigger."""
        self.controller.trigger(trigger, detail)

    def halt(self, reason: str) -> None:
        """Raises HALT for a reason without a trigger."""
        self.controller.escalate(enums.EMERGENCY_LEVEL_HALT, reason, TOLARIA)

    def add_to(self, status: GetStatusResponse) -> None:
        """Adds reasons, breakers and the emergency level to a status."""
        self.safeguards.add_to(status)
        status.emergency_level = self.controller.state.level

    def conditions(self, *, checkpoints_failing: str, skipped_streak: int) -> Conditions:
        """Returns what the health of the run depends on."""
        breakers = self.safeguards.breakers.items()
        return Conditions(
            emergency_level=self.controller.state.level,
            emergency_reason=self.controller.state.reason,
            conservative_reasons=self.safeguards.mode.reasons,
            open_breakers=tuple(sorted(name for name, it in breakers if it.state != enums.CIRCUIT_STATE_CLOSED)),
            checkpoints_failing=checkpoints_failing,
            skipped_streak=skipped_streak,
            foreign_rates=self.safeguards.foreign_rates,
            missing_metrics=self.safeguards.metrics.sentences,
        )

    # -- operators ---------------------------------------------------------------------------------------------------

    def set_conservative(self, *, enabled: bool) -> tuple[str, ...]:
        """Switches the operator's reason for conservative mode; returns the remaining reasons.

        Reasons whose cause persists stay: open breakers, an active emergency.
        """
        mode = self.safeguards.mode
        if enabled:
            mode.force_on()
        else:
            mode.force_off()
        return mode.reasons

    async def raise_emergency(
        self, level: enums.EmergencyLevel.ValueType, reason: str, status: RunStatus
    ) -> emergency.EmergencyState:
        """Raises a level and waits for the acknowledgements, or until shortly after the level's deadline.

        Raises UnknownLevelError when there is no such level.
        """
        controller = self.controller
        controller.escalate(level, reason, OPERATOR)
        with anyio.move_on_after(emergency.RESPONSES[level].deadline_ms / 1000 + _LATE_ACKNOWLEDGEMENTS_S):
            await status.feed.until(lambda: controller.state.phase in {emergency.Phase.ANSWERED, emergency.Phase.CALM})
        return controller.state

    def clear_emergency(self, reason: str) -> None:
        """Clears the emergency; a halted run stays halted until resumed.

        Raises IllegalEmergencyEventError when calm; its message says when the run still has to be resumed.
        """
        self.start()  # a request may arrive before the run has started: what it clears must not be raised afterwards
        if self.controller.state.phase is emergency.Phase.CALM and self._lifecycle.halted:
            raise IllegalEmergencyEventError(f"there is no emergency; the run is {self._lifecycle.reason}")
        self.controller.clear(reason, OPERATOR, by=emergency.Clearer.OPERATOR)

    # -- responses ---------------------------------------------------------------------------------------------------

    def _observe(self, report: emergency.Report) -> None:
        """Responds first, then passes the report on."""
        if isinstance(report, emergency.Escalated):
            self._respond(report)
        elif isinstance(report, emergency.Cleared):
            if EMERGENCY.name in self.safeguards.mode.reasons:
                self.safeguards.mode.leave(EMERGENCY)
            if self._lifecycle.halted:
                cause = report.before.reason
                self._lifecycle.explain(f"halted, and cleared: resume it (tolaria resume). It was halted by: {cause}")
        self._observers.on_emergency(report)
        self._lifecycle.changed()

    def _respond(self, report: emergency.Escalated) -> None:
        if report.response.halt:
            self._lifecycle.halt(f"emergency: {report.state.reason}")
            if self._lifecycle.frozen:
                self.lane_held()
            return
        if report.response.conservative_mode:
            self.safeguards.mode.enter(EMERGENCY)
        if self.controller.state.phase is not emergency.Phase.CALM:
            self.controller.acknowledge()
