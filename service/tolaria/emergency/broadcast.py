"""Emergency signals on their way to telemetry: rate limit, backlog and retries. No signal is ever dropped."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from leyline.v1.emergency_pb2 import EmergencySignal
from leyline.v1.enums_pb2 import EmergencyLevel
from tolaria.errors import BroadcastFailedError
from tolaria.signals import Signal

REASON_CHARACTERS_MAX = 1000
_MS = 1_000_000
_Key = tuple[EmergencyLevel.ValueType, str, str]


@dataclass(frozen=True, slots=True)
class Notice:
    """`count` signals of equal level, reason and origin. `signal.monotonic_time_ms` is the time of the first."""

    signal: EmergencySignal
    count: int = 1


@dataclass(frozen=True, slots=True)
class Broadcast:
    """A notice was passed to telemetry. With an `error` it was not, and is retried."""

    notice: Notice
    latency_ns: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class HeldBack:
    """A notice waits for the rate limit, a retry, or earlier notices."""

    notice: Notice


def new_notice(signal: Signal, *, run_id: str, triggered_unix_ns: int, attributes: Mapping[str, str]) -> Notice:
    """Returns the notice of one signal of a run, its reason cut to REASON_CHARACTERS_MAX.

    `triggered_unix_ns` is the wall-clock time at which it was raised. `payload_checksum` is the SHA-256 of the
    message's deterministic serialization without it.
    """
    message = EmergencySignal(
        version=1,
        level=signal.level,
        reason=signal.reason[:REASON_CHARACTERS_MAX],
        origin=signal.origin,
        monotonic_time_ms=signal.raised_ns // _MS,
        run_id=run_id,
        attributes=attributes,
    )
    message.triggered_at.FromNanoseconds(triggered_unix_ns)
    message.payload_checksum = hashlib.sha256(message.SerializeToString(deterministic=True)).digest()
    return Notice(message)


class Backlog:
    """Waiting notices in order of arrival, at most `reasons_max` and one more for each level.

    Signals of equal level, reason and origin share a notice. Beyond `reasons_max` all further signals of a level share
    one, with the reason of the first of them. The counts of the notices always add up to the number of signals.
    """

    def __init__(self, reasons_max: int) -> None:
        self._reasons_max = reasons_max
        self._waiting: dict[_Key, Notice] = {}

    def __len__(self) -> int:
        """The number of notices."""
        return len(self._waiting)

    @property
    def first(self) -> Notice:
        """The notice that has waited longest. Raises StopIteration when there is none."""
        return next(iter(self._waiting.values()))

    def put(self, notice: Notice) -> None:
        """Appends a notice, or adds it to the equal one."""
        key = (notice.signal.level, notice.signal.reason, notice.signal.origin)
        if key not in self._waiting and len(self._waiting) >= self._reasons_max:
            key = (notice.signal.level, "", "various")
        first = self._waiting.get(key)
        self._waiting[key] = notice if first is None else replace(first, count=first.count + notice.count)

    def remove_first(self) -> None:
        """Removes the notice that has waited longest."""
        del self._waiting[next(iter(self._waiting))]


class RateLimit:
    """At most `limit` takes in any `window_ns`, the window's end excluded. Times must not decrease."""

    def __init__(self, limit: int, window_ns: int) -> None:
        self._window_ns = window_ns
        self._limit = limit
        self._taken: deque[int] = deque(maxlen=limit)

    def take(self, now_ns: int) -> bool:
        """Takes one if the limit permits, and returns whether it did."""
        if self.free_at_ns > now_ns:
            return False
        self._taken.append(now_ns)  # drops the oldest, which is out of the window
        return True

    @property
    def free_at_ns(self) -> int:
        """When the limit permits the next take; 0 if it does now."""
        return self._taken[0] + self._window_ns if len(self._taken) == self._limit else 0


class Outbox:
    """Sends the notices of `backlog` in order, as often as `limit` permits, and again `retry_ns` after a failure.

    `send` passes one notice on without waiting. It raises BroadcastFailedError when it cannot; any other error
    propagates, and the notice stays. `report` is called with the outcome of each attempt and each notice that has to
    wait; it may call `post`. `clock` is monotonic nanoseconds.
    """

    def __init__(
        self,
        send: Callable[[Notice], None],
        *,
        limit: RateLimit,
        backlog: Backlog,
        retry_ns: int,
        report: Callable[[Broadcast | HeldBack], None],
        clock: Callable[[], int],
    ) -> None:
        self._send = send
        self._limit, self._backlog, self._retry_ns = limit, backlog, retry_ns
        self._report, self._clock = report, clock
        self._retry_at_ns = 0
        self._pumping = False

    @property
    def due_at_ns(self) -> int | None:
        """When `pump` can send; None while nothing waits."""
        return max(self._retry_at_ns, self._limit.free_at_ns) if len(self._backlog) else None

    def post(self, notice: Notice) -> None:
        """Appends a notice; `pump` sends it."""
        waiting = len(self._backlog)
        self._backlog.put(notice)
        if waiting or (self.due_at_ns or 0) > self._clock():
            self._report(HeldBack(notice))

    def pump(self) -> None:
        """Sends waiting notices, as far as the rate limit and failures permit."""
        if self._pumping:  # a report from the loop below posted another notice, which that loop sends
            return
        self._pumping = True
        try:
            while len(self._backlog) and self._clock() >= self._retry_at_ns and self._limit.take(self._clock()):
                self._send_first()
        finally:
            self._pumping = False

    def _send_first(self) -> None:
        notice, began_ns, error = self._backlog.first, self._clock(), ""
        self._retry_at_ns = began_ns + self._retry_ns  # also after an error that propagates
        try:
            self._send(notice)
            self._backlog.remove_first()
            self._retry_at_ns = 0
        except BroadcastFailedError as failure:
            error = str(failure) or type(failure).__name__
        self._report(Broadcast(notice, self._clock() - began_ns, error))
