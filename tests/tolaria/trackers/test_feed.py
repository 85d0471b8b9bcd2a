import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from tolaria.trackers import Note, Point, Rewind, TrackedRun, TrackerState
from tolaria.trackers.feed import TrackerFeed, load_progress
from tolaria.trackers.records import segment_path, to_line
from tolaria.trackers.tracker import Record, RunEnd


class Recorder:
    """A tracker that notes its calls, and fails when it is told to."""

    package: ClassVar[str] = ""
    options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.fails = False
        self.state: TrackerState | None = None

    def open(self, run: TrackedRun, state: TrackerState) -> None:
        self.state = state
        self.calls.append(("open", run.run_id, state.newest_step, dict(state.memory)))
        state.memory["opened"] = state.memory.get("opened", 0) + 1

    def log(self, points: Sequence[Point]) -> None:
        if self.fails:
            raise OSError("no answer")
        self.calls += [("log", point.global_step, dict(point.values)) for point in points]

    def rewind(self, to: Rewind) -> None:
        assert self.state is not None
        left = [point.global_step for point in self.state.history()]
        self.calls.append(("rewind", to.global_step, to.attempt, left))

    def annotate(self, notes: Sequence[Note]) -> None:
        self.calls += [("note", note.text) for note in notes]

    def close(self, outcome: str) -> None:
        self.calls.append(("close", outcome))


def run(step: int = 0, run_id: str = "one") -> TrackedRun:
    """A run that starts or resumes at a step."""
    return TrackedRun(run_id, "", "e", "digits", {}, {}, step, 1, 1.5)


def point(step: int, attempt: int = 1, name: str = "loss") -> Point:
    """One metric at a step."""
    return Point(step, attempt, 1, 2.0, {name: float(step)})


class Log:
    """A log on disk, and feeds of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "progress.json"

    def append(self, *records: Record, segment: int = 1) -> None:
        with segment_path(self.directory, segment).open("ab") as file:
            file.writelines(map(to_line, records))

    def feed(self, tracker: Recorder) -> TrackerFeed:
        return TrackerFeed(tracker, self.directory / "files", self.directory, self.path)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """An empty log."""
    return Log(tmp_path)


def test_a_tracker_gets_what_is_written(log: Log) -> None:
    """In its order, as it comes."""
    tracker = Recorder()
    feed = log.feed(tracker)
    assert not feed.advance()
    log.append(run(), point(1), Note(1, 1, 2.0, "seen"))
    assert feed.advance()
    log.append(point(2), RunEnd(2, 1, 3.0, "finished"))
    assert feed.advance()
    assert not feed.advance()
    feed.close()
    assert tracker.calls == [
        ("open", "one", -1, {}), ("log", 1, {"loss": 1.0}), ("note", "seen"), ("log", 2, {"loss": 2.0}),
        ("close", "finished"),
    ]  # fmt: skip


def test_another_process_goes_on_where_the_last_one_was(log: Log) -> None:
    """It opens the run with the newest step, and with what the tracker remembers."""
    log.append(run(), point(1), point(2))
    first, second = Recorder(), Recorder()
    feed = log.feed(first)
    feed.advance()
    feed.close()
    assert first.calls[-1] == ("close", "")
    log.append(point(3))
    log.feed(second).advance()
    assert second.calls == [("open", "one", 2, {"opened": 1}), ("log", 3, {"loss": 3.0})]


def test_what_a_tracker_refuses_is_given_to_the_next_process(log: Log) -> None:
    """Nothing is taken for logged before it is."""
    log.append(run(), point(1))
    tracker = Recorder()
    feed = log.feed(tracker)
    feed.advance()
    tracker.fails = True
    log.append(point(2), point(3))
    with pytest.raises(OSError, match="no answer"):
        feed.advance()
    again = Recorder()
    log.feed(again).advance()
    assert again.calls == [("open", "one", 1, {"opened": 1}), ("log", 2, {"loss": 2.0}), ("log", 3, {"loss": 3.0})]


def test_a_tracker_that_fails_at_its_first_point_loses_no_run(log: Log) -> None:
    """The next process knows the run, whose record has been passed on."""
    log.append(run(), point(1))
    tracker = Recorder()
    tracker.fails = True
    with pytest.raises(OSError, match="no answer"):
        log.feed(tracker).advance()
    again = Recorder()
    log.feed(again).advance()
    assert again.calls == [("open", "one", -1, {"opened": 1}), ("log", 1, {"loss": 1.0})]


def test_a_rollback_rewinds_a_tracker_that_has_gone_further(log: Log) -> None:
    """The history ends at the step; a tracker that was not further is left alone."""
    tracker = Recorder()
    log.append(run(), point(1), point(2), point(3), Rewind(1, 2, 3.0), point(2, 2), Rewind(2, 3, 4.0), point(3, 3))
    log.feed(tracker).advance()
    assert [call for call in tracker.calls if call[0] == "rewind"] == [("rewind", 1, 2, [1])]
    assert [call[1] for call in tracker.calls if call[0] == "log"] == [1, 2, 3, 2, 3]


def test_a_restart_at_an_earlier_step_is_a_rewind(log: Log) -> None:
    """And one at the newest step is none, nor is the head of a segment."""
    tracker = Recorder()
    log.append(run(), point(1), point(2), run(2), point(3), run(1), point(2))
    log.feed(tracker).advance()
    assert [call for call in tracker.calls if call[0] != "log"] == [("open", "one", -1, {}), ("rewind", 1, 1, [1])]


def test_a_repeated_evaluation_is_logged_once(log: Log) -> None:
    """A metric that has a value at a step gets no second one there."""
    tracker = Recorder()
    log.append(run(), point(5), point(5, 1, "validation"), Rewind(5, 2, 3.0), point(5, 2, "validation"), point(6, 2))
    log.feed(tracker).advance()
    assert [call[1:] for call in tracker.calls if call[0] == "log"] == [
        (5, {"loss": 5.0}), (5, {"validation": 5.0}), (6, {"loss": 6.0}),
    ]  # fmt: skip


def test_a_finished_run_that_goes_on_is_opened_again(log: Log) -> None:
    """And another run begins without what is remembered of the one before."""
    tracker = Recorder()
    log.append(run(), point(1), RunEnd(1, 1, 3.0, "finished"), run(1), point(2), run(0, "two"), point(1))
    log.feed(tracker).advance()
    assert [call for call in tracker.calls if call[0] in {"open", "close"}] == [
        ("open", "one", -1, {}), ("close", "finished"), ("open", "one", 1, {"opened": 1}), ("close", ""),
        ("open", "two", -1, {}),
    ]  # fmt: skip


def test_segments_that_are_gone_are_counted(log: Log) -> None:
    """A tracker that was away for too long goes on with the oldest one that is left."""
    log.append(run(), point(1))
    log.feed(Recorder()).advance()
    segment_path(log.directory, 1).unlink()
    log.append(run(8), point(9), segment=4)
    tracker = Recorder()
    log.feed(tracker).advance()
    assert tracker.calls[-1] == ("log", 9, {"loss": 9.0})
    assert load_progress(log.path).gaps == 3


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"position": {"segment": "x"}}), json.dumps({"other": 1})])
def test_progress_that_cannot_be_read_is_that_of_a_new_tracker(log: Log, text: str) -> None:
    """The whole log is read again."""
    log.path.write_text(text)
    log.append(run(), point(1))
    tracker = Recorder()
    log.feed(tracker).advance()
    assert tracker.calls == [("open", "one", -1, {}), ("log", 1, {"loss": 1.0})]
