from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leyline.v1.enums_pb2 import CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_HALF_OPEN, CIRCUIT_STATE_OPEN
from tolaria.errors import IllegalTransitionError
from tolaria.resilience.conservative import (
    EMERGENCY,
    OPERATOR,
    TRANSITIONS,
    ConservativeMode,
    ModeChange,
    Reason,
    ReasonEvent,
    Recovery,
    breaker_open,
    epoch_failed,
    stands_after,
)

TAMIYO, FAILED = breaker_open("tamiyo"), epoch_failed("non_finite")
REASONS = (TAMIYO, breaker_open("kasmina"), FAILED, epoch_failed("peer_failure"), EMERGENCY, OPERATOR)


class Changes:
    def __init__(self) -> None:
        self.seen: list[ModeChange] = []

    def mode(self, recovery_epochs: int = 2) -> ConservativeMode:
        return ConservativeMode(recovery_epochs=recovery_epochs, on_change=self.seen.append)


@pytest.mark.parametrize(("recovery", "stood", "event"), list(itertools.product(Recovery, (True, False), ReasonEvent)))
def test_every_kind_of_reason_and_event(recovery: Recovery, stood: bool, event: ReasonEvent) -> None:
    """The table decides; what it does not list raises."""
    reason = Reason("x", recovery)
    if (recovery, stood, event) in TRANSITIONS:
        assert stands_after(reason, event, stood=stood) is TRANSITIONS[recovery, stood, event]
    else:
        with pytest.raises(IllegalTransitionError, match=event.name):
            stands_after(reason, event, stood=stood)


def test_what_is_illegal() -> None:
    """Nothing ends that does not stand, and each kind only in its own way."""
    missing = set(itertools.product(Recovery, (True, False), ReasonEvent)) - set(TRANSITIONS)
    ended, served = ReasonEvent.CAUSE_ENDED, ReasonEvent.EPOCHS_SERVED
    absent = {(recovery, False, event) for recovery in Recovery for event in (ended, served)}
    told = {(recovery, True, served) for recovery in Recovery if recovery is not Recovery.HEALTHY_EPOCHS}
    assert missing == absent | told | {(Recovery.HEALTHY_EPOCHS, True, ended)}


def test_on_while_any_reason_stands() -> None:
    """The first reason switches it on, the last one to leave off; both are told with the difference."""
    changes = Changes()
    mode = changes.mode()
    mode.enter(TAMIYO)
    mode.enter(OPERATOR)
    mode.leave(TAMIYO)
    assert (mode.on, mode.reasons) == (True, ("operator",))
    mode.leave(OPERATOR)
    assert not mode.on
    assert changes.seen == [
        ModeChange(True, False, ("breaker_open:tamiyo",), ("breaker_open:tamiyo",), ()),
        ModeChange(True, True, ("breaker_open:tamiyo", "operator"), ("operator",), ()),
        ModeChange(True, True, ("operator",), (), ("breaker_open:tamiyo",)),
        ModeChange(False, True, (), (), ("operator",)),
    ]


def test_a_reason_caused_again_changes_nothing() -> None:
    """Only differences are told."""
    changes = Changes()
    mode = changes.mode()
    mode.enter(EMERGENCY)
    mode.enter(EMERGENCY)
    assert len(changes.seen) == 1


@pytest.mark.parametrize("reason", [TAMIYO, EMERGENCY, OPERATOR, FAILED])
def test_leaving_what_does_not_stand_changes_nothing(reason: Reason) -> None:
    """It raises, and the mode and its observer are as they were."""
    changes = Changes()
    mode = changes.mode()
    mode.enter(epoch_failed("boundary_breach"))
    with pytest.raises(IllegalTransitionError):
        mode.leave(reason)
    assert (mode.reasons, len(changes.seen)) == (("epoch_failed:boundary_breach",), 1)


def test_a_failed_epoch_is_served_by_healthy_ones_in_a_row() -> None:
    """A failure in between, or the same cause again, starts the count anew."""
    mode = Changes().mode(recovery_epochs=2)
    mode.enter(FAILED)
    mode.healthy_epoch()
    mode.failed_epoch()
    mode.healthy_epoch()
    mode.enter(FAILED)
    mode.healthy_epoch()
    assert mode.on
    mode.healthy_epoch()
    assert not mode.on


def test_healthy_epochs_end_no_other_kind() -> None:
    """A breaker, an emergency and an operator's wish do not go away with time."""
    mode = Changes().mode(recovery_epochs=1)
    for reason in (TAMIYO, EMERGENCY, OPERATOR, FAILED):
        mode.enter(reason)
    for _ in range(5):
        mode.healthy_epoch()
    assert mode.reasons == ("breaker_open:tamiyo", "emergency", "operator")


def test_forced_off_leaves_the_causes_that_stand() -> None:
    """An open breaker and a standing emergency stay reasons; everything else goes."""
    mode = Changes().mode()
    for reason in REASONS:
        mode.enter(reason)
    mode.force_off()
    assert mode.reasons == ("breaker_open:tamiyo", "breaker_open:kasmina", "emergency")
    mode.force_on()
    assert "operator" in mode.reasons


def test_the_trial_of_a_half_open_breaker_is_let_through() -> None:
    """Otherwise the mode would keep the call from happening that alone can end it."""
    mode = Changes().mode()
    assert mode.permits_call("tamiyo", CIRCUIT_STATE_OPEN)  # off: the breaker decides
    mode.enter(TAMIYO)
    mode.enter(EMERGENCY)
    assert mode.permits_call("tamiyo", CIRCUIT_STATE_HALF_OPEN)
    assert not mode.permits_call("tamiyo", CIRCUIT_STATE_CLOSED)
    assert not mode.permits_call("kasmina", CIRCUIT_STATE_HALF_OPEN)
    mode.force_on()
    assert not mode.permits_call("tamiyo", CIRCUIT_STATE_HALF_OPEN)


def test_recovery_takes_at_least_one_epoch() -> None:
    """Zero would end a failure's reason before it began."""
    with pytest.raises(ValueError, match="at least 1"):
        Changes().mode(recovery_epochs=0)


@given(
    st.lists(st.tuples(st.sampled_from(["enter", "leave", "healthy", "failed", "on", "off"]), st.sampled_from(REASONS)))
)
def test_no_sequence_breaks_it(steps: list[tuple[str, Reason]]) -> None:
    """It agrees with a set that is changed by the rules as written, and the differences told add up to it."""
    changes = Changes()
    mode, model, epochs = changes.mode(recovery_epochs=2), set[Reason](), dict[Reason, int]()
    for step, reason in steps:
        if step == "enter":
            mode.enter(reason)
            model.add(reason)
            epochs[reason] = 0
        elif step == "leave" and (reason not in model or reason.recovery is Recovery.HEALTHY_EPOCHS):
            with pytest.raises(IllegalTransitionError):
                mode.leave(reason)
        elif step == "leave":
            mode.leave(reason)
            model.discard(reason)
        elif step == "healthy":
            mode.healthy_epoch()
            epochs = {r: n + 1 for r, n in epochs.items()}
            model = {r for r in model if r.recovery is not Recovery.HEALTHY_EPOCHS or epochs[r] < 2}
        elif step == "failed":
            mode.failed_epoch()
            epochs = dict.fromkeys(epochs, 0)
        elif step == "on":
            mode.force_on()
            model.add(OPERATOR)
        else:
            mode.force_off()
            model = {r for r in model if r == EMERGENCY or r.name.startswith("breaker")}
        assert set(mode.reasons) == {r.name for r in model}
    told = set[str]()
    for change in changes.seen:
        assert change.was_on == bool(told)
        told = (told | set(change.entered)) - set(change.left)
        assert set(change.reasons) == told
    assert told == set(mode.reasons)


# Whether a reason of each kind stands afterwards: where it stood, and where it did not. None: that is illegal.
SHELL: dict[tuple[str, Recovery], tuple[bool | None, bool | None]] = {
    **{("enter", recovery): (True, True) for recovery in Recovery},
    **{("leave", recovery): (False, None) for recovery in Recovery if recovery is not Recovery.HEALTHY_EPOCHS},
    ("leave", Recovery.HEALTHY_EPOCHS): (None, None),
    **{("healthy", recovery): (True, False) for recovery in Recovery if recovery is not Recovery.HEALTHY_EPOCHS},
    ("healthy", Recovery.HEALTHY_EPOCHS): (False, False),
    **{("failed", recovery): (True, False) for recovery in Recovery},
    ("off", Recovery.BREAKER_CLOSES): (True, False),
    ("off", Recovery.EMERGENCY_CLEARED): (True, False),
    ("off", Recovery.OPERATOR): (False, False),
    ("off", Recovery.HEALTHY_EPOCHS): (False, False),
}


@pytest.mark.parametrize(("what", "recovery", "stood"), [(*key, stood) for key in SHELL for stood in (True, False)])
def test_the_shell_with_every_kind_of_reason(what: str, recovery: Recovery, stood: bool) -> None:
    """As the table above says; what is illegal raises and changes nothing, and only changes are told."""
    changes, reason = Changes(), Reason("x", recovery)
    mode = changes.mode(recovery_epochs=1)
    if stood:
        mode.enter(reason)
    changes.seen.clear()
    stands = SHELL[what, recovery][0 if stood else 1]
    if what == "enter":
        mode.enter(reason)
    elif stands is None:
        with pytest.raises(IllegalTransitionError):
            mode.leave(reason)
    elif what == "leave":
        mode.leave(reason)
    else:
        {"healthy": mode.healthy_epoch, "failed": mode.failed_epoch, "off": mode.force_off}[what]()
    expected = stood if stands is None else stands
    assert mode.reasons == (("x",) if expected else ())
    assert len(changes.seen) == (expected != stood)
