"""The curves of a run, epoch by epoch, drawn with block characters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from leyline.v1 import enums_pb2 as enums
from leyline.v1.admin_service_pb2 import GetStatusResponse, RunState

T = TypeVar("T")

WIDTH_MAX: Final = 64
HEIGHT: Final = 3
MARKS: Final = "g germinated, b blends, f part of the host, c culled, R rolled back, s skipped"
_BLOCKS: Final = " ▁▂▃▄▅▆▇█"
_LABEL_WIDTH: Final = 18
_STAGE_MARKS: Final = {
    enums.SEED_STAGE_GERMINATED: "g",
    enums.SEED_STAGE_BLENDING: "b",
    enums.SEED_STAGE_FOSSILIZED: "f",
    enums.SEED_STAGE_CULLED: "c",
}


@dataclass(frozen=True, slots=True)
class EpochPoint:
    """The figures of one finished epoch; `marks` are the letters of what happened in it."""

    epoch: int
    loss: float
    accuracy: float
    marks: str = ""


class RunCurves:
    """The training loss and validation accuracy of each epoch that was seen, in the order in which they finished.

    An epoch that is repeated after a rollback is a point by itself.
    """

    def __init__(self) -> None:
        self.points: list[EpochPoint] = []
        self._seen = (0, 0)
        self._stages: dict[str, int] = {}
        self._rollbacks = self._skipped = 0
        self._marks = ""

    def update(self, status: GetStatusResponse) -> None:
        """Records the next status."""
        self._marks += self._changes(status)
        # `epoch` counts epochs begun: the figures of an epoch are final once the next one begins or the run finishes.
        finished = status.epoch if status.state == RunState.RUN_STATE_FINISHED else max(status.epoch - 1, 0)
        if not finished or (finished, status.rollbacks) == self._seen:
            return
        self._seen = (finished, status.rollbacks)
        self.points.append(EpochPoint(finished, status.training_loss, status.validation_accuracy, self._marks))
        self._marks = ""

    def lines(self, beside: RunCurves | None = None) -> list[str]:
        """Returns charts of loss and accuracy, that of the run `beside` on the same scale, and the marks."""
        if len(self.points) < 2:
            return []
        accuracies = [point.accuracy for point in self.points]
        others = [point.accuracy for point in beside.points] if beside else []
        low, high = _range([*accuracies, *others])
        lines = [
            *_labelled("loss", [point.loss for point in self.points], "{:.3f}"),
            *_labelled("accuracy", accuracies, "{:.1%}", (low, high)),
            f"{'':{_LABEL_WIDTH}} {self._mark_line()}".rstrip(),
        ]
        if len(others) > 1:
            lines += _labelled("without seeds", others, "{:.1%}", (low, high))
        return [*lines, MARKS] if any(point.marks for point in self.points) else lines

    def _changes(self, status: GetStatusResponse) -> str:
        marks = ""
        for seed in status.seeds:
            if self._stages.get(seed.seed_id) != seed.stage:
                marks += _STAGE_MARKS.get(seed.stage, "")
            self._stages[seed.seed_id] = seed.stage
        marks += "R" * (status.rollbacks > self._rollbacks) + "s" * (status.skipped_steps > self._skipped)
        self._rollbacks, self._skipped = status.rollbacks, status.skipped_steps
        return marks

    def _mark_line(self) -> str:
        columns = _columns([point.marks for point in self.points])
        return "".join("".join(marks)[-1:] or " " for marks in columns)


def chart(values: Sequence[float], low: float, high: float, height: int = HEIGHT) -> list[str]:
    """Returns a bar chart of `height` lines, highest first, one column for each value up to WIDTH_MAX.

    Of several values in a column the last one is drawn; values outside `low` to `high` are drawn at that limit, and
    values that are not finite are left out.
    """
    columns = [column[-1] for column in _columns(values)]
    span = high - low
    levels = []
    for value in columns:
        share = 1.0 if span <= 0 else (min(max(value, low), high) - low) / span
        levels.append(1 + round(share * (8 * height - 1)) if math.isfinite(value) else 0)
    return ["".join(_BLOCKS[min(max(level - 8 * row, 0), 8)] for level in levels) for row in range(height - 1, -1, -1)]


def _columns(values: Sequence[T]) -> list[Sequence[T]]:
    """Divides values into at most WIDTH_MAX groups of neighbours."""
    count = min(len(values), WIDTH_MAX)
    ends = [round(len(values) * (number + 1) / count) for number in range(count)]
    return [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    return min(finite), max(finite)


def _labelled(name: str, values: Sequence[float], form: str, limits: tuple[float, float] | None = None) -> list[str]:
    """Returns a chart with its name at the top, its limits at the left, and its last value at the right."""
    low, high = limits or _range(values)
    left = [form.format(high), *[""] * (HEIGHT - 2), form.format(low)]
    left = [f"{name if not row else '':<{_LABEL_WIDTH - 7}}{text:>6}" for row, text in enumerate(left)]
    right = ["", *[""] * (HEIGHT - 2), f" {form.format(values[-1])}"]
    rows = zip(left, chart(values, low, high), right, strict=True)
    return [f"{label:<{_LABEL_WIDTH}} {bars}{last}" for label, bars, last in rows]
