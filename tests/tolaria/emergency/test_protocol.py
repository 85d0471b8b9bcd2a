from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from leyline.v1.enums_pb2 import (
    EMERGENCY_LEVEL_CONSERVATIVE,
    EMERGENCY_LEVEL_ELEVATED,
    EMERGENCY_LEVEL_HALT,
    EMERGENCY_LEVEL_NOTICE,
    EmergencyLevel,
)
from tolaria.emergency.protocol import (
    CALM,
    RESPONSES,
    TRANSITIONS,
    TRIGGERS,
    Acknowledge,
    Acknowledgement,
    Clear,
    Clearer,
    EmergencyState,
    EpochStreak,
    Event,
    Move,
    PassDeadline,
    Phase,
    Raise,
    Reissue,
    Trigger,
    move_of,
    recovered,
    transition,
)
from tolaria.errors import ClearanceRefusedError, IllegalEmergencyEventError, UnknownLevelError

NOTICE, ELEVATED = EMERGENCY_LEVEL_NOTICE, EMERGENCY_LEVEL_ELEVATED
CONSERVATIVE, HALT = EMERGENCY_LEVEL_CONSERVATIVE, EMERGENCY_LEVEL_HALT
MS = 1_000_000
PEERS = ("kasmina", "tamiyo", "sentinel")


def raised(level: EmergencyLevel.ValueType, at_ns: int = 1000, attached: tuple[str, ...] = PEERS) -> Raise:
    """A raise of `level`."""
    return Raise(level, "why", "who", 7, at_ns, attached)


STATES = {
    Phase.CALM: CALM,
    Phase.RAISED: EmergencyState(Phase.RAISED, CONSERVATIVE, "why", "who", 7, 1000, 2000, ("tolaria", "kasmina")),
}
STATES[Phase.ANSWERED] = replace(
    STATES[Phase.RAISED],
    phase=Phase.ANSWERED,
    acknowledgements=(Acknowledgement("tolaria", 1), Acknowledgement("kasmina", 2)),
)
STATES[Phase.OVERDUE] = replace(STATES[Phase.RAISED], phase=Phase.OVERDUE)


def event_for(move: Move, state: EmergencyState) -> Event | None:
    """An event that makes `move` in `state`; None when there is none."""
    events: dict[Move, Event | None] = {
        Move.ESCALATE: raised(HALT),
        Move.COVER: raised(NOTICE) if state.level else None,
        Move.ACKNOWLEDGE: Acknowledge("tamiyo", 1500),
        Move.ACKNOWLEDGE_LAST: Acknowledge("kasmina", 1500) if len(state.missing) == 2 else None,
        Move.MISS_DEADLINE: PassDeadline(2000),
        Move.REISSUE: Reissue(9),
        Move.CLEAR: Clear(Clearer.OPERATOR, ()),
    }
    return events[move]


@pytest.mark.parametrize(("phase", "move"), list(itertools.product(Phase, Move)))
def test_every_phase_and_move(phase: Phase, move: Move) -> None:
    """A move in the table leads to its phase; any other raises and changes nothing."""
    state = STATES[phase]
    event = event_for(move, state)
    if event is None:
        assert (phase, move) not in TRANSITIONS
        return
    if move is Move.ACKNOWLEDGE_LAST:
        state = replace(state, acknowledgements=(Acknowledgement("tolaria", 1),))
    assert move_of(state, event) is move
    if (phase, move) in TRANSITIONS:
        assert transition(state, event).phase is TRANSITIONS[phase, move]
    else:
        before = replace(state)
        with pytest.raises(IllegalEmergencyEventError, match=move.name):
            transition(state, event)
        assert state == before


def test_illegal_moves() -> None:
    """Calm permits only a raise; a deadline is missed once, and not after all acknowledged."""
    missing = set(itertools.product(Phase, Move)) - set(TRANSITIONS)
    calm = {(Phase.CALM, move) for move in Move if move is not Move.ESCALATE}
    assert missing == calm | {
        (Phase.ANSWERED, Move.ACKNOWLEDGE_LAST),
        (Phase.ANSWERED, Move.MISS_DEADLINE),
        (Phase.OVERDUE, Move.MISS_DEADLINE),
    }


@pytest.mark.parametrize(
    ("level", "deadline_ms", "awaited"),
    [
        (NOTICE, 5000, ("tolaria",)),
        (ELEVATED, 2000, ("tolaria",)),
        (CONSERVATIVE, 500, ("tolaria",)),
        (HALT, 100, ("tolaria", "kasmina", "tamiyo")),
    ],
)
def test_each_level_has_its_deadline_and_awaited_participants(
    level: EmergencyLevel.ValueType, deadline_ms: int, awaited: tuple[str, ...]
) -> None:
    """5 s, 2 s, 500 ms, 100 ms; peers have to acknowledge a halt too."""
    state = transition(CALM, raised(level))
    assert (state.deadline_ns, state.awaited) == (1000 + deadline_ms * MS, awaited)


def test_the_response_to_each_level() -> None:
    """Log; full rollback on request; conservative mode and fast rollback; halt."""
    asked = {
        level: (r.full_rollback_may_be_asked, r.conservative_mode, r.fast_rollback, r.halt)
        for level, r in RESPONSES.items()
    }
    assert asked == {
        NOTICE: (False, False, False, False),
        ELEVATED: (True, False, False, False),
        CONSERVATIVE: (False, True, True, False),
        HALT: (False, False, False, True),
    }
    assert set(RESPONSES) == set(EmergencyLevel.values()) - {0}


@pytest.mark.parametrize("level", [0, 5, -1, 99])
def test_unknown_levels_are_refused(level: int) -> None:
    """0 and unknown numbers are no levels."""
    with pytest.raises(UnknownLevelError, match=str(level)):
        transition(CALM, raised(level))  # type: ignore[arg-type]


@pytest.mark.parametrize(("first", "second"), list(itertools.product(RESPONSES, RESPONSES)))
def test_a_raise_never_lowers_the_level(first: EmergencyLevel.ValueType, second: EmergencyLevel.ValueType) -> None:
    """A higher level replaces the emergency; any other changes nothing."""
    before = transition(transition(CALM, raised(first)), Acknowledge("tolaria", 1200))
    after = transition(before, raised(second, at_ns=5000))
    assert after == (transition(CALM, raised(second, at_ns=5000)) if second > first else before)


def test_clearing_resets_everything() -> None:
    """Level, reason, origin, times and acknowledgements are reset."""
    state = transition(transition(CALM, raised(HALT)), Acknowledge("kasmina", 1200))
    assert transition(state, Clear(Clearer.OPERATOR, ("tolaria",))) == CALM


@pytest.mark.parametrize(
    ("level", "by", "sources", "permitted"),
    [
        (HALT, Clearer.OPERATOR, ("tolaria", "kasmina"), True),
        (CONSERVATIVE, Clearer.RECOVERED, ("tolaria",), True),
        (HALT, Clearer.RECOVERED, ("tolaria",), False),
        (HALT, Clearer.RECOVERED, ("sentinel",), False),
        (HALT, Clearer.RESTARTED, ("sentinel",), True),
        (HALT, Clearer.RESTARTED, ("sentinel", "kasmina"), False),
        (HALT, Clearer.RESTARTED, (), False),
        (ELEVATED, Clearer.RESTARTED, ("tolaria",), False),
    ],
)
def test_clearance_rules(
    level: EmergencyLevel.ValueType, by: Clearer, sources: tuple[str, ...], permitted: bool
) -> None:
    """No rule clears a halt, except the sentinel's own after a restart."""
    state = transition(CALM, raised(level))
    if permitted:
        assert transition(state, Clear(by, sources)) == CALM
    else:
        with pytest.raises(ClearanceRefusedError, match="operator"):
            transition(state, Clear(by, sources))


def test_a_deadline_does_not_pass_early() -> None:
    """One nanosecond early is refused."""
    state = transition(CALM, raised(HALT))
    with pytest.raises(IllegalEmergencyEventError, match="1 ns"):
        transition(state, PassDeadline(state.deadline_ns - 1))
    assert transition(state, PassDeadline(state.deadline_ns)).phase is Phase.OVERDUE


def test_only_the_first_acknowledgement_of_each_participant_counts() -> None:
    """A repeated one changes nothing; one from before the raise has latency 0."""
    state = transition(CALM, raised(HALT, attached=("kasmina",)))
    for event in (Acknowledge("kasmina", 900), Acknowledge("kasmina", 3000), Acknowledge("tolaria", 1200)):
        state = transition(state, event)
    assert state.acknowledgements == (Acknowledgement("kasmina", 0), Acknowledgement("tolaria", 200))
    assert (state.phase, state.missing) == (Phase.ANSWERED, ())


def test_participants_that_are_not_attached_are_not_awaited() -> None:
    """A peer without a board does not make every halt overdue."""
    assert transition(CALM, raised(HALT, attached=())).awaited == ("tolaria",)


# Phase after each event in each phase (columns: calm, raised, answered, overdue), or the error. Except in calm the
# level is CONSERVATIVE, tolaria and kasmina are awaited, and tolaria acknowledged already.
ILLEGAL, REFUSED, UNKNOWN = IllegalEmergencyEventError, ClearanceRefusedError, UnknownLevelError
RAISED, ANSWERED, OVERDUE = Phase.RAISED, Phase.ANSWERED, Phase.OVERDUE
EVENTS: dict[str, tuple[Event, tuple[Phase | type[Exception], ...]]] = {
    "a higher level": (raised(HALT), (RAISED, RAISED, RAISED, RAISED)),
    "the same level": (raised(CONSERVATIVE), (RAISED, RAISED, ANSWERED, OVERDUE)),
    "a lower level": (raised(NOTICE), (RAISED, RAISED, ANSWERED, OVERDUE)),
    "no level": (raised(0), (UNKNOWN,) * 4),  # type: ignore[arg-type] # on purpose
    "an unknown level": (raised(5), (UNKNOWN,) * 4),  # type: ignore[arg-type] # on purpose
    "the last acknowledgement": (Acknowledge("kasmina", 1500), (ILLEGAL, ANSWERED, ANSWERED, ANSWERED)),
    "a repeated acknowledgement": (Acknowledge("tolaria", 1500), (ILLEGAL, RAISED, ANSWERED, OVERDUE)),
    "an acknowledgement that is not awaited": (Acknowledge("tamiyo", 1500), (ILLEGAL, RAISED, ANSWERED, OVERDUE)),
    "the deadline, early": (PassDeadline(1999), (ILLEGAL,) * 4),
    "the deadline": (PassDeadline(2000), (ILLEGAL, OVERDUE, ILLEGAL, ILLEGAL)),
    "reissued": (Reissue(9), (ILLEGAL, RAISED, ANSWERED, OVERDUE)),
    "cleared by an operator": (Clear(Clearer.OPERATOR, ()), (ILLEGAL, *[Phase.CALM] * 3)),
    "cleared by recovery": (Clear(Clearer.RECOVERED, ("tolaria",)), (ILLEGAL, *[Phase.CALM] * 3)),
    "cleared by a restart": (Clear(Clearer.RESTARTED, ("sentinel",)), (ILLEGAL, *[Phase.CALM] * 3)),
    "cleared by a restart, raised by tolaria": (Clear(Clearer.RESTARTED, ("tolaria",)), (REFUSED,) * 4),
}


@pytest.mark.parametrize(("what", "phase"), list(itertools.product(EVENTS, Phase)))
def test_every_phase_and_event(what: str, phase: Phase) -> None:
    """As in the table above; an event that raises changes nothing."""
    state = STATES[phase]
    if phase in {RAISED, OVERDUE}:
        state = replace(state, acknowledgements=(Acknowledgement("tolaria", 1),))
    event, outcomes = EVENTS[what]
    outcome, before = outcomes[list(Phase).index(phase)], replace(state)
    if isinstance(outcome, Phase):
        assert transition(state, event).phase is outcome
    else:
        with pytest.raises(outcome):
            transition(state, event)
    assert state == before


def test_every_trigger_has_its_level() -> None:
    """Budget breaches are ELEVATED, an open breaker is CONSERVATIVE, all others are HALT."""
    assert set(TRIGGERS) == set(Trigger)
    assert {t for t, level in TRIGGERS.items() if level == ELEVATED} == {
        Trigger.BOUNDARY_BREACH,
        Trigger.HOOK_BREACH,
    }
    assert {t for t, level in TRIGGERS.items() if level == CONSERVATIVE} == {Trigger.BREAKER_OPEN}
    assert sum(level == HALT for level in TRIGGERS.values()) == 4


def test_the_third_failed_epoch_in_a_row_is_a_streak() -> None:
    """A healthy epoch resets the streak; it is spent again after three more."""
    streak, spent = EpochStreak(3), []
    for healthy in (False, False, True, False, False, False, False, False, False):
        streak = streak.after(healthy=healthy)
        spent.append(streak.spent)
    assert spent == [False, False, False, False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("phase", "level", "healthy", "cause_remains", "expected"),
    [
        (Phase.ANSWERED, CONSERVATIVE, 3, False, True),
        (Phase.OVERDUE, ELEVATED, 9, False, True),
        (Phase.ANSWERED, CONSERVATIVE, 2, False, False),
        (Phase.ANSWERED, CONSERVATIVE, 3, True, False),
        (Phase.ANSWERED, HALT, 9, False, False),
        (Phase.CALM, 0, 9, False, False),
    ],
)
def test_the_recovery_rule(phase: Phase, level: int, healthy: int, cause_remains: bool, expected: bool) -> None:
    """Below HALT, after enough healthy epochs, when no cause remains."""
    state = EmergencyState(phase, level)  # type: ignore[arg-type]
    assert recovered(state, EpochStreak(3, 0, healthy), recovery_epochs=3, cause_remains=cause_remains) is expected
