"""The seeds of a live model: brought to what Kasmina wishes, blended on from step to step, told, saved and restored.

The only writer of slots. Used by the compute lane alone, at fences. Must not know optimizers, peers or why a seed is
wished for; what has to change is judged in `plan`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from leyline.v1.enums_pb2 import SEED_STAGE_CULLED
from leyline.v1.seeds_pb2 import SeedState
from tolaria.errors import OwnershipError, SeedError, TopologyStateError
from tolaria.seeds.ownership import NamedParameters, ownership
from tolaria.seeds.plan import Change, Ground, Refusal, Standing, plan
from tolaria.seeds.reconciled import Holdings, Reconciled, reconciled
from tolaria.seeds.registry import Blueprints
from tolaria.seeds.slots import Graft, slots_of
from tolaria.seeds.stages import FULL_STRENGTH, LEARNING
from tolaria.seeds.structure import Structure, dump, parse


class SeedTopology:
    """What grows in a model's slots.

    Args:
        model: with its slots, on its device; itself, not what `torch.compile` or a wrapper made of it. Branches take
            the device and dtype of its first floating parameter.
        blueprints: what can grow.
        seed: the run's. A seed's first values are a function of it and of the seed's id alone.
        cull_steps: steps over which a culled seed ramps down, at least 1.
        isolated: whether seeds in TRAINING are kept from moving the host.

    Raises:
        SeedError: `cull_steps` is below 1.
        SlotError: two slots have one name.
        OwnershipError: a parameter of the model belongs to two owners.
    """

    def __init__(
        self, model: nn.Module, blueprints: Blueprints, *, seed: int, cull_steps: int, isolated: bool = True
    ) -> None:
        if cull_steps < 1:
            raise SeedError(
                f"cull_steps must be at least 1, or a culled seed would leave with a jump; got {cull_steps}"
            )
        self._model = model
        self._slots = slots_of(model)
        self._blueprints = blueprints
        self._seed = seed
        self._isolated = isolated
        self._standings: dict[str, Standing] = {}
        self._moving: tuple[tuple[Standing, Graft], ...] = ()
        self._misfits: dict[tuple[str, str], str | None] = {}
        self._ground = Ground(tuple(self._slots), blueprints.names, self._misfit, cull_steps)
        ownership(model)

    @property
    def training_seeds(self) -> tuple[str, ...]:
        """Ids of the seeds that are trained now, oldest first."""
        return tuple(seed_id for seed_id, standing in self._standings.items() if standing.stage in LEARNING)

    def reconcile(self, desired: Sequence[SeedState], global_step: int) -> Reconciled:
        """Bring the model to `desired` (the whole set), as far as that is possible now. For a fence.

        What cannot be done is refused seed by seed, and the rest applies; nothing is raised for a wish. The model's
        output is the same afterwards, bit by bit, unless a schedule itself asks for a jump. Asked twice, the second
        time changes nothing. Grafting allocates; nothing else is expensive.
        """
        faded = self._faded(global_step)
        planned = plan(
            [standing for standing in self._standings.values() if standing.seed_id not in faded],
            desired,
            self._ground,
            global_step,
        )
        changes = (*(Change(self._standings[seed_id], None) for seed_id in faded), *planned.changes)
        return self._enact(changes, planned.refusals, global_step)

    def advance(self, global_step: int) -> Reconciled | None:
        """Set the alphas for the forward passes after `global_step` updates. Once after each update.

        Returns:
            What left the model where culled seeds have ramped down, else None. Costs next to nothing when no seed
            blends; never synchronises.
        """
        if not self._moving:
            return None
        for standing, graft in self._moving:
            graft.alpha = standing.alpha(global_step)
        faded = self._faded(global_step)
        if not faded:
            return None
        return self._enact(tuple(Change(self._standings[seed_id], None) for seed_id in faded), (), global_step)

    def states(self, global_step: int) -> list[SeedState]:
        """What is in the model, oldest first. Gradient norm, learning rate, age and risk are others' to add."""
        places = {name: place for place, name in enumerate(self._slots)}
        return [
            SeedState(
                seed_id=standing.seed_id,
                stage=standing.stage,
                layer_depth=places[standing.slot],
                metrics={"alpha": standing.alpha(global_step)},
                blueprint_id=standing.blueprint,
                slot=standing.slot,
                alpha=None if standing.ramp is None else standing.ramp.message(),
                attribution=standing.attribution,
                parameters=[name for name, _ in self._parameters(standing)],
            )
            for standing in self._standings.values()
        ]

    def training_parameters(self, seed_id: str) -> NamedParameters:
        """Those of the seed's parameters that are trained now; none for a seed that is not in the model."""
        standing = self._standings.get(seed_id)
        return [] if standing is None else [(n, p) for n, p in self._parameters(standing) if p.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        """The structure as JSON values; tensors are the model's to save, under their names."""
        return dump(Structure(self._seed, tuple(self._standings.values())))

    def load_state_dict(self, state: Mapping[str, Any], global_step: int) -> Reconciled:
        """Bring the model to a structure that `state_dict` told, before its tensors are loaded by name.

        Seeds that are not part of it leave at once; missing ones are grafted; the rest change stage in either
        direction. All that can fail is done first, so that an error leaves the model as it was.

        Raises:
            TopologyStateError: no such structure, or its slots are not the model's.
            SeedError: one of its blueprints is unknown or does not fit here.
        """
        structure = parse(state)
        before = self._holdings()
        was = dict(self._standings)
        grafts: dict[str, Graft] = {}
        for standing in structure.standings:
            if standing.slot not in self._slots:
                raise TopologyStateError(f"the model has no slot {standing.slot!r} for seed {standing.seed_id!r}")
            kept = self._same(standing)
            grafts[standing.seed_id] = kept or self._grow(standing, structure.seed)
        self._standings = {standing.seed_id: standing for standing in structure.standings}
        for name, (_, slot) in self._slots.items():
            slot.arrange({i: graft for i, graft in grafts.items() if self._standings[i].slot == name})
        self._tune(global_step)
        return reconciled(_changes(was, self._standings), (), before, self._holdings())

    def _enact(self, changes: Sequence[Change], refusals: Sequence[Refusal], global_step: int) -> Reconciled:
        if not changes:
            self._tune(global_step)
            return Reconciled((), tuple(refusals), {}, {}, {})
        before = self._holdings()
        done: list[Change] = []
        failures: list[Refusal] = []
        for change in changes:
            try:
                self._make(change)
            except SeedError as error:  # a blueprint whose trial went well, and whose building did not
                failures.append(Refusal(change.seed_id, str(error)))
            else:
                done.append(change)
        self._tune(global_step)
        return reconciled(tuple(done), (*refusals, *failures), before, self._holdings())

    def _make(self, change: Change) -> None:
        seed_id = change.seed_id
        if change.after is None:
            gone = self._standings.pop(seed_id)
            del self._slots[gone.slot][1].seeds[seed_id]
            return
        if change.before is None:
            graft = self._grow(change.after, self._seed)
            self._slots[change.after.slot][1].seeds[seed_id] = graft
        self._standings[seed_id] = change.after

    def _tune(self, global_step: int) -> None:
        """Set every graft to its standing."""
        moving: list[tuple[Standing, Graft]] = []
        for standing in self._standings.values():
            graft = self._graft(standing)
            learning = standing.stage in LEARNING
            if graft.learning != learning:
                graft.learn(learning=learning)
            graft.alpha = standing.alpha(global_step)
            if standing.ramp is not None and standing.stage not in FULL_STRENGTH:
                moving.append((standing, graft))
        self._moving = tuple(moving)

    def _faded(self, global_step: int) -> list[str]:
        return [
            standing.seed_id
            for standing, _ in self._moving
            if standing.stage == SEED_STAGE_CULLED and standing.alpha(global_step) == 0.0
        ]

    def _grow(self, standing: Standing, run_seed: int) -> Graft:
        _, slot = self._slots[standing.slot]
        misfit = self._misfit(standing.blueprint, standing.slot)
        if misfit is not None:
            raise SeedError(misfit)
        branch = self._blueprints.grow(standing.blueprint, slot.spec, _init_seed(run_seed, standing.seed_id))
        held = {id(parameter) for parameter in self._model.parameters()}
        if any(id(parameter) in held for parameter in branch.parameters()):
            raise OwnershipError(f"blueprint {standing.blueprint!r} gave out parameters that are another's already")
        like = next((p for p in self._model.parameters() if p.is_floating_point()), torch.empty(0))
        graft = Graft(standing.seed_id, branch.to(like.device, like.dtype), slot.spec, isolated=self._isolated)
        return graft.train(slot.training)

    def _misfit(self, blueprint: str, slot: str) -> str | None:
        """Why a blueprint cannot grow in a slot; tried once for each pair, since the answer never changes."""
        key = (blueprint, slot)
        if key not in self._misfits:
            try:
                self._blueprints.try_out(blueprint, self._slots[slot][1].spec)
                self._misfits[key] = None
            except SeedError as error:
                self._misfits[key] = str(error)
        return self._misfits[key]

    def _same(self, standing: Standing) -> Graft | None:
        """The graft in the model that is this seed, whatever its stage; None where there is none."""
        here = self._standings.get(standing.seed_id)
        if here is None or (here.slot, here.blueprint) != (standing.slot, standing.blueprint):
            return None
        return self._graft(here)

    def _graft(self, standing: Standing) -> Graft:
        return self._slots[standing.slot][1].grafts()[standing.seed_id]

    def _parameters(self, standing: Standing) -> NamedParameters:
        path, _ = self._slots[standing.slot]
        prefix = ".".join(part for part in (path, "seeds", standing.seed_id) if part)
        return list(self._graft(standing).named_parameters(prefix=prefix))

    def _holdings(self) -> Holdings:
        return {
            seed_id: [(name, parameter, parameter.requires_grad) for name, parameter in self._parameters(standing)]
            for seed_id, standing in self._standings.items()
        }


def _init_seed(run_seed: int, seed_id: str) -> int:
    """63 bits out of the run's seed and the seed's id, the same in every process."""
    digest = hashlib.blake2b(f"{run_seed}:{seed_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _changes(before: Mapping[str, Standing], after: Mapping[str, Standing]) -> tuple[Change, ...]:
    gone = [Change(standing, None) for seed_id, standing in before.items() if seed_id not in after]
    here = [(before.get(seed_id), standing) for seed_id, standing in after.items()]
    return (*gone, *(Change(was, now) for was, now in here if was != now))
