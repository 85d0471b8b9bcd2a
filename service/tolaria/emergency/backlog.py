"""Emergency signals on their way to telemetry: what is told of one, and those that wait their turn.

Owns order and bounds: nothing is ever dropped, but signals that wait are put together. Two that say the same (level,
reason, origin) become one that counts both, at the place of the first. When `reasons_max` different ones wait, further
ones of a level become a single one, whose reason is the first of theirs. So the counts of all that comes out add up to
the number of signals that went in.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, replace

from leyline.v1.emergency_pb2 import EmergencySignal
from leyline.v1.enums_pb2 import EmergencyLevel

SIGNAL_VERSION = 1
REASON_CHARACTERS_MAX = 1000
VARIOUS = "various"
_MS = 1_000_000
_Key = tuple[EmergencyLevel.ValueType, str, str]


@dataclass(frozen=True, slots=True)
class Notice:
    """A signal to be told, `count` of them from `signal.timestamp_ms` until `last_ns` (both monotonic)."""

    signal: EmergencySignal
    last_ns: int
    count: int = 1


def new_notice(level: EmergencyLevel.ValueType, reason: str, origin: str, at_ns: int) -> Notice:
    """One signal raised at `at_ns` (monotonic), its reason cut to REASON_CHARACTERS_MAX.

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
    """What `payload_checksum` of a whole signal is: 32 bytes."""
    bare = EmergencySignal()
    bare.CopyFrom(signal)
    bare.ClearField("payload_checksum")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).digest()


class Backlog:
    """Notices that wait, first come first. Holds at most `reasons_max` and one more for each level."""

    def __init__(self, reasons_max: int) -> None:
        self._reasons_max = reasons_max
        self._waiting: OrderedDict[_Key, Notice] = OrderedDict()

    def __len__(self) -> int:
        """Notices that wait."""
        return len(self._waiting)

    @property
    def signals(self) -> int:
        """Signals that wait: the sum of the notices' counts."""
        return sum(notice.count for notice in self._waiting.values())

    def put(self, notice: Notice) -> None:
        """Let a notice wait behind the others, or join the one that says the same."""
        key = _key(notice)
        if key not in self._waiting and len(self._waiting) >= self._reasons_max:
            key = (notice.signal.level, "", VARIOUS)
        first = self._waiting.get(key)
        self._waiting[key] = notice if first is None else _together(first, notice)

    def take(self) -> Notice | None:
        """The notice whose turn it is; None when none waits."""
        return self._waiting.popitem(last=False)[1] if self._waiting else None

    def give_back(self, notice: Notice) -> None:
        """Let a notice that was taken wait again, before all others."""
        key = _key(notice)
        later = self._waiting.get(key)
        self._waiting[key] = notice if later is None else _together(notice, later)
        self._waiting.move_to_end(key, last=False)


def _key(notice: Notice) -> _Key:
    return notice.signal.level, notice.signal.reason, notice.signal.origin


def _together(first: Notice, later: Notice) -> Notice:
    return replace(first, count=first.count + later.count, last_ns=max(first.last_ns, later.last_ns))
