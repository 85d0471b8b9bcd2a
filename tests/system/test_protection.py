"""A service with TLS, tokens, passwords and signed commands, used as its operators do: by the command line."""

from __future__ import annotations

import base64
import json
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import chdir, suppress
from dataclasses import dataclass
from pathlib import Path

import bcrypt
import pytest
from typer.testing import CliRunner

from support.processes import Serve, serve
from support.waiting import wait_for
from tolaria.checkpoint.directory import JOURNAL
from tolaria.cli.commands import app

SECRET, PASSWORD = "a-recognisable-leyline-secret", "a-recognisable-password"
ROLES = ("viewer", "operator", "admin")


@dataclass
class Site:
    """The service, the folder that it runs in, and the tokens of its operators."""

    service: Serve
    folder: Path
    address: str
    metrics: str
    tokens: dict[str, str]

    def tolaria(self, *arguments: str, role: str = "", code: int | None = 0, **variables: str) -> str:
        """Runs a command with the variables of clients; returns what it prints."""
        given = {"TOLARIA_ADDRESS": self.address, "TOLARIA_TLS_CA": str(self.folder / "secrets" / "ca.pem")}
        if role:
            given["TOLARIA_TOKEN_FILE"] = str(self.folder / "secrets" / f"{role}.token")
        return tolaria(*arguments, folder=self.folder, code=code, **given | variables)

    def get(self, path: str, password: str = "") -> tuple[int, str]:
        """Requests a path of the metrics server."""
        context = ssl.create_default_context(cafile=str(self.folder / "secrets" / "ca.pem"))
        request = urllib.request.Request(f"https://{self.metrics}{path}")
        if password:
            request.add_header("Authorization", "Basic " + base64.b64encode(f"prom:{password}".encode()).decode())
        try:
            with urllib.request.urlopen(request, context=context, timeout=180) as answer:  # noqa: S310 - https
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def tolaria(*arguments: str, folder: Path, code: int | None = 0, **variables: str) -> str:
    """Runs a command in this process, in the folder; returns standard output and standard error. None: any code."""
    environment: dict[str, str | None] = {name: None for name in os.environ if name.startswith("TOLARIA_")}
    environment |= {"XDG_CONFIG_HOME": str(folder / "config")} | variables
    with chdir(folder):
        done = CliRunner().invoke(app, arguments, env=environment, catch_exceptions=False)
    assert code is None or done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A protected service that trains."""
    folder = tmp_path_factory.mktemp("protected")
    tolaria("certs", "init", "--dir", "secrets", folder=folder)
    for role in ROLES:
        files = ("--file", "secrets/tokens.toml", "--out", f"secrets/{role}.token")
        tolaria("token", "new", f"the-{role}", "--role", role, *files, folder=folder)
    digest = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
    tls = "tls_server_config: {cert_file: secrets/server.pem, key_file: secrets/server.key}"
    (folder / "web.yml").write_text(f"{tls}\nbasic_auth_users: {{prom: {digest}}}\n")
    settings = f"""
[server]
tls_cert = "secrets/server.pem"
tls_key = "secrets/server.key"
tokens = "secrets/tokens.toml"

[metrics]
web_config = "web.yml"

[leyline]
secret = "{SECRET}"
"""
    (folder / "tolaria.toml").write_text(settings)
    with serve("training.epochs=100000", cwd=folder) as service:
        address, metrics = service.addresses()
        tokens = {role: (folder / "secrets" / f"{role}.token").read_text().strip() for role in ROLES}
        found = Site(service, folder, address, metrics, tokens)
        wait_for(lambda: "running" in found.tolaria("status", role="viewer"))
        yield found


def test_each_role_may_do_its_part(site: Site) -> None:
    """Reading, then acting, then ending; without a token nothing, and the answer says how to give one."""
    refused = site.tolaria("status", code=1)
    assert "a token is required" in refused
    assert "TOLARIA_TOKEN_FILE" in refused
    assert "PauseTraining needs the role operator" in site.tolaria("pause", "--reason", "x", role="viewer", code=1)
    assert "state PAUSED" in site.tolaria("pause", "--reason", "a look at it", role="operator")
    assert "StopTraining needs the role admin" in site.tolaria("stop", "--reason", "x", role="operator", code=1)
    site.tolaria("resume", "--reason", "seen", role="admin")
    assert json.loads(site.tolaria("status", "--json", role="viewer"))["runId"]


def test_tls_on_one_side_only_gives_a_hint(site: Site) -> None:
    """Exit code 3, as for a service that does not answer."""
    assert "TOLARIA_TLS_CA" in site.tolaria("status", role="viewer", code=3, TOLARIA_TLS_CA="")


def test_a_profile_replaces_the_variables(site: Site) -> None:
    """One file has address, token and CA for all commands; --profile chooses."""
    path = site.folder / "config" / "tolaria" / "profiles.toml"
    path.parent.mkdir(parents=True)
    secrets = site.folder / "secrets"
    path.write_text(
        f'[lab]\naddress = "{site.address}"\ntls_ca = "{secrets}/ca.pem"\ntoken_file = "{secrets}/viewer.token"\n'
    )
    try:
        assert "running" in tolaria("status", "--profile", "lab", folder=site.folder)
        assert "running" in tolaria("status", folder=site.folder, TOLARIA_PROFILE="lab")
    finally:
        path.unlink()


def test_the_audit_names_who_changed_what_and_why(site: Site) -> None:
    """From the service and from its journal; a viewer may not read it, and what was denied is in it."""
    site.tolaria("checkpoint", "--reason", "before lunch", role="operator")
    site.tolaria("pause", "--reason", "curious", role="viewer", code=1)
    assert "needs the role operator" in site.tolaria("audit", role="viewer", code=1)
    lines = site.tolaria("audit", role="operator").splitlines()
    made = next(line for line in lines if "CreateCheckpoint" in line)
    assert re.search(r"the-operator +operator +127\.0\.0\.1:\d+ +CreateCheckpoint +\d+ +OK +before lunch", made)
    assert any("the-viewer" in line and "PERMISSION_DENIED" in line for line in lines)
    wait_for(lambda: "before lunch" in tolaria("audit", "--state-dir", "state", folder=site.folder))
    logged = [event for event in site.service.events() if event["event"] == "admin_call"]
    assert {"the-operator"} <= {event["caller"] for event in logged if event["reason"] == "before lunch"}


def test_the_metrics_need_a_password_and_probes_do_not(site: Site) -> None:
    """Over TLS; calls are counted by the names of the tokens."""
    assert site.get("/metrics")[0] == 401
    assert site.get("/metrics", "wrong")[0] == 401
    status, text = site.get("/metrics", PASSWORD)
    assert status == 200
    assert 'tolaria_server_calls_total{caller="the-viewer",code="OK"}' in text
    assert site.get("/livez") == (200, '{"live": true}')
    assert site.get("/readyz")[1] in {'{"ready": true}', '{"ready": false}'}


def contents_of(directory: Path) -> dict[Path, bytes]:
    """The bytes of all files below the directory, without those that training removes meanwhile."""
    contents = {}
    for folder, _, names in os.walk(directory):  # unlike rglob, passes over a directory that has gone
        for path in (Path(folder, name) for name in names):
            with suppress(FileNotFoundError):
                contents[path.relative_to(directory)] = path.read_bytes()
    return contents


def test_no_secret_is_shown_or_written(site: Site) -> None:
    """Not in the log, the settings, the status, the metrics, the state directory, or what the lane is started with."""
    site.tolaria("profile", "--steps", "2", "--reason", "a trace", role="operator")
    wrong = site.folder / "wrong.token"
    wrong.write_text("a-recognisable-wrong-token")
    site.tolaria("status", code=1, TOLARIA_TOKEN_FILE=str(wrong))
    shown = [
        *site.service.lines,
        site.tolaria("config", "show"),
        site.tolaria("status", "--json", role="viewer"),
        site.tolaria("audit", "--json", role="operator"),
        site.tolaria("incidents", "--json", role="operator"),
        site.get("/metrics", PASSWORD)[1],
    ]
    found = contents_of(site.folder / "state")
    assert {Path(JOURNAL)} < found.keys()
    written = list(found.values())
    assert any(b"traceEvents" in content for content in written)
    lanes = [pid for pid in descendants(site.service.process.pid) if b"tolaria.lane" in proc(pid, "cmdline")]
    assert lanes
    written += [proc(pid, name) for pid in lanes for name in ("environ", "cmdline")]
    key = (site.folder / "secrets" / "server.key").read_text().splitlines()[1]
    for secret in (SECRET, PASSWORD, *site.tokens.values(), "a-recognisable-wrong-token", key):
        assert not [text for text in shown if secret in text]
        assert not [content for content in written if secret.encode() in content]


def test_no_core_file_is_written(site: Site) -> None:
    """Of the service and of the processes that it starts; 1 byte is what also keeps Linux from piping a core."""
    for pid in (site.service.process.pid, *descendants(site.service.process.pid)):
        (line,) = [line for line in proc(pid, "limits").decode().splitlines() if line.startswith("Max core file size")]
        assert line.split()[4] in {"0", "1"}


def test_a_revoked_token_is_refused_while_the_service_runs(site: Site) -> None:
    """And a new one accepted, within seconds."""
    new = ("--role", "viewer", "--file", "secrets/tokens.toml", "--out", "secrets/guest.token")
    tolaria("token", "new", "guest", *new, folder=site.folder)
    wait_for(lambda: "running" in site.tolaria("status", role="guest", code=None))
    tolaria("token", "revoke", "guest", "--file", "secrets/tokens.toml", folder=site.folder)
    wait_for(lambda: "not known" in site.tolaria("status", role="guest", code=None))


def proc(pid: int, name: str) -> bytes:
    """A file of a process in /proc; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def descendants(pid: int) -> list[int]:
    """Ids of the child processes of a process, and of theirs."""
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        for child in (thread / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found
