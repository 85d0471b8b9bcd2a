"""A rollback coordinator with scripted participants, restorer, journal and board."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import anyio
import anyio.lowlevel

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL, ROLLBACK_TIER_UNSPECIFIED, RollbackTier
from tolaria.config import RollbackSettings
from tolaria.errors import JournalError, NoCheckpointError, PeerTimeoutError, TolariaError
from tolaria.journal.async_journal import AsyncJournal
from tolaria.journal.rows import RollbackRow, Row
from tolaria.rollback.coordinator import RollbackCoordinator
from tolaria.rollback.protocol import Call, ParticipantRequest, Rollback
from tolaria.signals import RollbackState, RollbackWriter
from tolaria.values.lineage import Lineage

Tier: TypeAlias = RollbackTier.ValueType
Work: TypeAlias = Callable[[Rollback], Awaitable[None]]


def budget_of(fast_s: float, full_s: float) -> RollbackSettings:
    """Settings with these budgets of the two tiers."""
    return RollbackSettings(fast_budget_s=fast_s, full_budget_s=full_s)


GENEROUS = budget_of(60.0, 60.0)


@dataclass(frozen=True)
class Response:
    """A participant's answer."""

    accepted: bool = True
    detail: str = "accepted"


class FakeParticipant:
    """Accepts every call unless `answers` has a response, an error, or None, which means no response, for it.

    Without a response it raises PeerTimeoutError after the timeout; if not `punctual`, it never returns.
    """

    def __init__(
        self,
        answers: dict[Call, Response | TolariaError | None] | None = None,
        *,
        name: str = "peer",
        log: list[str] | None = None,
        punctual: bool = True,
    ) -> None:
        self.answers = answers or {}
        self.name = name
        self.log = [] if log is None else log
        self.punctual = punctual
        self.calls: list[tuple[Call, ParticipantRequest]] = []
        self.cancelled: list[Call] = []

    async def prepare(self, request: ParticipantRequest, /) -> Response:
        """Answers as scripted, like the other three methods."""
        return await self._answer(Call.PREPARE, request)

    async def commit(self, request: ParticipantRequest, /) -> Response:
        return await self._answer(Call.COMMIT, request)

    async def confirm(self, request: ParticipantRequest, /) -> Response:
        return await self._answer(Call.CONFIRM, request)

    async def abort(self, request: ParticipantRequest, /) -> Response:
        return await self._answer(Call.ABORT, request)

    @property
    def called(self) -> list[Call]:
        """The calls so far."""
        return [call for call, _ in self.calls]

    async def _answer(self, call: Call, request: ParticipantRequest) -> Response:
        self.log.append(f"{self.name} {call.value}")
        self.calls.append((call, request))
        answer = self.answers.get(call, Response())
        if isinstance(answer, TolariaError):
            raise answer
        if answer is not None:
            return answer
        try:
            with anyio.move_on_after(request.timeout_s if self.punctual else None):
                await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            self.cancelled.append(call)
            raise
        raise PeerTimeoutError(self.name, "late")


class FakeRestorer:
    """Has a restore point at step 40 in memory and one at step 30 on disk; `work` performs the restore.

    `begin_copy` and `forbid` exclude each other, as in the lane.
    """

    def __init__(self, work: Work | None = None, log: list[str] | None = None) -> None:
        self.points: dict[Tier, list[int]] = {ROLLBACK_TIER_FAST: [40], ROLLBACK_TIER_FULL: [30]}
        self.finds = True
        self.boundary = anyio.Event()
        self.boundary.set()
        self.ends: TolariaError | None = None
        self.work = work or self.copies
        self.keeping: Work | None = None
        self.log = [] if log is None else log
        self.targets: list[tuple[Tier, int | None]] = []
        self.forbidden = self.begun = False
        self._lock = threading.Lock()

    async def choose(self, rollback: Rollback, /) -> None:
        """The nearest scripted point, of the fast tier if it has one; never returns unless `finds`."""
        await anyio.lowlevel.checkpoint()
        if not self.finds:
            await anyio.sleep_forever()
        automatic = rollback.tier == ROLLBACK_TIER_UNSPECIFIED
        for tier in (ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL) if automatic else (rollback.tier,):
            wanted = rollback.target_step
            if steps := [step for step in self.points[tier] if wanted is None or step <= wanted]:
                rollback.tier, rollback.chosen_step, rollback.chosen = tier, max(steps), "the nearest"
                return
        raise NoCheckpointError("nothing to go back to")

    async def reach_boundary(self) -> None:
        """Waits for `boundary`, which is set unless the test replaces it; raises `ends` if there is one."""
        if not self.boundary.is_set():
            self.log.append("lane waits")
            await self.boundary.wait()
        if self.ends is not None:
            raise self.ends

    async def keep(self, rollback: Rollback, /) -> None:
        """Runs `keeping`, if there is one."""
        rollback.left_step = 50
        if self.keeping is not None:
            await self.keeping(rollback)

    async def restore(self, rollback: Rollback, /) -> None:
        """Runs `work`."""
        self.log.append("lane restore")
        self.targets.append((rollback.tier, rollback.chosen_step))
        self.forbidden = self.begun = False
        await self.work(rollback)

    def forbid(self, rollback: Rollback, /) -> bool:
        """Forbids the copy unless it has begun."""
        with self._lock:
            self.forbidden = not self.begun
            return self.forbidden

    def begin_copy(self) -> bool:
        """Whether the live state may be changed now. Thread-safe."""
        with self._lock:
            self.begun = not self.forbidden
            return self.begun

    async def copies(self, rollback: Rollback) -> None:
        """The default work: a restore that completes immediately."""
        await anyio.lowlevel.checkpoint()
        assert self.begin_copy()
        restored(rollback)

    async def hangs(self, _rollback: Rollback) -> None:
        """Work that never reaches a step boundary."""
        await anyio.sleep_forever()


def restored(rollback: Rollback, step: int | None = None, *, state: str = "d", expected: str = "d") -> None:
    """Sets the results of a restore; by default of a proven restore of the target."""
    rollback.restored_step = rollback.destination if step is None else step
    rollback.state_digest, rollback.expected_digest, rollback.restore_ms = state, expected, 1.5


class FakeBoard(RollbackWriter):
    """Records what is written to the board."""

    def __init__(self) -> None:
        self.shown: list[tuple[RollbackState, str, int, int, Tier]] = []

    @property
    def states(self) -> list[RollbackState]:
        """The states shown, without repetitions."""
        shown = [state for state, *_ in self.shown]
        return [state for index, state in enumerate(shown) if index == 0 or state is not shown[index - 1]]

    def write(
        self,
        state: RollbackState,
        *,
        rollback_id: str,
        target_step: int,
        deadline_ns: int = 0,
        tier: Tier = ROLLBACK_TIER_UNSPECIFIED,
    ) -> None:
        """Records the values."""
        self.shown.append((state, rollback_id, target_step, deadline_ns, tier))


class FakeJournal(AsyncJournal):
    """Keeps rows in a list; fails while `error` is set and hangs while `hangs` is set."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.followed: list[Lineage] = []
        self.error: JournalError | None = None
        self.hangs = False

    @property
    def rollbacks(self) -> list[RollbackRow]:
        """The rows of rollbacks."""
        return [row for row in self.rows if isinstance(row, RollbackRow)]

    async def put(self, row: Row) -> None:
        """Keeps the row."""
        await self._answer()
        self.rows.append(row)

    async def follow(self, lineage: Lineage, detail: str) -> int:
        """Records the lineage."""
        await self._answer()
        self.followed.append(lineage)
        return 0

    async def _answer(self) -> None:
        await anyio.lowlevel.checkpoint()
        if self.hangs:
            await anyio.sleep_forever()
        if self.error is not None:
            raise self.error


@dataclass
class CoordinatedParts:
    """A coordinator and its collaborators; `log` has their calls in order."""

    settings: RollbackSettings = GENEROUS
    tamiyo: FakeParticipant = field(default_factory=FakeParticipant)
    kasmina: FakeParticipant = field(default_factory=FakeParticipant)
    restorer: FakeRestorer = field(default_factory=FakeRestorer)
    peers: Sequence[str] = ("tamiyo", "kasmina")
    log: list[str] = field(default_factory=list)
    board: FakeBoard = field(default_factory=FakeBoard)
    journal: FakeJournal = field(default_factory=FakeJournal)

    def __post_init__(self) -> None:
        self.tamiyo.name, self.kasmina.name = "tamiyo", "kasmina"
        self.tamiyo.log = self.kasmina.log = self.restorer.log = self.log
        known = {"tamiyo": self.tamiyo, "kasmina": self.kasmina}
        self.coordinator = RollbackCoordinator(
            {name: known.get(name, FakeParticipant(name=name)) for name in self.peers},
            self.restorer,
            run_id="run",
            settings=self.settings,
            board=self.board,
            journal=self.journal,
        )

    async def run(self, rollback: Rollback | None = None) -> Rollback:
        """Carries out a rollback and returns it."""
        rollback = rollback or new_rollback()
        await self.coordinator.run(rollback)
        return rollback


def new_rollback(
    rollback_id: str = "r1", tier: Tier = ROLLBACK_TIER_UNSPECIFIED, target_step: int | None = None
) -> Rollback:
    """A rollback requested at step 50 and at 7 ns."""
    return Rollback(tier, target_step, "loss exploded", "operator", rollback_id=rollback_id, global_step=50, at_ns=7)
