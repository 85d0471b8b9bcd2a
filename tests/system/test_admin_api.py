"""docs/admin-api.md: its examples, run against a service."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from typer.testing import CliRunner

from leyline.v1 import admin_service_pb2 as messages
from support.processes import Serve, python_path, serve, stub_of
from support.waiting import wait_for
from tolaria.cli.commands import app
from tolaria.rpc.callers import ROLES
from tolaria.security.tokens import Role

PAGE = (Path(__file__).parents[2] / "docs" / "admin-api.md").read_text(encoding="utf-8")
SERVICE = messages.DESCRIPTOR.services_by_name["TolariaAdminService"]
ADDRESS = "127.0.0.1:50051"
SECTIONS = {text.partition("\n")[0]: text for text in PAGE.split("\n## ")[1:]}
BUF = Path(sys.executable).with_name("buf")

ENDING = ("StopTraining", "Shutdown")
"""Sections whose examples come last."""


def code(section: str, language: str) -> str:
    """Returns the example in a language."""
    return str(re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)[0])


def command(name: str) -> list[str]:
    """Returns the arguments of the section's example of the command line."""
    line = code(SECTIONS[name], "sh").splitlines()[1]
    program, *arguments = shlex.split(line)
    assert program == "tolaria"
    return arguments


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """A service with a restore point."""
    stays = "emergency.recovery_epochs=1000000"  # until it is cleared
    with serve("training.epochs=100000", stays, cwd=tmp_path_factory.mktemp("api"), reference_peers=True) as started:
        with stub_of(started) as stub:
            points = messages.ListRestorePointsRequest()
            wait_for(lambda: any(point.stable for point in stub.ListRestorePoints(points).restore_points))
        yield started


def test_each_rpc_has_a_section_with_its_role() -> None:
    """And examples of all three kinds."""
    assert list(SECTIONS)
    assert SECTIONS.keys() == {method.name for method in SERVICE.methods}
    for name, text in SECTIONS.items():
        role = ROLES.get(f"/leyline.v1.TolariaAdminService/{name}", Role.ADMIN)
        assert f"Role: {role.name.lower()}." in text
        assert code(text, "sh").startswith(f"call {name} '")
        assert f"{name}(" in code(text, "python")


@pytest.mark.parametrize("name", SECTIONS)
def test_data_for_buf_curl_are_requests(name: str) -> None:
    """JSON of the request's fields, complete where something is changed."""
    _, _, data = shlex.split(code(SECTIONS[name], "sh").splitlines()[0])
    kind: Any = getattr(messages, SERVICE.methods_by_name[name].input_type.name)
    request = json_format.Parse(data, kind())
    assert "request_id" not in kind.DESCRIPTOR.fields_by_name or (request.request_id and request.reason)


def metrics(service: Serve) -> str:
    """Returns the metrics of the service."""
    with urllib.request.urlopen(f"http://{service.addresses()[1]}/metrics", timeout=180) as response:
        return str(response.read().decode())


def run_python(service: Serve, names: list[str]) -> None:
    """Runs the examples of these sections in one namespace."""
    setup = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0].replace(ADDRESS, service.addresses()[0])
    namespace: dict[str, Any] = {"print": lambda *_values: None}
    exec(compile(setup, "docs/admin-api.md", "exec"), namespace)  # noqa: S102 - our own examples
    try:
        for name in names:
            exec(compile(code(SECTIONS[name], "python"), name, "exec"), namespace)  # noqa: S102 - likewise
    finally:
        namespace["channel"].close()


def test_the_examples_in_python_run(service: Serve) -> None:
    """In the order of the page."""
    run_python(service, [name for name in SECTIONS if name not in ENDING])


def test_the_examples_of_the_command_line_run(service: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page; those that follow a run or a service are below."""
    address = service.addresses()[0]
    monkeypatch.setenv("TOLARIA_ADDRESS", address)
    for name in [name for name in SECTIONS if name not in {*ENDING, "WatchStatus", "StreamTelemetry"}]:
        done = CliRunner().invoke(app, [part.replace(ADDRESS, address) for part in command(name)])
        assert done.exit_code == 0, (name, done.output)
        assert done.stdout


def test_the_examples_by_buf_curl_run(service: Serve, request: pytest.FixtureRequest) -> None:
    """The function of the page; all of them with --long, as each starts a program."""
    if not BUF.exists():
        pytest.skip("buf is missing: the package buf-bin of PyPI has it")
    whole = bool(request.config.getoption("--long"))
    streams = {"WatchStatus", "StreamTelemetry"}
    names = (
        [name for name in SECTIONS if name not in {*ENDING, *streams}] if whole else ["GetStatus", "AdjustLearningRate"]
    )
    define = re.findall(r"```sh\n(call.*?)```", PAGE, re.DOTALL)[0].replace(ADDRESS, service.addresses()[0])
    script = "\n".join([f"set -e\n{define}", *(code(SECTIONS[name], "sh").splitlines()[0] for name in names)])
    path = f"{BUF.parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, timeout=110, check=False, env={"PATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert json.JSONDecoder().raw_decode(done.stdout)[0]["job"] == "digits"


def test_the_examples_that_follow_and_end_run(service: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream of telemetry and the watched run end by themselves, after the run and with the service."""
    address = service.addresses()[0]
    monkeypatch.setenv("TOLARIA_ADDRESS", address)
    environment = {"PATH": "/usr/bin:/bin", "TOLARIA_ADDRESS": address, "PYTHONPATH": python_path()}
    following = subprocess.Popen(
        [sys.executable, "-m", "tolaria", *command("StreamTelemetry")],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: "\ntolaria_telemetry_subscribers 1" in metrics(service))
    stopped = CliRunner().invoke(app, command("StopTraining"))
    assert stopped.exit_code == 0, stopped.output
    watched = CliRunner().invoke(app, command("WatchStatus"))
    assert (watched.exit_code, "finished" in watched.stdout) == (0, True)
    with pytest.raises(grpc.RpcError) as caught:
        run_python(service, ["StopTraining"])
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    run_python(service, ["Shutdown"])
    assert CliRunner().invoke(app, command("Shutdown")).exit_code in {1, 3}  # it is stopping, or has ended
    assert service.wait() == 0
    assert following.wait(180) == 0
    assert following.stderr is not None
    following.stderr.close()
