"""The checkpoint writer: one thread that writes leased images to disk, with at most one more image waiting."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

import structlog

from tolaria.checkpoint.format import Provenance
from tolaria.errors import CheckpointWriteError, JournalError, TolariaError

if TYPE_CHECKING:
    from typing import Self

    from tolaria.checkpoint.store import CheckpointStore
    from tolaria.images import Lease, StateImage
    from tolaria.journal.rows import CheckpointRow
    from tolaria.values.lineage import Lineage

TASKS_MAX: Final = 2
"""One image being written and one waiting. More would keep the ring's memory leased while the disk is slow."""

EXIT_TIMEOUT_S: Final = 30.0
"""Seconds that leaving the context waits for accepted images: a disk that hangs must not block the process."""


@dataclass(eq=False)  # without slots: it is weakly referenced
class CaptureMark:
    """What is known about a captured state while it is written. Set by one thread and read by another.

    `keep` is a checkpoint that retention must not remove, because it is the newest proven one. `live` is the lineage of
    the run since its latest rollback after the capture; None without one. `leaving`: a rollback is about to leave the
    state. `existing`: such a state had a checkpoint already.
    """

    provenance: Provenance = field(default_factory=Provenance)
    keep: str = ""
    live: Lineage | None = None
    leaving: bool = False
    existing: bool = False


@dataclass(frozen=True, slots=True)
class _Task:
    lease: Lease
    metric: float | None
    mark: CaptureMark
    future: Future[CheckpointRow]


class CheckpointWriter:
    """Writes images in the background. A context manager: leaving it waits up to 30 s for accepted images."""

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._log = structlog.get_logger(__name__)
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = self._given_up = False
        self._lock = threading.Lock()
        self._pending = 0
        self.spared = ""
        """A checkpoint that no write removes, because a rollback goes to it; empty without one."""

    @property
    def pending(self) -> int:
        """Number of accepted images that have not been processed."""
        return self._pending

    def write(
        self, lease: Lease, *, metric: float | None, mark: CaptureMark | None = None
    ) -> Future[CheckpointRow] | None:
        """Writes the leased image in the background and releases it; returns None if the writer is busy or closed.

        The future has the committed row or a `CheckpointWriteError`; it is cancelled if the writer gives up before its
        turn. If a rollback has gone to a state without this one among its ancestors, the row is superseded at once.
        """
        with self._lock:
            accepted = not self._closed and self._pending < TASKS_MAX
            self._pending += accepted
        if not accepted:
            lease.release()
            return None
        task = _Task(lease, metric, mark or CaptureMark(), Future())
        self._tasks.put(task)
        if self._thread is None or not self._thread.is_alive():
            # A daemon: a disk that hangs cannot keep the process from exiting.
            self._thread = threading.Thread(target=self._run, name="tolaria-checkpoint", daemon=True)
            self._thread.start()
        return task.future

    def close(self, timeout_s: float) -> bool:
        """Stops accepting images and waits up to `timeout_s` seconds; returns whether all have been processed.

        A checkpoint not committed when the process ends does not exist; the next start removes its leftovers.
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

    def __exit__(self, *_error: object) -> None:
        if not self._closed and not self.close(EXIT_TIMEOUT_S):  # an explicit `close` has already waited
            self._log.error("checkpoint_left_behind", detail="the disk did not respond in time")

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            self._execute(task)
            del task  # it keeps the image alive

    def _execute(self, task: _Task) -> None:
        try:
            with task.lease as image:
                row = None if self._given_up else self._followed(self._write(image, task), task)
        except BaseException as error:
            task.future.set_exception(error)
            if not isinstance(error, (TolariaError, OSError)):  # a bug: report it to the thread's excepthook too
                raise
        else:
            if row is None:
                task.future.cancel()
            else:
                task.future.set_result(row)
        finally:
            with self._lock:
                self._pending -= 1

    def _write(self, image: StateImage, task: _Task) -> CheckpointRow:
        mark = task.mark
        if mark.leaving and (saved := self._store.saved(image)) is not None:
            mark.existing = True
            return saved
        keep = {mark.keep, self.spared}
        return self._store.write(image, metric=task.metric, provenance=mark.provenance, keep=keep, leaving=mark.leaving)

    def _followed(self, row: CheckpointRow, task: _Task) -> CheckpointRow:
        """Supersedes the row if it is not an ancestor of the live state any more."""
        live = task.mark.live
        if live is None or live.includes(row.attempt, row.global_step):
            return row
        try:
            self._store.follow(live, "rolled back while it was written")
        except JournalError as error:
            detail = f"{row.checkpoint_id} was undone by a rollback and cannot be superseded: {error}"
            raise CheckpointWriteError("journal", "journal", detail) from error
        return replace(row, state="superseded")
