"""Replicas: copies of the newest snapshots, which another machine of the group keeps in its memory.

A replica travels over the authenticated connection of that machine, as the bytes of one segment with the image and its
digests, in pieces between other messages. Both sides compute the digests of what has arrived before they use it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Final

from pydantic import Field

from tolaria.cgroups import memory_left
from tolaria.errors import ChannelError, ImageDamagedError
from tolaria.images import StateImage
from tolaria.segments import PREAMBLE_BYTES, Segment, open_image
from tolaria.values.lineage import Lineage

PIECE_BYTES: Final = 2**16 - 2**8
"""Bytes of a replica in one frame of the connection."""

HELD_MAX: Final = 3
"""Replicas on one machine: the newest, the newest proven one, and one that has just arrived."""

FORKS_CHARACTERS_MAX: Final = 16_384
"""Of a lineage. A message with as many points as a machine holds fits into a frame."""

_RESERVE_BYTES: Final = 2**29
"""Memory that a replica leaves to the ranks, whose need changes from step to step."""

_PIECE: Final = struct.Struct("<cI")
"""How the frame of a piece begins: a zero byte, since messages are JSON objects, and the number of the request."""

_Name = Annotated[str, Field(max_length=255)]
_Count = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True, slots=True)
class ReplicaPoint:
    """A snapshot of which there is a replica, or is to be one.

    `attempt` and `forks`, as `Lineage.to_json` returns them, are its lineage. `proven`: losses since have proven it.
    `size_bytes` is that of the replica, once there is one.
    """

    run_id: _Name
    digest: _Name
    global_step: _Count
    attempt: _Count
    forks: Annotated[str, Field(max_length=FORKS_CHARACTERS_MAX)] = ""
    proven: bool = False
    size_bytes: _Count = 0

    @property
    def lineage(self) -> Lineage:
        """The ancestors of the state. Raises ValueError if another version wrote them."""
        return Lineage.of(self.attempt, self.forks)


@dataclass(frozen=True, slots=True)
class LiveSnapshots:
    """The snapshots in memory that replicas are made of, none of them suspect, and the lineage of the live state."""

    points: tuple[ReplicaPoint, ...] = ()
    lineage: Lineage = field(default_factory=Lineage)

    def wanted(self) -> list[ReplicaPoint]:
        """Returns what is to be kept elsewhere: the newest snapshot, and the newest proven one."""
        return newest(self.points)

    def kept(self, held: Iterable[ReplicaPoint]) -> list[ReplicaPoint]:
        """Returns what stays of the replicas that are held: of the ancestors of the live state, as in `wanted`.

        One that is newer than every snapshot is of an earlier service, which the live state does not descend from. What
        proves a snapshot proves the older ones too, also those that the lane has overwritten.
        """
        last = max((point.global_step for point in self.points), default=-1)
        proven = _proven_step(self.points)
        valid = [point for point in held if point.global_step <= last]
        valid = [point for point in valid if self.lineage.includes(point.attempt, point.global_step)]
        return newest(replace(point, proven=point.proven or point.global_step <= proven) for point in valid)

    def missing(self, held: Iterable[ReplicaPoint]) -> list[ReplicaPoint]:
        """Returns what is to be sent to a machine with these replicas, of `wanted`.

        A proven snapshot is not if a newer proven one is held, which the lane has overwritten.
        """
        held = list(held)
        digests, proven, wanted = {point.digest for point in held}, _proven_step(held), self.wanted()
        sent = [point for point in wanted if point is wanted[0] or point.global_step > proven]
        return [point for point in sent if point.digest not in digests]


@dataclass(frozen=True, slots=True)
class FoundReplica:
    """A replica that has been proved by its digests, and the machine that kept it."""

    point: ReplicaPoint
    image: StateImage
    host: str


def newest(points: Iterable[ReplicaPoint]) -> list[ReplicaPoint]:
    """Returns the newest point and the newest proven one, which may be the same."""
    ordered = sorted(points, key=lambda point: point.global_step, reverse=True)
    return list(dict.fromkeys([*ordered[:1], *[point for point in ordered if point.proven][:1]]))


def _proven_step(points: Iterable[ReplicaPoint]) -> int:
    """Returns the step of the newest proven point; -1 without any."""
    return max((point.global_step for point in points if point.proven), default=-1)


def check_room(size_bytes: int) -> None:
    """Raises MemoryError if a replica of that size would leave too little memory to the processes of this machine.

    Without this the system would allocate it, and kill a process.
    """
    left = memory_left()
    if left is not None and size_bytes + _RESERVE_BYTES > left:
        raise MemoryError(
            f"a replica of {size_bytes / 1e6:.0f} MB does not fit into the memory that is left, of which it leaves "
            f"{_RESERVE_BYTES / 1e6:.0f} MB to the ranks"
        )


class IncomingReplica:
    """A replica that arrives in pieces. The constructor may take long; it raises MemoryError without room for it."""

    def __init__(self, point: ReplicaPoint) -> None:
        check_room(point.size_bytes)
        self.point = point
        self.segment = Segment.create(0, max(0, point.size_bytes - PREAMBLE_BYTES))
        self._at, self._size_bytes = 0, point.size_bytes

    @property
    def complete(self) -> bool:
        """Whether the last piece has arrived."""
        return self._at == self._size_bytes

    def feed(self, piece: bytes) -> None:
        """Takes the next piece. Raises ChannelError if it is longer than what is missing."""
        end = self._at + len(piece)
        if end > self._size_bytes:
            raise ChannelError("a replica is longer than was announced")
        self.segment.memory[self._at : end] = piece
        self._at = end

    def verified(self) -> StateImage:
        """Returns the image, whose digests it has computed. Raises ImageDamagedError if it is not what was announced.

        May take long; for a thread.
        """
        image = open_image(self.segment, {}).image
        if image.sealed is None or image.sealed.total != self.point.digest:
            raise ImageDamagedError("digest")
        if image.position.global_step != self.point.global_step:
            raise ImageDamagedError("position")
        image.verify()
        return image


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the content of a replica, and the number of the request that it belongs to."""

    request: int
    content: bytes


def pieces(segment: Segment, request: int) -> Iterator[bytes]:
    """Yields the frames in which the content of a segment travels."""
    start_of_frame = _PIECE.pack(b"\0", request)
    for start in range(0, segment.size_bytes, PIECE_BYTES):
        yield start_of_frame + segment.memory[start : start + PIECE_BYTES]


def piece_of(content: bytes) -> Piece | None:
    """Returns the piece that a frame holds; None if it holds a message."""
    if not content.startswith(b"\0") or len(content) < _PIECE.size:
        return None
    return Piece(_PIECE.unpack_from(content)[1], content[_PIECE.size :])
