from __future__ import annotations

import io
import json
import threading

import structlog

from tolaria.config import LoggingSettings
from tolaria.telemetry.logging import LogContext, logging_to


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
