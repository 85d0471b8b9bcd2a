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
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from tolaria.cli.errors import exit_code
from tolaria.config import CheckpointSettings, Settings, StateSettings, TrainingSettings
from tolaria.errors import ConfigurationError, JournalError, JournalUnavailableError, NoCheckpointError, StateHeldError
from tolaria.filesystem import Filesystem
from tolaria.journal.database import Journal
from tolaria.journal.rows import CheckpointRow, EmergencyRow, FaultRow, RunRow
from tolaria.training.recovery.startup import (
    PreparedState,
    RunOutcome,
    end_run,
    load_resume_point,
    prepare_state,
    standing_halt,
    unfinished_run,
)
from tolaria.values.training import Position

if TYPE_CHECKING:
    from faults.small_training import Training

HOLDER = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(descriptor, fcntl.LOCK_EX)
os.write(descriptor, str(os.getpid()).encode())
print("held", flush=True)
sys.stdin.read()
"""


def settings(directory: Path, *, job: str = "digits", resume: str = "auto") -> Settings:
    """Of a service in that directory."""
    return Settings(
        state=StateSettings.model_validate({"dir": str(directory), "resume": resume}),
        training=TrainingSettings(job=job),
        checkpoint=CheckpointSettings(keep_last=2),
    )


def write(prepared: PreparedState, training: Training, *at_steps: int) -> list[CheckpointRow]:
    """Checkpoints that say that they are of these steps."""
    rows = []
    for step in at_steps:
        training.position = Position(step, 1)
        rows.append(prepared.storage.checkpoints.write(training.state().copy()))
    return rows


def left(directory: Path, training: Training, outcome: RunOutcome | None, *at_steps: int) -> str:
    """A run that leaves checkpoints and its process; returns its id."""
    with prepare_state(settings(directory)) as prepared:
        write(prepared, training, *at_steps)
        if outcome:
            end_run(prepared, outcome)
        return prepared.run_id


def harm(directory: Path) -> None:
    """Flip a bit in every checkpoint."""
    for path in directory.glob("checkpoints/*/tensors.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


class Unreadable(Filesystem):
    """Opens nothing for reading."""

    def open(self, path: Path) -> int:
        raise OSError(errno.EIO, "made to fail")


# -- which run goes on -----------------------------------------------------------------------------------------------


def point(run_id: str, at_ns: int, state: str = "committed") -> CheckpointRow:
    """A checkpoint of that run."""
    row = CheckpointRow(f"{run_id}{at_ns}", at_ns, run_id, at_ns, 1, 1, "d", None)
    return replace(row, state=state)  # type: ignore[arg-type] # the table has words


@pytest.mark.parametrize(
    ("runs", "points", "expected"),
    [
        ([], [], None),
        ([("a", 1, "")], [], None),
        ([("a", 1, "")], [point("a", 2)], "a"),
        ([("a", 1, "drained")], [point("a", 2)], "a"),
        ([("a", 1, "failed")], [point("a", 2)], "a"),
        ([("a", 1, "finished")], [point("a", 2)], None),
        ([("a", 1, "stopped")], [point("a", 2)], None),
        ([("a", 1, "")], [point("a", 2, "quarantined")], None),
        ([("a", 1, ""), ("b", 3, "")], [point("a", 2)], "a"),
        ([("a", 1, ""), ("b", 3, "")], [point("a", 2), point("b", 4)], "b"),
        ([("a", 1, ""), ("b", 3, "finished")], [point("a", 2)], None),
        ([("a", 1, ""), ("b", 3, "finished")], [point("a", 2), point("a", 5)], "a"),
        ([], [point("lost", 2)], "lost"),
        ([("b", 3, "finished")], [point("lost", 2)], None),
    ],
)
def test_which_run_goes_on(runs: list[tuple[str, int, str]], points: list[CheckpointRow], expected: str | None) -> None:
    """The latest with a committed checkpoint, unless it or a later one came to its end."""
    rows = [RunRow(run_id, at_ns, "job", outcome=outcome) for run_id, at_ns, outcome in runs]
    found = unfinished_run(rows, points)
    assert (found.run_id if found else None) == expected


@pytest.mark.parametrize("outcome", [None, "drained", "failed"])
def test_an_unfinished_run_goes_on_from_its_newest_checkpoint(
    tmp_path: Path, training: Training, outcome: RunOutcome | None
) -> None:
    """Under the same id, from the newest checkpoint, and the journal knows from which."""
    run_id = left(tmp_path, training, outcome, 3, 6)
    with prepare_state(settings(tmp_path)) as prepared:
        assert (prepared.run_id, prepared.resumed, prepared.previous_outcome) == (run_id, True, outcome or "")
        beginning = load_resume_point(prepared)
        assert beginning.state is prepared
        assert beginning.loaded is not None
        assert beginning.loaded.row.global_step == 6
        row = prepared.storage.journal.find(RunRow, run_id)
    assert row is not None
    assert (row.resumed_from, row.outcome, row.ended_at_ns) == (beginning.loaded.row.checkpoint_id, "", None)


@pytest.mark.parametrize("outcome", ["finished", "stopped"])
def test_an_ended_run_is_over(tmp_path: Path, training: Training, outcome: RunOutcome) -> None:
    """A new run begins, with nothing to load; the old one's checkpoint stays beside its own."""
    run_id = left(tmp_path, training, outcome, 3)
    with prepare_state(settings(tmp_path)) as prepared:
        assert prepared.run_id != run_id
        assert load_resume_point(prepared).loaded is None
        write(prepared, training, 1)
        kept = prepared.storage.journal.rows(CheckpointRow)
    with pytest.raises(JournalError):
        prepared.storage.journal.put(kept[0])  # it is closed
    assert [(row.run_id, row.state) for row in kept] == [(run_id, "committed"), (prepared.run_id, "committed")]


def test_never_begins_anew_and_says_what_it_leaves(tmp_path: Path, training: Training) -> None:
    """An unfinished run is left behind, its checkpoints stay; once the new run has ended it is not gone back to."""
    run_id = left(tmp_path, training, None, 3)
    with prepare_state(settings(tmp_path, resume="never")) as prepared:
        assert not prepared.resumed
        assert run_id in prepared.told[-1]
        end_run(prepared, "finished")
    with prepare_state(settings(tmp_path)) as prepared:
        assert not prepared.resumed


def test_a_rebuilt_journal_does_not_forget_the_run(tmp_path: Path, training: Training) -> None:
    """The checkpoints' manifests tell which run there was; what happened to the journal is told."""
    run_id = left(tmp_path, training, None, 3)
    (tmp_path / "journal.sqlite3").write_bytes(b"garbage" * 1000)
    with prepare_state(settings(tmp_path, job="other")) as prepared:
        assert (prepared.run_id, prepared.resumed) == (run_id, True)
        assert any("journal was damaged" in line for line in prepared.told)
        row = prepared.storage.journal.find(RunRow, run_id)
    assert row is not None
    assert row.job == "other"


def test_another_job_is_refused_and_both_ways_out_work(tmp_path: Path, training: Training) -> None:
    """The message names the settings; nothing has changed; another directory or `never` go on."""
    run_id = left(tmp_path, training, None, 3)
    with pytest.raises(ConfigurationError, match=r"state\.dir.*training\.job.*state\.resume = never"):
        prepare_state(settings(tmp_path, job="other")).__enter__()
    with prepare_state(settings(tmp_path)) as prepared:
        assert prepared.run_id == run_id
    for way_out in (settings(tmp_path / "b", job="other"), settings(tmp_path, job="other", resume="never")):
        with prepare_state(way_out) as prepared:
            assert not prepared.resumed


def test_a_new_run_is_the_latest_when_the_clock_goes_back(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order follows what happened, not the wall clock."""
    run_id = left(tmp_path, training, None, 3)
    monkeypatch.setattr("time.time_ns", lambda: 5)
    with prepare_state(settings(tmp_path, resume="never")) as prepared:
        end_run(prepared, "finished")
    with prepare_state(settings(tmp_path)) as prepared:
        assert (prepared.resumed, prepared.run_id != run_id) == (False, True)


# -- what cannot be loaded -------------------------------------------------------------------------------------------


def test_of_damaged_checkpoints_the_next_older_serves(tmp_path: Path, training: Training) -> None:
    """The damage is in what is returned, for events."""
    left(tmp_path, training, None, 3, 6)
    newest = max((tmp_path / "checkpoints").iterdir())
    (newest / "state.json").unlink()
    with prepare_state(settings(tmp_path)) as prepared:
        loaded = load_resume_point(prepared).loaded
    assert loaded is not None
    assert (loaded.row.global_step, [damage.stage for damage in loaded.damaged]) == (3, ["state"])


def test_a_run_without_a_whole_checkpoint_is_put_on_record_and_a_new_one_begins(
    tmp_path: Path, training: Training
) -> None:
    """Training goes on unattended, under an id of its own; incident, critical line and quarantine tell of the loss."""
    run_id = left(tmp_path, training, None, 3, 6)
    harm(tmp_path)
    with capture_logs() as logs, prepare_state(settings(tmp_path)) as prepared:
        beginning = load_resume_point(prepared)
        state, journal = beginning.state, beginning.state.storage.journal
        assert (beginning.loaded, state.resumed) == (None, False)
        assert state.run_id != run_id
        assert {row.run_id: row.outcome for row in journal.rows(RunRow)} == {run_id: "failed", state.run_id: ""}
        assert [row.run_id for row in journal.rows(FaultRow) if row.kind == "run_lost"] == [run_id]
        assert write(state, training, 1)[0].run_id == state.run_id
    assert [line["log_level"] for line in logs if line["event"] == "run_lost"] == ["critical"]
    assert len(list((tmp_path / "quarantine").iterdir())) == 2
    with prepare_state(settings(tmp_path)) as prepared:
        assert prepared.run_id == state.run_id


def test_a_run_that_only_cannot_be_read_now_is_not_given_up(tmp_path: Path, training: Training) -> None:
    """The start fails instead, and a later one, with a disk that is well, goes on with the run."""
    run_id = left(tmp_path, training, None, 3)
    with (
        prepare_state(settings(tmp_path), files=Unreadable()) as prepared,
        pytest.raises(NoCheckpointError, match="EIO"),
    ):
        load_resume_point(prepared)
    with prepare_state(settings(tmp_path)) as prepared:
        beginning = load_resume_point(prepared)
    assert (beginning.state.run_id, beginning.loaded is not None) == (run_id, True)


# -- the directory ---------------------------------------------------------------------------------------------------


def test_a_directory_serves_one_service(tmp_path: Path) -> None:
    """A second one is refused with the setting and the holder's pid, until the first is gone, however it went."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StateHeldError, match=rf"state\.dir: .*process {holder.pid};") as caught:
            prepare_state(settings(tmp_path)).__enter__()
        assert not (tmp_path / "journal.sqlite3").exists()
        holder.kill()
    assert (caught.value.holder_pid, exit_code(caught.value)) == (holder.pid, 1)
    with prepare_state(settings(tmp_path)):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(StateHeldError):
            prepare_state(settings(tmp_path)).__enter__()
    with prepare_state(settings(tmp_path)):
        pass


def newer(directory: Path) -> None:
    """A journal of a later schema."""
    from tolaria.journal.rows import values_digest

    with sqlite3.connect(directory / "journal.sqlite3") as connection:
        connection.execute("UPDATE meta SET schema_version = 99, row_digest = ?", (values_digest("meta", (99,)),))
    connection.close()


def a_file(directory: Path) -> None:
    """Something else of that name."""
    shutil.rmtree(directory)
    directory.write_text("here first")


def a_folder_for_a_journal(directory: Path) -> None:
    """What SQLite cannot open."""
    (directory / "journal.sqlite3").unlink()
    (directory / "journal.sqlite3").mkdir()


@pytest.mark.parametrize("spoil", [newer, a_file, a_folder_for_a_journal])
def test_a_directory_that_cannot_be_used_is_a_wrong_setting(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """The message names state.dir and the path; the exit code is that of wrong settings."""
    directory = tmp_path / "state"
    with prepare_state(settings(directory)):
        pass
    spoil(directory)
    with pytest.raises(ConfigurationError, match=rf"state\.dir: {directory} cannot be used") as caught:
        prepare_state(settings(directory)).__enter__()
    assert exit_code(caught.value) == 2


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While the block runs, the journal takes no row."""

    def refuse(*_: object) -> None:
        raise JournalUnavailableError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "put", refuse)
        yield


def test_a_full_disk_at_the_start_is_a_wrong_setting_and_at_the_end_a_log_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that cannot be put on record is refused and leaves the lock free; an end goes on."""
    with full_disk(monkeypatch), pytest.raises(ConfigurationError, match=r"state\.dir: .*full"):
        prepare_state(settings(tmp_path)).__enter__()
    with capture_logs() as logs, prepare_state(settings(tmp_path)) as prepared, full_disk(monkeypatch):
        end_run(prepared, "finished")
    assert [line["event"] for line in logs] == ["run_end_not_recorded"]


def test_the_halt_that_a_run_was_left_with_is_found(tmp_path: Path) -> None:
    """The newest that nobody cleared, of this run, and not the sentinel's about a process that is no more."""
    with prepare_state(settings(tmp_path)) as prepared:
        journal, run_id = prepared.storage.journal, prepared.run_id
        assert standing_halt(prepared) is None
        rows = [
            EmergencyRow("cleared", 1, run_id, "halt", "operator", 1, "a", cleared_at_ns=2),
            EmergencyRow("lower", 3, run_id, "conservative", "tolaria", 1, "b"),
            EmergencyRow("sentinel", 9, run_id, "halt", "sentinel", 1, "c"),
            EmergencyRow("other", 9, "another", "halt", "operator", 1, "d"),
        ]
        for row in rows:
            journal.put(row)
        assert standing_halt(prepared) is None
        for at_ns in (5, 4):
            journal.put(EmergencyRow(f"halt-{at_ns}", at_ns, run_id, "halt", "tolaria", 1, "e"))
        found = standing_halt(prepared)
        assert found is not None
        assert found.emergency_id == "halt-5"
