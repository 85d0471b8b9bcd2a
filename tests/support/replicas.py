"""Images that differ from step to step, segments as those of a lane, and a machine that keeps replicas."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import anyio

from support.joining import Door
from tolaria.images import StateImage, TensorSpec
from tolaria.ranks import admission
from tolaria.ranks.replica_store import ReplicaSession, ReplicaStore
from tolaria.ranks.replicas import IncomingReplica, ReplicaPoint, piece_of, pieces
from tolaria.segments import PREAMBLE_BYTES, Segment, header_bytes, image_header, placed, placed_bytes
from tolaria.values.training import Position


def image_of(global_step: int) -> StateImage:
    """Returns an image that no other step has: of two tensors, one of which takes several frames."""
    small, large = TensorSpec("parameter/b", "F32", (2,)), TensorSpec("parameter/w", "U8", (200_000,))
    content = {
        small.name: memoryview(bytearray(global_step.to_bytes(8, "little"))),
        large.name: memoryview(bytearray(bytes([global_step % 251, 1, 2, 3, 4]) * 40_000)),
    }
    return StateImage(Position(global_step, 1), (small, large), content, b'{"step":%d}' % global_step)


def segment_of(image: StateImage, number: int) -> Segment:
    """Returns a segment with the image, as a lane leaves it in its ring."""
    size_bytes = placed_bytes(image.specs)
    segment = Segment.create(number, size_bytes + header_bytes(image.specs, image.values))
    for spec, offset in placed(image.specs):
        start = PREAMBLE_BYTES + offset
        segment.memory[start : start + spec.size_bytes] = bytes(image.buffers[spec.name])
    assert segment.write_header(size_bytes, image_header(image, [(number, image.specs)]))
    return segment


def arrived(segment: Segment, announced: ReplicaPoint) -> IncomingReplica:
    """Returns the replica that the content of a segment has arrived as."""
    incoming = IncomingReplica(replace(announced, size_bytes=segment.size_bytes))
    for content in pieces(segment, 1):
        assert not incoming.complete
        piece = piece_of(content)
        assert piece is not None
        incoming.feed(piece.content)
    assert incoming.complete
    return incoming


@dataclass
class Holder:
    """A machine that has joined, with its replicas; `spoil` may change a frame that it sends.

    `heard` are the kinds of what it was sent; `most` are the replicas that it had when a further one was to come.
    """

    store: ReplicaStore = field(default_factory=ReplicaStore)
    spoil: Callable[[bytes], bytes] = lambda content: content
    pieces: int = 0
    heard: list[str] = field(default_factory=list)
    most: int = 0

    @asynccontextmanager
    async def joined(self, met: Door) -> AsyncIterator[None]:
        """Joins, and serves the service until the end of the block."""
        async with met.machine() as machine, anyio.create_task_group() as tasks:
            sending = anyio.Lock()

            async def send(content: bytes) -> None:
                async with sending:
                    await machine.channel.send(self.spoil(content))

            session = ReplicaSession(self.store, send)

            async def serve() -> None:
                async with session.open():
                    await receive()

            async def receive() -> None:
                while True:
                    content = await machine.channel.receive()
                    if (piece := piece_of(content)) is None:
                        message = admission.for_machine(content)
                        self.heard.append(message.kind)
                        if isinstance(message, admission.StoreReplica):
                            self.most = max(self.most, len(self.steps()))
                        session.obey(message)
                    else:
                        self.pieces += 1
                        session.take(piece)

            tasks.start_soon(serve)
            yield
            tasks.cancel_scope.cancel()

    def steps(self) -> list[int]:
        """Of the replicas that it has."""
        return sorted(point.global_step for point in self.store.of("run"))
