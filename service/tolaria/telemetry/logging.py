"""Logs: JSON or console lines on standard error, rendered and written by a thread of their own.

Owns format and delivery. A reader of the log that stops reading, or goes away, must not stop training: lines are
dropped and counted once the queue is full, or the stream is closed. Rendering a traceback reads source files, which the
event loop must not do either.
"""

from __future__ import annotations

import math
import queue
import threading
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

Priority = Literal["normal", "high"]


@dataclass(slots=True)
class LogContext:
    """Where the run stands; written by the training loop, stamped on every line."""

    run_id: str = ""
    epoch: int = 0
    step: int = 0

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        """Add run id, epoch and step to a line, as a structlog processor."""
        if self.run_id:
            event.setdefault("run_id", self.run_id)
            event.setdefault("epoch", self.epoch)
            event.setdefault("step", self.step)
        return event


class LineWriter:
    """Renders events and writes them to a stream, in a thread of its own that runs while the block does.

    The thread is daemonic: a reader that blocks it cannot keep the process from ending. The end of the block waits for
    what is queued, for a blocked reader a second at most.

    Args:
        stream: where lines go.
        renderers: structlog processors, the last of which returns the line.
        on_dropped: told the priority of an event that found no room, or could not be written; by any thread.
    """

    def __init__(self, stream: TextIO, renderers: list[Processor], on_dropped: Callable[[str], None]) -> None:
        self._stream = stream
        self._renderers = renderers
        self._on_dropped = on_dropped
        self._events: queue.Queue[tuple[Priority, EventDict] | None] = queue.Queue(_QUEUE_LINES_MAX)
        self._thread = threading.Thread(target=self._run, name="tolaria-log", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._events.put(None, timeout=_FLUSH_TIMEOUT_S)
        except queue.Full:
            return
        self._thread.join(_FLUSH_TIMEOUT_S)

    def msg(self, **event: Any) -> None:
        """Queue one event; never blocks."""
        self._put(event, "normal")

    def failure(self, **event: Any) -> None:
        """Queue one event about something that went wrong; never blocks."""
        self._put(event, "high")

    # structlog calls the method that is named like the level.
    debug = info = msg
    warning = error = critical = exception = failure

    def _put(self, event: EventDict, priority: Priority) -> None:
        try:
            self._events.put_nowait((priority, event))
        except queue.Full:
            self._on_dropped(priority)

    def _run(self) -> None:
        while (queued := self._events.get()) is not None:
            priority, event = queued
            rendered: Any = event
            for render in self._renderers:
                rendered = render(None, event["level"], rendered)
            try:
                self._stream.write(f"{rendered}\n")
                self._stream.flush()
            except (OSError, ValueError):  # a broken pipe; a closed stream
                self._on_dropped(priority)


@contextmanager
def logging_to(
    stream: TextIO, settings: LoggingSettings, context: LogContext, *, on_dropped: Callable[[str], None]
) -> Iterator[None]:
    """Send structlog's lines to `stream` until the block ends."""
    try:
        with LineWriter(stream, _renderers(settings, stream), on_dropped) as writer:
            structlog.configure(
                processors=[*_stamps(context), _hand_over],
                wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[settings.level]),
                logger_factory=lambda *_args: writer,
                cache_logger_on_first_use=False,
            )
            yield
    finally:
        structlog.reset_defaults()


def _stamps(context: LogContext) -> list[Processor]:
    return [
        context,
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


def _hand_over(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """The last processor on the caller's side: structlog calls the writer with what it returns as keywords."""
    return event


def _renderers(settings: LoggingSettings, stream: TextIO) -> list[Processor]:
    if settings.format == "json" or (settings.format == "auto" and not stream.isatty()):
        return [structlog.processors.dict_tracebacks, _json_has_no_nan, structlog.processors.JSONRenderer()]
    return [structlog.dev.ConsoleRenderer(colors=stream.isatty())]


def _json_has_no_nan(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """NaN and infinities become words: collectors refuse a line with a bare NaN."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()}
