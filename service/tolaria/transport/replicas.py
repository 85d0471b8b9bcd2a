"""Replicas of the newest snapshots on another machine of the group: how they are kept, and found again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

import anyio
import anyio.to_thread
import structlog

from tolaria.errors import ChannelError, ImageDamagedError
from tolaria.ranks.replicas import FORKS_CHARACTERS_MAX, FoundReplica, LiveSnapshots, ReplicaPoint, check_room
from tolaria.segments import Segment, header_bytes, open_image, placed_bytes, share
from tolaria.transport.nodes import JoinedNode
from tolaria.transport.rendezvous import Rendezvous

_PERIOD_S: Final = 1.0
_FURTHER_S: Final = 2.0
"""Seconds that a machine with a newer replica has to join after the first one with any."""

_log = structlog.get_logger(__name__)


class ReplicaKeeper:
    """Keeps replicas of the newest snapshots on another machine, beside training. Used on the event loop only.

    A snapshot is copied first, so that the lane may overwrite it; a copy of what was overwritten meanwhile does not
    have its digest. The machine is one that takes part in the group: the first which has not refused a replica lately,
    or the one that keeps some already.

    Args:
        rendezvous: the machines that have joined.
        mb_per_s: bandwidth that replicas may use.
        segments: those of the lane by number; looked up in a thread.

    Attributes:
        snapshots: returns the snapshots that there are, of which the newest are kept.
    """

    def __init__(self, rendezvous: Rendezvous, mb_per_s: float, segments: Mapping[int, Segment]) -> None:
        self._rendezvous = rendezvous
        self._mb_per_s = mb_per_s
        self._segments = segments
        self.snapshots: Callable[[], LiveSnapshots] = LiveSnapshots
        self._said: dict[str, tuple[str, str]] = {}
        self._said_forks = False

    async def serve(self) -> None:
        """Sends replicas until cancelled, at most one snapshot a second."""
        while True:
            await anyio.sleep(_PERIOD_S)
            snapshots = self._sendable(self.snapshots())
            if not snapshots.points:
                continue
            members = [node for node in self._rendezvous.nodes if node.member and node.replicas.is_open]
            if not members:
                self._say_once("no_replicas", "", "no machine of the group keeps replicas at present")
                continue
            node = max(members, key=lambda each: each.replicas.has_stored)  # the first of them if none has
            try:
                await self._keep_on(node, snapshots)
            except (ChannelError, ImageDamagedError, MemoryError, OSError) as error:
                self._say_once("replica_not_kept", node.host, str(error))

    def _sendable(self, snapshots: LiveSnapshots) -> LiveSnapshots:
        """Returns the snapshots without those that no message has room for."""
        points = tuple(point for point in snapshots.points if len(point.forks) <= FORKS_CHARACTERS_MAX)
        if len(points) < len(snapshots.points) and not self._said_forks:
            self._said_forks = True
            detail = (
                f"the lineage takes more than {FORKS_CHARACTERS_MAX} characters: the run has been rolled back often"
            )
            _log.warning("replica_not_kept", step=snapshots.points[0].global_step, detail=detail)
        return LiveSnapshots(points, snapshots.lineage)

    async def _keep_on(self, node: JoinedNode, snapshots: LiveSnapshots) -> None:
        exchange, run_id = node.replicas, snapshots.points[0].run_id
        await exchange.learn(run_id)
        for other in self._rendezvous.nodes if exchange.has_stored else ():
            if other is not node:
                with suppress(ChannelError):  # it matters to nothing else
                    await other.replicas.learn(run_id)
                    await other.replicas.keep(())
        await exchange.keep(snapshots.kept(exchange.held.values()))
        for point in snapshots.missing(exchange.held.values()):
            await exchange.keep(snapshots.kept(exchange.held.values()))  # before one more comes
            if await self._send(node, point):
                self._say_once("replicas_kept", node.host, "")
                _log.debug("replica_stored", step=point.global_step, host=node.host)

    async def _send(self, node: JoinedNode, point: ReplicaPoint) -> bool:
        """Sends a replica; returns whether it is kept."""
        copied = await anyio.to_thread.run_sync(_copied, self._segments, point)
        if copied is None:
            return False
        kept = await node.replicas.store(point, copied, self._mb_per_s)
        unused = [copied]
        del copied
        await anyio.to_thread.run_sync(unused.clear)  # gigabytes take long to free
        return kept

    def _say_once(self, event: str, host: str, detail: str) -> None:
        """Logs what was not logged since replicas began, or ceased, to be kept."""
        if self._said.get(event) != (host, detail):
            if not detail or "replicas_kept" in self._said:
                self._said.clear()
            self._said[event] = host, detail
            (_log.warning if detail else _log.info)(event, host=host, detail=detail)


def _copied(segments: Mapping[int, Segment], point: ReplicaPoint) -> Segment | None:
    """Returns a copy of the snapshot, whose digests it has computed; None if it is not there any more.

    Raises ImageDamagedError, OSError, and MemoryError without room.
    """
    for number in segments:
        with suppress(ImageDamagedError, LookupError, ValueError):  # overwritten, closed meanwhile, or no segment
            image = open_image(segments[number], segments).image
            same = image.sealed is not None and image.sealed.total == point.digest
            if same and image.position.global_step == point.global_step:
                check_room(placed_bytes(image.specs) + header_bytes(image.specs, image.values))
                copied = share(image)
                open_image(copied, {}).image.verify()
                return copied
    return None


async def find_replica(
    rendezvous: Rendezvous,
    run_id: str,
    acceptable: Callable[[ReplicaPoint], bool],
    *,
    machines: int,
    wait_s: float,
    proven_first: bool = False,
) -> FoundReplica | None:
    """Returns the newest acceptable replica of a run that is intact, a proven one if asked for; None without any.

    Waits at most `wait_s` for that number of machines to join, but only shortly once one has such a replica.
    """
    offers = await _offers(rendezvous, run_id, acceptable, machines=machines, wait_s=wait_s)
    ordered = sorted(offers, key=lambda o: (proven_first and o[0].proven, o[0].global_step), reverse=True)
    for point, node in ordered:
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
