"""Before training: the state directory is held, its storage opened, and decided which run goes on and from where.

Owns that decision and a run's row in the journal. For the main thread, before there is an event loop. Must not know
how a state comes back into a model.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import structlog

from tolaria.checkpoint.storage import Storage, open_storage
from tolaria.checkpoint.store import LoadedCheckpoint
from tolaria.emergency.protocol import SENTINEL
from tolaria.errors import ConfigurationError, JournalDamagedError, JournalError, NoCheckpointError, StateHeldError
from tolaria.journal.rows import CheckpointRow, EmergencyRow, FaultRow, RunRow
from tolaria.training.recovery.checkpoints import retention_of

if TYPE_CHECKING:
    from tolaria.config import Settings
    from tolaria.filesystem import Filesystem
    from tolaria.journal.database import Journal

RunOutcome: TypeAlias = Literal["finished", "stopped", "drained", "failed"]
"""How a run left its process. Empty in the journal: it goes on, or its process was killed."""

ENDED: Final = frozenset({"finished", "stopped"})
"""Outcomes after which nothing is left to go on with: all epochs are done, or an operator said that it is enough."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedState:
    """A run with its place on disk.

    Attributes:
        directory: absolute.
        storage: open, and seen as this run sees it.
        run_id: of a resumed run the same as in its earlier processes.
        resumed: whether there are checkpoints of it to go on from.
        previous_outcome: how the earlier process left it; empty after a crash, and for a new run.
        told: what the start has found and done, a sentence each.
    """

    directory: Path
    storage: Storage
    run_id: str
    resumed: bool
    previous_outcome: str
    told: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where training begins. `loaded` is None for a new run; its `damaged` are to be told as events."""

    state: PreparedState
    loaded: LoadedCheckpoint | None


@contextmanager
def prepare_state(settings: Settings, *, files: Filesystem | None = None) -> Iterator[PreparedState]:
    """Hold state.dir and open what is in it for one run, until the block ends.

    With `state.resume` auto that is the run which was left before its end, if it has a checkpoint. Its row is in the
    journal when this returns.

    Raises:
        StateHeldError: another service uses the directory.
        ConfigurationError: it cannot be used, or holds an unfinished run of another job.
    """
    directory = Path(settings.state.dir).absolute()
    with ExitStack() as stack:
        with _named(directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(_held(directory))
            storage = open_storage(
                directory, run_id=_new_run_id(), retention=retention_of(settings.checkpoint), files=files
            )
            stack.callback(storage.journal.close)
            prepared = _choose(settings, directory, storage)
        yield prepared


def load_resume_point(prepared: PreparedState) -> ResumePoint:
    """Load the resumed run's newest whole checkpoint; go on with what this returns, which may be another run.

    A run all of whose checkpoints are damaged cannot go on. Rather than stand still until somebody looks, a new one
    begins: under an id of its own, so that nobody takes it for the old one, which is put on record as failed; the
    incident `run_lost` and a critical line tell of it, and the damaged checkpoints lie in the quarantine.

    Raises:
        NoCheckpointError: the system refuses to read checkpoints that may be whole: to begin anew would lose them.
        ConfigurationError: the journal cannot be written.
    """
    if not prepared.resumed:
        return ResumePoint(prepared, None)
    with _named(prepared.directory):
        try:
            loaded = prepared.storage.checkpoints.load_newest()
        except NoCheckpointError as error:
            if prepared.storage.checkpoints.restore_points():
                raise
            return ResumePoint(_begin_anew(prepared, str(error)), None)
        for damage in loaded.damaged:
            _log.error(
                "checkpoint_not_loaded",
                checkpoint_id=damage.checkpoint_id,
                stage=damage.stage,
                reason=damage.reason,
                quarantined=damage.quarantined,
            )
        journal = prepared.storage.journal
        row = run_row(journal, prepared.run_id)
        journal.put(replace(row, resumed_from=loaded.row.checkpoint_id))
    return ResumePoint(prepared, loaded)


def end_run(prepared: PreparedState, outcome: RunOutcome) -> None:
    """Put on record how the run left this process. A journal that refuses is told in the log alone.

    The next start then takes the run for one that was killed, and goes on with it: at worst it ends once more.
    """
    journal = prepared.storage.journal
    try:
        row = run_row(journal, prepared.run_id)
        journal.put(replace(row, outcome=outcome, ended_at_ns=time.time_ns()))
    except JournalError as error:
        _log.error("run_end_not_recorded", outcome=outcome, detail=str(error))


def standing_halt(prepared: PreparedState) -> EmergencyRow | None:
    """The halt that stood when the run left its earlier process, which nobody has cleared; None: there is none.

    One that the sentinel raised was about that process. Raises JournalError.
    """
    rows = prepared.storage.journal.rows(EmergencyRow, run_id=prepared.run_id)
    halts = [row for row in rows if row.level == "halt" and row.cleared_at_ns is None and row.origin != SENTINEL]
    return max(halts, key=lambda row: row.at_ns, default=None)


def unfinished_run(runs: Sequence[RunRow], checkpoints: Sequence[CheckpointRow]) -> RunRow | None:
    """The run to go on with: the latest one with a committed checkpoint, unless it or a later one came to its end.

    A run that only its checkpoints tell of, since a damaged journal had to be rebuilt, counts as unfinished: to end
    once more what had ended costs little, to forget weeks of training does not. Its job is unknown, hence empty.
    """
    newest_ns: dict[str, int] = {}
    for row in checkpoints:
        if row.state == "committed":
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


def _choose(settings: Settings, directory: Path, storage: Storage) -> PreparedState:
    journal, job = storage.journal, settings.training.job
    found = unfinished_run(journal.rows(RunRow), journal.rows(CheckpointRow))
    told = _repairs(storage)
    if found is None or settings.state.resume == "never":
        row = _new_run(journal, job)
        left = f", and leaves the unfinished run {found.run_id} behind, as state.resume says" if found else ""
        told.append(f"the new run {row.run_id} begins{left}")
    else:
        _check_job(directory, found, job)
        row = replace(found, job=job, outcome="", ended_at_ns=None)
        told.append(f"the run {row.run_id} goes on, which {_left(found.outcome)}")
    journal.put(row)
    return PreparedState(
        directory=directory,
        storage=storage.for_run(row.run_id),
        run_id=row.run_id,
        resumed=found is not None and row.run_id == found.run_id,
        previous_outcome=found.outcome if found is not None and row.run_id == found.run_id else "",
        told=tuple(told),
    )


def _check_job(directory: Path, found: RunRow, job: str) -> None:
    if found.job and found.job != job:
        problem = (
            f"state.dir: {directory} holds the unfinished run {found.run_id} of the job {found.job!r}, but "
            f"training.job is {job!r}: give this job a state.dir of its own, or leave that run behind with "
            "state.resume = never"
        )
        raise ConfigurationError([problem])


def _begin_anew(prepared: PreparedState, why: str) -> PreparedState:
    journal = prepared.storage.journal
    lost = run_row(journal, prepared.run_id)
    now_ns = time.time_ns()
    journal.put(FaultRow(uuid.uuid4().hex, now_ns, lost.run_id, "run_lost", -1, "resume", why))
    journal.put(replace(lost, outcome="failed", ended_at_ns=now_ns))
    row = _new_run(journal, lost.job)
    journal.put(row)
    _log.critical("run_lost", run_id=lost.run_id, new_run_id=row.run_id, detail=why)
    told = f"the run {lost.run_id} is lost, as {why}; the new run {row.run_id} begins"
    return replace(
        prepared,
        storage=prepared.storage.for_run(row.run_id),
        run_id=row.run_id,
        resumed=False,
        previous_outcome="",
        told=(*prepared.told, told),
    )


def _new_run(journal: Journal, job: str) -> RunRow:
    """Later than all there is, also when the clock has been set back."""
    rows: list[RunRow | CheckpointRow] = [*journal.rows(RunRow), *journal.rows(CheckpointRow)]
    return RunRow(_new_run_id(), max([time.time_ns(), *(row.at_ns + 1 for row in rows)]), job)


def _new_run_id() -> str:
    return uuid.uuid4().hex[:12]


def run_row(journal: Journal, run_id: str) -> RunRow:
    """The run's row. Raises JournalDamagedError: it has none."""
    row = journal.find(RunRow, run_id)
    if row is None:
        raise JournalDamagedError(f"the run {run_id} is not in the journal")
    return row


def _left(outcome: str) -> str:
    return f"its last process left as {outcome}" if outcome else "its last process did not live to end"


def _repairs(storage: Storage) -> list[str]:
    recovery = storage.recovery
    told = []
    if storage.journal_damage is not None:
        told.append(f"the journal was damaged and has been rebuilt from the checkpoints: {storage.journal_damage}")
    for names, what in (
        (recovery.adopted, "checkpoints were found that the journal did not know"),
        (recovery.missing, "checkpoints are gone that the journal knew"),
        (recovery.removed, "leftovers of unfinished writes were removed"),
    ):
        if names:
            told.append(f"{what}: {', '.join(names)}")
    return told


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Hold the directory's lock: the system gives it back when this process is gone, however it went."""
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateHeldError(str(directory), _holder(descriptor)) from None
        with suppress(OSError):  # a full disk: the lock holds, only nobody can tell whose it is
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> int:
    written = os.pread(descriptor, 32, 0).strip()
    return int(written) if written.isdigit() else 0


@contextmanager
def _named(directory: Path) -> Iterator[None]:
    """What the system or the journal refuses is the fault of a setting, which the message names."""
    try:
        yield
    except (JournalError, OSError) as error:
        raise ConfigurationError([f"state.dir: {directory} cannot be used: {error}"]) from error
