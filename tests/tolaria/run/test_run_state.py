from __future__ import annotations

import itertools

import pytest

from leyline.v1.admin_service_pb2 import RUN_STATE_UNSPECIFIED, RunState
from tolaria.errors import WrongStateError
from tolaria.run.run_state import TRANSITIONS, RunEvent, after


@pytest.mark.parametrize(("state", "event"), list(itertools.product(RunState.values(), RunEvent)))
def test_every_state_and_event(state: RunState.ValueType, event: RunEvent) -> None:
    """The table decides; what it does not list is refused with both names in the message."""
    if (state, event) in TRANSITIONS:
        assert after(state, event) == TRANSITIONS[state, event]
    else:
        with pytest.raises(
            WrongStateError,
            match=f"is {RunState.Name(state).removeprefix('RUN_STATE_').lower()} cannot be {event.name.lower()}",
        ):
            after(state, event)


def test_nothing_comes_out_of_an_ended_run() -> None:
    """Finished and failed runs stay so; no move leads to the unspecified state."""
    for (state, _event), following in TRANSITIONS.items():
        if RunState.Name(state) in {"RUN_STATE_FINISHED", "RUN_STATE_FAILED"}:
            assert following == state
        assert following != RUN_STATE_UNSPECIFIED
