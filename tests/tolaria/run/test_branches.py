"""Branches: new runs that begin at a checkpoint of another one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.exported import record_settings, trained
from tolaria.checkpoint.directory import SETTINGS
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.config import Settings, StateSettings, TrainingSettings
from tolaria.errors import BranchRefusedError, CheckpointDamagedError, NoCheckpointError
from tolaria.journal.database import Journal
from tolaria.journal.rows import CommandRow, RunRow
from tolaria.run.branches import branch_origin, make_branch
from tolaria.run.data_skips import saved_skips
from tolaria.run.health_record import Record
from tolaria.run.resume import load_resume_point, locked_state, prepare_state

JOB = "support.jobs:TinyJob"


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """The state directory of a run with a checkpoint at step 1, a skip, budgets that are spent, and settings."""
    directory = tmp_path / "original"
    trained(directory, JOB)
    record_settings(directory, training={"job": JOB, "seed": 3}, checkpoint={"best": "loss"})
    health = Record(left_out=[(1, 5)], best_step=9, skipped=4, without_progress=2, evaluations=[(1, 0.5), (8, 0.7)])
    skip = {"skip_id": "a", "at_ns": 1, "reason": "bad", "ranges": [{"epoch": 1, "first": 2, "last": 3}], "steps": None,
            "removed_at_ns": None}  # fmt: skip
    with Journal(directory / "journal.sqlite3") as journal:
        journal.put(RunRow("run", 1, JOB, outcome="finished", scale=health.model_dump_json(exclude_defaults=True)))
        journal.put(CommandRow("data_skips@run", 1, "run", "data_skips", 1, "applied", json.dumps([skip])))
    return directory


@pytest.mark.parametrize("point", ["newest", "best"])
def test_a_branch_is_resumed_as_a_run_of_its_directory(original: Path, tmp_path: Path, point: str) -> None:
    """With the state, its digest, what is left out, and the settings, but without budgets; the origin is known."""
    made = make_branch(original, point, tmp_path / "branch")
    with open_storage(original, run_id="run", retention=Retention(3, "highest")).journal as journal:
        digest = journal.checkpoints()[0].digest
        assert branch_origin(journal, "run") is None
    settings = Settings(training=TrainingSettings(job=JOB), state=StateSettings(dir=str(tmp_path / "branch")))
    with locked_state(settings), prepare_state(settings) as prepared:
        assert (prepared.run_id, prepared.resumed) == (made.run_id, True)
        assert f"it branches off at step 1 of run run in {original}" in prepared.notes[-1]
        point_found = load_resume_point(prepared)
        assert point_found.loaded is not None
        assert point_found.loaded.row.digest == digest == made.origin.digest
        assert point_found.points.lineage.attempt == 1
        journal = prepared.storage.journal
        assert branch_origin(journal, made.run_id) == made.origin
        assert saved_skips(journal, made.run_id)[0].ranges[0].last == 3
        run = journal.find(RunRow, made.run_id)
        assert run is not None
        assert Record.parse(run.scale) == Record(left_out=[(1, 5)], best_step=1, taken=1, evaluations=[(1, 0.5)])
    recorded = json.loads((tmp_path / "branch" / SETTINGS).read_text())
    assert (recorded["run_id"], recorded["settings"]["training"]["seed"]) == (made.run_id, 3)


def test_nothing_is_left_of_a_branch_that_is_refused(original: Path, tmp_path: Path) -> None:
    """An existing target, a missing parent, an unknown or a damaged checkpoint: the error says which."""
    (tmp_path / "taken").mkdir()
    with pytest.raises(BranchRefusedError, match="exists already"):
        make_branch(original, "newest", tmp_path / "taken")
    (tmp_path / "file").touch()
    with pytest.raises(BranchRefusedError, match="cannot be made"):
        make_branch(original, "newest", tmp_path / "file" / "branch")
    with pytest.raises(NoCheckpointError, match="no checkpoint 000-x"):
        make_branch(original, "000-x", tmp_path / "branch")
    (tensors,) = original.glob("checkpoints/*/tensors.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointDamagedError):
        make_branch(original, "newest", tmp_path / "branch")
    assert {path.name for path in tmp_path.iterdir()} == {"original", "taken", "file"}
