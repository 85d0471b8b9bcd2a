"""Whether the service is ready: what `/readyz` says, and the health that gRPC clients can check and watch."""

from __future__ import annotations

import math
import shutil
from functools import partial
from typing import Final

import anyio
import anyio.to_thread

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.enums_pb2 import CIRCUIT_STATE_OPEN
from tolaria.grpc_server import GrpcServer
from tolaria.rollback.protocol import TAMIYO
from tolaria.run.safety import KASMINA
from tolaria.run.status import state_name
from tolaria.service.wiring import Core
from tolaria.signals.layout import LanePhase
from tolaria.telemetry.exporter import Readiness

ADMIN_SERVICE: Final = admin.DESCRIPTOR.services_by_name["TolariaAdminService"].full_name
LONG_PHASE_S: Final = 10.0
"""Time from which `/readyz` mentions what the lane does other than steps."""

DISK_INTERVAL_S: Final = 10.0
LANE_PHASES: Final = tuple(phase.name.lower() for phase in LanePhase)
"""Values of the label `phase` of the metric `lane.phase`."""

_STEPPING: Final = LanePhase.STEPPING.name.lower()
_READY_STATES: Final = frozenset({admin.RUN_STATE_RUNNING, admin.RUN_STATE_PAUSED, admin.RUN_STATE_FINISHED})


def readiness(core: Core) -> Readiness:
    """Returns what `/readyz` says. Reads plain values only, so that any thread may call it."""
    phase, phase_s = core.status.lane_phase()
    details = [f"the lane has been {phase} for {phase_s:.0f} s"] if phase_s >= LONG_PHASE_S else []
    if core.status.snapshots_unavailable:
        details.append(f"no fast rollback: {core.status.snapshots_unavailable}")
    return Readiness(reasons_not_ready(core), details)


def reasons_not_ready(core: Core) -> list[str]:
    """Returns why `/readyz` reports not ready; a run that cannot save its state is never ready.

    A paused or finished run answers operators as a running one does: it is ready.
    """
    reasons = [f"the service is stopping: {core.status.draining}"] if core.status.draining else []
    if core.status.state not in _READY_STATES:
        reason = core.status.state_reason
        reasons.append(f"the run is {state_name(core.status.state)}" + (f": {reason}" if reason else ""))
    if core.status.recovering and core.status.state in _READY_STATES:
        reasons.append(f"the run is recovering: {core.status.recovering}")
    if core.checkpointing.failing:
        reasons.append(f"checkpoints fail: {core.checkpointing.failing}")
    if core.journal.failing:
        reasons.append(f"the journal fails: {core.journal.failing}")
    return reasons


async def publish_health(core: Core, server: GrpcServer) -> None:
    """Keeps grpc.health.v1 in step with the run and the breakers, until cancelled."""
    status, breakers = core.status, core.safeguards.breakers
    await server.set_health(ADMIN_SERVICE, serving=True)  # it answers in every state of the run
    while True:
        version = status.feed.version
        await server.set_health("", serving=not reasons_not_ready(core))
        training = status.state in _READY_STATES and not (status.recovering or status.draining)
        await server.set_health("tolaria.training", serving=training)
        for name in (TAMIYO, KASMINA):
            await server.set_health(f"tolaria.{name}", serving=breakers[name].state != CIRCUIT_STATE_OPEN)
        while status.feed.version == version:  # a change during the calls above is not missed
            await status.feed.next()


async def publish_not_ready(server: GrpcServer) -> None:
    """Reports the service as not serving, at once: clients that watch its health go elsewhere."""
    for name in ("", "tolaria.training"):
        await server.set_health(name, serving=False)


def publish_phase(core: Core) -> None:
    """Has each scrape read what the lane does: an alert on a run without steps must spare long evaluations."""
    for phase in LANE_PHASES:
        core.foundation.metrics.lane_phase.labels("0", phase).set_function(partial(_is_in_phase, core, phase))


def _is_in_phase(core: Core, phase: str) -> bool:
    if core.status.state != admin.RUN_STATE_RUNNING or core.status.recovering:
        return False
    return (core.status.lane_phase()[0] or _STEPPING) == phase


async def watch_disk(core: Core) -> None:
    """Keeps the metric of free space current, until cancelled. A disk that hangs leaves it as it is."""
    one_thread, directory = anyio.CapacityLimiter(1), core.foundation.settings.state.dir
    while True:
        free = await anyio.to_thread.run_sync(_free_bytes, directory, abandon_on_cancel=True, limiter=one_thread)
        core.foundation.metrics.state_disk_free_bytes.set(free)
        await anyio.sleep(DISK_INTERVAL_S)


def _free_bytes(directory: str) -> float:
    """Returns the free space for this user; NaN when the system does not say."""
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return math.nan
