"""`tolaria certs`, `tolaria token`, `tolaria audit --state-dir`, and what a service refuses to start without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tolaria.checkpoint.directory import JOURNAL
from tolaria.cli.commands import app
from tolaria.journal.database import Journal
from tolaria.journal.rows import AdminCallRow
from tolaria.security.certificates import TlsFiles, now_utc
from tolaria.security.tokens import PREFIX, Role, Tokens

FILE = "secrets/tokens.toml"


def run(*arguments: str, code: int = 0) -> Result:
    """Runs a command in this process."""
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def test_a_new_token_is_printed_and_only_its_digest_is_kept() -> None:
    """Alone on standard output, for a shell to take; the file is its owner's."""
    token = run("token", "new", "alice", "--role", "operator", "--file", FILE).stdout
    assert token.startswith(PREFIX)
    assert token.count("\n") == 1
    assert token.strip() not in Path(FILE).read_text()
    assert Path(FILE).stat().st_mode & 0o777 == 0o600
    found = Tokens.read(FILE)[0].find(token.strip(), now_utc())
    assert (found.name, found.role, found.expires) == ("alice", Role.OPERATOR, None)


def test_a_token_can_be_written_to_a_file_and_kept() -> None:
    """Nothing on standard output; --keep changes nothing the second time, and without it the name is refused."""
    new = ("token", "new", "bob", "--role", "viewer", "--file", FILE, "--out", "secrets/bob.token", "--days", "3")
    assert run(*new).stdout == ""
    before = Path("secrets/bob.token").read_text()
    assert Path("secrets/bob.token").stat().st_mode & 0o777 == 0o600
    run(*new, "--keep")
    assert "there is a token bob already" in run(*new, code=2).output
    assert Path("secrets/bob.token").read_text() == before


def test_tokens_are_listed_and_revoked() -> None:
    """The others stay as they are; the last one cannot be revoked, since a service needs one."""
    for name, days in (("a", ()), ("b", ("--days", "1"))):
        run("token", "new", name, "--role", "viewer", "--file", FILE, *days)
    lines = run("token", "list", "--file", FILE).stdout.splitlines()
    assert lines[0].split() == ["a", "viewer", "does", "not", "expire"]
    assert lines[1].startswith("b ")
    assert "expires 2" in lines[1]
    run("token", "revoke", "a", "--file", FILE)
    assert [entry.name for entry in Tokens.read(FILE)[0].entries] == ["b"]
    assert Tokens.read(FILE)[0].entries[0].expires is not None
    assert "there is no token a" in run("token", "revoke", "a", "--file", FILE, code=2).output
    assert "is the only token" in run("token", "revoke", "b", "--file", FILE, code=2).output


def test_a_wrong_name_makes_no_token() -> None:
    """Nor a file of one."""
    output = run("token", "new", "a b", "--role", "viewer", "--file", FILE, "--out", "x", code=2).output
    assert "a name has 1 to 64" in output
    assert not Path(FILE).exists()
    assert not Path("x").exists()


def test_certificates_are_made_once_and_renewed_for_another_host() -> None:
    """What the printed settings name can be used; with --ca-dir the key of the CA is elsewhere."""
    init = ("certs", "init", "--dir", "certs", "--ca-dir", "ca")
    shown = run(*init, "--host", "gpu1").stderr
    assert "server.tls_cert=certs/server.pem" in shown
    first = Path("certs/server.pem").read_bytes()
    TlsFiles("server", "certs/server.pem", "certs/server.key", "certs/ca.pem").read()
    assert not Path("certs/ca.key").exists()
    assert "is there" in run(*init, "--host", "gpu1").stderr
    assert Path("certs/server.pem").read_bytes() == first
    run(*init, "--host", "gpu2")
    assert Path("certs/server.pem").read_bytes() != first
    run("certs", "client", "laptop", "--dir", "certs", "--ca-dir", "ca")
    TlsFiles("client", "certs/laptop.pem", "certs/laptop.key", "certs/ca.pem").read()
    run("certs", "client", "ca", "--dir", "certs", code=2)


def test_a_certificate_that_expires_soon_is_renewed() -> None:
    """Within 30 days."""
    run("certs", "init", "--dir", "certs", "--days", "20")
    first = Path("certs/server.pem").read_bytes()
    assert "is there" in run("certs", "init", "--dir", "certs", "--days", "20").stderr
    run("certs", "init", "--dir", "certs")
    assert Path("certs/server.pem").read_bytes() != first


@pytest.mark.parametrize("command", ["serve", "config check"])
def test_an_exposed_address_is_refused(command: str) -> None:
    """One line that says what to set, before anything is written; `server.insecure` is a way out of the check."""
    output = run(*command.split(), "--set", "server.listen=192.0.2.1:1", code=2).output
    assert output.count("\n") == 1
    assert "set server.tls_cert, server.tls_key and server.tokens" in output
    assert not Path("state").exists()
    accepted = run("config", "check", "--set", "server.listen=192.0.2.1:1", "--set", "server.insecure=true").output
    assert "who reaches it can stop the run" in accepted


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["server.tokens=none.toml"], "server.tokens: none.toml: No such file"),
        (["server.tls_cert=none", "server.tls_key=none"], "server.tls_cert: none: No such file"),
        (["metrics.web_config=none.yml"], "metrics.web_config: none.yml: No such file"),
        (["tamiyo.target=127.0.0.1:1", "tamiyo.tls_ca=none"], "tamiyo.tls_ca: none: No such file"),
        (["server.tls_cert=x"], "server.tls_cert and server.tls_key must be set together"),
        (["server.tls_client_ca=x"], "server.tls_client_ca needs"),
        (["kasmina.tls_ca=x"], "kasmina.tls_ca needs kasmina.target"),
    ],
)
def test_a_service_does_not_start_without_its_files(settings: list[str], words: str) -> None:
    """Exit code 2, and the setting is named; nothing has been built."""
    addresses = ["server.listen=127.0.0.1:0", "metrics.listen=127.0.0.1:0"]
    given = [part for value in [*addresses, *settings] for part in ("--set", value)]
    assert words in run("serve", *given, code=2).output


def test_the_audit_of_a_journal_needs_no_service(tmp_path: Path) -> None:
    """As a table and as JSON, newest first; text of a caller is shown on one line."""
    assert "holds no journal" in run("audit", "--state-dir", ".", code=2).output
    with Journal(tmp_path / JOURNAL) as journal:
        for number, reason in enumerate(["first", "second\nline"]):
            row = AdminCallRow(
                f"c{number}", number, "run", "PauseTraining", "q", "olga", "operator", "::1:5", reason, 3
            )
            journal.put(row)
    lines = run("audit", "--state-dir", str(tmp_path)).stdout.splitlines()
    assert lines[0].split() == ["time", "(UTC)", "who", "role", "from", "call", "step", "outcome", "why"]
    assert lines[1].split()[2:] == [
        "olga",
        "operator",
        "::1:5",
        "PauseTraining",
        "3",
        "not",
        "finished",
        "second",
        "line",
    ]
    assert len(lines) == 3
    answer = json.loads(run("audit", "--state-dir", str(tmp_path), "--limit", "1", "--json").stdout)
    assert [call["reason"] for call in answer["calls"]] == ["second\nline"]
