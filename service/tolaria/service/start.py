"""Starts a service from its settings: creates what has to exist before the event loop, in order."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from functools import partial
from typing import get_args

import anyio
import structlog

from tolaria import __version__
from tolaria.checkpoint.store import LoadedCheckpoint
from tolaria.checkpoint.writer import CheckpointWriter
from tolaria.config import Settings
from tolaria.emergency.supervision import stacks_on_request
from tolaria.errors import ConfigurationError, OptimizationError, RollbackError, SeedError
from tolaria.run.adjustments import saved_adjustments
from tolaria.run.resume import (
    ResumePoint,
    active_halt,
    end_run,
    load_resume_point,
    open_emergencies,
    prepare_state,
    require_free,
    run_row,
)
from tolaria.service import settings_record
from tolaria.service.host import Host
from tolaria.service.wiring import Foundation, LaneBuild, build_lane
from tolaria.signals import SignalBoard
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.logging import LogContext, Priority, logging_to
from tolaria.telemetry.metrics import Metrics, start_at_zero
from tolaria.values.optimization import ActiveAdjustment


def run(settings: Settings) -> int:
    """Serves until the run is done or a signal arrives; returns the exit code.

    Raises:
        JobError: the job cannot be built; nothing has been started yet.
        BindError: an address cannot be bound; what had been started is stopped.
        PeerUnavailableError: an embedded peer does not start.
        SignalError: the signal board cannot be created.
        StateHeldError: another service uses state.dir.
        ConfigurationError: state.dir cannot be written, or its content does not fit the settings.
    """
    metrics, context = Metrics(), LogContext()
    start_at_zero(metrics.telemetry_dropped_total, ((priority,) for priority in get_args(Priority)))
    stderr = sys.stderr or io.StringIO()  # None when the parent closed it
    with logging_to(stderr, settings.logging, context, on_dropped=partial(_count_dropped, metrics)):
        for notice in settings.notices:
            structlog.get_logger().warning("setting_retired", detail=notice)
        require_free(settings)  # reported at once, not only after the job has been built
        build = build_lane(settings)
        ready = build.ready
        metrics.build_info.info({"version": __version__, "torch": ready.torch_version, "device": ready.device})
        with prepare_state(settings) as prepared:
            point = load_resume_point(prepared)
            if point.loaded is not None:
                decided = saved_adjustments(point.state.storage.journal, point.state.run_id)
                resume(build, point.loaded, settings, decided)
            run_id = point.state.run_id
            _log_start(point, build.ready.notes)
            if point.loaded is not None:
                settings_record.report_changes(settings, run_id, build.ready.learning_rates)
            settings_record.record(settings, run_id)
            with (
                SignalBoard.create(settings.signals.board(run_id), run_id) as board,
                stacks_on_request(settings),
                CheckpointWriter(point.state.storage.checkpoints) as writer,
            ):
                foundation = Foundation(
                    settings=settings,
                    build=build,
                    board=board,
                    storage=point.state.storage,
                    writer=writer,
                    run=run_row(point.state.storage.journal, run_id),
                    active_halt=active_halt(point.state),
                    metrics=metrics,
                    emitter=Emitter(),
                    log_context=context,
                    open_emergencies=tuple(open_emergencies(point.state)),
                    newest_checkpoint_ns=None if point.loaded is None else point.loaded.row.at_ns,
                    points=point.points,
                    rollbacks=point.rollbacks,
                )
                host = Host(foundation)
                code = anyio.run(host.serve)
            if host.ending is not None:
                end_run(point.state, host.ending)
            return code


def resume(
    build: LaneBuild, loaded: LoadedCheckpoint, settings: Settings, decided: Sequence[ActiveAdjustment] = ()
) -> None:
    """Restores a checkpoint into a lane that has just been built. Raises ConfigurationError if it does not fit.

    The learning-rate adjustments in `decided`, which belong to the run, stay in force.
    """
    try:
        restored = build.resume(loaded.image, decided)
    except (RollbackError, SeedError, OptimizationError) as error:
        problem = (
            f"state.dir: {settings.state.dir} holds an unfinished run that does not fit these settings: {error}; give "
            "this one another state.dir, or abandon that run with state.resume = never"
        )
        raise ConfigurationError([problem]) from error
    if restored.state_digest != restored.expected_digest:
        raise ConfigurationError([f"state.dir: {settings.state.dir}: the resumed state is not the one that was saved"])


def _count_dropped(metrics: Metrics, priority: Priority) -> None:
    """Counts a log line that was not written; one of priority critical is a broadcast that failed."""
    metrics.telemetry_dropped_total.labels(priority).inc()
    if priority == "critical":
        metrics.emergency_broadcast_failures_total.inc()


def _log_start(point: ResumePoint, notes: Sequence[str]) -> None:
    log = structlog.get_logger()
    for sentence in notes:
        log.info("job", detail=sentence)
    for sentence in point.state.notes:
        log.info("state", detail=sentence)
    if point.loaded is not None:
        row = point.loaded.row
        log.info("resumed", run_id=point.state.run_id, step=row.global_step, checkpoint_id=row.checkpoint_id)
