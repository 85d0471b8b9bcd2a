from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import grpc.aio
import pytest

from leyline.v1 import rollback_service_pb2 as wire
from leyline.v1.rollback_service_pb2_grpc import add_RollbackParticipantServiceServicer_to_server
from tolaria.config import KasminaSettings
from tolaria.errors import BreakerOpenError, PeerProtocolError, PeerTimeoutError, PeerUnavailableError
from tolaria.peers.clients import RollbackClient
from tolaria.reference.rollback import RollbackParticipantService, Undo
from tolaria.resilience.breaker import Breaker, BreakerPolicy
from tolaria.resilience.deadline import CallRecord, DeadlineCaller
from tolaria.rollback.protocol import ParticipantRequest, RollbackParticipant

pytestmark = pytest.mark.anyio

ORDER = ParticipantRequest("r1", 40, "loss exploded", 2.0)


@dataclass
class Revertible:
    step: int = 50

    def revert(self, target_step: int) -> Undo:
        before, self.step = self.step, target_step

        def undo() -> None:
            self.step = before

        return undo


class Scripted(RollbackParticipantService):
    """Records its requests, and answers a prepare as scripted."""

    def __init__(self, *, answer_id: str = "r1", hang: bool = False) -> None:
        super().__init__(Revertible())
        self.answer_id = answer_id
        self.hang = hang
        self.requests: list[wire.PrepareRollbackRequest] = []
        self.time_left_s: list[float] = []

    async def PrepareRollback(  # noqa: N802
        self, request: wire.PrepareRollbackRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> wire.PrepareRollbackResponse:
        self.requests.append(request)
        self.time_left_s.append(context.time_remaining() or 0.0)
        if self.hang:
            await anyio.sleep_forever()
        return wire.PrepareRollbackResponse(rollback_id=self.answer_id, accepted=True, detail="prepared")


@dataclass
class Connection:
    """A client and the records of its calls."""

    client: RollbackClient
    records: list[CallRecord]


@asynccontextmanager
async def connected(servicer: RollbackParticipantService | None) -> AsyncIterator[Connection]:
    """Yields a client of the servicer; of a closed port for None."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    target = "127.0.0.1:1"
    if servicer is not None:
        add_RollbackParticipantServiceServicer_to_server(servicer, server)
        target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
    records: list[CallRecord] = []
    breaker = Breaker("kasmina", clock=time.monotonic, policy=BreakerPolicy(failures_max=1))
    async with grpc.aio.insecure_channel(target) as channel:
        yield Connection(
            RollbackClient(channel, DeadlineCaller("kasmina", breaker, KasminaSettings(), observe=records.append)),
            records,
        )
    await server.stop(None)


async def test_a_rollback_of_the_reference_peer_is_confirmed() -> None:
    """Prepare, commit and confirm are accepted and recorded under their names; the commit reverts."""
    state = Revertible()
    async with connected(RollbackParticipantService(state)) as connection:
        participant: RollbackParticipant = connection.client
        details = [
            (await call(ORDER)).detail for call in (participant.prepare, participant.commit, participant.confirm)
        ]
    assert details == ["prepared", "committed", "confirmed"]
    assert state.step == 40
    assert [r.method for r in connection.records] == ["PrepareRollback", "CommitRollback", "ConfirmRollback"]


async def test_a_rollback_of_the_reference_peer_is_aborted() -> None:
    """An abort undoes the commit; a refusal is a response, not an error."""
    state = Revertible()
    async with connected(RollbackParticipantService(state)) as connection:
        for call in (connection.client.prepare, connection.client.commit, connection.client.abort):
            assert (await call(ORDER)).accepted
        refused = await connection.client.confirm(ORDER)
    assert state.step == 50
    assert not refused.accepted
    assert "aborted" in refused.detail


async def test_the_request_contains_the_order_and_its_deadline() -> None:
    """Every field is sent; the deadline is in the message and on the call."""
    peer = Scripted()
    async with connected(peer) as connection:
        await connection.client.prepare(ParticipantRequest("r1", 40, "loss exploded", 0.5))
        await connection.client.prepare(ParticipantRequest("r1", 40, "loss exploded", 5.0))
    assert peer.requests[0] == wire.PrepareRollbackRequest(
        rollback_id="r1", target_step=40, reason="loss exploded", deadline_ms=500
    )
    assert peer.requests[1].deadline_ms == 5000
    # On the wire gRPC rounds a timeout up, by up to a hundredth.
    assert 0 < peer.time_left_s[0] < 0.55 < peer.time_left_s[1] < 5.5


async def test_a_peer_that_hangs_times_out_and_opens_the_breaker() -> None:
    """The call ends at the timeout of its order; the next call fails at once."""
    async with connected(Scripted(hang=True)) as connection:
        with pytest.raises(PeerTimeoutError, match="PrepareRollback did not answer within 50 ms"):
            await connection.client.prepare(ParticipantRequest("r1", 40, "x", 0.05))
        with pytest.raises(BreakerOpenError):
            await connection.client.prepare(ORDER)


async def test_an_unreachable_peer_is_unavailable() -> None:
    """The error contains the status code."""
    async with connected(None) as connection:
        with pytest.raises(PeerUnavailableError, match="UNAVAILABLE"):
            await connection.client.abort(ORDER)


async def test_a_response_about_another_rollback_is_a_protocol_error() -> None:
    """The error names the other rollback."""
    async with connected(Scripted(answer_id="other")) as connection:
        with pytest.raises(PeerProtocolError, match="'other'"):
            await connection.client.prepare(ORDER)
