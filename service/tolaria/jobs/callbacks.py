"""Callbacks: code of the job that is called while it trains; and what the job can know of its run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import nn

HOOKS: Final = ("on_train_begin", "on_step_end", "on_epoch_end", "on_evaluate", "on_rollback", "on_train_end")
"""The methods of a callback that are called; it may lack any of them."""


@dataclass(slots=True)
class RunView:
    """The run as its job sees it: the argument of callbacks, and `JobContext.run`. The lane keeps it up to date.

    Attributes:
        run_id: the id of the run; empty outside a service, and with `lane.mode = thread` while the job is built.
        run_name: the name that people have given it.
        state_dir: the directory `state.dir`, where the job may write below another name.
        rank, world_size: of this process in its group; 0 and 1 for a process alone. Each rank has its own job.
        steps_per_epoch, total_steps: of the whole run; 0 until the data are known.
        model: the model, with its seeds; None until it has been built.
        step, epoch: completed optimizer updates, and the epoch from 1; 0 before the first.
        learning_rates: the rates by param group, as they were set last.
    """

    run_id: str = ""
    run_name: str = ""
    state_dir: Path = Path()
    rank: int = 0
    world_size: int = 1
    steps_per_epoch: int = 0
    total_steps: int = 0
    model: nn.Module | None = None
    position: Callable[[], tuple[int, int]] = lambda: (0, 0)
    rates: Callable[[], Mapping[str, float]] = dict

    @property
    def step(self) -> int:
        """Completed optimizer updates."""
        return self.position()[0]

    @property
    def epoch(self) -> int:
        """The epoch, from 1; 0 before the first."""
        return self.position()[1]

    @property
    def learning_rates(self) -> Mapping[str, float]:
        """The rates by param group, as they were set last."""
        return self.rates()


class Callback:
    """A base class of callbacks, which may as well be any objects with some of these methods.

    They are called in the process that trains, on all ranks alike. One that raises ends the training process, as all of
    the job's code does. With `state_dict` and `load_state_dict`, as of a `StatefulJob`, a callback is part of the
    training state: it is restored by a rollback and after a crash.
    """

    def on_train_begin(self, run: RunView) -> None:
        """Training begins in this process: at step 0, or where the run is resumed.

        Then what this changes in the callback's state is undone, as the run has begun before.
        """

    def on_step_end(self, run: RunView, loss: float) -> None:
        """The parameters have been updated. Not called for skipped steps."""

    def on_epoch_end(self, run: RunView, loss: float) -> None:
        """An epoch and its evaluation are over; `loss` is the mean of its steps."""

    def on_evaluate(self, run: RunView, metrics: Mapping[str, float]) -> None:
        """The model has been evaluated: loss, accuracy if it is counted, and the job's own metrics, by name."""

    def on_rollback(self, run: RunView, from_step: int) -> None:
        """An earlier state has been restored, also that of this callback; what this changes in it is undone."""

    def on_train_end(self, run: RunView) -> None:
        """Training has ended in this process, because the run is over, or is stopped, or the service drains."""
