"""`ThreadLane`: the thread that computes. Takes commands from a queue and puts events into a buffer."""

from __future__ import annotations

import gc
import resource
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, Protocol
from zlib import crc32

from tolaria.errors import JobError, RanksDifferError
from tolaria.lane.commands import CommandExecutor, CommandQueue, PageGate, QueuedCommand
from tolaria.lane.device import hardware_context, limit_threads
from tolaria.lane.evaluation import evaluate, random_state
from tolaria.lane.fast_paths import spanning_compilation
from tolaria.lane.group_commands import FollowerCommands, GroupExecutor, LeaderCommands
from tolaria.lane.messages import (
    Command,
    EpochDone,
    Event,
    Held,
    LaneEnded,
    ProfileDone,
    Restored,
    StepDone,
    Stop,
)
from tolaria.lane.profiling import LaneProfiler, Region, dump_own_stacks
from tolaria.lane.rank_failures import failed_seeds, report
from tolaria.lane.snapshot_manager import SnapshotManager
from tolaria.lane.step import StepAbandonedError, train_step
from tolaria.lane.train_module import TrainModule
from tolaria.lane.weight_averages import PART as AVERAGES
from tolaria.ranks.group import Group, lost_peer
from tolaria.signals.layout import LanePhase
from tolaria.state.encoding import restore_rngs
from tolaria.values.evaluation import Evaluation
from tolaria.values.failure import Failure
from tolaria.values.training import RankLoad

_FRAME_S: Final = 0.02
_STEP_EVENTS_MAX: Final = 4096


class LaneHeartbeat(Protocol):
    """Records the lane's progress for a monitor. Called from the lane's thread only."""

    def lane_beat(self) -> None:
        """Records progress."""

    def lane_works(self) -> AbstractContextManager[None]:
        """Spans a block of work, during which beats are due at regular intervals."""

    def lane_rests(self) -> AbstractContextManager[None]:
        """Spans a wait, or work known to take long, during which no beat is due."""

    def lane_phase(self, phase: LanePhase) -> AbstractContextManager[None]:
        """Spans work of a kind that may take long without a beat; nests."""

    def lane_batch(self, epoch: int, place: int) -> None:
        """Records which batch the lane takes, from 0 within its epoch; epoch 0: none."""

    def lane_step(self, duration_s: float) -> None:
        """Records the duration of an ordinary step, without its waits for data."""


class EventBuffer:
    """Carries events from the lane's thread to the client, many at a time.

    Holds at most `capacity` steps: a lane that is this far ahead of its client waits. Steps notify the client at most
    once per `frame_s`, other events at once.
    """

    def __init__(self, *, frame_s: float = _FRAME_S, capacity: int = _STEP_EVENTS_MAX) -> None:
        self.notify: Callable[[], object] = lambda: None
        """Called from the lane's thread when events can be taken; set before the first event."""
        self._frame_s = frame_s
        self._capacity = capacity
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._open = True
        self._notified_at_s = 0.0

    def put(self, event: Event) -> None:
        """Adds an event, waiting for room if it is a `StepDone`; drops it after `close`.

        Other events never wait: they are few, and the lane may hold a lock that the client needs to make room.
        """
        is_step = isinstance(event, StepDone)
        with self._changed:
            while self._open and is_step and len(self._events) >= self._capacity:
                self._changed.wait()
            if not self._open:
                return
            self._events.append(event)
        now_s = time.monotonic()
        if not is_step or now_s - self._notified_at_s >= self._frame_s:
            self._notified_at_s = now_s
            self.notify()

    def take(self) -> list[Event]:
        """Removes and returns all events, oldest first."""
        with self._changed:
            events, self._events = self._events, []
            self._changed.notify_all()
        return events

    def close(self) -> None:
        """Drops further events; a waiting lane goes on."""
        with self._changed:
            self._open = False
            self._changed.notify_all()


class ThreadLane:
    """Trains a module in a thread, which alone uses the module from `start` on.

    Methods are called by the client, from another thread, and return at once. `threads` is as in `limit_threads`;
    `stacks` is the file for the stacks of this process.
    """

    def __init__(
        self,
        module: TrainModule,
        snapshots: SnapshotManager,
        *,
        profiler: LaneProfiler,
        heartbeat: LaneHeartbeat,
        threads: int,
        stacks: Path,
        gate: PageGate | None = None,
    ) -> None:
        group = module.group
        self._stacks = stacks
        self._module = module
        self._snapshots = snapshots
        self._profiler = profiler
        self._heartbeat = heartbeat
        self._threads = threads
        self._events = EventBuffer()
        queue = CommandQueue(
            lambda number: self._events.put(Held(module.global_step, number)),
            heartbeat.lane_rests,
            hold_number=gate.hold_number if gate else lambda: 0,
        )
        self._commands: CommandQueue | LeaderCommands | FollowerCommands = queue
        self._executor = CommandExecutor(module, snapshots, profiler, gate)
        self._profiled: Callable[[int], ProfileDone | None] = profiler.after_step
        if group is not None:
            following = FollowerCommands(group, heartbeat.lane_rests)
            self._commands = LeaderCommands(queue, group) if group.leads else following
            executor = self._executor = GroupExecutor(module, snapshots, profiler, gate, group)
            self._profiled = executor.profiles.after_step
        module.on_reading = heartbeat.lane_batch
        self.images = self._executor.images
        self._process_ends = False
        self._warm = False
        """Whether this process has taken a step, so that nothing is left that only the first one does."""
        self.peer_lost = self.failed = ""
        """Why the lane has ended: another rank has gone, or an exception of the job's; else empty."""
        # A daemon: a job that never returns cannot keep the process from exiting.
        self._thread = threading.Thread(target=self._run, name="tolaria-lane", daemon=True)

    def start(self, notify: Callable[[], object]) -> None:
        """Starts the thread, which waits for commands and calls `notify` when events can be taken."""
        self._events.notify = notify
        self._thread.start()

    def run(self, notify: Callable[[], object]) -> None:
        """Trains in the calling thread, instead of a new one, until the lane ends, and with it this process."""
        self._process_ends = True
        self._events.notify = notify
        self._run()

    def send(self, command_id: int, command: Command) -> None:
        """Queues a command; `Hold`, `Release` and `Stop` act at once. Raises LaneError when too many are queued."""
        self._commands.put(command_id, command)

    def take_events(self) -> list[Event]:
        """Returns the events since the last call, oldest first."""
        return self._events.take()

    def dump_stacks(self, why: str) -> None:
        """Has the stacks of this process written to a file in state.dir, soon."""
        threading.Thread(target=dump_own_stacks, args=(self._stacks, why), daemon=True).start()

    def forbid_restore(self, command_id: int) -> bool:
        """Forbids that restore to change live state; False when the change has already begun."""
        return self._executor.gate.forbid(command_id)

    def close(self, timeout_s: float) -> bool:
        """Stops the lane, drops its events and waits up to `timeout_s`; returns whether it has ended. Blocks."""
        self._commands.put(0, Stop())
        self._events.close()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        failure: Failure | None = None
        try:
            limit_threads(self._threads)
            with spanning_compilation(partial(self._heartbeat.lane_phase, LanePhase.COMPILING)):
                self._serve()
        except BaseException as error:  # noqa: BLE001 - the job is the user's code; its errors end the run, not the process
            if self._module.group is not None and (lost := lost_peer(error)) is not None:
                self.peer_lost = str(lost)
                return
            # A JobError says in one line what failed, and where.
            failure = Failure.of(error, "" if isinstance(error, JobError) else traceback.format_exc())
            self.failed = str(failure)
            if self._process_ends:
                gc.disable()  # the thread that sends this must not come to collect a loader, which waits for workers
        self._module.close_data()
        self._events.put(LaneEnded(self._module.global_step, failure))
        self._profiler.abandon()

    def _serve(self) -> None:
        self._put_snapshot_events()
        callbacks = self._module.callbacks
        with self._calling():
            callbacks.train_begin()
        while True:
            with self._profiler.mark("boundary"):
                work = self._commands.next_work()
            if work is None:
                with self._calling():
                    callbacks.train_end()
                return
            with self._heartbeat.lane_works():
                if isinstance(work, QueuedCommand):
                    self._execute(work, in_epoch=False)
                else:
                    self._run_epoch()

    def _run_epoch(self) -> None:
        module, started_s = self._module, time.monotonic()
        with self._heartbeat.lane_phase(LanePhase.LOADING):  # a loader may start its workers
            module.begin_epoch()
        self._snapshots.epoch_begins()
        self._put_snapshot_events()
        while self._cross_step_boundary():
            try:
                if not self._step():
                    with self._profiler.mark("boundary"):
                        self._finish_epoch(time.monotonic() - started_s)
                    return  # after a later restore, the epoch continues only with a further order
            except StepAbandonedError:
                # Unless the lane is to stop, the abandoned step, or evaluation, starts again after the urgent command.
                module.train_mode()
            except Exception as error:  # noqa: BLE001 - of the job's code or of a blueprint's; raised again if not a seed's
                self._drop_failed_seed(error)

    def _cross_step_boundary(self) -> bool:
        """Executes the commands that are queued, waiting while held; returns whether the epoch goes on."""
        self._heartbeat.lane_beat()  # also here: a step of one microbatch does not beat
        while (queued := self._commands.next_command()) is not None:
            self._execute(queued, in_epoch=True)
        return not (self._commands.stopping or self._module.progress.over)

    def _step(self) -> bool:
        """Takes a step and does the work that follows it; returns False if the epoch, or the run, has no step left."""
        module, warm = self._module, self._warm
        if module.complete:
            return False
        with nullcontext() if warm else self._heartbeat.lane_phase(self._first_phase):
            step = train_step(module, self._continue_step, self._mark)
        if step is None:
            return False
        self._put_regimes()
        self._warm = True
        if warm:
            self._heartbeat.lane_step(step.duration_s - step.input_wait_s)
        self._events.put(step)
        if not step.skipped and module.callbacks.any:
            with self._calling():
                module.callbacks.step_end(step.loss)
        if (changed := module.seeds.advance(module.global_step)) is not None:
            module.refresh()
            self._events.put(changed)
        self._snapshots.step_done(step.duration_s)
        self._put_snapshot_events()
        if (profiled := self._profiled(module.global_step)) is not None:
            self._events.put(profiled)
        return True

    def _waiting_for_ranks(self) -> AbstractContextManager[object]:
        """Spans what may wait for other ranks that do what takes long; each rank watches itself for silence."""
        return nullcontext() if self._module.group is None else self._heartbeat.lane_phase(LanePhase.LOADING)

    def _drop_failed_seed(self, error: Exception) -> None:
        """Removes the seeds that made a pass raise `error`, so that the host goes on; raises it if it was none."""
        module = self._module
        module.abandon_step()
        with self._waiting_for_ranks():
            reasons = failed_seeds(module, error)
        changed = module.seeds.drop_failed(reasons, module.global_step)
        module.refresh()
        module.train_mode()
        self._events.put(changed)

    @property
    def _first_phase(self) -> LanePhase:
        """What the first step of this process counts as, at whichever step a run is resumed."""
        return LanePhase.COMPILING if "compile" in self._module.fast_paths.running else LanePhase.STARTING

    def _mark(self, region: Region) -> AbstractContextManager[object]:
        if region == "input":
            return self._heartbeat.lane_phase(LanePhase.LOADING)
        if region == "merge" and self._module.group is not None:
            return self._merging()
        return self._profiler.mark(region)

    @contextmanager
    def _merging(self) -> Iterator[None]:
        with self._profiler.mark("merge"), self._waiting_for_ranks():
            yield

    def _continue_step(self) -> bool:
        self._heartbeat.lane_beat()
        with self._waiting_for_ranks():
            return self._commands.continue_step()

    def _execute(self, queued: QueuedCommand, *, in_epoch: bool) -> None:
        from_step = self._module.global_step
        with self._waiting_for_ranks():
            done = self._executor.execute(queued)
        if isinstance(done.result, Restored):
            with self._calling():
                self._module.callbacks.rolled_back(from_step)
            underway = (in_epoch and not self._module.progress.over) or self._commands.epochs_queued
            restored = replace(done.result, underway=underway, latest_order=self._commands.latest_order)
            done = replace(done, result=restored)
        self._put_regimes()
        self._put_snapshot_events()  # first: the client of the command may look at the snapshots
        self._events.put(done)

    def _calling(self) -> AbstractContextManager[object]:
        """Spans code of callbacks, which may take as long as an evaluation."""
        return self._heartbeat.lane_phase(LanePhase.EVALUATING) if self._module.callbacks.any else nullcontext()

    def _put_regimes(self) -> None:
        while self._module.regimes_begun:
            self._events.put(self._module.regimes_begun.pop(0))

    def _put_snapshot_events(self) -> None:
        for event in self._snapshots.take_events():
            self._events.put(event)

    def _finish_epoch(self, steps_s: float) -> None:
        self._events.notify()  # of the steps in the buffer: an evaluation may take long
        self._heartbeat.lane_batch(0, 0)
        module, controller = self._module, self._module.seeds.controller
        if module.group is not None:
            self._compare_ranks(module.group)
        with self._heartbeat.lane_phase(LanePhase.EVALUATING):
            evaluation = self._evaluate_all()
        gradients, figures = module.merger.finish_epoch(), evaluation.figures()
        scheduled = controller.epoch_over(figures, module.global_step)
        with self._calling():
            if figures:
                module.callbacks.evaluated(figures)
            module.callbacks.epoch_end(module.progress.loss)
        stop = module.early_stopping.evaluated(figures, module.global_step)
        missing = module.early_stopping.missing(figures)
        if controller.job_schedule is not None:
            missing |= controller.job_schedule.missing(figures)
        module.progress = module.progress.ended(stop)
        seeds = module.seeds.reported_states(module.global_step, gradients)
        event = EpochDone(
            epoch=module.progress.number,
            global_step=module.global_step,
            evaluation=evaluation,
            steps_s=steps_s,
            finished_at_s=time.monotonic(),
            learning_rates=controller.learning_rates(),
            momentum=_momentum(module.optimizer.param_groups[0]),
            hardware=hardware_context(module.device),
            training_loss=module.progress.loss,
            samples=module.progress.samples,
            seeds=seeds,
            gradients=gradients,
            adjustments=controller.adjustments,
            compile_fallback=module.fast_paths.new_compile_fallback(),
            rank_loads=() if module.group is None else _loads(module, module.group),
            stop=stop,
            scheduled=scheduled,
            missing_metrics=missing,
        )
        self._events.put(event)

    def _compare_ranks(self, group: Group) -> None:
        """Raises RanksDifferError if parameters, buffers or optimizer differ between ranks. Reads all of them."""
        with self._heartbeat.lane_phase(LanePhase.EVALUATING):
            digest = str(sorted(self._snapshots.state.replicated().items()))
            if len(digests := set(group.all_gather_text(str(crc32(digest.encode()))))) > 1:
                raise RanksDifferError(f"the ranks have {len(digests)} different states at the end of an epoch")

    def _evaluate_all(self) -> Evaluation:
        """Evaluates the model, and the average of its weights if there is one. Raises as `_evaluate` does."""
        rngs = random_state()
        try:
            evaluation = self._evaluate()
            if (averages := self._module.averages) is not None and averages.evaluated and evaluation.samples:
                with averages.in_model():
                    evaluation = evaluation.beside(AVERAGES, self._evaluate())
        except StepAbandonedError:  # both are repeated
            if rngs is not None:
                restore_rngs(*rngs)
            raise
        return evaluation

    def _evaluate(self) -> Evaluation:
        """Raises StepAbandonedError for a stop or an urgent command: a long validation must not delay them."""
        module, beat, goes_on = self._module, self._heartbeat.lane_beat, self._commands.continue_evaluation
        try:
            found = evaluate(module, beat=beat, goes_on=goes_on)
        except Exception as error:
            with self._heartbeat.lane_rests():  # as long as the leader is held
                report(module, error)
            raise
        if found is None:
            raise StepAbandonedError
        return found


def _loads(module: TrainModule, group: Group) -> tuple[RankLoad, ...]:
    memory = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    gathered = group.all_gather([module.waits.input_s, module.waits.ranks_s, memory])
    return tuple(RankLoad(input_s, ranks_s, int(size)) for input_s, ranks_s, size in gathered)


def _momentum(options: dict[str, object]) -> float:
    """Returns SGD's momentum or Adam's first beta; 0 if the optimizer has neither."""
    betas = options.get("betas")
    first = betas[0] if isinstance(betas, (tuple, list)) else options.get("momentum")
    return float(first) if isinstance(first, (int, float)) else 0.0
