"""What a job returns, checked, and converted to plain numbers where that is exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard, TypeVar

import numpy as np
from torch import Tensor, nn

from tolaria.errors import BrokenJobError, JobError, LossShapeError, first_line
from tolaria.gradients import losses_by_source
from tolaria.jobs import HOST, Batch, PerSampleLosses, TrainingJob
from tolaria.values.evaluation import METRICS_MAX, Evaluation, Ratio, metric_name_problem

T = TypeVar("T")


def call(method: str, function: Callable[[], T], kind: type[Any] = object) -> T:
    """Calls a method of the job, which has to return a `kind`. Raises BrokenJobError with the method's name."""
    try:
        made = function()
    except JobError:
        raise
    except (Exception, SystemExit) as error:
        raise BrokenJobError(f"{method}() raised {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(made, kind):
        raise BrokenJobError(f"{method}() must return a {kind.__name__}, got a {type(made).__name__}")
    return made


def checked_batch(given: object, where: str) -> Batch:
    """Returns the batch with its number of samples as an int; `where` names the method in errors.

    Raises BrokenJobError if it is not a batch, or its number of samples is not a whole number of at least 0.
    """
    if not isinstance(given, Batch):
        raise BrokenJobError(f"{where} must return a Batch, got a {type(given).__name__}")
    if type(given.samples) is int and given.samples >= 0:
        return given
    samples = _whole_number(given.samples)
    if samples is None or samples < 0:
        raise BrokenJobError(f"{where}: Batch.samples must be a whole number of at least 0, got {given.samples!r}")
    return replace(given, samples=samples)


def checked_losses(job: TrainingJob, model: nn.Module, batch: Batch, seeds: Sequence[str]) -> Mapping[str, Tensor]:
    """Returns the job's losses by source, each a scalar with a graph; the host has one.

    Per-sample losses are split by the batch's `seed_ids`. Samples of seeds that are not in `seeds` count as the
    host's, and a source without a sample has no loss. Raises LossShapeError with the source of an invalid loss.
    """
    losses: object = job.losses(model, batch)
    if isinstance(losses, PerSampleLosses):
        if batch.seed_ids is None:
            raise LossShapeError("losses() returned losses by sample for a batch without seed_ids")
        if not losses.values.requires_grad:
            raise LossShapeError("losses(): the losses by sample carry no graph: were they detached?")
        return losses_by_source(losses.values, batch.seed_ids, [HOST, *seeds])
    if not isinstance(losses, Mapping) or HOST not in losses:
        given = list(losses) if isinstance(losses, Mapping) else f"a {type(losses).__name__}"
        raise LossShapeError(f"losses() must return a mapping with the source {HOST!r}, got {given}")
    for source, loss in losses.items():
        if not isinstance(loss, Tensor):
            raise LossShapeError(
                f"losses(): the loss of source {source!r} must be a tensor, got a {type(loss).__name__}"
            )
        if loss.ndim != 0:
            raise LossShapeError(
                f"losses(): the loss of source {source!r} must be a scalar, got shape {tuple(loss.shape)}"
            )
        if not loss.requires_grad:
            raise LossShapeError(f"losses(): the loss of source {source!r} carries no graph: was it detached?")
    return losses


def checked_evaluation(given: object) -> Evaluation:
    """Returns the evaluation as plain numbers. Reading a tensor on a device synchronises.

    Raises BrokenJobError, which names the field, if it is not an evaluation of numbers.
    """
    if not isinstance(given, Evaluation):
        raise BrokenJobError(f"evaluate() must return an Evaluation, got a {type(given).__name__}")
    loss_sum = _scalar(given.loss_sum)
    if not _is_number(loss_sum):
        raise BrokenJobError(f"evaluate(): Evaluation.loss_sum must be a number, got {_described(given.loss_sum)}")
    correct = None if given.correct is None else _count("correct", given.correct)
    return Evaluation(float(loss_sum), correct, _count("samples", given.samples), _metrics(given.metrics))


def _metrics(given: object) -> dict[str, float | Ratio]:
    """Returns the metrics of an evaluation, by name in order, so that all ranks have the same order."""
    where = "evaluate(): Evaluation.metrics"
    if not isinstance(given, Mapping):
        raise BrokenJobError(f"{where} must be a mapping of names to numbers, got a {type(given).__name__}")
    if len(given) > METRICS_MAX:
        raise BrokenJobError(f"{where} has {len(given)} names; at most {METRICS_MAX} are shown")
    if problem := next(filter(None, map(metric_name_problem, given)), None):
        raise BrokenJobError(f"{where}: {problem}")
    return {name: _metric(f"{where}[{name!r}]", given[name]) for name in sorted(given)}


def _metric(where: str, given: object) -> float | Ratio:
    if isinstance(given, Ratio):
        total, weight = _scalar(given.total), _scalar(given.weight)
        if _is_number(total) and _is_number(weight):
            return Ratio(float(total), float(weight), bool(given.exponential))
        given = given.weight if _is_number(total) else given.total
    elif _is_number(number := _scalar(given)):
        return float(number)
    raise BrokenJobError(f"{where} must be a number or a Ratio of numbers, got {_described(given)}")


def _count(field: str, value: object) -> int:
    number = _whole_number(value)
    if number is None or number < 0:
        raise BrokenJobError(
            f"evaluate(): Evaluation.{field} must be a whole number of at least 0, got {_described(value)}"
        )
    return number


def _scalar(value: object) -> object:
    """Returns the Python number in a tensor without dimensions or in a numpy scalar; other values unchanged."""
    if isinstance(value, Tensor):
        return value.item() if value.dim() == 0 else value
    return value.item() if isinstance(value, np.generic) else value


def _whole_number(value: object) -> int | None:
    number = _scalar(value)
    if isinstance(number, int):
        return int(number)
    return int(number) if isinstance(number, float) and number.is_integer() else None


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float))


def _described(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
