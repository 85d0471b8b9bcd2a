"""Settings of Tamiyo and Kasmina: where they are, and how they are called. Must not know where values come from."""

from __future__ import annotations

import difflib
from typing import Annotated, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from tolaria.config.parts import Seconds, Section, Target

SecondsOrZero = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]


class PeerSettings(Section):
    """One peer."""

    methods: ClassVar[tuple[str, ...]] = ()
    """Those of its calls that may have a deadline of their own; a rollback's calls get theirs from its budget."""

    target: Target = ""
    """host:port of the peer. Empty: the reference peer that comes with Tolaria is started beside it."""

    timeout_s: Seconds = 2.0
    """Deadline of one call, cancelled on the peer's side too. 2.0: an answer later than that is stale anyway."""

    timeouts_s: dict[str, Seconds] = Field(default_factory=dict)
    """Shorter deadlines of single methods, by name, as in { EvaluateStep = 0.5 }. Empty: timeout_s holds for all."""

    retries: int = Field(default=1, ge=0, le=10)
    """Times that a call that may be repeated is made again, within its deadline, when the peer was away: 20 ms later,
    then 40, and so on. 1: a connection that was cut is back by then; a peer that is down is left to its breaker."""

    in_flight_max: int = Field(default=8, ge=1, le=10_000)
    """Most calls in flight. 8: one is usual, and a rollback adds one; more means that the peer hangs."""

    waiting_max: int = Field(default=32, ge=0, le=10_000)
    """Most calls that wait for others to end, within their own deadlines; a further one is refused at once.
    32: a burst passes."""

    drain_s: SecondsOrZero = 0.5
    """How long calls in flight may take when the channel closes, before they are cancelled. 0.5: a sound peer answers
    in milliseconds, and service.drain_timeout_s has other things to pay for."""

    def timeout_of(self, method: str) -> float:
        """The deadline of a call of `method`, in seconds."""
        return self.timeouts_s.get(method, self.timeout_s)

    @field_validator("timeouts_s")
    @classmethod
    def _of_known_methods(cls, timeouts_s: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        longest_s = info.data.get("timeout_s")  # absent where it is wrong itself, which is told already
        for method, seconds in timeouts_s.items():
            if method not in cls.methods:
                close = difflib.get_close_matches(method, cls.methods, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(cls.methods)}"
                raise ValueError(f"{method!r} is no method with a deadline of its own; {hint}")
            # Others wait for a peer as long as timeout_s says, and no longer.
            if longest_s is not None and seconds > longest_s:
                raise ValueError(f"gives {method} {seconds} s, more than timeout_s ({longest_s}), the longest of all")
        return timeouts_s


class TamiyoSettings(PeerSettings):
    """Tamiyo, the controller."""

    methods: ClassVar[tuple[str, ...]] = ("EvaluateEpoch", "EvaluateStep")


class KasminaSettings(PeerSettings):
    """Kasmina, the executor."""

    methods: ClassVar[tuple[str, ...]] = ("ApplyCommand", "ExportSeedStates")
