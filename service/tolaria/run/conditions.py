"""What the health of a run depends on, and the health that follows."""

from __future__ import annotations

from dataclasses import dataclass

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1 import enums_pb2 as enums
from leyline.v1.telemetry_pb2 import SystemHealth
from tolaria.emergency.protocol import HOW_TO_GO_ON, level_name
from tolaria.run.status import RunStatus
from tolaria.values.optimization import RATES_ARE_OWNED


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the health of a run depends on, besides its state; an empty text or tuple is no condition.

    `foreign_rates` counts the steps of this process before which other code had changed a learning rate.
    `missing_metrics` are sentences about settings that name a metric which has not occurred.
    """

    emergency_level: enums.EmergencyLevel.ValueType
    emergency_reason: str
    conservative_reasons: tuple[str, ...]
    open_breakers: tuple[str, ...]
    checkpoints_failing: str
    skipped_streak: int
    foreign_rates: int = 0
    missing_metrics: tuple[str, ...] = ()

    @property
    def degradations(self) -> list[str]:
        """Sentences about everything that does not stop training."""
        elevated = self.emergency_level > enums.EMERGENCY_LEVEL_NOTICE
        rates = f"other code changed learning rates before {self.foreign_rates} steps; {RATES_ARE_OWNED}"
        found = {
            rates: self.foreign_rates,
            f"emergency level {level_name(self.emergency_level)}: {self.emergency_reason}": elevated,
            f"checkpoints fail: {self.checkpoints_failing}": self.checkpoints_failing,
            f"the last {self.skipped_streak} steps were skipped": self.skipped_streak,
            f"breakers not closed: {', '.join(self.open_breakers)}": self.open_breakers,
            f"conservative mode is on: {', '.join(self.conservative_reasons)}": self.conservative_reasons,
            "; ".join(self.missing_metrics): self.missing_metrics,
        }
        return [sentence for sentence, applies in found.items() if applies]


def health_of(status: RunStatus, conditions: Conditions) -> SystemHealth:
    """Returns the health of the run, and in the summary why it is not healthy and what an operator can do."""
    reason = status.state_reason
    if status.state == admin.RUN_STATE_FAILED:
        return SystemHealth(status=enums.HEALTH_STATUS_UNHEALTHY, summary=reason)
    if conditions.emergency_level == enums.EMERGENCY_LEVEL_HALT:
        summary = f"halted: {conditions.emergency_reason}; {HOW_TO_GO_ON}"
        return SystemHealth(status=enums.HEALTH_STATUS_CRITICAL, summary=summary)
    if status.recovering:
        return SystemHealth(status=enums.HEALTH_STATUS_UNHEALTHY, summary=f"recovering: {status.recovering}")
    if status.state == admin.RUN_STATE_HALTED:
        return SystemHealth(status=enums.HEALTH_STATUS_UNHEALTHY, summary=reason)
    if degradations := conditions.degradations:
        return SystemHealth(status=enums.HEALTH_STATUS_DEGRADED, summary="; ".join(degradations))
    return SystemHealth(status=enums.HEALTH_STATUS_HEALTHY)
