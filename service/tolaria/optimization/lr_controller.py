"""`UnifiedLRController`: the only writer of learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from tolaria.config import ControlSettings, OptimizerSettings
from tolaria.errors import (
    AdjustmentRefusedError,
    ControllerStateError,
    GroupConflictError,
    OptimizationError,
    ScheduleError,
    UnknownGroupError,
)
from tolaria.optimization.adjustments import (
    ADJUSTMENTS_MAX,
    Authority,
    adjusted_rate,
    bounded_rate,
    carried_over,
    folded,
    rate_without_controller,
    without_replaced,
)
from tolaria.optimization.groups import GroupPlan, RateWriter, base_rate_in, name_groups, name_of
from tolaria.optimization.job_schedule import JobSchedule
from tolaria.optimization.optimizer_manager import OptimizerManager
from tolaria.optimization.schedules import Warmup, build_schedule
from tolaria.optimization.weight_decay import WeightDecaySchedule
from tolaria.values.optimization import (
    AUTOMATIC,
    CONTROLLER,
    ActiveAdjustment,
    Adjustment,
    GroupRole,
    LearningRateViolation,
    RebuildOutcome,
    RebuildResult,
    ScheduledRates,
)

_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class RateChange:
    """The rates of the adjusted groups before and after an adjustment, and how the controller's was limited."""

    before: dict[str, float]
    after: dict[str, float]
    limits: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RegisteredGroup:
    """A registered param group: its role, base learning rate, and the global step of its registration."""

    role: GroupRole
    base_lr: float
    registered_at: int


class UnifiedLRController:
    """Sets the learning rates of an optimizer's param groups, by their `name`.

    `before_step` is called before each optimizer step. It does not synchronise with a device, except to read a tensor
    that other code changed.
    """

    def __init__(
        self, manager: OptimizerManager, settings: OptimizerSettings, control: ControlSettings, *, run_steps: int
    ) -> None:
        """Registers the optimizer's groups as host groups with their present `lr` as base.

        The host follows the schedule of `settings` for a run of `run_steps` steps; a seed has `seed_factor` of its
        rate, and a warm-up that counts from the registration of its group. `control` bounds what the controller may
        change.

        Raises:
            UnsuitableOptimizerError: a group has no `lr`, or two have the same name.
            ScheduleError: the schedule does not fit the run, the bounds are reversed, or a group's `lr` is negative,
                NaN or above the ceiling.
        """
        floor, ceiling = settings.lr_floor, settings.lr_ceiling
        if floor > ceiling:
            raise ScheduleError("floor", f"must be at most the ceiling, is {floor} of {ceiling}")
        self._settings = settings
        self._authority = Authority(control.lr_factor_min, control.lr_factor_max)
        name_groups(manager.optimizer)
        self._schedule = build_schedule(settings, run_steps)
        self._seed_warmup = Warmup(settings.seed_warmup_steps, settings.seed_warmup_floor)
        self._job_schedule: JobSchedule | None = None
        self.weight_decay = WeightDecaySchedule(manager.optimizer, settings, run_steps)
        self._manager = manager
        self._groups: dict[str, RegisteredGroup] = {}
        self._adjustments: list[ActiveAdjustment] = []
        self._writer = RateWriter()
        for group in manager.optimizer.param_groups:
            self.register_group(name_of(group), GroupRole.HOST, at_step=0, base_lr=base_rate_in(group))

    @property
    def groups(self) -> Mapping[str, RegisteredGroup]:
        """The registered groups by name, oldest first."""
        return self._groups

    @property
    def adjustments(self) -> tuple[ActiveAdjustment, ...]:
        """The active adjustments, oldest first."""
        return tuple(self._adjustments)

    def follow(self, schedule: JobSchedule) -> None:
        """Takes the host's rates from the job's schedule from the next `apply` on; a seed has a share of the first one.

        Warm-up and bounds of the settings, and all adjustments, apply on top of it.

        Raises:
            ScheduleError: the settings have a policy, too.
        """
        if self._settings.policy != "constant":
            detail = f"is {self._settings.policy}, but the job schedules its learning rates itself, by lr_scheduler()"
            raise ScheduleError("policy", detail)
        self._job_schedule = schedule

    @property
    def job_schedule(self) -> JobSchedule | None:
        """The schedule of the job; None if the settings schedule."""
        return self._job_schedule

    def after_step(self) -> None:
        """Has the job's schedule follow an optimizer update. Raises BrokenJobError if the schedule does."""
        if self._job_schedule is not None:
            self._job_schedule.step_taken()

    def epoch_over(self, figures: Mapping[str, float], global_step: int) -> ScheduledRates | None:
        """Has the job's schedule follow the end of an epoch; returns what it has changed, None for nothing.

        Raises BrokenJobError if the schedule does.
        """
        if (schedule := self._job_schedule) is None:
            return None
        before = self._scheduled_rates(global_step)
        schedule.epoch_over(figures)
        after = self._scheduled_rates(global_step)
        changed = [name for name, rate in after.items() if rate != before[name]]
        if not changed:
            return None
        self.apply(global_step)
        cause = f"{schedule.monitor} {figures[schedule.monitor]:g}" if schedule.monitor else "the epoch is over"
        return ScheduledRates(
            schedule.description, cause, {n: before[n] for n in changed}, {n: after[n] for n in changed}
        )

    def register_group(self, name: str, role: GroupRole, *, at_step: int, base_lr: float | None = None) -> None:
        """Registers a param group, before or after it is added to the optimizer.

        Args:
            name: its `name` in the optimizer.
            role: HOST follows the schedule, SEED a fraction of it with a warm-up, FROZEN has rate 0. A rate of 0 does
                not stop every optimizer (Rprop has other steps), so frozen parameters must get no gradient.
            at_step: global step from which the warm-up of a seed counts.
            base_lr: the rate that the schedule's factor multiplies. None: that of the first host group, times
                `seed_factor` for a seed.

        Raises:
            GroupConflictError: the name is registered already, or there is no host group to take a base from.
            ScheduleError: `base_lr` is negative, NaN or above the ceiling.
        """
        if name in self._groups:
            raise GroupConflictError(f"param group {name!r} is registered already")
        base, ceiling = self._default_base(name, role) if base_lr is None else base_lr, self._settings.lr_ceiling
        if not 0.0 <= base <= ceiling:
            raise ScheduleError("lr", f"of group {name!r} must be between 0 and {ceiling}, is {base}")
        self._groups[name] = RegisteredGroup(role, base, at_step)

    def unregister_group(self, name: str) -> None:
        """Removes a group that has left the optimizer.

        Raises:
            UnknownGroupError: it is not registered.
        """
        self._known(name)
        del self._groups[name]
        self._writer.forget(name)

    def set_role(self, name: str, role: GroupRole) -> None:
        """Changes the role of a group from the next `apply` on; base rate and warm-up stay.

        Raises:
            UnknownGroupError: it is not registered.
        """
        self._groups[name] = replace(self._known(name), role=role)

    def before_step(self, global_step: int) -> list[LearningRateViolation]:
        """Verifies and then applies the rates of the step after `global_step` steps."""
        violations = self.verify()
        self.apply(global_step)
        return violations

    def apply(self, global_step: int) -> None:
        """Writes the rates of this step into the optimizer. Rates that did not change are not written.

        Raises:
            UnknownGroupError: the optimizer has a group that is not registered.
            UnsuitableOptimizerError: it has a group without a name.
        """
        if self._adjustments:
            self._adjustments = self._active_at(global_step)
        if self._job_schedule is not None:
            self._take_options(self._job_schedule)
        self.weight_decay.apply(self._manager.optimizer, global_step)
        for group in self._manager.optimizer.param_groups:
            name = name_of(group)
            self._writer.write(group, self._rate_at(name, self._known(name), global_step, self._adjustments))

    def verify(self) -> list[LearningRateViolation]:
        """Restores rates that differ from those last written, and returns those that differed by more than 1e-6."""
        found = [self._writer.restore(group) for group in self._manager.optimizer.param_groups]
        return [violation for violation in found if violation is not None]

    def adjust(self, adjustment: Adjustment, *, at_step: int) -> RateChange:
        """Adds an adjustment, effective from the next `apply` with a step of at least `at_step`.

        Adjustments compose as in `adjusted_rate`. A value without expiry replaces all older ones of its groups. Many
        lasting factors are folded together. The controller's adjustments are limited to its authority, and an
        automatic cut is limited by the bounds; neither is refused for its size.

        Returns:
            The rates of the groups concerned at `at_step`, before and after.

        Raises:
            UnknownGroupError: no group of that name is registered.
            AdjustmentRefusedError: a rate would be out of bounds, all groups are frozen, or too many temporary
                adjustments are active.
        """
        groups = {name: group for name, group in self._groups.items() if adjustment.applies_to(name)}
        if not groups:
            raise UnknownGroupError(adjustment.group or "all", list(self._groups))
        names = [name for name, group in groups.items() if group.role is not GroupRole.FROZEN]
        if not names:
            raise AdjustmentRefusedError("group", f"{adjustment.group!r} is frozen")
        active, limits = self._active_at(at_step), tuple[str, ...]()
        if adjustment.origin == CONTROLLER:
            adjustment, limits = self._within_authority(adjustment, names, active, at_step)
        changed = self._with(active, adjustment, at_step)
        if adjustment.origin not in {CONTROLLER, AUTOMATIC}:
            self._check_bounds(adjustment, names, changed, at_step)
        self._adjustments = changed
        before, after = (
            {name: self._rate_at(name, groups[name], at_step, adjustments) for name in names}
            for adjustments in (active, changed)
        )
        return RateChange(before, after, limits)

    def carry_over(self, in_force: Sequence[ActiveAdjustment], *, from_step: int, at_step: int) -> None:
        """Adds the adjustments of the run to those of a restored state, as `carried_over` does."""
        self._adjustments = carried_over(self._adjustments, in_force, from_step=from_step, at_step=at_step)

    def learning_rates(self) -> dict[str, float]:
        """Returns the rates last written, by group; empty before the first `apply`."""
        return self._writer.rates

    def state_dict(self) -> dict[str, Any]:
        """Returns groups and active adjustments as JSON values. The schedule is a setting and not included."""
        groups = {name: asdict(group) | {"role": group.role.value} for name, group in self._groups.items()}
        adjustments = [{"at_step": each.at_step, "adjustment": asdict(each.adjustment)} for each in self._adjustments]
        return {"version": _VERSION, "groups": groups, "adjustments": adjustments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads a saved state; the rates are written by the next `apply`.

        Raises:
            ControllerStateError: the state is damaged or of another version; nothing has changed.
        """
        if state.get("version") != _VERSION:
            raise ControllerStateError(f"learning-rate state is of version {state.get('version')!r}, not {_VERSION}")
        try:
            groups = {str(name): self._read_group(entry) for name, entry in state["groups"].items()}
            adjustments = [
                ActiveAdjustment(Adjustment(**entry["adjustment"]), int(entry["at_step"]))
                for entry in state["adjustments"]
            ]
        except (KeyError, TypeError, ValueError, AttributeError, AdjustmentRefusedError) as error:
            raise ControllerStateError(f"learning-rate state is damaged: {type(error).__name__}: {error}") from error
        self._groups, self._adjustments = groups, adjustments
        for name in [name for name in self._writer.rates if name not in groups]:
            self._writer.forget(name)

    def _read_group(self, entry: Mapping[str, Any]) -> RegisteredGroup:
        base_lr, ceiling = float(entry["base_lr"]), self._settings.lr_ceiling
        if not 0.0 <= base_lr <= ceiling:
            raise ValueError(f"base_lr {base_lr} is not between 0 and {ceiling}")
        return RegisteredGroup(GroupRole(entry["role"]), base_lr, int(entry["registered_at"]))

    def _known(self, name: str) -> RegisteredGroup:
        if name not in self._groups:
            raise UnknownGroupError(name, list(self._groups))
        return self._groups[name]

    def _default_base(self, name: str, role: GroupRole) -> float:
        host = next((group for group in self._groups.values() if group.role is GroupRole.HOST), None)
        if host is None:
            raise GroupConflictError(f"param group {name!r} needs a base learning rate, as there is no host group")
        return host.base_lr * (self._settings.seed_factor if role is GroupRole.SEED else 1.0)

    def _active_at(self, step: int) -> list[ActiveAdjustment]:
        return [each for each in self._adjustments if not each.expired_at(step)]

    def _with(self, active: Sequence[ActiveAdjustment], new: Adjustment, at_step: int) -> list[ActiveAdjustment]:
        """Returns the active adjustments with `new`, which folds lasting factors when there are many."""
        changed = [*without_replaced(active, new), ActiveAdjustment(new, at_step)]
        if len(changed) > ADJUSTMENTS_MAX:
            changed = folded([each for each in changed if any(map(each.adjustment.applies_to, self._groups))])
        if len(changed) > ADJUSTMENTS_MAX and new.expires_after_steps is not None and new.origin != AUTOMATIC:
            detail = f"{len(changed) - 1} adjustments are active already; a value without expiry replaces them"
            raise AdjustmentRefusedError("expires_after_steps", detail)
        return changed

    def _within_authority(
        self, asked: Adjustment, names: Sequence[str], active: Sequence[ActiveAdjustment], at_step: int
    ) -> tuple[Adjustment, tuple[str, ...]]:
        """Returns the controller's adjustment as far as its authority goes, and a sentence for each limit.

        A factor is limited itself, so that what is beyond a bound does not add up. A value stays, as its limit depends
        on the group and on the schedule.
        """
        granted, lowest, highest = self._authority, self._authority.lowest, self._authority.highest
        rates = {name: self._rate_at(name, self._groups[name], at_step, active) for name in names}
        scheduled = {name: self._scheduled(name, self._groups[name], at_step) for name in names}
        own = {name: rate_without_controller(active, name, scheduled[name], at_step) for name in names}
        if asked.factor is None:
            new = [*without_replaced(active, asked), ActiveAdjustment(asked, at_step)]
            reached = {name: self._rate_at(name, self._groups[name], at_step, new) for name in names}
            return asked, tuple(
                f"{name}: {asked.value:g} is limited to {reached[name]:g}, between {lowest:g} and {highest:g} of "
                f"{own[name]:g}"
                for name in names
                if reached[name] != asked.value
            )
        least = max((own[name] * granted.lowest / rate for name, rate in rates.items() if rate), default=asked.factor)
        most = min((own[name] * granted.highest / rate for name, rate in rates.items() if rate), default=asked.factor)
        factor = min(max(asked.factor, least), most)
        if factor == asked.factor or factor <= 0.0:
            return asked, ()
        sentence = f"factor {asked.factor:g} is limited to {factor:g}, between {lowest:g} and {highest:g} of the rate"
        return replace(asked, factor=factor), (f"{sentence} without the controller",)

    def _rate_at(self, name: str, group: RegisteredGroup, step: int, active: Sequence[ActiveAdjustment]) -> float:
        scheduled = self._scheduled(name, group, step)
        if not active or group.role is GroupRole.FROZEN:
            return scheduled
        lowest = min(self._settings.lr_floor, scheduled)
        rate = bounded_rate(active, name, scheduled, step, self._authority)
        return min(max(rate, lowest), self._settings.lr_ceiling)

    def _scheduled(self, name: str, group: RegisteredGroup, step: int) -> float:
        if group.role is GroupRole.FROZEN:
            return 0.0
        rate = self._before_schedule(name, group, step) * self._schedule.factor_at(step)
        if group.role is GroupRole.SEED:
            rate *= self._seed_warmup.factor_at(max(0, step - group.registered_at))
        return rate

    def _before_schedule(self, name: str, group: RegisteredGroup, step: int) -> float:
        """Returns the rate that the schedule of the settings multiplies: the base, or that of the job's schedule."""
        if self._job_schedule is None:
            return group.base_lr
        if group.role is GroupRole.HOST:
            return self._job_schedule.rate(name, group.base_lr, step)
        hosts = ((name, group) for name, group in self._groups.items() if group.role is GroupRole.HOST)
        if (first := next(hosts, None)) is None:
            return group.base_lr
        return self._job_schedule.rate(first[0], first[1].base_lr, step) * self._settings.seed_factor

    def _scheduled_rates(self, step: int) -> dict[str, float]:
        return {name: self._scheduled(name, group, step) for name, group in self._groups.items()}

    def _take_options(self, schedule: JobSchedule) -> None:
        """Writes the options beside rates that the job's schedule has set, such as the momentum of one cycle."""
        groups = {name_of(group): group for group in self._manager.optimizer.param_groups}
        for name, option, value in schedule.take_options():
            if name in groups:
                groups[name][option] = value

    def _check_bounds(
        self, adjustment: Adjustment, names: Sequence[str], active: Sequence[ActiveAdjustment], at_step: int
    ) -> None:
        field = "value" if adjustment.factor is None else "factor"
        floor, ceiling = self._settings.lr_floor, self._settings.lr_ceiling
        for name in names:
            if adjustment.value is not None:
                rate, lowest = adjustment.value, floor
            else:
                scheduled = self._scheduled(name, self._groups[name], at_step)
                rate, lowest = adjusted_rate(active, name, scheduled, at_step), min(floor, scheduled)
            if not lowest <= rate <= ceiling:
                raise AdjustmentRefusedError(
                    field, f"would set group {name!r} to {rate:g}, outside {lowest:g} to {ceiling:g}"
                )


def regroup(
    manager: OptimizerManager,
    controller: UnifiedLRController,
    groups: Sequence[GroupPlan],
    at_step: int,
    *,
    urgent: bool = False,
) -> RebuildResult:
    """Rebuilds the optimizer over exactly `groups` and changes the registered groups with it, or changes nothing.

    Arguments are those of `OptimizerManager.rebuild`. Groups that are registered already, as after a restore, keep
    their base rate and the start of their warm-up.

    Raises:
        RebuildFailedError, GroupConflictError: nothing has changed.
    """
    before = controller.state_dict()
    try:
        for group in groups:
            if group.name not in controller.groups:
                controller.register_group(group.name, group.role, at_step=at_step)
            elif controller.groups[group.name].role is not group.role:
                controller.set_role(group.name, group.role)
        result = manager.rebuild(groups, at_step, urgent=urgent)
    except OptimizationError:
        controller.load_state_dict(before)
        raise
    if result.outcome is RebuildOutcome.SKIPPED:
        controller.load_state_dict(before)
        return result
    wanted = {group.name for group in groups}
    for name in [name for name in controller.groups if name not in wanted]:
        controller.unregister_group(name)
    controller.apply(at_step)
    return result
