"""Hosts a lane in this process: builds it, says that it is ready or why it cannot be built, and runs it."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import torch

from tolaria.config import Settings
from tolaria.config.ranks import PEER_LOST, RankEnvironment
from tolaria.errors import LaneFailedError, TolariaError
from tolaria.lane.build import BuiltLane, build
from tolaria.lane.commands import PageGate
from tolaria.lane.connection import LaneConnection
from tolaria.lane.encoding import from_bytes, to_bytes
from tolaria.lane.messages import Failure, LaneEnded, LaneReady, RankInfo
from tolaria.lane.order import LaneOrder, RestorePlan
from tolaria.lane.process import Received, dump_stacks_on_request, end_with_service
from tolaria.ranks.group import Group
from tolaria.ranks.images import receive_image, send_image
from tolaria.signals.lane_page import LanePage, PagePulse
from tolaria.state.shared_memory import SharedMemory
from tolaria.wire import Frame, FrameKind, FrameStream, send

_FLUSH_S: Final = 10.0

_KILLED_S: Final = 30.0
"""Seconds in which a group whose rank has gone is ended by its agent, which knows the cause."""


def host(stream: FrameStream, received: Received, settings: Settings, page: LanePage) -> int:
    """Runs the lane in the calling thread until it has ended; returns the exit code of the process.

    In a group this is the rank that leads.
    """
    gc.freeze()  # what has been imported stays until the end, so that no full collection looks at it
    memory = SharedMemory(received.held.values(), received.order.next_segment)
    received.held.clear()
    group = joined()
    if group is not None:
        group.tell(to_bytes(LaneOrder(received.order.settings, (), 0, RestorePlan())))
    message: LaneReady | LaneEnded
    try:
        built = united(group, lambda: _built(received, settings, memory, group))
        message = built.ready
    except TolariaError as error:
        message = LaneEnded(0, Failure.of(error, traceback.format_exc()))
    pulse = PagePulse(page, settings.emergency)
    page.beat_process()  # first: from the next message on, silence counts
    send(stream.connection, Frame(FrameKind.READY, to_bytes(message)))
    if isinstance(message, LaneEnded):
        return 1
    gate, traces_dir = PageGate(page), Path(settings.state.dir) / "traces"
    lane = built.lane(pulse, traces_dir, gate)
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
    if lane.peer_lost:
        return _end_with_group(0, lane.peer_lost)
    return 0 if connection.flush(_FLUSH_S) and not lane.failed else 1


def follow() -> int:
    """Runs a rank that does not lead until the group ends; returns the exit code of the process."""
    gc.freeze()
    group = joined()
    order = from_bytes(b"" if group is None else group.tell())
    if group is None or not isinstance(order, LaneOrder):
        return PEER_LOST
    settings = Settings.model_validate(json.loads(order.settings))
    dump_stacks_on_request(settings)
    try:
        built = united(group, lambda: build(settings, group=group))
    except TolariaError:
        return 1  # the leader has said why
    built.snapshots.takes_snapshots = False
    # This page has no reader: a rank that hangs shows by the leader's silence.
    lane = built.lane(PagePulse(LanePage.create(), settings.emergency), Path(settings.state.dir) / "traces")
    lane.run(lane.take_events)
    if lane.peer_lost:
        return _end_with_group(group.rank, lane.peer_lost)
    if lane.failed:
        os.write(2, f"rank {group.rank}: {lane.failed}\n".encode())
    return 1 if lane.failed else 0


def joined() -> Group | None:
    """Returns the group that the environment names; None for a process alone."""
    place = RankEnvironment.read()
    return None if place.world == 1 else Group.join(place, cuda=torch.cuda.is_available())


def _built(received: Received, settings: Settings, memory: SharedMemory, group: Group | None) -> BuiltLane:
    order, built = received.order, build(settings, memory, group)
    built.snapshots.adopt(memory, order.digests)
    built.start_from(order.plan, received.images.pop(order.image_id, None))
    return built


def united(group: Group | None, make: Callable[[], BuiltLane]) -> BuiltLane:
    """Builds on every rank, and gives all of them the leader's state.

    Raises what `make` raises, on other ranks LaneFailedError; so also if a rank does not get the leader's state.
    """
    if group is None:
        return make()
    try:
        built = make()
    except TolariaError as error:
        group.ask(str(error))
        raise
    for rank, problem in enumerate(group.ask("")):
        if problem:
            raise LaneFailedError(f"rank {rank}: {problem}")
    _share_state(group, built)
    digests = group.ask(built.snapshots.state.fingerprint().total)
    if len(set(digests)) > 1:
        raise LaneFailedError(f"the ranks do not have the same state: {', '.join(digests)}")
    return replace(
        built, ranks=tuple(RankInfo(**json.loads(text)) for text in group.ask(json.dumps(asdict(built.rank))))
    )


def _share_state(group: Group, built: BuiltLane) -> None:
    module = built.module
    if group.leads:
        plan = RestorePlan((), tuple(sorted(module.skipped.added)), module.seeds.controller.adjustments)
        group.tell(to_bytes(LaneOrder("", (), 0, plan)))
        send_image(group, built.snapshots.state.copy())
        return
    order, image = from_bytes(group.tell()), receive_image(group)
    if isinstance(order, LaneOrder):
        built.snapshots.restore_image(image, decided=order.plan.decided)
        module.skipped.added.update(order.plan.left_out)


def _end_with_group(rank: int, reason: str) -> int:
    """Waits to be ended with the group, whose agent finds out which rank failed; returns an exit code if it is not."""
    os.write(2, f"rank {rank} has lost the others: {reason}\n".encode())
    sys.stdout.flush()
    time.sleep(_KILLED_S)
    return PEER_LOST
