"""Clients of the peers' services. Every method raises `PeerError`s as `DeadlineCaller.call` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

import grpc.aio

from leyline.v1 import kasmina_service_pb2 as kasmina
from leyline.v1 import rollback_service_pb2 as rollback
from leyline.v1 import tamiyo_service_pb2 as tamiyo
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.kasmina_service_pb2_grpc import KasminaServiceStub
from leyline.v1.rollback_service_pb2_grpc import RollbackParticipantServiceStub
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from leyline.v1.tamiyo_service_pb2_grpc import TamiyoServiceStub
from tolaria.errors import PeerProtocolError
from tolaria.peers.verification import verify_seeds
from tolaria.resilience.deadline import DeadlineCaller

ROLLBACK_METHODS: Final = ("PrepareRollback", "CommitRollback", "ConfirmRollback", "AbortRollback")


class TamiyoClient:
    """Calls the controller. Commands are returned as received, not verified; None means no change."""

    def __init__(self, channel: grpc.aio.Channel, caller: DeadlineCaller) -> None:
        self._stub = TamiyoServiceStub(channel)
        self._caller = caller

    async def evaluate_epoch(self, state: SystemStatePacket) -> AdaptationCommand | None:
        """Returns the command for the end of an epoch."""
        # Repeatable: only the answer that arrives is carried out, whether the controller recognizes the packet's id or
        # decides again.
        request = tamiyo.EvaluateEpochRequest(state=state)
        response = await self._caller.call(self._stub.EvaluateEpoch, request, name="EvaluateEpoch", repeatable=True)
        return response.command if response.HasField("command") else None

    async def evaluate_step(self, state: SystemStatePacket) -> AdaptationCommand | None:
        """Returns the command for a state between epochs."""
        # Not repeatable: a controller may answer only once and assume that a lost answer was received. Asking again
        # with a newer state is more useful.
        request = tamiyo.EvaluateStepRequest(state=state)
        response = await self._caller.call(self._stub.EvaluateStep, request, name="EvaluateStep")
        return response.command if response.HasField("command") else None


class KasminaClient:
    """Calls the executor. Desired seeds that break the contract raise `PeerProtocolError`."""

    def __init__(self, channel: grpc.aio.Channel, caller: DeadlineCaller) -> None:
        self._stub = KasminaServiceStub(channel)
        self._caller = caller

    async def apply(self, command: AdaptationCommand, state: SystemStatePacket) -> kasmina.ApplyCommandResponse:
        """Sends a verified seed command; returns whether it was applied, the detail and all desired seeds."""
        # Not repeatable: the contract does not promise that a command_id is executed once, and a lost command is better
        # than one executed twice, since the controller decides again.
        request = kasmina.ApplyCommandRequest(command=command, state=state)
        response = await self._caller.call(self._stub.ApplyCommand, request, name="ApplyCommand")
        verify_seeds(self._caller.peer, response.seeds)
        return response

    async def export_seeds(self, state: SystemStatePacket, refusals: Sequence[tuple[str, str]] = ()) -> list[SeedState]:
        """Returns all desired seeds for this state; `refusals` are (seed_id, reason) of those not realized."""
        refused = [kasmina.SeedRefusal(seed_id=seed_id, reason=reason) for seed_id, reason in refusals]
        request = kasmina.ExportSeedStatesRequest(state=state, refusals=refused)
        # Repeatable: gates are evaluated once for an epoch's state, and refusals may be reported twice.
        response = await self._caller.call(
            self._stub.ExportSeedStates, request, name="ExportSeedStates", repeatable=True
        )
        return verify_seeds(self._caller.peer, response.seeds)


class _Order(Protocol):
    @property
    def rollback_id(self) -> str: ...
    @property
    def target_step(self) -> int: ...
    @property
    def reason(self) -> str: ...
    @property
    def timeout_s(self) -> float: ...


Request = TypeVar(
    "Request",
    rollback.PrepareRollbackRequest,
    rollback.CommitRollbackRequest,
    rollback.ConfirmRollbackRequest,
    rollback.AbortRollbackRequest,
)
Response = TypeVar(
    "Response",
    rollback.PrepareRollbackResponse,
    rollback.CommitRollbackResponse,
    rollback.ConfirmRollbackResponse,
    rollback.AbortRollbackResponse,
)


class RollbackClient:
    """Calls a peer as a participant of a rollback. A response about another rollback raises `PeerProtocolError`."""

    def __init__(self, channel: grpc.aio.Channel, caller: DeadlineCaller) -> None:
        self._stub = RollbackParticipantServiceStub(channel)
        self._caller = caller

    async def prepare(self, order: _Order, /) -> rollback.PrepareRollbackResponse:
        """Requests the promise to revert."""
        return await self._call(self._stub.PrepareRollback, rollback.PrepareRollbackRequest, order)

    async def commit(self, order: _Order, /) -> rollback.CommitRollbackResponse:
        """Requests the revert."""
        return await self._call(self._stub.CommitRollback, rollback.CommitRollbackRequest, order)

    async def confirm(self, order: _Order, /) -> rollback.ConfirmRollbackResponse:
        """Reports that the rollback is final."""
        return await self._call(self._stub.ConfirmRollback, rollback.ConfirmRollbackRequest, order)

    async def abort(self, order: _Order, /) -> rollback.AbortRollbackResponse:
        """Requests the withdrawal of the promise, or the undo of the commit."""
        return await self._call(self._stub.AbortRollback, rollback.AbortRollbackRequest, order)

    async def _call(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Request, Response], kind: type[Request], order: _Order
    ) -> Response:
        request = kind(
            rollback_id=order.rollback_id,
            target_step=order.target_step,
            reason=order.reason,
            deadline_ms=max(1, int(order.timeout_s * 1000)),
        )
        name = kind.__name__.removesuffix("Request")
        # Repeatable, since the contract makes all four calls idempotent by rollback_id.
        response = await self._caller.call(method, request, name=name, timeout_s=order.timeout_s, repeatable=True)
        if response.rollback_id != order.rollback_id:
            raise PeerProtocolError(self._caller.peer, f"{name} answered about rollback {response.rollback_id!r}")
        return response
