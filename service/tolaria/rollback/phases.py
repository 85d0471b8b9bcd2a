"""How far a rollback is, and what can happen to it then. Every transition lives here; knows no clock and no peers.

A phase is what the board's rollback block shows, so that there is one word for it everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Final

from tolaria.errors import WrongStateError
from tolaria.signals import RollbackState as Phase

__all__ = ["RUNNING", "TRANSITIONS", "Phase", "RollbackEvent", "after"]


class RollbackEvent(Enum):
    """What can happen to a rollback."""

    BEGUN = "begun"
    PREPARED = "prepared"
    """Every participant has been asked, and there is a point to go back to."""
    RESTORED = "restored"
    """The live state is the point's."""
    CONFIRMED = "confirmed"
    FAILED = "failed"
    """It was given up; before RESTORED the live state is as it was."""
    EXPIRED = "expired"
    """Its deadline passed before the live state changed."""


_UNDER_WAY: Final = {RollbackEvent.FAILED: Phase.ABORTED, RollbackEvent.EXPIRED: Phase.DEADLINE}

TRANSITIONS: Final[Mapping[Phase, Mapping[RollbackEvent, Phase]]] = MappingProxyType(
    {
        Phase.IDLE: {RollbackEvent.BEGUN: Phase.PREPARE},
        Phase.PREPARE: {RollbackEvent.PREPARED: Phase.COMMIT, **_UNDER_WAY},
        Phase.COMMIT: {RollbackEvent.RESTORED: Phase.CONFIRM, **_UNDER_WAY},
        # The state has been brought back in time: no deadline can be missed any more, but the proof may fail.
        Phase.CONFIRM: {RollbackEvent.CONFIRMED: Phase.IDLE, RollbackEvent.FAILED: Phase.ABORTED},
        # These two stay to be seen until the next one begins.
        Phase.ABORTED: {RollbackEvent.BEGUN: Phase.PREPARE},
        Phase.DEADLINE: {RollbackEvent.BEGUN: Phase.PREPARE},
    }
)

RUNNING: Final = frozenset({Phase.PREPARE, Phase.COMMIT, Phase.CONFIRM})


def after(phase: Phase, event: RollbackEvent) -> Phase:
    """The phase after `event`.

    Raises:
        WrongStateError: it cannot happen in this phase; beginning one while another runs is such a case.
    """
    following = TRANSITIONS[phase].get(event)
    if following is None:
        state = "another rollback is running" if phase in RUNNING else "no rollback is running"
        raise WrongStateError(f"a rollback cannot have {event.value}: {state} ({phase.name.lower()})")
    return following
