"""The status page of a run that is made up, served from a thread: with much of everything, and names with markup."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial

import anyio
import anyio.to_thread
from anyio.from_thread import start_blocking_portal

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1 import enums_pb2 as enums
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from support.runs import FakePeers, RunUnderTest, new_run
from tolaria.config import ControlSettings
from tolaria.images import SnapshotInfo
from tolaria.journal.rows import CheckpointRow, EmergencyRow, FaultRow, RollbackRow
from tolaria.lane.messages import StepDone
from tolaria.rollback.protocol import Rollback
from tolaria.security.watched import WatchedFiles
from tolaria.security.web_config import WebConfig
from tolaria.status_page.history import Mark
from tolaria.status_page.site import StatusPage
from tolaria.telemetry.exporter import Readiness, exporter
from tolaria.telemetry.web_server import WebGuard
from tolaria.values.training import Position, RankInfo

MARKUP = "<script>alert(1)</script>"
IMAGE = "<img src=x onerror=alert(1)>"
STEPS, PER_EPOCH = 1_000_000, 20_000
SPIKE_AT, SPIKE = 640_123, 9.5
_HOUR_NS = 3_600_000_000_000


class MadeUp:
    """The page, its run, and the loop that serves it."""

    def __init__(self, url: str, run: RunUnderTest, closing: anyio.Event) -> None:
        self.url, self.run, self._closing = url, run, closing
        self.call: Callable[..., object] = lambda *_: None
        """Calls a function on the loop that serves the page."""

    def stop(self) -> None:
        """Ends the streams as a service does that stops."""
        self.call(self._closing.set)


@contextmanager
def made_up_page(
    *,
    viewers_max: int = 8,
    port: int = 0,
    config: WatchedFiles[WebConfig] | None = None,
    stride: int = 1000,
    control: ControlSettings | None = None,
) -> Iterator[MadeUp]:
    """Serves the page while the block runs. The loss has a value every `stride` steps."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(
            _served(viewers_max, port, config, partial(_made_up_run, stride, control))
        ) as page,
    ):
        page.call = portal.call
        yield page


@asynccontextmanager
async def _served(
    viewers_max: int, port: int, config: WatchedFiles[WebConfig] | None, make: Callable[[], RunUnderTest]
) -> AsyncIterator[MadeUp]:
    run = await anyio.to_thread.run_sync(make)
    closing = anyio.Event()
    made = partial(
        StatusPage, run.core.page, run.journal, run.metrics, closing=closing, viewers_max=lambda: viewers_max
    )
    page = await anyio.to_thread.run_sync(made)
    guard = WebGuard(config, run.metrics, 64)
    with socket.create_server(("127.0.0.1", port)) as bound:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/"
        async with (
            exporter([bound], run.metrics, lambda: Readiness([], []), guard, page.routes()),
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(page.follow_journal)
            yield MadeUp(url, run, closing)
            closing.set()
            tasks.cancel_scope.cancel()


def _made_up_run(stride: int, control: ControlSettings | None) -> RunUnderTest:
    run = new_run(FakePeers(), control=control, run_name=f"vision {MARKUP}", tags={"team": IMAGE}, epochs=60)
    now_ns = time.time_ns()
    rows = (
        RollbackRow(
            "r1", now_ns, "run", "fast", 820_000, 800_000, "restored", f"loss 1e9 {MARKUP}", "d", "d", 12.5, 1, "health"
        ),
        EmergencyRow("e1", now_ns - _HOUR_NS, "run", "elevated", "tamiyo", 500_000, f"breaker open: {IMAGE}", now_ns),
        FaultRow("f1", now_ns - 2 * _HOUR_NS, "run", "lane_lost", 400_000, "crashed", f"SIGSEGV in {MARKUP}"),
    )
    for row in rows:
        run.storage.journal.put(row)
    for number in range(5):
        step = 20_000 * (46 + number)
        point = CheckpointRow(
            f"{step:012}-abcd", now_ns, "run", step, 46 + number, 48_000_000, "d", None, proven=number < 4
        )
        run.storage.journal.put(point)
    _fill(run, stride)
    return run


def _fill(run: RunUnderTest, stride: int) -> None:
    """Fills the history as a million steps do."""
    status, history = run.status, run.core.history
    history.device, history.first_step = "cuda:0 (NVIDIA H200)", 0
    loss, own = history.curves["loss"], {"grad.noise": 0.0}
    for step in range(1, STEPS + 1, stride):
        noise = ((step * 2654435761) & 1023) / 1023 - 0.5
        loss.add(step, SPIKE if step == SPIKE_AT else 0.4 + 2.2 * math.exp(-step / 150_000) + 0.12 * noise)
    for epoch in range(1, STEPS // PER_EPOCH + 1):
        step, gone = epoch * PER_EPOCH, math.exp(-epoch / 9)
        history.curves["validation_loss"].add(step, 0.55 + 1.9 * gone + 0.03 * math.sin(epoch))
        history.curves["accuracy"].add(step, 0.93 - 0.6 * gone + 0.006 * math.sin(3 * epoch))
        history.curves["boundary_ms"].add(step, 6 + 3 * math.sin(epoch) + (21 if epoch == 25 else 0))
        status.boundaries_ms.append(6 + 3 * math.sin(epoch))
        status.global_step = step
        history.on_learning_rates(
            {"host": 0.5e-3 * (1 + math.cos(epoch / 17)), **({f"seed:{IMAGE}": 1e-4} if epoch > 20 else {})}
        )
        own["grad.noise"] = 1 + gone
        history.on_step(replace(_STEP, global_step=step, logged=dict(own)))
        history.on_seeds(_seeds(epoch, step))
        history.seeds.advance(step)
    history.on_rollback_started(Rollback(enums.ROLLBACK_TIER_FAST, None, "loss 1e9", "health"))
    history.marks.append(Mark("lane", 400_000, 399_990, 0, f"crashed: SIGSEGV in {MARKUP}"))
    history.marks.append(Mark("rollback", 820_000, 800_000, 0, f"health: loss 1e9 {MARKUP}"))
    status.state, status.state_reason = admin.RUN_STATE_RUNNING, ""
    status.epoch, status.steps_per_epoch, status.best_step = 50, PER_EPOCH, STEPS
    status.sums.steps, status.sums.loss_sum, status.sums.samples, status.sums.duration_s = (
        12_345,
        5200.0,
        790_080,
        310.0,
    )
    status.logged, status.boundaries_over_budget, status.rollbacks_by_origin = own, 1, {"health": 1}
    status.learning_rates = {"host": 1.2e-4, f"seed:{IMAGE}": 1e-4}
    status.tamiyo_answer, status.kasmina_answer, status.newest_proven_step = (
        "no change",
        f"2 seeds desired {MARKUP}",
        980_000,
    )
    status.ranks = tuple(
        RankInfo(rank, f"gpu-{rank // 4}", 4000 + rank, f"cuda:{rank % 4}", rank // 4) for rank in range(8)
    )
    status.snapshots = tuple(
        SnapshotInfo(Position(step, step // PER_EPOCH), 48_000_000, "d", time.time_ns())
        for step in (960_000, 980_000, 999_000)
    )


_STEP = StepDone(1, 1, math.nan, 1.0, 64, 0.02, 0.001, 0.0)


def _seeds(epoch: int, step: int) -> list[SeedState]:
    """A seed that becomes a part of the host, one that blends, and one that is culled."""
    stages = {8: "GERMINATED", 10: "TRAINING", 16: "BLENDING", 24: "SHADOWING", 28: "PROBATIONARY", 34: "FOSSILIZED"}
    later = {22: "GERMINATED", 24: "TRAINING", 40: "BLENDING"}
    culled = {14: "TRAINING", 19: "CULLED", 22: "EMBARGOED", 26: "DORMANT"}
    plans = (
        ("seed-1", "lora", "layer2", stages, (16 * PER_EPOCH, 8 * PER_EPOCH)),
        (f"seed-2 {MARKUP}", "residual_mlp", "layer3", later, (40 * PER_EPOCH, 14 * PER_EPOCH)),
        (IMAGE, "bottleneck_adapter", "layer1", culled, (0, 0)),
    )
    found = []
    for seed_id, blueprint, slot, plan, (begin, lasts) in plans:
        name = next((plan[at] for at in sorted(plan, reverse=True) if epoch >= at), "")
        if name:
            ramp = AlphaSchedule(start=0.0, end=1.0, begin_step=begin, duration_steps=lasts) if lasts else None
            alpha = min(1.0, max(0.0, (step - begin) / lasts)) if lasts else 0.0
            stage = enums.SeedLifecycleStage.Value(f"SEED_STAGE_{name}")
            metrics = {"alpha": alpha, "share": 0.2}
            found.append(
                SeedState(seed_id=seed_id, stage=stage, blueprint_id=blueprint, slot=slot, alpha=ramp, metrics=metrics)
            )
    return found
