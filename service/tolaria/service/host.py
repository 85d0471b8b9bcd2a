"""Serves: starts everything in order, holds the one task group, drains on a signal, stops everything.

Owns the exit code. Must not hold rules, and never touches a tensor.
"""

from __future__ import annotations

import signal
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass

import anyio
import anyio.to_thread
import grpc.aio
import structlog
from anyio.abc import TaskGroup

from leyline.v1 import admin_service_pb2
from leyline.v1.admin_service_pb2 import (
    RUN_STATE_FINISHED,
    RUN_STATE_PAUSED,
    RUN_STATE_RUNNING,
    GetStatusResponse,
    RunState,
)
from leyline.v1.admin_service_pb2_grpc import add_TolariaAdminServiceServicer_to_server
from leyline.v1.enums_pb2 import CIRCUIT_STATE_OPEN
from tolaria.config import PeerSettings, child_environment
from tolaria.emergency.supervision import watch_board, watch_process
from tolaria.grpc_server import GrpcServer, grpc_server
from tolaria.peers.calls import Peer
from tolaria.peers.connect import Peers, connected_peers
from tolaria.reference.embedded import EmbeddedPair, embedded_pair
from tolaria.rollback.participants import Seat
from tolaria.rpc.admin import AdminService
from tolaria.rpc.requests import RequestLedger
from tolaria.service.parts import Parts, new_loop
from tolaria.telemetry.exporter import exporter
from tolaria.training.loop import TrainingLoop
from tolaria.training.recovery.answers import JournaledAnswers
from tolaria.training.recovery.checkpoints import CheckpointDesk
from tolaria.training.recovery.operators import RecoveryDesk
from tolaria.training.recovery.startup import RunOutcome
from tolaria.training.safeguards import KASMINA, TAMIYO
from tolaria.training.safety_desk import SafetyDesk

ADMIN_SERVICE = admin_service_pb2.DESCRIPTOR.services_by_name["TolariaAdminService"].full_name

# Shares of service.drain_timeout_s: the lane's step, calls in flight, child processes (asked, then told), the
# journal, calls to peers.
_LANE_SHARE, _CALLS_SHARE, _CHILDREN_SHARE, _FLUSH_SHARE, _PEERS_SHARE = 0.5, 0.2, 0.1, 0.05, 0.05
_WRITER_SHARE = 0.05  # what is being written after the last checkpoint has been waited for, or given up
_LANE_JOIN_S = 1.0


@dataclass(slots=True)
class _Endings:
    """What ends the service: a signal has asked for it and the run has been told; streams shall end.

    `draining` from the signal on: there is a time by which all has to be over.
    """

    asked: anyio.Event
    closing: anyio.Event
    draining: bool = False


class Host:
    """One service around one run. Used on the event loop only."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._metrics = parts.ground.metrics
        self._emitter = parts.ground.emitter
        self._progress = parts.progress
        self._feed = parts.feed
        self._board = parts.ground.board
        self._guardian = parts.guardian
        self._log = structlog.get_logger()
        self._metrics_address = ""
        self._checkpoints: CheckpointDesk | None = None
        self.ending: RunOutcome | None = None
        """How the run has left; None before."""

    async def serve(self) -> int:
        """Start everything, train, stop everything; returns the exit code."""
        settings = self._settings
        endings = _Endings(anyio.Event(), anyio.Event())
        async with AsyncExitStack() as stack:
            address = await stack.enter_async_context(
                exporter(settings.metrics.listen, self._metrics, self._reasons_not_ready)
            )
            self._metrics_address = str(address)
            pair = await stack.enter_async_context(self._embedded_peers())
            peers = await stack.enter_async_context(self._connected_peers(pair))
            seats = [Seat("tamiyo", peers.tamiyo_rollback), Seat("kasmina", peers.kasmina_rollback)]
            loop = new_loop(self._parts, controller=peers.tamiyo, executor=peers.kasmina, seats=seats)
            self._checkpoints = loop.checkpoints
            server = await stack.enter_async_context(self._admin_server(loop, endings))
            stack.push_async_callback(self._end_lane, loop, endings)
            self._log.info(
                "serving", grpc=str(server.address), metrics=self._metrics_address, run_id=self._progress.run_id
            )
            await self._train(loop, server, endings)
            self.ending = loop.ending
        state = RunState.Name(self._progress.state).removeprefix("RUN_STATE_").lower()
        self._log.info("stopped", state=state, reason=self._progress.state_reason)
        return 0 if self._progress.state == RUN_STATE_FINISHED else 1

    async def _train(self, loop: TrainingLoop, server: GrpcServer, endings: _Endings) -> None:
        """Hold the one task group around the run."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._drain_on_signal, tasks, loop, endings)
            tasks.start_soon(loop.consultant.serve)
            tasks.start_soon(loop.rollbacks.serve)
            tasks.start_soon(loop.checkpoints.serve)
            tasks.start_soon(self._parts.archive.serve)
            tasks.start_soon(watch_board, self._board, self._guardian.controller)
            tasks.start_soon(watch_process, self._settings, self._board, self._guardian.hearts)
            tasks.start_soon(self._publish_health, server)
            await loop.run()
            if not self._settings.service.exit_when_done:
                await endings.asked.wait()
            tasks.cancel_scope.cancel()

    async def _drain_on_signal(self, tasks: TaskGroup, loop: TrainingLoop, endings: _Endings) -> None:
        """First signal: finish the step and stop, within a share of the drain timeout. Second: stop at once."""
        step_s = _LANE_SHARE * self._settings.service.drain_timeout_s
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for received in signals:
                if endings.draining:
                    self._log.warning("draining_cut_short", signal=received.name)
                    tasks.cancel_scope.cancel()
                    return
                endings.draining = True
                self._log.info("draining", signal=received.name)
                tasks.cancel_scope.deadline = anyio.current_time() + step_s
                tasks.start_soon(self._drain, loop, endings, step_s / 2)

    async def _drain(self, loop: TrainingLoop, endings: _Endings, keeping_s: float) -> None:
        """Apart from the waiting for signals, so that a second one is heard."""
        await loop.keep_and_drain(keeping_s)
        endings.asked.set()

    async def _publish_health(self, server: GrpcServer) -> None:
        """Keep grpc.health.v1 in step with the run and the breakers."""
        while True:
            version = self._feed.version
            running = self._progress.state in {RUN_STATE_RUNNING, RUN_STATE_PAUSED, RUN_STATE_FINISHED}
            await server.set_health("", serving=not self._reasons_not_ready())
            await server.set_health("tolaria.training", serving=running)
            for name in (TAMIYO, KASMINA):
                serving = self._guardian.safeguards.breakers[name].state != CIRCUIT_STATE_OPEN
                await server.set_health(f"tolaria.{name}", serving=serving)
            while self._feed.version == version:  # what has changed while this was told is not missed
                await self._feed.next()

    async def _end_lane(self, loop: TrainingLoop, endings: _Endings) -> None:
        """Last thing before the servers stop: no thread is left behind, and streams end with the last status."""
        with anyio.CancelScope(shield=True):
            ended = await anyio.to_thread.run_sync(loop.close, _LANE_JOIN_S)
            drain_s = self._settings.service.drain_timeout_s
            await self._parts.archive.flush(_FLUSH_SHARE * drain_s)
            if endings.draining:  # else there is time: whoever has opened the writer waits for it
                written = await anyio.to_thread.run_sync(self._parts.ground.writer.close, _WRITER_SHARE * drain_s)
                if not written:
                    self._log.error("checkpoint_left_behind", detail="the disk did not answer in time")
        if not ended:
            self._log.error("lane_stuck", detail="a microbatch did not end in time; its thread is left to die")
        endings.closing.set()
        self._feed.changed()

    def _reasons_not_ready(self) -> list[str]:
        """Why /readyz says no. A paused or finished run answers operators as a running one does: it is ready.

        One that cannot keep its state is not, whether it trains on or stands.
        """
        kept = (
            [f"checkpoints fail: {self._checkpoints.failing}"]
            if self._checkpoints and self._checkpoints.failing
            else []
        )
        if self._parts.archive.failing:
            kept.append(f"the journal fails: {self._parts.archive.failing}")
        if self._progress.state in {RUN_STATE_RUNNING, RUN_STATE_PAUSED, RUN_STATE_FINISHED}:
            return kept
        state = RunState.Name(self._progress.state).removeprefix("RUN_STATE_").lower()
        reason = self._progress.state_reason
        return [f"the run is {state}: {reason}" if reason else f"the run is {state}", *kept]

    def _admin_server(self, loop: TrainingLoop, endings: _Endings) -> AbstractAsyncContextManager[GrpcServer]:
        settings = self._settings

        def complete(status: GetStatusResponse) -> None:
            status.metrics_address = self._metrics_address
            status.boundary_budget_ms = settings.control.boundary_budget_ms

        def register(server: grpc.aio.Server) -> None:
            service = AdminService(
                loop,
                safety=SafetyDesk(loop, self._guardian),
                recovery=RecoveryDesk(loop, self._parts.archive, self._parts.link.points),
                complete=complete,
                closing=endings.closing,
                interval_s=settings.server.status_interval_ms / 1000,
                ledger=RequestLedger(
                    settings.server.request_memory, JournaledAnswers(self._parts.archive, self._progress)
                ),
            )
            add_TolariaAdminServiceServicer_to_server(service, server)

        return grpc_server(
            "the admin server",
            settings.server.listen,
            register,
            service_names=[ADMIN_SERVICE],
            grace_s=_CALLS_SHARE * settings.service.drain_timeout_s,
        )

    def _embedded_peers(self) -> AbstractAsyncContextManager[EmbeddedPair]:
        """The reference peers that no target was given for."""
        settings = self._settings
        targets: dict[Peer, str] = {"tamiyo": settings.tamiyo.target, "kasmina": settings.kasmina.target}
        missing = [peer for peer, target in targets.items() if not target]
        if missing:
            self._log.info("embedded_peers", peers=missing, detail="no target was given: the reference peers start")
        stop_timeout_s = _CHILDREN_SHARE * settings.service.drain_timeout_s
        return embedded_pair(
            child_environment(settings), missing, board=self._board.path, stop_timeout_s=stop_timeout_s
        )

    def _connected_peers(self, pair: EmbeddedPair) -> AbstractAsyncContextManager[Peers]:
        def with_target(settings: PeerSettings, embedded: str) -> PeerSettings:
            drain_s = min(settings.drain_s, _PEERS_SHARE * self._settings.service.drain_timeout_s)
            return settings.model_copy(update={"target": settings.target or embedded, "drain_s": drain_s})

        return connected_peers(
            with_target(self._settings.tamiyo, pair.tamiyo),
            with_target(self._settings.kasmina, pair.kasmina),
            breakers=self._guardian.safeguards.breakers,
            metrics=self._metrics,
            emitter=self._emitter,
        )
