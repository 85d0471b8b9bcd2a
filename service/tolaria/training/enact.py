"""Carries out what the peers have settled: Kasmina's seeds, Tamiyo's command. Asks the lane, records the outcome.

Owns which type of command goes where. Must not know how commands were verified, nor when fences come.
"""

from __future__ import annotations

from collections.abc import Callable

from leyline.v1 import enums_pb2 as enums
from leyline.v1.admin_service_pb2 import AdjustLearningRateRequest
from leyline.v1.commands_pb2 import AdaptationCommand
from tolaria.errors import (
    AdjustmentRefusedError,
    CommandRejectedError,
    InvalidFieldError,
    UnknownGroupError,
    WrongStateError,
)
from tolaria.optimization import Adjustment
from tolaria.peers.consultation import Consultation, describe_command
from tolaria.rollback.orders import Ending, RollbackOutcome
from tolaria.training.commands import (
    emergency_asked,
    force_breaker,
    operators_adjustment,
    optimizer_change,
    rollback_asked,
)
from tolaria.training.conduct import Conduct
from tolaria.training.fence_desk import FenceDesk, OnDone
from tolaria.training.fences import ChangeOptimizer, FenceReport, OptimizerChanged, Reconcile
from tolaria.training.growth import SeedsReport
from tolaria.training.guardian import Guardian
from tolaria.training.record import Recorder
from tolaria.training.recovery.rollbacks import RollbackDesk
from tolaria.training.safeguards import PEER_FAILURE, TAMIYO


class Enactor:
    """Enacts consultations. Used on the event loop only.

    Args:
        desk: where the lane is asked.
        recorder: where outcomes go.
        conduct: holds the run; of one that has ended nothing is carried out.
        guardian: breakers to force, emergencies to raise, and the mode in which seeds are left alone.
        rollbacks: where the run goes back.
        max_staleness_steps: an answer about a state that is older changes nothing.
        changed: called after something has taken effect.
    """

    def __init__(
        self,
        desk: FenceDesk,
        recorder: Recorder,
        *,
        conduct: Conduct,
        guardian: Guardian,
        rollbacks: RollbackDesk,
        max_staleness_steps: int,
        changed: Callable[[], None],
    ) -> None:
        self._rollbacks = rollbacks
        self._desk = desk
        self._recorder = recorder
        self._conduct = conduct
        self._max_staleness_steps = max_staleness_steps
        self._guardian, self._safeguards = guardian, guardian.safeguards
        self._changed = changed

    def settle(self, consultation: Consultation) -> None:
        """Take a settled consultation in, at the boundary or whenever it comes, unless it is too old to be meant."""
        age_steps = self._recorder.progress.global_step - consultation.state.global_step
        stale = age_steps > self._max_staleness_steps
        self._recorder.consultation(consultation, stale=stale)
        if consultation.failed:
            self._safeguards.failing(PEER_FAILURE)
        if not stale and not self._conduct.ended:
            self._enact(consultation)
        self._changed()

    async def adjust(self, request: AdjustLearningRateRequest) -> int:
        """Change learning rates at the next fence; returns the global step at which it took effect.

        Raises:
            InvalidFieldError: what makes no sense, is out of bounds or means no group; nothing has changed then.
            LaneStoppedError: the run has ended before.
        """
        try:
            adjustment = operators_adjustment(request)
            report = await self._desk.carry_out(
                ChangeOptimizer(adjustment, {}, None),
                key=request.request_id,
                on_done=lambda done: self.adjusted(adjustment, done),
            )
        except AdjustmentRefusedError as error:
            raise InvalidFieldError(error.field, str(error).removeprefix(f"{error.field}: ")) from None
        except UnknownGroupError as error:
            raise InvalidFieldError("group", str(error)) from None
        return report.global_step

    def adjusted(self, adjustment: Adjustment, report: FenceReport) -> None:
        """A change of rates has come back from the lane."""
        if isinstance(report.result, OptimizerChanged):
            self._recorder.adjusted(adjustment, report.result)
        self._changed()

    def _enact(self, consultation: Consultation) -> None:
        """Follow Kasmina's wishes, then carry Tamiyo's command out; one that cannot be is refused and told."""
        if consultation.seeds is not None and not self._safeguards.mode.on:
            self._recorder.desired_seeds(consultation.seeds)
            self._desk.post(Reconcile(tuple(consultation.seeds)), self._reconciled)
        if consultation.command is not None:
            try:
                self._obey(consultation, consultation.command)
            except CommandRejectedError as rejection:
                self._recorder.refused(rejection)

    def _reconciled(self, report: FenceReport) -> None:
        if isinstance(report.result, SeedsReport):
            self._recorder.fence(report.result, wished=True)
            self._safeguards.rebuilt(report.result)
        elif report.error is not None:
            self._recorder.wishes_failed(str(report.error))
        self._changed()

    def _obey(self, consultation: Consultation, command: AdaptationCommand) -> None:
        match command.command_type:
            case enums.COMMAND_SEED if self._safeguards.mode.on:
                raise CommandRejectedError("conservative", command.command_id, "seeds are left alone in this mode")
            case enums.COMMAND_SEED:  # Kasmina has it already, and her wishes follow from it
                if not consultation.applied:
                    raise CommandRejectedError("refused", command.command_id, consultation.kasmina_answer)
                self._recorder.applied(consultation)
            case enums.COMMAND_CIRCUIT_BREAKER:
                force_breaker(command, self._safeguards)
                self._recorder.applied(consultation)
            case enums.COMMAND_EMERGENCY:
                self._guardian.controller.escalate(*emergency_asked(command), origin=TAMIYO)
                self._recorder.applied(consultation)
            case enums.COMMAND_ROLLBACK:
                self._go_back(consultation, command)
            case enums.COMMAND_PAUSE:
                self._conduct.hold(f"asked by {command.issued_by or 'the controller'}")
                self._recorder.applied(consultation)
            case enums.COMMAND_OPTIMIZER:
                asked = optimizer_change(command)
                self._desk.post(asked, self._then_tell(consultation, command, asked))
            case _:
                kind = describe_command(command)
                raise CommandRejectedError("unsupported", command.command_id, f"{kind} commands are not carried out")

    def _go_back(self, consultation: Consultation, command: AdaptationCommand) -> None:
        """Begun here; it has been applied, or was refused, once it is over."""

        def over(outcome: RollbackOutcome) -> None:
            if outcome.ending is Ending.RESTORED:
                self._recorder.applied(consultation)
            else:
                why = str(outcome.error or outcome.ending.value)
                self._recorder.refused(CommandRejectedError("refused", command.command_id, why))

        try:
            self._rollbacks.begin(rollback_asked(command), over)
        except WrongStateError as error:
            raise CommandRejectedError("refused", command.command_id, str(error)) from None

    def _then_tell(self, consultation: Consultation, command: AdaptationCommand, asked: ChangeOptimizer) -> OnDone:
        def done(report: FenceReport) -> None:
            if report.error is not None:
                self._recorder.refused(CommandRejectedError("refused", command.command_id, str(report.error)))
            else:
                self._recorder.applied(consultation)
            if asked.adjustment is not None:
                self.adjusted(asked.adjustment, report)
            self._changed()

        return done
