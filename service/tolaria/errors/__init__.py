"""The errors that Tolaria raises on purpose, in one tree.

TolariaError
├── BindError, CredentialsError, ChildFailedError, StateHeldError, CommandRejectedError, IllegalTransitionError,
│   IllegalMoveError, StateRefusedError
├── ConfigurationError: ExposedError
├── JobError: UnknownJobError, BrokenJobError, EmptyDatasetError, LossShapeError
├── PeerError: PeerTimeoutError, PeerUnavailableError, PeerProtocolError, BreakerOpenError, CallRefusedError
├── GradientError: NoGradientsError, GradientMismatchError, GradientWeightError, UnknownSourceError,
│                  UnmergeableParameterError
├── OptimizationError: ScheduleError, UnsuitableOptimizerError, UnknownGroupError, GroupConflictError,
│                      AdjustmentRefusedError, HyperparameterError, ControllerStateError, RebuildFailedError
├── SeedError: SlotError, UnknownBlueprintError, OwnershipError, TopologyStateError
│   └── BlueprintError: BlueprintMisfitError
├── LaneError: LaneFailedError, PeerLostError, RanksDifferError, RankFailedError, LaneStoppedError, LaneLostError,
│   WireError
│   └── JoinError: ChannelError, JoinRefusedError, ServiceAbsentError
├── SignalError: BoardRefusedError, BoardBusyError, BoardLostError, BlockOwnedError, SignalValueError
├── EmergencyError: UnknownLevelError, IllegalEmergencyEventError, ClearanceRefusedError, BroadcastFailedError
├── RollbackError: StateUnsupportedError, StateMismatchError, ImageDamagedError, RestoreUnprovenError,
│   │              RestoreAbandonedError
│   ├── CheckpointError: CheckpointWriteError, CheckpointDamagedError, CheckpointUnreadableError, NoCheckpointError
│   └── JournalError: JournalUnavailableError, JournalDamagedError, JournalNewerError
├── BackupError: BackupDamagedError
├── ExportError: ExportRefusedError, ExportFailedError, ExportDamagedError, ExportMismatchError
├── BranchRefusedError        a branch of a run cannot be made in this directory
└── RequestError: InvalidFieldError, NotAuthenticatedError, NotPermittedError, TooManyCallsError, ProfileFailedError,
    │             ServiceDrainingError, TooManySubscribersError, SubscriberTooSlowError
    └── WrongStateError: StillUnderwayError
"""

from tolaria.errors.base import BindError as BindError
from tolaria.errors.base import ChildFailedError as ChildFailedError
from tolaria.errors.base import CommandRejectedError as CommandRejectedError
from tolaria.errors.base import ConfigurationError as ConfigurationError
from tolaria.errors.base import CredentialsError as CredentialsError
from tolaria.errors.base import ExposedError as ExposedError
from tolaria.errors.base import IllegalMoveError as IllegalMoveError
from tolaria.errors.base import IllegalTransitionError as IllegalTransitionError
from tolaria.errors.base import StateHeldError as StateHeldError
from tolaria.errors.base import TolariaError as TolariaError
from tolaria.errors.base import first_line as first_line
from tolaria.errors.operation import BackupDamagedError as BackupDamagedError
from tolaria.errors.operation import BackupError as BackupError
from tolaria.errors.operation import BlockOwnedError as BlockOwnedError
from tolaria.errors.operation import BoardBusyError as BoardBusyError
from tolaria.errors.operation import BoardLostError as BoardLostError
from tolaria.errors.operation import BoardRefusedError as BoardRefusedError
from tolaria.errors.operation import BranchRefusedError as BranchRefusedError
from tolaria.errors.operation import BreakerOpenError as BreakerOpenError
from tolaria.errors.operation import BroadcastFailedError as BroadcastFailedError
from tolaria.errors.operation import CallRefusedError as CallRefusedError
from tolaria.errors.operation import CheckpointDamagedError as CheckpointDamagedError
from tolaria.errors.operation import CheckpointError as CheckpointError
from tolaria.errors.operation import CheckpointUnreadableError as CheckpointUnreadableError
from tolaria.errors.operation import CheckpointWriteError as CheckpointWriteError
from tolaria.errors.operation import ClearanceRefusedError as ClearanceRefusedError
from tolaria.errors.operation import EmergencyError as EmergencyError
from tolaria.errors.operation import ExportDamagedError as ExportDamagedError
from tolaria.errors.operation import ExportError as ExportError
from tolaria.errors.operation import ExportFailedError as ExportFailedError
from tolaria.errors.operation import ExportMismatchError as ExportMismatchError
from tolaria.errors.operation import ExportRefusedError as ExportRefusedError
from tolaria.errors.operation import IllegalEmergencyEventError as IllegalEmergencyEventError
from tolaria.errors.operation import ImageDamagedError as ImageDamagedError
from tolaria.errors.operation import InvalidFieldError as InvalidFieldError
from tolaria.errors.operation import JournalDamagedError as JournalDamagedError
from tolaria.errors.operation import JournalError as JournalError
from tolaria.errors.operation import JournalNewerError as JournalNewerError
from tolaria.errors.operation import JournalUnavailableError as JournalUnavailableError
from tolaria.errors.operation import NoCheckpointError as NoCheckpointError
from tolaria.errors.operation import NotAuthenticatedError as NotAuthenticatedError
from tolaria.errors.operation import NotPermittedError as NotPermittedError
from tolaria.errors.operation import PeerError as PeerError
from tolaria.errors.operation import PeerProtocolError as PeerProtocolError
from tolaria.errors.operation import PeerTimeoutError as PeerTimeoutError
from tolaria.errors.operation import PeerUnavailableError as PeerUnavailableError
from tolaria.errors.operation import ProfileFailedError as ProfileFailedError
from tolaria.errors.operation import RequestError as RequestError
from tolaria.errors.operation import RestoreAbandonedError as RestoreAbandonedError
from tolaria.errors.operation import RestoreUnprovenError as RestoreUnprovenError
from tolaria.errors.operation import RollbackError as RollbackError
from tolaria.errors.operation import ServiceDrainingError as ServiceDrainingError
from tolaria.errors.operation import SignalError as SignalError
from tolaria.errors.operation import SignalValueError as SignalValueError
from tolaria.errors.operation import StateMismatchError as StateMismatchError
from tolaria.errors.operation import StateRefusedError as StateRefusedError
from tolaria.errors.operation import StateUnsupportedError as StateUnsupportedError
from tolaria.errors.operation import StillUnderwayError as StillUnderwayError
from tolaria.errors.operation import SubscriberTooSlowError as SubscriberTooSlowError
from tolaria.errors.operation import TooManyCallsError as TooManyCallsError
from tolaria.errors.operation import TooManySubscribersError as TooManySubscribersError
from tolaria.errors.operation import UnknownLevelError as UnknownLevelError
from tolaria.errors.operation import WrongStateError as WrongStateError
from tolaria.errors.training import AdjustmentRefusedError as AdjustmentRefusedError
from tolaria.errors.training import BlueprintError as BlueprintError
from tolaria.errors.training import BlueprintMisfitError as BlueprintMisfitError
from tolaria.errors.training import BrokenJobError as BrokenJobError
from tolaria.errors.training import ChannelError as ChannelError
from tolaria.errors.training import ControllerStateError as ControllerStateError
from tolaria.errors.training import EmptyDatasetError as EmptyDatasetError
from tolaria.errors.training import GradientError as GradientError
from tolaria.errors.training import GradientMismatchError as GradientMismatchError
from tolaria.errors.training import GradientWeightError as GradientWeightError
from tolaria.errors.training import GroupConflictError as GroupConflictError
from tolaria.errors.training import HyperparameterError as HyperparameterError
from tolaria.errors.training import JobError as JobError
from tolaria.errors.training import JoinError as JoinError
from tolaria.errors.training import JoinRefusedError as JoinRefusedError
from tolaria.errors.training import LaneError as LaneError
from tolaria.errors.training import LaneFailedError as LaneFailedError
from tolaria.errors.training import LaneLostError as LaneLostError
from tolaria.errors.training import LaneStoppedError as LaneStoppedError
from tolaria.errors.training import LossShapeError as LossShapeError
from tolaria.errors.training import NoGradientsError as NoGradientsError
from tolaria.errors.training import OptimizationError as OptimizationError
from tolaria.errors.training import OwnershipError as OwnershipError
from tolaria.errors.training import PeerLostError as PeerLostError
from tolaria.errors.training import RankFailedError as RankFailedError
from tolaria.errors.training import RanksDifferError as RanksDifferError
from tolaria.errors.training import RebuildFailedError as RebuildFailedError
from tolaria.errors.training import ScheduleError as ScheduleError
from tolaria.errors.training import SeedError as SeedError
from tolaria.errors.training import ServiceAbsentError as ServiceAbsentError
from tolaria.errors.training import SlotError as SlotError
from tolaria.errors.training import TopologyStateError as TopologyStateError
from tolaria.errors.training import UnknownBlueprintError as UnknownBlueprintError
from tolaria.errors.training import UnknownGroupError as UnknownGroupError
from tolaria.errors.training import UnknownJobError as UnknownJobError
from tolaria.errors.training import UnknownSourceError as UnknownSourceError
from tolaria.errors.training import UnmergeableParameterError as UnmergeableParameterError
from tolaria.errors.training import UnsuitableOptimizerError as UnsuitableOptimizerError
from tolaria.errors.training import WireError as WireError
