"""Branches: new runs, each in a new state directory, that go on from a restore point of another run."""

from __future__ import annotations

import json
import os
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import structlog

from tolaria.checkpoint.directory import CHECKPOINTS, JOURNAL, QUARANTINE, SETTINGS
from tolaria.checkpoint.format import Manifest, Provenance, write_checkpoint
from tolaria.errors import BranchRefusedError
from tolaria.export.source import Source, read_source
from tolaria.filesystem import Filesystem, remove_quietly, write_durably
from tolaria.journal.database import Journal
from tolaria.journal.reader import read_journal
from tolaria.journal.rows import ADJUSTMENTS, BRANCH, DATA_SKIPS, CheckpointRow, CommandRow, RunRow
from tolaria.run.health_record import Record
from tolaria.values.lineage import BranchOrigin

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Branch:
    """A branch that has been made: the id of its run, where it begins, and the job that it trains."""

    run_id: str
    origin: BranchOrigin
    job: str
    directory: Path


def make_branch(directory: Path, point: str, target: Path) -> Branch:
    """Makes a state directory in which `tolaria serve` goes on from a checkpoint of another one, as a new run.

    It has what the other run, rolled back to the point by an operator, would have: the state, the adjustments of
    learning rates and the data that are left out, but none of its budgets. Reads the other directory only, also while a
    service uses it. The new directory appears at once, when everything is durable.

    Args:
        directory: the state directory of the other run.
        point: as in `read_source`.
        target: the directory to make.

    Raises:
        BranchRefusedError: the target exists or cannot be made.
        CheckpointWriteError, JournalUnavailableError: it cannot be written; nothing is left of it.
        NoCheckpointError, CheckpointError, JournalError: as `read_source`.
    """
    target = target.absolute()
    if os.path.lexists(target):
        raise BranchRefusedError(f"{target} exists already: a branch begins in a new directory")
    source = read_source(directory, point)
    temporary, files = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}"), Filesystem()
    try:
        branch = _write(directory.absolute(), source, temporary, target)
        files.sync_directory(temporary)
        files.rename(temporary, target)
        files.sync_directory(target.parent)
    except OSError as error:
        raise BranchRefusedError(f"{target} cannot be made: {error.strerror or error}") from error
    finally:
        remove_quietly(files, temporary)
    return branch


def branch_origin(journal: Journal, run_id: str) -> BranchOrigin | None:
    """Returns where a run has branched off; None if it is no branch, or its row cannot be read. Raises JournalError."""
    row = journal.find(CommandRow, f"{BRANCH}@{run_id}")
    try:
        return None if row is None else BranchOrigin.from_json(row.reason)
    except (TypeError, ValueError) as error:
        _log.error("branch_not_read", run_id=run_id, error=f"{type(error).__name__}: {error}")
        return None


def _write(directory: Path, source: Source, place: Path, target: Path) -> Branch:
    manifest, run_id, files = source.manifest, uuid.uuid4().hex[:12], Filesystem()
    step = manifest.position.global_step
    path = directory / JOURNAL
    original = next((row for row in read_journal(path, RunRow) if row.run_id == manifest.run_id), None)
    kept = next((r for r in read_journal(path, CheckpointRow) if r.checkpoint_id == manifest.checkpoint_id), None)
    commands = {row.command_id: row for row in read_journal(path, CommandRow)}
    for each in (place, place / CHECKPOINTS, place / QUARANTINE):
        each.mkdir(mode=0o700, parents=True)
    new = replace(
        manifest,
        checkpoint_id=f"{step:012d}-{uuid.uuid4().hex[:8]}",
        run_id=run_id,
        created_at_ns=time.time_ns(),
        provenance=_begun_anew(manifest.provenance),
    )
    write_checkpoint(files, place / CHECKPOINTS, new, source.image)
    origin = BranchOrigin(manifest.run_id, manifest.checkpoint_id, step, manifest.fingerprint.total, str(directory))
    job = "" if original is None else original.job
    with Journal(place / JOURNAL) as journal:
        scale = _record_at("" if original is None else original.scale, step)
        journal.put(RunRow(run_id, time.time_ns(), job, scale=scale))
        journal.put(_row(new, kept))
        for kind in (ADJUSTMENTS, DATA_SKIPS):
            if (row := commands.get(f"{kind}@{manifest.run_id}")) is not None:
                journal.put(replace(row, command_id=f"{kind}@{run_id}", run_id=run_id))
        said = json.dumps(asdict(origin))
        journal.put(CommandRow(f"{BRANCH}@{run_id}", time.time_ns(), run_id, BRANCH, step, "applied", said))
    if source.settings:
        record = json.dumps({"run_id": run_id, "settings": source.settings}, indent=1).encode()
        write_durably(files, place / SETTINGS, [memoryview(record)])
    return Branch(run_id, origin, job, target)


def _begun_anew(provenance: Provenance) -> Provenance:
    """Returns the provenance of the first state of a run, which has no ancestors in its directory."""
    return Provenance(
        suspect=provenance.suspect,
        model=provenance.model,
        metrics=provenance.metrics,
        evaluated_step=provenance.evaluated_step,
    )


def _row(manifest: Manifest, original: CheckpointRow | None) -> CheckpointRow:
    return replace(manifest.row(), proven=0 if original is None else original.proven)


def _record_at(scale: str, step: int) -> str:
    """Returns the record of health that a run has after an operator's rollback to that step."""
    record = Record.parse(scale)
    new = Record(
        left_out=record.left_out,
        taken=step,
        best_step=step,
        counts_accuracy=record.counts_accuracy,
        judged_by=record.judged_by,
        evaluations=[entry for entry in record.evaluations if entry[0] <= step],
    )
    return new.model_dump_json(exclude_defaults=True)
