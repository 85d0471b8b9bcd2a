"""Subscribers to telemetry packets: their filters, and a bounded queue for each.

No subscriber can block the publisher or another one. CRITICAL packets have a queue to themselves, from which none is
dropped: a subscriber that does not read them at all is disconnected.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Self

import anyio

from leyline.v1 import enums_pb2 as enums
from leyline.v1.admin_service_pb2 import TelemetryKind
from leyline.v1.telemetry_pb2 import TelemetryPacket
from tolaria.config import TelemetrySettings
from tolaria.errors import SubscriberTooSlowError, TooManySubscribersError
from tolaria.telemetry.metrics import Metrics, escaped, start_at_zero

CRITICAL_WAITING_MAX: Final = 1024
"""CRITICAL packets that wait for one subscriber: a quarter of an hour's at the limit of broadcasts."""

_CRITICAL, _HIGH = enums.MESSAGE_PRIORITY_CRITICAL, enums.MESSAGE_PRIORITY_HIGH
_PRIORITY_NAMES: Final = ("normal", "high", "critical")


def _name_of(priority: enums.MessagePriority.ValueType) -> str:
    return "critical" if priority == _CRITICAL else "high" if priority == _HIGH else "normal"


@dataclass(frozen=True, slots=True)
class PacketFilter:
    """Which packets a subscriber gets; the default is all. Empty `prefixes` and `kinds` filter nothing."""

    level: enums.TelemetryLevel.ValueType = enums.TELEMETRY_LEVEL_UNSPECIFIED
    priority: enums.MessagePriority.ValueType = enums.MESSAGE_PRIORITY_UNSPECIFIED
    prefixes: tuple[str, ...] = ()
    kinds: frozenset[TelemetryKind.ValueType] = frozenset()

    def takes(self, kind: TelemetryKind.ValueType, level: enums.TelemetryLevel.ValueType) -> bool:
        """Whether packets of a kind and level can pass."""
        return level >= self.level and (not self.kinds or kind in self.kinds)

    def admits(self, packet: TelemetryPacket, kind: TelemetryKind.ValueType) -> bool:
        """Whether a packet passes."""
        if not self.takes(kind, packet.level) or packet.priority < self.priority:
            return False
        return not self.prefixes or any(map(self._named, _names(packet)))

    def reduced(self, packet: TelemetryPacket) -> TelemetryPacket:
        """Returns the packet with only the metrics, events and spans whose names match."""
        if not self.prefixes:
            return packet
        reduced = TelemetryPacket(
            packet_id=packet.packet_id,
            timestamp=packet.timestamp,
            source_subsystem=packet.source_subsystem,
            level=packet.level,
            metrics=[metric for metric in packet.metrics if self._named(metric.name)],
            events=[event for event in packet.events if self._named(event.description)],
            spans=[span for span in packet.spans if self._named(span.name)],
            priority=packet.priority,
        )
        reduced.system_health.CopyFrom(packet.system_health)
        return reduced

    def _named(self, name: str) -> bool:
        return name.startswith(self.prefixes) or escaped(name).startswith(self.prefixes)


@dataclass(frozen=True, slots=True)
class Published:
    """A packet on its way to subscribers; `on_sent` is called each time that one has been sent it."""

    packet: TelemetryPacket
    kind: TelemetryKind.ValueType
    on_sent: Callable[[], None] | None = None
    replayed: bool = False


@dataclass(slots=True)
class _Waiting:
    """Packets that wait, each with its number in order of arrival."""

    critical: deque[Published] = field(default_factory=deque)
    high: deque[tuple[int, Published]] = field(default_factory=deque)
    normal: deque[tuple[int, Published]] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self.critical) + len(self.high) + len(self.normal)

    def take(self) -> Published | None:
        """Removes and returns the oldest CRITICAL packet, else the oldest of all."""
        if self.critical:
            return self.critical.popleft()
        if self.high and (not self.normal or self.high[0][0] < self.normal[0][0]):
            return self.high.popleft()[1]
        return self.normal.popleft()[1] if self.normal else None


class Subscription:
    """What one subscriber is to be sent, while the context is open. Used on the event loop only."""

    def __init__(self, stream: TelemetryStream, wanted: PacketFilter, capacity: int) -> None:
        self._stream = stream
        self._capacity = capacity
        self._waiting = _Waiting()
        self._arrivals = 0
        self._changed = anyio.Event()
        self._ended = False
        self._failure: SubscriberTooSlowError | None = None
        self.wanted = wanted
        self.dropped: Counter[str] = Counter()
        """Packets that were not sent because the subscriber is too slow, by priority."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.remove(self)

    def __len__(self) -> int:
        """The number of packets that wait."""
        return len(self._waiting)

    async def next(self) -> Published | None:
        """Waits for a packet and removes it from the queue; None once the stream has ended and all are taken.

        Raises SubscriberTooSlowError when too many CRITICAL packets have not been taken.
        """
        while True:
            if self._failure is not None:
                raise self._failure
            if (published := self._waiting.take()) is not None:
                return published
            if self._ended:
                return None
            self._changed = anyio.Event()
            await self._changed.wait()

    def sent(self, published: Published) -> None:
        """Counts a packet that has been written to the subscriber's connection."""
        self._stream.count_sent(published.packet.priority)
        if published.on_sent is not None:
            published.on_sent()

    def put(self, published: Published) -> None:
        """Queues a packet; if the queue is full, drops a NORMAL one, or the oldest if there is none."""
        waiting = self._waiting
        priority = published.packet.priority
        if priority == _CRITICAL:
            if len(waiting.critical) >= CRITICAL_WAITING_MAX:
                self._give_up()
                return
            waiting.critical.append(published)
        elif self._make_room(priority):
            self._arrivals += 1
            (waiting.high if priority == _HIGH else waiting.normal).append((self._arrivals, published))
        self._changed.set()

    def end(self) -> None:
        """Ends the subscription once what waits has been taken."""
        self._ended = True
        self._changed.set()

    def _make_room(self, priority: enums.MessagePriority.ValueType) -> bool:
        """Drops a packet if the queue is full; returns False if that is the new one."""
        waiting = self._waiting
        if len(waiting.high) + len(waiting.normal) < self._capacity:
            return True
        if waiting.normal:
            waiting.normal.popleft()
            self._drop("normal")
            return True
        if priority == _HIGH:
            waiting.high.popleft()
            self._drop("high")
            return True
        self._drop("normal")
        return False

    def _give_up(self) -> None:
        if self._failure is None:
            lost = len(self._waiting.critical) + 1
            self._failure = SubscriberTooSlowError(f"{lost} critical packets wait: subscribe again to get the latest")
            self._drop("critical", lost)
            self._waiting = _Waiting()
            self._stream.remove(self)
        self._changed.set()

    def _drop(self, priority: str, count: int = 1) -> None:
        self.dropped[priority] += count
        self._stream.count_dropped(priority, count)


class TelemetryStream:
    """Passes published packets to all subscriptions, without waiting, and keeps the latest CRITICAL ones."""

    def __init__(self, settings: TelemetrySettings, metrics: Metrics) -> None:
        self.settings = settings
        self._metrics = metrics
        self._subscriptions: tuple[Subscription, ...] = ()  # replaced as a whole: read by the thread of a scrape
        self._critical: deque[Published] = deque(maxlen=settings.critical_kept)
        self._closed = False
        metrics.telemetry_subscribers.set_function(lambda: len(self._subscriptions))
        metrics.telemetry_queue_depth.set_function(lambda: sum(map(len, self._subscriptions)))
        start_at_zero(metrics.telemetry_sent_total, ((name,) for name in _PRIORITY_NAMES))
        start_at_zero(metrics.telemetry_subscriber_dropped_total, ((name,) for name in _PRIORITY_NAMES))

    def takes(self, kind: TelemetryKind.ValueType, level: enums.TelemetryLevel.ValueType) -> bool:
        """Whether a packet of a kind and level would reach anything."""
        if level == enums.TELEMETRY_LEVEL_CRITICAL:
            return True
        return any(subscription.wanted.takes(kind, level) for subscription in self._subscriptions)

    def publish(
        self, packet: TelemetryPacket, kind: TelemetryKind.ValueType, on_sent: Callable[[], None] | None = None
    ) -> None:
        """Queues a packet for every subscription whose filter admits it."""
        published = Published(packet, kind, on_sent)
        if packet.priority == _CRITICAL:
            self._critical.append(Published(packet, kind, on_sent, replayed=True))
        for subscription in self._subscriptions:
            if subscription.wanted.admits(packet, kind):
                subscription.put(published)

    def subscribe(self, wanted: PacketFilter, replay: int | None = None) -> Subscription:
        """Begins a subscription, with the latest `replay` CRITICAL packets that are kept (None: all), oldest first.

        Raises TooManySubscribersError.
        """
        if len(self._subscriptions) >= (limit := self.settings.subscribers_max):
            raise TooManySubscribersError(f"there are {limit} subscribers, the limit of telemetry.subscribers_max")
        subscription = Subscription(self, wanted, self.settings.queue_packets)
        for published in self._latest_critical(wanted, replay):
            subscription.put(published)
        if self._closed:
            subscription.end()
        self._subscriptions += (subscription,)
        return subscription

    def remove(self, subscription: Subscription) -> None:
        """Ends a subscription; later calls do nothing."""
        self._subscriptions = tuple(other for other in self._subscriptions if other is not subscription)

    def close(self) -> None:
        """Ends all subscriptions, also later ones, once what waits for them has been taken."""
        self._closed = True
        for subscription in self._subscriptions:
            subscription.end()

    def count_sent(self, priority: enums.MessagePriority.ValueType) -> None:
        """Counts a packet that was written to a subscriber's connection."""
        self._metrics.telemetry_sent_total.labels(_name_of(priority)).inc()

    def count_dropped(self, priority: str, count: int) -> None:
        """Counts packets that a subscriber was not sent."""
        self._metrics.telemetry_subscriber_dropped_total.labels(priority).inc(count)

    def _latest_critical(self, wanted: PacketFilter, replay: int | None) -> Iterable[Published]:
        admitted = [one for one in self._critical if wanted.admits(one.packet, one.kind)]
        return admitted if replay is None else islice(admitted, max(0, len(admitted) - replay), None)


def _names(packet: TelemetryPacket) -> Iterator[str]:
    yield from (metric.name for metric in packet.metrics)
    yield from (event.description for event in packet.events)
    yield from (span.name for span in packet.spans)
