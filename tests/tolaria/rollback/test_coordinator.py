from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import anyio
import pytest

from leyline.v1.enums_pb2 import (
    ROLLBACK_TIER_FAST,
    ROLLBACK_TIER_FULL,
    ROLLBACK_TIER_UNSPECIFIED,
    RollbackTier,
)
from tolaria.errors import (
    BreakerOpenError,
    InvalidFieldError,
    JournalUnavailableError,
    NoCheckpointError,
    PeerTimeoutError,
    RestoreUnprovenError,
    StateMismatchError,
    WrongStateError,
)
from tolaria.journal.rows import RollbackRow
from tolaria.rollback.budget import RollbackBudgets
from tolaria.rollback.coordinator import OUTCOMES_KEPT, Clocks, RollbackCoordinator
from tolaria.rollback.orders import Ending, RestoreOrder, RestoreOutcome, RollbackRequest
from tolaria.rollback.participants import Call, RollbackOrder, Seat, Stance
from tolaria.rollback.phases import Phase

pytestmark = pytest.mark.anyio

Tier: TypeAlias = RollbackTier.ValueType


@dataclass(frozen=True)
class Said:
    accepted: bool = True
    detail: str = "fine"


class FakePeer:
    """Says yes to everything, but for what `answers` has for a call: an answer, an error, or None for silence."""

    def __init__(self, name: str, log: list[str], answers: dict[Call, Said | Exception | None]) -> None:
        self.name = name
        self.log = log
        self.answers = answers
        self.orders: list[RollbackOrder] = []

    async def prepare(self, order: RollbackOrder, /) -> Said:
        return await self._answer(Call.PREPARE, order)

    async def commit(self, order: RollbackOrder, /) -> Said:
        return await self._answer(Call.COMMIT, order)

    async def confirm(self, order: RollbackOrder, /) -> Said:
        return await self._answer(Call.CONFIRM, order)

    async def abort(self, order: RollbackOrder, /) -> Said:
        return await self._answer(Call.ABORT, order)

    async def _answer(self, call: Call, order: RollbackOrder) -> Said:
        self.log.append(f"{self.name} {call.value}")
        self.orders.append(order)
        answer = self.answers.get(call, Said())
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            await anyio.sleep_forever()
        assert answer is not None
        return answer


class FakeLane:
    """Has a point at step 40 in memory and one at step 30 on disk, unless the test says otherwise."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.points: dict[Tier, list[int]] = {ROLLBACK_TIER_FAST: [40], ROLLBACK_TIER_FULL: [30]}
        self.orders: list[RestoreOrder] = []
        self.work: Callable[[RestoreOrder], Awaitable[RestoreOutcome]] = self.bring_back

    async def locate(self, tier: Tier, at_or_before: int | None, /) -> int | None:
        await anyio.lowlevel.checkpoint()
        return max((p for p in self.points[tier] if at_or_before is None or p <= at_or_before), default=None)

    async def restore(self, order: RestoreOrder, /) -> RestoreOutcome:
        self.log.append("lane restore")
        self.orders.append(order)
        return await self.work(order)

    async def bring_back(self, order: RestoreOrder) -> RestoreOutcome:
        await anyio.lowlevel.checkpoint()
        assert not order.refuses()
        return RestoreOutcome(order.target_step, "d", "d", 1.5)


class House:
    """A coordinator and everything around it that the test looks at."""

    def __init__(
        self,
        *,
        tamiyo: dict[Call, Said | Exception | None] | None = None,
        kasmina: dict[Call, Said | Exception | None] | None = None,
        budgets: RollbackBudgets | None = None,
        clock: Callable[[], float] = lambda: 100.0,
        peers: Sequence[str] = ("tamiyo", "kasmina"),
    ) -> None:
        self.log: list[str] = []
        self.rows: list[RollbackRow] = []
        self.slots: list[tuple[Phase, int, int, Tier]] = []
        self.journal_error: JournalUnavailableError | None = None
        self.journal_hangs = False
        self.lane = FakeLane(self.log)
        answers = {"tamiyo": tamiyo or {}, "kasmina": kasmina or {}}
        self.peers = {name: FakePeer(name, self.log, answers[name]) for name in peers}
        self.coordinator = RollbackCoordinator(
            [Seat(name, peer) for name, peer in self.peers.items()],
            self.lane,
            run_id="run",
            budgets=budgets or RollbackBudgets(),
            on_slot=lambda phase, _id, step, deadline_ns, tier: self.slots.append((phase, step, deadline_ns, tier)),
            record=self._record,
            clocks=Clocks(clock, lambda: 7),
        )

    async def _record(self, row: RollbackRow) -> None:
        await anyio.lowlevel.checkpoint()
        if self.journal_hangs:
            await anyio.sleep_forever()
        if self.journal_error is not None:
            raise self.journal_error
        self.rows.append(row)

    @property
    def phases(self) -> list[Phase]:
        """The phases that the board showed, each once."""
        shown = [phase for phase, *_ in self.slots]
        return [phase for index, phase in enumerate(shown) if index == 0 or phase is not shown[index - 1]]


def request(
    rollback_id: str = "r1", tier: Tier = ROLLBACK_TIER_UNSPECIFIED, target_step: int | None = None
) -> RollbackRequest:
    """A request at step 50."""
    return RollbackRequest(rollback_id, tier, target_step, 50, "loss exploded")


async def test_a_rollback_with_everybody_in_it() -> None:
    """Each phase asks Tamiyo, then Kasmina, then the lane; the outcome, the row and the board agree."""
    house = House()
    outcome = await house.coordinator.roll_back(request())
    assert house.log == [
        "tamiyo prepare",
        "kasmina prepare",
        "tamiyo commit",
        "kasmina commit",
        "lane restore",
        "tamiyo confirm",
        "kasmina confirm",
    ]
    assert outcome.ending is Ending.RESTORED
    assert outcome.coordinated
    assert (outcome.tier, outcome.restored_step, outcome.state_digest) == (ROLLBACK_TIER_FAST, 40, "d")
    assert house.phases == [Phase.PREPARE, Phase.COMMIT, Phase.CONFIRM, Phase.IDLE]
    assert house.slots[-1] == (Phase.IDLE, 40, 100_500_000_000, ROLLBACK_TIER_FAST)
    row = RollbackRow("r1", 7, "run", "fast", 50, 40, "restored", "loss exploded", "d", "d", 0.0, 1)
    assert house.rows == [row]


@pytest.mark.parametrize(
    ("tier", "target_step", "points", "chosen"),
    [
        (ROLLBACK_TIER_UNSPECIFIED, None, ([20, 40], [30]), (ROLLBACK_TIER_FAST, 40)),
        (ROLLBACK_TIER_UNSPECIFIED, 39, ([20, 40], [30]), (ROLLBACK_TIER_FAST, 20)),
        (ROLLBACK_TIER_UNSPECIFIED, 35, ([40], [30]), (ROLLBACK_TIER_FULL, 30)),
        (ROLLBACK_TIER_UNSPECIFIED, None, ([], [30]), (ROLLBACK_TIER_FULL, 30)),
        (ROLLBACK_TIER_FULL, None, ([40], [30]), (ROLLBACK_TIER_FULL, 30)),
        (ROLLBACK_TIER_FAST, 0, ([0, 40], [30]), (ROLLBACK_TIER_FAST, 0)),
    ],
)
async def test_which_point_is_gone_back_to(
    tier: Tier, target_step: int | None, points: tuple[list[int], list[int]], chosen: tuple[Tier, int]
) -> None:
    """Automatic means fast where the ring has a point at or before the target, else full."""
    house = House()
    house.lane.points = dict(zip((ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL), points, strict=True))
    outcome = await house.coordinator.roll_back(request(tier=tier, target_step=target_step))
    assert (outcome.tier, outcome.restored_step) == chosen
    assert {(order.tier, order.target_step) for order in house.lane.orders} == {chosen}
    assert {order.target_step for order in house.peers["kasmina"].orders} == {chosen[1]}


@pytest.mark.parametrize("tier", [ROLLBACK_TIER_FAST, ROLLBACK_TIER_UNSPECIFIED])
async def test_nowhere_to_go_back_to(tier: Tier) -> None:
    """Without a point nobody is asked, and the failure says what was looked for."""
    house = House()
    house.lane.points = {ROLLBACK_TIER_FAST: [40], ROLLBACK_TIER_FULL: [30]}
    outcome = await house.coordinator.roll_back(request(tier=tier, target_step=5))
    assert isinstance(outcome.error, NoCheckpointError)
    assert "at or before step 5" in str(outcome.error)
    assert house.log == []
    assert house.phases == [Phase.PREPARE, Phase.ABORTED]
    assert [(row.outcome, row.restored_step) for row in house.rows] == [("failed", -1)]


UNAVAILABLE = PeerTimeoutError("tamiyo", "late")
NO = Said(accepted=False, detail="no")


@pytest.mark.parametrize(
    ("tamiyo", "kasmina", "coordinated", "stances"),
    [
        ({Call.PREPARE: NO}, {}, True, {Stance.REFUSED, Stance.ACCEPTED}),
        ({}, {Call.PREPARE: UNAVAILABLE}, True, {Stance.SILENT, Stance.ACCEPTED}),
        ({}, {Call.COMMIT: NO}, True, {Stance.REFUSED, Stance.ACCEPTED}),
        ({Call.PREPARE: BreakerOpenError("tamiyo", "open")}, {}, True, {Stance.NOT_ASKED, Stance.ACCEPTED}),
        ({Call.PREPARE: NO}, {Call.PREPARE: UNAVAILABLE}, False, {Stance.REFUSED, Stance.SILENT}),
        ({Call.PREPARE: NO}, {Call.CONFIRM: NO}, False, {Stance.REFUSED, Stance.ACCEPTED}),
        ({Call.COMMIT: UNAVAILABLE}, {Call.COMMIT: NO}, False, {Stance.REFUSED, Stance.ACCEPTED, Stance.SILENT}),
    ],
)
async def test_it_goes_on_without_peers(
    tamiyo: dict[Call, Said | Exception | None],
    kasmina: dict[Call, Said | Exception | None],
    coordinated: bool,
    stances: set[Stance],
) -> None:
    """One peer missing leaves a quorum; two leave Tolaria, which has the last word: restored, but uncoordinated."""
    house = House(tamiyo=tamiyo, kasmina=kasmina)
    outcome = await house.coordinator.roll_back(request())
    assert outcome.ending is Ending.RESTORED
    assert outcome.coordinated == coordinated
    assert {ballot.stance for ballot in outcome.votes} == stances
    assert [row.coordinated for row in house.rows] == [int(coordinated)]
    assert not any("abort" in line for line in house.log)


async def test_who_said_no_is_asked_no_more() -> None:
    """A refusal at prepare ends a peer's part."""
    house = House(tamiyo={Call.PREPARE: NO})
    await house.coordinator.roll_back(request())
    assert [line for line in house.log if line.startswith("tamiyo")] == ["tamiyo prepare"]


async def test_without_any_peer_tolaria_is_the_majority() -> None:
    """A run that has no peers is not uncoordinated."""
    outcome = await House(peers=()).coordinator.roll_back(request())
    assert outcome.coordinated


async def test_a_failed_restore_is_taken_back_everywhere() -> None:
    """Peers that promised are told to abort, whoever refused or could not be reached at all is left alone."""
    house = House(tamiyo={Call.PREPARE: UNAVAILABLE})

    async def fail(_order: RestoreOrder) -> RestoreOutcome:
        raise StateMismatchError(["parameter/w: in the image only"])

    house.lane.work = fail
    outcome = await house.coordinator.roll_back(request())
    assert outcome.ending is Ending.FAILED
    assert isinstance(outcome.error, StateMismatchError)
    assert sorted(house.log[-2:]) == ["kasmina abort", "tamiyo abort"]
    assert not outcome.coordinated
    assert house.phases == [Phase.PREPARE, Phase.COMMIT, Phase.ABORTED]
    assert "parameter/w" in house.rows[0].reason
    refused = House(kasmina={Call.PREPARE: NO}, tamiyo={Call.PREPARE: BreakerOpenError("tamiyo", "open")})
    refused.lane.work = fail
    await refused.coordinator.roll_back(request())
    assert not any("abort" in line for line in refused.log)


async def test_a_restore_that_cannot_be_proved_has_failed() -> None:
    """Two digests that differ: nothing is confirmed, peers abort, and the outcome holds both digests."""
    house = House()

    async def wrong(order: RestoreOrder) -> RestoreOutcome:
        return RestoreOutcome(order.target_step, "live", "captured", 1.0)

    house.lane.work = wrong
    outcome = await house.coordinator.roll_back(request())
    assert (outcome.ending, outcome.restored_step, outcome.unproven) == (Ending.FAILED, 40, True)
    assert "the live state was overwritten and is not what was captured" in str(outcome.error)
    assert isinstance(outcome.error, RestoreUnprovenError)
    assert [(r.outcome, r.restored_step, r.state_digest, r.expected_digest) for r in house.rows] == [
        ("failed", -1, "live", "captured")
    ]
    assert house.phases == [Phase.PREPARE, Phase.COMMIT, Phase.CONFIRM, Phase.ABORTED]


async def test_going_further_back_than_agreed_is_uncoordinated() -> None:
    """Where a damaged checkpoint gave way to an older one, the peers are at another step than the model."""
    house = House()

    async def older(_order: RestoreOrder) -> RestoreOutcome:
        return RestoreOutcome(10, "d", "d", 1.0)

    house.lane.work = older
    outcome = await house.coordinator.roll_back(request())
    assert (outcome.ending, outcome.restored_step, outcome.coordinated) == (Ending.RESTORED, 10, False)


async def test_the_same_id_is_carried_out_once() -> None:
    """Asked twice at once, or again later, it answers with the one rollback; failures too."""
    house = House()
    outcomes = []

    async def ask() -> None:
        outcomes.append(await house.coordinator.roll_back(request()))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        tasks.start_soon(ask)
    outcomes.append(await house.coordinator.roll_back(request()))
    assert house.log.count("lane restore") == 1
    assert outcomes[0] is outcomes[1] is outcomes[2]


async def test_a_second_rollback_is_refused_while_one_runs() -> None:
    """It is told so, changes nothing, and can be asked for again."""
    house = House()
    inside, go_on = anyio.Event(), anyio.Event()

    async def slow(order: RestoreOrder) -> RestoreOutcome:
        inside.set()
        await go_on.wait()
        return await house.lane.bring_back(order)

    house.lane.work = slow
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(house.coordinator.roll_back, request("first"))
        await inside.wait()
        with pytest.raises(WrongStateError, match="another rollback is running"):
            await house.coordinator.roll_back(request("second"))
        go_on.set()
    assert (await house.coordinator.roll_back(request("second"))).ending is Ending.RESTORED
    assert [row.rollback_id for row in house.rows] == ["first", "second"]


@pytest.mark.parametrize("rollback_id", ["", "x" * 65, "é" * 33])
async def test_an_id_that_the_board_cannot_hold_is_refused(rollback_id: str) -> None:
    """Before anything is shown or asked."""
    house = House()
    with pytest.raises(InvalidFieldError, match="rollback_id"):
        await house.coordinator.roll_back(request(rollback_id))
    assert house.slots == []


async def test_a_journal_that_fails_is_told_and_changes_nothing() -> None:
    """The rollback stands; its outcome says that the journal does not hold it."""
    house = House()
    house.journal_error = JournalUnavailableError("disk full")
    outcome = await house.coordinator.roll_back(request())
    assert outcome.ending is Ending.RESTORED
    assert outcome.unrecorded is house.journal_error


async def test_a_journal_that_hangs_holds_up_nothing() -> None:
    """The rollback ends, which lets the lane go on, and says that the journal does not hold it."""
    house = House()
    house.journal_hangs = True
    with anyio.fail_after(10):
        outcome = await house.coordinator.roll_back(request())
    assert outcome.ending is Ending.RESTORED
    assert isinstance(outcome.unrecorded, JournalUnavailableError)


async def test_outcomes_are_not_kept_forever() -> None:
    """The oldest are forgotten."""
    house = House()
    for number in range(OUTCOMES_KEPT + 5):
        await house.coordinator.roll_back(request(f"r{number}"))
    assert len(house.coordinator._outcomes) == OUTCOMES_KEPT
    assert len(house.rows) == OUTCOMES_KEPT + 5


async def test_an_error_of_another_kind_leaves_nothing_half_done() -> None:
    """A mistake in the restorer comes out, peers are told, the row is written, and the next rollback works."""
    house = House()

    async def broken(_order: RestoreOrder) -> RestoreOutcome:
        raise ZeroDivisionError

    house.lane.work = broken
    with pytest.raises(ExceptionGroup) as caught:
        await house.coordinator.roll_back(request())
    assert caught.group_contains(ZeroDivisionError)
    assert {"tamiyo abort", "kasmina abort"} < set(house.log)
    assert [row.outcome for row in house.rows] == ["failed"]
    house.lane.work = house.lane.bring_back
    assert (await house.coordinator.roll_back(request("r2"))).ending is Ending.RESTORED


def test_every_seat_has_a_share() -> None:
    """A participant without a share of the budget, or one that calls itself Tolaria, is a mistake found at once."""
    with pytest.raises(ValueError, match="kasmina"):
        House(budgets=RollbackBudgets(shares={"tamiyo": 0.5, "tolaria": 0.5}))
