"""Images that the service exchanges with the process of its lane: by id, in segments of shared memory."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from tolaria.errors import ImageDamagedError, LaneLostError
from tolaria.images import ImagePool, Lease, StateImage
from tolaria.segments import Segment, open_image, share
from tolaria.wire import Frame, FrameKind, packed_id


class HeldSegments(Mapping[int, Segment]):
    """The segments that lanes have filled, by number, as descriptors. Looking one up maps it, in any thread.

    The last descriptor of gigabytes takes long to close, so that a thread does it.
    """

    def __init__(self) -> None:
        self._descriptors: dict[int, int] = {}
        self._looking = threading.Lock()
        """Held while a descriptor is taken from the others, so that none is closed while it is duplicated."""
        self._closer = ThreadPoolExecutor(1, thread_name_prefix="tolaria-segments")

    def put(self, segments: Mapping[int, int]) -> None:
        """Takes over the descriptors of segments."""
        for number, descriptor in segments.items():
            self.close(number)
            self._descriptors[number] = descriptor

    def close(self, number: int) -> None:
        """Closes one that holds nothing any more."""
        with self._looking:
            descriptor = self._descriptors.pop(number, None)
        if descriptor is not None:
            self._closer.submit(os.close, descriptor)

    def descriptors(self) -> list[tuple[int, int]]:
        """Returns all numbers with their descriptors, which stay this object's."""
        return list(self._descriptors.items())

    def __getitem__(self, number: int) -> Segment:
        with self._looking:
            descriptor = os.dup(self._descriptors[number])
        try:
            segment = Segment(number, descriptor)
        except (OSError, ValueError):
            os.close(descriptor)
            raise
        segment.close_descriptor()
        return segment

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._descriptors))

    def __len__(self) -> int:
        return len(self._descriptors)


class LaneImages(ImagePool):
    """The pool of a lane in another process. Images that the lane has captured are mapped when they are taken.

    Args:
        segments: what images of the lane lie in.
        send: sends a frame to the lane, if there is one.
    """

    def __init__(self, segments: HeldSegments, send: Callable[[Frame], object]) -> None:
        super().__init__()
        self._segments = segments
        self._send = send
        self._generation = 0
        self._ids = itertools.count(-1, -1)  # negative: the lane's own ids are positive
        self._lost = set[int]()
        self._captured: dict[int, int] = {}
        self._read: dict[tuple[int, int], list[int]] = {}
        self._given: set[int] = set()

    def captured(self, image_id: int, segment: int) -> None:
        """Handles an image of the lane's that begins in a segment."""
        self._captured[image_id] = segment

    def lost(self) -> None:
        """Handles the end of the lane's process: images that it captured are read on, but none is taken any more."""
        self._lost, self._captured = set(self._captured), {}
        self._given.clear()
        self._generation += 1

    @property
    def being_read(self) -> set[int]:
        """Numbers of the segments in which the leased images lie."""
        return {number for numbers in list(self._read.values()) for number in numbers}

    def put(self, image: StateImage | Lease) -> int:
        """Copies an image into shared memory, passes it to the lane and returns its id.

        Raises:
            MemoryError: there is no room for it.
        """
        lease = image if isinstance(image, Lease) else Lease(image)
        with lease as given:
            segment = share(given)
        image_id = next(self._ids)
        self._given.add(image_id)
        self._send(Frame(FrameKind.IMAGE, packed_id(image_id), (segment.descriptor,), owner=segment))
        return image_id

    def take(self, image_id: int) -> Lease:
        """Returns the lease of an image that the lane has captured; the caller must release it.

        Raises:
            KeyError: the id is unknown, or the image has been taken or discarded.
            LaneLostError: the lane that captured it has died.
            ImageDamagedError: it is not where the lane said that it is.
        """
        if image_id in self._lost and image_id not in self._captured:
            raise LaneLostError("the lane that captured the image has died")
        number, key = self._captured.pop(image_id), (self._generation, image_id)
        try:
            opened = open_image(self._segments[number], self._segments)
        except KeyError as error:
            self._release(key)
            raise LaneLostError("the memory of the image is gone") from error
        except ImageDamagedError:
            self._release(key)
            raise
        self._read[key] = [segment.number for segment, _ in opened.places]
        return Lease(opened.image, partial(self._release, key))

    def discard(self, image_id: int) -> None:
        """Releases an image that has not been taken, or that the lane has not restored. Unknown ids are ignored."""
        if image_id in self._given:
            self._given.discard(image_id)
            self._send(Frame(FrameKind.IMAGE_DISCARDED, packed_id(image_id)))
        else:
            with suppress(KeyError):
                del self._captured[image_id]
                self._release((self._generation, image_id))

    def _release(self, key: tuple[int, int]) -> None:
        """Called from any thread."""
        self._read.pop(key, None)
        generation, image_id = key
        if generation == self._generation:
            self._send(Frame(FrameKind.IMAGE_RELEASED, packed_id(image_id)))
