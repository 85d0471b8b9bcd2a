from __future__ import annotations

import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leyline.v1.enums_pb2 import (
    ROLLBACK_TIER_FAST,
    ROLLBACK_TIER_FULL,
    ROLLBACK_TIER_UNSPECIFIED,
    RollbackTier,
)
from tolaria.errors import WrongStateError
from tolaria.rollback.budget import RollbackBudgets
from tolaria.rollback.commit_gate import CommitGate
from tolaria.rollback.orders import tier_word
from tolaria.rollback.participants import Ballot, Call, Stance, is_coordinated, may_be_asked
from tolaria.rollback.phases import RUNNING, TRANSITIONS, Phase, RollbackEvent, after


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(Phase, RollbackEvent)))
def test_every_event_in_every_phase(phase: Phase, event: RollbackEvent) -> None:
    """What the table has leads on; all else is refused, and says whether a rollback is running."""
    if event in TRANSITIONS[phase]:
        assert after(phase, event) is TRANSITIONS[phase][event]
    else:
        words = "another rollback is running" if phase in RUNNING else "no rollback is running"
        with pytest.raises(WrongStateError, match=words):
            after(phase, event)


@given(st.lists(st.sampled_from(RollbackEvent), max_size=40))
def test_a_new_rollback_begins_only_when_none_runs(events: list[RollbackEvent]) -> None:
    """After any events, beginning is possible exactly where nothing runs, and every running one can be given up."""
    phase = Phase.IDLE
    for event in events:
        phase = TRANSITIONS[phase].get(event, phase)
    assert (RollbackEvent.BEGUN in TRANSITIONS[phase]) == (phase not in RUNNING)
    assert (RollbackEvent.FAILED in TRANSITIONS[phase]) == (phase in RUNNING)


@pytest.mark.parametrize(
    ("participant", "tier", "share_s"),
    [
        ("tamiyo", ROLLBACK_TIER_FAST, 0.15),
        ("kasmina", ROLLBACK_TIER_FAST, 0.25),
        ("tolaria", ROLLBACK_TIER_FAST, 0.1),
        ("tamiyo", ROLLBACK_TIER_FULL, 3.6),
        ("kasmina", ROLLBACK_TIER_FULL, 6.0),
        ("tolaria", ROLLBACK_TIER_FULL, 2.4),
        ("kasmina", ROLLBACK_TIER_UNSPECIFIED, 6.0),
    ],
)
def test_shares_of_the_budget(participant: str, tier: RollbackTier.ValueType, share_s: float) -> None:
    """150, 250 and 100 ms of the fast tier, and in proportion of the full one."""
    assert RollbackBudgets().share_s(participant, tier) == pytest.approx(share_s)


@pytest.mark.parametrize(
    "budgets",
    [
        {"fast_s": 0.0},
        {"full_s": -1.0},
        {"shares": {"tamiyo": 1.0}},
        {"shares": {"tamiyo": 0.9, "tolaria": 0.2}},
        {"shares": {"tamiyo": 0.0, "tolaria": 0.2}},
    ],
)
def test_impossible_budgets_are_refused(budgets: dict[str, float]) -> None:
    """No time, no share for Tolaria, shares of nothing or of more than there is."""
    with pytest.raises(ValueError, match="must be positive"):
        RollbackBudgets(**budgets)  # type: ignore[arg-type] # mypy cannot see into the table


def ballots(*cast: tuple[str, Call, Stance]) -> list[Ballot]:
    """Ballots of participants."""
    return [Ballot(name, call, stance, "", 1.0) for name, call, stance in cast]


@pytest.mark.parametrize(
    ("cast", "asked"),
    [
        ([], {Call.PREPARE}),
        ([(Call.PREPARE, Stance.ACCEPTED)], {Call.PREPARE, Call.COMMIT, Call.ABORT}),
        ([(Call.PREPARE, Stance.REFUSED)], {Call.PREPARE}),
        ([(Call.PREPARE, Stance.SILENT)], {Call.PREPARE, Call.ABORT}),
        ([(Call.PREPARE, Stance.NOT_ASKED)], {Call.PREPARE}),
        (
            [(Call.PREPARE, Stance.ACCEPTED), (Call.COMMIT, Stance.ACCEPTED)],
            {Call.PREPARE, Call.COMMIT, Call.CONFIRM, Call.ABORT},
        ),
        (
            [(Call.PREPARE, Stance.ACCEPTED), (Call.COMMIT, Stance.SILENT)],
            {Call.PREPARE, Call.COMMIT, Call.ABORT},
        ),
    ],
)
def test_what_a_participant_may_be_asked(cast: list[tuple[Call, Stance]], asked: set[Call]) -> None:
    """A call follows the one before that was accepted; an abort goes to whoever may have done something."""
    mine = ballots(*(("kasmina", call, stance) for call, stance in cast))
    others = ballots(("tamiyo", Call.PREPARE, Stance.ACCEPTED), ("tamiyo", Call.COMMIT, Stance.ACCEPTED))
    assert {call for call in Call if may_be_asked([*others, *mine], "kasmina", call)} == asked


@pytest.mark.parametrize(
    ("peers", "confirmed", "coordinated"), [(2, 2, True), (2, 1, True), (2, 0, False), (0, 0, True), (4, 1, False)]
)
def test_a_majority_with_tolaria_in_it(peers: int, confirmed: int, coordinated: bool) -> None:
    """2 of 3, Tolaria being one of them; refusals and other calls do not count."""
    cast = [(f"p{n}", Call.CONFIRM, Stance.ACCEPTED) for n in range(confirmed)]
    cast += [(f"p{n}", Call.CONFIRM, Stance.REFUSED) for n in range(confirmed, peers)]
    cast += [(f"p{n}", Call.COMMIT, Stance.ACCEPTED) for n in range(peers)]
    assert is_coordinated(ballots(*cast), peers) == coordinated


def test_tiers_have_words() -> None:
    """For the journal and for people."""
    words = [tier_word(t) for t in (ROLLBACK_TIER_UNSPECIFIED, ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL)]
    assert words == ["auto", "fast", "full"]


def test_a_gate_grants_before_the_deadline_and_keeps_its_word() -> None:
    """Once granted it cannot be shut, even past the deadline; looking does not grant."""
    now_s = 0.0
    gate = CommitGate(1.0, lambda: now_s)
    assert not gate.expired()
    assert not gate.refuses()
    now_s = 2.0
    assert gate.expired()
    assert not gate.refuses()
    assert not gate.shut()


def test_a_gate_refuses_once_shut_or_late() -> None:
    """Shut before the deadline, or asked after it: refused for good."""
    now_s = 0.0
    shut, late = CommitGate(1.0, lambda: now_s), CommitGate(1.0, lambda: now_s)
    assert shut.shut()
    assert shut.expired()
    assert shut.refuses()
    now_s = 1.0
    assert late.refuses()
    now_s = 0.5
    assert late.refuses()
    assert late.shut()


def test_of_two_threads_one_wins() -> None:
    """Asked at the same moment by both sides, the gate is either granted or shut, never both and never neither."""
    for _ in range(200):
        gate = CommitGate(1e9, lambda: 0.0)
        start = threading.Barrier(2)
        refused: list[bool] = []

        def lane(gate: CommitGate = gate, start: threading.Barrier = start, refused: list[bool] = refused) -> None:
            start.wait()
            refused.append(gate.refuses())

        thread = threading.Thread(target=lane)
        thread.start()
        start.wait()
        was_shut = gate.shut()
        thread.join()
        assert refused == [was_shut]
