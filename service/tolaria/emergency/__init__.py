"""Emergencies: levels, broadcasts, acknowledgements, clearance, and the sentinel that watches the heartbeats.

The sentinel's process imports this, so `supervision`, which needs an event loop, is not imported here.
"""

from tolaria.emergency.broadcast import Broadcast, HeldBack, Notice
from tolaria.emergency.controller import (
    Acknowledged,
    BoardUnreadable,
    BoardWrite,
    Cleared,
    Covered,
    DeadlineMissed,
    EmergencyController,
    EmergencyPolicy,
    Escalated,
    Reissued,
    Report,
)
from tolaria.emergency.protocol import (
    RESPONSES,
    SENTINEL,
    TOLARIA,
    TRIGGERS,
    Acknowledgement,
    Clearer,
    EmergencyState,
    EpochStreak,
    Phase,
    Response,
    Trigger,
    recovered,
)

__all__ = [
    "RESPONSES",
    "SENTINEL",
    "TOLARIA",
    "TRIGGERS",
    "Acknowledged",
    "Acknowledgement",
    "BoardUnreadable",
    "BoardWrite",
    "Broadcast",
    "Cleared",
    "Clearer",
    "Covered",
    "DeadlineMissed",
    "EmergencyController",
    "EmergencyPolicy",
    "EmergencyState",
    "EpochStreak",
    "Escalated",
    "HeldBack",
    "Notice",
    "Phase",
    "Reissued",
    "Report",
    "Response",
    "Trigger",
    "recovered",
]
