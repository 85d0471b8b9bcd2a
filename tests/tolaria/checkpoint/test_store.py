from __future__ import annotations

import errno
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tolaria.checkpoint.format import Manifest, Provenance, write_checkpoint
from tolaria.checkpoint.storage import Storage, open_storage
from tolaria.checkpoint.store import LoadedCheckpoint, Retention
from tolaria.errors import CheckpointWriteError, JournalUnavailableError, NoCheckpointError, RestoreAbandonedError
from tolaria.filesystem import Filesystem
from tolaria.journal.rows import CheckpointRow, FaultRow, RollbackRow, Row
from tolaria.values.lineage import Lineage
from tolaria.values.training import Position

if TYPE_CHECKING:
    from faults.small_training import Training


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    """A new state directory."""
    storage = open_storage(tmp_path, run_id="run", retention=Retention(last=3, best="highest"))
    with storage.journal:
        yield storage


def write(
    storage: Storage,
    training: Training,
    step: int,
    metric: float | None = None,
    *,
    lineage: Lineage | None = None,
    suspect: bool = False,
) -> CheckpointRow:
    """Writes a checkpoint of this step."""
    training.position = Position(step, 1)
    provenance = Provenance(lineage or Lineage(), suspect=suspect)
    return storage.checkpoints.write(training.state().copy(), metric=metric, provenance=provenance)


def steps(storage: Storage) -> list[int]:
    """Steps of the committed checkpoints."""
    return [row.global_step for row in storage.checkpoints.restore_points()]


def on_disk(directory: Path) -> list[int]:
    """Steps of the checkpoints' directories."""
    return sorted(int(path.name.split("-")[0]) for path in (directory / "checkpoints").iterdir())


def load(storage: Storage) -> LoadedCheckpoint:
    """Loads without a deadline."""
    return storage.checkpoints.load_newest()


def test_pruned_checkpoints_are_removed(tmp_path: Path, storage: Storage, training: Training) -> None:
    """Directory and journal agree on what is kept."""
    for step, metric in [(1, 0.5), (2, 0.9), (3, 0.1), (4, float("nan")), (5, 0.2), (6, None)]:
        write(storage, training, step, metric)
    assert steps(storage) == on_disk(tmp_path) == [2, 4, 5, 6]


def test_the_newest_that_is_not_suspect_is_loaded(storage: Storage, training: Training) -> None:
    """The newest by time; a suspect one only if there is no other, or once it is proven."""
    with pytest.raises(NoCheckpointError):
        load(storage)
    write(storage, training, 10, suspect=True)
    assert load(storage).row.global_step == 10
    write(storage, training, 20)
    newest = write(storage, training, 30, suspect=True)
    assert load(storage).row.global_step == 20
    storage.journal.revise(newest.checkpoint_id, proven=1)
    assert load(storage).row.global_step == 30


def test_superseded_checkpoints_are_not_loaded(storage: Storage, training: Training) -> None:
    """After a rollback later checkpoints are neither loaded nor listed; the next write removes them."""
    for step in (10, 20, 30):
        write(storage, training, step)
    back = Lineage().back_to(10, 2)
    assert storage.checkpoints.follow(back, "back") == 2
    assert (steps(storage), load(storage).row.global_step) == ([10], 10)
    write(storage, training, 20, lineage=back)
    assert (steps(storage), load(storage).row.global_step) == ([10, 20], 20)
    assert len(storage.checkpoints.kept_points()) == 2


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "longer", "gone"])
def test_a_damaged_checkpoint_is_quarantined_and_the_next_older_loaded(
    tmp_path: Path, storage: Storage, training: Training, name: str, harm: str
) -> None:
    """Any harm to a file is reported, recorded and quarantined, and an older checkpoint is loaded."""
    write(storage, training, 1)
    row = write(storage, training, 2)
    path = tmp_path / "checkpoints" / row.checkpoint_id / name
    content = path.read_bytes()
    flipped = bytes([content[0] ^ 1]) + content[1:]
    match harm:
        case "gone":
            path.unlink()
        case _:
            path.write_bytes({"flip": flipped, "cut": content[:-1], "longer": content + b" "}[harm])
    loaded = load(storage)
    assert loaded.row.global_step == 1
    assert [(d.stage, d.quarantined) for d in loaded.damaged] == [(Path(name).stem, True)]
    assert (on_disk(tmp_path), steps(storage)) == ([1], [1])
    assert len(list((tmp_path / "quarantine").iterdir())) == 1
    assert [f.kind for f in storage.journal.rows(FaultRow)] == ["checkpoint_damaged"]


def test_a_checkpoint_under_another_name_is_damage(tmp_path: Path, storage: Storage, training: Training) -> None:
    """An intact copy under another id is not accepted."""
    first, second = write(storage, training, 1), write(storage, training, 2)
    places = tmp_path / "checkpoints"
    shutil.rmtree(places / second.checkpoint_id)
    shutil.copytree(places / first.checkpoint_id, places / second.checkpoint_id)
    assert load(storage).row.global_step == 1


def test_a_checkpoint_with_another_digest_is_damage(tmp_path: Path, storage: Storage, training: Training) -> None:
    """An intact checkpoint of another state under the same id does not match the journal's digest."""
    write(storage, training, 1)
    row = write(storage, training, 2)
    places = tmp_path / "checkpoints"
    shutil.rmtree(places / row.checkpoint_id)
    training.train(1)
    other = training.state().copy()
    manifest = Manifest.of(other, checkpoint_id=row.checkpoint_id, run_id="x", created_at_ns=1, metric=None)
    write_checkpoint(Filesystem(), places, manifest, other)
    assert load(storage).row.global_step == 1


def test_a_load_past_its_deadline_is_abandoned(storage: Storage, training: Training) -> None:
    """A slow checkpoint is not quarantined."""
    write(storage, training, 1)
    with pytest.raises(RestoreAbandonedError):
        storage.checkpoints.load_newest(lambda: True)
    assert load(storage).row.global_step == 1


def test_repair_makes_directory_and_journal_agree(tmp_path: Path, training: Training) -> None:
    """Directories without a row are adopted, leftovers removed, rows without a directory marked missing."""
    storage = open_storage(tmp_path, run_id="a", retention=Retention(last=3, best="highest"))
    with storage.journal:
        kept, lost = write(storage, training, 1), write(storage, training, 2)
    for path in tmp_path.glob("journal*"):
        path.unlink()
    storage = open_storage(tmp_path, run_id="a", retention=Retention(last=3, best="highest"))
    with storage.journal:
        assert storage.repairs.adopted == (kept.checkpoint_id, lost.checkpoint_id)
        assert storage.checkpoints.restore_points() == (kept, lost)
    shutil.rmtree(tmp_path / "checkpoints" / lost.checkpoint_id)
    (tmp_path / "checkpoints" / ".partial-x").mkdir()
    storage = open_storage(tmp_path, run_id="a", retention=Retention(last=3, best="highest"))
    with storage.journal:
        assert storage.repairs.missing == (lost.checkpoint_id,)
        assert storage.repairs.removed == (".partial-x",)
        assert steps(storage) == on_disk(tmp_path) == [1]


def test_a_damaged_journal_is_rebuilt_from_the_manifests(tmp_path: Path, training: Training) -> None:
    """The old journal is in the quarantine, all checkpoints are listed, and an incident is recorded."""
    storage = open_storage(tmp_path, run_id="a", retention=Retention(last=3, best="highest"))
    with storage.journal:
        expected = [write(storage, training, step, step / 10) for step in (1, 2)]
    (tmp_path / "journal.sqlite3").write_bytes(b"garbage" * 1000)
    storage = open_storage(tmp_path, run_id="a", retention=Retention(last=3, best="highest"))
    with storage.journal:
        assert storage.journal_damage is not None
        assert list(storage.checkpoints.restore_points()) == expected
        assert [incident.kind for incident in storage.journal.incidents(5)] == ["journal_rebuilt"]
        assert len(list((tmp_path / "quarantine").glob("journal*"))) == 1


def test_the_newest_stays_newest_when_the_clock_goes_back(
    storage: Storage, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of checkpoints is that of their commits, not of the wall clock."""
    write(storage, training, 10)
    monkeypatch.setattr("time.time_ns", lambda: 5)
    write(storage, training, 5)
    assert load(storage).row.global_step == 5


def test_runs_that_share_a_directory_are_separate(tmp_path: Path, training: Training) -> None:
    """A run lists, loads and supersedes only its own checkpoints; other runs' last ones are kept."""
    storage = open_storage(tmp_path, run_id="a", retention=Retention(last=3, best="highest"))
    with storage.journal:
        for step in (10, 20):
            write(storage, training, step)
        other = storage.for_run("b")
        with pytest.raises(NoCheckpointError):
            load(other)
        other.checkpoints.follow(Lineage(9), "another run")
        assert steps(storage) == [10, 20]
        write(other, training, 5)
        assert (steps(storage), steps(other), on_disk(tmp_path)) == ([20], [5], [5, 20])
        assert (load(storage).row.global_step, load(other).row.global_step) == (20, 5)


def test_removed_directories_are_created_again(storage: Storage, training: Training, tmp_path: Path) -> None:
    """Removing the directory loses the existing checkpoints but no later ones."""
    write(storage, training, 10)
    shutil.rmtree(tmp_path / "checkpoints")
    write(storage, training, 20)
    assert load(storage).row.global_step == 20


def test_a_damaged_checkpoint_is_skipped_when_the_journal_cannot_be_written(
    storage: Storage, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk the next older checkpoint is loaded."""
    for step in (10, 20):
        write(storage, training, step)
    newest = max((tmp_path / "checkpoints").iterdir())
    (newest / "manifest.json").write_text("{")

    def full(_row: Row) -> None:
        raise JournalUnavailableError("database or disk is full")

    monkeypatch.setattr(storage.journal, "put", full)
    assert load(storage).row.global_step == 10


class SmallDisk(Filesystem):
    """Holds at most `room` checkpoints; writing a further one fails."""

    def __init__(self, directory: Path, room: int) -> None:
        self.directory = directory
        self.room = room

    def write(self, descriptor: int, content: memoryview) -> int:
        if len(list((self.directory / "checkpoints").iterdir())) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(descriptor, content)


def test_a_full_disk_loses_superseded_checkpoints_first(tmp_path: Path, training: Training) -> None:
    """They make room for the new one; without any, the write fails and the others stay."""
    retention = Retention(last=10, best="highest", superseded=10, superseded_s=3600.0)
    storage = open_storage(tmp_path, run_id="run", retention=retention, files=SmallDisk(tmp_path, room=3))
    with storage.journal:
        for step in (10, 20, 30):
            write(storage, training, step)
        back = Lineage().back_to(10, 2)
        storage.checkpoints.follow(back, "back to 10")
        write(storage, training, 15, lineage=back)
        assert (steps(storage), on_disk(tmp_path)) == ([10, 15], [10, 15])
        assert len(storage.checkpoints.kept_points()) == 2
        write(storage, training, 20, lineage=back)
        with pytest.raises(CheckpointWriteError, match="ENOSPC"):
            write(storage, training, 25, lineage=back)
        assert (steps(storage), on_disk(tmp_path)) == ([10, 15, 20], [10, 15, 20])


def test_a_rebuilt_journal_knows_the_branches(tmp_path: Path, training: Training) -> None:
    """The manifests have the lineage: a superseded checkpoint does not become one to resume from."""
    retention = Retention(last=10, best="highest", superseded=10, superseded_s=3600.0)
    storage = open_storage(tmp_path, run_id="run", retention=retention)
    with storage.journal:
        for step in (10, 20):
            write(storage, training, step)
        back = Lineage().back_to(10, 2)
        storage.checkpoints.follow(back, "back to 10")
        write(storage, training, 15, lineage=back)
    (tmp_path / "journal.sqlite3").write_bytes(b"garbage" * 1000)
    storage = open_storage(tmp_path, run_id="run", retention=retention)
    with storage.journal:
        assert steps(storage) == [10, 15]
        assert [row.global_step for row in storage.checkpoints.kept_points()] == [10, 20, 15]


def test_a_checkpoint_that_a_rollback_undid_on_its_way_is_not_adopted(tmp_path: Path, training: Training) -> None:
    """Killed between its directory and its row, after the rollback: it is not an ancestor of the live state.

    One from before the place that the rollback went to is.
    """
    retention = Retention(last=10, best="highest", superseded=10, superseded_s=3600.0)
    storage = open_storage(tmp_path, run_id="run", retention=retention)
    with storage.journal:
        rows = [write(storage, training, step) for step in (10, 20, 30)]
        back = RollbackRow("r", 9, "run", "fast", 31, 25, "restored", "odd", "d", "d", 1.0, 1, "health", 2)
        storage.journal.put(back)
        storage.journal.put(replace(back, rollback_id="failed", outcome="failed", restored_step=-1, attempt=0))
    forget_rows(tmp_path, rows[1:])
    storage = open_storage(tmp_path, run_id="run", retention=retention)
    with storage.journal:
        assert storage.repairs.adopted == (rows[1].checkpoint_id, rows[2].checkpoint_id)
        assert steps(storage) == [10, 20]
        assert [row.global_step for row in storage.checkpoints.kept_points()] == [10, 20, 30]
    forget_rows(tmp_path, rows)
    shutil.rmtree(tmp_path / "checkpoints" / rows[0].checkpoint_id)
    shutil.rmtree(tmp_path / "checkpoints" / rows[1].checkpoint_id)
    storage = open_storage(tmp_path, run_id="run", retention=retention)
    with storage.journal:
        assert steps(storage) == []


def forget_rows(directory: Path, rows: list[CheckpointRow]) -> None:
    """Removes rows from the journal, as if they had never been written."""
    with closing(sqlite3.connect(directory / "journal.sqlite3")) as journal, journal:
        journal.executemany("DELETE FROM checkpoints WHERE checkpoint_id = ?", [(row.checkpoint_id,) for row in rows])


# -- retention --------------------------------------------------------------------------------------------------------

HIGHEST = Retention(last=3, best="highest")
LOWEST = Retention(last=3, best="lowest")


def rows_of(*described: tuple[int, float | None]) -> tuple[CheckpointRow, ...]:
    """Rows with these steps and metrics."""
    return tuple(CheckpointRow(f"c{step}", step, "r", step, 1, 1, "d", metric) for step, metric in described)


@pytest.mark.parametrize(
    ("described", "retention", "kept"),
    [
        ([], HIGHEST, []),
        ([(1, None), (2, None), (3, None), (4, None)], HIGHEST, [2, 3, 4]),
        ([(1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3), (5, 0.4)], HIGHEST, [1, 3, 4, 5]),
        ([(1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3), (5, 0.4)], LOWEST, [2, 3, 4, 5]),
        ([(1, 0.9), (2, 0.9), (3, 0.2), (4, 0.3), (5, 0.4)], HIGHEST, [2, 3, 4, 5]),
        ([(1, 0.9), (2, 0.1)], Retention(last=1, best="highest"), [1, 2]),
    ],
)
def test_the_newest_and_the_best_are_kept(
    described: list[tuple[int, float | None]], retention: Retention, kept: list[int]
) -> None:
    """Of equally good checkpoints the newest is best; without a metric none is."""
    assert sorted(row.global_step for row in retention.kept(rows_of(*described), run_id="r")) == kept


def test_the_newest_proven_one_is_kept() -> None:
    """However many unproven ones are newer; older proven ones are not."""
    rows = [replace(row, proven=int(row.global_step <= 2)) for row in rows_of(*((n, None) for n in range(1, 7)))]
    assert sorted(row.global_step for row in HIGHEST.kept(rows, run_id="r")) == [2, 4, 5, 6]


@pytest.mark.parametrize(
    ("superseded_at", "now_ns", "kept"),
    [
        ([5, 5, 5], 6, [2, 3]),  # of one rollback the newest
        ([9, 5, 5], 10, [1, 3]),  # of the latest rollback first
        ([None, 5, 5], 6, [2, 3]),  # version 0.1.0 knew no time: that of the capture counts
        ([5, 5, 5], 5 + 60 * 10**9, []),
        ([5, 5, 70 * 10**9], 5 + 60 * 10**9, [3]),
    ],
)
def test_the_newest_superseded_ones_are_kept_for_a_while(
    superseded_at: list[int | None], now_ns: int, kept: list[int]
) -> None:
    """As many as the settings say, of the active run only."""
    retention = Retention(last=3, best="highest", superseded=2, superseded_s=60.0)
    rows = [
        replace(row, superseded_at_ns=at_ns)
        for row, at_ns in zip(rows_of((1, None), (2, None), (3, None)), superseded_at, strict=True)
    ]
    found = retention.kept_superseded([*rows, replace(rows[0], run_id="other")], run_id="r", now_ns=now_ns)
    assert sorted(row.global_step for row in found) == kept


def rows_of_runs(described: str) -> tuple[CheckpointRow, ...]:
    """One row for each letter, which is its run: oldest first, each with a lower metric than the one before."""
    return tuple(CheckpointRow(f"{run}{n}", n, run, n, 1, 1, "d", -float(n)) for n, run in enumerate(described))


@pytest.mark.parametrize(
    ("described", "kept"),
    [
        ("", ""),
        ("aaaa", "a0 a2 a3"),
        ("bbbaaa", "a3 a4 a5 b0 b2"),
        ("bcdeaaa", "a4 a5 a6 d2 e3"),
        ("bbcdea", "a5 d3 e4"),
        ("bcab", "a2 b0 b3 c1"),
        ("bbcc", "b0 b1 c2 c3"),
    ],
)
def test_other_runs_keep_their_newest_and_best(described: str, kept: str) -> None:
    """Only the newest other runs count, however many checkpoints the active run `a` has."""
    retention = Retention(last=2, best="highest", other_runs=2)
    found = retention.kept(rows_of_runs(described), run_id="a")
    assert " ".join(sorted(row.checkpoint_id for row in found)) == kept
