from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

from support.jobs import GatedJob, SlotJob
from support.lane_driver import NoHeartbeat, RunningLane, built, running, seed
from support.waiting import wait_for
from tolaria.config import StateSettings
from tolaria.errors import JobError, LaneFailedError, LossShapeError, RestoreAbandonedError
from tolaria.jobs import Batch, Evaluation, JobContext
from tolaria.lane.lane import EventBuffer
from tolaria.lane.messages import (
    BatchesSkipped,
    CaptureImage,
    CaptureProfile,
    EpochDone,
    Held,
    Hold,
    ImageCaptured,
    LaneEnded,
    ProfileDone,
    ProfileStarted,
    ReconcileSeeds,
    Release,
    Restore,
    Restored,
    RunEpoch,
    SeedsChanged,
    SkipBatches,
    SnapshotsChanged,
    StepDone,
    Stop,
    TraceWritten,
)
from tolaria.ranks.stacks import STACKS_FILE, STACKS_SIGNAL
from tolaria.signals.layout import LanePhase
from tolaria.values.training import Position

FAR = 1e12


def restore(step: int = 0, deadline_s: float = FAR) -> Restore:
    """A restore of the snapshot at or before that step."""
    return Restore(step, deadline_s)


# -- epochs ----------------------------------------------------------------------------------------------------------


def test_an_order_trains_one_epoch_and_evaluates() -> None:
    """Each order is answered by the events of its steps, in order, and of the epoch."""
    with running(built()) as run:
        run.send(RunEpoch(1))
        first = run.wait_for(EpochDone)
        run.send(RunEpoch(2))
        second = run.wait_for(EpochDone, number=2)
        run.send(Stop())
        ended = run.wait_for(LaneEnded)
    steps = run.all_of(StepDone)
    assert [step.global_step for step in steps] == list(range(1, 17))
    assert [step.epoch for step in steps] == [1] * 8 + [2] * 8
    assert ((first.epoch, first.global_step), (second.epoch, second.global_step)) == ((1, 8), (2, 16))
    assert first.evaluation.samples == first.samples == 64
    assert first.training_loss == pytest.approx(sum(step.loss for step in steps[:8]) / 8)
    assert (first.momentum, first.learning_rates, first.hardware.device_type) == (0.9, {"host": 0.05}, "cpu")
    assert second.evaluation != first.evaluation
    assert run.events[-1] == ended == LaneEnded(16, None)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_lane_beats_with_every_step_and_every_microbatch(accumulate: int) -> None:
    """However few microbatches a step has: an epoch may be longer than the heartbeat monitor tolerates."""
    lane, heartbeat = built(accumulate=accumulate), NoHeartbeat()
    run = RunningLane(lane.lane(heartbeat, Path("unused")), lane.module)
    run.send(RunEpoch(1))
    run.wait_for(EpochDone)
    assert run.lane.close(10)
    steps = 8 // accumulate
    boundaries = steps + 1  # and one more at which no batch is left
    between = steps * (accumulate - 1)
    validated = 1
    assert heartbeat.beats >= boundaries + between + validated


def test_an_error_of_the_job_ends_the_lane() -> None:
    """The event has the class, the message and the traceback of the job's error."""
    with running(built("LateCrashJob")) as run:
        run.send(RunEpoch(1))
        ended = run.wait_for(LaneEnded)
    assert ended.global_step == 2
    assert ended.failure is not None
    error = ended.failure.error()
    assert isinstance(error, LaneFailedError)
    assert str(error) == "RuntimeError: the disk with the labels is gone"
    assert "the disk with the labels is gone" in ended.failure.traceback
    assert "support/jobs.py" in ended.failure.traceback


def test_an_invalid_loss_ends_the_lane_with_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tolaria's own errors are raised again as they were."""
    lane = built()
    monkeypatch.setattr("support.jobs.TinyJob.losses", lambda _self, _model, _batch: {})
    with running(lane) as run:
        run.send(RunEpoch(1))
        ended = run.wait_for(LaneEnded)
    assert ended.failure is not None
    error = ended.failure.error()
    assert isinstance(error, LossShapeError)
    assert isinstance(error, JobError)


@pytest.mark.parametrize(("compiled", "first"), [(False, LanePhase.STARTING), (True, LanePhase.COMPILING)])
def test_work_that_may_take_long_is_a_phase(compiled: bool, first: LanePhase) -> None:
    """The first step of a process, at whichever step it resumes, each wait for data, and the evaluation."""
    lane, heartbeat = built("TinyJob"), NoHeartbeat()
    if compiled:
        lane.module.fast_paths.running["compile"] = "on"
    lane.module.global_step = 1000
    run = RunningLane(lane.lane(heartbeat, Path("unused")), lane.module)
    run.send(RunEpoch(1))
    run.wait_for(EpochDone)
    run.send(Stop())
    assert run.lane.close(20)
    steps = lane.module.global_step - 1000
    waits = [LanePhase.LOADING] * steps  # the last one finds the end of the epoch
    assert heartbeat.phases == [LanePhase.LOADING, first, LanePhase.LOADING, *waits, LanePhase.EVALUATING]
    assert heartbeat.steps == steps - 1


# -- stacks ----------------------------------------------------------------------------------------------------------


def test_stacks_of_its_process_are_in_the_state_directory(tmp_path: Path) -> None:
    """Soon, and without a signal to the process: its threads run, and a look without the GIL could end it."""
    lane = built(sections={"state": StateSettings(dir=str(tmp_path))}).lane(NoHeartbeat(), Path("unused"))
    path = tmp_path / STACKS_FILE
    before = signal.signal(STACKS_SIGNAL, signal.SIG_DFL)
    try:
        lane.dump_stacks("halted: look")
        wait_for(lambda: path.exists() and path.read_text().endswith("\n\n"))
    finally:
        signal.signal(STACKS_SIGNAL, before)
    text = path.read_text()
    assert "the service: halted: look\nthe service:\nMain thread" in text
    assert "in test_stacks_of_its_process_are_in_the_state_directory" in text.partition("\nThread ")[0]


# -- hold, release, stop ---------------------------------------------------------------------------------------------


def gated(accumulate: int = 1) -> tuple[RunningLane, GatedJob]:
    """A running lane whose forward passes wait for a pass, in its first epoch's first forward pass."""
    lane = built("GatedJob", accumulate=accumulate)
    job = lane.module.job
    assert isinstance(job, GatedJob)
    run = RunningLane(lane.lane(NoHeartbeat(), Path("unused")), lane.module)
    run.send(RunEpoch(1))
    assert job.entered.acquire(timeout=180)
    return run, job


def end(run: RunningLane, job: GatedJob) -> None:
    """Ends a gated lane."""
    run.send(Stop())
    job.passes.release(100)
    assert run.lane.close(20)


def test_a_held_lane_stops_between_two_microbatches() -> None:
    """Nothing is computed while it is held; after the release it continues the same step."""
    run, job = gated(accumulate=4)
    run.send(Hold(1))
    job.passes.release()
    assert run.wait_for(Held) == Held(0, 1)
    assert not job.entered.acquire(timeout=0.05)
    run.send(Release())
    job.passes.release(100)
    assert run.wait_for(StepDone).batches == range(4)
    end(run, job)


def test_commands_are_executed_while_held() -> None:
    """A command abandons the step in which the lane is held; the lane stays held, and the step starts again later."""
    run, job = gated(accumulate=4)
    run.send(Hold(1))
    job.passes.release()
    run.wait_for(Held)
    captured = run.done(run.send(CaptureImage())).result
    assert isinstance(captured, ImageCaptured)
    with run.lane.images.take(captured.image_id) as image:
        assert image.position == Position(0, 1)
    assert run.done(run.send(SkipBatches(((1, 1),)))).result == BatchesSkipped(1)
    assert run.all_of(StepDone) == []
    assert not job.entered.acquire(timeout=0.05)
    run.send(Release())
    job.passes.release(100)
    assert run.wait_for(StepDone).batches == range(5)  # the second one is skipped
    end(run, job)


def test_a_stop_abandons_a_held_step_after_the_commands_before_it() -> None:
    """What was sent before the stop is executed, and nothing else."""
    run, job = gated(accumulate=4)
    run.send(Hold(1))
    job.passes.release()
    run.wait_for(Held)
    skipped = run.send(SkipBatches(((9, 9),)))
    run.send(Stop())
    assert run.done(skipped).result == BatchesSkipped(1)
    assert run.wait_for(LaneEnded) == LaneEnded(0, None)
    assert run.all_of(StepDone) == []


def test_a_stop_lets_a_running_step_finish() -> None:
    """A lane that is not held ends after its step, and executes a command that waited for the step's end."""
    run, job = gated(accumulate=2)
    skipped = run.send(SkipBatches(((9, 9),)))
    run.send(Stop())
    job.passes.release(100)
    assert run.wait_for(LaneEnded) == LaneEnded(1, None)
    assert run.done(skipped).global_step == 1
    assert len(run.all_of(StepDone)) == 1
    assert run.lane.close(10)


# -- commands --------------------------------------------------------------------------------------------------------


def test_a_restore_abandons_a_running_step() -> None:
    """It does not wait for the microbatches that are left; the lane goes on with the epoch without a further order."""
    run, job = gated(accumulate=4)
    number = run.send(restore())
    job.passes.release()
    done = run.done(number)
    assert isinstance(done.result, Restored)
    assert done.result.position == Position(0, 1)
    assert done.result.state_digest == done.result.expected_digest
    assert (done.result.underway, done.result.latest_order) == (True, 1)
    assert run.all_of(StepDone) == []
    job.passes.release(100)
    assert run.wait_for(EpochDone).epoch == 1
    assert [step.batches for step in run.all_of(StepDone)] == [range(4), range(4, 8)]
    end(run, job)


class LongValidationJob(SlotJob):
    """Waits in each validation batch but the build's until a pass is given."""

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)
        self.validating = threading.Event()
        self.passes = threading.Semaphore(1)  # for the build

    def validation_batches(self) -> Iterable[Batch]:
        return [Batch((self.x, self.y), len(self.x))] * 2

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        if not self.passes.acquire(blocking=False):
            self.validating.set()
            assert self.passes.acquire(timeout=180)
        return super().evaluate(model, batch)


def test_an_evaluation_starts_again_after_a_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps after the restored snapshot are repeated, and the whole validation data is evaluated afterwards."""
    monkeypatch.setattr("support.jobs.SlotJob", LongValidationJob)
    lane = built("SlotJob", sections={"rollback": {"every_steps": 100}})
    job = lane.module.job
    assert isinstance(job, LongValidationJob)
    with running(lane) as run:
        run.send(RunEpoch(1))
        assert job.validating.wait(180)
        assert len(run.all_of(StepDone)) == 8  # the client has all steps before a long evaluation
        number = run.send(restore())
        job.passes.release(100)
        result = run.done(number).result
        assert isinstance(result, Restored)
        assert result.underway
        epoch = run.wait_for(EpochDone)
    assert epoch.evaluation.samples == 2 * 64
    assert [step.global_step for step in run.all_of(StepDone)] == [*range(1, 9), *range(1, 9)]


def test_a_restore_of_an_idle_lane_waits_for_the_next_order() -> None:
    """After the epoch's last event nothing is underway; the next order trains the rest of the restored epoch."""
    with running(built()) as run:
        run.send(RunEpoch(1))
        run.wait_for(EpochDone)
        result = run.done(run.send(restore())).result
        assert isinstance(result, Restored)
        assert (result.underway, result.latest_order) == (False, 1)
        assert not result.progress.over
        run.send(RunEpoch(2))
        assert run.wait_for(EpochDone, number=2).epoch == 1


def test_a_restore_before_a_queued_order_is_underway() -> None:
    """The order that is queued already trains the restored epoch."""
    with running(built()) as run:
        run.send(RunEpoch(1))
        run.wait_for(EpochDone)
        run.send(Hold(1))
        run.wait_for(Held)
        run.send(RunEpoch(2))
        result = run.done(run.send(restore())).result
        assert isinstance(result, Restored)
        assert (result.underway, result.latest_order) == (True, 2)
        run.send(Release())
        run.wait_for(EpochDone, number=2)


def test_a_forbidden_restore_changes_nothing() -> None:
    """Forbidden before it is executed, or past its deadline: the answer is an error, and training goes on."""
    run, job = gated()
    number = run.send(restore())
    assert run.lane.forbid_restore(number)
    late = run.send(restore(deadline_s=time.monotonic()))
    job.passes.release()
    for command_id in (number, late):
        failure = run.done(command_id).failure
        assert failure is not None
        assert isinstance(failure.error(), RestoreAbandonedError)
    job.passes.release(100)
    assert run.wait_for(EpochDone).global_step == 8
    end(run, job)


def test_a_restore_that_has_begun_cannot_be_forbidden() -> None:
    """The caller has to wait for its end."""
    with running(built()) as run:
        run.send(RunEpoch(1))
        run.wait_for(EpochDone)
        number = run.send(restore())
        assert run.done(number).failure is None
        assert not run.lane.forbid_restore(number)


def test_snapshots_are_reported_before_the_command_that_changed_them() -> None:
    """When the answer arrives, the client has the snapshots of after the restore."""
    with running(built()) as run:
        initial = run.wait_for(SnapshotsChanged)
        assert (initial.points, initial.statistics.entries) == ((), 0)
        run.send(RunEpoch(1))
        run.wait_for(EpochDone)
        number = run.send(restore())
        done = run.done(number)
        before = [event for event in run.events[: run.events.index(done)] if isinstance(event, SnapshotsChanged)]
        assert [info.position.global_step for info in before[-1].points] == [0]
        assert before[-1].statistics.hits == 1


def test_seeds_are_changed_by_commands_and_by_time() -> None:
    """A seed that has faded out is reported without a command, in order among the steps."""
    with running(built("SlotJob", sections={"seeds": {"cull_steps": 3}})) as run:
        assert isinstance(run.done(run.send(ReconcileSeeds(seed(steps=2)))).result, SeedsChanged)
        run.send(RunEpoch(1))
        run.wait_for(EpochDone)
        assert isinstance(run.done(run.send(ReconcileSeeds(()))).result, SeedsChanged)
        run.send(RunEpoch(2))
        gone = run.wait_for(SeedsChanged)
        run.wait_for(EpochDone, number=2)
    assert (gone.global_step, gone.states) == (11, ())


def test_a_profile_writes_a_trace(tmp_path: Path) -> None:
    """The command is answered at once, and the outcome is an event after the last step."""
    with running(built(), tmp_path) as run:
        number = run.send(CaptureProfile(3))
        assert run.done(number).result == ProfileStarted(3)
        run.send(RunEpoch(1))
        done = run.wait_for(ProfileDone)
        run.wait_for(EpochDone)
    assert done.global_step == 3
    assert isinstance(done.outcome, TraceWritten)
    assert Path(done.outcome.path).parent == tmp_path


def test_a_lane_limits_its_own_threads() -> None:
    """The setting holds in the lane's thread, where the kernels run."""
    lane, found = built(threads=1), list[int]()
    before = torch.get_num_threads()
    lane.module.model.register_forward_pre_hook(lambda *_: found.append(torch.get_num_threads()))
    with running(lane) as run:
        run.send(RunEpoch(1))
        run.wait_for(EpochDone)
    assert set(found) == {1}
    assert torch.get_num_threads() == before


# -- event buffer ----------------------------------------------------------------------------------------------------


def step(number: int) -> StepDone:
    """The event of the step with this number."""
    return StepDone(number, 1, 0.0, 0.0, 1, 0.0, 0.0, 0.0)


def notifying_buffer() -> tuple[EventBuffer, list[None]]:
    """A buffer with a frame of a minute, and a list that grows with each notification."""
    buffer, notified = EventBuffer(frame_s=60.0), list[None]()
    buffer.notify = lambda: notified.append(None)
    return buffer, notified


def steps_of(buffer: EventBuffer) -> list[int]:
    """Takes the events and returns the numbers of the steps among them."""
    return [event.global_step for event in buffer.take() if isinstance(event, StepDone)]


def test_many_steps_make_few_notifications() -> None:
    """Steps cross in frames: a thousand of them within a frame notify once."""
    buffer, notified = notifying_buffer()
    for number in range(1000):
        buffer.put(step(number))
    assert len(notified) == 1
    assert steps_of(buffer) == list(range(1000))
    assert buffer.take() == []


def test_other_events_notify_at_once_and_keep_their_order() -> None:
    """An event that is waited for does not wait for the frame, and comes after the steps before it."""
    buffer, notified = notifying_buffer()
    buffer.put(step(1))
    buffer.put(step(2))
    buffer.put(Held(2, 1))
    assert len(notified) == 2
    assert buffer.take()[-1] == Held(2, 1)


def test_a_lane_far_ahead_of_its_client_waits() -> None:
    """The buffer is bounded: the lane waits until events are taken."""
    buffer = EventBuffer(capacity=2)
    buffer.put(step(1))
    buffer.put(step(2))
    thread = threading.Thread(target=buffer.put, args=(step(3),))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    assert steps_of(buffer) == [1, 2]
    thread.join(180)
    assert steps_of(buffer) == [3]


def test_closing_releases_a_waiting_lane() -> None:
    """After the end no events are taken, and no lane waits for that."""
    buffer = EventBuffer(capacity=1)
    buffer.put(step(1))
    thread = threading.Thread(target=buffer.put, args=(step(2),))
    thread.start()
    buffer.close()
    thread.join(180)
    assert not thread.is_alive()
    buffer.put(step(3))
    assert len(buffer.take()) == 1


def test_only_steps_wait_for_room() -> None:
    """Other events never wait: the lane may hold a lock that the client needs to make room."""
    buffer = EventBuffer(capacity=1)
    buffer.put(step(1))
    buffer.put(Held(1, 1))
    assert len(buffer.take()) == 2
