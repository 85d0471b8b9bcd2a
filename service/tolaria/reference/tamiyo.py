"""The reference Tamiyo's servicer: asks the policy and signs what it decides. Owns each run's memory, not the rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc.aio
import structlog

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.state_pb2 import SystemStatePacket
from leyline.v1.tamiyo_service_pb2 import (
    EvaluateEpochRequest,
    EvaluateEpochResponse,
    EvaluateStepRequest,
    EvaluateStepResponse,
)
from leyline.v1.tamiyo_service_pb2_grpc import TamiyoServiceServicer
from tolaria.peers.signing import sign
from tolaria.reference.checks import require_state
from tolaria.reference.decisions import Decision, command_for
from tolaria.reference.memory import RunMemory
from tolaria.reference.policy import PolicySettings, decide_epoch, decide_step
from tolaria.reference.runs import Runs, Undo

COMMAND_DEADLINE_MS = 30_000
_log = structlog.get_logger(__name__)


class TamiyoRun:
    """One run's memory, and the newest epoch's answer, so that a call that is made again gets the same command."""

    def __init__(self) -> None:
        self.memory = RunMemory()
        self._asked = ("", -1)
        self._answer: AdaptationCommand | None = None

    def answered(self, state: SystemStatePacket) -> bool:
        """Whether this very packet was the newest one answered."""
        return bool(state.packet_id) and (state.packet_id, state.global_step) == self._asked

    def answer(self) -> AdaptationCommand | None:
        """The newest epoch's command; None where it was decided to do nothing."""
        return self._answer

    def remember(self, state: SystemStatePacket, answer: AdaptationCommand | None) -> None:
        """Keep the answer to the newest epoch's packet."""
        self._asked, self._answer = (state.packet_id, state.global_step), answer

    def revert(self, target_step: int) -> Undo:
        """Forget what came after `target_step`."""
        before = (self.memory, self._asked, self._answer)
        self.memory, self._asked, self._answer = self.memory.rewound(target_step), ("", -1), None

        def undo() -> None:
            self.memory, self._asked, self._answer = before

        return undo


class TamiyoService(TamiyoServiceServicer):
    """Controller. `now_ns` is Unix time; `new_id` makes command ids, each once; an empty `secret` signs nothing."""

    def __init__(
        self,
        runs: Runs[TamiyoRun],
        settings: PolicySettings,
        *,
        secret: bytes,
        now_ns: Callable[[], int],
        new_id: Callable[[], str],
    ) -> None:
        self._runs, self._settings = runs, settings
        self._secret, self._now_ns, self._new_id = secret, now_ns, new_id

    async def EvaluateEpoch(  # noqa: N802 - the contract's name
        self, request: EvaluateEpochRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> EvaluateEpochResponse:
        """Decide on an epoch. No command: go on."""
        await require_state(request, context)
        run = self._runs.of(request.state.training_run_id)
        if not run.answered(request.state):
            run.memory, decision = decide_epoch(run.memory, request.state, self._settings)
            run.remember(request.state, self._command(decision))
        return EvaluateEpochResponse(command=run.answer())

    async def EvaluateStep(  # noqa: N802 - the contract's name
        self, request: EvaluateStepRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> EvaluateStepResponse:
        """Decide between epochs: only divergence counts. No command: go on."""
        await require_state(request, context)
        run = self._runs.of(request.state.training_run_id)
        run.memory, decision = decide_step(run.memory, request.state, self._settings)
        return EvaluateStepResponse(command=self._command(decision))

    def _command(self, decision: Decision | None) -> AdaptationCommand | None:
        if decision is None:
            return None
        command = command_for(
            decision, command_id=self._new_id(), issued_at_ns=self._now_ns(), deadline_ms=COMMAND_DEADLINE_MS
        )
        if self._secret:
            sign(command, self._secret)
        _log.info("decided", command_id=command.command_id, decision=str(decision))
        return command
