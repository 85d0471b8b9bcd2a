"""All seeds of one run: Kasmina's state machine, without sockets and clocks.

Owns identities, stages, history. What follows what is in `lifecycle`, what opens a gate in `gates`.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, replace

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import (
    SEED_OP_GERMINATE,
    SEED_STAGE_BLENDING,
    SEED_STAGE_CULLED,
    SEED_STAGE_DORMANT,
    SEED_STAGE_FOSSILIZED,
    SEED_STAGE_GERMINATED,
    SEED_STAGE_PROBATIONARY,
    SEED_STAGE_RESETTING,
    SEED_STAGE_UNKNOWN,
    SeedLifecycleStage,
)
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.errors import IllegalMoveError
from tolaria.reference.gates import GateFacts, LifecycleSettings, loss_of, obstacle
from tolaria.reference.lifecycle import (
    LIVING,
    PROGRESS,
    Stage,
    gate_between,
    operation_name,
    stage_word,
    target_of,
)
from tolaria.reference.runs import Undo
from tolaria.reference.seed_commands import NAME_LENGTH_MAX, blending_steps_of, check_command, slot_of

_HISTORY_MAX = 256
_ANSWERS_MAX = 1024
_WITHOUT_SLOT = frozenset({SEED_STAGE_DORMANT, SEED_STAGE_RESETTING})


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether a command was applied, and what it did or why not."""

    applied: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Seed:
    """One seed as the bed keeps it. Epochs are the training's; `losses` are those since its stage began."""

    seed_id: str
    blueprint_id: str
    slot: str
    stage: Stage
    blending_steps: int
    germinated_epoch: int = 0
    entered_epoch: int = 0
    alpha: AlphaSchedule | None = None
    accuracy_before: float | None = None
    losses: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class _Moment:
    """The bed after a change at `step`; `epoch` is the last one whose facts moved seeds."""

    step: int
    epoch: int
    seeds: tuple[Seed, ...]


_NEVER = _Moment(step=0, epoch=-1, seeds=())


class SeedBed:
    """Desired seeds of one run.

    A bed without history (new, or reverted to before what it remembers) takes over the seeds that Tolaria reports, so
    that a restarted Kasmina does not wish away what is grafted already.
    """

    def __init__(self, settings: LifecycleSettings) -> None:
        self._settings = settings
        self._history: deque[_Moment] = deque(maxlen=_HISTORY_MAX)
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._numbered = 0

    def apply(self, command: AdaptationCommand, state: SystemStatePacket) -> Answer:
        """Carry out a seed command once; the same command_id again gets the same answer and changes nothing."""
        if command.command_id in self._answers:
            return self._answers[command.command_id]
        self._take_over_where_new(state)
        try:
            answer = Answer(applied=True, detail=self._carry_out(command, state))
        except IllegalMoveError as error:
            answer = Answer(applied=False, detail=str(error))
        if 0 < len(command.command_id) <= NAME_LENGTH_MAX:
            self._answers[command.command_id] = answer
            if len(self._answers) > _ANSWERS_MAX:
                self._answers.popitem(last=False)
        return answer

    def observe(self, state: SystemStatePacket) -> None:
        """Move every seed on by at most one stage, as its gate allows. Once an epoch; repeats change nothing.

        A state of an earlier step than the last one means that the run was restored without telling: the bed follows.
        """
        if state.global_step < self._now.step:
            self.revert(state.global_step)
        self._take_over_where_new(state)
        if state.current_epoch <= self._now.epoch:
            return
        reported = {seed.seed_id: seed for seed in state.seed_states}
        seeds = [self._advance(seed, reported.get(seed.seed_id), state) for seed in self._now.seeds]
        self._record(state, seeds, epoch=state.current_epoch)

    def desired(self) -> list[SeedState]:
        """The whole desired set, oldest seed first. Teacher attribution is shared equally among those that train."""
        seeds, epoch = self._now.seeds, self._now.epoch
        training = [seed for seed in seeds if seed.stage in LIVING and seed.stage != SEED_STAGE_GERMINATED]
        return [_as_message(seed, epoch, 1.0 / len(training) if seed in training else 0.0) for seed in seeds]

    def revert(self, target_step: int) -> Undo:
        """Go back to the bed as it was at or before `target_step`; identities given since are not given again."""
        before = list(self._history)
        while self._history and self._history[-1].step > target_step:
            self._history.pop()

        def undo() -> None:
            self._history = deque(before, maxlen=_HISTORY_MAX)

        return undo

    @property
    def _now(self) -> _Moment:
        return self._history[-1] if self._history else _NEVER

    def _record(self, state: SystemStatePacket, seeds: list[Seed], *, epoch: int) -> None:
        dormant = sorted((s for s in seeds if s.stage == SEED_STAGE_DORMANT), key=lambda seed: seed.entered_epoch)
        forgotten = dormant[: max(0, len(dormant) - self._settings.dormant_max)]
        # A command that was decided on an older state arrives late; it does not turn the bed's clock back.
        step = max(state.global_step, self._now.step)
        if self._history and self._history[-1].step == step:
            self._history.pop()
        self._history.append(_Moment(step, epoch, tuple(seed for seed in seeds if seed not in forgotten)))

    def _take_over_where_new(self, state: SystemStatePacket) -> None:
        if self._history or not state.seed_states:
            return
        reported = {seed.seed_id: seed for seed in state.seed_states if seed.stage in SeedLifecycleStage.values()}
        adopted = [self._adopt(seed, state) for seed in reported.values() if seed.stage != SEED_STAGE_UNKNOWN]
        # An epoch earlier, so that the facts of this one count.
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
            alpha=_alpha_of(reported, state.global_step, self._settings.blending_steps),
            accuracy_before=_finite(state.validation_accuracy),
        )

    def _carry_out(self, command: AdaptationCommand, state: SystemStatePacket) -> str:
        check_command(command)
        germinate = command.seed_operation.operation == SEED_OP_GERMINATE
        seed = self._dormant_seed(command) if germinate else self._known_seed(command.target_seed_id)
        target = target_of(command.seed_operation.operation, seed.stage)
        reported = next((known for known in state.seed_states if known.seed_id == seed.seed_id), None)
        why_not = obstacle(gate_between(seed.stage, target), self._facts(seed, reported, state), self._settings)
        if why_not:
            raise IllegalMoveError(f"{operation_name(command.seed_operation.operation)} of {seed.seed_id}: {why_not}")
        others = [known for known in self._now.seeds if known.seed_id != seed.seed_id]
        moved = self._enter(seed, target, state)
        places = {known.seed_id: position for position, known in enumerate(self._now.seeds)}
        others.insert(places.get(seed.seed_id, len(others)), moved)
        self._record(state, others, epoch=self._now.epoch)
        return f"{seed.seed_id} is {stage_word(target)}"

    def _known_seed(self, seed_id: str) -> Seed:
        for seed in self._now.seeds:
            if seed.seed_id == seed_id:
                return seed
        raise IllegalMoveError(f"target_seed_id {seed_id!r} names no seed")

    def _dormant_seed(self, command: AdaptationCommand) -> Seed:
        """The seed to germinate: the one named, as it is or made new; without a name, a new one."""
        living = sum(seed.stage in LIVING for seed in self._now.seeds)
        if living >= self._settings.living_max:
            raise IllegalMoveError(f"{living} seeds live already, which is the most")
        known = {seed.seed_id: seed for seed in self._now.seeds}
        seed_id = command.target_seed_id or self._new_id(known)
        if seed_id not in known and len(known) >= self._settings.seeds_max:
            raise IllegalMoveError(f"the bed holds {len(known)} seeds, which is the most")
        return Seed(
            seed_id=seed_id,
            blueprint_id=command.seed_operation.blueprint_id,
            slot=slot_of(command),
            stage=known[seed_id].stage if seed_id in known else SEED_STAGE_DORMANT,
            blending_steps=blending_steps_of(command, self._settings.blending_steps),
        )

    def _new_id(self, known: dict[str, Seed]) -> str:
        # Numbers are never given twice, not even after a revert: metrics and journals name seeds by them.
        self._numbered += 1
        while f"seed-{self._numbered}" in known:
            self._numbered += 1
        return f"seed-{self._numbered}"

    def _advance(self, seed: Seed, reported: SeedState | None, state: SystemStatePacket) -> Seed:
        losses = (*seed.losses, loss_of(reported, state))[-self._settings.stable_epochs :]
        slot = seed.slot or (reported.slot if reported is not None and seed.stage in LIVING else "")
        seed = replace(seed, losses=losses, slot=slot)
        target = self._next_stage(seed, self._facts(seed, reported, state))
        return seed if target is None else self._enter(seed, target, state)

    def _next_stage(self, seed: Seed, facts: GateFacts) -> Stage | None:
        """Where the facts carry a seed; None where it stays. A living seed that stays too long is given up."""
        if facts.epochs_in_stage < 1:
            return None
        at_end = seed.stage in LIVING and facts.epochs_in_stage >= self._settings.patience_epochs
        target = PROGRESS.get(seed.stage)
        if seed.stage == SEED_STAGE_PROBATIONARY and at_end:
            target = SEED_STAGE_FOSSILIZED  # nobody decided, so the gate does
        if target is not None and obstacle(gate_between(seed.stage, target), facts, self._settings) is None:
            return target
        return SEED_STAGE_CULLED if at_end else None

    def _enter(self, seed: Seed, target: Stage, state: SystemStatePacket) -> Seed:
        epoch = max(state.current_epoch, self._now.epoch)
        entered = replace(seed, stage=target, entered_epoch=epoch, losses=())
        if target == SEED_STAGE_GERMINATED:
            return replace(entered, germinated_epoch=epoch)
        if target == SEED_STAGE_BLENDING:
            alpha = AlphaSchedule(start=0.0, end=1.0, begin_step=state.global_step, duration_steps=seed.blending_steps)
            return replace(entered, alpha=alpha, accuracy_before=_finite(state.validation_accuracy))
        if target == SEED_STAGE_DORMANT:
            return replace(entered, slot="", alpha=None, accuracy_before=None)
        return entered

    def _facts(self, seed: Seed, reported: SeedState | None, state: SystemStatePacket) -> GateFacts:
        taken = {
            other.slot
            for other in self._now.seeds
            if other.stage not in _WITHOUT_SLOT and other.slot and other.seed_id != seed.seed_id
        }
        return GateFacts(
            state=state,
            reported=reported,
            blueprint_id=seed.blueprint_id,
            slot_free=seed.slot not in taken,
            epochs_in_stage=max(0, state.current_epoch - seed.entered_epoch),
            losses=seed.losses,
            alpha=seed.alpha,
            accuracy_before=seed.accuracy_before,
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _alpha_of(reported: SeedState, step: int, blending_steps: int) -> AlphaSchedule | None:
    """The reported schedule; of older packets, which carry only a number, the rest of the way from there."""
    if reported.HasField("alpha"):
        return AlphaSchedule.FromString(reported.alpha.SerializeToString())
    alpha = reported.metrics.get("alpha", math.nan)
    if not 0.0 <= alpha <= 1.0:
        return None
    return AlphaSchedule(start=alpha, end=1.0, begin_step=step, duration_steps=round(blending_steps * (1.0 - alpha)))


def _as_message(seed: Seed, epoch: int, attribution: float) -> SeedState:
    return SeedState(
        seed_id=seed.seed_id,
        stage=seed.stage,
        blueprint_id=seed.blueprint_id,
        slot=seed.slot,
        alpha=seed.alpha,
        attribution=attribution,
        age_epochs=max(0, epoch - seed.germinated_epoch),
    )
