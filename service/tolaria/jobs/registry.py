"""Loads the factory that `training.job` names, and builds the job."""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import entry_points

from tolaria.errors import BrokenJobError, JobError, UnknownJobError
from tolaria.jobs.job import JobContext, JobFactory, TrainingJob

ENTRY_POINTS = "tolaria.jobs"


def build_job(name: str, context: JobContext) -> TrainingJob:
    """Returns the job of a factory: an entry point of the group `tolaria.jobs`, or `package.module:factory`.

    Raises:
        UnknownJobError: there is no such name, module or factory.
        BrokenJobError: importing or calling the factory failed, or the job lacks a method of `TrainingJob`.
    """
    factory = _load_factory(name)
    try:
        job = factory(context)
    except JobError:
        raise
    except (Exception, SystemExit) as error:
        raise BrokenJobError(f"training.job {name!r}: its factory raised {type(error).__name__}: {error}") from error
    methods = [method for method, _ in inspect.getmembers(TrainingJob, inspect.isfunction) if method[0] != "_"]
    missing = [method for method in methods if not callable(getattr(job, method, None))]
    if missing:
        raise BrokenJobError(
            f"training.job {name!r}: its factory returned a {type(job).__name__}, which lacks {', '.join(missing)}"
        )
    return job


def _load_factory(name: str) -> JobFactory:
    module, _, attribute = (name if ":" in name else _registered(name)).partition(":")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise UnknownJobError(f"training.job {name!r}: there is no module {error.name!r} on the path") from None
        raise BrokenJobError(f"training.job {name!r}: importing it failed: {error}") from error
    except (Exception, SystemExit) as error:
        raise BrokenJobError(f"training.job {name!r}: importing it raised {type(error).__name__}: {error}") from error
    if not hasattr(loaded, attribute):
        raise UnknownJobError(f"training.job {name!r}: module {module!r} has no {attribute!r}")
    factory: object = getattr(loaded, attribute)
    if not callable(factory):
        raise BrokenJobError(f"training.job {name!r}: is a {type(factory).__name__}, not a factory that can be called")
    return factory


def _registered(name: str) -> str:
    known = entry_points(group=ENTRY_POINTS)
    if name not in known.names:
        raise UnknownJobError(
            f"training.job {name!r} is not registered (known: {', '.join(sorted(known.names))}); "
            "name your own job as package.module:factory"
        )
    return known[name].value
