"""Who takes part in a rollback beside Tolaria: what they are asked, what they say, and whom that lets be asked next.

Owns the protocol and the rules of the vote; pure. Must not know how participants are reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, unique
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RollbackOrder:
    """One question to one participant. `timeout_s`: how long its answer is waited for."""

    rollback_id: str
    target_step: int
    reason: str
    timeout_s: float


class Vote(Protocol):
    """An answer: whether it will, or has, and in which words."""

    @property
    def accepted(self) -> bool: ...  # noqa: D102 - said above
    @property
    def detail(self) -> str: ...  # noqa: D102 - said above


class RollbackParticipant(Protocol):
    """Answers are idempotent by rollback_id. A participant that cannot be had in time raises a `PeerError`."""

    async def prepare(self, order: RollbackOrder, /) -> Vote:
        """Promise to go back; nothing changes."""
        ...

    async def commit(self, order: RollbackOrder, /) -> Vote:
        """Go back."""
        ...

    async def confirm(self, order: RollbackOrder, /) -> Vote:
        """It stands."""
        ...

    async def abort(self, order: RollbackOrder, /) -> Vote:
        """Take the promise back, or undo what was committed."""
        ...


@dataclass(frozen=True, slots=True)
class Seat:
    """A participant's place: its name, which has a share of the budget, and how it is asked."""

    name: str
    participant: RollbackParticipant


@unique
class Call(Enum):
    """What a participant is asked."""

    PREPARE = "prepare"
    COMMIT = "commit"
    CONFIRM = "confirm"
    ABORT = "abort"


@unique
class Stance(Enum):
    """What came of asking."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    SILENT = "silent"
    """No answer: it may have done it, or not."""
    NOT_ASKED = "not_asked"
    """Out of reach before the call was made, or its share of the budget was spent."""


@dataclass(frozen=True, slots=True)
class Ballot:
    """One question and what came of it. `latency_ms` is the asker's wait."""

    participant: str
    call: Call
    stance: Stance
    detail: str
    latency_ms: float


_BEFORE = {Call.COMMIT: Call.PREPARE, Call.CONFIRM: Call.COMMIT}


def may_be_asked(ballots: Sequence[Ballot], name: str, call: Call) -> bool:
    """Whether `call` makes sense to this participant: it took the call before; abort: it may have taken any."""
    mine = [ballot for ballot in ballots if ballot.participant == name]
    if call is Call.ABORT:
        return any(ballot.stance in {Stance.ACCEPTED, Stance.SILENT} for ballot in mine)
    if call is Call.PREPARE:
        return True
    return any(ballot.call is _BEFORE[call] and ballot.stance is Stance.ACCEPTED for ballot in mine)


def is_coordinated(ballots: Sequence[Ballot], peers: int) -> bool:
    """Whether a majority of all participants, Tolaria included and in favour, confirmed: 2 of 3."""
    confirmed = sum(b.call is Call.CONFIRM and b.stance is Stance.ACCEPTED for b in ballots)
    return confirmed + 1 >= (peers + 1) // 2 + 1
