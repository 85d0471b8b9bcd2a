"""The one authority over learning rates, and optimizers rebuilt without losing momentum. `regroup` is both at a fence.

Imports torch; knows nothing of grpc, settings files, metric names, the training loop or seeds' modules.
"""

from tolaria.optimization.adjustments import Adjustment, AdjustmentRecord, LiveAdjustment, Retraction
from tolaria.optimization.carry import Build
from tolaria.optimization.groups import HOST_GROUP, GroupPlan, GroupRole, OptimizerHolder
from tolaria.optimization.hyperparameters import HyperparameterChange, change_hyperparameters
from tolaria.optimization.lr_controller import LearningRateSettings, UnifiedLRController
from tolaria.optimization.optimizer_manager import OptimizerManager, RebuildOutcome, RebuildResult
from tolaria.optimization.rate_writer import Violation
from tolaria.optimization.regroup import regroup
from tolaria.optimization.schedules import (
    AfterPeriod,
    Constant,
    Cosine,
    Policy,
    Schedule,
    ScheduleSpec,
    StepDecay,
    Warmup,
    build_schedule,
)

__all__ = [
    "HOST_GROUP",
    "Adjustment",
    "AdjustmentRecord",
    "AfterPeriod",
    "Build",
    "Constant",
    "Cosine",
    "GroupPlan",
    "GroupRole",
    "HyperparameterChange",
    "LearningRateSettings",
    "LiveAdjustment",
    "OptimizerHolder",
    "OptimizerManager",
    "Policy",
    "RebuildOutcome",
    "RebuildResult",
    "Retraction",
    "Schedule",
    "ScheduleSpec",
    "StepDecay",
    "UnifiedLRController",
    "Violation",
    "Warmup",
    "build_schedule",
    "change_hyperparameters",
    "regroup",
]
