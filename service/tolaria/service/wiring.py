"""Builds the parts of a service from the settings. Nothing is started here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from anyio.abc import TaskGroup

from tolaria.config import PeerSettings, Settings, is_live
from tolaria.emergency.supervision import Heartbeats
from tolaria.journal.async_journal import AsyncJournal
from tolaria.peers.connect import Peer, Peers
from tolaria.peers.consultation import Consultations
from tolaria.peers.verification import CommandVerifier
from tolaria.resilience.deadline import DeadlineCaller
from tolaria.rollback.coordinator import RollbackCoordinator
from tolaria.rollback.protocol import TAMIYO, RollbackParticipant
from tolaria.rpc.requests import RequestLedger
from tolaria.run.adjustments import RunAdjustments
from tolaria.run.boundary import BoundaryPolicy, EpochBoundary, StepQuestions
from tolaria.run.checkpointing import Checkpointing
from tolaria.run.command_handler import CommandHandler
from tolaria.run.data_skips import DataSkips
from tolaria.run.health import Health
from tolaria.run.journal_observer import JournalObserver
from tolaria.run.lane_client import LaneClient, LaneHandle
from tolaria.run.lane_telemetry import LaneTelemetry
from tolaria.run.observers import Observers
from tolaria.run.operations import RunParts
from tolaria.run.packet_telemetry import PacketTelemetry
from tolaria.run.profiling import Profiles
from tolaria.run.recovery import Recovery
from tolaria.run.restorer import LaneRestorer
from tolaria.run.resume import retention_of
from tolaria.run.revival import Revival
from tolaria.run.run import TrainingRun
from tolaria.run.run_state import Lifecycle
from tolaria.run.safety import BREAKERS, CHECKPOINT, KASMINA, REASONS, Safeguards, Safety
from tolaria.run.safety_telemetry import SafetyTelemetry
from tolaria.run.seed_telemetry import SeedTelemetry
from tolaria.run.status import RunStatus
from tolaria.run.step_places import StepPlaces
from tolaria.run.tracking_telemetry import TrackingTelemetry
from tolaria.run.training_telemetry import TrainingTelemetry
from tolaria.service.foundation import Foundation
from tolaria.service.replicas import adopt_meanwhile
from tolaria.status_page.history import PageHistory
from tolaria.status_page.sections import PageParts
from tolaria.telemetry.logging import set_level
from tolaria.telemetry.packets import Packets
from tolaria.telemetry.subscriptions import TelemetryStream
from tolaria.trackers.supervision import Tracking
from tolaria.transport.process_lane import ProcessLane
from tolaria.values.seeds import NO_SEEDS, limits_of

NO_CONTROLLER: Final = "none (control.enabled is off)"
"""What a status says of a peer that does not exist."""


class Core:
    """The parts of a run that exist before its peers are connected. Built on the event loop."""

    def __init__(self, foundation: Foundation) -> None:
        settings, metrics, emitter = foundation.settings, foundation.metrics, foundation.emitter
        self.foundation = foundation
        self.telemetry = TelemetryStream(settings.telemetry, metrics)
        self.packets = Packets(metrics, self.telemetry, foundation.log_context, emitter.tracer)
        emitter.publish_to(self.packets)
        self.ready = None if foundation.build is None else foundation.build.ready
        self.status = new_status(foundation)
        self.journal = AsyncJournal(foundation.storage.journal, self.status.run_id)
        participant = foundation.board.claim("tolaria")
        self.heartbeats = Heartbeats(participant, settings.emergency)
        best = settings.checkpoint
        own_metric = best.best if ":" in best.best and not best.best_of_training else ""
        self.health = Health(settings.rollback, settings.health, foundation.run.scale, judged_by=own_metric)
        self.status.lane_phase = self.heartbeats.phase
        safety_telemetry = SafetyTelemetry(
            metrics,
            emitter,
            BREAKERS,
            degraded=foundation.board.degraded,
            newest_checkpoint_ns=foundation.newest_checkpoint_ns,
            reasons=REASONS,
        )
        self.history = PageHistory(self.status, foundation.points, earlier=foundation.curves)
        self.tracking = Tracking(settings, metrics, emitter)
        self.seed_telemetry = SeedTelemetry(settings.gradients, metrics, emitter)
        self.observers = self._observers(safety_telemetry)
        self.process: ProcessLane | None = None
        if foundation.build is not None:
            self.handle: LaneHandle = foundation.build.lane(self.heartbeats, Path(settings.state.dir) / "traces")
        else:
            self.handle = self.process = ProcessLane(settings, foundation.checkpoint, foundation.run.run_id)
            self.status.lane_phase = self.process.phase
        self.lane = LaneClient(self.handle)
        self.lifecycle = Lifecycle(self.lane, self.status, self.health, self.observers.on_state)
        self.safeguards = Safeguards(self.observers, self.status, recovery_epochs=settings.emergency.recovery_epochs)
        self.safety = Safety(
            foundation.board,
            participant,
            settings.emergency,
            lifecycle=self.lifecycle,
            safeguards=self.safeguards,
            observers=self.observers,
            telemetry=safety_telemetry,
            active=foundation.active_halt,
        )
        self.checkpointing = Checkpointing(
            settings.checkpoint,
            self.lane,
            foundation.writer,
            lifecycle=self.lifecycle,
            breaker=self.safeguards.breakers[CHECKPOINT],
            observers=self.observers,
            journal=self.journal,
            points=foundation.points,
        )
        self.checkpointing.logged = self.status.logged
        self.page = PageParts(
            settings=settings,
            status=self.status,
            safety=self.safety,
            health=self.health,
            checkpointing=self.checkpointing,
            points=foundation.points,
            history=self.history,
        )

    def _observers(self, safety_telemetry: SafetyTelemetry) -> Observers:
        foundation, settings = self.foundation, self.foundation.settings
        metrics, emitter = foundation.metrics, foundation.emitter
        ended = [row for row in foundation.open_emergencies if row != foundation.active_halt]
        return Observers(
            TrainingTelemetry(
                metrics,
                emitter,
                foundation.log_context,
                run_id=self.status.run_id,
                latency_factor=settings.telemetry.latency_factor,
            ),
            self.seed_telemetry,
            safety_telemetry,
            LaneTelemetry(metrics, emitter),
            JournalObserver(self.journal, self.status, foundation.run, active=foundation.active_halt, ended=ended),
            self.history,
            PacketTelemetry(emitter.tracer, self.packets),
            *([TrackingTelemetry(self.tracking, self.status, settings)] if self.tracking.enabled else []),
        )


@dataclass(frozen=True, slots=True)
class LiveParts:
    """The parts whose settings can be replaced while they are used. Used on the event loop only."""

    core: Core
    coordinator: RollbackCoordinator
    boundary: EpochBoundary
    questions: StepQuestions
    profiles: Profiles
    verifier: CommandVerifier
    callers: Mapping[Peer, DeadlineCaller]

    def adopt(self, settings: Settings) -> None:
        """Has each part use these settings from its next decision on; those that are not live are as before."""
        core = self.core
        set_level(settings.logging.level)
        core.page.settings = settings
        core.telemetry.settings = settings.telemetry
        core.seed_telemetry.settings = settings.gradients
        core.checkpointing.settings = settings.checkpoint
        core.foundation.storage.checkpoints.retention = retention_of(settings.checkpoint)
        core.health.adopt(settings.rollback)
        if core.process is not None:
            core.process.adopt(settings.lane)
        self.coordinator.settings = settings.rollback
        self.boundary.policy = _boundary_policy(settings)
        self.questions.control = settings.control
        self.profiles.settings = settings.profiler
        self.verifier.adopt(settings.leyline)
        peers: Mapping[Peer, PeerSettings] = {"tamiyo": settings.tamiyo, "kasmina": settings.kasmina}
        for peer, caller in self.callers.items():
            section = peers[peer]
            live = {name: value for name, value in section if is_live(type(section), name)}
            caller.settings = caller.settings.model_copy(update=live)  # its target is the actual one


@dataclass(frozen=True, slots=True)
class RunService:
    """A run and the tasks that are served with it; `live` are the parts whose settings a reload replaces."""

    run: TrainingRun
    consultations: Consultations | None
    recovery: Recovery
    revival: Revival
    live: LiveParts

    async def open(self, core: Core) -> bool:
        """Waits until a lane in a separate process is built; returns False if it was stopped before.

        Raises the error for which it cannot be built.
        """
        if core.process is not None:
            ready = await core.process.open()
            if ready is None:
                self.run.end_unbuilt()
                return False
            core.foundation.on_ready(ready)
            self.run.begin(ready)
        return True

    async def serve(self, core: Core, tasks: TaskGroup) -> None:
        """Starts the run's tasks, and trains until the run has ended."""
        if self.consultations is not None:
            tasks.start_soon(self.consultations.serve)
        tasks.start_soon(self.recovery.serve)
        tasks.start_soon(core.checkpointing.serve)
        tasks.start_soon(self.recovery.save_when_halted)
        tasks.start_soon(self.revival.serve)
        tasks.start_soon(core.journal.serve)
        tasks.start_soon(core.packets.serve)
        await self.run.run()


def new_run(core: Core, peers: Peers | None) -> RunService:
    """Returns the run with these peers; None: without a controller."""
    settings = core.foundation.settings
    adjustments = RunAdjustments(core.lane, core.journal, core.status)
    participants = {} if peers is None else {TAMIYO: peers.tamiyo_rollback, KASMINA: peers.kasmina_rollback}
    coordinator, recovery = _new_recovery(core, adjustments, participants)
    verifier = CommandVerifier(settings.leyline)
    consultations = None if peers is None else _new_consultations(core, peers, recovery, verifier)
    questions = StepQuestions(
        consultations,
        settings.control,
        status=core.status,
        health=core.health,
        observers=core.observers,
        safety=core.safety,
    )
    skips = DataSkips(
        core.lane,
        core.status,
        core.journal,
        core.observers,
        saved=core.foundation.skips,
        places=StepPlaces(settings.training.accumulate),
    )
    revival = Revival(
        core.lane,
        core.status,
        core.foundation.storage.checkpoints,
        points=core.foundation.points,
        health=core.health,
        observers=core.observers,
        skips=skips,
        follow=recovery.follow_revival,
    )
    if core.process is not None:
        core.process.plan = revival.plan
        _follow_replicas(core, core.process, revival)
    parts = RunParts(
        lane=core.lane,
        status=core.status,
        observers=core.observers,
        health=core.health,
        lifecycle=core.lifecycle,
        safety=core.safety,
        recovery=recovery,
        revival=revival,
        checkpointing=core.checkpointing,
        boundary=EpochBoundary(consultations, _boundary_policy(settings)),
        questions=questions,
        points=core.foundation.points,
        profiles=Profiles(core.lane, settings.profiler, safeguards=core.safeguards, observers=core.observers),
        adjustments=adjustments,
        skips=skips,
    )
    run = TrainingRun(parts, settings)
    if core.ready is not None:
        run.begin(core.ready)
    live = LiveParts(
        core=core,
        coordinator=coordinator,
        boundary=parts.boundary,
        questions=questions,
        profiles=parts.profiles,
        verifier=verifier,
        callers={} if peers is None else peers.callers,
    )
    return RunService(run, consultations, recovery, revival, live)


def _follow_replicas(core: Core, process: ProcessLane, revival: Revival) -> None:
    """Has replicas of the run's snapshots kept, and restored, if the settings ask for them."""
    if process.replicas is None or process.rendezvous is None:
        return
    process.replicas.snapshots = revival.live_snapshots
    foundation = core.foundation
    revival.adopt_replica = partial(
        adopt_meanwhile, process.rendezvous, foundation.storage, foundation.writer, core.status.run_id
    )


def _new_consultations(core: Core, peers: Peers, recovery: Recovery, verifier: CommandVerifier) -> Consultations:
    settings = core.foundation.settings
    handler = CommandHandler(
        core.lane,
        core.status,
        lifecycle=core.lifecycle,
        safety=core.safety,
        recovery=recovery,
        health=core.health,
        observers=core.observers,
        max_staleness_steps=settings.control.max_staleness_steps,
    )
    return Consultations(
        peers.tamiyo,
        peers.kasmina,
        verifier=verifier,
        emitter=core.foundation.emitter,
        seeds=settings.seeds,
        permits=core.safeguards.permits,
        on_settled=handler.settle,
    )


def new_ledger(core: Core, tasks: TaskGroup) -> RequestLedger:
    """Returns the ledger of operators' requests, whose operations run in `tasks`."""
    return RequestLedger(core.foundation.settings.server.request_memory, core.journal, core.status, tasks)


def new_status(foundation: Foundation) -> RunStatus:
    """Returns the status of a run as it starts in this process."""
    settings, training = foundation.settings, foundation.settings.training
    status = RunStatus(
        foundation.run.run_id,
        training.job,
        training.experiment,
        0 if training.steps else training.epochs,
        steps=training.steps,
        started_at_s=time.monotonic(),
        seed_limits=limits_of(settings.seeds) if settings.control.enabled else NO_SEEDS,
        rollbacks_by_origin=dict(foundation.rollbacks),
        attempt=foundation.points.lineage.attempt,
        newest_proven_step=foundation.points.newest_proven_step,
        branch=foundation.branch,
    )
    if not settings.control.enabled:
        status.tamiyo_answer = status.kasmina_answer = NO_CONTROLLER
    if foundation.checkpoint is not None:  # what is known before the lane is built
        image, decided = foundation.checkpoint
        status.global_step, status.epoch = image.position.global_step, image.position.epoch
        status.adjustments = decided
    return status


def _new_recovery(
    core: Core, adjustments: RunAdjustments, participants: Mapping[str, RollbackParticipant]
) -> tuple[RollbackCoordinator, Recovery]:
    foundation = core.foundation
    store = foundation.storage.checkpoints
    restorer = LaneRestorer(
        core.lane, core.status, store, core.observers, points=foundation.points, checkpointing=core.checkpointing
    )
    coordinator = RollbackCoordinator(
        participants,
        restorer,
        run_id=core.status.run_id,
        settings=foundation.settings.rollback,
        board=foundation.board.claim_rollback(),
        journal=core.journal,
    )
    return coordinator, Recovery(
        coordinator,
        restorer,
        lifecycle=core.lifecycle,
        health=core.health,
        observers=core.observers,
        safety=core.safety,
        adjustments=adjustments,
        tracer=foundation.emitter.tracer,
    )


def _boundary_policy(settings: Settings) -> BoundaryPolicy:
    control = settings.control
    return BoundaryPolicy(
        budget_s=control.boundary_budget_ms / 1000,
        tamiyo_s=control.tamiyo_budget_ms / 1000,
        patient=settings.training.deterministic,
        # Three calls at most (evaluate, apply, export), each with its own deadline.
        patience_s=settings.tamiyo.timeout_s + 2 * settings.kasmina.timeout_s + 1.0,
        slack_s=control.boundary_slack_ms / 1000,
    )
