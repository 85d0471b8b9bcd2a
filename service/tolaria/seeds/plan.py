"""The changes that bring the seeds of a model to what Kasmina declares: a pure function of records and states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from tolaria.seeds.slots import seed_id_problem
from tolaria.seeds.stages import (
    ABSENT,
    BLENDED,
    FOSSILIZED,
    FULL_STRENGTH,
    SUCCESSORS,
    Ramp,
    Stage,
    desired_ramp,
    stage_name,
)


@dataclass(frozen=True, slots=True)
class SeedRecord:
    """A seed that is in the model.

    Attributes:
        seed_id: its id.
        blueprint: the name of its blueprint.
        slot: the name of its slot.
        stage: CULLED for a seed that fades out.
        ramp: the schedule that it follows; None before it blends.
        asked: the schedule that was declared, which differs from `ramp` where it arrived late.
        attribution: as declared.
    """

    seed_id: str
    blueprint: str
    slot: str
    stage: Stage
    ramp: Ramp | None = None
    asked: Ramp | None = None
    attribution: float = 0.0

    def alpha(self, step: int) -> float:
        """Returns alpha in the forward pass of the step after `step` steps."""
        if self.ramp is None or self.stage in {SEED_STAGE_GERMINATED, SEED_STAGE_TRAINING}:
            return 0.0
        return self.ramp.end if self.stage in FULL_STRENGTH else self.ramp.at(step)


class ChangeKind(Enum):
    """The kind of a change. ADJUSTED: another schedule or attribution. FADING: culled, and ramping down first."""

    GRAFTED = "grafted"
    MOVED = "moved"
    ADJUSTED = "adjusted"
    FADING = "fading"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class Change:
    """One seed before and after; None where it is not in the model."""

    before: SeedRecord | None
    after: SeedRecord | None

    @property
    def seed_id(self) -> str:
        """The id of the seed."""
        return self._either.seed_id

    @property
    def kind(self) -> ChangeKind:
        """The kind of the change."""
        if self.before is None:
            return ChangeKind.GRAFTED
        if self.after is None:
            return ChangeKind.REMOVED
        if self.after.stage == self.before.stage:
            return ChangeKind.ADJUSTED
        return ChangeKind.FADING if self.after.stage == SEED_STAGE_CULLED else ChangeKind.MOVED

    @property
    def _either(self) -> SeedRecord:
        either = self.after or self.before
        assert either is not None  # noqa: S101 - a change has at least one side
        return either

    def __str__(self) -> str:
        stage = "" if self.after is None else f", {stage_name(self.after.stage)}"
        return f"{self.seed_id} {self.kind.value} in slot {self._either.slot}{stage}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A desired state, or a part of one, that cannot be reached now, and why."""

    seed_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a plan depends on beside the seeds.

    Attributes:
        slots: names of the slots in the model's order.
        blueprints: names of the known blueprints.
        misfits: why a blueprint does not fit a slot, by (blueprint, slot); other pairs fit.
        cull_steps: steps over which a culled seed fades out, at least 1.
    """

    slots: Sequence[str]
    blueprints: AbstractSet[str]
    misfits: Mapping[tuple[str, str], str]
    cull_steps: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Changes in the order in which to apply them: seeds that leave, that move on, and new ones."""

    changes: tuple[Change, ...]
    refusals: tuple[Refusal, ...]


_Outcome: TypeAlias = tuple[SeedRecord | None, str | None]
"""The seed afterwards (None: not in the model), and why that is not all that was declared."""


def plan(current: Sequence[SeedRecord], desired: Sequence[SeedState], facts: HostFacts, global_step: int) -> Plan:
    """Returns the changes that bring `current` as close to `desired` as is possible at `global_step`.

    A seed that is no longer declared is culled, unless it is part of the host. A refused state leaves its seed as it
    is. Planning again from the result gives no change.
    """
    planner = _Planner(facts, global_step)
    valid, refusals = _validate(desired)
    kept = {state.seed_id for state in desired} | {seed.seed_id for seed in current if seed.stage in FOSSILIZED}
    leaving: list[Change] = []
    moving: list[Change] = []
    staying: list[SeedRecord] = []
    for seed in current:
        if seed.seed_id in valid:
            after, reason = planner.follow(seed, valid[seed.seed_id])
        else:
            after, reason = (seed if seed.seed_id in kept else planner.cull(seed)), None
        if reason is not None:
            refusals.append(Refusal(seed.seed_id, reason))
        if after is not None:
            staying.append(after)
        if after != seed:
            (leaving if after is None or after.stage == SEED_STAGE_CULLED else moving).append(Change(seed, after))
    known = {seed.seed_id for seed in current}
    new = [state for state in valid.values() if state.seed_id not in known and state.stage not in ABSENT]
    grafted, refused = planner.graft_all(new, staying)
    return Plan((*leaving, *moving, *grafted), (*refusals, *refused))


def _validate(desired: Sequence[SeedState]) -> tuple[dict[str, SeedState], list[Refusal]]:
    valid: dict[str, SeedState] = {}
    refusals: list[Refusal] = []
    seen: set[str] = set()
    for state in desired:
        problem = "is desired twice; the first counts" if state.seed_id in seen else _state_problem(state)
        seen.add(state.seed_id)
        if problem is None:
            valid[state.seed_id] = state
        else:
            refusals.append(Refusal(state.seed_id, problem))
    return valid, refusals


def _state_problem(state: SeedState) -> str | None:
    problem = seed_id_problem(state.seed_id)
    if problem is not None:
        return problem
    if state.stage not in SeedLifecycleStage.values():
        return f"{stage_name(state.stage)} is unknown to this service"
    if not (math.isfinite(state.attribution) and state.attribution >= 0.0):
        return f"attribution {state.attribution:g} is not a finite number of at least 0"
    return None


@dataclass(frozen=True, slots=True)
class _Planner:
    """The decisions about single seeds at one step."""

    facts: HostFacts
    step: int

    def follow(self, seed: SeedRecord, desired: SeedState) -> _Outcome:
        """Returns what a seed of the model becomes."""
        if desired.stage in ABSENT:
            if seed.stage in FOSSILIZED:
                stages = f"{stage_name(desired.stage)} cannot follow {stage_name(seed.stage)}"
                return seed, f"is part of the host; {stages}"
            return self.cull(seed), None
        problem = _succession_problem(seed, desired)
        return self._move(seed, desired) if problem is None else (seed, problem)

    def cull(self, seed: SeedRecord) -> SeedRecord | None:
        """Returns the seed as it fades out; None if it leaves at once, at alpha 0."""
        if seed.stage == SEED_STAGE_CULLED:
            return seed
        alpha = seed.alpha(self.step)
        if alpha == 0.0:
            return None
        return replace(seed, stage=SEED_STAGE_CULLED, ramp=Ramp(alpha, 0.0, self.step, self.facts.cull_steps))

    def graft_all(
        self, desired: Sequence[SeedState], staying: Sequence[SeedRecord]
    ) -> tuple[list[Change], list[Refusal]]:
        """Grafts new seeds into the slots that the staying ones leave free."""
        taken = {seed.slot for seed in staying if seed.stage not in FOSSILIZED}
        free = [slot for slot in self.facts.slots if slot not in taken]
        changes: list[Change] = []
        refusals: list[Refusal] = []
        for state in desired:
            after, reason = self._graft(state, free)
            if reason is not None:
                refusals.append(Refusal(state.seed_id, reason))
            if after is not None:
                free.remove(after.slot)
                changes.append(Change(None, after))
        return changes, refusals

    def _graft(self, desired: SeedState, free: Sequence[str]) -> _Outcome:
        if desired.stage not in SUCCESSORS[None]:
            return None, f"was never grafted here, so that it cannot be {stage_name(desired.stage)}"
        if desired.blueprint_id not in self.facts.blueprints:
            known = ", ".join(sorted(self.facts.blueprints)) or "none"
            return None, f"blueprint {desired.blueprint_id!r} is unknown; known are {known}"
        slot, problem = self._choose_slot(desired, free)
        if slot is None:
            return None, problem
        germinated = SeedRecord(desired.seed_id, desired.blueprint_id, slot, SEED_STAGE_GERMINATED)
        after, reason = self._move(germinated, desired)
        return (None, reason) if after == germinated and reason is not None else (after, reason)

    def _choose_slot(self, desired: SeedState, free: Sequence[str]) -> tuple[str | None, str | None]:
        """Returns the declared slot, or the first that is free and fits; else None and why."""
        misfits = {slot: self.facts.misfits.get((desired.blueprint_id, slot)) for slot in self.facts.slots}
        if not desired.slot:
            fitting = [slot for slot in free if misfits[slot] is None]
            if fitting:
                return fitting[0], None
            return None, f"no free slot fits: {misfits[free[0]]}" if free else "no slot is free"
        if desired.slot not in misfits:
            return None, f"slot {desired.slot!r} is unknown; known are {', '.join(self.facts.slots) or 'none'}"
        if desired.slot not in free:
            return None, f"slot {desired.slot!r} is taken"
        problem = misfits[desired.slot]
        return (desired.slot, None) if problem is None else (None, problem)

    def _move(self, seed: SeedRecord, desired: SeedState) -> _Outcome:
        """Returns the seed in the desired stage, or the nearest that is reached without a jump of the output."""
        if desired.stage not in BLENDED:
            return replace(seed, stage=desired.stage, attribution=desired.attribution), None
        schedule = self._schedule(seed, desired)
        if isinstance(schedule, str):
            return seed, schedule
        ramp, asked = schedule
        scheduled = replace(seed, ramp=ramp, asked=asked, attribution=desired.attribution)
        enters_full = desired.stage in FULL_STRENGTH and seed.stage not in FULL_STRENGTH
        alpha = ramp.at(self.step)
        if not enters_full or alpha == ramp.end:
            return replace(scheduled, stage=desired.stage), None
        reached = f"alpha is {alpha:.3g} and reaches {ramp.end:.3g} at step {ramp.end_step}"
        stage = seed.stage if seed.stage in BLENDED else SEED_STAGE_BLENDING
        return replace(scheduled, stage=stage), f"{stage_name(desired.stage)} has to wait: {reached}"

    def _schedule(self, seed: SeedRecord, desired: SeedState) -> tuple[Ramp, Ramp | None] | str:
        """Returns the ramp to follow and the declared one; or why there is none."""
        asked = desired_ramp(desired)
        if seed.ramp is not None and (
            seed.stage in FULL_STRENGTH or asked is None or asked == seed.asked or seed.ramp.reported_in(desired)
        ):
            return seed.ramp, seed.asked
        if asked is None:
            return f"{stage_name(desired.stage)} needs an alpha schedule"
        problem = asked.problem()
        if problem is not None:
            return problem
        return (asked if seed.ramp is not None else asked.begun_at(self.step)), asked


def _succession_problem(seed: SeedRecord, desired: SeedState) -> str | None:
    if seed.stage == SEED_STAGE_CULLED and seed.ramp is not None:
        return f"is being culled until step {seed.ramp.end_step}; {stage_name(desired.stage)} cannot follow"
    if desired.stage not in SUCCESSORS[seed.stage]:
        return f"{stage_name(desired.stage)} cannot follow {stage_name(seed.stage)}"
    if desired.blueprint_id not in {"", seed.blueprint}:
        return f"is a {seed.blueprint!r}; it cannot become a {desired.blueprint_id!r}"
    if desired.slot not in {"", seed.slot}:
        return f"is in slot {seed.slot!r}; it cannot move to {desired.slot!r}"
    return None
