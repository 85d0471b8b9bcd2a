"""The run state machine, and the lifecycle that uses it to hold, resume and end a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Final

from leyline.v1 import admin_service_pb2 as admin
from tolaria.errors import WrongStateError
from tolaria.run.health import Health
from tolaria.run.lane_client import LaneClient
from tolaria.run.status import RunStatus, state_name

RUN: Final = "run"
"""Holder of the lane while the run is paused or halted."""


class RunEvent(Enum):
    """Events of a run."""

    STARTED = auto()
    PAUSED = auto()
    HALTED = auto()
    RESUMED = auto()
    FINISHED = auto()
    FAILED = auto()
    DRAINING = auto()


_STARTING, _RUNNING, _PAUSED = admin.RUN_STATE_STARTING, admin.RUN_STATE_RUNNING, admin.RUN_STATE_PAUSED
_HALTED, _DRAINING = admin.RUN_STATE_HALTED, admin.RUN_STATE_DRAINING
_FINISHED, _FAILED = admin.RUN_STATE_FINISHED, admin.RUN_STATE_FAILED

_AFTER: Final[Mapping[admin.RunState.ValueType, tuple[admin.RunState.ValueType | None, ...]]] = {
    # STARTED, PAUSED, HALTED, RESUMED, FINISHED, FAILED, DRAINING; None where the event is not allowed
    _STARTING: (_RUNNING, _PAUSED, _HALTED, None, None, _FAILED, _DRAINING),
    # A run that was resumed in the halted state may be cleared before it has started.
    _RUNNING: (_RUNNING, _PAUSED, _HALTED, _RUNNING, _FINISHED, _FAILED, _DRAINING),
    _PAUSED: (_PAUSED, _PAUSED, _HALTED, _RUNNING, _FINISHED, _FAILED, _DRAINING),
    # RESUMED only after the emergency has been cleared, which TrainingRun.resume checks.
    _HALTED: (_HALTED, _HALTED, _HALTED, _RUNNING, _FINISHED, _FAILED, _DRAINING),
    _DRAINING: (None, None, None, None, _FINISHED, _FAILED, _DRAINING),
    _FINISHED: (None, None, None, None, None, None, _FINISHED),
    _FAILED: (None, None, None, None, None, None, _FAILED),
}
TRANSITIONS: Final[Mapping[tuple[admin.RunState.ValueType, RunEvent], admin.RunState.ValueType]] = {
    (state, event): following
    for state, row in _AFTER.items()
    for event, following in zip(RunEvent, row, strict=True)
    if following is not None
}


def after(state: admin.RunState.ValueType, event: RunEvent) -> admin.RunState.ValueType:
    """Returns the state after `event`. Raises WrongStateError for an event that is not in the table."""
    following = TRANSITIONS.get((state, event))
    if following is None:
        raise WrongStateError(f"a run that is {state_name(state)} cannot be {event.name.lower()}")
    return following


class Lifecycle:
    """Changes the state of a run, and holds the lane while it is paused or halted. Used on the event loop only."""

    def __init__(
        self,
        lane: LaneClient,
        status: RunStatus,
        health: Health,
        on_state: Callable[[admin.RunState.ValueType, str], None],
    ) -> None:
        self._lane = lane
        self._status = status
        self._health = health
        self._on_state = on_state

    @property
    def ended(self) -> bool:
        """Whether the run has ended, or is ending with its process."""
        return self._status.state in {_FINISHED, _FAILED, _DRAINING}

    @property
    def paused(self) -> bool:
        """Whether the run is paused, not halted by an emergency."""
        return self._status.state == _PAUSED

    @property
    def halted(self) -> bool:
        """Whether the run was halted by an emergency and has not been resumed."""
        return self._status.state == _HALTED

    @property
    def reason(self) -> str:
        """Why the run is in its state."""
        return self._status.state_reason

    @property
    def training(self) -> bool:
        """Whether the run is neither held nor ended."""
        return self._status.state in {_STARTING, _RUNNING}

    @property
    def frozen(self) -> bool:
        """Whether training is stopped: the lane is held, or the run has ended."""
        return self.ended or self._lane.is_held

    def attributes(self) -> dict[str, str]:
        """Returns where the run is, as attributes of an emergency."""
        status = self._status
        return {"global_step": str(status.global_step), "epoch": str(status.epoch), "state": state_name(status.state)}

    def explain(self, reason: str) -> None:
        """Replaces the reason of the state."""
        self._status.state_reason = reason
        self.changed()

    def changed(self) -> None:
        """Wakes everything that waits for a change of the run."""
        self._status.feed.changed()

    def require_not_ended(self, consequence: str) -> None:
        """Raises WrongStateError, which names the consequence, when the run has ended."""
        if self.ended:
            raise WrongStateError(f"the run has ended: {consequence}")

    def enter(self, event: RunEvent, reason: str) -> None:
        """Applies an event. Raises WrongStateError where the state does not allow it."""
        self._status.state = after(self._status.state, event)
        self._status.state_reason = reason
        self._on_state(self._status.state, reason)
        self.changed()

    def hold(self, reason: str) -> None:
        """Pauses training. A halted run stays halted. Raises WrongStateError when the run has ended or is ending."""
        self._hold(reason, RunEvent.PAUSED)

    def hold_if_training(self, reason: str) -> bool:
        """Pauses a run that is training; returns False for one that is held already or has ended."""
        if held := self.training:
            self.hold(reason)
        return held

    def halt(self, reason: str) -> None:
        """Freezes training because of an emergency; does nothing to a run that has ended."""
        if self.halted:
            self.explain(reason)
        elif not self.ended:
            if self.training:
                self._lane.dump_stacks(f"halted: {reason}")  # first: what the processes do at that moment
            self._hold(reason, RunEvent.HALTED)

    def resume(self, reason: str) -> None:
        """Resumes a held run. Raises WrongStateError when the run has ended or is ending."""
        self.enter(RunEvent.RESUMED, reason)
        self._health.forgive_skipped_steps()
        self._lane.release(RUN)

    def resume_if_held_for(self, reason: str) -> None:
        """Resumes the run if it is still paused for exactly this reason."""
        if self.paused and self._status.state_reason == reason:
            self.resume(f"recovered from: {reason}")

    def _hold(self, reason: str, event: RunEvent) -> None:
        if self._status.state != _HALTED:
            self.enter(event, reason)
            self._lane.hold(RUN)
