"""Backups of a real service while it trains, and a run that goes on from one."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from support.processes import python_path, serve, status, stub_of
from support.runs_on_disk import last_checkpoint
from support.waiting import wait_for
from tolaria.checkpoint.archive import open_backup
from tolaria.checkpoint.inspection import Condition, inspect_storage
from tolaria.cli.commands import app

STEPS = 8


def killed_backup(state: Path, to: Path, after_s: float) -> bool:
    """Starts `tolaria backup` and kills it after a time; returns whether a backup of this name exists."""
    command = [sys.executable, "-m", "tolaria", "backup", "--to", str(to), "--state-dir", str(state)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={"PYTHONPATH": python_path()}) as process:
        time.sleep(after_s)  # the kill happens at a random moment
        process.kill()
    return to.exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_from_a_backup_bit_equal(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Backups are taken while the run trains, some of them killed; no half one exists, and a restored one ends equal.

    Retention keeps one checkpoint, so that each epoch removes another one.
    """
    epochs = 150
    arguments = [
        *("training.job=support.jobs:RandomisedJob", "training.options.optimizer=AdamW", "training.device=cpu"),
        *("training.deterministic=true", "preset=plain", "checkpoint.keep_last=1", "service.exit_when_done=true"),
        f"training.epochs={epochs}",
    ]
    original, restored = tmp_path / "original", tmp_path / "restored"
    original.mkdir()
    restored.mkdir()
    kills = 40 if request.config.getoption("--long") else 2
    generator = random.Random(7)
    with serve(*arguments, cwd=original) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).epoch > 3)
        state = original / "state"
        made = CliRunner().invoke(app, ["backup", "--to", str(tmp_path / "copy.tar"), "--state-dir", str(state)])
        assert made.exit_code == 0, made.output
        for number in range(kills):
            name = tmp_path / (f"killed-{number}.tar" if number % 2 else f"killed-{number}")
            if killed_backup(state, name, generator.uniform(0.2, 1.2)):
                with open_backup(name) as backup:
                    backup.verify()
        assert service.wait() == 0
    with open_backup(tmp_path / "copy.tar") as backup:
        assert backup.manifest.checkpoints
    back = ["restore-backup", "--from", str(tmp_path / "copy.tar"), "--state-dir", str(restored / "state")]
    done = CliRunner().invoke(app, back)
    assert done.exit_code == 0, done.output
    step, _ = last_checkpoint(restored)
    with serve(*arguments, cwd=restored) as service:
        assert service.wait() == 0
    (resumed,) = [line for line in service.events() if line["event"] == "resumed"]
    assert resumed["step"] == step < epochs * STEPS
    assert last_checkpoint(restored) == last_checkpoint(original)
    assert all(finding.condition is Condition.WHOLE for finding in inspect_storage(restored / "state"))
