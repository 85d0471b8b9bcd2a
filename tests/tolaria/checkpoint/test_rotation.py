from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tolaria.checkpoint.archive import open_backup, open_writer
from tolaria.checkpoint.rotation import OWNER, make_rotated_backup
from tolaria.errors import BackupError, StateRefusedError

T0 = 1_800_000_000.0  # 2027-01-15 08:00:00 UTC
FIRST, SECOND, THIRD, FOURTH = (f"tolaria-20270115T08000{second}Z" for second in range(4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the backups are."""
    (tmp_path / "backups").mkdir()
    return tmp_path / "backups"


def at(second: int) -> Callable[[], float]:
    """A clock that stands still."""
    return lambda: T0 + second


def names(folder: Path) -> list[str]:
    """What is there, beside the note of whose backups they are."""
    return sorted(path.name for path in folder.iterdir() if path.name != OWNER)


def test_the_newest_backups_stay_and_each_is_whole(old_state: Path, folder: Path) -> None:
    """The oldest is removed once a new one is whole; other files of the folder are left alone."""
    (folder / "monday").mkdir()
    (folder / "tolaria-notes").write_text("mine")
    made = [make_rotated_backup(old_state, folder, 3, clock=at(n)) for n in range(4)]
    assert [each.path.name for each in made] == [FIRST, SECOND, THIRD, FOURTH]
    assert [each.removed for each in made] == [(), (), (), (FIRST,)]
    assert names(folder) == ["monday", SECOND, THIRD, FOURTH, "tolaria-notes"]
    for name in (SECOND, THIRD, FOURTH):
        with open_backup(folder / name) as backup:
            backup.verify()


def test_two_of_one_second_have_two_names_and_all_stay_without_a_number(old_state: Path, folder: Path) -> None:
    """0 keeps all."""
    for _ in range(3):
        make_rotated_backup(old_state, folder, 0, clock=lambda: T0)
    assert names(folder) == [FIRST, f"{FIRST}-2", f"{FIRST}-3"]


def test_a_clock_that_is_set_back_does_not_cost_the_new_backup(old_state: Path, folder: Path) -> None:
    """The one that has just been made stays, whatever its name is."""
    make_rotated_backup(old_state, folder, 1, clock=lambda: T0 + 3)
    assert make_rotated_backup(old_state, folder, 1, clock=lambda: T0).removed == (FOURTH,)
    assert names(folder) == [FIRST]


def test_a_backup_that_cannot_be_made_removes_nothing(old_state: Path, folder: Path) -> None:
    """The earlier ones may be all that is left."""
    make_rotated_backup(old_state, folder, 1, clock=lambda: T0)
    for tensors in old_state.glob("checkpoints/*/tensors.safetensors"):
        tensors.write_bytes(b"damaged")
    with pytest.raises(BackupError):
        make_rotated_backup(old_state, folder, 1, clock=lambda: T0 + 1)
    assert names(folder) == [FIRST]
    with pytest.raises(StateRefusedError, match="no directory"):
        make_rotated_backup(old_state, folder / "none", 1)


def test_unusable_backups_are_named_and_do_not_count(old_state: Path, folder: Path) -> None:
    """One whose manifest is gone does not take the place of one that can be restored."""
    for n in range(3):
        make_rotated_backup(old_state, folder, 0, clock=at(n))
    (folder / THIRD / "backup.json").unlink()
    done = make_rotated_backup(old_state, folder, 2, clock=lambda: T0 + 3)
    assert (done.removed, done.damaged) == ((FIRST,), (THIRD,))
    assert names(folder) == [SECOND, THIRD, FOURTH]


def test_what_a_killed_process_has_left_is_removed_but_not_what_another_one_writes(
    old_state: Path, folder: Path
) -> None:
    """A half one has no lock any more; of another name it is left alone."""
    (folder / f"{FIRST}.partial").mkdir()
    (folder / f"{FIRST}.partial" / "journal.sqlite3").write_bytes(b"half")
    (folder / "monday.partial").mkdir()
    with open_writer(folder / SECOND):
        make_rotated_backup(old_state, folder, 1, clock=lambda: T0 + 2)
        assert names(folder) == ["monday.partial", f"{SECOND}.partial", THIRD]


def test_a_backup_that_is_removed_loses_its_name_first(
    old_state: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that none with missing files looks whole after a kill within the removal; the next run removes the rest."""
    make_rotated_backup(old_state, folder, 1, clock=lambda: T0)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path: (path / "backup.json").unlink())
        make_rotated_backup(old_state, folder, 1, clock=lambda: T0 + 1)
    assert names(folder) == [f"{FIRST}.partial", SECOND]
    make_rotated_backup(old_state, folder, 1, clock=lambda: T0 + 2)
    assert names(folder) == [THIRD]


def test_the_backups_of_another_state_are_left_alone(old_state: Path, folder: Path) -> None:
    """Two services with one folder would remove each other's last backups."""
    make_rotated_backup(old_state, folder, 1, clock=at(0))
    assert (folder / OWNER).read_text().strip()
    (folder / OWNER).write_text("another\n")
    with pytest.raises(StateRefusedError, match="another state directory, whose first run is another"):
        make_rotated_backup(old_state, folder, 1, clock=at(1))
    assert names(folder) == [FIRST]


def test_a_backup_that_cannot_be_removed_is_named(
    old_state: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason: nightly backups would fill the disk unnoticed."""
    make_rotated_backup(old_state, folder, 1, clock=at(0))

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("shutil.rmtree", refused)
    done = make_rotated_backup(old_state, folder, 1, clock=at(1))
    assert (done.removed, done.unremoved) == ((), (f"{FIRST} cannot be removed: Permission denied",))
