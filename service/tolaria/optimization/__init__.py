"""Learning rates under one controller, and optimizers that are rebuilt without losing state."""

from tolaria.optimization.adjustments import RateChange
from tolaria.optimization.groups import HOST_GROUP, GroupPlan
from tolaria.optimization.hyperparameters import HyperparameterChange, change_hyperparameters
from tolaria.optimization.lr_controller import LearningRateSettings, UnifiedLRController, regroup
from tolaria.optimization.optimizer_manager import OptimizerManager
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
from tolaria.optimization.state_transfer import Build

__all__ = [
    "HOST_GROUP",
    "AfterPeriod",
    "Build",
    "Constant",
    "Cosine",
    "GroupPlan",
    "HyperparameterChange",
    "LearningRateSettings",
    "OptimizerManager",
    "Policy",
    "RateChange",
    "Schedule",
    "ScheduleSpec",
    "StepDecay",
    "UnifiedLRController",
    "Warmup",
    "build_schedule",
    "change_hyperparameters",
    "regroup",
]
