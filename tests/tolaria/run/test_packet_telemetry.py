"""Spans and packets of runs; the golden names are those that dashboards and readers of packets rely on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from leyline.v1.admin_service_pb2 import TELEMETRY_KIND_EPOCH
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import (
    COMMAND_STRUCTURAL_PRUNING,
    EMERGENCY_LEVEL_CONSERVATIVE,
    ROLLBACK_TIER_FAST,
    SEED_STAGE_TRAINING,
)
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from leyline.v1.telemetry_pb2 import TelemetryPacket, TraceSpan
from support.peers import command
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.config import ControlSettings
from tolaria.rollback.protocol import Rollback
from tolaria.telemetry.subscriptions import PacketFilter, Published
from tolaria.values.optimization import OPERATOR
from tolaria.values.spans import SpanContext, within

pytestmark = pytest.mark.anyio

GOLDEN = Path(__file__).parents[2] / "fixtures" / "packets.json"


class Received:
    """All packets of a run."""

    def __init__(self) -> None:
        self.published: list[Published] = []

    @property
    def epochs(self) -> list[TelemetryPacket]:
        """The packets of epochs."""
        return [one.packet for one in self.published if one.kind == TELEMETRY_KIND_EPOCH]

    @property
    def events(self) -> set[str]:
        """Names of all events."""
        return {event.description for one in self.published for event in one.packet.events}

    @property
    def spans(self) -> list[TraceSpan]:
        """All spans."""
        return [span for packet in self.epochs for span in packet.spans]

    def span(self, name: str) -> TraceSpan:
        """Returns the first span of that name."""
        return next(span for span in self.spans if span.name == name)


@asynccontextmanager
async def receiving(run: RunUnderTest) -> AsyncIterator[Received]:
    """Runs it, and receives its packets, while the block runs."""
    received = Received()

    async def receive() -> None:
        with run.core.telemetry.subscribe(PacketFilter()) as subscription:
            while (published := await subscription.next()) is not None:
                received.published.append(published)

    async with running(run), anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        yield received
        run.core.telemetry.close()


async def refused(state: SystemStatePacket) -> AdaptationCommand | None:
    """Asks for what is not supported, in the first epoch."""
    return command(COMMAND_STRUCTURAL_PRUNING) if state.current_epoch == 1 else None


async def test_no_name_of_the_golden_packets_is_missing() -> None:
    """Metrics with their labels and units, events with their attributes, spans: a deterministic run has at least them.

    New names need no change of tests/fixtures/packets.json. If it is missing it is written, and the test fails.
    """
    seed = SeedState(seed_id="a", stage=SEED_STAGE_TRAINING, blueprint_id="residual_mlp")
    run = new_run(FakePeers(refused, [seed]), job="SeedIdsJob", epochs=10**6, deterministic=True)
    async with receiving(run) as received:
        await run.until(lambda: any(has_seeds(packet) for packet in received.epochs))
        await run.run.roll_back(Rollback(ROLLBACK_TIER_FAST, None, "practice", OPERATOR))
        await run.safety.raise_emergency(EMERGENCY_LEVEL_CONSERVATIVE, "smoke", run.status)
        await run.until(lambda: "tolaria.conservative_mode_cleared" in received.events)
        count = len(received.epochs)
        await run.until(lambda: len(received.epochs) > count)
        await run.run.stop("enough")
    found = {
        "metrics": sorted({shape(packet, name) for packet in received.epochs for name in range(len(packet.metrics))}),
        "events": sorted(
            {f"{e.description}: {', '.join(sorted(e.attributes))}" for p in received.published for e in p.packet.events}
        ),
        "spans": sorted({span.name for span in received.spans}),
    }
    if not await anyio.Path(GOLDEN).exists():
        await anyio.Path(GOLDEN).write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{GOLDEN} was missing and has been written: review it")
    golden = json.loads(await anyio.Path(GOLDEN).read_text())
    assert {kind: sorted(set(golden[kind]) - set(found[kind])) for kind in golden} == {kind: [] for kind in golden}
    assert len(golden["metrics"]) > 200


def has_seeds(packet: TelemetryPacket) -> bool:
    """Whether a packet has the metrics of a seed."""
    return any(metric.name == "tolaria.grad_agg.seed.alpha" for metric in packet.metrics)


def shape(packet: TelemetryPacket, index: int) -> str:
    """Returns name, labels and unit of a metric."""
    metric = packet.metrics[index]
    labels = ",".join(f"{key}={value}" for key, value in sorted(metric.attributes.items()))
    return f"{metric.name}{{{labels}}} {metric.unit}".rstrip()


async def test_the_spans_of_an_epoch_are_one_trace() -> None:
    """The boundary is a child of the epoch, and ends with it."""
    run = new_run(FakePeers(), epochs=2)
    async with receiving(run) as received:
        await run.until(lambda: run.state == "FINISHED" and len(received.epochs) == 2)
    epoch, boundary = received.span("tolaria.epoch"), received.span("tolaria.boundary")
    assert epoch.parent_span_id == ""
    assert boundary.parent_span_id == epoch.span_id
    assert boundary.attributes["trace_id"] == epoch.attributes["trace_id"]
    assert epoch.attributes["epoch"] == boundary.attributes["epoch"] == "1"
    assert epoch.start_time.ToNanoseconds() < boundary.start_time.ToNanoseconds()
    assert "error" not in epoch.attributes
    assert len({span.attributes["trace_id"] for span in received.spans}) == 2  # one for each epoch


async def test_a_boundary_over_budget_has_failed() -> None:
    """The span says so, with its budget."""
    control = ControlSettings(boundary_budget_ms=0.001, tamiyo_budget_ms=0.001, boundary_slack_ms=0.001)

    async def late(_state: SystemStatePacket) -> AdaptationCommand | None:
        await anyio.sleep(0.05)
        return None

    run = new_run(FakePeers(late), epochs=1, control=control)
    async with receiving(run) as received:
        await run.until(lambda: run.state == "FINISHED" and bool(received.epochs))
    assert received.span("tolaria.boundary").attributes["error"] == "over budget"
    assert {"epoch_hook_latency_high", "tolaria.epoch_budget_exceeded"} <= received.events
    health = received.epochs[0].system_health
    assert (health.status, health.indicators["event.epoch_hook_latency_high"]) == (2, "1")


async def test_a_rollback_belongs_to_the_trace_of_its_request() -> None:
    """An operator's request may come with a trace; the epoch that was left has failed."""
    run = new_run(FakePeers(), epochs=10**6, options={"samples": 2000})  # so that the pause is within an epoch
    caller = SpanContext("a" * 32, "b" * 16)
    async with receiving(run) as received:
        await run.until(lambda: run.status.global_step > 0)
        await run.run.pause("look")
        with within(caller):
            await run.run.roll_back(Rollback(ROLLBACK_TIER_FAST, None, "practice", OPERATOR))
        await run.run.resume("seen")
        await run.until(lambda: len(received.epochs) > 0)
        await run.run.stop("enough")
    rollback = received.span("tolaria.rollback")
    assert (rollback.attributes["trace_id"], rollback.parent_span_id) == (caller.trace_id, caller.span_id)
    assert (rollback.attributes["outcome"], rollback.attributes["origin"]) == ("restored", "operator")
    left = [span for span in received.spans if span.attributes.get("error") == "rolled back"]
    assert [span.name for span in left] == ["tolaria.epoch"]


async def test_a_checkpoint_belongs_to_its_epoch() -> None:
    """Its span has its step and size."""
    run = new_run(FakePeers(), epochs=10**6, sections={"checkpoint": {"every_epochs": 0, "every_steps": 3}})
    async with receiving(run) as received:
        await run.until(lambda: any(span.name == "tolaria.checkpoint" for span in received.spans))
        await run.run.stop("enough")
    checkpoint = received.span("tolaria.checkpoint")
    epochs = {span.span_id for span in received.spans if span.name == "tolaria.epoch"}
    assert checkpoint.parent_span_id in epochs
    assert int(checkpoint.attributes["size_bytes"]) > 0
