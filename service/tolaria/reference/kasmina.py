"""The reference Kasmina: keeps the desired seeds of each run and serves them over gRPC."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, replace

import structlog

from leyline.v1 import enums_pb2 as enums
from leyline.v1 import kasmina_service_pb2 as rpc
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.kasmina_service_pb2_grpc import KasminaServiceServicer
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.errors import IllegalMoveError
from tolaria.peers.verification import CONTRACT_VERSION
from tolaria.reference.lifecycle import (
    ACTIVE_STAGES,
    AUTOMATIC,
    LifecycleSettings,
    Observation,
    Seed,
    Stage,
    closed_reason,
    epochs_in_stage,
    gate_between,
    loss_of,
    operation_name,
    stage_name,
    target_of,
)
from tolaria.reference.rollback import Context, Runs, Undo

_NAME_LENGTH_MAX = 128
_BLENDING_STEPS_MAX = 10**9
_REVISIONS_MAX = 256
_RESPONSES_MAX = 1024
_WITHOUT_SLOT = frozenset({enums.SEED_STAGE_DORMANT, enums.SEED_STAGE_RESETTING})
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Revision:
    """The seeds after a change at `step`; `epoch` is the last one for which the gates were evaluated."""

    step: int
    epoch: int
    seeds: tuple[Seed, ...]


_INITIAL = _Revision(step=0, epoch=-1, seeds=())


class DesiredSeeds:
    """The desired seeds of one run, with their history.

    Without history (new, or reverted to before its oldest revision) it adopts the seeds that Tolaria reports, so that
    a restarted Kasmina does not remove the seeds that are grafted.
    """

    def __init__(self, settings: LifecycleSettings) -> None:
        self._settings = settings
        self._revisions: deque[_Revision] = deque(maxlen=_REVISIONS_MAX)
        self._responses: OrderedDict[str, rpc.ApplyCommandResponse] = OrderedDict()
        self._last_number = 0

    def apply(self, command: AdaptationCommand, state: SystemStatePacket) -> rpc.ApplyCommandResponse:
        """Executes a seed command once and returns the outcome without seeds; a repeated command_id gets the same."""
        if command.command_id in self._responses:
            return self._responses[command.command_id]
        self._adopt_if_new(state)
        try:
            response = rpc.ApplyCommandResponse(applied=True, detail=self._execute(command, state))
        except IllegalMoveError as error:
            response = rpc.ApplyCommandResponse(applied=False, detail=str(error))
        if 0 < len(command.command_id) <= _NAME_LENGTH_MAX:
            self._responses[command.command_id] = response
            if len(self._responses) > _RESPONSES_MAX:
                self._responses.popitem(last=False)
        return response

    def observe(self, state: SystemStatePacket) -> None:
        """Advances every seed by at most one stage, as its gate allows. Repeats within an epoch change nothing.

        A state of an earlier step than the last one means that the run was restored: the seeds are reverted too.
        """
        if state.global_step < self._now.step:
            self.revert(state.global_step)
        self._adopt_if_new(state)
        if state.current_epoch <= self._now.epoch:
            return
        reported = {seed.seed_id: seed for seed in state.seed_states}
        seeds = [self._advance(seed, reported.get(seed.seed_id), state) for seed in self._now.seeds]
        self._record(state, seeds, epoch=state.current_epoch)

    def as_messages(self) -> list[SeedState]:
        """Returns the desired seeds, oldest first. Seeds that train share the teacher attribution equally."""
        seeds, epoch = self._now.seeds, self._now.epoch
        training = [seed for seed in seeds if seed.stage in ACTIVE_STAGES and seed.stage != enums.SEED_STAGE_GERMINATED]
        return [
            SeedState(
                seed_id=seed.seed_id,
                stage=seed.stage,
                blueprint_id=seed.blueprint_id,
                slot=seed.slot,
                alpha=seed.alpha,
                attribution=1.0 / len(training) if seed in training else 0.0,
                age_epochs=max(0, epoch - seed.germinated_epoch),
            )
            for seed in seeds
        ]

    def revert(self, target_step: int) -> Undo:
        """Restores the newest revision at or before `target_step`. Seed ids assigned since are not assigned again."""
        before = self._revisions.copy()
        while self._revisions and self._revisions[-1].step > target_step:
            self._revisions.pop()

        def undo() -> None:
            self._revisions = before

        return undo

    @property
    def _now(self) -> _Revision:
        return self._revisions[-1] if self._revisions else _INITIAL

    def _record(self, state: SystemStatePacket, seeds: list[Seed], *, epoch: int) -> None:
        dormant = sorted((s for s in seeds if s.stage == enums.SEED_STAGE_DORMANT), key=lambda seed: seed.entered_epoch)
        forgotten = dormant[: max(0, len(dormant) - self._settings.dormant_max)]
        # A command that was decided on an older state arrives late and must not lower the step.
        step = max(state.global_step, self._now.step)
        if self._revisions and self._revisions[-1].step == step:
            self._revisions.pop()
        self._revisions.append(_Revision(step, epoch, tuple(seed for seed in seeds if seed not in forgotten)))

    def _adopt_if_new(self, state: SystemStatePacket) -> None:
        if self._revisions or not state.seed_states:
            return
        reported = {seed.seed_id: seed for seed in state.seed_states if seed.stage in enums.SeedLifecycleStage.values()}
        adopted = [self._adopt(seed, state) for seed in reported.values() if seed.stage != enums.SEED_STAGE_UNKNOWN]
        # Recorded one epoch earlier, so that this epoch's state still advances them.
        self._record(state, adopted[: self._settings.seeds_max], epoch=state.current_epoch - 1)

    def _adopt(self, reported: SeedState, state: SystemStatePacket) -> Seed:
        return Seed(
            seed_id=reported.seed_id,
            blueprint_id=reported.blueprint_id,
            slot=reported.slot,
            stage=reported.stage,
            blending_steps=self._settings.blending_steps,
            germinated_epoch=max(0, state.current_epoch - reported.age_epochs),
            entered_epoch=state.current_epoch,
            alpha=_reported_alpha(reported, state.global_step, self._settings.blending_steps),
            accuracy_before=_finite(state.validation_accuracy),
        )

    def _execute(self, command: AdaptationCommand, state: SystemStatePacket) -> str:
        _check(command)
        operation = command.seed_operation.operation
        germinate = operation == enums.SEED_OP_GERMINATE
        seed = self._dormant_seed(command) if germinate else self._known_seed(command.target_seed_id)
        target = target_of(operation, seed.stage)
        reported = next((known for known in state.seed_states if known.seed_id == seed.seed_id), None)
        seen = self._observation(seed, reported, state)
        reason = closed_reason(gate_between(seed.stage, target), seed, seen, self._settings)
        if reason:
            raise IllegalMoveError(f"{operation_name(operation)} of {seed.seed_id}: {reason}")
        seeds = {known.seed_id: known for known in self._now.seeds}
        seeds[seed.seed_id] = self._enter(seed, target, state)
        self._record(state, list(seeds.values()), epoch=self._now.epoch)
        return f"{seed.seed_id} is {stage_name(target)}"

    def _known_seed(self, seed_id: str) -> Seed:
        for seed in self._now.seeds:
            if seed.seed_id == seed_id:
                return seed
        raise IllegalMoveError(f"target_seed_id {seed_id!r} names no seed")

    def _dormant_seed(self, command: AdaptationCommand) -> Seed:
        """Returns the seed to germinate: the named one, created if it does not exist; a new one without a name."""
        active = sum(seed.stage in ACTIVE_STAGES for seed in self._now.seeds)
        if active >= self._settings.active_max:
            raise IllegalMoveError(f"{active} seeds are active already, which is the maximum")
        known = {seed.seed_id: seed for seed in self._now.seeds}
        seed_id = command.target_seed_id or self._new_id(known)
        if seed_id not in known and len(known) >= self._settings.seeds_max:
            raise IllegalMoveError(f"there are {len(known)} seeds already, which is the maximum")
        return Seed(
            seed_id=seed_id,
            blueprint_id=command.seed_operation.blueprint_id,
            slot=command.annotations.get("slot", ""),
            stage=known[seed_id].stage if seed_id in known else enums.SEED_STAGE_DORMANT,
            blending_steps=_blending_steps(command, self._settings.blending_steps),
        )

    def _new_id(self, known: dict[str, Seed]) -> str:
        # Numbers are not reused, even after a revert: metrics and journals refer to seeds by them.
        self._last_number += 1
        while f"seed-{self._last_number}" in known:
            self._last_number += 1
        return f"seed-{self._last_number}"

    def _advance(self, seed: Seed, reported: SeedState | None, state: SystemStatePacket) -> Seed:
        losses = (*seed.losses, loss_of(reported, state))[-self._settings.stable_epochs :]
        slot = seed.slot or (reported.slot if reported is not None and seed.stage in ACTIVE_STAGES else "")
        seed = replace(seed, losses=losses, slot=slot)
        target = self._next_stage(seed, self._observation(seed, reported, state))
        return seed if target is None else self._enter(seed, target, state)

    def _next_stage(self, seed: Seed, seen: Observation) -> Stage | None:
        """Returns the stage that follows now; None if the seed stays. One that stays active too long is culled."""
        epochs = epochs_in_stage(seed, seen.state)
        if epochs < 1:
            return None
        expired = seed.stage in ACTIVE_STAGES and epochs >= self._settings.stage_epochs_max
        target = AUTOMATIC.get(seed.stage)
        if seed.stage == enums.SEED_STAGE_PROBATIONARY and expired:
            target = enums.SEED_STAGE_FOSSILIZED  # without a command the gate decides
        if target is not None and not closed_reason(gate_between(seed.stage, target), seed, seen, self._settings):
            return target
        return enums.SEED_STAGE_CULLED if expired else None

    def _enter(self, seed: Seed, target: Stage, state: SystemStatePacket) -> Seed:
        epoch = max(state.current_epoch, self._now.epoch)
        entered = replace(seed, stage=target, entered_epoch=epoch, losses=())
        if target == enums.SEED_STAGE_GERMINATED:
            return replace(entered, germinated_epoch=epoch)
        if target == enums.SEED_STAGE_BLENDING:
            alpha = AlphaSchedule(start=0.0, end=1.0, begin_step=state.global_step, duration_steps=seed.blending_steps)
            return replace(entered, alpha=alpha, accuracy_before=_finite(state.validation_accuracy))
        if target == enums.SEED_STAGE_DORMANT:
            return replace(entered, slot="", alpha=None, accuracy_before=None)
        return entered

    def _observation(self, seed: Seed, reported: SeedState | None, state: SystemStatePacket) -> Observation:
        others = [other for other in self._now.seeds if other.seed_id != seed.seed_id]
        taken = {other.slot for other in others if other.stage not in _WITHOUT_SLOT and other.slot}
        return Observation(state, reported, slot_free=seed.slot not in taken)


class KasminaService(KasminaServiceServicer):
    """Serves the desired seeds of each run. Both responses contain the whole set."""

    def __init__(self, runs: Runs[DesiredSeeds]) -> None:
        self._runs = runs

    async def ApplyCommand(self, request: rpc.ApplyCommandRequest, context: Context) -> rpc.ApplyCommandResponse:
        """Executes a command once. A command that cannot be executed is answered with the reason."""
        seeds = await self._runs.of_state(request.state, context)
        outcome = seeds.apply(request.command, request.state)
        command_id = request.command.command_id[:_NAME_LENGTH_MAX]
        _log.info("command", command_id=command_id, applied=outcome.applied, detail=outcome.detail)
        return rpc.ApplyCommandResponse(seeds=seeds.as_messages(), applied=outcome.applied, detail=outcome.detail)

    async def ExportSeedStates(
        self, request: rpc.ExportSeedStatesRequest, context: Context
    ) -> rpc.ExportSeedStatesResponse:
        """Evaluates the gates once an epoch and returns the desired seeds."""
        seeds = await self._runs.of_state(request.state, context)
        seeds.observe(request.state)
        return rpc.ExportSeedStatesResponse(seeds=seeds.as_messages())


def _check(command: AdaptationCommand) -> None:
    """Raises IllegalMoveError unless this is a seed command of the contract's version."""
    if not command.command_id:
        raise IllegalMoveError("the command has no command_id")
    if command.version != CONTRACT_VERSION:
        raise IllegalMoveError(f"the command has version {command.version}; known is {CONTRACT_VERSION}")
    if command.command_type != enums.COMMAND_SEED or not command.HasField("seed_operation"):
        raise IllegalMoveError("only seed commands with a seed operation are carried out here")
    slot = command.annotations.get("slot", "")
    names = (command.command_id, command.target_seed_id, command.seed_operation.blueprint_id, slot)
    if max(map(len, names)) > _NAME_LENGTH_MAX:
        raise IllegalMoveError(f"a name in the command is longer than {_NAME_LENGTH_MAX} characters")


def _blending_steps(command: AdaptationCommand, default: int) -> int:
    """Returns the command's blending_steps, else `default`; raises IllegalMoveError for any other parameter."""
    parameters = command.seed_operation.parameters
    unknown = sorted(set(parameters) - {"blending_steps"})
    if unknown:
        raise IllegalMoveError(f"parameter {unknown[0][:_NAME_LENGTH_MAX]!r} is unknown; known is blending_steps")
    steps = parameters["blending_steps"] if "blending_steps" in parameters else float(default)
    if not 1 <= steps <= _BLENDING_STEPS_MAX:
        raise IllegalMoveError(f"parameter blending_steps is {steps}, which is not from 1 to {_BLENDING_STEPS_MAX}")
    return int(steps)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _reported_alpha(reported: SeedState, step: int, blending_steps: int) -> AlphaSchedule | None:
    """Returns the reported schedule; for older packets, which carry only a number, the rest of the blending."""
    if reported.HasField("alpha"):
        return AlphaSchedule.FromString(reported.alpha.SerializeToString())
    alpha = reported.metrics.get("alpha", math.nan)
    if not 0.0 <= alpha <= 1.0:
        return None
    return AlphaSchedule(start=alpha, end=1.0, begin_step=step, duration_steps=round(blending_steps * (1.0 - alpha)))
