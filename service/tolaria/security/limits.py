"""Limits of each caller: token buckets for its calls and for its mistakes, and what it has in flight."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

CALLERS_MAX: Final = 4096
"""Callers remembered; the one that has been idle for longest is forgotten, unless it has calls in flight."""


@dataclass(slots=True)
class Bucket:
    """A token bucket: `rate` per second, at most `size` at once. A rate of 0 is no limit."""

    rate: float
    size: float
    level: float
    at_s: float

    @classmethod
    def full(cls, rate: float, bursts: float, now_s: float) -> Bucket:
        """Returns a bucket that allows a burst of `bursts` seconds' worth, at least 1."""
        size = max(1.0, rate * bursts)
        return cls(rate, size, size, now_s)

    def take(self, now_s: float) -> bool:
        """Takes one if there is one; returns whether there was."""
        if not self.rate:
            return True
        self._fill(now_s)
        if self.level < 1:
            return False
        self.level -= 1
        return True

    def empty(self, now_s: float) -> bool:
        """Whether `take` would fail."""
        if not self.rate:
            return False
        self._fill(now_s)
        return self.level < 1

    def _fill(self, now_s: float) -> None:
        self.level = min(self.size, self.level + self.rate * (now_s - self.at_s))
        self.at_s = now_s


@dataclass(slots=True)
class Usage:
    """What one caller uses."""

    calls: Bucket
    mistakes: Bucket
    in_flight: int = 0
    streams: int = 0


@dataclass(frozen=True, slots=True)
class CallLimits:
    """The limits that hold for each caller, as the settings of the server name them."""

    calls_per_second: float
    bad_calls_per_second: float
    calls_in_flight_max: int
    streams_max: int


class CallerLimits:
    """The usage of each caller, by a key. Used on the event loop only; `clock` gives monotonic seconds."""

    def __init__(self, limits: CallLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._usage: OrderedDict[str, Usage] = OrderedDict()

    def adopt(self, limits: CallLimits) -> None:
        """Holds callers to these limits from now on; each begins with full buckets."""
        self._limits = limits
        for usage in self._usage.values():
            usage.calls, usage.mistakes = self._buckets()

    def usage(self, key: str) -> Usage:
        """Returns the usage of a caller, which counts as used now."""
        usage = self._usage.get(key)
        if usage is None:
            usage = self._usage[key] = Usage(*self._buckets())
            self._forget_oldest()
        self._usage.move_to_end(key)
        return usage

    def refusal(self, usage: Usage, *, stream: bool) -> str:
        """Returns why a further call is refused, and counts it if it is not; empty if it is allowed."""
        limits = self._limits
        if stream and usage.streams >= limits.streams_max:
            return f"a caller may have {limits.streams_max} streams at the same time (server.streams_max)"
        if not stream and usage.in_flight >= limits.calls_in_flight_max:
            return f"a caller may have {limits.calls_in_flight_max} calls in flight (server.calls_in_flight_max)"
        if not usage.calls.take(self._clock()):
            return f"a caller may make {limits.calls_per_second:g} calls per second (server.calls_per_second)"
        return ""

    def mistake(self, usage: Usage) -> None:
        """Counts a call that was the caller's mistake."""
        usage.mistakes.take(self._clock())

    def must_wait(self, usage: Usage) -> bool:
        """Whether the caller has made too many mistakes, so that the next one is answered late."""
        return usage.mistakes.empty(self._clock())

    def _buckets(self) -> tuple[Bucket, Bucket]:
        """Returns full buckets for calls and for mistakes."""
        now_s, limits = self._clock(), self._limits
        return Bucket.full(limits.calls_per_second, 2.0, now_s), Bucket.full(limits.bad_calls_per_second, 4.0, now_s)

    def _forget_oldest(self) -> None:
        if len(self._usage) <= CALLERS_MAX:
            return
        for key, usage in self._usage.items():
            if not usage.in_flight and not usage.streams:
                del self._usage[key]
                return
