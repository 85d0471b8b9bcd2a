"""Learning rates under one controller, and optimizers that are rebuilt without losing state."""

from tolaria.optimization.groups import GroupPlan
from tolaria.optimization.hyperparameters import change_hyperparameters
from tolaria.optimization.lr_controller import UnifiedLRController, regroup
from tolaria.optimization.optimizer_manager import OptimizerManager

__all__ = ["GroupPlan", "OptimizerManager", "UnifiedLRController", "change_hyperparameters", "regroup"]
