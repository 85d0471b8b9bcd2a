from __future__ import annotations

import threading
from collections.abc import Iterator

import anyio
import anyio.lowlevel
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

pytestmark = pytest.mark.anyio


def gate(run: RunUnderTest) -> GatedJob:
    """The run's job, whose microbatches the test lets pass."""
    assert isinstance(run.job, GatedJob)
    return run.job


async def entered(job: GatedJob) -> None:
    """Wait until the lane stands inside a microbatch."""
    with anyio.fail_after(10):
        while not job.entered.acquire(blocking=False):
            await anyio.sleep(0.002)


async def test_a_run_trains_all_epochs_and_learns() -> None:
    """Every epoch is trained, evaluated and told; the loss falls; the run finishes."""
    peers = FakePeers()
    async with running(new_run(peers, epochs=4)) as run:
        await run.until(lambda: run.state == "FINISHED")
    assert run.status.global_step == 32
    assert run.status.samples_total == 4 * 64
    assert [s.current_epoch for s in peers.states] == [1, 2, 3, 4]
    assert [s.global_step for s in peers.states] == [8, 16, 24, 32]
    assert peers.states[-1].training_loss < peers.states[0].training_loss
    assert run.sample("tolaria.epochs.total") == 4
    assert run.sample("tolaria.training.state", {"state": "finished"}) == 1
    assert run.sample("tolaria.step.duration_seconds_count") == 32


async def test_a_pause_takes_effect_between_two_microbatches() -> None:
    """The lane stands after the microbatch it is in, with accumulation in the middle of a step; nothing moves."""
    run = new_run(FakePeers(), job="GatedJob", accumulate=4, epochs=1)
    async with running(run):
        job = gate(run)
        await entered(job)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.run.pause, "look at it")
            await run.until(lambda: run.state == "PAUSED")
            job.passes.release()  # lets the one microbatch end that is under way
        before = [p.detach().clone() for p in run.module.parameters]
        job.passes.release(2)
        assert not await anyio.to_thread.run_sync(lambda: job.entered.acquire(timeout=0.1))
        assert run.run.global_step == 0
        after = run.module.parameters
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        job.passes.release(100)
        run.run.resume("go on")
        await run.until(lambda: run.state == "FINISHED")
    assert run.status.global_step == 2


async def test_a_paused_run_ends_as_the_one_that_was_not() -> None:
    """Holding and going on changes no bit of the result."""

    async def final(*, pausing: bool) -> list[torch.Tensor]:
        run = new_run(FakePeers(), epochs=3, accumulate=2, options={"dropout": 0.3})
        async with running(run):
            if pausing:
                for _ in range(5):
                    if run.state != "RUNNING":
                        break
                    await run.run.pause("a while")
                    run.run.resume("on")
                    await anyio.lowlevel.checkpoint()
            await run.until(lambda: run.state == "FINISHED")
        return [p.detach() for p in run.module.parameters]

    plain, paused = await final(pausing=False), await final(pausing=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, paused, strict=True))


async def test_pausing_twice_and_resuming_twice_is_no_mistake() -> None:
    """Asking for what is already so succeeds."""
    run = new_run(FakePeers(), job="GatedJob")
    async with running(run):
        job = gate(run)
        await entered(job)
        job.passes.release()
        await run.run.pause("one")
        await run.run.pause("two")
        run.run.resume("one")
        run.run.resume("two")
        assert run.state == "RUNNING"
        job.passes.release(1000)
        await run.run.stop("enough")


async def test_a_stop_finishes_the_step_and_ends_the_run() -> None:
    """Stopped in a microbatch, the step is finished first; then the run is over and cannot be paused."""
    run = new_run(FakePeers(), job="GatedJob", accumulate=2)
    async with running(run):
        job = gate(run)
        await entered(job)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.run.stop, "enough")
            await anyio.sleep(0.01)
            job.passes.release(100)
        assert run.state == "FINISHED"
        assert run.status.global_step == 1
        assert run.status.state_reason == "stopped: enough"
        for refused in (run.run.pause("x"), run.run.stop("x")):
            with pytest.raises(WrongStateError):
                await refused
        with pytest.raises(WrongStateError):
            run.run.resume("x")


async def test_a_paused_run_can_be_stopped() -> None:
    """Held in the middle of a step, a stop gives the step up and ends."""
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


async def test_the_jobs_own_failure_fails_the_run_with_its_words() -> None:
    """What the job raises in the middle of training ends the run, not the service."""
    run = new_run(FakePeers(), job="LateCrashJob")
    async with running(run):
        await run.until(lambda: run.state == "FAILED")
    assert run.status.state_reason == "RuntimeError: the disk with the labels is gone"
    assert run.run.status().health.summary == run.status.state_reason


async def test_steps_that_are_not_finite_hold_the_run() -> None:
    """A few are passed over with an event each; a row of them holds the run, and resuming gives it another row."""
    control = ControlSettings(boundary_budget_ms=2000, tamiyo_budget_ms=1000, max_void_steps=3)
    run = new_run(FakePeers(), control=control, options={"poison_from": 2, "poison_steps": 4}, epochs=2)
    async with running(run):
        await run.until(lambda: run.state == "PAUSED")
        assert run.status.state_reason == "3 steps in a row were not finite"
        run.run.resume("go on")
        await run.until(lambda: run.state in {"FINISHED", "PAUSED"})
        if run.state == "PAUSED":
            run.run.resume("go on")
        await run.until(lambda: run.state == "FINISHED")
    assert run.events.count("tolaria.non_finite_step") == 4
    assert run.status.global_step == 12


async def test_a_slow_controller_holds_training_up_no_longer_than_its_budget() -> None:
    """Tamiyo hangs: every boundary ends with the budget, training goes on, and she is asked one at a time."""
    release = anyio.Event()
    asked = 0

    async def slow(_state: SystemStatePacket) -> AdaptationCommand | None:
        nonlocal asked
        asked += 1
        await release.wait()
        return None

    control = ControlSettings(boundary_budget_ms=400, tamiyo_budget_ms=12)
    run = new_run(FakePeers(slow), control=control, epochs=5)
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
        assert asked == 1
        assert sorted(run.status.boundaries_ms)[2] < 180
        release.set()
        await run.until(lambda: run.status.tamiyo_answer == "no change")


async def test_a_late_answer_is_applied_and_a_stale_one_dropped() -> None:
    """What comes after the boundary still counts, unless training has moved on too far."""

    async def outcome(max_staleness_steps: int) -> RunUnderTest:
        release = anyio.Event()

        async def late(state: SystemStatePacket) -> AdaptationCommand | None:
            if state.current_epoch > 1:
                return None
            await release.wait()
            return command(COMMAND_SEED)

        control = ControlSettings(boundary_budget_ms=400, tamiyo_budget_ms=12, max_staleness_steps=max_staleness_steps)
        run = new_run(FakePeers(late), control=control, epochs=10**6)
        async with running(run):
            await run.until(lambda: run.status.global_step > 24)
            release.set()
            await run.until(lambda: run.status.tamiyo_answer == "no change")  # the newest question's answer
            await run.run.stop("enough")
        return run

    applied, dropped = await outcome(10**9), await outcome(3)
    assert applied.progress.commands_accepted == 1
    assert applied.progress.last_command is not None
    assert dropped.progress.commands_accepted == 0
    assert dropped.progress.last_command is None


async def test_a_deterministic_boundary_waits_for_the_answer() -> None:
    """With training.deterministic the answer is there before training goes on, however long past the budget."""

    async def slow(_state: SystemStatePacket) -> AdaptationCommand | None:
        await anyio.sleep(0.05)
        return command(COMMAND_SEED)

    control = ControlSettings(boundary_budget_ms=2, tamiyo_budget_ms=1)
    try:
        run = new_run(FakePeers(slow), control=control, epochs=2, deterministic=True)
        async with running(run):
            await run.until(lambda: run.state == "FINISHED")
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert run.status.commands_accepted == 2
    assert run.status.boundaries_over_budget == 0
    assert min(run.status.boundaries_ms) >= 50


async def test_the_controller_can_pause_the_run() -> None:
    """COMMAND_PAUSE holds the run and says who asked."""

    async def pause_once(state: SystemStatePacket) -> AdaptationCommand | None:
        return command(COMMAND_PAUSE) if state.current_epoch == 1 else None

    run = new_run(FakePeers(pause_once), epochs=2)
    async with running(run):
        await run.until(lambda: run.state == "PAUSED")
        assert run.status.state_reason == "asked by test"
        run.run.resume("looked at it")
        await run.until(lambda: run.state == "FINISHED")


async def test_seeds_and_answers_show_in_the_status() -> None:
    """What Kasmina desires and what both said is in GetStatus and in the metrics."""

    async def germinate(_state: SystemStatePacket) -> AdaptationCommand | None:
        return command(COMMAND_SEED)

    peers = FakePeers(germinate, [SeedState(seed_id="a", stage=SEED_STAGE_TRAINING)])
    async with running(new_run(peers, epochs=2)) as run:
        await run.until(lambda: run.state == "FINISHED")
    status = run.run.status()
    assert [s.seed_id for s in status.seeds] == ["a"]
    assert status.tamiyo_answer == "germinate seed-1"
    assert status.kasmina_answer == "applied: germinated"
    assert status.commands_accepted == 2
    assert status.last_command.command_type == COMMAND_SEED
    assert run.sample("tolaria.seeds.active", {"stage": "training"}) == 1
    assert run.sample("tolaria.command.applied_total", {"type": "seed"}) == 2
    assert len(peers.applied) == 2
    assert list(peers.states[-1].seed_states) == []  # the tiny job has no slot for it, and that goes back to her:
    assert [seed_id for seed_id, _ in peers.refusals] == ["a"]


async def test_a_command_that_fails_a_check_changes_nothing() -> None:
    """A wrong version is refused: counted by reason, evented, shown, and Kasmina never hears of it."""

    async def lie(_state: SystemStatePacket) -> AdaptationCommand | None:
        return command(COMMAND_SEED, version=9)

    peers = FakePeers(lie)
    async with running(new_run(peers, epochs=2)) as run:
        await run.until(lambda: run.state == "FINISHED")
    assert peers.applied == []
    assert run.status.commands_rejected == 2
    assert run.status.tamiyo_answer == "rejected: wrong_version"
    assert run.sample("tolaria.command.rejected_total", {"reason": "wrong_version"}) == 2
    assert run.events.count("command_rejected") == 2


async def test_a_breach_of_the_budget_is_counted_and_told() -> None:
    """A boundary over its budget is a breach: in the status, as an event, as a failed epoch."""
    control = ControlSettings(boundary_budget_ms=0.01, tamiyo_budget_ms=0.01)
    async with running(new_run(FakePeers(), control=control, epochs=2)) as run:
        await run.until(lambda: run.state == "FINISHED")
    assert run.status.boundaries_over_budget == 2
    assert run.events.count("tolaria.epoch_budget_exceeded") == 2
    assert run.sample("tolaria.epochs.failed") == 2


async def test_a_drain_ends_the_run_after_its_step() -> None:
    """SIGTERM's way: the step is finished, the run is over, pausing is refused while it ends."""
    run = new_run(FakePeers(), job="GatedJob")
    async with running(run):
        job = gate(run)
        await entered(job)
        run.run.drain()
        assert run.state == "DRAINING"
        with pytest.raises(WrongStateError):
            await run.run.pause("x")
        job.passes.release(100)
        await run.until(lambda: run.state == "FINISHED")
    assert run.status.global_step == 1


async def test_a_lane_that_does_not_end_is_told() -> None:
    """A microbatch that hangs for ever cannot keep `close` from returning."""
    run = new_run(FakePeers(), job="GatedJob")
    job = gate(run)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.run.run)
        await entered(job)
        assert not await anyio.to_thread.run_sync(run.run.close, 0.05)
        job.passes.release(100)
        assert await anyio.to_thread.run_sync(run.run.close, 10.0)
        tasks.cancel_scope.cancel()
    assert [t.name for t in threading.enumerate() if t.name == "tolaria-lane"] == []


async def test_an_empty_epoch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that has dried up is an event, not a crash."""
    run = new_run(FakePeers(), epochs=1)
    monkeypatch.setattr(run.module.cursor, "begin_epoch", lambda _epoch: None)
    run.module.cursor._chunks = ()  # type: ignore[attr-defined]
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
    """SystemExit out of the job's code ends the run with its name, not the lane in silence."""
    monkeypatch.setattr("support.jobs.GatedJob", Exiting)
    run = new_run(FakePeers(), job="GatedJob")
    async with running(run):
        await run.until(lambda: run.state == "FAILED")
    assert run.status.state_reason.startswith("SystemExit")


async def test_a_resume_that_overtakes_a_pause_leaves_nobody_waiting() -> None:
    """Paused and resumed while the lane is inside a microbatch: the first caller is answered all the same."""
    run = new_run(FakePeers(), job="GatedJob")
    async with running(run):
        job = gate(run)
        await entered(job)
        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run.run.pause, "look")
                await run.until(lambda: run.state == "PAUSED")
                run.run.resume("never mind")
        job.passes.release(10**6)
        await run.run.stop("enough")


async def test_an_ended_run_keeps_its_reason_when_the_service_stops() -> None:
    """SIGTERM after a failure does not hide why it failed."""
    run = new_run(FakePeers(), job="LateCrashJob")
    async with running(run):
        await run.until(lambda: run.state == "FAILED")
        run.run.drain()
    assert "the disk with the labels is gone" in run.status.state_reason


async def test_the_last_answer_of_a_run_is_still_carried_out() -> None:
    """A command that comes at the last boundary takes effect before the run ends."""

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
    """An ending reaches the lane between two batches of the evaluation as well."""
    monkeypatch.setattr("support.jobs.GatedJob", LongValidation)
    run = new_run(FakePeers(), job="GatedJob", epochs=1)
    async with running(run):
        await run.until(lambda: run.status.global_step == 8)
        with anyio.fail_after(10):
            await run.run.stop("enough")
    assert run.state == "FINISHED"
