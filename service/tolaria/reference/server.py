"""One reference peer as a gRPC server that takes part in the signal board."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import grpc.aio
import structlog

from leyline.v1 import kasmina_service_pb2, rollback_service_pb2, tamiyo_service_pb2
from leyline.v1.kasmina_service_pb2_grpc import add_KasminaServiceServicer_to_server
from leyline.v1.rollback_service_pb2_grpc import add_RollbackParticipantServiceServicer_to_server
from leyline.v1.tamiyo_service_pb2_grpc import add_TamiyoServiceServicer_to_server
from tolaria.config import Address, LeylineSettings
from tolaria.errors import SignalError
from tolaria.grpc_server import GrpcServer, grpc_server
from tolaria.peers.connect import Peer
from tolaria.reference.kasmina import DesiredSeeds, KasminaService
from tolaria.reference.lifecycle import LifecycleSettings
from tolaria.reference.rollback import RollbackParticipantService, Runs
from tolaria.reference.tamiyo import TamiyoRun, TamiyoService
from tolaria.signals import Participant, SignalBoard

_GRACE_S = 1.0
_HEARTBEAT_S = 1.0
_RETRY_S = 1.0
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
    """Serves one peer until SIGTERM or SIGINT or, with `while_stdin`, until standard input ends.

    A pipe on standard input ends with the process at its other end, even if that is killed. `announce` is called once,
    with the address that the server listens on. With a signal `board` the peer sends heartbeats on it and acknowledges
    emergencies. Must run in the main thread, which receives the signals.

    Raises:
        BindError: `listen` is not available.
    """
    async with peer_server(peer, listen, leyline) as server, anyio.create_task_group() as tasks:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            if board is not None:
                tasks.start_soon(join_board, board, peer)
            announce(server.address)
            if while_stdin:
                tasks.start_soon(_stop_at_end_of_stdin, tasks.cancel_scope)
            async for received in signals:
                _log.info("stopping", peer=peer, why=received.name)
                tasks.cancel_scope.cancel()


@asynccontextmanager
async def peer_server(peer: Peer, listen: str, leyline: LeylineSettings) -> AsyncIterator[GrpcServer]:
    """Serves one peer while the block runs.

    Raises:
        BindError: `listen` is not available.
    """

    def register(server: grpc.aio.Server) -> None:
        runs: Runs[TamiyoRun] | Runs[DesiredSeeds]
        if peer == "tamiyo":
            secret = leyline.secret.get_secret_value().encode()
            runs = Runs(TamiyoRun)
            add_TamiyoServiceServicer_to_server(TamiyoService(runs, secret=secret), server)
        else:
            runs = Runs(lambda: DesiredSeeds(LifecycleSettings()))
            add_KasminaServiceServicer_to_server(KasminaService(runs), server)
        add_RollbackParticipantServiceServicer_to_server(RollbackParticipantService(runs), server)

    service_names = (_SERVICE_NAMES[peer], _ROLLBACK_SERVICE)
    async with grpc_server(peer, listen, register, service_names=service_names, grace_s=_GRACE_S) as server:
        for name in ("", *service_names):
            await server.set_health(name, serving=True)
        yield server


async def join_board(path: Path, name: str) -> None:
    """Takes part in the signal board at `path` until cancelled, and joins again when the board is replaced."""
    last_error = ""
    while True:
        try:
            board = await anyio.to_thread.run_sync(SignalBoard.attach, path)
            try:
                _log.info("attending", board=str(path), participant=name)
                await _take_part(board, board.claim(name))
            finally:
                # In a thread, since closing waits for the thread that waits for signals.
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(board.close)
        except SignalError as error:
            if str(error) != last_error:
                _log.warning("board_not_attended", board=str(path), detail=str(error))
            last_error = str(error)
        await anyio.sleep(_RETRY_S)


async def _take_part(board: SignalBoard, me: Participant) -> None:
    """Sends heartbeats and acknowledges emergencies. A reference peer has no background work to stop."""
    limiter = anyio.CapacityLimiter(1)
    while board.current:
        seen = board.bell  # read before the signals, so that a later one ends the wait
        me.beat()
        effective = board.effective()
        if effective is not None and effective.signal_id != me.record.acknowledged_id:
            me.acknowledge(effective.signal_id)
            _log.warning(
                "emergency_acknowledged",
                emergency_level=effective.level,
                reason=effective.reason,
                origin=effective.origin,
            )
        await anyio.to_thread.run_sync(board.wait, seen, _HEARTBEAT_S, abandon_on_cancel=True, limiter=limiter)


async def _stop_at_end_of_stdin(serving: anyio.CancelScope) -> None:
    """Cancels `serving` at the end of standard input and discards what is read before."""
    stdin = sys.stdin.fileno()
    is_open = True
    while is_open:
        try:
            await anyio.wait_readable(stdin)
        except PermissionError:
            # A regular file or /dev/null cannot be polled; it never blocks, so it has ended already.
            break
        is_open = bool(os.read(stdin, 4096))
    _log.info("stopping", why="standard input ended")
    serving.cancel()
