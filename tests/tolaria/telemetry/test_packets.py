from __future__ import annotations

import itertools
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from prometheus_client import CollectorRegistry, Histogram
from structlog.testing import capture_logs

from leyline.v1 import enums_pb2 as enums
from leyline.v1.admin_service_pb2 import TELEMETRY_KIND_EMERGENCY, TELEMETRY_KIND_EPOCH, TELEMETRY_KIND_EVENT
from leyline.v1.telemetry_pb2 import TelemetryPacket
from support.telemetry import Telemetry
from tolaria.telemetry import events
from tolaria.telemetry.events import EventSpec
from tolaria.telemetry.packets import EPOCHS_WAITING_MAX, points
from tolaria.telemetry.subscriptions import PacketFilter, Published, Subscription

pytestmark = pytest.mark.anyio

EVERYTHING = PacketFilter()
LEVELS = {"info": 1, "warning": 2, "error": 3, "critical": 4}
PRIORITY_NORMAL, PRIORITY_HIGH, PRIORITY_CRITICAL = 2, 3, 4
HEALTHY, DEGRADED, UNHEALTHY, CRITICAL = 1, 2, 3, 4


async def next_of(subscription: Subscription) -> Published:
    """Waits for a packet, which must come."""
    with anyio.fail_after(180):
        published = await subscription.next()
    assert published is not None
    return published


@asynccontextmanager
async def serving(it: Telemetry) -> AsyncIterator[Telemetry]:
    """Assembles the packets of epochs while the block runs."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(it.packets.serve)
        yield it
        tasks.cancel_scope.cancel()


def emit(it: Telemetry, spec: EventSpec, **given: str | float) -> None:
    """Emits an event; attributes that are not given are texts."""
    it.emitter.emit(spec, **(dict.fromkeys(spec.attributes, "x") | given))


@pytest.mark.parametrize(
    ("spec", "level", "priority", "health", "kind"),
    [
        (events.BREAKER_CLOSED, "info", PRIORITY_NORMAL, HEALTHY, TELEMETRY_KIND_EVENT),
        (events.COMMAND_REJECTED, "warning", PRIORITY_HIGH, DEGRADED, TELEMETRY_KIND_EVENT),
        (events.CHECKPOINT_FAILED, "error", PRIORITY_HIGH, DEGRADED, TELEMETRY_KIND_EVENT),
        (events.ZERO_SAMPLES, "warning", PRIORITY_HIGH, UNHEALTHY, TELEMETRY_KIND_EVENT),
        (events.EMERGENCY_HALT, "critical", PRIORITY_CRITICAL, CRITICAL, TELEMETRY_KIND_EMERGENCY),
        (events.EMERGENCY_CLEARED, "info", PRIORITY_NORMAL, HEALTHY, TELEMETRY_KIND_EMERGENCY),
        (events.HEARTBEAT_LOST, "critical", PRIORITY_CRITICAL, CRITICAL, TELEMETRY_KIND_EMERGENCY),
    ],
)
async def test_an_event_is_a_packet(spec: EventSpec, level: str, priority: int, health: int, kind: Any) -> None:
    """Level, priority and health follow from the event; the packet says where the run is."""
    it = Telemetry()
    with it.stream.subscribe(EVERYTHING) as subscription:
        emit(it, spec)
        published = await next_of(subscription)
    packet = published.packet
    assert (packet.level, packet.priority, published.kind) == (LEVELS[level], priority, kind)
    assert (packet.system_health.status, packet.system_health.summary) == (health, spec.name)
    assert packet.system_health.indicators == {"run_id": "run-1", "epoch": "2", "global_step": "30"}
    (event,) = packet.events
    assert (event.description, event.level) == (spec.name, LEVELS[level])
    assert event.attributes == dict.fromkeys(spec.attributes, "x")
    assert packet.source_subsystem == "tolaria"
    assert len({packet.packet_id, event.event_id, ""}) == 3
    assert packet.timestamp.seconds > 1_700_000_000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (7, "7"),
        (0.123456789, "0.123457"),
        (float("nan"), "nan"),
        ("a\udcffb", "a?b"),
        ("x" * 9000, "x" * 4096),
    ],
)
async def test_attributes_are_text_that_can_be_sent(value: str | float, text: str) -> None:
    """Whatever a peer has put into a message: an event never fails because of it."""
    it = Telemetry()
    with it.stream.subscribe(EVERYTHING) as subscription:
        emit(it, events.BREAKER_OPENED, breaker=value)
        assert (await next_of(subscription)).packet.events[0].attributes["breaker"] == text


async def test_a_failed_command_has_its_reason_in_the_packet() -> None:
    """So do a timeout and a rollback: the attributes of their events are in it."""
    it = Telemetry()
    with it.stream.subscribe(EVERYTHING) as subscription:
        it.emitter.emit(events.COMMAND_REJECTED, command_id="c-1", reason="stale", detail="issued 61 s ago")
        packet = (await next_of(subscription)).packet
    assert packet.events[0].attributes == {"command_id": "c-1", "reason": "stale", "detail": "issued 61 s ago"}


async def test_the_packet_of_an_epoch_has_metrics_spans_and_the_health_of_its_events() -> None:
    """All events since the last epoch count, and those of the next one no longer."""
    it = Telemetry()
    it.metrics.training_loss.set(0.5)
    it.metrics.command_rejected_total.labels("stale").inc(2)
    async with serving(it):
        with it.stream.subscribe(PacketFilter(kinds=frozenset({TELEMETRY_KIND_EPOCH}))) as subscription:
            emit(it, events.COMMAND_REJECTED)
            emit(it, events.COMMAND_REJECTED)
            emit(it, events.EMERGENCY_HALT)
            it.tracer.record(it.tracer.begin(), "tolaria.epoch", 1.5, epoch=2)
            it.packets.epoch_over()
            first = await next_of(subscription)
            it.packets.epoch_over()
            second = (await next_of(subscription)).packet
    packet = first.packet
    assert first.kind == TELEMETRY_KIND_EPOCH
    assert (packet.level, packet.priority) == (enums.TELEMETRY_LEVEL_INFO, PRIORITY_NORMAL)
    health = packet.system_health
    assert (health.status, health.summary) == (CRITICAL, "command_rejected (2), tolaria.emergency.halt")
    assert health.indicators["event.command_rejected"] == "2"
    assert value(packet, "tolaria.training.loss") == 0.5
    assert value(packet, "tolaria.command.rejected_total", reason="stale") == 2
    assert value(packet, "process_resident_memory_bytes") > 1e6
    assert value(packet, "tolaria.telemetry.subscribers") == 1
    assert [span.name for span in packet.spans] == ["tolaria.epoch"]
    assert not packet.events  # each event has a separate packet
    assert (second.system_health.status, second.system_health.summary, list(second.spans)) == (HEALTHY, "", [])


def value(packet: TelemetryPacket, name: str, **labels: str) -> float:
    """Returns the value of the metric with exactly these labels."""
    (found,) = [point.value for point in packet.metrics if point.name == name and point.attributes == labels]
    return found


async def test_nothing_is_assembled_that_no_subscriber_wants() -> None:
    """Reading all metrics takes milliseconds; without a subscriber no event becomes a packet but a critical one."""
    it, threads = Telemetry(), set[str]()

    def noted() -> float:
        threads.add(threading.current_thread().name)
        return 1.0

    it.metrics.health_ready.set_function(noted)
    async with serving(it):
        with it.stream.subscribe(PacketFilter(kinds=frozenset({TELEMETRY_KIND_EVENT}))) as subscription:
            it.packets.epoch_over()
            emit(it, events.BREAKER_CLOSED)
            await next_of(subscription)
        assert threads == set()
        with it.stream.subscribe(PacketFilter(kinds=frozenset({TELEMETRY_KIND_EPOCH}))) as subscription:
            it.packets.epoch_over()
            await next_of(subscription)
    assert len(threads) == 1
    assert threading.current_thread().name not in threads  # the event loop does not read them


async def test_epochs_that_end_faster_than_packets_are_assembled_are_dropped_and_counted() -> None:
    """The latest ones are kept."""
    it = Telemetry()
    with it.stream.subscribe(EVERYTHING) as subscription:
        for epoch in range(EPOCHS_WAITING_MAX + 3):
            it.position.epoch = epoch
            it.packets.epoch_over()
        assert it.sample("telemetry.dropped_total", priority="normal") == 3
        async with serving(it):
            assert (await next_of(subscription)).packet.system_health.indicators["epoch"] == "3"


async def test_a_packet_that_cannot_be_assembled_is_lost_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is counted, and the first is logged; the run's tasks go on, and later packets come."""
    it = Telemetry()
    collected, reads = it.metrics.collected, 0

    def broken_twice() -> object:
        nonlocal reads
        reads += 1
        if reads <= 2:
            raise ZeroDivisionError("of a metric")
        return collected()

    monkeypatch.setattr(it.metrics, "collected", broken_twice)
    with capture_logs() as logs, it.stream.subscribe(EVERYTHING) as subscription:
        async with serving(it):
            for _ in range(3):
                it.packets.epoch_over()
            assert (await next_of(subscription)).kind == TELEMETRY_KIND_EPOCH
    assert it.sample("telemetry.dropped_total", priority="normal") == 2
    assert [line["event"] for line in logs] == ["epoch_packet_lost"]


async def test_delivery_is_confirmed_once_by_the_first_of_log_and_subscribers() -> None:
    """Two subscribers confirm one event once; without any the log does, which is not written here."""
    it, confirmed = Telemetry(), list[int]()
    attributes = dict.fromkeys(events.HEARTBEAT_LOST.attributes, "x")
    it.emitter.emit(events.HEARTBEAT_LOST, lambda: confirmed.append(0), **attributes)
    assert confirmed == []
    with it.stream.subscribe(EVERYTHING, 0) as one, it.stream.subscribe(EVERYTHING, 0) as other:
        it.emitter.emit(events.HEARTBEAT_LOST, lambda: confirmed.append(1), **attributes)
        for subscription in (one, other):
            subscription.sent(await next_of(subscription))
    assert confirmed == [1]


def test_points_have_dotted_names_units_and_labels() -> None:
    """Histograms are sent as count and sum."""
    registry = CollectorRegistry()
    histogram = Histogram("tolaria.rollback.duration_seconds", "Time.", ["tier"], registry=registry, buckets=[1, 2])
    histogram.labels("fast").observe(0.5)
    found = {(point.name, point.value, point.unit) for point in points(registry.collect())}
    assert found == {
        ("tolaria.rollback.duration_seconds_count", 1, ""),
        ("tolaria.rollback.duration_seconds_sum", 0.5, "s"),
    }
    assert all(point.attributes == {"tier": "fast"} for point in points(registry.collect()))


def test_metrics_are_read_with_pauses() -> None:
    """A thread that reads them lets the event loop run in between, also within a metric of many series."""
    it, pauses = Telemetry(), list[int]()
    for number in range(3000):
        it.metrics.seed_weight.labels(f"seed-{number}", "training").set(1)
    samples = 0

    def pause(_seconds: float) -> None:
        pauses.append(samples)

    for family in it.metrics.collected(pause):
        for _ in family.samples:
            samples += 1
            time.sleep(1e-6)  # what an encoder does with it
    assert samples > 3000
    between = [later - earlier for earlier, later in itertools.pairwise([0, *pauses, samples])]
    assert max(between) < 1000
