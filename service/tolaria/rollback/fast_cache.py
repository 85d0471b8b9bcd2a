"""The fast tier: a ring of preallocated images in memory, least recently used out first, bounded by bytes and entries.

Owns the memory and who may read it. Captures and lookups are the compute lane's; leases may be released by any thread.
Must not know why a snapshot is taken or where it is restored to.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from tolaria.rollback.arena import Arena, arena_bytes, arena_specs

if TYPE_CHECKING:
    from types import TracebackType

    from tolaria.rollback.digest import TensorSpec
    from tolaria.rollback.state import StateImage, TrainingState
    from tolaria.values.training import Position

BYTES_MAX: Final = 256 * 2**20
ENTRIES_MAX: Final = 5


class DeclineReason(Enum):
    """Why no snapshot was taken."""

    TOO_LARGE = "too_large"
    ALL_LEASED = "all_leased"


@dataclass(frozen=True, slots=True)
class Captured:
    """A snapshot was taken. `allocated` tells whether memory had to be asked for, `evicted` whose place it took."""

    position: Position
    size_bytes: int
    allocated: bool
    evicted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Declined:
    """No snapshot was taken, and everything is as it was. `needed_bytes` is what the state takes."""

    reason: DeclineReason
    needed_bytes: int


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """One restorable snapshot; `digest` is None until it has been sealed."""

    position: Position
    size_bytes: int
    digest: str | None


@dataclass(frozen=True, slots=True)
class FastCacheStatistics:
    """The ring at a glance. `size_bytes` counts all memory held, spare buffers too; counters count from the start."""

    entries: int
    size_bytes: int
    bytes_max: int
    hits: int
    misses: int
    snapshots: int
    declined: int
    evictions: int


class FastRollbackCache:
    """The ring.

    Args:
        bytes_max: memory held at most, alignment included.
        entries_max: images held at most.
        seal: whether `capture` records the digest at once, at xxh3's 18 GB/s in the caller's thread. Without it the
            caller lets another thread do it under a lease; a restore seals what is still unsealed, and then proves no
            more than that the copying was right.
    """

    def __init__(self, *, bytes_max: int = BYTES_MAX, entries_max: int = ENTRIES_MAX, seal: bool) -> None:
        self._bytes_max = bytes_max
        self._entries_max = entries_max
        self._seal = seal
        self._lock = threading.Lock()
        self._slots: list[_Slot] = []  # least recently used first
        self._hits = self._misses = self._snapshots = self._declined = self._evictions = 0

    def capture(self, state: TrainingState) -> Captured | Declined:
        """Copy the live state into the ring, in the place of an earlier snapshot of the same step if there is one.

        A state that does not fit is declined, not an error: training goes on with the full tier alone. Synchronises.

        Raises:
            StateUnsupportedError: when something in the state has no faithful form.
        """
        survey = state.survey()
        values = survey.json()
        specs = arena_specs(survey.tensors)
        needed_bytes = arena_bytes(specs) + len(values)
        with self._lock:
            slot = self._place(specs, needed_bytes, survey.position.global_step)
        if isinstance(slot, DeclineReason):
            self._declined += 1
            return Declined(slot, needed_bytes)
        allocated = slot.arena is None
        if slot.arena is None:
            pinned = any(tensor.is_cuda for tensor in survey.tensors.values())
            slot.arena = Arena(specs, pinned=pinned)
        image = slot.arena.fill(survey, values)
        if self._seal:
            image.seal()
        with self._lock:
            evicted = self._list(slot, image, needed_bytes)
        return Captured(survey.position, needed_bytes, allocated, evicted)

    def lookup(self, at_or_before: int | None = None) -> Lease | None:
        """The snapshot with the highest step not above `at_or_before` (None: of all); counted as hit or miss."""
        with self._lock:
            slot = self._nearest(at_or_before)
            if slot is None:
                self._misses += 1
                return None
            self._hits += 1
            self._slots.remove(slot)
            self._slots.append(slot)
            return self._lease(slot)

    def hold(self, global_step: int) -> Lease | None:
        """The snapshot of exactly that step, for sealing or writing to disk; no use that counts."""
        with self._lock:
            slot = next((s for s in self._slots if s.listed and s.global_step == global_step), None)
            return None if slot is None else self._lease(slot)

    def forget_after(self, global_step: int) -> int:
        """Drop the snapshots of later steps, and return how many: a rollback has made them a past that never was."""
        with self._lock:
            later = [slot for slot in self._slots if slot.listed and slot.global_step > global_step]
            for slot in later:
                slot.listed = False
            return len(later)

    def snapshots(self) -> tuple[SnapshotInfo, ...]:
        """What could be restored, oldest step first."""
        with self._lock:
            images = [(slot.image, slot.size_bytes) for slot in self._slots if slot.listed and slot.image is not None]
        infos = [SnapshotInfo(i.position, size, i.sealed.total if i.sealed else None) for i, size in images]
        return tuple(sorted(infos, key=lambda info: info.position.global_step))

    def statistics(self) -> FastCacheStatistics:
        """Counters and sizes, from any thread."""
        with self._lock:
            return FastCacheStatistics(
                entries=sum(slot.listed for slot in self._slots),
                size_bytes=sum(slot.size_bytes for slot in self._slots),
                bytes_max=self._bytes_max,
                hits=self._hits,
                misses=self._misses,
                snapshots=self._snapshots,
                declined=self._declined,
                evictions=self._evictions,
            )

    def _place(self, specs: tuple[TensorSpec, ...], needed_bytes: int, global_step: int) -> _Slot | DeclineReason:
        """A slot of our own to fill, taken out of the ring: memory of the same layout if some may go, else none yet."""
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
        """What nobody needs when this step is kept anew, and what else may go, in the order of going."""
        free = [slot for slot in self._slots if slot.free]
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
        for other in self._slots:  # still leased, so it kept its memory; it is no longer what this step restores
            other.listed = other.listed and other.global_step != slot.global_step
        self._slots.append(slot)
        evicted = tuple(step for step in slot.replaces if step != slot.global_step)
        slot.replaces.clear()
        self._snapshots += 1
        self._evictions += len(evicted)
        return evicted

    def _nearest(self, at_or_before: int | None) -> _Slot | None:
        listed = [s for s in self._slots if s.listed and (at_or_before is None or s.global_step <= at_or_before)]
        return max(listed, key=lambda slot: slot.global_step, default=None)

    def _lease(self, slot: _Slot) -> Lease | None:
        if slot.image is None:
            return None
        slot.leases += 1
        return Lease(slot.image, slot, self._lock)


class Lease:
    """The right to read an image: its memory is not used anew before `release`, which `with` calls as well."""

    def __init__(self, image: StateImage, slot: _Slot, lock: threading.Lock) -> None:
        self.image = image
        self._slot: _Slot | None = slot
        self._lock = lock

    def release(self) -> None:
        """Give the right back; a second call does nothing."""
        with self._lock:
            if self._slot is not None:
                self._slot.leases -= 1
                self._slot = None

    def __enter__(self) -> StateImage:
        return self.image

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class _Slot:
    """One place of the ring. Not listed: spare memory, or an image that only its leaseholders still know."""

    def __init__(self, specs: tuple[TensorSpec, ...]) -> None:
        self.specs = specs
        self.arena: Arena | None = None
        self.image: StateImage | None = None
        self.size_bytes = 0
        self.global_step = -1
        self.listed = False
        self.leases = 0
        self.replaces: list[int] = []

    @property
    def free(self) -> bool:
        """Whether nobody reads it."""
        return self.leases == 0

    def take_over(self, other: _Slot) -> None:
        """Another goes in favour of this one, which uses its memory where that has the layout and is still wanted."""
        if self.arena is None and other.specs == self.specs:
            self.arena = other.arena
        if other.listed:
            self.replaces.append(other.global_step)
