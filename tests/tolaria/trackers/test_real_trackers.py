"""TensorBoard, MLflow and Weights & Biases, each read back with its own package."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.wandb_files import offline_runs
from tolaria.trackers import Note, Point, Rewind, TrackedRun, Tracker
from tolaria.trackers.feed import TrackerFeed
from tolaria.trackers.mlflow import MlflowTracker
from tolaria.trackers.records import segment_path, surviving_points, to_line
from tolaria.trackers.tensorboard import TensorBoardTracker
from tolaria.trackers.tracker import Record, RunEnd
from tolaria.trackers.wandb import WandbTracker

LOSS, VALIDATION = "train/loss", "validation/loss"
RUN = TrackedRun("abc123", "my run", "try", "digits", {"who": "me"}, {"training.epochs": 3}, 0, 1, 1000.0)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def point(step: int, attempt: int, name: str = LOSS) -> Point:
    """A value that tells step and attempt."""
    return Point(step, attempt, 1 + step // 10, 1000.0 + step, {name: step + attempt / 10})


def points(first: int, last: int, attempt: int) -> list[Point]:
    """A point for each step."""
    return [point(step, attempt) for step in range(first, last + 1)]


FIRST_PROCESS: list[Record] = [
    RUN, *points(1, 10, 1), point(10, 1, VALIDATION), *points(11, 14, 1), Note(14, 1, 1014.0, "loss explosion"),
    Rewind(10, 2, 1014.5), Note(10, 2, 1014.5, "rolled back to step 10"), point(10, 2, VALIDATION), *points(11, 18, 2),
]  # fmt: skip
"""A rollback to the end of an epoch, whose evaluation is repeated."""
SECOND_PROCESS: list[Record] = [
    dataclasses.replace(RUN, global_step=15, attempt=2, time=1020.0), *points(16, 20, 3), point(20, 3, VALIDATION),
    RunEnd(20, 3, 1021.0, "finished"),
]  # fmt: skip
"""After a kill the run goes on from step 15."""
LOSSES = [(step, step + (0.1 if step <= 10 else 0.2 if step <= 15 else 0.3)) for step in range(1, 21)]
VALIDATIONS = [(10, 10.1), (20, 20.3)]
ATTEMPTS = [(s, 1.0 if s <= 10 else 2.0 if s <= 15 else 3.0) for s in range(1, 21)]
CURVES = {LOSS: LOSSES, VALIDATION: VALIDATIONS, "attempt": ATTEMPTS}


def fed(directory: Path, tracker: Callable[[], Tracker]) -> Path:
    """Feeds two processes of a tracker, the first of which is killed; returns the directory of its files."""
    for records in (FIRST_PROCESS, SECOND_PROCESS):
        feed = TrackerFeed(tracker(), directory / "files", directory, directory / "progress.json")
        with segment_path(directory, 1).open("ab") as file:
            for record in records:
                file.write(to_line(record))
                file.flush()
                feed.advance()
        if records is SECOND_PROCESS:
            feed.close()
    return directory / "files"


def rounded(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Steps and values, with single precision."""
    return [(step, round(value, 4)) for step, value in curve]


def test_the_log_itself_has_the_surviving_curves(tmp_path: Path) -> None:
    """What the other tests expect is what survives."""
    fed(tmp_path, lambda: TensorBoardTracker({"dir": str(tmp_path / "tensorboard")}))
    found = surviving_points(tmp_path)
    for name in (LOSS, VALIDATION):
        assert rounded([(p.global_step, p.values[name]) for p in found if name in p.values]) == rounded(CURVES[name])


def test_tensorboard_shows_only_what_survives(tmp_path: Path) -> None:
    """Its own reader purges what was undone; annotations stay, beside the scalars."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = fed(tmp_path, lambda: TensorBoardTracker({})) / "my-run-abc123"
    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    assert set(events.Tags()["scalars"]) == {LOSS, VALIDATION, "attempt", "epoch"}
    for name, expected in CURVES.items():
        assert rounded([(event.step, event.value) for event in events.Scalars(name)]) == rounded(expected), name
    texts = EventAccumulator(str(folder / "annotations")).Reload().Tensors("annotations/text_summary")
    assert [text.tensor_proto.string_val[0].decode() for text in texts] == [
        "attempt 1, step 14: loss explosion",
        "attempt 2, step 10: rolled back to step 10",
    ]


@pytest.fixture
def file_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets MLflow use files: making its database takes 20 s."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def curve_of(client: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    """A curve as MLflow draws it, by step."""
    return rounded([(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)])


@pytest.mark.slow
@pytest.mark.usefixtures("file_store")
def test_mlflow_shows_only_what_survives(tmp_path: Path) -> None:
    """In the run without a parent; the runs before are below it, and end as they were left."""
    mlflow = pytest.importorskip("mlflow")
    uri = str(tmp_path / "mlruns")
    fed(tmp_path, lambda: MlflowTracker({"uri": uri}))
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("try")
    runs = client.search_runs([experiment.experiment_id])
    (newest,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(runs) == 3
    for name, expected in CURVES.items():
        assert curve_of(client, newest.info.run_id, name) == rounded(expected), name
    assert (newest.info.status, newest.info.run_name) == ("FINISHED", "my run")
    assert newest.data.params == {"training.epochs": "3"}
    assert newest.data.tags["who"] == "me"
    assert "step 10: rolled back to step 10" in newest.data.tags["mlflow.note.content"]
    (first,) = [run for run in runs if run.data.tags.get("tolaria.superseded_after_step") == "10"]
    assert first.info.status == "KILLED"
    assert curve_of(client, first.info.run_id, LOSS)[-1] == (14, 14.1)


@pytest.mark.usefixtures("file_store")
def test_mlflow_does_not_show_twice_what_was_logged_before_a_death(tmp_path: Path) -> None:
    """A process that died before it could note what it had logged is given it again."""
    mlflow = pytest.importorskip("mlflow")
    uri = str(tmp_path / "mlruns")

    def feed() -> TrackerFeed:
        return TrackerFeed(MlflowTracker({"uri": uri}), tmp_path / "files", tmp_path, tmp_path / "progress.json")

    with segment_path(tmp_path, 1).open("ab") as file:
        file.write(to_line(RUN))
        file.writelines(to_line(record) for record in points(1, 3, 1))
        file.flush()
        feed().advance()
        saved = (tmp_path / "progress.json").read_bytes()
        file.writelines(to_line(record) for record in points(4, 6, 1))
        file.flush()
        feed().advance()
        (tmp_path / "progress.json").write_bytes(saved)
        feed().advance()
    client = mlflow.MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("try").experiment_id])
    (newest,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert curve_of(client, newest.info.run_id, LOSS) == rounded([(step, step + 0.1) for step in range(1, 7)])


@pytest.mark.slow
def test_wandb_shows_only_what_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the newest run of the group; runs that a rollback has ended are marked."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    files = fed(tmp_path, lambda: WandbTracker({"mode": "offline"}))
    runs = offline_runs(files)
    newest, rows = runs[max(runs, key=lambda name: int(name.rpartition("-")[2]))]
    for name, expected in CURVES.items():
        curve = [(row["global_step"], row[name]) for row in rows if name in row and "annotation" not in row]
        if name == "attempt":  # each row has it, also that of an evaluation
            curve = sorted(dict(curve).items())
        assert rounded(curve) == rounded(expected), name
    assert {run.run_group for run, _ in runs.values()} == {"abc123"}
    assert list(newest.tags) == ["who=me"]
    assert list(runs["abc123-1"][0].tags) == ["who=me", "superseded"]
    assert newest.notes.splitlines()[-1] == "attempt 2, step 10: rolled back to step 10"
    assert [row["annotation"] for row in runs["abc123-2"][1] if "annotation" in row] == ["rolled back to step 10"]
