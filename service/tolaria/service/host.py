"""Serves a run: starts everything in order, runs the one task group, drains on a signal, stops everything."""

from __future__ import annotations

import math
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, nullcontext
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
import grpc.aio
import structlog
from anyio.abc import TaskGroup

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import add_TolariaAdminServiceServicer_to_server
from tolaria.config import NotifySocket, PeerSettings, child_environment
from tolaria.emergency.supervision import watch_board, watch_process
from tolaria.errors import TolariaError
from tolaria.grpc_server import GrpcServer, grpc_server
from tolaria.peers.connect import Peer, Peers, connected_peers
from tolaria.reference.embedded import EmbeddedPeer, embedded_peers
from tolaria.rpc.admin import AdminParts, AdminService
from tolaria.rpc.audit import AuditTrail
from tolaria.run.resume import RunOutcome
from tolaria.run.status import state_name
from tolaria.service.foundation import Foundation
from tolaria.service.listeners import Listeners
from tolaria.service.notify import Notifier
from tolaria.service.readiness import (
    ADMIN_SERVICE,
    publish_health,
    publish_not_ready,
    publish_phase,
    readiness,
    watch_disk,
)
from tolaria.service.reload import Reload, has_terminal
from tolaria.service.wiring import Core, RunService, new_ledger, new_run
from tolaria.status_page.site import StatusPage
from tolaria.telemetry.exporter import exporter

# Shares of service.drain_timeout_s: the lane's step, RPCs in flight, child processes, the journal, calls to peers, and
# what is being written after the last checkpoint.
_LANE_SHARE, _CALLS_SHARE, _CHILDREN_SHARE, _FLUSH_SHARE, _PEERS_SHARE, _WRITER_SHARE = 0.5, 0.2, 0.1, 0.05, 0.05, 0.05
_LANE_JOIN_S: Final = 1.0
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Host:
    """One service around one run. Used on the event loop only, except for its construction."""

    def __init__(self, foundation: Foundation, listeners: Listeners) -> None:
        self._foundation = foundation
        self._listeners = listeners
        self._settings = foundation.settings
        self._notifier = Notifier(NotifySocket.take())  # before the environment of child processes is read
        self._core = Core(foundation)
        self._log = structlog.get_logger()
        self._reload = Reload(
            self._settings,
            foundation.reread,
            listeners.protection,
            foundation.emitter,
            metrics=foundation.metrics,
            run_id=self._core.status.run_id,
        )
        self._admin: AdminService | None = None
        self._had_terminal = has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
        self._metrics_address = str(listeners.metrics_address)
        self._drain_until_s = math.inf
        self._drained = anyio.Event()
        self._closing = anyio.Event()
        guard = listeners.protection.guard
        self._page = StatusPage(
            self._core.page,
            self._core.journal,
            foundation.metrics,
            closing=self._closing,
            viewers_max=lambda: min(self._settings.metrics.viewers_max, guard.connections_max // 2),
        )
        self._refused: TolariaError | None = None
        self.ending: RunOutcome | None = None
        """How the run left this process; None until then."""

    async def serve(self) -> int:
        """Starts everything, trains, stops everything; returns the exit code.

        Signals are received as long as there is anything to stop: one that comes then does not end the process.
        """
        with ExitStack() as receivers:
            return await self._serve(receivers)

    async def _serve(self, receivers: ExitStack) -> int:
        status = self._core.status
        async with AsyncExitStack() as stack:
            publish_phase(self._core)
            await stack.enter_async_context(self._exporter())
            await stack.enter_async_context(self._core.tracking.serve(self._left_s))
            if self._core.process is not None:
                lane_tasks = await stack.enter_async_context(anyio.create_task_group())
                stack.callback(self._core.process.abandon)
                lane_tasks.start_soon(self._core.process.serve)
            embedded = await stack.enter_async_context(self._embedded_peers())
            stack.callback(self._extend_stop, embedded)
            peers = await stack.enter_async_context(self._connected_peers(embedded))
            service = new_run(self._core, peers)
            self._reload.parts = service.live
            operations = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(operations.cancel_scope.cancel)
            server = await stack.enter_async_context(self._admin_server(service, operations))
            stack.push_async_callback(self._end_lane)
            # Before the log says so: until now a signal interrupts the event loop.
            receivers.callback(_ignore_signals)
            signals = receivers.enter_context(anyio.open_signal_receiver(*_SIGNALS))
            self._log.info(
                "serving",
                grpc=str(server.address),
                metrics=self._metrics_address,
                page=self._page_address(),
                run_id=status.run_id,
            )
            await self._train(service, server, signals)
            self._notifier.stopping(self._in_one_line())
            if self._refused is None:
                self.ending = service.run.ending
        if self._refused is not None:
            self.ending = "failed"
            raise self._refused
        state, reason = state_name(status.state), status.state_reason
        self._log.info("stopped", state=state, outcome=self.ending, reason=reason)
        if status.state != admin.RUN_STATE_FINISHED:
            return 1
        return self._reload.in_force.service.exit_code_drained if self.ending == "drained" else 0

    async def _train(self, service: RunService, server: GrpcServer, signals: AsyncIterator[signal.Signals]) -> None:
        """Runs the task group of the run."""
        core = self._core
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._handle_signals, tasks, signals)
            tasks.start_soon(self._drain_when_asked, tasks, service, server)
            tasks.start_soon(watch_board, self._foundation.board, core.safety.controller)
            tasks.start_soon(publish_health, core, server)
            tasks.start_soon(self._listeners.protection.keep_current)
            # A lane of this process starts after every child process: it forks when the job does.
            await tasks.start(watch_process, self._settings, self._foundation.board, core.heartbeats)
            tasks.start_soon(watch_disk, core)
            tasks.start_soon(self._page.follow_journal)
            tasks.start_soon(self._notifier.serve, self._in_one_line)
            try:
                built = await service.open(core)
            except TolariaError as error:  # the lane cannot be built
                self._refused, built = error, False
                tasks.cancel_scope.cancel()
            if built:
                await service.serve(core, tasks)
            if not self._settings.service.exit_when_done:
                await self._drained.wait()
            tasks.cancel_scope.cancel()

    def _page_address(self) -> str:
        """The address of the status page; empty without one."""
        scheme = self._listeners.protection.guard.scheme
        return f"{scheme}://{self._metrics_address}/" if self._page.routes() else ""

    def _in_one_line(self) -> str:
        """What the run does, as the service manager shows it."""
        status = self._core.status
        state = "recovering" if status.recovering else state_name(status.state)
        reason = f": {status.state_reason}" if status.state_reason else ""
        epochs, steps = (f" of {count}" if count else "" for count in (status.epochs, status.steps))
        return f"{state}, epoch {status.epoch}{epochs}, step {status.global_step}{steps}{reason}"

    async def _handle_signals(self, tasks: TaskGroup, signals: AsyncIterator[signal.Signals]) -> None:
        """Has the service drain or read its settings again; a second signal to drain stops at once."""
        status = self._core.status
        async for received in signals:
            if received is signal.SIGHUP and not (self._had_terminal and not has_terminal()):
                if self._admin is not None:
                    tasks.start_soon(self._admin.reload_on_signal, received.name)
                continue
            if status.draining:
                self._log.warning("draining_cut_short", signal=received.name)
                self._drain_until_s = anyio.current_time()
                tasks.cancel_scope.cancel()
                return
            status.draining = received.name
            self._core.lifecycle.changed()

    async def _drain_when_asked(self, tasks: TaskGroup, service: RunService, server: GrpcServer) -> None:
        """Finishes the step and stops, within a share of the drain timeout: by a signal, or a call of Shutdown.

        Before anything ends, probes learn that the service is not ready, and new operations are refused.
        """
        core = self._core
        await core.status.feed.until(lambda: bool(core.status.draining))
        self._log.info("draining", reason=core.status.draining)
        now_s, step_s = anyio.current_time(), _LANE_SHARE * self._settings.service.drain_timeout_s
        self._drain_until_s = now_s + self._settings.service.drain_timeout_s
        tasks.cancel_scope.deadline = now_s + step_s
        self._notifier.stopping(self._in_one_line())
        await publish_not_ready(server)
        if core.process is not None:
            core.process.drained = True  # the run is to be continued
        await service.run.drain(step_s / 2)
        self._drained.set()

    def _extend_stop(self, embedded: Mapping[Peer, EmbeddedPeer]) -> None:
        """Gives the peers, just before they stop, what is left of the drain timeout: a busy machine needs more time."""
        for peer in embedded.values():
            peer.stop_timeout_s = max(peer.stop_timeout_s, self._left_s())

    def _left_s(self) -> float:
        """Returns what is left of the drain timeout for child processes."""
        drain_s = self._settings.service.drain_timeout_s
        return min(self._drain_until_s - anyio.current_time(), drain_s) - (_FLUSH_SHARE + _WRITER_SHARE) * drain_s

    async def _end_lane(self) -> None:
        """Ends the lane's thread and the streams, just before the servers stop."""
        with anyio.CancelScope(shield=True):
            ended = await anyio.to_thread.run_sync(self._core.lane.close, _LANE_JOIN_S)
            if self._core.process is not None:
                self._core.process.abandon()
            drain_s = self._settings.service.drain_timeout_s
            await self._core.journal.flush(_FLUSH_SHARE * drain_s)
            if self._core.status.draining:  # otherwise leaving the writer's context waits for it
                written = await anyio.to_thread.run_sync(self._foundation.writer.close, _WRITER_SHARE * drain_s)
                if not written:
                    self._log.error("checkpoint_left_behind", detail="the disk did not answer in time")
        if not ended and self._refused is None:
            self._log.error("lane_stuck", detail="a microbatch or an evaluation did not end in time")
        self._closing.set()
        self._core.telemetry.close()
        self._core.lifecycle.changed()

    def _exporter(self) -> AbstractAsyncContextManager[None]:
        core, listeners = self._core, self._listeners
        metrics, guard = self._foundation.metrics, listeners.protection.guard
        return exporter(listeners.metrics, metrics, lambda: readiness(core), guard, self._page.routes())

    def _admin_server(self, service: RunService, operations: TaskGroup) -> AbstractAsyncContextManager[GrpcServer]:
        settings, core = self._settings, self._core
        audit = AuditTrail(core.journal, core.status)
        self._listeners.protection.interceptor.on_denied = audit.denied

        def register(server: grpc.aio.Server) -> None:
            parts = AdminParts(
                run=service.run,
                status=core.status,
                points=self._foundation.points,
                safety=core.safety,
                journal=core.journal,
                ledger=new_ledger(core, operations),
                audit=audit,
                complete=self._complete,
                closing=self._closing,
                telemetry=core.telemetry,
                reload=self._reload.carry_out,
                interval_s=settings.server.status_interval_ms / 1000,
                state_dir=Path(settings.state.dir),
            )
            self._admin = AdminService(parts)
            add_TolariaAdminServiceServicer_to_server(self._admin, server)

        return grpc_server(
            self._listeners.admin,
            register,
            service_names=[ADMIN_SERVICE],
            grace_s=_CALLS_SHARE * settings.service.drain_timeout_s,
        )

    def _complete(self, status: admin.GetStatusResponse) -> None:
        status.metrics_address = self._metrics_address
        training, control = self._settings.training, self._reload.in_force.control
        status.run_name = training.run_name
        status.tags.update(training.tags)
        status.boundary_budget_ms = control.boundary_budget_ms if control.enabled else 0.0

    def _embedded_peers(self) -> AbstractAsyncContextManager[Mapping[Peer, EmbeddedPeer]]:
        """The reference peers for which no target is set."""
        settings = self._settings
        targets: dict[Peer, str] = {"tamiyo": settings.tamiyo.target, "kasmina": settings.kasmina.target}
        if not settings.control.enabled:
            self._log.info("no_controller", detail="control.enabled is off: no peer is started or called")
            targets = {}
        if missing := [peer for peer, target in targets.items() if not target]:
            self._log.info("embedded_peers", peers=missing, detail="no target was given: the reference peers start")
        return embedded_peers(
            child_environment(settings),
            missing,
            board=self._foundation.board.path,
            state_dir=Path(settings.state.dir).absolute() / "peers",
            stop_timeout_s=_CHILDREN_SHARE * settings.service.drain_timeout_s,
        )

    def _connected_peers(self, embedded: Mapping[Peer, EmbeddedPeer]) -> AbstractAsyncContextManager[Peers | None]:
        if not self._settings.control.enabled:
            return nullcontext()

        def with_target(peer: Peer, settings: PeerSettings) -> PeerSettings:
            target = embedded[peer].target if peer in embedded else settings.target
            drain_s = min(settings.drain_s, _PEERS_SHARE * self._settings.service.drain_timeout_s)
            return settings.model_copy(update={"target": target, "drain_s": drain_s})

        return connected_peers(
            with_target("tamiyo", self._settings.tamiyo),
            with_target("kasmina", self._settings.kasmina),
            breakers=self._core.safeguards.breakers,
            metrics=self._foundation.metrics,
            emitter=self._foundation.emitter,
        )


def _ignore_signals() -> None:
    """Has no signal end this process before it has closed what it has opened: it is about to end."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: None)  # a function: children do not inherit it
