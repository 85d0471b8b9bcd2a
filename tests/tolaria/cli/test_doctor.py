from __future__ import annotations

import json
import os
import socket
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from support.fake_admin import fake_admin, serving, status_of
from support.old_journals import write_as_schema
from support.security import Pki
from tolaria.cli import doctor
from tolaria.cli.commands import app
from tolaria.cli.doctor import Diagnosis, TorchFound, Verdict, examine
from tolaria.cli.doctor import look_at_torch as really_look
from tolaria.config import load_settings
from tolaria.journal.rows import values_digest

runner = CliRunner()
FREE = ("server.listen=127.0.0.1:0", "metrics.listen=127.0.0.1:0")


@pytest.fixture(autouse=True)
def quick_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the look at torch, which takes seconds: a CPU, and no job but digits."""

    def look(job: str) -> TorchFound:
        return TorchFound("2", 0, mps=False, job_error="" if job == "digits" else f"there is no job {job}")

    monkeypatch.setattr(doctor, "look_at_torch", look)


def found(*overrides: str) -> dict[str, Diagnosis]:
    """The findings by check."""
    return {finding.check: finding for finding in examine(load_settings(None, [*FREE, *overrides]))}


def problems(findings: dict[str, Diagnosis]) -> dict[str, Verdict]:
    """The verdicts of the checks that found something, apart from those of the machine that runs the tests."""
    machine = {"clock", "cores", "disk speed", "descriptors"}
    return {name: f.verdict for name, f in findings.items() if f.verdict is not Verdict.OK and name not in machine}


def test_a_sound_machine_has_no_problems(tmp_path: Path) -> None:
    """Nothing is left behind, and every line without advice is ok."""
    findings = found()
    assert problems(findings) == {}
    assert all(bool(finding.advice) == (finding.verdict is not Verdict.OK) for finding in findings.values())
    assert list(tmp_path.iterdir()) == []


def test_an_address_in_use_is_in_the_way() -> None:
    """The finding names the setting."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        findings = found(f"metrics.listen=127.0.0.1:{other.getsockname()[1]}")
    assert problems(findings) == {"metrics.listen": Verdict.FAILED}
    assert findings["metrics.listen"].advice == "end what uses it, or set metrics.listen"


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
def test_an_admin_port_that_others_reach_is_a_warning(listen: str) -> None:
    """Its clients can stop the run; metrics may be scraped from other machines."""
    if listen.startswith("[") and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    assert problems(found(f"server.listen={listen}", "server.insecure=true")) == {"server.listen": Verdict.WARNING}
    assert problems(found("metrics.listen=0.0.0.0:0")) == {}


def test_state_directory_must_be_writable(tmp_path: Path) -> None:
    """A file in its place is in the way; one that others can write is a warning."""
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    assert problems(found(f"state.dir={tmp_path / 'file' / 'state'}")) == {"state.dir": Verdict.FAILED}
    assert problems(found(f"state.dir={tmp_path / 'open'}")) == {"state.dir": Verdict.WARNING}
    assert list((tmp_path / "open").iterdir()) == []


def test_a_state_that_this_version_cannot_use_is_in_the_way(tmp_path: Path) -> None:
    """Of a newer version, or half restored; an older or damaged one is not."""
    state = tmp_path / "state"
    state.mkdir()
    write_as_schema(2, state / "journal.sqlite3")
    assert found(f"state.dir={state}")["state schema"].detail.startswith("2; the next start upgrades it")
    with closing(sqlite3.connect(state / "journal.sqlite3")) as connection, connection:
        connection.execute("UPDATE meta SET schema_version = 99, row_digest = ?", (values_digest("meta", (99,)),))
    newer = found(f"state.dir={state}")
    assert problems(newer) == {"state schema": Verdict.FAILED}
    assert "has schema 99" in newer["state schema"].detail
    (state / "journal.sqlite3").write_bytes(b"nonsense")
    assert problems(found(f"state.dir={state}")) == {"state schema": Verdict.WARNING}
    (state / ".restore-placing-20260101T000000Z").mkdir()
    assert problems(found(f"state.dir={state}")) == {"state schema": Verdict.FAILED}


@pytest.mark.parametrize(("free", "verdict"), [(2**40, Verdict.OK), (2**30, Verdict.WARNING), (2**20, Verdict.FAILED)])
def test_little_space_is_a_finding(free: int, verdict: Verdict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little is in the way of a start."""
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    assert found()["disk space"].verdict is verdict


def test_shared_memory_must_be_there(tmp_path: Path) -> None:
    """The advice says what to mount."""
    finding = found(f"signals.path={tmp_path / 'missing' / 'board'}")["shared memory"]
    assert finding.verdict is Verdict.FAILED
    assert "tmpfs" in finding.advice


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.device=cuda"], {"torch": Verdict.FAILED}),
        (["training.device=cuda:1"], {"torch": Verdict.FAILED}),
        (["training.device=cpu"], {}),
        (["training.job=nothing:here"], {"training.job": Verdict.FAILED}),
    ],
)
def test_device_and_job_must_be_there(overrides: Sequence[str], expected: dict[str, Verdict]) -> None:
    """A device that torch does not have, and a job that cannot be found, are in the way."""
    assert problems(found(*overrides)) == expected


def test_a_torch_that_cannot_be_imported_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice shows why."""
    monkeypatch.setattr(doctor, "look_at_torch", lambda _job: None)
    assert problems(found()) == {"torch": Verdict.FAILED}
    assert "import torch" in found()["torch"].advice


@pytest.mark.parametrize(
    ("device", "there"),
    [("auto", True), ("cpu", True), ("cuda", True), ("cuda:1", True), ("cuda:2", False), ("mps", False)],
)
def test_devices_are_counted(device: str, there: bool) -> None:
    """cuda:2 is the third of them."""
    assert TorchFound("2", 2, mps=False, job_error="").has(device) is there


def test_an_absent_peer_is_a_warning() -> None:
    """Training goes on without it."""
    findings = found("tamiyo.target=127.0.0.1:1")
    assert problems(findings) == {"tamiyo": Verdict.WARNING}
    assert findings["kasmina"].detail.startswith("no target")


def test_a_run_without_a_controller_needs_no_peers() -> None:
    """None is started or called."""
    findings = found("control.enabled=false")
    assert {findings[name].detail for name in ("tamiyo", "kasmina")} == {"not needed: control.enabled is false"}


def test_a_secret_that_others_can_read_is_a_warning(tmp_path: Path) -> None:
    """In the settings file of the working directory."""
    file = tmp_path / "tolaria.toml"
    file.write_text(f"[leyline]\nsecret = '{'x' * 32}'\n")
    file.chmod(0o644)
    assert problems(found()) == {"secrets": Verdict.WARNING}
    file.chmod(0o600)
    assert problems(found()) == {}


def test_command_prints_a_line_each_and_fails_for_failures() -> None:
    """With advice below; --json has the same."""
    options = [part for override in FREE for part in ("--set", override)]
    sound = runner.invoke(app, ["doctor", *options])
    assert (sound.exit_code, sound.stdout.splitlines()[0]) == (0, "ok       server.listen: 127.0.0.1:0 is free")
    broken = runner.invoke(app, ["doctor", "--json", *options, "--set", "training.job=nothing:here"])
    assert broken.exit_code == 1
    (job,) = [each for each in json.loads(broken.stdout) if each["check"] == "training.job"]
    assert job["verdict"] == "failed"
    assert "in the way of a start: training.job" in broken.stderr
    wrong = runner.invoke(app, ["doctor", "--set", "training.epochs=-1"])
    assert wrong.exit_code == 2


def test_a_running_service_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its addresses are in use by itself."""
    monkeypatch.setattr(doctor, "probe", lambda address, service: "")
    with serving(fake_admin([status_of(1)])) as address:
        findings = found(f"server.listen={address}")
    assert findings["server.listen"].detail == f"a service answers at {address} already"
    assert problems(findings) == {}


def test_user_is_named_where_a_directory_is_not_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number that chown takes, also in a container where the user has no name."""
    monkeypatch.setattr("os.access", lambda *_: False)
    assert f"chown it to user {os.getuid()}" in found()["state.dir"].advice


def test_real_torch_and_a_real_job_are_found() -> None:
    """In a child process, as the command looks."""
    found = really_look("digits")
    assert found is not None
    assert (found.job_error, found.version[0]) == ("", "2")


def test_files_that_a_start_refuses_are_in_the_way(tmp_path: Path) -> None:
    """Each is named by its setting; a key that all users can read is a warning, sound files are one line."""
    pki = Pki(tmp_path)
    cert = pki.server()
    given = [f"server.tls_cert={cert}", f"server.tls_key={cert.with_suffix('.key')}"]
    assert problems(found(*given)) == {}
    assert found(*given)["credentials"].verdict is Verdict.OK
    cert.with_suffix(".key").chmod(0o644)
    findings = found(*given, "server.tokens=gone.toml")
    assert problems(findings) == {"server.tls_key": Verdict.WARNING, "server.tokens": Verdict.FAILED}
    assert findings["server.tls_key"].advice == f"chmod o-r {cert.with_suffix('.key')}"


def test_an_address_that_a_start_refuses_is_in_the_way() -> None:
    """Other machines could reach it without TLS and tokens; the advice is what the start says."""
    findings = found("server.listen=0.0.0.0:0")
    assert findings["protection"].verdict is Verdict.FAILED
    assert "server.insecure" in findings["protection"].advice
    assert "protection" not in found("server.listen=0.0.0.0:0", "server.insecure=true")


def test_a_job_that_is_not_there_is_named_without_the_class_of_the_error() -> None:
    """As `tolaria serve` says it."""
    found = really_look("nope")
    assert found is not None
    assert "nope" in found.job_error
    assert "Error" not in found.job_error
