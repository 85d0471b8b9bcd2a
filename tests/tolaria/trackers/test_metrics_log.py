import errno
import json
import math
import os
import time
from pathlib import Path

import pytest

from tolaria.trackers.metrics_log import MetricsLog
from tolaria.trackers.records import (
    LogPosition,
    LogReader,
    from_line,
    segment_path,
    segments_in,
    surviving_points,
    to_line,
)
from tolaria.trackers.tracker import Note, Point, Record, Rewind, RunEnd, TrackedRun


def run(step: int = 0, run_id: str = "one") -> TrackedRun:
    """A run that starts or resumes at a step."""
    return TrackedRun(run_id, "name", "experiment", "digits", {"who": "me"}, {"training.epochs": 3}, step, 1, 1.5)


def point(step: int, value: float = 1.0, attempt: int = 1, name: str = "train/loss") -> Point:
    """One metric at a step."""
    return Point(step, attempt, 1, 2.0, {name: value})


def write(directory: Path, *records: Record, size: int = 8_000_000) -> MetricsLog:
    """Writes records and closes the log."""
    log = MetricsLog(directory, size)
    log.start()
    for record in records:
        log.put(record)
    assert log.close(30)
    return log


def read(directory: Path) -> list[Record]:
    """All records of a log."""
    reader, found = LogReader(directory, LogPosition()), list[Record]()
    while records := reader.read():
        found += [record for record, _ in records]
    return found


def steps(points: list[Point]) -> list[tuple[int, float]]:
    """Steps and values of the loss."""
    return [(each.global_step, each.values["train/loss"]) for each in points]


def test_records_are_lines_of_json(tmp_path: Path) -> None:
    """Each with its step and attempt; what was put is what is read."""
    records: list[Record] = [run(), point(1), Note(1, 1, 3.0, "seen"), Rewind(0, 2, 4.0), RunEnd(0, 2, 5.0, "finished")]
    write(tmp_path, *records)
    assert read(tmp_path) == records
    lines = [json.loads(line) for line in segment_path(tmp_path, 1).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", "point", "note", "rewind", "end"]
    assert all({"global_step", "attempt", "time"} <= line.keys() for line in lines)


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    """JSON has none: a line is null there, so that any tool can read it."""
    values = {"loss": math.nan, "perplexity": math.inf, "f1": 0.5}
    write(tmp_path, Point(1, 1, 1, 2.0, values))
    assert "NaN" not in segment_path(tmp_path, 1).read_text()
    assert read(tmp_path) == [Point(1, 1, 1, 2.0, {"f1": 0.5})]


@pytest.mark.parametrize("torn", [b'{"kind":"po', b'{"kind":"point"}', b"\0" * 700, b'"x"\n\0\0\n'])
def test_what_a_crash_has_torn_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    """The next start appends after the last whole line."""
    write(tmp_path, run(), point(1))
    with segment_path(tmp_path, 1).open("ab") as file:
        file.write(torn)
    write(tmp_path, run(1), point(2))
    assert read(tmp_path) == [run(), point(1), run(1), point(2)]
    assert all(json.loads(line) for line in segment_path(tmp_path, 1).read_bytes().splitlines())


def test_a_torn_line_is_not_read_before_it_is_whole(tmp_path: Path) -> None:
    """A reader stays before it."""
    line = to_line(point(1))
    segment_path(tmp_path, 1).write_bytes(line[:20])
    reader = LogReader(tmp_path, LogPosition())
    assert reader.read() == []
    segment_path(tmp_path, 1).write_bytes(line)
    assert [record for record, _ in reader.read()] == [point(1)]
    assert reader.position == LogPosition(1, len(line))


def test_the_log_is_bounded(tmp_path: Path) -> None:
    """The oldest segments are removed, and each one that is left begins with the run."""
    write(tmp_path, run(), *(point(step) for step in range(3000)), size=80_000)
    numbers = segments_in(tmp_path)
    assert len(numbers) == 8
    assert numbers[0] > 1
    assert sum(segment_path(tmp_path, number).stat().st_size for number in numbers) < 100_000
    for number in numbers:
        first = from_line(segment_path(tmp_path, number).read_bytes().splitlines()[0])
        assert isinstance(first, TrackedRun)
        assert first.run_id == "one"
    left = surviving_points(tmp_path)
    assert [each.global_step for each in left] == list(range(left[0].global_step, 3000))


def test_a_log_goes_on_in_its_newest_segment(tmp_path: Path) -> None:
    """Also one that is full: a further segment begins."""
    write(tmp_path, run(), *(point(step) for step in range(200)), size=80_000)
    count = len(segments_in(tmp_path))
    write(tmp_path, run(199), *(point(step) for step in range(200, 400)), size=80_000)
    assert len(segments_in(tmp_path)) > count
    assert [each.global_step for each in surviving_points(tmp_path)] == list(range(400))


def test_only_what_a_rollback_leaves_survives(tmp_path: Path) -> None:
    """Later attempts take the place of what was undone."""
    write(
        tmp_path, run(), *(point(step, 1.0) for step in range(1, 9)), Rewind(5, 2, 3.0),
        *(point(step, 2.0, 2) for step in (6, 7)), Rewind(6, 3, 3.0), point(7, 3.0, 3),
    )  # fmt: skip
    assert steps(surviving_points(tmp_path)) == [*((step, 1.0) for step in range(1, 6)), (6, 2.0), (7, 3.0)]


def test_only_what_a_crash_leaves_survives(tmp_path: Path) -> None:
    """A run that is resumed at an earlier step begins there."""
    write(tmp_path, run(), *(point(step, 1.0) for step in range(1, 9)))
    write(tmp_path, run(4), *(point(step, 2.0) for step in range(5, 7)))
    assert steps(surviving_points(tmp_path)) == [*((step, 1.0) for step in range(1, 5)), (5, 2.0), (6, 2.0)]


def test_runs_are_kept_apart(tmp_path: Path) -> None:
    """One is asked for by its id, or the last one."""
    write(tmp_path, run(), point(1, 1.0), RunEnd(1, 1, 3.0, "finished"), run(0, "two"), point(1, 2.0))
    assert steps(surviving_points(tmp_path)) == [(1, 2.0)]
    assert steps(surviving_points(tmp_path, "one")) == [(1, 1.0)]


def test_an_evaluation_that_is_repeated_counts_once(tmp_path: Path) -> None:
    """A rollback to the last step of an epoch, before its evaluation, has it made again."""
    write(
        tmp_path, run(), point(5), point(5, 0.5, 1, "validation/loss"), Rewind(5, 2, 3.0),
        point(5, 0.6, 2, "validation/loss"), point(6, 1.0, 2),
    )  # fmt: skip
    found = surviving_points(tmp_path)
    assert [(each.global_step, dict(each.values)) for each in found] == [
        (5, {"train/loss": 1.0}), (5, {"validation/loss": 0.5}), (6, {"train/loss": 1.0}),
    ]  # fmt: skip


def test_a_log_of_no_size_writes_nothing(tmp_path: Path) -> None:
    """And starts no thread."""
    log = write(tmp_path / "metrics", run(), point(1), size=0)
    assert not log.enabled
    assert not (tmp_path / "metrics").exists()


def test_a_full_disk_loses_nothing_once_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The problem is shown meanwhile; a line that was written in part is cut off."""
    monkeypatch.setattr("tolaria.trackers.metrics_log._RETRY_S", 0.05)
    write_bytes, full = os.write, [True]

    def scarce(descriptor: int, data: bytes) -> int:
        if full[0] and bytes(data[:12]) != bytes(data):
            write_bytes(descriptor, data[:12])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(descriptor, data)

    monkeypatch.setattr("tolaria.trackers.metrics_log.os.write", scarce)
    log = MetricsLog(tmp_path, 8_000_000)
    log.start()
    log.put(run())
    log.put(point(1))
    wait_until(lambda: log.problem == "No space left on device")
    full[0] = False
    wait_until(lambda: not log.problem)
    assert log.close(30)
    assert read(tmp_path) == [run(), point(1)]


def test_points_are_dropped_when_too_many_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a disk that does not answer; rewinds and ends are not."""
    monkeypatch.setattr("tolaria.trackers.metrics_log.WAITING_MAX", 3)
    log = MetricsLog(tmp_path, 8_000_000)  # not started
    for step in range(5):
        log.put(point(step))
    log.put(Rewind(2, 2, 3.0))
    assert log.dropped == 2
    log.start()
    assert log.close(30)
    assert read(tmp_path) == [*(point(step) for step in range(3)), Rewind(2, 2, 3.0)]


def test_putting_never_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does closing, beyond its timeout."""
    monkeypatch.setattr("tolaria.trackers.metrics_log.os.write", lambda *_: time.sleep(3600))
    log = MetricsLog(tmp_path, 8_000_000)
    log.start()
    for step in range(1000):
        log.put(point(step))
    assert not log.close(0.1)


def wait_until(condition: object) -> None:
    """Waits, with a bound, until a condition is true."""
    deadline_s = time.monotonic() + 180
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
