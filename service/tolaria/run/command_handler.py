"""Carries out the outcome of consultations: the seeds that Kasmina desires and Tamiyo's command."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Final

from google.protobuf.json_format import MessageToDict

from leyline.v1 import enums_pb2 as enums
from leyline.v1.commands_pb2 import AdaptationCommand
from tolaria import emergency
from tolaria.errors import CommandRejectedError, OptimizationError, TolariaError, WrongStateError
from tolaria.lane.messages import ChangeOptimizer, CommandDone, OptimizerChanged, ReconcileSeeds, SeedsChanged
from tolaria.peers.consultation import Consultation, describe_command
from tolaria.rollback.protocol import TAMIYO, TIERS, Ending, Rollback
from tolaria.run.health import Health
from tolaria.run.lane_client import LaneClient
from tolaria.run.observers import RunObserver
from tolaria.run.recovery import Recovery
from tolaria.run.run_state import Lifecycle
from tolaria.run.safety import PEER_FAILURE, Safeguards, Safety
from tolaria.run.status import RunStatus
from tolaria.values.optimization import Adjustment

# Annotations that name the breaker of a circuit breaker command, and the level of an emergency command.
BREAKER_KEY, LEVEL_KEY = "breaker", "level"

# Hyperparameters that set the learning rate; all others are passed to the optimizer unchanged.
RATE_VALUE, RATE_FACTOR, RATE_EXPIRY = "lr", "lr_factor", "lr_expires_after_steps"

_LEVEL_PREFIX: Final = "EMERGENCY_LEVEL_"
_STEP_MAX: Final = 2**53


class CommandHandler:
    """Enacts settled consultations if their state is at most `max_staleness_steps` old. Used on the event loop only.

    A consultation from before a rollback, or during one, is stale whatever its step. A command that the lane carries
    out counts as applied or rejected once the lane has answered.
    """

    def __init__(
        self,
        lane: LaneClient,
        status: RunStatus,
        *,
        lifecycle: Lifecycle,
        safety: Safety,
        recovery: Recovery,
        health: Health,
        observers: RunObserver,
        max_staleness_steps: int,
    ) -> None:
        self._lane = lane
        self._status = status
        self._lifecycle = lifecycle
        self._safety = safety
        self._recovery = recovery
        self._health = health
        self._observers = observers
        self._max_staleness_steps = max_staleness_steps

    def settle(self, consultation: Consultation) -> None:
        """Enacts a consultation, at the boundary or whenever it is settled, unless it is stale."""
        age_steps = self._status.global_step - consultation.state.global_step
        undone = consultation.outdated or self._recovery.running
        stale = undone or not 0 <= age_steps <= self._max_staleness_steps
        self._note_answers(consultation, stale=stale)
        if consultation.failed:
            self._safety.disturbed(PEER_FAILURE, emergency.Trigger.PEER_FAILURE)
        self._safety.check_breakers()
        if not stale and not self._lifecycle.ended:
            self._enact(consultation)
        self._lifecycle.changed()

    def _note_answers(self, consultation: Consultation, *, stale: bool) -> None:
        status, late = self._status, " (too late, dropped)" if stale else ""
        status.tamiyo_answer = consultation.tamiyo_answer + late
        status.kasmina_answer = consultation.kasmina_answer + late
        status.tamiyo_latency_ms = consultation.tamiyo_latency_ms
        status.kasmina_latency_ms = consultation.kasmina_latency_ms
        status.kasmina_export_ms = consultation.kasmina_export_ms
        if consultation.rejection is not None:
            self._count_rejected(consultation.rejection)
        if stale and consultation.command is not None:
            why = "a rollback has undone its state" if consultation.outdated else "training is at another step by now"
            self._count_rejected(CommandRejectedError("late", consultation.command.command_id, why))

    def _enact(self, consultation: Consultation) -> None:
        reconciled: asyncio.Future[CommandDone] | None = None
        if consultation.seeds is not None and not self._safety.safeguards.mode.on:
            self._status.desired = consultation.seeds
            reconciled = self._lane.submit(ReconcileSeeds(tuple(consultation.seeds)))  # applied by the run when done
        if consultation.command is not None:
            try:
                self._execute(consultation, consultation.command, reconciled)
            except CommandRejectedError as rejection:
                self._reject(rejection)

    def _execute(
        self,
        consultation: Consultation,
        command: AdaptationCommand,
        reconciled: asyncio.Future[CommandDone] | None,
    ) -> None:
        match command.command_type:
            case enums.COMMAND_SEED if self._safety.safeguards.mode.on:
                raise CommandRejectedError("conservative", command.command_id, "seeds are left alone in this mode")
            case enums.COMMAND_SEED:  # the desired seeds follow from it
                if not consultation.applied or reconciled is None:
                    raise CommandRejectedError("refused", command.command_id, consultation.kasmina_answer)
                present = {seed.seed_id for seed in self._status.grafted}
                self._await_lane(consultation, reconciled, lambda done: seed_refusal(consultation, present, done))
            case enums.COMMAND_CIRCUIT_BREAKER:
                force_breaker(command, self._safety.safeguards)
                self._safety.check_breakers()
                self._applied(consultation)
            case enums.COMMAND_EMERGENCY:
                self._safety.controller.escalate(*emergency_of(command), origin=TAMIYO)
                self._applied(consultation)
            case enums.COMMAND_ROLLBACK:
                self._roll_back(consultation, command)
            case enums.COMMAND_PAUSE:
                self._lifecycle.hold(f"asked by {command.issued_by or 'the controller'}")
                self._applied(consultation)
            case enums.COMMAND_OPTIMIZER:
                self._change_optimizer(consultation, command)
            case _:
                kind = describe_command(command)
                raise CommandRejectedError("unsupported", command.command_id, f"{kind} commands are not carried out")

    def _roll_back(self, consultation: Consultation, command: AdaptationCommand) -> None:
        """Begins a rollback; the command counts as applied or refused once it is over.

        Beyond the budget of automatic rollbacks it is refused, and opens the controller's breaker.
        """

        def over(rollback: Rollback) -> None:
            if rollback.ending is Ending.RESTORED:
                self._applied(consultation)
            else:
                detail = str(rollback.error or (rollback.ending or Ending.FAILED).value)
                self._reject(CommandRejectedError("refused", command.command_id, detail))

        rollback, step = rollback_of(command), self._status.global_step
        if (refusal := self._health.refusal(step)) is not None:
            self._safety.safeguards.force(TAMIYO, enums.CIRCUIT_STATE_OPEN)
            self._safety.check_breakers()
            raise CommandRejectedError("rollback_budget", command.command_id, refusal.reason)
        rollback.before_step = self._health.older_than(step)
        try:
            self._recovery.begin(rollback, over)
            self._health.begin_rollback(TAMIYO, step)
        except WrongStateError as error:
            raise CommandRejectedError("refused", command.command_id, str(error)) from None

    def _change_optimizer(self, consultation: Consultation, command: AdaptationCommand) -> None:
        def refusal(done: CommandDone) -> str:
            if isinstance(done.result, OptimizerChanged) and done.result.limits:
                self._status.tamiyo_answer = f"{consultation.tamiyo_answer} ({'; '.join(done.result.limits)})"
            return ""

        self._await_lane(consultation, self._lane.submit(optimizer_change(command)), refusal)

    def _await_lane(
        self,
        consultation: Consultation,
        future: asyncio.Future[CommandDone],
        refusal: Callable[[CommandDone], str],
    ) -> None:
        """Counts the command as applied or rejected when the lane has answered; `refusal` returns why, or nothing."""

        def done(future: asyncio.Future[CommandDone]) -> None:
            try:
                answer = future.result()
                if answer.failure is not None:
                    raise answer.failure.error()
                reason = refusal(answer)
            except TolariaError as error:
                reason = str(error)
            if reason and consultation.command is not None:
                self._reject(CommandRejectedError("refused", consultation.command.command_id, reason))
            else:
                self._applied(consultation)
            self._lifecycle.changed()

        future.add_done_callback(done)

    def _applied(self, consultation: Consultation) -> None:
        self._status.commands_accepted += 1
        self._status.last_command = consultation.command
        self._observers.on_command_applied(consultation)

    def _reject(self, rejection: CommandRejectedError) -> None:
        self._status.tamiyo_answer = f"rejected: {rejection.detail}"
        self._count_rejected(rejection)

    def _count_rejected(self, rejection: CommandRejectedError) -> None:
        self._status.commands_rejected += 1
        self._observers.on_command_rejected(rejection)


def seed_refusal(consultation: Consultation, present: AbstractSet[str], done: CommandDone) -> str:
    """Returns why the lane refused the seed that a command is about; empty if it did not.

    A command that names no seed is about those that Kasmina declares and that were not `present` in the model.
    """
    target = consultation.command.target_seed_id if consultation.command is not None else ""
    concerned = {target} if target else {seed.seed_id for seed in consultation.seeds or ()} - present
    refusals = done.result.refusals if isinstance(done.result, SeedsChanged) else ()
    return "; ".join(f"{seed_id}: {reason}" for seed_id, reason in refusals if seed_id in concerned)


def optimizer_change(command: AdaptationCommand) -> ChangeOptimizer:
    """Returns the lane's command for a COMMAND_OPTIMIZER. Raises CommandRejectedError, reason `malformed`."""
    hyperparameters = dict(command.optimizer_adjustment.hyperparameters)
    group = command.optimizer_adjustment.optimizer_id or None
    expiry = hyperparameters.pop(RATE_EXPIRY, None)
    value, factor = hyperparameters.pop(RATE_VALUE, None), hyperparameters.pop(RATE_FACTOR, None)
    adjustment = None
    if value is not None or factor is not None:
        try:
            adjustment = Adjustment(
                group=group,
                value=value,
                factor=factor,
                expires_after_steps=None if expiry is None else int(expiry),
                origin=TAMIYO,
                request_id=command.command_id,
                reason=command.annotations.get("reason", ""),
            )
        except OptimizationError as error:
            raise CommandRejectedError("malformed", command.command_id, str(error)) from None
    elif expiry is not None or not hyperparameters:
        what = f"{RATE_EXPIRY} without a rate" if expiry is not None else "an optimizer command without hyperparameters"
        raise CommandRejectedError("malformed", command.command_id, what)
    return ChangeOptimizer(adjustment, hyperparameters, group)


def force_breaker(command: AdaptationCommand, safeguards: Safeguards) -> None:
    """Opens or closes the breaker that `annotations["breaker"]` names. Raises CommandRejectedError (malformed)."""
    name, state = command.annotations.get(BREAKER_KEY, ""), command.circuit_breaker.desired_state
    if name not in safeguards.breakers:
        raise CommandRejectedError("malformed", command.command_id, f"there is no breaker {name!r}")
    try:
        safeguards.force(name, state)
    except ValueError as error:
        raise CommandRejectedError("malformed", command.command_id, str(error)) from None


def emergency_of(command: AdaptationCommand) -> tuple[enums.EmergencyLevel.ValueType, str]:
    """Returns the level that `annotations["level"]` names (halt, EMERGENCY_LEVEL_HALT or a number), and the reason.

    Raises CommandRejectedError, reason `malformed`, for an unknown level.
    """
    wanted = command.annotations.get(LEVEL_KEY, "")
    name = wanted.upper().removeprefix(_LEVEL_PREFIX)
    for known, level in enums.EmergencyLevel.items():
        if level != enums.EMERGENCY_LEVEL_UNSPECIFIED and name in {known.removeprefix(_LEVEL_PREFIX), str(level)}:
            return level, command.annotations.get("reason", "") or f"asked by {command.issued_by or 'the controller'}"
    raise CommandRejectedError("malformed", command.command_id, f"there is no emergency level {wanted!r}")


def rollback_of(command: AdaptationCommand) -> Rollback:
    """Returns the rollback that `rollback_payload` describes: `tier`, `target_step` and `reason`, all optional.

    Raises CommandRejectedError, reason `malformed`, for an unknown key or an invalid value.
    """
    payload = MessageToDict(command.rollback_payload)
    unknown = sorted(set(payload) - {"tier", "target_step", "reason"})
    tier, step = payload.get("tier", "auto"), payload.get("target_step")
    problem = ""
    if unknown:
        problem = f"rollback_payload has the unknown key {unknown[0]!r}"
    elif tier not in TIERS:
        problem = f"rollback_payload.tier must be one of {', '.join(TIERS)}, got {tier!r}"
    elif step is not None and not (isinstance(step, float) and step.is_integer() and 0 <= step < _STEP_MAX):
        problem = f"rollback_payload.target_step must be a whole number from 0, got {step!r}"
    if problem:
        raise CommandRejectedError("malformed", command.command_id, problem)
    reason = str(payload.get("reason", "") or command.annotations.get("reason", "")) or "asked by the controller"
    return Rollback(
        tier=TIERS[tier],
        target_step=None if step is None else int(step),
        reason=reason,
        origin=TAMIYO,
    )
