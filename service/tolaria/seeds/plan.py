"""The changes that bring the seeds of a model to the declared ones: a pure function of records and states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from leyline.v1.enums_pb2 import (
    SEED_STAGE_BLENDING,
    SEED_STAGE_CULLED,
    SEED_STAGE_GERMINATED,
    SeedLifecycleStage,
)
from leyline.v1.seeds_pb2 import SeedState
from tolaria.errors import SeedError
from tolaria.seeds.slots import seed_id_problem
from tolaria.seeds.stages import ABSENT, BLENDED, SUCCESSORS, stage_name
from tolaria.values.seeds import (
    FOSSILIZED,
    FULL_STRENGTH,
    GROWING,
    NO_LIMITS,
    Ramp,
    SeedLimits,
    Stage,
    alpha_at,
    declared_ramp,
)


@dataclass(frozen=True, slots=True)
class GraftedSeed:
    """A seed that is in the model.

    Attributes:
        seed_id: its id.
        blueprint: the name of its blueprint.
        slot: the name of its slot.
        stage: CULLED while it fades out.
        ramp: the schedule that it follows; None before it blends.
        asked: the schedule that was declared, which differs from `ramp` if it arrived late.
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
        return alpha_at(self.stage, self.ramp, step)


@dataclass(frozen=True, slots=True)
class Change:
    """One seed before and after; None where it is not in the model."""

    before: GraftedSeed | None
    after: GraftedSeed | None

    @property
    def seed(self) -> GraftedSeed:
        """The seed afterwards; as it was before if it leaves."""
        seed = self.after or self.before
        assert seed is not None  # noqa: S101 - a change has at least one side
        return seed

    @property
    def kind(self) -> str:
        """One word. adjusted: another schedule or attribution. fading: culled, and ramping down first."""
        if self.before is None:
            return "grafted"
        if self.after is None:
            return "removed"
        if self.after.stage == self.before.stage:
            return "adjusted"
        return "fading" if self.after.stage == SEED_STAGE_CULLED else "moved"

    def __str__(self) -> str:
        stage = "" if self.after is None else f", {stage_name(self.after.stage)}"
        return f"{self.seed.seed_id} {self.kind} in slot {self.seed.slot}{stage}"


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
        limits: numbers of seeds that the model may have.
    """

    slots: Sequence[str]
    blueprints: AbstractSet[str]
    misfits: Mapping[tuple[str, str], str]
    cull_steps: int
    limits: SeedLimits = NO_LIMITS


@dataclass(frozen=True, slots=True)
class Plan:
    """Changes in the order in which to apply them: seeds that leave, that move on, and new ones."""

    changes: tuple[Change, ...]
    refusals: tuple[Refusal, ...]


def plan(current: Sequence[GraftedSeed], desired: Sequence[SeedState], facts: HostFacts, global_step: int) -> Plan:
    """Returns the changes that bring `current` as close to `desired` as is possible at `global_step`.

    A seed that is no longer declared is culled, unless it is part of the host. A refused state leaves its seed as it
    is. Planning again from the result gives no change.
    """
    planner = _Planner(facts, global_step, [], {seed.seed_id for seed in current if seed.stage in FOSSILIZED})
    valid = planner.validate(desired)
    kept = {state.seed_id for state in desired} | {seed.seed_id for seed in current if seed.stage in FOSSILIZED}
    leaving: list[Change] = []
    moving: list[Change] = []
    staying: list[GraftedSeed] = []
    for seed in current:
        if seed.seed_id in valid:
            after = planner.follow(seed, valid[seed.seed_id])
        else:
            after = seed if seed.seed_id in kept else planner.cull(seed)
        if after is not None:
            staying.append(after)
        if after != seed:
            (leaving if after is None or after.stage == SEED_STAGE_CULLED else moving).append(Change(seed, after))
    known = {seed.seed_id for seed in current}
    new = [state for state in valid.values() if state.seed_id not in known and state.stage not in ABSENT]
    grafted = planner.graft_all(new, staying)
    return Plan((*leaving, *moving, *grafted), tuple(planner.refusals))


@dataclass(frozen=True, slots=True)
class _Planner:
    """The decisions about single seeds at one step. Private methods raise SeedError with the reason of a refusal."""

    facts: HostFacts
    step: int
    refusals: list[Refusal]
    fossilized: set[str]

    def validate(self, desired: Sequence[SeedState]) -> dict[str, SeedState]:
        """Returns the states that are well-formed, by seed."""
        valid: dict[str, SeedState] = {}
        seen: set[str] = set()
        for state in desired:
            problem = "is desired twice; the first counts" if state.seed_id in seen else _state_problem(state)
            seen.add(state.seed_id)
            if problem is None:
                valid[state.seed_id] = state
            else:
                self._refuse(state.seed_id, problem)
        return valid

    def follow(self, seed: GraftedSeed, desired: SeedState) -> GraftedSeed | None:
        """Returns what a seed of the model becomes; None if it leaves."""
        try:
            _check_succession(seed, desired)
            return self.cull(seed) if desired.stage in ABSENT else self._move(seed, desired)
        except SeedError as error:
            self._refuse(seed.seed_id, str(error))
            return seed

    def cull(self, seed: GraftedSeed) -> GraftedSeed | None:
        """Returns the seed as it fades out; None if it leaves at once, at alpha 0."""
        if seed.stage == SEED_STAGE_CULLED:
            return seed
        alpha = seed.alpha(self.step)
        if alpha == 0.0:
            return None
        return replace(seed, stage=SEED_STAGE_CULLED, ramp=Ramp(alpha, 0.0, self.step, self.facts.cull_steps))

    def graft_all(self, desired: Sequence[SeedState], staying: Sequence[GraftedSeed]) -> list[Change]:
        """Grafts new seeds into the slots that the staying ones leave free."""
        taken = {seed.slot for seed in staying if seed.stage not in FOSSILIZED}
        free = [slot for slot in self.facts.slots if slot not in taken]
        growing = sum(seed.stage in GROWING for seed in staying)
        changes: list[Change] = []
        for state in desired:
            try:
                after = self._graft(state, free, growing + len(changes))
            except SeedError as error:
                self._refuse(state.seed_id, str(error))
            else:
                free.remove(after.slot)
                changes.append(Change(None, after))
        return changes

    def _refuse(self, seed_id: str, reason: str) -> None:
        self.refusals.append(Refusal(seed_id, reason))

    def _graft(self, desired: SeedState, free: Sequence[str], growing: int) -> GraftedSeed:
        """Returns the new seed, beside the number of `growing` ones."""
        if growing >= (most := self.facts.limits.active):
            raise SeedError(f"{growing} seeds grow already, of at most {most} (seeds.active_max)")
        if desired.stage not in SUCCESSORS[None]:
            raise SeedError(f"was never grafted here, so that it cannot be {stage_name(desired.stage)}")
        if desired.blueprint_id not in self.facts.blueprints:
            known = ", ".join(sorted(self.facts.blueprints)) or "none"
            raise SeedError(f"blueprint {desired.blueprint_id!r} is unknown; known are {known}")
        slot = self._choose_slot(desired, free)
        return self._move(GraftedSeed(desired.seed_id, desired.blueprint_id, slot, SEED_STAGE_GERMINATED), desired)

    def _choose_slot(self, desired: SeedState, free: Sequence[str]) -> str:
        """Returns the declared slot, or the first that is free and fits."""
        misfits = {slot: self.facts.misfits.get((desired.blueprint_id, slot)) for slot in self.facts.slots}
        if not desired.slot:
            for slot in free:
                if misfits[slot] is None:
                    return slot
            raise SeedError(f"no free slot fits: {misfits[free[0]]}" if free else "no slot is free")
        if desired.slot not in misfits:
            raise SeedError(f"slot {desired.slot!r} is unknown; known are {', '.join(self.facts.slots) or 'none'}")
        if desired.slot not in free:
            raise SeedError(f"slot {desired.slot!r} is taken")
        if problem := misfits[desired.slot]:
            raise SeedError(problem)
        return desired.slot

    def _move(self, seed: GraftedSeed, desired: SeedState) -> GraftedSeed:
        """Returns the seed in the desired stage, or the nearest that is reached without a jump of the output."""
        if desired.stage not in BLENDED:
            return replace(seed, stage=desired.stage, attribution=desired.attribution)
        if desired.stage in FOSSILIZED and seed.stage not in FOSSILIZED:
            self._check_fossilized()
        ramp, asked = self._schedule(seed, desired)
        scheduled = replace(seed, ramp=ramp, asked=asked, attribution=desired.attribution)
        alpha = ramp.at(self.step)
        if desired.stage not in FULL_STRENGTH or seed.stage in FULL_STRENGTH or alpha == ramp.end:
            if desired.stage in FOSSILIZED:
                self.fossilized.add(seed.seed_id)
            return replace(scheduled, stage=desired.stage)
        reached = f"alpha is {alpha:.3g} and reaches {ramp.end:.3g} at step {ramp.end_step}"
        self._refuse(seed.seed_id, f"{stage_name(desired.stage)} has to wait: {reached}")
        return replace(scheduled, stage=seed.stage if seed.stage in BLENDED else SEED_STAGE_BLENDING)

    def _check_fossilized(self) -> None:
        most = self.facts.limits.fossilized
        if len(self.fossilized) >= most:
            raise SeedError(f"{len(self.fossilized)} seeds are fossilized, of at most {most} (seeds.fossilized_max)")

    def _schedule(self, seed: GraftedSeed, desired: SeedState) -> tuple[Ramp, Ramp | None]:
        """Returns the ramp to follow and the declared one."""
        asked = declared_ramp(desired)
        if seed.ramp is not None:
            # The reported schedule comes back rounded to the message's floats.
            reported = desired.HasField("alpha") and desired.alpha == seed.ramp.message()
            if seed.stage in FULL_STRENGTH or asked is None or asked == seed.asked or reported:
                return seed.ramp, seed.asked
        if asked is None:
            raise SeedError(f"{stage_name(desired.stage)} needs an alpha schedule")
        if problem := asked.problem():
            raise SeedError(problem)
        return (asked if seed.ramp is not None else asked.begun_at(self.step)), asked


def _state_problem(state: SeedState) -> str | None:
    problem = seed_id_problem(state.seed_id)
    if problem is not None:
        return problem
    if state.stage not in SeedLifecycleStage.values():
        return f"{stage_name(state.stage)} is unknown to this service"
    if not (math.isfinite(state.attribution) and state.attribution >= 0.0):
        return f"attribution {state.attribution:g} is not a finite number of at least 0"
    return None


def _check_succession(seed: GraftedSeed, desired: SeedState) -> None:
    stage, present = stage_name(desired.stage), stage_name(seed.stage)
    if desired.stage in ABSENT:
        if seed.stage in FOSSILIZED:
            raise SeedError(f"is part of the host; {stage} cannot follow {present}")
        return
    if seed.stage == SEED_STAGE_CULLED and seed.ramp is not None:
        raise SeedError(f"is being culled until step {seed.ramp.end_step}; {stage} cannot follow")
    if desired.stage not in SUCCESSORS[seed.stage]:
        raise SeedError(f"{stage} cannot follow {present}")
    if desired.blueprint_id not in {"", seed.blueprint}:
        raise SeedError(f"is a {seed.blueprint!r}; it cannot become a {desired.blueprint_id!r}")
    if desired.slot not in {"", seed.slot}:
        raise SeedError(f"is in slot {seed.slot!r}; it cannot move to {desired.slot!r}")
