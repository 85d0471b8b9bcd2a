from __future__ import annotations

import pytest

from leyline.v1.enums_pb2 import (
    EMERGENCY_LEVEL_CONSERVATIVE,
    EMERGENCY_LEVEL_ELEVATED,
    EMERGENCY_LEVEL_HALT,
    EMERGENCY_LEVEL_NOTICE,
)
from support.emergency import Stage
from tolaria.emergency import (
    Acknowledged,
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


def test_board_first_then_the_observer_then_telemetry(stage: Stage) -> None:
    """When the observer hears of it the board shows it already, and telemetry does not know yet."""
    seen = []

    def react(report: Report) -> None:
        if isinstance(report, Escalated):
            signal = stage.other.effective()
            seen.append((signal and (signal.level, signal.reason, signal.origin), len(stage.told)))

    stage.react = react
    stage.controller.escalate(HALT, "why", "judge")
    assert seen == [((HALT, "why", "tolaria"), 0)]
    assert [(n.signal.level, n.signal.reason, n.signal.origin) for n in stage.told] == [(HALT, "why", "judge")]
    (escalated,) = stage.reports_of(Escalated)
    assert escalated.response.halt
    assert escalated.write is not None
    assert (escalated.write.error, escalated.write.latency_ns > 0) == ("", True)
    (broadcast,) = stage.reports_of(Broadcast)
    assert broadcast.latency_ns > 0


def test_a_lower_or_equal_level_is_covered_and_told(stage: Stage) -> None:
    """The board is left as it is; telemetry hears of the further reason."""
    stage.controller.escalate(CONSERVATIVE, "first", "a")
    before = stage.participant.record
    stage.controller.escalate(CONSERVATIVE, "second", "b")
    stage.controller.escalate(NOTICE, "third", "c")
    assert stage.participant.record == before
    assert stage.controller.state.reason == "first"
    assert [report.reason for report in stage.reports_of(Covered)] == ["second", "third"]
    assert [notice.signal.reason for notice in stage.told] == ["first", "second", "third"]


@pytest.mark.parametrize("level", [0, 5, -3])
def test_an_unknown_level_changes_nothing(stage: Stage, level: int) -> None:
    """Neither the state nor the board nor telemetry sees anything of it."""
    before = stage.participant.record
    with pytest.raises(UnknownLevelError):
        stage.controller.escalate(level, "why", "x")  # type: ignore[arg-type]
    assert (stage.controller.state, stage.participant.record) == (EmergencyState(), before)
    assert (stage.reports, stage.told) == ([], [])


def test_a_trigger_raises_its_level(stage: Stage) -> None:
    """The reason begins with the trigger's stable name."""
    state = stage.controller.trigger(Trigger.ROLLBACK_DEADLINE_MISSED, "12 s are over")
    assert (state.level, state.reason) == (HALT, "rollback_deadline_missed: 12 s are over")


def test_a_peer_raises_through_the_board(stage: Stage) -> None:
    """Its signal is adopted once, with its own origin and id, and the board is not written again."""
    kasmina = stage.other.claim("kasmina")
    signal_id = kasmina.raise_level(HALT, "seed burns")
    before = stage.participant.record
    stage.controller.observe_board()
    stage.controller.observe_board()
    state = stage.controller.state
    assert (state.level, state.reason, state.origin, state.signal_id) == (HALT, "seed burns", "kasmina", signal_id)
    assert stage.participant.record == before
    (escalated,) = stage.reports_of(Escalated)
    assert escalated.write is None
    assert len(stage.told) == 1


def test_a_peers_lower_signal_is_told_once(stage: Stage) -> None:
    """It asks for nothing further, but what it says is not lost."""
    stage.controller.escalate(HALT, "ours", "judge")
    stage.other.claim("tamiyo").raise_level(NOTICE, "theirs")
    stage.controller.observe_board()
    stage.controller.observe_board()
    assert [report.reason for report in stage.reports_of(Covered)] == ["theirs"]


def test_acknowledgements_of_peers_are_collected_with_their_times(stage: Stage) -> None:
    """Each shows once; when the last one awaited is there the emergency is answered."""
    kasmina, tamiyo = stage.other.claim("kasmina"), stage.other.claim("tamiyo")
    state = stage.controller.escalate(HALT, "why", "judge")
    stage.clock.now_ns += 30_000_000
    kasmina.acknowledge(state.signal_id)
    tamiyo.acknowledge(12345)  # an older signal's
    stage.controller.observe_board()
    stage.controller.observe_board()
    assert [a.acknowledgement.participant for a in stage.reports_of(Acknowledged)] == ["kasmina"]
    assert 30_000_000 < stage.reports_of(Acknowledged)[0].acknowledgement.latency_ns < 31_000_000
    tamiyo.acknowledge(state.signal_id)
    stage.controller.acknowledge()
    stage.controller.observe_board()
    assert stage.controller.state.phase is Phase.ANSWERED
    assert stage.other.acknowledgements(state.signal_id).keys() == {"tolaria", "kasmina", "tamiyo"}


def test_two_who_raise_at_once_share_the_acknowledgements(stage: Stage) -> None:
    """Peers acknowledge the signal that counts on the board, which may be another one than ours."""
    kasmina, tamiyo = stage.other.claim("kasmina"), stage.other.claim("tamiyo")
    theirs = kasmina.raise_level(HALT, "theirs, a moment earlier")
    stage.controller.escalate(HALT, "ours", "judge")
    effective = stage.other.effective()
    assert effective is not None
    assert effective.signal_id == theirs
    tamiyo.acknowledge(theirs)
    stage.controller.observe_board()
    assert [a.acknowledgement.participant for a in stage.reports_of(Acknowledged)] == ["tamiyo"]


def test_a_deadline_missed_is_told_once_with_who_is_missing(stage: Stage) -> None:
    """100 ms after a halt nobody but tolaria has acted."""
    stage.other.claim("kasmina")
    stage.controller.escalate(HALT, "why", "judge")
    stage.controller.acknowledge()
    stage.controller.pump()
    assert stage.reports_of(DeadlineMissed) == []
    assert stage.controller.due_in_s == pytest.approx(0.1, abs=0.001)
    stage.clock.now_ns += S // 10
    stage.controller.pump()
    stage.controller.pump()
    (missed,) = stage.reports_of(DeadlineMissed)
    assert missed.state.missing == ("kasmina",)
    assert stage.controller.due_in_s is None


def test_acknowledging_without_an_emergency_is_refused(stage: Stage) -> None:
    """There is nothing that could have been done."""
    before = stage.participant.record
    with pytest.raises(IllegalEmergencyEventError):
        stage.controller.acknowledge()
    assert stage.participant.record == before


def test_clearing_resets_here_and_on_the_board(stage: Stage) -> None:
    """Signals of others are void too; a new emergency can be raised at once."""
    stage.other.claim("kasmina").raise_level(HALT, "theirs")
    stage.controller.escalate(ELEVATED, "ours", "judge")
    before = stage.controller.clear("all is well", "operator:ann", by=OPERATOR)
    assert before.level == HALT
    assert stage.controller.state == EmergencyState()
    assert (stage.other.effective(), stage.participant.record.level) == (None, 0)
    (cleared,) = stage.reports_of(Cleared)
    assert (cleared.reason, cleared.origin, cleared.by) == ("all is well", "operator:ann", OPERATOR)
    stage.controller.observe_board()
    assert stage.controller.state == EmergencyState()
    assert stage.controller.escalate(NOTICE, "again", "judge").level == NOTICE


def test_clearing_nothing_changes_nothing(stage: Stage) -> None:
    """It raises, and the board is not touched."""
    before = stage.participant.record
    with pytest.raises(IllegalEmergencyEventError):
        stage.controller.clear("why", "x", by=OPERATOR)
    assert (stage.participant.record, stage.reports) == (before, [])


def test_a_rule_does_not_clear_an_operators_halt(stage: Stage) -> None:
    """Refused, and everything stands as it was."""
    stage.controller.escalate(HALT, "why", "operator")
    before, record = stage.controller.state, stage.participant.record
    for rule in (Clearer.RECOVERED, Clearer.RESTARTED):
        with pytest.raises(ClearanceRefusedError):
            stage.controller.clear("why", "rule", by=rule)
    assert (stage.controller.state, stage.participant.record) == (before, record)


@pytest.mark.parametrize("others_too", [False, True])
def test_a_restart_ends_the_sentinels_halt_only(stage: Stage, others_too: bool) -> None:
    """The silent process is gone; a halt of anybody else's waits for an operator."""
    stage.other.claim("sentinel").raise_level(HALT, "silent")
    if others_too:
        stage.other.claim("kasmina").raise_level(HALT, "burning")
    if others_too:
        with pytest.raises(ClearanceRefusedError):
            stage.controller.clear("restarted", "service", by=Clearer.RESTARTED)
        assert stage.controller.state.level == HALT
    else:
        stage.controller.clear("restarted", "service", by=Clearer.RESTARTED)
        assert stage.other.effective() is None


def test_an_operator_clears_on_the_board(stage: Stage) -> None:
    """Who may only reach the board can end an emergency too."""
    stage.controller.escalate(HALT, "why", "judge")
    stage.other.claim("operator").clear_all()
    stage.controller.observe_board()
    assert stage.controller.state == EmergencyState()
    (cleared,) = stage.reports_of(Cleared)
    assert (cleared.by, cleared.write) == (OPERATOR, None)


def test_a_signal_taken_back_by_its_origin_stands(stage: Stage) -> None:
    """Levels do not go down by themselves: it is put on the board again, in tolaria's block."""
    kasmina = stage.other.claim("kasmina")
    kasmina.raise_level(HALT, "burning")
    stage.controller.observe_board()
    kasmina.clear()
    stage.controller.observe_board()
    signal = stage.other.effective()
    assert signal is not None
    assert (signal.level, signal.reason, signal.origin) == (HALT, "burning", "tolaria")
    assert stage.controller.state.signal_id == signal.signal_id
    assert stage.controller.state.origin == "kasmina"
    stage.controller.observe_board()
    assert len(stage.reports_of(Reissued)) == 1
    assert len(stage.told) == 1


def test_what_a_crash_left_standing_is_adopted(stage: Stage) -> None:
    """A restart takes back no emergency; the time to answer it begins with the new process."""
    stage.controller.escalate(CONSERVATIVE, "before the crash", "judge")
    stage.participant.release()
    stage.clock.now_ns += 60 * S
    again = EmergencyController(
        stage.other,
        stage.other.claim("tolaria"),
        broadcast=stage.told.append,
        observer=stage.reports.append,
        clock=stage.clock,
    )
    again.observe_board()
    again.pump()
    assert (again.state.level, again.state.reason, again.state.phase) == (
        CONSERVATIVE,
        "before the crash",
        Phase.RAISED,
    )


def test_the_rate_cap_delays_and_drops_nothing(stage: Stage) -> None:
    """Sixty a minute are told at once, the rest in order as time goes by, each counted."""
    for number in range(100):
        stage.controller.escalate(NOTICE, f"n{number}", "judge")
    assert len(stage.told) == 60
    statistics = stage.controller.statistics()
    assert (statistics.held_back, statistics.signals_waiting) == (40, 40)
    assert len(stage.reports_of(HeldBack)) == 40
    assert stage.controller.due_in_s is not None
    stage.clock.now_ns += 59 * S
    stage.controller.pump()
    assert len(stage.told) == 60
    stage.clock.now_ns += 2 * S
    stage.controller.pump()
    assert [notice.signal.reason for notice in stage.told] == [f"n{number}" for number in range(100)]
    statistics = stage.controller.statistics()
    assert (statistics.raised, statistics.signals_told, statistics.signals_waiting) == (100, 100, 0)


def test_a_flood_of_the_same_signal_takes_one_notice(stage: Stage) -> None:
    """What waits and says the same is told once, with its count."""
    for _ in range(10_000):
        stage.controller.escalate(NOTICE, "again", "judge")
    assert stage.controller.statistics().notices_waiting == 1
    stage.clock.now_ns += 61 * S
    stage.controller.pump()
    assert (len(stage.told), stage.told[-1].count) == (61, 9940)


def test_a_failed_broadcast_is_told_and_tried_again(stage: Stage) -> None:
    """The emergency stands on the board; the failure is a report; what failed comes first, after a pause."""
    stage.broken = "collector is down"
    stage.controller.escalate(HALT, "one", "judge")
    stage.controller.escalate(HALT, "two", "judge")
    (failed,) = stage.reports_of(Broadcast)
    assert (failed.error, failed.notice.signal.reason) == ("collector is down", "one")
    assert stage.other.effective() is not None
    stage.broken = ""
    stage.controller.pump()
    assert stage.told == []
    stage.clock.now_ns += S
    stage.controller.pump()
    assert [notice.signal.reason for notice in stage.told] == ["one", "two"]
    statistics = stage.controller.statistics()
    assert (statistics.broadcast_failures, statistics.broadcasts) == (1, 2)


def mistaken(_: Notice) -> None:
    """A broadcaster with a mistake in it."""
    raise ZeroDivisionError


def test_a_mistake_in_the_broadcaster_goes_through_and_loses_nothing(stage: Stage) -> None:
    """An error that it may not raise is no reason to hide it; board, state and signal are in place all the same."""
    stage.controller = EmergencyController(
        stage.board,
        stage.participant,
        broadcast=mistaken,
        observer=stage.reports.append,
        clock=stage.clock,
    )
    with pytest.raises(ZeroDivisionError):
        stage.controller.escalate(HALT, "why", "judge")
    assert stage.controller.state.level == HALT
    assert stage.other.effective() is not None
    assert stage.controller.statistics().signals_waiting == 1


def test_the_observer_may_raise_and_acknowledge(stage: Stage) -> None:
    """A report that leads to the next emergency: both are told, in the order in which they were raised."""

    def react(report: Report) -> None:
        if isinstance(report, Escalated) and report.state.level < HALT:
            stage.controller.escalate(HALT, "worse", "judge")
            stage.controller.acknowledge()

    stage.react = react
    stage.other.claim("kasmina").raise_level(NOTICE, "bad")
    stage.controller.observe_board()
    assert (stage.controller.state.level, stage.controller.state.reason) == (HALT, "worse")
    assert [notice.signal.reason for notice in stage.told] == ["bad", "worse"]
    assert stage.reports_of(Reissued) == []


def test_a_lost_board_is_told_and_the_emergency_stands(stage: Stage) -> None:
    """Without the board levels are raised, told and cleared as ever; each write that failed is counted."""
    stage.board.close()
    stage.controller.observe_board()
    stage.controller.observe_board()
    assert len(stage.reports_of(BoardUnreadable)) == 1
    state = stage.controller.escalate(HALT, "why", "judge")
    (escalated,) = stage.reports_of(Escalated)
    assert escalated.write is not None
    assert "not owned here any more" in escalated.write.error
    assert (state.level, state.signal_id, len(stage.told)) == (HALT, 0, 1)
    stage.controller.acknowledge()
    stage.controller.clear("done", "operator", by=OPERATOR)
    assert stage.controller.state == EmergencyState()
    assert stage.controller.statistics().board_failures == 3


def test_a_block_that_is_not_ours_any_more_is_told_once(stage: Stage) -> None:
    """The board can be read but not written: it is tried at every look, and reported at the first."""
    stage.participant.release()
    stage.controller.escalate(HALT, "why", "judge")
    for _ in range(5):
        stage.controller.observe_board()
    assert stage.reports_of(Reissued) == []
    assert stage.controller.statistics().board_failures == 6
    assert stage.other.effective() is None
