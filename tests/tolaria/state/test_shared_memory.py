"""The snapshot ring in segments of shared memory, and what a later process takes over from them."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tolaria.errors import ImageDamagedError
from tolaria.images import StateImage, TensorSpec
from tolaria.segments import PREAMBLE_BYTES, Segment, open_image
from tolaria.state.restore import stage_restore
from tolaria.state.shared_memory import SharedMemory, arena_in, content_of
from tolaria.state.snapshots import Declined, SnapshotRing
from tolaria.state.training_state import TrainingState
from tolaria.values.training import Position

BACKBONE, TABLE = 100_000, 50_000
FROZEN_BYTES = 4 * (BACKBONE + TABLE)
NAMES = ("parameter/head", "parameter/backbone", "buffer/table")


@dataclass
class Live:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    position: Position


@dataclass
class Notes:
    """A state part that holds a text."""

    text: str = ""

    def state_dict(self) -> dict[str, str]:
        return {"text": self.text}

    def load_state_dict(self, state: dict[str, str]) -> None:
        self.text = state["text"]


@dataclass
class FineTuning:
    """A trained head on a frozen backbone, with a large static buffer."""

    live: Live = field(init=False)
    notes: Notes = field(default_factory=Notes)
    digests: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(3)
        model = nn.Module()
        model.register_parameter("head", nn.Parameter(torch.zeros(100)))
        model.register_parameter("backbone", nn.Parameter(torch.randn(BACKBONE), requires_grad=False))
        model.register_buffer("table", torch.randn(TABLE))
        self.live = Live(model, torch.optim.Adam(model.parameters(), lr=0.1), Position(0, 1))
        self.state = TrainingState(self.live, {"notes": self.notes})

    @property
    def backbone(self) -> Tensor:
        """The frozen parameter."""
        return self.live.model.get_parameter("backbone")

    def train(self) -> None:
        """One step, which changes the head."""
        for parameter in self.live.model.parameters():
            parameter.grad = torch.rand_like(parameter) if parameter.requires_grad else None
        self.live.optimizer.step()
        self.live.position = Position(self.live.position.global_step + 1, 1)

    def steps(self, count: int, *rings: SnapshotRing) -> None:
        """Trains, and captures the state of each step in each ring."""
        for _ in range(count):
            self.train()
            self.digests[self.live.position.global_step] = self.state.fingerprint().total
            for ring in rings:
                assert ring.capture(self.state) == self.live.position

    def restore(self, ring: SnapshotRing, step: int) -> None:
        """Restores the snapshot of this step, whose digests are computed again, and compares every bit."""
        lease = ring.hold(step)
        assert lease is not None
        with lease as image:
            stage_restore(self.state, image, verify=True).commit()
        assert self.live.position.global_step == step
        assert self.state.fingerprint().total == self.digests[step]


class Service:
    """Holds the descriptors of segments beyond the end of the process that has filled them."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.next_number = 1

    def follow(self, memory: SharedMemory) -> tuple[list[int], list[int]]:
        """Takes over new segments and closes freed ones; returns the numbers of both."""
        fresh, freed = memory.take_fresh(), memory.take_freed()
        for segment in fresh:
            self.held[segment.number] = os.dup(segment.descriptor)
            self.next_number = max(self.next_number, segment.number + 1)
        numbers = [segment.number for segment in fresh]
        for number in freed:
            os.close(self.held.pop(number))
        return numbers, freed

    def memory(self) -> SharedMemory:
        """The memory of the next process."""
        segments = [Segment(number, os.dup(descriptor)) for number, descriptor in self.held.items()]
        return SharedMemory(segments, self.next_number)

    def segment(self, number: int) -> Segment:
        """A segment, mapped once more."""
        return Segment(number, os.dup(self.held[number]))

    def close(self) -> None:
        """Closes everything."""
        for descriptor in self.held.values():
            os.close(descriptor)
        self.held.clear()


def new_ring(memory: SharedMemory | None = None, *, entries_max: int = 5, bytes_max: int = 2**24) -> SnapshotRing:
    """A ring in shared memory, or in private memory without it."""
    if memory is None:
        return SnapshotRing(bytes_max=bytes_max, entries_max=entries_max, seal=True)
    return SnapshotRing(bytes_max=bytes_max, entries_max=entries_max, seal=True, allocate=memory)


def digests_of(ring: SnapshotRing) -> dict[int, str | None]:
    """The digests of the restorable snapshots by step."""
    return {info.position.global_step: info.digest for info in ring.snapshots()}


def image_of(ring: SnapshotRing, step: int) -> StateImage:
    """The image of a step, which the caller reads at once."""
    lease = ring.hold(step)
    assert lease is not None
    with lease as image:
        return image


def addresses(ring: SnapshotRing, name: str) -> list[int]:
    """Where the restorable snapshots have a tensor."""
    images = [image_of(ring, step) for step in digests_of(ring)]
    return [torch.frombuffer(image.buffers[name], dtype=torch.uint8).data_ptr() for image in images]


def adopting(service: Service, digests: Collection[str], **limits: int) -> tuple[SnapshotRing, SharedMemory]:
    """The ring of the next process, which has taken over the snapshots with these digests."""
    memory = service.memory()
    ring = new_ring(memory, **limits)
    ring.adopt(memory.held, digests, pinned=False)
    memory.held.clear()
    return ring, memory


def left_by_a_process(run: FineTuning, steps: int, **limits: int) -> tuple[Service, dict[int, str | None]]:
    """What the service holds after a process has trained for some steps and ended, and the digests of its snapshots."""
    service, memory = Service(), SharedMemory()
    ring = new_ring(memory, **limits)
    for _ in range(steps):
        run.steps(1, ring)
        service.follow(memory)
    return service, digests_of(ring)


def known(digests: dict[int, str | None]) -> set[str]:
    """The digests alone."""
    return {digest for digest in digests.values() if digest is not None}


def open_descriptors() -> int:
    """How many descriptors this process has."""
    gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


# -- the ring in shared memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entries_max", "bytes_max"), [(5, 2**24), (1, 2**24), (8, FROZEN_BYTES + 2**14)])
def test_the_snapshots_are_those_of_private_memory(entries_max: int, bytes_max: int) -> None:
    """Steps, digests, sizes, counters and every byte, also when the limits evict snapshots."""
    run, memory = FineTuning(), SharedMemory()
    private = new_ring(entries_max=entries_max, bytes_max=bytes_max)
    shared = new_ring(memory, entries_max=entries_max, bytes_max=bytes_max)
    for step in range(1, 21):
        if step == 11:
            run.backbone.data[5] += 1.0
        run.steps(1, private, shared)
        assert digests_of(shared) == digests_of(private)
        assert shared.statistics() == private.statistics()
    for info, expected in zip(shared.snapshots(), private.snapshots(), strict=True):
        assert info.size_bytes == expected.size_bytes
        step = info.position.global_step
        found, other = image_of(shared, step), image_of(private, step)
        assert found.buffers == other.buffers
        assert (found.specs, found.values) == (other.specs, other.values)
        assert (found.segment > 0, other.segment) == (True, 0)
        run.restore(shared, step)


def test_a_snapshot_is_described_in_its_segment() -> None:
    """Another mapping of the segments finds each image by the number that it names, with the time of its capture."""
    run, service, memory = FineTuning(), Service(), SharedMemory()
    ring = new_ring(memory)
    run.steps(3, ring)
    service.follow(memory)
    others = {number: service.segment(number) for number in service.held}
    for info in ring.snapshots():
        image = image_of(ring, info.position.global_step)
        opened = open_image(others[image.segment], others)
        assert opened.image.verify().total == info.digest
        assert (opened.image.position, opened.at_ns) == (info.position, info.at_ns)
        assert [len(specs) for _, specs in opened.places][1:] == [1, 1]
    service.close()


def test_new_and_freed_segments_are_reported_once() -> None:
    """One for the tensors that change and one for each frozen one; all are freed with the ring."""
    run, service, memory = FineTuning(), Service(), SharedMemory()
    ring = new_ring(memory, entries_max=2)
    run.steps(1, ring)
    assert service.follow(memory) == ([1, 2, 3], [])
    assert service.follow(memory) == ([], [])
    run.steps(1, ring)
    assert service.follow(memory) == ([4], [])
    run.steps(5, ring)
    assert service.follow(memory) == ([], [])
    run.backbone.data[0] += 1.0
    run.steps(1, ring)
    assert service.follow(memory) == ([5], [])
    run.steps(2, ring)  # the last snapshot with the backbone as it was is evicted
    (fresh, freed) = service.follow(memory)
    assert (len(fresh), freed) == (0, [next(n for n in (2, 3) if n not in service.held)])
    ring.clear()
    assert service.follow(memory)[1]
    assert service.held == {}


def test_a_leased_snapshot_keeps_its_segments() -> None:
    """They are freed after the release only."""
    run, service, memory = FineTuning(), Service(), SharedMemory()
    ring = new_ring(memory)
    run.steps(1, ring)
    service.follow(memory)
    lease = ring.hold(1)
    ring.clear()
    assert lease is not None
    assert service.follow(memory) == ([], [])
    lease.image.verify()
    lease.release()
    ring.clear()
    del lease
    assert sorted(service.follow(memory)[1]) == [1, 2, 3]


def test_many_snapshots_need_no_more_segments_than_the_ring() -> None:
    """Two hundred captures, half of them of a changed state of another size, leave neither memory nor descriptors."""
    run, service, memory = FineTuning(), Service(), SharedMemory()
    ring, before = new_ring(memory, entries_max=4), open_descriptors()
    counts = []
    for step in range(200):
        run.notes.text = "x" * (step if step < 100 else 0)
        run.steps(1, ring)
        service.follow(memory)
        counts.append(len(service.held))
    assert max(counts) <= 4 + 2
    assert open_descriptors() - before <= 3 * (4 + 2)
    ring.clear()
    service.follow(memory)
    assert (service.held, open_descriptors()) == ({}, before)


def test_longer_values_get_room_for_their_header() -> None:
    """Each snapshot can be taken over, however much longer the values are than in the memory that is used again."""
    run = FineTuning()
    service, memory = Service(), SharedMemory()
    ring = new_ring(memory, entries_max=2)
    for length in (0, 10, 1000, 1001, 50_000, 10, 200_000):
        run.notes.text = '"\\' * length
        run.steps(1, ring)
        service.follow(memory)
        newest = run.live.position.global_step
        adopted, _ = adopting(service, {run.digests[newest]}, entries_max=2)
        assert digests_of(adopted) == {newest: run.digests[newest]}
        run.restore(adopted, newest)
        assert run.notes.text == '"\\' * length
    service.close()


def test_without_shared_memory_a_snapshot_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is the system's; the snapshots so far stay, and the next capture succeeds when there is room again."""
    run, memory = FineTuning(), SharedMemory()
    ring = new_ring(memory)
    run.steps(2, ring)
    run.train()
    with monkeypatch.context() as patch:

        def refuse(descriptor: int, offset: int, length: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("tolaria.segments.os.posix_fallocate", refuse)
        found = ring.capture(run.state)
    assert isinstance(found, Declined)
    assert (found.too_large, "No space left" in found.allocation_error) == (False, True)
    assert list(digests_of(ring)) == [1, 2]
    run.steps(1, ring)
    run.restore(ring, 4)
    assert len(memory.take_fresh()) == 5


# -- the next process --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_the_next_process_takes_over_the_snapshots(steps: int) -> None:
    """The same steps, digests, sizes and times; each can be restored and verified."""
    run = FineTuning()
    service, memory = Service(), SharedMemory()
    ring = new_ring(memory)
    run.steps(steps, ring)
    service.follow(memory)
    before, held_bytes = ring.snapshots(), ring.statistics().size_bytes
    del ring, memory
    gc.collect()
    adopted, memory = adopting(service, known({info.position.global_step: info.digest for info in before}))
    assert [(info.position, info.digest, info.at_ns) for info in adopted.snapshots()] == [
        (info.position, info.digest, info.at_ns) for info in before
    ]
    assert [info.size_bytes for info in adopted.snapshots()] == [info.size_bytes for info in before]
    assert adopted.statistics().size_bytes == held_bytes
    assert service.follow(memory) == ([], [])
    for info in before[::-1]:
        run.restore(adopted, info.position.global_step)
    service.close()


def test_only_the_named_snapshots_are_taken_over() -> None:
    """The memory of the others is freed, and that of frozen tensors is not."""
    run = FineTuning()
    service, digests = left_by_a_process(run, 5)
    kept = {step: digests[step] for step in (2, 5)}
    adopted, memory = adopting(service, known(kept))
    assert digests_of(adopted) == kept
    assert len(service.follow(memory)[1]) == 3
    assert len(service.held) == 2 + 2
    for step in kept:
        run.restore(adopted, step)
    service.close()


@pytest.mark.parametrize("digests", [set[str](), {"0" * 32}])
def test_unknown_digests_take_over_nothing(digests: set[str]) -> None:
    """All memory is freed, and the next snapshots begin with new numbers."""
    run = FineTuning()
    service, _ = left_by_a_process(run, 3)
    adopted, memory = adopting(service, digests)
    assert (adopted.snapshots(), adopted.statistics().size_bytes) == ((), 0)
    assert sorted(service.follow(memory)[1]) == [1, 2, 3, 4, 5]
    run.steps(1, adopted)
    assert service.follow(memory) == ([6, 7, 8], [])
    service.close()


def test_dropped_snapshots_are_not_taken_over() -> None:
    """Those of the steps after a rollback, although their memory still holds them."""
    run, service, memory = FineTuning(), Service(), SharedMemory()
    ring = new_ring(memory)
    run.steps(4, ring)
    ring.forget_after(2)
    service.follow(memory)
    adopted, _ = adopting(service, known(digests_of(ring)))
    assert list(digests_of(adopted)) == [1, 2]
    service.close()


def test_frozen_tensors_are_shared_after_the_takeover() -> None:
    """By the snapshots that were taken over and by those that follow."""
    run = FineTuning()
    service, digests = left_by_a_process(run, 3)
    adopted, memory = adopting(service, known(digests), bytes_max=FROZEN_BYTES + 2**16)
    for _ in range(2):
        for name in NAMES[1:]:
            assert len(set(addresses(adopted, name))) == 1
        assert len(set(addresses(adopted, NAMES[0]))) == len(digests_of(adopted))
        run.steps(2, adopted)
    fresh, freed = service.follow(memory)
    assert (len(fresh), freed) == (2, [])
    assert len(digests_of(adopted)) == 5
    assert adopted.statistics().declined == 0
    service.close()


def test_a_changed_frozen_tensor_is_stored_again_after_the_takeover() -> None:
    """The snapshots that were taken over keep the older content."""
    run = FineTuning()
    service, digests = left_by_a_process(run, 2)
    adopted, _ = adopting(service, known(digests))
    run.backbone.data[-1] = float("nan")
    run.steps(1, adopted)
    assert [len(set(addresses(adopted, name))) for name in NAMES] == [3, 2, 1]
    for step in (1, 2, 3):
        run.restore(adopted, step)
    service.close()


def test_a_ring_reaches_back_as_before_after_the_takeover() -> None:
    """The newest is there, and one of half of 2^(n-1) captures or more, in the memory that was taken over."""
    run, entries = FineTuning(), 5
    service, digests = left_by_a_process(run, 20, entries_max=entries)
    adopted, memory = adopting(service, known(digests), entries_max=entries)
    evicted = adopted.statistics().evictions
    for _ in range(60):
        run.steps(1, adopted)
        newest = run.live.position.global_step
        ages = [newest - step for step in digests_of(adopted)]
        assert (ages[-1], len(ages)) == (0, entries)
        if newest >= 20 + 2**entries:
            assert 2 ** (entries - 2) <= max(ages) < 2 ** (entries - 1)
            assert max(older - newer for older, newer in itertools.pairwise(ages)) <= 2 ** (entries - 2)
    assert adopted.statistics().evictions - evicted == 60
    assert service.follow(memory) == ([], [])
    for step in digests_of(adopted):
        run.restore(adopted, step)
    service.close()


@pytest.mark.parametrize(("entries_max", "bytes_max"), [(2, 2**24), (5, FROZEN_BYTES + 2**14)])
def test_smaller_limits_hold_from_the_next_capture_on(entries_max: int, bytes_max: int) -> None:
    """More snapshots than they allow may be taken over; older ones are evicted then, and their memory is freed."""
    run = FineTuning()
    service, digests = left_by_a_process(run, 20, entries_max=8)
    adopted, memory = adopting(service, known(digests), entries_max=entries_max, bytes_max=bytes_max)
    run.steps(1, adopted)
    statistics = adopted.statistics()
    assert (statistics.declined, statistics.entries <= entries_max) == (0, True)
    assert statistics.size_bytes <= bytes_max
    service.follow(memory)
    assert len(service.held) <= entries_max + 2
    run.restore(adopted, run.live.position.global_step)
    service.close()


def test_snapshots_are_taken_over_again_and_again() -> None:
    """Ten processes in a row, each of which adds one snapshot, leave no more memory than one does."""
    run, before = FineTuning(), open_descriptors()
    service, digests = left_by_a_process(run, 1)
    for _ in range(10):
        adopted, memory = adopting(service, known(digests))
        assert digests_of(adopted) == digests
        run.steps(1, adopted)
        service.follow(memory)
        digests = digests_of(adopted)
        assert len(service.held) <= 5 + 2
        del adopted, memory
    assert len(digests) == 5
    service.close()
    assert open_descriptors() == before


# -- damage ------------------------------------------------------------------------------------------------------------


def first_of(service: Service, step: int) -> Segment:
    """The segment in which the snapshot of a step begins."""
    others = {number: service.segment(number) for number in service.held}
    for segment in others.values():
        if segment.header() is not None and open_image(segment, others).image.position.global_step == step:
            return segment
    raise AssertionError(f"no snapshot of step {step}")


def cleared(segment: Segment) -> None:
    """As at the beginning of a capture that the end of the process has cut off."""
    segment.clear()


def half_filled(segment: Segment) -> None:
    """As in the middle of such a capture."""
    segment.clear()
    segment.memory[PREAMBLE_BYTES : PREAMBLE_BYTES + 100] = bytes([7]) * 100


def damaged_header(segment: Segment) -> None:
    """A byte of the header has changed."""
    start = int.from_bytes(segment.memory[:8], "little")
    segment.memory[start + 20] ^= 1


def damaged_preamble(segment: Segment) -> None:
    """A byte of the header's digest has changed."""
    segment.memory[20] ^= 1


def filled_with_ones(segment: Segment) -> None:
    """Something has overwritten the whole segment."""
    segment.memory[:] = b"\x01" * segment.size_bytes


@pytest.mark.parametrize("damage", [cleared, half_filled, damaged_header, damaged_preamble, filled_with_ones])
def test_an_unfinished_or_damaged_snapshot_is_left_out(damage: Callable[[Segment], None]) -> None:
    """The others are taken over, and its memory is freed."""
    run = FineTuning()
    service, digests = left_by_a_process(run, 3)
    segment = first_of(service, 2)
    damage(segment)
    adopted, memory = adopting(service, known(digests))
    assert list(digests_of(adopted)) == [1, 3]
    assert service.follow(memory)[1] == [segment.number]
    for step in (1, 3):
        run.restore(adopted, step)
    service.close()


def test_memory_that_is_being_filled_again_has_no_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends within a capture leaves neither the new snapshot nor the one whose memory it uses."""
    run, service, memory = FineTuning(), Service(), SharedMemory()
    ring = new_ring(memory, entries_max=2)
    run.steps(2, ring)
    service.follow(memory)
    run.train()

    def end(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr("tolaria.state.arenas.Arena.describe", end)
    with pytest.raises(SystemExit):
        ring.capture(run.state)
    adopted, _ = adopting(service, set(run.digests.values()) | {run.state.fingerprint().total})
    assert len(digests_of(adopted)) == 1
    (kept,) = digests_of(adopted)
    run.restore(adopted, kept)
    service.close()


def test_damaged_content_is_found_at_the_restore() -> None:
    """The snapshot is taken over with the digests of its capture, and refused when it is to be restored."""
    run = FineTuning()
    service, digests = left_by_a_process(run, 3)
    first_of(service, 2).memory[PREAMBLE_BYTES + 3] ^= 1
    adopted, _ = adopting(service, known(digests))
    assert digests_of(adopted) == digests
    live = run.state.fingerprint().total
    with pytest.raises(ImageDamagedError):
        run.restore(adopted, 2)
    assert run.state.fingerprint().total == live
    for step in (1, 3):
        run.restore(adopted, step)
    service.close()


def test_a_damaged_frozen_tensor_is_found_and_not_shared_any_more() -> None:
    """The snapshots that were taken over are refused by its name; the next one has a good copy."""
    run = FineTuning()
    service, digests = left_by_a_process(run, 2)
    others = {number: service.segment(number) for number in service.held}
    opened = open_image(first_of(service, 1), others)
    (frozen,) = (segment for segment, specs in opened.places if specs[0].name == NAMES[1])
    frozen.memory[PREAMBLE_BYTES + 4 * BACKBONE - 1] ^= 1
    adopted, _ = adopting(service, known(digests))
    run.steps(1, adopted)
    for step in (1, 2):
        with pytest.raises(ImageDamagedError, match=f"^{NAMES[1]}:"):
            run.restore(adopted, step)
    run.restore(adopted, 3)
    service.close()


def test_a_snapshot_without_one_of_its_segments_is_left_out() -> None:
    """Here all snapshots, since the missing one has a frozen tensor; all memory is freed."""
    run = FineTuning()
    service, digests = left_by_a_process(run, 2)
    others = {number: service.segment(number) for number in service.held}
    frozen = open_image(first_of(service, 1), others).places[1][0].number
    others.clear()
    os.close(service.held.pop(frozen))
    adopted, memory = adopting(service, known(digests))
    assert adopted.snapshots() == ()
    service.follow(memory)
    assert service.held == {}
    run.steps(1, adopted)
    run.restore(adopted, 3)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_the_content_of_a_segment_is_the_same_memory() -> None:
    """A tensor of all bytes after the preamble, which keeps the mapping alive."""
    segment = Segment.create(0, 1000)
    content = content_of(segment, pinned=False)
    assert (content.dtype, content.shape) == (torch.uint8, (1000,))
    content[0] = 9
    assert segment.memory[PREAMBLE_BYTES] == 9
    assert segment.memory[:PREAMBLE_BYTES] == bytes(PREAMBLE_BYTES)
    del segment
    gc.collect()
    assert content[0] == 9


def test_an_arena_in_a_filled_segment_has_its_content() -> None:
    """What is left after the tensors is the room of its header."""
    segment = Segment.create(0, 64 + 500)
    segment.memory[PREAMBLE_BYTES : PREAMBLE_BYTES + 3] = b"abc"
    arena = arena_in(segment, (TensorSpec("x", "U8", (3,)),), pinned=False)
    assert (bytes(arena.buffers["x"]), arena.size_bytes, arena.header_room) == (b"abc", 64, 500)
    assert arena.segment is segment
    assert arena.holds({"x": torch.tensor([97, 98, 99], dtype=torch.uint8)})


def test_numbers_are_never_used_again() -> None:
    """Not those of freed segments, nor those of an earlier process."""
    memory = SharedMemory([Segment.create(3, 10)], next_number=8)
    numbers = []
    for _ in range(3):
        _, segment = memory(100, False)
        numbers.append(segment.number)
        del segment
    memory.held.clear()
    assert [segment.number for segment in memory.take_fresh()] == numbers == [8, 9, 10]
    gc.collect()
    assert sorted(memory.take_freed()) == [3, 8, 9, 10]


def test_there_are_no_more_segments_than_the_limit_of_open_files_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocation fails as it does without memory, and goes on when segments have been freed."""
    monkeypatch.setattr("tolaria.state.shared_memory.allow_descriptors", lambda: 2)
    memory = SharedMemory()
    first, second = memory(64, False), memory(64, False)
    with pytest.raises(MemoryError, match="2 segments of shared memory are all"):
        memory(64, False)
    memory.take_fresh()
    del first
    assert memory(64, False)[1] is not second[1]
