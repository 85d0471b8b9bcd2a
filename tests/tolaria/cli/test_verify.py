from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from faults.small_training import new_training
from tolaria.checkpoint.retention import Retention
from tolaria.checkpoint.storage import open_storage
from tolaria.cli.grammar import app
from tolaria.values.training import Position

runner = CliRunner()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """What a service has left: a journal and two checkpoints."""
    directory = tmp_path / "kept"
    training = new_training()
    storage = open_storage(directory, run_id="run", retention=Retention(last=3, best="highest"))
    with storage.journal:
        for step in (10, 20):
            training.position = Position(step, 1)
            storage.checkpoints.write(training.state().copy())
    return directory


def test_a_sound_directory_is_a_line_each_and_exit_code_0(state: Path) -> None:
    """The journal first, then every checkpoint with what it is."""
    done = runner.invoke(app, ["verify", "--state-dir", str(state)])
    assert (done.exit_code, done.stderr) == (0, "")
    journal, first, second = done.stdout.splitlines()
    assert journal == "journal: whole, 2 committed checkpoints"
    assert first.startswith("000000000010-")
    assert ": whole, step 20, epoch 1, " in second


def test_damage_is_exit_code_1_with_what_comes_of_it(state: Path) -> None:
    """Everything is looked at, and standard error tells how much of it is bad and what a start would do."""
    (oldest, _) = sorted((state / "checkpoints").iterdir())
    shutil.rmtree(oldest)
    done = runner.invoke(app, ["verify", "--state-dir", str(state)])
    assert done.exit_code == 1
    assert f"{oldest.name}: damaged, manifest: missing" in done.stdout
    assert ": whole, step 20" in done.stdout
    assert done.stderr.startswith("tolaria: 1 of 3 are not what was written; the next start")


def test_it_looks_where_the_settings_say(state: Path) -> None:
    """Without --state-dir it is state.dir."""
    assert runner.invoke(app, ["verify", "--set", f"state.dir={state}"]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--state-dir", "nowhere"], "--state-dir: there is no directory nowhere"),
        (["--set", "state.dir=nowhere"], "state.dir: there is no directory nowhere; give --state-dir"),
        (["--state-dir", "."], "--state-dir: . holds no journal.sqlite3"),
    ],
)
def test_a_place_where_nothing_is_kept_is_a_mistake_of_the_caller(
    tmp_path: Path, arguments: list[str], told: str
) -> None:
    """Exit code 2, so that a script does not take a wrong path for damage; nothing is made there."""
    done = runner.invoke(app, ["verify", *arguments])
    assert done.exit_code == 2
    assert told in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_names_of_foreign_files_do_not_act_on_a_terminal(state: Path) -> None:
    """A file's name may hold anything; the journal not knowing it is no damage."""
    (state / "checkpoints" / "x\x1b[2Jy\n").write_text("hello")
    done = runner.invoke(app, ["verify", "--state-dir", str(state)])
    assert done.exit_code == 0
    assert "x [2Jy: unknown, the journal names no such checkpoint" in done.stdout
    assert "\x1b" not in done.stdout
