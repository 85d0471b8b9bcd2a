"""What grows in the lane: seeds in the model, their param groups in the optimizer, the rates of all of them, together.

Owns the one order in which the three change at a fence. Must not know why a seed is wished for or a rate changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from pydantic import JsonValue
from torch import nn

from leyline.v1.enums_pb2 import SEED_STAGE_TRAINING
from leyline.v1.seeds_pb2 import SeedState
from tolaria.config import OptimizerSettings, SeedsSettings
from tolaria.errors import OptimizationError
from tolaria.jobs import HOST
from tolaria.optimization import (
    GroupPlan,
    LearningRateSettings,
    OptimizerManager,
    ScheduleSpec,
    UnifiedLRController,
    Warmup,
    build_schedule,
    regroup,
)
from tolaria.seeds import Blueprints, SeedTopology, parameters_by_owner
from tolaria.training.merge import Ground
from tolaria.values.gradients import SeedMetricSet
from tolaria.values.optimization import GroupRole, RebuildOutcome, RebuildResult

SEED_GROUP = "seed:"
_RETRY_STEPS = 100


@dataclass(frozen=True, slots=True)
class SeedsReport:
    """What a fence did about seeds. `changes` and `refusals` are words, by seed; `rebuild` is None where none was due.

    `rebuild_error` says at which stage a rebuild failed and why; the old optimizer is live then, and the next fence
    tries again.
    """

    global_step: int
    states: tuple[SeedState, ...] = ()
    changes: tuple[str, ...] = ()
    refusals: tuple[tuple[str, str], ...] = ()
    rebuild: RebuildResult | None = None
    rebuild_error: str = ""


@dataclass(slots=True)
class Growth:
    """Seeds, optimizer and learning rates of one model. Belongs to the lane."""

    model: nn.Module
    topology: SeedTopology
    manager: OptimizerManager
    controller: UnifiedLRController
    isolates: bool
    _rebuild_due: bool = field(default=False)
    _urgent: bool = field(default=False)
    _retry_at_step: int = field(default=0)

    def reconcile(self, desired: Sequence[SeedState], global_step: int) -> SeedsReport:
        """Bring the model to the desired seeds, and the optimizer to the model."""
        done = self.topology.reconcile(desired, global_step)
        self._note(trains=bool(done.added), gone=bool(done.removed or done.frozen))
        changes = tuple(str(change) for change in done.changes)
        refusals = tuple((refusal.seed_id, refusal.reason) for refusal in done.refusals)
        return self._settled(global_step, changes, refusals)

    def advance(self, global_step: int) -> SeedsReport | None:
        """Set alphas after an update; a report where something has left the model or a rebuild has waited for its time.

        Costs next to nothing when nothing blends.
        """
        left = self.topology.advance(global_step)
        if left is not None:
            self._note(trains=False, gone=True)
            return self._settled(global_step, tuple(str(change) for change in left.changes), ())
        if self._rebuild_due and global_step >= self._retry_at_step:
            report = self._settled(global_step, (), ())
            return None if report.rebuild is not None and report.rebuild.outcome is RebuildOutcome.SKIPPED else report
        return None

    def state_dict(self) -> dict[str, JsonValue]:
        """What is put off, and since when: a run that goes back puts the same off again."""
        return {
            "rebuild_due": self._rebuild_due,
            "urgent": self._urgent,
            "retry_at_step": self._retry_at_step,
            "attempted_at_step": self.manager.attempted_at_step,
        }

    def load_state_dict(self, state: Mapping[str, JsonValue]) -> None:
        """Become what `state_dict` told. Raises KeyError where something is missing; nothing has changed then."""
        due, urgent, retry = state["rebuild_due"], state["urgent"], state["retry_at_step"]
        self.manager.attempted_at_step = cast("int | None", state["attempted_at_step"])
        self._rebuild_due, self._urgent, self._retry_at_step = bool(due), bool(urgent), cast("int", retry)

    def ground(self, global_step: int) -> Ground:
        """What gradients are for from now on."""
        owned = parameters_by_owner(self.model)
        held = {id(parameter) for parameter in self.trained()}
        shared = [(name, parameter) for name, parameter in owned[HOST] if id(parameter) in held]
        own = {
            seed_id: [parameter for _, parameter in self.topology.training_parameters(seed_id)]
            for seed_id in self.topology.training_seeds
        }
        states = [s for s in self.topology.states(global_step) if s.seed_id in own]
        return Ground(shared, {seed_id: parameters for seed_id, parameters in own.items() if parameters}, states)

    def trained(self) -> list[nn.Parameter]:
        """All parameters that the optimizer holds and that gradients go to."""
        return [p for group in self.manager.optimizer.param_groups for p in group["params"] if p.requires_grad]

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """The trained parameters, first those that act on the host's loss, then each isolated seed's alone."""
        isolated = [
            {id(p) for _, p in self.topology.training_parameters(state.seed_id)}
            for state in self.topology.states(0)
            if self.isolates and state.stage == SEED_STAGE_TRAINING
        ]
        apart = set[int]().union(*isolated)
        trained = self.trained()
        alone = [[p for p in trained if id(p) in ids] for ids in isolated]
        return [[p for p in trained if id(p) not in apart], *(group for group in alone if group)]

    def told_states(self, global_step: int, metrics: SeedMetricSet | None) -> tuple[SeedState, ...]:
        """The seeds in the model with what is known of their training: gradient norm of the last step, rate, metrics.

        Waits for the device.
        """
        rates: Mapping[str, float] = self.controller.learning_rates()
        by_id = {} if metrics is None else {seed.seed_id: seed for seed in metrics.seeds}
        states = self.topology.states(global_step)
        for state in states:
            gradients = [p.grad for _, p in self.topology.training_parameters(state.seed_id) if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
            state.gradient_norm = norm if math.isfinite(norm) else 0.0
            state.learning_rate = rates.get(SEED_GROUP + state.seed_id, 0.0)
            if state.seed_id in by_id:
                seed = by_id[state.seed_id]
                state.metrics.update(
                    {"share": seed.share, "conflict_ratio": seed.conflict_ratio, "weight": seed.weight}
                )
        return tuple(states)

    def _note(self, *, trains: bool, gone: bool) -> None:
        self._rebuild_due = self._rebuild_due or trains or gone
        # A seed that germinates anew has parameters of the same names: what left must be gone before it comes.
        self._urgent = self._urgent or gone

    def _settled(
        self, global_step: int, changes: tuple[str, ...], refusals: tuple[tuple[str, str], ...]
    ) -> SeedsReport:
        rebuild, error = None, ""
        if self._rebuild_due:
            try:
                rebuild = regroup(self.manager, self.controller, self._groups(), global_step, urgent=self._urgent)
            except OptimizationError as failure:
                error = str(failure)
                self._retry_at_step = global_step + _RETRY_STEPS  # what has just failed will not work a step later
            self._rebuild_due = rebuild is None or rebuild.outcome is RebuildOutcome.SKIPPED
            self._urgent = self._urgent and self._rebuild_due
        states = tuple(self.topology.states(global_step))
        return SeedsReport(global_step, states, changes, refusals, rebuild, error)

    def _groups(self) -> list[GroupPlan]:
        host = [group for group in self.manager.plan() if not group.name.startswith(SEED_GROUP)]
        seeds = [
            GroupPlan(SEED_GROUP + seed_id, dict(self.topology.training_parameters(seed_id)), GroupRole.SEED)
            for seed_id in self.topology.training_seeds
        ]
        return [*host, *(group for group in seeds if group.parameters)]


def new_growth(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    settings: OptimizerSettings,
    seeds: SeedsSettings,
    run_seed: int,
    run_steps: int,
) -> Growth:
    """Take over a job's model and optimizer.

    Raises:
        OptimizationError: when the optimizer cannot be governed, or the schedule is impossible in a run of that length.
        SeedError: when the model's slots or parameters are not clear.
    """
    topology = SeedTopology(
        model, Blueprints.installed(), seed=run_seed, cull_steps=seeds.cull_steps, isolated=seeds.isolation
    )
    manager = OptimizerManager(
        optimizer, model.named_parameters(), min_interval_steps=settings.rebuild_min_interval_steps
    )
    controller = UnifiedLRController(manager, _rates(settings, run_steps))
    controller.apply(0)
    return Growth(model, topology, manager, controller, isolates=seeds.isolation)


def _rates(settings: OptimizerSettings, run_steps: int) -> LearningRateSettings:
    spec = ScheduleSpec(
        policy=settings.policy,
        period_steps=settings.period_steps or None,
        floor=settings.floor,
        decay=settings.decay,
        after_period=settings.after_period,
        warmup_steps=settings.warmup_steps,
        warmup_floor=settings.warmup_floor,
    )
    return LearningRateSettings(
        schedule=build_schedule(spec, run_steps=run_steps),
        seed_factor=settings.seed_factor,
        seed_warmup=Warmup(settings.seed_warmup_steps, settings.seed_warmup_floor),
        floor=settings.lr_floor,
        ceiling=settings.lr_ceiling,
    )
