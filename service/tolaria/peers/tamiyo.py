"""The controller as Tolaria calls it. Must not know when it is asked or what its commands do."""

from __future__ import annotations

import grpc.aio

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.state_pb2 import SystemStatePacket
from leyline.v1.tamiyo_service_pb2 import EvaluateEpochRequest, EvaluateStepRequest
from leyline.v1.tamiyo_service_pb2_grpc import TamiyoServiceStub
from tolaria.resilience.deadline import DeadlineCaller


class TamiyoClient:
    """Asks Tamiyo. Every method raises `PeerError`s as `DeadlineCaller.call` does."""

    def __init__(
        self, channel: grpc.aio.Channel, caller: DeadlineCaller, *, epoch_timeout_s: float, step_timeout_s: float
    ) -> None:
        self._stub = TamiyoServiceStub(channel)
        self._caller = caller
        self._epoch_timeout_s, self._step_timeout_s = epoch_timeout_s, step_timeout_s

    async def evaluate_epoch(self, state: SystemStatePacket) -> AdaptationCommand | None:
        """What to do after this epoch; None: go on as you are. The command is not verified yet."""
        # Repeatable: it asks for a decision about a packet that has an id. A controller that remembers the id decides
        # once; one that does not decides anew, and still only the answer that arrives is carried out.
        response = await self._caller.call(
            self._stub.EvaluateEpoch,
            EvaluateEpochRequest(state=state),
            name="EvaluateEpoch",
            timeout_s=self._epoch_timeout_s,
            repeatable=True,
        )
        return response.command if response.HasField("command") else None

    async def evaluate_step(self, state: SystemStatePacket) -> AdaptationCommand | None:
        """What to do between epochs; None: go on as you are. The command is not verified yet."""
        # Not repeatable: a controller may speak up once about what it sees between epochs, and believe it said so
        # though nobody heard. The next question, with a newer state, is worth more than this one again.
        response = await self._caller.call(
            self._stub.EvaluateStep,
            EvaluateStepRequest(state=state),
            name="EvaluateStep",
            timeout_s=self._step_timeout_s,
        )
        return response.command if response.HasField("command") else None
