"""Spans of a run, and the moments at which the packets of its epochs are assembled."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from tolaria.journal.rows import CheckpointRow
from tolaria.lane.messages import EpochDone, LaneLost, Restored
from tolaria.rollback.protocol import Ending, Rollback, tier_name
from tolaria.run.observers import RunObserver
from tolaria.run.status import RunStatus
from tolaria.telemetry.packets import Packets
from tolaria.telemetry.tracing import Tracer
from tolaria.values.spans import SpanContext

EPOCH, BOUNDARY = "tolaria.epoch", "tolaria.boundary"
ROLLBACK, CHECKPOINT, LANE_RESTART = "tolaria.rollback", "tolaria.checkpoint", "tolaria.lane_restart"
"""Names of spans; those of calls to peers are `tamiyo/EvaluateEpoch` and so on."""

SPANS: Final = (EPOCH, BOUNDARY, ROLLBACK, CHECKPOINT, LANE_RESTART)


class PacketTelemetry(RunObserver):
    """Records the spans of a run, and has the packet of each epoch assembled, after all other observers."""

    def __init__(self, tracer: Tracer, packets: Packets, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tracer = tracer
        self._packets = packets
        self._clock = clock
        self._epoch: SpanContext | None = None
        self._epoch_number = 0
        self._began_s = clock()
        self._done: EpochDone | None = None
        """The epoch whose boundary has begun."""

    # -- epochs and boundaries -----------------------------------------------------------------------------------------

    def on_epoch_started(self, epoch: int) -> None:
        self._begin_epoch(epoch)

    def on_epoch(self, epoch: EpochDone, *, show_layers: bool) -> None:
        del show_layers
        if self._epoch is None:  # resumed within the epoch
            self._begin_epoch(epoch.epoch, steps_s=epoch.steps_s)
        self._done = epoch
        if self._epoch is not None:
            self._tracer.current = self._epoch.child()

    def on_boundary(self, status: RunStatus, epoch: EpochDone, *, budget_ms: float, breach: bool) -> None:
        boundary, held_up_ms = self._tracer.current, status.boundaries_ms[-1]
        if boundary is not None:
            error = "over budget" if breach else ""
            self._tracer.record(boundary, BOUNDARY, held_up_ms / 1000, error, epoch=epoch.epoch, budget_ms=budget_ms)
        self._end_epoch("", steps=status.sums.steps, step=epoch.global_step, loss=epoch.training_loss)
        self._packets.epoch_over()

    def on_epoch_failed(self) -> None:
        if self._done is not None:  # without a boundary; else its packet has been published
            self._end_epoch("training was ill", step=self._done.global_step, loss=self._done.training_loss)
            self._packets.epoch_over()

    def on_rewind(self, restored: Restored) -> None:
        self._end_epoch("rolled back")
        self._begin_epoch(restored.progress.number)

    def _begin_epoch(self, number: int, *, steps_s: float = 0.0) -> None:
        self._epoch = self._tracer.current = self._tracer.begin()
        self._epoch_number, self._began_s = number, self._clock() - steps_s

    def _end_epoch(self, error: str, /, **attributes: float) -> None:
        if self._epoch is not None:
            duration_s, number = self._clock() - self._began_s, self._epoch_number
            self._tracer.record(self._epoch, EPOCH, duration_s, error, epoch=number, **attributes)
        self._epoch = self._tracer.current = self._done = None

    # -- rollbacks, checkpoints, the lane's process --------------------------------------------------------------------

    def on_rollback_ended(self, rollback: Rollback) -> None:
        ending = rollback.ending or Ending.FAILED
        restored = ending is Ending.RESTORED
        self._tracer.record(
            rollback.span or self._tracer.begin(),
            ROLLBACK,
            self._clock() - rollback.began_s,
            "" if restored else str(rollback.error or ending.value),
            rollback_id=rollback.rollback_id,
            tier=tier_name(rollback.tier),
            origin=rollback.origin,
            outcome=ending.value,
            restored_step=rollback.restored_step if restored else "",
        )

    def on_checkpoint_written(self, row: CheckpointRow, duration_s: float) -> None:
        step, checkpoint_id = row.global_step, row.checkpoint_id
        self._checkpoint(duration_s, "", step=step, size_bytes=row.size_bytes, checkpoint_id=checkpoint_id)

    def on_checkpoint_failed(self, step: int, stage: str, reason: str) -> None:
        self._checkpoint(0.0, reason, step=step, stage=stage)

    def _checkpoint(self, duration_s: float, error: str, /, **attributes: str | float) -> None:
        self._tracer.record(self._tracer.begin(self._epoch), CHECKPOINT, duration_s, error, **attributes)

    def on_lane_lost(self, lost: LaneLost, step: int) -> None:
        self._end_epoch(f"the lane was lost: {lost.cause}", step=step)

    def on_lane_recovered(self, generation: int, step: int, duration_s: float) -> None:
        self._tracer.record(self._tracer.begin(), LANE_RESTART, duration_s, generation=generation, step=step)
