"""The checkpoint writer: one thread that writes leased images to disk, at most one more waiting for it.

Owns the thread and the bound. Must not know when a checkpoint is due or what follows from a failed one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, TypeVar

import structlog

from tolaria.errors import CheckpointWriteError, JournalError, TolariaError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from tolaria.rollback.checkpoint_store import CheckpointStore
    from tolaria.rollback.digest import Fingerprint
    from tolaria.rollback.fast_cache import Lease
    from tolaria.rollback.journal_rows import CheckpointRow
    from tolaria.rollback.state import StateImage

TASKS_MAX: Final = 2
"""One being worked on and one waiting. More would only pin more of the ring while the disk is slow."""

LEAVING_S: Final = 30.0
"""Time that leaving waits for what has been accepted, in seconds: a disk that hangs must not hold the process."""

_Result = TypeVar("_Result")
_Task = Callable[[], None]


class Passage:
    """An image's way to disk, and how far the run has gone back meanwhile. Told by one thread, read by another."""

    def __init__(self) -> None:
        self.back_to: int | None = None
        """The earliest step that the run has gone back to; None: it has not."""

    def went_back(self, global_step: int) -> None:
        """The run is at that step again."""
        self.back_to = global_step if self.back_to is None else min(self.back_to, global_step)


class CheckpointWriter:
    """A context manager; leaving it waits for what has been accepted, but not for a disk that hangs."""

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._log = structlog.get_logger(__name__)
        self._places = threading.BoundedSemaphore(TASKS_MAX)
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = self._given_up = False

    def write(
        self, lease: Lease, *, metric: float | None, passage: Passage | None = None
    ) -> Future[CheckpointRow] | None:
        """Have the leased image written; returns at once, with None when the writer is busy or closed.

        The lease is the writer's from here on and is released in any case, also when it is declined. The future
        carries the committed row, or `CheckpointWriteError`; it is cancelled when the writer is closed before its
        turn. Where the `passage` says that the run went back behind the image, the row is superseded at once.
        """
        return self._submit(lease, lambda: self._write(lease.image, metric, passage or Passage()))

    def seal(self, lease: Lease) -> Future[Fingerprint] | None:
        """Have the leased image's digest recorded; as `write`, but for the disk."""
        return self._submit(lease, lease.image.seal)

    def close(self, timeout_s: float) -> bool:
        """Take nothing more and wait up to `timeout_s` for what has been accepted; whether all of it is done.

        What is still being written then is left to its thread, which ends with the process; a checkpoint that is not
        committed by then is none, and its leftovers are cleared away at the next start.
        """
        if not self._closed:
            self._closed = True
            self._tasks.put(None)
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        self._given_up = self._thread.is_alive()
        return not self._given_up

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._closed and not self.close(LEAVING_S):  # whoever has closed it has waited as long as there was time
            detail = "the disk did not answer in time; its thread is left to die"
            self._log.error("checkpoint_left_behind", detail=detail)

    def _submit(self, lease: Lease, work: Callable[[], _Result]) -> Future[_Result] | None:
        if self._closed or not self._places.acquire(blocking=False):
            lease.release()
            return None
        future: Future[_Result] = Future()
        self._tasks.put(lambda: self._carry_out(lease, work, future))
        if self._thread is None or not self._thread.is_alive():
            # Daemonic: a disk that hangs cannot keep the process from ending.
            self._thread = threading.Thread(target=self._run, name="tolaria-checkpoint", daemon=True)
            self._thread.start()
        return future

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # it knows the image

    def _carry_out(self, lease: Lease, work: Callable[[], _Result], future: Future[_Result]) -> None:
        try:
            with lease:
                result = None if self._given_up else work()
        except (TolariaError, OSError) as error:
            future.set_exception(error)
        except BaseException as error:  # a mistake, for whoever waits and for the thread's own hook
            future.set_exception(error)
            raise
        else:
            if result is None:
                future.cancel()
            else:
                future.set_result(result)
        finally:
            self._places.release()

    def _write(self, image: StateImage, metric: float | None, passage: Passage) -> CheckpointRow:
        row = self._store.write(image, metric=metric)
        if passage.back_to is None or row.global_step <= passage.back_to:
            return row  # whoever goes back from now on finds the row and supersedes it
        try:
            self._store.supersede_after(passage.back_to)
        except JournalError as error:
            detail = f"{row.checkpoint_id} is of a past that was undone, and cannot be superseded: {error}"
            raise CheckpointWriteError("journal", "journal", detail) from error
        return replace(row, state="superseded")
