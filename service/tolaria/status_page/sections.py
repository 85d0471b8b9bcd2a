"""The sections of the status page as plain values, from what the run side knows already. Nothing here waits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from leyline.v1.enums_pb2 import CircuitBreakerState, HealthStatus
from tolaria import __version__
from tolaria.config import Settings
from tolaria.emergency.protocol import level_name
from tolaria.journal.rows import CheckpointRow, Incident
from tolaria.rollback.protocol import tier_name
from tolaria.run.checkpointing import Checkpointing
from tolaria.run.conditions import health_of
from tolaria.run.health import Health
from tolaria.run.restore_points import RestorePoint, RestorePoints
from tolaria.run.safety import Safety
from tolaria.run.seed_telemetry import stage_name
from tolaria.run.status import RunStatus, phase_of, quantile, state_name, state_of
from tolaria.status_page.history import PageHistory
from tolaria.status_page.seed_timeline import SeedTrack
from tolaria.values.evaluation import RESERVED
from tolaria.values.optimization import ActiveAdjustment
from tolaria.values.training import RankInfo, RankLoad

Section: TypeAlias = "dict[str, Any] | list[dict[str, Any]] | Iterator[dict[str, Any]]"

ROWS_MAX: Final = 50
"""Incidents, restore points and ranks that are shown; their number is shown too."""

TEXT_MAX: Final = 300
_NS_PER_MS: Final = 1_000_000


@dataclass(slots=True)
class PageParts:
    """What the page shows: settings, which a reload replaces, and parts of the run that keep plain values."""

    settings: Settings
    status: RunStatus
    safety: Safety
    health: Health
    checkpointing: Checkpointing
    points: RestorePoints
    history: PageHistory


@dataclass(slots=True)
class JournalRows:
    """The newest rows of the journal that have been read. `failure` is why there are no newer ones."""

    incidents: tuple[Incident, ...] = ()
    checkpoints: tuple[CheckpointRow, ...] = ()
    failure: str = ""


class Sections:
    """Builds the sections. Used on the event loop only."""

    def __init__(self, parts: PageParts) -> None:
        self._parts = parts
        self.rows = JournalRows()
        self.builders: Mapping[str, Callable[[], Section]] = {
            "run": self._run,
            "state": self._state,
            "clock": self._clock,
            "boundary": self._boundary,
            "breakers": self._breakers,
            "rates": self._rates,
            "figures": self._figures,
            "seeds": self._seeds,
            "marks": self._marks,
            "incidents": self._incidents,
            "points": self._points,
            "ranks": self._ranks,
        }
        """Each builds a section, far within the 5 ms for which the event loop may be blocked. `clock` has what changes
        all the time."""

    def _run(self) -> Section:
        parts, training = self._parts, self._parts.settings.training
        return {
            "name": shortened(training.run_name),
            "job": shortened(training.job),
            "id": parts.status.run_id,
            "experiment": shortened(training.experiment),
            "tags": {shortened(name): shortened(value) for name, value in training.tags.items()},
            "version": __version__,
            "device": parts.history.device,
            "epochs": parts.status.epochs,
            "steps": parts.status.steps,
            "evaluates": parts.status.evaluates,
            "first_step": parts.history.first_step,
            "controlled": parts.settings.control.enabled,
        }

    def _state(self) -> Section:
        parts, status = self._parts, self._parts.status
        failing, streak = parts.checkpointing.failing, parts.health.skip_streak
        conditions = parts.safety.conditions(checkpoints_failing=failing, skipped_streak=streak)
        health = health_of(status, conditions)
        state, reason = state_of(status)
        return {
            "state": state_name(state),
            "reason": shortened(reason),
            "health": _word(HealthStatus.Name(health.status), "HEALTH_STATUS_"),
            "summary": shortened(health.summary),
            "emergency": level_name(conditions.emergency_level) if conditions.emergency_level else "",
            "conservative": [shortened(each) for each in conditions.conservative_reasons],
            "phase": phase_of(status)[0],
            "epoch": status.epoch,
            "epoch_step": status.sums.steps + status.sums.skipped_steps,
            "steps_per_epoch": status.steps_per_epoch,
            "step": status.global_step,
            "best_step": status.best_step,
            "samples_per_s": _figure(_samples_per_s(status)),
            "loss": _figure(status.sums.loss if status.sums.steps else status.training_loss),
            "validation_loss": _figure(status.validation_loss),
            "accuracy": _figure(status.validation_accuracy),
            "skipped": status.skipped_steps,
            "rollbacks": status.rollbacks,
            "attempt": status.attempt,
            "proven_step": status.newest_proven_step,
            "no_snapshots": shortened(status.snapshots_unavailable),
            "tamiyo": shortened(status.tamiyo_answer),
            "kasmina": shortened(status.kasmina_answer),
            "accepted": status.commands_accepted,
            "rejected": status.commands_rejected,
        }

    def _clock(self) -> Section:
        uptime_s = time.monotonic() - self._parts.status.started_at_s
        phase_s = phase_of(self._parts.status)[1]
        return {
            "now_ms": time.time_ns() // _NS_PER_MS,
            "uptime_s": round(uptime_s, 1),
            "phase_s": round(phase_s, 1),
        }

    def _boundary(self) -> Section:
        settings, status = self._parts.settings, self._parts.status
        waits = settings.training.deterministic or not settings.control.enabled
        ordered = sorted(status.boundaries_ms)
        return {
            "budget_ms": None if waits else settings.control.boundary_budget_ms,
            "last_ms": status.boundaries_ms[-1] if ordered else None,
            "p50_ms": quantile(ordered, 0.50),
            "p99_ms": quantile(ordered, 0.99),
            "over": status.boundaries_over_budget,
        }

    def _breakers(self) -> Section:
        return [
            {"name": name, "state": _word(CircuitBreakerState.Name(breaker.state), "CIRCUIT_STATE_")}
            for name, breaker in sorted(self._parts.safety.safeguards.breakers.items())
        ]

    def _rates(self) -> Section:
        status = self._parts.status
        current = {shortened(group): _figure(rate) for group, rate in list(status.learning_rates.items())[:ROWS_MAX]}
        adjustments = [_adjustment(active) for active in status.adjustments[-ROWS_MAX:]]
        return {"current": current, "total": len(status.learning_rates), "adjustments": adjustments}

    def _figures(self) -> Section:
        """The latest figures that the job names, of evaluations and of steps."""
        last = self._parts.status.last_epoch
        found = {} if last is None else last.evaluation.figures()
        own = {name: value for name, value in found.items() if name not in RESERVED}
        return {"evaluation": _by_name(own), "step": _by_name(self._parts.status.logged)}

    def _seeds(self) -> Section:
        status = self._parts.status
        refusals = dict(status.refusals)
        tracks = tuple(self._parts.history.seeds.tracks.values())
        return (_seed(track, status.global_step, refusals.get(track.seed_id, "")) for track in tracks)

    def _marks(self) -> Section:
        return [
            {
                "kind": mark.kind,
                "left": mark.left_step,
                "restored": mark.restored_step,
                "at_ms": mark.at_ns // _NS_PER_MS,
                "reason": shortened(mark.reason),
            }
            for mark in self._parts.history.marks
        ]

    def _incidents(self) -> Section:
        rows = [
            {
                "kind": incident.kind,
                "at_ms": incident.at_ns // _NS_PER_MS,
                "step": max(0, incident.global_step),
                "reason": shortened(incident.reason),
                "details": {name: shortened(str(value)) for name, value in incident.details.items()},
            }
            for incident in self.rows.incidents[:ROWS_MAX]
        ]
        return {"rows": rows, "failure": shortened(self.rows.failure)}

    def _points(self) -> Section:
        points = self._parts.points.of(self._parts.status.snapshots, self.rows.checkpoints)
        return {"rows": [_point(point) for point in points[:ROWS_MAX]], "total": len(points)}

    def _ranks(self) -> Section:
        status = self._parts.status
        loads = status.last_epoch.rank_loads if status.last_epoch is not None else ()
        known = len(loads) == len(status.ranks)  # else the group has another size now, or is one process
        shown = [_rank(info, loads[info.rank] if known else None) for info in status.ranks[:ROWS_MAX]]
        return {"rows": shown, "total": len(status.ranks)}


def shortened(text: str) -> str:
    """Returns a text of at most 300 characters, whose end says that there was more."""
    return text if len(text) <= TEXT_MAX else f"{text[: TEXT_MAX - 1]}…"


def _word(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower()


def _figure(value: float) -> float | None:
    """Returns a number that JSON has: None for one that is not known or not finite."""
    return value if math.isfinite(value) else None


def _adjustment(active: ActiveAdjustment) -> dict[str, Any]:
    adjustment = active.adjustment
    factor, lasts = adjustment.factor, adjustment.expires_after_steps
    return {
        "group": shortened(adjustment.group or ""),
        "change": f"factor {factor:g}" if factor is not None else f"value {adjustment.value:g}",
        "origin": shortened(adjustment.origin),
        "reason": shortened(adjustment.reason),
        "from": active.at_step,
        "until": None if lasts is None else active.at_step + lasts,
    }


def _samples_per_s(status: RunStatus) -> float:
    """Returns the rate in this epoch, that of the last one before its first step, NaN before the first epoch."""
    last = status.last_epoch
    if status.sums.duration_s or last is None or not last.steps_s:
        return status.sums.samples_per_s if status.sums.duration_s else math.nan
    return last.samples / last.steps_s


def _by_name(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {shortened(name): _figure(value) for name, value in sorted(figures.items())}


def _seed(track: SeedTrack, step: int, refused: str) -> dict[str, Any]:
    state = track.state
    return {
        "id": shortened(track.seed_id),
        "blueprint": shortened(track.blueprint),
        "slot": shortened(track.slot),
        "stage": "" if state is None else stage_name(state.stage),
        "alpha": None if state is None else round(track.current_alpha(step), 4),
        "share": None if state is None or "share" not in state.metrics else round(state.metrics["share"], 3),
        "refused": shortened(refused),
        "spans": [[span.stage, span.begin, span.end] for span in track.spans],
        "alphas": [[point.last, round(point.mean, 3)] for point in track.alpha.points],
    }


def _point(point: RestorePoint) -> dict[str, Any]:
    return {
        "tier": tier_name(point.tier),
        "step": point.global_step,
        "epoch": point.epoch,
        "at_ms": point.at_ns // _NS_PER_MS,
        "size": point.size_bytes,
        "attempt": point.attempt,
        "id": "" if point.checkpoint is None else point.checkpoint.checkpoint_id,
        "proven": point.proven,
        "suspect": point.suspect,
        "superseded": point.superseded,
    }


def _rank(info: RankInfo, load: RankLoad | None) -> dict[str, Any]:
    return {
        "rank": info.rank,
        "node": info.node,
        "host": shortened(info.host),
        "pid": info.pid,
        "device": info.device,
        "input_wait_s": None if load is None else load.input_wait_s,
        "rank_wait_s": None if load is None else load.rank_wait_s,
        "memory": None if load is None else load.memory_bytes,
    }
