"""`SeedTraining`: the seeds in the model, their param groups and their learning rates, which change together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, cast

import torch
from pydantic import JsonValue
from torch import nn

from leyline.v1.enums_pb2 import SEED_STAGE_GERMINATED, SEED_STAGE_TRAINING
from leyline.v1.seeds_pb2 import SeedState
from tolaria.config import Settings
from tolaria.errors import OptimizationError
from tolaria.jobs import HOST
from tolaria.lane.gradient_merge import GradientScope
from tolaria.lane.messages import SeedsChanged
from tolaria.optimization import GroupPlan, OptimizerManager, UnifiedLRController, regroup
from tolaria.optimization.groups import SEED_GROUP, has_scheduler
from tolaria.seeds import Blueprints, SeedTopology, parameters_by_owner
from tolaria.seeds.stages import TRAINED
from tolaria.seeds.topology import Reconciliation
from tolaria.shards import whole_value
from tolaria.values.gradients import SeedMetricSet
from tolaria.values.optimization import GroupRole, RebuildOutcome
from tolaria.values.seeds import limits_of
from tolaria.values.training import eager_name

_RETRY_STEPS: Final = 100
_UNCHANGED: Final = Reconciliation((), (), {}, {}, {})


class SeedTraining:
    """Seeds, optimizer and learning rates of one model, for a run of `run_steps`. `shard`: see `SeedTopology`.

    Part of the training state, so that a postponed rebuild stays postponed after a restore.

    Raises:
        OptimizationError: the optimizer cannot be controlled, or the schedule does not fit a run of that length.
        SeedError: slots or owners of parameters are ambiguous.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        run_steps: int,
        shard: Callable[[nn.Module], object] | None = None,
    ) -> None:
        run_seed, seeds = settings.training.seed, settings.seeds
        self._isolation = seeds.isolation
        self.model = model
        self.topology = SeedTopology(
            model,
            Blueprints.installed(),
            seed=run_seed,
            cull_steps=seeds.cull_steps,
            limits=limits_of(seeds),
            isolated=seeds.isolation,
            shard=shard,
        )
        interval = settings.optimizer.rebuild_min_interval_steps
        named = [(eager_name(name), parameter) for name, parameter in model.named_parameters()]
        self.manager = OptimizerManager(optimizer, named, min_interval_steps=interval)
        self.controller = UnifiedLRController(self.manager, settings.optimizer, settings.control, run_steps=run_steps)
        self.controller.apply(0)
        self._own_options: dict[str, dict[str, Any]] = {}
        if has_scheduler(optimizer):  # which a hook may step
            hooks = optimizer._optimizer_step_post_hooks  # noqa: SLF001 - torch has no public way to change a hook
            hooks.update({key: self.groups_as_built()(hook) for key, hook in hooks.items()})
        self._rebuild_due = self._urgent = False
        self._retry_at_step = 0

    @contextmanager
    def groups_as_built(self) -> Iterator[None]:
        """Within the block, in which the job's code runs, the optimizer has only the groups that the job built.

        A scheduler of the job's own raises when it meets a group, such as a seed's, that it has not been made with, or
        when an option is missing that it has added to a group: a restore to before that drops it, and it comes back.
        """
        groups = self.manager.optimizer.param_groups
        seeds = [group for group in groups if _name(group).startswith(SEED_GROUP)]
        if seeds:
            groups[:] = [group for group in groups if not _name(group).startswith(SEED_GROUP)]
        for group in groups:
            if len(group) < len(own := self._own_options.get(_name(group), group)):
                group.update({key: value for key, value in own.items() if key not in group})
        try:
            yield
        finally:
            for group in groups:
                if len(group) != len(self._own_options.get(_name(group), ())):
                    self._own_options[_name(group)] = dict(group)
            groups.extend(seeds)

    def reconcile(self, desired: Sequence[SeedState], global_step: int) -> SeedsChanged:
        """Brings the model to the desired seeds, and the optimizer to the model."""
        return self._follow(self.topology.reconcile(desired, global_step), global_step)

    def advance(self, global_step: int) -> SeedsChanged | None:
        """Sets alphas after a step. Returns an event if a seed has left the model or a postponed rebuild was made.

        Costs almost nothing while no seed is blending.
        """
        left = self.topology.advance(global_step)
        if left is not None:
            return self._follow(left, global_step)
        if self._rebuild_due and global_step >= self._retry_at_step:
            changed = self._follow(_UNCHANGED, global_step)
            skipped = changed.rebuild is not None and changed.rebuild.outcome is RebuildOutcome.SKIPPED
            return None if skipped else changed
        return None

    def drop_failed(self, reasons: Mapping[str, str], global_step: int) -> SeedsChanged:
        """Removes the seeds that have made a forward or backward pass raise an exception, for these reasons."""
        return self._follow(self.topology.expel(reasons, global_step), global_step)

    def state_dict(self) -> dict[str, JsonValue]:
        """Returns what is postponed, and since which step."""
        return {
            "rebuild_due": self._rebuild_due,
            "urgent": self._urgent,
            "retry_at_step": self._retry_at_step,
            "attempted_at_step": self.manager.attempted_at_step,
        }

    def load_state_dict(self, state: Mapping[str, JsonValue]) -> None:
        """Restores what `state_dict` returned. Raises KeyError if a key is missing; nothing has changed then."""
        due, urgent, retry = state["rebuild_due"], state["urgent"], state["retry_at_step"]
        self.manager.attempted_at_step = cast("int | None", state["attempted_at_step"])
        self._rebuild_due, self._urgent, self._retry_at_step = bool(due), bool(urgent), cast("int", retry)

    def gradient_scope(self, global_step: int) -> GradientScope:
        """Returns the parameters and seeds for which gradients are merged from now on."""
        optimized = {p for group in self.manager.optimizer.param_groups for p in group["params"]}
        seeds = self.topology.training_seeds
        shared = [(name, p) for name, p in parameters_by_owner(self.model)[HOST] if p in optimized]
        own = {seed_id: [p for _, p in self.topology.training_parameters(seed_id)] for seed_id in seeds}
        growing = {SEED_STAGE_GERMINATED, *TRAINED}
        states = [state for state in self.topology.states(global_step) if state.stage in growing]
        return GradientScope(shared, {seed_id: parameters for seed_id, parameters in own.items() if parameters}, states)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Returns all trainable parameters in the optimizer."""
        return [p for group in self.manager.optimizer.param_groups for p in group["params"] if p.requires_grad]

    def isolated_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Returns the trained parameters of each isolated seed, which cannot affect the host's loss."""
        trained = self.trained_parameters()
        found = {
            state.seed_id: {p for _, p in self.topology.training_parameters(state.seed_id)}
            for state in self.topology.states(0)
            if self._isolation and state.stage == SEED_STAGE_TRAINING
        }
        return {seed_id: own for seed_id, group in found.items() if (own := [p for p in trained if p in group])}

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Returns the trained parameters: first those that affect the host's loss, then those of each isolated seed."""
        isolated = list(self.isolated_parameters().values())
        apart = {parameter for group in isolated for parameter in group}
        return [[p for p in self.trained_parameters() if p not in apart], *isolated]

    def reported_states(self, global_step: int, metrics: SeedMetricSet | None) -> tuple[SeedState, ...]:
        """Returns the seeds with the gradient norm of the last step, learning rate and metrics. Synchronises."""
        rates = self.controller.learning_rates()
        by_id = {} if metrics is None else {seed.seed_id: seed for seed in metrics.seeds}
        states = self.topology.states(global_step)
        for state in states:
            gradients = [p.grad for _, p in self.topology.training_parameters(state.seed_id) if p.grad is not None]
            norm = float(whole_value(torch.nn.utils.get_total_norm(gradients))) if gradients else 0.0
            state.gradient_norm = norm if math.isfinite(norm) else 0.0
            state.learning_rate = rates.get(SEED_GROUP + state.seed_id, 0.0)
            if (seed := by_id.get(state.seed_id)) is not None:
                state.metrics.update(share=seed.share, conflict_ratio=seed.conflict_ratio, weight=seed.weight)
        return tuple(states)

    def _follow(self, done: Reconciliation, global_step: int) -> SeedsChanged:
        """Rebuilds the optimizer if a change of the seeds, now or earlier, needs it."""
        gone = bool(done.removed or done.frozen)
        self._rebuild_due = self._rebuild_due or gone or bool(done.added)
        # A seed that germinates again has parameters of the same names: the old ones have to leave the optimizer first.
        self._urgent = self._urgent or gone
        rebuild, error = None, ""
        if self._rebuild_due:
            try:
                rebuild = regroup(self.manager, self.controller, self._groups(), global_step, urgent=self._urgent)
            except OptimizationError as failure:
                error = str(failure)
                self._retry_at_step = global_step + _RETRY_STEPS  # one step later it would fail again
            self._rebuild_due = rebuild is None or rebuild.outcome is RebuildOutcome.SKIPPED
            self._urgent = self._urgent and self._rebuild_due
        changes = tuple(str(change) for change in done.changes)
        refusals = tuple((refusal.seed_id, refusal.reason) for refusal in done.refusals)
        return SeedsChanged(global_step, tuple(self.topology.states(global_step)), changes, refusals, rebuild, error)

    def _groups(self) -> list[GroupPlan]:
        host = [group for group in self.manager.plan() if not group.name.startswith(SEED_GROUP)]
        seeds = [
            GroupPlan(SEED_GROUP + seed_id, dict(self.topology.training_parameters(seed_id)), GroupRole.SEED)
            for seed_id in self.topology.training_seeds
        ]
        return [*host, *(group for group in seeds if group.parameters)]


def _name(group: Mapping[str, Any]) -> str:
    return str(group.get("name"))  # the job's code may have just added one without a name
