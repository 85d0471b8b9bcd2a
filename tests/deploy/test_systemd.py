"""deploy/systemd, checked by systemd's own tools, by the settings, and with a process as systemd starts it."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from faults.interrupted import unpack
from support.processes import serve
from support.waiting import wait_for
from tolaria.cli.commands import app
from tolaria.config import EmergencySettings, ServiceSettings

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
UNIT = FOLDER / "tolaria.service"
BACKUP = FOLDER / "tolaria-backup.service"
JOB = FOLDER.parent / "kubernetes" / "base" / "job.yaml"


def analyze() -> str:
    """Returns the path of systemd-analyze; skips without it, and fails in CI."""
    program = shutil.which("systemd-analyze")
    if program is None:
        missing = "systemd-analyze is missing: Debian's package systemd has it"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return program


def service(unit: Path = UNIT) -> dict[str, str]:
    """The section [Service]; of a key that occurs twice the last value."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(unit.read_text())
    return dict(parser["Service"])


@pytest.mark.parametrize("name", [UNIT.name, BACKUP.name, "tolaria-backup.timer"])
def test_systemd_accepts_the_unit(name: str, tmp_path: Path) -> None:
    """`systemd-analyze verify` says nothing, with a program that exists."""
    for path in [UNIT, BACKUP, BACKUP.with_suffix(".timer")]:
        (tmp_path / path.name).write_text(path.read_text().replace("/opt/tolaria/bin/tolaria", "/bin/true"))

    done = subprocess.run(
        [analyze(), "verify", "--man=no", tmp_path / name], check=False, capture_output=True, text=True
    )

    lines = [line for line in (done.stdout + done.stderr).splitlines() if name.partition(".")[0] in line]
    assert (done.returncode, lines) == (0, [])


def test_the_nightly_backup_is_that_of_the_service_and_works(tmp_path: Path) -> None:
    """With the same program, settings, user and directories; as systemd calls it, it makes a backup and keeps seven."""
    unit, backup = service(), service(BACKUP)
    program, *arguments = shlex.split(backup["ExecStart"])

    assert [program, *arguments[1:3]] == shlex.split(unit["ExecStart"])[:1] + shlex.split(unit["ExecStart"])[2:]
    assert all(backup[key] == unit[key] for key in ("User", "Group", "WorkingDirectory", "UMask", "LimitCORE"))
    assert backup["ReadWritePaths"] == unit["WorkingDirectory"]
    folder = f"/var/lib/{backup['StateDirectory']}"
    unpack(tmp_path)
    (tmp_path / "backups").mkdir()
    (tmp_path / "tolaria.toml").write_text(f'[state]\ndir = "{tmp_path / "state"}"\n')
    places = {folder: str(tmp_path / "backups"), "/etc/tolaria/tolaria.toml": str(tmp_path / "tolaria.toml")}
    for _ in range(8):
        done = CliRunner().invoke(app, [places.get(each, each) for each in arguments])
        assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "backups").glob("tolaria-*"))) == 7


@pytest.mark.parametrize("unit", [UNIT, BACKUP], ids=lambda unit: unit.stem)
def test_systemd_calls_the_unit_well_protected(unit: Path) -> None:
    """Its exposure is at most 2.5 of 10: "OK" in systemd's words, where an ordinary unit has 9.6."""
    done = subprocess.run(
        [analyze(), "security", "--offline=true", "--threshold=25", "--no-pager", unit],
        check=False,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overall exposure level" in done.stdout


def test_times_leave_room_for_the_service(tmp_path: Path) -> None:
    """The manager waits longer than a drain, and its watchdog is slower than the sentinel."""
    unit, emergency = service(), EmergencySettings()
    sentinel_s = emergency.heartbeat_timeout_s + emergency.grace_s + emergency.drain_s

    assert float(unit["TimeoutStopSec"]) > 2 * ServiceSettings().drain_timeout_s
    assert float(unit["WatchdogSec"]) > sentinel_s + 25
    (probe,) = [c["startupProbe"] for c in YAML(typ="safe").load(JOB)["spec"]["template"]["spec"]["containers"]]
    assert unit["TimeoutStartSec"].endswith("min")  # the default of 90 s is too short to read a large checkpoint
    assert 60 * int(unit["TimeoutStartSec"].removesuffix("min")) >= probe["periodSeconds"] * probe["failureThreshold"]
    assert unit["OOMPolicy"] == "continue"
    assert unit["KillMode"] == "mixed"
    assert unit["RestartPreventExitStatus"] == "2"


def test_every_family_of_sockets_that_is_used_is_allowed() -> None:
    """Beside addresses, those of getifaddrs, by which gloo and `interface_of` find the interface of an address."""
    allowed = service()["RestrictAddressFamilies"].split()

    assert set(allowed) == {"AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"}


def test_unit_and_user_agree() -> None:
    """The user's home is the state directory, where the service works."""
    user = (FOLDER / "tolaria.sysusers.conf").read_text().splitlines()[-1].split()

    assert user[:2] == ["u", service()["User"]]
    assert user[-1] == service()["WorkingDirectory"] == f"/var/lib/{service()['StateDirectory']}"


def test_a_real_service_reports_to_its_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ready once it answers, then alive with what it does, and stopping at SIGTERM; its children report nothing."""
    assert service()["Type"] == "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "manager"))
        manager.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "manager"))
        monkeypatch.setenv("WATCHDOG_USEC", "300000")
        with serve("training.epochs=100000", cwd=tmp_path, reference_peers=True) as process:
            assert "READY=1\nWATCHDOG=1\nSTATUS=starting" in manager.recv(4096).decode()
            process.addresses()
            wait_for(lambda: re.search(r"STATUS=running, epoch \d+ of 100000", manager.recv(4096).decode()) is not None)
            for child in process.children():
                assert b"NOTIFY_SOCKET" not in Path(f"/proc/{child}/environ").read_bytes()
            process.terminate()
            wait_for(lambda: manager.recv(4096).decode().startswith("STOPPING=1\n"))
            assert process.wait() == 0
