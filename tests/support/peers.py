"""Fake Tamiyo and Kasmina servers on loopback gRPC, scripted by the test."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol, cast

import grpc
import grpc.aio
from anyio.from_thread import start_blocking_portal

from leyline.v1 import kasmina_service_pb2 as kasmina
from leyline.v1 import rollback_service_pb2 as rollback
from leyline.v1 import tamiyo_service_pb2 as tamiyo
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import COMMAND_PAUSE, COMMAND_SEED, SEED_OP_GERMINATE, CommandType
from leyline.v1.kasmina_service_pb2_grpc import KasminaServiceServicer, add_KasminaServiceServicer_to_server
from leyline.v1.rollback_service_pb2_grpc import (
    RollbackParticipantServiceServicer,
    add_RollbackParticipantServiceServicer_to_server,
)
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from leyline.v1.tamiyo_service_pb2_grpc import TamiyoServiceServicer, add_TamiyoServiceServicer_to_server
from tolaria.peers.clients import KasminaClient, TamiyoClient

Context = grpc.aio.ServicerContext[object, object]
Answering = Callable[[SystemStatePacket], Awaitable[AdaptationCommand | None]]


def command(kind: CommandType.ValueType = COMMAND_PAUSE, **fields: object) -> AdaptationCommand:
    """Returns a command that passes every check unless `fields` make it invalid."""
    made = AdaptationCommand(version=1, command_id=uuid.uuid4().hex, command_type=kind, issued_by="test")
    made.issued_at.FromNanoseconds(time.time_ns())
    if kind == COMMAND_SEED:
        made.target_seed_id = "seed-1"
        made.seed_operation.operation = SEED_OP_GERMINATE
    for name, value in fields.items():
        setattr(made, name, value)
    return made


class PeerMethods(Protocol):
    """The methods of both clients, for fakes without a connection."""

    async def evaluate_epoch(self, state: SystemStatePacket) -> AdaptationCommand | None: ...
    async def evaluate_step(self, state: SystemStatePacket) -> AdaptationCommand | None: ...
    async def apply(self, command: AdaptationCommand, state: SystemStatePacket) -> kasmina.ApplyCommandResponse: ...
    async def export_seeds(
        self, state: SystemStatePacket, refusals: Sequence[tuple[str, str]] = ()
    ) -> list[SeedState]: ...


def as_clients(fake: PeerMethods) -> tuple[TamiyoClient, KasminaClient]:
    """Returns the fake in place of both clients."""
    return cast("TamiyoClient", fake), cast("KasminaClient", fake)


class CountedCalls:
    """Counts calls: begun, running now, cancelled. The first calls fail with the status codes in `failures`."""

    def __init__(self) -> None:
        self.begun = 0
        self.running = 0
        self.cancelled = 0
        self.failures: list[grpc.StatusCode] = []

    @asynccontextmanager
    async def counted(self, context: Context) -> AsyncIterator[None]:
        """Counts one call while the block runs."""
        self.begun += 1
        self.running += 1
        try:
            if self.failures:
                await context.abort(self.failures.pop(0), "as scripted")
            yield
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


class FakeTamiyo(CountedCalls, TamiyoServiceServicer):
    """A controller that answers with the result of `answer`."""

    def __init__(self, answer: Answering) -> None:
        super().__init__()
        self.answer = answer
        self.states: list[SystemStatePacket] = []

    async def EvaluateEpoch(  # noqa: N802
        self, request: tamiyo.EvaluateEpochRequest, context: Context
    ) -> tamiyo.EvaluateEpochResponse:
        async with self.counted(context):
            self.states.append(request.state)
            return tamiyo.EvaluateEpochResponse(command=await self.answer(request.state))

    async def EvaluateStep(  # noqa: N802
        self, request: tamiyo.EvaluateStepRequest, context: Context
    ) -> tamiyo.EvaluateStepResponse:
        async with self.counted(context):
            self.states.append(request.state)
            return tamiyo.EvaluateStepResponse(command=await self.answer(request.state))


async def no_delay() -> None:
    """Returns immediately."""


class FakeKasmina(CountedCalls, KasminaServiceServicer):
    """An executor that declares `seeds` and applies every command, after `before_answer`."""

    def __init__(
        self, seeds: list[SeedState] | None = None, before_answer: Callable[[], Awaitable[None]] = no_delay
    ) -> None:
        super().__init__()
        self.seeds = seeds or []
        self.before_answer = before_answer
        self.commands: list[AdaptationCommand] = []

    async def ApplyCommand(  # noqa: N802
        self, request: kasmina.ApplyCommandRequest, context: Context
    ) -> kasmina.ApplyCommandResponse:
        async with self.counted(context):
            self.commands.append(request.command)
            await self.before_answer()
            return kasmina.ApplyCommandResponse(seeds=self.seeds, applied=True, detail="germinated")

    async def ExportSeedStates(  # noqa: N802
        self, request: kasmina.ExportSeedStatesRequest, context: Context
    ) -> kasmina.ExportSeedStatesResponse:
        async with self.counted(context):
            await self.before_answer()
            return kasmina.ExportSeedStatesResponse(seeds=self.seeds)


class FakeParticipant(CountedCalls, RollbackParticipantServiceServicer):
    """A participant that accepts every call of a rollback."""

    async def PrepareRollback(  # noqa: N802
        self, request: rollback.PrepareRollbackRequest, context: Context
    ) -> rollback.PrepareRollbackResponse:
        async with self.counted(context):
            return rollback.PrepareRollbackResponse(rollback_id=request.rollback_id, accepted=True)

    async def CommitRollback(  # noqa: N802
        self, request: rollback.CommitRollbackRequest, context: Context
    ) -> rollback.CommitRollbackResponse:
        async with self.counted(context):
            return rollback.CommitRollbackResponse(rollback_id=request.rollback_id, accepted=True)

    async def ConfirmRollback(  # noqa: N802
        self, request: rollback.ConfirmRollbackRequest, context: Context
    ) -> rollback.ConfirmRollbackResponse:
        async with self.counted(context):
            return rollback.ConfirmRollbackResponse(rollback_id=request.rollback_id, accepted=True)

    async def AbortRollback(  # noqa: N802
        self, request: rollback.AbortRollbackRequest, context: Context
    ) -> rollback.AbortRollbackResponse:
        async with self.counted(context):
            return rollback.AbortRollbackResponse(rollback_id=request.rollback_id, accepted=True)


@asynccontextmanager
async def serving(*servicers: FakeTamiyo | FakeKasmina | FakeParticipant, port: int = 0) -> AsyncIterator[str]:
    """Serves on one loopback port; yields host:port."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    for servicer in servicers:
        if isinstance(servicer, FakeTamiyo):
            add_TamiyoServiceServicer_to_server(servicer, server)
        elif isinstance(servicer, FakeKasmina):
            add_KasminaServiceServicer_to_server(servicer, server)
        else:
            add_RollbackParticipantServiceServicer_to_server(servicer, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        await server.stop(None)


@contextmanager
def served_without_change(new_kasmina: Callable[[], FakeKasmina]) -> Iterator[list[str]]:
    """Serves a Tamiyo that changes nothing, and this Kasmina, beside services that end; yields their settings."""

    async def no_change(_state: object) -> None:
        return None

    @asynccontextmanager
    async def both() -> AsyncIterator[str]:
        async with serving(FakeTamiyo(no_change), new_kasmina(), FakeParticipant()) as address:
            yield address

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(both()) as address:
        yield [f"tamiyo.target={address}", f"kasmina.target={address}"]
