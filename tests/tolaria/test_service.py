from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import anyio
import pytest
from tolaria.service.parts import Ground, Parts
from tolaria.training.rig import Rig, build_rig

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.state_pb2 import SystemStatePacket
from support.peers import FakeKasmina, FakeTamiyo, serving
from support.runs import FakePeers, new_run, running
from tolaria.checkpoint.storage import Storage, open_storage
from tolaria.checkpoint.store import Retention
from tolaria.checkpoint.writer import CheckpointWriter
from tolaria.config import Settings, load_settings
from tolaria.grpc_server import GrpcServer
from tolaria.journal.rows import RunRow
from tolaria.service.host import Host
from tolaria.service.start import new_keeper, new_progress
from tolaria.signals import SignalBoard
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.logging import LogContext
from tolaria.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio


async def no_command(_state: SystemStatePacket) -> AdaptationCommand | None:
    """The controller that is always content."""
    return None


async def served(job: str, target: str, folder: Path) -> int:
    """The exit code of a whole service around this job, run on this test's own loop."""
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
    ]
    with ThreadPoolExecutor(1) as pool:  # as the service does it: before there is a loop
        settings = pool.submit(load_settings, None, overrides).result()
        rig = pool.submit(build_rig, settings).result()
        board = pool.submit(SignalBoard.create, settings.signals.board("test"), "test").result()
        storage = pool.submit(
            open_storage, folder / "state", run_id="test", retention=Retention(last=3, best="highest")
        ).result()
        writer = CheckpointWriter(storage.checkpoints)
        host = pool.submit(_host, settings, rig, board, storage, writer).result()
        code = await host.serve()
        pool.submit(board.close, unlink=True).result()
        pool.submit(writer.__exit__, None, None, None).result()
        pool.submit(storage.journal.close).result()
    return code


def _host(settings: Settings, rig: Rig, board: SignalBoard, storage: Storage, writer: CheckpointWriter) -> Host:
    ground = Ground(
        settings=settings,
        rig=rig,
        keeper=new_keeper(settings, rig),
        progress=new_progress(settings, rig, run_id="test"),
        board=board,
        metrics=Metrics(),
        emitter=Emitter(),
        log_context=LogContext(),
        storage=storage,
        run=RunRow("test", 0, settings.training.job),
        standing=None,
        writer=writer,
    )
    return Host(Parts(ground))


@pytest.mark.parametrize(("job", "code"), [("TinyJob", 0), ("LateCrashJob", 1)])
async def test_a_service_leaves_nothing_behind_and_blocks_nothing(job: str, code: int, tmp_path: Path) -> None:
    """After a run that went well, or failed: no task, no thread of the lane; no call blocked the loop on the way."""
    async with serving(FakeTamiyo(no_command), FakeKasmina()) as target:
        await served("TinyJob", target, tmp_path)  # what is made once for all (thread pools, gRPC) is there from now on
        tasks_before, threads_before = asyncio.all_tasks(), set(threading.enumerate())
        assert await served(job, target, tmp_path) == code
        # The fake peers' own server takes its next call by a new task each time.
        left = {t for t in asyncio.all_tasks() - tasks_before if not t.done() and "AioServer" not in repr(t)}
        assert left == set()
        assert [t.name for t in set(threading.enumerate()) - threads_before if "tolaria" in t.name] == []


class SlowHealth:
    """A server to which telling its health takes until the test says so."""

    def __init__(self) -> None:
        self.told: dict[str, bool] = {}
        self.asked, self.go = anyio.Event(), anyio.Event()

    async def set_health(self, part: str, *, serving: bool) -> None:
        self.told[part] = serving
        self.asked.set()
        await self.go.wait()


async def test_health_that_changes_while_it_is_told_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last word is how things stand, also where nothing changes afterwards."""
    run = new_run(FakePeers())
    host, health = Host(run.parts), SlowHealth()
    reasons = ["not yet"]
    monkeypatch.setattr(host, "_reasons_not_ready", lambda: reasons)
    async with running(run), anyio.create_task_group() as tasks:
        await run.loop.pause("nothing else shall change")
        tasks.start_soon(host._publish_health, cast(GrpcServer, health))
        await health.asked.wait()
        assert health.told == {"": False}
        reasons.clear()
        run.parts.feed.changed()
        health.go.set()
        await run.until(lambda: health.told[""])
        tasks.cancel_scope.cancel()
