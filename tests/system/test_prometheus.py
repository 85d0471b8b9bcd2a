"""Real servers of Prometheus that scrape a real run, and alerts that fire and clear."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT
from support.pods import free_port
from support.processes import serve, stub_of
from support.prometheus import prometheus, tool
from support.waiting import wait_for

STEPS = "tolaria_training_step"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_faults_of_a_run_are_alerts_that_clear(tmp_path: Path) -> None:
    """A sound run has none; a halt, a broken disk and a service that is stopped have theirs, until they are mended.

    Prometheus 2 and 3 agree. Prometheus 3 as it is by default stores dotted names, and says that no rule matches.
    """
    for version in (2, 3):
        tool(version, "prometheus")
    address = f"127.0.0.1:{free_port()}"
    service_options = ("training.epochs=1000000", "checkpoint.retry_s=1", f"metrics.listen={address}")
    options = ("server.listen=127.0.0.1:0", *service_options)
    state = tmp_path / "state"
    with ExitStack() as stack:
        two = stack.enter_context(prometheus(2, address, tmp_path / "two"))
        three = stack.enter_context(prometheus(3, address, tmp_path / "three"))
        dotted = stack.enter_context(prometheus(3, address, tmp_path / "dotted", escaped=False))
        with serve(*options, cwd=tmp_path, ports=False, reference_peers=True) as service, stub_of(service) as stub:

            def firing(*names: str) -> None:
                for server in (two, three):
                    wait_for(lambda server=server: server.firing() == set(names), every_s=0.2)  # type: ignore[misc]

            for server in (two, three):
                wait_for(lambda server=server: (server.value(STEPS) or 0) > 0, every_s=0.2)  # type: ignore[misc]
            wait_for(lambda: (two.value("tolaria:steps:rate5m") or 0) > 0, every_s=0.2)
            firing()
            wait_for(lambda: (dotted.value('{"tolaria.training.step"}') or 0) > 0, every_s=0.2)
            assert dotted.value(STEPS) is None
            wait_for(lambda: dotted.firing() == {"TolariaNamesNotEscaped"}, every_s=0.2)

            raised = admin.RaiseEmergencyRequest(request_id="1", level=EMERGENCY_LEVEL_HALT, reason="a test")
            stub.RaiseEmergency(raised, timeout=180)
            firing("TolariaHalted")
            stub.ClearEmergency(admin.ClearEmergencyRequest(request_id="2", reason="over"), timeout=180)
            stub.ResumeTraining(admin.ResumeTrainingRequest(request_id="3", reason="on"), timeout=180)
            firing()

            (state / "checkpoints").rename(state / "elsewhere")
            (state / "checkpoints").write_text("no directory")
            wait_for(lambda: "TolariaCheckpointFailing" in two.firing() & three.firing(), every_s=0.2)
            (state / "checkpoints").unlink()
            (state / "elsewhere").rename(state / "checkpoints")
            firing()

            service.process.send_signal(signal.SIGSTOP)
            firing("TolariaTargetDown")
            service.process.send_signal(signal.SIGCONT)
            firing()
