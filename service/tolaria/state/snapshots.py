"""The snapshot ring: preallocated images in host memory, bounded by bytes and entries, and when to take snapshots.

Images are in host memory also when training is on a device, so that device memory stays free and hashing and writing
never wait for the device. With CUDA the memory is pinned.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Final

from tolaria.images.image import SnapshotInfo, SnapshotStatistics, StateImage
from tolaria.images.pool import Lease
from tolaria.images.specs import TensorSpec
from tolaria.state.encoding import Arena, arena_bytes, specs_of
from tolaria.state.training_state import TrainingState
from tolaria.values.training import Position

_NEWEST_WEIGHT: Final = 0.2
"""Weight of the newest cost in the moving average: follows a change within a dozen snapshots, and damps outliers."""

_ROUNDING: Final = 1e-9


class DeclineReason(Enum):
    """Why no snapshot was taken."""

    TOO_LARGE = "too_large"
    ALL_LEASED = "all_leased"


@dataclass(frozen=True, slots=True)
class Captured:
    """A snapshot was taken. `allocated`: new memory was allocated. `evicted`: the steps of evicted snapshots."""

    position: Position
    size_bytes: int
    allocated: bool
    evicted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Declined:
    """No snapshot was taken and the ring is unchanged. `needed_bytes` is the size of the state."""

    reason: DeclineReason
    needed_bytes: int


@dataclass(frozen=True, slots=True)
class Cadence:
    """Decides when a snapshot is due, so that snapshots cost at most `overhead_max` of the time of steps.

    Counts the time of the steps since the last snapshot rather than an average step: after one slow step an average
    would admit several snapshots too early.

    Args:
        overhead_max: share of step time that snapshots may cost.
        snapshot_s: moving average of a snapshot's cost in seconds; None before the first.
        steps_since: steps since the last snapshot.
        stepped_s: their time in seconds.

    Raises:
        ValueError: `overhead_max` is not positive.
    """

    overhead_max: float
    snapshot_s: float | None = None
    steps_since: int = 0
    stepped_s: float = 0.0

    def __post_init__(self) -> None:
        if self.overhead_max <= 0:
            raise ValueError(f"overhead_max must be positive, got {self.overhead_max}")

    @property
    def due(self) -> bool:
        """Whether a snapshot is due at this step boundary. The first one always is."""
        if self.snapshot_s is None:
            return True
        return self.steps_since > 0 and self.overhead_max * self.stepped_s >= self.snapshot_s * (1 - _ROUNDING)

    def after_step(self, step_s: float) -> Cadence:
        """Returns the cadence after a step that took `step_s`."""
        return Cadence(self.overhead_max, self.snapshot_s, self.steps_since + 1, self.stepped_s + step_s)

    def after_snapshot(self, snapshot_s: float) -> Cadence:
        """Returns the cadence after an attempt to take a snapshot that cost `snapshot_s`."""
        average = self.snapshot_s
        blended = snapshot_s if average is None else average + _NEWEST_WEIGHT * (snapshot_s - average)
        return Cadence(self.overhead_max, blended)


class SnapshotRing:
    """Snapshots in memory, evicted least recently used first.

    Captures and lookups are for the lane's thread; leases may be released and statistics read from any thread.

    Args:
        bytes_max: memory held at most, alignment included.
        entries_max: images held at most.
        seal: whether `capture` records the digest, in the caller's thread. Without it a restore seals the image, and
            its verification proves only that the copy was correct.
    """

    def __init__(self, *, bytes_max: int, entries_max: int, seal: bool) -> None:
        self._bytes_max = bytes_max
        self._entries_max = entries_max
        self._seal = seal
        self._lock = threading.Lock()
        self._slots: list[_Slot] = []  # least recently used first
        self._hits = self._misses = self._snapshots = self._declined = self._evictions = 0

    def capture(self, state: TrainingState) -> Captured | Declined:
        """Copies the live state into the ring, replacing a snapshot of the same step. Synchronises.

        Declines a state that does not fit; this is not an error, since checkpoints on disk remain.

        Raises:
            StateUnsupportedError: something in the state has no faithful form.
        """
        survey = state.survey()
        values = survey.json()
        specs = specs_of(survey.tensors)
        needed_bytes = arena_bytes(specs) + len(values)
        with self._lock:
            slot = self._place(specs, needed_bytes, survey.position.global_step)
        if isinstance(slot, DeclineReason):
            self._declined += 1
            return Declined(slot, needed_bytes)
        allocated = slot.arena is None
        if slot.arena is None:
            slot.arena = Arena(specs, pinned=any(tensor.is_cuda for tensor in survey.tensors.values()))
        image = slot.arena.fill(survey.position, survey.tensors, values)
        if self._seal:
            image.seal()
        with self._lock:
            evicted = self._list(slot, image, needed_bytes)
        return Captured(survey.position, needed_bytes, allocated, evicted)

    def lookup(self, at_or_before: int | None = None) -> Lease | None:
        """Leases the newest snapshot at or before a step (None: of all), and counts a hit or a miss."""
        with self._lock:
            listed = [s for s in self._slots if s.listed and (at_or_before is None or s.global_step <= at_or_before)]
            slot = max(listed, key=lambda slot: slot.global_step, default=None)
            if slot is None:
                self._misses += 1
                return None
            self._hits += 1
            self._slots.remove(slot)
            self._slots.append(slot)
            return self._lease(slot)

    def hold(self, global_step: int) -> Lease | None:
        """Leases the snapshot of exactly this step. Counts neither hit nor miss."""
        with self._lock:
            slot = next((s for s in self._slots if s.listed and s.global_step == global_step), None)
            return None if slot is None else self._lease(slot)

    def forget_after(self, global_step: int) -> int:
        """Drops the snapshots of later steps, which a rollback has invalidated, and returns their number."""
        with self._lock:
            later = [slot for slot in self._slots if slot.listed and slot.global_step > global_step]
            for slot in later:
                slot.listed = False
            return len(later)

    def snapshots(self) -> tuple[SnapshotInfo, ...]:
        """Returns the restorable snapshots, oldest step first."""
        with self._lock:
            images = [(slot.image, slot.size_bytes) for slot in self._slots if slot.listed and slot.image is not None]
        infos = [SnapshotInfo(i.position, size, i.sealed.total if i.sealed else None) for i, size in images]
        return tuple(sorted(infos, key=lambda info: info.position.global_step))

    def statistics(self) -> SnapshotStatistics:
        """Returns counters and sizes."""
        with self._lock:
            return SnapshotStatistics(
                entries=sum(slot.listed for slot in self._slots),
                size_bytes=sum(slot.size_bytes for slot in self._slots),
                bytes_max=self._bytes_max,
                hits=self._hits,
                misses=self._misses,
                snapshots=self._snapshots,
                declined=self._declined,
                evictions=self._evictions,
            )

    @property
    def leases(self) -> int:
        """Number of leases that have not been released."""
        with self._lock:
            return sum(slot.leases for slot in self._slots)

    def _place(self, specs: tuple[TensorSpec, ...], needed_bytes: int, global_step: int) -> _Slot | DeclineReason:
        """Makes room and returns a slot outside the ring, with memory of the same layout if a removed slot had it."""
        if needed_bytes > self._bytes_max:
            return DeclineReason.TOO_LARGE
        fresh = _Slot(specs)
        unneeded, others = self._expendable(global_step)
        if not unneeded and self._fits(needed_bytes, self._slots):
            return fresh
        kept = list(self._slots)
        for slot in [*unneeded, *others]:
            kept.remove(slot)
            fresh.take_over(slot)
            if self._fits(needed_bytes, kept):
                self._slots = kept
                return fresh
        return DeclineReason.ALL_LEASED

    def _expendable(self, global_step: int) -> tuple[list[_Slot], list[_Slot]]:
        """Returns the unleased slots that a new snapshot of this step replaces, and the others in eviction order."""
        free = [slot for slot in self._slots if slot.leases == 0]
        same_step = [slot for slot in free if slot.listed and slot.global_step == global_step]
        spare = [slot for slot in free if not slot.listed]
        others = [slot for slot in free if slot.listed and slot.global_step != global_step]
        return [*same_step, *spare], others

    def _fits(self, needed_bytes: int, slots: list[_Slot]) -> bool:
        held_bytes = sum(slot.size_bytes for slot in slots)
        return len(slots) < self._entries_max and held_bytes + needed_bytes <= self._bytes_max

    def _list(self, slot: _Slot, image: StateImage, size_bytes: int) -> tuple[int, ...]:
        slot.image, slot.size_bytes, slot.listed = image, size_bytes, True
        slot.global_step = image.position.global_step
        for other in self._slots:  # a leased snapshot of this step keeps its memory but is not restored any more
            other.listed = other.listed and other.global_step != slot.global_step
        self._slots.append(slot)
        evicted = tuple(step for step in slot.replaces if step != slot.global_step)
        slot.replaces.clear()
        self._snapshots += 1
        self._evictions += len(evicted)
        return evicted

    def _lease(self, slot: _Slot) -> Lease | None:
        if slot.image is None:
            return None
        slot.leases += 1
        return Lease(slot.image, partial(self._release, slot))

    def _release(self, slot: _Slot) -> None:
        with self._lock:
            slot.leases -= 1


class _Slot:
    """One place in the ring. If not listed, it is spare memory or an image that only lease holders use."""

    def __init__(self, specs: tuple[TensorSpec, ...]) -> None:
        self.specs = specs
        self.arena: Arena | None = None
        self.image: StateImage | None = None
        self.size_bytes = 0
        self.global_step = -1
        self.listed = False
        self.leases = 0
        self.replaces: list[int] = []

    def take_over(self, other: _Slot) -> None:
        """Replaces another slot, and uses its memory if the layout is the same and none has been taken over yet."""
        if self.arena is None and other.specs == self.specs:
            self.arena = other.arena
        if other.listed:
            self.replaces.append(other.global_step)
