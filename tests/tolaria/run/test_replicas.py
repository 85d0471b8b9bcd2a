"""Which replica a run goes on from, and what is recorded when it does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST
from support.replicas import image_of
from tolaria.checkpoint.format import Provenance
from tolaria.checkpoint.storage import Storage
from tolaria.config import Settings, StateSettings
from tolaria.journal.rows import CheckpointRow, FaultRow, RollbackRow, RunRow
from tolaria.ranks.replicas import FoundReplica, ReplicaPoint
from tolaria.run.replicas import live_snapshots, record, wanted_replicas
from tolaria.run.restore_points import RestorePoint
from tolaria.run.resume import RunOutcome, end_run, load_resume_point, locked_state, prepare_state
from tolaria.values.lineage import Lineage


def settings(directory: Path, resume: str = "auto") -> Settings:
    """Settings of a service with that state directory."""
    return Settings(state=StateSettings.model_validate({"dir": str(directory), "resume": resume}))


def point(step: int, lineage: Lineage | None = None, *, run_id: str = "run", proven: bool = False) -> ReplicaPoint:
    """A replica of the snapshot of a step."""
    lineage, digest = lineage or Lineage(), image_of(step).seal().total
    return ReplicaPoint(run_id, digest, step, lineage.attempt, lineage.to_json(), proven=proven)


def rollback(attempt: int, restored_step: int, outcome: str = "restored") -> RollbackRow:
    """A rollback of the run, which is to go on with that attempt."""
    return RollbackRow(f"r{attempt}", 1, "run", "fast", 90, restored_step, outcome, "", "", "", 1.0, 1, attempt=attempt)


BACK = Lineage(2, ((1, 50),))
"""After a rollback to step 50."""

WANTED: list[tuple[str, Sequence[tuple[int, Lineage, bool]], Sequence[RollbackRow], ReplicaPoint, bool]] = [
    ("without a checkpoint", [], [], point(1), True),
    ("newer than the checkpoint", [(40, Lineage(), False)], [], point(41), True),
    ("of the checkpoint's step", [(40, Lineage(), False)], [], point(40), False),
    ("older than the checkpoint", [(40, Lineage(), False)], [], point(39), False),
    ("of another run", [], [], point(41, run_id="another"), False),
    ("undone by a rollback", [], [rollback(2, 50)], point(51), False),
    ("before what a rollback has undone", [(40, Lineage(), False)], [rollback(2, 50)], point(50), True),
    ("after the rollback", [(40, Lineage(), False)], [rollback(2, 50)], point(60, BACK), True),
    ("after a rollback that has failed", [(40, Lineage(), False)], [rollback(2, -1, "failed")], point(60), True),
    ("of a branch that has been left", [(60, BACK, False)], [], point(70), False),
    ("newer than what is not suspect", [(40, Lineage(), False), (60, Lineage(), True)], [], point(55), True),
    ("undone by an earlier rollback", [], [rollback(2, 50), rollback(3, 90)], point(70), False),
    ("after two rollbacks", [], [rollback(2, 50), rollback(3, 90)], point(85, BACK), True),
    ("with a lineage that cannot be read", [], [], ReplicaPoint("run", "d", 1, 1, "nonsense"), False),
    ("with a lineage of infinite steps", [], [], ReplicaPoint("run", "d", 1, 1, "[[1,1e999]]"), False),
    ("with a deep lineage", [], [], ReplicaPoint("run", "d", 1, 1, "[" * 8000), False),
]


@pytest.mark.parametrize(
    ("checkpoints", "rollbacks", "replica", "expected"), [row[1:] for row in WANTED], ids=[row[0] for row in WANTED]
)
def test_which_replica_is_wanted(
    tmp_path: Path,
    checkpoints: Sequence[tuple[int, Lineage, bool]],
    rollbacks: Sequence[RollbackRow],
    replica: ReplicaPoint,
    expected: bool,
) -> None:
    """One that is newer than the checkpoint which is resumed, and of the same branch."""
    with locked_state(settings(tmp_path)), prepare_state(settings(tmp_path)) as prepared:
        storage = prepared.storage.for_run("run")
        for row in rollbacks:
            storage.journal.put(row)
        for step, lineage, suspect in checkpoints:
            storage.checkpoints.write(image_of(step), provenance=Provenance(lineage, suspect=suspect))
        assert wanted_replicas(storage, "run")(replica) is expected


@pytest.mark.parametrize("proven_step", [None, 0, 30])
def test_a_running_service_wants_what_it_would_restore(tmp_path: Path, proven_step: int | None) -> None:
    """It goes on from a proven checkpoint rather than from a newer replica that is not proven."""
    with locked_state(settings(tmp_path)), prepare_state(settings(tmp_path)) as prepared:
        storage = prepared.storage.for_run("run")
        rows = [storage.checkpoints.write(image_of(step)) for step in (0, 30, 40) if step or proven_step == 0]
        for row in rows:
            if row.global_step == proven_step:
                storage.journal.revise(row.checkpoint_id, proven=1)
        wanted = wanted_replicas(storage, "run", running=True)
        assert wanted(point(50, proven=True))
        assert wanted(point(50)) is (proven_step is None)
        assert wanted_replicas(storage, "run")(point(50))


def begin(directory: Path, outcome: RunOutcome | None, *steps: int) -> str:
    """Has a run begin, write checkpoints and leave its process; returns its id."""
    with prepare_state(settings(directory)) as prepared:
        for step in steps:
            prepared.storage.checkpoints.write(image_of(step))
        if outcome:
            end_run(prepared, outcome)
        return prepared.run_id


@pytest.mark.parametrize("proven", [True, False])
def test_a_killed_run_goes_on_from_the_replica_that_is_adopted(tmp_path: Path, proven: bool) -> None:
    """Without a checkpoint too; it is a checkpoint then, and the incidents say so."""
    run_id = begin(tmp_path, None)

    def adopt(storage: Storage, asked: str) -> None:
        assert asked == run_id
        replica = point(7, run_id=run_id, proven=proven)
        row = storage.for_run(run_id).checkpoints.write(image_of(7), provenance=Provenance(replica.lineage))
        record(storage, row, FoundReplica(replica, image_of(7), "host-b (10.0.0.2)"))

    with prepare_state(settings(tmp_path), adopt=adopt) as prepared:
        assert prepared.run_id == run_id
        loaded = load_resume_point(prepared).loaded
        assert loaded is not None
        assert loaded.image.verify() == image_of(7).verify()
        (row,) = prepared.storage.journal.rows(CheckpointRow)
        assert (row.global_step, bool(row.proven)) == (7, proven)
        (fault,) = prepared.storage.journal.rows(FaultRow)
        assert (fault.kind, fault.run_id, fault.global_step) == ("replica_restored", run_id, 7)
        for part in ("step 7", "host-b (10.0.0.2)", row.digest, row.checkpoint_id):
            assert part in fault.reason


@pytest.mark.parametrize(
    ("outcome", "resume", "expected"),
    [(None, "auto", 1), (None, "never", 0), ("drained", "auto", 0), ("finished", "auto", 0), ("stopped", "auto", 0)],
)
def test_replicas_are_asked_for_after_a_kill_only(
    tmp_path: Path, outcome: RunOutcome | None, resume: str, expected: int
) -> None:
    """A run that was drained has a checkpoint of its last state; in a new directory there is no run."""
    asked = list[str]()

    def adopt(_storage: Storage, run_id: str) -> None:
        asked.append(run_id)

    with prepare_state(settings(tmp_path), adopt=adopt) as prepared:
        prepared.storage.journal.put(RunRow("old", 1, "digits", outcome="finished"))
    assert asked == []
    begin(tmp_path, outcome, 3)
    with prepare_state(settings(tmp_path, resume), adopt=adopt):
        assert len(asked) == expected


def test_replicas_are_made_of_sound_snapshots() -> None:
    """With the lineage of each; of those that are suspect, or not sealed yet, there are none."""

    def snapshot(step: int, *, digest: str = "d", proven: bool = False, suspect: bool = False) -> RestorePoint:
        return RestorePoint(ROLLBACK_TIER_FAST, step, 1, step, 8, digest, 1, suspect, proven)

    points = [snapshot(70, suspect=True), snapshot(60, digest=""), snapshot(55), snapshot(40, proven=True)]
    found = live_snapshots("run", points, BACK)
    assert found.lineage == BACK
    assert found.points == (
        ReplicaPoint("run", "d", 55, 2, "[[1,50]]"),
        ReplicaPoint("run", "d", 40, 1, "", proven=True),
    )
