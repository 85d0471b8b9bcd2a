"""From settings to a running service: what has to be there before there is an event loop.

Owns the order in which things are had and given back. Must not hold rules, and never touches a tensor.
"""

from __future__ import annotations

import io
import sys
import time
from importlib.metadata import version

import anyio
import structlog

from tolaria import __version__
from tolaria.config import Settings
from tolaria.emergency.supervision import stacks_on_request
from tolaria.errors import (
    BrokenJobError,
    ConfigurationError,
    OptimizationError,
    RollbackError,
    SeedError,
    StateUnsupportedError,
)
from tolaria.rollback import CheckpointWriter, LoadedCheckpoint
from tolaria.service.host import Host
from tolaria.service.parts import Ground, Parts
from tolaria.signals import SignalBoard
from tolaria.telemetry.emitter import Emitter
from tolaria.telemetry.logging import LogContext, logging_to
from tolaria.telemetry.metrics import Metrics
from tolaria.training.progress import Progress
from tolaria.training.recovery.keeper import SnapshotKeeper
from tolaria.training.recovery.startup import (
    ResumePoint,
    end_run,
    load_resume_point,
    prepare_state,
    run_row,
    standing_halt,
)
from tolaria.training.rig import Rig, build_rig


def run(settings: Settings) -> int:
    """Serve until the run is done or a signal comes; returns the exit code.

    Raises:
        JobError: when the job cannot be built; nothing has been started by then.
        BindError: when an address cannot be had; what had been started is stopped again.
        PeerUnavailableError: when an embedded peer does not start.
        SignalError: when the signal board cannot be had.
        StateHeldError: when another service uses state.dir.
        ConfigurationError: when state.dir cannot be written, or what it holds does not fit the settings.
    """
    metrics = Metrics()
    context = LogContext()
    dropped = metrics.telemetry_dropped_total
    stderr = sys.stderr or io.StringIO()  # closed: whoever started us does not want to hear
    with logging_to(stderr, settings.logging, context, on_dropped=lambda priority: dropped.labels(priority).inc()):
        rig = build_rig(settings)
        keeper = new_keeper(settings, rig)
        metrics.build_info.info({"version": __version__, "torch": version("torch"), "device": str(rig.device)})
        with prepare_state(settings) as prepared:
            point = load_resume_point(prepared)
            if point.loaded is not None:
                resume(keeper, point.loaded, settings)
            progress = new_progress(settings, rig, run_id=point.state.run_id)
            _tell(point, progress)
            with (
                SignalBoard.create(settings.signals.board(progress.run_id), progress.run_id) as board,
                stacks_on_request(settings),
                CheckpointWriter(point.state.storage.checkpoints) as writer,
            ):
                ground = Ground(
                    settings=settings,
                    rig=rig,
                    keeper=keeper,
                    progress=progress,
                    board=board,
                    metrics=metrics,
                    emitter=Emitter(),
                    log_context=context,
                    storage=point.state.storage,
                    run=run_row(point.state.storage.journal, progress.run_id),
                    standing=standing_halt(point.state),
                    writer=writer,
                )
                host = Host(Parts(ground))
                code = anyio.run(host.serve)
            if host.ending is not None:
                end_run(point.state, host.ending)
            return code


def resume(keeper: SnapshotKeeper, loaded: LoadedCheckpoint, settings: Settings) -> None:
    """Bring a checkpoint into a rig that has just been built.

    Raises:
        ConfigurationError: it does not fit what the settings have built.
    """
    try:
        restored = keeper.resume(loaded.image)
    except (RollbackError, SeedError, OptimizationError) as error:
        problem = (
            f"state.dir: {settings.state.dir} holds an unfinished run that does not fit these settings: {error}; give "
            "this one a state.dir of its own, or leave that run behind with state.resume = never"
        )
        raise ConfigurationError([problem]) from error
    if restored.state_digest != restored.expected_digest:
        raise ConfigurationError([f"state.dir: {settings.state.dir}: what was resumed is not what was kept"])


def _tell(point: ResumePoint, progress: Progress) -> None:
    log = structlog.get_logger()
    for sentence in point.state.told:
        log.info("state", detail=sentence)
    if point.loaded is not None:
        row = point.loaded.row
        log.info("resumed", run_id=progress.run_id, step=row.global_step, checkpoint_id=row.checkpoint_id)


def new_keeper(settings: Settings, rig: Rig) -> SnapshotKeeper:
    """Of the rig's states.

    Raises:
        BrokenJobError: when the model keeps something that could not be brought back.
    """
    try:
        return SnapshotKeeper(rig, settings.rollback)
    except StateUnsupportedError as error:
        raise BrokenJobError(
            f"training.job {settings.training.job!r}: its model cannot be rolled back: {error}"
        ) from None


def new_progress(settings: Settings, rig: Rig, *, run_id: str) -> Progress:
    """Of a run as it begins in this process."""
    training = settings.training
    return Progress(
        run_id=run_id,
        job=training.job,
        experiment=training.experiment,
        epochs=training.epochs,
        steps_per_epoch=rig.steps_per_epoch,
        started_at_s=time.monotonic(),
    )
