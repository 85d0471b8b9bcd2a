"""The reference Kasmina: keeps the desired seeds of each run and serves them over gRPC."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count, islice

import structlog

from leyline.v1 import enums_pb2 as enums
from leyline.v1 import kasmina_service_pb2 as rpc
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.kasmina_service_pb2_grpc import KasminaServiceServicer
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.errors import IllegalMoveError
from tolaria.peers.verification import CONTRACT_VERSION
from tolaria.reference import lifecycle
from tolaria.reference.lifecycle import Observation, Seed
from tolaria.reference.rollback import Context, Runs, Undo
from tolaria.values.seeds import GROWING, Stage

BLENDING_STEPS = 200  # from alpha 0 to alpha 1 unless the command sets another number; a few epochs of a small job
STAGE_EPOCHS_MAX = 12  # in one active stage before a seed is culled; twice what a healthy seed needs
ACTIVE_MAX = 4  # active seeds; keeps the rows of the gradient matrix cheap
SEEDS_MAX = 64  # seeds in all, fossilized ones included; bounds each response to a few kilobytes
DORMANT_MAX = 4  # dormant seeds, the oldest are forgotten first; few are ever germinated again
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
    seeds: Mapping[str, Seed]


_INITIAL = _Revision(step=0, epoch=-1, seeds={})


class DesiredSeeds:
    """The desired seeds of one run, with their history.

    Without history (new, or reverted to before its oldest revision) it adopts the seeds that Tolaria reports, so that
    a restarted Kasmina does not remove the seeds that are grafted.
    """

    def __init__(self) -> None:
        self._revisions: deque[_Revision] = deque(maxlen=_REVISIONS_MAX)
        self._responses: OrderedDict[str, rpc.ApplyCommandResponse] = OrderedDict()
        # Ids are not assigned again, even after a revert: metrics and journals refer to seeds by them.
        self._new_ids = (f"seed-{number}" for number in count(1))

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
        seeds = {seed_id: self._advance(seed, state) for seed_id, seed in self._now.seeds.items()}
        self._record(state, seeds, epoch=state.current_epoch)

    def as_messages(self) -> list[SeedState]:
        """Returns the desired seeds, oldest first. Seeds that train share the teacher attribution equally."""
        seeds, epoch = self._now.seeds.values(), self._now.epoch
        training = [seed for seed in seeds if seed.stage in GROWING and seed.stage != enums.SEED_STAGE_GERMINATED]
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

    def _record(self, state: SystemStatePacket, seeds: Mapping[str, Seed], *, epoch: int) -> None:
        dormant = [seed for seed in seeds.values() if seed.stage == enums.SEED_STAGE_DORMANT]
        dormant.sort(key=lambda seed: seed.entered_epoch)
        forgotten = {seed.seed_id for seed in dormant[: max(0, len(dormant) - DORMANT_MAX)]}
        # A command that was decided on an older state arrives late and must not lower the step.
        step = max(state.global_step, self._now.step)
        if self._revisions and self._revisions[-1].step == step:
            self._revisions.pop()
        kept = {seed_id: seed for seed_id, seed in seeds.items() if seed_id not in forgotten}
        self._revisions.append(_Revision(step, epoch, kept))

    def _adopt_if_new(self, state: SystemStatePacket) -> None:
        if self._revisions or not state.seed_states:
            return
        known = set(enums.SeedLifecycleStage.values()) - {enums.SEED_STAGE_UNKNOWN}
        reported = {seed.seed_id: seed for seed in state.seed_states if seed.stage in known}
        adopted = {
            seed_id: Seed(
                seed_id=seed_id,
                blueprint_id=seed.blueprint_id,
                slot=seed.slot,
                stage=seed.stage,
                blending_steps=BLENDING_STEPS,
                germinated_epoch=max(0, state.current_epoch - seed.age_epochs),
                entered_epoch=state.current_epoch,
                alpha=_reported_alpha(seed, state.global_step),
                accuracy_before=state.validation_accuracy,
            )
            for seed_id, seed in islice(reported.items(), SEEDS_MAX)
        }
        # Ids of seeds that have left the model are not known any more: new ones come after the highest that is.
        numbers = [int(seed_id[5:]) for seed_id in reported if seed_id[:5] == "seed-" and seed_id[5:].isdecimal()]
        self._new_ids = (f"seed-{number}" for number in count(max(numbers, default=0) + 1))
        # Recorded one epoch earlier, so that this epoch's state still advances them.
        self._record(state, adopted, epoch=state.current_epoch - 1)

    def _execute(self, command: AdaptationCommand, state: SystemStatePacket) -> str:
        _check(command)
        operation = command.seed_operation.operation
        germinate = operation == enums.SEED_OP_GERMINATE
        seed = self._dormant_seed(command) if germinate else self._now.seeds.get(command.target_seed_id)
        if seed is None:
            raise IllegalMoveError(f"target_seed_id {command.target_seed_id!r} names no seed")
        target = lifecycle.target_of(operation, seed.stage)
        reason = lifecycle.closed_reason(target, seed, self._observation(seed, state))
        if reason:
            raise IllegalMoveError(f"{lifecycle.operation_name(operation)} of {seed.seed_id}: {reason}")
        seeds = {**self._now.seeds, seed.seed_id: self._enter(seed, target, state)}
        self._record(state, seeds, epoch=self._now.epoch)
        return f"{seed.seed_id} is {lifecycle.stage_name(target)}"

    def _dormant_seed(self, command: AdaptationCommand) -> Seed:
        """Returns the seed to germinate: the named one, created if it does not exist; a new one without a name."""
        known = self._now.seeds
        active = sum(seed.stage in GROWING for seed in known.values())
        if active >= ACTIVE_MAX:
            raise IllegalMoveError(f"{active} seeds are active already, which is the maximum")
        seed_id = command.target_seed_id or next(new for new in self._new_ids if new not in known)
        if seed_id not in known and len(known) >= SEEDS_MAX:
            raise IllegalMoveError(f"there are {len(known)} seeds already, which is the maximum")
        return Seed(
            seed_id=seed_id,
            blueprint_id=command.seed_operation.blueprint_id,
            slot=command.annotations.get("slot", ""),
            stage=known[seed_id].stage if seed_id in known else enums.SEED_STAGE_DORMANT,
            blending_steps=_blending_steps(command),
        )

    def _advance(self, seed: Seed, state: SystemStatePacket) -> Seed:
        seen = self._observation(seed, state)
        losses = (*seed.losses, lifecycle.loss_of(seen.reported, state))[-lifecycle.STABLE_EPOCHS :]
        slot = seed.slot or (seen.reported.slot if seen.reported is not None and seed.stage in GROWING else "")
        seed = replace(seed, losses=losses, slot=slot)
        target = self._next_stage(seed, seen)
        return seed if target is None else self._enter(seed, target, state)

    def _next_stage(self, seed: Seed, seen: Observation) -> Stage | None:
        """Returns the stage that follows now; None if the seed stays. One that stays active too long is culled."""
        epochs = lifecycle.epochs_in_stage(seed, seen.state)
        if epochs < 1:
            return None
        expired = seed.stage in GROWING and epochs >= STAGE_EPOCHS_MAX
        target = lifecycle.AUTOMATIC.get(seed.stage)
        if seed.stage == enums.SEED_STAGE_PROBATIONARY and expired:
            target = enums.SEED_STAGE_FOSSILIZED  # without a command the gate decides
        if target is not None and not lifecycle.closed_reason(target, seed, seen):
            return target
        return enums.SEED_STAGE_CULLED if expired else None

    def _enter(self, seed: Seed, target: Stage, state: SystemStatePacket) -> Seed:
        epoch = max(state.current_epoch, self._now.epoch)
        entered = replace(seed, stage=target, entered_epoch=epoch, losses=())
        if target == enums.SEED_STAGE_GERMINATED:
            return replace(entered, germinated_epoch=epoch)
        if target == enums.SEED_STAGE_BLENDING:
            alpha = AlphaSchedule(start=0.0, end=1.0, begin_step=state.global_step, duration_steps=seed.blending_steps)
            return replace(entered, alpha=alpha, accuracy_before=state.validation_accuracy)
        if target == enums.SEED_STAGE_DORMANT:
            return replace(entered, slot="", alpha=None, accuracy_before=math.nan)
        return entered

    def _observation(self, seed: Seed, state: SystemStatePacket) -> Observation:
        reported = next((known for known in state.seed_states if known.seed_id == seed.seed_id), None)
        others = (other for other in self._now.seeds.values() if other.seed_id != seed.seed_id)
        taken = any(other.slot == seed.slot for other in others if other.stage not in _WITHOUT_SLOT)
        return Observation(state, reported, slot_free=not seed.slot or not taken)


class KasminaService(KasminaServiceServicer):
    """Serves the desired seeds of each run. Each response contains the whole set."""

    def __init__(self, runs: Runs[DesiredSeeds]) -> None:
        self._runs = runs

    async def ApplyCommand(self, request: rpc.ApplyCommandRequest, context: Context) -> rpc.ApplyCommandResponse:
        """Executes a command once. The response to a command that cannot be executed has the reason."""
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
        raise IllegalMoveError(f"the command has version {command.version}; only {CONTRACT_VERSION} is supported")
    if command.command_type != enums.COMMAND_SEED or not command.HasField("seed_operation"):
        raise IllegalMoveError("only seed commands with a seed operation are executed here")
    slot = command.annotations.get("slot", "")
    names = (command.command_id, command.target_seed_id, command.seed_operation.blueprint_id, slot)
    if max(map(len, names)) > _NAME_LENGTH_MAX:
        raise IllegalMoveError(f"a name in the command is longer than {_NAME_LENGTH_MAX} characters")


def _blending_steps(command: AdaptationCommand) -> int:
    """Returns the command's blending_steps, else the default; raises IllegalMoveError for any other parameter."""
    parameters = command.seed_operation.parameters
    unknown = sorted(set(parameters) - {"blending_steps"})
    if unknown:
        raise IllegalMoveError(f"parameter {unknown[0][:_NAME_LENGTH_MAX]!r} is unknown; only blending_steps is known")
    steps = parameters["blending_steps"] if "blending_steps" in parameters else float(BLENDING_STEPS)
    if not 1 <= steps <= _BLENDING_STEPS_MAX:
        raise IllegalMoveError(f"parameter blending_steps is {steps}, which is not from 1 to {_BLENDING_STEPS_MAX}")
    return int(steps)


def _reported_alpha(reported: SeedState, step: int) -> AlphaSchedule | None:
    """Returns the reported schedule; for older packets, which carry only a number, the rest of the blending."""
    if reported.HasField("alpha"):
        return AlphaSchedule.FromString(reported.alpha.SerializeToString())
    alpha = reported.metrics.get("alpha", math.nan)
    if not 0.0 <= alpha <= 1.0:
        return None
    return AlphaSchedule(start=alpha, end=1.0, begin_step=step, duration_steps=round(BLENDING_STEPS * (1.0 - alpha)))
