from __future__ import annotations

import pytest

from leyline.v1.enums_pb2 import (
    EMERGENCY_LEVEL_CONSERVATIVE,
    EMERGENCY_LEVEL_ELEVATED,
    EMERGENCY_LEVEL_HALT,
    EMERGENCY_LEVEL_NOTICE,
)
from support.boards import acknowledgements
from support.emergency import BROADCASTS_PER_MINUTE, ControllerHarness
from tolaria.emergency import (
    Acknowledgement,
    BoardUnreadable,
    Broadcast,
    Cleared,
    Clearer,
    Covered,
    DeadlineMissed,
    EmergencyController,
    EmergencyState,
    Escalated,
    HeldBack,
    Notice,
    Phase,
    Reissued,
    Report,
    Trigger,
)
from tolaria.errors import (
    ClearanceRefusedError,
    IllegalEmergencyEventError,
    UnknownLevelError,
)

NOTICE, ELEVATED = EMERGENCY_LEVEL_NOTICE, EMERGENCY_LEVEL_ELEVATED
CONSERVATIVE, HALT = EMERGENCY_LEVEL_CONSERVATIVE, EMERGENCY_LEVEL_HALT
S = 1_000_000_000
OPERATOR = Clearer.OPERATOR


def test_the_board_is_written_before_the_observer_and_the_broadcast(harness: ControllerHarness) -> None:
    """When the observer is called the board shows the signal and nothing was broadcast."""
    seen = []

    def react(report: Report) -> None:
        if isinstance(report, Escalated):
            signal = harness.peer_board.effective()
            seen.append((signal and (signal.level, signal.reason, signal.origin), len(harness.broadcasts)))

    harness.on_report = react
    harness.controller.escalate(HALT, "why", "judge")
    assert seen == [((HALT, "why", "tolaria"), 0)]
    assert [(n.signal.level, n.signal.reason, n.signal.origin) for n in harness.broadcasts] == [(HALT, "why", "judge")]
    (escalated,) = harness.reports_of(Escalated)
    assert (escalated.response.halt, escalated.board_error) == (True, "")
    (broadcast,) = harness.reports_of(Broadcast)
    assert broadcast.latency_ns > 0


def test_a_lower_or_equal_level_is_covered_and_broadcast(harness: ControllerHarness) -> None:
    """The board does not change; the further reason is broadcast."""
    harness.controller.escalate(CONSERVATIVE, "first", "a")
    before = harness.participant.record
    harness.controller.escalate(CONSERVATIVE, "second", "b")
    harness.controller.escalate(NOTICE, "third", "c")
    assert harness.participant.record == before
    assert harness.controller.state.reason == "first"
    assert [report.signal.reason for report in harness.reports_of(Covered)] == ["second", "third"]
    assert [notice.signal.reason for notice in harness.broadcasts] == ["first", "second", "third"]


@pytest.mark.parametrize("level", [0, 5, -3])
def test_an_unknown_level_changes_nothing(harness: ControllerHarness, level: int) -> None:
    """State, board, reports and broadcasts are as before."""
    before = harness.participant.record
    with pytest.raises(UnknownLevelError):
        harness.controller.escalate(level, "why", "x")  # type: ignore[arg-type]
    assert (harness.controller.state, harness.participant.record) == (EmergencyState(), before)
    assert (harness.reports, harness.broadcasts) == ([], [])


def test_a_trigger_raises_its_level(harness: ControllerHarness) -> None:
    """The reason begins with the trigger's value."""
    state = harness.controller.trigger(Trigger.ROLLBACK_DEADLINE_MISSED, "12 s are over")
    assert (state.level, state.reason) == (HALT, "rollback_deadline_missed: 12 s are over")


def test_a_peer_raises_through_the_board(harness: ControllerHarness) -> None:
    """Its signal is adopted once, with its origin and id, and the own block is not written."""
    kasmina = harness.peer_board.claim("kasmina")
    signal_id = kasmina.raise_level(HALT, "seed burns")
    before = harness.participant.record
    harness.controller.observe_board()
    harness.controller.observe_board()
    state = harness.controller.state
    assert (state.level, state.reason, state.origin, state.signal_id) == (HALT, "seed burns", "kasmina", signal_id)
    assert harness.participant.record == before
    assert len(harness.reports_of(Escalated)) == len(harness.broadcasts) == 1


def test_a_peers_lower_signal_is_covered_once(harness: ControllerHarness) -> None:
    """It requires nothing further, but it is reported."""
    harness.controller.escalate(HALT, "ours", "judge")
    harness.peer_board.claim("tamiyo").raise_level(NOTICE, "theirs")
    harness.controller.observe_board()
    harness.controller.observe_board()
    assert [report.signal.reason for report in harness.reports_of(Covered)] == ["theirs"]


def test_acknowledgements_of_peers_are_collected_with_their_latency(harness: ControllerHarness) -> None:
    """Each is reported once; after the last awaited one the emergency is answered."""
    kasmina, tamiyo = harness.peer_board.claim("kasmina"), harness.peer_board.claim("tamiyo")
    state = harness.controller.escalate(HALT, "why", "judge")
    harness.clock.now_ns += 30_000_000
    kasmina.acknowledge(state.signal_id)
    tamiyo.acknowledge(12345)  # an older signal's
    harness.controller.observe_board()
    harness.controller.observe_board()
    assert [given.participant for given in harness.reports_of(Acknowledgement)] == ["kasmina"]
    assert 30_000_000 < harness.reports_of(Acknowledgement)[0].latency_ns < 31_000_000
    tamiyo.acknowledge(state.signal_id)
    harness.controller.acknowledge()
    harness.controller.observe_board()
    assert harness.controller.state.phase is Phase.ANSWERED
    assert acknowledgements(harness.peer_board, state.signal_id).keys() == {"tolaria", "kasmina", "tamiyo"}


def test_an_acknowledgement_of_an_equal_signal_counts(harness: ControllerHarness) -> None:
    """When two raise at once, peers acknowledge the effective signal, which may be the other one."""
    kasmina, tamiyo = harness.peer_board.claim("kasmina"), harness.peer_board.claim("tamiyo")
    theirs = kasmina.raise_level(HALT, "theirs, a moment earlier")
    harness.controller.escalate(HALT, "ours", "judge")
    effective = harness.peer_board.effective()
    assert effective is not None
    assert effective.signal_id == theirs
    tamiyo.acknowledge(theirs)
    harness.controller.observe_board()
    assert [given.participant for given in harness.reports_of(Acknowledgement)] == ["tamiyo"]


def test_a_missed_deadline_is_reported_once_with_the_missing_participants(harness: ControllerHarness) -> None:
    """100 ms after a halt only tolaria has acknowledged."""
    harness.peer_board.claim("kasmina")
    harness.controller.escalate(HALT, "why", "judge")
    harness.controller.acknowledge()
    harness.controller.pump()
    assert harness.reports_of(DeadlineMissed) == []
    assert harness.controller.due_in_s == pytest.approx(0.1, abs=0.001)
    harness.clock.now_ns += S // 10
    harness.controller.pump()
    harness.controller.pump()
    (missed,) = harness.reports_of(DeadlineMissed)
    assert missed.state.missing == ("kasmina",)
    assert harness.controller.due_in_s is None


def test_acknowledging_without_an_emergency_is_refused(harness: ControllerHarness) -> None:
    """It raises, and the board does not change."""
    before = harness.participant.record
    with pytest.raises(IllegalEmergencyEventError):
        harness.controller.acknowledge()
    assert harness.participant.record == before


def test_clearing_resets_here_and_on_the_board(harness: ControllerHarness) -> None:
    """Signals of others are cleared too; a new emergency can be raised at once."""
    harness.peer_board.claim("kasmina").raise_level(HALT, "theirs")
    harness.controller.escalate(ELEVATED, "ours", "judge")
    before = harness.controller.clear("all is well", "operator:ann", by=OPERATOR)
    assert before.level == HALT
    assert harness.controller.state == EmergencyState()
    assert (harness.peer_board.effective(), harness.participant.record.level) == (None, 0)
    (cleared,) = harness.reports_of(Cleared)
    assert (cleared.reason, cleared.origin, cleared.by) == ("all is well", "operator:ann", OPERATOR)
    harness.controller.observe_board()
    assert harness.controller.state == EmergencyState()
    assert harness.controller.escalate(NOTICE, "again", "judge").level == NOTICE


def test_clearing_nothing_changes_nothing(harness: ControllerHarness) -> None:
    """It raises, and the board does not change."""
    before = harness.participant.record
    with pytest.raises(IllegalEmergencyEventError):
        harness.controller.clear("why", "x", by=OPERATOR)
    assert (harness.participant.record, harness.reports) == (before, [])


def test_a_rule_does_not_clear_an_operators_halt(harness: ControllerHarness) -> None:
    """It is refused and changes nothing."""
    harness.controller.escalate(HALT, "why", "operator")
    before, record = harness.controller.state, harness.participant.record
    for rule in (Clearer.RECOVERED, Clearer.RESTARTED):
        with pytest.raises(ClearanceRefusedError):
            harness.controller.clear("why", "rule", by=rule)
    assert (harness.controller.state, harness.participant.record) == (before, record)


@pytest.mark.parametrize("others_too", [False, True])
def test_a_restart_clears_only_the_sentinels_halt(harness: ControllerHarness, others_too: bool) -> None:
    """A halt that another participant raised too waits for an operator."""
    harness.peer_board.claim("sentinel").raise_level(HALT, "silent")
    if others_too:
        harness.peer_board.claim("kasmina").raise_level(HALT, "burning")
    if others_too:
        with pytest.raises(ClearanceRefusedError):
            harness.controller.clear("restarted", "service", by=Clearer.RESTARTED)
        assert harness.controller.state.level == HALT
    else:
        harness.controller.clear("restarted", "service", by=Clearer.RESTARTED)
        assert harness.peer_board.effective() is None


def test_an_operator_clears_on_the_board(harness: ControllerHarness) -> None:
    """An operator without the RPC can end an emergency."""
    harness.controller.escalate(HALT, "why", "judge")
    harness.peer_board.claim("operator").clear_all()
    harness.controller.observe_board()
    assert harness.controller.state == EmergencyState()
    (cleared,) = harness.reports_of(Cleared)
    assert (cleared.by, cleared.board_error) == (OPERATOR, "")


def test_a_signal_that_its_origin_cleared_is_reissued(harness: ControllerHarness) -> None:
    """Levels do not fall by themselves: the signal is written again, to tolaria's block."""
    kasmina = harness.peer_board.claim("kasmina")
    kasmina.raise_level(HALT, "burning")
    harness.controller.observe_board()
    kasmina.clear()
    harness.controller.observe_board()
    signal = harness.peer_board.effective()
    assert signal is not None
    assert (signal.level, signal.reason, signal.origin) == (HALT, "burning", "tolaria")
    assert harness.controller.state.signal_id == signal.signal_id
    assert harness.controller.state.origin == "kasmina"
    harness.controller.observe_board()
    assert len(harness.reports_of(Reissued)) == 1
    assert len(harness.broadcasts) == 1


def test_the_emergency_of_a_crashed_process_is_adopted(harness: ControllerHarness) -> None:
    """A restart clears no emergency; its deadline counts from the new process."""
    harness.controller.escalate(CONSERVATIVE, "before the crash", "judge")
    harness.participant.release()
    harness.clock.now_ns += 60 * S
    again = EmergencyController(
        harness.peer_board,
        harness.peer_board.claim("tolaria"),
        broadcast=harness.broadcasts.append,
        observer=harness.reports.append,
        broadcasts_per_minute=BROADCASTS_PER_MINUTE,
        clock=harness.clock,
    )
    again.observe_board()
    again.pump()
    assert (again.state.level, again.state.reason, again.state.phase) == (
        CONSERVATIVE,
        "before the crash",
        Phase.RAISED,
    )


def test_the_rate_limit_delays_and_drops_nothing(harness: ControllerHarness) -> None:
    """Sixty a minute are broadcast at once, the others in order later."""
    for number in range(100):
        harness.controller.escalate(NOTICE, f"n{number}", "judge")
    assert len(harness.broadcasts) == 60
    assert len(harness.reports_of(HeldBack)) == 40
    assert harness.controller.due_in_s is not None
    harness.clock.now_ns += 59 * S
    harness.controller.pump()
    assert len(harness.broadcasts) == 60
    harness.clock.now_ns += 2 * S
    harness.controller.pump()
    assert [notice.signal.reason for notice in harness.broadcasts] == [f"n{number}" for number in range(100)]
    assert harness.sent == 100
    assert harness.controller.due_in_s is None


def test_a_flood_of_the_same_signal_takes_one_notice(harness: ControllerHarness) -> None:
    """Equal signals that wait are broadcast once, with their count."""
    for _ in range(10_000):
        harness.controller.escalate(NOTICE, "again", "judge")
    harness.clock.now_ns += 61 * S
    harness.controller.pump()
    assert (len(harness.broadcasts), harness.broadcasts[-1].count) == (61, 9940)


def test_a_failed_broadcast_is_reported_and_retried(harness: ControllerHarness) -> None:
    """The signal is on the board; the failed notice comes first after a pause, with the count of its repeats."""
    harness.broadcast_error = "collector is down"
    for reason in ("one", "two", "one"):
        harness.controller.escalate(HALT, reason, "judge")
    (failed,) = harness.reports_of(Broadcast)
    assert (failed.error, failed.notice.signal.reason) == ("collector is down", "one")
    assert harness.peer_board.effective() is not None
    harness.broadcast_error = ""
    harness.controller.pump()
    assert harness.broadcasts == []
    harness.clock.now_ns += S
    harness.controller.pump()
    assert [(notice.signal.reason, notice.count) for notice in harness.broadcasts] == [("one", 2), ("two", 1)]
    assert [bool(report.error) for report in harness.reports_of(Broadcast)] == [True, False, False]


def buggy(_: Notice) -> None:
    """A broadcast function with a bug."""
    raise ZeroDivisionError


def test_an_unexpected_broadcast_error_propagates_and_loses_nothing(harness: ControllerHarness) -> None:
    """Board, state and waiting signal are in place all the same."""
    harness.controller = EmergencyController(
        harness.board,
        harness.participant,
        broadcast=buggy,
        observer=harness.reports.append,
        broadcasts_per_minute=BROADCASTS_PER_MINUTE,
        clock=harness.clock,
    )
    with pytest.raises(ZeroDivisionError):
        harness.controller.escalate(HALT, "why", "judge")
    assert harness.controller.state.level == HALT
    assert harness.peer_board.effective() is not None
    assert harness.controller.due_in_s == pytest.approx(0.1, abs=0.001)  # its deadline
    harness.clock.now_ns += S
    with pytest.raises(ZeroDivisionError):
        harness.controller.pump()


def test_the_observer_may_raise_and_acknowledge(harness: ControllerHarness) -> None:
    """A report leads to the next emergency; both are broadcast in the order of their raise."""

    def react(report: Report) -> None:
        if isinstance(report, Escalated) and report.state.level < HALT:
            harness.controller.escalate(HALT, "worse", "judge")
            harness.controller.acknowledge()

    harness.on_report = react
    harness.peer_board.claim("kasmina").raise_level(NOTICE, "bad")
    harness.controller.observe_board()
    assert (harness.controller.state.level, harness.controller.state.reason) == (HALT, "worse")
    assert [notice.signal.reason for notice in harness.broadcasts] == ["bad", "worse"]
    assert harness.reports_of(Reissued) == []


def test_emergencies_work_without_the_board(harness: ControllerHarness) -> None:
    """Levels are raised, broadcast and cleared; failed writes are in the reports."""
    harness.board.close()
    harness.controller.observe_board()
    harness.controller.observe_board()
    assert len(harness.reports_of(BoardUnreadable)) == 1
    state = harness.controller.escalate(HALT, "why", "judge")
    (escalated,) = harness.reports_of(Escalated)
    assert "not owned here any more" in escalated.board_error
    assert (state.level, state.signal_id, len(harness.broadcasts)) == (HALT, 0, 1)
    harness.controller.acknowledge()
    harness.controller.clear("done", "operator", by=OPERATOR)
    assert harness.controller.state == EmergencyState()
    (cleared,) = harness.reports_of(Cleared)
    assert cleared.board_error


def test_a_failed_reissue_is_reported_once(harness: ControllerHarness) -> None:
    """A block that is not owned any more is tried at every look and reported at the first."""
    harness.participant.release()
    harness.controller.escalate(HALT, "why", "judge")
    for _ in range(5):
        harness.controller.observe_board()
    assert harness.reports_of(Reissued) == []
    (escalated,) = harness.reports_of(Escalated)
    assert "not owned here any more" in escalated.board_error
    assert harness.peer_board.effective() is None
