from __future__ import annotations

from typing import Any

import anyio
import anyio.lowlevel
import pytest

from leyline.v1 import enums_pb2 as enums
from leyline.v1.admin_service_pb2 import TELEMETRY_KIND_EMERGENCY, TELEMETRY_KIND_EPOCH, TELEMETRY_KIND_EVENT
from leyline.v1.telemetry_pb2 import MetricPoint, TraceSpan
from support.telemetry import Telemetry, packet_of
from tolaria.config import TelemetrySettings
from tolaria.errors import SubscriberTooSlowError, TooManySubscribersError
from tolaria.telemetry.subscriptions import CRITICAL_WAITING_MAX, PacketFilter, Subscription

pytestmark = pytest.mark.anyio

EVERYTHING = PacketFilter()


async def taken(subscription: Subscription) -> list[str]:
    """Returns the ids of the packets that wait, in the order in which they are taken."""
    return [(published.packet.packet_id) for _ in range(len(subscription)) if (published := await subscription.next())]


def small(queue_packets: int = 16, **settings: Any) -> Telemetry:
    """Returns telemetry with short queues."""
    return Telemetry(TelemetrySettings(queue_packets=queue_packets, **settings))


async def test_packets_arrive_in_order_and_critical_ones_first() -> None:
    """High ones do not overtake normal ones: the order of events stays readable."""
    it = Telemetry()
    with it.stream.subscribe(EVERYTHING) as subscription:
        for priority, name in (("normal", "a"), ("high", "b"), ("normal", "c"), ("critical", "d")):
            it.publish(priority, name)
        assert await taken(subscription) == ["d", "a", "b", "c"]


async def test_a_waiting_subscriber_is_woken() -> None:
    """A packet is taken as soon as it is published."""
    it = Telemetry()
    with anyio.fail_after(180), it.stream.subscribe(EVERYTHING) as subscription:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_publish_soon, it)
            published = await subscription.next()
    assert published is not None
    assert published.packet.packet_id == "late"


async def _publish_soon(it: Telemetry) -> None:
    await anyio.lowlevel.checkpoint()
    it.publish("normal", "late")


@pytest.mark.parametrize(
    ("waiting", "arrives", "left", "dropped"),
    [
        # The oldest normal one makes room, for a high one too.
        ("n" * 16, "n", "n" * 16, {"normal": 1}),
        ("h" * 15 + "n", "h", "h" * 16, {"normal": 1}),
        ("n" + "h" * 15, "h", "h" * 16, {"normal": 1}),
        # Without one the new normal packet is lost, and the oldest high one to a new high one.
        ("h" * 16, "n", "h" * 16, {"normal": 1}),
        ("h" * 16, "h", "h" * 16, {"high": 1}),
        ("n" * 15, "n", "n" * 16, {}),
        # Critical ones take no room.
        ("n" * 16, "ccc", "ccc" + "n" * 16, {}),
    ],
)
async def test_a_full_queue_loses_normal_packets_first(
    waiting: str, arrives: str, left: str, dropped: dict[str, int]
) -> None:
    """Nothing critical is lost, and no high packet while a normal one waits; what is lost is counted."""
    it = small()
    names = {"n": "normal", "h": "high", "c": "critical"}
    with it.stream.subscribe(EVERYTHING) as subscription:
        for letter in waiting + arrives:
            it.publish(names[letter], letter)
        assert subscription.dropped == dropped
        assert "".join(await taken(subscription)) == left
    for priority in names.values():
        assert it.sample("telemetry.subscriber_dropped_total", priority=priority) == dropped.get(priority, 0)


async def test_a_slow_subscriber_costs_others_nothing() -> None:
    """Each has a queue to itself."""
    it = small()
    with it.stream.subscribe(EVERYTHING) as slow, it.stream.subscribe(EVERYTHING) as healthy:
        for number in range(100):
            it.publish("high", str(number))
            assert await taken(healthy) == [str(number)]
        assert (len(slow), slow.dropped["high"]) == (16, 84)
        assert not healthy.dropped
        assert (it.sample("telemetry.subscribers"), it.sample("telemetry.queue_depth")) == (2, 16)
    assert (it.sample("telemetry.subscribers"), it.sample("telemetry.queue_depth")) == (0, 0)


async def test_a_subscriber_that_takes_no_critical_packet_is_disconnected() -> None:
    """Its queue is bounded, and what it did not get is counted; nothing is dropped from its middle."""
    it = Telemetry()
    with it.stream.subscribe(EVERYTHING) as stuck:
        for _ in range(CRITICAL_WAITING_MAX):
            it.publish("critical")
        assert len(stuck) == CRITICAL_WAITING_MAX
        it.publish("critical")
        it.publish("critical")
        with pytest.raises(SubscriberTooSlowError, match="subscribe again"):
            await stuck.next()
    assert it.sample("telemetry.subscribers") == 0
    assert it.sample("telemetry.subscriber_dropped_total", priority="critical") == CRITICAL_WAITING_MAX + 1
    assert it.sample("telemetry.dropped_total", priority="critical") == 0  # of which an alert wakes an operator


@pytest.mark.parametrize(("replay", "expected"), [(None, ["2", "3"]), (0, []), (1, ["3"]), (9, ["2", "3"])])
async def test_a_new_subscriber_gets_the_latest_critical_packets(replay: int | None, expected: list[str]) -> None:
    """As many as it asks for of those that are kept, oldest first, marked as replayed; other packets are not kept."""
    it = small(critical_kept=2)
    for name in "123":
        it.publish("critical", name)
        it.publish("high", "not kept")
    with it.stream.subscribe(EVERYTHING, replay) as subscription:
        it.publish("critical", "new")
        found = [await subscription.next() for _ in range(len(expected) + 1)]
    assert [(one.packet.packet_id, one.replayed) for one in found if one] == [
        *((name, True) for name in expected),
        ("new", False),
    ]


async def test_replayed_packets_pass_the_filter_too() -> None:
    """A subscriber to something else does not get them."""
    it = Telemetry()
    it.publish("critical", "tolaria.emergency.halt")
    with it.stream.subscribe(PacketFilter(prefixes=("tolaria.training",))) as subscription:
        assert len(subscription) == 0


@pytest.mark.parametrize(
    ("wanted", "kind", "priority", "name", "passes"),
    [
        (PacketFilter(), TELEMETRY_KIND_EVENT, "normal", "a", True),
        (PacketFilter(level=enums.TELEMETRY_LEVEL_WARNING), TELEMETRY_KIND_EVENT, "normal", "a", False),
        (PacketFilter(level=enums.TELEMETRY_LEVEL_WARNING), TELEMETRY_KIND_EVENT, "high", "a", True),
        (PacketFilter(priority=enums.MESSAGE_PRIORITY_HIGH), TELEMETRY_KIND_EVENT, "normal", "a", False),
        (PacketFilter(priority=enums.MESSAGE_PRIORITY_HIGH), TELEMETRY_KIND_EVENT, "critical", "a", True),
        (PacketFilter(kinds=frozenset({TELEMETRY_KIND_EPOCH})), TELEMETRY_KIND_EVENT, "normal", "a", False),
        (PacketFilter(kinds=frozenset({TELEMETRY_KIND_EMERGENCY})), TELEMETRY_KIND_EMERGENCY, "high", "a", True),
        (PacketFilter(prefixes=("tolaria.roll",)), TELEMETRY_KIND_EVENT, "normal", "tolaria.rollback.completed", True),
        (PacketFilter(prefixes=("tolaria_roll",)), TELEMETRY_KIND_EVENT, "normal", "tolaria.rollback.completed", True),
        (PacketFilter(prefixes=("x", "command")), TELEMETRY_KIND_EVENT, "high", "command_rejected", True),
        (PacketFilter(prefixes=("rollback",)), TELEMETRY_KIND_EVENT, "normal", "tolaria.rollback.completed", False),
    ],
)
async def test_a_filter_admits_what_it_names(
    wanted: PacketFilter, kind: Any, priority: str, name: str, passes: bool
) -> None:
    """A packet has to pass every part of it. Names match dotted and with underscores."""
    it = Telemetry()
    with it.stream.subscribe(wanted) as subscription:
        it.publish(priority, name, kind)
        assert len(subscription) == passes


def test_a_packet_is_reduced_to_the_names_that_match() -> None:
    """Metrics, events and spans; everything else stays, and the published packet is not changed."""
    packet = packet_of("high", "tolaria.a", "b")
    packet.metrics.extend([MetricPoint(name="tolaria.a.x", value=1), MetricPoint(name="c")])
    packet.spans.extend([TraceSpan(name="tolaria.a"), TraceSpan(name="d")])
    packet.system_health.status = enums.HEALTH_STATUS_DEGRADED
    whole = packet.SerializeToString(deterministic=True)
    reduced = PacketFilter(prefixes=("tolaria.a",)).reduced(packet)
    assert [event.description for event in reduced.events] == ["tolaria.a"]
    assert [metric.name for metric in reduced.metrics] == ["tolaria.a.x"]
    assert [span.name for span in reduced.spans] == ["tolaria.a"]
    assert (reduced.packet_id, reduced.level, reduced.priority) == (packet.packet_id, packet.level, packet.priority)
    assert reduced.system_health.status == enums.HEALTH_STATUS_DEGRADED
    assert packet.SerializeToString(deterministic=True) == whole


async def test_a_closed_stream_ends_after_what_waits() -> None:
    """Nothing that was published before is lost; a subscriber that comes later gets what is replayed."""
    it = Telemetry()
    it.publish("critical", "kept")
    with it.stream.subscribe(EVERYTHING, 0) as subscription:
        it.publish("normal", "last")
        it.stream.close()
        assert await taken(subscription) == ["last"]
        assert await subscription.next() is None
    with it.stream.subscribe(EVERYTHING) as late:
        assert await taken(late) == ["kept"]
        assert await late.next() is None


def test_subscribers_are_limited() -> None:
    """The error names the setting; one that leaves makes room."""
    it = small(subscribers_max=2)
    with it.stream.subscribe(EVERYTHING):
        with it.stream.subscribe(EVERYTHING), pytest.raises(TooManySubscribersError, match="subscribers_max"):
            it.stream.subscribe(EVERYTHING)
        with it.stream.subscribe(EVERYTHING):
            pass


async def test_only_a_packet_that_was_sent_counts_as_sent() -> None:
    """Neither publishing nor taking it does."""
    it, calls = Telemetry(), list[str]()
    with it.stream.subscribe(EVERYTHING) as subscription:
        it.stream.publish(packet_of("critical", "x"), TELEMETRY_KIND_EVENT, lambda: calls.append("x"))
        published = await subscription.next()
        assert it.sample("telemetry.sent_total", priority="critical") == 0
        assert (published is not None, calls) == (True, [])
        if published is not None:
            subscription.sent(published)
    assert it.sample("telemetry.sent_total", priority="critical") == 1
    assert calls == ["x"]
