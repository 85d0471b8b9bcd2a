"""Replicas of the newest snapshots on another machine of the group: how they are kept, and found again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import anyio
import anyio.to_thread
import structlog

from tolaria.errors import ChannelError, ImageDamagedError
from tolaria.ranks.replicas import FoundReplica, LiveSnapshots, ReplicaPoint
from tolaria.segments import Segment, open_image, share
from tolaria.transport.nodes import JoinedNode
from tolaria.transport.rendezvous import Rendezvous

_PERIOD_S: Final = 1.0
_FURTHER_S: Final = 2.0
"""Seconds that a machine with a newer replica has to join after the first one with any."""

_log = structlog.get_logger(__name__)


class ReplicaKeeper:
    """Keeps replicas of the newest snapshots on another machine, beside training. Used on the event loop only.

    A snapshot is copied first, so that the lane overwrites it when it likes; what was overwritten meanwhile does not
    have its digest. The machine is the first one that takes part in the group.

    Args:
        rendezvous: the machines that have joined.
        mb_per_s: bandwidth that replicas may use.
        descriptors: returns the segments of the lane by number, as descriptors.

    Attributes:
        snapshots: returns the snapshots that there are, of which the newest are kept.
    """

    def __init__(
        self, rendezvous: Rendezvous, mb_per_s: float, descriptors: Callable[[], list[tuple[int, int]]]
    ) -> None:
        self._rendezvous = rendezvous
        self._mb_per_s = mb_per_s
        self._descriptors = descriptors
        self.snapshots: Callable[[], LiveSnapshots] = LiveSnapshots
        self._said = ""

    async def serve(self) -> None:
        """Sends replicas until cancelled, at most one snapshot a second."""
        while True:
            await anyio.sleep(_PERIOD_S)
            members = [node for node in self._rendezvous.nodes if node.member]
            if not members:
                continue
            try:
                await self._keep_on(members[0])
            except (ChannelError, ImageDamagedError, MemoryError, OSError) as error:
                self._say_once("replica_not_kept", members[0].host, str(error))

    async def _keep_on(self, node: JoinedNode) -> None:
        exchange, snapshots = node.replicas, self.snapshots()
        if not snapshots.points:
            return
        run_id = snapshots.points[0].run_id
        await exchange.learn(run_id)
        for other in self._rendezvous.nodes if exchange.held else ():
            if other is not node:
                with suppress(ChannelError):  # it matters to nothing else
                    await other.replicas.learn(run_id)
                    await other.replicas.keep(())
        await exchange.keep(snapshots.kept(exchange.held.values()))
        for point in snapshots.wanted():
            if point.digest in exchange.held:
                continue
            segments = [(number, os.dup(descriptor)) for number, descriptor in self._descriptors()]
            copied = await anyio.to_thread.run_sync(_copied, segments, point)
            if copied is not None:
                await exchange.store(point, copied, self._mb_per_s)
                self._say_once("replicas_kept", node.host, "")
                _log.debug("replica_stored", step=point.global_step, host=node.host)

    def _say_once(self, event: str, host: str, detail: str) -> None:
        """Logs what was not logged last."""
        if (said := f"{event} {host} {detail}") != self._said:
            self._said = said
            (_log.warning if detail else _log.info)(event, host=host, detail=detail)


def _copied(descriptors: Sequence[tuple[int, int]], point: ReplicaPoint) -> Segment | None:
    """Returns a copy of the snapshot, whose digests it has computed; None if it is not there any more.

    Takes over the descriptors. Raises ImageDamagedError, and MemoryError without room.
    """
    segments = dict[int, Segment]()
    for number, descriptor in descriptors:
        try:
            segments[number] = Segment(number, descriptor)
        except (OSError, ValueError):
            os.close(descriptor)
        else:
            segments[number].close_descriptor()
    for first in segments.values():
        with suppress(ImageDamagedError):
            image = open_image(first, segments).image
            same = image.sealed is not None and image.sealed.total == point.digest
            if same and image.position.global_step == point.global_step:
                copied = share(image)
                open_image(copied, {}).image.verify()
                return copied
    return None


async def find_replica(
    rendezvous: Rendezvous, run_id: str, acceptable: Callable[[ReplicaPoint], bool], *, machines: int, wait_s: float
) -> FoundReplica | None:
    """Returns the newest acceptable replica of a run that is intact; None if there is none.

    Waits at most `wait_s` for that number of machines to join, but only shortly once one has such a replica.
    """
    offers = await _offers(rendezvous, run_id, acceptable, machines=machines, wait_s=wait_s)
    for point, node in sorted(offers, key=lambda offer: offer[0].global_step, reverse=True):
        try:
            return FoundReplica(point, await node.replicas.fetch(point), node.host)
        except (ImageDamagedError, ChannelError, MemoryError) as error:
            _log.error("replica_not_restored", step=point.global_step, host=node.host, detail=str(error))
    return None


async def _offers(
    rendezvous: Rendezvous, run_id: str, acceptable: Callable[[ReplicaPoint], bool], *, machines: int, wait_s: float
) -> list[tuple[ReplicaPoint, JoinedNode]]:
    asked, offers = set[JoinedNode](), list[tuple[ReplicaPoint, JoinedNode]]()
    until_s = time.monotonic() + wait_s
    while True:
        for node in rendezvous.nodes:
            if node not in asked:
                asked.add(node)
                with suppress(ChannelError):
                    offers += [(p, node) for p in await node.replicas.offers(run_id) if acceptable(p)]
        left_s = until_s - time.monotonic()
        if len(asked) >= machines or left_s <= 0:
            return offers
        with anyio.move_on_after(min(left_s, _FURTHER_S if offers else left_s)) as waiting:
            await rendezvous.changed()
        if waiting.cancelled_caught and offers:
            return offers
