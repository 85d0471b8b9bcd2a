"""Finds the schedule of learning rates that a job gives by `lr_scheduler`, or that its own code steps."""

from __future__ import annotations

from collections.abc import Iterator

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tolaria.errors import ConfigurationError, ScheduleError
from tolaria.jobs import ScheduledJob, TrainingJob
from tolaria.lane.job_output import call
from tolaria.optimization import UnifiedLRController
from tolaria.optimization.groups import check_given_names, has_scheduler, name_groups
from tolaria.optimization.job_schedule import JobSchedule, adopted, schedule_from, stand_in
from tolaria.values.optimization import RATES_ARE_OWNED


def schedule_of(job: TrainingJob, optimizer: Optimizer) -> JobSchedule | None:
    """Returns the job's schedule for an optimizer that has just been built; None if it has none. Names its groups.

    Raises:
        BrokenJobError: `lr_scheduler` fails or returns something else.
        UnsuitableOptimizerError: a group has no `lr`, a name that it cannot have, or that of another one.
    """
    check_given_names(optimizer)
    name_groups(optimizer)
    schedule = _given(job, optimizer)
    if schedule is None and (held := list(_held(job, optimizer))):
        schedule = adopted(held, optimizer)
    return schedule


def follow_schedule(controller: UnifiedLRController, schedule: JobSchedule | None) -> None:
    """Has the controller follow the schedule. Raises ConfigurationError if the settings have another one."""
    if schedule is None:
        return
    try:
        controller.follow(schedule)
    except ScheduleError as error:
        raise ConfigurationError([f"optimizer.{error}"]) from None
    controller.apply(0)


def schedule_notes(job: TrainingJob, optimizer: Optimizer, controller: UnifiedLRController) -> tuple[str, ...]:
    """Returns sentences about schedulers of the job."""
    schedule = controller.job_schedule
    if schedule is not None and schedule.stepped_by_job:
        what = f"learning rates follow {schedule.description}, which has been adopted"
        return (f"{what}: it is part of the training state, and adjustments apply on top of it",)
    if schedule is None and (has_scheduler(optimizer) or next(_held(job, optimizer), None) is not None):
        return (f"the optimizer has a scheduler of torch's, which is not found in the job; {RATES_ARE_OWNED}",)
    return ()


def _given(job: TrainingJob, optimizer: Optimizer) -> JobSchedule | None:
    if not isinstance(job, ScheduledJob):
        return None
    stand = stand_in(optimizer)
    given = call("lr_scheduler", lambda: job.lr_scheduler(stand))
    return schedule_from(given, optimizer, stand)


def _held(job: TrainingJob, optimizer: Optimizer) -> Iterator[LRScheduler]:
    """Yields the schedulers of the optimizer that the job has as attributes, without those that others consist of."""
    found: list[LRScheduler] = []
    for value in getattr(job, "__dict__", {}).values():
        values = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else (value,)
        found += [each for each in values if isinstance(each, LRScheduler) and each.optimizer is optimizer]
    inner = {
        id(part)
        for each in found
        for value in vars(each).values()
        for part in (value if isinstance(value, (list, tuple)) else (value,))
        if isinstance(part, LRScheduler)
    }
    yield from (each for place, each in enumerate(found) if id(each) not in inner and each not in found[:place])
