"""The interface of a tracker, the records that one is fed with, and how trackers are found by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol
from urllib.parse import urlsplit

from pydantic import JsonValue

from tolaria.config import TrackingSettings
from tolaria.config.fields import suggestion
from tolaria.errors import ConfigurationError

ENTRY_POINTS: Final = "tolaria.trackers"
NOTHING_LOGGED: Final = -1

_OWN_MODULES: Final = "tolaria.trackers."


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """A run, as it starts or is resumed. What was recorded of later steps than `global_step` has not happened.

    `settings` are those that differ from their defaults, by dotted name. Times are seconds since 1970.
    """

    run_id: str
    name: str
    experiment: str
    job: str
    tags: Mapping[str, str]
    settings: Mapping[str, JsonValue]
    global_step: int
    attempt: int
    time: float


@dataclass(frozen=True, slots=True)
class Point:
    """Metrics by name after `global_step` optimizer updates. `attempt` counts the rollbacks of the run, from 1."""

    global_step: int
    attempt: int
    epoch: int
    time: float
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Rewind:
    """Training has gone back to `global_step`, where `attempt` begins: later steps have not happened."""

    global_step: int
    attempt: int
    time: float


@dataclass(frozen=True, slots=True)
class Note:
    """An annotation: what happened to the run at a step, as a sentence."""

    global_step: int
    attempt: int
    time: float
    text: str


@dataclass(frozen=True, slots=True)
class RunEnd:
    """The run has ended: `outcome` is finished or failed."""

    global_step: int
    attempt: int
    time: float
    outcome: str


Record = TrackedRun | Point | Rewind | Note | RunEnd


@dataclass(slots=True)
class TrackerState:
    """What a tracker has when it is opened.

    Attributes:
        directory: for its files; it exists.
        newest_step: the newest step of which a point was logged before and survives; `NOTHING_LOGGED` if none was.
        history: returns the surviving points that were logged before, oldest first, as far as the log has them.
        memory: JSON values that the tracker keeps from one process to the next; saved after each of its methods.
    """

    directory: Path
    newest_step: int
    history: Callable[[], Iterator[Point]]
    memory: dict[str, Any] = field(default_factory=dict)


class Tracker(Protocol):
    """Shows the metrics of a run elsewhere.

    An entry point of the group `tolaria.trackers` names the class, which is called with the options of its name.
    Methods are called one at a time, in a process for this tracker alone, which may block. What they raise ends the
    process: another one is started later, and gets the same records again. Steps of one metric ascend between two
    rewinds, and each is logged once.
    """

    package: ClassVar[str]
    """The module without which it does not work, empty if none; looked for before the run, but not imported."""

    options: ClassVar[frozenset[str]]
    """The names of its options."""

    def __init__(self, options: Mapping[str, JsonValue]) -> None: ...

    def open(self, run: TrackedRun, state: TrackerState) -> None:
        """Begins a run, or goes on with one. Points after `state.newest_step` have to disappear if there are any."""

    def log(self, points: Sequence[Point]) -> None:
        """Logs points, in the order of their steps."""

    def rewind(self, to: Rewind) -> None:
        """Makes the points after a step disappear; the state's `history` ends there already."""

    def annotate(self, notes: Sequence[Note]) -> None:
        """Shows annotations, which outlast rewinds."""

    def close(self, outcome: str) -> None:
        """Ends the run, which has finished or failed; empty if it may be resumed. Writes what is left."""


def tracker_class(name: str) -> Callable[[Mapping[str, JsonValue]], Tracker]:
    """Imports a tracker by its name. Raises ConfigurationError if there is none; importing may raise anything."""
    module, _, attribute = _location(name).partition(":")
    found: Callable[[Mapping[str, JsonValue]], Tracker] = getattr(importlib.import_module(module), attribute)
    return found


def check_trackers(settings: TrackingSettings) -> None:
    """Finds what is wrong with the chosen trackers, without importing their packages.

    Raises:
        ConfigurationError: with all problems: unknown names, missing packages, unknown options.
    """
    names, options, problems = settings.trackers, settings.options, list[str]()
    for name in names:
        try:
            location = _location(name)
        except ConfigurationError as error:
            problems += error.problems
            continue
        if location.startswith(_OWN_MODULES):  # others are imported in their process only
            problems += _problems_of_own(name, options.get(name, {}))
    problems += [f"tracking.options.{name}: {name} is not in tracking.trackers" for name in options.keys() - {*names}]
    if len({*names}) < len(names):
        problems.append(f"tracking.trackers names one twice: {', '.join(names)}")
    if problems:
        raise ConfigurationError(problems)


def _problems_of_own(name: str, options: Mapping[str, JsonValue]) -> Iterator[str]:
    kind: Any = tracker_class(name)
    if find_spec(kind.package) is None:
        yield f"tracking.trackers: {name} needs tolaria[{name}], which is not installed: no module {kind.package!r}"
    for option, value in options.items():
        if option not in kind.options:
            yield f"tracking.options.{name}.{option}: unknown option; {suggestion(option, kind.options)}"
        elif not isinstance(value, str):
            yield f"tracking.options.{name}.{option}: is not a text, got {value!r}"
        elif option == "uri" and urlsplit(value).password:
            yield (
                f"tracking.options.{name}.{option}: has a password, but options are shown and recorded; set "
                f"{name.upper()}_TRACKING_USERNAME and {name.upper()}_TRACKING_PASSWORD"
            )


def _location(name: str) -> str:
    known = entry_points(group=ENTRY_POINTS)
    if name not in known.names:
        raise ConfigurationError([f"tracking.trackers: there is no tracker {name!r}; {suggestion(name, known.names)}"])
    return known[name].value
