"""The signal board: emergencies, heartbeats and rollback state in shared memory. Imports neither torch nor grpc."""

from tolaria.signals.board import SignalBoard
from tolaria.signals.layout import PARTICIPANTS, RollbackState, Signal
from tolaria.signals.mapping import remove_stale_boards
from tolaria.signals.seqlock import BlockCondition
from tolaria.signals.writers import ParticipantWriter, RollbackWriter

__all__ = [
    "PARTICIPANTS",
    "BlockCondition",
    "ParticipantWriter",
    "RollbackState",
    "RollbackWriter",
    "Signal",
    "SignalBoard",
    "remove_stale_boards",
]
