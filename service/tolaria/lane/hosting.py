"""Hosts a lane in this process: builds it, says that it is ready or why it cannot be built, and runs it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import torch

from tolaria.config import LaneSettings, Settings
from tolaria.config.ranks import PEER_LOST, RAISED, RankEnvironment, rank_raised
from tolaria.errors import LaneFailedError, PeerLostError, TolariaError
from tolaria.lane.build import BuiltLane, build
from tolaria.lane.commands import PageGate
from tolaria.lane.connection import LaneConnection
from tolaria.lane.encoding import from_bytes, to_bytes
from tolaria.lane.group_state import GroupRestore
from tolaria.lane.messages import LaneEnded, LaneReady
from tolaria.lane.order import LaneOrder, RestorePlan
from tolaria.lane.process import Received, end_with_service
from tolaria.ranks.group import Group, lost_peer
from tolaria.ranks.images import receive_image, send_image
from tolaria.signals.lane_page import SILENT_ENDS_S, SILENT_SIGNAL, LanePage, PagePulse
from tolaria.state.shared_memory import SharedMemory
from tolaria.values.failure import Failure
from tolaria.values.training import RankInfo
from tolaria.wire import Frame, FrameKind, FrameStream, send

_FLUSH_S: Final = 10.0
_WATCH_S: Final = 0.5
_LEADER_S: Final = 2.0


def host(stream: FrameStream, received: Received, settings: Settings, page: LanePage) -> int:
    """Runs the lane in the calling thread until it has ended; returns the exit code of the process.

    In a group this is the rank that leads.
    """
    run_id = received.order.run_id
    message: LaneReady | LaneEnded
    try:
        if (group := join_group()) is not None:
            group.broadcast_bytes(to_bytes(LaneOrder(received.order.settings, (), 0, RestorePlan(), run_id=run_id)))
            group.connect_segments()
        shows = group is not None and group.segments is not None
        memory = SharedMemory(received.held.values(), received.order.next_segment, shows=shows)
        received.held.clear()
        built = build_on_all_ranks(
            group,
            lambda: build(settings, memory, group, run_id),
            lambda built: _start(received, memory, built),
            sharded=settings.lane.parallel == "fsdp",
        )
        message = built.ready
    except PeerLostError as error:
        return _end_with_group(str(error), settings.lane)
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
        return _end_with_group(lane.peer_lost, settings.lane)
    code = 0 if connection.flush(_FLUSH_S) and not lane.failed else 1
    if group is not None and not code:
        group.leave()
    return code


def follow() -> int:
    """Runs a rank that does not lead until the group ends; returns the exit code of the process."""
    settings = Settings()
    try:
        group = join_group()
        if group is None or not isinstance(order := from_bytes(group.broadcast_bytes()), LaneOrder):
            return PEER_LOST
        group.connect_segments()
        settings = Settings.model_validate(json.loads(order.settings))
        sharded = settings.lane.parallel == "fsdp"
        built = build_on_all_ranks(group, lambda: build(settings, group=group, run_id=order.run_id), sharded=sharded)
    except PeerLostError as error:
        return _end_with_group(str(error), settings.lane)
    except TolariaError as error:
        os.write(2, f"{error}\n".encode())
        time.sleep(_LEADER_S)  # which says why
        return 1
    built.snapshots.takes_snapshots = False
    page = LanePage.create()
    traces_dir = Path(tempfile.gettempdir()) / f"tolaria-traces-{os.getpid()}"  # from where the leader fetches them
    lane = built.lane(PagePulse(page, settings.emergency), traces_dir)
    agent = RankEnvironment.read().agent
    threading.Thread(target=end_when_silent, args=(page, agent), name="tolaria-watch", daemon=True).start()
    lane.run(lane.take_events)
    if lane.peer_lost:
        return _end_with_group(lane.peer_lost, settings.lane)
    if lane.failed:
        time.sleep(_LEADER_S)  # an exception of all ranks is the leader's, which goes by its name
        os.write(2, f"{rank_raised(group.rank, ' '.join(lane.failed.split()))}\n".encode())
        return RAISED
    group.leave()
    return 0


def end_when_silent(page: LanePage, agent: int) -> None:
    """Ends this process when the lane has given no heartbeat for too long: the leader would wait for it.

    Before, the process `agent`, unless it is 0, learns of it, so that the stacks of all ranks can be collected.
    A process that is stopped, or whose GIL is held, does not come to that: the leader's silence shows it, later.
    """
    while True:
        time.sleep(_WATCH_S)
        if overdue_s := page.overdue_s():
            if agent:
                os.kill(agent, SILENT_SIGNAL)
            time.sleep(SILENT_ENDS_S)
            if page.overdue_s():
                os.write(2, f"the rank has given no heartbeat for {overdue_s:.0f} s\n".encode())
                os._exit(1)


def join_group() -> Group | None:
    """Returns the group that the environment names; None for a process alone."""
    place = RankEnvironment.read()
    if place.world == 1:
        return None
    Group.await_leader(place)
    if cuda := torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())  # for what a job puts on "cuda"
    return Group.join(place, cuda=cuda)


def _start(received: Received, memory: SharedMemory, built: BuiltLane) -> None:
    order = received.order
    built.snapshots.adopt(memory, order.digests)
    opened = received.images.pop(order.image_id, None)
    built.start_from(order.plan, None if opened is None else memory.keep_with(opened))


def build_on_all_ranks(
    group: Group | None,
    make: Callable[[], BuiltLane],
    start: Callable[[BuiltLane], None] = lambda _built: None,
    *,
    sharded: bool = False,
) -> BuiltLane:
    """Builds on every rank, restores by `start` on the leader, and gives all ranks its state.

    Raises what `make` and `start` raise, on other ranks LaneFailedError; so also if a rank does not get that state.
    Where the model is to be `sharded`, all ranks build and restore together, and an error is only that of its rank.
    """
    if group is None:
        built = make()
        start(built)
        return built
    try:
        built = make()
        if sharded:
            GroupRestore(group, built.snapshots).start(lambda: start(built))
        elif group.leads:
            start(built)
    except TolariaError as error:
        if sharded:
            raise lost_peer(error) or error from error.__cause__
        with suppress(PeerLostError):  # which would hide this one
            group.all_gather_text(str(error) or type(error).__name__)
        raise
    for rank, problem in enumerate(group.all_gather_text("")):
        if problem:
            raise LaneFailedError(f"rank {rank}: {problem}")
    _share_state(group, built, sharded=sharded)
    digests = group.all_gather_text(built.snapshots.state.fingerprint().total)
    if len(set(digests)) > 1:
        raise LaneFailedError(f"the ranks do not have the same state: {', '.join(digests)}")
    gathered = group.all_gather_text(json.dumps(asdict(built.rank)))
    return replace(built, ranks=tuple(RankInfo(**json.loads(text)) for text in gathered))


def _share_state(group: Group, built: BuiltLane, *, sharded: bool) -> None:
    module = built.module
    if group.leads:
        skipped = module.skipped
        plan = RestorePlan((), tuple(sorted(skipped.added)), module.seeds.controller.adjustments, skipped.ranges)
        group.broadcast_bytes(to_bytes(LaneOrder("", (), 0, plan)))
        if not sharded:
            send_image(group, built.snapshots.state.copy())
        return
    order = from_bytes(group.broadcast_bytes())
    if isinstance(order, LaneOrder):
        if not sharded:
            image = receive_image(group, built.snapshots.state)
            built.snapshots.restore_image(image, decided=order.plan.decided)
        module.skipped.added.update(order.plan.left_out)
        module.skipped.ranges = order.plan.ranges


def _end_with_group(reason: str, limits: LaneSettings) -> int:
    """Waits to be ended with the group, whose agent finds out which rank failed; returns an exit code if it is not."""
    os.write(2, f"another rank has gone: {reason}\n".encode())
    sys.stdout.flush()
    time.sleep(limits.orphaned_s)
    return PEER_LOST
