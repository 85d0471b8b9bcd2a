"""Memory of images in segments that the service holds too, so that it outlives the process of the lane."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tolaria.errors import ImageDamagedError
from tolaria.images import StateImage, TensorSpec
from tolaria.segments import PREAMBLE_BYTES, OpenedImage, Segment, allow_descriptors, placed_bytes, places_of
from tolaria.state.arenas import Arena


class SharedMemory:
    """Allocates segments, and knows which ones the service has not been sent or need not keep any longer.

    Allocation is for the lane's thread, `take_fresh` and `take_freed` are for another one.

    Args:
        held: the segments of an earlier process.
        next_number: the lowest number that no segment has.
        shows: whether segments are shown to other ranks, for which their descriptors stay open.

    Attributes:
        before_allocation: called before memory is allocated. May raise MemoryError.
    """

    def __init__(self, held: Iterable[Segment] = (), next_number: int = 1, *, shows: bool = False) -> None:
        self.held = {segment.number: segment for segment in held}
        """Segments that no arena has taken over yet; to be emptied once the images in them have been adopted."""
        self.before_allocation: Callable[[], object] = lambda: None
        self._given: weakref.WeakKeyDictionary[StateImage, Segment] = weakref.WeakKeyDictionary()
        self._shows = shows
        self._numbers = itertools.count(next_number)
        self._room = allow_descriptors()
        self._live: weakref.WeakValueDictionary[int, Segment] = weakref.WeakValueDictionary()
        self._fresh: deque[Segment] = deque()
        self._freed: deque[int] = deque()
        for segment in self.held.values():
            self._watch(segment)
            self.passed_on(segment)

    def __call__(self, size_bytes: int, pinned: bool) -> tuple[Tensor, Segment]:
        """Allocates memory, as `Allocate` says. Raises MemoryError, also if there are too many segments."""
        self.before_allocation()
        if len(self._live) >= self._room:
            raise MemoryError(f"{self._room} segments of shared memory are all that the limit of open files allows")
        segment = Segment.create(next(self._numbers), size_bytes)
        self._watch(segment)
        self._fresh.append(segment)
        return content_of(segment, pinned=pinned), segment

    def take_fresh(self) -> list[Segment]:
        """Returns the segments that were allocated since the last call."""
        return [self._fresh.popleft() for _ in range(len(self._fresh))]

    def take_freed(self) -> list[int]:
        """Returns the numbers of the segments that nothing here has used since the last call."""
        return [self._freed.popleft() for _ in range(len(self._freed))]

    def passed_on(self, segment: Segment) -> None:
        """Closes the descriptor of a segment that the service holds, unless it is to be shown to other ranks."""
        if not self._shows:
            segment.close_descriptor()

    def keep_with(self, opened: OpenedImage) -> StateImage:
        """Returns an image of the service's that lies in one segment, which is kept for as long as the image."""
        self._given[opened.image] = opened.places[0][0]
        return opened.image

    def place_of(self, image: StateImage) -> list[Segment]:
        """Returns the segments in which an image lies, first the one where it begins; none if it is elsewhere."""
        if (alone := self._given.get(image)) is not None:
            return [alone]
        try:
            numbers = places_of(self._live[image.segment])
            return [self._live[number] for number in numbers]
        except (KeyError, ImageDamagedError):
            return []

    def _watch(self, segment: Segment) -> None:
        self._live[segment.number] = segment
        weakref.finalize(segment, self._freed.append, segment.number).atexit = False


def arena_in(segment: Segment, specs: tuple[TensorSpec, ...], *, pinned: bool) -> Arena:
    """Returns an arena in a segment that an earlier process has filled. Raises MemoryError as `content_of` does."""

    def in_place(_size_bytes: int, pinned: bool) -> tuple[Tensor, Segment]:
        return content_of(segment, pinned=pinned), segment

    room = segment.size_bytes - PREAMBLE_BYTES - placed_bytes(specs)
    return Arena(specs, pinned=pinned, allocate=in_place, header_room=room)


def content_of(segment: Segment, *, pinned: bool) -> Tensor:
    """Returns the bytes after a segment's preamble as a tensor, registered with CUDA as pinned memory if asked for.

    Raises MemoryError if CUDA refuses that.
    """
    content = torch.frombuffer(segment.memory, dtype=torch.uint8)[PREAMBLE_BYTES:]
    if pinned:
        runtime, whole = torch.cuda.cudart(), torch.frombuffer(segment.memory, dtype=torch.uint8)  # type: ignore[no-untyped-call]
        if error := int(runtime.cudaHostRegister(whole.data_ptr(), whole.nbytes, 0)):
            raise MemoryError(f"{whole.nbytes} bytes cannot be pinned: CUDA error {error}")
        weakref.finalize(segment, runtime.cudaHostUnregister, whole.data_ptr()).atexit = False
    return content
