"""Tells telemetry of emergency signals: in order, at most so many a minute, again after a failure, each in the end.

Owns the rate cap, what waits, and the counts. Must not know levels' meaning or the board.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tolaria.emergency.backlog import Backlog, Notice
from tolaria.emergency.rate import RateCap
from tolaria.emergency.reports import Broadcast, HeldBack
from tolaria.errors import BroadcastFailedError


@dataclass(slots=True)
class OutboxCounts:
    """What has been done so far; the meaning of each is told at `EmergencyStatistics`."""

    posted: int = 0
    broadcasts: int = 0
    signals_told: int = 0
    broadcast_failures: int = 0
    held_back: int = 0
    last_latency_ns: int = 0


class Outbox:
    """Hands notices to `broadcast`, and tells `report` of each attempt and of each signal that has to wait.

    Args:
        broadcast: hands one notice on, at once. Raises BroadcastFailedError when it cannot; any other error is a
            mistake in it and goes through, and the notice waits all the same.
        cap: how often `broadcast` may be called.
        reasons_max: different notices that may wait before they are put together.
        retry_ns: how long nothing is tried after a failure.
        report: told at once; may post again.
        clock: monotonic nanoseconds.
    """

    def __init__(
        self,
        broadcast: Callable[[Notice], None],
        *,
        cap: RateCap,
        reasons_max: int,
        retry_ns: int,
        report: Callable[[Broadcast | HeldBack], None],
        clock: Callable[[], int],
    ) -> None:
        self._broadcast = broadcast
        self._cap = cap
        self._backlog = Backlog(reasons_max)
        self._retry_ns = retry_ns
        self._report = report
        self._clock = clock
        self._resting_until_ns = 0
        self._pumping = False
        self.counts = OutboxCounts()

    @property
    def notices_waiting(self) -> int:
        """Notices that wait."""
        return len(self._backlog)

    @property
    def signals_waiting(self) -> int:
        """Signals that they stand for."""
        return self._backlog.signals

    @property
    def due_at_ns(self) -> int | None:
        """When `pump` can do something; None while nothing waits."""
        return max(self._resting_until_ns, self._cap.free_at_ns) if len(self._backlog) else None

    def post(self, notice: Notice) -> None:
        """Let a signal take its turn; `pump` tells of it, at once when nothing is in the way."""
        self.counts.posted += notice.count
        free_at_ns = max(self._resting_until_ns, self._cap.free_at_ns)
        waits = len(self._backlog) > 0 or free_at_ns > self._clock()
        self._backlog.put(notice)
        if waits:
            self.counts.held_back += notice.count
            self._report(HeldBack(notice))

    def pump(self) -> None:
        """Tell of what waits, as far as cap and failures permit."""
        if self._pumping:  # a report made here has led to another signal: the loop below will come to it
            return
        self._pumping = True
        try:
            while self._clock() >= self._resting_until_ns and len(self._backlog) and self._cap.take(self._clock()):
                self._send_next()
        finally:
            self._pumping = False

    def _send_next(self) -> None:
        notice = self._backlog.take()
        if notice is None:
            return
        began_ns, error, sent = self._clock(), "", False
        try:
            self._broadcast(notice)
            sent = True
        except BroadcastFailedError as failure:
            error = str(failure) or type(failure).__name__
        finally:
            if not sent:
                self._backlog.give_back(notice)
                self._resting_until_ns = self._clock() + self._retry_ns
        self._count(notice, self._clock() - began_ns, error)

    def _count(self, notice: Notice, latency_ns: int, error: str) -> None:
        self.counts.last_latency_ns = latency_ns
        if error:
            self.counts.broadcast_failures += 1
        else:
            self.counts.broadcasts += 1
            self.counts.signals_told += notice.count
        self._report(Broadcast(notice, latency_ns, error))
