"""The observer that writes what the lane's process does to metrics and events."""

from __future__ import annotations

from typing import Final

from tolaria.lane.messages import LOSS_KINDS, EpochDone, LaneLost, LaneReady
from tolaria.run.observers import RunObserver
from tolaria.telemetry import events
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.metrics import Metrics, start_at_zero

_RANK: Final = "0"

_RANKS_MAX: Final = 64
"""Ranks that have series in Prometheus; status has all."""


class LaneTelemetry(RunObserver):
    """Metrics and events of the process in which the lane computes, which may be this one."""

    def __init__(self, metrics: Metrics, emitter: Emitter) -> None:
        self._metrics = metrics
        self._emitter = emitter
        self._ranks = 0
        start_at_zero(metrics.lane_restarts_total, ((_RANK, kind) for kind in LOSS_KINDS))
        metrics.lane_up.labels(_RANK).set(0)
        metrics.lane_recovery_seconds.labels(_RANK)

    def on_ready(self, ready: LaneReady) -> None:  # noqa: ARG002 - the hook's signature
        self._show(1)

    def on_epoch(self, epoch: EpochDone, *, show_layers: bool) -> None:  # noqa: ARG002 - the hook's signature
        metrics, loads = self._metrics, epoch.rank_loads[:_RANKS_MAX]
        for rank in range(len(loads), self._ranks):  # their machine has left the group
            for family in (metrics.rank_input_wait_seconds, metrics.rank_wait_seconds, metrics.rank_memory_bytes):
                family.remove(str(rank))
        self._ranks = len(loads)
        for rank, load in enumerate(loads):
            metrics.rank_input_wait_seconds.labels(str(rank)).set(load.input_wait_s)
            metrics.rank_wait_seconds.labels(str(rank)).set(load.rank_wait_s)
            metrics.rank_memory_bytes.labels(str(rank)).set(load.memory_bytes)

    def on_lane_lost(self, lost: LaneLost, step: int) -> None:
        self._metrics.lane_up.labels(_RANK).set(0)
        self._metrics.lane_restarts_total.labels(_RANK, lost.kind).inc()
        self._emitter.emit(events.LANE_LOST, generation=lost.generation, step=step, cause=lost.kind, detail=lost.cause)

    def on_lane_recovered(self, generation: int, step: int, duration_s: float) -> None:
        self._show(generation)
        self._metrics.lane_recovery_seconds.labels(_RANK).observe(duration_s)
        self._emitter.emit(events.LANE_RECOVERED, generation=generation, step=step, latency_ms=duration_s * 1000)

    def _show(self, generation: int) -> None:
        self._metrics.lane_up.labels(_RANK).set(1)
        self._metrics.lane_generation.labels(_RANK).set(generation)
