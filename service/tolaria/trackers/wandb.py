"""Weights & Biases: a further run after each rollback, since one cannot take back what it was given.

The new run gets the history that survives, as far as the log of metrics has it; the run before has the tag
`superseded`. All runs of one training are in the group of its id.
"""

# ruff: noqa: PLC0415 - wandb is an extra, and imported in the process of the tracker only

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, cast

from pydantic import JsonValue

from tolaria.trackers.tracker import Note, Point, Rewind, TrackedRun, TrackerState

_NOTES_MAX: Final = 50


class WandbTracker:
    """Logs to the server that wandb's own variables name (WANDB_API_KEY, WANDB_BASE_URL, WANDB_MODE=offline).

    The options are `project`, by default `training.experiment`, `entity` and `mode` (online or offline).
    """

    package: ClassVar[str] = "wandb"
    options: ClassVar[frozenset[str]] = frozenset({"project", "entity", "mode"})

    def __init__(self, options: Mapping[str, JsonValue]) -> None:
        self._options = {name: str(value) for name, value in options.items()}
        self._wandb_run: Any = None
        self._run: TrackedRun
        self._state: TrackerState

    def open(self, run: TrackedRun, state: TrackerState) -> None:
        """Begins a run, or resumes it; one that was offline, or has not been closed, is followed by a further one."""
        self._run, self._state = run, state
        memory = state.memory
        resumable = memory.pop("closed", False) and not memory.get("offline", False)
        if "number" in memory and resumable:
            self._begin()
        else:
            self._begin_next()

    def log(self, points: Sequence[Point]) -> None:
        """Logs a row for each point, with `global_step`, `attempt` and `epoch`."""
        for point in points:
            place = {"global_step": point.global_step, "attempt": point.attempt, "epoch": point.epoch}
            self._wandb_run.log({**point.values, **place})

    def rewind(self, to: Rewind) -> None:
        """Ends the run, and begins a further one with the history that survives."""
        self._wandb_run.tags = (*(self._wandb_run.tags or ()), "superseded")
        self._wandb_run.summary["superseded_after_step"] = to.global_step
        self._wandb_run.finish(exit_code=0)
        self._begin_next()

    def annotate(self, notes: Sequence[Note]) -> None:
        """Logs each annotation as a row, and shows the newest ones as the notes of the run."""
        for note in notes:
            place = {"global_step": note.global_step, "attempt": note.attempt}
            self._wandb_run.log({"annotation": note.text, **place})
        texts = [f"attempt {note.attempt}, step {note.global_step}: {note.text}" for note in notes]
        self._state.memory["notes"] = [*self._state.memory.get("notes", []), *texts][-_NOTES_MAX:]
        self._wandb_run.notes = "\n".join(self._state.memory["notes"])

    def close(self, outcome: str) -> None:
        """Ends the run; a failed one with an exit code of 1."""
        self._wandb_run.finish(exit_code=int(outcome == "failed"))
        self._state.memory["closed"] = True

    def _begin_next(self) -> None:
        """Begins a run with the surviving history."""
        self._state.memory["number"] = self._state.memory.get("number", 0) + 1
        self._begin()
        for point in self._state.history():
            self.log([point])

    def _begin(self) -> None:
        import wandb

        run, memory = self._run, self._state.memory
        self._wandb_run = wandb.init(
            project=self._options.get("project") or run.experiment,
            entity=self._options.get("entity"),
            mode=cast("Any", self._options.get("mode")),  # online, offline or disabled
            dir=self._state.directory,
            id=f"{run.run_id}-{memory['number']}",
            name=run.name or f"{run.job} {run.run_id[:8]}",
            group=run.run_id,
            job_type=run.job,
            tags=[f"{name}={value}"[:64] for name, value in run.tags.items()],
            notes="\n".join(memory.get("notes", [])) or None,
            config=dict(run.settings),
            allow_val_change=True,
            resume="allow",
            reinit="finish_previous",
            save_code=False,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._wandb_run.define_metric("global_step")
        self._wandb_run.define_metric("*", step_metric="global_step")
        memory["offline"] = bool(self._wandb_run.offline)
