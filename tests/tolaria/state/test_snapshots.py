from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from faults.small_training import new_ring
from tolaria.images import Lease, StateImage
from tolaria.state.encoding import tensor_view
from tolaria.state.restore import stage_restore
from tolaria.state.snapshots import Cadence, Declined, SnapshotRing
from tolaria.state.training_state import TrainingState
from tolaria.values.training import Position


@dataclass
class Live:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    position: Position


class Run:
    """A model with one parameter that holds the step, so that a snapshot can be identified."""

    def __init__(self, size: int = 1000) -> None:
        model = nn.Module()
        model.register_parameter("weight", nn.Parameter(torch.zeros(size)))
        self.live = Live(model, torch.optim.SGD(model.parameters(), lr=0.1), Position(0, 1))
        self.state = TrainingState(self.live, {})

    def at(self, step: int) -> TrainingState:
        self.live.position = Position(step, 1)
        with torch.no_grad():
            next(self.live.model.parameters()).fill_(float(step))
        return self.state

    def size_bytes(self) -> int:
        ring = new_ring()
        ring.capture(self.at(0))
        return ring.snapshots()[0].size_bytes


def steps(ring: SnapshotRing) -> list[int]:
    """Steps of the restorable snapshots."""
    return [info.position.global_step for info in ring.snapshots()]


def weight(image: StateImage) -> float:
    """The value of all elements of the image's parameter."""
    (spec,) = (spec for spec in image.specs if spec.name == "parameter/weight")
    return float(tensor_view(spec, image.buffers[spec.name]).mean())


def taken(lease: Lease | None) -> Lease:
    """The lease, which must exist."""
    assert lease is not None
    return lease


def memory_of(ring: SnapshotRing, step: int) -> int:
    """The address of the memory that holds the snapshot of this step."""
    with taken(ring.hold(step)) as image:
        (spec,) = (spec for spec in image.specs if spec.name == "parameter/weight")
        return tensor_view(spec, image.buffers[spec.name]).data_ptr()


def content(lease: Lease | None) -> float:
    """The step in the leased image."""
    with taken(lease) as image:
        return weight(image)


@pytest.mark.parametrize(
    ("entries", "room", "captures", "kept"),
    [
        (5, 100, [1, 2, 3], [1, 2, 3]),
        (5, 100, [1, 2, 3, 4, 5, 6, 7], [3, 4, 5, 6, 7]),
        (5, 3, [1, 2, 3, 4], [2, 3, 4]),
        (5, 1, [1, 2], [2]),
        (1, 100, [1, 2, 3], [3]),
        (5, 100, [1, 1, 1, 1, 1, 1, 1], [1]),
        (3, 3, [1, 2, 3, 2, 2, 3, 1], [1, 2, 3]),
    ],
    ids=["room", "entries", "bytes", "one by bytes", "one by entries", "same step", "replacing"],
)
def test_quota_and_eviction(entries: int, room: int, captures: list[int], kept: list[int]) -> None:
    """The least recently used snapshots are evicted, and memory stays within both limits."""
    run = Run()
    bytes_max = room * (run.size_bytes() + 32)  # 32: a step with more digits
    ring = SnapshotRing(bytes_max=bytes_max, entries_max=entries, seal=False)
    for step in captures:
        assert ring.capture(run.at(step)) == Position(step, 1)
        assert ring.statistics().size_bytes <= bytes_max
        assert ring.statistics().entries <= entries
    assert steps(ring) == kept


def test_replacing_a_snapshot_frees_its_memory() -> None:
    """A thousand snapshots of one step use the memory of one, and the newest content is found."""
    run = Run()
    ring = SnapshotRing(bytes_max=2 * run.size_bytes() + 64, entries_max=5, seal=False)
    for _ in range(1000):
        ring.capture(run.at(7))
    run.at(8)
    run.live.position = Position(7, 1)
    ring.capture(run.state)
    assert ring.statistics().size_bytes < 2 * run.size_bytes()
    assert content(ring.lookup()) == 8.0


def test_a_full_ring_allocates_no_memory() -> None:
    """Each snapshot uses the memory of the one that it evicts."""
    run = Run()
    ring = new_ring(entries_max=3)
    addresses = set()
    for step in range(10):
        assert ring.capture(run.at(step)) == Position(step, 1)
        assert (len(steps(ring)), steps(ring)[-1]) == (min(step + 1, 3), step)
        addresses.add(memory_of(ring, step))
    assert (len(addresses), ring.statistics().evictions) == (3, 7)


@pytest.mark.parametrize("entries", [1, 2, 3, 5, 8])
def test_the_ring_reaches_back_by_powers_of_two(entries: int) -> None:
    """However long the run, the newest is there, and one that is half of 2^(n-1) captures old or older."""
    run = Run(10)
    ring = new_ring(entries_max=entries)
    for step in range(1, 300):
        ring.capture(run.at(step))
        ages = [step - kept for kept in steps(ring)]
        assert ages[-1] == 0
        if step >= 2**entries:
            assert 2 ** (entries - 2) <= max(ages) + (entries == 1) < 2 ** (entries - 1) + (entries == 1)
            distances = [older - newer for older, newer in itertools.pairwise(ages)]
            assert max(distances, default=0) <= 2 ** max(0, entries - 2)


def test_of_equally_useful_snapshots_the_least_recently_used_is_evicted() -> None:
    """A lookup marks a snapshot as recently used; one that no newer snapshot replaces stays anyway."""
    run = Run()
    ring = new_ring(entries_max=6)
    for step in (1, 2, 3, 4, 5, 6):
        ring.capture(run.at(step))
    assert content(ring.lookup(1)) == 1.0
    ring.capture(run.at(7))  # 1, 3 and 5 are as useful as 7, and 2 as 6
    assert steps(ring) == [1, 3, 4, 5, 6, 7]
    ring.capture(run.at(8))
    assert steps(ring) == [1, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(("wanted", "found"), [(None, 30), (30, 30), (29, 20), (10, 10), (1000, 30)])
def test_the_newest_at_or_before_a_step_is_found(wanted: int | None, found: int) -> None:
    """Never a later step than requested; without a request the newest."""
    run = Run()
    ring = new_ring()
    for step in (20, 10, 30):
        ring.capture(run.at(step))
    assert content(ring.lookup(wanted)) == found


def test_hits_and_misses_are_counted() -> None:
    """A lookup counts a hit or a miss; `hold` counts neither."""
    run = Run()
    ring = new_ring()
    assert ring.lookup() is None
    ring.capture(run.at(5))
    assert ring.lookup(4) is None
    taken(ring.lookup(5)).release()
    taken(ring.hold(5)).release()
    assert ring.hold(6) is None
    statistics = ring.statistics()
    assert (statistics.hits, statistics.misses, statistics.snapshots) == (1, 2, 1)


def test_a_state_too_large_is_declined_and_leaves_nothing_stale() -> None:
    """The result has the reason and the size, and the ring is empty; a state that fits is captured again."""
    run, giant = Run(), Run(100_000)
    ring = SnapshotRing(bytes_max=2 * run.size_bytes(), entries_max=5, seal=False)
    ring.capture(run.at(1))
    found = ring.capture(giant.at(2))
    assert isinstance(found, Declined)
    assert (found.too_large, found.size_bytes > 400_000) == (True, True)
    assert (steps(ring), ring.statistics().declined, ring.statistics().size_bytes) == ([], 1, 0)
    assert ring.capture(run.at(3)) == Position(3, 1)


def test_a_leased_image_is_never_overwritten() -> None:
    """With all images leased a snapshot is declined; after a release it is taken."""
    run = Run()
    ring = new_ring(entries_max=2)
    ring.capture(run.at(1))
    ring.capture(run.at(2))
    first, second = taken(ring.hold(1)), taken(ring.hold(2))
    found = ring.capture(run.at(3))
    assert isinstance(found, Declined)
    assert not found.too_large
    second.release()
    second.release()
    assert ring.capture(run.at(3)) == Position(3, 1)
    assert ring.capture(run.at(4)) == Position(4, 1)
    assert weight(first.image) == 1.0
    assert steps(ring) == [1, 4]


def test_a_leased_step_can_be_captured_again() -> None:
    """The lease holder keeps the old image, a lookup finds the new one, and the old memory is reused after release."""
    run = Run()
    ring = new_ring(entries_max=2)
    ring.capture(run.at(1))
    old, old_memory = taken(ring.hold(1)), memory_of(ring, 1)
    run.at(9)
    run.live.position = Position(1, 1)
    ring.capture(run.state)
    assert (content(ring.lookup(1)), weight(old.image)) == (9.0, 1.0)
    assert steps(ring) == [1]
    old.release()
    ring.capture(run.at(2))
    assert memory_of(ring, 2) == old_memory
    assert steps(ring) == [1, 2]


def test_later_snapshots_are_dropped_after_a_rollback() -> None:
    """Snapshots after the restored step are not found any more, and their memory is reused first."""
    run = Run()
    ring = new_ring(entries_max=3)
    for step in (1, 2, 3):
        ring.capture(run.at(step))
    dropped = {memory_of(ring, 2), memory_of(ring, 3)}
    ring.forget_after(1)
    assert (steps(ring), content(ring.lookup(3))) == ([1], 1.0)
    for step in (2, 3):
        ring.capture(run.at(step))
    assert {memory_of(ring, 2), memory_of(ring, 3)} == dropped
    assert steps(ring) == [1, 2, 3]


def test_a_changed_layout_gets_new_memory() -> None:
    """Optimizer state created by the first step changes the layout; the ring allocates within its limits."""
    run = Run()
    ring = new_ring(entries_max=1, seal=True)
    ring.capture(run.at(1))
    run.live.optimizer = torch.optim.Adam(run.live.model.parameters())
    next(run.live.model.parameters()).sum().backward()  # type: ignore[no-untyped-call]
    run.live.optimizer.step()
    assert ring.capture(run.state) == Position(1, 1)
    assert "state/weight/exp_avg" in taken(ring.lookup()).image.buffers


def test_a_sealed_snapshot_proves_its_restore() -> None:
    """The digest recorded at capture equals that of the live state after the restore."""
    run = Run()
    ring = new_ring(seal=True)
    expected = run.at(5).fingerprint().total
    ring.capture(run.state)
    run.at(6)
    assert ring.snapshots()[0].digest == expected
    with taken(ring.lookup()) as image:
        stage_restore(run.state, image, verify=True).commit()
    assert run.state.fingerprint().total == expected


def test_leases_may_be_released_by_other_threads() -> None:
    """Captures continue while another thread reads and releases; content and limits stay correct."""
    run = Run()
    ring = new_ring(entries_max=3)
    wrong: list[int] = []
    ready: list[tuple[int, Lease]] = []
    more = threading.Condition()

    def reader() -> None:
        for _ in range(200):
            with more:
                more.wait_for(lambda: ready)
                step, lease = ready.pop()
            with lease as image:
                if weight(image) != step:
                    wrong.append(step)

    thread = threading.Thread(target=reader)
    thread.start()
    for step in range(200):
        ring.capture(run.at(step))
        lease = ring.lookup()
        with more:
            ready.append((int(taken(lease).image.position.global_step), taken(lease)))
            more.notify()
    thread.join()
    assert wrong == []
    assert ring.statistics().entries <= 3


@pytest.mark.parametrize(
    ("snapshot_s", "step_s", "overhead_max", "steps"),
    [
        (0.001, 0.1, 0.01, 1),
        (0.001, 0.01, 0.01, 10),
        (0.1, 0.001, 0.01, 10_000),
        (0.0, 0.1, 0.01, 1),
        (1.0, 2.0, 1.0, 1),
    ],
)
def test_the_interval_follows_from_the_costs(snapshot_s: float, step_s: float, overhead_max: float, steps: int) -> None:
    """Expensive snapshots of fast steps are rare, cheap ones are taken at every step."""
    assert steps_until_due(Cadence(overhead_max).after_snapshot(snapshot_s), step_s) == steps


@given(st.floats(1e-4, 0.1), st.floats(2e-3, 10), st.floats(1e-2, 1))
def test_snapshots_are_as_frequent_as_the_limit_allows(snapshot_s: float, step_s: float, limit: float) -> None:
    """The interval keeps the limit, and one step less would not."""
    steps = steps_until_due(Cadence(limit).after_snapshot(snapshot_s), step_s)
    assert snapshot_s <= limit * steps * step_s * (1 + 1e-6)
    assert steps == 1 or snapshot_s > limit * (steps - 1) * step_s * (1 - 1e-6)


def test_a_run_spends_its_share_on_snapshots() -> None:
    """Over a thousand steps of 10 ms with snapshots of 2 ms, snapshots cost at most 1 % and nearly that."""
    assert 0.009 <= share_of_snapshots(1000, lambda: 0.010, lambda: 0.002) <= 0.0102


def test_irregular_steps_do_not_raise_the_share() -> None:
    """One step in twenty takes fifty times as long, as on a busy machine; the share is kept."""
    generator = random.Random(0)
    share = share_of_snapshots(
        20_000,
        lambda: 0.1 if generator.random() < 0.05 else 0.002,
        lambda: 0.020 if generator.random() < 0.05 else 0.002,
    )
    assert 0.0085 <= share <= 0.0105


@pytest.mark.parametrize("overhead_max", [0.0, -0.01])
def test_a_limit_must_be_positive(overhead_max: float) -> None:
    """A limit of zero would allow no interval."""
    with pytest.raises(ValueError, match="positive"):
        Cadence(overhead_max)


def steps_until_due(cadence: Cadence, step_s: float) -> int:
    """Number of steps of this length after which a snapshot is due."""
    while not (cadence := cadence.after_step(step_s)).due:
        pass
    return cadence.steps_since


def share_of_snapshots(steps: int, step_s: Callable[[], float], snapshot_s: Callable[[], float]) -> float:
    """Time of snapshots divided by the time of steps, with snapshots taken when due."""
    cadence, spent_s, stepped_s = Cadence(0.01), 0.0, 0.0
    for _ in range(steps):
        if cadence.due:
            cost_s = snapshot_s()
            spent_s += cost_s
            cadence = cadence.after_snapshot(cost_s)
        taken_s = step_s()
        stepped_s += taken_s
        cadence = cadence.after_step(taken_s)
    return spent_s / stepped_s
