"""The lane's side of its connection to the service: a thread that takes commands, and one that sends events."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from tolaria.errors import LaneError, WireError
from tolaria.images import ImagePool, Lease
from tolaria.lane import encoding
from tolaria.lane.messages import Command, CommandDone, Event, ImageCaptured, LaneEnded, Restore
from tolaria.segments import Segment, numbers_frame, open_image, segments_frames
from tolaria.state.shared_memory import SharedMemory
from tolaria.wire import Frame, FrameKind, FrameStream, packed_events, packed_id, send, unpacked_id

_ALIVE_S: Final = 0.5
_FRAME_BYTES: Final = 2**18
"""Bytes of events after which a frame is sent without waiting for more."""


class LaneConnection:
    """Serves the connection of one lane.

    Args:
        stream: of the frames from the service.
        memory: where the images of the lane lie.
        images: the lane's pool.
        send: gives the lane a command, with its id. Raises LaneError to refuse it.
        take_events: returns the events since its last call.
        on_lost: called in one of the two threads when the connection ends before the lane does; must not return.
        on_alive: called twice a second in one of the two threads.
    """

    def __init__(
        self,
        stream: FrameStream,
        memory: SharedMemory,
        *,
        images: ImagePool,
        send: Callable[[int, Command], None],
        take_events: Callable[[], Sequence[Event]],
        on_lost: Callable[[str], object],
        on_alive: Callable[[], object] = lambda: None,
    ) -> None:
        self._stream, self._connection = stream, stream.connection
        self._memory, self._images = memory, images
        self._send, self._take_events, self._on_lost = send, take_events, on_lost
        self._on_alive = on_alive
        self._captured: dict[int, Lease] = {}
        """Images that the service reads, by their ids in the lane's pool."""
        self._given: dict[int, int] = {}
        """Ids in the lane's pool of the service's images, by the service's ids."""
        self._due = threading.Event()
        self._ended = threading.Event()

    def start(self) -> None:
        """Starts the two threads."""
        for name, serve in (("tolaria-commands", self._take_commands), ("tolaria-events", self._send_events)):
            threading.Thread(target=self._guarded, args=(serve,), name=name, daemon=True).start()

    def notify(self) -> None:
        """Has the events sent that the lane has put into its buffer."""
        self._due.set()

    def flush(self, timeout_s: float) -> bool:
        """Waits until the lane's last event has been sent; returns whether it has."""
        return self._ended.wait(timeout_s)

    def _guarded(self, serve: Callable[[], None]) -> None:
        try:
            serve()
            reason = "the service has closed the connection"
        except WireError as error:
            reason = str(error)
        except BaseException:
            reason = traceback.format_exc()
            raise
        finally:
            if not self._ended.is_set():
                self._on_lost(reason)

    # -- commands ----------------------------------------------------------------------------------------------------

    def _take_commands(self) -> None:
        while (frame := self._stream.next()) is not None:
            match frame.kind:
                case FrameKind.COMMAND:
                    self._take_command(frame.content)
                case FrameKind.IMAGE:
                    (descriptor,) = frame.descriptors
                    image = self._memory.keep_with(open_image(Segment(0, descriptor), {}))
                    self._given[unpacked_id(frame.content)[0]] = self._images.put(image)
                case FrameKind.IMAGE_RELEASED:
                    self._captured.pop(unpacked_id(frame.content)[0]).release()
                case FrameKind.IMAGE_DISCARDED:
                    self._images.discard(self._given.pop(unpacked_id(frame.content)[0]))
                case _:
                    raise WireError(f"the service sent a {frame.kind.name.lower()} frame")

    def _take_command(self, content: bytes) -> None:
        command_id, data = unpacked_id(content)
        command = encoding.from_bytes(data)
        if not isinstance(command, Command):
            raise WireError(f"the service sent a {type(command).__name__}")
        if isinstance(command, Restore) and command.image_id:
            command = replace(command, image_id=self._given[command.image_id])
        try:
            self._send(command_id, command)
        except LaneError as error:
            raise WireError(str(error)) from error

    # -- events ------------------------------------------------------------------------------------------------------

    def _send_events(self) -> None:
        while not self._ended.is_set():
            self._on_alive()
            if not self._due.wait(_ALIVE_S):
                continue
            self._due.clear()
            events = self._take_events()
            self._send_segments()  # before the events that speak of what lies in them
            self._send_frames(events)
            if freed := self._memory.take_freed():
                send(self._connection, numbers_frame(FrameKind.SEGMENTS_FREED, freed))
            if events and isinstance(events[-1], LaneEnded):
                self._ended.set()

    def _send_segments(self) -> None:
        fresh = self._memory.take_fresh()
        for frame in segments_frames([(segment.number, segment.descriptor) for segment in fresh]):
            send(self._connection, frame)
        for segment in fresh:
            self._memory.passed_on(segment)  # the service holds it from now on

    def _send_frames(self, events: Sequence[Event]) -> None:
        encoded, size_bytes = [], 0
        for event in events:
            if isinstance(event, CommandDone) and isinstance(event.result, ImageCaptured):
                self._send_image(event.result.image_id)
            encoded.append(encoding.to_bytes(event))
            size_bytes += len(encoded[-1])
            if size_bytes >= _FRAME_BYTES or event is events[-1]:
                send(self._connection, Frame(FrameKind.EVENTS, packed_events(encoded)))
                encoded, size_bytes = [], 0

    def _send_image(self, image_id: int) -> None:
        lease = self._captured[image_id] = self._images.take(image_id)
        segment = packed_id(lease.image.segment)
        send(self._connection, Frame(FrameKind.IMAGE, packed_id(image_id, segment)))
