from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tolaria.cli.commands import app
from tolaria.cli.job_commands import JobKind


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module search path and the number of threads are put back, and no job stays imported."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.startswith("written_")]:
        monkeypatch.delitem(sys.modules, name)
    threads = torch.get_num_threads()
    monkeypatch.setattr("tolaria.lane.job_report.limit_threads", lambda _wanted: torch.set_num_threads(1))
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", JobKind)
def test_a_written_job_runs_as_it_is(kind: JobKind, tmp_path: Path) -> None:
    """It is built, looked at, trained and evaluated without a change; it has fewer than 80 lines."""
    if kind is JobKind.HF:
        pytest.importorskip("transformers", reason="transformers is not installed")
    written = CliRunner().invoke(app, ["new-job", f"written_{kind}.py", "--kind", kind])
    assert written.exit_code == 0, written.output
    assert f"training.job=written_{kind}:Job" in written.output
    assert len((tmp_path / f"written_{kind}.py").read_text().splitlines()) < 80
    checked = CliRunner().invoke(app, ["check-job", f"written_{kind}:Job", "--steps", "2", "--json"])
    assert checked.exit_code == 0, checked.output
    found = json.loads(checked.stdout)
    assert found["notes"] == []
    assert "parameters" in found["model"]
    assert {"slots", "step", "slowest operators", "data order", "memory", "resumed"} <= found.keys()
    assert "fit into rollback.memory_mb" in found["restore point"]
    assert ("accuracy" in found["evaluation"]) == (kind in {JobKind.IMAGE, JobKind.TABLE})
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".py") == [f"written_{kind}.py"]


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    """It is named, and not changed."""
    (tmp_path / "mine.py").write_text("my work\n")
    again = CliRunner().invoke(app, ["new-job", "mine.py"])
    assert (again.exit_code, (tmp_path / "mine.py").read_text()) == (1, "my work\n")
    assert "mine.py exists already" in again.output


@pytest.mark.parametrize(
    "name", ["my-job.py", "job.txt", "2nd.py", "class.py", "torch.py", "json.py", "no_such_directory/job.py"]
)
def test_a_file_that_cannot_be_imported_or_written_is_refused(name: str, tmp_path: Path) -> None:
    """Names that Python cannot import, or would import for an installed module, and a missing directory."""
    assert CliRunner().invoke(app, ["new-job", name]).exit_code != 0
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_fits_no_snapshot_is_pointed_out() -> None:
    """The row names the setting and a value that is large enough."""
    from tolaria.config import Settings, TrainingSettings
    from tolaria.lane.job_report import report

    rollback = Settings().rollback.model_copy(update={"memory_mb": 0})
    settings = Settings(training=TrainingSettings(threads=1)).model_copy(update={"rollback": rollback})
    rows, _ = report(settings, 1)
    assert "set it to 2 or more" in dict(rows)["restore point"]


def test_a_mistake_is_reported_as_by_serve(tmp_path: Path) -> None:
    """The method that fails is named, with exit code 2."""
    (tmp_path / "written_wrong.py").write_text(
        "from tolaria.jobs.digits import DigitsJob, DigitsOptions\n"
        "class Job(DigitsJob):\n"
        "    def __init__(self, context):\n"
        "        super().__init__(context, DigitsOptions())\n"
        "    def evaluate(self, model, batch):\n"
        "        return 3\n"
    )
    checked = CliRunner().invoke(app, ["check-job", "written_wrong:Job"])
    assert checked.exit_code == 2
    assert "evaluate() must return an Evaluation, got a int" in checked.output
    assert CliRunner().invoke(app, ["check-job", "written_nowhere:Job"]).exit_code == 2


def test_a_job_that_prints_and_leaves_a_thread_behind_is_reported(tmp_path: Path) -> None:
    """Standard output has the report only, as JSON, and the command ends."""
    (tmp_path / "written_loud.py").write_text(
        "import os, threading, time\n"
        "from tolaria.jobs.digits import DigitsJob, DigitsOptions\n"
        "class Job(DigitsJob):\n"
        "    def __init__(self, context):\n"
        "        print('hello')\n"
        "        os.system('echo from a program')\n"
        "        threading.Thread(target=time.sleep, args=(10_000,)).start()\n"
        "        super().__init__(context, DigitsOptions())\n"
    )
    command = [sys.executable, "-m", "tolaria", "check-job", "written_loud:Job", "--steps", "1", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "parameters" in json.loads(done.stdout)["model"]
    assert done.stderr.splitlines()[:2] == ["hello", "from a program"]


@pytest.mark.parametrize(
    ("setting", "words"), [("tracking.trackers=tensorbord", "tensorboard"), ("early_stopping.metric=f1", "mode")]
)
def test_settings_that_serve_refuses_are_refused(setting: str, words: str) -> None:
    """With its message, and exit code 2."""
    checked = CliRunner().invoke(app, ["check-job", "digits", "--set", setting])
    assert (checked.exit_code, words in checked.output) == (2, True), checked.output


def test_metrics_that_no_evaluation_has_are_pointed_out() -> None:
    """Such as those of weight averages that are not kept; and callbacks with a state are among what is resumed."""
    from tolaria.config import Settings
    from tolaria.lane.job_report import report

    settings = Settings.model_validate(
        {
            "training": {"threads": 1, "job": "support.practice_jobs:Called"},
            "checkpoint": {"best": "ema/loss:min"},
            "early_stopping": {"metric": "f1", "mode": "max"},
        }
    )
    rows, notes = report(settings, 1)
    assert [note.partition(", which")[0] for note in notes if "has not found" in note] == [
        "early_stopping.metric is f1",
        "checkpoint.best is ema/loss",
    ]
    assert "the state of Recorder" in dict(rows)["resumed"]
    averaged = settings.model_copy(update={"ema": settings.ema.model_copy(update={"decay": 0.99})})
    assert [note for note in report(averaged, 1)[1] if "checkpoint.best" in note] == []
