"""The compute lane: the one thread that touches tensors. Runs whole epochs; reports through a box.

Owns the thread. Must not know the event loop, peers or operators.
"""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Protocol

import torch

from tolaria.jobs import Evaluation
from tolaria.training.device import limit_threads
from tolaria.training.fences import URGENT, CaptureProfile, FenceReport, LaneCommand, Restore, carry_out
from tolaria.training.hardware import hardware_context
from tolaria.training.mailbox import Mailbox, Posted
from tolaria.training.profiling import LaneProfiler
from tolaria.training.recovery.keeper import PointsLost, Restored, SnapshotKeeper
from tolaria.training.reports import EpochReport, HeldReport, LaneEnded, ProfileEnded, ReportBox
from tolaria.training.rig import Rig, on_device
from tolaria.training.step import StepAbandonedError, train_step


class Hearts(Protocol):
    """Shows from outside that the lane gets on. Every method is called from the lane's thread."""

    def lane_beat(self) -> None:
        """It has got on."""

    def lane_works(self) -> AbstractContextManager[None]:
        """Around work: a beat is due every so often."""

    def lane_rests(self) -> AbstractContextManager[None]:
        """Around a wait, or what is known to take long: none is due."""


class Lane:
    """Runs the rig in a thread of its own. Every method is called from the event loop's thread and returns at once.

    Args:
        rig: from `start` on the lane's alone.
        box: where reports go.
        threads: CPU threads of torch, as `limit_threads` takes them.
        keeper: of the rig's states; likewise the lane's.
        hearts: where it shows that it gets on.
        profiler: of its steps; likewise the lane's.
    """

    def __init__(
        self,
        rig: Rig,
        box: ReportBox,
        *,
        keeper: SnapshotKeeper,
        threads: int,
        hearts: Hearts,
        profiler: LaneProfiler,
    ) -> None:
        self._rig = rig
        self._keeper = keeper
        self._box = box
        self._threads = threads
        self._hearts = hearts
        self._profiler = profiler
        self._mailbox: Mailbox[LaneCommand] = Mailbox(
            on_held=lambda hold: box.put(HeldReport(rig.global_step, hold)), resting=hearts.lane_rests
        )
        # Daemonic: a job stuck in its own code cannot keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="tolaria-lane", daemon=True)

    def start(self) -> None:
        """Start the thread; it waits for work."""
        self._thread.start()

    def run_epoch(self, order: int) -> None:
        """Train and evaluate the epoch that goes on or else the next, when what was asked before is done.

        Which one that is the state says, and a report tells. Numbers of orders are the caller's, and go up.
        """
        self._mailbox.run_epoch(order)

    def post(self, ticket: int, command: LaneCommand) -> None:
        """Carry `command` out at the next fence, or where it stands between updates; a FenceReport tells the result."""
        self._mailbox.post(ticket, command, urgent=isinstance(command, URGENT))

    def hold(self, number: int) -> None:
        """Come to a stand between two microbatches; a HeldReport with this number tells when."""
        self._mailbox.hold(number)

    def release(self) -> None:
        """Go on exactly where it stood."""
        self._mailbox.release()

    def stop(self) -> None:
        """Finish the step and end; a LaneEnded tells when."""
        self._mailbox.stop()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread, up to `timeout_s`; whether it has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            limit_threads(self._threads)
            try:
                self._work_through()
            finally:
                self._profiler.abandon()
        except StepAbandonedError:
            pass  # told to stop while held: nothing was changed, and nobody waits for more
        except BaseException as raised:  # noqa: BLE001 - the job is the user's code; what it raises ends the run, not the process
            error = raised
        self._box.put(LaneEnded(self._rig.global_step, error))

    def _work_through(self) -> None:
        while (work := self._next_work()) is not None:
            with self._hearts.lane_works():
                self._work(work)

    def _next_work(self) -> int | Posted[LaneCommand] | None:
        with self._profiler.mark("boundary"):
            return self._mailbox.next_work()

    def _work(self, work: int | Posted[LaneCommand]) -> None:
        if isinstance(work, Posted):
            self._carry_out(work, in_epoch=False)
        else:
            self._run_epoch()

    def _run_epoch(self) -> None:
        rig = self._rig
        started_s = time.monotonic()
        rig.begin_epoch()
        self._tell_if(self._keeper.epoch_begins())
        while self._pass_fence():
            try:
                if not self._step():
                    with self._profiler.mark("boundary"):
                        self._finish_epoch(time.monotonic() - started_s)
                    return  # what comes from here on, a restore above all, finds no epoch that goes on by itself
            except StepAbandonedError:
                if self._mailbox.stopping:
                    raise
                # A command could not wait for the end of this step, or of the evaluation: afterwards it begins anew.
                rig.model.train()

    def _step(self) -> bool:
        """One update and what follows it; False: there are no more in this epoch."""
        rig = self._rig
        # Compiling takes minutes, in which nothing can beat.
        compiling = rig.global_step == 0 and "compile" in rig.paths.running
        with self._hearts.lane_rests() if compiling else nullcontext():
            report = train_step(rig, self._pass_microbatch, self._profiler.mark)
        if report is None:
            return False
        self._box.put(report)
        if (grown := rig.growth.advance(rig.global_step)) is not None:
            rig.grew()
            self._box.put(grown)
        self._tell_if(self._keeper.step_done(report.duration_s))
        self._tell_if(self._profiler.step_done(rig.global_step))
        return True

    def _tell_if(self, report: PointsLost | ProfileEnded | None) -> None:
        if report is not None:
            self._box.put(report)

    def _pass_fence(self) -> bool:
        """Between two updates: carry out what waits, stand while held; whether the epoch goes on."""
        self._hearts.lane_beat()  # also here: an update may be of one microbatch, with nothing in between
        while (posted := self._mailbox.pass_fence()) is not None:
            self._carry_out(posted, in_epoch=True)
        return not (self._mailbox.stopping or self._rig.epoch.over)

    def _carry_out(self, posted: Posted[LaneCommand], *, in_epoch: bool) -> None:
        report = self._report_of(posted)
        if isinstance(report.result, Restored):
            underway = (in_epoch and not self._rig.epoch.over) or self._mailbox.orders_waiting
            restored = replace(report.result, underway=underway, latest_order=self._mailbox.latest_order)
            report = replace(report, result=restored)
        self._box.put(report)

    def _report_of(self, posted: Posted[LaneCommand]) -> FenceReport:
        ticket, command = posted.ticket, posted.command
        if isinstance(command, CaptureProfile):
            return self._profiler.carry_out(ticket, command, self._rig.global_step)
        with self._profiler.mark("rollback") if isinstance(command, Restore) else nullcontext():
            return carry_out(self._rig, self._keeper, ticket, command)

    def _pass_microbatch(self) -> bool:
        self._hearts.lane_beat()
        return self._mailbox.pass_microbatch()

    def _finish_epoch(self, steps_s: float) -> None:
        started_s = time.monotonic()
        self._box.flush()
        rig = self._rig
        evaluation = self._evaluate()
        gradients = rig.merger.finish_epoch()
        seeds = rig.growth.told_states(rig.global_step, gradients)
        rig.epoch.over = True
        finished_s = time.monotonic()
        self._box.put(
            EpochReport(
                epoch=rig.epoch.number,
                global_step=rig.global_step,
                evaluation=evaluation,
                steps_s=steps_s,
                evaluation_s=finished_s - started_s,
                finished_at_s=finished_s,
                learning_rates=rig.growth.controller.learning_rates(),
                momentum=_momentum(rig.optimizer.param_groups[0]),
                hardware=hardware_context(rig.device),
                training_loss=rig.epoch.loss,
                samples=rig.epoch.samples,
                seeds=seeds,
                gradients=gradients,
                adjustments=rig.growth.controller.adjustments,
            )
        )

    def _evaluate(self) -> Evaluation:
        rig = self._rig
        total = Evaluation(0.0, 0, 0)
        rig.model.eval()
        with torch.no_grad():
            for batch in rig.job.validation_batches():
                if self._mailbox.stopping or not self._pass_microbatch():
                    raise StepAbandonedError  # a long validation must not hold an ending up
                total += rig.job.evaluate(rig.model, on_device(batch, rig.device, pinned=rig.paths.pins))
        return total


def _momentum(options: dict[str, object]) -> float:
    """Momentum of SGD's kind, or the first of Adam's betas; 0 where an optimizer has neither."""
    betas = options.get("betas")
    first = betas[0] if isinstance(betas, (tuple, list)) else options.get("momentum", 0.0)
    return float(first) if isinstance(first, (int, float)) else 0.0
