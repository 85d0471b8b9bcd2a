"""Snapshots of models with frozen parameters and static buffers, which are stored once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from tolaria.errors import ImageDamagedError
from tolaria.images import Lease, StateImage
from tolaria.state.arenas import Arena
from tolaria.state.restore import stage_restore
from tolaria.state.snapshots import Declined, SnapshotRing
from tolaria.state.training_state import TrainingState
from tolaria.values.training import Position

BACKBONE, TABLE = 100_000, 50_000
FROZEN_BYTES = 4 * (BACKBONE + TABLE)
ROOM_BYTES = 2**16
"""Room for a few snapshots of the head, at most 5 KB each."""


@dataclass
class Live:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    position: Position


class FineTuning:
    """A trained head on a frozen backbone, with a large static buffer."""

    def __init__(self, bytes_max: int = FROZEN_BYTES + ROOM_BYTES, entries_max: int = 5) -> None:
        self.model = nn.Module()
        self.head = nn.Parameter(torch.zeros(100))
        self.backbone = nn.Parameter(torch.randn(100, BACKBONE // 100).t(), requires_grad=False)
        self.model.register_parameter("head", self.head)
        self.model.register_parameter("backbone", self.backbone)
        self.model.register_buffer("table", torch.randn(TABLE))
        self.live = Live(self.model, torch.optim.Adam(self.model.parameters(), lr=0.1), Position(0, 1))
        self.state = TrainingState(self.live, {})
        self.ring = SnapshotRing(bytes_max=bytes_max, entries_max=entries_max, seal=True)
        self.digests: dict[int, str] = {}

    @property
    def table(self) -> Tensor:
        """The buffer that the model has now."""
        return self.model.get_buffer("table")

    def train(self) -> None:
        """One step, which changes what requires a gradient."""
        for parameter in self.model.parameters():
            parameter.grad = torch.rand_like(parameter) if parameter.requires_grad else None
        self.live.optimizer.step()
        self.live.position = Position(self.live.position.global_step + 1, 1)

    def snapshot(self) -> Position | Declined:
        """Takes a snapshot and records the digest of the live state."""
        taken = self.ring.capture(self.state)
        if isinstance(taken, Position):
            self.digests[taken.global_step] = self.state.fingerprint().total
        return taken

    def steps(self) -> list[int]:
        """Steps of the restorable snapshots."""
        return [info.position.global_step for info in self.ring.snapshots()]

    def restore(self, step: int) -> None:
        """Restores the snapshot of this step, whose digests are computed again, and compares every bit."""
        lease = self.ring.hold(step)
        assert lease is not None
        with lease as image:
            stage_restore(self.state, image, verify=True).commit()
        assert self.live.position.global_step == step
        assert self.state.fingerprint().total == self.digests[step]

    def addresses(self, name: str) -> list[int]:
        """Where the restorable snapshots have a tensor."""
        return [address(self.image(step), name) for step in self.steps()]

    def image(self, step: int) -> StateImage:
        """The image of a step, which the caller reads at once."""
        lease = self.ring.hold(step)
        assert lease is not None
        with lease as image:
            return image


def address(image: StateImage, name: str) -> int:
    """The address of a tensor in an image."""
    return torch.frombuffer(image.buffers[name], dtype=torch.uint8).data_ptr()


def test_several_snapshots_of_a_frozen_backbone_fit_where_one_would() -> None:
    """What is frozen counts once, also as the ring reports it; every snapshot is restored bit for bit."""
    run = FineTuning()
    for _ in range(20):
        run.train()
        assert run.snapshot() == run.live.position
        assert run.ring.statistics().size_bytes <= FROZEN_BYTES + ROOM_BYTES
    assert (len(run.steps()), run.steps()[-1], run.ring.statistics().declined) == (5, 20, 0)
    assert run.steps()[0] <= 20 - 2**3  # spread as if the frozen part were not there
    assert run.ring.snapshots()[0].size_bytes > FROZEN_BYTES
    for step in run.steps()[::-1]:
        run.restore(step)


def test_unchanged_tensors_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later snapshots copy the head and the other small tensors only."""
    run, copied, fill = FineTuning(), list[str](), Arena.fill

    def recorded(arena: Arena, tensors: Mapping[str, Tensor], *rest: Any) -> None:
        copied.extend(spec.name for spec in arena.specs)
        fill(arena, tensors, *rest)

    monkeypatch.setattr(Arena, "fill", recorded)
    for _ in range(7):
        run.train()
        run.snapshot()
    counts = [copied.count(name) for name in ("parameter/backbone", "buffer/table", "parameter/head")]
    assert counts == [1, 1, 7]


def test_unchanged_tensors_are_stored_once_and_the_rest_in_memory_that_is_used_again() -> None:
    """A full ring allocates nothing, whatever is evicted."""
    run = FineTuning(entries_max=3)
    seen: dict[str, set[int]] = {name: set() for name in ("parameter/backbone", "buffer/table", "parameter/head")}
    for _ in range(12):
        run.train()
        run.snapshot()
        for name, found in seen.items():
            found.update(run.addresses(name))
    assert [len(found) for found in seen.values()] == [1, 1, 3]


def test_a_large_buffer_that_changes_uses_the_memory_of_evicted_snapshots() -> None:
    """As many copies of it as snapshots, and no more."""
    run = FineTuning(bytes_max=2**24, entries_max=3)
    found = set()
    for _ in range(12):
        run.train()
        run.table.add_(1.0)
        run.snapshot()
        found.update(run.addresses("buffer/table"))
    assert (len(found), len(set(run.addresses("parameter/backbone")))) == (3, 1)
    for step in run.steps():
        run.restore(step)


def through_data(tensor: Tensor) -> None:
    """A write that leaves the version counter as it is."""
    tensor.data[-1] += 1.0


def through_numpy(tensor: Tensor) -> None:
    """A write that torch does not see."""
    tensor.detach().numpy()[-1] += 1.0


def through_foreach(tensor: Tensor) -> None:
    """A grouped write to the data."""
    torch._foreach_mul_([tensor.data], -1.0)


def sign_of_zero(tensor: Tensor) -> None:
    """A change that no comparison of numbers finds, since the element is zero."""
    tensor.data[-1] = -0.0


def not_a_number(tensor: Tensor) -> None:
    """NaN, which differs from itself as a number."""
    tensor.data[-1] = float("nan")


@pytest.mark.parametrize("write", [through_data, through_numpy, through_foreach, sign_of_zero, not_a_number])
@pytest.mark.parametrize("name", ["parameter/backbone", "buffer/table"])
def test_a_write_to_frozen_tensors_is_found(write: Callable[[Tensor], None], name: str) -> None:
    """Snapshots before and after it are restored bit for bit, in any order and after evictions."""
    run = FineTuning(bytes_max=2**24, entries_max=4)
    tensor = run.backbone if name == "parameter/backbone" else run.table
    tensor.data[-1] = 0.0
    for step in range(1, 13):
        run.train()
        if step == 10:
            write(tensor)
        run.snapshot()
        for kept in run.steps():
            run.restore(kept)
    assert (min(run.steps()) < 10, len(set(run.addresses(name)))) == (True, 2)


def test_an_evicted_snapshot_frees_what_only_it_has() -> None:
    """A changed backbone takes its memory twice while both are kept, and once when the older one is evicted."""
    run = FineTuning(bytes_max=2 * FROZEN_BYTES + ROOM_BYTES, entries_max=2)
    sizes = []
    for step in range(1, 5):
        run.train()
        if step == 2:
            through_data(run.backbone)
        run.snapshot()
        sizes.append(run.ring.statistics().size_bytes // (4 * BACKBONE))
    assert sizes == [1, 2, 1, 1]


def test_replaced_snapshots_leak_no_memory() -> None:
    """Many snapshots of one step, with a changed backbone every time, take the memory of one or two."""
    run = FineTuning(bytes_max=2 * FROZEN_BYTES + ROOM_BYTES)
    for _ in range(200):
        through_data(run.backbone)
        run.snapshot()
    assert run.ring.statistics().size_bytes < 2 * FROZEN_BYTES
    run.restore(0)


def test_a_leased_snapshot_keeps_its_own_copy() -> None:
    """A reader's image stays as it is while the ring goes on, and its memory counts until the release."""
    run = FineTuning(bytes_max=2 * FROZEN_BYTES + ROOM_BYTES, entries_max=2)
    run.train()
    run.snapshot()
    lease = run.ring.hold(1)
    assert lease is not None
    for _ in range(4):
        run.train()
        through_data(run.backbone)
        run.snapshot()
    lease.image.verify()
    assert lease.image.seal().total == run.digests[1]
    assert run.ring.statistics().size_bytes > 2 * 4 * BACKBONE
    run.restore(5)
    lease.release()


def test_what_a_snapshot_would_share_counts_although_its_owner_is_evicted() -> None:
    """A leased image leaves room for one more; when the state has grown, eviction makes no room for it."""
    run = FineTuning(bytes_max=4 * BACKBONE + FROZEN_BYTES + ROOM_BYTES)
    run.train()
    run.snapshot()
    lease = run.ring.hold(1)
    assert lease is not None
    through_data(run.backbone)
    run.train()
    run.snapshot()
    for name in ("more", "even_more"):
        run.model.register_buffer(name, torch.zeros(60_000, dtype=torch.uint8))
    found = run.snapshot()
    assert isinstance(found, Declined)
    assert (found.too_large, run.steps()) == (False, [1, 2])
    lease.release()
    assert run.snapshot() == run.live.position
    run.restore(2)


def test_a_damaged_copy_is_not_referenced_any_more() -> None:
    """The next snapshot has a good copy; the damaged ones are refused as before."""
    run = FineTuning(bytes_max=2**24)
    for _ in range(2):
        run.train()
        run.snapshot()
    run.image(1).buffers["buffer/table"][100] ^= 1
    run.train()
    run.snapshot()
    for step in (1, 2):
        with pytest.raises(ImageDamagedError, match="buffer/table"):
            run.restore(step)
    run.restore(3)


def test_parameters_are_frozen_and_unfrozen_between_snapshots() -> None:
    """From then on they are copied, or stored once again, with their optimizer state; each kept point is restored."""
    run = FineTuning(bytes_max=2**24, entries_max=8)
    for step in range(1, 17):
        run.backbone.requires_grad_(5 <= step < 9)
        run.train()
        run.snapshot()
        before = run.live.position.global_step
        for kept in run.steps():
            run.restore(kept)
        run.restore(before)
    newest = run.steps()[-2:]
    for name in ("parameter/backbone", "state/backbone/exp_avg"):
        assert len({address(run.image(step), name) for step in newest}) == 1


def test_after_a_rollback_the_copy_of_the_restored_snapshot_is_referenced() -> None:
    """The changed copy of the snapshots that the rollback dropped is freed first."""
    run = FineTuning(bytes_max=2**24, entries_max=3)
    for step in range(1, 4):
        if step == 2:
            through_data(run.backbone)
        run.train()
        run.snapshot()
    run.restore(1)
    run.ring.forget_after(1)
    for _ in range(2):
        run.train()
        run.snapshot()
    assert run.steps() == [1, 2, 3]
    assert len(set(run.addresses("parameter/backbone"))) == 1
    assert run.ring.statistics().size_bytes < FROZEN_BYTES + ROOM_BYTES


def test_a_frozen_part_beyond_the_limit_is_declined() -> None:
    """One snapshot has to fit as a whole; the ring is empty and holds no memory afterwards."""
    run = FineTuning(bytes_max=FROZEN_BYTES + ROOM_BYTES)
    run.train()
    run.snapshot()
    run.model.register_buffer("more", torch.zeros(ROOM_BYTES))
    found = run.snapshot()
    assert isinstance(found, Declined)
    assert (found.too_large, run.steps(), run.ring.statistics().size_bytes) == (True, [], 0)


class AnySequence(RuleBasedStateMachine):
    """Changes, snapshots, evictions, leases and restores in any order."""

    @initialize(entries_max=st.integers(1, 4), copies=st.integers(0, 3))
    def begin(self, entries_max: int, copies: int) -> None:
        """Limits by bytes or by entries; the optimizer state of an unfrozen backbone may not fit at all."""
        self.bytes_max = (1 + copies) * FROZEN_BYTES + ROOM_BYTES
        self.run = FineTuning(bytes_max=self.bytes_max, entries_max=entries_max)
        self.leases: list[tuple[Lease, str]] = []

    @rule()
    def train(self) -> None:
        """One step."""
        self.run.train()

    @rule()
    def snapshot(self) -> None:
        """A snapshot, perhaps of a step that has one."""
        self.run.snapshot()

    @rule(write=st.sampled_from([through_data, through_numpy, sign_of_zero]), table=st.booleans())
    def change(self, write: Callable[[Tensor], None], table: bool) -> None:
        """A write to one of the two large tensors."""
        write(self.run.table if table else self.run.backbone)

    @rule(factor=st.integers(0, 1))
    def assign(self, factor: int) -> None:
        """A new tensor as the buffer."""
        self.run.model.table = self.run.table.clone() * factor

    @rule(trained=st.booleans())
    def unfreeze(self, trained: bool) -> None:
        """The backbone joins or leaves the training."""
        self.run.backbone.requires_grad_(trained)

    @precondition(lambda self: self.run.steps())
    @rule(index=st.integers(0, 9), forget=st.booleans())
    def restore(self, index: int, forget: bool) -> None:
        """A kept snapshot is restored; a rollback forgets the later ones."""
        steps = self.run.steps()
        step = steps[index % len(steps)]
        self.run.restore(step)
        if forget:
            self.run.ring.forget_after(step)

    @precondition(lambda self: self.run.steps())
    @rule(index=st.integers(0, 9))
    def lease(self, index: int) -> None:
        """A reader takes a snapshot."""
        steps = self.run.steps()
        step = steps[index % len(steps)]
        lease = self.run.ring.hold(step)
        assert lease is not None
        self.leases.append((lease, self.run.digests[step]))

    @precondition(lambda self: self.leases)
    @rule()
    def release(self) -> None:
        """The reader that has waited for the longest time is done."""
        self.leases.pop(0)[0].release()

    @rule()
    def clear(self) -> None:
        """Everything is dropped but what is leased."""
        self.run.ring.clear()

    @invariant()
    def kept_images_have_their_bits(self) -> None:
        """Those in the ring and those of readers."""
        for step in self.run.steps():
            assert self.run.image(step).verify().total == self.run.digests[step]
        for lease, digest in self.leases:
            assert lease.image.verify().total == digest

    @invariant()
    def memory_is_bounded(self) -> None:
        """The ring counts at least what its images use, and at most its limit; empty, it counts nothing."""
        images = [self.run.image(step) for step in self.run.steps()] + [lease.image for lease, _ in self.leases]
        used = {address(image, name): part.nbytes for image in images for name, part in image.buffers.items()}
        statistics = self.run.ring.statistics()
        assert sum(used.values()) <= statistics.size_bytes <= self.bytes_max
        assert statistics.entries == len(self.run.steps())

    def teardown(self) -> None:
        """Without readers, nothing is left after a clear."""
        for lease, _ in self.leases:
            lease.release()
        self.run.ring.clear()
        assert self.run.ring.statistics().size_bytes == 0


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(max_examples=50, stateful_step_count=40)
