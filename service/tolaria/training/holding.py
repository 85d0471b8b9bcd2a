"""Holds a run and lets it go on: its state as far as it stands or runs, and the lane accordingly.

Must not know why anybody wants a run to stand, nor what it does while it runs.
"""

from __future__ import annotations

from leyline.v1.admin_service_pb2 import (
    RUN_STATE_DRAINING,
    RUN_STATE_FAILED,
    RUN_STATE_FINISHED,
    RUN_STATE_HALTED,
    RUN_STATE_PAUSED,
)
from tolaria.errors import WrongStateError
from tolaria.training.feed import StatusFeed
from tolaria.training.guardian import Guardian
from tolaria.training.record import Recorder
from tolaria.training.run_state import RunEvent, after
from tolaria.training.standstill import Standstill

_RUN = "run"


class Holding:
    """Used on the event loop only.

    Args:
        standstill: makes the lane stand.
        recorder: has the run's state.
        guardian: knows of emergencies; told when a halted run stands.
        feed: told of every change.
    """

    def __init__(self, standstill: Standstill, recorder: Recorder, guardian: Guardian, feed: StatusFeed) -> None:
        self._standstill = standstill
        self._recorder = recorder
        self._progress = recorder.progress
        self._guardian = guardian
        self._feed = feed

    @property
    def ended(self) -> bool:
        """Whether the run has ended, or is ending."""
        return self._progress.state in {RUN_STATE_FINISHED, RUN_STATE_FAILED, RUN_STATE_DRAINING}

    @property
    def on_hold(self) -> bool:
        """Whether it stands by order, or has ended."""
        return self.ended or self._progress.state in {RUN_STATE_PAUSED, RUN_STATE_HALTED}

    def enter(self, event: RunEvent, reason: str) -> None:
        """Move the run's state on. WrongStateError: it cannot."""
        self._recorder.state(after(self._progress.state, event), reason)
        self._feed.changed()

    def hold(self, reason: str, event: RunEvent = RunEvent.PAUSED) -> None:
        """Have it stand, now for this reason. WrongStateError: it has ended or is ending."""
        if self._progress.state == RUN_STATE_HALTED:
            return  # by more than a pause
        self.enter(event, reason)
        self._standstill.want(_RUN)

    def hold_where_none_does(self, reason: str) -> bool:
        """Have a running one stand; False for one that stands already, which keeps its reason and who has it stand."""
        if held := not self.on_hold:
            self.hold(reason)
        return held

    def go_on(self, reason: str) -> None:
        """That reason to stand is gone: go on, unless somebody else has had the run stand meanwhile."""
        if self._progress.state == RUN_STATE_PAUSED and self._progress.state_reason == reason:
            self.resume(f"over: {reason}")

    def resume(self, reason: str) -> None:
        """Go on. WrongStateError: it has ended or is ending, or an emergency halts it."""
        if self._guardian.halting:
            raise WrongStateError("an emergency halts the run: clear it first")
        self.enter(RunEvent.RESUMED, reason)
        self._recorder.resumed()
        self._standstill.let_go(_RUN)

    def halt(self, reason: str) -> None:
        """Freeze training; a run that stands already, or has ended, says so at once."""
        if not self.ended:
            self.hold(reason, RunEvent.HALTED)
        if self.ended or self._standstill.standing:
            self._guardian.held()
