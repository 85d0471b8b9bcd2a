"""Every command of the program: its options, its exit codes, and the table in docs/operations.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tolaria.cli.commands import app

PAGE = Path(__file__).parents[3] / "docs" / "operations.md"
NO_SERVICE = "127.0.0.1:1"

RUN_UNTIL_ENDED = {"serve", "peer", "lane join"}
"""Commands without `--json`: they run until they are ended, and log."""

ARGUMENTS: dict[str, list[str]] = {
    "conservative": ["on"],
    "lr": ["--factor", "0.5"],
    "emergency raise": ["halt"],
    "export": ["--to", "x"],
    "skip": ["--list"],
    "branch": ["--to", "x"],
    "backup": ["--to", "x"],
    "restore-backup": ["--from", "x"],
    "state downgrade": ["--to", "3"],
}
"""What commands of a service need besides a reason."""

runner = CliRunner()


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yields the commands below one, by their names in full."""
    for name, below in getattr(command, "commands", {}).items():
        yield from leaves(below, (*path, name))
    if not hasattr(command, "commands"):
        yield " ".join(path), command


COMMANDS = dict(leaves(typer.main.get_command(app)))


def options(name: str) -> set[str]:
    """Returns the names of a command's options."""
    return {option for parameter in COMMANDS[name].params for option in parameter.opts}


def documented() -> dict[str, tuple[set[int], bool]]:
    """Returns the exit codes of each command in the table, and whether it says that there is JSON."""
    table = PAGE.read_text(encoding="utf-8").split("<!-- commands -->\n")[1].split("<!-- /commands -->")[0]
    found = {}
    for names, codes, as_json in re.findall(r"^\| (`.*`) \| ([\d, ]+) \| (yes|no) \|$", table, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", names):
            found[name] = ({int(code) for code in codes.split(", ")}, as_json == "yes")
    return found


def test_the_table_has_each_command_once() -> None:
    """With JSON where the command takes it, which all do that end by themselves."""
    found = documented()
    assert found.keys() == COMMANDS.keys()
    assert {name for name, (_, as_json) in found.items() if not as_json} == RUN_UNTIL_ENDED
    assert {name for name in COMMANDS if "--json" not in options(name)} == RUN_UNTIL_ENDED


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_code_0_and_an_unknown_option_code_2(name: str) -> None:
    """Nothing is done for either."""
    codes = documented()[name][0]
    assert runner.invoke(app, [*name.split(), "--help"]).exit_code == 0
    done = runner.invoke(app, [*name.split(), "--no-such-option"])
    assert done.exit_code == 2
    assert {0, 2} <= codes
    assert done.stdout == ""


@pytest.mark.parametrize("name", [name for name in COMMANDS if "--address" in options(name)])
def test_no_service_is_code_3(name: str) -> None:
    """Of each command that calls one, in one line on standard error."""
    assert 3 in documented()[name][0]
    reason = ["--reason", "x"] if "--reason" in options(name) else []
    done = runner.invoke(app, [*name.split(), *ARGUMENTS.get(name, []), *reason, "--address", NO_SERVICE])
    assert (done.exit_code, done.stdout) == (3, "")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", [name for name in COMMANDS if "--set" in options(name)])
def test_a_wrong_setting_is_code_2(name: str, tmp_path: Path) -> None:
    """Of each command that reads settings; the message names it."""
    reason = ["--reason", "x"] if "--reason" in options(name) else []
    more = {"peer": ["tamiyo", "--listen", "127.0.0.1:0"], "check-job": ["digits"], "runs compare": ["a", "b"]}
    given = [*ARGUMENTS.get(name, []), *more.get(name, []), *reason]
    done = runner.invoke(app, [*name.split(), *given, "--set", "training.epochs=many"])
    assert done.exit_code == 2, done.output
    assert "training.epochs" in done.stderr


def test_codes_3_are_only_of_commands_that_call_a_service() -> None:
    """`lane join` waits for one."""
    with_3 = {name for name, (codes, _) in documented().items() if 3 in codes}
    assert with_3 == {name for name in COMMANDS if "--address" in options(name)} | {"lane join", "watch", "telemetry"}


@pytest.mark.usefixtures("_in_tmp")
def test_offline_commands_print_json() -> None:
    """One document each, on standard output alone."""
    secure = ["token", "new", "olga", "--role", "operator", "--file", "tokens.toml"]
    for arguments, expected in (
        (["new-job", "mine.py"], {"path": "mine.py", "kind": "image", "job": "mine:Job"}),
        (["certs", "init", "--dir", "c"], {"made": True, "cert": "c/server.pem"}),
        (["certs", "init", "--dir", "c"], {"made": False, "key": "c/server.key", "ca": "c/ca.pem"}),
        (["certs", "client", "bob", "--dir", "c"], {"cert": "c/bob.pem"}),
        (secure, {"name": "olga", "made": True}),
        ([*secure, "--keep"], {"made": False}),
        (["token", "new", "bob", "--role", "viewer", "--file", "tokens.toml", "--out", "t"], {"token_file": "t"}),
        (["token", "revoke", "bob", "--file", "tokens.toml"], {"revoked": True}),
        (["config", "check"], {"valid": True, "problems": [], "warnings": []}),
    ):
        done = runner.invoke(app, [*arguments, "--json"])
        assert done.exit_code == 0, (arguments, done.output)
        found = json.loads(done.stdout)
        assert {name: found[name] for name in expected} == expected
        assert done.stderr == ""
    (token,) = json.loads(runner.invoke(app, ["token", "list", "--file", "tokens.toml", "--json"]).stdout)
    assert token == {"name": "olga", "role": "operator", "expires": None, "expired": False}
    shown = json.loads(runner.invoke(app, ["config", "show", "--json", "--set", "leyline.secret=hush"]).stdout)
    assert shown["checkpoint"]["keep_last"]["value"] == 3
    assert (shown["checkpoint"]["keep_last"]["live"], shown["training"]["seed"]["live"]) == (True, False)
    assert "hush" not in str(shown)


@pytest.mark.usefixtures("_in_tmp")
def test_the_check_of_settings_reports_all_problems_as_json() -> None:
    """Of settings and of files alike, with code 2 and the message for people beside it."""
    done = runner.invoke(
        app, ["config", "check", "--json", "--set", "server.tokens=gone", "--set", "lane.secret_file=no"]
    )
    found = json.loads(done.stdout)
    assert (done.exit_code, found["valid"]) == (2, False)
    assert [problem.partition(":")[0] for problem in found["problems"]] == ["server.tokens", "lane.secret_file"]
    assert "server.tokens: gone" in done.stderr


@pytest.fixture
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
