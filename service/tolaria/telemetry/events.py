"""Every event, once: its name, its level and the attributes that it always carries.

Owns the catalogue. Must not know who emits an event or who reads it.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from leyline.v1.enums_pb2 import (
    TELEMETRY_LEVEL_CRITICAL,
    TELEMETRY_LEVEL_ERROR,
    TELEMETRY_LEVEL_INFO,
    TELEMETRY_LEVEL_WARNING,
    TelemetryLevel,
)
from leyline.v1.telemetry_pb2 import TelemetryEvent


@dataclass(frozen=True, slots=True)
class EventSpec:
    """One line of the catalogue. `name` becomes the description of the Leyline event."""

    name: str
    level: TelemetryLevel.ValueType
    attributes: tuple[str, ...]

    def occurrence(self, **attributes: str | float) -> TelemetryEvent:
        """The Leyline message for one occurrence.

        Raises:
            ValueError: when the attributes are not exactly those declared.
        """
        if set(attributes) != set(self.attributes):
            raise ValueError(f"{self.name} carries {sorted(self.attributes)}, got {sorted(attributes)}")
        return TelemetryEvent(
            event_id=uuid.uuid4().hex,
            description=self.name,
            level=self.level,
            attributes={name: _text(value) for name, value in attributes.items()},
        )


def _text(value: str | float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


_EMERGENCY = ("emergency_level", "reason", "origin")
_CALL = ("method", "detail", "latency_ms")

TAMIYO_TIMEOUT = EventSpec("tolaria.tamiyo_timeout", TELEMETRY_LEVEL_WARNING, _CALL)
TAMIYO_ERROR = EventSpec("tolaria.tamiyo_error", TELEMETRY_LEVEL_WARNING, _CALL)
KASMINA_TIMEOUT = EventSpec("tolaria.kasmina_timeout", TELEMETRY_LEVEL_WARNING, _CALL)
KASMINA_ERROR = EventSpec("tolaria.kasmina_error", TELEMETRY_LEVEL_WARNING, _CALL)
TIMEOUT_INFERENCE = EventSpec("timeout_inference", TELEMETRY_LEVEL_WARNING, _CALL)
BREAKER_OPENED = EventSpec("tolaria.breaker_opened", TELEMETRY_LEVEL_WARNING, ("breaker",))
BREAKER_CLOSED = EventSpec("tolaria.breaker_closed", TELEMETRY_LEVEL_INFO, ("breaker",))
CONSERVATIVE_MODE_ENTERED = EventSpec("tolaria.conservative_mode_entered", TELEMETRY_LEVEL_WARNING, ("reasons",))
CONSERVATIVE_MODE_CLEARED = EventSpec("tolaria.conservative_mode_cleared", TELEMETRY_LEVEL_INFO, ("reasons",))
EMERGENCY_ESCALATED = EventSpec(
    "tolaria.emergency.escalated", TELEMETRY_LEVEL_WARNING, ("emergency_level", "reason", "origin")
)
EMERGENCY_HALT = EventSpec("tolaria.emergency.halt", TELEMETRY_LEVEL_CRITICAL, ("reason", "origin"))
EMERGENCY_CLEARED = EventSpec("tolaria.emergency.cleared", TELEMETRY_LEVEL_INFO, (*_EMERGENCY, "by"))
EMERGENCY_BROADCAST = EventSpec("emergency_broadcast", TELEMETRY_LEVEL_CRITICAL, (*_EMERGENCY, "count"))
EMERGENCY_BROADCAST_FAILED = EventSpec(
    "tolaria.emergency.broadcast_failed", TELEMETRY_LEVEL_CRITICAL, ("reason", "detail")
)
HEARTBEAT_LOST = EventSpec("tolaria.heartbeat_lost", TELEMETRY_LEVEL_CRITICAL, ("reason",))
EPOCH_BUDGET_EXCEEDED = EventSpec(
    "tolaria.epoch_budget_exceeded", TELEMETRY_LEVEL_WARNING, ("epoch", "latency_ms", "budget_ms")
)
HOOK_BUDGET_EXCEEDED = EventSpec(
    "tolaria.hook_budget_exceeded", TELEMETRY_LEVEL_WARNING, ("step", "latency_ms", "budget_ms")
)
ZERO_SAMPLES = EventSpec("zero_samples", TELEMETRY_LEVEL_WARNING, ("epoch",))
COMMAND_REJECTED = EventSpec("command_rejected", TELEMETRY_LEVEL_WARNING, ("command_id", "reason", "detail"))
NON_FINITE_STEP = EventSpec("tolaria.non_finite_step", TELEMETRY_LEVEL_ERROR, ("step", "loss", "gradient_norm"))
GRAD_CONFLICT_HIGH = EventSpec("grad_conflict_high", TELEMETRY_LEVEL_WARNING, ("epoch", "ratio", "threshold"))
SEED_CONFLICT_HIGH = EventSpec("seed_conflict_high", TELEMETRY_LEVEL_WARNING, ("seed_id", "ratio", "threshold"))
SEED_SHARE_JUMP = EventSpec("seed_share_jump", TELEMETRY_LEVEL_WARNING, ("seed_id", "delta", "threshold"))
SEED_HEALTH = EventSpec(
    "seed_health", TELEMETRY_LEVEL_INFO, ("seed_id", "share", "share_delta", "conflict_ratio", "alpha", "norm")
)
LR_INTEGRITY_VIOLATION = EventSpec(
    "tolaria.lr_integrity_violation", TELEMETRY_LEVEL_ERROR, ("group", "expected", "found")
)
OPT_REBUILT = EventSpec("tolaria.opt_rebuilt", TELEMETRY_LEVEL_INFO, ("step", "latency_ms", "kept", "fresh", "dropped"))
OPT_REBUILD_FAILED = EventSpec("tolaria.opt_rebuild_failed", TELEMETRY_LEVEL_ERROR, ("step", "detail"))
COMPILE_FALLBACK = EventSpec("tolaria.compile_fallback", TELEMETRY_LEVEL_WARNING, ("path", "detail"))
LOSS_EXPLOSION = EventSpec("tolaria.loss_explosion", TELEMETRY_LEVEL_ERROR, ("step", "loss", "gradient_norm", "reason"))
ROLLBACK_COMPLETED = EventSpec(
    "tolaria.rollback.completed",
    TELEMETRY_LEVEL_WARNING,
    ("rollback_id", "tier", "restored_step", "latency_ms", "coordinated", "reason"),
)
ROLLBACK_RESTORE_FAILED = EventSpec(
    "tolaria.rollback.restore_failed", TELEMETRY_LEVEL_ERROR, ("rollback_id", "tier", "stage", "reason")
)
ROLLBACK_DEADLINE_EXCEEDED = EventSpec(
    "tolaria.rollback.deadline_exceeded", TELEMETRY_LEVEL_ERROR, ("rollback_id", "tier", "latency_ms")
)
CHECKPOINT_FAILED = EventSpec("tolaria.checkpoint_failed", TELEMETRY_LEVEL_ERROR, ("step", "stage", "reason"))
PROFILER_EXPORT_FAILED = EventSpec("tolaria.profiler.export_failed", TELEMETRY_LEVEL_WARNING, ("stage", "reason"))

CATALOGUE: tuple[EventSpec, ...] = tuple(value for value in list(globals().values()) if isinstance(value, EventSpec))
