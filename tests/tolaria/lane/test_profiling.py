from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tolaria.errors import InvalidFieldError, WrongStateError
from tolaria.telemetry.profiler import ProfileWindow
from tolaria.values.profiling import STEPS_MAX, Region, TraceFailed, TraceWritten

NOON_NS = 1_700_000_000_123_456_789
LARGE = 10**8


def work(window: ProfileWindow) -> None:
    """What a lane does in a step."""
    for name in get_args(Region):
        with window.region(name):
            torch.ones(4).sum()


def traced(window: ProfileWindow, steps: int = 1) -> TraceWritten | TraceFailed | None:
    """Open a window of these steps and go through them."""
    assert window.begin(steps) is None
    result = None
    for _ in range(steps):
        assert result is None
        work(window)
        result = window.step()
    return result


def test_a_window_leaves_a_chrome_trace_with_every_region(tmp_path: Path) -> None:
    """After its steps, not before, the trace is there: valid JSON with each region, each as often as it was passed."""
    window = ProfileWindow(tmp_path / "traces", bytes_max=LARGE, wall_ns=lambda: NOON_NS)
    work(window)
    result = traced(window, steps=3)
    work(window)
    assert isinstance(result, TraceWritten)
    assert Path(result.path).name == "trace-20231114T221320.123456Z.json"
    assert (result.steps, result.removed, result.size_bytes) == (3, 0, Path(result.path).stat().st_size)
    events = json.loads(Path(result.path).read_text())["traceEvents"]
    marked = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert sorted(marked) == sorted(get_args(Region) * 3)
    assert [path.name for path in (tmp_path / "traces").iterdir()] == [Path(result.path).name]


def test_without_a_window_nothing_happens(tmp_path: Path) -> None:
    """Regions and steps are free of effects, and the exception in a region comes out."""
    window = ProfileWindow(tmp_path / "traces", bytes_max=LARGE)
    work(window)
    assert window.step() is None
    with pytest.raises(ZeroDivisionError), window.region("forward"):
        raise ZeroDivisionError
    assert not (tmp_path / "traces").exists()


def test_names_are_unique_and_sort_by_age(tmp_path: Path) -> None:
    """Two traces in the same microsecond, and two runs of the service: four files."""
    paths = []
    for _ in range(2):
        window = ProfileWindow(tmp_path, bytes_max=LARGE, wall_ns=lambda: NOON_NS)
        for _ in range(2):
            result = traced(window)
            assert isinstance(result, TraceWritten)
            paths.append(Path(result.path))
    assert paths == sorted(set(paths))


def test_the_oldest_traces_give_way(tmp_path: Path) -> None:
    """The directory stays within its bytes: oldest out first, leftovers of a crash too, other files untouched."""
    size_bytes = traced_size(tmp_path / "measure")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "trace-old.json.partial.tmp").write_text("half")
    times = iter(range(NOON_NS, NOON_NS + 10**12, 10**9))
    window = ProfileWindow(tmp_path, bytes_max=int(size_bytes * 2.5), wall_ns=lambda: next(times))
    results = [traced(window) for _ in range(4)]
    written = [result for result in results if isinstance(result, TraceWritten)]
    assert [result.removed for result in written] == [0, 0, 1, 1]
    assert sorted(tmp_path.glob("trace-*")) == [Path(result.path) for result in written[2:]]
    assert (tmp_path / "notes.txt").exists()


def traced_size(directory: Path) -> int:
    """Bytes of a trace of one step."""
    result = traced(ProfileWindow(directory, bytes_max=LARGE))
    assert isinstance(result, TraceWritten)
    return result.size_bytes


def test_a_trace_larger_than_all_may_be_is_not_kept(tmp_path: Path) -> None:
    """The cap is a cap: the trace goes, older ones stay, and the failure says so."""
    assert isinstance(traced(ProfileWindow(tmp_path, bytes_max=LARGE)), TraceWritten)
    before = list(tmp_path.iterdir())
    result = traced(ProfileWindow(tmp_path, bytes_max=100))
    assert isinstance(result, TraceFailed)
    assert result.stage == "cap"
    assert list(tmp_path.iterdir()) == before


@contextmanager
def no_directory(directory: Path) -> Iterator[None]:
    """A file stands where the directory should be."""
    directory.write_text("in the way")
    yield
    directory.unlink()


@contextmanager
def full_disk(directory: Path, limit_bytes: int = 2048) -> Iterator[None]:
    """No file may grow beyond its first bytes; the exporter does not tell."""
    directory.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def nearly_full_disk(directory: Path) -> AbstractContextManager[None]:
    """Only the end of the trace is missing; the exporter then puts what it has in place."""
    return full_disk(directory, traced_size(directory.with_name("measure")) - 1000)


@contextmanager
def no_file(directory: Path) -> Iterator[None]:
    """A directory stands where the file should be made; the exporter does not tell either."""
    aside = directory / "trace-20231114T221320.123456Z.json.partial.tmp"
    aside.mkdir(parents=True)
    yield
    aside.rmdir()


@pytest.mark.parametrize("spoilt", [no_directory, full_disk, nearly_full_disk, no_file])
def test_a_failed_export_is_an_answer(tmp_path: Path, spoilt: Callable[[Path], AbstractContextManager[None]]) -> None:
    """Nothing is raised and no trace is left; once the cause is gone the next window works."""
    window = ProfileWindow(tmp_path / "traces", bytes_max=LARGE, wall_ns=lambda: NOON_NS)
    with spoilt(tmp_path / "traces"):
        result = traced(window)
    assert isinstance(result, TraceFailed)
    assert result.stage == "export"
    assert result.reason
    assert not list(tmp_path.glob("traces/*"))
    assert isinstance(traced(window), TraceWritten)


@pytest.mark.parametrize("steps", [0, -1, STEPS_MAX + 1])
def test_a_window_is_bounded(tmp_path: Path, steps: int) -> None:
    """No steps or too many are refused."""
    window = ProfileWindow(tmp_path, bytes_max=LARGE)
    with pytest.raises(InvalidFieldError, match="steps"):
        window.begin(steps)
    assert not window.open


def test_one_window_at_a_time(tmp_path: Path) -> None:
    """A second is refused and the first goes on."""
    window = ProfileWindow(tmp_path, bytes_max=LARGE)
    assert window.begin(2) is None
    with pytest.raises(WrongStateError, match="2 steps to go"):
        window.begin(1)
    window.step()
    assert isinstance(window.step(), TraceWritten)


def test_an_abandoned_window_leaves_nothing(tmp_path: Path) -> None:
    """No trace, no profiler left running; abandoning again does nothing."""
    window = ProfileWindow(tmp_path, bytes_max=LARGE)
    assert window.begin(2) is None
    window.abandon()
    window.abandon()
    assert not window.open
    assert list(tmp_path.iterdir()) == []
    assert isinstance(traced(window), TraceWritten)


def test_the_job_s_own_profiler_is_left_alone(tmp_path: Path) -> None:
    """There is but one profiler: ours does not begin while the job's runs, and says why."""
    window = ProfileWindow(tmp_path, bytes_max=LARGE)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as jobs:
        failed = window.begin(1)
        torch.ones(4).sum()
    assert failed == TraceFailed("start", "the job's own profiler is running")
    assert jobs.key_averages()
    assert not window.open
