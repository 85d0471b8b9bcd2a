"""What a command of the controller, or a request of an operator, asks: of the lane as values, of a breaker at once."""

from __future__ import annotations

from google.protobuf.json_format import MessageToDict

from leyline.v1.admin_service_pb2 import AdjustLearningRateRequest
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import (
    EMERGENCY_LEVEL_UNSPECIFIED,
    ROLLBACK_TIER_FAST,
    ROLLBACK_TIER_FULL,
    ROLLBACK_TIER_UNSPECIFIED,
    EmergencyLevel,
)
from tolaria.errors import CommandRejectedError, OptimizationError
from tolaria.training.fences import ChangeOptimizer
from tolaria.training.recovery.rollbacks import Asked
from tolaria.training.safeguards import Safeguards
from tolaria.values.optimization import Adjustment

# Which breaker a circuit breaker command means.
BREAKER_KEY = "breaker"
# Which level an emergency command means.
LEVEL_KEY = "level"
# How a rollback's payload names tiers.
TIERS = {"auto": ROLLBACK_TIER_UNSPECIFIED, "fast": ROLLBACK_TIER_FAST, "full": ROLLBACK_TIER_FULL}
_LEVEL_PREFIX = "EMERGENCY_LEVEL_"
# Keys of hyperparameters that mean the learning rate; all others go to the optimizer as they are.
RATE_VALUE, RATE_FACTOR, RATE_EXPIRY = "lr", "lr_factor", "lr_expires_after_steps"


def optimizer_change(command: AdaptationCommand) -> ChangeOptimizer:
    """What the lane has to do for a COMMAND_OPTIMIZER.

    Raises:
        CommandRejectedError: when what it asks makes no sense by itself; reason `malformed`.
    """
    asked = dict(command.optimizer_adjustment.hyperparameters)
    group = command.optimizer_adjustment.optimizer_id or None
    expiry = asked.pop(RATE_EXPIRY, None)
    value, factor = asked.pop(RATE_VALUE, None), asked.pop(RATE_FACTOR, None)
    adjustment = None
    if value is not None or factor is not None:
        adjustment = _adjustment(command, group, value=value, factor=factor, expiry=expiry)
    elif expiry is not None or not asked:
        what = f"{RATE_EXPIRY} without a rate" if expiry is not None else "an optimizer command without hyperparameters"
        raise CommandRejectedError("malformed", command.command_id, what)
    return ChangeOptimizer(adjustment, asked, group)


def force_breaker(command: AdaptationCommand, safeguards: Safeguards) -> None:
    """Open or close the breaker that `annotations["breaker"]` names.

    Raises:
        CommandRejectedError: when there is no such breaker or it cannot be put in that state; reason `malformed`.
    """
    name, state = command.annotations.get(BREAKER_KEY, ""), command.circuit_breaker.desired_state
    if name not in safeguards.breakers:
        raise CommandRejectedError("malformed", command.command_id, f"there is no breaker {name!r}")
    try:
        safeguards.force(name, state)
    except ValueError as error:
        raise CommandRejectedError("malformed", command.command_id, str(error)) from None


def emergency_asked(command: AdaptationCommand) -> tuple[EmergencyLevel.ValueType, str]:
    """The level that `annotations["level"]` names, as a word (halt, EMERGENCY_LEVEL_HALT) or a number, and the reason.

    Raises:
        CommandRejectedError: when there is no such level; reason `malformed`.
    """
    asked = command.annotations.get(LEVEL_KEY, "")
    name = asked.upper().removeprefix(_LEVEL_PREFIX)
    for known, level in EmergencyLevel.items():
        if level != EMERGENCY_LEVEL_UNSPECIFIED and name in {known.removeprefix(_LEVEL_PREFIX), str(level)}:
            return level, command.annotations.get("reason", "") or f"asked by {command.issued_by or 'the controller'}"
    raise CommandRejectedError("malformed", command.command_id, f"there is no emergency level {asked!r}")


def rollback_asked(command: AdaptationCommand) -> Asked:
    """The rollback that `rollback_payload` describes: `tier` (auto, fast, full), `target_step`, `reason`; all optional.

    Raises:
        CommandRejectedError: when one of them makes no sense, or there is another key; reason `malformed`.
    """
    payload = MessageToDict(command.rollback_payload)
    unknown = sorted(set(payload) - {"tier", "target_step", "reason"})
    tier, step = payload.get("tier", "auto"), payload.get("target_step")
    problem = ""
    if unknown:
        problem = f"rollback_payload has no {unknown[0]!r}"
    elif tier not in TIERS:
        problem = f"rollback_payload.tier must be one of {', '.join(TIERS)}, got {tier!r}"
    elif step is not None and not (isinstance(step, float) and step.is_integer() and 0 <= step < 2**53):
        problem = f"rollback_payload.target_step must be a whole number from 0, got {step!r}"
    if problem:
        raise CommandRejectedError("malformed", command.command_id, problem)
    reason = str(payload.get("reason", "") or command.annotations.get("reason", "")) or "asked by the controller"
    return Asked(TIERS[tier], None if step is None else int(step), reason, command.issued_by or "tamiyo")


def operators_adjustment(request: AdjustLearningRateRequest) -> Adjustment:
    """The change of learning rate that an operator asks for.

    Raises:
        AdjustmentRefusedError: naming the field that makes no sense by itself.
    """
    return Adjustment(
        group=request.group or None,
        factor=request.factor if request.WhichOneof("change") == "factor" else None,
        value=request.value if request.WhichOneof("change") == "value" else None,
        expires_after_steps=request.expires_after_steps or None,
        origin="operator",
        request_id=request.request_id,
        reason=request.reason,
    )


def _adjustment(
    command: AdaptationCommand,
    group: str | None,
    *,
    value: float | None,
    factor: float | None,
    expiry: float | None,
) -> Adjustment:
    try:
        return Adjustment(
            group=group,
            value=value,
            factor=factor,
            expires_after_steps=None if expiry is None else int(expiry),
            origin="tamiyo",
            request_id=command.command_id,
            reason=command.annotations.get("reason", ""),
        )
    except OptimizationError as error:
        raise CommandRejectedError("malformed", command.command_id, str(error)) from None
