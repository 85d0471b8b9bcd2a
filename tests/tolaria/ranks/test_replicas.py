"""Replicas of snapshots: which ones are kept, and what a machine makes of the bytes that arrive."""

from __future__ import annotations

import pytest

from support.replicas import arrived, image_of
from tolaria.errors import ChannelError, ImageDamagedError
from tolaria.images import StateImage
from tolaria.ranks.admission import ReplicaStored, StopRanks, StoreReplica, for_service
from tolaria.ranks.replica_store import ReplicaSession, ReplicaStore
from tolaria.ranks.replicas import HELD_MAX, IncomingReplica, LiveSnapshots, ReplicaPoint, pieces
from tolaria.segments import Segment, share
from tolaria.values.lineage import Lineage


def point(step: int, *, attempt: int = 1, proven: bool = False, digest: str = "") -> ReplicaPoint:
    """A snapshot of a step."""
    return ReplicaPoint("run", digest or f"digest-{step}-{attempt}", step, attempt, proven=proven)


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
    incoming = IncomingReplica(point(7), size_bytes)
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
    store.keep([newest, oldest])
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


@pytest.mark.anyio
@pytest.mark.parametrize("damaged", [False, True])
async def test_a_machine_keeps_only_what_has_arrived_intact(damaged: bool) -> None:
    """It answers that it does, or why not; pieces that follow nothing are dropped."""
    store, said = ReplicaStore(), list[bytes]()

    async def send(content: bytes) -> None:
        said.append(content)

    session = ReplicaSession(store, send)
    image, announced = sealed(7)
    segment = share(image)
    if damaged:
        segment.memory[64] ^= 1
    assert await session.obey(StoreReplica(announced, segment.size_bytes))
    for content in pieces(segment):
        await session.take(content[1:])
    (answer,) = [for_service(content) for content in said]
    assert isinstance(answer, ReplicaStored)
    assert answer.digest == announced.digest
    assert bool(answer.problem) == damaged
    assert store.of("run") == ([] if damaged else [announced])
    await session.take(b"more")
    assert not await session.obey(StopRanks("enough"))


@pytest.mark.anyio
async def test_a_replica_that_does_not_fit_is_refused_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine stays: it says why, and drops the pieces that follow."""

    def no_room(number: int, size_bytes: int) -> Segment:
        raise MemoryError(f"no shared memory for {size_bytes} bytes in {number}")

    store, said = ReplicaStore(), list[bytes]()

    async def send(content: bytes) -> None:
        said.append(content)

    monkeypatch.setattr(Segment, "create", no_room)
    session = ReplicaSession(store, send)
    assert await session.obey(StoreReplica(point(7), 1000))
    await session.take(bytes(1000))
    assert [for_service(content) for content in said] == [
        ReplicaStored(point(7).digest, "no shared memory for 936 bytes in 0")
    ]
