"""`ReplicaExchange`: what the service and one machine of the group say to each other about replicas."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, TypeVar

import anyio
import anyio.to_thread

from tolaria.errors import ChannelError
from tolaria.images import StateImage
from tolaria.ranks import admission
from tolaria.ranks.admission import (
    AskReplicas,
    KeepReplicas,
    OfReplicas,
    ReplicaFollows,
    ReplicasHeld,
    ReplicaStored,
    SendReplica,
    StoreReplica,
)
from tolaria.ranks.replicas import IncomingReplica, ReplicaPoint, pieces
from tolaria.segments import Segment

_ANSWER_S: Final = 60.0
_MB: Final = 10**6

_Answer = TypeVar("_Answer", ReplicaStored, ReplicasHeld, ReplicaFollows, bytes)


class ReplicaExchange:
    """One request after the other, on the connection to the machine.

    `send` sends a frame to the machine. After a request that was cut short, the machine is asked nothing more.

    Attributes:
        held: the replicas that the machine keeps, by digest.
    """

    def __init__(self, send: Callable[[bytes], Awaitable[None]]) -> None:
        self.held: dict[str, ReplicaPoint] = {}
        self._learned = False
        self._send = send
        self._turn = anyio.Lock()
        self._waiting = self._closed = False
        self._put, self._take = anyio.create_memory_object_stream[OfReplicas | bytes](16)

    async def take_in(self, answer: OfReplicas | bytes) -> None:
        """Takes what the machine has sent, a message or a piece; ignores what answers no request."""
        if self._waiting:
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                await self._put.send(answer)

    def close(self) -> None:
        """Ends the request under way, and refuses further ones."""
        self._closed = True
        self._put.close()
        self._take.close()

    async def store(self, point: ReplicaPoint, segment: Segment, mb_per_s: float) -> None:
        """Has the machine keep a replica, sent at most that fast. Raises ChannelError if it does not."""
        async with self._request():
            await self._say(StoreReplica(point, segment.size_bytes))
            until_s = time.monotonic()
            for content in pieces(segment):
                until_s += len(content) / (mb_per_s * _MB)
                await self._send(content)
                await anyio.sleep(max(0.0, until_s - time.monotonic()))
            stored = await self._answer(ReplicaStored)
        if stored.problem or stored.digest != point.digest:
            raise ChannelError(f"the replica is not kept: {stored.problem or 'another one is'}")
        self.held[point.digest] = point

    async def learn(self, run_id: str) -> None:
        """Learns once which replicas of the run the machine has kept for an earlier connection; it drops all others.

        Raises ChannelError.
        """
        if not self._learned:
            points = await self.offers(run_id)
            self.held, self._learned = {point.digest: point for point in points}, True
            await self._say(KeepReplicas(points))

    async def keep(self, points: Sequence[ReplicaPoint]) -> None:
        """Has the machine drop all replicas but these. Raises ChannelError."""
        if list(self.held.values()) != list(points):
            await self._say(KeepReplicas(tuple(points)))
            self.held = {point.digest: point for point in points}

    async def offers(self, run_id: str) -> tuple[ReplicaPoint, ...]:
        """Returns which replicas of the run the machine keeps. Raises ChannelError."""
        async with self._request():
            await self._say(AskReplicas(run_id))
            return (await self._answer(ReplicasHeld)).points

    async def fetch(self, point: ReplicaPoint) -> StateImage:
        """Returns the image of a replica. Raises ImageDamagedError, ChannelError, and MemoryError without room."""
        async with self._request():
            await self._say(SendReplica(point.digest))
            size_bytes = (await self._answer(ReplicaFollows)).size_bytes
            incoming = await anyio.to_thread.run_sync(IncomingReplica, point, size_bytes)
            while not incoming.complete:
                incoming.feed(await self._answer(bytes))
        return await anyio.to_thread.run_sync(incoming.verified)

    @asynccontextmanager
    async def _request(self) -> AsyncIterator[None]:
        """Spans a request and its answer."""
        async with self._turn:
            if self._closed:
                raise ChannelError("the machine has gone, or has not answered before")
            self._waiting = True
            try:
                yield
            except BaseException:
                self.close()
                raise
            finally:
                self._waiting = False

    async def _say(self, message: admission.ToMachine) -> None:
        await self._send(admission.packed(message))

    async def _answer(self, kind: type[_Answer]) -> _Answer:
        try:
            with anyio.fail_after(_ANSWER_S):
                answer = await self._take.receive()
        except TimeoutError:
            raise ChannelError(f"no answer within {_ANSWER_S:g} s") from None
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            raise ChannelError("the machine has gone") from None
        if not isinstance(answer, kind):
            raise ChannelError("another answer than was asked for")
        return answer
