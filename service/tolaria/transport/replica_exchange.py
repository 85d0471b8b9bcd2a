"""`ReplicaExchange`: what the service and one machine of the group say to each other about replicas."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Final, TypeAlias, TypeVar

import anyio
import anyio.to_thread
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from tolaria.errors import ChannelError
from tolaria.images import StateImage
from tolaria.ranks import admission
from tolaria.ranks.admission import (
    AskReplicas,
    KeepReplicas,
    OfReplicas,
    ReplicaFollows,
    ReplicaReady,
    ReplicasHeld,
    ReplicaStored,
    SendReplica,
    StoreReplica,
)
from tolaria.ranks.replicas import IncomingReplica, Piece, ReplicaPoint, pieces
from tolaria.segments import Segment

_ANSWER_S: Final = 60.0
"""Seconds that any answer, and any piece, may take."""

_MB: Final = 10**6
_PREPARED_MB_PER_S: Final = 50.0
"""At least that fast a machine allocates the memory of a replica, and computes its digests."""

_FETCHED_MB_PER_S: Final = 4.0
"""At least that fast a replica has to arrive: a third of a link of 100 Mbit/s."""

_BACK_OFF_S: Final = 60.0
_BACK_OFF_MAX_S: Final = 600.0
"""After a replica that was not kept the next one is tried after a minute, then twice as long, up to this."""

_Answer = TypeVar("_Answer", ReplicaReady, ReplicaStored, ReplicasHeld, ReplicaFollows, Piece)
_Said: TypeAlias = OfReplicas | Piece


class ReplicaExchange:
    """One request after the other, on the connection to the machine. A request that is cut short ends with it only.

    Args:
        send: sends a frame to the machine. Raises ChannelError.
        clock: monotonic, in seconds.

    Attributes:
        held: the replicas that the machine keeps, by digest.
    """

    def __init__(self, send: Callable[[bytes], Awaitable[None]], clock: Callable[[], float] = time.monotonic) -> None:
        self.held: dict[str, ReplicaPoint] = {}
        self._kept: Sequence[ReplicaPoint] | None = None
        """What the machine was last asked to keep, if it keeps nothing else."""
        self._stored = set[str]()
        self._learned = self._closed = False
        self._send, self._clock = send, clock
        self._turn = anyio.Lock()
        self._request = 0
        self._put: MemoryObjectSendStream[_Said] | None = None
        self._failures, self._again_s = 0, -math.inf

    @property
    def is_open(self) -> bool:
        """Whether the machine may be sent a replica: not for a while after it has not kept one."""
        return not self._closed and self._clock() >= self._again_s

    @property
    def has_stored(self) -> bool:
        """Whether it keeps a replica that was sent over this connection."""
        return not self._stored.isdisjoint(self.held)

    async def take_in(self, answer: OfReplicas | Piece) -> None:
        """Takes what the machine has sent, a message or a piece; ignores what does not answer the present request."""
        if self._put is not None and answer.request == self._request:
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                await self._put.send(answer)

    def close(self) -> None:
        """Ends the request under way, and refuses further ones: the connection has ended."""
        self._closed = True
        if self._put is not None:
            self._put.close()

    async def store(self, point: ReplicaPoint, segment: Segment, mb_per_s: float) -> bool:
        """Has the machine keep a replica, sent at most that fast; returns False if a waiting request has ended that.

        Raises ChannelError if the machine does not keep it; then it is not to be sent one for a while.
        """
        point = replace(point, size_bytes=segment.size_bytes)
        self._kept = None
        try:
            if not await self._store(point, segment, mb_per_s * _MB):
                return False
        except ChannelError:
            self._failures += 1
            self._again_s = self._clock() + min(_BACK_OFF_S * 2 ** (self._failures - 1), _BACK_OFF_MAX_S)
            raise
        self._failures = 0
        self.held[point.digest] = point
        self._stored.add(point.digest)
        return True

    async def _store(self, point: ReplicaPoint, segment: Segment, bytes_per_s: float) -> bool:
        wait_s = _ANSWER_S + point.size_bytes / (_PREPARED_MB_PER_S * _MB)
        async with self._asking() as answers:
            await self._say(StoreReplica(self._request, point))
            if problem := (await _next(answers, ReplicaReady, wait_s)).problem:
                raise ChannelError(f"the machine takes no replica: {problem}")
            until_s = 0.0
            for content in pieces(segment, self._request):
                if self._turn.statistics().tasks_waiting:
                    return False
                # From now on if it was late: what was not sent in time is not sent faster afterwards.
                until_s = max(until_s, time.monotonic()) + len(content) / bytes_per_s
                await self._send_whole(content)
                await anyio.sleep(max(0.0, until_s - time.monotonic()))
            if problem := (await _next(answers, ReplicaStored, wait_s)).problem:
                raise ChannelError(f"the machine does not keep the replica: {problem}")
        return True

    async def learn(self, run_id: str) -> None:
        """Learns once which replicas of the run the machine has kept for an earlier connection; it drops all others.

        Raises ChannelError.
        """
        if not self._learned:
            points = await self.offers(run_id)
            self._learned = True
            await self.keep(points)

    async def keep(self, points: Sequence[ReplicaPoint]) -> None:
        """Has the machine drop all replicas but these. Raises ChannelError."""
        if self._kept is None or [*points] != [*self._kept]:
            await self._say(KeepReplicas(tuple(points)))
            self._kept, self.held = points, {point.digest: point for point in points}
            self._stored &= self.held.keys()

    async def offers(self, run_id: str) -> tuple[ReplicaPoint, ...]:
        """Returns which replicas of the run the machine keeps. Raises ChannelError."""
        async with self._asking() as answers:
            await self._say(AskReplicas(self._request, run_id))
            return (await _next(answers, ReplicasHeld)).points

    async def fetch(self, point: ReplicaPoint) -> StateImage:
        """Returns the image of a replica, which has to be of the size that was sent.

        Raises ImageDamagedError, ChannelError also if it does not arrive fast enough, and MemoryError without room.
        """
        incoming = await anyio.to_thread.run_sync(IncomingReplica, point)
        limit_s = _ANSWER_S + point.size_bytes / (_FETCHED_MB_PER_S * _MB)
        async with self._asking() as answers:
            try:
                with anyio.fail_after(limit_s):
                    await self._receive(incoming, answers)
            except TimeoutError:
                raise ChannelError(f"it has not arrived within {limit_s:.0f} s") from None
        return await anyio.to_thread.run_sync(incoming.verified)

    async def _receive(self, incoming: IncomingReplica, answers: MemoryObjectReceiveStream[_Said]) -> None:
        point = incoming.point
        await self._say(SendReplica(self._request, point.digest))
        size_bytes = (await _next(answers, ReplicaFollows)).size_bytes
        if size_bytes != point.size_bytes:
            raise ChannelError(f"it has {size_bytes} bytes instead of {point.size_bytes}")
        while not incoming.complete:
            incoming.feed((await _next(answers, Piece)).content)

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[MemoryObjectReceiveStream[_Said]]:
        """Spans a request, with a number, and what answers it."""
        async with self._turn:
            if self._closed:
                raise ChannelError("the machine has gone")
            self._request += 1
            put, take = anyio.create_memory_object_stream[_Said](16)
            self._put = put
            try:
                with put, take:
                    yield take
            finally:
                self._put = None

    async def _say(self, message: admission.ToMachine) -> None:
        await self._send_whole(admission.packed(message))

    async def _send_whole(self, content: bytes) -> None:
        """Sends a frame also if this task is cancelled meanwhile: the other side notices one that is left out."""
        with anyio.CancelScope(shield=True):
            await self._send(content)


async def _next(answers: MemoryObjectReceiveStream[_Said], kind: type[_Answer], wait_s: float = _ANSWER_S) -> _Answer:
    """Returns the next answer. Raises ChannelError if there is none in time, or it is of another kind."""
    try:
        with anyio.fail_after(wait_s):
            answer = await answers.receive()
    except TimeoutError:
        raise ChannelError(f"no answer within {wait_s:.0f} s") from None
    except (anyio.EndOfStream, anyio.ClosedResourceError):
        raise ChannelError("the machine has gone") from None
    if not isinstance(answer, kind):
        raise ChannelError("another answer than was asked for")
    return answer
