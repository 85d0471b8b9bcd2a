"""Keeping and bringing back the training state: in memory, on disk, with a journal. Knows no grpc, no metrics."""

from tolaria.rollback.cadence import Cadence
from tolaria.rollback.checkpoint_store import CheckpointStore, Damage, LoadedCheckpoint, Recovery
from tolaria.rollback.digest import Fingerprint
from tolaria.rollback.fast_cache import (
    Captured,
    Declined,
    DeclineReason,
    FastCacheStatistics,
    FastRollbackCache,
    Lease,
    SnapshotInfo,
)
from tolaria.rollback.filesystem import Filesystem
from tolaria.rollback.journal import Journal
from tolaria.rollback.journal_rows import (
    AdminActionRow,
    CheckpointRow,
    CommandRow,
    EmergencyRow,
    FaultRow,
    Incident,
    RollbackRow,
    RunRow,
)
from tolaria.rollback.restore import StagedRestore, never, stage_restore
from tolaria.rollback.retention import Retention
from tolaria.rollback.state import LiveTraining, StateImage, StatePart, TrainingState
from tolaria.rollback.storage import Storage, open_storage
from tolaria.rollback.writer import CheckpointWriter
from tolaria.values.training import Position

__all__ = [
    "AdminActionRow",
    "Cadence",
    "Captured",
    "CheckpointRow",
    "CheckpointStore",
    "CheckpointWriter",
    "CommandRow",
    "Damage",
    "DeclineReason",
    "Declined",
    "EmergencyRow",
    "FastCacheStatistics",
    "FastRollbackCache",
    "FaultRow",
    "Filesystem",
    "Fingerprint",
    "Incident",
    "Journal",
    "Lease",
    "LiveTraining",
    "LoadedCheckpoint",
    "Position",
    "Recovery",
    "Retention",
    "RollbackRow",
    "RunRow",
    "SnapshotInfo",
    "StagedRestore",
    "StateImage",
    "StatePart",
    "Storage",
    "TrainingState",
    "never",
    "open_storage",
    "stage_restore",
]
