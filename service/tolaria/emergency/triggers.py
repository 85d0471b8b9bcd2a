"""What raises an emergency by itself, at which level, and when a rule may end it. Pure data and counting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from leyline.v1.enums_pb2 import (
    EMERGENCY_LEVEL_CONSERVATIVE,
    EMERGENCY_LEVEL_ELEVATED,
    EMERGENCY_LEVEL_HALT,
    EmergencyLevel,
)
from tolaria.emergency.protocol import EmergencyState, Phase


class Trigger(Enum):
    """What the service can notice of itself. The value is the stable beginning of the reason."""

    BOUNDARY_BREACH = "boundary_breach"
    HOOK_BREACH = "hook_breach"
    BREAKER_OPEN = "breaker_open"
    ROLLBACK_DEADLINE_MISSED = "rollback_deadline_missed"
    FAILED_EPOCH_STREAK = "failed_epoch_streak"
    ROLLBACK_BUDGET_SPENT = "rollback_budget_spent"
    HEARTBEAT_SILENT = "heartbeat_silent"


TRIGGERS: Mapping[Trigger, EmergencyLevel.ValueType] = {
    Trigger.BOUNDARY_BREACH: EMERGENCY_LEVEL_ELEVATED,
    Trigger.HOOK_BREACH: EMERGENCY_LEVEL_ELEVATED,
    Trigger.BREAKER_OPEN: EMERGENCY_LEVEL_CONSERVATIVE,
    Trigger.ROLLBACK_DEADLINE_MISSED: EMERGENCY_LEVEL_HALT,
    Trigger.FAILED_EPOCH_STREAK: EMERGENCY_LEVEL_HALT,
    Trigger.ROLLBACK_BUDGET_SPENT: EMERGENCY_LEVEL_HALT,
    Trigger.HEARTBEAT_SILENT: EMERGENCY_LEVEL_HALT,
}


@dataclass(frozen=True, slots=True)
class EpochStreak:
    """How epochs have gone lately: `failed` and `healthy` ones in a row, of which one is 0.

    `failed_max`: failed ones in a row that are a `FAILED_EPOCH_STREAK`.
    """

    failed_max: int
    failed: int = 0
    healthy: int = 0

    @property
    def spent(self) -> bool:
        """Whether the last epoch completed a streak of failures; again only after as many more."""
        return self.failed > 0 and self.failed % self.failed_max == 0

    def after(self, *, healthy: bool) -> EpochStreak:
        """With one more epoch."""
        if healthy:
            return replace(self, failed=0, healthy=self.healthy + 1)
        return replace(self, failed=self.failed + 1, healthy=0)


def recovered(state: EmergencyState, streak: EpochStreak, *, recovery_epochs: int, cause_stands: bool) -> bool:
    """Whether the rule `Clearer.RECOVERED` applies: below HALT, healthy for long enough, and no cause left.

    `cause_stands`: some breaker is not closed, or the like.
    """
    below_halt = Phase.CALM is not state.phase and state.level < EMERGENCY_LEVEL_HALT
    return below_halt and not cause_stands and streak.healthy >= recovery_epochs
