"""Real services that are killed, stopped and started again on the same state directory."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1 import kasmina_service_pb2 as kasmina
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub
from leyline.v1.enums_pb2 import (
    ROLLBACK_TIER_FAST,
    ROLLBACK_TIER_FULL,
    SEED_STAGE_BLENDING,
    SEED_STAGE_TRAINING,
)
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from support.peers import Context, FakeKasmina, served_without_change
from support.processes import Serve, python_path, serve, status, stub_of
from support.waiting import wait_for

JOB = ["training.job=support.jobs:RandomisedJob", "training.options.optimizer=AdamW", "training.device=cpu"]
STEPS = 8


class GrowingKasmina(FakeKasmina):
    """Declares a seed that trains from the third epoch on and blends from the fifth on."""

    async def ExportSeedStates(  # noqa: N802
        self, request: kasmina.ExportSeedStatesRequest, context: Context
    ) -> kasmina.ExportSeedStatesResponse:
        epoch = request.state.current_epoch
        seeds = []
        if epoch >= 5:
            ramp = AlphaSchedule(start=0.0, end=1.0, begin_step=5 * STEPS, duration_steps=50)
            seeds = [SeedState(seed_id="a", blueprint_id="residual_mlp", stage=SEED_STAGE_BLENDING, alpha=ramp)]
        elif epoch >= 3:
            seeds = [SeedState(seed_id="a", blueprint_id="residual_mlp", stage=SEED_STAGE_TRAINING)]
        for seed in seeds:
            seed.slot = "middle"
        return kasmina.ExportSeedStatesResponse(seeds=seeds)


@pytest.fixture
def peers() -> Iterator[list[str]]:
    """Runs peers whose answers depend on the state alone and that outlive services; yields their settings."""
    with served_without_change(GrowingKasmina) as settings:
        yield settings


def last_checkpoint(directory: Path) -> tuple[str, int, str]:
    """Returns run, step and digest of the newest committed checkpoint."""
    with closing(sqlite3.connect(directory / "state" / "journal.sqlite3")) as journal:
        query = "SELECT run_id, global_step, digest FROM checkpoints WHERE state = 'committed' ORDER BY at_ns DESC"
        run_id, step, digest = journal.execute(query).fetchone()
    return run_id, step, digest


def first_event(service: Serve, event: str) -> dict[str, object]:
    """Returns the first log line of that event."""
    return next(line for line in service.events() if line["event"] == event)


def test_a_killed_service_resumes_and_ends_in_the_same_state(tmp_path: Path, peers: list[str]) -> None:
    """After SIGKILL with a grafted seed the next start resumes; its last digest is that of an uninterrupted run.

    The reported checkpoint exists, and a request that was answered before the kill gets the same answer again.
    """
    epochs = 18
    arguments = [
        *JOB,
        *peers,
        "training.deterministic=true",
        "rollback.automatic=false",
        f"training.epochs={epochs}",
        "service.exit_when_done=true",
    ]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for directory in (straight, killed):
        directory.mkdir()
    with serve(*arguments, cwd=straight) as service:
        assert service.wait() == 0
    request = admin.CreateCheckpointRequest(request_id="once", reason="before the kill")
    with serve(*arguments, cwd=killed) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 10 * STEPS)
        assert [seed.seed_id for seed in status(stub).seeds] == ["a"]
        kept = stub.CreateCheckpoint(request, timeout=180)
        service.process.kill()
        service.wait()
    assert 10 * STEPS < kept.global_step < epochs * STEPS
    with serve(*arguments, cwd=killed) as service, stub_of(service) as stub:
        assert stub.CreateCheckpoint(request, timeout=180) == kept
        assert service.wait() == 0
    resumed = first_event(service, "resumed")
    assert resumed["step"] >= kept.global_step  # type: ignore[operator] # a number
    (run_a, step_a, digest_a), (run_b, step_b, digest_b) = last_checkpoint(straight), last_checkpoint(killed)
    assert step_a == step_b == epochs * STEPS
    assert run_b == resumed["run_id"] != run_a
    assert digest_a == digest_b


@pytest.mark.slow
def test_one_state_directory_is_used_by_successive_services(tmp_path: Path, peers: list[str]) -> None:
    """Rolls back, refuses a second service, resumes after SIGTERM, refuses another job, ends, starts a new run."""
    arguments = [*JOB, *peers, "training.epochs=1000000", "rollback.every_steps=5", "rollback.fast_budget_s=20"]
    with serve(*arguments, cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 10 * STEPS)
        run_id = first_event(service, "serving")["run_id"]
        roll_back_by_both_tiers(stub)
        verified = subprocess.run(
            [sys.executable, "-m", "tolaria", "verify", "--state-dir", str(tmp_path / "state")],
            capture_output=True, text=True, timeout=180, check=False, env={"PYTHONPATH": python_path()},
        )  # fmt: skip
        assert (verified.returncode, verified.stderr) == (0, ""), verified
        with serve("training.job=support.jobs:raising_factory", cwd=tmp_path) as second:
            assert second.wait() == 2
        (line,) = second.lines  # the job would fail, and is not built
        assert line.startswith(f"tolaria: state.dir: {tmp_path / 'state'}")
        assert f"is in use by process {service.process.pid};" in line
        before = status(stub).global_step
        service.terminate()
        assert service.wait() == 0
    with serve("training.job=digits", cwd=tmp_path) as other:
        assert other.wait() == 2
    assert f"holds the unfinished run {run_id}" in "\n".join(other.lines)
    with serve(*arguments, "service.exit_when_done=true", cwd=tmp_path) as service, stub_of(service) as stub:
        assert first_event(service, "resumed")["run_id"] == run_id
        assert status(stub).global_step >= before
        stub.StopTraining(admin.StopTrainingRequest(request_id="s", reason="enough"), timeout=180)
        assert service.wait() == 0
    with serve(*JOB, *peers, "training.epochs=1", "service.exit_when_done=true", cwd=tmp_path) as service:
        assert service.wait() == 0
    assert first_event(service, "serving")["run_id"] != run_id
    assert not any(line["event"] == "resumed" for line in service.events())


def roll_back_by_both_tiers(stub: TolariaAdminServiceStub) -> None:
    """Rolls back once by each tier: the digest is that of the listed point, and a repeat gets the same answer."""
    kept = stub.CreateCheckpoint(admin.CreateCheckpointRequest(request_id="c", reason="now"), timeout=180)
    stub.PauseTraining(admin.PauseTrainingRequest(request_id="p", reason="to look"), timeout=180)
    for tier in (ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL):
        points = stub.ListRestorePoints(admin.ListRestorePointsRequest(), timeout=180).restore_points
        newest = next(point for point in points if point.tier == tier and not point.superseded)
        request = admin.TriggerRollbackRequest(
            request_id=f"r{tier}", tier=tier, target_step=newest.global_step, reason="odd"
        )
        back = stub.TriggerRollback(request, timeout=180)
        assert (back.tier, back.restored_step) == (tier, newest.global_step)
        assert back.state_digest == back.expected_digest == newest.digest
        assert back.coordinated
        assert stub.TriggerRollback(request, timeout=180) == back
        assert status(stub).global_step == newest.global_step
        assert status(stub).state == admin.RUN_STATE_PAUSED
    assert back.restored_step >= kept.global_step
    incidents = stub.ListIncidents(admin.ListIncidentsRequest(), timeout=180).incidents
    assert [incident.kind for incident in incidents][:2] == ["rollback", "rollback"], incidents
    stub.ResumeTraining(admin.ResumeTrainingRequest(request_id="g", reason="fine"), timeout=180)
    wait_for(lambda: status(stub).global_step > back.restored_step)


@pytest.mark.slow
def test_a_run_of_version_0_1_0_is_resumed(tmp_path: Path) -> None:
    """The service continues a run that the version before was killed in, to its end, from its last checkpoint."""
    with tarfile.open(Path(__file__).parents[1] / "fixtures" / "state-0.1.0.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    settings = ["training.epochs=44", "training.options.width=8", "training.device=cpu", "service.exit_when_done=true"]
    with serve(*settings, f"state.dir={tmp_path / 'state'}", cwd=tmp_path) as service:
        assert service.wait() == 0
    assert first_event(service, "resumed")["step"] == 1890
    assert [line["epoch"] for line in service.events() if line["event"] == "epoch_finished"] == [43, 44]


@pytest.mark.slow
@pytest.mark.timeout(900)  # it starts four services
def test_a_cut_after_an_automatic_rollback_outlives_a_kill(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Killed right after the rollback, before another checkpoint: the next process has the cut rate, once.

    It also knows the attempt and the rollbacks. With --long, a second explosion cuts to a quarter,
    which a kill keeps too.
    """
    arguments = ["training.job=support.user_jobs:Line", "training.epochs=100000000", "training.device=cpu"]
    arguments += ["training.options.lr=0.001", "training.options.samples=800000", "training.options.step_s=0.001"]
    arguments += ["rollback.fast_budget_s=20", "rollback.full_budget_s=60", "rollback.lr_cut_steps=1000000"]
    arguments += ["rollback.every_steps=5", "rollback.snapshots_max=50"]  # the second rollback finds an older point
    for number, cut in ((1, 0.5), (2, 0.25)) if request.config.getoption("--long") else ((1, 0.5),):
        with serve(*arguments, cwd=tmp_path) as service, stub_of(service) as stub:
            train_on(stub)
            if number == 1:  # the rollback goes to a later step than this one
                stub.CreateCheckpoint(admin.CreateCheckpointRequest(request_id="c", reason="now"), timeout=180)
                train_on(stub)
            explode(stub, number)
            service.process.kill()
            service.wait()
        with serve(*arguments, cwd=tmp_path) as service, stub_of(service) as stub:
            assert_cut(status(stub), number, cut)
            train_on(stub)
            assert_cut(status(stub), number, cut)


def train_on(stub: TolariaAdminServiceStub) -> None:
    """Waits for a hundred steps."""
    from_step = status(stub).global_step
    wait_for(lambda: status(stub).global_step > from_step + 100)


def explode(stub: TolariaAdminServiceStub, number: int) -> None:
    """Sets a learning rate that cannot work, for three steps, and waits for the rollback of this number."""
    slip = admin.AdjustLearningRateRequest(request_id=f"slip{number}", reason="odd", value=10.0, expires_after_steps=3)
    stub.AdjustLearningRate(slip, timeout=180)
    wait_for(lambda: status(stub).rollbacks == number)


def assert_cut(now: admin.GetStatusResponse, number: int, cut: float) -> None:
    """The rate is cut by the last of these rollbacks, once, and all of them are known."""
    (kept,) = now.adjustments
    assert (kept.origin, kept.factor) == ("rollback", cut)
    assert now.learning_rates["host"] == pytest.approx(0.001 * cut)
    assert (now.rollbacks, dict(now.rollbacks_by_origin)) == (number, {"health": number})
    assert now.attempt > number
