"""Starts a service from its settings: creates what has to exist before the run, in order."""

from __future__ import annotations

import asyncio
import gc
import importlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import structlog

from tolaria import __version__
from tolaria.checkpoint.writer import CheckpointWriter
from tolaria.config import Settings, exposure_warnings, require_extras, require_protection
from tolaria.emergency.supervision import stacks_on_request
from tolaria.export.writing import remove_partial_exports
from tolaria.images import StateImage
from tolaria.lane.messages import LaneReady
from tolaria.rpc.exports import EXPORTS
from tolaria.run.adjustments import saved_adjustments
from tolaria.run.branches import branch_origin
from tolaria.run.data_skips import saved_skips
from tolaria.run.resume import (
    ResumePoint,
    active_halt,
    end_run,
    load_resume_point,
    locked_state,
    open_emergencies,
    prepare_state,
    run_row,
)
from tolaria.service import settings_record
from tolaria.service.foundation import Foundation, LaneBuild, build_lane
from tolaria.service.host import Host
from tolaria.service.listeners import open_listeners
from tolaria.service.protection import forbid_core_files
from tolaria.service.replicas import adopt_at_start
from tolaria.signals import SignalBoard
from tolaria.status_page.curves import CurveSet
from tolaria.status_page.earlier import earlier_curves
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.logging import LogContext, Priority, logging_to
from tolaria.telemetry.metrics import Metrics, start_at_zero
from tolaria.telemetry.tracing import Tracer, tracing
from tolaria.trackers.tracker import check_trackers
from tolaria.values.optimization import ActiveAdjustment


def run(settings: Settings, reread: Callable[[], Settings]) -> int:
    """Serves until the run is done or a signal arrives; returns the exit code.

    `reread` reads the sources of the settings again. What the settings can be wrong about is found before the job's
    code runs, as far as possible.

    Raises:
        ExposedError: other machines could reach the admin server without TLS or a token.
        CredentialsError: a file with certificates, tokens or passwords cannot be used.
        StateHeldError: another service uses state.dir.
        BindError: an address cannot be listened on.
        JobError: the job cannot be built; nothing has been started yet.
        PeerUnavailableError: an embedded peer does not start.
        SignalError: the signal board cannot be created.
        ConfigurationError: state.dir cannot be written, its content does not fit the settings, or an extra is missing.
    """
    require_protection(settings)
    require_extras(settings)
    check_trackers(settings.tracking)
    forbid_core_files(settings)
    metrics, context = Metrics(), LogContext()
    start_at_zero(metrics.telemetry_dropped_total, ((priority,) for priority in get_args(Priority)))
    stderr = sys.stderr or io.StringIO()  # None when the parent closed it
    with logging_to(stderr, settings.logging, context, on_dropped=partial(_count_dropped, metrics)):
        for notice in settings.notices:
            structlog.get_logger().warning("setting_retired", detail=notice)
        for sentence in exposure_warnings(settings):
            structlog.get_logger().warning("exposed", detail=sentence)
        # Not the thread's current loop: a job that asks for one while it is built gets another.
        with (
            tracing(settings.telemetry, "tolaria") as tracer,
            locked_state(settings),
            asyncio.Runner(loop_factory=asyncio.new_event_loop) as loop,
        ):
            listeners = open_listeners(settings, loop, metrics)
            remove_partial_exports(Path(settings.state.dir) / EXPORTS)
            build = _built(settings) if settings.lane.mode == "thread" or not hasattr(os, "memfd_create") else None
            with prepare_state(settings, adopt=partial(adopt_at_start, settings, loop)) as prepared:
                point = load_resume_point(prepared)
                checkpoint = _checkpoint(point)
                if build is not None:
                    build.name_run(point.state.run_id)
                    if checkpoint is None:
                        build.begin_run()
                    else:
                        build.resume_run(*checkpoint)
                    _report_ready(settings, metrics, point, build.ready)
                with _foundation(
                    settings, build, point, checkpoint=checkpoint, metrics=metrics, context=context, tracer=tracer
                ) as foundation:
                    host = Host(replace(foundation, reread=reread), listeners)
                    try:
                        code = loop.run(host.serve())
                    finally:
                        loop.close()  # ends its tasks, after an early signal too, while what they use is open
                if host.ending is not None:
                    end_run(point.state, host.ending)
                return code


def _built(settings: Settings) -> LaneBuild:
    """Builds the job, with the garbage collector, which `tolaria.cli.main` disables for the imports, enabled."""
    importlib.import_module("tolaria.lane.build")
    # What has been imported stays until the end: without it, each full collection, and the exit, take a second less.
    gc.freeze()
    gc.enable()
    return build_lane(settings)


def _report_ready(settings: Settings, metrics: Metrics, point: ResumePoint, ready: LaneReady) -> None:
    """Logs and records what the run starts with, once the lane has been built."""
    run_id = point.state.run_id
    metrics.build_info.info({"version": __version__, "torch": ready.torch_version, "device": ready.device})
    _log_start(point, ready.notes)
    if point.loaded is not None:
        settings_record.report_changes(settings, run_id, ready.learning_rates)
    settings_record.record(settings, run_id)


def _checkpoint(point: ResumePoint) -> tuple[StateImage, tuple[ActiveAdjustment, ...]] | None:
    """Returns the image that the run is resumed from, with its adjustments of learning rates."""
    if point.loaded is None:
        return None
    return point.loaded.image, saved_adjustments(point.state.storage.journal, point.state.run_id)


@contextmanager
def _foundation(
    settings: Settings,
    build: LaneBuild | None,
    point: ResumePoint,
    *,
    checkpoint: tuple[StateImage, tuple[ActiveAdjustment, ...]] | None,
    metrics: Metrics,
    context: LogContext,
    tracer: Tracer,
) -> Iterator[Foundation]:
    """Creates what exists before the run and outlives it; closes it at the end of the block."""
    run_id, storage = point.state.run_id, point.state.storage
    with (
        SignalBoard.create(settings.signals.board(run_id), run_id) as board,
        stacks_on_request(),
        CheckpointWriter(storage.checkpoints) as writer,
    ):
        yield Foundation(
            settings=settings,
            build=build,
            checkpoint=checkpoint,
            on_ready=partial(_report_ready, settings, metrics, point),
            board=board,
            storage=storage,
            writer=writer,
            run=run_row(storage.journal, run_id),
            active_halt=active_halt(point.state),
            metrics=metrics,
            emitter=Emitter(tracer),
            log_context=context,
            open_emergencies=tuple(open_emergencies(point.state)),
            newest_checkpoint_ns=None if point.loaded is None else point.loaded.row.at_ns,
            points=point.points,
            rollbacks=point.rollbacks,
            skips=saved_skips(storage.journal, run_id),
            branch=branch_origin(storage.journal, run_id),
            curves=_curves(settings, point),
        )


def _curves(settings: Settings, point: ResumePoint) -> CurveSet:
    """Returns what earlier processes of the run have left of its curves, for the status page."""
    if point.loaded is None or not settings.metrics.viewers_max:
        return CurveSet()
    step = point.loaded.image.position.global_step
    return earlier_curves(Path(settings.state.dir), point.state.run_id, point.points.lineage, step)


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
