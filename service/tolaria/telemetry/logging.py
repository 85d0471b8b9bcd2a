"""Logging with structlog: JSON or console lines, rendered and written by a background thread.

A blocked or closed stream does not block training: lines are dropped and counted when the queue is full or a write
fails. Lines of level critical have a queue to themselves, which is written first and drops nothing. Rendering happens
in the thread because formatting a traceback reads source files.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from tolaria.config import LoggingSettings

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_QUEUE_LINES_MAX = 8192
_FLUSH_TIMEOUT_S = 1.0

ON_WRITTEN = "_on_written"
"""Key of an event whose value is called, in the writer's thread, once the event's line has been written."""

Priority = Literal["normal", "high", "critical"]


@dataclass(slots=True)
class LogContext:
    """The run's position, which a structlog processor adds to each line."""

    run_id: str = ""
    epoch: int = 0
    step: int = 0

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        """Adds run id, epoch and step to a line, unless it has them already."""
        if self.run_id:
            event.setdefault("run_id", self.run_id)
            event.setdefault("epoch", self.epoch)
            event.setdefault("step", self.step)
        return event


_CLIENT_GONE = "ExecuteBatchError"
"""What gRPC raises, and reports as an error, when a client leaves while a response is written to it."""


class LineWriter:
    """Renders events and writes them to a stream, in a daemon thread that runs while the context is open.

    The last of `renderers` returns the line. `on_dropped` is called from any thread with the priority of each event
    that was dropped: from a full queue, or, also if critical, because its write failed. The exit waits until queued
    events are written, at most a second if the stream is blocked.
    """

    def __init__(self, stream: TextIO, renderers: list[Processor], on_dropped: Callable[[Priority], None]) -> None:
        self._stream = stream
        self._renderers = renderers
        self._on_dropped = on_dropped
        self._critical: deque[EventDict] = deque()
        self._queue: deque[tuple[Priority, EventDict]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="tolaria-log", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_FLUSH_TIMEOUT_S)

    def msg(self, **event: Any) -> None:
        """Queues an event without blocking."""
        self._put(event, "normal")

    def failure(self, **event: Any) -> None:
        """Queues a warning or an error without blocking."""
        self._put(event, "high")

    def critical(self, **event: Any) -> None:
        """Queues an event ahead of all others without blocking; never drops it. Few events are critical."""
        with self._changed:
            self._critical.append(event)
            self._changed.notify()

    # structlog calls the method named after the level.
    debug = info = msg
    warning = error = exception = failure

    def _put(self, event: EventDict, priority: Priority) -> None:
        with self._changed:
            if not (dropped := len(self._queue) >= _QUEUE_LINES_MAX):
                self._queue.append((priority, event))
                self._changed.notify()
        if dropped:
            self._on_dropped(priority)

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            priority, event = taken
            on_written = event.pop(ON_WRITTEN, None)
            rendered: Any = event
            for render in self._renderers:
                rendered = render(None, event["level"], rendered)
            try:
                self._stream.write(f"{rendered}\n")
                self._stream.flush()
            except (OSError, ValueError):  # a broken pipe; a closed stream
                self._on_dropped(priority)
            else:
                if on_written is not None:
                    on_written()

    def _take(self) -> tuple[Priority, EventDict] | None:
        """Waits for an event; returns None once closing and all are written."""
        with self._changed:
            while not (self._critical or self._queue):
                if self._closing:
                    return None
                self._changed.wait()
            return ("critical", self._critical.popleft()) if self._critical else self._queue.popleft()


class _StandardRecords(logging.Handler):
    """Passes warnings of other libraries to structlog: written by the library itself, they block on a full stream."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Logs a record, with the traceback of its exception."""
        log = structlog.get_logger()
        if record.exc_info and record.exc_info[0] and record.exc_info[0].__name__ == _CLIENT_GONE:
            log.info("client_gone", detail=record.getMessage())
            return
        write = log.error if record.levelno >= logging.ERROR else log.warning
        write(record.getMessage(), logger=record.name, exc_info=record.exc_info)


@contextmanager
def logging_to(
    stream: TextIO, settings: LoggingSettings, context: LogContext, *, on_dropped: Callable[[Priority], None]
) -> Iterator[None]:
    """Directs structlog, and warnings of the standard library's logging, to `stream` until the context exits."""
    root, records = logging.getLogger(), _StandardRecords()
    try:
        with LineWriter(stream, _renderers(settings, stream), on_dropped) as writer:
            structlog.configure(
                processors=[
                    context,
                    structlog.contextvars.merge_contextvars,
                    structlog.processors.add_log_level,
                    structlog.processors.TimeStamper(fmt="iso", utc=True),
                    lambda _logger, _method, event: event,  # structlog passes its items to the writer as keywords
                ],
                wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[settings.level]),
                logger_factory=lambda *_args: writer,
                cache_logger_on_first_use=False,
            )
            root.addHandler(records)
            yield
    finally:
        root.removeHandler(records)
        structlog.reset_defaults()


def set_level(level: str) -> None:
    """Writes lines of this level and above from now on, in a context of `logging_to`."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]))


def _renderers(settings: LoggingSettings, stream: TextIO) -> list[Processor]:
    if settings.format == "json" or (settings.format == "auto" and not stream.isatty()):
        return [structlog.processors.dict_tracebacks, _replace_non_finite, structlog.processors.JSONRenderer()]
    return [structlog.dev.ConsoleRenderer(colors=stream.isatty())]


def _replace_non_finite(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replaces NaN and infinities by text, as they are not valid JSON."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()}
