"""The snapshot ring: preallocated images in host memory, bounded by bytes and entries, and when to take snapshots.

Host memory, pinned with CUDA, keeps device memory free, and hashing and writing never wait for the device. A large
tensor that stays as it is, such as a frozen parameter, is stored once and belongs to every image that has it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from tolaria.errors import ImageDamagedError
from tolaria.images import Lease, SnapshotInfo, SnapshotStatistics, StateImage, TensorSpec, combine
from tolaria.segments import OpenedImage, Segment, header_bytes, open_image, placed_bytes
from tolaria.state.arenas import Allocate, Arena, grouped, private_memory
from tolaria.state.encoding import specs_of
from tolaria.state.shared_memory import arena_in
from tolaria.state.training_state import Survey, TrainingState
from tolaria.values.training import Position

T = TypeVar("T")

_NEWEST_WEIGHT: Final = 0.2
"""Weight of the newest cost in the moving average: follows a change within a dozen snapshots, and damps outliers."""

_ROUNDING: Final = 1e-9

_SPARE_ROOM: Final = 4
"""A header gets a quarter more room than it needs, so that the next ones, which may be longer, fit too."""


@dataclass(frozen=True, slots=True)
class Declined:
    """No snapshot was taken: every image is leased, memory could not be allocated, or the state is too large.

    In the last case the ring is empty now: older snapshots would only be stale. `allocation_error` is the system's.
    """

    size_bytes: int
    too_large: bool
    allocation_error: str = ""


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
    """Snapshots in memory: the newest, and others at growing distances, about powers of two of their interval.

    Each capture has a number; its *level* is the number of trailing zero bits, at most one less than the images that
    there is room for. A level's older snapshots are evicted first, the least recently used of them before others. So
    with room for n images the ring reaches back 2^(n-2) to 2^(n-1) captures: a fault that is detected late finds a
    snapshot from before it.

    Captures and lookups are for the lane's thread; leases may be released from any thread.

    Args:
        bytes_max: memory held at most, alignment included. What images share counts once.
        entries_max: images held at most.
        seal: whether `capture` records the digest. Without it a restore seals the image, and its verification proves
            only that the copy was correct.
        allocate: allocates the memory of the images.
    """

    def __init__(self, *, bytes_max: int, entries_max: int, seal: bool, allocate: Allocate = private_memory) -> None:
        self._bytes_max = bytes_max
        self._entries_max = entries_max
        self._seal = seal
        self._allocate = allocate
        self._lock = threading.Lock()
        self._slots: list[_Slot] = []  # least recently used first
        self._number = 1
        self._hits = self._misses = self._snapshots = self._declined = self._evictions = 0

    def capture(self, state: TrainingState) -> Position | Declined:
        """Copies the state into the ring, which synchronises, and returns its position.

        Replaces the snapshot of the same step. Memory is allocated only while the ring fills, and when the layout has
        changed. Large tensors that are neither trained nor different from those of the newest snapshot are not copied.

        Raises:
            StateUnsupportedError: something in the state cannot be captured. The ring is unchanged.
        """
        survey = state.survey()
        values, specs = survey.json(), specs_of(survey.tensors)
        groups = grouped(specs, survey.trained)
        size_bytes = sum(map(placed_bytes, groups)) + len(values)
        shared = self._unchanged(groups, survey) if groups[1:] and size_bytes <= self._bytes_max else []
        with self._lock:
            unused = self._make_room(size_bytes, shared, survey.position.global_step)
            if unused is None:
                self._declined += 1
                return Declined(size_bytes, too_large=size_bytes > self._bytes_max)
        try:
            room = 0 if self._allocate is private_memory else header_bytes(specs, values)
            new = partial(Arena, pinned=any(t.is_cuda for t in survey.tensors.values()), allocate=self._allocate)
            arenas = _filled(groups, survey, shared, unused, new=new, header_room=room)
        except MemoryError as error:
            with self._lock:
                self._declined += 1
            return Declined(size_bytes, too_large=False, allocation_error=str(error) or "out of memory")
        first = arenas[0].segment
        image = StateImage(
            survey.position,
            specs,
            _joined([arena.buffers for arena in arenas]),
            values,
            segment=0 if first is None else first.number,
        )
        if self._seal:
            image.sealed = combine(_joined([arena.digests() for arena in arenas]), values)
        at_ns = time.time_ns()
        arenas[0].describe(image, arenas, at_ns)
        slot = _Slot(arenas, image, size_bytes, number=self._number, at_ns=at_ns)
        with self._lock:
            for other in self._slots:  # a leased snapshot of this step keeps its memory but is not restored any more
                other.listed = other.listed and other.global_step != slot.global_step
            self._slots.append(slot)
            self._snapshots += 1
            self._number += 1
        return survey.position

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

    def adopt(self, segments: Mapping[int, Segment], digests: Collection[str], *, pinned: bool) -> None:
        """Takes over the snapshots with these digests that an earlier process has left in segments.

        Nothing is verified: a restore proves the snapshot that it takes. One that cannot be opened, or pinned, is left
        out.
        """
        opened = list[OpenedImage]()
        for segment in segments.values():
            with suppress(ImageDamagedError):
                found = open_image(segment, segments)
                if found.image.sealed is not None and found.image.sealed.total in digests:
                    opened.append(found)
        arenas = dict[int, Arena]()
        for found in sorted(opened, key=lambda each: each.image.position.global_step):
            with suppress(MemoryError):
                self._adopt(found, arenas, pinned=pinned)

    def _adopt(self, found: OpenedImage, arenas: dict[int, Arena], *, pinned: bool) -> None:
        for segment, specs in found.places:
            if segment.number not in arenas:
                arenas[segment.number] = arena_in(segment, specs, pinned=pinned)
            arenas[segment.number].adopt(found.image.seal().tensors)
        mine = [arenas[segment.number] for segment, _ in found.places]
        size_bytes = sum(arena.size_bytes for arena in mine) + len(found.image.values)
        with self._lock:
            self._slots.append(_Slot(mine, found.image, size_bytes, number=self._number, at_ns=found.at_ns))
            self._number += 1

    def clear(self) -> None:
        """Drops every snapshot; memory that is not leased is freed."""
        with self._lock:
            self._drop_all()

    def hold(self, global_step: int) -> Lease | None:
        """Leases the snapshot of exactly this step. Counts neither hit nor miss."""
        with self._lock:
            slot = next((s for s in self._slots if s.listed and s.global_step == global_step), None)
            return None if slot is None else self._lease(slot)

    def forget_after(self, global_step: int) -> None:
        """Drops the snapshots of later steps, which a rollback has invalidated."""
        with self._lock:
            for slot in self._slots:
                slot.listed = slot.listed and slot.global_step <= global_step

    def snapshots(self) -> tuple[SnapshotInfo, ...]:
        """Returns the restorable snapshots, oldest step first."""
        with self._lock:
            listed = sorted((slot for slot in self._slots if slot.listed), key=lambda slot: slot.global_step)
        return tuple(
            SnapshotInfo(
                slot.image.position,
                slot.size_bytes,
                slot.image.sealed.total if slot.image.sealed else None,
                slot.at_ns,
            )
            for slot in listed
        )

    def statistics(self) -> SnapshotStatistics:
        """Returns counters and sizes."""
        with self._lock:
            return SnapshotStatistics(
                entries=sum(slot.listed for slot in self._slots),
                size_bytes=_held_bytes(self._slots, ()),
                bytes_max=self._bytes_max,
                hits=self._hits,
                misses=self._misses,
                snapshots=self._snapshots,
                declined=self._declined,
                evictions=self._evictions,
            )

    def _unchanged(self, groups: Sequence[tuple[TensorSpec, ...]], survey: Survey) -> list[Arena]:
        """Returns the arenas of the newest snapshot that hold the survey's tensors of these groups already."""
        newest_last = sorted(self._slots, key=lambda slot: (slot.listed, slot.number))
        stored = {arena.name: arena for slot in newest_last for arena in slot.arenas}
        found = ((stored.get(group[0].name), group) for group in groups[1:])
        return [arena for arena, group in found if arena and arena.specs == group and arena.holds(survey.tensors)]

    def _make_room(self, size_bytes: int, shared: Sequence[Arena], global_step: int) -> list[Arena] | None:
        """Removes slots until an image fits that shares these arenas; None if it does not fit.

        Returns the arenas that no image has any more. Slots that a snapshot of this step makes unneeded go first, then
        those of a level that has a newer one, then the least recently used ones. A size that can never fit empties the
        ring; else None leaves it unchanged.
        """
        if size_bytes > self._bytes_max:
            self._drop_all()
            return None
        shared_bytes = sum(arena.size_bytes for arena in shared)
        size_bytes -= shared_bytes
        free = [slot for slot in self._slots if slot.leases == 0]
        unneeded = [slot for slot in free if not slot.listed or slot.global_step == global_step]
        top = min(self._entries_max, (self._bytes_max - shared_bytes) // size_bytes) - 1
        newest = {_level(number, top): number for number in sorted([*(slot.number for slot in free), self._number])}
        evictable = [slot for slot in free if slot not in unneeded]
        evictable.sort(key=lambda slot: newest[_level(slot.number, top)] == slot.number)  # stable: then by use
        candidates = iter([*sorted(unneeded, key=lambda slot: not slot.listed), *evictable])
        kept, removed = list(self._slots), list[_Slot]()
        # One unneeded slot is removed even if there is room, so that its memory is used again.
        while (unneeded and not removed) or not self._fits(size_bytes, kept, shared):
            slot = next(candidates, None)
            if slot is None:
                return None
            kept.remove(slot)
            removed.append(slot)
        self._slots = kept
        self._evictions += sum(slot in evictable for slot in removed)
        used = {arena for slot in kept for arena in slot.arenas}
        return [arena for slot in removed for arena in slot.arenas if arena not in used]

    def _drop_all(self) -> None:
        for slot in self._slots:
            slot.listed = False
        self._slots = [slot for slot in self._slots if slot.leases]

    def _fits(self, size_bytes: int, slots: list[_Slot], shared: Sequence[Arena]) -> bool:
        return len(slots) < self._entries_max and _held_bytes(slots, shared) + size_bytes <= self._bytes_max

    def _lease(self, slot: _Slot) -> Lease:
        slot.leases += 1
        return Lease(slot.image, partial(self._release, slot))

    def _release(self, slot: _Slot) -> None:
        with self._lock:
            slot.leases -= 1


@dataclass(slots=True, eq=False)
class _Slot:
    """One place in the ring. If not listed, it is spare memory or an image that only lease holders use.

    The first arena is its own; those of unchanged tensors may belong to several slots.
    """

    arenas: list[Arena]
    image: StateImage
    size_bytes: int
    number: int
    at_ns: int
    listed: bool = True
    leases: int = 0

    @property
    def global_step(self) -> int:
        return self.image.position.global_step


def _level(number: int, top: int) -> int:
    """Returns the number of trailing zero bits, at most `top`."""
    return min((number & -number).bit_length() - 1, top)


def _joined(parts: Sequence[Mapping[str, T]]) -> Mapping[str, T]:
    """Returns one mapping with the items of all."""
    return {name: value for part in parts for name, value in part.items()} if parts[1:] else parts[0]


def _held_bytes(slots: Iterable[_Slot], shared: Iterable[Arena]) -> int:
    """Returns the bytes of slots and of arenas that the next one shares, each arena counted once."""
    values_bytes = sum(len(slot.image.values) for slot in slots)
    return values_bytes + sum(arena.size_bytes for arena in {*shared, *(a for slot in slots for a in slot.arenas)})


def _filled(
    groups: Sequence[tuple[TensorSpec, ...]],
    survey: Survey,
    shared: Collection[Arena],
    unused: list[Arena],
    *,
    new: Callable[..., Arena],
    header_room: int,
) -> list[Arena]:
    """Returns arenas with the survey's tensors: shared ones, unused ones filled anew, and new ones.

    The first one has room for a header. Empties `unused`, which frees the memory of the others before more is
    allocated. Raises MemoryError as `Arena` does.
    """
    wanted = {group[0].name: group for group in groups}
    fitting = {arena.name: arena for arena in (*unused, *shared) if arena.specs == wanted.get(arena.name)}
    unused.clear()
    arenas = list[Arena]()
    for group in groups:
        room, found = 0 if arenas else header_room, fitting.get(group[0].name)
        if found is None or found.header_room < room:
            found = new(group, header_room=room + room // _SPARE_ROOM)
        arenas.append(found)
        if found not in shared:
            found.fill(survey.tensors, survey.fill_sharded)
    return arenas
