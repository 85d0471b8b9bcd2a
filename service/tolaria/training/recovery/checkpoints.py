"""Decides when a checkpoint is due, has it made beside training, and does not give up on a disk that refuses.

Owns what follows from a checkpoint that cannot be written. Must not know how the lane keeps an image, nor how training
is held. What goes wrong with storage ends no task here: it is told and tried again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal
from weakref import WeakSet

import anyio
import structlog

from leyline.v1.enums_pb2 import CIRCUIT_STATE_CLOSED
from tolaria.checkpoint.retention import Retention
from tolaria.checkpoint.writer import RewindMark
from tolaria.errors import CheckpointWriteError, LaneStoppedError, TolariaError
from tolaria.filesystem import errno_name
from tolaria.telemetry import events

if TYPE_CHECKING:
    from tolaria.checkpoint.writer import CheckpointWriter
    from tolaria.config import CheckpointSettings
    from tolaria.images.pool import Lease
    from tolaria.journal.rows import CheckpointRow
    from tolaria.resilience.breaker import Breaker
    from tolaria.telemetry.emitter import Emitter
    from tolaria.telemetry.metrics import Metrics

BUSY_S: Final = 0.25
"""Until an operator's checkpoint is tried again while the writer has its hands full: it seals an image in less."""

STALLED_S: Final = 120.0
"""A checkpoint that takes so long is told of: a disk that hangs refuses nothing, and what falls due is left out."""

_BEST: Final[dict[str, Literal["highest", "lowest"]]] = {"accuracy": "highest", "loss": "lowest"}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What validation found after an epoch. NaN for a figure that the job does not give: such a state is never best."""

    global_step: int
    epoch: int
    accuracy: float
    loss: float


@dataclass(frozen=True, slots=True)
class DeskTools:
    """What the desk works with.

    Args:
        writer: its thread writes; open as long as the desk serves.
        keep: has the lane keep its state at the next fence, also while training is held, and gives a lease of it, which
            is the desk's from then on. Calls what it is given when it has got the image, in the order of what the desk
            is told of steps. Raises a `LaneStoppedError` where there is no lane any more, another `TolariaError` where
            the state cannot be kept; releases what it has when it is cancelled.
        hold: asked after every failure for training to stand, with a reason; says whether it does for that one. Where
            it stands already, for an earlier failure or for somebody else's reason, it does not.
        go_on: that reason stands no more. Whether training goes on is for it to decide: not while an operator's pause
            or an emergency holds it as well.
        breaker: takes each failure, and the successes that follow.
    """

    writer: CheckpointWriter
    keep: Callable[[Callable[[], None]], Awaitable[Lease]]
    hold: Callable[[str], bool]
    go_on: Callable[[str], None]
    breaker: Breaker
    metrics: Metrics
    emitter: Emitter


class CheckpointDesk:
    """The checkpoints of one run. Used on the event loop only; `serve` is a task of its own.

    Args:
        settings: when they are due, and what follows from failure.
        tools: see there.
        from_step: updates that the run has done when it begins here, as a resumed one has.
        stalled_s: time that a checkpoint may take before it is told of in `failing`.
        changed: called when `failing` has changed.
        clock: monotonic seconds.
        sleep: waits that many seconds.
    """

    def __init__(
        self,
        settings: CheckpointSettings,
        tools: DeskTools,
        *,
        from_step: int = 0,
        stalled_s: float = STALLED_S,
        changed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self._log = structlog.get_logger(__name__)
        self._settings = settings
        self._tools = tools
        self._stalled_s = stalled_s
        self._changed = changed
        self._clock = clock
        self._sleep = sleep
        self._turn = anyio.Lock()
        self._wake = anyio.Event()
        self._due = False
        self._step = self._asked_step = self._told_step = from_step
        self._marks: WeakSet[RewindMark] = WeakSet()
        """Of the images on their way to disk; the task that carries an image holds its mark."""
        self._evaluation: Evaluation | None = None
        self._evaluation_wanted = False
        self._evaluated_step = self._sound_step = -1
        self._held = ""
        self._mending = False
        self.failing = ""
        """Why there is no new checkpoint although one is due; empty when all is well."""

    @property
    def validated_step(self) -> int:
        """Up to which updates the run was last found well by a validation, or was gone back to; -1: by none so far.

        The checkpoint that was asked for then, if any, is of no later step.
        """
        return self._sound_step

    def stepped(self, global_step: int) -> None:
        """So many updates are done, fewer than before after a rollback."""
        if global_step < self._told_step:
            self.went_back(global_step)
        self._step = self._told_step = global_step
        self._asked_step = min(self._asked_step, global_step)
        if self._evaluation is not None and global_step < self._evaluation.global_step:
            self._evaluation = None  # of a past that never was
        if self._evaluation is None:
            self._sound_step = min(self._sound_step, global_step)
        if due_by_steps(self._settings.every_steps, global_step, self._asked_step):
            self._ask(global_step)

    def went_back(self, global_step: int) -> None:
        """The run is at that step again: no image kept before, of a later one, is to be resumed from.

        What is committed by then is for whoever tells this to supersede.
        """
        for mark in self._marks:
            mark.rewound_to(global_step)

    def epoch_over(self, evaluation: Evaluation) -> None:
        """An epoch has ended and has been validated."""
        self._step, self._evaluation = evaluation.global_step, evaluation
        self._evaluated_step = self._sound_step = evaluation.global_step
        self._evaluation_wanted = due_by_epochs(self._settings.every_epochs, evaluation.epoch)
        if self._evaluation_wanted:
            self._ask(evaluation.global_step)

    async def serve(self) -> None:
        """A task: make the checkpoints that are due, and try again after a failure, until there is no lane any more."""
        while True:
            if self._mending:
                await self._sleep(self._settings.retry_s)
            else:
                await self._wake.wait()
            self._wake = anyio.Event()
            # While this slept an operator's own may have mended all.
            if (self._mending or self._due) and not await self._make_due():
                return

    async def create(self, reason: str) -> CheckpointRow:
        """Make a checkpoint now, after one that is being made; returns when it is committed.

        Raises:
            TolariaError: there is none. It counts as any other that failed.
        """
        async with self._turn:
            while (row := await self._attempt()) is None:
                await self._sleep(BUSY_S)
        self._log.info("checkpoint_created", checkpoint_id=row.checkpoint_id, reason=reason)
        return row

    def _ask(self, global_step: int) -> None:
        """One that is due while another is being made is left out, quietly: the disk is slower than the settings."""
        if not self._turn.locked():
            self._asked_step = global_step
            self._due = True
            self._wake.set()

    async def _make_due(self) -> bool:
        """Whether there is still a lane to ask."""
        async with self._turn:
            self._due = False
            try:
                await self._attempt()
            except LaneStoppedError as error:
                self._log.info("checkpoints_end", detail=str(error))
                return False
            except TolariaError:
                pass  # told and counted, and it will be tried again
        return True

    async def _attempt(self) -> CheckpointRow | None:
        """One checkpoint, and what follows from it. Raises TolariaError.

        None: the writer was busy, or the run went back behind the state before it was committed.
        """
        try:
            row = await self._written()
        except LaneStoppedError:
            raise
        except TolariaError as error:
            self._failed(error)
            raise
        except OSError as error:
            refused = CheckpointWriteError("keep", errno_name(error), str(error))
            self._failed(refused)
            raise refused from error
        if row is not None:
            self._succeeded(row)
        return None if row is None or row.state == "superseded" else row

    async def _written(self) -> CheckpointRow | None:
        mark = RewindMark()
        lease = await self._tools.keep(lambda: self._marks.add(mark))
        self._step = lease.image.position.global_step
        started_s = self._clock()
        future = self._tools.writer.write(lease, metric=self._metric(), mark=mark)
        if future is None:
            return None
        await self._end_of(future)
        row = future.result()
        self._tools.metrics.checkpoint_duration_seconds.observe(self._clock() - started_s)
        return row

    async def _end_of(self, future: Future[CheckpointRow]) -> None:
        over = _event_of(future)
        with anyio.move_on_after(self._stalled_s):
            await over.wait()
        if not over.is_set():
            self._log.error("checkpoint_stalled", step=self._step, stalled_s=self._stalled_s)
            self._tell(f"the checkpoint of step {self._step} takes longer than {self._stalled_s:g} s")
            await over.wait()

    def _metric(self) -> float | None:
        """The figure by which retention finds the best; none for a state that has not been validated.

        What an epoch's end has asked for is kept at the next fence, which may be a few updates later: that state then
        has the epoch's figure.
        """
        if self._evaluation is None:
            return None
        if self._evaluation_wanted:
            self._evaluation_wanted = False
            self._evaluated_step = self._sound_step = self._step
        if self._evaluated_step != self._step:
            return None
        return self._evaluation.accuracy if self._settings.best == "accuracy" else self._evaluation.loss

    def _succeeded(self, row: CheckpointRow) -> None:
        self._tools.metrics.checkpoint_size_bytes.set(row.size_bytes)
        self._asked_step = row.global_step
        self._log.info("checkpoint_written", step=row.global_step, checkpoint_id=row.checkpoint_id)
        breaker = self._tools.breaker
        if breaker.allows():
            breaker.succeeded()
        # An open breaker believes nobody before it has cooled down: a further checkpoint will convince it then.
        self._mending = self._mending and breaker.state != CIRCUIT_STATE_CLOSED
        held, self._held = self._held, ""
        if held:
            self._tools.go_on(held)
        self._tell("")

    def _failed(self, error: TolariaError) -> None:
        stage, reason = "keep", str(error)
        if isinstance(error, CheckpointWriteError):
            stage, reason = error.stage, error.reason
        self._tools.metrics.checkpoint_failures_total.inc()
        self._tools.emitter.emit(events.CHECKPOINT_FAILED, step=self._step, stage=stage, reason=reason)
        self._mending = True
        self._wake.set()
        if self._settings.on_failure == "pause":
            reason = f"no checkpoint can be written: {error}"
            if self._tools.hold(reason):
                self._held = reason
        self._tell(str(error))
        if self._tools.breaker.allows():
            self._tools.breaker.failed()

    def _tell(self, failing: str) -> None:
        if failing != self.failing:
            self.failing = failing
            self._changed()


def due_by_steps(every_steps: int, global_step: int, last_step: int) -> bool:
    """Whether a checkpoint is due: so many updates, 0 for never, after the one of `last_step`."""
    return every_steps > 0 and global_step - last_step >= every_steps


def due_by_epochs(every_epochs: int, epoch: int) -> bool:
    """Whether a checkpoint is due at this epoch's end, counted from 1; 0 for never."""
    return every_epochs > 0 and epoch % every_epochs == 0


def retention_of(settings: CheckpointSettings) -> Retention:
    """Which checkpoints stay, as the settings have it."""
    return Retention(last=settings.keep_last, best=_BEST[settings.best])


def _event_of(future: Future[CheckpointRow]) -> anyio.Event:
    """Set when another thread's future is done, which goes on when whoever waits is cancelled."""
    over, loop = anyio.Event(), asyncio.get_running_loop()

    def tell(_future: Future[CheckpointRow]) -> None:
        with suppress(RuntimeError):  # the loop has ended meanwhile: nobody waits
            loop.call_soon_threadsafe(over.set)

    future.add_done_callback(tell)
    return over
