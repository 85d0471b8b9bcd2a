from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import anyio
import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.state_pb2 import SystemStatePacket
from support.peers import FakeKasmina, FakeTamiyo, serving
from support.runs import FakePeers, new_run, running
from tolaria.checkpoint.storage import Storage, open_storage
from tolaria.checkpoint.store import Retention
from tolaria.checkpoint.writer import CheckpointWriter
from tolaria.config import Settings, load_settings
from tolaria.grpc_server import GrpcServer, bound_server
from tolaria.journal.rows import RunRow
from tolaria.service.foundation import Foundation, LaneBuild, build_lane
from tolaria.service.host import Host
from tolaria.service.listeners import with_metrics
from tolaria.service.protection import protected
from tolaria.service.readiness import publish_health
from tolaria.signals import SignalBoard
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.logging import LogContext
from tolaria.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio


async def no_command(_state: SystemStatePacket) -> AdaptationCommand | None:
    """The answer of a controller that asks for nothing."""
    return None


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Puts back the handlers of signals: a service leaves its own until its process ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


async def serve(job: str, target: str, folder: Path) -> int:
    """Runs a whole service around this job on the test's event loop; returns the exit code."""
    overrides = [
        f"training.job=support.jobs:{job}",
        "training.epochs=2",
        "training.device=cpu",
        "service.exit_when_done=true",
        "server.listen=127.0.0.1:0",
        "metrics.listen=127.0.0.1:0",
        f"tamiyo.target={target}",
        f"kasmina.target={target}",
        f"state.dir={folder / 'state'}",
        f"signals.path={folder / 'board'}",
    ]
    with ThreadPoolExecutor(1) as pool:  # as the service does it: before there is an event loop
        settings = pool.submit(load_settings, None, overrides).result()
        build = pool.submit(build_lane, settings).result()
        board = pool.submit(SignalBoard.create, settings.signals.board("test"), "test").result()
        storage = pool.submit(
            open_storage, folder / "state", run_id="test", retention=Retention(last=3, best="highest")
        ).result()
        writer = CheckpointWriter(storage.checkpoints)
        foundation = new_foundation(settings, build, board, storage, writer)
        admin = await bound_server("the server", settings.server.listen)
        listeners = pool.submit(with_metrics, admin, settings.metrics.listen, protected(settings, Metrics())).result()
        host = pool.submit(Host, foundation, listeners).result()
        code = await host.serve()
        pool.submit(board.close, unlink=True).result()
        pool.submit(writer.__exit__, None, None, None).result()
        pool.submit(storage.journal.close).result()
    return code


def new_foundation(
    settings: Settings, build: LaneBuild, board: SignalBoard, storage: Storage, writer: CheckpointWriter
) -> Foundation:
    """Returns that of a new run."""
    return Foundation(
        settings=settings,
        build=build,
        board=board,
        storage=storage,
        writer=writer,
        run=RunRow("test", 0, settings.training.job),
        active_halt=None,
        metrics=Metrics(),
        emitter=Emitter(),
        log_context=LogContext(),
    )


@pytest.mark.parametrize(("job", "code"), [("TinyJob", 0), ("LateCrashJob", 1)])
async def test_a_service_leaves_no_tasks_and_threads(job: str, code: int, tmp_path: Path) -> None:
    """Neither after a finished run nor after a failed one; no call blocks the event loop meanwhile."""
    async with serving(FakeTamiyo(no_command), FakeKasmina()) as target:
        await serve("TinyJob", target, tmp_path)  # creates what exists once per process: thread pools, gRPC
        tasks_before, threads_before = asyncio.all_tasks(), set(threading.enumerate())
        assert await serve(job, target, tmp_path) == code
        # The fake peers' own server takes each call in a new task.
        left = {t for t in asyncio.all_tasks() - tasks_before if not t.done() and "AioServer" not in repr(t)}
        assert left == set()
        assert [t.name for t in set(threading.enumerate()) - threads_before if "tolaria" in t.name] == []


class SlowHealth:
    """A server whose `set_health` returns once the test lets it proceed."""

    def __init__(self) -> None:
        self.serving: dict[str, bool] = {}
        self.called, self.proceed = anyio.Event(), anyio.Event()

    async def set_health(self, service: str, *, serving: bool) -> None:
        self.serving[service] = serving
        if not service:  # the service as a whole
            self.called.set()
            await self.proceed.wait()


async def test_a_change_while_health_is_published_is_published_too() -> None:
    """The last value published is the present one, also when nothing changes afterwards."""
    run, health = new_run(FakePeers(), job="GatedJob"), SlowHealth()
    async with running(run), anyio.create_task_group() as tasks:
        await run.until(lambda: run.state == "RUNNING")
        run.core.lifecycle.halt("not ready")
        tasks.start_soon(publish_health, run.core, cast("GrpcServer", health))
        await health.called.wait()
        assert health.serving[""] is False
        await run.run.resume("ready")
        health.proceed.set()
        await run.until(lambda: health.serving[""])
        tasks.cancel_scope.cancel()
        run.job.passes.release(1000)
