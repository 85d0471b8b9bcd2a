"""TensorBoard: event files, with a `SessionLog.START` where training goes on, as `purge_step` of a SummaryWriter."""

# ruff: noqa: PLC0415 - tensorboard is an extra, and imported in the process of the tracker only

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import JsonValue

from tolaria.trackers.tracker import NOTHING_LOGGED, Note, Point, Rewind, TrackedRun, TrackerState

_FLUSH_S = 5


class TensorBoardTracker:
    """Writes a directory of event files for each run; `tensorboard --logdir` shows it.

    The option `dir` is where the directories of runs are made; by default in `state.dir`.
    """

    package: ClassVar[str] = "tensorboard"
    options: ClassVar[frozenset[str]] = frozenset({"dir"})

    def __init__(self, options: Mapping[str, JsonValue]) -> None:
        self._dir = str(options.get("dir", ""))
        self._placed = NOTHING_LOGGED
        """The newest step with `attempt` and `epoch`."""
        self._scalars: Any = None
        self._texts: Any = None

    def open(self, run: TrackedRun, state: TrackerState) -> None:
        """Begins an event file, in which later steps than `state.newest_step` of earlier files are purged."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = (Path(self._dir) if self._dir else state.directory) / _folder_name(run)
        self._scalars = EventFileWriter(str(folder), flush_secs=_FLUSH_S)
        self._texts = EventFileWriter(str(folder / "annotations"), flush_secs=_FLUSH_S)
        self._purge_after(state.newest_step, run.time)
        if run.settings:
            rows = [f"| {name} | {value} |" for name, value in sorted(run.settings.items())]
            self._text(
                "settings", "\n".join(["| setting | value |", "| --- | --- |", *rows]), run.global_step, run.time
            )

    def log(self, points: Sequence[Point]) -> None:
        """Writes the values, with `attempt` and `epoch` as further ones."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for point in points:
            values = dict(point.values)
            if point.global_step > self._placed:
                values |= {"attempt": float(point.attempt), "epoch": float(point.epoch)}
                self._placed = point.global_step
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
            self._scalars.add_event(Event(step=point.global_step, wall_time=point.time, summary=summary))
        self._scalars.flush()

    def rewind(self, to: Rewind) -> None:
        """Purges what is after the step."""
        self._purge_after(to.global_step, to.time)

    def annotate(self, notes: Sequence[Note]) -> None:
        """Writes texts, in a directory beside the scalars, where no step is purged."""
        for note in notes:
            self._text("annotations", f"attempt {note.attempt}, step {note.global_step}: {note.text}", *_place(note))

    def close(self, outcome: str) -> None:
        """Closes the files."""
        del outcome  # TensorBoard knows none
        self._scalars.close()
        self._texts.close()

    def _purge_after(self, step: int, time: float) -> None:
        """Has the events after a step purged: those of the next one on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._placed = step
        start = SessionLog(status=SessionLog.START)
        self._scalars.add_event(Event(step=step + 1, wall_time=time, session_log=start))
        self._scalars.flush()

    def _text(self, tag: str, text: str, step: int, time: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape)
        value = Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor)
        self._texts.add_event(Event(step=step, wall_time=time, summary=Summary(value=[value])))
        self._texts.flush()


def _folder_name(run: TrackedRun) -> str:
    """Returns the name of the run for people, as far as it can be that of a directory, and its id."""
    name = "".join(character if character.isalnum() or character in "-_." else "-" for character in run.name)
    return f"{name[:80]}-{run.run_id}" if name.strip("-.") else run.run_id


def _place(note: Note) -> tuple[int, float]:
    return note.global_step, note.time
