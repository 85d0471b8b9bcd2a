"""`UnifiedLRController`: the only writer of learning rates.

Owns what each param group's rate is at each global step. Reads the live optimizer from its holder every time, so a
rebuild cannot leave it behind. Counts and reports nothing: it returns what happened.
Belongs to the compute lane's thread.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tolaria.errors import AdjustmentRefusedError, GroupConflictError, ScheduleError, UnknownGroupError
from tolaria.optimization.adjustments import (
    AdjustmentRecord,
    Retraction,
    composed,
    without_replaced,
)
from tolaria.optimization.groups import OptimizerHolder, name_groups, name_of
from tolaria.optimization.lr_state import GovernedGroup, read_state, write_state
from tolaria.optimization.rate_writer import RateWriter, rate_in
from tolaria.optimization.schedules import Schedule, Warmup
from tolaria.values.optimization import ActiveAdjustment, Adjustment, GroupRole, LearningRateViolation


@dataclass(frozen=True, slots=True)
class LearningRateSettings:
    """How rates are governed.

    Args:
        schedule: of the host, which seeds follow at their share.
        seed_factor: a seed's base learning rate as a share of the host's, in (0, 1].
        seed_warmup: counted from the step at which a seed's group was registered; multiplies with the schedule.
        floor: adjustments do not bring a rate below it; where the schedule itself is lower, not below the schedule.
        ceiling: no rate ever exceeds it.
        adjustments_max: how many may live at once.
        history_max: how many of the last adjustments are remembered.
    """

    schedule: Schedule
    seed_factor: float = 0.1
    seed_warmup: Warmup = field(default_factory=lambda: Warmup(steps=100, floor=0.1))
    floor: float = 1e-8
    ceiling: float = 10.0
    adjustments_max: int = 64
    history_max: int = 256

    def __post_init__(self) -> None:
        if not 0.0 < self.seed_factor <= 1.0:
            raise ScheduleError("seed_factor", f"must be above 0 and at most 1, is {self.seed_factor}")
        if not (0.0 <= self.floor <= self.ceiling and math.isfinite(self.ceiling)):
            raise ScheduleError(
                "floor", f"must be at least 0 and at most the ceiling, is {self.floor} of {self.ceiling}"
            )


class UnifiedLRController:
    """Governs the learning rates of an optimizer's param groups by their `name`.

    Before each update call `before_step`, or `verify` and then `apply`. `apply` and `verify` do not synchronise with a
    device, except that a tensor which somebody else changed is read once.
    """

    def __init__(self, holder: OptimizerHolder, settings: LearningRateSettings) -> None:
        """Name the optimizer's groups where they have no name and register them as host, at their present `lr`.

        Raises:
            UnsuitableOptimizerError: when a group has no `lr`, or two share a name.
            ScheduleError: when a group's `lr` is negative, NaN or above the ceiling.
        """
        name_groups(holder.optimizer)
        self._holder = holder
        self._settings = settings
        self._groups: dict[str, GovernedGroup] = {}
        self._living: list[ActiveAdjustment] = []
        self._history: deque[AdjustmentRecord] = deque(maxlen=settings.history_max)
        self._writer = RateWriter()
        for group in holder.optimizer.param_groups:
            self.register_group(name_of(group), GroupRole.HOST, at_step=0, base_lr=rate_in(group))

    @property
    def groups(self) -> Mapping[str, GovernedGroup]:
        """The registered groups by name, oldest first; not to be written to."""
        return self._groups

    @property
    def living(self) -> tuple[ActiveAdjustment, ...]:
        """Adjustments that hold at present, oldest first."""
        return tuple(self._living)

    @property
    def history(self) -> tuple[AdjustmentRecord, ...]:
        """The last adjustments, oldest first. Not in the saved state: a rollback does not unmake what was asked."""
        return tuple(self._history)

    def register_group(self, name: str, role: GroupRole, *, at_step: int, base_lr: float | None = None) -> None:
        """Take a param group under control, before or after it comes into the optimizer.

        Args:
            name: its `name` in the optimizer.
            role: HOST follows the schedule, SEED its share of it with its own warm-up, FROZEN stays at 0. A zero rate
                alone does not stop every optimizer (Rprop has its own steps): a frozen parameter must get no
                gradient.
            at_step: global step from which a seed's warm-up counts.
            base_lr: what the schedule's factor multiplies. None: the first host group's, times `seed_factor`
                for a seed.

        Raises:
            GroupConflictError: when the name is taken, or there is no host to take a base from.
            ScheduleError: when `base_lr` is negative, NaN or above the ceiling.
        """
        if name in self._groups:
            raise GroupConflictError(f"param group {name!r} is registered already")
        base = self._default_base(name, role) if base_lr is None else base_lr
        if not 0.0 <= base <= self._settings.ceiling:
            raise ScheduleError("lr", f"of group {name!r} must be between 0 and {self._settings.ceiling}, is {base}")
        self._groups[name] = GovernedGroup(role, base, at_step)

    def unregister_group(self, name: str) -> None:
        """Let go of a group that has left the optimizer.

        Raises:
            UnknownGroupError: when it is not registered.
        """
        self._known(name)
        del self._groups[name]
        self._writer.forget(name)

    def set_role(self, name: str, role: GroupRole) -> None:
        """Let a group play another part from the next `apply` on, as when a seed is frozen. Base and warm-up stay.

        Raises:
            UnknownGroupError: when it is not registered.
        """
        self._groups[name] = replace(self._known(name), role=role)

    def before_step(self, global_step: int) -> list[LearningRateViolation]:
        """Verify, then apply: all that an update needs. `global_step` counts the updates done before this one."""
        violations = self.verify()
        self.apply(global_step)
        return violations

    def apply(self, global_step: int) -> None:
        """Write the rates of this step into the live optimizer. A rate that is there already is not written again.

        Raises:
            UnknownGroupError: when the optimizer has a group that nobody registered.
            UnsuitableOptimizerError: when it has one without a name.
        """
        if self._living:
            self._living = [live for live in self._living if not live.expired_at(global_step)]
        for group in self._holder.optimizer.param_groups:
            name = name_of(group)
            self._writer.write(group, self._rate_at(name, self._known(name), global_step, self._living))

    def verify(self) -> list[LearningRateViolation]:
        """Find rates that differ from what was last written by more than 1e-6 of it, and put them back.

        Returns:
            One violation for each such group, mostly none. A group that was never written to has none.
        """
        found = [self._writer.put_back(group) for group in self._holder.optimizer.param_groups]
        return [violation for violation in found if violation is not None]

    def adjust(self, adjustment: Adjustment, *, at_step: int) -> AdjustmentRecord:
        """Take a change of learning rate; it holds from the next `apply` with a step of at least `at_step`.

        Several compose: the newest living value stands in the schedule's place, then the factors that are newer than it
        multiply. A value without expiry also ends all older ones of the same groups.

        Returns:
            The line of the audit trail, with the rates of the groups concerned before and after, at `at_step`.

        Raises:
            UnknownGroupError: when no group of that name is registered.
            AdjustmentRefusedError: when it brings a rate out of bounds, means only frozen groups, or too many live.
        """
        meant = [name for name in self._groups if adjustment.applies_to(name)]
        if not meant:
            raise UnknownGroupError(adjustment.group or "all", list(self._groups))
        meant = [name for name in meant if self._groups[name].role is not GroupRole.FROZEN]
        if not meant:
            raise AdjustmentRefusedError("group", f"{adjustment.group!r} is frozen")
        living = [live for live in self._living if not live.expired_at(at_step)]
        changed = [*without_replaced(living, adjustment), ActiveAdjustment(adjustment, at_step)]
        if len(changed) > self._settings.adjustments_max:
            raise AdjustmentRefusedError(
                "group", f"{len(living)} adjustments live already; take one back, or set a value for good"
            )
        self._demand_bounds(adjustment, meant, changed, at_step)
        record = AdjustmentRecord(
            adjustment, at_step, self._rates_at(meant, at_step, living), self._rates_at(meant, at_step, changed)
        )
        self._living = changed
        self._history.append(record)
        return record

    def retract(self, request_id: str, retraction: Retraction, *, at_step: int) -> AdjustmentRecord:
        """Take back the living adjustment that this request made.

        Raises:
            AdjustmentRefusedError: when none of that request lives.
        """
        taken = next((live for live in self._living if live.adjustment.request_id == request_id), None)
        if taken is None:
            raise AdjustmentRefusedError("request_id", f"no living adjustment is of request {request_id!r}")
        changed = [live for live in self._living if live is not taken]
        names = [name for name in self._groups if taken.adjustment.applies_to(name)]
        before, after = self._rates_at(names, at_step, self._living), self._rates_at(names, at_step, changed)
        record = AdjustmentRecord(taken.adjustment, at_step, before, after, retraction)
        self._living = changed
        self._history.append(record)
        return record

    def learning_rates(self) -> dict[str, float]:
        """The rates last written, by group; empty before the first `apply`."""
        return self._writer.rates

    def rate_at(self, name: str, global_step: int) -> float:
        """What the group's rate is at a step, as things stand.

        Raises:
            UnknownGroupError: when it is not registered.
        """
        return self._rate_at(name, self._known(name), global_step, self._living)

    def state_dict(self) -> dict[str, Any]:
        """Groups and living adjustments as plain data that JSON can hold. The schedule is a setting and not in it."""
        return write_state(self._groups, self._living)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; the optimizer gets its rates with the next `apply`, which a restore calls at once.

        Raises:
            ControllerStateError: when it is not such a state; nothing has changed.
        """
        self._groups, self._living = read_state(state, ceiling=self._settings.ceiling)
        for name in [name for name in self._writer.rates if name not in self._groups]:
            self._writer.forget(name)

    def _known(self, name: str) -> GovernedGroup:
        if name not in self._groups:
            raise UnknownGroupError(name, list(self._groups))
        return self._groups[name]

    def _default_base(self, name: str, role: GroupRole) -> float:
        host = next((group for group in self._groups.values() if group.role is GroupRole.HOST), None)
        if host is None:
            raise GroupConflictError(
                f"param group {name!r} needs a base learning rate: there is no host to take it from"
            )
        return host.base_lr * (self._settings.seed_factor if role is GroupRole.SEED else 1.0)

    def _rates_at(self, names: list[str], step: int, living: list[ActiveAdjustment]) -> dict[str, float]:
        return {name: self._rate_at(name, self._groups[name], step, living) for name in names}

    def _rate_at(self, name: str, group: GovernedGroup, step: int, living: list[ActiveAdjustment]) -> float:
        scheduled = self._scheduled(group, step)
        if not living or group.role is GroupRole.FROZEN:
            return scheduled
        lowest = min(self._settings.floor, scheduled)
        return min(max(composed(living, name, scheduled, step), lowest), self._settings.ceiling)

    def _scheduled(self, group: GovernedGroup, step: int) -> float:
        if group.role is GroupRole.FROZEN:
            return 0.0
        rate = group.base_lr * self._settings.schedule.factor_at(step)
        if group.role is GroupRole.SEED:
            rate *= self._settings.seed_warmup.factor_at(max(0, step - group.registered_at))
        return rate

    def _demand_bounds(
        self, adjustment: Adjustment, meant: list[str], living: list[ActiveAdjustment], at_step: int
    ) -> None:
        wrong = "value" if adjustment.factor is None else "factor"
        for name in meant:
            scheduled = self._scheduled(self._groups[name], at_step)
            asked = adjustment.value if adjustment.value is not None else composed(living, name, scheduled, at_step)
            lowest = self._settings.floor if adjustment.value is not None else min(self._settings.floor, scheduled)
            if not lowest <= asked <= self._settings.ceiling:
                raise AdjustmentRefusedError(
                    wrong, f"would set group {name!r} to {asked:g}, outside {lowest:g} to {self._settings.ceiling:g}"
                )
