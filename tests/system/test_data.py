"""Real runs that are counted in steps, on a stream without end, with two validation sets, a skip, and branches."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub
from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST
from support.data_jobs import sample
from support.processes import Serve, python_path, serve, status, stub_of
from support.runs_on_disk import last_checkpoint
from support.waiting import wait_for

STEPS: Final = 120
RUN: Final = [
    "preset=plain",
    "training.job=support.data_jobs:StreamJob",
    'training.options.sets=["near", "far"]',
    "training.options.noise=true",
    "training.options.step_s=0.02",
    "training.options.log=trained",
    "training.device=cpu",
    "training.threads=1",
    "training.deterministic=true",
    f"training.steps={STEPS}",
    "training.evaluate_every_steps=16",
    "checkpoint.best=far/loss:min",
    "checkpoint.keep_last=20",
    "rollback.every_steps=5",
    "rollback.fast_budget_s=20",
    "service.exit_when_done=true",
]
SKIPPED: Final = range(4 * (16 * 3 + 4), 4 * (16 * 3 + 8))
"""The samples of batches 4 to 7 of the fourth epoch, which has not begun when they are named."""


def skip(stub: TolariaAdminServiceStub) -> None:
    """Has these batches left out."""
    request = admin.SkipDataRequest(request_id="skip", reason="a bad shard", epoch=4, from_batch=4, to_batch=7)
    assert stub.SkipData(request, timeout=180).skip.passed == 0


def trained_on(directory: Path) -> list[float]:
    """Returns the target of each sample that any process has taken a step with."""
    return [y for line in (directory / "trained").read_text().splitlines() for y in json.loads(line)]


@dataclass
class Undisturbed:
    """A run that nothing has disturbed: where it is, its last step and digest, and what it showed."""

    directory: Path
    last: tuple[int, str]
    shown: admin.GetStatusResponse
    metrics: str


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Runs it once."""
    directory = tmp_path_factory.mktemp("undisturbed")
    with serve(*RUN, cwd=directory) as service, stub_of(service) as stub:
        skip(stub)
        wait_for(lambda: status(stub).epoch > 2)
        shown = status(stub)
        with urllib.request.urlopen(f"http://{service.addresses()[1]}/metrics", timeout=180) as answer:
            metrics = answer.read().decode()
        assert service.wait() == 0
    return Undisturbed(directory, last_checkpoint(directory), shown, metrics)


def run_disturbed(directory: Path, *arguments: str, rank: int = 0) -> tuple[int, str]:
    """Rolls the run back, kills a process of its lane, then the service; returns the last step and digest of the next.

    The skip is still there then.
    """
    with serve(*RUN, *arguments, cwd=directory) as service, stub_of(service) as stub:
        skip(stub)
        wait_for(lambda: status(stub).global_step > 20)
        back = admin.TriggerRollbackRequest(request_id="r", tier=ROLLBACK_TIER_FAST, reason="look", target_step=12)
        assert stub.TriggerRollback(back, timeout=180).restored_step <= 12
        wait_for(lambda: status(stub).global_step > 24)
        os.kill(status(stub).ranks[rank].pid, signal.SIGKILL)
        wait_for(lambda: status(stub).global_step > 60)
        service.process.kill()
        service.wait()
    with serve(*RUN, *arguments, cwd=directory) as service, stub_of(service) as stub:
        (kept,) = stub.ListDataSkips(admin.ListDataSkipsRequest(), timeout=180).skips
        assert (kept.reason, kept.ranges[0].from_batch) == ("a bad shard", 4)
        assert service.wait() == 0
    return last_checkpoint(directory)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_rolled_back_and_killed_ends_in_the_same_state(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A stream, two validation sets, steps, a skip; SIGKILL of the lane and of the service: the digest is the same."""
    assert run_disturbed(tmp_path) == undisturbed.last
    assert undisturbed.last[0] == STEPS


@pytest.mark.timeout(900)
def test_so_does_a_run_of_two_ranks(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Of which the one that does not lead is killed; only with --long, as the test above is its short form."""
    if not request.config.getoption("--long"):
        pytest.skip("two minutes: needs --long")
    ranks = ["lane.mode=torchrun", "lane.processes=2"]
    for name in ("straight", "disturbed"):
        (tmp_path / name).mkdir()
    with serve(*RUN, *ranks, cwd=tmp_path / "straight") as service, stub_of(service) as stub:
        skip(stub)
        assert service.wait() == 0
    found = run_disturbed(tmp_path / "disturbed", *ranks, rank=1)
    assert found == last_checkpoint(tmp_path / "straight")


def test_what_is_shown_of_it_is_true(undisturbed: Undisturbed) -> None:
    """Steps, the time that is left, the figures of each set; the skipped samples, and no others, are not trained on."""
    shown, text = undisturbed.shown, undisturbed.metrics
    assert (shown.steps, shown.epochs, shown.steps_per_epoch, shown.data_skips) == (STEPS, 0, 16, 1)
    assert 0 < shown.remaining_s < 600
    assert {"loss", "accuracy", "mae", "near/loss", "far/loss", "far/accuracy", "far/mae"} <= set(
        shown.validation_metrics
    )
    assert shown.validation_metrics["near/loss"] == shown.validation_metrics["loss"] == shown.validation_loss
    assert 'name="far/loss"' in text
    seen = trained_on(undisturbed.directory)
    count = 4 * STEPS + len(SKIPPED)
    missing = [index for index in range(count) if float(sample(index)[1]) not in seen]
    assert missing == list(SKIPPED)
    assert len(seen) == 4 * (STEPS + 1)  # one batch of the first look


def tree(directory: Path) -> dict[str, str]:
    """Returns the digest of each file."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def tolaria(*words: str, cwd: Path) -> Any:
    """Runs the command; returns what it prints as JSON."""
    command = [sys.executable, "-m", "tolaria", *words, "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, check=True, cwd=cwd, env={"PYTHONPATH": python_path()}
    )
    return json.loads(done.stdout)


def resumed_steps(service: Serve) -> list[object]:
    """Returns the steps at which processes of the run have gone on."""
    return [line["step"] for line in service.events() if line["event"] == "resumed"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_branch_goes_on_as_the_run_did(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """From an earlier checkpoint to the same digest; its origin is shown; the other directory stays as it is."""
    state = undisturbed.directory / "state"
    checkpoint = next(path.name for path in sorted((state / "checkpoints").iterdir()) if int(path.name[:12]) >= 40)
    before = tree(state)
    made = tolaria("branch", "--from", checkpoint, "--to", "branch", "--state-dir", str(state), cwd=tmp_path)
    assert made["origin"]["checkpoint_id"] == checkpoint
    (tmp_path / "state").symlink_to(tmp_path / "branch")
    with serve(*RUN, f"state.dir={tmp_path / 'branch'}", cwd=tmp_path) as service, stub_of(service) as stub:
        shown = status(stub)
        assert shown.run_id == made["run_id"] != made["origin"]["run_id"]
        assert shown.branched_from.run_id == made["origin"]["run_id"]
        assert (shown.branched_from.global_step, shown.data_skips) == (int(checkpoint[:12]), 1)
        assert service.wait() == 0
    assert resumed_steps(service) == [int(checkpoint[:12])]
    assert last_checkpoint(tmp_path) == undisturbed.last
    assert tree(state) == before
