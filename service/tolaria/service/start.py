"""From settings to a running service: what has to be there before there is an event loop.

Owns the order in which things are had and given back. Must not hold rules, and never touches a tensor.
"""

from __future__ import annotations

import io
import sys
import time
import uuid
from importlib.metadata import version

import anyio

from tolaria import __version__
from tolaria.config import Settings
from tolaria.emergency.watched import stacks_on_request
from tolaria.errors import BrokenJobError, StateUnsupportedError
from tolaria.service.host import Host
from tolaria.service.parts import Ground, Parts
from tolaria.signals import SignalBoard
from tolaria.telemetry.emitter import Emitter
from tolaria.telemetry.logging import LogContext, logging_to
from tolaria.telemetry.metrics import Metrics
from tolaria.training.progress import Progress
from tolaria.training.recovery.keeper import SnapshotKeeper
from tolaria.training.rig import Rig, build_rig


def run(settings: Settings) -> int:
    """Serve until the run is done or a signal comes; returns the exit code.

    Raises:
        JobError: when the job cannot be built; nothing has been started by then.
        BindError: when an address cannot be had; what had been started is stopped again.
        PeerUnavailableError: when an embedded peer does not start.
        SignalError: when the signal board cannot be had.
        ConfigurationError: when state.dir cannot be written.
    """
    metrics = Metrics()
    context = LogContext()
    dropped = metrics.telemetry_dropped_total
    stderr = sys.stderr or io.StringIO()  # closed: whoever started us does not want to hear
    with logging_to(stderr, settings.logging, context, on_dropped=lambda priority: dropped.labels(priority).inc()):
        rig = build_rig(settings)
        keeper = new_keeper(settings, rig)
        metrics.build_info.info({"version": __version__, "torch": version("torch"), "device": str(rig.device)})
        progress = new_progress(settings, rig)
        with (
            SignalBoard.create(settings.signals.board(progress.run_id), progress.run_id) as board,
            stacks_on_request(settings),
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
            )
            return anyio.run(Host(Parts(ground)).serve)


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


def new_progress(settings: Settings, rig: Rig) -> Progress:
    """Of a run that begins now."""
    training = settings.training
    return Progress(
        run_id=uuid.uuid4().hex[:12],
        job=training.job,
        experiment=training.experiment,
        epochs=training.epochs,
        steps_per_epoch=rig.steps_per_epoch,
        started_at_s=time.monotonic(),
    )
