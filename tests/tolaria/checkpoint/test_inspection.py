from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tolaria.checkpoint import inspection as inspection_module
from tolaria.checkpoint.format import Manifest, read_checkpoint, write_checkpoint
from tolaria.checkpoint.inspection import Condition, Finding, inspect_storage
from tolaria.checkpoint.storage import Storage, open_storage
from tolaria.checkpoint.store import Retention
from tolaria.errors import JournalUnavailableError
from tolaria.filesystem import Filesystem
from tolaria.journal.rows import CheckpointRow
from tolaria.values.training import Position

if TYPE_CHECKING:
    from faults.small_training import Training


@pytest.fixture
def storage(tmp_path: Path, training: Training) -> Iterator[Storage]:
    """An open state directory with three checkpoints."""
    storage = open_storage(tmp_path, run_id="run", retention=Retention(last=3, best="highest"))
    with storage.journal:
        for step in (10, 20, 30):
            write(storage, training, step)
        yield storage


@pytest.fixture
def inspect_unchanged(tmp_path: Path) -> Callable[[], list[Finding]]:
    """Inspects the directory and asserts that no byte, name or time in it has changed."""

    def inspect() -> list[Finding]:
        before = _everything(tmp_path)
        found = list(inspect_storage(tmp_path))
        assert _everything(tmp_path) == before
        return found

    return inspect


def write(storage: Storage, training: Training, step: int) -> CheckpointRow:
    """Writes a checkpoint of this step."""
    training.position = Position(step, 1)
    return storage.checkpoints.write(training.state().copy())


def conditions(found: list[Finding]) -> list[Condition]:
    """The conditions of the findings."""
    return [finding.condition for finding in found]


def _everything(directory: Path) -> dict[str, tuple[int, bytes]]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def _place(directory: Path, storage: Storage, index: int) -> Path:
    return directory / "checkpoints" / storage.checkpoints.restore_points()[index].checkpoint_id


@pytest.mark.parametrize("in_use", [True, False])
def test_an_intact_directory_is_whole(
    inspect_unchanged: Callable[[], list[Finding]], storage: Storage, training: Training, in_use: bool
) -> None:
    """Findings are the journal and each committed checkpoint, oldest first, without pruned ones."""
    write(storage, training, 40)
    rows = storage.checkpoints.restore_points()
    if not in_use:
        storage.journal.close()
    found = inspect_unchanged()
    assert [finding.name for finding in found] == ["journal", *(row.checkpoint_id for row in rows)]
    assert conditions(found) == [Condition.WHOLE] * 4
    assert found[1].detail == f"step 20, epoch 1, {rows[0].size_bytes} bytes, digest {rows[0].digest}"
    assert not any(finding.bad for finding in found)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_flipped_bit_is_damage(
    tmp_path: Path, inspect_unchanged: Callable[[], list[Finding]], storage: Storage, name: str
) -> None:
    """In any of the files; only that checkpoint is affected, and it is not moved."""
    path = _place(tmp_path, storage, 1) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    found = inspect_unchanged()
    assert conditions(found) == [Condition.WHOLE, Condition.WHOLE, Condition.DAMAGED, Condition.WHOLE]
    assert found[2].bad


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("kept_bytes", [0, 100, -1, None])
def test_a_truncated_or_missing_file_is_damage(
    tmp_path: Path, inspect_unchanged: Callable[[], list[Finding]], storage: Storage, name: str, kept_bytes: int | None
) -> None:
    """Empty, cut short, cut by one byte, or missing."""
    path = _place(tmp_path, storage, 0) / name
    if kept_bytes is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:kept_bytes])
    assert conditions(inspect_unchanged())[1] is Condition.DAMAGED


def test_a_missing_directory_is_damage(
    tmp_path: Path, inspect_unchanged: Callable[[], list[Finding]], storage: Storage
) -> None:
    """A committed checkpoint must exist."""
    shutil.rmtree(_place(tmp_path, storage, 2))
    found = inspect_unchanged()
    assert (found[3].condition, found[3].detail) == (Condition.DAMAGED, "manifest: missing")


def test_a_foreign_file_in_place_of_a_checkpoint_is_damage(
    tmp_path: Path, inspect_unchanged: Callable[[], list[Finding]], storage: Storage
) -> None:
    """A file in place of the directory is damage."""
    place = _place(tmp_path, storage, 0)
    shutil.rmtree(place)
    place.write_text("hello")
    assert conditions(inspect_unchanged())[1] is Condition.DAMAGED


def test_a_checkpoint_with_another_digest_is_damage(
    tmp_path: Path, inspect_unchanged: Callable[[], list[Finding]], storage: Storage, training: Training
) -> None:
    """The checkpoint is intact, but the journal has another digest under its id."""
    row = storage.checkpoints.restore_points()[1]
    training.train(1)
    training.position = Position(row.global_step, row.epoch)
    image = training.state().copy()
    manifest = Manifest.of(image, checkpoint_id=row.checkpoint_id, run_id="run", created_at_ns=row.at_ns, metric=None)
    shutil.rmtree(tmp_path / "checkpoints" / row.checkpoint_id)
    write_checkpoint(Filesystem(), tmp_path / "checkpoints", manifest, image)
    found = inspect_unchanged()
    assert (found[2].condition, found[2].detail) == (
        Condition.DAMAGED,
        "manifest: another digest than the journal's",
    )


def test_unlisted_entries_are_reported_and_not_damage(
    tmp_path: Path, inspect_unchanged: Callable[[], list[Finding]], storage: Storage
) -> None:
    """A foreign file, and the directory of an unfinished write."""
    (tmp_path / "checkpoints" / "notes\x1b.txt").write_text("hello")
    (tmp_path / "checkpoints" / ".partial-000000000040-0badcafe").mkdir()
    found = inspect_unchanged()[4:]
    assert [(f.name, f.condition, f.bad) for f in found] == [
        (".partial-000000000040-0badcafe", Condition.UNKNOWN, False),
        ("notes\x1b.txt", Condition.UNKNOWN, False),
    ]
    assert storage.journal.rows(CheckpointRow)


def test_a_checkpoint_pruned_meanwhile_is_not_damage(
    tmp_path: Path, storage: Storage, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service continues: a checkpoint pruned before it is read is reported as gone."""

    def late(files: Filesystem, place: Path) -> object:
        if place.name == oldest:
            write(storage, training, 40)
        return read_checkpoint(files, place)

    oldest = storage.checkpoints.restore_points()[0].checkpoint_id
    monkeypatch.setattr(inspection_module, "read_checkpoint", late)
    found = list(inspect_storage(tmp_path))
    assert (found[1].condition, found[1].detail, found[1].bad) == (Condition.GONE, "it was pruned meanwhile", False)
    assert conditions(found[2:]) == [Condition.WHOLE, Condition.WHOLE]


def test_with_a_damaged_journal_every_directory_is_read(
    tmp_path: Path, inspect_unchanged: Callable[[], list[Finding]], storage: Storage
) -> None:
    """Which checkpoints were committed is unknown, but each directory can be verified."""
    damaged = _place(tmp_path, storage, 1)
    storage.journal.close()
    (damaged / "state.json").unlink()
    (tmp_path / "journal.sqlite3").write_bytes(b"no journal" * 100)
    found = inspect_unchanged()
    assert conditions(found) == [Condition.DAMAGED, Condition.WHOLE, Condition.DAMAGED, Condition.WHOLE]
    assert found[0].name == "journal"


def test_a_directory_without_a_journal_is_refused(tmp_path: Path) -> None:
    """Inspection creates nothing."""
    with pytest.raises(JournalUnavailableError):
        list(inspect_storage(tmp_path))
    assert list(tmp_path.iterdir()) == []
