"""A running service reads its settings again, and stops in an order that its clients can follow."""

from __future__ import annotations

import signal
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from leyline.v1 import admin_service_pb2 as admin
from support.processes import Serve, serve, stub_of
from support.waiting import wait_for

SLOW = ["training.job=support.jobs:SlowJob", "training.options.seconds=2", "training.epochs=1000", "preset=plain"]
"""Steps of two seconds: the last checkpoint has to wait for the end of one."""

LIMITS = ["service.drain_timeout_s=20", "emergency.drain_s=30"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """One service for all tests, in their order; the last one ends it."""
    folder = tmp_path_factory.mktemp("reload")
    write(folder, "keep_last = 3")
    with serve(*SLOW, *LIMITS, f"state.dir={folder / 'state'}", cwd=folder) as started:
        started.addresses()
        with stub_of(started) as stub:
            wait_for(lambda: stub.GetStatus(admin.GetStatusRequest(), timeout=180).global_step > 0)
        yield started


def folder_of(service: Serve) -> Path:
    """Returns the working directory, with the file of the settings."""
    return Path(f"/proc/{service.process.pid}/cwd").resolve()


def write(folder: Path, checkpoint: str, more: str = "") -> None:
    """Writes the file of the settings."""
    (folder / "tolaria.toml").write_text(f"[checkpoint]\n{checkpoint}\n{more}\n")


def answered(folder: Path) -> list[str]:
    """Returns the methods of the operators' requests whose answers are in the journal."""
    with closing(sqlite3.connect(f"file:{folder / 'state' / 'journal.sqlite3'}?mode=ro", uri=True)) as journal:
        return [row[0] for row in journal.execute("SELECT method FROM admin_actions")]


def events(service: Serve, name: str) -> list[dict[str, Any]]:
    """The events of one name in the log."""
    return [event for event in service.events() if event["event"] == name]


def test_a_call_changes_what_can_change_and_names_the_rest(service: Serve) -> None:
    """The run goes on meanwhile; the call is in the audit trail, and the event in the log."""
    write(folder_of(service), "keep_last = 5", "[rollback]\nmemory_mb = 99")
    with stub_of(service) as stub:
        before = stub.GetStatus(admin.GetStatusRequest())
        answer = stub.ReloadConfig(admin.ReloadConfigRequest(request_id="1", reason="more"), timeout=180)
        calls = stub.ListAdminCalls(admin.ListAdminCallsRequest()).calls
    assert [(one.name, one.before, one.after) for one in answer.changed] == [("checkpoint.keep_last", "3", "5")]
    assert [(one.name, one.before, one.after) for one in answer.waiting] == [("rollback.memory_mb", "256", "99")]
    assert answer.global_step >= before.global_step
    assert "ReloadConfig" in answered(folder_of(service))
    assert (calls[0].method, calls[0].reason, calls[0].outcome) == ("ReloadConfig", "more", "OK")
    assert events(service, "tolaria.config_reloaded")[-1]["changed"] == "checkpoint.keep_last: 3 -> 5"


def test_a_hangup_reads_the_file_and_a_wrong_one_changes_nothing(service: Serve) -> None:
    """The wrong one is named in the log and in the audit trail; a good one takes effect after it."""
    reloaded = len(events(service, "tolaria.config_reloaded"))
    write(folder_of(service), "keep_last = 'many'")
    service.process.send_signal(signal.SIGHUP)
    wait_for(lambda: bool(events(service, "tolaria.config_reload_failed")))
    assert "checkpoint.keep_last" in events(service, "tolaria.config_reload_failed")[-1]["problem"]
    write(folder_of(service), "keep_last = 6")
    service.process.send_signal(signal.SIGHUP)
    wait_for(lambda: len(events(service, "tolaria.config_reloaded")) > reloaded)
    done = events(service, "tolaria.config_reloaded")[-1]
    assert done["origin"] == "SIGHUP"
    assert done["changed"].startswith("checkpoint.keep_last: ")
    assert done["changed"].endswith(" -> 6")
    with stub_of(service) as stub:
        newest = admin.ListAdminCallsRequest(limit=2)
        wait_for(lambda: stub.ListAdminCalls(newest).calls[0].outcome != "")  # noted after the event
        calls = stub.ListAdminCalls(newest).calls
        assert stub.GetStatus(admin.GetStatusRequest()).state == admin.RUN_STATE_RUNNING
    assert [(call.caller, call.outcome) for call in calls] == [("SIGHUP", "OK"), ("SIGHUP", "INVALID_ARGUMENT")]


def ready(service: Serve) -> tuple[int, str]:
    """Returns what `/readyz` says."""
    try:
        with urllib.request.urlopen(f"http://{service.addresses()[1]}/readyz", timeout=180) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_stopping_service_is_first_not_ready_then_refuses_then_saves(service: Serve) -> None:
    """All of that while the last step is still computed; status and metrics can be read until the end.

    The answer of Shutdown comes before the last checkpoint, which is of the step that was underway.
    """
    folder = folder_of(service)
    with stub_of(service) as stub, grpc.insecure_channel(service.addresses()[0]) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=""), timeout=120)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        step = stub.GetStatus(admin.GetStatusRequest()).global_step
        wait_for(lambda: stub.GetStatus(admin.GetStatusRequest()).global_step > step)  # a step has just begun
        assert ready(service)[0] == 200
        stub.Shutdown(admin.ShutdownRequest(request_id="9", reason="new kernel"), timeout=180)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        code, text = ready(service)
        with pytest.raises(grpc.RpcError) as caught:
            stub.PauseTraining(admin.PauseTrainingRequest(request_id="10", reason="late"), timeout=180)
        status = stub.GetStatus(admin.GetStatusRequest())
        saved = [event["step"] for event in events(service, "checkpoint_written")]
        assert code == 503
        assert "the service is stopping: new kernel" in text
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "new kernel" in str(caught.value.details())
        assert status.state == admin.RUN_STATE_DRAINING
        assert status.global_step not in saved
    assert service.wait() == 0
    names = [event["event"] for event in service.events()]
    assert names.index("draining") < len(names) - 1 - names[::-1].index("checkpoint_written") < names.index("stopped")
    assert events(service, "checkpoint_written")[-1]["step"] == status.global_step + 1
    assert answered(folder).count("Shutdown") == 1
