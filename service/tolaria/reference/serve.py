"""One reference peer as a server: which services it carries, and until when. Must not know the command line."""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, TypeAlias

import anyio
import grpc.aio
import structlog

from leyline.v1 import kasmina_service_pb2, rollback_service_pb2, tamiyo_service_pb2
from leyline.v1.kasmina_service_pb2_grpc import add_KasminaServiceServicer_to_server
from leyline.v1.rollback_service_pb2_grpc import add_RollbackParticipantServiceServicer_to_server
from leyline.v1.tamiyo_service_pb2_grpc import add_TamiyoServiceServicer_to_server
from tolaria.config import Address, LeylineSettings
from tolaria.grpc_server import GrpcServer, grpc_server
from tolaria.reference.attendance import attend_board
from tolaria.reference.gates import LifecycleSettings
from tolaria.reference.kasmina import KasminaService
from tolaria.reference.policy import PolicySettings
from tolaria.reference.rollback import RollbackParticipantService
from tolaria.reference.runs import Runs
from tolaria.reference.seed_bed import SeedBed
from tolaria.reference.tamiyo import TamiyoRun, TamiyoService

Peer: TypeAlias = Literal["tamiyo", "kasmina"]

_GRACE_S = 1.0
_ROLLBACK_SERVICE = rollback_service_pb2.DESCRIPTOR.services_by_name["RollbackParticipantService"].full_name
_SERVICE_NAMES: dict[Peer, str] = {
    "tamiyo": tamiyo_service_pb2.DESCRIPTOR.services_by_name["TamiyoService"].full_name,
    "kasmina": kasmina_service_pb2.DESCRIPTOR.services_by_name["KasminaService"].full_name,
}
_log = structlog.get_logger(__name__)


async def serve_peer(
    peer: Peer,
    listen: str,
    leyline: LeylineSettings,
    *,
    announce: Callable[[Address], None],
    board: Path | None = None,
    while_stdin: bool,
) -> None:
    """Serve one peer until SIGTERM or SIGINT, or, with `while_stdin`, until standard input ends.

    Standard input that is a pipe ends with the process that holds its other side, also where that was killed.
    `announce` is called once, with the address that is listened on. On a signal `board` it lets its heart be seen and
    acknowledges emergencies. Needs the main thread, for the signals.

    Raises:
        BindError: when `listen` cannot be had.
    """
    async with peer_server(peer, listen, leyline) as server, anyio.create_task_group() as endings:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            if board is not None:
                endings.start_soon(attend_board, board, peer)
            announce(server.address)
            if while_stdin:
                endings.start_soon(_end_with_stdin, endings.cancel_scope)
            async for received in signals:
                _log.info("stopping", peer=peer, why=received.name)
                endings.cancel_scope.cancel()


@asynccontextmanager
async def peer_server(peer: Peer, listen: str, leyline: LeylineSettings) -> AsyncIterator[GrpcServer]:
    """One peer's server, for as long as the block runs.

    Raises:
        BindError: when `listen` cannot be had.
    """
    service_names = (_SERVICE_NAMES[peer], _ROLLBACK_SERVICE)
    register = _tamiyo(leyline) if peer == "tamiyo" else _kasmina
    async with grpc_server(peer, listen, register, service_names=service_names, grace_s=_GRACE_S) as server:
        for name in ("", *service_names):
            await server.set_health(name, serving=True)
        yield server


def _tamiyo(leyline: LeylineSettings) -> Callable[[grpc.aio.Server], None]:
    def register(server: grpc.aio.Server) -> None:
        runs = Runs(TamiyoRun)
        service = TamiyoService(
            runs,
            PolicySettings(),
            secret=leyline.secret.get_secret_value().encode(),
            now_ns=time.time_ns,
            new_id=lambda: str(uuid.uuid4()),
        )
        add_TamiyoServiceServicer_to_server(service, server)
        add_RollbackParticipantServiceServicer_to_server(RollbackParticipantService(runs), server)

    return register


def _kasmina(server: grpc.aio.Server) -> None:
    beds = Runs(lambda: SeedBed(LifecycleSettings()))
    add_KasminaServiceServicer_to_server(KasminaService(beds), server)
    add_RollbackParticipantServiceServicer_to_server(RollbackParticipantService(beds), server)


async def _end_with_stdin(serving: anyio.CancelScope) -> None:
    """Cancel `serving` at the end of standard input. What comes in before is nobody's and is dropped."""
    stdin = sys.stdin.fileno()
    open_still = True
    while open_still:
        try:
            await anyio.wait_readable(stdin)
        except PermissionError:
            # A file or /dev/null cannot be waited for: it never blocks and has its end already.
            break
        open_still = bool(os.read(stdin, 4096))
    _log.info("stopping", why="standard input ended")
    serving.cancel()
