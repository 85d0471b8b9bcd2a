"""What has to change in a model so that its seeds are what Kasmina wishes. Pure: standings and wishes in, changes out.

Owns every judgement of a wish. Must not know modules, parameters or devices; a `Ground` answers what depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeAlias

from leyline.v1.enums_pb2 import (
    SEED_STAGE_BLENDING,
    SEED_STAGE_CULLED,
    SEED_STAGE_GERMINATED,
    SEED_STAGE_TRAINING,
    SeedLifecycleStage,
)
from leyline.v1.seeds_pb2 import SeedState
from tolaria.seeds.alpha import Ramp, asked_ramp
from tolaria.seeds.slots import seed_id_problem
from tolaria.seeds.stages import ABSENT, AUDIBLE, FOLLOWERS, FOSSIL, FULL_STRENGTH, Stage, stage_name


@dataclass(frozen=True, slots=True)
class Standing:
    """A seed that is in the model.

    `ramp` is the schedule it follows (None until it blends), `asked` the one that was wished for, which differs where
    the wish came late. CULLED is a seed on its way out, down to alpha 0. `attribution` is the wish's, for the states.
    """

    seed_id: str
    blueprint: str
    slot: str
    stage: Stage
    ramp: Ramp | None = None
    asked: Ramp | None = None
    attribution: float = 0.0

    def alpha(self, step: int) -> float:
        """Its strength in the forward pass of the update after `step` updates."""
        if self.ramp is None or self.stage in {SEED_STAGE_GERMINATED, SEED_STAGE_TRAINING}:
            return 0.0
        return self.ramp.end if self.stage in FULL_STRENGTH else self.ramp.at(step)


class ChangeKind(Enum):
    """What a change does."""

    GRAFTED = "grafted"
    MOVED = "moved"
    ADJUSTED = "adjusted"
    FADING = "fading"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class Change:
    """One seed before and after; None where it is not in the model."""

    before: Standing | None
    after: Standing | None

    @property
    def seed_id(self) -> str:
        """Whose change it is."""
        return self._either.seed_id

    @property
    def kind(self) -> ChangeKind:
        """What it does. ADJUSTED: another schedule or attribution. FADING: culled, and ramping down first."""
        if self.before is None:
            return ChangeKind.GRAFTED
        if self.after is None:
            return ChangeKind.REMOVED
        if self.after.stage == self.before.stage:
            return ChangeKind.ADJUSTED
        return ChangeKind.FADING if self.after.stage == SEED_STAGE_CULLED else ChangeKind.MOVED

    @property
    def _either(self) -> Standing:
        either = self.after or self.before
        assert either is not None  # noqa: S101 - a change of nothing into nothing is never made
        return either

    def __str__(self) -> str:
        stage = "" if self.after is None else f", {stage_name(self.after.stage)}"
        return f"{self.seed_id} {self.kind.value} in slot {self._either.slot}{stage}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A wish, or the part of one, that cannot be met now; in words for whoever wished."""

    seed_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Ground:
    """What can grow where: slots in the model's order, known blueprints, and why one does not fit a slot (None: fits).

    A culled seed ramps down over `cull_steps`, at least 1.
    """

    slots: Sequence[str]
    blueprints: AbstractSet[str]
    misfit: Callable[[str, str], str | None]
    cull_steps: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Changes in the order in which to make them: who leaves, who moves on, who comes."""

    changes: tuple[Change, ...]
    refusals: tuple[Refusal, ...]


_Outcome: TypeAlias = tuple[Standing | None, str | None]
"""What a seed becomes (None: not in the model) and, where that is not the whole wish, why."""


def plan(current: Sequence[Standing], desired: Sequence[SeedState], ground: Ground, global_step: int) -> Plan:
    """Bring `current` as close to `desired` as is possible now.

    A seed of the model that nobody wishes for any more is culled, unless it is part of the host. A refused wish leaves
    its seed as it is. Planning again from the result gives no change.
    """
    wishes, refusals = _sort_out(desired)
    spared = {state.seed_id for state in desired} | {each.seed_id for each in current if each.stage in FOSSIL}
    leaving: list[Change] = []
    moving: list[Change] = []
    staying: list[Standing] = []
    for standing in current:
        after, reason = _become(standing, wishes.get(standing.seed_id), spared, (ground, global_step))
        if reason is not None:
            refusals.append(Refusal(standing.seed_id, reason))
        if after is not None:
            staying.append(after)
        if after != standing:
            (leaving if after is None or after.stage == SEED_STAGE_CULLED else moving).append(Change(standing, after))
    coming = _newcomers(current, staying, wishes, refusals, (ground, global_step))
    return Plan((*leaving, *moving, *coming), tuple(refusals))


def _sort_out(desired: Sequence[SeedState]) -> tuple[dict[str, SeedState], list[Refusal]]:
    wishes: dict[str, SeedState] = {}
    refusals: list[Refusal] = []
    seen: set[str] = set()
    for state in desired:
        problem = "is desired twice; the first counts" if state.seed_id in seen else _malformed(state)
        seen.add(state.seed_id)
        if problem is None:
            wishes[state.seed_id] = state
        else:
            refusals.append(Refusal(state.seed_id, problem))
    return wishes, refusals


def _malformed(state: SeedState) -> str | None:
    problem = seed_id_problem(state.seed_id)
    if problem is not None:
        return problem
    if state.stage not in SeedLifecycleStage.values():
        return f"{stage_name(state.stage)} is unknown to this service"
    if not (math.isfinite(state.attribution) and state.attribution >= 0.0):
        return f"attribution {state.attribution:g} is not a finite number of at least 0"
    return None


def _become(standing: Standing, wish: SeedState | None, spared: set[str], now: tuple[Ground, int]) -> _Outcome:
    if wish is not None:
        return _follow(standing, wish, *now)
    return (standing if standing.seed_id in spared else _leave(standing, *now)), None


def _follow(standing: Standing, wish: SeedState, ground: Ground, step: int) -> _Outcome:
    if wish.stage in ABSENT:
        if standing.stage in FOSSIL:
            return standing, f"is part of the host; {stage_name(wish.stage)} cannot follow {stage_name(standing.stage)}"
        return _leave(standing, ground, step), None
    problem = _cannot_follow(standing, wish)
    if problem is not None:
        return standing, problem
    return _head_for(standing, wish, step)


def _leave(standing: Standing, ground: Ground, step: int) -> Standing | None:
    if standing.stage == SEED_STAGE_CULLED:
        return standing
    alpha = standing.alpha(step)
    if alpha == 0.0:
        return None
    return replace(standing, stage=SEED_STAGE_CULLED, ramp=Ramp(alpha, 0.0, step, ground.cull_steps))


def _cannot_follow(standing: Standing, wish: SeedState) -> str | None:
    if standing.stage == SEED_STAGE_CULLED and standing.ramp is not None:
        gone = standing.ramp.begin_step + standing.ramp.duration_steps
        return f"is being culled until step {gone}; {stage_name(wish.stage)} cannot follow"
    if wish.stage not in FOLLOWERS[standing.stage]:
        return f"{stage_name(wish.stage)} cannot follow {stage_name(standing.stage)}"
    if wish.blueprint_id not in {"", standing.blueprint}:
        return f"is a {standing.blueprint!r}; it cannot become a {wish.blueprint_id!r}"
    if wish.slot not in {"", standing.slot}:
        return f"stands in slot {standing.slot!r}; it cannot move to {wish.slot!r}"
    return None


def _head_for(was: Standing, wish: SeedState, step: int) -> _Outcome:
    """The wish's stage, or the nearest to it that can be reached without a jump of the output."""
    if wish.stage not in AUDIBLE:
        return replace(was, stage=wish.stage, attribution=wish.attribution), None
    schedule = _schedule(was, wish, step)
    if isinstance(schedule, str):
        return was, schedule
    ramp, asked = schedule
    scheduled = replace(was, ramp=ramp, asked=asked, attribution=wish.attribution)
    entering_full = wish.stage in FULL_STRENGTH and was.stage not in FULL_STRENGTH
    if not entering_full or ramp.at(step) == ramp.end:
        return replace(scheduled, stage=wish.stage), None
    reached = ramp.begin_step + ramp.duration_steps
    reason = f"{stage_name(wish.stage)} has to wait: alpha is {ramp.at(step):.3g} and reaches {ramp.end:.3g} at step"
    stage = was.stage if was.stage in AUDIBLE else SEED_STAGE_BLENDING
    return replace(scheduled, stage=stage), f"{reason} {reached}"


def _schedule(was: Standing, wish: SeedState, step: int) -> tuple[Ramp, Ramp | None] | str:
    """The ramp to follow and the one asked for; or why there is none."""
    asked = asked_ramp(wish)
    if was.ramp is not None and (
        was.stage in FULL_STRENGTH or asked is None or asked == was.asked or was.ramp.reported_as(wish)
    ):
        return was.ramp, was.asked
    if asked is None:
        return f"{stage_name(wish.stage)} needs an alpha schedule"
    problem = asked.problem()
    if problem is not None:
        return problem
    return (asked if was.ramp is not None else asked.begun_at(step)), asked


def _newcomers(
    current: Sequence[Standing],
    staying: Sequence[Standing],
    wishes: Mapping[str, SeedState],
    refusals: list[Refusal],
    where_and_when: tuple[Ground, int],
) -> list[Change]:
    ground, step = where_and_when
    known = {standing.seed_id for standing in current}
    free = [s for s in ground.slots if s not in {seed.slot for seed in staying if seed.stage not in FOSSIL}]
    coming: list[Change] = []
    for wish in wishes.values():
        if wish.seed_id in known or wish.stage in ABSENT:
            continue
        after, reason = _graft(wish, free, ground, step)
        if reason is not None:
            refusals.append(Refusal(wish.seed_id, reason))
        if after is not None:
            free.remove(after.slot)
            coming.append(Change(None, after))
    return coming


def _graft(wish: SeedState, free: Sequence[str], ground: Ground, step: int) -> _Outcome:
    if wish.stage not in FOLLOWERS[None]:
        return None, f"was never grafted here, so that it cannot be {stage_name(wish.stage)}"
    if wish.blueprint_id not in ground.blueprints:
        known = ", ".join(sorted(ground.blueprints)) or "none"
        return None, f"blueprint {wish.blueprint_id!r} is unknown; known are {known}"
    slot, problem = _place(wish, free, ground)
    if slot is None:
        return None, problem
    seedling = Standing(wish.seed_id, wish.blueprint_id, slot, SEED_STAGE_GERMINATED)
    after, reason = _head_for(seedling, wish, step)
    return (None, reason) if after == seedling and reason is not None else (after, reason)


def _place(wish: SeedState, free: Sequence[str], ground: Ground) -> tuple[str | None, str | None]:
    """The slot wished for; without a name, the first that is free and fits."""
    if not wish.slot:
        problems = [ground.misfit(wish.blueprint_id, slot) for slot in free]
        for slot, problem in zip(free, problems, strict=True):
            if problem is None:
                return slot, None
        return None, f"no free slot fits: {problems[0]}" if problems else "no slot is free"
    if wish.slot not in ground.slots:
        return None, f"slot {wish.slot!r} is unknown; known are {', '.join(ground.slots) or 'none'}"
    if wish.slot not in free:
        return None, f"slot {wish.slot!r} is taken"
    problem = ground.misfit(wish.blueprint_id, wish.slot)
    return (wish.slot, None) if problem is None else (None, problem)
