"""The runs of a state directory, as journal, manifests and recorded settings tell them. Changes nothing.

A service may use the directory meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tolaria.checkpoint.directory import CHECKPOINTS, JOURNAL, RUN_SETTINGS, SETTINGS
from tolaria.checkpoint.format import Manifest, read_manifest
from tolaria.errors import CheckpointDamagedError, CheckpointUnreadableError
from tolaria.filesystem import Filesystem
from tolaria.journal.reader import read_journal
from tolaria.journal.rows import (
    BRANCH,
    LOCAL_KINDS,
    CheckpointRow,
    CommandRow,
    EmergencyRow,
    FaultRow,
    RollbackRow,
    RunRow,
)
from tolaria.values.lineage import BranchOrigin

_KEPT = frozenset({"committed", "superseded"})


@dataclass(frozen=True, slots=True)
class RunIncident:
    """A rollback, an emergency or a storage fault of a run; `at_ns` is Unix time."""

    kind: str
    at_ns: int
    global_step: int
    reason: str


@dataclass(frozen=True, slots=True)
class PastRun:
    """What is left of one run.

    Attributes:
        row: the journal's.
        checkpoints: all that were ever written, oldest first, also those that are no longer on disk.
        metrics: figures of the newest evaluation, of the newest checkpoint that has some.
        evaluated_step: that of the evaluation; -1 without one.
        incidents: oldest first.
        commands: number of the controller's commands that were applied.
        settings: of its last process, by `section.field`; empty if they are not known.
        branched_from: where it has begun in another run; None if it is no branch, or that cannot be read.
    """

    row: RunRow
    directory: Path
    checkpoints: tuple[CheckpointRow, ...]
    metrics: Mapping[str, float]
    evaluated_step: int
    incidents: tuple[RunIncident, ...]
    commands: int
    settings: Mapping[str, Any]
    branched_from: BranchOrigin | None = None

    @property
    def name(self) -> str:
        """The name that people have given it."""
        return str(self.settings.get("training.run_name", ""))

    @property
    def newest(self) -> CheckpointRow | None:
        """The newest checkpoint of the branch that the run went on with."""
        return next((row for row in reversed(self.checkpoints) if row.state != "superseded"), None)

    @property
    def outcome(self) -> str:
        """How its last process left it; `unfinished` while it trains, and after a crash."""
        return self.row.outcome or "unfinished"


def read_runs(directory: Path) -> list[PastRun]:
    """Returns the runs of a state directory, oldest first.

    Raises:
        JournalDamagedError: the journal differs from what was written.
        JournalNewerError: a newer Tolaria wrote it.
        JournalUnavailableError: it does not exist or cannot be read.
    """
    path = directory / JOURNAL
    runs, checkpoints, commands = (
        *(read_journal(path, RunRow), read_journal(path, CheckpointRow), read_journal(path, CommandRow)),
    )
    incidents = sorted(_incidents(path), key=lambda found: found[1].at_ns)
    return [
        _record(
            directory,
            run,
            [row for row in checkpoints if row.run_id == run.run_id],
            incidents=[incident for run_id, incident in incidents if run_id == run.run_id],
            commands=[row for row in commands if row.run_id == run.run_id],
        )
        for run in runs
    ]


def _is_applied_command(row: CommandRow) -> bool:
    return row.outcome == "applied" and row.kind not in LOCAL_KINDS


def _record(
    directory: Path,
    run: RunRow,
    checkpoints: Sequence[CheckpointRow],
    *,
    incidents: Sequence[RunIncident],
    commands: Sequence[CommandRow],
) -> PastRun:
    evaluated = next(
        (
            manifest
            for row in reversed(checkpoints)
            if row.state in _KEPT and (manifest := _manifest(directory, row)) and manifest.provenance.metrics
        ),
        None,
    )
    provenance = None if evaluated is None else evaluated.provenance
    return PastRun(
        row=run,
        directory=directory,
        checkpoints=tuple(checkpoints),
        metrics={} if provenance is None else dict(provenance.metrics),
        evaluated_step=-1 if provenance is None else provenance.evaluated_step,
        incidents=tuple(incidents),
        commands=sum(map(_is_applied_command, commands)),
        settings=_settings(directory, run.run_id),
        branched_from=next((_origin(row) for row in commands if row.kind == BRANCH), None),
    )


def _origin(row: CommandRow) -> BranchOrigin | None:
    with suppress(TypeError, ValueError):
        return BranchOrigin.from_json(row.reason)
    return None


def _manifest(directory: Path, row: CheckpointRow) -> Manifest | None:
    """Returns a manifest; None if the checkpoint is damaged, or was removed meanwhile, which `tolaria verify` tells."""
    try:
        return read_manifest(Filesystem(), directory / CHECKPOINTS / row.checkpoint_id)
    except (CheckpointDamagedError, CheckpointUnreadableError):
        return None


def _incidents(path: Path) -> Iterator[tuple[str, RunIncident]]:
    """Yields the id of the run of each incident, and the incident."""
    for rollback in read_journal(path, RollbackRow):
        went = f"to {rollback.restored_step}" if rollback.outcome == "restored" else rollback.outcome
        reason = f"{went}, by {rollback.origin or 'unknown'}: {rollback.reason}"
        yield rollback.run_id, RunIncident("rollback", rollback.at_ns, rollback.global_step, reason)
    for emergency in read_journal(path, EmergencyRow):
        reason = f"{emergency.level}, by {emergency.origin}: {emergency.reason}"
        yield emergency.run_id, RunIncident("emergency", emergency.at_ns, emergency.global_step, reason)
    for fault in read_journal(path, FaultRow):
        reason = f"{fault.stage}: {fault.reason}"
        yield fault.run_id, RunIncident(fault.kind, fault.at_ns, fault.global_step, reason)


def _settings(directory: Path, run_id: str) -> dict[str, Any]:
    """Returns the recorded settings by `section.field`. Earlier versions have kept those of the newest run only."""
    for path in (directory / RUN_SETTINGS / f"{run_id}.json", directory / SETTINGS):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["run_id"] == run_id:
                return {
                    f"{section}.{name}": value
                    for section, fields in record["settings"].items()
                    for name, value in fields.items()
                }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return {}
