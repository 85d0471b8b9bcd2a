"""`SharedSegments`: the segments of the leader's images, which the other ranks map where all are on one machine.

So no rank sends its part of a sharded tensor to the leader, nor the leader an image to the others: each writes and
reads its part in place.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Callable, Iterable, Sequence

from tolaria import forks
from tolaria.errors import PeerLostError, WireError
from tolaria.ranks.child import is_child_of
from tolaria.segments import Segment, allow_descriptors, mapped, numbers_frame, numbers_of, segments_frames
from tolaria.wire import Frame, FrameKind, FrameStream, send


class SharedSegments:
    """One rank's side: the leader sends segments, with a content that says what to do with them; the others receive it.

    Used in the lane's thread, or before the lane has started. Every rank makes one, by `Group.connect_segments`.

    Attributes:
        held: on the other ranks, the segments that are mapped there, by number.
    """

    def __init__(self, connections: Sequence[socket.socket]) -> None:
        self.held: dict[int, Segment] = {}
        self._streams = [FrameStream(connection) for connection in connections]
        self._sent: set[int] = set()
        self._alive: weakref.WeakValueDictionary[int, Segment] = weakref.WeakValueDictionary()
        """Those of the segments sent that the leader still has."""

    @classmethod
    def connect(cls, rank: int, world: int, broadcast: Callable[[bytes], bytes]) -> SharedSegments:
        """Connects all ranks of a machine with the leader. Raises PeerLostError.

        `broadcast` returns on every rank what the leader gives it.
        """
        allow_descriptors()
        connections = _accepted(world, broadcast) if rank == 0 else [_connected(broadcast(b"").decode())]
        for connection in connections:
            forks.keep_private(connection.fileno())
        return cls(connections)

    @property
    def some_gone(self) -> bool:
        """Whether the other ranks map segments that the leader does not have any more."""
        return any(number not in self._alive for number in self._sent)

    def send(self, content: bytes, segments: Iterable[Segment] = ()) -> None:
        """Sends `content`, after those of the segments that the other ranks do not have yet, with open descriptors.

        Has them unmap first what the leader does not have any more. Raises PeerLostError.
        """
        fresh = [segment for segment in segments if segment.number not in self._sent]
        gone = [number for number in self._sent if number not in self._alive]
        frames = [numbers_frame(FrameKind.SEGMENTS_FREED, gone)] if gone else []
        frames += segments_frames([(segment.number, segment.descriptor) for segment in fresh])
        frames.append(Frame(FrameKind.SEGMENTS_USE, content))
        try:
            for stream in self._streams:
                for frame in frames:
                    send(stream.connection, frame)
        except WireError as error:
            raise PeerLostError(str(error)) from error
        self._sent.difference_update(gone)
        for segment in fresh:
            self._sent.add(segment.number)
            self._alive[segment.number] = segment

    def receive(self) -> bytes:
        """Waits for what the leader sends; returns the content, once the segments before it are mapped.

        One that cannot be mapped is missing in `held` then. Raises PeerLostError, also where this process has no
        descriptor left to receive one.
        """
        (stream,) = self._streams
        try:
            while (frame := stream.next()) is not None:
                match frame.kind:
                    case FrameKind.SEGMENTS:
                        self.held |= mapped(frame)
                    case FrameKind.SEGMENTS_FREED:
                        for number in numbers_of(frame, 0):
                            self.held.pop(number, None)
                    case _:
                        return frame.content
        except WireError as error:
            raise PeerLostError(str(error)) from error
        raise PeerLostError("the leader has closed the connection")

    def release(self) -> None:
        """Unmaps all that the leader has sent, which it sends anew when it is used again. Every rank calls it."""
        self._sent.clear()
        self._alive.clear()
        self.held.clear()


def _accepted(world: int, broadcast: Callable[[bytes], bytes]) -> list[socket.socket]:
    """Returns the leader's connections to all other ranks, which the same process has started."""
    address = f"tolaria-ranks-{os.getpid()}-{os.urandom(8).hex()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("\0" + address)
        listener.listen(world)
        broadcast(address.encode())
        found = list[socket.socket]()
        while len(found) < world - 1:
            asking = listener.accept()[0]
            if is_child_of(os.getppid(), asking):
                found.append(asking)
            else:
                asking.close()
    return found


def _connected(address: str) -> socket.socket:
    """Returns the connection to the leader."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect("\0" + address)
    except OSError as error:
        connection.close()
        raise PeerLostError(f"the leader does not answer: {error}") from error
    return connection
