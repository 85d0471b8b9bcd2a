"""The signal board: emergencies, heartbeats and rollback state over shared memory. For peers too: no torch, no grpc."""

from tolaria.signals.board import SignalBoard
from tolaria.signals.latch import BoardStatistics
from tolaria.signals.layout import PARTICIPANTS, REASON_MAX
from tolaria.signals.owned import Participant, RollbackWriter
from tolaria.signals.records import (
    CLEARERS,
    BlockCondition,
    ParticipantRecord,
    ParticipantState,
    RollbackRecord,
    RollbackState,
    Signal,
)
from tolaria.signals.stale import remove_stale_boards

__all__ = [
    "CLEARERS",
    "PARTICIPANTS",
    "REASON_MAX",
    "BlockCondition",
    "BoardStatistics",
    "Participant",
    "ParticipantRecord",
    "ParticipantState",
    "RollbackRecord",
    "RollbackState",
    "RollbackWriter",
    "Signal",
    "SignalBoard",
    "remove_stale_boards",
]
