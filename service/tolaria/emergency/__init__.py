"""Emergencies: four levels, how they are raised, told, acknowledged and cleared, and the sentinel that watches.

Knows no torch, grpc or Prometheus. The sentinel's process imports this, so what needs more stays out of it: see
`watching`, `heartbeats`, `guard` and `stacks` for the service's side.
"""

from tolaria.emergency.backlog import Notice
from tolaria.emergency.controller import EmergencyController, EmergencyPolicy
from tolaria.emergency.protocol import (
    RESPONSES,
    Acknowledgement,
    Clearer,
    EmergencyState,
    Phase,
    Response,
)
from tolaria.emergency.reports import (
    Acknowledged,
    BoardUnreadable,
    BoardWrite,
    Broadcast,
    Cleared,
    Covered,
    DeadlineMissed,
    EmergencyStatistics,
    Escalated,
    HeldBack,
    Reissued,
    Report,
)
from tolaria.emergency.triggers import TRIGGERS, EpochStreak, Trigger, recovered

__all__ = [
    "RESPONSES",
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
    "EmergencyStatistics",
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
