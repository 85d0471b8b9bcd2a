"""What a demo reports at its end: curves, accuracies with and without seeds, each seed, merged gradients, mishaps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from leyline.v1 import enums_pb2 as enums
from leyline.v1.admin_service_pb2 import GetStatusResponse, Incident
from tolaria.cli import render
from tolaria.cli.curves import RunCurves

_BEFORE_BLENDING = {enums.SEED_STAGE_GERMINATED, enums.SEED_STAGE_TRAINING}
_BLENDING = {enums.SEED_STAGE_BLENDING, enums.SEED_STAGE_SHADOWING, enums.SEED_STAGE_PROBATIONARY}
_PART_OF_HOST = {enums.SEED_STAGE_FOSSILIZED, enums.SEED_STAGE_TERMINATED}
_DIGEST_SHOWN = 16


@dataclass(frozen=True, slots=True)
class GradientRow:
    """A seed's row among the merged gradients: its weight, and fractions of all norms and of the steps in conflict."""

    weight: float
    share: float
    conflicts: float


@dataclass(slots=True)
class SeedSummary:
    """The history of one seed. Epochs count from 1; accuracies are validation accuracies in [0, 1], None if unknown."""

    seed_id: str
    stage: int
    blueprint_id: str
    epoch_germinated: int | None = None
    epoch_ended: int | None = None  # fossilized or culled
    accuracy_before: float | None = None  # the last one before the seed began to blend
    accuracy_after: float | None = None  # the one when the seed ended, or the latest; None if it has never blended
    rows: dict[int, GradientRow] = field(default_factory=dict)  # by the epoch in which they were seen

    def row(self) -> GradientRow:
        """Returns the largest weight and share, and the mean conflicts, over all epochs in which it had a row."""
        rows = self.rows.values()
        conflicts = sum(row.conflicts for row in rows) / max(1, len(rows))
        weight = max((row.weight for row in rows), default=0.0)
        share = max((row.share for row in rows), default=0.0)
        return GradientRow(weight, share, conflicts)

    def row_line(self) -> str:
        """Returns what its gradient did, on one line; empty if it was never merged with others."""
        if not self.rows:
            return ""
        row = self.row()
        name = render.one_line(self.seed_id)
        return (
            f"{name}: its gradient was merged with the host's in {_epochs(len(self.rows))}, weight up to "
            f"{row.weight:.2f} (the host has 1), up to {row.share:.0%} of all norms; it conflicted in "
            f"{row.conflicts:.0%} of the steps, and PCGrad removed the conflicting part"
        )

    def update(self, stage: int, epoch: int, accuracy: float | None) -> None:
        """Records the next status; a rollback may return the seed to an earlier stage."""
        self.stage = stage
        if stage in _BEFORE_BLENDING:
            self.accuracy_before, self.accuracy_after, self.epoch_ended = accuracy, None, None
        elif stage in _BLENDING:
            self.accuracy_after, self.epoch_ended = accuracy, None
        elif self.epoch_ended is None:
            self.epoch_ended = epoch
            # A seed culled before it blended has had no effect on the accuracy.
            if stage in _PART_OF_HOST or self.accuracy_after is not None:
                self.accuracy_after = accuracy

    def line(self) -> str:
        """Returns the history on one line."""
        name = render.one_line(f"{self.seed_id} {self.blueprint_id}")
        begin = "germinated unseen" if self.epoch_germinated is None else f"epoch {self.epoch_germinated} germinated"
        if self.epoch_ended is None:
            end, when = f"{render.enum_word(enums.SeedLifecycleStage.DESCRIPTOR, self.stage)} at the end", "at the end"
        elif self.stage in _PART_OF_HOST:
            end, when = f"{self.epoch_ended} fossilized", "after"
        else:
            end, when = f"{self.epoch_ended} culled", "when it was culled"
        if self.accuracy_after is None:
            return f"{name}: {begin}, {end}; it did not blend"
        before = "unknown" if self.accuracy_before is None else f"{self.accuracy_before:.2%}"
        return f"{name}: {begin}, {end}; accuracy {before} before it blended, {self.accuracy_after:.2%} {when}"


class SeedHistory:
    """The history of each seed that any status has shown, in order of appearance."""

    def __init__(self) -> None:
        self.seeds: dict[str, SeedSummary] = {}

    def update(self, status: GetStatusResponse) -> None:
        """Records the next status."""
        # Both validation figures are 0 before the first validation.
        validated = status.validation_loss or status.validation_accuracy
        accuracy = _finite(status.validation_accuracy) if validated else None
        for seed in status.seeds:
            known = self.seeds.get(seed.seed_id)
            removed = known is not None and known.stage not in _BEFORE_BLENDING | _BLENDING | _PART_OF_HOST
            if known is None or (removed and seed.stage == enums.SEED_STAGE_GERMINATED):
                germinated = status.epoch if seed.stage in _BEFORE_BLENDING else None
                known = self.seeds[seed.seed_id] = SeedSummary(seed.seed_id, seed.stage, seed.blueprint_id, germinated)
            known.update(seed.stage, status.epoch, accuracy)
            if "weight" in seed.metrics and seed.metrics["weight"] > 0:
                metrics = (seed.metrics[name] for name in ("weight", "share", "conflict_ratio"))
                known.rows[status.epoch] = GradientRow(*metrics)


@dataclass(slots=True)
class RunRecord:
    """One run of a demo as its statuses have shown it."""

    history: SeedHistory = field(default_factory=SeedHistory)
    curves: RunCurves = field(default_factory=RunCurves)
    last: GetStatusResponse | None = None
    incidents: Sequence[Incident] = ()
    failure: str = ""

    def update(self, status: GetStatusResponse) -> None:
        """Records the next status."""
        self.history.update(status)
        self.curves.update(status)
        self.last = status

    @property
    def rollbacks(self) -> list[Incident]:
        """The rollbacks, oldest first."""
        found = [incident for incident in self.incidents if incident.kind == "rollback"]
        return sorted(found, key=lambda incident: (incident.occurred_at.seconds, incident.occurred_at.nanos))


def summary_json(run: RunRecord, other: RunRecord | None, wall_s: float, chaos: Mapping[str, Any] | None = None) -> str:
    """Returns the summary as one line of JSON; a figure that is unknown or not finite is null."""
    status, history = run.last or GetStatusResponse(), run.history
    stages = enums.SeedLifecycleStage.DESCRIPTOR.values_by_number
    seeds = [asdict(history.seeds[seed.seed_id]) for seed in status.seeds]
    for seed in seeds:
        del seed["epoch_ended"]
        del seed["rows"]
        seed.update(asdict(history.seeds[seed["seed_id"]].row()))
        seed["stage"] = stages[seed["stage"]].name if seed["stage"] in stages else str(seed["stage"])
    without = other.last if other else None
    return json.dumps(
        {
            "final_accuracy": _finite(status.validation_accuracy),
            "final_accuracy_without_seeds": None if without is None else _finite(without.validation_accuracy),
            "epochs": status.epoch,
            "steps": status.global_step,
            "wall_seconds": round(wall_s, 3),
            "boundary_ms_p50": _finite(status.boundary_ms_p50),
            "boundary_ms_p99": _finite(status.boundary_ms_p99),
            "seeds": seeds,
            "commands": status.commands_accepted,
            "rollbacks": status.rollbacks,
            "skipped_steps": status.skipped_steps,
            "digests": [
                [incident.details["state_digest"], incident.details["expected_digest"]] for incident in run.rollbacks
            ],
            "chaos": chaos,
        }
    )


def summary_lines(run: RunRecord, other: RunRecord | None, wall_s: float) -> list[str]:
    """Returns the summary as text, with a line for each seed, including removed ones."""
    status = run.last or GetStatusResponse()
    accuracy = f"accuracy {status.validation_accuracy:.2%} after {_epochs(status.epoch)} ({status.global_step} steps)"
    boundary = f"boundary p50 {status.boundary_ms_p50:.1f} ms, p99 {status.boundary_ms_p99:.1f} ms"
    counts = f"commands {render.command_counts(status)}; seeds: {render.seed_list(status.seeds)}"
    seeds = run.history.seeds.values()
    return [
        *run.curves.lines(other.curves if other else None),
        f"{render.one_line(status.job) or 'the run'} finished: {accuracy} in {wall_s:.1f} s",
        *([_comparison(status, other)] if other else []),
        f"{boundary} of {status.boundary_budget_ms:g} ms; {counts}",
        *(seed.line() for seed in seeds),
        *(line for seed in seeds if (line := seed.row_line())),
        *mishap_lines(run),
    ]


def mishap_lines(run: RunRecord) -> list[str]:
    """Returns a line for the skipped steps, if any, and one for each rollback, with both digests."""
    skipped = run.last.skipped_steps if run.last else 0
    steps = "1 step was" if skipped == 1 else f"{skipped} steps were"
    lines = [f"{steps} skipped: loss or gradient was not finite or extreme, so nothing changed"] if skipped else []
    for incident in run.rollbacks:
        details = incident.details
        restored, captured = (details[name] for name in ("state_digest", "expected_digest"))
        digests = f"digest restored {_digest(restored)}, captured {_digest(captured)}"
        verdict = "equal" if restored and restored == captured else "NOT EQUAL"
        target = render.one_line(details["restored_step"]) or "?"
        reason = render.one_line(incident.reason) or "no reason given"
        lines.append(f"rolled back from step {incident.global_step} to {target}: {reason}; {digests}: {verdict}")
    return lines


def _comparison(status: GetStatusResponse, other: RunRecord) -> str:
    if other.failure or other.last is None:
        return f"the same run without seeds failed: {render.one_line(other.failure) or 'no status was received'}"
    without = other.last.validation_accuracy
    points = 100 * (status.validation_accuracy - without)
    effect = "added" if points >= 0 else "cost"
    return f"the same run without seeds: accuracy {without:.2%}; the seeds {effect} {abs(points):.1f} points"


def _digest(digest: str) -> str:
    return render.one_line(digest, length_max=_DIGEST_SHOWN) or "none"


def _epochs(count: int) -> str:
    return "1 epoch" if count == 1 else f"{count} epochs"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
