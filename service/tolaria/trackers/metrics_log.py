"""`MetricsLog`: writes the records of a run to the log of metrics, in a thread."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from tolaria.trackers.records import LogPosition, repair, segment_path, segments_in, to_line
from tolaria.trackers.tracker import Point, Record, TrackedRun

WAITING_MAX: Final = 50_000
"""Points that wait for a disk that does not answer; further ones are dropped."""

_SEGMENTS: Final = 8
_GATHER_S: Final = 0.1
_RETRY_S: Final = 5.0


class MetricsLog:
    """Takes records at once, and writes them in a daemon thread, so that a full or hung disk costs the run nothing.

    Args:
        directory: where the segments are; it is created.
        size_bytes: size of all segments together, about; the oldest are removed. 0: nothing is written.
    """

    def __init__(self, directory: Path, size_bytes: int) -> None:
        self._directory = directory
        self._segment_bytes = size_bytes // _SEGMENTS
        self._waiting: deque[Record] = deque()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="tolaria-metrics-log", daemon=True)
        self._descriptor: int | None = None
        self._run: TrackedRun | None = None
        self._at = LogPosition()
        self.written = LogPosition()
        """The end of what has been written."""
        self.problem = ""
        """Why nothing can be written at present; empty if it can."""
        self.dropped = 0
        """Points that were dropped."""

    @property
    def enabled(self) -> bool:
        """Whether anything is written."""
        return self._segment_bytes > 0

    def put(self, record: Record) -> None:
        """Queues a record, and returns at once. Points are dropped while too many wait; other records never are."""
        if not self.enabled:
            return
        if isinstance(record, Point) and len(self._waiting) >= WAITING_MAX:
            self.dropped += 1
            return
        self._waiting.append(record)
        self._wake.set()

    def start(self) -> None:
        """Starts the thread."""
        if self.enabled:
            self._thread.start()

    def close(self, timeout_s: float) -> bool:
        """Writes what waits, and gives up after `timeout_s`; returns whether all of it is written."""
        if not self._thread.is_alive():
            return not self._waiting
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive() and not self._waiting

    def _serve(self) -> None:
        while True:
            self._wake.wait()
            self._closing.wait(_GATHER_S)  # what arrives together is written together
            self._wake.clear()
            closing = self._closing.is_set()
            written = self._write_waiting()
            if closing:
                break
            if not written:
                self._closing.wait(_RETRY_S)
                self._wake.set()
        self._close_segment()

    def _write_waiting(self) -> bool:
        """Writes all records that wait; returns False, with the problem noted, if the file system refuses."""
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self.problem = error.strerror or str(error)
            self._close_segment()  # what was written of a line is cut off when it is opened again
            return False
        self.problem = ""
        return True

    def _write(self, record: Record) -> None:
        line = to_line(record)
        if self._descriptor is None:
            self._open_newest()
        elif self._at.offset >= self._segment_bytes:
            self._begin_segment(self._at.segment + 1, record)
        if isinstance(record, TrackedRun):
            self._run = record
        self._append(line)

    def _open_newest(self) -> None:
        """Opens the newest segment and repairs its end, or creates the first."""
        self._directory.mkdir(parents=True, exist_ok=True)
        numbers = segments_in(self._directory)
        if not numbers:
            self._begin_segment(1, None)
            return
        size = repair(segment_path(self._directory, numbers[-1]))
        self._descriptor = os.open(segment_path(self._directory, numbers[-1]), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._at = self.written = LogPosition(numbers[-1], size)

    def _begin_segment(self, number: int, record: Record | None) -> None:
        """Creates a segment, which begins with the run as it is before `record`, and removes the oldest ones."""
        self._close_segment()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(segment_path(self._directory, number), flags, 0o600)
        self._at = self.written = LogPosition(number, 0)
        for old in segments_in(self._directory)[:-_SEGMENTS]:
            with suppress(FileNotFoundError):
                segment_path(self._directory, old).unlink()
        if self._run is not None and record is not None and not isinstance(record, TrackedRun):
            # No earlier step than that of the record has been undone by it, and a rewind says itself what it undoes.
            step = max(record.global_step, self._run.global_step)
            self._append(to_line(replace(self._run, global_step=step, attempt=record.attempt, time=time.time())))

    def _append(self, line: bytes) -> None:
        if self._descriptor is None:
            return
        left = memoryview(line)
        while left:
            left = left[os.write(self._descriptor, left) :]
        self._at = self.written = LogPosition(self._at.segment, self._at.offset + len(line))

    def _close_segment(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
