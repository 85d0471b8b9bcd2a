"""The process of a lane: builds the job, trains in its main thread, and serves its connection in two others.

Standard output is the service's own, so that a job can print; the service reads standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from tolaria import forks
from tolaria.config import Settings
from tolaria.lane.encoding import from_bytes
from tolaria.lane.order import LaneOrder
from tolaria.ranks.child import announce, keep_imports, lane_options
from tolaria.segments import OpenedImage, Segment, allow_descriptors, open_image, segments_of
from tolaria.signals.lane_page import LanePage
from tolaria.wire import FrameKind, FrameStream, unpacked_id


@dataclass(frozen=True, slots=True)
class Received:
    """What arrives before the lane is built: the order, the segments it speaks of, and a checkpoint's image by id.

    The descriptors of the segments are open.
    """

    order: LaneOrder
    held: dict[int, Segment]
    images: dict[int, OpenedImage]


def main(arguments: Sequence[str]) -> int:
    """Runs one lane until it is stopped; returns the exit code. Ends with the service, however that ends."""
    options = lane_options("python -m tolaria.lane", "The process of a lane.").parse_args(arguments)
    announce(options)
    return serve(options.connection, options.page)


def serve(connection_descriptor: int, page_descriptor: int) -> int:
    """Builds and runs the lane that the service orders over the connection; returns the exit code."""
    connection = socket.socket(fileno=connection_descriptor)
    connection.setblocking(True)
    forks.keep_private(connection.fileno())
    stream = FrameStream(connection)
    # Imports torch, which takes seconds: before the order, so that a process that waits for one has done it.
    host = importlib.import_module("tolaria.lane.hosting").host
    keep_imports()
    received = _received(stream)
    settings = Settings.model_validate(json.loads(received.order.settings))
    return int(host(stream, received, settings, LanePage(Segment(0, page_descriptor))))


def _received(stream: FrameStream) -> Received:
    """Waits for the order of what is to be built."""
    allow_descriptors()
    held, images = dict[int, Segment](), dict[int, OpenedImage]()
    while (frame := stream.next()) is not None:
        match frame.kind:
            case FrameKind.SEGMENTS:
                held |= segments_of(frame)
            case FrameKind.IMAGE:
                (descriptor,) = frame.descriptors
                images[unpacked_id(frame.content)[0]] = open_image(Segment(0, descriptor), {})
            case _ if isinstance(order := from_bytes(frame.content), LaneOrder):
                return Received(order, held, images)
            case _:
                break
    return end_with_service("it did not say what to build")


def end_with_service(reason: str) -> NoReturn:
    """Ends this process and its own children at once: without the service, the lane's work is lost."""
    os.write(2, f"the lane ends with its service: {reason}\n".encode())
    os.killpg(0, signal.SIGKILL)
    raise SystemExit(1)  # not reached
