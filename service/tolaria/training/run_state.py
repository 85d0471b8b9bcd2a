"""The states of a run and every transition between them. Pure: an illegal event raises and changes nothing."""

from __future__ import annotations

from enum import Enum, auto

from leyline.v1.admin_service_pb2 import (
    RUN_STATE_DRAINING,
    RUN_STATE_FAILED,
    RUN_STATE_FINISHED,
    RUN_STATE_HALTED,
    RUN_STATE_PAUSED,
    RUN_STATE_RUNNING,
    RUN_STATE_STARTING,
    RunState,
)
from tolaria.errors import WrongStateError


class RunEvent(Enum):
    """What can happen to a run."""

    STARTED = auto()
    PAUSED = auto()
    HALTED = auto()
    RESUMED = auto()
    FINISHED = auto()
    FAILED = auto()
    DRAINING = auto()


_STARTING, _RUNNING, _PAUSED, _HALTED = RUN_STATE_STARTING, RUN_STATE_RUNNING, RUN_STATE_PAUSED, RUN_STATE_HALTED
_DRAINING, _FINISHED, _FAILED = RUN_STATE_DRAINING, RUN_STATE_FINISHED, RUN_STATE_FAILED

TRANSITIONS: dict[tuple[RunState.ValueType, RunEvent], RunState.ValueType] = {
    (_STARTING, RunEvent.STARTED): _RUNNING,
    (_STARTING, RunEvent.PAUSED): _PAUSED,
    (_STARTING, RunEvent.HALTED): _HALTED,
    (_STARTING, RunEvent.FAILED): _FAILED,
    (_STARTING, RunEvent.DRAINING): _DRAINING,
    # Halted and resumed before it was started, as one may be that came with a halt.
    (_RUNNING, RunEvent.STARTED): _RUNNING,
    (_RUNNING, RunEvent.PAUSED): _PAUSED,
    (_RUNNING, RunEvent.HALTED): _HALTED,
    (_RUNNING, RunEvent.RESUMED): _RUNNING,
    (_RUNNING, RunEvent.FINISHED): _FINISHED,
    (_RUNNING, RunEvent.FAILED): _FAILED,
    (_RUNNING, RunEvent.DRAINING): _DRAINING,
    (_PAUSED, RunEvent.STARTED): _PAUSED,
    (_PAUSED, RunEvent.PAUSED): _PAUSED,
    (_PAUSED, RunEvent.HALTED): _HALTED,
    (_PAUSED, RunEvent.RESUMED): _RUNNING,
    (_PAUSED, RunEvent.FINISHED): _FINISHED,
    (_PAUSED, RunEvent.FAILED): _FAILED,
    (_PAUSED, RunEvent.DRAINING): _DRAINING,
    (_HALTED, RunEvent.STARTED): _HALTED,
    (_HALTED, RunEvent.PAUSED): _HALTED,
    (_HALTED, RunEvent.HALTED): _HALTED,
    # Whoever asks makes sure first that the emergency is over.
    (_HALTED, RunEvent.RESUMED): _RUNNING,
    (_HALTED, RunEvent.FINISHED): _FINISHED,
    (_HALTED, RunEvent.FAILED): _FAILED,
    (_HALTED, RunEvent.DRAINING): _DRAINING,
    (_DRAINING, RunEvent.DRAINING): _DRAINING,
    (_DRAINING, RunEvent.FINISHED): _FINISHED,
    (_DRAINING, RunEvent.FAILED): _FAILED,
    (_FINISHED, RunEvent.DRAINING): _FINISHED,
    (_FAILED, RunEvent.DRAINING): _FAILED,
}


def after(state: RunState.ValueType, event: RunEvent) -> RunState.ValueType:
    """The state after `event`.

    Raises:
        WrongStateError: when the table has no such move; the message names both.
    """
    following = TRANSITIONS.get((state, event))
    if following is None:
        name = RunState.Name(state).removeprefix("RUN_STATE_").lower()
        raise WrongStateError(f"a run that is {name} cannot be {event.name.lower()}")
    return following
