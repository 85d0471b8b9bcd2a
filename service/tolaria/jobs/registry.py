"""Finds the training job that a setting names and builds it. Every mistake in it becomes a clear `JobError`.

Must not know what becomes of the job.
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import EntryPoint, entry_points

from tolaria.errors import BrokenJobError, JobError, UnknownJobError
from tolaria.jobs.job import JobContext, JobFactory, TrainingJob

ENTRY_POINTS = "tolaria.jobs"


def build_job(name: str, context: JobContext) -> TrainingJob:
    """Load the factory that `name` means, call it with `context`, and check that it made a job.

    Args:
        name: a name registered under the entry points `tolaria.jobs`, or `package.module:factory`.
        context: seed, device and options.

    Raises:
        UnknownJobError: when there is no such name, module or factory.
        BrokenJobError: when importing or calling it raised, or what it made lacks a method of `TrainingJob`.
    """
    factory = _load(name)
    try:
        job = factory(context)
    except JobError:
        raise
    except (Exception, SystemExit) as error:
        raise BrokenJobError(f"training.job {name!r}: its factory raised {type(error).__name__}: {error}") from error
    missing = [method for method in _methods() if not callable(getattr(job, method, None))]
    if missing:
        raise BrokenJobError(
            f"training.job {name!r}: its factory returned a {type(job).__name__}, which lacks {', '.join(missing)}"
        )
    return job


def known_jobs() -> list[str]:
    """The registered names, sorted."""
    return sorted(entry_points(group=ENTRY_POINTS).names)


def _methods() -> list[str]:
    return [name for name, _ in inspect.getmembers(TrainingJob, inspect.isfunction) if not name.startswith("_")]


def _load(name: str) -> JobFactory:
    if ":" in name:
        module, _, attribute = name.partition(":")
        found: object = _imported(name, module, attribute)
    else:
        found = _registered(name)
    if not callable(found):
        raise BrokenJobError(f"training.job {name!r}: is a {type(found).__name__}, not a factory that can be called")
    return found


def _registered(name: str) -> object:
    matches: list[EntryPoint] = list(entry_points(group=ENTRY_POINTS, name=name))
    if not matches:
        raise UnknownJobError(
            f"training.job {name!r} is not registered (known: {', '.join(known_jobs())}); "
            "a job of your own is named package.module:factory"
        )
    module, _, attribute = matches[0].value.partition(":")
    return _imported(name, module, attribute)


def _imported(name: str, module: str, attribute: str) -> object:
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise UnknownJobError(f"training.job {name!r}: there is no module {error.name!r} on the path") from None
        raise BrokenJobError(f"training.job {name!r}: importing it failed: {error}") from error
    except (Exception, SystemExit) as error:
        raise BrokenJobError(f"training.job {name!r}: importing it raised {type(error).__name__}: {error}") from error
    try:
        return getattr(loaded, attribute)
    except AttributeError:
        raise UnknownJobError(f"training.job {name!r}: module {module!r} has no {attribute!r}") from None
