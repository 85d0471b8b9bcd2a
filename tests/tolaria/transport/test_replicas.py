"""Replicas on another machine: how they are sent beside training, and found again."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest

from support.joining import Meeting, meeting
from support.replicas import Holder, arrived, image_of, segment_of
from tolaria.images import StateImage
from tolaria.ranks import admission
from tolaria.ranks.replicas import PIECE_BYTES, FoundReplica, LiveSnapshots, ReplicaPoint, piece_of
from tolaria.segments import Segment, share
from tolaria.transport.replica_exchange import ReplicaExchange
from tolaria.transport.replicas import ReplicaKeeper, find_replica

pytestmark = pytest.mark.anyio


async def until(condition: Callable[[], object]) -> None:
    """Waits until it returns something true."""
    with anyio.fail_after(30):
        while not condition():
            await anyio.sleep(0.005)


@dataclass
class Ring:
    """Snapshots of a lane in memory, as the service holds them."""

    segments: dict[int, Segment] = field(default_factory=dict)
    points: list[ReplicaPoint] = field(default_factory=list)

    def take(self, step: int, *, proven: bool = False) -> ReplicaPoint:
        """Takes a snapshot."""
        image = image_of(step)
        point = ReplicaPoint("run", image.seal().total, step, 1, proven=proven)
        number = len(self.segments) + 1
        self.segments[number] = segment_of(image, number)
        self.points.append(point)
        return point

    def descriptors(self) -> list[tuple[int, int]]:
        """Of its segments."""
        return [(number, segment.descriptor) for number, segment in self.segments.items()]


@asynccontextmanager
async def kept(met: Meeting, ring: Ring) -> AsyncIterator[None]:
    """Forms a group of the machines, and has replicas of the ring's snapshots kept."""
    with await met.rendezvous.form() as formation:
        met.rendezvous.start(formation, 1)
    keeper = ReplicaKeeper(met.rendezvous, 100.0, ring.descriptors)
    keeper.snapshots = lambda: LiveSnapshots(tuple(ring.points))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keeper.serve)
        yield
        tasks.cancel_scope.cancel()


async def found(met: Meeting, newer_than: int = 0) -> FoundReplica | None:
    """What is found of the run."""
    return await find_replica(
        met.rendezvous, "run", lambda point: point.global_step > newer_than, machines=1, wait_s=30
    )


def same(one: StateImage, other: StateImage) -> bool:
    """Whether two images are equal bit by bit."""
    return one.verify() == other.verify() and one.position == other.position


async def test_the_newest_snapshots_are_kept_and_found_again(tmp_path: Path) -> None:
    """The newest and the newest proven one; by another service too, as they were captured."""
    holder, ring = Holder(), Ring()
    ring.take(10)
    ring.take(20, proven=True)
    ring.take(30)
    async with meeting(tmp_path, nodes=2) as met, holder.joined(met), kept(met, ring):
        await until(lambda: holder.steps() == [20, 30])
        ring.take(40)
        await until(lambda: holder.steps() == [20, 40])
    async with meeting(tmp_path, nodes=2) as met, holder.joined(met):
        replica = await found(met)
        assert replica is not None
        assert replica.point == ring.points[-1]
        assert same(replica.image, image_of(40))
        assert await found(met, newer_than=40) is None


async def test_what_was_kept_for_others_makes_room(tmp_path: Path) -> None:
    """For another run, or a service that had come further; what is an ancestor of the live state is not sent again."""
    holder, ring = Holder(), Ring()
    for run_id, step in (("another", 900), ("run", 800), ("run", 10)):
        image = image_of(step)
        point = ReplicaPoint(run_id, image.seal().total, step, 1, proven=True)
        holder.store.put(arrived(share(image), point))
    ring.take(10, proven=True)
    ring.take(20)
    async with meeting(tmp_path, nodes=2) as met, holder.joined(met), kept(met, ring):
        await until(lambda: holder.steps() == [10, 20])
        assert holder.store.of("another") == []
        (node,) = met.rendezvous.nodes
        await until(lambda: len(node.replicas.held) == 2)
    assert holder.pieces == -(-share(image_of(20)).size_bytes // PIECE_BYTES)


async def test_one_machine_is_enough(tmp_path: Path) -> None:
    """Another one, which has kept replicas before, drops them once the first one has some."""
    first, second, ring = Holder(), Holder(), Ring()
    ring.take(10)
    image = image_of(5)
    second.store.put(arrived(share(image), ReplicaPoint("run", image.seal().total, 5, 1)))
    async with meeting(tmp_path, nodes=3) as met, first.joined(met), second.joined(met), kept(met, ring):
        await until(lambda: first.steps() == [10] and not second.steps())


async def test_a_snapshot_that_is_overwritten_meanwhile_is_not_kept(tmp_path: Path) -> None:
    """Its bytes do not have its digest; the next one is kept."""
    holder, ring = Holder(), Ring()
    ring.take(10)
    memory = ring.segments[1].memory
    memory[64:65] = bytes([memory[64] ^ 1])
    async with meeting(tmp_path, nodes=2) as met, holder.joined(met), kept(met, ring):
        await anyio.sleep(1.5)
        ring.take(20)
        await until(lambda: holder.steps() == [20])


async def test_a_damaged_replica_is_passed_over_for_an_older_one(tmp_path: Path) -> None:
    """Whichever bit of it has changed; without another one there is none."""
    holder, ring = Holder(), Ring()
    ring.take(20, proven=True)
    newest = ring.take(30)
    async with meeting(tmp_path, nodes=2) as met, holder.joined(met), kept(met, ring):
        await until(lambda: holder.steps() == [20, 30])
    for expected in (20, None):
        point = newest if expected else ring.points[0]
        segment = holder.store.segment(point.digest)
        assert segment is not None
        segment.memory[64:65] = bytes([segment.memory[64] ^ 1])
        async with meeting(tmp_path, nodes=2) as met, holder.joined(met):
            replica = await found(met)
            assert (None if replica is None else replica.point.global_step) == expected


def cut_off(content: bytes) -> bytes:
    """A piece that is too long."""
    return content if piece_of(content) is None else content + b"more than was announced"


def nonsense(content: bytes) -> bytes:
    """Another answer in place of a piece."""
    return content if piece_of(content) is None else admission.packed(admission.ReplicasHeld(()))


@pytest.mark.parametrize("spoil", [cut_off, nonsense], ids=["too_long", "another_answer"])
async def test_senseless_answers_end_the_request(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    """And nothing else: there is no replica then, and the machine stays in the group."""
    holder, ring = Holder(), Ring()
    ring.take(10)
    async with meeting(tmp_path, nodes=2) as met, holder.joined(met), kept(met, ring):
        await until(lambda: holder.steps() == [10])
    holder.spoil = spoil
    async with meeting(tmp_path, nodes=2) as met, holder.joined(met):
        assert await found(met) is None
        (node,) = met.rendezvous.nodes
        assert await found(met) is None
        assert met.rendezvous.nodes == (node,)
        await until(lambda: node.ready)


async def test_a_machine_that_goes_while_it_is_asked_ends_the_request(tmp_path: Path) -> None:
    """There is no replica then."""
    async with meeting(tmp_path, nodes=2) as met, anyio.create_task_group() as tasks:
        done = list[object]()

        async def ask() -> None:
            done.append(await found(met))

        async with met.machine() as machine:
            tasks.start_soon(ask)
            assert isinstance(await machine.hear(), admission.AskReplicas)
        await until(lambda: done)
    assert done == [None]


async def test_a_start_waits_for_machines_as_long_as_it_may(tmp_path: Path) -> None:
    """A machine that comes meanwhile is asked; without one there is no replica in the end."""
    holder, ring = Holder(), Ring()
    ring.take(10)
    async with meeting(tmp_path, nodes=2) as met, holder.joined(met), kept(met, ring):
        await until(lambda: holder.steps() == [10])
    async with meeting(tmp_path, nodes=2) as met, anyio.create_task_group() as tasks:
        done = list[FoundReplica | None]()

        async def ask() -> None:
            done.append(await found(met))

        tasks.start_soon(ask)
        await anyio.sleep(0.2)
        assert done == []
        async with holder.joined(met):
            await until(lambda: done)
    assert done[0] is not None
    async with meeting(tmp_path, nodes=2) as met:
        assert await find_replica(met.rendezvous, "run", lambda _: True, machines=1, wait_s=0.2) is None


async def test_replicas_use_no_more_bandwidth_than_they_may() -> None:
    """Sending takes at least what the size and the setting say; answers of the machine come meanwhile."""
    image = image_of(7)
    point = ReplicaPoint("run", image.seal().total, 7, 1)
    segment, sent = share(image), list[int]()

    async def send(content: bytes) -> None:
        sent.append(len(content))
        if sum(sent) > segment.size_bytes:
            tasks.start_soon(exchange.take_in, admission.ReplicaStored(point.digest))

    exchange = ReplicaExchange(send)
    async with anyio.create_task_group() as tasks:
        began_s = time.monotonic()
        await exchange.store(point, segment, 0.5)
        took_s = time.monotonic() - began_s
    exchange.close()
    assert took_s >= segment.size_bytes / 0.5e6
    assert exchange.held == {point.digest: point}
