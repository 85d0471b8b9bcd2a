"""One reference peer as a gRPC server that is attached to the signal board."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import grpc.aio
import structlog

from leyline.v1.kasmina_service_pb2_grpc import add_KasminaServiceServicer_to_server
from leyline.v1.rollback_service_pb2_grpc import add_RollbackParticipantServiceServicer_to_server
from leyline.v1.tamiyo_service_pb2_grpc import add_TamiyoServiceServicer_to_server
from tolaria.config import Address, LeylineSettings
from tolaria.emergency.protocol import level_name
from tolaria.errors import SignalError
from tolaria.grpc_server import GrpcServer, bound_server, grpc_server
from tolaria.peers.connect import Peer
from tolaria.reference.history import HistoryFiles
from tolaria.reference.kasmina import DesiredSeeds, KasminaService
from tolaria.reference.rollback import RollbackParticipantService, Runs
from tolaria.reference.tamiyo import TamiyoRun, TamiyoService
from tolaria.reference.tracing import TracingInterceptor
from tolaria.security.certificates import Identity, TlsFiles
from tolaria.security.watched import WatchedFiles, watch
from tolaria.signals import ParticipantWriter, SignalBoard
from tolaria.telemetry.tracing import Tracer

_GRACE_S, _HEARTBEAT_S, _RETRY_S = 1.0, 1.0, 1.0
_ROLLBACK_SERVICE = "leyline.v1.RollbackParticipantService"
_SERVICES: dict[Peer, str] = {"tamiyo": "leyline.v1.TamiyoService", "kasmina": "leyline.v1.KasminaService"}
_log = structlog.get_logger(__name__)


async def serve_peer(
    peer: Peer,
    listen: str,
    leyline: LeylineSettings,
    *,
    announce: Callable[[Address], None],
    board: Path | None = None,
    state_dir: Path | None = None,
    tls: TlsFiles | None = None,
    while_stdin: bool,
    tracer: Tracer | None = None,
) -> None:
    """Serves one peer until SIGTERM or SIGINT or, with `while_stdin`, until standard input ends. For the main thread.

    `announce` is called once, with the address that the server listens on. With a signal `board` the peer sends
    heartbeats and acknowledges emergencies on it. Tamiyo keeps what a restart needs in `state_dir`; Kasmina needs
    nothing but the packets. With `tls` it serves with these files, which are read again when they change.

    Raises:
        BindError: `listen` is not available.
        CredentialsError: a file of `tls` cannot be used.
    """
    watched = None if tls is None else WatchedFiles("the certificate of the peer", tls.read)
    if watched is None and not Address.parse(listen).is_loopback:
        _log.warning("exposed", peer=peer, detail=f"{listen} is served without TLS; --tls-cert and --tls-key set it")
    serving = peer_server(peer, listen, leyline, state_dir, tracer, tls=watched)
    async with serving as server, anyio.create_task_group() as tasks:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            if board is not None:
                tasks.start_soon(join_board, board, peer)
            if watched is not None:
                tasks.start_soon(watch, watched)
            announce(server.address)
            if while_stdin:
                tasks.start_soon(_stop_at_end_of_stdin, tasks.cancel_scope)
            async for received in signals:
                _log.info("stopping", peer=peer, why=received.name)
                tasks.cancel_scope.cancel()


@asynccontextmanager
async def peer_server(
    peer: Peer,
    listen: str,
    leyline: LeylineSettings,
    state_dir: Path | None = None,
    tracer: Tracer | None = None,
    *,
    tls: WatchedFiles[Identity] | None = None,
) -> AsyncIterator[GrpcServer]:
    """Serves one peer while the block runs. Raises `BindError` when `listen` is not available."""

    def register(server: grpc.aio.Server) -> None:
        runs: Runs[TamiyoRun] | Runs[DesiredSeeds]
        if peer == "tamiyo":
            secret = leyline.secret.get_secret_value().encode()
            runs = Runs(partial(TamiyoRun, HistoryFiles(state_dir)))
            add_TamiyoServiceServicer_to_server(TamiyoService(runs, secret=secret), server)
        else:
            runs = Runs(lambda _run_id: DesiredSeeds())
            add_KasminaServiceServicer_to_server(KasminaService(runs), server)
        add_RollbackParticipantServiceServicer_to_server(RollbackParticipantService(runs), server)

    service_names = (_SERVICES[peer], _ROLLBACK_SERVICE)
    traced = [TracingInterceptor(peer, tracer)] if tracer is not None and tracer.exports else []
    bound = await bound_server(peer, listen, tls=tls, interceptors=traced)
    async with grpc_server(bound, register, service_names=service_names, grace_s=_GRACE_S) as server:
        for name in ("", *service_names):
            await server.set_health(name, serving=True)
        yield server


async def join_board(path: Path, name: str) -> None:
    """Attaches to the signal board at `path` until cancelled, and again when the board is replaced."""
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


async def _take_part(board: SignalBoard, me: ParticipantWriter) -> None:
    """Sends heartbeats and acknowledges emergencies. A reference peer has no background work that a halt would stop."""
    limiter = anyio.CapacityLimiter(1)
    while board.current:
        seen = board.bell  # read before the signals, so that a later one ends the wait
        me.beat()
        effective = board.effective()
        if effective is not None and effective.signal_id != me.record.acknowledged_id:
            me.acknowledge(effective.signal_id)
            _log.warning(
                "emergency_acknowledged",
                emergency_level=level_name(effective.level),
                reason=effective.reason,
                origin=effective.origin,
            )
        await anyio.to_thread.run_sync(board.wait, seen, _HEARTBEAT_S, abandon_on_cancel=True, limiter=limiter)


async def _stop_at_end_of_stdin(serving: anyio.CancelScope) -> None:
    """Cancels `serving` at the end of standard input: a pipe ends with the process at its other end, even if killed."""
    stdin, text = sys.stdin.fileno(), b" "
    with suppress(PermissionError):  # a regular file or /dev/null cannot be polled and counts as ended
        while text:
            await anyio.wait_readable(stdin)
            text = os.read(stdin, 4096)
    _log.info("stopping", why="standard input ended")
    serving.cancel()
