"""The checkpoint writer: one thread that writes leased images to disk, at most one more waiting for it.

Owns the thread and the bound. Must not know when a checkpoint is due or what follows from a failed one.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from tolaria.rollback.checkpoint_store import CheckpointStore
    from tolaria.rollback.digest import Fingerprint
    from tolaria.rollback.fast_cache import Lease
    from tolaria.rollback.journal_rows import CheckpointRow

TASKS_MAX: Final = 2
"""One being worked on and one waiting. More would only pin more of the ring while the disk is slow."""


class CheckpointWriter:
    """A context manager; leaving it waits for what has been accepted."""

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._places = threading.BoundedSemaphore(TASKS_MAX)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tolaria-checkpoint")

    def write(self, lease: Lease, *, metric: float | None) -> Future[CheckpointRow] | None:
        """Have the leased image written; returns at once, with None when the writer is busy.

        The lease is the writer's from here on and is released in any case, also when it is declined. The future
        carries the committed row, or `CheckpointWriteError`.
        """
        if not self._places.acquire(blocking=False):
            lease.release()
            return None
        return self._pool.submit(self._write, lease, metric)

    def seal(self, lease: Lease) -> Future[Fingerprint] | None:
        """Have the leased image's digest recorded; as `write`, but for the disk."""
        if not self._places.acquire(blocking=False):
            lease.release()
            return None
        return self._pool.submit(self._seal, lease)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def _write(self, lease: Lease, metric: float | None) -> CheckpointRow:
        try:
            with lease as image:
                return self._store.write(image, metric=metric)
        finally:
            self._places.release()

    def _seal(self, lease: Lease) -> Fingerprint:
        try:
            with lease as image:
                return image.seal()
        finally:
            self._places.release()
