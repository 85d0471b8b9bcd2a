from __future__ import annotations

import json
import resource
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
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
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub, add_TolariaAdminServiceServicer_to_server
from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST
from support.answers import FakeAnswers
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.errors import LaneStoppedError, ProfileFailedError, TolariaError, WrongStateError
from tolaria.grpc_server import grpc_server
from tolaria.jobs import Batch
from tolaria.rpc import recovery as rpc_recovery
from tolaria.rpc.admin import AdminService
from tolaria.rpc.requests import RequestLedger
from tolaria.training.recovery.operators import RecoveryDesk
from tolaria.rollback.protocol import Rollback
from tolaria.training.safety_desk import SafetyDesk
from tolaria.values.profiling import Region

pytestmark = pytest.mark.anyio


def forever(state: Path, job: str = "TinyJob", **profiler: object) -> RunUnderTest:
    """A run that does not end by itself; its traces go below `state`."""
    rollback = {"automatic": False, "every_steps": 3, "fast_budget_s": 10.0}
    sections: dict[str, object] = {"rollback": rollback, "state": {"dir": str(state)}, "profiler": profiler}
    return new_run(FakePeers(), epochs=10**6, job=job, sections=sections)


def value(run: RunUnderTest, name: str) -> float | None:
    """Of a metric of profiles."""
    return run.sample(f"tolaria.profiler.{name}")


def window_open(run: RunUnderTest) -> bool:
    """Whether the lane's profiler runs."""
    return run.core.link._lane._profiler._window.open


def in_thread(read: Callable[[], Any]) -> Any:
    """What blocks, off the event loop."""
    return anyio.to_thread.run_sync(read)


async def goes_on(run: RunUnderTest) -> None:
    """Training does."""
    step = run.status.global_step
    await run.until(lambda: run.status.global_step > step + 10)


@asynccontextmanager
async def served(run: RunUnderTest) -> AsyncIterator[Callable[[str, int], Any]]:
    """The run's CaptureProfile behind a real server."""

    def register(server: grpc.aio.Server) -> None:
        service = AdminService(
            run.run,
            safety=SafetyDesk(run.run, run.safety),
            recovery=RecoveryDesk(run.run, run.journal, run.status.snapshots),
            complete=lambda _status: None,
            closing=anyio.Event(),
            interval_s=60.0,
            ledger=RequestLedger(100, FakeAnswers()),
        )
        add_TolariaAdminServiceServicer_to_server(service, server)

    async with (
        grpc_server("test", "127.0.0.1:0", register, service_names=["x"], grace_s=1.0) as server,
        grpc.aio.insecure_channel(str(server.address)) as channel,
    ):
        call = TolariaAdminServiceStub(channel).CaptureProfile
        yield lambda request_id, steps: call(
            admin.CaptureProfileRequest(request_id=request_id, reason="slow", active_steps=steps)
        )


async def test_a_profile_shows_every_region_of_the_lane(tmp_path: Path) -> None:
    """Steps, the epoch's end and a rollback within the window are all marked, with the lane's operations in them."""
    run = forever(tmp_path)
    async with running(run), served(run) as capture, anyio.create_task_group() as tasks:
        await run.until(lambda: run.status.global_step > 20)
        run.core.lane.hold("test")  # so that the rollback is within the window
        answers: list[admin.CaptureProfileResponse] = []

        async def ask() -> None:
            answers.append(await capture("r", 12))
            answers.append(await capture("r", 12))

        tasks.start_soon(ask)
        await run.until(lambda: value(run, "enabled") == 1)
        back = await run.run.roll_back(Rollback(ROLLBACK_TIER_FAST, None, "look", "operator"))
        run.core.lane.release("test")
        await run.until(lambda: len(answers) == 2)
        await goes_on(run)
    first, repeated = answers
    assert first == repeated
    assert first.global_step == back.restored_step + 12
    assert (value(run, "enabled"), value(run, "traces_emitted_total"), value(run, "traces_failed_total")) == (0, 1, 0)
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


async def test_profiles_come_by_themselves_but_not_in_conservative_mode(tmp_path: Path) -> None:
    """The schedule rests with the mode; who asks then is served all the same."""
    run = forever(tmp_path, every_steps=5, active_steps=2)
    async with running(run):
        await run.until(lambda: value(run, "traces_emitted_total") == 2)
        run.safeguards.mode.force_on()
        await goes_on(run)  # past the fence of one that was asked for before
        await run.until(lambda: value(run, "enabled") == 0)
        taken = await run.run.capture_profile("r", 3)
        before = value(run, "traces_emitted_total")
        await goes_on(run)
        assert value(run, "traces_emitted_total") == before
        assert taken.trace.steps == 3
        run.safeguards.mode.force_off()
        await run.until(lambda: (value(run, "traces_emitted_total") or 0) > (before or 0))


@contextmanager
def a_file_in_its_place(state: Path) -> Iterator[None]:
    """Where the directory should be."""
    (state / "traces").write_text("in the way")
    yield
    (state / "traces").unlink()


@contextmanager
def no_place(state: Path) -> Iterator[None]:
    """The folder of traces leads nowhere: nothing can be made there."""
    (state / "traces").symlink_to(state / "nowhere" / "else")
    yield
    (state / "traces").unlink()


@contextmanager
def full_disk(state: Path) -> Iterator[None]:
    """No file may grow beyond its first bytes; the exporter does not tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("spoilt", [a_file_in_its_place, no_place, full_disk])
async def test_training_goes_on_when_there_can_be_no_trace(
    tmp_path: Path, spoilt: Callable[[Path], AbstractContextManager[None]]
) -> None:
    """An answer with the reason, one count, one event; the next profile is taken once the cause is gone."""
    state = tmp_path / "state"
    await in_thread(state.mkdir)
    run = forever(state)
    async with running(run):
        await run.until(lambda: run.status.global_step > 3)
        cause = spoilt(state)
        await in_thread(cause.__enter__)
        try:
            with pytest.raises(ProfileFailedError, match="export"):
                await run.run.capture_profile("r", 2)
        finally:
            await in_thread(lambda: cause.__exit__(None, None, None))
        assert (value(run, "traces_emitted_total"), value(run, "traces_failed_total")) == (0, 1)
        assert run.events.count("tolaria.profiler.export_failed") == 1
        await goes_on(run)
        taken = await run.run.capture_profile("again", 2)
        assert await in_thread(Path(taken.trace.path).exists)


async def test_a_directory_that_is_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    """Between two traces, and within a window."""
    run = forever(tmp_path)
    async with running(run):
        for request_id in ("1", "2"):
            taken = await run.run.capture_profile(request_id, 2)
            await in_thread(Path(taken.trace.path).unlink)
            await in_thread((tmp_path / "traces").rmdir)
        assert value(run, "traces_emitted_total") == 2
        await goes_on(run)


async def test_requests_that_cannot_be_served_say_why(tmp_path: Path) -> None:
    """Too many steps name the field; a second window, and a run that has ended, are wrong states."""
    run = forever(tmp_path)
    async with running(run), served(run) as capture:
        await run.until(lambda: run.status.global_step > 3)
        refused = await failure(capture("many", 1001))
        assert refused.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "active_steps" in (refused.details() or "")
        run.core.lane.hold("test")  # so that the window stays open
        async with anyio.create_task_group() as tasks:
            endings: list[grpc.aio.AioRpcError] = []

            async def ask() -> None:
                with anyio.fail_after(10):
                    endings.append(await failure(capture("first", 5)))

            tasks.start_soon(ask)
            await run.until(lambda: value(run, "enabled") == 1)
            refused = await failure(capture("second", 5))
            assert refused.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert "a profile is being taken" in (refused.details() or "")
            await run.run.stop("enough")
        [ended] = endings
        assert ended.code() == grpc.StatusCode.ABORTED
        assert "there is no trace" in (ended.details() or "")
        refused = await failure(capture("late", 5))
        assert refused.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "has ended" in (refused.details() or "")
    assert not window_open(run)
    assert (value(run, "enabled"), value(run, "traces_emitted_total"), value(run, "traces_failed_total")) == (0, 0, 0)
    assert not (tmp_path / "traces").exists()


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """How a call failed."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


async def test_an_answer_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane that stands within the window outlasts the call; the trace is written when the steps are done."""
    monkeypatch.setattr(rpc_recovery, "PROFILE_TIMEOUT_S", 0.05)
    run = forever(tmp_path)
    async with running(run), served(run) as capture:
        await run.until(lambda: run.status.global_step > 3)
        run.core.lane.hold("test")  # for long
        refused = await failure(capture("r", 2))
        assert refused.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "the request stands" in (refused.details() or "")
        run.core.lane.release("test")
        await run.until(lambda: value(run, "traces_emitted_total") == 1)


async def test_a_job_that_raises_within_a_window_ends_it(tmp_path: Path) -> None:
    """The run fails for the job's reason, and who waits for the profile is told."""
    run = forever(tmp_path, job="GatedJob")
    async with running(run), anyio.create_task_group() as tasks:
        told: list[TolariaError] = []

        async def ask() -> None:
            try:
                with anyio.fail_after(10):
                    await run.run.capture_profile("r", 100)
            except TolariaError as error:
                told.append(error)

        tasks.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        run.job.passes.release()
        await run.until(lambda: value(run, "enabled") == 1)

        def broken(_model: nn.Module, _batch: Batch) -> Mapping[str, Tensor]:
            raise ZeroDivisionError("no labels")

        run.job.losses = broken
        run.job.passes.release()
        await run.until(lambda: run.state == "FAILED")
    assert [type(error) for error in told] == [LaneStoppedError]
    assert "ZeroDivisionError" in run.status.state_reason
    assert not window_open(run)
    assert value(run, "enabled") == 0


async def test_the_job_s_own_profiler_comes_first(tmp_path: Path) -> None:
    """While it runs there is no other: refused with the reason, and the job's goes on undisturbed."""
    run = forever(tmp_path)
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
            await run.run.capture_profile("r", 2)
        assert run.events.count("tolaria.profiler.export_failed") == 1
        stopping.append(True)
        await goes_on(run)
        await run.run.capture_profile("again", 2)
    assert [entry for entry in jobs.key_averages() if entry.key == "aten::linear"]
