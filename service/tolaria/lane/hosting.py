"""Hosts a lane in this process: builds it, says that it is ready or why it cannot be built, and runs it."""

from __future__ import annotations

import gc
import traceback
from pathlib import Path
from typing import Final

from tolaria.config import Settings
from tolaria.errors import TolariaError
from tolaria.lane.build import BuiltLane, build
from tolaria.lane.commands import PageGate
from tolaria.lane.connection import LaneConnection
from tolaria.lane.encoding import to_bytes
from tolaria.lane.messages import Failure, LaneEnded, LaneReady
from tolaria.lane.process import Received, end_with_service
from tolaria.signals.lane_page import LanePage, PagePulse
from tolaria.state.shared_memory import SharedMemory
from tolaria.wire import Frame, FrameKind, FrameStream, send

_FLUSH_S: Final = 10.0


def host(stream: FrameStream, received: Received, settings: Settings, page: LanePage) -> int:
    """Runs the lane in the calling thread until it has ended; returns the exit code of the process."""
    gc.freeze()  # what has been imported stays until the end, so that no full collection looks at it
    memory = SharedMemory(received.held.values(), received.order.next_segment)
    received.held.clear()
    message: LaneReady | LaneEnded
    try:
        built = _built(received, settings, memory)
        message = built.ready
    except TolariaError as error:
        message = LaneEnded(0, Failure.of(error, traceback.format_exc()))
    send(stream.connection, Frame(FrameKind.READY, to_bytes(message)))
    if isinstance(message, LaneEnded):
        return 1
    gate, traces_dir = PageGate(page), Path(settings.state.dir) / "traces"
    lane = built.lane(PagePulse(page, settings.emergency), traces_dir, gate)
    connection = LaneConnection(
        stream,
        memory,
        images=lane.images,
        send=lane.send,
        take_events=lane.take_events,
        on_lost=end_with_service,
        on_alive=page.beat_process,
    )
    connection.start()
    lane.run(connection.notify)
    return 0 if connection.flush(_FLUSH_S) else 1


def _built(received: Received, settings: Settings, memory: SharedMemory) -> BuiltLane:
    order, built = received.order, build(settings, memory)
    built.snapshots.adopt(memory, order.digests)
    built.start_from(order.plan, received.images.pop(order.image_id, None))
    return built
