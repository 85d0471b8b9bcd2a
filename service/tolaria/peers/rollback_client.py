"""A peer as a participant of Tolaria's rollbacks. Must not know what is rolled back, or who else takes part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import grpc.aio

from leyline.v1.rollback_service_pb2 import (
    AbortRollbackRequest,
    AbortRollbackResponse,
    CommitRollbackRequest,
    CommitRollbackResponse,
    ConfirmRollbackRequest,
    ConfirmRollbackResponse,
    PrepareRollbackRequest,
    PrepareRollbackResponse,
)
from leyline.v1.rollback_service_pb2_grpc import RollbackParticipantServiceStub
from tolaria.errors import PeerProtocolError
from tolaria.resilience.deadline import DeadlineCaller

Request = TypeVar(
    "Request", PrepareRollbackRequest, CommitRollbackRequest, ConfirmRollbackRequest, AbortRollbackRequest
)
Response = TypeVar(
    "Response", PrepareRollbackResponse, CommitRollbackResponse, ConfirmRollbackResponse, AbortRollbackResponse
)


class Order(Protocol):
    """What a participant is asked; the coordinator's orders are such. `timeout_s`: what is left for the call."""

    @property
    def rollback_id(self) -> str: ...  # noqa: D102 - said above
    @property
    def target_step(self) -> int: ...  # noqa: D102 - said above
    @property
    def reason(self) -> str: ...  # noqa: D102 - said above
    @property
    def timeout_s(self) -> float: ...  # noqa: D102 - said above


@dataclass(frozen=True, slots=True)
class PeerVote:
    """The peer's answer: whether it took the call, and in which words."""

    accepted: bool
    detail: str


class RollbackClient:
    """Asks one peer. Every method raises `PeerError`s as `DeadlineCaller.call` does, whose breaker it shares.

    An answer about another rollback is a `PeerProtocolError`.
    """

    def __init__(self, channel: grpc.aio.Channel, caller: DeadlineCaller) -> None:
        self._stub = RollbackParticipantServiceStub(channel)
        self._caller = caller

    async def prepare(self, order: Order, /) -> PeerVote:
        """Ask for the promise to go back."""
        return await self._ask(self._stub.PrepareRollback, PrepareRollbackRequest, order)

    async def commit(self, order: Order, /) -> PeerVote:
        """Have it go back."""
        return await self._ask(self._stub.CommitRollback, CommitRollbackRequest, order)

    async def confirm(self, order: Order, /) -> PeerVote:
        """Tell it that the rollback stands."""
        return await self._ask(self._stub.ConfirmRollback, ConfirmRollbackRequest, order)

    async def abort(self, order: Order, /) -> PeerVote:
        """Have it take back its promise, or what it has done."""
        return await self._ask(self._stub.AbortRollback, AbortRollbackRequest, order)

    async def _ask(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Request, Response], kind: type[Request], order: Order
    ) -> PeerVote:
        request = kind(
            rollback_id=order.rollback_id,
            target_step=order.target_step,
            reason=order.reason,
            deadline_ms=max(1, int(order.timeout_s * 1000)),
        )
        name = kind.__name__.removesuffix("Request")
        # Repeatable, all four: the contract has answers idempotent per rollback_id.
        response = await self._caller.call(method, request, name=name, timeout_s=order.timeout_s, repeatable=True)
        if response.rollback_id != order.rollback_id:
            raise PeerProtocolError(self._caller.peer, f"{name} answered about rollback {response.rollback_id!r}")
        return PeerVote(response.accepted, response.detail)
