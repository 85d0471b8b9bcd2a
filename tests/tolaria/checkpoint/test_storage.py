from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tolaria.checkpoint.directory import JOURNAL
from tolaria.checkpoint.inspection import Condition, inspect_storage
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Repairs, Retention
from tolaria.journal.reader import read_journal
from tolaria.journal.rows import AdminActionRow, CheckpointRow, CommandRow, RunRow
from tolaria.state.encoding import spec_of, tensor_view

DIGESTS = {
    1801: "c6ddb6d39833f0ba2df219e9d23e802d",
    1845: "dbfb865acbe5bdf3725e3bf7a8172119",
    1890: "384c528ee810ce9680e65a6d824b9c77",
}
"""Digests of the fixture's checkpoints by global step."""


def test_every_checkpoint_of_version_0_1_0_is_verified(old_state: Path) -> None:
    """Inspection finds the journal and all checkpoints intact."""
    findings = list(inspect_storage(old_state))
    assert [finding.condition for finding in findings] == [Condition.WHOLE] * 4
    for finding, (step, digest) in zip(findings[1:], DIGESTS.items(), strict=True):
        assert finding.detail.startswith(f"step {step}, ")
        assert finding.detail.endswith(f"digest {digest}")


def test_the_journal_of_version_0_1_0_is_read(old_state: Path) -> None:
    """Runs, checkpoints and commands are read without opening the journal for writing."""
    path = old_state / JOURNAL
    (run,) = read_journal(path, RunRow)
    (command,) = read_journal(path, CommandRow)
    assert (run.job, run.outcome, json.loads(run.scale)["best_accuracy"]) == ("digits", "", 0.9888888888888889)
    assert (command.kind, command.global_step, command.outcome) == ("seed", 1440, "applied")
    assert len(read_journal(path, CheckpointRow)) == 43


def test_the_state_of_version_0_1_0_is_opened_and_loaded(old_state: Path) -> None:
    """Nothing needs repair, incidents and answers are listed, and the newest image is loaded and verified."""
    retention = Retention(last=3, best="highest")
    storage = open_storage(old_state, run_id="2e10f889c48b", retention=retention)
    with storage.journal:
        assert (storage.journal_damage, storage.repairs) == (None, Repairs((), (), ()))
        assert {row.global_step: row.digest for row in storage.checkpoints.restore_points()} == DIGESTS
        assert [incident.kind for incident in storage.journal.incidents(10)] == ["rollback", "emergency", "rollback"]
        assert storage.journal.find(AdminActionRow, "2eddd1ff-fed4-4b03-8c3d-e22b5216f3b8") is not None
        loaded = storage.checkpoints.load_newest()
    image = loaded.image
    assert (loaded.row.global_step, image.position.epoch, loaded.damaged) == (1890, 42, ())
    assert image.verify().total == DIGESTS[1890]
    assert {"position", "optimizer", "parts", "topology", "rng"} == set(json.loads(image.values))
    views = [tensor_view(spec, image.buffers[spec.name]) for spec in image.specs]
    assert tuple(spec_of(spec.name, view) for spec, view in zip(image.specs, views, strict=True)) == image.specs


def test_storage_does_not_import_torch() -> None:
    """A process that only reads and writes state starts without torch."""
    code = "import sys, tolaria.checkpoint.inspection, tolaria.checkpoint.writer; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=180)
