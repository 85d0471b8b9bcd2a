"""Real services whose controllers are killed, or command too much."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import CIRCUIT_STATE_OPEN, COMMAND_ROLLBACK
from leyline.v1.state_pb2 import SystemStatePacket
from support.peers import FakeKasmina, FakeParticipant, FakeTamiyo, command, serving
from support.processes import Serve, serve, status, stub_of
from support.waiting import wait_for


def peer_process(service: Serve, peer: str) -> int:
    """Returns the id of the embedded peer's process."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in service.children()}
    return next(pid for pid, words in commands.items() if b"peer" in words and peer.encode() in words)


@pytest.mark.slow
def test_kills_of_the_controller_and_of_the_service_cause_no_rollback(tmp_path: Path) -> None:
    """The restarted Tamiyo knows the run, nothing is rolled back, and an operator's learning rate stays in force.

    Also after a kill right behind the answer, and after a rollback; a repeat of the request changes nothing.
    """
    arguments = ["training.job=support.user_jobs:Line", "training.epochs=100000000", "training.options.samples=400"]
    arguments += ["training.options.lr=0.001", "training.options.step_s=0.001", "training.device=cpu"]
    arguments += ["rollback.fast_budget_s=20", "rollback.full_budget_s=60"]
    slower = admin.AdjustLearningRateRequest(request_id="slower", reason="calm", factor=0.1)
    with serve(*arguments, cwd=tmp_path, reference_peers=True) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).epoch > 4)
        (remembered,) = (tmp_path / "state" / "peers").glob("tamiyo-*.json")
        os.kill(peer_process(service, "tamiyo"), signal.SIGKILL)
        wait_for(lambda: any(line["event"] == "embedded_peer_restarted" for line in service.events()))
        killed_at = status(stub).epoch
        size = len(remembered.read_bytes())
        wait_for(lambda: status(stub).epoch > killed_at + 3)
        assert len(remembered.read_bytes()) >= size > 0
        assert (status(stub).rollbacks, status(stub).state) == (0, admin.RUN_STATE_RUNNING)
        stub.CreateCheckpoint(admin.CreateCheckpointRequest(request_id="c", reason="now"), timeout=180)
        answer = stub.AdjustLearningRate(slower, timeout=180)
        service.process.kill()
        service.wait()
    with serve(*arguments, cwd=tmp_path, reference_peers=True) as service, stub_of(service) as stub:
        resumed = status(stub)
        (kept,) = resumed.adjustments
        assert (kept.request_id, kept.factor, kept.expires_at_step) == ("slower", 0.1, 0)
        assert stub.AdjustLearningRate(slower, timeout=180) == answer
        started = status(stub).epoch
        wait_for(lambda: status(stub).epoch > started + 3)
        now = status(stub)
        assert (now.rollbacks, len(now.adjustments)) == (0, 1)
        assert now.learning_rates["host"] == pytest.approx(1e-4)
        request = admin.TriggerRollbackRequest(request_id="r", reason="odd")
        done = stub.TriggerRollback(request, timeout=180)
        assert done.state_digest == done.expected_digest
        back = status(stub)
        assert list(back.adjustments) == list(now.adjustments)
        assert back.learning_rates["host"] == pytest.approx(1e-4)


def test_a_controller_that_always_commands_a_rollback_is_refused(tmp_path: Path) -> None:
    """Beyond the budget of rollbacks she is refused with the reason, her breaker opens, and training goes on."""

    async def roll_back(_state: SystemStatePacket) -> AdaptationCommand | None:
        return command(COMMAND_ROLLBACK)

    arguments = ["training.job=support.user_jobs:Line", "training.epochs=100000000", "training.device=cpu"]
    arguments += ["training.options.lr=0.001", "training.options.samples=400", "rollback.fast_budget_s=20"]
    arguments.append("rollback.per_steps=100000000")  # epochs take milliseconds, and she may answer later than that
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(serving(FakeTamiyo(roll_back), FakeKasmina(), FakeParticipant())) as peers,
        serve(*arguments, f"tamiyo.target={peers}", f"kasmina.target={peers}", cwd=tmp_path) as service,
        stub_of(service) as stub,
    ):
        wait_for(lambda: any(line.get("reason") == "rollback_budget" for line in service.events()))
        now = status(stub)
        assert now.breakers["tamiyo"] == CIRCUIT_STATE_OPEN
        assert 1 <= now.rollbacks <= 3
        wait_for(lambda: status(stub).global_step > now.global_step + 200)
        after = status(stub)
        assert (after.rollbacks, after.state) == (now.rollbacks, admin.RUN_STATE_RUNNING)
