from __future__ import annotations

import errno
import io
import json
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import anyio
import grpc
import grpc.aio
import pytest
import structlog
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1 import enums_pb2 as enums
from leyline.v1.telemetry_pb2 import MetricPoint
from support.admin import serving_run, stub_of
from support.disks import FailingDisk
from support.runs import FakePeers, RunUnderTest, new_run, running
from support.telemetry import packet_of
from tolaria.config import LoggingSettings
from tolaria.telemetry import events
from tolaria.telemetry.logging import LogContext, logging_to

pytestmark = pytest.mark.anyio


class Subscriber:
    """A client of the stream that has subscribed."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def next(self) -> admin.StreamTelemetryResponse:
        """Waits for a response, which must come."""
        with anyio.fail_after(180):
            response = await self.call.read()
        assert isinstance(response, admin.StreamTelemetryResponse)
        return response

    async def until(self, name: str) -> admin.StreamTelemetryResponse:
        """Waits for the packet of an event."""
        while True:
            response = await self.next()
            if name in {event.description for event in response.packet.events}:
                return response


@asynccontextmanager
async def subscribed(channel: grpc.aio.Channel, **wanted: Any) -> AsyncIterator[Subscriber]:
    """Subscribes, and leaves at the end of the block."""
    call = stub_of(channel).StreamTelemetry(admin.StreamTelemetryRequest(**wanted))
    try:
        with anyio.fail_after(180):
            await call.initial_metadata()
        yield Subscriber(call)
    finally:
        call.cancel()


def forever() -> RunUnderTest:
    """Returns a run that does not end by itself."""
    return new_run(FakePeers(), epochs=10**6)


async def test_a_subscriber_gets_epochs_and_events_of_a_run() -> None:
    """An epoch's packet has the metrics under their dotted names and the spans of the epoch and its boundary."""
    run = forever()
    async with running(run), serving_run(run) as channel, subscribed(channel) as subscriber:
        while (response := await subscriber.next()).kind != admin.TELEMETRY_KIND_EPOCH:
            pass
        run.safety.set_conservative(enabled=True)
        entered = await subscriber.until("tolaria.conservative_mode_entered")
        await run.run.stop("enough")
    packet = response.packet
    figures = {metric.name: metric.value for metric in packet.metrics if not metric.attributes}
    assert figures["tolaria.epochs.total"] >= 1
    assert {span.name for span in packet.spans} >= {"tolaria.epoch", "tolaria.boundary"}
    assert packet.system_health.indicators["run_id"] == "run"
    assert entered.packet.events[0].attributes["reasons"] == "operator"
    assert (entered.kind, entered.replayed, dict(entered.dropped)) == (admin.TELEMETRY_KIND_EVENT, False, {})


async def test_filters_select_packets_and_names() -> None:
    """Kinds, names and levels together."""
    run = forever()
    async with (
        serving_run(run) as channel,
        subscribed(channel, level=enums.TELEMETRY_LEVEL_WARNING) as warnings,
        subscribed(channel, name_prefixes=["tolaria.breaker"]) as breakers,
        subscribed(channel, kinds=[admin.TELEMETRY_KIND_EMERGENCY]) as emergencies,
    ):
        emitter, stream = run.core.foundation.emitter, run.core.telemetry
        emitter.emit(events.BREAKER_CLOSED, breaker="tamiyo")
        emitter.emit(events.COMMAND_REJECTED, command_id="c", reason="stale", detail="old")
        packet = packet_of("high", "x")
        packet.metrics.extend([MetricPoint(name="tolaria.breaker.state"), MetricPoint(name="tolaria.training.loss")])
        stream.publish(packet, admin.TELEMETRY_KIND_EPOCH)
        emitter.emit(events.EMERGENCY_HALT, reason="smoke", origin="operator")
        assert await names(warnings, 3) == ["tolaria.emergency.halt", "command_rejected", "x"]  # critical first
        assert await names(breakers, 1) == ["tolaria.breaker_closed"]
        reduced = (await breakers.next()).packet
        assert ([metric.name for metric in reduced.metrics], list(reduced.events)) == (["tolaria.breaker.state"], [])
        assert await names(emergencies, 1) == ["tolaria.emergency.halt"]


async def names(subscriber: Subscriber, count: int) -> list[str]:
    """Returns the first event of each of the next packets."""
    return [(await subscriber.next()).packet.events[0].description for _ in range(count)]


def wrong(**fields: Any) -> admin.StreamTelemetryRequest:
    """Returns a request with values that the generated types do not allow."""
    return admin.StreamTelemetryRequest(**fields)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (wrong(level=9), "level"),
        (wrong(minimum_priority=9), "minimum_priority"),
        (wrong(kinds=[1, 0]), "kinds"),
        (wrong(kinds=[7]), "kinds"),
        (wrong(name_prefixes=["a", ""]), "name_prefixes"),
        (wrong(name_prefixes=["x" * 257]), "name_prefixes"),
        (wrong(name_prefixes=["x"] * 65), "name_prefixes"),
    ],
)
async def test_a_wrong_filter_is_refused_with_its_field(request_: admin.StreamTelemetryRequest, field: str) -> None:
    """Nothing is filtered silently by a value that has no meaning."""
    run = forever()
    async with serving_run(run) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub_of(channel).StreamTelemetry(request_).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violations(caught.value) == [field]
    assert run.sample("tolaria.telemetry.subscribers") == 0


def violations(error: Any) -> list[str]:
    """Returns the fields that the details of an error name."""
    found = error_details_pb2.BadRequest()
    for detail in rpc_status.from_call(error).details:
        detail.Unpack(found)
    return [violation.field for violation in found.field_violations]


async def test_a_further_subscriber_than_the_limit_is_refused() -> None:
    """Until another one has left, however it left."""
    run = new_run(FakePeers(), epochs=1, sections={"telemetry": {"subscribers_max": 1}})
    async with serving_run(run) as channel:
        async with subscribed(channel):
            with pytest.raises(grpc.aio.AioRpcError, match="subscribers_max") as caught:
                await stub_of(channel).StreamTelemetry(admin.StreamTelemetryRequest()).read()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await run.until(lambda: run.sample("tolaria.telemetry.subscribers") == 0)
        async with subscribed(channel):
            pass


async def test_the_stream_ends_with_the_service() -> None:
    """After the last packets, without an error."""
    run = forever()
    async with serving_run(run) as channel, subscribed(channel) as subscriber:
        run.core.foundation.emitter.emit(events.BREAKER_CLOSED, breaker="tamiyo")
        run.core.telemetry.close()
        assert await names(subscriber, 1) == ["tolaria.breaker_closed"]
        with anyio.fail_after(180):
            assert await subscriber.call.read() is grpc.aio.EOF


async def test_a_slow_reader_loses_normal_packets_and_is_given_their_number() -> None:
    """One that does not read fills its connection, then its queue; others, and critical packets, are not affected."""
    run = new_run(FakePeers(), epochs=1, sections={"telemetry": {"queue_packets": 16}})
    async with serving_run(run) as channel, subscribed(channel) as slow, subscribed(channel) as healthy:
        for _ in range(100):
            packet = packet_of("normal", "big" * 10_000)
            run.core.telemetry.publish(packet, admin.TELEMETRY_KIND_EVENT)
            await healthy.next()
        run.core.foundation.emitter.emit(events.EMERGENCY_HALT, reason="smoke", origin="operator")
        assert (await healthy.next()).packet.priority == enums.MESSAGE_PRIORITY_CRITICAL
        dropped = run.sample("tolaria.telemetry.subscriber_dropped_total", {"priority": "normal"})
        sent = run.sample("tolaria.telemetry.sent_total", {"priority": "normal"})
        assert dropped is not None
        assert sent is not None
        assert dropped > 0
        assert sent + dropped + 16 + 1 == 200  # those that wait, and the one that is being written
        received, last = 0, await slow.next()
        while last.packet.priority != enums.MESSAGE_PRIORITY_CRITICAL:
            received, last = received + 1, await slow.next()
        for _ in range(100 - int(dropped) - received):
            last = await slow.next()
        assert dict(last.dropped) == {"normal": dropped}


class BlockedLog(io.StringIO):
    """A log whose reader does not read until `unblock` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.blocked, self.unblock = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.blocked.set()
        self.unblock.wait(60)
        return super().write(text)


@asynccontextmanager
async def logging_blocked() -> AsyncIterator[BlockedLog]:
    """Logs to a stream that has blocked on the first line."""
    log, stack = BlockedLog(), ExitStack()
    writer = logging_to(log, LoggingSettings(format="json"), LogContext(), on_dropped=lambda _: None)
    await anyio.to_thread.run_sync(stack.enter_context, writer)
    structlog.get_logger().info("blocks the writer")
    assert await anyio.to_thread.run_sync(log.blocked.wait, 10)
    try:
        yield log
    finally:
        log.unblock.set()
        await anyio.to_thread.run_sync(stack.close)


async def block_subscribers(run: RunUnderTest) -> None:
    """Publishes until nothing is sent any more: the connections of all subscribers are full."""
    before, sent = -1.0, 0.0
    while sent > before:
        before = sent
        for _ in range(50):
            run.core.telemetry.publish(packet_of("normal", "big" * 10_000), admin.TELEMETRY_KIND_EVENT)
            await anyio.sleep(0.001)
        sent = run.sample("tolaria.telemetry.sent_total", {"priority": "normal"}) or 0.0


async def test_a_halt_reaches_board_journal_and_a_healthy_subscriber_whatever_is_stuck() -> None:
    """The log blocks, the disk is full, other subscribers do not read; no counter says that what is stuck arrived."""
    disk = FailingDisk()
    sections: dict[str, object] = {
        "telemetry": {"queue_packets": 16},
        "checkpoint": {"every_steps": 5, "retry_s": 0.02, "on_failure": "continue"},
    }
    run = new_run(FakePeers(), epochs=10**6, files=disk, sections=sections)
    addresses: list[str] = []
    async with logging_blocked() as log, running(run), serving_run(run, addresses) as channel:
        disk.fail("write", errno.ENOSPC)
        await run.until(lambda: bool(run.sample("tolaria.checkpoint.failures_total")))
        async with subscribed(channel), subscribed(channel):  # neither of them reads
            await block_subscribers(run)
            await run.safety.raise_emergency(enums.EMERGENCY_LEVEL_HALT, "smoke", run.status)
            assert run.state == "HALTED"
            assert [signal.reason for signal in run.board.active_signals()] == ["smoke"]
            # Nothing has left this process yet.
            assert run.sample("tolaria.emergency.bypass_applied_total") == 0
            assert run.sample("tolaria.telemetry.sent_total", {"priority": "critical"}) == 0
            # A connection to itself: the one of the others is full.
            own_connection = grpc.aio.insecure_channel(addresses[0], options=[("grpc.use_local_subchannel_pool", 1)])
            async with own_connection as own, subscribed(own, kinds=[admin.TELEMETRY_KIND_EMERGENCY]) as healthy:
                broadcast = await healthy.until("emergency_broadcast")
                assert broadcast.packet.events[0].attributes["reason"] == "smoke"
                await run.until(lambda: run.sample("tolaria.emergency.bypass_applied_total") == 1)
            assert run.sample("tolaria.emergency.broadcasts_total") == 1
            assert run.sample("tolaria.emergency.bypass_dropped_total") == 0
            incidents = await run.journal.incidents(10)
            assert "smoke" in {incident.reason for incident in incidents if incident.kind == "emergency"}
            assert log.getvalue() == ""
        disk.repair()
        await run.run.stop("enough")
    assert "emergency_broadcast" in {json.loads(line)["event"] for line in log.getvalue().splitlines()}
    assert run.sample("tolaria.emergency.bypass_applied_total") == 1  # also after the log has it, too
