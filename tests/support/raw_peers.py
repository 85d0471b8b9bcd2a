"""Tamiyo and Kasmina on one loopback port that answer with given bytes, and real clients to call them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import grpc
import grpc.aio

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.kasmina_service_pb2 import ApplyCommandResponse
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.runs import FakePeers
from tolaria.config import PeerSettings
from tolaria.peers.connect import Peers, connected_peers
from tolaria.run.safety import Safeguards
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.metrics import Metrics

METHODS = {
    "leyline.v1.TamiyoService": ("EvaluateEpoch", "EvaluateStep"),
    "leyline.v1.KasminaService": ("ApplyCommand", "ExportSeedStates"),
}

Answer = bytes | grpc.StatusCode
"""The bytes of the answer, or the status code of an error."""


class RawPeers(FakePeers):
    """Peers called by the real clients. `answers` holds the answer of each method; the default is empty.

    `served` counts the answers by method.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[str, Answer] = {}
        self.served: dict[str, int] = {}
        self._clients: Peers | None = None

    @asynccontextmanager
    async def serving(self, safeguards: Safeguards) -> AsyncIterator[None]:
        """Serves, and connects clients with the circuit breakers of a run."""
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(
                    service, {name: grpc.unary_unary_rpc_method_handler(self._handler(name)) for name in names}
                )
                for service, names in METHODS.items()
            ]
        )
        target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        settings = PeerSettings(target=target, timeout_s=10)
        connecting = connected_peers(
            settings, settings, breakers=safeguards.breakers, metrics=Metrics(), emitter=Emitter()
        )
        async with connecting as self._clients:
            yield
        await server.stop(None)

    async def evaluate_epoch(self, state: SystemStatePacket) -> AdaptationCommand | None:
        """Calls the server."""
        return await self._peers.tamiyo.evaluate_epoch(state)

    async def evaluate_step(self, state: SystemStatePacket) -> AdaptationCommand | None:
        """Calls the server."""
        return await self._peers.tamiyo.evaluate_step(state)

    async def apply(self, command: AdaptationCommand, state: SystemStatePacket) -> ApplyCommandResponse:
        """Calls the server."""
        return await self._peers.kasmina.apply(command, state)

    async def export_seeds(self, state: SystemStatePacket, refusals: Sequence[tuple[str, str]] = ()) -> list[SeedState]:
        """Calls the server."""
        return await self._peers.kasmina.export_seeds(state, refusals)

    @property
    def _peers(self) -> Peers:
        assert self._clients is not None
        return self._clients

    def _handler(self, name: str) -> Callable[..., Awaitable[bytes]]:
        async def answer(_raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            self.served[name] = self.served.get(name, 0) + 1
            answer = self.answers.get(name, b"")
            if isinstance(answer, grpc.StatusCode):
                await context.abort(answer, "scripted failure")
            return answer

        return answer
