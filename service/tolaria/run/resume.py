"""Preparation for training: locks and opens the state directory, and decides which run is resumed.

Runs in the main thread, before there is an event loop. Also writes a run's row in the journal.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, TypeAlias

import structlog

from tolaria.checkpoint.directory import locked_directory, remove_unused
from tolaria.checkpoint.storage import Storage, open_storage
from tolaria.checkpoint.store import LoadedCheckpoint, Retention
from tolaria.config import CheckpointSettings, Settings
from tolaria.emergency.protocol import SENTINEL
from tolaria.errors import BackupError, ConfigurationError, JournalDamagedError, JournalError, NoCheckpointError
from tolaria.filesystem import Filesystem
from tolaria.journal.database import Journal
from tolaria.journal.rows import STOPPED_EARLY, CheckpointRow, CommandRow, EmergencyRow, FaultRow, RollbackRow, RunRow
from tolaria.run.branches import branch_origin
from tolaria.run.restore_points import RestorePoints, attempts_used, resumed_points

RunOutcome: TypeAlias = Literal["finished", "stopped", "drained", "failed"]
"""How a run left its process. In the journal it is empty while the run goes on and if its process was killed."""

ENDED: Final = frozenset({"finished", "stopped"})
"""Outcomes after which a run is not resumed: all epochs are done, or an operator has stopped it."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedState:
    """A run and its storage. `resumed`: it has checkpoints of an earlier process. `notes` are for the log."""

    directory: Path
    storage: Storage
    run_id: str
    resumed: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where training begins. `loaded` is None for a new run; `points` are those that the run has left.

    `rollbacks` counts those that have restored a state, by origin.
    """

    state: PreparedState
    loaded: LoadedCheckpoint | None
    points: RestorePoints = field(default_factory=RestorePoints)
    rollbacks: Mapping[str, int] = field(default_factory=dict)


@contextmanager
def locked_state(settings: Settings) -> Iterator[None]:
    """Locks state.dir, created if missing, until the block ends. Removes it then if it is new and still empty.

    Raises:
        StateHeldError: another process uses the directory.
        ConfigurationError: the directory cannot be used.
    """
    directory = Path(settings.state.dir).absolute()
    with ExitStack() as stack:
        with _naming_setting(directory):
            is_new = not directory.exists()
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(locked_directory(directory))
        if is_new:
            stack.callback(remove_unused, directory)
        yield


@contextmanager
def prepare_state(
    settings: Settings,
    *,
    files: Filesystem | None = None,
    adopt: Callable[[Storage, str], object] = lambda _storage, _run_id: None,
) -> Iterator[PreparedState]:
    """Opens the storage of state.dir, which must be locked, for one run, until the block ends.

    If `state.resume` is auto, this is the unfinished run, provided that it has a checkpoint. `adopt` is called before
    with the latest run if its process was killed, and may give it a newer one. The run's row is written when this
    returns. Raises ConfigurationError if the directory cannot be used, or holds an unfinished run of
    another job.
    """
    directory = Path(settings.state.dir).absolute()
    with ExitStack() as stack:
        with _naming_setting(directory):
            storage = open_storage(directory, run_id="", retention=retention_of(settings.checkpoint), files=files)
            stack.callback(storage.journal.close)
            if (killed := _killed_run(settings, storage.journal)) is not None:
                adopt(storage, killed.run_id)
            prepared = _choose_run(settings, directory, storage)
        yield prepared


def load_resume_point(prepared: PreparedState) -> ResumePoint:
    """Loads the newest intact checkpoint of a resumed run that is not suspect. The state may be that of another run.

    Checkpoints that are not ancestors of the loaded one are superseded. A superseded one is loaded if the process was
    killed after a rollback, before the state that it restored had a checkpoint, and no other was an ancestor.

    A run whose checkpoints are all damaged cannot be resumed. Since training is unattended, a new run begins then,
    with another id. The lost run is recorded as failed, with the incident `run_lost` and a critical log line;
    its damaged checkpoints are in the quarantine.

    Raises:
        NoCheckpointError: the system refuses to read checkpoints that may be intact; a new run would abandon them.
        ConfigurationError: the journal cannot be written.
    """
    if not prepared.resumed:
        return ResumePoint(prepared, None)
    with _naming_setting(prepared.directory):
        try:
            loaded = prepared.storage.checkpoints.load_newest()
        except NoCheckpointError as error:
            if prepared.storage.checkpoints.kept_points():
                raise
            return ResumePoint(_replace_lost_run(prepared, str(error)), None)
        for damage in loaded.damaged:
            _log.error("checkpoint_not_loaded", **asdict(damage))
        if loaded.row.state == "superseded":
            _log.warning("rollback_lost", resumed_step=loaded.row.global_step, detail=loaded.row.detail)
        journal = prepared.storage.journal
        journal.put(replace(run_row(journal, prepared.run_id), resumed_from=loaded.row.checkpoint_id))
        rows = journal.rows(CheckpointRow, run_id=prepared.run_id)
        rollbacks = journal.rows(RollbackRow, run_id=prepared.run_id)
        points = resumed_points(loaded.row, rows, attempts_used(rows, [row.attempt for row in rollbacks]))
        detail = f"resumed from step {loaded.row.global_step}"
        if passed := prepared.storage.checkpoints.follow(points.lineage, detail):
            _log.warning("suspect_checkpoints_passed_over", count=passed, resumed_step=loaded.row.global_step)
    counts = Counter(row.origin or "unknown" for row in rollbacks if row.outcome == "restored")  # 0.1.0 wrote no origin
    return ResumePoint(prepared, loaded, points, counts)


def end_run(prepared: PreparedState, outcome: RunOutcome) -> None:
    """Records how the run left this process. If the journal fails, the next start resumes the run as if killed."""
    journal = prepared.storage.journal
    try:
        journal.put(replace(run_row(journal, prepared.run_id), outcome=outcome, ended_at_ns=time.time_ns()))
    except JournalError as error:
        _log.error("run_end_not_recorded", outcome=outcome, detail=str(error))


def active_halt(prepared: PreparedState) -> EmergencyRow | None:
    """Returns the newest halt of the run that was not cleared; None if there is none.

    A halt that the sentinel raised concerned an earlier process and does not count. Raises JournalError.
    """
    halts = [row for row in open_emergencies(prepared) if row.level == "halt" and row.origin != SENTINEL]
    return max(halts, key=lambda row: row.at_ns, default=None)


def open_emergencies(prepared: PreparedState) -> list[EmergencyRow]:
    """Returns the emergencies of the run that were not cleared. Raises JournalError."""
    rows = prepared.storage.journal.rows(EmergencyRow, run_id=prepared.run_id)
    return [row for row in rows if row.cleared_at_ns is None]


def run_row(journal: Journal, run_id: str) -> RunRow:
    """Returns the run's row. Raises JournalDamagedError if there is none."""
    row = journal.find(RunRow, run_id)
    if row is None:
        raise JournalDamagedError(f"the run {run_id} is not in the journal")
    return row


def retention_of(settings: CheckpointSettings) -> Retention:
    """Returns the retention that the settings specify."""
    return Retention(
        last=settings.keep_last,
        best="highest" if settings.best_is_highest else "lowest",
        superseded=settings.keep_superseded,
        superseded_s=settings.keep_superseded_s,
    )


def unfinished_run(runs: Sequence[RunRow], checkpoints: Sequence[CheckpointRow]) -> RunRow | None:
    """Returns the run to resume: the latest one with a checkpoint, unless it or a later one has ended.

    A run that is known from its checkpoints only, because a damaged journal was rebuilt, counts as unfinished: ending
    it once more costs little, forgetting it may cost weeks of training. Its job is unknown, hence empty.
    """
    newest_ns: dict[str, int] = {}
    for row in checkpoints:
        if row.state in {"committed", "superseded"}:
            newest_ns[row.run_id] = max(row.at_ns, newest_ns.get(row.run_id, 0))
    known = {run.run_id: run for run in runs}
    known |= {run_id: RunRow(run_id, at_ns, job="") for run_id, at_ns in newest_ns.items() if run_id not in known}
    latest_first = sorted(known.values(), key=lambda run: max(run.at_ns, newest_ns.get(run.run_id, 0)), reverse=True)
    for run in latest_first:
        if run.outcome in ENDED:
            return None
        if run.run_id in newest_ns:
            return run
    return None


def extended_run(
    runs: Sequence[RunRow], checkpoints: Sequence[CheckpointRow], *, job: str, epochs: int, steps: int = 0
) -> RunRow | None:
    """Returns the latest run if it has finished less of this job than is asked for now, and its last state is kept.

    That is fewer than `steps`, or if these are 0, fewer than `epochs`.
    """
    latest = max(runs, key=lambda run: run.at_ns, default=None)
    if latest is None or latest.outcome != "finished" or latest.job != job:
        return None
    newest = max(
        (row for row in checkpoints if row.run_id == latest.run_id and row.state == "committed"),
        key=lambda row: row.at_ns,
        default=None,
    )
    if newest is None:
        return None
    return latest if (newest.global_step < steps if steps else newest.epoch < epochs) else None


# -- choosing the run ------------------------------------------------------------------------------------------------


def _killed_run(settings: Settings, journal: Journal) -> RunRow | None:
    """Returns the latest run if it is one of this job's that a killed process has left, and may be resumed."""
    latest = max(journal.rows(RunRow), key=lambda run: run.at_ns, default=None)
    killed = latest is not None and not latest.outcome and latest.job == settings.training.job
    return latest if killed and settings.state.resume != "never" else None


def _choose_run(settings: Settings, directory: Path, storage: Storage) -> PreparedState:
    journal, job = storage.journal, settings.training.job
    runs, checkpoints = journal.rows(RunRow), journal.rows(CheckpointRow)
    found = unfinished_run(runs, checkpoints)
    epochs, steps = settings.training.epochs, settings.training.steps
    extended = None if found else extended_run(runs, checkpoints, job=job, epochs=epochs, steps=steps)
    resumed = found or extended if settings.state.resume != "never" else None
    notes = _repairs(storage)
    if resumed is None:
        row = _new_run(journal, job)
        abandoned = f"; the unfinished run {found.run_id} is not resumed, because of state.resume" if found else ""
        notes.append(f"the new run {row.run_id} begins{abandoned}")
    else:
        if resumed.job and resumed.job != job:
            problem = (
                f"state.dir: {directory} holds the unfinished run {resumed.run_id} of the job {resumed.job!r}, but "
                f"training.job is {job!r}: use another state.dir, or abandon that run with state.resume = never"
            )
            raise ConfigurationError([problem])
        row = replace(resumed, job=job, outcome="", ended_at_ns=None)
        left = f"its last process ended as {resumed.outcome}" if resumed.outcome else "its last process was killed"
        if resumed.resumed_from is None and (origin := branch_origin(journal, resumed.run_id)) is not None:
            left = f"it branches off at step {origin.global_step} of run {origin.run_id} in {origin.directory}"
        if extended is not None:
            raised = f"training.steps = {steps}" if steps else f"training.epochs = {epochs}"
            more = f"it had finished, and {raised} gives it more {'steps' if steps else 'epochs'}"
            stopped = _stopped_early(journal, resumed.run_id)
            left = f"it had {stopped}" if stopped else more
        notes.append(f"the run {row.run_id} is resumed; {left}")
    journal.put(row)
    return PreparedState(directory, storage.for_run(row.run_id), row.run_id, resumed is not None, tuple(notes))


def _stopped_early(journal: Journal, run_id: str) -> str:
    """Returns why early stopping has ended a run that has finished; nothing if it had all its epochs or steps."""
    kept = [row for row in journal.rows(CheckpointRow, run_id=run_id) if row.state == "committed"]
    newest = max((row.global_step for row in kept), default=-1)
    rows = journal.rows(CommandRow, run_id=run_id)
    return next((row.reason for row in rows if row.kind == STOPPED_EARLY and row.global_step == newest), "")


def _replace_lost_run(prepared: PreparedState, reason: str) -> PreparedState:
    journal = prepared.storage.journal
    lost = run_row(journal, prepared.run_id)
    now_ns = time.time_ns()
    journal.put(FaultRow(uuid.uuid4().hex, now_ns, lost.run_id, "run_lost", -1, "resume", reason))
    journal.put(replace(lost, outcome="failed", ended_at_ns=now_ns))
    row = _new_run(journal, lost.job)
    journal.put(row)
    _log.critical("run_lost", run_id=lost.run_id, new_run_id=row.run_id, detail=reason)
    notes = (*prepared.notes, f"the run {lost.run_id} is lost: {reason}; the new run {row.run_id} begins")
    return PreparedState(prepared.directory, prepared.storage.for_run(row.run_id), row.run_id, False, notes)


def _new_run(journal: Journal, job: str) -> RunRow:
    """Returns a row that is later than all others, even if the clock has been set back."""
    rows: list[RunRow | CheckpointRow] = [*journal.rows(RunRow), *journal.rows(CheckpointRow)]
    return RunRow(uuid.uuid4().hex[:12], max([time.time_ns(), *(row.at_ns + 1 for row in rows)]), job)


def _repairs(storage: Storage) -> list[str]:
    found, notes = storage.repairs, []
    if (upgrade := storage.upgrade) is not None:
        change = f"schema {upgrade.schema_from} to {upgrade.schema_to}"
        notes.append(
            f"the state directory has been upgraded from {change}; before that it was copied to {upgrade.backup}"
        )
    if storage.journal_damage is not None:
        notes.append(f"the journal was damaged and has been rebuilt from the checkpoints: {storage.journal_damage}")
    for names, what in (
        (found.adopted, "checkpoints that were not in the journal have been added to it"),
        (found.missing, "checkpoints in the journal are missing on disk"),
        (found.removed, "leftovers of unfinished writes have been removed"),
    ):
        if names:
            notes.append(f"{what}: {', '.join(names)}")
    return notes


# -- the directory ---------------------------------------------------------------------------------------------------


@contextmanager
def _naming_setting(directory: Path) -> Iterator[None]:
    """Turns errors of the system and the journal into a ConfigurationError that names the setting."""
    try:
        yield
    except (JournalError, BackupError, OSError) as error:
        raise ConfigurationError([f"state.dir: {directory} cannot be used: {error}"]) from error
