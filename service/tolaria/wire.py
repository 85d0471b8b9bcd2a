"""Frames over a Unix stream socket, with descriptors: what passes between the service and the process of its lane.

A frame is an 8-byte header and its content. The header holds, little-endian, a 16-bit magic number, the kind and the
number of descriptors as one byte each, and the length of the content as 32 bits. The descriptors travel with the first
byte of their frame (SCM_RIGHTS). Both directions are bounded: a frame that is longer than `FRAME_BYTES_MAX`, of another
kind, or with other descriptors than it announces ends the connection.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum, unique
from typing import Final

from tolaria.errors import WireError

FRAME_BYTES_MAX: Final = 2**24
"""Bytes of a frame's content. The largest message, the end of an epoch with many seeds, takes far less."""

DESCRIPTORS_MAX: Final = 64
"""Descriptors of one frame. The system passes at most 253 at once."""

READ_BYTES: Final = 2**16
_MAGIC: Final = 0x7A0A
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(DESCRIPTORS_MAX * array.array("i").itemsize)
_HEADER: Final = struct.Struct("<HBBI")


@unique
class FrameKind(IntEnum):
    """What a frame holds; `tolaria.segments` defines where images lie."""

    ORDER = 1
    """To the lane, once: a `LaneOrder`."""
    COMMAND = 2
    """To the lane: an int64 id and a command."""
    EVENTS = 3
    """To the service: events, each preceded by its length as 32 bits."""
    READY = 4
    """To the service: the `LaneReady` of a lane that has been built, or the `LaneEnded` of one that has not."""
    SEGMENTS = 5
    """Numbers of segments of memory; their descriptors travel with it."""
    SEGMENTS_FREED = 6
    """Numbers of segments that hold nothing any more."""
    IMAGE = 7
    """An image's id; to the service with the number of the segment it begins in, to the lane with its only segment."""
    IMAGE_RELEASED = 8
    """To the lane: the id of an image of the lane's that is not read any more."""
    IMAGE_DISCARDED = 9
    """To the lane: the id of an image of the service's that is not going to be restored any more."""
    SEGMENTS_USE = 10
    """From the rank that leads to another one: what to do with segments, as `ranks/` and `lane/group_state` define."""


_KINDS: Final = frozenset(FrameKind)


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. Its receiver owns the descriptors; its sender's `owner` keeps them open until they are sent."""

    kind: FrameKind
    content: bytes
    descriptors: tuple[int, ...] = ()
    owner: object = None

    def header(self) -> bytes:
        """Returns the encoded header. Raises WireError for a frame that exceeds a bound."""
        if len(self.content) > FRAME_BYTES_MAX or len(self.descriptors) > DESCRIPTORS_MAX:
            raise WireError(
                f"a {self.kind.name.lower()} frame of {len(self.content)} bytes and {len(self.descriptors)} "
                f"descriptors exceeds the bounds of {FRAME_BYTES_MAX} and {DESCRIPTORS_MAX}"
            )
        return _HEADER.pack(_MAGIC, self.kind, len(self.descriptors), len(self.content))


class FrameReader:
    """Puts frames together from what a socket delivers, in pieces of any size."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._descriptors: deque[int] = deque()

    def feed(self, data: bytes, descriptors: Iterable[int] = ()) -> list[Frame]:
        """Returns the frames that are complete now.

        Raises:
            WireError: the data are no frames. Descriptors that belong to no frame yet are closed.
        """
        self._data += data
        self._descriptors.extend(descriptors)
        frames = []
        try:
            while (frame := self._next()) is not None:
                frames.append(frame)
            self._refuse_surplus()
        except WireError:
            self._descriptors.extend(descriptor for frame in frames for descriptor in frame.descriptors)
            self.close()
            raise
        return frames

    def close(self) -> str:
        """Closes what belongs to no complete frame; returns what was cut off, empty at a frame's end."""
        cut = f"the connection ended within a frame, after {len(self._data)} of its bytes" if self._data else ""
        self._data.clear()
        while self._descriptors:
            os.close(self._descriptors.popleft())
        return cut

    def _refuse_surplus(self) -> None:
        if self._descriptors and not self._data:
            raise WireError(f"{len(self._descriptors)} descriptors came that no frame announces")

    def _next(self) -> Frame | None:
        if len(self._data) < _HEADER.size:
            return None
        magic, kind, count, length = _HEADER.unpack_from(self._data)
        if magic != _MAGIC or kind not in _KINDS or length > FRAME_BYTES_MAX or count > DESCRIPTORS_MAX:
            raise WireError(f"not a frame: its first bytes are {bytes(self._data[: _HEADER.size]).hex()}")
        end = _HEADER.size + length
        if len(self._data) < end:
            return None
        if count > len(self._descriptors):
            raise WireError(f"a frame announces {count} descriptors, but {len(self._descriptors)} have arrived")
        content = bytes(self._data[_HEADER.size : end])
        del self._data[:end]
        return Frame(FrameKind(kind), content, tuple(self._descriptors.popleft() for _ in range(count)))


def receive(connection: socket.socket, reader: FrameReader) -> list[Frame] | None:
    """Reads once and returns the frames that are complete; None at the end of the connection.

    Raises:
        WireError: what was read is no frame, or the connection ended within one.
        BlockingIOError: the socket does not block, and nothing has arrived.
    """
    descriptors = array.array("i")
    try:
        data, ancillary, flags, _ = connection.recvmsg(READ_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        data, ancillary, flags = b"", [], 0
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    if flags & socket.MSG_CTRUNC:
        for descriptor in descriptors:
            os.close(descriptor)
        reader.close()
        raise WireError("descriptors were lost: this process has no more to receive them")
    if data:
        return reader.feed(data, descriptors)
    if cut := reader.close():
        raise WireError(cut)
    return None


class FrameStream:
    """The frames that arrive on a socket that blocks, one by one."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._reader = FrameReader()
        self._frames: deque[Frame] = deque()

    def next(self) -> Frame | None:
        """Waits for a frame; returns None at the end of the connection. Raises WireError for anything else."""
        while not self._frames:
            frames = receive(self.connection, self._reader)
            if frames is None:
                return None
            self._frames.extend(frames)
        return self._frames.popleft()


def send(connection: socket.socket, frame: Frame) -> None:
    """Sends a frame on a socket that blocks. Raises WireError if it exceeds a bound or the connection has ended."""
    rest = Outgoing(frame)
    try:
        while not rest.advance(connection):
            pass
    except OSError as error:
        raise WireError(f"the connection has ended: {error}") from error


class Outgoing:
    """A frame that is being sent, and how far it has been. Raises WireError for a frame that exceeds a bound."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._rest = memoryview(frame.header() + frame.content)
        self._descriptors: Sequence[int] = frame.descriptors

    def advance(self, connection: socket.socket) -> bool:
        """Sends what the socket takes now; returns whether that was the last. Raises OSError as the socket does."""
        sent = socket.send_fds(connection, [self._rest], list(self._descriptors), socket.MSG_NOSIGNAL)
        self._descriptors = ()
        self._rest = self._rest[sent:]
        return not self._rest


_ID: Final = struct.Struct("<q")
_LENGTH: Final = struct.Struct("<I")


def packed_id(number: int, rest: bytes = b"") -> bytes:
    """Returns the content of a frame that begins with an id."""
    return _ID.pack(number) + rest


def unpacked_id(content: bytes) -> tuple[int, bytes]:
    """Returns the id with which a frame's content begins, and the rest. Raises WireError if it is too short."""
    if len(content) < _ID.size:
        raise WireError(f"a frame of {len(content)} bytes has no room for an id")
    return _ID.unpack_from(content)[0], content[_ID.size :]


def packed_events(events: Iterable[bytes]) -> bytes:
    """Returns the content of a frame with encoded events, each preceded by its length."""
    return b"".join(part for event in events for part in (_LENGTH.pack(len(event)), event))


def unpacked_events(content: bytes) -> list[bytes]:
    """Returns the encoded events of a frame. Raises WireError if they were not packed so."""
    events, at = [], 0
    while at < len(content):
        start = at + _LENGTH.size
        if start > len(content) or (at := start + _LENGTH.unpack_from(content, at)[0]) > len(content):
            raise WireError("the last event of a frame is cut off")
        events.append(content[start:at])
    return events
