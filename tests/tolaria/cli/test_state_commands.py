from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tolaria import __version__
from tolaria.checkpoint.directory import locked_directory
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.checkpoint.upgrade import upgrade_state
from tolaria.cli.commands import app
from tolaria.journal.rows import SCHEMA_VERSION, values_digest

FIXTURE = Path(__file__).parents[2] / "fixtures" / "state-0.1.0.tar.gz"


def run(*arguments: str | Path) -> Result:
    """Runs a command."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer_of(result: Result) -> dict[str, Any]:
    """The JSON object that a command has printed; it has succeeded."""
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory of version 0.1.0."""
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "state"


@contextmanager
def newer(state: Path) -> Iterator[None]:
    """Makes the directory one of a later version meanwhile."""
    upgrade_state(state)
    kept = (state / "journal.sqlite3").read_bytes()
    with closing(sqlite3.connect(state / "journal.sqlite3")) as connection:
        connection.execute("UPDATE meta SET schema_version = 99, row_digest = ?", (values_digest("meta", (99,)),))
        connection.execute("UPDATE versions SET tolaria = '7.8.9'")
        connection.commit()
    yield
    (state / "journal.sqlite3").write_bytes(kept)


def test_show_and_downgrade(state: Path, tmp_path: Path) -> None:
    """What the next start would do; what has been done, and by which version; the way back."""
    shown = run("state", "show", "--state-dir", state)
    assert f"schema 1; this is Tolaria {__version__} with schema {SCHEMA_VERSION}" in shown.stdout
    assert f"the next start upgrades it to schema {SCHEMA_VERSION}" in shown.stdout
    assert "1 runs, 3 checkpoints" in shown.stdout
    assert not (state / "backups").exists()
    upgrade_state(state)
    shown = run("state", "show", "--state-dir", state)
    assert f"upgraded by Tolaria {__version__} from schema 1 to {SCHEMA_VERSION}" in shown.stdout
    assert "backups/before-upgrade-" in shown.stdout
    answer = answer_of(run("state", "show", "--state-dir", state, "--json"))
    assert (answer["schema"], answer["supported"], answer["written_by"]) == (
        SCHEMA_VERSION,
        SCHEMA_VERSION,
        __version__,
    )
    assert answer["backups"][0]["schema"] == 1
    answer = answer_of(run("state", "downgrade", "--to", "2", "--state-dir", state, "--json"))
    assert (answer["schema_from"], answer["schema_to"], answer["lost"]["versions"]) == (SCHEMA_VERSION, 2, 1)
    assert (state / answer["backup"] / "backup.json").is_file()
    refused = run("state", "downgrade", "--to", "1", "--state-dir", state)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "versions with schema 1 cannot restore" in refused.stderr
    assert run("verify", "--state-dir", state).exit_code == 0


@pytest.mark.parametrize(
    "command", [["verify"], ["audit"], ["backup", "--to", "copy"], ["state", "downgrade", "--to", "1"]]
)
def test_a_newer_directory_is_refused(command: list[str], state: Path, tmp_path: Path) -> None:
    """With exit code 2, the version that wrote it and what to do; nothing is changed."""
    with newer(state):
        before = (state / "journal.sqlite3").read_bytes()
        refused = run(*command, "--state-dir", state)
        assert refused.exit_code == 2, refused.output
        assert f"has schema 99, written by Tolaria 7.8.9, and this is Tolaria {__version__}" in refused.stderr
        assert f"tolaria state downgrade --to {SCHEMA_VERSION} --state-dir {state}" in refused.stderr
        assert (state / "journal.sqlite3").read_bytes() == before
        shown = run("state", "show", "--state-dir", state)
        assert (shown.exit_code, "7.8.9" in shown.stdout) == (0, True)
    assert not (tmp_path / "copy").exists()


def test_backups_of_a_folder_are_rotated(state: Path, tmp_path: Path) -> None:
    """The answer names what was removed; one of --to and --into is given, and --keep is about the latter."""
    (tmp_path / "all").mkdir()
    made = [answer_of(run("backup", "--into", tmp_path / "all", "--keep", "1", "--state-dir", state, "--json"))]
    made += [answer_of(run("backup", "--into", tmp_path / "all", "--keep", "1", "--state-dir", state, "--json"))]
    assert [path.name for path in (tmp_path / "all").glob("tolaria-*")] == [Path(made[1]["path"]).name]
    assert (made[0]["removed"], made[1]["removed"]) == ([], [Path(made[0]["path"]).name])
    shown = run("backup", "--into", tmp_path / "all", "--keep", "1", "--state-dir", state)
    assert f"removed: {Path(made[1]['path']).name}" in shown.stdout
    for wrong in ([], ["--to", "x", "--into", "y"], ["--to", "x", "--keep", "1"], ["--into", "nowhere"]):
        assert run("backup", *wrong, "--state-dir", state).exit_code == 2


def test_backup_and_restore(state: Path, tmp_path: Path) -> None:
    """In both forms, as text and as JSON; the second restoration needs --replace."""
    made = run("backup", "--to", tmp_path / "copy", "--state-dir", state)
    assert made.exit_code == 0, made.output
    assert "journal of schema 1, 3 checkpoints, 10 files" in made.stdout
    answer = answer_of(run("backup", "--to", tmp_path / "copy.tar", "--state-dir", state, "--json"))
    assert (answer["tolaria"], answer["schema"], len(answer["checkpoints"]), answer["files"]) == (__version__, 1, 3, 10)
    again = run("backup", "--to", tmp_path / "copy.tar", "--state-dir", state)
    assert (again.exit_code, "exists" in again.stderr) == (2, True)
    restored = run("restore-backup", "--from", tmp_path / "copy.tar", "--state-dir", tmp_path / "a" / "new")
    assert restored.exit_code == 0, restored.output
    assert run("verify", "--state-dir", tmp_path / "a" / "new").exit_code == 0
    refused = run("restore-backup", "--from", tmp_path / "copy", "--state-dir", tmp_path / "a" / "new")
    assert (refused.exit_code, "--replace" in refused.stderr) == (2, True)
    answer = answer_of(
        run("restore-backup", "--from", tmp_path / "copy", "--state-dir", tmp_path / "a" / "new", "--replace", "--json")
    )
    assert Path(answer["replaced"]).is_dir()
    assert len(answer["checkpoints"]) == 3


def test_a_backup_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    """It is whole, and no run can be continued from it."""
    storage = open_storage(tmp_path / "new", run_id="r", retention=Retention(last=1, best="highest"))
    storage.journal.close()
    made = run("backup", "--to", tmp_path / "copy", "--state-dir", tmp_path / "new")
    assert (made.exit_code, "no run can be continued" in made.stderr) == (0, True)


def test_a_directory_in_use_is_not_restored_into_or_downgraded(state: Path, tmp_path: Path) -> None:
    """Exit code 2 with the process that uses it; a backup of it is made nevertheless."""
    upgrade_state(state)
    assert run("backup", "--to", tmp_path / "copy", "--state-dir", state).exit_code == 0
    with locked_directory(state):
        for command in (
            ["restore-backup", "--from", tmp_path / "copy", "--replace"],
            ["state", "downgrade", "--to", "2"],
        ):
            refused = run(*command, "--state-dir", state)
            assert refused.exit_code == 2, refused.output
            assert f"is in use by process {os.getpid()}" in refused.stderr
        assert run("backup", "--to", tmp_path / "copy.tar", "--state-dir", state).exit_code == 0


def test_wrong_arguments(state: Path, tmp_path: Path) -> None:
    """Exit code 2, and nothing is created."""
    (tmp_path / "empty").mkdir()
    for command in (
        ["backup", "--to", "x", "--state-dir", "nowhere"],
        ["backup", "--to", "x", "--state-dir", "empty"],
        ["backup", "--to", "nowhere/x", "--state-dir", state],
        ["restore-backup", "--from", "nowhere", "--state-dir", "new"],
        ["state", "show", "--state-dir", "empty"],
        ["state", "downgrade", "--to", "9", "--state-dir", state],
    ):
        refused = run(*command)
        assert (refused.exit_code, refused.stdout) == (2, ""), (command, refused.output)
        assert refused.stderr.startswith("tolaria: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "state"]


def test_a_damaged_backup_is_exit_code_1(state: Path, tmp_path: Path) -> None:
    """Nothing is left where it should have been restored to."""
    run("backup", "--to", tmp_path / "copy", "--state-dir", state)
    (path,) = (tmp_path / "copy" / "checkpoints").glob("000000001845-*/state.json")
    path.write_bytes(path.read_bytes()[:-1])
    refused = run("restore-backup", "--from", tmp_path / "copy", "--state-dir", tmp_path / "new")
    assert (refused.exit_code, "is not a whole backup" in refused.stderr) == (1, True)
    assert not (tmp_path / "new").exists()
    shutil.rmtree(state / "checkpoints" / path.parent.name)
    failed = run("backup", "--to", tmp_path / "second", "--state-dir", state)
    assert (failed.exit_code, "1 of 3 checkpoints" in failed.stderr) == (1, True)
    made = run("backup", "--to", tmp_path / "second", "--state-dir", state, "--without-damaged")
    assert (made.exit_code, "1845" in made.stderr) == (0, True)


def test_a_full_disk_is_exit_code_1(state: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The message names the file and the reason; nothing is left."""

    def fail(_descriptor: int, _content: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", fail)
    failed = run("backup", "--to", tmp_path / "copy", "--state-dir", state)
    monkeypatch.undo()
    assert (failed.exit_code, "No space left on device" in failed.stderr) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]


def test_the_commands_of_the_guide(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of docs/upgrading.md do what it says, in its order; only `serve` is left out."""
    monkeypatch.chdir(state.parent)
    text = (Path(__file__).parents[3] / "docs" / "upgrading.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert all(line.startswith("tolaria ") for line in lines)
    upgrade_state(state)
    done = []
    for line in lines:
        command = shlex.split(line, comments=True)[1:]
        (copy,) = (state / "backups").glob("before-upgrade-*")
        command = [word.replace("before-upgrade-TIME", copy.name) for word in command]
        if command[0] != "serve":
            result = run(*command)
            assert result.exit_code == 0, (line, result.output)
            done.append(" ".join(command[:2]))
    assert {"state show", "state downgrade", "backup --to", "verify --state-dir", "restore-backup --from"} == set(done)
    assert (state.parent / "new-state" / "journal.sqlite3").is_file()
    assert list((state.parent / "new-state").glob("replaced-*"))
