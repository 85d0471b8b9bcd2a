"""How the run is held, let go on and ended: its state, and whether the lane stands because of it.

Owns the changes of state. Must not know who asks for them, nor what is trained.
"""

from __future__ import annotations

from collections.abc import Callable

from leyline.v1.admin_service_pb2 import (
    RUN_STATE_DRAINING,
    RUN_STATE_FAILED,
    RUN_STATE_FINISHED,
    RUN_STATE_HALTED,
    RUN_STATE_PAUSED,
)
from tolaria.errors import WrongStateError
from tolaria.training.guardian import Guardian
from tolaria.training.record import Recorder
from tolaria.training.run_state import RunEvent, after
from tolaria.training.standstill import Standstill

RUN = "run"
"""Who wants the lane to stand while the run is held."""

_LEAVING = "leaving"


class Conduct:
    """Used on the event loop only.

    Args:
        standstill: of the lane.
        recorder: where the state is written.
        guardian: told when training stands; whoever it halts cannot be resumed.
        changed: called after the state has changed.
    """

    def __init__(
        self, standstill: Standstill, recorder: Recorder, *, guardian: Guardian, changed: Callable[[], None]
    ) -> None:
        self._standstill = standstill
        self._recorder = recorder
        self._progress = recorder.progress
        self._guardian = guardian
        self._changed = changed

    @property
    def ended(self) -> bool:
        """Whether the run has ended, or is ending because the process does."""
        return self._progress.state in {RUN_STATE_FINISHED, RUN_STATE_FAILED, RUN_STATE_DRAINING}

    @property
    def paused(self) -> bool:
        """Whether it is held by less than an emergency."""
        return self._progress.state == RUN_STATE_PAUSED

    @property
    def on_hold(self) -> bool:
        """Whether it is held, or does not go on for good."""
        return self.ended or self.paused or self._progress.state == RUN_STATE_HALTED

    def require_unended(self, because: str) -> None:
        """Raises WrongStateError, saying what follows, when the run has ended."""
        if self.ended:
            raise WrongStateError(f"the run has ended: {because}")

    def enter(self, event: RunEvent, reason: str) -> None:
        """Something has happened to the run. Raises WrongStateError where that cannot happen in its state."""
        self._recorder.state(after(self._progress.state, event), reason)
        self._changed()

    def hold(self, reason: str) -> None:
        """Have training stand, unless an emergency has it stand already.

        Raises:
            WrongStateError: when the run has ended or is ending.
        """
        self._hold(reason, RunEvent.PAUSED)

    def hold_where_none_does(self, reason: str) -> bool:
        """Have a running one stand; False for one that stands already, which keeps its reason and who has it stand."""
        if held := not self.on_hold:
            self.hold(reason)
        return held

    def halt(self, reason: str) -> None:
        """Freeze training; a run that stands already, or has ended, says so to the guardian at once."""
        if not self.ended:
            self._hold(reason, RunEvent.HALTED)
        if self.ended or self._standstill.standing:
            self._guardian.held()

    def resume(self, reason: str) -> None:
        """Go on from where the run was held; nothing to do when it runs.

        Raises:
            WrongStateError: when the run has ended or is ending, or while an emergency halts it.
        """
        if self._guardian.halting:
            raise WrongStateError("an emergency halts the run: clear it first")
        self.enter(RunEvent.RESUMED, reason)
        self._recorder.resumed()
        self._standstill.let_go(RUN)

    def go_on(self, reason: str) -> None:
        """That reason to stand is gone: go on, unless somebody else has had the run stand meanwhile."""
        if self.paused and self._progress.state_reason == reason:
            self.resume(f"recovered from: {reason}")

    def leave(self) -> None:
        """Have the lane stand for good, so that what is kept of it now is the last there is."""
        self._standstill.want(_LEAVING)

    def _hold(self, reason: str, event: RunEvent) -> None:
        if self._progress.state == RUN_STATE_HALTED:
            return  # by more than a pause
        self.enter(event, reason)
        self._standstill.want(RUN)
