"""When the snapshots in memory are lost, another machine of the group may have replicas: at the start, and later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

import anyio
import anyio.to_thread
import structlog

from tolaria.checkpoint.format import Provenance
from tolaria.checkpoint.storage import Storage
from tolaria.checkpoint.writer import CaptureMark, CheckpointWriter
from tolaria.config import Settings
from tolaria.errors import TolariaError
from tolaria.images import Lease
from tolaria.ranks.replicas import FoundReplica, ReplicaPoint
from tolaria.run.replicas import record, wanted_replicas
from tolaria.transport.rendezvous import Rendezvous
from tolaria.transport.replicas import find_replica

ARRIVAL_S: Final = 300.0
"""Seconds after `lane.join_wait_s` that replicas have to arrive at the start; then the newest checkpoint is restored.

300: half of what the start-up probes in `deploy/` allow.
"""

_log = structlog.get_logger(__name__)


class _NoGroup:
    """Of a rendezvous that starts no ranks."""

    def on_node_lost(self, host: str, why: str) -> None:
        """Not called: there is no group."""

    def on_ranks_ended(self, host: str, code: int, lines: object) -> None:
        """Not called: there is no group."""


def adopt_at_start(settings: Settings, loop: asyncio.Runner, storage: Storage, run_id: str) -> None:
    """Makes the newest replica of a run whose service was killed a checkpoint, if it is newer than all of them.

    Waits up to `lane.join_wait_s` for the machines of the group, which then join again, and 5 minutes more for what
    they send. Whatever fails is logged, and the run goes on from the newest checkpoint.
    """
    if not settings.rollback.replicas:
        return
    _log.info("waiting_for_replicas", wait_s=settings.lane.join_wait_s, rendezvous=settings.lane.rendezvous)
    try:
        found = loop.run(_found_at_start(settings, run_id, wanted_replicas(storage, run_id)))
        if found is not None:
            checkpoints = storage.for_run(run_id).checkpoints
            record(storage, checkpoints.write(found.image, provenance=Provenance(found.point.lineage)), found)
    except* TolariaError as group:
        _log.error("replica_not_restored", detail=str(group.exceptions[0]))


async def _found_at_start(
    settings: Settings, run_id: str, wanted: Callable[[ReplicaPoint], bool]
) -> FoundReplica | None:
    rendezvous, found = Rendezvous(settings, _NoGroup()), None
    machines, wait_s = settings.lane.nodes_max - 1, settings.lane.join_wait_s
    async with anyio.create_task_group() as tasks:
        await tasks.start(rendezvous.serve)
        with anyio.move_on_after(wait_s + ARRIVAL_S) as waiting:
            found = await find_replica(rendezvous, run_id, wanted, machines=machines, wait_s=wait_s)
        if waiting.cancelled_caught:
            _log.error("replica_not_restored", detail=f"it has not arrived within {wait_s + ARRIVAL_S:g} s")
        tasks.cancel_scope.cancel()
    return found


async def adopt_meanwhile(rendezvous: Rendezvous, storage: Storage, writer: CheckpointWriter, run_id: str) -> None:
    """Makes the newest replica of the run a checkpoint, if it is newer than all of them, while no lane trains.

    A proven one is taken before a newer one, as `Revival` does. It may take as long as a replica arrives fast enough.
    Whatever fails is logged.
    """
    try:
        wanted = await anyio.to_thread.run_sync(partial(wanted_replicas, storage, run_id, running=True))
        machines = len(rendezvous.nodes)
        found = await find_replica(rendezvous, run_id, wanted, machines=machines, wait_s=0.0, proven_first=True)
        if found is not None:
            mark = CaptureMark(Provenance(found.point.lineage))
            written = writer.write(Lease(found.image), metric=None, mark=mark)
            if written is not None:  # else two others are being written, of which one may be newer
                row = await asyncio.shield(asyncio.wrap_future(written))
                await anyio.to_thread.run_sync(record, storage, row, found)
    except TolariaError as error:
        _log.error("replica_not_restored", detail=str(error))
