"""When a heart is silent, and what the sentinel does about it, step by step. Pure: no clock, no board, no process.

Silence is a heartbeat that does not move while the sentinel looks on. What the beat says is not compared with any
clock: a beat of 0, one from the future or from another clock is silent when it stands still. Only time that was
looked at counts: a sentinel that was itself stopped, with the whole machine perhaps, has seen nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds.

    `startup_s` before anything counts, `timeout_s` for a beat, `grace_s` between the alarm and SIGTERM, `drain_s`
    between SIGTERM and SIGKILL. One look counts for at most `look_s_max`.
    """

    startup_s: float
    timeout_s: float
    grace_s: float
    drain_s: float
    look_s_max: float


class Stage(Enum):
    """How far the sentinel has gone."""

    WATCHING = auto()
    ALARMED = auto()
    ASKED = auto()
    KILLED = auto()


class Action(Enum):
    """What the sentinel shall do."""

    RAISE_HALT = auto()
    DUMP_STACKS = auto()
    CALM_DOWN = auto()
    """The hearts beat again: let the process live. The halt stands until it is cleared."""
    TERMINATE = auto()
    KILL = auto()


@dataclass(frozen=True, slots=True)
class Heart:
    """One heartbeat as it is watched: its last value, and for how long it has been seen standing still."""

    beat: int = -1
    quiet_s: float = 0.0

    def after(self, beat: int, looked_s: float) -> Heart:
        """As it is after another look, `looked_s` later."""
        return Heart(beat, 0.0) if beat != self.beat else replace(self, quiet_s=self.quiet_s + looked_s)


@dataclass(frozen=True, slots=True)
class Vigil:
    """Everything that the sentinel knows. `waited_s`: time in this stage; `silent`: the hearts that are."""

    hearts: Mapping[str, Heart]
    stage: Stage = Stage.WATCHING
    startup_left_s: float = 0.0
    waited_s: float = 0.0
    silent: tuple[str, ...] = ()


def begin(names: tuple[str, ...], patience: Patience) -> Vigil:
    """Nothing has been seen yet."""
    return Vigil({name: Heart() for name in names}, startup_left_s=patience.startup_s)


def look(
    vigil: Vigil, beats: Mapping[str, int], elapsed_s: float, patience: Patience
) -> tuple[Vigil, tuple[Action, ...]]:
    """What is known, and to be done, after a look at `beats`, `elapsed_s` after the last one."""
    looked_s = min(elapsed_s, patience.look_s_max)
    counted_s = 0.0 if vigil.startup_left_s > 0 else looked_s
    hearts = {name: heart.after(beats[name], counted_s) for name, heart in vigil.hearts.items()}
    silent = tuple(name for name, heart in hearts.items() if heart.quiet_s >= patience.timeout_s)
    seen = replace(
        vigil,
        hearts=hearts,
        silent=silent,
        startup_left_s=max(0.0, vigil.startup_left_s - looked_s),
        waited_s=vigil.waited_s + looked_s,
    )
    return _decide(seen, patience)


def _decide(vigil: Vigil, patience: Patience) -> tuple[Vigil, tuple[Action, ...]]:
    match vigil.stage:
        case Stage.WATCHING if vigil.silent:
            return _enter(vigil, Stage.ALARMED), (Action.RAISE_HALT, Action.DUMP_STACKS)
        case Stage.ALARMED if not vigil.silent:
            return _enter(vigil, Stage.WATCHING), (Action.CALM_DOWN,)
        case Stage.ALARMED if vigil.waited_s >= patience.grace_s:
            return _enter(vigil, Stage.ASKED), (Action.TERMINATE,)
        case Stage.ASKED if vigil.waited_s >= patience.drain_s:
            return _enter(vigil, Stage.KILLED), (Action.KILL,)
        case _:
            return vigil, ()


def _enter(vigil: Vigil, stage: Stage) -> Vigil:
    return replace(vigil, stage=stage, waited_s=0.0)
