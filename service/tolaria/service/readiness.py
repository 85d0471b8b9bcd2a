"""Whether the service is ready: the reasons of `/readyz`, and the health that gRPC clients can check and watch."""

from __future__ import annotations

from typing import Final

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.enums_pb2 import CIRCUIT_STATE_OPEN
from tolaria.grpc_server import GrpcServer
from tolaria.run.safety import KASMINA, TAMIYO
from tolaria.run.status import state_name
from tolaria.service.wiring import Core

_READY_STATES: Final = frozenset({admin.RUN_STATE_RUNNING, admin.RUN_STATE_PAUSED, admin.RUN_STATE_FINISHED})


def reasons_not_ready(core: Core) -> list[str]:
    """Returns why `/readyz` reports not ready; a run that cannot save its state is never ready.

    A paused or finished run answers operators as a running one does: it is ready.
    """
    reasons = []
    if core.status.state not in _READY_STATES:
        reason = core.status.state_reason
        reasons.append(f"the run is {state_name(core.status.state)}" + (f": {reason}" if reason else ""))
    if core.checkpointing.failing:
        reasons.append(f"checkpoints fail: {core.checkpointing.failing}")
    if core.journal.failing:
        reasons.append(f"the journal fails: {core.journal.failing}")
    return reasons


async def publish_health(core: Core, server: GrpcServer) -> None:
    """Keeps grpc.health.v1 in step with the run and the breakers, until cancelled."""
    status, breakers = core.status, core.safeguards.breakers
    while True:
        version = status.feed.version
        await server.set_health("", serving=not reasons_not_ready(core))
        await server.set_health("tolaria.training", serving=status.state in _READY_STATES)
        for name in (TAMIYO, KASMINA):
            await server.set_health(f"tolaria.{name}", serving=breakers[name].state != CIRCUIT_STATE_OPEN)
        while status.feed.version == version:  # a change during the calls above is not missed
            await status.feed.next()
