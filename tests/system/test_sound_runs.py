"""Sound runs of the service: with its reference peers, with a controller that hangs and dies, beside a busy machine."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest
from anyio.from_thread import start_blocking_portal

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import CIRCUIT_STATE_OPEN
from leyline.v1.state_pb2 import SystemStatePacket
from support.peers import FakeKasmina, FakeParticipant, FakeTamiyo, serving
from support.processes import Serve, serve, status, stub_of
from support.waiting import wait_for

pytestmark = pytest.mark.timeout(3600)
DIGITS, BUILT_IN = "support.user_jobs:Digits", "tolaria.jobs.digits:digits"
PATIENT = ["control.boundary_budget_ms=10000", "tamiyo.timeout_s=60", "kasmina.timeout_s=60"]
"""Limits that no busy machine exceeds: beyond them the controller is left alone for some epochs."""
ENDED = (admin.RUN_STATE_FINISHED, admin.RUN_STATE_FAILED, admin.RUN_STATE_HALTED)


@pytest.mark.parametrize(
    ("job", "options", "epochs", "long_epochs", "accuracy"),
    [
        (DIGITS, {"optimizer": "sgd", "lr": 0.03, "batch": 8}, 4, 40, 0.97),
        pytest.param(DIGITS, {"optimizer": "adam", "lr": 3e-3, "dropout": 0.3}, 10, 60, 0.97, marks=pytest.mark.long),
        pytest.param(BUILT_IN, {"batch_size": 8}, 1, 20, 0.95, marks=pytest.mark.long),
        pytest.param(BUILT_IN, {"batch_size": 4}, 1, 12, 0.95, marks=pytest.mark.slow),
    ],
)
def test_small_batches_and_noise_are_left_alone(
    job: str,
    options: dict[str, object],
    epochs: int,
    long_epochs: int,
    accuracy: float,
    *,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """By the guards and by the reference Tamiyo: it finishes at the schedule's rate, without a rollback."""
    long = request.config.getoption("--long")
    settings = [f"training.options.{name}={value}" for name, value in options.items()]
    settings += [f"training.job={job}", f"training.epochs={long_epochs if long else epochs}", "training.device=cpu"]
    settings += PATIENT
    for seed in (0, 1) if long else (0,):
        directory = tmp_path / str(seed)
        directory.mkdir()
        with (
            serve(*settings, f"training.seed={seed}", cwd=directory, reference_peers=True) as service,
            stub_of(service) as stub,
        ):
            wait_for(lambda: status(stub).state in ENDED, 1500.0, every_s=0.2)
            found = status(stub)
            service.terminate()
            assert service.wait() == 0
        asked = {line["tamiyo"] for line in service.events() if line["event"] == "epoch_finished"}
        assert epochs == 1 or asked >= {"no change"}  # she was asked, and answered
        assert (found.state, found.rollbacks) == (admin.RUN_STATE_FINISHED, 0), found.state_reason
        assert found.learning_rates["host"] == options.get("lr", 1e-3)
        assert found.validation_accuracy >= (accuracy if long else 0.75)


def test_a_controller_that_hangs_and_then_dies_leaves_slow_training_alone(tmp_path: Path) -> None:
    """Steps take longer than the budget of a rollback: her breaker opens, and nothing is rolled back or halted."""

    async def hang(_state: SystemStatePacket) -> AdaptationCommand | None:
        await anyio.sleep_forever()
        raise AssertionError

    arguments = ["training.job=support.user_jobs:Line", "training.epochs=100000000", "training.device=cpu"]
    arguments += ["training.options.samples=8", "training.options.step_s=0.7", "tamiyo.timeout_s=0.3"]
    with start_blocking_portal() as portal, ExitStack() as peers:
        serving_them = serving(FakeTamiyo(hang), FakeKasmina(), FakeParticipant())
        target = peers.enter_context(portal.wrap_async_context_manager(serving_them))
        arguments += [f"tamiyo.target={target}", f"kasmina.target={target}"]
        with serve(*arguments, cwd=tmp_path) as service, stub_of(service) as stub:
            wait_for(lambda: any(line["event"] == "tolaria.tamiyo_timeout" for line in service.events()))
            wait_for(lambda: "epoch_failed:peer_failure" in status(stub).conservative_reasons)
            peers.close()
            wait_for(lambda: status(stub).breakers["tamiyo"] == CIRCUIT_STATE_OPEN, 120.0)
            before = status(stub)
            wait_for(lambda: status(stub).global_step > before.global_step + 3)
            after = status(stub)
    assert (after.state, after.rollbacks, after.skipped_steps) == (admin.RUN_STATE_RUNNING, 0, 0)
    assert "breaker_open:tamiyo" in after.conservative_reasons
    assert levels(service) <= {"notice", "elevated"}


def test_a_busy_machine_is_no_emergency(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Two busy loops beside the service: late boundaries lead to conservative mode at most, and training finishes."""
    epochs = 200 if request.config.getoption("--long") else 8
    settings = [f"training.job={DIGITS}", "training.options.batch=130", "training.device=cpu"]
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        with (
            serve(*settings, f"training.epochs={epochs}", cwd=tmp_path, reference_peers=True) as service,
            stub_of(service) as stub,
        ):
            wait_for(lambda: status(stub).state in ENDED, 1500.0, every_s=0.2)
            found = status(stub)
            service.terminate()
            assert service.wait() == 0
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert (found.state, found.rollbacks) == (admin.RUN_STATE_FINISHED, 0), found.state_reason
    assert levels(service) <= {"notice", "elevated"}


def levels(service: Serve) -> set[str]:
    """The levels of all emergencies that the service has logged."""
    return {line["emergency_level"] for line in service.events() if line["event"] == "tolaria.emergency.escalated"}
