"""Profiles of a whole run, asked for through the admin service, by the schedule, and while something goes wrong."""

from __future__ import annotations

import json
import resource
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, get_args

import anyio
import anyio.to_thread
import grpc
import grpc.aio
import pytest
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST
from support.admin import serving_run, stub_of
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.errors import LaneStoppedError, ProfileFailedError, TolariaError, WrongStateError
from tolaria.jobs import Batch
from tolaria.lane.profiling import Region
from tolaria.rollback.protocol import Rollback
from tolaria.rpc import admin as rpc_admin

pytestmark = pytest.mark.anyio

Capture = Callable[[str, int], Awaitable[admin.CaptureProfileResponse]]


def endless(state: Path, job: str = "TinyJob", **profiler: object) -> RunUnderTest:
    """Returns a run that does not end by itself, whose traces go below `state`."""
    rollback = {"automatic": False, "every_steps": 3, "fast_budget_s": 10.0}
    sections: dict[str, object] = {"rollback": rollback, "state": {"dir": str(state)}, "profiler": profiler}
    return new_run(FakePeers(), epochs=10**6, job=job, sections=sections)


def value(run: RunUnderTest, name: str) -> float | None:
    """Returns the value of a metric of profiles."""
    return run.sample(f"tolaria.profiler.{name}")


def counters(run: RunUnderTest) -> tuple[float | None, float | None, float | None]:
    """Returns whether a profile is being taken, and the numbers of traces written and failed."""
    return value(run, "enabled"), value(run, "traces_emitted_total"), value(run, "traces_failed_total")


def in_thread(read: Callable[[], Any]) -> Any:
    """Runs a blocking call in a worker thread."""
    return anyio.to_thread.run_sync(read)


async def train(run: RunUnderTest) -> None:
    """Waits until more than ten further steps are done."""
    step = run.status.global_step
    await run.until(lambda: run.status.global_step > step + 10)


@asynccontextmanager
async def served(run: RunUnderTest) -> AsyncIterator[Capture]:
    """Yields the run's CaptureProfile behind a server, as a function of request_id and number of steps."""
    async with serving_run(run) as channel:
        call = stub_of(channel).CaptureProfile
        yield lambda request_id, steps: call(
            admin.CaptureProfileRequest(request_id=request_id, reason="slow", active_steps=steps)
        )


async def error_of(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    """Returns the error of a call."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


async def test_a_profile_shows_every_region_of_the_lane(tmp_path: Path) -> None:
    """Steps, the epoch's end and a rollback are marked, with the lane's operations; a repeat gets the same answer."""
    run = endless(tmp_path)
    async with running(run), served(run) as capture, anyio.create_task_group() as tasks:
        await run.until(lambda: run.status.global_step > 20)
        run.core.lane.hold("test")  # so that the rollback is within the window
        answers: list[admin.CaptureProfileResponse] = []

        async def ask_twice() -> None:
            answers.append(await capture("r", 12))
            answers.append(await capture("r", 12))

        tasks.start_soon(ask_twice)
        await run.until(lambda: value(run, "enabled") == 1)
        back = await run.run.roll_back(Rollback(ROLLBACK_TIER_FAST, None, "look", "operator"))
        run.core.lane.release("test")
        await run.until(lambda: len(answers) == 2)
        await train(run)
    first, repeated = answers
    assert first == repeated
    assert first.global_step == back.restored_step + 12
    assert counters(run) == (0, 1, 0)
    path = Path(first.path)
    assert path.parent == tmp_path / "traces"
    text = await in_thread(path.read_text)
    assert first.size_bytes == len(text)
    events = json.loads(text)["traceEvents"]
    marked = [event for event in events if event.get("cat") == "user_annotation" and event["name"] in get_args(Region)]
    counts = Counter(event["name"] for event in marked)
    assert {counts.pop(name) for name in ("forward", "backward", "merge", "optimizer")} == {12}
    assert counts.pop("rollback") == 1
    assert counts.pop("boundary") >= 2  # evaluation, and the wait for the next epoch
    assert not counts
    linear = next(event for event in events if event["name"] == "aten::linear")
    assert {event["tid"] for event in marked} == {linear["tid"]}


async def test_the_schedule_takes_profiles_but_not_in_conservative_mode(tmp_path: Path) -> None:
    """An operator gets a profile in the mode all the same."""
    run = endless(tmp_path, every_steps=5, active_steps=2)
    async with running(run):
        await run.until(lambda: value(run, "traces_emitted_total") == 2)
        run.safeguards.mode.force_on()
        await train(run)  # past a profile that had been asked for before
        await run.until(lambda: value(run, "enabled") == 0)
        taken = await run.run.capture_profile(3)
        before = value(run, "traces_emitted_total")
        await train(run)
        assert value(run, "traces_emitted_total") == before
        assert taken.trace.steps == 3
        run.safeguards.mode.force_off()
        await run.until(lambda: (value(run, "traces_emitted_total") or 0) > (before or 0))


@contextmanager
def file_in_place_of_the_directory(state: Path) -> Iterator[None]:
    """Puts a file where the directory of traces should be."""
    (state / "traces").write_text("in the way")
    yield
    (state / "traces").unlink()


@contextmanager
def dangling_directory(state: Path) -> Iterator[None]:
    """Makes the directory of traces a link to a place where nothing can be created."""
    (state / "traces").symlink_to(state / "nowhere" / "else")
    yield
    (state / "traces").unlink()


@contextmanager
def full_disk(_state: Path) -> Iterator[None]:
    """Limits files to their first bytes, which torch's exporter does not report."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("fault", [file_in_place_of_the_directory, dangling_directory, full_disk])
async def test_training_goes_on_when_no_trace_can_be_written(
    tmp_path: Path, fault: Callable[[Path], AbstractContextManager[None]]
) -> None:
    """The caller gets the reason, which is counted and an event; the next profile is taken once the cause is gone."""
    state = tmp_path / "state"
    await in_thread(state.mkdir)
    run = endless(state)
    async with running(run):
        await run.until(lambda: run.status.global_step > 3)
        cause = fault(state)
        await in_thread(cause.__enter__)
        try:
            with pytest.raises(ProfileFailedError, match="export"):
                await run.run.capture_profile(2)
        finally:
            await in_thread(lambda: cause.__exit__(None, None, None))
        assert counters(run) == (0, 0, 1)
        assert run.events.count("tolaria.profiler.export_failed") == 1
        await train(run)
        taken = await run.run.capture_profile(2)
        assert await in_thread(Path(taken.trace.path).exists)


async def test_a_removed_directory_is_created_again(tmp_path: Path) -> None:
    """The directory of traces may be removed between two profiles."""
    run = endless(tmp_path)
    async with running(run):
        for _ in range(2):
            taken = await run.run.capture_profile(2)
            await in_thread(Path(taken.trace.path).unlink)
            await in_thread((tmp_path / "traces").rmdir)
        assert value(run, "traces_emitted_total") == 2
        await train(run)


async def test_refused_requests_get_the_reason(tmp_path: Path) -> None:
    """Too many steps name the field; a second profile, an ended run and an end within the profile are errors."""
    run = endless(tmp_path)
    async with running(run), served(run) as capture:
        await run.until(lambda: run.status.global_step > 3)
        refused = await error_of(capture("many", 1001))
        assert refused.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "active_steps" in (refused.details() or "")
        run.core.lane.hold("test")  # so that the profile does not end
        async with anyio.create_task_group() as tasks:
            errors: list[grpc.aio.AioRpcError] = []

            async def ask() -> None:
                with anyio.fail_after(180):
                    errors.append(await error_of(capture("first", 5)))

            tasks.start_soon(ask)
            await run.until(lambda: value(run, "enabled") == 1)
            refused = await error_of(capture("second", 5))
            assert refused.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert "a profile is being taken" in (refused.details() or "")
            await run.run.stop("enough")
        [ended] = errors
        assert ended.code() == grpc.StatusCode.ABORTED
        assert "the last step of the profile" in (ended.details() or "")
        refused = await error_of(capture("late", 5))
        assert refused.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "has ended" in (refused.details() or "")
    assert counters(run) == (0, 0, 0)
    assert not (tmp_path / "traces").exists()


async def test_a_call_times_out_and_the_profile_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane is held within the profile for longer than the call may wait; the trace is written later."""
    monkeypatch.setattr(rpc_admin, "PROFILE_S", 0.05)
    run = endless(tmp_path)
    async with running(run), served(run) as capture:
        await run.until(lambda: run.status.global_step > 3)
        run.core.lane.hold("test")
        refused = await error_of(capture("r", 2))
        assert refused.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "the request remains in effect" in (refused.details() or "")
        run.core.lane.release("test")
        await run.until(lambda: value(run, "traces_emitted_total") == 1)


async def test_an_exception_of_the_job_ends_the_profile(tmp_path: Path) -> None:
    """The run fails for the job's reason, and the caller of the profile gets an error."""
    run = endless(tmp_path, job="GatedJob")
    async with running(run), anyio.create_task_group() as tasks:
        errors: list[TolariaError] = []

        async def ask() -> None:
            try:
                with anyio.fail_after(180):
                    await run.run.capture_profile(100)
            except TolariaError as error:
                errors.append(error)

        tasks.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        run.job.passes.release()
        await run.until(lambda: value(run, "enabled") == 1)

        def broken(_model: nn.Module, _batch: Batch) -> Mapping[str, Tensor]:
            raise ZeroDivisionError("no labels")

        run.job.losses = broken
        run.job.passes.release()
        await run.until(lambda: run.state == "FAILED")
    assert [type(error) for error in errors] == [LaneStoppedError]
    assert "ZeroDivisionError" in run.status.state_reason
    assert value(run, "enabled") == 0


async def test_the_jobs_own_profiler_has_precedence(tmp_path: Path) -> None:
    """While it runs no other profile is taken: the request is refused, and the job's profiler goes on undisturbed."""
    run = endless(tmp_path)
    losses, jobs = run.job.losses, profile(activities=[ProfilerActivity.CPU], acc_events=True)

    def profiled(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        if run.job.seen == 5:
            jobs.start()
        if stopping:
            jobs.stop()
            run.job.losses = losses
        found: Mapping[str, Tensor] = losses(model, batch)
        return found

    stopping: list[bool] = []
    run.job.losses = profiled
    async with running(run):
        await run.until(lambda: run.status.global_step > 10)
        with pytest.raises(WrongStateError, match="the job's own profiler is running"):
            await run.run.capture_profile(2)
        assert run.events.count("tolaria.profiler.export_failed") == 1
        stopping.append(True)
        await train(run)
        await run.run.capture_profile(2)
    assert [entry for entry in jobs.key_averages() if entry.key == "aten::linear"]
