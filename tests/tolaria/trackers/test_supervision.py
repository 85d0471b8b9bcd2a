import os
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from prometheus_client import CollectorRegistry

from support.bad_trackers import installed_in
from support.events import RecordingEmitter
from support.processes import TESTS, is_alive, python_path
from tolaria.config import Settings
from tolaria.errors import ConfigurationError
from tolaria.processes import RestartPolicy
from tolaria.telemetry.metrics import Metrics
from tolaria.trackers.feed import Progress, progress_path
from tolaria.trackers.records import LogPosition
from tolaria.trackers.supervision import TrackerProcess, Tracking
from tolaria.trackers.tracker import Point, TrackedRun, check_trackers

pytestmark = pytest.mark.anyio
RUN = TrackedRun("one", "", "e", "digits", {}, {}, 0, 1, 1.0)


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs the trackers of this test, and has failed ones started again soon."""
    folder = tmp_path / "plugins"
    installed_in(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{python_path()}")
    soon = RestartPolicy(pause_s=0.1, pause_s_max=0.2, lived_s=600)
    monkeypatch.setattr("tolaria.trackers.supervision.RESTARTS", soon)


def settings(directory: Path, *trackers: str, **tracking: Any) -> Settings:
    """Settings with these trackers."""
    sections = {"state": {"dir": str(directory)}, "tracking": {"trackers": trackers, "close_s": 1.0, **tracking}}
    return Settings.model_validate(sections)


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """The value of a metric."""
    registry: CollectorRegistry = metrics.registry
    return registry.get_sample_value(name, labels) or 0.0


class Watched:
    """A tracking with what it reports."""

    def __init__(self, given: Settings) -> None:
        self.metrics, self.emitter = Metrics(), RecordingEmitter()
        self.tracking = Tracking(given, self.metrics, self.emitter)
        self._step = 0

    def put(self) -> None:
        """Records a further point."""
        self._step += 1
        self.tracking.put(Point(self._step, 1, 1, time.time(), {"loss": 1.0}))

    async def until(self, name: str, count: int = 1) -> list[dict[str, str]]:
        """Waits for an event; records points meanwhile."""
        with anyio.fail_after(90):
            while len(found := self.emitter.attributes_of(name)) < count:
                self.put()
                await anyio.sleep(0.05)
        return found


@pytest.mark.usefixtures("plugins")
async def test_a_tracker_that_raises_is_reported_once_and_started_again(tmp_path: Path) -> None:
    """Its name and error are in an event; once it takes records again, that is reported, too."""
    watched = Watched(settings(tmp_path, "raising", "quiet"))
    watched.tracking.put(RUN)
    async with watched.tracking.serve(lambda: 60.0):
        found = await watched.until("tolaria.tracker_failed")
        assert [each["tracker"] for each in found] == ["raising"], found
        failed = found[0]
        assert failed["detail"].endswith("ConnectionError: the tracking server is away")
        with anyio.fail_after(90):
            while value(watched.metrics, "tolaria.tracker.failures_total", tracker="raising") < 2:
                watched.put()
                await anyio.sleep(0.05)
            while value(watched.metrics, "tolaria.tracker.up", tracker="quiet") != 1.0:
                await anyio.sleep(0.05)
        (tmp_path / "trackers" / "raising" / "mended").touch()
        assert await watched.until("tolaria.tracker_recovered") == [{"tracker": "raising"}]
        assert value(watched.metrics, "tolaria.tracker.up", tracker="raising") == 1.0
    assert len(watched.emitter.attributes_of("tolaria.tracker_failed")) == 1
    assert value(watched.metrics, "tolaria.tracker.failures_total", tracker="quiet") == 0.0


async def test_what_a_tracker_did_before_it_failed_is_no_recovery(tmp_path: Path) -> None:
    """However late it is seen: only what another process does afterwards is one."""
    metrics, emitter, path = Metrics(), RecordingEmitter(), progress_path(tmp_path, "quiet")
    path.parent.mkdir()
    tracker = TrackerProcess("quiet", settings(tmp_path, "quiet"), metrics=metrics, emitter=emitter)
    tracker.pid = os.getpid()  # as it says in what it saves
    for number, came_on in enumerate((False, True), 1):
        tracker.accept({"tracker": "quiet"})
        await anyio.to_thread.run_sync(Progress(LogPosition(0, number)).save, path)
        if not came_on:
            tracker.on_ended("ended with code 1: ConnectionError: away", 1.0)
        await tracker.watch(LogPosition(0, number))
        assert bool(emitter.attributes_of("tolaria.tracker_recovered")) is came_on
        assert value(metrics, "tolaria.tracker.up", tracker="quiet") == came_on


@pytest.mark.usefixtures("plugins")
async def test_a_tracker_that_hangs_is_ended(tmp_path: Path) -> None:
    """While the run goes on, and at the end, where it gets its time and no more."""
    watched = Watched(settings(tmp_path, "hanging", timeout_s=1.0))
    watched.tracking.put(RUN)
    async with watched.tracking.serve(lambda: 60.0):
        (failed,) = await watched.until("tolaria.tracker_failed")
        assert failed == {"tracker": "hanging", "detail": "made no progress for 1 s"}
        watched.put()
        await anyio.sleep(1.5)  # it hangs again, in another process
        pids = [process.pid for process in watched.tracking._processes]  # noqa: SLF001 - that none is left
        began_s = anyio.current_time()
    assert anyio.current_time() - began_s < 60
    assert not any(map(is_alive, pids))


@pytest.mark.usefixtures("plugins")
async def test_trackers_get_no_more_time_than_is_left(tmp_path: Path) -> None:
    """A second signal leaves none: everything ends at once, with what is on disk."""
    watched = Watched(settings(tmp_path, "hanging", close_s=600.0))
    watched.tracking.put(RUN)
    async with watched.tracking.serve(lambda: 0.0):
        with anyio.fail_after(180):
            while not (tmp_path / "trackers" / "hanging.json").exists():
                watched.put()
                await anyio.sleep(0.05)
        began_s = anyio.current_time()
    assert anyio.current_time() - began_s < 60


async def test_recording_costs_the_event_loop_little(tmp_path: Path) -> None:
    """A thousand points in far less than a second; encoding and writing happen elsewhere."""
    watched = Watched(settings(tmp_path))
    async with watched.tracking.serve(lambda: 60.0):
        began_s = time.thread_time()
        for _ in range(1000):
            watched.put()
        assert time.thread_time() - began_s < 0.5
    assert (tmp_path / "metrics" / "metrics-000001.jsonl").read_text().count("\n") == 1000


async def test_a_log_that_cannot_be_written_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And points that were dropped are counted."""
    monkeypatch.setattr("tolaria.trackers.metrics_log.WAITING_MAX", 5)
    (tmp_path / "metrics").write_text("in the way")
    watched = Watched(settings(tmp_path))
    async with watched.tracking.serve(lambda: 60.0):
        (failed,) = await watched.until("tolaria.metrics_log_failed")
        assert failed["detail"] in {"File exists", "Not a directory"}
        with anyio.fail_after(180):
            while not value(watched.metrics, "tolaria.metrics_log.dropped_total"):
                watched.put()
                await anyio.sleep(0.05)
    assert len(watched.emitter.attributes_of("tolaria.metrics_log_failed")) == 1


@pytest.mark.parametrize(
    ("tracking", "named"),
    [
        ({"trackers": "tensorbord"}, "no tracker 'tensorbord'; did you mean tensorboard"),
        ({"trackers": "mlflow,wandb", "options": {"mlflow": {"url": "x"}}}, "options.mlflow.url: unknown.*uri"),
        ({"trackers": "wandb", "options": {"wandb": {"project": 1}}}, "options.wandb.project: is not a text, got 1"),
        (
            {"trackers": "mlflow", "options": {"mlflow": {"uri": "https://me:secret@host"}}},
            "options.mlflow.uri: has a password.*MLFLOW_TRACKING_PASSWORD",
        ),
        ({"trackers": "wandb", "options": {"mlflow": {}}}, "tracking.options.mlflow: mlflow is not in"),
        ({"trackers": "wandb, wandb"}, "names one twice"),
    ],
)
def test_wrong_settings_are_refused_by_name(tracking: dict[str, Any], named: str) -> None:
    """Before the run, and without importing a tracker's package."""
    given = Settings.model_validate({"tracking": tracking})
    with pytest.raises(ConfigurationError, match=named):
        check_trackers(given.tracking)


def test_a_missing_extra_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to install."""
    monkeypatch.setattr("tolaria.trackers.tracker.find_spec", lambda name: None)
    given = Settings.model_validate({"tracking": {"trackers": "mlflow"}})
    with pytest.raises(ConfigurationError, match=r"mlflow needs tolaria\[mlflow\], which is not installed"):
        check_trackers(given.tracking)


def test_trackers_need_the_log() -> None:
    """They are fed from it."""
    with pytest.raises(ValueError, match=r"tracking\.log_mb is 0"):
        Settings.model_validate({"tracking": {"trackers": "mlflow", "log_mb": 0}})


async def test_nothing_is_imported_unless_it_is_asked_for() -> None:
    """Neither by the command line nor by the service or the lane; trackers are found without their packages."""
    code = (
        "import sys, tolaria.service, tolaria.cli.main, tolaria.lane.build\n"
        "from tolaria.trackers.tracker import check_trackers\n"
        "from tolaria.config import Settings\n"
        "check_trackers(Settings.model_validate({'tracking': {'trackers': 'tensorboard,mlflow,wandb'}}).tracking)\n"
        "found = {'tensorboard', 'mlflow', 'wandb', 'torchjd', 'lightning', 'transformers'} & set(sys.modules)\n"
        "sys.exit(', '.join(found) or 0)"
    )
    ended = await anyio.run_process([sys.executable, "-c", code], cwd=TESTS, check=False)
    assert ended.returncode == 0, ended.stderr
