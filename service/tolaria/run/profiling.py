"""Profiles of a run, requested by operators or due by the schedule, one at a time."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from tolaria import errors
from tolaria.config import ProfilerSettings
from tolaria.lane.messages import (
    PROFILE_STEPS_MAX,
    CaptureProfile,
    CommandDone,
    ProfileDone,
    ProfileStarted,
    StepDone,
    TraceFailed,
    TraceWritten,
)
from tolaria.run.lane_client import LaneClient, PendingCommand, mark_retrieved
from tolaria.run.observers import RunObserver
from tolaria.run.run_state import RUN
from tolaria.run.safety import Safeguards


@dataclass(frozen=True, slots=True)
class ProfileTaken:
    """A trace was written; `global_step` is the one after the last traced step."""

    global_step: int
    trace: TraceWritten


class Profiles:
    """Takes profiles. Used on the event loop only.

    The schedule pauses in conservative mode; operators can still take profiles.
    """

    def __init__(
        self, lane: LaneClient, settings: ProfilerSettings, *, safeguards: Safeguards, observers: RunObserver
    ) -> None:
        self._lane = lane
        self.settings = settings
        self._safeguards = safeguards
        self._observers = observers
        self._steps_since = 0
        self._asked: dict[asyncio.Future[CommandDone], asyncio.Future[ProfileTaken]] = {}
        self._open: asyncio.Future[ProfileTaken] | None = None

    async def capture(self, active_steps: int, rank: int = 0) -> ProfileTaken:
        """Profiles the next `active_steps` steps (0: `profiler.active_steps`) of a rank and waits for the trace.

        Raises:
            errors.InvalidFieldError: more steps than a profile may have, or there is no such rank.
            errors.WrongStateError: another profile is being taken, the job's own profiler runs, or training is held.
            errors.ProfileFailedError: the trace could not be written.
            errors.LaneStoppedError: the run has ended before the last step.
        """
        if active_steps > PROFILE_STEPS_MAX:
            raise errors.InvalidFieldError("active_steps", f"must be 1 to {PROFILE_STEPS_MAX}, or 0, is {active_steps}")
        if self._lane.held_for(RUN):
            raise errors.WrongStateError("training is held: there is no step to profile before it is resumed")
        return await self._begin(active_steps or self.settings.active_steps, rank)

    def step(self, step: StepDone) -> None:
        """Starts a profile if the schedule has one due after this step."""
        if not self.settings.every_steps or step.skipped:
            return
        self._steps_since += 1
        if self._steps_since < self.settings.every_steps:
            return
        self._steps_since = 0
        if not self._safeguards.mode.on and self._open is None:
            with suppress(errors.LaneError):  # retried after another `every_steps` steps
                self._begin(self.settings.active_steps)

    def started(self, pending: PendingCommand, event: CommandDone) -> None:
        """Applies the answer to a command that requested a profile."""
        if (profile := self._asked.pop(pending.done, None)) is None:
            return
        match event.result:
            case ProfileStarted(steps):
                self._open = profile
                self._observers.on_profile_started(steps)
            case TraceFailed() as failed:
                self._end(profile, failed, event.global_step)
            case _:
                _resolve(profile, _no_trace() if event.failure is None else event.failure.error())

    def done(self, event: ProfileDone) -> None:
        """Applies the end of a profile."""
        profile, self._open = self._open, None
        if profile is not None:
            self._end(profile, event.outcome, event.global_step)

    def close(self) -> None:
        """Ends all profiles without a trace: there is no further step."""
        if self._open is not None:
            self._observers.on_profile_abandoned()
            _resolve(self._open, _no_trace())
        for profile in self._asked.values():
            _resolve(profile, _no_trace())
        self._open = None
        self._asked.clear()

    def _begin(self, steps: int, rank: int = 0) -> asyncio.Future[ProfileTaken]:
        """Asks the lane for a profile. Raises errors.LaneStoppedError or errors.LaneError when that is not possible."""
        submitted = self._lane.submit(CaptureProfile(steps, rank))
        if submitted.done() and (error := submitted.exception()) is not None:
            raise error
        profile = self._asked[submitted] = asyncio.get_running_loop().create_future()
        profile.add_done_callback(mark_retrieved)  # nothing waits for a scheduled profile
        return profile

    def _end(
        self, profile: asyncio.Future[ProfileTaken], outcome: TraceWritten | TraceFailed, global_step: int
    ) -> None:
        self._observers.on_profile_ended(outcome)
        if isinstance(outcome, TraceWritten):
            _resolve(profile, ProfileTaken(global_step, outcome))
        elif outcome.stage == "start":
            _resolve(profile, errors.WrongStateError(f"a profile cannot be taken now: {outcome.reason}"))
        else:
            reason = f"the profile left no trace ({outcome.stage}): {outcome.reason}"
            _resolve(profile, errors.ProfileFailedError(reason))


def _resolve(profile: asyncio.Future[ProfileTaken], result: ProfileTaken | errors.TolariaError) -> None:
    """Completes the future, unless its caller was cancelled."""
    if not profile.done():
        if isinstance(result, ProfileTaken):
            profile.set_result(result)
        else:
            profile.set_exception(result)


def _no_trace() -> errors.LaneStoppedError:
    return errors.LaneStoppedError("the run has ended before the last step of the profile; there is no trace")
