"""Replicas: copies of the newest snapshots, which another machine of the group keeps in its memory.

A replica travels over the authenticated connection of that machine, as the bytes of one segment with the image and its
digests, in pieces between other messages. Both sides compute the digests of what has arrived before they use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Final

from pydantic import Field

from tolaria.errors import ChannelError, ImageDamagedError
from tolaria.images import StateImage
from tolaria.segments import PREAMBLE_BYTES, Segment, open_image
from tolaria.values.lineage import Lineage

PIECE_BYTES: Final = 2**16 - 2**8
"""Bytes of a replica in one frame of the connection."""

HELD_MAX: Final = 3
"""Replicas on one machine: the newest, the newest proven one, and one that has just arrived."""

_PIECE: Final = b"\0"
"""How the frame of a piece begins; messages are JSON objects."""

_Name = Annotated[str, Field(max_length=255)]
_Count = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True, slots=True)
class ReplicaPoint:
    """A snapshot of which there is a replica, or is to be one.

    `attempt` and `forks`, as `Lineage.to_json` returns them, are its lineage. `proven`: losses since have proven it.
    """

    run_id: _Name
    digest: _Name
    global_step: _Count
    attempt: _Count
    forks: Annotated[str, Field(max_length=16_384)] = ""
    proven: bool = False

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

        One that is newer than every snapshot is of an earlier service, which the live state does not descend from.
        """
        known = {point.digest: point for point in self.points}
        last = max((point.global_step for point in self.points), default=-1)
        valid = [known.get(point.digest, point) for point in held if point.global_step <= last]
        return newest(point for point in valid if self.lineage.includes(point.attempt, point.global_step))


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


class IncomingReplica:
    """A replica that arrives in pieces. Raises MemoryError without room for it."""

    def __init__(self, point: ReplicaPoint, size_bytes: int) -> None:
        self.point = point
        self.segment = Segment.create(0, max(0, size_bytes - PREAMBLE_BYTES))
        self._at, self._size_bytes = 0, size_bytes

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


def pieces(segment: Segment) -> Iterator[bytes]:
    """Yields the frames in which the content of a segment travels."""
    for start in range(0, segment.size_bytes, PIECE_BYTES):
        yield _PIECE + segment.memory[start : start + PIECE_BYTES]


def piece_of(content: bytes) -> bytes | None:
    """Returns the piece that a frame holds; None if it holds a message."""
    return content[len(_PIECE) :] if content.startswith(_PIECE) else None
