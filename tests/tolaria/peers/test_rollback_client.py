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
from tolaria.peers.rollback_client import RollbackClient
from tolaria.reference.rollback import RollbackParticipantService
from tolaria.reference.runs import Undo
from tolaria.resilience.breaker import Breaker, BreakerPolicy
from tolaria.resilience.deadline import CallRecord, DeadlineCaller
from tolaria.rollback.participants import RollbackOrder, RollbackParticipant, Seat

pytestmark = pytest.mark.anyio

ORDER = RollbackOrder("r1", 40, "loss exploded", 2.0)


@dataclass
class Ledger:
    step: int = 50

    def revert(self, target_step: int) -> Undo:
        before, self.step = self.step, target_step

        def undo() -> None:
            self.step = before

        return undo


class Scripted(RollbackParticipantService):
    """Notes its requests, and answers a prepare as the test wants."""

    def __init__(self, *, answer_id: str = "r1", hang: bool = False) -> None:
        super().__init__(Ledger())
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
class Line:
    """A client and what its caller recorded."""

    client: RollbackClient
    records: list[CallRecord]


@asynccontextmanager
async def connected(servicer: RollbackParticipantService | None) -> AsyncIterator[Line]:
    """A client of the servicer; of a port where nobody listens for None."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    target = "127.0.0.1:1"
    if servicer is not None:
        add_RollbackParticipantServiceServicer_to_server(servicer, server)
        target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
    records: list[CallRecord] = []
    breaker = Breaker("kasmina", clock=time.monotonic, policy=BreakerPolicy(failures_max=1))
    async with grpc.aio.insecure_channel(target) as channel:
        yield Line(
            RollbackClient(channel, DeadlineCaller("kasmina", breaker, KasminaSettings(), observe=records.append)),
            records,
        )
    await server.stop(None)


async def test_the_reference_peer_goes_back_and_stays() -> None:
    """Prepare, commit, confirm: each accepted, the commit reverts, and each call is recorded under its name."""
    ledger = Ledger()
    async with connected(RollbackParticipantService(ledger)) as line:
        seat: RollbackParticipant = Seat("kasmina", line.client).participant
        details = [(await call(ORDER)).detail for call in (seat.prepare, seat.commit, seat.confirm)]
    assert details == ["prepared", "committed", "confirmed"]
    assert ledger.step == 40
    assert [r.method for r in line.records] == ["PrepareRollback", "CommitRollback", "ConfirmRollback"]


async def test_the_reference_peer_takes_it_back() -> None:
    """An abort undoes the commit; a refusal is an answer, not an error."""
    ledger = Ledger()
    async with connected(RollbackParticipantService(ledger)) as line:
        for call in (line.client.prepare, line.client.commit, line.client.abort):
            assert (await call(ORDER)).accepted
        refused = await line.client.confirm(ORDER)
    assert ledger.step == 50
    assert not refused.accepted
    assert "aborted" in refused.detail


async def test_the_peer_sees_what_is_asked_and_how_long_it_has() -> None:
    """Every field crosses, and the deadline is what is left, in the message and on the call."""
    peer = Scripted()
    async with connected(peer) as line:
        await line.client.prepare(RollbackOrder("r1", 40, "loss exploded", 0.5))
        await line.client.prepare(RollbackOrder("r1", 40, "loss exploded", 5.0))
    assert peer.requests[0] == wire.PrepareRollbackRequest(
        rollback_id="r1", target_step=40, reason="loss exploded", deadline_ms=500
    )
    assert peer.requests[1].deadline_ms == 5000
    assert 0 < peer.time_left_s[0] <= 0.5 < peer.time_left_s[1] < 5.5


async def test_a_silent_peer_is_a_timeout_and_then_an_open_breaker() -> None:
    """The call ends at its order's timeout; the breaker, shared with the peer's other calls, then spares it."""
    async with connected(Scripted(hang=True)) as line:
        with pytest.raises(PeerTimeoutError, match="PrepareRollback did not answer within 50 ms"):
            await line.client.prepare(RollbackOrder("r1", 40, "x", 0.05))
        with pytest.raises(BreakerOpenError):
            await line.client.prepare(ORDER)


async def test_a_peer_that_is_not_there_is_unavailable() -> None:
    """As with any other call."""
    async with connected(None) as line:
        with pytest.raises(PeerUnavailableError, match="UNAVAILABLE"):
            await line.client.abort(ORDER)


async def test_an_answer_about_another_rollback_is_not_taken() -> None:
    """It breaks the contract."""
    async with connected(Scripted(answer_id="other")) as line:
        with pytest.raises(PeerProtocolError, match="'other'"):
            await line.client.prepare(ORDER)
