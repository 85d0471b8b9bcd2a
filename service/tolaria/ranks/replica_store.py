"""`ReplicaStore`: the replicas that this machine keeps in its memory, and how it serves the service with them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial

import anyio.to_thread

from tolaria.errors import ImageDamagedError
from tolaria.ranks import admission
from tolaria.ranks.admission import (
    AskReplicas,
    KeepReplicas,
    ReplicaFollows,
    ReplicasHeld,
    ReplicaStored,
    StoreReplica,
)
from tolaria.ranks.replicas import HELD_MAX, IncomingReplica, ReplicaPoint, pieces
from tolaria.segments import Segment


class ReplicaStore:
    """The replicas that this machine keeps for others, as long as its process runs."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[ReplicaPoint, Segment]] = {}

    def put(self, incoming: IncomingReplica) -> None:
        """Takes over a replica that has been verified; the oldest one goes if there are too many."""
        self._held[incoming.point.digest] = incoming.point, incoming.segment
        for digest in sorted(self._held, key=lambda each: self._held[each][0].global_step)[:-HELD_MAX]:
            del self._held[digest]

    def keep(self, points: Iterable[ReplicaPoint]) -> None:
        """Drops all replicas but those of these points, which say what is known of them now."""
        self._held = {p.digest: (p, self._held[p.digest][1]) for p in points if p.digest in self._held}

    def of(self, run_id: str) -> list[ReplicaPoint]:
        """Returns what replicas of a run there are."""
        return [point for point, _ in self._held.values() if point.run_id == run_id]

    def segment(self, digest: str) -> Segment | None:
        """Returns the memory of a replica; None if it has been dropped."""
        return self._held[digest][1] if digest in self._held else None


class ReplicaSession:
    """Serves one connection to the service with the replicas of a store.

    Args:
        store: outlives the connection.
        send: sends a frame. Raises ChannelError.
    """

    def __init__(self, store: ReplicaStore, send: Callable[[bytes], Awaitable[None]]) -> None:
        self._store = store
        self._send = send
        self._incoming: IncomingReplica | None = None

    async def obey(self, message: admission.ToMachine) -> bool:
        """Does what the service says; returns whether it is about replicas.

        `SendReplica`, which takes long, is for `send`.
        """
        match message:
            case StoreReplica():
                self._incoming = None
                try:
                    make = partial(IncomingReplica, message.point, message.size_bytes)
                    self._incoming = await anyio.to_thread.run_sync(make)
                except MemoryError as error:
                    await self._answer(ReplicaStored(message.point.digest, str(error) or "no memory"))
            case KeepReplicas():
                self._store.keep(message.points)
            case AskReplicas():
                await self._answer(ReplicasHeld(tuple(self._store.of(message.run_id))))
            case _:
                return False
        return True

    async def take(self, piece: bytes) -> None:
        """Takes the next piece of a replica; one for which there was no memory is dropped.

        Raises ChannelError if it is longer than what is missing.
        """
        incoming = self._incoming
        if incoming is None:
            return
        incoming.feed(piece)
        if incoming.complete:
            self._incoming, problem = None, ""
            try:
                await anyio.to_thread.run_sync(incoming.verified)
                self._store.put(incoming)
            except ImageDamagedError as error:
                problem = str(error)
            await self._answer(ReplicaStored(incoming.point.digest, problem))

    async def send(self, digest: str) -> None:
        """Sends a replica, or says that it is not there any more."""
        segment = self._store.segment(digest)
        await self._answer(ReplicaFollows(0 if segment is None else segment.size_bytes))
        for content in () if segment is None else pieces(segment):
            await self._send(content)

    async def _answer(self, message: admission.ToService) -> None:
        await self._send(admission.packed(message))
