"""Replicas of snapshots: which ones are kept, and what a machine makes of the bytes that arrive."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from support.replicas import arrived, image_of
from tolaria.errors import ChannelError, ImageDamagedError
from tolaria.images import StateImage
from tolaria.ranks.admission import (
    AskReplicas,
    ReplicaReady,
    ReplicasHeld,
    ReplicaStored,
    SendReplica,
    StopRanks,
    StoreReplica,
    ToMachine,
    ToService,
    for_service,
)
from tolaria.ranks.replica_store import ReplicaSession, ReplicaStore
from tolaria.ranks.replicas import HELD_MAX, IncomingReplica, LiveSnapshots, ReplicaPoint, piece_of, pieces
from tolaria.segments import Segment, share
from tolaria.values.lineage import Lineage


def point(step: int, *, attempt: int = 1, proven: bool = False, digest: str = "", size_bytes: int = 0) -> ReplicaPoint:
    """A snapshot of a step."""
    return ReplicaPoint(
        "run", digest or f"digest-{step}-{attempt}", step, attempt, proven=proven, size_bytes=size_bytes
    )


def sealed(step: int) -> tuple[StateImage, ReplicaPoint]:
    """An image with its digests, and the snapshot that it is."""
    image = image_of(step)
    return image, point(step, digest=image.seal().total)


def test_what_has_arrived_is_the_image_with_its_digests() -> None:
    """Bit by bit."""
    image, announced = sealed(7)
    found = arrived(share(image), announced).verified()
    assert found.seal() == image.seal()
    assert {name: bytes(content) for name, content in found.buffers.items()} == {
        name: bytes(content) for name, content in image.buffers.items()
    }
    assert (found.position, found.values) == (image.position, image.values)


def test_any_changed_byte_of_the_state_is_noticed() -> None:
    """Of the preamble, the tensors and the header; padding is no part of the state."""
    image, announced = sealed(7)
    whole = bytes(share(image).memory)
    content = bytes(image.buffers["parameter/w"])
    start = whole.index(content)
    header = whole.index(b'{"at_ns"')
    for place in (0, 8, 16, start, start + len(content) - 1, header, header + 40):
        segment = share(image)
        segment.memory[place : place + 1] = bytes([segment.memory[place] ^ 1])
        with pytest.raises(ImageDamagedError):
            arrived(segment, announced).verified()


def test_another_snapshot_than_was_announced_is_not_taken() -> None:
    """Though it is intact: by its digest, or its step."""
    image, announced = sealed(7)
    other, _ = sealed(8)
    with pytest.raises(ImageDamagedError):
        arrived(share(other), point(8, digest=announced.digest)).verified()
    with pytest.raises(ImageDamagedError):
        arrived(share(image), point(8, digest=announced.digest)).verified()
    unsealed = image_of(7)
    with pytest.raises(ImageDamagedError):
        arrived(share(unsealed), announced).verified()


@pytest.mark.parametrize("size_bytes", [1, 63, 64, 65, 1000])
def test_a_replica_that_is_none_is_damaged_and_never_longer_than_announced(size_bytes: int) -> None:
    """Whatever its length is."""
    incoming = IncomingReplica(point(7, size_bytes=size_bytes))
    with pytest.raises(ChannelError):
        incoming.feed(bytes(size_bytes + 1))
    incoming.feed(b"\xff" * size_bytes)
    with pytest.raises(ImageDamagedError):
        incoming.verified()
    with pytest.raises(ChannelError):
        incoming.feed(b"x")


def test_a_store_keeps_what_it_is_asked_to_and_never_more_than_a_few() -> None:
    """The oldest one goes first; of another run it tells nothing."""
    store = ReplicaStore()
    steps = range(1, HELD_MAX + 2)
    for step in steps:
        image, announced = sealed(step)
        store.put(arrived(share(image), announced))
    assert [each.global_step for each in store.of("run")] == [*steps][1:]
    assert store.of("another run") == []
    newest, oldest = sealed(steps[-1])[1], sealed(steps[0])[1]
    assert len(store.keep([newest, oldest])) == HELD_MAX - 1
    assert store.of("run") == [newest]
    assert store.segment(newest.digest) is not None
    assert store.segment(oldest.digest) is None


def test_the_newest_and_the_newest_proven_snapshot_are_wanted() -> None:
    """They may be the same."""
    snapshots = LiveSnapshots((point(10, proven=True), point(20, proven=True), point(30), point(25)))
    assert snapshots.wanted() == [point(30), point(20, proven=True)]
    assert LiveSnapshots((point(10), point(20, proven=True))).wanted() == [point(20, proven=True)]
    assert LiveSnapshots((point(10),)).wanted() == [point(10)]
    assert LiveSnapshots().wanted() == []


def test_replicas_that_a_rollback_has_undone_are_dropped() -> None:
    """Those of its ancestors stay, also of snapshots that are overwritten by now; what proves them is learned."""
    live = LiveSnapshots((point(30, attempt=2), point(10, proven=True)), Lineage(2, ((1, 15),)))
    assert live.kept([point(10), point(20)]) == [point(10, proven=True)]
    assert live.kept([point(12), point(20)]) == [point(12)]
    assert live.kept([point(12), point(10), point(18, attempt=2)]) == [point(18, attempt=2), point(10, proven=True)]
    assert live.kept([point(31, attempt=2), point(12)]) == [point(12)]  # of an earlier service


@dataclass
class Machine:
    """A session, and what it has said."""

    store: ReplicaStore = field(default_factory=ReplicaStore)
    said: list[ToService] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.session = ReplicaSession(self.store, self._send)

    async def _send(self, content: bytes) -> None:
        if piece_of(content) is None:
            self.said.append(for_service(content))
        await anyio.lowlevel.checkpoint()

    async def hears(self, message: ToMachine) -> list[ToService]:
        """What it answers to a message."""
        async with self.session.open():
            assert self.session.obey(message)
        said, self.said = self.said, []
        return said

    async def gets(self, segment: Segment, request: int, until: int | None = None) -> list[ToService]:
        """What it answers to the pieces of a replica, of which some may be left out."""
        async with self.session.open():
            for content in [*pieces(segment, request)][:until]:
                piece = piece_of(content)
                assert piece is not None
                self.session.take(piece)
        said, self.said = self.said, []
        return said


def sent(step: int) -> tuple[Segment, ReplicaPoint]:
    """A replica as it is sent."""
    image, announced = sealed(step)
    segment = share(image)
    return segment, replace(announced, size_bytes=segment.size_bytes)


@pytest.mark.anyio
@pytest.mark.parametrize("damaged", [False, True])
async def test_a_machine_keeps_only_what_has_arrived_intact(damaged: bool) -> None:
    """It says when the pieces may come, then that it keeps the replica, or why not; other pieces are dropped."""
    machine, (segment, announced) = Machine(), sent(7)
    if damaged:
        segment.memory[64] ^= 1
    assert await machine.hears(StoreReplica(3, announced)) == [ReplicaReady(3)]
    (answer,) = await machine.gets(segment, 3)
    assert isinstance(answer, ReplicaStored)
    assert answer.request == 3
    assert bool(answer.problem) == damaged
    assert machine.store.of("run") == ([] if damaged else [announced])
    assert await machine.gets(segment, 3) == []
    assert not machine.session.obey(StopRanks("enough"))


@pytest.mark.anyio
async def test_a_request_ends_the_one_before() -> None:
    """What arrives of that one later is no part of the next, which a machine can keep."""
    machine, (first, one), (second, other) = Machine(), sent(7), sent(8)
    assert await machine.hears(StoreReplica(1, one)) == [ReplicaReady(1)]
    assert await machine.gets(first, 1, until=2) == []
    assert await machine.hears(AskReplicas(2, "run")) == [ReplicasHeld(2, ())]
    assert await machine.gets(first, 1) == []
    assert await machine.hears(StoreReplica(3, other)) == [ReplicaReady(3)]
    assert await machine.gets(first, 1) == []
    assert await machine.gets(second, 3) == [ReplicaStored(3)]
    assert machine.store.of("run") == [other]


@pytest.mark.anyio
async def test_a_machine_goes_on_while_memory_is_allocated_and_digests_are_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The task that receives is not held up: other messages are read and answered meanwhile."""
    allowed, create, verified = threading.Event(), Segment.create, IncomingReplica.verified

    def slowly(number: int, size_bytes: int) -> Segment:
        assert allowed.wait(180)
        return create(number, size_bytes)

    def slowly_verified(incoming: IncomingReplica) -> StateImage:
        assert allowed.wait(180)
        return verified(incoming)

    machine, (segment, announced) = Machine(), sent(7)
    monkeypatch.setattr(Segment, "create", slowly)
    monkeypatch.setattr(IncomingReplica, "verified", slowly_verified)
    for step in (StoreReplica(1, announced), segment):
        async with machine.session.open():
            allowed.clear()
            said = len(machine.said)
            if isinstance(step, StoreReplica):
                machine.session.obey(step)
            else:
                for content in pieces(segment, 1):
                    piece = piece_of(content)
                    assert piece is not None
                    machine.session.take(piece)
            await anyio.sleep(0.05)
            assert len(machine.said) == said  # and this task runs
            allowed.set()
    assert machine.said == [ReplicaReady(1), ReplicaStored(1)]


@pytest.mark.anyio
@pytest.mark.parametrize("left_mb", [None, 100, 10_000])
async def test_a_machine_without_memory_refuses_a_replica(monkeypatch: pytest.MonkeyPatch, left_mb: int | None) -> None:
    """Before it allocates any, and what it needs itself is left; it keeps nothing of what comes nevertheless."""
    segment, announced = sent(7)
    monkeypatch.setattr("tolaria.ranks.replicas.memory_left", lambda: None if left_mb is None else left_mb * 10**6)
    machine = Machine()
    (answer,) = await machine.hears(StoreReplica(1, announced))
    assert isinstance(answer, ReplicaReady)
    assert ("does not fit" in answer.problem) == (left_mb == 100)
    stored = [] if answer.problem else [ReplicaStored(1)]
    assert await machine.gets(segment, 1) == stored


@pytest.mark.anyio
async def test_a_replica_that_cannot_be_allocated_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine stays, and says why."""

    def no_room(number: int, size_bytes: int) -> Segment:
        raise MemoryError(f"no shared memory for {size_bytes} bytes in {number}")

    machine = Machine()
    monkeypatch.setattr(Segment, "create", no_room)
    answers = await machine.hears(StoreReplica(1, point(7, size_bytes=1000)))
    assert answers == [ReplicaReady(1, "no shared memory for 936 bytes in 0")]


@pytest.mark.anyio
async def test_a_replica_is_sent_until_something_else_is_asked() -> None:
    """The number of the request is on each piece."""
    store, frames = ReplicaStore(), list[bytes]()

    async def send(content: bytes) -> None:
        frames.append(content)
        if len(frames) == 2:
            session.obey(AskReplicas(2, "run"))
        await anyio.lowlevel.checkpoint()

    image, announced = sealed(7)
    store.put(await anyio.to_thread.run_sync(arrived, share(image), announced))
    session = ReplicaSession(store, send)
    async with session.open():
        session.obey(SendReplica(1, announced.digest))
    sent_pieces = [piece.request for content in frames if (piece := piece_of(content)) is not None]
    assert sent_pieces == [1]
    assert len(frames) == 3


def test_the_proven_snapshot_is_not_sent_if_a_newer_one_is_held() -> None:
    """A held replica is proven with any snapshot that is newer, and stays so when that has been overwritten."""
    held = [point(20, size_bytes=5), point(12, size_bytes=5)]
    live = LiveSnapshots((point(30), point(25, proven=True), point(10, proven=True)))
    assert live.kept(held) == [point(20, proven=True, size_bytes=5)]
    assert live.missing(live.kept(held)) == [point(30), point(25, proven=True)]
    later = LiveSnapshots((point(30), point(10, proven=True)))
    assert later.missing(live.kept(held)) == [point(30)]
    assert later.missing([point(30), point(20)]) == [point(10, proven=True)]
    assert later.missing([]) == [point(30), point(10, proven=True)]
