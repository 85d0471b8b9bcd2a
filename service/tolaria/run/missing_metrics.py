"""`MissingMetrics`: settings that name a metric which has not occurred."""

from __future__ import annotations

from collections.abc import Mapping

from tolaria.config import CheckpointSettings
from tolaria.lane.messages import EpochDone
from tolaria.run.checkpointing import best_figures
from tolaria.run.observers import RunObserver


class MissingMetrics:
    """Compares the metrics that settings and the job name with those that there are. Used on the event loop only.

    A metric is missing until it has occurred: some jobs compute one every few epochs. The observers get each once.

    Attributes:
        sentences: what is missing now, for people.
    """

    def __init__(self, observers: RunObserver) -> None:
        self._observers = observers
        self._found: set[str] = set()
        self._reported: set[tuple[str, str]] = set()
        self.sentences: tuple[str, ...] = ()

    def epoch(self, epoch: EpochDone, checkpoint: CheckpointSettings, logged: Mapping[str, float]) -> None:
        """Follows an epoch. `logged` is what the job has logged last, by name."""
        figures, of_best = epoch.evaluation.figures(), best_figures(checkpoint, epoch, logged)
        named = {setting: (metric, figures) for setting, metric in epoch.missing_metrics.items()}
        if of_best and checkpoint.best != "accuracy":  # accuracy, the default, means the loss where none is counted
            named["checkpoint.best"] = (checkpoint.best_name, of_best)
        self._found |= figures.keys() | of_best.keys()
        self.sentences = tuple(
            self._missing(setting, metric, sorted(known))
            for setting, (metric, known) in named.items()
            if metric not in self._found
        )

    def _missing(self, setting: str, metric: str, known: list[str]) -> str:
        if (setting, metric) not in self._reported:
            self._reported.add((setting, metric))
            self._observers.on_metric_missing(setting, metric, known)
        there_are = f"there are {', '.join(known)}" if known else "nothing is evaluated"
        return f"{setting} is {metric}, which has not occurred; {there_are}"
