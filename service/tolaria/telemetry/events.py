"""The catalogue of events, each with its name, level and attributes, and the emitter that logs and publishes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import structlog

from leyline.v1.enums_pb2 import (
    EMERGENCY_LEVEL_CONSERVATIVE,
    EMERGENCY_LEVEL_ELEVATED,
    EMERGENCY_LEVEL_HALT,
    EMERGENCY_LEVEL_NOTICE,
    HEALTH_STATUS_CRITICAL,
    HEALTH_STATUS_DEGRADED,
    HEALTH_STATUS_HEALTHY,
    HEALTH_STATUS_UNHEALTHY,
    TELEMETRY_LEVEL_CRITICAL,
    TELEMETRY_LEVEL_ERROR,
    TELEMETRY_LEVEL_INFO,
    TELEMETRY_LEVEL_WARNING,
    EmergencyLevel,
    HealthStatus,
    TelemetryLevel,
)
from tolaria.telemetry.logging import ON_WRITTEN
from tolaria.telemetry.packets import Occurrence, Packets
from tolaria.telemetry.tracing import Tracer

_LOG_LEVELS: dict[TelemetryLevel.ValueType, int] = {
    TELEMETRY_LEVEL_INFO: logging.INFO,
    TELEMETRY_LEVEL_WARNING: logging.WARNING,
    TELEMETRY_LEVEL_ERROR: logging.ERROR,
    TELEMETRY_LEVEL_CRITICAL: logging.CRITICAL,
}


_TEXT_LENGTH_MAX = 4096
_HEALTH: dict[TelemetryLevel.ValueType, HealthStatus.ValueType] = {
    TELEMETRY_LEVEL_INFO: HEALTH_STATUS_HEALTHY,
    TELEMETRY_LEVEL_WARNING: HEALTH_STATUS_DEGRADED,
    TELEMETRY_LEVEL_ERROR: HEALTH_STATUS_DEGRADED,
    TELEMETRY_LEVEL_CRITICAL: HEALTH_STATUS_CRITICAL,
}


@dataclass(frozen=True, slots=True)
class EventSpec:
    """The declaration of an event: every occurrence has exactly these attributes.

    `health` is that of its packet; `emergency`: the packet is one of an emergency.
    """

    name: str
    level: TelemetryLevel.ValueType
    attributes: tuple[str, ...]
    health: HealthStatus.ValueType
    emergency: bool = False


class Emitter:
    """Emits events to the log and to the subscribers of telemetry. Used on the event loop only."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        self._log = structlog.get_logger()
        self._packets: Packets | None = None
        self.tracer = Tracer() if tracer is None else tracer
        """Records the spans that packets contain."""

    def publish_to(self, packets: Packets) -> None:
        """Publishes further events as packets, too."""
        self._packets = packets

    def emit(
        self, spec: EventSpec, on_delivered: Callable[[], None] | None = None, /, **attributes: str | float
    ) -> None:
        """Logs and publishes one occurrence of an event.

        `on_delivered` is called once, from any thread, when the event has been written to the log or to a
        subscriber's connection; never, if that does not happen.

        Raises:
            ValueError: the attributes are not the declared ones.
        """
        if set(attributes) != set(spec.attributes):
            raise ValueError(f"{spec.name} carries {sorted(spec.attributes)}, got {sorted(attributes)}")
        first = None if on_delivered is None else _FirstCall(on_delivered)
        extra = {} if first is None else {ON_WRITTEN: first}
        self._log.log(_LOG_LEVELS[spec.level], spec.name, **attributes, **extra)
        if self._packets is not None:
            shown = {name: _text(value) for name, value in attributes.items()}
            self._packets.event(Occurrence(spec.name, spec.level, spec.health, shown, spec.emergency), first)


class _FirstCall:
    """Calls a function at the first of all calls, from any thread."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._left = [function]

    def __call__(self) -> None:
        with suppress(IndexError):
            self._left.pop()()  # pop is atomic


def _text(value: str | float) -> str:
    """Returns an attribute as text: numbers with six significant digits, booleans as JSON writes them."""
    if isinstance(value, bool):
        return str(value).lower()
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text[:_TEXT_LENGTH_MAX].encode(errors="replace").decode()  # a peer's text may not be valid Unicode


def _spec(level: TelemetryLevel.ValueType, name: str, *attributes: str) -> EventSpec:
    return EventSpec(name, level, attributes, _HEALTH[level])


def _of_emergency(spec: EventSpec) -> EventSpec:
    return replace(spec, emergency=True)


_info = partial(_spec, TELEMETRY_LEVEL_INFO)
_warning = partial(_spec, TELEMETRY_LEVEL_WARNING)
_error = partial(_spec, TELEMETRY_LEVEL_ERROR)
_critical = partial(_spec, TELEMETRY_LEVEL_CRITICAL)


def event_names() -> set[str]:
    """Returns the names of all events."""
    declared = {value.name for value in globals().values() if isinstance(value, EventSpec)}
    return declared | {spec.name for spec in EMERGENCY_BROADCASTS.values()}


# Peers, circuit breakers, conservative mode
_CALL = ("method", "detail", "latency_ms")
TAMIYO_TIMEOUT = _warning("tolaria.tamiyo_timeout", *_CALL)
TAMIYO_ERROR = _warning("tolaria.tamiyo_error", *_CALL)
KASMINA_TIMEOUT = _warning("tolaria.kasmina_timeout", *_CALL)
KASMINA_ERROR = _warning("tolaria.kasmina_error", *_CALL)
TIMEOUT_INFERENCE = _warning("timeout_inference", *_CALL)
COMMAND_REJECTED = _warning("command_rejected", "command_id", "reason", "detail")
BREAKER_OPENED = _warning("tolaria.breaker_opened", "breaker")
BREAKER_CLOSED = _info("tolaria.breaker_closed", "breaker")
CONSERVATIVE_MODE_ENTERED = _warning("tolaria.conservative_mode_entered", "reasons")
CONSERVATIVE_MODE_CLEARED = _info("tolaria.conservative_mode_cleared", "reasons")

# The service
CONFIG_RELOADED = _info("tolaria.config_reloaded", "origin", "changed", "waiting")
CONFIG_RELOAD_FAILED = _error("tolaria.config_reload_failed", "origin", "problem")

# Emergencies
_EMERGENCY = ("emergency_level", "reason", "origin")
EMERGENCY_ESCALATED = _of_emergency(_warning("tolaria.emergency.escalated", *_EMERGENCY))
EMERGENCY_HALT = _of_emergency(_critical("tolaria.emergency.halt", "reason", "origin"))
EMERGENCY_CLEARED = _of_emergency(_info("tolaria.emergency.cleared", *_EMERGENCY, "by"))
_BROADCAST = ("emergency_broadcast", *_EMERGENCY, "count")
EMERGENCY_BROADCASTS: Mapping[EmergencyLevel.ValueType, EventSpec] = {
    EMERGENCY_LEVEL_NOTICE: _of_emergency(_info(*_BROADCAST)),
    EMERGENCY_LEVEL_ELEVATED: _of_emergency(_warning(*_BROADCAST)),
    EMERGENCY_LEVEL_CONSERVATIVE: _of_emergency(_critical(*_BROADCAST)),
    EMERGENCY_LEVEL_HALT: _of_emergency(_critical(*_BROADCAST)),
}
"""One event at the level of what it reports."""

EMERGENCY_BROADCAST_FAILED = _of_emergency(_critical("tolaria.emergency.broadcast_failed", "reason", "detail"))
HEARTBEAT_LOST = _of_emergency(_critical("tolaria.heartbeat_lost", "reason"))

# Steps and epochs
EPOCH_BUDGET_EXCEEDED = _warning("tolaria.epoch_budget_exceeded", "epoch", "latency_ms", "budget_ms")
EPOCH_HOOK_LATENCY_HIGH = _warning("epoch_hook_latency_high", "epoch", "latency_ms", "budget_ms")
LATENCY_HIGH = _warning("latency_high", "epoch", "latency_ms", "usual_ms")
HOOK_BUDGET_EXCEEDED = _warning("tolaria.hook_budget_exceeded", "step", "latency_ms", "budget_ms")
ZERO_SAMPLES = replace(_warning("zero_samples", "epoch"), health=HEALTH_STATUS_UNHEALTHY)
ACCURACY_ABOVE_ONE = _warning("tolaria.accuracy_above_one", "epoch", "correct", "samples")
METRIC_MISSING = _warning("tolaria.metric_missing", "setting", "metric", "known")
NON_FINITE_STEP = _error("tolaria.non_finite_step", "step", "loss", "gradient_norm")
STEP_SKIPPED = _warning("tolaria.step_skipped", "step", "epoch", "batches", "loss", "gradient_norm", "reason")
DATA_SKIPPED = _warning("tolaria.data_skipped", "skip_id", "batches", "count")
DATA_SKIP_REMOVED = _info("tolaria.data_skip_removed", "skip_id", "batches", "count")
PARAMETERS_CHECKED = _warning("tolaria.parameters_checked", "step", "finite")
LOSS_REGIME_ACCEPTED = _warning("tolaria.loss_regime_accepted", "step", "reason", "origin")
LOSS_EXPLOSION = _error("tolaria.loss_explosion", "step", "loss", "gradient_norm", "reason")

# Gradients and seeds
GRAD_CONFLICT_HIGH = _warning("grad_conflict_high", "epoch", "ratio", "threshold")
SEED_CONFLICT_HIGH = _warning("seed_conflict_high", "seed_id", "ratio", "threshold")
SEED_SHARE_JUMP = _warning("seed_share_jump", "seed_id", "delta", "threshold")
SEED_GRADIENTS_DROPPED = _warning("tolaria.seed_gradients_dropped", "step", "seed_id")
SEED_CULLED = _error("tolaria.seed_culled", "step", "seed_id", "reason")
SEED_HEALTH = _info("seed_health", "seed_id", "share", "share_delta", "conflict_ratio", "alpha", "norm")

# Optimizer and fast paths
LR_LIMITED = _warning("tolaria.lr_limited", "origin", "detail")
LR_INTEGRITY_VIOLATION = _error("tolaria.lr_integrity_violation", "group", "expected", "found", "detail")
OPT_REBUILT = _info("tolaria.opt_rebuilt", "step", "latency_ms", "kept", "fresh", "dropped")
OPT_REBUILD_FAILED = _error("tolaria.opt_rebuild_failed", "step", "detail")
COMPILE_FALLBACK = _warning("tolaria.compile_fallback", "path", "detail")

# The lane's process
LANE_LOST = _error("tolaria.lane_lost", "generation", "step", "cause", "detail")
LANE_RECOVERED = _warning("tolaria.lane_recovered", "generation", "step", "latency_ms")

# Rollback, checkpoints, trackers, profiles
ROLLBACK_COMPLETED = _warning(
    "tolaria.rollback.completed", "rollback_id", "tier", "restored_step", "latency_ms", "coordinated", "reason"
)
ROLLBACK_RESTORE_FAILED = _error("tolaria.rollback.restore_failed", "rollback_id", "tier", "stage", "reason")
ROLLBACK_DEADLINE_EXCEEDED = _error("tolaria.rollback.deadline_exceeded", "rollback_id", "tier", "latency_ms")
CHECKPOINT_FAILED = _error("tolaria.checkpoint_failed", "step", "stage", "reason")
TRACKER_FAILED = _warning("tolaria.tracker_failed", "tracker", "detail")
TRACKER_RECOVERED = _info("tolaria.tracker_recovered", "tracker")
METRICS_LOG_FAILED = _warning("tolaria.metrics_log_failed", "detail")
PROFILER_EXPORT_FAILED = _warning("tolaria.profiler.export_failed", "stage", "reason")
