from __future__ import annotations

import itertools
from collections.abc import Callable

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
    TRIGGERS,
    Acknowledgement,
    Clearer,
    EmergencyState,
    EpochStreak,
    Phase,
    Trigger,
    acknowledged,
    cleared,
    level_name,
    overdue,
    raised,
    recovered,
)
from tolaria.errors import ClearanceRefusedError, IllegalEmergencyEventError, UnknownLevelError
from tolaria.signals import Signal

NOTICE, ELEVATED = EMERGENCY_LEVEL_NOTICE, EMERGENCY_LEVEL_ELEVATED
CONSERVATIVE, HALT = EMERGENCY_LEVEL_CONSERVATIVE, EMERGENCY_LEVEL_HALT
MS = 1_000_000
PEERS = ("kasmina", "tamiyo", "sentinel")


def signal(level: int, at_ns: int = 1000) -> Signal:
    """A signal of `level`."""
    return Signal("who", level, "why", 7, at_ns)  # type: ignore[arg-type]


def emergency(level: int, attached: tuple[str, ...] = PEERS) -> EmergencyState:
    """An emergency raised at 1000 ns."""
    return raised(CALM, signal(level), attached)


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
    state = emergency(level)
    assert (state.deadline_ns, state.awaited) == (1000 + deadline_ms * MS, awaited)


def test_the_response_to_each_level() -> None:
    """CONSERVATIVE requires conservative mode, HALT a halt; the lower levels are only reported."""
    assert {level: (response.conservative_mode, response.halt) for level, response in RESPONSES.items()} == {
        NOTICE: (False, False),
        ELEVATED: (False, False),
        CONSERVATIVE: (True, False),
        HALT: (False, True),
    }
    assert set(RESPONSES) == set(EmergencyLevel.values()) - {0}


@pytest.mark.parametrize("level", [0, 5, -1, 99])
def test_unknown_levels_are_refused(level: int) -> None:
    """0 and unknown numbers are no levels."""
    with pytest.raises(UnknownLevelError, match=str(level)):
        emergency(level)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(RESPONSES, RESPONSES)))
def test_a_raise_never_lowers_the_level(first: EmergencyLevel.ValueType, second: EmergencyLevel.ValueType) -> None:
    """A higher level replaces the emergency; any other changes nothing."""
    before = acknowledged(emergency(first), "tolaria", 1200)
    after = raised(before, signal(second, at_ns=5000), PEERS)
    assert after == (raised(CALM, signal(second, at_ns=5000), PEERS) if second > first else before)


def test_clearing_resets_everything() -> None:
    """Level, reason, origin, times and acknowledgements are reset."""
    state = acknowledged(emergency(HALT), "kasmina", 1200)
    assert cleared(state, Clearer.OPERATOR, ("tolaria",)) == EmergencyState()


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
    state = emergency(level)
    if permitted:
        assert cleared(state, by, sources) == CALM
    else:
        with pytest.raises(ClearanceRefusedError, match=f"{level_name(level)}, raised by .*, needs an operator"):
            cleared(state, by, sources)


def test_a_deadline_does_not_pass_early() -> None:
    """One nanosecond early is refused."""
    state = emergency(HALT)
    with pytest.raises(IllegalEmergencyEventError, match="1 ns"):
        overdue(state, state.deadline_ns - 1)
    assert overdue(state, state.deadline_ns).phase is Phase.OVERDUE


def test_only_the_first_acknowledgement_of_each_participant_counts() -> None:
    """A repeated one changes nothing; one from before the raise has latency 0."""
    state = emergency(HALT, attached=("kasmina",))
    for participant, at_ns in (("kasmina", 900), ("kasmina", 3000), ("tolaria", 1200)):
        state = acknowledged(state, participant, at_ns)
    assert state.acknowledgements == (Acknowledgement("kasmina", 0), Acknowledgement("tolaria", 200))
    assert (state.phase, state.missing) == (Phase.ANSWERED, ())


def test_participants_that_are_not_attached_are_not_awaited() -> None:
    """A peer without a board does not make every halt overdue."""
    assert emergency(HALT, attached=()).awaited == ("tolaria",)


@pytest.mark.parametrize(
    ("level", "name"), [(NOTICE, "notice"), (CONSERVATIVE, "conservative"), (0, "unspecified"), (17, "17")]
)
def test_levels_have_names(level: EmergencyLevel.ValueType, name: str) -> None:
    """In lower case; a number that the contract has no name for is shown as it is."""
    assert level_name(level) == name


def in_phase(phase: Phase) -> EmergencyState:
    """A state of each phase. Except in CALM tolaria and kasmina are awaited, and tolaria acknowledged already."""
    if phase is Phase.CALM:
        return CALM
    given = (Acknowledgement("tolaria", 1), Acknowledgement("kasmina", 2))[: 2 if phase is Phase.ANSWERED else 1]
    return EmergencyState(phase, CONSERVATIVE, "why", "who", 7, 1000, 2000, ("tolaria", "kasmina"), given)


# Phase after each event in each phase (columns: calm, raised, answered, overdue), or the error.
ILLEGAL, REFUSED, UNKNOWN = IllegalEmergencyEventError, ClearanceRefusedError, UnknownLevelError
RAISED, ANSWERED, OVERDUE = Phase.RAISED, Phase.ANSWERED, Phase.OVERDUE
Event = Callable[[EmergencyState], EmergencyState]
EVENTS: dict[str, tuple[Event, tuple[Phase | type[Exception], ...]]] = {
    "a higher level": (lambda s: raised(s, signal(HALT), PEERS), (RAISED, RAISED, RAISED, RAISED)),
    "the same level": (lambda s: raised(s, signal(CONSERVATIVE), PEERS), (RAISED, RAISED, ANSWERED, OVERDUE)),
    "a lower level": (lambda s: raised(s, signal(NOTICE), PEERS), (RAISED, RAISED, ANSWERED, OVERDUE)),
    "no level": (lambda s: raised(s, signal(0), PEERS), (UNKNOWN,) * 4),
    "an unknown level": (lambda s: raised(s, signal(5), PEERS), (UNKNOWN,) * 4),
    "the last acknowledgement": (lambda s: acknowledged(s, "kasmina", 1500), (ILLEGAL, ANSWERED, ANSWERED, ANSWERED)),
    "a repeated acknowledgement": (lambda s: acknowledged(s, "tolaria", 1500), (ILLEGAL, RAISED, ANSWERED, OVERDUE)),
    "one that is not awaited": (lambda s: acknowledged(s, "tamiyo", 1500), (ILLEGAL, RAISED, ANSWERED, OVERDUE)),
    "the deadline, early": (lambda s: overdue(s, 1999), (ILLEGAL,) * 4),
    "the deadline": (lambda s: overdue(s, 2000), (ILLEGAL, OVERDUE, ILLEGAL, ILLEGAL)),
    "cleared by an operator": (lambda s: cleared(s, Clearer.OPERATOR, ()), (ILLEGAL, *[Phase.CALM] * 3)),
    "cleared by recovery": (lambda s: cleared(s, Clearer.RECOVERED, ("tolaria",)), (ILLEGAL, *[Phase.CALM] * 3)),
    "cleared by a restart": (lambda s: cleared(s, Clearer.RESTARTED, ("sentinel",)), (ILLEGAL, *[Phase.CALM] * 3)),
    "by a restart, raised by tolaria": (lambda s: cleared(s, Clearer.RESTARTED, ("tolaria",)), (REFUSED,) * 4),
}


@pytest.mark.parametrize(("what", "phase"), list(itertools.product(EVENTS, Phase)))
def test_every_phase_and_event(what: str, phase: Phase) -> None:
    """As in the table above; an event that raises changes nothing."""
    state, before = in_phase(phase), in_phase(phase)
    event, outcomes = EVENTS[what]
    outcome = outcomes[list(Phase).index(phase)]
    if isinstance(outcome, Phase):
        assert event(state).phase is outcome
    else:
        with pytest.raises(outcome):
            event(state)
    assert state == before


def test_every_trigger_has_its_level() -> None:
    """Clocks and peers are at most ELEVATED: only ill training is more."""
    assert set(TRIGGERS) == set(Trigger)
    levels = {level: {t.value for t, found in TRIGGERS.items() if found == level} for level in TRIGGERS.values()}
    assert levels == {
        NOTICE: {"boundary_breach", "hook_breach", "peer_failure"},
        ELEVATED: {"breaker_open"},
        CONSERVATIVE: {"accuracy_collapse"},
        HALT: {
            *("rollback_deadline_missed", "failed_epoch_streak", "rollback_budget_spent", "no_progress"),
            *("skipped_data_spent", "parameters_not_finite", "heartbeat_silent"),
        },
    }


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
