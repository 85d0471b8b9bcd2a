from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tolaria.errors import JournalUnavailableError, NoCheckpointError, RestoreAbandonedError
from tolaria.rollback import (
    CheckpointRow,
    FaultRow,
    Filesystem,
    LoadedCheckpoint,
    Position,
    Retention,
    Storage,
    never,
    open_storage,
)
from tolaria.rollback.checkpoint import manifest_of, write_checkpoint
from tolaria.rollback.journal_rows import Row

if TYPE_CHECKING:
    from faults.small_training import Training


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    """A fresh state directory."""
    storage = open_storage(tmp_path, run_id="run", retention=Retention(last=3))
    with storage.journal:
        yield storage


def write(storage: Storage, training: Training, step: int, metric: float | None = None) -> CheckpointRow:
    """Write a checkpoint that says it is of that step."""
    training.position = Position(step, 1)
    return storage.checkpoints.write(training.state().copy(), metric=metric)


def steps(storage: Storage) -> list[int]:
    """Steps of the committed checkpoints."""
    return [row.global_step for row in storage.checkpoints.restore_points()]


def on_disk(directory: Path) -> list[int]:
    """Steps of the directories there are."""
    return sorted(int(path.name.split("-")[0]) for path in (directory / "checkpoints").iterdir())


def load(storage: Storage, at_or_before: int | None = None) -> LoadedCheckpoint:
    """Load without a deadline."""
    return storage.checkpoints.load_newest(never, at_or_before=at_or_before)


def test_pruned_checkpoints_leave_the_disk(tmp_path: Path, storage: Storage, training: Training) -> None:
    """Directory and journal agree on what is kept."""
    for step, metric in [(1, 0.5), (2, 0.9), (3, 0.1), (4, float("nan")), (5, 0.2), (6, None)]:
        write(storage, training, step, metric)
    assert steps(storage) == on_disk(tmp_path) == [2, 4, 5, 6]


def test_the_newest_or_the_nearest_is_loaded(storage: Storage, training: Training) -> None:
    """By time when resuming, by step when a step is asked for."""
    for step in (10, 20, 30):
        write(storage, training, step)
    assert [load(storage, wanted).row.global_step for wanted in (None, 30, 25, 10)] == [30, 30, 20, 10]
    with pytest.raises(NoCheckpointError, match="at or before step 9"):
        load(storage, 9)


def test_an_overtaken_future_is_not_resumed_from(storage: Storage, training: Training) -> None:
    """After a rollback later checkpoints are neither resumed from nor offered; the next write removes them."""
    for step in (10, 20, 30):
        write(storage, training, step)
    assert storage.checkpoints.supersede_after(10) == 2
    assert (steps(storage), load(storage).row.global_step) == ([10], 10)
    write(storage, training, 20)
    assert (steps(storage), load(storage).row.global_step) == ([10, 20], 20)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "longer", "gone"])
def test_a_damaged_checkpoint_is_quarantined_and_the_next_older_loaded(
    tmp_path: Path, storage: Storage, training: Training, name: str, harm: str
) -> None:
    """Whatever happened to a file: the damage is told, set aside, recorded, and an older one serves."""
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
    assert storage.checkpoints.verify(row, never) is not None
    loaded = load(storage)
    assert loaded.row.global_step == 1
    assert [(d.stage, d.quarantined) for d in loaded.damaged] == [(Path(name).stem, True)]
    assert (on_disk(tmp_path), steps(storage)) == ([1], [1])
    assert len(list((tmp_path / "quarantine").iterdir())) == 1
    assert [f.kind for f in storage.journal.rows(FaultRow)] == ["checkpoint_damaged"]


def test_a_swapped_checkpoint_is_damage(tmp_path: Path, storage: Storage, training: Training) -> None:
    """A whole checkpoint under another one's name is not taken for it."""
    first, second = write(storage, training, 1), write(storage, training, 2)
    places = tmp_path / "checkpoints"
    shutil.rmtree(places / second.checkpoint_id)
    shutil.copytree(places / first.checkpoint_id, places / second.checkpoint_id)
    assert load(storage).row.global_step == 1


def test_a_checkpoint_other_than_the_one_committed_is_damage(
    tmp_path: Path, storage: Storage, training: Training
) -> None:
    """A whole checkpoint of another state under the committed one's id has not the digest that the journal knows."""
    write(storage, training, 1)
    row = write(storage, training, 2)
    places = tmp_path / "checkpoints"
    shutil.rmtree(places / row.checkpoint_id)
    training.train(1)
    other = training.state().copy()
    manifest = manifest_of(other, checkpoint_id=row.checkpoint_id, run_id="x", created_at_ns=1, metric=None)
    write_checkpoint(Filesystem(), places, manifest, other)
    assert load(storage).row.global_step == 1


def test_a_load_past_its_deadline_is_given_up(storage: Storage, training: Training) -> None:
    """Nothing is quarantined for being slow."""
    write(storage, training, 1)
    with pytest.raises(RestoreAbandonedError):
        storage.checkpoints.load_newest(lambda: True)
    assert load(storage).row.global_step == 1


def test_a_start_adopts_removes_and_misses(tmp_path: Path, training: Training) -> None:
    """Whole directories without a row are adopted, leftovers removed, rows without a directory marked missing."""
    storage = open_storage(tmp_path, run_id="a", retention=Retention())
    with storage.journal:
        kept, lost = write(storage, training, 1), write(storage, training, 2)
    for path in tmp_path.glob("journal*"):
        path.unlink()
    storage = open_storage(tmp_path, run_id="a", retention=Retention())
    with storage.journal:
        assert storage.recovery.adopted == (kept.checkpoint_id, lost.checkpoint_id)
        assert storage.checkpoints.restore_points() == (kept, lost)
    shutil.rmtree(tmp_path / "checkpoints" / lost.checkpoint_id)
    (tmp_path / "checkpoints" / ".partial-x").mkdir()
    storage = open_storage(tmp_path, run_id="a", retention=Retention())
    with storage.journal:
        assert storage.recovery.missing == (lost.checkpoint_id,)
        assert storage.recovery.removed == (".partial-x",)
        assert steps(storage) == on_disk(tmp_path) == [1]


def test_a_damaged_journal_is_rebuilt_from_the_manifests(tmp_path: Path, training: Training) -> None:
    """The old one is kept in the quarantine, the checkpoints are all there, and an incident tells of it."""
    storage = open_storage(tmp_path, run_id="a", retention=Retention())
    with storage.journal:
        expected = [write(storage, training, step, step / 10) for step in (1, 2)]
    (tmp_path / "journal.sqlite3").write_bytes(b"garbage" * 1000)
    storage = open_storage(tmp_path, run_id="a", retention=Retention())
    with storage.journal:
        assert storage.journal_damage is not None
        assert list(storage.checkpoints.restore_points()) == expected
        assert [incident.kind for incident in storage.journal.incidents(5)] == ["journal_rebuilt"]
        assert len(list((tmp_path / "quarantine").glob("journal*"))) == 1


def test_the_newest_stays_newest_when_the_clock_goes_back(
    storage: Storage, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order follows commits, not the wall clock."""
    write(storage, training, 10)
    monkeypatch.setattr("time.time_ns", lambda: 5)
    write(storage, training, 5)
    assert load(storage).row.global_step == 5


def test_runs_that_share_a_directory_do_not_see_each_other(tmp_path: Path, training: Training) -> None:
    """A run lists, loads and supersedes its own checkpoints alone; after its first one the others' last ones stay."""
    storage = open_storage(tmp_path, run_id="a", retention=Retention())
    with storage.journal:
        for step in (10, 20):
            write(storage, training, step)
        other = storage.for_run("b")
        with pytest.raises(NoCheckpointError):
            load(other)
        assert other.checkpoints.supersede_after(0) == 0
        assert steps(storage) == [10, 20]
        write(other, training, 5)
        assert (steps(storage), steps(other), on_disk(tmp_path)) == ([20], [5], [5, 20])
        assert (load(storage).row.global_step, load(other, 100).row.global_step) == (20, 5)


def test_folders_that_were_removed_are_made_again(storage: Storage, training: Training, tmp_path: Path) -> None:
    """Whoever cleans up too much costs the checkpoints that there were, and none that come."""
    write(storage, training, 10)
    shutil.rmtree(tmp_path / "checkpoints")
    write(storage, training, 20)
    assert load(storage).row.global_step == 20


def test_a_damaged_checkpoint_is_passed_over_also_when_nothing_can_be_written(
    storage: Storage, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk the next older one is loaded all the same."""
    for step in (10, 20):
        write(storage, training, step)
    newest = max((tmp_path / "checkpoints").iterdir())
    (newest / "manifest.json").write_text("{")

    def full(_row: Row) -> None:
        raise JournalUnavailableError("database or disk is full")

    monkeypatch.setattr(storage.journal, "put", full)
    assert load(storage).row.global_step == 10
