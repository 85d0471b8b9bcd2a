"""Where profiles are asked for, by operators or by the schedule, and who waits for which. The event loop's side.

Owns the schedule and the waiting. Must not know how a profile is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import anyio

from tolaria.config import ProfilerSettings
from tolaria.errors import InvalidFieldError, LaneStoppedError, ProfileFailedError, TolariaError, WrongStateError
from tolaria.training.fence_desk import FenceDesk
from tolaria.training.fences import CaptureProfile, FenceReport, ProfileBegun
from tolaria.training.record_profile import ProfileRecorder
from tolaria.training.reports import ProfileEnded, StepReport
from tolaria.values.profiling import STEPS_MAX, TraceFailed, TraceWritten


@dataclass(frozen=True, slots=True)
class ProfileTaken:
    """A trace is written; `global_step` updates were done when its last step was."""

    global_step: int
    trace: TraceWritten


def _ended_before() -> LaneStoppedError:
    return LaneStoppedError("the run has ended before the last step of the profile; there is no trace")


@dataclass(slots=True)
class _Asked:
    """One profile; `result` holds once it is `over`. Nobody waits for the schedule's: its `request_id` is empty."""

    request_id: str
    over: anyio.Event = field(default_factory=anyio.Event)
    result: ProfileTaken | TolariaError = field(default_factory=_ended_before)

    def end(self, result: ProfileTaken | TolariaError) -> None:
        """Tell who waits."""
        self.result = result
        self.over.set()


class ProfileDesk:
    """One profile at a time. Used on the event loop only.

    The schedule rests while conservative mode is on, as `permitted` tells; what is due then is left out. An operator
    who asks in that mode gets a profile: it is then that one wants to look.

    Args:
        desk: where the lane is asked.
        settings: the schedule, and the steps of a profile that nobody gave a number for.
        recorder: of metrics and events.
        permitted: whether the schedule may begin one now.
        standing: whether the run is held, so that there are no steps.
    """

    def __init__(
        self,
        desk: FenceDesk,
        settings: ProfilerSettings,
        *,
        recorder: ProfileRecorder,
        permitted: Callable[[], bool],
        standing: Callable[[], bool],
    ) -> None:
        self._desk = desk
        self._settings = settings
        self._recorder = recorder
        self._permitted = permitted
        self._standing = standing
        self._steps_since = 0
        self._open: _Asked | None = None
        self._latest: _Asked | None = None
        self._closed = False

    async def capture(self, request_id: str, active_steps: int) -> ProfileTaken:
        """Take a profile of the next steps, 0: as many as the settings say, and wait for its trace.

        A caller who went away may ask again by the same `request_id` and waits for the same profile.

        Raises:
            InvalidFieldError: more steps than a profile may have.
            WrongStateError: another one is being taken, the job's own profiler runs, or training stands.
            ProfileFailedError: the trace could not be written.
            LaneStoppedError: the run has ended before its last step.
        """
        if active_steps > STEPS_MAX:
            raise InvalidFieldError("active_steps", f"must be 1 to {STEPS_MAX}, or 0, is {active_steps}")
        asked = self._latest
        if asked is None or asked.request_id != request_id:
            if self._closed:
                raise _ended_before()
            if self._standing():
                raise WrongStateError("training stands: there is no step to profile before it is resumed")
            asked = self._latest = _Asked(request_id)
            self._begin(asked, active_steps or self._settings.active_steps)
        await asked.over.wait()
        if isinstance(asked.result, ProfileTaken):
            return asked.result
        raise asked.result

    def step(self, step: StepReport) -> None:
        """One more step is done; begin a profile if the schedule has one."""
        every_steps = self._settings.every_steps
        if not every_steps or step.void:
            return
        self._steps_since += 1
        if self._steps_since < every_steps:
            return
        self._steps_since = 0
        if self._permitted() and self._open is None:
            self._begin(_Asked(""), self._settings.active_steps)

    def take(self, report: ProfileEnded) -> None:
        """The lane's window has ended."""
        asked, self._open = self._open, None
        result = self._result_of(report.outcome, report.global_step)
        if asked is not None:
            asked.end(result)

    def close(self) -> None:
        """There will be no further step: whoever waits is told."""
        self._closed = True
        if self._open is not None:
            self._recorder.abandoned()
            self._open.over.set()
            self._open = None

    def _begin(self, asked: _Asked, steps: int) -> None:
        self._desk.post(CaptureProfile(steps), partial(self._answered, asked))

    def _answered(self, asked: _Asked, report: FenceReport) -> None:
        """The lane has come to the fence, or has ended before."""
        match report.result:
            case ProfileBegun(steps):
                self._open = asked
                self._recorder.begun(steps)
            case TraceFailed() as failure:
                asked.end(self._result_of(failure, report.global_step))
            case _:  # refused, as while another window is open
                asked.end(report.error or asked.result)

    def _result_of(self, outcome: TraceWritten | TraceFailed, global_step: int) -> ProfileTaken | TolariaError:
        if isinstance(outcome, TraceWritten):
            self._recorder.written(outcome)
            return ProfileTaken(global_step, outcome)
        self._recorder.failed(outcome)
        if outcome.stage == "start":
            return WrongStateError(f"a profile cannot be taken now: {outcome.reason}")
        return ProfileFailedError(f"the profile left no trace ({outcome.stage}): {outcome.reason}")
