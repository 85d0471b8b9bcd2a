"""Telemetry packets as a stream of responses."""

from __future__ import annotations

from collections.abc import AsyncIterator

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.enums_pb2 import MessagePriority, TelemetryLevel
from tolaria.errors import InvalidFieldError
from tolaria.telemetry.subscriptions import PacketFilter, Subscription

PREFIXES_MAX, PREFIX_LENGTH_MAX = 64, 256


def filter_of(request: admin.StreamTelemetryRequest) -> PacketFilter:
    """Returns the filter that a request describes. Raises InvalidFieldError."""
    if request.level not in TelemetryLevel.values():
        raise InvalidFieldError("level", f"must be a TelemetryLevel, is {request.level}")
    if request.minimum_priority not in MessagePriority.values():
        raise InvalidFieldError("minimum_priority", f"must be a MessagePriority, is {request.minimum_priority}")
    for kind in request.kinds:
        if kind not in admin.TelemetryKind.values()[1:]:
            raise InvalidFieldError("kinds", f"must be epoch (1), event (2) or emergency (3), is {kind}")
    if len(request.name_prefixes) > PREFIXES_MAX:
        raise InvalidFieldError("name_prefixes", f"must not be more than {PREFIXES_MAX}")
    if any(not 0 < len(prefix) <= PREFIX_LENGTH_MAX for prefix in request.name_prefixes):
        raise InvalidFieldError("name_prefixes", f"must have 1 to {PREFIX_LENGTH_MAX} characters each")
    return PacketFilter(request.level, request.minimum_priority, tuple(request.name_prefixes), frozenset(request.kinds))


async def responses(subscription: Subscription) -> AsyncIterator[admin.StreamTelemetryResponse]:
    """Yields what the subscription is to be sent. A packet counts as sent once the next one is asked for.

    gRPC asks for the next response when it has written the one before to the connection, which waits for a slow reader.

    Raises SubscriberTooSlowError.
    """
    while (published := await subscription.next()) is not None:
        yield admin.StreamTelemetryResponse(
            packet=subscription.wanted.reduced(published.packet),
            kind=published.kind,
            replayed=published.replayed,
            dropped=subscription.dropped,
        )
        subscription.sent(published)
