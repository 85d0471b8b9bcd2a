"""A lane whose process is a script, and what the service's side of it delivers."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import pytest

from tolaria.config import LaneSettings, Settings
from tolaria.images import StateImage
from tolaria.lane.messages import Command, Event
from tolaria.lane.order import RestorePlan
from tolaria.transport.process_lane import ProcessLane

COMMON = """
import json, os, socket, sys, time
options = dict(argument.lstrip("-").split("=") for argument in sys.argv[1:])
print(json.dumps({"lane": os.getpid()}), flush=True)
wire = socket.socket(fileno=int(options["connection"]))
from tolaria.errors import ConfigurationError
from tolaria.lane.encoding import to_bytes
from tolaria.lane.messages import LaneEnded, LaneReady, Held
from tolaria.values.failure import Failure
from tolaria.values.training import EpochProgress, Position
from tolaria.wire import Frame, FrameKind, FrameStream, packed_events, send
stream = FrameStream(wire)
while (order := stream.next()).kind is not FrameKind.ORDER: pass
ready = LaneReady(Position(0, 0), EpochProgress(), 10, "cpu", "2", {}, (), (), {"host": 0.1}, (), ())
def say_ready(): send(wire, Frame(FrameKind.READY, to_bytes(ready)))
def say(*events): send(wire, Frame(FrameKind.EVENTS, packed_events([to_bytes(e) for e in events])))
def wait():
    while stream.next() is not None: pass
    sys.exit(9)
"""


@dataclass
class ScriptLane:
    """A lane and the events that it has delivered."""

    lane: ProcessLane
    events: list[Event] = field(default_factory=list)
    plans: int = 0

    async def until(self, kind: type[Event], count: int = 1) -> Event:
        """Waits for that many events of a kind; returns the last one."""
        with anyio.fail_after(180):
            while len(found := [event for event in self.events if isinstance(event, kind)]) < count:
                await anyio.sleep(0.005)
        return found[count - 1]


@asynccontextmanager
async def running_script(
    script: str, monkeypatch: pytest.MonkeyPatch, *, before: Sequence[Command] = (), **settings: object
) -> AsyncIterator[ScriptLane]:
    """Runs a lane whose process is this script, after what all scripts begin with.

    The commands `before` are sent when there is no process yet.
    """
    monkeypatch.setattr("tolaria.transport.lane_start.PROGRAM", (sys.executable, "-c", COMMON + script))
    section = LaneSettings.model_validate({"restart_pause_s": 0.01, "restart_pause_max_s": 0.02, **settings})
    lane = ScriptLane(ProcessLane(Settings(lane=section)))

    async def plan() -> tuple[RestorePlan, StateImage | None]:
        lane.plans += 1
        return RestorePlan(), None

    for command in before:
        lane.lane.send(0, command)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lane.lane.serve)
        lane.lane.start(lambda: lane.events.extend(lane.lane.take_events()))
        try:
            lane.lane.plan = plan
            with anyio.fail_after(180):
                await lane.lane.open()
            assert lane.plans == 0  # the first process resumes from what the run has loaded
            yield lane
        finally:
            lane.lane.abandon()
