from __future__ import annotations

import io
import json
import queue
import threading

import pytest
import structlog

from tolaria.config import LoggingSettings
from tolaria.telemetry.logging import LineWriter, LogContext, logging_to


def logged(settings: LoggingSettings, context: LogContext) -> str:
    """All that is written of one debug line and one info line."""
    stream = io.StringIO()
    with logging_to(stream, settings, context, on_dropped=lambda _priority: None):
        log = structlog.get_logger()
        log.debug("small")
        log.info("epoch_finished", loss=0.5)
    return stream.getvalue()


def test_json_lines_carry_run_epoch_and_step() -> None:
    """Each line is one JSON object that says where the run stood; debug lines need the level."""
    text = logged(LoggingSettings(format="json"), LogContext("r1", 2, 30))
    (line,) = [json.loads(line) for line in text.splitlines()]
    assert {k: line[k] for k in ("event", "loss", "run_id", "epoch", "step", "level")} == {
        "event": "epoch_finished", "loss": 0.5, "run_id": "r1", "epoch": 2, "step": 30, "level": "info",
    }  # fmt: skip


def test_a_nan_does_not_break_the_json() -> None:
    """What is not finite is written as a word, so that every line parses strictly."""
    stream = io.StringIO()
    with logging_to(stream, LoggingSettings(format="json"), LogContext(), on_dropped=lambda _priority: None):
        structlog.get_logger().info("x", loss=float("nan"), norm=float("inf"))

    def refuse(word: str) -> float:
        raise AssertionError(word)

    line = json.loads(stream.getvalue(), parse_constant=refuse)
    assert (line["loss"], line["norm"]) == ("nan", "inf")


def test_console_lines_are_for_people() -> None:
    """The console format is not JSON and holds the same facts; the level decides what is written."""
    text = logged(LoggingSettings(format="console", level="debug"), LogContext("r1", 2, 30))
    assert "small" in text
    assert "epoch_finished" in text
    assert "{" not in text


class StuckStream(io.StringIO):
    """A pipe whose reader has stopped reading."""

    def __init__(self) -> None:
        super().__init__()
        self.stuck, self.go_on = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.stuck.set()
        self.go_on.wait(10)
        return super().write(text)


def test_a_reader_that_stops_reading_stops_nobody() -> None:
    """When nobody reads the log, lines are dropped by priority and counted; the caller never waits."""
    stream = StuckStream()
    dropped: list[str] = []
    with logging_to(stream, LoggingSettings(format="json"), LogContext(), on_dropped=dropped.append):
        log = structlog.get_logger()
        log.info("first")
        assert stream.stuck.wait(5)
        for _ in range(9000):
            log.info("more")
        log.error("bad")
        stream.go_on.set()
    assert dropped[-1] == "high"
    assert dropped.count("normal") == 9000 - 8192


class ClosablePipe(io.StringIO):
    """A pipe to a reader that goes away, and comes back when `error` is None."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error: Exception | None = error

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), ValueError("I/O operation on closed file")])
def test_a_reader_that_goes_away_costs_its_lines_and_no_others(error: Exception) -> None:
    """Lines that cannot be written are counted by priority, and the thread lives on for those that can."""
    stream = ClosablePipe(error)
    dropped: queue.Queue[str] = queue.Queue()
    with logging_to(stream, LoggingSettings(format="json"), LogContext(), on_dropped=dropped.put):
        log = structlog.get_logger()
        log.info("lost")
        log.error("lost too")
        assert [dropped.get(timeout=5), dropped.get(timeout=5)] == ["normal", "high"]
        stream.error = None
        log.info("read")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["read"]
    assert dropped.empty()


def test_a_writer_runs_while_its_block_does() -> None:
    """What was queued is written by the end of the block, and the thread has ended with it."""
    stream = io.StringIO()
    with LineWriter(stream, [lambda _logger, _level, event: str(event["event"])], lambda _priority: None) as writer:
        writer.info(event="queued", level="info")
        assert "tolaria-log" in {thread.name for thread in threading.enumerate()}
    assert stream.getvalue() == "queued\n"
    assert "tolaria-log" not in {thread.name for thread in threading.enumerate()}
