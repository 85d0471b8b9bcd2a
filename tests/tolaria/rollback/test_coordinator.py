from __future__ import annotations

import anyio
import pytest

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL, ROLLBACK_TIER_UNSPECIFIED
from support.rollbacks import (
    CoordinatedParts,
    FakeParticipant,
    FakeRestorer,
    Response,
    Tier,
    budget_of,
    new_rollback,
    restored,
)
from tolaria.errors import (
    BreakerOpenError,
    InvalidFieldError,
    JournalUnavailableError,
    NoCheckpointError,
    PeerTimeoutError,
    RestoreUnprovenError,
    SignalValueError,
    StateMismatchError,
    TolariaError,
    WrongStateError,
)
from tolaria.journal.rows import RollbackRow
from tolaria.rollback.protocol import Call, Ending, Rollback, VoteOutcome
from tolaria.signals import RollbackState

pytestmark = pytest.mark.anyio

Answers = dict[Call, Response | TolariaError | None]
UNAVAILABLE = PeerTimeoutError("tamiyo", "late")
UNREACHABLE = BreakerOpenError("tamiyo", "open")
NO = Response(accepted=False, detail="no")


async def test_a_rollback_with_all_participants() -> None:
    """Each phase calls Tamiyo, then Kasmina, then the lane; the outcome, the row and the board agree."""
    parts = CoordinatedParts(settings=budget_of(30.0, 60.0))
    rollback = await parts.run()
    assert parts.log == [
        "tamiyo prepare",
        "kasmina prepare",
        "tamiyo commit",
        "kasmina commit",
        "lane restore",
        "tamiyo confirm",
        "kasmina confirm",
    ]
    assert (rollback.ending, rollback.coordinated, rollback.error) == (Ending.RESTORED, True, None)
    assert (rollback.tier, rollback.restored_step, rollback.state_digest) == (ROLLBACK_TIER_FAST, 40, "d")
    assert parts.board.states == [
        RollbackState.PREPARE,
        RollbackState.COMMIT,
        RollbackState.CONFIRM,
        RollbackState.IDLE,
    ]
    assert rollback.boundary_s is not None
    deadline_ns = int((rollback.boundary_s + 30.0) * 1e9)
    assert parts.board.shown[-1] == (RollbackState.IDLE, "r1", 40, deadline_ns, ROLLBACK_TIER_FAST)
    assert parts.journal.rollbacks == [
        RollbackRow(
            *(
                "r1",
                7,
                "run",
                "fast",
                50,
                40,
                "restored",
                "loss exploded",
                "d",
                "d",
                rollback.latency_ms,
                1,
                "operator",
            ),
            waited_ms=rollback.waited_ms,
            chosen="the nearest",
        )
    ]


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
async def test_choice_of_the_restore_point(
    tier: Tier, target_step: int | None, points: tuple[list[int], list[int]], chosen: tuple[Tier, int]
) -> None:
    """Without a tier it is the fast one if memory has a point at or before the target, else the full one."""
    parts = CoordinatedParts()
    parts.restorer.points = dict(zip((ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL), points, strict=True))
    rollback = await parts.run(new_rollback(tier=tier, target_step=target_step))
    assert (rollback.tier, rollback.restored_step) == chosen
    assert parts.restorer.targets == [chosen]
    assert {request.target_step for _, request in parts.kasmina.calls} == {chosen[1]}


@pytest.mark.parametrize("tier", [ROLLBACK_TIER_FAST, ROLLBACK_TIER_UNSPECIFIED])
async def test_without_a_restore_point_the_rollback_fails(tier: Tier) -> None:
    """No participant is called, and the lane does not have to reach a step boundary."""
    parts = CoordinatedParts()
    rollback = await parts.run(new_rollback(tier=tier, target_step=5))
    assert isinstance(rollback.error, NoCheckpointError)
    assert parts.log == []
    assert parts.board.states == [RollbackState.PREPARE, RollbackState.ABORTED]
    assert [(row.outcome, row.restored_step) for row in parts.journal.rollbacks] == [("failed", -1)]


@pytest.mark.parametrize(
    ("tamiyo", "kasmina", "coordinated", "outcomes"),
    [
        ({Call.PREPARE: NO}, {}, True, {VoteOutcome.REFUSED, VoteOutcome.ACCEPTED}),
        ({}, {Call.PREPARE: UNAVAILABLE}, True, {VoteOutcome.SILENT, VoteOutcome.ACCEPTED}),
        ({}, {Call.COMMIT: NO}, True, {VoteOutcome.REFUSED, VoteOutcome.ACCEPTED}),
        ({Call.PREPARE: UNREACHABLE}, {}, True, {VoteOutcome.NOT_ASKED, VoteOutcome.ACCEPTED}),
        ({Call.PREPARE: NO}, {Call.PREPARE: UNAVAILABLE}, False, {VoteOutcome.REFUSED, VoteOutcome.SILENT}),
        ({Call.PREPARE: NO}, {Call.CONFIRM: NO}, False, {VoteOutcome.REFUSED, VoteOutcome.ACCEPTED}),
        (
            {Call.COMMIT: UNAVAILABLE},
            {Call.COMMIT: NO},
            False,
            {VoteOutcome.REFUSED, VoteOutcome.ACCEPTED, VoteOutcome.SILENT},
        ),
    ],
)
async def test_a_rollback_continues_without_peers(
    tamiyo: Answers, kasmina: Answers, coordinated: bool, outcomes: set[VoteOutcome]
) -> None:
    """One missing peer leaves a quorum; without both Tolaria restores uncoordinated."""
    parts = CoordinatedParts(tamiyo=FakeParticipant(tamiyo), kasmina=FakeParticipant(kasmina))
    rollback = await parts.run()
    assert (rollback.ending, rollback.coordinated) == (Ending.RESTORED, coordinated)
    assert {vote.outcome for vote in rollback.votes} == outcomes
    assert [row.coordinated for row in parts.journal.rollbacks] == [int(coordinated)]
    assert not any("abort" in line for line in parts.log)


async def test_a_peer_that_refused_is_not_called_again() -> None:
    """A refusal to prepare ends a peer's part."""
    parts = CoordinatedParts(tamiyo=FakeParticipant({Call.PREPARE: NO}))
    await parts.run()
    assert parts.tamiyo.called == [Call.PREPARE]


async def test_without_peers_tolaria_is_the_majority() -> None:
    """A run that has no peers is not uncoordinated."""
    assert (await CoordinatedParts(peers=()).run()).coordinated


async def test_a_failed_restore_is_aborted_with_the_peers() -> None:
    """Peers that may have prepared get an abort; those that refused or could not be reached do not."""

    async def fails(_rollback: Rollback) -> None:
        raise StateMismatchError(["parameter/w: in the image only"])

    parts = CoordinatedParts(tamiyo=FakeParticipant({Call.PREPARE: UNAVAILABLE}), restorer=FakeRestorer(fails))
    rollback = await parts.run()
    assert (rollback.ending, rollback.coordinated) == (Ending.FAILED, False)
    assert isinstance(rollback.error, StateMismatchError)
    assert sorted(parts.log[-2:]) == ["kasmina abort", "tamiyo abort"]
    assert parts.board.states == [RollbackState.PREPARE, RollbackState.COMMIT, RollbackState.ABORTED]
    assert "parameter/w" in parts.journal.rollbacks[0].reason
    unprepared = CoordinatedParts(
        kasmina=FakeParticipant({Call.PREPARE: NO}),
        tamiyo=FakeParticipant({Call.PREPARE: UNREACHABLE}),
        restorer=FakeRestorer(fails),
    )
    await unprepared.run()
    assert not any("abort" in line for line in unprepared.log)


async def test_a_restore_with_different_digests_has_failed() -> None:
    """It is not confirmed, peers get an abort, and the row has both digests."""

    async def wrong(rollback: Rollback) -> None:
        restored(rollback, state="live", expected="captured")

    parts = CoordinatedParts(restorer=FakeRestorer(wrong))
    rollback = await parts.run()
    assert (rollback.ending, rollback.restored_step, rollback.unproven) == (Ending.FAILED, 40, True)
    assert isinstance(rollback.error, RestoreUnprovenError)
    assert [(r.outcome, r.restored_step, r.state_digest, r.expected_digest) for r in parts.journal.rollbacks] == [
        ("failed", -1, "live", "captured")
    ]
    assert parts.board.states[-2:] == [RollbackState.CONFIRM, RollbackState.ABORTED]
    assert Call.CONFIRM not in parts.kasmina.called


async def test_restoring_an_older_step_than_agreed_is_uncoordinated() -> None:
    """When a damaged checkpoint is replaced by an older one, the peers are at another step than the model."""

    async def older(rollback: Rollback) -> None:
        restored(rollback, 10)

    rollback = await CoordinatedParts(restorer=FakeRestorer(older)).run()
    assert (rollback.ending, rollback.restored_step, rollback.coordinated) == (Ending.RESTORED, 10, False)


async def test_a_second_rollback_is_rejected_while_one_is_running() -> None:
    """It raises, changes nothing, and can be requested again."""
    inside, go_on = anyio.Event(), anyio.Event()

    async def slow(rollback: Rollback) -> None:
        inside.set()
        await go_on.wait()
        await parts.restorer.copies(rollback)

    parts = CoordinatedParts(restorer=FakeRestorer(slow))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(parts.run, new_rollback("first"))
        await inside.wait()
        with pytest.raises(WrongStateError, match="another rollback is running"):
            await parts.run(new_rollback("second"))
        go_on.set()
    assert (await parts.run(new_rollback("second"))).ending is Ending.RESTORED
    assert [row.rollback_id for row in parts.journal.rollbacks] == ["first", "second"]


@pytest.mark.parametrize("rollback_id", ["", "x" * 65, "é" * 33])
async def test_an_id_that_the_board_cannot_hold_is_rejected(rollback_id: str) -> None:
    """Nothing is shown and no participant is called."""
    parts = CoordinatedParts()
    with pytest.raises(InvalidFieldError, match="rollback_id"):
        await parts.run(new_rollback(rollback_id))
    assert (parts.board.shown, parts.log) == ([], [])


async def test_a_failing_journal_does_not_fail_the_rollback() -> None:
    """The outcome says why there is no row."""
    parts = CoordinatedParts()
    parts.journal.error = JournalUnavailableError("disk full")
    rollback = await parts.run()
    assert (rollback.ending, rollback.unrecorded) == (Ending.RESTORED, parts.journal.error)


async def test_a_hanging_journal_does_not_hold_the_lane() -> None:
    """The rollback ends within a bounded time and says that it is not recorded yet."""
    parts = CoordinatedParts()
    parts.journal.hangs = True
    with anyio.fail_after(180):
        rollback = await parts.run()
    assert rollback.ending is Ending.RESTORED
    assert isinstance(rollback.unrecorded, JournalUnavailableError)


async def test_a_board_that_cannot_be_written_does_not_stop_a_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is logged only."""
    parts = CoordinatedParts()

    def refuse(*_: object, **__: object) -> None:
        raise SignalValueError("made to fail")

    monkeypatch.setattr(parts.board, "write", refuse)
    assert (await parts.run()).ending is Ending.RESTORED


async def test_an_unexpected_error_leaves_nothing_half_done() -> None:
    """A defect in the restorer is raised, peers get an abort, the row is written, and the next rollback works."""

    async def broken(_rollback: Rollback) -> None:
        raise ZeroDivisionError

    parts = CoordinatedParts(restorer=FakeRestorer(broken))
    with pytest.raises(ExceptionGroup) as caught:
        await parts.run()
    assert caught.group_contains(ZeroDivisionError)
    assert {"tamiyo abort", "kasmina abort"} < set(parts.log)
    assert [row.outcome for row in parts.journal.rollbacks] == ["failed"]
    parts.restorer.work = parts.restorer.copies
    assert (await parts.run(new_rollback("r2"))).ending is Ending.RESTORED


def test_every_participant_has_a_share() -> None:
    """A participant without a share of the budget is rejected when the coordinator is built."""
    with pytest.raises(ValueError, match="simic, tolaria"):
        CoordinatedParts(peers=("tamiyo", "tolaria", "simic"))
