"""`SharedSegments`: the segments of the leader's images, which the other ranks map where all are on one machine.

So no rank sends its part of a sharded tensor to the leader, nor the leader an image to the others: each writes and
reads its part in place.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections import deque
from collections.abc import Iterable, Sequence

from tolaria import forks
from tolaria.errors import PeerLostError, WireError
from tolaria.ranks.child import is_child_of
from tolaria.ranks.group import Group
from tolaria.segments import Segment, allow_descriptors, mapped, numbers_frame, numbers_of, segments_frames
from tolaria.wire import Frame, FrameKind, FrameStream, send


class SharedSegments:
    """One rank's side: the leader says something, and shows segments with it; the others hear it.

    Used in the lane's thread, or before the lane has started. Every rank makes one, by `connect`.

    Attributes:
        held: on the other ranks, the segments that are mapped there, by number.
    """

    def __init__(self, connections: Sequence[socket.socket]) -> None:
        self.held: dict[int, Segment] = {}
        self._shown: set[int] = set()
        self._gone = deque[int]()
        self._streams = [FrameStream(connection) for connection in connections]

    @classmethod
    def connect(cls, group: Group) -> SharedSegments | None:
        """Connects all ranks with the leader; None if they are on several machines. Raises PeerLostError."""
        if group.local_world != group.world:
            return None
        allow_descriptors()
        connections = _accepted(group) if group.leads else [_connected(group)]
        for connection in connections:
            forks.keep_private(connection.fileno())
        return cls(connections)

    @property
    def some_gone(self) -> bool:
        """Whether the other ranks map segments that the leader does not have any more."""
        return bool(self._gone)

    def say(self, content: bytes, segments: Iterable[Segment] = ()) -> None:
        """Has the other ranks hear this, after they have mapped these segments, and given up those that are gone.

        The descriptors of segments that they do not have yet must be open. Raises PeerLostError.
        """
        fresh = [segment for segment in segments if segment.number not in self._shown]
        frames = [*segments_frames([(segment.number, segment.descriptor) for segment in fresh])]
        if gone := [self._gone.popleft() for _ in range(len(self._gone))]:
            frames.insert(0, numbers_frame(FrameKind.SEGMENTS_FREED, gone))
        frames.append(Frame(FrameKind.COMMAND, content))
        try:
            for stream in self._streams:
                for frame in frames:
                    send(stream.connection, frame)
        except WireError as error:
            raise PeerLostError(str(error)) from error
        for segment in fresh:
            self._shown.add(segment.number)
            weakref.finalize(segment, self._has_gone, segment.number).atexit = False

    def hear(self) -> bytes:
        """Waits for what the leader says, with the segments that it shows. Raises PeerLostError.

        A segment that cannot be mapped, such as without memory for it, is missing in `held` then.
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

    def forget(self) -> None:
        """Has what is shown next shown anew, and gives up what is mapped here. Every rank calls it."""
        self._shown.clear()
        self._gone.clear()
        self.held.clear()

    def _has_gone(self, number: int) -> None:
        if number in self._shown:
            self._shown.discard(number)
            self._gone.append(number)


def _accepted(group: Group) -> list[socket.socket]:
    """Returns the leader's connections to all other ranks, which the same process has started."""
    address = f"tolaria-ranks-{os.getpid()}-{os.urandom(8).hex()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("\0" + address)
        listener.listen(group.world)
        group.broadcast_bytes(address.encode())
        found = list[socket.socket]()
        while len(found) < group.world - 1:
            asking = listener.accept()[0]
            if is_child_of(os.getppid(), asking):
                found.append(asking)
            else:
                asking.close()
    return found


def _connected(group: Group) -> socket.socket:
    """Returns the connection to the leader."""
    address = group.broadcast_bytes().decode()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect("\0" + address)
    except OSError as error:
        connection.close()
        raise PeerLostError(f"the leader does not answer: {error}") from error
    return connection
