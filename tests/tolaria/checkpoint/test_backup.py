from __future__ import annotations

import errno
import os
import shutil
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from faults.small_training import new_training
from tolaria.checkpoint import backup
from tolaria.checkpoint.archive import BACKUP, BackupManifest, open_backup, open_writer
from tolaria.checkpoint.backup import make_backup
from tolaria.checkpoint.inspection import Condition, inspect_storage
from tolaria.checkpoint.restoration import restore_backup
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.errors import BackupDamagedError, BackupError, StateRefusedError
from tolaria.images import canonical_json
from tolaria.journal.reader import copy_journal
from tolaria.values.training import Position

IDS = ("000000001801-96a23908", "000000001845-dfe49046", "000000001890-90c43982")


def contents(directory: Path) -> dict[str, bytes]:
    """The content of every file, by its path."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["copy", "copy.tar"])
def test_a_backup_is_whole_and_private_and_changes_nothing(name: str, old_state: Path, tmp_path: Path) -> None:
    """It has the journal, all checkpoints that can be restored, settings and peers' files; nothing else."""
    (old_state / "settings.json").write_text("{}")
    (old_state / "peers").mkdir()
    (old_state / "peers" / "tamiyo-1.json").write_text("[]")
    (old_state / "runs").mkdir()
    (old_state / "runs" / "earlier.json").write_text("{}")
    (old_state / "traces").mkdir()
    (old_state / "traces" / "large.json").write_text("not part of the state")
    before = contents(old_state)
    made = make_backup(old_state, tmp_path / name)
    assert contents(old_state) == before
    assert (made.checkpoints, made.left_out, made.schema) == (IDS, (), 1)
    with open_backup(tmp_path / name) as backup:
        backup.verify()
        assert backup.manifest == made
    paths = {file.path for file in made.files}
    assert paths == {
        "journal.sqlite3", "settings.json", "runs/earlier.json", "peers/tamiyo-1.json",
        *(f"checkpoints/{i}/{f}" for i in IDS for f in ("tensors.safetensors", "state.json", "manifest.json")),
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "state"])
    assert (tmp_path / name).stat().st_mode & 0o077 == 0
    if name == "copy":
        assert set(contents(tmp_path / name)) == paths | {BACKUP}
        assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / name).rglob("*"))
        assert all(finding.condition is Condition.WHOLE for finding in inspect_storage(tmp_path / name))


def test_what_retention_removes_meanwhile_stays_in_the_backup(old_state: Path, tmp_path: Path) -> None:
    """Its files are open when the first one is copied."""

    def remove(checkpoint_id: str) -> None:
        shutil.rmtree(old_state / "checkpoints" / checkpoint_id)

    made = make_backup(old_state, tmp_path / "copy", on_checkpoint=remove)
    assert made.checkpoints == IDS
    assert all(finding.condition is Condition.WHOLE for finding in inspect_storage(tmp_path / "copy"))


def test_what_is_removed_while_the_journal_is_copied_stays_in_the_backup(
    old_state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are open before the journal is copied: a copy takes longer than some checkpoints last."""

    def copy_slowly(*args: Any, **keywords: Any) -> None:
        copy_journal(*args, **keywords)
        shutil.rmtree(old_state / "checkpoints" / IDS[0])

    monkeypatch.setattr(backup, "copy_journal", copy_slowly)
    assert make_backup(old_state, tmp_path / "copy").checkpoints == IDS


def test_more_checkpoints_than_descriptors_are_backed_up(
    old_state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening them early, which is for those that are removed meanwhile, leaves the copy what it needs."""
    opened = list[str]()

    def open_few(pins: Any, directory: Path, path: str) -> None:
        opened.append(path)
        if len(opened) == 5:
            raise OSError(errno.EMFILE, "Too many open files")
        open_one(pins, directory, path)

    open_one = backup._Pins.open  # noqa: SLF001 - there is no other way to run out of descriptors there and only there
    monkeypatch.setattr(backup._Pins, "open", open_few)  # noqa: SLF001
    assert make_backup(old_state, tmp_path / "copy").checkpoints == IDS
    assert opened[:5] == opened[5:10]


def test_backups_of_a_directory_in_use_are_whole(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """While another thread writes checkpoints, and retention removes all but the newest, each backup is whole."""
    count = 100 if request.config.getoption("--long") else 8
    stop = threading.Event()
    training = new_training()
    training.train(1)
    storage = open_storage(tmp_path / "state", run_id="r", retention=Retention(last=1, best="highest"))

    def write() -> None:
        step = 0
        while not stop.wait(0.02):
            step += 1
            training.position = Position(step, 1)
            storage.checkpoints.write(training.state().copy())

    writer = threading.Thread(target=write)
    newest = []
    with storage.journal:
        writer.start()
        try:
            for number in range(count):
                made = make_backup(tmp_path / "state", tmp_path / f"b{number}")
                assert made.left_out == ()
                findings = list(inspect_storage(tmp_path / f"b{number}"))
                assert {finding.condition for finding in findings} == {Condition.WHOLE}, findings
                newest.append(made.checkpoints[-1:])
        finally:
            stop.set()
            writer.join()
    assert newest == sorted(newest)
    assert len(set(newest)) > 2  # it was written meanwhile


def test_a_copy_that_begins_again_leaves_nothing_open(
    old_state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a service starts while the journal is copied: the checkpoints are opened once more."""

    def twice(path: Path, target: Path, *, on_state: Any) -> None:
        for _ in range(2):
            copy_journal(path, target, on_state=on_state)

    monkeypatch.setattr(backup, "copy_journal", twice)
    assert make_backup(old_state, tmp_path / "copy").checkpoints == IDS
    opened = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert [path for path in opened if path.is_relative_to(old_state)] == []


def test_checkpoints_that_are_removed_soon_after_they_are_written_can_be_backed_up(
    old_state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine each copy of the journal may name another one that has gone already; one that stays is enough.

    The clock shows more than the time for which one and the same may be missing.
    """
    found, times = backup._pins, iter(range(0, 1000, 2))  # noqa: SLF001 - what the journal says, and when
    gone = ["a", "b", "c", "d"]

    def pins(*arguments: Any) -> Any:
        made = found(*arguments)
        if gone:
            made.missing[gone.pop()] = "No such file or directory"
        return made

    monkeypatch.setattr(backup, "_pins", pins)
    clock = SimpleNamespace(monotonic=lambda: float(next(times)), sleep=lambda _: None, time_ns=time.time_ns)
    monkeypatch.setattr(backup, "time", clock)
    assert make_backup(old_state, tmp_path / "copy").checkpoints == IDS
    assert gone == []


@pytest.mark.parametrize("name", ["copy", "copy.tar"])
def test_a_damaged_checkpoint_is_found(name: str, old_state: Path, tmp_path: Path) -> None:
    """The backup fails and leaves nothing; without the damaged ones it succeeds, and a restored service goes on."""
    path = old_state / "checkpoints" / IDS[1] / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    shutil.rmtree(old_state / "checkpoints" / IDS[2])
    with pytest.raises(BackupError, match=rf"2 of 3 checkpoints.*{IDS[2]}.*{IDS[1]}: tensors, digest") as caught:
        make_backup(old_state, tmp_path / name)
    assert "--without-damaged" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    made = make_backup(old_state, tmp_path / name, without_damaged=True)
    assert (made.checkpoints, set(made.left_out)) == (IDS[:1], set(IDS[1:]))
    (tmp_path / "new").mkdir()
    restore_backup(tmp_path / name, tmp_path / "new", replace=False)
    storage = open_storage(tmp_path / "new", run_id="2e10f889c48b", retention=Retention(last=3, best="highest"))
    with storage.journal:
        assert set(storage.repairs.missing) == set(IDS[1:])
        assert storage.checkpoints.load_newest().row.checkpoint_id == IDS[0]


@pytest.mark.parametrize("name", ["there", "there.tar", "file", "x.tgz", "no/where", "link", "link.tar"])
def test_a_name_that_does_not_do_is_refused_at_once(name: str, old_state: Path, tmp_path: Path) -> None:
    """What exists is never overwritten; the message names the option."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "something").touch()
    for file in ("there.tar", "file"):
        (tmp_path / file).write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link.tar").symlink_to(tmp_path / "elsewhere.tar")
    before = contents(tmp_path)
    with pytest.raises(StateRefusedError, match="--to: "):
        make_backup(old_state, tmp_path / name)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["copy", "copy.tar"])
def test_what_a_killed_backup_has_left_is_replaced_and_one_in_progress_is_not(
    name: str, old_state: Path, tmp_path: Path
) -> None:
    """A name serves one process at a time; leftovers under the temporary name are no obstacle, and no backup."""
    with open_writer(tmp_path / name) as writer:
        journal = os.open(old_state / "journal.sqlite3", os.O_RDONLY)
        writer.add("journal.sqlite3", journal)
        os.close(journal)
        with pytest.raises(StateRefusedError, match="another process is writing"):
            make_backup(old_state, tmp_path / name)
        partial = tmp_path / f"{name}.partial"
        assert partial.exists()
        if partial.is_dir():
            shutil.copytree(partial, tmp_path / "left")
        else:
            shutil.copy(partial, tmp_path / "left")
    assert not partial.exists()
    (tmp_path / "left").rename(partial)
    with pytest.raises(BackupDamagedError, match="never finished, or has been cut"), open_backup(partial):
        pass
    make_backup(old_state, tmp_path / name)
    assert not partial.exists()


def test_every_cut_of_a_file_is_found(old_state: Path, tmp_path: Path) -> None:
    """A backup in one file that was not copied to its end is none."""
    make_backup(old_state, tmp_path / "copy.tar")
    content = (tmp_path / "copy.tar").read_bytes()
    last_member = content.rindex(b'"manifest_digest"')
    for length in [*range(0, last_member, 20_011), last_member]:
        (tmp_path / "cut.tar").write_bytes(content[:length])
        with pytest.raises(BackupDamagedError), open_backup(tmp_path / "cut.tar") as backup:
            backup.verify()


@pytest.mark.parametrize("name", ["copy", "copy.tar"])
def test_every_flipped_bit_is_found(name: str, old_state: Path, tmp_path: Path) -> None:
    """In each file of a backup, the manifest included; nothing of it gets into the state directory."""
    make_backup(old_state, tmp_path / name)
    place = tmp_path / name
    (tmp_path / "new").mkdir()
    for path in sorted(place.rglob("*")) if place.is_dir() else [place] * 12:
        if not path.is_file():
            continue
        content = path.read_bytes()
        changed = bytearray(content)
        changed[len(content) * 2 // 3 if place.is_dir() else content.index(b'"format"')] ^= 4
        path.write_bytes(changed)
        with pytest.raises(BackupDamagedError):
            restore_backup(place, tmp_path / "new", replace=False)
        path.write_bytes(content)
    assert list((tmp_path / "new").iterdir()) == []
    restore_backup(place, tmp_path / "new", replace=False)


@pytest.mark.parametrize("path", ["../outside", "/absolute", "peers/../../x", "", "backup.json", "a//b"])
def test_a_manifest_that_names_other_places_is_refused(path: str, old_state: Path, tmp_path: Path) -> None:
    """Also with a digest that is right: a backup may come from anywhere."""
    made = make_backup(old_state, tmp_path / "copy")
    spoilt = made.to_bytes().replace(b'"settings.json"', canonical_json(path))
    if b'"settings.json"' not in made.to_bytes():
        spoilt = made.to_bytes().replace(b'"journal.sqlite3"', canonical_json(path))
    (tmp_path / "copy" / BACKUP).write_bytes(spoilt)
    with pytest.raises(BackupDamagedError, match="digest"), open_backup(tmp_path / "copy"):
        pass
    with pytest.raises(ValueError, match="outside of a state directory"):
        BackupManifest.from_bytes(signed(spoilt))


def signed(content: bytes) -> bytes:
    """A manifest's bytes with the digest that belongs to them."""
    import json

    import xxhash

    document = json.loads(content)
    del document["manifest_digest"]
    digest = xxhash.xxh3_128_hexdigest(canonical_json(document))
    return canonical_json({**document, "manifest_digest": digest})


def test_a_backup_in_a_newer_format_is_refused(old_state: Path, tmp_path: Path) -> None:
    """Its version is named."""
    made = make_backup(old_state, tmp_path / "copy")
    newer = made.to_bytes().replace(b'"format":1', b'"format":2').replace(made.tolaria.encode(), b"7.8.9")
    (tmp_path / "copy" / BACKUP).write_bytes(signed(newer))
    with (
        pytest.raises(StateRefusedError, match=r"format 2, written by Tolaria 7\.8\.9"),
        open_backup(tmp_path / "copy"),
    ):
        pass


def test_a_link_in_a_tar_file_is_no_file(old_state: Path, tmp_path: Path) -> None:
    """Members that tarfile would follow elsewhere are refused."""
    made = make_backup(old_state, tmp_path / "copy.tar")
    with tarfile.open(tmp_path / "copy.tar") as source, tarfile.open(tmp_path / "evil.tar", "w") as target:
        for member in source.getmembers():
            if member.name == "journal.sqlite3":
                link = tarfile.TarInfo(member.name)
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
                target.addfile(link)
            else:
                target.addfile(member, source.extractfile(member))
    assert made.files[0].path == "journal.sqlite3"
    with pytest.raises(BackupDamagedError), open_backup(tmp_path / "evil.tar") as backup:
        backup.verify()
