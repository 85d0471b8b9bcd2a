"""The signal board: emergencies, heartbeats and rollback state in shared memory. Imports neither torch nor grpc."""

from tolaria.signals.board import SignalBoard
from tolaria.signals.layout import (
    CLEARERS,
    PARTICIPANTS,
    REASON_MAX,
    ParticipantRecord,
    RollbackRecord,
    RollbackState,
    Signal,
)
from tolaria.signals.mapping import remove_stale_boards
from tolaria.signals.seqlock import BlockCondition, BoardStatistics, ParticipantState
from tolaria.signals.writers import Participant, RollbackWriter

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
