"""The service's end of the connection to one process of the lane."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import anyio

from tolaria import forks
from tolaria.errors import WireError
from tolaria.processes import running
from tolaria.wire import Frame, FrameReader, Outgoing, receive


class LaneLink:
    """Sends and receives frames without blocking. Used on the event loop only.

    Args:
        connection: the socket, which this object closes.
        on_frames: called with the frames of each read, in their order. Raises WireError to refuse them.

    Attributes:
        ended: set when nothing more is going to be received.
        fault: why the connection cannot be used any more, if that is the other side's fault; else empty.
    """

    def __init__(self, connection: socket.socket, on_frames: Callable[[Sequence[Frame]], None]) -> None:
        connection.setblocking(False)
        forks.keep_private(connection.fileno())
        self._connection = connection
        self._on_frames = on_frames
        self._reader = FrameReader()
        self._outbox: deque[Outgoing] = deque()
        self._sending = anyio.Event()
        self.ended = anyio.Event()
        self.fault = ""

    def send(self, frame: Frame) -> None:
        """Sends a frame, as much of it as the socket takes at once; nothing if the connection has ended.

        Raises WireError for a frame that exceeds a bound.
        """
        if not self.ended.is_set():
            self._outbox.append(Outgoing(frame))
            self._sending.set()
            if len(self._outbox) == 1:
                self._flush()

    async def serve(self) -> None:
        """Exchanges frames until the connection ends."""
        try:
            async with running(self._send_rest):
                await self._receive()
        finally:
            self.close()

    def close(self) -> None:
        """Closes the connection; the other side sees its end at once."""
        if not self.ended.is_set():
            self.ended.set()
            self._reader.close()
            anyio.notify_closing(self._connection)
            forks.close(self._connection.detach())

    async def _receive(self) -> None:
        while not self.ended.is_set():
            with suppress(anyio.ClosedResourceError):
                await anyio.wait_readable(self._connection)
            if self.ended.is_set():
                return
            try:
                frames = receive(self._connection, self._reader)
                if frames is None:
                    return
                self._on_frames(frames)
            except BlockingIOError:
                continue
            except (WireError, ValueError, TypeError, LookupError) as error:  # what the other side says makes no sense
                self.fault = str(error) if isinstance(error, WireError) else f"{type(error).__name__}: {error}"
                return

    async def _send_rest(self) -> None:
        while True:
            await self._sending.wait()
            self._sending = anyio.Event()
            while self._outbox and not self.ended.is_set():
                with suppress(anyio.ClosedResourceError):
                    await anyio.wait_writable(self._connection)
                self._flush()

    def _flush(self) -> None:
        try:
            while self._outbox and not self.ended.is_set() and self._outbox[0].advance(self._connection):
                self._outbox.popleft()
        except BlockingIOError:
            pass
        except ConnectionError:
            self._outbox.clear()  # the end is noticed by reading
        except OSError as error:  # such as too many descriptors under way
            self.fault = f"a frame cannot be sent: {error}"
            self.close()
