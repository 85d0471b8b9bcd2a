"""Fake Tamiyo and Kasmina on real loopback gRPC, scripted by the test."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc.aio

from leyline.v1 import kasmina_service_pb2 as kasmina
from leyline.v1 import tamiyo_service_pb2 as tamiyo
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import COMMAND_PAUSE, COMMAND_SEED, SEED_OP_GERMINATE, CommandType
from leyline.v1.kasmina_service_pb2_grpc import KasminaServiceServicer, add_KasminaServiceServicer_to_server
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from leyline.v1.tamiyo_service_pb2_grpc import TamiyoServiceServicer, add_TamiyoServiceServicer_to_server

Context = grpc.aio.ServicerContext[object, object]
Answering = Callable[[SystemStatePacket], Awaitable[AdaptationCommand | None]]


def command(kind: CommandType.ValueType = COMMAND_PAUSE, **fields: object) -> AdaptationCommand:
    """A command that passes every check, unless `fields` spoil it."""
    made = AdaptationCommand(version=1, command_id=uuid.uuid4().hex, command_type=kind, issued_by="test")
    made.issued_at.FromNanoseconds(time.time_ns())
    if kind == COMMAND_SEED:
        made.target_seed_id = "seed-1"
        made.seed_operation.operation = SEED_OP_GERMINATE
    for name, value in fields.items():
        setattr(made, name, value)
    return made


class FakeTamiyo(TamiyoServiceServicer):
    """Answers with what `answer` returns; counts calls, and handlers that are running now."""

    def __init__(self, answer: Answering) -> None:
        self.answer = answer
        self.states: list[SystemStatePacket] = []
        self.running = 0
        self.cancelled = 0

    async def EvaluateEpoch(  # noqa: N802
        self, request: tamiyo.EvaluateEpochRequest, context: Context
    ) -> tamiyo.EvaluateEpochResponse:
        return tamiyo.EvaluateEpochResponse(command=await self._answered(request.state))

    async def EvaluateStep(  # noqa: N802
        self, request: tamiyo.EvaluateStepRequest, context: Context
    ) -> tamiyo.EvaluateStepResponse:
        return tamiyo.EvaluateStepResponse(command=await self._answered(request.state))

    async def _answered(self, state: SystemStatePacket) -> AdaptationCommand | None:
        self.states.append(state)
        self.running += 1
        try:
            return await self.answer(state)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


class FakeKasmina(KasminaServiceServicer):
    """Desires `seeds` and takes every command."""

    def __init__(self, seeds: list[SeedState] | None = None) -> None:
        self.seeds = seeds or []
        self.commands: list[AdaptationCommand] = []

    async def ApplyCommand(  # noqa: N802
        self, request: kasmina.ApplyCommandRequest, context: Context
    ) -> kasmina.ApplyCommandResponse:
        self.commands.append(request.command)
        return kasmina.ApplyCommandResponse(seeds=self.seeds, applied=True, detail="germinated")

    async def ExportSeedStates(  # noqa: N802
        self, request: kasmina.ExportSeedStatesRequest, context: Context
    ) -> kasmina.ExportSeedStatesResponse:
        return kasmina.ExportSeedStatesResponse(seeds=self.seeds)


@asynccontextmanager
async def serving(*servicers: FakeTamiyo | FakeKasmina, port: int = 0) -> AsyncIterator[str]:
    """The servicers on one loopback port; yields host:port."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    for servicer in servicers:
        if isinstance(servicer, FakeTamiyo):
            add_TamiyoServiceServicer_to_server(servicer, server)
        else:
            add_KasminaServiceServicer_to_server(servicer, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        await server.stop(None)
