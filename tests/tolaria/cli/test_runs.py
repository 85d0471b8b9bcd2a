from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from support.lanes import small_image
from tolaria.checkpoint.format import Provenance
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.cli.commands import app
from tolaria.config import Settings, load_settings
from tolaria.journal.rows import BRANCH, CommandRow, EmergencyRow, FaultRow, RollbackRow, RunRow
from tolaria.service import settings_record
from tolaria.values.lineage import BranchOrigin

runner = CliRunner()

S = 10**9


def settings_of(directory: Path, *overrides: str) -> Settings:
    """Returns settings of a service in this directory."""
    return load_settings(None, [f"state.dir={directory}", *overrides])


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory with a finished run, and one that has not ended and was rolled back."""
    directory = tmp_path_factory.mktemp("runs") / "state"
    storage = open_storage(directory, run_id="aa11", retention=Retention(last=1, best="highest"))
    with storage.journal as journal:
        journal.put(RunRow("aa11", 1000 * S, "digits", ended_at_ns=1090 * S, outcome="finished"))
        for epoch, accuracy in ((1, 0.7), (2, 0.9), (3, 0.8)):
            provenance = Provenance(metrics={"accuracy": accuracy, "loss": 0.5}, evaluated_step=10 * epoch)
            storage.checkpoints.write(small_image(10 * epoch, epoch), metric=accuracy, provenance=provenance)
        origin = BranchOrigin("9f00", "000000000004-x", 4, "d", "/elsewhere")
        journal.put(CommandRow("branch@aa11", 1001 * S, "aa11", BRANCH, 4, "applied", json.dumps(asdict(origin))))
        for key, kind in (
            ("c1", "seed"),
            ("c2", "adjust"),
            ("l1", "learning_rates"),
            ("s1", "learning_rate_scheduled"),
        ):
            journal.put(CommandRow(key, 1001 * S, "aa11", kind, 5, "applied", ""))
        journal.put(RunRow("ab22", 2000 * S, "digits"))
        journal.put(
            RollbackRow("r1", 2010 * S, "ab22", "fast", 40, 30, "restored", "loss", "d", "d", 5.0, 1, origin="operator")
        )
        journal.put(EmergencyRow("e1", 2020 * S, "ab22", "halt", "operator", 41, "fire\x1b[31m"))
        journal.put(FaultRow("f1", 2005 * S, "ab22", "lane_lost", 39, "killed", "SIGKILL"))
        second = storage.for_run("ab22")
        second.checkpoints.write(small_image(45, 2), metric=None, provenance=Provenance())
    common = ["optimizer.policy=cosine", "leyline.secret=hush"]
    settings_record.record(settings_of(directory, *common, "training.run_name=base"), "aa11")
    settings_record.record(settings_of(directory, *common, "training.epochs=7", "training.run_name=longer"), "ab22")
    return directory


def run(state: Path, *arguments: str) -> str:
    """Runs `tolaria runs`; returns what it prints."""
    done = runner.invoke(app, ["runs", *arguments, "--state-dir", str(state)])
    assert done.exit_code == 0, done.output
    return done.stdout


def as_json(state: Path, *arguments: str) -> Any:
    """Returns the document that it prints."""
    return json.loads(run(state, *arguments, "--json"))


def test_runs_are_listed_oldest_first(state: Path) -> None:
    """Each with its outcome, how far it came, its last evaluation and the number of its incidents."""
    first, second = run(state, "list").splitlines()[1:]
    assert first.split() == [
        *("aa11", "base", "digits", "1970-01-01", "00:16:40", "finished", "after", "1", "min"),
        *("3", "30", "accuracy", "0.8,", "loss", "0.5", "0"),
    ]
    assert second.split()[5:] == ["unfinished", "2", "45", "-", "3"]
    (one, other) = as_json(state, "list")
    assert (one["outcome"], one["epoch"], one["step"], one["metrics"]) == (
        *("finished", 3, 30),
        {"accuracy": 0.8, "loss": 0.5},
    )
    assert (one["ended"], other["ended"], other["incidents"]) == ("1970-01-01T00:18:10Z", None, 3)


def test_a_run_is_shown_with_all_epochs_that_were_saved(state: Path) -> None:
    """Also those whose checkpoint is gone; and which of its settings are not the defaults, without secrets."""
    text = run(state, "show", "base")
    lines = [line.split() for line in text.splitlines()]
    assert [line[1:5] for line in lines if len(line) > 4 and line[0].startswith("0000000000")] == [
        ["1", "10", "0.7", "pruned,"],
        ["2", "20", "0.9", "committed,"],
        ["3", "30", "0.8", "committed,"],
    ]
    assert '  optimizer.policy = "cosine"' in text
    assert "hush" not in text
    assert "training.epochs" not in text


def test_a_branch_says_where_it_has_begun(state: Path) -> None:
    """The run and its step; a run that is no branch says so, too."""
    shown = [line.split(maxsplit=2)[2:] for line in run(state, "show", "aa11").splitlines() if "branched" in line]
    assert shown == [["step 4 of run 9f00"]]
    assert as_json(state, "show", "ab22")["branched_from"] is None


def test_commands_are_those_of_the_controller(state: Path) -> None:
    """Not the adjustments of operators and what schedules decide, which have rows in the same table."""
    assert "2 of the controller applied" in run(state, "show", "base")


def test_incidents_are_shown_in_their_order(state: Path) -> None:
    """With what they did; control characters are removed."""
    text = run(state, "show", "newest")
    kinds = [one["kind"] for one in as_json(state, "show")["incidents"]]
    assert kinds == ["lane_lost", "rollback", "emergency"]
    assert "to 30, by operator: loss" in text
    assert "\x1b" not in text


def test_comparison_names_the_settings_that_differ(state: Path) -> None:
    """Results side by side; the name and addresses are not compared, as they differ always."""
    text = run(state, "compare", "aa11", "longer")
    assert [line.split() for line in text.splitlines() if line.startswith("training.")] == [
        ["training.epochs", "20", "7"]
    ]
    assert ["accuracy", "0.8", "-"] in [line.split() for line in text.splitlines()]
    document = as_json(state, "compare", "aa11", "ab22")
    assert document["settings"] == {"training.epochs": {"first": 20, "second": 7}}
    assert document["settings_unknown"] == []
    itself = runner.invoke(app, ["runs", "compare", "aa11", "base", "--state-dir", str(state)])
    assert (itself.exit_code, "aa11 and base are both run aa11" in itself.output) == (1, True)


def test_runs_of_two_directories_are_compared(state: Path, tmp_path: Path) -> None:
    """The settings of a run of an earlier version are not known, which is said."""
    with open_storage(tmp_path, run_id="cc33", retention=Retention(last=1, best="highest")).journal as journal:
        journal.put(RunRow("cc33", 3000 * S, "other"))
    both = ["--state-dir", str(state), "--state-dir", str(tmp_path)]
    done = runner.invoke(app, ["runs", "compare", "aa11", "cc33", *both])
    assert done.exit_code == 0
    assert "settings are not known of cc33" in done.stdout


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("a", "'a' is aa11, ab22: give more of the id"), ("nope", "no run 'nope'; the newest are aa11, ab22")],
)
def test_a_run_that_is_not_meant_clearly_is_exit_code_2(state: Path, wanted: str, message: str) -> None:
    """The message says which there are."""
    done = runner.invoke(app, ["runs", "show", wanted, "--state-dir", str(state)])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())


def test_a_wrong_directory_is_exit_code_2(tmp_path: Path) -> None:
    """It names the option."""
    done = runner.invoke(app, ["runs", "list", "--state-dir", str(tmp_path)])
    assert (done.exit_code, done.stderr.count("--state-dir")) == (2, 1)
    assert list(tmp_path.iterdir()) == []


def test_the_settings_of_old_runs_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory in use for years does not fill up with them."""
    monkeypatch.setattr(settings_record, "RUNS_MAX", 2)
    for number in range(4):
        settings_record.record(settings_of(tmp_path), f"run{number}")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["run2.json", "run3.json"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "runs").iterdir())
