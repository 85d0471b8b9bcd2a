"""The reference Tamiyo: applies the policy to each run, signs the commands and serves them over gRPC."""

from __future__ import annotations

import time
import uuid

import anyio
import anyio.to_thread
import structlog

from leyline.v1 import tamiyo_service_pb2 as rpc
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.tamiyo_service_pb2_grpc import TamiyoServiceServicer
from tolaria.peers.consultation import describe_command
from tolaria.peers.verification import CONTRACT_VERSION, sign
from tolaria.reference.history import HistoryFiles, RunHistory
from tolaria.reference.policy import decide_epoch
from tolaria.reference.rollback import Context, Runs, Undo

ISSUER = "tamiyo-reference"
COMMAND_DEADLINE_MS = 30_000
_log = structlog.get_logger(__name__)


class TamiyoRun:
    """The history of one run, and the newest answered packet with its answer, which is repeated for the same packet.

    The history is read from `files`, and saved there before a decision is sent: a restart loses no decision.
    """

    def __init__(self, files: HistoryFiles, run_id: str) -> None:
        self._files = files
        self._run_id = run_id
        self._loaded = False
        self.lock = anyio.Lock()
        """Held while an epoch is decided on."""
        self.history = RunHistory()
        self.packet: tuple[str, int] | None = None
        self.answer: AdaptationCommand | None = None

    async def load(self) -> None:
        """Reads the history of an earlier process, once."""
        if not self._loaded:
            self.history = await anyio.to_thread.run_sync(self._files.load, self._run_id)
            self._loaded = True

    async def remember(self, history: RunHistory) -> None:
        """Replaces the history, and saves it."""
        self.history = history
        await anyio.to_thread.run_sync(self._files.save, self._run_id, history)

    def revert(self, target_step: int) -> Undo:
        """Forgets everything after `target_step`. What is saved is corrected with the next epoch, an earlier one."""
        before = (self.history, self.packet, self.answer)
        self.history, self.packet, self.answer = self.history.rewound(target_step), None, None

        def undo() -> None:
            self.history, self.packet, self.answer = before

        return undo


class TamiyoService(TamiyoServiceServicer):
    """Serves decisions. A response without a command means no change. An empty `secret` leaves commands unsigned."""

    def __init__(self, runs: Runs[TamiyoRun], *, secret: bytes) -> None:
        self._runs, self._secret = runs, secret

    async def EvaluateEpoch(self, request: rpc.EvaluateEpochRequest, context: Context) -> rpc.EvaluateEpochResponse:
        """Decides on an epoch."""
        run = await self._runs.of_state(request.state, context)
        packet = (request.state.packet_id, request.state.global_step)
        async with run.lock:
            await run.load()
            if not request.state.packet_id or packet != run.packet:
                history, decision = decide_epoch(run.history, request.state)
                await run.remember(history)
                run.packet, run.answer = packet, self._issue(decision)
            return rpc.EvaluateEpochResponse(command=run.answer)

    async def EvaluateStep(self, request: rpc.EvaluateStepRequest, context: Context) -> rpc.EvaluateStepResponse:
        """Decides nothing between epochs."""
        await self._runs.of_state(request.state, context)
        return rpc.EvaluateStepResponse()

    def _issue(self, decision: AdaptationCommand | None) -> AdaptationCommand | None:
        if decision is None:
            return None
        command = command_for(decision, command_id=str(uuid.uuid4()), issued_at_ns=time.time_ns())
        if self._secret:
            sign(command, self._secret)
        _log.info(
            "decided",
            command_id=command.command_id,
            decision=describe_command(command),
            reason=command.annotations["reason"],
        )
        return command


def command_for(decision: AdaptationCommand, *, command_id: str, issued_at_ns: int) -> AdaptationCommand:
    """Returns the unsigned command for a decision of the policy. `issued_at_ns` is Unix time."""
    command = AdaptationCommand(
        version=CONTRACT_VERSION,
        command_id=command_id,
        execution_deadline_ms=COMMAND_DEADLINE_MS,
        issued_by=ISSUER,
    )
    command.issued_at.FromNanoseconds(issued_at_ns)
    command.MergeFrom(decision)
    return command
