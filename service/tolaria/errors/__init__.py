"""Every error that Tolaria raises on purpose, in one tree. Knows nothing of who raises or catches.

The larger branches have a file each; whoever needs an error imports it from here.

TolariaError
├── ConfigurationError            the settings are wrong; exit code 2
├── JobError                      the user's training job is wrong; exit code 2
│   ├── UnknownJobError
│   ├── BrokenJobError
│   ├── EmptyDatasetError
│   └── LossShapeError
├── BindError                     a listening address cannot be had
├── ChildFailedError              a child process did not start, ended early or did not announce itself
├── StateHeldError                the state directory is in use by another process
├── PeerError                     a call to Tamiyo or Kasmina came to nothing
│   ├── PeerTimeoutError
│   ├── PeerUnavailableError
│   ├── PeerProtocolError
│   ├── BreakerOpenError
│   └── CallRefusedError
├── IllegalBreakerSignalError     a circuit breaker was told what cannot happen to it
├── CommandRejectedError          a command failed a check and changed nothing
├── NonFiniteStepError            a step was voided before any parameter changed
├── GradientError                 gradients cannot be merged as asked
│   ├── NoGradientsError
│   ├── GradientMismatchError
│   ├── GradientWeightError
│   └── UnknownSourceError
├── OptimizationError             learning rates or the optimizer cannot be had as asked
│   ├── ScheduleError
│   ├── UnsuitableOptimizerError
│   ├── UnknownGroupError
│   ├── GroupConflictError
│   ├── AdjustmentRefusedError
│   ├── HyperparameterError
│   ├── ControllerStateError
│   └── RebuildFailedError
├── SeedError                     a seed cannot be grown as asked
│   ├── SlotError
│   ├── UnknownBlueprintError
│   ├── BlueprintError
│   │   └── BlueprintMisfitError
│   ├── OwnershipError
│   └── TopologyStateError
├── LifecycleError                a seed stays in its stage
│   ├── IllegalMoveError
│   └── GateShutError
├── LaneError                     the compute lane cannot do what was asked
│   ├── LaneFailedError
│   └── LaneStoppedError
├── SignalError                   the signal board cannot do what was asked
│   ├── BoardRefusedError
│   ├── BoardBusyError
│   ├── BoardLostError
│   ├── BlockOwnedError
│   └── SignalValueError
├── EmergencyError                an emergency cannot be raised, told or cleared as asked
│   ├── UnknownLevelError
│   ├── IllegalEmergencyEventError
│   ├── ClearanceRefusedError
│   └── BroadcastFailedError
├── IllegalModeEventError         a reason for conservative mode was told what cannot happen to it
├── RollbackError                 training state cannot be captured, kept or brought back as asked
│   ├── StateUnsupportedError
│   ├── StateMismatchError
│   ├── ImageDamagedError
│   ├── RestoreUnprovenError
│   ├── RestoreAbandonedError
│   ├── CheckpointError
│   │   ├── CheckpointWriteError
│   │   ├── CheckpointDamagedError
│   │   ├── CheckpointUnreadableError
│   │   └── NoCheckpointError
│   └── JournalError
│       ├── JournalUnavailableError
│       ├── JournalDamagedError
│       └── JournalNewerError
└── RequestError                  an operator's request cannot be served
    ├── InvalidFieldError
    ├── WrongStateError
    │   └── StillUnderwayError
    ├── ProfileFailedError
    └── NotImplementedYetError
"""

from __future__ import annotations

from tolaria.errors.base import (
    BindError,
    ChildFailedError,
    CommandRejectedError,
    ConfigurationError,
    NonFiniteStepError,
    StateHeldError,
    TolariaError,
)
from tolaria.errors.emergency import (
    BroadcastFailedError,
    ClearanceRefusedError,
    EmergencyError,
    IllegalEmergencyEventError,
    IllegalModeEventError,
    UnknownLevelError,
)
from tolaria.errors.gradients import (
    GradientError,
    GradientMismatchError,
    GradientWeightError,
    NoGradientsError,
    UnknownSourceError,
)
from tolaria.errors.optimization import (
    AdjustmentRefusedError,
    ControllerStateError,
    GroupConflictError,
    HyperparameterError,
    OptimizationError,
    RebuildFailedError,
    ScheduleError,
    UnknownGroupError,
    UnsuitableOptimizerError,
)
from tolaria.errors.peers import (
    BreakerOpenError,
    CallRefusedError,
    GateShutError,
    IllegalBreakerSignalError,
    IllegalMoveError,
    LifecycleError,
    PeerError,
    PeerProtocolError,
    PeerTimeoutError,
    PeerUnavailableError,
)
from tolaria.errors.rollback import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointUnreadableError,
    CheckpointWriteError,
    ImageDamagedError,
    JournalDamagedError,
    JournalError,
    JournalNewerError,
    JournalUnavailableError,
    NoCheckpointError,
    RestoreAbandonedError,
    RestoreUnprovenError,
    RollbackError,
    StateMismatchError,
    StateUnsupportedError,
)
from tolaria.errors.run import (
    BrokenJobError,
    EmptyDatasetError,
    InvalidFieldError,
    JobError,
    LaneError,
    LaneFailedError,
    LaneStoppedError,
    LossShapeError,
    NotImplementedYetError,
    ProfileFailedError,
    RequestError,
    StillUnderwayError,
    UnknownJobError,
    WrongStateError,
)
from tolaria.errors.seeds import (
    BlueprintError,
    BlueprintMisfitError,
    OwnershipError,
    SeedError,
    SlotError,
    TopologyStateError,
    UnknownBlueprintError,
)
from tolaria.errors.signals import (
    BlockOwnedError,
    BoardBusyError,
    BoardLostError,
    BoardRefusedError,
    SignalError,
    SignalValueError,
)

__all__ = [
    "AdjustmentRefusedError",
    "BindError",
    "BlockOwnedError",
    "BlueprintError",
    "BlueprintMisfitError",
    "BoardBusyError",
    "BoardLostError",
    "BoardRefusedError",
    "BreakerOpenError",
    "BroadcastFailedError",
    "BrokenJobError",
    "CallRefusedError",
    "CheckpointDamagedError",
    "CheckpointError",
    "CheckpointUnreadableError",
    "CheckpointWriteError",
    "ChildFailedError",
    "ClearanceRefusedError",
    "CommandRejectedError",
    "ConfigurationError",
    "ControllerStateError",
    "EmergencyError",
    "EmptyDatasetError",
    "GateShutError",
    "GradientError",
    "GradientMismatchError",
    "GradientWeightError",
    "GroupConflictError",
    "HyperparameterError",
    "IllegalBreakerSignalError",
    "IllegalEmergencyEventError",
    "IllegalModeEventError",
    "IllegalMoveError",
    "ImageDamagedError",
    "InvalidFieldError",
    "JobError",
    "JournalDamagedError",
    "JournalError",
    "JournalNewerError",
    "JournalUnavailableError",
    "LaneError",
    "LaneFailedError",
    "LaneStoppedError",
    "LifecycleError",
    "LossShapeError",
    "NoCheckpointError",
    "NoGradientsError",
    "NonFiniteStepError",
    "NotImplementedYetError",
    "OptimizationError",
    "OwnershipError",
    "PeerError",
    "PeerProtocolError",
    "PeerTimeoutError",
    "PeerUnavailableError",
    "ProfileFailedError",
    "RebuildFailedError",
    "RequestError",
    "RestoreAbandonedError",
    "RestoreUnprovenError",
    "RollbackError",
    "ScheduleError",
    "SeedError",
    "SignalError",
    "SignalValueError",
    "SlotError",
    "StateHeldError",
    "StateMismatchError",
    "StateUnsupportedError",
    "StillUnderwayError",
    "TolariaError",
    "TopologyStateError",
    "UnknownBlueprintError",
    "UnknownGroupError",
    "UnknownJobError",
    "UnknownLevelError",
    "UnknownSourceError",
    "UnsuitableOptimizerError",
    "WrongStateError",
]
