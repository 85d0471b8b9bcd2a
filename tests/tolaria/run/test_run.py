from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import COMMAND_OPTIMIZER, COMMAND_PAUSE, COMMAND_SEED, SEED_STAGE_TRAINING
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.jobs import GatedJob
from support.peers import command
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.config import ControlSettings
from tolaria.errors import WrongStateError
from tolaria.jobs import Batch
from tolaria.lane.messages import CommandDone, EpochDone, Event
from tolaria.run.lane_client import LaneHandle
from tolaria.values.optimization import Adjustment

pytestmark = pytest.mark.anyio


def gate(run: RunUnderTest) -> GatedJob:
    """Returns the run's job, which blocks in each microbatch until the test releases a pass."""
    assert isinstance(run.job, GatedJob)
    return run.job


async def entered(job: GatedJob) -> None:
    """Waits until the lane is inside a microbatch."""
    with anyio.fail_after(180):
        while not job.entered.acquire(blocking=False):
            await anyio.sleep(0.002)


async def test_a_run_trains_all_epochs_and_learns() -> None:
    """Every epoch is trained, evaluated and reported; the loss falls; the run finishes."""
    peers = FakePeers()
    async with running(new_run(peers, epochs=4)) as run:
        await run.until(lambda: run.state == "FINISHED")
    assert run.status.global_step == 32
    assert run.status.samples_total == 4 * 64
    assert [s.current_epoch for s in peers.states] == [1, 2, 3, 4]
    assert [s.global_step for s in peers.states] == [8, 16, 24, 32]
    assert peers.states[-1].training_loss < peers.states[0].training_loss
    assert run.status.newest_proven_step is not None
    assert run.sample("tolaria.epochs.total") == 4
    assert run.sample("tolaria.training.state", {"state": "finished"}) == 1
    assert run.sample("tolaria.step.duration_seconds_count") == 32


async def test_a_pause_takes_effect_between_two_microbatches() -> None:
    """The lane is held after its current microbatch, also in the middle of a step; no parameter changes."""
    run = new_run(FakePeers(), job="GatedJob", accumulate=4, epochs=1)
    async with running(run):
        job = gate(run)
        await entered(job)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.run.pause, "look at it")
            await run.until(lambda: run.state == "PAUSED")
            job.passes.release()  # ends the current microbatch
        before = [p.detach().clone() for p in run.module.parameters]
        job.passes.release(2)
        assert not await anyio.to_thread.run_sync(lambda: job.entered.acquire(timeout=0.1))
        assert run.status.global_step == 0
        after = run.module.parameters
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        job.passes.release(100)
        await run.run.resume("go on")
        await run.until(lambda: run.state == "FINISHED")
    assert run.status.global_step == 2


async def test_pauses_do_not_change_the_result() -> None:
    """A run that is paused and resumed ends with the same parameters, bit for bit, as one that is not."""

    async def final(*, pausing: bool) -> list[torch.Tensor]:
        run = new_run(FakePeers(), epochs=3, accumulate=2, options={"dropout": 0.3})
        async with running(run):
            if pausing:
                for _ in range(5):
                    if run.state != "RUNNING":
                        break
                    await run.run.pause("look")
                    await run.run.resume("on")
                    await anyio.lowlevel.checkpoint()
            await run.until(lambda: run.state == "FINISHED")
        return [p.detach() for p in run.module.parameters]

    plain, paused = await final(pausing=False), await final(pausing=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, paused, strict=True))


async def test_pause_and_resume_are_idempotent() -> None:
    """A paused run can be paused, and a running one resumed."""
    run = new_run(FakePeers(), job="GatedJob")
    async with running(run):
        job = gate(run)
        await entered(job)
        job.passes.release()
        await run.run.pause("one")
        await run.run.pause("two")
        await run.run.resume("one")
        await run.run.resume("two")
        assert run.state == "RUNNING"
        job.passes.release(1000)
        await run.run.stop("enough")


async def test_a_stop_finishes_the_step_and_ends_the_run() -> None:
    """Stopped within a microbatch, the run finishes its step; afterwards it refuses to be paused, stopped, resumed."""
    run = new_run(FakePeers(), job="GatedJob", accumulate=2)
    async with running(run):
        job = gate(run)
        await entered(job)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.run.stop, "enough")
            await run.until(lambda: run.run.ending == "stopped")
            job.passes.release(100)
        assert run.state == "FINISHED"
        assert run.status.global_step == 1
        assert run.status.state_reason == "stopped: enough"
        for refused in (run.run.pause("x"), run.run.stop("x")):
            with pytest.raises(WrongStateError):
                await refused
        with pytest.raises(WrongStateError):
            await run.run.resume("x")


async def test_a_paused_run_can_be_stopped() -> None:
    """Held in the middle of a step, the lane abandons the step and ends."""
    run = new_run(FakePeers(), job="GatedJob", accumulate=4)
    async with running(run):
        job = gate(run)
        await entered(job)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.run.pause, "look")
            await run.until(lambda: run.state == "PAUSED")
            job.passes.release()
        await run.run.stop("enough")
    assert run.state == "FINISHED"
    assert run.status.global_step == 0


async def test_an_exception_of_the_job_fails_the_run() -> None:
    """The run ends in FAILED with the exception's class and message; the service goes on."""
    run = new_run(FakePeers(), job="LateCrashJob")
    async with running(run):
        await run.until(lambda: run.state == "FAILED")
    assert run.status.state_reason == "RuntimeError: the disk with the labels is gone"
    assert run.run.status().health.summary == run.status.state_reason


async def test_a_slow_controller_delays_training_by_its_budget_at_most() -> None:
    """Tamiyo hangs: every boundary ends with the budget, training goes on, and she has one call at a time."""
    release = anyio.Event()
    calls = 0

    async def slow(_state: SystemStatePacket) -> AdaptationCommand | None:
        nonlocal calls
        calls += 1
        await release.wait()
        return None

    control = ControlSettings(boundary_budget_ms=60_000, tamiyo_budget_ms=12)
    run = new_run(FakePeers(slow), control=control, epochs=5)
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
        assert calls == 1
        assert sorted(run.status.boundaries_ms)[2] < 30_000  # far from the budget of the whole boundary
        release.set()
        await run.until(lambda: run.status.tamiyo_answer == "no change")


async def test_a_late_answer_is_applied_and_a_stale_one_dropped() -> None:
    """An answer after the boundary takes effect unless training has moved on by more than max_staleness_steps."""

    async def outcome(max_staleness_steps: int) -> RunUnderTest:
        release = anyio.Event()

        async def late(state: SystemStatePacket) -> AdaptationCommand | None:
            if state.current_epoch > 1:
                return None
            await release.wait()
            return command(COMMAND_SEED)

        control = ControlSettings(boundary_budget_ms=400, tamiyo_budget_ms=12, max_staleness_steps=max_staleness_steps)
        run = new_run(FakePeers(late), job="SlotJob", control=control, epochs=10**6)
        async with running(run):
            await run.until(lambda: run.status.global_step > 24)
            release.set()
            await run.until(lambda: run.status.tamiyo_answer == "no change")  # the answer to the newest question
            await run.run.stop("enough")
        return run

    applied, dropped = await outcome(10**9), await outcome(3)
    assert applied.status.commands_accepted == 1
    assert applied.status.last_command is not None
    assert dropped.status.commands_accepted == 0
    assert dropped.status.last_command is None


async def test_a_deterministic_boundary_waits_for_the_answer() -> None:
    """With training.deterministic the answer takes effect before training goes on, however far over the budget."""

    async def slow(_state: SystemStatePacket) -> AdaptationCommand | None:
        await anyio.sleep(0.05)
        return command(COMMAND_SEED)

    control = ControlSettings(boundary_budget_ms=2, tamiyo_budget_ms=1)
    try:
        run = new_run(FakePeers(slow), job="SlotJob", control=control, epochs=2, deterministic=True)
        async with running(run):
            await run.until(lambda: run.state == "FINISHED")
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert run.status.commands_accepted == 2
    assert run.status.boundaries_over_budget == 0
    assert min(run.status.boundaries_ms) >= 50


async def test_the_controller_can_pause_the_run() -> None:
    """COMMAND_PAUSE holds the run; the reason names the issuer."""

    async def pause_once(state: SystemStatePacket) -> AdaptationCommand | None:
        return command(COMMAND_PAUSE) if state.current_epoch == 1 else None

    run = new_run(FakePeers(pause_once), epochs=2)
    async with running(run):
        await run.until(lambda: run.state == "PAUSED")
        assert run.status.state_reason == "asked by test"
        await run.run.resume("looked at it")
        await run.until(lambda: run.state == "FINISHED")


async def test_seeds_and_answers_are_in_the_status() -> None:
    """GetStatus and the metrics show the seeds that Kasmina desires and both peers' answers."""

    async def germinate(_state: SystemStatePacket) -> AdaptationCommand | None:
        return command(COMMAND_SEED)

    peers = FakePeers(germinate, [SeedState(seed_id="a", stage=SEED_STAGE_TRAINING, blueprint_id="residual_mlp")])
    async with running(new_run(peers, job="SlotJob", epochs=1)) as run:
        await run.until(lambda: run.state == "FINISHED")
    status = run.run.status()
    assert [s.seed_id for s in status.seeds] == ["a"]
    assert status.tamiyo_answer == "germinate seed-1"
    assert status.kasmina_answer == "applied: germinated"
    assert status.commands_accepted == 1
    assert status.last_command.command_type == COMMAND_SEED
    assert run.sample("tolaria.seeds.active", {"stage": "training"}) == 1
    assert run.sample("tolaria.command.applied_total", {"type": "seed"}) == 1
    assert len(peers.applied) == 1


async def test_a_desired_seed_that_the_model_has_no_slot_for_is_refused() -> None:
    """Kasmina learns it with the next state, and the status does not show the seed as training."""
    peers = FakePeers(seeds=[SeedState(seed_id="a", stage=SEED_STAGE_TRAINING)])
    async with running(new_run(peers, epochs=2)) as run:
        await run.until(lambda: run.state == "FINISHED")
    assert [seed_id for seed_id, _ in peers.refusals] == ["a"]
    assert list(peers.states[-1].seed_states) == list(run.run.status().seeds) == []


async def test_an_invalid_command_changes_nothing() -> None:
    """A wrong version is rejected: counted by reason, an event, in the status, and not sent to Kasmina."""

    async def wrong_version(_state: SystemStatePacket) -> AdaptationCommand | None:
        return command(COMMAND_SEED, version=9)

    peers = FakePeers(wrong_version)
    async with running(new_run(peers, epochs=2)) as run:
        await run.until(lambda: run.state == "FINISHED")
    assert peers.applied == []
    assert run.status.commands_rejected == 2
    assert run.status.tamiyo_answer == "rejected: wrong_version"
    assert run.sample("tolaria.command.rejected_total", {"reason": "wrong_version"}) == 2
    assert run.events.count("command_rejected") == 2


async def test_a_boundary_over_its_budget_is_a_breach() -> None:
    """It is counted in the status and an event; no epoch of training has failed."""
    control = ControlSettings(boundary_budget_ms=0.01, tamiyo_budget_ms=0.01, boundary_slack_ms=0.01)
    async with running(new_run(FakePeers(), control=control, epochs=2)) as run:
        await run.until(lambda: run.state == "FINISHED")
    assert run.status.boundaries_over_budget == 2
    assert run.events.count("tolaria.epoch_budget_exceeded") == 2
    assert run.sample("tolaria.epochs.failed") == 0


async def test_a_drain_ends_the_run_after_its_step() -> None:
    """As after SIGTERM: the step is finished, the run ends, and refuses to be paused while it ends."""
    run = new_run(FakePeers(), job="GatedJob")
    async with running(run):
        job = gate(run)
        await entered(job)
        await run.run.drain(1.0)
        assert run.state == "DRAINING"
        with pytest.raises(WrongStateError):
            await run.run.pause("x")
        job.passes.release(100)
        await run.until(lambda: run.state == "FINISHED")
    assert run.status.global_step == 1


async def test_closing_the_lane_times_out() -> None:
    """A microbatch that hangs does not block `close` for longer than its timeout; later the thread ends."""
    run = new_run(FakePeers(), job="GatedJob")
    async with running(run):
        job = gate(run)
        await entered(job)
        assert not await anyio.to_thread.run_sync(run.core.lane.close, 0.05)
        job.passes.release(100)
        assert await anyio.to_thread.run_sync(run.core.lane.close, 10.0)
    assert [t.name for t in threading.enumerate() if t.name == "tolaria-lane"] == []


async def test_an_empty_epoch_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that has no more batches does not fail the run."""
    run = new_run(FakePeers(), epochs=1)
    monkeypatch.setattr(run.module.cursor, "next_batch", lambda: None)
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
    assert "zero_samples" in run.events


class Exiting(GatedJob):
    """Calls sys.exit in its second forward pass."""

    def losses(self, model: object, batch: object) -> object:  # type: ignore[override]
        if self.seen:
            raise SystemExit(3)
        return super().losses(model, batch)  # type: ignore[arg-type]


async def test_a_job_that_calls_exit_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """SystemExit from the job's code ends the run as any exception does."""
    monkeypatch.setattr("support.jobs.GatedJob", Exiting)
    run = new_run(FakePeers(), job="GatedJob")
    async with running(run):
        await run.until(lambda: run.state == "FAILED")
    assert run.status.state_reason.startswith("SystemExit")


async def test_a_resume_wakes_the_caller_of_an_unfinished_pause() -> None:
    """Paused and resumed while the lane is inside a microbatch, the call of `pause` returns."""
    run = new_run(FakePeers(), job="GatedJob")
    async with running(run):
        job = gate(run)
        await entered(job)
        with anyio.fail_after(180):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run.run.pause, "look")
                await run.until(lambda: run.state == "PAUSED")
                await run.run.resume("never mind")
        job.passes.release(10**6)
        await run.run.stop("enough")


async def test_a_failed_run_keeps_its_reason_when_the_service_stops() -> None:
    """A drain after a failure does not replace the reason."""
    run = new_run(FakePeers(), job="LateCrashJob")
    async with running(run):
        await run.until(lambda: run.state == "FAILED")
        await run.run.drain(1.0)
    assert "the disk with the labels is gone" in run.status.state_reason


async def test_the_last_answer_of_a_run_is_still_carried_out() -> None:
    """A command that arrives at the last boundary takes effect before the run ends."""

    async def halve(_state: SystemStatePacket) -> AdaptationCommand | None:
        made = command(COMMAND_OPTIMIZER)
        made.optimizer_adjustment.hyperparameters["lr_factor"] = 0.5
        return made

    async with running(new_run(FakePeers(halve), epochs=1)) as run:
        await run.until(lambda: run.state == "FINISHED")
    assert run.status.commands_accepted == 1
    assert run.status.commands_rejected == 0


class LongValidation(GatedJob):
    """Trains at once; every batch of its endless validation needs a pass."""

    def losses(self, model: object, batch: object) -> object:  # type: ignore[override]
        self.passes.release()
        return super().losses(model, batch)  # type: ignore[arg-type]

    def validation_batches(self) -> Iterator[Batch]:
        while True:
            yield Batch((self.x, self.y), len(self.x))


async def test_a_stop_does_not_wait_for_a_long_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane also ends between two batches of the evaluation."""
    monkeypatch.setattr("support.jobs.GatedJob", LongValidation)
    run = new_run(FakePeers(), job="GatedJob", epochs=1)
    async with running(run):
        await run.until(lambda: run.status.global_step == 8)
        with anyio.fail_after(180):
            await run.run.stop("enough")
    assert run.state == "FINISHED"


class DelayedEvents:
    """Holds the events of a lane back while `delaying`, as a busy event loop does, to deliver them in one frame.

    Made before the lane is started.
    """

    def __init__(self, handle: LaneHandle, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting: list[Event] = []
        self.delaying = False
        self._take_events, self._start = handle.take_events, handle.start
        self._notify: Callable[[], None] = lambda: None
        monkeypatch.setattr(handle, "take_events", self._taken)
        monkeypatch.setattr(handle, "start", self._started)

    def has(self, kind: type[Event]) -> bool:
        """Whether an event of this type is held back."""
        return any(isinstance(event, kind) for event in self.waiting)

    def deliver(self) -> None:
        """Delivers what was held back, and all further events as they arrive."""
        self.delaying = False
        self._notify()

    def _started(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._start(notify)

    def _taken(self) -> list[Event]:
        self.waiting += self._take_events()
        if self.delaying:
            return []
        events, self.waiting = self.waiting, []
        return events


async def test_a_command_after_an_epochs_end_is_not_undone_by_the_epochs_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both events arrive in one frame: the status shows the rates and adjustments of the command, which are newer."""
    peers = FakePeers()
    run = new_run(peers, job="GatedJob", epochs=10**6)
    events = DelayedEvents(run.core.handle, monkeypatch)
    adjustment = Adjustment(
        group=None, factor=0.5, value=None, expires_after_steps=100, origin="operator", request_id="1", reason="calm"
    )
    async with running(run), anyio.create_task_group() as tasks:
        await run.until(lambda: run.state == "RUNNING")
        events.delaying = True
        gate(run).passes.release(8)  # for the first epoch
        await run.until(lambda: events.has(EpochDone))
        tasks.start_soon(run.run.adjust_learning_rate, adjustment)
        await run.until(lambda: events.has(CommandDone))
        events.deliver()
        await run.until(lambda: run.status.epoch == 2)  # its first microbatch gets no pass, so nothing newer arrives
        status = run.run.status()
        assert status.learning_rates == {"host": 0.025}
        assert [shown.request_id for shown in status.adjustments] == ["1"]
        assert run.sample("tolaria.lr_controller.current_lr", {"group": "host"}) == 0.025
        assert status.validation_loss == peers.states[0].validation_loss > 0
        gate(run).passes.release(1000)
        await run.run.stop("enough")


async def test_a_stop_during_the_start_waits_for_it() -> None:
    """The service answers requests before the run has started."""
    run = new_run(FakePeers())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.run.stop, "enough")
        await anyio.wait_all_tasks_blocked()
        assert run.state == "STARTING"
        async with running(run):
            await run.until(lambda: run.state == "FINISHED")
    assert run.status.state_reason == "stopped: enough"


async def test_a_run_that_is_counted_in_steps_ends_at_the_last_one() -> None:
    """Its epochs have as many steps as the settings say, the last one the rest; the controller is asked at each end."""
    peers = FakePeers()
    async with running(new_run(peers, steps=23, evaluate_every_steps=10)) as run:
        await run.until(lambda: run.state == "FINISHED")
        assert run.status.state_reason == "all steps done"
    assert [(s.current_epoch, s.global_step) for s in peers.states] == [(1, 10), (2, 20), (3, 23)]
    assert (run.status.steps, run.status.epochs, run.status.steps_per_epoch) == (23, 0, 10)


async def test_a_run_ends_within_a_pass_if_it_has_all_its_steps() -> None:
    """Without evaluate_every_steps an epoch is a pass; a rollback before the end is trained again."""
    run = new_run(FakePeers(), job="GatedJob", steps=11, sections={"rollback": {"automatic": False, "every_steps": 2}})
    async with running(run):
        gate(run).passes.release(9)
        await run.until(lambda: run.module.global_step == 9)
        gate(run).passes.release(1000)
        await run.until(lambda: run.state == "FINISHED")
    assert (run.status.global_step, run.status.epoch, run.module.progress.batches) == (11, 2, 3)
