"""The sections of the status page as plain values, from what the run side knows already. Nothing here waits."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from leyline.v1 import enums_pb2 as enums
from leyline.v1.admin_service_pb2 import GetStatusResponse, RunState
from leyline.v1.enums_pb2 import CircuitBreakerState, HealthStatus
from tolaria import __version__
from tolaria.config import Settings
from tolaria.journal.rows import CheckpointRow, Incident
from tolaria.rollback.protocol import tier_name
from tolaria.run.checkpointing import Checkpointing
from tolaria.run.conditions import health_of
from tolaria.run.health import Health
from tolaria.run.restore_points import RestorePoint, RestorePoints
from tolaria.run.safety import Safety
from tolaria.run.seed_telemetry import stage_name
from tolaria.run.status import RunStatus, status_message
from tolaria.status_page.history import RunHistory
from tolaria.status_page.seed_timeline import SeedTrack

Section: TypeAlias = "dict[str, Any] | list[dict[str, Any]]"

ROWS_MAX: Final = 50
"""Incidents, restore points and ranks that are shown; their number is shown too."""

TEXT_MAX: Final = 300
_NS_PER_MS: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class PageParts:
    """What the page shows: settings, and parts of the run that keep plain values."""

    settings: Settings
    status: RunStatus
    safety: Safety
    health: Health
    checkpointing: Checkpointing
    points: RestorePoints
    history: RunHistory


@dataclass(slots=True)
class JournalRows:
    """The newest rows of the journal that have been read. `failure` is why there are no newer ones."""

    incidents: tuple[Incident, ...] = ()
    checkpoints: tuple[CheckpointRow, ...] = ()
    failure: str = ""


class Sections:
    """Collects the sections. Used on the event loop only."""

    def __init__(self, parts: PageParts) -> None:
        self._parts = parts
        self.rows = JournalRows()

    def collect(self) -> dict[str, Section]:
        """Returns all sections by name. What changes all the time is in `clock`."""
        parts = self._parts
        status, message = parts.status, status_message(parts.status, now_s=time.monotonic())
        parts.safety.add_to(message)
        sections: dict[str, Section] = {
            "run": self._run(),
            "state": self._state(message),
            "clock": {"now_ms": time.time_ns() // _NS_PER_MS, "uptime_s": message.uptime_s, "phase_s": message.phase_s},
            "boundary": self._boundary(message),
            "breakers": [
                {"name": name, "state": _word(CircuitBreakerState.Name(state), "CIRCUIT_STATE_")}
                for name, state in sorted(message.breakers.items())
            ],
            "rates": _rates(message),
            "figures": _figures(message),
            "seeds": [_seed(track, status) for track in parts.history.seeds.tracks.values()],
            "marks": [
                {
                    "kind": mark.kind,
                    "left": mark.left_step,
                    "restored": mark.restored_step,
                    "at_ms": mark.at_ns // _NS_PER_MS,
                    "reason": shortened(mark.reason),
                }
                for mark in parts.history.marks
            ],
            "incidents": self._incidents(),
            "points": self._points(),
            "ranks": _ranks(message),
        }
        return sections

    def _run(self) -> Section:
        training, history = self._parts.settings.training, self._parts.history
        return {
            "name": shortened(training.run_name),
            "job": shortened(training.job),
            "id": self._parts.status.run_id,
            "experiment": shortened(training.experiment),
            "tags": {shortened(name): shortened(value) for name, value in training.tags.items()},
            "version": __version__,
            "device": history.device,
            "epochs": self._parts.status.epochs,
            "first_step": history.first_step,
            "controlled": self._parts.settings.control.enabled,
        }

    def _state(self, message: GetStatusResponse) -> Section:
        parts, status = self._parts, self._parts.status
        health = health_of(
            status,
            parts.safety.conditions(
                checkpoints_failing=parts.checkpointing.failing, skipped_streak=parts.health.skip_streak
            ),
        )
        return {
            "state": _word(RunState.Name(message.state), "RUN_STATE_"),
            "reason": shortened(message.state_reason),
            "health": _word(HealthStatus.Name(health.status), "HEALTH_STATUS_"),
            "summary": shortened(health.summary),
            "emergency": _word(enums.EmergencyLevel.Name(message.emergency_level), "EMERGENCY_LEVEL_"),
            "conservative": [shortened(reason) for reason in message.conservative_reasons],
            "phase": message.phase,
            "epoch": message.epoch,
            "epoch_step": message.epoch_step,
            "steps_per_epoch": message.steps_per_epoch,
            "step": message.global_step,
            "best_step": message.best_step,
            "samples_per_s": _figure(message.samples_per_s),
            "loss": _figure(status.sums.loss if status.sums.steps else status.training_loss),
            "validation_loss": _figure(status.validation_loss),
            "accuracy": _figure(status.validation_accuracy),
            "skipped": message.skipped_steps,
            "rollbacks": message.rollbacks,
            "attempt": message.attempt,
            "proven_step": status.newest_proven_step,
            "no_snapshots": shortened(status.snapshots_unavailable),
            "tamiyo": shortened(message.tamiyo_answer),
            "kasmina": shortened(message.kasmina_answer),
            "accepted": message.commands_accepted,
            "rejected": message.commands_rejected,
        }

    def _boundary(self, message: GetStatusResponse) -> Section:
        settings = self._parts.settings
        waits = settings.training.deterministic or not settings.control.enabled
        return {
            "budget_ms": None if waits else settings.control.boundary_budget_ms,
            "last_ms": _figure(message.last_boundary_ms),
            "p50_ms": _figure(message.boundary_ms_p50),
            "p99_ms": _figure(message.boundary_ms_p99),
            "over": message.boundaries_over_budget,
        }

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


def shortened(text: str) -> str:
    """Returns a text of at most 300 characters, whose end says that there was more."""
    return text if len(text) <= TEXT_MAX else f"{text[: TEXT_MAX - 1]}…"


def _word(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower()


def _figure(value: float) -> float | None:
    """Returns a number that JSON has: None for one that is not known or not finite."""
    return value if math.isfinite(value) else None


def _rates(message: GetStatusResponse) -> Section:
    adjustments = [
        {
            "group": shortened(each.group),
            "change": f"factor {each.factor:g}" if each.HasField("factor") else f"value {each.value:g}",
            "origin": shortened(each.origin),
            "reason": shortened(each.reason),
            "from": each.from_step,
            "until": each.expires_at_step or None,
        }
        for each in list(message.adjustments)[-ROWS_MAX:]
    ]
    current = {shortened(group): _figure(rate) for group, rate in message.learning_rates.items()}
    return {"current": current, "adjustments": adjustments}


def _figures(message: GetStatusResponse) -> Section:
    """Returns the latest figures that the job names, of evaluations and of steps."""
    own = {name: value for name, value in message.validation_metrics.items() if name not in {"loss", "accuracy"}}
    return {"evaluation": _by_name(own), "step": _by_name(message.logged)}


def _by_name(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {shortened(name): _figure(value) for name, value in sorted(figures.items())}


def _seed(track: SeedTrack, status: RunStatus) -> dict[str, Any]:
    state = track.state
    refused = dict(status.refusals).get(track.seed_id, "")
    return {
        "id": shortened(track.seed_id),
        "blueprint": shortened(track.blueprint),
        "slot": shortened(track.slot),
        "stage": "" if state is None else stage_name(state.stage),
        "alpha": None if state is None else round(track.current_alpha(status.global_step), 4),
        "share": None if state is None or "share" not in state.metrics else round(state.metrics["share"], 3),
        "refused": shortened(refused),
        "spans": [[span.stage, span.begin, span.end] for span in track.spans],
        "alphas": [[point.last, round(point.mean, 4)] for point in track.alpha.points],
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


def _ranks(message: GetStatusResponse) -> Section:
    ranks: Iterable[Any] = list(message.ranks)[:ROWS_MAX]
    rows = [
        {
            "rank": rank.rank,
            "node": rank.node,
            "host": shortened(rank.host),
            "pid": rank.pid,
            "device": rank.device,
            "input_wait_s": _figure(rank.input_wait_s),
            "rank_wait_s": _figure(rank.rank_wait_s),
            "memory": rank.memory_bytes,
        }
        for rank in ranks
    ]
    return {"rows": rows, "total": len(message.ranks)}
