"""The parts of a service, put together from the settings. Owns who gets what; nothing here runs yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT, RollbackTier
from tolaria.checkpoint.storage import Storage
from tolaria.checkpoint.writer import CheckpointWriter
from tolaria.config import Settings
from tolaria.errors import SignalError
from tolaria.journal.async_journal import AsyncJournal
from tolaria.journal.rows import EmergencyRow, RunRow
from tolaria.peers.verification import new_verifier
from tolaria.rollback.budget import RollbackBudgets
from tolaria.rollback.coordinator import Clocks, OnSlot, RollbackCoordinator
from tolaria.rollback.participants import Seat
from tolaria.rollback.phases import Phase
from tolaria.signals import SignalBoard
from tolaria.telemetry.emitter import Emitter
from tolaria.telemetry.logging import LogContext
from tolaria.telemetry.metrics import Metrics
from tolaria.telemetry.profiler import ProfileWindow
from tolaria.training.boundary import Boundary, BoundaryPolicy
from tolaria.training.cadence import StepCadence
from tolaria.training.conduct import RUN, Conduct
from tolaria.training.consult import Consultant, Controller, Executor
from tolaria.training.enact import Enactor
from tolaria.training.feed import StatusFeed
from tolaria.training.guardian import Guardian
from tolaria.training.lane_link import LaneLink
from tolaria.training.loop import TrainingLoop
from tolaria.training.profile_desk import ProfileDesk
from tolaria.training.profiling import LaneProfiler
from tolaria.training.progress import Progress
from tolaria.training.record import Recorder
from tolaria.training.record_profile import ProfileRecorder
from tolaria.training.recovery.checkpoints import CheckpointDesk, DeskTools
from tolaria.training.recovery.chronicle import Chronicle
from tolaria.training.recovery.keeper import SnapshotKeeper
from tolaria.training.recovery.keeping import kept_image
from tolaria.training.recovery.restorer import LaneRestorer
from tolaria.training.recovery.retreats import Retreats
from tolaria.training.recovery.rollbacks import RollbackDesk, RollbackTies
from tolaria.training.rig import Rig
from tolaria.training.safeguards import CHECKPOINT
from tolaria.training.ties import RunPlan, RunTies

_TRACES = "traces"
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Ground:
    """What is there before anything is built on it."""

    settings: Settings
    rig: Rig
    keeper: SnapshotKeeper
    progress: Progress
    board: SignalBoard
    metrics: Metrics
    emitter: Emitter
    log_context: LogContext
    storage: Storage
    run: RunRow
    standing: EmergencyRow | None
    writer: CheckpointWriter


class Parts:
    """What a service consists of beside its peers. Built once, for one run."""

    def __init__(self, ground: Ground) -> None:
        settings = ground.settings
        self.ground = ground
        self.settings = settings
        self.progress = ground.progress
        self.archive = AsyncJournal(ground.storage.journal, ground.run.run_id)
        chronicle = Chronicle(self.archive.note, ground.progress, ground.run, standing=ground.standing)
        self.recorder = Recorder(
            ground.progress,
            gradients=settings.gradients,
            metrics=ground.metrics,
            emitter=ground.emitter,
            log_context=ground.log_context,
            chronicle=chronicle,
        )
        self.feed = StatusFeed()
        self.guardian = Guardian(
            ground.board,
            ground.board.claim("tolaria"),
            settings=settings.emergency,
            metrics=ground.metrics,
            emitter=ground.emitter,
            chronicle=chronicle,
            standing=ground.standing,
            changed=self.feed.changed,
        )
        hearts = self.guardian.hearts
        self.link = LaneLink(
            ground.rig,
            ground.keeper,
            threads=settings.training.threads,
            hearts=hearts,
            profiler=LaneProfiler(_window(settings), resting=hearts.lane_rests),
        )
        self.profiles = ProfileDesk(
            self.link.desk,
            settings.profiler,
            recorder=ProfileRecorder(ground.metrics, ground.emitter),
            permitted=lambda: not self.guardian.safeguards.mode.on,
            standing=lambda: self.link.standstill.wanted_by(RUN),
        )
        self.retreats = Retreats(settings.rollback, ground.run.scale)
        self.on_slot = _slot(ground.board)


def new_loop(parts: Parts, *, controller: Controller, executor: Executor, seats: Sequence[Seat]) -> TrainingLoop:
    """The run, with these peers; `seats` are those that take part in rollbacks, in order."""
    settings, ground = parts.settings, parts.ground

    conduct = Conduct(parts.link.standstill, parts.recorder, guardian=parts.guardian, changed=parts.feed.changed)
    checkpoints = new_checkpoints(parts, conduct)
    rollbacks = new_rollbacks(parts, seats, conduct=conduct, desk=checkpoints)
    enactor = Enactor(
        parts.link.desk,
        parts.recorder,
        conduct=conduct,
        guardian=parts.guardian,
        rollbacks=rollbacks,
        max_staleness_steps=settings.control.max_staleness_steps,
        changed=parts.feed.changed,
    )
    consultant = Consultant(
        controller=controller,
        executor=executor,
        verifier=new_verifier(settings.leyline),
        emitter=ground.emitter,
        permits=parts.guardian.safeguards.permits,
        on_settled=enactor.settle,
    )
    ties = RunTies(
        link=parts.link,
        recorder=parts.recorder,
        conduct=conduct,
        guardian=parts.guardian,
        rollbacks=rollbacks,
        retreats=parts.retreats,
        checkpoints=checkpoints,
        consultant=consultant,
        enactor=enactor,
        boundary=Boundary(consultant, _boundary_policy(settings)),
        cadence=new_cadence(parts, consultant),
        profiles=parts.profiles,
        feed=parts.feed,
    )
    plan = RunPlan(
        epochs=settings.training.epochs,
        void_steps_max=settings.control.max_void_steps,
        keeps=bool(settings.checkpoint.every_epochs or settings.checkpoint.every_steps),
        insists=settings.checkpoint.on_failure == "pause",
    )
    return TrainingLoop(ties, plan)


def new_checkpoints(parts: Parts, conduct: Conduct) -> CheckpointDesk:
    """The desk of this run's checkpoints, which may hold it."""
    tools = DeskTools(
        writer=parts.ground.writer,
        keep=lambda on_kept: kept_image(parts.link.desk, on_kept),
        hold=conduct.hold_where_none_does,
        go_on=conduct.go_on,
        breaker=parts.guardian.safeguards.breakers[CHECKPOINT],
        metrics=parts.ground.metrics,
        emitter=parts.ground.emitter,
    )
    return CheckpointDesk(
        parts.settings.checkpoint, tools, from_step=parts.progress.global_step, changed=parts.feed.changed
    )


def new_cadence(parts: Parts, consultant: Consultant) -> StepCadence:
    """What asks between epochs; a question that costs more than its budget is an emergency's trigger."""
    control, recorder = parts.settings.control, parts.recorder

    def hooked(step: int, latency_ms: float) -> None:
        if recorder.hook(step, latency_ms, control.hook_budget_ms):
            parts.guardian.hook_breach("over budget")

    return StepCadence(consultant, parts.progress, interval=control.step_interval, on_hook=hooked)


def new_rollbacks(parts: Parts, seats: Sequence[Seat], *, conduct: Conduct, desk: CheckpointDesk) -> RollbackDesk:
    """Where this run goes back, with these participants beside Tolaria; `desk` has what is on its way to disk."""
    settings, recorder, checkpoints = parts.settings.rollback, parts.recorder, parts.ground.storage.checkpoints

    def missed(reason: str) -> None:
        if settings.halt_on_deadline:
            parts.guardian.rollback_late(reason)

    async def supersede(global_step: int) -> None:
        desk.went_back(global_step)  # first: what is committed from here on looks for it, what is by now has its row
        await parts.archive.supersede_after(global_step)

    def unproven(reason: str) -> None:
        parts.guardian.controller.escalate(EMERGENCY_LEVEL_HALT, f"rollback_unproven: {reason}", "tolaria")

    restorer = LaneRestorer(
        parts.link.desk, points=parts.link.points, checkpoints=checkpoints, damaged=recorder.rollbacks.damaged
    )
    coordinator = RollbackCoordinator(
        seats,
        restorer,
        run_id=parts.progress.run_id,
        budgets=RollbackBudgets(fast_s=settings.fast_budget_s, full_s=settings.full_budget_s),
        on_slot=parts.on_slot,
        record=parts.archive.put,
        clocks=Clocks(),
    )
    ties = RollbackTies(
        standstill=parts.link.standstill,
        desk=parts.link.desk,
        retreats=parts.retreats,
        recorder=recorder.rollbacks,
        adjusted=recorder.adjusted,
        supersede=supersede,
        missed=missed,
        unproven=unproven,
        ended=lambda: conduct.ended,
        changed=parts.feed.changed,
    )
    return RollbackDesk(coordinator, ties, global_step=lambda: parts.progress.global_step)


def _boundary_policy(settings: Settings) -> BoundaryPolicy:
    # Three calls at most: ask, hand over, hear what is desired; each has its own deadline.
    patience_s = settings.tamiyo.timeout_s + 2 * settings.kasmina.timeout_s + 1.0
    return BoundaryPolicy.of(settings.control, patient=settings.training.deterministic, patience_s=patience_s)


def _window(settings: Settings) -> ProfileWindow:
    return ProfileWindow(Path(settings.state.dir) / _TRACES, bytes_max=settings.profiler.traces_mb * _MIB)


def _slot(board: SignalBoard) -> OnSlot:
    """Shows a rollback's phases on the board; one that cannot be written must not stop the rollback."""
    writer = board.claim_rollback()
    log = structlog.get_logger()

    def show(phase: Phase, rollback_id: str, target_step: int, deadline_ns: int, tier: RollbackTier.ValueType) -> None:
        try:
            writer.write(phase, rollback_id=rollback_id, target_step=target_step, deadline_ns=deadline_ns, tier=tier)
        except SignalError:
            log.exception("signal_board_not_written")

    return show
