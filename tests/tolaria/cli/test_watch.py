from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from typer.testing import CliRunner

from leyline.v1.admin_service_pb2 import GetStatusResponse, RunState
from support.fake_admin import FakeAdmin, fake_admin, serving, status_of, whole_run
from tolaria.cli import watch as watch_module
from tolaria.cli.asking import Target
from tolaria.cli.failures import ServiceUnreachableError
from tolaria.cli.grammar import app
from tolaria.config import Address

Serve = Callable[[FakeAdmin], str]

runner = CliRunner()


def test_watch_follows_the_run_to_its_end(serve_fake: Serve) -> None:
    """A line an epoch without a terminal; a finished run is exit code 0, though the service goes on serving."""
    done = runner.invoke(app, ["watch", "--address", serve_fake(fake_admin(whole_run()))])
    assert done.exit_code == 0
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == [
        "state running",
        "epoch 1/3",
        "epoch 2/3",
        "epoch 3/3",
        "state finished",
    ]


def test_watch_json_is_one_status_a_line(serve_fake: Serve) -> None:
    """Each line is the contract's own mapping."""
    done = runner.invoke(app, ["watch", "--json", "--address", serve_fake(fake_admin(whole_run()))])
    assert [json.loads(line)["epoch"] for line in done.stdout.splitlines()] == [1, 2, 3, 3]


def test_watch_of_a_failing_run_fails(serve_fake: Serve) -> None:
    """A failed run is exit code 1, with its reason."""
    failed = status_of(1, state=RunState.RUN_STATE_FAILED)
    failed.state_reason = "loss is NaN"
    done = runner.invoke(app, ["watch", "--address", serve_fake(fake_admin([failed]))])
    assert (done.exit_code, done.stderr) == (1, "tolaria: the run failed: loss is NaN\n")


def test_watch_ends_when_the_service_goes(serve_fake: Serve) -> None:
    """A stream that ends before the run is over is a service that is gone: exit code 3."""
    done = runner.invoke(app, ["watch", "--address", serve_fake(fake_admin([status_of(1)], ends=True))])
    assert done.exit_code == 3
    assert "gone before its run was over" in done.stderr


def test_watch_waits_for_a_service_that_comes_later() -> None:
    """With --wait a service that is not there yet is waited for, and that is told once."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "tolaria", "watch", "--wait", "--address", address]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert process.stderr.readline().startswith(f"waiting: no service answers at {address}")
    with process, serving(fake_admin(whole_run()), address):
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out.splitlines()[-1] == "state finished"
    assert err == ""


def test_waiting_is_told_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """However long it takes, each reason for waiting is one line."""
    answers: Iterator[ServiceUnreachableError | GetStatusResponse] = iter(
        [ServiceUnreachableError("refused"), ServiceUnreachableError("refused"), whole_run()[-1]]
    )

    async def follow_run(*_: object) -> GetStatusResponse:
        answer = next(answers)
        if isinstance(answer, ServiceUnreachableError):
            raise answer
        return answer

    monkeypatch.setattr(watch_module, "follow_run", follow_run)
    monkeypatch.setattr(watch_module, "_RETRY_S", 0.0)
    watch_module.watch(Target(Address("127.0.0.1", 1), 1.0), as_json=False, wait=True)
    assert capsys.readouterr().err == "waiting: refused\n"
