"""`tolaria skip` and `tolaria branch`: options that go together, and those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tolaria.cli.commands import app


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --from, --remove and --list"),
        (["--list", "--from", "1"], "give one of --from, --remove and --list"),
        (["--to", "3", "--list"], "--to and --epoch need --from"),
        (["--epoch", "3", "--remove", "a", "--reason", "b"], "--to and --epoch need --from"),
        (["--from", "3"], "a change needs --reason"),
        (["--remove", "a", "--reason", " "], "a change needs --reason"),
        (["--from", "-1", "--reason", "b"], "'--from'"),
        (["--epoch", "0", "--from", "1", "--reason", "b"], "'--epoch'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words: list[str], message: str) -> None:
    """Before a service is called."""
    done = CliRunner().invoke(app, ["skip", *words], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert message in done.output


def test_a_branch_needs_a_state_directory(tmp_path: Path) -> None:
    """One that does not exist is named, with the option, and nothing is made."""
    absent, target = tmp_path / "absent", tmp_path / "branch"
    done = CliRunner().invoke(app, ["branch", "--state-dir", str(absent), "--to", str(target)])
    assert done.exit_code == 2
    assert f"--state-dir: there is no directory {absent}" in done.stderr
    assert not target.exists()
