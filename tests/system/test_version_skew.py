"""The last release beside this version: services, clients and peers of both, and one state directory.

`tests/fixtures/last-release.zip` is the code of the last release; `scripts/keep-release` renews it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from leyline.v1 import admin_service_pb2 as admin
from support.processes import Serve, python_path, serve, status, stub_of
from support.waiting import wait_for
from tolaria import __version__
from tolaria.checkpoint.directory import JOURNAL
from tolaria.cli.commands import app
from tolaria.journal.reader import schema_of
from tolaria.journal.rows import SCHEMA_VERSION

RELEASE = Path(__file__).parents[1] / "fixtures" / "last-release.zip"
RELEASE_VERSION, RELEASE_SCHEMA = "0.1.0", 2
SETTINGS = (
    *("training.options.width=8", "training.device=cpu", "training.epochs=1000000", "rollback.automatic=false"),
    *("training.deterministic=true", "rollback.full_budget_s=60"),  # boundaries wait for the peers under load too
    "checkpoint.keep_last=1000",  # the one that a client has asked for, however many epochs end before it looks
)

# A client of the other version: runs commands one after the other, and prints exit codes and output as JSON.
CLIENT = """
import json, sys
from typer.testing import CliRunner
from tolaria.cli.commands import app
done = [CliRunner().invoke(app, line) for line in json.loads(sys.argv[1])]
print(json.dumps([[each.exit_code, each.stdout] for each in done]))
"""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the code of the last release."""
    folder = tmp_path_factory.mktemp("release")
    with zipfile.ZipFile(RELEASE) as archive:
        archive.extractall(folder)
    return folder


@contextmanager
def peers(cwd: Path, code: Path | None) -> Iterator[list[str]]:
    """Runs the reference peers of a version; yields their settings."""
    with ExitStack() as stack:
        settings = []
        for name in ("tamiyo", "kasmina"):
            process = subprocess.Popen(
                [sys.executable, "-m", "tolaria", "peer", name, "--listen", "127.0.0.1:0", "--while-stdin"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=cwd,
                env={"PYTHONPATH": python_path(code)},
            )  # fmt: skip
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            settings.append(f"{name}.target={json.loads(process.stdout.readline())['listening']}")
        yield settings


def commands(address: str) -> list[list[str]]:
    """What every version of the command line can ask of every service."""
    target = ["--address", address, "--timeout", "60"]
    return [
        ["status", *target, "--json"],
        ["pause", *target, "--reason", "skew", "--json"],
        ["resume", *target, "--reason", "skew", "--json"],
        ["checkpoint", *target, "--reason", "skew", "--json"],
        ["restore-points", *target, "--json"],
        ["lr", *target, "--factor", "0.5", "--for-steps", "10", "--reason", "skew", "--json"],
        ["rollback", *target, "--tier", "full", "--reason", "skew", "--json"],
        ["incidents", *target, "--json"],
        ["conservative", "on", *target, "--reason", "skew", "--json"],
        ["conservative", "off", *target, "--reason", "skew", "--json"],
    ]


def answers_of(done: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    """The answers as JSON; every command has succeeded."""
    assert [code for code, _ in done] == [0] * len(done), done
    return [json.loads(text) for _, text in done]


def check_answers(answers: list[dict[str, Any]], version: str, service: Serve) -> None:
    """What each command must have done, whichever side is newer."""
    shown, paused, resumed, kept, points, _, back, incidents, *_ = answers
    assert shown["version"] == version
    assert paused["state"] == "RUN_STATE_PAUSED"
    assert resumed["state"] == "RUN_STATE_RUNNING"
    assert kept["checkpointId"] in {point.get("checkpointId") for point in points["restorePoints"]}
    assert back["coordinated"], service.events()[-5:]
    assert back["stateDigest"] == back["expectedDigest"]
    assert incidents["incidents"][0]["kind"] == "rollback"


def trained_with_peers(service: Serve) -> None:
    """Waits until the peers of the other version have answered, and epochs went on."""
    with stub_of(service) as stub:
        wait_for(lambda: status(stub).epoch > 3 and bool(status(stub).kasmina_answer and status(stub).tamiyo_answer))
        assert status(stub).commands_rejected == 0, status(stub)


@pytest.mark.slow
@pytest.mark.timeout(900)  # it starts three services and four peers
def test_the_last_release_and_this_version_work_together(tmp_path: Path, release: Path) -> None:
    """The old service with new peers and client, then the new one with old peers and client, then the old one again.

    All on one state directory, which is upgraded in place, and downgraded.
    """
    with peers(tmp_path, None) as new_peers, peers(tmp_path, release) as old_peers:
        with serve(*SETTINGS, *new_peers, cwd=tmp_path, code=release) as service:
            trained_with_peers(service)
            step = new_client_and_old_service(service)
            service.terminate()
            assert service.wait() == 0
        state = tmp_path / "state"
        assert schema_of(state / JOURNAL) == RELEASE_SCHEMA

        with serve(*SETTINGS, *old_peers, cwd=tmp_path) as service:
            trained_with_peers(service)
            (resumed,) = [line for line in service.events() if line["event"] == "resumed"]
            assert resumed["step"] >= step
            upgraded = [line["detail"] for line in service.events() if line["event"] == "state"]
            assert any(f"from schema {RELEASE_SCHEMA} to {SCHEMA_VERSION}" in detail for detail in upgraded), upgraded
            step = old_client_and_new_service(service, release, tmp_path)
            service.terminate()
            assert service.wait() == 0
        assert schema_of(state / JOURNAL) == SCHEMA_VERSION

        with serve(*SETTINGS, *new_peers, cwd=tmp_path, code=release) as service:
            assert service.wait() == 2  # the last release refuses what it does not know
        done = CliRunner().invoke(app, ["state", "downgrade", "--to", str(RELEASE_SCHEMA), "--state-dir", str(state)])
        assert done.exit_code == 0, done.output
        assert "admin_calls" in done.output  # those are lost
        with serve(*SETTINGS, *new_peers, cwd=tmp_path, code=release) as service:
            trained_with_peers(service)
            (resumed,) = [line for line in service.events() if line["event"] == "resumed"]
            assert resumed["step"] >= step
    shown = CliRunner().invoke(app, ["verify", "--state-dir", str(state)])
    assert shown.exit_code == 0, shown.output


def new_client_and_old_service(service: Serve) -> int:
    """Old calls succeed; new ones name the version of the service. Returns the step of a checkpoint."""
    address = service.addresses()[0]
    done = [CliRunner().invoke(app, command) for command in commands(address)]
    answers = answers_of([(each.exit_code, each.stdout) for each in done])
    check_answers(answers, RELEASE_VERSION, service)
    new = {"audit": "ListAdminCalls", "export": "ExportModel", "telemetry": "StreamTelemetry"}
    for command, method in new.items():
        options = ["--to", "x"] if command == "export" else []
        refused = CliRunner().invoke(app, [command, *options, "--address", address])
        assert refused.exit_code == 1, refused.output
        assert refused.stderr == (
            f"tolaria: {address} is Tolaria {RELEASE_VERSION}, which does not offer {method} (UNIMPLEMENTED); "
            f"this command is of Tolaria {__version__}\n"
        )
    return int(answers[3]["globalStep"])


def old_client_and_new_service(service: Serve, release: Path, cwd: Path) -> int:
    """Every command of the last release succeeds; a field that is newer than the service is refused, and does nothing.

    Returns the step of a checkpoint.
    """
    address = service.addresses()[0]
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(commands(address))],
        capture_output=True, text=True, cwd=cwd, timeout=300, check=False, env={"PYTHONPATH": python_path(release)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = answers_of(json.loads(done.stdout))
    check_answers(answers, __version__, service)
    with stub_of(service) as stub:
        newer = admin.PauseTrainingRequest(request_id="p", reason="skew").SerializeToString() + b"\xfa\x3f\x01x"
        with pytest.raises(Exception, match=r"field 1023 of PauseTrainingRequest.*the client is newer") as refused:
            stub.PauseTraining(admin.PauseTrainingRequest.FromString(newer), timeout=180)
        assert refused.value.code().name == "INVALID_ARGUMENT"  # type: ignore[attr-defined] # of grpc
        assert status(stub).state == admin.RUN_STATE_RUNNING
        read = admin.GetStatusRequest.FromString(b"\xfa\x3f\x01x")  # harmless where nothing is changed
        assert stub.GetStatus(read, timeout=180).version == __version__
    return int(answers[3]["globalStep"])
