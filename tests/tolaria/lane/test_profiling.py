from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tolaria.errors import InvalidFieldError, WrongStateError
from tolaria.lane.messages import PROFILE_STEPS_MAX, ProfileDone, ProfileStarted, TraceFailed, TraceWritten
from tolaria.lane.profiling import LaneProfiler, Region

NOON_NS = 1_700_000_000_123_456_789
LARGE = 10**8


def new_profiler(
    directory: Path, *, bytes_max: int = LARGE, now_ns: Callable[[], int] = lambda: NOON_NS
) -> LaneProfiler:
    """A profiler that writes its traces to this directory."""
    return LaneProfiler(directory, bytes_max=bytes_max, resting=nullcontext, wall_ns=now_ns)


def work(profiler: LaneProfiler) -> None:
    """Passes every region once."""
    for name in get_args(Region):
        with profiler.mark(name):
            torch.ones(4).sum()


def traced(profiler: LaneProfiler, steps: int = 1) -> TraceWritten | TraceFailed:
    """Profiles that many steps and returns the outcome."""
    assert profiler.start(steps) == ProfileStarted(steps)
    for step in range(1, steps):
        work(profiler)
        assert profiler.after_step(step) is None
    work(profiler)
    done = profiler.after_step(steps)
    assert done is not None
    assert done.global_step == steps
    return done.outcome


def test_a_window_writes_a_chrome_trace_with_every_region(tmp_path: Path) -> None:
    """After its last step there is a trace: valid JSON with each region as often as it was passed."""
    profiler = new_profiler(tmp_path / "traces")
    work(profiler)
    result = traced(profiler, steps=3)
    work(profiler)
    assert isinstance(result, TraceWritten)
    assert Path(result.path).name == "trace-20231114T221320.123456Z.json"
    assert (result.steps, result.removed, result.size_bytes) == (3, 0, Path(result.path).stat().st_size)
    events = json.loads(Path(result.path).read_text())["traceEvents"]
    marked = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert sorted(marked) == sorted(get_args(Region) * 3)
    assert [path.name for path in (tmp_path / "traces").iterdir()] == [Path(result.path).name]


def test_without_a_window_nothing_is_written(tmp_path: Path) -> None:
    """Regions and steps have no effect, and exceptions pass through regions."""
    profiler = new_profiler(tmp_path / "traces")
    work(profiler)
    assert profiler.after_step(1) is None
    with pytest.raises(ZeroDivisionError), profiler.mark("forward"):
        raise ZeroDivisionError
    assert not (tmp_path / "traces").exists()


def test_names_are_unique_and_sort_by_age(tmp_path: Path) -> None:
    """Two traces in the same microsecond by each of two profilers are four files."""
    paths = []
    for _ in range(2):
        profiler = new_profiler(tmp_path)
        for _ in range(2):
            result = traced(profiler)
            assert isinstance(result, TraceWritten)
            paths.append(Path(result.path))
    assert paths == sorted(set(paths))


def test_the_oldest_traces_are_deleted(tmp_path: Path) -> None:
    """The directory stays within its size; partial files of a crash are deleted too, and other files are kept."""
    size_bytes = traced_size(tmp_path / "measure")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "trace-old.json.partial.tmp").write_text("half")
    times = iter(range(NOON_NS, NOON_NS + 10**12, 10**9))
    profiler = new_profiler(tmp_path, bytes_max=int(size_bytes * 2.5), now_ns=lambda: next(times))
    results = [traced(profiler) for _ in range(4)]
    written = [result for result in results if isinstance(result, TraceWritten)]
    assert [result.removed for result in written] == [0, 0, 1, 1]
    assert sorted(tmp_path.glob("trace-*")) == [Path(result.path) for result in written[2:]]
    assert (tmp_path / "notes.txt").exists()


def traced_size(directory: Path) -> int:
    """Size in bytes of a trace of one step."""
    result = traced(new_profiler(directory))
    assert isinstance(result, TraceWritten)
    return result.size_bytes


def test_a_trace_larger_than_the_directory_is_not_kept(tmp_path: Path) -> None:
    """The trace is deleted, older ones stay, and the failure gives the reason."""
    assert isinstance(traced(new_profiler(tmp_path)), TraceWritten)
    before = list(tmp_path.iterdir())
    result = traced(new_profiler(tmp_path, bytes_max=100))
    assert isinstance(result, TraceFailed)
    assert result.stage == "cap"
    assert list(tmp_path.iterdir()) == before


@contextmanager
def no_directory(directory: Path) -> Iterator[None]:
    """There is a file in place of the directory."""
    directory.write_text("in the way")
    yield
    directory.unlink()


@contextmanager
def full_disk(directory: Path, limit_bytes: int = 2048) -> Iterator[None]:
    """No file may grow beyond the limit; the exporter reports no error."""
    directory.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def nearly_full_disk(directory: Path) -> AbstractContextManager[None]:
    """Only the end of the trace does not fit; the exporter writes the rest."""
    return full_disk(directory, traced_size(directory.with_name("measure")) - 1000)


@contextmanager
def no_file(directory: Path) -> Iterator[None]:
    """There is a directory in place of the file; the exporter reports no error."""
    aside = directory / "trace-20231114T221320.123456Z.json.partial.tmp"
    aside.mkdir(parents=True)
    yield
    aside.rmdir()


@pytest.mark.parametrize("broken", [no_directory, full_disk, nearly_full_disk, no_file])
def test_a_failed_export_is_a_result(tmp_path: Path, broken: Callable[[Path], AbstractContextManager[None]]) -> None:
    """Nothing is raised and no trace is left; once the cause is gone the next window works."""
    profiler = new_profiler(tmp_path / "traces")
    with broken(tmp_path / "traces"):
        result = traced(profiler)
    assert isinstance(result, TraceFailed)
    assert result.stage == "export"
    assert result.reason
    assert not list(tmp_path.glob("traces/*"))
    assert isinstance(traced(profiler), TraceWritten)


@pytest.mark.parametrize("steps", [0, -1, PROFILE_STEPS_MAX + 1])
def test_a_window_is_bounded(tmp_path: Path, steps: int) -> None:
    """No steps, or too many, are an error."""
    profiler = new_profiler(tmp_path)
    with pytest.raises(InvalidFieldError, match="steps"):
        profiler.start(steps)
    assert isinstance(traced(profiler), TraceWritten)


def test_one_window_at_a_time(tmp_path: Path) -> None:
    """A second one is an error, and the first goes on."""
    profiler = new_profiler(tmp_path)
    assert profiler.start(2) == ProfileStarted(2)
    with pytest.raises(WrongStateError, match="2 steps to go"):
        profiler.start(1)
    assert profiler.after_step(1) is None
    done = profiler.after_step(2)
    assert done is not None
    assert isinstance(done.outcome, TraceWritten)


def test_an_abandoned_window_writes_nothing(tmp_path: Path) -> None:
    """There is no trace and no running profiler; abandoning again does nothing."""
    profiler = new_profiler(tmp_path)
    assert profiler.start(2) == ProfileStarted(2)
    profiler.abandon()
    profiler.abandon()
    assert profiler.after_step(1) is None
    assert list(tmp_path.iterdir()) == []
    assert isinstance(traced(profiler), TraceWritten)


def test_the_jobs_own_profiler_is_not_interrupted(tmp_path: Path) -> None:
    """Torch has one profiler: the window does not open while the job's is running, and gives the reason."""
    profiler = new_profiler(tmp_path)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as jobs:
        failed = profiler.start(1)
        torch.ones(4).sum()
    assert failed == TraceFailed("start", "the job's own profiler is running")
    assert jobs.key_averages()
    assert isinstance(traced(profiler), TraceWritten)


def test_the_heartbeat_rests_while_the_profiler_is_slow(tmp_path: Path) -> None:
    """It rests while the profiler starts and while the trace is written, and at no other step."""
    rests: list[str] = []

    @contextmanager
    def resting() -> Iterator[None]:
        rests.append("rest")
        yield

    profiler = LaneProfiler(tmp_path, bytes_max=LARGE, resting=resting)
    assert profiler.after_step(1) is None
    assert rests == []
    assert profiler.start(2) == ProfileStarted(2)
    assert profiler.after_step(2) is None
    assert len(rests) == 1
    assert isinstance(profiler.after_step(3), ProfileDone)
    assert profiler.after_step(4) is None
    assert len(rests) == 2
