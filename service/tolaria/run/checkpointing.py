"""Checkpoints of a run: when they are due, how they are made during training, and what happens when one fails.

Storage failures do not end any task: they are reported and counted, and the checkpoint is retried.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from math import isfinite
from time import monotonic
from typing import Any, Final
from weakref import WeakSet

import anyio
import structlog
from anyio import sleep

from leyline.v1.enums_pb2 import CIRCUIT_STATE_CLOSED
from tolaria.checkpoint.writer import CaptureMark, CheckpointWriter
from tolaria.config import CheckpointSettings
from tolaria.errors import (
    CheckpointWriteError,
    JournalError,
    LaneError,
    LaneLostError,
    LaneStoppedError,
    TolariaError,
    WrongStateError,
)
from tolaria.filesystem import errno_name
from tolaria.images import Lease
from tolaria.journal.async_journal import AsyncJournal
from tolaria.journal.rows import CheckpointRow
from tolaria.lane.messages import CaptureImage, EpochDone, ImageCaptured
from tolaria.resilience.breaker import Breaker
from tolaria.run.lane_client import LaneClient
from tolaria.run.observers import RunObserver
from tolaria.run.restore_points import RestorePoints
from tolaria.run.run_state import Lifecycle
from tolaria.values.evaluation import TRAINING
from tolaria.values.lineage import Lineage

BUSY_S: Final = 0.25
"""Delay before an operator's checkpoint is retried while the writer is busy."""

STALLED_S: Final = 120.0
"""Time after which a checkpoint counts as stalled: a disk that hangs raises no error."""

_log = structlog.get_logger(__name__)

_SUPERSEDE_S: Final = 1.0  # one small transaction or query, for which the lane is held


class Checkpointing:
    """Makes the checkpoints of one run. Used on the event loop only.

    The lane captures an image at a step boundary, even while it is held; the writer's thread writes it.
    """

    def __init__(
        self,
        settings: CheckpointSettings,
        lane: LaneClient,
        writer: CheckpointWriter,
        *,
        lifecycle: Lifecycle,
        breaker: Breaker,
        observers: RunObserver,
        journal: AsyncJournal,
        points: RestorePoints,
    ) -> None:
        self._log = structlog.get_logger(__name__)
        self.settings = settings
        self._lane = lane
        self._writer = writer
        self._lifecycle = lifecycle
        self._breaker = breaker
        self._observers = observers
        self._journal = journal
        self._points = points
        self._proven: set[str] = set()
        self._turn = anyio.Lock()
        self._wake = anyio.Event()
        self._due = False
        from_step = 0 if points.resumed is None else points.resumed.global_step
        self._step = self._due_from_step = self._last_step = from_step
        self._captured: dict[int, CaptureMark] = {}
        self._in_flight: WeakSet[CaptureMark] = WeakSet()
        """Images on their way to disk; each is kept alive by `_captured` or by the task or thread that has it."""
        self._epoch: EpochDone | None = None
        self._epoch_due = False
        self._evaluated_step = -1
        self.saved_step = from_step
        """Step of the newest checkpoint, or the one at which the run begins in this process; -1 after a rollback."""
        self.model = ""
        """The lane's description of the model, which is kept in each manifest."""
        self.logged: Mapping[str, float] = {}
        """What the job has logged last, by name: the best checkpoint may be that with the best of it."""
        self._held_reason = ""
        self._retrying = self._stalled = False
        self.failing = ""
        """Why the checkpoint that is due has not been made; empty if none has failed."""

    @property
    def enabled(self) -> bool:
        """Whether the settings require checkpoints at all."""
        return bool(self.settings.every_epochs or self.settings.every_steps)

    # -- events, in the lane's order ---------------------------------------------------------------------------------

    def on_step(self, global_step: int) -> None:
        """Handles the step of a healthy `StepDone`, or of a `Restored`, which may be another branch's."""
        self._step = self._last_step = global_step
        self._due_from_step = min(self._due_from_step, global_step)
        if self._epoch is not None and global_step < self._epoch.global_step:
            self._epoch = None  # its state has been undone
        if due_by_steps(self.settings.every_steps, global_step, self._due_from_step):
            self._make_due(global_step)

    def on_epoch(self, epoch: EpochDone) -> None:
        """Handles an epoch that has been validated and found healthy."""
        self._step, self._epoch = epoch.global_step, epoch
        self._evaluated_step = epoch.global_step
        self._epoch_due = due_by_epochs(self.settings.every_epochs, epoch.epoch)
        if self._epoch_due:
            self._make_due(epoch.global_step)

    def on_image_captured(self, image_id: int, global_step: int) -> None:
        """Handles the lane's `ImageCaptured`: a rollback that is applied from now on may supersede the image."""
        mark = self._captured[image_id] = self._points.captured(global_step)
        self._in_flight.add(mark)

    def on_proven(self, checkpoint_ids: Sequence[str]) -> None:
        """Handles checkpoints that are proven now: the journal is going to say so."""
        if checkpoint_ids:
            self._proven.update(checkpoint_ids)
            self._wake.set()

    def rewound(self, global_step: int, lineage: Lineage) -> None:
        """Handles the lane's `Restored`: images in flight that are not ancestors of the live state are superseded."""
        for mark in self._in_flight:
            mark.live = lineage
        self.saved_step = -1  # of this branch none is known
        self.on_step(global_step)
        if self._due:
            self._wake.set()

    async def save_branch(self, global_step: int) -> None:
        """Has a state that was restored from memory saved if a crash would find no checkpoint to resume from.

        Waits at most one second for the journal. A checkpoint that is in progress may be of a state that has been
        undone: another one follows it.
        """
        if not self.enabled:
            return
        with suppress(JournalError), anyio.move_on_after(_SUPERSEDE_S):
            if any(row.state == "committed" and not row.doubtful for row in await self._journal.kept_points()):
                return
        self._due_from_step, self._due = global_step, True
        self._wake.set()

    async def follow(self, lineage: Lineage, detail: str) -> int:
        """Supersedes the checkpoints that are not ancestors of the live state; returns their number.

        Waits at most one second. A failure is logged; after a crash before the next checkpoint, the run would resume
        from one of them.
        """
        with anyio.move_on_after(_SUPERSEDE_S):
            return await self._journal.follow(lineage, detail)
        self._log.error("checkpoints_not_superseded", detail=f"{detail}: the journal did not answer")
        return 0

    # -- making checkpoints ------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Makes the checkpoints that are due and retries after failures, until the lane has ended."""
        while True:
            if self._retrying:
                await sleep(self.settings.retry_s)
            else:
                await self._wake.wait()
            self._wake = anyio.Event()
            if self._proven:
                proven, self._proven = self._proven, set()
                await self._journal.prove(proven)
            # While this slept, an operator's checkpoint may have succeeded.
            if (self._retrying or self._due) and not await self._serve_due():
                return

    async def create(self, reason: str) -> CheckpointRow:
        """Makes a checkpoint now, after any that is in progress, and returns its committed row.

        Raises TolariaError when no checkpoint was made; the failure counts like any other.
        """
        row, _ = await self._make()
        self._log.info("checkpoint_created", checkpoint_id=row.checkpoint_id, reason=reason)
        return row

    def spare(self, checkpoint_id: str) -> None:
        """Has no write remove a checkpoint, because a rollback goes to it, until the next call; empty: has none."""
        self._writer.spared = checkpoint_id

    async def keep(self) -> tuple[CheckpointRow, bool]:
        """Makes a checkpoint of the live state, which a rollback is about to leave, unless there is one of it.

        Returns its row, and whether it was made now. No snapshot is evicted, and no checkpoint is removed that is not
        superseded.

        Raises TolariaError when the state has no checkpoint.
        """
        if not self.enabled:
            raise WrongStateError("checkpoints are off (checkpoint.every_epochs and checkpoint.every_steps are 0)")
        if not (self.settings.keep_superseded and self.settings.keep_superseded_s):
            raise WrongStateError("checkpoint.keep_superseded or checkpoint.keep_superseded_s is 0")
        if self._stalled:
            raise WrongStateError(self.failing)
        return await self._make(leaving=True)

    async def _make(self, *, leaving: bool = False) -> tuple[CheckpointRow, bool]:
        """Makes a checkpoint after any that is in progress; returns its row, and whether it was made now."""
        async with self._turn:
            made = await self._attempt(leaving=leaving)
            while made is None:
                await sleep(BUSY_S)
                made = await self._attempt(leaving=leaving)
        return made

    def _make_due(self, global_step: int) -> None:
        """Starts a checkpoint unless one is in progress: the disk is then too slow for the configured interval."""
        if not self._turn.locked():
            self._due_from_step, self._due = global_step, True
            self._wake.set()

    async def _serve_due(self) -> bool:
        """Returns whether the lane is still running."""
        async with self._turn:
            if not (self._retrying or self._due):  # what has been captured while this waited is enough
                return True
            self._due = False
            with suppress(TolariaError):  # reported by `_failed`, and retried
                try:
                    await self._attempt()
                except LaneStoppedError as error:
                    self._log.info("checkpoints_end", detail=str(error))
                    return False
                except LaneLostError:
                    self._due = True  # of the state that the next process restores
        return True

    async def _attempt(self, *, leaving: bool = False) -> tuple[CheckpointRow, bool] | None:
        """Makes one checkpoint, or raises. Returns None if the writer is busy or the run was rolled back meanwhile."""
        try:
            made = await self._write(leaving=leaving)
        except (LaneStoppedError, LaneLostError):
            raise
        except TolariaError as error:
            if not leaving or isinstance(error, CheckpointWriteError):  # not: no memory for an image more
                self._failed(error)
            raise
        except OSError as error:
            refused = CheckpointWriteError("keep", errno_name(error), str(error))
            self._failed(refused)
            raise refused from error
        return None if made is None or (made[1] and made[0].state == "superseded") else made

    async def _write(self, *, leaving: bool) -> tuple[CheckpointRow, bool] | None:
        lease, mark = await self._capture(beside=leaving)
        mark.leaving = leaving
        self._step = lease.image.position.global_step
        mark.provenance = replace(mark.provenance, model=self.model, **self._evaluated())
        started_s = monotonic()
        future = self._writer.write(lease, metric=self._metric(), mark=mark)
        if future is None:
            return None
        await self._wait_for(future)
        row = future.result()
        if not mark.existing:
            if row.state == "committed":
                self.on_proven(self._points.committed(row))
            self._succeeded(row, monotonic() - started_s)
        return row, not mark.existing

    async def _capture(self, *, beside: bool) -> tuple[Lease, CaptureMark]:
        self._captured.clear()  # images whose callers were cancelled
        done = await self._lane.call(CaptureImage(beside))
        if not isinstance(done.result, ImageCaptured):
            raise LaneError(f"the lane answered with {type(done.result).__name__}, not with an image")
        image_id = done.result.image_id
        self._due = False
        return self._lane.images.take(image_id), self._captured.pop(image_id)

    async def _wait_for(self, future: Future[CheckpointRow]) -> None:
        done = _done_event(future)
        with anyio.move_on_after(STALLED_S):
            await done.wait()
        if not done.is_set():
            self._observers.on_checkpoint_stalled(self._step, STALLED_S)
            self._set_failing(f"the checkpoint of step {self._step} takes longer than {STALLED_S:g} s")
            self._stalled = True
            try:
                await done.wait()
            finally:
                self._stalled = False

    def _metric(self) -> float | None:
        """Returns the metric by which the best checkpoint is chosen; None for a state that has not been validated.

        A checkpoint that is due at an epoch's end is captured at the next step boundary, which may be a few steps
        later: that state gets the epoch's metric.
        """
        if self._epoch is None:
            return None
        if self._epoch_due:
            self._epoch_due = False
            self._evaluated_step = self._step
        if self._evaluated_step != self._step:
            return None
        return best_metric(self.settings, self._epoch, self.logged)

    def _evaluated(self) -> dict[str, Any]:
        """Returns the metrics of the newest evaluation of this branch, and its step, for the manifest."""
        if self._epoch is None:
            return {}
        metrics = {name: value for name, value in self._epoch.evaluation.figures().items() if isfinite(value)}
        return {"metrics": metrics, "evaluated_step": self._epoch.global_step}

    # -- what follows ------------------------------------------------------------------------------------------------

    def _succeeded(self, row: CheckpointRow, duration_s: float) -> None:
        self._observers.on_checkpoint_written(row, duration_s)
        self._due_from_step = self.saved_step = row.global_step
        if self._breaker.allows():
            self._breaker.succeeded()
        # An open breaker ignores successes until it has cooled down; a later checkpoint then closes it.
        self._retrying = self._retrying and self._breaker.state != CIRCUIT_STATE_CLOSED
        if self._held_reason:
            self._lifecycle.resume_if_held_for(self._held_reason)
            self._held_reason = ""
        self._set_failing("")

    def _failed(self, error: TolariaError) -> None:
        stage, reason = "keep", str(error)
        if isinstance(error, CheckpointWriteError):
            stage, reason = error.stage, error.reason
        self._observers.on_checkpoint_failed(self._step, stage, reason)
        self._retrying = True
        self._wake.set()
        if self.settings.on_failure == "pause":
            reason = f"no checkpoint can be written: {error}"
            if self._lifecycle.hold_if_training(reason):
                self._held_reason = reason
        self._set_failing(str(error))
        if self._breaker.allows():
            self._breaker.failed()

    def _set_failing(self, failing: str) -> None:
        if failing != self.failing:
            self.failing = failing
            self._lifecycle.changed()


def best_figures(settings: CheckpointSettings, epoch: EpochDone, logged: Mapping[str, float]) -> dict[str, float]:
    """Returns the figures of an epoch, by name, among which the metric of `checkpoint.best` has to be.

    `logged` is what the job has logged last, by name. Without an evaluation there are none but those of training.
    """
    if not settings.best_of_training:
        return epoch.evaluation.figures()
    figures = {f"{TRAINING}/{name}": value for name, value in logged.items()}
    return figures | {f"{TRAINING}/loss": epoch.training_loss}


def best_metric(settings: CheckpointSettings, epoch: EpochDone, logged: Mapping[str, float]) -> float | None:
    """Returns the metric of an epoch by which the best checkpoint is chosen; None if it has none that is a number.

    `logged` is as for `best_figures`.
    """
    figures = best_figures(settings, epoch, logged)
    if figures and settings.best == "accuracy" and "accuracy" not in figures:
        return -epoch.evaluation.loss
    metric = figures.get(settings.best_name)
    return None if metric is None or not isfinite(metric) else metric


def due_by_steps(every_steps: int, global_step: int, last_step: int) -> bool:
    """Whether a checkpoint is due `every_steps` after the one of `last_step`; 0 means never."""
    return every_steps > 0 and global_step - last_step >= every_steps


def due_by_epochs(every_epochs: int, epoch: int) -> bool:
    """Whether a checkpoint is due at the end of this epoch, counted from 1; 0 means never."""
    return every_epochs > 0 and epoch % every_epochs == 0


def _done_event(future: Future[CheckpointRow]) -> anyio.Event:
    """Returns an event that is set when the writer's future is done; a cancelled waiter does not cancel the write."""
    done, loop = anyio.Event(), asyncio.get_running_loop()

    def notify(_future: Future[CheckpointRow]) -> None:
        with suppress(RuntimeError):  # the loop has been closed: nothing is waiting
            loop.call_soon_threadsafe(done.set)

    future.add_done_callback(notify)
    return done
