from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tolaria.rollback import (
    Captured,
    Declined,
    DeclineReason,
    FastRollbackCache,
    Lease,
    Position,
    TrainingState,
    stage_restore,
)


@dataclass
class Live:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    position: Position


class Run:
    """A model of one parameter that holds the step, so that a snapshot tells which one it is."""

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
        found = FastRollbackCache(seal=False).capture(self.at(0))
        assert isinstance(found, Captured)
        return found.size_bytes


def steps(cache: FastRollbackCache) -> list[int]:
    """Steps that could be restored."""
    return [info.position.global_step for info in cache.snapshots()]


def taken(lease: Lease | None) -> Lease:
    """The lease, which must be there."""
    assert lease is not None
    return lease


def content(lease: Lease | None) -> float:
    """What the leased image holds."""
    with taken(lease) as image:
        return float(image.tensors["parameter/weight"][0])


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
    """The least recently used go first, by entries or by bytes, and no more memory is held than allowed."""
    run = Run()
    bytes_max = room * (run.size_bytes() + 32)  # 32: a step of more digits
    cache = FastRollbackCache(bytes_max=bytes_max, entries_max=entries, seal=False)
    for step in captures:
        assert isinstance(cache.capture(run.at(step)), Captured)
        assert cache.statistics().size_bytes <= bytes_max
        assert cache.statistics().entries <= entries
    assert steps(cache) == kept


def test_replacing_a_step_never_leaks_quota() -> None:
    """A thousand snapshots of one step hold the memory of one, and the newest content is what is found."""
    run = Run()
    cache = FastRollbackCache(bytes_max=2 * run.size_bytes() + 64, seal=False)
    for _ in range(1000):
        cache.capture(run.at(7))
    run.at(8)
    run.live.position = Position(7, 1)
    cache.capture(run.state)
    assert cache.statistics().size_bytes < 2 * run.size_bytes()
    assert content(cache.lookup()) == 8.0


def test_no_memory_is_asked_for_in_the_steady_state() -> None:
    """Once the ring is full, each snapshot takes the memory of the one that it evicts."""
    run = Run()
    cache = FastRollbackCache(entries_max=3, seal=False)
    found = [cache.capture(run.at(step)) for step in range(10)]
    assert [f.allocated for f in found if isinstance(f, Captured)] == [True] * 3 + [False] * 7
    assert [f.evicted for f in found if isinstance(f, Captured)][3:] == [(step,) for step in range(7)]


def test_a_used_snapshot_is_evicted_last() -> None:
    """A lookup makes a snapshot recent; the next one out is another."""
    run = Run()
    cache = FastRollbackCache(entries_max=3, seal=False)
    for step in (1, 2, 3):
        cache.capture(run.at(step))
    assert content(cache.lookup(1)) == 1.0
    cache.capture(run.at(4))
    assert steps(cache) == [1, 3, 4]


@pytest.mark.parametrize(("wanted", "found"), [(None, 30), (30, 30), (29, 20), (10, 10), (1000, 30)])
def test_the_nearest_at_or_before_is_found(wanted: int | None, found: int) -> None:
    """Never a later step than asked for; without a wish the newest."""
    run = Run()
    cache = FastRollbackCache(seal=False)
    for step in (20, 10, 30):
        cache.capture(run.at(step))
    assert content(cache.lookup(wanted)) == found


def test_hits_and_misses_are_counted() -> None:
    """A lookup that finds something is a hit, one that does not a miss; holding is neither."""
    run = Run()
    cache = FastRollbackCache(seal=False)
    assert cache.lookup() is None
    cache.capture(run.at(5))
    assert cache.lookup(4) is None
    taken(cache.lookup(5)).release()
    taken(cache.hold(5)).release()
    assert cache.hold(6) is None
    statistics = cache.statistics()
    assert (statistics.hits, statistics.misses, statistics.snapshots) == (1, 2, 1)


def test_a_state_too_large_is_declined_and_changes_nothing() -> None:
    """Declining names the reason and the size, and what was there stays."""
    run, giant = Run(), Run(100_000)
    cache = FastRollbackCache(bytes_max=2 * run.size_bytes(), seal=False)
    cache.capture(run.at(1))
    found = cache.capture(giant.at(2))
    assert isinstance(found, Declined)
    assert (found.reason, found.needed_bytes > 400_000) == (DeclineReason.TOO_LARGE, True)
    assert (steps(cache), cache.statistics().declined) == ([1], 1)


def test_a_leased_image_is_never_overwritten() -> None:
    """Whoever reads keeps what is read; with everything leased a snapshot is declined, afterwards taken."""
    run = Run()
    cache = FastRollbackCache(entries_max=2, seal=False)
    cache.capture(run.at(1))
    cache.capture(run.at(2))
    first, second = taken(cache.hold(1)), taken(cache.hold(2))
    found = cache.capture(run.at(3))
    assert isinstance(found, Declined)
    assert found.reason is DeclineReason.ALL_LEASED
    second.release()
    second.release()
    assert isinstance(cache.capture(run.at(3)), Captured)
    assert isinstance(cache.capture(run.at(4)), Captured)
    assert float(first.image.tensors["parameter/weight"][0]) == 1.0
    assert steps(cache) == [1, 4]


def test_a_leased_step_can_be_captured_again() -> None:
    """The reader keeps the old image, a lookup finds the new one, and the old memory is used again after release."""
    run = Run()
    cache = FastRollbackCache(entries_max=2, seal=False)
    cache.capture(run.at(1))
    old = taken(cache.hold(1))
    run.at(9)
    run.live.position = Position(1, 1)
    cache.capture(run.state)
    assert (content(cache.lookup(1)), float(old.image.tensors["parameter/weight"][0])) == (9.0, 1.0)
    assert steps(cache) == [1]
    old.release()
    found = cache.capture(run.at(2))
    assert isinstance(found, Captured)
    assert not found.allocated
    assert steps(cache) == [1, 2]


def test_later_snapshots_are_forgotten_after_a_rollback() -> None:
    """What came after the restored step is not restored any more, and its memory is used first."""
    run = Run()
    cache = FastRollbackCache(entries_max=3, seal=False)
    for step in (1, 2, 3):
        cache.capture(run.at(step))
    assert cache.forget_after(1) == 2
    assert (steps(cache), content(cache.lookup(3))) == ([1], 1.0)
    found = [cache.capture(run.at(step)) for step in (2, 3)]
    assert [f.allocated for f in found if isinstance(f, Captured)] == [False, False]
    assert steps(cache) == [1, 2, 3]


def test_a_changed_layout_gets_new_memory() -> None:
    """Optimizer state that appears after the first step makes another layout; the ring adapts within its quota."""
    run = Run()
    cache = FastRollbackCache(entries_max=1, seal=True)
    cache.capture(run.at(1))
    run.live.optimizer = torch.optim.Adam(run.live.model.parameters())
    next(run.live.model.parameters()).sum().backward()  # type: ignore[no-untyped-call]
    run.live.optimizer.step()
    found = cache.capture(run.state)
    assert isinstance(found, Captured)
    assert found.allocated
    assert "state/weight/exp_avg" in taken(cache.lookup()).image.tensors


def test_a_sealed_ring_proves_its_restore() -> None:
    """The digest recorded at the capture is the digest of the live state after the restore."""
    run = Run()
    cache = FastRollbackCache(seal=True)
    expected = run.at(5).fingerprint().total
    cache.capture(run.state)
    run.at(6)
    assert cache.snapshots()[0].digest == expected
    with taken(cache.lookup()) as image:
        stage_restore(run.state, image, verify=True).commit()
    assert run.state.fingerprint().total == expected


def test_leases_may_be_released_by_other_threads() -> None:
    """Captures go on while another thread seals and releases; memory stays within the quota and content right."""
    run = Run()
    cache = FastRollbackCache(entries_max=3, seal=False)
    wrong: list[int] = []
    ready: list[tuple[int, Lease]] = []
    more = threading.Condition()

    def reader() -> None:
        for _ in range(200):
            with more:
                more.wait_for(lambda: ready)
                step, lease = ready.pop()
            with lease as image:
                if float(image.tensors["parameter/weight"].mean()) != step:
                    wrong.append(step)

    thread = threading.Thread(target=reader)
    thread.start()
    for step in range(200):
        cache.capture(run.at(step))
        lease = cache.lookup()
        with more:
            ready.append((int(taken(lease).image.position.global_step), taken(lease)))
            more.notify()
    thread.join()
    assert wrong == []
    assert cache.statistics().entries <= 3
