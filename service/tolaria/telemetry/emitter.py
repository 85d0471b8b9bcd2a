"""Where events go when they happen: into the log, and into a short memory of the latest.

Owns the fan-out. Must not know why an event happened.
"""

from __future__ import annotations

import logging
from collections import deque

import structlog

from leyline.v1.enums_pb2 import (
    TELEMETRY_LEVEL_CRITICAL,
    TELEMETRY_LEVEL_ERROR,
    TELEMETRY_LEVEL_INFO,
    TELEMETRY_LEVEL_WARNING,
    TelemetryLevel,
)
from leyline.v1.telemetry_pb2 import TelemetryEvent
from tolaria.telemetry.events import EventSpec

_LOG_LEVEL: dict[TelemetryLevel.ValueType, int] = {
    TELEMETRY_LEVEL_INFO: logging.INFO,
    TELEMETRY_LEVEL_WARNING: logging.WARNING,
    TELEMETRY_LEVEL_ERROR: logging.ERROR,
    TELEMETRY_LEVEL_CRITICAL: logging.CRITICAL,
}
_RECENT_MAX = 256


class Emitter:
    """Takes every event of the service; used on the event loop only."""

    def __init__(self) -> None:
        self._log = structlog.get_logger()
        self.recent: deque[TelemetryEvent] = deque(maxlen=_RECENT_MAX)

    def emit(self, spec: EventSpec, **attributes: str | float) -> None:
        """Record one occurrence. Raises ValueError when the attributes are not those that the event declares."""
        event = spec.occurrence(**attributes)
        self.recent.append(event)
        self._log.log(_LOG_LEVEL[spec.level], spec.name, **attributes)
