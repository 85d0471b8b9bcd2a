from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from support.lanes import small_image
from tolaria.checkpoint.store import Retention
from tolaria.config import CheckpointSettings, Settings, StateSettings, TrainingSettings
from tolaria.errors import ConfigurationError, JournalError, JournalUnavailableError, NoCheckpointError, StateHeldError
from tolaria.filesystem import Filesystem
from tolaria.journal.database import Journal
from tolaria.journal.rows import (
    STOPPED_EARLY,
    CheckpointRow,
    CommandRow,
    EmergencyRow,
    FaultRow,
    RollbackRow,
    RunRow,
    values_digest,
)
from tolaria.run.resume import (
    PreparedState,
    RunOutcome,
    active_halt,
    end_run,
    load_resume_point,
    locked_state,
    prepare_state,
    retention_of,
    unfinished_run,
)
from tolaria.values.lineage import Lineage

LOCK_HOLDER = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(descriptor, fcntl.LOCK_EX)
os.write(descriptor, str(os.getpid()).encode())
print("held", flush=True)
sys.stdin.read()
"""


def settings(
    directory: Path, *, job: str = "digits", resume: str = "auto", epochs: int = 1, steps: int = 0
) -> Settings:
    """Settings of a service with that state directory."""
    return Settings(
        state=StateSettings.model_validate({"dir": str(directory), "resume": resume}),
        training=TrainingSettings(job=job, epochs=epochs, steps=steps),
        checkpoint=CheckpointSettings(keep_last=2),
    )


def write(prepared: PreparedState, *steps: int) -> list[CheckpointRow]:
    """Writes a checkpoint for each step."""
    return [prepared.storage.checkpoints.write(small_image(step)) for step in steps]


def leave_run(directory: Path, outcome: RunOutcome | None, *steps: int) -> str:
    """Has a run write checkpoints and leave its process; returns its id."""
    with locked_state(settings(directory)), prepare_state(settings(directory)) as prepared:
        write(prepared, *steps)
        if outcome:
            end_run(prepared, outcome)
        return prepared.run_id


def damage(directory: Path) -> None:
    """Flips a bit in every checkpoint."""
    for path in directory.glob("checkpoints/*/tensors.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


class Unreadable(Filesystem):
    """Opens no file for reading."""

    def open(self, path: Path) -> int:
        raise OSError(errno.EIO, "made to fail")


def test_retention_follows_the_settings() -> None:
    """The best accuracy is the highest, the best loss the lowest."""
    chosen = CheckpointSettings(keep_last=7, keep_superseded=1, keep_superseded_s=60.0)
    assert retention_of(chosen) == Retention(last=7, best="highest", superseded=1, superseded_s=60.0)
    assert retention_of(CheckpointSettings(best="loss")).best == "lowest"


# -- which run is resumed --------------------------------------------------------------------------------------------


def checkpoint(run_id: str, at_ns: int, state: str = "committed") -> CheckpointRow:
    """A checkpoint of that run."""
    row = CheckpointRow(f"{run_id}{at_ns}", at_ns, run_id, at_ns, 1, 1, "d", None)
    return replace(row, state=state)  # type: ignore[arg-type] # from the table


@pytest.mark.parametrize(
    ("runs", "checkpoints", "expected"),
    [
        ([], [], None),
        ([("a", 1, "")], [], None),
        ([("a", 1, "")], [checkpoint("a", 2)], "a"),
        ([("a", 1, "drained")], [checkpoint("a", 2)], "a"),
        ([("a", 1, "failed")], [checkpoint("a", 2)], "a"),
        ([("a", 1, "finished")], [checkpoint("a", 2)], None),
        ([("a", 1, "stopped")], [checkpoint("a", 2)], None),
        ([("a", 1, "")], [checkpoint("a", 2, "quarantined")], None),
        ([("a", 1, "")], [checkpoint("a", 2, "superseded")], "a"),
        ([("a", 1, ""), ("b", 3, "")], [checkpoint("a", 2)], "a"),
        ([("a", 1, ""), ("b", 3, "")], [checkpoint("a", 2), checkpoint("b", 4)], "b"),
        ([("a", 1, ""), ("b", 3, "finished")], [checkpoint("a", 2)], None),
        ([("a", 1, ""), ("b", 3, "finished")], [checkpoint("a", 2), checkpoint("a", 5)], "a"),
        ([], [checkpoint("lost", 2)], "lost"),
        ([("b", 3, "finished")], [checkpoint("lost", 2)], None),
    ],
)
def test_the_unfinished_run(
    runs: list[tuple[str, int, str]], checkpoints: list[CheckpointRow], expected: str | None
) -> None:
    """It is the latest run with a checkpoint, unless it or a later one has ended."""
    rows = [RunRow(run_id, at_ns, "job", outcome=outcome) for run_id, at_ns, outcome in runs]
    found = unfinished_run(rows, checkpoints)
    assert (found.run_id if found else None) == expected


@pytest.mark.parametrize("outcome", [None, "drained", "failed"])
def test_an_unfinished_run_is_resumed_from_its_newest_checkpoint(tmp_path: Path, outcome: RunOutcome | None) -> None:
    """It keeps its id, and its row says from which checkpoint it was resumed."""
    run_id = leave_run(tmp_path, outcome, 3, 6)
    with prepare_state(settings(tmp_path)) as prepared:
        assert (prepared.run_id, prepared.resumed) == (run_id, True)
        point = load_resume_point(prepared)
        assert point.state is prepared
        assert point.loaded is not None
        assert point.loaded.row.global_step == 6
        row = prepared.storage.journal.find(RunRow, run_id)
    assert row is not None
    assert (row.resumed_from, row.outcome, row.ended_at_ns) == (point.loaded.row.checkpoint_id, "", None)


@pytest.mark.parametrize("outcome", ["finished", "stopped"])
def test_a_run_that_has_ended_is_not_resumed(tmp_path: Path, outcome: RunOutcome) -> None:
    """A new run begins without a checkpoint; the checkpoint of the old one is kept beside its own."""
    run_id = leave_run(tmp_path, outcome, 3)
    with prepare_state(settings(tmp_path)) as prepared:
        assert prepared.run_id != run_id
        assert load_resume_point(prepared).loaded is None
        write(prepared, 1)
        kept = prepared.storage.journal.rows(CheckpointRow)
    with pytest.raises(JournalError):
        prepared.storage.journal.put(kept[0])  # it is closed
    assert [(row.run_id, row.state) for row in kept] == [(run_id, "committed"), (prepared.run_id, "committed")]


@pytest.mark.parametrize(
    ("outcome", "job", "resume", "resumed"),
    [
        ("finished", "digits", "auto", True),
        ("stopped", "digits", "auto", False),
        ("finished", "other", "auto", False),
        ("finished", "digits", "never", False),
    ],
)
def test_more_epochs_resume_a_finished_run(
    tmp_path: Path, outcome: RunOutcome, job: str, resume: str, resumed: bool
) -> None:
    """Of the same job, unless state.resume is never; one that an operator has stopped stays stopped."""
    run_id = leave_run(tmp_path, outcome, 3)
    more = settings(tmp_path, job=job, resume=resume, epochs=2)
    with prepare_state(more) as prepared:
        assert prepared.resumed is resumed
        assert (prepared.run_id == run_id) is resumed
        if resumed:
            assert "training.epochs = 2 gives it more epochs" in prepared.notes[-1]
            loaded = load_resume_point(prepared).loaded
            assert loaded is not None
            assert loaded.row.global_step == 3
            end_run(prepared, "finished")
    with prepare_state(settings(tmp_path, epochs=1)) as prepared:
        assert not prepared.resumed


@pytest.mark.parametrize(("step", "said"), [(3, "it had stopped early: f1"), (2, "gives it more epochs")])
def test_the_resumption_of_a_run_says_that_it_had_stopped_early(tmp_path: Path, step: int, said: str) -> None:
    """Not of one that had gone on after that."""
    with locked_state(settings(tmp_path)), prepare_state(settings(tmp_path)) as prepared:
        write(prepared, 3)
        row = CommandRow("c", 1, prepared.run_id, STOPPED_EARLY, step, "applied", "stopped early: f1 was 0.5")
        prepared.storage.journal.put(row)
        end_run(prepared, "finished")
    with prepare_state(settings(tmp_path, epochs=2)) as prepared:
        assert said in prepared.notes[-1]


def test_more_steps_resume_a_run_that_was_counted_in_steps(tmp_path: Path) -> None:
    """The same number begins a new run."""
    run_id = leave_run(tmp_path, "finished", 3)
    with prepare_state(settings(tmp_path, steps=4)) as prepared:
        assert prepared.run_id == run_id
        assert "training.steps = 4 gives it more steps" in prepared.notes[-1]
        end_run(prepared, "finished")
    with prepare_state(settings(tmp_path, steps=3, epochs=99)) as prepared:
        assert not prepared.resumed


def test_with_resume_never_an_unfinished_run_is_abandoned(tmp_path: Path) -> None:
    """The notes name it; once the new run has ended, the old one is not resumed either."""
    run_id = leave_run(tmp_path, None, 3)
    with prepare_state(settings(tmp_path, resume="never")) as prepared:
        assert not prepared.resumed
        assert run_id in prepared.notes[-1]
        end_run(prepared, "finished")
    with prepare_state(settings(tmp_path)) as prepared:
        assert not prepared.resumed


def test_a_rebuilt_journal_does_not_forget_the_run(tmp_path: Path) -> None:
    """The run is known from the checkpoints' manifests; the notes say what happened to the journal."""
    run_id = leave_run(tmp_path, None, 3)
    (tmp_path / "journal.sqlite3").write_bytes(b"garbage" * 1000)
    with prepare_state(settings(tmp_path, job="other")) as prepared:
        assert (prepared.run_id, prepared.resumed) == (run_id, True)
        assert any("journal was damaged" in note for note in prepared.notes)
        row = prepared.storage.journal.find(RunRow, run_id)
    assert row is not None
    assert row.job == "other"


def test_an_unfinished_run_of_another_job_is_an_error(tmp_path: Path) -> None:
    """The message names the settings, nothing has changed, and both ways out that it names work."""
    run_id = leave_run(tmp_path, None, 3)
    with pytest.raises(ConfigurationError, match=r"state\.dir.*training\.job.*state\.resume = never"):
        prepare_state(settings(tmp_path, job="other")).__enter__()
    with prepare_state(settings(tmp_path)) as prepared:
        assert prepared.run_id == run_id
    for way_out in (settings(tmp_path / "b", job="other"), settings(tmp_path, job="other", resume="never")):
        with prepare_state(way_out) as prepared:
            assert not prepared.resumed


def test_a_new_run_is_the_latest_also_after_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of runs does not depend on the wall clock."""
    run_id = leave_run(tmp_path, None, 3)
    monkeypatch.setattr("time.time_ns", lambda: 5)
    with prepare_state(settings(tmp_path, resume="never")) as prepared:
        end_run(prepared, "finished")
    with prepare_state(settings(tmp_path)) as prepared:
        assert (prepared.resumed, prepared.run_id != run_id) == (False, True)


# -- checkpoints that cannot be loaded -------------------------------------------------------------------------------


def test_the_next_older_checkpoint_is_loaded_instead_of_a_damaged_one(tmp_path: Path) -> None:
    """The result names the damaged one."""
    leave_run(tmp_path, None, 3, 6)
    newest = max((tmp_path / "checkpoints").iterdir())
    (newest / "state.json").unlink()
    with prepare_state(settings(tmp_path)) as prepared:
        loaded = load_resume_point(prepared).loaded
    assert loaded is not None
    assert (loaded.row.global_step, [damage.stage for damage in loaded.damaged]) == (3, ["state"])


def test_a_run_without_an_intact_checkpoint_is_replaced_by_a_new_one(tmp_path: Path) -> None:
    """Training goes on under a new id; an incident, a critical log line and the quarantine show the loss."""
    run_id = leave_run(tmp_path, None, 3, 6)
    damage(tmp_path)
    with capture_logs() as logs, prepare_state(settings(tmp_path)) as prepared:
        point = load_resume_point(prepared)
        state, journal = point.state, point.state.storage.journal
        assert (point.loaded, state.resumed) == (None, False)
        assert state.run_id != run_id
        assert {row.run_id: row.outcome for row in journal.rows(RunRow)} == {run_id: "failed", state.run_id: ""}
        assert [row.run_id for row in journal.rows(FaultRow) if row.kind == "run_lost"] == [run_id]
        assert write(state, 1)[0].run_id == state.run_id
    assert [line["log_level"] for line in logs if line["event"] == "run_lost"] == ["critical"]
    assert len(list((tmp_path / "quarantine").iterdir())) == 2
    with prepare_state(settings(tmp_path)) as prepared:
        assert prepared.run_id == state.run_id


def test_a_run_that_cannot_be_read_at_present_is_not_given_up(tmp_path: Path) -> None:
    """The start fails, and a later one with a working disk resumes the run."""
    run_id = leave_run(tmp_path, None, 3)
    with (
        prepare_state(settings(tmp_path), files=Unreadable()) as prepared,
        pytest.raises(NoCheckpointError, match="EIO"),
    ):
        load_resume_point(prepared)
    with prepare_state(settings(tmp_path)) as prepared:
        point = load_resume_point(prepared)
    assert (point.state.run_id, point.loaded is not None) == (run_id, True)


# -- the directory ---------------------------------------------------------------------------------------------------


def test_a_new_directory_that_was_not_used_is_removed(tmp_path: Path) -> None:
    """One that holds anything but the lock stays, as does one that was there before."""
    for name in ("empty", "used"):
        with locked_state(settings(tmp_path / name)):
            assert (tmp_path / name / "lock").read_text() == f"{os.getpid()}\n"
            if name == "used":
                (tmp_path / name / "note").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
    (tmp_path / "mine").mkdir()
    with locked_state(settings(tmp_path / "mine")):
        pass
    assert (tmp_path / "mine").exists()


def test_a_directory_serves_one_process_at_a_time(tmp_path: Path) -> None:
    """A second process is refused with the setting and the holder's pid until the first has ended in any way."""
    with subprocess.Popen(
        [sys.executable, "-c", LOCK_HOLDER, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StateHeldError, match=rf"state\.dir: .*process {holder.pid};") as caught:
            locked_state(settings(tmp_path)).__enter__()
        assert not (tmp_path / "journal.sqlite3").exists()
        holder.kill()
    assert caught.value.holder_pid == holder.pid
    with locked_state(settings(tmp_path)):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(StateHeldError):
            locked_state(settings(tmp_path)).__enter__()
    with locked_state(settings(tmp_path)):
        pass


def write_newer_schema(directory: Path) -> None:
    """Makes the journal one of a later schema."""
    with sqlite3.connect(directory / "journal.sqlite3") as connection:
        connection.execute("UPDATE meta SET schema_version = 99, row_digest = ?", (values_digest("meta", (99,)),))
    connection.close()


def replace_directory_by_file(directory: Path) -> None:
    """Puts a file in the directory's place."""
    shutil.rmtree(directory)
    directory.write_text("here first")


def replace_journal_by_directory(directory: Path) -> None:
    """Puts a directory where SQLite expects its file."""
    (directory / "journal.sqlite3").unlink()
    (directory / "journal.sqlite3").mkdir()


@pytest.mark.parametrize("spoil", [write_newer_schema, replace_directory_by_file, replace_journal_by_directory])
def test_a_directory_that_cannot_be_used_is_a_configuration_error(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    """The message names state.dir and the path."""
    directory = tmp_path / "state"
    with prepare_state(settings(directory)):
        pass
    spoil(directory)
    with (
        pytest.raises(ConfigurationError, match=rf"state\.dir: {directory} cannot be used"),
        locked_state(settings(directory)),
        prepare_state(settings(directory)),
    ):
        pass


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While the block runs, the journal accepts no row."""

    def refuse(*_: object) -> None:
        raise JournalUnavailableError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "put", refuse)
        yield


def test_a_full_disk_prevents_the_start_and_is_logged_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that cannot be recorded is refused; an end that cannot be recorded goes on."""
    with full_disk(monkeypatch), pytest.raises(ConfigurationError, match=r"state\.dir: .*full"):
        prepare_state(settings(tmp_path)).__enter__()
    with capture_logs() as logs, prepare_state(settings(tmp_path)) as prepared, full_disk(monkeypatch):
        end_run(prepared, "finished")
    assert [line["event"] for line in logs] == ["run_end_not_recorded"]


def test_a_crash_right_after_a_checkpoint_loses_nothing(tmp_path: Path) -> None:
    """The checkpoint is not proven yet, and is resumed from all the same; the attempt goes on."""
    leave_run(tmp_path, None, 3, 6)
    with prepare_state(settings(tmp_path)) as prepared:
        point = load_resume_point(prepared)
        assert point.loaded is not None
        assert (point.loaded.row.global_step, point.loaded.row.proven) == (6, 0)
        assert point.points.lineage == Lineage()


def test_a_suspect_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """It is superseded, not removed, and what follows is another attempt."""
    leave_run(tmp_path, None, 3, 6, 9)
    with prepare_state(settings(tmp_path)) as prepared:
        journal = prepared.storage.journal
        newest = prepared.storage.checkpoints.restore_points()[-1]
        journal.revise(newest.checkpoint_id, suspect=1)
        with capture_logs() as logs:
            point = load_resume_point(prepared)
        assert point.loaded is not None
        assert point.loaded.row.global_step == 6
        assert point.points.lineage == Lineage(2, ((1, 6),))
        assert prepared.storage.checkpoints.kept_points()[-1].state == "superseded"
    assert [line["event"] for line in logs] == ["suspect_checkpoints_passed_over"]


def test_a_kill_after_a_rollback_to_before_all_checkpoints_loses_no_run(tmp_path: Path) -> None:
    """Before the restored state has a checkpoint: the newest proven of the superseded ones is an ancestor again."""
    run_id = leave_run(tmp_path, None, 3, 6, 9)
    with prepare_state(settings(tmp_path)) as prepared:
        proven, _ = prepared.storage.checkpoints.restore_points()
        prepared.storage.journal.revise(proven.checkpoint_id, proven=1)
        assert prepared.storage.checkpoints.follow(Lineage(2, ((1, 2),)), "rolled back to step 2") == 2
    with capture_logs() as logs, prepare_state(settings(tmp_path)) as prepared:
        assert prepared.run_id == run_id
        point = load_resume_point(prepared)
        assert point.loaded is not None
        assert point.loaded.row.global_step == 6
        states = [row.state for row in prepared.storage.checkpoints.kept_points()]
    assert states == ["committed", "superseded"]
    assert [line["detail"] for line in logs if line["event"] == "rollback_lost"] == ["rolled back to step 2"]


def test_a_superseded_checkpoint_is_better_than_a_new_run(tmp_path: Path) -> None:
    """Where all others are damaged; they are in the quarantine then."""
    run_id = leave_run(tmp_path, None, 3, 6)
    with prepare_state(settings(tmp_path)) as prepared:
        store = prepared.storage.checkpoints
        older, newer = store.restore_points()
        prepared.storage.journal.put(replace(newer, state="superseded"))
    (tmp_path / "checkpoints" / older.checkpoint_id / "state.json").unlink()
    with prepare_state(settings(tmp_path)) as prepared:
        point = load_resume_point(prepared)
        assert point.loaded is not None
        assert (prepared.run_id, point.loaded.row.global_step) == (run_id, 6)


def test_earlier_rollbacks_of_the_run_are_counted(tmp_path: Path) -> None:
    """By origin, those that restored a state; and training goes on with a new attempt."""
    run_id = leave_run(tmp_path, None, 3, 6)
    with prepare_state(settings(tmp_path)) as prepared:
        for number, (run, outcome, origin) in enumerate(
            [
                (run_id, "restored", "health"),
                (run_id, "restored", "health"),
                (run_id, "restored", ""),
                (run_id, "failed", "operator"),
                ("another", "restored", "operator"),
            ]
        ):
            row = RollbackRow(str(number), number, run, "fast", 9, 6, outcome, "odd", "d", "d", 1.0, 1, origin, number)
            prepared.storage.journal.put(row)
        point = load_resume_point(prepared)
    assert point.rollbacks == {"health": 2, "unknown": 1}
    assert point.points.lineage.attempt == 4


def test_the_active_halt_of_a_run_is_found(tmp_path: Path) -> None:
    """It is the newest of this run that was not cleared, and not one that the sentinel raised."""
    with prepare_state(settings(tmp_path)) as prepared:
        journal, run_id = prepared.storage.journal, prepared.run_id
        assert active_halt(prepared) is None
        rows = [
            EmergencyRow("cleared", 1, run_id, "halt", "operator", 1, "a", cleared_at_ns=2),
            EmergencyRow("lower", 3, run_id, "conservative", "tolaria", 1, "b"),
            EmergencyRow("sentinel", 9, run_id, "halt", "sentinel", 1, "c"),
            EmergencyRow("other", 9, "another", "halt", "operator", 1, "d"),
        ]
        for row in rows:
            journal.put(row)
        assert active_halt(prepared) is None
        for at_ns in (5, 4):
            journal.put(EmergencyRow(f"halt-{at_ns}", at_ns, run_id, "halt", "tolaria", 1, "e"))
        found = active_halt(prepared)
        assert found is not None
        assert found.emergency_id == "halt-5"
