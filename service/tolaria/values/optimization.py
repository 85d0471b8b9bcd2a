"""Learning-rate adjustments and violations, param-group roles, and the result of an optimizer rebuild."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from tolaria.errors import AdjustmentRefusedError

OPERATOR: Final = "operator"
CONTROLLER: Final = "tamiyo"
AUTOMATIC: Final = "rollback"
"""Origins of adjustments: a person, the controller, and the cut that follows an automatic rollback."""

OF_THE_RUN: Final = frozenset({OPERATOR, AUTOMATIC})
"""Origins of adjustments that belong to the run and not to its state: a rollback and a crash do not end them."""


RATES_ARE_OWNED: Final = (
    "Tolaria owns the learning rates, and has put them back: return the scheduler, or a function of the step, from a "
    "method lr_scheduler(optimizer) of the job, or give the schedule as optimizer.policy (constant keeps the rate of "
    "build_optimizer; cosine, step) with optimizer.warmup_steps, period_steps, decay, floor"
)
"""What a user can do whose job changes learning rates itself."""


class GroupRole(StrEnum):
    """How a param group's learning rate is set: by the schedule, by a share of it with a warm-up, or to 0."""

    HOST = "host"
    SEED = "seed"
    FROZEN = "frozen"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustment:
    """One change of learning rate, by exactly one of `factor` and `value`.

    Args:
        group: a param group, or a family ("host" includes "host/0" and "host/1"); None: all trained groups.
        factor: multiplies the rate, above 0.
        value: replaces the scheduled rate, at least 0.
        expires_after_steps: number of steps for which it is active, at least 1; None: until replaced.
        origin: the requester: OPERATOR, CONTROLLER or AUTOMATIC.
        request_id: the id of the request.
        reason: for the audit trail.

    Raises:
        AdjustmentRefusedError: a field is invalid; names it.
    """

    group: str | None
    factor: float | None = None
    value: float | None = None
    expires_after_steps: int | None = None
    origin: str
    request_id: str
    reason: str

    def __post_init__(self) -> None:
        if (self.factor is None) == (self.value is None):
            raise AdjustmentRefusedError("factor", "exactly one of factor and value is needed")
        if self.factor is not None and not (math.isfinite(self.factor) and self.factor > 0.0):
            raise AdjustmentRefusedError("factor", f"must be a finite number above 0, is {self.factor}")
        if self.value is not None and not (math.isfinite(self.value) and self.value >= 0.0):
            raise AdjustmentRefusedError("value", f"must be a finite number not below 0, is {self.value}")
        if self.expires_after_steps is not None and self.expires_after_steps < 1:
            raise AdjustmentRefusedError("expires_after_steps", f"must be at least 1, is {self.expires_after_steps}")

    def applies_to(self, group: str) -> bool:
        """Whether the adjustment applies to a param group."""
        return self.group is None or in_family(group, self.group)


@dataclass(frozen=True, slots=True)
class ActiveAdjustment:
    """An adjustment and the global step from which it is active."""

    adjustment: Adjustment
    at_step: int

    def expired_at(self, step: int) -> bool:
        """Whether the adjustment has expired at a global step."""
        lasts = self.adjustment.expires_after_steps
        return lasts is not None and step >= self.at_step + lasts

    @property
    def lasting(self) -> bool:
        """Whether the adjustment has no expiry."""
        return self.adjustment.expires_after_steps is None


@dataclass(frozen=True, slots=True)
class ScheduledRates:
    """What the job's schedule has changed at the end of an epoch: the scheduled rates of groups, before and after.

    `schedule` describes it, `cause` is why: the figure that it was given.
    """

    schedule: str
    cause: str
    before: Mapping[str, float]
    after: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class LearningRateViolation:
    """A learning rate that was written past the controller, and restored; `found` is NaN if it was not a number."""

    group: str
    expected: float
    found: float


class RebuildOutcome(StrEnum):
    """How a rebuild that did not fail ended."""

    REBUILT = "rebuilt"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class RebuildResult:
    """The result of an optimizer rebuild.

    Args:
        outcome: rebuilt, or skipped because the last attempt was too recent.
        at_step: the global step of the step boundary.
        latency_ms: from the call to the swap.
        retry_at_step: the first step at which a skipped rebuild would run; None otherwise.
        kept: parameters whose state was carried over unchanged.
        transformed: parameters whose state was fitted to a new shape, dtype or device.
        fresh: new parameters, without state.
        restarted: known parameters whose state could not be carried over.
        dropped: parameters that the new optimizer does not hold.
    """

    outcome: RebuildOutcome
    at_step: int
    latency_ms: float
    retry_at_step: int | None = None
    kept: tuple[str, ...] = ()
    transformed: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    restarted: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def in_family(group: str, family: str) -> bool:
    """Whether `group` is `family` or one of its numbered members ("host/1" of "host")."""
    return group == family or group.startswith(family + "/")
