"""The service's side of a group on several machines: its agent is a script, the other machine is the test."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest

from support.joining import SECRET, Door, Machine
from support.pods import free_port
from support.processes import is_alive
from tolaria.config import Settings
from tolaria.errors import ChannelError
from tolaria.images import StateImage
from tolaria.lane.messages import Event, Held, LaneEnded, LaneLost, LaneRestarted, RunEpoch, Stop
from tolaria.lane.order import RestorePlan
from tolaria.ranks.admission import RanksEnded, Ready, RunOver, StartRanks, StopRanks
from tolaria.transport.process_lane import ProcessLane

pytestmark = pytest.mark.anyio
KILLED = "rank 1 of 2 was killed by"

AGENT = """
import json, os, socket, sys, time
options = dict(argument.lstrip("-").split("=") for argument in sys.argv[1:])
print(json.dumps({"lane": os.getpid()}), flush=True)
wire = socket.socket(fileno=int(options["connection"]))
from tolaria.lane.encoding import from_bytes, to_bytes
from tolaria.lane.messages import Held, LaneEnded, LaneReady, RunEpoch, Stop
from tolaria.values.training import EpochProgress, Position, RankInfo
from tolaria.wire import Frame, FrameKind, FrameStream, packed_events, send, unpacked_id
stream = FrameStream(wire)
while (order := stream.next()).kind is not FrameKind.ORDER: pass
nodes = int(options.get("nodes", 1))
ranks = tuple(RankInfo(n, "here", 2**22 + 1, "cpu", n) for n in range(nodes))
ready = LaneReady(Position(0, 0), EpochProgress(), 10, "cpu", "2", {}, (), (), {"host": 0.1}, (), (), ranks=ranks)
send(wire, Frame(FrameKind.READY, to_bytes(ready)))
while (frame := stream.next()) is not None:
    command = from_bytes(unpacked_id(frame.content)[1])
    event = Held(command.order, 0) if isinstance(command, RunEpoch) else LaneEnded(0, None)
    send(wire, Frame(FrameKind.EVENTS, packed_events([to_bytes(event)])))
    if isinstance(command, Stop): sys.exit(0)
"""


@dataclass
class GroupLane:
    """A lane, the events that it has delivered, and where machines join it."""

    lane: ProcessLane
    door: Door
    events: list[Event] = field(default_factory=list)

    async def until(self, kind: type[Event], count: int = 1) -> list[Event]:
        """Waits for that many events of a kind; returns them."""
        with anyio.fail_after(180):
            while len(found := [event for event in self.events if isinstance(event, kind)]) < count:
                await anyio.sleep(0.005)
        return found


@asynccontextmanager
async def lane_with(
    monkeypatch: pytest.MonkeyPatch, directory: Path, agent: str = AGENT, **lane: object
) -> AsyncIterator[GroupLane]:
    """Runs a lane with these settings."""
    monkeypatch.setattr("tolaria.transport.lane_start.GROUP_PROGRAM", (sys.executable, "-c", agent))
    await anyio.Path(directory / "secret").write_bytes(SECRET)
    port = free_port()
    section = {"mode": "torchrun", "nodes": "1:2", "rendezvous": f"127.0.0.1:{port}", "join_wait_s": 0.0}
    section |= {"restart_pause_s": 0.01, "secret_file": str(directory / "secret"), "restarts_max": 1, **lane}
    process = ProcessLane(Settings.model_validate({"lane": section}))
    found = GroupLane(process, Door(port))

    async def plan() -> tuple[RestorePlan, StateImage | None]:
        return RestorePlan(), None

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(process.serve)
        process.start(lambda: found.events.extend(process.take_events()))
        process.plan = plan
        try:
            yield found
        finally:
            process.abandon()


async def started(machine: Machine, generation: int) -> None:
    """Waits for the start of ranks, as number 1 of 2."""
    order = await machine.hear()
    assert isinstance(order, StartRanks)
    assert (order.generation, order.node, order.nodes, order.store_host) == (generation, 1, 2, "127.0.0.1")
    assert order.store_port > 0


async def agent_of(directory: Path) -> int:
    """Waits until the script of an agent has written its process id; returns it."""
    file = anyio.Path(directory / "agent")
    with anyio.fail_after(180):
        while not await file.exists() or not (text := await file.read_text()).endswith("\n"):
            await anyio.sleep(0.01)
    return int(text.split()[0])


async def test_a_lost_machine_is_a_loss_of_the_group_which_goes_on_without_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its ranks are not killed by their process ids, which are other processes here."""
    other = await anyio.open_process(["sleep", "1000"], start_new_session=True)
    agent = AGENT.replace("2**22 + 1", f"{other.pid} if n else 2**22 + 1")
    async with lane_with(monkeypatch, tmp_path, agent, nodes="1:2", join_wait_s=30) as group:
        async with group.door.machine() as machine:
            await started(machine, 1)
            with anyio.fail_after(180):
                ready = await group.lane.open()
            assert ready is not None
            assert [rank.node for rank in ready.ranks] == [0, 1]
        async with group.door.machine() as machine:  # it comes back for the next start
            await started(machine, 2)
            (restarted,) = await group.until(LaneRestarted)
            assert isinstance(restarted, LaneRestarted)
            assert len(restarted.ready.ranks) == 2
    assert is_alive(other.pid)
    other.kill()
    await other.wait()
    (lost,) = await group.until(LaneLost)
    assert isinstance(lost, LaneLost)
    assert (lost.kind, lost.cause) == (
        "node_lost",
        "the machine host-b (127.0.0.1) has gone: the connection has ended",
    )


@pytest.mark.parametrize(
    ("ended", "kind", "cause"),
    [
        (RanksEnded(1, -9, (f"{KILLED} SIGKILL",)), "killed", f"it was killed by SIGKILL: {KILLED} SIGKILL on"),
        (RanksEnded(1, -11, (f"{KILLED} SIGSEGV",)), "crashed", f"it was killed by SIGSEGV: {KILLED} SIGSEGV on"),
        (RanksEnded(1, 85, ("OSError: no file", "rank 1 of 2 ended with code 85")), "raised", "rank 1 of 2 ended with"),
        (RanksEnded(1, 3, ()), "exited", "it ended with code 3"),
    ],
)
async def test_ranks_that_fail_elsewhere_are_described_as_those_here(
    ended: RanksEnded, kind: str, cause: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the machine and their last lines, not by how the service then ends the agent here."""
    async with lane_with(monkeypatch, tmp_path, nodes="1:2", join_wait_s=30) as group:
        async with group.door.machine() as machine:
            await started(machine, 1)
            with anyio.fail_after(180):
                await group.lane.open()
            await machine.say(ended)
            await machine.say(Ready())
            await started(machine, 2)
        (lost,) = await group.until(LaneLost)
        assert isinstance(lost, LaneLost)
        assert (lost.kind, lost.cause[: len(cause)]) == (kind, cause)
        assert not ended.lines or "on host-b (127.0.0.1)" in lost.cause


async def test_a_machine_that_goes_during_the_first_build_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The run has not failed, as it would for a job that dies while it is built."""
    slow = AGENT.replace("ranks = tuple", "time.sleep(0 if os.path.exists('again') else 1000); ranks = tuple")
    monkeypatch.chdir(tmp_path)
    async with lane_with(monkeypatch, tmp_path, agent=slow, nodes=2) as group:
        async with group.door.machine() as machine:
            await started(machine, 1)
            await anyio.Path(tmp_path / "again").touch()
        async with group.door.machine() as machine:
            await started(machine, 2)
            with anyio.fail_after(180):
                assert await group.lane.open() is not None
    assert not [event for event in group.events if isinstance(event, LaneLost)]


@pytest.mark.parametrize("built", [False, True])
async def test_ranks_here_that_miss_others_are_no_failure_if_a_machine_is_lost(
    built: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They end before the machine's silence is a loss, also during the first build, which would fail the run."""
    ends = "open('agent', 'a').write(f'{os.getpid()}\\n'); os.path.exists('again') or sys.exit(86)\n"
    here = "while (frame := stream.next())" if built else "ranks = tuple"
    monkeypatch.chdir(tmp_path)
    async with lane_with(monkeypatch, tmp_path, agent=AGENT.replace(here, ends + here), nodes=2) as group:
        async with group.door.machine() as machine:
            await started(machine, 1)
            pid = await agent_of(tmp_path)
            with anyio.fail_after(180):
                while is_alive(pid):
                    await anyio.sleep(0.01)
            await anyio.Path(tmp_path / "again").touch()
            assert group.events == []
        async with group.door.machine() as machine:
            await started(machine, 2)
            with anyio.fail_after(180):
                assert await group.lane.open() is not None
            lost = await group.until(LaneLost) if built else []
    assert [event.kind for event in lost if isinstance(event, LaneLost)] == (["node_lost"] if built else [])


@pytest.mark.parametrize("grow", ["restart", "epoch"])
async def test_a_machine_that_comes_later_waits_or_is_taken_in_at_an_epoch(
    grow: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As lane.grow says. That is no death: it does not count against lane.restarts_max, of which none is left here."""
    async with lane_with(monkeypatch, tmp_path, grow=grow, restarts_max=0) as group:
        with anyio.fail_after(180):
            await group.lane.open()
        async with group.door.machine() as machine:
            order = 0
            with anyio.fail_after(180):
                while order < 20 if grow == "restart" else not any(isinstance(e, LaneLost) for e in group.events):
                    order += 1
                    group.lane.send(0, RunEpoch(order))
                    await anyio.sleep(0.01)
            if grow == "restart":
                await group.until(Held, order)  # the script's answer to each order
            else:
                await started(machine, 2)
                (restarted,) = await group.until(LaneRestarted)
                assert isinstance(restarted, LaneRestarted)
                assert len(restarted.ready.ranks) == 2
                group.lane.send(0, RunEpoch(order + 1))
                with anyio.fail_after(180):
                    while Held(order + 1, 0) not in group.events:
                        await anyio.sleep(0.01)
    lost = [event.kind for event in group.events if isinstance(event, LaneLost)]
    assert lost == ([] if grow == "restart" else ["regrouped"])


async def test_machines_learn_of_the_end_of_the_run_but_not_of_a_drain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After a drain another service continues the run, and the machine joins that one."""
    for drained in (False, True):
        async with lane_with(monkeypatch, tmp_path, join_wait_s=30) as group, group.door.machine() as machine:
            await started(machine, 1)
            with anyio.fail_after(180):
                await group.lane.open()
            group.lane.drained = drained
            group.lane.send(0, Stop())
            assert await machine.hear() == StopRanks("the group has ended")
            if drained:
                with pytest.raises(ChannelError):
                    await machine.hear()
            else:
                assert await machine.hear() == RunOver(failed=False, detail="the run has ended")
                await machine.channel.close()
        assert await group.until(LaneEnded) == [LaneEnded(0, None)]
