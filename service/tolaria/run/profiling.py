"""Profiles of a run: asked for by operators or by the schedule, one at a time."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

import anyio

from tolaria.config import ProfilerSettings
from tolaria.errors import (
    InvalidFieldError,
    LaneError,
    LaneStoppedError,
    ProfileFailedError,
    TolariaError,
    WrongStateError,
)
from tolaria.lane.messages import CaptureProfile, CommandDone, ProfileDone, ProfileStarted, StepDone
from tolaria.run.lane_client import LaneClient, PendingCommand
from tolaria.run.observers import RunObserver
from tolaria.run.run_state import RUN
from tolaria.run.safety import Safeguards
from tolaria.values.profiling import STEPS_MAX, TraceFailed, TraceWritten


@dataclass(frozen=True, slots=True)
class ProfileTaken:
    """A trace was written; `global_step` is the step after its last one."""

    global_step: int
    trace: TraceWritten


@dataclass(slots=True)
class _Profile:
    """A profile that was asked for; `result` holds once it is `over`."""

    over: anyio.Event = field(default_factory=anyio.Event)
    result: ProfileTaken | TolariaError = field(
        default_factory=lambda: LaneStoppedError("the run has ended before the last step of the profile")
    )

    def end(self, result: ProfileTaken | TolariaError) -> None:
        self.result = result
        self.over.set()


class Profiles:
    """Takes profiles. Used on the event loop only.

    The schedule pauses in conservative mode; an operator who asks in that mode gets a profile.
    """

    def __init__(
        self, lane: LaneClient, settings: ProfilerSettings, *, safeguards: Safeguards, observers: RunObserver
    ) -> None:
        self._lane = lane
        self._settings = settings
        self._safeguards = safeguards
        self._observers = observers
        self._steps_since = 0
        self._asked: dict[asyncio.Future[CommandDone], _Profile] = {}
        self._open: _Profile | None = None

    async def capture(self, active_steps: int) -> ProfileTaken:
        """Profiles the next `active_steps` steps (0: as many as the settings say) and waits for the trace.

        Raises:
            InvalidFieldError: more steps than a profile may have.
            WrongStateError: another profile is being taken, the job's own profiler runs, or training is held.
            ProfileFailedError: the trace could not be written.
            LaneStoppedError: the run has ended before the last step.
        """
        if active_steps > STEPS_MAX:
            raise InvalidFieldError("active_steps", f"must be 1 to {STEPS_MAX}, or 0, is {active_steps}")
        if self._lane.held_for(RUN):
            raise WrongStateError("training is held: there is no step to profile before it is resumed")
        profile = self._begin(active_steps or self._settings.active_steps)
        await profile.over.wait()
        if isinstance(profile.result, ProfileTaken):
            return profile.result
        raise profile.result

    def step(self, step: StepDone) -> None:
        """Starts a profile if the schedule has one due after this step."""
        if not self._settings.every_steps or step.skipped:
            return
        self._steps_since += 1
        if self._steps_since < self._settings.every_steps:
            return
        self._steps_since = 0
        if not self._safeguards.mode.on and self._open is None:
            with suppress(LaneError):  # the next one is due after as many steps again
                self._begin(self._settings.active_steps)

    def started(self, pending: PendingCommand, event: CommandDone) -> None:
        """Applies the answer to a command that asked for a profile."""
        if (profile := self._asked.pop(pending.done, None)) is None:
            return
        match event.result:
            case ProfileStarted(steps):
                self._open = profile
                self._observers.on_profile_started(steps)
            case TraceFailed() as failed:
                profile.end(self._result(failed, event.global_step))
            case _:
                profile.end(profile.result if event.failure is None else event.failure.error())

    def done(self, event: ProfileDone) -> None:
        """Applies the end of a profile."""
        profile, self._open = self._open, None
        result = self._result(event.outcome, event.global_step)
        if profile is not None:
            profile.end(result)

    def close(self) -> None:
        """Ends all profiles without a trace: there is no further step."""
        if self._open is not None:
            self._observers.on_profile_abandoned()
            self._open.over.set()
            self._open = None
        for profile in self._asked.values():
            profile.over.set()
        self._asked.clear()

    def _begin(self, steps: int) -> _Profile:
        """Asks the lane for a profile. Raises LaneStoppedError or LaneError when that is not possible."""
        profile = _Profile()
        future = self._lane.submit(CaptureProfile(steps))
        if future.done() and (error := future.exception()) is not None:
            raise error
        self._asked[future] = profile
        return profile

    def _result(self, outcome: TraceWritten | TraceFailed, global_step: int) -> ProfileTaken | TolariaError:
        self._observers.on_profile_ended(outcome)
        if isinstance(outcome, TraceWritten):
            return ProfileTaken(global_step, outcome)
        if outcome.stage == "start":
            return WrongStateError(f"a profile cannot be taken now: {outcome.reason}")
        return ProfileFailedError(f"the profile left no trace ({outcome.stage}): {outcome.reason}")
