"""`JobSchedule`: the learning rates that a job schedules itself, by a function of the step or by torch's schedulers.

A scheduler writes into a stand-in of the optimizer, of which the learning-rate controller reads the rates. So there is
one writer of rates, a seed's param group is none of the scheduler's business, and what it does is undone by a rollback.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from tolaria.errors import BrokenJobError, first_line
from tolaria.optimization.groups import ParamGroup, name_of, rate_in

Interval: TypeAlias = Literal["step", "epoch"]

RateFactor: TypeAlias = Callable[[int], float]
"""A function of the completed steps that returns the factor of the rates with which the optimizer was built."""

METHOD: Final = "lr_scheduler()"
_BY_BATCH: Final = (OneCycleLR, CyclicLR)
"""Schedulers that torch documents to be stepped after each batch."""

_OPTIONS: Final = ("momentum", "betas", "weight_decay")
"""Options beside the rate that a scheduler may set, as those of one cycle do."""

_PAIRS: Final = "pairs"
_KIND: Final = "pairs of"


@dataclass(frozen=True, slots=True)
class LRSchedule:
    """A scheduler of `torch.optim.lr_scheduler`, and when it is stepped: what a job's `lr_scheduler` returns.

    Attributes:
        scheduler: made with the optimizer that `lr_scheduler` was given, or with that of `build_optimizer`.
        interval: `step`: after each optimizer update; `epoch`: after each epoch and its evaluation.
        monitor: the figure of the evaluation that ReduceLROnPlateau is given: `loss`, `accuracy`, or a metric of the
            job's own.
    """

    scheduler: LRScheduler
    interval: Interval
    monitor: str = "loss"


class JobSchedule:
    """The schedule of a job. A part of the training state.

    Attributes:
        description: for people, such as `OneCycleLR of the job, by step`.
        monitor: the figure that the scheduler is given after an evaluation; empty if it needs none.
        stepped_by_job: whether the job's code steps the schedulers itself, at any time while it runs.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: Sequence[LRScheduler],
        *,
        interval: Interval | None = None,
        monitor: str = "",
        factor: RateFactor | None = None,
    ) -> None:
        """Takes schedulers over, which write into `optimizer`, a stand-in, from now on; or a factor of the step.

        `interval` None: the job's code steps them.
        """
        self._optimizer = optimizer
        self._schedulers = tuple(schedulers)
        self._interval = interval
        self._factor = factor
        self.stepped_by_job = bool(schedulers) and interval is None
        plateau = any(isinstance(each, ReduceLROnPlateau) for each in schedulers)
        self.monitor = monitor if plateau and interval is not None else ""
        names = ", ".join(type(each).__name__ for each in schedulers) or "a function of the step"
        when = "" if factor is not None else f", by {interval}" if interval else ", stepped by its code"
        self.description = f"{names} of the job{when}{f' on {self.monitor}' if self.monitor else ''}"
        self._seen = [_options(group) for group in optimizer.param_groups]

    @property
    def stateful(self) -> bool:
        """Whether it has a state; a function of the step has none."""
        return bool(self._schedulers)

    def rate(self, group: str, base_lr: float, step: int) -> float:
        """Returns the rate of a param group, without adjustments, for the step after `step` steps.

        Raises BrokenJobError if the schedule gives none that is finite and at least 0.
        """
        if self._factor is not None:
            factor = self._called(self._factor, step)
            try:
                rate = base_lr * float(factor)
            except (TypeError, ValueError):
                raise BrokenJobError(f"{METHOD}: its function gives {factor!r}, not a number, at step {step}") from None
        else:
            groups = (each for each in self._optimizer.param_groups if name_of(each) == group)
            rate = next((rate_in(each) for each in groups), base_lr)
        if not (math.isfinite(rate) and rate >= 0.0):
            raise BrokenJobError(f"{METHOD}: {self.description}: gives the group {group!r} the rate {rate} at {step}")
        return rate

    def step_taken(self) -> None:
        """Follows an optimizer update. Raises BrokenJobError if a scheduler does."""
        if self._interval == "step":
            for scheduler in self._schedulers:
                self._called(scheduler.step)

    def epoch_over(self, figures: Mapping[str, float]) -> None:
        """Follows the end of an epoch, whose evaluation has given `figures`; without the monitored one nothing changes.

        Raises BrokenJobError if a scheduler does.
        """
        if self._interval != "epoch":
            return
        for scheduler in self._schedulers:
            if not isinstance(scheduler, ReduceLROnPlateau):
                self._called(scheduler.step)
            elif self.monitor in figures:
                self._called(scheduler.step, figures[self.monitor])

    def missing(self, figures: Mapping[str, float]) -> dict[str, str]:
        """Returns the monitored figure that an evaluation lacks, by what names it; nothing if it has ever occurred."""
        occurred = any(each.last_epoch > 0 for each in self._schedulers if isinstance(each, ReduceLROnPlateau))
        missing = self.monitor and self.monitor not in figures and not occurred
        return {f"{METHOD}: monitor": self.monitor} if missing else {}

    def take_options(self) -> Iterator[tuple[str, str, Any]]:
        """Yields the options that schedulers have set since the last call, as group, option and value."""
        for number, group in enumerate(self._optimizer.param_groups):
            now, before = _options(group), self._seen[number]
            if now != before:
                self._seen[number] = now
                yield from ((name_of(group), key, value) for key, value in now.items() if value != before.get(key))

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the schedulers, and what they have written."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        return {
            "schedulers": [_plain(each.state_dict()) for each in self._schedulers],
            "groups": [_plain(group) for group in groups],
            "seen": [dict(options) for options in self._seen],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned. Raises KeyError, ValueError or TypeError for another schedule."""
        groups = self._optimizer.param_groups
        loaded = [_unplain(each) for each in state["schedulers"]]
        pairs = list(zip(self._schedulers, loaded, strict=True))
        options = list(zip(groups, state["groups"], strict=True))
        seen = [dict(each) for each in state["seen"]]
        for scheduler, its_state in pairs:
            scheduler.load_state_dict(its_state)
        for group, its_options in options:
            kept = group["params"]
            group.clear()
            group.update(_unplain(its_options), params=kept)
        self._seen = seen

    def _called(self, function: Callable[..., Any], *arguments: object) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            raised = f"raised {type(error).__name__}: {first_line(error)}"
            raise BrokenJobError(f"{METHOD}: {self.description}: {raised}") from error


def stand_in(optimizer: Optimizer) -> Optimizer:
    """Returns an optimizer of the same class, parameters and options, whose groups a scheduler may write into.

    Its rates are plain numbers. It cannot be stepped, and is not needed for that.
    """
    kind = type(optimizer)
    made = kind.__new__(kind)
    made.__dict__.update(vars(optimizer))
    made.param_groups = [{**group, "lr": rate_in(group)} for group in optimizer.param_groups]
    made.step = _not_stepped  # type: ignore[method-assign,assignment]
    made._opt_called = True  # type: ignore[attr-defined]  # noqa: SLF001 - else a scheduler warns that it is stepped first
    return made


def schedule_from(given: object, optimizer: Optimizer, stand: Optimizer) -> JobSchedule | None:
    """Returns the schedule of what `lr_scheduler(stand)` has returned; None for None.

    Raises:
        BrokenJobError: it is no schedule, or does not say when it is stepped.
    """
    if given is None:
        return None
    if isinstance(given, LRScheduler):
        kind = type(given).__name__
        if isinstance(given, ReduceLROnPlateau):
            given = LRSchedule(given, "epoch")
        elif isinstance(given, _BY_BATCH):
            given = LRSchedule(given, "step")
        else:
            raise BrokenJobError(
                f"{METHOD} returns a {kind}, which may be stepped after each update or each epoch: return "
                'LRSchedule(scheduler, interval="step") or LRSchedule(scheduler, interval="epoch"), of tolaria.jobs'
            )
    if isinstance(given, LRSchedule):
        return _of_scheduler(given, optimizer, stand)
    if callable(given) and not hasattr(given, "step"):
        return JobSchedule(stand, (), factor=given)
    raise BrokenJobError(
        f"{METHOD} must return a function of the step, a scheduler of torch.optim.lr_scheduler, or an LRSchedule, got "
        f"a {type(given).__name__}"
    )


def adopted(found: Sequence[LRScheduler], optimizer: Optimizer) -> JobSchedule:
    """Returns the schedule of schedulers that the job's own code steps: they write into a stand-in from now on."""
    stand = stand_in(optimizer)
    for scheduler in found:
        _move(scheduler, optimizer, stand)
    return JobSchedule(stand, found)


def _of_scheduler(given: LRSchedule, optimizer: Optimizer, stand: Optimizer) -> JobSchedule:
    scheduler: object = given.scheduler
    if not isinstance(scheduler, LRScheduler):
        kind = type(scheduler).__name__
        raise BrokenJobError(f"{METHOD}: LRSchedule.scheduler must be one of torch.optim.lr_scheduler, got a {kind}")
    if given.interval not in {"step", "epoch"}:
        raise BrokenJobError(f'{METHOD}: LRSchedule.interval must be "step" or "epoch", got {given.interval!r}')
    if isinstance(scheduler, ReduceLROnPlateau) and given.interval != "epoch":
        raise BrokenJobError(f'{METHOD}: ReduceLROnPlateau follows evaluations: its interval has to be "epoch"')
    if scheduler.optimizer is not stand:
        if scheduler.optimizer is not optimizer:
            raise BrokenJobError(f"{METHOD} returns a scheduler of another optimizer than that of build_optimizer()")
        stand = stand_in(optimizer)
        _move(scheduler, optimizer, stand)
    return JobSchedule(stand, (scheduler,), interval=given.interval, monitor=given.monitor)


def _move(scheduler: LRScheduler, optimizer: Optimizer, stand: Optimizer) -> None:
    """Has a scheduler, and those that it consists of, write into the stand-in."""
    if scheduler.optimizer is not optimizer:
        return
    scheduler.optimizer = stand
    for value in vars(scheduler).values():
        for inner in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(inner, LRScheduler):
                _move(inner, optimizer, stand)


def _not_stepped(*_: object, **__: object) -> None:
    raise RuntimeError("the optimizer that lr_scheduler() is given cannot be stepped: Tolaria steps that of the job")


_not_stepped._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # noqa: SLF001 - as torch marks what it has wrapped


def _options(group: ParamGroup) -> dict[str, Any]:
    return {key: group[key] for key in _OPTIONS if key in group and not isinstance(group[key], Tensor)}


def _plain(value: Any) -> Any:
    """Returns a value of a scheduler's state as one of the training state, whose keys are strings."""
    if isinstance(value, dict):
        if not isinstance(value, Counter) and all(isinstance(key, str) and key != _KIND for key in value):
            return {key: _plain(inner) for key, inner in value.items()}
        return {_KIND: type(value).__name__, _PAIRS: [[_plain(key), _plain(inner)] for key, inner in value.items()]}
    if type(value) in {list, tuple}:
        return type(value)(_plain(inner) for inner in value)
    return value


def _unplain(value: Any) -> Any:
    if isinstance(value, dict):
        if _KIND not in value:
            return {key: _unplain(inner) for key, inner in value.items()}
        pairs = {_unplain(key): _unplain(inner) for key, inner in value[_PAIRS]}
        return Counter(pairs) if value[_KIND] == "Counter" else pairs
    if type(value) in {list, tuple}:
        return type(value)(_unplain(inner) for inner in value)
    return value
