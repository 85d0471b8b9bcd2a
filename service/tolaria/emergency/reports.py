"""What the controller tells its observer, and its statistics. Data only: what follows from it is the observer's."""

from __future__ import annotations

from dataclasses import dataclass

from leyline.v1.enums_pb2 import EmergencyLevel
from tolaria.emergency.backlog import Notice
from tolaria.emergency.protocol import Acknowledgement, Clearer, EmergencyState, Response


@dataclass(frozen=True, slots=True)
class BoardWrite:
    """One write to the board: its time, and why it failed; empty when it did not."""

    latency_ns: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Escalated:
    """The level went up: do what `response` asks. `write` is None when a peer had raised it on the board itself."""

    before: EmergencyState
    state: EmergencyState
    response: Response
    write: BoardWrite | None


@dataclass(frozen=True, slots=True)
class Covered:
    """Raised once more, at or below the standing level: nothing further is asked."""

    level: EmergencyLevel.ValueType
    reason: str
    origin: str


@dataclass(frozen=True, slots=True)
class Broadcast:
    """A notice was handed to telemetry, or not: then `error` says why, it waits, and it must show as CRITICAL."""

    notice: Notice
    latency_ns: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class HeldBack:
    """A notice has to wait, behind the rate cap or others: keep it in the journal."""

    notice: Notice


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A participant has acted on the standing emergency."""

    state: EmergencyState
    acknowledgement: Acknowledgement


@dataclass(frozen=True, slots=True)
class DeadlineMissed:
    """The level's deadline passed; `state.missing` have not acknowledged."""

    state: EmergencyState


@dataclass(frozen=True, slots=True)
class Reissued:
    """The standing signal had gone from the board without a clearance, and was put on it again."""

    state: EmergencyState
    write: BoardWrite


@dataclass(frozen=True, slots=True)
class Cleared:
    """The emergency `before` is over. `write` is None when the operator cleared it on the board itself."""

    before: EmergencyState
    by: Clearer
    reason: str
    origin: str
    write: BoardWrite | None


@dataclass(frozen=True, slots=True)
class BoardUnreadable:
    """The board cannot be read any more: peers' signals do not arrive. Told once for each time that it breaks."""

    error: str


Report = (
    Escalated | Covered | Broadcast | HeldBack | Acknowledged | DeadlineMissed | Reissued | Cleared | BoardUnreadable
)


@dataclass(frozen=True, slots=True)
class EmergencyStatistics:
    """Counts since the controller was made. `raised` = signals told + `signals_waiting`; none is ever dropped.

    `broadcasts` are notices handed over, `signals_told` the signals that they stood for; `held_back` the signals that
    had to wait; `*_waiting` what waits now. Latencies are of the last one, 0 before the first.
    """

    level: EmergencyLevel.ValueType
    raised: int
    escalations: int
    halts: int
    cleared: int
    broadcasts: int
    signals_told: int
    broadcast_failures: int
    held_back: int
    notices_waiting: int
    signals_waiting: int
    board_failures: int
    deadlines_missed: int
    last_broadcast_latency_ns: int
    last_board_latency_ns: int
