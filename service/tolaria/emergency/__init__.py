"""Emergencies: levels, broadcasts, acknowledgements, clearance, and the sentinel that watches the heartbeats.

The sentinel's process imports this, so `supervision`, which needs an event loop, is not imported here.
"""

from tolaria.emergency.broadcast import Broadcast, HeldBack, Notice
from tolaria.emergency.controller import (
    BoardUnreadable,
    Cleared,
    Covered,
    DeadlineMissed,
    EmergencyController,
    Escalated,
    Reissued,
    Report,
)
from tolaria.emergency.protocol import (
    RESPONSES,
    Acknowledgement,
    Clearer,
    EmergencyState,
    EpochStreak,
    Phase,
    Trigger,
    recovered,
)

__all__ = [
    "RESPONSES",
    "Acknowledgement",
    "BoardUnreadable",
    "Broadcast",
    "Cleared",
    "Clearer",
    "Covered",
    "DeadlineMissed",
    "EmergencyController",
    "EmergencyState",
    "EpochStreak",
    "Escalated",
    "HeldBack",
    "Notice",
    "Phase",
    "Reissued",
    "Report",
    "Trigger",
    "recovered",
]
