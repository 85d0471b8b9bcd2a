from __future__ import annotations

import io
import json
import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import structlog

from tolaria.config import LoggingSettings
from tolaria.telemetry.logging import ON_WRITTEN, LineWriter, LogContext, logging_to


def written(settings: LoggingSettings, context: LogContext) -> str:
    """The output for a debug line and an info line."""
    stream = io.StringIO()
    with logging_to(stream, settings, context, on_dropped=lambda _priority: None):
        log = structlog.get_logger()
        log.debug("small")
        log.info("epoch_finished", loss=0.5)
    return stream.getvalue()


def test_json_lines_have_run_epoch_and_step() -> None:
    """Each line is a JSON object with the run's position; debug lines are written at level debug only."""
    text = written(LoggingSettings(format="json"), LogContext("r1", 2, 30))
    (line,) = [json.loads(line) for line in text.splitlines()]
    assert {k: line[k] for k in ("event", "loss", "run_id", "epoch", "step", "level")} == {
        "event": "epoch_finished", "loss": 0.5, "run_id": "r1", "epoch": 2, "step": 30, "level": "info",
    }  # fmt: skip


def test_non_finite_numbers_are_written_as_text() -> None:
    """NaN and infinity do not make a line invalid JSON."""
    stream = io.StringIO()
    with logging_to(stream, LoggingSettings(format="json"), LogContext(), on_dropped=lambda _priority: None):
        structlog.get_logger().info("x", loss=float("nan"), norm=float("inf"))

    def refuse(word: str) -> float:
        raise AssertionError(word)

    line = json.loads(stream.getvalue(), parse_constant=refuse)
    assert (line["loss"], line["norm"]) == ("nan", "inf")


def test_console_format_is_not_json() -> None:
    """The console format has the same content as JSON."""
    text = written(LoggingSettings(format="console", level="debug"), LogContext("r1", 2, 30))
    assert "small" in text
    assert "epoch_finished" in text
    assert "{" not in text


class BlockedStream(io.StringIO):
    """A pipe whose reader does not read until `unblock` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.blocked, self.unblock = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.blocked.set()
        self.unblock.wait(600)
        return super().write(text)


@contextmanager
def writing_to(stream: BlockedStream, dropped: list[str]) -> Iterator[Any]:
    """Logs to a stream that has blocked on the first line; yields the logger."""
    with logging_to(stream, LoggingSettings(format="json"), LogContext(), on_dropped=dropped.append):
        log = structlog.get_logger()
        log.info("first")
        assert stream.blocked.wait(180)
        yield log


def test_blocked_stream_drops_lines_without_blocking_the_caller() -> None:
    """When the queue is full, lines are dropped and reported by priority."""
    stream, dropped = BlockedStream(), list[str]()
    with writing_to(stream, dropped) as log:
        for _ in range(9000):
            log.info("more")
        log.error("bad")
        stream.unblock.set()
    assert dropped[-1] == "high"
    assert dropped.count("normal") == 9000 - 8192


class BrokenStream(io.StringIO):
    """A stream whose writes raise `error` until it is None."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error: Exception | None = error

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), ValueError("I/O operation on closed file")])
def test_failed_writes_are_dropped_and_later_ones_succeed(error: Exception) -> None:
    """Lines that cannot be written are reported by priority, and the thread continues."""
    stream = BrokenStream(error)
    dropped: queue.Queue[str] = queue.Queue()
    with logging_to(stream, LoggingSettings(format="json"), LogContext(), on_dropped=dropped.put):
        log = structlog.get_logger()
        log.info("lost")
        log.error("lost too")
        assert [dropped.get(timeout=180), dropped.get(timeout=180)] == ["normal", "high"]
        stream.error = None
        log.info("read")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["read"]
    assert dropped.empty()


def test_writer_flushes_and_ends_its_thread_on_exit() -> None:
    """Queued events are written when the context exits."""
    stream = io.StringIO()
    with LineWriter(stream, [lambda _logger, _level, event: str(event["event"])], lambda _priority: None) as writer:
        writer.info(event="queued", level="info")
        assert "tolaria-log" in {thread.name for thread in threading.enumerate()}
    assert stream.getvalue() == "queued\n"
    assert "tolaria-log" not in {thread.name for thread in threading.enumerate()}


def test_critical_lines_are_never_dropped_and_are_written_first() -> None:
    """Neither a blocked stream nor a full queue loses one; the reader gets them ahead of everything that waits."""
    stream, dropped = BlockedStream(), list[str]()
    with writing_to(stream, dropped) as log:
        for number in range(9000):
            log.warning("more", number=number)
        for number in range(9000):
            log.critical("halt", number=number)
        stream.unblock.set()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["number"] for line in lines[1:9001]] == list(range(9000))
    assert {line["event"] for line in lines[1:9001]} == {"halt"}
    assert set(dropped) == {"high"}


def test_a_critical_line_that_cannot_be_written_is_reported_as_critical() -> None:
    """The failure is counted where the write fails."""
    dropped: queue.Queue[str] = queue.Queue()
    stream = BrokenStream(BrokenPipeError(32, "Broken pipe"))
    with logging_to(stream, LoggingSettings(format="json"), LogContext(), on_dropped=dropped.put):
        structlog.get_logger().critical("halt")
        assert dropped.get(timeout=180) == "critical"


def test_warnings_of_other_libraries_do_not_block_their_caller() -> None:
    """The standard library's own handler writes to the stream in the calling thread, such as the event loop's."""
    stream = BlockedStream()
    with logging_to(stream, LoggingSettings(format="json"), LogContext("r1"), on_dropped=lambda _priority: None):
        for _ in range(3):
            logging.getLogger("asyncio").error("a task failed", exc_info=ValueError("x"))
        logging.getLogger("asyncio").info("not shown")
        stream.unblock.set()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    shown = {(line["event"], line["logger"], line["level"], line["run_id"]) for line in lines}
    assert shown == {("a task failed", "asyncio", "error", "r1")}
    assert "ValueError" in stream.getvalue()
    assert not [kind for kind in logging.getLogger().handlers if "tolaria" in type(kind).__module__]


def test_a_written_line_is_confirmed_and_one_that_fails_is_not() -> None:
    """The confirmation comes after the write, and is no part of the line."""
    confirmed: queue.Queue[str] = queue.Queue()
    dropped: queue.Queue[str] = queue.Queue()
    stream = BrokenStream(BrokenPipeError(32, "Broken pipe"))

    def confirm() -> None:
        confirmed.put(stream.getvalue())

    with logging_to(stream, LoggingSettings(format="json"), LogContext(), on_dropped=dropped.put):
        log = structlog.get_logger()
        log.critical("lost", **{ON_WRITTEN: confirm})
        assert dropped.get(timeout=180) == "critical"
        stream.error = None
        log.critical("halt", **{ON_WRITTEN: confirm})
        written_by_then = confirmed.get(timeout=180)
    assert confirmed.empty()
    (line,) = [json.loads(line) for line in written_by_then.splitlines()]
    assert line["event"] == "halt"
    assert ON_WRITTEN not in line


def test_a_client_that_leaves_while_it_is_answered_is_no_error() -> None:
    """GRPC reports it as one, with a traceback."""

    class ExecuteBatchError(Exception):
        """As gRPC's own, which cannot be imported without its C extension."""

    stream = io.StringIO()
    with logging_to(stream, LoggingSettings(format="json"), LogContext(), on_dropped=lambda _priority: None):
        logging.getLogger("grpc._cython.cygrpc").error("raised in core", exc_info=ExecuteBatchError("x"))
    (line,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (line["event"], line["level"]) == ("client_gone", "info")
