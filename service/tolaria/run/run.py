"""One training run, from its first epoch to its end, and the operations that operators can request meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, assert_never

import anyio
import structlog

from leyline.v1.admin_service_pb2 import RUN_STATE_STARTING
from tolaria.config import Settings
from tolaria.emergency import Trigger
from tolaria.errors import LaneFailedError, TolariaError
from tolaria.lane import messages
from tolaria.lane.messages import TraceFailed
from tolaria.run.health_record import DroppedSeeds
from tolaria.run.lane_client import PendingCommand
from tolaria.run.operations import RunOperations, RunParts
from tolaria.run.resume import RunOutcome
from tolaria.run.run_state import RunEvent, after
from tolaria.run.safety import COLLAPSE, EXPLOSION, NON_FINITE
from tolaria.run.status import epoch_packet
from tolaria.run.verdicts import Halt, Proceed, Retreat
from tolaria.values.training import EpochProgress

_LAST_CHECKPOINT_S: Final = 30.0


class TrainingRun(RunOperations):
    """One run: `run` is its task; the other methods serve operators. Used on the event loop only."""

    def __init__(self, parts: RunParts, settings: Settings) -> None:
        super().__init__(parts)
        self._settings = settings
        self._log = structlog.get_logger()
        self._next_epoch = 1
        self._stop = ""
        """Why the run ends before its last epoch; empty if it does not."""
        self._ended_step = -1
        """The step at which the last epoch ended; -1 within one."""
        self._epoch_over = anyio.Event()
        self._epoch_done: messages.EpochDone | None = None
        self._stopping = False
        self._dropped = DroppedSeeds()
        self.ending: RunOutcome = "drained"
        """How the run leaves this process, once it has ended."""

    def begin(self, ready: messages.LaneReady) -> None:
        """Adopts what the lane has built. Has to precede `run`."""
        self._go_on_from(ready.progress, ready.position.global_step)
        if self._stop:
            self._stop += f"; {self._settings.early_stopping.to_go_on}"
        self._status.ready(ready)
        self._parts.skips.places.begin(ready.progress, ready.position.global_step, ready.steps_per_epoch)
        self._parts.checkpointing.model = ready.model
        self._parts.health.start(ready.losses, ready.position.global_step)
        self._observers.on_ready(ready)
        self._show_seeds_and_rates()

    def end_unbuilt(self) -> None:
        """Ends a run whose lane was stopped before it was built."""
        self._lifecycle.enter(RunEvent.FINISHED, self._status.state_reason)

    # -- the run -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Trains until done or stopped. Ends in FINISHED, or in FAILED when the job's code raised."""
        self._parts.safety.start()
        self._lane.start(self._on_events)
        self._lifecycle.enter(RunEvent.STARTED, self._status.state_reason)
        if left_out := self._parts.health.left_out:
            self._lane.submit(messages.SkipBatches(left_out))
        self._parts.skips.begin()
        try:
            while not (self._stopping or self.ending == "finished"):
                if self._lane.lost:
                    await self._status.feed.until(lambda: not self._lane.lost or self._lane.ended is not None)
                    self._raise_if_lane_failed()
                elif self._is_complete:
                    await self._finish()
                elif (epoch := await self._train_epoch()) is not None:
                    await self._cross_boundary(epoch)
                await self._wait_for_rollback()
            await self._end_lane()
        except LaneFailedError as error:
            self.ending = "failed"
            self._lifecycle.enter(RunEvent.FAILED, str(error))
        else:
            done = self._stop or ("all steps done" if self._settings.training.steps else "all epochs done")
            reason = self._status.state_reason if self._stopping else done
            self._lifecycle.enter(RunEvent.FINISHED, reason)

    @property
    def _is_complete(self) -> bool:
        """Whether the run has all its epochs, or all its steps and what follows the last one, or ends before."""
        training = self._settings.training
        if self._stop:
            return True
        return self._ended_step >= training.steps if training.steps else self._next_epoch > training.epochs

    def _go_on_from(self, progress: EpochProgress, global_step: int) -> None:
        self._next_epoch, self._stop = progress.number + progress.over, progress.stop
        self._ended_step = global_step if progress.over else -1

    async def _train_epoch(self) -> messages.EpochDone | None:
        """Trains the next epoch, or the rest of it; returns None if the run was stopped or rolled back within it."""
        self._epoch_over, self._epoch_done = anyio.Event(), None
        if self._status.epoch != self._next_epoch:
            self._status.begin_epoch(self._next_epoch)
            self._observers.on_epoch_started(self._next_epoch)
        self._lane.run_epoch()
        await self._epoch_over.wait()
        self._raise_if_lane_failed()
        return self._epoch_done

    async def _cross_boundary(self, epoch: messages.EpochDone) -> None:
        """Judges the epoch, asks the controller, and has a checkpoint made if one is due."""
        if not self._judge(epoch):
            return
        parts, boundary = self._parts, self._parts.boundary
        policy = boundary.policy  # also where a reload replaces it meanwhile
        if boundary.asks:
            packet = epoch_packet(self._status, parts.health.averages, epoch, wall_ns=time.time_ns())
            await boundary.wait_for_answer(packet, self._status.refusals, since_s=epoch.finished_at_s)
        if self._epoch_done is not epoch:  # rolled back meanwhile: its figures no longer describe any state
            return
        held_up_s = time.monotonic() - epoch.finished_at_s
        breach = boundary.asks and not policy.patient and held_up_s > policy.budget_s + policy.slack_s
        self._status.boundary(held_up_s * 1000, breach=breach)
        budget_ms = math.inf if policy.patient else policy.budget_s * 1000
        self._observers.on_boundary(self._status, epoch, budget_ms=budget_ms, breach=breach)
        parts.safety.epoch_over(breach=breach)
        self._lifecycle.changed()
        await self._wait_for_rollback()
        if self._epoch_done is epoch:
            parts.checkpointing.on_epoch(epoch)

    def _judge(self, epoch: messages.EpochDone) -> bool:
        """Returns whether the epoch is healthy; otherwise rolls back or halts the run."""
        parts = self._parts
        verdict = parts.health.epoch(epoch, rolling_back=parts.recovery.running)
        if isinstance(verdict, Proceed):
            if verdict.alarm:
                self._log.warning("evaluations_worse", epoch=epoch.epoch, reason=verdict.alarm)
            self._save_health()
            return True
        parts.safety.safeguards.epoch_failing(COLLAPSE)
        parts.safety.trigger(Trigger.ACCURACY_COLLAPSE, verdict.reason)
        self._enact(verdict)
        parts.safety.epoch_over(breach=False)
        return False

    async def _finish(self) -> None:
        """Ends the run after the last epoch, with a last checkpoint if required; one without a finite step fails."""
        if self._parts.health.skipped_steps and not self._parts.health.best_step:
            raise LaneFailedError("no step of the run was finite")
        await self._last_checkpoint(self._stop or "the run is complete")
        checkpointing, lane = self._parts.checkpointing, self._lane
        if checkpointing.settings.on_failure == "pause":
            await self._status.feed.until(lambda: not checkpointing.failing or self._stopping or lane.ended is not None)
        rolled_back = self._parts.recovery.running or not self._is_complete
        if not (self._stopping or rolled_back or self._lane.lost):
            self.ending = "finished"

    async def _end_lane(self) -> None:
        self._lane.stop()
        await self._status.feed.until(lambda: self._lane.ended is not None)
        self._raise_if_lane_failed()

    async def _wait_for_rollback(self) -> None:
        await self._status.feed.until(lambda: not self._parts.recovery.running or self._lane.ended is not None)

    def _raise_if_lane_failed(self) -> None:
        if (ended := self._lane.ended) is not None and ended.failure is not None:
            self._log.error("training_failed", error=str(ended.failure), exception=ended.failure.traceback)
            raise LaneFailedError(str(ended.failure))

    async def _last_checkpoint(self, reason: str, *, hold: bool = False) -> None:
        """Writes a last checkpoint within a time limit, if checkpoints are enabled. Waits for a rollback in progress.

        With `hold` the lane is held from now on: the captured state is the last one of this process.
        """
        if not self._parts.checkpointing.enabled:
            return
        if hold:
            self._lane.hold("exit")
        lane = self._lane
        with anyio.move_on_after(_LAST_CHECKPOINT_S), suppress(TolariaError):  # counted and logged by checkpointing
            await self._status.feed.until(lambda: not lane.lost or lane.ended is not None)
            await self._wait_for_rollback()
            if not self._parts.recovery.unsound:
                await self._parts.checkpointing.create(reason)

    # -- events of the lane, in its order ----------------------------------------------------------------------------

    def _on_events(self, events: Sequence[messages.Event]) -> None:
        for event in events:
            self._on_event(event)
        self._status.newest_proven_step = self._parts.points.newest_proven_step  # once a frame: it is only shown
        self._save_health()
        self._parts.safety.check_breakers()
        self._observers.on_frame(self._status)

    def _on_event(self, event: messages.Event) -> None:
        match event:
            case messages.StepDone():
                self._on_step(event)
            case messages.EpochDone():
                self._on_epoch(event)
            case messages.SeedsChanged():
                self._on_seeds(event)
            case messages.RegimeBegun():
                self._on_regime(event)
            case messages.CommandDone():
                self._on_command(event)
            case messages.Held():
                self._on_held(event)
            case messages.SnapshotsChanged() | messages.SnapshotsUnavailable():
                self._on_snapshots(event)
            case messages.ProfileDone():
                self._parts.profiles.done(event)
            case messages.LaneLost() | messages.LaneRestarted() | messages.LaneEnded():
                self._on_process(event)
            case _:
                assert_never(event)

    def _on_step(self, step: messages.StepDone) -> None:
        """Judges and counts a step; an unhealthy one rolls back or halts the run."""
        parts = self._parts
        rolling_back = parts.recovery.running
        verdict = parts.health.step(step, rolling_back=rolling_back)
        self._status.step(step)
        parts.skips.places.step(step)
        parts.recovery.on_judged(step)
        self._observers.on_step(step)
        parts.safety.safeguards.step(step)
        parts.profiles.step(step)
        for seed_id in self._dropped.after(step):
            self._cull(seed_id)
        if isinstance(verdict, Proceed):
            if verdict.alarm:
                self._observers.on_explosion(step, verdict.alarm)
            if not rolling_back:
                parts.questions.step(step)
                parts.recovery.on_step(step)
                parts.checkpointing.on_step(step.global_step)
            return
        if not isinstance(verdict, messages.AcceptRegime):
            if not (ill := step.skipped or step.parameters_finite is False):
                self._observers.on_explosion(step, verdict.reason)
            parts.safety.safeguards.epoch_failing(NON_FINITE if ill else EXPLOSION)
        self._enact(verdict)

    def _on_epoch(self, epoch: messages.EpochDone) -> None:
        self._status.epoch_done(epoch)
        self._observers.on_epoch(epoch, show_layers=not self._parts.safety.safeguards.mode.on)
        self._parts.safety.safeguards.metrics.epoch(epoch, self._parts.checkpointing.settings, self._status.logged)
        self._show_seeds_and_rates()
        self._epoch_done, self._next_epoch, self._ended_step = epoch, epoch.epoch + 1, epoch.global_step
        self._stop = epoch.stop
        self._epoch_over.set()

    def _on_seeds(self, change: messages.SeedsChanged) -> None:
        self._status.regraft(change.states)
        self._observers.on_seeds(self._status.seeds)
        self._observers.on_seeds_changed(change)
        self._parts.safety.safeguards.seeds_changed(change)

    def _on_regime(self, regime: messages.RegimeBegun) -> None:
        self._parts.health.regime_begins(announced=regime.announced)
        self._observers.on_regime(regime)

    def _cull(self, seed_id: str) -> None:
        """Removes a seed whose gradients cannot be used; the executor gets the reason with the next consultation."""
        self._observers.on_seed_culled(seed_id, self._status.global_step)
        self._status.desired = [seed for seed in self._status.seeds if seed.seed_id != seed_id]
        self._lane.submit(messages.ReconcileSeeds(tuple(self._status.desired)))

    def _save_health(self) -> None:
        """Has the record of health journalled if it has changed."""
        health = self._parts.health
        self._status.best_step, self._status.skipped_steps = health.best_step, health.skipped_steps
        if (record := health.unsaved()) is not None:
            self._observers.on_health(record)

    def _on_snapshots(self, event: messages.SnapshotEvent) -> None:
        if isinstance(event, messages.SnapshotsUnavailable):
            self._status.snapshots_unavailable = event.reason
            self._observers.on_snapshots_unavailable(event.reason)
            self._lifecycle.changed()
        else:
            self._status.snapshots = event.points
            self._parts.points.snapshots_changed(event.points)
            self._observers.on_snapshots(event.statistics)

    def _on_held(self, event: messages.Held) -> None:
        if self._lane.mark_held(event):
            self._parts.safety.lane_held()
            self._lifecycle.changed()

    def _on_command(self, event: messages.CommandDone) -> None:
        """Applies the result of a command, then completes its future, which wakes its waiters."""
        if (pending := self._lane.take_pending(event)) is not None:
            if isinstance(pending.command, messages.AcceptRegime):
                self._parts.health.regime_answered(accepted=event.failure is None)
            self._apply(pending, event)
            self._lifecycle.changed()
            self._lane.settle(pending, event)

    def _apply(self, pending: PendingCommand, event: messages.CommandDone) -> None:
        command = pending.command
        match event.result:
            case messages.SeedsChanged() as change:
                self._status.refusals = change.refusals
                self._on_seeds(change)
            case messages.OptimizerChanged() as change:
                if isinstance(command, messages.ChangeOptimizer) and command.adjustment is not None:
                    self._status.adjusted(change)
                    self._observers.on_learning_rates(self._status.learning_rates)
                    self._observers.on_adjusted(command.adjustment, change)
            case messages.Restored() as restored:
                self._rewind(restored)
            case messages.ImageCaptured() as captured:
                self._parts.checkpointing.on_image_captured(captured.image_id, event.global_step)
            case messages.ProfileStarted() | TraceFailed():
                self._parts.profiles.started(pending, event)
            case messages.BatchesSkipped():
                pass  # recovery logs it
            case None:
                if isinstance(command, messages.ReconcileSeeds) and event.failure is not None:
                    reason = str(event.failure.error())
                    self._status.refusals = tuple((seed.seed_id, reason) for seed in self._status.desired)
                    self._observers.on_seeds_failed(reason)
                self._parts.profiles.started(pending, event)
            case _:
                assert_never(event.result)

    def _on_process(self, event: messages.ProcessEvent) -> None:
        match event:
            case messages.LaneRestarted():
                self._rewind(self._parts.revival.on_restarted(event), revived=True)
            case messages.LaneLost():
                self._parts.revival.on_lost(event)
                self._parts.profiles.close()
                self._epoch_done = None
                self._epoch_over.set()
            case messages.LaneEnded():
                self._lane.mark_ended(event)
                self._parts.profiles.close()
                self._epoch_over.set()
        self._lifecycle.changed()

    def _show_seeds_and_rates(self) -> None:
        self._observers.on_seeds(self._status.seeds)
        self._observers.on_learning_rates(self._status.learning_rates)

    def _rewind(self, restored: messages.Restored, *, revived: bool = False) -> None:
        """Resets the run to the state that the lane has restored; `revived`: that another process of it has."""
        parts = self._parts
        if revived:
            parts.health.revived(restored.losses, restored.position.global_step)
            parts.recovery.revived()
        else:
            parts.health.restored(restored.losses, restored.position.global_step)
        self._status.rewind(restored)
        parts.skips.places.rewound(restored.progress, restored.position.global_step)
        self._observers.on_rewind(restored)
        self._show_seeds_and_rates()
        parts.boundary.rewound()
        parts.adjustments.note()
        parts.safety.safeguards.rolled_back()
        parts.recovery.rewound(restored)
        self._go_on_from(restored.progress, restored.position.global_step)
        self._epoch_done = None
        if not restored.underway and restored.latest_order == self._lane.order:
            self._epoch_over.set()  # the lane has dropped its order: the epoch has to be ordered again

    def _enact(self, verdict: messages.AcceptRegime | Retreat | Halt) -> None:
        self._save_health()  # the budget outlives the process
        match verdict:
            case messages.AcceptRegime():
                if self._lane.submit(verdict).done():  # too many commands are queued
                    self._parts.health.regime_answered(accepted=False)
            case Retreat():
                self._parts.recovery.retreat(verdict)
            case Halt(trigger, reason):
                if trigger is not Trigger.SKIPPED_DATA_SPENT:  # then the parameters are sound
                    self._parts.recovery.ill = reason
                self._parts.safety.trigger(trigger, reason)
            case _:
                assert_never(verdict)

    # -- endings ------------------------------------------------------------------------------------------------------

    async def stop(self, reason: str) -> None:
        """Finishes the step and ends the run, even if cancelled. Raises WrongStateError if it had ended before."""
        await self._status.feed.until(lambda: self._status.state != RUN_STATE_STARTING)
        after(self._status.state, RunEvent.FINISHED)
        self.ending, self._status.state_reason = "stopped", f"stopped: {reason}"
        try:
            await self._last_checkpoint(f"stopped: {reason}", hold=True)
        finally:
            self._stop_lane()
        await self._status.feed.until(lambda: self._lifecycle.ended)

    async def drain(self, checkpoint_s: float) -> None:
        """Ends the run with its process, after a last checkpoint if that takes no longer than `checkpoint_s`."""
        try:
            if not self._lifecycle.ended:
                with anyio.move_on_after(checkpoint_s):
                    await self._last_checkpoint("the service is stopping", hold=True)
        finally:
            reason = self._status.state_reason if self._lifecycle.ended else "the service is stopping"
            self._lifecycle.enter(RunEvent.DRAINING, reason)
            self._stop_lane()

    def _stop_lane(self) -> None:
        self._stopping = True
        self._lane.stop()
