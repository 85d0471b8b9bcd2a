from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest

from support.events import RecordingEmitter
from support.lanes import FakeLane
from tolaria.config import ProfilerSettings
from tolaria.errors import InvalidFieldError, LaneStoppedError, ProfileFailedError, TolariaError, WrongStateError
from tolaria.lane.messages import (
    CaptureProfile,
    CommandDone,
    Event,
    LaneEnded,
    ProfileDone,
    ProfileStarted,
    StepDone,
    TraceFailed,
    TraceWritten,
)
from tolaria.run.lane_client import LaneClient
from tolaria.run.profiling import Profiles, ProfileTaken
from tolaria.run.run_state import RUN
from tolaria.run.safety import BREAKERS, Safeguards
from tolaria.run.safety_telemetry import SafetyTelemetry
from tolaria.run.status import RunStatus
from tolaria.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio

TRACE = TraceWritten("/traces/t.json", 10, 5, 0.1, 0)


class ProfiledLane:
    """Profiles of a scripted lane, whose events are applied as a run applies them."""

    def __init__(self, **settings: int) -> None:
        self.lane = FakeLane(global_step=3)
        self.client = LaneClient(self.lane)
        self.metrics, self.emitter = Metrics(), RecordingEmitter()
        telemetry = SafetyTelemetry(self.metrics, self.emitter, BREAKERS, degraded=False)
        status = RunStatus("run", "job", "test", epochs=1, started_at_s=0.0)
        self.safeguards = Safeguards(telemetry, status, recovery_epochs=3)
        self.profiles = Profiles(
            self.client, ProfilerSettings(**settings), safeguards=self.safeguards, observers=telemetry
        )
        self.outcomes: list[ProfileTaken | str] = []
        self.client.start(self._apply)

    @property
    def requested(self) -> list[int]:
        """Numbers of steps of the profiles that the lane has not started."""
        commands = self.lane.unanswered.values()
        return [command.steps for command in commands if isinstance(command, CaptureProfile)]

    def counters(self) -> tuple[float | None, float | None, float | None]:
        """Returns whether a profile is being taken, and the numbers of traces written and failed."""
        names = ("enabled", "traces_emitted_total", "traces_failed_total")
        value = self.metrics.registry.get_sample_value
        return tuple(value(f"tolaria.profiler.{name}") for name in names)  # type: ignore[return-value]

    async def capture(self, steps: int = 0) -> None:
        """Asks for a profile and notes its outcome."""
        try:
            self.outcomes.append(await self.profiles.capture(steps))
        except TolariaError as error:
            self.outcomes.append(f"{type(error).__name__}: {error}")

    async def answer(self, answer: ProfileStarted | TraceFailed | TolariaError) -> None:
        """Has the lane answer the oldest request."""
        self.lane.answer(answer)
        await anyio.wait_all_tasks_blocked()

    async def end(self, outcome: TraceWritten | TraceFailed, global_step: int = 12) -> None:
        """Has the lane do the last step of the profile."""
        self.lane.emit(ProfileDone(global_step, outcome))
        await anyio.wait_all_tasks_blocked()

    def step(self, times: int = 1) -> None:
        """Applies finished steps."""
        for _ in range(times):
            self.profiles.step(StepDone(1, 1, 0.5, 1.0, 8, 0.01, 0.0, 0.0))

    def _apply(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case CommandDone():
                    pending = self.client.take_pending(event)
                    assert pending is not None
                    self.profiles.started(pending, event)
                    self.client.settle(pending, event)
                case ProfileDone():
                    self.profiles.done(event)
                case LaneEnded():
                    self.client.mark_ended(event)
                    self.profiles.close()
                case _:
                    pass


async def test_a_caller_gets_the_trace() -> None:
    """The number of steps is the settings' by default; the gauge is 1 while the profile is taken."""
    profiled = ProfiledLane(active_steps=7)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(profiled.capture)
        await anyio.wait_all_tasks_blocked()
        assert profiled.requested == [7]
        await profiled.answer(ProfileStarted(7))
        assert profiled.counters() == (1, 0, 0)
        await profiled.end(TRACE)
    assert profiled.outcomes == [ProfileTaken(12, TRACE)]
    assert profiled.counters() == (0, 1, 0)


async def test_a_second_request_is_refused_while_a_profile_is_taken() -> None:
    """The second caller gets the lane's reason; the first one still gets its trace."""
    profiled = ProfiledLane()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(profiled.capture)
        await anyio.wait_all_tasks_blocked()
        await profiled.answer(ProfileStarted(5))
        tasks.start_soon(profiled.capture)
        await anyio.wait_all_tasks_blocked()
        await profiled.answer(WrongStateError("a profile is being taken"))
        assert profiled.outcomes == ["WrongStateError: a profile is being taken"]
        await profiled.end(TRACE)
    assert profiled.outcomes[1:] == [ProfileTaken(12, TRACE)]
    assert profiled.counters() == (0, 1, 0)


@pytest.mark.parametrize(
    ("stage", "error"), [("start", WrongStateError), ("export", ProfileFailedError), ("cap", ProfileFailedError)]
)
async def test_a_failure_is_counted_and_an_event(stage: str, error: type[TolariaError]) -> None:
    """At whichever stage: one count, one event with stage and reason, and an error with the reason."""
    profiled = ProfiledLane()
    failure = TraceFailed(stage, "no room")  # type: ignore[arg-type] # one of the three stages
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(profiled.capture)
        await anyio.wait_all_tasks_blocked()
        if stage == "start":
            await profiled.answer(failure)
        else:
            await profiled.answer(ProfileStarted(5))
            await profiled.end(failure)
    [outcome] = profiled.outcomes
    assert isinstance(outcome, str)
    assert outcome.startswith(error.__name__)
    assert "no room" in outcome
    assert profiled.counters() == (0, 0, 1)
    assert profiled.emitter.names == ["tolaria.profiler.export_failed"]
    assert profiled.emitter.attributes_of("tolaria.profiler.export_failed") == [{"stage": stage, "reason": "no room"}]


@pytest.mark.parametrize("started", [True, False])
async def test_the_end_of_the_lane_ends_every_profile(started: bool) -> None:
    """Before it starts, while it is taken and afterwards: an error at once, which is not a failed trace."""
    profiled = ProfiledLane()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(profiled.capture)
        await anyio.wait_all_tasks_blocked()
        if started:
            await profiled.answer(ProfileStarted(5))
        profiled.lane.emit(LaneEnded(3, None))
    await profiled.capture()
    assert [str(outcome).split(":")[0] for outcome in profiled.outcomes] == [LaneStoppedError.__name__] * 2
    assert profiled.counters() == (0, 0, 0)


async def test_too_many_steps_name_the_field() -> None:
    """Nothing is sent to the lane."""
    profiled = ProfiledLane()
    with pytest.raises(InvalidFieldError, match="active_steps"):
        await profiled.profiles.capture(1001)
    assert profiled.lane.sent == []


async def test_the_schedule_starts_a_profile_at_its_interval() -> None:
    """Not earlier, not while another one is taken, not in conservative mode, and never without a schedule."""
    profiled = ProfiledLane(every_steps=10, active_steps=3)
    profiled.step(9)
    assert profiled.requested == []
    profiled.step()
    assert profiled.requested == [3]
    await profiled.answer(ProfileStarted(3))
    profiled.step(10)
    assert profiled.requested == []
    await profiled.end(TRACE)
    profiled.safeguards.mode.force_on()
    profiled.step(10)
    assert profiled.requested == []
    profiled.safeguards.mode.force_off()
    profiled.step(10)
    assert profiled.requested == [3]
    never = ProfiledLane()
    never.step(10_000)
    assert never.requested == []


async def test_a_held_run_refuses_profiles() -> None:
    """No step would follow; after a resume a profile is possible."""
    profiled = ProfiledLane()
    profiled.client.hold(RUN)
    await profiled.capture()
    assert profiled.outcomes == ["WrongStateError: training is held: there is no step to profile before it is resumed"]
    assert profiled.requested == []
    profiled.client.release(RUN)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(profiled.capture)
        await anyio.wait_all_tasks_blocked()
        assert len(profiled.requested) == 1
        tasks.cancel_scope.cancel()
