"""The points that earlier processes of a run have left in its log of metrics, for the curves of the status page."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tolaria.status_page.curves import CurveSet
from tolaria.trackers.records import METRICS_DIR, newest_position, surviving_points
from tolaria.values.lineage import Lineage

READ_BYTES_MAX: Final = 2 * 2**20
"""The newest part of the log that is read: about 10,000 points."""

_GENERAL: Final = {"train/loss": "loss", "validation/loss": "validation_loss", "validation/accuracy": "accuracy"}
_KINDS: Final = {"train": "step", "validation": "evaluation", "lr": "rate"}
_NOT_SHOWN: Final = frozenset({"train/gradient_norm", "train/learning_rate", "train/epoch_loss"})


def earlier_curves(state_dir: Path, run_id: str, lineage: Lineage, step: int) -> CurveSet:
    """Returns the curves of a run up to the step that it is resumed at, without points that this state did not pass.

    Blocks while the log is read, at most its newest `READ_BYTES_MAX`. Without a log, or with one that cannot be read,
    the curves are empty.
    """
    curves, directory = CurveSet(), state_dir / METRICS_DIR
    try:
        points = surviving_points(directory, run_id, since=newest_position(directory, READ_BYTES_MAX))
    except OSError:
        return curves
    for point in points:
        if point.global_step > step or lineage.attempt_at(point.global_step) != point.attempt:
            continue
        for name, value in point.values.items():
            if (curve := _curve_of(name)) is not None:
                curves.add(curve, point.global_step, value)
    return curves


def _curve_of(name: str) -> str | None:
    """Returns the name of a metric's curve; None if it has none."""
    if name in _NOT_SHOWN or name in _GENERAL:
        return _GENERAL.get(name)
    kind, _, own = name.partition("/")
    return f"{_KINDS[kind]}/{own}" if kind in _KINDS else None
