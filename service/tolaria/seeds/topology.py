"""`SeedTopology`: brings the seeds of a model to the declared ones, blends, saves and restores them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from leyline.v1.seeds_pb2 import SeedState
from tolaria.errors import BlueprintMisfitError, OwnershipError, SeedError, TopologyStateError, first_line
from tolaria.seeds.alpha import BlendingSeeds
from tolaria.seeds.blueprints import Blueprints
from tolaria.seeds.plan import Change, GraftedSeed, HostFacts, Refusal, plan
from tolaria.seeds.slots import (
    Graft,
    NamedParameters,
    parameters_by_owner,
    seed_prefix,
    seed_that_raised,
    slots_of,
)
from tolaria.seeds.stages import ABSENT, TRAINED, stage_name
from tolaria.values.seeds import NO_LIMITS, Ramp, SeedLimits, stage_from_name

_VERSION: Final = 1


class _Held(NamedTuple):
    """A parameter of a seed in the model, and whether it is trained."""

    seed_id: str
    name: str
    parameter: nn.Parameter
    trained: bool


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """The result of a reconciliation. Parameters are by seed.

    Attributes:
        changes: in the order in which they were made.
        refusals: desired states, or parts of them, that were not reached.
        added: parameters that are trained from now on. A seed's are added when it begins to train, not when it
            germinates, so that the warm-up of its group does not end before then.
        frozen: parameters in the model that are no longer trained: of fossilized seeds, and of culled ones that fade
            out. Their `.grad` is None.
        removed: parameters that left the model. An optimizer must drop these before it takes the added ones, since a
            seed that germinates again has parameters of the same names.
    """

    changes: tuple[Change, ...]
    refusals: tuple[Refusal, ...]
    added: Mapping[str, NamedParameters]
    frozen: Mapping[str, NamedParameters]
    removed: Mapping[str, NamedParameters]


class SeedTopology:
    """The seeds in a model's slots. The only writer of slots; used at step boundaries.

    Args:
        model: the model itself, not a compiled wrapper of it, on its device. Branches take the device and dtype of
            the activations that their slot has received or, before its first pass (see `observed`), of the model's
            first floating-point parameter.
        blueprints: the known blueprints.
        seed: the seed of the run. A seed's initial values are a function of it and of the seed's id alone.
        cull_steps: steps over which a culled seed fades out, at least 1.
        limits: numbers of seeds that the model may have. Seeds of a loaded state may exceed them.
        isolated: whether the gradients of seeds in TRAINING stop at the seed.
        shard: called with each branch before it is grafted, to distribute it over ranks; None where the model is whole.

    Raises:
        SeedError: `cull_steps` is below 1.
        SlotError: two slots have the same name.
        OwnershipError: a parameter of the model belongs to two owners.
    """

    def __init__(
        self,
        model: nn.Module,
        blueprints: Blueprints,
        *,
        seed: int,
        cull_steps: int,
        limits: SeedLimits = NO_LIMITS,
        isolated: bool = True,
        shard: Callable[[nn.Module], object] | None = None,
    ) -> None:
        if cull_steps < 1:
            raise SeedError(f"cull_steps must be at least 1, so that the output does not jump; got {cull_steps}")
        self._model = model
        self._slots = slots_of(model)
        self._blueprints = blueprints
        self._seed = seed
        self._cull_steps = cull_steps
        self._limits = limits
        self._isolated = isolated
        self._shard = shard
        self._seeds: dict[str, GraftedSeed] = {}
        self._blending = BlendingSeeds()
        self._misfits: dict[tuple[str, str], str | None] = {}
        self._failed: dict[tuple[str, str], str] = {}
        self.agree: Callable[[str], str] = lambda problem: problem
        """Returns the problem of a seed on this rank, or else on another one; every rank calls it."""
        parameters_by_owner(model)

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of the slots in the model's order."""
        return tuple(self._slots)

    @property
    def has_seeds(self) -> bool:
        """Whether any seed is in the model."""
        return bool(self._seeds)

    @property
    def training_seeds(self) -> tuple[str, ...]:
        """Ids of the seeds that are trained, oldest first."""
        return tuple(seed_id for seed_id, seed in self._seeds.items() if seed.stage in TRAINED)

    def reconcile(self, desired: Sequence[SeedState], global_step: int) -> Reconciliation:
        """Brings the model to `desired`, the whole set, as far as is possible at this step.

        States that cannot be reached are refused one by one, without an exception, and the others apply. The model's
        output is the same afterwards, bit for bit, unless a schedule itself jumps. Repeating the call changes nothing.
        """
        faded = self._blending.faded(global_step)
        leaving = {change.seed.seed_id for change in faded}
        current = [seed for seed in self._seeds.values() if seed.seed_id not in leaving]
        known = {seed.seed_id for seed in current}
        new = [state for state in desired if state.seed_id not in known and state.stage not in ABSENT]
        planned = plan(current, desired, self._facts(new), global_step)
        return self._apply([*faded, *planned.changes], planned.refusals, global_step)

    def advance(self, global_step: int) -> Reconciliation | None:
        """Sets the alphas for the forward passes after `global_step` steps; called after each step.

        Returns:
            The removal of culled seeds that have faded out, else None. Costs nothing when no seed blends; never
            synchronises.
        """
        if not self._blending:
            return None
        self._blending.advance(global_step)
        faded = self._blending.faded(global_step)
        return self._apply(faded, (), global_step) if faded else None

    def contained_failures(self) -> dict[str, str]:
        """Returns and forgets what branches that are divided among ranks have raised in forward passes, by seed."""
        found = {}
        for seed in self._seeds.values():
            graft = self._graft(seed)
            if graft.failure:
                found[seed.seed_id], graft.failure = graft.failure, ""
        return found

    def expel(self, reasons: Mapping[str, str], global_step: int) -> Reconciliation:
        """Removes seeds that have failed for these reasons, at once, and refuses their blueprints in these slots."""
        gone = [self._seeds[seed_id] for seed_id in reasons]
        self._failed |= {(seed.blueprint, seed.slot): f"it failed: {reasons[seed.seed_id]}" for seed in gone}
        refusals = [Refusal(seed_id, f"culled: {reason}") for seed_id, reason in reasons.items()]
        return self._apply([Change(seed, None) for seed in gone], refusals, global_step)

    def states(self, global_step: int) -> list[SeedState]:
        """Returns the state of each seed, oldest first, without gradient norm, learning rate, age and risk."""
        depths = {name: depth for depth, name in enumerate(self._slots)}
        return [
            SeedState(
                seed_id=seed.seed_id,
                stage=seed.stage,
                layer_depth=depths[seed.slot],
                metrics={"alpha": seed.alpha(global_step)},
                blueprint_id=seed.blueprint,
                slot=seed.slot,
                alpha=None if seed.ramp is None else seed.ramp.message(),
                attribution=seed.attribution,
                parameters=[name for name, _ in self._parameters(seed)],
            )
            for seed in self._seeds.values()
        ]

    def training_parameters(self, seed_id: str) -> NamedParameters:
        """Returns the seed's parameters that are trained; none for a seed that is not in the model."""
        seed = self._seeds.get(seed_id)
        return [] if seed is None else [(name, p) for name, p in self._parameters(seed) if p.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        """Returns the structure as JSON values, exactly; the tensors are saved with the model."""
        seeds = [{**asdict(seed), "stage": stage_name(seed.stage)} for seed in self._seeds.values()]
        return {"version": _VERSION, "seed": self._seed, "seeds": seeds}

    def load_state_dict(self, state: Mapping[str, Any], global_step: int) -> Reconciliation:
        """Brings the model to a saved structure, before its tensors are loaded by name.

        Seeds that are not part of it leave at once; missing ones are grafted; the others change stage in either
        direction. On an error the model is unchanged.

        Raises:
            TopologyStateError: the state is malformed, of another version, or has other slots than the model.
            SeedError: a blueprint is unknown or does not fit.
        """
        run_seed, seeds = _parse(state)
        held, before = self._holdings(), dict(self._seeds)
        grafts: dict[str, Graft] = {}
        for seed in seeds:
            if seed.slot not in self._slots:
                raise TopologyStateError(f"the model has no slot {seed.slot!r} for seed {seed.seed_id!r}")
            grafts[seed.seed_id] = self._existing(seed) or self._sharded(self._build(seed, run_seed))
        self._seeds = {seed.seed_id: seed for seed in seeds}
        for name, (_, slot) in self._slots.items():
            slot.arrange({i: graft for i, graft in grafts.items() if self._seeds[i].slot == name})
        self._update_grafts(global_step)
        return self._result(_differences(before, self._seeds), (), held)

    def _facts(self, new: Sequence[SeedState]) -> HostFacts:
        """Returns the facts for a plan that may graft the `new` seeds."""
        names = self._blueprints.names
        pairs = {(state.blueprint_id, slot) for state in new for slot in self._slots if state.slot in {"", slot}}
        reasons = {pair: self.agree(self._misfit(*pair) or "") for pair in sorted(pairs) if pair[0] in names}
        misfits = {pair: reason for pair, reason in reasons.items() if reason} | self._failed
        return HostFacts(tuple(self._slots), names, misfits, self._cull_steps, self._limits)

    def _apply(self, changes: Sequence[Change], refusals: Sequence[Refusal], global_step: int) -> Reconciliation:
        if not changes:
            self._update_grafts(global_step)
            return Reconciliation((), tuple(refusals), {}, {}, {})
        held = self._holdings()
        done: list[Change] = []
        failures: list[Refusal] = []
        for change in changes:
            try:
                self._apply_one(change)
            except SeedError as error:  # a blueprint that passed its check and then failed
                failures.append(Refusal(change.seed.seed_id, str(error)))
            else:
                done.append(change)
        self._update_grafts(global_step)
        return self._result(tuple(done), (*refusals, *failures), held)

    def _apply_one(self, change: Change) -> None:
        seed_id, (_, slot) = change.seed.seed_id, self._slots[change.seed.slot]
        if change.after is None:
            del self._seeds[seed_id], slot.seeds[seed_id]
            return
        if change.before is None:
            slot.seeds[seed_id] = self._new_graft(change.after)
        self._seeds[seed_id] = change.after

    def _new_graft(self, seed: GraftedSeed) -> Graft:
        """Returns a graft that works on what its slot receives, on every rank. Raises SeedError."""
        problem: SeedError | None = None
        try:
            graft = self._build(seed, self._seed)
            seen = self._slots[seed.slot][1].seen
            graft.set_trainable(trainable=True)
            failure = graft.failure_on(seen) if seen is not None else None
            graft.set_trainable(trainable=False)
            if failure is not None:
                raise BlueprintMisfitError(seed.blueprint, seed.slot, failure)
        except SeedError as error:
            problem = error
        elsewhere = self.agree("" if problem is None else str(problem))
        if problem is not None:
            raise problem
        if elsewhere:
            raise BlueprintMisfitError(seed.blueprint, seed.slot, f"on another rank: {elsewhere}")
        return self._sharded(graft)

    def _update_grafts(self, global_step: int) -> None:
        """Sets every graft to its record."""
        grafted = [(seed, self._graft(seed)) for seed in self._seeds.values()]
        for seed, graft in grafted:
            trainable = seed.stage in TRAINED
            if graft.trainable != trainable:
                graft.set_trainable(trainable=trainable)
        self._blending.reset(grafted, global_step)

    def _build(self, seed: GraftedSeed, run_seed: int) -> Graft:
        _, slot = self._slots[seed.slot]
        if misfit := self._misfit(seed.blueprint, seed.slot):
            raise SeedError(misfit)
        branch = self._blueprints.build(seed.blueprint, slot.spec, _init_seed(run_seed, seed.seed_id))
        held = {id(parameter) for parameter in self._model.parameters()}
        if any(id(parameter) in held for parameter in branch.parameters()):
            raise OwnershipError(f"blueprint {seed.blueprint!r} returned parameters that are in the model already")
        like = slot.seen or next((p for p in self._model.parameters() if p.is_floating_point()), torch.empty(0))
        graft = Graft(seed.seed_id, branch.to(like.device, like.dtype), slot.spec, isolated=self._isolated)
        graft.contains = self._shard is not None
        return graft.train(slot.training)

    def _sharded(self, graft: Graft) -> Graft:
        if self._shard is not None:
            self._shard(graft.branch)
        return graft

    def _misfit(self, blueprint: str, slot: str) -> str | None:
        """Returns why a blueprint does not fit a slot; checked once for each pair, since the answer never changes."""
        key = (blueprint, slot)
        if key not in self._misfits:
            try:
                self._blueprints.check(blueprint, self._slots[slot][1].spec)
                self._misfits[key] = None
            except SeedError as error:
                self._misfits[key] = str(error)
        return self._misfits[key]

    def failures(self, error: BaseException) -> dict[str, str]:
        """Returns what is wrong with the seeds that made a pass raise `error`, by seed; empty if it was none of them.

        These are the seed in whose forward pass it was raised, else those whose branch fails by itself on what its slot
        receives, else, where memory has run out, the newest one in training.
        """
        detail = f"{type(error).__name__}: {first_line(error)}"
        if (seed_id := seed_that_raised(error)) in self._seeds and seed_id is not None:
            return {seed_id: detail}
        slots = {seed_id: self._slots[seed.slot][1].seen for seed_id, seed in self._seeds.items()}
        found = {i: self._graft(self._seeds[i]).failure_on(seen) for i, seen in slots.items() if seen is not None}
        failed = {seed_id: failure for seed_id, failure in found.items() if failure is not None}
        if not failed and isinstance(error, torch.OutOfMemoryError) and self.training_seeds:
            return {self.training_seeds[-1]: detail}
        return failed

    def _existing(self, seed: GraftedSeed) -> Graft | None:
        """Returns the seed's graft that is already in the model, whatever its stage."""
        here = self._seeds.get(seed.seed_id)
        if here is None or (here.slot, here.blueprint) != (seed.slot, seed.blueprint):
            return None
        return self._graft(here)

    def _graft(self, seed: GraftedSeed) -> Graft:
        return self._slots[seed.slot][1].grafts()[seed.seed_id]

    def _parameters(self, seed: GraftedSeed) -> NamedParameters:
        path, _ = self._slots[seed.slot]
        return list(self._graft(seed).named_parameters(prefix=seed_prefix(path, seed.seed_id)))

    def _holdings(self) -> list[_Held]:
        return [
            _Held(seed_id, name, parameter, parameter.requires_grad)
            for seed_id, seed in self._seeds.items()
            for name, parameter in self._parameters(seed)
        ]

    def _result(
        self, changes: tuple[Change, ...], refusals: tuple[Refusal, ...], before: Sequence[_Held]
    ) -> Reconciliation:
        """Compares the parameters with those before, by identity and not by name."""
        after = self._holdings()
        was_trained = {id(h.parameter) for h in before if h.trained}
        present = {id(h.parameter) for h in after}
        return Reconciliation(
            changes,
            refusals,
            added=_by_seed(h for h in after if h.trained and id(h.parameter) not in was_trained),
            frozen=_by_seed(h for h in after if not h.trained and id(h.parameter) in was_trained),
            removed=_by_seed(h for h in before if id(h.parameter) not in present),
        )


def _init_seed(run_seed: int, seed_id: str) -> int:
    """Returns 63 bits from the run's seed and the seed's id, the same in every process."""
    digest = hashlib.blake2b(f"{run_seed}:{seed_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _differences(before: Mapping[str, GraftedSeed], after: Mapping[str, GraftedSeed]) -> tuple[Change, ...]:
    gone = [Change(seed, None) for seed_id, seed in before.items() if seed_id not in after]
    here = [(before.get(seed_id), seed) for seed_id, seed in after.items()]
    return (*gone, *(Change(was, now) for was, now in here if was != now))


def _by_seed(holdings: Iterable[_Held]) -> dict[str, NamedParameters]:
    by_seed: dict[str, NamedParameters] = {}
    for held in holdings:
        by_seed.setdefault(held.seed_id, []).append((held.name, held.parameter))
    return by_seed


def _parse(state: Mapping[str, Any]) -> tuple[int, tuple[GraftedSeed, ...]]:
    """Returns the run's seed and the seeds of a saved structure, in the order in which they were grafted.

    Raises:
        TopologyStateError: the state is malformed or of another version.
    """
    if state.get("version") != _VERSION:
        raise TopologyStateError(f"version {state.get('version')!r}; known is {_VERSION}")
    try:
        seeds = tuple(_parse_seed(fields) for fields in state["seeds"])
        run_seed = int(state["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise TopologyStateError(f"malformed: {type(error).__name__}: {error}") from error
    seed_ids = [seed.seed_id for seed in seeds]
    duplicates = sorted({seed_id for seed_id in seed_ids if seed_ids.count(seed_id) > 1})
    if duplicates:
        raise TopologyStateError(f"seed {duplicates[0]!r} appears twice")
    return run_seed, seeds


def _parse_seed(fields: Mapping[str, Any]) -> GraftedSeed:
    ramps = {key: None if fields[key] is None else Ramp(**fields[key]) for key in ("ramp", "asked")}
    return GraftedSeed(**{**fields, **ramps, "stage": stage_from_name(fields["stage"])})
