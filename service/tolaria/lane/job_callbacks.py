"""`JobCallbacks`: calls a job's callbacks, and makes those with a state parts of the training state."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, cast

from tolaria.errors import BrokenJobError, first_line
from tolaria.jobs import CallbackJob, StatefulJob, TrainingJob
from tolaria.jobs.callbacks import HOOKS, Callback, RunView
from tolaria.lane.job_output import call
from tolaria.state.encoding import KeptValues, capture_rngs, restore_rngs
from tolaria.state.training_state import StatePart

PART: Final = "callback."
"""Prefix of the parts of the training state that are callbacks."""


class JobCallbacks:
    """The callbacks of a job, in their order. Used in the lane's thread.

    Args:
        callbacks: as `callbacks_of` returns them.
        run: their first argument.
        as_built: its context spans each call, in which the optimizer has only the job's param groups.
    """

    def __init__(
        self,
        callbacks: Iterable[tuple[str, object]],
        run: RunView,
        as_built: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.run = run
        self._as_built = as_built
        named = list(callbacks)
        self._hooks = {
            hook: [(name, getattr(each, hook)) for name, each in named if _overrides(each, hook)] for hook in HOOKS
        }
        self.any = bool(named)
        self.parts: dict[str, StatePart] = {PART + name: each for name, each in named if isinstance(each, StatefulJob)}

    def train_begin(self) -> None:
        """Training begins, or goes on: then the callbacks' state, which has been restored, stays."""
        with self._undone(state=any(self.run.position())):
            self._call("on_train_begin")

    def step_end(self, loss: float) -> None:
        """An update has been made."""
        if self._hooks["on_step_end"]:
            self._call("on_step_end", loss)

    def epoch_end(self, loss: float) -> None:
        """An epoch and its evaluation are over."""
        self._call("on_epoch_end", loss)

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """The model has been evaluated."""
        self._call("on_evaluate", dict(metrics))

    def rolled_back(self, from_step: int) -> None:
        """An earlier state has been restored."""
        with self._undone(state=True):
            self._call("on_rollback", from_step)

    def train_end(self) -> None:
        """Training has ended in this process."""
        self._call("on_train_end")

    def _call(self, hook: str, *arguments: object) -> None:
        for name, method in self._hooks[hook]:
            try:
                with self._as_built():
                    method(self.run, *arguments)
            except Exception as error:
                raised = f"{type(error).__name__}: {first_line(error)}"
                raise BrokenJobError(f"the callback {name}: {hook}() raised {raised}{_place(error)}") from error

    @contextmanager
    def _undone(self, *, state: bool) -> Iterator[None]:
        """Puts random generators and, with `state`, the callbacks' state back at the end.

        A run that goes on after a rollback, or in another process, has to equal one that was not disturbed.
        """
        rngs = capture_rngs()
        kept = [(part, KeptValues(dict(part.state_dict()), name)) for name, part in self.parts.items() if state]
        yield
        for part, values in kept:
            part.load_state_dict(values.values())
        restore_rngs(*rngs)


def callbacks_of(job: TrainingJob) -> list[tuple[str, object]]:
    """Returns the callbacks that the job gives, with their names.

    Raises:
        BrokenJobError: `callbacks` fails, or returns something without hooks, or with unknown ones.
    """
    if not isinstance(job, CallbackJob):
        return []
    return list(_named(call("callbacks", lambda: _listed(job.callbacks()))))


def _listed(given: object) -> list[object]:
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise BrokenJobError(f"callbacks() must return a list of callbacks, got a {type(given).__name__}")
    return list(given)


def _named(given: list[object]) -> Iterator[tuple[str, object]]:
    """Yields the callbacks with names, that of the class, with a number from the second of a class on."""
    counts: dict[str, int] = {}
    for each in given:
        kind = type(each).__name__
        hooks = sorted(name for name in dir(each) if name.startswith("on_") and callable(getattr(each, name)))
        known = f"there are {', '.join(HOOKS)}"
        if unknown := [name for name in hooks if name not in HOOKS]:
            raise BrokenJobError(f"callbacks(): {kind}.{unknown[0]} is not called: {known}")
        if not hooks:
            raise BrokenJobError(f"callbacks(): a {kind} has no method that is called: {known}")
        if hasattr(each, "state_dict") != hasattr(each, "load_state_dict"):
            raise BrokenJobError(f"callbacks(): {kind} has only one of state_dict and load_state_dict")
        counts[kind] = counts.get(kind, 0) + 1
        yield (kind if counts[kind] == 1 else f"{kind}-{counts[kind]}"), each


def _overrides(callback: object, hook: str) -> bool:
    return hasattr(callback, hook) and getattr(type(callback), hook, None) is not getattr(Callback, hook)


def _place(error: BaseException) -> str:
    """Returns where the callback's code raised an error."""
    frames: Any = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    return f" ({Path(cast('str', last.filename)).name}, line {last.lineno})"
