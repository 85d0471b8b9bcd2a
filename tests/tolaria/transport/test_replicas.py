"""Replicas on another machine: how they are sent beside training, and found again."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from support.joining import Meeting, meeting
from support.replicas import Holder, arrived, image_of, segment_of
from tolaria.errors import ChannelError
from tolaria.images import StateImage
from tolaria.ranks import admission
from tolaria.ranks.admission import (
    AskReplicas,
    KeepReplicas,
    ReplicaFollows,
    ReplicaReady,
    ReplicasHeld,
    ReplicaStored,
    SendReplica,
    StoreReplica,
)
from tolaria.ranks.replicas import (
    FORKS_CHARACTERS_MAX,
    PIECE_BYTES,
    FoundReplica,
    LiveSnapshots,
    Piece,
    ReplicaPoint,
    piece_of,
)
from tolaria.segments import Segment, share
from tolaria.transport import replica_exchange
from tolaria.transport.replica_exchange import ReplicaExchange
from tolaria.transport.replicas import ReplicaKeeper, find_replica

pytestmark = pytest.mark.anyio


async def until(condition: Callable[[], object]) -> None:
    """Waits until it returns something true."""
    with anyio.fail_after(180):
        while not condition():
            await anyio.sleep(0.005)


async def in_thread(ask: Callable[[], Any]) -> Any:
    """The answer to a question that blocks."""
    return await anyio.to_thread.run_sync(ask)


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


@asynccontextmanager
async def kept(met: Meeting, ring: Ring) -> AsyncIterator[None]:
    """Forms a group of the machines, and has replicas of the ring's snapshots kept."""
    with await met.rendezvous.form() as formation:
        met.rendezvous.start(formation, 1)
    keeper = ReplicaKeeper(met.rendezvous, 100.0, ring.segments)
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
    async with meeting(tmp_path, nodes=2, replicas=1) as met, holder.joined(met), kept(met, ring):
        await until(lambda: holder.steps() == [20, 30])
        ring.take(25, proven=True)
        ring.take(40)  # in the same pass
        await until(lambda: holder.steps() == [25, 40])
    assert holder.most == 2  # with the one that is to come there are three
    async with meeting(tmp_path, nodes=2, replicas=1) as met, holder.joined(met):
        replica = await found(met)
        assert replica is not None
        assert replica.point == replace(ring.points[-1], size_bytes=ring.segments[5].size_bytes)
        assert same(replica.image, image_of(40))
        assert await found(met, newer_than=40) is None


async def test_what_was_kept_for_others_makes_room(tmp_path: Path) -> None:
    """For another run, or a service that had come further; what is an ancestor of the live state is not sent again."""
    holder, ring = Holder(), Ring()
    for run_id, step in (("another", 900), ("run", 800), ("run", 10)):
        image = image_of(step)
        point = ReplicaPoint(run_id, image.seal().total, step, 1, proven=True)
        holder.store.put(await in_thread(partial(arrived, share(image), point)))
    ring.take(10, proven=True)
    ring.take(20)
    async with meeting(tmp_path, nodes=2, replicas=1) as met, holder.joined(met), kept(met, ring):
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
    point = ReplicaPoint("run", image.seal().total, 5, 1)
    second.store.put(await in_thread(partial(arrived, share(image), point)))
    async with meeting(tmp_path, nodes=3, replicas=1) as met, first.joined(met), second.joined(met), kept(met, ring):
        await until(lambda: first.steps() == [10] and not second.steps())


def refuse(content: bytes) -> bytes:
    """No memory for any replica."""
    if piece_of(content) is not None or not isinstance(said := admission.for_service(content), ReplicaReady):
        return content
    return admission.packed(replace(said, problem="no memory"))


async def with_old(step: int, *, refusing: bool = False) -> Holder:
    """A machine that has kept a replica for an earlier service."""
    holder, image = Holder(), image_of(step)
    holder.spoil = refuse if refusing else holder.spoil
    point = ReplicaPoint("run", image.seal().total, step, 1)
    holder.store.put(await in_thread(partial(arrived, share(image), point)))
    return holder


async def test_a_machine_without_memory_is_passed_over(tmp_path: Path) -> None:
    """It is sent nothing. What it has kept before is dropped once another one keeps a newer replica."""
    first, second, ring = await with_old(5, refusing=True), Holder(), Ring()
    ring.take(10)
    async with meeting(tmp_path, nodes=3, replicas=1) as met, first.joined(met):
        await until(lambda: met.rendezvous.nodes)
        async with second.joined(met), kept(met, ring):
            await until(lambda: second.steps() == [10] and not first.steps())
    assert first.pieces == 0


async def test_old_replicas_stay_where_they_are_until_there_is_a_new_one(tmp_path: Path) -> None:
    """A log line says once that no machine keeps any."""
    first, second, ring = await with_old(5, refusing=True), await with_old(6, refusing=True), Ring()
    ring.take(10)
    with capture_logs() as logs:
        async with (
            meeting(tmp_path, nodes=3, replicas=1) as met,
            first.joined(met),
            second.joined(met),
            kept(met, ring),
        ):
            await until(lambda: [line for line in logs if line["event"] == "no_replicas"])
            await anyio.sleep(1.5)
    assert (first.steps(), second.steps()) == ([5], [6])
    said = [line["event"] for line in logs if line["event"] in {"no_replicas", "replica_not_kept"}]
    assert said == ["replica_not_kept", "no_replicas"]  # both are named alike


async def test_a_service_without_replicas_frees_them(tmp_path: Path) -> None:
    """As soon as the machine joins."""
    holder = await with_old(5)
    async with meeting(tmp_path, nodes=2) as met, holder.joined(met):
        await until(lambda: not holder.steps())


async def test_no_copy_is_made_without_memory_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first machine; there is no replica then, and a log line says why."""
    holder, ring = Holder(), Ring()
    ring.take(10)
    monkeypatch.setattr("tolaria.ranks.replicas.memory_left", lambda: 10**6)
    with capture_logs() as logs:
        async with meeting(tmp_path, nodes=2, replicas=1) as met, holder.joined(met), kept(met, ring):
            await until(lambda: [line for line in logs if line["event"] == "replica_not_kept"])
    assert "store_replica" not in holder.heard
    (line,) = [line for line in logs if line["event"] == "replica_not_kept"]
    assert "does not fit" in line["detail"]


async def test_snapshots_with_too_long_a_lineage_are_left_out(tmp_path: Path) -> None:
    """A log line says so once, and the machine stays."""
    holder, ring = Holder(), Ring()
    ring.take(10)
    ring.take(20)
    ring.points[-1] = replace(ring.points[-1], forks="[" * (FORKS_CHARACTERS_MAX + 1))
    with capture_logs() as logs:
        async with meeting(tmp_path, nodes=2, replicas=1) as met, holder.joined(met), kept(met, ring):
            await until(lambda: holder.steps() == [10])
            await anyio.sleep(1.5)
            assert len(met.rendezvous.nodes) == 1
    assert [line["event"] for line in logs].count("replica_not_kept") == 1


async def test_segments_that_cannot_be_looked_up_are_passed_over(tmp_path: Path) -> None:
    """Those that the lane has let go of, and what is none."""
    holder, ring = Holder(), Ring()
    ring.take(10)

    class Gone(dict[int, Segment]):
        """Segments of which the first ones are gone when they are looked up."""

        def __iter__(self) -> Iterator[int]:
            return iter([98, 99, *self.keys()])

        def __missing__(self, number: int) -> Segment:
            raise KeyError(number) if number == 98 else ValueError("an empty file")

    ring.segments = Gone(ring.segments)
    async with meeting(tmp_path, nodes=2, replicas=1) as met, holder.joined(met), kept(met, ring):
        await until(lambda: holder.steps() == [10])


async def test_a_snapshot_that_is_overwritten_meanwhile_is_not_kept(tmp_path: Path) -> None:
    """Its bytes do not have its digest; the next one is kept."""
    holder, ring = Holder(), Ring()
    ring.take(10)
    memory = ring.segments[1].memory
    memory[64:65] = bytes([memory[64] ^ 1])
    async with meeting(tmp_path, nodes=2, replicas=1) as met, holder.joined(met), kept(met, ring):
        await anyio.sleep(1.5)
        ring.take(20)
        await until(lambda: holder.steps() == [20])


async def test_a_damaged_replica_is_passed_over_for_an_older_one(tmp_path: Path) -> None:
    """Whichever bit of it has changed; without another one there is none."""
    holder, ring = Holder(), Ring()
    ring.take(20, proven=True)
    newest = ring.take(30)
    async with meeting(tmp_path, nodes=2, replicas=1) as met, holder.joined(met), kept(met, ring):
        await until(lambda: holder.steps() == [20, 30])
    for expected in (20, None):
        point = newest if expected else ring.points[0]
        segment = holder.store.segment(point.digest)
        assert segment is not None
        segment.memory[64:65] = bytes([segment.memory[64] ^ 1])
        async with meeting(tmp_path, nodes=2, replicas=1) as met, holder.joined(met):
            replica = await found(met)
            assert (None if replica is None else replica.point.global_step) == expected


def cut_off(content: bytes) -> bytes:
    """A piece that is too long."""
    return content if piece_of(content) is None else content + b"more than was announced"


def nonsense(content: bytes) -> bytes:
    """Another answer in place of a piece."""
    piece = piece_of(content)
    return content if piece is None else admission.packed(admission.ReplicasHeld(piece.request, ()))


def shorter(content: bytes) -> bytes:
    """Another size than that which was sent."""
    if piece_of(content) is not None or not isinstance(said := admission.for_service(content), ReplicaFollows):
        return content
    return admission.packed(replace(said, size_bytes=said.size_bytes - 1))


@pytest.mark.parametrize("spoil", [cut_off, nonsense, shorter])
async def test_senseless_answers_end_the_request(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    """And nothing else: there is no replica then, and the machine stays in the group."""
    holder, ring = Holder(), Ring()
    ring.take(10)
    async with meeting(tmp_path, nodes=2, replicas=1) as met, holder.joined(met), kept(met, ring):
        await until(lambda: holder.steps() == [10])
    holder.spoil = spoil
    async with meeting(tmp_path, nodes=2, replicas=1) as met, holder.joined(met):
        assert await found(met) is None
        (node,) = met.rendezvous.nodes
        assert await found(met) is None
        assert met.rendezvous.nodes == (node,)
        await until(lambda: node.ready)


async def test_a_machine_that_goes_while_it_is_asked_ends_the_request(tmp_path: Path) -> None:
    """There is no replica then."""
    async with meeting(tmp_path, nodes=2, replicas=1) as met, anyio.create_task_group() as tasks:
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
    async with meeting(tmp_path, nodes=2, replicas=1) as met, holder.joined(met), kept(met, ring):
        await until(lambda: holder.steps() == [10])
    async with meeting(tmp_path, nodes=2, replicas=1) as met, anyio.create_task_group() as tasks:
        done = list[FoundReplica | None]()

        async def ask() -> None:
            done.append(await found(met))

        tasks.start_soon(ask)
        await anyio.sleep(0.2)
        assert done == []
        async with holder.joined(met):
            await until(lambda: done)
    assert done[0] is not None
    async with meeting(tmp_path, nodes=2, replicas=1) as met:
        assert await find_replica(met.rendezvous, "run", lambda _: True, machines=1, wait_s=0.2) is None


@dataclass
class Answering:
    """A machine that answers as it is told, without a connection; with a clock that a test sets."""

    ready: str = ""
    stored: str = ""
    late_s: float = 0.0
    kept: list[tuple[int, ...]] = field(default_factory=list)
    sent: list[tuple[float, int]] = field(default_factory=list)
    now_s: float = 0.0
    begun: int = 0
    ended: int = 0

    def __post_init__(self) -> None:
        self.exchange = ReplicaExchange(self._hear, lambda: self.now_s)
        self.point, self.segment, self.sizes = ReplicaPoint("run", "", 7, 1), Segment.create(0, 300_000), list[int]()
        self._missing = 0

    async def _hear(self, content: bytes) -> None:
        self.begun += 1
        await self._take(content)
        self.ended += 1

    async def _take(self, content: bytes) -> None:
        piece = piece_of(content)
        if piece is None:
            await self._answer(admission.for_machine(content))
            return
        self.sent.append((time.monotonic(), len(content)))
        if len(self.sent) == 2:
            await anyio.sleep(self.late_s)
        self._missing -= len(piece.content)
        if not self._missing:
            await self.exchange.take_in(ReplicaStored(piece.request, self.stored))

    async def _answer(self, message: admission.ToMachine) -> None:
        match message:
            case StoreReplica():
                self.sizes.append(message.point.size_bytes)
                self._missing, self.sent = message.point.size_bytes, []
                await self.exchange.take_in(ReplicaReady(message.request, self.ready))
            case AskReplicas():
                await self.exchange.take_in(ReplicasHeld(message.request - 1, (self.point,)))  # late
                await self.exchange.take_in(ReplicasHeld(message.request, ()))
            case KeepReplicas():
                self.kept.append(tuple(point.global_step for point in message.points))
            case _:
                assert isinstance(message, SendReplica)

    async def store(self, mb_per_s: float = 100.0) -> bool:
        """Sends it a replica."""
        return await self.exchange.store(self.point, self.segment, mb_per_s)


async def test_replicas_use_no_more_bandwidth_than_they_may() -> None:
    """Also after one that was late: the time that was lost is not made up for."""
    machine = Answering(late_s=0.5)
    began_s = time.monotonic()
    assert await machine.store(1.0)
    sent_bytes = sum(size for _, size in machine.sent)
    assert time.monotonic() - began_s >= sent_bytes / 1e6 + 0.4
    (_, _), (second_s, size), *rest = machine.sent
    assert rest[-1][0] - second_s >= 0.5 + (len(rest) - 1) * size / 1e6
    assert machine.exchange.held == {"": replace(machine.point, size_bytes=machine.segment.size_bytes)}
    assert machine.sizes == [machine.segment.size_bytes]


@pytest.mark.parametrize("problem", ["ready", "stored"])
async def test_a_machine_that_keeps_no_replica_is_left_alone_for_a_while(problem: str) -> None:
    """For a minute, then twice as long each time, at most ten minutes; nothing is sent to one without memory."""
    machine = Answering()
    setattr(machine, problem, "no memory")

    def is_open() -> bool:
        return machine.exchange.is_open

    def has_stored() -> bool:
        return machine.exchange.has_stored

    for wait_s in (60, 120, 240, 480, 600, 600):
        assert is_open()
        with pytest.raises(ChannelError, match="no memory"):
            await machine.store()
        assert bool(machine.sent) == (problem == "stored")
        machine.now_s += wait_s - 1
        assert not is_open()
        machine.now_s += 1
    setattr(machine, problem, "")
    assert not has_stored()
    assert await machine.store()
    assert has_stored()
    setattr(machine, problem, "no memory")
    with pytest.raises(ChannelError):
        await machine.store()
    machine.now_s += 60
    assert is_open()


async def test_a_replica_that_is_sent_gives_way_to_one_that_is_fetched() -> None:
    """Between two pieces; it was not refused."""
    machine, done = Answering(), list[object]()

    async def ask() -> None:
        await until(lambda: machine.sent)
        done.append(await machine.exchange.offers("run"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        assert not await machine.store(0.1)
    assert done == [()]
    assert machine.exchange.is_open
    assert 0 < len(machine.sent) < 4


async def test_a_request_that_was_cut_short_ends_nothing_else() -> None:
    """What answers it later does not answer the next one. A frame is sent as a whole: the other side counts them."""
    machine = Answering(late_s=0.5)
    with anyio.move_on_after(0.2) as waiting:
        await machine.store()
    assert waiting.cancel_called
    assert machine.begun == machine.ended == 3
    assert await machine.exchange.offers("run") == ()
    assert await machine.store()


async def test_a_machine_is_asked_to_keep_what_it_is_to_keep_before_more_comes() -> None:
    """Once, and again after each replica: it may have kept one of which nothing was heard."""
    machine = Answering()
    for _ in range(2):
        await machine.exchange.keep([machine.point])
    assert machine.kept == [(7,)]
    assert await machine.store()
    for _ in range(2):
        await machine.exchange.keep([machine.point])
    assert machine.kept == [(7,), (7,)]


async def test_a_replica_without_room_for_it_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size is known before; so nothing waits for memory when it comes."""
    machine = Answering()
    monkeypatch.setattr("tolaria.ranks.replicas.memory_left", lambda: 10**6)
    with pytest.raises(MemoryError):
        await machine.exchange.fetch(replace(machine.point, size_bytes=300_000))
    assert machine.begun == 0


async def test_a_replica_that_arrives_too_slowly_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though each of its pieces comes in time; the machine can be asked again."""
    machine, size_bytes = Answering(), 300_000
    monkeypatch.setattr(replica_exchange, "_ANSWER_S", 0.3)
    monkeypatch.setattr(replica_exchange, "_FETCHED_MB_PER_S", 1e6)

    async def trickle() -> None:
        await until(lambda: machine.begun)
        await machine.exchange.take_in(ReplicaFollows(1, size_bytes))
        while True:
            await machine.exchange.take_in(Piece(1, b"x"))
            await anyio.sleep(0.01)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(trickle)
        with pytest.raises(ChannelError, match="has not arrived within"):
            await machine.exchange.fetch(replace(machine.point, size_bytes=size_bytes))
        tasks.cancel_scope.cancel()
    assert await machine.exchange.offers("run") == ()
