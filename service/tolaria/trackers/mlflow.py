"""MLflow: a further run after each rollback, since MLflow keeps every metric that it was given.

The new run gets the history that survives, so that its curves show no step that was undone; the run before becomes its
child. Of the runs with the same tag `tolaria.run_id` the one without a parent is the newest.
"""

# ruff: noqa: PLC0415 - mlflow is an extra, and imported in the process of the tracker only

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

from pydantic import JsonValue

from tolaria.trackers.tracker import NOTHING_LOGGED, Note, Point, Rewind, TrackedRun, TrackerState

_BATCH: Final = 1000
_PARAMETERS: Final = 100
_TEXT_MAX: Final = 5000
_NOTES_MAX: Final = 50
_FOREIGN: Final = re.compile(r"[^\w\-. /]", re.ASCII)
"""Characters that MLflow does not accept in the name of a metric."""


class MlflowTracker:
    """Logs to the tracking server of MLFLOW_TRACKING_URI, or of the option `uri`; else to a file of SQLite.

    The option `experiment` is the name of the experiment; by default that of `training.experiment`.
    """

    package: ClassVar[str] = "mlflow"
    options: ClassVar[frozenset[str]] = frozenset({"uri", "experiment"})

    def __init__(self, options: Mapping[str, JsonValue]) -> None:
        self._options = {name: str(value) for name, value in options.items()}
        self._client: Any = None
        self._run: TrackedRun
        self._state: TrackerState
        self._experiment_id = ""
        self._placed = NOTHING_LOGGED
        """The newest step with `attempt` and `epoch`."""

    def open(self, run: TrackedRun, state: TrackerState) -> None:
        """Begins a run, or goes on with the one that it has begun, whose history has to end where it is known to."""
        import mlflow

        self._run, self._state, self._placed = run, state, state.newest_step
        uri = self._options.get("uri")
        if uri is None and not mlflow.is_tracking_uri_set():
            uri = f"sqlite:///{(state.directory / 'mlflow.db').absolute()}"
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        name = self._options.get("experiment") or run.experiment
        found = self._client.get_experiment_by_name(name)
        self._experiment_id = self._client.create_experiment(name) if found is None else found.experiment_id
        if not self._mlflow_run:
            self._begin(run.attempt)
            return
        self._client.update_run(self._mlflow_run, status="RUNNING")
        if any(metric.step > state.newest_step for metric in self._history(self._mlflow_run)):
            self._supersede(state.newest_step, run.attempt)  # this process died before it could note what it had logged

    def log(self, points: Sequence[Point]) -> None:
        """Logs the values, with `attempt` and `epoch` as further metrics."""
        from mlflow.entities import Metric

        metrics = []
        for point in points:
            values = dict(point.values)
            if point.global_step > self._placed:
                values |= {"attempt": float(point.attempt), "epoch": float(point.epoch)}
                self._placed = point.global_step
            place = (round(point.time * 1000), point.global_step)
            metrics += [Metric(_FOREIGN.sub("_", name), value, *place) for name, value in values.items()]
        self._log(metrics)

    def rewind(self, to: Rewind) -> None:
        """Begins a further run with the history up to the step."""
        self._supersede(to.global_step, to.attempt)

    def annotate(self, notes: Sequence[Note]) -> None:
        """Shows the newest annotations as the description of the run."""
        texts = [f"- attempt {note.attempt}, step {note.global_step}: {note.text}" for note in notes]
        self._state.memory["notes"] = [*self._state.memory.get("notes", []), *texts][-_NOTES_MAX:]
        self._describe()

    def close(self, outcome: str) -> None:
        """Ends the run with the status FINISHED or FAILED; it stays RUNNING if it may be resumed."""
        if outcome:
            self._client.set_terminated(self._mlflow_run, "FINISHED" if outcome == "finished" else "FAILED")

    @property
    def _mlflow_run(self) -> str:
        return str(self._state.memory.get("run", ""))

    def _begin(self, attempt: int) -> None:
        """Creates a run with its tags and parameters."""
        run = self._run
        tags = dict(run.tags) | {"tolaria.run_id": run.run_id, "tolaria.attempt": str(attempt), "tolaria.job": run.job}
        created = self._client.create_run(
            self._experiment_id, round(run.time * 1000), tags, run.name or f"{run.job} {run.run_id[:8]}"
        )
        self._state.memory["run"] = created.info.run_id
        from mlflow.entities import Param

        parameters = [Param(name, str(value)[:_TEXT_MAX]) for name, value in run.settings.items()]
        for start in range(0, len(parameters), _PARAMETERS):
            self._client.log_batch(self._mlflow_run, params=parameters[start : start + _PARAMETERS])

    def _supersede(self, step: int, attempt: int) -> None:
        before, self._placed = self._mlflow_run, step
        self._begin(attempt)
        self._log([metric for metric in self._history(before) if metric.step <= step])
        self._describe()
        self._client.set_tag(before, "mlflow.parentRunId", self._mlflow_run)
        self._client.set_tag(before, "tolaria.superseded_after_step", str(step))
        self._client.set_terminated(before, "KILLED", round(time.time() * 1000))

    def _history(self, run_id: str) -> Iterator[Any]:
        for name in self._client.get_run(run_id).data.metrics:
            yield from self._client.get_metric_history(run_id, name)

    def _log(self, metrics: Sequence[Any]) -> None:
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._mlflow_run, metrics=metrics[start : start + _BATCH])

    def _describe(self) -> None:
        if notes := self._state.memory.get("notes"):
            self._client.set_tag(self._mlflow_run, "mlflow.note.content", "\n".join(notes)[-_TEXT_MAX:])
