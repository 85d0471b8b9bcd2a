from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL, ROLLBACK_TIER_UNSPECIFIED, RollbackTier
from support.rollbacks import budget_of, new_rollback, restored
from tolaria.config import RollbackSettings
from tolaria.errors import StateMismatchError, WrongStateError
from tolaria.rollback.protocol import (
    ID_BYTES_MAX,
    SHARES,
    Call,
    Ending,
    RollbackEvent,
    Vote,
    VoteOutcome,
    has_quorum,
    may_be_asked,
    next_state,
    rollback_id_of,
    tier_name,
    total_s,
)
from tolaria.signals import RollbackState

IDLE, PREPARE, COMMIT, CONFIRM, ABORTED, DEADLINE = RollbackState
BEGUN, PREPARED, RESTORED, CONFIRMED, FAILED, EXPIRED = RollbackEvent

TABLE = {
    (IDLE, BEGUN): PREPARE,
    (PREPARE, PREPARED): COMMIT,
    (PREPARE, FAILED): ABORTED,
    (PREPARE, EXPIRED): DEADLINE,
    (COMMIT, RESTORED): CONFIRM,
    (COMMIT, FAILED): ABORTED,
    (COMMIT, EXPIRED): DEADLINE,
    (CONFIRM, CONFIRMED): IDLE,
    (CONFIRM, FAILED): ABORTED,
    (ABORTED, BEGUN): PREPARE,
    (DEADLINE, BEGUN): PREPARE,
}
RUNNING = {PREPARE, COMMIT, CONFIRM}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(RollbackState, RollbackEvent)))
def test_every_event_in_every_state(state: RollbackState, event: RollbackEvent) -> None:
    """Transitions are those of the table; any other event raises and says whether a rollback is running."""
    if (state, event) in TABLE:
        assert next_state(state, event) is TABLE[state, event]
    else:
        running = "another rollback is running" if state in RUNNING else "no rollback is running"
        with pytest.raises(WrongStateError, match=running):
            next_state(state, event)


@given(st.lists(st.sampled_from(RollbackEvent), max_size=40))
def test_a_rollback_begins_only_when_none_is_running(events: list[RollbackEvent]) -> None:
    """After any events, BEGUN is legal exactly when no rollback is running, and FAILED exactly when one is."""
    state = IDLE
    for event in events:
        try:
            state = next_state(state, event)
        except WrongStateError:
            continue
    for event, legal in ((BEGUN, state not in RUNNING), (FAILED, state in RUNNING)):
        if legal:
            next_state(state, event)
        else:
            with pytest.raises(WrongStateError):
                next_state(state, event)


@pytest.mark.parametrize(
    ("tier", "budget_s"), [(ROLLBACK_TIER_FAST, 0.5), (ROLLBACK_TIER_FULL, 12.0), (ROLLBACK_TIER_UNSPECIFIED, 12.0)]
)
def test_the_budget_of_a_tier(tier: RollbackTier.ValueType, budget_s: float) -> None:
    """While the tier is unspecified it is the full one's."""
    assert total_s(budget_of(0.5, 12.0), tier) == budget_s


def test_shares_of_the_budget() -> None:
    """Of the fast tier's 500 ms 150, 250 and 100 ms: together the whole budget."""
    assert SHARES == {"tamiyo": 0.3, "kasmina": 0.5, "tolaria": 0.2}
    assert sum(SHARES.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("changed", [{"fast_budget_s": 0.0}, {"full_budget_s": -1.0}])
def test_impossible_budgets_are_rejected(changed: dict[str, float]) -> None:
    """Budgets are positive."""
    with pytest.raises(ValueError, match="greater than"):
        RollbackSettings.model_validate(changed)


def votes(*cast: tuple[str, Call, VoteOutcome]) -> list[Vote]:
    """Votes of participants."""
    return [Vote(name, call, outcome, "", 1.0) for name, call, outcome in cast]


@pytest.mark.parametrize(
    ("cast", "asked"),
    [
        ([], {Call.PREPARE}),
        ([(Call.PREPARE, VoteOutcome.ACCEPTED)], {Call.PREPARE, Call.COMMIT, Call.ABORT}),
        ([(Call.PREPARE, VoteOutcome.REFUSED)], {Call.PREPARE}),
        ([(Call.PREPARE, VoteOutcome.SILENT)], {Call.PREPARE, Call.ABORT}),
        ([(Call.PREPARE, VoteOutcome.NOT_ASKED)], {Call.PREPARE}),
        (
            [(Call.PREPARE, VoteOutcome.ACCEPTED), (Call.COMMIT, VoteOutcome.ACCEPTED)],
            {Call.PREPARE, Call.COMMIT, Call.CONFIRM, Call.ABORT},
        ),
        (
            [(Call.PREPARE, VoteOutcome.ACCEPTED), (Call.COMMIT, VoteOutcome.SILENT)],
            {Call.PREPARE, Call.COMMIT, Call.ABORT},
        ),
    ],
)
def test_calls_that_a_participant_may_get(cast: list[tuple[Call, VoteOutcome]], asked: set[Call]) -> None:
    """A call follows the accepted one before it; an abort goes to participants where a call may have taken effect."""
    own = votes(*(("kasmina", call, outcome) for call, outcome in cast))
    accepted = VoteOutcome.ACCEPTED
    others = votes(("tamiyo", Call.PREPARE, accepted), ("tamiyo", Call.COMMIT, accepted))
    assert {call for call in Call if may_be_asked([*others, *own], "kasmina", call)} == asked


@pytest.mark.parametrize(
    ("peers", "confirmed", "quorum"), [(2, 2, True), (2, 1, True), (2, 0, False), (0, 0, True), (4, 1, False)]
)
def test_a_quorum_is_a_majority_that_includes_tolaria(peers: int, confirmed: int, quorum: bool) -> None:
    """Two of three, with Tolaria as one of them; refusals and other calls do not count."""
    cast = [(f"p{n}", Call.CONFIRM, VoteOutcome.ACCEPTED) for n in range(confirmed)]
    cast += [(f"p{n}", Call.CONFIRM, VoteOutcome.REFUSED) for n in range(confirmed, peers)]
    cast += [(f"p{n}", Call.COMMIT, VoteOutcome.ACCEPTED) for n in range(peers)]
    assert has_quorum(votes(*cast), peers) == quorum


def test_names_of_tiers() -> None:
    """The unspecified tier is called auto."""
    tiers = (ROLLBACK_TIER_UNSPECIFIED, ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL)
    assert [tier_name(tier) for tier in tiers] == ["auto", "fast", "full"]


@pytest.mark.parametrize("request_id", ["one", "é" * 32, "long" * 32, "é" * 33])
def test_the_rollback_id_of_a_request_is_stable_and_fits_on_the_board(request_id: str) -> None:
    """A short request id is used as it is; a long one is replaced by its digest."""
    rollback_id = rollback_id_of(request_id)
    assert rollback_id == rollback_id_of(request_id)
    assert 0 < len(rollback_id.encode()) <= ID_BYTES_MAX
    assert (rollback_id == request_id) == (len(request_id.encode()) <= ID_BYTES_MAX)


def test_a_share_is_used_up_by_all_calls_of_a_participant() -> None:
    """Times of other participants do not count."""
    rollback = new_rollback()
    rollback.votes += votes(
        ("tamiyo", Call.PREPARE, VoteOutcome.ACCEPTED), ("kasmina", Call.PREPARE, VoteOutcome.SILENT)
    )
    rollback.votes += votes(("tamiyo", Call.COMMIT, VoteOutcome.ACCEPTED))
    assert rollback.spent_s("tamiyo") == pytest.approx(0.002)


def test_the_row_of_a_failed_rollback_has_no_restored_step() -> None:
    """Its reason includes the error; the digests of a failed proof are kept."""
    rollback = new_rollback(tier=ROLLBACK_TIER_FAST, target_step=40)
    restored(rollback, state="live", expected="captured")
    rollback.decided_s = rollback.began_s + 0.25
    rollback.end(Ending.FAILED, StateMismatchError(["parameter/w: missing"]))
    row = rollback.row("run")
    assert rollback.unproven
    assert (row.restored_step, row.outcome, row.coordinated, row.tier) == (-1, "failed", 0, "fast")
    assert (row.state_digest, row.expected_digest) == ("live", "captured")
    assert row.latency_ms == pytest.approx(250)
    assert row.reason.startswith("loss exploded: ")
    assert "parameter/w" in row.reason
