"""The one authority over learning rates, and optimizers rebuilt without losing momentum. `regroup` is both at a fence.

Imports torch; knows nothing of grpc, settings files, metric names, the training loop or seeds' modules.
"""

from tolaria.optimization.adjustments import AdjustmentRecord, Retraction
from tolaria.optimization.carry import Build
from tolaria.optimization.groups import HOST_GROUP, GroupPlan, OptimizerHolder
from tolaria.optimization.hyperparameters import HyperparameterChange, change_hyperparameters
from tolaria.optimization.lr_controller import LearningRateSettings, UnifiedLRController
from tolaria.optimization.optimizer_manager import OptimizerManager
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
    "AdjustmentRecord",
    "AfterPeriod",
    "Build",
    "Constant",
    "Cosine",
    "GroupPlan",
    "HyperparameterChange",
    "LearningRateSettings",
    "OptimizerHolder",
    "OptimizerManager",
    "Policy",
    "Retraction",
    "Schedule",
    "ScheduleSpec",
    "StepDecay",
    "UnifiedLRController",
    "Warmup",
    "build_schedule",
    "change_hyperparameters",
    "regroup",
]
