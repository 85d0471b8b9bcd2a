"""`EarlyStopping`: ends a run whose evaluations do not get better any more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from tolaria.config import EarlyStoppingSettings

PART: Final = "early_stopping"
"""The name of this part of the training state."""

SETTING: Final = "early_stopping.metric"
"""The setting that names the metric."""


class EarlyStopping:
    """Counts the evaluations since the best one. A part of the training state, so that a rollback undoes the count.

    The rule is that of Keras and Lightning: an evaluation is better if it differs from the best one by more than
    `min_delta` in the right direction; the first of `patience` evaluations in a row that are not better ends the run.
    """

    def __init__(self, settings: EarlyStoppingSettings) -> None:
        self._settings = settings
        self._metric, self._best, self._best_step, self._since = settings.judged_by, math.nan, 0, 0

    @property
    def wanted(self) -> bool:
        """Whether the settings name a metric."""
        return bool(self._settings.metric)

    @property
    def due(self) -> bool:
        """Whether enough evaluations in a row were not better."""
        settings = self._settings
        return bool(settings.metric) and self._metric == settings.judged_by and self._since >= settings.patience

    def evaluated(self, figures: Mapping[str, float], global_step: int) -> str:
        """Follows an evaluation; returns why the run ends with it, else nothing.

        An evaluation without the metric does not count: some jobs compute it every few epochs. NaN is never better.
        """
        settings = self._settings
        if not settings.metric or settings.metric not in figures:
            return ""
        if self._metric != settings.judged_by:  # the settings have changed since the state was saved
            self._metric, self._best, self._since = settings.judged_by, math.nan, 0
        value = figures[settings.metric]
        gain = (value - self._best) * (1 if settings.highest_is_best else -1)
        if gain > settings.min_delta or (math.isnan(self._best) and not math.isnan(value)):
            self._best, self._best_step, self._since = value, global_step, 0
            return ""
        self._since += 1
        if not self.due:
            return ""
        best = (
            "has never been a number" if math.isnan(self._best) else f"was {self._best:.6g} at step {self._best_step}"
        )
        return f"stopped early: {settings.metric} {best}, and not better in the {self._since} evaluations since"

    def missing(self, figures: Mapping[str, float]) -> dict[str, str]:
        """Returns the metric that an evaluation lacks, by the name of the setting; nothing if it has ever occurred."""
        settings = self._settings
        occurred = self._metric == settings.judged_by and bool(self._best_step or self._since)
        return {SETTING: settings.metric} if settings.metric and settings.metric not in figures and not occurred else {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value and what has followed it."""
        return {"metric": self._metric, "best": self._best, "best_step": self._best_step, "since": self._since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned. Raises KeyError."""
        metric, best, since = str(state["metric"]), float(state["best"]), int(state["since"])
        self._best_step = int(state["best_step"])
        self._metric, self._best, self._since = metric, best, since
