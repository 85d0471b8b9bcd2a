"""A machine that joins a group, whose agent is a script."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest

from support.joining import SECRET, Meeting, Owner, meeting
from support.pods import free_port
from support.processes import is_alive
from support.replicas import image_of
from tolaria.config import Address
from tolaria.errors import JoinRefusedError, LaneFailedError, ServiceAbsentError
from tolaria.ranks import admission
from tolaria.ranks.node import Node
from tolaria.ranks.replicas import ReplicaPoint
from tolaria.segments import Segment, share

pytestmark = pytest.mark.anyio

COMMON = """
import json, os, signal, subprocess, sys, time
options = dict(argument.lstrip("-").split("=") for argument in sys.argv[1:])
from tolaria.segments import Segment
from tolaria.signals.lane_page import LanePage
page = LanePage(Segment(0, int(options["page"])))
page.beat_agent()
rank = subprocess.Popen(["sleep", "1000"], start_new_session=True)
open("started", "a").write(json.dumps([os.getpid(), rank.pid, options]) + "\\n")
print(json.dumps({"lane": os.getpid()}), flush=True)
"""


@dataclass
class Joined:
    """A node that runs, what it has said, what its ranks have written, and how it has ended."""

    said: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    error: BaseException | None = None
    ended: anyio.Event = field(default_factory=anyio.Event)


async def until(condition: object) -> None:
    """Waits until a function of no arguments returns something true."""
    with anyio.fail_after(180):
        while not condition():  # type: ignore[operator] # a function
            await anyio.sleep(0.01)


@asynccontextmanager
async def node_of(port: int, secret: bytes = SECRET, **limits: float) -> AsyncIterator[Joined]:
    """Runs a node that joins at the port; cancels it at the end."""
    joined = Joined()
    waits = {"wait_s": math.inf, "full_s": 0.0, **limits}
    node = Node(Address("127.0.0.1", port), secret, 2, say=joined.said.append, write=joined.written.append, **waits)

    async def run() -> None:
        try:
            await node.run()
        except (JoinRefusedError, LaneFailedError, ServiceAbsentError) as error:
            joined.error = error
        joined.ended.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        yield joined
        tasks.cancel_scope.cancel()


def run_script(monkeypatch: pytest.MonkeyPatch, directory: Path, rest: str) -> None:
    """Has agents run this script, in a directory of the test."""
    monkeypatch.chdir(directory)
    monkeypatch.setattr("tolaria.ranks.node.PROGRAM", (sys.executable, "-c", COMMON + rest))


async def started(met: Meeting, generation: int = 1) -> None:
    """Starts a group with the machine that is ready."""
    with anyio.fail_after(180):
        formation = await met.rendezvous.form()
    with formation:
        assert len(formation.nodes) == 1
        met.rendezvous.start(formation, generation)


async def agents(directory: Path, count: int = 1) -> list[tuple[int, int, dict[str, str]]]:
    """Waits until `count` agents have started; returns their process ids, those of their ranks, and their options."""
    file = anyio.Path(directory / "started")
    with anyio.fail_after(180):
        while not await file.exists() or len(lines := (await file.read_text()).splitlines()) < count:
            await anyio.sleep(0.01)
    return [tuple(json.loads(line)) for line in lines]


async def test_ranks_run_from_start_to_stop_again_and_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is left of a generation before the machine is ready for the next one; the end of the run ends it."""
    run_script(monkeypatch, tmp_path, "time.sleep(1000)")
    async with meeting(tmp_path, nodes=2) as met, node_of(met.port) as joined:
        for generation in (1, 2):
            await started(met, generation)
            *_, (agent, rank, options) = await agents(tmp_path, generation)
            expected = {"node": "1", "nodes": "2", "processes": "2", "store-host": "127.0.0.1", "interface": "lo"}
            assert expected.items() <= options.items()
            assert int(options["service-pid"]) == os.getpid()
            met.rendezvous.stop("the group has ended")
            await until(lambda pids=(agent, rank): not any(map(is_alive, pids)))
        await started(met, 3)
        *_, (agent, rank, _) = await agents(tmp_path, 3)
        await met.rendezvous.end(failed=False, detail="the run has ended")
        with anyio.fail_after(180):
            await joined.ended.wait()
        await until(lambda: not any(map(is_alive, (agent, rank))))
    assert joined.error is None
    assert [line.split(";")[0] for line in joined.said] == [
        f"joined the group at 127.0.0.1:{met.port} for digits",
        "training as machine 2 of 2, in generation 1 of the group", "the group has ended",
        "training as machine 2 of 2, in generation 2 of the group", "the group has ended",
        "training as machine 2 of 2, in generation 3 of the group", "the run has ended",
    ]  # fmt: skip
    assert met.owner == Owner()


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("sys.stderr.write('why\\nhow\\n'); sys.stderr.flush(); os._exit(3)", 3, "how"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
        ("os.kill(os.getpid(), signal.SIGSTOP)", -9, "the agent of the group has given no heartbeat for"),
    ],
)
async def test_the_service_learns_how_ranks_have_ended(
    end: str, code: int, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By code and last lines, also of an agent that is stopped; the machine is ready for the next start."""
    run_script(monkeypatch, tmp_path, end)
    silence_s = 3 if "SIGSTOP" in end else 20
    async with meeting(tmp_path, nodes=2, node_timeout_s=silence_s) as met, node_of(met.port) as joined:
        await started(met)
        await until(lambda: met.owner.ended)
        ((_, found, lines),) = met.owner.ended
        assert found == code
        assert words in (lines[-1] if lines else "")
        assert words in "".join(joined.written)
        with await met.rendezvous.form() as formation:
            assert len(formation.nodes) == 1
        ((agent, rank, _),) = await agents(tmp_path)
        await until(lambda: not is_alive(agent))
        if "SIGSTOP" in end:  # else the agent has ended its ranks, or they end with it
            await until(lambda: not is_alive(rank))
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)
    assert met.owner.lost == []


SILENT = """
code = "import time; from tolaria.ranks.stacks import dump_on_request; dump_on_request(); print(flush=True)\\n"
code += "def waits(): time.sleep(1000)\\nwaits()"
other = subprocess.Popen(
    [sys.executable, "-c", code, "tolaria.lane.rank"], env=os.environ | {"RANK": "2"}, stdout=subprocess.PIPE,
    start_new_session=True,
)
other.stdout.readline()
page.show_silent_rank()
time.sleep(1000)
"""


async def test_the_service_learns_of_a_silent_rank_and_gets_the_stacks_of_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of those that answer: the other one is no process of the lane's, which the signal would end."""
    run_script(monkeypatch, tmp_path, SILENT)
    async with meeting(tmp_path, nodes=2) as met, node_of(met.port):
        assert await met.rendezvous.stacks() == {}
        await started(met)
        await until(lambda: met.rendezvous.silent_rank_ns)
        found = await met.rendezvous.stacks()
        assert list(found) == [2]
        assert "in waits" in found[2]
        ((_, rank, _),) = await agents(tmp_path)
        assert is_alive(rank)
    assert met.owner.ended == []


async def test_an_agent_that_cannot_be_started_is_a_failure_of_the_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The service learns it, as of ranks that have ended, and the machine stays for the next start."""
    monkeypatch.setattr("tolaria.ranks.node.PROGRAM", (str(tmp_path / "missing"),))
    async with meeting(tmp_path, nodes=2) as met, node_of(met.port) as joined:
        for count in (1, 2):
            await started(met, count)
            await until(lambda count=count: len(met.owner.ended) == count)
            _, code, (line,) = met.owner.ended[-1]
            assert (code, "cannot be started" in line, joined.written[-1]) == (1, True, f"{line}\n")
    assert met.owner.lost == []


async def test_ranks_go_with_the_service_which_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It may return at the same address; or it does not within the time that the machine was to wait."""
    run_script(monkeypatch, tmp_path, "time.sleep(1000)")
    port = free_port()
    async with node_of(port, wait_s=2) as joined:
        for generation in (1, 2):
            async with meeting(tmp_path, port, nodes=2) as met:
                await started(met, generation)
                *_, (agent, rank, _) = await agents(tmp_path, generation)
            await until(lambda pids=(agent, rank): not any(map(is_alive, pids)))
        async with joined_end(joined):
            assert isinstance(joined.error, ServiceAbsentError)
    waiting = f"waiting for the service at 127.0.0.1:{port}: Connection refused"
    lost = "the connection to the service is lost (the connection has ended); joining again"
    shown = [line for line in joined.said if line in {waiting, lost}]
    assert shown in (
        [waiting, lost, waiting, lost, waiting],
        [lost, waiting, lost, waiting],
        [waiting, lost, lost, waiting],
    )


async def test_refusals_end_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another secret at once; a full group after a while, in which the service may notice that a machine is lost."""
    async with meeting(tmp_path, nodes=2) as met:
        async with node_of(met.port, b"another secret") as joined, joined_end(joined):
            assert isinstance(joined.error, JoinRefusedError)
            assert joined.error.reason == "secret"
        async with met.machine(), node_of(met.port, full_s=0.7) as joined, joined_end(joined):
            assert isinstance(joined.error, JoinRefusedError)
            assert joined.error.reason == "full"
            assert joined.said[0].startswith("waiting for a place: lane.nodes is 2:2")
        async with met.machine(), node_of(met.port, full_s=0.0) as joined, joined_end(joined):
            assert isinstance(joined.error, JoinRefusedError)
            assert joined.said == []  # not even once
        digests = iter(["of the service", "", "of the service", "other"])
        monkeypatch.setattr(admission, "job_digest", lambda _job: next(digests))
        for words in ("this machine finds no module for digits", "the file of digits is another one"):
            async with node_of(met.port) as joined, joined_end(joined):
                assert isinstance(joined.error, JoinRefusedError)
                assert (joined.error.reason, words in str(joined.error)) == ("job", True)


async def test_a_failed_run_is_a_failure(tmp_path: Path) -> None:
    """With its reason."""
    async with meeting(tmp_path, nodes=2) as met, node_of(met.port) as joined:
        with anyio.fail_after(180), await met.rendezvous.form():
            await met.rendezvous.end(failed=True, detail="no memory")
        async with joined_end(joined):
            assert str(joined.error) == "no memory"
            assert isinstance(joined.error, LaneFailedError)


async def test_a_machine_that_allocates_memory_for_a_replica_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Though it takes longer than the silence after which it would be lost; then it keeps the replica."""
    image, allowed, create = image_of(7), threading.Event(), Segment.create
    point, segment = ReplicaPoint("run", image.seal().total, 7, 1), share(image)

    def slowly(number: int, size_bytes: int) -> Segment:
        assert allowed.wait(180)
        return create(number, size_bytes)

    monkeypatch.setattr(Segment, "create", slowly)
    kept = list[bool]()
    async with (
        meeting(tmp_path, nodes=2, node_timeout_s=1, replicas=1) as met,
        node_of(met.port) as joined,
        anyio.create_task_group() as tasks,
    ):
        await until(lambda: met.rendezvous.nodes)
        (node,) = met.rendezvous.nodes

        async def store() -> None:
            kept.append(await node.replicas.store(point, segment, 100.0))

        tasks.start_soon(store)
        await anyio.sleep(2.5)
        allowed.set()
        await until(lambda: kept)
        assert kept == [True]
        assert [offer.global_step for offer in await node.replicas.offers("run")] == [7]
        assert met.rendezvous.nodes == (node,)
    assert not [line for line in joined.said if "lost" in line]


@asynccontextmanager
async def joined_end(joined: Joined) -> AsyncIterator[None]:
    """Waits until the node has ended."""
    with anyio.fail_after(180):
        await joined.ended.wait()
    yield
