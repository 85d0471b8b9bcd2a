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
    Acknowledge,
    Acknowledgement,
    Clear,
    Clearer,
    EmergencyState,
    Event,
    Move,
    PassDeadline,
    Phase,
    Raise,
    Reissue,
    move_of,
    transition,
)
from tolaria.errors import ClearanceRefusedError, IllegalEmergencyEventError, UnknownLevelError

NOTICE, ELEVATED = EMERGENCY_LEVEL_NOTICE, EMERGENCY_LEVEL_ELEVATED
CONSERVATIVE, HALT = EMERGENCY_LEVEL_CONSERVATIVE, EMERGENCY_LEVEL_HALT
MS = 1_000_000
PEERS = ("kasmina", "tamiyo", "sentinel")


def raised(level: EmergencyLevel.ValueType, at_ns: int = 1000, attached: tuple[str, ...] = PEERS) -> Raise:
    """Somebody raises `level`."""
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
    """An event that comes to `move` in `state`; None where no event can."""
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
    """The table decides every move; what it does not list raises and changes nothing."""
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


def test_what_is_illegal() -> None:
    """In calm nothing but a raise can happen; a deadline is missed once, and not by who has answered."""
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
def test_each_level_has_its_deadline_and_its_answerers(
    level: EmergencyLevel.ValueType, deadline_ms: int, awaited: tuple[str, ...]
) -> None:
    """5 s, 2 s, 500 ms, 100 ms; a halt is to be acknowledged by the peers too."""
    state = transition(CALM, raised(level))
    assert (state.deadline_ns, state.awaited) == (1000 + deadline_ms * MS, awaited)


def test_what_each_level_asks_for() -> None:
    """Log; a full rollback may be asked; conservative mode and fast rollback; halt."""
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
    """Neither no level nor a new one is an emergency."""
    with pytest.raises(UnknownLevelError, match=str(level)):
        transition(CALM, raised(level))  # type: ignore[arg-type]


@pytest.mark.parametrize(("first", "second"), list(itertools.product(RESPONSES, RESPONSES)))
def test_a_level_goes_up_only(first: EmergencyLevel.ValueType, second: EmergencyLevel.ValueType) -> None:
    """A higher level replaces the emergency whole; any other leaves it as it is."""
    before = transition(transition(CALM, raised(first)), Acknowledge("tolaria", 1200))
    after = transition(before, raised(second, at_ns=5000))
    assert after == (transition(CALM, raised(second, at_ns=5000)) if second > first else before)


def test_clearing_resets_everything() -> None:
    """Level, reason, origin, times and acknowledgements are gone."""
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
def test_who_may_clear_what(
    level: EmergencyLevel.ValueType, by: Clearer, sources: tuple[str, ...], permitted: bool
) -> None:
    """No rule ends a halt, but that a silent process was replaced ends the sentinel's own."""
    state = transition(CALM, raised(level))
    if permitted:
        assert transition(state, Clear(by, sources)) == CALM
    else:
        with pytest.raises(ClearanceRefusedError, match="operator"):
            transition(state, Clear(by, sources))


def test_a_deadline_does_not_pass_early() -> None:
    """One nanosecond before it is refused."""
    state = transition(CALM, raised(HALT))
    with pytest.raises(IllegalEmergencyEventError, match="1 ns"):
        transition(state, PassDeadline(state.deadline_ns - 1))
    assert transition(state, PassDeadline(state.deadline_ns)).phase is Phase.OVERDUE


def test_the_first_acknowledgement_of_each_counts() -> None:
    """A repeated one keeps the time of the first; one from before the raise took no time."""
    state = transition(CALM, raised(HALT, attached=("kasmina",)))
    for event in (Acknowledge("kasmina", 900), Acknowledge("kasmina", 3000), Acknowledge("tolaria", 1200)):
        state = transition(state, event)
    assert state.acknowledgements == (Acknowledgement("kasmina", 0), Acknowledgement("tolaria", 200))
    assert (state.phase, state.missing) == (Phase.ANSWERED, ())


def test_who_is_not_on_the_board_is_not_awaited() -> None:
    """A peer that does not know the board must not make every halt overdue."""
    assert transition(CALM, raised(HALT, attached=())).awaited == ("tolaria",)


# Where each event leads from each phase (columns: calm, raised, answered, overdue), or what it raises. In all but calm
# the level is CONSERVATIVE, and of tolaria and kasmina, who are awaited, tolaria has answered already.
ILLEGAL, REFUSED, UNKNOWN = IllegalEmergencyEventError, ClearanceRefusedError, UnknownLevelError
RAISED, ANSWERED, OVERDUE = Phase.RAISED, Phase.ANSWERED, Phase.OVERDUE
EVENTS: dict[str, tuple[Event, tuple[Phase | type[Exception], ...]]] = {
    "a higher level": (raised(HALT), (RAISED, RAISED, RAISED, RAISED)),
    "the same level": (raised(CONSERVATIVE), (RAISED, RAISED, ANSWERED, OVERDUE)),
    "a lower level": (raised(NOTICE), (RAISED, RAISED, ANSWERED, OVERDUE)),
    "no level": (raised(0), (UNKNOWN,) * 4),  # type: ignore[arg-type] # on purpose
    "a level of the future": (raised(5), (UNKNOWN,) * 4),  # type: ignore[arg-type] # on purpose
    "the last answer": (Acknowledge("kasmina", 1500), (ILLEGAL, ANSWERED, ANSWERED, ANSWERED)),
    "an answer come twice": (Acknowledge("tolaria", 1500), (ILLEGAL, RAISED, ANSWERED, OVERDUE)),
    "an answer nobody awaits": (Acknowledge("tamiyo", 1500), (ILLEGAL, RAISED, ANSWERED, OVERDUE)),
    "a deadline too early": (PassDeadline(1999), (ILLEGAL,) * 4),
    "the deadline": (PassDeadline(2000), (ILLEGAL, OVERDUE, ILLEGAL, ILLEGAL)),
    "put up again": (Reissue(9), (ILLEGAL, RAISED, ANSWERED, OVERDUE)),
    "cleared by an operator": (Clear(Clearer.OPERATOR, ()), (ILLEGAL, *[Phase.CALM] * 3)),
    "cleared by recovery": (Clear(Clearer.RECOVERED, ("tolaria",)), (ILLEGAL, *[Phase.CALM] * 3)),
    "cleared by a restart": (Clear(Clearer.RESTARTED, ("sentinel",)), (ILLEGAL, *[Phase.CALM] * 3)),
    "cleared by another's restart": (Clear(Clearer.RESTARTED, ("tolaria",)), (REFUSED,) * 4),
}


@pytest.mark.parametrize(("what", "phase"), list(itertools.product(EVENTS, Phase)))
def test_every_phase_and_event(what: str, phase: Phase) -> None:
    """As the table above says; what raises changes nothing."""
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
