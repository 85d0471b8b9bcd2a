"""The log of metrics as files: lines of JSON in numbered segments, of which the oldest are removed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from tolaria.trackers.tracker import Note, Point, Record, Rewind, RunEnd, TrackedRun

METRICS_DIR: Final = "metrics"
"""Directory of the log in `state.dir`."""

_KINDS: Final[dict[str, type[Any]]] = {"run": TrackedRun, "point": Point, "rewind": Rewind, "note": Note, "end": RunEnd}
_NAMES: Final = {kind: name for name, kind in _KINDS.items()}
_FIELDS: Final = {name: tuple(field.name for field in fields(kind)) for name, kind in _KINDS.items()}
_SEGMENT: Final = re.compile(r"metrics-(\d{6,})\.jsonl")
_READ_BYTES: Final = 1 << 20
_LINE_BYTES_MAX: Final = 1 << 24


def to_line(record: Record) -> bytes:
    """Returns a record as one line of JSON. Numbers that are not finite become null, as JSON has none."""
    name = _NAMES[type(record)]
    values: dict[str, Any] = {"kind": name} | {field: getattr(record, field) for field in _FIELDS[name]}
    if isinstance(record, Point):
        values["values"] = {key: value if math.isfinite(value) else None for key, value in record.values.items()}
    return json.dumps(values, separators=(",", ":"), default=str).encode() + b"\n"


def from_line(line: bytes) -> Record | None:
    """Returns the record of a line; None for one that is damaged, or of a kind that this version does not know."""
    try:
        values = json.loads(line)
        kind = _KINDS[values.pop("kind")]
        if kind is Point:
            values["values"] = {name: float(value) for name, value in values["values"].items() if value is not None}
        record: Record = kind(**values)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return record if type(record.global_step) is int and type(record.attempt) is int else None


@dataclass(frozen=True, slots=True, order=True)
class LogPosition:
    """A place between two lines: the number of a segment, and bytes from its start."""

    segment: int = 0
    offset: int = 0


_START: Final = LogPosition()


def segments_in(directory: Path) -> list[int]:
    """Returns the numbers of the segments, oldest first."""
    found = (_SEGMENT.fullmatch(path.name) for path in directory.glob("metrics-*.jsonl"))
    return sorted(int(match[1]) for match in found if match)


def segment_path(directory: Path, number: int) -> Path:
    """Returns where a segment is."""
    return directory / f"metrics-{number:06}.jsonl"


def repair(path: Path) -> int:
    """Cuts off what follows the last whole line of a segment, which a crash has torn; returns the size that is left.

    Lines that are no JSON, as a file system may leave them at the end after a loss of power, are cut off, too.
    """
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = _line_start(file.fileno(), end)
            line = os.pread(file.fileno(), end - start, start)
            if line.endswith(b"\n") and _is_json(line):
                break
            end = start
        if end < size:
            file.truncate(end)
    return end


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _line_start(descriptor: int, end: int) -> int:
    """Returns where the line that ends at `end` begins."""
    position = end - 1
    while position > 0:
        start = max(0, position - 65_536)
        block = os.pread(descriptor, position - start, start)
        if (found := block.rfind(b"\n")) >= 0:
            return start + found + 1
        position = start
    return 0


class LogReader:
    """Reads records from a position on, in the order in which they were written, while they are being written."""

    def __init__(self, directory: Path, position: LogPosition) -> None:
        self._directory = directory
        self.position = position
        self.gaps = 0
        """Segments that were removed before they had been read."""

    def read(self) -> list[tuple[Record, LogPosition]]:
        """Returns the next whole records with the positions after them; none if there are no further ones yet."""
        numbers = [number for number in segments_in(self._directory) if number >= self.position.segment]
        if not numbers:
            return []
        if numbers[0] > self.position.segment:
            self.gaps += numbers[0] - self.position.segment if self.position.segment else 0
            self.position = LogPosition(numbers[0])
        records = self._read_segment()
        while not records and len(numbers) > 1:  # a segment that has a successor does not grow
            numbers.pop(0)
            self.position = LogPosition(numbers[0])
            records = self._read_segment()
        return records

    def _read_segment(self) -> list[tuple[Record, LogPosition]]:
        number, offset = self.position.segment, self.position.offset
        try:
            with segment_path(self._directory, number).open("rb") as file:
                file.seek(offset)
                data = file.read(_READ_BYTES)
                if data and b"\n" not in data:
                    data += file.readline(_LINE_BYTES_MAX)
        except FileNotFoundError:  # removed meanwhile
            return []
        found: list[tuple[Record, LogPosition]] = []
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            offset += len(line)
            if (record := from_line(line)) is not None:
                found.append((record, LogPosition(number, offset)))
        self.position = LogPosition(number, offset)
        return found if found or offset == self.position.offset else self._read_segment()


def newest_position(directory: Path, size_bytes: int) -> LogPosition:
    """Returns the place, perhaps within a line, from which on the log has `size_bytes`, or all of it if it has less.

    Raises OSError if the directory cannot be read.
    """
    for number in reversed(segments_in(directory)):
        with suppress(FileNotFoundError):  # removed meanwhile
            size = segment_path(directory, number).stat().st_size
            if size >= size_bytes:
                return LogPosition(number, size - size_bytes)
            size_bytes -= size
    return LogPosition()


def surviving_points(
    directory: Path, run_id: str = "", until: LogPosition | None = None, *, since: LogPosition = _START
) -> list[Point]:
    """Returns the points of a run (empty: of the last one) that no rollback and no restart has undone, oldest first.

    Of a metric that was recorded twice at one step, as an evaluation that was repeated, the first is returned.

    Args:
        directory: the log, `metrics` in a state directory.
        run_id: the run.
        until: only what was written before this position.
        since: only what was written after this position, which may be within a line.
    """
    points: list[Point] = []
    current, found_run = "", ""
    for record in _all_records(directory, since, until):
        if isinstance(record, TrackedRun):
            current = record.run_id
            if not run_id and current != found_run:
                points, found_run = [], current
        if run_id and current not in {run_id, ""}:  # the segment with the start of the oldest run may be gone
            continue
        match record:
            case Point():
                points.append(record)
            case Rewind() | TrackedRun():
                points = [point for point in points if point.global_step <= record.global_step]
            case _:
                pass
    return list(_without_repeats(points))


def _all_records(directory: Path, since: LogPosition, until: LogPosition | None) -> Iterator[Record]:
    reader = LogReader(directory, since)
    while records := reader.read():
        for record, position in records:
            if until is not None and position > until:
                return
            yield record


def _without_repeats(points: list[Point]) -> Iterator[Point]:
    newest: dict[str, int] = {}
    for point in points:
        if (new := only_new(point, newest)) is not None:
            yield new


def only_new(point: Point, newest: dict[str, int]) -> Point | None:
    """Returns the values of a point whose metrics have no value at this or a later step; None if none is left.

    `newest` are the newest steps by metric, and is updated.
    """
    step = point.global_step
    values = {name: value for name, value in point.values.items() if newest.get(name, -1) < step}
    newest.update(dict.fromkeys(values, step))
    return Point(step, point.attempt, point.epoch, point.time, values) if values else None
