"""Leases of images, and the pool through which images pass between the lane and the run."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

from tolaria.images.image import StateImage


class Lease:
    """The right to read an image: its memory is not reused before `release`. A context manager; thread-safe.

    Args:
        image: the leased image.
        on_release: called once, by the first `release`; None if the memory belongs to the image alone.
    """

    def __init__(self, image: StateImage, on_release: Callable[[], None] | None = None) -> None:
        self.image = image
        self._lock = threading.Lock()
        self._on_release = on_release

    def release(self) -> None:
        """Ends the lease. Further calls do nothing."""
        with self._lock:
            on_release, self._on_release = self._on_release, None
        if on_release is not None:
            on_release()

    def __enter__(self) -> StateImage:
        return self.image

    def __exit__(self, *_error: object) -> None:
        self.release()


class ImagePool:
    """Leased images by id, passed between lane and run. Each image is taken once. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._leases: dict[int, Lease] = {}

    def put(self, image: StateImage | Lease) -> int:
        """Stores an image, or takes over a lease of one, and returns its id. Ids are never reused."""
        lease = image if isinstance(image, Lease) else Lease(image)
        with self._lock:
            image_id = next(self._ids)
            self._leases[image_id] = lease
        return image_id

    def take(self, image_id: int) -> Lease:
        """Removes an image from the pool and returns its lease, which the caller must release.

        Raises:
            KeyError: the id is unknown, or the image has been taken or discarded.
        """
        with self._lock:
            return self._leases.pop(image_id)

    def discard(self, image_id: int) -> None:
        """Releases an image that has not been taken. Unknown ids are ignored."""
        with self._lock:
            lease = self._leases.pop(image_id, None)
        if lease is not None:
            lease.release()

    def __len__(self) -> int:
        return len(self._leases)
