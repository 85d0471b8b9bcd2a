from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from support.events import RecordingEmitter
from tolaria.config import ProfilerSettings
from tolaria.errors import InvalidFieldError, LaneStoppedError, ProfileFailedError, WrongStateError
from tolaria.telemetry.metrics import Metrics
from tolaria.telemetry.profiler import ProfileWindow, TraceFailed, TraceWritten
from tolaria.training.fence_desk import FenceDesk
from tolaria.training.fences import CaptureProfile, FenceReport, LaneCommand, ProfileBegun
from tolaria.training.profile_desk import ProfileDesk, ProfileTaken
from tolaria.training.profiling import LaneProfiler
from tolaria.training.record_profile import ProfileRecorder
from tolaria.training.reports import ProfileEnded, StepReport

pytestmark = pytest.mark.anyio

TRACE = TraceWritten(Path("/traces/t.json"), 10, 5, 0.1, 0)


class Bench:
    """A desk before a lane that the test plays."""

    def __init__(self, **settings: int) -> None:
        self.posted: list[tuple[int, LaneCommand]] = []
        self.fences = FenceDesk(lambda ticket, command: self.posted.append((ticket, command)))
        self.metrics, self.emitter = Metrics(), RecordingEmitter()
        self.calm, self.stands = True, False
        self.desk = ProfileDesk(
            self.fences,
            ProfilerSettings(**settings),
            recorder=ProfileRecorder(self.metrics, self.emitter),
            permitted=lambda: self.calm,
            standing=lambda: self.stands,
        )
        self.outcomes: list[ProfileTaken | str] = []

    async def capture(self, request_id: str = "r", steps: int = 0) -> None:
        """Ask, and note what comes of it."""
        try:
            self.outcomes.append(await self.desk.capture(request_id, steps))
        except (WrongStateError, ProfileFailedError, LaneStoppedError) as error:
            self.outcomes.append(f"{type(error).__name__}: {error}")

    def begin(self, result: ProfileBegun | TraceFailed | None = None, error: WrongStateError | None = None) -> None:
        """The lane comes to the fence."""
        ticket, _ = self.posted.pop(0)
        self.fences.take(FenceReport(ticket, 3, result, error))

    def step(self, times: int = 1) -> None:
        """The lane has done a step."""
        for _ in range(times):
            self.desk.step(StepReport(1, 1, 0.5, 1.0, 8, 0.01, 0.0, 0.0))

    def value(self, name: str) -> float | None:
        """Of a metric of profiles."""
        return self.metrics.registry.get_sample_value(f"tolaria.profiler.{name}")


async def test_who_asks_gets_the_trace() -> None:
    """The settings' steps unless told otherwise; the gauge shows the window; a repeat by the same id waits along."""
    bench = Bench(active_steps=7)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.capture)
        await anyio.wait_all_tasks_blocked()
        assert [command for _, command in bench.posted] == [CaptureProfile(7)]
        bench.begin(ProfileBegun(7))
        assert bench.value("enabled") == 1
        tasks.start_soon(bench.capture)
        await anyio.wait_all_tasks_blocked()
        assert not bench.posted
        bench.desk.take(ProfileEnded(12, TRACE))
    assert bench.outcomes == [ProfileTaken(12, TRACE)] * 2
    assert (bench.value("enabled"), bench.value("traces_emitted_total"), bench.value("traces_failed_total")) == (
        0,
        1,
        0,
    )


async def test_a_refusal_goes_to_who_was_refused() -> None:
    """While one profile is taken a second asker is told why not; the first still gets its trace."""
    bench = Bench()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.capture, "first")
        await anyio.wait_all_tasks_blocked()
        bench.begin(ProfileBegun(5))
        tasks.start_soon(bench.capture, "second")
        await anyio.wait_all_tasks_blocked()
        bench.begin(error=WrongStateError("a profile is being taken"))
        await anyio.wait_all_tasks_blocked()
        assert bench.outcomes == ["WrongStateError: a profile is being taken"]
        bench.desk.take(ProfileEnded(12, TRACE))
    assert bench.outcomes[1:] == [ProfileTaken(12, TRACE)]
    assert bench.value("traces_failed_total") == 0


@pytest.mark.parametrize(
    ("stage", "told"), [("start", "WrongStateError"), ("export", "ProfileFailedError"), ("cap", "ProfileFailedError")]
)
async def test_a_failure_is_counted_told_and_answered(stage: str, told: str) -> None:
    """At whichever stage: one count, one event with stage and reason, and the asker has the reason."""
    bench = Bench()
    failure = TraceFailed(stage, "no room")  # type: ignore[arg-type] # of the three stages
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.capture)
        await anyio.wait_all_tasks_blocked()
        if stage == "start":
            bench.begin(failure)
        else:
            bench.begin(ProfileBegun(5))
            bench.desk.take(ProfileEnded(9, failure))
    [outcome] = bench.outcomes
    assert isinstance(outcome, str)
    assert outcome.startswith(told)
    assert "no room" in outcome
    assert (bench.value("enabled"), bench.value("traces_emitted_total"), bench.value("traces_failed_total")) == (
        0,
        0,
        1,
    )
    [event] = bench.emitter.events
    assert event.name == "tolaria.profiler.export_failed"
    assert dict(event.attributes) == {"stage": stage, "reason": "no room"}


@pytest.mark.parametrize("begun", [True, False])
async def test_nobody_waits_for_a_lane_that_has_ended(begun: bool) -> None:
    """Before its fence, within its window, and afterwards: an error, at once; it is no failed trace."""
    bench = Bench()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.capture)
        await anyio.wait_all_tasks_blocked()
        if begun:
            bench.begin(ProfileBegun(5))
        bench.fences.close()
        bench.desk.close()
    await bench.capture("later")
    assert [str(outcome).split(":")[0] for outcome in bench.outcomes] == ["LaneStoppedError"] * 2
    assert (bench.value("enabled"), bench.value("traces_failed_total")) == (0, 0)


async def test_too_many_steps_name_the_field() -> None:
    """The bound is the window's; nothing is posted."""
    bench = Bench()
    with pytest.raises(InvalidFieldError, match="active_steps"):
        await bench.desk.capture("r", 1001)
    assert not bench.posted


async def test_the_schedule_begins_a_profile_every_so_many_steps() -> None:
    """Not before, not while one is open, not in conservative mode, and never where there is no schedule."""
    bench = Bench(every_steps=10, active_steps=3)
    bench.step(9)
    assert not bench.posted
    bench.step()
    assert [command for _, command in bench.posted] == [CaptureProfile(3)]
    bench.begin(ProfileBegun(3))
    bench.step(10)
    assert not bench.posted
    bench.desk.take(ProfileEnded(12, TRACE))
    bench.calm = False
    bench.step(10)
    assert not bench.posted
    bench.calm = True
    bench.step(10)
    assert len(bench.posted) == 1
    never = Bench()
    never.step(10_000)
    assert not never.posted


def test_the_lane_rests_while_the_profiler_is_begun_and_a_trace_is_written(tmp_path: Path) -> None:
    """Both may take longer than a heartbeat; without a window there is nothing to rest from."""
    rests: list[tuple[bool, bool]] = []

    @contextmanager
    def resting() -> Iterator[None]:
        before = window.open
        yield
        rests.append((before, window.open))

    window = ProfileWindow(tmp_path, bytes_max=10**8)
    profiler = LaneProfiler(window, resting=resting)
    assert profiler.step_done(1) is None
    assert profiler.carry_out(1, CaptureProfile(2), 1) == FenceReport(1, 1, ProfileBegun(2), None)
    refused = profiler.carry_out(2, CaptureProfile(2), 1)
    assert isinstance(refused.error, WrongStateError)
    assert profiler.step_done(2) is None
    ended = profiler.step_done(3)
    assert ended is not None
    assert isinstance(ended.outcome, TraceWritten)
    assert ended.global_step == 3
    assert rests == [(False, True), (True, True), (True, False)]


@pytest.mark.anyio
async def test_a_run_that_stands_has_no_steps_to_show() -> None:
    """Nobody is left waiting for steps that do not come; once training goes on there is a profile."""
    bench = Bench()
    bench.stands = True
    await bench.capture()
    assert bench.outcomes == ["WrongStateError: training stands: there is no step to profile before it is resumed"]
    assert bench.posted == []
    bench.stands = False
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.capture)
        await anyio.wait_all_tasks_blocked()
        assert len(bench.posted) == 1
        tasks.cancel_scope.cancel()
