"""`ReplicaStore`: the replicas that this machine keeps in its memory, and how it serves the service with them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from tolaria.errors import ImageDamagedError
from tolaria.ranks import admission
from tolaria.ranks.admission import (
    AskReplicas,
    KeepReplicas,
    ReplicaFollows,
    ReplicaReady,
    ReplicasHeld,
    ReplicaStored,
    SendReplica,
    StoreReplica,
)
from tolaria.ranks.replicas import HELD_MAX, IncomingReplica, Piece, ReplicaPoint, pieces
from tolaria.segments import Segment


class ReplicaStore:
    """The replicas that this machine keeps for others, as long as its process runs.

    What is dropped is returned: to free gigabytes takes long, so that a thread has to let go of the last reference.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[ReplicaPoint, Segment]] = {}

    def put(self, incoming: IncomingReplica) -> list[Segment]:
        """Takes over a replica that has been verified; the oldest one goes if there are too many."""
        dropped = self._drop({incoming.point.digest})
        self._held[incoming.point.digest] = incoming.point, incoming.segment
        return dropped + self._drop(sorted(self._held, key=lambda each: self._held[each][0].global_step)[:-HELD_MAX])

    def keep(self, points: Iterable[ReplicaPoint]) -> list[Segment]:
        """Drops all replicas but those of these points, which say what is known of them now."""
        known = {point.digest: point for point in points}
        dropped = self._drop(self._held.keys() - known.keys())
        self._held = {digest: (known[digest], segment) for digest, (_, segment) in self._held.items()}
        return dropped

    def of(self, run_id: str) -> list[ReplicaPoint]:
        """Returns what replicas of a run there are."""
        return [point for point, _ in self._held.values() if point.run_id == run_id]

    def segment(self, digest: str) -> Segment | None:
        """Returns the memory of a replica; None if it has been dropped."""
        return self._held[digest][1] if digest in self._held else None

    def _drop(self, digests: Iterable[str]) -> list[Segment]:
        return [self._held.pop(digest)[1] for digest in digests if digest in self._held]


class ReplicaSession:
    """Serves one connection to the service with the replicas of a store.

    `obey` and `take` are for the task that receives, and do not block it: what takes long is done in tasks. A new
    request ends the one before.

    Args:
        store: outlives the connection.
        send: sends a frame. Raises ChannelError.
    """

    def __init__(self, store: ReplicaStore, send: Callable[[bytes], Awaitable[None]]) -> None:
        self._store = store
        self._send = send
        self._request = 0
        self._incoming: IncomingReplica | None = None
        self._allocating = anyio.Lock()
        self._tasks: TaskGroup

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Spans the time in which messages are taken; waits at its end for what they began. Raises ChannelError."""
        async with anyio.create_task_group() as self._tasks:
            yield

    def obey(self, message: admission.ToMachine) -> bool:
        """Has done what the service says; returns whether it is about replicas."""
        match message:
            case StoreReplica():
                self._begin(message.request)
                self._tasks.start_soon(self._prepare, message)
            case KeepReplicas():
                self._free(self._store.keep(message.points))
            case AskReplicas():
                self._begin(message.request)
                held = tuple(self._store.of(message.run_id))
                self._tasks.start_soon(self._answer, ReplicasHeld(message.request, held))
            case SendReplica():
                self._begin(message.request)
                self._tasks.start_soon(self._send_replica, message)
            case _:
                return False
        return True

    def take(self, piece: Piece) -> None:
        """Takes the next piece of a replica; one that was not waited for is dropped.

        Raises ChannelError if it is longer than what is missing.
        """
        incoming = self._incoming
        if incoming is None or piece.request != self._request:
            return
        incoming.feed(piece.content)
        if incoming.complete:
            self._incoming = None
            self._tasks.start_soon(self._keep, incoming, piece.request)

    def _begin(self, request: int) -> None:
        self._request = request
        if self._incoming is not None:
            segment, self._incoming = self._incoming.segment, None
            self._free([segment])

    def _free(self, segments: list[Segment]) -> None:
        """Has a thread let go of segments that nothing else refers to, before the next one is allocated."""

        async def free() -> None:
            async with self._allocating:
                await anyio.to_thread.run_sync(segments.clear)

        if segments:
            self._tasks.start_soon(free)

    async def _prepare(self, message: StoreReplica) -> None:
        """Allocates memory for a replica, for one at a time."""
        problem = ""
        async with self._allocating:
            if message.request != self._request:
                return
            try:
                incoming = await anyio.to_thread.run_sync(IncomingReplica, message.point)
            except MemoryError as error:
                problem = str(error) or "no memory"
            else:
                if message.request != self._request:
                    return
                self._incoming = incoming
        await self._answer(ReplicaReady(message.request, problem))

    async def _keep(self, incoming: IncomingReplica, request: int) -> None:
        """Keeps a replica if it is intact."""
        problem, dropped = "", list[Segment]()
        async with self._allocating:
            try:
                await anyio.to_thread.run_sync(incoming.verified)
            except (ImageDamagedError, MemoryError) as error:
                problem = str(error) or "no memory"
            else:
                dropped = self._store.put(incoming)
            await anyio.to_thread.run_sync(dropped.clear)
        await self._answer(ReplicaStored(request, problem))

    async def _send_replica(self, message: SendReplica) -> None:
        """Sends a replica, or says that it is not there any more."""
        segment = self._store.segment(message.digest)
        await self._answer(ReplicaFollows(message.request, 0 if segment is None else segment.size_bytes))
        for content in () if segment is None else pieces(segment, message.request):
            if message.request != self._request:
                return
            await self._send(content)

    async def _answer(self, message: admission.ToService) -> None:
        await self._send(admission.packed(message))
