"""Emergency signals on their way to telemetry: rate limit, backlog and retries. No signal is ever dropped."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from leyline.v1.emergency_pb2 import EmergencySignal
from leyline.v1.enums_pb2 import EmergencyLevel
from tolaria.errors import BroadcastFailedError

SIGNAL_VERSION = 1
REASON_CHARACTERS_MAX = 1000
VARIOUS = "various"
_MS = 1_000_000
_Key = tuple[EmergencyLevel.ValueType, str, str]


@dataclass(frozen=True, slots=True)
class Notice:
    """`count` equal signals, raised from `signal.timestamp_ms` to `last_ns` (both monotonic)."""

    signal: EmergencySignal
    last_ns: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class Broadcast:
    """A notice was handed to telemetry; with an `error` it was not, and waits for a retry."""

    notice: Notice
    latency_ns: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class HeldBack:
    """A notice waits for the rate limit, a retry, or notices before it."""

    notice: Notice


def new_notice(level: EmergencyLevel.ValueType, reason: str, origin: str, at_ns: int) -> Notice:
    """Returns the notice of one signal raised at `at_ns` (monotonic), its reason cut to REASON_CHARACTERS_MAX.

    `payload_checksum` is the SHA-256 of the message's deterministic serialization without it.
    """
    signal = EmergencySignal(
        version=SIGNAL_VERSION,
        level=level,
        reason=reason[:REASON_CHARACTERS_MAX],
        origin=origin,
        timestamp_ms=at_ns // _MS,
    )
    signal.payload_checksum = checksum(signal)
    return Notice(signal, at_ns)


def checksum(signal: EmergencySignal) -> bytes:
    """Returns the 32 bytes that `payload_checksum` of `signal` must have."""
    bare = EmergencySignal()
    bare.CopyFrom(signal)
    bare.ClearField("payload_checksum")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).digest()


class Backlog:
    """Waiting notices in order of arrival, at most `reasons_max` and one more for each level.

    Signals of equal level, reason and origin share a notice. Beyond `reasons_max` all further signals of a level share
    one, with the reason of the first of them. The counts of the notices always add up to the number of signals.
    """

    def __init__(self, reasons_max: int) -> None:
        self._reasons_max = reasons_max
        self._waiting: OrderedDict[_Key, Notice] = OrderedDict()

    def __len__(self) -> int:
        """The number of notices."""
        return len(self._waiting)

    @property
    def signals(self) -> int:
        """The number of signals."""
        return sum(notice.count for notice in self._waiting.values())

    def put(self, notice: Notice) -> None:
        """Appends a notice, or adds it to the equal one."""
        key = _key(notice)
        if key not in self._waiting and len(self._waiting) >= self._reasons_max:
            key = (notice.signal.level, "", VARIOUS)
        first = self._waiting.get(key)
        self._waiting[key] = notice if first is None else _merged(first, notice)

    def take(self) -> Notice | None:
        """Removes and returns the first notice; None when there is none."""
        return self._waiting.popitem(last=False)[1] if self._waiting else None

    def put_back(self, notice: Notice) -> None:
        """Inserts a notice that was taken before all others."""
        key = _key(notice)
        later = self._waiting.get(key)
        self._waiting[key] = notice if later is None else _merged(notice, later)
        self._waiting.move_to_end(key, last=False)


class RateLimit:
    """At most `limit` takes in any `window_ns`, the window's end excluded. Times must not decrease."""

    def __init__(self, limit: int, window_ns: int) -> None:
        if limit < 1 or window_ns < 1:
            raise ValueError(f"a rate of {limit} in {window_ns} ns permits nothing")
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
        """When the limit permits the next take; 0 for at any time."""
        return self._taken[0] + self._window_ns if len(self._taken) == self._limit else 0


class Outbox:
    """Sends notices in order, and again after failures.

    Args:
        send: hands one notice on without waiting. Raises BroadcastFailedError when it cannot; any other error
            propagates, and the notice stays.
        limit: how often `send` may be called.
        reasons_max: distinct notices that may wait, as `Backlog` has it.
        retry_ns: pause after a failure.
        report: called with the outcome of each attempt and each notice that has to wait; may post.
        clock: monotonic nanoseconds.
    """

    def __init__(
        self,
        send: Callable[[Notice], None],
        *,
        limit: RateLimit,
        reasons_max: int,
        retry_ns: int,
        report: Callable[[Broadcast | HeldBack], None],
        clock: Callable[[], int],
    ) -> None:
        self._send = send
        self._limit = limit
        self._backlog = Backlog(reasons_max)
        self._retry_ns = retry_ns
        self._report = report
        self._clock = clock
        self._retry_at_ns = 0
        self._pumping = False

    @property
    def signals_waiting(self) -> int:
        """Signals posted and not sent."""
        return self._backlog.signals

    @property
    def due_at_ns(self) -> int | None:
        """When `pump` can send; None while nothing waits."""
        return self._free_at_ns if len(self._backlog) else None

    @property
    def _free_at_ns(self) -> int:
        return max(self._retry_at_ns, self._limit.free_at_ns)

    def post(self, notice: Notice) -> None:
        """Appends a notice; `pump` sends it."""
        waits = len(self._backlog) > 0 or self._free_at_ns > self._clock()
        self._backlog.put(notice)
        if waits:
            self._report(HeldBack(notice))

    def pump(self) -> None:
        """Sends what waits, as far as the rate limit and failures permit."""
        if self._pumping:  # a report from the loop below posted another notice, which that loop sends
            return
        self._pumping = True
        try:
            while self._clock() >= self._retry_at_ns and len(self._backlog) and self._limit.take(self._clock()):
                self._send_next()
        finally:
            self._pumping = False

    def _send_next(self) -> None:
        notice = self._backlog.take()
        if notice is None:
            return
        began_ns, error, sent = self._clock(), "", False
        try:
            self._send(notice)
            sent = True
        except BroadcastFailedError as failure:
            error = str(failure) or type(failure).__name__
        finally:
            if not sent:
                self._backlog.put_back(notice)
                self._retry_at_ns = self._clock() + self._retry_ns
        self._report(Broadcast(notice, self._clock() - began_ns, error))


def _key(notice: Notice) -> _Key:
    return notice.signal.level, notice.signal.reason, notice.signal.origin


def _merged(first: Notice, later: Notice) -> Notice:
    return replace(first, count=first.count + later.count, last_ns=max(first.last_ns, later.last_ns))
